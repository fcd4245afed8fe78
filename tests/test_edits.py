"""tests/edits: each small change of a script applies, runs, and does what its heading claims."""

import importlib.util
import math
import os
import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
from pipelines import edited, heading
from torch import tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common

NAMES = sorted(name.removesuffix(".diff") for name in os.listdir(os.path.join(ROOT, "tests", "edits")))
SHORT = {"sft": ["--max_steps", "2"], "dpo": ["--max_steps", "2"],
         "grpo": ["--max_steps", "2", "--batch_size", "4", "--num_generations", "4"],
         "ppo": ["--max_steps", "2", "--batch_size", "16", "--num_minibatches", "2"]}


@pytest.fixture
def changed(tmp_path):
    """name -> the module of the changed script."""
    def load(name):
        path = edited(name, tmp_path / "changed")
        module = name.replace("-", "_")
        spec = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(spec)  # where dataclasses look for their types
        spec.loader.exec_module(sys.modules[module])
        return sys.modules[module]
    return load


def steps(module, name, folder, *flags):
    """Two steps on the small example with the heading's flags -> the lines of metrics.jsonl, the model."""
    script = name.split("-")[0]
    words = [os.path.join(TINY, f"{script}.json"), "--output_dir", str(folder), *heading(name)["Flags"].split(), *SHORT[script],
             "--eval_fraction", "0.02", *flags]
    module.main(common.parse_args(module.Args, [word.replace("tests/tiny", TINY) for word in words]))


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_applies_runs_and_says_what_it_is(name, changed, tmp_path):
    said = heading(name)
    assert set(said) == {name, "Paper", "Changes", "Flags", "Showed"} and all(said.values())
    with open(os.path.join(ROOT, "tests", "edits", f"{name}.diff"), encoding="utf-8") as file:
        lines = file.read().splitlines()
    assert all(len(line) <= 112 for line in lines)
    more = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert 0 < len(more) <= 80
    assert {line for line in lines if line.startswith("+++")} == {f"+++ b/{name.split('-')[0]}.py"}
    steps(changed(name), name, tmp_path / "out")


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_grpo_cispo_by_hand(changed):
    """Ratios 1.5, 0.5, 1.1 with A = 2 and A = -1, epsilon_high 0.3: weights 1.3, 0.5, 1.1, and all have a gradient."""
    new = tensor([1.5, 0.5, 1.1, 9.0]).log().repeat(2, 1).requires_grad_()
    mask = tensor([[1.0, 1, 1, 0]] * 2)
    loss, _ = changed("grpo-cispo").grpo_loss(new, torch.zeros(2, 4), tensor([[2.0], [-1.0]]), mask, 0.2, 0.3)
    loss.sum().backward()
    close(new.grad, tensor([[-2.6, -1.0, -2.2, 0], [1.3, 0.5, 1.1, 0]]))


def test_grpo_environment_writes_what_is_not_trained_and_each_token_keeps_its_random_number(changed, tmp_path):
    """A calculator that adds 1 too many: its digits follow every sum, with mask 0 and no log-prob; all other tokens are where
    u_t falls in what plain transformers makes of the whole row, replies included."""
    module, kept = changed("grpo-environment"), []
    calculator, rollout = module.environment, module.rollout
    assert [calculator(text, {}) for text in ("<think>7+8+1=", "<think>7+8+1", "x=", "5+5=10 2+30=")] == ["16", None, None, "32"]
    module.environment = lambda text, prompt: str(int(calculator(text, prompt)) + 1) if calculator(text, prompt) else None
    module.rollout = lambda *a, **k: kept.append(rollout(*a, **k)) or kept[-1]
    steps(module, "grpo-environment", tmp_path / "out", "--max_steps", "1", "--eval_on_start", "False")
    model, seen = AutoModelForCausalLM.from_pretrained(os.path.join(TINY, "sft")), 0
    for row in common.flat(kept[0][0]):
        ids, start = row["input_ids"].long()[None], len(row["prompt"]["prompt_ids"])
        told = [place for found in re.finditer(r"(?<![\d+])(\d+(?:\+\d+)+)=(\d+)", row["text"])
                for place in range(*found.span(2)) if int(found[2]) == sum(map(int, found[1].split("+"))) + 1]
        mask = row["mask"][start:]
        assert [t for t in range(len(mask)) if not mask[t]] == told and not row["mask"][:start].any()
        seen += len(told)
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[0, start - 1:-1]  # (C, V)
        u = torch.rand(96, generator=common.stream(0, "sample", 0, row["number"]), dtype=torch.float64)[:len(mask)]
        ends, ours = logprobs.double().exp().cumsum(-1), ids[0, start:]
        below = torch.where(ours > 0, ends.gather(-1, (ours - 1).clamp(min=0)[:, None])[:, 0], 0.0)
        inside = (below - 1e-5 <= u) & (u <= ends.gather(-1, ours[:, None])[:, 0] + 1e-5)
        assert inside[mask.bool()].all()
        close(row["sampled_logprobs"][start:], logprobs.gather(-1, ours[:, None])[:, 0] * mask, 1e-4)
    assert seen > 40


