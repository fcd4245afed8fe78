"""Measures the scripts on one GPU: what they learn there, how fast and in how much memory.

    python tests/figures/gpu.py --model SMOLLM2 --dataset_name GSM8K.jsonl --output_dir out/gpu --budget 460
    ... gpu.py --only 5 7           these steps alone
    ... gpu.py --dry                all of it in miniature, on a CPU too, 90 seconds: proves that it runs

Steps, in order of value; a budget of seconds that ends early leaves out the last ones:

1  versions, the device, its matrix rate and bandwidth, and what NF4 loses
2  the small example of every script, in bf16 and fp32: before, after, seconds a step
3  a run, the same again, and one resumed from its middle: are the weights bit-equal?
4  sft.py and, from its model, grpo.py on --model (SmolLM2-135M; else its shape with random weights)
5  rollouts: grpo.sample against transformers' generate and generate_batch, every completion of 256 tokens
6  peaks of QLoRA on shapes of 7B and 1.5B with random weights, against the estimate of memory.py
7  the share of the matrix rate that a step of sft.py reaches, on a shape of 1.5B
8  the lines of a step at which the host waits for the device

A job is a process of its own, forked from this one, which has the libraries and never touches CUDA. It is
killed at its cap; its error is recorded, and the next one goes on. gpu.jsonl gets a line a job, logs.txt all
output, metrics.jsonl every run's metrics.
"""

import argparse
import contextlib
import glob
import importlib
import importlib.metadata
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from typing import NamedTuple

from pipelines import ROOT, TINY, model_flops, read_metrics, write

sys.path.insert(0, ROOT)
os.environ.update(
    PYTORCH_NVML_BASED_CUDA_CHECK="1",  # is_available() then starts no CUDA here, and forking stays possible
    CUBLAS_WORKSPACE_CONFIG=":4096:8", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SCRIPTS = ("sft", "dpo", "reward_model", "ppo", "grpo")
PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "tokenizers", "triton")
GIB = 2**30


# ---- clocks ------------------------------------------------------------------------------------------------

def now():
    """Seconds, once the device has done all that it was given."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak():
    """The most memory that tensors of this process have had since it was last reset, in GiB."""
    return round(torch.cuda.max_memory_allocated() / GIB, 3) if GPU else None


class Clock:
    """Hooks into common.Run and a script's rollout(): .steps (seconds, tokens), without evaluations and
    checkpoints, and .rollouts (seconds, tokens, peak GiB), sampled ones alone, of the runs that follow."""

    def __init__(self, script):
        import common
        self.steps, self.rollouts, self.highest, self.mark = [], [], 0, now()
        self.around(common.Run, "start", self.restart)
        self.around(common.Run, "done", self.step)
        self.around(common.Run, "report", self.leave_out)
        self.around(common.Run, "save", self.leave_out)
        if hasattr(script, "rollout"):
            self.around(script, "rollout", self.rollout)

    @staticmethod
    def around(owner, name, hook):
        """Has hook(function, *its arguments) called in the function's place."""
        function = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: hook(function, *args, **kwargs))

    def restart(self, function, *args, **kwargs):
        function(*args, **kwargs)
        self.mark = now()

    def step(self, function, run, metrics, tokens, shown):
        function(run, metrics, tokens, shown)
        end = now()
        self.steps.append((end - self.mark, tokens))
        self.mark = end

    def leave_out(self, function, *args, **kwargs):
        begin = now()
        try:
            return function(*args, **kwargs)
        finally:
            self.mark += now() - begin

    def rollout(self, function, *args, **kwargs):
        begin, before = now(), peak() or 0
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        result = function(*args, **kwargs)
        seconds, seed = now() - begin, kwargs.get("seed", args[6] if len(args) > 6 else None)
        if seed is not None:
            tokens = sum(len(row["completion_ids"]) for group in result[0] for row in group)
            self.rollouts.append((seconds, tokens, peak()))
        self.highest = max(self.highest, before)
        return result

    def memory(self):
        """{"peak_gib"} of all, although every rollout starts a peak of its own."""
        return {"peak_gib": max(self.highest, peak())} if GPU else {}


# ---- runs of the scripts, models and rows ------------------------------------------------------------------

def run_script(script, folder, *flags, example=False):
    """script.main() in this process, on top of the small example or not -> the lines of its metrics."""
    import common
    from accelerate.state import AcceleratorState, GradientState
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    module = importlib.import_module(script)
    words = [os.path.join(TINY, f"{script}.json")] if example else []
    module.main(common.parse_args(module.Args, [*words, "--output_dir", folder, *map(str, flags)]))
    return read_metrics(folder)


