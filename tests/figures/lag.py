"""Makes the table of sampling beside training: seconds a rollout and its updates, and what the lag costs.

    python tests/figures/lag.py [--output_dir out/lag] [--seed 0]                    the small example, 10 minutes
    python tests/figures/lag.py args.json [--seconds]                                another run of grpo.py

Seconds are medians between two lines of the run's own output, over seven rollouts after the first. Then three
seeds of the same run (of the example ten rollouts), with a lag and without; not with --seconds. The runs are
made one after the other, and nothing else should run.
"""

import os
import statistics
import subprocess
import sys
import time

from pipelines import ROOT, TINY, parse_args, read_metrics

WAYS = {  # threads, flags
    "one process, 1 thread": (1, "--rollout_lag 0"),
    "one process, 2 threads": (2, "--rollout_lag 0"),
    "lag 1, one process, 1 thread": (1, "--rollout_lag 1 --sampler_device none"),
    "lag 1, a process of its own, 1 thread each": (1, "--rollout_lag 1"),
}


def run(words, folder, threads, *flags):
    """A run of grpo.py -> seconds between two of its steps, each a list."""
    words = [sys.executable, os.path.join(ROOT, "grpo.py"), *words, "--output_dir", folder,
             "--overwrite_output_dir", *flags]
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    times, said = [], ""
    for line in process.stdout:
        said += line
        if line.startswith("step "):
            times.append(time.time())
    if process.wait():
        sys.exit(said[-2000:])
    return [b - a for a, b in zip(times, times[1:])]


def main():
    args = parse_args("lag", "--seconds", words="a file of grpo.py's arguments; default: the example's")
    words = args.words or [os.path.join(TINY, "grpo.json")]
    print("| | seconds a rollout with its update |\n|---|---|")
    for way, (threads, flags) in WAYS.items():
        seconds = run(words, os.path.join(args.output_dir, "speed"), threads, *flags.split(), "--max_steps",
                      "8", "--eval_steps", "1000", "--eval_on_start", "False", "--seed", str(args.seed))
        print(f"| {way} | {statistics.median(seconds):.2f} |", flush=True)
    if args.seconds:
        return
    print("\n| seed | lag | held out, at each evaluation | `ratio/deviation`, mean |\n|---|---|---|---|")
    for seed in range(3):
        for lag in ("0", "1"):
            folder = os.path.join(args.output_dir, f"{lag}-{seed}")
            few = [] if args.words else ["--max_steps", "10", "--eval_steps", "2"]
            run(words, folder, 1, "--rollout_lag", lag, "--seed", str(seed), *few)
            metrics = read_metrics(folder)
            name = "eval/accuracy" if "eval/accuracy" in metrics[0] else "eval/reward"
            held = ", ".join(f"{line[name]:.3f}" for line in metrics if name in line)
            stale = statistics.mean(line["ratio/deviation"] for line in metrics if "ratio/deviation" in line)
            print(f"| {seed} | {lag} | {held} | {stale:.2g} |", flush=True)


if __name__ == "__main__":
    main()
