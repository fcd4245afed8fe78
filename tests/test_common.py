"""common.py, arguments and data: every format under every kind of template, to the last token; files; --help."""

import copy
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import TINY, run, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Phi3Config, PreTrainedTokenizerFast

import common
import dpo
import grpo
import ppo
import reward_model
import sft
from common import arg

# ---- templates and tokenizers ------------------------------------------------------------------------------

TAIL = "{% if add_generation_prompt %}{{ HEAD }}{% endif %}"
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
          "{% endfor %}" + TAIL.replace("HEAD", r"'<|im_start|>assistant\n'"))
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' }}"
          "{{ m['content'] | trim + '<|eot|>' }}{% endfor %}" + TAIL.replace("HEAD",
                                                            r"'<|head|>assistant<|/head|>\n\n'"))
BARE = ("{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
        + TAIL.replace("HEAD", r"'assistant:\n'"))
QWEN3 = (  # as the stock one: only the last answer shows its reasoning, in a block that may be empty
    "{% for m in messages %}{% set c = m['content'] %}{% set r = '' %}"
    "{% if m['role'] == 'assistant' and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}"
    "{{ c + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")
R1 = QWEN3.replace("and loop.last", "and false").replace("assistant\n' }}{% if enable",
                                                         "assistant\n<think>\n' }}{% if enable")
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(template, specials=(), eos="<|end|>", bos=None, adds_bos=False, pad="<|pad|>", corpus=None,
                   trim=False):
    """A byte-level tokenizer; with a corpus, a BPE whose merges know no word boundary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                          use_regex=trim), decoders.ByteLevel()
    if corpus:
        t.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet,
                                                          show_progress=False))
    t.add_special_tokens([AddedToken(x, special=True, normalized=False)
                          for x in dict.fromkeys([eos, pad, *filter(None, [bos]), *specials])])
    if trim or adds_bos:
        steps = [processors.ByteLevel(trim_offsets=trim)] + ([processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])] if adds_bos else [])
        t.post_processor = processors.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=t, eos_token=eos, pad_token=pad, bos_token=bos,
                                   clean_up_tokenization_spaces=False)
    fast.chat_template = template
    return fast


with open(os.path.join(TINY, "model", "chat_template.jinja")) as file:
    TINY_TEMPLATE = file.read()
TINY_SPECIALS = ["<|system|>", "<|user|>", "<|assistant|>"]

# name -> tokenizer, what comes before the whole, and for a role: header, end of turn, what comes after it
TEMPLATES = {
    "tiny": (make_tokenizer(TINY_TEMPLATE, TINY_SPECIALS), "", lambda r: (f"<|{r}|>", "<|end|>", "")),
    "pad is eos": (make_tokenizer(TINY_TEMPLATE, TINY_SPECIALS, pad="<|end|>"), "",
                   lambda r: (f"<|{r}|>", "<|end|>", "")),
    "chatml": (make_tokenizer(CHATML, IM, "<|endoftext|>", pad="<|endoftext|>"), "",
               lambda r: (f"<|im_start|>{r}\n", "<|im_end|>", "\n")),
    "llama3": (make_tokenizer(LLAMA3, ["<|head|>", "<|/head|>", "<|eot|>"], "<|eos|>", "<|bos|>", True,
                              trim=True), "<|bos|>",
               lambda r: (f"<|head|>{r}<|/head|>\n\n", "<|eot|>", "")),
    "plain": (make_tokenizer(common.PLAIN_TEMPLATE, bos="<s>", adds_bos=True, trim=True), "<s>", lambda r: {
        "system": ("", "", "\n\n"), "user": ("User:\n", "", "\n\n"),
        "assistant": ("Assistant:\n", "<|end|>", "\n\n")}[r]),
}


def marked(tokenizer, example):
    """The decoded ids with the trained stretches in [[ ]]."""
    text = ""
    for trained, at in groupby(range(len(example["input_ids"])), key=lambda i: example["mask"][i]):
        piece = tokenizer.decode([example["input_ids"][i] for i in at])
        text += f"[[{piece}]]" if trained else piece
    return text


def encode(tokenizer, messages, **options):
    return [marked(tokenizer, e) for e in common.encode_conversation(tokenizer, messages, **options)]


def chat(*contents, train=True):
    """user, assistant, user, assistant, ..."""
    return [common.turn(("user", "assistant")[i % 2], c, train) for i, c in enumerate(contents)]


# ---- one golden case a format x template -------------------------------------------------------------------

U, A, S = "user", "assistant", "system"
CASES = {  # format -> rows and the turns they stand for; "+" marks a trained one
    "messages": [
        ({"messages": [{"role": S, "content": "be"}, {"role": U, "content": "hi"},
                       {"role": A, "content": "no", "weight": 0},
                       {"role": U, "content": [{"type": "text", "text": "你好"}]},
                       {"role": A, "content": "好 🙂", "weight": 1}]},
         [(S, "be"), (U, "hi"), (A, "no"), (U, "你好"), ("+", "好 🙂")]),
        ({"messages": [{"role": "developer", "content": "be"}, {"role": U, "content": "a"},
                       {"role": A, "content": "b"},
                       {"role": U, "content": "c"}, {"role": A, "content": "d"},
                       {"role": U, "content": "and"}]},
         [(S, "be"), (U, "a"), ("+", "b"), (U, "c"), ("+", "d")])],
    "conversations": [
        ({"conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "a"},
                            {"from": "gpt", "value": "b"}]},
         [(A, "hello"), (U, "a"), ("+", "b")]),
        ({"conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "a"},
                            {"from": "gpt", "value": "b"}], "system": "be"},
         [(S, "be"), (A, "hello"), (U, "a"), ("+", "b")]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "be"},
         [(S, "be"), (U, "a"), ("+", "b")])],
    "alpaca": [
        ({"instruction": "sum", "input": "", "output": "3"}, [(U, "sum"), ("+", "3")]),
        ({"instruction": "sum", "input": "1 2", "output": "3", "system": "be", "history": [["a", "b"]]},
         [(S, "be"), (U, "a"), ("+", "b"), (U, "sum\n1 2"), ("+", "3")])],
    "prompt_completion": [
        ({"prompt": "a\n", "completion": "b"}, [(U, "a\n"), ("+", "b")]),
        ({"prompt": "a", "completion": "b", "system": "be"}, [(S, "be"), (U, "a"), ("+", "b")]),
        ({"prompt": [{"role": U, "content": "a"}, {"role": A, "content": "b"}, {"role": U, "content": "c"}],
          "completion": [{"role": A, "content": "d"}]}, [(U, "a"), (A, "b"), (U, "c"), ("+", "d")])],
    "question_answer": [({"question": "1+1?", "answer": "1+1=2\n#### 2"},
                         [(U, "1+1?"), ("+", "1+1=2\n#### 2")])]}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", CASES)
def test_every_format_under_every_template(kind, name):
    tokenizer, opening, parts = TEMPLATES[name]
    for row, turns in CASES[kind]:
        assert common.find_format([(row, "here")], common.SFT_FORMATS) == kind
        want = opening
        for role, content in turns:
            header, end, after = parts(A if role == "+" else role)
            content = content.strip() if name == "llama3" else content
            want += header + (f"[[{content}{end}]]" if role == "+" else content + end) + after
        assert encode(tokenizer, common.to_conversation(row, kind)["messages"]) == [want]


@pytest.mark.parametrize("row, kind, want", [
    ({"prompt": "a"}, "prompt", "<|user|>a<|end|><|assistant|>"),
    ({"prompt": [{"role": U, "content": "a"}, {"role": A, "content": "b"}, {"from": "human", "value": "c"}]},
     "prompt",
     "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"),
    ({"instruction": "sum", "input": "1 2"}, "instruction", "<|user|>sum\n1 2<|end|><|assistant|>"),
    ({"instruction": "sum", "input": ""}, "instruction", "<|user|>sum<|end|><|assistant|>"),
    ({"question": "q", "answer": "1"}, "question", "<|user|>q<|end|><|assistant|>")])
def test_every_prompt_format(row, kind, want, tokenizer):
    assert common.find_format([(row, "here")], common.PROMPT_FORMATS) == kind
    for system, own, opening in ((None, {}, ""), ("be", {}, "<|system|>be<|end|>"),
                                 ("be", {"system": "own"}, "<|system|>own<|end|>")):
        prompt, messages = common.to_prompt(row | own, kind, system)
        assert prompt == row[kind] and tokenizer.decode(common.encode_prompt(tokenizer,
                                                            messages)) == opening + want


def test_the_system_prompt_goes_to_rows_that_have_none(tokenizer):
    got = common.to_conversation({"question": "q", "answer": "a"}, "question_answer", "be")["messages"]
    assert encode(tokenizer, got) == ["<|system|>be<|end|><|user|>q<|end|><|assistant|>[[a<|end|>]]"]
    row = {"messages": [{"role": S, "content": "own"}, *chat("q", "a")]}
    assert [m["content"] for m in common.to_conversation(row, "messages", "be")["messages"]] == ["own", "q",
                                                            "a"]


def test_raw_text_has_one_bos_and_one_eos_and_all_of_it_counts(tokenizer):
    bos = TEMPLATES["plain"][0]
    both = copy.deepcopy(bos)  # it adds an EOS too
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A <|end|>", special_tokens=[
        (token, bos.convert_tokens_to_ids(token)) for token in ("<s>", "<|end|>")])
    for t, text, want in ((tokenizer, "hi", "[[hi<|end|>]]"), (tokenizer, "hi<|end|>", "[[hi<|end|>]]"),
                          (bos, "hi", "[[<s>hi<|end|>]]"), (bos, "<s>hi", "[[<s>hi<|end|>]]"),
                          (both, "hi", "[[<s>hi<|end|>]]"), (both, "<s>hi<|end|>", "[[<s>hi<|end|>]]")):
        encoded, = common.encode_sft(t, common.to_conversation({"text": text}, "text"))
        assert marked(t, encoded) == want


# ---- templates that make trouble ---------------------------------------------------------------------------

def test_a_template_without_an_end_of_turn_token_gets_eos():
    t = make_tokenizer(BARE)
    assert encode(t, chat("a", "b", "c", "d")) == [  # a row each: no answer may be trained without its end
        "user:\na\nassistant:\n[[b<|end|>]]",
        "user:\na\nassistant:\nb\nuser:\nc\nassistant:\n[[d<|end|>]]"]
    assert encode(t, chat("a", "b"), completion_only_loss=False) == ["[[user:\na\nassistant:\nb<|end|>]]"]
    assert common.stop_token_ids(t) == [t.eos_token_id]


def test_a_thinking_template_gives_one_example_a_turn():
    t = make_tokenizer(QWEN3, IM, "<|endoftext|>")
    user, assistant, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
    first = f"{user}a{end}{assistant}[[<think>\n1\n</think>\n\nb<|im_end|>]]\n"
    second = f"{user}a{end}{assistant}b{end}{user}c{end}{assistant}[[<think>\n2\n</think>\n\nd<|im_end|>]]\n"
    turns = chat("a", "<think>\n1\n</think>\n\nb", "c", "<think>2</think>d")
    assert encode(t, turns) == [first, second]
    turns[1]["train"] = False
    assert encode(t, turns) == [second]
    turns[1]["train"], turns[3]["train"] = True, False
    assert encode(t, turns) == [first]
    t.chat_template = "{% set enable_thinking = False %}" + QWEN3  # the empty block is now part of the prompt
    assert encode(t, chat("a", "b")) == [f"{user}a{end}{assistant}<think>\n\n</think>\n\n[[b<|im_end|>]]\n"]


def test_reasoning_that_the_template_strips_is_an_error_and_not_lost():
    t = make_tokenizer(R1, IM, "<|endoftext|>")  # its header opens <think>, its answers never show it
    assert encode(t, chat("a", "<answer>b")) == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[<answer>b<|im_end|>]]\n"]
    with pytest.raises(ValueError, match="leaves out message 1 .assistant. or a part of it"):
        encode(t, chat("a", "<think>why</think>b"))


def test_a_system_message_that_the_template_passes_over_or_refuses_is_an_error():
    heard = "{% if loop.first or m['role'] != 'system' %}"
    deaf = CHATML.replace("{{", heard + "{{", 1).replace("}}{% endfor", "}}{% endif %}{% endfor")
    deaf = make_tokenizer(deaf, IM, "<|endoftext|>")
    twice = [common.turn(S, "one"), common.turn(S, "two"), *chat("a", "b")]
    with pytest.raises(ValueError, match="leaves out message 1 .system."):
        encode(deaf, twice)
    with pytest.raises(ValueError, match="leaves out message 1 .system."):
        common.encode_prompt(deaf, twice[:-1])
    assert len(encode(TEMPLATES["chatml"][0], twice)) == 1  # it renders both
    strict = make_tokenizer("{% for m in messages %}{% if m['role'] == 'system' %}"
                            "{{ raise_exception('no system here') }}{% endif %}"
                            "{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="refuses this conversation: no system here"):
        encode(strict, twice)


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_that_is_half_prompt_stays_untrained_and_is_counted(trim):
    """BPE merges across the boundary: the tokens of the prompt alone are not a prefix of the whole."""
    template = "{% for m in messages %}{{ ('Q: ' if m['role'] == 'user' else '= ') + m['content'] }}"
    template += "{% endfor %}" + TAIL.replace("HEAD", "'= '")
    t = make_tokenizer(template, corpus=["Q: two= four", "= four", "= four five"] * 20, trim=trim)
    messages = chat("two", "four five")
    prompt, (example,) = common.encode_prompt(t, messages[:1]), common.encode_conversation(t, messages)
    assert example["input_ids"][:len(prompt)] != prompt and example["notes"] == {common.SHIFTED: 1}
    text = marked(t, example)
    assert text.replace("[[", "").replace("]]", "") == "Q: two= four five<|end|>"
    assert text.startswith("Q: two= f") and text.endswith("five<|end|>]]") and "[[" in text


def test_completion_only_loss_false_counts_everything():
    t = TEMPLATES["chatml"][0]
    assert encode(t, chat("a", "b"), completion_only_loss=False) == [
        "[[<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n]]"]


def test_stop_ids_are_eos_end_of_turn_and_those_of_the_generation_config():
    t = make_tokenizer(CHATML, IM, "<|endoftext|>")
    eos, end = t.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert common.stop_token_ids(t) == sorted([eos, end])
    for given, more in ((7, [7]), ([7, eos], [7]), (None, [])):
        assert common.stop_token_ids(t, SimpleNamespace(eos_token_id=given)) == sorted([eos, end, *more])
    with pytest.raises(common.UserError, match=r"the model's eos_token_id is no token id: \['</s>', 2\]"):
        common.stop_token_ids(t, SimpleNamespace(eos_token_id=["</s>", 2]))
    with pytest.raises(common.UserError, match="is no token id: .1000"):
        common.stop_token_ids(t, SimpleNamespace(eos_token_id=10**400))
    t.chat_template = BARE  # nothing remembered of the old template
    assert common.stop_token_ids(t) == [eos]


def test_load_tokenizer(tmp_path, capsys):
    t = make_tokenizer(None)
    t.pad_token = None
    t.save_pretrained(tmp_path)
    args = SimpleNamespace(model_name_or_path=str(tmp_path), trust_remote_code=False, chat_template_path=None,
                           chat_template_kwargs=None)
    got = common.load_tokenizer(args)
    assert got.chat_template == common.PLAIN_TEMPLATE and got.pad_token == "<|end|>"
    assert "has none" in capsys.readouterr().out
    assert encode(got, chat("a", "b", "c", "d")) == [
        "User:\na\n\nAssistant:\n[[b<|end|>]]\n\nUser:\nc\n\nAssistant:\n[[d<|end|>]]\n\n"]
    (tmp_path / "t.jinja").write_text(BARE)
    args.chat_template_path = str(tmp_path / "t.jinja")
    assert common.load_tokenizer(args).chat_template == BARE
    for name, value, sentence in (("chat_template_kwargs", "[1]", "must be a JSON object"),
                                  ("chat_template_path", "no", "cannot read"),
                                  ("model_name_or_path", str(tmp_path / "no"), "no such model folder")):
        with pytest.raises(common.UserError, match=sentence):
            common.load_tokenizer(SimpleNamespace(**{**vars(args), name: value}))


def test_a_tokenizer_that_is_built_otherwise_than_its_file_is_said(tmp_path, capsys):
    """transformers builds some classes anew, with word boundaries of its own, and saves them so."""
    t = make_tokenizer(CHATML, IM, "<|endoftext|>", corpus=["\n\n\tx"] * 9)
    args = SimpleNamespace(model_name_or_path=str(tmp_path), trust_remote_code=False, chat_template_path=None, chat_template_kwargs=None)
    for name, told in (("PreTrainedTokenizerFast", False), ("GPT2Tokenizer", True)):
        t.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        got = common.load_tokenizer(args)
        assert (got("It's 12345\n\n\tx  [/INST]")["input_ids"] != t("It's 12345\n\n\tx  [/INST]")["input_ids"]) == told
        assert ("warning  transformers splits words otherwise than" in capsys.readouterr().out) == told
    os.remove(tmp_path / "tokenizer.json")  # nothing to compare with
    common.load_tokenizer(SimpleNamespace(**vars(args) | {"model_name_or_path": f"{TINY}/model"}))
    assert "splits words" not in capsys.readouterr().out


def test_a_completions_text_is_what_was_sampled(tmp_path):
    """A tokenizer may join commas and stops to the word before them when it decodes."""
    names = ["<|end|>", " ", *"12,.[]"]
    t = Tokenizer(models.Unigram([(name, 0.0) for name in names], unk_id=0))
    t.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|end|>", clean_up_tokenization_spaces=True).save_pretrained(tmp_path)
    got = common.load_tokenizer(SimpleNamespace(model_name_or_path=str(tmp_path), trust_remote_code=False, chat_template_path=None,
                                                chat_template_kwargs=None))
    ids = got("[1 , 2 .]")["input_ids"]
    assert got.decode(ids) == "".join(common.token_texts(got, ids)) == "[1 , 2 .]"


# ---- templates that do not behave ---------------------------------------------------------------------------

NO_PROMPT = TINY_TEMPLATE.partition("{% if add")[0]
INST = "{% for m in messages %}{{ '[INST]' + m['content'] + '[/INST]' if m['role'] == 'user' else m['content'] + '<|end|>' }}{% endfor %}"


def load(folder, template, **more):
    """load_tokenizer of the tiny model under another chat template."""
    (folder / "t.jinja").write_bytes(template.encode())
    args = dict(model_name_or_path=f"{TINY}/model", trust_remote_code=False, chat_template_kwargs=None)
    return common.load_tokenizer(SimpleNamespace(**args | {"chat_template_path": str(folder / "t.jinja")} | more))


def test_a_template_without_generation_prompt_is_refused_where_answers_have_a_header(tmp_path):
    with pytest.raises(common.UserError, match=r"t.jinja: the chat template has no generation prompt: '<.assistant.>'.*"
                       r"end the template with {% if add_generation_prompt %}<.assistant.>{% endif %}"):
        load(tmp_path, NO_PROMPT)
    t = load(tmp_path, INST)  # an answer follows the question at once: nothing is missing
    assert encode(t, chat("a", "b")) == ["[INST]a[/INST][[b<|end|>]]"]
    always = NO_PROMPT.replace("{% endfor", "{% if m['role'] == 'user' %}<|assistant|>{% endif %}{% endfor").replace(
        "'<|' + m['role'] + '|>'", "('' if m['role'] == 'assistant' else '<|user|>')")
    assert encode(load(tmp_path, always), chat("a", "b")) == ["<|user|>a<|end|><|assistant|>[[b<|end|>]]"]


def test_a_byte_order_mark_before_a_template_is_no_part_of_it(tmp_path):
    assert encode(load(tmp_path, "\ufeff" + TINY_TEMPLATE), chat("a", "b")) == ["<|user|>a<|end|><|assistant|>[[b<|end|>]]"]
    t = make_tokenizer(TINY_TEMPLATE, TINY_SPECIALS)
    t.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(("\ufeff" + TINY_TEMPLATE).encode())
    assert load(tmp_path, "", chat_template_path=None, model_name_or_path=str(tmp_path)).chat_template == TINY_TEMPLATE


def test_the_mask_ends_at_the_first_stop_token():
    """phi-3 puts EOS behind its end of turn, and a text may hold one: a rollout samples neither."""
    phi = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|stop|>\n' }}{% endfor %}"
    phi += "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    t = make_tokenizer(phi, ["<|user|>", "<|assistant|>", "<|stop|>"])
    first, second = "<|user|>\na<|stop|>\n<|assistant|>\n", "<|stop|>\n<|user|>\nc<|stop|>\n<|assistant|>\n"
    assert encode(t, chat("a", "b", "c", "d")) == [f"{first}[[b<|stop|>]]\n<|end|>", f"{first}b{second}[[d<|stop|>]]\n<|end|>"]
    assert encode(t, chat("a", "b<|end|>")) == ["<|user|>\na<|stop|>\n<|assistant|>\n[[b<|end|>]]<|stop|>\n<|end|>"]


def test_a_template_that_ends_an_answer_with_the_next_role_trains_that():
    """GLM-4: no end of turn; the model stops by asking for the next message."""
    glm = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}" + TAIL.replace("HEAD", r"'<|assistant|>\n'")
    t = make_tokenizer(glm, ["<|user|>", "<|assistant|>"])
    assert encode(t, chat("a", "b", "c", "d")) == ["<|user|>\na<|assistant|>\n[[b<|user|>]]\nc<|assistant|>\n[[d<|end|>]]"]
    assert common.stop_token_ids(t) == sorted(t.convert_tokens_to_ids(["<|user|>", "<|end|>"]))


def test_answers_that_begin_otherwise_than_sampled_ones_are_counted(tokenizer):
    r1, counts = make_tokenizer(R1, IM, "<|endoftext|>"), common.Counter()
    items = [({"messages": chat("a", text)}, {}, "here") for text in ("b", "c")]
    common.encode_rows(items, lambda said, row: common.encode_sft(r1, said), 99, counts)
    assert counts[common.UNASKED] == 2 and "2 with an answer that does not begin as" in common.counted(counts)
    (pair,), counts = [(common.to_pair({"prompt": "q", "chosen": "a", "rejected": "b"}, "prompt_pair"), {}, "here")], common.Counter()
    common.encode_pairs([pair], r1, 99, counts)
    assert counts[common.UNASKED] == 1
    counts.clear()
    common.encode_rows(items, lambda said, row: common.encode_sft(tokenizer, said), 99, counts)
    assert counts[common.UNASKED] == 0


DATED = "{% if strftime_now is defined %}{{ strftime_now(FORMAT) + '\n' }}{% endif %}" + TINY_TEMPLATE


def test_the_day_in_a_template_is_the_runs_own(tmp_path, monkeypatch):
    """A resume or a repetition the next day trains on the same text; the template itself is saved as it is."""
    (tmp_path / "t.jinja").write_text(DATED.replace("FORMAT", "'%d %b %Y'"))
    flags = [f"{TINY}/sft.json", "--chat_template_path", f"{tmp_path}/t.jinja", "--output_dir", f"{tmp_path}/o"]
    real, day = common.time.strftime, ["2026-03-01"]
    monkeypatch.setattr(common.time, "strftime", lambda form, *when: real(form, *when) if when else day[0])
    one = common.Run(common.parse_args(sft.Args, flags))
    assert encode(one.tokenizer, chat("a", "b")) == ["01 Mar 2026\n<|user|>a<|end|><|assistant|>[[b<|end|>]]"]
    one.tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == (tmp_path / "t.jinja").read_text()
    day[0] = "2026-03-02"
    monkeypatch.setattr(common, "find_checkpoint", lambda args: ("step-1", {"args": common.asdict(one.args), "weights": {}, "optimizer": {}, **one.state}))
    two = common.Run(common.parse_args(sft.Args, flags))
    assert two.args.date == "2026-03-01" and encode(two.tokenizer, chat("a", "b")) == encode(one.tokenizer, chat("a", "b"))
    with pytest.raises(common.UserError, match="with --date 2026-03-01 and this run has 2026-03-02"):
        common.Run(common.parse_args(sft.Args, [*flags, "--date", "2026-03-02"]))
    with pytest.raises(common.UserError, match="--date 1 March: expected a day such as 2026-03-01"):
        common.parse_args(sft.Args, [*flags, "--date", "1 March"])


def test_a_day_that_cannot_be_fixed_is_refused_and_a_scorer_keeps_its_own(tmp_path):
    with pytest.raises(common.UserError, match="asks for the date in a way that cannot be held fixed"):
        load(tmp_path, "{% set f = '%d' %}" + DATED.replace("FORMAT", "f"), date="2026-03-01")
    load(tmp_path, DATED.replace("FORMAT", '"%A"'), date="2026-03-01").save_pretrained(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert common.render(saved, chat("a")).startswith("Sunday\n<|user|>")


# ---- cutting and padding -----------------------------------------------------------------------------------

def test_truncate_takes_the_prompts_start_down_to_half_then_the_completions_end():
    ids, mask = list(range(10)), [0] * 6 + [1] * 4
    for length, want in ((10, range(10)), (8, [0, *range(3, 10)]), (5, [0, 5, 6, 7, 8])):  # the first one, a BOS to some, stays
        row, = common.encode_rows([({}, {}, "")], lambda *_: [{"input_ids": ids, "mask": mask, "start": 6, "notes": {}}],
                                  length, common.Counter())
        assert row["input_ids"].tolist() == list(want) and row["mask"].tolist() == [int(i >= 6) for i in want]
    assert [common.kept_part(10, answer, 4) for answer in (0, 1)] == [slice(0, 4)] * 2
    assert common.kept_part(10, 6, 1) == slice(6, 7)


def test_a_prompt_that_is_trained_too_loses_its_start_all_the_same(tokenizer):
    """--completion_only_loss False: of a prompt of 3,000 letters and an answer the answer is left, not the prompt alone."""
    messages = [common.turn("user", "q" * 3000), common.turn("assistant", "yes")]
    row, = common.encode_rows([({"messages": messages}, {}, "")], lambda c, _: common.encode_sft(tokenizer, c, False), 100, common.Counter())
    assert len(row["input_ids"]) == 100 and row["trained"] == 99 and tokenizer.decode(row["input_ids"]).endswith("yes<|end|>")
    text, = common.encode_rows([({"text": "a" * 90 + "b" * 90}, {}, "")], lambda c, _: common.encode_sft(tokenizer, c), 100, common.Counter())
    assert tokenizer.decode(text["input_ids"]) == "a" * 90 + "b" * 10  # a text loses its end


def test_batches_of_epochs_are_counted_without_rounding_errors():
    def steps(rows, epochs, most=-1, updates=1):
        return common.steps_of(range(rows), SimpleNamespace(batch_size=2, num_train_epochs=epochs, max_steps=most), updates)
    assert [steps(100, epochs) for epochs in (1, 1.1, 0.5, 1.01, 0)] == [(50, 50), (50, 55), (50, 25), (50, 51), (50, 0)]  # 50 * 1.1 > 55
    assert steps(5, 2) == (3, 6) and steps(5, 2, 7) == (3, 7) and steps(5, 2, 7, 2) == (3, 4)


def test_pad():
    assert common.pad([[1, 2], [], [3]], 9).tolist() == [[1, 2], [9, 9], [3, 9]]
    assert common.pad([[1, 2], [3]], 9, side="left").tolist() == [[1, 2], [9, 3]]
    assert common.pad([torch.tensor([0.5])], 0.0, dtype=torch.float32).tolist() == [[0.5]]


def test_pad_rows_by_hand():
    """One number a token: 0 where the mask is 0, and in the row that lacks the field though it is the longest."""
    long, short = common.make_row([1] * 5, [0, 1, 1, 1, 1]), common.make_row([2] * 3, [0, 1, 1], x=torch.ones(3))
    mb = common.pad_rows([long, short], ["x"], "cpu")
    assert mb.input_ids.tolist() == [[1] * 5, [2, 2, 2, 0, 0]] and mb.input_ids.dtype == torch.long
    assert mb.mask.tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]] and mb.mask.dtype == torch.float32
    assert mb.x.tolist() == [[0] * 5, [0, 1, 1, 0, 0]] and mb.x.dtype == torch.float32


def test_pad_rows_takes_a_number_of_the_whole_row():
    """(B, 1) where no row has a number a token; beside rows that do, it is the number of each trained token."""
    rows = [common.make_row([1] * 4, [0, 0, 1, 1], x=2.5, y=torch.arange(4.)), common.make_row([1, 1], [0, 1], y=7)]
    mb = common.pad_rows(rows, ["x", "y", "z"], "cpu")
    assert mb.x.tolist() == [[2.5], [0]] and mb.z.tolist() == [[0], [0]]
    assert mb.y.tolist() == [[0, 0, 2, 3], [0, 7, 0, 0]]


def test_make_row_never_trains_on_token_0():
    row = common.make_row([5, 6, 7], [1, 0, 1], note="n")
    assert row["mask"].tolist() == [0, 0, 1] and row["trained"] == 1 and row["note"] == "n"
    assert (row["input_ids"].dtype, row["mask"].dtype) == (torch.int32, torch.int8)


def test_upto_answer_ends_with_the_end_of_turn_and_keeps_the_rest(tokenizer):
    part = {"input_ids": [1, 2, 3, 4, 5, 6], "mask": [0, 1, 0, 1, 0, 0], "notes": {"x": 1}}
    assert common.upto_answer(part) == {"input_ids": [1, 2, 3, 4], "mask": [0, 1, 0, 1], "notes": {"x": 1}}
    assert part["mask"] == [0, 1, 0, 1, 0, 0]
    chatml = TEMPLATES["chatml"][0]
    (part,) = common.encode_conversation(chatml, chat("a", "b"))
    assert marked(chatml, part).endswith("[[b<|im_end|>]]\n")
    assert marked(chatml, common.upto_answer(part)).endswith("[[b<|im_end|>]]")


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("limit", [1, 64, 1000, 10**9])
@pytest.mark.parametrize("lengths", [[9], [3, 50, 3, 8, 8, 1], [(i * 37) % 61 + 1 for i in range(83)]], ids=len)
def test_cut_keeps_every_row_once_and_the_limit(lengths, limit, processes):
    shares = [common.cut(lengths, limit, i, processes) for i in range(processes)]
    assert len(set(map(len, shares))) == 1, "every process waits for as many"
    assert sorted(i for share in shares for places in share for i in places) == list(range(len(lengths)))
    for share in shares:
        for places in share:
            assert len(places) * max((lengths[i] for i in places), default=0) <= limit or len(places) == 1
        dealt = [lengths[i] for places in share for i in places]
        assert dealt == sorted(dealt, reverse=True), "a step that does not fit is to fail at its beginning"
        full = [places for places in share if places]
        assert share == full + [[]] * (len(share) - len(full))
        for places, after in zip(full, full[1:]):  # none is cut before the limit
            assert (len(places) + 1) * lengths[places[0]] > limit and lengths[after[0]] <= lengths[places[-1]]
    rows = [sum(map(len, share)) for share in shares]
    assert max(rows) - min(rows) <= 1


def test_cut_of_nothing_is_one_empty_micro_batch():
    assert [common.cut([], 64, i, 2) for i in range(2)] == [[[]], [[]]]


def test_shuffled_takes_every_row_once_an_epoch_in_another_order():
    rows = list(range(10))
    epochs = [[common.shuffled(rows, 4 * e + n, 3, 0) for n in range(4)] for e in range(2)]
    assert [list(map(len, epoch)) for epoch in epochs] == [[3, 3, 3, 1]] * 2
    orders = [sum(epoch, []) for epoch in epochs] + [sum((common.shuffled(rows, n, 3, 1) for n in range(4)), [])]
    assert all(sorted(order) == rows for order in orders) and len(set(map(tuple, orders))) == 3
    assert common.shuffled(rows, 5, 3, 0) == epochs[1][1]


# ---- decoding ----------------------------------------------------------------------------------------------

def greedy_by_hand(model, ids, stop_ids, most):
    """Token by token, each time from the beginning, without cache, padding or other rows."""
    completion = []
    while len(completion) < most and not (completion and completion[-1] in stop_ids):
        completion.append(model(torch.tensor([ids + completion])).logits[0, -1].argmax().item())
    return completion


@torch.no_grad()
def test_rows_reach_no_further_than_the_first_length_of_longrope():
    """Beyond it a row would depend on the longest one beside it: the factors of all change."""
    torch.manual_seed(0)
    rope = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = AutoModelForCausalLM.from_config(Phi3Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=512, original_max_position_embeddings=16, pad_token_id=0, eos_token_id=2, rope_scaling=rope)).eval()
    assert common.max_positions(model) == 16
    for longest, same in ((16, True), (17, False)):
        ids = torch.arange(1, longest + 1).repeat(2, 1)
        ids[0, 5:] = 0
        beside = model(ids, attention_mask=(ids > 0).long()).logits[0, :5]
        assert torch.allclose(beside, model(ids[:1, :5]).logits[0], atol=1e-5) is same
    args = SimpleNamespace(max_length=17)
    with pytest.raises(common.UserError, match="rows may have 17 tokens and the model base has 16 positions .*LongRoPE.* --max_length"):
        common.check_fit(model, "base", SimpleNamespace(get_vocab=lambda: {"a": 5}), args, None)


@torch.no_grad()
def test_complete_greedily_stops_at_the_models_last_position():
    """gpt2 has a learned embedding of each position: one step further would be an index error."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=320, n_positions=12, n_embd=32, n_layer=1,
                                                        n_head=2, bos_token_id=None, eos_token_id=260)).eval()
    prompts = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8]]
    assert common.max_positions(model) == 12
    completions = common.complete_greedily(model, prompts, [319], 50)
    assert completions == [greedy_by_hand(model, prompt, [319], 4) for prompt in prompts]
    assert list(map(len, completions)) == [4, 4]
    assert list(map(len, common.complete_greedily(model, prompts, [319], 2))) == [2, 2]
    assert common.complete_greedily(model, [[1] * 12], [319], 50) == [greedy_by_hand(model, [1] * 12, [319], 1)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["MambaConfig", "Lfm2Config"])
