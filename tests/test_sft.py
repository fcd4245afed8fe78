"""sft.py: the loss by hand and against plain transformers, one step cut in every way, data, evaluation, learning."""

import importlib
import json
import math
import os
import re
import shutil

import pytest
import torch
from conftest import CHANGED, TINY, RecordGradients, load_by_card, run, tiny_model
from peft import LoraConfig, get_peft_model
from torch import tensor

import common
import sft


def new_run(folder, *flags):
    """A common.Run as main makes it."""
    args = [os.path.join(TINY, "sft.json"), "--output_dir", folder, *flags]
    return common.Run(common.parse_args(sft.Args, list(map(str, args))), best_loss=math.inf, eval_losses=[])


def test_sft_loss_by_hand():
    logprobs = tensor([[0.0, -0.5, -1.0, -2.0]], requires_grad=True)
    loss = sft.sft_loss(logprobs, tensor([[0, 1, 0, 1]]))
    assert loss.tolist() == [[0.0, 0.5, 0.0, 2.0]]
    loss.sum().backward()
    assert logprobs.grad.tolist() == [[0, -1, 0, -1]]


def test_a_masked_infinity_gives_neither_loss_nor_gradient():
    logprobs = tensor([[-0.5, -math.inf]], requires_grad=True)
    sft.sft_loss(logprobs, tensor([[1, 0]])).sum().backward()
    assert logprobs.grad.tolist() == [[-1, 0]]


# ---- log-probs ---------------------------------------------------------------------------------------------------------

@pytest.mark.promise("formulas")
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "phi", *CHANGED])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_equals_plain_transformers_row_by_row(kind, temperature):
    """Values and gradients of a padded batch against log_softmax + gather on each row alone."""
    model, g = tiny_model(kind), torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 320, (n,), generator=g) for n in (5, 17, 9)]
    masks = [torch.randint(0, 2, (n,), generator=g).index_fill(0, tensor([0]), 0) for n in (5, 17, 9)]
    policy = sft.Policy(model)
    logprobs, entropy, hits = policy(common.pad(rows, 0), common.pad(masks, 0), temperature)
    assert logprobs[:, 0].eq(0).all() and entropy[:, 0].eq(0).all() and hits[:, 0].eq(0).all()
    (logprobs * (torch.arange(17) - 1)).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = 0.0
    for i, (ids, mask) in enumerate(zip(rows, masks)):
        lp = (model(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
        own = lp.gather(-1, ids[1:, None]).squeeze(-1) * mask[1:]
        n = len(own)
        torch.testing.assert_close(logprobs[i, 1:n + 1], own, rtol=1e-5, atol=1e-5)
        assert logprobs[i, n + 1:].eq(0).all() and logprobs[i, :n + 1][mask == 0].eq(0).all()
        torch.testing.assert_close(entropy[i, 1:n + 1], -(lp.exp() * lp).sum(-1) * mask[1:], rtol=1e-5, atol=1e-5)
        assert torch.equal(hits[i, 1:n + 1], (lp.argmax(-1) == ids[1:]) * mask[1:].float())
        total = total + (own * torch.arange(n)).sum()
    total.backward()
    for a, p in zip(got, model.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-4 * p.grad.abs().max().item())


def test_where_all_tokens_tie_one_of_them_is_the_likeliest():
    """A head that has collapsed to zeros has every token as likely: none but the first is a hit, and not all."""
    for target, hit in ((0, 1.0), (7, 0.0)):
        logprobs, _, hits = sft.TokenLogprobs.apply(torch.zeros(3, 8), torch.zeros(20, 8), None, torch.full((3,), target), None)
        assert hits.tolist() == [hit] * 3 and logprobs.tolist() == pytest.approx([-math.log(20)] * 3)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_chunks_change_nothing(monkeypatch, cap):
    h, w, b = torch.randn(10, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True), torch.randn(20, requires_grad=True)
    y, outputs = torch.randint(0, 20, (10,)), []
    for chunk, rows in ((2**25, [10]), (60, [3, 3, 2, 2]), (20, [1] * 10)):  # 200 logits in all
        monkeypatch.setattr(sft.TokenLogprobs, "CHUNK", chunk)
        values = sft.TokenLogprobs.apply(h, w, b, y, cap)
        assert [len(c) for c in values[0].grad_fn.chunks] == rows
        outputs.append([*values, *torch.autograd.grad(values[0], [h, w, b], torch.arange(10.0))])
    for whole, *cut in zip(*outputs):
        for part in cut:
            torch.testing.assert_close(whole, part, rtol=1e-5, atol=1e-5)
    values = sft.TokenLogprobs.apply(h, w, b, y, cap)
    values[0].sum().backward(retain_graph=True)
    if cap is None:  # the kept chunk is used up: no second backward
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            values[0].sum().backward()


def test_log_probs_over_a_large_vocabulary_are_good_to_six_digits():
    """softmax and log_softmax themselves are off by 3e-5 here."""
    h, w = torch.randn(4, 8), torch.randn(150_000, 8) * 2
    y = torch.randint(0, 150_000, (4,))
    want = (h.double() @ w.double().T).log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    assert (sft.TokenLogprobs.apply(h, w, None, y, None)[0] - want).abs().max() < 5e-6


def test_an_empty_batch_touches_every_parameter():
    model = tiny_model("llama")
    sft.Policy(model)(tensor([[1, 2, 3]]), torch.zeros(1, 3))[0].sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "phi", *CHANGED])
def test_scale_and_cap_are_found_whatever_a_config_calls_them(kind):
    """Of a model alone and under LoRA; and models that do something else to their logits are refused."""
    model = tiny_model(kind)
    scale, cap = CHANGED.get(kind, (None, (1.0, None)))[1]
    found = common.after_head(model)
    assert found == (pytest.approx(scale, rel=1e-6), cap and pytest.approx(cap, rel=1e-6))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "q_b_proj"], task_type="CAUSAL_LM"))
    assert common.after_head(adapted) == found  # which the model remembers
    del model.after_head
    assert common.after_head(adapted) == found


