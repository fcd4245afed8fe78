"""grpo.py: the losses by hand and by enumeration, the sampler against generate(), one step cut in every way, learning."""

import asyncio
import itertools
import json
import math
import os
import random
import threading
import time

import pytest
import torch
from conftest import TINY, RecordGradients, in_child, run, tiny_model
from torch import tensor

import common
import grpo

LN2 = math.log(2)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- losses by hand ----------------------------------------------------------------------------------------------------

def test_group_advantages_by_hand():
    scores = tensor([1.0, 0, 0, 1, 3, 1, 2, 2])  # std with n - 1: sqrt(1/3), sqrt(2/3)
    want = tensor([0.5, -0.5, -0.5, 0.5]) / (math.sqrt(1 / 3) + 1e-4), tensor([1.0, -1, 0, 0]) / (math.sqrt(2 / 3) + 1e-4)
    close(grpo.group_advantages(scores, 4), torch.cat(want))
    close(grpo.group_advantages(scores, 4, "none"), tensor([0.5, -0.5, -0.5, 0.5, 1, -1, 0, 0]))
    std = math.sqrt(sum((x - 1.25) ** 2 for x in scores.tolist()) / 7)
    close(grpo.group_advantages(scores, 4, "batch"), tensor([0.5, -0.5, -0.5, 0.5, 1, -1, 0, 0]) / (std + 1e-4))


def test_advantages_of_a_group_sum_to_zero_and_flat_groups_are_exactly_zero():
    scores = torch.rand(6 * 5, generator=torch.Generator().manual_seed(0))
    close(grpo.group_advantages(scores, 5).view(6, 5).sum(1), torch.zeros(6), 1e-5)  # fp32 means of numbers near 1
    flat = torch.full((8,), 0.1) * 3  # 0.3 with float noise in its mean
    for scale in ("group", "batch", "none"):
        assert grpo.group_advantages(flat, 8, scale).eq(0).all()


def test_unscored_completions_are_left_out_of_the_statistics():
    a = grpo.group_advantages(tensor([1.0, math.nan, 0.0, math.nan, math.nan, math.nan]), 3)
    close(a, tensor([0.5, 0, -0.5, 0, 0, 0]) / tensor([math.sqrt(0.5) + 1e-4, 1, math.sqrt(0.5) + 1e-4, 1, 1, 1]))


def test_grpo_loss_by_hand():
    """Ratios 1.5, 0.5, 1.1 with A = 2 and A = -1; epsilon 0.2, epsilon_high 0.3."""
    old = torch.zeros(2, 3)
    new = tensor([1.5, 0.5, 1.1]).log().repeat(2, 1)
    loss = grpo.grpo_loss(new, old, tensor([2.0, -1.0]), torch.ones(2, 3), 0.2, 0.3)
    close(loss, tensor([[-2.6, -1.0, -2.2], [1.5, 0.8, 1.1]]))  # min(3, 2.6), min(1, 1.6), 2.2; min(-1.5, -1.3), min(-.5, -.8), -1.1


def test_sequence_ratio_is_the_geometric_mean():
    new, mask = tensor([[2.0, 3.0, 5.0, 7.0]]).log(), tensor([[0.0, 1, 1, 0]])
    ratio = grpo.importance_ratio(new, torch.zeros(1, 4), mask, "sequence")
    close(ratio[mask.bool()], tensor([math.sqrt(15)] * 2))


def test_at_ratio_one_the_gradient_is_reinforce_and_masked_tokens_get_none():
    logprobs = torch.randn(3, 4, requires_grad=True)
    mask, a = tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]), tensor([1.0, -2.0, 0.5])
    before = logprobs.detach().clone()
    grpo.grpo_loss(logprobs, logprobs.detach(), a, mask).sum().backward()
    close(logprobs.grad, -a[:, None] * mask)
    assert torch.equal(before, logprobs.detach())


def test_clipped_tokens_get_no_gradient_on_the_clipped_side_only():
    new = tensor([[1.5, 0.5]]).log().requires_grad_()
    grpo.grpo_loss(new, torch.zeros(1, 2), tensor([1.0]), torch.ones(1, 2)).sum().backward()
    assert new.grad[0, 0] == 0 and new.grad[0, 1] == pytest.approx(-0.5)


def test_kl_k3_by_hand_and_never_negative():
    close(grpo.kl_k3(tensor([[0.0, -1.0, -3.0]]), tensor([[LN2, -1.0, -4.0]])), tensor([[1 - LN2, 0, math.exp(-1)]]))
    assert grpo.kl_k3(torch.randn(1000), torch.randn(1000)).min() >= 0


@pytest.mark.parametrize("off_policy", [False, True])
def test_ratio_times_k3_has_the_gradient_of_the_reverse_kl(off_policy):
    """Exact enumeration over two tokens of a 4-token vocabulary, at the states the sampling policy visits."""
    g = torch.Generator().manual_seed(1)
    first, second = torch.randn(4, generator=g).requires_grad_(), torch.randn(4, 4, generator=g).requires_grad_()
    ref = torch.randn(5, 4, generator=g).log_softmax(-1)
    lp = lambda a, b: torch.cat([a.log_softmax(-1)[None], b.log_softmax(-1)])  # (5, 4): the first token's row, then one a state
    old = lp(first + off_policy, second * (0.5 if off_policy else 1)).detach() if not off_policy else \
        torch.randn(5, 4, generator=g).log_softmax(-1)
    now = lp(first, second)
    loss = 0.0
    for x, y in itertools.product(range(4), range(4)):
        weight = (old[0, x] + old[1 + x, y]).exp()
        new, was, base = (torch.stack([t[0, x], t[1 + x, y]])[None] for t in (now, old, ref))
        ratio = grpo.importance_ratio(new, was, torch.ones(1, 2))
        loss = loss + weight * (ratio * grpo.kl_k3(new, base)).sum()
    got = torch.autograd.grad(loss, (first, second))
    now = lp(first, second)
    kl = (now.exp() * (now - ref)).sum(-1)  # (5,) KL(policy || ref) at each state
    want = torch.autograd.grad(kl[0] + (old[0].exp() * kl[1:]).sum(), (first, second))
    for a, b in zip(got, want):
        close(a, b)


