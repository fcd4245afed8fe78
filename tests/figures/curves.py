"""Makes the learning curves, .github/curves-light.svg and .github/curves-dark.svg.

    pip install matplotlib==3.11.2
    python tests/figures/curves.py [--seed 0] [--output_dir out/curves] [--redraw]   about 10 minutes

The small example of the five scripts runs, one after the other, and evaluates more often than it does by
itself. Its metrics.jsonl are drawn: one picture for a light page and one for a dark one. Seconds are read off
the clock as each step is reported. They are kept beside the metrics, in seconds.json. --redraw draws finished
folders again, in seconds.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import matplotlib
from matplotlib import pyplot
from pipelines import ROOT, command, parse_args, read_metrics

FLAGS = {"sft": "--eval_steps 40", "reward_model": "--eval_steps 5", "dpo": "--eval_steps 5",
         "ppo": "--eval_steps 4",
         "grpo": "--eval_steps 2 --kl_coef 1e-9"}  # so that KL is measured; it moves nothing
# script -> (lines above, in %; title below; lines below); a line: (metric, its label, where that stands, in
# shares of the axes)
LINES = {
    "sft": (
        [("eval/accuracy", "greedy answers", 0.62, 0.57)],
        "loss, nats a token",
        [("loss", "", 0, 0)]),
    "reward_model": (
        [("accuracy", "training pairs", 0.62, 0.7),
         ("eval/accuracy", "held-out pairs", 0.62, 0.86)],
        "loss of a pair",
        [("loss", "", 0, 0)]),
    "dpo": (
        [("rewards/accuracies", "training pairs", 0.62, 0.86),
         ("eval/accuracy", "greedy answers", 0.62, 1.07)],
        "reward",
        [("rewards/chosen", "chosen", 0.6, 0.68),
         ("rewards/rejected", "rejected", 0.62, 0.38)]),
    "ppo": (
        [("reward", "sampled reward", 0.62, 0.58),
         ("eval/accuracy", "greedy answers", 0.62, 1.07)],
        "KL, nats a token",
        [("kl", "", 0, 0)]),
    "grpo": (
        [("reward", "sampled reward", 0.62, 0.62),
         ("eval/accuracy", "greedy answers", 0.62, 1.07)],
        "KL, nats a token",
        [("kl", "", 0, 0)]),
}
INK = {  # text, dim, grid; evaluations, training steps, the lines below
    "light": ("#1f2328", "#59636e", "#d1d9e0", "#0069a8", "#b34700", "#007a59"),
    "dark": ("#f0f6fc", "#9198a1", "#3d444d", "#56b4e9", "#e69f00", "#2ebd92")}


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
    path = pathlib.Path(folder, "seconds.json")
    seconds = json.loads(path.read_text()) if path.exists() else {}
    return read_metrics(folder), {int(step): value for step, value in seconds.items()}


def plot(axis, metrics, lines, colours, scale=1):
    """Draws `lines` of metrics with their labels; colours are those of evaluations and of training steps."""
    for name, label, x, y in lines:
        held = name.startswith("eval/")
        points = [(m["step"], scale * m[name]) for m in metrics if name in m]
        look = {"lw": 1.8, "marker": "o", "zorder": 3} if held else {"lw": 1, "zorder": 2}
        axis.plot(*zip(*points), color=colours[not held], ms=2.6, clip_on=False,
                  ls="--" if name.endswith("rejected") else "-", **look)
        axis.text(x, y, label, color=colours[not held], ha="center", va="center", transform=axis.transAxes)


def draw_column(above, below, script, metrics, seconds, theme):
    """One script: shares in % above, another figure below, steps and their seconds under both."""
    text, dim, grid, evaluations, steps, rest = INK[theme]
    lines, title, lines_below = LINES[script]
    above.set_title(f"{script}.py", fontweight="bold", loc="left", fontsize=9.5, color=text, pad=17)
    above.set(ylim=(0, 100))
    above.set_yticks((0, 50, 100), ("", "", ""))
    plot(above, metrics, lines, (evaluations, steps), 100)
    below.set_title(title, color=dim, loc="left", fontsize=9)
    plot(below, metrics, lines_below, (rest, rest))
    below.locator_params(axis="y", nbins=3)
    last = metrics[-1]["step"]
    ticks, labels = (0, last // 2, last), []
    for tick in ticks:
        nearest = min(seconds, key=lambda step: abs(step - tick), default=None)
        labels.append(f"{tick}\n{seconds[nearest]:.0f} s" if seconds else tick)
    below.set(xlim=(0, last))
    below.set_xticks(ticks, labels)
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(length=0)
        axis.grid(axis="y", color=grid, lw=0.6, zorder=0)


def draw(found, theme, path):
    """{script: (metrics, seconds)} -> a picture with one column a script."""
    text, dim, grid, *_ = INK[theme]
    style = {"font.size": 9, "font.family": "DejaVu Sans", "svg.hashsalt": "curves", "axes.edgecolor": grid,
             "xtick.labelcolor": dim, "ytick.labelcolor": dim, "text.color": text, "axes.linewidth": 0.8}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(2, len(found), figsize=(1.9 * len(found), 3.9), sharex="col",
                                       squeeze=False, height_ratios=[3, 2])
        for (above, below), (script, (metrics, seconds)) in zip(axes.T, found.items()):
            draw_column(above, below, script, metrics, seconds, theme)
        axes[0, 0].set_yticks((0, 50, 100), ("0", "50", "100 %"))
        figure.subplots_adjust(left=0.25 / len(found), right=1 - 0.1 / len(found), top=0.885, bottom=0.125,
                               wspace=0.34, hspace=0.34)
        metadata = {"Date": None} if path.endswith("svg") else None
        figure.savefig(path, transparent=True, metadata=metadata, dpi=150)
        pyplot.close(figure)


def main():
    args = parse_args("curves", "--redraw")
    for script in FLAGS if not args.redraw else ():
        run(script, os.path.join(args.output_dir, script), args)
    found = {script: read(os.path.join(args.output_dir, script)) for script in FLAGS}
    for theme in INK:
        draw(found, theme, os.path.join(ROOT, ".github", f"curves-{theme}.svg"))


if __name__ == "__main__":
    matplotlib.use("Agg")
    main()