def test_complete_greedily_knows_the_caches_of_models_that_have_no_keys_and_values(kind):
    torch.manual_seed(0)
    sizes = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, eos_token_id=260, bos_token_id=None, pad_token_id=0)
    more = {"MambaConfig": {"state_size": 4}, "Lfm2Config": dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
                                                                 layer_types=["conv", "full_attention"])}[kind]
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes, **more)).eval()
    prompts = [[7, 8, 9], [10, 20, 30]]
    stop = greedy_by_hand(model, prompts[0], [], 8)[2]
    assert common.complete_greedily(model, prompts, [stop], 8) == [greedy_by_hand(model, prompt, [stop], 8) for prompt in prompts]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_complete_greedily_ends_each_row_at_its_own_stop_token(kind):
    model, prompts = tiny_model(kind).eval(), [[7], [10, 20, 30, 40, 50], [3, 9]]
    free = [greedy_by_hand(model, prompt, [], 12) for prompt in prompts]
    for stop_ids in ([-1], [free[0][2]], [free[1][0], free[2][5]]):
        want = [greedy_by_hand(model, prompt, stop_ids, 12) for prompt in prompts]
        assert common.complete_greedily(model, prompts, stop_ids, 12) == want


# ---- splitting ---------------------------------------------------------------------------------------------

