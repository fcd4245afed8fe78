"""tests/edits: each small change of a script applies, runs, and does what its heading claims."""

import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, tiny_model
from pipelines import edited, heading
from test_grpo import MoveAndRecord
from torch import tensor
from torch.distributions import Categorical
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig,
                          LlamaForCausalLM, TopPLogitsWarper)

import common

NAMES = sorted(name.removesuffix(".diff") for name in os.listdir(os.path.join(ROOT, "tests", "edits")))
SHORT = {"sft": ["--max_steps", "2"], "dpo": ["--max_steps", "2"],
         "grpo": ["--max_steps", "2", "--batch_size", "4", "--num_generations", "4"],
         "ppo": ["--max_steps", "2", "--batch_size", "16", "--num_minibatches", "2"]}


@pytest.fixture
def changed(tmp_path):
    """name -> the module of the changed script, in a folder inside a clone, as effects.py has it."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)

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
    rows = [common.make_row(prompt + [65, 66], [0] * len(prompt) + [1, 1], place="here") for prompt in prompts]
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


@pytest.fixture
def update(monkeypatch, tmp_path):
    """(changed module, flags) -> the gradients of a run's updates, the weights each was taken at, its rollouts."""
    def run(module, *flags):
        kept, rollout = [], module.rollout
        monkeypatch.setattr(module, "rollout", lambda *args, **asked: kept.append(rollout(*args, **asked)) or kept[-1])
        monkeypatch.setattr(module, "make_optimizer", MoveAndRecord)
        words = [os.path.join(TINY, "grpo.json"), "--output_dir", str(tmp_path / "out"), "--eval_fraction", 0,
                 "--max_grad_norm", 0, "--batch_size", 6, "--num_generations", 4, "--max_steps", 1, *flags]
        module.main(common.parse_args(module.Args, list(map(str, words))))
        monkeypatch.setattr(module, "rollout", rollout)
        last = MoveAndRecord.last
        return last.gradients, getattr(last, "weights", []), [groups for groups, _ in kept]
    return run


def start():
    """The model that the example's runs start from."""
    return AutoModelForCausalLM.from_pretrained(os.path.join(TINY, "sft"), dtype=torch.float32)


def surrogate(groups, logprobs_of):
    """DAPO's loss at ratio 1 of a rollout: logprobs_of(row) (C,) of its completion."""
    rows, scores = common.flat(groups), tensor([[row["score"] for row in group] for group in groups])
    advantages = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
    tokens = sum(len(row["completion_ids"]) for row in rows)
    return -sum(a * logprobs_of(row).sum() for a, row in zip(advantages.flatten(), rows)) / tokens


def completion(logits, row):
    """log_softmax at a row's trained tokens: logits (T, V), unpadded -> (C,)."""
    ids, n = row["input_ids"].long(), row["trained"]
    return logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[-n:, 0]


def same_gradient(got, model, loss):
    model.zero_grad()
    loss.backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert want.norm() > 1e-3 and (got - want).norm() / want.norm() < 1e-5


def test_grpo_top_p_by_hand(changed):
    """0.5, 0.3, 0.15, 0.05: 0.75 keeps two, 0.81 three; a target outside is let in; ties with the last stay in."""
    nucleus, p = changed("grpo-top-p").nucleus, tensor([[0.3, 0.05, 0.5, 0.15]])
    close(nucleus(p.log(), 0.75).softmax(-1), tensor([[0.375, 0, 0.625, 0]]))
    close(nucleus(p.log(), 0.81).softmax(-1), tensor([[0.3, 0, 0.5, 0.15]]) / 0.95)
    close(nucleus(p.log(), 0.4).softmax(-1), tensor([[0.0, 0, 1, 0]]))
    close(nucleus(p.log(), 0.75, tensor([3])).softmax(-1), tensor([[0.3, 0, 0.5, 0.15]]) / 0.95)
    close(nucleus(p.log(), 0.75, tensor([2])).softmax(-1), tensor([[0.375, 0, 0.625, 0]]))
    close(nucleus(tensor([[0.4, 0.2, 0.2, 0.2]]).log(), 0.5).softmax(-1), tensor([[0.4, 0.2, 0.2, 0.2]]))
    assert nucleus(p.log(), 1.0).equal(p.log())


