"""tests/edits: each small change of a script applies, runs, and does what its heading claims."""

import importlib.util
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY
from pipelines import edited, heading
from torch import tensor
from torch.distributions import Categorical
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

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
    more = [line for line in lines if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")]
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


def models(*names):
    return [AutoModelForCausalLM.from_pretrained(os.path.join(TINY, name)) for name in names]


def test_sft_distill_loss_is_the_reverse_kl_of_plain_models(changed, monkeypatch):
    """A token at a time, of a teacher with other sizes and a padded vocabulary: as torch.kl_div of transformers' logits
    makes it, with the same gradient."""
    module = changed("sft-distill")
    monkeypatch.setattr(module.TokenLogprobs, "CHUNK", 1)
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=352, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                           num_attention_heads=2)).eval().requires_grad_(False)
    teacher.lm_head.weight.mul_(20)
    ids, mask = torch.randint(256, (2, 7)), tensor([[0.0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0]])
    student, plain = models("sft", "sft")
    kl, entropy, same = module.Policy(student.train(), module.Policy(teacher))(ids, mask)
    log_p, log_q = (model(ids).logits[:, :-1, :320].log_softmax(-1) for model in (plain, teacher))
    want = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * mask[:, 1:]
    assert want.max() > 1
    close(kl[:, 1:], want, 1e-4)
    close(entropy[:, 1:], Categorical(logits=log_p).entropy() * mask[:, 1:], 1e-4)
    close(same[:, 1:], (log_p.argmax(-1) == log_q.argmax(-1)) * mask[:, 1:])
    assert not kl[:, 0].any()
    weights = torch.rand(2, 7)
    (weights * kl).sum().backward()
    (weights[:, 1:] * want).sum().backward()
    for a, b in zip(student.parameters(), plain.parameters(), strict=True):
        close(a.grad, b.grad, 1e-4)


def sampled(module, model, rows, length, **more):
    run = SimpleNamespace(place=(0, 1), device="cpu", step=0, together=lambda function: [function()],
                          accelerator=SimpleNamespace(autocast=nullcontext))
    args = SimpleNamespace(max_completion_length=length, max_length=512, micro_batch_tokens=4096, seed=0)
    args.__dict__.update(more)
    return module.on_policy(model, rows, args, run)


def test_sft_distill_trains_on_the_students_samples(changed):
    """Where one token has all of the probability they are generate()'s; else each token is as frequent as it is likely.
    Prompts stay, whatever the data's completions are, and the cut changes nothing."""
    module, tokenizer, (model,) = changed("sft-distill"), AutoTokenizer.from_pretrained(TINY + "/sft"), models("sft")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    prompts = [tokenizer.encode(f"<|user|>{a}<|end|><|assistant|>") for a in ("1+2", "345+27", "8+9")]
    rows = [common.make_row(prompt + [65, 66], [0] * len(prompt) + [1, 1]) for prompt in prompts]
    head = model.lm_head.weight.detach()
    model.lm_head.weight = torch.nn.Parameter(0.2 * head)  # not the embedding's, which it was tied to
    first = sampled(module, model, rows[:1] * 4000, 1)
    seen = torch.stack([row["input_ids"][-1] for row in first]).long().bincount(minlength=320) / 4000
    p = model(tensor([prompts[0]])).logits[0, -1].softmax(-1)
    assert p.max() < 0.9 and (seen.cumsum(0) - p.cumsum(0)).abs().max() < 0.03  # Kolmogorov: p-value 0.0015
    model.lm_head.weight = torch.nn.Parameter(head)
    small = sampled(module, model, rows, 60, micro_batch_tokens=1)
    assert all(a["input_ids"].equal(b["input_ids"]) for a, b in zip(small, sampled(module, model, rows, 60)))
    model.lm_head.weight = torch.nn.Parameter(1e5 * head)
    for row, prompt in zip(sampled(module, model, rows, 60), prompts):
        whole = model.generate(tensor([prompt]), do_sample=False, max_new_tokens=60)[0]
        assert row["input_ids"].tolist() == whole.tolist()
        assert row["mask"].tolist() == [0] * len(prompt) + [1] * (len(whole) - len(prompt))
