"""Numbers that decide nothing at once, and so are seldom looked at: logged figures, columns of the audit page, what is drawn
from which seed, denominators where a rollout is cut into minibatches. Each by hand; RIGHT stands beside what a slip would give."""

import json
import math
import os
import re
import time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, RecordGradients, run
from test_common import IM, QWEN3, make_tokenizer
from torch import nan, tensor

import common
import dpo
import grpo
import ppo
import reward_model
import sft
from common import Reward

CHECKPOINT = os.path.join(TINY, "sft")


def close(got, want, tolerance=1e-6):
    torch.testing.assert_close(tensor(got), tensor(want), rtol=tolerance, atol=tolerance)


def completions(*scores, lengths=None, answers=None, **more):
    """Rows of a rollout with one reward, whose prompts have 8 tokens."""
    return [{"rewards_per_func": tensor([score]), "score": score, "completion_ids": list(range(n)), "input_ids": torch.zeros(8 + n),
             "mask": torch.ones(8 + n), "truncated": False, "sampled": 1.0, "nll": False, "text": (answers or [""] * len(scores))[i],
             "number": i, "prompt": {"prompt": "?", "columns": {"answer": "2"}}, **more}
            for i, (score, n) in enumerate(zip(scores, lengths or [5] * len(scores)))]


# ---- figures of a rollout ----------------------------------------------------------------------------------------------

def test_the_figures_of_a_ppo_rollout():
    """Scores 1 and 5, clipped at 2, rewards -0.1 KL; with gamma = lambda = 1 the returns are 0.7, 0.8 and 1.7, the advantages
    0.2, 0.3 and 1.7."""
    rows = [{"input_ids": tensor([7] * (1 + len(kl))), "mask": tensor([0] + [1] * len(kl)), "old_logprobs": tensor([0.0, *kl]),
             "ref_logprobs": torch.zeros(1 + len(kl)), "values": tensor([0.0, *values]), "score": score, "truncated": False}
            for kl, values, score in (((1.0, 2.0), (0.5, 0.5), 1.0), ((3.0,), (0.0,), 5.0))]
    args = SimpleNamespace(score_clip=2.0, missing_eos_penalty=0.0, gamma=1.0, gae_lambda=1.0, kl_coef=0.1)
    got = ppo.add_advantages(rows, args, 0.1)
    close([got[name] for name in ("kl", "kl_sequence", "score", "score_std", "rlhf_reward")], [2.0, 3.0, 1.5, 0.5, 1.2])
    spread, rest = (sum((x - sum(xs) / 3)**2 for x in xs) for xs in ((0.7, 0.8, 1.7), (0.2, 0.3, 1.7)))
    close(got["values/explained_variance"], 1 - rest / spread, 1e-5)
    assert rows[1]["note"] == "score 2, " and [round(x, 6) for x in rows[0]["returns"].tolist()] == [0, 0.7, 0.8]


def test_the_figures_of_a_grpo_rollout():
    group, args = completions(1.0, 0.0, 0.0, 1.0, lengths=[5, 2, 3, 9]), SimpleNamespace(demo_threshold=None, best_fraction=0.25)
    group[0]["nll"] = True
    rewards = {"a": Reward(None, 2.0)}
    got = grpo.rollout_figures([group], [group], rewards, args)
    deviation = math.sqrt(4 * 0.25 / 3)  # n - 1; of a whole population it would be 0.5
    close([got[name] for name in ("reward_std", "rewards/a/std", "rewards/a/weighted", "best_length", "best_fraction")],
          [deviation, deviation, 1.0, 5.0, 0.25])
    got = grpo.rollout_figures([completions(1.0, 0.0), completions(nan, nan)], [], rewards, SimpleNamespace(demo_threshold=None, best_fraction=0))
    close(got["reward_std"], math.sqrt(0.5) / 2)  # a mean over groups, of which one has none
    got = common.rollout_metrics(completions(1.0, nan), rewards)
    assert got["reward"] == got["rewards/a/mean"] == 1.0


def test_the_best_are_counted_up_and_a_masked_one_is_none():
    assert grpo.best_of_groups(tensor([[4.0, 3, 2, 1]]), 0.3).tolist() == [[True, True, False, False]]
    group = completions(1.0, 0.0, 0.0, 0.0)
    group[0]["truncated"] = True
    grpo.credit([group], SimpleNamespace(scale_rewards="group", best_fraction=0.25, mask_truncated_completions=True))
    assert [row["nll"] for row in group] == [False] * 4 and not group[0]["mask"].any() and group[1]["mask"].all()


