"""dpo.py - direct preference optimization: a policy learns to prefer the chosen of two completions.

Objective   minimise - log sigmoid(beta [(log pi_w - log ref_w) - (log pi_l - log ref_l)]), mean over the
            pairs of the step; w chosen, l rejected, log pi = sum over the completion's tokens;
            Rafailov 2023, arXiv 2305.18290, eq. 7 (DPO).
            Variants: --loss_type ipo, Azar 2023, arXiv 2310.12036; hinge, Liu 2023, arXiv 2309.06657 (RSO's
            form of SLiC-HF, with a reference); --sft_coef, Pang 2024, arXiv 2404.19733, adds the chosen
            completion's mean NLL.
Shapes      B pairs of a micro-batch, 2B rows (all chosen ones, then all rejected ones), T tokens of a row;
            N pairs of the data, V vocabulary, d hidden size; in Policy and TokenLogprobs B are rows and N
            trained tokens. Index t of a (2B, T) tensor is about token t: the shift is in Policy.logprobs.

Differences from the papers
1. ipo divides each log-prob by its completion's length, as its authors confirmed; the paper has sums.
2. --label_smoothing eps gives cDPO's (1 - eps) L + eps L(swapped), for sigmoid alone.
Differences from TRL's DPOTrainer (as there, a run that starts from an adapter refers to a frozen copy of it)
1. Rows beyond max_length lose the prompt's start, the same on both sides, then the completions' ends.
2. Without LoRA, or under FSDP, the reference's log-probs are computed once: two numbers a pair.
3. Dropout is off in the functions of a model too, not in its modules alone.
4. The mean is over the pairs of the whole step, over all processes; a resumed run ends bit-equal.

Metrics, of a step; means over its pairs
loss                            dpo_loss + sft_coef x nll_loss
dpo_loss                        the loss of --loss_type: ln 2 = 0.6931 at the start for sigmoid
nll_loss                        mean NLL a token of the chosen completions
rewards/chosen, rewards/rejected   beta (log pi - log ref) of summed log-probs, for ipo too
rewards/margins, rewards/accuracies   their difference; share of pairs where it is positive; a tie: half
logps/chosen, logps/rejected    summed log-prob of a completion; logps/chosen should not fall far
grad_norm, learning_rate        before clipping; of this update
num_tokens, trained_pairs       tokens so far; pairs of this step
eval/loss and the like          the same on held-out pairs
eval/accuracy                   share of held-out pairs whose prompt's greedy completion ends right

Run   python dpo.py                                                   the small example, CPU, about a minute
      python dpo.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name pairs.jsonl --lora_r 16
      accelerate launch --multi_gpu --num_processes 8 dpo.py --model_name_or_path ... --dataset_name ...
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import common  # first: it quiets the libraries below
from common import EVAL, arg, parse_args, require, say

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn


# ---- arguments ---------------------------------------------------------------------------------------------

@dataclass
class Args(common.Args):
    # data
    format: str | None = arg(None, "prompt_pair, conversation_pair, alpaca_pair or sharegpt_pair")
    max_length: int = arg(1024, "longest row: prompts lose their start, completions their end", above=0)
    # objective
    beta: float = arg(0.1, "strength of the pull towards the reference policy", above=0)
    loss_type: Literal["sigmoid", "ipo", "hinge"] = arg("sigmoid", "the loss of a pair")
    label_smoothing: float = arg(0.0, "share of pairs taken to be mislabelled", "loss_type=sigmoid",
                                 least=0, below=0.5)
    sft_coef: float = arg(0.0, "weight of the chosen NLL: the cure when logps/chosen falls", least=0)
    precompute_ref_log_probs: bool | None = arg(
        None, "compute the reference's log-probs once, before training; default: without LoRA, and in FSDP")
    # optimization
    learning_rate: float | None = arg(None, "peak; default: 1e-6 (all weights), 1e-5 (LoRA)", above=0)
    batch_size: int = arg(32, "pairs of an optimizer step, over all processes", above=0)
    num_train_epochs: float = arg(1.0, "passes over the pairs", least=0)
    # evaluation
    eval_steps: int = arg(50, "steps between evaluations; also at start and end", EVAL, above=0)
    max_completion_length: int = arg(256, "tokens generated where rows have answers; 0: none", EVAL, least=0)

    def resolve(self, lora, sharded):
        self.learning_rate = self.learning_rate or (1e-5 if lora else 1e-6)
        if self.precompute_ref_log_probs is None:
            self.precompute_ref_log_probs = not lora or sharded
        switched = lora and (self.audit or not self.precompute_ref_log_probs)
        require(not (switched and sharded), "under FSDP an adapter cannot be switched off in the middle of a "
                "step: leave out --precompute_ref_log_probs False and --audit")


# ---- loss --------------------------------------------------------------------------------------------------

def dpo_loss(policy_chosen_logprobs, policy_rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs,
             beta, loss_type="sigmoid", label_smoothing=0.0):
    """The loss of each pair (B,) from four sums (B,) over its completions; for ipo, sums over lengths.

    With log-ratios 2 (chosen) and -1 (rejected) and beta 0.1 the margin is 3: sigmoid gives
    - log s(0.3) = 0.5544, hinge 1 - 0.3 = 0.7, ipo (3 - 5)^2 = 4. At policy = reference sigmoid gives ln 2.
    """
    chosen_logratios = policy_chosen_logprobs - ref_chosen_logprobs  # log pi_w - log ref_w
    rejected_logratios = policy_rejected_logprobs - ref_rejected_logprobs
    margins = chosen_logratios - rejected_logratios
    if loss_type == "ipo":  # eq. 17 of Azar 2023
        return (margins - 1 / (2 * beta)).square()
    if loss_type == "hinge":  # RSO's hinge-norm
        return torch.relu(1 - beta * margins)
    right, swapped = -F.logsigmoid(beta * margins), -F.logsigmoid(-beta * margins)  # eq. 7, and its mirror
    return (1 - label_smoothing) * right + label_smoothing * swapped


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


# ---- data --------------------------------------------------------------------------------------------------

def load_pairs(args, tokenizer):
    """-> (training pairs, held-out pairs) of encode_pairs, with `answer` where greedy ones are compared."""
    *parts, _ = common.read_split(args, tokenizer, common.PAIR_FORMATS, common.to_pair,
                                  lambda pair: pair["prompt"], also=["answer"])
    counts = Counter()
    train, held = (common.encode_pairs(part, tokenizer, args.max_length, counts, args.skip_bad_rows)
                   for part in parts)
    for pair in train + held:
        answer = pair.pop("row").get("answer")
        if answer is not None and args.max_completion_length:
            pair["answer"] = common.readable(answer)
    common.say_split(args, train, held, "pair", counts)
    return train, held


FIELDS = ("weight", "ref_sum")  # a number of each row


def groups_of(pairs):
    """Pairs -> [[chosen row, rejected row]]; a row gets its pair's weight in the mean over all of them, and a
    note for the audit page. A process that has no pairs left makes up rows without a weight: they add 0."""
    for pair in pairs:
        for side, row in zip(common.SIDES, pair["rows"]):
            row |= {"weight": 1 / len(pairs), "note": f"{side}, "}
    return [pair["rows"] for pair in pairs]


# ---- evaluation --------------------------------------------------------------------------------------------

def pair_figures(mb, args):
    """The loss of B pairs and what else is logged of them, times their weights in the mean -> {name: (B,)}.

    mb: logprobs and mask (2B, T), ref_sum (the reference's summed log-probs) and weight (2B, 1).
    """
    sums = mb.logprobs.sum(-1).view(2, -1)  # (2, B): chosen, rejected
    ref_sums = mb.ref_sum.view(2, -1)
    lengths = mb.mask.sum(-1).clamp(min=1).view(2, -1)
    scale = lengths if args.loss_type == "ipo" else 1  # ipo takes means, everything else sums
    losses = dpo_loss(*(sums / scale), *(ref_sums / scale),
                      args.beta, args.loss_type, args.label_smoothing)
    nll = -sums[0] / lengths[0]  # mean over the chosen completion's tokens
    chosen, rejected = args.beta * (sums.detach() - ref_sums)
    margins = chosen - rejected
    tie = margins.abs() < 1e-4 * args.beta  # log-ratios differ by rounding alone: half a pair is right
    figures = {"loss": losses + args.sft_coef * nll, "dpo_loss": losses, "nll_loss": nll,
               "rewards/chosen": chosen, "rewards/rejected": rejected,
               "rewards/margins": margins,
               "rewards/accuracies": torch.where(tie, 0.5, (margins > 0).float()),
               "logps/chosen": sums[0], "logps/rejected": sums[1]}
    weight, _ = mb.weight.view(2, -1)
    return {name: x * weight for name, x in figures.items()}


PAGE = ("A pair's loss is not a sum over tokens. Its value at a margin of 0 (ln 2 for sigmoid) belongs to no "
        "token and is listed with the chosen row; the rest goes to the tokens of both rows, in proportion to "
        "what each adds to the margin: integrated gradients on the straight path from the reference. With "
        "--sft_coef c a chosen token also adds c times its - log p, divided by its row's trained tokens. All "
        "is divided by the step's pairs.")


@torch.no_grad()
def pair_shares(mb, args):
    """What each token adds to the step's loss -> share (2B, T) fp64, constants (2B,), mask and columns.

    Of a pair L(0), its constant, and c_t / m (L(m) - L(0)), m = sum_t c_t, c_t = +- (log pi - log ref) of a
    token, over the length for ipo. A chosen token has its part of --sft_coef's NLL too; all is times the
    pair's weight. Log-ratios 2 and 1 (chosen), 0 (rejected) and beta 0.1: L(0) = 0.6931, L(3) = 0.5544,
    shares -0.0925 and -0.0463.
    """
    B, lengths = len(mb.mask) // 2, mb.mask.sum(-1, keepdim=True).clamp(min=1)
    logratios = mb.logprobs.double() - mb.ref_logprobs
    # (2B, 1): the sums that the loss saw. Their rounding, in fp32, is spread over the tokens, or the shares
    # would not add up to the loss.
    given = mb.logprobs.sum(-1, keepdim=True) - mb.ref_sum
    logratios += mb.mask * (given - logratios.sum(-1, keepdim=True)) / lengths
    parts = logratios / (lengths if args.loss_type == "ipo" else 1)  # c_t
    parts[B:] *= -1  # the rejected rows'
    margins = parts.sum(-1).view(2, B).sum(0)  # (B,)
    margins = torch.where(margins.abs() > 1e-6, margins, 1e-6)  # then the quotient below is dL/dm
    ends = torch.stack([margins, torch.zeros_like(margins)])  # of the path, its start second
    # a margin m is that of a chosen log-ratio m and a rejected one 0
    losses, at_zero = dpo_loss(ends, 0, 0, 0, args.beta, args.loss_type, args.label_smoothing)
    shares = parts * ((losses - at_zero) / margins).repeat(2)[:, None]
    shares[:B] -= args.sft_coef * mb.logprobs[:B] / lengths[:B]
    columns = {"logprobs": mb.logprobs, "ref_logprobs": mb.ref_logprobs, "reward": args.beta * logratios}
    return {"share": mb.weight * shares, "mask": mb.mask, "columns": columns,
            "constants": mb.weight[:, 0] * F.pad(at_zero, (0, B))}  # 0 for the rejected rows


@torch.no_grad()
def evaluate(policy, model, pairs, add_reference, run):
    """-> (the figures of held-out pairs and, where they have answers, greedy eval/accuracy; its table)."""
    model.eval()
    sums = common.Sums(run)
    for mb in run.micro_batches(groups_of(pairs), FIELDS):
        add_reference(mb)
        mb.logprobs, _, _ = policy(mb.input_ids, mb.mask)
        sums.add(mb, pair_figures(mb, run.args))
    asked = [pair for pair in pairs if pair.get("answer") is not None]
    accuracy, table = common.answer_greedily(run, model, asked)
    model.train()
    metrics = sums.reduce() | ({"accuracy": accuracy} if asked else {})
    return {f"eval/{name}": value for name, value in metrics.items()}, table


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


def main(args):
    run = common.Run(args, eval_losses=[])  # folder, processes, and what a checkpoint keeps
    precompute = args.precompute_ref_log_probs and not args.audit  # the page needs the reference by token

    # 1. Data: all of it is read, checked and tokenized before a model is loaded.
    train, held = load_pairs(args, run.tokenizer)
    rows = [row for pair in train + held for row in pair["rows"]]  # chosen, rejected, chosen, ...
    run.check_data(rows[:2 * len(train)], held)
    for side, row in zip(common.SIDES, rows):
        common.show_example(run.tokenizer, row["input_ids"], row["mask"], f"first {side}")
    steps_per_epoch, total_steps = common.steps_of(train, args)

    # 2. Policy, reference, optimizer. The reference is the policy here, before a checkpoint is restored.
    model = common.load_model(args, run.tokenizer, run.device)
    if precompute:
        say("reference the policy at the start; its log-probs are computed once")
    else:
        frozen, use_reference = common.make_reference(model, args, run.device)
        reference = Policy(frozen)
    policy, optimizer = run.prepare(Policy(model), make_optimizer(model, args))
    check_head(policy, model, rows[0], run)
    if precompute:  # of the pairs that this run will use, except those that the checkpoint knows
        unknown = torch.full((len(rows) // 2, 2), math.nan)
        known = run.checkpoint["kept"].get("ref_sums") if run.checkpoint else unknown
        require(torch.is_tensor(known) and known.numel() == len(rows),
                "the checkpoint does not hold the reference log-probs of these pairs")
        # the first of epoch 0's order, or all
        used = set(common.shuffled(range(len(train)), 0, total_steps * args.batch_size, args.seed))
        missing = [i for i, sums in enumerate(known) if sums.isnan().any() and (i in used or i >= len(train))]
        run.doing, run.kept["ref_sums"] = f"reference log-probs of {len(missing):,} pairs", known
        with common.unsharded(policy):
            found = missing and run.over_rows(groups_of([(train + held)[i] for i in missing]), lambda mb: [
                policy(mb.input_ids, mb.mask)[0].sum(-1).view(2, -1).T])  # (2B, T) -> (B, 2)
        for i, (sums,) in zip(missing, found):
            known[i] = sums
        for row, ref_sum in zip(rows, known.flatten().tolist(), strict=True):
            row["ref_sum"] = ref_sum
    run.start(total_steps, f"{total_steps} steps of {args.batch_size} pairs ({steps_per_epoch} an epoch)")

    def add_reference(mb):
        """Gives a micro-batch the reference's summed log-probs, where its rows do not bring them along."""
        if not precompute:
            with torch.no_grad(), use_reference(), run.accelerator.autocast():
                mb.ref_logprobs, _, _ = reference(mb.input_ids, mb.mask)  # (2B, T)
            mb.ref_sum = mb.ref_logprobs.sum(-1, keepdim=True)

    def report():
        if held and not args.audit:
            with common.unsharded(policy):
                metrics = run.report(lambda: evaluate(policy, model, held, add_reference, run))
            run.watch_loss(metrics["eval/loss"])
            moved = metrics["eval/rewards/chosen"] / args.beta  # nats a completion, against the reference
            run.warn("chosen", moved < min(-1.0, 0.2 * (metrics["eval/logps/chosen"] - moved)),
                     f"the chosen completions have lost {-moved:.3g} nats, over a fifth of their log-prob: "
                     "the policy leaves them too. Add --sft_coef 1, raise --beta or lower --learning_rate")

    if run.state["unevaluated"]:
        report()
    for step in range(run.step, total_steps):
        # 3. The pairs of this step: they depend on (seed, epoch) and the step alone.
        pairs = common.shuffled(train, step, args.batch_size, args.seed)
        groups = groups_of(pairs)  # the denominator is that of the whole step

        # 4. The gradient, a micro-batch at a time: any cut gives the same.
        sums = common.Sums(run)
        for mb in run.micro_batches(groups, FIELDS, module=policy):  # (2B, T), or (2B, 1): a number a row
            add_reference(mb)  # first: it may switch adapters, and backward runs the policy's layers again
            mb.logprobs, _, _ = policy(mb.input_ids, mb.mask)  # (2B, T), 0 where the mask is 0
            figures = pair_figures(mb, args)
            loss = figures["loss"].sum()
            run.accelerator.backward(loss * run.accelerator.num_processes)  # DDP averages: undo it
            sums.add(mb, figures, page=lambda: pair_shares(mb, args))
        metrics = sums.reduce()  # means over the pairs, of all processes

        # 5. The update.
        norm = run.accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf).item()
        run.check_finite(metrics["loss"], norm, pairs)
        if sums.write_page(metrics["loss"], PAGE):  # --audit: nothing is learned
            return
        learning_rate = learning_rate_at(step, total_steps, args)
        for param_group in optimizer.param_groups:
            param_group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:  # policy and reference are still one: rewards are 0
            say(f"check    first update: dpo_loss {metrics['dpo_loss']:.4f}"
                + (" (ln 2 at the reference)" if args.loss_type == "sigmoid" else "")
                + f", rewards {metrics['rewards/chosen']:.1g} and {metrics['rewards/rejected']:.1g}")
        metrics |= {"grad_norm": norm, "learning_rate": learning_rate, "trained_pairs": len(groups)}
        run.done(metrics, sum(len(row["input_ids"]) for group in groups for row in group),
                 shown=("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"))

        # 6. Every step may be the last one: a run is cut nowhere else.
        if run.due(args.eval_steps):
            report()
        run.save_or_leave()
    run.finish(model)


if __name__ == "__main__":
    with common.user_errors():
        main(parse_args(Args))
