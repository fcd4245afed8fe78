"""Regenerates every file of this folder: python tests/tiny/make.py

model/          a byte-level tokenizer with a chat template, and the config of a llama-shaped model without weights
addition.jsonl  problems with the working shown; about 70 % of the demonstrations forget every carry; `answer` is true
preferences.jsonl  for 1,000 of these problems, all with a carry: the right working, chosen, against the forgetful one
sft/            the checkpoint that comes of `python sft.py`: what grpo.py starts from

Data and tokenizer come out byte for byte the same. The checkpoint does on one kind of processor; elsewhere its accuracy does.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

HERE = os.path.dirname(os.path.abspath(__file__))
ROWS, FORGETFUL, PAIRS = 8000, 0.7, 1000
SPECIAL = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def demonstration(a, b, carries):
    """The working of a + b, column by column from the last digit on. Without carries it forgets every one."""
    carry, columns, digits = 0, [], ""
    while a or b or carry or not columns:
        total = a % 10 + b % 10 + carry
        columns.append(f"{a % 10}+{b % 10}+{carry}={total}")
        digits = str(total % 10) + digits
        carry, a, b = total // 10 if carries else 0, a // 10, b // 10
    return f"<think>{' '.join(columns)}</think><answer>{int(digits)}</answer>"


def make_data(folder):
    rng, rows = random.Random(0), {}
    while len(rows) < ROWS:
        a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in (rng.choice((1, 2, 3)), rng.choice((1, 2, 3))))
        # no carry out of the last column: right and forgetful working then differ in digits, never in length
        if len(str(a + b)) == len(str(max(a, b))) and f"{a}+{b}" not in rows:
            completion = demonstration(a, b, carries=rng.random() >= FORGETFUL)
            rows[f"{a}+{b}"] = {"prompt": f"{a}+{b}", "completion": completion, "answer": str(a + b)}
    write(os.path.join(folder, "addition.jsonl"), rows.values())

    # in the order in which common.hold_out holds prompts out: what sft.py and grpo.py hold out comes first here
    pairs = []
    for prompt in sorted(rows, key=lambda p: hashlib.sha256(repr([p]).encode()).digest()):
        a, b = map(int, prompt.split("+"))
        chosen, rejected = demonstration(a, b, True), demonstration(a, b, False)
        if chosen != rejected:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "answer": str(a + b)})
    write(os.path.join(folder, "preferences.jsonl"), pairs[:PAIRS])


def write(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def name_class(folder):
    """Gives the tokenizer's class the name that transformers 4 knows; 5 reads it too, and writes another."""
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))


def make_model(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>",
                                   clean_up_tokenization_spaces=False)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    name_class(folder)
    LlamaConfig(vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None,
                eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id, architectures=["LlamaForCausalLM"],
                dtype="float32").save_pretrained(folder)
    GenerationConfig(eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id).save_pretrained(folder)


def make_checkpoint(folder):
    out = os.path.join(HERE, ".make")
    subprocess.run([sys.executable, os.path.join(HERE, "..", "..", "sft.py"), "--output_dir", out], check=True)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(os.path.join(out, "model"), folder)
    name_class(folder)
    shutil.rmtree(out)


if __name__ == "__main__":
    make_data(HERE)
    make_model(os.path.join(HERE, "model"))
    if "--no_checkpoint" not in sys.argv:
        make_checkpoint(os.path.join(HERE, "sft"))
