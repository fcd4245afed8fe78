"""The rewards of common.py: built-in ones by hand, TRL's calling convention, what is refused, what code may not do."""

import asyncio
import functools
import itertools
import json
import math
import os
import random
import re
import subprocess
import threading
import time
from types import SimpleNamespace

import numpy
import pandas
import pytest
import torch
from conftest import TINY, in_child, run

import common
import grpo
import ppo
from common import Reward


# ---- calling -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, texts", [
    ("18", ["18", "18.", "18.00", "$18", "18 cm", "18cm", "18 cm^2", "18 m²", "60 of 18km/h", "$18/hour", "**18**", "so **18**.", r"\(18\)", "$18$", "(18)", "18!",
            r"\$18", "€18", "18€", "x = 18", "**Answer:** 18", "answer:18", "9+9=18", "<<9+9=18>>18", "18</s>", '{"answer": 18}', "５ １８", "Step 5 **18**",
            r"\boxed{18} of 20", r"\boxed{\text{18 cm}} 3", "36/2", "#### 5\n#### 18"]),
    ("1000", ["1,000", "1000", "1000.0", "$1,000.00", "1e3", "1E+3", "1{,}000", r"1\,000", "1\u202f000"]), ("100000", ["1e5"]),
    ("10000", ["10 000", "10 000 cm", "10,000"]), ("1234567", ["1 234 567"]), ("250", ["12 and 250", "3, 250", "__250__", "_250_", r"\underline{250}"]),
    ("0.5", ["0.5", ".5", "1/2", "1 / 2", r"\frac{1}{2}", r"is $\dfrac12$."]), ("-0.5", ["-1/2", r"$-\frac{1}{2}$", r"\frac{-1}{2}"]),
    ("2.5", ["2 1/2", r"2\frac{1}{2}"]), ("3/7", ["3/7", r"\frac{3}{7}", "6/14"]), ("0.0015", ["1.5e-3"]), ("10000.5", ["10,000.50"]),
    ("42", ["答案是42。", "答えは42です", "정답은 42입니다", "42円", "“42”.", "‘42’", "42…", "→42", "42✅", "42—so", "₹42", "42₽", "42\u200b", "42°", r"\boxed{42^\circ}", r"42^{\circ}",
            "+42", "42cm^2", "42 cm^3", r"\boxed{42 \text{ cm}^2}", "x = +42"]), ("-7", ["so -7", "-$7", "$-7", "\u22127", "–7", "-€7", "5 -7"]), ("7", ["007", "5\n7"]), ("0", ["-0"]), ("3.5", ["x=3.50 litres"]),
    ("12345678901234567890123456789012", ["12345678901234567890123456789012"]), ("50", ["50%", r"50\%", "50 percent"]),
    ("65", ["3 <answer> 65 </answer> 7", "<answer>1</answer><answer>65</answer>"]), ("paris", ["<answer>Paris</answer>", r"\boxed{Paris} 3", r"\boxed{\text{Paris}}", r"\boxed{\mathrm{ Paris }}", "<answer>Paris.</answer>"]), ("p-q", [r"\boxed{p - q}", "<answer>p-q</answer>"]),
    ("5", [r"\boxed{x = 5}", r"\boxed{x_1 = 5}", r"\boxed{f(2) = 5}", r"\boxed{\text{Area} = 5}", r"\boxed{\textbf{(B)}\ 5}", r"\boxed{\approx 5}", "<answer>5!</answer>", "<answer><b>5</b></answer>",
           "<answer>7 apples - 2 apples = 5 apples</answer>", "<answer>x - 3 = 9\nso x = 5</answer>", "#### <<2+3=5>>5"]),
    (None, ["no number", "", ".", "<answer></answer>", "<answer>11:30</answer>", "11:30", "3:4", "2^3", "2**3", "2 ^ 3", "2^{10}", "10²", r"2\times 3", "2 × 3", "1×10^5", "42万", "3百", "2+3", "95**88**77",
            "3-4", "16-3", "3–4", "3 - 4", "2024-01-05", "01/05/2024", "1.2.3", "1,2,3", "3,5", "1,000,00",
            "5x", "x+3", "y = 2x + 5", "x^2", r"\sqrt{3}", r"2\sqrt{3}", "5k", "5 million", "--7", "1/0", "GPT-4", "v2",
            r"\boxed{\frac{\pi}{2}}", r"\left( 3, \frac{\pi}{2} \right)", r"\frac{\sqrt{3}}{2}", r"\frac{3\pi}{4}", r"\frac{x+1}{3}", "4210_{5}", "4210_5", "x_1",
            r"\log_2 3", r"\log_{10} 3", r"\sin(30)", r"0.\overline{3}", r"\frac{1}{-2}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(3, 4)", "[1, 2]", "['1', '2']", '["1", "2"]', r"\{1, 2\}",
            r"5\pi", r"5 \pi", r"2\pi r", r"\binom{5}{2}",
            "1e999999999", "9" * 5000,
            r"\boxed{x>5}", r"\boxed{x \le 5}", "<answer>5 < 6</answer>", r"\boxed{\pm 5}", r"\boxed{x-y-1=0}", r"\boxed{2x+3y=6}", r"\boxed{y = 3x - 2}", "<answer>3x = 15</answer>",
            r"\boxed{\sqrt[3]{4}}", r"\boxed{5!}", r"\boxed{|-3|}", r"\boxed{\phi(5)}", r"\boxed{P(5)}", r"\boxed{\Gamma(5)}", r"\boxed{\bar 5}", r"\boxed{\tfrac{\pi}2}", r"\boxed{\tfrac{10}2}",
            r"\boxed{\vec{a} + 7}", r"\boxed{\mathbb{R} \setminus \{5\}}", r"x \equiv \boxed{2 \pmod 5}"]),])