def test_hold_out_goes_by_prompt_and_not_by_order():
    items = [(f"prompt {i % 300}", i) for i in range(1000)]
    train, held = common.hold_out(items, [chat(p)[:1] for p, _ in items], 0.1)
    assert len(train) + len(held) == 1000 and 95 <= len(held) <= 100 and train + held != items
    assert not {p for p, _ in train} & {p for p, _ in held}
    back = common.hold_out(items[::-1], [chat(p)[:1] for p, _ in items[::-1]], 0.1)
    assert {p for p, _ in back[1]} == {p for p, _ in held} and train == sorted(train, key=lambda x: x[1])
    smallest = sorted({p for p, _ in items}, key=lambda p: hashlib.sha256(f"[{p!r}]".encode()).hexdigest())
    assert {p for p, _ in held} <= set(smallest[:40]) and smallest[0] in {p for p, _ in held}  # 3 or 4 rows each


@pytest.mark.parametrize("groups, fraction, held", [
    ([1] * 10000, 0.05, 200), ([990, 10], 0.05, 10), ([10, 990], 0.05, 10), ([10] * 6, 0.05, 10),
    ([300] * 2, 0.5, 0),
    ([100], 0.05, 0), ([1] * 100, 0.0, 0), ([1] * 5, 0.05, 0), ([1, 1], 0.9, 1)])
def test_hold_out_takes_at_most_200_rows_and_never_most_of_the_data(groups, fraction, held):
    prompts = [str(p) for p, n in enumerate(groups) for _ in range(n)]
    assert len(common.hold_out(prompts, [chat(p)[:1] for p in prompts], fraction)[1]) == held


def test_system_messages_split_prompts_only_where_nothing_else_does():
    """The same questions under another system message, or none, are the same prompts: sft without one, grpo with one."""
    system = lambda text: [common.turn("system", text)]
    for before in ([], system("be brief")):
        asked = [before + chat(f"prompt {i}")[:1] for i in range(100)]
        held = {prompt[-1]["content"] for prompt in common.hold_out(asked, asked, 0.1)[1]}
        assert len(held) == 10 and held == {f"prompt {i}" for i in sorted(range(100), key=lambda i: hashlib.sha256(f"['prompt {i}']".encode()).digest())[:10]}
    asked = [system(f"as {who}") + chat(f"prompt {i}")[:1] for i in range(100) for who in ("one", "another")]
    train, held = common.hold_out(asked, asked, 0.1)
    assert len(held) == 20 and not {prompt[-1]["content"] for prompt in train} & {prompt[-1]["content"] for prompt in held}
    same = [system(f"text {i}") + chat("sum it up")[:1] for i in range(100)]
    assert len(common.hold_out(same, same, 0.1)[1]) == 10


@pytest.mark.parametrize("script", [grpo, ppo])
def test_special_tokens_but_the_stop_token_are_part_of_what_is_scored(script, monkeypatch):
    """To some models <think> is one: without it 6 and 18 would be 618."""
    t = make_tokenizer(TINY_TEMPLATE, [*TINY_SPECIALS, "<think>", "</think>"])
    said = t("<think>6</think>18<|end|>", add_special_tokens=False)["input_ids"]
    assert len(said) == 6
    row = script.sampled_row([1], said, torch.zeros(6), t, [t.eos_token_id])
    assert row["text"] == "<think>6</think>18" and not row["truncated"] and row["completion_ids"] == said
    assert script.sampled_row([1], said[:-1], torch.zeros(5), t, [t.eos_token_id])["text"] == "<think>6</think>18"
    monkeypatch.setattr(common, "complete_greedily", lambda *args: [said])
    args = SimpleNamespace(max_completion_length=9, micro_batch_tokens=99)
    accelerator = SimpleNamespace(autocast=nullcontext, reduce=lambda x, how: x)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    row = {"prompt_ids": [1], "answer": "18", "prompt": "?"}
    _, table = common.answer_greedily(SimpleNamespace(args=args, tokenizer=t, place=(0, 1), accelerator=accelerator, device="cpu"), model, [row])
    assert table[0]["completion"] == "<think>6</think>18"


