"""sft.py - supervised fine-tuning: a language model imitates the completions of a dataset.

Objective   L = - sum_t mask_t log p(x_t | x_<t) / trained_tokens, over all rows of the step and all
            processes.
Shapes      B rows, T tokens of the longest row, V vocabulary, d hidden size, N trained tokens of a
            micro-batch. Index t of a (B, T-1) tensor is the prediction of token t+1: the causal shift is in
            Policy.logprobs (of hidden states and targets) and collate (of the mask).

Differences from the usual recipe
1. The mean is over the tokens of the whole step, not over micro-batches or rows: micro_batch_tokens changes
   memory and speed alone (and, with dropout, its draws).
2. Rows are sorted by length inside a step instead of packed: no padding to speak of, and no attention between
   rows.
3. The (B, T, V) logits never exist: head and log-softmax run over chunks of the trained tokens.
Differences from TRL's SFTTrainer
1. Only completions are trained on, in conversations too (--completion_only_loss False trains on all), for any
   chat template.
2. A base that is frozen under LoRA is held in bf16 where autocast is bf16 (TRL: fp32 by default); weights
   that are trained are fp32, whatever the checkpoint's dtype.
3. batch_size counts the rows of an optimizer step over all processes; what fits into memory is
   micro_batch_tokens.
4. Exact duplicates are dropped, and a resumed run ends bit-equal to one that was never stopped.
5. NEFTune's noise is on real tokens only and scaled by their number, not by the padded length.

Run   python sft.py                                                   the small example, CPU, minutes
      python sft.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name my.jsonl --load_in_4bit --lora_r 16
      accelerate launch --multi_gpu --num_processes 8 sft.py --model_name_or_path ... --dataset_name ...
"""

import hashlib
import math
import os
import re
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import common  # first: it quiets the libraries below
from common import parse_args, require, say

import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
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
    lora_dropout: float = HfArg(default=0.0, help="dropout on the adapters' input")
    lora_target_modules: list[str] | None = HfArg(default=None, help="modules to adapt; default: all linear")
    modules_to_save: list[str] | None = HfArg(default=None, help="modules trained in full beside adapters")
    gradient_checkpointing: bool = HfArg(default=True, help="recompute activations in backward: saves memory")
    bf16: bool | None = HfArg(default=None, help="bf16 autocast; default: where an accelerator has it")
    # data
    dataset_name: str | None = HfArg(default=None, help=".json, .jsonl, .csv, .parquet file, or a dataset")
    eval_dataset_name: str | None = HfArg(default=None, help="default: eval_fraction of the training data")
    eval_fraction: float = HfArg(default=0.05, help="share of the rows held out by prompt, at most 200 rows")
    format: str | None = HfArg(
        default=None, help="messages, conversations, prompt_completion, alpaca, question_answer or text")
    system_prompt: str | None = HfArg(default=None, help="system message for rows that have none")
    max_length: int = HfArg(default=2048, help="longest row: prompts lose their start, answers their end")
    completion_only_loss: bool = HfArg(default=True, aliases=["--assistant_only_loss"],
                                       help="train on completions alone; False: on prompts too")
    skip_bad_rows: bool = HfArg(default=False, help="count and skip malformed rows instead of stopping")
    # optimization
    learning_rate: float | None = HfArg(default=None, help="peak; default 2e-5 (all weights), 2e-4 (LoRA)")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = HfArg(default="cosine", help="after warm-up")
    warmup_steps: float = HfArg(default=0.03, help="steps of linear warm-up; below 1: a share of all steps")
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay of matrices (not of norms and biases)")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are scaled down to this norm; 0: off")
    optim: Literal["adamw_torch", "adamw_8bit"] = HfArg(default="adamw_torch", help="8bit needs bitsandbytes")
    batch_size: int = HfArg(default=64, help="rows of one optimizer step, over all processes")
    micro_batch_tokens: int = HfArg(default=8192, help="padded tokens of a forward pass: limits memory only")
    num_train_epochs: float = HfArg(default=2.0, help="passes over the data")
    max_steps: int = HfArg(default=-1, help="optimizer steps; overrides num_train_epochs if positive")
    seed: int = HfArg(default=0, help="decides the order of the rows, random weights, dropout and noise")
    freeze_layers: float = HfArg(default=0.0, help="share of the blocks, lowest first, that is not trained")
    adversarial: Literal["fgm", "neftune"] | None = HfArg(
        default=None, help="perturb embeddings: fgm adds the loss under attack, neftune trains under noise")
    adversarial_epsilon: float = HfArg(default=0.1, help="fgm: norm of a row's attack over its mean ||E_t||")
    neftune_noise_alpha: float = HfArg(default=5.0, help="neftune: alpha; a row's noise has norm alpha / 1.7")
    # evaluation
    eval_steps: int = HfArg(default=100, help="steps between evaluations; also at the start and the end")
    max_completion_length: int = HfArg(default=256, help="tokens generated to evaluate answers; 0 for none")
    keep_best: bool = HfArg(default=False, help="save the weights with the lowest eval loss, not the last")
    # output
    output_dir: str = HfArg(default="out/sft", help="where everything goes")
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
            self, ("learning_rate", "max_length", "batch_size", "micro_batch_tokens", "eval_steps",
                   "save_steps", "save_total_limit", "logging_steps", "adversarial_epsilon",
                   "neftune_noise_alpha"),
            ("lora_r", "warmup_steps", "weight_decay", "max_grad_norm", "max_completion_length",
             "num_train_epochs"))
        require(0 <= self.lora_dropout < 1, f"--lora_dropout must lie in [0, 1), not {self.lora_dropout}")
        require(0 <= self.eval_fraction < 1, f"--eval_fraction must lie in [0, 1), not {self.eval_fraction}")
        require(0 <= self.freeze_layers < 1, f"--freeze_layers must lie in [0, 1), not {self.freeze_layers}")
        require(self.max_steps > 0 or self.num_train_epochs > 0,
                "nothing to do: give --max_steps or --num_train_epochs")
        common.check_tracker(self.log_with)


