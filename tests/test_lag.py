"""grpo.py --rollout_lag 1: which weights sample what, alone and in a process of its own, and what becomes of that process."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, TINY, run
from test_resume import CATCH_SIGNALS, LATEST, assert_equal, outcome
from transformers import AutoModelForCausalLM

import common
import grpo

SHORT = ["--max_steps", 6, "--batch_size", 3, "--num_generations", 4, "--max_completion_length", 64, "--eval_fraction", 0.02,
         "--learning_rate", 1e-3, "--reward_funcs", "edit_distance", "--temperature", 1.5]
LAG = [*SHORT, "--rollout_lag", 1]
ALONE = [*LAG, "--sampler_device", "none"]


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(a[name].equal(b[name]) for name in a)


def test_a_rollout_is_sampled_by_the_policy_of_one_rollout_ago(tmp_path, monkeypatch):
    """Three rollouts of two updates: the weights that sample are those before the updates of the rollout before, the random
    numbers and prompts those of the rollout itself."""
    sampling, before, numbers, model = [], [], [], []
    sample, weigh = grpo.sample, grpo.weigh

    def sampled(policy, prompts, uniforms, *rest):
        model[:] = [policy]
        if uniforms is not None:
            sampling.append(weights_of(policy))
            numbers.append((prompts, uniforms))
        return sample(policy, prompts, uniforms, *rest)

    def weighed(rows, args):
        before.append(weights_of(model[0]))
        return weigh(rows, args)
    monkeypatch.setattr(grpo, "sample", sampled)
    monkeypatch.setattr(grpo, "weigh", weighed)
    seen = []
    for lag in (0, 1):
        for found in (sampling, before, numbers):
            found.clear()
        run(grpo, tmp_path / str(lag), *SHORT, "--num_iterations", 2, "--rollout_lag", lag, *["--sampler_device", "none"] * lag)
        assert len(sampling) == 3 and len(before) == 6 and not same(before[0], before[2])
        for number, weights in enumerate(sampling):
            assert same(weights, before[2 * max(0, number - lag)])
        seen.append(list(numbers))
    for (prompts, uniforms), (others, theirs) in zip(*seen):
        assert prompts == others and uniforms.equal(theirs)
    assert not seen[1][0][1].equal(seen[1][1][1])


@pytest.mark.parametrize("updates", [1, 2])
def test_the_ratio_is_against_the_policy_that_sampled(updates, tmp_path, monkeypatch):
    """Old log-probs are what plain transformers says under the weights that sampled, and the rows' own, in every update."""
    sampling, losses, sample, loss = [], [], grpo.sample, grpo.grpo_loss
    micro_batches = common.Run.micro_batches

    def sampled(policy, prompts, uniforms, *rest):
        if uniforms is not None:
            sampling.append(weights_of(policy))
        return sample(policy, prompts, uniforms, *rest)

    def batches(self, *given):
        for mb in micro_batches(self, *given):
            losses.append(mb)
            yield mb

    def lost(logprobs, old_logprobs, advantage, mask, *rest):
        losses[-1].given = old_logprobs.clone()
        return loss(logprobs, old_logprobs, advantage, mask, *rest)
    monkeypatch.setattr(grpo, "sample", sampled)
    monkeypatch.setattr(grpo, "grpo_loss", lost)
    monkeypatch.setattr(common.Run, "micro_batches", batches)
    metrics = run(grpo, tmp_path, *ALONE, "--num_iterations", updates)
    model, mb = AutoModelForCausalLM.from_pretrained(os.path.join(TINY, "sft")), losses[-1]  # of the last rollout
    model.load_state_dict(sampling[-1], strict=False)
    with torch.no_grad():
        theirs = (model(input_ids=mb.input_ids).logits / 1.5).log_softmax(-1)[:, :-1].gather(-1, mb.input_ids[:, 1:, None])
    theirs = theirs.squeeze(-1) * mb.mask[:, 1:]
    torch.testing.assert_close(mb.given[:, 1:] * mb.mask[:, 1:], theirs, rtol=0, atol=1e-4)
    moved = [m["ratio/deviation"] for m in metrics if "ratio/deviation" in m]
    assert moved[0] < 1e-5 < 1e-4 < max(moved[updates::updates])  # the first rollout alone is of the policy itself


