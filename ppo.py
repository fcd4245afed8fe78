"""ppo.py - proximal policy optimization of a policy and a value function: RLHF with a reward model, or with
rewards in Python.

Objective   minimise the mean over the tokens of a minibatch of
            max(-A ratio, -A clip(ratio, 1 +- epsilon)) + vf_coef value_loss, ratio = pi / pi_old, with A from
            GAE on r_t = -kl_coef (log pi_old - log pi_ref), plus the score on the completion's last token;
            and sft_coef x the NLL of demonstrations, where there are any.
            Schulman 2017, arXiv 1707.06347 (PPO) and 2016, arXiv 1506.02438 (GAE);
            Ziegler 2019, arXiv 1909.08593 (KL in the reward, adaptive coefficient);
            Ouyang 2022, arXiv 2203.02155 (InstructGPT, PPO-ptx).
Shapes      P prompt tokens, C completion tokens, T = P + C, G completions a prompt, B rows of a micro-batch,
            V vocabulary, d hidden size, F reward functions; N is any other count, named where it is used.
            Index t of a (B, T-1) tensor belongs to token t+1: its log-prob, its reward, the value of the
            state before it. The shift is in Policy.logprobs, PolicyValue.forward and, of masks, collate.

Differences from the papers
1. Advantages are whitened over the whole rollout (all processes); the returns that the value learns are not.
   The value's loss is halved and clipped, as is usual in code.
2. A completion cut at max_completion_length counts as ended: its value after the last token is 0. Use
   --missing_eos_penalty to make it worth less.
3. PPO-ptx mixes in sft_coef x the token mean of the NLL of some rows of --sft_dataset, conversations or raw
   text, at temperature 1. InstructGPT's coefficient of 27.8 belongs to another normalisation.
4. There is no entropy bonus. --score_clip bounds the score; a completion that no reward scores is left out.
Differences from TRL's PPOTrainer (trl.experimental.ppo, which TRL 1.16 no longer has)
1. Rewards are reward models' folders, Python functions or both, with weights, as in grpo.py.
2. What is sampled is what is scored: the whole softmax at --temperature; of the generation config only the
   stop tokens are used. The training forward makes the old log-probs, so the ratio is 1 in a rollout's first
   update.
3. A stopped run goes on from its last checkpoint, always the end of a rollout, and ends bit-equal.
4. The value starts from the first reward model among the rewards that has the policy's tokenizer and a score
   head, the head times the reward's weight; where there is none, from a copy of the policy's trunk and a head
   of zeros (with LoRA, but not under FSDP, policy, value and reference then share one frozen base).
   --share_trunk: one trunk for policy and value, and always a head of zeros.
5. The score stands on the last token of the completion (EOS, if there is one), not on the place after it.
   Nothing is learned of the value at that place.
6. Advantages are whitened, and losses divided, over all processes and micro-batches together.
7. Not in TRL's: --kl_target, --score_clip, --num_generations, PPO-ptx, --share_trunk. Not here: whitening of
   rewards, and k3 as the KL in the reward.

Run   python ppo.py                                                   the small example, CPU, about a minute
      python ppo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my.jsonl --lora_r 16 \
          --share_trunk --reward_funcs out/reward_model/model
      accelerate launch --multi_gpu --num_processes 8 ppo.py ... --reward_funcs my.py:reward
"""

import asyncio
import copy
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import common  # first: it quiets the libraries below
from common import UserError, parse_args, require, say

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, set_seed
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer, DynamicCache
from transformers.hf_argparser import HfArg


# ---- arguments ---------------------------------------------------------------------------------------------

@dataclass
class Args:
    # model
    model_name_or_path: str | None = HfArg(default=None, help="name or folder of a model or a LoRA adapter")
    attn_implementation: str | None = HfArg(default=None, help="kernel, such as sdpa or flash_attention_2")
    trust_remote_code: bool = HfArg(default=False, help="run Python code that comes with the model")
    chat_template_path: str | None = HfArg(default=None, help="Jinja file that replaces the chat template")
    chat_template_kwargs: str | None = HfArg(default=None, help="JSON object passed to the chat template")
    load_in_4bit: bool = HfArg(default=False, help="QLoRA: the frozen base in NF4 with double quantisation")
    lora_r: int = HfArg(default=0, help="rank of the LoRA adapters; 0 trains all weights")
    lora_alpha: int = HfArg(default=32, help="LoRA scale: updates are multiplied by lora_alpha / lora_r")
    lora_target_modules: list[str] | None = HfArg(default=None, help="modules to adapt; default: all linear")
    modules_to_save: list[str] | None = HfArg(default=None, help="modules trained in full beside adapters")
    gradient_checkpointing: bool = HfArg(default=True, help="recompute activations in backward: saves memory")
    bf16: bool | None = HfArg(default=None, help="bf16 autocast; default: where an accelerator has it")
    # data and rewards
    dataset_name: str | None = HfArg(default=None, help=".json, .jsonl, .csv, .parquet file, or a dataset")
    eval_dataset_name: str | None = HfArg(default=None, help="default: eval_fraction of the training data")
    eval_fraction: float = HfArg(default=0.05, help="share of the rows held out by prompt, at most 200 rows")
    format: str | None = HfArg(default=None, help="the column of the prompt: prompt, instruction or question")
    system_prompt: str | None = HfArg(default=None, help="system message for prompts that have none")
    max_prompt_length: int = HfArg(default=512, help="longer prompts are dropped and counted")
    skip_bad_rows: bool = HfArg(default=False, help="count and skip malformed rows instead of stopping")
    reward_funcs: list[str] = HfArg(
        default_factory=lambda: ["accuracy"], help="accuracy, format, edit_distance, json, code, "
        "FILE.py:function or a reward model's FOLDER[:score]")
    reward_weights: list[float] | None = HfArg(default=None, help="one weight for each reward; default 1")
    reward_timeout: float = HfArg(default=600.0, help="seconds a reward's call may take before the run stops")
    # rollout
    batch_size: int = HfArg(default=64, help="prompts of a rollout, over all processes")
    num_generations: int = HfArg(default=1, help="completions a prompt (G)")
    max_completion_length: int = HfArg(default=512, help="tokens after which a completion is cut")
    temperature: float = HfArg(default=1.0, help="of sampling, and of every log-prob")
    rollout_batch_size: int = HfArg(default=256, help="completions that each process samples at once")
    # objective
    share_trunk: bool = HfArg(default=False, help="the value is a head on the policy's trunk: saves memory")
    gamma: float = HfArg(default=1.0, help="discount per token")
    gae_lambda: float = HfArg(default=0.95, help="1: returns as they came; 0: the value's one-step estimate")
    epsilon: float = HfArg(default=0.2, help="the ratio is clipped at 1 +- epsilon")
    value_clip: float = HfArg(default=0.2, help="a value's move in a rollout is clipped at this; 0: off")
    vf_coef: float = HfArg(default=0.1, help="weight of the value's loss")
    kl_coef: float = HfArg(default=0.05, help="price of KL in the reward; 0: no reference policy is kept")
    kl_target: float | None = HfArg(default=None, help="adapt kl_coef to hold this KL, in nats per sequence")
    kl_gain: float = HfArg(default=0.1, help="a rollout multiplies kl_coef by at most 1 +- 0.2 x this")
    kl_warn: float = HfArg(default=50.0, help="warn above this KL (nats per sequence; needs --kl_coef)")
    score_clip: float | None = HfArg(default=None, help="scores are clipped at +- this")
    missing_eos_penalty: float = HfArg(default=0.0, help="taken off the score of a cut completion")
    sft_dataset: str | None = HfArg(default=None, help="conversations or text mixed into each update (ptx)")
    sft_coef: float = HfArg(default=0.0, help="weight of the mean NLL per token of sft_dataset's rows")
    sft_fraction: float = HfArg(default=0.1, help="those rows in an update, as a share of its completions")
    num_iterations: int = HfArg(default=4, help="passes over a rollout")
    num_minibatches: int = HfArg(default=1, help="updates of one pass")
    # optimization
    learning_rate: float | None = HfArg(default=None, help="peak; default 3e-6 (all weights), 3e-5 (LoRA)")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = HfArg(default="cosine", help="after warm-up")
    warmup_steps: float = HfArg(default=0.03, help="steps of linear warm-up; below 1: a share of all steps")
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay of matrices (not of norms and biases)")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are scaled down to this norm; 0: off")
    optim: Literal["adamw_torch", "adamw_8bit"] = HfArg(default="adamw_torch", help="8bit needs bitsandbytes")
    micro_batch_tokens: int = HfArg(default=8192, help="padded tokens of a forward pass: limits memory only")
    num_train_epochs: float = HfArg(default=1.0, help="passes over the prompts")
    max_steps: int = HfArg(default=-1, help="steps, rounded up to whole rollouts; overrides num_train_epochs")
    seed: int = HfArg(default=0, help="decides the order of the prompts, the samples and random weights")
    # evaluation and output
    eval_steps: int = HfArg(default=50, help="steps between evaluations, rounded up to whole rollouts")
    output_dir: str = HfArg(default="out/ppo", help="where everything goes")
    overwrite_output_dir: bool = HfArg(default=False, help="replace the run that is there")
    resume_from_checkpoint: str | None = HfArg(default=None, help="'latest' or a checkpoint's folder")
    save_steps: int = HfArg(default=50, help="steps between checkpoints, rounded up to whole rollouts")
    save_total_limit: int = HfArg(default=2, help="checkpoints that are kept")
    logging_steps: int = HfArg(default=1, help="steps between printed/tracked lines; metrics.jsonl has all")
    log_with: Literal["tensorboard", "wandb", "trackio"] | None = HfArg(default=None, aliases=["--report_to"],
                                                                        help="tracker")
    audit: str | None = HfArg(default=None, help="only write what the loss sees of each token as FILE.html")
    audit_step: int | None = HfArg(default=None, help="audit: the step shown; default: the first")
    merge: bool = HfArg(default=False, help="also write merged/: the adapter merged into its base")

    def __post_init__(self):
        require(self.dataset_name,
                "--dataset_name is missing: a .json, .jsonl, .csv or .parquet file, or a dataset name")
        common.check_numbers(
            self, ("learning_rate", "max_prompt_length", "batch_size", "num_generations",
                   "max_completion_length", "temperature", "rollout_batch_size", "num_iterations",
                   "num_minibatches", "micro_batch_tokens", "eval_steps", "save_steps", "save_total_limit",
                   "logging_steps", "epsilon", "kl_target", "score_clip", "sft_fraction", "kl_warn",
                   "reward_timeout"),
            ("lora_r", "warmup_steps", "weight_decay", "max_grad_norm", "kl_coef", "kl_gain",
             "value_clip", "vf_coef", "missing_eos_penalty", "sft_coef", "num_train_epochs"))
        require(self.max_steps > 0 or self.num_train_epochs > 0,
                "nothing to do: give --max_steps or --num_train_epochs")
        require(0 <= self.eval_fraction < 1, f"--eval_fraction must lie in [0, 1), not {self.eval_fraction}")
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, f"--{name} must lie in [0, 1], not {getattr(self, name)}")
        require(self.kl_target is None or (self.kl_coef > 0 and 0 < self.kl_gain < 5),
                "--kl_target needs --kl_coef above 0 and --kl_gain in (0, 5): each rollout multiplies "
                "kl_coef by a factor between 1 - 0.2 kl_gain and 1 + 0.2 kl_gain")
        require(bool(self.sft_dataset) == (self.sft_coef > 0),
                "--sft_dataset and --sft_coef belong together: give both, or neither")
        require(self.sft_fraction <= 1, f"--sft_fraction must lie in (0, 1], not {self.sft_fraction}")
        require(self.reward_weights is None or len(self.reward_weights) == len(self.reward_funcs),
                f"--reward_weights has {len(self.reward_weights or [])} numbers "
                f"for {len(self.reward_funcs)} reward functions")
        self.reward_weights = self.reward_weights or [1.0] * len(self.reward_funcs)
        require(any(self.reward_weights), "--reward_weights are all 0: nothing would be rewarded")
        common.check_tracker(self.log_with)


