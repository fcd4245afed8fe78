"""Makes the table of speed and memory against TRL 1.16: same model, rows, batch and machine.

    pip install trl==1.16.0
    OMP_NUM_THREADS=1 python tests/figures/benchmark.py [--rounds 3] [case ...]      19 minutes
    ... benchmark.py --model FOLDER --dataset_name FILE "model sft" "model dpo" "model grpo"

Every run is a process of its own, forked from one that has imported the libraries. Ours and TRL's alternate;
medians and ratios are printed. Without TRL ours alone is measured. TRL runs with its default options for the
case: 8 rows a device, accumulated, and gradient checkpointing. Ours runs with --gradient_checkpointing False
--micro_batch_tokens 768, which suits a model this small and changes no result.

Timed is the training itself, from the start of the first step to the end of the last one. Memory is the peak
of the whole process, libraries included. A token is a byte here. The rows are pieces of this project's own
text, as long as GSM8K's questions and answers: log-normal, medians 50 and 105. --dataset_name gives a file
with `question` and `answer` instead.

By name alone run "sft 150k, 32 rows" and "sft 32k, our defaults", which is without the two flags, and the
cases of a real model, --model: 8 rows, 4 pairs, and 2 questions with 8 completions of up to 64 tokens each.
"""

import argparse
import glob
import importlib
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
from typing import NamedTuple

from pipelines import ROOT, TINY, model_flops, write

sys.path.insert(0, ROOT)
os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1",
                  TOKENIZERS_PARALLELISM="false")


class Training(NamedTuple):
    """One step of a script: vocabulary, rows or completions of the step, and flags of ours."""
    script: str
    vocabulary: int
    batch: int
    prompt: int = 0  # tokens of a prompt, for grpo
    flags: list = ["--gradient_checkpointing", "False", "--micro_batch_tokens", "768"]
    in_table: bool = True
    completion: int = 128  # at most so many tokens are sampled


TRAINING = {
    "sft 32k": Training("sft", 32_000, 32),
    "sft 150k": Training("sft", 150_000, 4),
    "dpo 32k": Training("dpo", 32_000, 8),
    "reward_model 32k": Training("reward_model", 32_000, 32),
    "grpo 32k, 64-token prompts": Training("grpo", 32_000, 8, prompt=64),
    "grpo 32k, 512-token prompts": Training("grpo", 32_000, 8, prompt=512),
    "sft 150k, 32 rows": Training("sft", 150_000, 32, in_table=False),
    "sft 32k, our defaults": Training("sft", 32_000, 32, flags=[], in_table=False),
    "model sft": Training("sft", 0, 8, in_table=False),
    "model dpo": Training("dpo", 0, 4, in_table=False),
    "model grpo": Training("grpo", 0, 16, in_table=False, completion=64)}
PARTS = ["log-probs 150k", "rollout, 64-token prompts", "rollout, 512-token prompts"]  # against plain torch
LISTS = ["rows", "300 steps"]  # ours alone; tables of their own


# ---- models and rows ---------------------------------------------------------------------------------------

