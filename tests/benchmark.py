"""python tests/benchmark.py: speed and memory of the scripts against TRL 1.16 on the same model, rows, batch and machine.

    pip install trl==1.16.0 && OMP_NUM_THREADS=1 python tests/benchmark.py [--rounds 3] [case ...]

Every run is a process of its own, forked from one that has imported the libraries; ours and TRL's alternate; medians and
ratios are printed. Without TRL ours alone is measured.
TRL runs with its default options for the case (8 rows a device, accumulated; gradient checkpointing on). Ours runs with
--gradient_checkpointing False --micro_batch_tokens 768, which suits a model this small and changes no result; the case
"sft 32k, our defaults" (only by name) runs without them. Timed is the training itself, from the start of the first step to the end of the last one. Memory is the peak of the whole
process, libraries included. A token is a byte here. The rows are pieces of this project's own text with as many bytes as GSM8K's
questions and answers have tokens (log-normal, medians 50 and 105), unless --dataset_name gives a file with `question` and `answer`.
"""

import argparse
import glob
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# name -> (script, vocabulary, rows or completions of a step, steps, more)
TRAINING = {
    "sft 32k": ("sft", 32_000, 32, 1, {}), "sft 150k": ("sft", 150_000, 4, 1, {}),
    "dpo 32k": ("dpo", 32_000, 8, 1, {}), "reward_model 32k": ("reward_model", 32_000, 32, 1, {}),
    "grpo 32k, 64-token prompts": ("grpo", 32_000, 8, 1, {"prompt": 64}), "grpo 32k, 512-token prompts": ("grpo", 32_000, 8, 1, {"prompt": 512}),
}
BY_NAME = {"sft 150k, 32 rows": ("sft", 150_000, 32, 1, {}), "sft 32k, our defaults": ("sft", 32_000, 32, 1, {"flags": []})}  # not in the table
TRAINING |= BY_NAME
SMALL = ["--gradient_checkpointing", "False", "--micro_batch_tokens", "768"]
OTHERS = ["log-probs 150k", "rollout, 64-token prompts", "rollout, 512-token prompts", "rows", "300 steps"]


# ---- models and rows -------------------------------------------------------------------------------------------------------

def make_model(folder, vocabulary):
    """A llama of 6 layers of 256 over the byte tokenizer's ids, random weights; one token in 50 ends a completion."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(HERE, "tiny", "model"))
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
                         num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(vocabulary - vocabulary // 50, vocabulary)]
    model.save_pretrained(folder)


def make_rows(n, dataset_name=None):
    """[{"question", "answer", "other"}]"""
    if dataset_name:
        with open(dataset_name) as file:
            rows = [json.loads(line) for line in file][:n]
        return [r | {"other": rows[i - 1]["answer"]} for i, r in enumerate(rows)]
    text = "".join(open(p, encoding="utf-8").read() for p in [os.path.join(ROOT, "README.md"), *sorted(glob.glob(os.path.join(ROOT, "*.py")))])
    text, rng = text.encode("ascii", "ignore").decode(), random.Random(0)

    def piece(mean, spread):
        length = min(600, max(20, round(rng.lognormvariate(mean, spread))))
        start = rng.randrange(len(text) - length)
        return text[start:start + length].strip() or "nothing"
    return [{"question": piece(3.91, 0.39), "answer": piece(4.65, 0.49), "other": piece(4.65, 0.49)} for _ in range(n)]


def write(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


# ---- the runs, each in a process of its own ---------------------------------------------------------------------------------

def length_reward(completions, **kwargs):
    return [float(len(c if isinstance(c, str) else c[0]["content"]) % 7) for c in completions]


def clocked():
    """A list that every later run of a script fills: (seconds, tokens so far) at its first step's start and after every step."""
    import common
    times, opened, progress = [], common.RunLog.__init__, common.RunLog.progress

    def start(self, *args):
        opened(self, *args)
        times[:] = [(time.perf_counter(), 0)]

    def step(self, number, tokens, shown):
        progress(self, number, tokens, shown)
        times.append((time.perf_counter(), times[-1][1] + tokens))
    common.RunLog.__init__, common.RunLog.progress = start, step
    return times


def timed(owner, name, spent):
    """Adds what each call of owner.name takes to spent[0]."""
    inner = getattr(owner, name)

    def outer(*args, **kwargs):
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - start
    setattr(owner, name, outer)


