"""python tests/memory.py [--check]: an estimate of the memory that training takes, as a table; --check holds it against real peaks.

With P weights, of which Q are trained, in layers of hidden size d, MLP size f, h heads and k key-value heads of size e, vocabulary V,
and 4 bytes a number, or 2 for an activation under bf16 autocast:
weights      full: 4 P.  LoRA: 2 P in bf16 (4 P without).  QLoRA: 0.516 bytes a weight of the layers (NF4, its scales quantised once more),
             2 bytes each of embedding and head, and one matrix at a time dequantised.  + 4 Q for adapters
copies       of the trained weights under bf16 autocast: 2 Q
gradients    4 Q;  AdamW's moments 8 Q
activations  kept: 6 d (4 d with LoRA) + 3 h e + 2 k e + 4 f numbers a token and layer; with checkpointing d. Around the trunk 3 d more
at work      the larger of: the head, with 2 chunks of fp32 logits, each the smaller of tokens x V and 2**25 numbers, and in full
             fine-tuning its gradient, 4 V d; a layer's backward, 3 f numbers a token, and what checkpointing recomputes
rollout      2 k e numbers a layer and token for the cache, and 36 bytes x V a completion; never together with the last three
reference    4 P more in full fine-tuning with --kl_coef, nothing with LoRA
Not in it: what the allocator wastes, other models (a reward model: 4 bytes a weight), the value of ppo.py without --share_trunk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
SHAPES = {  # d, f, layers, h, k, e, V, whether the embedding is the head too
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 64, 151936, True), "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 128, 152064, False)}
SMALL = {"9 M": (256, 704, 6, 4, 2, 64, 16000, True), "58 M": (512, 1408, 8, 8, 8, 64, 32000, False), "43 M": (768, 2048, 6, 12, 4, 64, 8000, True)}
CONTEXT = 0.6 * 2**30  # what a GPU's libraries take for themselves, assumed


def estimate(shape, mode, tokens, checkpointing=True, bf16=True, rank=16, completions=0, length=1024, reference=False):
    """Bytes of one process's peak, part by part. tokens: --micro_batch_tokens; completions: sampled at once, of `length` with prompt."""
    d, f, layers, h, k, e, V, tied = shape
    linear = layers * (2 * d * h * e + 2 * d * k * e + 3 * d * f)
    outer = V * d * (1 if tied else 2)
    adapters = layers * rank * (2 * (d + h * e) + 2 * (d + k * e) + 3 * (d + f))
    full, Q = mode == "full", linear + outer if mode == "full" else adapters
    size, stream = (2, 4 if full else 2) if bf16 else (4, 4)  # bytes of an activation; of the sums between the layers
    frozen = {"full": 0, "LoRA": (linear + outer) * size, "QLoRA": 0.516 * linear + 2 * outer + 2 * d * f}[mode]
    wide = 3 * h * e + 2 * k * e + 4 * f + (0 if full or not bf16 else h * e + f)  # each adapter casts its own input
    layer = (26 if bf16 else 24) * d - (0 if full else 2 * size * d) + size * wide  # norms are in fp32; frozen ones keep less
    kept = tokens * (layers * stream * d if checkpointing else layers * layer) + 12 * tokens * d
    chunk = min(tokens * V, 2**25)
    head = 8 * chunk + (4 * V * d if full else 0)
    parts = {"weights": 4 * Q + frozen, "copies": 2 * Q if bf16 else 0, "moments": 8 * Q, "gradients": 4 * Q, "activations": kept,
             "at work": max(head, tokens * (layer * checkpointing + 3 * size * f)),
             "reference": 4 * (linear + outer) if reference and full else 0}
    rollout = completions * (2 * layers * k * e * length * size + 36 * V)
    return parts | {"rollout beyond": max(0, rollout - parts["activations"] - parts["at work"] - parts["gradients"])}


def child(folder, flags):
    """Runs sft.py up to its second update and prints the peak of this process's memory."""
    sys.path[:0] = [os.path.dirname(HERE)]
    import common
    import sft

    def stop(*_):
        with open("/proc/self/status") as file:
            print("peak", next(line for line in file if line.startswith("VmHWM")).split()[1], flush=True)
        os._exit(0)
    common.save_checkpoint = stop
    sft.main(common.parse_args(sft.Args, [
        "--model_name_or_path", folder, "--dataset_name", f"{folder}/rows.jsonl", "--output_dir", f"{folder}/out", "--overwrite_output_dir",
        "--eval_fraction", "0", "--batch_size", "8", "--micro_batch_tokens", "1024", "--max_steps", "2", *flags]))


def peak(shape, flags):
    """Peak memory of a short run with random weights, in bytes: 2 updates of 8 rows of 256 tokens, 4 at a time."""
    from transformers import AutoTokenizer, LlamaConfig
    d, f, layers, h, k, e, V, tied = shape
    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(os.path.join(HERE, "tiny", "model")).save_pretrained(folder)
        LlamaConfig(hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=h, num_key_value_heads=k, head_dim=e,
                    vocab_size=V, tie_word_embeddings=tied, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        with open(f"{folder}/rows.jsonl", "w") as file:
            file.writelines(json.dumps({"text": f"{i:03}" + "x" * 252}) + "\n" for i in range(16))
        # memory that is freed goes back at once: what is measured is what is in use
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run([sys.executable, __file__, "--child", folder, *flags], env=environment, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("peak ")]
        return int(lines[0].split()[1]) * 1024 if lines else sys.exit(done.stdout[-1500:] + done.stderr[-1500:])


def check():
    """Prints estimate and measured peak of the small models; the libraries are a run whose model weighs next to nothing."""
    libraries = peak((16, 16, 1, 1, 1, 16, 320, True), ["--gradient_checkpointing", "False"])
    print(f"libraries {libraries / 2**20:.0f} MiB\n\n| sft.py on CPU, MiB | estimate | measured | error |\n|---|---|---|---|")
    for name, shape in SMALL.items():
        for mode, checkpointing in (("full", True), ("full", False), ("LoRA", True), ("LoRA", False)):
            flags = ["--gradient_checkpointing", str(checkpointing), *(["--lora_r", "16"] if mode == "LoRA" else [])]
            want = sum(estimate(shape, mode, 1024, checkpointing, bf16=False).values())
            got = peak(shape, flags) - libraries
            print(f"| {name}, {mode}{', checkpointing' * checkpointing} | {want / 2**20:,.0f} | {got / 2**20:,.0f} | "
                  f"{100 * (want / got - 1):+.0f} % |", flush=True)


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return check()
    columns = [(mode, completions) for completions in (0, 256) for mode in ("full", "LoRA", "QLoRA")]
    print("| GiB, estimated, not measured |", " | ".join(("grpo.py " if n else "sft.py, dpo.py ") + mode for mode, n in columns), "|")
    print("|---|" + "---|" * len(columns))
    for name, shape in SHAPES.items():
        cells = [(CONTEXT + sum(estimate(shape, mode, 8192, completions=n, reference=n > 0).values())) / 2**30 for mode, n in columns]
        print(f"| {name} |", " | ".join(f"{cell:.0f}" if cell >= 20 else f"{cell:.1f}" for cell in cells), "|")


if __name__ == "__main__":
    main()
