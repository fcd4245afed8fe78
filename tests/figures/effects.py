"""Makes the table of what each optional part of the scripts does, on the small example.

    python tests/figures/effects.py [--seed 0] [--output_dir out/effects]            about 20 minutes
    python tests/figures/effects.py edits [NAME ...]                     those of tests/edits, or these alone

Two runs that differ in the flags of one part alone stand beside each other, with the figure that should move; or
a script beside the same with one of tests/edits applied, with the same flags, which its heading names.
The runs are made one after the other. A run whose model is there already is not made again.
"""

import json
import os
import re
import sys

from pipelines import ROOT, TINY, command, edited, heading, parse_args, read_metrics, run

sys.path.insert(0, TINY)
import make  # noqa: E402: tests/tiny/make.py, for worked sums without the mistake


def read(name):
    """The rows of a file of the example."""
    with open(os.path.join(TINY, name)) as file:
        return [json.loads(line) for line in file]


def write_rows(folder):
    """Files that the runs need: 200 + 200 rows; all prompts with a right demonstration; pairs with scores."""
    rows, right, scored = read("addition.jsonl"), [], []
    for row in rows:
        a, b = map(int, row["prompt"].split("+"))
        right.append({"prompt": row["prompt"], "answer": row["answer"],
                      "demonstration": make.demonstration(a, b, carries=True)})
    for pair in read("preferences.jsonl"):
        for side in ("chosen", "rejected"):
            score = {"right": float(side == "chosen"), "digits": len(pair["answer"])}
            scored.append({"prompt": pair["prompt"], "completion": pair[side], "score": score})
    parts = {"few": rows[:200], "others": rows[200:400], "right": right, "scored": scored}
    for name, part in parts.items():
        make.write(os.path.join(folder, f"{name}.jsonl"), part)


