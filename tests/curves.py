"""python tests/curves.py [--seed 0] [--output_dir out/curves] [--redraw]: the README's learning curves, .github/curves-*.svg.

Runs the small example of the five scripts one after the other, evaluating more often than it does by itself, and draws their
metrics.jsonl: one picture for a light page and one for a dark one. Seconds are read off the clock as each step is reported and kept
beside the metrics in seconds.json. --redraw draws finished folders again. Needs matplotlib 3.11 (pip install matplotlib).
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import matplotlib
from matplotlib import pyplot
from pipelines import ROOT, command

FLAGS = {"sft": "--eval_steps 40", "reward_model": "--eval_steps 5", "dpo": "--eval_steps 5", "ppo": "--eval_steps 4",
         "grpo": "--eval_steps 2 --kl_coef 1e-9"}  # so that KL is measured; it moves nothing
LINES = {  # script -> what stands above, in %; the title and lines below: (metric, its label, where that stands, in shares of the axes)
    "sft": ([("eval/accuracy", "greedy answers", 0.62, 0.57)], "loss, nats a token", [("loss", "", 0, 0)]),
    "reward_model": ([("accuracy", "training pairs", 0.62, 0.7), ("eval/accuracy", "held-out pairs", 0.62, 0.86)], "loss of a pair", [("loss", "", 0, 0)]),
    "dpo": ([("rewards/accuracies", "training pairs", 0.62, 0.86), ("eval/accuracy", "greedy answers", 0.62, 1.07)],
            "reward", [("rewards/chosen", "chosen", 0.6, 0.68), ("rewards/rejected", "rejected", 0.62, 0.38)]),
    "ppo": ([("reward", "sampled reward", 0.62, 0.58), ("eval/accuracy", "greedy answers", 0.62, 1.07)], "KL, nats a token", [("kl", "", 0, 0)]),
    "grpo": ([("reward", "sampled reward", 0.62, 0.62), ("eval/accuracy", "greedy answers", 0.62, 1.07)], "KL, nats a token", [("kl", "", 0, 0)]),
}
INK = {"light": ("#1f2328", "#59636e", "#d1d9e0", "#0069a8", "#b34700", "#007a59"),
       "dark": ("#f0f6fc", "#9198a1", "#3d444d", "#56b4e9", "#e69f00", "#2ebd92")}  # text, dim, grid; accuracy, reward, the rest


def run(script, folder, args):
    """Runs one script; when each reported step was done goes into seconds.json."""
    start, seconds, tail = time.time(), {}, []
    words = command(script, folder, args, *FLAGS[script].split())
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        step = re.match(r"(?:eval +)?step (\d+)", line)
        seconds |= {int(step[1]): time.time() - start} if step else {}
        tail = [*tail[-20:], line]
    if process.wait():
        sys.exit("".join(tail))
    pathlib.Path(folder, "seconds.json").write_text(json.dumps(seconds))
    print(f"{script:15} {time.time() - start:4.0f} s", flush=True)


def read(folder):
    """-> the lines of metrics.jsonl, and {step: seconds} (empty where there is none)."""
    metrics, seconds = pathlib.Path(folder, "metrics.jsonl"), pathlib.Path(folder, "seconds.json")
    timed = json.loads(seconds.read_text()) if seconds.exists() else {}
    return [json.loads(line) for line in metrics.read_text().splitlines()], {int(step): value for step, value in timed.items()}


def plot(axis, metrics, lines, colours, scale=1):
    """Draws `lines` of metrics with their labels; colours are those of evaluations and of training steps."""
    for name, label, x, y in lines:
        held = name.startswith("eval/")
        points = [(m["step"], scale * m[name]) for m in metrics if name in m]
        axis.plot(*zip(*points), color=colours[not held], lw=1.8 if held else 1, marker="o" if held else None, ms=2.6, clip_on=False,
                  ls="--" if name.endswith("rejected") else "-", zorder=3 if held else 2)
        axis.text(x, y, label, color=colours[not held], ha="center", va="center", transform=axis.transAxes)


def draw(found, theme, path):
    """{script: (metrics, seconds)} -> a picture with one column a script."""
    text, dim, grid, accuracy, reward, rest = INK[theme]
    style = {"font.size": 9, "font.family": "DejaVu Sans", "svg.hashsalt": "curves", "axes.edgecolor": grid, "xtick.labelcolor": dim,
             "ytick.labelcolor": dim, "text.color": text, "axes.linewidth": 0.8}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(2, len(found), figsize=(1.9 * len(found), 3.9), sharex="col", squeeze=False, height_ratios=[3, 2])
        for i, (script, (metrics, seconds)) in enumerate(found.items()):
            (above, below), (lines, title, lines_below), last = axes[:, i], LINES[script], metrics[-1]["step"]
            above.set_title(f"{script}.py", fontweight="bold", loc="left", fontsize=9.5, color=text, pad=17)
            above.set(ylim=(0, 100))
            above.set_yticks((0, 50, 100), ("", "", "") if i else ("0", "50", "100 %"))
            plot(above, metrics, lines, (accuracy, reward), 100)
            below.set_title(title, color=dim, loc="left", fontsize=9)
            plot(below, metrics, lines_below, (rest, rest))
            below.locator_params(axis="y", nbins=3)
            ticks = [(tick, min(seconds, key=lambda step: abs(step - tick), default=None)) for tick in (0, last // 2, last)]
            below.set(xlim=(0, last))
            below.set_xticks([tick for tick, _ in ticks], [f"{tick}\n{seconds[near]:.0f} s" if seconds else tick for tick, near in ticks])
            for axis in (above, below):
                axis.spines[["top", "right"]].set_visible(False)
                axis.tick_params(length=0)
                axis.grid(axis="y", color=grid, lw=0.6, zorder=0)
        figure.subplots_adjust(left=0.05, right=0.98, top=0.885, bottom=0.125, wspace=0.34, hspace=0.34)
        figure.savefig(path, transparent=True, metadata={"Date": None} if path.endswith("svg") else None, dpi=150)
        pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default=os.path.join(ROOT, "out", "curves"))
    parser.add_argument("--redraw", action="store_true")
    args = parser.parse_args()
    for script in FLAGS if not args.redraw else ():
        run(script, os.path.join(args.output_dir, script), args)
    found = {script: read(os.path.join(args.output_dir, script)) for script in FLAGS}
    for theme in INK:
        draw(found, theme, os.path.join(ROOT, ".github", f"curves-{theme}.svg"))


if __name__ == "__main__":
    matplotlib.use("Agg")
    main()
