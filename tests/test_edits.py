"""tests/edits: each small change of a script applies, runs, and does what its heading claims."""

import importlib.util
import itertools
import math
import os
import sys

import pytest
import torch
from conftest import ROOT, TINY
from pipelines import edited, heading
from torch import tensor

import common

NAMES = sorted(name.removesuffix(".diff") for name in os.listdir(os.path.join(ROOT, "tests", "edits")))
SHORT = {"sft": ["--max_steps", "2"], "dpo": ["--max_steps", "2"],
         "grpo": ["--max_steps", "2", "--batch_size", "4", "--num_generations", "4"],
         "ppo": ["--max_steps", "2", "--batch_size", "16", "--num_minibatches", "2"]}


@pytest.fixture
def changed(tmp_path):
    """name -> the module of the changed script."""
    def load(name):
        path = edited(name, tmp_path / "changed")
        module = name.replace("-", "_")
        spec = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(spec)  # where dataclasses look for their types
        spec.loader.exec_module(sys.modules[module])
        return sys.modules[module]
    return load


def steps(module, name, folder, *flags):
    """Two steps on the small example with the heading's flags -> the lines of metrics.jsonl, the model."""
    script = name.split("-")[0]
    words = [os.path.join(TINY, f"{script}.json"), "--output_dir", str(folder), *heading(name)["Flags"].split(), *SHORT[script],
             "--eval_fraction", "0.02", *flags]
    module.main(common.parse_args(module.Args, [word.replace("tests/tiny", TINY) for word in words]))


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_applies_runs_and_says_what_it_is(name, changed, tmp_path):
    said = heading(name)
    assert set(said) == {name, "Paper", "Changes", "Flags", "Showed"} and all(said.values())
    with open(os.path.join(ROOT, "tests", "edits", f"{name}.diff"), encoding="utf-8") as file:
        lines = file.read().splitlines()
    assert all(len(line) <= 112 for line in lines)
    more = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert 0 < len(more) <= 80
    assert {line for line in lines if line.startswith("+++")} == {f"+++ b/{name.split('-')[0]}.py"}
    steps(changed(name), name, tmp_path / "out")


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_grpo_cispo_by_hand(changed):
    """Ratios 1.5, 0.5, 1.1 with A = 2 and A = -1, epsilon_high 0.3: weights 1.3, 0.5, 1.1, and all have a gradient."""
    new = tensor([1.5, 0.5, 1.1, 9.0]).log().repeat(2, 1).requires_grad_()
    mask = tensor([[1.0, 1, 1, 0]] * 2)
    loss, _ = changed("grpo-cispo").grpo_loss(new, torch.zeros(2, 4), tensor([[2.0], [-1.0]]), mask, 0.2, 0.3)
    loss.sum().backward()
    close(new.grad, tensor([[-2.6, -1.0, -2.2, 0], [1.3, 0.5, 1.1, 0]]))


def score_function(module, rewards, logits, size):
    """The gradient of grpo_loss at ratio 1, in expectation: over all groups of `size` samples of softmax(logits)."""
    logits, loss = logits.clone().requires_grad_(), 0.0
    for group in itertools.product(range(len(rewards)), repeat=size):
        advantage = module.group_advantages(rewards[list(group)][None])  # (1, size)
        logprobs = logits.log_softmax(-1)[list(group)][:, None]  # rows of one token
        rows, _ = module.grpo_loss(logprobs, logprobs.detach(), advantage.view(-1, 1), torch.ones(size, 1))
        loss = loss + logprobs.sum().exp().detach() * rows.mean()
    loss.backward()
    return logits.grad


def test_grpo_rloo_by_hand(changed):
    """3 against the mean of 1, 2, 2; unscored ones are in no baseline; one alone and equal ones teach nothing."""
    nan, third = math.nan, 1 / 3
    scores = tensor([[3.0, 1, 2, 2], [1, nan, 0, nan], [0, 0, 0, 1], [nan, 5, nan, nan], [0.3, 0.3, 0.3, 0.3], [nan] * 4])
    want = tensor([[4 * third, -4 * third, 0, 0], [1, 0, -1, 0], [-third, -third, -third, 1], *torch.zeros(3, 4).tolist()])
    close(changed("grpo-rloo").group_advantages(scores), want)


@pytest.mark.parametrize("size", [2, 3])
def test_grpo_rloo_estimates_the_gradient_of_the_expected_score_without_bias(changed, size):
    """Exactly, for any size of group; with the mean of the whole group it is (G - 1) / G of it."""
    rewards, logits = tensor([1.0, 0.2, -3.0]), tensor([0.3, -0.5, 0.1])
    exact = logits.clone().requires_grad_()
    (exact.softmax(-1) * rewards).sum().neg().backward()
    close(score_function(changed("grpo-rloo"), rewards, logits, size), exact.grad)
