"""grpo.py - reinforcement learning with group-relative advantages: a policy learns from its scored samples.

Objective   J = mean_i,t [ min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A) - kl_coef ratio_t k3 ]
            - sft_coef NLL (of the best samples and of demonstrations; none by default), maximised, with
            A_i = (r_i - mean of the group) / (std + 1e-4), r_i the weighted sum of the rewards less the
            overlong penalty, the std as --scale_rewards and the mean as --loss_type says.
            Shao 2024, arXiv 2402.03300 (GRPO); Yu 2025, arXiv 2503.14476 (DAPO);
            Liu 2025, arXiv 2503.20783 (Dr. GRPO);
            Zheng 2025, arXiv 2507.18071 (GSPO: --importance_sampling_level sequence).
Shapes      P prompt tokens, C completion tokens, T = P + C, G completions a prompt, B rows of a micro-batch,
            V vocabulary, d hidden size, F reward functions; N is any other count, named where it is used.
            Index t of a (B, T-1) tensor is the prediction of token t+1: the causal shift is in
            Policy.logprobs (of hidden states and targets) and collate (of the mask).

Differences from the papers
1. The KL term is ratio * k3 with both factors attached and unclipped, which has the gradient of the reverse
   KL at the visited states, on and off policy. k3 alone, as in GRPO's equation 4, has another one. kl_coef is
   0 by default, and then no reference exists.
2. A group whose rewards are all equal has advantage exactly 0; the share of such groups is logged.
3. Every denominator is fixed for the whole step, over all processes, before the first micro-batch.
4. --drop_flat_groups draws at most 10 times and then goes on with the groups it has. A group is flat if its
   scores are equal, overlong penalty included; DAPO looks at correctness alone.
5. Dr. GRPO is --loss_type dr_grpo --scale_rewards none; dr_grpo alone keeps the division by the std.
6. With --importance_sampling_level sequence the KL term keeps each token's own ratio.
7. --best_fraction (RAFT) and --demo_threshold (Lv 2025) add an NLL term that none of these papers has.
Differences from TRL's GRPOTrainer
1. batch_size counts the prompts of a rollout; num_minibatches splits it into updates and num_iterations
   repeats it.
2. What is sampled is what is scored, always: the whole softmax at --temperature. There is no top-k, top-p or
   penalty; of the generation config only the stop tokens are used.
3. A completion's random numbers depend on (seed, step, its index in the rollout) alone: not on batch mates,
   not on the number of processes.
4. A completion for which every reward function returns None is left out of the loss and its denominators;
   TRL gives it advantage 0 and keeps it in them.
5. A prompt that is a string becomes a user's turn of the chat template; TRL tokenizes it as it is.
6. Evaluation is greedy. reward_std is the std inside a group, mean over groups. log_extra is ignored.

Run   python grpo.py                                                  the small example, CPU, under a minute
      python grpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my.jsonl --lora_r 16
      accelerate launch --multi_gpu --num_processes 8 grpo.py ... --reward_funcs my.py:reward
"""

