"""ppo.py: rewards, advantages and losses by hand and by enumeration, one step cut in every way, policy and value, learning."""

import itertools
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import ROWS, TINY, RecordGradients, load_by_card, run, tiny_model
from torch import tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, OPTConfig, OPTForCausalLM

import common
import ppo
import reward_model

NAN = math.nan


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- rewards and advantages by hand --------------------------------------------------------------------------------------

def test_bound_scores_by_hand():
    """Score 3 under clip 2 and penalty 1: 2, cut 1. The penalty is not clipped away."""
    scores, cut = tensor([3.0, 3.0, -5.0, 0.5]), tensor([0.0, 1.0, 1.0, 1.0])
    close(ppo.bound_scores(scores, cut, 2.0, 1.0), tensor([2.0, 1.0, -3.0, -0.5]))
    close(ppo.bound_scores(scores, cut), scores)


CASES = {  # name -> mask, kl, rewards for score 1 and kl_coef 0.1, worked out by hand
    "EOS at once: one token": ([0, 0, 1, 0, 0], [9, 9, 2, 9, 9], [0, 0, 1 - 0.2, 0, 0]),
    "EOS early": ([0, 1, 1, 0, 0], [9, 2, 4, 9, 9], [0, -0.2, 1 - 0.4, 0, 0]),
    "cut at the limit: the mask goes to the end": ([0, 0, 1, 1, 1], [9, 9, 1, 2, 3], [0, 0, -0.1, -0.2, 1 - 0.3]),
    "no prompt token before it": ([1, 1, 0, 0, 0], [1, -1, 9, 9, 9], [-0.1, 1 + 0.1, 0, 0, 0]),
    "nothing counts": ([0, 0, 0, 0, 0], [9, 9, 9, 9, 9], [0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_per_token_rewards_by_hand(name):
    mask, kl, want = (tensor([x], dtype=torch.float32) for x in CASES[name])
    close(ppo.per_token_rewards(tensor([[1.0]]), kl, mask.long(), 0.1), want)


def test_per_token_rewards_of_unequal_rows_and_extra_padding():
    mask, kl, want = (torch.tensor([CASES[n][i] for n in CASES], dtype=torch.float32) for i in range(3))
    close(ppo.per_token_rewards(torch.ones(len(CASES), 1), kl, mask, 0.1), want)
    more = lambda x: torch.nn.functional.pad(x, (2, 3))
    close(ppo.per_token_rewards(torch.ones(len(CASES), 1), more(kl), more(mask), 0.1), more(want))
    assert kl.equal(torch.tensor([CASES[n][1] for n in CASES], dtype=torch.float32)), "inputs stay as they were"


def test_gae_by_hand():
    """gamma 1, lambda 0.95; rewards 0, 1, values 0.5, 0.6: deltas 0 + 0.6 - 0.5 = 0.1 and 1 - 0.6 = 0.4;
    A = 0.1 + 0.95 * 0.4 = 0.48 and 0.4; R = 0.98 and 1. One token, reward 1, value 0.25: A 0.75, R 1.
    Cut at the limit, rewards 0, 0, 2, values 1, 1, 1: deltas 0, 0, 1; A = 0.9025, 0.95, 1; R = 1.9025, 1.95, 2."""
    mask = tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]])
    rewards = tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    values = tensor([[NAN, 0.5, 0.6, NAN], [NAN, 0.25, NAN, NAN], [NAN, 1.0, 1.0, 1.0]])  # what is masked is never read
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 0.95)
    close(advantages, tensor([[0.0, 0.48, 0.4, 0.0], [0.0, 0.75, 0.0, 0.0], [0.0, 0.9025, 0.95, 1.0]]))
    close(returns, tensor([[0.0, 0.98, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 1.9025, 1.95, 2.0]]))
    padded = ppo.gae(*(torch.nn.functional.pad(x, (1, 4), value=7.0 if x is values else 0.0) for x in (rewards, values, mask)), 1.0, 0.95)
    for a, b in zip(padded, (advantages, returns)):
        assert a[:, 1:-4].equal(b) and not a[:, 0].any() and not a[:, -4:].any()


def test_gae_with_a_discount_by_hand():
    """gamma 0.5, lambda 0.5, rewards 1, 2, values 4, 2: deltas 1 + 0.5 * 2 - 4 = -2 and 2 - 2 = 0; A = -2, 0. With value
    3 at the end: deltas 1 + 1.5 - 4 = -1.5, -1; A = -1.5 + 0.25 * -1 = -1.75, -1; R = 2.25, 2."""
    ones = torch.ones(1, 2)
    close(ppo.gae(tensor([[1.0, 2.0]]), tensor([[4.0, 2.0]]), ones, 0.5, 0.5)[0], tensor([[-2.0, 0.0]]))
    advantages, returns = ppo.gae(tensor([[1.0, 2.0]]), tensor([[4.0, 3.0]]), ones, 0.5, 0.5)
    close(advantages, tensor([[-1.75, -1.0]]))
    close(returns, tensor([[2.25, 2.0]]))


