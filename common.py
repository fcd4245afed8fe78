"""common.py - turns names on disk into models, tokenizers and tokens, and back.

It holds what the five scripts would otherwise repeat and what no loss depends on: reading arguments, reading
a dataset and recognising its format, rendering and tokenizing with masks, loading a model (full, LoRA, QLoRA)
and its reference, checkpoints, saving, and showing tokens and progress to a person. It knows nothing of
losses, optimizers, sampling or rewards.

Data flow: file -> read_rows (dicts with a place) -> to_conversation (one form for every format) ->
encode_conversation (ids and mask built together) -> pad (B, T).
"""

import copy
import csv
import difflib
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from functools import lru_cache
from itertools import groupby

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # its import names what it lacks
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # says every retry; the error comes at the end

import pandas
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser

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
def user_errors():
    """Prints a UserError as one sentence on stderr (first process only) and exits with code 2."""
    try:
        yield
    except UserError as error:
        say(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # outside the training loop, which catches it: nothing has begun
        say("stopped before training; nothing was changed", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def say(*text, file=None):
    """print() on the first process only, without tearing a progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(" ".join(str(t) for t in text), file=file or sys.stdout)
        (file or sys.stdout).flush()


class Parser(HfArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse_args(args_class, argv=None):
    """[FILE.json] [--flag value ...] -> args_class. Without a model and a file: tests/tiny/<script>.json
    beside the script.

    A file's values are read as if they had been typed before the flags, so they pass the same checks and the
    flags win. "$HERE" in a file is the folder it lies in. Raises UserError on an unknown, abbreviated or
    mistyped flag.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = {option: field.name for field in fields(args_class) for option in _options(field)}
    path = argv.pop(0) if argv and not argv[0].startswith("-") else None
    given = {flags.get(word.split("=")[0]) for word in argv}
    example = path is None and "model_name_or_path" not in given and not {"-h", "--help"} & set(argv)
    if example:
        script = os.path.abspath(sys.modules[args_class.__module__].__file__)
        path = os.path.join(os.path.dirname(script), "tests", "tiny",
                            os.path.basename(script).replace(".py", ".json"))
        require(os.path.exists(path), "no model given and no tests/tiny beside the script: "
                "add --model_name_or_path NAME_OR_FOLDER --dataset_name NAME_OR_FILE")
    typed = []
    if path is not None:
        here = os.path.relpath(os.path.dirname(path) or ".")
        for name, value in _read_args_file(path).items():
            require(f"--{name}" in flags,
                    f"{path}: unknown argument '{name}'{_closest(name, flags.values())}")
            if value is not None and value != []:
                value = json.dumps(value) if isinstance(value, dict) else value
                values = value if isinstance(value, list) else [value]
                words = [str(v).replace("$HERE", here) for v in values]
                typed += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
        try:
            _parse_flags(args_class, flags, typed)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    args = _parse_flags(args_class, flags, typed + argv)
    if example:
        say(f"No --model_name_or_path: running the small example of {os.path.relpath(path)} "
            "(flags go on top of it).")
    return args


def _parse_flags(args_class, flags, words):
    parser = Parser(args_class, allow_abbrev=False)
    args, *_, rest = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False)
    if rest and not rest[0].startswith("-"):
        before = words[:words.index(rest[0])]
        flag = next((word.split("=")[0] for word in reversed(before) if word.startswith("--")), "")
        raise UserError(f"one value too many{' for ' + flag if flag else ''}: {rest[0]}")
    if rest:
        name = rest[0].split("=")[0].lstrip("-").replace("-", "_")
        raise UserError(f"unknown argument {rest[0]}"
                        + (f": {INSTEAD[name]}" if name in INSTEAD else _closest(rest[0], flags)))
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
    require(args.max_steps < 10**9, f"--max_steps {args.max_steps} would never end")


INSTEAD = {  # flags people bring along from elsewhere, and what takes their place here
    "per_device_train_batch_size": "--batch_size counts the rows of an optimizer step over all processes, "
                                   "--micro_batch_tokens what one forward pass holds",
    "gradient_accumulation_steps": "--batch_size is the whole step; "
                                   "--micro_batch_tokens cuts it to fit the memory",
    "packing": "rows are sorted by length inside a step instead, which removes the padding",
    "use_vllm": "rollouts are sampled in the script itself; vLLM is not used",
    "beta": "the weight of the KL term is --kl_coef here; --beta is DPO's",
    "max_seq_length": "--max_length", "use_peft": "--lora_r 16", "fp16": "bf16 autocast or fp32 only: --bf16",
    "per_device_eval_batch_size": "--micro_batch_tokens", "tools": "tool calls are not supported"}


def _options(field):
    aliases = field.metadata.get("aliases", [])
    names = [f"--{field.name}"] + ([aliases] if isinstance(aliases, str) else list(aliases))
    return names + [name.replace("_", "-") for name in names if "_" in name]


def _closest(name, names):
    close = difflib.get_close_matches(name.split("=")[0], list(names), n=1)
    return f"; did you mean {close[0]}?" if close else "; --help lists the flags"


def _read_args_file(path):
    require(path.endswith(".json"),
            f"'{path}': expected --flag value, or an arguments file ending in .json first")
    try:
        with open(path, encoding="utf-8-sig") as file:
            values = json.load(file)
    except OSError as error:
        raise UserError(f"cannot read the arguments file {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    require(isinstance(values, dict), f"{path} must hold one JSON object of arguments")
    return values


def make_accelerator(args):
    """One Accelerator for every script; resolves args.bf16: None means on an accelerator that has it.

    Buffers are not broadcast: a no_grad forward on one process alone would hang the others. Accumulation
    stays 1, whatever the launcher says: the scripts divide by the whole step's denominator themselves.
    """
    if args.bf16 is None:
        cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
        cpu = cpu or not torch.accelerator.is_available()
        args.bf16 = not cpu and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported())
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no", log_with=args.log_with,
                              project_dir=args.output_dir,
                              kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    accelerator.gradient_accumulation_steps = 1
    return accelerator


# ---- reading data ------------------------------------------------------------------------------------------

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant"}

SFT_FORMATS = {  # name -> columns that must be there; the first that fits is taken, --format overrides
    "messages": ("messages",), "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"), "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"), "text": ("text",)}