import asyncio
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
from transformers import DynamicCache
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
    batch_size: int = HfArg(default=16, help="prompts of a rollout, over all processes")
    num_generations: int = HfArg(default=8, help="completions a prompt (G)")
    max_completion_length: int = HfArg(default=512, help="tokens after which a completion is cut")
    temperature: float = HfArg(default=1.0, help="of sampling, and of every log-prob")
    rollout_batch_size: int = HfArg(default=256, help="completions that each process samples at once")
    # objective
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = HfArg(
        default="dapo", help="mean over tokens; mean of row means; sum / (rows x max_completion_length)")
    importance_sampling_level: Literal["token", "sequence"] = HfArg(default="token", help="sequence is GSPO")
    scale_rewards: Literal["group", "batch", "none"] = HfArg(default="group", help="whose std divides A")
    epsilon: float = HfArg(default=0.2, help="the ratio is clipped below at 1 - epsilon")
    epsilon_high: float | None = HfArg(default=None, help="above at 1 + this; default: epsilon (DAPO: 0.28)")
    kl_coef: float = HfArg(default=0.0, help="weight of the KL term; 0: no reference policy is kept")
    mask_truncated_completions: bool = HfArg(default=False, help="completions without an end get no loss")
    overlong_penalty: int = HfArg(default=0, help="last tokens over which a score falls by up to 1 (DAPO)")
    drop_flat_groups: bool = HfArg(default=False, help="draw, up to 10 times, until batch_size groups vary")
    best_fraction: float = HfArg(default=0.0, help="share of a group, its best, that also gets an NLL term")
    demo_threshold: float | None = HfArg(default=None, help="pass rate up to which a demonstration steps in")
    demo_column: str = HfArg(default="demonstration", help="column of the demonstrations, whole answers")
    sft_coef: float = HfArg(default=0.1, help="weight of the NLL of best samples, demonstrations")
    num_iterations: int = HfArg(default=1, help="passes over a rollout")
    num_minibatches: int = HfArg(default=1, help="updates of one pass")
    # optimization
    learning_rate: float | None = HfArg(default=None, help="peak; default 1e-6 (all weights), 1e-5 (LoRA)")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = HfArg(default="cosine", help="after warm-up")
    warmup_steps: float = HfArg(default=0.03, help="steps of linear warm-up; below 1: a share of all steps")
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay of matrices (not of norms and biases)")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are scaled down to this norm; 0: off")
    optim: Literal["adamw_torch", "adamw_8bit"] = HfArg(default="adamw_torch", help="8bit needs bitsandbytes")
    micro_batch_tokens: int = HfArg(default=8192, help="padded tokens of a forward pass: limits memory only")
    num_train_epochs: float = HfArg(default=1.0, help="passes over the prompts; 0: only evaluate")
    max_steps: int = HfArg(default=-1, help="steps, rounded up to whole rollouts; overrides num_train_epochs")
    seed: int = HfArg(default=0, help="decides the order of the prompts, the samples and random weights")
    # evaluation and output
    eval_steps: int = HfArg(default=50, help="steps between evaluations, rounded up to whole rollouts")
    eval_samples: int = HfArg(default=0, help="samples a prompt for pass@k and votes; 0: greedy alone")
    kl_warn: float = HfArg(default=50.0, help="warn above this KL (nats a completion; needs --kl_coef)")
    output_dir: str = HfArg(default="out/grpo", help="where everything goes")
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
            self, ("learning_rate", "max_prompt_length", "batch_size", "max_completion_length", "temperature",
                   "rollout_batch_size", "num_iterations", "num_minibatches", "micro_batch_tokens",
                   "eval_steps", "save_steps", "save_total_limit", "logging_steps", "epsilon",
                   "reward_timeout"),
            ("lora_r", "warmup_steps", "weight_decay", "max_grad_norm", "kl_coef", "num_train_epochs",
             "overlong_penalty", "sft_coef", "eval_samples", "kl_warn"))
        require(self.overlong_penalty <= self.max_completion_length,
                f"--overlong_penalty {self.overlong_penalty} is more than --max_completion_length")
        require(0 <= self.best_fraction <= 1, f"--best_fraction must lie in [0, 1], not {self.best_fraction}")
        require(self.demo_threshold is None or self.demo_threshold >= 0,
                f"--demo_threshold is a pass rate, 0 or more, not {self.demo_threshold}")
        require(self.sft_coef or not self.best_fraction and self.demo_threshold is None,
                "--sft_coef 0 leaves nothing to do for --best_fraction and --demo_threshold")
        require(self.num_train_epochs or not self.merge,
                "--num_train_epochs 0 trains nothing that --merge could write")
        require(self.demo_threshold is None or not self.drop_flat_groups,
                "--drop_flat_groups would drop the failing groups that --demo_threshold replaces: choose one")
        require(0 <= self.eval_fraction < 1, f"--eval_fraction must lie in [0, 1), not {self.eval_fraction}")
        require(self.num_generations > 1,
                "--num_generations must be at least 2: an advantage compares completions of one prompt")
        require(self.importance_sampling_level == "token" or self.loss_type == "grpo",
                "--importance_sampling_level sequence is a mean over sequences: "
                "add --loss_type grpo (and --epsilon 3e-4 or so)")
        require(self.reward_weights is None or len(self.reward_weights) == len(self.reward_funcs),
                f"--reward_weights has {len(self.reward_weights or [])} numbers "
                f"for {len(self.reward_funcs)} reward functions")
        self.epsilon_high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        self.reward_weights = self.reward_weights or [1.0] * len(self.reward_funcs)
        require(any(self.reward_weights), "--reward_weights are all 0: nothing would be rewarded")
        common.check_tracker(self.log_with)


MAX_DRAWS = 10  # of --drop_flat_groups: after so many the step takes the groups that it has


# ---- loss --------------------------------------------------------------------------------------------------

def groups_vary(scores, num_generations):
    """Which groups teach something: (N*G,) scores, NaN = not scored -> (N,) bool, False if all are equal."""
    groups = scores.view(-1, num_generations)  # (N, G)
    return groups.nan_to_num(-math.inf).amax(1) > groups.nan_to_num(math.inf).amin(1)


