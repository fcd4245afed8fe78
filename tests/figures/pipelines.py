"""Makes the table of pipelines: the small example through each of them, one stage after the other.

    python tests/figures/pipelines.py [--seed 0] [--output_dir out/pipelines]        11 minutes

Each stage is a script as a user runs it. It starts from the model that the stage before it saved. Every model
is then evaluated in the same way, by `grpo.py --num_train_epochs 0 --eval_samples 8`: greedy answers to the
same 200 held-out problems, and what a majority vote and the reward model make of 8 samples.
"""

import argparse
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import time

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT, TINY = os.path.dirname(TESTS), os.path.join(TESTS, "tiny")
# stage -> (script, the stage whose model it starts from, flags)
STAGES = {
    "sft": ("sft", None, []),
    "reward_model": ("reward_model", "sft", []),  # before all others: their evaluations ask it
    "dpo": ("dpo", "sft", []),
    "grpo": ("grpo", "sft", []),
    "grpo after dpo": ("grpo", "dpo", []),
    "ppo": ("ppo", "sft", ["--reward_funcs", "{reward_model}", "--kl_coef", "0.5"]),
}
COLUMNS = ["accuracy", "pass@1", "pass@8", "majority@8", "best_of@8", "weighted_vote@8"]
PIPELINES = [["sft"], ["sft", "dpo"], ["sft", "grpo"], ["sft", "reward_model", "ppo"],
             ["sft", "dpo", "grpo after dpo"]]


def write(path, rows):
    """rows as a .jsonl file -> its path."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def model_flops(folder, rows, trained_tokens, tokens):
    """Forward and backward without recomputation: 6 a weight and token of the trunk, 6 a weight of the head
    and trained token, and causal attention's 2 x 2 x T^2 / 2 x 3 a layer and channel, with the mean T."""
    import common
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(folder)
    d, layers, (h, k, e) = config.hidden_size, config.num_hidden_layers, common.head_sizes(config)
    trunk = layers * (2 * d * h * e + 2 * d * k * e + 3 * d * config.intermediate_size)
    attention = 6 * layers * h * e * tokens * tokens / rows
    return 6 * trunk * tokens + 6 * d * config.vocab_size * trained_tokens + attention


def command(script, folder, args, *flags):
    """The command line of one run: the example's arguments file, flags on top."""
    return [sys.executable, os.path.join(ROOT, f"{script}.py"), os.path.join(TINY, f"{script}.json"),
            "--seed", str(args.seed), "--output_dir", folder, "--overwrite_output_dir", *flags]


def edited(name, folder):
    """A copy of the script that tests/edits/NAME.diff changes, and of common.py, with the change -> its path."""
    os.makedirs(folder, exist_ok=True)
    script = f"{name.split('-')[0]}.py"
    for file in (script, "common.py"):
        shutil.copy(os.path.join(ROOT, file), folder)
    diff = os.path.join(TESTS, "edits", f"{name}.diff")
    # inside a clone git would change nothing, and say nothing: it must not look above the folder
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": os.path.dirname(os.path.realpath(folder))}
    done = subprocess.run(["git", "apply", diff], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode or filecmp.cmp(os.path.join(ROOT, script), os.path.join(folder, script), shallow=False):
        raise ValueError(f"{diff} does not apply: {done.stderr}")
    return os.path.join(folder, script)


def heading(name):
    """What a .diff says of itself before its first change -> {word: text}; the first line has its name."""
    with open(os.path.join(TESTS, "edits", f"{name}.diff"), encoding="utf-8") as file:
        text = file.read().split("\ndiff --git")[0]
    parts = re.split(r"^(\w[\w-]*):? +", text, flags=re.M)
    return {word: " ".join(said.split()) for word, said in zip(parts[1::2], parts[2::2])}


def run(words):
    """Runs a command -> its seconds; stops everything with its output if it fails."""
    start = time.time()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.time() - start


def read_metrics(folder):
    """The lines of a run's metrics.jsonl, as dicts."""
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def parse_args(name, *more, words=None):
    """The flags of every program that runs the scripts, its own switches, and what its words mean, if any."""
    parser = argparse.ArgumentParser()
    if words:
        parser.add_argument("words", nargs="*", help=words)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default=os.path.join(ROOT, "out", name))
    for flag in more:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()


def main():
    args = parse_args("pipelines")

    def folder(stage):
        return os.path.join(args.output_dir, stage.replace(" ", "_"))

    def model(stage):
        return os.path.join(folder(stage), "model")
    seconds, found = {}, {}
    for stage, (script, before, flags) in STAGES.items():
        start = ["--model_name_or_path", model(before)] if before else []
        flags = [flag.format(reward_model=model("reward_model")) for flag in flags]
        seconds[stage] = run(command(script, folder(stage), args, *start, *flags))
        print(f"{stage:15} {seconds[stage]:4.0f} s", flush=True)
    check = os.path.join(args.output_dir, "evaluation")
    for stage in dict.fromkeys(stages[-1] for stages in PIPELINES):
        run(command("grpo", check, args, "--model_name_or_path", model(stage), "--num_train_epochs", "0",
                    "--eval_samples", "8", "--reward_funcs", "accuracy", model("reward_model")))
        found[stage] = read_metrics(check)[0]
    print("\n| pipeline | s |", " | ".join(COLUMNS), "|\n|---|---|" + "---|" * len(COLUMNS))
    for stages in PIPELINES:
        figures = [f"{100 * found[stages[-1]][f'eval/{name}']:.1f}" for name in COLUMNS]
        print("|", " -> ".join(STAGES[stage][0] for stage in stages),
              "|", f"{sum(seconds[stage] for stage in stages):.0f}", "|", " | ".join(figures), "|")


if __name__ == "__main__":
    main()