def test_the_three_denominators_in_closed_form():
    lengths = tensor([1.0, 3.0, 0.0])
    close(grpo.token_weights(lengths, "dapo", 10), tensor([0.25] * 3))
    close(grpo.token_weights(lengths, "grpo", 10), tensor([1 / 3, 1 / 9, 1 / 3]))
    close(grpo.token_weights(lengths, "dr_grpo", 10), tensor([1 / 30] * 3))
    x = [torch.rand(1), torch.rand(3)]
    weights = grpo.token_weights(tensor([1.0, 3.0]), "grpo", 10)
    close((weights[0] * x[0].sum() + weights[1] * x[1].sum())[None], torch.stack([x[0].mean(), x[1].mean()]).mean()[None])


# ---- rewards -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, answer", [
    ("18", "18"), ("18.", "18"), ("18.00", "18"), ("$18", "18"), ("1,000", "1000"), ("so -7", "-7"), ("-$7", "-7"), ("$-7", "-7"),
    ("16-3", "3"), ("x=3.50 litres", "3.5"), ("#### 5\n#### 72", "72"), ("1,2,3", "3"), ("0.5", "0.5"), (".5", "0.5"), ("007", "7"),
    ("-0", "0"), ("12345678901234567890123456789012", "12345678901234567890123456789012"), ("no number", None), ("", None),
    ("3 <answer> 65 </answer> 7", "65"), ("<answer>1</answer><answer>2</answer>", "2"), ("<answer>Paris</answer>", "paris"),
    ("<answer></answer>", None), ("95**88**77", "77"), ("50%", "50"), ("3/4", "4"), ("10,000.50", "10000.5"),
])
def test_extract_answer(text, answer):
    assert grpo.extract_answer(text) == answer


def test_built_in_rewards():
    assert grpo.accuracy(None, ["<answer>65</answer>", "is 1,000.", "no"], answer=["65", "#### 1000", None]) == [1.0, 1.0, None]
    assert grpo.accuracy(None, [[{"role": "assistant", "content": "5"}]], solution=["5"]) == [1.0]
    assert grpo.accuracy(None, ["5"]) == [None]
    good, nested = "<think>a\nb</think>\n<answer>1</answer>", "<think>a</think><think>b</think><answer>1</answer>"
    assert grpo.format_reward(None, [good, nested, "x" + good, good + "x"]) == [1.0, 0.0, 0.0, 0.0]


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
    rewards = {"whole": (whole, 1.0), "waiting": (waiting, 1.0)}
    values, logged = grpo.score(rewards, rows(answer="7"), sampled("a", "b"), 3, 9)
    assert values[:, 0].tolist() == [0, 0] and values[0, 1].isnan() and values[1, 1] == 7 and logged == {"seen": 3}
    assert seen["prompts"] == ["1+1"] * 2 and seen["completions"] == ["a", "b"] and seen["answer"] == ["7", "7"]
    assert seen["completion_ids"] == [[1], [2]] and callable(seen["log_extra"])
    chat = [{"role": "user", "content": "hi"}]
    grpo.score({"whole": (whole, 1.0)}, rows(prompt=chat), sampled("a", "b"), 0, 1)
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
])
def test_wrong_rewards_are_named(returned, sentence):
    with pytest.raises(common.UserError, match="reward function 'f'.*" + sentence.replace("(", r"\(")):
        grpo.score({"f": (lambda completions: returned, 1.0)}, rows(), sampled("a", "b"), 0, 1)


