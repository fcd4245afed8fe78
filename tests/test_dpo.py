"""dpo.py: losses by hand, ln 2 at the start for every kind of reference, log-probs against plain transformers."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, RecordGradients, run, tiny_model
from torch import tensor

import common
import dpo
import sft

LN2 = math.log(2)
CHECKPOINT = os.path.join(TINY, "sft")


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def figures(w, l, ref_w, ref_l, **flags):
    """pair_figures of completions of one token each: log-probs (N,) of policy and reference, weight 1."""
    both = torch.cat([w, l])[:, None]
    mb = SimpleNamespace(logprobs=both, ref_sum=torch.cat([ref_w, ref_l])[:, None], mask=torch.ones_like(both),
                         weight=torch.ones_like(both))
    return dpo.pair_figures(mb, SimpleNamespace(**{"loss_type": "sigmoid", "label_smoothing": 0.0, "sft_coef": 0.0, **flags}))


def test_losses_by_hand():
    """Log-ratios 2 and -1 (margin 3), and 0 and 0, beta 0.1."""
    four = tensor([-3.0, -5.0]), tensor([-7.0, -2.0]), tensor([-5.0, -5.0]), tensor([-6.0, -2.0])
    losses = dpo.dpo_loss(*four, beta=0.1)
    seen = figures(*four, beta=0.1)
    close(losses, tensor([math.log(1 + math.exp(-0.3)), LN2])), close(seen["loss"], losses)
    close(seen["rewards/chosen"], tensor([0.2, 0.0])), close(seen["rewards/rejected"], tensor([-0.1, 0.0]))
    close(dpo.dpo_loss(*four, beta=0.1, loss_type="ipo"), tensor([4.0, 25.0]))
    close(dpo.dpo_loss(*four, beta=0.1, loss_type="hinge"), tensor([0.7, 1.0]))
    smooth = dpo.dpo_loss(*four, beta=0.1, label_smoothing=0.2)
    close(smooth, tensor([0.8 * math.log(1 + math.exp(-0.3)) + 0.2 * math.log(1 + math.exp(0.3)), LN2]))


def test_the_arguments_reach_the_loss():
    """pair_figures gives dpo_loss all of --beta, --loss_type and --label_smoothing; the rewards are beta x log-ratios of sums."""
    four = tensor([-3.0, -5.0]), tensor([-7.0, -2.0]), tensor([-5.0, -5.0]), tensor([-6.0, -2.0])
    for flags in ({"loss_type": "ipo"}, {"loss_type": "hinge"}, {"label_smoothing": 0.2}):
        seen = figures(*four, beta=0.3, sft_coef=0.5, **flags)
        close(seen["dpo_loss"], dpo.dpo_loss(*four, beta=0.3, **flags)), close(seen["nll_loss"], -four[0])
        close(seen["loss"], seen["dpo_loss"] + 0.5 * seen["nll_loss"]), close(seen["rewards/margins"], tensor([0.9, 0.0]))


def test_a_tie_is_half_right():
    """At the start all margins are 0, or what rounding makes of it; this is no 25 % accuracy."""
    chosen = tensor([-3.0, -3.0 + 1e-5, -3.0, -2.0])
    seen = figures(chosen, tensor([-7.0, -7.0, -7.0 + 1e-5, -7.0]), tensor([-3.0] * 4), tensor([-7.0] * 4), beta=0.1)
    assert seen["rewards/accuracies"].tolist() == [0.5, 0.5, 0.5, 1.0]
    small = figures(tensor([-3.0, -3.1]), tensor([-7.0] * 2), tensor([-3.0, -3.11]), tensor([-7.0] * 2), beta=1e-3)
    assert small["rewards/accuracies"].tolist() == [0.5, 1.0]  # a small --beta makes no tie of what is none


def test_the_reference_is_asked_only_for_pairs_that_are_used(tmp_path, monkeypatch):
    """2 or 3 steps of 4 pairs and the held-out ones; a resumed run finds them in its checkpoint."""
    scored, over_rows = [], common.Run.over_rows
    monkeypatch.setattr(common.Run, "over_rows", lambda self, groups, *a: scored.append(len(groups)) or over_rows(self, groups, *a))
    flags = ["--batch_size", 4, "--eval_fraction", 0.05, "--max_completion_length", 0, "--save_steps", 1]
    run(dpo, tmp_path / "two", *flags, "--max_steps", 2)
    run(dpo, tmp_path / "two", *flags, "--max_steps", 2, "--resume_from_checkpoint", "latest")
    three = run(dpo, tmp_path / "three", *flags, "--max_steps", 3)
    held = scored[0] - 8
    assert 0 < held and scored == [8 + held, 12 + held]
    assert all(math.isfinite(line["loss"]) for line in three if "loss" in line)


def test_only_ipo_divides_by_lengths():
    """Completions of 2 and 4 tokens, log-ratios 2 and -4 in sum, 1 and -1 in mean; weight 1/4."""
    mask = tensor([[0.0, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    mb = SimpleNamespace(logprobs=-mask, mask=mask, ref_sum=tensor([[-4.0], [0.0]]), weight=tensor([[0.25], [0.25]]))
    for loss_type, loss in ("ipo", (2 - 5) ** 2), ("hinge", 1 - 0.6), ("sigmoid", math.log(1 + math.exp(-0.6))):
        args = SimpleNamespace(beta=0.1, loss_type=loss_type, label_smoothing=0.0, sft_coef=1.0)
        seen = {name: 4 * x.item() for name, x in dpo.pair_figures(mb, args).items()}
        assert seen["dpo_loss"] == pytest.approx(loss) and seen["loss"] == pytest.approx(loss + 1)
        assert seen["rewards/chosen"] == pytest.approx(0.2) and seen["rewards/rejected"] == pytest.approx(-0.4)
        assert seen["logps/chosen"] == -2 and seen["logps/rejected"] == -4 and seen["rewards/accuracies"] == 1


def test_the_gradient_is_the_papers():
    """Section 4: - beta sigmoid(reward_l - reward_w), on the chosen log-prob, and its opposite on the rejected."""
    w, l = tensor([-1.0, -4.0], requires_grad=True), tensor([-2.0, -1.0], requires_grad=True)
    seen = figures(w, l, tensor([-2.0, -2.0]), tensor([-2.0, -2.0]), beta=0.5)
    seen["loss"].sum().backward()
    chosen, rejected = seen["rewards/chosen"], seen["rewards/rejected"]
    want = -0.5 * torch.sigmoid(rejected - chosen)
    close(w.grad, want), close(l.grad, -want)
    assert not chosen.requires_grad


def gradient(monkeypatch, out, *flags):
    monkeypatch.setattr(dpo, "make_optimizer", RecordGradients)
    metrics = run(dpo, out, "--eval_fraction", 0, "--batch_size", 6, "--max_grad_norm", 0, "--max_steps", 1, *flags)
    return RecordGradients.last.gradients[0], metrics[0]


@pytest.mark.promise("any cut")
@pytest.mark.parametrize("flags", [(), ("--loss_type", "ipo", "--sft_coef", 0), ("--lora_r", 4), ("--precompute_ref_log_probs", "False")], ids=str)
def test_the_gradient_does_not_depend_on_the_cut(monkeypatch, tmp_path, flags):
    whole, metrics = gradient(monkeypatch, tmp_path / "a", *flags)
    assert whole.norm() > 1e-4 and metrics["trained_pairs"] == 6
    for i, cut in enumerate((("--micro_batch_tokens", 1), ("--micro_batch_tokens", 300), ("--gradient_checkpointing",))):
        part, other = gradient(monkeypatch, tmp_path / f"b{i}", *flags, *cut)
        assert (part - whole).norm() / whole.norm() < 1e-6
        assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-6)


@pytest.fixture(scope="module")
def sft_adapter(tmp_path_factory):
    """An adapter that is not zero: three steps of sft.py on the shipped checkpoint."""
    out = tmp_path_factory.mktemp("adapter")
    run(sft, out, "--model_name_or_path", CHECKPOINT, "--lora_r", 4, "--max_steps", 3, "--learning_rate", 1e-2, "--batch_size", 8,
        "--eval_fraction", 0, "--lora_dropout", 0.3)
    return str(out / "model")


@pytest.mark.promise("ln 2")
@pytest.mark.parametrize("flags, how", [
    ((), "computed once"), (("--precompute_ref_log_probs", "False"), "a frozen copy of the model"), (("--lora_r", 4), "adapters off"),
    (("--lora_r", 4, "--load_in_4bit"), "adapters off"), (("--lora_r", 4, "--precompute_ref_log_probs", "True"), "computed once"),
    ("adapter", "a frozen copy of the adapter"), ("adapter in 4 bit", "a frozen copy of the adapter")], ids=str)
def test_every_start_is_at_ln_2_and_the_reference_stays(flags, how, tmp_path, sft_adapter, capsys):
    if isinstance(flags, str):
        flags = ("--model_name_or_path", sft_adapter, *(["--load_in_4bit"] if "4 bit" in flags else []))
    metrics = run(dpo, tmp_path / "out", "--max_steps", 4, "--eval_steps", 4, "--batch_size", 8, "--eval_fraction", 0.01, "--sft_coef", 0,
                  "--max_completion_length", 0, "--learning_rate", 1e-3, *flags)
    first, last = (m for m in metrics if "eval/loss" in m)
    assert abs(first["eval/dpo_loss"] - LN2) < 1e-6 and abs(metrics[1]["loss"] - LN2) < 1e-6
    assert abs(first["eval/rewards/chosen"]) < 1e-6 and abs(first["eval/rewards/rejected"]) < 1e-6
    assert last["eval/rewards/margins"] > 1e-3, "the policy moves and the reference does not"
    assert how in capsys.readouterr().out


@pytest.mark.promise("formulas")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logprobs_equal_plain_transformers_one_row_at_a_time(kind, tokenizer):
    model = tiny_model(kind).eval()
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in (("1+1", "2", "the answer is eleven"), ("say hi", "hi there, you", "no"))]
    items = [(common.to_pair(row, "prompt_pair"), row, "here") for row in rows]
    pairs = common.encode_pairs(items, tokenizer, 512, dpo.Counter())
    mb = common.pad_rows([pair["rows"][side] for side in (0, 1) for pair in pairs], (), "cpu")
    sums = dpo.Policy(model)(mb.input_ids, mb.mask)[0].sum(-1).view(2, -1)
    lengths = mb.mask.sum(-1).view(2, -1)
    for i, row in enumerate(rows):
        for side, name in enumerate(("chosen", "rejected")):
            prompt = tokenizer(f"<|user|>{row['prompt']}<|end|><|assistant|>")["input_ids"]
            ids = tensor([prompt + tokenizer(row[name] + "<|end|>")["input_ids"]])
            lp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)[len(prompt) - 1:]
            assert sums[side, i].item() == pytest.approx(lp.sum().item(), abs=1e-5 * len(lp)) and lengths[side, i] == len(lp)


@pytest.mark.promise("formulas")
def test_the_step_equals_the_formula_with_plain_transformers(monkeypatch, tmp_path):
    got, metrics = gradient(monkeypatch, tmp_path / "out", "--beta", 0.7, "--sft_coef", 0.3, "--batch_size", 1000, "--dataset_name",
                            write_pairs(tmp_path, 4, {"prompt": "say hi", "chosen": "hi there, you", "rejected": "no"}))
    args = common.parse_args(dpo.Args, [os.path.join(TINY, "dpo.json")])
    tokenizer = common.load_tokenizer(args)
    model, loss = common.load_model(args, tokenizer), 0.0
    for row in map(json.loads, open(tmp_path / "pairs.jsonl")):
        prompt, lps = tokenizer(f"<|user|>{row['prompt']}<|end|><|assistant|>")["input_ids"], []
        for name in ("chosen", "rejected"):
            ids = tensor([prompt + tokenizer(row[name] + "<|end|>")["input_ids"]])
            lp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)[len(prompt) - 1:]
            lps.append((lp.sum(), len(lp)))
        (w, n), (l, _) = lps
        loss = loss + (torch.log(1 + torch.exp(-0.7 * ((w - w.detach()) - (l - l.detach())))) - 0.3 * w / n) / 5
    loss.backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5) and (got - want).norm() / want.norm() < 1e-5


def write_pairs(folder, n, *more):
    """The first n pairs of the example, whose sides begin alike, and more, whose sides need not."""
    with open(os.path.join(TINY, "preferences.jsonl")) as file:
        (folder / "pairs.jsonl").write_text("".join([*file.readlines()[:n], *(json.dumps(row) + "\n" for row in more)]))
    return folder / "pairs.jsonl"


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


HH = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: bye\n\nAssistant: "
@pytest.mark.parametrize("row, format, prompt, chosen, rejected", [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "prompt_pair", ["q"], ["a"], ["b"]),
    ({"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("b")]}, "prompt_pair", ["q"], ["a"], ["b"]),
    ({"prompt": [user("q")], "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]}, "prompt_pair", ["q"], ["a"], ["b"]),
    ({"prompt": "q", "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]}, "prompt_pair", ["q"], ["a"], ["b"]),
    ({"chosen": [user("q"), bot("x"), user("r"), bot("a")], "rejected": [user("q"), bot("x"), user("r"), bot("b")]}, "conversation_pair",
     ["q", "x", "r"], ["a"], ["b"]),
    ({"instruction": "q", "input": "in", "chosen": "a", "rejected": "b"}, "alpaca_pair", ["q\nin"], ["a"], ["b"]),
    ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
     "sharegpt_pair", ["q"], ["a"], ["b"]),
    ({"chosen": HH + "Goodbye!", "rejected": HH + "Go."}, "conversation_pair", ["hi", "Hello.", "bye"], ["Goodbye!"], ["Go."]),
], ids=lambda x: x if isinstance(x, str) else "")
def test_formats(row, format, prompt, chosen, rejected):
    assert common.find_format([(row, "here")], common.PAIR_FORMATS) == format
    pair = common.to_pair(row, format)
    assert [[m["content"] for m in pair[k]] for k in ("prompt", "chosen", "rejected")] == [prompt, chosen, rejected]
    assert not any(m["train"] for m in pair["prompt"]) and all(m["train"] for m in pair["chosen"] + pair["rejected"])


@pytest.mark.promise("files")
@pytest.mark.parametrize("name, row", [  # as LLaMA-Factory and TRL describe their files
    ("alpaca.json", {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}),
    ("sharegpt.json", {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
                       "rejected": {"from": "gpt", "value": "b"}, "system": "", "tools": ""}),
    ("standard.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ("explicit.jsonl", {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("b")]}),
    ("implicit.jsonl", {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")], "score_chosen": 9.0, "score_rejected": 1.0}),
    ("implicit_strings.jsonl", {"chosen": "q is a.", "rejected": "q is b."}),
], ids=lambda x: x if isinstance(x, str) else "")
def test_files_of_other_projects_are_read_as_they_are(name, row, tmp_path, tokenizer):
    (tmp_path / name).write_text(json.dumps([row], indent=2) if name.endswith(".json") else json.dumps(row) + "\n")
    args = common.parse_args(dpo.Args, [os.path.join(TINY, "dpo.json"), "--dataset_name", f"{tmp_path}/{name}", "--eval_fraction", "0"])
    if name == "implicit_strings.jsonl":  # where their prompt ends would be a guess
        with pytest.raises(common.UserError, match="strings.jsonl:1: expected a transcript .* or a column 'prompt' beside the strings"):
            dpo.load_pairs(args, common.load_tokenizer(args))
        return
    (pair,), _ = dpo.load_pairs(args, common.load_tokenizer(args))
    assert [tokenizer.decode(row["input_ids"]) for row in pair["rows"]] == [f"<|user|>q<|end|><|assistant|>{x}<|end|>" for x in "ab"]


@pytest.mark.parametrize("row, format", [
    ({"prompt": "q", "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]}, "prompt_pair"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "prompt_pair"),
    ({"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]}, "conversation_pair"),
    ({"instruction": "q", "chosen": "a", "rejected": "b"}, "alpaca_pair")])
def test_the_system_prompt_reaches_every_format(row, format):
    assert [m["content"] for m in common.to_pair(row, format, "be brief")["prompt"]] == ["be brief", "q"]
    assert [m["content"] for m in common.to_pair(row | {"system": "be long"}, format, "be brief")["prompt"]] == ["be long", "q"]


@pytest.mark.parametrize("row, format, reason", [
    ({"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("a"), user("r"), bot("b")]}, "conversation_pair", "the beginning of the other"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "wide"}, "prompt_pair", "'margin' is no number"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": math.nan}, "prompt_pair", "'margin' is no number"),
    ({"chosen": [user("q"), bot("a")], "rejected": [user("r"), bot("b")]}, "conversation_pair", "prompts differ"),
    ({"chosen": HH + "a", "rejected": HH.replace("bye", "wait") + "b"}, "conversation_pair", "prompts differ"),
    ({"chosen": "a", "rejected": "b"}, "conversation_pair", "expected a transcript"),
    ({"prompt": "q", "chosen": 3, "rejected": "b"}, "prompt_pair", "column 'chosen' is not a string but 3"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt_pair", "'prompt' is empty"),
    ({"prompt": "q", "chosen": [{"role": "robot", "content": "a"}], "rejected": "b"}, "prompt_pair", "unknown role 'robot'"),
    ({"prompt": [bot("q")], "chosen": "a", "rejected": "b"}, "prompt_pair", "neither follows nor repeats the prompt"),
    ({"chosen": [bot("a")], "rejected": [bot("b")]}, "conversation_pair", "must end with"),
])
def test_malformed_pairs(row, format, reason):
    with pytest.raises(ValueError, match=reason):
        common.to_pair(row, format)


def test_identical_and_empty_pairs_are_dropped_and_counted_and_both_sides_keep_the_same_prompt(tokenizer):
    rows = [{"prompt": "q" * 50, "chosen": "a" * 30, "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "a"},
            {"prompt": "q", "chosen": " ", "rejected": "a"}]
    counts = dpo.Counter()
    (pair,) = common.encode_pairs([(common.to_pair(r, "prompt_pair"), r, "here") for r in rows], tokenizer, 40, counts)
    assert counts["dropped: the two sides are identical"] == 1 and counts["dropped: an empty completion"] == 1 and counts["cut to 40 tokens"] == 1
    texts = [tokenizer.decode(row["input_ids"][row["mask"] == m]) for row in pair["rows"] for m in (0, 1)]
    prompt = "<|user|>" + "q" * 17 + "<|end|><|assistant|>"  # half of max_length, the first token in any case; a cut completion has no end of turn
    assert texts == [prompt, "a" * 20, prompt, "b<|end|>"]
    assert tokenizer.decode(pair["prompt_ids"]) == "<|user|>" + "q" * 37 + "<|end|><|assistant|>"


def test_falling_chosen_logprobs_are_said_aloud(tmp_path, capsys):
    """The margin grows while the policy leaves both sides: without the NLL term a warning, with it none."""
    flags = ["--eval_fraction", 0.02, "--max_completion_length", 0, "--max_steps", 6, "--eval_steps", 6]
    run(dpo, tmp_path / "a", *flags)
    assert "the policy leaves them too" not in capsys.readouterr().out
    metrics = run(dpo, tmp_path / "b", *flags, "--sft_coef", 0, "--learning_rate", 1e-3)
    assert "the policy leaves them too" in capsys.readouterr().out
    first, last = (m["eval/logps/chosen"] for m in metrics if "eval/logps/chosen" in m)
    assert last < first - 1
