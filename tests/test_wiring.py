"""What main hands on, in all five scripts: clipping, the learning rate, AdamW, the order of the rows."""

import json
import os
from itertools import islice

import pytest
import torch
from conftest import TINY, RecordGradients, run

import common
import dpo
import grpo
import ppo
import reward_model
import sft

SCRIPTS = [sft, dpo, reward_model, ppo, grpo]
FIRST = ["--eval_fraction", 0, "--max_steps", 1, "--model_name_or_path", os.path.join(TINY, "sft")]


@pytest.fixture
def few(request, tmp_path):
    """The first 60 rows of what the test's script trains on."""
    script = request.node.callspec.params["script"] if hasattr(request.node, "callspec") else sft
    name = "preferences.jsonl" if script in (dpo, reward_model) else "addition.jsonl"
    with open(os.path.join(TINY, name)) as whole:
        (tmp_path / name).write_text("".join(islice(whole, 60)))
    return ["--dataset_name", tmp_path / name]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_gradient_is_clipped_and_the_rate_is_that_of_the_step(script, few, tmp_path, monkeypatch):
    """--max_grad_norm scales what the optimizer sees, and 0 leaves it; the metric is the norm before."""
    monkeypatch.setattr(script, "make_optimizer", RecordGradients)
    seen = []
    for limit in (0, 1e-3):
        flags = [*FIRST, *few, "--batch_size", 4, "--max_grad_norm", limit, "--learning_rate", 0.02,
                 "--lr_scheduler_type", "constant", "--warmup_steps", 3]
        step = next(m for m in run(script, tmp_path / str(limit), *flags) if "loss" in m)
        seen.append(RecordGradients.last.gradients[0])
        assert step["grad_norm"] == pytest.approx(seen[0].norm().item(), rel=1e-4) and step["grad_norm"] > 0.01
        assert RecordGradients.last.rates[0] == step["learning_rate"] == pytest.approx(0.02 / 4)
    assert seen[1].norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert (seen[1] / seen[1].norm() - seen[0] / seen[0].norm()).norm() < 1e-3, "scaled, and not turned"


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])  # so small a tensor has moments of 32 bits
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_optimizer_is_adamw_by_its_formula(script, optim):
    """Three steps by hand (Loshchilov 2019, arXiv 1711.05101, algorithm 2), betas 0.9 and 0.999, epsilon 1e-8;
    some gradients are so small that epsilon counts. Biases do not decay, frozen weights stay."""
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    file = os.path.join(TINY, f"{script.__name__}.json")
    args = common.parse_args(script.Args, [file, "--learning_rate", "0.01", "--weight_decay", "0.5", "--optim", optim])
    torch.manual_seed(0)
    module, frozen = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3).requires_grad_(False)
    both = torch.nn.ModuleList([module, frozen])
    start = {name: p.detach().clone() for name, p in both.named_parameters()}
    optimizer, moments = script.make_optimizer(both, args), {}
    for step in range(1, 4):
        for name, p in module.named_parameters():
            p.grad = torch.randn(p.shape) * 10.0 ** torch.randint(-8, 1, p.shape)
            m, v = moments.get(name, (0, 0))
            m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad.square()
            update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            decay = 0.5 * 0.01 if p.ndim == 2 else 0
            moments[name], start[f"0.{name}"] = (m, v), (1 - decay) * start[f"0.{name}"] - 0.01 * update
        optimizer.step()
    for name, p in both.named_parameters():
        torch.testing.assert_close(p.detach(), start[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_step_that_is_not_finite_names_its_rows(script, few, tmp_path, monkeypatch):
    """By file and line, at most eight of them, each once."""
    check = common.Run.check_finite
    monkeypatch.setattr(common.Run, "check_finite", lambda self, loss, *rest: check(self, float("nan"), *rest))
    for batch, places in ((2, r"\S+\.jsonl:\d+, \S+\.jsonl:\d+; this update"), (9, r"(\S+\.jsonl:\d+, ){8}\.\.\.; this update")):
        with pytest.raises(common.UserError, match=rf"the loss is nan and its gradient's norm [\d.]+, on {places} was not made"):
            run(script, tmp_path / str(batch), *FIRST, *few, "--batch_size", batch)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_seed_decides_the_order_of_the_rows(script, few, tmp_path, monkeypatch):
    """Each order is seen where a script draws its batch, from all rows."""
    drawn, shuffled = [], script.common.shuffled

    def spy(rows, number, size, seed):
        drawn.append(shuffled(rows, number, size, seed))
        return drawn[-1]
    monkeypatch.setattr(script.common, "shuffled", spy)
    for seed in (0, 1, 1):
        run(script, tmp_path / f"{seed}-{len(drawn)}", *FIRST, *few, "--batch_size", 4, "--seed", seed)
    batches = drawn[::len(drawn) // 3]  # dpo draws a batch twice: for the reference, and to train on it
    one, two, again = (json.dumps([row if isinstance(row, int) else (row[0] if isinstance(row, list) else row)["place"] for row in batch])
                       for batch in batches)
    assert one != two == again


def test_prompts_are_trained_on_where_that_is_asked_for(few, tmp_path):
    """All but each row's first token, which nothing predicts."""
    flags = [*FIRST, *few, "--batch_size", 4]
    alone, whole = (run(sft, tmp_path / f"{only}", *flags, "--completion_only_loss", only)[0] for only in (True, False))
    assert whole["trained_tokens"] == whole["num_tokens"] - 4 and alone["num_tokens"] == whole["num_tokens"]
    assert alone["trained_tokens"] < whole["trained_tokens"] - 4 * 4


@pytest.mark.parametrize("script", [ppo, grpo], ids=lambda script: script.__name__)
def test_every_pass_over_a_rollout_cuts_it_anew(script, few, tmp_path, monkeypatch):
    """Three passes of two minibatches, two rollouts: each pass has every row once, and no two the same halves."""
    halves, micro_batches = [], script.common.Run.micro_batches

    def spy(self, groups, fields=(), module=None, micro_batch_tokens=None):
        if module is not None:
            halves.append(frozenset(row["number"] for row in groups))
        return micro_batches(self, groups, fields, module, micro_batch_tokens)
    monkeypatch.setattr(script.common.Run, "micro_batches", spy)
    run(script, tmp_path / "out", *FIRST, *few, "--batch_size", 8, "--num_generations", 2, "--max_completion_length", 8,
        "--num_iterations", 3, "--num_minibatches", 2, "--max_steps", 12)
    passes = [frozenset(halves[i:i + 2]) for i in range(0, len(halves), 2)]
    assert len(set(passes)) == len(passes) == 6
    assert all(len(half) == 8 for half in halves) and all(len(frozenset.union(*both)) == 16 for both in passes)