def test_what_is_no_answer_or_beyond_k_does_not_count():
    rows = completions(0.0, 0.0, answers=["7", "8"])
    for row, answer in zip(rows, ("7", None)):
        row["prompt"] = {"columns": {"answer": answer}}
    assert common.exact_match(rows, ["7", None]) == {"accuracy": 1.0}
    got = common.verify([["3", "1", "1"]], ["1"], tensor([[0.0, 0, 9]]))
    close([got[f"{name}@1"] for name in ("pass", "majority", "best_of", "weighted_vote")], [2 / 3, 0.0, 0.0, 0.0])
    got = common.verify([["1", "2", "2"]], ["1"], tensor([[3.0, 2, 2]]))
    assert got["weighted_vote@3"] == 1 and got["majority@3"] == 0  # e^3 = 20.1 and 2 e^2 = 14.8; unweighted 3 and 4


def test_calibration_has_bins_of_a_twentieth():
    sure, surer = math.log(0.72 / 0.28), math.log(0.78 / 0.22)
    assert reward_model.calibration_error(tensor([sure, sure, -surer, -surer])) == pytest.approx(0.5 * (1 - 0.72) + 0.5 * 0.78, abs=1e-6)


# ---- evaluation --------------------------------------------------------------------------------------------------------

def test_sft_evaluates_tokens_over_tokens(monkeypatch):
    monkeypatch.setattr(common, "answer_greedily", lambda *args: (None, []))
    sums = [tensor([1.0, 1.0, 1.0, 1.0]).unbind(), tensor([5.0, 5.0, 0.0, 3.0]).unbind()]  # losses, hits and tokens of two rows
    fake = SimpleNamespace(over_rows=lambda *args, **more: sums)
    args = SimpleNamespace(adversarial=None, gradient_checkpointing=False)
    metrics, _ = sft.evaluate(torch.nn.Module(), torch.nn.Module(), [{}, {}], args, fake)
    assert metrics == {"eval/loss": 1.5, "eval/token_accuracy": 0.25}


@pytest.mark.parametrize("script", [sft, reward_model, dpo])
def test_evaluation_has_no_dropout(script, tmp_path):
    """The same figures before and after an update that changes nothing, and those of the model without dropout."""
    model = tmp_path / "m"
    common.AutoModelForCausalLM.from_pretrained(CHECKPOINT).save_pretrained(model)
    common.AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(model)
    flags = ["--max_steps", 1, "--learning_rate", 1e-12, "--batch_size", 2, "--eval_fraction", 0.02, *["--max_completion_length", 1] * (script is not reward_model)]
    plain, = run(script, tmp_path / "plain", "--model_name_or_path", model, *flags)[:1]
    (model / "config.json").write_text((model / "config.json").read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.3'))
    first, _, last = run(script, tmp_path / "out", "--model_name_or_path", model, *flags)
    close([first["eval/loss"], last["eval/loss"]], [plain["eval/loss"]] * 2, 1e-5)


@pytest.mark.parametrize("stop, cut, share", [([7], False, 1.0), ([260], True, 0.0)])
def test_greedy_answers_end_at_the_models_own_stop_tokens_and_are_wrong_where_they_are_cut(monkeypatch, tokenizer, stop, cut, share):
    seen, said = [], tokenizer("18", add_special_tokens=False)["input_ids"] + ([] if cut else stop)
    monkeypatch.setattr(common, "complete_greedily", lambda model, prompts, stop_ids, most: seen.append(stop_ids) or [said])
    fake = SimpleNamespace(args=SimpleNamespace(max_completion_length=9, micro_batch_tokens=99), tokenizer=tokenizer, place=(0, 1), device="cpu",
                           accelerator=SimpleNamespace(autocast=nullcontext, reduce=lambda x, how: x))
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=stop))
    got, _ = common.answer_greedily(fake, model, [{"prompt_ids": [1], "answer": "18", "prompt": "?"}])
    assert got == share and set(stop) <= set(seen[0])