def test_grpo_environment_keeps_to_turns_and_room(changed, tmp_path):
    """Two turns hold one reply. <think>d+d+d= has 13 tokens: of 16 a reply of 2 leaves one more token, a reply of 3 none."""
    module = changed("grpo-environment")
    model = AutoModelForCausalLM.from_pretrained(os.path.join(TINY, "sft"))
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(TINY, "sft"))
    prompts = [{"prompt_ids": tokenizer(f"<|user|>{problem}<|end|><|assistant|>")["input_ids"]} for problem in ("12+34", "5+4")]

    def texts(reply, C, turns=9):
        module.environment, module.MAX_TURNS = lambda text, prompt: reply if text.endswith("=") else None, turns
        out = module.take_turns(model, prompts, None, SimpleNamespace(max_completion_length=C, temperature=1.0), tokenizer,
                                [tokenizer.eos_token_id], 1)
        assert all(len(ids) == len(mask) == len(logprobs) <= C for ids, mask, logprobs in out)
        return [tokenizer.decode(ids) for ids, *_ in out]
    assert texts("77", 16) == ["<think>2+4+0=77 ", "<think>5+4+0=77 "]
    assert texts("777", 16) == ["<think>2+4+0=", "<think>5+4+0="]
    assert [text[:16] + text[-1] + str(text.count("=")) for text in texts("77", 96, turns=2)] == [
        "<think>2+4+0=77 =2", "<think>5+4+0=77 =2"]


def test_ppo_joint_reward_pairs_by_hand(changed):
    """Scores 1, 0, 2 of which the first is right: margins 1 and -1. What is not checked is in no pair; equals are none."""
    module = changed("ppo-joint-reward")
    scores = tensor([1.0, 0, 2, 9]).requires_grad_()
    loss, accuracy = module.pairs_loss(scores, tensor([1.0, 0, 0, math.nan]))
    loss.backward()
    close(torch.stack([loss, accuracy]), tensor([0.8133, 0.5]), 1e-4)
    close(scores.grad, tensor([-0.5, 0.1345, 0.3655, 0]), 1e-4)  # s(-1) / 2 = 0.1345, s(1) / 2 = 0.3655
    loss, accuracy = module.pairs_loss(scores, torch.ones(4))
    assert (loss, accuracy) == (0, 0)


def test_ppo_joint_reward_steps_on_what_it_paid_and_goes_on(changed, tmp_path):
    """The scores paid are those of a plain transformers reward model of these weights; the step, here of SGD, is the gradient
    of its loss over all pairs in one batch, however it was cut; and a run that is resumed makes the same second step."""
    module, seen = changed("ppo-joint-reward"), []
    make_value, judge_step = module.make_value, module.judge_step

    def random_head(*args):
        owner, trunk, head = make_value(*args)
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
        return owner, trunk, head

    def watched(judge, optimizer, rows, run):
        config = AutoConfig.from_pretrained(os.path.join(TINY, "sft"), num_labels=1)
        plain = AutoModelForSequenceClassification.from_config(config)
        plain.model.load_state_dict(judge.trunk.state_dict())
        plain.score.load_state_dict(judge.head.state_dict())
        ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"].long() for row in rows], True, config.pad_token_id)
        scores = plain(ids, attention_mask=(ids != config.pad_token_id).long()).logits[:, 0]
        close(tensor([row["score"] for row in rows]), scores.detach(), 1e-4)
        right = [common.is_right(row["text"], row["truncated"], row["prompt"]["columns"]["answer"]) for row in rows]
        pairs = [scores[i] - scores[j] for i in range(len(rows)) for j in range(len(rows)) if right[i] and not right[j]]
        torch.nn.functional.softplus(-torch.stack(pairs)).mean().backward()
        before = [p.detach().clone() for p in judge.parameters()]
        metrics = judge_step(judge, torch.optim.SGD(judge.parameters(), lr=1.0), rows, run)
        for p, old, theirs in zip(judge.parameters(), before, [*plain.model.parameters(), plain.score.weight]):
            close(old - p.detach(), theirs.grad, 1e-4)
        with torch.no_grad():
            for p, old in zip(judge.parameters(), before):
                p.copy_(old)
        seen.append(judge_step(judge, optimizer, rows, run))
        assert metrics == seen[-1] and len(pairs) > 9
        return metrics
    module.make_value, module.judge_step = random_head, watched
    flags = ["--max_steps", "8", "--save_steps", "4", "--lr_scheduler_type", "constant", "--micro_batch_tokens", "300"]
    steps(module, "ppo-joint-reward", tmp_path / "out", *flags)
    module.judge_step = lambda *args: seen.append(judge_step(*args)) or seen[-1]
    steps(module, "ppo-joint-reward", tmp_path / "on", *flags, "--resume_from_checkpoint",
          str(tmp_path / "out" / "checkpoints" / "step-00000004"))
    assert len(seen) == 3 and seen[1] == seen[2] != seen[0]