def make_model(folder, vocabulary, given=None):
    """A llama of 6 layers of 256 over the byte tokenizer's ids, with random weights; one token in 50 ends a
    completion. With no vocabulary the model that was given."""
    if not vocabulary:
        return os.symlink(os.path.abspath(given), folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(TINY, "model"))
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_config(config)
    endings = range(vocabulary - vocabulary // 50, vocabulary)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *endings]
    model.save_pretrained(folder)


def make_rows(n, dataset_name=None):
    """-> n rows {"question", "answer", "other"}."""
    if dataset_name:
        with open(dataset_name) as file:
            rows = [json.loads(line) for line in file][:n]
        return [row | {"other": rows[i - 1]["answer"]} for i, row in enumerate(rows)]
    text = ""
    for path in [os.path.join(ROOT, "README.md"), *sorted(glob.glob(os.path.join(ROOT, "*.py")))]:
        with open(path, encoding="utf-8") as file:
            text += file.read()
    text, rng = text.encode("ascii", "ignore").decode(), random.Random(0)

    def piece(mean, spread):
        length = min(600, max(20, round(rng.lognormvariate(mean, spread))))
        start = rng.randrange(len(text) - length)
        return text[start:start + length].strip() or "nothing"
    return [{"question": piece(3.91, 0.39), "answer": piece(4.65, 0.49), "other": piece(4.65, 0.49)}
            for _ in range(n)]


def long_prompts(rows, case):
    """One prompt of the case's length, or whole where it has none, for every 8 completions."""
    rows = rows[:case.batch // 8]
    return [(row["question"] * 99)[:case.prompt] if case.prompt else row["question"] for row in rows]


# ---- what is measured --------------------------------------------------------------------------------------

def peak():
    """The most memory that this process has had so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def clocked():
    """A list that every later run of a script fills: (seconds, tokens so far), at the start of its first step
    and after every step."""
    import common
    times, start, done = [], common.Run.start, common.Run.done

    def clocked_start(self, total_steps, what):
        start(self, total_steps, what)
        times[:] = [(time.perf_counter(), 0)]

    def clocked_done(self, metrics, tokens, shown):
        done(self, metrics, tokens, shown)
        times.append((time.perf_counter(), times[-1][1] + tokens))
    common.Run.start, common.Run.done = clocked_start, clocked_done
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


def matmul_rate():
    """GFLOP/s of this machine: fp32, one thread, 2048 x 2048 x 2048, the median of ten."""
    import torch
    a, b, rates = torch.randn(2048, 2048), torch.randn(2048, 2048), []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        rates.append(2 * 2048**3 / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)


# ---- ours, each run in a process of its own ----------------------------------------------------------------

def our_rows(case, dataset_name):
    """The rows of a case in the columns that its script reads."""
    rows = make_rows(case.batch, dataset_name)
    if case.script == "grpo":
        return [{"prompt": prompt} for prompt in long_prompts(rows, case)]
    if case.script == "sft":
        return [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    return [{"prompt": row["question"], "chosen": row["answer"], "rejected": row["other"]} for row in rows]


def our_flags(case, folder):
    """The flags of a case; for grpo also the file of its reward."""
    flags = ["--model_name_or_path", f"{folder}/model", "--output_dir", f"{folder}/out",
             "--dataset_name", f"{folder}/rows.jsonl", "--eval_fraction", "0", "--max_steps", "1",
             "--learning_rate", "1e-4", *case.flags]
    if case.script == "dpo":
        flags += ["--beta", "0.1", "--max_completion_length", "0"]
    if case.script == "grpo":
        with open(f"{folder}/reward.py", "w") as file:
            file.write("def f(completions):\n    return [float(len(c) % 7) for c in completions]\n")
        flags += ["--reward_funcs", f"{folder}/reward.py:f", "--max_completion_length", str(case.completion),
                  "--max_prompt_length", "600"]
    return flags + ["--batch_size", str(case.batch // 8 if case.script == "grpo" else case.batch)]


def ours(case, folder, dataset_name, given):
    """One step of a script -> seconds, rows, first loss, trained tokens, and seconds of the rollout or
    GFLOP/s."""
    import common
    script, rows = importlib.import_module(case.script), our_rows(case, dataset_name)
    make_model(f"{folder}/model", case.vocabulary, given)
    write(f"{folder}/rows.jsonl", rows)
    times, rollout = clocked(), [0.0]
    if case.script == "grpo":
        timed(script, "rollout", rollout)
    script.main(common.parse_args(script.Args, our_flags(case, folder)))
    with open(f"{folder}/out/metrics.jsonl") as file:
        metrics = json.loads(file.readline())
    (first, _), (last, tokens) = times
    result = {"seconds": last - first, "rows": case.batch, "loss": metrics["loss"]}
    if case.script in ("sft", "grpo"):
        result["tokens"] = metrics["trained_tokens"]
    if case.script == "grpo":
        result["rollout"] = rollout[0]
    if case.script == "sft":
        flops = model_flops(f"{folder}/model", case.batch, result["tokens"], tokens)
        result |= {"gflops": flops / result["seconds"] / 1e9, "machine": matmul_rate()}
    return result


def rows_case(folder):
    """Reads, checks and tokenizes 1,000 and 100,000 rows -> table rows, with the speed of the steps then."""
    import common
    import sft
    lines, pieces, times = [], make_rows(2000), clocked()
    for n in (1_000, 100_000):
        whole = (pieces[i % 2000] for i in range(n))
        path = write(f"{folder}/{n}.jsonl", [{"prompt": f"{i} {row['question']}", "completion": row["answer"]}
                                             for i, row in enumerate(whole)])
        start = time.perf_counter()
        common.read_rows(path)
        begun = time.perf_counter()
        sft.main(common.parse_args(sft.Args, [
            "--model_name_or_path", os.path.join(TINY, "sft"), "--dataset_name", path,
            "--output_dir", f"{folder}/out{n}", "--eval_fraction", "0", "--batch_size", "16",
            "--max_steps", "40"]))
        first, (warm, before), (last, tokens) = times[0][0], times[10], times[-1]  # the first steps are slow
        lines.append({"rows": n, "read, s": begun - start, "start-up, s": first - begun,
                      "start-up, rows/s": n / (first - begun), "tokens/s": (tokens - before) / (last - warm)})
    return {"lines": lines}


def steps_case(folder):
    """300 steps of sft.py on the tiny model -> table rows: memory in use after each 50."""
    import common
    import sft
    used, done = [], common.Run.done
    path = write(f"{folder}/rows.jsonl", [{"prompt": row["question"], "completion": row["answer"]}
                                          for row in make_rows(2000)])

    def watched(self, metrics, tokens, shown):
        done(self, metrics, tokens, shown)
        with open("/proc/self/statm") as file:
            used.append(int(file.read().split()[1]) * resource.getpagesize() / 2**20)
    common.Run.done = watched
    sft.main(common.parse_args(sft.Args, [
        "--model_name_or_path", os.path.join(TINY, "sft"), "--dataset_name", path,
        "--output_dir", f"{folder}/out", "--eval_fraction", "0", "--batch_size", "8", "--max_steps", "300"]))
    return {"lines": [{"step": step, "MiB": used[step - 1]} for step in range(50, 301, 50)]}


# ---- ours against plain torch and transformers -------------------------------------------------------------

def logprobs(which):
    """Forward and backward of 2,048 log-probs over 150,000 ids from hidden states of 256."""
    import torch
    import grpo
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(2048, 256, requires_grad=True)
    weight = torch.randn(150_000, 256).mul_(0.05).requires_grad_()
    targets = torch.randint(150_000, (2048,))
    before, start = peak(), time.perf_counter()
    if which == "ours":
        values, _, _ = grpo.TokenLogprobs.apply(hidden, weight, None, targets, None)
    else:
        values = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    values.sum().backward()
    return {"seconds": time.perf_counter() - start, "rows": 2048, "tokens": 2048,
            "loss": values.mean().item(), "extra": peak() - before}


def sampling(which, length, folder):
    """6 prompts (3 of 512 tokens) x 8 completions of at most 128 tokens: our sampler against generate()."""
    import torch
    import grpo
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(1)
    make_model(f"{folder}/model", 32_000)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model").eval()
    stop_ids = model.generation_config.eos_token_id
    shape = (6 if length < 512 else 3, length)
    prompts = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1))
    rows, start = 8 * len(prompts), time.perf_counter()
    if which == "ours":
        uniforms = torch.rand(rows, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        _, _, lengths = grpo.sample(model, prompts.tolist(), uniforms, 128, 1.0, stop_ids, 8)
        tokens = lengths.sum().item()
    else:
        torch.manual_seed(2)
        input_ids = prompts.repeat_interleave(8, 0)
        out = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), do_sample=True,
                             top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=128, eos_token_id=stop_ids,
                             pad_token_id=256)[:, length:]
        ended = torch.isin(out, torch.tensor(stop_ids))
        tokens = (ended.cumsum(-1) - ended.long() == 0).sum().item()
    return {"seconds": time.perf_counter() - start, "rows": rows, "tokens": tokens}


# ---- TRL's -------------------------------------------------------------------------------------------------

def length_reward(completions, **kwargs):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text) % 7) for text in texts]


def their_rows(case, dataset_name):
    """The same rows as messages."""
    def user(text):
        return [{"role": "user", "content": text}]

    def assistant(text):
        return [{"role": "assistant", "content": text}]
    rows = make_rows(case.batch, dataset_name)
    if case.script == "grpo":
        return [{"prompt": user(prompt)} for prompt in long_prompts(rows, case)]
    if case.script == "sft":
        return [{"prompt": user(r["question"]), "completion": assistant(r["answer"])} for r in rows]
    return [{"prompt": user(r["question"]), "chosen": assistant(r["answer"]),
             "rejected": assistant(r["other"])} for r in rows]


def make_trainer(case, folder, dataset, callback):
    """TRL's trainer for a case, with its default options."""
    import trl
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    model, grpo = f"{folder}/model", case.script == "grpo"
    options = {"output_dir": f"{folder}/out", "max_steps": 1, "learning_rate": 1e-4, "logging_steps": 1,
               "per_device_train_batch_size": case.batch if grpo else min(8, case.batch),
               "gradient_accumulation_steps": 1 if grpo else max(1, case.batch // 8), "report_to": "none",
               "save_strategy": "no", "use_cpu": True, "bf16": False, "seed": 0, "disable_tqdm": True}
    given = {"train_dataset": dataset, "callbacks": [callback],
             "processing_class": AutoTokenizer.from_pretrained(model)}
    if case.script == "sft":
        return trl.SFTTrainer(model=model, args=trl.SFTConfig(max_length=2048, **options), **given)
    if case.script == "dpo":
        config = trl.DPOConfig(beta=0.1, max_length=4096, **options)
        return trl.DPOTrainer(model=model, args=config, **given)
    if grpo:
        config = trl.GRPOConfig(num_generations=8, max_completion_length=case.completion, temperature=1.0,
                                **options)
        return trl.GRPOTrainer(model=model, reward_funcs=length_reward, args=config, **given)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    return trl.RewardTrainer(model=scorer, args=trl.RewardConfig(max_length=4096, **options), **given)


def theirs(case, folder, dataset_name, given):
    """The same step by TRL's trainer."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback
    times, logged, rollout = [], [], [0.0]

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            times.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)
    make_model(f"{folder}/model", case.vocabulary, given)
    if case.script == "grpo":
        timed(trl.GRPOTrainer, "_generate_and_score_completions", rollout)
    trainer = make_trainer(case, folder, Dataset.from_list(their_rows(case, dataset_name)), Clock())
    trainer.train()
    result = {"seconds": times[-1] - times[0], "rows": case.batch, "loss": logged[0].get("loss")}
    if case.script == "grpo":
        lengths = [logs.get("completions/mean_length") or 0 for logs in logged]
        result |= {"rollout": rollout[0], "tokens": case.batch * sum(lengths)}
    return result


# ---- processes ---------------------------------------------------------------------------------------------

def one(name, which, dataset_name, given):
    """One run in this process -> its figures, with the peak of memory."""
    with tempfile.TemporaryDirectory() as folder:
        if name in TRAINING:
            result = (theirs if which == "trl" else ours)(TRAINING[name], folder, dataset_name, given)
        elif name.startswith("log-probs"):
            result = logprobs(which)
        elif name.startswith("rollout"):
            result = sampling(which, 512 if "512" in name else 64, folder)
        else:
            result = rows_case(folder) if name == "rows" else steps_case(folder)
    return result | {"peak": peak()}


def serve(libraries):
    """Imports the libraries once. Every line [case, which, dataset_name, model] on stdin is run in a fork,
    which prints its result."""
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


LIBRARIES = {"ours": ["grpo", "dpo", "reward_model", "sft"], "trl": ["trl.trainer.grpo_trainer"]}
SERVERS = {}


def run(name, which, *given):
    """One run in a fork of a process that has the libraries -> its figures."""
    kind = "trl" if which == "trl" else "ours"
    if kind not in SERVERS:
        words = [sys.executable, os.path.abspath(__file__), "--serve", *LIBRARIES[kind]]
        SERVERS[kind] = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    server, said, result = SERVERS[kind], [], None
    server.stdin.write(json.dumps([name, which, *given]) + "\n")
    server.stdin.flush()
    for line in server.stdout:
        if line == "DONE\n":
            break
        said.append(line)
        if line.startswith("RESULT "):
            result = json.loads(line.removeprefix("RESULT "))
    return result or sys.exit(f"{name} ({which}) failed:\n{''.join(said)[-2000:]}")


# ---- the table ---------------------------------------------------------------------------------------------

def medians(results):
    """Several runs' figures -> the median of each number."""
    numbers = [key for key, value in results[0].items() if isinstance(value, (int, float))]
    return {key: statistics.median(result[key] for result in results) for key in numbers}


def print_line(name, mine, its, seconds, whole=True):
    """A line of the table. seconds(figures): those of the part that the line is about; its: None without TRL.

    Where the two sample, they sample different numbers of tokens: the speed is that of a token then.
    """
    def cells(figures):
        memory = f"{figures[kind]:,.0f}" if whole else ""
        rates = [f"{figures[key] / seconds(figures):,.1f}" if key in figures else ""
                 for key in ("rows", "tokens")]
        return [f"{seconds(figures):.1f}", *rates, memory]
    kind, samples = "extra" if "extra" in mine else "peak", "rollout" in mine or name.startswith("rollout")
    line = [name, *cells(mine)]
    if its:
        if "tokens" in mine:
            its = {"tokens": mine["tokens"]} | its  # the same rows, where it counts none
        work = mine["tokens"] / its["tokens"] if samples else 1.0
        losses = f"{mine['loss']:.4f} / {its['loss']:.4f}" if "loss" in its and not samples else ""
        line += [*cells(its), f"{seconds(its) / seconds(mine) * work:.1f} x",
                 f"{mine[kind] / its[kind]:.2f} x" if whole else "", losses]
    print("| " + " | ".join(line) + " |", flush=True)


def compare(name, rounds, given, other):
    """Runs both in turn and prints a line of the table; for grpo two more, of rollout and update apart.
    -> the medians of ours."""
    results = {which: [] for which in ("ours", other) if which}
    for _ in range(rounds):
        for which, runs in results.items():
            runs.append(run(name, which, *given))
    mine, its = medians(results["ours"]), medians(results[other]) if other else None
    print_line(name, mine, its, lambda figures: figures["seconds"])
    if "rollout" in mine:
        print_line("- its rollout", mine, its, lambda figures: figures["rollout"], whole=False)
        print_line("- its update", mine, its, lambda figures: figures["seconds"] - figures["rollout"],
                   whole=False)
    return mine


def print_list(name):
    """The table of a case that only ours has."""
    lines = run(name, "ours", None, None)["lines"]
    print("\n| " + " | ".join(lines[0]) + " |\n|" + "---|" * len(lines[0]))
    for line in lines:
        cells = [f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in line.values()]
        print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dataset_name")
    parser.add_argument("--model", help="folder of the model of the cases that begin with this word")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.case)
    for name in args.case:
        if name not in [*TRAINING, *PARTS, *LISTS]:
            parser.error(f"no case {name!r}; there are: {', '.join([*TRAINING, *PARTS, *LISTS])}")
    cases = args.case or [name for name, case in TRAINING.items() if case.in_table] + PARTS + LISTS
    trl, notes = "trl" if importlib.util.find_spec("trl") else None, []
    print("| case | s | rows/s | tokens/s | MiB | theirs: s | rows/s | tokens/s | MiB | "
          "speed, ours / theirs | memory, ours / theirs | first losses |\n" + "|---" * 12 + "|")
    for name in [name for name in cases if name not in LISTS]:
        other, given = trl if name in TRAINING else "plain", (args.dataset_name, args.model)
        mine = compare(name, args.rounds, given, other)
        if "gflops" in mine:
            share = mine["gflops"] / mine["machine"]
            notes.append(f"{name}: {mine['gflops']:.0f} of the machine's {mine['machine']:.0f} GFLOP/s "
                         f"({share:.0%})")
    print("\n" + "\n".join(notes))
    for name in [name for name in cases if name in LISTS]:
        print_list(name)


if __name__ == "__main__":
    main()
