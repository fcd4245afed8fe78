"""ppo.py - proximal policy optimization: a policy and a value function learn from scored samples.

Objective   minimise the mean over tokens of
            max(-A ratio, -A clip(ratio, 1 - epsilon, 1 + epsilon)) + vf_coef value_loss, ratio = pi / pi_old,
            A from GAE on r_t = -kl_coef (log pi_old - log pi_ref), plus the score at the last token;
            Schulman 2017, arXiv 1707.06347 (PPO) and 2016, arXiv 1506.02438 (GAE); Ziegler 2019, arXiv
            1909.08593 (KL in the reward, --kl_target). Variant: --sft_dataset adds sft_coef x the mean NLL a
            token of demonstrations, Ouyang 2022, arXiv 2203.02155 (PPO-ptx).
Shapes      N prompts, G completions of each, F reward functions; B rows of a micro-batch, T tokens of a row,
            prompt and completion, C of them the completion's; V vocabulary, d hidden size. Index t of a
            (B, T) tensor is about token t; its value is that of the state before it. The causal shift is in
            Policy.logprobs and, of values, in PolicyValue.forward alone.

Differences from the papers
1. Advantages are whitened over the whole rollout, all processes; the returns that the value learns are not.
2. The value's loss is halved and clipped, as is usual in code. There is no entropy bonus.
3. A cut completion counts as ended: its value after the last token is 0. See --missing_eos_penalty.
4. PPO-ptx takes the NLL at --temperature. InstructGPT's coefficient of 27.8 is for another normalisation.
5. --score_clip bounds the score. A completion that no reward function scores is left out.
Differences from TRL's PPOTrainer (trl.experimental.ppo, which TRL 1.16 no longer has)
1. Rewards are reward models' folders, Python functions or both, with weights, as in grpo.py.
2. What is sampled is what is scored: the whole softmax at --temperature, without top-k, top-p or penalties.
3. The training forward makes the old log-probs, so the ratio is 1 in a rollout's first update.
4. The value starts as --value_model, else the first reward model with the policy's tokenizer, else a copy of
   the policy with a head of zeros; then, with LoRA but not under FSDP, policy, value and reference share one
   frozen base. --share_trunk: one trunk for policy and value, and always a head of zeros.
5. The value is saved as a reward model, value/: its score "value" at a row's last token is the value of the
   state after it. With --share_trunk value/ has a copy of the policy's trunk.
6. The score stands on the last token (EOS, if there is one), not after it, where no value is learned.
7. Advantages are whitened, and losses divided, over all processes and micro-batches together.
8. A stopped run goes on from its last checkpoint, always the end of a rollout, and ends bit-equal.
9. Only here: --kl_target, --score_clip, --num_generations, PPO-ptx. Not here: whitened rewards, k3 in them.

Metrics, of a step or, where it says so, of the rollout that its rows come from
loss                            policy_loss + vf_coef value_loss + sft_coef sft_loss
policy_loss, value_loss         mean a token; the first stays near 0, the second is half a squared error
sft_loss                        with --sft_dataset: mean NLL a token of the demonstrations of this step
reward                          mean over the rollout of the weighted sum of a completion's rewards
rewards/<name>/mean, /std, /weighted      one reward function where it applies; its mean after its weight
score, score_std, rlhf_reward   reward after clip and penalty, its spread; score less kl_coef kl_sequence
kl, kl_sequence                 mean log pi_old - log pi_ref (k1) of a token, of a completion, nats
kl_coef                         the coefficient that this rollout's rewards were made with
values/explained_variance       share of the returns' variance that the value foresaw; at 0 it is no help
completions/mean_length, completions/clipped_ratio   tokens; share that was cut at --max_completion_length
completions/distinct_4          share of different 4-grams inside a completion; a fall means repetition
entropy                         mean entropy of the policy at the sampled tokens, nats
ratio, ratio/deviation          mean ratio; mean distance from 1, about 0 in a rollout's first update
clip_ratio/low_mean, clip_ratio/high_mean   share of tokens whose ratio is clipped below, above
clip_ratio/value_mean           share of tokens whose value is clipped: it has moved too far to learn more
sampling/logprob_difference, sampling/logprob_difference/max   |trainer - sampler|, a rollout's first update
grad_norm, learning_rate        before clipping; of this update
num_tokens, trained_tokens      tokens so far, without demonstrations; the completions' in this step
eval/reward, eval/accuracy      greedy completions of held-out prompts: mean score; share of right answers

Run   python ppo.py                                                   the small example, CPU, about a minute
      python ppo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my.jsonl --lora_r 16 \
          --share_trunk --reward_funcs out/reward_model/model
      accelerate launch --multi_gpu --num_processes 8 ppo.py ... --reward_funcs my.py:reward
"""