def test_a_column_of_few_rows_is_there_for_all_of_its_file(tmp_path):
    """None where a row lacks it: a reward that asks for it must not end the run where no held-out row has it."""
    rows = [{"prompt": f"{i}+1", "answer": str(i + 1), **({"hint": "h"} if i == 3 else {})} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "e.jsonl").write_text(json.dumps(rows[5]) + "\n")
    flags = [os.path.join(TINY, "grpo.json"), "--dataset_name", str(tmp_path / "d.jsonl"), "--eval_fraction", "0.1"]
    for more, held_has in ((), True), (("--eval_dataset_name", str(tmp_path / "e.jsonl")), False):
        args = common.parse_args(grpo.Args, [*flags, *more])
        train, held = common.load_prompts(args, common.load_tokenizer(args))
        assert all(p["columns"].keys() == {"answer", "hint"} for p in train) and [p["columns"]["hint"] for p in train + held if p["row"].get("hint")] == ["h"]
        assert held and all(("hint" in p["columns"]) == held_has for p in held)


def test_an_answer_before_the_first_question_is_not_trained():
    """A greeting, with a system message before it or not; a system message alone may be what is answered."""
    greeted = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    system = {"role": "system", "content": "you are Bob"}
    for messages, prompt in ((greeted, None), (greeted, "you are Bob"), ([system, *greeted], None)):
        found = common.to_conversation({"messages": messages}, "messages", prompt)["messages"]
        assert [m["train"] for m in found if m["role"] == "assistant"] == [False, True]
    found = common.to_conversation({"messages": [system, greeted[0]]}, "messages")["messages"]
    assert [m["train"] for m in found] == [False, True]


def test_fingerprint_tells_any_change():
    def example(ids, mask):
        return {"input_ids": torch.tensor(ids, dtype=torch.int32),
                "mask": torch.tensor(mask, dtype=torch.int8)}
    base = [example([1], [1]), example([1], [1])]
    others = [base[:1], [example([1, 1], [1, 1])], [example([2], [1]), base[1]], [example([1], [0]), base[1]],
              [{**base[0], "score": 1}, base[1]]]
    digests = [common.fingerprint(x) for x in [base, *others]]
    assert len(set(digests)) == len(digests) and common.fingerprint(base) == digests[0]
    moved = [{**e, "place": f"elsewhere.jsonl:{i}"} for i, e in enumerate(base)]  # the same rows, in another file
    here = [{**e, "place": f"here.jsonl:{i}"} for i, e in enumerate(base)]
    assert common.fingerprint(moved) == common.fingerprint(here)


def test_show_example_and_show_table(capsys, tokenizer):
    (e,) = common.encode_conversation(tokenizer, chat("q" * 2000, "a\nb"))
    common.show_example(tokenizer, e["input_ids"], torch.tensor(e["mask"]))
    out = capsys.readouterr().out
    assert "2007 tokens, 4 trained, in [[ ]]" in out and "q ... q" in out
    assert "[[a\n  b<|end|>]]" in out and len(out) < 800
    common.show_table([{"text": "x" * 100 + "\n行", "n": 1.5}])
    out = capsys.readouterr().out
    assert " ... " in out and "行" in out and "1.5" in out and max(map(len, out.splitlines())) < 80


def test_the_table_shows_what_the_user_said(capsys):
    common.show_table([{"prompt": [{"role": "system", "content": "rules"}, {"role": "user", "content": "why?"}], "n": 1}])
    out = capsys.readouterr().out
    assert "why?" in out and "rules" not in out


def test_nobody_waits_in_silence(capsys, monkeypatch, tmp_path):
    """Whatever takes long says so, but only where nothing else was said for a while."""
    common.say("now")
    common.still("not yet")
    assert capsys.readouterr().out == "now\n"
    monkeypatch.setattr(common.spoken, "at", -1e9)
    common.still("reading")
    common.still("not yet")
    assert capsys.readouterr().out == "...      reading\n"
    monkeypatch.setattr(common, "SILENCE", -1)  # each one speaks
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 2)
    run(grpo, tmp_path / "out", "--dataset_name", tmp_path / "rows.jsonl", "--eval_dataset_name", tmp_path / "rows.jsonl", "--max_steps", 2,
        "--num_iterations", 2, "--max_completion_length", 3, "--batch_size", 1, "--num_generations", 2, "--logging_steps", 100)
    out = capsys.readouterr().out
    for doing in ("reading", "tokenizing: row 2", "sampling: 2 completions have 1 tokens", "log-probs of the rollout: micro-batch 1 of 1",
                  "step 1: micro-batch 1 of 1", "step 1/2  reward"):
        assert doing in out, doing
    run(dpo, tmp_path / "dpo", "--max_steps", 1, "--batch_size", 2, "--eval_fraction", 0.01, "--max_completion_length", 3)
    out = capsys.readouterr().out
    for doing in ("reference log-probs of", "evaluation: micro-batch 1 of", "answering"):
        assert doing in out, doing


def test_rows_of_both_sets_are_counted_aloud(capsys, tmp_path):
    for name, numbers in (("train", "123"), ("eval", "345")):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{n}", "completion": "x"}}\n' for n in numbers))
    run(sft, tmp_path / "out", "--dataset_name", tmp_path / "train.jsonl", "--eval_dataset_name", tmp_path / "eval.jsonl", "--max_steps", 1)
    assert "warning  1 of 3 evaluation rows have a prompt that is trained on too\n" in capsys.readouterr().out


def test_what_is_said_at_the_start_of_a_run(capsys, tmp_path):
    """The first evaluation can be left out, a rounded --max_steps is said, and the cut that a CPU has by default is saved."""
    lines = run(ppo, tmp_path, "--max_steps", 1, "--num_minibatches", 2, "--num_iterations", 1, "--batch_size", 4, "--max_completion_length", 4,
                "--eval_on_start", False)
    out = capsys.readouterr().out
    assert [line["step"] for line in lines if "eval/reward" in line] == [2]
    assert "flags    --max_steps 1 ends inside a rollout: 2 steps are made\n" in out and "eval     step 0" not in out
    assert json.loads((tmp_path / "args.json").read_text())["micro_batch_tokens"] == 2048


def test_an_evaluation_counts_for_no_step(tmp_path):
    run_, seconds = SimpleNamespace(begun=100.0, doing="", evaluating=False, step=0, state={"held_rewards": [0.1, 0.2]}, log=lambda m: None,
                                    samples=lambda *a: None), 0.05
    metrics = common.Run.report(run_, lambda: (time.sleep(seconds), ({"eval/reward": 0.3}, ()))[1])
    assert metrics == {"eval/reward": 0.3} and run_.begun >= 100 + seconds
    assert run_.state == {"held_rewards": [0.2, 0.3], "unevaluated": False} and not run_.evaluating


def test_a_largest_figure_is_the_largest():
    run_ = SimpleNamespace(audit_step=None, step=0, signal=0, device="cpu", stop=False, total_steps=9,
                           accelerator=SimpleNamespace(gather=lambda x: torch.cat([x, x / 2])))  # two processes
    sums = common.Sums(run_)
    for x in ([1.0, 9.0], [3.0, 2.0]):
        x = torch.tensor([x])
        sums.add(SimpleNamespace(mask=torch.tensor([[1.0, 0.0]])), {}, {"a_difference": x})
    assert sums.reduce() == {"a_difference": (4 + 2) / (2 + 1), "a_difference/max": 3.0, "trained_tokens": 3}


def test_samples_far_below_greedy_answers_are_said(capsys):
    run_ = SimpleNamespace(step=0, args=SimpleNamespace(bf16=False), state={"held_rewards": [0.6]}, warned=set())
    run_.warn = lambda *a: common.Run.warn(run_, *a)
    metrics = {"sampling/logprob_difference": 1e-6, "sampling/logprob_difference/max": 2e-5, "ratio/deviation": 0.0, "reward": 0.3, "entropy": 1.5}
    common.Run.check_first_update(run_, metrics)
    out = capsys.readouterr().out
    assert "differ by 1e-06 on average and 2e-05 at most" in out and "normal in bf16" not in out
    assert "samples score 0.3 where greedy answers score 0.6 (entropy 1.5 nats a token): a lower --temperature" in out
    run_.warned = set()
    common.Run.check_first_update(run_, metrics | {"reward": 0.5})
    assert "temperature" not in capsys.readouterr().out


def test_an_estimate_that_cannot_be_made_ends_nothing():
    """Configs with a number a layer, or that refuse to tell one, have other errors than a missing name."""
    class Odd(LlamaConfig):
        @property
        def head_dim(self):
            raise TypeError("a list a layer")
    module = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: Odd.__new__(Odd))), parameters=lambda: [])
    common.say_memory(module, SimpleNamespace(lora_r=4, bf16=False, micro_batch_tokens=9, gradient_checkpointing=True), torch.device("cpu"))


def test_a_gradient_of_zero_is_said(capsys):
    """Of a model that has collapsed: nothing else would tell that nothing is learned any more."""
    run_ = SimpleNamespace(step=2, warned=set())
    run_.warn = lambda *a: common.Run.warn(run_, *a)
    for loss, norm in ((10.8, 1e-9), (0.0, 0.0), (10.8, 0.0), (10.7, 0.0)):  # flat groups have neither
        common.Run.check_finite(run_, loss, norm, [])
    assert capsys.readouterr().out == "warning  the gradient of step 3 is 0: nothing is learned. Try a lower --learning_rate\n"


def test_memory_by_hand(capsys):
    """2 layers of 8 with 2 heads of 4, MLP 16, 10 ids; 3 tokens, fp32, all weights trained: a layer keeps 24 x 8 + 4 (3 x 8 + 2 x 4
    + 4 x 16) = 576 bytes a token, all 2 x 576 + 12 x 8 = 1,248; the layer's MLP works with 3 x 4 x 16 = 192, the head with
    8 x 3 x 10 + 4 x 10 x 8 = 560, or 576."""
    config = SimpleNamespace(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, intermediate_size=16, vocab_size=10)
    assert common.step_memory(config, 3, True, False, False) == 3 * 1248 + 576
    assert common.step_memory(config, 3, True, False, True) == 3 * (2 * 32 + 96) + 3 * (576 + 192)  # a layer at a time is made again
    assert common.rollout_memory(config, 5, 7, False) == 5 * (2 * 2 * 4 * 7 * 4 + 360)
    args = SimpleNamespace(bf16=False, micro_batch_tokens=2**20, gradient_checkpointing=False, lora_r=0, adapter=None)
    model = tiny_model("llama")
    common.say_memory(SimpleNamespace(model=model, parameters=model.parameters), args, torch.device("cpu"))
    step, weights = common.step_memory(model.config, 2**20, True, False, False), 16 * sum(p.numel() for p in model.parameters())
    said = re.search(r"memory   (\S+) of \d+ GiB at the peak, by estimate: (\S+) for .*--lora_r 16\), (\S+) for a micro", capsys.readouterr().out)
    assert said.groups() == tuple(f"{x / 2**30:.1f}" for x in (weights + step, weights, step))
    both = torch.nn.ModuleDict({"model": model, "trunk": tiny_model("llama").model})  # ppo's value with a trunk of its own
    judge = torch.nn.Parameter(torch.empty(2**28), requires_grad=False)  # a reward model of 1 GiB, or a reference, whoever has it
    common.say_memory(SimpleNamespace(model=model, trunk=both.trunk, parameters=both.parameters), args, torch.device("cpu"))
    weights = 16 * sum(p.numel() for p in both.parameters()) + 4 * judge.numel()
    said = re.search(r"memory   (\S+) of .*by estimate: (\S+) for .*--lora_r 16\), (\S+) for a micro", capsys.readouterr().out)
    assert said.groups() == tuple(f"{x / 2**30:.1f}" for x in (weights + 2 * step, weights, 2 * step))


# ---- files -------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "你好", "completion": "🙂 a,b"}, {"prompt": "x" * 2**21, "completion": 'two\n"lines"'}]


def lines(end="\n", escape=False):
    return "".join(json.dumps(r, ensure_ascii=escape) + end for r in ROWS).encode()


@pytest.mark.parametrize("name, data", [
    ("a.jsonl", lines()), ("a.json", lines()), ("bom.jsonl", b"\xef\xbb\xbf" + lines()),
    ("crlf.jsonl", lines("\r\n")),
    ("blank.jsonl", b"\n" + lines("\n\n") + b" \n"), ("open.jsonl", lines()[:-1]),
    ("escaped.jsonl", lines(escape=True)),
    ("array.json", json.dumps(ROWS, indent=1).encode()), ("bom.json",
                                                          b"\xef\xbb\xbf \n" + json.dumps(ROWS,
                                                            ensure_ascii=False).encode()),
    ("a.csv", ("prompt,completion\n你好,\"🙂 a,b\"\n" + "x" * 2**21 + ',"two\n""lines"""\n\n').encode()),
    ("bom.csv",
     b"\xef\xbb\xbf" + ('prompt,completion\r\n你好,"🙂 a,b"\r\n' + "x" * 2**21
                         + ',"two\n""lines"""').encode())])