def test_gae_equals_the_weighted_sum_of_k_step_estimates():
    """Schulman 2016, equation 16: A = (1 - lambda) sum_k lambda^(k-1) A^(k), the last one with all that is left of the weight."""
    g = torch.Generator().manual_seed(0)
    n, gamma, lam = 6, 0.9, 0.7
    r, v = torch.randn(1, n, generator=g), torch.randn(1, n, generator=g)
    got, _ = ppo.gae(r, v, torch.ones(1, n), gamma, lam)
    for t in range(n):
        k_step = [sum(gamma ** i * r[0, t + i] for i in range(k)) + (gamma ** k * v[0, t + k] if t + k < n else 0) - v[0, t]
                  for k in range(1, n - t + 1)]
        want = (1 - lam) * sum(lam ** i * a for i, a in enumerate(k_step[:-1])) + lam ** (n - t - 1) * k_step[-1]
        close(got[0, t], want)
    close(ppo.gae(r, v, torch.ones(1, n), 1.0, 1.0)[1], r.flip(-1).cumsum(-1).flip(-1))  # returns as they came


def test_whiten_by_hand_and_masked():
    """1, 2, 3: mean 2, variance 1, so -1, 0, 1. Padding counts for nothing, and equal values give 0."""
    x, mask = tensor([[1.0, 2.0, 99.0], [NAN, 3.0, -50.0]]), tensor([[1, 1, 0], [0, 1, 0]])
    close(ppo.whiten(x, mask), tensor([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    assert not ppo.whiten(torch.full((2, 3), 0.3), torch.ones(2, 3)).abs().gt(1e-3).any()
    assert ppo.whiten(tensor([[5.0, 1.0]]), tensor([[1, 0]])).eq(0).all(), "one token alone has no spread"


# ---- losses by hand ----------------------------------------------------------------------------------------------------

def test_policy_loss_by_hand():
    """Ratio 1.5 and 0.5, epsilon 0.2. A = 2: -min(3, 2.4) = -2.4; A = -2: 3. Ratio 0.5: A = 2: -1; A = -2: max(1, 1.6) = 1.6."""
    log = lambda *x: torch.log(tensor(x))[None].requires_grad_()
    new = log(1.5, 1.5, 0.5, 0.5, 1.0)
    loss, shown = ppo.policy_loss(new, torch.zeros(1, 5), tensor([[2.0, -2.0, 2.0, -2.0, 3.0]]), 0.2)
    close(loss, tensor([[-2.4, 3.0, -1.0, 1.6, -3.0]]))
    loss.sum().backward()
    close(new.grad, tensor([[0.0, 3.0, -1.0, 0.0, -3.0]]))  # -A ratio, or 0 where the clipped side is the larger loss
    close(shown["ratio"], tensor([[1.5, 1.5, 0.5, 0.5, 1.0]]))
    close(shown["ratio/deviation"], tensor([[0.5, 0.5, 0.5, 0.5, 0.0]]))
    assert shown["clip_ratio/high_mean"].tolist() == [[True, False, False, False, False]]
    assert shown["clip_ratio/low_mean"].tolist() == [[False, False, False, True, False]]


def test_value_loss_by_hand():
    """Return 1, old value 0, clip 0.2: v 0.5 -> clipped to 0.2, 0.5 * 0.64 = 0.32; v 0.1 -> 0.405; v -0.5 -> max(2.25, 1.44) / 2;
    v 1.5 -> max(0.25, 0.64) / 2 = 0.32."""
    v = tensor([[0.5, 0.1, -0.5, 1.5]]).requires_grad_()
    loss, shown = ppo.value_loss(v, torch.zeros(1, 4), torch.ones(1, 4), 0.2)
    close(loss, tensor([[0.32, 0.405, 1.125, 0.32]]))
    loss.sum().backward()
    close(v.grad, tensor([[0.0, -0.9, -1.5, 0.0]]))
    assert shown["clip_ratio/value_mean"].tolist() == [[True, False, False, True]], "where there is no gradient"
    loss, shown = ppo.value_loss(v.detach(), torch.zeros(1, 4), torch.ones(1, 4), 0)
    close(loss, tensor([[0.125, 0.405, 1.125, 0.125]]))
    assert not shown["clip_ratio/value_mean"].any()


def test_rounding_is_no_clipping_of_the_value():
    v, old, target = torch.randn(3, 1, 1000, generator=torch.Generator().manual_seed(0))
    for clip in (0, 100.0):
        assert not ppo.value_loss(v, old, target, clip)[1]["clip_ratio/value_mean"].any()


def test_adaptive_coefficient_by_hand():
    """Twice the target and more: x 1.02; 10 % above: x 1.01; none at all: x 0.98."""
    for kl, want in ((12.0, 0.102), (60.0, 0.102), (6.6, 0.101), (6.0, 0.1), (0.0, 0.098)):
        assert ppo.adapt_kl_coef(0.1, kl, 6.0) == pytest.approx(want)


def test_the_score_less_kl_has_the_gradient_of_reward_less_reverse_kl():
    """Exact enumeration over two tokens of a 4-token vocabulary: values 0, gamma = lambda = 1, k1 in the reward."""
    g = torch.Generator().manual_seed(1)
    first, second = torch.randn(4, generator=g).requires_grad_(), torch.randn(4, 4, generator=g).requires_grad_()
    ref, payoff, coef = torch.randn(5, 4, generator=g).log_softmax(-1), torch.randn(4, 4, generator=g), 0.3
    lp = lambda: torch.cat([first.log_softmax(-1)[None], second.log_softmax(-1)])  # (5, 4)
    now, loss = lp(), 0.0
    for x, y in itertools.product(range(4), range(4)):
        new, base = (torch.stack([t[0, x], t[1 + x, y]])[None] for t in (now, ref))
        old, mask = new.detach(), torch.ones(1, 2)
        rewards = ppo.per_token_rewards(payoff[x, y][None, None], ppo.kl_k1(old, base), mask, coef)
        advantages, _ = ppo.gae(rewards, torch.zeros(1, 2), mask, 1.0, 1.0)
        loss = loss + old.sum().exp() * ppo.policy_loss(new, old, advantages, 0.2)[0].sum()
    got = torch.autograd.grad(loss, (first, second))
    now = lp()
    joint = now[0].exp()[:, None] * now[1:].exp()  # (4, 4)
    kl = (joint * (now[0][:, None] + now[1:] - ref[0][:, None] - ref[1:])).sum()
    want = torch.autograd.grad(-((joint * payoff).sum() - coef * kl), (first, second))
    for a, b in zip(got, want):
        close(a, b)


def test_distinct_n_and_the_signs_of_over_optimisation():
    assert common.distinct_n([1, 2, 3, 4, 5], 4) == 1 and common.distinct_n([1, 2], 4) == 1
    assert common.distinct_n([1, 2, 3, 4, 1, 2, 3, 4], 4) == 0.8 and common.distinct_n([7] * 13, 4) == 0.1

    def signs(seen, held=()):
        said = []
        run = SimpleNamespace(state={"first": first, "held_rewards": list(held)}, samples_file="samples.jsonl", flat_rollouts=0, args=SimpleNamespace(kl_warn=5.0),
                              warn=lambda name, sign, sentence: said.extend([sentence] * bool(sign)))
        run.warn_of_kl = lambda *a: common.Run.warn_of_kl(run, *a)
        ppo.warn_of_signs(run, seen)
        return said
    first = {"completions/mean_length": 10.0, "completions/distinct_4": 0.8}
    fine = first | {"kl_sequence": 3.0, "score": 1.0, "score_std": 1.0}
    assert signs(fine) == []
    for change, word in (({"kl_sequence": 5.1}, "--kl_coef"), ({"kl_sequence": -2.0}, "no KL is negative"),
                         ({"completions/mean_length": 21.0}, "paying for length"), ({"score_std": 1e3}, "--score_clip"), ({"completions/distinct_4": 0.3}, "30% of their 4-grams")):
        (sentence,) = signs(fine | change)
        assert word in sentence and sentence.endswith("samples.jsonl")
    repeats = fine | {"completions/distinct_4": 0.3}  # which may be right while the held-out reward rises
    assert signs(repeats, [0.4, 0.5]) == [] and len(signs(repeats, [0.5, 0.4])) == len(signs(repeats, [0.5])) == 1


def test_rows_are_taken_in_one_permutation_after_another():
    order = ppo.endless_order(0, 9, 3, 0, "sft")
    assert sorted(order[:3]) == sorted(order[3:6]) == sorted(order[6:]) == [0, 1, 2] and len({tuple(order[i:i + 3]) for i in (0, 3, 6)}) > 1
    assert ppo.endless_order(4, 3, 3, 0, "sft") == order[4:7]


# ---- one step, cut in every way ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """The folder of a reward model, hardly trained."""
    out = tmp_path_factory.mktemp("scorer") / "out"
    run(reward_model, out, "--max_steps", 2, "--batch_size", 8, "--eval_fraction", 0)
    return str(out / "model")


def gradient(monkeypatch, tmp_path, *flags):
    monkeypatch.setattr(ppo, "make_optimizer", RecordGradients)
    metrics = run(ppo, tmp_path / "-".join(map(str, flags)).replace("/", "_")[-60:], "--eval_fraction", 0, "--batch_size", 12,
                  "--max_grad_norm", 0, "--max_steps", 1, "--num_iterations", 1, "--num_minibatches", 1, *flags)
    return RecordGradients.last.gradients, metrics


ADDITION = os.path.join(TINY, "addition.jsonl")


@pytest.mark.promise("any cut")
@pytest.mark.parametrize("flags", [
    (), ("--share_trunk",), ("--lora_r", 4), ("--share_trunk", "--lora_r", 4, "--num_generations", 2),
    ("--num_minibatches", 2, "--max_completion_length", 62, "--missing_eos_penalty", 1, "--score_clip", 0.5),
    ("--sft_dataset", ADDITION, "--sft_coef", 0.5, "--max_completion_length", 50)], ids=str)  # some of those rows are the longest
def test_the_gradient_does_not_depend_on_micro_batch_tokens_or_checkpointing(monkeypatch, tmp_path, flags):
    monkeypatch.setattr(ppo, "SFT_FRACTION", 0.5)
    whole, _ = gradient(monkeypatch, tmp_path, *flags)
    assert max(g.norm() for g in whole) > 1e-3
    for cut in (("--micro_batch_tokens", 1), ("--micro_batch_tokens", 300), ("--gradient_checkpointing", "--rollout_batch_size", 5)):
        for a, b in zip(gradient(monkeypatch, tmp_path, *flags, *cut)[0], whole):
            assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.promise("formulas")
@pytest.mark.parametrize("share", [False, True])
def test_the_step_equals_the_formula_computed_row_by_row_with_plain_transformers(monkeypatch, tmp_path, scorer, share):
    """The loss of the very rollout, on unpadded rows, from the models' own logits and hidden states; the second update, so
    that old and new differ; advantages and returns from their definitions (sums, no recursion); no number is a default."""
    kept, moved = [], []
    rollout = ppo.rollout
    monkeypatch.setattr(ppo, "rollout", lambda *a, **k: kept.append(rollout(*a, **k)) or kept[-1])

    class Nudge(RecordGradients):
        def step(self, closure=None):
            super().step()
            with torch.no_grad():
                for i, p in enumerate(self.param_groups[0]["params"]):
                    p.add_(0.02 * torch.sin(torch.arange(p.numel()) + i).view_as(p))
    monkeypatch.setattr(ppo, "make_optimizer", Nudge)
    run(ppo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 12, "--max_grad_norm", 0, "--max_steps", 2, "--num_iterations", 2,
        "--num_minibatches", 1, "--temperature", 0.9, "--reward_funcs", "accuracy", scorer, "--reward_weights", 1, 0.3, "--vf_coef", 0.7,
        "--epsilon", 0.15, "--value_clip", 0.1, "--gamma", 0.98, "--gae_lambda", 0.9, "--kl_coef", 0.1, "--system_prompt", "Add.", "--max_completion_length", 62, *(["--share_trunk"] if share else []))
    got = Nudge.last.gradients[1]
    records = common.flat(kept[0][0])

    policy, ref = (AutoModelForCausalLM.from_pretrained(os.path.join(TINY, "sft"), dtype=torch.float32) for _ in range(2))
    judge = AutoModelForSequenceClassification.from_pretrained(scorer, dtype=torch.float32)
    critic, weight = judge.model, 0.3 * judge.score.weight.detach()
    if share:
        critic, weight = policy.model, torch.zeros_like(weight)
    weight.requires_grad_()
    params = [*policy.parameters(), *([] if share else critic.parameters()), weight]

    def both(record, model):
        ids, n = record["input_ids"].long(), len(record["completion_ids"])
        lp = (model(ids[None]).logits[0] / 0.9).log_softmax(-1)[:-1].gather(-1, ids[1:, None]).squeeze(-1)[-n:]
        return lp, (critic(ids[None]).last_hidden_state[0, :-1] @ weight.T).squeeze(-1)[-n:]
    start = []
    for record in records:
        with torch.no_grad():
            old, value = both(record, policy)
            kl = old - both(record, ref)[0]
        reward = -0.1 * kl
        ids = record["input_ids"].long()
        with torch.no_grad():
            judged = judge(ids[None]).logits.item()  # read at the last token: EOS, or where it was cut
        assert judged == pytest.approx(record["rewards_per_func"][1].item(), abs=1e-4) or "\ufffd" in record["text"]  # no text
        reward[-1] += 1.0 * record["rewards_per_func"][0] + 0.3 * record["rewards_per_func"][1]
        n = len(reward)
        delta = reward + 0.98 * torch.cat([value[1:], torch.zeros(1)]) - value
        a = torch.stack([sum((0.98 * 0.9) ** k * delta[t + k] for k in range(n - t)) for t in range(n)])
        start.append((old, value, a, a + value))
    flat = torch.cat([a for _, _, a, _ in start])
    with torch.no_grad():
        for i, p in enumerate(params):
            p.add_(0.02 * torch.sin(torch.arange(p.numel()) + i).view_as(p))
    loss = 0.0
    for record, (old, value, a, target) in zip(records, start):
        lp, v = both(record, policy)
        a = (a - flat.mean()) / (flat.var() + 1e-8).sqrt()
        ratio = (lp - old).exp()
        surrogate = torch.minimum(ratio * a, torch.clamp(ratio, 0.85, 1.15) * a)
        clipped = torch.clamp(v, value - 0.1, value + 0.1)
        loss = loss + (-surrogate + 0.7 * 0.5 * torch.maximum((v - target) ** 2, (clipped - target) ** 2)).sum() / len(flat)
        moved.append((ratio - 1).abs().max().item())
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])
    assert {r["truncated"] for r in records} == {True, False} and max(moved) > 0.2
    assert (got - want).norm() / want.norm() < 1e-5


@pytest.mark.promise("ratio")
def test_the_first_update_of_every_rollout_has_ratio_one_and_later_ones_have_not(tmp_path):
    metrics = run(ppo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 8, "--num_iterations", 2, "--num_minibatches", 2,
                  "--max_steps", 8, "--temperature", 0.8)
    assert len(metrics) == 8
    assert all(m["ratio/deviation"] < 1e-5 for m in metrics[::4])
    assert all(m["ratio/deviation"] > 1e-5 for m in metrics[2::4])
    assert abs(metrics[0]["kl"]) < 1e-5 < abs(metrics[-1]["kl"])
    assert all(m["sampling/logprob_difference"] < 1e-3 for m in metrics[::4])


# ---- policy, value, reference, reward ------------------------------------------------------------------------------------

def all_but_the_first(ids):
    """A mask of ones; nothing predicts token 0."""
    return torch.cat([torch.zeros_like(ids[:, :1]), torch.ones_like(ids[:, 1:])], 1)


def made(*flags):
    """(args, policy, trunk, head) as main makes them."""
    args = common.parse_args(ppo.Args, [os.path.join(TINY, "ppo.json"), *map(str, flags)])
    tokenizer = common.load_tokenizer(args)
    model = common.load_model(args, tokenizer)
    run = SimpleNamespace(tokenizer=tokenizer, device="cpu", accelerator=SimpleNamespace(is_fsdp2=False))
    start = common.value_start(args, common.load_rewards(args), tokenizer)
    return args, model, *ppo.make_value(args, start, model, run)[1:]


@pytest.mark.promise("value")
def test_the_value_starts_as_the_reward_model(scorer):
    """At every position the value is the score that plain transformers reads there."""
    _, model, trunk, head = made("--reward_funcs", "accuracy", scorer, "--reward_weights", 1, 0.5)
    judge = AutoModelForSequenceClassification.from_pretrained(scorer)
    ids = tensor([AutoTokenizer.from_pretrained(scorer)("48+27=65")["input_ids"]])
    _, values, _ = ppo.PolicyValue(model, trunk, head)(ids, all_but_the_first(ids))
    want = tensor([[0.0] + [0.5 * judge(ids[:, :t]).logits.item() for t in range(1, ids.shape[1])]])
    close(values.detach(), want, 1e-5)


@pytest.mark.parametrize("flags", [(), ("--lora_r", 4), ("--share_trunk",), ("--lora_r", 4, "--share_trunk")], ids=str)
def test_without_a_reward_model_the_value_starts_at_zero_on_the_policys_trunk(flags):
    _, model, trunk, head = made(*flags)
    module = ppo.PolicyValue(model, trunk, head)
    ids = torch.randint(0, 256, (2, 9))
    mask = all_but_the_first(ids)
    assert not module(ids, mask)[1].any()
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    if trunk is not None:
        ours = list(trunk.parameters())
        assert all(p.requires_grad or id(p) in frozen for p in ours), "frozen weights are shared, not copied"
        assert not {id(p) for p in ours if p.requires_grad} & {id(p) for p in model.parameters()}, "trained ones are its own"
        assert sum(p.requires_grad for p in ours) == sum("lm_head" not in n and p.requires_grad for n, p in model.named_parameters())
    nn = torch.nn.init.normal_(head.weight)
    before = module(ids, mask)[0]
    values = module(ids, mask)[1]
    values.sum().backward()
    reached = any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert nn is head.weight and reached == (trunk is None), "the value's gradient reaches the policy only through a shared trunk"
    assert before.equal(module(ids, mask)[0])


@pytest.mark.promise("value")
@pytest.mark.parametrize("flags", [("--lora_r", 4), ()], ids=str)
def test_a_reward_models_adapter_is_a_value_too(flags, tmp_path):
    run(reward_model, tmp_path / "rm", "--max_steps", 2, "--batch_size", 8, "--eval_fraction", 0, "--lora_r", 2)
    folder = str(tmp_path / "rm" / "model")
    metrics = run(ppo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 4, "--max_steps", 4, "--reward_funcs", f"{folder}:score", *flags)
    assert all(m["grad_norm"] > 0 for m in metrics) and "rewards/rm_score/mean" in metrics[0]


@pytest.mark.parametrize("flags", [(), ("--load_in_4bit",), ("--modules_to_save", "lm_head")], ids=str)
def test_beside_an_adapter_the_value_is_an_adapter_too(flags, scorer, tmp_path):
    """Whatever trains the policy trains the value: rank 4 on a frozen base, never a whole model."""
    first = [] if "--modules_to_save" in flags else ["--model_name_or_path", tmp_path / "first" / "model"]
    if first:
        run(ppo, tmp_path / "first", "--eval_fraction", 0, "--batch_size", 2, "--max_steps", 1, "--lora_r", 4)
    _, model, trunk, _ = made("--reward_funcs", scorer, *first, *(["--lora_r", 4] if not first else []), *flags)
    trained = {n for n, p in trunk.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained) and next(p for n, p in trunk.named_parameters() if "lora_A" in n).shape[0] == 4


def ended(monkeypatch, out, *flags):
    """A run that moves its value far -> (ids of rows, the values that it ended with, of the state after each token)."""
    made, init = [], ppo.PolicyValue.__init__
    out.with_suffix(".py").write_text("def length(completions):\n    return [len(c) % 7 / 2 for c in completions]\n")
    monkeypatch.setattr(ppo.PolicyValue, "__init__", lambda self, *a: made.append(self) or init(self, *a))
    run(ppo, out, "--eval_fraction", 0, "--batch_size", 4, "--max_steps", 8, "--learning_rate", 1e-2, "--lr_scheduler_type", "constant",
        "--reward_funcs", f"{out}.py:length", *flags)
    monkeypatch.setattr(ppo.PolicyValue, "__init__", init)
    ids = torch.cat([torch.arange(40, 60), tensor([260])])[None]  # the end of turn is a row's last token, as it is in a rollout
    return ids, after_each(made[-1], ids)


def after_each(module, ids):
    """The values of the states after each token of one row."""
    longer = torch.cat([ids, ids[:, :1]], 1)
    return module(longer, all_but_the_first(longer))[1].detach()[0, 1:]


@pytest.mark.promise("value")
@pytest.mark.parametrize("kind, flags", [
    ("tied", ()), ("untied", ()), ("gpt2", ()), ("tied", ("--lora_r", 4)), ("tied", ("--lora_r", 4, "--load_in_4bit")), ("tied", ("--share_trunk",)),
    ("untied", ("--lora_r", 4, "--share_trunk")), ("untied", ("--lora_r", 4, "--modules_to_save", "lm_head", "embed_tokens")),
    ("scorer", ()), ("scorer", ("--lora_r", 4))], ids=str)
def test_the_saved_value_is_the_trained_one_and_starts_another(kind, flags, tmp_path, monkeypatch, tokenizer):
    """In plain transformers and peft, as the card says, in a padded batch of all beginnings of a row, that which ends in an end of
    turn too. --value_model goes on from the same numbers. A scorer is one of several scores."""
    tokenizer.pad_token = tokenizer.eos_token  # of which a reward model's folder must not make its pad token
    if kind in ("untied", "gpt2"):
        model = tiny_model({"untied": "llama"}.get(kind, kind))
        model.save_pretrained(tmp_path / "start")
        tokenizer.save_pretrained(tmp_path / "start")
        flags += ("--model_name_or_path", tmp_path / "start", "--max_prompt_length", 64)
    if kind == "scorer":
        config = common.score_config(["right", "short"], tokenizer)
        AutoModelForSequenceClassification.from_pretrained(os.path.join(TINY, "sft"), **config).save_pretrained(tmp_path / "rm")
        tokenizer.save_pretrained(tmp_path / "rm")
        flags += ("--reward_funcs", "accuracy", f"{tmp_path / 'rm'}:short", "--reward_weights", 1, -0.5)
    ids, values = ended(monkeypatch, tmp_path / "a", *flags)
    folder = tmp_path / "a" / "value"
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.pad_token_id not in (None, saved.eos_token_id)
    model = load_by_card(folder)
    assert model.config.id2label == {0: "value"}
    batch = saved.pad({"input_ids": [ids[0, :n + 1].tolist() for n in range(ids.shape[1])]}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        close(model(**batch).logits.squeeze(-1), values, 1e-4)
    assert values.std() > 2e-3 and values[-1].abs() > 1e-3, "training changed too little"
    _, score = common.load_reward_model(str(folder))
    assert score([[common.turn("user", "1+1"), common.turn("assistant", "2")]]).isfinite().all()
    if "--share_trunk" not in flags:
        _, policy, trunk, head = made(*flags, "--value_model", folder)
        close(after_each(ppo.PolicyValue(policy, trunk, head), ids), values, 1e-5)


def test_a_run_starts_from_value_and_resumes_with_it_alone(monkeypatch, tmp_path):
    ended(monkeypatch, tmp_path / "a")
    flags = ["--eval_fraction", 0, "--batch_size", 4, "--max_steps", 8, "--save_steps", 4, "--value_model", tmp_path / "a" / "value"]
    metrics = run(ppo, tmp_path / "b", *flags)
    for name in ("model", "value"):
        os.rename(tmp_path / "b" / name, tmp_path / name)
    assert run(ppo, tmp_path / "b", *flags, "--resume_from_checkpoint", "latest") == metrics
    for name in ("model", "value"):  # a complete run writes them again
        assert (tmp_path / "b" / name / "model.safetensors").read_bytes() == (tmp_path / name / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "b" / "args.json").read_text())["value_model"] == str(tmp_path / "a" / "value")
    ended(monkeypatch, tmp_path / "a", "--seed", 1)
    with pytest.raises(common.UserError, match="written with other files of .*value: give the same"):
        run(ppo, tmp_path / "b", *flags, "--resume_from_checkpoint", "latest")


def test_what_no_value_can_start_from_is_refused(scorer, tmp_path, tokenizer, monkeypatch):
    def refused(sentence, *flags):
        loads = []
        monkeypatch.setattr(common, "load_model", lambda *a, **k: loads.append(a))
        with pytest.raises(common.UserError, match=sentence):
            run(ppo, tmp_path / "out", *flags)
        assert not loads, "before a model is loaded"
    refused("--value_model .* has no effect beside --share_trunk: leave it out", "--share_trunk", "--value_model", scorer)
    refused("no such model folder: ./none", "--value_model", "./none")
    refused("--value_model .*sft is no causal model with a score head: the value cannot start from it", "--value_model", os.path.join(TINY, "sft"))
    several = AutoModelForSequenceClassification.from_pretrained(scorer, num_labels=1)
    several.config.update(common.score_config(["right", "short"], tokenizer))
    several.config.save_pretrained(tmp_path / "several")
    tokenizer.save_pretrained(tmp_path / "several")
    refused(r"has several scores \(right, short\): the value cannot start from it", "--value_model", tmp_path / "several")
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": os.path.join(TINY, "sft")}
    tokenizer.save_pretrained(tmp_path / "policy")
    (tmp_path / "policy" / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "policy" / "adapter_model.safetensors").write_bytes(b"")
    refused("policy is no causal model with a score head", "--value_model", tmp_path / "policy")
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "several")
    refused("has another tokenizer: the value cannot start from it", "--value_model", tmp_path / "several")
    os.remove(tmp_path / "several" / "tokenizer.json")
    refused("cannot read .*several", "--value_model", tmp_path / "several")


