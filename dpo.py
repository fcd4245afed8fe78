"""dpo.py - direct preference optimization: a policy learns to prefer the chosen of two completions.

Objective   L = - log sigmoid(beta [(log pi_w - log ref_w) - (log pi_l - log ref_l)]), mean over the pairs of
            the step; log pi = sum over the completion's tokens. Rafailov 2023, arXiv 2305.18290, eq. 7.
            --loss_type ipo: Azar 2023, arXiv 2310.12036; hinge: Liu 2023, arXiv 2309.06657 (RSO's form of
            SLiC-HF, with a reference).
            --sft_coef adds the chosen completion's mean NLL (Pang 2024, arXiv 2404.19733).
Shapes      B pairs of a micro-batch, 2B rows (chosen first, then rejected), T tokens of the longest row,
            V vocabulary, d hidden size; N is any other count, named where it is used. Index t of a
            (2B, T-1) tensor is the prediction of token t+1: the causal shift is in Policy.logprobs (of
            hidden states and targets) and collate (of the mask).

Differences from the papers
1. ipo divides each log-prob by its completion's length, as its authors confirmed; the paper has sums.
2. label_smoothing eps gives the conservative loss (1 - eps) L + eps L(swapped), for sigmoid alone.
Differences from TRL's DPOTrainer
1. Rows beyond max_length lose the prompt's start, the same on both sides, then the completions' ends. TRL
   keeps the start.
2. Full fine-tuning computes the reference log-probs once, before the first step: two numbers a pair, kept in
   the checkpoint (--precompute_ref_log_probs False keeps a frozen copy of the model instead).
3. Dropout that a model does in functions, not modules, is off too; the mean is over the pairs of the whole
   step; and a resumed run ends bit-equal.
As in TRL, the reference of a run that starts from an adapter is a frozen copy of it, never the bare base.

Run   python dpo.py                                                   the small example, CPU, about a minute
      python dpo.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name pairs.jsonl --lora_r 16
      accelerate launch --multi_gpu --num_processes 8 dpo.py --model_name_or_path ... --dataset_name ...
"""

