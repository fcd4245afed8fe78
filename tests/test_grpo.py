"""grpo.py: losses by hand and by enumeration, the sampler against generate(), a step cut in every way, learning."""

import itertools
import json
import math
import os
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import ROWS, TINY, RecordGradients, run, tiny_model
from torch import tensor
from transformers import AutoConfig, AutoModelForCausalLM

import common
import grpo

LN2 = math.log(2)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- losses by hand ----------------------------------------------------------------------------------------------------

def test_group_advantages_by_hand():
    scores = tensor([[1.0, 0, 0, 1], [3, 1, 2, 2]])  # std with n - 1: sqrt(1/3), sqrt(2/3)
    centred = tensor([[0.5, -0.5, -0.5, 0.5], [1, -1, 0, 0]])
    close(grpo.group_advantages(scores), centred / (tensor([[1 / 3], [2 / 3]]).sqrt() + 1e-4))
    close(grpo.group_advantages(scores, "none"), centred)
    std = math.sqrt(sum((x - 1.25) ** 2 for x in scores.flatten().tolist()) / 7)
    close(grpo.group_advantages(scores, "batch"), centred / (std + 1e-4))


def test_advantages_of_a_group_sum_to_zero_and_flat_groups_are_exactly_zero():
    scores = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    close(grpo.group_advantages(scores).sum(1), torch.zeros(6), 1e-5)  # fp32 means of numbers near 1
    flat = torch.full((1, 8), 0.1) * 3  # 0.3 with float noise in its mean
    for scale in ("group", "batch", "none"):
        assert grpo.group_advantages(flat, scale).eq(0).all()


def test_unscored_completions_are_left_out_of_the_statistics():
    scores = tensor([[1.0, math.nan, 0.0], [math.nan] * 3])
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    close(grpo.group_advantages(scores), tensor([[half, 0, -half], [0, 0, 0]]))
    close(grpo.group_advantages(scores, "batch"), tensor([[half, 0, -half], [0, 0, 0]]))  # the same two scores
    scores = tensor([[1.0, math.nan, 0.0], [1, math.nan, 1], [math.nan] * 3, [2, 2, 2]])
    assert grpo.varies(scores).tolist() == [True, False, False, False]


def test_grpo_loss_by_hand():
    """Ratios 1.5, 0.5, 1.1 with A = 2 and A = -1; epsilon 0.2, epsilon_high 0.3. The last token is not trained."""
    old, mask = torch.zeros(2, 4), tensor([[1.0, 1, 1, 0]] * 2)
    new = tensor([1.5, 0.5, 1.1, 9.0]).log().repeat(2, 1)
    loss, shown = grpo.grpo_loss(new, old, tensor([[2.0], [-1.0]]), mask, 0.2, 0.3)
    # min(3, 2.6), min(1, 1.6), 2.2; min(-1.5, -1.3), min(-0.5, -0.8), -1.1
    close(loss, tensor([[-2.6, -1.0, -2.2, 0], [1.5, 0.8, 1.1, 0]]))
    close(shown["ratio"][:, :3], tensor([[1.5, 0.5, 1.1]] * 2))
    close(shown["ratio/deviation"][:, :3], tensor([[0.5, 0.5, 0.1]] * 2))
    assert shown["clip_ratio/high_mean"].tolist() == [[True, False, False, False], [False] * 4]
    assert shown["clip_ratio/low_mean"].tolist() == [[False] * 4, [False, True, False, False]]


def test_sequence_ratio_is_the_geometric_mean():
    new, mask = tensor([[2.0, 3.0, 5.0, 7.0]]).log(), tensor([[0.0, 1, 1, 0]])
    old, advantage = torch.zeros(1, 4), tensor([[1.0]])
    _, shown = grpo.grpo_loss(new, old, advantage, mask, importance_sampling_level="sequence")
    close(shown["ratio"][mask.bool()], tensor([math.sqrt(15)] * 2))


