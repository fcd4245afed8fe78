"""grpo.py - reinforcement learning with group-relative advantages: a policy learns from its scored samples.

Objective   maximise the mean over tokens of
            min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) - kl_coef * ratio * k3,
            A = (score - mean of its group) / (std of its group + 1e-4); Shao 2024, arXiv 2402.03300 (GRPO).
            Variants: --loss_type and --epsilon_high, Yu 2025, arXiv 2503.14476 (DAPO); --loss_type dr_grpo
            --scale_rewards none, Liu 2025, arXiv 2503.20783 (Dr. GRPO); --importance_sampling_level sequence,
            Zheng 2025, arXiv 2507.18071 (GSPO).
Shapes      N prompts, G completions of each, F reward functions; B rows of a micro-batch, T tokens of a row,
            prompt and completion, C of them the completion's; V vocabulary, d hidden size. Index t of a
            (B, T) tensor is about token t: the causal shift is in Policy.logprobs alone.

Differences from the papers
1. The KL term is ratio * k3, both factors attached and unclipped. Its gradient is that of the reverse KL, on
   and off policy; k3 alone, as in GRPO's equation 4, has another one. kl_coef is 0 by default.
2. A group whose scores are all equal has advantage exactly 0; the share of such groups is logged.
3. Every denominator is fixed for the whole step, over all processes, before the first micro-batch.
4. --drop_flat_groups looks at the whole score; DAPO at correctness. It draws at most 10 times.
5. --loss_type dr_grpo still divides by the std: add --scale_rewards none.
6. With --importance_sampling_level sequence the KL term keeps each token's own ratio.
7. --best_fraction (RAFT) and --demo_threshold (Lv 2025) add an NLL term that none of the papers above has.
8. With --rollout_lag 1 the old policy is the one that sampled: as it was before the previous rollout's
   updates. A run's first rollout has no lag.
Differences from TRL's GRPOTrainer
1. batch_size counts the prompts of a rollout; num_minibatches splits it, num_iterations repeats it.
2. What is sampled is what is scored: the whole softmax at --temperature, without top-k, top-p or penalties.
3. A completion's random numbers depend on (seed, step, its place in the rollout) alone.
4. A completion that no reward function scores is left out of the loss and its denominators; TRL keeps it.
5. A prompt that is a string becomes a user's turn of the chat template; TRL tokenizes it as it is.
6. Evaluation is greedy. reward_std is the mean over groups of the std inside. log_extra is ignored.

Metrics, of a step or, where it says so, of the rollout that its rows come from
loss                            the objective, negated, + sft_coef * NLL: near 0, so watch the reward
reward, reward_std              mean score, --overlong_penalty included; std inside a group, mean over groups
rewards/<name>/mean, /std, /weighted      one reward function where it applies; its mean after its weight
frac_reward_zero_std            share of groups whose scores are all equal: they teach nothing
completions/mean_length, completions/clipped_ratio   tokens; share that was cut at --max_completion_length
completions/distinct_4          share of different 4-grams inside a completion; a fall means repetition
entropy                         mean entropy of the policy at the sampled tokens, nats
kl                              mean k3 a token, nats: in a first update, of a rollout without a lag, an
                                estimate of KL(policy, reference)
ratio, ratio/deviation          mean ratio; mean distance from 1, about 0 in a rollout's first update, which
                                with --rollout_lag 1 shows how stale its samples are
clip_ratio/low_mean, clip_ratio/high_mean   share of tokens whose ratio is clipped below, above
sampling/logprob_difference, sampling/logprob_difference/max   |trainer - sampler|, a rollout's first update
nll_loss                        mean NLL a token of the best completions and of demonstrations
best_fraction, best_length      share of completions that were best in their group; their mean length
demo_fraction                   share of groups that were replaced by a demonstration
draws, groups                   with --drop_flat_groups: draws of a rollout, groups that it trains on
grad_norm, learning_rate        before clipping; of this update
num_tokens, trained_tokens      tokens so far, every pass counted; sampled ones that count in this step
eval/reward, eval/accuracy      of greedy held-out completions: mean score, no length penalty; share right
eval/pass@k                     with --eval_samples: chance that at least one of k samples is right
eval/majority@k, eval/best_of@k, eval/weighted_vote@k   share of prompts where the chosen one of k is right

Run   python grpo.py                                                  the small example, CPU, under a minute
      python grpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my.jsonl --lora_r 16
      accelerate launch --multi_gpu --num_processes 8 grpo.py ... --reward_funcs my.py:reward
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import common  # first: it quiets the libraries below
from common import EVAL, LAGS, arg, parse_args, require, say, stream
from common import accuracy  # noqa: F401: the built-in reward, for those who call it from here

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from peft import PeftModel
from torch import nn


# ---- arguments ---------------------------------------------------------------------------------------------

@dataclass
class Args(common.Args):
    ZERO_EPOCHS = True  # only evaluates
    # data
    format: str | None = arg(None, "column of the prompt: prompt, instruction or question")
    max_prompt_length: int = arg(512, "prompts with more tokens are dropped and counted", above=0)
    # rewards
    reward_funcs: list[str] = arg(["accuracy"], "accuracy, format, edit_distance, json, code, "
                                  "FILE.py:function or a reward model's FOLDER[:score]")
    reward_weights: list[float] | None = arg(None, "one weight for each reward, 0: only logged; default: 1")
    reward_timeout: float = arg(600.0, "seconds that one call of a reward may take", above=0)
    # rollout
    batch_size: int = arg(16, "prompts of a rollout, over all processes", above=0)
    num_generations: int = arg(8, "completions of a prompt, compared with one another (G)", least=2)
    max_completion_length: int = arg(512, "tokens after which a completion is cut", above=0)
    temperature: float = arg(1.0, "sampling temperature; log-probs are taken at the same one", above=0)
    rollout_batch_size: int = arg(256, "completions that a process samples at once", above=0)
    rollout_lag: int = arg(0, "1: a rollout is sampled by the policy of one rollout ago, in a process of its "
                           "own while this one updates; for a second GPU", least=0, most=1)
    sampler_device: str | None = arg(None, "where that process samples; default: the next GPU, else the CPU; "
                                     "none: in this process, before the update", "rollout_lag>0")
    drop_flat_groups: bool = arg(False, "draw, up to 10 times, until batch_size groups vary in their scores "
                                 "(DAPO): a rollout may use up several batches of prompts")
    # objective
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = arg(
        "dapo", "mean over tokens; mean of the rows' means; sum / (rows x max_completion_length)")
    importance_sampling_level: Literal["token", "sequence"] = arg(
        "token", "what has a ratio; sequence (GSPO) goes with --loss_type grpo --epsilon 3e-4 or so", LAGS)
    scale_rewards: Literal["group", "batch", "none"] = arg(
        "group", "what A is divided by: the std of its group, of the batch, or nothing (Dr. GRPO)")
    epsilon: float = arg(0.2, "the ratio is clipped below at 1 - epsilon", LAGS, above=0)
    epsilon_high: float | None = arg(None, "and above at 1 + this; default: epsilon (DAPO: 0.28)", LAGS)
    kl_coef: float = arg(0.0, "weight of the KL term; 0: no reference policy is kept", least=0)
    kl_warn: float = arg(50.0, "warn above this KL, in nats a completion", "kl_coef", least=0)
    mask_truncated_completions: bool = arg(False, "leave completions without an end out of the loss")
    overlong_penalty: int = arg(0, "last tokens over which a score falls evenly by 1 (DAPO)", least=0)
    best_fraction: float = arg(0.0, "share of a group, its best, that also gets an NLL term (RAFT): ties "
                               "included, its lowest score never", "sft_coef", least=0, most=1)
    demo_threshold: float | None = arg(
        None, "replace a group by its `demonstration` where at most this share passed", "sft_coef", least=0)
    sft_coef: float = arg(0.1, "weight of the NLL of best completions and demonstrations",
                          "best_fraction or demo_threshold", least=0)
    num_iterations: int = arg(1, "passes over a rollout", above=0)
    num_minibatches: int = arg(1, "updates of one pass", above=0)
    # optimization
    learning_rate: float | None = arg(None, "peak; default: 1e-6 (all weights), 1e-5 (LoRA)", above=0)
    num_train_epochs: float = arg(1.0, "passes over the prompts; 0: only evaluate", least=0)
    # evaluation
    eval_steps: int = arg(50, "steps between evaluations, rounded up to whole rollouts", EVAL, above=0)
    eval_samples: int = arg(0, "samples a prompt: pass@k, votes, a reward model's best", EVAL, least=0)
    # output
    save_steps: int = arg(50, "steps between checkpoints, rounded up to whole rollouts", above=0)
    logging_steps: int = arg(1, "steps between printed lines; metrics.jsonl has every step", above=0)

    def __post_init__(self):
        super().__post_init__()
        require(self.overlong_penalty <= self.max_completion_length,
                f"--overlong_penalty {self.overlong_penalty} is more than --max_completion_length")
        require(self.num_train_epochs or not self.merge,
                "--num_train_epochs 0 trains nothing that --merge could write")
        require(self.demo_threshold is None or not self.drop_flat_groups,
                "--drop_flat_groups would drop the failing groups that --demo_threshold replaces: choose one")
        require(self.importance_sampling_level == "token" or self.loss_type == "grpo",
                "--importance_sampling_level sequence is a mean over sequences: "
                "add --loss_type grpo (and --epsilon 3e-4 or so)")
        self.epsilon_high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        self.reward_weights = common.check_weights(self.reward_funcs, self.reward_weights)

    def resolve(self, lora, sharded):
        self.learning_rate = self.learning_rate or (1e-5 if lora else 1e-6)
        if self.importance_sampling_level == "sequence":
            require(not (self.rollout_lag and self.bf16), "--rollout_lag 1 and --importance_sampling_level "
                    "sequence need --bf16 False: in bf16 the lag is noise, more than GSPO's --epsilon")
            if self.epsilon > 0.01:
                say(f"warning  --epsilon {self.epsilon:g} never clips the ratio of a sequence: 3e-4 is usual")


# ---- loss --------------------------------------------------------------------------------------------------

def varies(scores):
    """Which groups teach something: (N, G), NaN = not scored -> (N,) bool, False where all are equal."""
    return scores.nan_to_num(-math.inf).amax(-1) > scores.nan_to_num(math.inf).amin(-1)


def group_advantages(scores, scale_rewards="group"):
    """A = (score - mean of its group) / (std + 1e-4), std (n - 1) of group or batch: (N, G) -> (N, G).

    NaN = not scored: left out of all statistics, advantage 0. A group whose scores are all equal gets 0.
    Scores 1, 0, 0, 1 give mean 0.5, std 0.5774, advantages +-0.8659.
    """
    known = ~scores.isnan()
    advantages = torch.where(known, scores - scores.nanmean(1, keepdim=True), 0.0)  # score - mean
    if scale_rewards == "group":
        variance = advantages.square().sum(1, keepdim=True) / (known.sum(1, keepdim=True) - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + 1e-4)
    elif scale_rewards == "batch":
        advantages = advantages / (scores[known].std() + 1e-4)
    return torch.where(varies(scores)[:, None], advantages, 0.0)  # 1 / std would blow up float noise


def best_of_groups(scores, fraction):
    """The completions that get an NLL term: (N, G) -> (N, G) bool. Of each group the top ceil(fraction G),
    with all ties, but never its lowest score, and so none of a group whose scores are all equal.

    Rejection sampling (RAFT, Dong 2023, arXiv 2304.06767, keeps 1 of G). Scores 3, 2, 2, 1 and fraction 0.5
    keep the first three; scores 1, 0, 0, 0 keep the first alone.
    """
    lowest, known = scores.nan_to_num(math.inf).amin(1, keepdim=True), scores.nan_to_num(-math.inf)
    count = math.ceil(round(fraction * scores.shape[1], 9))  # 0.07 * 100 is 7.000000000000001
    threshold = known.topk(max(count, 1), 1).values[:, -1:]  # (N, 1), the lowest score among the best
    return (known >= threshold) & (known > lowest) & (count > 0)


def overlong_penalty(length, max_completion_length, buffer):
    """What is added to a completion's score for its length: 0 up to max - buffer tokens, then evenly to -1.

    DAPO (Yu 2025, arXiv 2503.14476, eq. 13). At most 100 tokens, buffer 20: 80 -> 0, 90 -> -0.5, 100 -> -1.
    """
    return -max(0.0, length - (max_completion_length - buffer)) / buffer if buffer else 0.0


def grpo_loss(logprobs, old_logprobs, advantage, mask, epsilon=0.2, epsilon_high=0.2,
              importance_sampling_level="token"):
    """The clipped surrogate, negated, and what it saw of each token -> loss (B, T), {name: (B, T)}.

    logprobs, old_logprobs, mask (B, T), advantage (B, 1). The loss is 0 where the mask is 0.
    Ratio 1.5, epsilon_high 0.2: -1.2 A for A > 0 (no gradient), -1.5 A for A < 0. At ratio 1 the gradient is
    REINFORCE's.
    """
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    if importance_sampling_level == "sequence":  # GSPO: the geometric mean over a row, at each of its tokens
        mean = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
        log_ratio = mean.expand_as(log_ratio)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)  # min(r A, clip(r) A)
    return -torch.where(mask.bool(), surrogate, 0.0), {
        "ratio": ratio, "ratio/deviation": (ratio - 1).abs(),
        "clip_ratio/low_mean": (ratio < 1 - epsilon) & (advantage < 0),
        "clip_ratio/high_mean": (ratio > 1 + epsilon_high) & (advantage > 0)}


def kl_k3(logprobs, ref_logprobs):
    """k3 = exp(d) - 1 - d with d = ref_logprobs - logprobs, (B, T): >= 0, unbiased for KL(policy, reference).

    The estimator is Schulman's (joschu.net/blog/kl-approx.html). Pass equal values where the mask is 0: an
    infinite d would make NaN gradients even behind a mask. d = ln 2 gives 2 - 0.6931 - 1 = 0.3069.
    """
    d = ref_logprobs - logprobs
    return d.expm1() - d  # exp(d) - 1 in fp32 is noise for small d


def token_weights(lengths, loss_type, max_completion_length):
    """What a token of each row counts for in the step's loss, by --loss_type: lengths (N,) -> (N,).

    dapo     1 / tokens of the step                    with lengths 1, 3: 1/4, 1/4
    grpo     1 / (sequences * tokens of the sequence)  1/2, 1/6
    dr_grpo  1 / (sequences * max_completion_length)   (10 at most) 1/20, 1/20
    A row without trained tokens counts as a sequence and weighs nothing.
    """
    if loss_type == "dapo":
        return torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    per_row = lengths.clamp(min=1) if loss_type == "grpo" else torch.full_like(lengths, max_completion_length)
    return 1.0 / (len(lengths) * per_row)


def weigh(rows, args):
    """Gives the rows of one step, over all processes, their `weight` in the surrogate and `nll_weight` in the
    NLL: what a token counts for. A demonstration (sampled 0) is in the NLL alone."""
    samples = [row for row in rows if row["sampled"]]
    lengths = torch.tensor([float(row["mask"].sum()) for row in samples])
    weights = token_weights(lengths, args.loss_type, args.max_completion_length)
    nll_tokens = sum(int(row["mask"].sum()) for row in rows if row["nll"])
    for row in rows:
        row |= {"weight": 0.0, "nll_weight": row["nll"] / max(1, nll_tokens)}
    for row, weight in zip(samples, weights.tolist()):
        row["weight"] = weight


class TokenLogprobs(torch.autograd.Function):
    """Log-prob, entropy and top-1 hit of N target tokens, with one chunk of the (N, V) logits in memory.

    z = h W^T + b, with a cap cap tanh(z / cap);  log p(y) = z_y - logsumexp(z),  whose gradient to z is
    onehot(y) - p. All is fp32 but the matrix product, which autocast may do in bf16. Entropy and hits carry
    no gradient. hidden (N, d), weight (V, d), bias (V,) or None, targets (N,) -> three (N,).
    """
    CHUNK = common.LOGITS_AT_ONCE  # enough rows for a fast matrix product

    @staticmethod
    def logits(hidden, weight, bias, cap, out):
        """z (n, V) fp32, in `out`: on a CPU, allocating it anew costs more than the softmax."""
        z = out[:len(hidden)]
        torch.mm(hidden, weight.T, out=z) if weight.dtype == torch.float32 else z.copy_(hidden @ weight.T)
        if bias is not None:
            z += bias
        return z if cap is None else z.div_(cap).tanh_().mul_(cap)

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, cap):
        device, ctx.cap, ctx.dtype = hidden.device, cap, weight.dtype
        if torch.is_autocast_enabled(device.type):  # by hand: autograd does not autocast a custom backward
            ctx.dtype = torch.get_autocast_dtype(device.type)
        w, count = weight.to(ctx.dtype), max(1, math.ceil(len(hidden) * len(weight) / TokenLogprobs.CHUNK))
        ctx.chunks = torch.arange(len(hidden), device=device).tensor_split(count)  # places of the tokens
        out_z, out_p = (torch.empty(len(ctx.chunks[0]), len(w), device=device) for _ in range(2))
        logprobs, entropy, hits = torch.empty(3, len(targets), device=device)
        with torch.autocast(device.type, enabled=False):
            for n in ctx.chunks:
                z = TokenLogprobs.logits(hidden[n].to(ctx.dtype), w, bias, cap, out_z)  # (n, V)
                largest, place = z.max(-1)
                z -= largest[:, None]
                p = torch.exp(z, out=out_p[:len(n)])
                total = p.sum(-1)  # softmax's own sum is off by 3e-5 for V = 150,000, this one by 1e-6
                logprobs[n] = z.gather(-1, targets[n, None]).squeeze(-1) - total.log()
                entropy[n] = total.log() - z.clamp_(min=-1e30).mul_(p).sum(-1) / total  # -inf x 0 is NaN
                hits[n] = (place == targets[n]).float()  # one of those that tie
        p /= total[:, None]  # backward starts with the last chunk, whose p is kept; it makes the others again
        ctx.save_for_backward(hidden, weight, bias, targets, p)
        ctx.mark_non_differentiable(entropy, hits)
        return logprobs, entropy, hits

    @staticmethod
    def backward(ctx, grad, _entropy, _hits):
        hidden, weight, bias, targets, p = ctx.saved_tensors
        w, d_hidden, cap = weight.to(ctx.dtype), torch.zeros_like(hidden), ctx.cap
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        out = torch.empty(len(ctx.chunks[0]) if ctx.chunks[1:] or cap else 0, len(w), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for n in reversed(ctx.chunks):
                h, d_logprobs = hidden[n].to(ctx.dtype), grad[n, None]
                if n is not ctx.chunks[-1] or cap:
                    z = TokenLogprobs.logits(h, w, bias, cap, out)
                    p = torch.softmax(z, -1, out=None if cap else z)
                dz = p.mul_(-d_logprobs).scatter_add_(-1, targets[n, None], d_logprobs)
                if cap:  # the slope of cap tanh(z / cap)
                    dz *= 1 - (z / cap).square_()
                dz = dz.to(ctx.dtype)
                d_hidden[n] = (dz @ w).to(hidden.dtype)
                if d_weight is not None:
                    d_weight.addmm_(dz.T, h) if dz.dtype == torch.float32 else d_weight.add_(dz.T @ h)
                if d_bias is not None:
                    d_bias += dz.float().sum(0)
        return d_hidden, d_weight, d_bias, None, None


class Policy(nn.Module):
    """Token ids in, log-probs out: trunk, head and log-softmax in the one forward that accelerate wraps, so
    that gradients are synchronised."""

    def __init__(self, model):
        super().__init__()
        self.model, self._no_split_modules = model, model._no_split_modules  # the units that FSDP shards
        self.scale, self.cap = common.after_head(model)  # cohere and granite scale their logits, gemma 2 caps

    def hidden(self, input_ids):
        """input_ids (B, T) right-padded -> the trunk's last hidden states (B, T, d). There is no attention
        mask: under causal attention no real token sees the padding on its right."""
        causal = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return causal.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def logprobs(self, hidden, input_ids, mask, temperature):
        """-> logprobs, entropy, hits (B, T) fp32, of token t given those before it; 0 where the mask is 0.
        mask[:, 0] is 0: nothing predicts token 0."""
        head, (b, t) = self.model.get_output_embeddings(), mask.nonzero(as_tuple=True)  # the N that count
        hidden, targets = hidden[b, t - 1], input_ids[b, t]  # the causal shift: (N, d), (N,)
        factor, bias = self.scale / temperature, getattr(head, "bias", None)
        bias, cap = bias if bias is None else bias * factor, self.cap and self.cap / temperature
        flat = TokenLogprobs.apply(hidden * factor, head.weight, bias, targets, cap)
        zeros = torch.zeros(mask.shape, device=mask.device)
        return tuple(zeros.index_put((b, t), x) for x in flat)  # (N,) -> (B, T)

    def forward(self, input_ids, mask, temperature=1.0):
        return self.logprobs(self.hidden(input_ids), input_ids, mask, temperature)


@torch.no_grad()
def check_head(policy, model, row, run):
    """UserError if trunk, head, scale and cap do not give the model's log-probs on a row's first tokens."""
    ids = torch.as_tensor(row["input_ids"]).long().repeat(2)[None, :64].to(run.device)  # of one token two
    mask = torch.ones_like(ids).cumsum(-1) > 1  # all but the first token
    model.train(not any(common.dropout_rates(model)))  # other noise would show
    with run.accelerator.autocast():
        ours, _, _ = policy(ids, mask)
        model.eval()
        with common.unsharded(policy):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # what looks ahead misses the last
    model.train()
    theirs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    worst = (ours[:, 1:] - theirs).abs().max().item()
    require(worst < (0.2 if run.args.bf16 else 1e-3), f"models of type {model.config.model_type} do more to "
            f"their logits than scale and cap them, add noise or look ahead: log-probs differ by {worst:.2g}")


# ---- rollout -----------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, prompts, uniforms, max_completion_length, temperature, stop_ids, num_generations=1):
    """Samples num_generations completions a prompt from softmax(logits / temperature): the whole of it, and
    nothing else.

    prompts: N lists of ids; uniforms (N*G, C) in [0, 1), one row a completion, or None for the most likely
    token. -> completion_ids (N*G, C), logprobs (N*G, C) of what was sampled, lengths (N*G,) with the
    end-of-turn token counted; what lies beyond a length means nothing. Token t of a row is where its u_t
    falls in the cumulative distribution, so a row does not depend on its batch mates.
    """
    decoder = common.Decoder.start(model, prompts, num_generations, max_completion_length)
    total, device = len(decoder.rows), decoder.rows.device
    completion_ids = torch.zeros(total, max_completion_length, dtype=torch.long, device=device)
    logprobs = torch.zeros(total, max_completion_length, device=device)
    stops = torch.tensor(stop_ids, device=device)
    for t in range(max_completion_length):
        rows = decoder.rows  # (rows,) of the N*G that have not ended; on a GPU some that have are among them
        all_logprobs = (decoder.logits.float() / temperature).log_softmax(-1)  # (rows, V)
        if uniforms is None:
            tokens = all_logprobs.argmax(-1)
        else:
            tokens = common.inverse_cdf(all_logprobs.exp(), uniforms[rows, t])
        completion_ids[rows, t] = tokens
        logprobs[rows, t] = all_logprobs.gather(-1, tokens[:, None]).squeeze(-1)
        if not decoder.step(tokens, torch.isin(tokens, stops)):
            return completion_ids, logprobs, decoder.lengths


def sampled_row(prompt_ids, completion, logprobs, tokenizer, stop_ids):
    """A completion, a list of C ids, and the sampler's logprobs (C,) of it -> its row."""
    row = common.make_row(prompt_ids + completion, [0] * len(prompt_ids) + [1] * len(completion))
    return row | {"completion_ids": completion, "truncated": completion[-1] not in stop_ids, "sampled": 1.0,
                  "sampled_logprobs": F.pad(logprobs, (len(prompt_ids), 0)),  # (T,)
                  "text": tokenizer.decode([i for i in completion if i not in stop_ids])}