def test_files_hold_what_they_hold(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    rows = common.read_rows(str(tmp_path / name))
    assert [r for r, _ in rows] == ROWS and all(place.startswith(str(tmp_path / name)) for _, place in rows)


def test_parquet_and_saved_datasets_with_their_splits(tmp_path):
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    path = str(tmp_path / "a.parquet")
    pandas.DataFrame(ROWS).to_parquet(path)
    assert common.read_rows(path) == [(r, f"{path} row {i}") for i, r in enumerate(ROWS)]
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b",
                                                            "weight": 0}]}]
    pandas.DataFrame(chats).to_parquet(path)  # the missing weight comes back as None
    assert [m["train"] for m in common.to_messages(common.read_rows(path)[0][0]["messages"])] == [False,
                                                            False]
    one, two = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=two).save_to_disk(tmp_path / "both")
    for name, want in (("one", ROWS), ("both", ROWS), ("both:train", ROWS), ("both:test", ROWS[:1])):
        assert [r for r, _ in common.read_rows(str(tmp_path / name))] == want
    for name in ("one:test", "both:no"):
        with pytest.raises(common.UserError, match=f"{name}' is neither .* no split '"):
            common.read_rows(str(tmp_path / name))


def test_what_comes_from_the_hub_is_said_before_it_is_fetched(tmp_path, capsys):
    """Downloads show no progress: without the line a person would see nothing for minutes."""
    args = sft.Args(model_name_or_path="org/model", dataset_name="org/data:test", output_dir=str(tmp_path))
    for load, name in ((lambda: common.load_tokenizer(args), "org/model"),
                       (lambda: common.load_base("org/model", args), "org/model"),
                       (lambda: common.read_dataset("org/data:test"), "org/data")):
        with pytest.raises(common.UserError, match=name):
            load()
        assert capsys.readouterr().out == f"hub      fetching {name}, where the cache lacks it\n"
    common.say_fetch(str(tmp_path))
    assert capsys.readouterr().out == ""


GOOD = b'{"question": "q", "answer": "a"}\n'


@pytest.mark.parametrize("name, data, sentence", [
    ("a.jsonl", GOOD + b'{"question": \n', r"a.jsonl:2: not valid JSON \(Expecting value"),
    ("a.jsonl", GOOD + b'{"question": "\xff"}\n', "a.jsonl:2: not valid JSON .not UTF-8 text"),
    ("a.jsonl", GOOD + b'{"question": "\\ud83d"}\n', "a.jsonl:2: .*surrogates not allowed"),
    ("a.jsonl", GOOD + b'"text"\n', "a.jsonl:2: not a JSON object; mend it or add --skip_bad_rows"),
    ("a.jsonl", GOOD + b'{"a":' * 10**5 + b"\n", "a.jsonl:2: not valid JSON .*recursion"),
    ("a.json", b'[{"a": 1},\n{"a": }]', "a.json: not valid JSON .*line 2"),
    ("a.json", b'[{"a": 1}, "b"]', "a.json row 1: not a JSON object"),
    ("a.json", b"[" * 10**5, "a.json: not valid JSON .*recursion"),
    ("a.csv", b"a,b\n1,2\n3\n", "a.csv:3: the number of fields"),
    ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv:3: the number of fields"),
    ("a.csv", b"a,b\n1,2\n" + b"1,\xff\n", "a.csv:3: .*surrogates not allowed"),
    ("a.csv", b"a,b\n", "a.csv holds no usable row"), ("a.csv", b"a,b,a\n1,2,3\n", "a.csv: two columns have the same name"),
    ("a.parquet", b"no", "a.parquet is not a readable Parquet file"),
    ("a.jsonl", b"", "a.jsonl holds no usable row"),
    ("a.jsonl", b"\n \n", "a.jsonl holds no usable row"), ("a.tsv", b"a", "a.tsv: unknown kind of file"),
    ("a.jsonl", None, "no such file: .*a.jsonl")])
def test_files_that_cannot_be_read(tmp_path, name, data, sentence):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(common.UserError, match=sentence):
        common.read_rows(str(tmp_path / name))


def test_bad_rows_are_counted_by_reason(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b'{"question"\n{"a\n{"question": "q", "answer": ""}\n[]\n' + GOOD)
    rows = common.read_rows(str(path), skip_bad_rows=True)
    assert [place.rsplit(":")[-1] for _, place in rows] == ["1", "4", "6"]
    out = capsys.readouterr().out
    assert "skipped 3 rows: 1 not valid JSON" in out and "1 not a JSON object" in out
    convert = lambda row: common.to_conversation(row, "question_answer")  # noqa: E731
    assert [p for _, _, p in common.convert_rows(rows, convert, True, "a")] == [f"{path}:1", f"{path}:6"]
    assert "skipped 1 rows: 1 empty completion (message N)" in capsys.readouterr().out
    with pytest.raises(common.UserError,
                       match="a.jsonl:4: empty completion .message 1.; mend it or add --skip_bad_rows"):
        common.convert_rows(rows, convert, False, "a")
    with pytest.raises(common.UserError, match="holds no usable row"):
        common.convert_rows(rows[1:2], convert, True, "a")


def row_of(*messages):
    return {"messages": [dict(zip(("role", "content"), m)) for m in messages]}


@pytest.mark.parametrize("row, kind, sentence", [
    (row_of((U, "a"), ("tool", "b")), "messages",
     r"message 1 has the unknown role 'tool' \(tool calls are not"),
    (row_of((U, "a"), ("Assistant", "b")), "messages", "unknown role 'Assistant'; known are"),
    (row_of((U, "a"), (A, None)), "messages", r"content of message 1 \(assistant\) is not a string but None"),
    (row_of((U, 3), (A, "b")), "messages", r"content of message 0 \(user\) is not a string but 3"),
    (row_of((U, "a"), (A, " \n")), "messages", "empty completion .message 1."),
    (row_of((U, "a")), "messages", "no assistant message"),
    (row_of((A, "a")), "messages", "no assistant message to train on"),  # it answers nothing
    ({"messages": [*row_of((U, "a"))["messages"], {"role": A, "content": "", "tool_calls": [1]}]}, "messages",
     "message 1 has tool_calls"),
    ({"messages": [*row_of((U, "a"))["messages"], {"role": A, "content": "b", "reasoning_content": "c"}]},
     "messages", "has reasoning_content"),
    ({"messages": row_of((U, [{"type": "image_url"}]))["messages"]}, "messages", "parts that are not text"),
    ({"messages": []}, "messages", "non-empty list of messages"),
    ({"messages": ["a"]}, "messages", "message 0 is not an object"),
    ({"conversations": "a"}, "conversations", "non-empty list of messages, got 'a'"),
    ({"prompt": "a", "completion": ""}, "prompt_completion", "empty completion"),
    ({"prompt": "a"}, "prompt_completion", "'completion' is not"),
    ({"prompt": 5, "completion": "b"}, "prompt_completion", "column 'prompt' is not a string but 5"),
    ({"instruction": "a", "output": 1}, "alpaca", "column 'output' is not"),
    ({"instruction": "a", "output": " "}, "alpaca", "empty completion"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "alpaca", r"'history' holds \['c'\]"),
    ({"text": " "}, "text", "is empty")])
def test_rows_that_cannot_be_trained_on(row, kind, sentence):
    with pytest.raises(ValueError, match=sentence):
        common.to_conversation(row, kind)


@pytest.mark.parametrize("row, kind, sentence", [
    ({"prompt": row_of((U, "a"), (A, "b"))["messages"]}, "prompt", "ends with a message of role assistant; it must end with the user's"),
    ({"prompt": [{"role": "system", "content": "a"}]}, "prompt", "ends with a message of role system; it must end with the user's"),
    ({"prompt": None}, "prompt", "is not a string"),
    ({"question": " "}, "question", "column 'question' is empty"),
    ({"instruction": "a", "input": 3}, "instruction", "column 'input' is not")])
def test_prompts_that_cannot_be_asked(row, kind, sentence):
    with pytest.raises(ValueError, match=sentence):
        common.to_prompt(row, kind)


SAYS = lambda who, text, **more: {"role": who, "content": text, **more}  # noqa: E731


def read(folder, rows, script=sft, *flags):
    """The rows of a file through the script's own reading -> what it loads."""
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = common.parse_args(script.Args, [f"{TINY}/{script.__name__}.json", "--dataset_name", f"{folder}/d.jsonl", "--eval_fraction", "0", *flags])
    loader = {sft: "load_rows", dpo: "load_pairs", reward_model: "load_groups"}.get(script)
    return (getattr(script, loader) if loader else common.load_prompts)(args, common.load_tokenizer(args))


@pytest.mark.parametrize("more", [{"thinking": "c"}, {"reasoning": "c"}, {"reasoning_content": "c"}, {"tool_calls": [1]}, {"refusal": "c"},
                                  {"weight": 0.5}, {"weight": "0"}, {"train": "no"}, {"tools": [1]}, {"images": ["x"]}])
def test_a_key_of_a_message_that_changes_its_meaning_is_refused_with_its_place(more, tmp_path):
    good = [SAYS(U, "a"), SAYS(A, "b", **{key: None for key in more})]
    for script, row in ((sft, {"messages": [SAYS(U, "a"), SAYS(A, "b", **more)]}), (grpo, {"prompt": [SAYS(U, "a", **more)], "answer": "1"}),
                        (dpo, {"prompt": "q", "chosen": [SAYS(A, "b", **more)], "rejected": "c"})):
        with pytest.raises(common.UserError, match=rf"d.jsonl:1: message \d (has {list(more)[0]}, which is not|counts .1, true. or not)"):
            read(tmp_path, [row], script)
    read(tmp_path, [{"messages": good}])


def test_messages_that_do_not_count():
    told = [SAYS(U, "a"), *(SAYS(A, "b", **more) for more in ({}, {"train": False}, {"weight": 0.0}, {"loss": False}, {"train": True, "weight": None}))]
    assert [m["train"] for m in common.to_messages(told)] == [False, True, False, False, False, True]


STRINGS = {sft: {"prompt": "a", "completion": "b"}, dpo: {"prompt": "a", "chosen": "b", "rejected": "c"},
           grpo: {"prompt": "a", "answer": "1"}, reward_model: {"prompt": "a", "completion": "b", "score": 1}}


@pytest.mark.parametrize("more, scripts", [
    ({"tools": [{"name": "f"}]}, STRINGS), ({"tools": '[{"name": "f"}]'}, STRINGS), ({"images": ["x.png"]}, STRINGS),
    ({"system_prompt": "be"}, STRINGS), ({"input": "a long text"}, [sft, dpo, reward_model]), ({"weight": 0.5}, [sft, dpo, reward_model]),
    ({"train": False}, [sft, dpo, reward_model]), ({"reasoning": "c"}, [sft, dpo, reward_model])])
def test_a_column_that_changes_what_a_row_says_is_refused_with_its_place(more, scripts, tmp_path):
    name, = more
    for script in scripts:
        with pytest.raises(common.UserError, match=f"d.jsonl:2: column '{name}' would change what the row says and is not used"):
            read(tmp_path, [STRINGS[script] | {name: [] if name != "weight" else 1}, STRINGS[script] | more], script)
    if grpo not in scripts:  # a reward function is given it
        assert read(tmp_path, [STRINGS[grpo] | more], grpo)[0][0]["columns"][name] == more[name]


def test_a_conversation_has_no_room_for_a_history_or_a_second_system_message(tmp_path):
    told = [SAYS(S, "be"), SAYS(U, "a"), SAYS(A, "b")]
    for row, reason in (({"messages": told, "history": [["c", "d"]]}, "column 'history' would change"), ({"text": "a", "system": "be"}, "'system' would"),
                        ({"messages": told, "system": "other"}, "different system messages"),
                        ({"prompt": told[:2], "completion": "b", "history": [["c", "d"]]}, "'history' stands beside a conversation")):
        with pytest.raises(common.UserError, match=reason):
            read(tmp_path, [row])
    assert len(common.to_conversation({"messages": told, "system": "be "}, "messages")["messages"]) == 3


@pytest.mark.parametrize("history", [[["55+44", "99"]], "[['55+44', '99']]", '[["55+44", "99"]]'])
def test_the_history_reaches_every_prompt(history, tmp_path, tokenizer):
    opening, more = "<|user|>55+44<|end|><|assistant|>99<|end|><|user|>a<|end|><|assistant|>", {"history": history}
    (example,), _ = read(tmp_path, [STRINGS[sft] | more])
    assert marked(tokenizer, example) == opening.replace("99<|end|>", "[[99<|end|>]]") + "[[b<|end|>]]"
    (pair,), _ = read(tmp_path, [STRINGS[dpo] | more], dpo)
    assert [marked(tokenizer, row) for row in pair["rows"]] == [opening + f"[[{text}<|end|>]]" for text in "bc"]
    (prompt,), _ = read(tmp_path, [STRINGS[grpo] | more], grpo)
    assert tokenizer.decode(prompt["prompt_ids"]) == opening and (prompt["prompt"], prompt["columns"]["history"]) == ("a", history)
    for kind, formats in (("instruction", common.PROMPT_FORMATS), ("question", common.PROMPT_FORMATS)):
        assert len(common.to_prompt({kind: "a", **more}, kind)[1]) == 3
    assert len(common.to_pair({"instruction": "a", "chosen": "b", "rejected": "c", **more}, "alpaca_pair")["prompt"]) == 3


