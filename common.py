"""common.py - loads models, reads data, pays rewards and keeps a run's folder: what no paper is about.

The line between this file and the scripts: every number between the token ids and the gradient is made in a
script. Here names go in and models come out; text goes in, ids and masks come out; rows go in, padded
micro-batches come out; reward names go in, scores come out. This file knows no loss and steps no optimizer.

Sections   errors · arguments · reading data, to messages, to tokens and masks, to training rows ·
           rows and micro-batches · showing things to a person · rewards · models, saving · processes ·
           checkpoints · decoding · sampling beside training · the run · the audit page
"""

import argparse
import ast
import asyncio
import atexit
import copy
import csv
import difflib
import errno
import faulthandler
import fcntl
import gc
import glob
import hashlib
import html
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
import zipfile
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate, groupby, islice, repeat
from multiprocessing import resource_tracker
from operator import ge, gt, itemgetter, le, lt
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Literal, NamedTuple
from unittest.mock import MagicMock, patch
from weakref import WeakKeyDictionary

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # its import names what it lacks

import pandas
import psutil
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import (DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs,
                              gather_object, parse_flag_from_env, recursively_apply, set_seed)
from huggingface_hub import ModelCardData
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AttentionInterface, AutoConfig, AutoModelForCausalLM,
                          AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig, DynamicCache,
                          HfArgumentParser, PretrainedConfig)
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

warnings.filterwarnings("ignore", category=FutureWarning)  # peft and transformers warn of their own calls
warnings.filterwarnings("ignore", message=".*(broadcast_buffers|Synchronization debug mode).*")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ---- errors ------------------------------------------------------------------------------------------------

class UserError(ValueError):
    """A mistake of the user's: one sentence that says what is wrong, where, and what to do."""


def require(ok, sentence):
    """Raises UserError(sentence) unless `ok`. A sentence about a row names no place: convert_rows does."""
    if not ok:
        raise UserError(sentence)


@contextmanager
def explain(sentence, kinds=Exception):
    """Turns a library's exception of these kinds into UserError("sentence: what it says")."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{sentence}: {reason_of(error)}") from None


def reason_of(error):
    """The first line of what an exception says."""
    text = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None)
    return (text or str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def user_errors():
    """Prints a UserError as one sentence on stderr (a machine's first process) and exits with code 2; with 2
    for a disk without room too, 141 where the reader of stdout has left, 130 after Ctrl-C."""
    for output in (sys.stdout, sys.stderr):  # a terminal or a log that takes no UTF-8 shows \\xe9
        output.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        if Run.preparing:  # the others wait in Run.together
            gather_object([error])
        if os.environ.get("LOCAL_RANK", "0") == "0":
            tqdm.write(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it may be what is full
        if error.errno == errno.EPIPE:  # whoever read the output has left
            sys.exit(141)
        print(f"{os.path.basename(sys.argv[0])}: error: {reason_of(error)}, writing "
              f"{error.filename or 'the output'}; the checkpoints are whole", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:  # a Run catches it once training starts: nothing has begun
        say("stopped before training; nothing was changed", file=sys.stderr)
        sys.exit(130)


def say(*text, file=None):
    """print() on the first process only, above a progress bar where there is one."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(" ".join(map(str, text)), file=file or sys.stdout)
        (file or sys.stdout).flush()
    spoken.at = time.monotonic()


SILENCE = 10  # seconds after which a person wonders whether it hangs
SIGNALS = signal.SIGINT, signal.SIGTERM
spoken = SimpleNamespace(at=time.monotonic())


def silent():
    """Whether nothing has been said for SILENCE seconds."""
    return time.monotonic() - spoken.at > SILENCE


def still(doing):
    """Says what is going on, where nothing has been said for a while."""
    if silent():
        say(f"...      {doing}")


def say_fetch(name):
    """Says that a name which is no folder here comes from the Hub, because downloads show no progress."""
    if not os.path.isdir(name):
        say(f"hub      fetching {name}, where the cache lacks it")


# ---- arguments ---------------------------------------------------------------------------------------------

def arg(default, help, needs="", aliases=(), **limits):
    """A flag: its default, what --help says of it, the bounds of a number (above, least, below, most), and
    what it needs to have an effect: "a or b=x, no c>1" is (a is on, or b is x) and not c > 1."""
    given = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": help, "aliases": list(aliases), "needs": needs, "limits": limits}, **given)


def default_of(flag):
    """A flag's default, a list too."""
    return flag.default_factory() if callable(flag.default_factory) else flag.default


def is_on(args, name):
    """Whether a flag has an effect: it is not None, False, 0 or empty; if its default is None, 0 has one."""
    value, off = getattr(args, name), getattr(type(args), name, [])
    return bool(value) or off is None and value == 0 and value is not False


def unmet(args, needs):
    """-> (the flags of the first need that is not met, what is wrong in words); ((), "") if there is none."""
    for need in needs.split(", ") if needs else ():
        none, names, words, met = need.startswith("no "), [], [], False
        for term in need.removeprefix("no ").split(" or "):
            name, sign, than = re.fullmatch(r"(\w+)([=>]?)(\w*)", term).groups()
            value = getattr(args, name)
            met |= value == than if sign == "=" else value > int(than) if sign else is_on(args, name)
            names.append("model_name_or_path" if name == "adapter" else name)
            low = " above 0" * (value == 0 and value is not False)
            words.append({"": f"--{name}{low}", "=": f"--{name} {than}", ">": f"--{name} above {than}"}[sign])
        words = " or ".join(words).replace("--adapter", "an adapter that goes on")
        if met == none:
            how = f"beside {words}: leave it out" if none else f"without {words}: give both or neither"
            return names, how
    return (), ""


def check_needs(args):
    """UserError for a flag that cannot act in this run, if it was typed or differs from its default. One of
    an arguments file that is switched off by what was typed on top is said and set back."""
    for flag in fields(args):
        name, value, typed = flag.name, getattr(args, flag.name), flag.name in args.typed
        others, lacks = unmet(args, flag.metadata["needs"]) if is_on(args, name) else ((), "")
        if lacks:  # a flag that needs another has a plain default, but what is None may have been filled in
            default = getattr(replace(args, **{name: flag.default}), name)
            idle = value != default or typed and name not in args.filed
            switched_off = set(others) & args.typed and not typed
            require(not idle or switched_off, f"--{name} {value} has no effect {lacks}")
            if idle:
                say(f"flags    --{name} {value} of the file has no effect {lacks.partition(':')[0]}")
                setattr(args, name, default)


def check_number(name, value, limits):
    """UserError unless a flag's value (None: not given) is finite and lies within its limits."""
    for number in value if isinstance(value, list) else [value]:
        require(not isinstance(number, float) or math.isfinite(number), f"--{name} is {number}")
    holds = {"above": gt, "least": ge, "below": lt, "most": le}
    inside = value is None or all(holds[limit](value, bound) for limit, bound in limits.items())
    must = " and ".join(re.sub("(least|most)", r"at \1", f"{key} {bound}") for key, bound in limits.items())
    require(inside, f"--{name} must be {must}, not {value}")


NEW = "no adapter, lora_r"  # needs of the flags that describe a new adapter: one that goes on has its own
EVAL = "eval_dataset_name or eval_fraction"
MOVED = "num_iterations>1 or num_minibatches>1"  # in a rollout's first update every ratio is 1,
LAGS = f"{MOVED} or rollout_lag>0"  # but for samples of an earlier policy


@dataclass
class Args:
    """What every script has: flags that load, read, step and save. A script's own stand in its file, among
    them learning_rate, batch_size and num_train_epochs, and resolve()."""
    ZERO_EPOCHS = False  # grpo: --num_train_epochs 0 only evaluates
    typed = filed = frozenset()  # names of the flags that were given: typed, and in an arguments file
    # model
    model_name_or_path: str | None = arg(None, "name or folder of a model, or folder of a LoRA adapter")
    attn_implementation: str | None = arg(None, "attention kernel, such as sdpa or flash_attention_2")
    trust_remote_code: bool = arg(False, "run Python code that comes with the model")
    chat_template_path: str | None = arg(None, "Jinja file that replaces the chat template")
    chat_template_kwargs: str | None = arg(None, "JSON object: defaults of what the chat template is given")
    date: str | None = arg(None, "what a chat template takes for today; default: the day the run began")
    load_in_4bit: bool = arg(False, "QLoRA: hold the frozen base in 4 bits (NF4, double quantisation)",
                             "lora_r or adapter")
    lora_r: int = arg(0, "rank of the LoRA adapters; 0 trains all weights", least=0, most=2**16)
    lora_alpha: int = arg(32, "scale of LoRA: its update is multiplied by lora_alpha / lora_r", NEW)
    lora_target_modules: list[str] | None = arg(
        None, "modules that get an adapter; default: all-linear", NEW)
    modules_to_save: list[str] | None = arg(
        None, "modules that are trained in full beside the adapters", NEW)
    gradient_checkpointing: bool = arg(True, "compute activations again in backward: saves memory")
    bf16: bool | None = arg(None, "compute under bf16 autocast; default: where an accelerator has it")
    # data
    dataset_name: str | None = arg(None, "a .json, .jsonl, .csv or .parquet file, or a dataset[:split]")
    eval_dataset_name: str | None = arg(None, "evaluation data; default: a part of the training data")
    eval_fraction: float = arg(0.05, "that part: a share of the rows, at most 200, split off by prompt",
                               "no eval_dataset_name", least=0, below=1)
    format: str | None = arg(None, "form of the rows; default: recognised by their columns")
    system_prompt: str | None = arg(None, "system message for rows that have none")
    skip_bad_rows: bool = arg(False, "count and skip malformed rows instead of stopping at the first")
    # optimization
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = arg("cosine", "decay after the warm-up")
    warmup_steps: float = arg(0.03, "steps of linear warm-up; below 1: a share of all steps", least=0)
    weight_decay: float = arg(0.0, "AdamW's weight decay, of matrices alone", least=0)
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm; 0: never", least=0)
    optim: Literal["adamw_torch", "adamw_8bit"] = arg("adamw_torch", "8bit needs bitsandbytes")
    micro_batch_tokens: int | None = arg(None, "padded tokens of a forward pass: changes memory alone; "
                                         "default: 8192, on a CPU 2048", above=0)
    max_steps: int = arg(-1, "updates (ppo, grpo: whole rollouts of them); overrides num_train_epochs")
    seed: int = arg(0, "decides orders, samples, noise and random weights", least=0, below=2**32)
    # output
    output_dir: str | None = arg(None, "folder of the run; default: out/<name of the script>")
    overwrite_output_dir: bool = arg(False, "replace the run that is there")
    resume_from_checkpoint: str | None = arg(None, "go on from 'latest', or from a checkpoint's folder")
    eval_on_start: bool | None = arg(None, "evaluate before the first step; default: yes", EVAL)
    save_steps: int = arg(200, "steps between checkpoints (ppo, grpo: rounded up to whole rollouts)", above=0)
    save_total_limit: int = arg(2, "checkpoints that are kept", above=0)
    logging_steps: int = arg(10, "steps, or else 10 s, between printed lines; metrics.jsonl has all", above=0)
    log_with: Literal["tensorboard", "wandb", "trackio"] | None = arg(
        None, "tracker", aliases=["--report_to"])
    audit: str | None = arg(None, "write what the loss sees of every token to FILE.html, and save nothing")
    audit_step: int | None = arg(None, "the step that --audit shows; default: the first", "audit")
    merge: bool = arg(False, "also write merged/, the adapter merged into its base", "lora_r or adapter")

    def __post_init__(self):
        """Checks what one flag tells alone; UserError. A script's own checks follow in its __post_init__."""
        for flag in fields(self):
            check_number(flag.name, getattr(self, flag.name), flag.metadata["limits"])
        for name in ("max_steps", "num_train_epochs"):
            require(getattr(self, name) < 10**9, f"--{name} {getattr(self, name)} would never end")
        require(self.max_steps > 0 or self.num_train_epochs > 0 or self.ZERO_EPOCHS,
                "nothing to do: give --max_steps or --num_train_epochs above 0")
        require(self.max_steps == -1 or self.max_steps > 0,
                f"--max_steps must be above 0, or -1 for no limit, not {self.max_steps}")
        require(self.dataset_name,
                "--dataset_name is missing: a .json, .jsonl, .csv or .parquet file, or a dataset name")
        with explain(f"--date {self.date}: expected a day such as 2026-03-01", ValueError):
            datetime.strptime(self.date or "2026-03-01", "%Y-%m-%d")
        eight_bit = "bitsandbytes" if self.optim == "adamw_8bit" else None
        for flag, package in (("log_with", self.log_with), ("optim", eight_bit)):
            require(package is None or importlib.util.find_spec(package),  # accelerate would go on unlogged
                    f"--{flag} {getattr(self, flag)} needs the package '{package}': pip install {package}")
        script = os.path.basename(sys.modules[type(self).__module__].__file__)
        if self.output_dir is None:
            self.output_dir = os.path.join("out", script.removesuffix(".py"))
        for name, value in vars(self).items():
            if isinstance(value, str) and name != "system_prompt":  # names and folders, no text
                setattr(self, name, os.path.expanduser(value))

    @property
    def adapter(self):
        """Whether training goes on with the LoRA adapter of --model_name_or_path."""
        return base_and_adapter(self.model_name_or_path)[1] is not None


INSTEAD = {  # flags people bring along from elsewhere, and what takes their place here
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"),
                    "--batch_size counts the rows of a whole step (ppo, grpo: the prompts of a rollout) over "
                    "all processes; --micro_batch_tokens cuts it to fit the memory"),
    "packing": "rows are not packed but sorted by length inside a step, which leaves little padding",
    "use_vllm": "rollouts are sampled in the script itself; vLLM is not used (grpo: see rollout_lag)",
    "beta": "the weight of the KL term is --kl_coef here; --beta is DPO's",
    "max_seq_length": "use --max_length (ppo, grpo: --max_prompt_length and --max_completion_length)",
    "max_prompt_length": "--max_length holds prompt and answer", "lr": "use --learning_rate",
    "lora_dropout": "there is none, so that sampler, trainer and reference agree",
    "fp16": "bf16 autocast or fp32 only: --bf16", "per_device_eval_batch_size": "use --micro_batch_tokens",
    "dtype": "trained weights are fp32; --bf16 computes in bf16", "rpo_alpha": "use --sft_coef",
    "use_peft": "use --lora_r 16", "peft_config": "use --lora_r 16", "lam": "use --gae_lambda",
    "cliprange": "use --epsilon", "cliprange_value": "use --value_clip",
    "num_ppo_epochs": "use --num_iterations", "num_mini_batches": "use --num_minibatches",
    "steps_per_generation": "use --num_minibatches", "save_strategy": "use --save_steps",
    "generation_batch_size": "use --batch_size, which counts prompts", "eval_strategy": "use --eval_steps",
    "log_completions": "samples.jsonl has the first of every rollout",
    **dict.fromkeys(("top_k", "top_p"), "the whole softmax is sampled; tests/edits/grpo-top-p.diff cuts it"),
    "tools": "tool calls are not supported; tests/edits/grpo-environment.diff has turns with a tool"}


