"""A run that is killed anywhere and resumed ends bit-equal to one that was never stopped.

Why these tests prove it, without a kill at each step:
- A process is killed between two writes or inside one. What it leaves is its folder, and nothing else.
- A run is cut at its boundaries alone: a step, in ppo and grpo a rollout. One run saves at each of them, and
  a copy of its folder is kept there. A kill later on leaves this copy and more lines of the logs, perhaps
  half of one. Such lines are put there, and a fresh process goes on from each copy.
- A real SIGKILL of each script shows that the copies are what a kill leaves. That run saves every second
  step, so the equal results also show that saving changes nothing.
- A kill inside the writing of a checkpoint is made for real: half the file, and the file before its rename.
"""

import glob
import io
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, in_child, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

import common
import dpo
import grpo
import ppo
import reward_model
import sft

SFT = os.path.join(TINY, "sft")
SHORT = ["--model_name_or_path", SFT, "--max_completion_length", 0, "--max_steps", 3, "--save_steps", 1]
RUNS = {  # name -> (script, flags); a run crosses an epoch or has several updates a rollout, and evaluates
    "sft": (sft, ["--max_steps", 7, "--eval_steps", 3, "--save_steps", 2, "--keep_best",
                  "--max_completion_length", 4]),
    "sft-lora-dropout": (sft, ["--max_steps", 5, "--save_steps", 2, "--lora_r", 4, "--lora_dropout", 0.2,
                               "--model_name_or_path", SFT]),
    "sft-fgm": (sft, [*SHORT, "--eval_steps", 2, "--adversarial", "fgm", "--freeze_layers", 0.5]),
    "sft-neftune": (sft, [*SHORT, "--eval_steps", 2, "--adversarial", "neftune", "--lora_r", 4]),
    "grpo": (grpo, ["--max_steps", 8, "--save_steps", 2, "--num_iterations", 2, "--kl_coef", 0.05,
                    "--eval_steps", 3, "--num_generations", 4]),
    "dpo": (dpo, ["--max_steps", 5, "--eval_steps", 3, "--save_steps", 2]),  # precomputed reference
    "sft-8bit": (sft, [*SHORT, "--optim", "adamw_8bit"]),
    "dpo-lora": (dpo, ["--max_steps", 3, "--save_steps", 2, "--lora_r", 4, "--max_completion_length", 0]),
    "reward_model": (reward_model, ["--max_steps", 5, "--eval_steps", 3, "--save_steps", 2, "--lora_r", 4,
                                    "--lora_dropout", 0.2]),
    "ppo": (ppo, ["--max_steps", 8, "--save_steps", 2, "--eval_steps", 3, "--num_iterations", 2,
                  "--num_minibatches", 1, "--kl_target", 0.1, "--learning_rate", 1e-3]),
    "ppo-lora": (ppo, ["--max_steps", 4, "--save_steps", 1, "--num_iterations", 1, "--num_minibatches", 2,
                       "--lora_r", 4, "--share_trunk", "--sft_dataset", os.path.join(TINY, "addition.jsonl"),
                       "--sft_coef", 0.1]),
    "grpo-demo": (grpo, ["--max_steps", 3, "--save_steps", 1, "--demo_threshold", 0, "--best_fraction", 0.3,
                         "--sft_coef", 0.5, "--eval_samples", 2]),
    "grpo-drop": (grpo, ["--max_steps", 3, "--save_steps", 1, "--drop_flat_groups", "--overlong_penalty", 40,
                         "--temperature", 0.7, "--num_generations", 4]),
    "grpo-lora": (grpo, ["--max_steps", 4, "--save_steps", 1, "--lora_r", 4, "--kl_coef", 0.05]),
    "grpo-lag": (grpo, ["--max_steps", 6, "--save_steps", 2, "--rollout_lag", 1, "--drop_flat_groups", "--num_iterations", 2,
                        "--temperature", 0.7, "--num_generations", 4]),  # sampled in a process of its own
}
MORE = {"grpo-lag", "grpo-demo", "sft-8bit", "sft-neftune", "dpo-lora", "grpo-lora", "ppo-lora"}  # same paths: in CI
LATEST = ["--resume_from_checkpoint", "latest"]
CATCH_SIGNALS = common.Run.catch_signals  # conftest switches it off


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """20 rows: with 6 a step, an epoch has 4 steps and the last one is short."""
    folder = tmp_path_factory.mktemp("data")
    for name, to in (("addition.jsonl", "rows.jsonl"), ("preferences.jsonl", "rows.jsonl.pairs.jsonl")):
        with open(os.path.join(TINY, name)) as file, open(folder / to, "w") as out:
            for row in [json.loads(line) for line in file][:20]:
                row |= {"demonstration": row["completion"]} if "completion" in row else {}
                out.write(json.dumps(row) + "\n")
    return str(folder / "rows.jsonl")