def test_extract_answer(answer, texts):
    """Numbers compare as numbers, and what is no number as a whole is none: never its last digits."""
    assert {text: common.extract_answer(text) for text in texts} == dict.fromkeys(texts, answer)
    assert answer is None or common.vote([common.extract_answer(text) for text in texts]) == answer, "equal numbers vote together"


def test_reading_an_answer_takes_no_time_to_speak_of():
    start = time.perf_counter()
    for part in ("(1, ", "\\begin{array}", "\\log_", "1 000 ", "a_", "}{", "1, ", "5 and ", "<answer>", "\\boxed{", "\\frac{", "{", "a1:", "9", "1 1/2 ", "5 "):
        common.extract_answer(part * 10_000 + "1")
    assert time.perf_counter() - start < 3


def test_the_references_mark_counts_and_a_cut_completion_does_not():
    def value(completion, answer, cut=False):
        return common.accuracy(None, [completion], [cut], answer=[answer])[0]
    assert value("#### 72\n100% sure", "6 * 12\n#### 72") == value("is 72", "#### 72") == value(r"\boxed{72} of 3", "#### 72") == 1
    assert value("72\n#### 5", "#### 72") == value(r"\boxed{3} and 5", r"\boxed{5}") == value("<answer>5</answer> \\boxed{3}", r"\boxed{5}") == 0
    assert value("#### Step 2: sum\nso 72", "72") == 1, "a heading is no answer where the reference has no ####"
    assert value("72", "72", cut=True) == 0 and value("1/2", "0.5") == 1 and value("50%", "0.5") == 0
    assert value("30", "11:30") is value("", "Paris") is value("", None) is None


def test_built_in_rewards():
    assert common.accuracy(None, ["<answer>65</answer>", "is 1,000.", "no"], answer=["65", "#### 1000", None]) == [1.0, 1.0, None]
    assert common.accuracy(None, [[{"role": "assistant", "content": "5"}]], solution=["5"]) == [1.0]
    assert common.accuracy(None, ["5"]) == [None]
    good, nested = "<think>a\nb</think>\n<answer>1</answer>", "<think>a</think><think>b</think><answer>1</answer>"
    assert common.format_reward(None, [good, nested, "x" + good, good + "x"]) == [1.0, 0.0, 0.0, 0.0]


def test_only_built_in_rewards_are_told_what_was_cut_and_evaluation_reads_as_accuracy_does():
    seen, whole = {}, sampled("7", "7.0", "8")
    for row, prompt in zip(whole, rows(3, answer="#### 7", truncated="a column")):
        row |= {"prompt": prompt, "truncated": row["text"] == "7.0"}
    rewards = {"accuracy": Reward(common.accuracy, 1.0), "mine": Reward(lambda completions, **more: seen.update(more) or [0] * 3, 1.0, "r.py")}
    values, _ = common.score(rewards, rows(3, answer="#### 7", truncated="a column"), whole, 0, 1)
    assert values[:, 0].tolist() == [1, 0, 0] and seen["truncated"] == ["a column"] * 3
    assert common.given_answers(whole) == ["7", None, "8"] and common.exact_match(whole, ["7"] * 3) == {"accuracy": 1 / 3}
    assert common.exact_match(whole, [None] * 3) == {} and common.readable("Paris") is None and common.readable(7) == "7"


def test_answers_that_accuracy_cannot_read_are_said_or_refused(capsys):
    rewards, good, bad = {"accuracy": Reward(common.accuracy, 1.0)}, rows(2, answer="7"), rows(1, answer="11:30")
    args = SimpleNamespace(dataset_name="d.jsonl", eval_dataset_name=None, reward_timeout=5, num_generations=1)
    common.try_rewards(rewards, good + bad, bad, args)  # what is held out of the same file may be a few rows
    assert "accuracy does not apply to 1 of 3 prompts: it reads no number in their answers, such as '11:30' of file:1" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="accuracy reads a number in no answer, such as '11:30' of file:1: give numbers"):
        common.try_rewards(rewards, bad, [], args)
    args.eval_dataset_name = "e.jsonl"
    common.try_rewards(rewards, good, good + bad, args)
    assert "accuracy does not apply to 1 of 3 prompts" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="accuracy reads a number in no answer, such as '11:30' of file:1: give numbers"):
        common.try_rewards(rewards, good, bad, args)


