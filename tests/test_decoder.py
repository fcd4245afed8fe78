"""The decoder for GPUs on a CPU, where all of it but the recording of launches runs; what makes a GPU wait."""

import gc
import importlib
import json
import os
import subprocess
import sys
import weakref
from collections import Counter

import pytest
import torch
from conftest import ROOT, TINY, run, tiny_model
from peft import LoraConfig, get_peft_model
from test_grpo import PROMPTS, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

import common
import grpo

STOPS = [260, 7, 9, 40, 41]
G, C = 5, 60
UNIFORMS = torch.rand(len(PROMPTS) * G, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def replaying(monkeypatch):
    """From now on a CPU counts as a GPU; looks, widths and powers of two are small enough to matter."""
    def on(look=4):
        for name, value in (("DEVICES", ("cpu",)), ("LOOK", look), ("WIDTH", 16), ("LEAST", 2)):
            monkeypatch.setattr(common.ReplayingDecoder, name, value)
    return on


def model_of(kind):
    """small_model(kind), or one with LoRA whose B is not 0, or of the small example in 4 bits."""
    if kind == "4 bit":
        pytest.importorskip("bitsandbytes")
        return AutoModelForCausalLM.from_pretrained(os.path.join(TINY, "sft"), quantization_config=common.nf4(torch.float32, "cpu")).eval()
    model = small_model(kind.removesuffix(" lora"))
    if kind.endswith("lora"):
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def same(found, wanted):
    (ids, logprobs, lengths), (other_ids, other_logprobs, other_lengths) = found, wanted
    assert torch.equal(lengths, other_lengths)
    for i, n in enumerate(lengths):
        assert torch.equal(ids[i, :n], other_ids[i, :n])
        torch.testing.assert_close(logprobs[i, :n], other_logprobs[i, :n], rtol=0, atol=2e-5)


@pytest.mark.promise("decoder")
@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "llama lora", "gpt2", "qwen2", "qwen3", "mistral", "gemma3_text", "gemma3_text lora", "4 bit"])
@pytest.mark.parametrize("uniforms", [UNIFORMS, None], ids=["sampled", "greedy"])
def test_the_decoder_for_gpus_samples_what_the_other_does(kind, uniforms, replaying, capsys):
    """Prompts of four lengths, rows dropped to powers of two, caches that outgrow windows and widths."""
    model = model_of(kind)
    wanted = grpo.sample(model, PROMPTS, uniforms, C, 0.8, STOPS, G)
    replaying()
    same(grpo.sample(model, PROMPTS, uniforms, C, 0.8, STOPS, G), wanted)
    assert common.ReplayingDecoder.known[model] == "replay" and "slower" not in capsys.readouterr().out
    assert wanted[2].max() > 16 and (uniforms is None or len(set(wanted[2].tolist())) > 1)
    same(grpo.sample(model, PROMPTS[:1], uniforms if uniforms is None else uniforms[:1], C, 0.8, STOPS),
         tuple(x[:1] for x in wanted))


@pytest.mark.promise("decoder")
@torch.no_grad()
def test_under_autocast_the_cache_is_in_its_type(replaying):
    model = small_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        wanted = grpo.sample(model, PROMPTS, UNIFORMS, 8, 1.0, [], G)
        replaying()
        decoder = common.Decoder.start(model, PROMPTS, G, 8)
        found = grpo.sample(model, PROMPTS, UNIFORMS, 8, 1.0, [], G)
    layer = decoder.cache.layers[0]
    assert layer.keys.dtype == layer.values.dtype == torch.bfloat16
    assert layer.keys.shape[2] == 128 and len(layer.keys) == len(PROMPTS) * G
    assert (found[0] == wanted[0]).float().mean() > 0.7  # bf16 rounds in another order


@torch.no_grad()
def test_a_decoder_that_is_dropped_frees_its_cache_at_once(replaying):
    """A cycle of references would keep gigabytes of a GPU until the garbage collector happens to come."""
    replaying()
    decoder = common.Decoder.start(small_model("gemma3_text"), PROMPTS, G, C)
    decoder.step(torch.tensor([65] * len(PROMPTS) * G), torch.zeros(len(PROMPTS) * G, dtype=torch.bool))
    gone = weakref.ref(decoder.cache.layers[0])
    gc.disable()
    try:
        del decoder
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.promise("decoder")
def test_greedy_answers_by_the_decoder_for_gpus_are_those_of_generate(replaying, monkeypatch):
    model, plain = small_model("gemma3_text"), common.ReplayingDecoder.forward
    wanted = common.complete_greedily(model, PROMPTS, STOPS, 40)
    replaying()

    def forward(self, rows):
        logits = plain(self, rows)
        assert not logits.requires_grad  # whoever calls, no activations are kept
        return logits
    monkeypatch.setattr(common.ReplayingDecoder, "forward", forward)
    assert common.complete_greedily(model, PROMPTS, STOPS, 40) == wanted
    assert len(set(map(len, wanted))) > 1