def test_weights_that_the_config_has_no_place_for_are_said(tmp_path, capsys):
    """A config without the biases of its file: another model than was trained before."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "m", state_dict=model.state_dict() | {"model.layers.1.self_attn.q_proj.bias": torch.ones(64)})
    args = new_run(tmp_path / "out").args
    for folder, said in ((tmp_path / "m", True), (os.path.join(TINY, "sft"), False)):
        common.load_base(str(folder), args)
        assert ("has no place for model.layers.1.self_attn.q_proj.bias" in capsys.readouterr().out) == said


@pytest.mark.parametrize("script", ["sft", "dpo", "ppo", "grpo"])
def test_a_model_that_looks_ahead_is_refused(tmp_path, script):
    """Encoders and embedding models load as language models; each token's loss would be seen in the token itself."""
    script, model = importlib.import_module(script), tiny_model("llama")
    policy, row, run = script.Policy(model), {"input_ids": tensor([7, 8, 9])}, new_run(tmp_path)
    script.check_head(policy, model, row, run)
    model.config.is_causal = False
    with pytest.raises(common.UserError, match="models of type llama .* look ahead: log-probs differ by"):
        script.check_head(policy, model, row, run)


@pytest.mark.parametrize("rate", ["1e400", "NaN", "-1", str(10**400), "1"])
def test_a_dropout_rate_that_is_none_is_refused(tmp_path, rate):
    """torch would stop in the first step, or zero everything."""
    shutil.copytree(os.path.join(TINY, "sft"), tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', f'"attention_dropout": {rate}'))
    with pytest.raises(common.UserError, match="m: its config has a dropout rate of"):
        run(sft, tmp_path / "out", "--model_name_or_path", tmp_path / "m", "--max_steps", 1)


def test_a_model_that_does_something_else_to_its_logits_is_refused(tmp_path):
    model = tiny_model("llama")
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(x).sin()
    with pytest.raises(common.UserError, match="llama do more to their logits than scale and cap them"):
        sft.check_head(sft.Policy(model), model, {"input_ids": torch.arange(20)}, new_run(tmp_path))
    with pytest.raises(common.UserError, match="llama do more to their logits"):  # a prompt of one token is enough
        sft.check_head(sft.Policy(model), model, {"input_ids": torch.tensor([7])}, new_run(tmp_path))
    model.lm_head.forward = head
    sft.check_head(sft.Policy(model), model, {"input_ids": torch.tensor([7])}, new_run(tmp_path))


# ---- perturbed embeddings ----------------------------------------------------------------------------------------------

def test_fgm_by_hand():
    """The docstring's row with a padded position that would count; a row without a gradient is left alone."""
    grad = tensor([[[0.0, 3], [4, 0], [7, 7]], [[0, 0], [0, 0], [0, 0]]])
    embeddings, mask = tensor([[3.0, 4], [0, 1], [9, 9]]).repeat(2, 1, 1), tensor([[1, 1, 0], [1, 1, 1]])
    delta = sft.fgm_delta(grad, embeddings, mask, 0.5)
    torch.testing.assert_close(delta, tensor([[[0, 0.9], [1.2, 0], [0, 0]], [[0.0, 0], [0, 0], [0, 0]]]))
    torch.testing.assert_close(sft.fgm_delta(grad * 1e-20, embeddings, mask, 0.5), delta)


def test_neftune_by_hand():
    noise = tensor([[[0.1, -1], [0.4, 0.2]], [[0.1, -1], [0.4, 0.2]]])
    torch.testing.assert_close(sft.neftune_delta(noise, tensor([[1, 1], [1, 0]]), 5.0),
                               tensor([[[0.25, -2.5], [1, 0.5]], [[0.5 / 2**0.5, -5 / 2**0.5], [0, 0]]]))


def rows_of(*lengths):
    g = torch.Generator().manual_seed(0)
    return [common.make_row(torch.randint(0, 320, (n,), generator=g).tolist(), [1] * n) for n in lengths]


def micro_batch(rows):
    mb = common.pad_rows(rows, (), "cpu")
    mb.rows, mb.places = rows, range(len(rows))
    return mb


def test_neftune_noise_belongs_to_the_row_and_shrinks_with_its_length():
    args = type("A", (), {"adversarial": "neftune", "neftune_noise_alpha": 5.0, "seed": 0})
    model, rows = tiny_model("llama"), rows_of(4, 64)
    noise, mask = sft.starting_delta(model, micro_batch(rows), args, 7), sft.real_tokens(micro_batch(rows))
    assert noise.shape == (2, 64, 64) and mask.sum(-1).tolist() == [4, 64] and noise[0, 4:].eq(0).all()
    for row, n in ((noise[0, :4], 4), (noise[1], 64)):
        bound = 5 / (n * 64)**0.5
        assert 0.97 * bound < row.max() <= bound and -bound <= row.min() < -0.97 * bound and row.mean().abs() < 0.1 * bound
        assert row.norm() == pytest.approx(5 / 3**0.5, rel=0.05)
    alone = sft.starting_delta(model, micro_batch(rows[:1]), args, 7)
    other = sft.starting_delta(model, micro_batch(rows[:1]), args, 8)
    assert alone[0].equal(noise[0, :4]) and not other.equal(alone)


@pytest.mark.parametrize("attack", ["fgm", "neftune"])
def test_a_process_without_rows_adds_nothing_under_attack(attack, tmp_path):
    """Its tensors are of a row without real tokens: neither NaN nor noise, but the same passes as elsewhere."""
    run, model = new_run(tmp_path, "--adversarial", attack), tiny_model("llama")
    run.place = 1, 2  # one row for two processes: the second has none
    mb, = run.micro_batches(rows_of(5))
    assert mb.rows == [] and mb.last
    delta = sft.starting_delta(model, mb, run.args, 0)
    assert delta.shape == (1, 2, 64) and delta.eq(0).all() and sft.real_tokens(mb).eq(0).all()
    logprobs, hits, embeddings = sft.forward(sft.Policy(model), model, mb, delta)
    assert logprobs.eq(0).all() and hits.eq(0).all()
    assert sft.fgm_delta(torch.ones_like(embeddings), embeddings, sft.real_tokens(mb), 0.1).eq(0).all()


@pytest.mark.promise("perturbed")
@pytest.mark.parametrize("attack", ["fgm", "neftune"])
@pytest.mark.parametrize("kind, flags", [("llama-tied", ()), ("llama", ()), ("gpt2", ()), ("llama-tied", ("--lora_r", 4))], ids=str)
def test_the_perturbed_gradient_is_that_of_plain_transformers(monkeypatch, tmp_path, attack, kind, flags, tokenizer):
    """Row by row, without padding, through inputs_embeds: sum of both losses (fgm), or the one on noise."""
    import json
    rows = [{"prompt": "a", "completion": "b" * n, "answer": None} for n in (1, 40, 3, 90)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    model = tiny_model(kind)
    model.config.update({rate: 0.0 for rate in ("resid_pdrop", "embd_pdrop", "attn_pdrop")})  # gpt2's; sft.py trains with dropout
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    flags = ["--model_name_or_path", tmp_path / "m", *flags, "--adversarial", attack, *(["--adversarial_epsilon", 0.7] if attack == "fgm" else [])]
    got, metrics = gradient(monkeypatch, tmp_path / "a", "--dataset_name", tmp_path / "d.jsonl", *flags, "--batch_size", 4)
    args = common.parse_args(sft.Args, [os.path.join(TINY, "sft.json"), *map(str, flags)])
    model = common.load_model(args, tokenizer)
    clean = attacked = 0.0
    for j, i in enumerate(torch.randperm(4, generator=sft.stream(0, "order", 0)).tolist()):
        prompt = tokenizer("<|user|>a<|end|><|assistant|>")["input_ids"]
        ids = tensor(prompt + tokenizer(rows[i]["completion"] + "<|end|>")["input_ids"])

        def loss(E):
            logits = model(inputs_embeds=E[None]).logits[0, len(prompt) - 1:-1]
            return torch.nn.functional.cross_entropy(logits, ids[len(prompt):], reduction="sum") / (2 + 41 + 4 + 91)
        E = model.get_input_embeddings()(ids).requires_grad_()
        if attack == "fgm":
            g, = torch.autograd.grad(loss(E), E)
            clean = clean + loss(E)
            attacked = attacked + loss(E + 0.7 * E.detach().norm(dim=-1).mean() * g / g.norm())  # E of both passes takes a gradient
        else:
            U = 2 * torch.rand(*E.shape, generator=sft.stream(0, "neftune", 0, j)) - 1
            clean = clean + loss(E + 5 / math.sqrt(E.numel()) * U)
    (clean + attacked).backward()
    clean, attacked = float(clean.detach()), float(attacked.detach() if attack == "fgm" else 0)
    want = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert metrics["loss"] == pytest.approx(clean, rel=1e-5)
    assert ("adversarial_loss" in metrics) == (attack == "fgm") and metrics.get("adversarial_loss", 0) == pytest.approx(attacked, rel=1e-5)
    assert attacked == 0 or attacked > 1.01 * clean
    assert (got - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize("attack", ["fgm", "neftune"])
def test_evaluation_under_attack_repeats_and_touches_no_gradient(attack, tmp_path):
    model, rows = tiny_model("llama-tied"), rows_of(5, 30, 12)
    policy, losses, widths = sft.Policy(model), [], []
    policy.register_forward_pre_hook(lambda module, inputs: widths.append(len(inputs[0])))
    for checkpointing in (False, True) * 2:
        size = ("--adversarial_epsilon", 1.5) if attack == "fgm" else ("--neftune_noise_alpha", 30.0)
        run = new_run(tmp_path, "--adversarial", attack, *size, "--micro_batch_tokens", 1000,
                      "--gradient_checkpointing", checkpointing)
        metrics, table = sft.evaluate(policy, model, rows, run.args, run)
        losses.append(metrics["eval/loss_under_attack"])
        assert set(widths) == {1 if checkpointing and attack == "fgm" else 3} and table == [] and run.args.micro_batch_tokens == 1000
        widths.clear()
    assert losses[:2] == losses[2:] and losses[0] == pytest.approx(losses[1], rel=1e-5)
    mb = micro_batch(rows)
    clean = sft.sft_loss(policy(mb.input_ids, mb.mask)[0], mb.mask).sum().item() / mb.mask.sum().item()
    assert metrics["eval/loss"] == pytest.approx(clean, rel=1e-5)
    assert losses[0] > 1.02 * clean or attack == "neftune" and abs(losses[0] - clean) > 0.1
    total = 0.0
    for place, row in enumerate(rows):  # by hand, with plain transformers
        ids, trained = row["input_ids"].long(), row["mask"].bool()

        def loss(E):
            logits = model(inputs_embeds=E[None]).logits[0, :-1]
            return torch.nn.functional.cross_entropy(logits[trained[1:]], ids[trained], reduction="sum")
        E = model.get_input_embeddings()(ids).detach().requires_grad_()
        if attack == "fgm":
            g, = torch.autograd.grad(loss(E), E)
            delta = 1.5 * E.norm(dim=-1).mean() * g / g.norm()
        else:
            delta = 30 / math.sqrt(E.numel()) * (2 * torch.rand(*E.shape, generator=sft.stream(run.args.seed, "neftune", "eval", place)) - 1)
        total += loss(E + delta).item()
    assert losses[0] == pytest.approx(total / mb.mask.sum().item(), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())
    assert model.training and not model.get_input_embeddings()._forward_hooks


# ---- one step ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def thirty_rows(tmp_path):
    with open(os.path.join(TINY, "addition.jsonl")) as file:
        (tmp_path / "thirty.jsonl").write_text("".join(file.readlines()[:30]))
    return tmp_path / "thirty.jsonl"


def gradient(monkeypatch, out, *flags):
    monkeypatch.setattr(sft, "make_optimizer", RecordGradients)
    metrics = run(sft, out, "--model_name_or_path", os.path.join(TINY, "sft"), "--eval_fraction", 0, "--batch_size", 12, "--max_grad_norm", 0,
                  "--max_steps", 1, *flags)
    return RecordGradients.last.gradients[0], metrics[0]


@pytest.mark.promise("any cut")
@pytest.mark.parametrize("flags", [(), ("--lora_r", 4), ("--completion_only_loss", "False"), ("--freeze_layers", 0.5),
                                   ("--adversarial", "fgm", "--model_name_or_path", os.path.join(TINY, "model")),  # g of a loss near 0 is rounding
                                   ("--adversarial", "neftune", "--lora_r", 4)], ids=str)
def test_the_gradient_does_not_depend_on_micro_batch_tokens_or_checkpointing(monkeypatch, tmp_path, flags, thirty_rows):
    flags = "--dataset_name", thirty_rows, *flags
    whole, metrics = gradient(monkeypatch, tmp_path / "a", *flags)
    assert whole.norm() > 1e-3
    for i, cut in enumerate((("--micro_batch_tokens", 1), ("--micro_batch_tokens", 150), ("--gradient_checkpointing",))):
        part, other = gradient(monkeypatch, tmp_path / f"b{i}", *flags, *cut)
        assert (part - whole).norm() / whole.norm() < 1e-6
        assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-6) and other["trained_tokens"] == metrics["trained_tokens"]


@pytest.mark.promise("formulas")
def test_the_step_is_tokens_over_tokens_with_plain_transformers(monkeypatch, tmp_path):
    """A file of very unequal rows: sum of all tokens' losses over their number, from transformers' own logits."""
    import json
    rows = [{"prompt": "a", "completion": "b" * n, "answer": None} for n in (1, 40, 3, 90)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    got, metrics = gradient(monkeypatch, tmp_path / "a", "--dataset_name", tmp_path / "d.jsonl", "--batch_size", 4)
    args = common.parse_args(sft.Args, [os.path.join(TINY, "sft.json"), "--model_name_or_path", os.path.join(TINY, "sft")])
    tokenizer = common.load_tokenizer(args)
    model = common.load_model(args, tokenizer)
    losses = []
    for row in rows:
        prompt = tokenizer("<|user|>a<|end|><|assistant|>")["input_ids"]
        ids = tensor([prompt + tokenizer(row["completion"] + "<|end|>")["input_ids"]])
        lp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        losses.append(-lp[len(prompt) - 1:])
    loss = torch.cat(losses).mean()
    loss.backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5) and metrics["trained_tokens"] == 2 + 41 + 4 + 91
    assert (got - want).norm() / want.norm() < 1e-5


def test_micro_batches_keep_every_row_once_and_the_limit():
    lengths = torch.randint(1, 60, (37,), generator=torch.Generator().manual_seed(0)).tolist()
    for processes in (1, 2, 5):
        parts = [common.cut(lengths, 128, p, processes) for p in range(processes)]
        assert sorted(i for part in parts for batch in part for i in batch) == list(range(37))
        assert all(len(b) * max(lengths[i] for i in b) <= 128 for part in parts for b in part)
    assert common.cut([500], 128) == [[0]] and common.cut([3], 128, 1, 2) == [[]]


def test_every_row_is_seen_once_an_epoch_and_the_short_last_step_counts_its_own_tokens(monkeypatch, tmp_path):
    import json
    rows = [{"prompt": str(i), "completion": "x" * (i % 7 + 1), "answer": None} for i in range(10)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    seen, pad_rows = [], common.pad_rows
    monkeypatch.setattr(common, "pad_rows", lambda rows, *rest: seen.extend(tuple(r["input_ids"].tolist()) for r in rows) or pad_rows(rows, *rest))
    metrics = run(sft, tmp_path / "a", "--dataset_name", tmp_path / "d.jsonl", "--eval_fraction", 0, "--batch_size", 4, "--max_steps", -1,
                  "--num_train_epochs", 2)
    assert len(metrics) == 6 and len(set(seen)) == 10
    assert len(set(seen[:10])) == 10 and sorted(seen[:10]) == sorted(seen[10:]) and seen[:10] != seen[10:]
    assert sum(m["trained_tokens"] for m in metrics[:3]) == sum(i % 7 + 2 for i in range(10))
    assert metrics[-1]["num_tokens"] == 2 * sum(len(s) for s in set(seen))


def test_learning_rate_is_a_plain_function_of_the_step():
    args = type("A", (), {"learning_rate": 1.0, "warmup_steps": 2, "lr_scheduler_type": "linear"})
    at = lambda: [round(sft.learning_rate_at(s, 6, args), 4) for s in range(6)]
    assert at() == [round(1 / 3, 4), round(2 / 3, 4), 1.0, 0.75, 0.5, 0.25]
    args.lr_scheduler_type = "constant"
    assert at()[2:] == [1.0] * 4
    args.lr_scheduler_type, args.warmup_steps = "cosine", 0.0
    assert at() == [1.0, 0.933, 0.75, 0.5, 0.25, 0.067]  # (1 + cos of 0, 30, 60 ... degrees) / 2
    args.warmup_steps = 0.25  # a share: 1.5 of 6 steps, then 4.5 of decay
    assert at() == [0.3333, 0.6667, 0.9698, 0.75, 0.4132, 0.117]  # at 1/9, 3/9, 5/9 and 7/9 of it
    args.warmup_steps = 0.07  # 7 of 100 steps, though 0.07 * 100 is 7.000000000000001
    assert [sft.learning_rate_at(step, 100, args) for step in (0, 6, 7)] == [1 / 8, 7 / 8, 1.0]


def test_trained_weights_are_fp32_whatever_the_checkpoint_is_in(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    common.AutoTokenizer.from_pretrained(os.path.join(TINY, "model")).save_pretrained(tmp_path)
    for flags in ([], ["--lora_r", "4"], ["--lora_r", "4", "--load_in_4bit"], ["--lora_r", "4", "--bf16", "True"]):
        args = common.parse_args(sft.Args, [os.path.join(TINY, "sft.json"), "--model_name_or_path", str(tmp_path), *flags])
        args.bf16 = bool(args.bf16)
        trained = [p for p in common.load_model(args, common.load_tokenizer(args)).parameters() if p.requires_grad]
        assert trained and all(p.dtype == torch.float32 for p in trained)


def greedy(model, tokenizer):
    """What plain transformers answers, with nothing but the tokenizer's template and the generation config that was saved."""
    texts = []
    for prompt in ("48+27", "123+456", "9+8", "70+15"):
        asked = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        asked.pop("token_type_ids", None)  # transformers 4 makes them for any tokenizer of this class
        out = model.eval().generate(**asked, max_new_tokens=60)
        texts.append(tokenizer.decode(out[0, asked["input_ids"].shape[1]:]))
    return texts


@pytest.mark.promise("saved")
@pytest.mark.parametrize("flags", [(), ("--lora_r", 4, "--merge"), ("--lora_r", 4, "--merge", "--load_in_4bit")], ids=str)
def test_what_is_saved_loads_in_plain_transformers_and_peft_and_says_the_same(tmp_path, monkeypatch, flags):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    base, (model, merged), trained, finish = os.path.join(TINY, "sft"), (tmp_path / "a" / n for n in ("model", "merged")), [], common.finish

    def keep(args, accelerator, model, tokenizer):  # what the model says before it is saved
        finish(args, accelerator, model, tokenizer)
        trained.extend(greedy(model, tokenizer))
    monkeypatch.setattr(common, "finish", keep)
    (tmp_path / "d.jsonl").write_text("".join(f'{{"prompt": "{a}+{b}", "completion": "<answer>{a}</answer>"}}\n' for a in range(10, 26) for b in range(5, 15)))
    metrics = run(sft, tmp_path / "a", "--model_name_or_path", base, "--dataset_name", tmp_path / "d.jsonl", "--max_steps", 24,
                  "--learning_rate", 1e-2, "--batch_size", 16, "--eval_steps", 24, *flags)
    assert len([m for m in metrics if "eval/loss" in m]) == 2
    before = greedy(AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base))
    assert not set(trained) & set(before), "training changed too little"
    assert len(set(trained)) > 1 and any(text.endswith("<|end|>") for text in trained), trained
    if not flags:
        assert greedy(AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)) == trained
        return
    quantised = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                                           bnb_4bit_compute_dtype=torch.float32)} if "--load_in_4bit" in flags else {}
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **quantised), model)
    whole = AutoModelForCausalLM.from_pretrained(merged)
    assert greedy(adapter, AutoTokenizer.from_pretrained(model)) == trained == greedy(whole, AutoTokenizer.from_pretrained(merged))
    ids = torch.arange(40)[None]
    assert (adapter(ids).logits - whole(ids).logits).abs().max() < 1e-4
    assert any(p.abs().max() > 0 for n, p in adapter.named_parameters() if "lora_B" in n)


