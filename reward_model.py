"""reward_model.py - a model learns to score completions, from preferences or from given scores.

Objective   pairwise:  L = - log sigmoid(r_w - r_l - margin) + center_rewards_coefficient (r_w + r_l)^2, mean
            over the pairs of the step (Bradley-Terry; Ouyang 2022, arXiv 2203.02155, section 3.5; centring:
            Eisenstein 2023, arXiv 2312.09244). The margin (Touvron 2023, arXiv 2307.09288, section 3.2.2) is
            the row's `margin`, 0 where there is none.
            pointwise: L = squared error to the row's `score`, mean over the K named ones and over the rows.
Shapes      B pairs (2B rows, chosen first) or B rows of a micro-batch, N of a data set, T tokens of the
            longest row, K scores (1 for pairs), d hidden size. Scores are fp32: (B, 2) of pairs, chosen and
            rejected, or (B, K).

Differences from the papers
1. One pair is one term; all pairs of a prompt need not share a batch.
Differences from TRL's RewardTrainer
1. The score is read at the last real token, found from the lengths: the tokenizer's padding side and pad
   token do not matter. The model is saved with a pad token that ends no text, so that plain transformers
   reads the same place, and that is checked at the start.
2. The head runs in fp32, outside autocast, and is trained and saved with an adapter without modules_to_save.
3. Evaluations report the expected calibration error of max(p, 1 - p), p = sigmoid(r_w - r_l).
4. A column `score` (a number, or an object of named numbers) trains a pointwise model with named scores.
5. The model's own dropout, where it has any, stays on.

Run   python reward_model.py                                          the small example, CPU, under a minute
      python reward_model.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name pairs.jsonl --lora_r 16
      accelerate launch --multi_gpu --num_processes 8 reward_model.py --model_name_or_path ... (and so on)
"""

import hashlib
import math
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
    eval_fraction: float = HfArg(default=0.05, help="share held out by prompt, at most 200 rows")
    format: str | None = HfArg(default=None, help="a *_pair format as in dpo.py, or prompt_completion_score")
    system_prompt: str | None = HfArg(default=None, help="system message for rows that have none")
    max_length: int = HfArg(default=1024, help="longest row: prompts lose their start, answers their end")
    skip_bad_rows: bool = HfArg(default=False, help="count and skip malformed rows instead of stopping")
    # objective
    center_rewards_coefficient: float = HfArg(default=0.0, help="weight of (r_w + r_l)^2, to centre scores")
    # optimization
    learning_rate: float | None = HfArg(default=None, help="peak; default 1e-5 (all weights), 1e-4 (LoRA)")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = HfArg(default="cosine", help="after warm-up")
    warmup_steps: float = HfArg(default=0.03, help="steps of linear warm-up; below 1: a share of all steps")
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay of matrices (not of norms and biases)")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are scaled down to this norm; 0: off")
    optim: Literal["adamw_torch", "adamw_8bit"] = HfArg(default="adamw_torch", help="8bit needs bitsandbytes")
    batch_size: int = HfArg(default=32, help="pairs or rows of one optimizer step, over all processes")
    micro_batch_tokens: int = HfArg(default=8192, help="padded tokens of a forward pass: limits memory only")
    num_train_epochs: float = HfArg(default=1.0, help="passes over the data")
    max_steps: int = HfArg(default=-1, help="optimizer steps; overrides num_train_epochs if positive")
    seed: int = HfArg(default=0, help="decides the order of the rows, the new head and dropout")
    # evaluation and output
    eval_steps: int = HfArg(default=50, help="steps between evaluations; also at start and end")
    output_dir: str = HfArg(default="out/reward_model", help="where everything goes")
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
                   "save_steps", "save_total_limit", "logging_steps"),
            ("lora_r", "warmup_steps", "weight_decay", "max_grad_norm", "center_rewards_coefficient",
             "num_train_epochs"))
        require(0 <= self.eval_fraction < 1, f"--eval_fraction must lie in [0, 1), not {self.eval_fraction}")
        require(0 <= self.lora_dropout < 1, f"--lora_dropout must lie in [0, 1), not {self.lora_dropout}")
        require(self.max_steps > 0 or self.num_train_epochs > 0,
                "nothing to do: give --max_steps or --num_train_epochs")
        common.check_tracker(self.log_with)


