"""reward_model.py - a model learns to score completions, from preferences or from given scores.

Objective   minimise the mean over pairs of - log sigmoid(r_w - r_l - margin), with r_w the score of the
            chosen and r_l of the rejected completion; Ouyang 2022, arXiv 2203.02155, section 3.5.
            Variants: margin, a column of the rows, else 0, Touvron 2023, arXiv 2307.09288, section 3.2.2;
            --center_rewards_coefficient adds that times (r_w + r_l)^2, Eisenstein 2023, arXiv 2312.09244;
            rows with a `score` have the squared error to it, mean over the K named scores and over the rows.
Shapes      N pairs or scored rows of a micro-batch; B rows: N, or of pairs 2N, all chosen ones first; T
            tokens of the longest, K scores (1 for pairs), d hidden size. The mask (B, T) is 1 at each row's
            last token alone: there Scorer makes (B, K) scores of (B, T, d) hidden states.

Differences from the papers
1. One pair is one term; all pairs of a prompt need not share a batch.
Differences from TRL's RewardTrainer
1. The score is read at the last token by its place, whatever side and token the tokenizer pads with. A model
   is saved with a pad token that ends no text, so plain transformers reads there too, which is checked.
2. The head runs in fp32, outside autocast. Beside an adapter it is trained and saved, without a flag for it.
3. Evaluations report the expected calibration error of max(p, 1 - p), p = sigmoid(r_w - r_l).
4. A column `score` (a number, or an object of named numbers) trains a pointwise model with named scores.
5. The model's own dropout, where it has any, stays on.

Metrics
loss                            of a pair with its centring term, or the squared error of a row
accuracy, margin                of pairs: share with r_w > r_l (a tie is wrong), mean of r_w - r_l
score_mean                      mean of the scores
grad_norm, learning_rate        before clipping; of this update
trained_pairs or trained_rows   those of this step: the loss's denominator
num_tokens                      tokens so far, padding not counted
eval/loss, eval/accuracy, eval/margin     the same of held-out pairs or rows
eval/score_mean, eval/score_std           mean and spread of held-out scores, of all names together
eval/calibration_error          of pairs: distance of the confidence max(p, 1 - p) from the share ranked right
eval/correlation/<name>         of given scores: Pearson's r of predicted and given

Run   python reward_model.py                                          the small example, CPU, under a minute
      python reward_model.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name pairs.jsonl --lora_r 16
      accelerate launch --multi_gpu --num_processes 8 reward_model.py --model_name_or_path ... (and so on)
"""

import math
from collections import Counter
from dataclasses import dataclass

import common  # first: it quiets the libraries below
from common import EVAL, NEW, arg, parse_args, require, stream

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn


# ---- arguments ---------------------------------------------------------------------------------------------

@dataclass
class Args(common.Args):
    # model
    lora_dropout: float = arg(0.0, "dropout on the adapters' input", NEW, least=0, below=1)
    # data
    format: str | None = arg(None, "a *_pair format as in dpo.py, or prompt_completion_score")
    max_length: int = arg(1024, "longest row: prompts lose their start, answers their end", above=0)
    # objective
    center_rewards_coefficient: float = arg(0.0, "weight of (r_w + r_l)^2, which centres the scores", least=0)
    # optimization
    learning_rate: float | None = arg(None, "peak; default: 1e-5 (all weights), 1e-4 (LoRA)", above=0)
    batch_size: int = arg(32, "pairs or rows of one optimizer step, over all processes", above=0)
    num_train_epochs: float = arg(1.0, "passes over the data", least=0)
    # evaluation
    eval_steps: int = arg(50, "steps between evaluations; also at start and end", EVAL,
                          above=0)

    def resolve(self, lora, sharded):
        self.learning_rate = self.learning_rate or (1e-4 if lora else 1e-5)


# ---- loss --------------------------------------------------------------------------------------------------

