"""common.py - turns names on disk into models, tokenizers and tokens, and back.

What the five scripts would otherwise repeat and no loss depends on. It computes no loss, makes no optimizer
and samples nothing.

Data flow: file -> read_rows (dicts with a place) -> to_conversation (one form for every format) ->
encode_conversation (ids and mask built together) -> pad (B, T).
"""

import copy
import csv
import difflib
import glob
import hashlib
import html
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import signal
import string
import sys
import time
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, fields
from functools import lru_cache
from itertools import groupby

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # its import names what it lacks
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # says every retry; the error comes at the end

import pandas
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object, set_seed
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          BitsAndBytesConfig, HfArgumentParser)

warnings.filterwarnings("ignore", category=FutureWarning)  # peft and transformers warn of their own calls
warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ---- errors and arguments ----------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake of the user's: one sentence that says what is wrong, where, and what to do."""


def require(ok, sentence):
    """Raises UserError(sentence) unless `ok`."""
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
    """Prints a UserError as one sentence on stderr (first process only) and exits with code 2."""
    try:
        yield
    except UserError as error:
        say(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:  # outside the training loop, which catches it: nothing has begun
        say("stopped before training; nothing was changed", file=sys.stderr)
        sys.exit(130)


def say(*text, file=None):
    """print() on the first process only, above a progress bar where there is one."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(" ".join(map(str, text)), file=file or sys.stdout)
        (file or sys.stdout).flush()


INSTEAD = {  # flags people bring along from elsewhere, and what takes their place here
    "per_device_train_batch_size": "--batch_size counts the rows of an optimizer step (ppo, grpo: prompts of "
                                   "a rollout) over all processes, --micro_batch_tokens what a forward pass "
                                   "holds",
    "gradient_accumulation_steps": "--batch_size is the whole step (ppo, grpo: the whole rollout); "
                                   "--micro_batch_tokens cuts it to fit the memory",
    "packing": "rows are not packed but sorted by length inside a step, which removes the padding",
    "use_vllm": "rollouts are sampled in the script itself; vLLM is not used",
    "beta": "the weight of the KL term is --kl_coef here; --beta is DPO's",
    "max_seq_length": "use --max_length", "use_peft": "use --lora_r 16",
    "fp16": "bf16 autocast or fp32 only: --bf16", "per_device_eval_batch_size": "use --micro_batch_tokens",
    "tools": "tool calls are not supported"}


class Parser(HfArgumentParser):
    """A dataclass's flags, with a UserError for every mistake."""

    def __init__(self, args_class):
        super().__init__(args_class, allow_abbrev=False)
        self.names = [field.name for field in fields(args_class)]

    def error(self, message):
        raise UserError(message)

    def unknown(self, word):
        """The sentence about a flag, or a file's argument, that there is not."""
        name = word.split("=")[0].lstrip("-").replace("-", "_")
        close = difflib.get_close_matches(name, self.names, n=1)
        dashes = "--" if word.startswith("--") else ""
        hint = f"; did you mean {dashes}{close[0]}?" if close else "; --help lists the flags"
        instead = INSTEAD.get(name, "")
        named = re.findall(r"--(\w+)", instead)
        fits = instead and (not named or named[0] in self.names)
        return f"unknown argument {word}" + (f": {instead}" if fits else hint)

    def values(self, words):
        """["--flag", "value", ...] -> {field name: value}, defaults filled in."""
        known, rest = self.parse_known_args(words)
        if rest:
            require(not rest[0].startswith("-"), self.unknown(rest[0]))
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
        for name, value in given.items():
            require(name in self.names, f"{path}: {self.unknown(name)}")
            if value is None or value == []:
                continue
            value = json.dumps(value) if isinstance(value, dict) else value
            texts = [str(v).replace("$HERE", here) for v in (value if isinstance(value, list) else [value])]
            words += [f"--{name}={texts[0]}"] if len(texts) == 1 else [f"--{name}", *texts]
        with explain(path, UserError):
            self.values(words)
        return words


def parse_args(args_class, argv=None):
    """[FILE.json] [--flag value ...] -> args_class. Flags win over the file; "$HERE" in it is its own folder.

    Without file and model the small example runs: tests/tiny/<script>.json beside the script. UserError on an
    unknown, abbreviated or mistyped flag.
    """
    argv, parser = list(sys.argv[1:] if argv is None else argv), Parser(args_class)
    path = argv.pop(0) if argv and not argv[0].startswith("-") else None
    example = path is None and parser.values(argv)["model_name_or_path"] is None
    if example:
        folder, script = os.path.split(os.path.abspath(sys.modules[args_class.__module__].__file__))
        path = os.path.join(folder, "tests", "tiny", script.replace(".py", ".json"))
        require(os.path.exists(path), "no model given and no tests/tiny beside the script: "
                "add --model_name_or_path NAME_OR_FOLDER --dataset_name NAME_OR_FILE")
    typed = parser.words_of_file(path) if path else []
    args = args_class(**parser.values(typed + argv))
    require(args.model_name_or_path, "--model_name_or_path is missing: the name or folder of a model")
    for name in ("model_name_or_path", "dataset_name", "eval_dataset_name", "output_dir"):
        if name in parser.names and getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    if example:
        before = os.path.join(args.output_dir, "args.json")
        if os.path.exists(before) and not args.audit and not parser.values(argv)["overwrite_output_dir"]:
            with explain(f"{before} is not readable", (OSError, ValueError)), open(before) as file:
                theirs = json.load(file).get("model_name_or_path")
            require(theirs == args.model_name_or_path, f"{args.output_dir} holds a run of {theirs}, which "
                    "the small example would replace: choose another --output_dir, or --overwrite_output_dir")
        say(f"No --model_name_or_path: running the small example of {os.path.relpath(path)} "
            "(flags go on top of it).")
    return args


def check_numbers(args, positive, not_negative):
    """Raises UserError unless every number is finite and those named are > 0 (or None), or >= 0."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            require(not isinstance(number, float) or math.isfinite(number), f"--{name} is {number}")
    for name in positive:
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name} must be positive, not {value}")
    for name in not_negative:
        require(getattr(args, name) >= 0, f"--{name} must not be negative, not {getattr(args, name)}")
    require(0 <= args.seed < 2**32, f"--seed must lie in [0, 2**32), not {args.seed}")
    for name in ("max_steps", "num_train_epochs"):
        require(getattr(args, name) < 10**9, f"--{name} {getattr(args, name)} would never end")


def make_accelerator(args):
    """One Accelerator for every script; resolves args.bf16: None means on an accelerator that has it.

    Buffers are not broadcast: a no_grad forward on one process alone would hang the others. Accumulation
    stays 1, whatever the launcher says: the scripts divide by the whole step's denominator themselves.
    Every process loads the weights, or what is copied before sharding (a reference) would be empty on some.
    """
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    require(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "false",
            "DeepSpeed is not supported: use FSDP (fsdp_version: 2) in the accelerate config")
    if args.bf16 is None:
        cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
        cpu = cpu or not torch.accelerator.is_available()
        args.bf16 = not cpu and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported())
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no", log_with=args.log_with,
                              project_dir=args.output_dir,
                              kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    accelerator.gradient_accumulation_steps = 1
    sharded = accelerator.distributed_type == DistributedType.FSDP
    require(not sharded or accelerator.is_fsdp2, "FSDP 1 is not supported: set fsdp_version: 2")
    require(not sharded or args.optim == "adamw_torch", f"--optim {args.optim} cannot be sharded by FSDP")
    return accelerator


def prepare(accelerator, module, optimizer):
    """accelerator.prepare; under FSDP2 too with a forward under autocast, as accelerate does elsewhere.

    FSDP's own bf16 would round what comes out, log-probs, to bf16.
    """
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    module, optimizer = accelerator.prepare(module, optimizer)
    if accelerator.is_fsdp2:
        module.forward = accelerator.autocast()(module.forward)
    return module, optimizer


# ---- reading data ------------------------------------------------------------------------------------------

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant"}

SFT_FORMATS = {  # name -> columns that must be there; the first that fits is taken, --format overrides
    "messages": ("messages",), "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"), "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"), "text": ("text",)}
PROMPT_FORMATS = {"prompt": ("prompt",), "instruction": ("instruction",), "question": ("question",)}


def read_rows(name, skip_bad_rows=False):
    """A local .json, .jsonl, .csv or .parquet file, or a dataset (_read_dataset) -> [(row dict, place)].

    UserError with file, line and reason on what cannot be read; skip_bad_rows counts and prints it instead.
    """
    def readable(row):
        if isinstance(row, ValueError):
            raise row
        expect(isinstance(row, dict), "not a JSON object")
        try:
            json.dumps(row, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:  # broken bytes, or half an emoji: no tokenizer takes them
            raise ValueError(f"text that is not valid UTF-8 ({error.reason})") from None
        return row

    looks_local = re.search(r"\.(jsonl?|csv|parquet|txt)$", name) or name.startswith((".", "/", "~"))
    require(os.path.exists(name) or os.path.isdir(name.split(":")[0]) or not looks_local,
            f"no such file: {name}")
    with explain(f"cannot read {name}", (OSError, csv.Error)):
        rows = _read_file(name) if os.path.isfile(name) else _read_dataset(name)
        return [(row, place) for row, _, place in convert_rows(rows, readable, skip_bad_rows, name)]


def _read_file(path):
    """Yields (row, place); in place of a row that cannot be read stands the ValueError that says why."""
    if path.endswith(".csv"):
        csv.field_size_limit(2**30)
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, restkey="_more")
            for row in reader:
                whole = "_more" not in row and None not in row.values()
                yield (row if whole else ValueError("the number of fields differs from the header's"),
                       f"{path}:{reader.line_num}")
    elif path.endswith(".parquet"):
        import pyarrow.parquet
        with explain(f"{path} is not a readable Parquet file"):
            table = pyarrow.parquet.read_table(path)
        yield from ((row, f"{path} row {i}") for i, row in enumerate(table.to_pylist()))
    elif path.endswith((".json", ".jsonl")):
        with open(path, "rb") as file:
            is_array = re.match(rb"(\xef\xbb\xbf)?\s*\[", file.read(64))
            file.seek(0)
            if is_array:
                rows = _parse(file.read())
                require(isinstance(rows, list), f"{path}: {rows}")
                yield from ((row, f"{path} row {i}") for i, row in enumerate(rows))
            else:
                yield from ((_parse(line), f"{path}:{n}") for n, line in enumerate(file, 1) if line.strip())
    else:
        raise UserError(f"{path}: unknown kind of file; .json, .jsonl, .csv and .parquet are read")


def _parse(data):
    """bytes of JSON -> its value, or a ValueError that says what is wrong with them."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON ({str(error).replace(': line 1 column', ' at column')})")


