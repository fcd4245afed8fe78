"""A run killed anywhere and resumed ends bit-equal to one that was never stopped: real SIGKILLs of forked children."""

import glob
import json
import os
import shutil
import signal

import pytest
from conftest import TINY, in_child, run
from safetensors.torch import load_file

import common
import dpo
import grpo
import ppo
import reward_model
import sft

RUNS = {  # name -> (script, flags); every run crosses an epoch or has several updates a rollout, and evaluates
    "sft": (sft, ["--max_steps", 7, "--eval_steps", 3, "--save_steps", 2, "--keep_best", "--max_completion_length", 4]),
    "sft-lora-dropout": (sft, ["--max_steps", 5, "--save_steps", 2, "--lora_r", 4, "--lora_dropout", 0.2,
                               "--model_name_or_path", os.path.join(TINY, "sft")]),
    "sft-fgm": (sft, ["--max_steps", 3, "--eval_steps", 2, "--save_steps", 1, "--adversarial", "fgm", "--freeze_layers", 0.5,
                      "--model_name_or_path", os.path.join(TINY, "sft"), "--max_completion_length", 0]),
    "sft-neftune": (sft, ["--max_steps", 3, "--eval_steps", 2, "--save_steps", 1, "--adversarial", "neftune", "--lora_r", 4,
                          "--model_name_or_path", os.path.join(TINY, "sft"), "--max_completion_length", 0]),
    "grpo": (grpo, ["--max_steps", 8, "--save_steps", 2, "--num_iterations", 2, "--kl_coef", 0.05, "--eval_steps", 3]),
    "dpo": (dpo, ["--max_steps", 5, "--eval_steps", 3, "--save_steps", 2]),  # precomputed reference
    "sft-8bit": (sft, ["--max_steps", 3, "--save_steps", 1, "--optim", "adamw_8bit", "--model_name_or_path", os.path.join(TINY, "sft"),
                       "--max_completion_length", 0]),
    "dpo-lora": (dpo, ["--max_steps", 3, "--save_steps", 2, "--lora_r", 4, "--max_completion_length", 0]),
    "reward_model": (reward_model, ["--max_steps", 5, "--eval_steps", 3, "--save_steps", 2, "--lora_r", 4, "--lora_dropout", 0.2]),
    "ppo": (ppo, ["--max_steps", 8, "--save_steps", 2, "--eval_steps", 3, "--num_iterations", 2, "--num_minibatches", 1, "--kl_target", 0.1,
                  "--kl_gain", 1, "--learning_rate", 1e-3]),  # two updates a rollout: every second kill is between the passes of one
    "ppo-lora": (ppo, ["--max_steps", 4, "--save_steps", 1, "--num_iterations", 1, "--num_minibatches", 2, "--lora_r", 4, "--share_trunk",
                       "--sft_dataset", os.path.join(TINY, "addition.jsonl"), "--sft_coef", 0.1]),
    "grpo-demo": (grpo, ["--max_steps", 3, "--save_steps", 1, "--demo_threshold", 0, "--demo_column", "completion", "--best_fraction", 0.3,
                         "--sft_coef", 0.5, "--eval_samples", 2]),
    "grpo-drop": (grpo, ["--max_steps", 3, "--save_steps", 1, "--drop_flat_groups", "--overlong_penalty", 40, "--temperature", 0.7]),
    "grpo-lora": (grpo, ["--max_steps", 4, "--save_steps", 1, "--lora_r", 4, "--kl_coef", 0.05]),
}

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """20 rows: with 6 a step, an epoch has 4 steps and the last one is short."""
    folder = tmp_path_factory.mktemp("data")
    for name, to in (("addition.jsonl", "rows.jsonl"), ("preferences.jsonl", "rows.jsonl.pairs.jsonl")):
        with open(os.path.join(TINY, name)) as file:
            (folder / to).write_text("".join(file.readlines()[:20]))
    return str(folder / "rows.jsonl")