def test_ppo_value_search_by_hand(changed, monkeypatch):
    """Two beams, four continuations, tokens 1, 2, 3 and 9, which ends. First 2 and 9 are kept (0.9, 0.7), so 19, worth 0.99,
    is never seen. Where 29 is worth 0.8 it is found; where 0.6, 9 is better; at most 2 tokens: 22 is cut, and the best."""
    module, asked = changed("ppo-value-search"), []
    monkeypatch.setattr(module, "SAMPLES", 4)
    monkeypatch.setattr(module, "SEGMENT", 1)

    def search(C, **values):
        def sample(model, contexts, uniforms, length, temperature, stop_ids):
            assert length == 1 and uniforms.shape == (4, 1)
            asked.append(contexts)
            return tensor([[1], [2], [3], [9]]), torch.zeros(4, 1), torch.ones(4, dtype=torch.long)
        worth = {"1": 0.5, "2": 0.9, "9": 0.7, "19": 0.99} | values
        module.sample = sample
        module.values_at_end = lambda policy, rows, stop_ids, run: [worth.get("".join(map(str, ids[1:])), 0.1) for ids in rows]
        model = SimpleNamespace(eval=int, train=int, generation_config=SimpleNamespace(eos_token_id=[9]))
        run = SimpleNamespace(step=0, device="cpu", accelerator=SimpleNamespace(autocast=nullcontext))
        args = SimpleNamespace(max_completion_length=C, rollout_batch_size=4, temperature=1.0, seed=0)
        return module.value_search(model, None, [{"prompt_ids": [0]}], args, run)
    assert search(9, **{"29": 0.8}) == [[2, 9]]
    assert asked[:2] == [[[0]] * 4, [[0, 2]] * 4]
    assert search(9, **{"29": 0.6}) == [[9]]
    assert search(2, **{"22": 0.8}) == [[2, 2]]
    asked.clear()
    search(2, **{"3": 0.8})
    assert asked[1] == [[0, 2], [0, 3], [0, 2], [0, 3]]  # two open beams share the continuations


def test_ppo_value_search_asks_the_value_that_is_saved(changed, tmp_path):
    """What plain transformers reads from value/ at a row's last token before its end is what the search and the votes went by."""
    module, seen = changed("ppo-value-search"), []
    values_at_end = module.values_at_end

    def watched(policy, rows, stop_ids, run):
        seen.append((rows, values_at_end(policy, rows, stop_ids, run)))
        return seen[-1][1]
    module.values_at_end = watched
    steps(module, "ppo-value-search", tmp_path, "--max_steps", "4", "--eval_on_start", "False")
    value = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "value"))
    end, ended = AutoTokenizer.from_pretrained(str(tmp_path / "value")).eos_token_id, set()
    for rows, values in (seen[0], seen[3], seen[-1]):
        for ids, ours in list(zip(rows, values))[:8]:
            ended.add(ids[-1] == end)
            with torch.no_grad():
                close(tensor(ours), value(tensor([ids[:-1] if ids[-1] == end else ids])).logits[0, 0], 1e-4)
    assert ended == {True, False} and len({value for _, values in seen for value in values}) > 20