@pytest.mark.parametrize("history", [float("nan"), 3, "nan", {"a": "b"}, [3], "[['a']]"])
def test_a_history_that_is_no_list_of_pairs(history, tmp_path):
    rows = [STRINGS[sft] | {"history": history}, STRINGS[sft] | {"history": []}]
    with pytest.raises(common.UserError, match="d.jsonl:1: column 'history' (is no list but|holds)"):
        read(tmp_path, rows)
    assert len(read(tmp_path, rows, sft, "--skip_bad_rows")[0]) == 1


def test_what_is_not_used_is_named_once_with_its_count(tmp_path, capsys):
    told = {"messages": [SAYS(U, "a", name="ann"), SAYS(A, "b", id=7)], "source": "web", "prompt": "a", "score": None}
    read(tmp_path, [told | {"answer": "1"}, told | {"source": ""}])
    assert [line for line in capsys.readouterr().out.splitlines() if "not used" in line] == [
        "data     not used: 'id' of messages (2 rows), 'name' of messages (2 rows), column 'prompt' (2 rows), column 'source' (1 rows)"]
    read(tmp_path, [STRINGS[grpo] | {"source": "web"}], grpo)
    read(tmp_path, [STRINGS[reward_model] | {"margin": 1}], reward_model)
    assert "not used" not in capsys.readouterr().out
    read(tmp_path, [STRINGS[dpo] | {"margin": 1}], dpo)
    assert "not used: column 'margin' (1 rows)" in capsys.readouterr().out


# ---- text that is not what it seems -------------------------------------------------------------------------

@pytest.mark.parametrize("written", [repr, json.dumps], ids=["repr", "json"])
def test_messages_that_a_csv_has_turned_into_strings(written, tokenizer):
    asked, told, worse = [SAYS(U, "it's\n1")], [SAYS(A, 'a "b"')], [{"from": "gpt", "value": "c"}]
    said = common.to_conversation({"prompt": written(asked), "completion": written(told)}, "prompt_completion")
    want = "<|user|>it's\n1<|end|><|assistant|>[[a \"b\"<|end|>]]"
    assert encode(tokenizer, said["messages"]) == [want]
    for kind in ("messages", "conversations"):
        assert encode(tokenizer, common.to_conversation({kind: written(asked + told)}, kind)["messages"]) == [want]
    pair = common.to_pair({"prompt": "q", "chosen": written(told[0]), "rejected": written(worse)}, "prompt_pair")
    assert [m["content"] for side in ("prompt", "chosen", "rejected") for m in pair[side]] == ["q", 'a "b"', "c"]
    assert common.to_prompt({"prompt": written(asked)}, "prompt")[0] == asked  # reward functions get messages


@pytest.mark.parametrize("text", ["[1, 2]", '{"from": "Paris", "to": "Rome"}', '[{"role": "cook", "content": "soup"}]', "[] is empty", "{% x %}",
                                  '{"role": "user", "content": x}', "[{'type': 'PER', 'text': 'Bob'}]", '[{"role": ["user"], "content": "a"}]', "['a', 3]"])
def test_text_that_is_no_messages_stays_text(text):
    assert common.column_messages({"completion": text}, "completion", "assistant") == [common.turn(A, text)]


def test_messages_that_were_torn_are_refused():
    """What numpy writes has no commas between the messages."""
    with pytest.raises(ValueError, match="messages as text that is neither JSON nor Python's repr .write .jsonl.: "):
        common.to_prompt({"prompt": "[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]"}, "prompt")


Q, R = "\n\nHuman: q\n\nAssistant:", "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
ASKED = [SAYS(U, "q"), SAYS(A, "a"), SAYS(U, "r")]


@pytest.mark.parametrize("prompt, said, want", [
    ("q ", [SAYS(U, "q"), SAYS(A, "a")], "q +a"), ("be. q", [SAYS(S, "be."), SAYS(U, "q"), SAYS(A, "a")], "be. q +a"),
    ([SAYS(S, "be"), SAYS(U, "q")], [SAYS(U, "q"), SAYS(A, "a")], "be q +a"), (Q, "a", "q +a"), ("q", Q + " a", "q +a"), (Q, Q + " a", "q +a"),
    (Q, [SAYS(U, "q"), SAYS(A, "a")], "q +a"), ("r", [*ASKED, SAYS(A, "b")], "q a r +b"), (ASKED, [*ASKED, SAYS(A, "b")], "q a r +b"),
    ("q", [*ASKED, SAYS(A, "b")], "q +a r +b"), (ASKED, [SAYS(U, "r"), SAYS(A, "b")], "q a r +b"), (R, "b", "q a r +b"), ("r", R + " b", "q a r +b"),
    ([SAYS(U, "q"), SAYS(A, "ok")], [SAYS(U, "ok"), SAYS(A, "d")], "q ok ok +d"), (ASKED[:2], [SAYS(U, "r"), SAYS(A, "b")], "q a r +b"), ([SAYS(S, "be")], [SAYS(U, "q"), SAYS(A, "a")], "be q +a"), ("Human: q", "a", "Human: q +a")])
def test_a_prompt_beside_a_conversation_that_holds_it_comes_in_once(prompt, said, want):
    got = common.to_conversation({"prompt": prompt, "completion": said}, "prompt_completion")["messages"]
    assert " ".join("+" * m["train"] + m["content"] for m in got) == want
    worse = said + "!" if isinstance(said, str) else [*said[:-1], SAYS(A, said[-1]["content"] + "!")]
    pair = common.to_pair({"prompt": prompt, "chosen": said, "rejected": worse}, "prompt_pair")
    assert " ".join(m["content"] for m in pair["prompt"] + pair["chosen"]) == want.replace("+", "")
    assert [len(pair[side]) for side in common.SIDES] == [1, 1] and pair["rejected"][0]["content"] == pair["chosen"][0]["content"] + "!"


@pytest.mark.parametrize("prompt, said", [
    ("q", [SAYS(U, "other"), SAYS(A, "a")]), ("q", [SAYS(S, "be"), SAYS(U, "other"), SAYS(A, "a")]), ([SAYS(U, "q"), SAYS(A, "Sure")], "a"),
    ([SAYS(S, "be"), SAYS(U, "q")], [SAYS(S, "other"), SAYS(U, "q"), SAYS(A, "a")]), ("q", [SAYS(U, "q and more"), SAYS(A, "a")]), (ASKED, [SAYS(U, "z"), SAYS(A, "y"), SAYS(U, "r"), SAYS(A, "b")])])
def test_a_conversation_that_begins_otherwise_than_its_prompt_is_refused(prompt, said):
    for row, convert, kind in (({"completion": said}, common.to_conversation, "prompt_completion"),
                               ({"chosen": said, "rejected": said}, common.to_pair, "prompt_pair")):
        with pytest.raises(ValueError, match="which neither follows nor repeats the prompt"):
            convert({"prompt": prompt, **row}, kind)


def test_a_demonstration_that_holds_its_prompt_comes_in_once(tmp_path, tokenizer, capsys):
    (prompt,), _ = read(tmp_path, [{"prompt": "q", "answer": "1", "demonstration": Q + " a"}], grpo)
    args = SimpleNamespace(demo_threshold=0.0, max_prompt_length=99, max_completion_length=9, skip_bad_rows=False, dataset_name="d")
    assert common.add_demonstrations([prompt], {"format": None}, args, tokenizer) == 0
    assert marked(tokenizer, prompt["demonstration"]) == "<|user|>q<|end|><|assistant|>[[a<|end|>]]"


def test_a_transcript_becomes_messages_for_a_rollout_too(tokenizer):
    prompt, messages = common.to_prompt({"prompt": R}, "prompt")
    assert prompt == R and tokenizer.decode(common.encode_prompt(tokenizer, messages)) == (
        "<|user|>q<|end|><|assistant|>a<|end|><|user|>r<|end|><|assistant|>")


def test_text_with_special_tokens_and_answers_with_their_prompt_are_counted_and_shown(tmp_path, capsys):
    read(tmp_path, [STRINGS[sft], {"prompt": "c", "completion": "d<|end|>"}, {"prompt": "<|user|>e", "completion": "f"}])
    out = capsys.readouterr().out
    assert f"2 rows have text that the tokenizer reads as special tokens: <|end|> ({tmp_path}/d.jsonl:2), <|user|> ({tmp_path}/d.jsonl:3)\n" in out
    read(tmp_path, [{"prompt": "1+1", "chosen": "1+1 is 2", "rejected": "1+1 is 3"}, STRINGS[dpo]], dpo)
    out = capsys.readouterr().out
    assert f"1 rows have answers that begin with the whole prompt, which then comes in twice: {tmp_path}/d.jsonl:1\n" in out
    read(tmp_path, [STRINGS[grpo]], grpo)
    read(tmp_path, [STRINGS[sft]] * 3 + [{"prompt": "hi", "completion": "hi there"}])
    assert "warning" not in capsys.readouterr().out


def test_find_format_names_what_it_found_and_what_it_knows():
    rows = [({"question": "q", "answer": "a", "text": "t"}, "f:1")]
    assert common.find_format(rows, common.SFT_FORMATS, "text") == "text"
    for found, chosen, sentence in (({"b": 1, "a": 2}, None,
                                     "f:1: no known format has the columns a, b. Known are: messages"),
                                    ({"text": 1}, "csv", "unknown --format csv: one of messages, ")):
        with pytest.raises(common.UserError, match=sentence):
            common.find_format([(found, "f:1")], common.SFT_FORMATS, chosen)


# ---- arguments ---------------------------------------------------------------------------------------------

@dataclass
class Args(common.Args):
    dataset_name: str | None = arg("data.jsonl", "")
    learning_rate: float | None = arg(None, "", aliases=["--lr"])
    batch_size: int = arg(4, "")
    num_train_epochs: float = arg(1.0, "")
    checkpointing: bool = arg(True, "")
    modules: list[str] | None = arg(None, "")
    weights: list[float] = arg([], "")


def parse(tmp_path, values, *argv):
    (tmp_path / "a.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return common.parse_args(Args, [str(tmp_path / "a.json"), *argv])


def test_flags_go_on_top_of_the_file(tmp_path):
    args = parse(tmp_path, {"model_name_or_path": "$HERE/m", "batch_size": 8, "merge": True,
                            "modules": ["a", "b"], "weights": [1, 0.5],
                            "learning_rate": 1e-3, "chat_template_kwargs": {"a": True}}, "--batch_size", "2",
                            "--merge", "False", "--lr=2e-4")
    assert args == Args(model_name_or_path=os.path.relpath(tmp_path / "m"), learning_rate=2e-4, batch_size=2,
                        merge=False, modules=["a", "b"], weights=[1.0, 0.5],
                        chat_template_kwargs='{"a": true}')
    args = parse(tmp_path, {"checkpointing": False, "modules": ["a"], "learning_rate": None}, "--merge",
                 "--modules", "c", "d", "--batch-size", "3", "--model_name_or_path=~/m")
    assert args == Args(model_name_or_path=os.path.expanduser("~/m"), batch_size=3, merge=True,
                        checkpointing=False, modules=["c", "d"])


def test_a_switch_alone_is_on_whatever_its_default():
    import dpo
    for flag in ("precompute_ref_log_probs", "bf16", "merge", "eval_on_start"):
        given = [["--" + flag], [f"--{flag}", "False"], [f"--{flag}=True"], [f"--{flag}", "--seed", "3"]]
        parser = common.Parser(dpo.Args)
        assert [parser.values(words)[flag] for words in given] == [True, False, True, True], flag


def test_a_home_folder_is_found_in_every_flag():
    import ppo
    given = {"chat_template_path": "~/c", "value_model": "~/v", "output_dir": "~/o", "resume_from_checkpoint": "~/r", "system_prompt": "~/s"}
    args = ppo.Args(dataset_name="~/d", model_name_or_path="~/m", reward_funcs=["accuracy"], **given)
    assert {name: getattr(args, name) for name in given} == {
        name: value if name == "system_prompt" else os.path.expanduser(value) for name, value in given.items()}


@pytest.mark.parametrize("values, argv, sentence", [
    ({}, ["--learning_rat", "1"], r"unknown argument --learning_rat; did you mean --learning_rate\?"),
    ({}, ["--learning_rat=1"], "did you mean --learning_rate"),
    ({}, ["--zzz"], "unknown argument --zzz; --help lists the flags"),
    ({}, ["--gradient_accumulation_steps", "2"], "--batch_size counts the rows of a whole step"),
    ({}, ["stray"], "one value too many: stray"),
    ({}, ["--batch_size", "1.5"], "batch_size.*: invalid int value: '1.5'"),
    ({}, ["--merge", "maybe"], "maybe"),
    ({"learning_rate": "fast"}, [], "invalid float value: 'fast'"),
    ({"batch_size": True}, [], "invalid int value: 'True'"),
    ({"batch_size": [1, 2]}, [], "a.json: one value too many for --batch_size: 2"), ({"batchsize": 1}, [],
     "a.json: unknown argument batchsize; did you mean batch_size"),
    ({}, [], "--model_name_or_path is missing"), ({}, ["--max_seq_length", "9"], "--help lists the flags"),  # no --max_length in Args
    ({}, ["--use_vllm", "True"], "vLLM is not used"), ("[1]", [], "must hold one JSON object"), ("{", [], "a.json is not valid JSON")])
def test_arguments_that_are_refused(tmp_path, values, argv, sentence):
    with pytest.raises(common.UserError, match=sentence):
        parse(tmp_path, values, *argv)


def test_without_a_model_the_small_example_beside_the_script_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "__file__", str(tmp_path / "script.py"))
    with pytest.raises(common.UserError,
                       match="no model given and no tests/tiny beside the script: add --model_name_or_path"):
        common.parse_args(Args, ["--batch_size", "2"])
    assert common.parse_args(Args, ["--model_name_or_path", "m"]).model_name_or_path == "m"
    with pytest.raises(common.UserError, match="expected --flag value, or an arguments file"):
        common.parse_args(Args, ["m"])