# ---- loss --------------------------------------------------------------------------------------------------

def bound_scores(scores, truncated, score_clip=None, missing_eos_penalty=0.0):
    """clip(score, +-score_clip), less the penalty where the completion was cut: all (B,).

    Score 3, clip 2, penalty 1: 2, or 1 for a completion without an end.
    """
    scores = scores if score_clip is None else scores.clamp(-score_clip, score_clip)
    return scores - missing_eos_penalty * truncated


def kl_k1(logprobs, ref_logprobs):
    """log pi - log pi_ref at tokens sampled from pi (here pi_old), (B, T-1): its mean is KL(pi || pi_ref).

    Single values may be negative. It stands in the reward, where it carries no gradient of its own.
    """
    return logprobs - ref_logprobs


def per_token_rewards(scores, kl, loss_mask, kl_coef):
    """r_t = -kl_coef kl_t, plus the score at the last completion token: (B,), (B, T-1), (B, T-1) -> (B, T-1).

    0 where the mask is 0. Mask 0 1 1 0, kl 9 2 4 9, kl_coef 0.1, score 1: rewards 0, -0.2, -0.4 + 1, 0.
    """
    counts = loss_mask.bool()
    last = counts & (counts.flip(-1).cumsum(-1).flip(-1) == 1)  # the last 1 of each row
    rewards = -kl_coef * kl + torch.where(last, scores[:, None], 0.0)
    return torch.where(counts, rewards, 0.0)


def gae(rewards, values, loss_mask, gamma=1.0, gae_lambda=0.95):
    """delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  return R_t = A_t + V_t.

    All (B, T-1) fp32 -> (advantages, returns), both 0 where the mask is 0. Only tokens of the mask are steps:
    after the last one V and A are 0. (Schulman 2016, equations 16 and 11.)
    Rewards 0, 1, values 0.5, 0.6, gamma 1, lambda 0.95: deltas 0.1, 0.4; A = 0.48, 0.4; R = 0.98, 1.
    """
    advantages = torch.zeros_like(rewards)
    advantage = value = torch.zeros_like(rewards[:, 0])  # (B,): of the step after t
    for t in reversed(range(rewards.shape[1])):
        counts = loss_mask[:, t].bool()
        delta = rewards[:, t] + gamma * value - values[:, t]
        advantage = torch.where(counts, delta + gamma * gae_lambda * advantage, advantage)
        value = torch.where(counts, values[:, t], value)
        advantages[:, t] = torch.where(counts, advantage, 0.0)
    return advantages, torch.where(loss_mask.bool(), advantages + values, 0.0)