def _read_dataset(name):
    """A folder or a dataset on the hub: name, name:split or name:config:split. Yields (row, place)."""
    import datasets
    datasets.disable_progress_bars()
    path, *config, split = name.split(":") if ":" in name else (name, "train")
    with explain(f"'{name}' is neither a file here nor a dataset that could be loaded"):
        if any(os.path.exists(os.path.join(path, f"dataset_{kind}.json")) for kind in ("info", "dict")):
            data = datasets.load_from_disk(path)
            splits = data if isinstance(data, datasets.DatasetDict) else {"train": data}
            require(split in splits, f"no split '{split}', only {', '.join(splits)}")
            data = splits[split]
        else:
            data = datasets.load_dataset(path, *config, split=split)
    yield from ((row, f"{name} row {i}") for i, row in enumerate(data))


def convert_rows(rows, convert, skip_bad_rows, name):
    """[(row, place)] -> [(convert(row), row, place)]. A ValueError becomes a UserError with the place; with
    skip_bad_rows it is counted and printed."""
    kept, bad = [], Counter()
    for row, place in rows:
        try:
            kept.append((convert(row), row, place))
        except ValueError as error:
            require(skip_bad_rows, f"{place}: {error}; mend it or add --skip_bad_rows")
            bad[re.sub(r"\d+", "N", str(error))] += 1
    if bad:
        say(f"data     {name}: skipped {sum(bad.values()):,} rows: "
            + "; ".join(f"{n:,} {why}" for why, n in bad.most_common(5)))
    require(kept, f"{name} holds no usable row")
    return kept


def find_format(rows, formats, chosen=None):
    """`chosen`, or the first format whose columns the first row has. UserError if there is none."""
    row, place = rows[0]
    require(chosen is None or chosen in formats, f"unknown --format {chosen}: one of {', '.join(formats)}")
    fitting = [name for name, needed in formats.items() if set(needed) <= set(row)]
    known = "; ".join(f"{name} ({', '.join(needed)})" for name, needed in formats.items())
    columns = ", ".join(sorted(map(str, row)))
    require(chosen or fitting, f"{place}: no known format has the columns {columns}. Known are: {known}")
    return chosen or fitting[0]


def expect(ok, sentence):
    """Raises ValueError(sentence) unless `ok`: a mistake in a row, which convert_rows gives a place."""
    if not ok:
        raise ValueError(sentence)


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(value, what):
    if not isinstance(value, str):
        raise ValueError(f"{what} is not a string but {_short(value)}")
    return value


def turn(role, content, train=True):
    """One message; `train` counts for the assistant's alone."""
    return {"role": role, "content": content, "train": train and role == "assistant"}


def to_messages(value, train=True):
    """A list of {"role", "content"} or {"from", "value"} -> [turn]. ValueError with the reason.

    `train` is whether assistant turns count for the loss; a message's own "weight" 0 (OpenAI fine-tuning
    files) takes it out.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a non-empty list of messages, got {_short(value)}")
    messages = []
    for number, message in enumerate(value):
        at = f"message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{at} is not an object: {_short(message)}")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        is_tool = role in ("tool", "function", "observation", "function_call")
        expect(isinstance(role, str) and role in ROLES, f"{at} has the unknown role {_short(role)}"
               f"{' (tool calls are not supported)' if is_tool else ''}; "
               "known are system, user (human), assistant (gpt)")
        for key in ("tool_calls", "function_call", "reasoning_content"):  # never dropped without a word
            expect(not message.get(key), f"{at} has {key}, which is not supported")
        if isinstance(content, list):  # parts: text alone can be trained on
            expect(all(isinstance(part, dict) and part.get("type", "text") == "text" for part in content),
                   f"{at} has parts that are not text, which is not supported")
            content = "".join(_text(part.get("text"), "text of a part") for part in content)
        content = _text(content, f"content of {at} ({ROLES[role]})")
        messages.append(turn(ROLES[role], content, train and message.get("weight", 1) != 0))
    return messages


def column_messages(row, column, role="user", train=True):
    """A column of messages, or a string (an instruction with its input) as one turn of `role` -> [turn]."""
    value = row.get(column)
    if isinstance(value, list):
        return to_messages(value, train)
    text = _text(value, f"column '{column}'")
    if column == "instruction" and row.get("input"):
        text += "\n" + _text(row["input"], "column 'input'")
    return [turn(role, text, train)]


def with_system(messages, row, system_prompt):
    """Puts the row's `system` first, else system_prompt unless the messages begin with a system turn."""
    if row.get("system"):
        return [turn("system", _text(row["system"], "column 'system'")), *messages]
    own = not system_prompt or messages[0]["role"] == "system"
    return messages if own else [turn("system", system_prompt), *messages]


def to_conversation(row, format, system_prompt=None):
    """A row of any SFT format -> {"messages": [turn]} or {"text": str}. ValueError with the reason.

    What follows the last answer is dropped. An assistant turn before anything else is no answer: not trained.
    """
    if format == "text":
        text = _text(row.get("text"), "column 'text'")
        expect(text.strip(), "column 'text' is empty")
        return {"text": text}
    if format in ("messages", "conversations"):
        messages = to_messages(row.get(format))
    else:
        messages, history = [], row.get("history") if format == "alpaca" else None
        for pair in history or []:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ValueError(f"column 'history' holds {_short(pair)} "
                                 "where a [user, assistant] pair is expected")
            said = [_text(text, "history") for text in pair]
            messages += [turn("user", said[0]), turn("assistant", said[1])]
        prompt, completion = SFT_FORMATS[format]
        messages += column_messages(row, prompt, train=False) + column_messages(row, completion, "assistant")
    for number, message in enumerate(messages):
        expect(message["role"] != "assistant" or message["content"].strip(),
               f"empty completion (message {number})")
    messages = with_system(messages, row, system_prompt)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if messages:
        messages[0]["train"] = False
    expect(any(m["train"] for m in messages), "no assistant message to train on")
    return {"messages": messages}


def to_prompt(row, format, system_prompt=None):
    """A row -> (the prompt as it stands in the row, its messages). ValueError with the reason."""
    messages = column_messages(row, format, train=False)
    expect(messages[-1]["role"] != "assistant",
           "the prompt ends with an assistant message; it must end with the user's")
    expect(messages[-1]["content"].strip(), f"column '{format}' is empty")
    return row[format], with_system(messages, row, system_prompt)


def read_items(name, args, formats, convert):
    """A dataset, its format recognised and every row converted -> ([(converted, row, place)], format).

    convert(row, format, system_prompt) is to_conversation, to_prompt, to_pair or to_scored.
    """
    rows = read_rows(name, args.skip_bad_rows)
    kind = find_format(rows, formats, args.format)
    items = convert_rows(rows, lambda row: convert(row, kind, args.system_prompt), args.skip_bad_rows, name)
    say(f"data     {name}: format {kind}, {len(rows):,} rows")
    return items, kind


