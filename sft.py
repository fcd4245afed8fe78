"""sft.py - supervised fine-tuning: a language model imitates the completions of a dataset.

Objective   minimise L = - sum_t mask_t log p(x_t | x_<t) / trained_tokens,
            over all rows of the step and all processes.
            Variants: --adversarial fgm, L(E) + L(E + r) with r = epsilon mean_t ||E_t|| g / ||g||, g = dL/dE,
            Miyato 2017, arXiv 1605.07725 (FGM); --adversarial neftune, L(E + noise), Jain 2023, arXiv
            2310.05914 (NEFTune): E are a row's input embeddings.
Shapes      B rows of a micro-batch, T tokens of the longest, N of all of them trained; V vocabulary, d hidden
            size. Index t of a (B, T) tensor is about token t: the causal shift is in Policy.logprobs alone.

Differences from the papers and the usual recipe
1. The mean is over the tokens of the whole step: how it is cut into micro-batches changes dropout alone.
2. Rows are sorted by length inside a step, not packed: hardly any padding, and no attention between rows.
3. The (B, T, V) logits never exist: head and log-softmax run over chunks of the trained tokens.
4. FGM's embeddings are not normalised: epsilon is relative to their mean norm in the row.
Differences from TRL's SFTTrainer
1. Completions alone are trained on, for any chat template, in conversations too; of plain text all is.
2. Under LoRA the frozen base is in bf16 where autocast is (TRL: fp32); what is trained is always fp32.
3. batch_size counts the rows of a step over all processes; micro_batch_tokens is what fits into memory.
4. Exact duplicates are dropped, and a resumed run ends bit-equal to one that was never stopped.
5. NEFTune's noise is on real tokens only and scaled by their number, not by the padded length.

Metrics, of a step or, with eval/, of the held-out rows
loss                            nats a trained token; with fgm of the clean pass, with neftune under noise
adversarial_loss                with --adversarial fgm: the loss under attack
token_accuracy                  share of trained tokens that were the most likely one, in the same pass
grad_norm, learning_rate        before clipping, with fgm of the sum of both losses; of this update
num_tokens, trained_tokens      tokens so far, without padding; trained ones of the step: its denominator
eval/loss, eval/token_accuracy  the same, never perturbed
eval/accuracy                   share of held-out prompts whose greedy completion ends with the right answer
eval/loss_under_attack          with --adversarial: under attack (fgm), or under noise that is always the same

Run   python sft.py                                                   the small example, CPU, minutes
      python sft.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name my.jsonl --load_in_4bit --lora_r 16
      accelerate launch --multi_gpu --num_processes 8 sft.py --model_name_or_path ... --dataset_name ...
"""

import math
import os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import common  # first: it quiets the libraries below
from common import EVAL, NEW, arg, parse_args, require, say, stream

import torch
from peft import PeftModel
from torch import nn


# ---- arguments ---------------------------------------------------------------------------------------------

@dataclass
class Args(common.Args):
    # model
    lora_dropout: float = arg(0.0, "dropout on the input of the adapters", NEW, least=0, below=1)
    # data
    format: str | None = arg(
        None, "messages, conversations, prompt_completion, alpaca, question_answer or text")
    max_length: int = arg(2048, "longest row: prompts lose their start, answers their end", above=0)
    completion_only_loss: bool = arg(True, "train on completions alone; False: on prompts too",
                                     aliases=["--assistant_only_loss"])
    # optimization
    learning_rate: float | None = arg(None, "peak; default: 2e-5 (all weights), 2e-4 (LoRA)", above=0)
    batch_size: int = arg(64, "rows of an optimizer step, over all processes", above=0)
    num_train_epochs: float = arg(2.0, "passes over the data", least=0)
    freeze_layers: float = arg(0.0, "share of the blocks, the lowest, that is frozen, with an "
                               "untied embedding", "no lora_r or adapter", least=0, below=1)
    adversarial: Literal["fgm", "neftune"] | None = arg(
        None, "perturb the embeddings; fgm: add the loss under attack (twice the time), neftune: noise")
    adversarial_epsilon: float = arg(0.1, "fgm: a row's attack, in mean norms of its embeddings",
                                     "adversarial=fgm", above=0)
    neftune_noise_alpha: float = arg(5.0, "neftune: norm of a row's noise x 1.7 (paper: 5 to 15)",
                                     "adversarial=neftune", above=0)
    # evaluation
    eval_steps: int = arg(100, "steps between evaluations; also at the start and the end", EVAL, above=0)
    max_completion_length: int = arg(256, "tokens of a greedy answer in evaluation; 0: none", EVAL, least=0)
    keep_best: bool = arg(False, "save the weights with the lowest eval/loss, not the last ones")

    def resolve(self, lora, sharded):
        self.learning_rate = self.learning_rate or (2e-4 if lora else 2e-5)