# ---- loss --------------------------------------------------------------------------------------------------

def sft_loss(logprobs, loss_mask):
    """Negative log-likelihood, one number per trained token; the caller sums and divides by trained_tokens.

    logprobs (B, T-1) fp32, loss_mask (B, T-1) with 1 = counts -> (B, T-1), 0 where the mask is 0.
    With log-probs -0.5, -1.0, -2.0 and mask 1, 0, 1 it is 0.5, 0, 2.0: a mean of 1.25 over 2 trained tokens.
    """
    return -torch.where(loss_mask.bool(), logprobs, 0.0)  # L_t = - mask_t log p(x_t | x_<t)


def fgm_delta(grad, embeddings, mask, epsilon):
    """FGM (Miyato 2017, arXiv 1605.07725): the perturbation that, of all with its norm, raises each row's
    loss most, to first order. Unlike in the paper, E is not normalised and epsilon is relative to its norm.

    r = epsilon mean_t ||E_t|| g / ||g||,  g = d loss / dE:  ||g|| over the whole row, the mean over its real
    tokens, and r = 0 where g = 0. grad, embeddings (B, T, d), mask (B, T) with 1 = real token -> (B, T, d).
    With E = (3, 4), (0, 1), whose mean norm is 3, g = (0, 3), (4, 0) of norm 5 and epsilon 0.5 it is 0.3 g.
    """
    g = grad.float() * mask[..., None]
    norm = torch.linalg.vector_norm(g, dim=(1, 2))  # (B,)
    size = (embeddings.float().norm(dim=-1) * mask).sum(-1) / mask.sum(-1)  # (B,)
    return g * (epsilon * size / norm.where(norm > 0, 1.0))[:, None, None]


def neftune_delta(noise, mask, alpha):
    """NEFTune (Jain 2023, arXiv 2310.05914): alpha / sqrt(L d) U(-1, 1), L real tokens in the row.

    noise (B, T, d) in (-1, 1), mask (B, T) with 1 = real token -> (B, T, d), 0 on padding.
    With alpha 5 and a row of L = 2 tokens and d = 2 numbers each it is 2.5 times the noise.
    """
    scale = alpha / (mask.sum(-1) * noise.shape[-1]).sqrt()  # (B,)
    return noise * mask[..., None] * scale[:, None, None]


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