class Parser(HfArgumentParser):
    """A dataclass's flags, with a UserError for every mistake and a --help that is for reading."""

    def __init__(self, args_class):
        self.args_class, self.names = args_class, [flag.name for flag in fields(args_class)]
        super().__init__(args_class, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse takes -1e-05 for a flag

    @staticmethod
    def _parse_dataclass_field(parser, flag):
        flag = copy.copy(flag)
        ours = "limits", "needs"  # of which argparse knows nothing
        flag.metadata = {name: value for name, value in flag.metadata.items() if name not in ours}
        HfArgumentParser._parse_dataclass_field(parser, flag)
        if "bool" in str(flag.type):  # alone it is True, also where the default is None
            action = parser._option_string_actions[f"--{flag.name}"]
            action.nargs, action.const = "?", True

    def error(self, message):
        raise UserError(message)

    def format_help(self):
        """The script's first paragraph, its flags in the groups of its file, and its metrics."""
        module = sys.modules[self.args_class.__module__]
        text, flags = inspect.getdoc(module) or "", {flag.name: flag for flag in fields(self.args_class)}
        metrics = re.search(r"^Metrics.*?(?=\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
        groups = {}  # "# model" heads the flags below it; a flag belongs to the last heading it stands under
        for source in map(inspect.getsource, (Args, self.args_class)):
            for heading, name in re.findall(r"^    (?:# (\w.*)|(\w+): .*?= arg\()", source, re.MULTILINE):
                if heading:  # a script's order of groups wins
                    group, groups[heading] = heading, groups.pop(heading, [])
                else:
                    groups = {key: [n for n in names if n != name] for key, names in groups.items()}
                    groups[group].append(name)
        groups["output"] = groups.pop("output")  # last, behind the script's own
        lines = [text.split("\n\n")[0], "",
                 f"usage: python {os.path.basename(module.__file__)} [ARGUMENTS.json] [--flag value ...]"]
        for group, names in groups.items():
            lines += ["", group + ":"]
            lines += [self.help_of(flags[name]) for name in names]
        return "\n".join([*lines, "", metrics[0] if metrics else "", ""])

    def help_of(self, flag):
        """What --help says of a flag: its one spelling, what it takes, what it does, its default."""
        written = str(flag.type)
        choices = re.search(r"Literal\[(.*?)\]", written)
        takes = "|".join(re.findall(r"\w+", choices[1])) if choices else next(
            (word for kind, word in (("bool", ""), ("int", "N"), ("float", "X")) if kind in written), "TEXT")
        takes = "True|False" if flag.default is True or "bool | None" in written else takes
        default = default_of(flag)
        default = " ".join(default) if isinstance(default, list) else default
        what = flag.metadata["help"] + ("" if default is None or default is False else f" [{default}]")
        head = f"  --{flag.name} {takes}{' ...' if 'list' in written else ''} "
        before, indent = ("", head.ljust(36)) if len(head) <= 36 else (head.rstrip() + "\n", " " * 36)
        return before + textwrap.fill(what, 108, initial_indent=indent, subsequent_indent=" " * 36)

    def unknown(self, word):
        """The sentence about a flag, or a file's argument, that there is not."""
        name = word.split("=")[0].lstrip("-").replace("-", "_")
        close = difflib.get_close_matches(name, self.names, n=1, cutoff=0.75)
        close = close or [n for n in self.names if {*name.split("_")} <= {*n.split("_")}]
        dashes = "--" if word.startswith("--") else ""
        hint = f"; did you mean {dashes}{close[0]}?" if close else "; --help lists the flags"
        instead = INSTEAD.get("use_vllm" if name.startswith("vllm_") else name.removeprefix("torch_"), "")
        named = re.findall(r"--(\w+)", instead)
        fits = instead and (not named or set(named) & set(self.names))
        return f"unknown argument {word}" + (f": {instead}" if fits else hint)

    def given(self, words):
        """["--flag", "value", ...] -> the names of these flags."""
        seen = self.values(words, argparse.Namespace(**dict.fromkeys(self.names, self)))
        return frozenset(name for name, value in seen.items() if value is not self)

    def values(self, words, start=None):
        """["--flag", "value", ...] -> {name: value}, with what `start` has, else defaults, filled in."""
        known, rest = self.parse_known_args(words, start)
        if rest:
            wrong = [word for word in rest if word.startswith("--")] or rest[:1]
            require(not wrong[0].startswith("-"), "\n  ".join(map(self.unknown, wrong)))
            flags = [word.split("=")[0] for word in words[:words.index(rest[0])] if word.startswith("--")]
            raise UserError(f"one value too many{' for ' + flags[-1] if flags else ''}: {rest[0]}")
        return vars(known)

    def words_of_file(self, path):
        """An arguments file as if its values had been typed: they pass the same checks."""
        require(path.endswith(".json"),
                f"'{path}': expected --flag value, or an arguments file ending in .json first")
        with (explain(f"cannot read the arguments file {path}", OSError),
              explain(f"{path} is not valid JSON", ValueError), open(path, encoding="utf-8-sig") as file):
            given = json.load(file)
        require(isinstance(given, dict), f"{path} must hold one JSON object of arguments")
        here, words = os.path.relpath(os.path.dirname(path) or "."), []
        wrong = [name for name in given if name not in self.names]
        require(not wrong, f"{path}: " + "\n  ".join(map(self.unknown, wrong)))
        for name, value in given.items():
            if value is None or value == []:
                continue
            value = json.dumps(value) if isinstance(value, dict) else value
            texts = [str(v).replace("$HERE", here if name != "system_prompt" else "$HERE")
                     for v in (value if isinstance(value, list) else [value])]
            words += [f"--{name}={texts[0]}"] if len(texts) == 1 else [f"--{name}", *texts]
        with explain(path, UserError):
            self.values(words)
        return words


def parse_args(args_class, argv=None):
    """[FILE.json] [--flag value ...] -> args_class. Flags win over the file; "$HERE" in it is its own folder.
    Without file and model the small example runs: tests/tiny/<script>.json beside the script. UserError on an
    unknown, abbreviated or mistyped flag."""
    argv, parser = list(sys.argv[1:] if argv is None else argv), Parser(args_class)
    path = argv.pop(0) if argv and not argv[0].startswith("-") else None
    typed = parser.values(argv)
    example = path is None and typed["model_name_or_path"] is None
    if example:
        folder, script = os.path.split(os.path.abspath(sys.modules[args_class.__module__].__file__))
        path = os.path.join(folder, "tests", "tiny", script.replace(".py", ".json"))
        require(os.path.exists(path), "no model given and no tests/tiny beside the script: "
                "add --model_name_or_path NAME_OR_FOLDER --dataset_name NAME_OR_FILE")
    filed = parser.words_of_file(path) if path else []
    args = args_class(**parser.values(filed + argv))
    require(args.model_name_or_path, "--model_name_or_path is missing: the name or folder of a model")
    args.typed, args.filed = parser.given(argv), parser.given(filed)
    here = os.path.dirname(path or "") or "."
    moved = os.path.isdir(os.path.join(here, "checkpoints")) and "output_dir" not in args.typed and (
        os.path.realpath(here) != os.path.realpath(args.output_dir))
    require(not moved or args.resume_from_checkpoint != "latest", f"{path} lies beside checkpoints, but its "
            f"--output_dir is {args.output_dir}: add --output_dir {here}")
    if example:
        before = os.path.join(args.output_dir, "args.json")
        if "output_dir" in args.typed:  # it replaces itself in its own folder alone
            args.overwrite_output_dir = typed["overwrite_output_dir"]
        elif os.path.exists(before) and not args.audit and not typed["overwrite_output_dir"]:
            with explain(f"{before} is not readable", (OSError, ValueError)), open(before, "rb") as file:
                theirs = json.load(file).get("model_name_or_path")
            require(theirs == args.model_name_or_path, f"{args.output_dir} holds a run of {theirs}, which "
                    "the small example would replace: choose another --output_dir, or --overwrite_output_dir")
        say(f"No --model_name_or_path: running the small example of {os.path.relpath(path)} "
            "(flags go on top of it).")
    return args


# ---- reading data ------------------------------------------------------------------------------------------

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant"}

# Format -> the columns that must be there. The first format that fits is taken; --format overrides.
SFT_FORMATS = {"messages": ("messages",), "conversations": ("conversations",),
               "prompt_completion": ("prompt", "completion"), "alpaca": ("instruction", "output"),
               "question_answer": ("question", "answer"), "text": ("text",)}
PROMPT_FORMATS = {"prompt": ("prompt",), "instruction": ("instruction",), "question": ("question",)}
PAIR_FORMATS = {"sharegpt_pair": ("conversations", "chosen", "rejected"),
                "alpaca_pair": ("instruction", "chosen", "rejected"),
                "prompt_pair": ("prompt", "chosen", "rejected"), "conversation_pair": ("chosen", "rejected")}
SCORE_FORMATS = {"prompt_completion_score": ("prompt", "completion", "score")}
SIDES = ("chosen", "rejected")

# What a row may hold beside its format's columns, and a message beside its role and text. BESIDE is used, by
# the format's first column; MEANT, and LEFT_OUT of messages and of strings beside a prompt, would change what
# is said: refused where they hold something. All else is counted and named (or reaches the reward functions).
BESIDE = {"instruction": {"input", "history", "system"}, "prompt": {"history", "system"},
          "question": {"history", "system"}, "text": set()}  # of conversations: the system message
MEANT = {"tools", "functions", "documents", "image", "images", "audio", "audios", "video", "videos",
         "system_prompt", "chat_template_kwargs"}
LEFT_OUT = {"thinking", "reasoning", "reasoning_content", "tool_calls", "function_call", "refusal"}
WEIGHTS = {"weight", "train", "training", "loss"}  # of messages: 1 (true) counts, 0 (false) does not


def read_rows(name, skip_bad_rows=False):
    """A local .json, .jsonl, .csv or .parquet file, or a dataset (read_dataset) -> [(row dict, place such as
    "a.jsonl:12")]. UserError with file, line and reason on what cannot be read; skip_bad_rows counts and
    prints it."""
    def checked(row):
        if isinstance(row, ValueError):
            raise row
        require(isinstance(row, dict), "not a JSON object")
        try:
            json.dumps(row, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:  # broken bytes, or half an emoji: no tokenizer takes them
            raise ValueError(f"text that is not valid UTF-8 ({error.reason})") from None
        return row

    looks_local = re.search(r"\.(jsonl?|csv|parquet|txt)$", name) or name.startswith((".", "/", "~"))
    require(os.path.exists(name) or os.path.isdir(name.split(":")[0]) or not looks_local,
            f"no such file: {name}")
    with explain(f"cannot read {name}", (OSError, csv.Error)):
        rows = read_file(name) if os.path.isfile(name) else read_dataset(name)
        return [(row, place) for row, _, place in convert_rows(rows, checked, skip_bad_rows, name)]


def read_file(path):
    """-> (row, place) of each row; where a row cannot be read, a ValueError with the reason stands for it."""
    if path.endswith(".csv"):
        csv.field_size_limit(2**30)
        wrong = ValueError("the number of fields differs from the header's")
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)  # None is the name of fields too many and the value of missing ones
            names = [name for name in reader.fieldnames or () if name]
            require(len({*names}) == len(names), f"{path}: two columns have the same name")
            rows = [(row, f"{path}:{reader.line_num}") for row in reader]
        return [(wrong if None in (*row, *row.values()) else row, place) for row, place in rows]
    if path.endswith(".parquet"):
        with explain(f"{path}: Parquet needs the package 'pyarrow' (pip install pyarrow)", ImportError):
            import pyarrow.parquet
        with explain(f"{path} is not a readable Parquet file"):
            rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        require(path.endswith((".json", ".jsonl")),
                f"{path}: unknown kind of file; .json, .jsonl, .csv and .parquet are read")
        with open(path, "rb") as file:
            if not re.match(rb"(\xef\xbb\xbf)?\s*\[", file.peek(64)):
                lines = enumerate(map(bytes.strip, file), 1)
                return [(parse_json(line), f"{path}:{n}") for n, line in lines if line]
            rows = parse_json(file.read())
        require(isinstance(rows, list), f"{path}: {rows}")
    return ((row, f"{path} row {i}") for i, row in enumerate(rows))


def parse_json(data):
    """bytes of JSON -> its value, or a ValueError that says what is wrong with them."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON ({reason_of(error).replace(': line 1 column', ' at column')})")


def read_dataset(name):
    """A folder or a dataset on the hub: name, name:split or name:config:split -> (row, place) of each row."""
    missing = f"'{name}' is no file here, and a dataset needs the package 'datasets' (pip install datasets)"
    with explain(missing, ImportError):
        import datasets
    datasets.disable_progress_bars()
    path, *config, split = name.split(":") if ":" in name else (name, "train")
    say_fetch(path)
    with explain(f"'{name}' is neither a file here nor a dataset that could be loaded"):
        if any(os.path.exists(os.path.join(path, f"dataset_{kind}.json")) for kind in ("info", "dict")):
            data = datasets.load_from_disk(path)
            splits = data if isinstance(data, datasets.DatasetDict) else {"train": data}
            require(split in splits, f"no split '{split}', only {', '.join(splits)}")
            data = splits[split]
        else:
            data = datasets.load_dataset(path, *config, split=split)
    return ((row, f"{name} row {i}") for i, row in enumerate(data))


def convert_rows(rows, convert, skip_bad_rows, name=None):
    """[(*values, place)] -> [(convert(*values), *values, place)]. A ValueError becomes a UserError with the
    place; with skip_bad_rows it is counted and printed. UserError if no row of `name` is left."""
    kept, skipped = [], Counter()
    for number, (*values, place) in enumerate(rows, 1):
        still(f"{'reading ' + name if name else 'tokenizing'}: row {number:,}")
        try:
            kept.append((convert(*values), *values, place))
        except ValueError as error:
            require(skip_bad_rows, f"{place}: {error}; mend it or add --skip_bad_rows")
            skipped[re.sub(r"\d+", "N", str(error))] += 1
    if skipped:
        say(f"data     {name or 'tokenizing'}: skipped {skipped.total():,} rows: "
            + "; ".join(f"{n:,} {why}" for why, n in skipped.most_common(5)))
    require(kept or name is None, f"{name} holds no usable row")
    return kept


def find_format(rows, formats, chosen=None):
    """`chosen`, or the first format whose columns the first row has. UserError if there is none."""
    row, place = rows[0]
    require(chosen is None or chosen in formats, f"unknown --format {chosen}: one of {', '.join(formats)}")
    fitting = [name for name, needed in formats.items() if set(needed) <= set(row)]
    known = "; ".join(f"{name} ({', '.join(needed)})" for name, needed in formats.items())
    columns = ", ".join(sorted(map(str, row)))
    require(chosen or fitting, f"{place}: no known format has the columns {columns}"
            f"{' (a first line with their names, and commas?)' * ('.csv:' in place)}. Known are: {known}")
    require(not chosen or chosen in fitting, f"{place}: --format {chosen} needs the columns "
            f"{', '.join(formats.get(chosen, ()))}, and there are {columns}")
    return chosen or fitting[0]


def read_items(name, args, tokenizer, formats, convert, also=()):
    """-> ([(converted, row, place)], format) of a dataset; convert is to_conversation or the like. `also` are
    columns that the caller uses, None if all are. What is not used, and what looks wrong, is said."""
    rows, unused = read_rows(name, args.skip_bad_rows), Counter()
    format = find_format(rows, formats, args.format)

    def checked(row):
        spare = unused_names(row, formats[format], also)
        converted = convert(row, format, args.system_prompt)
        unused.update(spare)
        return converted
    items = convert_rows(rows, checked, args.skip_bad_rows, name)
    say(f"data     {name}: format {format}, {len(rows):,} rows")
    if unused:
        say("data     not used: " + ", ".join(f"{what} ({n:,} rows)" for what, n in sorted(unused.items())))
    warn_of_texts(tokenizer, items, formats[format])
    return items, format


def unused_names(row, columns, also):
    """The columns of a row, and the keys of its messages, that hold something and are not used -> {name}.
    ValueError if one would change what the row says."""
    beside, spare = BESIDE.get(columns[0], {"system"}), set()
    used, refused = beside.union(columns), MEANT | {"system", "history"}
    if also is not None:  # else reward functions are given them
        refused |= {"weight", "train"} | (LEFT_OUT | {"input"} if "history" in beside else set())
    for name, value in row.items():
        if name in used:
            messages = unpacked(value) if name in columns else None
            messages = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
            keys = {key for m in messages for key in m} - {"role", "from", "content", "value"} - WEIGHTS
            spare |= {f"'{key}' of messages" for key in keys}
        elif value not in (None, "", [], {}, "[]", "{}"):
            whole = name in ("weight", "train") and value in (1, "1", "1.0")
            require(name not in refused or whole, f"column '{name}' would change what the row says and is "
                    f"not used beside {', '.join(columns)}: remove it, or say it in their text")
            spare |= {f"column '{name}'"} if also is not None and name not in also else set()
    return spare


def warn_of_texts(tokenizer, items, columns):
    """Says how many rows have text that the tokenizer takes for special tokens, or answers that repeat the
    prompt, and shows where."""
    def say_where(places, what):
        if places:
            say(f"warning  {len(places):,} rows have {what}: {', '.join(places[:3])}")
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = re.compile("|".join(sorted(map(re.escape, tokens), key=len, reverse=True)) or "(?!)")
    found = [(special.search(repr(said)), place) for said, _, place in items]  # its keys hold no token
    say_where([f"{token[0]} ({place})" for token, place in found if token],
              "text that the tokenizer reads as special tokens")
    twice = []
    for _, row, place in items:
        prompt, *answers = (str(row.get(name)).strip() for name in columns)
        twice += [place] * (prompt != "" and any(answer.startswith(prompt) for answer in answers))
    if 2 * len(twice) >= len(items) and columns[0] in BESIDE:  # of a few it may be the answer
        say_where(twice, "answers that begin with the whole prompt, which then comes in twice")


def read_split(args, tokenizer, formats, convert, prompt_of, counts=None, also=()):
    """-> (training items, held-out items, [the format of each file]). Without --eval_dataset_name, hold_out
    splits by prompt_of(converted), messages. With `counts` (a Counter) repeated training rows are dropped and
    counted."""
    items, format = read_items(args.dataset_name, args, tokenizer, formats, convert, also)
    require(format != "text" or not args.system_prompt,
            f"--system_prompt has no effect on rows of text: leave it out ({args.dataset_name})")
    if counts is not None:
        unique = {}
        for item in items:
            unique.setdefault(hashlib.sha256(repr(item[0]).encode()).digest(), item)
        counts["duplicates dropped"] += len(items) - len(unique)
        items = list(unique.values())
    if args.eval_dataset_name:
        held, held_format = read_items(args.eval_dataset_name, args, tokenizer, formats, convert, also)
        trained = {prompt_key(prompt_of(converted)) for converted, _, _ in items}
        both = sum(prompt_key(prompt_of(converted)) in trained for converted, _, _ in held)
        if both:
            say(f"warning  {both:,} of {len(held):,} evaluation rows have a prompt that is trained on too")
        return items, held, [format, held_format]
    train, held = hold_out(items, [prompt_of(converted) for converted, _, _ in items], args.eval_fraction)
    return train, held, [format]


def hold_out(items, prompts, fraction, most=200):
    """Splits items into (train, evaluation) by prompts, lists of messages: those whose prompt_key has the
    smallest SHA-256 are held out, the same in every script. At most round(fraction x rows) and at most `most`
    rows: a prompt that would exceed this is skipped. If all would, system messages count too; if that is no
    help, one of the smallest size is held out, where `most` allows it; none if there is one alone."""
    wanted, held, count, parts = min(most, round(fraction * len(items))), set(), 0, ([], [])
    keys = list(map(prompt_key, prompts))
    if min(Counter(keys).values()) > wanted:
        keys = [prompt_key(prompt, system=True) for prompt in prompts]
    size = Counter(keys)
    limit = min(most, max(wanted, min(size.values())))
    for key in sorted(size, key=lambda key: hashlib.sha256(key.encode()).digest()):
        if count < wanted and count + size[key] <= limit and len(held) + 1 < len(size):
            held.add(key)
            count += size[key]
    for item, key in zip(items, keys):
        parts[key in held].append(item)
    return parts


def counted(counts):
    """A Counter of what happened to rows, as the end of a printed line."""
    return "".join(f"; {n:,} {what}" for what, n in counts.items() if n)


def say_split(args, train, held, noun, counts):
    """Says how many there are and what `counts` counted; UserError if none is left to train on."""
    say(f"data     {len(train):,} {noun}s to train on, {len(held):,} to evaluate{counted(counts)}")
    require(train, f"{args.dataset_name}: no {noun} to train on is left{counted(counts)}")
    require(held or not args.eval_dataset_name,
            f"{args.eval_dataset_name}: no {noun} to evaluate is left{counted(counts)}")


# ---- from columns to messages ------------------------------------------------------------------------------

def check_value(ok, sentence, value):
    """Raises ValueError(sentence and the beginning of the value) unless `ok`."""
    if not ok:
        text = repr(value)
        raise ValueError(f"{sentence} {text if len(text) <= 60 else text[:57] + '...'}")


def text_value(value, what):
    """The value if it is a string, else ValueError."""
    check_value(isinstance(value, str), f"{what} is not a string but", value)
    return value


def number_value(value, sentence):
    """float(value), or ValueError(sentence and the value) where that is no number below 1e30."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    check_value(abs(number) < 1e30 and not isinstance(value, bool), sentence, value)
    return number


def turn(role, content, train=True):
    """One message; `train` counts for the assistant's alone."""
    return {"role": role, "content": content, "train": train and role == "assistant"}


def unpacked(value):
    """Messages that a CSV has turned into text, JSON or Python's repr, as a list again; any other value as it
    is. ValueError where such text cannot be read."""
    if not isinstance(value, str) or not re.match(r"\s*[\[{]", value):
        return value
    with suppress(*UNREADABLE):
        found = parsed(value)
        messages = found if isinstance(found, list) else [found]
        told = [str(m.get("role", m.get("from"))) for m in messages if "content" in m or "value" in m]
        return messages if ROLES.keys() & told and len(told) == len(messages) else value
    torn = re.match(r"(?s)\s*\[\s*\{.*\}\s*\]\s*$", value) and re.search(r"(['\"])(role|from)\1\s*:", value)
    check_value(not torn, "messages as text that is neither JSON nor Python's repr (write .jsonl):", value)
    return value


UNREADABLE = ValueError, SyntaxError, RecursionError, MemoryError, AttributeError, TypeError  # by parsed()


def parsed(text):
    """JSON, or else Python's repr -> its value. ValueError, SyntaxError and the like."""
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text.strip())


def to_messages(value, train=True):
    """A list of {"role", "content"} or {"from", "value"} -> [turn]. ValueError with the reason. `train` is
    for the assistant's turns; a message's own "weight" 0 (OpenAI fine-tuning files) takes it out."""
    value = unpacked(value)
    check_value(isinstance(value, list) and value, "expected a non-empty list of messages, got", value)
    messages = []
    for number, message in enumerate(value):
        at = f"message {number}"
        check_value(isinstance(message, dict), f"{at} is not an object:", message)
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        is_tool = role in ("tool", "function", "observation", "function_call")
        require(isinstance(role, str) and role in ROLES, f"{at} has the unknown role {role!r}"
                f"{' (tool calls are not supported)' if is_tool else ''}; "
                "known are system, user (human), assistant (gpt)")
        for key in sorted((MEANT | LEFT_OUT).intersection(message)):  # never dropped without a word
            require(not message[key], f"{at} has {key}, which is not supported: put it into the content as "
                    "the chat template shows it, or remove it")
        weights = [message[key] for key in WEIGHTS.intersection(message) if message[key] is not None]
        for weight in weights:
            check_value(weight in (0, 1), f"{at} counts (1, true) or not (0, false); its weight is", weight)
        if isinstance(content, list):  # parts: text alone can be trained on
            require(all(isinstance(part, dict) and part.get("type", "text") == "text" for part in content),
                    f"{at} has parts that are not text, which is not supported")
            content = "".join(text_value(part.get("text"), "text of a part") for part in content)
        content = text_value(content, f"content of {at} ({ROLES[role]})")
        messages.append(turn(ROLES[role], content, train and 0 not in weights))
    return messages


def column_messages(row, column, role="user", train=True):
    """A column of messages, a transcript, or a string (an instruction with its input) as one turn of `role`
    -> [turn]."""
    value = unpacked(row.get(column))
    if isinstance(value, (list, dict)):
        return to_messages(value if isinstance(value, list) else [value], train)
    text = text_value(value, f"column '{column}'")
    if column == "instruction" and row.get("input"):
        text += "\n" + text_value(row["input"], "column 'input'")
    elif re.match(r"\s*Human:", text) and "\n\nAssistant:" in text:
        return transcript(text, train)
    return [turn(role, text, train)]


def prompt_messages(row, column, train=False):
    """The turns of a prompt's column, none of them trained, after those of the row's `history`, whose answers
    are trained if `train`."""
    messages, history = column_messages(row, column, train=False), row.get("history") or []
    if isinstance(row[column], str) and messages[-1] == turn("assistant", "", train=False):
        messages.pop()  # a transcript that ends where the answer begins
    if isinstance(history, str):
        with suppress(*UNREADABLE):
            history = parsed(history)
    check_value(isinstance(history, list), "column 'history' is no list but", history)
    require(not history or len(messages) == 1, f"column 'history' stands beside a conversation in '{column}'")
    before = []
    for pair in history:
        require(isinstance(pair, (list, tuple)) and len(pair) == 2,
                f"column 'history' holds {pair!r} where a [user, assistant] pair is expected")
        for role, text in zip(("user", "assistant"), pair):
            before.append(turn(role, text_value(text, "history"), train))
    return before + messages


def joined(prompt, said, column):
    """The prompt's turns and those of a column beside it -> one conversation. Where the latter holds the
    prompt too, as one turn or several, it comes in once. ValueError where one does not follow the other."""
    last, first = prompt[-1]["role"], said[0]["role"]
    texts = ["".join(m["content"].split()) for m in said]
    ends, whole = [0, *accumulate(map(len, texts))], "".join(texts)
    for k in range(len(prompt) if first != "assistant" else 0):  # said may lack the prompt's first k messages
        asked = "".join("".join(m["content"].split()) for m in prompt[k:])
        if k and "system" in (first, prompt[k]["role"]):
            break
        for start in ends[:-1] if all(m["role"] == "system" for m in prompt[:k]) else [0]:
            known = bisect_right(ends, start + len(asked)) - 1
            if whole.startswith(asked, start) and start + len(asked) == ends[known] and (
                    said[known - 1]["role"] == last):
                return prompt[:k] + [{**m, "train": False} for m in said[:known]] + said[known:]
    require(last == "system" or (last == "assistant") != (first == "assistant"), f"column '{column}' begins "
            f"with a message of role {first}, which neither follows nor repeats the prompt")
    return prompt + said


def with_system(messages, row, system_prompt):
    """Puts the row's `system` first, else system_prompt, unless the messages begin with a system turn."""
    own = text_value(row.get("system") or "", "column 'system'")
    if messages[0]["role"] == "system":
        require(own.strip() in ("", messages[0]["content"].strip()),
                "column 'system' and the messages have different system messages")
        return messages
    return [turn("system", own or system_prompt), *messages] if own or system_prompt else messages


def to_conversation(row, format, system_prompt=None):
    """A row of any SFT format -> {"messages": [turn]} or {"text": str}. ValueError with the reason. What
    follows the last answer is dropped. Assistant turns before the user's first one are not trained."""
    if format == "text":
        text = text_value(row.get("text"), "column 'text'")
        require(text.strip(), "column 'text' is empty")
        return {"text": text}
    if format in ("messages", "conversations"):
        messages = to_messages(row.get(format))
    else:
        prompt, completion = SFT_FORMATS[format]
        said = column_messages(row, completion, "assistant")
        messages = joined(prompt_messages(row, prompt, train=True), said, completion)
    for number, message in enumerate(messages):
        require(message["role"] != "assistant" or message["content"].strip(),
                f"empty completion (message {number})")
    asked = next((i for i, m in enumerate(messages) if m["role"] == "user"), 1)
    for message in messages[:asked]:
        message["train"] = False
    messages = with_system(messages, row, system_prompt)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    require(any(m["train"] for m in messages), "no assistant message to train on")
    return {"messages": messages}


def to_prompt(row, format, system_prompt=None):
    """A row -> (the prompt as it stands in the row, its messages). ValueError with the reason."""
    messages = prompt_messages(row, format)
    last = messages[-1]["role"]
    require(last == "user", f"the prompt ends with a message of role {last}; it must end with the user's")
    require(messages[-1]["content"].strip(), f"column '{format}' is empty")
    return unpacked(row[format]), with_system(messages, row, system_prompt)


NO_PROMPT = ("expected a transcript that ends with '\\n\\nAssistant: ...', or messages, or a column 'prompt' "
             "beside the strings; got")


def transcript(text, train=False):
    """hh-rlhf's "\\n\\nHuman: ... \\n\\nAssistant: ..." -> messages."""
    said = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.strip())[1:]
    return [turn(ROLES[who.lower()], text.strip(), train) for who, text in zip(said[::2], said[1::2])]


def to_pair(row, format, system_prompt=None):
    """A row of any preference format -> {"prompt", "chosen", "rejected": [turn]; "margin"}. ValueError.
    Whole conversations and transcripts are split after the messages that they share. A side may come out
    empty: encode_pairs drops and counts such pairs."""
    both = [column_messages(row, side, "assistant", train=False) for side in SIDES]
    for column in PAIR_FORMATS[format][:-2]:  # none for whole conversations
        prompt = prompt_messages(row, column)
        require(prompt[-1]["content"].strip(), f"column '{column}' is empty")
        both = [joined(prompt, said, side) for said, side in zip(both, SIDES)]
    for said, side in zip(both, SIDES):
        check_value(len(said) > 1 or not isinstance(row[side], str), NO_PROMPT, row[side])
    (chosen, rejected), shared = both, 0
    while shared < min(map(len, both)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1  # the last message is the answer in any case
    prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    for name, side in zip(SIDES, (chosen, rejected)):
        require(side[0]["role"] == "assistant", f"'{name}' does not begin with an answer after what both "
                "sides share: their prompts differ")
        for message in side:
            message["train"] = message["role"] == "assistant"
    require(prompt and prompt[-1]["role"] != "assistant",
            "the prompt of chosen and rejected must end with a user message")
    prompt = with_system(prompt, row, system_prompt)
    short, long = sorted((chosen, rejected), key=len)
    require(len(short) == len(long) or long[:len(short)] != short, "one side is the beginning of the other")
    margin = 0 if row.get("margin") in (None, "") else row["margin"]
    margin = number_value(margin, "column 'margin' is no number:")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin}


def to_scored(row, format, system_prompt=None):
    """prompt, completion and score (a number, or several named ones) -> ({"messages"}, {name: float})."""
    conversation = to_conversation(row, "prompt_completion", system_prompt)
    scores = row["score"] if isinstance(row.get("score"), dict) else {"score": row.get("score")}
    require(scores, "column 'score' holds no score")
    sentence = "the score '{}' is not a number (expected a finite number) but"
    return conversation, {name: number_value(value, sentence.format(name)) for name, value in scores.items()}


# ---- tokens and masks --------------------------------------------------------------------------------------

# For tokenizers that bring no chat template. A heading ends with a newline: a space would merge with the
# answer's first word into a token that belongs to neither.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ 'User:\n' + m['content'] + '\n\n' }}"
    "{% else %}{{ 'Assistant:\n' + m['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}")


def load_tokenizer(args):
    """The model's tokenizer. UserError if it has no EOS, no offsets, or a template that loses messages."""
    source, adapter = base_and_adapter(args.model_name_or_path)
    if adapter and os.path.exists(os.path.join(adapter, "tokenizer_config.json")):
        source = adapter
    names = os.listdir(source) if os.path.isdir(source) else ["tokenizer.json"]
    require(any("token" in name or name.startswith("vocab") for name in names),
            f"the folder {source} holds no tokenizer (tokenizer.json or the like): copy that of its base")
    say_fetch(source)
    with explain(f"cannot load a tokenizer from '{source}'"):
        transformers.logging.set_verbosity_warning()  # it knows tokenizers that split words wrongly
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
        transformers.logging.set_verbosity_error()
    with suppress(Exception):  # without such a file there is nothing to compare
        file, text = transformers.utils.cached_file(source, "tokenizer.json"), "It's 12345\n\n\tx  [/INST]"
        ids = type(tokenizer.backend_tokenizer).from_file(file).encode(text, add_special_tokens=False).ids
        if ids != tokenizer(text, add_special_tokens=False)["input_ids"]:
            say(f"warning  transformers splits words otherwise than {file}, which the model may expect")
    require(tokenizer.is_fast, f"the tokenizer of '{source}' gives no character offsets, "
            "which the masks need (is_fast is False)")
    require(tokenizer.eos_token_id is not None,
            f"the tokenizer of '{source}' has no EOS token: a model could never learn to stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: no mask is derived from a token id
    tokenizer.clean_up_tokenization_spaces = False  # or a completion's text were not what was sampled
    path = args.chat_template_path
    if path:
        with (explain(f"cannot read --chat_template_path {path}", (OSError, UnicodeDecodeError)),
              open(path, encoding="utf-8") as file):
            tokenizer.chat_template = file.read()
    elif not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
        say("template the tokenizer has none: using 'User:' and 'Assistant:' lines (saved with the model)")
    template = tokenizer.get_chat_template().removeprefix("\ufeff")  # which would begin every prompt
    with explain("--chat_template_kwargs must be a JSON object such as '{\"enable_thinking\": false}'",
                 (ValueError, AttributeError)):
        values = json.loads(args.chat_template_kwargs or "{}").items()
    for name, value in values:  # defaults of the template, saved with it: who loads the model has them too
        require(re.search(rf"\b{re.escape(name)}\b", template),
                f"--chat_template_kwargs: the chat template reads no '{name}'")
        template = f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}{template}"
    named = isinstance(tokenizer.chat_template, dict)  # a template for tools stays beside it
    tokenizer.chat_template = {**tokenizer.chat_template, "default": template} if named else template
    if "strftime_now" in template:
        tokenizer.init_kwargs["template_date"] = args.date  # saved: a reward model scores by the same day
        say(f"template it shows today's date, which is {args.date} in all of this run (--date)")
    with explain(path or f"the tokenizer of {source}"):  # not to be blamed on the data
        check_template(tokenizer)
        stop_token_ids(tokenizer)
    return tokenizer


def check_template(tokenizer):
    """ValueError if the template loses messages, or has a header for answers that prompts would lack."""
    trial = [turn("user", "a first question"), turn("assistant", "a first answer")]
    text, asked = render(tokenizer, trial), render(tokenizer, trial[:1])
    check_whole(text, trial)
    header = text[len(asked):].partition("a first answer")[0].strip()
    ignored = text.startswith(asked) and render(tokenizer, trial[:1], add_generation_prompt=True) == asked
    require(not (ignored and header), f"the chat template has no generation prompt: '{header}' before an "
            "answer would be trained and no prompt would end with it; end the template with {% if "
            f"add_generation_prompt %}}{header}{{% endif %}}")