@pytest.mark.promise("lag")
@pytest.mark.parametrize("flags", [
    ["--num_iterations", 2, "--kl_coef", 0.05],
    pytest.param(["--lora_r", 4, "--drop_flat_groups", "--temperature", 0.7], marks=pytest.mark.long),
    pytest.param(["--load_in_4bit", "--lora_r", 4, "--bf16", "True"], marks=pytest.mark.long)], ids=["full", "lora", "4bit"])
def test_a_process_of_its_own_changes_nothing(flags, tmp_path):
    run(grpo, tmp_path / "alone", *ALONE, *flags)
    run(grpo, tmp_path / "beside", *LAG, *flags)
    assert not [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in str(child.cmdline())]
    assert_equal(outcome(tmp_path / "alone"), outcome(tmp_path / "beside"))


# ---- what becomes of the process ---------------------------------------------------------------------------------------

def start(out, *flags, **options):
    """grpo.py as a user runs it."""
    words = [sys.executable, os.path.join(ROOT, "grpo.py"), os.path.join(TINY, "grpo.json"), "--output_dir", out, *LAG, *flags]
    return subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def read_until(process, words):
    """What it says up to a line with these words."""
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(said)


def gone(pid, seconds=20):
    for _ in range(10 * seconds):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def sampler_of(process):
    return int(read_until(process, "sampler  process").rsplit("sampler  process ")[1].split()[0])


@pytest.mark.promise("lag")
@pytest.mark.long
def test_a_killed_run_leaves_no_process_and_goes_on(tmp_path):
    """SIGKILL, and then Ctrl-C for the whole group, as a terminal sends it: the same end as without either."""
    run(grpo, tmp_path / "whole", *ALONE, "--save_steps", 1)
    process = start(tmp_path / "out", "--save_steps", 1)
    sampler = sampler_of(process)
    read_until(process, "step 2/6")
    process.kill()
    assert process.wait() and gone(sampler)
    process = start(tmp_path / "out", "--save_steps", 1, *LATEST, start_new_session=True)
    sampler = sampler_of(process)
    read_until(process, "step 4/6")
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 130 and "stopped at step" in said and "Traceback" not in said and gone(sampler)
    run(grpo, tmp_path / "out", *LAG, "--save_steps", 1, *LATEST)
    assert_equal(outcome(tmp_path / "out"), outcome(tmp_path / "whole"))


@pytest.mark.promise("lag")
@pytest.mark.long
@pytest.mark.parametrize("seconds", [0.2, 1])
def test_ctrl_c_while_the_process_begins_saves_a_checkpoint(seconds, tmp_path):
    """A terminal sends it to both; the other one is still importing."""
    process = start(tmp_path / "out", start_new_session=True)
    sampler = sampler_of(process)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 130 and "stopped at step 1" in said and "Traceback" not in said and gone(sampler)
    assert "leaked" not in said


@pytest.mark.long
def test_the_end_of_a_run_leaves_nothing_behind(tmp_path):
    """Nor a warning of Python's own about semaphores, which comes after the last line."""
    process = start(tmp_path / "out")
    said = process.communicate()[0]
    assert process.returncode == 0 and said.rstrip().splitlines()[-1].startswith("saved"), said[-500:]


def test_a_signal_while_the_next_rollout_is_waited_for_stops_the_run_there(tmp_path, monkeypatch):
    """The updates of the first rollout are made, and no more: a slow sampler is waited for once."""
    monkeypatch.setattr(common.Run, "catch_signals", CATCH_SIGNALS)
    keep, kept = common.Sampler.keep, []

    def signalled(self):
        kept.append(self.run.step)
        if len(kept) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        keep(self)
    monkeypatch.setattr(common.Sampler, "keep", signalled)
    before = [signal.getsignal(number) for number in common.SIGNALS]
    with pytest.raises(SystemExit) as end:
        run(grpo, tmp_path / "out", *ALONE)
    for number, handler in zip(common.SIGNALS, before):
        signal.signal(number, handler)
    assert end.value.code == 128 + signal.SIGTERM and [int(path[-8:]) for path in common.steps_in(tmp_path / "out" / "checkpoints")] == [1]