def test_evaluation_is_greedy_and_its_samples_are_no_rollouts(monkeypatch):
    """best_of@2 weighs the reward models' scores: 5 x 0.5 and not 0.1 x 1 is the best."""
    asked, calls = [{"prompt": "?", "columns": {"answer": "2"}}], []

    def complete(prompts, num_generations=1, seed=None, **more):
        calls.append((num_generations, seed))
        rows = completions(0.0, 0.0, answers=["1", "2"])[:num_generations]
        for row, values in zip(rows, ([0.0, 1.0], [0.5, 0.0])):
            row["rewards_per_func"] = tensor(values)
        return [rows], {}
    rewards = {"a": Reward(None, 5.0, "p", "score"), "b": Reward(None, 0.1, "q", "score")}
    metrics, _ = grpo.evaluate(complete, asked, rewards, SimpleNamespace(eval_samples=2, seed=3))
    assert calls[0] == (1, None) and calls[1][0] == 2 and calls[1][1] not in (None, 3)
    assert metrics["eval/best_of@2"] == 1 and metrics["eval/pass@2"] == 1 and metrics["eval/best_of@1"] == 0
    calls.clear()
    monkeypatch.setattr(ppo, "rollout", lambda model, prompts, rewards, args, run, *more, **named: complete(prompts, *more, **named))
    ppo.evaluate(None, asked, rewards, SimpleNamespace(seed=3), None)
    assert calls == [(1, None)]


# ---- warnings ----------------------------------------------------------------------------------------------------------

def test_the_chosen_have_lost_a_fifth_of_what_they_had(monkeypatch, tmp_path, capsys):
    """From -10 to -12.2 nats: 2.2 is more than a fifth of 10, and less than one of 12.2."""
    metrics = {"eval/loss": 0.5, "eval/rewards/chosen": -2.2 * 0.1, "eval/logps/chosen": -12.2}
    monkeypatch.setattr(dpo, "evaluate", lambda *args: (metrics, []))
    run(dpo, tmp_path / "out", "--beta", 0.1, "--max_steps", 1, "--batch_size", 2, "--eval_fraction", 0.02)
    assert "the chosen completions have lost 2.2 nats" in capsys.readouterr().out


def test_equal_losses_do_not_rise():
    seen = []
    fake = SimpleNamespace(state={"eval_losses": []}, warn=lambda name, sign, sentence: seen.append(sign))
    for loss in (1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0):
        common.Run.watch_loss(fake, loss)
    assert seen == [False] * 6 + [True]


def test_the_kl_that_is_warned_of_is_that_of_a_completion(tmp_path, capsys):
    flags = ["--eval_fraction", 0, "--batch_size", 4, "--num_generations", 4, "--max_steps", 2, "--num_iterations", 2, "--kl_coef", 0.1,
             "--learning_rate", 1e-4, "--warmup_steps", 0]
    _, moved = run(grpo, tmp_path / "a", *flags)
    whole = moved["kl"] * moved["completions/mean_length"]
    assert "nats a completion from its reference" not in capsys.readouterr().out and whole > 4 * moved["kl"] > 0
    run(grpo, tmp_path / "b", *flags, "--kl_warn", whole / 2)
    assert f"the policy is {whole:.3g} nats a completion from its reference" in capsys.readouterr().out


# ---- the audit page ----------------------------------------------------------------------------------------------------

def test_the_page_names_what_it_shows():
    """A ratio that is clipped above has an arrow up; the old value is the one before the update."""
    row = {"input_ids": [5, 6], "sampled": 1.0}
    mb, mask = SimpleNamespace(rows=[row], places=[0]), tensor([[0.0, 1.0]])
    columns = {"values": tensor([[0.0, 0.1]]), "new_values": tensor([[0.0, 0.4]]), "clip_ratio/low_mean": tensor([[False, False]]),
               "clip_ratio/high_mean": tensor([[False, True]])}
    (_, _, ids, _, kept), = common.page_rows(mb, mask * 2, mask, columns)
    shown = {name: round(x[1].item(), 6) for name, x in kept.items()}
    assert ids == [5, 6] and shown == {"mask": 1, "old value": 0.1, "value": 0.4, "clipped": 1, "share": 2}
    page = common.page_row("row 1", "", ["a", "b"], {name: x.tolist() for name, x in kept.items()}, 2)
    assert page.count("▲ above") == 1 and "▼" not in page


def test_the_page_of_pairs_has_their_own_scores_and_reference():
    mask = tensor([[0.0, 1], [1, 0], [0, 1], [0, 1]])  # two chosen rows, then two rejected ones
    shown = reward_model.page_columns(SimpleNamespace(mask=mask), tensor([[2.0, 1.0], [3.0, 5.0]]), None)["score"]
    assert shown.tolist() == [[0, 2], [3, 0], [0, 1], [0, 5]]
    mb = SimpleNamespace(mask=torch.ones(2, 2), logprobs=tensor([[-1.0, -2], [-2, -2]]), ref_logprobs=tensor([[-3.0, -3], [-2, -2]]),
                         ref_sum=tensor([[-6.0], [-4.0]]), weight=torch.ones(2, 1))
    args = SimpleNamespace(loss_type="sigmoid", beta=0.1, label_smoothing=0.0, sft_coef=0.0)
    columns = dpo.pair_shares(mb, args)["columns"]
    assert columns["ref_logprobs"].tolist() == [[-3, -3], [-2, -2]] and columns["logprobs"].tolist() == [[-1, -2], [-2, -2]]
    close(columns["reward"].tolist(), [[0.2, 0.1], [0.0, 0.0]])