def start(name, data, out, *more):
    script, flags = RUNS[name]
    data = f"{data}.pairs.jsonl" if script in (dpo, reward_model) else data
    flags = ["--dataset_name", data, "--batch_size", 6, "--eval_fraction", 0.2, *flags, *more]
    return lambda: run(script, out, *flags)


def outcome(out):
    """All that must be equal: final weights, metrics and samples, byte for byte."""
    names = ("model.safetensors", "adapter_model.safetensors")
    weights = next(path for path in (Path(out, "model", name) for name in names) if path.exists())
    samples = Path(out, "samples.jsonl")
    metrics = Path(out, "metrics.jsonl").read_bytes()
    return load_file(weights), metrics, samples.read_bytes() if samples.exists() else None


def assert_equal(a, b):
    assert a[0].keys() == b[0].keys() and all(a[0][k].equal(b[0][k]) for k in a[0])
    assert a[1:] == b[1:]


def run_and_copy(name, data, folder):
    """A run that saves at every boundary -> (its outcome, {step: copy of its folder at that boundary})."""
    def child():
        save_or_leave = common.Run.save_or_leave

        def copied(self):
            save_or_leave(self)
            shutil.copytree(folder / "out", folder / f"at-{self.step:02d}")
        common.Run.save_or_leave = copied
        start(name, data, folder / "out", "--save_steps", 1)()
    assert in_child(child) == 0
    return outcome(folder / "out"), {int(path.name[3:]): path for path in sorted(folder.glob("at-*"))}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The runs that were never stopped, with their copies, each made when it is first asked for."""
    class Whole(dict):
        def __missing__(self, name):
            self[name] = run_and_copy(name, data, tmp_path_factory.mktemp(name))
            return self[name]
    return Whole()


def copy_of(whole, name, step, out):
    """The folder of run `name` as a kill at this boundary leaves it, copied to `out`."""
    return shutil.copytree(whole[name][1][step], out)


def add_lines(out, end, half):
    """What the run `end` wrote to its logs later, up to its end; or `half` of the next line alone."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (end / name).exists():
            here = (out / name).read_bytes() if (out / name).exists() else b""
            later = (end / name).read_bytes()[len(here):]
            line = later.partition(b"\n")[0]
            (out / name).write_bytes(here + (line[:len(line) // 2] if half else later))


@pytest.mark.promise("resume")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n in MORE)) for n in RUNS])
def test_killed_after_any_step(name, data, whole, tmp_path):
    """From every boundary, with whole lines or half a line of what the run wrote to its logs after it."""
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    want, copies = whole[name]
    assert len(copies) >= 2 and max(copies) == RUNS[name][1][RUNS[name][1].index("--max_steps") + 1]
    for step, copy in copies.items():
        out = shutil.copytree(copy, tmp_path / str(step))
        assert Path(common.steps_in(out / "checkpoints")[-1]).name == f"step-{step:08d}"
        add_lines(out, copies[max(copies)], half=step % 4 > 1)
        assert in_child(start(name, data, out, *LATEST)) == 0
        assert_equal(outcome(out), want)