def test_at_ratio_one_the_gradient_is_reinforce_and_masked_tokens_get_none():
    logprobs = torch.randn(3, 4, requires_grad=True)
    mask, a = tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]), tensor([[1.0], [-2.0], [0.5]])
    before = logprobs.detach().clone()
    loss, _ = grpo.grpo_loss(logprobs, logprobs.detach(), a, mask)
    loss.sum().backward()
    close(logprobs.grad, -a * mask)
    assert torch.equal(before, logprobs.detach())


def test_clipped_tokens_get_no_gradient_on_the_clipped_side_only():
    new = tensor([[1.5, 0.5]]).log().requires_grad_()
    loss, _ = grpo.grpo_loss(new, torch.zeros(1, 2), tensor([[1.0]]), torch.ones(1, 2))
    loss.sum().backward()
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
        _, shown = grpo.grpo_loss(new, was, torch.zeros(1, 1), torch.ones(1, 2))
        loss = loss + weight * (shown["ratio"] * grpo.kl_k3(new, base)).sum()
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


# ---- sampler -----------------------------------------------------------------------------------------------------------

PROMPTS = [[65, 66, 67], [70, 71, 72, 73, 74, 75, 76], [80], [66, 67, 68, 69, 70]]


def small_model(kind):
    """tiny_model, or a random model of another architecture over the same 320 ids. Windows are 8 tokens wide."""
    if kind in ("llama", "gpt2"):
        return tiny_model(kind).eval()
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
             "bos_token_id": None, "eos_token_id": 260, "pad_token_id": None, "tie_word_embeddings": False}
    if kind in ("mistral", "gemma3_text"):
        sizes["sliding_window"] = 8
    if kind == "gemma3_text":  # windows in two layers, everything in the third
        sizes["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"]
        sizes["query_pre_attn_scalar"] = 16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)
    with torch.no_grad():  # spread the logits out
        model.get_output_embeddings().weight.mul_(8)
    return model.eval()


@pytest.mark.promise("softmax")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_greedy_sampling_equals_generate(kind):
    """Of grpo.sample, and of complete_greedily, which the other scripts evaluate by: prompt by prompt."""
    model = small_model(kind)

    def generate(stops):
        outs = [model.generate(input_ids=tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=stops,
                               pad_token_id=256) for prompt in PROMPTS]
        return [out[0, len(prompt):].tolist() for prompt, out in zip(PROMPTS, outs)]
    free = generate([260])
    stops = [260, free[0][3], free[1][12]]  # rows end at different times, one after a window's 8 tokens
    want = generate(stops)
    got, _, lengths = grpo.sample(model, PROMPTS, None, 24, 1.0, stops)
    assert [row[:n] for row, n in zip(got.tolist(), lengths)] == want
    assert common.complete_greedily(model, PROMPTS, stops, 24) == want
    assert len(set(map(len, want))) > 1, "the rows should end at different times, or dropping them is not tested"
    assert max(map(len, want)) > 8 and len(set(common.flat(want))) > 20


def test_complete_greedily_stops_at_the_models_last_position():
    model = small_model("gpt2")
    prompts = [[65] * 500, [66] * 3]
    assert [len(ids) for ids in common.complete_greedily(model, prompts, [319], 100)] == [12, 12]


