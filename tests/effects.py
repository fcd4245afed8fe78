"""python tests/effects.py [--seed 0] [--output_dir out/effects]: what each optional part of the scripts does on the small example.

Pairs of runs that differ in the flags of one part alone, one after the other, and a table of the figure that should move.
A run whose model is there already is not made again.
"""

import argparse
import json
import os
import sys

from pipelines import ROOT, TINY, command, run

sys.path.insert(0, TINY)
import make  # noqa: E402: tests/tiny/make.py, for worked sums without the mistake


def write_rows(folder):
    """Files that the runs need: 200 + 200 of the example's rows, all its prompts with a right demonstration, and pairs with scores."""
    with open(os.path.join(TINY, "addition.jsonl")) as file:
        lines = file.readlines()
    right = [json.loads(line) for line in lines]
    right = [{"prompt": r["prompt"], "answer": r["answer"], "demonstration": make.demonstration(*map(int, r["prompt"].split("+")), True)} for r in right]
    with open(os.path.join(TINY, "preferences.jsonl")) as file:
        pairs = [json.loads(line) for line in file]
    scored = [json.dumps({"prompt": p["prompt"], "completion": p[side], "score": {"right": float(side == "chosen"), "digits": len(p["answer"])}}) + "\n"
              for p in pairs for side in ("chosen", "rejected")]
    for name, part in (("scored", scored), ("few", lines[:200]), ("others", lines[200:400]), ("right", [json.dumps(r) + "\n" for r in right])):
        with open(os.path.join(folder, f"{name}.jsonl"), "w") as file:
            file.writelines(part)


# name -> (script, flags); {folder} is --output_dir, and earlier runs' models lie there
few = "--model_name_or_path {tiny}/sft --dataset_name {folder}/few.jsonl --eval_dataset_name {folder}/others.jsonl --learning_rate 1e-3 "
attacked = "--dataset_name {folder}/few.jsonl --eval_dataset_name {folder}/others.jsonl --max_steps 1 --adversarial fgm --adversarial_epsilon 0.3 "
small = "--batch_size 4 --max_steps 8 --eval_steps 8 "
weak = "--model_name_or_path {folder}/weak/model --dataset_name {folder}/right.jsonl --eval_steps 30 "
learned = "--reward_funcs {folder}/reward_model/model --kl_coef 0.05 --max_steps 120 --eval_steps 120 "
mixed = "--max_steps 40 --eval_steps 40 --sft_dataset {tiny}/addition.jsonl "
RUNS = {
    "plain": ("sft", few + "--max_steps 60"),
    "fgm": ("sft", few + "--max_steps 60 --adversarial fgm --adversarial_epsilon 0.3"),
    "neftune": ("sft", few + "--max_steps 60 --adversarial neftune"),
    **{f"{name} attacked": ("sft", attacked + "--model_name_or_path {folder}/" + name + "/model") for name in ("plain", "fgm", "neftune")},
    "small": ("grpo", small), "drop": ("grpo", small + "--drop_flat_groups"),
    "best": ("grpo", small + "--best_fraction 0.25 --sft_coef 0.3"),
    "weak": ("sft", "--max_steps 200 --eval_steps 200"),
    "weak rl": ("grpo", weak), "weak demo": ("grpo", weak + "--demo_threshold 0 --sft_coef 0.5"),
    "endless": ("grpo", "--model_name_or_path {tiny}/model --learning_rate 1e-3 --max_steps 10"),
    "overlong": ("grpo", "--model_name_or_path {tiny}/model --learning_rate 1e-3 --max_steps 10 --overlong_penalty 90"),
    "reward_model": ("reward_model", ""),
    "scores": ("reward_model", "--dataset_name {folder}/scored.jsonl"),
    "digits": ("ppo", "--reward_funcs {folder}/scores/model:digits --kl_coef 0.5"),
    "both": ("ppo", "--reward_funcs {folder}/scores/model:right {folder}/scores/model:digits --reward_weights 5 0.1 --kl_coef 0.5"),
    "fixed": ("ppo", learned), "adaptive": ("ppo", learned + "--kl_target 1 --kl_gain 1"),
    "without": ("ppo", mixed + "--sft_coef 1e-9"), "ptx": ("ppo", mixed + "--sft_coef 1"),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default=os.path.join(ROOT, "out", "effects"))
    args = parser.parse_args()
    os.makedirs(args.output_dir, exist_ok=True)
    write_rows(args.output_dir)
    found = {}
    for name, (script, flags) in RUNS.items():
        folder = os.path.join(args.output_dir, name)
        words = [word.format(folder=args.output_dir, tiny=TINY) for word in flags.split()]
        if not os.path.isdir(os.path.join(folder, "model")):
            print(f"{name} {run(command(script, folder, args, *words)):.0f} s", file=sys.stderr, flush=True)
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            found[name] = [json.loads(line) for line in file]

    def last(name, metric, n=1):  # the mean of the last n
        values = [m[metric] for m in found[name] if metric in m][-n:]
        return sum(values) / len(values)

    print("| flag | figure | without | with |\n|---|---|---|---|")
    rows = [
        *[(f"sft `--adversarial {kind}`", f"`eval/{figure}`, {how}", values("plain"), values(kind))
          for kind in ("fgm", "neftune")
          for figure, how, values in [
              ("loss", "clean", lambda name: f"{last(name, 'eval/loss'):.4f}"),
              ("loss_under_attack", "epsilon 0.3", lambda name: f"{found[name + ' attacked'][0]['eval/loss_under_attack']:.4f}")]],
        *[(f"grpo `{flag}`", "`eval/accuracy` after 8 rollouts of 4 prompts, %", f"{100 * last('small', 'eval/accuracy'):.1f}",
           f"{100 * last(name, 'eval/accuracy'):.1f}") for name, flag in (("drop", "--drop_flat_groups"), ("best", "--best_fraction 0.25"))],
        ("grpo `--demo_threshold 0`", f"`eval/accuracy` from {100 * found['weak rl'][0]['eval/accuracy']:.1f} %, 30 rollouts",
         f"{100 * last('weak rl', 'eval/accuracy'):.1f}", f"{100 * last('weak demo', 'eval/accuracy'):.1f}"),
        ("grpo `--overlong_penalty 90`", "`eval/completions/mean_length`, from a model that never ends",
         f"{last('endless', 'eval/completions/mean_length'):.1f}", f"{last('overlong', 'eval/completions/mean_length'):.1f}"),
        ("ppo, two named scores, `--reward_weights 5 0.1`", "`eval/accuracy`, % (without: `digits` alone)",
         f"{100 * last('digits', 'eval/accuracy'):.1f}", f"{100 * last('both', 'eval/accuracy'):.1f}"),
        ("ppo `--kl_target 1`", "`kl_sequence`, mean of the last 5 rollouts (kl_coef from 0.05)", f"{last('fixed', 'kl_sequence', 20):.2f}",
         f"{last('adaptive', 'kl_sequence', 20):.2f}"),
        ("", "true accuracy then, %", f"{100 * last('fixed', 'eval/accuracy'):.1f}", f"{100 * last('adaptive', 'eval/accuracy'):.1f}"),
        ("ppo `--sft_coef 1`", f"`sft_loss` of the mixed rows, mean of the last 10 updates (first update {found['ptx'][1]['sft_loss']:.4f})",
         f"{last('without', 'sft_loss', 10):.4f}", f"{last('ptx', 'sft_loss', 10):.4f}"),
    ]
    for row in rows:
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