def start(name, data, out, *more):
    script, flags = RUNS[name]
    data = f"{data}.pairs.jsonl" if script in (dpo, reward_model) else data
    return lambda: run(script, out, "--dataset_name", data, "--batch_size", 6, "--eval_fraction", 0.2, *flags, *more)


def outcome(out):
    """All that must be equal: final weights, metrics and samples, byte for byte."""
    with open(os.path.join(out, "metrics.jsonl"), "rb") as m:
        metrics = m.read()
    weights = next(w for w in ("model.safetensors", "adapter_model.safetensors") if os.path.exists(os.path.join(out, "model", w)))
    samples = os.path.join(out, "samples.jsonl")
    return load_file(os.path.join(out, "model", weights)), metrics, open(samples).read() if os.path.exists(samples) else None


def assert_equal(a, b):
    assert a[0].keys() == b[0].keys() and all(a[0][k].equal(b[0][k]) for k in a[0])
    assert a[1:] == b[1:]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The runs that were never stopped, each made when it is first asked for."""
    class Whole(dict):
        def __missing__(self, name):
            out = tmp_path_factory.mktemp(name) / "out"
            assert in_child(start(name, data, out)) == 0
            self[name] = outcome(out)
            return self[name]
    return Whole()


def kill_after_step(step):
    def hook():
        progress = common.RunLog.progress

        def last(self, at, *rest):
            progress(self, at, *rest)
            if at == step:
                os.kill(os.getpid(), signal.SIGKILL)
        common.RunLog.progress = last
    return hook


def kill_while_saving(step, function):
    """Dies in the checkpoint of `step`: half a tensors' file written, before the rename, or after it."""
    def hook():
        module = {"save_file": common, "rename": os, "rmtree": shutil}[function]
        original = getattr(module, function)
        due = lambda path: f"step-{step:08d}" in str(path)

        def dying(*args, **kwargs):
            if function == "save_file" and due(args[1]):
                with open(args[1], "wb") as file:
                    file.write(b"\x10\x00\x00\x00\x00\x00\x00\x00half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            if function == "rename" and due(args[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            return result
        setattr(module, function, dying)
    return hook


def killed_and_resumed(name, data, out, hook):
    def child():
        hook()
        start(name, data, out)()
    assert os.WTERMSIG(in_child(child)) == signal.SIGKILL
    assert in_child(start(name, data, out, "--resume_from_checkpoint", "latest")) == 0
    return outcome(out)


MORE = {"grpo-demo", "sft-8bit", "sft-neftune", "dpo-lora", "grpo-lora", "ppo-lora"}  # the same paths with other weights: in CI


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n in MORE)) for n in RUNS])
def test_killed_after_any_step(name, data, whole, tmp_path):
    for step in range(1, RUNS[name][1][1] + 1):
        assert_equal(killed_and_resumed(name, data, tmp_path / str(step), kill_after_step(step)), whole[name])


@pytest.mark.parametrize("name", ["sft", "grpo", "ppo"])
@pytest.mark.parametrize("function", ["save_file", "rename"])
def test_killed_while_a_checkpoint_is_written(name, function, data, whole, tmp_path):
    for step in (2, 4):
        assert_equal(killed_and_resumed(name, data, tmp_path / str(step), kill_while_saving(step, function)), whole[name])