# ---- loss --------------------------------------------------------------------------------------------------

def sft_loss(logprobs, mask):
    """Negative log-likelihood of each trained token; the caller sums and divides by trained_tokens.

    logprobs (B, T) fp32, mask (B, T) with 1 = trained -> (B, T), 0 where the mask is 0.
    With log-probs 0, -0.5, -1.0, -2.0 and mask 0, 1, 0, 1 it is 0, 0.5, 0, 2.0: a mean of 1.25 over 2 tokens.
    """
    return -torch.where(mask.bool(), logprobs, 0.0)  # L_t = - mask_t log p(x_t | x_<t)


def fgm_delta(grad, embeddings, real, epsilon):
    """FGM (Miyato 2017, arXiv 1605.07725): the perturbation of a given norm that raises each row's loss most,
    to first order.

    r = epsilon mean_t ||E_t|| g / ||g||,  g = d loss / dE:  ||g|| over the whole row, the mean over its real
    tokens, and r = 0 where g = 0. grad, embeddings (B, T, d), real (B, T) with 1 = no padding -> (B, T, d).
    With E = (3, 4), (0, 1), whose mean norm is 3, g = (0, 3), (4, 0) of norm 5 and epsilon 0.5 it is 0.3 g.
    """
    g = grad.float() * real[..., None]
    norm = torch.linalg.vector_norm(g, dim=(1, 2))  # (B,)
    size = (embeddings.float().norm(dim=-1) * real).sum(-1) / real.sum(-1).clamp(min=1)  # (B,)
    return g * (epsilon * size / norm.where(norm > 0, 1.0))[:, None, None]


def neftune_delta(noise, real, alpha):
    """NEFTune (Jain 2023, arXiv 2310.05914): alpha / sqrt(L d) U(-1, 1), L real tokens in the row.

    noise (B, T, d) in (-1, 1), real (B, T) with 1 = no padding -> (B, T, d), 0 on padding.
    With alpha 5 and a row of L = 2 tokens and d = 2 numbers each it is 2.5 times the noise.
    """
    scale = alpha / (real.sum(-1).clamp(min=1) * noise.shape[-1]).sqrt()  # (B,)
    return noise * real[..., None] * scale[:, None, None]


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


def real_tokens(mb):
    """(B, T), 1 = a token of a row and no padding; mb.mask says instead which ones are trained."""
    real = torch.zeros_like(mb.mask)
    for b, row in enumerate(mb.rows):
        real[b, :len(row["input_ids"])] = 1
    return real


def starting_delta(model, mb, args, key):
    """What --adversarial adds to a micro-batch's embeddings in the first pass: (B, T, d), or None without it.

    fgm: zeros, whose gradient is d loss / dE. neftune: noise drawn from (seed, key, place of the row), so
    that neither the cut nor the number of processes changes it.
    """
    if args.adversarial is None:
        return None
    delta = torch.zeros(*mb.mask.shape, model.get_input_embeddings().weight.shape[1])
    if args.adversarial == "fgm":
        return delta.to(mb.mask.device).requires_grad_()
    for noise, row, place in zip(delta, mb.rows, mb.places):
        n = len(row["input_ids"])
        noise[:n] = torch.rand(n, len(noise[0]), generator=stream(args.seed, "neftune", key, place)) * 2 - 1
    return neftune_delta(delta.to(mb.mask.device), real_tokens(mb), args.neftune_noise_alpha)


def forward(policy, model, mb, delta):
    """The policy with its input embeddings E (B, T, d) moved to E + delta; None leaves them.
    -> logprobs, hits (B, T), E.

    The weight is not touched: it may be frozen, under LoRA, and is the output head's too where they are tied.
    """
    seen = None

    def add(layer, inputs, embeddings):
        nonlocal seen
        seen = embeddings.detach()
        return embeddings + delta.to(embeddings.dtype)
    perturbed = nullcontext() if delta is None else model.get_input_embeddings().register_forward_hook(add)
    with perturbed:  # leaving it removes the hook
        logprobs, _, hits = policy(mb.input_ids, mb.mask)
    return logprobs, hits, seen


# ---- data --------------------------------------------------------------------------------------------------

