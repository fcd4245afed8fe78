"""python tests/optimisations.py [--rounds 3] [case ...]: what each optimisation in the scripts is worth, by taking it out.

Each variant is the script with a few words replaced, run in a fork on a case of tests/benchmark.py, in turn with the script as it
is; medians. Seconds are of the training step, of the head's forward and backward, or of sampling. Memory is the peak of the
process, libraries included; of log-probs what they add to it.
"""

import argparse
import inspect
import json
import os
import statistics

import benchmark  # the folder of this file comes first; it adds the scripts' own
import dpo
import grpo
import sft
import torch

UNSORTED = [("sorted(range(len(lengths)), key=lambda i: -lengths[i])", "list(range(len(lengths)))"),
            ("(len(batch) + 1) * lengths[batch[0]]", "(len(batch) + 1) * max(lengths[j] for j in [*batch, i])")]
NEVER_KEPT = [("len(chunks[0]) if chunks[1:] else 0", "len(chunks[0])"), ("if rows is not chunks[-1]:", "if True:")]
ANEW = [("z = out[:len(hidden)]", "z = None"), ("torch.mm(hidden, weight.T, out=z)", "z = hidden @ weight.T"), ("exp(z, out=out_p[:len(rows)])", "exp(z)"),
        ("torch.empty(len(chunks[0]), len(w), dtype=torch.float32, device=hidden.device)\n", "None\n"), ("softmax(z, -1, out=z)", "softmax(z, -1)"),
        ("out = torch.empty(size, len(w)", "out = torch.empty(0, len(w)")]
FIRST = "device, rows = prompt_ids.device"
AGAIN = ("prompt_ids, attention_mask, num_generations = (*(x.repeat_interleave(num_generations, 0) for x in (prompt_ids, attention_mask)), 1)\n    ")
CASES = {  # benchmark case -> (what is taken out, script, definition, replacements, more flags)
    "sft 32k": [
        ("rows sorted by length inside a step", sft, "micro_batches", UNSORTED, []),
        ("head over trained tokens alone", sft, "Policy", [("counts, head = loss_mask.bool()", "counts, head = torch.ones_like(loss_mask).bool()")], [])],
    "log-probs 150k": [
        ("head in chunks", grpo, "ChunkedLogprobs", [("CHUNK = 2**25", "CHUNK = 2**40")], []),
        ("last chunk's softmax kept for backward", grpo, "ChunkedLogprobs", NEVER_KEPT, []),
        ("all chunks in the same memory", grpo, "ChunkedLogprobs", ANEW, [])],
    "dpo 32k": [("reference log-probs computed once", dpo, "dpo_loss", [], ["--precompute_ref_log_probs", "False"])],
    "grpo 32k, 512-token prompts": [("no pass for old log-probs in a single update", grpo, "main", [("if updates > 1", "if True")], [])],
    "rollout, 64-token prompts": [
        ("finished rows dropped", grpo, "sample", [("if not going.all():", "if False:"), ("or not going.any():", "or False:")], [])],
    "rollout, 512-token prompts": [("prompt read once for its 8 completions", grpo, "sample", [(FIRST, AGAIN + FIRST)], [])]}


def replaced(script, name, replacements):
    """Puts the definition into the script again with the words replaced; an error if they are not there."""
    text = inspect.getsource(getattr(script, name))
    for old, new in replacements:
        assert old in text, f"{script.__name__}.{name} has no {old!r}"
        text = text.replace(old, new)
    exec(compile(text, script.__file__, "exec"), vars(script))


def measure(case, script, name, replacements, flags, out):
    """One run in a fork -> (seconds, peak in MiB)."""
    def child():
        torch.set_num_threads(1)
        if out:
            replaced(script, name, replacements)
        if flags and out:
            *rest, more = benchmark.TRAINING[case]
            benchmark.TRAINING[case] = (*rest, more | {"flags": benchmark.SMALL + flags})
        result = benchmark.one(case, "ours", None)
        return result["seconds"], result.get("extra", result["peak"])
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.write(writer, json.dumps(child()).encode())
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
        results = [[measure(case, *variant[1:], out) for variant, out in [(variants[0], False), *((v, True) for v in variants)]] for _ in range(args.rounds)]
        (seconds, memory), *others = [[statistics.median(x) for x in zip(*column)] for column in zip(*results)]
        for (what, *_), (its_seconds, its_memory) in zip(variants, others):
            print(f"| {what} | {case} | {seconds:.1f} | {its_seconds:.1f} | {memory:,.0f} | {its_memory:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
