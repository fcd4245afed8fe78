"""reward_model.py: losses by hand, the score read at the right token, saved models in plain transformers and peft."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import RecordGradients, TINY, load_by_card, run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import dpo
import grpo
import reward_model
import sft

CHECKPOINT, LN2 = os.path.join(TINY, "sft"), math.log(2)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_pairwise_loss_by_hand():
    w, l = tensor([2.0, 2.0]), tensor([1.0, 1.0])
    close(reward_model.pairwise_loss(w, l, tensor([0.0, 1.0])), tensor([math.log(1 + math.exp(-1)), LN2]))
    close(reward_model.pairwise_loss(w, l, tensor([0.0, 1.0]), 0.01), tensor([math.log(1 + math.exp(-1)) + 0.09, LN2 + 0.09]))


def test_pointwise_loss_by_hand():
    close(reward_model.pointwise_loss(tensor([[1.0, 2.0], [0.0, 0.0]]), tensor([[0.0, 4.0], [0.0, 0.0]])), tensor([2.5, 0.0]))


def classifier(score_names, seed=0):
    args = common.parse_args(reward_model.Args, [os.path.join(TINY, "reward_model.json"), "--seed", str(seed)])
    return common.load_model(args, common.load_tokenizer(args), score_names=score_names)


@pytest.mark.parametrize("names", [["score"], ["a", "b"]], ids=str)
def test_a_row_is_scored_at_its_mask_and_without_one_every_parameter_takes_part(names):
    """Rows of lengths 3 and 6; then a mask of zeros, as a process has that has no rows left."""
    scorer = reward_model.Scorer(classifier(names))
    input_ids, mask = tensor([[5, 6, 7, 0, 0, 0], [5, 6, 7, 8, 9, 10]]), torch.zeros(2, 6)
    mask[0, 2] = mask[1, 5] = 1
    plain = [scorer.model(input_ids=row[None], attention_mask=torch.ones(1, len(row))).logits[0] for row in (input_ids[0, :3], input_ids[1])]
    close(scorer(input_ids, mask), torch.stack(plain), 1e-5)
    nothing = scorer(input_ids, torch.zeros(2, 6))
    assert nothing.shape == (0, len(names))
    nothing.sum().backward()
    gradients = [p.grad for p in scorer.parameters() if p.requires_grad]
    assert len(gradients) > 10 and all(g is not None and not g.any() for g in gradients)


@pytest.mark.promise("formulas")
def test_losses_and_scores_of_a_micro_batch_by_hand():
    """Chosen 2 and 3, then rejected 1 and 5, margins 1 and 0; then the same four as given scores; then no rows."""
    args = common.parse_args(reward_model.Args, [os.path.join(TINY, "reward_model.json"), "--center_rewards_coefficient", "0.01"])
    given = lambda *scores: lambda input_ids, mask: tensor(scores).view(len(mask) if mask.any() else 0, -1)
    mb = SimpleNamespace(input_ids=None, mask=torch.ones(4, 1), rows=[{"margin": 1.0}, {"margin": 0.0}] * 2)
    losses, scores = reward_model.score_and_loss(given(2.0, 3.0, 1.0, 5.0), mb, None, args)
    close(losses, tensor([LN2 + 0.09, math.log(1 + math.exp(2)) + 0.64]))
    close(scores, tensor([[2.0, 1.0], [3.0, 5.0]]))
    mb = SimpleNamespace(input_ids=None, mask=torch.ones(2, 1), rows=[{"targets": [0.0, 4.0]}, {"targets": [1.0, 5.0]}])
    losses, scores = reward_model.score_and_loss(given(2.0, 3.0, 1.0, 5.0), mb, ["a", "b"], args)
    close(losses, tensor([2.5, 0.0]))
    close(scores, tensor([[2.0, 3.0], [1.0, 5.0]]))
    mb = SimpleNamespace(input_ids=None, mask=torch.zeros(2, 2), rows=[])
    for names, width in ((None, 1), (["a", "b"], 2)):
        losses, scores = reward_model.score_and_loss(lambda *_: torch.zeros(0, width), mb, names, args)
        assert losses.shape == (0,) and scores.shape == (0, 2)
        assert reward_model.at_last_token(losses.repeat(2), mb.mask).tolist() == [[0, 0], [0, 0]]


def test_calibration_error_by_hand():
    sure = math.log(0.8 / 0.2)  # p = 0.8
    assert reward_model.calibration_error(tensor([sure] * 8 + [-sure] * 2)) == pytest.approx(0.0, abs=1e-6)
    assert reward_model.calibration_error(tensor([sure] * 6 + [-sure] * 4)) == pytest.approx(0.2, abs=1e-6)
    assert reward_model.calibration_error(tensor([0.0] * 4)) == pytest.approx(0.0, abs=1e-6)
    mixed = tensor([sure] * 8 + [-sure] * 2 + [math.log(0.6 / 0.4)] * 10)  # the second bin is right 10 of 10 at 0.6
    assert reward_model.calibration_error(mixed) == pytest.approx(0.5 * 0.4, abs=1e-6)


def scored_file(tmp_path, named):
    with open(os.path.join(TINY, "addition.jsonl")) as file:
        rows = [json.loads(line) for line in file.readlines()[:300]]
    with open(tmp_path / "scored.jsonl", "w") as file:
        for row in rows:
            right = float(f"<answer>{row['answer']}</answer>" in row["completion"])
            score = {"right": right, "short": len(row["completion"]) / 100} if named else right
            file.write(json.dumps({"prompt": row["prompt"], "completion": row["completion"], "score": score}) + "\n")
    return tmp_path / "scored.jsonl"


@pytest.mark.promise("any cut")
@pytest.mark.parametrize("flags", [(), ("--lora_r", 4), ("--center_rewards_coefficient", 0.1), ("scored",)], ids=str)
def test_the_gradient_does_not_depend_on_the_cut(monkeypatch, tmp_path, flags):
    """The two sides are unlike each other: with a new head the gradients of like ones nearly cancel."""
    pairs = [{"prompt": "say hi" * i, "chosen": "hi there " * (i + 1), "rejected": f"{i * 7919}"} for i in range(1, 9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    flags = ("--dataset_name", scored_file(tmp_path, True) if flags == ("scored",) else tmp_path / "pairs.jsonl", *flags * (flags != ("scored",)))
    monkeypatch.setattr(reward_model, "make_optimizer", RecordGradients)

    def gradient(name, *more):
        metrics = run(reward_model, tmp_path / name, "--eval_fraction", 0, "--batch_size", 6, "--max_grad_norm", 0, "--max_steps", 1, *flags, *more)
        return RecordGradients.last.gradients[0], metrics[0]["loss"]
    whole, loss = gradient("a")
    assert whole.norm() > 1e-4
    for i, cut in enumerate((("--micro_batch_tokens", 1), ("--micro_batch_tokens", 300), ("--gradient_checkpointing",))):
        part, other = gradient(f"b{i}", *cut)
        assert (part - whole).norm() / whole.norm() < 1e-6 and other == pytest.approx(loss, rel=1e-6)


def texts_and_scores(folder, tokenizer):
    """Scores of three conversations by our function, and their ids."""
    conversations = [[common.turn("user", p), common.turn("assistant", c)] for p, c in (("1+1", "<answer>2</answer>"), ("100+23", "no idea"), ("5", "6"))]
    names, score = common.load_reward_model(folder)
    ids = [common.encode_conversation(tokenizer, c)[0]["input_ids"] for c in conversations]
    return names, score(conversations), ids


@pytest.mark.promise("scores")
@pytest.mark.parametrize("flags", [(), ("--lora_r", 4), ("--lora_r", 4, "--load_in_4bit")], ids=str)
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_saved_models_give_the_same_scores_in_plain_transformers_and_peft(flags, pad_is_eos, tmp_path):
    model = tmp_path / "start"
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(model)
    common.AutoModelForCausalLM.from_pretrained(CHECKPOINT).save_pretrained(model)
    merge = ["--merge"] if flags else []
    metrics = run(reward_model, tmp_path / "out", "--model_name_or_path", model, "--max_steps", 12, "--batch_size", 16, "--learning_rate", 1e-3,
                  "--eval_fraction", 0.02, *flags, *merge)
    assert all(math.isfinite(m["loss"]) for m in metrics if "loss" in m)
    folder = tmp_path / "out" / ("model" if not flags else "merged")
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.pad_token_id not in (None, saved.eos_token_id)
    names, ours, ids = texts_and_scores(str(folder), saved)
    assert names == ["score"]
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    for side in ("right", "left"):
        batch = saved.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
        assert batch["input_ids"].shape[1] > min(map(len, ids))
        position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        close(plain(**batch, position_ids=position_ids).logits.detach(), ours, 1e-4)
    if flags:
        adapter_names, adapter_scores, _ = texts_and_scores(str(tmp_path / "out" / "model"), saved)
        four = {"quantization_config": common.nf4(torch.float32, "cpu")} if "--load_in_4bit" in flags else {}
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=saved.pad_token_id, **four)
        loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "model")
        batch = saved.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        close(loaded(**batch).logits.detach(), adapter_scores, 1e-4)
        if "--load_in_4bit" not in flags:
            close(adapter_scores, ours, 1e-3)
        assert adapter_names == ["score"]


@pytest.mark.parametrize("flags", [(), ("--lora_r", 4, "--merge")], ids=str)
def test_a_card_scores_where_the_answer_ends(flags, tmp_path):
    """Most templates go on after the end of a turn, with a newline; transformers would score there."""
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token + '\\n' }}{% endfor %}"
                                      "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    run(reward_model, tmp_path / "out", "--chat_template_path", tmp_path / "t.jinja", "--max_steps", 4, "--learning_rate", 1e-2, "--eval_fraction", 0, *flags)
    for name in ("model", "merged") if flags else ("model",):
        _, score = common.load_reward_model(str(tmp_path / "out" / name))
        ours = score([[common.turn("user", "2 + 2?"), common.turn("assistant", "4")]])
        close(load_by_card(tmp_path / "out" / name, "scores").detach(), ours, 1e-4)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / name)
        ids = tokenizer("user:2 + 2?<eos>".replace("<eos>", tokenizer.eos_token) + "\nassistant:4" + tokenizer.eos_token + "\n", add_special_tokens=False,
                        return_tensors="pt")["input_ids"]
        plain = load_by_card(tmp_path / "out" / name)
        close(plain(ids[:, :-1]).logits.detach(), ours, 1e-4)
        assert (plain(ids).logits.detach() - ours).abs().max() > 1e-2
        config = tmp_path / "out" / name / "config.json"  # a model from elsewhere learned its scores after the newline
        config.write_text(config.read_text().replace('"scored_at"', '"of_no_meaning"'))
        _, score = common.load_reward_model(str(tmp_path / "out" / name))
        said = [common.turn("user", "2 + 2?"), common.turn("assistant", "4")]
        close(score([said, said], [False, True]), torch.cat([plain(ids).logits, plain(ids[:, :-2]).logits]).detach(), 1e-4)


def test_an_empty_sample_is_scored_where_the_template_refuses_it(tmp_path):
    """Some templates raise an exception for an empty answer: the run would end at a sample, and again when it is resumed."""
    run(reward_model, tmp_path / "out", "--max_steps", 4, "--learning_rate", 1e-2, "--eval_fraction", 0)
    folder = str(tmp_path / "out" / "model")
    asked, empty = common.turn("user", "2 + 2?"), common.turn("assistant", "")
    _, score = common.load_reward_model(folder)
    want = score([[asked, empty]] * 2, [False, True])
    with open(os.path.join(folder, "chat_template.jinja"), "r+") as file:
        template = file.read()
        file.seek(0)
        file.write("{% for m in messages %}{% if m['content'] == '' %}{{ raise_exception('empty') }}{% endif %}{% endfor %}" + template)
    _, score = common.load_reward_model(folder)
    close(score([[asked, empty]] * 2, [False, True]), want, 1e-6)
    assert (want[0] - want[1]).abs() > 1e-4
    with pytest.raises(ValueError, match="the chat template refuses this conversation: empty"):
        score([[common.turn("user", ""), common.turn("assistant", "4")]])


def test_named_scores_are_in_the_config_and_serve_as_rewards(tmp_path):
    run(reward_model, tmp_path / "out", "--dataset_name", scored_file(tmp_path, True), "--max_steps", 30, "--batch_size", 32, "--learning_rate", 1e-3)
    folder = str(tmp_path / "out" / "model")
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.id2label == {0: "right", 1: "short"}
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--reward_funcs", "accuracy", f"{folder}:short"])
    rewards = common.load_rewards(args)
    asked = [common.turn("user", "1+1")]
    prompts = [{"prompt": "1+1", "turns": asked, "columns": {"answer": "2"}, "place": "here"}] * 2
    short, long = "<answer>2</answer>", "<think>1+1+0=2</think><answer>2</answer>"
    rows = [{"text": t, "completion_ids": [1], "truncated": False} for t in (short, long)]
    values, _ = common.score(rewards, prompts, rows, 0, 1)
    _, score = common.load_reward_model(folder)
    direct = score([[*asked, common.turn("assistant", c)] for c in (short, long)])
    close(values[:, 1], direct[:, 1], 1e-5)
    assert list(rewards)[1].endswith("short")
    with open(os.path.join(folder, "chat_template.jinja"), "r+") as file:  # one that shows the date: it is given by the run
        template = file.read()
        file.seek(0)
        file.write("{{ strftime_now('%d %B') }}" + template)
    one, other, same = (common.load_reward_model(folder, date=f"2026-03-0{day}")[1]([[*asked, common.turn("assistant", short)]]) for day in (1, 2, 1))
    assert one.equal(same) and not one.equal(other)
    with pytest.raises(common.UserError, match="several scores .right, short.: say which"):
        common.load_rewards(common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--reward_funcs", folder]))


@pytest.mark.parametrize("named", [False, True])
def test_figures_are_those_of_the_saved_model(named, tmp_path):
    """All rows in one step are those of the evaluation too: its figures before it, and after it those that plain transformers gives."""
    if named:
        flags = ["--dataset_name", scored_file(tmp_path, True), "--eval_dataset_name", scored_file(tmp_path, True), "--batch_size", 300]
    else:
        pairs = [{"prompt": "say hi" * i, "chosen": "hi there " * (i + 1), "rejected": f"{i * 7919}", "margin": i / 4} for i in range(1, 9)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
        flags = ["--dataset_name", tmp_path / "pairs.jsonl", "--eval_dataset_name", tmp_path / "pairs.jsonl", "--center_rewards_coefficient", 0.1]
    first, step, last = run(reward_model, tmp_path / "out", "--max_steps", 1, *flags)
    for name in ("loss", "score_mean") if named else ("loss", "score_mean", "accuracy", "margin"):
        assert step[name] == pytest.approx(first[f"eval/{name}"], rel=1e-5, abs=1e-6), name
    assert step["trained_rows" if named else "trained_pairs"] == (300 if named else 8)
    _, score = common.load_reward_model(str(tmp_path / "out" / "model"))
    conversation = lambda prompt, answer: [common.turn("user", prompt), common.turn("assistant", answer)]
    if named:
        rows = [json.loads(line) for line in open(tmp_path / "scored.jsonl")]
        scores, given = score([conversation(row["prompt"], row["completion"]) for row in rows]), tensor([list(row["score"].values()) for row in rows])
        want = {"loss": (scores - given).square().mean(), "correlation/short": torch.corrcoef(torch.stack([scores[:, 1], given[:, 1]]))[0, 1]}
    else:
        w, l = (score([conversation(pair["prompt"], pair[side]) for pair in pairs])[:, 0] for side in ("chosen", "rejected"))
        scores, margin = torch.stack([w, l]), tensor([pair["margin"] for pair in pairs])
        want = {"loss": (0.1 * (w + l) ** 2 - torch.sigmoid(w - l - margin).log()).mean(), "margin": (w - l).mean(), "accuracy": (w > l).float().mean()}
    for name, value in {**want, "score_mean": scores.mean(), "score_std": scores.std(correction=0)}.items():
        assert last[f"eval/{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


def test_a_model_without_a_trained_head_is_no_reward(tmp_path):
    with pytest.raises(common.UserError, match="no trained score head"):
        common.load_reward_model(CHECKPOINT)


@pytest.mark.parametrize("lora", [[], ["--model_name_or_path", CHECKPOINT, "--lora_r", 4, "--merge"]], ids=["full", "lora"])
def test_a_reward_model_is_no_policy(tmp_path, lora):
    """--model_name_or_path and --reward_funcs mixed up; model/ and merged/, of which a policy would take the trunk without a word."""
    run(reward_model, tmp_path / "rm", "--max_steps", 1, "--eval_fraction", 0, *lora)
    for folder in ("model", "merged")[:1 + bool(lora)]:
        for script in (sft, grpo):
            with pytest.raises(common.UserError, match="is an? .*reward model, as --reward_funcs of ppo and grpo takes; a policy starts from"):
                run(script, tmp_path / "out", "--model_name_or_path", tmp_path / "rm" / folder, "--eval_fraction", 0, "--max_steps", 1)
    run(sft, tmp_path / "sft", "--model_name_or_path", CHECKPOINT, "--lora_r", 4, "--max_steps", 1, "--eval_fraction", 0)
    with pytest.raises(common.UserError, match="no reward model that can be loaded: it is an adapter of a language model"):
        common.load_reward_model(str(tmp_path / "sft" / "model"))


def test_an_adapter_of_a_policy_and_rows_beyond_the_models_positions_are_refused(tmp_path):
    run(sft, tmp_path / "a", "--model_name_or_path", CHECKPOINT, "--lora_r", 4, "--max_steps", 1,
        "--eval_fraction", 0)
    with pytest.raises(common.UserError, match="is an adapter of a policy: start from its merged/ instead, which its own command writes with --resume"):
        run(reward_model, tmp_path / "b", "--model_name_or_path", tmp_path / "a" / "model")
    with pytest.raises(common.UserError, match="rows may have 5000 tokens and the model .*has 4096 positions"):
        run(reward_model, tmp_path / "c", "--max_length", 5000)


def test_template_kwargs_and_margins_reach_the_saved_model(tmp_path):
    (tmp_path / "t.jinja").write_text("{% if brief %}BRIEF {% endif %}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
                                      "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    (tmp_path / "p.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2}\n' * 2)
    metrics = run(reward_model, tmp_path / "out", "--chat_template_path", tmp_path / "t.jinja", "--chat_template_kwargs", '{"brief": true}',
                  "--dataset_name", tmp_path / "p.jsonl", "--eval_fraction", 0, "--max_steps", 1)
    assert metrics[0]["loss"] > 1.5, "about log(1 + e^2) with a new head: the margin counts"
    _, score = common.load_reward_model(str(tmp_path / "out" / "model"))
    seen, encode = [], common.encode_conversation
    common.encode_conversation = lambda tokenizer, messages, **options: seen.append(common.render(tokenizer, messages)) or encode(tokenizer, messages, **options)
    try:
        score([[common.turn("user", "q"), common.turn("assistant", "a")]])
    finally:
        common.encode_conversation = encode
    assert seen[0].startswith("BRIEF <|user|>q")


def test_a_sample_of_which_the_template_drops_a_part_is_scored(tmp_path):
    """A second </think>: in data it is an error, in one sample of many it would end the run."""
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[-1] + '<|end|>' }}"
                                      "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    (tmp_path / "p.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 2)
    run(reward_model, tmp_path / "out", "--chat_template_path", tmp_path / "t.jinja", "--dataset_name", tmp_path / "p.jsonl", "--eval_fraction", 0, "--max_steps", 1)
    _, score = common.load_reward_model(str(tmp_path / "out" / "model"))
    whole, part = score([[common.turn("user", "q"), common.turn("assistant", text)] for text in ("b", "x</think>y</think>b")])
    assert whole.isfinite().all() and whole.equal(part)
    data = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    with pytest.raises(ValueError, match="leaves out message 1"):
        common.encode_conversation(data, [common.turn("user", "q"), common.turn("assistant", "x</think>b")])


def test_a_reward_model_goes_on_with_other_scores(tmp_path):
    """Its trunk does; the head for them is a new one."""
    run(reward_model, tmp_path / "one", "--eval_fraction", 0, "--max_steps", 1, "--batch_size", 2)
    (tmp_path / "s.jsonl").write_text('{"prompt": "q", "completion": "a", "score": {"x": 1, "y": 0}}\n' * 4)
    run(reward_model, tmp_path / "two", "--model_name_or_path", tmp_path / "one" / "model", "--dataset_name", tmp_path / "s.jsonl",
        "--eval_fraction", 0, "--max_steps", 1, "--batch_size", 2)
    names, score = common.load_reward_model(str(tmp_path / "two" / "model"))
    assert names == ["x", "y"] and score([[common.turn("user", "q"), common.turn("assistant", "a")]]).shape == (1, 2)


def test_pointwise_learns(tmp_path):
    metrics = run(reward_model, tmp_path / "out", "--dataset_name", scored_file(tmp_path, False), "--max_steps", 30, "--batch_size", 32,
                  "--learning_rate", 1e-3, "--eval_steps", 30)
    first, last = (m["eval/loss"] for m in metrics if "eval/loss" in m)
    assert last < first and any("eval/correlation/score" in m for m in metrics)


@pytest.mark.parametrize("row, sentence", [
    ({"prompt": "a", "completion": "b", "score": "good"}, "the score 'score' is not a number"),
    ({"prompt": "a", "completion": "b", "score": None}, "is not a number"), ({"prompt": "a", "completion": "b", "score": {}}, "holds no score"),
    ({"prompt": "a", "completion": "b", "score": {"x": True}}, "expected a finite number"),
    ({"prompt": "a", "completion": "b", "score": float("inf")}, "expected a finite number")])
def test_malformed_scores(row, sentence):
    with pytest.raises(ValueError, match=sentence):
        common.to_scored(row, "prompt_completion_score")


@pytest.mark.parametrize("script", [dpo, reward_model])
def test_a_rising_evaluation_loss_is_said_aloud(script, tmp_path, capsys, monkeypatch):
    """Four evaluations; the first run's third one is lower, the second run's losses rise throughout."""
    evaluate, flags = script.evaluate, ["--max_steps", 3, "--eval_steps", 1, "--batch_size", 2, "--eval_fraction", 0.005]
    for name, losses, warned in (("a", [0.4, 0.5, 0.45, 0.6], 0), ("b", [0.4, 0.5, 0.6, 0.7], 1)):
        left = iter(losses)

        def falsified(*a, **k):
            found = evaluate(*a, **k)
            (found[0] if isinstance(found, tuple) else found)["eval/loss"] = next(left)
            return found
        monkeypatch.setattr(script, "evaluate", falsified)
        run(script, tmp_path / name, *flags)
        assert capsys.readouterr().out.count("risen three times in a row, from 0.4000: the model overfits. Take fewer epochs") == warned


def test_equal_scores_order_no_pair(monkeypatch, tmp_path):
    """A head of zeros: neither in training nor in evaluation is a tie counted as right."""
    load_model = common.load_model

    def zeroed(*a, **k):
        model = load_model(*a, **k)
        torch.nn.init.zeros_(model.score.weight)
        return model
    monkeypatch.setattr(common, "load_model", zeroed)
    before, step, *_ = run(reward_model, tmp_path / "out", "--max_steps", 1, "--batch_size", 4)
    assert before["eval/accuracy"] == step["accuracy"] == before["eval/margin"] == step["margin"] == 0


def test_scores_of_a_row_are_taken_by_their_names(tokenizer):
    """Whatever their order in the file; the names are those of the first row, sorted."""
    args = common.parse_args(reward_model.Args, [os.path.join(TINY, "reward_model.json")])
    items = [(common.to_scored({"prompt": "1+1", "completion": "2", "score": scores}, "prompt_completion_score"), {}, "here")
             for scores in ({"b": 1, "a": 2}, {"a": 2, "b": 1})]
    groups = reward_model.encode_scored_rows(items, tokenizer, args, common.Counter(), ["a", "b"])
    assert reward_model.targets_of([row for row, in groups], ["a", "b"]).tolist() == [[2, 1], [2, 1]]


def test_scores_do_not_depend_on_the_pad_token_that_the_tokenizer_has(tmp_path):
    """transformers looks for the end of a row by the config's: a batch was padded with the tokenizer's, and scored at padding."""
    run(reward_model, tmp_path / "rm", "--max_steps", 1, "--eval_fraction", 0)
    file = tmp_path / "rm" / "model" / "config.json"
    config, texts = json.loads(file.read_text()), ["1", "<answer>12345</answer>", "x" * 40]
    conversations = [[common.turn("user", "1+1"), common.turn("assistant", text)] for text in texts]
    want = common.load_reward_model(str(tmp_path / "rm" / "model"))[1](conversations)
    for pad in (0, 5, None):
        file.write_text(json.dumps(config | {"pad_token_id": pad}))
        _, score = common.load_reward_model(str(tmp_path / "rm" / "model"))
        torch.testing.assert_close(score(conversations), want, rtol=0, atol=1e-5)


def test_an_adapter_that_would_not_be_what_was_trained_is_refused(tmp_path):
    """Weights under other names would stay as a new adapter has them; a bias has one copy, so no frozen reference."""
    run(sft, tmp_path / "a", "--model_name_or_path", CHECKPOINT, "--lora_r", 4, "--max_steps", 1, "--eval_fraction", 0)
    run(reward_model, tmp_path / "r", "--model_name_or_path", CHECKPOINT, "--lora_r", 4, "--max_steps", 1, "--eval_fraction", 0)
    for folder in (tmp_path / "a" / "model", tmp_path / "r" / "model"):
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({name.replace("model.layers", "model.language_model.layers"): x for name, x in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(common.UserError, match="cannot load the adapter .*: Found missing adapter keys"):
        run(dpo, tmp_path / "b", "--model_name_or_path", tmp_path / "a" / "model", "--eval_fraction", 0, "--max_steps", 1)
    with pytest.raises(common.UserError, match="is no reward model that can be loaded: Found missing adapter keys"):
        common.load_reward_model(str(tmp_path / "r" / "model"))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(CHECKPOINT), LoraConfig(r=4, bias="all", target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "biased")
    with pytest.raises(common.UserError, match="no second copy of .*biased can be loaded, as a frozen reference: LoraModel supports only 1"):
        run(grpo, tmp_path / "c", "--model_name_or_path", tmp_path / "biased", "--eval_fraction", 0, "--kl_coef", 0.1, "--max_steps", 1)