# ---- denominators ------------------------------------------------------------------------------------------------------

def updates_of(script, monkeypatch, out, *flags):
    """The rows of each update as micro_batches is given them -> (lists of copies, what was logged)."""
    seen, micro_batches = [], common.Run.micro_batches

    def spy(self, groups, fields=(), module=None, *more):
        if module is not None:
            seen.append([dict(row) for row in groups])
        return micro_batches(self, groups, fields, module, *more)
    monkeypatch.setattr(common.Run, "micro_batches", spy)
    logged = run(script, out, "--eval_fraction", 0, "--max_steps", 4, "--num_minibatches", 2, "--num_iterations", 1, "--learning_rate", 1e-4,
                 "--lr_scheduler_type", "linear", "--warmup_steps", 0, *flags)
    return seen, logged


@pytest.mark.parametrize("script", [grpo, ppo])
def test_an_update_is_a_mean_over_its_own_minibatch(script, monkeypatch, tmp_path):
    flags = {grpo: ["--batch_size", 4, "--num_generations", 4, "--temperature", 1.5], ppo: ["--batch_size", 16, "--temperature", 1.5]}[script]
    seen, logged = updates_of(script, monkeypatch, tmp_path / "out", *flags)
    assert len(seen) == 4 and all(len(rows) == 8 for rows in seen)
    close([metrics["learning_rate"] for metrics in logged], [1e-4, 0.75e-4, 0.5e-4, 0.25e-4])
    tokens = 0
    for rows, metrics in zip(seen, logged):
        tokens += sum(len(row["input_ids"]) for row in rows)
        assert metrics["num_tokens"] == tokens
        assert sum(row["weight"] * row["mask"].sum().item() for row in rows) == pytest.approx(1, rel=1e-5)
        assert metrics["trained_tokens"] == sum(len(row["completion_ids"]) for row in rows)
    if script is ppo:  # whitened over the whole rollout, and not again in each minibatch
        each = [torch.cat([row["advantages"][row["mask"].bool()] for row in rows]) for rows in seen[:2]]
        assert abs(torch.cat(each).mean()) < 1e-5 and abs(torch.cat(each).std() - 1) < 1e-2
        assert all(abs(part.mean()) > 1e-3 for part in each)


def test_what_no_reward_scores_is_in_no_denominator_of_grpo(monkeypatch, tmp_path):
    (tmp_path / "r.py").write_text("def some(completions):\n    return [None if i % 2 else float(i % 4 == 0) for i in range(len(completions))]\n")
    seen, logged = updates_of(grpo, monkeypatch, tmp_path / "out", "--batch_size", 4, "--num_generations", 4, "--reward_funcs", f"{tmp_path}/r.py:some")
    assert [len(rows) for rows in seen] == [4] * 4 and not any(math.isnan(row["score"]) for rows in seen for row in rows)
    assert logged[0]["trained_tokens"] == sum(len(row["completion_ids"]) for row in seen[0])


# ---- what a seed decides -----------------------------------------------------------------------------------------------

def loaded(*flags, script=sft, **more):
    args = common.parse_args(script.Args, [os.path.join(TINY, f"{script.__name__}.json"), "--model_name_or_path", CHECKPOINT, *map(str, flags)])
    args.bf16 = False
    return common.load_model(args, common.load_tokenizer(args), **more)


def test_random_weights_are_those_of_the_seed():
    first, again, other = (torch.cat([p.flatten() for name, p in loaded("--lora_r", 4, "--seed", seed).named_parameters() if "lora_A" in name])
                           for seed in (1, 1, 2))
    assert first.equal(again) and not first.isclose(other).any()


@pytest.mark.parametrize("script", [grpo, ppo])
def test_samples_are_those_of_the_seed(script, monkeypatch, tmp_path):
    seen, sample = [], script.sample
    monkeypatch.setattr(script, "sample", lambda model, prompts, uniforms, *more: seen.append(uniforms) or sample(model, prompts, uniforms, *more))
    for seed in (1, 1, 2):
        run(script, tmp_path / "out", "--eval_fraction", 0, "--batch_size", 2, "--max_steps", 1, "--seed", seed, "--overwrite_output_dir",
            *["--num_generations", 2] * (script is grpo), *["--num_minibatches", 1] * (script is ppo))
    first, again, other = (uniforms.flatten().sort().values for uniforms in seen)
    assert first.equal(again) and not first.equal(other)