def test_a_checkpoint_of_a_value_with_a_bias_is_another_versions(tmp_path, monkeypatch):
    flags = [tmp_path / "out", "--eval_fraction", 0, "--batch_size", 2, "--max_steps", 4, "--max_completion_length", 8]
    make = ppo.make_value_head

    def with_bias(weight):
        head = make(weight)
        head.bias = torch.nn.Parameter(torch.zeros(1))
        return head
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "make_value_head", with_bias)
        run(ppo, *flags)
    with pytest.raises(common.UserError, match="cannot be restored: it has moments of weights that this model lacks: another version"):
        run(ppo, *flags, "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("known", [True, False])
def test_a_value_that_no_reward_model_can_hold_is_said(known, monkeypatch, tmp_path, capsys):
    if not known:
        monkeypatch.setattr(common.AutoModelForSequenceClassification, "_model_mapping", {})
    run(ppo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 2, "--max_steps", 1, "--max_completion_length", 8)
    said = "transformers has no reward models of type llama: no value/ is written" in capsys.readouterr().out
    assert said != known and os.path.exists(tmp_path / "out" / "value") == known and os.path.exists(tmp_path / "out" / "model")


def test_a_reward_model_of_another_tokenizer_does_not_start_the_value(scorer, tmp_path, tokenizer, capsys):
    import shutil
    shutil.copytree(scorer, tmp_path / "rm")
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "rm")
    made("--reward_funcs", tmp_path / "rm")
    out = capsys.readouterr().out
    assert "has another tokenizer: the value cannot start from it" in out and "a copy of the policy's" in out