import hashlib
import math
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import common  # first: it quiets the libraries below
from common import parse_args, require, say

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig
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
    # data
    dataset_name: str | None = HfArg(default=None, help=".json, .jsonl, .csv, .parquet file, or a dataset")
    eval_dataset_name: str | None = HfArg(default=None, help="default: eval_fraction of the training data")
    eval_fraction: float = HfArg(default=0.05, help="share held out by prompt, at most 200 pairs")
    format: str | None = HfArg(default=None, help="prompt_, conversation_, alpaca_ or sharegpt_pair")
    system_prompt: str | None = HfArg(default=None, help="system message for rows that have none")
    max_length: int = HfArg(default=1024, help="longest row: prompts lose their start, answers their end")
    skip_bad_rows: bool = HfArg(default=False, help="count and skip malformed rows instead of stopping")
    # objective
    beta: float = HfArg(default=0.1, help="strength of the pull towards the reference policy")
    loss_type: Literal["sigmoid", "ipo", "hinge"] = HfArg(default="sigmoid", help="the loss of a pair")
    label_smoothing: float = HfArg(default=0.0, help="share of pairs taken to be mislabelled")
    sft_coef: float = HfArg(default=0.0, help="weight of the chosen completion's mean NLL")
    precompute_ref_log_probs: bool | None = HfArg(
        default=None, help="reference log-probs once, before training; default: without LoRA, and in FSDP")
    # optimization
    learning_rate: float | None = HfArg(default=None, help="peak; default 1e-6 (all weights), 1e-5 (LoRA)")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = HfArg(default="cosine", help="after warm-up")
    warmup_steps: float = HfArg(default=0.03, help="steps of linear warm-up; below 1: a share of all steps")
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay of matrices (not of norms and biases)")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are scaled down to this norm; 0: off")
    optim: Literal["adamw_torch", "adamw_8bit"] = HfArg(default="adamw_torch", help="8bit needs bitsandbytes")
    batch_size: int = HfArg(default=32, help="pairs of one optimizer step, over all processes")
    micro_batch_tokens: int = HfArg(default=8192, help="padded tokens of a forward pass: limits memory only")
    num_train_epochs: float = HfArg(default=1.0, help="passes over the data")
    max_steps: int = HfArg(default=-1, help="optimizer steps; overrides num_train_epochs if positive")
    seed: int = HfArg(default=0, help="decides the order of the pairs and random weights")
    # evaluation
    eval_steps: int = HfArg(default=50, help="steps between evaluations; also at start and end")
    max_completion_length: int = HfArg(default=256, help="tokens generated where rows have answers; 0: none")
    # output
    output_dir: str = HfArg(default="out/dpo", help="where everything goes")
    overwrite_output_dir: bool = HfArg(default=False, help="replace the run that is there")
    resume_from_checkpoint: str | None = HfArg(default=None, help="'latest' or a checkpoint's folder")
    save_steps: int = HfArg(default=200, help="steps between checkpoints")
    save_total_limit: int = HfArg(default=2, help="checkpoints that are kept")
    logging_steps: int = HfArg(default=10, help="steps between printed/tracked lines; metrics.jsonl has all")
    log_with: Literal["tensorboard", "wandb", "trackio"] | None = HfArg(default=None, aliases=["--report_to"],
                                                                        help="tracker")
    audit: str | None = HfArg(default=None, help="only write what the loss sees of each token as FILE.html")
    audit_step: int | None = HfArg(default=None, help="audit: the step shown; default: the first")
    merge: bool = HfArg(default=False, help="also write merged/: the adapter merged into its base")

    def __post_init__(self):
        require(self.dataset_name,
                "--dataset_name is missing: a .json, .jsonl, .csv or .parquet file, or a dataset name")
        common.check_numbers(
            self, ("learning_rate", "max_length", "beta", "batch_size", "micro_batch_tokens", "eval_steps",
                   "save_steps", "save_total_limit", "logging_steps"),
            ("lora_r", "warmup_steps", "weight_decay", "max_grad_norm", "sft_coef", "max_completion_length",
             "num_train_epochs"))
        require(0 <= self.eval_fraction < 1, f"--eval_fraction must lie in [0, 1), not {self.eval_fraction}")
        require(0 <= self.label_smoothing < 0.5,
                f"--label_smoothing must lie in [0, 0.5), not {self.label_smoothing}")
        require(self.label_smoothing == 0 or self.loss_type == "sigmoid",
                f"--label_smoothing is defined for --loss_type sigmoid alone, not for {self.loss_type}")
        require(self.max_steps > 0 or self.num_train_epochs > 0,
                "nothing to do: give --max_steps or --num_train_epochs")
        common.check_tracker(self.log_with)


# ---- loss --------------------------------------------------------------------------------------------------

def dpo_loss(policy_chosen_logprobs, policy_rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs,
             beta, loss_type="sigmoid", label_smoothing=0.0):
    """-> (losses, chosen_rewards, rejected_rewards), each (B,), from four (B,) sums over the completions.

    For ipo give log-probs divided by the completion's length. The rewards are beta (log pi - log ref).
    With log-ratios 2 (chosen) and -1 (rejected) and beta 0.1 the margin is 3: sigmoid gives
    -log s(0.3) = 0.5544, hinge 1 - 0.3 = 0.7, ipo (3 - 5)^2 = 4. At policy = reference sigmoid gives ln 2.
    """
    chosen_logratios = policy_chosen_logprobs - ref_chosen_logprobs  # log pi_w - log ref_w
    rejected_logratios = policy_rejected_logprobs - ref_rejected_logprobs
    margins = chosen_logratios - rejected_logratios  # (B,)
    if loss_type == "sigmoid":  # eq. 7; smoothed: (1 - eps) of it and eps of its mirror
        losses = (-(1 - label_smoothing) * F.logsigmoid(beta * margins)
                  - label_smoothing * F.logsigmoid(-beta * margins))
    elif loss_type == "ipo":  # eq. 17 of Azar 2023
        losses = (margins - 1 / (2 * beta)).square()
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * margins)  # RSO, hinge-norm
    else:
        raise ValueError(f"unknown loss_type {loss_type}")
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


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


# ---- data --------------------------------------------------------------------------------------------------