def load_rows(args, tokenizer):
    """-> (training rows, held-out rows). A held-out row with an answer keeps it and its prompt_ids, once a
    conversation, for the greedy evaluation."""
    def encode(conversation, row):
        return common.encode_sft(tokenizer, conversation, args.completion_only_loss)

    def encode_held(conversation, row):
        parts, answer = encode(conversation, row), row.get("answer")
        if args.max_completion_length and "messages" in conversation and answer is not None:
            prompt_ids = common.encode_prompt(tokenizer, conversation["messages"][:-1], args.max_length)
            parts[-1] |= {"prompt_ids": prompt_ids, "answer": common.readable(answer),
                          "prompt": conversation["messages"][-2:][0]["content"]}
        return parts

    counts = Counter()
    train, held, _ = common.read_split(
        args, tokenizer, common.SFT_FORMATS, common.to_conversation,
        lambda row: row.get("messages") or [common.turn("user", row["text"])], counts, also=["answer"])
    train = common.encode_rows(train, encode, args.max_length, counts, args.skip_bad_rows)
    held = common.encode_rows(held, encode_held, args.max_length, counts, args.skip_bad_rows)
    require(held or not args.keep_best, "--keep_best needs evaluation data: --eval_dataset_name, "
            "or an --eval_fraction that holds out a row")
    common.say_split(args, train, held, "example", counts)
    return train, held


# ---- evaluation --------------------------------------------------------------------------------------------

def evaluate(policy, model, held, args, run):
    """-> (metrics, table) of the held-out rows: loss and token accuracy; with --adversarial the loss over the
    same tokens under attack; exact match of greedy answers, where rows have them."""
    def figures(mb):
        logprobs, hits, _ = forward(policy, model, mb, None)
        clean, delta = sft_loss(logprobs, mb.mask), starting_delta(model, mb, args, "eval")
        if args.adversarial == "fgm":
            with torch.enable_grad(), run.accelerator.no_sync(policy):
                logprobs, _, embeddings = forward(policy, model, mb, delta)
                gradient, = torch.autograd.grad(sft_loss(logprobs, mb.mask).sum(), delta)
            delta = fgm_delta(gradient, embeddings, real_tokens(mb), args.adversarial_epsilon)
        if args.adversarial:
            logprobs, _, _ = forward(policy, model, mb, delta)
        return [x.sum(-1) for x in (clean, sft_loss(logprobs, mb.mask), hits, mb.mask)]  # (B,) each

    model.eval()
    # evaluation mode has no checkpointing: with a backward pass only one row at a time is sure to fit
    one_row = 1 if args.adversarial == "fgm" and args.gradient_checkpointing else None
    sums = torch.tensor(run.over_rows(held, figures, micro_batch_tokens=one_row))  # (rows, 4)
    clean, attacked, hits, tokens = sums.double().sum(0).tolist()
    asked = [row for row in held if row.get("answer") is not None]
    with common.unsharded(policy):
        accuracy, table = common.answer_greedily(run, model, asked)
    model.train()
    metrics = {"eval/loss": clean / tokens, "eval/token_accuracy": hits / tokens}
    metrics |= {"eval/accuracy": accuracy} if asked else {}
    metrics |= {"eval/loss_under_attack": attacked / tokens} if args.adversarial else {}
    return metrics, table


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