def test_a_base_that_is_stored_in_4_bits_trains_as_its_dequantised_weights_do(tmp_path):
    """Without --load_in_4bit, which it stands for; its evaluations come between steps, whose gradient they must not spoil."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    common.nf4(torch.float32, "cpu")  # switches off the repacking that spoils gradients
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)
    model = AutoModelForCausalLM.from_pretrained(os.path.join(TINY, "sft"), quantization_config=four, dtype=torch.float32)
    model.save_pretrained(tmp_path / "four")
    plain = model.dequantize(dtype=torch.float32)
    plain._weight_conversions = None
    plain.save_pretrained(tmp_path / "plain")
    for name in ("four", "plain"):
        AutoTokenizer.from_pretrained(os.path.join(TINY, "sft")).save_pretrained(tmp_path / name)
    (tmp_path / "d.jsonl").write_text("".join(f'{{"prompt": "{a}+7", "completion": "<answer>{a}</answer>"}}\n' for a in range(10, 30)))
    a, b = (run(sft, tmp_path / f"out-{name}", "--model_name_or_path", tmp_path / name, "--dataset_name", tmp_path / "d.jsonl", "--max_steps", 3,
                "--learning_rate", 1e-2, "--batch_size", 8, "--eval_steps", 1, "--lora_r", 4, "--merge") for name in ("four", "plain"))
    for ours, want in zip(a, b, strict=True):
        assert all(ours[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5) for name in want if "loss" in name or name == "grad_norm")
    out = tmp_path / "out-four"
    assert json.loads((out / "args.json").read_text())["load_in_4bit"] and not json.loads((tmp_path / "out-plain" / "args.json").read_text())["load_in_4bit"]
    ids = torch.arange(40)[None]
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), out / "model")
    assert merged.dtype == torch.float32 and (merged(ids).logits - adapted(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("flags", [(), ("--lora_r", 4, "--merge")], ids=str)
def test_a_models_card_says_what_made_it_and_its_code_loads_it(tmp_path, flags):
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM
    base, data = os.path.join(TINY, "sft"), tmp_path / "d.jsonl"
    data.write_text('{"prompt": "1+1", "completion": "<answer>2</answer>"}\n' * 9)
    command = ["--model_name_or_path", base, "--dataset_name", data, "--max_steps", 2, "--learning_rate", 1e-2, "--batch_size", 2,
               "--eval_dataset_name", data, *flags[:2]]
    run(sft, tmp_path / "a", *command)
    said, ids, before = [], torch.arange(40)[None], (tmp_path / "a" / "model" / "README.md").read_bytes()
    if flags:
        run(sft, tmp_path / "a", *command, "--resume_from_checkpoint", "latest", "--merge")
        assert (tmp_path / "a" / "model" / "README.md").read_bytes() == before, "or a run that began with model/ could not be resumed"
    for name in ("model", "merged") if flags else ("model",):
        card, adapter = ModelCard.load(tmp_path / "a" / name / "README.md"), flags and name == "model"
        assert "[More Information Needed]" not in card.content and "$" not in card.content and str(tmp_path / "a") not in card.content
        assert card.data.library_name == ("peft" if adapter else "transformers")
        assert card.data.pipeline_tag == "text-generation" and card.data.tags == ["sft"]
        assert card.data.base_model is card.data.datasets is None, "a path means nothing to the Hub"
        assert f"`sft.py` made it from `{base}` on `{data}`, evaluated on `{data}`." in card.text
        changed = json.loads(re.search(r"```json\n(.*?)```", card.text, re.DOTALL)[1])
        assert changed["learning_rate"] == 1e-2 and changed.get("lora_r") == (4 if flags else None)
        assert not {"save_steps", "output_dir"} & set(changed), "those that are not the defaults"
        said.append(load_by_card(tmp_path / "a" / name)(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / name)(ids).logits
    assert all((logits - plain).abs().max() < 1e-4 for logits in said)
    assert (plain - AutoModelForCausalLM.from_pretrained(base)(ids).logits).abs().max() > 1e-2


def test_an_adapter_that_is_loaded_by_its_card_stops(tmp_path):
    """The generation config of many bases (Qwen2.5) lacks the end of turn: an adapter's own has it, and its card takes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    made = AutoModelForCausalLM.from_pretrained(os.path.join(TINY, "sft"))
    made.generation_config.eos_token_id = made.config.eos_token_id = 256
    made.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(os.path.join(TINY, "sft")).save_pretrained(tmp_path / "base")
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1", "completion": "<answer>2</answer>"}\n' * 9)
    run(sft, tmp_path / "a", "--model_name_or_path", tmp_path / "base", "--dataset_name", tmp_path / "d.jsonl", "--max_steps", 1,
        "--learning_rate", 1e-9, "--batch_size", 2, "--eval_fraction", 0, "--lora_r", 4)
    model, tokenizer = load_by_card(tmp_path / "a" / "model"), AutoTokenizer.from_pretrained(tmp_path / "base")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "12+34"}], add_generation_prompt=True, return_tensors="pt", return_dict=False)
    said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=90, do_sample=False)[0, ids.shape[1]:].tolist()
    assert said[-1] == 260 and said.count(260) == 1 and len(said) < 90