@pytest.mark.parametrize("cap, chunk", [(None, 10**9), (None, 1), (3.0, 10**9), (3.0, 150)])
def test_grpo_top_p_has_the_gradient_of_a_fixed_nucleus(changed, monkeypatch, cap, chunk):
    """Against autograd through plain torch, to hidden states, weight and bias, with targets in and out of the nucleus."""
    logprobs = changed("grpo-top-p").TokenLogprobs
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    torch.manual_seed(0)
    given = [torch.randn(9, 5).requires_grad_(), torch.randn(30, 5).requires_grad_(), torch.randn(30).requires_grad_()]
    targets, upstream = torch.randint(30, (9,)), torch.randn(9)
    found, entropy, _ = logprobs.apply(*given, targets, cap, 0.8)
    got = torch.autograd.grad((found * upstream).sum(), given)
    hidden, weight, bias = (x.detach().double().requires_grad_() for x in given)
    z = hidden @ weight.T + bias
    z, want, spread, outside = z if cap is None else cap * (z / cap).tanh(), [], [], 0
    for row, y in zip(z, targets.tolist()):
        inside, p = [], row.softmax(-1).tolist()
        while sum(p[i] for i in inside) < 0.8 or y not in inside:
            outside += y not in inside and sum(p[i] for i in inside) >= 0.8
            inside.append(max(set(range(30)) - set(inside), key=p.__getitem__))
        log_q = row[inside].log_softmax(-1)
        want.append(log_q[inside.index(y)])
        spread.append(-(log_q.exp() * log_q).sum())
    assert 0 < outside, "no target is outside"
    want, spread = torch.stack(want), torch.stack(spread)
    close(found.double(), want, 1e-5)
    close(entropy.double(), spread, 1e-5)
    for a, b in zip(got, torch.autograd.grad((want * upstream).sum(), (hidden, weight, bias))):
        close(a.double(), b, 1e-5)