def load_pairs(args, tokenizer):
    """-> (training pairs, evaluation pairs) of common.encode_pairs; prints what was kept and dropped."""
    items, _ = common.read_items(args.dataset_name, args, common.PAIR_FORMATS, common.to_pair)
    if args.eval_dataset_name:
        held, _ = common.read_items(args.eval_dataset_name, args, common.PAIR_FORMATS, common.to_pair)
        parts = items, held
    else:
        parts = common.hold_out(items, [common.prompt_key(pair["prompt"]) for pair, _, _ in items],
                                args.eval_fraction)
    counts = Counter()
    train, held = (common.encode_pairs(part, tokenizer, args.max_length, counts, args.skip_bad_rows)
                   for part in parts)
    for pair in (*train, *held):
        answer = pair.pop("row").get("answer")
        if answer is not None and args.max_completion_length:
            pair["answer"] = extract_answer(str(answer))
    say(f"data     {len(train):,} pairs to train on, {len(held):,} to evaluate"
        + "".join(f"; {n:,} {what}" for what, n in counts.items() if n))
    require(train, f"{args.dataset_name}: no pair to train on is left")
    return train, held


def both_sides(pairs):
    """B pairs -> 2B examples: the chosen ones, then the rejected ones, so that they share one forward."""
    return [{"input_ids": p[f"{side}_ids"], "completion_mask": p[f"{side}_mask"]}
            for side in ("chosen", "rejected") for p in pairs]


def pair_lengths(pairs):
    """The padded tokens of a pair in a micro-batch: two rows as long as the longer one."""
    return [2 * max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]


def collate(examples, device):
    """Examples -> input_ids (B, T) right-padded, loss_mask (B, T-1)."""
    input_ids = common.pad([e["input_ids"] for e in examples], 0)
    completion_mask = common.pad([e["completion_mask"] for e in examples], 0)
    return input_ids.to(device), completion_mask[:, 1:].to(device)


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


# ---- evaluation --------------------------------------------------------------------------------------------

def pair_logprobs(policy, pairs, device):
    """-> (sums, lengths, logprobs): (2, B) sums over the completion, (2, B) its number of tokens, and the
    log-probs by token, (2B, T-1)."""
    input_ids, loss_mask = collate(both_sides(pairs), device)
    logprobs, _, _ = policy(input_ids, loss_mask)  # (2B, T-1), 0 where the mask is 0
    return logprobs.sum(-1).view(2, -1), loss_mask.sum(-1).view(2, -1), logprobs


FIGURES = ("dpo_loss", "nll_loss", "rewards/chosen", "rewards/rejected", "rewards/margins",
           "rewards/accuracies", "logps/chosen", "logps/rejected")


def pair_figures(policy_sums, ref_sums, lengths, args):
    """-> (losses (B,), figures (8, B) in the order of FIGURES) from summed log-probs and lengths, all (2, B).

    The rewards are beta (log pi - log ref) of sums, also where the loss (ipo) takes means.
    """
    scale = lengths if args.loss_type == "ipo" else 1  # ipo takes means, everything else sums
    dpo_losses, _, _ = dpo_loss(*(policy_sums / scale), *(ref_sums / scale), args.beta, args.loss_type,
                                args.label_smoothing)
    nll = -policy_sums[0] / lengths[0]  # mean over the chosen completion's tokens
    chosen, rejected = args.beta * (policy_sums.detach() - ref_sums)
    figures = torch.stack([dpo_losses.detach(), nll.detach(), chosen, rejected, chosen - rejected,
                           (chosen > rejected).float(), *policy_sums.detach()])
    return dpo_losses + args.sft_coef * nll, figures


SHARES = ("A pair's loss is not a sum over tokens. Its value at a margin of 0 (ln 2 for sigmoid) belongs to "
          "no token and is listed with the chosen row; the rest goes to the tokens of both rows, each in "
          "proportion to what it adds to the margin: integrated gradients on the straight path from the "
          "reference. With --sft_coef c a chosen token also adds c times its - log p, divided by its row's "
          "trained tokens.")