def test_an_adapter_with_embeddings_of_its_own_is_refused(tmp_path):
    """peft loads them into the base, and writes none when the adapter is saved again: what was trained on would be lost."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    for name, more in (("whole", {"modules_to_save": ["lm_head"], "bias": "all"}), ("targets", {"target_modules": ["embed_tokens"]}), ("brings", {})):
        config = LoraConfig(r=4, task_type="CAUSAL_LM", **({"target_modules": ["q_proj"]} | more))
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(os.path.join(TINY, "sft")), config)
        model.save_pretrained(tmp_path / name, save_embedding_layers=name == "brings")
    go = lambda name: run(sft, tmp_path / "out", "--model_name_or_path", tmp_path / name, "--max_steps", 1, "--batch_size", 2, "--eval_fraction", 0, "--overwrite_output_dir")
    go("whole")
    go("targets")
    with pytest.raises(common.UserError, match=r"it brings .*model.embed_tokens.weight, which would not be saved: merge it"):
        go("brings")


def test_experts_that_are_not_held_in_4_bits_are_said(tmp_path, capsys):
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
    config = Qwen3MoeConfig(vocab_size=320, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                            num_key_value_heads=2, head_dim=32, num_experts=2, num_experts_per_tok=1, max_position_embeddings=512, eos_token_id=260)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "m")
    AutoTokenizer.from_pretrained(os.path.join(TINY, "sft")).save_pretrained(tmp_path / "m")
    run(sft, tmp_path / "out", "--model_name_or_path", tmp_path / "m", "--max_steps", 1, "--batch_size", 2, "--eval_fraction", 0, "--lora_r", 4, "--load_in_4bit")
    assert "LoRA r=4 on a 4-bit base (not its experts), " in capsys.readouterr().out


@pytest.mark.parametrize("bf16, four", [(False, False), (True, False), (False, True), (True, True)])
def test_a_card_loads_an_adapters_base_as_training_did(tmp_path, bf16, four):
    """Whatever it is stored in: transformers would load it so, and 14 of 24 greedy answers of a real model were others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    made = AutoModelForCausalLM.from_pretrained(os.path.join(TINY, "sft"), dtype=torch.float16 if bf16 else torch.bfloat16)
    made.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(os.path.join(TINY, "sft")).save_pretrained(tmp_path / "base")
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1", "completion": "<answer>2</answer>"}\n' * 9)
    models, prepare = [], common.Run.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "prepare", lambda self, module, optimizer: models.append(module.model) or prepare(self, module, optimizer))
        run(sft, tmp_path / "a", "--model_name_or_path", tmp_path / "base", "--dataset_name", tmp_path / "d.jsonl", "--max_steps", 2, "--bf16", bf16,
            "--learning_rate", 1e-2, "--batch_size", 2, "--eval_fraction", 0, "--lora_r", 4, *["--load_in_4bit"] * four)
    model, ids = load_by_card(tmp_path / "a" / "model"), torch.arange(40)[None]
    trained, loaded = ({name: p.dtype for name, p in m.named_parameters() if "lora" not in name} for m in (models[0], model))
    assert loaded == trained
    assert (model(ids).logits - models[0].eval()(ids).logits).abs().max() < (0.1 if bf16 else 1e-4)
    if four:
        layers = [[part for part in m.modules() if hasattr(part, "compute_dtype")] for m in (models[0], model)]
        assert layers[0] and {part.compute_dtype for part in layers[1]} == {part.compute_dtype for part in layers[0]}