@torch.no_grad()
def test_a_model_that_it_does_not_suit_is_sampled_by_the_other_and_that_is_said_once(replaying, capsys, monkeypatch):
    eager = small_model("llama")
    eager.set_attn_implementation("eager")
    wrong = small_model("qwen2")
    before = [grpo.sample(model, PROMPTS, UNIFORMS, C, 1.0, STOPS, G) for model in (eager, wrong)]
    replaying()
    same(grpo.sample(eager, PROMPTS, UNIFORMS, C, 1.0, STOPS, G), before[0])
    assert "without replaying kernels, which is slower: the attention is eager" in capsys.readouterr().out
    same(grpo.sample(eager, PROMPTS, UNIFORMS, C, 1.0, STOPS, G), before[0])
    assert "slower" not in capsys.readouterr().out
    put = common.ReplayingDecoder.put
    monkeypatch.setattr(common.ReplayingDecoder, "put", lambda self, tokens: put(self, tokens * 0))
    same(grpo.sample(wrong, PROMPTS, UNIFORMS, C, 1.0, STOPS, G), before[1])
    assert "its probabilities would be off by" in capsys.readouterr().out


@torch.no_grad()
def test_other_layers_and_attention_with_more_are_refused(replaying, capsys):
    replaying()
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
             "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 260, "pad_token_id": None}
    for kind, more, sentence in (("recurrent_gemma", {"attention_window_size": 8}, "replaying"),
                                 ("gpt_oss", {"num_local_experts": 2}, "replaying")):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)).eval()
        assert common.ReplayingDecoder.if_suited(model, PROMPTS, 1, 8) is None
        assert sentence in capsys.readouterr().out