def test_grpo_top_p_samples_what_it_scores(changed):
    """4,000 first tokens against transformers' own top-p, by chi-square; the log-probs of sampler, trainer and that."""
    module, model, n, prompt = changed("grpo-top-p"), tiny_model("llama").eval(), 4000, [65, 66, 67]
    uniforms = torch.rand(n, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        ids, logprobs, lengths = module.sample(model, [prompt], uniforms, 6, 1.7, [260], n, 0.6)
        p = TopPLogitsWarper(0.6)(None, model(tensor([prompt])).logits[:, -1] / 1.7)[0].softmax(-1)
        counts, inside = torch.bincount(ids[:, 0], minlength=320), p > 0
        assert counts[~inside].sum() == 0 and 20 < inside.sum() < 200
        expected = n * p[inside]
        chi, degrees = ((counts[inside] - expected) ** 2 / expected).sum(), inside.sum() - 1
        assert abs(chi - degrees) < 4 * (2 * degrees) ** 0.5
        few, length = slice(0, 200), lengths[:200]
        rows = torch.cat([tensor([prompt]).expand(200, -1), ids[few]], 1)
        mask = torch.cat([torch.zeros(200, 3), (torch.arange(6) < length[:, None]).float()], 1)
        trained, entropy, _ = module.Policy(model)(rows, mask, 1.7, 0.6)
        close(trained[:, 3:], logprobs[few] * mask[:, 3:], 1e-5)
        cut = TopPLogitsWarper(0.6)(None, (model(rows).logits / 1.7)[:, :-1].reshape(-1, 320)).log_softmax(-1)
        want = cut.view(200, -1, 320).gather(-1, rows[:, 1:, None])[:, :, 0]
        close(trained[:, 1:], torch.where(mask[:, 1:].bool(), want, 0.0), 1e-5)


def test_grpo_top_p_trains_on_the_truncated_log_probs(changed, update):
    """A step's gradient is that of plain transformers' logits, cut by transformers' own top-p."""
    model = start()
    (got,), _, (groups,) = update(changed("grpo-top-p"), "--top_p", 0.8)

    def logprobs(row):
        z = model(row["input_ids"].long()[None]).logits[0].float()
        found = completion(TopPLogitsWarper(0.8)(None, z), row)
        close(row["sampled_logprobs"][-len(found):], found.detach(), 1e-5)
        return found
    same_gradient(got, model, surrogate(groups, logprobs))


def test_grpo_top_p_cuts_old_and_reference_log_probs_too(changed, update, tmp_path):
    """In a first update the ratio is 1 and the KL 0: --kl_coef and --num_iterations have log-probs of the same nuclei."""
    update(changed("grpo-top-p"), "--top_p", 0.8, "--num_iterations", 2, "--kl_coef", 0.1, "--max_steps", 2,
           "--learning_rate", 1, "--temperature", 1.5)
    with open(tmp_path / "out" / "metrics.jsonl", encoding="utf-8") as lines:
        first, second = map(json.loads, lines)
    assert max(first["ratio/deviation"], first["kl"], first["sampling/logprob_difference"]) < 1e-5
    assert second["ratio/deviation"] > 1e-4 < second["kl"]


def test_grpo_preference_term_by_hand(changed):
    """Log-ratios 2 and -1, 0 and 0 in two pairs: - log s(0.1 x 3) = 0.5544 and ln 2; gradients 0.1 (s - 1) = -0.0426, -0.05."""
    logprobs = tensor([[-1.0, -2], [-3, 0], [-4, -1], [0, -5]]).requires_grad_()  # chosen, chosen, rejected, rejected
    ref_sum = tensor([[-5.0], [-3], [-4], [-5]])
    loss = changed("grpo-preference-term").dpo_loss(logprobs, ref_sum, 0.1)
    close(loss, tensor([0.554355, math.log(2)]), 1e-5)
    loss.sum().backward()
    close(logprobs.grad[:, 0], tensor([-0.042556, -0.05, 0.042556, 0.05]), 1e-5)


def test_grpo_preference_term_adds_its_gradient_in_any_cut(changed, update, tmp_path):
    """Two updates, the second away from the reference: the surrogate's gradient, and dpo_coef times plain DPO's over pairs
    of other lengths; with micro-batches of one pair too. On the audit page the shares add up, or it is not written."""
    module, file = changed("grpo-preference-term"), str(tmp_path / "pairs.jsonl")
    with open(os.path.join(TINY, "preferences.jsonl")) as rows, open(file, "w") as out:
        out.writelines(itertools.islice(rows, 5))
    flags = ["--preference_dataset", file, "--dpo_coef", 0.5, "--dpo_beta", 0.3, "--learning_rate", 0.02, "--max_steps", 2,
             "--lr_scheduler_type", "constant"]
    gradients, weights, rollouts = update(module, *flags)
    one_by_one, _, _ = update(module, *flags, "--micro_batch_tokens", 1)
    args = common.parse_args(module.Args, [os.path.join(TINY, "grpo.json"), *map(str, flags)])
    pairs = module.load_pairs(args, common.load_tokenizer(args), [])
    assert len(pairs) == 5

    def log_ratio(model, row):
        with torch.no_grad():
            fixed = completion(reference(row["input_ids"].long()[None]).logits[0], row).sum()
        return completion(model(row["input_ids"].long()[None]).logits[0], row).sum() - fixed
    model, reference = start(), start()
    for number, (got, at, groups) in enumerate(zip(gradients, weights, rollouts, strict=True)):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), at, strict=True):
                parameter.copy_(value)
        margins = torch.stack([log_ratio(model, chosen) - log_ratio(model, rejected) for chosen, rejected in pairs])
        assert (margins.abs().max() > 0.05) == number
        dpo = (1 + (-0.3 * margins).exp()).log().mean()
        loss = surrogate(groups, lambda row: completion(model(row["input_ids"].long()[None]).logits[0], row))
        same_gradient(got, model, loss + 0.5 * dpo)
        if number == 0:  # a second rollout's tokens may differ by rounding
            assert (one_by_one[0] - got).norm() <= 1e-6 * got.norm()
    update(module, *flags, "--audit", str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").exists()


def test_grpo_environment_writes_what_is_not_trained_and_each_token_keeps_its_random_number(changed, tmp_path):
    """A calculator that adds 1 too many: its digits follow every sum, with mask 0 and no log-prob; all other tokens are where
    u_t falls in what plain transformers makes of the whole row, replies included."""
    module, kept = changed("grpo-environment"), []
    calculator, rollout = module.environment, module.rollout
    assert [calculator(text, {}) for text in ("<think>7+8+1=", "<think>7+8+1", "x=", "5+5=10 2+30=")] == ["16", None, None, "32"]
    module.environment = lambda text, prompt: str(int(calculator(text, prompt)) + 1) if calculator(text, prompt) else None
    module.rollout = lambda *a, **k: kept.append(rollout(*a, **k)) or kept[-1]
    steps(module, "grpo-environment", tmp_path / "out", "--max_steps", "1", "--eval_on_start", "False")
    model, seen = AutoModelForCausalLM.from_pretrained(os.path.join(TINY, "sft")), 0
    for row in common.flat(kept[0][0]):
        ids, start = row["input_ids"].long()[None], len(row["prompt"]["prompt_ids"])
        told = [place for found in re.finditer(r"(?<![\d+])(\d+(?:\+\d+)+)=(\d+)", row["text"])
                for place in range(*found.span(2)) if int(found[2]) == sum(map(int, found[1].split("+"))) + 1]
        mask = row["mask"][start:]
        assert [t for t in range(len(mask)) if not mask[t]] == told and not row["mask"][:start].any()
        seen += len(told)
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[0, start - 1:-1]  # (C, V)
        u = torch.rand(96, generator=common.stream(0, "sample", 0, row["number"]), dtype=torch.float64)[:len(mask)]
        ends, ours = logprobs.double().exp().cumsum(-1), ids[0, start:]
        below = torch.where(ours > 0, ends.gather(-1, (ours - 1).clamp(min=0)[:, None])[:, 0], 0.0)
        inside = (below - 1e-5 <= u) & (u <= ends.gather(-1, ours[:, None])[:, 0] + 1e-5)
        assert inside[mask.bool()].all()
        close(row["sampled_logprobs"][start:], logprobs.gather(-1, ours[:, None])[:, 0] * mask, 1e-4)
    assert seen > 40


def test_grpo_environment_keeps_to_turns_and_room(changed, tmp_path):
    """Two turns hold one reply. <think>d+d+d= has 13 tokens: of 16 a reply of 2 leaves one more token, a reply of 3 none."""
    module = changed("grpo-environment")
    model = AutoModelForCausalLM.from_pretrained(os.path.join(TINY, "sft"))
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(TINY, "sft"))
    prompts = [{"prompt_ids": tokenizer(f"<|user|>{problem}<|end|><|assistant|>")["input_ids"]} for problem in ("12+34", "5+4")]

    def texts(reply, C, turns=9):
        module.environment, module.MAX_TURNS = lambda text, prompt: reply if text.endswith("=") else None, turns
        out = module.take_turns(model, prompts, None, SimpleNamespace(max_completion_length=C, temperature=1.0), tokenizer,
                                [tokenizer.eos_token_id], 1)
        assert all(len(ids) == len(mask) == len(logprobs) <= C for ids, mask, logprobs in out)
        return [tokenizer.decode(ids) for ids, *_ in out]
    assert texts("77", 16) == ["<think>2+4+0=77 ", "<think>5+4+0=77 "]
    assert texts("777", 16) == ["<think>2+4+0=", "<think>5+4+0="]
    assert [text[:16] + text[-1] + str(text.count("=")) for text in texts("77", 96, turns=2)] == [
        "<think>2+4+0=77 =2", "<think>5+4+0=77 =2"]