PROMPT_FORMATS = {"prompt": ("prompt",), "instruction": ("instruction",), "question": ("question",)}


def read_rows(name, skip_bad_rows=False):
    """A local .json, .jsonl, .csv or .parquet file, or a dataset name[:split] -> [(row dict, place)].

    Raises UserError with file, line and reason on what cannot be read; with skip_bad_rows such lines are
    counted and printed.
    """
    def readable(row):
        if not isinstance(row, dict):
            raise row if isinstance(row, ValueError) else ValueError("not a JSON object")

    looks_local = re.search(r"\.(jsonl?|csv|parquet|txt)$", name) or name.startswith((".", "/", "~"))
    require(os.path.exists(name) or os.path.isdir(name.split(":")[0]) or not looks_local,
            f"no such file: {name}")
    try:
        rows = _read_file(name) if os.path.isfile(name) else _read_dataset(name)
        return [(row, place) for _, row, place in convert_rows(rows, readable, skip_bad_rows, name)]
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from None


def _parse(data):
    """bytes of JSON -> its value, or a ValueError that says what is wrong with them."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
        if b"\\ud" in data or b"\\uD" in data:  # half of an emoji is a character that nothing can encode
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON ({str(error).replace(': line 1 column', ' at column')})")


def _read_file(path):
    """Yields (row, place), with a ValueError in place of a row that cannot be read."""
    if path.endswith(".csv"):
        csv.field_size_limit(2**30)
        with open(path, "rb") as file:
            reader = csv.DictReader((line.decode("utf-8-sig") for line in file), restkey="_more")
            try:
                for row in reader:
                    whole = "_more" not in row and None not in row.values()
                    yield (row if whole else ValueError("the number of fields differs from the header's"),
                           f"{path}:{reader.line_num}")
            except (UnicodeDecodeError, csv.Error) as error:
                raise UserError(f"{path}:{reader.line_num + 1}: not a readable CSV file ({error})") from None
    elif path.endswith(".parquet"):
        import pyarrow.parquet
        try:
            table = pyarrow.parquet.read_table(path)
        except Exception as error:
            raise UserError(f"{path} is not a readable Parquet file ({error})") from None
        for i, row in enumerate(table.to_pylist()):
            yield row, f"{path} row {i}"
    elif path.endswith((".json", ".jsonl")):
        with open(path, "rb") as file:
            is_array = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
            file.seek(0)
            if is_array:
                rows = _parse(file.read())
                require(isinstance(rows, list), f"{path}: {rows}")
                yield from ((row, f"{path} row {i}") for i, row in enumerate(rows))
            else:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _parse(line), f"{path}:{number}"
    else:
        raise UserError(f"{path}: unknown kind of file; .json, .jsonl, .csv and .parquet are read")


def _read_dataset(name):
    """A dataset name on the hub, or a folder, with an optional :split (default train). Yields (row,
    place)."""
    import datasets
    datasets.disable_progress_bars()
    path, _, split = name.partition(":")
    split = split or "train"
    try:
        if any(os.path.exists(os.path.join(path, f"dataset_{kind}.json")) for kind in ("info", "dict")):
            data = datasets.load_from_disk(path)
            splits = data if isinstance(data, datasets.DatasetDict) else {"train": data}
            require(split in splits, f"no split '{split}', only {', '.join(splits)}")
            data = splits[split]
        else:
            data = datasets.load_dataset(path, split=split)
    except Exception as error:  # the library raises dozens of kinds; the user needs the sentence
        raise UserError(f"'{name}' is neither a file here nor a dataset that could be loaded: "
                        f"{_first_line(error)}") from None
    for i, row in enumerate(data):
        yield row, f"{name} row {i}"


def find_format(rows, formats, chosen=None):
    """The first format whose columns the first row has, or `chosen`. Raises UserError naming what was found
    and expected."""
    columns, place = set(rows[0][0]), rows[0][1]
    require(chosen is None or chosen in formats, f"unknown --format {chosen}: one of {', '.join(formats)}")
    for name, needed in formats.items():
        if name == chosen or (chosen is None and columns.issuperset(needed)):
            return name
    known = "; ".join(f"{name} ({', '.join(needed)})" for name, needed in formats.items())
    raise UserError(f"{place}: no known format has the columns {', '.join(sorted(map(str, columns)))}. "
                    f"Known are: {known}")


def to_messages(value, train=True):
    """A list of {"role", "content"} or {"from", "value"} -> [{"role", "content", "train"}]. Raises ValueError
    with the reason.

    `train` is whether assistant turns count for the loss; a message's own "weight" 0 (OpenAI fine-tuning
    files) takes it out.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a non-empty list of messages, got {_short(value)}")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is not an object: {_short(message)}")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role not in ROLES:
            tool = (" (tool calls are not supported)"
                    if role in ("tool", "function", "observation", "function_call") else "")
            raise ValueError(f"message {number} has the unknown role {_short(role)}{tool}; "
                             "known are system, user (human), assistant (gpt)")
        for key in ("tool_calls", "function_call", "reasoning_content"):  # never dropped without a word
            if message.get(key):
                raise ValueError(f"message {number} has {key}, which is not supported")
        if isinstance(content, list):  # parts: text alone can be trained on
            if not all(isinstance(part, dict) and part.get("type", "text") == "text" for part in content):
                raise ValueError(f"message {number} has parts that are not text, which is not supported")
            content = "".join(_text(part.get("text"), "text of a part") for part in content)
        role, content = ROLES[role], _text(content, f"content of message {number} ({role})")
        if role == "assistant" and not content.strip():
            raise ValueError(f"message {number} is an empty completion")
        counts = train and role == "assistant" and message.get("weight", 1) != 0
        messages.append({"role": role, "content": content, "train": counts})
    return messages


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(value, what):
    if not isinstance(value, str):
        raise ValueError(f"{what} is not a string but {_short(value)}")
    return value