def test_demonstrations_and_noise_are_those_of_the_seed():
    rows, args = [{"mask": torch.ones(3), "input_ids": [1, 2, 3], "trained": 3, "i": i} for i in range(40)], SimpleNamespace(batch_size=80, num_generations=1, num_minibatches=1, sft_coef=1)
    mixed = {seed: [row["i"] for row in ppo.nll_rows(rows, 0, 0, SimpleNamespace(**vars(args), seed=seed))] for seed in (1, 2)}
    assert len(mixed[1]) == 8 and mixed[1] != mixed[2]
    mb = SimpleNamespace(mask=torch.ones(1, 3), rows=rows[:1], places=[0])
    model = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=torch.zeros(9, 4)))
    noise = [sft.starting_delta(model, mb, SimpleNamespace(adversarial="neftune", seed=seed, neftune_noise_alpha=5.0), "key") for seed in (0, 0, 1)]
    assert noise[0].equal(noise[1]) and not noise[0].isclose(noise[2]).any()


# ---- LoRA and dropout --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", [sft, reward_model])
def test_alpha_and_dropout_reach_the_adapters(script):
    model = loaded("--lora_r", 4, "--lora_alpha", 64, "--lora_dropout", 0.2, script=script, dropout=True,
                   **({"score_names": ["score"]} if script is reward_model else {}))
    layers = [part for part in model.modules() if isinstance(getattr(part, "scaling", None), dict)]
    assert layers and all(layer.scaling["default"] == 64 / 4 and layer.lora_dropout["default"].p == 0.2 for layer in layers)


@pytest.mark.parametrize("script", [sft, reward_model])
def test_dropout_is_drawn_anew_for_each_step_and_process(script, monkeypatch, tmp_path):
    """One pair or row, trained twice from the same weights: only what dropout drops differs."""
    name = "addition.jsonl" if script is sft else "preferences.jsonl"
    with open(os.path.join(TINY, name)) as file:
        (tmp_path / name).write_text(file.readline())
    flags = ["--dataset_name", tmp_path / name, "--eval_fraction", 0, "--batch_size", 1, "--model_name_or_path", CHECKPOINT]
    monkeypatch.setattr(script, "make_optimizer", RecordGradients)
    run(script, tmp_path / "a", *flags, "--max_steps", 2, "--lora_r", 4, "--lora_dropout", 0.5)
    one, two = RecordGradients.last.gradients
    assert (one - two).norm() > 1e-2 * one.norm() > 0

    class Drawn(Exception):
        pass

    def drawn(process):
        """The key of the first step's dropout, in a run that is told that it is this one of two processes."""
        opened, stream, last = common.Run.__init__, script.stream, []

        def begun(self, *args, **state):
            opened(self, *args, **state)
            self.place = process, 2

        def seeded(_):
            if last and last[-1][1] == "dropout":
                raise Drawn
        with monkeypatch.context() as patch, pytest.raises(Drawn):
            patch.setattr(common.Run, "__init__", begun)
            patch.setattr(script, "stream", lambda *key: last.append(key) or stream(*key))
            patch.setattr(torch, "manual_seed", seeded)
            run(script, tmp_path / f"p{process}", *flags, "--max_steps", 1)
        return last[-1]
    assert drawn(0) != drawn(1)


@pytest.mark.parametrize("script, kept", [(sft, True), (reward_model, True), (dpo, False), (grpo, False)])
def test_a_models_own_dropout_is_used_where_no_two_passes_are_compared(script, kept, monkeypatch, tmp_path):
    common.AutoModelForCausalLM.from_pretrained(CHECKPOINT).save_pretrained(tmp_path / "m")
    common.AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.3'))
    models, load = [], common.load_model
    monkeypatch.setattr(common, "load_model", lambda *args, **more: models.append(load(*args, **more)) or models[-1])
    run(script, tmp_path / "out", "--model_name_or_path", tmp_path / "m", "--eval_fraction", 0, "--batch_size", 2, "--max_steps", 1)
    assert any(common.dropout_rates(models[0])) == kept


# ---- defaults, data, the best weights ----------------------------------------------------------------------------------