def figures(lines, *names):
    """The last value of each of these metrics."""
    found = {name: line[name] for line in lines for name in names if name in line}
    return {name: round(value, 6) for name, value in found.items()}


def held_out(lines):
    """-> what the first and the last evaluation said."""
    names = ("eval/accuracy", "eval/loss", "eval/token_accuracy", "eval/reward")
    evaluations = [line for line in lines if any(name in line for name in names)]
    return {"before": figures(evaluations[:1], *names), "after": figures(evaluations[-1:], *names)}


def sampler_difference(lines):
    """{the worst difference of sampler and trainer in a token's log-prob}, where one was sampled."""
    name = "sampling/logprob_difference/max"
    worst = [line[name] for line in lines if name in line]
    return {"worst_logprob_difference": max(worst)} if worst else {}


def shape_of(name, dry):
    """d, f, layers, h, k, e, V, tied: as in memory.py."""
    import memory
    small, smol = (64, 128, 2, 2, 1, 32, 512, True), (576, 1536, 30, 9, 3, 64, 49152, True)
    return small if dry else (memory.SHAPES | {"SmolLM2-135M": smol})[name]


def shape_folder(options, name):
    """A folder with the config of a shape and the byte tokenizer, but no weights."""
    from transformers import AutoTokenizer, LlamaConfig, Qwen2Config
    d, f, layers, h, k, e, V, tied = shape_of(name, options.dry)
    folder = os.path.join(options.work, name)
    if not os.path.exists(f"{folder}/config.json"):
        tokenizer = AutoTokenizer.from_pretrained(f"{TINY}/model")
        tokenizer.save_pretrained(folder)
        kind, model = (Qwen2Config, "Qwen2") if name.startswith("Qwen") else (LlamaConfig, "Llama")
        kind(hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=h,
             num_key_value_heads=k, head_dim=e, vocab_size=V, tie_word_embeddings=tied, bos_token_id=None,
             max_position_embeddings=8192, eos_token_id=tokenizer.eos_token_id,
             architectures=[f"{model}ForCausalLM"]).save_pretrained(folder)
    return folder


def load(folder, dtype, attention=None):
    """A folder's model on the device; with random weights, made there, where it has none."""
    from transformers import AutoConfig, AutoModelForCausalLM
    options = {"dtype": dtype} | ({"attn_implementation": attention} if attention else {})
    if glob.glob(f"{folder}/*.safetensors"):
        return AutoModelForCausalLM.from_pretrained(folder, **options).to(DEVICE)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **options)


def random_nf4(folder):
    """Random weights made on the device, a matrix at a time: NF4, embedding and head in bf16."""
    import bitsandbytes
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    nf4 = {"compress_statistics": True, "quant_type": "nf4"}
    for name, old in list(model.named_modules()):
        if isinstance(old, torch.nn.Linear) and name != "lm_head":
            new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias=old.bias is not None,
                                             compute_dtype=torch.bfloat16, device="meta", **nf4)
            data = torch.empty(old.weight.shape, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.02)
            new.weight = bitsandbytes.nn.Params4bit(data, requires_grad=False, module=new, **nf4)
            new.weight = new.weight._quantize(DEVICE)
            model.set_submodule(name, new)
    for module in model.modules():  # embedding, head, norms and biases
        for name, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                fresh = torch.empty(value.shape, dtype=torch.bfloat16, device=DEVICE)
                if value.ndim == 2:
                    fresh.normal_(0, 0.02)
                else:
                    fresh.fill_(name == "weight")  # norms 1, biases 0
                setattr(module, name, torch.nn.Parameter(fresh, requires_grad=False))
    with torch.device(DEVICE):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.is_loaded_in_4bit = model.is_quantized = True
    model.name_or_path = folder
    return model.requires_grad_(False)


def letters(n):
    """n letters and spaces: so many tokens of the byte tokenizer."""
    return "".join(random.choices("abcdefghijklmnopqrstuvwxyz     ", k=n))


def make_sums(path):
    """400 questions with answers, where no data set is given."""
    rows = []
    for _ in range(400):
        a, b = random.randrange(1000), random.randrange(1000)
        rows.append({"question": f"What is {a} + {b}? " * 4,
                     "answer": f"{a} plus {b} is {a + b}. " * 3 + f"#### {a + b}"})
    return write(path, rows)


# ---- 1: the device -----------------------------------------------------------------------------------------

def rate(work, times):
    """Calls work() three times, then `times` times -> seconds of one."""
    for _ in range(3):
        work()
    begin = now()
    for _ in range(times):
        work()
    return (now() - begin) / times