def test_the_small_example_replaces_a_run_of_itself_in_its_own_folder_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "out" / "dpo"
    own.mkdir(parents=True)
    (own / "args.json").write_text('{"model_name_or_path": "mine"}')
    with pytest.raises(common.UserError, match="holds a run of mine, which the small example would replace"):
        common.parse_args(dpo.Args, [])
    assert common.parse_args(dpo.Args, ["--overwrite_output_dir"]).overwrite_output_dir
    (own / "args.json").write_text(json.dumps({"model_name_or_path": common.parse_args(dpo.Args, ["--output_dir", "x"]).model_name_or_path}))
    assert common.parse_args(dpo.Args, []).overwrite_output_dir
    (own / "metrics.jsonl").write_text("{}\n{}\n")
    chosen = common.parse_args(dpo.Args, ["--output_dir", str(own)])
    with pytest.raises(common.UserError, match="already holds a run: choose another --output_dir, or add --overwrite_output_dir"):
        common.check_free(chosen)


def test_template_kwargs_are_defaults_of_the_saved_template(tmp_path):
    """Whoever loads the model gets the prompts that it was trained on, also where this project has no say."""
    template = "{{ [mode, text, nothing, list] }}{% for m in messages %}{{ m['role'] + m['content'] + '<|end|>' }}{% endfor %}"
    (tmp_path / "t.jinja").write_text("\ufeff" + template + "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}")
    given = dict(model_name_or_path=f"{TINY}/model", trust_remote_code=False, chat_template_path=str(tmp_path / "t.jinja"))
    values = {"mode": False, "text": "it's \"so\"\n{{ 1 }} é", "nothing": None, "list": [1, {"a": True}]}
    common.load_tokenizer(SimpleNamespace(**given, chat_template_kwargs=json.dumps(values))).save_pretrained(tmp_path)

    def rendered(tokenizer, **options):
        return tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True, **options)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert rendered(plain) == f"{list(values.values())}usera<|end|>assistant"
    assert rendered(plain, mode=True) == f"{[True, *list(values.values())[1:]]}usera<|end|>assistant", "who asks for another gets it"
    given |= dict(model_name_or_path=str(tmp_path), chat_template_path=None)
    assert rendered(common.load_tokenizer(SimpleNamespace(**given, chat_template_kwargs=None))) == rendered(plain)
    again = common.load_tokenizer(SimpleNamespace(**given, chat_template_kwargs='{"mode": true}'))
    assert rendered(again) == rendered(plain, mode=True)
    for kwargs, sentence in (("[1]", "must be a JSON object"), ('{"think": 1}', "the chat template reads no 'think'")):
        with pytest.raises(common.UserError, match=sentence):
            common.load_tokenizer(SimpleNamespace(**given, chat_template_kwargs=kwargs))


def test_a_template_for_tools_stays_beside_the_default(tmp_path):
    t = make_tokenizer({"default": "\ufeff" + CHATML, "tool_use": "{{ tools }}"}, IM, "<|endoftext|>")
    t.save_pretrained(tmp_path)
    got = common.load_tokenizer(SimpleNamespace(model_name_or_path=str(tmp_path), trust_remote_code=False, chat_template_path=None,
                                                chat_template_kwargs=None))
    assert got.chat_template == {"default": CHATML, "tool_use": "{{ tools }}"}


def test_a_runs_own_arguments_come_back_as_they_were(tmp_path):
    """JSON writes -0.00001 as -1e-05, which argparse takes for a flag; and $HERE is a folder's name where a path is meant alone."""
    given = {"model_name_or_path": f"{TINY}/sft", "dataset_name": "$HERE/d.jsonl", "reward_funcs": ["accuracy", "format"], "reward_weights": [-1e-05, 1],
             "system_prompt": "cd $HERE"}
    (tmp_path / "args.json").write_text(json.dumps(given))
    args = common.parse_args(grpo.Args, [str(tmp_path / "args.json")])
    assert args.reward_weights == [-1e-05, 1] and args.system_prompt == "cd $HERE" and os.path.samefile(os.path.dirname(args.dataset_name), tmp_path)
    assert common.parse_args(grpo.Args, [str(tmp_path / "args.json"), "--reward_weights", "-1e-05", "-.5"]).reward_weights == [-1e-05, -0.5]


def test_a_role_that_is_no_string_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="message 0 has the unknown role"):
        common.to_messages([{"role": ["user"], "content": "a"}])


@dataclass
class Limited(common.Args):
    dataset_name: str | None = arg("data.jsonl", "a file")
    num_train_epochs: float = arg(1.0, "passes")
    positive: float | None = arg(None, "a number", above=0)
    natural: int = arg(0, "a number", least=0)
    pair: int = arg(2, "a number", least=2)
    share: float = arg(0.5, "a number", least=0, below=1)
    closed: float = arg(0.5, "a number", least=0, most=1)
    opened: float = arg(0.5, "a number", above=0, below=1)
    half: float = arg(0.5, "a number", above=0, most=1)
    free: float = arg(0.0, "a number")
    numbers: list[float] | None = arg(None, "some numbers")
    names: list[str] = arg(["a"], "some names")


@pytest.mark.parametrize("name, good, bad, must", [
    ("positive", ["1e-9", "1e9"], ["0", "-1e-9"], "above 0"),
    ("natural", ["0", "7"], ["-1"], "at least 0"),
    ("pair", ["2", "3"], ["1", "-5"], "at least 2"),
    ("share", ["0", "0.999"], ["1", "-0.001", "1.5"], "at least 0 and below 1"),
    ("closed", ["0", "1"], ["1.001", "-0.001"], "at least 0 and at most 1"),
    ("opened", ["0.001", "0.999"], ["0", "1"], "above 0 and below 1"),
    ("half", ["0.001", "1"], ["0", "1.001"], "above 0 and at most 1"),
    ("free", ["-3", "1e300"], [], "")])
def test_the_limits_of_a_number_and_what_is_said_beyond_them(name, good, bad, must):
    for value in good:
        args = common.parse_args(Limited, ["--model_name_or_path", "m", f"--{name}={value}"])
        assert getattr(args, name) == float(value)
    number = dict((flag.name, int if flag.type is int else float) for flag in fields(Limited))[name]
    for value in bad:
        with pytest.raises(common.UserError) as error:
            common.parse_args(Limited, ["--model_name_or_path", "m", f"--{name}={value}"])
        assert str(error.value) == f"--{name} must be {must}, not {number(value)}"
    for value in ("nan", "inf", "-inf") if number is float else ():
        with pytest.raises(common.UserError, match=f"^--{name} is {value}$"):
            common.parse_args(Limited, ["--model_name_or_path", "m", f"--{name}={value}"])


def test_limits_hold_for_lists_files_and_what_is_not_given(tmp_path):
    typed = ["--model_name_or_path", "m"]
    assert common.parse_args(Limited, typed).positive is None
    with pytest.raises(common.UserError, match="^--numbers is nan$"):
        common.parse_args(Limited, [*typed, "--numbers", "1", "nan"])
    (tmp_path / "a.json").write_text('{"pair": 1}')
    with pytest.raises(common.UserError, match="^--pair must be at least 2, not 1$"):
        common.parse_args(Limited, [str(tmp_path / "a.json"), *typed])
    assert common.parse_args(Limited, [str(tmp_path / "a.json"), *typed, "--pair", "3"]).pair == 3
    one, other = (common.parse_args(Limited, typed) for _ in range(2))
    one.names.append("b")
    assert other.names == ["a"], "two runs must not share a default"


# ---- --help ------------------------------------------------------------------------------------------------

GROUPS = {  # in the order of the script's file; output last
    sft: ["model", "data", "optimization", "evaluation", "output"],
    dpo: ["model", "data", "objective", "optimization", "evaluation", "output"],
    reward_model: ["model", "data", "objective", "optimization", "evaluation", "output"],
    ppo: ["model", "data", "rewards", "rollout", "objective", "optimization", "evaluation", "output"],
    grpo: ["model", "data", "rewards", "rollout", "objective", "optimization", "evaluation", "output"]}


def help_of(script, capsys):
    """-> (what --help prints, {group: [flag]}, {flag: its text}, what stands before the first group)."""
    with pytest.raises(SystemExit) as leave:
        common.parse_args(script.Args, ["--help"])
    assert leave.value.code == 0
    text = capsys.readouterr().out
    flags = text[:text.index("\n\nMetrics")]
    head, *parts = re.split(r"^(\w+):\n", flags, flags=re.M)
    groups = {name: re.findall(r"^  --(\S+)", part, re.M) for name, part in zip(parts[::2], parts[1::2])}
    assert len(groups) == len(parts) // 2, "no group comes twice"
    texts = {name: " ".join(what.split()) for name, what
             in re.findall(r"^  --(\S+)(.*(?:\n {36}.*)*)", "".join(parts[1::2]), re.M)}
    return text, groups, texts, head


@pytest.mark.parametrize("script", GROUPS, ids=lambda s: s.__name__)
def test_help_has_every_flag_once_in_the_files_groups(script, capsys):
    text, groups, _, head = help_of(script, capsys)
    listed = [name for names in groups.values() for name in names]
    assert sorted(listed) == sorted(flag.name for flag in fields(script.Args)), "every flag, none twice"
    assert list(groups) == GROUPS[script]
    for names in groups.values():  # in a group: common.py's flags, then the script's, as their files have them
        own = set(re.findall(r"^    (\w+): ", inspect.getsource(script.Args), re.M))
        orders = [re.findall(r"^    (\w+): .*= arg\(", inspect.getsource(c), re.M) for c in (common.Args, script.Args)]
        assert names == [n for n in orders[0] if n in names and n not in own] + [n for n in orders[1] if n in names]
    assert head.startswith(f"{script.__name__}.py - ") and f"usage: python {script.__name__}.py " in head
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("script", GROUPS, ids=lambda s: s.__name__)
def test_help_spells_a_flag_one_way_and_tells_its_default(script, capsys):
    text, _, texts, head = help_of(script, capsys)
    flags = text[len(head):text.index("\n\nMetrics")]
    known = {flag.name for flag in fields(script.Args)}
    assert set(re.findall(r"--([\w-]+)", flags)) == known, "no --no_x, --batch-size or --report_to"
    for flag in fields(script.Args):
        default = flag.default_factory() if callable(flag.default_factory) else flag.default
        shown = " ".join(default) if isinstance(default, list) else str(default)
        assert texts[flag.name].endswith(f" [{shown}]") or default is None or default is False, flag.name
        assert len(texts[flag.name].split("[")[0].split()) >= 2, f"--{flag.name} is not explained"
    assert "TEXT ..." in texts["lora_target_modules"] and texts["lora_r"].startswith("N ")
    assert texts["gradient_checkpointing"].startswith("True|False ")
    assert texts["lr_scheduler_type"].startswith("cosine|linear|constant ")


@pytest.mark.parametrize("script", GROUPS, ids=lambda s: s.__name__)
def test_help_ends_with_the_metrics_of_the_docstring(script, capsys):
    text, *_ = help_of(script, capsys)
    block = script.__doc__[script.__doc__.index("\nMetrics"):script.__doc__.index("\n\nRun ")]
    assert text.rstrip("\n").endswith("\n" + block) and text.endswith("\n")
    names = [line.split()[0].rstrip(",") for line in block.strip().splitlines()[1:]]
    assert {"loss", "grad_norm", "num_tokens"} <= set(names) and len(names) == len(set(names))


def test_a_script_that_lists_no_metrics_has_a_help_too(capsys):
    with pytest.raises(SystemExit):
        common.parse_args(Limited, ["--help"])
    out = capsys.readouterr().out
    assert "--closed X" in out and "[0.5]" in out and "usage: python test_common.py" in out


@pytest.mark.parametrize("flag", ["--kl_gain", "--sft_fraction", "--demo_column"])
@pytest.mark.parametrize("script", [ppo, grpo], ids=lambda s: s.__name__)
def test_flags_that_are_gone_are_unknown(script, flag):
    with pytest.raises(common.UserError, match=f"^unknown argument {flag}"):
        common.parse_args(script.Args, ["--model_name_or_path", "m", "--dataset_name", "d", flag, "1"])


def test_a_checkpoint_of_an_earlier_version_is_refused_and_stays(tmp_path):
    """It cannot be gone on with, and to start from the beginning would remove it."""
    old = tmp_path / "checkpoints" / "step-00000004"
    old.mkdir(parents=True)
    (old / "state.json").write_text("{}")
    for wanted, says in ("latest", "no checkpoint in .* can be read"), (str(old), "step-00000004: no checkpoint is there"):
        with pytest.raises(common.UserError, match=says):
            common.find_checkpoint(SimpleNamespace(resume_from_checkpoint=wanted, output_dir=str(tmp_path), overwrite_output_dir=False))
    assert old.exists()