@pytest.mark.promise("batch mates")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_completion_does_not_depend_on_its_batch_and_its_logprobs_are_the_models(kind):
    model, g, c = tiny_model(kind).eval(), 3, 20
    uniforms = torch.rand(len(PROMPTS) * g, c, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stops = [260, 7, 99, 180, 200]
    whole, logprobs, lengths = grpo.sample(model, PROMPTS, uniforms, c, 0.7, stops, g)
    for i, prompt in enumerate(PROMPTS):
        for j in range(i * g, i * g + g):
            alone, _, length = grpo.sample(model, [prompt], uniforms[j:j + 1], c, 0.7, stops)
            assert length[0] == lengths[j] and torch.equal(alone[0], whole[j])
            n = int(length[0])
            row = tensor([prompt + whole[j, :n].tolist()])
            want = (model(row).logits / 0.7).log_softmax(-1)[0, len(prompt) - 1:-1].gather(-1, whole[j, :n, None]).squeeze(-1)
            close(logprobs[j, :n], want, 2e-5)
    assert len(set(lengths.tolist())) > 1


@pytest.mark.promise("softmax")
def test_the_sampled_distribution_is_the_whole_softmax_at_the_temperature():
    """4,000 first tokens of one prompt against the model's own probabilities, by chi-square over its 20 likeliest and the rest."""
    model, n = tiny_model("llama").eval(), 4000
    uniforms = torch.rand(n, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids, _, _ = grpo.sample(model, PROMPTS[:1], uniforms, 1, 1.7, [260], n)
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


@pytest.mark.promise("any cut")
@pytest.mark.parametrize("flags", [
    (), ("--loss_type", "grpo"), ("--loss_type", "dr_grpo", "--kl_coef", 0.1), ("--lora_r", 4, "--kl_coef", 0.1),
    ("--loss_type", "grpo", "--importance_sampling_level", "sequence", "--epsilon", 3e-4, "--num_iterations", 2),
    ("--num_minibatches", 2, "--mask_truncated_completions", "--max_completion_length", 62)], ids=str)
def test_the_gradient_does_not_depend_on_micro_batch_tokens_or_checkpointing(monkeypatch, tmp_path, flags):
    whole, _ = gradient(monkeypatch, tmp_path, *flags)
    assert max(g.norm() for g in whole) > 1e-3
    for cut in (("--micro_batch_tokens", 1), ("--micro_batch_tokens", 300), ("--gradient_checkpointing", "--rollout_batch_size", 5)):
        for a, b in zip(gradient(monkeypatch, tmp_path, *flags, *cut)[0], whole):
            assert (a - b).norm() <= 1e-6 * b.norm()


def keep_rollouts(monkeypatch):
    """-> a list that every rollout of a run will add its groups to."""
    kept, rollout = [], grpo.rollout

    def spy(*args, **kwargs):
        groups, logged = rollout(*args, **kwargs)
        kept.append(groups)
        return groups, logged
    monkeypatch.setattr(grpo, "rollout", spy)
    return kept


def completion_logprobs(model, row, temperature=1.0):
    """Of an unpadded row, with log_softmax over the model's own logits: (C,)."""
    ids = row["input_ids"].long()
    logprobs = (model(ids[None]).logits[0].float() / temperature).log_softmax(-1)
    return logprobs[:-1].gather(-1, ids[1:, None]).squeeze(-1)[-len(row["completion_ids"]):]


def assert_same_gradient(got, model):
    want = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert (got - want).norm() / want.norm() < 1e-5


@pytest.mark.promise("formulas")
def test_the_step_equals_the_formula_computed_row_by_row_with_plain_transformers(monkeypatch, tmp_path):
    """The DAPO loss of the very rollout, on unpadded rows, with log_softmax over the model's own logits."""
    kept = keep_rollouts(monkeypatch)
    (got,), metrics = gradient(monkeypatch, tmp_path, "--temperature", 0.9)
    (groups,) = kept
    assert sum(row["score"] for row in common.flat(groups)) > 0
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json")])
    model = common.load_model(args, common.load_tokenizer(args))
    scores = tensor([[row["score"] for row in group] for group in groups])  # (6, 4)
    advantages = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
    rows, loss = common.flat(groups), 0.0
    tokens = sum(len(row["completion_ids"]) for row in rows)
    for row, advantage in zip(rows, advantages.flatten()):
        loss = loss - advantage * completion_logprobs(model, row, 0.9).sum() / tokens
    loss.backward()
    assert_same_gradient(got, model)
    assert metrics[0]["trained_tokens"] == tokens


class MoveAndRecord(RecordGradients):
    """Plain SGD that also keeps the weights that each gradient was taken at."""

    def step(self, closure=None):
        super().step()
        parameters = self.param_groups[0]["params"]
        self.weights = [*getattr(self, "weights", []), [p.detach().clone() for p in parameters]]
        torch.optim.SGD.step(self)


@pytest.mark.promise("formulas")
@pytest.mark.parametrize("loss_type, level, scale, epsilon, epsilon_high", [
    ("grpo", "token", "batch", 0.01, 0.02), ("grpo", "sequence", "group", 1e-4, 2e-4),
    ("dr_grpo", "token", "batch", 0.01, 0.02)])
def test_main_hands_every_argument_to_the_loss(monkeypatch, tmp_path, loss_type, level, scale, epsilon, epsilon_high):
    """Two rollouts of two updates with every argument off its default, each against plain transformers, row by
    row: the policy that sampled is the first update's, the reference the start, and from the second rollout on
    all three differ."""
    kept = keep_rollouts(monkeypatch)
    longest, buffer = 62, 20
    monkeypatch.setattr(grpo, "make_optimizer", MoveAndRecord)
    metrics = run(
        grpo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 8, "--num_generations", 4,
        "--max_grad_norm", 0, "--max_steps", 4, "--num_iterations", 2, "--loss_type", loss_type,
        "--importance_sampling_level", level, "--scale_rewards", scale, "--epsilon", epsilon,
        "--epsilon_high", epsilon_high, "--kl_coef", 0.3, "--temperature", 1.3, "--overlong_penalty", buffer,
        "--mask_truncated_completions", "--max_completion_length", longest, "--learning_rate", 0.05,
        "--lr_scheduler_type", "constant")
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json")])
    model = common.load_model(args, common.load_tokenizer(args))
    trained, optimizer = [p for p in model.parameters() if p.requires_grad], MoveAndRecord.last

    def set_weights(number):
        with torch.no_grad():
            for parameter, value in zip(trained, optimizer.weights[number]):
                parameter.copy_(value)

    def frozen_logprobs(rows, number):
        set_weights(number)
        with torch.no_grad():
            return [completion_logprobs(model, row, 1.3) for row in rows]
    for update, got in enumerate(optimizer.gradients):
        groups = kept[update // 2]
        rows = common.flat(groups)
        scores = tensor([[row["rewards_per_func"].item() - max(0, len(row["completion_ids"]) - longest + buffer) / buffer
                          for row in group] for group in groups])
        centred = scores - scores.mean(1, keepdim=True)
        spread = scores.std() if scale == "batch" else scores.std(1, keepdim=True)
        advantages = (centred / (spread + 1e-4)).flatten().tolist()
        olds, refs = frozen_logprobs(rows, update // 2 * 2), frozen_logprobs(rows, 0)
        set_weights(update)
        model.zero_grad()
        loss, low, high, tokens, truncated = 0.0, 0, 0, 0, 0
        for row, advantage, old, ref in zip(rows, advantages, olds, refs):
            if row["completion_ids"][-1] != 260:  # no end of turn: masked
                truncated += 1
                continue
            new = completion_logprobs(model, row, 1.3)
            token_ratio = (new - old).exp()
            ratio = token_ratio if level == "token" else (new - old).mean().exp().expand_as(new)
            clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
            surrogate = torch.minimum(ratio * advantage, clipped * advantage)
            kl = token_ratio * ((ref - new).exp() - 1 - (ref - new))
            length = len(new) if loss_type == "grpo" else longest
            loss = loss + (0.3 * kl - surrogate).sum() / length / len(rows)
            low += ((ratio < 1 - epsilon) & (advantage < 0)).sum()
            high += ((ratio > 1 + epsilon_high) & (advantage > 0)).sum()
            tokens += len(new)
        loss.backward()
        assert_same_gradient(got, model)
        close(metrics[update]["loss"], loss.item(), 1e-5)
        assert metrics[update]["trained_tokens"] == tokens and 0 < truncated < len(rows)
        close(metrics[update]["clip_ratio/low_mean"] * tokens, float(low), 1e-5)
        close(metrics[update]["clip_ratio/high_mean"] * tokens, float(high), 1e-5)
        assert (low > 0 and high > 0) == (update % 2 == 1), "every second update should meet both clips"
    assert abs(metrics[0]["kl"]) < 1e-6 < metrics[2]["kl"]


@pytest.mark.promise("ratio")
def test_the_first_update_of_every_rollout_has_ratio_one_and_later_ones_have_not(tmp_path):
    metrics = run(grpo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 4, "--num_iterations", 2, "--num_minibatches", 2,
                  "--max_steps", 8, "--kl_coef", 0.05, "--temperature", 0.8)
    assert len(metrics) == 8
    assert all(m["ratio/deviation"] < 1e-5 for m in metrics[::4])
    assert all(m["ratio/deviation"] > 1e-5 for m in metrics[2::4])
    assert abs(metrics[0]["kl"]) < 1e-5 < metrics[-1]["kl"]
    assert all(m["sampling/logprob_difference"] < 1e-3 for m in metrics[::4])


@pytest.mark.promise("reference")
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
    annotate = common.Run.annotate

    def spy(self, rows, module, names, temperature):
        annotate(self, rows, module, names, temperature)
        ids, mask = tensor([PROMPTS[1] * 3]), torch.ones(1, 21)
        mask[:, 0] = 0
        assert names == ("ref_logprobs",)
        seen.append(module(ids, mask)[0].detach())
    monkeypatch.setattr(common.Run, "annotate", spy)
    metrics = run(grpo, tmp_path / "second", *flags)
    assert abs(metrics[0]["kl"]) < 1e-5 < metrics[1]["kl"]
    assert torch.equal(seen[0], seen[1]) and seen[0].abs().sum() > 1


def test_dropout_is_off_where_logprobs_are_compared(tmp_path, tokenizer):
    from transformers import LlamaConfig
    config = LlamaConfig.from_pretrained(os.path.join(TINY, "model"), attention_dropout=0.5)
    config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--model_name_or_path", str(tmp_path / "model")])
    model, ids = common.load_model(args, tokenizer), tensor([PROMPTS[1]])
    assert model.training and torch.equal(model(ids).logits, model(ids).logits)


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


def test_flat_rewards_are_said_aloud_and_nothing_is_learned(tmp_path, capsys):
    (tmp_path / "r.py").write_text("def same(completions):\n    return [1.0] * len(completions)\n")
    metrics = run(grpo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 2, "--max_steps", 3, "--reward_funcs", f"{tmp_path}/r.py:same")
    assert [m["frac_reward_zero_std"] for m in metrics] == [1, 1, 1] and all(m["grad_norm"] == 0 for m in metrics)
    assert "all completions of every prompt have scored the same" in capsys.readouterr().out


def test_a_prompt_too_long_is_dropped_and_counted(tmp_path, capsys):
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--max_prompt_length", "8"])
    train, held = common.load_prompts(args, common.load_tokenizer(args))
    assert all(len(p["prompt_ids"]) <= 8 for p in train + held)
    with open(args.dataset_name) as file:
        kept = sum(len(json.loads(line)["prompt"]) <= 5 for line in file)
    assert len(train) + len(held) == kept and f"{ROWS - kept:,} dropped" in capsys.readouterr().out


# ---- rejection sampling, demonstrations, dynamic sampling, length ---------------------------------------------------------

def test_best_of_groups_by_hand():
    scores = tensor([[3.0, 2, 2, 1], [1, 0, 0, 0], [5, 5, 5, 5], [math.nan, 2, 1, 0]])
    assert grpo.best_of_groups(scores, 0.5).tolist() == \
        [[True] * 3 + [False], [True] + [False] * 3, [False] * 4, [False, True, True, False]]
    assert grpo.best_of_groups(scores, 0.25).sum(1).tolist() == [1, 1, 0, 1]
    assert not grpo.best_of_groups(scores, 0.0).any()
    assert grpo.best_of_groups(torch.full((1, 4), math.nan), 1.0).tolist() == [[False] * 4]


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


@pytest.mark.promise("formulas")
def test_the_loss_with_best_of_group_and_demonstrations_equals_the_formula_row_by_row(monkeypatch, tmp_path):
    """Two thirds of the prompts have a demonstration: groups that always fail are replaced by it and weigh in the NLL alone."""
    kept = keep_rollouts(monkeypatch)
    flags = ["--dataset_name", answers_file(tmp_path / "d.jsonl", {i for i in range(24) if i % 3}), "--best_fraction", 0.25, "--sft_coef", 0.3,
             "--demo_threshold", 0, "--loss_type", "grpo", "--batch_size", 24, "--num_generations", 4, "--kl_coef", 0.1]
    (got,), metrics = gradient(monkeypatch, tmp_path, *flags)
    (groups,) = kept
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json")])
    tokenizer = common.load_tokenizer(args)
    model = common.load_model(args, tokenizer)
    surrogate, nll, sequences, tokens, replaced, best = [], 0.0, 0, 0, 0, 0
    for group in groups:
        prompt, r = group[0]["prompt"], tensor([row["score"] for row in group])
        if r.sum() == 0 and prompt["columns"]["demonstration"]:
            text = f"<|user|>{prompt['prompt']}<|end|><|assistant|>"
            answer = prompt["columns"]["demonstration"] + "<|end|>"
            head, answer = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, answer))
            row = {"input_ids": tensor(head + answer), "completion_ids": answer}
            nll, tokens = nll - completion_logprobs(model, row).sum(), tokens + len(answer)
            replaced += 1
            continue
        for row, advantage in zip(group, (r - r.mean()) / (r.std() + 1e-4)):
            values = completion_logprobs(model, row)
            surrogate, sequences = [*surrogate, -advantage * values.mean()], sequences + 1
            if row["score"] == 1 and r.sum() < 4:  # all winners tie for the best
                nll, tokens, best = nll - values.sum(), tokens + len(values), best + 1
    assert 0 < replaced < 16 and best > 5 and sequences == 4 * (24 - replaced)
    (sum(surrogate) / sequences + 0.3 * nll / tokens).backward()
    assert_same_gradient(got, model)
    close(tensor([metrics[0]["nll_loss"], metrics[0]["demo_fraction"], metrics[0]["best_fraction"]]),
          tensor([nll.item() / tokens, replaced / 24, best / sequences]), 1e-4)
    assert metrics[0]["sampling/logprob_difference"] < 1e-4 and abs(metrics[0]["kl"]) < 1e-5


def test_the_best_are_as_many_as_asked_for(tmp_path):
    """Every completion has a score of its own, so that none ties."""
    (tmp_path / "r.py").write_text("def own(completion_ids):\n    return [sum(i * t for t, i in enumerate(c)) for c in completion_ids]\n")
    for fraction in (0.25, 0.75):
        first, = run(grpo, tmp_path / str(fraction), "--eval_fraction", 0, "--batch_size", 2, "--num_generations", 4, "--max_steps", 1,
                     "--temperature", 2, "--reward_funcs", f"{tmp_path}/r.py:own", "--best_fraction", fraction, "--sft_coef", 0.1)
        assert first["best_fraction"] == fraction


def test_the_gate_looks_at_correctness_alone_and_at_the_threshold():
    demonstration = {"sampled": 0.0, "nll": True}
    asked, without = {"demonstration": demonstration}, {}

    def group(prompt, passed, of):
        return [{"prompt": prompt, "rewards_per_func": tensor([9.0, float(i < passed)]), "score": float(i < passed), "number": 0,
                 "sampled": 1.0, "nll": False, "completion_ids": [1], "truncated": False} for i in range(of)]
    groups = [group(asked, 0, 2), group(asked, 1, 2), group(without, 0, 2)]  # pass rates 0, 1/2, 0
    kept = [grpo.demonstrate(each, 0.0, 1) for each in groups]
    assert kept == [[demonstration | {"number": 0}], groups[1], groups[2]]
    args = SimpleNamespace(demo_threshold=0.0, best_fraction=0.0, batch_size=3, num_generations=2)
    rewards = {name: common.Reward(None, 1.0) for name in ("a", "b")}
    assert grpo.rollout_figures(groups, kept, rewards, args)["demo_fraction"] == 1 / 3
    assert [len(grpo.demonstrate(each, 0.5, 1)) for each in groups] == [1, 1, 2]
    three_of_ten = group(asked, 3, 10)  # in fp32 0.3 is more than 0.3
    assert grpo.demonstrate(three_of_ten, 0.3, 1) == [demonstration | {"number": 0}]


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
    add = lambda *prompts: common.add_demonstrations(prompts, {"accuracy": None}, args, tokenizer)
    add(text, messages, prompt(None), prompt(""))
    one, other = text["demonstration"], messages["demonstration"]
    assert one["input_ids"].equal(other["input_ids"]) and one["mask"].equal(other["mask"])
    assert tokenizer.decode(one["input_ids"]) == "<|user|>1+1=<|end|><|assistant|>2<|end|>"
    assert one["mask"].sum() == 2 and one["mask"].tolist()[-2:] == [1, 1]
    assert one["sampled"] == 0 and one["nll"]
    for bad, reason in ((42, "not a string but 42"), ([{"role": "user", "content": "2"}], "does not end with an answer"), (" ", "does not end")):
        with pytest.raises(common.UserError, match=f"row 7: .*{reason}"):
            add(text, prompt(bad))
    args.skip_bad_rows = True
    add(text, prompt(42))
    with pytest.raises(common.UserError, match="no prompt has a demonstration in a column 'demonstration'"):
        add(prompt(None))


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
        groups, logged = rollout(*a, **k)
        drawn.append([(row["prompt"]["prompt"], row["completion_ids"]) for row in common.flat(groups)])
        return groups, logged
    monkeypatch.setattr(grpo, "rollout", spy)
    first, = run(grpo, tmp_path / "a", "--dataset_name", data, "--eval_fraction", 0, "--batch_size", 2, "--max_steps", 1, "--drop_flat_groups",
                 "--temperature", 1.5, "--max_completion_length", 8)
    assert len(drawn) == grpo.MAX_DRAWS and all({p for p, _ in d} == {"1+1=", "2+1="} for d in drawn)
    assert len({str(sorted(d)) for d in drawn}) == grpo.MAX_DRAWS
    distinct = [common.distinct_n(ids) for _, ids in sum(drawn, [])]  # of each completion alone: all may be the same
    assert first["completions/distinct_4"] == pytest.approx(sum(distinct) / len(distinct))


def test_draws_of_few_prompts_want_no_more_groups_than_there_are_prompts(monkeypatch, tmp_path):
    """Three prompts, --batch_size 16: one draw whose three groups vary is enough. A reward's figures are those of all draws, and
    its random numbers other ones in each."""
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(3)))
    (tmp_path / "r.py").write_text("import random\ncalls = []\ndef chance(completions, log_metric):\n"
                                   "    calls.append([random.random() for _ in completions])\n    log_metric('call', len(calls))\n"
                                   "    return calls[-1] if len(calls) > 1 + LAZY else [1.0] * len(completions)\nLAZY = 0\n")
    flags = ["--dataset_name", data, "--eval_fraction", 0, "--batch_size", 16, "--num_generations", 4, "--max_steps", 1,
             "--drop_flat_groups", "--max_completion_length", 4, "--reward_funcs", f"{tmp_path}/r.py:chance"]
    (first,) = run(grpo, tmp_path / "a", *flags)  # its first call is the trial before the run
    assert (first["draws"], first["groups"], first["call"]) == (1, 3, 2)
    (tmp_path / "r.py").write_text((tmp_path / "r.py").read_text().replace("LAZY = 0", "LAZY = 2"))
    seen, score = [], common.score
    monkeypatch.setattr(common, "score", lambda *given: (seen.append(random.getstate()), score(*given))[1])
    (first,) = run(grpo, tmp_path / "b", *flags)
    assert (first["draws"], first["groups"], first["call"]) == (3, 3, 3)  # calls 2, 3 and 4
    assert len({str(state) for state in seen[1:]}) == 3