import copy
import math
from collections import Counter
from dataclasses import dataclass, replace

import common  # first: it quiets the libraries below
from common import EVAL, MOVED, arg, parse_args, require, say, stream

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from peft import PeftModel
from torch import nn


# ---- arguments ---------------------------------------------------------------------------------------------

@dataclass
class Args(common.Args):
    # data
    format: str | None = arg(None, "column of the prompt: prompt, instruction or question")
    max_prompt_length: int = arg(512, "prompts with more tokens are dropped and counted", above=0)
    # rewards
    reward_funcs: list[str] = arg(["accuracy"], "accuracy, format, edit_distance, json, code, "
                                  "FILE.py:function or a reward model's FOLDER[:score]")
    reward_weights: list[float] | None = arg(None, "one weight for each reward, 0: only logged; default: 1")
    reward_timeout: float = arg(600.0, "seconds that one call of a reward may take", above=0)
    # rollout
    batch_size: int = arg(64, "prompts of a rollout, over all processes", above=0)
    num_generations: int = arg(1, "completions of a prompt (G)", above=0)
    max_completion_length: int = arg(512, "tokens after which a completion is cut", above=0)
    temperature: float = arg(1.0, "sampling temperature; log-probs are taken at the same one", above=0)
    rollout_batch_size: int = arg(256, "completions that a process samples at once", above=0)
    # objective
    share_trunk: bool = arg(False, "make the value a head on the policy's own trunk: saves memory")
    value_model: str | None = arg(None, "start the value from this folder: a run's value/, or a reward model "
                                  "with one score", "no share_trunk")
    gamma: float = arg(1.0, "discount per token", least=0, most=1)
    gae_lambda: float = arg(0.95, "1: returns as they came; 0: one step, then the value", least=0, most=1)
    epsilon: float = arg(0.2, "the ratio is clipped at 1 - epsilon and 1 + epsilon", MOVED, above=0)
    value_clip: float = arg(0.2, "how far a value may move from the rollout's; 0: any distance",
                            "vf_coef, " + MOVED, least=0)
    vf_coef: float = arg(0.1, "weight of the value's loss", least=0)
    kl_coef: float = arg(0.05, "price of KL in the reward; 0: no reference policy is kept", least=0)
    kl_target: float | None = arg(None, "adapt kl_coef, at most 2 % a rollout, to hold this KL a completion",
                                   "kl_coef", above=0)
    kl_warn: float = arg(50.0, "warn above this KL, in nats a completion", "kl_coef", least=0)
    score_clip: float | None = arg(None, "scores are clipped to -this and +this", above=0)
    missing_eos_penalty: float = arg(0.0, "what is taken off the score of a cut completion", least=0)
    sft_dataset: str | None = arg(None, "conversations or text that join each update (PPO-ptx)", "sft_coef")
    sft_coef: float = arg(0.0, "weight of their mean NLL a token, at --temperature", "sft_dataset", least=0)
    num_iterations: int = arg(4, "passes over a rollout", above=0)
    num_minibatches: int = arg(1, "updates of one pass", above=0)
    # optimization
    learning_rate: float | None = arg(None, "peak; default: 3e-6 (all weights), 3e-5 (LoRA)", above=0)
    num_train_epochs: float = arg(1.0, "passes over the prompts", least=0)
    # evaluation
    eval_steps: int = arg(50, "steps between evaluations, rounded up to whole rollouts", EVAL, above=0)
    # output
    save_steps: int = arg(50, "steps between checkpoints, rounded up to whole rollouts", above=0)
    logging_steps: int = arg(1, "steps between printed lines; metrics.jsonl has every step", above=0)

    def __post_init__(self):
        super().__post_init__()
        self.reward_weights = common.check_weights(self.reward_funcs, self.reward_weights)

    def resolve(self, lora, sharded):
        self.learning_rate = self.learning_rate or (3e-5 if lora else 3e-6)