# ---- loss --------------------------------------------------------------------------------------------------

def pairwise_loss(chosen_scores, rejected_scores, margin, center_coef=0.0):
    """- log sigmoid(r_w - r_l - margin) + center_coef (r_w + r_l)^2, all (B,).

    Scores 2 and 1 with margin 0 give -log s(1) = 0.3133; with margin 1, ln 2; center_coef 0.01 adds 0.09.
    """
    losses = -F.logsigmoid(chosen_scores - rejected_scores - margin)
    return losses + center_coef * (chosen_scores + rejected_scores).square()


def pointwise_loss(scores, targets):
    """Squared error, mean over the K named scores: (B, K), (B, K) -> (B,)."""
    return (scores - targets).square().mean(-1)


def calibration_error(differences, bins=10):
    """Expected calibration error of r_w - r_l (N,): confidence max(p, 1 - p) against being ranked right.

    p = sigmoid(r_w - r_l); ties count half. Bins of equal width on [0.5, 1]. If every confidence is 0.8 and 6
    of 10 pairs are right, it is 0.2; with 8 of 10 right, 0. (Guo 2017, arXiv 1706.04599, eq. 3)
    """
    p = torch.sigmoid(differences.double())
    confidence, right = p.maximum(1 - p), (differences > 0).double() + 0.5 * (differences == 0).double()
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    error = 0.0
    for b in bin_of.unique():
        here = bin_of == b
        error += here.sum() / len(p) * (right[here].mean() - confidence[here].mean()).abs()
    return float(error)