def group_advantages(scores, num_generations, scale_rewards="group"):
    """A = (r - mean of its group) / (std + 1e-4), std (n - 1) of the group or the batch; none: undivided.

    scores (N*G,) fp32, a prompt's G completions side by side; NaN = not scored: left out of all statistics,
    advantage 0. A group whose scores are all equal gets exactly 0. Scores 1, 0, 0, 1 give mean 0.5, std
    0.5774, advantages +-0.8659.
    """
    groups = scores.view(-1, num_generations)  # (N, G)
    known = ~groups.isnan()
    advantages = torch.where(known, groups - groups.nanmean(1, keepdim=True), 0.0)  # r - mean
    if scale_rewards == "group":
        variance = advantages.square().sum(1, keepdim=True) / (known.sum(1, keepdim=True) - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + 1e-4)
    elif scale_rewards == "batch":
        advantages = advantages / (groups[known].std() + 1e-4)
    varies = groups_vary(scores, num_generations)[:, None]  # (N, 1): 1 / std would blow up float noise
    return torch.where(varies, advantages, 0.0).view(-1)


def best_of_groups(scores, num_generations, fraction):
    """The completions that get an NLL term: of each group the top ceil(fraction G), with all ties, but never
    its lowest score, and so none of a group whose scores are all equal. scores (N*G,) -> bool (N*G,).

    Rejection sampling (RAFT, Dong 2023, arXiv 2304.06767, keeps 1 of G). Scores 3, 2, 2, 1 and fraction 0.5
    keep the first three; scores 1, 0, 0, 0 keep the first alone.
    """
    groups = scores.view(-1, num_generations)  # (N, G)
    lowest, known = groups.nan_to_num(math.inf).amin(1, keepdim=True), groups.nan_to_num(-math.inf)
    threshold = known.topk(math.ceil(round(fraction * num_generations, 9)), 1).values[:, -1:]  # (N, 1)
    return ((known >= threshold) & (known > lowest)).view(-1)


def overlong_penalty(length, max_completion_length, buffer):
    """What is added to a completion's score for its length: 0 up to max - buffer tokens, then evenly to -1.

    DAPO (Yu 2025, arXiv 2503.14476, eq. 13). At most 100 tokens, buffer 20: 80 -> 0, 90 -> -0.5, 100 -> -1.
    """
    return -max(0.0, length - (max_completion_length - buffer)) / buffer if buffer else 0.0


def importance_ratio(logprobs, old_logprobs, loss_mask, importance_sampling_level="token"):
    """pi / pi_old, all (B, T-1): by token, or (GSPO) its geometric mean over the sequence at each token."""
    log_ratio = torch.where(loss_mask.bool(), logprobs - old_logprobs, 0.0)
    if importance_sampling_level == "sequence":
        mean = log_ratio.sum(-1, keepdim=True) / loss_mask.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
        log_ratio = mean.expand_as(log_ratio)
    return log_ratio.exp()


def grpo_loss(logprobs, old_logprobs, advantages, loss_mask, epsilon=0.2, epsilon_high=0.2,
              importance_sampling_level="token"):
    """The clipped surrogate, negated, token by token; the caller weighs (token_weights) and sums.

    logprobs, old_logprobs, loss_mask (B, T-1), advantages (B,) -> (B, T-1), 0 where the mask is 0.
    With ratio 1.5, epsilon_high 0.2: -1.2 A for A > 0 (no gradient) and -1.5 A for A < 0. At ratio 1 the
    gradient is REINFORCE's.
    """
    ratio = importance_ratio(logprobs, old_logprobs, loss_mask, importance_sampling_level)
    a = advantages[:, None]
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - epsilon, 1 + epsilon_high) * a)  # min(rA, clip(r) A)
    return -torch.where(loss_mask.bool(), surrogate, 0.0)


