"""Makes the table of what each optimisation in the scripts is worth, by taking it out.

    OMP_NUM_THREADS=1 python tests/figures/optimisations.py [--rounds 3] [case ...]  about 15 minutes

Each variant is a script, or common.py, with a few words replaced. It runs in a fork, on a case of
benchmark.py, in turn with the script as it is; the table has medians. Seconds are of the training step, of
the head's forward and backward, or of sampling. Memory is the peak of the process, libraries included; of
log-probs what they add to it.
"""

import argparse
import inspect
import json
import os
import statistics
from typing import NamedTuple

import benchmark  # the folder of this file comes first; it adds the scripts' own
import common
import dpo
import grpo
import sft
import torch


class Variant(NamedTuple):
    """The words of a definition that make an optimisation, and what stands there without it."""
    what: str
    module: object
    name: str
    replacements: dict
    flags: list = []


UNSORTED = {
    "sorted(range(len(lengths)), key=lambda i: -lengths[i])": "list(range(len(lengths)))",
    "(len(share[-1]) + 1) * lengths[share[-1][0]]":
        "(len(share[-1]) + 1) * max(lengths[j] for j in [*share[-1], i])"}
ALL_TOKENS = {  # mask[:, 0] stays 0: nothing predicts token 0
    "head, (b, t) = ": "mask = torch.cat([mask[:, :1], torch.ones_like(mask[:, 1:])], 1)\n"
                       "        head, (b, t) = "}
NEVER_KEPT = {"len(ctx.chunks[0]) if ctx.chunks[1:] or cap else 0": "len(ctx.chunks[0])",
              "if n is not ctx.chunks[-1] or cap:": "if True:"}
ANEW = {
    "z = out[:len(hidden)]": "z = None",
    "torch.mm(hidden, weight.T, out=z) if weight.dtype == torch.float32 else z.copy_(hidden @ weight.T)":
    "z = hidden @ weight.T",
    "(torch.empty(len(ctx.chunks[0]), len(w), device=device) for _ in range(2))": "(None, None)",
    "torch.exp(z, out=out_p[:len(n)])": "torch.exp(z)",
    "out = torch.empty(len(ctx.chunks[0]) if ctx.chunks[1:] or cap else 0, len(w)": "out = torch.empty(0, len(w)",
    "torch.softmax(z, -1, out=None if cap else z)": "torch.softmax(z, -1)"}
NEVER_ENDS = {"torch.isin(tokens, stops)": "torch.zeros_like(tokens).bool()"}
READ_AGAIN = {"start(model, prompts, num_generations, ": "start(model, [p for p in prompts for _ in range(8)], 1, "}
CASES = {  # of benchmark.py
    "sft 32k": [
        Variant("rows sorted by length inside a step", common, "cut", UNSORTED),
        Variant("head over trained tokens alone", sft, "Policy", ALL_TOKENS)],
    "log-probs 150k": [
        Variant("head in chunks", grpo, "TokenLogprobs", {"CHUNK = common.LOGITS_AT_ONCE": "CHUNK = 2**40"}),
        Variant("last chunk's softmax kept for backward", grpo, "TokenLogprobs", NEVER_KEPT),
        Variant("all chunks in the same memory", grpo, "TokenLogprobs", ANEW)],
    "dpo 32k": [
        Variant("reference log-probs computed once", dpo, "main", {},
                ["--precompute_ref_log_probs", "False"])],
    "grpo 32k, 512-token prompts": [
        Variant("no pass for old log-probs in a single update", grpo, "main",
                {"if updates > 1": "if True"})],
    "rollout, 64-token prompts": [Variant("finished rows dropped", grpo, "sample", NEVER_ENDS)],
    "rollout, 512-token prompts": [
        Variant("prompt read once for its 8 completions", grpo, "sample", READ_AGAIN)]}


def replaced(variant):
    """Puts the definition into its module again with the words replaced; an error if they are not there."""
    module, text = variant.module, inspect.getsource(getattr(variant.module, variant.name))
    for old, new in variant.replacements.items():
        assert old in text, f"{module.__name__}.{variant.name} has no {old!r}"
        text = text.replace(old, new)
    exec(compile(text, module.__file__, "exec"), vars(module))


def measure(case, variant):
    """One run of a case, as it is or as a variant -> (seconds, peak in MiB)."""
    torch.set_num_threads(1)
    if variant:
        replaced(variant)
    if variant and variant.flags:
        training = benchmark.TRAINING[case]
        benchmark.TRAINING[case] = training._replace(flags=training.flags + variant.flags)
    result = benchmark.one(case, "ours", None, None)
    return result["seconds"], result.get("extra", result["peak"])


def in_fork(function, *args):
    """function(*args) in a fork of this process, which keeps what it prints to itself -> what it returns."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.write(writer, json.dumps(function(*args)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.wait()
    with os.fdopen(reader) as file:
        return json.load(file)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| optimisation | case | s | without | MiB | without |\n|---|---|---|---|---|---|")
    for case, variants in CASES.items():
        if args.case and case not in args.case:
            continue
        results = {variant: [] for variant in range(-1, len(variants))}  # -1: as it is
        for _ in range(args.rounds):
            for number, runs in results.items():
                runs.append(in_fork(measure, case, variants[number] if number >= 0 else None))
        (seconds, memory), *others = [map(statistics.median, zip(*runs)) for runs in results.values()]
        for variant, (its_seconds, its_memory) in zip(variants, others):
            print(f"| {variant.what} | {case} | {seconds:.1f} | {its_seconds:.1f} | {memory:,.0f} | "
                  f"{its_memory:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