def freeze_lowest(model, share):
    """Freezes that share of the transformer blocks, at least one, and the input embedding unless it is the
    output head too: a tied one is trained, as the head is."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = (m for m in model.base_model.modules() if isinstance(m, nn.ModuleList))
    blocks = next((m for m in lists if len(m) == depth), None)
    require(blocks, f"--freeze_layers: no list of blocks was found in a {model.config.model_type} model")
    count = max(1, int(round(share * len(blocks), 6)))  # 0.7 * 90 < 63
    frozen, embedding = list(blocks[:count]), model.get_input_embeddings()
    tied = embedding.weight is model.get_output_embeddings().weight
    for module in frozen + [embedding] * (not tied):
        module.requires_grad_(False)
    say(f"freeze   the lowest {len(frozen)} of {len(blocks)} blocks"
        + (", not the embedding, which is the output head too" if tied else " and the embedding")
        + f": {sum(p.numel() for p in model.parameters() if p.requires_grad):,} weights are trained")


PAGE = {None: ".", "neftune": ", under noise.",
        "fgm": "; this is the clean pass, and not the one under attack."}


def main(args):
    run = common.Run(args, best_loss=math.inf, eval_losses=[])  # folder, processes; what a checkpoint keeps
    (process, processes), fgm = run.place, args.adversarial == "fgm"

    # 1. Data: all of it is read, checked and tokenized before the model is loaded.
    train, held = load_rows(args, run.tokenizer)
    run.check_data(train, held)
    common.show_example(run.tokenizer, train[0]["input_ids"], train[0]["mask"])
    steps_per_epoch, total_steps = common.steps_of(train, args)

    # 2. Model, optimizer, and where an earlier run stopped.
    model = common.load_model(args, run.tokenizer, run.device, dropout=True)
    if args.freeze_layers:
        freeze_lowest(model, args.freeze_layers)
    policy, optimizer = run.prepare(Policy(model), make_optimizer(model, args))
    check_head(policy, model, train[0], run)
    run.start(total_steps, f"{total_steps} steps of {args.batch_size} rows ({steps_per_epoch} an epoch)")
    best = os.path.join(args.output_dir, "checkpoints", "best")
    if not run.from_first(lambda: os.path.isdir(best)):  # a fresh run, or one resumed into another output_dir
        if run.state["best_loss"] < math.inf:
            say("resume   --keep_best begins anew: the earlier run's best weights are in its own output_dir")
        run.state["best_loss"] = math.inf

    def report():
        """Evaluates, and keeps the weights if they are the best so far."""
        if not held or args.audit:
            return
        metrics = run.report(lambda: evaluate(policy, model, held, args, run))
        run.watch_loss(metrics["eval/loss"], "--keep_best, " * (not args.keep_best))
        if args.keep_best and metrics["eval/loss"] < run.state["best_loss"]:
            run.state["best_loss"] = metrics["eval/loss"]
            run.save("best")

    if run.state["unevaluated"]:
        report()
    while run.step < total_steps:
        # 3. The rows of this step, a function of (seed, step), and the denominator of the whole step.
        rows = common.shuffled(train, run.step, args.batch_size, args.seed)  # of all processes
        trained_tokens = sum(row["trained"] for row in rows)
        torch.manual_seed(stream(args.seed, "dropout", run.step, process).initial_seed())

        # 4. The gradient, a micro-batch at a time: any cut gives the same, but for dropout.
        sums = common.Sums(run)
        for mb in run.micro_batches(rows, module=policy):  # tensors (B, T)
            delta = starting_delta(model, mb, args, run.step)  # (B, T, d), or None
            # DDP synchronises the step's last backward alone: with fgm the second of the last micro-batch
            with run.accelerator.no_sync(policy) if fgm and mb.last else nullcontext():
                mb.logprobs, hits, embeddings = forward(policy, model, mb, delta)
                mb.loss = sft_loss(mb.logprobs, mb.mask)  # set on mb: the audit page shows what is there
                share = mb.loss / trained_tokens  # what each token adds to the step's loss
                run.accelerator.backward(share.sum() * processes)  # DDP averages: undo it
            parts = {"loss": share}
            if fgm:  # once more on E + r: both gradients add up
                delta = fgm_delta(delta.grad, embeddings, real_tokens(mb), args.adversarial_epsilon)
                logprobs, _, _ = forward(policy, model, mb, delta)
                parts["adversarial_loss"] = sft_loss(logprobs, mb.mask) / trained_tokens
                run.accelerator.backward(parts["adversarial_loss"].sum() * processes)
            sums.add(mb, parts, {"token_accuracy": hits})
        metrics = sums.reduce()  # the losses, and means over the trained tokens, of all processes

        # 5. The update.
        norm = run.accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf).item()
        run.check_finite(metrics["loss"], norm, rows)
        if sums.write_page(metrics["loss"], "A token's share is its - log p, divided by the step's "
                           f"{trained_tokens} trained tokens{PAGE[args.adversarial]}"):
            return  # --audit: nothing is learned
        learning_rate = learning_rate_at(run.step, total_steps, args)
        for param_group in optimizer.param_groups:
            param_group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        run.done(metrics | {"grad_norm": norm, "learning_rate": learning_rate},
                 sum(len(row["input_ids"]) for row in rows), shown=("loss", "token_accuracy"))

        # 6. Evaluate, save, or stop after Ctrl-C.
        if run.due(args.eval_steps):
            report()
        run.save_or_leave()
    if args.keep_best and run.state["best_loss"] < math.inf:
        common.restore(run.module, None, run.load_best())
        say(f"best     the weights of the evaluation with loss {run.state['best_loss']:.4f} are saved")
    run.finish(model)


if __name__ == "__main__":
    with common.user_errors():
        main(parse_args(Args))