def device(options):
    """Matrix rate and bandwidth, kept for the later steps, and the round trip through NF4."""
    import bitsandbytes.functional
    side, size = (256, 2**20) if options.dry else (8192, 2 * GIB)
    a, b = torch.randn(2, side, side, device=DEVICE, dtype=torch.bfloat16)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    speeds = {"tflops": 2 * side**3 / rate(lambda: a @ b, 20) / 1e12,
              "tb_per_s": 2 * size / rate(lambda: target.copy_(source), 20) / 1e12}
    with open(f"{options.work}/speeds.json", "w") as file:
        json.dump(speeds, file)
    weight = torch.randn(256, 256, device=DEVICE, dtype=torch.bfloat16)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    back = bitsandbytes.functional.dequantize_4bit(packed, state)
    room = {"gib": round(torch.cuda.get_device_properties(0).total_memory / GIB, 1)} if GPU else {}
    return {name: round(value, 3) for name, value in speeds.items()} | room | {
        "nf4_error": (back - weight).abs().mean().item(), "cpus": os.cpu_count()}


def device_speeds(options):
    """What step 1 measured; without it what is usual."""
    with contextlib.suppress(FileNotFoundError), open(f"{options.work}/speeds.json") as file:
        return json.load(file) | {"measured": True}
    h200 = GPU and "H200" in torch.cuda.get_device_name()
    return {"tflops": 989, "tb_per_s": 4.3 if h200 else 3.0, "measured": False}


# ---- 2 and 3: the small examples ---------------------------------------------------------------------------

def few_rows(options, script):
    """Flags that make an example small: its first 100 rows, 8 a step."""
    with open(f"{TINY}/{script}.json") as file:
        name = os.path.basename(json.load(file)["dataset_name"])
    with open(f"{TINY}/{name}") as file:
        rows = [json.loads(next(file)) for _ in range(100)]
    return ["--dataset_name", write(f"{options.work}/{name}", rows), "--batch_size", 8]


def example(options, script, bf16):
    """The small example of a script, from beginning to end."""
    clock = Clock(importlib.import_module(script))
    flags = few_rows(options, script) + ["--max_steps", 1] if options.dry else []
    lines = run_script(script, f"{options.work}/example-{script}-{'bf16' if bf16 else 'fp32'}",
                       "--bf16", bf16, *flags, example=True)
    seconds = [s for s, _ in clock.steps]
    return held_out(lines) | sampler_difference(lines) | {
        "steps": len(seconds), "median_s": round(statistics.median(seconds), 4),
        "mean_s": round(statistics.mean(seconds), 4)} | figures(lines, "loss") | clock.memory()


def difference(folder, other):
    """The largest difference between the weights that two runs saved."""
    from safetensors.torch import load_file
    states = [{name: value.float() for path in sorted(glob.glob(f"{each}/model/*.safetensors"))
               for name, value in load_file(path).items()} for each in (folder, other)]
    if not states[0] or states[0].keys() != states[1].keys():
        raise ValueError(f"{folder} and {other} hold other weights")
    return max((states[0][name] - states[1][name]).abs().max().item() for name in states[0])