def turn(role, content, train=True):
    return {"role": role, "content": content, "train": train and role == "assistant"}


def to_conversation(row, format, system_prompt=None):
    """A row of any SFT format -> {"messages": [...]} or {"text": str}. Raises ValueError with the reason.

    What follows the last answer is dropped. An assistant turn before anything else is no answer: not trained.
    """
    if format == "text":
        text = _text(row.get("text"), "column 'text'")
        if not text.strip():
            raise ValueError("column 'text' is empty")
        return {"text": text}
    if format in ("messages", "conversations"):
        messages = to_messages(row.get(format))
        if row.get("system"):
            messages.insert(0, turn("system", _text(row["system"], "column 'system'")))
    elif format == "alpaca":
        instruction, extra = _text(row.get("instruction"), "column 'instruction'"), row.get("input") or ""
        messages = [turn("system", _text(row["system"], "column 'system'"))] if row.get("system") else []
        for pair in row.get("history") or []:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ValueError(f"column 'history' holds {_short(pair)} "
                                 "where a [user, assistant] pair is expected")
            messages += [turn("user", _text(pair[0], "history")),
                         turn("assistant", _text(pair[1], "history"))]
        extra = _text(extra, "column 'input'")
        messages += [turn("user", instruction + ("\n" + extra if extra else "")),
                     turn("assistant", _text(row.get("output"), "column 'output'"))]
    else:
        first, second = SFT_FORMATS[format]
        prompt, completion = row.get(first), row.get(second)
        messages = (to_messages(prompt, train=False) if isinstance(prompt, list)
                    else [turn("user", _text(prompt, f"column '{first}'"))])
        messages += (to_messages(completion) if isinstance(completion, list)
                     else [turn("assistant", _text(completion, f"column '{second}'"))])
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, turn("system", system_prompt))
    while messages and messages[-1]["role"] != "assistant":  # nothing after the last answer is trained on
        messages.pop()
    if messages:
        messages[0]["train"] = False
    if not any(m["train"] for m in messages):
        raise ValueError("no assistant message to train on")
    if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
        raise ValueError("empty completion")
    return {"messages": messages}


def to_prompt(row, format, system_prompt=None):
    """A row -> (the prompt as it stands in the row, its messages). Raises ValueError with the reason."""
    prompt = row.get(format)
    if isinstance(prompt, list):
        messages = to_messages(prompt, train=False)
        if messages[-1]["role"] == "assistant":
            raise ValueError("the prompt ends with an assistant message; it must end with the user's")
    else:
        text = _text(prompt, f"column '{format}'")
        if format == "instruction" and row.get("input"):
            text += "\n" + _text(row["input"], "column 'input'")
        if not text.strip():
            raise ValueError(f"column '{format}' is empty")
        messages = [turn("user", text)]
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, turn("system", system_prompt))
    return prompt, messages


def convert_rows(rows, convert, skip_bad_rows, name):
    """[(row, place)] -> [(convert(row), row, place)], every row checked. A ValueError names file, line and
    reason."""
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