@torch.no_grad()
def pair_shares(logprobs, ref_logprobs, loss_mask, policy_sums, ref_sums, args):
    """What each token adds to the losses of B pairs -> (log-ratios, shares (2B, T-1) fp64, constants (2B,)).

    c_t / m (L(m) - L(0)),  m = sum_t c_t,  c_t = +- (log pi - log ref) of a token, over the length for ipo;
    L(0) is the constant, of the chosen row. For m -> 0 the factor is dL/dm. Log-probs and mask (2B, T-1),
    the sums that the loss was given (2, B). Log-ratios 2 and 1 (chosen), 0 (rejected) and beta 0.1: L(0) =
    0.6931, L(3) = 0.5544, shares -0.0925 and -0.0463.
    """
    def of(margins):
        zeros = torch.zeros_like(margins)
        return dpo_loss(margins, zeros, zeros, zeros, args.beta, args.loss_type, args.label_smoothing)[0]
    B, lengths = len(logprobs) // 2, loss_mask.sum(-1, keepdim=True).cpu().double()  # (2B, 1)
    logprobs, ref_logprobs, policy_sums, ref_sums = (
        x.cpu().double() for x in (logprobs, ref_logprobs, policy_sums, ref_sums))
    logratios = logprobs - ref_logprobs
    # the rounding error of the fp32 sums is spread over the trained tokens
    rounding = (policy_sums - ref_sums).view(-1, 1) - logratios.sum(-1, keepdim=True)
    logratios = logratios + loss_mask.cpu() * rounding / lengths
    parts = logratios / (lengths if args.loss_type == "ipo" else 1)  # c_t
    parts[B:] *= -1
    margins = parts.sum(-1).view(2, B).sum(0)  # (B,)
    margins = torch.where(margins.abs() > 1e-6, margins, 1e-6)
    constants = of(torch.zeros_like(margins))
    shares = parts * ((of(margins) - constants) / margins).repeat(2)[:, None]
    shares[:B] -= args.sft_coef * logprobs[:B] / lengths[:B]
    return logratios, shares, torch.cat([constants, torch.zeros_like(constants)])


@torch.no_grad()
def reference_logprobs(reference, pairs, args, accelerator):
    """One pass over all pairs -> (N, 2) on the CPU: chosen and rejected, the same on every process."""
    mine = []
    for batch in micro_batches(pair_lengths(pairs), args.micro_batch_tokens, accelerator.process_index,
                               accelerator.num_processes):
        if batch:
            with accelerator.autocast():
                sums, _, _ = pair_logprobs(reference, [pairs[i] for i in batch], accelerator.device)
            mine += zip(batch, sums.T.cpu())
    return torch.stack([row for _, row in sorted(gather_object(mine), key=lambda item: item[0])])


@torch.no_grad()
def evaluate(policy, model, pairs, ref_of, args, accelerator, tokenizer, stop_ids):
    """-> (eval/loss, the pair figures and, where rows have answers, greedy eval/accuracy; table rows)."""
    totals, table = torch.zeros(11, dtype=torch.float64, device=accelerator.device), []
    model.eval()
    for batch in micro_batches(pair_lengths(pairs), args.micro_batch_tokens, accelerator.process_index,
                               accelerator.num_processes):
        if batch:
            sums, lengths, _ = pair_logprobs(policy, [pairs[i] for i in batch], accelerator.device)
            losses, figures = pair_figures(sums, ref_of([pairs[i] for i in batch])[0], lengths, args)
            totals[:9] += torch.cat([losses[None], figures]).sum(-1)
    asked = [p for p in pairs if p.get("answer") is not None]
    lengths = [len(p["prompt_ids"]) + args.max_completion_length for p in asked]
    for batch in micro_batches(lengths, args.micro_batch_tokens, accelerator.process_index,
                               accelerator.num_processes):
        rows = [asked[i] for i in batch]
        for row, text in zip(rows, generate(model, rows, args, accelerator, tokenizer, stop_ids)):
            right = extract_answer(text) == row["answer"]
            totals[9:] += torch.tensor([right, 1.0], dtype=torch.float64, device=accelerator.device)
            if len(table) < 3:
                prompt = tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
                table.append({"prompt": prompt, "completion": text, "answer": row["answer"],
                              "right": str(right)})
    model.train()
    totals = accelerator.reduce(totals, "sum")
    names = ["eval/loss", *(f"eval/{name}" for name in FIGURES)]
    metrics = dict(zip(names, (totals[:9] / len(pairs)).tolist()))
    if totals[10]:
        metrics["eval/accuracy"] = (totals[9] / totals[10]).item()
    return metrics, table


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