def ours(case, folder, dataset_name):
    """One training run of a script -> seconds, first loss, rows, trained tokens, and seconds of rollout or GFLOP/s."""
    import common
    kind, vocabulary, batch, steps, more = TRAINING[case]
    script = __import__(kind)
    rows = make_rows(batch * steps, dataset_name)
    make_model(f"{folder}/model", vocabulary)
    flags = ["--model_name_or_path", f"{folder}/model", "--output_dir", f"{folder}/out", "--eval_fraction", "0", "--max_steps", str(steps),
             "--learning_rate", "1e-4", "--batch_size", str(batch), *more.get("flags", SMALL)]
    if kind == "grpo":
        rows = [{"prompt": (r["question"] * 99)[:more["prompt"]]} for r in rows[:batch * steps // 8]]
        (open(f"{folder}/reward.py", "w")).write("def f(completions):\n    return [float(len(c) % 7) for c in completions]\n")
        flags += ["--reward_funcs", f"{folder}/reward.py:f", "--max_completion_length", "128", "--max_prompt_length", "600", "--batch_size", str(batch // 8)]
    elif kind == "sft":
        rows = [{"prompt": r["question"], "completion": r["answer"]} for r in rows]
    else:
        rows = [{"prompt": r["question"], "chosen": r["answer"], "rejected": r["other"]} for r in rows]
        flags += ["--beta", "0.1", "--max_completion_length", "0"] if kind == "dpo" else []
    flags += ["--dataset_name", write(f"{folder}/rows.jsonl", rows)]
    times, rollout = clocked(), [0.0]
    if kind == "grpo":
        timed(script, "rollout", rollout)
    script.main(common.parse_args(script.Args, flags))
    with open(f"{folder}/out/metrics.jsonl") as file:
        metrics = [json.loads(line) for line in file]
    result = {"seconds": times[-1][0] - times[0][0], "rows": batch * steps, "loss": metrics[0]["loss"]}
    if kind in ("sft", "grpo"):
        result["tokens"] = sum(m["trained_tokens"] for m in metrics)
    if kind == "grpo":
        result["rollout"] = rollout[0]
    if kind == "sft":
        result["gflops"] = model_flops(rows, result["tokens"], times[-1][1], vocabulary) / result["seconds"] / 1e9
        result["machine"] = matmul_rate()
    return result


def model_flops(rows, trained_tokens, tokens, vocabulary):
    """Forward and backward without recomputation: 6 a weight and token of the trunk, 6 a weight of the head and trained token, and
    causal attention's 2 x 2 x T^2 / 2 x 3 a layer and channel, T taken from the rows' texts."""
    lengths = [len(r["prompt"]) + len(r["completion"]) for r in rows]
    return (6 * 6 * (4 * 256 * 256 + 3 * 256 * 1024) * tokens + 6 * 256 * vocabulary * trained_tokens
            + 6 * 256 * 6 * sum(n * n for n in lengths))


def matmul_rate():
    """GFLOP/s of this machine: fp32, one thread, 2048 x 2048 x 2048, the median of ten."""
    import torch
    a, b, rates = torch.randn(2048, 2048), torch.randn(2048, 2048), []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        rates.append(2 * 2048**3 / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)


def theirs(case, folder, dataset_name):
    """The same by TRL's trainer."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, TrainerCallback
    kind, vocabulary, batch, steps, more = TRAINING[case]
    rows = make_rows(batch * steps, dataset_name)
    make_model(f"{folder}/model", vocabulary)
    options = {"output_dir": f"{folder}/out", "max_steps": steps, "learning_rate": 1e-4, "per_device_train_batch_size": min(8, batch),
               "gradient_accumulation_steps": max(1, batch // 8), "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False,
               "seed": 0, "disable_tqdm": True}
    turn = lambda role, text: [{"role": role, "content": text}]
    if kind == "sft":
        data = [{"prompt": turn("user", r["question"]), "completion": turn("assistant", r["answer"])} for r in rows]
        trainer = lambda **k: trl.SFTTrainer(model=f"{folder}/model", args=trl.SFTConfig(max_length=2048, **options), **k)
    elif kind == "grpo":
        data = [{"prompt": turn("user", (r["question"] * 99)[:more["prompt"]])} for r in rows[:batch * steps // 8]]
        options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1}
        trainer = lambda **k: trl.GRPOTrainer(model=f"{folder}/model", reward_funcs=length_reward, args=trl.GRPOConfig(
            num_generations=8, max_completion_length=128, temperature=1.0, **options), **k)
    else:
        data = [{"prompt": turn("user", r["question"]), "chosen": turn("assistant", r["answer"]), "rejected": turn("assistant", r["other"])} for r in rows]
        if kind == "dpo":
            trainer = lambda **k: trl.DPOTrainer(model=f"{folder}/model", args=trl.DPOConfig(beta=0.1, max_length=4096, **options), **k)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/model", num_labels=1)
            trainer = lambda **k: trl.RewardTrainer(model=model, args=trl.RewardConfig(max_length=4096, **options), **k)
    times, losses, lengths, rollout = [], [], [], [0.0]

    class Clock(TrainerCallback):
        def on_train_begin(self, *a, **k):
            times.append(time.perf_counter())

        def on_step_end(self, *a, **k):
            times.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **k):
            losses.append(logs.get("loss"))
            lengths.append(logs.get("completions/mean_length"))
    from transformers import AutoTokenizer
    if kind == "grpo":
        timed(trl.GRPOTrainer, "_generate_and_score_completions", rollout)
    t = trainer(train_dataset=Dataset.from_list(data), processing_class=AutoTokenizer.from_pretrained(f"{folder}/model"), callbacks=[Clock()])
    t.train()
    result = {"seconds": times[-1] - times[0], "rows": batch * steps, "loss": losses[0]}
    if kind == "grpo":
        result |= {"rollout": rollout[0], "tokens": batch * sum(length for length in lengths if length)}
    return result


def logprobs(which):
    """Forward and backward of 2,048 log-probs over 150,000 ids from hidden states of 256."""
    import torch
    import grpo
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2048, 256, requires_grad=True), torch.randn(150_000, 256).mul_(0.05).requires_grad_()
    targets = torch.randint(150_000, (2048,))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if which == "ours":
        values = grpo.ChunkedLogprobs.apply(hidden, weight, None, targets, 1.0)[0]
    else:
        values = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    values.sum().backward()
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "rows": 2048, "tokens": 2048, "loss": values.mean().item(), "extra": (peak - before) / 1024}


def rollout(which, prompt, folder):
    """6 prompts (3 of 512 tokens) x 8 completions of at most 128 tokens, one token in 50 ending one: the sampler against generate()."""
    import torch
    import grpo
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(1)
    make_model(f"{folder}/model", 32_000)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model").eval()
    stops, ids = model.generation_config.eos_token_id, torch.randint(0, 256, (6 if prompt < 512 else 3, prompt), generator=torch.Generator().manual_seed(1))
    mask, start = torch.ones_like(ids), time.perf_counter()
    if which == "ours":
        uniforms = torch.rand(8 * len(ids), 128, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        _, _, lengths = grpo.sample(model, ids, mask, uniforms, 128, 1.0, stops, 8)
        units = int(lengths.sum())
    else:
        torch.manual_seed(2)
        out = model.generate(input_ids=ids.repeat_interleave(8, 0), attention_mask=mask.repeat_interleave(8, 0), do_sample=True, top_k=0, top_p=1.0,
                             temperature=1.0, max_new_tokens=128, eos_token_id=stops, pad_token_id=256)[:, prompt:]
        ended = torch.isin(out, torch.tensor(stops))
        units = int((ended.cumsum(-1) - ended.long() == 0).sum())
    return {"seconds": time.perf_counter() - start, "rows": 8 * len(ids), "tokens": units}


def rows_case(folder):
    """100,000 rows read, checked and tokenized; then the steps' speed with 1,000 and 100,000 rows."""
    import common
    import sft
    lines, whole, times = [], make_rows(2000), clocked()
    for n in (1_000, 100_000):
        path = write(f"{folder}/{n}.jsonl", [{"prompt": f"{i} " + whole[i % 2000]["question"], "completion": whole[i % 2000]["answer"]} for i in range(n)])
        start = time.perf_counter()
        common.read_rows(path)
        read, start = time.perf_counter() - start, time.perf_counter()
        sft.main(common.parse_args(sft.Args, ["--model_name_or_path", os.path.join(HERE, "tiny", "sft"), "--dataset_name", path, "--output_dir",
                                              f"{folder}/out{n}", "--eval_fraction", "0", "--batch_size", "16", "--max_steps", "40"]))
        first, (warm, before), (last, tokens) = times[0][0], times[10], times[-1]  # the first steps of a process are slow
        lines.append({"rows": n, "read, s": read, "start-up, s": first - start, "start-up, rows/s": n / (first - start),
                      "tokens/s": (tokens - before) / (last - warm)})
    return lines


def steps_case(folder):
    """300 steps of sft.py on the tiny model: memory in use after each 50."""
    import common
    import sft
    rows, seen, progress = make_rows(2000), [], common.RunLog.progress
    path = write(f"{folder}/rows.jsonl", [{"prompt": r["question"], "completion": r["answer"]} for r in rows])

    def watched(self, step, tokens, shown):
        progress(self, step, tokens, shown)
        with open("/proc/self/statm") as file:
            seen.append(int(file.read().split()[1]) * resource.getpagesize() / 2**20)
    common.RunLog.progress = watched
    sft.main(common.parse_args(sft.Args, ["--model_name_or_path", os.path.join(HERE, "tiny", "sft"), "--dataset_name", path, "--output_dir", f"{folder}/out",
                                          "--eval_fraction", "0", "--batch_size", "8", "--max_steps", "300"]))
    return [{"step": i, "MiB": seen[i - 1]} for i in range(50, 301, 50)]


def one(case, which, dataset_name):
    with tempfile.TemporaryDirectory() as folder:
        if case in TRAINING:
            result = (theirs if which == "trl" else ours)(case, folder, dataset_name)
        elif case.startswith("log-probs"):
            result = logprobs(which)
        elif case.startswith("rollout"):
            result = rollout(which, 512 if "512" in case else 64, folder)
        else:
            result = {"lines": rows_case(folder) if case == "rows" else steps_case(folder)}
    return result | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def serve(libraries):
    """Imports the libraries once; then every line [case, which, dataset_name] on stdin is run in a fork, its result printed."""
    for name in libraries:
        importlib.import_module(name)
    import torch
    torch.set_num_threads(1)
    for line in sys.stdin:
        if os.fork() == 0:
            try:
                print("RESULT " + json.dumps(one(*json.loads(line))), flush=True)
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.wait()
        print("DONE", flush=True)


# ---- the table ---------------------------------------------------------------------------------------------------------------

SERVERS = {}


def run(case, which, dataset_name):
    kind = "trl" if which == "trl" else "ours"
    libraries = ["trl.trainer.grpo_trainer"] if kind == "trl" else ["grpo", "dpo", "reward_model", "sft"]
    if kind not in SERVERS:
        SERVERS[kind] = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--serve", *libraries], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True)
    server, said = SERVERS[kind], []
    server.stdin.write(json.dumps([case, which, dataset_name]) + "\n")
    server.stdin.flush()
    for line in server.stdout:
        if line == "DONE\n":
            break
        said.append(line)
    found = [line[7:] for line in said if line.startswith("RESULT ")]
    return json.loads(found[0]) if found else sys.exit(f"{case} ({which}) failed:\n{''.join(said)[-2000:]}")


def compare(case, rounds, dataset_name, other):
    """Runs both in turn and prints a line of the table; for grpo two more, of rollout and update apart. -> the median of ours."""
    results = {which: [] for which in ("ours", other) if which}
    for _ in range(rounds):
        for which in results:
            results[which].append(run(case, which, dataset_name))
    median = {which: {key: statistics.median(r[key] for r in rs) for key in rs[0] if isinstance(rs[0][key], (int, float))} for which, rs in results.items()}
    mine, its = median["ours"], median.get(other)
    if its and "tokens" not in its and "tokens" in mine:
        its["tokens"] = mine["tokens"]  # the same rows
    memory = "extra" if "extra" in mine else "peak"

    def figures(m, seconds):
        rate = lambda key: f"{m[key] / seconds:,.1f}" if key in m else ""
        return [f"{seconds:.1f}", rate("rows"), rate("tokens")]

    def line(name, part, with_memory):
        cells = [name, *figures(mine, part(mine)), f"{mine[memory]:,.0f}" if with_memory else ""]
        if its:
            work = mine["tokens"] / its["tokens"] if part(mine) != mine["seconds"] or case.startswith("rollout") or "grpo" in case else 1.0
            cells += [*figures(its, part(its)), f"{its[memory]:,.0f}" if with_memory else "", f"{part(its) / part(mine) * work:.1f} x",
                      f"{mine[memory] / its[memory]:.2f} x" if with_memory else "",
                      f"{mine['loss']:.4f} / {its['loss']:.4f}" if with_memory and "loss" in mine and "grpo" not in case else ""]
        print("| " + " | ".join(cells) + " |", flush=True)
    line(case, lambda m: m["seconds"], True)
    if "rollout" in mine:
        line("- its rollout", lambda m: m["rollout"], False)
        line("- its update", lambda m: m["seconds"] - m["rollout"], False)
    return mine


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dataset_name")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.case)
    has_trl, notes = importlib.util.find_spec("trl") is not None, []
    print("| case | s | rows/s | tokens/s | MiB | theirs: s | rows/s | tokens/s | MiB | speed, ours / theirs | memory, ours / theirs | first losses |")
    print("|---" * 12 + "|")
    for case in args.case or [*[c for c in TRAINING if c not in BY_NAME], *OTHERS[:3]]:
        if case in TRAINING or case in OTHERS[:3]:
            mine = compare(case, args.rounds, args.dataset_name, ("trl" if has_trl else None) if case in TRAINING else "plain")
            if "gflops" in mine:
                notes.append(f"{case}: {mine['gflops']:.0f} of the machine's {mine['machine']:.0f} GFLOP/s ({mine['gflops'] / mine['machine']:.0%})")
    print("\n" + "\n".join(notes))
    for case in OTHERS[3:]:
        if not args.case or case in args.case:
            lines = run(case, "ours", None)["lines"]
            print("\n| " + " | ".join(lines[0]) + " |\n|" + "---|" * len(lines[0]))
            for line in lines:
                print("| " + " | ".join(f"{v:,.0f}" if v >= 100 else f"{v:.1f}" for v in line.values()) + " |")


if __name__ == "__main__":
    main()