@contextmanager
def perturbed(model, delta):
    """Inside, the input embeddings E (B, T, d) come out as E + delta; None adds nothing. Yields a
    list to which each forward appends E.

    The weight is not touched: it may be frozen, under LoRA, and is the output head's too where they are tied.
    """
    def add(layer, inputs, embeddings):
        seen.append(embeddings.detach())
        return embeddings + delta.to(embeddings.dtype)
    seen, hook = [], None if delta is None else model.get_input_embeddings().register_forward_hook(add)
    try:
        yield seen
    finally:
        if hook:
            hook.remove()


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

def load_examples(args, tokenizer):
    """-> (training examples, evaluation examples): dicts of input_ids, completion_mask and, held out with an
    answer, prompt_ids, answer."""
    items, _ = common.read_items(args.dataset_name, args, common.SFT_FORMATS, common.to_conversation)
    seen, unique = set(), []
    for item in items:
        key = hashlib.sha256(repr(item[0]).encode()).digest()
        unique += [] if key in seen else [item]
        seen.add(key)
    if args.eval_dataset_name:
        held, _ = common.read_items(args.eval_dataset_name, args, common.SFT_FORMATS, common.to_conversation)
        train = unique
    else:
        prompts = [c.get("text") or common.prompt_key(c["messages"]) for c, _, _ in unique]
        train, held = common.hold_out(unique, prompts, args.eval_fraction)
    counts = Counter({"duplicates dropped": len(items) - len(unique)})
    examples = encode_rows(train, args, tokenizer, counts), encode_rows(held, args, tokenizer, counts, True)
    require(examples[1] or not args.keep_best, "--keep_best needs evaluation data: --eval_dataset_name, "
            "or an --eval_fraction that holds out a row")
    require(examples[0], f"{args.dataset_name}: no row to train on is left")
    notes = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)
    say(f"data     {len(examples[0]):,} examples to train on, {len(examples[1]):,} to evaluate"
        + (f"; {notes}" if notes else ""))
    return examples


def encode_rows(items, args, tokenizer, counts, held_out=False):
    """[(conversation, row, place)] -> examples; `counts` says what was cut, split, moved or dropped.

    Held-out rows with an answer keep it and its prompt, once a conversation, for the greedy evaluation.
    """
    examples = []
    for conversation, row, place in items:
        asked = (held_out and args.max_completion_length and "messages" in conversation
                 and row.get("answer") is not None)
        try:
            parts = ([common.encode_text(tokenizer, conversation["text"])] if "text" in conversation
                     else common.encode_conversation(tokenizer, conversation["messages"],
                                                     args.completion_only_loss))
            if asked:
                prompt_ids = common.encode_prompt(tokenizer, conversation["messages"][:-1])[-args.max_length:]
        except ValueError as error:
            require(args.skip_bad_rows, f"{place}: {error}; mend it or add --skip_bad_rows")
            counts["rows skipped in tokenizing"] += 1
            continue
        counts["rows split into turns"] += len(parts) > 1
        for part in parts:
            ids, mask = common.truncate(part["input_ids"], part["completion_mask"], args.max_length)
            counts["cut to max_length"] += len(ids) < len(part["input_ids"])
            counts["spans moved to a token boundary"] += part["moved"] > 0
            if not any(mask[1:]):
                counts["without a trained token dropped"] += 1
                continue
            example = {"input_ids": torch.tensor(ids, dtype=torch.int32),
                       "completion_mask": torch.tensor(mask, dtype=torch.int8)}
            if asked and part is parts[-1]:
                example |= {"answer": extract_answer(str(row["answer"])), "prompt_ids": prompt_ids}
            examples.append(example)
    return examples


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