# name -> (script, flags); {folder} is --output_dir, and earlier runs' models lie there
data = "--dataset_name {folder}/few.jsonl --eval_dataset_name {folder}/others.jsonl "
fgm = "--adversarial fgm --adversarial_epsilon 0.3 "
few = data + "--model_name_or_path {tiny}/sft --learning_rate 1e-3 --max_steps 60 "
attacked = data + fgm + "--max_steps 1 --model_name_or_path "
small = "--batch_size 4 --max_steps 8 --eval_steps 8 "
weak = "--model_name_or_path {folder}/weak/model --dataset_name {folder}/right.jsonl --eval_steps 30 "
endless = "--model_name_or_path {tiny}/model --learning_rate 1e-3 --max_steps 10 "
# 120 rollouts, for kl_coef moves by at most 2 % a rollout
learned = "--reward_funcs {folder}/reward_model/model --kl_coef 0.05 --max_steps 480 --eval_steps 480 "
two_scores = "--reward_funcs {folder}/scores/model:right {folder}/scores/model:digits --reward_weights 5 0.1 "
mixed = "--max_steps 40 --eval_steps 40 --sft_dataset {tiny}/addition.jsonl "
RUNS = {
    "plain": ("sft", few),
    "fgm": ("sft", few + fgm),
    "neftune": ("sft", few + "--adversarial neftune"),
    "plain attacked": ("sft", attacked + "{folder}/plain/model"),
    "fgm attacked": ("sft", attacked + "{folder}/fgm/model"),
    "neftune attacked": ("sft", attacked + "{folder}/neftune/model"),
    "small": ("grpo", small),
    "drop": ("grpo", small + "--drop_flat_groups"),
    "best": ("grpo", small + "--best_fraction 0.25 --sft_coef 0.3"),
    "weak": ("sft", "--max_steps 200 --eval_steps 200"),
    "weak rl": ("grpo", weak),
    "weak demo": ("grpo", weak + "--demo_threshold 0 --sft_coef 0.5"),
    "endless": ("grpo", endless),
    "overlong": ("grpo", endless + "--overlong_penalty 90"),
    "reward_model": ("reward_model", ""),
    "scores": ("reward_model", "--dataset_name {folder}/scored.jsonl"),
    "digits": ("ppo", "--reward_funcs {folder}/scores/model:digits --kl_coef 0.5"),
    "both": ("ppo", two_scores + "--kl_coef 0.5"),
    "fixed": ("ppo", learned),
    "adaptive": ("ppo", learned + "--kl_target 1"),
    "without": ("ppo", mixed + "--sft_coef 1e-9"),
    "ptx": ("ppo", mixed + "--sft_coef 1"),
}
# part, figure, its metric, run without, run with, how many of the last lines are averaged, scale, format
TABLE = [
    ("sft `--adversarial fgm`", "`eval/loss`, clean", "eval/loss", "plain", "fgm", 1, 1, ".4f"),
    ("sft `--adversarial fgm`", "`eval/loss_under_attack`, epsilon 0.3", "eval/loss_under_attack",
     "plain attacked", "fgm attacked", None, 1, ".4f"),
    ("sft `--adversarial neftune`", "`eval/loss`, clean", "eval/loss", "plain", "neftune", 1, 1, ".4f"),
    ("sft `--adversarial neftune`", "`eval/loss_under_attack`, epsilon 0.3", "eval/loss_under_attack",
     "plain attacked", "neftune attacked", None, 1, ".4f"),
    ("grpo `--drop_flat_groups`", "`eval/accuracy` after 8 rollouts of 4 prompts, %", "eval/accuracy",
     "small", "drop", 1, 100, ".1f"),
    ("grpo `--best_fraction 0.25`", "`eval/accuracy` after 8 rollouts of 4 prompts, %", "eval/accuracy",
     "small", "best", 1, 100, ".1f"),
    ("grpo `--demo_threshold 0`", "`eval/accuracy`, %, 30 rollouts", "eval/accuracy",
     "weak rl", "weak demo", 1, 100, ".1f"),
    ("grpo `--overlong_penalty 90`", "`eval/completions/mean_length`, from a model that never ends",
     "eval/completions/mean_length", "endless", "overlong", 1, 1, ".1f"),
    ("ppo, two named scores, `--reward_weights 5 0.1`", "`eval/accuracy`, % (without: `digits` alone)",
     "eval/accuracy", "digits", "both", 1, 100, ".1f"),
    ("ppo `--kl_target 1`", "`kl_sequence`, mean of the last 5 rollouts (kl_coef from 0.05)",
     "kl_sequence", "fixed", "adaptive", 20, 1, ".2f"),
    ("", "true accuracy then, %", "eval/accuracy", "fixed", "adaptive", 1, 100, ".1f"),
    ("ppo `--sft_coef 1`", "`sft_loss` of the mixed rows, mean of the last 10 updates", "sft_loss",
     "without", "ptx", 10, 1, ".4f"),
]


def figure(metrics, name, last):
    """The mean of a metric's last values; `last` None: its first value."""
    values = [line[name] for line in metrics if name in line]
    values = values[-last:] if last else values[:1]
    return sum(values) / len(values)


