"""Makes the table of the memory that training takes, by a formula.

    python tests/figures/memory.py                                                   seconds
    python tests/figures/memory.py --check [MODEL ...]                               about 5 minutes

--check holds the formula against real peaks: 13 short runs of sft.py, each in a process of its own.

The formula is for P weights, of which Q are trained. The layers have hidden size d, MLP size f, h heads and k
key-value heads of size e; V is the vocabulary. A number takes 4 bytes, an activation 2 under bf16 autocast.

weights      full: 4 P. LoRA: 2 P in bf16 (4 P without). QLoRA: 0.516 bytes a weight of the layers (NF4, its
             scales quantised once more), 2 bytes each of embedding and head, and one matrix at a time
             dequantised. 4 Q more for adapters
copies       of the trained weights under bf16 autocast: 2 Q
gradients    4 Q; AdamW's moments: 8 Q
activations  kept: 6 d (4 d with LoRA) + 3 h e + 2 k e + 4 f numbers a token and layer; with checkpointing d.
             Around the trunk 3 d more
at work      the larger of the head and a layer's backward. The head has 2 chunks of fp32 logits, each the
             smaller of tokens x V and 2**27 numbers (2**25 on a CPU), and in full fine-tuning its gradient,
             4 V d. The layer has 3 f numbers a token, and what checkpointing recomputes
rollout      2 k e numbers a layer and token for the cache, and 36 bytes x V a completion; never together with
             gradients, activations and what is at work
reference    4 P more in full fine-tuning with --kl_coef, nothing with LoRA

Not in it: what the allocator wastes, other models (a reward model: 4 bytes a weight), the value of ppo.py
without --share_trunk, which the line that a run prints does count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

from types import SimpleNamespace

from pipelines import ROOT, TINY

sys.path.insert(0, ROOT)
import common

SHAPES = {  # d, f, layers, h, k, e, V, whether the embedding is the head too
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 64, 151936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 128, 152064, False)}
SMALL = {"9 M": (256, 704, 6, 4, 2, 64, 16000, True), "58 M": (512, 1408, 8, 8, 8, 64, 32000, False),
         "43 M": (768, 2048, 6, 12, 4, 64, 8000, True)}
NOTHING = (16, 16, 1, 1, 1, 16, 320, True)  # what a run of it takes, the libraries take
CONTEXT = 0.6 * 2**30  # what a GPU's libraries take for themselves, assumed


def estimate(shape, mode, tokens, checkpointing=True, bf16=True, rank=16, completions=0, length=1024,
             reference=False):
    """Bytes of one process's peak, {part: bytes}.

    mode: full, LoRA or QLoRA; tokens: --micro_batch_tokens; completions: sampled at once, of `length` tokens
    with their prompt.
    """
    d, f, layers, h, k, e, V, tied = shape
    linear = layers * (2 * d * h * e + 2 * d * k * e + 3 * d * f)
    outer = V * d * (1 if tied else 2)
    full = mode == "full"
    adapters = layers * rank * (2 * (d + h * e) + 2 * (d + k * e) + 3 * (d + f))
    Q = linear + outer if full else adapters
    frozen = {"full": 0, "LoRA": (linear + outer) * (2 if bf16 else 4),
              "QLoRA": 0.516 * linear + 2 * outer + 2 * d * f}
    config = SimpleNamespace(hidden_size=d, num_attention_heads=h, num_hidden_layers=layers,
                             intermediate_size=f, head_dim=e, num_key_value_heads=k, vocab_size=V)
    parts = {
        "weights": 4 * Q + frozen[mode],
        "copies": 2 * Q if bf16 else 0,
        "moments": 8 * Q,
        "gradients": 4 * Q,
        "activations": common.step_memory(config, tokens, full, bf16, checkpointing),
        "reference": 4 * (linear + outer) if reference and full else 0}
    rollout = common.rollout_memory(config, completions, length, bf16)
    makes_room = parts["activations"] + parts["gradients"]
    return parts | {"rollout beyond": max(0, rollout - makes_room)}


def child(folder, flags):
    """Runs sft.py up to its second update and prints the peak of this process's memory."""
    import sft

    def stop(*_):
        with open("/proc/self/status") as file:
            peak = next(line for line in file if line.startswith("VmHWM"))
        print("peak", peak.split()[1], flush=True)
        os._exit(0)
    common.Run.save = stop
    sft.main(common.parse_args(sft.Args, [
        "--model_name_or_path", folder, "--dataset_name", f"{folder}/rows.jsonl",
        "--output_dir", f"{folder}/out", "--overwrite_output_dir", "--eval_fraction", "0",
        "--batch_size", "8", "--micro_batch_tokens", "1024", "--max_steps", "2", *flags]))