def test_a_card_names_what_lies_on_the_hub(tmp_path):
    model, (args, *_) = tiny_model("llama"), [new_run(tmp_path / "out").args]
    model.config._name_or_path, args.dataset_name = "some/base", "some/data:main:train"
    front = common.model_card(args, model).split("---")[1]
    assert "base_model: some/base\n" in front and "datasets:\n- some/data\n" in front


@pytest.mark.parametrize("where", ["merging", "saving"])
def test_a_merge_that_would_be_another_model_fails(tmp_path, monkeypatch, capsys, where):
    """Real text shows it, here at the byte "+" alone; model/ stays, merged/ goes."""
    from peft.tuners.lora import LoraModel
    merge, save = LoraModel.merge_and_unload, common.save_model

    def spoilt(model):
        model.get_output_embeddings().weight.data[ord("+")] += 1
        return model
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1", "completion": "<answer>2</answer>"}\n')
    flags = ["--model_name_or_path", os.path.join(TINY, "sft"), "--dataset_name", tmp_path / "d.jsonl", "--max_steps", 1, "--batch_size", 2,
             "--eval_fraction", 0, "--lora_r", 4, "--merge"]
    run(sft, tmp_path / "good", *flags)
    said = re.search(r"merged/?: an example's logits moved by (\S+) on average and (\S+) at most; (\d+) of (\d+) greedy tokens agree", capsys.readouterr().out)
    assert 0 <= float(said[1]) <= float(said[2]) < 1e-4 and said[3] == said[4]
    if where == "merging":
        monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self: spoilt(merge(self)))
    else:
        monkeypatch.setattr(common, "save_model", lambda args, model, tokenizer, folder, state=None: save(
            args, model if state else spoilt(model), tokenizer, folder, state))
    with pytest.raises(common.UserError, match=r"--merge: an example's logits moved by .* so merged/ would be another model and was removed; .*model is whole"):
        run(sft, tmp_path / "bad", *flags)
    assert os.path.exists(tmp_path / "bad" / "model") and not os.path.exists(tmp_path / "bad" / "merged")


