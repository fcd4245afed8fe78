"""Two processes equal one: the same rows give the same update, rollouts and evaluation: DDP and FSDP2."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import load_file, save_file

import common
import sft

WORKER = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from conftest import RecordGradients
import common, dpo, grpo, ppo, reward_model, sft
torch.set_num_threads(1)
script, out, flags = globals()[sys.argv[1]], sys.argv[2], sys.argv[3:]
if "--fsdp" in flags:
    flags.remove("--fsdp")
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    def sharded(**options):  # accelerate does not offer FSDP on a CPU: say so in the two places that it asks
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
            sharded = sum(isinstance(m, common.FSDPModule) for m in module.modules())
            assert sharded >= 3, "nothing was sharded"
            inner = module.model.get_base_model() if hasattr(module.model, "peft_config") else module.model
            inner.base_model.register_forward_pre_hook(
                lambda *_: casts.append(torch.is_autocast_enabled("cpu")))
            return module, optimizer
        accelerator.prepare = counted
        return accelerator
    common.Accelerator = sharded
if "--kill" in flags:
    at = flags.index("--kill")
    last, done = int(flags[at + 1]), common.Run.done
    del flags[at:at + 2]
    def dying(self, *args, **named):
        done(self, *args, **named)
        if self.step == last:
            os.kill(os.getpid(), 9)
    common.Run.done = dying
if "--record" in flags:
    flags.remove("--record")
    script.make_optimizer = RecordGradients
kept, casts = [], []
load_model = common.load_model
common.load_model = lambda *a, **k: kept.append(load_model(*a, **k)) or kept[0]
file = os.path.join({tiny!r}, sys.argv[1] + ".json")
sys.argv[0] = script.__file__
flags = [flag.replace("$RANK", os.environ.get("RANK", "0")) for flag in flags]
with common.user_errors():
    script.main(common.parse_args(script.Args, [file, "--output_dir", out, *flags]))
assert "--fsdp" not in sys.argv or casts and all(c == ("--bf16" in flags) for c in casts), "autocast"
gradients = RecordGradients.last.gradients if hasattr(RecordGradients, "last") else None
weights = {{n: p.detach().clone() for n, p in kept[0].named_parameters() if p.requires_grad}}
rank = os.environ.get("RANK", "0")
torch.save({{"gradients": gradients, "weights": weights}}, out + "-rank" + rank + ".pt")
"""


def launch(tmp_path, name, processes, *flags, dies=False):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(root=ROOT, tiny=TINY))
    out = tmp_path / f"{name}-{processes}"
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(several if processes > 1 else []), str(worker), name.split("-")[0], str(out)]
    done = subprocess.run([*command, *map(str, flags)], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    if dies:
        return done
    assert done.returncode == 0, done.stdout + done.stderr
    with open(out / "metrics.jsonl") as file:
        metrics = [json.loads(line) for line in file]
    return [torch.load(f"{out}-rank{rank}.pt") for rank in range(processes)], metrics, done.stdout


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
    flags = [*CASES[name], *five_eval_rows, "--max_steps", 3, *flags]
    one, metrics, _ = launch(tmp_path, name, 1, *flags)
    _, again, _ = launch(tmp_path, name, 2, *flags, "--fsdp")
    assert len(metrics) == len(again) > 3
    for a, b in zip(metrics, again):
        assert a.keys() == b.keys()
        for key in b:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-4), key
    whole, gathered = (saved(tmp_path / f"{name}-{n}") for n in (1, 2))
    assert whole.keys() == gathered.keys()
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
    name = next(n for n in ("model.safetensors", "adapter_model.safetensors") if (out / "model" / n).exists())
    return load_file(out / "model" / name)


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
    done = launch(tmp_path, name, 2, *flags, "--kill", 3, dies=True)
    assert done.returncode != 0 and not (out / "model").exists()
    launch(tmp_path, name, 2, *flags, "--resume_from_checkpoint", "latest")
    want, got = saved(whole), saved(out)
    assert want.keys() == got.keys() and all(want[k].equal(got[k]) for k in want)
    assert (whole / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()


def test_what_cannot_be_sharded_is_refused(monkeypatch):
    args = common.parse_args(sft.Args, [os.path.join(TINY, "sft.json"), "--output_dir", "nowhere"])
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(common.UserError, match="DeepSpeed is not supported: use FSDP"):
            common.make_accelerator(args)


# ---- two machines ------------------------------------------------------------------------------------------

def two_machines(tmp_path, name, *flags, port, dies=False):
    """One process on each of two machines that share no disk: machine r works in its own folder, disk-r. Each
    has a launcher of its own; they meet at the port. -> what each printed, with its exit code."""
    (tmp_path / "worker.py").write_text(WORKER.format(root=ROOT, tiny=TINY))
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
    ("rows", "process 1 has another training data or rewards than process 0"),
    ("held", "process 1 has another evaluation data than process 0"),
    ("missing", "process 1: no such file: rows.jsonl"), ("weights", "process 1 has another base model than"),
    ("flag", "process 1 has another --seed than process 0, 1 and not 0"),
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