def whiten(x, mask):
    """(x - mean) / sqrt(variance + 1e-8) over the mask's ones, with n - 1 in the variance; 0 elsewhere. Any
    shape.

    1, 2, 3 give -1, 0, 1; equal values give 0.
    """
    known = x[mask.bool()]
    variance, mean = torch.var_mean(known, correction=min(1, len(known) - 1))  # one token alone: 0, not NaN
    return torch.where(mask.bool(), (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def policy_loss(logprobs, old_logprobs, advantages, epsilon=0.2):
    """max(-A ratio, -A clip(ratio, 1 - epsilon, 1 + epsilon)), ratio = pi / pi_old: all (B, T-1).

    Ratio 1.5, epsilon 0.2: -1.2 A for A > 0 (no gradient), -1.5 A for A < 0. (Schulman 2017, equation 7.)
    """
    ratio = (logprobs - old_logprobs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - epsilon, 1 + epsilon))


def value_loss(new_values, values, returns, value_clip=0.2):
    """0.5 max((v - R)^2, (clip(v, v_old - value_clip, v_old + value_clip) - R)^2): all (B, T-1).

    value_clip 0: 0.5 (v - R)^2. With v_old 0, R 1: v 0.5 gives 0.5 (0.2 - 1)^2 = 0.32 and no gradient.
    """
    error = (new_values - returns).square()
    if value_clip:
        clipped = values + (new_values - values).clamp(-value_clip, value_clip)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error


def adapt_kl_coef(kl_coef, kl, kl_target, kl_gain=0.1):
    """kl_coef (1 + kl_gain e), e = clip((kl - target) / target, -0.2, 0.2), kl in nats a sequence.

    Twice the target: 0.1 -> 0.102. (Ziegler 2019, section 2.2.)
    """
    return kl_coef * (1 + kl_gain * min(max((kl - kl_target) / kl_target, -0.2), 0.2))


class ChunkedLogprobs(torch.autograd.Function):
    """Log-prob, entropy and top-1 hit of N target tokens, with one chunk of the (N, V) logits in memory.

    z = h W^T / temperature,  log p(y) = z_y - logsumexp(z),  entropy = logsumexp(z) - sum_v p_v z_v: fp32 but
    for the matrix product, which autocast may do in bf16. Backward: d log p(y) / dz = onehot(y) - p, with p
    of the last chunk kept and that of the others recomputed. Entropy and hits are diagnostics and carry no
    gradient. hidden (N, d), weight (V, d), bias (V,) or None, targets (N,) -> three (N,).
    """

    CHUNK = 2**25  # logits at once, 128 MiB in fp32: enough rows for a fast matrix product

    @staticmethod
    def chunks(hidden, weight):
        """Row numbers, in equal parts of at most about CHUNK logits each -> [(chunk,)]."""
        count = max(1, math.ceil(len(hidden) * len(weight) / ChunkedLogprobs.CHUNK))
        return torch.arange(len(hidden), device=hidden.device).tensor_split(count)

    @staticmethod
    def logits(hidden, weight, bias, temperature, out):
        """z (chunk, V) fp32, in `out`: on a CPU, allocating it anew costs more than the softmax."""
        z = out[:len(hidden)]
        if weight.dtype == torch.float32:
            torch.mm(hidden, weight.T, out=z)
        else:
            z.copy_(hidden @ weight.T)
        if bias is not None:
            z += bias
        return z if temperature == 1 else z.div_(temperature)

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        device = hidden.device.type  # autograd does not autocast a custom backward: cast by hand in both
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        ctx.temperature = temperature
        w, chunks = weight.to(ctx.dtype), ChunkedLogprobs.chunks(hidden, weight)
        logprobs, entropy, hits = torch.empty(3, len(targets), dtype=torch.float32, device=hidden.device)
        out_z, out_p = (torch.empty(len(chunks[0]), len(w), dtype=torch.float32, device=hidden.device)
                        for _ in range(2))
        with torch.autocast(device, enabled=False):
            for rows in chunks:
                z = ChunkedLogprobs.logits(hidden[rows].to(ctx.dtype), w, bias, temperature, out_z)
                z -= z.amax(-1, keepdim=True)
                p = torch.exp(z, out=out_p[:len(rows)])
                total = p.sum(-1)  # softmax's own sum is off by 3e-5 for V = 150,000, this one by 1e-6
                z_y = z.gather(-1, targets[rows, None]).squeeze(-1)
                logprobs[rows] = z_y - total.log()
                entropy[rows] = total.log() - z.clamp_(min=-1e30).mul_(p).sum(-1) / total
                hits[rows] = (z_y == 0).float()  # the largest logit is 0 now; ties are hits
            p /= total[:, None]  # of the last chunk, for backward
        ctx.save_for_backward(hidden, weight, bias, targets, p)
        ctx.mark_non_differentiable(entropy, hits)
        return logprobs, entropy, hits

    @staticmethod
    def backward(ctx, grad, _entropy, _hits):
        hidden, weight, bias, targets, p = ctx.saved_tensors
        w, chunks = weight.to(ctx.dtype), ChunkedLogprobs.chunks(hidden, weight)
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        size = len(chunks[0]) if chunks[1:] else 0
        out = torch.empty(size, len(w), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in reversed(chunks):
                h, d_logprobs = hidden[rows].to(ctx.dtype), grad[rows, None] / ctx.temperature
                if rows is not chunks[-1]:
                    z = ChunkedLogprobs.logits(h, w, bias, ctx.temperature, out)
                    p = torch.softmax(z, -1, out=z)
                dz = p.mul_(-d_logprobs)  # (onehot(y) - p) d_logprobs
                dz = dz.scatter_add_(-1, targets[rows, None], d_logprobs).to(ctx.dtype)
                d_hidden[rows] = (dz @ w).to(hidden.dtype)
                if d_weight is not None and dz.dtype == torch.float32:
                    d_weight.addmm_(dz.T, h)
                elif d_weight is not None:
                    d_weight += dz.T @ h
                if d_bias is not None:
                    d_bias += dz.float().sum(0)
        return (d_hidden, None if d_weight is None else d_weight.to(weight.dtype),
                None if d_bias is None else d_bias.to(bias.dtype), None, None)


class Policy(nn.Module):
    """The module that accelerate wraps: trunk, head and log-softmax in one forward, so that gradients are
    synchronised."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # the units that FSDP shards

    def hidden(self, input_ids):
        """input_ids (B, T) right-padded -> the trunk's last hidden states (B, T, d).

        No attention mask: under causal attention no real token sees the padding on its right.
        """
        causal = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return causal.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def logprobs(self, hidden, input_ids, loss_mask, temperature):
        """-> logprobs, entropy, hits: (B, T-1) fp32, 0 where loss_mask (B, T-1) is 0."""
        counts, head = loss_mask.bool(), self.model.get_output_embeddings()
        hidden, targets = hidden[:, :-1][counts], input_ids[:, 1:][counts]  # the causal shift: (N, d), (N,)
        flat = ChunkedLogprobs.apply(hidden, head.weight, getattr(head, "bias", None), targets, temperature)
        zeros = torch.zeros(loss_mask.shape, dtype=torch.float32, device=input_ids.device)
        return tuple(zeros.masked_scatter(counts, x) for x in flat)  # (N,) -> (B, T-1)

    def forward(self, input_ids, loss_mask, temperature=1.0):
        return self.logprobs(self.hidden(input_ids), input_ids, loss_mask, temperature)


class PolicyValue(Policy):
    """Policy and value in one forward: the value is a head on the policy's trunk, or on its own."""

    def __init__(self, model, trunk, value_head):
        super().__init__(model)
        self.trunk, self.value_head = trunk, value_head  # trunk None: the policy's

    def forward(self, input_ids, loss_mask, temperature=1.0):
        """-> logprobs, entropy, values: (B, T-1) fp32, 0 where the mask is 0; value t is that of the state
        before token t+1."""
        hidden = self.hidden(input_ids)  # (B, T, d)
        logprobs, entropy, _ = self.logprobs(hidden, input_ids, loss_mask, temperature)
        if self.trunk is not None:
            hidden = self.trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(hidden[:, :-1].float()).squeeze(-1)  # (B, T-1)
        return logprobs, entropy, torch.where(loss_mask.bool(), values, 0.0)


def make_value_head(weight):
    """weight (1, d) -> Linear(d, 1) with a bias of 0."""
    head = nn.Linear(weight.shape[1], 1, device=weight.device)
    head.weight.data.copy_(weight.detach())
    nn.init.zeros_(head.bias)
    return head


def make_value(args, model, tokenizer, device, share_frozen=True):
    """-> (the value's trunk, or None for the policy's, and its head, Linear(d, 1)).

    From the first reward model whose tokens are the policy's, times its weight; else a copy of the policy's
    trunk, whose frozen weights both share (FSDP shards no weight in two places), with a head of zeros.
    """
    zeros = torch.zeros(1, model.config.hidden_size, device=device)
    if args.share_trunk:
        say("value    a head of zeros on the policy's trunk")
        return None, make_value_head(zeros)
    for name, reward_weight in zip(args.reward_funcs, args.reward_weights):
        folder, wanted = split_reward(name)
        if name in BUILT_IN or not os.path.isdir(folder):
            continue
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
        if theirs.get_vocab() != tokenizer.get_vocab():
            say(f"value    {folder} has another tokenizer: the value cannot start from it")
            continue
        config = AutoConfig.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
        names, value_args = list(config.id2label.values()), copy.copy(args)
        value_args.model_name_or_path = folder
        value_args.modules_to_save = [m for m in args.modules_to_save or [] if m != "lm_head"]  # it has none
        adapted = isinstance(model, PeftModel) and not common.base_and_adapter(folder)[1]
        value_args.lora_r = model.peft_config["default"].r if adapted else 0  # 0: its own adapter goes on
        classifier = common.load_model(value_args, tokenizer, device, score_names=names).to(device)
        classifier = classifier.get_base_model() if isinstance(classifier, PeftModel) else classifier
        if not hasattr(classifier, "score"):
            say(f"value    {folder} is no causal model with a score head: the value cannot start from it")
            continue
        index = names.index(wanted) if wanted else 0
        say(f"value    its own trunk, from the reward model {folder}")
        return classifier.base_model, make_value_head(reward_weight * classifier.score.weight[[index]])
    trunk = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
    say("value    its own trunk, a copy of the policy's, with a head of zeros")
    shared = {id(p): p for p in trunk.parameters() if share_frozen and not p.requires_grad}
    return copy.deepcopy(trunk, shared), make_value_head(zeros)


@torch.no_grad()
def check_head(policy, model, input_ids, accelerator):
    """Raises UserError if trunk + head do not give the model's own log-probs, which happens when a model
    scales or caps its logits."""
    model.eval()
    with accelerator.autocast():
        ours, _, _ = policy(input_ids, torch.ones_like(input_ids[:, 1:]))
        with common.unsharded(policy):
            logits = model(input_ids=input_ids, use_cache=False).logits
    model.train()
    theirs = logits.float().log_softmax(-1)[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    worst = (ours - theirs).abs().max().item()
    require(worst < (0.2 if accelerator.mixed_precision == "bf16" else 1e-3),
            f"models of type {model.config.model_type} change their logits after the head, "
            f"so their log-probs would be off by {worst:.2g}: not supported")


# ---- rewards -----------------------------------------------------------------------------------------------

def extract_answer(text):
    """The last number in a text's last <answer>...</answer>, or the words there, in lower case, if it has no
    number; without a tag the last number of the text; None if there is none.

    Numbers come in one form: 1,000 and $1000.00 and 1000. are "1000".
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    text = tagged[-1].strip() if tagged else text
    number = r"(?<![0-9.])(-?)\$?(-?)((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?)(?:\.([0-9]+))?(?<=[0-9])"
    found = list(re.finditer(number, text))
    if not found:
        return text.lower() or None if tagged else None
    minus, minus_too, whole, decimals = found[-1].groups()
    whole, decimals = whole.replace(",", "").lstrip("0") or "0", (decimals or "").rstrip("0")
    value = whole + ("." + decimals if decimals else "")
    return "-" + value if (minus or minus_too) and value != "0" else value


def text_of(completion):
    """A completion as a reward function gets it, string or messages, as a string."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def reference_answers(n, columns):
    """The `answer`, else the `solution`, else None, of each of n rows."""
    return [a if a is not None else s for a, s in zip(*(columns.get(name) or [None] * n
                                                        for name in ("answer", "solution")))]


def accuracy(prompts, completions, **columns):
    """1 if the completion's extract_answer is that of the row's `answer` (or `solution`), 0 if not, None
    where the row has no such column or extract_answer finds nothing in it."""
    known = [None if a is None else extract_answer(str(a))
             for a in reference_answers(len(completions), columns)]
    return [None if k is None else float(extract_answer(text_of(c)) == k) for c, k in zip(completions, known)]


def format_reward(prompts, completions, **columns):
    """1 for <think>...</think><answer>...</answer> and nothing else, 0 otherwise."""
    shape = r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*"
    return [float(re.fullmatch(shape, text_of(c), re.DOTALL) is not None) for c in completions]


def levenshtein(a, b):
    """The fewest insertions, deletions and replacements of characters that turn a into b.

    One column of the usual table at a time, as the bits of two integers (Myers 1999, in the form of Hyyrö
    2003): bit i of up, down says that row i + 1 is one more, one less than row i. 2,000 x 2,000 characters
    take some 3 ms; cell by cell Python needs 2 s.
    """
    ones, where = (1 << len(a)) - 1, {}
    for i, letter in enumerate(a):
        where[letter] = where.get(letter, 0) | 1 << i
    up, down = ones, 0
    for letter in b:
        equal = where.get(letter, 0)
        same = (((equal & up) + up) ^ up) | equal | down  # equal to the cell one row up, one column before
        more = (down | ~(same | up)) << 1 | 1  # one more than in the column before, for the row below
        up, down = ((up & same) << 1 | ~(same | more)) & ones, more & same & ones
    return len(b) + up.bit_count() - down.bit_count()


def edit_distance(prompts, completions, **columns):
    """1 - (Levenshtein distance to the row's `answer` or `solution`) / (length of the longer one), None where
    there is none."""
    pairs = [(text_of(c).strip(), None if r is None else str(r).strip())
             for c, r in zip(completions, reference_answers(len(completions), columns))]
    return [None if r is None else 1 - levenshtein(c, r) / max(len(c), len(r), 1) for c, r in pairs]


def keys_of(column):
    """A row's `schema`, a list of keys or the JSON text of one -> the list, empty where there is none."""
    with suppress(ValueError):
        keys = json.loads(column) if isinstance(column, str) and column.strip() else column or []
        if isinstance(keys, list) and all(isinstance(key, str) for key in keys):
            return keys
    raise ValueError(f"the column 'schema' must be a list of keys, not {str(column)[:80]!r}")


def json_reward(prompts, completions, **columns):
    """1 if the completion, less a ``` or ```json fence around it, is JSON and, where the row's `schema`
    lists keys, is an object that has them; 0 otherwise."""
    def fits(text, keys):
        fenced = re.fullmatch(r"```(?:json)?\s(.*)```", text, re.DOTALL)
        try:  # int, called on NaN and Infinity, raises ValueError: they are not JSON
            value = json.loads(fenced[1] if fenced else text, parse_constant=int)
        except (ValueError, RecursionError):
            return False
        return not keys or isinstance(value, dict) and set(keys) <= value.keys()
    schemas = [keys_of(s) for s in columns.get("schema") or [None] * len(completions)]
    return [float(fits(text_of(c).strip(), keys)) for c, keys in zip(completions, schemas)]


def tests_of(column):
    """A row's `tests`, Python as a string or several -> the list, empty where there is none."""
    tests = [column] if isinstance(column, str) else column or []
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"the column 'tests' must be a string or strings, not {str(column)[:80]!r}")
    return [test for test in tests if test.strip()]


CODE_SECONDS = 10
# The limits are set here and not by preexec_fn, which may deadlock where there are threads. What runs after
# the completion is bound before it, so that patching builtins or modules does not change it. There is no
# RLIMIT_NPROC: it counts all of the user's processes, so no number is right.
CODE_RUNNER = """
import json, os, resource, signal, sys
def main(run=exec, write=os.write, leave=os._exit, answer=os.dup(1)):
    token, seconds, *texts = json.load(sys.stdin)
    for fd in 0, 1:
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    signal.alarm(seconds + 1)  # in case the trainer is killed
    for name, most in ("CPU", seconds), ("AS", 2**30), ("FSIZE", 2**24), ("CORE", 0):
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
        except (ValueError, OSError):  # macOS lacks some; or it is lower already
            pass
    sys.modules["__main__"] = module = type(sys)("__main__")
    try:
        for program in [compile(text, "<completion>", "exec") for text in texts]:
            run(program, module.__dict__)
        write(answer, token.encode())
    finally:
        leave(0)  # waits for no thread
main()
"""


def passes(code, tests, stop):
    """Whether `tests` run to their end after `code` (see code_reward); the event `stop` ends it early."""
    token, folder, end = os.urandom(16).hex(), tempfile.mkdtemp(), time.monotonic() + CODE_SECONDS
    with tempfile.TemporaryFile() as job:
        job.write(json.dumps([token, CODE_SECONDS, code, *tests]).encode())
        job.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", CODE_RUNNER], stdin=job, stdout=subprocess.PIPE, cwd=folder,
            stderr=subprocess.DEVNULL, env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True)
    try:
        answer = select.poll()
        answer.register(process.stdout, select.POLLIN)
        while not (stop.is_set() or time.monotonic() > end or answer.poll(100)):  # milliseconds
            pass
        return bool(answer.poll(0)) and os.read(process.stdout.fileno(), 64) == token.encode()
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # before wait, which frees the number for another process
        process.wait()
        process.stdout.close()
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)  # rmtree fails on deep nesting