@pytest.mark.parametrize("flags", [[], ["--lora_r", 4, "--merge"]])
@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_a_model_is_saved_as_it_was_shipped(tmp_path, where, flags):
    """Many ship sampling parameters without do_sample, which transformers reads but refuses to write."""
    shipped = {"temperature": 0.6, "top_p": 0.9, "length_penalty": 0.5}
    model = shutil.copytree(os.path.join(TINY, "sft"), tmp_path / "shipped")
    os.remove(model / "generation_config.json")
    there = json.loads((model / "config.json").read_text()) if where == "config.json" else {}  # as older models have it
    (model / where).write_text(json.dumps(there | shipped))
    run(sft, tmp_path / "out", "--model_name_or_path", model, "--max_steps", 1, "--batch_size", 2, "--eval_fraction", 0, *flags)
    saved = json.loads((tmp_path / "out" / ("merged" if flags else "model") / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in shipped} == shipped and saved.get("do_sample") is not True and saved["eos_token_id"] == [260]


@pytest.mark.parametrize("name", ["dpo", "reward_model"])
def test_a_model_that_the_last_update_has_broken_is_not_saved(tmp_path, name):
    """No later step would see it."""
    with pytest.raises(common.UserError, match="step 1: the loss of the evaluation is not finite: the model is broken, and is not saved"):
        run(importlib.import_module(name), tmp_path, "--max_steps", 1, "--batch_size", 2, "--learning_rate", 1e9, "--eval_fraction", 0.005,
            "--eval_on_start", False, "--model_name_or_path", os.path.join(TINY, "sft"))
    assert not (tmp_path / "model").exists() and "eval/loss" in (tmp_path / "metrics.jsonl").read_text()


def test_the_best_weights_are_kept(tmp_path):
    """At a learning rate that ruins the model, model/ holds the start: the best evaluation was the first."""
    from transformers import AutoModelForCausalLM
    metrics = run(sft, tmp_path / "a", "--model_name_or_path", os.path.join(TINY, "sft"), "--max_steps", 6, "--eval_steps", 3,
                  "--learning_rate", 0.5, "--batch_size", 8, "--eval_fraction", 0.005, "--keep_best")
    losses = [m["eval/loss"] for m in metrics if "eval/loss" in m]
    assert losses[0] == min(losses) and losses[-1] > 1
    start, kept = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (os.path.join(TINY, "sft"), tmp_path / "a" / "model"))
    assert all(torch.equal(start[k], kept[k]) for k in start)