twice = "--batch_size 4 --max_steps 16 --eval_steps 16"
# edit of tests/edits, flags of both runs, figure, its metric, how many of the last lines, scale, format
EDITS = [
    ("grpo-cispo", "--max_steps 40 --eval_steps 40", "`eval/accuracy`, %, 10 rollouts", "eval/accuracy", 1,
     100, ".1f"),
    ("dpo-simpo", "--max_steps 40 --eval_steps 40", "`eval/accuracy`, %, 40 updates", "eval/accuracy", 1,
     100, ".1f"),
    ("sft-distill", "--teacher {folder}/teacher/model --max_steps 20 --eval_steps 20",
     "`eval/accuracy`, %, 20 updates", "eval/accuracy", 1, 100, ".1f"),
    ("grpo-rloo", small, "`eval/accuracy`, %, 8 rollouts of 4 prompts", "eval/accuracy", 1, 100, ".1f"),
    ("grpo-top-p", twice, "`reward` of the samples, mean of 8 rollouts of 4 prompts", "reward", 16, 1, ".2f"),
    ("grpo-top-p", twice, "`frac_reward_zero_std` of them, %", "frac_reward_zero_std", 16, 100, ".0f"),
    ("grpo-top-p", twice, "`eval/accuracy` then, %", "eval/accuracy", 1, 100, ".1f"),
    ("grpo-preference-term", small, "`eval/accuracy`, %, 8 rollouts of 4 prompts", "eval/accuracy", 1, 100,
     ".1f"),
    ("grpo-environment", "--model_name_or_path {folder}/half/model --max_steps 10 --eval_steps 10",
     "`eval/accuracy`, %, 10 rollouts of a policy that adds badly", "eval/accuracy", 1, 100, ".1f"),
    ("ppo-joint-reward", "--reward_funcs {folder}/reward_model/model accuracy --reward_weights 1 0 "
     "--max_steps 120 --eval_steps 40", "`eval/accuracy`, %, 30 rollouts that are paid a learned reward",
     "eval/accuracy", 1, 100, ".1f"),
    ("ppo-value-search", "--max_steps 40 --eval_steps 40 --eval_on_start False",
     "`eval/accuracy`, %, 10 rollouts; greedy, and found by value", "eval/accuracy", 1, 100, ".1f"),
]
# what these start from or ask, beside RUNS
BEFORE = {"half": ("sft", "--max_steps 300 --eval_steps 300"), "teacher": ("grpo", "")}


def known(script, flags):
    """The flags without those that an edit adds: the script as it is does not know them."""
    source = ""
    for file in (f"{script}.py", "common.py"):
        with open(os.path.join(ROOT, file), encoding="utf-8") as text:
            source += text.read()
    parts = re.split(r"\s+(?=--)", flags)  # "--name value"
    return " ".join(part for part in parts if re.search(rf"^    {part.split()[0][2:]}: ", source, re.M))


def made(args, name, script, flags, edit=None):
    """The metrics of a run, which is made unless its model is there; with an edit applied or without."""
    folder = os.path.join(args.output_dir, name)
    words = command(script, folder, args, *[
        word.format(folder=args.output_dir, tiny=TINY) for word in flags.split()])
    if not os.path.isdir(os.path.join(folder, "model")):
        if edit:
            words[1] = edited(edit, folder + " script")
        print(f"{name} {run(words):.0f} s", file=sys.stderr, flush=True)
    return read_metrics(folder)


def edits(args):
    """Prints the table of tests/edits: each with its heading's flags, beside the script as it is, with those
    of these flags that it knows."""
    print("| edit | flags | figure | without | with |\n|---|---|---|---|---|")
    for edit, flags, what, name, last, scale, form in EDITS:
        if args.words[1:] and edit not in args.words:
            continue
        script, flags = edit.split("-")[0], f"{heading(edit)['Flags']} {flags}"
        for before in re.findall(r"{folder}/(\w+)/model", flags):
            made(args, before, *(RUNS | BEFORE)[before])
        metrics = [made(args, f"{edit} without", script, known(script, flags)),
                   made(args, f"{edit} with", script, flags, edit)]
        values = [f"{scale * figure(lines, name, last):{form}}" for lines in metrics]
        print(f"| `{edit}` | `{flags}` | {what} |", " | ".join(values), "|", flush=True)


def main():
    args = parse_args("effects", words="edits [NAME ...]: those of tests/edits")
    os.makedirs(args.output_dir, exist_ok=True)
    if args.words[:1] == ["edits"]:
        return edits(args)
    write_rows(args.output_dir)
    found = {name: made(args, name, script, flags) for name, (script, flags) in RUNS.items()}
    print("| part | figure | without | with |\n|---|---|---|---|")
    for part, what, name, without, with_it, last, scale, form in TABLE:
        values = [scale * figure(found[each], name, last) for each in (without, with_it)]
        print("|", part, "|", what, "|", " | ".join(f"{value:{form}}" for value in values), "|")
    print(f"\n`--demo_threshold` starts from {100 * figure(found['weak rl'], 'eval/accuracy', None):.1f} %; "
          f"the first `sft_loss` is {figure(found['ptx'], 'sft_loss', None):.4f}.")


if __name__ == "__main__":
    main()