# Every flag that needs another one: (flag, a value, what makes it act; with nothing of it, it cannot), by script.
LORA, MOVED, NO_EVALUATION = ["--lora_r", "4"], ["--num_minibatches", "2"], ["--eval_fraction", "0"]
ALL = [("load_in_4bit", "True", LORA, []), ("merge", "True", LORA, []), ("lora_alpha", "64", LORA, []), ("lora_target_modules", "q_proj", LORA, []),
       ("modules_to_save", "lm_head", LORA, []), ("audit_step", "2", ["--audit", "a.html"], []), ("eval_fraction", "0.2", [], ["--eval_dataset_name", "e.jsonl"]),
       ("eval_steps", "7", [], NO_EVALUATION), ("eval_on_start", "True", [], NO_EVALUATION)]
DROPOUT, ANSWERS = ("lora_dropout", "0.1", LORA, []), ("max_completion_length", "9", [], NO_EVALUATION)
ROLLOUT = [("kl_warn", "9", ["--kl_coef", "0.1"], ["--kl_coef", "0"]), ("epsilon", "0.1", MOVED, ["--num_iterations", "1", "--num_minibatches", "1"])]
TABLE = {
    sft: [DROPOUT, ANSWERS, ("adversarial_epsilon", "0.2", ["--adversarial", "fgm"], ["--adversarial", "neftune"]),
          ("neftune_noise_alpha", "9", ["--adversarial", "neftune"], ["--adversarial", "fgm"]), ("freeze_layers", "0.5", [], LORA)],
    dpo: [ANSWERS, ("label_smoothing", "0.1", [], ["--loss_type", "ipo"])],
    reward_model: [DROPOUT],
    grpo: [*ROLLOUT, ("epsilon_high", "0.3", MOVED, ["--num_minibatches", "1"]),
           ("importance_sampling_level", "sequence", [*MOVED, "--loss_type", "grpo"], ["--num_minibatches", "1", "--loss_type", "grpo"]),
           ("best_fraction", "0.5", [], ["--sft_coef", "0"]), ("demo_threshold", "0", [], ["--sft_coef", "0"]),
           ("sft_coef", "0.3", ["--demo_threshold", "0"], []), ("sampler_device", "none", ["--rollout_lag", "1"], []), ("eval_samples", "2", [], NO_EVALUATION)],
    ppo: [*ROLLOUT, ("value_model", "v", [], ["--share_trunk", "True"]), ("value_clip", "0.1", [], ["--vf_coef", "0"]), ("kl_target", "6", [], ["--kl_coef", "0"]),
          ("sft_dataset", "d.jsonl", ["--sft_coef", "0.1"], []), ("sft_coef", "0.1", ["--sft_dataset", "d.jsonl"], [])]}
IDLE = [(script, *row) for script, rows in TABLE.items() for row in [*ALL, *rows]]


@pytest.mark.parametrize("script", TABLE, ids=lambda s: s.__name__)
def test_the_table_has_every_flag_that_needs_another(script):
    assert {flag.name for flag in fields(script.Args) if flag.metadata["needs"]} == {row[0] for row in [*ALL, *TABLE[script]]}


@pytest.mark.parametrize("script, name, value, acts, fails", IDLE, ids=lambda x: getattr(x, "__name__", x) if not isinstance(x, list) else "")
def test_a_flag_that_cannot_act_is_refused_by_name(script, name, value, acts, fails, tmp_path, capsys):
    def check(given, *argv):
        (tmp_path / "args.json").write_text(json.dumps({"model_name_or_path": "m", "dataset_name": "d.jsonl", **given}))
        args = common.parse_args(script.Args, [str(tmp_path / "args.json"), *argv])
        common.check_needs(args)
        return args

    def pairs(flags):
        return {flag[2:]: word for flag, word in zip(flags[::2], flags[1::2])}
    refused = pytest.raises(common.UserError, match=rf"^--{name} .* has no effect (without|beside) --")
    without = check({}, *fails)
    with refused:  # typed
        check({}, *fails, f"--{name}", value)
    with refused:  # in the file, where nothing that was typed switches it off
        check({name: value, **pairs(fails)})
    if getattr(without, name):  # typed at its default
        with refused:
            check({}, *fails, f"--{name}", str(getattr(without, name)))
    assert getattr(check({}, *acts, f"--{name}", value), name) not in (None, getattr(without, name))  # where it can act
    check(asdict(without))  # a run's own args.json
    if fails:  # typed on top of a file, what switches a flag off has the flag set back, and said
        capsys.readouterr()
        assert getattr(check({name: value, **pairs(acts)}, *fails), name) == getattr(without, name)
        assert re.match(rf"flags    --{name} \S+ of the file has no effect (without|beside) --", capsys.readouterr().out)


def test_lora_flags_beside_an_adapter_that_goes_on(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "b", "r": 4}')
    (tmp_path / "adapter_model.safetensors").write_text("")
    base = ["--model_name_or_path", str(tmp_path), "--dataset_name", "d.jsonl"]
    for flags in (["--lora_alpha", "64"], ["--lora_r", "4", "--lora_dropout", "0.1"], ["--modules_to_save", "lm_head"], ["--lora_target_modules", "q_proj"]):
        with pytest.raises(common.UserError, match="has no effect beside an adapter that goes on: leave it out"):
            common.check_needs(common.parse_args(sft.Args, [*base, *flags]))
    common.check_needs(common.parse_args(sft.Args, [*base, "--lora_r", "4", "--load_in_4bit", "--merge"]))


# ---- models ------------------------------------------------------------------------------------------------

def test_the_base_of_an_adapter_is_found_from_everywhere(tmp_path, monkeypatch):
    """A relative name: from the nearest folder above the adapter that leads to a model, else from here."""
    def model(folder, base=None):
        folder.mkdir(parents=True)
        config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 4} if base else {}
        (folder / f"{'adapter_' if base else ''}config.json").write_text(json.dumps(config))
        (folder / f"{'adapter_' if base else ''}model.safetensors").write_text("")
        return folder
    base = model(tmp_path / "project" / "out" / "sft")
    model(tmp_path / "out" / "sft")  # above as well, but further away
    adapter = model(tmp_path / "project" / "out" / "lora" / "model", "out/sft")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for here in (tmp_path / "project", elsewhere, adapter):
        monkeypatch.chdir(here)
        for name in (str(adapter), os.path.relpath(adapter)):
            assert common.base_and_adapter(name) == (str(base), name)
    monkeypatch.chdir(elsewhere)
    other = model(elsewhere / "out" / "sft")
    with pytest.raises(common.UserError, match=re.escape(f"there are two, {base} and {other}: write the whole path")):
        common.base_and_adapter(str(adapter))
    far = model(tmp_path / "far" / "model", "base")
    assert common.base_and_adapter(str(far))[0] == "base"  # a name on the hub
    model(elsewhere / "base")
    assert common.base_and_adapter(str(far))[0] == "base"  # and here a folder
    lost = str(model(tmp_path / "lost", "out/no/model"))
    with pytest.raises(common.UserError, match="was trained on out/no/model, which is not there"):
        common.base_and_adapter(lost)


def test_an_adapter_on_a_relative_base_goes_on_from_another_folder(tmp_path, tmp_path_factory, monkeypatch):
    """Training, reference, merging and fingerprints; what it saves is found from everywhere as well."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(os.path.join(TINY, "sft"), project / "base")
    monkeypatch.chdir(project)
    flags = ["--max_steps", 1, "--batch_size", 2, "--eval_fraction", 0]
    run(sft, "out/sft", *flags, "--model_name_or_path", "base", "--lora_r", 4)
    monkeypatch.chdir(elsewhere)
    flags += ["--model_name_or_path", "../project/out/sft/model", "--kl_coef", 0.1, "--max_completion_length", 8, "--save_steps", 1]
    for out, named in (("near", "../project/base"), (tmp_path_factory.mktemp("far"), str(project / "base"))):
        run(grpo, out, *flags, "--merge")
        assert (Path(out) / "merged").exists()
        assert f'"base_model_name_or_path": "{named}"' in (Path(out) / "model" / "adapter_config.json").read_text()
        adapter = os.path.abspath(Path(out) / "model")
        monkeypatch.chdir(tmp_path)
        assert os.path.samefile(common.base_and_adapter(adapter)[0], project / "base")
        monkeypatch.chdir(elsewhere)
    state = common.load_checkpoint(Path("near") / "checkpoints" / "step-00000001")
    assert f"files of {project / 'base'}" in state["data"]


def test_the_copy_of_an_adapter_is_frozen_and_the_policy_trained(tmp_path):
    """Inside the reference's context too, where peft makes the copy its active adapter."""
    run(sft, tmp_path, "--max_steps", 1, "--batch_size", 2, "--eval_fraction", 0, "--lora_r", 4,
        "--model_name_or_path", os.path.join(TINY, "sft"))
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--model_name_or_path", str(tmp_path / "model")])
    model = common.load_model(args, common.load_tokenizer(args))
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    reference, use_reference = common.make_reference(model, args, "cpu")
    for _ in range(2):
        assert before == {name for name, p in model.named_parameters() if p.requires_grad}
        assert all("default" in name for name in before) and model.active_adapter == "default"
        with use_reference():
            assert model.active_adapter == "reference"
            assert not reference(torch.tensor([[1, 2, 3]])).logits.requires_grad
    assert model(torch.tensor([[1, 2, 3]])).logits.requires_grad


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """The small example's checkpoint with the digit 1 as its padding id, as a model may have its end of turn, and rows."""
    folder = tmp_path_factory.mktemp("padded")
    shutil.copytree(os.path.join(TINY, "sft"), folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"pad_token_id": ord("1")}))
    row = {"prompt": "1+1", "completion": "2", "answer": "2", "chosen": "2", "rejected": "3"}
    for name, columns in (("rows", ("prompt", "completion", "answer")), ("pairs", ("prompt", "chosen", "rejected"))):
        (folder / f"{name}.jsonl").write_text((json.dumps({column: row[column] for column in columns}) + "\n") * 3)
    return folder


@pytest.mark.parametrize("flags", [[], ["--lora_r", "4", "--modules_to_save", "embed_tokens"], ["--lora_r", "4", "--lora_target_modules", "embed_tokens"]], ids=str)
@pytest.mark.parametrize("scores", [None, ["score"]], ids=str)
def test_the_padding_id_has_its_gradient(padded, tokenizer, flags, scores):
    """Of the input embedding's weight, against F.embedding by hand; the digit 1 is trained like any other token."""
    args = common.parse_args(sft.Args, ["--model_name_or_path", str(padded / "model"), "--dataset_name", "d.jsonl", *flags])
    model = common.load_model(args, tokenizer, score_names=scores)
    ids, embedding = torch.tensor([[49, 50, 49, 43, 51]]), model.get_input_embeddings()

    def loss(**given):
        return model(**given, use_cache=False).logits.double().square().mean()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.01 if "lora" in name else 0)  # one of an adapter's two matrices starts at 0
    loss(input_ids=ids).backward()
    trained = next(p for name, p in embedding.named_parameters() if p.requires_grad)
    got, trained.grad = trained.grad.clone(), None
    at = (lambda g: g[:, 49]) if "--lora_target_modules" in flags else (lambda g: g[49])
    assert at(got).abs().max() > 0
    if not flags or "--modules_to_save" in flags:
        weight = trained.detach().clone().requires_grad_()
        total = loss(inputs_embeds=torch.nn.functional.embedding(ids, weight))
        head = [] if scores or flags else [trained]  # tied: the head's share is the same weight's
        grads = torch.autograd.grad(total, [weight, *head])
        assert (got - sum(grads)).abs().max() < 1e-6 * got.abs().max()


@pytest.mark.parametrize("script", [sft, dpo, reward_model, ppo, grpo], ids=lambda s: s.__name__)
def test_no_trained_embedding_drops_a_gradient(script, padded, tmp_path, monkeypatch):
    class Found(Exception):
        pass

    def find(module, args):
        raise Found([m.padding_idx for m in module.modules() if isinstance(m, torch.nn.Embedding)])
    monkeypatch.setattr(script, "make_optimizer", find)
    data = padded / ("pairs.jsonl" if script in (dpo, reward_model) else "rows.jsonl")
    with pytest.raises(Found) as found:
        script.main(common.parse_args(script.Args, [
            "--model_name_or_path", str(padded / "model"), "--dataset_name", str(data), "--eval_fraction", "0", "--output_dir", str(tmp_path)]))
    assert found.value.args[0] == [None] * (2 if script is ppo else 1)


def test_what_transformers_says_of_a_tokenizer_is_heard_and_nothing_else(monkeypatch):
    """It knows tokenizers that split words wrongly."""
    from transformers import logging
    heard, load = [], common.AutoTokenizer.from_pretrained
    monkeypatch.setattr(common.AutoTokenizer, "from_pretrained", lambda *a, **k: heard.append(logging.get_verbosity()) or load(*a, **k))
    common.load_tokenizer(SimpleNamespace(model_name_or_path=f"{TINY}/model", trust_remote_code=False, chat_template_path=None, chat_template_kwargs=None))
    assert heard == [logging.WARNING] and logging.get_verbosity() == logging.ERROR