@lru_cache
def on_day(template, date):
    """The template with the date written out: today's would be an input that no run keeps. ValueError."""
    fixed = re.sub(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""", lambda call: repr(
        datetime.strptime(date, "%Y-%m-%d").strftime(call[2])), template)
    require("strftime_now(" not in fixed, "the chat template asks for the date in a way that cannot be held "
            "fixed; give another --chat_template_path")
    return fixed


def render(tokenizer, messages, add_generation_prompt=False):
    """The chat template applied, as text with special tokens. ValueError with the template's complaint."""
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    date = tokenizer.init_kwargs.get("template_date")
    options = {"chat_template": on_day(tokenizer.get_chat_template(), date)} if date else {}
    try:
        return tokenizer.apply_chat_template(plain, tokenize=False,
                                             add_generation_prompt=add_generation_prompt, **options)
    except Exception as error:  # templates call raise_exception with their own words
        raise ValueError(f"the chat template refuses this conversation: {reason_of(error)}") from None


def check_whole(text, messages):
    """ValueError if a template passed over a message; untrained assistant turns may lose their reasoning.
    White space may differ, and /think and /no_think are switches to some templates."""
    def squeeze(words):
        return "".join(words.replace("/no_think", "").replace("/think", "").split())
    rendered = squeeze(text)
    for number, message in enumerate(messages):
        checked = message["train"] or message["role"] != "assistant"
        require(not checked or squeeze(message["content"]) in rendered,
                f"the chat template leaves out message {number} ({message['role']}) "
                "or a part of it; give another --chat_template_path")


def stop_token_ids(tokenizer, generation_config=None):
    """Every id that ends a completion: EOS, those of the generation config, the template's end of turn."""
    more = getattr(generation_config, "eos_token_id", None)
    more = more if isinstance(more, (list, tuple)) else [more]
    require(all(isinstance(i, int | None) and abs(i or 0) < 2**31 for i in more),
            f"the model's eos_token_id is no token id: {more}")
    ids = {tokenizer.eos_token_id, end_of_turn(tokenizer, str(tokenizer.chat_template)), *more}
    return sorted(ids - {None})


@lru_cache
def end_of_turn(tokenizer, template):
    """The id of the special token that the template puts after an answer, or else before the next question
    (GLM-4), or None; kept for each template."""
    asked, said = turn("user", "hi"), turn("assistant", "stopword")
    for messages in ([asked, said], [asked, said, asked]):
        after = render(tokenizer, messages).rpartition("stopword")[2].lstrip()
        after = tokenizer(after, add_special_tokens=False)["input_ids"]
        if after and after[0] in tokenizer.added_tokens_decoder:
            return after[0]
    return None


def encode_prompt(tokenizer, messages, max_length=10**9):
    """messages -> ids of the prompt up to the answer; of more than max_length the first and the last ones."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    check_whole(text, [{**message, "train": False} for message in messages])  # none is trained here
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[:1] + ids[-max_length:][1:]


# what encode_conversation notes of a row
SHIFTED = "with a span moved to a token boundary"
UNASKED = ("with an answer that does not begin as the chat template's generation prompt does (<think>?): "
           "other text is trained than will be sampled")


def find_answer(tokenizer, messages, k, text):
    """Where message k, without its header, stands in `text`, the rendering of all messages -> (start, end,
    whether the generation prompt precedes it). None if the template renders it, or what precedes it,
    differently once more messages follow."""
    head = render(tokenizer, messages[:k], add_generation_prompt=True)
    upto = text if k == len(messages) - 1 else render(tokenizer, messages[:k + 1])
    start = len(head)
    if not text.startswith(head):  # the header opens a thinking block that this answer lacks
        before = render(tokenizer, messages[:k])
        start = len(os.path.commonprefix([text, head]))
        at = text.rfind(messages[k]["content"].strip(), len(before), len(upto))
        start = min(start, at) if at >= 0 else start  # both may begin with "<"
        if not text.startswith(before):
            return None
    return (start, len(upto), text.startswith(head)) if text.startswith(upto) else None


def encode_conversation(tokenizer, messages, completion_only_loss=True, check=check_whole):
    """messages -> [{"input_ids": [...], "mask": [...], "start": the place of the first trained answer (of
    the last, if all counts), "notes": Counter}], usually one. ValueError, by `check` where text is missing.
    An answer is what the final rendering has from the end of the generation prompt to the first stop token,
    which is included: nothing after it is ever sampled. A template that rewrites earlier turns (thinking
    models), or ends none but the last, gives a row for each trained turn. `notes` is for the printed report.
    A token that belongs half to an answer and half to what surrounds it is not trained."""
    text = render(tokenizer, messages)
    trained = [k for k, message in enumerate(messages) if message["train"]]
    if not completion_only_loss:
        trained = trained[-1:]  # everything counts; only the end is to be found

    def a_row_a_turn():
        parts = [[{**m, "train": j == k} for j, m in enumerate(messages[:k + 1])] for k in trained]
        return [row for part in parts
                for row in encode_conversation(tokenizer, part, completion_only_loss, check)]
    spans = [find_answer(tokenizer, messages, k, text) for k in trained]
    if None in spans:
        require(trained != [len(messages) - 1],
                "the chat template changes the prompt when the answer follows it")
        return a_row_a_turn()
    check(text, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    ends = [end for _, end in offsets]
    # some tokenizers leave a token's leading space out of its offsets
    starts = [min(start, before) for (start, _), before in zip(offsets, [0, *ends])]
    mask = [0 if completion_only_loss else 1] * len(ids)
    stops, notes = set(stop_token_ids(tokenizer)), Counter()
    answer_start = bisect_left(starts, spans[0][0])
    for start, end, asked in spans:  # places in the text; first, last and stop are those of tokens
        first, last = bisect_left(starts, start), bisect_right(ends, end)
        moved = (first > 0 and ends[first - 1] > start) or (last < len(ids) and starts[last] < end)
        notes |= Counter({SHIFTED: moved, UNASKED: not asked})
        # the token after the span may be the next role's, with which some templates end an answer
        stop = next((i + 1 for i, token in enumerate(ids[first:last + 1], first) if token in stops), None)
        if stop is None and completion_only_loss and end < len(text):
            return a_row_a_turn()  # so that each answer has an end
        if stop is None:  # trailing white space belongs to the template
            backwards = range(last, first, -1)
            stop = next((i for i in backwards if text[starts[i - 1]:ends[i - 1]].strip()), first)
            if end == len(text):  # and EOS takes its place
                ids = ids[:stop] + [tokenizer.eos_token_id]
                mask = mask[:stop] + [1]
        mask[first:stop] = [1] * (stop - first)
    require(any(mask), "no trained token is left after tokenizing")
    return [{"input_ids": ids, "mask": mask, "start": answer_start, "notes": notes}]


# ---- from messages to training rows ------------------------------------------------------------------------

def prompt_key(messages, system=False):
    """What is asked: what hold_out splits by, the same for the same prompt in every script."""
    left_out = {"assistant"} if system else {"assistant", "system"}
    return repr([m["content"] for m in messages if m["role"] not in left_out])


def make_row(ids, mask, part=slice(None), **fields):
    """A training row: input_ids int32 (T,), mask int8 (T,) with 1 = trained, trained = their number, and
    `fields`; of a part of two lists, whose first token stays in front: without their BOS, models like Gemma
    know nothing. mask[0] is 0: nothing predicts token 0."""
    ids = torch.tensor(ids[:1] + ids[part][1:], dtype=torch.int32)
    mask = torch.tensor(mask[part], dtype=torch.int8)
    mask[:1] = 0
    return {"input_ids": ids, "mask": mask, "trained": int(mask.sum()), **fields}


def kept_part(length, answer, max_length):
    """The slice that is left of a row of so many tokens, whose completion begins at place `answer`: it loses
    the prompt's beginning, down to max_length / 2, then the completion's end."""
    start = max(0, min(length - max_length, answer - max_length // 2))
    return slice(start, start + max_length)


def upto_answer(part):
    """An encoding up to the last answer's end of turn: what a template puts after it is never sampled."""
    ids, mask = part["input_ids"], part["mask"]
    end = len(mask) - mask[::-1].index(1)
    return {**part, "input_ids": ids[:end], "mask": mask[:end]}


def encode_sft(tokenizer, conversation, completion_only_loss=True):
    """What to_conversation gives -> its encodings, as encode_conversation gives them. ValueError. Raw text
    gets an EOS, is trained as a whole, and begins with one BOS, if the tokenizer adds one."""
    if "messages" in conversation:
        return encode_conversation(tokenizer, conversation["messages"], completion_only_loss)
    ids = tokenizer(conversation["text"].removesuffix(tokenizer.eos_token))["input_ids"]  # it may add one too
    doubled = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
    ids = ids[doubled:] + [tokenizer.eos_token_id] * (ids[-1:] != [tokenizer.eos_token_id])
    return [{"input_ids": ids, "mask": [1] * len(ids), "start": 0, "notes": {}}]


def encode_rows(items, encode, max_length, counts, skip_bad_rows=False):
    """[(converted, row, place)] -> training rows. encode(converted, row) -> [{"input_ids", "mask", "start",
    "notes"}]; their other fields go into the rows. `counts` (a Counter) says what was split, cut, noted or
    dropped."""
    rows = []
    for parts, _, _, place in convert_rows(items, encode, skip_bad_rows):
        counts["rows split into turns"] += len(parts) > 1
        for part in parts:
            whole, mask, start, notes = map(part.pop, ("input_ids", "mask", "start", "notes"))
            kept = kept_part(len(whole), start, max_length)
            row = make_row(whole, mask, kept, place=place, **part)
            if row["trained"]:
                rows.append(row)
            counts[f"cut to {max_length} tokens"] += len(whole) > max_length
            counts.update(notes)
            counts["without a trained token dropped"] += not row["trained"]
    return rows


def encode_pairs(items, tokenizer, max_length, counts, skip_bad_rows=False):
    """[(pair, row, place)] -> [{"rows": [chosen, rejected], "prompt" (its last message), "prompt_ids",
    "margin", "row", "place"}]. Both sides lose the same tokens of the prompt's beginning, then each its
    completion's end. Empty and identical pairs are dropped; `counts` (a Counter) says how many, and what was
    cut."""
    def encode(pair, row):
        parts = [encode_conversation(tokenizer, pair["prompt"] + pair[side]) for side in SIDES]
        require(max(map(len, parts)) == 1, "the chat template rewrites earlier turns, or does not end them, "
                "so a completion of several turns cannot be one example")
        sides = [upto_answer(encodings[0]) for encodings in parts]
        return sides, encode_prompt(tokenizer, pair["prompt"], max_length)

    pairs = []
    kept = [item for item in items if all(m["content"].strip() for side in SIDES for m in item[0][side])]
    counts["dropped: an empty completion"] += len(items) - len(kept)
    for (sides, prompt_ids), pair, row, place in convert_rows(kept, encode, skip_bad_rows):
        longest = max(len(side["mask"]) for side in sides)
        part = kept_part(longest, min(side["start"] for side in sides), max_length)
        chosen, rejected = (make_row(side["input_ids"], side["mask"], part) for side in sides)
        counts[f"cut to {max_length} tokens"] += longest > max_length
        counts.update(sides[0]["notes"] | sides[1]["notes"])
        if all(chosen[name].equal(rejected[name]) for name in ("input_ids", "mask")):
            counts["dropped: the two sides are identical"] += 1
        elif not chosen["trained"] or not rejected["trained"]:
            counts["dropped: no trained token left"] += 1
        else:
            pairs.append({"rows": [chosen, rejected], "prompt": pair["prompt"][-1]["content"],
                          "prompt_ids": prompt_ids, "margin": pair["margin"], "row": row, "place": place})
    return pairs


def load_prompts(args, tokenizer):
    """-> (training prompts, held-out prompts): dicts of prompt (as in the row), turns, prompt_ids, opened
    (whether they end with <think>), place, row and columns, which reward functions are given."""
    taken = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
    counts = Counter()

    def encode(items, of_file):
        columns = sorted({name for _, row, _ in of_file for name in row} - {"prompt", "completion"})
        for name in columns:
            require(name not in taken, f"the column '{name}' has the name of something else that reward "
                    "functions are given; rename it")
        prompts = []
        encoded = convert_rows(items, lambda item, _: encode_prompt(tokenizer, item[1]), args.skip_bad_rows)
        for prompt_ids, (prompt, turns), row, place in encoded:
            if len(prompt_ids) > args.max_prompt_length:
                counts[f"dropped: longer than --max_prompt_length {args.max_prompt_length} tokens"] += 1
                continue
            prompts.append({"prompt": prompt, "turns": turns, "prompt_ids": prompt_ids, "place": place,
                            "row": row, "columns": {name: row.get(name) for name in columns},
                            "opened": tokenizer.decode(prompt_ids[-8:]).rstrip().endswith("<think>")})
        return prompts

    train, held, _ = read_split(args, tokenizer, PROMPT_FORMATS, to_prompt, itemgetter(1), also=None)
    one_file = [] if args.eval_dataset_name else train + held
    train, held = (encode(part, one_file or part) for part in (train, held))
    say_split(args, train, held, "prompt", counts)
    show_example(tokenizer, train[0]["prompt_ids"], [0] * len(train[0]["prompt_ids"]), "first prompt")
    return train, held


# ---- rows and micro-batches --------------------------------------------------------------------------------

def pad(rows, value, side="right", dtype=torch.long):
    """N sequences of lengths L_i -> (N, max L) filled with `value` on `side`."""
    rows = [torch.as_tensor(row, dtype=dtype) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def pad_rows(rows, fields, device):
    """B rows (dicts) -> a namespace of tensors on the device, right-padded to the longest row's T: input_ids
    (B, T) and mask (B, T) fp32; each of `fields` in fp32: (B, T) where rows have a number a token, 0 where
    the mask is 0, and (B, 1) where they have one number. A row that lacks a field has 0."""
    mask = pad([r["mask"] for r in rows], 0, dtype=torch.float32)
    out = {"input_ids": pad([r["input_ids"] for r in rows], 0), "mask": mask}
    for name in fields:
        values = [torch.as_tensor(r.get(name, 0.0), dtype=torch.float32) for r in rows]
        if any(v.ndim for v in values):
            whole_rows = [v if v.ndim else v.expand(len(r["mask"])) for v, r in zip(values, rows)]
            out[name] = torch.where(mask.bool(), pad(whole_rows, 0.0, dtype=torch.float32), 0.0)
        else:
            out[name] = torch.stack(values)[:, None]
    if torch.device(device).type == "cuda":  # pinned: the copies wait for nothing
        out = {name: x.pin_memory() for name, x in out.items()}
    return SimpleNamespace(**{name: x.to(device, non_blocking=True) for name, x in out.items()})


def cut(lengths, micro_batch_tokens, process_index=0, num_processes=1):
    """The rows of one step, longest first, dealt to the processes and cut -> this process's lists of places.
    Each list holds at most micro_batch_tokens padded tokens (or one row). Every process gets equally many,
    because under FSDP processes wait for one another; the missing ones are empty."""
    order, shares = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
    for first in range(num_processes):
        share = [[]]
        for i in order[first::num_processes]:
            if share[-1] and (len(share[-1]) + 1) * lengths[share[-1][0]] > micro_batch_tokens:
                share.append([])
            share[-1].append(i)
        shares.append(share)
    missing = max(map(len, shares)) - len(shares[process_index])
    return shares[process_index] + [[]] * missing


def shuffled(rows, number, size, seed, name="order"):
    """Batch number 0, 1, ... of `size` rows: a new permutation each epoch, whose last batch may be short."""
    epoch, at = divmod(number, math.ceil(len(rows) / size))
    order = torch.randperm(len(rows), generator=stream(seed, name, epoch)).tolist()
    return [rows[i] for i in order[at * size:(at + 1) * size]]


def steps_of(rows, args, updates=1):
    """How many batches an epoch of these rows has, and how many the run makes, with so many updates each."""
    an_epoch = math.ceil(len(rows) / args.batch_size)
    if args.max_steps > 0:
        return an_epoch, math.ceil(args.max_steps / updates)
    return an_epoch, math.ceil(round(an_epoch * args.num_train_epochs, 6))  # 50 * 1.1 is 55.00000000000001


def rollouts_of(train, held, args):
    """-> (updates of a rollout, rollouts of the run). UserError where the run cannot do what is asked."""
    completions = min(len(train), args.batch_size) * args.num_generations
    require(args.num_minibatches <= completions, f"--num_minibatches {args.num_minibatches} is more than the "
            f"{completions} completions of a rollout")
    require(not getattr(args, "eval_samples", 0) or any(right_answers(held)),
            "--eval_samples: no held-out row has an `answer` or `solution` to compare with")
    updates = args.num_iterations * args.num_minibatches
    if args.num_train_epochs == 0 and args.ZERO_EPOCHS:  # --max_steps or not
        require(held, "nothing to evaluate: --num_train_epochs 0 needs --eval_dataset_name, or an "
                "--eval_fraction that holds out a row")
        return updates, 0
    return updates, steps_of(train, args, updates)[1]


def stream(*key):
    """A random generator that depends on nothing but its key, such as (seed, "order", epoch)."""
    return torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1)


# ---- showing things to a person ----------------------------------------------------------------------------

def show_example(tokenizer, ids, mask, title="first example", what="trained"):
    """One row, `what` the mask holds marked: green on a terminal, [[ ]] elsewhere. Long turns are cut."""
    terminal = ("green", "\033[32m", "\033[0m")
    marks, opening, closing = terminal if sys.stdout.isatty() else ("[[ ]]", "[[", "]]")
    text, trained = "", sum(map(int, mask))
    for marked, part in groupby(zip(map(int, ids), map(int, mask)), key=itemgetter(1)):
        piece = tokenizer.decode([token for token, _ in part])
        if len(piece) > 600:
            piece = piece[:300] + " ... " + piece[-300:]
        text += opening + piece + closing if marked else piece
    say(f"{title}: {len(ids)} tokens" + (f", {trained} {what}, in {marks}" if trained else ""))
    say("  " + text.replace("\n", "\n  "))


def show_table(rows):
    """[{column: value}] as a table; long texts are cut."""
    def short(value):
        if isinstance(value, list):  # messages: the last one is the user's
            value = value[-1]["content"]
        text = " ".join(value.split()) if isinstance(value, str) else ""
        return text[:27] + " ... " + text[-27:] if len(text) > 60 else text or value
    if rows:
        table = pandas.DataFrame(rows).map(short).to_string(index=False, max_colwidth=60)
        say("  " + table.replace("\n", "\n  "))


# ---- rewards -----------------------------------------------------------------------------------------------

class Reward(NamedTuple):
    """One of --reward_funcs: a function that is called as TRL calls it, or a reward model's (load_reward)."""
    function: Callable
    weight: float
    path: str | None = None  # its file, or the reward model's folder; None: built in
    score: str | None = None  # which score of the reward model; None: it is none


MARKS = {  # what stands around an answer
    "####": r"####(.*)", "<answer>": r"(?s)<answer>((?:(?!<answer>).)*?)</answer>",
    "\\boxed": r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}"}
SIGNS = str.maketrans("−‐‑‒–⁄", "-----/", "$€£¥\u202f")  # the last are left out
REWRITES = [(re.compile(pattern), new) for pattern, new in (  # so that a number, or what is none, is one word
    # CJK writing, quotes, currencies, arrows and emoji are no part of one, but for digits and powers of ten
    (r"(?![\d．百千万萬億亿])[\u200b-\u206f\u20a0-\u20bf\u2190-\u21ff\u2460-\U0010ffff]", " "),
    (r"\^\s*(?:\\circ\b|\{\s*\\circ\s*\})|°(?![CF])", ""),
    (r"(?s)\\begin\{(?:\w*matrix|array|cases)\}.*?\\end\{\w+\}", "ƒ0"),
    (r"(?:[(\[]|\\\{)[^()\[\]{}]*\d['\x22]?,\s[^()\[\]{}]*(?:[)\]]|\\\})", "ƒ0"),  # a tuple, a set
    (r"\{,\}|\\,|\\!", ","), (r"\^\{([^{}]*)\}", r"^\1"), (r"\\sqrt\s*\{?", "√"), (r"\s*\\pi\b", "π"),
    (r"\\(?:times|cdot)\s*", "×"), (r"(?<=\d)\s*(?=\\[dt]?frac)", "+"),
    (r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)(\d))", r"\1\3/\2\4"),
    (r"\\(?:log|ln|lg|exp|(?:arc)?(?:sin|cos|tan)|gcd|max|min)(?:_\w|_\{\w*\})?[\s({]*", "ƒ"),
    (r"\\(?!text|math|underline|boxed|fbox|mbox|left|right|begin|end)[a-zA-Z]+\s*\{|\}\s*\{", "ƒ"),
    (r"(?<=[A-Za-z\d)}])_\{?(?=[A-Za-z\d])", "ƒ"),  # 4210_{5}: in base 5
    (r"(?<![\w.,])(\d{1,3}) (\d{3})(?: (\d{3}))?(?! ?\d)", r"\1\2\3"),  # 10 000
    (r"(?<=[\w)}])\s*([+*/×·^])\s*(?=[-(]?\d)", r"\1"), (r"(?<=\d) (-|\*\*) (?=\d)", r"\1"),
    (r"(?<![\w./])(\d+)\s+(?=\d+/\d)", r"\1+"), (r"(?<=\d)\s+(?=(?:hundred|thousand|million|billion)\b)", ""),
    (r"(?<!\d):|:(?!\d)", " "), (r"(?<![a-zA-Z])(?:[cdkm]?m|in|ft)\}?\^[23]", ""))]
# What is no number though its last word may be one: inequalities, 2x - 3, f(5), x + y = 6, unknown commands
V = r"(?<![a-zA-Z\\])[abcknpqrtuvwxyz](?![a-zA-Z\d])"  # a variable
NO_NUMBER = re.compile(
    rf"[≤≥≠±]|(?<![<>])[<>](?![<>])|\|[^|]*\||{V}\s*-\s*\d|\b[a-zA-Z]\([\d, ]+\)\W*$"
    rf"|(?:{V}\s*[-+*/^]|(?:[-+*/^]\s*|\d){V})[^=]*=|\\sqrt\s*\[|frac\s*\{{[^{{}}]*\}}\s*[^{{\s]"
    r"|\\(?!(?:[dtc]?frac|sqrt|pi|times|cdot|div|text\w*|math\w*|[fm]?box(?:ed)?|underline|left|right|[bB]ig"
    r"|begin|end|circ|degree|q?quad|approx|displaystyle|therefore|pounds|euro|yen|rm)(?![a-zA-Z]))[a-zA-Z]+")
NUMBER = re.compile(r"""
    \+?(-?) (?: (?:(\d+)\+)? (-?\d+)/(\d+)
           | ((?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:(?<=\d)[eE][-+]?\d{1,2})?) )
    (?:%|°?[CF]|[mgsl]|/?(?!hundred|thousand|million|billion)[a-zA-Z]{2,}(?:/[a-z]+)?)?  # a unit
    """, re.VERBOSE)


def read_number(text):
    """The last number of a text in the one form that equal numbers have, or None if there is none: 1,000 and
    $1000.00 and 1e3 are "1000"; 1/2 and \\frac{1}{2} are "0.5", 1/3 is "1/3"; 50% is "50": % is a unit, as cm
    is. The last word with a digit counts, and as a whole: 11:30, 2^3, 3-4 and 1.2.3 are no numbers."""
    text = text[-2000:].translate(SIGNS)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    words = re.findall(r"[^\s=≈<>|\"'`(){}\[\]\\_~]*\d[^\s=≈<>|\"'`(){}\[\]\\_~]*", text)
    word = words[-1].lstrip("*#!?,;:").rstrip("*#!?,;:.") if words else "-"
    found = NUMBER.fullmatch(word) if len(word) < 300 else None
    if not found or found[4] and not int(found[4]):
        return None
    minus, units, top, bottom, decimals = found.groups()
    value = Fraction(int(top), int(bottom)) if bottom else Fraction(decimals.replace(",", ""))
    value = (value + int(units or 0)) * (-1 if minus else 1)
    places = next((n for n in range(100) if value * 10**n % 1 == 0), None)
    if places is None:  # its decimals do not end
        return str(value)
    digits = str(int(abs(value) * 10**places)).rjust(places + 1, "0")
    return "-" * (value < 0) + digits[:len(digits) - places] + ("." + digits[-places:] if places else "")


def extract_answer(text, reference=None):
    """What a text answers: the number (read_number) of its last marked part, or, where that has no digit, its
    words in lower case without spaces; without a mark the last number of the text; or None. The mark is the
    reference's (####, \\boxed, <answer>) where both have it, else <answer> or \\boxed."""
    text, own = text or "", [mark for mark in MARKS if mark in (reference or "")]
    for mark in [*own, "<answer>", "\\boxed"]:
        marked = re.findall(MARKS[mark], text)
        if marked:
            part = re.sub(r"</?[a-zA-Z]+>", "", marked[-1])
            if re.search(r"\d", part) is None:
                return re.sub(r"\\(?:text|math)\w*|[{}\s]", "", part).lower().rstrip(".") or None
            factorial = mark == "\\boxed" and re.search(r"\d!", part)
            spoilt = factorial or NO_NUMBER.search(part.strip()[-300:].rpartition("\n")[2])
            return None if spoilt else read_number(part)
    return read_number(text)


def is_right(text, cut_off, reference):
    """Whether a completion that was not cut off gives the reference's answer; None if that cannot be read."""
    right = extract_answer(reference, reference)
    return None if right is None else not cut_off and extract_answer(text, reference) == right


def text_of(completion):
    """A completion as a reward function gets it, string or messages, as a string."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def readable(reference):
    """A reference as a string if extract_answer finds an answer in it, else None."""
    return str(reference) if extract_answer(str(reference), str(reference)) is not None else None


def reference_of(answer=None, solution=None, **columns):
    """A row's `answer`, or else its `solution`, as a string; None without either."""
    known = solution if answer is None else answer
    return None if known is None else str(known)


def references(n, columns):
    """reference_of each of n rows, whose columns are {name: n values}."""
    return list(map(reference_of, *(columns.get(name) or [None] * n for name in ("answer", "solution"))))


def accuracy(prompts, completions, truncated=None, **columns):
    """1 if is_right, 0 if not, None where the reference has no answer that can be read."""
    known = references(len(completions), columns)
    found = map(is_right, map(text_of, completions), truncated or repeat(False), known)
    return [None if right is None else float(right) for right in found]