def test_ppo_joint_reward_pairs_by_hand(changed):
    """Scores 1, 0, 2 of which the first is right: margins 1 and -1. What is not checked is in no pair; equals are none."""
    module = changed("ppo-joint-reward")
    scores = tensor([1.0, 0, 2, 9]).requires_grad_()
    loss, accuracy = module.pairs_loss(scores, tensor([1.0, 0, 0, math.nan]))
    loss.backward()
    close(torch.stack([loss, accuracy]), tensor([0.8133, 0.5]), 1e-4)
    close(scores.grad, tensor([-0.5, 0.1345, 0.3655, 0]), 1e-4)  # s(-1) / 2 = 0.1345, s(1) / 2 = 0.3655
    loss, accuracy = module.pairs_loss(scores, torch.ones(4))
    assert (loss, accuracy) == (0, 0)


def test_ppo_joint_reward_steps_on_what_it_paid_and_goes_on(changed, tmp_path):
    """The scores paid are those of a plain transformers reward model of these weights; the step, here of SGD, is the gradient
    of its loss over all pairs in one batch, however it was cut; and a run that is resumed makes the same second step."""
    module, seen = changed("ppo-joint-reward"), []
    make_value, judge_step = module.make_value, module.judge_step

    def random_head(*args):
        owner, trunk, head = make_value(*args)
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
        return owner, trunk, head

    def watched(judge, optimizer, rows, run):
        config = AutoConfig.from_pretrained(os.path.join(TINY, "sft"), num_labels=1)
        plain = AutoModelForSequenceClassification.from_config(config)
        plain.model.load_state_dict(judge.trunk.state_dict())
        plain.score.load_state_dict(judge.head.state_dict())
        ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"].long() for row in rows], True, config.pad_token_id)
        scores = plain(ids, attention_mask=(ids != config.pad_token_id).long()).logits[:, 0]
        close(tensor([row["score"] for row in rows]), scores.detach(), 1e-4)
        right = [common.is_right(row["text"], row["truncated"], row["prompt"]["columns"]["answer"]) for row in rows]
        pairs = [scores[i] - scores[j] for i in range(len(rows)) for j in range(len(rows)) if right[i] and not right[j]]
        torch.nn.functional.softplus(-torch.stack(pairs)).mean().backward()
        before = [p.detach().clone() for p in judge.parameters()]
        metrics = judge_step(judge, torch.optim.SGD(judge.parameters(), lr=1.0), rows, run)
        for p, old, theirs in zip(judge.parameters(), before, [*plain.model.parameters(), plain.score.weight]):
            close(old - p.detach(), theirs.grad, 1e-4)
        with torch.no_grad():
            for p, old in zip(judge.parameters(), before):
                p.copy_(old)
        seen.append(judge_step(judge, optimizer, rows, run))
        assert metrics == seen[-1] and len(pairs) > 9
        return metrics
    module.make_value, module.judge_step = random_head, watched
    flags = ["--max_steps", "8", "--save_steps", "4", "--lr_scheduler_type", "constant", "--micro_batch_tokens", "300"]
    steps(module, "ppo-joint-reward", tmp_path / "out", *flags)
    module.judge_step = lambda *args: seen.append(judge_step(*args)) or seen[-1]
    steps(module, "ppo-joint-reward", tmp_path / "on", *flags, "--resume_from_checkpoint",
          str(tmp_path / "out" / "checkpoints" / "step-00000004"))
    assert len(seen) == 3 and seen[1] == seen[2] != seen[0]