def test_a_column_cannot_take_the_place_of_what_was_sampled(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1", "completions": "2"}\n' * 2)
    with pytest.raises(common.UserError, match="column 'completions' has the name of something else"):
        run(grpo, tmp_path / "out", "--dataset_name", tmp_path / "d.jsonl")


def test_a_failing_reward_is_narrowed_down_to_its_completion():
    def picky(completions):
        return [1 / (c != "b") for c in completions]
    with pytest.raises(common.UserError, match="'picky' raised ZeroDivisionError: .*on the completion 'b' of row file:2"):
        grpo.score({"picky": (picky, 1.0)}, rows(), sampled("a", "b"), 0, 1)


def test_columns_that_only_some_rows_have_are_none_elsewhere(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1"}\n{"prompt": "1+2", "level": 3}\n')
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--dataset_name", f"{tmp_path}/d.jsonl", "--eval_fraction", "0"])
    train, _ = grpo.load_prompts(args, common.load_tokenizer(args))
    assert [p["columns"] for p in train] == [{"level": None}, {"level": 3}]


def test_lora_on_the_head_is_refused(tmp_path):
    with pytest.raises(common.UserError, match="--modules_to_save lm_head"):
        run(grpo, tmp_path / "out", "--lora_r", 4, "--lora_target_modules", "q_proj", "lm_head", "--max_steps", 1)


def test_more_minibatches_than_rows_of_the_last_rollout(tmp_path):
    """5 prompts, 4 a rollout: the second rollout has one prompt, and with None rewards fewer rows than minibatches."""
    with open(os.path.join(TINY, "addition.jsonl")) as file:
        (tmp_path / "d.jsonl").write_text("".join(file.readlines()[:5]))
    (tmp_path / "r.py").write_text("def some(completions):\n    return [None] * (len(completions) - 1) + [1.0]\n")
    metrics = run(grpo, tmp_path / "out", "--dataset_name", tmp_path / "d.jsonl", "--eval_fraction", 0, "--batch_size", 4, "--num_generations", 2,
                  "--num_minibatches", 4, "--max_steps", 8, "--reward_funcs", f"{tmp_path}/r.py:some", "--kl_coef", 0.1)
    assert len(metrics) == 8 and min(m["trained_tokens"] for m in metrics) == 0


def test_the_launchers_accumulation_does_not_scale_the_gradient(monkeypatch, tmp_path):
    (want,), _ = gradient(monkeypatch, tmp_path)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    (got,), _ = gradient(monkeypatch, tmp_path, "--logging_steps", 2)
    assert torch.equal(got, want)


def test_numpy_scalars_ints_and_bools_are_numbers():
    import numpy
    values, _ = grpo.score({"f": (lambda completions: numpy.array([1, 2]), 1.0), "g": (lambda completions: [True, numpy.float32(.5)], 1.0)},
                           rows(), sampled("a", "b"), 0, 1)
    assert values.tolist() == [[1, 1], [2, 0.5]]


# ---- built-in rewards --------------------------------------------------------------------------------------------------

def test_edit_distance_by_hand_and_against_the_table():
    assert grpo.edit_distance(None, ["sitting", " same\n", "", "x", "ab", "7"], answer=["kitten", "same", "", "", None, 7]) == \
        [1 - 3 / 7, 1, 1, 0, None, 1]
    assert grpo.edit_distance(None, [[{"role": "assistant", "content": "ac"}]], solution=["abc"]) == [1 - 1 / 3]
    assert grpo.edit_distance(None, ["a"]) == [None]
    draw = random.Random(0)
    for _ in range(300):
        a, b = ("".join(draw.choices("abé😀", k=draw.randrange(80))) for _ in range(2))
        row = list(range(len(b) + 1))  # two rows of the table, one cell at a time
        for i, x in enumerate(a, 1):
            row, before = [i], row
            for j, y in enumerate(b, 1):
                row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
        assert grpo.levenshtein(a, b) == row[-1]
    start = time.perf_counter()
    assert grpo.levenshtein("ab" * 1000, "ba" * 1000) == 2
    assert time.perf_counter() - start < 0.5


def test_json():
    def value(text, *schema):
        return grpo.json_reward(None, [text], **({"schema": list(schema)} if schema else {}))[0]
    good = ['{"a": 1}', " [1, 2]\n", "null", '```json\n{"a": 1}\n```', "```\n3\n```", "1e999"]
    bad = ["", "{'a': 1}", '{"a": 1,}', '{"a": NaN}', "-Infinity", 'see:\n```json\n1\n```', "```json\n1", "[" * 100_000, "9" * 5000]
    assert [value(t) for t in good] == [1] * 6 and [value(t) for t in bad] == [0] * 9
    for schema in (["a", "b"], '["a", "b"]'):
        assert value('{"b": null, "a": 1, "c": 2}', schema) == 1 and value('{"a": 1}', schema) == value('["a", "b"]', schema) == 0
    assert value("1", None) == value("1", []) == value("1", "") == 1
    for wrong in ({"a": "string"}, [1], [["a"]], "a, b", '{"required": ["a"]}', 3, '"a"'):
        with pytest.raises(ValueError, match="'schema' must be a list of keys, not "):
            value("{}", wrong)
    with pytest.raises(common.UserError, match="'json' raised ValueError: the column 'schema' must .* of row file:1"):
        grpo.score({"json": (grpo.json_reward, 1.0)}, rows(schema="a, b"), sampled("1", "2"), 0, 1)


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
    return grpo.code_reward(None, list(completions), tests=[tests] * len(completions))


def test_code_passes_or_fails_its_tests(tmp_path):
    fenced = [f"so:\n```python\nf = None\n```\nno,\n```py\n{F}```\nis it.", f"```\n{F}", [{"role": "assistant", "content": F}]]
    assert code(F, *fenced, F.replace("1", "2"), f"```\n{F}```\n```\nf = None\n```") == [1, 1, 1, 1, 0, 0]
    assert code(F, tests=["assert f(1) == 2", "assert f(-1) == 0"]) == [1] and code(F, tests=["assert f(1) == 2", "assert f(1) == 3"]) == [0]
    assert code(F, tests=None) == code(F, tests=[]) == code(F, tests=" ") == grpo.code_reward(None, [F]) == [None]
    assert code("import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n    x: 'int'\ny = pickle.loads(pickle.dumps(A(1)))", tests="assert y == A(1)") == [1]
    for wrong in (1, [None], {"a": 1}, [["assert f"]]):
        with pytest.raises(ValueError, match="'tests' must be a string or strings, not "):
            code(F, tests=wrong)


def test_code_that_ends_early_does_not_pass():
    start = time.monotonic()
    assert code(*ENDS_EARLY) == [0.0] * len(ENDS_EARLY)
    assert time.monotonic() - start < grpo.CODE_SECONDS  # none waits for its limit


def test_code_sees_nothing_of_the_trainer_and_its_folder_is_removed(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setattr(grpo.tempfile, "mkdtemp", lambda: str(tmp_path.joinpath("folder").mkdir() or tmp_path / "folder"))
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
    monkeypatch.setattr(grpo, "CODE_SECONDS", 2)
    fork = f"import os, time\nif os.fork() == 0:\n    open('{tmp_path}/PID.new', 'w').write(str(os.getpid()))\n"
    fork += f"    os.rename('{tmp_path}/PID.new', '{tmp_path}/PID')\n    time.sleep(600)\n"  # never to be seen empty
    wait = f"import os\nwhile not os.path.exists('{tmp_path}/PID'): pass\n"
    start = time.monotonic()
    fails = ["while True: pass", "import time; time.sleep(600)", "x = []\nwhile True: x.append(bytearray(2**24))", "x = bytes(2**31)",
             "import signal, time\nsignal.alarm(0)\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
             "with open('big', 'wb') as file:\n    for _ in range(17): file.write(bytes(2**20))", (fork + wait + "1 / 0").replace("PID", "1")]
    assert code(*[c + "\n" + F for c in fails]) == [0.0] * len(fails)
    monkeypatch.setattr(grpo, "CODE_SECONDS", 10)
    passing = [(fork + wait).replace("PID", "2"), "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()",
               "for _ in range(10**5): print('x' * 100)", "import os; os.rmdir(os.getcwd())"]
    assert code(*[c + "\n" + F for c in passing]) == [1.0] * len(passing)
    assert time.monotonic() - start < 15
    assert left_running((tmp_path / name).read_text() for name in "12") == []


@pytest.mark.parametrize("how", ["timeout", "killed"])
def test_code_is_stopped_with_the_reward_that_runs_it(how, monkeypatch, tmp_path):
    monkeypatch.setattr(grpo, "CODE_SECONDS", 60 if how == "timeout" else 1)
    sleeps = f"import os, time\nopen(f'{tmp_path}/{{os.getpid()}}', 'w')\nif os.fork(): time.sleep(600)\nopen(f'{tmp_path}/{{os.getpid()}}', 'w')\ntime.sleep(600)"
    if how == "timeout":
        with pytest.raises(common.UserError, match="'code' raised TimeoutError: no answer in 1 s"):
            grpo.score({"code": (grpo.code_reward, 1.0)}, rows(9, tests="assert f"), sampled(*[sleeps] * 9), 0, 1, timeout=1)
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
            ("code", {"test_list": ["assert f"]}, "--reward_funcs code needs a column 'tests'; .*d.jsonl has test_list")]:
        with pytest.raises(common.UserError, match=sentence):
            train("format", name, **columns)


# ---- sampler -----------------------------------------------------------------------------------------------------------

def padded(prompts):
    return common.pad(prompts, 256, side="left"), common.pad([[1] * len(p) for p in prompts], 0, side="left")


PROMPTS = [[65, 66, 67], [70, 71, 72, 73, 74, 75, 76], [80], [66, 67, 68, 69, 70]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_sampling_equals_generate(kind):
    model = tiny_model(kind).eval()
    stop = [260, 5, 17, 33, 101, 150, 203]  # so that rows end at different times
    ids, lengths = [], []
    for prompt in PROMPTS:
        out = model.generate(input_ids=tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=stop, pad_token_id=256)
        ids.append(out[0, len(prompt):].tolist())
    got, _, lengths = grpo.sample(model, *padded(PROMPTS), None, 24, 1.0, stop)
    assert [row[:n] for row, n in zip(got.tolist(), lengths)] == ids
    assert len(set(map(len, ids))) > 1, "the rows should end at different times, or dropping them is not tested"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_completion_does_not_depend_on_its_batch_and_its_logprobs_are_the_models(kind):
    model, g, c = tiny_model(kind).eval(), 3, 20
    uniforms = torch.rand(len(PROMPTS) * g, c, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, logprobs, lengths = grpo.sample(model, *padded(PROMPTS), uniforms, c, 0.7, [260, 7, 99, 180, 200], g)
    for i, prompt in enumerate(PROMPTS):
        for j in range(i * g, i * g + g):
            alone, _, length = grpo.sample(model, *padded([prompt]), uniforms[j:j + 1], c, 0.7, [260, 7, 99, 180, 200])
            assert length[0] == lengths[j] and torch.equal(alone[0], whole[j])
            n = int(length[0])
            row = tensor([prompt + whole[j, :n].tolist()])
            want = (model(row).logits / 0.7).log_softmax(-1)[0, len(prompt) - 1:-1].gather(-1, whole[j, :n, None]).squeeze(-1)
            close(logprobs[j, :n], want, 2e-5)
    assert len(set(lengths.tolist())) > 1


def test_the_sampled_distribution_is_the_whole_softmax_at_the_temperature():
    """4,000 first tokens of one prompt against the model's own probabilities, by chi-square over its 20 likeliest and the rest."""
    model, n = tiny_model("llama").eval(), 4000
    uniforms = torch.rand(n, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids, _, _ = grpo.sample(model, *padded(PROMPTS[:1]), uniforms, 1, 1.7, [260], n)
    p = (model(tensor(PROMPTS[:1])).logits[0, -1] / 1.7).softmax(-1)
    top = p.topk(20).indices
    counts = torch.bincount(ids[:, 0], minlength=320)
    expected = torch.cat([p[top], 1 - p[top].sum()[None]]) * n
    observed = torch.cat([counts[top], n - counts[top].sum()[None]])
    assert ((observed - expected) ** 2 / expected).sum() < 45.3  # 99.9 % point for 20 degrees of freedom
    assert (counts > 0).sum() > 60, "top-k filtering would leave at most k"


# ---- one step, cut in every way ----------------------------------------------------------------------------------------

def gradient(monkeypatch, tmp_path, *flags):
    monkeypatch.setattr(grpo, "make_optimizer", RecordGradients)
    metrics = run(grpo, tmp_path / "-".join(map(str, flags)).replace("/", "_")[-60:], "--eval_fraction", 0, "--batch_size", 6, "--num_generations", 4,
                  "--max_grad_norm", 0, "--max_steps", 1, *flags)
    return RecordGradients.last.gradients, metrics


@pytest.mark.parametrize("flags", [
    (), ("--loss_type", "grpo"), ("--loss_type", "dr_grpo", "--kl_coef", 0.1), ("--lora_r", 4, "--kl_coef", 0.1),
    ("--loss_type", "grpo", "--importance_sampling_level", "sequence", "--epsilon", 3e-4),
    ("--num_minibatches", 2, "--mask_truncated_completions", "--max_completion_length", 62)], ids=str)
def test_the_gradient_does_not_depend_on_micro_batch_tokens_or_checkpointing(monkeypatch, tmp_path, flags):
    whole, _ = gradient(monkeypatch, tmp_path, *flags)
    assert max(g.norm() for g in whole) > 1e-3
    for cut in (("--micro_batch_tokens", 1), ("--micro_batch_tokens", 300), ("--gradient_checkpointing", "--rollout_batch_size", 5)):
        for a, b in zip(gradient(monkeypatch, tmp_path, *flags, *cut)[0], whole):
            assert (a - b).norm() <= 1e-6 * b.norm()


def test_the_step_equals_the_formula_computed_row_by_row_with_plain_transformers(monkeypatch, tmp_path):
    """The DAPO loss of the very rollout, on unpadded rows, with log_softmax over the model's own logits."""
    kept = []
    rollout = grpo.rollout
    monkeypatch.setattr(grpo, "rollout", lambda *a, **k: kept.append(rollout(*a, **k)) or kept[-1])
    (got,), metrics = gradient(monkeypatch, tmp_path, "--temperature", 0.9)
    assert sum(r["score"] for r in kept[0][0]) > 0
    records = kept[0][0]
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json")])
    model = common.load_model(args, common.load_tokenizer(args))
    rewards = tensor([r["score"] for r in records])
    groups = rewards.view(6, 4)
    a = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    tokens = sum(len(r["completion_ids"]) for r in records)
    loss = 0.0
    for record, advantage in zip(records, a):
        ids, n = record["input_ids"].long(), len(record["completion_ids"])
        logits = model(ids[None]).logits[0].float() / 0.9
        lp = logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None]).squeeze(-1)[-n:]
        loss = loss - advantage * lp.sum() / tokens
    loss.backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert (got - want).norm() / want.norm() < 1e-5
    assert metrics[0]["trained_tokens"] == tokens


def test_the_first_update_of_every_rollout_has_ratio_one_and_later_ones_have_not(tmp_path):
    metrics = run(grpo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 4, "--num_iterations", 2, "--num_minibatches", 2,
                  "--max_steps", 8, "--kl_coef", 0.05, "--temperature", 0.8)
    assert len(metrics) == 8
    assert all(m["ratio/max_deviation"] < 1e-5 for m in metrics[::4])
    assert all(m["ratio/max_deviation"] > 1e-5 for m in metrics[2::4])
    assert abs(metrics[0]["kl"]) < 1e-5 < metrics[-1]["kl"]
    assert all(m["sampling/logprob_difference_max"] < 1e-3 for m in metrics[::4])


@pytest.mark.parametrize("start", ["lora", "adapter", "adapter with dropout", "full"])
def test_the_reference_is_the_start_and_stays(monkeypatch, tmp_path, start):
    """kl is 0 at first and the reference's log-probs do not move, however the reference is kept."""
    (tmp_path / "r.py").write_text("def vowels(completion_ids):\n    return [sum(i % 7 for i in c) for c in completion_ids]\n")
    flags = ["--eval_fraction", 0, "--batch_size", 2, "--max_steps", 2, "--learning_rate", 1e-3, "--kl_coef", 0.1,
             "--reward_funcs", f"{tmp_path}/r.py:vowels", "--temperature", 1.5]
    flags += ["--lora_r", 4] if start == "lora" else []
    if start.startswith("adapter"):
        run(grpo, tmp_path / "first", *flags, "--lora_r", 4)
        config = tmp_path / "first" / "model" / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_dropout": 0.0', f'"lora_dropout": {0.5 * ("with" in start)}'))
        flags += ["--model_name_or_path", tmp_path / "first" / "model"]
    seen = []
    forward_of_rollout = grpo.forward_of_rollout

    def spy(policy, *rest):
        result = forward_of_rollout(policy, *rest)
        ids = tensor([PROMPTS[1] * 3])
        seen.append(policy(ids, torch.ones(1, 20))[0].detach())
        return result
    monkeypatch.setattr(grpo, "forward_of_rollout", spy)
    metrics = run(grpo, tmp_path / "second", *flags)
    assert abs(metrics[0]["kl"]) < 1e-5 < metrics[1]["kl"]
    assert torch.equal(seen[0], seen[1])


def test_dropout_is_off_where_logprobs_are_compared(tmp_path, tokenizer):
    from transformers import LlamaConfig
    config = LlamaConfig.from_pretrained(os.path.join(TINY, "model"), attention_dropout=0.5)
    config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--model_name_or_path", str(tmp_path / "model")])
    model, ids = common.load_model(args, tokenizer), tensor([PROMPTS[1]])
    assert model.training and torch.equal(model(ids).logits, model(ids).logits)


def test_flat_rewards_are_said_aloud_and_nothing_is_learned(tmp_path, capsys):
    (tmp_path / "r.py").write_text("def same(completions):\n    return [1.0] * len(completions)\n")
    metrics = run(grpo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 2, "--max_steps", 3, "--reward_funcs", f"{tmp_path}/r.py:same")
    assert [m["frac_reward_zero_std"] for m in metrics] == [1, 1, 1] and all(m["grad_norm"] == 0 for m in metrics)
    assert "all completions of every prompt have scored the same" in capsys.readouterr().out


def test_a_prompt_too_long_is_dropped_and_counted(tmp_path, capsys):
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--max_prompt_length", "8"])
    train, held = grpo.load_prompts(args, common.load_tokenizer(args))
    assert all(len(p["prompt_ids"]) <= 8 for p in train + held)
    with open(args.dataset_name) as file:
        kept = sum(len(json.loads(line)["prompt"]) <= 5 for line in file)
    assert len(train) + len(held) == kept and f"{8000 - kept:,} dropped" in capsys.readouterr().out


# ---- rejection sampling, demonstrations, dynamic sampling, length ---------------------------------------------------------

def test_best_of_groups_by_hand():
    scores = tensor([3.0, 2, 2, 1, 1, 0, 0, 0, 5, 5, 5, 5, math.nan, 2, 1, 0])
    assert grpo.best_of_groups(scores, 4, 0.5).tolist() == [True] * 3 + [False] + [True] + [False] * 3 + [False] * 4 + [False, True, True, False]
    assert grpo.best_of_groups(scores, 4, 0.25).view(4, 4).sum(1).tolist() == [1, 1, 0, 1]
    assert grpo.best_of_groups(torch.full((4,), math.nan), 4, 1.0).tolist() == [False] * 4


def test_overlong_penalty_by_hand():
    """DAPO's table: nothing up to max - buffer, a straight line, -1 at the end; 0 switches it off."""
    assert [grpo.overlong_penalty(n, 100, 20) for n in (1, 80, 85, 90, 100)] == [0, 0, -0.25, -0.5, -1]
    assert grpo.overlong_penalty(100, 100, 0) == 0


def test_overlong_penalty_lowers_the_score(monkeypatch, tmp_path):
    (tmp_path / "r.py").write_text("def same(completions):\n    return [1.0] * len(completions)\n")
    flags = ["--eval_fraction", 0, "--batch_size", 2, "--max_steps", 1, "--reward_funcs", f"{tmp_path}/r.py:same", "--temperature", 1.5,
             "--max_completion_length", 30]
    seen, advantages = [], grpo.group_advantages
    monkeypatch.setattr(grpo, "group_advantages", lambda scores, *a: seen.append(scores) or advantages(scores, *a))
    run(grpo, tmp_path / "a", *flags)
    metrics = run(grpo, tmp_path / "b", *flags, "--overlong_penalty", 30)
    assert seen[0].eq(1).all() and metrics[0]["rewards/same/mean"] == 1
    close(1 - seen[1].mean().item(), metrics[0]["completions/mean_length"] / 30)  # 1 - length / 30 each


def answers_file(path, demonstrations):
    """24 sums, those of `demonstrations` with one."""
    with open(os.path.join(TINY, "addition.jsonl")) as file:
        data = [json.loads(line) for line in file][:24]
    path.write_text("".join(json.dumps({"prompt": r["prompt"], "answer": r["answer"]} | (
        {"demonstration": r["completion"]} if i in demonstrations else {})) + "\n" for i, r in enumerate(data)))
    return path


def test_the_loss_with_best_of_group_and_demonstrations_equals_the_formula_row_by_row(monkeypatch, tmp_path):
    """Two thirds of the prompts have a demonstration: groups that always fail are replaced by it and weigh in the NLL alone."""
    kept, rollout = [], grpo.rollout
    monkeypatch.setattr(grpo, "rollout", lambda *a, **k: kept.append((rollout(*a, **k), a[1])) or kept[-1][0])
    flags = ["--dataset_name", answers_file(tmp_path / "d.jsonl", {i for i in range(24) if i % 3}), "--best_fraction", 0.25, "--sft_coef", 0.3,
             "--demo_threshold", 0, "--loss_type", "grpo", "--batch_size", 24, "--num_generations", 4, "--kl_coef", 0.1]
    (got,), metrics = gradient(monkeypatch, tmp_path, *flags)
    (records, _), prompts = kept[0]
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json")])
    tokenizer = common.load_tokenizer(args)
    model = common.load_model(args, tokenizer)
    lp = lambda ids: model(ids[None]).logits[0].float().log_softmax(-1)[:-1].gather(-1, ids[1:, None]).squeeze(-1)
    surrogate, nll, sequences, tokens, replaced, best = [], 0.0, 0, 0, 0, 0
    for g in range(24):
        group, prompt = records[4 * g:4 * g + 4], prompts[g]
        r = tensor([x["score"] for x in group])
        if r.sum() == 0 and prompt["columns"]["demonstration"]:
            text = f"<|user|>{prompt['prompt']}<|end|><|assistant|>"
            head = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = tensor(head + tokenizer(prompt["columns"]["demonstration"] + "<|end|>", add_special_tokens=False)["input_ids"])
            nll, tokens, replaced = nll - lp(ids)[len(head) - 1:].sum(), tokens + len(ids) - len(head), replaced + 1
            continue
        a = (r - r.mean()) / (r.std() + 1e-4)
        for x, advantage in zip(group, a):
            n, ids = len(x["completion_ids"]), x["input_ids"].long()
            values = lp(ids)[-n:]
            surrogate, sequences = [*surrogate, -advantage * values.mean()], sequences + 1
            if x["score"] == 1 and r.sum() < 4:  # all winners tie for the best
                nll, tokens, best = nll - values.sum(), tokens + n, best + 1
    assert 0 < replaced < 16 and best > 5 and sequences == 4 * (24 - replaced)
    (sum(surrogate) / sequences + 0.3 * nll / tokens).backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert (got - want).norm() / want.norm() < 1e-5
    close(tensor([metrics[0]["nll_loss"], metrics[0]["demo_fraction"], metrics[0]["best_fraction"]]),
          tensor([nll.item() / tokens, replaced / 24, best / sequences]), 1e-4)
    assert metrics[0]["sampling/logprob_difference_max"] < 1e-4 and abs(metrics[0]["kl"]) < 1e-5


def test_the_gate_looks_at_correctness_alone_and_at_the_threshold():
    ids = torch.arange(4, dtype=torch.int32)
    prompts = [{"demo_ids": ids, "demo_mask": ids > 1}, {"demo_ids": ids, "demo_mask": ids > 1}, {}]
    groups = [{"prompt": i // 2, "rewards": tensor([9.0, float(i == 2)])} for i in range(6)]  # pass rates 0, 1/2, 0
    kept, metrics = grpo.demonstrate(groups, prompts, 2, 0.0, 1)
    assert [r.get("prompt") for r in kept] == [1, 1, 2, 2, None] and metrics == {"demo_fraction": 1 / 3}
    assert [r.get("prompt") for r in grpo.demonstrate(groups, prompts, 2, 0.5, 1)[0]] == [2, 2, None, None]
    three_of_ten = [{"prompt": 0, "rewards": tensor([float(i < 3)])} for i in range(10)]  # in fp32 0.3 is more than 0.3
    assert grpo.demonstrate(three_of_ten, prompts, 10, 0.3, 0)[1] == {"demo_fraction": 1}


def test_the_gate_is_the_reward_that_tells_right_from_wrong_wherever_it_stands(tmp_path, capsys):
    data = answers_file(tmp_path / "d.jsonl", range(24))
    flags = ["--dataset_name", data, "--eval_fraction", 0, "--batch_size", 2, "--max_steps", 1, "--demo_threshold", 0]
    run(grpo, tmp_path / "a", *flags, "--reward_funcs", "format", "accuracy")
    assert "a group's mean of 'accuracy' is at most 0" in capsys.readouterr().out


def test_demonstrations_may_be_messages_and_are_checked(tmp_path):
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--demo_threshold", "0"])
    tokenizer = common.load_tokenizer(args)
    prompt = lambda demonstration: {"turns": [common.turn("user", "1+1=")], "row": {"demonstration": demonstration}, "place": "row 7"}
    text, messages = prompt("2"), prompt([{"role": "assistant", "content": "2"}])
    grpo.encode_demonstrations(args, tokenizer, [text, messages, prompt(None), prompt("")])
    assert messages["demo_ids"].equal(text["demo_ids"]) and messages["demo_mask"].equal(text["demo_mask"])
    assert tokenizer.decode(text["demo_ids"]) == "<|user|>1+1=<|end|><|assistant|>2<|end|>" and text["demo_mask"].sum() == 2
    for bad, reason in ((42, "not a string but 42"), ([{"role": "user", "content": "2"}], "does not end with an answer"), (" ", "does not end")):
        with pytest.raises(common.UserError, match=f"row 7: .*{reason}"):
            grpo.encode_demonstrations(args, tokenizer, [text, prompt(bad)])
    args.skip_bad_rows = True
    grpo.encode_demonstrations(args, tokenizer, [text, prompt(42)])
    with pytest.raises(common.UserError, match="no prompt has a demonstration in a column 'demonstration'"):
        grpo.encode_demonstrations(args, tokenizer, [prompt(None)])


def test_flat_groups_are_sampled_again_until_enough_vary(tmp_path, capsys):
    plain = run(grpo, tmp_path / "a", "--eval_fraction", 0, "--batch_size", 6, "--max_steps", 3, "--temperature", 0.5)
    dropped = run(grpo, tmp_path / "b", "--eval_fraction", 0, "--batch_size", 6, "--max_steps", 3, "--temperature", 0.5, "--drop_flat_groups")
    assert plain[0]["frac_reward_zero_std"] > 0 and all(m["groups"] == 6 for m in dropped)
    assert dropped[0]["draws"] > 1 and dropped[0]["frac_reward_zero_std"] > 0  # of all that were sampled
    (tmp_path / "r.py").write_text("def same(completions):\n    return [1.0] * len(completions)\n")
    flat = run(grpo, tmp_path / "c", "--eval_fraction", 0, "--batch_size", 1, "--max_steps", 1, "--max_completion_length", 4,
               "--drop_flat_groups", "--reward_funcs", f"{tmp_path}/r.py:same")
    assert flat[0]["draws"] == grpo.MAX_DRAWS and flat[0]["grad_norm"] == 0  # bounded, and the step goes on


def test_later_draws_of_a_step_sample_anew(monkeypatch, tmp_path):
    """The same prompt drawn twice in a step gets other completions, and no prompt is passed over."""
    data, drawn, rollout = tmp_path / "d.jsonl", [], grpo.rollout
    data.write_text('{"prompt": "1+1=", "answer": "99"}\n{"prompt": "2+1=", "answer": "99"}\n')

    def spy(*a, **k):
        records, logged = rollout(*a, **k)
        drawn.append([(p["prompt"], r["completion_ids"]) for p in a[1] for r in records if a[1][r["prompt"]] is p])
        return records, logged
    monkeypatch.setattr(grpo, "rollout", spy)
    run(grpo, tmp_path / "a", "--dataset_name", data, "--eval_fraction", 0, "--batch_size", 2, "--max_steps", 1, "--drop_flat_groups",
        "--temperature", 1.5, "--max_completion_length", 8)
    assert len(drawn) == grpo.MAX_DRAWS and all({p for p, _ in d} == {"1+1=", "2+1="} for d in drawn)
    assert len({str(sorted(d)) for d in drawn}) == grpo.MAX_DRAWS


# ---- verification at inference --------------------------------------------------------------------------------------------

def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n, correct, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if correct <= n and k <= n:
            subsets = list(itertools.combinations([i < correct for i in range(n)], k))
            assert math.isclose(grpo.pass_at_k(n, correct, k), sum(map(any, subsets)) / len(subsets), abs_tol=1e-12)


def test_votes_by_hand():
    assert grpo.vote(["7", None, "8", "8"]) == "8" and grpo.vote([None, None]) is None
    assert grpo.vote(["7", "8", "8", "7"]) == "7"  # a tie: the earliest
    assert grpo.vote(["7", "8", "8"], [0.6, 0.1, 0.2]) == "7"
    low, high = grpo.interval(0.5, 100)
    assert abs(low - 0.4038) < 1e-4 and abs(high - 0.5962) < 1e-4
    assert grpo.interval(1.0, 20)[0] < 0.9 and grpo.interval(0.0, 20)[1] > 0.1


def test_verification_by_hand():
    """Two prompts, four samples: the right answers are 1 and 2; the reward model likes the third sample."""
    groups, scores = [["1", "3", "1", "3"], [None, "5", "2", "5"]], tensor([[0.0, 0, 5, 0], [9, 1, 3, 1]])
    got = grpo.verify(groups, ["1", "2"], scores)
    assert got["pass@1"] == (2 / 4 + 1 / 4) / 2 and got["pass@4"] == 1 and math.isclose(got["pass@2"], (5 / 6 + 3 / 6) / 2)
    assert got["majority@1"] == 0.5 and got["majority@2"] == 0.5 and got["majority@4"] == 0.5  # 1 by tie; 5
    assert got["best_of@4"] == 0.5 and got["best_of@2"] == 0.5  # no answer has the highest score
    assert got["weighted_vote@4"] == 1  # e^3 > 2 e^1, and None does not vote
    assert {name.split("@")[1] for name in grpo.verify([["1"] * 6], ["1"], None)} == {"1", "2", "4", "6"}


def test_evaluation_alone_leaves_no_model(tmp_path):
    metrics = run(grpo, tmp_path / "out", "--num_train_epochs", 0, "--eval_samples", 4, "--eval_fraction", 0.003)  # whatever max_steps says
    assert [m["step"] for m in metrics] == [0] and sorted(os.listdir(tmp_path / "out")) == ["args.json", "metrics.jsonl", "samples.jsonl"]
    m = metrics[0]
    assert m["eval/pass@1"] <= m["eval/pass@2"] <= m["eval/pass@4"] and m["eval/majority@4/low"] < m["eval/majority@4"] < m["eval/majority@4/high"]
    with pytest.raises(common.UserError, match="nothing to evaluate"):
        run(grpo, tmp_path / "none", "--num_train_epochs", 0, "--eval_fraction", 0)
    metrics = run(grpo, tmp_path / "one", "--num_train_epochs", 0, "--eval_samples", 1, "--eval_fraction", 0.003)
    assert metrics[0]["eval/pass@1"] == metrics[0]["eval/majority@1"]
    (tmp_path / "r.py").write_text("def same(completions):\n    return [1.0] * len(completions)\n")
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1="}\n' * 4 + '{"prompt": "2+1="}\n' * 4)
    with pytest.raises(common.UserError, match="no held-out row has an `answer`"):
        run(grpo, tmp_path / "two", "--dataset_name", tmp_path / "d.jsonl", "--eval_fraction", 0.5, "--eval_samples", 2, "--reward_funcs",
            f"{tmp_path}/r.py:same")


# ---- learning ----------------------------------------------------------------------------------------------------------

def test_the_example_goes_past_its_demonstrations(tmp_path):
    """The README's story on 15 of its steps: from the mistake of the demonstrations to at least 85 % right."""
    metrics = run(grpo, tmp_path / "out", "--max_steps", 15, "--eval_steps", 15)
    first, last = (m["eval/accuracy"] for m in metrics if "eval/accuracy" in m)
    assert first < 0.6 and last > 0.85
    names = sorted(os.listdir(tmp_path / "out"))
    assert names == ["args.json", "checkpoints", "metrics.jsonl", "model", "samples.jsonl"]


def test_a_reward_file_may_hold_a_dataclass_and_reward_models_side_by_side_have_their_own_names(tmp_path, monkeypatch):
    (tmp_path / "r.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Kept:\n    x: int\n"
                                   "def one(completions, **more):\n    return [Kept(1).x] * len(completions)\n")
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--reward_funcs", f"{tmp_path}/r.py:one"])
    assert grpo.load_rewards(args)["one"][0](["a", "b"]) == [1, 1]
    monkeypatch.setattr(common, "load_reward_model", lambda *a: (["score"], None))
    for folder, label in (("kind", "kind_score"), ("safe", "safe_score"), ("rm/model", "rm_score"), ("rm/merged", "rm_score")):
        assert grpo.reward_of_model(str(tmp_path / folder), args, "cpu")[0] == label