def format_reward(prompts, completions, opened=None, **columns):
    """1 for <think>...</think><answer>...</answer> and nothing else, 0 otherwise. `opened`: which prompts end
    with the <think>, as some chat templates have it."""
    shape = r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*"
    texts = ["<think>" * begun + text_of(c) for begun, c in zip(opened or repeat(False), completions)]
    return [float(bool(re.fullmatch(shape, text, re.DOTALL))) for text in texts]


def levenshtein(a, b):
    """The fewest insertions, deletions and replacements of characters that turn a into b. One column of the
    usual table at a time, as the bits of two integers (Myers 1999, in the form of Hyyrö 2003): bit i of up,
    down says that row i + 1 is one more, one less than row i. Some 600 times as fast as cell by cell."""
    ones, where = (1 << len(a)) - 1, {}
    for i, letter in enumerate(a):
        where[letter] = where.get(letter, 0) | 1 << i
    up, down = ones, 0
    for letter in b:
        equal = where.get(letter, 0)
        same = (((equal & up) + up) ^ up) | equal | down  # equal to the cell one row up, one column before
        more = (down | ~(same | up)) << 1 | 1  # one more than in the column before, for the row below
        up, down = ((up & same) << 1 | ~(same | more)) & ones, more & same & ones
    return len(b) + up.bit_count() - down.bit_count()


def edit_distance(prompts, completions, **columns):
    """1 - levenshtein to the reference / the longer one's length, None where there is no reference."""
    def similarity(completion, reference):
        if reference is None:
            return None
        text, reference = text_of(completion).strip(), reference.strip()
        return 1 - levenshtein(text, reference) / max(len(text), len(reference), 1)
    return list(map(similarity, completions, references(len(completions), columns)))


STRINGS = {"schema": ("a list of keys", parsed), "tests": (  # a CSV makes a list a text
    "a string or strings", lambda text: parsed(text) if re.match(r"\s*[\[{]", text) else [text])}


def strings_of(name, value):
    """The strings that a row's `schema` or `tests` holds, [] where it is empty. ValueError if not strings."""
    what, read = STRINGS[name]
    with suppress(*UNREADABLE):
        value = value.strip() if name == "schema" and isinstance(value, str) else value
        strings = read(value) if isinstance(value, str) and value else value or []
        if isinstance(strings, list) and all(isinstance(string, str) for string in strings):
            return strings
    raise ValueError(f"the column '{name}' must be {what}, not {str(value)[:80]!r}")


def json_reward(prompts, completions, schema=None, **columns):
    """1 if the completion, less a ``` or ```json fence around it, is JSON and, where the row's `schema`
    lists keys, is an object that has them; 0 otherwise."""
    def fits(completion, keys):
        text = text_of(completion).strip()
        fenced = re.fullmatch(r"```[ \t]*(?:json)?\s(.*)```", text, re.DOTALL | re.IGNORECASE)
        try:  # int, called on NaN and Infinity, raises ValueError: they are not JSON
            value = json.loads(fenced[1] if fenced else text, parse_constant=int)
        except (ValueError, RecursionError):
            return 0.0
        return float(not keys or isinstance(value, dict) and set(keys) <= value.keys())
    keys = [strings_of("schema", value) for value in schema or [None] * len(completions)]
    return list(map(fits, completions, keys))


CODE_SECONDS = 10
# The limits are set here and not by preexec_fn, which may deadlock where there are threads. What runs after
# the completion is bound before it, so that patching builtins or modules does not change it. There is no
# RLIMIT_NPROC: it counts all of the user's processes, so no number is right.
CODE_RUNNER = """
import contextlib, json, os, resource, signal, sys
def main(run=exec, write=os.write, leave=os._exit, answer=os.dup(1)):
    token, seconds, *texts = json.load(sys.stdin)
    for fd in 0, 1:
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    signal.alarm(seconds + 1)  # in case the trainer is killed
    for name, most in ("CPU", seconds), ("AS", 2**30), ("FSIZE", 2**24), ("CORE", 0):
        with contextlib.suppress(ValueError, OSError):  # macOS lacks some; or it is lower already
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    sys.modules["__main__"] = module = type(sys)("__main__")
    try:
        for program in [compile(text, "<completion>", "exec") for text in texts]:
            run(program, module.__dict__)
        write(answer, token.encode())
    finally:
        leave(0)  # waits for no thread
main()
"""


def passes(completion, tests, stop):
    """1 if `tests` run to their end after the completion's code, 0 if not, None if there is none but blanks.
    In a process of its own: 10 s, 1 GiB, files of 16 MiB in a folder that is removed; no environment, no
    input, no output. Its process group is killed in any case, at once if the event `stop` is set. Only a
    random token, written after the last test, counts as passed, so ending early fails."""
    if not "".join(tests).strip():
        return None
    text, token, folder = text_of(completion), os.urandom(16).hex(), tempfile.mkdtemp()
    blocks = re.findall(r"^[ \t]*```([^\n`]*)\n(.*?)(?:^[ \t]*```|\Z)", text, re.DOTALL | re.MULTILINE)
    blocks = [code for name, code in blocks if "py" in name.lower()] or [code for _, code in blocks]
    with tempfile.TemporaryFile() as job, tempfile.TemporaryFile() as answer:
        programs = [blocks[-1] if blocks else text, *tests]
        job.write(json.dumps([token, CODE_SECONDS, *programs]).encode())
        job.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", CODE_RUNNER], stdin=job, stdout=answer, stderr=subprocess.DEVNULL,
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}, cwd=folder,
            start_new_session=True)
        end = time.monotonic() + CODE_SECONDS
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT  # not to reap: its number might become another's
        while not (os.waitid(os.P_PID, process.pid, look) or time.monotonic() > end or stop.wait(0.01)):
            pass
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)  # rmtree fails on deep nesting
        answer.seek(0)
        return float(answer.read() == token.encode())


