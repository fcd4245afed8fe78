"""Two processes equal one: the same rows give the same update, rollouts and evaluation: DDP and FSDP2."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from conftest import TINY, RecordGradients, fork
from safetensors.torch import load_file, save_file

import common
import dpo
import grpo
import ppo
import reward_model
import sft

SCRIPTS = {script.__name__: script for script in (dpo, grpo, ppo, reward_model, sft)}


def work(name, out, flags):
    """One process's part of a run of a script; gradients and weights go into a file. --fsdp shards, --kill N
    dies after step N, --record keeps gradients and moves no weight."""
    script, flags, rank = SCRIPTS[name], list(flags), os.environ.get("RANK", "0")
    kept, casts, sharded = [], [], "--fsdp" in flags
    if sharded:
        flags.remove("--fsdp")
        common.Accelerator = partial(shard, casts)
    if "--kill" in flags:
        at = flags.index("--kill")
        last, done = int(flags[at + 1]), common.Run.done
        del flags[at:at + 2]

        def dying(self, *args, **named):
            done(self, *args, **named)
            if self.step == last:
                os.kill(os.getpid(), signal.SIGKILL)
        common.Run.done = dying
    if "--record" in flags:
        flags.remove("--record")
        script.make_optimizer = RecordGradients
    load_model = common.load_model
    common.load_model = lambda *a, **k: kept.append(load_model(*a, **k)) or kept[0]
    sys.argv[0] = script.__file__
    flags = [flag.replace("$RANK", rank) for flag in flags]
    with common.user_errors():
        script.main(common.parse_args(script.Args, [os.path.join(TINY, f"{name}.json"), "--output_dir", out, *flags]))
    assert not sharded or casts and all(c == ("--bf16" in flags) for c in casts), "autocast"
    gradients = RecordGradients.last.gradients if hasattr(RecordGradients, "last") else None
    weights = {n: p.detach().clone() for n, p in kept[0].named_parameters() if p.requires_grad}
    torch.save({"gradients": gradients, "weights": weights}, f"{out}-rank{rank}.pt")


def shard(casts, **options):
    """An Accelerator under FSDP2. accelerate does not offer it on a CPU: it is said in the two places that
    accelerate asks. Whether autocast is on in the trunk goes into `casts`."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False)
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    if options["mixed_precision"] != "no":  # as AcceleratorState does
        plugin.set_mixed_precision(options["mixed_precision"])
    prepare = accelerator.prepare

    def counted(module, optimizer):
        module, optimizer = prepare(module, optimizer)
        assert sum(isinstance(m, common.FSDPModule) for m in module.modules()) >= 3, "nothing was sharded"
        inner = module.model.get_base_model() if hasattr(module.model, "peft_config") else module.model
        inner.base_model.register_forward_pre_hook(lambda *_: casts.append(torch.is_autocast_enabled("cpu")))
        return module, optimizer
    accelerator.prepare = counted
    return accelerator