@pytest.mark.parametrize("script, whole, lora", [(sft, 2e-5, 2e-4), (dpo, 1e-6, 1e-5), (reward_model, 1e-5, 1e-4), (ppo, 3e-6, 3e-5), (grpo, 1e-6, 1e-5)])
def test_the_learning_rate_that_is_not_given(script, whole, lora):
    for adapted, want in ((False, whole), (True, lora)):
        args = script.Args(model_name_or_path="m", dataset_name="d.jsonl")
        args.bf16 = False
        args.resolve(adapted, False)
        assert args.learning_rate == want


def test_pairs_are_held_out_by_their_prompt_alone(tmp_path, tokenizer):
    rows = [{"prompt": f"{i}+1", "chosen": f"{i}{k}", "rejected": "no"} for i in range(10) for k in (1, 2)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = common.parse_args(dpo.Args, [os.path.join(TINY, "dpo.json"), "--dataset_name", str(tmp_path / "d.jsonl"), "--eval_fraction", "0.3"])
    train, held = dpo.load_pairs(args, tokenizer)
    trained, kept = ({pair["prompt"] for pair in pairs} for pairs in (train, held))
    assert len(train) == 14 and len(held) == 6 and not trained & kept


def test_prompts_that_are_asked_in_an_evaluation_are_cut(tmp_path, tokenizer):
    row = {"prompt": "say 7" * 30, "completion": "7", "answer": "7"}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row | {"prompt": f"{i}" + row["prompt"]}) + "\n" for i in range(10)))
    args = common.parse_args(sft.Args, [os.path.join(TINY, "sft.json"), "--dataset_name", str(tmp_path / "d.jsonl"), "--eval_fraction", "0.2", "--max_length", "40"])
    _, held = sft.load_rows(args, tokenizer)
    assert [len(row["prompt_ids"]) for row in held] == [40, 40]


def test_a_scored_conversation_is_scored_at_its_last_answer():
    """The template rewrites earlier turns, which gives a row a turn."""
    t = make_tokenizer(QWEN3, IM, eos="<|im_end|>")
    turns = [common.turn("user", "a"), common.turn("assistant", "<think>b</think>c"), common.turn("user", "5"), common.turn("assistant", "<think>6</think>7")]
    assert len(common.encode_conversation(t, turns)) == 2
    rows = reward_model.encode_scored_rows([(({"messages": turns}, {"score": 1.0}), {}, "here")], t, SimpleNamespace(max_length=999, skip_bad_rows=False), Counter(), ["score"])
    assert t.decode(rows[0][0]["input_ids"]).endswith("7<|im_end|>") and rows[0][0]["mask"].sum() == 1


def test_the_best_weights_of_another_folder_are_not_waited_for(tmp_path):
    """A run that goes on elsewhere lacks checkpoints/best: it keeps its own best, however good the earlier one was."""
    flags = ["--keep_best", "--max_steps", 4, "--save_steps", 2, "--save_total_limit", 9, "--eval_steps", 1, "--batch_size", 2, "--eval_fraction", 0.01,
             "--learning_rate", 0.05, "--max_completion_length", 1]
    run(sft, tmp_path / "a", *flags)
    path = tmp_path / "a" / "checkpoints" / "step-00000002" / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"best_loss": 0.0}, path)
    run(sft, tmp_path / "b", *flags, "--resume_from_checkpoint", path.parent)
    assert (tmp_path / "b" / "model" / "config.json").exists() and (tmp_path / "b" / "checkpoints" / "best").exists()


# ---- rows --------------------------------------------------------------------------------------------------------------

def test_where_rows_are_cut_and_what_is_counted(tokenizer):
    turns = [common.turn(role, text) for role, text in (("user", "q" * 9), ("assistant", "a"), ("user", "q"), ("assistant", "b"))]
    part, = common.encode_conversation(tokenizer, turns)
    assert part["start"] == part["mask"].index(1), "the first answer is kept, and not the last"
    pair = {"prompt": [turns[0]], "chosen": [common.turn("assistant", "a")], "rejected": [common.turn("assistant", "b" * 50)], "margin": 0}
    counts = Counter()
    found, = common.encode_pairs([(pair, {}, "here")], tokenizer, 30, counts)
    assert counts["cut to 30 tokens"] == 1 and len(found["rows"][1]["input_ids"]) == 30