@pytest.mark.parametrize("name, column", [("accuracy", "answer"), ("edit_distance", "solution"), ("code", "tests")])
def test_prompts_without_the_column_that_a_reward_reads_are_counted(name, column, capsys):
    """A misspelt column in some rows: no completion of theirs would be scored, and nothing else says so."""
    rewards, named = {name: Reward(common.BUILT_IN[name], 1.0)}, " or ".join(map(repr, common.NEEDS[name]))
    args = SimpleNamespace(dataset_name="d.jsonl", eval_dataset_name=None, reward_timeout=5, num_generations=1)
    prompts = [*rows(1, **{column: "7"}), *rows(2, ansver="7"), *rows(1, **{column: None})]
    common.try_rewards(rewards, prompts, [], args)
    assert capsys.readouterr().out == f"warning  {name} does not apply to 3 of 4 prompts: they have no {named}, such as file:1\n"


def rows(n=2, prompt="1+1", **columns):
    return [{"prompt": prompt, "turns": [], "columns": columns, "place": f"file:{i + 1}"} for i in range(n)]


def sampled(*texts):
    return [{"text": t, "completion_ids": [i], "truncated": False} for i, t in enumerate(texts, 1)]


def test_reward_functions_get_trls_arguments():
    seen = {}

    def whole(prompts, completions, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [0.0] * len(completions)

    async def waiting(completions, answer, trainer_state, log_metric):
        await asyncio.sleep(0)
        log_metric("seen", trainer_state.global_step)
        return [None, int(answer[1])]
    rewards = {"whole": Reward(whole, 1.0), "waiting": Reward(waiting, 1.0)}
    values, logged = common.score(rewards, rows(answer="7"), sampled("a", "b"), 3, 9)
    assert values[:, 0].tolist() == [0, 0] and values[0, 1].isnan() and values[1, 1] == 7 and logged == {"seen": 3}
    assert seen["prompts"] == ["1+1"] * 2 and seen["completions"] == ["a", "b"] and seen["answer"] == ["7", "7"]
    assert seen["completion_ids"] == [[1], [2]] and callable(seen["log_extra"])
    chat = [{"role": "user", "content": "hi"}]
    common.score({"whole": Reward(whole, 1.0)}, rows(prompt=chat), sampled("a", "b"), 0, 1)
    assert seen["prompts"] == [chat] * 2 and seen["completions"][0] == [{"role": "assistant", "content": "a"}]


FOR_TRL = '''
import asyncio, re

def of_a_column(completions, answer, **kwargs):
    """The usual kind: a column by its name, all else in kwargs."""
    return [float(f"<answer>{a}</answer>" in text) for text, a in zip(completions, answer)]

def of_a_conversation(completions, **kwargs):
    """For prompts that are messages: a completion is a list of one message."""
    return [1.0 if re.fullmatch("<think>.*</think><answer>.*</answer>", c[0]["content"], re.DOTALL) else 0.0 for c in completions]

def of_one_task(prompts, completions, task, **kwargs):
    """Several tasks in one dataset: None where this one does not apply."""
    return [None if t != "short" else -len(c) / 100 for c, t in zip(completions, task)]

async def from_elsewhere(prompts, completions, completion_ids, trainer_state, log_metric=None, log_extra=None, **kwargs):
    """Waits for something, and logs what it saw."""
    await asyncio.sleep(0)
    log_extra("tokens", [len(ids) for ids in completion_ids])
    log_metric("judge/step", float(trainer_state.global_step))
    return [len(ids) / 10 for ids in completion_ids]
'''


@pytest.mark.promise("files")
@pytest.mark.parametrize("chat", [False, True])
def test_reward_functions_written_for_trl_run_unchanged(chat, tmp_path):
    (tmp_path / "rewards.py").write_text(FOR_TRL)
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1"}] if chat else f"{i}+1", "answer": str(i + 1), "task": ("short", "long")[i % 2]}
            for i in range(40, 44)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["of_a_conversation", "from_elsewhere"] if chat else ["of_a_column", "of_one_task", "from_elsewhere"]
    first, second = run(grpo, tmp_path / "out", "--dataset_name", tmp_path / "d.jsonl", "--eval_fraction", 0, "--batch_size", 4, "--max_steps", 2,
                        "--num_generations", 2, "--reward_funcs", *[f"{tmp_path}/rewards.py:{name}" for name in names])
    assert first["rewards/from_elsewhere/mean"] == pytest.approx(first["completions/mean_length"] / 10)
    assert second["judge/step"] == first["judge/step"] + 1
    assert first[f"rewards/{names[0]}/mean"] > 0.5, "the example's model adds without carries, in the right form"
    if not chat:  # of_one_task's mean is over the half of the rows that it applies to
        assert first["rewards/of_one_task/mean"] < -0.3
        parts = [first[f"rewards/{name}/mean"] for name in names]
        assert first["reward"] == pytest.approx(parts[0] + parts[1] / 2 + parts[2], abs=1e-5)


@pytest.mark.parametrize("returned, sentence", [
    ([1.0], "returned 1 values for 2 completions"), (1.0, "returned float, not a list"), ([1.0, math.nan], "returned nan for the"),
    ([1.0, "good"], "'good' for the completion 'b' of row file:2"), (None, "returned NoneType"), ([1.0, math.inf], "returned inf"),
    ({"a": 1.0, "b": 0.0}, "returned dict, not a list"), ({0.0, 1.0}, "returned set, not a list"), ({0: 1, 1: 0}.keys(), "returned dict_keys, not a"),
    (b"ab", "returned bytes, not a list"), (pandas.DataFrame([[1.0, 0.0]] * 2), "returned DataFrame, not a list"), (["1", "2"], "returned '1' for"),
    ([[1.0], [2.0]], "returned [1.0] for"), ([b"1", 1], "returned b'1' for"), ([10**400, 1], "returned 1000"), (itertools.repeat(1.0), "returned 3 values"),
])
def test_wrong_rewards_are_named(returned, sentence):
    with pytest.raises(common.UserError, match="reward function 'f'.*" + re.escape(sentence)):
        common.score({"f": Reward(lambda completions: returned, 1.0)}, rows(), sampled("a", "b"), 0, 1)


def test_a_column_cannot_take_the_place_of_what_was_sampled(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1", "completions": "2"}\n' * 2)
    with pytest.raises(common.UserError, match="column 'completions' has the name of something else"):
        run(grpo, tmp_path / "out", "--dataset_name", tmp_path / "d.jsonl")


def test_a_failing_reward_is_narrowed_down_to_its_completion():
    def picky(completions):
        return [1 / (c != "b") for c in completions]
    with pytest.raises(common.UserError, match="'picky' raised ZeroDivisionError: .*on the completion 'b' of row file:2"):
        common.score({"picky": Reward(picky, 1.0)}, rows(), sampled("a", "b"), 0, 1)


def test_columns_that_only_some_rows_have_are_none_elsewhere(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1"}\n{"prompt": "1+2", "level": 3}\n')
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--dataset_name", f"{tmp_path}/d.jsonl", "--eval_fraction", "0"])
    train, _ = common.load_prompts(args, common.load_tokenizer(args))
    assert [p["columns"] for p in train] == [{"level": None}, {"level": 3}]


class Called:
    def __call__(self, completions, **more):
        return [1, 2]


async def awaited(completions):
    return (float(i) for i in (1, 2))


@pytest.mark.parametrize("function", [
    lambda completions: numpy.array([1, 2]), lambda completions: (True, numpy.float32(2)), lambda completions: torch.tensor([1, 2], dtype=torch.bfloat16),
    lambda completions: pandas.Series([1, 2]), lambda completions: (i for i in (1, 2)), lambda completions: {"a": 1, "b": 2}.values(), Called(), awaited,
    functools.partial(lambda shift, completions: [shift, 2], 1), lambda completions: [numpy.bool_(True), 2]])
def test_any_ordered_numbers_of_any_callable_are_rewards(function):
    assert common.score({"f": Reward(function, 1.0)}, rows(), sampled("a", "b"), 0, 1)[0].tolist() == [[1], [2]]


def test_a_function_that_changes_its_arguments_changes_nobody_elses():
    """Prompts, completions, nested columns and the trainer's state are each function's and each row's own."""
    seen, chat, meta = [], [{"role": "user", "content": "hi"}], {"tests": ["a"]}

    def spoils(prompts, completions, completion_ids, meta, trainer_state):
        seen.append(json.dumps([prompts, completions, completion_ids, meta, trainer_state.global_step]))
        prompts[0][0]["content"] = completions[0][0]["content"] = "x"
        meta[0]["tests"].append("b")
        assert meta[1]["tests"] == ["a"], "the two rows of a prompt have a column each"
        completion_ids[0].clear(), completions.clear(), prompts.clear()
        trainer_state.global_step = 99
        return [0.0, 1.0]
    prompts, sample = rows(1, prompt=chat, meta=meta) * 2, sampled("a", "b")
    common.score({"one": Reward(spoils, 1.0), "two": Reward(spoils, 1.0)}, prompts, sample, 3, 9)
    assert seen[0] == seen[1] and meta == {"tests": ["a"]} and chat[0]["content"] == "hi" and sample[0]["completion_ids"] == [1]


HANGS = """
import asyncio, re, signal, subprocess, time

def sleep():
    while True: time.sleep(0.05)
def retries(completions):
    while True:
        try: sleep()
        except Exception: pass
def catches_all(completions):
    while True:
        try: sleep()
        except BaseException: pass
def own_alarm(completions):
    signal.signal(signal.SIGALRM, lambda *_: None); signal.alarm(1); signal.alarm(0); sleep()
def returns_after_all(completions):
    try: sleep()
    except Exception: return [1.0, 1.0]
async def waits(completions): await asyncio.sleep(60)
def children(completions):
    subprocess.Popen(["sleep", "61.5"]); catches_all(completions)
def in_c(completions): return [sum(range(10**13))]
def leave(completions): raise SystemExit(0)
"""


@pytest.mark.parametrize("name, sentence", [
    ("retries", "'retries' gave no answer in 0.2 s (--reward_timeout), and goes on"), ("catches_all", "and goes on"), ("own_alarm", "and goes on"),
    ("returns_after_all", "raised TimeoutError: no answer in 0.2 s"), ("waits", "raised TimeoutError: no answer in 0.2 s"), ("children", "and goes on"),
    ("in_c", "Timeout"), ("leave", "raised SystemExit: 0 (<string>:23), on the completion 'a' of row file:1")])
def test_a_reward_that_does_not_end_or_ends_the_process_ends_the_run(name, sentence, monkeypatch, capfd):
    """Whatever it catches, and whoever has the alarm: code 2, one sentence that names it, and no process of its own left."""
    monkeypatch.setattr(common, "GRACE", 0.3)
    exec(HANGS, module := {})

    def child():
        with common.user_errors():
            common.score({name: Reward(module[name], 1.0, "r.py")}, rows(), sampled("a", "b"), 0, 1, timeout=0.2)
    start = time.monotonic()
    status, error = os.WEXITSTATUS(in_child(child)), capfd.readouterr().err
    assert time.monotonic() - start < 10 and sentence in error
    if name == "in_c":  # nothing but faulthandler runs then: with the stack and code 1
        assert status == 1 and "in in_c" in error
    else:
        assert status == 2 and error.count("\n") == 1 and f": error: reward function '{name}' " in error
    assert subprocess.run(["pgrep", "-f", "^sleep 61.5"], stdout=subprocess.DEVNULL).returncode == 1


def test_a_reward_that_asks_for_a_column_that_is_not_there_is_told_which_are():
    def mine(completions, *rest, answr, prompts=None, **more):
        return [0.0] * len(completions)
    with pytest.raises(common.UserError, match="'mine' raised TypeError: it asks for 'answr', and there are only .*completions"):
        common.score({"mine": Reward(mine, 1.0, "r.py")}, rows(), sampled("a", "b"), 0, 1)


def test_a_reward_that_draws_random_numbers_of_its_own_does_not_change_training(tmp_path):
    """What training draws comes from (seed, step) alone: reseeding from the clock changes no weight and no sample."""
    (tmp_path / "r.py").write_text(
        "import random, time, numpy, torch\ndef calm(completions):\n    return [sum(map(ord, c)) % 7 for c in completions]\ndef wild(completions):\n    random.seed()\n"
        "    numpy.random.seed(None)\n    torch.manual_seed(time.time_ns())\n    random.random(), numpy.random.rand(), torch.rand(1)\n    return calm(completions)\n")
    flags = ["--eval_fraction", 0, "--batch_size", 2, "--max_steps", 2, "--num_generations", 2, "--max_completion_length", 8, "--lora_r", 4, "--temperature", 1.5]
    calm, wild = (run(grpo, tmp_path / name, *flags, "--reward_funcs", f"{tmp_path}/r.py:{name}") for name in ("calm", "wild"))
    assert [m["loss"] for m in calm] == [m["loss"] for m in wild] and calm[1]["entropy"] == wild[1]["entropy"] and calm[0]["grad_norm"] > 0


def test_a_reward_file_may_hold_a_dataclass_and_reward_models_side_by_side_have_their_own_names(tmp_path, monkeypatch):
    (tmp_path / "r.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Kept:\n    x: int\n"
                                   "def one(completions, **more):\n    return [Kept(1).x] * len(completions)\n")
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--reward_funcs", f"{tmp_path}/r.py:one"])
    assert common.load_rewards(args)["one"].function(["a", "b"]) == [1, 1]
    monkeypatch.setattr(common, "load_reward_model", lambda *a, **more: (["score"], None))
    for folder, label in (("kind", "kind_score"), ("safe", "safe_score"), ("rm/model", "rm_score"), ("rm/merged", "rm_score"),
                          ("rm/value", "rm_score")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        args.reward_funcs = [str(tmp_path / folder)]
        reward, = common.load_rewards(args).items()
        assert reward[0] == label and reward[1].path == str(tmp_path / folder) and reward[1].score == "score"

# ---- built in --------------------------------------------------------------------------------------------------------

def test_edit_distance_by_hand_and_against_the_table():
    assert common.edit_distance(None, ["sitting", " same\n", "", "x", "ab", "7"], answer=["kitten", "same", "", "", None, 7]) == \
        [1 - 3 / 7, 1, 1, 0, None, 1]
    assert common.edit_distance(None, [[{"role": "assistant", "content": "ac"}]], solution=["abc"]) == [1 - 1 / 3]
    assert common.edit_distance(None, ["a"]) == [None]
    draw = random.Random(0)
    for _ in range(300):
        a, b = ("".join(draw.choices("abé😀", k=draw.randrange(80))) for _ in range(2))
        row = list(range(len(b) + 1))  # two rows of the table, one cell at a time
        for i, x in enumerate(a, 1):
            row, before = [i], row
            for j, y in enumerate(b, 1):
                row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
        assert common.levenshtein(a, b) == row[-1]
    start = time.perf_counter()
    assert common.levenshtein("ab" * 1000, "ba" * 1000) == 2
    assert time.perf_counter() - start < 0.5


def test_json():
    def value(text, *schema):
        return common.json_reward(None, [text], **({"schema": list(schema)} if schema else {}))[0]
    good = ['{"a": 1}', " [1, 2]\n", "null", '```json\n{"a": 1}\n```', "```\n3\n```", "1e999", '```JSON\n{"a": 1}\n```', '``` json\n{"a": 1}\n```']
    bad = ["", "{'a': 1}", '{"a": 1,}', '{"a": NaN}', "-Infinity", 'see:\n```json\n1\n```', "```json\n1", "[" * 100_000, "9" * 5000]
    assert [value(t) for t in good] == [1] * 8 and [value(t) for t in bad] == [0] * 9
    for schema in (["a", "b"], '["a", "b"]', "['a', 'b']"):
        assert value('{"b": null, "a": 1, "c": 2}', schema) == 1 and value('{"a": 1}', schema) == value('["a", "b"]', schema) == 0
    assert value("1", None) == value("1", []) == value("1", "") == 1
    for wrong in ({"a": "string"}, [1], [["a"]], "a, b", '{"required": ["a"]}', 3, '"a"'):
        with pytest.raises(ValueError, match="'schema' must be a list of keys, not "):
            value("{}", wrong)
    with pytest.raises(common.UserError, match="'json' raised ValueError: the column 'schema' must .* of row file:1"):
        common.score({"json": Reward(common.json_reward, 1.0)}, rows(schema="a, b"), sampled("1", "2"), 0, 1)


F = "def f(x):\n    return x + 1\n"
ENDS_EARLY = ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "import os; os.kill(os.getpid(), 9)", "1 / 0", "def f(x:",
              "import os; print('0' * 32, flush=True); os.write(3, b'0' * 32); os._exit(0)", "", "a\0b",
              "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n1 / 0",
              "import builtins, os, sys\nfor m, n in (builtins, 'exec'), (builtins, 'compile'), (os, 'write'), (os, '_exit'):\n"
              "    setattr(m, n, lambda *a, **k: None)\nsys.modules.clear()\nf = lambda x: 3"]


def left_running(pids, seconds=5.0):
    """Those of the processes that still run after so long: one that was sent SIGKILL may need a moment."""
    def runs(pid):
        try:
            with open(f"/proc/{int(pid)}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False
    pids, end = list(pids), time.monotonic() + seconds
    while any(map(runs, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return [pid for pid in pids if runs(pid)]


def code(*completions, tests="assert f(1) == 2"):
    return common.code_reward(None, list(completions), tests=[tests] * len(completions))


def test_code_passes_or_fails_its_tests(tmp_path):
    fenced = [f"so:\n```python\nf = None\n```\nno,\n```py\n{F}```\nis it.", f"```\n{F}", [{"role": "assistant", "content": F}]]
    fenced.append(f"```python\n{F}```\nprints\n```\n3\n```")  # a block of Python goes before one of output
    assert code(F, *fenced, F.replace("1", "2"), f"```\n{F}```\n```\nf = None\n```") == [1, 1, 1, 1, 1, 0, 0]
    assert code(F, tests=["assert f(1) == 2", "assert f(-1) == 0"]) == [1] and code(F, tests=["assert f(1) == 2", "assert f(1) == 3"]) == [0]
    assert code(F, tests=None) == code(F, tests=[]) == code(F, tests=" ") == common.code_reward(None, [F]) == [None]
    assert code("import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n    x: 'int'\ny = pickle.loads(pickle.dumps(A(1)))", tests="assert y == A(1)") == [1]
    for wrong in (1, [None], {"a": 1}, [["assert f"]]):
        with pytest.raises(ValueError, match="'tests' must be a string or strings, not "):
            code(F, tests=wrong)


@pytest.mark.parametrize("tests", [["assert add(1, 2) == 3", "assert add(0, 0) == 0"], '["assert add(1, 2) == 3"]', "['assert add(1, 2) == 3', 'x = 1']"])
def test_a_list_of_tests_that_became_text_is_run(tests):
    """A CSV has them so, and a list is a program that does nothing: every completion would pass."""
    completions = ["def add(a, b): return a - b", "def add(a, b): return a + b", "pass"]
    assert common.code_reward(None, completions, tests=[tests] * 3) == [0, 1, 0]
    for wrong in ('{"inputs": ["1"]}', "[1, 2]", "['assert"):
        with pytest.raises(ValueError, match="the column 'tests' must be a string or strings, not"):
            common.code_reward(None, completions[:1], tests=[wrong])


def test_a_coroutine_may_keep_what_belongs_to_its_loop():
    one = asyncio.Semaphore(1)

    async def judge(completions):
        async with one:
            await asyncio.sleep(0.01)
            return [1.0] * len(completions)

    async def two_at_once(completions):
        return (await asyncio.gather(judge(completions), judge(completions)))[0]
    for _ in range(2):
        values, _ = common.score({"judge": Reward(two_at_once, 1.0)}, rows(), sampled("a", "b"), 0, 1)
        assert values[:, 0].tolist() == [1, 1]


def test_a_logged_metric_replaces_no_figure_of_an_evaluation(tmp_path):
    """eval/reward decides what is warned of and which weights are kept."""
    (tmp_path / "r.py").write_text("def f(completions, log_metric):\n    for name in ('reward', 'completions/mean_length', 'accuracy', 'mine'):\n        log_metric(name, 99.0)\n"
                                   "    return [0.5] * len(completions)\n")
    for script in (grpo, ppo):
        metrics = run(script, tmp_path / script.__name__, "--reward_funcs", f"{tmp_path}/r.py:f", "--eval_fraction", 0.005, "--batch_size", 2, "--num_generations", 2,
                      "--max_steps", 1, "--max_completion_length", 8)
        first = metrics[0]
        assert first["eval/reward"] == 0.5 and first["eval/accuracy"] <= 1 and first["eval/completions/mean_length"] <= 8 and first["eval/mine"] == 99


def test_code_that_ends_early_does_not_pass():
    start = time.monotonic()
    assert code(*ENDS_EARLY) == [0.0] * len(ENDS_EARLY)
    assert time.monotonic() - start < common.CODE_SECONDS  # none waits for its limit


def test_code_sees_nothing_of_the_trainer_and_its_folder_is_removed(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setattr(common.tempfile, "mkdtemp", lambda: str(tmp_path.joinpath("folder").mkdir() or tmp_path / "folder"))
    (tmp_path / "secret").write_text("x")
    secret = os.open(tmp_path / "secret", os.O_RDONLY)
    os.set_inheritable(secret, True)
    looks = ("import os, sys, tempfile\nassert set(os.environ) <= {'HOME', 'TMPDIR', 'OMP_NUM_THREADS', 'LC_CTYPE'}, os.environ\n"
             "opened = [os.path.realpath(f'/proc/self/fd/{i}') for i in range(64) if os.path.exists(f'/proc/self/fd/{i}')]\n"
             "assert sys.stdin.read() == '' and opened[:3] == ['/dev/null'] * 3 and not any('secret' in name for name in opened)\n"
             "assert os.getcwd() == tempfile.gettempdir() == os.path.expanduser('~') and os.listdir() == []\nopen('left', 'w').write('x')\n"
             "for _ in range(1100):\n    os.mkdir('d'); os.chdir('d')\n")
    assert code(looks, tests="assert open") == [1.0]
    os.close(secret)
    assert not (tmp_path / "folder").exists()


def test_what_code_may_use_is_bounded_and_nothing_is_left_running(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "CODE_SECONDS", 2)
    fork = f"import os, time\nif os.fork() == 0:\n    open('{tmp_path}/PID.new', 'w').write(str(os.getpid()))\n"
    fork += f"    os.rename('{tmp_path}/PID.new', '{tmp_path}/PID')\n    time.sleep(600)\n"  # never to be seen empty
    wait = f"import os\nwhile not os.path.exists('{tmp_path}/PID'): pass\n"
    start = time.monotonic()
    fails = ["while True: pass", "import time; time.sleep(600)", "x = []\nwhile True: x.append(bytearray(2**24))", "x = bytes(2**31)",
             "import signal, time\nsignal.alarm(0)\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
             "with open('big', 'wb') as file:\n    for _ in range(17): file.write(bytes(2**20))", (fork + wait + "1 / 0").replace("PID", "1")]
    assert code(*[c + "\n" + F for c in fails]) == [0.0] * len(fails)
    monkeypatch.setattr(common, "CODE_SECONDS", 10)
    passing = [(fork + wait).replace("PID", "2"), "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()",
               "for _ in range(10**5): print('x' * 100)", "import os; os.rmdir(os.getcwd())"]
    assert code(*[c + "\n" + F for c in passing]) == [1.0] * len(passing)
    assert time.monotonic() - start < 15
    assert left_running((tmp_path / name).read_text() for name in "12") == []


@pytest.mark.parametrize("cores, processes, at_once", [(4, 1, 4), (4, 2, 2), (1, 2, 1)])
def test_as_many_programs_run_at_once_as_this_process_has_cores(cores, processes, at_once, monkeypatch):
    """Not as many as the machine has: a job of 4 cores would time out with the programs of 64."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    pools, pool = [], common.ThreadPoolExecutor
    monkeypatch.setattr(common, "ThreadPoolExecutor", lambda n: pools.append(n) or pool(n))
    assert code(F) == [1.0] and pools == [at_once]


@pytest.mark.parametrize("how", ["timeout", "killed"])
def test_code_is_stopped_with_the_reward_that_runs_it(how, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "CODE_SECONDS", 60 if how == "timeout" else 1)
    sleeps = f"import os, time\nopen(f'{tmp_path}/{{os.getpid()}}', 'w')\nif os.fork(): time.sleep(600)\nopen(f'{tmp_path}/{{os.getpid()}}', 'w')\ntime.sleep(600)"
    if how == "timeout":
        with pytest.raises(common.UserError, match="'code' raised TimeoutError: no answer in 1 s"):
            common.score({"code": Reward(common.code_reward, 1.0)}, rows(9, tests="assert f"), sampled(*[sleeps] * 9), 0, 1, timeout=1)
        assert len(os.listdir(tmp_path)) in range(2, 2 * os.cpu_count() + 1)  # those that waited never began
    else:
        def dies():
            threading.Timer(0.5, os._exit, (0,)).start()
            code(sleeps.replace("os.fork()", "True"))
        assert in_child(dies) == 0 and len(os.listdir(tmp_path)) == 1
        time.sleep(2)
    assert left_running(os.listdir(tmp_path)) == []


def test_a_run_with_built_in_rewards_and_columns_that_are_refused(tmp_path):
    def train(*rewards, **columns):
        (tmp_path / "d.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1"} | (columns if i == 2 else {})) + "\n" for i in range(4)))
        return run(grpo, tmp_path / "out", "--dataset_name", tmp_path / "d.jsonl", "--eval_fraction", 0, "--batch_size", 4, "--max_steps", 1,
                   "--num_generations", 2, "--max_completion_length", 32, "--reward_funcs", *rewards)
    metrics, = train("code", "json", "edit_distance", tests=["assert True"], answer="<think>2+1=3</think><answer>3</answer>")
    assert metrics["rewards/code/mean"] == metrics["rewards/json/mean"] == 0 < metrics["rewards/edit_distance/mean"] < 1
    for name, columns, sentence in [
            ("code", {"tests": 3}, "d.jsonl:3: the column 'tests' must be a string"), ("json", {"schema": "a"}, "d.jsonl:3: the column 'schema' must be a list"),
            ("code", {"tests": "assert f("}, r"d.jsonl:3: '\(' was never closed \(the column 'tests', line 1\)"),
            ("code", {"test_list": ["assert f"]}, "--reward_funcs code needs a column 'tests'; of .*d.jsonl rewards are given test_list")]:
        with pytest.raises(common.UserError, match=sentence):
            train("format", name, **columns)


def test_what_a_reward_logs_does_not_replace_the_trainers_own_numbers(tmp_path):
    """A reward that logs "loss" or "kl" is heard under other names alone: the run's figures stay the run's."""
    (tmp_path / "r.py").write_text("def f(completions, log_metric):\n    for name in ('loss', 'kl', 'reward', 'mine'):\n        log_metric(name, 99.0)\n"
                                   "    return [len(c) / 100 for c in completions]\n")
    flags = ["--eval_fraction", 0, "--batch_size", 2, "--max_steps", 1, "--max_completion_length", 8, "--reward_funcs", f"{tmp_path}/r.py:f"]
    for script, more in ((grpo, ["--num_generations", 2, "--kl_coef", 0.1]), (ppo, ["--num_iterations", 1, "--num_minibatches", 1])):
        metrics, = run(script, tmp_path / script.__name__, *flags, *more)
        assert metrics["mine"] == 99 and metrics["reward"] < 1 and abs(metrics["kl"]) < 1e-4 and abs(metrics["loss"]) < 10


def test_format_counts_the_think_that_the_chat_template_has_written(tmp_path):
    """Some templates end the prompt with <think>: the completion lacks it, and is of the right form."""
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}")
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n' * 9)
    for flags, begun in ([], False), (["--chat_template_path", str(template)], True):
        args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--dataset_name", str(tmp_path / "d.jsonl"), "--eval_fraction", "0", *flags])
        prompts, _ = common.load_prompts(args, common.load_tokenizer(args))
        rows = [{"text": text, "truncated": False, "completion_ids": [0]} for text in ("so</think><answer>2</answer>", "<think>so</think><answer>2</answer>")]
        values, _ = common.score({"format": Reward(common.BUILT_IN["format"], 1.0)}, prompts[:2], rows, 0, 1)
        assert values.flatten().tolist() == [float(begun), float(not begun)]


@pytest.mark.parametrize("script", [grpo, ppo], ids=lambda script: script.__name__)
def test_a_reward_of_weight_zero_is_logged_and_scores_nothing(script, tmp_path):
    """A completion to which only such a reward applies is one that nothing scores."""
    (tmp_path / "r.py").write_text("def some(completions):\n    return [None if i % 2 else float(len(c)) for i, c in enumerate(completions)]\n"
                                   "def watch(completions):\n    return [5.0] * len(completions)\n")
    flags = ["--eval_fraction", 0, "--batch_size", 4, "--max_steps", 1, "--max_completion_length", 16, "--reward_funcs", f"{tmp_path}/r.py:some"]
    alone = run(script, tmp_path / "a", *flags)[0]
    both = run(script, tmp_path / "b", *flags, f"{tmp_path}/r.py:watch", "--reward_weights", 1, 0)[0]
    assert both["rewards/watch/mean"] == 5 and both["rewards/watch/weighted"] == 0
    assert {name: both[name] for name in ("reward", "loss", "grad_norm", "trained_tokens")} == {
        name: alone[name] for name in ("reward", "loss", "grad_norm", "trained_tokens")}
