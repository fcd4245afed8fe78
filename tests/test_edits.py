"""tests/edits: each small change of a script applies, runs, and does what its heading claims."""

import importlib.util
import os
import sys
from types import SimpleNamespace

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


def test_dpo_simpo_by_hand(changed):
    """Three tokens of mean -1 against one of -3, sums alike: rewards -2 and -6, a margin of 4, gamma 1, so the loss is
    - log s(3) = 0.0486, and s(-3) = 0.0474 in the gradient is shared by the tokens of a completion."""
    module = changed("dpo-simpo")
    mb = SimpleNamespace(logprobs=tensor([[0.0, -0.5, -1.0, -1.5], [0.0, -3.0, 0.0, 0.0]]).requires_grad_(),
                         mask=tensor([[0.0, 1, 1, 1], [0, 1, 0, 0]]), ref_logprobs=torch.zeros(2, 4),
                         ref_sum=torch.zeros(2, 1), weight=torch.ones(2, 1))
    args = module.Args(dataset_name="any", beta=2.0)
    figures = module.pair_figures(mb, args)
    close(figures["dpo_loss"], tensor([0.0485874]))
    close(figures["rewards/chosen"], tensor([-2.0]))
    close(figures["rewards/rejected"], tensor([-6.0]))
    figures["dpo_loss"].sum().backward()
    close(mb.logprobs.grad * mb.mask, 2 * 0.0474259 * tensor([[0.0, -1 / 3, -1 / 3, -1 / 3], [0, 1, 0, 0]]))
    args.sft_coef = 0.5  # the audit page's shares add up to the loss: 0.0486 + 0.5 x 1
    page = module.pair_shares(mb, args)
    close(page["share"].sum() + page["constants"].sum(), tensor(0.5485874, dtype=torch.float64))
    close(page["constants"], tensor([1.3132617, 0.0], dtype=torch.float64))  # - log s(-1), at a margin of 0


@pytest.mark.parametrize("flags", [[], ["--lora_r", "2"]])
def test_dpo_simpo_makes_no_pass_of_a_reference(flags, changed, tmp_path, monkeypatch):
    module, passes = changed("dpo-simpo"), []
    forward = module.Policy.forward

    def seen(self, input_ids, mask):
        passes.append((torch.is_grad_enabled(), str(input_ids.tolist())))
        return forward(self, input_ids, mask)
    monkeypatch.setattr(module.Policy, "forward", seen)
    steps(module, "dpo-simpo", tmp_path / "out", "--eval_fraction", "0", *flags)
    kinds, read = zip(*passes)
    assert kinds.count(False) == 1  # does the head fit its trunk?
    assert len(set(read)) == len(read) >= 3  # no rows are read twice