def kl_k3(logprobs, ref_logprobs):
    """k3 = exp(d) - 1 - d with d = ref_logprobs - logprobs, (B, T-1): >= 0, unbiased for KL(policy || ref).

    The estimator is Schulman's (joschu.net/blog/kl-approx.html). Pass equal values where the mask is 0: an
    infinite d would make NaN gradients even behind a mask.
    d = ln 2 gives 2 - 0.6931 - 1 = 0.3069.
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


def encode_demonstrations(args, tokenizer, prompts):
    """Gives each prompt with a demonstration its tokens, as demo_ids and demo_mask (T,)."""
    longest, count, too_long = args.max_prompt_length + args.max_completion_length, 0, 0

    def encode(prompt):
        answer = common.column_messages(prompt["row"], args.demo_column, "assistant")
        common.expect(answer and answer[-1]["role"] == "assistant" and answer[-1]["content"].strip(),
                      f"column '{args.demo_column}' does not end with an answer")
        return common.upto_answer(common.encode_conversation(tokenizer, prompt["turns"] + answer)[-1])

    given = [(p, p["place"]) for p in prompts if p["row"].get(args.demo_column) not in (None, "", [])]
    require(given, f"--demo_threshold: no prompt has a demonstration in a column '{args.demo_column}'; "
            "--demo_column names another")
    for (ids, mask), prompt, _ in common.convert_rows(given, encode, args.skip_bad_rows, args.dataset_name):
        if len(ids) <= longest:
            prompt["demo_ids"] = torch.tensor(ids, dtype=torch.int32)
            prompt["demo_mask"] = torch.tensor(mask, dtype=torch.int8)
        count, too_long = count + (len(ids) <= longest), too_long + (len(ids) > longest)
    require(count, f"--demo_threshold: all demonstrations are longer than {longest} tokens, "
            "--max_prompt_length and --max_completion_length together")
    say(f"data     {count:,} of {len(prompts):,} prompts have a demonstration"
        + (f"; {too_long:,} are too long" if too_long else ""))


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


def group_metrics(scores, num_generations):
    """scores (N*G,) -> reward_std, the std inside a group, mean over groups; the share of flat groups."""
    groups = [g[~g.isnan()] for g in scores.view(-1, num_generations)]
    return {"reward_std": sum(g.std().item() for g in groups if len(g) > 1) / len(groups),
            "frac_reward_zero_std": 1 - groups_vary(scores, num_generations).float().mean().item()}


def varied_groups(records, num_generations, wanted):
    """The records of the first `wanted` groups whose scores differ."""
    varies = groups_vary(torch.tensor([r["score"] for r in records]), num_generations)
    kept = varies.nonzero().squeeze(-1)[:wanted].tolist()
    return [r for g in kept for r in records[g * num_generations:(g + 1) * num_generations]]


def demonstrate(records, prompts, num_generations, threshold, gate):
    """Replaces every group with a pass rate <= threshold by its prompt's demonstration, where there is one
    -> (records, metrics).

    The pass rate is the mean of reward number `gate`, whatever other rewards say. After Lv 2025
    (arXiv 2509.04419); its evidence is from one seed a model.
    """
    kept, demonstrations, groups = [], [], len(records) // num_generations
    for g in range(groups):
        group = records[g * num_generations:(g + 1) * num_generations]
        prompt = prompts[group[0]["prompt"]]
        passed = torch.stack([r["rewards"][gate] for r in group]).double().nanmean().item()
        if passed <= threshold and "demo_ids" in prompt:
            demonstrations.append({
                "input_ids": prompt["demo_ids"], "completion_mask": prompt["demo_mask"], "sampled": 0.0,
                "sampled_logprobs": torch.zeros(len(prompt["demo_ids"]) - 1), "score": 0.0, "nll": True,
                "advantage": torch.tensor(0.0), "weight": torch.tensor(0.0)})
        else:
            kept += group
    return kept + demonstrations, {"demo_fraction": len(demonstrations) / groups}


def sample_record(record, prompt, rewards):
    """What samples.jsonl and the table show of a completion."""
    values = [None if math.isnan(x) else x for x in record["rewards"].tolist()]
    return {"prompt": prompt, "completion": record["text"], **dict(zip(rewards, values))}


# ---- evaluation --------------------------------------------------------------------------------------------

def right_answers(prompts):
    """The answers in the columns `answer` or `solution`, None where a row has none."""
    columns = {name: [p["columns"].get(name) for p in prompts] for name in ("answer", "solution")}
    return [None if a is None else extract_answer(str(a)) for a in reference_answers(len(prompts), columns)]


def pass_at_k(n, correct, k):
    """The chance that at least one of k samples is right, if c of n are: 1 - C(n-c, k) / C(n, k).

    Unbiased; Chen 2021, arXiv 2107.03374, eq. 1. n 4, correct 1: k = 1 gives 1/4, k = 2 gives 1/2.
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def vote(answers, weights=None):
    """The answer with the largest sum of weights (default: one vote each); None never votes, ties go to the
    earliest. Self-consistency, Wang 2022, arXiv 2203.11171. ["7", None, "8", "8"] -> "8"."""
    totals = {}
    for answer, weight in zip(answers, weights or [1.0] * len(answers)):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    return max(totals, key=totals.get, default=None)