def hold_out(items, prompts, fraction, most=200):
    """Splits items into (train, evaluation) by prompt: the prompts with the smallest SHA-256 are held out.

    So rows that share a prompt never fall apart, and the same prompts are held out in every script, whatever
    the seed. A prompt with so many rows that it would overshoot is passed over, unless all have as many.
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
    """The tokenizer of args.model_name_or_path, with a chat template and a pad token. Raises UserError if it
    has no EOS."""
    base, adapter = base_and_adapter(args.model_name_or_path)
    source = adapter if adapter and os.path.exists(os.path.join(adapter, "tokenizer_config.json")) else base
    names = os.listdir(source) if os.path.isdir(source) else ["tokenizer.json"]
    require(any("token" in name or name.startswith("vocab") for name in names),
            f"the folder {source} holds no tokenizer (no tokenizer.json or the like)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
    except Exception as error:
        raise UserError(f"cannot load a tokenizer from '{source}': {_first_line(error)}") from None
    require(tokenizer.is_fast, f"the tokenizer of '{source}' gives no character offsets, "
            "which the masks need (is_fast is False)")
    require(tokenizer.eos_token_id is not None,
            f"the tokenizer of '{source}' has no EOS token: a model could never learn to stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: no mask is derived from a token id
    if args.chat_template_path:
        try:
            with open(args.chat_template_path, encoding="utf-8") as file:
                tokenizer.chat_template = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --chat_template_path {args.chat_template_path}: "
                            f"{getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    elif not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
        say("template the tokenizer has none: using 'User:' and 'Assistant:' lines "
            "(saved with the model)")
    tokenizer.template_kwargs = parse_json_object(args.chat_template_kwargs, "--chat_template_kwargs")
    try:  # a template's own mistakes should not be blamed on the data
        trial = [turn("user", "a first question"), turn("assistant", "a first answer")]
        check_whole(render(tokenizer, trial), trial)
    except ValueError as error:
        raise UserError(f"{args.chat_template_path or 'the tokenizer of ' + source}: {error}") from None
    return tokenizer


def parse_json_object(text, flag):
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        value = None
    require(isinstance(value, dict),
            f"{flag} must be a JSON object such as '{{\"enable_thinking\": false}}', not {text}")
    return value


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def render(tokenizer, messages, add_generation_prompt=False):
    """The chat template applied, as text: special tokens and all. Raises ValueError with the template's own
    complaint."""
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    try:
        return tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=add_generation_prompt,
            **getattr(tokenizer, "template_kwargs", {}))
    except Exception as error:  # templates call raise_exception with their own words
        raise ValueError(f"the chat template refuses this conversation: {_first_line(error)}") from None


def check_whole(text, messages):
    """Raises ValueError if a template passed over a message, as some do with a system message or reasoning.

    White space may differ, and /think and /no_think are switches to some templates. Untrained assistant turns
    may lose their reasoning.
    """
    for number, message in enumerate(messages):
        if message["content"].strip() not in text and (message["train"] or message["role"] != "assistant"):
            words, rendered = (re.sub(r"\s+|/(no_)?think", "", t) for t in (message["content"], text))
            if words not in rendered:
                raise ValueError(f"the chat template leaves out message {number} ({message['role']}) "
                                 "or a part of it; give another --chat_template_path")


def stop_token_ids(tokenizer, generation_config=None):
    """Every id that ends a completion: the tokenizer's EOS, the generation config's, and the template's end
    of turn."""
    ids = {tokenizer.eos_token_id, *_end_of_turn(tokenizer, str(tokenizer.chat_template))}
    eos = getattr(generation_config, "eos_token_id", None)
    ids.update(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
    return sorted(ids)


@lru_cache
def _end_of_turn(tokenizer, _template):
    """The ids, one or none, of the special token that the template puts after an answer."""
    answer = "stopword"
    text = render(tokenizer, [turn("user", "hi"), turn("assistant", answer)])
    after = tokenizer(text.rpartition(answer)[2].lstrip(), add_special_tokens=False)["input_ids"]
    return [i for i in after[:1] if i in tokenizer.added_tokens_decoder]


def encode_prompt(tokenizer, messages):
    """messages -> ids of the prompt, ending where the assistant begins."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    check_whole(text, messages)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def find_answer(tokenizer, messages, k, text):
    """Where message k, without its header, stands in `text`, the rendering of all messages -> (start, end).
    None if the template renders it or what precedes it otherwise once more messages follow."""
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
    """messages -> [{"input_ids": [...], "completion_mask": [...], "moved": n}], usually one.

    The assistant's spans are found on the final rendering: from the end of the generation prompt to the
    end-of-turn token, which is included. A template that rewrites earlier turns (thinking models) gives one
    example for each trained turn instead. `moved` counts tokens that belong half to an answer and half to
    what surrounds it; they stay untrained. Raises ValueError.
    """
    text, trained = render(tokenizer, messages), [k for k, m in enumerate(messages) if m["train"]]
    if not completion_only_loss:
        trained = trained[-1:]  # everything counts; only the end is to be found
    spans = [find_answer(tokenizer, messages, k, text) for k in trained]
    if None in spans:
        if trained == [len(messages) - 1]:
            raise ValueError("the chat template changes the prompt when the answer follows it")
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
        stop = last
        while stop > first and ids[stop - 1] not in stops:
            stop -= 1
        if stop == first:  # no end-of-turn token: trailing white space belongs to the template
            stop = last
            while stop > first and not text[starts[stop - 1]:ends[stop - 1]].strip():
                stop -= 1
            if end == len(text):  # and EOS takes its place
                ids, mask = ids[:stop] + [tokenizer.eos_token_id], mask[:stop] + [1]
        mask[first:stop] = [1] * (stop - first)
    if not any(mask):
        raise ValueError("no trained token is left after tokenizing")
    return [{"input_ids": ids, "completion_mask": mask, "moved": moved}]