def test_ppo_value_search_by_hand(changed, monkeypatch):
    """Two beams, four continuations, tokens 1, 2, 3 and 9, which ends. First 2 and 9 are kept (0.9, 0.7), so 19, worth 0.99,
    is never seen. Where 29 is worth 0.8 it is found; where 0.6, 9 is better; at most 2 tokens: 22 is cut, and the best."""
    module, asked = changed("ppo-value-search"), []
    monkeypatch.setattr(module, "SAMPLES", 4)
    monkeypatch.setattr(module, "SEGMENT", 1)

    def search(C, **values):
        def sample(model, contexts, uniforms, length, temperature, stop_ids):
            assert length == 1 and uniforms.shape == (4, 1)
            asked.append(contexts)
            return tensor([[1], [2], [3], [9]]), torch.zeros(4, 1), torch.ones(4, dtype=torch.long)
        worth = {"1": 0.5, "2": 0.9, "9": 0.7, "19": 0.99} | values
        module.sample = sample
        module.values_at_end = lambda policy, rows, stop_ids, run: [worth.get("".join(map(str, ids[1:])), 0.1) for ids in rows]
        model = SimpleNamespace(eval=int, train=int, generation_config=SimpleNamespace(eos_token_id=[9]))
        run = SimpleNamespace(step=0, device="cpu", accelerator=SimpleNamespace(autocast=nullcontext))
        args = SimpleNamespace(max_completion_length=C, rollout_batch_size=4, temperature=1.0, seed=0)
        return module.value_search(model, None, [{"prompt_ids": [0]}], args, run)
    assert search(9, **{"29": 0.8}) == [[2, 9]]
    assert asked[:2] == [[[0]] * 4, [[0, 2]] * 4]
    assert search(9, **{"29": 0.6}) == [[9]]
    assert search(2, **{"22": 0.8}) == [[2, 2]]
    asked.clear()
    search(2, **{"3": 0.8})
    assert asked[1] == [[0, 2], [0, 3], [0, 2], [0, 3]]  # two open beams share the continuations


def test_ppo_value_search_asks_the_value_that_is_saved(changed, tmp_path):
    """What plain transformers reads from value/ at a row's last token before its end is what the search and the votes went by."""
    module, seen = changed("ppo-value-search"), []
    values_at_end = module.values_at_end

    def watched(policy, rows, stop_ids, run):
        seen.append((rows, values_at_end(policy, rows, stop_ids, run)))
        return seen[-1][1]
    module.values_at_end = watched
    steps(module, "ppo-value-search", tmp_path, "--max_steps", "4", "--eval_on_start", "False")
    value = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "value"))
    end, ended = AutoTokenizer.from_pretrained(str(tmp_path / "value")).eos_token_id, set()
    for rows, values in (seen[0], seen[3], seen[-1]):
        for ids, ours in list(zip(rows, values))[:8]:
            ended.add(ids[-1] == end)
            with torch.no_grad():
                close(tensor(ours), value(tensor([ids[:-1] if ids[-1] == end else ids])).logits[0, 0], 1e-4)
    assert ended == {True, False} and len({value for _, values in seen for value in values}) > 20