def hold_out(items, prompts, fraction, most=200):
    """Splits items into (train, evaluation) by prompt: the prompts with the smallest SHA-256 are held out.

    So rows with the same prompt stay on one side, and the same prompts are held out in every script, whatever
    the seed. At most round(fraction x rows) and at most `most`: a prompt that would exceed this is skipped.
    If every prompt would, one of the smallest size is held out, where `most` allows it; none if that number
    is 0 or there is one prompt alone.
    """
    wanted, size, held, count = min(most, round(fraction * len(items))), Counter(prompts), set(), 0
    limit = min(most, max(wanted, min(size.values())))
    for prompt in sorted(size, key=lambda p: hashlib.sha256(p.encode()).digest()):
        if count < wanted and count + size[prompt] <= limit and len(held) + 1 < len(size):
            held.add(prompt)
            count += size[prompt]
    return ([x for x, p in zip(items, prompts) if p not in held],
            [x for x, p in zip(items, prompts) if p in held])


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
    """The tokenizer of args.model_name_or_path with a chat template, .template_kwargs and a pad token.
    UserError if it has no EOS, no offsets, or a template that loses messages."""
    base, adapter = base_and_adapter(args.model_name_or_path)
    source = adapter if adapter and os.path.exists(os.path.join(adapter, "tokenizer_config.json")) else base
    names = os.listdir(source) if os.path.isdir(source) else ["tokenizer.json"]
    require(any("token" in name or name.startswith("vocab") for name in names),
            f"the folder {source} holds no tokenizer (no tokenizer.json or the like)")
    with explain(f"cannot load a tokenizer from '{source}'"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
    require(tokenizer.is_fast, f"the tokenizer of '{source}' gives no character offsets, "
            "which the masks need (is_fast is False)")
    require(tokenizer.eos_token_id is not None,
            f"the tokenizer of '{source}' has no EOS token: a model could never learn to stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: no mask is derived from a token id
    path = args.chat_template_path
    if path:
        with (explain(f"cannot read --chat_template_path {path}", (OSError, UnicodeDecodeError)),
              open(path, encoding="utf-8") as file):
            tokenizer.chat_template = file.read()
    elif not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
        say("template the tokenizer has none: using 'User:' and 'Assistant:' lines (saved with the model)")
    given, saved = args.chat_template_kwargs, tokenizer.init_kwargs.get("template_kwargs") or {}
    with explain("--chat_template_kwargs must be a JSON object such as '{\"enable_thinking\": false}'",
                 (ValueError, TypeError)):
        tokenizer.template_kwargs = {**(saved if given is None else json.loads(given or "{}"))}
    if tokenizer.template_kwargs:  # saved with the tokenizer: a reward model scores what it was trained on
        tokenizer.init_kwargs["template_kwargs"] = tokenizer.template_kwargs
    with explain(path or f"the tokenizer of {source}", ValueError):  # not to be blamed on the data
        trial = [turn("user", "a first question"), turn("assistant", "a first answer")]
        check_whole(render(tokenizer, trial), trial)
    return tokenizer


def render(tokenizer, messages, add_generation_prompt=False):
    """The chat template applied, as text with special tokens. ValueError with the template's complaint."""
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    try:
        return tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=add_generation_prompt,
            **getattr(tokenizer, "template_kwargs", {}))
    except Exception as error:  # templates call raise_exception with their own words
        raise ValueError(f"the chat template refuses this conversation: {reason_of(error)}") from None


def check_whole(text, messages):
    """ValueError if a template passed over a message, as some do with a system message or reasoning.

    White space may differ, and /think and /no_think are switches to some templates. Untrained assistant turns
    are not checked: they may lose their reasoning.
    """
    for number, message in enumerate(messages):
        if message["content"].strip() not in text and (message["train"] or message["role"] != "assistant"):
            words, rendered = (re.sub(r"\s+|/(no_)?think", "", t) for t in (message["content"], text))
            expect(words in rendered, f"the chat template leaves out message {number} ({message['role']}) "
                   "or a part of it; give another --chat_template_path")


def stop_token_ids(tokenizer, generation_config=None):
    """Every id that ends a completion: EOS, those of the generation config, the template's end of turn."""
    eos = getattr(generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, (list, tuple)) else [eos]),
           *_end_of_turn(tokenizer, str(tokenizer.chat_template))}
    return sorted(ids - {None})


@lru_cache
def _end_of_turn(tokenizer, _template):
    """The ids, one or none, of the special token that the template puts after an answer."""
    answer = "stopword"
    text = render(tokenizer, [turn("user", "hi"), turn("assistant", answer)])
    after = tokenizer(text.rpartition(answer)[2].lstrip(), add_special_tokens=False)["input_ids"]
    return [i for i in after[:1] if i in tokenizer.added_tokens_decoder]


def encode_prompt(tokenizer, messages):
    """messages -> ids of the prompt, ending where the assistant begins. None of its turns is trained here."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    check_whole(text, [{**m, "train": False} for m in messages])
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def find_answer(tokenizer, messages, k, text):
    """Where message k, without its header, stands in `text`, the rendering of all messages -> (start, end).
    None if the template renders it, or what precedes it, differently once more messages follow."""
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
    return (start, len(upto)) if text.startswith(upto) else None


def encode_conversation(tokenizer, messages, completion_only_loss=True):
    """messages -> [{"input_ids": [...], "completion_mask": [...], "moved": n}], usually one. ValueError.

    The assistant's spans are found on the final rendering: from the end of the generation prompt to the
    end-of-turn token, which is included. A template that rewrites earlier turns (thinking models) gives one
    example for each trained turn. `moved` counts tokens that belong half to an answer and half to what
    surrounds it; they stay untrained.
    """
    text, trained = render(tokenizer, messages), [k for k, m in enumerate(messages) if m["train"]]
    if not completion_only_loss:
        trained = trained[-1:]  # everything counts; only the end is to be found
    spans = [find_answer(tokenizer, messages, k, text) for k in trained]
    if None in spans:
        expect(trained != [len(messages) - 1],
               "the chat template changes the prompt when the answer follows it")
        parts = [[{**m, "train": j == k} for j, m in enumerate(messages[:k + 1])] for k in trained]
        return [e for part in parts for e in encode_conversation(tokenizer, part, completion_only_loss)]
    check_whole(text, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, ends = encoded["input_ids"], [b for _, b in encoded["offset_mapping"]]
    # some tokenizers leave a token's leading space out of its offsets
    starts = [min(a, b) for (a, _), b in zip(encoded["offset_mapping"], [0] + ends)]
    mask, moved, stops = [0 if completion_only_loss else 1] * len(ids), 0, set(stop_token_ids(tokenizer))
    for start, end in spans:
        first, last = bisect_left(starts, start), bisect_right(ends, end)
        moved += (first > 0 and ends[first - 1] > start) + (last < len(ids) and starts[last] < end)
        backwards = range(last, first, -1)
        stop = next((i for i in backwards if ids[i - 1] in stops), None)
        if stop is None:  # no end-of-turn token: trailing white space belongs to the template
            stop = next((i for i in backwards if text[starts[i - 1]:ends[i - 1]].strip()), first)
            if end == len(text):  # and EOS takes its place
                ids, mask = ids[:stop] + [tokenizer.eos_token_id], mask[:stop] + [1]
        mask[first:stop] = [1] * (stop - first)
    expect(any(mask), "no trained token is left after tokenizing")
    return [{"input_ids": ids, "completion_mask": mask, "moved": moved}]


def encode_text(tokenizer, text):
    """Raw text plus EOS, all of it trained; BOS once, if the tokenizer adds one."""
    ids = tokenizer(text)["input_ids"]
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    ids = (ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids) + [tokenizer.eos_token_id]
    return {"input_ids": ids, "completion_mask": [1] * len(ids), "moved": 0}


def truncate(ids, mask, max_length):
    """Cuts both to max_length: the prompt's beginning, down to max_length / 2, then the completion's end."""
    start = max(0, min(len(ids) - max_length, mask.index(1) - max_length // 2))
    return ids[start:start + max_length], mask[start:start + max_length]


def pad(rows, value, side="right", dtype=torch.long):
    """N sequences of lengths L_i -> (N, max L) filled with `value` on `side`."""
    width = max((len(row) for row in rows), default=0)
    out = torch.full((len(rows), width), value, dtype=dtype)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        out[i, at] = torch.as_tensor(row, dtype=dtype)
    return out


def fingerprint_of_file(path):
    """A digest of a file, or of a folder's files: of each its name, its size and 1 MiB from either end."""
    digest = hashlib.sha256()
    for name in sorted(glob.glob(os.path.join(path, "*"))) if os.path.isdir(path) else [path]:
        if os.path.isfile(name):
            size = os.path.getsize(name)
            digest.update(f"{os.path.basename(name)} {size}".encode())
            with open(name, "rb") as file:
                for start in (0, max(0, size - 2**20)):
                    file.seek(start)
                    digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