@pytest.mark.promise("reference")
@pytest.mark.parametrize("start", ["lora", "adapter", "full", "4bit"])
def test_the_reference_is_the_start_and_stays(monkeypatch, tmp_path, start):
    """kl is 0 at first and the reference's log-probs do not move, however the reference is kept."""
    flags = ["--eval_fraction", 0, "--batch_size", 4, "--max_steps", 8, "--learning_rate", 1e-3, "--reward_funcs", "format", "accuracy",
             "--temperature", 1.5]
    flags += ["--lora_r", 4] if start in ("lora", "4bit") else []
    flags += ["--load_in_4bit"] if start == "4bit" else []
    if start == "adapter":
        run(ppo, tmp_path / "first", *flags, "--lora_r", 4)
        flags += ["--model_name_or_path", tmp_path / "first" / "model"]
    seen = []
    annotate = common.Run.annotate

    def spy(self, rows, module, *rest):
        annotate(self, rows, module, *rest)
        if not isinstance(module, ppo.PolicyValue):
            ids = torch.arange(40, 60)[None]
            seen.append(module(ids, all_but_the_first(ids))[0].detach())
    monkeypatch.setattr(common.Run, "annotate", spy)
    metrics = run(ppo, tmp_path / "second", *flags)
    assert abs(metrics[0]["kl"]) < 1e-5 < abs(metrics[-1]["kl"]) and len(seen) == 2  # a mean of log ratios: either sign
    assert torch.equal(seen[0], seen[1])