def encode_text(tokenizer, text):
    """Raw text plus EOS, all of it trained; BOS once, if the tokenizer adds one."""
    ids = tokenizer(text)["input_ids"]
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    ids = (ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids) + [tokenizer.eos_token_id]
    return {"input_ids": ids, "completion_mask": [1] * len(ids), "moved": 0}


def truncate(ids, mask, max_length):
    """Cuts ids and mask together to max_length: first the prompt's beginning, down to half of it, then the
    completion's end."""
    if len(ids) <= max_length:
        return ids, mask
    prompt = mask.index(1)
    keep = max(max_length - (len(ids) - prompt), min(prompt, max_length // 2))
    start = prompt - keep
    return ids[start:start + max_length], mask[start:start + max_length]


def pad(rows, value, side="right", dtype=torch.long):
    """N sequences of lengths L_i -> (N, max L) filled with `value` on `side`."""
    width = max((len(row) for row in rows), default=0)
    out = torch.full((len(rows), width), value, dtype=dtype)
    for i, row in enumerate(rows):
        if len(row):
            at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            out[i, at] = torch.as_tensor(row, dtype=dtype)
    return out


def fingerprint(examples):
    """A digest of all that is in the examples: a checkpoint refuses to go on with other data or another
    template."""
    digest = hashlib.sha256()
    for example in examples:
        for name, value in sorted(example.items()):
            value = value.numpy().tobytes() if torch.is_tensor(value) else value
            digest.update(repr((name, value)).encode())
    return digest.hexdigest()[:16]


# ---- showing things to a person ----------------------------------------------------------------------------

def show_example(tokenizer, ids, mask, title="first example", limit=600):
    """One example, trained tokens marked: green on a terminal, [[ ]] elsewhere. Long turns are cut."""
    opening, closing = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    text, ids = "", [int(i) for i in ids]
    for trained, turn_of in groupby(range(len(ids)), key=lambda i: int(mask[i])):
        piece = tokenizer.decode([ids[i] for i in turn_of], skip_special_tokens=False,
                                 clean_up_tokenization_spaces=False)
        if len(piece) > limit:
            piece = piece[:limit // 2] + " ... " + piece[-limit // 2:]
        text += opening + piece + closing if trained else piece
    count = sum(map(int, mask))
    where = "" if not count else f", {count} trained, " + ("marked" if sys.stdout.isatty() else "in [[ ]]")
    say(f"{title}: {len(ids)} tokens{where}")
    say("  " + text.replace("\n", "\n  "))


def show_table(rows):
    """[{column: value}] as a table; long texts are cut."""
    cells = [{k: " ".join(v.split()) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    cells = [{k: v[:27] + " ... " + v[-27:] if isinstance(v, str) and len(v) > 60 else v
              for k, v in row.items()} for row in cells]
    if rows:
        say("  " + pandas.DataFrame(cells).to_string(index=False, max_colwidth=60).replace("\n", "\n  "))


TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check_tracker(log_with):
    """accelerate would go on unlogged when the package is missing; this raises UserError."""
    if log_with is not None:
        require(importlib.util.find_spec(TRACKER_PACKAGES[log_with]) is not None,
                f"--log_with {log_with} needs the package '{TRACKER_PACKAGES[log_with]}': "
                f"pip install {TRACKER_PACKAGES[log_with]}")


class RunLog:
    """metrics.jsonl, samples.jsonl, the trackers and the progress line of one run. Only the first process
    writes."""

    def __init__(self, accelerator, args, total_steps, start_step):
        self.accelerator, self.args, self.total, self.start = accelerator, args, total_steps, start_step
        self.main, self.since, self.tokens = accelerator.is_main_process, time.time(), 0
        if self.main and start_step == 0:  # a new run: what an earlier one left goes only now
            for path in (os.path.join(args.output_dir, name) for name in OUTPUTS):
                if os.path.isdir(path):
                    shutil.rmtree(path)
                elif os.path.exists(path):
                    os.remove(path)
        elif self.main:
            for name in ("metrics.jsonl", "samples.jsonl"):
                _cut_back(os.path.join(args.output_dir, name), start_step)
        if self.main:
            save_args(args)
        if start_step == total_steps:
            say(f"resume   the run is complete at step {total_steps}: only the model is saved again")
        if args.log_with:
            accelerator.init_trackers(os.path.basename(os.path.normpath(args.output_dir)))
        self.bar = tqdm(total=total_steps, initial=start_step,
                        disable=not (self.main and sys.stderr.isatty()), unit="step", dynamic_ncols=True)

    def write(self, name, record):
        if self.main:
            with open(os.path.join(self.args.output_dir, name), "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def metrics(self, step, values):
        self.write("metrics.jsonl", {"step": step, **values})
        if self.args.log_with and (step % self.args.logging_steps == 0
                                   or any(k.startswith("eval/") for k in values)):
            self.accelerator.log(values, step=step)

    def progress(self, step, tokens, shown):
        """One step done, `tokens` of it processed; `shown` are the figures worth a glance."""
        self.tokens += tokens
        text = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        rate = self.tokens / max(time.time() - self.since, 1e-9)
        self.bar.set_postfix_str(f"{text}  {rate:,.0f} tok/s", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and (step % self.args.logging_steps == 0 or step == self.total):
            done = step - self.start
            left = (time.time() - self.since) / max(done, 1) * (self.total - step)
            say(f"step {step}/{self.total}  {text}  {rate:,.0f} tok/s  {left:.0f} s left")

    def close(self):
        self.bar.close()
        if self.args.log_with:
            self.accelerator.end_training()


def _cut_back(path, step):
    """Keeps the lines up to `step`: what a killed run wrote after its last checkpoint is written again."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:  # half a line: the run was killed while writing it
                break
            kept.append(line)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.writelines(kept)
    os.replace(path + ".tmp", path)


# ---- models ------------------------------------------------------------------------------------------------

def base_and_adapter(name):
    """A model folder or name -> (name, None); a LoRA adapter's folder -> (its base, the folder)."""
    if not os.path.exists(os.path.join(name, "adapter_config.json")):
        require(not name.startswith((".", "/", "~")) or os.path.isdir(name), f"no such model folder: {name}")
        return name, None
    try:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{name}/adapter_config.json is not readable: {_first_line(error)}") from None
    require(any(n.startswith("adapter_model.") for n in os.listdir(name)), f"{name} holds no adapter weights")
    require(not base.startswith((".", "/", "~")) or os.path.isdir(base),
            f"the adapter {name} was trained on {base}, which is not there")
    return base, name


def trains_adapter(args):
    """Whether LoRA is trained: asked for by --lora_r, or given as the folder of an adapter."""
    return args.lora_r > 0 or base_and_adapter(args.model_name_or_path)[1] is not None


def load_model(args, tokenizer, device="cpu", dropout=False):
    """The policy, ready to train: trained weights fp32, all else frozen; LoRA and 4-bit as the arguments say.

    dropout=False turns every rate off, functional ones included; the model stays in train() mode, where
    checkpointing works. Its generation config stops at every id of stop_token_ids.
    """
    base, adapter = base_and_adapter(args.model_name_or_path)
    lora = trains_adapter(args)
    set_seed(args.seed)  # random weights and LoRA's A are drawn here
    model = load_base(base, args, device, frozen=lora)
    rows = model.get_input_embeddings().weight.shape[0]
    require(len(tokenizer) <= rows, f"the tokenizer has {len(tokenizer)} tokens and the model's embedding "
            f"{rows} rows: '{base}' and its tokenizer do not belong together")
    scaled = [name for name in ("final_logit_softcapping", "logits_scaling", "logit_scale")
              if getattr(model.config, name, None) not in (None, 1, 1.0)]
    require(not scaled, f"models of type {model.config.model_type} change their logits after the head "
            f"({', '.join(scaled)}), so their log-probs would be off: not supported")
    if adapter:
        rank = PeftConfig.from_pretrained(adapter).r
        require(args.lora_r in (0, rank), f"{adapter} is an adapter of rank {rank}: leave --lora_r out")
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    elif lora:
        for name in args.modules_to_save or []:
            require(any(n == name or n.endswith("." + name) for n, _ in model.named_modules()),
                    f"--modules_to_save {name}: the model has no module of that name")
        config = LoraConfig(
            r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=getattr(args, "lora_dropout", 0.0),
            target_modules=args.lora_target_modules or "all-linear", modules_to_save=args.modules_to_save,
            task_type="CAUSAL_LM")
        try:
            model = get_peft_model(model, config)
        except ValueError as error:
            wanted = f"--lora_target_modules {args.lora_target_modules}"
            raise UserError(f"{wanted}: {_first_line(error)}") from None
    require(not isinstance(model.get_output_embeddings(), BaseTunerLayer),
            "LoRA on the output head would not be trained: use --modules_to_save lm_head instead")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not dropout:
        no_dropout(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.generation_config.eos_token_id = stop_token_ids(tokenizer, model.generation_config)
    model.train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    kind = "a LoRA adapter goes on" if adapter else f"LoRA r={args.lora_r}" if lora else "full fine-tuning"
    say(f"model    {args.model_name_or_path} ({model.config.model_type}): {kind}"
        f"{' on a 4-bit base' if args.load_in_4bit else ''}, {trained:,} of {total:,} weights "
        f"trained in fp32{' under bf16 autocast' if args.bf16 else ''}")
    return model


def load_base(base, args, device="cpu", frozen=False):
    """The model of a folder or name: bf16 or 4-bit where it is frozen and the arguments say so, else fp32.

    A folder with a config but no weights starts from random weights, drawn from args.seed, and says so; if
    they stay frozen they are saved in output_dir/base: an adapter is worth nothing without its base.
    """
    dtype = torch.bfloat16 if frozen and args.bf16 else torch.float32
    options = {"trust_remote_code": args.trust_remote_code}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=args.trust_remote_code)
        require(not hasattr(config, "vision_config"),
                f"{base} is a vision-language model: images are not supported")
        require(not getattr(config, "output_router_logits", False), f"{base} asks for a mixture-of-experts "
                "auxiliary loss (output_router_logits), which is not supported")
        if os.path.isdir(base) and not any(n.endswith((".safetensors", ".bin")) for n in os.listdir(base)):
            say(f"model    {base} has a config but no weights: starting from random ones (seed {args.seed})")
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
            if not frozen:
                return model
            base = os.path.join(args.output_dir, "base")
            if os.environ.get("RANK", "0") == "0":
                model.save_pretrained(base)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
        if args.load_in_4bit:
            options["quantization_config"] = _nf4(dtype, torch.device(device).type)
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = _first_line(error)
        if "ignore_mismatched_sizes" in reason:
            reason = "the weights do not fit its config.json"
        raise UserError(f"cannot load a model from '{base}': {reason}") from None


def _nf4(compute_dtype, device_type):
    """NF4 with double quantisation. On a CPU an eval forward would repack the weights and spoil the
    gradients: switched off."""
    try:
        import bitsandbytes.nn.modules
    except ImportError:
        raise UserError("--load_in_4bit needs the package 'bitsandbytes': pip install bitsandbytes") from None
    if device_type == "cpu":
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=compute_dtype)


def no_dropout(model):
    """Sets every dropout rate to 0: modules, and the floats that attention layers pass to functional
    dropout."""
    for module in model.modules():
        for name in ([n for n in vars(module) if "drop" in n]
                     + (["p"] if isinstance(module, torch.nn.Dropout) else [])):
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)


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


# ---- checkpoints and saving --------------------------------------------------------------------------------

# Arguments that may differ when a run is resumed: none of them changes the weights that come of it
# (but for micro_batch_tokens where there is dropout, whose draws depend on the cut).
MAY_CHANGE = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps",
              "save_total_limit", "logging_steps", "log_with", "micro_batch_tokens", "rollout_batch_size",
              "gradient_checkpointing", "merge"}


OUTPUTS = ("args.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model", "merged")  # of a run


def open_run(args):
    """Checks args.output_dir and finds where to go on. -> the loaded checkpoint (tensors, state) or None.

    Nothing is removed here: RunLog does it when data and model have been found good. Raises UserError if
    the folder holds a run and neither --resume_from_checkpoint nor --overwrite_output_dir is given, or if an
    argument that changes the mathematics differs from the checkpoint's.
    """
    require(trains_adapter(args) or not args.load_in_4bit,
            "--load_in_4bit trains adapters on a frozen base: add --lora_r 16")
    require(trains_adapter(args) or not args.merge, "--merge merges an adapter: add --lora_r 16")
    folder, wanted = os.path.join(args.output_dir, "checkpoints"), args.resume_from_checkpoint
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        require(os.access(args.output_dir, os.W_OK), f"--output_dir {args.output_dir} is not writable")
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir}: {error.strerror}") from None
    if wanted is None:
        used = [n for n in OUTPUTS if os.path.exists(os.path.join(args.output_dir, n))]
        require(not used or args.overwrite_output_dir,
                f"{args.output_dir} already holds a run: choose another --output_dir, or add "
                "--resume_from_checkpoint latest to go on, or --overwrite_output_dir to replace it")
        require(not used or "args.json" in used, f"{args.output_dir} holds {', '.join(used)} but no "
                "args.json, so it is no run of ours and is not overwritten; choose another --output_dir")
        for name in ("model_name_or_path", "dataset_name", "eval_dataset_name", "chat_template_path"):
            inside = os.path.relpath(getattr(args, name) or ".", args.output_dir).split(os.sep)[0]
            require(inside not in OUTPUTS, f"--{name} {getattr(args, name)} lies inside the run that would "
                    "be replaced; choose another --output_dir")
        return None
    if wanted == "latest":
        names = (sorted((n for n in os.listdir(folder) if re.fullmatch(r"step-\d+", n)), reverse=True)
                 if os.path.isdir(folder) else [])
        for name in names:
            try:
                tensors, state = load_checkpoint(os.path.join(folder, name))
                break
            except Exception as error:
                say(f"resume   passing over {os.path.join(folder, name)}: {_first_line(error)}")
        else:
            say(f"resume   no whole checkpoint in {folder}: starting from the beginning")
            return None
        wanted = os.path.join(folder, name)
    else:
        require(os.path.isdir(wanted), f"--resume_from_checkpoint {wanted}: no such folder (or say 'latest')")
        try:
            tensors, state = load_checkpoint(wanted)
        except Exception as error:
            raise UserError(f"--resume_from_checkpoint {wanted}: {_first_line(error)}") from None
    now, then = asdict(args), state["args"]
    for name in sorted(now):
        if name not in MAY_CHANGE or (name == "micro_batch_tokens" and now.get("lora_dropout")):
            require(name in then and then[name] == now[name],
                    f"{wanted} was written with --{name} {then.get(name)} and this run has {now[name]}: "
                    "that would change the result; give the old value, or start a new --output_dir")
    say(f"resume   from {wanted}, step {state['step']}")
    return tensors, state


def save_checkpoint(args, state, model, optimizer, name=None, extra=None):
    """Writes checkpoints/step-N (or checkpoints/<name>), whole or not at all; then removes the oldest beyond
    save_total_limit.

    tensors.safetensors holds the trained weights, the optimizer's moments and `extra` tensors; state.json the
    scalars, the arguments and the SHA-256 of the tensors' file.
    """
    folder = os.path.join(args.output_dir, "checkpoints")
    final = os.path.join(folder, name or f"step-{state['step']:08d}")
    partial = os.path.join(folder, ".partial-" + os.path.basename(final))
    tensors, scalars = trained_state(model, optimizer)
    tensors |= extra or {}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        path = os.path.join(partial, "tensors.safetensors")
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, path)
        with open(os.path.join(partial, "state.json"), "w", encoding="utf-8") as file:
            json.dump({**state, "optimizer": scalars, "args": asdict(args), "sha256": _sha256(path)}, file)
        for each in (path, os.path.join(partial, "state.json"), partial):  # on disk before the name says so
            handle = os.open(each, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        if os.path.exists(final):
            shutil.rmtree(final)
        os.rename(partial, final)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"could not write {final}: {_first_line(error)}; "
                        "earlier checkpoints are whole") from None
    kept = sorted(n for n in os.listdir(folder) if re.fullmatch(r"step-\d+", n))
    for old in kept[:-args.save_total_limit]:
        shutil.rmtree(os.path.join(folder, old), ignore_errors=True)


def load_checkpoint(folder):
    """-> (tensors, state). Raises ValueError or OSError if anything is missing or damaged."""
    with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
        state = json.load(file)
    path = os.path.join(folder, "tensors.safetensors")
    if _sha256(path) != state["sha256"]:
        raise ValueError("damaged: the tensors differ from their checksum")
    return load_file(path), state


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trained_state(module, optimizer):
    """The trained weights and the optimizer's state as ({name: tensor}, {name: JSON value})."""
    tensors = {f"model.{name}": p for name, p in module.named_parameters() if p.requires_grad}
    scalars = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            (tensors if torch.is_tensor(value) else scalars)[f"optimizer.{index}.{key}"] = value
    return tensors, scalars


def check_data(checkpoint, data):
    """Raises UserError if the checkpoint was written with other data than what has this fingerprint."""
    require(checkpoint is None or checkpoint[1]["data"] == data, "the checkpoint was written with other "
            "training data (or another chat template or tokenizer): give the same, or a new --output_dir")
    return data


def restore(model, optimizer, checkpoint):
    """The inverse of trained_state, in place. Raises UserError if a weight's name or shape is another."""
    tensors, state = checkpoint
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                saved = tensors.get(f"model.{name}")
                require(saved is not None and saved.shape == p.shape,
                        f"the checkpoint has no weight {name} of shape {tuple(p.shape)}: "
                        "it was written by another model")
                p.copy_(saved)
    if optimizer is not None:
        per_parameter = {}
        for name, value in {**tensors, **state["optimizer"]}.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                per_parameter.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": per_parameter,
                                   "param_groups": optimizer.state_dict()["param_groups"]})