def generate(model, rows, args, accelerator, tokenizer, stop_ids):
    """Greedy completions of examples' prompts, as texts. Nothing is inherited from the checkpoint's
    generation config."""
    if not rows:
        return []
    prompt_ids = common.pad([r["prompt_ids"] for r in rows], tokenizer.pad_token_id,
                            side="left").to(accelerator.device)
    attention_mask = common.pad([[1] * len(r["prompt_ids"]) for r in rows], 0,
                                side="left").to(accelerator.device)
    room = common.max_positions(model) - prompt_ids.shape[1]
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    shipped, causal.generation_config = causal.generation_config, GenerationConfig()
    try:
        with accelerator.autocast():
            out = model.generate(input_ids=prompt_ids, attention_mask=attention_mask, do_sample=False,
                                 num_beams=1, use_cache=True, eos_token_id=stop_ids,
                                 max_new_tokens=max(1, min(args.max_completion_length, room)),
                                 pad_token_id=tokenizer.pad_token_id,
                                 synced_gpus=False)  # each process has its own number of tokens
    finally:
        causal.generation_config = shipped
    return tokenizer.batch_decode(out[:, prompt_ids.shape[1]:], skip_special_tokens=True)


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
    lora = common.trains_adapter(args)
    if args.learning_rate is None:
        args.learning_rate = 1e-5 if lora else 1e-6
    if args.precompute_ref_log_probs is None:
        args.precompute_ref_log_probs = not lora or accelerator.is_fsdp2
    precompute = args.precompute_ref_log_probs and not args.audit  # its page needs the reference by token
    require(precompute or not lora or not accelerator.is_fsdp2,
            "under FSDP an adapter cannot be switched off in the middle of a step: leave out "
            "--precompute_ref_log_probs False and --audit")
    checkpoint = common.open_run(args)

    # data: all of it is read, checked and tokenized before the model is loaded
    tokenizer = common.load_tokenizer(args)
    train, held = load_pairs(args, tokenizer)
    data = common.check_data(checkpoint, common.fingerprint(both_sides(train + held)))
    for side in ("chosen", "rejected"):
        common.show_example(tokenizer, train[0][f"{side}_ids"], train[0][f"{side}_mask"], f"first {side}")
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    total_steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)

    # model, reference, optimizer, and where an earlier run stopped
    model = common.load_model(args, tokenizer, accelerator.device)
    stop_ids = model.generation_config.eos_token_id
    if precompute:
        how = "the policy at the start; its log-probs are computed once"
    else:
        reference, use_reference, how = common.make_reference(
            model, common.base_and_adapter(args.model_name_or_path)[1])
        reference = Policy(reference.to(accelerator.device))
    say(f"reference {how}")
    optimizer = make_optimizer(model, args)
    policy, optimizer = common.prepare(accelerator, Policy(model), optimizer)
    check_head(policy, model, train[0]["chosen_ids"][None, :64].long().to(accelerator.device), accelerator)
    state = {"step": 0, "num_tokens": 0, "eval_losses": [], "data": data}
    kept = {}  # tensors that go into the checkpoint beside weights and moments
    if checkpoint:
        require(not precompute or "ref_sums" in checkpoint[0], "the checkpoint holds no reference log-probs")
        common.restore(model, optimizer, checkpoint)
        state = {name: checkpoint[1][name] for name in state}
    if precompute:
        with common.unsharded(policy):
            kept["ref_sums"] = (checkpoint[0]["ref_sums"] if checkpoint else  # (N, 2)
                                reference_logprobs(policy, train + held, args, accelerator))
        for pair, row in zip(train + held, kept["ref_sums"], strict=True):
            pair["ref_sums"] = row  # (2,)
    log = common.RunLog(accelerator, args, total_steps, state["step"])
    audit = common.Audit(accelerator, args, tokenizer, state["step"], total_steps)
    interrupt = common.Interrupt()
    say(f"train    {total_steps} steps of {args.batch_size} pairs ({steps_per_epoch} an epoch), "
        f"learning rate {args.learning_rate:g} ({args.lr_scheduler_type}), "
        f"{accelerator.num_processes} process(es) on {accelerator.device}")

    def reference_of(pairs):
        """B pairs -> (2, B) the reference's summed log-probs of both sides; and those by token, None if
        precomputed."""
        if precompute:
            return torch.stack([p["ref_sums"] for p in pairs], 1).to(accelerator.device), None
        with torch.no_grad(), use_reference(), accelerator.autocast():
            return pair_logprobs(reference, pairs, accelerator.device)[::2]

    def report():
        """Evaluates, prints and logs."""
        if held and not args.audit:
            with common.unsharded(policy):
                metrics, table = evaluate(policy, model, held, reference_of, args, accelerator, tokenizer,
                                          stop_ids)
            log.metrics(state["step"], metrics)
            figures = "  ".join(f"{k[5:]} {v:.4f}" for k, v in metrics.items())
            say(f"eval     step {state['step']}: {figures}")
            common.show_table(table)
            state["eval_losses"] = common.watch_loss(state["eval_losses"], metrics["eval/loss"], "")
            moved = metrics["eval/rewards/chosen"] / args.beta  # nats a completion, against the reference
            if moved < min(-1.0, 0.2 * (metrics["eval/logps/chosen"] - moved)):
                say(f"warning  the chosen completions have lost {-moved:.3g} nats, over a fifth of their "
                    "log-prob: the policy leaves them too. Add --sft_coef 1, raise --beta or lower "
                    "--learning_rate")

    if state["step"] == 0:
        report()
    for step in range(state["step"], total_steps):
        # the pairs of this step: a function of (seed, epoch) and the step
        epoch, at = divmod(step, steps_per_epoch)
        order = torch.randperm(len(train), generator=stream(args.seed, "order", epoch)).tolist()
        rows_of_step = order[at * args.batch_size:(at + 1) * args.batch_size]
        pairs = [train[i] for i in rows_of_step]
        trained_pairs = len(pairs)  # the denominator of the whole step, over all processes
        batches = micro_batches(pair_lengths(pairs), args.micro_batch_tokens, accelerator.process_index,
                                accelerator.num_processes)

        totals = torch.zeros(10, device=accelerator.device)  # loss, the figures; stop signal
        totals[9] = interrupt.signal
        for i, batch in enumerate(batches):
            part = [pairs[j] for j in batch] or pairs[:1]
            weight = float(bool(batch))  # a process without pairs runs a pass of weight 0
            ref_sums, ref_logprobs = reference_of(part)  # (2, B); first, since it may switch adapters
            with accelerator.no_sync(policy) if i < len(batches) - 1 else nullcontext():
                policy_sums, lengths, logprobs = pair_logprobs(policy, part, accelerator.device)
                losses, figures = pair_figures(policy_sums, ref_sums, lengths, args)
                # DDP averages over the processes: undo its division
                accelerator.backward(weight * losses.sum() * accelerator.num_processes / trained_pairs)
            if audit.due(step):
                _, loss_mask = collate(both_sides(part), accelerator.device)
                logratios, shares, constants = pair_shares(logprobs, ref_logprobs, loss_mask, policy_sums,
                                                           ref_sums, args)
                audit.add([*batch, *batch], [e["input_ids"] for e in both_sides(part)], loss_mask,
                          shares / trained_pairs, {"log-prob": logprobs, "ref. log-prob": ref_logprobs,
                                                   "reward": args.beta * logratios},
                          ["chosen, "] * len(part) + ["rejected, "] * len(part), constants / trained_pairs)
            totals[:9] += weight * torch.cat([losses.detach()[None], figures]).sum(-1)
        grad_norm = accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf).item()
        *figures, stop = accelerator.reduce(totals, "sum").tolist()
        loss, *figures = (x / trained_pairs for x in figures)
        require(math.isfinite(loss) and math.isfinite(grad_norm),
                f"step {step + 1}: the loss is {loss} and its gradient's norm {grad_norm}, on pairs "
                f"{rows_of_step[:8]} ... of the training data; this update was not made, and the checkpoints "
                "are whole. Try a lower --learning_rate")
        if audit.due(step):
            return audit.write(loss, SHARES)
        learning_rate = learning_rate_at(step, total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()

        tokens = sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)
        state["step"], state["num_tokens"] = step + 1, state["num_tokens"] + tokens
        metrics = {"loss": loss, **dict(zip(FIGURES, figures)), "grad_norm": grad_norm,
                   "learning_rate": learning_rate, "num_tokens": state["num_tokens"],
                   "trained_pairs": trained_pairs}
        log.metrics(step + 1, metrics)
        if step == 0:
            say(f"check    first update: dpo_loss {metrics['dpo_loss']:.4f}"
                f"{' (ln 2 at the reference)' if args.loss_type == 'sigmoid' else ''}, rewards "
                f"{metrics['rewards/chosen']:.1g} and {metrics['rewards/rejected']:.1g}")
        log.progress(step + 1, tokens, {
            k: metrics[k] for k in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen")})
        if (step + 1) % args.eval_steps == 0 or step + 1 == total_steps:
            report()
        if (step + 1) % args.save_steps == 0 or step + 1 == total_steps or stop:
            common.save_checkpoint(accelerator, args, state, model, optimizer, extra=kept)
        if stop:
            interrupt.leave(args, step + 1)

    log.close()
    common.finish(args, accelerator, model, tokenizer)


if __name__ == "__main__":
    with common.user_errors():
        main(parse_args(Args))