def resume(options, script, variant):
    """A run, the same again, and one resumed from the checkpoint in the first one's middle."""
    steps = {"sft": 8, "ppo": 8, "grpo": 4}.get(script, 6)
    flags = ["--max_steps", steps, "--save_steps", steps // 2, "--save_total_limit", 9, "--eval_fraction", 0]
    flags += few_rows(options, script) if options.dry else []
    if variant == "deterministic":
        torch.use_deterministic_algorithms(True, warn_only=True)
        flags += ["--attn_implementation", "eager"]
    if variant == "lora":
        flags += ["--lora_r", 8, "--model_name_or_path", f"{TINY}/sft"]
    first, again, resumed = (f"{options.work}/resume-{script}-{variant}-{n}" for n in range(3))
    run_script(script, first, *flags, example=True)
    run_script(script, again, *flags, example=True)
    middle = f"{first}/checkpoints/step-{steps // 2:08d}"
    run_script(script, resumed, *flags, "--resume_from_checkpoint", middle, example=True)
    repeat, after = difference(first, again), difference(first, resumed)
    return {"resume_bit_equal": after == 0, "repeat_bit_equal": repeat == 0, "resume_differs_by": after,
            "repeat_differs_by": repeat}


# ---- 4: a real model ---------------------------------------------------------------------------------------

def real_sft(options):
    """Two epochs of sft.py on the model."""
    import sft
    clock = Clock(sft)
    flags = ["--num_train_epochs", 2, "--batch_size", 64, "--micro_batch_tokens", 32768, "--learning_rate",
             1e-4, "--max_completion_length", 256]
    if options.dry:
        flags = ["--max_steps", 2, "--batch_size", 4, "--max_completion_length", 4, "--eval_fraction", 0.01]
    lines = run_script("sft", f"{options.work}/real-sft", "--model_name_or_path", options.model,
                       "--dataset_name", options.dataset_name, "--eval_steps", 10000, "--max_length", 512,
                       *flags)
    steps = clock.steps[2:] or clock.steps  # the first ones warm up
    seconds, tokens = map(sum, zip(*steps))
    return held_out(lines) | {"real_weights": options.real, "steps": len(clock.steps),
                              "tokens_per_s": round(tokens / seconds),
                              "median_s": round(statistics.median(s for s, _ in steps), 4)} | clock.memory()


def real_grpo(options, variant):
    """Six steps of grpo.py from the model of real_sft, 256 completions each."""
    import grpo
    clock, start = Clock(grpo), f"{options.work}/real-sft/model"
    flags = ["--max_steps", 6, "--batch_size", 16, "--num_generations", 16, "--max_completion_length", 256,
             "--micro_batch_tokens", 32768, "--eval_steps", 6]
    if options.dry:
        flags = ["--max_steps", 2, "--batch_size", 2, "--num_generations", 2, "--max_completion_length", 4,
                 "--eval_fraction", 0.01]
    flags += ["--lora_r", 16, "--learning_rate", 1e-4] if variant == "lora" else ["--learning_rate", 2e-6]
    given = start if glob.glob(f"{start}/*.safetensors") else options.model
    lines = run_script("grpo", f"{options.work}/real-grpo-{variant}", "--model_name_or_path", given,
                       "--dataset_name", options.dataset_name, *flags)
    rolled, sampled, _ = zip(*clock.rollouts[1:])  # the first one warms up
    seconds, tokens = zip(*clock.steps[1:])
    update = sum(seconds) - sum(rolled)
    return held_out(lines) | sampler_difference(lines) | {
        "after_sft": given == start, "rewards": [round(m["reward"], 3) for m in lines if "reward" in m],
        "first_rollout_s": round(clock.rollouts[0][0], 3),
        "rollout_s": round(statistics.mean(rolled), 3), "update_s": round(update / len(rolled), 3),
        "rollout_tokens_per_s": round(sum(sampled) / sum(rolled)),
        "update_tokens_per_s": round(sum(tokens) / update),
        "rollout_peak_gib": clock.rollouts[-1][2]
    } | figures(lines, "completions/mean_length") | clock.memory()


# ---- 5: rollouts -------------------------------------------------------------------------------------------

def sample_once(model, prompts, new):
    """8 completions a prompt, of exactly `new` tokens, by grpo.sample -> tokens."""
    import grpo
    uniforms = torch.rand(8 * len(prompts), new, dtype=torch.float64).to(DEVICE)
    plain = next(model.parameters()).dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=not plain):
        _, _, lengths = grpo.sample(model, prompts, uniforms, new, 1.0, [], 8)
    return lengths.sum().item()


def generate_once(model, prompts, new, batched, dry):
    """The same by generate(), or by generate_batch() -> tokens."""
    import common
    from transformers import GenerationConfig
    rows = [prompt for prompt in prompts for _ in range(8)]
    config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new,
                              pad_token_id=0)
    if batched:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        results = model.generate_batch(
            rows, generation_config=config, progress_bar=False, persistent_manager=not dry,
            continuous_batching_config=ContinuousBatchingConfig(
                max_memory_percent=0.01 if dry else 0.5))
        return sum(len(result.generated_tokens) for result in results.values())
    ids = common.pad(rows, 0, side="left").to(DEVICE)
    mask = common.pad([[1] * len(row) for row in rows], 0, side="left").to(DEVICE)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return len(rows) * (out.shape[1] - ids.shape[1])


def moved_bytes(model, prompts, new):
    """The bytes that a decoding step has to read, on average: each weight and what is in the cache."""
    import common
    _, k, e = common.head_sizes(model.config)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    filled = 8 * sum(len(prompt) + (new + 1) / 2 for prompt in prompts)  # positions of all rows
    return weights + 2 * 2 * model.config.num_hidden_layers * k * e * filled