def kill_after_step(step):
    def hook():
        done = common.Run.done

        def last(self, *args, **named):
            done(self, *args, **named)
            if self.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
        common.Run.done = last
    return hook


def kill_while_saving(step, function):
    """Dies in the checkpoint of `step`: half of its file written, or all of it but not yet renamed."""
    def hook():
        module = {"save": torch, "rename": os}[function]
        original = getattr(module, function)

        def dying(what, path):
            if f"step-{step:08d}" in str(path):
                if function == "save":
                    buffer = io.BytesIO()
                    original(what, buffer)
                    Path(path).write_bytes(buffer.getvalue()[:buffer.tell() // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            original(what, path)
        setattr(module, function, dying)
    return hook


def killed_and_resumed(name, data, out, hook):
    def child():
        hook()
        start(name, data, out)()
    assert os.WTERMSIG(in_child(child)) == signal.SIGKILL
    assert in_child(start(name, data, out, *LATEST)) == 0
    return outcome(out)


# in ppo and grpo step 3 is between the passes of a rollout; in the others step 4 comes after an evaluation
@pytest.mark.promise("resume")
@pytest.mark.parametrize("name, step", [("sft", 4), ("dpo", 4), ("reward_model", 4), ("ppo", 3), ("grpo", 3)])
def test_killed_by_a_real_signal(name, step, data, whole, tmp_path):
    got = killed_and_resumed(name, data, tmp_path / "out", kill_after_step(step))
    assert_equal(got, whole[name][0])


@pytest.mark.promise("resume")
@pytest.mark.parametrize("name", ["sft", "grpo", "ppo"])
@pytest.mark.parametrize("function, step", [("save", 4), ("rename", 2)])  # 2 is the first one written
def test_killed_while_a_checkpoint_is_written(name, function, step, data, whole, tmp_path):
    got = killed_and_resumed(name, data, tmp_path / "out", kill_while_saving(step, function))
    assert_equal(got, whole[name][0])


def flip(path, place):
    """One bit of one byte of a file."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte, = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


@pytest.mark.promise("resume")
@pytest.mark.parametrize("name", ["sft", "grpo"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "no state", "not a zip"])
def test_a_damaged_checkpoint_is_passed_over(name, damage, data, whole, tmp_path, capfd):
    out = copy_of(whole, name, 6, tmp_path / "out")
    folder = sorted(glob.glob(f"{out}/checkpoints/step-*"))[-1]
    path = os.path.join(folder, "state.pt")
    if damage == "truncated":
        os.truncate(path, os.path.getsize(path) // 2)
    elif damage == "flipped":
        flip(path, os.path.getsize(path) // 2)
    elif damage == "no state":
        os.remove(path)
    else:
        Path(path).write_text('{"step": 4')
    assert in_child(start(name, data, out, *LATEST)) == 0
    assert f"passing over {folder}" in capfd.readouterr().out
    assert_equal(outcome(out), whole[name][0])


def test_checkpoints_that_cannot_be_read_are_not_replaced(data, whole, tmp_path):
    """A kill leaves none of these, a disk that fails does: the command of a queue that starts it again may not remove them."""
    out = copy_of(whole, "sft", 6, tmp_path / "out")
    folders = common.steps_in(out / "checkpoints")
    for folder in folders:
        os.rename(f"{folder}/state.pt", f"{folder}/away")

    def refused():
        with pytest.raises(common.UserError, match="can be read; --overwrite_output_dir in place of"):
            start("sft", data, out, *LATEST, "--overwrite_output_dir", "False")()
    assert in_child(refused) == 0  # it locks the folder until its process ends
    assert common.steps_in(out / "checkpoints") == folders and all(os.path.exists(f"{folder}/away") for folder in folders)
    assert in_child(start("sft", data, out, "--overwrite_output_dir")) == 0
    assert_equal(outcome(out), whole["sft"][0])


def test_a_runs_own_arguments_do_not_replace_it(data, tmp_path):
    """--overwrite_output_dir was for the run before it."""
    out = tmp_path / "out"
    assert in_child(start("sft", data, out, "--overwrite_output_dir", "--max_steps", 2)) == 0
    before = outcome(out)

    def again():
        with pytest.raises(common.UserError, match="already holds a run"):
            sft.main(common.parse_args(sft.Args, [str(out / "args.json")]))
    args = json.loads((out / "args.json").read_text())
    assert args["overwrite_output_dir"] is None and args["resume_from_checkpoint"] is None
    assert in_child(again) == 0
    assert_equal(outcome(out), before)


def test_going_on_from_an_earlier_checkpoint_makes_the_later_ones_again(data, whole, tmp_path):
    out = tmp_path / "out"
    assert in_child(start("sft", data, out, "--save_steps", 1, "--save_total_limit", 10)) == 0
    folders, there = common.steps_in(out / "checkpoints"), []

    def child():
        save = common.Run.save

        def saved(self, *name):
            save(self, *name)
            there.append(common.steps_in(out / "checkpoints"))
        common.Run.save = saved
        start("sft", data, out, "--save_steps", 1, "--save_total_limit", 3, "--resume_from_checkpoint", folders[1])()
        assert folders[:3] in there and folders[1:4] in there  # not those of steps 5, 6 and 7, which are newer
    assert in_child(child) == 0
    assert common.steps_in(out / "checkpoints") == folders[-3:]
    assert_equal(outcome(out), whole["sft"][0])


def same(a, b):
    """Whether two values of a checkpoint are equal, dicts and lists inside and out."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.dtype == b.dtype and a.equal(b)
    return type(a) is type(b) and a == b


def test_any_flipped_byte_is_noticed_or_harmless(whole, tmp_path):
    """One byte, all its bits flipped: the file is refused, or what is read from it is what was written. Of 50
    bytes spread over the file, of a tensor's record in the zip's directory, and of the zip's end."""
    folder = tmp_path / "step"
    shutil.copytree(common.steps_in(whole["grpo"][1][4] / "checkpoints")[-1], folder)
    path = folder / "state.pt"
    good, state, noticed = path.read_bytes(), common.load_checkpoint(folder), 0
    size, name = len(good), good.rfind(b"/data/0")
    record = good.rfind(b"PK\x01\x02", 0, name)  # it may call the tensor a folder
    spread = {(size - 1) * i // 49 for i in range(50)}
    places = sorted(spread | {*range(record, name + 16)} | {*range(size - 98, size)})
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xff]) + good[place + 1:])
        try:
            read = common.load_checkpoint(folder)
        except Exception:
            noticed += 1
        else:
            assert same(read, state), f"byte {place} of {size}, {place - record} of the record"
    assert noticed > len(places) // 2
    path.write_bytes(good)
    assert same(common.load_checkpoint(folder), state)