def test_without_kl_there_is_no_reference(tmp_path, capsys):
    metrics = run(ppo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 4, "--max_steps", 4, "--kl_coef", 0)
    assert "kl" not in metrics[0] and metrics[0]["rlhf_reward"] == pytest.approx(metrics[0]["score"])
    assert "reference " not in capsys.readouterr().out


def test_clip_penalty_and_weights_reach_the_score(tmp_path):
    """Every completion is cut at 5 tokens and scores 4 x 0.5: clipped at 1.5, less the penalty of 2."""
    (tmp_path / "r.py").write_text("def four(completions):\n    return [4.0] * len(completions)\n")
    metrics = run(ppo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 4, "--max_steps", 1, "--max_completion_length", 5,
                  "--reward_funcs", f"{tmp_path}/r.py:four", "--reward_weights", 0.5, "--score_clip", 1.5, "--missing_eos_penalty", 2)
    m = metrics[0]
    assert m["completions/clipped_ratio"] == 1 and m["rewards/four/mean"] == 4 and m["rewards/four/weighted"] == m["reward"] == 2
    assert m["score"] == pytest.approx(-0.5) and m["rlhf_reward"] == pytest.approx(-0.5, abs=1e-4)


def test_a_completion_that_nothing_scores_is_left_out(tmp_path):
    (tmp_path / "r.py").write_text("def some(completions):\n    return [None if i % 2 else 1.0 for i in range(len(completions))]\n"
                                   "def none(completions):\n    return [None] * len(completions)\n")
    flags = ["--eval_fraction", 0, "--batch_size", 6, "--max_steps", 1, "--num_iterations", 1, "--num_minibatches", 1,
             "--temperature", 0.5]  # sober, so that a character is a token
    half = run(ppo, tmp_path / "a", *flags, "--reward_funcs", f"{tmp_path}/r.py:some")[0]
    with open(tmp_path / "a" / "samples.jsonl") as file:
        scored = [row for row in map(json.loads, file) if row["some"] is not None]
    assert half["trained_tokens"] == sum(len(row["completion"]) + 1 for row in scored) and len(scored) == 3
    with pytest.raises(common.UserError, match="no reward function applies to any completion"):
        run(ppo, tmp_path / "b", *flags, "--reward_funcs", f"{tmp_path}/r.py:none")