@pytest.mark.long
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_sampler_that_dies_or_hangs_ends_the_run_with_a_sentence(how, tmp_path, monkeypatch):
    monkeypatch.setattr(common.Sampler, "SILENT", 1)
    begin = common.Sampler.begin

    def begun(self, step):
        begin(self, step)
        os.kill(self.process.pid, signal.SIGKILL if how == "dies" else signal.SIGSTOP)
        held.append(self.process.pid)
    held = []
    monkeypatch.setattr(common.Sampler, "begin", begun)
    words = "ended with exit code -9" if how == "dies" else "has done nothing for [34] s"
    with pytest.raises(common.UserError, match=rf"^the process that samples \(--rollout_lag 1\) {words}"):
        run(grpo, tmp_path, *LAG, "--reward_timeout", 2)
    if how == "hangs":
        os.kill(held[0], signal.SIGKILL)


@pytest.mark.parametrize("flags", [
    pytest.param([], marks=pytest.mark.long), ["--sampler_device", "none"]], ids=["beside", "alone"])
def test_a_reward_that_raises_there_is_named_as_it_is_here(flags, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def reward(completions, trainer_state, **columns):\n"
        "    if trainer_state.global_step:\n        raise ValueError('no such thing')\n    return [0.0] * len(completions)\n")
    with pytest.raises(common.UserError, match=r"^reward function 'reward' raised ValueError: no such thing \(mine.py:3\)"):
        run(grpo, tmp_path / "out", *LAG, *flags, "--eval_fraction", 0, "--reward_funcs", f"{tmp_path}/mine.py:reward")


def test_a_device_that_is_not_there_and_several_processes_are_refused(tmp_path):
    with pytest.raises(common.UserError, match="--sampler_device cuda:7"):
        run(grpo, tmp_path, *LAG, "--sampler_device", "cuda:7")
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--rollout_lag", "1"])
    with pytest.raises(common.UserError, match="needs --sampler_device none"):
        common.Sampler(None, None, SimpleNamespace(place=(0, 2), args=args), None, [], 1)


def test_what_is_refused_is_refused_before_an_earlier_run_is_removed(tmp_path):
    run(grpo, tmp_path, *SHORT[2:], "--max_steps", 1)
    with pytest.raises(common.UserError, match="--sampler_device cuda:7"):
        run(grpo, tmp_path, *LAG, "--sampler_device", "cuda:7", "--overwrite_output_dir")
    assert (tmp_path / "model" / "config.json").exists() and (tmp_path / "metrics.jsonl").exists()


def test_sequence_ratios_in_bf16_are_refused(tmp_path):
    with pytest.raises(common.UserError, match="need --bf16 False"):
        run(grpo, tmp_path, *ALONE, "--importance_sampling_level", "sequence", "--loss_type", "grpo", "--epsilon", 3e-4, "--bf16", True)


@pytest.mark.long
def test_two_processes_without_a_third_give_what_one_gives(tmp_path):
    gently = ["--learning_rate", 1e-5]  # what rounds otherwise moves no sample
    run(grpo, tmp_path / "one", *ALONE, *gently)
    words = ["torchrun", "--nproc_per_node", 2, os.path.join(ROOT, "grpo.py"), os.path.join(TINY, "grpo.json"), "--output_dir",
             tmp_path / "two", *ALONE, *gently]
    subprocess.run([str(word) for word in words], check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True)
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert one[2] == two[2]  # samples
    assert all((one[0][name] - two[0][name]).abs().max() < 1e-5 for name in one[0])


@pytest.mark.long
def test_a_script_without_a_main_guard_and_a_reward_that_fails_there_alone_are_named(tmp_path):
    """Both end the other process before it has read a word of this one's."""
    words = [str(word) for word in (os.path.join(TINY, "grpo.json"), "--output_dir", tmp_path / "out", *LAG)]
    (tmp_path / "bare.py").write_text(f"import sys; sys.path.insert(0, {ROOT!r})\nimport common, grpo\n"
                                      f"grpo.main(common.parse_args(grpo.Args, {words!r}))\n")
    done = subprocess.run([sys.executable, tmp_path / "bare.py"], capture_output=True, text=True, timeout=120)
    assert "needs `if __name__ == '__main__':` before it" in done.stderr
    (tmp_path / "mine.py").write_text("import multiprocessing\nif multiprocessing.parent_process():\n    raise ValueError('only there')\n"
                                      "def reward(completions, **columns):\n    return [0.0] * len(completions)\n")
    with pytest.raises(common.UserError, match="only there"):
        run(grpo, tmp_path / "out", *LAG, "--reward_funcs", f"{tmp_path}/mine.py:reward")