def pairwise_loss(chosen_scores, rejected_scores, margin, center_coef=0.0):
    """- log sigmoid(r_w - r_l - margin) + center_coef (r_w + r_l)^2, all (N,).

    Scores 2 and 1 with margin 0 give -log s(1) = 0.3133; with margin 1, ln 2; center_coef 0.01 adds 0.09.
    """
    losses = -F.logsigmoid(chosen_scores - rejected_scores - margin)
    return losses + center_coef * (chosen_scores + rejected_scores).square()


def pointwise_loss(scores, targets):
    """Squared error, mean over the K named scores: (N, K), (N, K) -> (N,). 1, 2 against 0, 4 give 2.5."""
    return (scores - targets).square().mean(-1)


class Scorer(nn.Module):
    """Token ids in, scores out: trunk and head in the one forward that accelerate wraps, so that gradients
    are synchronised."""

    def __init__(self, model):
        super().__init__()
        self.model, self._no_split_modules = model, model._no_split_modules  # the units that FSDP shards

    def forward(self, input_ids, mask):
        """input_ids (B, T) right-padded, mask (B, T), 1 at each row's last token -> scores (B, K) fp32.

        The mask picks (B, d) of the hidden states (B, T, d), in the order of the rows. If it is 0 everywhere
        there are no scores, (0, K), and yet every parameter takes part. No attention mask: under causal
        attention no real token sees the padding on its right.
        """
        classifier = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        hidden = classifier.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, d)
        last = hidden[mask.nonzero(as_tuple=True)]  # (B, d)
        with torch.autocast(last.device.type, enabled=False):
            return classifier.score(last.float())  # (B, K)


def score_and_loss(scorer, mb, names, args):
    """-> losses (N,) and scores, (N, 2) of pairs (names None), chosen and rejected, or (N, K) of scored rows.
    N is 0 where a process has no rows left: then the gradient is 0."""
    scores = scorer(mb.input_ids, mb.mask)  # (B, K)
    if names:
        return pointwise_loss(scores, targets_of(mb.rows, names).to(scores.device)), scores
    chosen_scores, rejected_scores = scores.view(2, -1)  # all chosen rows come first: (N,) each
    margin = scores.new_tensor([row["margin"] for row in mb.rows]).view(2, -1)[0]  # the same for both sides
    losses = pairwise_loss(chosen_scores, rejected_scores, margin, args.center_rewards_coefficient)
    return losses, torch.stack([chosen_scores, rejected_scores], 1)


def at_last_token(values, mask):
    """One value a row, (B,), and the mask -> (B, T): the value where the row is scored, 0 elsewhere."""
    return torch.zeros_like(mask).masked_scatter(mask.bool(), values)