@pytest.mark.parametrize("name", ["sft", "grpo"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "no state", "not JSON"])
def test_a_damaged_checkpoint_is_passed_over(name, damage, data, whole, tmp_path, capfd):
    def child():
        kill_after_step(5)()
        start(name, data, tmp_path / "out")()
    in_child(child)
    folder = sorted(glob.glob(f"{tmp_path}/out/checkpoints/step-*"))[-1]
    tensors, state = os.path.join(folder, "tensors.safetensors"), os.path.join(folder, "state.json")
    if damage == "truncated":
        os.truncate(tensors, os.path.getsize(tensors) // 2)
    elif damage == "flipped":
        with open(tensors, "r+b") as file:
            file.seek(-5, 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
    elif damage == "no state":
        os.remove(state)
    else:
        open(state, "w").write('{"step": 4')
    assert in_child(start(name, data, tmp_path / "out", "--resume_from_checkpoint", "latest")) == 0
    assert f"passing over {folder}" in capfd.readouterr().out
    assert_equal(outcome(tmp_path / "out"), whole[name])


def test_latest_without_a_checkpoint_starts_from_the_beginning_and_says_so(data, whole, tmp_path, capfd):
    assert in_child(start("sft", data, tmp_path / "out", "--resume_from_checkpoint", "latest")) == 0
    assert "starting from the beginning" in capfd.readouterr().out
    assert_equal(outcome(tmp_path / "out"), whole["sft"])


@pytest.mark.parametrize("name", ["sft", "grpo", "ppo"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_first(name, number, data, whole, tmp_path, capfd):
    def child():
        progress = common.RunLog.progress

        def first(self, at, *rest):
            progress(self, at, *rest)
            if at == 3:
                os.kill(os.getpid(), number)
        common.RunLog.progress = first
        common.Interrupt.__init__ = INTERRUPT
        start(name, data, tmp_path / "out", "--save_steps", 1000)()
    status = in_child(child)
    assert os.WEXITSTATUS(status) == 128 + number
    assert "--resume_from_checkpoint latest" in capfd.readouterr().err
    assert len(glob.glob(f"{tmp_path}/out/checkpoints/step-*")) == 1
    assert in_child(start(name, data, tmp_path / "out", "--resume_from_checkpoint", "latest")) == 0
    assert_equal(outcome(tmp_path / "out"), whole[name])


INTERRUPT = common.Interrupt.__init__


def test_a_changed_argument_is_refused_by_name_and_a_harmless_one_is_not(data, tmp_path, capfd):
    def child():
        kill_after_step(3)()
        start("sft", data, tmp_path / "out")()
    in_child(child)
    resume = ["--resume_from_checkpoint", "latest"]
    with pytest.raises(common.UserError, match="--learning_rate 0.002 and this run has 0.001"):
        start("sft", data, tmp_path / "out", *resume, "--learning_rate", 1e-3)()
    with open(data) as file:
        (tmp_path / "other.jsonl").write_text(file.read().replace("think", "thunk"))
    shutil.copy(data, tmp_path / "mine.jsonl")
    with pytest.raises(common.UserError, match="--dataset_name"):
        start("sft", tmp_path / "other.jsonl", tmp_path / "out", *resume)()
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert in_child(start("sft", data, tmp_path / "copy", *resume, "--logging_steps", 1, "--micro_batch_tokens", 4000)) == 0


def test_other_data_under_the_same_name_is_refused(data, tmp_path):
    mine = tmp_path / "mine.jsonl"
    shutil.copy(data, mine)
    def child():
        kill_after_step(3)()
        start("sft", mine, tmp_path / "out")()
    in_child(child)
    mine.write_text(mine.read_text().replace("think", "thunk"))
    with pytest.raises(common.UserError, match="written with other training data or rewards"):
        start("sft", mine, tmp_path / "out", "--resume_from_checkpoint", "latest")()


def test_other_evaluation_data_is_refused_where_references_are_kept_by_position(data, tmp_path):
    pairs = f"{data}.pairs.jsonl"
    shutil.copy(pairs, tmp_path / "eval.jsonl")
    flags = ["--eval_dataset_name", tmp_path / "eval.jsonl", "--max_completion_length", 0]

    def child():
        kill_after_step(3)()
        start("dpo", data, tmp_path / "out", *flags)()
    in_child(child)
    lines = (tmp_path / "eval.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "eval.jsonl").write_text("".join(lines[::-1]))
    with pytest.raises(common.UserError, match="written with other training data or rewards"):
        start("dpo", data, tmp_path / "out", *flags, "--resume_from_checkpoint", "latest")()


def test_a_changed_reward_is_refused(data, tmp_path):
    reward = tmp_path / "r.py"
    reward.write_text("def f(completions):\n    return [len(c) / 50 for c in completions]\n")
    def child():
        kill_after_step(3)()
        start("grpo", data, tmp_path / "out", "--reward_funcs", f"{reward}:f")()
    in_child(child)
    reward.write_text(reward.read_text().replace("50", "51"))
    with pytest.raises(common.UserError, match="written with other training data or rewards"):
        start("grpo", data, tmp_path / "out", "--reward_funcs", f"{reward}:f", "--resume_from_checkpoint", "latest")()


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path):
    with pytest.raises(common.UserError, match="step 1: the weights are no longer finite and are not saved"):
        start("sft", data, tmp_path / "out", "--learning_rate", 1e38, "--warmup_steps", 0, "--max_steps", 1)()
    assert not os.path.exists(tmp_path / "out" / "model")


def test_a_folder_with_a_run_is_refused_unless_told(data, tmp_path):
    flags = ["--model_name_or_path", os.path.join(TINY, "sft"), "--dataset_name", data, "--max_steps", "1", "--output_dir", str(tmp_path),
             "--eval_fraction", "0"]
    sft.main(common.parse_args(sft.Args, flags))
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(common.UserError, match="already holds a run.*--resume_from_checkpoint latest.*--overwrite_output_dir"):
        sft.main(common.parse_args(sft.Args, flags))
    assert (tmp_path / "metrics.jsonl").read_text() == before
    sft.main(common.parse_args(sft.Args, [*flags, "--overwrite_output_dir"]))
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_args_json_repeats_the_run(data, whole, tmp_path):
    assert in_child(start("grpo", data, tmp_path / "a")) == 0
    again = lambda: grpo.main(common.parse_args(grpo.Args, [f"{tmp_path}/a/args.json", "--output_dir", f"{tmp_path}/b"]))
    assert in_child(again) == 0
    assert_equal(outcome(tmp_path / "b"), whole["grpo"])
    a, b = (json.load(open(f"{tmp_path}/{x}/args.json")) for x in "ab")
    assert a | {"output_dir": 0} == b | {"output_dir": 0}


def test_old_checkpoints_go_after_the_new_one_is_there(data, tmp_path):
    start("sft", data, tmp_path / "out", "--save_total_limit", 2)()
    assert sorted(os.listdir(tmp_path / "out" / "checkpoints")) == ["best", "step-00000006", "step-00000007"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(data, tmp_path, monkeypatch):
    saved, save_file = [], common.save_file
    def full(tensors, path):
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        saved.append(path)
        save_file(tensors, path)
    monkeypatch.setattr(common, "save_file", full)
    with pytest.raises(common.UserError, match="could not write .*step-00000006.*No space left on device"):
        run(sft, tmp_path / "out", "--dataset_name", data, "--batch_size", 6, "--eval_fraction", 0, "--max_steps", 6, "--save_steps", 2)
    assert sorted(os.listdir(tmp_path / "out" / "checkpoints")) == ["step-00000002", "step-00000004"]
    common.load_checkpoint(tmp_path / "out" / "checkpoints" / "step-00000004")


def test_with_dropout_another_cut_is_refused():
    """Its draws depend on the cut; gpt2 brings dropout of its own."""
    from types import SimpleNamespace
    from transformers import AutoModelForCausalLM, GPT2Config
    checkpoint = None, {"args": {"micro_batch_tokens": 100}}
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=16, n_embd=4, n_layer=1, n_head=1))
    common.check_cut(model, checkpoint, SimpleNamespace(micro_batch_tokens=100))
    with pytest.raises(common.UserError, match="give --micro_batch_tokens 100"):
        common.check_cut(model, checkpoint, SimpleNamespace(micro_batch_tokens=50))
    common.no_dropout(model)
    common.check_cut(model, checkpoint, SimpleNamespace(micro_batch_tokens=50))