SFT_FRACTION = 0.1  # PPO-ptx: demonstrations of an update, as a share of a full one's completions


# ---- loss --------------------------------------------------------------------------------------------------

def bound_scores(scores, truncated, score_clip=None, missing_eos_penalty=0.0):
    """clip(score, +-score_clip), less the penalty where the completion was cut (truncated 1): all one shape.

    Score 3, clip 2, penalty 1: 2, or 1 for a completion without an end.
    """
    scores = scores if score_clip is None else scores.clamp(-score_clip, score_clip)
    return scores - missing_eos_penalty * truncated


def kl_k1(logprobs, ref_logprobs):
    """log pi - log pi_ref at tokens sampled from pi (here pi_old), (B, T): its mean is KL(pi || pi_ref).

    Single values may be negative. It stands in the reward, where it carries no gradient of its own.
    """
    return logprobs - ref_logprobs


def per_token_rewards(scores, kl, mask, kl_coef):
    """r_t = -kl_coef kl_t, plus the score at the completion's last token: (B, 1), (B, T), (B, T) -> (B, T).

    0 where the mask is 0. Mask 0 1 1 0, kl 9 2 4 9, kl_coef 0.1, score 1: rewards 0, -0.2, -0.4 + 1, 0.
    """
    last = mask.cumsum(-1) == mask.sum(-1, keepdim=True)  # from the last 1 of each row on
    rewards = -kl_coef * kl + torch.where(last, scores, 0.0)
    return torch.where(mask.bool(), rewards, 0.0)


def gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95):
    """delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  return R_t = A_t + V_t.

    All (B, T) fp32 -> (advantages, returns), both 0 where the mask is 0. Only tokens of the mask are steps:
    after the last one V and A are 0. (Schulman 2016, equations 16 and 11.)
    Rewards 0, 1, values 0.5, 0.6, gamma 1, lambda 0.95: deltas 0.1, 0.4; A = 0.48, 0.4; R = 0.98, 1.
    """
    advantages = torch.zeros_like(rewards)
    advantage = value = torch.zeros_like(rewards[:, 0])  # (B,): of the step after t
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t].bool()
        delta = rewards[:, t] + gamma * value - values[:, t]
        advantage = torch.where(counts, delta + gamma * gae_lambda * advantage, advantage)
        value = torch.where(counts, values[:, t], value)
        advantages[:, t] = torch.where(counts, advantage, 0.0)
    return advantages, torch.where(mask.bool(), advantages + values, 0.0)