def starting_delta(args, model, examples, keys, device):
    """What is added to the embeddings in the first pass over B examples -> (B, T, d) or None, and the mask of
    the real tokens (B, T).

    fgm: zeros, whose gradient is d loss / dE. neftune: noise drawn from each row's own key, so that neither
    the cut nor the number of processes changes it. Without --adversarial two Nones.
    """
    if args.adversarial is None:
        return None, None
    lengths, d = [len(e["input_ids"]) for e in examples], model.get_input_embeddings().weight.shape[1]
    mask = common.pad([[1] * n for n in lengths], 0).to(device)
    if args.adversarial == "fgm":
        return torch.zeros(*mask.shape, d, device=device, requires_grad=True), mask
    noise = [torch.rand(n, d, generator=stream(args.seed, "neftune", *key)) * 2 - 1
             for n, key in zip(lengths, keys)]
    return neftune_delta(pad_sequence(noise, batch_first=True).to(device), mask,
                         args.neftune_noise_alpha), mask


# ---- evaluation --------------------------------------------------------------------------------------------

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


@torch.no_grad()
def evaluate(policy, model, examples, args, accelerator, tokenizer, stop_ids):
    """-> {"eval/loss", "eval/token_accuracy", and "eval/accuracy" (greedy exact match) where rows have
    answers}, table rows."""
    totals, table = torch.zeros(5, dtype=torch.float64, device=accelerator.device), []
    model.eval()
    lengths = [len(e["input_ids"]) for e in examples]
    for batch in micro_batches(lengths, args.micro_batch_tokens, accelerator.process_index,
                               accelerator.num_processes):
        if batch:
            input_ids, loss_mask = collate([examples[i] for i in batch], accelerator.device)
            logprobs, _, hits = policy(input_ids, loss_mask)
            totals[:3] += torch.stack([sft_loss(logprobs, loss_mask).sum(), hits.sum(), loss_mask.sum()])
    asked = [e for e in examples if e.get("answer") is not None]
    lengths = [len(e["prompt_ids"]) + args.max_completion_length for e in asked]
    for batch in micro_batches(lengths, args.micro_batch_tokens, accelerator.process_index,
                               accelerator.num_processes):
        rows = [asked[i] for i in batch]
        for row, text in zip(rows, generate(model, rows, args, accelerator, tokenizer, stop_ids)):
            right = extract_answer(text) == row["answer"]
            totals[3:] += torch.tensor([right, 1.0], dtype=torch.float64, device=accelerator.device)
            if len(table) < 3:
                prompt = tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
                table.append({"prompt": prompt, "completion": text, "answer": row["answer"],
                              "right": str(right)})
    model.train()
    loss, hits, tokens, right, answered = accelerator.reduce(totals, "sum").tolist()
    metrics = {"eval/loss": loss / tokens, "eval/token_accuracy": hits / tokens}
    if answered:
        metrics["eval/accuracy"] = right / answered
    return metrics, table


@torch.no_grad()
def evaluate_attack(policy, model, examples, args, accelerator):
    """-> {"eval/loss_under_attack"}: evaluate's loss, over the same tokens, with the embeddings perturbed."""
    totals = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    model.eval()
    # evaluation mode has no checkpointing: where that is needed, only one row at a time is sure to fit
    micro_batch_tokens = 1 if args.gradient_checkpointing else args.micro_batch_tokens
    for batch in micro_batches([len(e["input_ids"]) for e in examples], micro_batch_tokens,
                               accelerator.process_index, accelerator.num_processes):
        part = [examples[i] for i in batch] or examples[:1]  # FSDP: as many passes on every process
        input_ids, loss_mask = collate(part, accelerator.device)
        loss_mask = loss_mask * bool(batch)
        keys = [("eval", i) for i in batch or [0]]
        delta, real_mask = starting_delta(args, model, part, keys, accelerator.device)
        if args.adversarial == "fgm":
            with torch.enable_grad(), accelerator.no_sync(policy), perturbed(model, delta) as seen:
                loss = sft_loss(policy(input_ids, loss_mask)[0], loss_mask).sum()
                gradient, = torch.autograd.grad(loss, delta)
            delta = fgm_delta(gradient, seen[0], real_mask, args.adversarial_epsilon)
        with perturbed(model, delta):
            loss = sft_loss(policy(input_ids, loss_mask)[0], loss_mask).sum()
        totals += torch.stack([loss, loss_mask.sum()])
    model.train()
    loss, tokens = accelerator.reduce(totals, "sum").tolist()
    return {"eval/loss_under_attack": loss / tokens}


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