def test_the_coefficient_follows_the_target(tmp_path):
    """A KL of 0 against a target of 1: x 0.98 a rollout; the reward uses the coefficient before its change."""
    metrics = run(ppo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 4, "--max_steps", 12, "--kl_target", 1,
                  "--learning_rate", 1e-9, "--kl_coef", 0.5)
    assert [m["kl_coef"] for m in metrics[::4]] == pytest.approx([0.5, 0.49, 0.4802])


def test_the_target_is_compared_with_the_kl_of_a_completion(tmp_path):
    """Not with that of a token, which is some fifty times smaller: a target between the two tells them apart."""
    metrics = run(ppo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 16, "--max_steps", 12, "--kl_target", 5,
                  "--learning_rate", 1e-3, "--warmup_steps", 0, "--kl_coef", 0.5)[::4]
    assert any(m["kl"] < 5 < m["kl_sequence"] for m in metrics[:-1])
    for now, after in zip(metrics, metrics[1:]):
        error = (now["kl_sequence"] - 5) / 5
        assert after["kl_coef"] == pytest.approx(now["kl_coef"] * (1 + 0.1 * max(-0.2, min(0.2, error))))


@pytest.mark.promise("formulas")
def test_ptx_adds_the_gradient_of_the_mixed_rows_nll(monkeypatch, tmp_path):
    """gradient(with) - gradient(without) = sft_coef x d mean NLL at --temperature, by plain transformers on the rows that were
    taken."""
    monkeypatch.setattr(ppo, "SFT_FRACTION", 0.5)
    rows = [json.loads(line) for line in open(ADDITION)][:7]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ["--temperature", 0.9, "--micro_batch_tokens", 1]  # a row each: then the value's gradient is a sum in the same order
    (without,), (plain,) = gradient(monkeypatch, tmp_path, *flags)
    (mixed,), (metrics,) = gradient(monkeypatch, tmp_path, *flags, "--sft_dataset", tmp_path / "sft.jsonl", "--sft_coef", 0.5)
    model = AutoModelForCausalLM.from_pretrained(os.path.join(TINY, "sft"))
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(TINY, "sft"))
    total = tokens = 0
    for i in ppo.endless_order(0, 6, 7, 0, "sft"):
        turns = [{"role": "user", "content": rows[i]["prompt"]}, {"role": "assistant", "content": rows[i]["completion"]}]
        ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        n = len(tokenizer(rows[i]["completion"], add_special_tokens=False)["input_ids"]) + 1
        end = max(j for j, t in enumerate(ids) if t == tokenizer.eos_token_id) + 1
        lp = (model(tensor([ids])).logits[0] / 0.9).log_softmax(-1)[:-1].gather(-1, tensor(ids)[1:, None]).squeeze(-1)
        total, tokens = total - lp[end - 1 - n:end - 1].sum(), tokens + n
    (total / tokens).backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    extra = mixed - without
    assert not extra[len(want):].any(), "the value learns nothing from it"
    assert (extra[:len(want)] - 0.5 * want).norm() / want.norm() < 1e-5
    assert all(metrics[name] == plain[name] for name in ("trained_tokens", "entropy", "policy_loss", "value_loss", "num_tokens"))
    assert metrics["sft_loss"] == pytest.approx((total / tokens).item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(mixed.norm().item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(metrics["policy_loss"] + 1.0 * metrics["value_loss"] + 0.5 * metrics["sft_loss"], abs=1e-5)


def test_flat_scores_are_said_aloud(tmp_path, capsys):
    (tmp_path / "r.py").write_text("def same(completions):\n    return [1.0] * len(completions)\n")
    run(ppo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 2, "--max_steps", 12, "--reward_funcs", f"{tmp_path}/r.py:same")
    assert capsys.readouterr().out.count("for 3 rollouts all completions have scored the same") == 1


def test_held_out_prompts_are_not_demonstrated(tmp_path, capsys):
    run(ppo, tmp_path / "out", "--batch_size", 2, "--max_steps", 1, "--sft_dataset", ADDITION, "--sft_coef", 0.1, "--max_completion_length", 40)
    out = capsys.readouterr().out
    assert f"{ROWS - 30} examples for the SFT term; 30 rows of held-out prompts left out\n" in out


def test_warnings_are_printed_once_while_they_hold(tmp_path, capsys):
    (tmp_path / "r.py").write_text("def large(completions):\n    return [100.0 + len(c) for c in completions]\n")
    run(ppo, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 2, "--max_steps", 12, "--reward_funcs", f"{tmp_path}/r.py:large")
    out = capsys.readouterr().out
    assert out.count("warning  scores are around") == 1 and f"Look at {tmp_path / 'out' / 'samples.jsonl'}" in out


def test_each_update_takes_the_next_demonstrations():
    """A tenth of an update's 20 completions is two: three updates see each of 6 once, the next three in a new order."""
    args = SimpleNamespace(batch_size=20, num_generations=2, num_minibatches=2, seed=3)
    demonstrations = [{"trained": 1, "mark": mark} for mark in range(6)]
    drawn = [[row["mark"] for row in ppo.nll_rows(demonstrations, step, 0, args)] for step in range(6)]
    assert [len(marks) for marks in drawn] == [2] * 6
    first, second = sum(drawn[:3], []), sum(drawn[3:], [])
    assert sorted(first) == sorted(second) == list(range(6)) and first != second


@pytest.mark.parametrize("flags", [[], ["--share_trunk"], ["--lora_r", 4]])
def test_a_trunk_that_gives_fewer_numbers_than_its_layers_have(tmp_path, flags):
    """As OPT-350m's does: the value's head is as wide as the policy's."""
    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig(vocab_size=320, hidden_size=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=4096, word_embed_proj_dim=32,
                             do_layer_norm_before=False, dropout=0.0, pad_token_id=256, bos_token_id=1, eos_token_id=260)).save_pretrained(tmp_path / "opt")
    AutoTokenizer.from_pretrained(os.path.join(TINY, "sft")).save_pretrained(tmp_path / "opt")
    metrics = run(ppo, tmp_path / "out", "--model_name_or_path", tmp_path / "opt", "--reward_funcs", "edit_distance", "--eval_fraction", 0, "--max_steps", 1,
                  "--batch_size", 4, "--max_completion_length", 8, *flags)
    assert metrics[0]["sampling/logprob_difference"] < 1e-4