def fingerprint(examples):
    """A digest of all that the examples hold, so that no run is resumed with other data or templates."""
    def plain(value):
        if isinstance(value, list):
            return [plain(v) for v in value]
        return value.numpy().tobytes() if torch.is_tensor(value) else value
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr([(name, plain(value)) for name, value in sorted(example.items())]).encode())
    return digest.hexdigest()[:16]


# ---- preferences and scores --------------------------------------------------------------------------------

PAIR_FORMATS = {"sharegpt_pair": ("conversations", "chosen", "rejected"),
                "alpaca_pair": ("instruction", "chosen", "rejected"),
                "prompt_pair": ("prompt", "chosen", "rejected"), "conversation_pair": ("chosen", "rejected")}
SCORE_FORMATS = {"prompt_completion_score": ("prompt", "completion", "score")}


def transcript(text):
    """hh-rlhf's "\\n\\nHuman: ... \\n\\nAssistant: ..." -> messages. Raises ValueError if it is none."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
    if len(parts) < 4 or parts[0].strip() or parts[-2] != "Assistant":
        raise ValueError("expected a transcript that ends with '\\n\\nAssistant: ...', or messages, or a "
                         f"column 'prompt' beside the strings; got {_short(text)}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [turn(roles[who], said.strip(), train=False) for who, said in zip(parts[1::2], parts[2::2])]


def to_pair(row, format, system_prompt=None):
    """A row of any preference format -> {"prompt", "chosen", "rejected"}, lists of messages, and "margin".

    Full conversations and transcripts are split after the messages that they share. A side may come
    out empty: encode_pairs drops and counts such pairs. Raises ValueError with the reason.
    """
    columns = {"alpaca_pair": "instruction", "sharegpt_pair": "conversations", "prompt_pair": "prompt"}
    column = columns.get(format)
    prompt = column_messages(row, column, train=False) if column else []
    expect(not prompt or prompt[-1]["content"].strip(), f"column '{column}' is empty")
    sides = []
    for name in ("chosen", "rejected"):
        value = row.get(name)
        if isinstance(value, str):
            value = transcript(value) if format == "conversation_pair" else [turn("assistant", value)]
        elif isinstance(value, (dict, list)):
            value = to_messages(value if isinstance(value, list) else [value])
        else:
            raise ValueError(f"column '{name}' is neither a string nor messages but {_short(value)}")
        sides.append(value)
    said = [[(m["role"], m["content"]) for m in side] for side in sides]
    shared = len(os.path.commonprefix(said))
    shared = min(shared, *(len(side) - 1 for side in sides))  # identical sides: the last turn is the answer
    if shared:
        beginning = sides[0][:shared]  # full conversations hold the prompt themselves
        known = [(m["role"], m["content"]) for m in prompt]
        full = said[0][:len(known)] == known or any(m in beginning for m in prompt if m["role"] == "user")
        prompt = beginning if full else prompt + beginning
        sides = [side[shared:] for side in sides]
    for name, side in zip(("chosen", "rejected"), sides):
        if side[0]["role"] != "assistant":
            raise ValueError(f"'{name}' does not begin with an answer after what both sides share: their "
                             "prompts differ")
    if not prompt or prompt[-1]["role"] == "assistant":
        raise ValueError("the prompt of chosen and rejected must end with a user message")
    if prompt[0]["role"] != "system":
        prompt = with_system(prompt, row, system_prompt)
    short, long = sorted(([(m["role"], m["content"]) for m in side] for side in sides), key=len)
    expect(len(short) == len(long) or long[:len(short)] != short, "one side is the beginning of the other")
    margin = row.get("margin")
    try:
        margin = 0.0 if margin in (None, "") else float(margin)
    except (TypeError, ValueError):
        margin = math.nan
    expect(abs(margin) < 1e30, f"column 'margin' is no number: {_short(row.get('margin'))}")
    prompt = [{**m, "train": False} for m in prompt]
    chosen, rejected = ([{**m, "train": m["role"] == "assistant"} for m in side] for side in sides)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin}


def upto_answer(example):
    """(ids, mask) up to the last answer's end of turn: what a template puts after it is never sampled."""
    ids, mask = example["input_ids"], example["completion_mask"]
    end = len(mask) - mask[::-1].index(1)
    return ids[:end], mask[:end]


def prompt_key(messages):
    """What hold_out splits by: the same for the same prompt in every script."""
    return repr([m["content"] for m in messages if m["role"] != "assistant"])


