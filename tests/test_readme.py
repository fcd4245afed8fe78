"""README.md is a page, and tests/README.md has the rest: every command parses, every script has its row, every
line count is true, every link leads somewhere. What a run logs, its script explains."""

import inspect
import json
import os
import re
import shlex

import pytest
from conftest import ROOT, TINY, run

import common

with open(os.path.join(ROOT, "README.md")) as file, open(os.path.join(ROOT, "tests", "README.md")) as tests:
    README, DETAILS = file.read(), tests.read()
BLOCKS = re.findall(r"```(?:sh|bash)\n(.*?)```", README + DETAILS, re.DOTALL)
COMMANDS = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()
            if re.search(r"\b\w+\.py\b", line)]
SCRIPTS = r"\b(sft|dpo|reward_model|ppo|grpo)\.py"


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(SCRIPTS, c)])
def test_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.split("&&")[-1], comments=True)
    at = next(i for i, w in enumerate(words) if w.endswith(".py"))
    script = __import__(words[at][:-3])
    flags = words[at + 1:]
    if flags and flags[0].endswith(".json"):
        flags = [f"tests/tiny/{words[at][:-3]}.json", *flags[1:]]
    common.parse_args(script.Args, flags)


def test_there_are_commands_for_every_script():
    scripts = [n for n in os.listdir(ROOT) if n.endswith(".py") and n != "common.py"]
    assert all(any(script in c for c in COMMANDS) for script in scripts)


def test_it_is_a_page():
    assert README.count("\n") <= 200 and len(README.encode()) <= 14 * 1024


def test_programs_that_the_text_names_are_there():
    paths = set(re.findall(r"python (tests/[\w/]+\.py)", README + DETAILS))
    figures = os.path.join("tests", "figures")
    assert paths >= {f"{figures}/{n}" for n in os.listdir(os.path.join(ROOT, figures)) if n.endswith(".py")}
    assert all(os.path.isfile(os.path.join(ROOT, path)) for path in paths)


def test_every_promise_is_held_by_a_test_and_stands_in_the_table():
    import promises
    lines = promises.table(promises.collect(), names=False)
    assert "\n".join(lines) in DETAILS and not any(line.endswith("|  |") for line in lines)


def test_links_lead_somewhere():
    headings = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-")
                for line in DETAILS.splitlines() if line.startswith("#")}
    for target in re.findall(r"\]\((?!https:)([^)]+)\)", README):
        path, _, heading = target.partition("#")
        assert os.path.isfile(os.path.join(ROOT, path)) and (not heading or heading in headings), target


@pytest.mark.parametrize("name", [n for n in sorted(os.listdir(ROOT)) if n.endswith(".py")])
def test_line_counts_are_true(name):
    stated = re.search(rf"\[`{re.escape(name)}`\]\({re.escape(name)}\).*\| ([\d,]+) \|", README)
    with open(os.path.join(ROOT, name)) as file:
        lines = len(file.readlines())
    assert stated and abs(int(stated.group(1).replace(",", "")) - lines) <= 20, f"{name} has {lines} lines"


def glossary(script):
    """The names that the Metrics block of a script's docstring explains, /std and the like written out."""
    block = re.search(r"^Metrics.*?(?=\n\n|\Z)", inspect.getdoc(script), re.DOTALL | re.MULTILINE)[0]
    names = set()
    for line in block.splitlines()[1:]:
        first, *others = re.split(", | or ", line.split("  ")[0].removesuffix(" and the like"))
        stem = first.rsplit("/", 1)[0]
        names |= {first} | {stem + name if name.startswith("/") else name for name in others}
    return names


@pytest.mark.parametrize("name, flags", [
    ("sft", []),
    ("sft", ["--adversarial", "fgm"]),
    ("dpo", ["--max_completion_length", 8]),
    ("reward_model", []),
    ("reward_model", ["--dataset_name", "scored.jsonl", "--eval_fraction", 0.1]),
    ("grpo", ["--kl_coef", 0.1, "--num_generations", 2]),
    ("grpo", ["--eval_samples", 2, "--best_fraction", 0.5, "--drop_flat_groups", "--temperature", 1.5]),
    ("grpo", ["--dataset_name", "shown.jsonl", "--demo_threshold", 1, "--num_generations", 2]),
    ("ppo", ["--sft_dataset", os.path.join(TINY, "addition.jsonl"), "--sft_coef", 0.1, "--kl_target", 1])])
def test_the_glossary_names_every_metric(name, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scored = [{"prompt": f"{i}+1", "completion": str(i), "score": {"right": 0.5 + i, "short": i % 3}}
              for i in range(40)]
    shown = [{"prompt": f"{i}+1", "answer": str(i + 1), "demonstration": f"It is {i + 1}"} for i in range(40)]
    for file, rows in (("scored", scored), ("shown", shown)):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = __import__(name)
    metrics = run(script, tmp_path / "out", "--max_steps", 1, "--batch_size", 2,
                  "--eval_fraction", 0.001, *flags)
    known, unknown = glossary(script), set()
    for key in {key for line in metrics for key in line} - {"step"}:
        key = re.sub(r"rewards/\w+/", "rewards/<name>/", re.sub(r"@\d+$", "@k", key))
        key = re.sub(r"correlation/\w+$", "correlation/<name>", key)
        if not {key, key.removeprefix("eval/")} & known:
            unknown.add(key)
    assert not unknown, f"the Metrics of {name}.py lack {', '.join(sorted(unknown))}"


def test_the_fsdp_command_asks_for_fsdp2():
    """As accelerate hands it to the processes that it starts."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env
    command = next(c for c in COMMANDS if "--use_fsdp" in c)
    words = shlex.split(command)[2:]  # after "accelerate launch"
    args = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    given = prepare_multi_gpu_env(args)
    assert (args.training_script, args.num_processes) == ("grpo.py", 8)
    assert {key: given[key] for key in ("ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION", "FSDP_VERSION",
                                        "FSDP_AUTO_WRAP_POLICY", "FSDP_RESHARD_AFTER_FORWARD")} == {
        "ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_curves_are_there_and_small(theme):
    name = f".github/curves-{theme}.svg"
    assert f'"{name}"' in README and 10_000 < os.path.getsize(os.path.join(ROOT, name)) < 150_000


def test_curves_are_drawn_from_metrics(tmp_path):
    pytest.importorskip("matplotlib")
    import curves
    lines = {"sft": [{"step": 0, "eval/accuracy": 0.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5},
                     {"step": 2, "eval/accuracy": 0.4}],
             "ppo": [{"step": 0, "eval/accuracy": 0.4}, {"step": 1, "reward": 0.5, "kl": 0.0},
                     {"step": 2, "reward": 0.6, "kl": 0.01}, {"step": 2, "eval/accuracy": 0.8}]}
    for name, metrics in lines.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (tmp_path / "ppo" / "seconds.json").write_text('{"0": 3.5, "2": 8}')
    found = {name: curves.read(tmp_path / name) for name in lines}
    assert [seconds for _, seconds in found.values()] == [{}, {0: 3.5, 2: 8}]
    for theme, colours in curves.INK.items():
        for again in range(2):
            curves.draw(found, theme, str(tmp_path / f"{theme}{again}.svg"))
        picture = (tmp_path / f"{theme}0.svg").read_text()
        assert picture == (tmp_path / f"{theme}1.svg").read_text(), "the same metrics give the same file"
        assert all(colour in picture for colour in colours)