def test_latest_without_a_checkpoint_starts_from_the_beginning_and_says_so(data, whole, tmp_path, capfd):
    assert in_child(start("sft", data, tmp_path / "out", *LATEST)) == 0
    assert "starting from the beginning" in capfd.readouterr().out
    assert_equal(outcome(tmp_path / "out"), whole["sft"][0])


def test_killed_before_the_first_checkpoint(data, whole, tmp_path, capfd):
    """What the killed run wrote to its logs is written again."""
    got = killed_and_resumed("sft", data, tmp_path / "out", kill_after_step(1))
    assert "starting from the beginning" in capfd.readouterr().out
    assert_equal(got, whole["sft"][0])


@pytest.mark.parametrize("name", ["sft", "grpo", "ppo"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_first(name, number, data, whole, tmp_path, capfd):
    def child():
        done = common.Run.done

        def first(self, *args, **named):
            done(self, *args, **named)
            if self.step == 3:
                os.kill(os.getpid(), number)
        common.Run.done = first
        common.Run.catch_signals = CATCH_SIGNALS
        start(name, data, tmp_path / "out", "--save_steps", 1000)()
    status = in_child(child)
    assert os.WEXITSTATUS(status) == 128 + number
    assert "--resume_from_checkpoint latest" in capfd.readouterr().err
    (folder,) = glob.glob(f"{tmp_path}/out/checkpoints/step-*")
    assert int(folder[-8:]) == (3 if name == "sft" else 4)  # that step, or the end of its rollout
    assert in_child(start(name, data, tmp_path / "out", *LATEST)) == 0
    assert_equal(outcome(tmp_path / "out"), whole[name][0])


@pytest.mark.parametrize("name, number", [("sft", 1), ("dpo", 2), ("reward_model", 2), ("ppo", 2), ("grpo", 1)])
def test_a_signal_cuts_an_evaluation_which_is_made_again(name, number, data, whole, tmp_path, capfd):
    """The first evaluation, before any step, or the second, after one: the run goes on with it, and every
    line of the log stands there once."""
    def child():
        report, seen = common.Run.report, []

        def cut(self, evaluate, **named):
            seen.append(self.step)

            def evaluate_and_cut():
                evaluate()
                os.kill(os.getpid(), signal.SIGTERM)
                raise AssertionError("the evaluation went on")
            return report(self, evaluate_and_cut if len(seen) == number else evaluate, **named)
        common.Run.report = cut
        common.Run.catch_signals = CATCH_SIGNALS
        start(name, data, tmp_path / "out", "--save_steps", 1000)()
    assert os.WEXITSTATUS(in_child(child)) == 128 + signal.SIGTERM
    assert "without this evaluation" in capfd.readouterr().err
    assert in_child(start(name, data, tmp_path / "out", *LATEST)) == 0
    assert_equal(outcome(tmp_path / "out"), whole[name][0])


def killed(name, data, out, *flags):
    """A run that was killed after step 3, with a checkpoint of step 2."""
    def child():
        kill_after_step(3)()
        start(name, data, out, *flags)()
    assert os.WTERMSIG(in_child(child)) == signal.SIGKILL


def test_a_changed_argument_is_refused_by_name_and_a_harmless_one_is_not(data, whole, tmp_path):
    out = copy_of(whole, "sft", 3, tmp_path / "out")
    with pytest.raises(common.UserError, match="--learning_rate 0.002 and this run has 0.001"):
        start("sft", data, out, *LATEST, "--learning_rate", 1e-3)()
    other = tmp_path / "other.jsonl"
    other.write_text(Path(data).read_text().replace("think", "thunk"))
    with pytest.raises(common.UserError, match="--dataset_name"):
        start("sft", other, out, *LATEST)()
    shutil.copytree(out, tmp_path / "copy")
    harmless = ["--logging_steps", 1, "--micro_batch_tokens", 4000]
    assert in_child(start("sft", data, tmp_path / "copy", *LATEST, *harmless)) == 0


def test_other_data_under_the_same_name_is_refused(data, tmp_path):
    mine = Path(shutil.copy(data, tmp_path / "mine.jsonl"))
    killed("sft", mine, tmp_path / "out")
    mine.write_text(mine.read_text().replace("think", "thunk"))
    with pytest.raises(common.UserError, match="written with other training data, other evaluation data:"):
        start("sft", mine, tmp_path / "out", *LATEST)()


def test_other_evaluation_data_is_refused(data, tmp_path):
    held = Path(shutil.copy(f"{data}.pairs.jsonl", tmp_path / "eval.jsonl"))
    flags = ["--eval_dataset_name", held, "--eval_fraction", 0, "--max_completion_length", 0]
    killed("dpo", data, tmp_path / "out", *flags)
    held.write_text("".join(held.read_text().splitlines(keepends=True)[::-1]))
    with pytest.raises(common.UserError, match="written with other evaluation data:"):
        start("dpo", data, tmp_path / "out", *flags, *LATEST)()


def test_a_changed_reward_is_refused(data, tmp_path):
    reward = tmp_path / "r.py"
    reward.write_text("def f(completions):\n    return [len(c) / 50 for c in completions]\n")
    flags = ["--reward_funcs", f"{reward}:f"]
    killed("grpo", data, tmp_path / "out", *flags)
    reward.write_text(reward.read_text().replace("50", "51"))
    with pytest.raises(common.UserError, match="written with other files of .*r.py:"):
        start("grpo", data, tmp_path / "out", *flags, *LATEST)()


def test_a_resume_names_each_thing_that_has_changed(tmp_path):
    """The base's weights, the adapter, its base, a reward model and its base, a reward's file, the template; in a folder with brackets."""
    folder = tmp_path / "models [1]"
    adapter = {"peft_type": "LORA", "r": 4}
    for name, base in (("base", None), ("adapter", "base"), ("judge base", None), ("judge", "judge base"), ("value", None)):
        (folder / name).mkdir(parents=True)
        (folder / name / ("adapter_model.safetensors" if base else "model.safetensors")).write_bytes(b"weights" * 9)
        if base:
            config = json.dumps(adapter | {"base_model_name_or_path": str(folder / base)})
            (folder / name / "adapter_config.json").write_text(config)
    (folder / "r[1].py").write_text("one")
    rewards = {"f": common.Reward(None, 1.0, str(folder / "r[1].py")), "built in": common.Reward(None, 1.0),
               "judge": common.Reward(None, 1.0, str(folder / "judge"), "score")}
    run = SimpleNamespace(args=SimpleNamespace(model_name_or_path=str(folder / "adapter"), value_model=str(folder / "value")), state={"data": None},
                          tokenizer=SimpleNamespace(chat_template="a"), check_same=lambda found: None)
    rows = [{"prompt_ids": [1, 2], "place": "here"}]
    check = lambda rows=rows, held=(): common.Run.check_data(run, rows, held, rewards)
    check()
    check()
    assert run.example == [1, 2]
    for name in ("base/model.safetensors", "adapter/adapter_model.safetensors", "judge base/model.safetensors",
                 "judge/adapter_model.safetensors", "value/model.safetensors", "r[1].py"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-1] + b"!")
        named = folder / name if name.endswith(".py") else (folder / name).parent
        with pytest.raises(common.UserError, match=f"written with other files of {re.escape(str(named))}: give the same"):
            check()
        (folder / name).write_bytes(before)
    run.tokenizer.chat_template = "b"
    with pytest.raises(common.UserError, match="written with other evaluation data, other chat template: "):
        check(held=rows)
    with pytest.raises(common.UserError, match="written with other training data, other chat template: "):
        check([{"prompt_ids": [1, 3]}])
    run.tokenizer.chat_template = "a"
    check()


@pytest.mark.parametrize("size", [1, 2**14, 2**24, 2**24 + 1, 40 * 2**20])
def test_a_fingerprint_reads_small_files_whole_and_of_large_ones_pieces_all_over(size, tmp_path):
    path = tmp_path / "weights"
    with open(path, "wb") as file:
        file.truncate(size)
    want = common.fingerprint_of_file(str(path))
    assert want == common.fingerprint_of_file(str(path))
    for n, place in enumerate((0, size // 3, size // 2, size - 1)):  # a tensor of 64 KiB there, or a byte of a small file
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"%d" % n * min(size - place, 1 if size <= 2**24 else 2**16))
        assert common.fingerprint_of_file(str(path)) != want
        want = common.fingerprint_of_file(str(path))


def test_the_base_under_an_adapter_is_part_of_what_a_checkpoint_depends_on(data, tmp_path):
    base = shutil.copytree(SFT, tmp_path / "base")
    flags = ["--model_name_or_path", base, "--lora_r", 4]
    killed("sft", data, tmp_path / "out", *flags)
    weights = load_file(base / "model.safetensors")
    save_file({name: x * 1.01 for name, x in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(common.UserError, match="written with other files of .*base: "):
        start("sft", data, tmp_path / "out", *flags, *LATEST)()


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, monkeypatch):
    flags = ["--learning_rate", 1e38, "--warmup_steps", 0, "--max_steps", 1]
    with pytest.raises(common.UserError, match="step 1: the loss of the evaluation is not finite"):  # which comes first
        start("sft", data, tmp_path / "out", *flags)()
    monkeypatch.setattr(common.Run, "report", lambda *_: {"eval/loss": 0.0})
    with pytest.raises(common.UserError, match="step 1: the weights are no longer finite and are not saved"):
        start("sft", data, tmp_path / "again", *flags)()
    assert not os.path.exists(tmp_path / "out" / "model")


def test_a_run_that_was_moved_is_not_begun_anew_where_it_was(data, tmp_path, monkeypatch):
    """Its args.json names the old folder: without a word, it would train there from the beginning."""
    assert in_child(start("sft", data, tmp_path / "a")) == 0
    os.rename(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "args.json"
    with pytest.raises(common.UserError, match=f"{path} lies beside checkpoints, but its --output_dir is {tmp_path / 'a'}: add --output_dir {tmp_path / 'b'}"):
        common.parse_args(sft.Args, [str(path), *LATEST])
    assert common.parse_args(sft.Args, [str(path), *LATEST, "--output_dir", str(tmp_path / "b")]).output_dir == str(tmp_path / "b")
    assert common.parse_args(sft.Args, [str(path), "--seed", "1"]).output_dir == str(tmp_path / "a")  # a new run
    os.rename(tmp_path / "b", tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    assert common.parse_args(sft.Args, ["args.json", *LATEST]).output_dir == str(tmp_path / "a")


def test_a_folder_with_a_run_is_refused_unless_told(data, tmp_path, capsys):
    flags = ["--model_name_or_path", SFT, "--dataset_name", data, "--max_steps", "1",
             "--output_dir", str(tmp_path), "--eval_fraction", "0"]
    sft.main(common.parse_args(sft.Args, flags))
    before = (tmp_path / "metrics.jsonl").read_text()
    says = "already holds a run.*--resume_from_checkpoint latest.*--overwrite_output_dir"
    with pytest.raises(common.UserError, match=says):
        sft.main(common.parse_args(sft.Args, flags))
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert "replaces" not in capsys.readouterr().out
    sft.main(common.parse_args(sft.Args, [*flags, "--overwrite_output_dir"]))
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert f"output   before the first step this replaces the run in {tmp_path}\n" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "model")  # as if it had been killed
    sft.main(common.parse_args(sft.Args, [*flags, "--overwrite_output_dir"]))
    assert f"output   before the first step this replaces the run in {tmp_path}, which --resume_from_checkpoint latest would go on with\n" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_is_begun_again_by_its_own_command_alone(data, tmp_path):
    """`latest` may replace what the same command would make again, and nothing else."""
    flags = ["--model_name_or_path", SFT, "--dataset_name", data, "--max_steps", "3", "--output_dir", str(tmp_path), "--eval_fraction", "0"]
    go = lambda *more: sft.main(common.parse_args(sft.Args, [*flags, *more, "--resume_from_checkpoint", "latest"]))
    go()
    for name in ("checkpoints", "model"):  # as if it had been killed before the first checkpoint
        shutil.rmtree(tmp_path / name)
    before = (tmp_path / "metrics.jsonl").read_text()
    refused(lambda: go("--learning_rate", "1e-3"), "already holds a run: choose another --output_dir, or add --overwrite_output_dir to replace it")
    theirs = json.loads((tmp_path / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps({"beta": 0.1, "dataset_name": data}))  # another script's
    refused(go, "already holds a run")
    assert (tmp_path / "metrics.jsonl").read_text() == before
    (tmp_path / "args.json").write_text(json.dumps(theirs | {"date": "2020-01-01"}))  # begun on another day
    go("--logging_steps", "1")
    assert (tmp_path / "model").exists()


def refused(run, sentence):
    """In a child: a process that has failed keeps its folder until it ends."""
    def child():
        with pytest.raises(common.UserError, match=sentence):
            run()
    assert in_child(child) == 0


def test_a_checkpoint_from_elsewhere_does_not_mix_two_runs(data, whole, tmp_path):
    """Gone on with in a folder that holds another run: refused, or that run is replaced whole."""
    other = copy_of(whole, "sft-lora-dropout", 4, tmp_path / "other")
    from_there = ["--resume_from_checkpoint", common.steps_in(whole["sft"][1][4] / "checkpoints")[-1]]
    before = (other / "metrics.jsonl").read_bytes()
    refused(start("sft", data, other, *from_there, "--overwrite_output_dir", False), "other already holds a run")
    assert (other / "metrics.jsonl").read_bytes() == before
    assert in_child(start("sft", data, other, *from_there, "--overwrite_output_dir", True)) == 0
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    assert min(line["step"] for line in lines) == 5


def test_other_weights_under_the_same_name_are_refused(data, tmp_path):
    """An adapter's base, and the model that full training with a reference started from."""
    base = Path(shutil.copytree(SFT, tmp_path / "base"))
    flags = ["--model_name_or_path", base, "--max_completion_length", 4]
    killed("sft-lora-dropout", data, tmp_path / "a", *flags)
    killed("grpo", data, tmp_path / "b", *flags)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][-1] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for name, out in (("sft-lora-dropout", "a"), ("grpo", "b")):
        refused(start(name, data, tmp_path / out, *flags, *LATEST), "written with other files of .*base: give the same")


def test_args_json_repeats_the_run(data, whole, tmp_path):
    want, copies = whole["grpo"]
    file = str(copies[max(copies)] / "args.json")
    again = lambda: grpo.main(common.parse_args(grpo.Args, [file, "--output_dir", f"{tmp_path}/b"]))
    assert in_child(again) == 0
    assert_equal(outcome(tmp_path / "b"), want)
    a, b = (json.loads(Path(path).read_text()) for path in (file, tmp_path / "b" / "args.json"))
    assert a | {"output_dir": 0} == b | {"output_dir": 0}


def test_old_checkpoints_go_after_the_new_one_is_there(data, tmp_path):
    start("sft", data, tmp_path / "out", "--save_total_limit", 2)()
    assert sorted(os.listdir(tmp_path / "out" / "checkpoints")) == ["best", "step-00000006", "step-00000007"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(data, tmp_path, monkeypatch):
    saved, save = [], torch.save

    def full(state, path):
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(state, path)
    monkeypatch.setattr(torch, "save", full)
    flags = ["--batch_size", 6, "--eval_fraction", 0, "--max_steps", 6, "--save_steps", 2]
    with pytest.raises(common.UserError, match="could not write .*step-00000006.*No space left on device"):
        run(sft, tmp_path / "out", "--dataset_name", data, *flags)
    folder = tmp_path / "out" / "checkpoints"
    assert sorted(os.listdir(folder)) == ["step-00000002", "step-00000004"]
    assert common.load_checkpoint(folder / "step-00000004")["step"] == 4


def test_with_dropout_another_cut_is_refused():
    """Its draws depend on the cut; gpt2 brings dropout of its own."""
    checkpoint = {"args": {"micro_batch_tokens": 100}}
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=16, n_embd=4, n_layer=1, n_head=1))
    common.check_cut(model, checkpoint, SimpleNamespace(micro_batch_tokens=100))
    with pytest.raises(common.UserError, match="give --micro_batch_tokens 100"):
        common.check_cut(model, checkpoint, SimpleNamespace(micro_batch_tokens=50))
    common.no_dropout(model)
    common.check_cut(model, checkpoint, SimpleNamespace(micro_batch_tokens=50))