def interval(mean, n):
    """Wilson's 95 % interval of a share over n prompts: also sound at 0 and 1; wider than needed for pass@k,
    whose terms are fractions. 0.5, 100: 0.404, 0.596."""
    z2 = 1.96**2
    middle = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (mean * (1 - mean) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return middle - half, middle + half


def verify(groups, right_ones, scores):
    """Inference-time verification -> {"pass@k", "majority@k", "best_of@k", "weighted_vote@k": share right}.

    groups: of each of N prompts the n answers (None: no answer), scores (N, n) of a reward model, or None.
    For k = 1, 2, 4 ... n the last three choose among the first k samples. A vote's weights are
    softmax(scores): only differences between a reward model's scores mean anything.
    """
    n, metrics = len(groups[0]), {}
    for k in [2**i for i in range(n.bit_length()) if 2**i < n] + [n]:
        chosen = {"majority": [vote(answers[:k]) for answers in groups]}
        if scores is not None:
            chosen["best_of"] = [answers[s[:k].argmax()] for answers, s in zip(groups, scores)]
            chosen["weighted_vote"] = [vote(answers[:k], s[:k].softmax(0).tolist())
                                       for answers, s in zip(groups, scores)]
        metrics[f"pass@{k}"] = sum(pass_at_k(n, sum(a == right for a in answers), k)
                                   for answers, right in zip(groups, right_ones)) / len(groups)
        for name, picks in chosen.items():
            metrics[f"{name}@{k}"] = sum(a == b for a, b in zip(picks, right_ones)) / len(groups)
    return metrics


def evaluate(model, prompts, args, accelerator, tokenizer, stop_ids, rewards, step, total_steps):
    """Greedy completions of the held-out prompts -> (metrics, records). eval/accuracy is exact match, where
    rows have answers; --eval_samples adds verify()'s figures over samples."""
    records, logged = rollout(model, prompts, args, accelerator, tokenizer, stop_ids, rewards, step,
                              total_steps, greedy=True)
    figures = rollout_metrics(records, rewards) | logged
    metrics = {f"eval/{name}": value for name, value in figures.items()
               if not name.endswith(("/std", "/weighted"))}
    answers = right_answers(prompts)
    asked = [i for i, answer in enumerate(answers) if answer is not None]
    if asked:
        right = [extract_answer(r["text"]) == answers[r["prompt"]] for r in records if r["prompt"] in asked]
        metrics["eval/accuracy"] = sum(right) / len(right)
    if args.eval_samples and asked:
        n = args.eval_samples  # seed + 1: not the random numbers of this step's rollout
        sampling = SimpleNamespace(**vars(args) | {"num_generations": n, "seed": args.seed + 1})
        sampled, _ = rollout(model, [prompts[i] for i in asked], sampling, accelerator, tokenizer, stop_ids,
                             rewards, step, total_steps)
        given = [extract_answer(r["text"]) for r in sampled]
        judges = torch.tensor([weight * hasattr(reward, "of_model") for reward, weight in rewards.values()])
        scores = (torch.stack([(judges * r["rewards"]).nansum() for r in sampled]).view(-1, n)
                  if judges.any() else None)
        found = verify([given[i:i + n] for i in range(0, len(given), n)], [answers[i] for i in asked], scores)
        for name, value in found.items():
            low, high = interval(value, len(asked))
            metrics |= {f"eval/{name}": value, f"eval/{name}/low": low, f"eval/{name}/high": high}
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
        args.learning_rate = 1e-5 if common.trains_adapter(args) else 1e-6
    checkpoint = common.open_run(args)

    # data and rewards: all is read, checked and tried before the model is loaded
    rewards = load_rewards(args, accelerator.device)
    tokenizer = common.load_tokenizer(args)
    train, held = load_prompts(args, tokenizer)
    if args.demo_threshold is not None:
        names = list(rewards)  # the gate: the reward that says whether a completion is right
        gate = next((names.index(name) for name in ("accuracy", "code") if name in names), 0)
        encode_demonstrations(args, tokenizer, train)
        say(f"data     a demonstration steps in where a group's mean of '{names[gate]}' is at most "
            f"{args.demo_threshold:g}")
    data = common.check_data(checkpoint, common.fingerprint([p | {"place": None} for p in train]
                                                            + reward_sources(args)))
    check_columns(rewards, train, held, args.dataset_name)
    score(rewards, train[:1], [{"text": "a first try", "completion_ids": [0], "truncated": False}], 0, 0,
          args.reward_timeout)
    common.show_example(tokenizer, train[0]["prompt_ids"], [0] * len(train[0]["prompt_ids"]), "first prompt")
    require(held or args.num_train_epochs, "nothing to evaluate: --num_train_epochs 0 needs "
            "--eval_dataset_name, or an --eval_fraction above 0")
    require(not args.eval_samples or any(right_answers(held)), "--eval_samples: no held-out row has an "
            "`answer` or `solution` to compare with")
    completions = min(len(train), args.batch_size) * args.num_generations
    require(args.num_minibatches <= completions, f"--num_minibatches {args.num_minibatches} is more than the "
            f"{completions} completions of a rollout")
    rollouts_per_epoch = math.ceil(len(train) / args.batch_size)
    updates, rollout_size = args.num_iterations * args.num_minibatches, args.batch_size * args.num_generations
    num_rollouts = math.ceil(args.max_steps / updates if args.max_steps > 0 and args.num_train_epochs
                             else rollouts_per_epoch * args.num_train_epochs)
    total_steps = num_rollouts * updates

    # model, reference, optimizer, and where an earlier run stopped
    model = common.load_model(args, tokenizer, accelerator.device)
    stop_ids = model.generation_config.eos_token_id
    reference = None
    if args.kl_coef > 0:
        ref_model, use_reference, how = common.make_reference(
            model, common.base_and_adapter(args.model_name_or_path)[1])
        reference = Policy(ref_model.to(accelerator.device))
        say(f"reference {how}")
    optimizer = make_optimizer(model, args)
    policy, optimizer = common.prepare(accelerator, Policy(model), optimizer)
    check_head(policy, model, torch.tensor([train[0]["prompt_ids"][:64]], device=accelerator.device),
               accelerator)
    state = {"step": 0, "num_tokens": 0, "draws": 0, "data": data, "first": None}
    if checkpoint:
        common.restore(model, optimizer, checkpoint)
        state = {name: checkpoint[1][name] for name in state}
    log = common.RunLog(accelerator, args, total_steps, state["step"])
    audit = common.Audit(accelerator, args, tokenizer, state["step"], total_steps)
    interrupt, warned, said, flat_rollouts = common.Interrupt(), set(), set(), 0
    if args.importance_sampling_level == "sequence" and args.epsilon > 0.01:
        say(f"warning  --epsilon {args.epsilon:g} never clips a ratio of whole sequences: 3e-4 is usual")
    say(f"train    {num_rollouts} rollouts of {args.batch_size} prompts x {args.num_generations} completions"
        f", {updates} update(s) each; learning rate {args.learning_rate:g} ({args.lr_scheduler_type}), "
        f"{accelerator.num_processes} process(es) on {accelerator.device}")

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
        # rollout: prompts are a function of (seed, epoch) and the number of draws before
        first_step, prompts, sampled = state["step"], [], []
        for attempt in range(MAX_DRAWS if args.drop_flat_groups else 1):
            epoch, at = divmod(state["draws"], rollouts_per_epoch)
            order = torch.randperm(len(train), generator=stream(args.seed, "order", epoch)).tolist()
            drawn = [train[i] for i in order[at * args.batch_size:(at + 1) * args.batch_size]]
            with common.unsharded(policy):
                completed, logged = rollout(model, drawn, args, accelerator, tokenizer, stop_ids, rewards,
                                            first_step, total_steps, first=len(prompts))
            for record in completed:
                record["score"] += overlong_penalty(len(record["completion_ids"]), args.max_completion_length,
                                                    args.overlong_penalty)
                record["prompt"] += len(prompts)
            prompts, sampled, state["draws"] = prompts + drawn, sampled + completed, state["draws"] + 1
            varied = varied_groups(sampled, args.num_generations, args.batch_size)
            if len(varied) == rollout_size:
                break
        records = varied if args.drop_flat_groups and varied else sampled[:rollout_size]
        all_scores = torch.tensor([r["score"] for r in sampled])  # of all draws
        seen = rollout_metrics(sampled, rewards) | group_metrics(all_scores, args.num_generations) | logged
        seen["completions/distinct_4"] = distinct_n([r["completion_ids"] for r in sampled[:rollout_size]])
        if args.drop_flat_groups:
            seen |= {"draws": attempt + 1, "groups": len(records) // args.num_generations}
            if len(varied) < rollout_size and "draws" not in said:
                said.add("draws")
                say(f"warning  {MAX_DRAWS} draws gave {len(varied) // args.num_generations} of "
                    f"{args.batch_size} groups whose scores differ: prompts may be too hard or too easy")
        state["first"] = state["first"] or {k: v for k, v in seen.items() if k.startswith("completions/")}
        signs = drift_signs(seen, state["first"])
        for name in signs.keys() - warned:
            say(f"warning  {signs[name]}. Look at {os.path.join(args.output_dir, 'samples.jsonl')}")
        warned = signs.keys()
        for record in sampled[:args.num_generations]:
            log.write("samples.jsonl", {"step": first_step + 1, "kind": "rollout",
                                        **sample_record(record, prompts[0]["prompt"], rewards)})

        # advantages: groups are whole, and the whole rollout is here
        scores = torch.tensor([r["score"] for r in records])  # (N*G,)
        group_a = group_advantages(scores, args.num_generations, args.scale_rewards)  # (N*G,)
        best = (best_of_groups(scores, args.num_generations, args.best_fraction).tolist()
                if args.best_fraction else [False] * len(records))
        for record, advantage, is_best in zip(records, group_a, best):
            masked = args.mask_truncated_completions and record["truncated"]
            record["advantage"], record["sampled"], record["nll"] = advantage, 1.0, is_best and not masked
            if masked:
                record["completion_mask"] = torch.zeros_like(record["completion_mask"])
        if args.demo_threshold is not None:
            records, demos = demonstrate(records, prompts, args.num_generations, args.demo_threshold, gate)
            seen |= demos
        if args.best_fraction:
            best_lengths = [len(r["completion_ids"]) for r in records if r["nll"] and r["sampled"]]
            seen |= {"best_fraction": len(best_lengths) / max(1, sum(r["sampled"] == 1 for r in records))}
            seen |= {"best_length": sum(best_lengths) / len(best_lengths)} if best_lengths else {}
        flat = seen["frac_reward_zero_std"] == 1 and not seen.get("demo_fraction")
        flat_rollouts = flat_rollouts + 1 if flat else 0
        if flat_rollouts and flat_rollouts % 3 == 0:
            say(f"warning  for {flat_rollouts} rollouts all completions of every prompt have scored the same"
                f": nothing is learned. Look at {os.path.join(args.output_dir, 'samples.jsonl')}; "
                "prompts may be too hard or too easy, or the reward always equal")
        records = [r for r in records if not math.isnan(r["score"])]
        require(records, f"step {first_step + 1}: no reward function applies to any completion of the "
                "rollout (all returned None)")
        with common.unsharded(policy):
            if updates > 1:  # by the training forward, before the first update; in a single one old = current
                outputs = forward_of_rollout(policy, records, args, accelerator)
                for record, (logprobs, _, _) in zip(records, outputs):
                    record["old_logprobs"] = logprobs
            if reference:
                with use_reference():
                    outputs = forward_of_rollout(reference, records, args, accelerator)
                for record, (logprobs, _, _) in zip(records, outputs):
                    record["ref_logprobs"] = logprobs

        for update in range(updates):
            # the rows of this update, their weights in its loss (the denominator), and the cut
            step, (iteration, minibatch) = state["step"], divmod(update, args.num_minibatches)
            shuffled = torch.randperm(
                len(records), generator=stream(args.seed, "minibatch", rollout_index, iteration)).tolist()
            chosen = shuffled[minibatch::args.num_minibatches]
            rows = [records[i] for i in chosen]
            samples = [r for r in rows if r["sampled"]]
            trained = torch.tensor([float(r["completion_mask"][1:].sum()) for r in samples])
            row_weights = token_weights(trained, args.loss_type, args.max_completion_length)
            for row, weight in zip(samples, row_weights):
                row["weight"] = weight
            nll_tokens = max(1, sum(int(r["completion_mask"][1:].sum()) for r in rows if r["nll"]))
            for row in rows:
                row["nll_weight"] = torch.tensor(args.sft_coef / nll_tokens if row["nll"] else 0.0)
            lengths, trained_tokens = [len(r["input_ids"]) for r in rows], int(trained.sum())
            batches = micro_batches(lengths, args.micro_batch_tokens, accelerator.process_index,
                                    accelerator.num_processes)

            # loss, entropy, kl, clipped low, high, either; stop signal; nll
            totals = torch.zeros(8, device=accelerator.device)
            worst = torch.zeros(2, device=accelerator.device)  # |ratio - 1|, |trainer's - sampler's log-prob|
            totals[6] = interrupt.signal
            for i, batch in enumerate(batches):
                part = [rows[j] for j in batch] or [records[0] | {"weight": 0.0, "nll_weight": 0.0}]
                input_ids, loss_mask = collate(part, accelerator.device)
                loss_mask = loss_mask * bool(batch)  # a process without rows takes part, all masked
                advantages, weights, nll_weights, is_sample = (
                    torch.tensor([float(r[name]) for r in part], device=accelerator.device)
                    for name in ("advantage", "weight", "nll_weight", "sampled"))  # (B,)
                sample_mask = loss_mask * is_sample[:, None]  # without the demonstrations
                with accelerator.no_sync(policy) if i < len(batches) - 1 else nullcontext():
                    all_logprobs, entropy, _ = policy(input_ids, loss_mask, args.temperature)  # (B, T-1)
                    nll = -(nll_weights * all_logprobs.sum(-1)).sum()  # sft_coef x mean over the NLL's tokens
                    logprobs = torch.where(sample_mask.bool(), all_logprobs, 0.0)
                    old_logprobs = (pad_masked(part, "old_logprobs", sample_mask) if updates > 1
                                    else logprobs.detach())
                    token_loss = grpo_loss(logprobs, old_logprobs, advantages, sample_mask, args.epsilon,
                                           args.epsilon_high, args.importance_sampling_level)
                    if reference:  # + kl_coef ratio_t k3_t, both factors attached
                        ref_logprobs = pad_masked(part, "ref_logprobs", sample_mask)
                        k3 = kl_k3(logprobs, ref_logprobs)
                        token_loss = token_loss + args.kl_coef * (logprobs - old_logprobs).exp() * k3
                        totals[2] += k3.detach().sum()
                    loss = (weights[:, None] * token_loss).sum() + nll
                    accelerator.backward(loss * accelerator.num_processes)  # DDP averages: undo its division
                with torch.no_grad():
                    ratio = importance_ratio(logprobs, old_logprobs, sample_mask,
                                             args.importance_sampling_level)
                    is_low = (ratio < 1 - args.epsilon) & (advantages[:, None] < 0) & sample_mask.bool()
                    is_high = (ratio > 1 + args.epsilon_high) & (advantages[:, None] > 0) & sample_mask.bool()
                    totals[:2] += torch.stack([loss, (entropy * sample_mask).sum()])
                    totals[7] += nll
                    totals[3:6] += torch.stack([is_low.sum(), is_high.sum(), (is_low | is_high).sum()])
                    difference = logprobs - pad_masked(part, "sampled_logprobs", sample_mask)
                    worst = torch.stack([(ratio - 1).abs().max(), difference.abs().max()]).maximum(worst)
                if audit.due(step):
                    columns = {"log-prob": all_logprobs, "old log-prob": old_logprobs, "ratio": ratio,
                               "clipped": is_high.float() - is_low.float(), "advantage": advantages[:, None]}
                    columns |= {"ref. log-prob": ref_logprobs, "kl": k3} if reference else {}
                    audit.add([chosen[j] for j in batch],
                              [r["input_ids"] for r in part], loss_mask,
                              weights[:, None] * token_loss - nll_weights[:, None] * all_logprobs,
                              columns | {"loss": token_loss, "weight": weights[:, None],
                                         "NLL weight": nll_weights[:, None]},
                              [f"score {r['score']:.4g}, " if r["sampled"] else "demonstration, "
                               for r in part])
            grad_norm = accelerator.clip_grad_norm_(policy.parameters(),
                                                    args.max_grad_norm or math.inf).item()
            step_loss, entropy_sum, kl_sum, low, high, either, stop, nll_sum = accelerator.reduce(
                totals, "sum").tolist()
            ratio_deviation, sampler_error = accelerator.gather(worst[None]).amax(0).tolist()
            require(math.isfinite(step_loss) and math.isfinite(grad_norm),
                    f"step {step + 1}: the loss is {step_loss} and its gradient's norm {grad_norm}, on the "
                    f"rollout of {prompts[0]['place']} ...; this update was not made, and the checkpoints "
                    "are whole. Try a lower --learning_rate")
            if audit.due(step):
                return audit.write(step_loss, "A token's share is weight x loss (the clipped surrogate, "
                                   "negated, and kl_coef ratio k3) - NLL weight x log p. Rows stand in the "
                                   "order of the rollout, a prompt's completions together.")
            tokens = max(trained_tokens, 1)
            require(step > 0 or not reference or kl_sum / tokens < (0.05 if args.bf16 else 1e-4),
                    f"the policy starts {kl_sum / tokens:.2g} nats a token from its reference, not at it: "
                    "try --bf16 False or --attn_implementation eager")
            learning_rate = learning_rate_at(step, total_steps, args)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            if rows:  # a short rollout may have fewer completions than there are minibatches
                optimizer.step()
            optimizer.zero_grad()

            state["step"], state["num_tokens"] = step + 1, state["num_tokens"] + sum(lengths)
            metrics = {"loss": step_loss, **seen, "ratio/max_deviation": ratio_deviation,
                       "grad_norm": grad_norm, "learning_rate": learning_rate,
                       "num_tokens": state["num_tokens"],
                       "trained_tokens": trained_tokens}
            if trained_tokens:
                metrics |= {"entropy": entropy_sum / tokens, "clip_ratio/low_mean": low / tokens,
                            "clip_ratio/high_mean": high / tokens, "clip_ratio/region_mean": either / tokens}
                metrics |= {"kl": kl_sum / tokens} if reference else {}
            metrics |= {"nll_loss": nll_sum / args.sft_coef} if nll_sum else {}
            if reference and kl_sum / max(len(samples), 1) > args.kl_warn and "kl" not in said:
                said.add("kl")
                say(f"warning  the policy is {kl_sum / len(samples):.3g} nats a completion from its "
                    f"reference (--kl_warn {args.kl_warn:g}): raise --kl_coef or lower --learning_rate")
            if update == 0:  # later updates have moved away from the policy that sampled
                metrics["sampling/logprob_difference_max"] = sampler_error
                if step == 0:
                    say("check    first update: sampler and trainer agree on log-probs to "
                        f"{sampler_error:.1g}"
                        + (f", ratio is 1 to within {ratio_deviation:.1g}" if updates > 1 else "")
                        + (f", kl {kl_sum / tokens:.1g}" if reference else ""))
                if sampler_error > (1.0 if args.bf16 else 1e-2):
                    say(f"warning  sampler and trainer differ by {sampler_error:.2g} in a log-prob: "
                        "what is learned is not what was sampled")
            log.metrics(step + 1, metrics)
            shown = ("reward", "loss", "entropy", "completions/mean_length")
            log.progress(step + 1, sum(lengths), {k: metrics[k] for k in shown if k in metrics})

        # rollout boundary: the only place where a run can be cut without losing a rollout
        def due(every):
            return state["step"] // every > first_step // every or state["step"] == total_steps
        if due(args.eval_steps):
            report()
        if due(args.save_steps) or stop:
            common.save_checkpoint(accelerator, args, state, model, optimizer)
        if stop:
            interrupt.leave(args, state["step"])

    log.close()
    if total_steps:
        common.finish(args, accelerator, model, tokenizer)


if __name__ == "__main__":
    with common.user_errors():
        main(parse_args(Args))
