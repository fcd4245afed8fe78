"""Numbers that decide nothing at once, and so are seldom looked at: logged figures, columns of the audit page, what is drawn
from which seed, denominators where a rollout is cut into minibatches. Each by hand; RIGHT stands beside what a slip would give."""

import json
import math
import os
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
    logged = run(script, out, "--eval_fraction", 0, "--max_steps", 2, "--num_minibatches", 2, "--num_iterations", 1, *flags)
    return seen, logged


@pytest.mark.parametrize("script", [grpo, ppo])
def test_an_update_is_a_mean_over_its_own_minibatch(script, monkeypatch, tmp_path):
    flags = {grpo: ["--batch_size", 4, "--num_generations", 4, "--temperature", 1.5], ppo: ["--batch_size", 16, "--temperature", 1.5]}[script]
    seen, logged = updates_of(script, monkeypatch, tmp_path / "out", *flags)
    assert len(seen) == 2 and all(len(rows) == 8 for rows in seen)
    for rows, metrics in zip(seen, logged):
        assert sum(row["weight"] * row["mask"].sum().item() for row in rows) == pytest.approx(1, rel=1e-5)
        assert metrics["trained_tokens"] == sum(len(row["completion_ids"]) for row in rows)
    if script is ppo:  # whitened over the whole rollout, and not again in each minibatch
        each = [torch.cat([row["advantages"][row["mask"].bool()] for row in rows]) for rows in seen]
        assert abs(torch.cat(each).mean()) < 1e-5 and abs(torch.cat(each).std() - 1) < 1e-2
        assert all(abs(part.mean()) > 1e-3 for part in each)


def test_what_no_reward_scores_is_in_no_denominator_of_grpo(monkeypatch, tmp_path):
    (tmp_path / "r.py").write_text("def some(completions):\n    return [None if i % 2 else float(i % 4 == 0) for i in range(len(completions))]\n")
    seen, logged = updates_of(grpo, monkeypatch, tmp_path / "out", "--batch_size", 4, "--num_generations", 4, "--reward_funcs", f"{tmp_path}/r.py:some")
    assert [len(rows) for rows in seen] == [4, 4] and not any(math.isnan(row["score"]) for rows in seen for row in rows)
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