@torch.no_grad()
def test_where_launches_cannot_be_recorded_the_steps_go_on(replaying, capsys, monkeypatch):
    model = small_model("llama")
    wanted = grpo.sample(model, PROMPTS, UNIFORMS, C, 1.0, STOPS, G)
    replaying()
    streams = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: (_ for _ in ()).throw(RuntimeError("no graph here")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    step = common.ReplayingDecoder.step

    def recorded(self, *args):
        going = step(self, *args)
        if self.known[self.model] == "replay":
            self.record((len(self.rows), self.at.width))
        return going
    monkeypatch.setattr(common.ReplayingDecoder, "step", recorded)
    same(grpo.sample(model, PROMPTS, UNIFORMS, C, 1.0, STOPS, G), wanted)
    assert capsys.readouterr().out.count("which is slower: no graph here") == 1
    assert common.ReplayingDecoder.known[model] == "launch" and streams == ["the stream"]


@torch.no_grad()
def test_without_memory_for_all_rows_at_full_length_the_other_decoder_goes_on(replaying, capsys, monkeypatch):
    model = small_model("llama")
    wanted = grpo.sample(model, PROMPTS, UNIFORMS, C, 1.0, STOPS, G)
    replaying()
    monkeypatch.setattr(common, "Buffers", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    same(grpo.sample(model, PROMPTS, UNIFORMS, C, 1.0, STOPS, G), wanted)
    assert "a lower --rollout_batch_size needs less" in capsys.readouterr().out
    assert model not in common.ReplayingDecoder.known  # the next rollout may be shorter


# ---- the inverse of the cumulative distribution ------------------------------------------------------------------------

@pytest.mark.promise("softmax")
def test_inverse_cdf_by_hand():
    probs = torch.zeros(1, 300)
    probs[0, [3, 130, 131, 299]] = torch.tensor([0.5, 0.25, 0.125, 0.125])
    for u, place in ((0.0, 3), (0.499999, 3), (0.5, 130), (0.7499999, 130), (0.75, 131), (0.875, 299), (1 - 2**-53, 299)):
        assert common.inverse_cdf(probs, torch.tensor([u], dtype=torch.float64)).tolist() == [place]
        assert common.inverse_cdf(3 * probs, torch.tensor([u], dtype=torch.float64)).tolist() == [place]  # u is a share


def test_inverse_cdf_of_what_is_not_a_distribution_is_some_place():
    """NaN travels on to the run's own message; an index out of range would end CUDA without one."""
    found = common.inverse_cdf(torch.full((2, 300), torch.nan), torch.tensor([0.3, 1 - 2**-53], dtype=torch.float64))
    assert (0 <= found).all() and (found < 300).all()


@pytest.mark.promise("softmax")
def test_a_target_off_by_rounding_falls_on_nothing_that_has_no_weight():
    """Sums of a block and of the blocks before it round differently: what is left may be below 0 or all of the block."""
    weights = torch.tensor([[0.0, 0.5, 0.5, 0.0]], dtype=torch.float64)
    for target, place in ((-1e-16, 1), (0.0, 1), (0.5, 2), (1.0, 2), (1 + 1e-15, 2)):
        assert common.passing(weights, torch.tensor([[target]], dtype=torch.float64))[0].item() == place


@pytest.mark.promise("softmax")
@pytest.mark.parametrize("V", [5, 128, 320, 1000])
def test_inverse_cdf_is_that_of_one_running_sum(V):
    """To the last draw, but where u and a sum are equal to 13 digits; what has no probability is never drawn."""
    generator = torch.Generator().manual_seed(V)
    probs = torch.randn(20_000, V, generator=generator).mul(4).softmax(-1)
    probs[:, 1::3] = 0
    u = torch.rand(20_000, generator=generator, dtype=torch.float64)
    cumulative = probs.double().cumsum(-1)
    plain = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True).squeeze(-1)
    found = common.inverse_cdf(probs, u)
    assert torch.equal(found, plain)
    assert probs.gather(-1, found[:, None]).min() > 0


# ---- what would make a GPU wait ----------------------------------------------------------------------------------------

class Waits(TorchDispatchMode):
    """Counts what asks the device for a value, so that the host waits for it."""
    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim", "repeat_interleave.Tensor")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if any(name.startswith(each) for each in self.ASKING):
            self.seen[name.split(".")[0]] += 1
        if name.startswith(("index", "_index_put")) and any(
                isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in (args[1] if isinstance(args[1], (list, tuple)) else ())):
            self.seen["boolean index"] += 1
        return function(*args, **kwargs or {})


@torch.no_grad()
def test_a_step_of_the_decoder_asks_for_no_value_between_its_looks(replaying, monkeypatch):
    replaying(look=16)
    model, seen, step = small_model("gemma3_text"), [], common.ReplayingDecoder.step
    grpo.sample(model, PROMPTS, UNIFORMS, 2, 1.0, [260], G)  # the first time the model is tried
    for name in ("tolist", "item", "cpu", "numpy"):
        def method(self, *args, name=name, plain=getattr(torch.Tensor, name)):
            seen.append(name)
            return plain(self, *args)
        monkeypatch.setattr(torch.Tensor, name, method)

    def watched(self, *args):
        looks = (self.steps + 1) % self.LOOK == 0
        with Waits() as waits:
            going = step(self, *args)
        assert looks or not waits.seen
        seen.append(("look", sum(waits.seen.values())) if looks else "step")
        return going
    monkeypatch.setattr(common.ReplayingDecoder, "step", watched)
    with Waits() as outside:
        decoder = common.ReplayingDecoder.if_suited(model, PROMPTS, G, 40)
        outside.seen.clear()
        monkeypatch.setattr(common.Decoder, "start", lambda *_: decoder)
        grpo.sample(model, PROMPTS, UNIFORMS, 40, 1.0, [260], G)
    assert seen.count("step") == 38 and [each for each in seen if each != "step"] == [("look", 1)] * 2
    assert outside.seen == {"_local_scalar_dense": 2}  # the script's part of the loop adds none


@pytest.mark.promise("no waiting")
@pytest.mark.parametrize("script", ["sft", "dpo", "reward_model", "ppo", "grpo"])
def test_a_micro_batch_waits_once(script, tmp_path, monkeypatch):
    """For how many tokens count; in backward for nothing."""
    counted, plain = [], common.Run.micro_batches

    def watched(self, *args, **kwargs):
        for mb in plain(self, *args, **kwargs):
            with Waits() as waits:
                yield mb
            counted.append(dict(waits.seen))
    monkeypatch.setattr(common.Run, "micro_batches", watched)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)  # transformers' own look, one a pass
    small = {"ppo": ("--max_steps", 8, "--batch_size", 16), "grpo": ("--batch_size", 2)}.get(script, ())
    run(importlib.import_module(script), tmp_path, "--max_steps", 2, "--eval_fraction", "0", *small)
    assert counted and all(each == {"nonzero": 1} for each in counted), counted


@pytest.mark.long
def test_the_program_for_gpus_runs_in_miniature(tmp_path):
    """All of tests/figures/gpu.py on a CPU: what a lent GPU's minutes are not to be spent on."""
    program = os.path.join(ROOT, "tests", "figures", "gpu.py")
    done = subprocess.run([sys.executable, program, "--dry", "--budget", "900", "--output_dir", str(tmp_path)], capture_output=True, text=True)
    with open(tmp_path / "gpu.jsonl") as file:
        lines = [json.loads(line) for line in file]
    assert done.returncode == 0 and [line for line in lines[1:-1] if not line.get("ok")] == []
    assert {line["job"][0] for line in lines} == set("012345678") and len(lines) > 50