def test_a_demonstration_may_fill_its_room_and_accuracy_judges_before_code(tokenizer):
    turns = [common.turn("user", "1+1")]
    whole = common.upto_answer(common.encode_conversation(tokenizer, [*turns, common.turn("assistant", "2")])[0])["input_ids"]
    for room, kept in ((0, True), (1, False)):
        prompts = [{"turns": turns, "row": {"demonstration": text}, "place": "here"} for text in ("2", "")] + [
            {"turns": turns, "row": {"demonstration": ""}, "place": "there"}]
        args = SimpleNamespace(demo_threshold=0.0, max_prompt_length=4, max_completion_length=len(whole) - 4 - room, skip_bad_rows=False, dataset_name="d")
        rewards = {"code": Reward(None, 1.0), "accuracy": Reward(None, 1.0)}
        if kept:
            assert common.add_demonstrations(prompts, rewards, args, tokenizer) == 1 and "demonstration" in prompts[0]
        else:
            with pytest.raises(common.UserError, match="all demonstrations are longer"):
                common.add_demonstrations(prompts, rewards, args, tokenizer)
    group = completions(0.0, nan, 0.0)
    for row in group:
        row["prompt"] = {"demonstration": {"note": "shown"}}
    assert grpo.demonstrate(group, 0.0, 0)[0]["note"] == "shown", "what no reward judges is no vote"


def test_lines_weights_and_keys_of_data(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'\n{"text": "a"}\n\n{"text": "b"}\n')
    assert [place.rpartition(":")[2] for _, place in common.read_rows(str(tmp_path / "d.jsonl"))] == ["2", "4"]
    assert common.unused_names({"messages": [], "weight": "1.0"}, ("messages",), ()) == {"column 'weight'"}
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "training": 0}, {"role": "assistant", "content": "b", "train": 1}]
    assert [m["train"] for m in common.to_messages(said)] == [False, False, True]


def test_every_evaluation_row_whose_prompt_is_trained_is_counted(tmp_path, tokenizer, capsys):
    row = json.dumps({"prompt": "1+1", "chosen": "2", "rejected": "3"})
    (tmp_path / "d.jsonl").write_text(row)
    (tmp_path / "e.jsonl").write_text(row + "\n" + row.replace("3", "4"))
    args = common.parse_args(dpo.Args, [os.path.join(TINY, "dpo.json"), "--dataset_name", str(tmp_path / "d.jsonl"), "--eval_dataset_name", str(tmp_path / "e.jsonl")])
    dpo.load_pairs(args, tokenizer)
    assert "2 of 2 evaluation rows have a prompt that is trained on too" in capsys.readouterr().out


def test_pairs_are_cut_by_their_longer_side():
    """Two pairs of rows of 2 and 10 tokens: padded they are 20 tokens each, so 24 hold one."""
    row = lambda n: {"input_ids": [1] * n, "mask": [0] + [1] * (n - 1)}
    fake = SimpleNamespace(args=SimpleNamespace(micro_batch_tokens=24), place=(0, 1), device="cpu", doing="here")
    assert [len(mb.rows) for mb in common.Run.micro_batches(fake, [[row(2), row(10)], [row(10), row(2)]])] == [2, 2]


# ---- models ------------------------------------------------------------------------------------------------------------

def test_only_a_frozen_base_is_held_in_bf16():
    args = SimpleNamespace(bf16=True, trust_remote_code=False, attn_implementation=None, load_in_4bit=False)
    assert common.load_base(CHECKPOINT, args).dtype == torch.float32 and common.load_base(CHECKPOINT, args, frozen=True).dtype == torch.bfloat16


def test_a_reward_model_that_cannot_read_it_all_reads_the_first_token_and_the_end(tmp_path, monkeypatch, tokenizer):
    torch.manual_seed(0)
    model = common.AutoModelForSequenceClassification.from_pretrained(CHECKPOINT, num_labels=1, pad_token_id=tokenizer.pad_token_id).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(common, "max_positions", lambda model: 6)
    said = [common.turn("user", "12+34"), common.turn("assistant", "46")]
    ids = tokenizer.apply_chat_template(said, return_dict=False)
    _, score = common.load_reward_model(str(tmp_path))
    close(score([said]).tolist(), model(tensor([ids[:1] + ids[-5:]])).logits.tolist(), 1e-5)


def test_a_card_lists_no_defaults():
    args = grpo.Args(model_name_or_path=CHECKPOINT, dataset_name="d.jsonl", learning_rate=0.5)
    card = common.model_card(args, common.AutoModelForCausalLM.from_pretrained(CHECKPOINT))
    assert '"learning_rate": 0.5' in card and "reward_funcs" not in card and "sft_coef" not in card