class Scorer(nn.Module):
    """The module that accelerate wraps: trunk and head in one forward, so that gradients are synchronised."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # the units that FSDP shards

    def forward(self, input_ids, lengths):
        """input_ids (B, T) right-padded, lengths (B,) -> scores (B, K) fp32, read at each row's last token.

        No attention mask: under causal attention no real token sees the padding on its right.
        """
        classifier = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        hidden = classifier.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, d)
        last = hidden[torch.arange(len(lengths), device=lengths.device), lengths - 1]  # (B, d)
        with torch.autocast(last.device.type, enabled=False):
            return classifier.score(last.float())  # (B, K)


@torch.no_grad()
def check_scores(scorer, model, examples, pad_id, accelerator):
    """Raises UserError unless plain transformers gives the same scores for a padded batch."""
    ids = [e["input_ids"][-100:] for e in examples]
    ids.append(ids[0][len(ids[0]) // 2:])  # shorter, so that there is padding, and with a real end
    input_ids, lengths = collate([{"input_ids": i} for i in ids], pad_id, accelerator.device)
    mask = (torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]).long()
    model.eval()
    with accelerator.autocast():
        ours = scorer(input_ids, lengths)
        with common.unsharded(scorer):
            theirs = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.float()
    model.train()
    worst = (ours - theirs).abs().max().item()
    require(worst < (0.2 if accelerator.mixed_precision == "bf16" else 1e-3), f"models of type "
            f"{model.config.model_type} score differently in transformers, by {worst:.2g}: not supported")


# ---- data --------------------------------------------------------------------------------------------------

def load_examples(args, tokenizer):
    """-> (training examples, evaluation examples, names of the scores or None for pairs).

    A pair is {"rows": [chosen ids, rejected ids], "margin"}; a scored row {"rows": [ids], "targets" (K,)}.
    """
    counts = Counter()

    def read(name):
        items, kind = common.read_items(
            name, args, {**common.PAIR_FORMATS, **common.SCORE_FORMATS},
            lambda row, kind, system: (common.to_pair if kind in common.PAIR_FORMATS
                                       else common.to_scored)(row, kind, system))
        return items, kind in common.PAIR_FORMATS

    items, pairs = read(args.dataset_name)
    if args.eval_dataset_name:
        held, held_pairs = read(args.eval_dataset_name)
        require(pairs == held_pairs, "training and evaluation data must both be pairs or both be scored rows")
        parts = items, held
    else:
        prompts = [common.prompt_key(i["prompt"] if pairs else i[0]["messages"]) for i, _, _ in items]
        parts = common.hold_out(items, prompts, args.eval_fraction)
    names = None if pairs else sorted(items[0][0][1])  # an item is ((conversation, scores), row, place)
    require(pairs or args.center_rewards_coefficient == 0, "--center_rewards_coefficient is for pairs alone")
    train, held = (encode_pair_rows(part, tokenizer, args, counts) if pairs else
                   encode_scored_rows(part, tokenizer, args, counts, names) for part in parts)
    say(f"data     {len(train):,} {'pairs' if pairs else 'rows'} to train on, {len(held):,} to evaluate"
        + "".join(f"; {n:,} {what}" for what, n in counts.items() if n))
    require(train, f"{args.dataset_name}: nothing to train on is left")
    return train, held, names


def encode_pair_rows(items, tokenizer, args, counts):
    """Preference items -> [{"rows": [chosen ids, rejected ids], "margin": float}]."""
    examples = []
    for pair in common.encode_pairs(items, tokenizer, args.max_length, counts, args.skip_bad_rows):
        examples.append({"rows": [pair["chosen_ids"], pair["rejected_ids"]], "margin": pair["margin"]})
    return examples


def encode_scored_rows(items, tokenizer, args, counts, names):
    """Scored items -> [{"rows": [ids], "targets": (K,)}], the scores in the order of their names."""
    examples = []
    for (conversation, scores), _, place in items:
        require(sorted(scores) == names,
                f"{place}: the scores are {sorted(scores)}, those of the first row {names}")
        try:
            parts = common.encode_conversation(tokenizer, conversation["messages"])
        except ValueError as error:
            require(args.skip_bad_rows, f"{place}: {error}; mend it or add --skip_bad_rows")
            counts["skipped in tokenizing"] += 1
            continue
        ids, mask = common.upto_answer(parts[-1])
        cut, _ = common.truncate(ids, mask, args.max_length)
        counts["cut to max_length"] += len(cut) < len(ids)
        examples.append({"rows": [torch.tensor(cut, dtype=torch.int32)],
                         "targets": torch.tensor([scores[name] for name in names])})
    return examples


def flat_rows(examples):
    """Examples -> their rows: all first ones (chosen), then all second ones (rejected)."""
    return [{"input_ids": e["rows"][side]} for side in range(len(examples[0]["rows"])) for e in examples]


def example_lengths(examples):
    """The padded tokens of an example in a micro-batch: its rows, each as long as its longest."""
    return [len(e["rows"]) * max(map(len, e["rows"])) for e in examples]


def collate(rows, pad_id, device):
    """Rows -> input_ids (B, T) right-padded, lengths (B,)."""
    lengths = torch.tensor([len(r["input_ids"]) for r in rows])
    return common.pad([r["input_ids"] for r in rows], pad_id).to(device), lengths.to(device)


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

def losses_of(scorer, examples, args, pad_id, device):
    """-> (losses (B,), scores (B, 2) of pairs, chosen and rejected, or (B, K) of scored rows)."""
    flat = scorer(*collate(flat_rows(examples), pad_id, device))  # (2B, 1) or (B, K)
    if "targets" in examples[0]:
        return pointwise_loss(flat, torch.stack([e["targets"] for e in examples]).to(device)), flat
    chosen_scores, rejected_scores = flat.view(2, -1)
    margin = torch.tensor([e["margin"] for e in examples], device=device)
    losses = pairwise_loss(chosen_scores, rejected_scores, margin, args.center_rewards_coefficient)
    return losses, torch.stack([chosen_scores, rejected_scores], 1)


@torch.no_grad()
def evaluate(scorer, model, examples, names, args, accelerator, pad_id):
    """-> eval/loss, score_mean and score_std; of pairs also accuracy (a tie is wrong), margin and
    calibration_error, of scored rows a correlation for each name."""
    mine = []
    model.eval()
    for batch in micro_batches(example_lengths(examples), args.micro_batch_tokens, accelerator.process_index,
                               accelerator.num_processes):
        if batch:
            part = [examples[i] for i in batch]
            losses, scores = losses_of(scorer, part, args, pad_id, accelerator.device)
            mine += zip(batch, losses.tolist(), scores.cpu())
    model.train()
    _, losses, scores = zip(*sorted(gather_object(mine), key=lambda item: item[0]))
    scores, metrics = torch.stack(scores), {"eval/loss": sum(losses) / len(losses)}  # (N, 2) or (N, K)
    if names:
        targets = torch.stack([e["targets"] for e in examples])
        for k, name in enumerate(names):
            if len(targets) > 1:
                r = torch.corrcoef(torch.stack([scores[:, k], targets[:, k]]))[0, 1].nan_to_num(0.0)
                metrics[f"eval/correlation/{name}"] = r.item()
    else:
        difference = scores[:, 0] - scores[:, 1]
        metrics |= {"eval/accuracy": (difference > 0).float().mean().item(),
                    "eval/margin": difference.mean().item(),
                    "eval/calibration_error": calibration_error(difference)}
    return metrics | {"eval/score_mean": scores.mean().item(),
                      "eval/score_std": scores.std(correction=0).item()}


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
        args.learning_rate = 1e-4 if common.trains_adapter(args) else 1e-5
    checkpoint = common.open_run(args)

    # data: all of it is read, checked and tokenized before the model is loaded
    tokenizer = common.load_tokenizer(args)
    pad_id = common.use_scoring_pad_token(tokenizer)
    train, held, names = load_examples(args, tokenizer)
    data = common.check_data(checkpoint, common.fingerprint(train))
    for title, row in zip(("first row",) if names else ("first chosen", "first rejected"), train[0]["rows"]):
        common.show_example(tokenizer, row, [0] * len(row), title)
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    total_steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)

    # model, optimizer, and where an earlier run stopped
    model = common.load_model(args, tokenizer, accelerator.device, dropout=True,
                              score_names=names or ["score"])
    optimizer = make_optimizer(model, args)
    scorer, optimizer = common.prepare(accelerator, Scorer(model), optimizer)
    check_scores(scorer, model, flat_rows(train[:1]) + flat_rows(train[-1:]), pad_id, accelerator)
    state = {"step": 0, "num_tokens": 0, "eval_losses": [], "data": data}
    if checkpoint:
        common.check_cut(model, checkpoint, args)
        common.restore(model, optimizer, checkpoint)
        state = {name: checkpoint[1][name] for name in state}
    log = common.RunLog(accelerator, args, total_steps, state["step"])
    audit = common.Audit(accelerator, args, tokenizer, state["step"], total_steps)
    interrupt = common.Interrupt()
    say(f"train    {total_steps} steps of {args.batch_size} {'rows' if names else 'pairs'} "
        f"({steps_per_epoch} an epoch), learning rate {args.learning_rate:g} ({args.lr_scheduler_type}), "
        f"{accelerator.num_processes} process(es) on {accelerator.device}")

    def report():
        """Evaluates, prints and logs."""
        if held and not args.audit:
            with common.unsharded(scorer):
                metrics = evaluate(scorer, model, held, names, args, accelerator, pad_id)
            log.metrics(state["step"], metrics)
            figures = "  ".join(f"{k[5:]} {v:.4f}" for k, v in metrics.items())
            say(f"eval     step {state['step']}: {figures}")
            state["eval_losses"] = common.watch_loss(state["eval_losses"], metrics["eval/loss"], "")

    if state["step"] == 0:
        report()
    for step in range(state["step"], total_steps):
        # the examples of this step: a function of (seed, epoch) and the step
        epoch, at = divmod(step, steps_per_epoch)
        order = torch.randperm(len(train), generator=stream(args.seed, "order", epoch)).tolist()
        rows_of_step = order[at * args.batch_size:(at + 1) * args.batch_size]
        examples = [train[i] for i in rows_of_step]
        trained = len(examples)  # the denominator of the whole step, over all processes
        batches = micro_batches(example_lengths(examples), args.micro_batch_tokens, accelerator.process_index,
                                accelerator.num_processes)

        torch.manual_seed(stream(args.seed, "dropout", step, accelerator.process_index).initial_seed())
        totals = torch.zeros(5, device=accelerator.device)  # loss, accuracy, margin, score; stop signal
        totals[4] = interrupt.signal
        for i, batch in enumerate(batches):
            part = [examples[j] for j in batch] or examples[:1]
            weight = float(bool(batch))  # a process without rows runs a pass of weight 0
            with accelerator.no_sync(scorer) if i < len(batches) - 1 else nullcontext():
                losses, scores = losses_of(scorer, part, args, pad_id, accelerator.device)
                # DDP averages over the processes: undo its division
                accelerator.backward(weight * losses.sum() * accelerator.num_processes / trained)
            scores = scores.detach()  # (B, 2) or (B, K)
            if audit.due(step):
                rows = flat_rows(part)
                _, lengths = collate(rows, pad_id, accelerator.device)
                end = F.one_hot(lengths - 2)  # (2B or B, T-1), 1 at the last token, where the score is read
                shares = (losses * len(part) / len(rows) / trained).repeat(len(rows) // len(part))
                columns = {"score": scores.T.reshape(-1, 1)} if not names else {
                    f"{what} {name}": x[:, None] for k, name in enumerate(names) for what, x in (
                        ("score", scores[:, k]), ("given", torch.stack([e["targets"] for e in part])[:, k]))}
                audit.add([*batch] * (len(rows) // len(part)), [r["input_ids"] for r in rows], end,
                          end * shares[:, None], columns, None if names else
                          ["chosen, "] * len(part) + ["rejected, "] * len(part))
            difference = scores.new_zeros(1) if names else scores[:, 0] - scores[:, 1]
            totals[:4] += weight * torch.stack([losses.detach().sum(), (difference > 0).sum(),
                                                difference.sum(), scores.mean(1).sum()])
        grad_norm = accelerator.clip_grad_norm_(scorer.parameters(), args.max_grad_norm or math.inf).item()
        *figures, stop = accelerator.reduce(totals, "sum").tolist()
        loss, accuracy, mean_difference, score_mean = (x / trained for x in figures)
        require(math.isfinite(loss) and math.isfinite(grad_norm),
                f"step {step + 1}: the loss is {loss} and its gradient's norm {grad_norm}, on rows "
                f"{rows_of_step[:8]} ... of the training data; this update was not made, and the checkpoints "
                "are whole. Try a lower --learning_rate")
        if audit.due(step):
            return audit.write(loss, "A score is read at the row's last token, so the row's loss is placed "
                               "there. A pair's loss, centring included, is split evenly between its rows.")
        learning_rate = learning_rate_at(step, total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()

        tokens = sum(len(row) for e in examples for row in e["rows"])
        state["step"], state["num_tokens"] = step + 1, state["num_tokens"] + tokens
        metrics = {"loss": loss, "score_mean": score_mean, "grad_norm": grad_norm,
                   "learning_rate": learning_rate, "num_tokens": state["num_tokens"],
                   "trained_rows" if names else "trained_pairs": trained}
        metrics |= {} if names else {"accuracy": accuracy, "margin": mean_difference}
        log.metrics(step + 1, metrics)
        log.progress(step + 1, tokens, {"loss": loss} if names else {"loss": loss, "accuracy": accuracy})
        if (step + 1) % args.eval_steps == 0 or step + 1 == total_steps:
            report()
        if (step + 1) % args.save_steps == 0 or step + 1 == total_steps or stop:
            common.save_checkpoint(accelerator, args, state, model, optimizer)
        if stop:
            interrupt.leave(args, step + 1)

    log.close()
    common.finish(args, accelerator, model, tokenizer)


if __name__ == "__main__":
    with common.user_errors():
        main(parse_args(Args))