def code_reward(prompts, completions, tests=None, **columns):
    """1 if the row's `tests` pass after the completion's code (its last ```python block, else its last ```
    block, else all), 0 if not, None where there are none. This is no sandbox: it limits accidents, not
    malice. Files, the network, the token in the caller's frame, an object that equals everything are within
    reach. Use a container."""
    tests = [strings_of("tests", value) for value in tests or [None] * len(completions)]
    cores, processes = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    stop, pool = threading.Event(), ThreadPoolExecutor(max(1, cores // processes))
    try:
        return list(pool.map(passes, completions, tests, repeat(stop)))
    finally:  # --reward_timeout interrupts this thread alone: the others kill what they run
        stop.set()
        pool.shutdown(cancel_futures=True)


BUILT_IN = {"accuracy": accuracy, "format": format_reward, "edit_distance": edit_distance,
            "json": json_reward, "code": code_reward}
NEEDS = {"accuracy": ("answer", "solution"), "edit_distance": ("answer", "solution"), "code": ("tests",)}


def try_rewards(rewards, train, held, args):
    """UserError, before a model is loaded, if a row's columns are not what the built-in rewards read, or if a
    reward fails when it is called once, on a prompt of each file."""
    used = [name for name, reward in rewards.items() if reward.path is None]
    trial = {"text": "made up, to try the rewards", "truncated": False, "completion_ids": [0]}
    for prompts, file in ((train, args.dataset_name), (held, args.eval_dataset_name)):
        for prompt in prompts:
            columns = prompt["columns"]
            with explain(prompt["place"], (ValueError, SyntaxError)):
                if "json" in used:
                    strings_of("schema", columns.get("schema"))
                if "code" in used:
                    for test in strings_of("tests", columns.get("tests")):
                        compile(test, "the column 'tests'", "exec")  # or no completion of this row could pass
        if file is None:  # held out of the same file
            continue
        for name in filter(NEEDS.get, used):
            lack = [p["place"] for p in prompts if all(p["columns"].get(c) is None for c in NEEDS[name])]
            column = " or ".join(map(repr, NEEDS[name]))
            require(len(lack) < len(prompts), f"--reward_funcs {name} needs a column {column}; of {file} "
                    f"rewards are given {', '.join(prompts[0]['columns']) or 'none'}")
            if lack:
                say(f"warning  {name} does not apply to {len(lack):,} of {len(prompts):,} prompts: they have "
                    f"no {column}, such as {lack[0]}")
        if "accuracy" in used:
            known = [(p, text) for p in prompts if (text := reference_of(**p["columns"])) is not None]
            unread = [f"{text[-80:]!r} of {p['place']}" for p, text in known if not readable(text)]
            require(len(unread) < len(known), "--reward_funcs accuracy reads a number in no answer, such as "
                    f"{''.join(unread[:1])}: give numbers, <answer>words</answer> or another reward")
            if unread:
                say(f"warning  accuracy does not apply to {len(unread):,} of {len(prompts):,} prompts: it "
                    f"reads no number in their answers, such as {unread[0]}")
        n = max(2, args.num_generations)
        score(rewards, prompts[:1] * n, [trial] * n, 0, 0, args.reward_timeout)


def load_reward(name, weight, args, device):
    """One of --reward_funcs -> (label, Reward). UserError if its file, function or reward model is not there.
    A reward model's is given `turns` (what the policy saw), `completions` (texts) and `truncated`."""
    if name in BUILT_IN:
        return name, Reward(BUILT_IN[name], weight)
    path, colon, part = name.rpartition(":")
    path, part = (path, part) if colon and not os.path.exists(name) else (name, None)
    if os.path.isdir(path):
        names, score_texts = load_reward_model(path, device, args.trust_remote_code, date=args.date)
        require(part or len(names) == 1, f"reward '{name}': it has several scores ({', '.join(names)}): say "
                f"which, as {name}:{names[0]}")
        part = part or names[0]
        require(part in names, f"reward '{name}': the model's scores are {', '.join(names)}")

        def function(turns, completions, truncated):
            answers = [turn("assistant", text) for text in completions]
            conversations = [[*before, answer] for before, answer in zip(turns, answers)]
            return score_texts(conversations, truncated)[:, names.index(part)].tolist()
        parent, own = os.path.split(os.path.abspath(path))
        run = os.path.basename(parent) if own in ("model", "merged", "value") else own
        return f"{run}_{part}", Reward(function, weight, path, part)
    require(part or not name.endswith(".py"), f"reward '{name}': say which: {name}:function")
    lost = "no such folder; " * ("/" in name)
    require(path.endswith(".py"), f"no reward '{name}': {lost}built in are {', '.join(BUILT_IN)}; "
            "your own is file.py:function, or a reward model's folder")
    require(os.path.isfile(path), f"reward '{name}': no such file: {path}")
    spec = importlib.util.spec_from_file_location("reward_file_" + os.path.basename(path)[:-3], path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"reward '{name}': importing {path} raised {type(error).__name__}: "
                        f"{' '.join(str(error).split())}") from None
    function = getattr(module, part, None)
    require(callable(function), f"reward '{name}': {path} has no function '{part}'")
    return part, Reward(function, weight, path)


def load_rewards(args, device="cpu"):
    """--reward_funcs -> {label: Reward}."""
    rewards = {}
    for name, weight in zip(args.reward_funcs, args.reward_weights):
        label, reward = load_reward(name, weight, args, device)
        require(label not in rewards, f"two rewards are called '{label}'")
        rewards[label] = reward
    return rewards


LOOP = asyncio.new_event_loop()  # one for all calls: a coroutine may hold a client or a lock of the last one
GRACE = 5.0  # seconds that a reward may go on after its TimeoutError before the run is ended


def end_at_once(sentence):
    """Ends this process and those that it started, with the sentence and code 2, whatever runs in it."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
    os.write(2, f"{os.path.basename(sys.argv[0])}: error: {sentence}\n".encode())
    os._exit(2)


@contextmanager
def limited(name, timeout):
    """TimeoutError in the middle of a reward's code after so many seconds. A reward that catches it or has
    set SIGALRM itself goes on: then a thread ends the process; faulthandler, if C code lets no thread run."""
    late, deadline = f"no answer in {timeout:g} s (--reward_timeout)", time.monotonic() + timeout

    def stop(*_):
        raise TimeoutError(late)
    sentence = f"reward function '{name}' gave {late}, and goes on; the checkpoints are whole"
    watchdog = threading.Timer(timeout + GRACE, end_at_once, [sentence])
    watchdog.daemon = True
    watchdog.start()
    faulthandler.dump_traceback_later(timeout + 2 * GRACE, exit=True, file=sys.__stderr__)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        yield
        if time.monotonic() > deadline:
            raise TimeoutError(late)  # it has caught the first
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
        watchdog.cancel()


def call_reward(function, given, n):
    """Calls the function with copies of those keyword arguments that it names, or of all if it takes
    **kwargs: what it does to them changes nothing for others -> its values as a list, where they have an
    order; of an endless one n + 1."""
    parameters = inspect.signature(function).parameters
    for p in parameters.values():
        needed = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if needed and p.name not in given:
            raise TypeError(f"it asks for {p.name!r}, and there are only {', '.join(given)}")
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    values = function(**{
        name: [copy.deepcopy(one) for one in value] if isinstance(value, list) else copy.copy(value)
        for name, value in given.items() if takes_all or name in parameters})
    values = LOOP.run_until_complete(values) if inspect.isawaitable(values) else values
    unordered = isinstance(values, (str, bytes, Mapping, Set, pandas.DataFrame))
    if unordered or not hasattr(values, "__iter__"):
        return values
    return list(values if hasattr(values, "__len__") else islice(values, n + 1))


def checked_values(name, function, given, places, timeout):
    """What the function returns -> N floats, NaN for None. places (N): what an error calls a completion."""
    try:
        with limited(name, timeout):
            values = call_reward(function, given, len(places))
    except (Exception, SystemExit) as error:
        rows = [] if isinstance(error, TimeoutError) else places
        for i in range(len(rows)) if rows[1:] else ():  # the first that fails by itself is named
            one = {k: v[i:i + 1] if isinstance(v, list) else v for k, v in given.items()}
            checked_values(name, function, one, places[i:i + 1], timeout)
        where = rows[0] if len(rows) == 1 else "the whole batch"
        own = getattr(getattr(function, "__code__", None), "co_filename", None)
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
                 if frame.f_code.co_filename == own]
        at = f" ({os.path.basename(own)}:{lines[-1]})" if lines and own != __file__ else ""
        raise UserError(f"reward function '{name}' raised {type(error).__name__}: "
                        f"{' '.join(str(error).split())}{at}, on {where}") from error
    returned = f"reward function '{name}' returned"
    require(isinstance(values, list), f"{returned} {type(values).__name__}, not a list of numbers")
    require(len(values) == len(places), f"{returned} {len(values)} values for {len(places)} completions")
    for value, place in zip(values, places):
        size = math.inf  # of what is no number
        with suppress(Exception):
            size = 0.0 if value is None else abs(float(value))
        require(size < 1e30 and not isinstance(value, (str, bytes, bytearray)),
                f"{returned} {repr(value)[:80]} for {place}; "
                "expected a number of less than 1e30, or None for not applicable")
    return [math.nan if value is None else float(value) for value in values]


def score(rewards, prompts, rows, step, total_steps, timeout=600.0):
    """Calls every reward once on all completions -> (values (N, F) fp32, NaN for None; {logged name: value}).
    prompts[i] is the prompt of rows[i]. UserError naming the reward and the completion on an exception, a
    wrong length or type, or a number that is not finite; naming the reward if it takes too long."""
    logged, values = {}, []
    texts, truncated = [row["text"] for row in rows], [row["truncated"] for row in rows]
    for_models = {"turns": [prompt["turns"] for prompt in prompts], "completions": texts,
                  "truncated": truncated}
    for_functions = {name: [prompt["columns"][name] for prompt in prompts] for name in prompts[0]["columns"]}
    for_functions |= {
        "prompts": [prompt["prompt"] for prompt in prompts],
        "completions": [
            text if isinstance(prompt["prompt"], str) else [{"role": "assistant", "content": text}]
            for text, prompt in zip(texts, prompts)],  # a message where the prompt is messages
        "completion_ids": [row["completion_ids"] for row in rows],
        "trainer_state": SimpleNamespace(global_step=step, max_steps=total_steps),
        "log_metric": lambda name, value: logged.update({str(name): float(value)}),
        "log_extra": lambda name, values: None}
    places = [f"the completion {text[:80]!r} of row {prompt['place']}"
              for text, prompt in zip(texts, prompts)]
    for name, reward in rewards.items():
        given = for_functions if reward.score is None else for_models
        if reward.path is None:  # built in: told what TRL tells nobody, whether a completion was cut
            given = given | {"truncated": truncated, "opened": [prompt.get("opened") for prompt in prompts]}
        values.append(checked_values(name, reward.function, given, places, timeout))
    return torch.tensor(values).T, logged


def check_weights(names, weights):
    """--reward_weights, or 1 for each of --reward_funcs. UserError if there are too many or few, or all 0."""
    require(weights is None or len(weights) == len(names),
            f"--reward_weights has {len(weights or [])} numbers for {len(names)} reward functions")
    weights = weights or [1.0] * len(names)
    require(any(weights), "--reward_weights are all 0: nothing would be rewarded")
    return weights


def mean_of(records):
    """[{name: value}] -> {name: mean over the records that have it}."""
    return pandas.DataFrame(records).mean().to_dict() if any(records) else {}


def right_answers(prompts):
    """The answer that each prompt's reference gives; None where it has none."""
    known = [reference_of(**prompt["columns"]) for prompt in prompts]
    return list(map(extract_answer, known, known))


def given_answers(rows):
    """The answer that each completion gives, read as `accuracy` reads it; None for one that was cut."""
    known = [reference_of(**row["prompt"]["columns"]) for row in rows]
    return [None if row["truncated"] else extract_answer(row["text"], one) for row, one in zip(rows, known)]


def rollout_metrics(rows, rewards):
    """A rollout's rewards, unweighted, weighted and in sum, lengths, and repetition inside completions."""
    values = torch.stack([row["rewards_per_func"] for row in rows])  # (rows, F)
    metrics = {"reward": torch.tensor([row["score"] for row in rows]).nanmean().item(),
               "completions/distinct_4": sum(distinct_n(row["completion_ids"]) for row in rows) / len(rows),
               "completions/mean_length": sum(len(row["completion_ids"]) for row in rows) / len(rows),
               "completions/clipped_ratio": sum(row["truncated"] for row in rows) / len(rows)}
    for (name, reward), column in zip(rewards.items(), values.T):
        known = column[~column.isnan()]
        metrics[f"rewards/{name}/mean"] = known.mean().item()
        metrics[f"rewards/{name}/std"] = known.std().item() if len(known) > 1 else 0.0
        metrics[f"rewards/{name}/weighted"] = reward.weight * known.mean().item()
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def distinct_n(ids, n=4):
    """Different n-grams / all n-grams of a completion, after Li 2016 (arXiv 1510.03055), who divide by the
    tokens; 1: none comes twice."""
    grams = [tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def warn_of_drift(run, seen):
    """Signs of over-optimisation: a rollout's figures against those of the first one, which the checkpoints
    keep."""
    now = {name: value for name, value in seen.items() if name.startswith("completions/")}
    first = run.state["first"] = run.state["first"] or now
    length, distinct = "completions/mean_length", "completions/distinct_4"
    run.warn(length, now[length] > 2 * first[length],
             f"completions have {now[length]:.0f} tokens, at first {first[length]:.0f}: the reward may be "
             f"paying for length. Look at {run.samples_file}")
    held = run.state["held_rewards"]
    rises = len(held) == 2 and held[0] < held[1]
    run.warn(distinct, now[distinct] < 0.5 * first[distinct] and not rises,
             f"completions repeat themselves: {now[distinct]:.0%} of their 4-grams are different, at first "
             f"{first[distinct]:.0%}. Look at {run.samples_file}")


def samples_table(rows, rewards):
    """What samples.jsonl and the printed table show of completions."""
    return [{"prompt": row["prompt"]["prompt"], "completion": row["text"],
             **{name: None if x.isnan() else x.item() for name, x in zip(rewards, row["rewards_per_func"])}}
            for row in rows]


def warn_of_flat(run, flat, what):
    """Counts the rollouts that taught nothing, one after another, and warns at every third."""
    run.flat_rollouts = run.flat_rollouts + 1 if flat else 0
    run.warn("flat", flat and run.flat_rollouts % 3 == 0,
             f"for {run.flat_rollouts} rollouts all {what}. Look at {run.samples_file}; prompts may be too "
             "hard or too easy, or the reward always equal")


def exact_match(rows, right):
    """-> {"accuracy": share of the completions, of those with a right answer, that end with it}."""
    matches = [given == answer for given, answer in zip(given_answers(rows), right) if answer is not None]
    return {"accuracy": sum(matches) / len(matches)} if matches else {}


def pass_at_k(n, correct, k):
    """The chance that at least one of k samples is right, if c of n are: 1 - C(n-c, k) / C(n, k). Unbiased;
    Chen 2021, arXiv 2107.03374, eq. 1. n 4, correct 1: k = 1 gives 1/4, k = 2 gives 1/2."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def vote(answers, weights=None):
    """The answer with the largest sum of weights (default: one vote each); None never votes, ties go to the
    earliest. Self-consistency, Wang 2022, arXiv 2203.11171. ["7", None, "8", "8"] -> "8"."""
    totals = {}
    for answer, weight in zip(answers, weights or [1.0] * len(answers)):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    return max(totals, key=totals.get, default=None)


def verify(answers, right, scores):
    """Inference-time verification -> {"pass@k", "majority@k", "best_of@k", "weighted_vote@k": share right}.
    answers: of each of N prompts the n samples' (None: no answer), right: N; scores (N, n) of a reward model,
    or None. For k = 1, 2, 4 ... n the last three choose among the first k samples. A vote's weights are
    softmax(scores): only differences between a reward model's scores mean anything."""
    n, metrics = len(answers[0]), {}
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        correct = [group.count(truth) for group, truth in zip(answers, right)]
        metrics[f"pass@{k}"] = sum(pass_at_k(n, c, k) for c in correct) / len(answers)
        chosen = {"majority": [vote(group[:k]) for group in answers]}
        if scores is not None:
            chosen["best_of"] = [group[s[:k].argmax()] for group, s in zip(answers, scores)]
            chosen["weighted_vote"] = [vote(group[:k], s[:k].softmax(0).tolist())
                                       for group, s in zip(answers, scores)]
        for name, picks in chosen.items():
            metrics[f"{name}@{k}"] = sum(a == b for a, b in zip(picks, right)) / len(answers)
    return metrics


def flat(groups):
    """N lists of rows -> one."""
    return [row for group in groups for row in group]


def add_demonstrations(prompts, rewards, args, tokenizer):
    """Gives each prompt that has a column `demonstration`, a whole answer, the row of it -> the number of the
    reward that says whether a completion is right: accuracy, else code, else the first. Without
    --demo_threshold it does nothing -> None."""
    if args.demo_threshold is None:
        return None
    longest, counts = args.max_prompt_length + args.max_completion_length, Counter()

    def encode(prompt):
        answer = column_messages(prompt["row"], "demonstration", "assistant")
        require(answer and answer[-1]["role"] == "assistant" and answer[-1]["content"].strip(),
                "column 'demonstration' does not end with an answer")
        whole = joined(prompt["turns"], answer, "demonstration")
        return upto_answer(encode_conversation(tokenizer, whole)[-1])

    given = [(p, p["place"]) for p in prompts if p["row"].get("demonstration") not in (None, "", [])]
    require(given, "--demo_threshold: no prompt has a demonstration in a column 'demonstration'")
    for part, prompt, _ in convert_rows(given, encode, args.skip_bad_rows, args.dataset_name):
        counts.update(part["notes"])
        counts["too long"] += len(part["input_ids"]) > longest
        if len(part["input_ids"]) <= longest:
            prompt["demonstration"] = make_row(part["input_ids"], part["mask"], sampled=0.0, score=0.0,
                                                nll=True, note="demonstration, ")
    fit = len(given) - counts["too long"]
    require(fit, f"--demo_threshold: all demonstrations are longer than {longest} tokens, "
            "--max_prompt_length and --max_completion_length together")
    say(f"data     {fit:,} of {len(prompts):,} prompts have a demonstration{counted(counts)}")
    names = list(rewards)
    gate = next((names.index(name) for name in ("accuracy", "code") if name in names), 0)
    say(f"data     a demonstration steps in where a group's mean of '{names[gate]}' is at most "
        f"{args.demo_threshold:g}")
    return gate


# ---- models ------------------------------------------------------------------------------------------------

def base_and_adapter(name):
    """A model folder or name -> (name, None); a LoRA adapter's folder -> (its base, the folder)."""
    a_run = Path(name, "metrics.jsonl").exists() and not Path(name, "config.json").exists()
    require(not a_run, f"{name} is a run: give {name}/model")
    base, adapter, lost = name, None, f"no such model folder: {name}{' (a file)' * os.path.isfile(name)}"
    if os.path.exists(os.path.join(name, "adapter_config.json")):
        with explain(f"{name}/adapter_config.json is not readable"):
            config = PeftConfig.from_pretrained(name)
            named, adapter, kind = config.base_model_name_or_path, name, str(config.peft_type)
            require(not getattr(config, "alora_invocation_tokens", None), "activated LoRA is not supported")
            begun = str(getattr(config, "init_lora_weights", "")).lower()
        require(any(file.startswith("adapter_model.") for file in os.listdir(name)),
                f"{name} holds no adapter weights")
        require(not re.match("pissa|olora|corda|loftq|lora_ga", begun), f"{name} began by changing its base "
                f"({begun}), which loading would do again: convert it to a plain LoRA, or merge it")
        require(kind.endswith(".LORA"), f"{name} is an adapter of type {kind.partition('.')[2]}, not LoRA")
        require(named and isinstance(named, str) and named.isprintable(), f"{name}/adapter_config.json does "
                "not say which model the adapter belongs to: add its base_model_name_or_path")
        lost = f"the adapter {name} was trained on {named}, which is not there"
        base = base_above(name, named) or named
        require(base == named or not os.path.isdir(named) or os.path.samefile(base, named), f"the adapter "
                f"{name} was trained on {named}, and there are two, {base} and {os.path.abspath(named)}: "
                "write the whole path of the right one into its adapter_config.json")
    # a name on the hub has one slash at most
    require(os.path.isdir(base) or not (base.startswith((".", "/", "~")) or base.count("/") > 1), lost)
    return base, adapter


def base_above(adapter, base):
    """Where a relative name of an adapter's base leads from the nearest folder above the adapter, or None: it
    was relative to where training began, mostly a folder above its output. Found so it is the same model
    wherever the script is run."""
    paths = (os.path.join(above, base) for above in Path(os.path.abspath(adapter)).parents)
    return next((path for path in paths if os.path.isfile(os.path.join(path, "config.json"))), None)


def trains_adapter(args):
    """Whether LoRA is trained: asked for by --lora_r, or given as the folder of an adapter."""
    return args.lora_r > 0 or args.adapter


def load_model(args, tokenizer, device="cpu", dropout=False, score_names=None):
    """The model, ready to train: trained weights fp32, all others frozen; LoRA and 4-bit as `args` say. It is
    a policy that stops at every id of stop_token_ids or, with score_names, a reward model with one output a
    name. `device` moves nothing: it says where a 4-bit base will be used. dropout=False sets every rate to 0,
    since checkpointing needs train() mode."""
    base, adapter = base_and_adapter(args.model_name_or_path)
    scores = score_names and score_config(score_names, tokenizer)
    set_seed(args.seed)  # random weights and LoRA's A are drawn here
    model = load_base(base, args, device, trains_adapter(args), scores)
    for module in model.modules():  # torch would drop the gradient of the padding id, a real token to some
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    check_fit(model, base, tokenizer, args, scores)
    how, ends = "full fine-tuning", (model.get_input_embeddings(), model.get_output_embeddings())
    tied = not scores and ends[0].weight is ends[1].weight
    if trains_adapter(args):
        model, how = add_adapter(model, adapter, args, scores)
    require(scores or not isinstance(model.get_output_embeddings(), BaseTunerLayer),
            "LoRA on the output head would not be trained: use --modules_to_save lm_head instead")
    adapted = ends != (model.get_input_embeddings(), model.get_output_embeddings())
    require(not (args.merge and tied and adapted), f"{base} has one weight as input embedding and output "
            "head, and adapters would change one of the two alone: leave out --merge, or train neither")
    for name, parameter in model.named_parameters():
        finite = parameter.sum(dtype=torch.float32).isfinite()  # isfinite of each would take 5 bytes a weight
        require(finite, f"{args.model_name_or_path}: the weights {name} are not all "
                "finite numbers: the file is damaged, or training went wrong")
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not dropout:
        no_dropout(model)
    for module, name in dropout_rates(model):
        rate = getattr(module, name)
        require(0 < rate < 1, f"{args.model_name_or_path}: its config has a dropout rate of {rate}"[:300])
    if args.gradient_checkpointing:
        with explain("add --gradient_checkpointing False", ValueError):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not scores:
        model.generation_config.eos_token_id = stop_token_ids(tokenizer, model.generation_config)
    model.train()
    experts = args.load_in_4bit and any(p.ndim == 3 and "expert" in n for n, p in model.named_parameters())
    trained, total = PeftModel.get_nb_trainable_parameters(model)  # it knows the size of 4-bit weights
    say(f"model    {args.model_name_or_path} ({model.config.model_type}): {how}"
        f"{' on a 4-bit base' * args.load_in_4bit}{' (not its experts)' * experts}, "
        f"{trained:,} of {total:,} weights trained in fp32{' under bf16 autocast' if args.bf16 else ''}")
    return model


def check_fit(model, base, tokenizer, args, scores):
    """UserError unless the model can read every id and row, and a policy's logits are those of its head."""
    embedded = model.get_input_embeddings().weight.shape[0]
    ids = 1 + max(tokenizer.get_vocab().values())  # with gaps there are fewer tokens
    require(ids <= embedded, f"the tokenizer has ids up to {ids - 1} and the model's embedding {embedded} "
            f"rows: '{base}' and its tokenizer do not belong together")
    flags = ["max_length"] if hasattr(args, "max_length") else ["max_prompt_length", "max_completion_length"]
    longest, limit = sum(getattr(args, flag) for flag in flags), max_positions(model)
    require(longest <= limit, f"rows may have {longest} tokens and the model {base} has {limit} positions "
            f"(what LongRoPE adds does not count): lower --{' or --'.join(flags)}")
    layers = DynamicCache(config=model.config).layers if hasattr(args, "rollout_batch_size") else ()
    require(all(hasattr(layer, "batch_repeat_interleave") for layer in layers), f"models of type "
            f"{model.config.model_type} are not supported in ppo and grpo: some layers are no attention, and "
            "what they keep cannot be repeated for several completions")
    with explain(f"models of type {model.config.model_type} are not supported: their trunk and their output "
                 "head cannot be called apart"):
        model.score if scores else after_head(model)


@torch.no_grad()
def after_head(model):
    """What a causal model does to the outputs z of its head -> (scale, cap): its logits are scale z, or
    cap tanh(scale z / cap) where cap is not None. Every config names it otherwise, so it is found by running
    the model's own forward between a trunk and a head that say what they are told."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    if "after_head" in vars(causal):  # of a copy too
        return causal.after_head
    head = model.get_output_embeddings()
    told = torch.tensor([2.0**-10, 1e30])  # z: one that no cap changes, and one that a cap alone decides
    hidden = torch.ones(1, 1, head.weight.shape[-1])
    trunk, outputs = causal.base_model, MagicMock(last_hidden_state=hidden)
    outputs.__getitem__.return_value = hidden
    with (patch.object(getattr(trunk, "decoder", trunk), "forward", lambda *_, **__: outputs),
          patch.object(head, "forward", lambda x: x[..., :1] * told)):  # a model may scale what goes in too
        logits = causal(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits
    small, most = logits[0, 0].tolist()
    causal.after_head = small / told[0].item(), most if most < 1e20 else None
    return causal.after_head


def max_positions(model):
    """The longest row a model can read; 10**9 where it sets no limit. Beyond the first length of LongRoPE
    (Phi-3, Phi-4-mini) a row's log-probs would change with the longest row beside it."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    first = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return first or getattr(model.config, "max_position_embeddings", None) or 10**9


NO_POLICY = "a reward model, as --reward_funcs of ppo and grpo takes; a policy starts from a language model"


def load_adapter(model, folder, **options):
    """The model with the adapter of a folder. Raises an exception where its weights have other names than the
    model's modules: peft would warn, and go on with an adapter that does nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(model, folder, **options)


def add_adapter(model, adapter, args, scores):
    """-> (the model with that folder's adapter, which goes on, or with a new one; what is said of it)."""
    if adapter:
        config = PeftConfig.from_pretrained(adapter)
        of_scores = config.task_type == "SEQ_CLS"
        require(scores or not of_scores, f"{adapter} is an adapter of {NO_POLICY}")
        require(of_scores or not scores, f"{adapter} is an adapter of a policy: start from its merged/ "
                "instead, which its own command writes with --resume_from_checkpoint latest --merge")
        require(args.lora_r in (0, config.r),
                f"{adapter} is an adapter of rank {config.r}: leave --lora_r out")
        with explain(f"cannot load the adapter {adapter}"):
            saved = ["lora_", "trainable_tokens", "bias", *(config.target_modules or ()),
                     *(config.modules_to_save or ())]
            more = [key for key in load_peft_weights(adapter, "cpu") if not any(p in key for p in saved)]
            require(not more, f"it brings {', '.join(more)[:200]}, which would not be saved: merge it")
            return load_adapter(model, adapter, is_trainable=True), "a LoRA adapter goes on"
    targets = "all-linear" if args.lora_target_modules in (None, ["all-linear"]) else args.lora_target_modules
    known = {path.split(".")[-1] for path, part in model.named_modules() if [*part.parameters(recurse=False)]}
    for flag, names in (("lora_target_modules", targets), ("modules_to_save", args.modules_to_save)):
        wrong = [name for name in names or () if names != "all-linear" and not any(
            f".{path}".endswith(f".{name}") for path, _ in model.named_modules())]
        require(not wrong, f"--{flag} {names}: the model has no module of that name: {', '.join(wrong)}; "
                f"it has {', '.join(sorted(known))}")
    more = {path for path, _ in model.named_modules() for name in args.modules_to_save or ()
            if path.endswith(name) and not f".{path}".endswith(f".{name}")}
    require(not more, f"--modules_to_save {args.modules_to_save}: peft takes more, whose names end alike: "
            f"{', '.join(sorted(more))[:200]}; give a longer path, such as model.norm")
    config = LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=getattr(args, "lora_dropout", 0.0),
        target_modules=targets, modules_to_save=args.modules_to_save,
        task_type="SEQ_CLS" if scores else "CAUSAL_LM")  # SEQ_CLS trains and saves the head too
    with explain(f"--lora_target_modules {args.lora_target_modules}", ValueError):
        return get_peft_model(model, config), f"LoRA r={args.lora_r}"


def score_config(names, tokenizer):
    """The config entries of a reward model with one score a name."""
    return {"num_labels": len(names), "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)}, "pad_token_id": tokenizer.pad_token_id}


def load_base(base, args, device="cpu", frozen=False, scores=None):
    """The model of a folder or name: bf16 or 4-bit where it is frozen and the arguments say so, else fp32.
    With `scores` (a score_config) it is a reward model. A folder with a config but no weights starts from
    random ones."""
    dtype = torch.bfloat16 if frozen and args.bf16 else torch.float32
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    options = {"trust_remote_code": args.trust_remote_code, "attn_implementation": args.attn_implementation}
    say_fetch(base)
    with explain(f"cannot load a model from '{base}'"):
        config = AutoConfig.from_pretrained(base, **options, **(scores or {}))
        require(scores or "ForSequenceClassification" not in str(config.architectures), f"it is {NO_POLICY}")
        require(not hasattr(config, "vision_config"),
                f"{base} is a vision-language model: images are not supported")
        require(not getattr(config, "output_router_logits", False), f"{base} asks for a mixture-of-experts "
                "auxiliary loss (output_router_logits), which is not supported")
        if os.path.isdir(base) and not any(n.endswith((".safetensors", ".bin")) for n in os.listdir(base)):
            require(not frozen, "it holds no weights, which adapters need; without --lora_r random ones are "
                    "trained in full")
            say(f"model    {base} has a config but no weights: starting from random ones (seed {args.seed})")
            return auto.from_config(config, dtype=torch.float32, **options)
        stored = four_bit_on_disk(base, frozen)
        if args.load_in_4bit or stored:
            options |= hold_in_4bit(config, stored, dtype, device)
        if scores:  # an adapter brings its head, and for other scores a new one is drawn
            options["ignore_mismatched_sizes"] = True
        model, loaded = auto.from_pretrained(base, config=config, dtype=dtype, output_loading_info=True,
                                             **options)
        if loaded["unexpected_keys"] and not scores:  # as a reward model it has no head for words
            say(f"warning  the config of {base} has no place for {min(loaded['unexpected_keys'])}")
        mismatched = [key if isinstance(key, str) else key[0] for key in loaded["mismatched_keys"]]  # v4: str
        missing = [*loaded["missing_keys"], *mismatched]
        missing = [name for name in missing if not (scores and name.startswith("score."))]
        require(not missing, f"it holds no weights for {', '.join(sorted(missing)[:3])}: "
                "they would be random")
        return model


def four_bit_on_disk(base, frozen):
    """How a base is stored in 4 bits, by its config; {} where it is not. UserError if it is to be trained, or
    is quantised in another way."""
    how = {}
    with suppress(OSError, ValueError):  # a config that cannot be read is an error where it is loaded
        how = PretrainedConfig.get_config_dict(base)[0].get("quantization_config") or {}
    require(not how or how.get("load_in_4bit"), f"{base} is quantised ({how.get('quant_method')}), which "
            "cannot be trained here: start from its original weights, with --load_in_4bit if memory is short")
    require(not how or frozen, f"{base} is stored in 4 bits, which only adapters can be trained on: "
            "add --lora_r 16, or start from its original weights")
    return how


def hold_in_4bit(config, stored, compute_dtype, device):
    """What from_pretrained is given for a 4-bit base: nf4, or nothing where it is `stored` in 4 bits."""
    options = {"quantization_config": nf4(compute_dtype, device)}
    vars(config).pop("quantization_config", None)  # an adapter's tells of the base that it was trained on
    if not stored:
        return options
    config.quantization_config = stored | {"bnb_4bit_compute_dtype": str(compute_dtype).split(".")[1]}
    return {}


def nf4(compute_dtype, device):
    """NF4 with double quantisation, for weights that will be used on `device`."""
    with explain("--load_in_4bit needs the package 'bitsandbytes' (pip install bitsandbytes)", ImportError):
        import bitsandbytes.nn.modules
    if torch.device(device).type == "cpu":  # an eval forward would repack the weights and spoil the gradients
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=compute_dtype)


def use_scoring_pad_token(tokenizer):
    """Gives the tokenizer a pad token that ends no text, and returns its id. transformers reads a reward
    model's score before the last run of pad tokens: were that the EOS of a text, it would read the token
    before it. Any other token will do; no mask is derived from it."""
    stops = stop_token_ids(tokenizer)
    if tokenizer.pad_token_id in (None, *stops):
        others = [tokenizer.unk_token_id, *tokenizer.added_tokens_decoder, 0, 1]
        pad_id = next(i for i in others if i not in (None, *stops))
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return tokenizer.pad_token_id


def load_reward_model(folder, device="cpu", trust_remote_code=False, date=None):
    """A reward model's folder (full, merged or adapter) -> (names of its scores, score). score(conversations:
    lists of turns, truncated: bools) -> (N, K) fp32 on the CPU, read where the last answer ends; by a model
    from elsewhere after all that its template writes. One that is truncated gets no end-of-turn token."""
    base, adapter = base_and_adapter(folder)
    options = {"trust_remote_code": trust_remote_code}
    with explain(f"{folder} is no reward model that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        tokenizer.init_kwargs.setdefault("template_date", date)  # the day of its training goes before
        require(adapter is None or PeftConfig.from_pretrained(adapter).task_type == "SEQ_CLS",
                "it is an adapter of a language model")
        config = AutoConfig.from_pretrained(folder, **options)
        stored = four_bit_on_disk(base, True)
        if stored or hasattr(config, "quantization_config"):
            options |= hold_in_4bit(config, stored, torch.float32, device)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            base, config=config, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=adapter is not None, **options)  # which brings the head
        require(adapter or not loaded["missing_keys"], "it has no trained score head")
        model = load_adapter(model, adapter) if adapter else model
        model.to(device).eval()
        if model.config.pad_token_id is None:
            model.config.pad_token_id = use_scoring_pad_token(tokenizer)
        limit, stops = max_positions(model), stop_token_ids(tokenizer)

    def row_of(messages, no_end):
        try:
            if no_end or hasattr(config, "scored_at"):
                # what a template drops of a sample, such as a second </think>, is not scored
                row = encode_conversation(tokenizer, messages, check=lambda *_: None)[-1]
                ids = upto_answer(row)["input_ids"]
            else:
                ids = tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"]
        except ValueError:  # some templates refuse an empty answer
            said = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
            end = end_of_turn(tokenizer, str(tokenizer.chat_template)) or tokenizer.eos_token_id
            ids = encode_prompt(tokenizer, messages[:-1]) + said + [end]
        ids = ids[:1] + ids[-limit:][1:]
        return ids[:-1] if no_end and ids[-1] in stops else ids

    @torch.no_grad()
    def score(conversations, truncated=None):
        rows = list(map(row_of, conversations, truncated or repeat(False)))
        scores, lengths = torch.zeros(len(rows), config.num_labels), [len(row) for row in rows]
        for at in cut(lengths, 16 * max(lengths)):
            # with the id before which the model looks for the end, whatever the tokenizer's is
            ids = pad([rows[i] for i in at], model.config.pad_token_id).to(device)
            mask = pad([[1] * lengths[i] for i in at], 0).to(device)
            scores[at] = model(input_ids=ids, attention_mask=mask).logits.float().cpu()
        return scores
    return [config.id2label[i] for i in range(config.num_labels)], score


# A chunk of the head's, in fp32: 128 MiB, or 512 on a GPU, where adding to the gradient once a chunk costs.
LOGITS_AT_ONCE = 2**27 if torch.cuda.is_available() else 2**25


def head_sizes(config):
    """-> (heads, key-value heads, size of each) of an attention layer."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, size


def step_memory(config, tokens, full, bf16, checkpointing):
    """Bytes that a forward and backward pass over so many tokens keeps and works with. The formula is
    explained, and held against measured peaks, in tests/figures/memory.py."""
    d, layers, (h, k, e) = config.hidden_size, config.num_hidden_layers, head_sizes(config)
    f = getattr(config, "intermediate_size", None) or 4 * d
    size, stream = (2 if bf16 else 4), (2 if bf16 and not full else 4)  # of an activation; between the layers
    wide = 3 * h * e + 2 * k * e + 4 * f
    if bf16 and not full:
        wide += h * e + f  # each adapter casts its own input
    layer = (26 if bf16 else 24) * d + size * wide  # norms are in fp32,
    layer -= 0 if full else 2 * size * d  # and frozen ones keep less
    kept = layers * (stream * d if checkpointing else layer) + 12 * d
    head = 8 * min(tokens * config.vocab_size, LOGITS_AT_ONCE) + (4 * config.vocab_size * d if full else 0)
    return tokens * kept + max(head, tokens * (layer * checkpointing + 3 * size * f))


def rollout_memory(config, completions, length, bf16):
    """Bytes of the cache of completions of `length` tokens with their prompts, and of choosing a token."""
    _, k, e = head_sizes(config)
    cache = 2 * config.num_hidden_layers * k * e * length * (2 if bf16 else 4)
    return completions * (cache + 36 * config.vocab_size)


def say_memory(module, args, device):
    """Says, by estimate, what this process takes at its peak, and what makes it smaller. `module` is the
    policy with what is trained beside it."""
    model, full = module.model, not trains_adapter(args)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    weights = trained * (14 if args.bf16 else 12)  # AdamW's moments 8, gradients 4, under autocast a copy 2
    gc.collect()  # what is left is in use: policy, reference, value, reward models, whoever holds them
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    weights += sum(p.numel() * p.element_size() for p in tensors
                   if isinstance(p, torch.nn.Parameter) and not p.is_meta)
    trunks = 1 if getattr(module, "trunk", None) is None else 2  # ppo's value may have one of its own
    room = torch.cuda.mem_get_info()[1] if device.type == "cuda" else psutil.virtual_memory().total
    rollout, gib, said = 0, 2**30, ""
    with suppress(Exception):  # a config that has no such sizes, or one a layer
        config = model.config.get_text_config()
        step = trunks * step_memory(config, args.micro_batch_tokens, full, args.bf16,
                                    args.gradient_checkpointing)
        if hasattr(args, "rollout_batch_size"):
            completions = min(args.rollout_batch_size, args.batch_size * args.num_generations)
            length = args.max_prompt_length + args.max_completion_length
            rollout = rollout_memory(config, completions, length, args.bf16)
            said = f", {rollout / gib:.1f} for a rollout of the longest rows (less: --rollout_batch_size)"
        peak = weights + max(step, rollout - 4 * trained)
        say(f"memory   {peak / gib:.1f} of {room / gib:.0f} GiB at the peak, by estimate: "
            f"{weights / gib:.1f} for weights, gradients and AdamW"
            f"{' (less: --lora_r 16)' if full else ''}, {step / gib:.1f} for a micro-batch of "
            f"{args.micro_batch_tokens:,} tokens (less: --micro_batch_tokens){said}")


def value_start(args, rewards, tokenizer):
    """The reward model that ppo's value starts from, as a Reward: --value_model, else the first that it can
    start from; None if there is none, or with --share_trunk. UserError if --value_model cannot be one."""
    given, options = args.value_model, {"trust_remote_code": args.trust_remote_code}
    models = [reward for reward in rewards.values() if reward.score is not None]
    for reward in [] if args.share_trunk else [Reward(None, 1.0, given)] if given else models:
        base, adapter = base_and_adapter(reward.path)
        with explain(f"cannot read {reward.path}"):
            theirs = AutoTokenizer.from_pretrained(reward.path, **options)
            kind = adapter and PeftConfig.from_pretrained(adapter).task_type
            config = AutoConfig.from_pretrained(base if kind == "CAUSAL_LM" else reward.path, **options)
            kind = kind or str(config.architectures)
        reason = ""
        if theirs.get_vocab() != tokenizer.get_vocab():
            reason = "has another tokenizer"
        elif not re.search("SEQ_CLS|ForSequenceClassification", kind) or not scorer_outline(config, options):
            reason = "is no causal model with a score head"
        elif given and config.num_labels > 1:
            reason = f"has several scores ({', '.join(config.id2label.values())})"
        require(not (given and reason), f"--value_model {given} {reason}: the value cannot start from it")
        if not reason:
            return reward._replace(score=reward.score or config.id2label[0])
        say(f"value    {reward.path} {reason}: the value cannot start from it")


def load_value(reward, args, model, run):
    """What value_start found, ready to train as the policy is: in full, or with a new adapter of its rank; an
    adapter goes on -> (the reward model, the weights (1, d) of the reward's score)."""
    own = copy.copy(args)
    own.model_name_or_path = reward.path
    own.modules_to_save = [m for m in args.modules_to_save or [] if m != "lm_head"]  # it has none
    adapted = isinstance(model, PeftModel) and not own.adapter
    own.lora_r = model.peft_config["default"].r if adapted else 0  # 0: its own adapter goes on
    config = AutoConfig.from_pretrained(reward.path, trust_remote_code=args.trust_remote_code)
    names = list(config.id2label.values())
    scorer = load_model(own, run.tokenizer, run.device, score_names=names)
    return scorer, scorer.score.weight[[names.index(reward.score)]]


def scorer_outline(config, options):
    """A reward model of this config, its weights without memory; None where transformers has none that is a
    trunk and a head `score`."""
    with torch.device("meta"), suppress(ValueError):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, **options)
        return model if hasattr(model, "score") else None


def dropout_rates(model):
    """Yields (module, attribute) of every rate but 0: dropout modules', and those of functional dropout."""
    for module in model.modules():
        for name, value in vars(module).items():
            rate = "drop" in name or (name == "p" and isinstance(module, torch.nn.Dropout))
            if rate and type(value) in (int, float) and value != 0:
                yield module, name


def no_dropout(model):
    """Sets every dropout rate to 0."""
    for module, name in list(dropout_rates(model)):
        setattr(module, name, 0.0)


def check_cut(model, checkpoint, args):
    """UserError if a run with dropout is resumed with another --micro_batch_tokens."""
    then = checkpoint["args"]["micro_batch_tokens"]
    require(then == args.micro_batch_tokens or not any(dropout_rates(model)), "the model has dropout, whose "
            f"draws depend on the cut: give --micro_batch_tokens {then}, as the checkpoint's run did")


def make_reference(model, args, device):
    """The frozen reference policy -> (model to call, context to call it in); says how it is made. LoRA on a
    plain base: the same model, adapters off. LoRA continued from an adapter: a frozen copy of that adapter.
    Full fine-tuning: a frozen copy of the model. Call it before the first update."""
    adapter = base_and_adapter(args.model_name_or_path)[1]
    if not isinstance(model, PeftModel):
        say("reference a frozen copy of the model")
        return copy.deepcopy(model).requires_grad_(False).to(device), nullcontext
    if adapter is None:
        say("reference the base model, adapters off")
        return model, model.disable_adapter
    with explain(f"no second copy of {adapter} can be loaded, as a frozen reference"):
        model.load_adapter(adapter, adapter_name="reference", is_trainable=False)
    model.set_adapter("default")
    no_dropout(model)  # the new layers came with the adapter's own rate
    model.train()

    @contextmanager
    def use_reference():
        model.set_adapter("reference")
        try:
            with torch.no_grad():  # an active adapter counts as trainable
                yield
        finally:
            model.set_adapter("default")
    say("reference a frozen copy of the adapter")
    return model, use_reference


# ---- saving ------------------------------------------------------------------------------------------------

def finish(args, accelerator, model, tokenizer, name="model"):
    """Writes model/, or what is named, and says where."""
    named = model.state_dict(keep_vars=True)
    values = {id(value): whole(value).detach() for value in named.values()}  # tied weights stay one tensor
    state = {name: values[id(value)] for name, value in named.items()}
    if accelerator.is_main_process:
        folder = os.path.join(args.output_dir, name)
        save_model(args, model, tokenizer, folder, state)
        say(f"saved    {folder}")
    accelerator.wait_for_everyone()


def save_value(run, owner, trunk, head):
    """Writes value/: ppo's value as a reward model, as an adapter where `owner` has one: the model that the
    trunk is of, or was copied from. trunk None: the owner's own. Every process calls it."""
    tokenizer, config = copy.deepcopy((run.tokenizer, owner.config))
    use_scoring_pad_token(tokenizer)
    config.update(score_config(["value"], tokenizer))
    model = bare = scorer_outline(config, {"trust_remote_code": run.args.trust_remote_code})
    if model is None:
        say(f"value    transformers has no reward models of type {config.model_type}: no value/ is written")
        return
    bare.score = head  # of which peft makes a copy
    if isinstance(owner, PeftModel):
        adapter = copy.deepcopy(owner.peft_config["default"])
        adapter.task_type, model.name_or_path = "SEQ_CLS", adapter.base_model_name_or_path
        adapter.modules_to_save = [m for m in adapter.modules_to_save or []
                                   if m not in ("lm_head", "score", "classifier")]  # peft adds the last two
        model, owner = get_peft_model(model, adapter), owner.get_base_model()
    setattr(bare, bare.base_model_prefix, owner.base_model if trunk is None else trunk)
    finish(run.args, run.accelerator, model, tokenizer, "value")


def save_model(args, model, tokenizer, folder, state=None):
    """An adapter or full weights, with tokenizer, template, generation config and a model card."""
    model.config.use_cache, options = True, {}
    if not model.can_generate():
        model.config.scored_at = "end of turn"  # for load_reward_model
    if isinstance(model, PeftModel):
        options, config = {"selected_adapters": ["default"]}, model.peft_config["default"]
        base = model.get_base_model().name_or_path
        if os.path.isdir(base) and not os.path.isabs(config.base_model_name_or_path):
            named = os.path.relpath(base)  # the folder that both lie in may move
            above = base_above(folder, named)
            found = above and os.path.samefile(above, base)
            config.base_model_name_or_path = named if found else os.path.abspath(base)
    # as shipped, though with a temperature and no do_sample: transformers would refuse to write that
    with written_whole(folder) as unfinished, patch.object(transformers.GenerationConfig, "validate"):
        model.save_pretrained(unfinished, state_dict=state, **options)
        # a reward model generates nothing: its config tells the names of its scores, beside an adapter too
        (model.generation_config if model.can_generate() else model.config).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        with open(os.path.join(unfinished, "README.md"), "w", encoding="utf-8") as file:  # peft's is empty
            file.write(model_card(args, model, stop_token_ids(tokenizer)))


CARD = string.Template("""---
$data
---

# $kind, trained by $script

`$script` made it from `$base` on `$dataset`$held. The arguments that decide the result, where they
are not the plain defaults:

```json
$arguments
```

To load it:

```python
import transformers$peft

folder = "path/of/this/folder"
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.$auto.from_pretrained($options)$adapt$score
```
""")

SCORE = string.Template("""

messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
ids = tokenizer.apply_chat_template(messages, return_dict=False)
while ids[-1] not in $stops:  # scores are read where the answer ends, not after what may follow it
    ids.pop()
scores = model.eval()(torch.tensor([ids])).logits""")


def model_card(args, model, stops=()):
    """A saved folder's README.md: front matter for the Hub, what made it from what, and how to load it; of a
    reward model, whose answers end with one of the ids `stops`, how it scores."""
    adapter = model.peft_config["default"] if isinstance(model, PeftModel) else None
    base = adapter.base_model_name_or_path if adapter else model.config._name_or_path
    scores = {} if model.can_generate() else model.config.id2label
    task, auto = ("text-classification", "AutoModelForSequenceClassification") if scores else (
        "text-generation", "AutoModelForCausalLM")
    of_hub, dataset = (None if os.path.exists(name) else name for name in (base, args.dataset_name))
    script = os.path.basename(sys.modules[type(args).__module__].__file__)
    data = ModelCardData(  # the Hub refuses what is a path
        base_model=of_hub, datasets=dataset and [dataset.partition(":")[0]], pipeline_tag=task,
        library_name="peft" if adapter else "transformers", tags=[script.removesuffix(".py")])
    changed = {flag.name: getattr(args, flag.name) for flag in fields(args)  # written again it is the same
               if flag.name not in MAY_CHANGE and getattr(args, flag.name) != default_of(flag)}
    dtype = "bfloat16" if args.bf16 else "float32"  # of the base in training, whatever it is stored in
    options = [json.dumps(base), f'dtype="{dtype}"'] if adapter else ["folder"]
    if adapter and scores:
        options += [f"id2label={scores}, pad_token_id={model.config.pad_token_id}",
                    "ignore_mismatched_sizes=True"]
    if adapter and args.load_in_4bit:
        options += ["quantization_config=transformers.BitsAndBytesConfig(\n        "
                    "load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True,\n        "
                    f"bnb_4bit_compute_dtype='{dtype}')"]
    return CARD.substitute(
        data=data.to_yaml(), script=script, base=base, dataset=args.dataset_name, auto=auto,
        kind={(): "Language model", ("value",): "Value function"}.get(tuple(scores.values()), "Reward model"),
        held=f", evaluated on `{args.eval_dataset_name}`" if args.eval_dataset_name else "",
        arguments=json.dumps(changed, indent=1),
        peft="\nimport torch" * bool(scores) + "\nimport peft" * bool(adapter),
        options=",\n    ".join(options),
        adapt="\nmodel = peft.PeftModel.from_pretrained(model, folder)" * bool(adapter)
        + "\nmodel.generation_config = transformers.GenerationConfig.from_pretrained(folder)"
        * bool(adapter and not scores),  # its stop tokens may not be the base's
        score=SCORE.substitute(stops=stops) if scores else "")


@torch.no_grad()
def merge_adapter(run, model):
    """Merges the adapter of the trained model, saved in model/, into its base, in fp32, and writes merged/. A
    4-bit base is dequantised first, as it was in training: merging into its original weights, or in 4 bits,
    is some ten times less exact. UserError, and no merged/, if it gives an example of the data other logits,
    loaded again, than base and adapter do."""
    args, scores, own = run.args, None, copy.copy(run.args)
    adapter, folder = (os.path.join(args.output_dir, name) for name in ("model", "merged"))
    own.attn_implementation = None  # it is tried on the CPU, which has room for fp32 and lacks some kernels
    if not model.can_generate():
        scores = score_config(list(model.config.id2label.values()), run.tokenizer)
    base = load_base(base_and_adapter(adapter)[0], own, run.device, True, scores).to(run.device)
    if args.load_in_4bit:
        base = base.dequantize(dtype=torch.bfloat16 if args.bf16 else torch.float32)
        base._weight_conversions = None  # those of stored 4-bit weights cannot be undone by saving
    adapted = load_adapter(base.cpu().float(), adapter).eval()
    ids = torch.as_tensor(run.example)[None, :128].long()
    before = adapted(ids).logits
    merged = adapted.merge_and_unload()
    if not scores:
        merged.generation_config = model.generation_config
    save_model(args, merged, run.tokenizer, folder)
    merged = adapted = base = None  # one model at a time
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with explain(f"cannot load {folder} again"):
        again = auto.from_pretrained(folder, dtype=torch.float32, trust_remote_code=args.trust_remote_code)
    after = again.eval()(ids).logits
    moved, largest = (after - before).abs(), before.abs().max().item()
    said = f"an example's logits moved by {moved.mean():.2g} on average and {moved.max():.2g} at most"
    if not moved.max() < 1e-3 * max(1.0, largest):
        shutil.rmtree(folder)
        raise UserError(f"--merge: {said} (the largest is {largest:.3g}), so merged/ would be another model "
                        f"and was removed; {adapter} is whole")
    same = (after.argmax(-1) == before.argmax(-1)).sum().item()
    say(f"merged   {folder}: {said}" + ("" if scores else f"; {same} of {ids.numel()} greedy tokens agree"))


# ---- processes ---------------------------------------------------------------------------------------------

def make_accelerator(args):
    """One Accelerator for every script; resolves args.bf16: None means on an accelerator that has it. Buffers
    are not broadcast: a no_grad forward on one process alone would hang the others. Accumulation stays 1,
    whatever the launcher says: a script divides by the whole step's denominator itself. Every process loads
    the weights, or what is copied before sharding (a reference) would be empty on some."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    for what in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        require(os.environ.get(f"ACCELERATE_USE_{what}", "").lower() != "true", "DeepSpeed, Megatron and "
                "parallelism_config are not supported: use FSDP (fsdp_version: 2) in the accelerate config")
    if args.bf16 is None:
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        args.bf16 = not cpu and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported())
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no", log_with=args.log_with,
                              project_dir=os.path.join(args.output_dir, "tracker"),
                              kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False),
                                               InitProcessGroupKwargs(timeout=timedelta(hours=3))])
    accelerator.gradient_accumulation_steps = 1
    sharded = accelerator.distributed_type == DistributedType.FSDP
    require(not sharded or accelerator.is_fsdp2, "FSDP 1 is not supported: set fsdp_version: 2")
    require(not sharded or args.optim == "adamw_torch", f"--optim {args.optim} cannot be sharded by FSDP")
    return accelerator


@contextmanager
def unsharded(module):
    """Inside, an FSDP module has its weights whole on every process, and a forward without gradients waits
    for no other process; without FSDP nothing changes. `module` must have run its first forward."""
    units = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not module, recurse=False)
            unit.reshard()


def whole(value):
    """A tensor. One that FSDP has sharded is gathered on the CPU of the first process: it alone writes. The
    others get the sum, which says whether all is finite: a copy each would not fit one machine's memory."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if torch.distributed.get_rank() == 0 else full.sum().cpu()


def like(value, parameter):
    """The first process's whole `value`, sent to all, and sharded if `parameter` is and has its shape. On the
    others `value` is an outline (Run.from_first). Every process calls it."""
    if torch.is_tensor(value) and torch.distributed.is_initialized():
        to = {"device": parameter.device}
        value = torch.empty_like(value, **to) if value.is_meta else value.to(**to).contiguous()
        torch.distributed.broadcast(value, 0)
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


# ---- checkpoints -------------------------------------------------------------------------------------------

# Arguments that may differ when a run is resumed: none of them changes the resulting weights (but for
# micro_batch_tokens where there is dropout: check_cut; sampler_device: another kernel rounds differently).
MAY_CHANGE = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps",
              "save_total_limit", "logging_steps", "log_with", "micro_batch_tokens", "rollout_batch_size",
              "gradient_checkpointing", "merge", "reward_timeout", "kl_warn", "audit", "audit_step",
              "sampler_device"}
OWN = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint"}  # the first process alone uses them
OUTPUTS = "args.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model", "merged", "value", "tracker"


def open_run(args):
    """Checks args.output_dir and finds where to go on. -> the checkpoint's state or None. It removes nothing:
    Run.start does when data and model have been found good. UserError if the folder holds a run and neither
    --resume_from_checkpoint nor --overwrite_output_dir is given, or if an argument that changes the
    mathematics differs from the checkpoint's. The first process calls it, for all."""
    if args.audit:  # output_dir is only read, where there is something to resume
        require(args.audit.endswith(".html") and os.access(os.path.dirname(args.audit) or ".", os.W_OK),
                f"--audit {args.audit}: expected the name of an .html file in a folder that is writable")
        begins = re.escape(AUDIT_PAGE.template.partition("$")[0]).encode() + rb"\w+\.py, step \d"
        with explain(f"--audit {args.audit}"), suppress(FileNotFoundError), open(args.audit, "rb") as file:
            require(re.match(begins, file.read(200)), "another file is there; choose another name")
    path, checkpoint = find_checkpoint(args)
    here = os.path.realpath(os.path.join(args.output_dir, "checkpoints"))
    elsewhere = path and os.path.dirname(os.path.realpath(path)) != here
    if not args.audit and (checkpoint is None or elsewhere):
        check_free(args)
    if checkpoint is None:
        return None
    checkpoint["elsewhere"] = elsewhere
    then = checkpoint["args"]
    require(then.keys() == asdict(args).keys(), f"{path} is of another script, or of another version of it: "
            "give this run an --output_dir of its own")
    args.date = args.date or then["date"]
    for name, value in sorted(asdict(args).items()):
        require(name in MAY_CHANGE or then.get(name) == value,
                f"{path} was written with --{name} {then.get(name)} and this run has {value}: "
                "that would change the result; give the old value, or start a new --output_dir (to train "
                "on, with --model_name_or_path of this run's model/)")
    say(f"resume   from {path}, step {checkpoint['step']}")
    return checkpoint


def lock(folder):
    """Takes the folder for this process, until it ends or closes the file that is returned. UserError while
    another process has it."""
    with explain(f"--output_dir {folder}", OSError):
        os.makedirs(folder, exist_ok=True)
        file = os.open(os.path.join(folder, ".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another run is writing to {folder}: choose another --output_dir, or wait for its "
                        "end") from None
    except OSError as error:  # a file system without locks
        say(f"warning  {folder} cannot be locked ({reason_of(error)}): let no other run write to it")
    return file


def check_free(args):
    """UserError if output_dir holds what may not be replaced: a run, other files, or this run's inputs."""
    used = [name for name in OUTPUTS if os.path.lexists(os.path.join(args.output_dir, name))]
    # replaced are a run that made one step at most and, asked to go on, one that has no checkpoint yet
    log, *paths = (os.path.join(args.output_dir, n) for n in ("metrics.jsonl", *used) if n != "tracker")
    with explain(log, OSError), open(log if os.path.isfile(log) else os.devnull, "rb") as file:
        started = all(map(os.path.isfile, paths)) and len(file.readlines()) < 2
    theirs, free = {}, MAY_CHANGE | {"date"}
    with suppress(OSError, *UNREADABLE), open(os.path.join(args.output_dir, "args.json"), "rb") as file:
        theirs = dict(json.load(file))
    same = all(theirs.get(n) == value for n, value in asdict(args).items() if n not in free)
    started |= same and args.resume_from_checkpoint == "latest" and not {"model", "merged", "value"} & {*used}
    require(not used or "args.json" in used, f"{args.output_dir} holds {', '.join(used)} but no "
            "args.json, so it is no run of ours and is not overwritten; choose another --output_dir")
    require(not used or args.overwrite_output_dir or started,
            f"{args.output_dir} already holds a run: choose another --output_dir, or add "
            + "--resume_from_checkpoint latest to go on, or " * (same and args.resume_from_checkpoint is None)
            + "--overwrite_output_dir to replace it")
    given = [(name, getattr(args, name, None)) for name in (
        "model_name_or_path", "dataset_name", "eval_dataset_name", "chat_template_path", "sft_dataset",
        "value_model")]
    given += [("reward_funcs", name) for name in getattr(args, "reward_funcs", [])]
    given += [("model_name_or_path", base_and_adapter(args.model_name_or_path)[0])]
    for name, value in given:
        for path in (value, value.rpartition(":")[0]) if value else ():  # folder:score, file.py:function
            inside = os.path.relpath(os.path.realpath(path or "."), os.path.realpath(args.output_dir))
            require(inside.split(os.sep)[0] not in OUTPUTS, f"--{name} {value} lies inside the run that "
                    "would be replaced; choose another --output_dir")
    if used:
        ended = "model" in used or "checkpoints" not in used
        say(f"output   before the first step this replaces the run in {args.output_dir}"
            + ("" if ended else ", which --resume_from_checkpoint latest would go on with"))


def find_checkpoint(args):
    """-> (folder, state) to resume from; of "latest" the newest that is whole; or two Nones."""
    wanted, folder = args.resume_from_checkpoint, os.path.join(args.output_dir, "checkpoints")
    if wanted is None:
        return None, None
    for path in reversed(steps_in(folder)) if wanted == "latest" else [wanted]:
        known = wanted == "latest" or os.path.isfile(os.path.join(path, "state.pt"))
        require(known, f"--resume_from_checkpoint {path}: no checkpoint is there (or say 'latest')")
        try:
            return path, load_checkpoint(path)
        except Exception as error:
            require(wanted == "latest", f"--resume_from_checkpoint {path}: {reason_of(error)}")
            say(f"resume   passing over {path}: {reason_of(error)}")
    # a run that was killed never looks like this, a disk that fails does
    require(not steps_in(folder) or args.overwrite_output_dir, f"no checkpoint in {folder} can be read; "
            "--overwrite_output_dir in place of --resume_from_checkpoint begins again")
    say(f"resume   no checkpoint in {folder}: starting from the beginning")
    return None, None


def steps_in(folder):
    """The checkpoints of a folder, oldest first."""
    return [os.path.join(folder, n) for n in sorted(glob.glob("step-" + "[0-9]" * 8, root_dir=folder))]


@contextmanager
def written_whole(folder):
    """Yields an empty folder that replaces `folder` once complete; UserError, and no change, if not."""
    unfinished = os.path.join(os.path.dirname(folder), ".partial-" + os.path.basename(folder))
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        os.makedirs(unfinished)
        yield unfinished
        for name in [*os.listdir(unfinished), "."]:  # on the disk before its name says so
            handle = os.open(os.path.join(unfinished, name), os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unfinished, folder)
    except Exception as error:
        free = shutil.disk_usage(os.path.dirname(folder) or ".").free // 2**20  # torch.save does not say it
        raise UserError(f"could not write {folder}, where {free:,} MiB are free (the checkpoints before it "
                        f"are whole): {reason_of(error)}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load_checkpoint(folder):
    """-> the state that Run.save wrote. Raises an exception if it is not there or damaged."""
    path = os.path.join(folder, "state.pt")
    with zipfile.ZipFile(path) as file:  # torch.load alone does not look at the checksums
        folders = any(info.external_attr for info in file.infolist())  # of which it would read nothing
        require(not folders and file.testzip() is None, "damaged: its checksums do not fit")
    state = torch.load(path, map_location="cpu", weights_only=True)
    parts = {"step": int, "args": dict, "data": dict, "weights": dict, "optimizer": dict, "kept": dict}
    require(isinstance(state, dict) and all(isinstance(state.get(k), kind) for k, kind in parts.items()),
            "it is no checkpoint of this project's")
    with explain("damaged", TypeError):  # by a tensor where a value is compared
        json.dumps({k: v for k, v in state.items() if k not in ("weights", "optimizer", "kept", "ahead")})
    return state


@torch.no_grad()
def restore(module, optimizer, state):
    """Puts saved weights and moments back in place. UserError if a weight's name or shape is another."""
    for name, p in module.named_parameters():
        if p.requires_grad:
            saved = state["weights"].get(name)
            require(saved is not None and saved.shape == p.shape, f"the checkpoint has no weight {name} of "
                    f"shape {tuple(p.shape)}: it was written by another model")
            p.copy_(like(saved, p))
    if optimizer is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        require(all(place < len(parameters) for place in state["optimizer"]), "it has moments of weights "
                "that this model lacks: another version wrote it, which has to finish this run")
        moments = {place: recursively_apply(like, values, parameters[place])  # 8-bit ones are nested
                   for place, values in state["optimizer"].items()}
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def fingerprint_of_file(path):
    """A digest of a file or of a folder's files, subfolders aside; of a model's name on the hub: its commit.
    Of each file the name, the size and 1,024 pieces of 16 KiB, evenly spread: all of it up to 16 MiB. A
    change of a few weights among many may go unseen, but not what training or merging changes."""
    if not os.path.exists(path):
        with suppress(OSError, ValueError):
            return str(PretrainedConfig.get_config_dict(path)[0].get("_commit_hash"))
    digest = hashlib.sha256()
    for name in sorted(os.listdir(path)) if os.path.isdir(path) else [""]:
        file = os.path.join(path, name) if name else path
        if os.path.isfile(file):
            size = os.path.getsize(file)
            digest.update(f"{os.path.basename(file)} {size}".encode())
            with open(file, "rb") as data:
                for piece in range(min(1024, math.ceil(size / 2**14))):
                    data.seek(max(piece * 2**14, (size - 2**14) * piece // 1023))
                    digest.update(data.read(2**14))
    return digest.hexdigest()[:16]


def fingerprint(rows):
    """A digest of all that the rows hold, but for their places, so that no run goes on with other data."""
    digest = hashlib.sha256()
    for row in rows:
        plain = json.dumps({**row, "place": None}, sort_keys=True, default=lambda value: (
            value.numpy().tobytes().hex() if torch.is_tensor(value) else repr(value)))
        digest.update(plain.encode())
    return digest.hexdigest()[:16]


# ---- decoding ----------------------------------------------------------------------------------------------

def inverse_cdf(probs, u):
    """probs (rows, V) fp32, u (rows,) fp64 in [0, 1) -> (rows,) the first places at which the running sum is
    more than u of the whole. In two levels, blocks and the block that it falls in: fp64 sums over a whole
    vocabulary would move more bytes than a small model has."""
    blocks = F.pad(probs, (0, -probs.shape[-1] % 128)).unflatten(-1, (-1, 128))  # (rows, blocks, 128)
    sums = blocks.sum(-1, dtype=torch.float64)
    block, rest = passing(sums, u[:, None] * sums.sum(-1, keepdim=True))
    place, _ = passing(blocks.take_along_dim(block[..., None], 1).squeeze(1).double(), rest)
    return (block * 128 + place).squeeze(-1).clamp(max=probs.shape[-1] - 1)  # of NaN: the last


def passing(weights, target):
    """weights (rows, n) fp64, target (rows, 1) -> (rows, 1) the first places at which their running sum is
    more than the target, and what of the target is left there."""
    ends = weights.cumsum(-1)
    target = target.clamp(min=0).minimum(ends[:, -1:] * (1 - 2**-40))  # sums in another order differ
    place = torch.searchsorted(ends, target, right=True).clamp(max=weights.shape[-1] - 1)  # NaN has no place
    return place, target - (ends - weights).gather(-1, place)


class Decoder:
    """The key-value cache behind next-token logits. Each prompt is read once, for all its completions."""

    def __init__(self, model, prompts, num_generations, max_completion_length):
        """Reads N prompts, lists of ids. .logits (rows, V) are of the next token, .rows (rows,) say which of
        the N * num_generations completions are in the batch, .lengths (all,) how many tokens each has."""
        self.model, self.G, self.C, self.steps = model, num_generations, max_completion_length, 0
        device = next(model.parameters()).device
        prompt_ids = pad(prompts, 0, side="left").to(device)
        mask = pad([[1] * len(prompt) for prompt in prompts], 0, side="left").to(device)
        position = (mask.cumsum(-1) - 1).clamp(min=0)  # left padding shifts positions
        self.cache, self.read = DynamicCache(config=model.config), mask.shape[1]
        logits = model(input_ids=prompt_ids, attention_mask=mask, position_ids=position,
                       past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        self.logits, self.mask, self.position = (
            x.repeat_interleave(num_generations, 0) for x in (logits, mask, position[:, -1:]))
        self.rows = torch.arange(len(self.logits), device=device)
        self.lengths, self.going = torch.zeros_like(self.rows), torch.ones_like(self.rows, dtype=torch.bool)
        self.spread()

    @staticmethod
    def start(*args):
        """A decoder of the kind that suits device and model."""
        return ReplayingDecoder.if_suited(*args) or Decoder(*args)

    def spread(self):
        """The cache of N prompts becomes that of all rows."""
        self.cache.batch_repeat_interleave(self.G)

    def count(self, tokens, ends):
        """Counts tokens (rows,) that have been chosen; `ends` (rows,): whether one ends its completion."""
        self.steps += 1
        self.lengths[self.rows] += self.going[self.rows]
        self.going[self.rows] &= ~ends
        still(f"sampling: {len(tokens)} completions have {self.steps} tokens")

    def step(self, tokens, ends):
        """Appends tokens (rows,) and drops the rows where `ends` (rows,) is true -> whether any is left to go
        on with; then .logits and .rows are new."""
        self.count(tokens, ends)
        kept = (~ends).nonzero().squeeze(-1)
        if self.steps == self.C or len(kept) == 0:
            return False
        if len(kept) < len(tokens):
            self.cache.batch_select_indices(kept)
            tokens, self.rows, self.mask, self.position = (
                x[kept] for x in (tokens, self.rows, self.mask, self.position))
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], -1)
        self.position = self.position + 1
        self.logits = self.model(input_ids=tokens[:, None], attention_mask=self.mask,
                                 position_ids=self.position, past_key_values=self.cache,
                                 use_cache=True).logits[:, -1]
        return True


class ReplayingDecoder(Decoder):
    """For GPUs, which run the thousand small kernels of a step in less time than it takes to launch them: the
    launches are recorded (a CUDA graph, one for a number of rows and a width) and replayed. So tensors stay
    where they are, a step asks the GPU for no value, and rows that have ended are dropped every LOOK tokens,
    down to a power of two. The cache is as large from the start as it would be in the end."""
    DEVICES, LOOK, WIDTH, LEAST = ("cuda",), 16, 256, 16
    known = WeakKeyDictionary()  # model -> "replay", "launch" where nothing can be recorded, or "unsuited"

    @staticmethod
    def if_suited(model, *args):
        """One, or None: not on this device, not with so many rows, or, which is said once, not this model."""
        kind = next(model.parameters()).device.type
        if kind in ReplayingDecoder.DEVICES and ReplayingDecoder.known.get(model) != "unsuited":
            try:
                return ReplayingDecoder(model, *args)
            except torch.OutOfMemoryError:
                reason = "no memory for all rows at full length (a lower --rollout_batch_size needs less)"
            except Exception as error:
                reason, ReplayingDecoder.known[model] = reason_of(error), "unsuited"
            say(f"sampling without replaying kernels, which is slower: {reason}")

    def spread(self):
        """Takes over what was read. ValueError, or the model's own error, where it cannot."""
        layers, self.config = self.cache.layers, self.model.config.get_text_config()
        kind, names = self.config._attn_implementation, set(getattr(self.config, "layer_types", None) or ())
        require({type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
                and names <= {"full_attention", "sliding_attention"},
                "the model has layers other than of full and of sliding attention")
        require(kind == "sdpa" or "flash" in kind, f"the attention is {kind}")
        self.most = -(-(self.read + self.C) // 128) * 128  # columns; kernels like round numbers
        self.windows = {"sliding_attention" if layer.is_sliding else "full_attention":
                        layer.sliding_window if layer.is_sliding else self.most for layer in layers}
        self.columns = torch.arange(self.most, device=self.rows.device)
        # the last token's column in all rows, and how many columns a step reads: what the layers share
        self.at = SimpleNamespace(place=self.columns[self.read - 1:self.read].clone(), width=0)
        prompts, self.cache = self.cache, Cache(layers=[
            Buffers(layer, self.at, self.G, self.read, self.most) for layer in layers])
        self.seen = F.pad(self.mask.bool(), (0, self.most - self.read))
        self.tokens, self.graphs, self.pool = torch.zeros_like(self.position), {}, None
        if self.model not in self.known:
            self.check(prompts)

    def check(self, prompts):
        """ValueError unless the token after the likeliest one has the probabilities that it has without all
        this, for up to four prompts. Changes nothing: the next step writes where this one has written."""
        few = slice(0, 4 * self.G, self.G)
        tokens, mask = self.logits.argmax(-1), F.pad(self.mask[few], (0, 1), value=1)
        prompts.batch_select_indices(torch.arange(len(mask), device=mask.device))
        want = self.model(input_ids=tokens[few, None], attention_mask=mask, past_key_values=prompts,
                          position_ids=self.position[few] + 1, use_cache=True).logits[:, -1]
        self.put(tokens)
        got = self.forward(len(tokens))[few]
        waits = self.look_for_waits()
        self.at.place -= 1
        self.position -= 1
        apart = (got.float().softmax(-1) - want.float().softmax(-1)).abs().sum(-1).max() / 2
        require(apart < 0.1, f"its probabilities would be off by {apart:.2f}")
        self.known[self.model] = "replay"
        if waits:
            self.launch_from_now_on(waits)

    def look_for_waits(self):
        """Repeats a step -> its error where it asks the GPU for a value: recording it would break CUDA."""
        mode = torch.cuda.set_sync_debug_mode if self.rows.is_cuda else str
        mode("error")
        try:
            self.forward(len(self.rows))
        except RuntimeError as error:
            return error
        finally:
            mode("default")

    def launch_from_now_on(self, error):
        self.known[self.model] = "launch"
        say(f"sampling each step launches its kernels, which is slower: {reason_of(error)}")

    def put(self, tokens):
        """Puts tokens (rows,) where `forward` reads them."""
        self.tokens[:len(tokens), 0] = tokens
        self.at.place += 1
        self.position += 1
        self.seen.index_fill_(1, self.at.place, True)
        self.at.width = min(self.most, -(-(self.read + self.steps + 1) // self.WIDTH) * self.WIDTH)

    def forward(self, rows):
        """-> logits (rows, V): the same kernels on the same memory, for as many rows and the same width."""
        masks, dtype, width = {}, self.cache.layers[0].keys.dtype, self.at.width
        for name, window in self.windows.items():
            near = self.seen[:rows, :width] & (self.columns[:width] > self.at.place - window)
            far = torch.full(near.shape, torch.finfo(dtype).min, dtype=dtype, device=near.device)
            masks[name] = far.masked_fill(near, 0)[:, None, None]
        kind, self.config._attn_implementation = self.config._attn_implementation, "in groups"
        try:
            return self.model(input_ids=self.tokens[:rows], position_ids=self.position[:rows],
                              attention_mask=masks if len(masks) > 1 else masks[name],
                              past_key_values=self.cache, use_cache=True).logits[:, -1]
        finally:
            self.config._attn_implementation = kind

    def step(self, tokens, ends):
        """As Decoder.step, but it looks every LOOK tokens, and rows that have ended may stay."""
        self.count(tokens, ends)
        if self.steps == self.C:
            return False
        if self.steps % self.LOOK == 0:
            going = self.going[self.rows]
            left = int(going.sum())
            if left == 0:
                return False
            rows = max(self.LEAST, 1 << (left - 1).bit_length())
            if rows < len(tokens):
                kept = going.int().argsort(descending=True, stable=True)[:rows]
                tokens, self.rows = tokens[kept], self.rows[kept]
                of_layers = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
                for x in (*of_layers, self.position, self.seen):
                    x[:rows] = x[kept]
        self.put(tokens)
        key = len(tokens), self.at.width
        if key in self.graphs:
            graph, self.logits = self.graphs[key]
            graph.replay()
        else:
            self.logits = self.forward(len(tokens))
            if self.logits.is_cuda and self.known[self.model] == "replay":
                self.record(key)
        return True

    def record(self, key):
        """Records the launches of the steps that will come. Where that fails, each of them launches."""
        stream = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                logits = self.forward(key[0])
            self.graphs, self.pool = {key: (graph, logits)}, graph.pool()  # no earlier key comes again
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            self.launch_from_now_on(error)


class Buffers(DynamicLayer):
    """A layer's keys and values, (rows, heads, columns, size), in memory that stays where it is."""

    def __init__(self, layer, at, num_generations, read, most):
        super().__init__()
        self.is_initialized, self.at = True, at
        for name in ("keys", "values"):
            x = getattr(layer, name)  # of a sliding window the last columns alone
            kind = x.device.type  # attention would round all columns to autocast's type, for every token
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            buffer = x.new_zeros(len(x) * num_generations, x.shape[1], most, x.shape[3], dtype=dtype)
            buffer[:, :, read - x.shape[2]:read] = x.repeat_interleave(num_generations, 0)
            setattr(self, name, buffer)

    def update(self, keys, values, *args, **kwargs):
        """Writes a column of the first rows -> (rows, heads, width, size) of keys and of values."""
        found = []
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer = buffer[:len(new)]
            buffer.index_copy_(2, self.at.place, new.to(buffer.dtype))
            found.append(buffer[:, :, :self.at.width])
        return found


def attend_in_groups(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of one token a row, for transformers. The heads that share a key are its queries: keys and
    values are read once and repeated nowhere. ValueError if a model asks for more."""
    more = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    require(not more and query.shape[2] == 1, f"attention with {', '.join(more) or 'several queries'}")
    query = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    out = F.scaled_dot_product_attention(query.to(key.dtype), key, value, attention_mask, scale=scaling)
    return out.reshape(len(query), 1, -1, value.shape[-1]), None


AttentionInterface.register("in groups", attend_in_groups)


@torch.no_grad()
def complete_greedily(model, prompts, stop_ids, max_completion_length):
    """N prompts, lists of ids -> N lists of the most likely ids, with the stop token that ends one. Where
    nothing is replayed, by generate(), which knows the caches of all models; nothing is inherited from their
    generation configs."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    device, room = next(model.parameters()).device, max_positions(model) - max(map(len, prompts))
    limit = max(1, min(max_completion_length, room))
    decoder = ReplayingDecoder.if_suited(model, prompts, 1, limit)
    if decoder:
        stops = torch.tensor(stop_ids, device=device)
        out = torch.zeros(len(prompts), limit, dtype=torch.long, device=device)
        for t in range(limit):
            rows, tokens = decoder.rows, decoder.logits.argmax(-1)
            out[rows, t] = tokens
            if not decoder.step(tokens, torch.isin(tokens, stops)):
                break
        return [row[:n] for row, n in zip(out.tolist(), decoder.lengths.tolist())]
    ids = pad(prompts, 0, side="left").to(device)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, side="left").to(device)
    shipped, causal.generation_config = causal.generation_config, transformers.GenerationConfig()
    try:
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, use_cache=True,
                             max_new_tokens=limit, eos_token_id=stop_ids, pad_token_id=0,
                             synced_gpus=False)  # processes differ in length
    finally:
        causal.generation_config = shipped
    completions = out[:, ids.shape[1]:].tolist()
    ends = [next((t + 1 for t, i in enumerate(c) if i in stop_ids), len(c)) for c in completions]
    return [completion[:end] for completion, end in zip(completions, ends)]


def answer_greedily(run, model, rows):
    """Greedy answers to the rows' prompt_ids against their answers -> (share that is right, table rows); the
    share is None without rows, and over all processes."""
    args, tokenizer, table = run.args, run.tokenizer, []
    stop_ids = stop_token_ids(tokenizer, model.generation_config)
    lengths, right = [len(r["prompt_ids"]) + args.max_completion_length for r in rows], 0
    for places in cut(lengths, args.micro_batch_tokens, *run.place):
        prompts = [rows[i]["prompt_ids"] for i in places]
        still(f"answering {len(table)} of {len(rows)} prompts")
        with run.accelerator.autocast():
            completions = prompts and complete_greedily(model, prompts, stop_ids, args.max_completion_length)
        for i, completion in zip(places, completions):
            text, answer = tokenizer.decode([t for t in completion if t not in stop_ids]), rows[i]["answer"]
            hit = is_right(text, completion[-1] not in stop_ids, answer)
            right += hit
            table.append({"prompt": rows[i]["prompt"], "completion": text, "answer": answer,
                          "right": str(hit)})
    right = run.accelerator.reduce(torch.tensor(float(right), device=run.device), "sum").item()
    return right / len(rows) if rows else None, table[:3]


# ---- sampling beside training ------------------------------------------------------------------------------

def pack_rollout(drawn, train):
    """A rollout (sampled groups, those to train on, figures) as bytes; train has its prompts."""
    places = {prompt["place"]: i for i, prompt in enumerate(train)}  # gathered prompts are copies
    rows = {id(row): row | {"prompt": places[row["prompt"]["place"]]} for row in flat(drawn[0])}
    groups = [[[rows[id(row)] for row in group] for group in part] for part in drawn[:2]]
    file = io.BytesIO()
    torch.save((*groups, drawn[2]), file)
    return file.getvalue()


def unpack_rollout(data, train):
    """The rollout that pack_rollout() made bytes of."""
    drawn = torch.load(io.BytesIO(data), weights_only=True)
    for row in flat(drawn[0]):
        row["prompt"] = train[row["prompt"]]
    return drawn


class Sampler:
    """Gives a run its rollouts. With --rollout_lag 1 a process of its own makes them, the next one while this
    process updates; with --sampler_device none this one does, before the update. Both give the same."""
    SILENT = 60  # seconds beyond --reward_timeout for which the process may do nothing

    def __init__(self, prepare, draw, run, model, train, updates):
        """draw() -> the rollout of run.step; prepare(run, train) -> (model, draw) in the other process, which
        must be able to import it. UserError if that process cannot be; it is started when it is needed."""
        args, self.run, self.draw, self.train, self.updates = run.args, run, draw, train, updates
        self.prepare, self.process = prepare, None
        self.begun = None  # the next rollout, packed; True while it is made
        self.beside = args.rollout_lag and args.sampler_device != "none"
        if not self.beside:
            return
        require(run.place[1] == 1 and not run.accelerator.is_fsdp2, "with several processes --rollout_lag 1 "
                "needs --sampler_device none: only one process can have another that samples for it")
        following = (run.device.index or 0) + 1
        self.device = args.sampler_device or (
            f"cuda:{following}" if following < torch.cuda.device_count() else "cpu")
        with explain(f"--sampler_device {self.device}"):
            torch.empty(1, device=self.device)
        if run.device.type == "cuda" and self.device == "cpu":
            say("warning  --rollout_lag 1 samples on the CPU, which is slow: there is no other GPU")
        self.trained = [p for p in model.parameters() if p.requires_grad]  # fp32
        with explain("--rollout_lag 1 needs shared memory for all trained weights (/dev/shm); without it add "
                     "--sampler_device none"):
            self.weights = torch.empty(sum(p.numel() for p in self.trained)).share_memory_()

    def take(self, number, last):
        """-> rollout `number`; with a lag the one after it is begun, unless this is the last."""
        if not self.run.args.rollout_lag:
            return self.draw()
        if self.run.state["ahead"] is None:
            self.begin(number * self.updates)
            self.keep()
        if not last:
            self.begin((number + 1) * self.updates)
        elif self.process:
            self.process.kill()  # it has done its part
        return unpack_rollout(self.run.state["ahead"], self.train)

    def begin(self, step):
        """Begins the rollout for the updates from `step` on, with the weights of now."""
        if not self.beside:
            now, self.run.state["step"] = self.run.step, step
            self.begun, self.run.state["step"] = pack_rollout(self.draw(), self.train), now
            return
        if self.process is None:
            self.start()
        for part, p in zip(self.weights.split([p.numel() for p in self.trained]), self.trained):
            part.copy_(p.detach().flatten())
        self.begun = True
        with suppress(OSError):  # wait() says why
            self.pipe.send((step, self.run.state["draws"]))

    def start(self):
        """Starts the process. Its arguments are small: to write large ones to one that is dead never ends;
        to send them does, because the pipe's other end is closed here."""
        context = torch.multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve_rollouts, args=(
            self.prepare, self.run.args, self.device, torch.get_num_threads(), self.run.total_steps,
            self.weights, theirs))
        resource_tracker.ensure_running()  # or start() does it, and lets the signals in
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a new process begins with this mask
        self.process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        atexit.register(self.process.kill)  # or the exit would wait for it, without end
        theirs.close()
        say(f"sampler  process {self.process.pid} samples on {self.device}")
        with suppress(OSError):
            self.pipe.send([{name: value for name, value in prompt.items() if name != "demonstration"}
                            for prompt in self.train])

    def keep(self):
        """Waits for the rollout that was begun and puts it where a checkpoint keeps it."""
        self.run.state["ahead"], self.begun = self.wait() if self.begun is True else self.begun, None

    def wait(self):
        """-> the rollout of the other process, packed. UserError if that has raised one, is dead or hangs."""
        worked, since = None, time.monotonic()
        while not self.pipe.poll(1):
            still("the next rollout is not sampled yet")
            with suppress(psutil.Error):
                before, worked = worked, psutil.Process(self.process.pid).cpu_times()[:2]
                since = since if worked == before else time.monotonic()
            idle = time.monotonic() - since
            require(idle < self.run.args.reward_timeout + self.SILENT,
                    f"the process that samples (--rollout_lag 1) has done nothing for {idle:.0f} s")
        try:
            data, draws, said = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            why = ("memory ran out, most likely" if code == -signal.SIGKILL else
                   "what it printed says why (a script of your own that calls main needs "
                   "`if __name__ == '__main__':` before it)")
            raise UserError(f"the process that samples (--rollout_lag 1) ended with exit code {code}; {why}"
                            ) from None
        require(draws is not None, said)
        for warning in said:
            self.run.warn(*warning)
        self.run.state["draws"] = draws
        return data


def serve_rollouts(prepare, args, device, threads, total_steps, weights, pipe):
    """The life of a Sampler's process: loads what `prepare` does, then makes a rollout whenever it is asked.
    It ends with the process that started it, whatever ends that one."""
    for number in SIGNALS:  # the process that updates answers them, and ends this one
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which processes of rewards would inherit
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    parent = torch.multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is killed leaves behind
    device, warnings = torch.device(device), []
    run = SimpleNamespace(  # what a rollout asks of a Run
        args=args, device=device, place=(0, 1), total_steps=total_steps, state={}, together=lambda f: [f()],
        accelerator=SimpleNamespace(autocast=lambda: torch.autocast(device.type, torch.bfloat16, args.bf16)),
        warn=lambda *warning: warnings.append(warning))
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # graphs are recorded on the current one
        train = pipe.recv()
        with redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as args.output_dir:
            run.tokenizer = load_tokenizer(args)
            model, draw = prepare(run, train)
        trained = [p for p in model.parameters() if p.requires_grad]
        while True:
            run.step, run.state["draws"] = pipe.recv()
            spoken.at = math.inf  # the other process says how far things are
            warnings.clear()
            for part, p in zip(weights.split([p.numel() for p in trained]), trained, strict=True):
                p.data.copy_(part.view_as(p))
            data = pack_rollout(draw(), train)
            pipe.send((data, run.state["draws"], warnings))
    except (EOFError, BrokenPipeError):  # the other one has ended
        pass
    except UserError as error:
        pipe.send((None, None, str(error)))
    except Exception as error:
        traceback.print_exc()
        pipe.send((None, None, f"the process that samples (--rollout_lag 1) failed: {reason_of(error)}"))


# ---- the run -----------------------------------------------------------------------------------------------

class Run:
    """A run's folder and processes: checkpoints, log, Ctrl-C, cadence, warnings said once. Its .state is what
    a checkpoint keeps beside weights and moments: the step, the number of tokens, the data's fingerprints and
    what the script names; .kept are tensors that go into it too."""
    preparing = False  # before the first step: a UserError of one process is told to all

    def __init__(self, args, **state):
        check_needs(args)
        base = base_and_adapter(args.model_name_or_path)[0]
        args.load_in_4bit |= bool(four_bit_on_disk(base, trains_adapter(args)))
        self.args, self.accelerator = args, make_accelerator(args)
        Run.preparing, self.lock, self.device = True, None, self.accelerator.device
        args.micro_batch_tokens = args.micro_batch_tokens or (2048 if self.device.type == "cpu" else 8192)
        self.place = self.accelerator.process_index, self.accelerator.num_processes
        # a script's defaults that depend on LoRA or FSDP: they are printed and saved as they were used
        args.resolve(trains_adapter(args), self.accelerator.is_fsdp2)
        flags = {f"--{name}": value for name, value in asdict(args).items() if name not in OWN}
        versions = {name: sys.modules[name].__version__
                    for name in ("torch", "transformers", "tokenizers", "accelerate", "peft")}
        files = __file__, sys.modules[type(args).__module__].__file__
        code = {os.path.basename(file): fingerprint_of_file(file) for file in files}
        self.check_same({"Python": platform.python_version(), **versions, **code, **flags})

        def opened():
            self.lock = None if args.audit else lock(args.output_dir)
            return open_run(args)
        self.checkpoint = self.from_first(opened)  # until start: what to go on from, or None
        self.state = {"step": 0, "num_tokens": 0, "data": None, "held_rewards": [],
                      "unevaluated": args.eval_on_start is not False} | state
        args.date = gather_object([args.date or time.strftime("%Y-%m-%d")])[0]  # midnight may be near
        if self.checkpoint:
            with explain("the checkpoint is of another version, which has to finish this run; it lacks",
                         KeyError):
                self.state = {name: self.checkpoint[name] for name in self.state}
        self.tokenizer = load_tokenizer(args)
        self.kept, self.warned, self.last, self.total_steps, self.audit_step = {}, set(), self.step, 0, None
        self.flat_rollouts, self.evaluating, self.doing = 0, False, ""
        self.signal, self.stop = 0, False  # what reached this process; what all agreed on in Sums.reduce
        self.writes = self.accelerator.is_main_process and not args.audit  # an audit writes nothing here
        self.track = args.log_with and not args.audit
        self.samples_file = os.path.join(args.output_dir, "samples.jsonl")

    @property
    def step(self):
        """Updates made so far."""
        return self.state["step"]

    def check_same(self, mine):
        """UserError, on all processes, unless what each sees, {name: value}, is the same on all."""
        first, *others = self.together(lambda: mine)
        for number, theirs in enumerate(others, 1):
            for name, value in theirs.items():
                require(value == first.get(name), f"process {number} differs from process 0 in {name}, "
                        f"{value} and not {first.get(name)}: give every process, on every machine, the same")

    def check_data(self, rows, held=(), rewards=None):
        """Keeps fingerprints of all that the result depends on; UserError naming those that differ from the
        checkpoint's, or between processes. The first row is the example that --merge is tried on."""
        self.example = rows[0].get("input_ids", rows[0].get("prompt_ids"))
        template = str(self.tokenizer.chat_template).encode()
        found = {"training data": fingerprint(rows), "evaluation data": fingerprint(held),
                 "chat template": hashlib.sha256(template).hexdigest()[:16]}
        paths = [self.args.model_name_or_path, getattr(self.args, "value_model", None),
                 *(reward.path for reward in (rewards or {}).values())]
        for path in filter(None, paths):
            inside = base_and_adapter(path) if os.path.isdir(path) else (path, None)
            found |= {f"files of {name}": fingerprint_of_file(name) for name in inside if name}
        self.check_same(found)
        then = self.state["data"] or found
        other = [name for name in found | then if then.get(name) != found.get(name)]
        require(not other, f"the checkpoint was written with other {', other '.join(other)}: "
                "give the same, or a new --output_dir")
        self.state["data"] = found

    def prepare(self, module, optimizer):
        """accelerate's prepare -> (wrapped module, optimizer); what is saved is `module`. Under FSDP2 the
        forward runs under autocast, as accelerate does elsewhere: FSDP's own bf16 would round what comes out.
        One forward is made at once, which FSDP needs before `unsharded`."""
        sharded = self.accelerator.is_fsdp2
        if sharded:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.module = module
        module, self.optimizer = self.accelerator.prepare(module, optimizer)
        if sharded:
            module.forward = self.accelerator.autocast()(module.forward)
            nothing = torch.zeros(1, 2, dtype=torch.long, device=self.device)
            with torch.no_grad():
                module(nothing, nothing)
        return module, self.optimizer

    def start(self, total_steps, what):
        """Now the folder is the run's: restores the checkpoint, or removes what an earlier run left."""
        args, self.total_steps = self.args, total_steps
        if args.audit:
            self.audit_step = args.audit_step or self.step + 1
            require(self.step < self.audit_step <= total_steps,
                    f"--audit: there is no step {self.audit_step}, since this command starts after step "
                    f"{self.step} and ends with step {total_steps}; see --audit_step")
        afresh = not self.checkpoint or self.checkpoint["elsewhere"]
        if self.checkpoint:
            check_cut(self.module, self.checkpoint, args)
            with explain("the checkpoint cannot be restored"):
                restore(self.module, self.optimizer, self.checkpoint)
            self.checkpoint = None
        self.together(partial(self.write_first, afresh))
        Run.preparing = False
        if self.step == total_steps > 0:
            say(f"resume   the run is complete at step {total_steps}: only the model is saved again")
        if total_steps:
            say_memory(self.module, args, self.device)
        if 0 < args.max_steps < total_steps:
            say(f"flags    --max_steps {args.max_steps} ends inside a rollout: {total_steps} steps are made")
        self.state["unevaluated"] |= total_steps == 0  # then there is nothing else to do
        self.bar = tqdm(total=total_steps, initial=self.step, unit="step", dynamic_ncols=True,
                        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
                        disable=not (self.writes and sys.stderr.isatty()))
        self.begun, self.first, self.tokens, self.doing = time.time(), self.step, 0, ""
        self.catch_signals()
        say(f"train    {what}; learning rate {args.learning_rate:g} ({args.lr_scheduler_type}), "
            f"{self.place[1]} process(es) on {self.device}")

    def write_first(self, afresh):
        """The first process removes what an earlier run left, or cuts its logs back, and writes args.json."""
        folder, args = self.args.output_dir, self.args
        with explain(f"cannot write to {folder}", OSError):
            for path in (os.path.join(folder, name) for name in OUTPUTS if self.writes):
                if afresh:
                    shutil.rmtree(path, ignore_errors=True)
                    with suppress(FileNotFoundError):
                        os.remove(path)
                elif path.endswith(".jsonl"):
                    cut_back(path, self.step)
                elif path.endswith("checkpoints"):  # this run makes the later ones again
                    for later in steps_in(path):
                        if later > os.path.join(path, f"step-{self.step:08d}"):
                            shutil.rmtree(later)
            if self.writes:
                with open(os.path.join(folder, "args.json"), "w", encoding="utf-8") as file:
                    json.dump(asdict(args) | dict.fromkeys(OWN - {"output_dir"}), file, indent=1)
        if self.track:
            with explain(f"--log_with {args.log_with}"):
                redone = {"tensorboard": {"purge_step": self.step + 1}}  # else both attempts would show
                self.accelerator.init_trackers(os.path.basename(os.path.abspath(folder)), init_kwargs=redone)

    def catch_signals(self):
        """Ctrl-C and SIGTERM are noted: the loop saves a checkpoint and stops. They cut an evaluation, but in
        several processes, which would wait for one another. A second one ends at once."""
        def note(number, frame):
            self.signal, cut = number, self.evaluating and self.place[1] == 1
            what = "without this evaluation" if cut else "after this step (ppo, grpo: this rollout)"
            say(f"stopping {what}, with a checkpoint (once more: at once)", file=sys.stderr)
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            if cut:
                raise KeyboardInterrupt
        for number in SIGNALS:
            signal.signal(number, note)

    def micro_batches(self, groups, fields=(), module=None, micro_batch_tokens=None):
        """The rows of one step as padded micro-batches (pad_rows), longest first. `groups` are rows, or lists
        of rows that stay together, as pairs do: then all chosen rows come first. The gradients of `module`,
        where one is trained, are synchronised in the last alone. A micro-batch has .rows, .places (of its
        groups in the step) and .last too. Every process gets equally many: a missing one has no rows, and
        tensors of rows whose mask and fields are 0."""
        groups = [group if isinstance(group, list) else [group] for group in groups]
        lengths = [len(group) * max(len(row["input_ids"]) for row in group) for group in groups]
        batches = cut(lengths, micro_batch_tokens or self.args.micro_batch_tokens, *self.place)
        nothing = [[{"input_ids": [0, 0], "mask": [0, 0]}] * (len(groups[0]) if groups else 1)]
        for number, places in enumerate(batches):
            still(f"{self.doing or f'step {self.step + 1}'}: micro-batch {number + 1} of {len(batches)}")
            sides = zip(*([groups[i] for i in places] or nothing))
            rows = [row for side in sides for row in side]
            mb = pad_rows(rows, fields, self.device)
            mb.rows, mb.places, mb.last = rows if places else [], places, number == len(batches) - 1
            with nullcontext() if mb.last or module is None else self.accelerator.no_sync(module):
                yield mb

    @torch.no_grad()
    def over_rows(self, groups, of, fields=(), micro_batch_tokens=None):
        """of(mb), tensors with B first, for micro-batches of all groups and without gradients -> a list of
        tuples, one a group, in order, on the CPU, the same on every process."""
        mine = []
        for mb in self.micro_batches(groups, fields, None, micro_batch_tokens):
            with self.accelerator.autocast():
                outputs = of(mb)
            mine += zip(mb.places, zip(*([row.clone() for row in x.cpu()] for x in outputs)))
        return [outputs for _, outputs in sorted(gather_object(mine), key=lambda pair: pair[0])]

    def together(self, function):
        """function() on every process -> the list of its results. A UserError on one is raised on all: the
        others would wait for it for ever."""
        try:
            mine = function()
        except UserError as error:
            mine = error
        results = gather_object([mine])
        for number, result in enumerate(results):
            if isinstance(result, UserError):
                Run.preparing = False  # all know
                raise UserError(f"process {number}: {result}") if number else result
        return results

    def from_first(self, read):
        """What read() returns on the first process, for all. Of a checkpoint's weights and moments the others
        get an outline on the device "meta": restore sends them one by one."""
        own = None

        def outline():
            nonlocal own
            own = read() if self.accelerator.is_main_process else None
            if not isinstance(own, dict):
                return own
            tensors = {"weights": own["weights"], "optimizer": own["optimizer"]}
            return own | recursively_apply(lambda x: x.to("meta"), tensors)
        theirs = self.together(outline)[0]
        return own if self.accelerator.is_main_process else theirs

    def load_best(self):
        """checkpoints/best, as from_first gives it."""
        folder = os.path.join(self.args.output_dir, "checkpoints", "best")
        return self.from_first(lambda: explain(f"{folder} cannot be read")(load_checkpoint)(folder))

    def annotate(self, rows, module, names, temperature):
        """Gives rows what module(input_ids, mask, temperature) returns, cut to (T,), under these names."""
        self.doing = "log-probs of the rollout"
        outputs = self.over_rows(rows, lambda mb: module(mb.input_ids, mb.mask, temperature))
        self.doing = ""
        for row, values in zip(rows, outputs):
            row |= {name: x[:len(row["input_ids"])] for name, x in zip(names, values)}

    def write(self, name, record):
        """One line of metrics.jsonl or samples.jsonl."""
        if self.writes:
            path = os.path.join(self.args.output_dir, name)
            with (explain(f"cannot write to {path} (the checkpoints are whole)", OSError),
                  open(path, "a", encoding="utf-8") as file):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def samples(self, kind, rows):
        """rows {column: value} to samples.jsonl, of this step (evaluation) or the next one (rollout)."""
        for row in rows:
            self.write("samples.jsonl", {"step": self.step + (kind == "rollout"), "kind": kind, **row})

    def log(self, metrics):
        """Metrics of this step to metrics.jsonl and the tracker."""
        self.write("metrics.jsonl", {"step": self.step, **metrics})
        evaluation = any(name.startswith("eval/") for name in metrics)
        if self.track and (evaluation or self.step % self.args.logging_steps == 0):
            self.accelerator.log(metrics, step=self.step)

    def report(self, evaluate, keep=False):
        """Calls evaluate() -> (metrics, table), logs and prints them, the first rows of the table alone, and
        returns the metrics; keep: all rows go to samples.jsonl. A signal cuts evaluate(): the run stops here,
        and evaluates before anything else when it goes on. Its seconds count for no step."""
        begun, self.doing, self.evaluating, self.state["unevaluated"] = time.time(), "evaluation", True, True
        try:
            metrics, table = evaluate()
        except KeyboardInterrupt:
            self.stop = True
            self.save_or_leave()
        self.doing, self.evaluating, self.state["unevaluated"] = "", False, False
        self.log(metrics)
        require(math.isfinite(metrics.get("eval/loss", 0.0)), f"step {self.step}: the loss of the evaluation "
                "is not finite: the model is broken, and is not saved. Try a lower --learning_rate")
        self.samples("evaluation", table if keep else ())
        if "eval/reward" in metrics:
            self.state["held_rewards"] = [*self.state["held_rewards"][-1:], metrics["eval/reward"]]
        figures = (f"{name.removeprefix('eval/')} {value:.4f}" for name, value in metrics.items())
        say(f"eval     step {self.step}: " + "  ".join(figures))
        show_table(list(table)[:3])
        self.begun += time.time() - begun
        return metrics

    def done(self, metrics, tokens, shown):
        """An update of so many tokens is made: logs its metrics and prints those that are `shown`."""
        self.state["step"], self.state["num_tokens"] = self.step + 1, self.state["num_tokens"] + tokens
        self.log(metrics | {"num_tokens": self.state["num_tokens"]})
        self.tokens += tokens
        seconds = max(time.time() - self.begun, 1e-9)
        figures = "  ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)
        figures += f"  {self.tokens / seconds:,.0f} tok/s"
        made = self.step - self.first
        if made > 1 and self.step < self.total_steps:  # the first one is slower
            left = seconds / made * (self.total_steps - self.step)
            figures += f"  {timedelta(seconds=round(left))} left"
        self.bar.set_postfix_str(figures, refresh=False)
        self.bar.update(1)
        shows = self.step % self.args.logging_steps == 0 or self.step == self.total_steps or silent()
        if self.bar.disable and shows:
            say(f"step {self.step}/{self.total_steps}  {figures}")

    def check_finite(self, loss, grad_norm, rows, remedy="Try a lower --learning_rate"):
        """UserError unless both are finite: before the update, so that no checkpoint is spoilt; a gradient of
        0 is said. `rows` (dicts with a place) are what the step is made of."""
        places = list(dict.fromkeys(row["place"] for row in rows))
        named = ", ".join(places[:8]) + ", ..." * (len(places) > 8)
        require(math.isfinite(loss) and math.isfinite(grad_norm),
                f"step {self.step + 1}: the loss is {loss} and its gradient's norm {grad_norm}, on {named}; "
                f"this update was not made, and checkpoints, if any, are whole. {remedy}")
        self.warn("gradient", grad_norm == 0 and loss != 0, f"the gradient of step {self.step + 1} is 0: "
                  f"nothing is learned. {remedy}")

    def check_first_update(self, metrics):
        """What must hold before a rollout's first update. UserError where the policy does not start at its
        reference; a warning where what the sampler and the trainer say of a token differs."""
        difference, kl = metrics.get("sampling/logprob_difference"), metrics.get("kl")
        if difference is None or self.step and getattr(self.args, "rollout_lag", 0):
            return  # no token is trained, or what sampled it is an earlier policy
        most = metrics["sampling/logprob_difference/max"]
        differ = f"{difference:.1g} on average and {most:.1g} at most"
        self.warn("sampler", difference > (0.1 if self.args.bf16 else 1e-3), f"sampler and trainer differ by "
                  f"{differ} in a token's log-prob: what is learned is not what was sampled")
        if self.step == 0:
            require(abs(kl or 0.0) < (0.05 if self.args.bf16 else 1e-4),
                    f"the policy starts {kl or 0:.2g} nats a token from its reference, not at it: "
                    "try --bf16 False or --attn_implementation eager")
            start = "" if kl is None else f", kl {kl:.1g}"
            # seen of SmolLM2-135M: 0.027 and 0.12 over 189 tokens
            usual = " (usual in bf16: 0.03 and 0.1)" if self.args.bf16 else ""
            say(f"check    first update: sampler and trainer differ by {differ} in a log-prob"
                f"{usual}, ratio is 1 to within {metrics['ratio/deviation']:.1g}{start}")
            greedy, reward = (self.state["held_rewards"] or [math.nan])[-1], metrics["reward"]
            self.warn("temperature", greedy - reward > abs(greedy) / 3,
                      f"samples score {reward:.3g} where greedy answers score {greedy:.3g} (entropy "
                      f"{metrics['entropy']:.2g} nats a token): a lower --temperature samples nearer to them")

    def warn(self, name, sign, sentence):
        """Says the sentence when the sign is seen, and again only after it was gone."""
        if sign and name not in self.warned:
            say(f"warning  {sentence}")
        self.warned = self.warned | {name} if sign else self.warned - {name}

    def warn_of_kl(self, kl, remedy):
        """Warns where the policy is further than --kl_warn from its reference, in nats a completion."""
        self.warn("kl", kl > self.args.kl_warn, f"the policy is {kl:.3g} nats a completion from its "
                  f"reference (--kl_warn {self.args.kl_warn:g}): {remedy}")

    def watch_loss(self, loss, advice=""):
        """Warns when the evaluation loss, kept in state["eval_losses"], has risen three times in a row."""
        losses = self.state["eval_losses"] = [*self.state["eval_losses"][-3:], loss]
        self.warn("eval loss", len(losses) == 4 and losses == sorted(set(losses)),
                  f"the evaluation loss has risen three times in a row, from {losses[0]:.4f}: the model "
                  f"overfits. Take {advice}fewer epochs or a lower --learning_rate")

    def due(self, every):
        """Whether a multiple of `every`, or the end, lies among the steps since save_or_leave was called."""
        return self.step // every > self.last // every or self.step == self.total_steps

    def save(self, name=None):
        """Writes checkpoints/step-N (or checkpoints/<name>); then removes the oldest beyond save_total_limit.
        Every process calls it; the first one writes. UserError if a weight is not finite."""
        if self.args.audit:
            return
        folder = os.path.join(self.args.output_dir, "checkpoints")
        weights = {name: whole(p) for name, p in self.module.named_parameters() if p.requires_grad}
        state = {**self.state, "weights": weights, "kept": self.kept, "args": asdict(self.args),
                 "optimizer": recursively_apply(whole, self.optimizer.state_dict()["state"])}
        finite = []
        recursively_apply(lambda x: finite.append(x.sum().isfinite()), [weights, state["optimizer"]])
        require(all(finite), f"step {self.step}: the weights are no longer finite and are not saved; the "
                "checkpoints are whole. Try a lower --learning_rate")
        if self.accelerator.is_main_process:
            with written_whole(os.path.join(folder, name or f"step-{self.step:08d}")) as unfinished:
                torch.save(state, os.path.join(unfinished, "state.pt"))
            for old in steps_in(folder)[:-self.args.save_total_limit]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def save_or_leave(self):
        """The end of a step (ppo, grpo: of a rollout), the only place where a run can be cut."""
        if self.place[1] == 1:  # a signal since Sums.reduce, by which several processes agree
            self.stop |= self.signal > 0 and self.step < self.total_steps
        if self.due(self.args.save_steps) or self.stop:
            self.save()
        if self.stop:
            then = (", before the page was written" if self.args.audit else
                    "; to go on: the same command with --resume_from_checkpoint latest")
            say(f"stopped at step {self.step}{then}", file=sys.stderr)
            sys.exit(128 + (self.signal or signal.SIGTERM))
        self.last = self.step

    def finish(self, model, value=None):
        """Writes model/ (merged/ with --merge, ppo's value/) if anything was trained; closes the log."""
        self.bar.close()
        if self.total_steps:
            finish(self.args, self.accelerator, model, self.tokenizer)
            if value:
                save_value(self, *value)
            if self.args.merge and self.accelerator.is_main_process:
                merge_adapter(self, model)
            self.accelerator.wait_for_everyone()
        if self.track:  # last: it takes the processes apart
            self.accelerator.end_training()
        if self.lock:
            os.close(self.lock)


def cut_back(path, step):
    """Keeps the lines up to `step`: what a killed run wrote after its last checkpoint is written again."""
    if not os.path.exists(path):
        return
    with (open(path, encoding="utf-8") as file, open(path + ".tmp", "w", encoding="utf-8") as kept,
          suppress(ValueError, TypeError, KeyError)):  # half a line: the run was killed while writing it
        for line in file:
            if json.loads(line)["step"] > step:
                break
            kept.write(line)
    os.replace(path + ".tmp", path)


class Sums:
    """What a step adds up over its micro-batches. One add() feeds metrics and page: they cannot differ."""

    def __init__(self, run):
        self.run, self.named, self.shown, self.page = run, {}, {}, []
        self.due = run.audit_step == run.step + 1

    def add(self, mb, parts, shown=None, mask=None, page=None):
        """One micro-batch. parts {name: tensor of any shape} are summed; "loss" (B, T): what each token adds
        to the step's loss. shown {name: (B, T)}: averaged over the tokens of mask (B, T), else of mb.mask; of
        a difference the largest is kept too, as name/max.
        The page shows these and what is in mb; or, where a loss is no sum over tokens, `page()` -> {"share",
        "mask": (B, T), "columns": {name: (B, T) or (B, 1)}, "constants": (B,), a row's share at no token}."""
        mask, shown = mb.mask if mask is None else mask, shown or {}
        shown = shown | {f"{name}/max": x for name, x in shown.items() if name.endswith("_difference")}
        means = {"trained_tokens": mask, **shown} if shown else {}
        for name, x in means.items():
            parts = parts | {name: torch.where(mask.bool(), x, 0.0)}
        for name, x in parts.items():
            x, before = x.detach().double(), self.named.get(name, 0.0)
            self.named[name] = x.max().clamp(min=before) if name.endswith("/max") else before + x.sum()
        self.shown |= shown
        if self.due:
            columns = {name: x for name, x in shown.items() if re.match("clip_ratio/|[^/]+$", name)}
            own = {"share": parts["loss"], "mask": mb.mask, "columns": vars(mb) | columns}
            self.page += page_rows(mb, **(page() if page else own))

    def reduce(self):
        """-> {name: sum, or mean over the trained tokens}, of all processes; no means without such tokens."""
        run = self.run
        stop = torch.tensor(float(run.signal), dtype=torch.float64, device=run.device)
        everybody = run.accelerator.gather(torch.stack([*self.named.values(), stop])[None])  # (processes, N)
        *values, stop = everybody.sum(0).tolist()
        # a signal may have reached one process alone; an evaluation after the last step stops nothing
        run.stop = run.stop or (stop > 0 and run.step < run.total_steps)
        total = dict(zip(self.named, values))
        largest = dict(zip(self.named, everybody.amax(0).tolist()))
        tokens = total.get("trained_tokens")
        for name in self.shown:
            total[name] = largest[name] if name.endswith("/max") else total[name] / max(tokens, 1)
            if not tokens:
                del total[name]
        return total | ({"trained_tokens": int(tokens)} if self.shown else {})

    def write_page(self, loss, about):
        """Whether this step is the audited one; then its page is written, and nothing is to be learned."""
        if self.due:
            write_page(self.run, gather_object(self.page), loss, about)
        return self.due


# ---- the audit page ----------------------------------------------------------------------------------------

PAGE_ROWS = 64  # rows that are shown in full; of the others the sum is stated
HEADINGS = {"logprobs": "log-prob", "old_logprobs": "old log-prob", "ref_logprobs": "ref. log-prob",
            "sampled_logprobs": "sampled log-prob", "nll_weight": "NLL weight", "token_rewards": "reward",
            "values": "old value", "new_values": "value", "returns": "return", "advantages": "advantage"}

AUDIT_PAGE = string.Template(r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$name, step $step</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"><style>
:root { color-scheme: light dark; --ink: #15181d; --dim: #5d6673; --page: #fff; --card: #f6f7f9;
  --line: #d5dae1; --up: 213 94 0; --down: 0 114 178 }
@media (prefers-color-scheme: dark) { :root { --ink: #eceff3; --dim: #9aa5b4; --page: #14171b;
  --card: #1d2127; --line: #39414c; --up: 240 120 30; --down: 60 150 225 } }
body { margin: 0 auto; padding: 1.5rem 1rem 12rem; max-width: 62rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: .95rem; margin: 0 0 .4rem }
h2 small, .dim, summary, pre, dt { color: var(--dim); font-weight: 400; font-size: .85rem }
pre, .tokens, td, dd, .key { font-family: ui-monospace, "DejaVu Sans Mono", monospace }
pre, .tokens, dd { white-space: pre-wrap; overflow-wrap: anywhere }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  margin: 1rem 0 }
.tokens, .key { margin: 0; line-height: 1.95; font-size: .92rem }
p.key span { padding: 0 .5em; margin-right: .8em; white-space: nowrap }
.tokens span { color: var(--dim); cursor: default; padding: .1em 0 } [data-m]:before { content: attr(data-m) }
span.t { color: var(--ink); border-bottom: 2px dotted var(--dim); border-radius: 3px; margin-right: 1px }
span.up { background: rgb(var(--up) / calc(var(--s) * .7)); border-bottom: 2px solid rgb(var(--up)) }
span.dn { background: rgb(var(--down) / calc(var(--s) * .7)); border-bottom: 2px dashed rgb(var(--down)) }
span.on, :focus-visible { outline: 3px solid var(--ink); outline-offset: 1px }
summary { cursor: pointer; margin-top: .5rem } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .8rem }
th, td { padding: .1rem .7rem; text-align: right; white-space: pre; border-bottom: 1px solid var(--line) }
#panel { position: fixed; left: 0; right: 0; bottom: 0; padding: .6rem 1rem; background: var(--page);
  border-top: 2px solid var(--ink); max-height: 45vh; overflow: auto }
dl { margin: 0 auto; max-width: 62rem; display: grid; gap: .3rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)) } dd { margin: 0 }
</style></head><body>
<h1>$name, step $step: loss <span id="loss">$loss</span></h1><pre>$formula</pre><p>$about</p>
<p class="key"><span class="t up" style="--s:1">raises the loss</span>
<span class="t dn" style="--s:1">lowers it</span>
<span class="t">trained, no share</span><span class="dim">not trained</span>
$clipped</p>
<p class="dim">The colour grows with the square root of a share. Figures: hover, tap, or Tab to a row and the
arrow keys.</p><details><summary>all arguments</summary><pre>$arguments</pre></details>
$rows<aside id="panel" role="status" hidden></aside><script>
const panel = document.getElementById('panel'), every = [...document.querySelectorAll('.tokens')];
const token = e => e.target.closest && e.target.closest('.tokens span');
function show(t) {
  document.querySelectorAll('.on').forEach(x => x.classList.remove('on'));
  t.classList.add('on');
  const [head, ...rows] = t.closest('article').querySelector('table').rows;
  const cells = rows[[...t.parentNode.children].indexOf(t)].cells;
  panel.innerHTML = '<dl>' + [...head.cells].map((name, k) =>
    '<div><dt>' + name.innerHTML + '<dd>' + (cells[k].innerHTML.trim() || '–') + '</div>').join('') + '</dl>';
  panel.hidden = false;
}
every.forEach(row => [...row.children].forEach((t, i) => t.tabIndex = i ? -1 : 0));
for (const kind of ['pointerover', 'focusin', 'click'])
  addEventListener(kind, e => token(e) && show(token(e)));
addEventListener('keydown', e => {
  if (e.key === 'Escape') panel.hidden = true;
  if (!token(e)) return;
  const row = token(e).parentNode, at = every.indexOf(row), first = row => row && row.firstElementChild;
  const to = { ArrowRight: token(e).nextElementSibling, ArrowLeft: token(e).previousElementSibling,
    ArrowDown: first(every[at + 1]), ArrowUp: first(every[at - 1]), Home: first(row),
    End: row.lastElementChild }[e.key];
  if (to) { e.preventDefault(); to.focus(); to.scrollIntoView({ block: 'center' }); }
});
</script></body></html>
""")


def token_texts(tokenizer, ids):
    """Each token's own text; joined they are the whole. A character whose bytes are spread over several
    tokens belongs to the last of them; the others are empty."""
    texts, before, start = [], 0, 0  # decoded with what comes before: alone, a token may lose its space
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[before:end])[len(tokenizer.decode(ids[before:start])):]
        half = text.endswith("\ufffd") and end - start < 4 and end < len(ids)
        texts.append("" if half else text)
        if not half:
            before, start = start, end
    return texts


def page_rows(mb, share, mask, columns, constants=None):
    """What the page needs of a micro-batch's rows -> [(number, note, ids, constant, {heading: (T,)})], with
    share (B, T): what a token adds to the step's loss; columns {name: (B, T) or (B, 1)}, of which tensors of
    other shapes are left out; constants (B,): what a row adds at no token."""
    kept = {"mask": mask}
    if "clip_ratio/low_mean" in columns:  # -1, 0 or 1: an arrow
        columns = columns | {"clipped": columns["clip_ratio/high_mean"].float()
                             - columns["clip_ratio/low_mean"].float()}
    for name, x in columns.items():
        per_row = torch.is_tensor(x) and x.ndim == 2 and x.shape[1] in (1, mask.shape[1])
        if per_row and name not in ("input_ids", "mask") and not name.startswith("clip_ratio/"):
            kept[HEADINGS.get(name, name.replace("_", " "))] = x
    kept["share"] = share
    kept = {name: x.detach().cpu().double().expand(mask.shape) for name, x in kept.items()}
    rows, places = [], [*mb.places] * (len(mb.rows) // max(1, len(mb.places)))
    for b, (row, place) in enumerate(zip(mb.rows, places)):
        ids, names = [int(i) for i in row["input_ids"]], kept
        if row.get("sampled") == 0:  # a demonstration: no figure of a rollout is its own
            names = [name for name in ("mask", "log-prob", "NLL weight", "share") if name in kept]
        rows.append((row.get("number", place), row.get("note", ""), ids,
                     0.0 if constants is None else constants[b].item(),
                     {name: kept[name][b, :len(ids)].clone() for name in names}))
    return rows


def page_row(title, note, texts, columns, greatest):
    """One row of the page: its tokens as text (T,), and a table of {heading: (T,) numbers} -> HTML."""
    def symbols(text, kinds):  # control characters and white space as something to see
        return re.sub(kinds, lambda c: {"\n": "⏎", " ": "␣"}.get(c[0], chr(0x2400 + ord(c[0]))), text)

    def cell(name, value, trained):
        if name == "clipped":
            return ("", "▲ above", "▼ below")[int(value)]
        shown = trained or name in ("mask", "share")
        return f"{value + 0.0:.{9 if name == 'share' else 6}g}" if shown else ""
    spans, lines = [], ["".join(f"<th>{html.escape(name)}" for name in ("#", "token", *columns))]
    for t, text in enumerate(texts):
        seen = {name: values[t] for name, values in columns.items()}
        share, trained = seen["share"], seen["mask"]
        kind = "t up" if share > 0 else "t dn" if share < 0 else "t" if trained else ""
        mark = ("", "▲", "▼")[int(seen.get("clipped", 0))]
        mark += symbols("".join(re.findall("[\n\t]", text)), "[\n\t]") + ("" if text else "◌")
        attributes = f' class="{kind}"' if kind else ""
        attributes += f' data-m="{mark}"' if mark else ""
        attributes += f' style="--s:{math.sqrt(abs(share) / greatest):.2f}"' if share else ""
        spans.append(f"<span{attributes}>" + html.escape(symbols(text, "[\0-\x08\x0b-\x1f]")) + "</span>")
        cells = [t, html.escape(symbols(text, "[\0- ]"))]
        cells += [cell(name, value, trained) for name, value in seen.items()]
        lines.append("".join(f"<td>{text}" for text in cells))
    return (f'<article><h2>{title} <small>{html.escape(note)}</small></h2><p class="tokens" role="group" '
            f'aria-label="tokens of {title}">{"".join(spans)}</p><details><summary>all figures, as a table'
            f'</summary><div class="scroll"><table><thead><tr>{lines[0]}<tbody><tr>'
            + "\n<tr>".join(lines[1:]) + "</table></div></details></article>\n")


def write_page(run, rows, loss, about):
    """--audit FILE.html: `rows` of page_rows as one page that loads nothing and has its tables without
    JavaScript too; `about` says how shares are made. UserError if they do not add up to the step's loss."""
    args, rows = run.args, sorted(rows, key=lambda row: row[0])
    parts = [constant + columns["share"].sum().item() for *_, constant, columns in rows]
    total = math.fsum(parts)
    require(abs(total - loss) <= 1e-6 * max(1, abs(loss)), f"--audit: the tokens' shares add up to "
            f"{total} and the loss of step {run.audit_step} is {loss}; the page was not written")
    module, body = sys.modules[type(args).__module__], ""
    formula = re.search(r"Objective\s+(.*?)\nShapes", module.__doc__ or "", re.DOTALL)
    greatest = max((abs(x) for *_, columns in rows[:PAGE_ROWS] for x in columns["share"].tolist()), default=0)
    for (number, note, ids, constant, columns), part in zip(rows[:PAGE_ROWS], parts):
        note += f"adds {part:.6g} to the loss"
        note += f", of which {constant:.9g} at no token" if constant else ""
        body += page_row(f"row {number + 1}", note, token_texts(run.tokenizer, ids),
                         {name: x.tolist() for name, x in columns.items()}, greatest or 1)
    if rows[PAGE_ROWS:]:
        body += (f"<p>{len(rows) - PAGE_ROWS} more rows add "
                 f'<span id="rest">{math.fsum(parts[PAGE_ROWS:]):.9g}</span>.</p>')
    page = AUDIT_PAGE.substitute(
        name=os.path.basename(module.__file__), step=run.audit_step, loss=f"{loss:.9g}", rows=body,
        formula=html.escape(re.sub("\n +", "\n", formula[1] if formula else "")),
        clipped="<span>▲ ratio clipped above</span><span>▼ below</span>"
        * any("ratio" in columns for *_, columns in rows),
        about=html.escape(about),
        arguments=html.escape(json.dumps(asdict(args), indent=1, ensure_ascii=False)))
    if run.accelerator.is_main_process:
        with (explain(f"--audit {args.audit}", OSError),
              open(args.audit, "w", encoding="utf-8", newline="\n") as file):
            file.write(page)
    say(f"audit    wrote {args.audit}: {len(rows)} rows of step {run.audit_step}, loss {loss:.6g}; "
        "nothing was saved")