@pytest.mark.parametrize("flags", [["--num_iterations", 2], ["--drop_flat_groups"]], ids=str)
def test_each_draw_takes_the_next_prompts(monkeypatch, tmp_path, flags):
    """No prompt comes twice in an epoch of 30: neither with several updates a rollout nor several draws."""
    prompts, rollout = [], grpo.rollout

    def spy(model, drawn, *a, **k):
        prompts.extend(prompt["prompt"] for prompt in drawn)
        return rollout(model, drawn, *a, **k)
    monkeypatch.setattr(grpo, "rollout", spy)
    run(grpo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 3, "--num_generations", 2, "--max_steps", 4, *flags)
    assert len(prompts) == len(set(prompts)) >= 6


# ---- verification at inference --------------------------------------------------------------------------------------------

def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n, correct, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if correct <= n and k <= n:
            subsets = list(itertools.combinations([i < correct for i in range(n)], k))
            assert math.isclose(common.pass_at_k(n, correct, k), sum(map(any, subsets)) / len(subsets), abs_tol=1e-12)


def test_votes_by_hand():
    assert common.vote(["7", None, "8", "8"]) == "8" and common.vote([None, None]) is None
    assert common.vote(["7", "8", "8", "7"]) == "7"  # a tie: the earliest
    assert common.vote(["7", "8", "8"], [0.6, 0.1, 0.2]) == "7"