def whiten(x, mask):
    """(x - mean) / sqrt(variance + 1e-8) over the mask's ones, with n - 1 in the variance; 0 elsewhere.

    Any shape. 1, 2, 3 give -1, 0, 1; equal values give 0.
    """
    known = x[mask.bool()]
    variance, mean = torch.var_mean(known, correction=min(1, len(known) - 1))  # one token alone: 0, not NaN
    return torch.where(mask.bool(), (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def policy_loss(logprobs, old_logprobs, advantages, epsilon=0.2):
    """max(-A ratio, -A clip(ratio, 1 - epsilon, 1 + epsilon)), ratio = pi / pi_old, and what it saw of each
    token: all (B, T) -> loss (B, T), {name: (B, T)}.

    Ratio 1.5, epsilon 0.2: -1.2 A for A > 0 (no gradient), -1.5 A for A < 0. (Schulman 2017, equation 7.)
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return torch.maximum(-advantages * ratio, -advantages * clipped), {
        "ratio": ratio, "ratio/deviation": (ratio - 1).abs(),
        "clip_ratio/low_mean": (ratio < 1 - epsilon) & (advantages < 0),
        "clip_ratio/high_mean": (ratio > 1 + epsilon) & (advantages > 0)}


def value_loss(new_values, values, returns, value_clip=0.2):
    """0.5 max((v - R)^2, (clip(v, v_old - value_clip, v_old + value_clip) - R)^2), and where the clipped side
    is the larger: all (B, T) -> loss (B, T), {name: (B, T)}.

    value_clip 0: 0.5 (v - R)^2. With v_old 0, R 1: v 0.5 gives 0.5 (0.2 - 1)^2 = 0.32 and no gradient.
    """
    move, error = new_values - values, (new_values - returns).square()
    clipped = (values + move.clamp(-value_clip, value_clip) - returns).square() if value_clip else error
    is_clipped = (clipped > error) & (move.abs() > value_clip)  # a smaller move differs by rounding alone
    return 0.5 * torch.maximum(error, clipped), {"clip_ratio/value_mean": is_clipped}


def adapt_kl_coef(kl_coef, kl, kl_target):
    """kl_coef (1 + 0.1 e), e = clip((kl - target) / target, -0.2, 0.2), kl in nats a completion.

    Twice the target: 0.1 -> 0.102. (Ziegler 2019, section 2.2.)
    """
    return kl_coef * (1 + 0.1 * min(max((kl - kl_target) / kl_target, -0.2), 0.2))


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


class PolicyValue(Policy):
    """Policy and value in one forward: the value is a head on the policy's trunk, or on its own."""

    def __init__(self, model, trunk, value_head):
        super().__init__(model)
        self.trunk, self.value_head = trunk, value_head  # trunk None: the policy's

    def forward(self, input_ids, mask, temperature=1.0):
        """-> logprobs, values, entropy (B, T) fp32, 0 where the mask is 0. Value t is that of the state
        before token t."""
        hidden = self.hidden(input_ids)  # (B, T, d)
        logprobs, entropy, _ = self.logprobs(hidden, input_ids, mask, temperature)
        if self.trunk is not None:
            hidden = self.trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(hidden.float()).squeeze(-1)  # (B, T): of the state after each token
        values = values.roll(1, 1)  # the causal shift; what comes round to token 0 is masked
        return logprobs, torch.where(mask.bool(), values, 0.0), entropy


def make_value_head(weight):
    """weight (1, d) -> Linear(d, 1) without a bias: transformers' reward models have none."""
    head = nn.Linear(weight.shape[1], 1, bias=False, device=weight.device)
    head.weight.data.copy_(weight.detach())
    return head


def make_value(args, start, model, run):
    """-> (model, trunk, head): the value's trunk, or None for the policy's, the model that it is of or was
    copied from, and its head, Linear(d, 1).

    From a reward model, if there is one to start from (common.value_start), the head times the reward's
    weight; else a copy of the policy's trunk and a head of zeros.
    """
    if start:
        say(f"value    its own trunk, from the reward model {start.path}")
        scorer, row = common.load_value(start, args, model, run)  # row (1, d): the head of that score
        classifier = scorer.get_base_model() if isinstance(scorer, PeftModel) else scorer
        head = make_value_head(start.weight * row)
        return scorer, classifier.base_model, head
    head = make_value_head(model.get_output_embeddings().weight[:1] * 0)
    if args.share_trunk:
        say("value    a head of zeros on the policy's trunk")
        return model, None, head
    say("value    its own trunk, a copy of the policy's, with a head of zeros")
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    trunk = causal.base_model
    # deepcopy takes from its memo, {id of an object: its copy}, what has been copied before. Frozen weights
    # stand in it as copies of themselves, so they are shared and the value costs no second base. Not under
    # FSDP, which cannot shard a weight in two places.
    shared = [p for p in trunk.parameters() if not p.requires_grad and not run.accelerator.is_fsdp2]
    memo = {id(p): p for p in shared}
    own = copy.deepcopy(trunk, memo)
    return model, own, head


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


# ---- data --------------------------------------------------------------------------------------------------

def load_demonstrations(args, tokenizer, held):
    """--sft_dataset -> training rows for the NLL term of PPO-ptx, without the prompts that are held out."""
    counts, longest = Counter(), args.max_prompt_length + args.max_completion_length
    items, _ = common.read_items(args.sft_dataset, replace(args, format=None), tokenizer,  # that of prompts
                                 common.SFT_FORMATS, common.to_conversation)
    held = {common.prompt_key(prompt["turns"]) for prompt in held}
    kept = [item for item in items if common.prompt_key(item[0].get("messages", [])) not in held]
    rows = common.encode_rows(kept, lambda conversation, row: common.encode_sft(tokenizer, conversation),
                              longest, counts, args.skip_bad_rows)
    say(f"data     {len(rows):,} examples for the SFT term; {len(items) - len(kept):,} rows of held-out "
        f"prompts left out{common.counted(counts)}")
    require(rows, f"{args.sft_dataset}: no row to train on is left")
    return rows


def endless_order(start, count, total, *key):
    """Places start, start + 1, ... of one permutation of range(total) after another."""
    first, last = start // total, (start + count - 1) // total
    order = torch.cat([torch.randperm(total, generator=stream(*key, n)) for n in range(first, last + 1)])
    return order[start - first * total:][:count].tolist()


def weighed(rows, name):
    """Copies of the rows in which field `name` is 1 / the trained tokens of them all: a sum over tokens with
    this weight is the mean."""
    tokens = sum(row["trained"] for row in rows)
    return [row | {name: 1 / tokens} for row in rows]


def nll_rows(demonstrations, step, number, args):
    """The demonstrations that PPO-ptx mixes into update `step`: rows with an `nll_weight`. The fields that
    they lack count as 0. On the audit page the first is row `number`."""
    if not demonstrations:
        return []
    completions = args.batch_size * args.num_generations / args.num_minibatches  # of one update
    count = max(1, round(SFT_FRACTION * completions))
    places = endless_order(step * count, count, len(demonstrations), args.seed, "sft")
    return weighed([demonstrations[i] | {"number": number + k, "sampled": 0.0, "note": "demonstration, "}
                    for k, i in enumerate(places)], "nll_weight")


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


def add_advantages(rows, args, kl_coef):
    """Gives every row of a rollout its kl, token_rewards, advantages and returns (T,) -> metrics.

    The rows are the whole rollout, on every process: that makes the whitening global.
    """
    names = "old_logprobs", "ref_logprobs", "values", "score", "truncated"
    mb = common.pad_rows(rows, names, "cpu")  # (rows, T), or (rows, 1): a number a row
    scores = bound_scores(mb.score, mb.truncated, args.score_clip, args.missing_eos_penalty)
    kl = kl_k1(mb.old_logprobs, mb.ref_logprobs)  # log pi without a reference: then kl_coef is 0
    token_rewards = per_token_rewards(scores, kl, mb.mask, kl_coef)
    raw, returns = gae(token_rewards, mb.values, mb.mask, args.gamma, args.gae_lambda)
    fields = {"kl": kl, "token_rewards": token_rewards, "returns": returns,
              "advantages": whiten(raw, mb.mask)}
    for i, row in enumerate(rows):
        row |= {name: x[i, :len(row["input_ids"])] for name, x in fields.items()}
        row["note"] = f"score {scores[i].item():.4g}, "
    # the metric `score` is of the bounded scores, `reward` of row["score"]
    metrics = {"score": scores.mean().item(), "score_std": scores.std(correction=0).item(),
               "rlhf_reward": token_rewards.sum(-1).mean().item()}
    if args.kl_coef:
        metrics |= {"kl": (kl.sum() / mb.mask.sum()).item(), "kl_sequence": kl.sum(-1).mean().item(),
                    "kl_coef": kl_coef}
    counts = mb.mask.bool()  # 1 - Var(R - V) / Var(R), where R - V = A
    unexplained, spread = (x[counts].var(correction=0).item() for x in (raw, returns))
    return metrics | ({"values/explained_variance": 1 - unexplained / spread} if spread > 0 else {})


def warn_of_signs(run, seen):
    """Signs of over-optimisation, and that the KL or the scores are beyond what the losses can use."""
    common.warn_of_drift(run, seen)
    common.warn_of_flat(run, seen["score_std"] == 0,
                        "completions have scored the same: the score teaches nothing")
    kl, score, std = seen.get("kl_sequence", 0.0), seen["score"], seen["score_std"]
    look = f". Look at {run.samples_file}"
    run.warn_of_kl(kl, f"raise --kl_coef, or set --kl_target{look}")
    run.warn("negative kl", kl < -1, f"the KL estimate is {kl:.3g} nats a completion, and no KL is negative: "
             f"what is scored is not what was sampled{look}")
    run.warn("score", abs(score) + std > 10, f"scores are around {score:.3g} +- {std:.3g}: the value's loss "
             "grows with their square and drowns the policy's; use --reward_weights or --score_clip" + look)


# ---- evaluation --------------------------------------------------------------------------------------------

def evaluate(model, held, rewards, args, run):
    """Greedy completions of the held-out prompts -> (metrics, table). eval/accuracy is exact match, where
    rows have answers."""
    groups, logged = rollout(model, held, rewards, args, run)
    rows, right = common.flat(groups), common.right_answers(held)
    figures = logged | common.rollout_metrics(rows, rewards) | common.exact_match(rows, right)
    metrics = {f"eval/{name}": value for name, value in figures.items()
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


# ref_logprobs, kl and token_rewards, of which the advantages are made, are for the audit page alone
FIELDS = ("sampled", "sampled_logprobs", "old_logprobs", "values", "token_rewards", "advantages", "returns",
          "weight", "nll_weight")
SHOWN = ("reward", "kl_sequence", "policy_loss", "value_loss", "completions/mean_length")
PAGE = ("A token's share is weight x (policy loss + vf_coef x value loss) - sft_coef x NLL weight x log p. "
        "Rows stand in the order of the rollout, demonstrations after them.")


def main(args):
    run = common.Run(args, kl_coef=args.kl_coef, first=None)  # folder, processes, what a checkpoint keeps

    # 1. Data and rewards: all is read, checked and tried before the policy is loaded.
    rewards = common.load_rewards(args, run.device)
    train, held = common.load_prompts(args, run.tokenizer)
    demonstrations = load_demonstrations(args, run.tokenizer, held) if args.sft_dataset else []
    run.check_data([*train, *demonstrations], held, rewards)
    common.try_rewards(rewards, train, held, args)
    start = common.value_start(args, rewards, run.tokenizer)  # a reward model for the value to start from
    updates, rollouts = common.rollouts_of(train, held, args)  # updates of one rollout

    # 2. Policy, value, reference, optimizer, and where an earlier run stopped.
    model = common.load_model(args, run.tokenizer, run.device)
    value = make_value(args, start, model, run)
    _, trunk, head = value
    module = PolicyValue(model, trunk, head)
    if args.kl_coef:  # the reference is a frozen copy, or the model with its adapters off
        reference, use_reference = common.make_reference(model, args, run.device)
    policy, optimizer = run.prepare(module, make_optimizer(module, args))
    check_head(policy, model, {"input_ids": train[0]["prompt_ids"]}, run)
    run.start(rollouts * updates, f"{rollouts} rollouts of {min(args.batch_size, len(train))} prompts x "
              f"{args.num_generations} completion(s), {updates} update(s) each")

    def report():
        if held and not args.audit:
            with common.unsharded(policy):
                run.report(lambda: evaluate(model, held, rewards, args, run), keep=True)

    if run.state["unevaluated"]:
        report()
    for number in range(run.step // updates, rollouts):
        # 3. Rollout. Prompts depend on (seed, number), a completion on (seed, step, its place).
        prompts = common.shuffled(train, number, args.batch_size, args.seed)
        with common.unsharded(policy):
            groups, logged = rollout(model, prompts, rewards, args, run, args.num_generations, args.seed)
        sampled = common.flat(groups)
        run.samples("rollout", common.samples_table(sampled[:8], rewards))
        rows = [row for row in sampled if not math.isnan(row["score"])]  # what nothing scores is left out
        require(rows, f"step {run.step + 1}: no reward function applies to any completion of the rollout "
                "(all returned None): mend it, leave such rows out, or raise --batch_size")

        # 4. Log-probs and values before the policy moves, by the forward that trains, and of the reference.
        with common.unsharded(policy):
            run.annotate(rows, policy, ("old_logprobs", "values"), args.temperature)
            if args.kl_coef:
                with use_reference():
                    run.annotate(rows, Policy(reference), ("ref_logprobs",), args.temperature)

        # 5. Advantages, whitened over the whole rollout. A new kl_coef holds from the next rollout on.
        figures = add_advantages(rows, args, run.state["kl_coef"])
        seen = logged | common.rollout_metrics(sampled, rewards) | figures
        if args.kl_target:
            run.state["kl_coef"] = adapt_kl_coef(run.state["kl_coef"], seen["kl_sequence"], args.kl_target)
        warn_of_signs(run, seen)
        fields = FIELDS + (("ref_logprobs", "kl") if args.kl_coef else ())

        for update in range(updates):
            # 6. The rows of this update, and what a token of each counts for: the whole step's denominators.
            iteration, minibatch = divmod(update, args.num_minibatches)
            order = torch.randperm(len(rows), generator=stream(args.seed, "minibatch", number, iteration))
            chosen = weighed([rows[i] for i in order[minibatch::args.num_minibatches]], "weight")
            extra = nll_rows(demonstrations, run.step, len(sampled), args)

            # 7. The gradient, a micro-batch at a time: any cut gives the same.
            sums = common.Sums(run)
            for mb in run.micro_batches(chosen + extra, fields, policy):  # (B, T), or (B, 1): a number a row
                mb.logprobs, mb.new_values, entropy = policy(mb.input_ids, mb.mask, args.temperature)
                mb.policy_loss, shown = policy_loss(mb.logprobs, mb.old_logprobs, mb.advantages, args.epsilon)
                mb.value_loss, clipped = value_loss(mb.new_values, mb.values, mb.returns, args.value_clip)
                nll = -mb.nll_weight * mb.logprobs  # share (B, T): what each token adds to the step's loss
                share = mb.weight * (mb.policy_loss + args.vf_coef * mb.value_loss) + args.sft_coef * nll
                run.accelerator.backward(share.sum() * run.accelerator.num_processes)  # DDP averages: undo it
                if update == 0:  # later updates have moved away from the policy that sampled
                    shown["sampling/logprob_difference"] = (mb.logprobs - mb.sampled_logprobs).abs()
                parts = {"loss": share, "policy_loss": mb.weight * mb.policy_loss,
                         "value_loss": mb.weight * mb.value_loss} | ({"sft_loss": nll} if extra else {})
                # demonstrations, whose weight is 0, are in the NLL alone
                sums.add(mb, parts, shown | clipped | {"entropy": entropy}, mb.mask * mb.sampled)
            metrics = sums.reduce()  # the losses, and means over the trained tokens, of all processes

            # 8. The update.
            norm = run.accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf).item()
            run.check_finite(metrics["loss"], norm, prompts, "Try a lower --learning_rate, or --score_clip")
            learning_rate = learning_rate_at(run.step, run.total_steps, args)
            metrics = seen | metrics | {"grad_norm": norm, "learning_rate": learning_rate}
            run.check_first_update(metrics)  # which looks at a rollout's first alone
            if sums.write_page(metrics["loss"], PAGE):  # --audit: nothing is learned
                return
            for param_group in optimizer.param_groups:
                param_group["lr"] = learning_rate
            if chosen or extra:  # a short rollout may have fewer completions than there are minibatches
                optimizer.step()
            optimizer.zero_grad()
            run.done(metrics, sum(len(row["input_ids"]) for row in chosen), SHOWN)

        # 9. Between rollouts is the only place to evaluate, save or stop: nothing sampled is lost.
        if run.due(args.eval_steps):
            report()
        run.save_or_leave()
    run.finish(model, value)


if __name__ == "__main__":
    with common.user_errors():
        main(parse_args(Args))