def launch(tmp_path, name, processes, *flags, dies=False):
    """work() in so many processes, forked from this warm one -> (what each has saved, metrics, what they
    printed); with dies=True whether they ended otherwise than well."""
    out, port, running = tmp_path / f"{name}-{processes}", free_port(), {}
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

        def child():
            signal.alarm(300)  # none of them may wait for ever
            os.environ.update({key: str(value) for key, value in place.items()} if processes > 1 else {})
            said = os.open(f"{out}-rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1), os.dup2(said, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            work(name.split("-")[0], str(out), [str(flag) for flag in flags])
        running[fork(child)] = rank
    failed = False
    while running:
        pid, status = os.waitpid(-1, 0)
        mine = running.pop(pid, None) is not None
        if status and mine and not failed:  # the others would wait for it, as a launcher knows
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    said = [open(f"{out}-rank{rank}.txt").read() for rank in range(processes)]
    if dies:
        return failed
    assert not failed, "".join(said)
    with open(out / "metrics.jsonl") as file:
        metrics = [json.loads(line) for line in file]
    return [torch.load(f"{out}-rank{rank}.pt") for rank in range(processes)], metrics, "".join(said)


SFT = os.path.join(TINY, "sft")
ROWS = ["--model_name_or_path", SFT, "--batch_size", 7, "--micro_batch_tokens", 200]
GROUPS = ["--num_generations", 4, "--kl_coef", 0.1, "--micro_batch_tokens", 300, "--temperature", 1.3]
CASES = {
    "sft": ROWS,
    "sft-fgm": [*ROWS, "--adversarial", "fgm", "--adversarial_epsilon", 1],
    "sft-neftune": [*ROWS, "--adversarial", "neftune"],
    "dpo": ["--batch_size", 5, "--micro_batch_tokens", 300],
    "reward_model": ["--batch_size", 5, "--micro_batch_tokens", 300, "--model_name_or_path", SFT],
    "grpo": ["--batch_size", 3, *GROUPS],
    "grpo-demo": ["--batch_size", 5, *GROUPS, "--demo_threshold", 0.25, "--best_fraction", 0.3,
                  "--sft_coef", 0.5, "--eval_samples", 2],
    "ppo": ["--batch_size", 7, "--num_iterations", 1, "--num_minibatches", 1, "--micro_batch_tokens", 300,
            "--sft_dataset", os.path.join(TINY, "addition.jsonl"), "--sft_coef", 0.3],
}


@pytest.fixture
def five_eval_rows(tmp_path, request):
    """Rows for the test's script, where it names one: pairs, or problems with a demonstration each."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    pairs = params.get("name") in ("dpo", "reward_model")
    with open(os.path.join(TINY, "preferences.jsonl" if pairs else "addition.jsonl")) as file:
        rows = [json.loads(line) for line in file][:60]
    for row in rows:
        row |= {} if pairs else {"demonstration": row["completion"]}
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "eval.jsonl").write_text("".join(lines[:5]))
    (tmp_path / "train.jsonl").write_text("".join(lines[5:]))
    return ["--dataset_name", tmp_path / "train.jsonl", "--eval_dataset_name", tmp_path / "eval.jsonl"]


def cases(long):
    """The names of CASES, marked where long(name)."""
    return [pytest.param(name, marks=[pytest.mark.long] * long(name)) for name in CASES]


@pytest.mark.promise("processes")
@pytest.mark.parametrize("name", cases(long=lambda name: name == "sft-neftune"))
def test_the_gradient_of_two_processes_is_that_of_one(name, tmp_path, five_eval_rows):
    flags = [*CASES[name], *five_eval_rows, "--max_steps", 1, "--max_grad_norm", 0, "--record"]
    one, metrics, _ = launch(tmp_path, name, 1, *flags)
    two, again, printed = launch(tmp_path, name, 2, *flags)
    want = one[0]["gradients"][0]
    for rank in two:
        assert (rank["gradients"][0] - want).norm() / want.norm() < 1e-6
    assert want.norm() > 1e-3 and printed.count("model    ") == 1, "only the first process prints"
    for a, b in zip(metrics, again):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), key


@pytest.mark.promise("processes")
@pytest.mark.parametrize("name", cases(long=lambda name: name.startswith("sft") or name == "reward_model"))
def test_both_processes_hold_the_same_weights_after_three_steps(name, tmp_path, five_eval_rows):
    few = ["--batch_size", 1]  # fewer rows than processes
    extra = {"grpo": ["--num_minibatches", 3, *few], "dpo": few, "ppo": few}
    extra["grpo-demo"] = [*extra["grpo"], "--max_steps", 9]  # no rows in updates of several rollouts
    extra = extra.get(name, ["--lora_r", 4])
    two, _, _ = launch(tmp_path, name, 2, *CASES[name], *five_eval_rows, "--max_steps", 3, *extra)
    assert all(two[0]["weights"][n].equal(two[1]["weights"][n]) for n in two[0]["weights"])


@pytest.mark.promise("processes")
@pytest.mark.parametrize("script, rows", [("grpo", 4), pytest.param("ppo", 7, marks=pytest.mark.long)])
def test_rollouts_do_not_depend_on_the_number_of_processes(script, rows, tmp_path, five_eval_rows):
    flags = [*CASES[script], *five_eval_rows, "--max_steps", 1]
    samples = []
    for processes in (1, 2):
        launch(tmp_path, script, processes, *flags)
        lines = (tmp_path / f"{script}-{processes}" / "samples.jsonl").read_text().splitlines()
        samples.append(lines[:5 + rows])  # 5 evaluations
    assert samples[0] == samples[1]
    drawn = [json.loads(line) for line in samples[0][5:]]
    assert all(d["kind"] == "rollout" for d in drawn) and len({d["completion"] for d in drawn}) > 1


LORA, FOUR = ["--lora_r", 4], ["--lora_r", 4, "--load_in_4bit"]
SHARDED = [("sft", []), ("sft-fgm", ["--gradient_checkpointing", "--freeze_layers", 0.5]),
           ("sft-neftune", LORA), ("sft", [*LORA, "--gradient_checkpointing"]), ("dpo", []), ("dpo", LORA),
           ("reward_model", []), ("grpo", []), ("grpo", FOUR), ("grpo-demo", []), ("ppo", []), ("ppo", LORA),
           ("ppo", [*FOUR, "--share_trunk"])]


@pytest.mark.promise("sharded")
@pytest.mark.long
@pytest.mark.parametrize("name, flags", SHARDED, ids=str)
def test_sharded_over_two_processes_by_fsdp_equals_one(name, flags, tmp_path, five_eval_rows):
    """Three updates: every metric, and the saved model, which plain safetensors reads whole."""
    if "--load_in_4bit" in flags:
        pytest.importorskip("bitsandbytes")
    flags = [*CASES[name], *five_eval_rows, "--max_steps", 3, *flags]
    one, metrics, _ = launch(tmp_path, name, 1, *flags)
    _, again, _ = launch(tmp_path, name, 2, *flags, "--fsdp")
    assert len(metrics) == len(again) > 3
    for a, b in zip(metrics, again):
        assert a.keys() == b.keys()
        for key in b:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-4), key
    whole, gathered = (saved(tmp_path / f"{name}-{n}") for n in (1, 2))
    assert whole.keys() == gathered.keys() and any("model/" in k for k in whole)
    assert (name == "ppo") == any("value/" in k and "score" in k for k in whole)
    assert max((whole[k] - gathered[k]).abs().max() for k in whole) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("name, flags", [
    ("ppo", []), ("grpo", [*LORA, "--kl_coef", 0.1]), ("reward_model", [])], ids=str)
def test_sharded_in_bf16_computes_as_one_process_does(name, flags, tmp_path, five_eval_rows):
    """Outputs and shards stay fp32, autocast does the bf16: FSDP's own mixed precision rounds log-probs, and
    meets an fp32 head with bf16 weights."""
    flags = [*CASES[name], *five_eval_rows, "--max_steps", 2, "--bf16", True, *flags]
    _, metrics, _ = launch(tmp_path, name, 1, *flags)
    shards, again, _ = launch(tmp_path, name, 2, *flags, "--fsdp")
    first, other = next(m for m in metrics if "loss" in m), next(m for m in again if "loss" in m)
    assert first.keys() == other.keys()
    for key in first:
        assert first[key] == pytest.approx(other[key], rel=0.02, abs=0.005), key
    assert all(p.dtype == torch.float32 for p in shards[0]["weights"].values())


def saved(out):
    """The weights of model/ and, as ppo.py writes it, of value/."""
    folders = ["model"] + ["value"] * (json.loads((out / "args.json").read_text()).get("vf_coef") is not None)
    return {f"{folder}/{name}": weight for folder in folders for file in (out / folder).glob("*.safetensors")
            for name, weight in load_file(file).items()}


@pytest.mark.promise("resume")
@pytest.mark.long
@pytest.mark.parametrize("name, flags", [
    ("sft", [*LORA, "--lora_dropout", 0.2]), ("grpo", ["--num_iterations", 2]),
    ("ppo", ["--num_iterations", 2]), ("ppo", ["--num_iterations", 2, "--fsdp"]), ("dpo", []),
    ("reward_model", ["--fsdp"])], ids=str)
def test_two_processes_killed_and_resumed_end_bit_equal(name, flags, tmp_path, five_eval_rows):
    flags = [*CASES[name], *five_eval_rows, "--save_steps", 2, "--max_steps", 4, *flags]
    out, whole = tmp_path / f"{name}-2", tmp_path / "whole"
    launch(tmp_path, name, 2, *flags)
    os.rename(out, whole)
    assert launch(tmp_path, name, 2, *flags, "--kill", 3, dies=True) and not (out / "model").exists()
    launch(tmp_path, name, 2, *flags, "--resume_from_checkpoint", "latest")
    want, got = saved(whole), saved(out)
    assert want.keys() == got.keys() and all(want[k].equal(got[k]) for k in want)
    assert (whole / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()


def test_two_processes_with_a_tracker_end_well(tmp_path, five_eval_rows):
    """Closing it takes the processes apart, which saving and merging still need together."""
    pytest.importorskip("tensorboard")
    launch(tmp_path, "sft", 2, *CASES["sft"], *five_eval_rows, "--max_steps", 1, "--log_with", "tensorboard", "--lora_r", 4, "--merge")
    assert {"model", "merged", "tracker"} <= set(os.listdir(tmp_path / "sft-2"))


@pytest.mark.parametrize("plugin", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_what_splits_a_model_otherwise_is_refused(plugin, monkeypatch):
    """As accelerate's launcher asks for it; parallelism would give each process other rows of what should be the same."""
    args = common.parse_args(sft.Args, [os.path.join(TINY, "sft.json"), "--output_dir", "nowhere"])
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(common.UserError, match="DeepSpeed, Megatron and parallelism_config are not supported: use FSDP"):
        common.make_accelerator(args)


# ---- two machines ------------------------------------------------------------------------------------------

def two_machines(tmp_path, name, *flags, port, dies=False):
    """One process on each of two machines that share no disk: machine r works in its own folder, disk-r. Each
    has a launcher of its own; they meet at the port. -> what each printed, with its exit code."""
    (tmp_path / "worker.py").write_text(
        f"import sys\nsys.path.insert(0, {os.path.dirname(__file__)!r})\nfrom test_processes import work\n"
        "work(sys.argv[1], sys.argv[2], sys.argv[3:])\n")
    disks = [tmp_path / "disk-0", tmp_path / "disk-1"]
    several = ["--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port]
    running = []
    for rank, disk in enumerate(disks):
        disk.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", *several, "--node_rank", rank,
                   tmp_path / "worker.py", name, "out", *flags]
        running.append(subprocess.Popen(
            [*map(str, command)], cwd=disk, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [(process.communicate(timeout=300)[0], process.returncode) for process in running]
    assert dies or [code for _, code in said] == [0, 0], said
    return said


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.long
@pytest.mark.parametrize("name, flags", [
    ("sft", ["--keep_best", "--eval_steps", 1]), ("sft", ["--fsdp"]), ("ppo", ["--num_iterations", 2])], ids=str)
def test_two_machines_killed_and_resumed_from_the_first_ones_disk_end_bit_equal(name, flags, tmp_path,
                                                                                five_eval_rows):
    flags = [*CASES[name], *five_eval_rows, "--save_steps", 2, "--max_steps", 4, *flags]
    out, whole = tmp_path / "disk-0" / "out", tmp_path / "whole"
    two_machines(tmp_path, name, *flags, port=free_port())
    os.rename(out, whole)
    said = two_machines(tmp_path, name, *flags, "--kill", 3, port=free_port(), dies=True)
    assert all(code for _, code in said) and not (out / "model").exists()
    two_machines(tmp_path, name, *flags, "--resume_from_checkpoint", "latest", port=free_port())
    want, got = saved(whole), saved(out)
    assert want.keys() == got.keys() and all(want[k].equal(got[k]) for k in want)
    assert (whole / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()
    assert not (tmp_path / "disk-1" / "out").exists()  # the second writes nothing


@pytest.mark.long
@pytest.mark.parametrize("differs, sentence", [
    ("rows", "process 1 differs from process 0 in training data, "),
    ("held", "process 1 differs from process 0 in evaluation data, "),
    ("missing", "process 1: no such file: rows.jsonl"), ("weights", "process 1 differs from process 0 in files of ./model, "),
    ("flag", "process 1 differs from process 0 in --seed, 1 and not 0"),
    ("locked", "another run is writing to out")])
def test_machines_that_do_not_see_the_same_are_refused(differs, sentence, tmp_path):
    rows = [json.loads(line) for line in open(os.path.join(TINY, "addition.jsonl"))][:12]
    flags = []
    for rank in (0, 1):
        disk = tmp_path / f"disk-{rank}"
        shutil.copytree(SFT, disk / "model")
        for name, mine in (("rows", rows[:6]), ("held", rows[6:])):
            mine = mine[::-1] if rank and differs == name else mine
            (disk / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    if differs == "missing":
        os.remove(disk / "rows.jsonl")
    if differs == "weights":
        weights = load_file(disk / "model" / "model.safetensors")
        weights["model.norm.weight"][0] += 1
        save_file(weights, disk / "model" / "model.safetensors", {"format": "pt"})
    if differs == "flag":
        flags = ["--seed", "$RANK"]
    held = common.lock(str(tmp_path / "disk-0" / "out")) if differs == "locked" else None
    flags = ["--model_name_or_path", "./model", "--dataset_name", "rows.jsonl", "--eval_dataset_name",
             "held.jsonl", "--max_steps", 1, *flags]
    said = two_machines(tmp_path, "sft", *flags, port=free_port(), dies=True)
    if held:
        os.close(held)
    assert all(code for _, code in said)
    assert sentence in said[0][0], said
    assert "]: Traceback" not in said[0][0] + said[1][0], said  # of a process; a launcher shows its own
    assert not (tmp_path / "disk-0" / "out" / "args.json").exists()