def peak(shape, flags):
    """Peak memory of a short run with random weights, in bytes: 2 updates of 8 rows of 256 tokens, 4 at a
    time."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    d, f, layers, h, k, e, V, tied = shape
    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(os.path.join(TINY, "model")).save_pretrained(folder)
        config = LlamaConfig(hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=h,
                             num_key_value_heads=k, head_dim=e, vocab_size=V, tie_word_embeddings=tied)
        LlamaForCausalLM(config).save_pretrained(folder)
        with open(f"{folder}/rows.jsonl", "w") as file:
            file.writelines(json.dumps({"text": f"{i:03}" + "x" * 252}) + "\n" for i in range(16))
        # memory that is freed goes back at once: what is measured is what is in use
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1",
                                    "ACCELERATE_USE_CPU": "true"}
        words = [sys.executable, os.path.abspath(__file__), "--child", folder, *flags]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("peak "):
            return int(line.split()[1]) * 1024
    sys.exit(done.stdout[-1500:] + done.stderr[-1500:])


def check(names):
    """Prints estimate and measured peak of the small models, without what the libraries take."""
    libraries = peak(NOTHING, ["--gradient_checkpointing", "False"])
    print(f"libraries {libraries / 2**20:.0f} MiB\n")
    print("| sft.py on CPU, MiB | estimate | measured | error |\n|---|---|---|---|")
    for name in names:
        for mode in ("full", "LoRA"):
            for checkpointing in (True, False):
                flags = ["--gradient_checkpointing", str(checkpointing)]
                flags += ["--lora_r", "16"] if mode == "LoRA" else []
                parts = estimate(SMALL[name], mode, 1024, checkpointing, bf16=False)
                expected, measured = sum(parts.values()), peak(SMALL[name], flags) - libraries
                print(f"| {name}, {mode}{', checkpointing' * checkpointing} | {expected / 2**20:,.0f} | "
                      f"{measured / 2**20:,.0f} | {100 * (expected / measured - 1):+.0f} % |", flush=True)


def table():
    """Prints the estimate for models that are in use, in GiB of one GPU."""
    columns = [(mode, completions) for completions in (0, 256) for mode in ("full", "LoRA", "QLoRA")]
    common.LOGITS_AT_ONCE = 2**27
    heads = [("grpo.py " if completions else "sft.py, dpo.py ") + mode for mode, completions in columns]
    print("| GiB, estimated, not measured |", " | ".join(heads), "|\n|---|" + "---|" * len(columns))
    for name, shape in SHAPES.items():
        cells = []
        for mode, completions in columns:
            parts = estimate(shape, mode, 8192, completions=completions, reference=completions > 0)
            gib = (CONTEXT + sum(parts.values())) / 2**30
            cells.append(f"{gib:.0f}" if gib >= 20 else f"{gib:.1f}")
        print(f"| {name} |", " | ".join(cells), "|")


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", nargs="*", metavar="MODEL", choices=list(SMALL),
                        help="measure these small models, by default all")
    args = parser.parse_args()
    return table() if args.check is None else check(args.check or SMALL)


if __name__ == "__main__":
    main()