def test_the_reference_computes_as_the_policy_does(tmp_path):
    """bf16, adapters, nothing precomputed: at the start the two are the same to the last bit."""
    first = run(dpo, tmp_path / "out", "--bf16", True, "--lora_r", 4, "--precompute_ref_log_probs", False, "--max_steps", 1, "--batch_size", 4, "--eval_fraction", 0)[0]
    assert first["rewards/margins"] == 0 and first["dpo_loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_the_format_is_that_of_the_prompts_alone(tmp_path, tokenizer):
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}))
    args = common.parse_args(ppo.Args, [os.path.join(TINY, "ppo.json"), "--format", "prompt", "--sft_dataset", str(tmp_path / "m.jsonl"), "--sft_coef", "0.1"])
    assert len(ppo.load_demonstrations(args, tokenizer, [])) == 1


# ---- the run -----------------------------------------------------------------------------------------------------------

def begun(**more):
    """A Run that has read nothing: two steps after it went on at step 8 of 20, ten seconds ago."""
    made, said = object.__new__(common.Run), SimpleNamespace(disable=True, set_postfix_str=lambda *args, **more: None, update=lambda n: None)
    made.__dict__.update({"state": {"step": 9, "num_tokens": 1000}, "args": SimpleNamespace(logging_steps=10), "first": 8, "total_steps": 20, "tokens": 0,
                          "begun": time.time() - 10, "bar": said, "writes": False, "track": None, **more})
    return made


def test_what_is_left_is_reckoned_from_where_this_command_began(capsys):
    begun().done({"loss": 1.0}, 100, ("loss",))
    assert re.search(r"^step 10/20  loss 1  10 tok/s  0:00:50 left$", capsys.readouterr().out, re.M)
    common.spoken.at = time.monotonic()
    begun(total_steps=11, state={"step": 10, "num_tokens": 0}).done({"loss": 1.0}, 100, ("loss",))
    assert "step 11/11" in capsys.readouterr().out, "the last step is shown, whatever --logging_steps says"


def test_evaluations_reach_the_tracker_at_any_step():
    seen = []
    run = begun(track="x", accelerator=SimpleNamespace(log=lambda metrics, step: seen.append(step)))
    for metrics in ({"loss": 1.0}, {"eval/loss": 1.0}):
        run.log(metrics)
    assert seen == [9]


def test_a_run_goes_on_with_the_same_evaluation_rows():
    fake = begun(tokenizer=SimpleNamespace(chat_template="t"), check_same=lambda found: None, args=SimpleNamespace(model_name_or_path=CHECKPOINT), state={"data": None})
    rows = [{"input_ids": [i], "mask": [1]} for i in range(3)]
    fake.check_data(rows[:1], rows)
    fake.check_data(rows[:1], rows)
    with pytest.raises(common.UserError, match="other evaluation data: give the same"):
        fake.check_data(rows[:1], [rows[0], rows[0], rows[2]])


def test_what_may_differ_when_a_run_goes_on():
    assert common.MAY_CHANGE == set("output_dir overwrite_output_dir resume_from_checkpoint save_steps save_total_limit logging_steps log_with merge audit "
                                    "micro_batch_tokens rollout_batch_size gradient_checkpointing reward_timeout kl_warn audit_step sampler_device".split())


def test_what_was_said_off_is_off_and_a_run_without_steps_evaluates(tmp_path):
    args = common.parse_args(sft.Args, [os.path.join(TINY, "sft.json"), "--eval_on_start", "False"])
    assert not common.is_on(args, "eval_on_start")
    metrics = run(grpo, tmp_path / "out", "--num_train_epochs", 0, "--eval_on_start", "False", "--eval_fraction", 0.003)
    assert [name for line in metrics for name in line if name == "eval/reward"] == ["eval/reward"]


def test_a_reward_that_stands_still_does_not_excuse_repetition():
    seen, first = {}, {"completions/mean_length": 9.0, "completions/distinct_4": 1.0}
    fake = SimpleNamespace(state={"first": first, "held_rewards": [0.5, 0.5]}, samples_file="s", warn=lambda name, sign, sentence: seen.update({name: sign}))
    common.warn_of_drift(fake, first | {"completions/distinct_4": 0.4})
    assert seen == {"completions/mean_length": False, "completions/distinct_4": True}


def test_the_largest_difference_of_a_step_is_that_of_all_its_micro_batches():
    sums = common.Sums(SimpleNamespace(audit_step=None, step=0))
    for value in (0.3, 0.1):
        sums.add(SimpleNamespace(mask=torch.ones(1, 2)), {}, {"a_difference": torch.full((1, 2), value)})
    close([sums.named["a_difference/max"].item(), sums.named["a_difference"].item()], [0.3, 0.8])