def test_the_best_weights_of_another_folder_are_not_silently_forgotten(tmp_path, capsys, thirty_rows):
    flags = ["--model_name_or_path", os.path.join(TINY, "sft"), "--dataset_name", thirty_rows, "--eval_fraction", 0.1, "--eval_steps", 1,
             "--save_steps", 1, "--batch_size", 2, "--keep_best", "--max_steps"]
    run(sft, tmp_path / "a", *flags, 2)
    for folder, said in (("a", False), ("b", True)):
        run(sft, tmp_path / folder, *flags, 2, "--resume_from_checkpoint", tmp_path / "a" / "checkpoints" / "step-00000001")
        assert ("--keep_best begins anew" in capsys.readouterr().out) == said


def test_the_lowest_blocks_stay_as_they_were(tmp_path, capsys, thirty_rows):
    from safetensors.torch import load_file
    run(sft, tmp_path / "a", "--model_name_or_path", os.path.join(TINY, "sft"), "--dataset_name", thirty_rows, "--eval_fraction", 0, "--max_steps", 3,
        "--batch_size", 4, "--freeze_layers", 0.5, "--gradient_checkpointing", "True")
    assert "freeze   the lowest 1 of 2 blocks, not the embedding" in capsys.readouterr().out
    start, end = (load_file(os.path.join(p, "model.safetensors")) for p in (os.path.join(TINY, "sft"), tmp_path / "a" / "model"))
    assert {k for k in start if start[k].equal(end[k])} == {k for k in start if "layers.0." in k} and start.keys() == end.keys()


@pytest.mark.parametrize("kind, names", [("llama", ("embed_tokens", "layers.0.")), ("llama-tied", ("layers.0.",)), ("gpt2", ("wte", "h.0."))])
@pytest.mark.parametrize("share", [0.2, 0.9])  # of two blocks: at least one, and rounded down
def test_an_embedding_is_frozen_with_them_unless_it_is_the_head(kind, names, share):
    model = tiny_model(kind)
    sft.freeze_lowest(model, share)
    assert all(p.requires_grad != any(n in name for n in names) for name, p in model.named_parameters())


