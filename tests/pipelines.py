"""python tests/pipelines.py [--seed 0] [--output_dir out/pipelines]: the README's pipelines on the small example, one after the other.

Each stage is a script as a user runs it, started from the model that the stage before it saved. Every model is then evaluated in
the same way, by `grpo.py --num_train_epochs 0 --eval_samples 8`: greedy answers to the same 200 held-out problems, and what a
majority vote and the reward model make of 8 samples.
"""

import argparse
import json
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT, TINY = os.path.dirname(HERE), os.path.join(HERE, "tiny")
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
PIPELINES = [["sft"], ["sft", "dpo"], ["sft", "grpo"], ["sft", "reward_model", "ppo"], ["sft", "dpo", "grpo after dpo"]]


def command(script, folder, args, *flags):
    """The command line of one run: the example's arguments file, flags on top."""
    return [sys.executable, os.path.join(ROOT, f"{script}.py"), os.path.join(TINY, f"{script}.json"), "--seed", str(args.seed),
            "--output_dir", folder, "--overwrite_output_dir", *flags]


def run(words):
    """Runs a command -> its seconds; stops everything with its output if it fails."""
    start = time.time()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.time() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default=os.path.join(ROOT, "out", "pipelines"))
    args = parser.parse_args()
    folder = lambda stage: os.path.join(args.output_dir, stage.replace(" ", "_"))
    model = lambda stage: os.path.join(folder(stage), "model")
    seconds, found = {}, {}
    for stage, (script, before, flags) in STAGES.items():
        start = ["--model_name_or_path", model(before)] if before else []
        flags = [flag.format(reward_model=model("reward_model")) for flag in flags]
        seconds[stage] = run(command(script, folder(stage), args, *start, *flags))
        print(f"{stage:15} {seconds[stage]:4.0f} s", flush=True)
    for stage in dict.fromkeys(stages[-1] for stages in PIPELINES):
        check = os.path.join(args.output_dir, "evaluation")
        run(command("grpo", check, args, "--model_name_or_path", model(stage), "--num_train_epochs", "0", "--eval_samples", "8",
                    "--reward_funcs", "accuracy", model("reward_model")))
        with open(os.path.join(check, "metrics.jsonl")) as file:
            found[stage] = json.loads(file.readline())
    print("\n| pipeline | s |", " | ".join(COLUMNS), "|\n|---|---|" + "---|" * len(COLUMNS))
    for stages in PIPELINES:
        figures = [f"{100 * found[stages[-1]][f'eval/{name}']:.1f}" for name in COLUMNS]
        print("|", " -> ".join(STAGES[s][0] for s in stages), "|", f"{sum(seconds[s] for s in stages):.0f}", "|", " | ".join(figures), "|")


if __name__ == "__main__":
    main()