def code_reward(prompts, completions, **columns):
    """1 if the row's `tests` pass after the completion's code (its last ``` block, or else all of it), 0 if
    not, None where there are none.

    Each runs in its own process: 10 s, 1 GiB, files of 16 MiB in a folder that is removed; no environment, no
    input, no output; its process group is killed in any case. Only a random token sent after the last test
    counts as passed, so ending early fails. This is no sandbox: it limits accidents, not malice. Files, the
    network, the token in the caller's frame, an object that equals everything: all are within reach. Train in
    a container.
    """
    def run(completion, tests):
        text = text_of(completion)
        blocks = re.findall(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", text, re.DOTALL | re.MULTILINE)
        return float(passes(blocks[-1] if blocks else text, tests, stop)) if tests else None
    tests = [tests_of(t) for t in columns.get("tests") or [None] * len(completions)]
    at_once = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes share the cores
    stop, pool = threading.Event(), ThreadPoolExecutor(max(1, at_once))
    try:
        return list(pool.map(run, completions, tests))
    finally:  # --reward_timeout interrupts this thread alone: the others kill what they run
        stop.set()
        pool.shutdown(cancel_futures=True)


BUILT_IN = {"accuracy": accuracy, "format": format_reward, "edit_distance": edit_distance,
            "json": json_reward, "code": code_reward}


def check_columns(rewards, train, held, dataset_name):
    """UserError, before a model is loaded, if a row's columns are not what the built-in rewards read."""
    needed = {"accuracy": ("answer", "solution"), "edit_distance": ("answer", "solution"), "code": ("tests",)}
    used = {name for name, (reward, _) in rewards.items() if reward is BUILT_IN.get(name)}
    for row in train + held:
        with common.explain(row["place"], (ValueError, SyntaxError)):
            if "json" in used:
                keys_of(row["columns"].get("schema"))
            for test in tests_of(row["columns"].get("tests")) if "code" in used else []:
                compile(test, "the column 'tests'", "exec")  # or no completion of this row could pass
    for name, columns in needed.items():
        require(name not in used or any(row["columns"].get(c) is not None for row in train for c in columns),
                f"--reward_funcs {name} needs a column {' or '.join(map(repr, columns))}; {dataset_name} has "
                f"{', '.join(train[0]['columns']) or 'no other column than the prompt'}")


def split_reward(name):
    """folder, folder:score or file.py:function -> (path, what follows the colon, or None)."""
    path, colon, what = name.rpartition(":")
    return (path, what) if colon and not os.path.exists(name) else (name, None)


def reward_of_model(name, args, device):
    """A reward model's folder, or folder:score, as a reward function -> (label, function)."""
    folder, wanted = split_reward(name)
    names, score_texts = common.load_reward_model(folder, device, args.trust_remote_code)
    require(wanted or len(names) == 1,
            f"reward '{name}': it has several scores ({', '.join(names)}): say which, as {name}:{names[0]}")
    wanted = wanted or names[0]
    require(wanted in names, f"reward '{name}': the model's scores are {', '.join(names)}")

    def reward(turns, completions, truncated):  # the turns the policy saw, system prompt and all
        conversations = [[*before, common.turn("assistant", text_of(completion))]
                         for before, completion in zip(turns, completions)]
        return score_texts(conversations, truncated)[:, names.index(wanted)].tolist()
    reward.of_model = True
    parent, own = os.path.split(os.path.abspath(folder))
    label = os.path.basename(parent) if own in ("model", "merged") else own
    return f"{label}_{wanted}", reward


def load_rewards(args, device="cpu"):
    """--reward_funcs -> {name: (function, weight)}. Raises UserError if a file or function is not there."""
    rewards = {}
    for name, weight in zip(args.reward_funcs, args.reward_weights):
        path, function = split_reward(name)
        if name in BUILT_IN:
            label, reward = name, BUILT_IN[name]
        elif os.path.isdir(path):
            label, reward = reward_of_model(name, args, device)
        else:
            require(function or not name.endswith(".py"), f"reward '{name}': say which: {name}:function")
            require(path.endswith(".py"), f"no reward '{name}': built in are {', '.join(BUILT_IN)}; "
                    "your own is file.py:function, or a reward model's folder")
            require(os.path.isfile(path), f"reward '{name}': no such file: {path}")
            spec = importlib.util.spec_from_file_location("reward_file_" + os.path.basename(path)[:-3], path)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
            try:
                spec.loader.exec_module(module)
            except (Exception, SystemExit) as error:
                raise UserError(f"reward '{name}': importing {path} raised {type(error).__name__}: "
                                f"{' '.join(str(error).split())}") from None
            label, reward = function, getattr(module, function, None)
            require(callable(reward), f"reward '{name}': {path} has no function '{function}'")
        require(label not in rewards, f"two rewards are called '{label}'")
        rewards[label] = (reward, weight)
    return rewards


def reward_sources(args):
    """Fingerprints of the files and folders that rewards come from: a changed one is not resumed with."""
    paths = sorted({split_reward(name)[0] for name in args.reward_funcs if name not in BUILT_IN})
    return [{path: common.fingerprint_of_file(path)} for path in paths]


@contextmanager
def time_limit(seconds):
    """Raises TimeoutError in the middle of what runs inside, once that has taken so many seconds."""
    def stop(*_):
        raise TimeoutError(f"no answer in {seconds:g} s (--reward_timeout)")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def call_reward(reward, given, timeout):
    """Calls the function with those of TRL's keyword arguments that it names; all if it takes **kwargs."""
    parameters = inspect.signature(reward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    with time_limit(timeout):
        values = reward(**{k: v for k, v in given.items() if takes_all or k in parameters})
        return asyncio.run(values) if inspect.isawaitable(values) else values


def score(rewards, rows, records, step, total_steps, timeout=600.0):
    """Calls every reward function once on all completions -> (rewards (N, F) with NaN for None, {logged name:
    value}).

    rows: the prompt of each record. Raises UserError naming function, row and completion on an exception,
    a wrong length or type, or a non-finite number, and naming the function if it takes too long.
    """
    chat, texts = [isinstance(row["prompt"], list) for row in rows], [r["text"] for r in records]
    logged, out = {}, torch.full((len(rows), len(rewards)), math.nan)
    given = {name: [row["columns"][name] for row in rows] for name in rows[0]["columns"]}
    given |= {"prompts": [row["prompt"] for row in rows],
              "completions": [[{"role": "assistant", "content": t}] if c else t for t, c in zip(texts, chat)],
              "completion_ids": [r["completion_ids"] for r in records]}
    for_models = {"turns": [row["turns"] for row in rows], "truncated": [r["truncated"] for r in records]}
    constant = {"trainer_state": SimpleNamespace(global_step=step, max_steps=total_steps),
                "log_metric": logged.__setitem__, "log_extra": lambda name, values: None}
    for f, (name, (reward, _)) in enumerate(rewards.items()):
        lists = given | for_models if hasattr(reward, "of_model") else given

        def at(i):
            return f"the completion {texts[i][:80]!r} of row {rows[i]['place']}"
        try:
            values = call_reward(reward, lists | constant, timeout)
        except (Exception, SystemExit) as error:
            where, what = "the whole batch", f"{type(error).__name__}: {' '.join(str(error).split())}"
            for i in [] if isinstance(error, TimeoutError) else range(len(rows)):  # one by one, to say which
                try:
                    call_reward(reward, {k: v[i:i + 1] for k, v in lists.items()} | constant, timeout)
                except (Exception, SystemExit):
                    where = at(i)
                    break
            raise UserError(f"reward function '{name}' raised {what}, on {where}") from error
        require(hasattr(values, "__iter__") and not isinstance(values, str),
                f"reward function '{name}' returned {type(values).__name__}, not a list of numbers")
        values = list(values)
        require(len(values) == len(rows),
                f"reward function '{name}' returned {len(values)} values for {len(rows)} completions")
        for i, value in enumerate(values):
            try:
                number = math.nan if value is None else float(value)
            except (TypeError, ValueError, RuntimeError):
                number = math.inf
            fine = value is None or (abs(number) < 1e30 and not isinstance(value, str))
            require(fine, f"reward function '{name}' returned {value!r} for {at(i)}; "
                    "expected a finite number, or None for not applicable")
            out[i, f] = number
    return out, logged


# ---- data --------------------------------------------------------------------------------------------------

def load_prompts(args, tokenizer):
    """-> (train, held out): dicts of prompt (as in the row), turns, prompt_ids, row, columns, place."""
    def encode(items):
        columns = sorted({name for _, row, _ in items for name in row} - {"prompt", "completion"})
        taken = {"prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"}
        for name in taken.intersection(columns):
            raise UserError(f"the column '{name}' has the name of something else that reward functions are "
                            "given; rename it")
        prompts = []
        for (prompt, messages), row, place in items:
            with common.explain(place, ValueError):
                prompt_ids = common.encode_prompt(tokenizer, messages)
            if len(prompt_ids) <= args.max_prompt_length:
                prompts.append({"prompt": prompt, "turns": messages, "prompt_ids": prompt_ids, "place": place,
                                "row": row, "columns": {name: row.get(name) for name in columns}})
        return prompts

    items, _ = common.read_items(args.dataset_name, args, common.PROMPT_FORMATS, common.to_prompt)
    if args.eval_dataset_name:
        held, _ = common.read_items(args.eval_dataset_name, args, common.PROMPT_FORMATS, common.to_prompt)
        parts = items, held
    else:
        keys = [common.prompt_key(messages) for (_, messages), _, _ in items]
        parts = common.hold_out(items, keys, args.eval_fraction)
    train, held = map(encode, parts)
    dropped = sum(map(len, parts)) - len(train) - len(held)
    too_long = f"; {dropped:,} dropped: longer than --max_prompt_length {args.max_prompt_length} tokens"
    say(f"data     {len(train):,} prompts to train on, {len(held):,} to evaluate"
        f"{too_long if dropped else ''}")
    require(train, f"{args.dataset_name}: no prompt to train on is left")
    return train, held


def collate(examples, device):
    """Examples -> input_ids (B, T) right-padded, loss_mask (B, T-1)."""
    input_ids = common.pad([e["input_ids"] for e in examples], 0)
    completion_mask = common.pad([e["completion_mask"] for e in examples], 0)
    return input_ids.to(device), completion_mask[:, 1:].to(device)


def pad_masked(rows, name, loss_mask):
    """The rows' (T_i - 1,) tensors of that name -> (B, T-1) fp32, 0 where the mask is 0."""
    padded = common.pad([r[name] for r in rows], 0.0, dtype=torch.float32).to(loss_mask.device)
    return torch.where(loss_mask.bool(), padded, 0.0)


def micro_batches(lengths, micro_batch_tokens, process_index=0, num_processes=1):
    """The rows of one step, longest first, dealt to the processes and cut -> this process's lists of row
    indices.

    Each micro-batch holds at most micro_batch_tokens padded tokens (or one row). Since every loss is divided
    by a denominator of the whole step, any cut gives the same gradient. Every process gets equally many,
    because under FSDP processes wait for one another; the missing ones are empty lists, run all masked.
    """
    order, shares = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
    for first in range(num_processes):
        shares.append([[]])
        for i in order[first::num_processes]:
            batch = shares[-1][-1]
            if batch and (len(batch) + 1) * lengths[batch[0]] > micro_batch_tokens:
                shares[-1].append([])
            shares[-1][-1].append(i)
    return shares[process_index] + [[]] * (max(map(len, shares)) - len(shares[process_index]))


def stream(*key):
    """A random generator that depends on nothing but its key, such as (seed, "order", epoch)."""
    return torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1)


def load_demonstrations(args, tokenizer, held):
    """--sft_dataset -> dicts of input_ids and completion_mask, for the NLL term of PPO-ptx, without the
    prompts that are held out."""
    own, examples, cut = copy.copy(args), [], 0
    own.format = None  # --format is about the prompts
    items, _ = common.read_items(args.sft_dataset, own, common.SFT_FORMATS, common.to_conversation)
    held = {common.prompt_key(prompt["turns"]) for prompt in held}
    kept = [item for item in items if common.prompt_key(item[0].get("messages", [])) not in held]
    for conversation, _, place in kept:
        with common.explain(place, ValueError):
            parts = ([common.encode_text(tokenizer, conversation["text"])] if "text" in conversation
                     else common.encode_conversation(tokenizer, conversation["messages"]))
        for part in parts:
            ids, mask = common.truncate(part["input_ids"], part["completion_mask"],
                                        args.max_prompt_length + args.max_completion_length)
            cut += len(ids) < len(part["input_ids"])
            if any(mask[1:]):
                examples.append({"input_ids": torch.tensor(ids, dtype=torch.int32),
                                 "completion_mask": torch.tensor(mask, dtype=torch.int8)})
    say(f"data     {len(examples):,} examples for the SFT term; {len(items) - len(kept):,} rows of held-out "
        f"prompts left out, {cut:,} cut to {args.max_prompt_length + args.max_completion_length} tokens")
    require(examples, f"{args.sft_dataset}: no row to train on is left")
    return examples


def endless_order(start, count, total, *key):
    """Places start, start + 1, ... of one permutation of range(total) after another."""
    first, last = start // total, (start + count - 1) // total
    order = torch.cat([torch.randperm(total, generator=stream(*key, n)) for n in range(first, last + 1)])
    return order[start - first * total:][:count].tolist()


# ---- rollout -----------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, prompt_ids, attention_mask, uniforms, max_completion_length, temperature, stop_ids,
           num_generations=1):
    """Samples num_generations completions a prompt from softmax(logits / temperature): the whole of it, and
    nothing else.

    prompt_ids, attention_mask (N, P) left-padded; uniforms (N*G, C) in [0, 1), one row a completion, or None
    for the most likely token. -> completion_ids (N*G, C), logprobs (N*G, C) of what was sampled, lengths
    (N*G,) with the end-of-turn token counted. Token t of a row is where its u_t falls in the cumulative
    distribution, so a row does not depend on its batch mates.
    """
    device, rows = prompt_ids.device, len(prompt_ids) * num_generations
    completion_ids = torch.zeros(rows, max_completion_length, dtype=torch.long, device=device)
    logprobs = torch.zeros(rows, max_completion_length, device=device)
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    stop_ids = torch.tensor(stop_ids, device=device)

    # each prompt is read once; its cache is then repeated for its G completions
    cache = DynamicCache(config=model.config)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # left padding shifts positions
    logits = model(input_ids=prompt_ids, attention_mask=attention_mask, position_ids=position_ids,
                   past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(num_generations)
    logits, mask, position = (x.repeat_interleave(num_generations, 0)
                              for x in (logits, attention_mask, position_ids[:, -1:]))

    alive = torch.arange(rows, device=device)  # the rows that have not ended; only they stay in the batch
    for t in range(max_completion_length):
        all_logprobs = (logits.float() / temperature).log_softmax(-1)  # (alive, V)
        if uniforms is None:
            token = all_logprobs.argmax(-1)
        else:
            cumulative = all_logprobs.double().exp().cumsum(-1)
            u = uniforms[alive, t, None] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, u, right=True).squeeze(-1).clamp(
                max=cumulative.shape[-1] - 1)
        completion_ids[alive, t] = token
        logprobs[alive, t] = all_logprobs.gather(-1, token[:, None]).squeeze(-1)
        lengths[alive] += 1
        going = ~torch.isin(token, stop_ids)
        if t == max_completion_length - 1 or not going.any():
            return completion_ids, logprobs, lengths
        if not going.all():
            kept = going.nonzero().squeeze(-1)
            cache.batch_select_indices(kept)
            alive, token, mask, position = alive[kept], token[kept], mask[kept], position[kept]
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], -1), position + 1
        logits = model(input_ids=token[:, None], attention_mask=mask, position_ids=position,
                       past_key_values=cache, use_cache=True).logits[:, -1]