def test_verification_by_hand():
    """Two prompts, four samples: the right answers are 1 and 2; the reward model likes the third sample."""
    groups, scores = [["1", "3", "1", "3"], [None, "5", "2", "5"]], tensor([[0.0, 0, 5, 0], [9, 1, 3, 1]])
    got = common.verify(groups, ["1", "2"], scores)
    assert got["pass@1"] == (2 / 4 + 1 / 4) / 2 and got["pass@4"] == 1 and math.isclose(got["pass@2"], (5 / 6 + 3 / 6) / 2)
    assert got["majority@1"] == 0.5 and got["majority@2"] == 0.5 and got["majority@4"] == 0.5  # 1 by tie; 5
    assert got["best_of@4"] == 0.5 and got["best_of@2"] == 0.5  # no answer has the highest score
    assert got["weighted_vote@4"] == 1  # e^3 > 2 e^1, and None does not vote
    assert {name.split("@")[1] for name in common.verify([["1"] * 6], ["1"], None)} == {"1", "2", "4", "6"}


def test_evaluation_alone_leaves_no_model(tmp_path):
    metrics = run(grpo, tmp_path / "out", "--num_train_epochs", 0, "--eval_samples", 4, "--eval_fraction", 0.003)  # whatever max_steps says
    assert [m["step"] for m in metrics] == [0] and sorted(os.listdir(tmp_path / "out")) == [".lock", "args.json", "metrics.jsonl", "samples.jsonl"]
    m = metrics[0]
    assert m["eval/pass@1"] <= m["eval/pass@2"] <= m["eval/pass@4"]
    assert 0 < m["eval/majority@4"] < 1
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
    """The README's story in 8 steps: from the mistake of the demonstrations to at least 85 % right."""
    metrics = run(grpo, tmp_path / "out", "--max_steps", 8, "--eval_steps", 8)
    first, last = (m["eval/accuracy"] for m in metrics if "eval/accuracy" in m)
    assert first < 0.6 and last > 0.85
    names = sorted(os.listdir(tmp_path / "out"))
    assert names == [".lock", "args.json", "checkpoints", "metrics.jsonl", "model", "samples.jsonl"]