def test_a_share_of_the_blocks_is_not_rounded_twice():
    """0.7 of 90 blocks are 63, though 0.7 * 90 is below it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=90, num_attention_heads=1))
    sft.freeze_lowest(model, 0.7)
    assert sum(not any(p.requires_grad for p in block.parameters()) for block in model.model.layers) == 63


def test_a_warning_when_the_evaluation_loss_has_risen_three_times_in_a_row(tmp_path, monkeypatch, capsys, thirty_rows):
    import shutil
    losses = iter([1, 2, 3, 2.5, 2.4, 2.6, 2.7, 2.8, 2.8])
    said, say = [], sft.say
    for module in (sft, common):
        monkeypatch.setattr(module, "say", lambda text, **k: said.append(text) or say(text, **k))
    monkeypatch.setattr(sft, "evaluate", lambda *rest: ({"eval/loss": float(next(losses))}, []))
    flags = ["--model_name_or_path", os.path.join(TINY, "sft"), "--dataset_name", thirty_rows, "--eval_fraction", 0.1, "--max_steps", 8,
             "--eval_steps", 1, "--save_steps", 1, "--batch_size", 2]
    run(sft, tmp_path / "a", *flags)
    at = [said[i - 1] for i, text in enumerate(said) if text.startswith("warning")]
    assert len(at) == 1 and at[0].startswith("eval     step 7:") and "--keep_best" in capsys.readouterr().out
    shutil.copytree(tmp_path / "a" / "checkpoints" / "step-00000007", tmp_path / "b" / "checkpoints" / "step-00000007")
    losses = iter([2.9])
    said.clear()
    run(sft, tmp_path / "b", *flags, "--resume_from_checkpoint", "latest", "--overwrite_output_dir", "False")
    assert [text for text in said if "risen three times in a row, from 2.6000" in text], "the losses before the checkpoint count"


def test_evaluation_by_hand(tmp_path, monkeypatch):
    """eval/loss and eval/token_accuracy are means over tokens, eval/accuracy over rows with an answer; the cut does not matter."""
    flags = ["--model_name_or_path", os.path.join(TINY, "sft"), "--max_steps", 1, "--batch_size", 2]
    a = run(sft, tmp_path / "a", *flags)[0]
    b = run(sft, tmp_path / "b", *flags, "--micro_batch_tokens", 400)[0]
    assert a["eval/accuracy"] == b["eval/accuracy"] and 0.2 < a["eval/accuracy"] < 0.6
    assert a["eval/loss"] == pytest.approx(b["eval/loss"], rel=1e-6)
    assert math.exp(-a["eval/loss"]) < 1 and 0.9 < a["eval/token_accuracy"] < 1


def test_duplicates_are_dropped_and_counted(tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text('{"question": "1+1", "answer": "2"}\n' * 3 + '{"question": "1+2", "answer": "3"}\n')
    run(sft, tmp_path / "a", "--dataset_name", tmp_path / "d.jsonl", "--eval_fraction", 0, "--max_steps", 1)
    assert "2 duplicates dropped" in capsys.readouterr().out


SAYS = lambda who, text, **more: {"role": who, "content": text, **more}
@pytest.mark.promise("files")
@pytest.mark.parametrize("name, row, trained", [  # as OpenAI, LLaMA-Factory and TRL describe their files, columns that say nothing included
    ("openai.jsonl", {"messages": [SAYS("system", "be"), SAYS("user", "a", name="ann"), SAYS("assistant", "b", weight=0), SAYS("user", "c"),
                                   SAYS("assistant", "d", weight=1)]}, "d"),
    ("alpaca.json", {"instruction": "a", "input": "b", "output": "c", "system": "be", "history": [["d", "e"], ["f", "g"]]}, "e<|end|>g<|end|>c"),
    ("sharegpt.json", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "", "tools": ""}, "b"),
    ("llamafactory_openai.json", {"messages": [SAYS("system", "be"), SAYS("user", "a"), SAYS("assistant", "b")]}, "b"),
    ("pretraining.json", {"text": "abc"}, "bc"),  # nothing predicts token 0
    ("trl_language_modeling.jsonl", {"text": "abc"}, "bc"), ("trl_conversation.jsonl", {"messages": [SAYS("user", "a"), SAYS("assistant", "b")]}, "b"),
    ("trl_standard.jsonl", {"prompt": "a", "completion": " b"}, " b"),
    ("trl_conversational.jsonl", {"prompt": [SAYS("user", "a")], "completion": [SAYS("assistant", "b")]}, "b"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_files_of_other_projects_are_read_as_they_are(name, row, trained, tmp_path, tokenizer):
    import json
    (tmp_path / name).write_text(json.dumps([row], indent=2) if name.endswith(".json") else json.dumps(row) + "\n")
    args = common.parse_args(sft.Args, [os.path.join(TINY, "sft.json"), "--dataset_name", f"{tmp_path}/{name}", "--eval_fraction", "0"])
    (example,), _ = sft.load_rows(args, common.load_tokenizer(args))
    assert tokenizer.decode(example["input_ids"][example["mask"].bool()]) == trained + "<|end|>"


def test_gsm8k_like_rows_learn(tmp_path):
    """question/answer rows on the random default model: the loss falls."""
    import json
    rows = [{"question": f"How many are {i} apples?", "answer": f"There are {i} apples.\n#### {i}"} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    metrics = run(sft, tmp_path / "a", "--dataset_name", tmp_path / "d.jsonl", "--max_steps", 24, "--batch_size", 16, "--max_completion_length", 8)
    losses = [m["loss"] for m in metrics if "loss" in m]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("held_out", [True, False])
def test_an_answer_is_asked_for_once_a_conversation_whatever_the_template_rewrites(held_out, tmp_path, tokenizer):
    """A template that drops the reasoning of earlier turns splits the conversation; the prompt's earlier answer is then not whole."""
    import json
    tokenizer.chat_template = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] if loop.last or m['role'] == 'user' else "
                               "m['content'].split('</think>')[-1] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    messages = [SAYS(who, text) for who, text in (("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "<think>e</think>7"))]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": messages, "answer": "7"}) + "\n")
    args = common.parse_args(sft.Args, [os.path.join(TINY, "sft.json"),
                                        "--dataset_name", f"{tmp_path}/d.jsonl", "--eval_dataset_name", f"{tmp_path}/d.jsonl"])
    examples = sft.load_rows(args, tokenizer)[held_out]
    assert len(examples) == 2 and ["answer" in e for e in examples] == [False, held_out]
    if held_out:
        assert tokenizer.decode(examples[1]["prompt_ids"]) == "<|user|>a<|end|><|assistant|>c<|end|><|user|>d<|end|><|assistant|>"


def test_evaluation_generates_no_further_than_the_positions_reach(tmp_path):
    """gpt2 looks its positions up in a table of 512."""
    model, run = tiny_model("gpt2").eval(), new_run(tmp_path, "--max_completion_length", 50)
    for length in (500, 512):
        share, table = common.answer_greedily(run, model, [{"prompt": "q", "prompt_ids": [65] * length, "answer": "7"}])
        assert share in (0, 1) and len(table) == 1