def rollout(model, prompts, args, accelerator, tokenizer, stop_ids, rewards, step, total_steps, greedy=False,
            first=0):
    """Completes and scores the prompts -> (one dict a completion, in order, the same on every process;
    {logged name: value}). `first`: how many prompts this step has sampled already.

    A process samples and scores its share of the prompts; then all are gathered, so what follows knows the
    whole rollout.
    """
    G, C = 1 if greedy else args.num_generations, args.max_completion_length
    mine = sorted(range(accelerator.process_index, len(prompts), accelerator.num_processes),
                  key=lambda i: len(prompts[i]["prompt_ids"]))
    at_once, records = max(1, args.rollout_batch_size // G), []
    model.eval()  # in train mode with checkpointing a model ignores its cache
    for part in (mine[i:i + at_once] for i in range(0, len(mine), at_once)):
        ids = [prompts[i]["prompt_ids"] for i in part]
        prompt_ids = common.pad(ids, tokenizer.pad_token_id, side="left").to(accelerator.device)
        attention_mask = common.pad([[1] * len(x) for x in ids], 0, side="left").to(accelerator.device)
        uniforms = None if greedy else torch.stack(
            [torch.rand(C, generator=stream(args.seed, "sample", step, row), dtype=torch.float64)
             for i in part for row in range((first + i) * G, (first + i) * G + G)]).to(accelerator.device)
        with accelerator.autocast():
            sampled = sample(model, prompt_ids, attention_mask, uniforms, C, args.temperature, stop_ids, G)
        for row, (completion, logprobs, length) in enumerate(zip(*(x.cpu() for x in sampled))):
            i, prompt, completion = part[row // G], ids[row // G], completion[:length].tolist()
            records.append({
                "index": i * G + row % G, "prompt": i, "completion_ids": completion,
                "input_ids": torch.tensor(prompt + completion, dtype=torch.int32),  # (T_i,)
                "completion_mask": torch.tensor([0] * len(prompt) + [1] * len(completion), dtype=torch.int8),
                "sampled_logprobs": F.pad(logprobs[:length], (len(prompt) - 1, 0)),  # (T_i - 1,)
                "text": tokenizer.decode(completion, skip_special_tokens=True),
                "truncated": completion[-1] not in stop_ids})
    model.train()
    records.sort(key=lambda r: r["index"])
    # reward functions may draw random numbers
    set_seed(stream(args.seed, "rewards", step, accelerator.process_index).initial_seed() % 2**32)
    try:
        scored, logged = score(
            rewards, [prompts[r["prompt"]] for r in records], records, step, total_steps,
            args.reward_timeout) if records else ([], {})
        for record, values in zip(records, scored):
            record["rewards"] = values  # (F,), NaN where the function does not apply
        share = [(records, logged)]
    except UserError as error:  # every process must learn of it, or the others would wait for ever
        share = [error]
    shares = gather_object(share)
    for part in shares:
        if isinstance(part, UserError):
            raise part
    records = sorted((r for part, _ in shares for r in part), key=lambda r: r["index"])
    weights = torch.tensor([weight for _, weight in rewards.values()])
    for record in records:  # the score: the weighted sum of the rewards that apply, NaN if none does
        values = record["rewards"]
        record["score"] = math.nan if values.isnan().all() else (weights * values).nansum().item()
    logged = {}  # a reward function's own metrics: the mean over the processes that logged them
    for _, part in shares:
        for name, value in part.items():
            logged.setdefault(name, []).append(value)
    return records, {name: sum(values) / len(values) for name, values in logged.items()}


@torch.no_grad()
def forward_of_rollout(policy, records, args, accelerator):
    """The training forward on every record, no gradients: a list of its outputs, each cut to (T_i - 1,), on
    the CPU, the same on every process."""
    lengths, mine = [len(r["input_ids"]) for r in records], []
    for batch in micro_batches(lengths, args.micro_batch_tokens, accelerator.process_index,
                               accelerator.num_processes):
        if batch:
            input_ids, loss_mask = collate([records[i] for i in batch], accelerator.device)
            with accelerator.autocast():
                outputs = policy(input_ids, loss_mask, args.temperature)  # each (B, T-1)
            mine += [(i, [x[:lengths[i] - 1].cpu() for x in one]) for i, one in zip(batch, zip(*outputs))]
    return [one for _, one in sorted(gather_object(mine), key=lambda pair: pair[0])]


def rollout_metrics(records, rewards):
    """A rollout's rewards, unweighted, weighted and in sum, and lengths: known before anything is learned."""
    values = torch.stack([r["rewards"] for r in records])  # (N, F)
    metrics = {"reward": torch.tensor([r["score"] for r in records]).nanmean().item(),
               "completions/mean_length": sum(len(r["completion_ids"]) for r in records) / len(records),
               "completions/clipped_ratio": sum(r["truncated"] for r in records) / len(records)}
    for (name, (_, weight)), column in zip(rewards.items(), values.T):
        known = column[~column.isnan()]
        metrics[f"rewards/{name}/mean"] = known.mean().item()
        metrics[f"rewards/{name}/std"] = known.std().item() if len(known) > 1 else 0.0
        metrics[f"rewards/{name}/weighted"] = weight * known.mean().item()
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def sample_record(record, prompt, rewards):
    """What samples.jsonl and the table show of a completion."""
    values = [None if math.isnan(x) else x for x in record["rewards"].tolist()]
    return {"prompt": prompt, "completion": record["text"], **dict(zip(rewards, values))}


def distinct_n(sequences, n=4):
    """Different n-grams / all n-grams of token sequences, after Li 2016 (arXiv 1510.03055), who divide by the
    tokens; 1: none comes twice."""
    grams = [tuple(s[i:i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def drift_signs(seen, first):
    """Signs of over-optimisation: a rollout's metrics against the first one's -> {metric: sentence}."""
    signs, length, distinct = {}, "completions/mean_length", "completions/distinct_4"
    if seen[length] > 2 * first[length]:
        signs[length] = (f"completions have {seen[length]:.0f} tokens, at first {first[length]:.0f}: "
                         "the reward may be paying for length")
    if seen[distinct] < 0.5 * first[distinct]:
        signs[distinct] = (f"completions repeat: {seen[distinct]:.0%} of their 4-grams are different, "
                           f"at first {first[distinct]:.0%}")
    return signs


def add_advantages(records, args, kl_coef):
    """Fills in every record's advantages and returns, (T_i - 1,) -> metrics of the rollout.

    The records are the whole rollout, on every process: that makes the whitening global. N rows, (N, T-1).
    """
    loss_mask = common.pad([r["completion_mask"] for r in records], 0)[:, 1:]
    old_logprobs, ref_logprobs, values = (pad_masked(records, name, loss_mask)
                                          for name in ("old_logprobs", "ref_logprobs", "values"))
    truncated = torch.tensor([float(r["truncated"]) for r in records])  # (N,)
    scores = bound_scores(torch.tensor([r["score"] for r in records]), truncated, args.score_clip,
                          args.missing_eos_penalty)  # (N,)
    kl = kl_k1(old_logprobs, ref_logprobs)
    token_rewards = per_token_rewards(scores, kl, loss_mask, kl_coef)
    advantages, returns = gae(token_rewards, values, loss_mask, args.gamma, args.gae_lambda)
    whitened = whiten(advantages, loss_mask)
    for record, score, *of_tokens in zip(records, scores.tolist(), whitened, returns, token_rewards):
        record["bounded_score"] = score
        for name, x in zip(("advantages", "returns", "token_rewards"), of_tokens):
            record[name] = x[:len(record["input_ids"]) - 1]
    metrics = {"score": scores.mean().item(), "score_std": scores.std(correction=0).item(),
               "rlhf_reward": token_rewards.sum(-1).mean().item()}
    if args.kl_coef > 0:
        metrics |= {"kl": (kl.sum() / loss_mask.sum()).item(), "kl_sequence": kl.sum(-1).mean().item(),
                    "kl_coef": kl_coef}
    unexplained, spread = (x[loss_mask.bool()].var(correction=0).item()  # 1 - Var(R - V) / Var(R), R - V = A
                           for x in (advantages, returns))
    return metrics | ({"values/explained_variance": 1 - unexplained / spread} if spread > 0 else {})


def warning_signs(seen, first, kl_warn):
    """drift_signs, and those of the KL and of the scores -> {metric: sentence}."""
    signs, kl = drift_signs(seen, first), seen.get("kl_sequence", 0.0)
    if kl > kl_warn:
        signs["kl"] = (f"the policy is {kl:.3g} nats a completion from its reference (--kl_warn "
                       f"{kl_warn:g}): raise --kl_coef, or set --kl_target")
    if kl < -1:
        signs["kl"] = (f"the KL estimate is {kl:.3g} nats a completion, and no KL is negative: "
                       "what is scored is not what was sampled")
    if abs(seen["score"]) + seen["score_std"] > 10:
        signs["score"] = (f"scores are around {seen['score']:.3g} +- {seen['score_std']:.3g}: the value's "
                          "loss grows with their square and drowns the policy's; use --reward_weights or "
                          "--score_clip")
    return signs


# ---- evaluation --------------------------------------------------------------------------------------------

def evaluate(model, prompts, args, accelerator, tokenizer, stop_ids, rewards, step, total_steps):
    """Greedy completions of the held-out prompts -> (metrics, records). eval/accuracy is exact match, where
    rows have answers."""
    records, logged = rollout(model, prompts, args, accelerator, tokenizer, stop_ids, rewards, step,
                              total_steps, greedy=True)
    figures = rollout_metrics(records, rewards) | logged
    metrics = {f"eval/{name}": value for name, value in figures.items()
               if not name.endswith(("/std", "/weighted"))}
    columns = {name: [prompts[r["prompt"]]["columns"].get(name) for r in records]
               for name in ("answer", "solution")}
    right = [r for r in accuracy(None, [r["text"] for r in records], **columns) if r is not None]
    if right:
        metrics["eval/accuracy"] = sum(right) / len(right)
    return metrics, records


# ---- training ----------------------------------------------------------------------------------------------

def learning_rate_at(step, total_steps, args):
    """The learning rate of update `step` (0, 1, ...), a plain function: linear warm-up, then cosine or
    linear decay to 0, or none."""
    warmup = args.warmup_steps * total_steps if args.warmup_steps < 1 else args.warmup_steps
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


def main(args):
    accelerator = common.make_accelerator(args)
    if args.learning_rate is None:
        args.learning_rate = 3e-5 if common.trains_adapter(args) else 3e-6
    checkpoint = common.open_run(args)

    # data and rewards: all is read, checked and tried before the model is loaded
    rewards = load_rewards(args, accelerator.device)
    tokenizer = common.load_tokenizer(args)
    train, held = load_prompts(args, tokenizer)
    demonstrations = load_demonstrations(args, tokenizer, held) if args.sft_dataset else []
    data = common.check_data(checkpoint, common.fingerprint([p | {"place": None} for p in train]
                                                            + demonstrations + reward_sources(args)))
    check_columns(rewards, train, held, args.dataset_name)
    score(rewards, train[:1], [{"text": "a first try", "completion_ids": [0], "truncated": False}], 0, 0,
          args.reward_timeout)
    common.show_example(tokenizer, train[0]["prompt_ids"], [0] * len(train[0]["prompt_ids"]), "first prompt")
    completions = min(len(train), args.batch_size) * args.num_generations
    require(args.num_minibatches <= completions, f"--num_minibatches {args.num_minibatches} is more than the "
            f"{completions} completions of a rollout")
    rollouts_per_epoch = math.ceil(len(train) / args.batch_size)
    updates = args.num_iterations * args.num_minibatches  # of one rollout
    num_rollouts = math.ceil(args.max_steps / updates if args.max_steps > 0
                             else rollouts_per_epoch * args.num_train_epochs)
    total_steps = num_rollouts * updates
    sft_rows = max(1, round(args.sft_fraction * args.batch_size * args.num_generations
                            / args.num_minibatches))  # of one update

    # policy, value, reference, optimizer, and where an earlier run stopped
    model = common.load_model(args, tokenizer, accelerator.device).to(accelerator.device)
    stop_ids = model.generation_config.eos_token_id
    module = PolicyValue(model, *make_value(args, model, tokenizer, accelerator.device,
                                            not accelerator.is_fsdp2))
    reference = None
    if args.kl_coef > 0:
        ref_model, use_reference, how = common.make_reference(
            model, common.base_and_adapter(args.model_name_or_path)[1])
        reference = Policy(ref_model.to(accelerator.device))
        say(f"reference {how}")
    optimizer = make_optimizer(module, args)
    policy, optimizer = common.prepare(accelerator, module, optimizer)
    check_head(policy, model, torch.tensor([train[0]["prompt_ids"][:64]], device=accelerator.device),
               accelerator)
    state = {"step": 0, "num_tokens": 0, "data": data, "kl_coef": args.kl_coef, "first": None}
    if checkpoint:
        common.restore(module, optimizer, checkpoint)
        state = {name: checkpoint[1][name] for name in state}
    log = common.RunLog(accelerator, args, total_steps, state["step"])
    audit = common.Audit(accelerator, args, tokenizer, state["step"], total_steps)
    interrupt, warned, flat_rollouts = common.Interrupt(), set(), 0
    say(f"train    {num_rollouts} rollouts of {args.batch_size} prompts x {args.num_generations} "
        f"completion(s), {updates} update(s) each; learning rate {args.learning_rate:g} "
        f"({args.lr_scheduler_type}), {accelerator.num_processes} process(es) on {accelerator.device}")

    def report():
        """Evaluates, prints, logs, and writes every completion to samples.jsonl."""
        if held and not args.audit:
            step = state["step"]
            with common.unsharded(policy):
                metrics, records = evaluate(model, held, args, accelerator, tokenizer, stop_ids, rewards,
                                            step, total_steps)
            log.metrics(step, metrics)
            table = [sample_record(r, held[r["prompt"]]["prompt"], rewards) for r in records]
            for row in table:
                log.write("samples.jsonl", {"step": step, "kind": "evaluation", **row})
            say(f"eval     step {step}: " + "  ".join(f"{k[5:]} {v:.4f}" for k, v in metrics.items()))
            common.show_table(table[:3])

    if state["step"] == 0:
        report()
    for rollout_index in range(state["step"] // updates, num_rollouts):
        # rollout: prompts are a function of (seed, epoch) and the rollout's number
        first_step = state["step"]
        epoch, at = divmod(rollout_index, rollouts_per_epoch)
        order = torch.randperm(len(train), generator=stream(args.seed, "order", epoch)).tolist()
        prompts = [train[i] for i in order[at * args.batch_size:(at + 1) * args.batch_size]]
        with common.unsharded(policy):
            records, logged = rollout(model, prompts, args, accelerator, tokenizer, stop_ids, rewards,
                                      first_step, total_steps)
        seen = rollout_metrics(records, rewards) | logged
        seen["completions/distinct_4"] = distinct_n([r["completion_ids"] for r in records])
        for record in records[:8]:
            shown = sample_record(record, prompts[record["prompt"]]["prompt"], rewards)
            log.write("samples.jsonl", {"step": first_step + 1, "kind": "rollout", **shown})
        records = [r for r in records if not math.isnan(r["score"])]
        require(records, f"step {first_step + 1}: no reward function applies to any completion of the "
                "rollout (all returned None)")

        # old log-probs and values by the training forward; then advantages over the whole rollout
        with common.unsharded(policy):
            outputs = forward_of_rollout(policy, records, args, accelerator)
            for record, (logprobs, _, values) in zip(records, outputs):
                record["old_logprobs"], record["values"] = logprobs, values
                record["ref_logprobs"] = logprobs  # without a reference KL counts as 0
            if reference:
                with use_reference():
                    outputs = forward_of_rollout(reference, records, args, accelerator)
                for record, (logprobs, _, _) in zip(records, outputs):
                    record["ref_logprobs"] = logprobs
        seen |= add_advantages(records, args, state["kl_coef"])
        kl = seen.get("kl", 0.0)
        require(first_step > 0 or abs(kl) < (0.05 if args.bf16 else 1e-4),
                f"the policy starts {kl:.2g} nats a token from its reference, not at it: "
                "try --bf16 False or --attn_implementation eager")
        if args.kl_target:
            state["kl_coef"] = adapt_kl_coef(state["kl_coef"], seen["kl_sequence"], args.kl_target,
                                             args.kl_gain)
        state["first"] = state["first"] or {k: v for k, v in seen.items() if k.startswith("completions/")}
        signs = warning_signs(seen, state["first"], args.kl_warn)
        for name in signs.keys() - warned:
            say(f"warning  {signs[name]}. Look at {os.path.join(args.output_dir, 'samples.jsonl')}")
        warned = signs.keys()
        flat_rollouts = flat_rollouts + 1 if seen["score_std"] == 0 else 0
        if flat_rollouts and flat_rollouts % 3 == 0:
            say(f"warning  for {flat_rollouts} rollouts all completions have scored the same: the score "
                f"teaches nothing. Look at {os.path.join(args.output_dir, 'samples.jsonl')}; prompts may "
                "be too hard or too easy, or the reward always equal")

        for update in range(updates):
            # the rows of this update, their number of tokens (the denominator), and the micro-batches
            step, (iteration, minibatch) = state["step"], divmod(update, args.num_minibatches)
            shuffled = torch.randperm(
                len(records), generator=stream(args.seed, "minibatch", rollout_index, iteration)).tolist()
            chosen = shuffled[minibatch::args.num_minibatches]
            rows = [records[i] for i in chosen]
            lengths = [len(r["input_ids"]) for r in rows]
            trained_tokens = max(1, sum(int(r["completion_mask"][1:].sum()) for r in rows))
            batches = micro_batches(lengths, args.micro_batch_tokens, accelerator.process_index,
                                    accelerator.num_processes)

            totals = torch.zeros(8, device=accelerator.device)
            # totals: policy loss, value loss, entropy, low, high, either, SFT loss, stop
            worst = torch.zeros(2, device=accelerator.device)  # |ratio - 1|, |trainer's - sampler's log-prob|
            totals[7] = interrupt.signal

            # PPO-ptx first, not synchronised: the last backward below does that for both
            if demonstrations:
                extra = [demonstrations[i] for i in endless_order(
                    step * sft_rows, sft_rows, len(demonstrations), args.seed, "sft")]
                sft_tokens = sum(int(e["completion_mask"][1:].sum()) for e in extra)
                for batch in micro_batches([len(e["input_ids"]) for e in extra], args.micro_batch_tokens,
                                           accelerator.process_index, accelerator.num_processes):
                    part = [extra[i] for i in batch] or extra[:1]
                    input_ids, loss_mask = collate(part, accelerator.device)
                    with accelerator.no_sync(policy):
                        logprobs, _, _ = policy(input_ids, loss_mask * bool(batch))  # (B, T-1), temperature 1
                        nll = -logprobs.sum() / sft_tokens
                        accelerator.backward(args.sft_coef * nll * accelerator.num_processes)
                    totals[6] += nll.detach()
                    if audit.due(step):
                        audit.add([len(records) + j for j in batch], [e["input_ids"] for e in part],
                                  loss_mask, -args.sft_coef * logprobs / sft_tokens, {"log-prob": logprobs},
                                  ["demonstration, "] * len(part))
            if demonstrations and not accelerator.is_fsdp2:  # FSDP reduces in its last backward
                trained = [p for p in module.parameters() if p.requires_grad]
                sft_gradient = [accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad.clone(),
                                                   "mean") for p in trained]

            for i, batch in enumerate(batches):
                part = [rows[j] for j in batch] or records[:1]
                input_ids, loss_mask = collate(part, accelerator.device)
                loss_mask = loss_mask * bool(batch)  # a process without rows takes part, all masked
                old_logprobs, values, advantages, returns = (
                    pad_masked(part, name, loss_mask)
                    for name in ("old_logprobs", "values", "advantages", "returns"))  # (B, T-1)
                with accelerator.no_sync(policy) if i < len(batches) - 1 else nullcontext():
                    logprobs, entropy, new_values = policy(input_ids, loss_mask, args.temperature)
                    policy_losses = policy_loss(logprobs, old_logprobs, advantages, args.epsilon)
                    value_losses = value_loss(new_values, values, returns, args.value_clip)
                    loss = (policy_losses + args.vf_coef * value_losses).sum() / trained_tokens
                    accelerator.backward(loss * accelerator.num_processes)  # DDP averages: undo its division
                with torch.no_grad():
                    ratio = (logprobs - old_logprobs).exp()
                    is_low = (ratio < 1 - args.epsilon) & (advantages < 0)
                    is_high = (ratio > 1 + args.epsilon) & (advantages > 0)
                    totals[:6] += torch.stack([policy_losses.sum(), value_losses.sum(), entropy.sum(),
                                               is_low.sum(), is_high.sum(), (is_low | is_high).sum()])
                    difference = logprobs - pad_masked(part, "sampled_logprobs", loss_mask)
                    worst = torch.stack([(ratio - 1).abs().max(), difference.abs().max()]).maximum(worst)
                if audit.due(step):
                    ref_logprobs, token_rewards = (pad_masked(part, name, loss_mask)
                                                   for name in ("ref_logprobs", "token_rewards"))
                    of_reference = {"ref. log-prob": ref_logprobs, "kl": kl_k1(old_logprobs, ref_logprobs)}
                    share = (policy_losses + args.vf_coef * value_losses) / trained_tokens
                    audit.add([chosen[j] for j in batch],
                              [r["input_ids"] for r in part], loss_mask, share,
                              {"log-prob": logprobs, "old log-prob": old_logprobs, "ratio": ratio,
                               "clipped": is_high.float() - is_low.float(), "reward": token_rewards,
                               **(of_reference if reference else {}),
                               "old value": values, "value": new_values, "return": returns,
                               "advantage": advantages, "policy loss": policy_losses,
                               "value loss": value_losses},
                              [f"score {r['bounded_score']:.4g}, " for r in part])
            if demonstrations and not accelerator.is_fsdp2:
                ppo_grad_norm = torch.stack(
                    [(p.grad - g).norm() for p, g in zip(trained, sft_gradient)]).norm().item()
            grad_norm = accelerator.clip_grad_norm_(policy.parameters(),
                                                    args.max_grad_norm or math.inf).item()
            totals = accelerator.reduce(totals, "sum")
            sft_loss, stop = totals[6:].tolist()
            pg_loss, vf_loss, mean_entropy, low, high, either = (totals[:6] / trained_tokens).tolist()
            step_loss = pg_loss + args.vf_coef * vf_loss + args.sft_coef * sft_loss
            ratio_deviation, sampler_error = accelerator.gather(worst[None]).amax(0).tolist()
            require(math.isfinite(step_loss) and math.isfinite(grad_norm),
                    f"step {step + 1}: the loss is {step_loss} and its gradient's norm {grad_norm}, on the "
                    f"rollout of {prompts[0]['place']} ...; this update was not made, and the checkpoints "
                    "are whole. Try a lower --learning_rate, or --score_clip")
            if audit.due(step):
                return audit.write(step_loss,
                                   f"A token's share is (policy loss + {args.vf_coef:g} value loss) "
                                   f"/ {trained_tokens}, the tokens of the minibatch. "
                                   + ("A demonstration token's is - sft_coef log p / (tokens of the "
                                      "demonstrations). " if demonstrations else "")
                                   + "Rows stand in the order of the rollout.")
            learning_rate = learning_rate_at(step, total_steps, args)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            if rows or demonstrations:  # a short rollout may have fewer completions than minibatches
                optimizer.step()
            optimizer.zero_grad()

            state["step"], state["num_tokens"] = step + 1, state["num_tokens"] + sum(lengths)
            metrics = {"loss": step_loss, "policy_loss": pg_loss, "value_loss": vf_loss, **seen,
                       "entropy": mean_entropy, "clip_ratio/low_mean": low, "clip_ratio/high_mean": high,
                       "clip_ratio/region_mean": either, "ratio/max_deviation": ratio_deviation,
                       "grad_norm": grad_norm, "learning_rate": learning_rate,
                       "num_tokens": state["num_tokens"], "trained_tokens": trained_tokens}
            if demonstrations:
                metrics |= {"sft_loss": sft_loss}
                metrics |= {} if accelerator.is_fsdp2 else {"ppo_grad_norm": ppo_grad_norm}
            if update == 0:  # later updates have moved away from the policy that sampled
                metrics["sampling/logprob_difference_max"] = sampler_error
                if step == 0:
                    say("check    first update: sampler and trainer agree on log-probs to "
                        f"{sampler_error:.1g}, ratio is 1 to within {ratio_deviation:.1g}"
                        + (f", kl {kl:.1g}" if reference else ""))
                if sampler_error > (1.0 if args.bf16 else 1e-2):
                    say(f"warning  sampler and trainer differ by {sampler_error:.2g} in a log-prob: "
                        "what is learned is not what was sampled")
            log.metrics(step + 1, metrics)
            log.progress(step + 1, sum(lengths), {
                k: metrics[k] for k in ("reward", "kl_sequence", "policy_loss", "value_loss",
                                        "completions/mean_length") if k in metrics})

        # rollout boundary: the only place where a run can be cut without losing a rollout
        def due(every):
            return state["step"] // every > first_step // every or state["step"] == total_steps
        if due(args.eval_steps):
            report()
        if due(args.save_steps) or stop:
            common.save_checkpoint(accelerator, args, state, module, optimizer)
        if stop:
            interrupt.leave(args, state["step"])

    log.close()
    common.finish(args, accelerator, model, tokenizer)


if __name__ == "__main__":
    with common.user_errors():
        main(parse_args(Args))