def rollout(model, prompts, rewards, args, run, num_generations=1, seed=None, first=0):
    """Completes and scores N prompts -> (N groups of G rows, {logged name: value}), alike on every process.

    seed None: greedy. first: of how many prompts this rollout has completions already. A process samples and
    scores its share of the prompts; then all are gathered, so what follows knows the whole rollout.
    """
    G, step, rows = num_generations, run.step, []
    process, processes = run.place
    mine = sorted(range(process, len(prompts), processes), key=lambda i: len(prompts[i]["prompt_ids"]))
    at_once, stop_ids = max(1, args.rollout_batch_size // G), model.generation_config.eos_token_id
    model.eval()  # in train mode with checkpointing a model ignores its cache
    for part in (mine[i:i + at_once] for i in range(0, len(mine), at_once)):
        places = [i * G + g for i in part for g in range(G)]  # of these completions in the rollout
        uniforms = None if seed is None else torch.stack(
            [torch.rand(args.max_completion_length, generator=stream(seed, "sample", step, first * G + place),
                        dtype=torch.float64) for place in places]).to(run.device)
        with run.accelerator.autocast():
            drawn = sample(model, [prompts[i]["prompt_ids"] for i in part], uniforms,
                           args.max_completion_length, args.temperature, stop_ids, G)
        for place, ids, logprobs, length in zip(places, *(x.cpu() for x in drawn)):
            row = sampled_row(prompts[place // G]["prompt_ids"], ids[:length].tolist(), logprobs[:length],
                              run.tokenizer, stop_ids)
            rows.append(row | {"number": first * G + place, "prompt": prompts[place // G]})
    model.train()

    def scored():
        # a reward function may draw random numbers
        set_seed(stream(args.seed, "rewards", step, first, process).initial_seed() % 2**32)
        if not rows:  # fewer prompts than processes
            return [], {}
        values, logged = common.score(rewards, [row["prompt"] for row in rows], rows, step, run.total_steps,
                                      args.reward_timeout)
        weights = torch.tensor([reward.weight or math.nan for reward in rewards.values()])  # 0: logged alone
        for row, value, weighted in zip(rows, values, weights * values):
            row["rewards_per_func"] = value  # (F,); the score: the weighted sum of those that apply, if any
            row["score"] = math.nan if weighted.isnan().all() else weighted.nansum().item()
        return rows, logged
    shares = run.together(scored)
    rows = sorted((row for share, _ in shares for row in share), key=lambda row: row["number"])
    return [rows[i:i + G] for i in range(0, len(rows), G)], common.mean_of([logged for _, logged in shares])


def draw_groups(train, complete, args, run):
    """Samples batch_size prompts; with --drop_flat_groups again, at most MAX_DRAWS times, until that many
    groups vary -> (all sampled groups, those to train on, figures). The checkpoint counts the draws."""
    sampled, varied, logged, wanted = [], [], [], min(args.batch_size, len(train))
    for draw in range(MAX_DRAWS if args.drop_flat_groups else 1):
        prompts = common.shuffled(train, run.state["draws"], args.batch_size, args.seed)
        new, log = complete(prompts, num_generations=args.num_generations, seed=args.seed, first=len(sampled))
        run.state["draws"] += 1
        for row in common.flat(new):
            length = len(row["completion_ids"])
            row["score"] += overlong_penalty(length, args.max_completion_length, args.overlong_penalty)
            row["old_logprobs"] = row["sampled_logprobs"]  # unless the trainer makes its own
        logged.append(log)
        sampled += new
        varied += [group for group, teaches in zip(new, varies(scores_of(new))) if teaches]
        if len(varied) >= wanted:
            break
    figures = common.mean_of(logged)
    if not args.drop_flat_groups:
        return sampled, sampled, figures
    run.warn("draws", len(varied) < wanted, f"{MAX_DRAWS} draws gave {len(varied)} of {wanted} groups whose "
             "scores differ: prompts may be too hard or too easy")
    groups = (varied or sampled)[:wanted]
    return sampled, groups, figures | {"draws": draw + 1, "groups": len(groups)}


def sampler_of(run, train):
    """What the process of --rollout_lag 1 loads -> its model, and draw(), a rollout with that model."""
    args = run.args
    rewards, model = common.load_rewards(args, run.device), common.load_model(args, run.tokenizer, run.device)
    complete = partial(rollout, model, rewards=rewards, args=args, run=run)
    return model.to(run.device), partial(draw_groups, train, complete, args, run)


def credit(groups, args):
    """Gives the rows of N whole groups what they are worth: `advantage`, `nll` (is it among the best?), and
    an empty mask where --mask_truncated_completions takes them out."""
    scores = scores_of(groups)  # (N, G)
    advantages = group_advantages(scores, args.scale_rewards)
    best = best_of_groups(scores, args.best_fraction)
    for row, advantage, is_best in zip(common.flat(groups), advantages.view(-1), best.view(-1)):
        kept = not (args.mask_truncated_completions and row["truncated"])
        row["mask"] = row["mask"] * kept
        row["advantage"], row["nll"] = advantage.item(), is_best.item() and kept
        row["note"] = f"score {row['score']:.4g}, advantage {row['advantage']:.4g}, "


def demonstrate(group, threshold, gate):
    """The rows to train on instead of a group: its prompt's demonstration where at most `threshold` of the
    group passed, which is the mean of reward number `gate`, whatever others say; else the group itself.

    After Lv 2025 (arXiv 2509.04419); its evidence is from one seed a model.
    """
    demonstration = group[0]["prompt"].get("demonstration")
    if threshold is None or not demonstration:
        return group
    passed = torch.stack([row["rewards_per_func"][gate] for row in group]).double().nanmean().item()
    return [demonstration | {"number": group[0]["number"]}] if passed <= threshold else group


def scores_of(groups):
    """N groups of G rows -> (N, G), NaN: not scored."""
    return torch.tensor([[row["score"] for row in group] for group in groups])


def rollout_figures(sampled, groups, rewards, args):
    """What is known of a rollout before anything is learned: of all sampled groups the rewards, the mean std
    inside a group, the share of flat ones; of the groups to train on, what gets an NLL term."""
    scores = scores_of(sampled)
    stds = [group[~group.isnan()].std().item() for group in scores if (~group.isnan()).sum() > 1]
    figures = common.rollout_metrics(common.flat(sampled), rewards)
    figures["reward_std"] = sum(stds) / len(scores)
    figures["frac_reward_zero_std"] = 1 - varies(scores).float().mean().item()
    rows = common.flat(groups)
    samples = [row for row in rows if row["sampled"]]
    best = [len(row["completion_ids"]) for row in samples if row["nll"]]
    if args.demo_threshold is not None:
        figures["demo_fraction"] = (len(rows) - len(samples)) / len(groups)
    if args.best_fraction:
        figures["best_fraction"] = len(best) / max(1, len(samples))
    if best:
        figures["best_length"] = sum(best) / len(best)
    return figures


# ---- evaluation --------------------------------------------------------------------------------------------

def evaluate(complete, held, rewards, args):
    """Greedy completions of the held-out prompts -> (metrics, table rows). eval/accuracy: exact match, where
    rows have answers; --eval_samples adds the figures of common.verify over samples."""
    groups, logged = complete(held)
    rows, right = common.flat(groups), common.right_answers(held)
    metrics = logged | common.rollout_metrics(rows, rewards) | common.exact_match(rows, right)
    asked = [prompt for prompt, answer in zip(held, right) if answer is not None]
    if args.eval_samples and asked:
        groups, _ = complete(asked, num_generations=args.eval_samples, seed=args.seed + 1)  # no rollout's
        judges = torch.tensor([reward.weight if reward.score else 0.0 for reward in rewards.values()])
        scores = torch.tensor([[(judges * row["rewards_per_func"]).nansum() for row in group]
                               for group in groups])
        answers = [common.given_answers(group) for group in groups]
        metrics |= common.verify(answers, common.right_answers(asked), scores if judges.any() else None)
    metrics = {f"eval/{name}": value for name, value in metrics.items()
               if not name.endswith(("/std", "/weighted"))}
    return metrics, common.samples_table(rows, rewards)


# ---- training ----------------------------------------------------------------------------------------------

def learning_rate_at(step, total_steps, args):
    """The learning rate of update `step` (0, 1, ...), a plain function: linear warm-up, then cosine or
    linear decay to 0, or none."""
    warmup = round(args.warmup_steps * (total_steps if args.warmup_steps < 1 else 1), 6)  # 0.07 * 100 > 7
    if step < warmup:
        return args.learning_rate * (step + 1) / (math.ceil(warmup) + 1)
    done = (step - warmup) / max(total_steps - warmup, 1)
    decay = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done,
             "constant": 1.0}[args.lr_scheduler_type]
    return args.learning_rate * decay


def make_optimizer(module, args):
    """AdamW over the trained parameters; weight decay on matrices alone."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    if args.optim == "adamw_8bit":
        import bitsandbytes
        return bitsandbytes.optim.AdamW8bit(groups, lr=args.learning_rate)
    return torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)


MAX_DRAWS = 10  # of --drop_flat_groups: after so many the step takes the groups that it has
FIELDS = ("sampled", "sampled_logprobs", "old_logprobs", "advantage", "weight", "nll_weight")
SHOWN = ("reward", "loss", "kl", "entropy", "completions/mean_length")
PAGE = ("A token's share is weight x loss (the clipped surrogate, negated, and kl_coef ratio k3) - sft_coef "
        "x NLL weight x log p. Rows stand in the order of the rollout, a prompt's completions together.")


def main(args):
    run = common.Run(args, draws=0, first=None, ahead=None)  # a checkpoint keeps these; ahead: a rollout

    # 1. Data and rewards: all is read, checked and tried before the policy is loaded.
    rewards = common.load_rewards(args, run.device)
    train, held = common.load_prompts(args, run.tokenizer)
    gate = common.add_demonstrations(train, rewards, args, run.tokenizer)  # number of the reward that judges
    run.check_data(train, held, rewards)
    common.try_rewards(rewards, train, held, args)
    updates, rollouts = common.rollouts_of(train, held, args)  # updates of one rollout

    # 2. Policy, reference, optimizer, and where an earlier run stopped.
    model = common.load_model(args, run.tokenizer, run.device)
    if args.kl_coef:  # the reference is a frozen copy, or the model with its adapters off
        reference, use_reference = common.make_reference(model, args, run.device)
    policy, optimizer = run.prepare(Policy(model), make_optimizer(model, args))
    check_head(policy, model, {"input_ids": train[0]["prompt_ids"]}, run)
    def complete(prompts, **asked):
        with common.unsharded(policy):
            return rollout(model, prompts, rewards, args, run, **asked)
    draw = partial(draw_groups, train, complete, args, run)
    sampler = common.Sampler(sampler_of, draw, run, model, train, updates)
    run.start(rollouts * updates, f"{rollouts} rollouts of {min(args.batch_size, len(train))} prompts x "
              f"{args.num_generations} completions, {updates} update(s) each")

    def report():
        if held and not args.audit:
            run.report(lambda: evaluate(complete, held, rewards, args), keep=True)

    if run.state["unevaluated"]:
        report()
    for number in range(run.step // updates, rollouts):
        # 3. Rollout. Prompts depend on (seed, draws so far), a completion on (seed, step, its place).
        sampled, groups, logged = sampler.take(number, number == rollouts - 1)  # a lag begins the next one
        run.samples("rollout", common.samples_table(sampled[0], rewards))

        # 4. Advantages, from whole groups. A completion that nothing scored is left out, of denominators too.
        credit(groups, args)
        groups = [demonstrate(group, args.demo_threshold, gate) for group in groups]
        rows = [row for row in common.flat(groups) if not math.isnan(row["score"])]
        require(rows, f"step {run.step + 1}: all rewards are None: mend the functions, or raise --batch_size")
        seen = logged | rollout_figures(sampled, groups, rewards, args)
        common.warn_of_drift(run, seen)
        same = seen["frac_reward_zero_std"] == 1 and not seen.get("demo_fraction")
        common.warn_of_flat(run, same, "completions of every prompt have scored the same: nothing is learned")

        # 5. Old and reference log-probs, by the forward that trains: the sampler's differ by rounding.
        samples = [row for row in rows if row["sampled"]]  # without demonstrations
        fields = FIELDS + (("ref_logprobs",) if args.kl_coef else ())
        with common.unsharded(policy):
            if updates > 1 and not args.rollout_lag:  # a lag: what sampled is old; one update: the current is
                run.annotate(samples, policy, ("old_logprobs",), args.temperature)
            if args.kl_coef:
                with use_reference():
                    run.annotate(samples, Policy(reference), ("ref_logprobs",), args.temperature)

        for update in range(updates):
            # 6. The rows of this update, and what a token of each counts for: the whole step's denominators.
            iteration, minibatch = divmod(update, args.num_minibatches)
            order = torch.randperm(len(rows), generator=stream(args.seed, "minibatch", number, iteration))
            chosen = [rows[i] for i in order[minibatch::args.num_minibatches]]
            weigh(chosen, args)
            has_nll = any(row["nll"] for row in chosen)  # on every process: they add up the same names

            # 7. The gradient, a micro-batch at a time: any cut gives the same.
            sums = common.Sums(run)
            for mb in run.micro_batches(chosen, fields, policy):  # tensors (B, T), or (B, 1): a number a row
                mb.logprobs, entropy, _ = policy(mb.input_ids, mb.mask, args.temperature)  # (B, T)
                # A demonstration is in the NLL alone: with mask and log-probs 0 its ratio is 1 and its k3 0.
                mask, logprobs = mb.mask * mb.sampled, mb.logprobs * mb.sampled
                if updates == 1 and not args.rollout_lag:
                    mb.old_logprobs = logprobs.detach()
                mb.loss, shown = grpo_loss(logprobs, mb.old_logprobs, mb.advantage, mask, args.epsilon,
                                           args.epsilon_high, args.importance_sampling_level)
                if args.kl_coef:  # ratio k3, both attached: the gradient of the reverse KL
                    shown["kl"] = kl_k3(logprobs, mb.ref_logprobs)
                    mb.loss = mb.loss + args.kl_coef * (logprobs - mb.old_logprobs).exp() * shown["kl"]
                nll = -mb.nll_weight * mb.logprobs
                share = mb.weight * mb.loss + args.sft_coef * nll  # what each token adds to the step's loss
                run.accelerator.backward(share.sum() * run.accelerator.num_processes)  # DDP averages: undo it
                if update == 0:  # later updates have moved away from the policy that sampled
                    shown["sampling/logprob_difference"] = (logprobs - mb.sampled_logprobs).abs()
                parts = {"loss": share, "nll_loss": nll} if has_nll else {"loss": share}
                sums.add(mb, parts, shown | {"entropy": entropy}, mask)
            metrics = sums.reduce()  # the loss, and means over the trained tokens, of all processes

            # 8. The update.
            norm = run.accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf).item()
            run.check_finite(metrics["loss"], norm, [group[0]["prompt"] for group in sampled])
            run.check_first_update(seen | metrics)  # which looks at a rollout's first alone
            if sums.write_page(metrics["loss"], PAGE):  # --audit: nothing is learned
                return
            learning_rate = learning_rate_at(run.step, run.total_steps, args)
            for param_group in optimizer.param_groups:
                param_group["lr"] = learning_rate
            if chosen:  # a short rollout may have fewer completions than there are minibatches
                optimizer.step()
            optimizer.zero_grad()
            length = metrics["trained_tokens"] / max(1, sum(row["sampled"] for row in chosen))
            run.warn_of_kl(metrics.get("kl", 0.0) * length, "raise --kl_coef or lower --learning_rate")
            metrics = seen | metrics | {"grad_norm": norm, "learning_rate": learning_rate}
            run.done(metrics, sum(len(row["input_ids"]) for row in chosen), SHOWN)

        # 9. Between rollouts is the only place to evaluate, save or stop: nothing sampled is lost.
        sampler.keep()  # waits for the rollout that was begun in 3
        if run.due(args.eval_steps):
            report()
        run.save_or_leave()
    run.finish(model)


if __name__ == "__main__":
    with common.user_errors():
        main(parse_args(Args))