def rollout_model(options, rows, shape, dtype):
    """-> model without a stop token, prompts of at most 128 tokens for 8 completions each, new tokens."""
    from transformers import AutoTokenizer
    folder = shape_folder(options, shape) if shape else options.model
    model, tokenizer = load(folder, dtype).eval(), AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    rows, new = (16, 4) if options.dry else (rows, 256)
    with open(options.dataset_name) as file:
        prompts = [tokenizer(json.loads(next(file))["question"])["input_ids"][:128] for _ in range(rows // 8)]
    return model, prompts, new


def rollout(options, kind, rows, shape=None, dtype=torch.bfloat16):
    """Tokens/s of a second call, and the share of the device's bandwidth that it must have used at least.
    What was measured of each call stands in the logs too, in case the job is killed."""
    import common
    model, prompts, new = rollout_model(options, rows, shape, dtype)
    if kind == "sample, not replayed":
        common.ReplayingDecoder.DEVICES = ()
    seconds = []
    # what is recorded, and generate_batch's cache, are made for the length of the first call
    warm = [new if kind in ("sample", "generate_batch") else min(new, 16)]
    for length in (*warm, new):
        begin = now()
        if kind in ("sample", "sample, not replayed"):
            tokens = sample_once(model, prompts, length)
        else:
            with torch.no_grad():
                tokens = generate_once(model, prompts, length, kind == "generate_batch", options.dry)
        seconds.append(now() - begin)
        print(f"{kind}: {tokens} tokens in {seconds[-1]:.3f} s", flush=True)
    speeds = device_speeds(options)
    share = moved_bytes(model, prompts, new) * new / seconds[-1] / (speeds["tb_per_s"] * 1e12)
    return {"rows": 8 * len(prompts), "tokens": tokens, "seconds": round(seconds[-1], 3),
            "first_call_s": round(seconds[0], 3), "tokens_per_s": round(tokens / seconds[-1]),
            "ms_per_step": round(1000 * seconds[-1] / new, 3), "bandwidth_share": round(share, 4),
            "bandwidth_measured": speeds["measured"], "peak_gib": peak()}


def decoders(options):
    """Whether the decoder that is replayed samples the tokens of the one that is not, in fp32."""
    import common
    import grpo
    model, prompts, new = rollout_model(options, 64, None, torch.float32)
    uniforms, found = torch.rand(8 * len(prompts), new, dtype=torch.float64).to(DEVICE), []
    stops = torch.randperm(model.config.vocab_size)[:model.config.vocab_size // 100].tolist()  # all lengths
    for devices in ((DEVICE,), ()):
        common.ReplayingDecoder.DEVICES = devices
        with torch.no_grad():
            found.append(grpo.sample(model, prompts, uniforms, new, 1.0, stops, 8))
    (ids, logprobs, lengths), (other_ids, other_logprobs, other_lengths) = found
    counted = torch.arange(new, device=DEVICE) < lengths[:, None]
    equal = (ids == other_ids) | ~counted
    same = equal.all(-1) & (lengths == other_lengths)
    counted &= equal.cummin(-1).values  # rounding moves a draw to another rare token: what follows is another text
    apart = (logprobs - other_logprobs).abs() * counted
    return {"completions": len(ids), "same": int(same.sum()), "tokens": int(lengths.sum()),
            "tokens_before_they_differ": int(counted.sum()), "logprobs_differ_by": apart.max().item(),
            "known": list(common.ReplayingDecoder.known.values())}


def profile(options, rows):
    """Where the time of 8 steps of grpo.sample goes: a table in the logs."""
    model, prompts, _ = rollout_model(options, rows, None, torch.bfloat16)
    sample_once(model, prompts, 8)
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * GPU
    with torch.profiler.profile(activities=kinds) as profiler:
        sample_once(model, prompts, 8)
        now()
    order = "self_device_time_total" if GPU else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=70))


# ---- 6 and 7: shapes with random weights -------------------------------------------------------------------

def without_saving():
    """Runs that follow write no weights."""
    import common
    common.Run.save = common.Run.finish = lambda *_, **__: None


def qlora(options, script, shape):
    """Two updates (grpo: a rollout and its update) on a random NF4 base: peaks against the estimate."""
    import common
    import memory
    length, folder = (64 if options.dry else 1024), shape_folder(options, shape)
    flags = ["--max_steps", 2]
    if script == "sft":  # a row of 2048 tokens
        rows, tokens = [{"text": letters(3 * length)} for _ in range(4)], 2 * length
        flags += ["--batch_size", 1, "--max_length", tokens]
    elif script == "dpo":  # 2 pairs: 4 sequences of 1024
        rows = [{"prompt": letters(20), "chosen": letters(2 * length), "rejected": letters(2 * length)}
                for _ in range(4)]
        tokens = 4 * length
        flags += ["--batch_size", 2, "--max_length", length, "--max_completion_length", 0]
    else:  # 8 completions of 512 tokens after prompts of 512 with their template
        rows, tokens = [{"prompt": letters(length // 2 - 3)} for _ in range(4)], 8 * length
        with open(f"{options.work}/length_reward.py", "w") as file:
            file.write("def f(completions):\n    return [float(len(c) % 7) for c in completions]\n")
        flags = ["--max_steps", 1, "--batch_size", 1, "--num_generations", 8, "--max_completion_length",
                 length // 2, "--max_prompt_length", length // 2, "--reward_funcs",
                 f"{options.work}/length_reward.py:f"]
    common.nf4(torch.bfloat16, DEVICE)  # which sees to what a CPU needs
    base = {}

    def load_base(*_, **__):
        model = random_nf4(folder)
        if GPU:
            base["base_gib"] = round(torch.cuda.memory_allocated() / GIB, 3)
            torch.cuda.reset_peak_memory_stats()
        return model
    common.load_base = load_base
    without_saving()
    clock = Clock(importlib.import_module(script))
    name = f"qlora-{script}-{shape}"
    lines = run_script(script, f"{options.work}/{name}", "--model_name_or_path", folder, "--dataset_name",
                       write(f"{options.work}/{name}.jsonl", rows), "--eval_fraction", 0, "--load_in_4bit",
                       "--lora_r", 16, "--bf16", True, "--micro_batch_tokens", tokens, *flags)
    parts = memory.estimate(shape_of(shape, options.dry), "QLoRA", tokens, length=length,
                            completions=8 if script == "grpo" else 0)
    rolled = {}
    for seconds, _, highest in clock.rollouts:
        rolled = {"rollout_s": round(seconds, 2), "rollout_peak_gib": highest}
    return base | {"tokens": [n for _, n in clock.steps], "seconds": [round(s, 2) for s, _ in clock.steps],
                   "loss": lines[-1]["loss"], "estimate_gib": round(sum(parts.values()) / GIB, 3)
                   } | rolled | clock.memory()


def matrix_share(options, variant):
    """Full fine-tuning, 16 rows of 2048 tokens a step, under bf16 autocast."""
    import common
    import sft
    shape, (rows, length, steps) = "Qwen2.5-1.5B", (2, 32, 3) if options.dry else (16, 2048, 6)
    folder, checkpointing = shape_folder(options, shape), variant != "no checkpointing"
    attention = "eager" if variant == "eager" else "sdpa"
    common.load_base = lambda *_, **__: load(folder, torch.float32, attention)
    without_saving()
    flags = ["--gradient_checkpointing", checkpointing]
    if variant.startswith("chunks of"):
        sft.TokenLogprobs.CHUNK = 2 ** int(variant[-2:])
    clock = Clock(sft)
    texts = [{"text": letters(2 * length)} for _ in range(3 * rows)]
    run_script("sft", f"{options.work}/share-{variant}", "--model_name_or_path", folder, "--dataset_name",
               write(f"{options.work}/share-{variant}.jsonl", texts), "--eval_fraction", 0, "--bf16", True,
               "--batch_size", rows, "--max_length", length, "--micro_batch_tokens", 8192, "--max_steps",
               steps, *flags)
    seconds, tokens = statistics.median(s for s, _ in clock.steps[2:]), clock.steps[-1][1]
    model = model_flops(folder, rows, tokens, tokens)
    again = model_flops(folder, rows, 0, tokens) / 3 if checkpointing else 0  # the trunk's forward pass
    speeds = device_speeds(options)
    return {"tokens": tokens, "seconds": [round(s, 3) for s, _ in clock.steps],
            "tokens_per_s": round(tokens / seconds), "model_tflops": round(model / seconds / 1e12, 2),
            "share": round(model / seconds / speeds["tflops"] / 1e12, 4),
            "share_with_recomputation": round((model + again) / seconds / speeds["tflops"] / 1e12, 4),
            "rate_measured": speeds["measured"]} | clock.memory()


# ---- 8: waiting for the device -----------------------------------------------------------------------------

def waits(options, script):
    """Lines of four updates of the small example that make the host wait for the device, and how often."""
    import common
    flags = ["--max_steps", 4, "--eval_fraction", 0, "--micro_batch_tokens", 1024]
    flags += few_rows(options, script) if options.dry else []
    without_saving()

    def noted(function, *args):
        result = function(*args)
        if GPU:
            torch.cuda.set_sync_debug_mode("warn")
        return result
    Clock.around(common.Run, "start", noted)
    Clock.around(common.ReplayingDecoder, "look_for_waits", noted)  # which ends with the mode of every day
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_script(script, f"{options.work}/waits-{script}", *flags, example=True)
    lines = Counter(f"{os.path.basename(each.filename)}:{each.lineno}" for each in caught
                    if "synchronizing" in str(each.message))
    return {"waits": dict(lines.most_common(30))}


# ---- jobs --------------------------------------------------------------------------------------------------

class Step(NamedTuple):
    """Jobs {name: (function, *arguments)}, the most seconds of one and of all, and how many run at once."""
    jobs: dict
    each: float
    whole: float
    at_once: int = 1


def all_steps():
    """The steps in the order in which they run."""
    kinds, shape = ("sample", "generate", "sample, not replayed"), "Qwen2.5-0.5B"
    rollouts = {f"5 rollout {kind} {rows}": (rollout, kind, rows) for rows in (256, 64) for kind in kinds}
    batched = {f"5 batched {rows}": (rollout, "generate_batch", rows) for rows in (64, 256)}
    more = {"5 rollout sample 256 fp32": (rollout, "sample", 256, None, torch.float32)}
    more |= {f"5 rollout {kind} 256 {shape}": (rollout, kind, 256, shape) for kind in kinds}
    more |= {f"5 batched 256 {shape}": (rollout, "generate_batch", 256, shape)}
    return [
        Step({"1 device": (device,)}, 60, 60),
        Step({f"2 example {script} {'bf16' if bf16 else 'fp32'}": (example, script, bf16)
              for bf16 in (True, False) for script in ("ppo", "sft", "grpo", "dpo", "reward_model")},
             80, 80, at_once=10),
        Step({"5 decoders": (decoders,)} | rollouts, 40, 120),
        Step(batched, 70, 130),  # its first call records for most of a minute
        Step({"4 sft": (real_sft,), "4 grpo": (real_grpo, "full")}, 110, 180),
        Step({f"3 resume {script} {variant}": (resume, script, variant)
              for variant in ("default", "deterministic", "lora") for script in SCRIPTS}, 70, 90, at_once=12),
        Step({f"6 qlora {script} {shape}": (qlora, script, shape)
              for shape in ("Qwen2.5-7B", "Qwen2.5-1.5B") for script in ("sft", "dpo", "grpo")}, 80, 130,
             at_once=6),
        Step({f"7 share {variant}": (matrix_share, variant)
              for variant in ("default", "no checkpointing", "chunks of 2**25", "chunks of 2**28", "eager")}, 75, 150),
        Step({f"8 waits {script}": (waits, script) for script in ("sft", "grpo")}, 30, 40, at_once=2),
        Step(more, 50, 120),
        Step({"4 grpo lora": (real_grpo, "lora"), "5 profile sample": (profile, 256)}, 60, 90)]


class Record:
    """The files of --output_dir."""

    def __init__(self, options):
        self.options, self.begun = options, time.time()
        os.makedirs(options.output_dir, exist_ok=True)

    def left(self):
        """Seconds of the budget that are left."""
        return self.options.budget - (time.time() - self.begun)

    def line(self, name, **values):
        """One line of gpu.jsonl, and what fits a terminal."""
        text = json.dumps({"job": name, **values, "at_s": round(time.time() - self.begun, 1)})
        with open(os.path.join(self.options.output_dir, "gpu.jsonl"), "a") as file:
            file.write(text + "\n")
        print(text[:600], flush=True)

    def ended(self, name, seconds, otherwise):
        """A job's line, which says `otherwise` where it left no result, and its output."""
        values = {"ok": False, "error": otherwise}
        with contextlib.suppress(FileNotFoundError), open(result_path(self.options, name)) as file:
            values = json.load(file)
        self.line(name, **values, wall_s=round(seconds, 1))
        with (open(os.path.join(self.options.output_dir, "logs.txt"), "ab") as logs,
              open(result_path(self.options, name, "log"), "rb") as output):
            logs.write(f"\n######## {name}\n".encode())
            shutil.copyfileobj(output, logs)

    def collect(self):
        """All metrics of all runs so far, each with the name of its run."""
        with open(os.path.join(self.options.output_dir, "metrics.jsonl"), "w") as out:
            for path in sorted(glob.glob(f"{self.options.work}/*/metrics.jsonl")):
                run = os.path.basename(os.path.dirname(path))
                with open(path) as file, contextlib.suppress(ValueError):  # half a line of what was killed
                    out.writelines(json.dumps({"run": run, **json.loads(line)}) + "\n" for line in file)


def result_path(options, name, ending="json"):
    """Where a job's result or output lies."""
    return os.path.join(options.work, f"{name.replace(' ', '_')}.{ending}")


def do(options, name, function, *given):
    """Runs a job in this process, writes its result, or its error and where it rose, and ends the process."""
    try:
        result = {"ok": True} | (function(options, *given) or {})
    except BaseException as error:
        traceback.print_exc()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        result = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:400]}",
                  "where": f"{os.path.basename(frame.filename)}:{frame.lineno}"}
    path = result_path(options, name)
    with open(path + ".tmp", "w") as file:
        json.dump(result, file, default=str)
    os.replace(path + ".tmp", path)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def fork(options, name, job):
    """Starts a job in a process group of its own -> its id. Where this process has touched CUDA after all,
    the fork becomes a fresh interpreter."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    output = os.open(result_path(options, name, "log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        torch.zeros(1, device=DEVICE)
    except RuntimeError as error:
        print("exec:", error, flush=True)
        os.execv(sys.executable, [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--job", name,
                                  "--work", options.work])
    do(options, name, *job)


def stop(pid):
    """Kills a job and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def run_step(options, step, record):
    """Runs the jobs of a step that are asked for, within their caps and the budget."""
    only = options.only
    waiting = [name for name in step.jobs if not only or name.startswith(tuple(only))]
    factor = 1 if GPU else 10  # a CPU is slow, and its cores are few
    end = time.time() + min(step.whole * factor, record.left())
    running = {}
    while waiting or running:
        while waiting and len(running) < (step.at_once if GPU else 1):
            if end - time.time() < 10:
                record.line(waiting.pop(0), skipped="no time left")
                continue
            name = waiting.pop(0)
            running[fork(options, name, step.jobs[name])] = name, time.time()
        for pid, (name, begun) in list(running.items()):
            seconds, done = time.time() - begun, os.waitpid(pid, os.WNOHANG)
            if done[0]:
                del running[pid]
                record.ended(name, seconds, f"the process ended with status {done[1]}")
            elif seconds > step.each * factor or time.time() > end:
                stop(pid)
                del running[pid]
                record.ended(name, seconds, f"killed after {seconds:.0f} s")
        time.sleep(0.05)
    record.collect()


# ---- all of it ---------------------------------------------------------------------------------------------

def warm_up():
    """Imports what the jobs need -> what went wrong, if anything. bitsandbytes asks for the device's
    capability on import, which would start CUDA in this process."""
    asked = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    try:
        for name in ("common", "memory", *SCRIPTS, "bitsandbytes", "transformers.generation"):
            importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.cuda.get_device_capability = asked


def about(options):
    """The first line: when, on what, with which versions."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    name = subprocess.run(words, capture_output=True, text=True).stdout.strip() if GPU else "CPU"
    return {"date": time.strftime("%Y-%m-%d"), "device": name, "versions": versions, "dry": options.dry,
            "budget": options.budget, "real_weights": options.real, "data": bool(options.given_data)}


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default=os.path.join(ROOT, "out", "gpu"))
    parser.add_argument("--budget", type=float, default=460, help="seconds in all")
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct; default: its shape, random weights")
    parser.add_argument("--dataset_name", help="GSM8K as .jsonl with question and answer; default: sums")
    parser.add_argument("--only", nargs="+", help="jobs whose names begin so: 5, or '5 rollout sample'")
    parser.add_argument("--dry", action="store_true", help="all in miniature")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(options):
    """Folders and files that several jobs use."""
    random.seed(0)
    options.work = options.work or tempfile.mkdtemp(prefix="gpu_")
    options.given_data, options.real = options.dataset_name, bool(options.model) and not options.dry
    sums = f"{options.work}/sums.jsonl"
    if options.dry or not options.dataset_name:
        options.dataset_name = sums if options.job else make_sums(sums)
    if not options.real:
        options.model = shape_folder(options, "SmolLM2-135M")
    for shape in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B"):
        shape_folder(options, shape)


def main():
    options = parse_args()
    if not (GPU or options.dry):
        sys.exit("there is no GPU here; --dry runs all of it in miniature")
    record, wrong = Record(options), warm_up()
    prepare(options)
    steps = all_steps()
    if options.job:
        do(options, options.job, *next(step.jobs[options.job] for step in steps if options.job in step.jobs))
    record.line("0 start", **about(options), import_error=wrong, cuda_touched=torch.cuda.is_initialized())
    for step in steps:
        run_step(options, step, record)
    record.line("0 end")
    shutil.rmtree(options.work, ignore_errors=True)


if __name__ == "__main__":
    main()