@torch.no_grad()
def check_scores(scorer, model, rows, run):
    """UserError unless plain transformers gives these rows the same scores, in a padded batch."""
    ids = [row["input_ids"][-100:].tolist() for row in rows]
    ids.append(ids[0][len(ids[0]) // 2:])  # shorter, so that there is padding, and with a real end
    batch = run.tokenizer.pad({"input_ids": ids}, padding_side="right", return_attention_mask=True,
                              return_tensors="pt").to(run.device)
    last = F.one_hot(batch["attention_mask"].sum(1) - 1)  # (B, T)
    model.eval()
    with run.accelerator.autocast():
        ours = scorer(batch["input_ids"], last)
        with common.unsharded(scorer):
            theirs = model(**batch, use_cache=False).logits.float()
    model.train()
    worst = (ours - theirs).abs().max().item()
    require(worst < (0.2 if run.args.bf16 else 1e-3), f"models of type {model.config.model_type} score "
            f"differently in transformers, by {worst:.2g}: not supported")


# ---- data --------------------------------------------------------------------------------------------------

def load_groups(args, tokenizer):
    """-> (training groups, held-out groups, names of the K scores or None for pairs). A group is a pair of
    rows, [chosen, rejected], each with the pair's `margin`, or [one row] with its K `targets`."""
    counts = Counter()

    def convert(row, format, system_prompt):
        to_form = common.to_pair if format in common.PAIR_FORMATS else common.to_scored
        return to_form(row, format, system_prompt)

    def prompt_of(item):
        return item["prompt"] if isinstance(item, dict) else item[0]["messages"]

    *items, formats = common.read_split(args, tokenizer, common.PAIR_FORMATS | common.SCORE_FORMATS, convert,
                                        prompt_of, also=["margin"])
    of_pairs = [format in common.PAIR_FORMATS for format in formats]
    require(len(set(of_pairs)) == 1, "training and evaluation data must both be pairs or both be scored rows")
    if of_pairs[0]:
        names, noun = None, "pair"
        train, held = (encode_pair_rows(part, tokenizer, args, counts) for part in items)
    else:
        require(args.center_rewards_coefficient == 0, "--center_rewards_coefficient is for pairs alone")
        (_, scores), *_ = items[0][0]
        names, noun = sorted(scores), "row"
        train, held = (encode_scored_rows(part, tokenizer, args, counts, names) for part in items)
    common.say_split(args, train, held, noun, counts)
    return train, held, names


def encode_pair_rows(items, tokenizer, args, counts):
    """What to_pair gives -> pairs of rows, [chosen, rejected]."""
    def rows_of(pair):
        return [scored_at_end(row, margin=pair["margin"], place=pair["place"], note=f"{side}, ")
                for row, side in zip(pair["rows"], common.SIDES)]
    pairs = common.encode_pairs(items, tokenizer, args.max_length, counts, args.skip_bad_rows)
    return [rows_of(pair) for pair in pairs]


def encode_scored_rows(items, tokenizer, args, counts, names):
    """What to_scored gives -> groups of one row, its targets in the order of the names."""
    def encode(item, row):
        conversation, scores = item
        require(sorted(scores) == names,
                f"the scores are {sorted(scores)}, those of the first row {names}")
        part = common.upto_answer(common.encode_conversation(tokenizer, conversation["messages"])[-1])
        return [part | {"targets": [scores[name] for name in names]}]
    rows = common.encode_rows(items, encode, args.max_length, counts, args.skip_bad_rows)
    return [[scored_at_end(row, targets=row["targets"], place=row["place"])] for row in rows]


def scored_at_end(row, **fields):
    """The row with `fields`, and mask 1 at its last token alone: where its score is read."""
    mask = torch.zeros_like(row["mask"])
    mask[-1] = 1
    return {"input_ids": row["input_ids"], "mask": mask, **fields}


def targets_of(rows, names):
    """The rows' targets (N, K), also of no rows."""
    return torch.tensor([row["targets"] for row in rows]).view(len(rows), len(names))


# ---- evaluation --------------------------------------------------------------------------------------------

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


def evaluate(scorer, model, held, names, args, run):
    """-> eval/loss, score_mean and score_std; of pairs also accuracy, margin and calibration_error, of scored
    rows a correlation for each name. These need all scores at once: over_rows gathers them."""
    model.eval()
    outputs = run.over_rows(held, lambda mb: score_and_loss(scorer, mb, names, args))
    model.train()
    losses, scores = (torch.stack(values) for values in zip(*outputs))  # (N,) and (N, 2) or (N, K)
    metrics = {"loss": losses.double().mean().item()}
    if not names:
        difference = scores[:, 0] - scores[:, 1]
        metrics |= {"accuracy": (difference > 0).float().mean().item(), "margin": difference.mean().item(),
                    "calibration_error": calibration_error(difference)}
    elif len(held) > 1:
        targets = targets_of([row for [row] in held], names)
        for name, predicted, given in zip(names, scores.T, targets.T):
            r = torch.corrcoef(torch.stack([predicted, given]))[0, 1]
            metrics[f"correlation/{name}"] = r.nan_to_num(0.0).item()  # 0 where one of them is constant
    metrics |= {"score_mean": scores.mean().item(), "score_std": scores.std(correction=0).item()}
    return {f"eval/{name}": value for name, value in metrics.items()}


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


def page_columns(mb, scores, names):
    """What --audit shows at a row's last token: its score, or each named score and the given one."""
    if not names:
        return {"score": at_last_token(scores.T.flatten(), mb.mask)}
    columns = {}
    for name, predicted, given in zip(names, scores.T, targets_of(mb.rows, names).T.to(scores.device)):
        columns[f"score {name}"] = at_last_token(predicted, mb.mask)
        columns[f"given {name}"] = at_last_token(given, mb.mask)
    return columns


PAGE = ("A score is read at the row's last token, so the row's loss is placed there. A pair's loss, centring "
        "included, is split evenly between its rows. All is divided by their number in the step.")


def main(args):
    run = common.Run(args, eval_losses=[])  # folder, processes, and what a checkpoint keeps

    # 1. Data: all of it is read, checked and tokenized before a model is loaded.
    common.use_scoring_pad_token(run.tokenizer)
    train, held, names = load_groups(args, run.tokenizer)
    run.check_data(common.flat(train), common.flat(held))
    for title, row in zip(("first row",) if names else ("first chosen", "first rejected"), train[0]):
        common.show_example(run.tokenizer, row["input_ids"], row["mask"], title, "is scored")
    steps_per_epoch, total_steps = common.steps_of(train, args)

    # 2. Trunk and head, optimizer, and where an earlier run stopped.
    model = common.load_model(args, run.tokenizer, run.device, dropout=True, score_names=names or ["score"])
    scorer, optimizer = run.prepare(Scorer(model), make_optimizer(model, args))
    check_scores(scorer, model, train[0] + train[-1], run)
    noun, sides = ("rows", 1) if names else ("pairs", 2)  # what a group is, and its number of rows
    run.start(total_steps, f"{total_steps} steps of {args.batch_size} {noun} ({steps_per_epoch} an epoch)")

    def report():
        if held and not args.audit:
            with common.unsharded(scorer):
                metrics = run.report(lambda: (evaluate(scorer, model, held, names, args, run), ()))
            run.watch_loss(metrics["eval/loss"])

    if run.state["unevaluated"]:
        report()
    for step in range(run.step, total_steps):
        # 3. The groups of this step: a function of (seed, epoch) and the step. Their number, over all
        # processes, is the denominator: no micro-batch divides by what it happens to hold.
        groups = common.shuffled(train, step, args.batch_size, args.seed)

        # 4. The gradient, a micro-batch at a time: any cut gives the same, but for dropout.
        torch.manual_seed(stream(args.seed, "dropout", step, run.place[0]).initial_seed())
        sums = common.Sums(run)
        for mb in run.micro_batches(groups, module=scorer):  # input_ids and mask (B, T), whole pairs
            losses, scores = score_and_loss(scorer, mb, names, args)  # (N,) and (N, 2) or (N, K)
            # What each token adds to the step's loss, (B, T). It is all at the last one; a pair's is halved.
            # All chosen rows come first, so the losses (N,), repeated, are in the order of the rows.
            share = at_last_token((losses / sides / len(groups)).repeat(sides), mb.mask)
            run.accelerator.backward(share.sum() * run.accelerator.num_processes)  # DDP averages: undo it
            parts = {"loss": share, "score_mean": scores.mean(1) / len(groups)}
            if not names:
                difference = scores[:, 0] - scores[:, 1]
                parts |= {"accuracy": (difference > 0) / len(groups), "margin": difference / len(groups)}
            sums.add(mb, parts, page=lambda: {"share": share, "mask": mb.mask,
                                              "columns": page_columns(mb, scores, names)})
        metrics = sums.reduce()  # over all processes

        # 5. The update.
        norm = run.accelerator.clip_grad_norm_(scorer.parameters(), args.max_grad_norm or math.inf).item()
        run.check_finite(metrics["loss"], norm, common.flat(groups))
        if sums.write_page(metrics["loss"], PAGE):  # --audit: nothing is learned
            return
        for param_group in optimizer.param_groups:
            param_group["lr"] = learning_rate_at(step, total_steps, args)
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {"grad_norm": norm, "learning_rate": param_group["lr"], f"trained_{noun}": len(groups)}
        tokens = sum(len(row["input_ids"]) for group in groups for row in group)
        run.done(metrics, tokens, shown=("loss", "accuracy"))

        # 6. Evaluate, save, or stop.
        if run.due(args.eval_steps):
            report()
        run.save_or_leave()
    run.finish(model)


if __name__ == "__main__":
    with common.user_errors():
        main(parse_args(Args))