def encode_pairs(items, tokenizer, max_length, counts, skip_bad_rows=False):
    """[(pair, row, place)] -> [{"chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask": tensors;
    "prompt_ids", "margin", "row"}].

    Both sides lose the same tokens of the prompt's beginning, then each its completion's end. Empty and
    identical pairs are dropped; `counts` (a Counter) says how many, and what was cut.
    """
    examples = []
    for pair, row, place in items:
        if not all(m["content"].strip() for side in ("chosen", "rejected") for m in pair[side]):
            counts["dropped: an empty completion"] += 1
            continue
        try:
            sides = [encode_conversation(tokenizer, pair["prompt"] + pair[side])
                     for side in ("chosen", "rejected")]
            if any(len(parts) > 1 for parts in sides):
                raise ValueError("the chat template rewrites earlier turns, so a completion of several turns "
                                 "cannot be one example")
            prompt_ids = encode_prompt(tokenizer, pair["prompt"])[-max_length:]
        except ValueError as error:
            require(skip_bad_rows, f"{place}: {error}; mend it or add --skip_bad_rows")
            counts["skipped in tokenizing"] += 1
            continue
        sides = [upto_answer(parts[0]) for parts in sides]
        prompt = min(mask.index(1) for _, mask in sides)
        longest = max(len(ids) for ids, _ in sides)
        keep = max(max_length - (longest - prompt), min(prompt, max_length // 2))
        cut = max(prompt - keep, 0) if longest > max_length else 0
        counts["cut to max_length"] += longest > max_length
        sides = [(ids[cut:cut + max_length], mask[cut:cut + max_length]) for ids, mask in sides]
        if sides[0] == sides[1] or not all(any(mask[1:]) for _, mask in sides):
            counts["dropped: the two sides are identical"] += sides[0] == sides[1]
            counts["dropped: no trained token left"] += sides[0] != sides[1]
            continue
        example = {"prompt_ids": prompt_ids, "margin": pair["margin"], "row": row}
        for name, (ids, mask) in zip(("chosen", "rejected"), sides):
            example[f"{name}_ids"] = torch.tensor(ids, dtype=torch.int32)
            example[f"{name}_mask"] = torch.tensor(mask, dtype=torch.int8)
        examples.append(example)
    return examples


def to_scored(row, format, system_prompt=None):
    """prompt, completion and score (a number, or several named ones) -> ({"messages"}, {name: float})."""
    conversation = to_conversation(row, "prompt_completion", system_prompt)
    scores = row["score"] if isinstance(row.get("score"), dict) else {"score": row.get("score")}
    for name, value in scores.items():
        try:
            scores = {**scores, name: float(value)}
        except (TypeError, ValueError):
            raise ValueError(f"the score '{name}' is not a number but {_short(value)}") from None
        if isinstance(value, bool) or not abs(scores[name]) < 1e30:
            raise ValueError(f"the score '{name}' is {_short(value)}; expected a finite number")
    if not scores:
        raise ValueError("column 'score' holds no score")
    return conversation, scores


# ---- showing things to a person ----------------------------------------------------------------------------

def show_example(tokenizer, ids, mask, title="first example", limit=600):
    """One example, trained tokens marked: green on a terminal, [[ ]] elsewhere. Long turns are cut."""
    terminal = sys.stdout.isatty()
    opening, closing = ("\033[32m", "\033[0m") if terminal else ("[[", "]]")
    text, count = "", sum(map(int, mask))
    for trained, part in groupby(zip(ids, mask), key=lambda token: int(token[1])):
        piece = tokenizer.decode([int(i) for i, _ in part], clean_up_tokenization_spaces=False)
        if len(piece) > limit:
            piece = piece[:limit // 2] + " ... " + piece[-limit // 2:]
        text += opening + piece + closing if trained else piece
    where = f", {count} trained, in {'green' if terminal else '[[ ]]'}" if count else ""
    say(f"{title}: {len(ids)} tokens{where}")
    say("  " + text.replace("\n", "\n  "))


def show_table(rows):
    """[{column: value}] as a table; long texts are cut."""
    def cut(value):
        text = " ".join(value.split()) if isinstance(value, str) else ""
        return text[:27] + " ... " + text[-27:] if len(text) > 60 else text or value
    if rows:
        table = pandas.DataFrame(rows).map(cut).to_string(index=False, max_colwidth=60)
        say("  " + table.replace("\n", "\n  "))


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
  const table = t.closest('article').querySelector('table'), list = document.createElement('dl');
  const cells = table.tBodies[0].rows[[...t.parentNode.children].indexOf(t)].cells;
  [...table.tHead.rows[0].cells].forEach((head, k) => {
    const box = list.appendChild(document.createElement('div'));
    box.appendChild(document.createElement('dt')).textContent = head.textContent;
    box.appendChild(document.createElement('dd')).textContent = cells[k].textContent.trim() || '–';
  });
  panel.replaceChildren(list);
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
    def decode(start, end):
        return tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
    texts, before, start = [], 0, 0  # decoded with what comes before: alone, a token may lose its space
    for end in range(1, len(ids) + 1):
        text = decode(before, end)[len(decode(before, start)):]
        half = text.endswith("\ufffd") and end - start < 4 and end < len(ids)
        texts.append("" if half else text)
        before, start = (before, start) if half else (start, end)
    return texts


def audit_row(title, note, texts, columns, greatest):
    """One row of the page: its tokens as text (T,), and a table of {name: (T-1,) numbers} -> HTML."""
    def symbols(text, kinds):  # control characters and white space as something to see
        return re.sub(kinds, lambda c: {"\n": "⏎", " ": "␣"}.get(c[0], chr(0x2400 + ord(c[0]))), text)
    spans, lines = [], ["".join(f"<th>{html.escape(name)}" for name in ("#", "token", *columns))]
    for t, text in enumerate(texts):
        seen = {name: values[t - 1] if t else 0 for name, values in columns.items()}
        share, clipped = seen["share"], int(seen.get("clipped", 0))
        kind = "t up" if share > 0 else "t dn" if share < 0 else "t" if seen["mask"] else ""
        mark = ("", "▲", "▼")[clipped] + symbols("".join(re.findall("[\n\t]", text)), "[\n\t]")
        mark += "" if text else "◌"
        spans.append("<span" + (f' class="{kind}"' if kind else "") + (f' data-m="{mark}"' if mark else "")
                     + (f' style="--s:{math.sqrt(abs(share) / greatest):.2f}"' if share else "")
                     + ">" + html.escape(symbols(text, "[\0-\x08\x0b-\x1f]")) + "</span>")
        cells = [("", "▲ above", "▼ below")[clipped] if name == "clipped" else
                 f"{value + 0.0:.{9 if name == 'share' else 6}g}" if seen["mask"] or name in ("mask", "share")
                 else "" for name, value in seen.items()]
        lines.append("".join(f"<td>{cell}" for cell in (t, html.escape(symbols(text, "[\0- ]")), *cells)))
    return (f'<article><h2>{title} <small>{html.escape(note)}</small></h2><p class="tokens" role="group" '
            f'aria-label="tokens of {title}">{"".join(spans)}</p><details><summary>all figures, as a table'
            f'</summary><div class="scroll"><table><thead><tr>{lines[0]}<tbody><tr>'
            + "\n<tr>".join(lines[1:]) + "</table></div></details></article>\n")


class Audit:
    """--audit FILE.html: what the loss sees of every token of one step, as a page, instead of a training run.

    The loop adds the very tensors that it sums into its loss: the page cannot differ from what trains.
    """

    ROWS = 64  # rows shown in full; of the others the sum is stated

    def __init__(self, accelerator, args, tokenizer, start_step, total_steps):
        self.accelerator, self.args, self.tokenizer, self.rows = accelerator, args, tokenizer, []
        self.step = args.audit_step or start_step + 1
        require(not args.audit or start_step < self.step <= total_steps,
                f"--audit: there is no step {self.step}, since this command starts after step {start_step} "
                f"and ends with step {total_steps}; see --audit_step")

    def due(self, step):
        """Whether update `step` (0, 1, ...) is the one to be shown."""
        return bool(self.args.audit) and step + 1 == self.step

    def add(self, numbers, ids, loss_mask, share, columns, notes=None, constants=None):
        """A micro-batch of B rows. numbers: their places in the step, [] for an idle process; ids: their
        tokens; share (B, T-1): what a token adds to the step's loss; columns {name: (B, T-1)}; constants
        (B,): what a row adds that belongs to no token."""
        columns = {name: x.detach().cpu().double().expand(loss_mask.shape)
                   for name, x in {"mask": loss_mask, **columns, "share": share}.items()}
        constants = [0.0] * len(ids) if constants is None else constants.tolist()
        for b, number in enumerate(numbers):
            row = [int(i) for i in ids[b]]
            self.rows.append((number, notes[b] if notes else "", row, constants[b],
                              {name: x[b, :len(row) - 1].clone() for name, x in columns.items()}))

    def write(self, loss, about):
        """Writes the page, `about` on it: how the shares are made. UserError if they do not add up to the
        loss that the step reports."""
        rows = sorted(gather_object(self.rows), key=lambda row: row[0])
        parts = [constant + columns["share"].sum().item() for *_, constant, columns in rows]
        total = math.fsum(parts)
        require(abs(total - loss) <= 1e-6 * max(1, abs(loss)), f"--audit: the tokens' shares add up to "
                f"{total} and the loss of step {self.step} is {loss}; the page was not written")
        if self.accelerator.is_main_process:
            with (explain(f"--audit {self.args.audit}", OSError),
                  open(self.args.audit, "w", encoding="utf-8", newline="\n") as file):
                file.write(self.page(rows, parts, loss, about))
        say(f"audit    wrote {self.args.audit}: {len(rows)} rows of step {self.step}, loss {loss:.6g}; "
            "nothing was trained or saved")

    def page(self, rows, parts, loss, about):
        """-> the HTML: one file that loads nothing, and has its tables without JavaScript too."""
        module, rest = sys.modules[type(self.args).__module__], parts[self.ROWS:]
        formula = re.search(r"Objective\s+(.*?)\nShapes", module.__doc__ or "", re.DOTALL)
        greatest = max((abs(x) for row in rows[:self.ROWS] for x in row[4]["share"].tolist()), default=0) or 1
        body = [audit_row(f"row {number + 1}", f"{note}adds {part:.6g} to the loss"
                          + (f", of which {constant:.9g} at no token" if constant else ""),
                          token_texts(self.tokenizer, ids), {k: x.tolist() for k, x in columns.items()},
                          greatest)
                for (number, note, ids, constant, columns), part in zip(rows[:self.ROWS], parts)]
        if rest:
            body.append(f'<p>{len(rest)} more rows add <span id="rest">{math.fsum(rest):.9g}</span>.</p>')
        return AUDIT_PAGE.substitute(
            name=os.path.basename(module.__file__), step=self.step, loss=f"{loss:.9g}", rows="".join(body),
            formula=html.escape(re.sub("\n +", "\n", formula[1] if formula else "")),
            clipped="<span>▲ ratio clipped above</span><span>▼ below</span>" * ("ratio" in rows[0][4]),
            about=html.escape(about), arguments=html.escape(
                json.dumps(asdict(self.args), indent=1, ensure_ascii=False)))


def watch_loss(losses, loss, advice):
    """The last four evaluation losses, now with `loss`; warns when each is above the one before."""
    losses = [*losses[-3:], loss]
    if len(losses) == 4 and all(a < b for a, b in zip(losses, losses[1:])):
        say(f"warning  the evaluation loss has risen three times in a row, from {losses[0]:.4f}: the model "
            f"overfits. Take {advice}fewer epochs or a lower --learning_rate")
    return losses


def check_tracker(log_with):
    """accelerate would go on unlogged when the package is missing; this raises UserError."""
    require(log_with is None or importlib.util.find_spec(log_with),
            f"--log_with {log_with} needs the package '{log_with}': pip install {log_with}")


class RunLog:
    """metrics.jsonl, samples.jsonl, trackers and progress lines of a run; only the first process writes."""

    def __init__(self, accelerator, args, total_steps, start_step):
        self.accelerator, self.args, self.total, self.start = accelerator, args, total_steps, start_step
        self.main = accelerator.is_main_process and not args.audit  # an audit leaves every run as it is
        self.since, self.tokens, self.track = time.time(), 0, args.log_with and not args.audit
        if self.main:
            for path in (os.path.join(args.output_dir, name) for name in OUTPUTS):
                if start_step == 0:  # a new run: what an earlier one left goes only now
                    shutil.rmtree(path, ignore_errors=True)
                    with suppress(FileNotFoundError):
                        os.remove(path)
                elif path.endswith(".jsonl"):
                    _cut_back(path, start_step)
            with open(os.path.join(args.output_dir, "args.json"), "w", encoding="utf-8") as file:
                json.dump({**asdict(args), "resume_from_checkpoint": None}, file, indent=1)
        if start_step == total_steps > 0:
            say(f"resume   the run is complete at step {total_steps}: only the model is saved again")
        if self.track:
            accelerator.init_trackers(os.path.basename(os.path.normpath(args.output_dir)))
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True,
                        disable=not (self.main and sys.stderr.isatty()))

    def write(self, name, record):
        if self.main:
            with open(os.path.join(self.args.output_dir, name), "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def metrics(self, step, values):
        self.write("metrics.jsonl", {"step": step, **values})
        if self.track and (step % self.args.logging_steps == 0
                                   or any(k.startswith("eval/") for k in values)):
            self.accelerator.log(values, step=step)

    def progress(self, step, tokens, shown):
        """One step done, `tokens` of it processed; `shown` are the figures worth a glance."""
        self.tokens += tokens
        seconds = max(time.time() - self.since, 1e-9)
        figures = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        figures += f"  {self.tokens / seconds:,.0f} tok/s"
        self.bar.set_postfix_str(figures, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and (step % self.args.logging_steps == 0 or step == self.total):
            left = seconds / max(step - self.start, 1) * (self.total - step)
            say(f"step {step}/{self.total}  {figures}  {left:.0f} s left")

    def close(self):
        self.bar.close()
        if self.track:
            self.accelerator.end_training()


def _cut_back(path, step):
    """Keeps the lines up to `step`: what a killed run wrote after its last checkpoint is written again."""
    if not os.path.exists(path):
        return
    with (open(path, encoding="utf-8") as file, open(path + ".tmp", "w", encoding="utf-8") as kept,
          suppress(ValueError)):  # half a line: the run was killed while writing it
        for line in file:
            if json.loads(line)["step"] > step:
                break
            kept.write(line)
    os.replace(path + ".tmp", path)


# ---- models ------------------------------------------------------------------------------------------------

def base_and_adapter(name):
    """A model folder or name -> (name, None); a LoRA adapter's folder -> (its base, the folder)."""
    if not os.path.exists(os.path.join(name, "adapter_config.json")):
        require(not name.startswith((".", "/", "~")) or os.path.isdir(name), f"no such model folder: {name}")
        return name, None
    with explain(f"{name}/adapter_config.json is not readable"):
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    require(any(n.startswith("adapter_model.") for n in os.listdir(name)), f"{name} holds no adapter weights")
    require(not base.startswith((".", "/", "~")) or os.path.isdir(base),
            f"the adapter {name} was trained on {base}, which is not there")
    return base, name


def trains_adapter(args):
    """Whether LoRA is trained: asked for by --lora_r, or given as the folder of an adapter."""
    return args.lora_r > 0 or base_and_adapter(args.model_name_or_path)[1] is not None


def load_model(args, tokenizer, device="cpu", dropout=False, score_names=None):
    """The model, ready to train: trained weights fp32, all else frozen; LoRA and 4-bit as the arguments say.
    `device` moves nothing: it says where a 4-bit base will be used.

    A policy, whose generation config stops at every id of stop_token_ids; or, with score_names, a reward
    model with one output a name. dropout=False turns every rate off, functional ones included; the model
    stays in train() mode, where checkpointing works.
    """
    base, adapter = base_and_adapter(args.model_name_or_path)
    lora = trains_adapter(args)
    set_seed(args.seed)  # random weights and LoRA's A are drawn here
    model = load_base(base, args, device, lora, score_names and score_config(score_names, tokenizer))
    rows = model.get_input_embeddings().weight.shape[0]
    require(len(tokenizer) <= rows, f"the tokenizer has {len(tokenizer)} tokens and the model's embedding "
            f"{rows} rows: '{base}' and its tokenizer do not belong together")
    limit = max_positions(model)
    longest = vars(args).get("max_length") or args.max_prompt_length + args.max_completion_length
    shorter = ("--max_length" if vars(args).get("max_length")
               else "--max_prompt_length or --max_completion_length")
    require(longest <= limit, f"rows may have {longest} tokens and the model {base} has {limit} positions: "
            f"lower {shorter}")
    scaled = [name for name in ("final_logit_softcapping", "logits_scaling", "logit_scale")
              if getattr(model.config, name, None) not in (None, 1, 1.0)]
    require(score_names or not scaled, f"models of type {model.config.model_type} change their logits after "
            f"the head ({', '.join(scaled)}), so their log-probs would be off: not supported")
    if adapter:
        rank, task = (getattr(PeftConfig.from_pretrained(adapter), name) for name in ("r", "task_type"))
        require((task == "SEQ_CLS") == bool(score_names), f"{adapter} is an adapter of "
                f"{'a reward model' if task == 'SEQ_CLS' else 'a policy'}: start from its merged/ instead")
        require(args.lora_r in (0, rank), f"{adapter} is an adapter of rank {rank}: leave --lora_r out")
        with explain(f"cannot load the adapter {adapter}"):
            model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    elif lora:
        for name in args.modules_to_save or []:
            require(any(f".{n}".endswith(f".{name}") for n, _ in model.named_modules()),
                    f"--modules_to_save {name}: the model has no module of that name")
        config = LoraConfig(
            r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=getattr(args, "lora_dropout", 0.0),
            target_modules=args.lora_target_modules or "all-linear", modules_to_save=args.modules_to_save,
            task_type="SEQ_CLS" if score_names else "CAUSAL_LM")  # SEQ_CLS trains and saves the head too
        with explain(f"--lora_target_modules {args.lora_target_modules}", ValueError):
            model = get_peft_model(model, config)
    require(score_names or not isinstance(model.get_output_embeddings(), BaseTunerLayer),
            "LoRA on the output head would not be trained: use --modules_to_save lm_head instead")
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if not dropout:
        no_dropout(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not score_names:
        model.generation_config.eos_token_id = stop_token_ids(tokenizer, model.generation_config)
    model.train()
    kind = "a LoRA adapter goes on" if adapter else f"LoRA r={args.lora_r}" if lora else "full fine-tuning"
    count, total = (model.get_nb_trainable_parameters() if isinstance(model, PeftModel)  # knows 4-bit weights
                    else (sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())))
    say(f"model    {args.model_name_or_path} ({model.config.model_type}): {kind}"
        f"{' on a 4-bit base' if args.load_in_4bit else ''}, {count:,} of {total:,} weights "
        f"trained in fp32{' under bf16 autocast' if args.bf16 else ''}")
    return model


def max_positions(model):
    """The longest row a model can read; 10**9 where it sets no limit."""
    return getattr(model.config, "max_position_embeddings", None) or 10**9


def score_config(names, tokenizer):
    """The config entries of a reward model with one score a name."""
    return {"num_labels": len(names), "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)}, "pad_token_id": tokenizer.pad_token_id}


def load_base(base, args, device="cpu", frozen=False, scores=None):
    """The model of a folder or name: bf16 or 4-bit where it is frozen and the arguments say so, else fp32.
    With `scores` (a score_config) a reward model.

    A folder with a config but no weights starts from random weights, drawn from args.seed, and says so; if
    they stay frozen they are saved in output_dir/base: an adapter is worth nothing without its base.
    """
    dtype = torch.bfloat16 if frozen and args.bf16 else torch.float32
    options = {"trust_remote_code": args.trust_remote_code}
    with explain(f"cannot load a model from '{base}'"):
        auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        config = AutoConfig.from_pretrained(base, **options, **(scores or {}))
        require(not hasattr(config, "vision_config"),
                f"{base} is a vision-language model: images are not supported")
        require(not getattr(config, "output_router_logits", False), f"{base} asks for a mixture-of-experts "
                "auxiliary loss (output_router_logits), which is not supported")
        if args.attn_implementation:
            options["attn_implementation"] = args.attn_implementation
        if os.path.isdir(base) and not any(n.endswith((".safetensors", ".bin")) for n in os.listdir(base)):
            say(f"model    {base} has a config but no weights: starting from random ones (seed {args.seed})")
            model = auto.from_config(config, dtype=torch.float32, **options)
            if not frozen:
                return model
            require(not args.audit, f"--audit writes nothing but its page, and {base} has no weights: "
                    "adapters would need a base that is saved")
            base = os.path.join(args.output_dir, "base")
            if os.environ.get("RANK", "0") == "0":
                model.save_pretrained(base)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
        if args.load_in_4bit:
            options["quantization_config"] = _nf4(dtype, torch.device(device).type)
        model, loaded = auto.from_pretrained(base, config=config, dtype=dtype, output_loading_info=True,
                                             **options)
        missing = [name for name in loaded["missing_keys"] if not (scores and name.startswith("score."))]
        require(not missing, f"it holds no weights for {', '.join(sorted(missing)[:3])}: "
                "they would be random")
        return model


def use_scoring_pad_token(tokenizer):
    """Gives the tokenizer a pad token that ends no text, and returns its id.

    transformers reads a reward model's score before the last run of pad tokens: were that the EOS of a text,
    it would read the token before it. Any other token will do; no mask is derived from it.
    """
    stops = stop_token_ids(tokenizer)
    if tokenizer.pad_token_id in (None, *stops):
        others = [t for t in (tokenizer.unk_token_id, *tokenizer.added_tokens_decoder, 0, 1)
                  if t is not None and t not in stops]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(others[0])
    return tokenizer.pad_token_id


def load_reward_model(folder, device="cpu", trust_remote_code=False, batch_size=16):
    """A reward model's folder (full, merged or adapter) -> (names of its scores, score).

    score(conversations: lists of turns, truncated: bools) -> (N, K) fp32 on the CPU, read at the end of the
    last answer; one that is truncated gets no end-of-turn token.
    """
    base, adapter = base_and_adapter(folder)
    with explain(f"{folder} is no reward model that can be loaded"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        names, options = [config.id2label[i] for i in range(config.num_labels)], {}
        if hasattr(config, "quantization_config"):  # an adapter that was trained on a 4-bit base
            del config.quantization_config
            options["quantization_config"] = _nf4(torch.float32, torch.device(device).type)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            base, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code,
            output_loading_info=True, **options)
        trained = not loaded["missing_keys"] or (
            adapter is not None and PeftConfig.from_pretrained(adapter).task_type == "SEQ_CLS")
        require(trained, "it has no trained score head")
        model = PeftModel.from_pretrained(model, adapter) if adapter else model
        model = (model if options else model.to(device)).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer.template_kwargs = tokenizer.init_kwargs.get("template_kwargs") or {}
        if tokenizer.pad_token_id is None:
            model.config.pad_token_id = use_scoring_pad_token(tokenizer)
    limit, stops = max_positions(model), stop_token_ids(tokenizer)

    @torch.no_grad()
    def score(conversations, truncated=None):
        rows = [upto_answer(encode_conversation(tokenizer, messages)[-1])[0][-limit:]
                for messages in conversations]
        rows = [row[:-1] if cut and row[-1] in stops else row
                for row, cut in zip(rows, truncated or [False] * len(rows))]
        scores = torch.zeros(len(rows), len(names))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for at in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
            input_ids = pad([rows[i] for i in at], tokenizer.pad_token_id).to(device)
            mask = pad([[1] * len(rows[i]) for i in at], 0).to(device)
            scores[at] = model(input_ids=input_ids, attention_mask=mask).logits.float().cpu()
        return scores
    return names, score


def _nf4(compute_dtype, device_type):
    """NF4 with double quantisation."""
    with explain("--load_in_4bit needs the package 'bitsandbytes' (pip install bitsandbytes)", ImportError):
        import bitsandbytes.nn.modules
    if device_type == "cpu":  # an eval forward would repack the weights and spoil the gradients
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=compute_dtype)


def dropout_rates(model):
    """Yields (module, attribute) of every rate above 0: modules', and the floats that layers pass to
    functional dropout."""
    for module in model.modules():
        for name, value in vars(module).items():
            rate = "drop" in name or (name == "p" and isinstance(module, torch.nn.Dropout))
            if rate and isinstance(value, float) and value > 0:
                yield module, name


def no_dropout(model):
    """Sets every dropout rate to 0."""
    for module, name in list(dropout_rates(model)):
        setattr(module, name, 0.0)


def check_cut(model, checkpoint, args):
    """UserError if a run with dropout is resumed with another --micro_batch_tokens."""
    then = checkpoint[1]["args"]["micro_batch_tokens"]
    require(then == args.micro_batch_tokens or not any(dropout_rates(model)), "the model has dropout, whose "
            f"draws depend on the cut: give --micro_batch_tokens {then}, as the checkpoint's run did")


def make_reference(model, adapter=None):
    """The frozen reference policy -> (module to call, context to call it in, how it is made).

    LoRA on a plain base: the same model, adapters off. LoRA continued from an adapter: a frozen copy of that
    adapter. Full fine-tuning: a frozen copy of the model. Call it before the first update.
    """
    if not isinstance(model, PeftModel):
        return copy.deepcopy(model).requires_grad_(False), nullcontext, "a frozen copy of the model"
    if adapter is None:
        return model, model.disable_adapter, "the base model, adapters off"
    model.load_adapter(adapter, adapter_name="reference", is_trainable=False)
    model.set_adapter("default")
    no_dropout(model)  # the new layers came with the adapter's own rate
    model.train()

    @contextmanager
    def use_reference():
        model.set_adapter("reference", inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter("default")
    return model, use_reference, "a frozen copy of the adapter"


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
    """A tensor that FSDP has sharded, gathered from all processes on the CPU; anything else as it is."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def like(value, parameter):
    """A whole tensor, sharded as the parameter is if it has its shape."""
    if isinstance(parameter, DTensor) and torch.is_tensor(value) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


# ---- checkpoints and saving --------------------------------------------------------------------------------

# Arguments that may differ when a run is resumed: none of them changes the resulting weights (but for
# micro_batch_tokens where there is dropout: check_cut).
MAY_CHANGE = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps",
              "save_total_limit", "logging_steps", "log_with", "micro_batch_tokens", "rollout_batch_size",
              "gradient_checkpointing", "merge", "reward_timeout", "kl_warn", "audit", "audit_step"}
OUTPUTS = ("args.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model", "merged")  # of a run


def open_run(args):
    """Checks args.output_dir and finds where to go on. -> the loaded checkpoint (tensors, state) or None.

    Removes nothing: RunLog does when data and model have been found good. UserError if the folder holds a run
    and neither --resume_from_checkpoint nor --overwrite_output_dir is given, or if an argument that changes
    the mathematics differs from the checkpoint's.
    """
    require(trains_adapter(args) or not args.load_in_4bit,
            "--load_in_4bit trains adapters on a frozen base: add --lora_r 16")
    require(trains_adapter(args) or not args.merge, "--merge merges an adapter: add --lora_r 16")
    require(args.audit or not args.audit_step, "--audit_step is the step to show: add --audit FILE.html")
    if args.audit:  # output_dir is only read, where there is something to resume
        folder = os.path.dirname(args.audit) or "."
        require(args.audit.endswith(".html") and os.access(folder, os.W_OK),
                f"--audit {args.audit}: expected the name of an .html file in a folder that is writable")
    else:
        with explain(f"--output_dir {args.output_dir}", OSError):
            os.makedirs(args.output_dir, exist_ok=True)
        require(os.access(args.output_dir, os.W_OK), f"--output_dir {args.output_dir} is not writable")
    if args.resume_from_checkpoint is None:
        _check_free(args)
        return None
    path, checkpoint = _find_checkpoint(args)
    if checkpoint is None:
        _check_free(args, started=True)
        return None
    now, then = asdict(args), checkpoint[1]["args"]
    for name in sorted(now):
        if name not in MAY_CHANGE:
            require(name in then and then[name] == now[name],
                    f"{path} was written with --{name} {then.get(name)} and this run has {now[name]}: "
                    "that would change the result; give the old value, or start a new --output_dir")
    say(f"resume   from {path}, step {checkpoint[1]['step']}")
    return checkpoint


def _check_free(args, started=False):
    """UserError if output_dir holds what may not be replaced: a run, other files, or this run's inputs.

    `started`: to be resumed, but killed before its first checkpoint; such a run has no model/ yet.
    """
    if args.audit:  # replaces nothing
        return
    used = [n for n in OUTPUTS if os.path.exists(os.path.join(args.output_dir, n))]
    started = started and not {"model", "merged"}.intersection(used)
    require(not used or "args.json" in used, f"{args.output_dir} holds {', '.join(used)} but no "
            "args.json, so it is no run of ours and is not overwritten; choose another --output_dir")
    require(not used or args.overwrite_output_dir or started,
            f"{args.output_dir} already holds a run: choose another --output_dir, or add "
            "--resume_from_checkpoint latest to go on, or --overwrite_output_dir to replace it")
    given = [(name, getattr(args, name, None)) for name in (
        "model_name_or_path", "dataset_name", "eval_dataset_name", "chat_template_path", "sft_dataset")]
    given += [("reward_funcs", name) for name in getattr(args, "reward_funcs", [])]
    given += [("model_name_or_path", base_and_adapter(args.model_name_or_path)[0])]
    for name, value in given:
        for path in (value, value.rpartition(":")[0]) if value else ():  # folder:score, file.py:function
            inside = os.path.relpath(os.path.realpath(path or "."), os.path.realpath(args.output_dir))
            require(inside.split(os.sep)[0] not in OUTPUTS, f"--{name} {value} lies inside the run that "
                    "would be replaced; choose another --output_dir")


def _find_checkpoint(args):
    """-> (folder, (tensors, state)) to resume from; of "latest" the newest that is whole, or two Nones."""
    wanted = args.resume_from_checkpoint
    if wanted != "latest":
        require(os.path.isdir(wanted), f"--resume_from_checkpoint {wanted}: no such folder (or say 'latest')")
        with explain(f"--resume_from_checkpoint {wanted}"):
            return wanted, load_checkpoint(wanted)
    folder = os.path.join(args.output_dir, "checkpoints")
    for path in reversed(_steps(folder)):
        try:
            return path, load_checkpoint(path)
        except Exception as error:
            say(f"resume   passing over {path}: {reason_of(error)}")
    say(f"resume   no whole checkpoint in {folder}: starting from the beginning")
    return None, None


def _steps(folder):
    """The checkpoints of a folder, oldest first."""
    return [os.path.join(folder, n) for n in sorted(glob.glob("step-" + "[0-9]" * 8, root_dir=folder))]


@contextmanager
def written_whole(folder):
    """Yields an empty folder that replaces `folder` once complete; UserError, and no change, if not."""
    partial = os.path.join(os.path.dirname(folder), ".partial-" + os.path.basename(folder))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explain(f"could not write {folder} (the checkpoints before it are whole)"):
            os.makedirs(partial)
            yield partial
            for name in [*os.listdir(partial), "."]:  # on the disk before its name says so
                handle = os.open(os.path.join(partial, name), os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_checkpoint(accelerator, args, state, model, optimizer, name=None, extra=None):
    """Writes checkpoints/step-N (or checkpoints/<name>); then removes the oldest beyond save_total_limit.
    Every process calls it; the first one writes.

    tensors.safetensors holds the trained weights, the optimizer's moments and `extra` tensors; state.json the
    scalars, the arguments and the SHA-256 of the tensors' file.
    """
    if args.audit:
        return
    folder = os.path.join(args.output_dir, "checkpoints")
    tensors, scalars = trained_state(model, optimizer)
    require(all(t.sum().isfinite() for t in tensors.values()), f"step {state['step']}: the weights are no "
            "longer finite and are not saved; the checkpoints are whole. Try a lower --learning_rate")
    if accelerator.is_main_process:
        _write_checkpoint(args, state, tensors | (extra or {}), scalars, folder, name)
    accelerator.wait_for_everyone()


def _write_checkpoint(args, state, tensors, scalars, folder, name):
    kept, seen = {}, set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        kept[key] = value.clone() if place in seen else value  # bitsandbytes shares tables; a file may not
        seen.add(place)
    with written_whole(os.path.join(folder, name or f"step-{state['step']:08d}")) as partial:
        path = os.path.join(partial, "tensors.safetensors")
        save_file(kept, path)
        with open(os.path.join(partial, "state.json"), "w", encoding="utf-8") as file:
            json.dump({**state, "optimizer": scalars, "args": asdict(args), "sha256": _sha256(path)}, file)
    for old in _steps(folder)[:-args.save_total_limit]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder):
    """-> (tensors, state). Raises ValueError, KeyError or OSError if anything is missing or damaged."""
    with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
        state = json.load(file)
    path = os.path.join(folder, "tensors.safetensors")
    expect(_sha256(path) == state["sha256"], "damaged: the tensors differ from their checksum")
    return load_file(path), state


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trained_state(module, optimizer):
    """The trained weights and the optimizer's state, whole, as ({name: tensor}, {name: JSON value})."""
    tensors = {f"model.{name}": whole(p) for name, p in module.named_parameters() if p.requires_grad}
    scalars = {}

    def keep(name, value):
        if isinstance(value, dict):  # bitsandbytes nests the tensors of its 8-bit moments
            for key, inner in value.items():
                keep(f"{name}.{key}", inner)
        else:
            (tensors if torch.is_tensor(value) else scalars)[name] = whole(value)
    for index, values in optimizer.state_dict()["state"].items():
        keep(f"optimizer.{index}", values)
    return tensors, scalars


def check_data(checkpoint, data):
    """The fingerprint `data`; UserError if the checkpoint was written with another."""
    require(checkpoint is None or checkpoint[1]["data"] == data, "the checkpoint was written with other "
            "training data or rewards (or another chat template or tokenizer): give the same, or a new "
            "--output_dir")
    return data


def restore(model, optimizer, checkpoint):
    """The inverse of trained_state, in place. UserError if a weight's name or shape is another."""
    tensors, state = checkpoint
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                saved = tensors.get(f"model.{name}")
                require(saved is not None and saved.shape == p.shape,
                        f"the checkpoint has no weight {name} of shape {tuple(p.shape)}: "
                        "it was written by another model")
                p.copy_(like(saved, p))
    if optimizer is not None:
        per_parameter, parameters = {}, [p for group in optimizer.param_groups for p in group["params"]]
        for name, value in {**tensors, **state["optimizer"]}.items():
            if name.startswith("optimizer."):
                _, index, *keys, last = name.split(".")
                values = per_parameter.setdefault(int(index), {})
                for key in keys:
                    values = values.setdefault(key, {})
                values[last] = like(value, parameters[int(index)])
        optimizer.load_state_dict({"state": per_parameter,
                                   "param_groups": optimizer.state_dict()["param_groups"]})


def finish(args, accelerator, model, tokenizer):
    """Writes model/ (and merged/ with --merge) and says where."""
    named = model.state_dict(keep_vars=True)
    values = {id(value): whole(value).detach() for value in named.values()}  # tied weights stay one tensor
    state = {name: values[id(value)] for name, value in named.items()}
    if accelerator.is_main_process:
        folder = os.path.join(args.output_dir, "model")
        save_model(model, tokenizer, folder, state)
        say(f"saved    {folder}")
        if args.merge:
            merge_adapter(args, tokenizer, os.path.join(args.output_dir, "merged"), folder,
                          accelerator.device)
    accelerator.wait_for_everyone()


def save_model(model, tokenizer, folder, state=None):
    """An adapter or full weights, with tokenizer, template and generation config."""
    model.config.use_cache = True
    options = {"selected_adapters": ["default"]} if isinstance(model, PeftModel) else {}
    with written_whole(folder) as partial:
        model.save_pretrained(partial, state_dict=state, **options)
        if model.can_generate():
            model.generation_config.save_pretrained(partial)
        else:  # a reward model: an adapter's folder too tells the names of its scores
            model.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def merge_adapter(args, tokenizer, folder, adapter, device):
    """Merges the adapter into its base, saves plain weights to `folder`, prints how far the logits moved.

    A 4-bit base is dequantised first: merging into its original weights, or in 4 bits, is some ten times less
    exact.
    """
    is_reward_model = os.path.exists(os.path.join(adapter, "config.json"))
    names = (AutoConfig.from_pretrained(adapter, trust_remote_code=args.trust_remote_code).id2label.values()
             if is_reward_model else [])

    def load():
        model = load_base(base_and_adapter(adapter)[0], args, device, True,
                          score_config(list(names), tokenizer) if is_reward_model else None)
        return model if args.load_in_4bit else model.to(device)

    ids = torch.arange(64, device=device).view(8, 8) % len(tokenizer)
    with torch.no_grad():
        before = PeftModel.from_pretrained(load(), adapter).eval()(ids).logits.float()
        model = load()
        if args.load_in_4bit:
            model = model.dequantize(dtype=torch.bfloat16 if args.bf16 else torch.float32)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
        after = merged(ids).logits.float()
    if not is_reward_model:
        merged.generation_config = transformers.GenerationConfig.from_pretrained(adapter)
    save_model(merged, tokenizer, folder)
    say(f"merged   {folder}: logits moved by at most {(after - before).abs().max():.2g} "
        f"(their spread is {before.std():.2g})")


class Interrupt:
    """Ctrl-C and SIGTERM set .signal: the loop saves a checkpoint and stops. A second one ends at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._catch)

    def _catch(self, number, frame):
        self.signal = number
        say("stopping after this step (ppo, grpo: this rollout), with a checkpoint (once more: at once)",
            file=sys.stderr)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    def leave(self, args, step):
        say(f"stopped at step {step}, before the page was written" if args.audit else
            f"stopped at step {step}; to go on: the same command with --resume_from_checkpoint latest",
            file=sys.stderr)
        sys.exit(128 + (self.signal or signal.SIGTERM))