def freeze_lowest(model, share):
    """Freezes that share of the transformer blocks, at least one, and the input embedding unless it is the
    output head too: a tied one is trained, as the head is."""
    blocks = next((m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)
                   and len(m) == model.config.get_text_config().num_hidden_layers), None)
    require(blocks, f"--freeze_layers: no list of blocks was found in a {model.config.model_type} model")
    frozen, embedding = list(blocks[:max(1, int(share * len(blocks)))]), model.get_input_embeddings()
    tied = embedding.weight is model.get_output_embeddings().weight
    for module in frozen + [embedding] * (not tied):
        module.requires_grad_(False)
    say(f"freeze   the lowest {len(frozen)} of {len(blocks)} blocks"
        + (", not the embedding, which is the output head too" if tied else " and the embedding")
        + f": {sum(p.numel() for p in model.parameters() if p.requires_grad):,} weights are trained")


def main(args):
    accelerator = common.make_accelerator(args)
    require(not args.freeze_layers or not common.trains_adapter(args),
            "--freeze_layers is for full fine-tuning: under LoRA every block is frozen already")
    if args.learning_rate is None:
        args.learning_rate = 2e-4 if common.trains_adapter(args) else 2e-5
    checkpoint = common.open_run(args)

    # data: all of it is read, checked and tokenized before the model is loaded
    tokenizer = common.load_tokenizer(args)
    train, held = load_examples(args, tokenizer)
    data = common.check_data(checkpoint, common.fingerprint(train))
    common.show_example(tokenizer, train[0]["input_ids"], train[0]["completion_mask"])
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    total_steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)

    # model, optimizer, and where an earlier run stopped
    model = common.load_model(args, tokenizer, accelerator.device, dropout=True)
    if args.freeze_layers:
        freeze_lowest(model, args.freeze_layers)
    stop_ids = model.generation_config.eos_token_id
    optimizer = make_optimizer(model, args)
    policy, optimizer = common.prepare(accelerator, Policy(model), optimizer)
    check_head(policy, model, train[0]["input_ids"][None, :64].long().to(accelerator.device), accelerator)
    state = {"step": 0, "num_tokens": 0, "best_loss": math.inf, "eval_losses": [], "data": data}
    best = os.path.join(args.output_dir, "checkpoints", "best")
    if checkpoint:
        common.check_cut(model, checkpoint, args)
        common.restore(model, optimizer, checkpoint)
        state = {name: checkpoint[1][name] for name in state}
        if not os.path.isdir(best):  # resumed into another output_dir
            state["best_loss"] = math.inf
    log = common.RunLog(accelerator, args, total_steps, state["step"])
    audit = common.Audit(accelerator, args, tokenizer, state["step"], total_steps)
    interrupt = common.Interrupt()
    passes = 2 if args.adversarial == "fgm" else 1  # fgm's second pass is on E + r; both gradients add up
    say(f"train    {total_steps} steps of {args.batch_size} rows ({steps_per_epoch} an epoch), "
        f"learning rate {args.learning_rate:g} ({args.lr_scheduler_type}), "
        f"{accelerator.num_processes} process(es) on {accelerator.device}")

    def save(name=None):
        common.save_checkpoint(accelerator, args, state, model, optimizer, name)

    def report():
        """Evaluates, prints, logs, and keeps the weights if they are the best so far."""
        if not held or args.audit:
            return
        with common.unsharded(policy):
            metrics, table = evaluate(policy, model, held, args, accelerator, tokenizer, stop_ids)
        if args.adversarial:
            metrics.update(evaluate_attack(policy, model, held, args, accelerator))
        log.metrics(state["step"], metrics)
        say(f"eval     step {state['step']}: " + "  ".join(f"{k[5:]} {v:.4f}" for k, v in metrics.items()))
        common.show_table(table)
        state["eval_losses"] = common.watch_loss(state["eval_losses"], metrics["eval/loss"], "--keep_best, ")
        if args.keep_best and metrics["eval/loss"] < state["best_loss"]:
            state["best_loss"] = metrics["eval/loss"]
            save("best")

    if state["step"] == 0:
        report()
    for step in range(state["step"], total_steps):
        # the rows of this step: a function of (seed, epoch) and the step
        epoch, at = divmod(step, steps_per_epoch)
        order = torch.randperm(len(train), generator=stream(args.seed, "order", epoch)).tolist()
        rows = [train[i] for i in order[at * args.batch_size:(at + 1) * args.batch_size]]
        trained_tokens = sum(int(r["completion_mask"][1:].sum()) for r in rows)  # of the whole step
        lengths = [len(r["input_ids"]) for r in rows]
        batches = micro_batches(lengths, args.micro_batch_tokens, accelerator.process_index,
                                accelerator.num_processes)

        torch.manual_seed(stream(args.seed, "dropout", step, accelerator.process_index).initial_seed())
        totals = torch.zeros(5, device=accelerator.device)  # loss, hits, both under attack (fgm), stop signal
        totals[4] = interrupt.signal
        for i, batch in enumerate(batches):
            part = [rows[j] for j in batch] or rows[:1]
            input_ids, loss_mask = collate(part, accelerator.device)
            loss_mask = loss_mask * bool(batch)  # a process without rows takes part with an all-masked pass
            keys = [(step, j) for j in batch or [0]]
            delta, real_mask = starting_delta(args, model, part, keys, accelerator.device)
            for attack in range(passes):  # under no_sync: DDP takes one synchronised backward, the last
                last = i == len(batches) - 1 and attack == passes - 1
                with nullcontext() if last else accelerator.no_sync(policy), perturbed(model, delta) as seen:
                    logprobs, _, hits = policy(input_ids, loss_mask)
                    losses = sft_loss(logprobs, loss_mask)  # (B, T-1)
                    loss = losses.sum()
                    # DDP averages over the processes: undo its division
                    accelerator.backward(loss * accelerator.num_processes / trained_tokens)
                if audit.due(step) and attack == 0:
                    audit.add(batch, [e["input_ids"] for e in part], loss_mask, losses / trained_tokens,
                              {"log-prob": logprobs, "loss": losses})
                totals[2 * attack:2 * attack + 2] += torch.stack([loss.detach(), hits.sum()])
                if attack < passes - 1:
                    delta = fgm_delta(delta.grad, seen[0], real_mask, args.adversarial_epsilon)
        grad_norm = accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf).item()
        loss_sum, hit_count, attacked, _, stop = accelerator.reduce(totals, "sum").tolist()
        require(math.isfinite(loss_sum) and math.isfinite(grad_norm),
                f"step {step + 1}: the loss is {loss_sum / trained_tokens} and its gradient's norm "
                f"{grad_norm}, on rows {order[at * args.batch_size:(at + 1) * args.batch_size][:8]} ... of "
                "the training data; this update was not made, and the checkpoints are whole. "
                "Try a lower --learning_rate")
        if audit.due(step):
            return audit.write(loss_sum / trained_tokens, "A token's share is its - log p, divided by the "
                               f"step's {trained_tokens} trained tokens" + {
                                   "fgm": "; this is the clean pass, and not the one under attack.",
                                   "neftune": ", under noise.", None: "."}[args.adversarial])
        learning_rate = learning_rate_at(step, total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()

        state["step"], state["num_tokens"] = step + 1, state["num_tokens"] + sum(lengths)
        metrics = {"loss": loss_sum / trained_tokens, "token_accuracy": hit_count / trained_tokens,
                   "grad_norm": grad_norm, "learning_rate": learning_rate, "num_tokens": state["num_tokens"],
                   "trained_tokens": trained_tokens}
        if passes == 2:
            metrics["adversarial_loss"] = attacked / trained_tokens
        log.metrics(step + 1, metrics)
        log.progress(step + 1, sum(lengths), {"loss": loss_sum / trained_tokens,
                                              "token_accuracy": hit_count / trained_tokens})
        if (step + 1) % args.eval_steps == 0 or step + 1 == total_steps:
            report()
        if (step + 1) % args.save_steps == 0 or step + 1 == total_steps or stop:
            save()
        if stop:
            interrupt.leave(args, step + 1)

    # save
    log.close()
    if args.keep_best and state["best_loss"] < math.inf:
        common.restore(model, None, common.load_checkpoint(best))
    common.finish(args, accelerator, model, tokenizer)


if __name__ == "__main__":
    with common.user_errors():
        main(parse_args(Args))
