import atexit
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from itertools import islice

os.environ.setdefault("OMP_NUM_THREADS", "1")  # with more, a busy neighbour makes the same run five times slower
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests", "tiny"), os.path.join(ROOT, "tests", "figures")]  # for every test alike

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PhiConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import common

torch.set_num_threads(1)
WHOLE = os.path.join(ROOT, "tests", "tiny")
ROWS, PAIRS = 600, 200  # reading all 8,000 rows is two thirds of a test's time


def small_copy(folder):
    """A copy of the small example with its first ROWS rows and PAIRS pairs, for as long as this process lives."""
    parent = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    copy = shutil.copytree(folder, os.path.join(parent, "tiny"))
    for name, rows in (("addition.jsonl", ROWS), ("preferences.jsonl", PAIRS)):
        with open(os.path.join(folder, name)) as file, open(os.path.join(copy, name), "w") as first:
            first.writelines(islice(file, rows))
    return copy


TINY = os.environ.get("TINY_COPY") or os.environ.setdefault("TINY_COPY", small_copy(WHOLE))  # one for all processes


def run(script, out, *flags, tiny=True):
    """script.main() in this process, on the tiny defaults plus flags, writing to `out`; -> the metrics it wrote."""
    file = [os.path.join(TINY, os.path.basename(script.__file__).replace(".py", ".json"))] if tiny else []
    argv = [*file, "--output_dir", str(out), *map(str, flags)]
    script.main(common.parse_args(script.Args, argv))
    with open(os.path.join(out, "metrics.jsonl")) as lines:
        return [json.loads(line) for line in lines]


def load_by_card(folder, what="model"):
    """A saved folder's model, in eval(), as the code in its README.md loads it, or what else that code makes."""
    with open(os.path.join(folder, "README.md")) as file:
        code = re.search(r"```python\n(.*?)```", file.read(), re.DOTALL)[1]
    names = {}
    exec(code.replace("path/of/this/folder", str(folder)), names)
    names["model"].eval()
    return names[what]


def fork(function):
    """Starts function() in a forked child of this warm process -> the child's number."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # the child's pool of threads is made by one thread: two at once can find none
        function()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_child(function):
    """Runs function() in a forked child -> the child's wait status: 0, or how it ended."""
    return os.waitpid(fork(function), 0)[1]


class RecordGradients(torch.optim.SGD):
    """Stands in for AdamW: keeps each update's gradient and learning rate, and moves no weight."""

    def __init__(self, module, args):
        super().__init__([p for p in module.parameters() if p.requires_grad], lr=args.learning_rate)
        self.gradients, self.rates = [], []
        RecordGradients.last = self

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in self.param_groups[0]["params"]]))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """A test that comes to what needs an optional package, which is not installed, is skipped."""
    try:
        return (yield)
    except common.UserError as error:
        package = re.search(r"needs the package '(\w+)'", str(error))
        if package is None or importlib.util.find_spec(package[1]):
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Each test gets its own accelerate state (precision, trackers) and does not catch Ctrl-C."""
    from accelerate.state import AcceleratorState, GradientState
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    monkeypatch.setattr(common.Run, "catch_signals", lambda self: None)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(os.path.join(TINY, "model"))


CHANGED = {  # models that change their logits: the type, and how its config says it -> (scale, cap)
    "gemma2": ({"final_logit_softcapping": 3.0}, (1.0, 3.0)), "nanochat": ({"final_logit_softcapping": 3.0}, (1.0, 3.0)),
    "recurrent_gemma": ({"logits_soft_cap": 3.0, "attention_window_size": 8, "num_hidden_layers": 3}, (1.0, 3.0)),
    "cohere": ({"logit_scale": 0.3}, (0.3, None)), "granite": ({"logits_scaling": 1.7}, (1 / 1.7, None)),
    "hyperclovax": ({"logits_scaling": 0.3}, (0.3, None)), "minicpm3": ({"dim_model_base": 20, "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
                  "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16}, (20 / 64, None)),
    "falcon_h1": ({"lm_head_multiplier": 0.3, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
                  (0.3, None))}


def tiny_model(kind, seed=0):
    """A random model of 64 dimensions over the byte tokenizer's 320 ids: llama (tied or not), gpt2, phi, whose
    head has a bias, or one of CHANGED."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=320, n_positions=512, n_embd=64, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=260,
                            tie_word_embeddings=False)
    elif kind == "phi":
        config = PhiConfig(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                           max_position_embeddings=512, bos_token_id=None, eos_token_id=260)
    elif kind in CHANGED:
        if kind not in CONFIG_MAPPING:
            pytest.skip(f"this transformers has no {kind}")
        config = AutoConfig.for_model(kind, **{
            "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0} | CHANGED[kind][0])
    else:
        config = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=1, tie_word_embeddings=kind == "llama-tied", attention_dropout=0.0,
                             max_position_embeddings=512, bos_token_id=None, eos_token_id=260)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # spread the logits out, so that agreement means something
        model.get_output_embeddings().weight.mul_(8)
        if kind == "phi":
            model.lm_head.bias.normal_()
    common.no_dropout(model)  # gpt2 has it on by default
    return model.train()