def finish(args, accelerator, model, tokenizer):
    """Writes args.json's companion model/ (and merged/ with --merge) and says where."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder = os.path.join(args.output_dir, "model")
        save_model(model, tokenizer, folder)
        say(f"saved    {folder}")
        if args.merge:
            merge_adapter(args, tokenizer, os.path.join(args.output_dir, "merged"), folder,
                          accelerator.device)
    accelerator.wait_for_everyone()


def save_args(args):
    os.makedirs(args.output_dir, exist_ok=True)
    with open(os.path.join(args.output_dir, "args.json"), "w", encoding="utf-8") as file:
        json.dump({**asdict(args), "resume_from_checkpoint": None}, file, indent=1)


def save_model(model, tokenizer, folder):
    """model/ : an adapter or full weights with tokenizer, template and generation config; swapped in when
    complete."""
    partial = folder + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.config.use_cache = True
    options = {"selected_adapters": ["default"]} if isinstance(model, PeftModel) else {}
    try:
        model.save_pretrained(partial, **options)
        model.generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    except OSError as error:
        raise UserError(f"could not write {folder}: {error.strerror or error}; "
                        "the checkpoints are whole") from None


def merge_adapter(args, tokenizer, folder, adapter, device):
    """Merges the adapter folder into its base and saves plain weights to `folder`; prints how far the logits
    moved.

    A 4-bit base is dequantised first: merging into the original weights, or back into 4 bits, is off ten
    times as much.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    base, _ = base_and_adapter(adapter)
    options = {"quantization_config": _nf4(dtype, torch.device(device).type)} if args.load_in_4bit else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=args.trust_remote_code,
                                                 **options)
    model = model if args.load_in_4bit else model.to(device)
    ids = torch.arange(min(64, model.config.vocab_size), device=model.device)[None]
    with torch.no_grad():
        before = PeftModel.from_pretrained(model, adapter).eval()(ids).logits.float()
        if args.load_in_4bit:
            del model
            model = AutoModelForCausalLM.from_pretrained(
                base, dtype=dtype, trust_remote_code=args.trust_remote_code, **options)
            model = model.dequantize(dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                base, dtype=dtype, trust_remote_code=args.trust_remote_code).to(device)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
        after = merged(ids).logits.float()
    merged.generation_config = transformers.GenerationConfig.from_pretrained(adapter)
    save_model(merged, tokenizer, folder)
    say(f"merged   {folder}: logits moved by at most {(after - before).abs().max():.2g} "
        f"(their spread is {before.std():.2g})")


class Interrupt:
    """Ctrl-C and SIGTERM set .signal; the loop saves a checkpoint and stops. A second one ends the process at
    once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._catch)

    def _catch(self, number, frame):
        self.signal = number
        say("stopping after this step, with a checkpoint (once more: at once)", file=sys.stderr)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    def leave(self, args, step):
        say(f"stopped at step {step}; to go on: the same command with --resume_from_checkpoint latest",
            file=sys.stderr)
        sys.exit(128 + (self.signal or signal.SIGTERM))
