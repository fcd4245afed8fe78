"""A user's mistake is one sentence on stderr with its place and remedy, exit code 2, and loses nothing."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, TINY, in_child, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import dpo
import grpo
import ppo
import reward_model
import sft

SFT, CHECKPOINT = os.path.join(TINY, "sft.json"), os.path.join(TINY, "sft")
FILES = {
    "ok.jsonl": '{"prompt": "1+1", "completion": "2", "answer": "2"}\n' * 3,
    "broken.jsonl": '{"prompt": "1+1", "completion": "2"}\n{"prompt": "1+1", \n',
    "role.jsonl": '{"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}\n',
    "empty.jsonl": "", "blank.jsonl": "\n\n", "array.json": "[1, 2", "columns.jsonl": '{"x": 1}\n', "notes.txt": "hello",
    "long.jsonl": json.dumps({"prompt": "1" * 600, "answer": "2"}) + "\n", "headless.csv": "1+1,2\n1+2,3\n", "one.jsonl": '{"prompt": "1+1", "solution": "2"}\n',
    "words.jsonl": '{"prompt": "1+1", "answer": "two"}\n', "asks.py": "def f(completions, answer):\n    return [1.0] * len(completions)\n",
    "no_answer.jsonl": '{"prompt": "1+1"}\n{"prompt": "1+2"}\n', "nothing.jsonl": '{"prompt": "1+1", "completion": " "}\n',
    "pairs.jsonl": '{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 3, "same.jsonl": '{"prompt": "q", "chosen": "a", "rejected": "a"}\n',
    "unlike.jsonl": '{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected": [{"role": "user", "content": "c"},'
                    ' {"role": "assistant", "content": "d"}]}\n',
    "text.jsonl": '{"text": "a"}\n' * 3,
    "scores.jsonl": '{"prompt": "q", "completion": "a", "score": 1}\n{"prompt": "q", "completion": "b", "score": "high"}\n',
    "named.jsonl": '{"prompt": "q", "completion": "a", "score": {"x": 1}}\n{"prompt": "q", "completion": "b", "score": {"y": 1}}\n',
    "tools.jsonl": '{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}\n',
    "raises.py": "def f(completions):\n    raise RuntimeError('no network\\nat all')\n",
    "short.py": "def f(completions):\n    return []\n", "nan.py": "def f(completions):\n    return [float('nan')] * len(completions)\n",
    "text.py": "def f(completions):\n    return '1' * len(completions)\n", "syntax.py": "def f(:\n",
    "exits.py": "import sys\nsys.exit(3)\n", "late.py": "def f(trainer_state, completions):\n    return [1 / (trainer_state.max_steps == 0)] * len(completions)\n",
    "hangs.py": "import time\ndef f(completions):\n    time.sleep(60)\ndef g(completions):\n    while True:\n        pass\n",
    "args.json": '{"learning_rate": "fast"}', "unknown.json": '{"learning_rat": 1}', "two.json": '{"learning_rat": 1, "packing": true}', "list.json": "[1]", "broken.json": "{",
    "template.jinja": "{{ messages[0].content", "lossy.jinja": "{{ 'always the same' }}",
}
CASES = [  # (script, flags on top of its small example, what the sentence must say)
    (sft, ["--model", "x"], "unknown argument --model; did you mean --model_name_or_path?"), (sft, ["--x", "1"], "unknown argument --x; --help lists the flags"),
    (sft, ["--lr", "1"], "unknown argument --lr: use --learning_rate"),
    (dpo, ["--rpo_alpha", "1"], "unknown argument --rpo_alpha: use --sft_coef"), (dpo, ["--peft_config", "x"], "use --lora_r 16"),
    (grpo, ["--steps_per_generation", "4"], "--steps_per_generation: use --num_minibatches"), (ppo, ["--cliprange", "1"], "--cliprange: use --epsilon"),
    (ppo, ["--num_ppo_epochs", "4"], "--num_ppo_epochs: use --num_iterations"), (ppo, ["--lam", "1"], "--lam: use --gae_lambda"),
    (ppo, ["--cliprange_value", "1"], "use --value_clip"), (dpo, ["--max_prompt_length", "9"], "--max_length holds prompt and answer"),
    (dpo, ["--lora_dropout", "0.1"], "there is none, so that"), (grpo, ["--top_p", "0.9"], "tests/edits/grpo-top-p.diff cuts it"),
    (dpo, ["--torch_dtype", "bfloat16"], "--bf16 computes in bf16"), (ppo, ["--sft_fraction", "1"], "unknown argument --sft_fraction; --help lists"),
    (sft, ["--learning_rat", "1"], "unknown argument --learning_rat; did you mean --learning_rate?"),
    (grpo, ["--use_vllm"], "unknown argument --use_vllm: rollouts are sampled in the script itself"),
    (sft, ["--packing", "True"], "sorted by length"),
    (sft, ["--learning_rate", "fast"], "invalid float value: 'fast'"),
    (sft, ["--learning_rate", "0"], "--learning_rate must be above 0"), (grpo, ["--learning_rate", "nan"], "--learning_rate is nan"),
    (sft, ["--num_train_epochs", "inf"], "--num_train_epochs is inf"), (grpo, ["--seed", "-3"], "--seed must be at least 0 and below 4294967296, not -3"),
    (grpo, ["--num_generations", "1"], "--num_generations must be at least 2"), (sft, ["--batch_size", "0"], "--batch_size must be above 0"),
    (grpo, ["--num_minibatches", "1000"], "--num_minibatches 1000 is more than"), (sft, ["--lora_dropout", "2"], "--lora_dropout must be at least 0 and below 1, not 2.0"),
    (grpo, ["--reward_weights", "1", "2"], "--reward_weights has 2 numbers for 1 reward"),
    (grpo, ["--importance_sampling_level", "sequence"], "add --loss_type grpo"),
    (sft, ["--lr_scheduler_type", "wavy"], "invalid choice: 'wavy'"), (sft, ["--log_with", "wandb"], "pip install wandb"),
    (sft, ["--load_in_4bit"], "--load_in_4bit True has no effect without --lora_r above 0 or an adapter that goes on"), (grpo, ["--merge"], "--merge True has no effect"),
    (sft, ["--model_name_or_path", CHECKPOINT, "--lora_r", "4", "--lora_target_modules", "q_proj", "v_prj"], "no module of that name: v_prj"),
    (sft, ["--chat_template_kwargs", '{"enable_thinking": false}'], "the chat template reads no 'enable_thinking'"),
    (sft, ["--dataset_name", "text.jsonl", "--system_prompt", "be kind"], "--system_prompt has no effect on rows of text"),
    (sft, ["--lora_r", "4", "--model_name_or_path", "./prompt"], "is an adapter of type PROMPT_TUNING, not LoRA"),
    *((sft, ["--model_name_or_path", CHECKPOINT, "--lora_r", "4", "--merge", *flags], "adapters would change one of the two alone") for flags in (
        ["--modules_to_save", "lm_head"], ["--modules_to_save", "embed_tokens"], ["--lora_target_modules", "embed_tokens", "q_proj"])),
    *((script, ["--model_name_or_path", "./gptq", "--lora_r", "4"], "./gptq is quantised (gptq), which cannot be trained here") for script in (sft, ppo)),
    (grpo, ["--model_name_or_path", "./four"], "./four is stored in 4 bits, which only adapters can be trained on: add --lora_r 16"),
    (sft, ["--model_name_or_path", CHECKPOINT, "--lora_r", "4", "--lora_target_modules", "nope"], "--lora_target_modules ['nope']"),
    (sft, ["--model_name_or_path", CHECKPOINT, "--lora_r", "4", "--modules_to_save", "nope"], "no module of that name"),
    (sft, ["--model_name_or_path", CHECKPOINT, "--lora_r", "4", "--modules_to_save", "norm"], "peft takes more, whose names end alike: model.layers.0.input_layernorm"),
    *((script, ["--model_name_or_path", "./pissa"], "./pissa began by changing its base (pissa_niter_4), which loading would do again") for script in (dpo, grpo)),
    *((script, ["--model_name_or_path", "./mixtral"], "models of type mixtral do more to their logits than scale and cap them, add noise or look ahead")
      for script in (sft, dpo, ppo, grpo)),
    *((script, ["--model_name_or_path", "./lfm2"], "models of type lfm2 are not supported in ppo and grpo: some layers are no attention") for script in (ppo, grpo)),
    (reward_model, ["--model_name_or_path", "./bert"], "models of type bert are not supported: their trunk and their output head cannot be called apart"),
    (sft, ["--model_name_or_path", "./nowhere"], "no such model folder: ./nowhere"), (sft, ["--model_name_or_path", "./ok.jsonl"], "no such model folder: ./ok.jsonl (a file)"),
    (grpo, ["--max_seq_length", "9"], "use --max_length (ppo, grpo: --max_prompt_length"), (grpo, ["--torch_dtype", "bfloat16"], "--bf16 computes in bf16"),
    (sft, ["--model_name_or_path", "./empty"], "holds no tokenizer"), (sft, ["--model_name_or_path", "./wide"], "do not belong together"),
    (sft, ["--model_name_or_path", "./orphan"], "was trained on /nowhere/base, which is not there"),
    (sft, ["--model_name_or_path", "./bare"], "holds no adapter weights"),
    (sft, ["--model_name_or_path", "./nameless"], "does not say which model"), (sft, ["--model_name_or_path", "./garbled"], "does not say which model"), (sft, ["--model_name_or_path", "./prompts"], "of type PROMPT_TUNING, not LoRA"),
    (sft, ["--model_name_or_path", "./gaps"], "ids up to 5000 and the model's embedding 320 rows"),
    (sft, ["--model_name_or_path", "./nans"], "./nans: the weights model.layers.1.mlp.up_proj.weight are not all finite"),
    (sft, ["--model_name_or_path", "./mute"], "the tokenizer of ./mute: "),
    (sft, ["--model_name_or_path", os.path.join(TINY, "model"), "--lora_r", "4"], "it holds no weights, which adapters need"),
    (grpo, ["--audit", "theirs.html"], "--audit theirs.html: another file is there"), (grpo, ["--audit", "theirs"], "expected the name of an .html file"),
    (sft, ["--resume_from_checkpoint", "tensor"], "--resume_from_checkpoint tensor: damaged: Object of type Tensor"),
    (sft, ["--model_name_or_path", "./activated"], "activated LoRA is not supported"),
    (sft, ["--resume_from_checkpoint", "strange"], "--resume_from_checkpoint strange: it is no checkpoint of this project's"),
    (sft, ["--dataset_name", "missing.jsonl"], "no such file: missing.jsonl"), (sft, ["--dataset_name", "empty.jsonl"], "empty.jsonl holds no usable row"),
    (sft, ["--dataset_name", "blank.jsonl"], "holds no usable row"), (grpo, ["--dataset_name", "broken.jsonl"], "broken.jsonl:2: not valid JSON"),
    (sft, ["--dataset_name", "array.json"], "array.json"), (sft, ["--dataset_name", "role.jsonl"], "role.jsonl:1: message 1 has the unknown role 'robot'"),
    (sft, ["--dataset_name", "tools.jsonl"], "tool calls are not supported"), (sft, ["--dataset_name", "columns.jsonl"], "no known format has the columns x"),
    (sft, ["--dataset_name", "notes.txt"], "unknown kind of file"), (sft, ["--dataset_name", "bytes.jsonl"], "bytes.jsonl:1: not valid JSON (not UTF-8 text)"),
    (sft, ["--dataset_name", "nothing.jsonl"], "nothing.jsonl:1: empty completion"), (sft, ["--format", "xml"], "unknown --format xml"),
    (sft, ["--format", "question_answer"], "addition.jsonl:1: --format question_answer needs the columns question, answer, and there are"),
    (sft, ["--eval_dataset_name", "missing.jsonl"], "no such file: missing.jsonl"),
    (sft, ["--keep_best", "--eval_fraction", "0", "--max_completion_length", "0"], "--keep_best needs evaluation data"),
    (grpo, ["--dataset_name", "no_answer.jsonl"], "needs a column 'answer' or 'solution'"),
    *((script, ["--eval_dataset_name", "no_answer.jsonl"], "accuracy needs a column 'answer' or 'solution'; of no_answer.jsonl rewards are given none")
      for script in (grpo, ppo)),
    (grpo, ["--eval_dataset_name", "words.jsonl"], "accuracy reads a number in no answer, such as 'two' of words.jsonl:1"),
    (grpo, ["--eval_dataset_name", "one.jsonl", "--reward_funcs", "asks.py:f"], "asks for 'answer'"),
    (grpo, ["--eval_dataset_name", "long.jsonl"], "long.jsonl: no prompt to evaluate is left; 1 dropped: longer than --max_prompt_length 512"),
    (grpo, ["--max_prompt_length", "1"], "no prompt to train on is left; 600 dropped: longer than --max_prompt_length 1 tokens"),
    (sft, ["--dataset_name", "headless.csv"], "no known format has the columns 1+1, 2 (a first line with their names, and commas?). Known are"),
    (sft, ["--leraning_rate", "1", "--per_device_train_batch_size", "2", "--x", "-1"],
     "unknown argument --leraning_rate; did you mean --learning_rate?\n  unknown argument --per_device_train_batch_size: --batch_size counts the rows of a "
     "whole step (ppo, grpo: the prompts of a rollout) over all processes; --micro_batch_tokens cuts it to fit the memory\n  unknown argument --x;"),
    *((script, ["--max_steps", number], f"--max_steps must be above 0, or -1 for no limit, not {number}") for script in (sft, grpo) for number in ("0", "-2")),
    (grpo, ["--top_k", "50"], "the whole softmax is sampled"), (grpo, ["--vllm_mode", "colocate"], "vLLM is not used"),
    (sft, ["--save_strategy", "steps"], "use --save_steps"), (grpo, ["--generation_batch_size", "8"], "use --batch_size"),
    (grpo, ["--log_completions"], "samples.jsonl has the first"), (dpo, ["--eval_strategy", "steps"], "use --eval_steps"),
    (grpo, ["--reward_funcs", "out/rm/model"], "no reward 'out/rm/model': no such folder; built in are accuracy"),
    (sft, ["--model_name_or_path", CHECKPOINT, "--lora_r", "4", "--lora_target_modules", "query_proj", "q_proj", "valu"],
     "no module of that name: query_proj, valu; it has down_proj, embed_tokens, gate_proj, input_layernorm, k_proj"),
    (sft, ["--chat_template_path", "nope.jinja"], "cannot read --chat_template_path"),
    (sft, ["--chat_template_path", "template.jinja"], "template.jinja: the chat template refuses"),
    (sft, ["--chat_template_path", "lossy.jinja"], "lossy.jinja: the chat template leaves out"),
    (sft, ["--chat_template_path", "bytes.jsonl"], "not UTF-8"), (sft, ["--chat_template_kwargs", "[1]"], "must be a JSON object"),
    (grpo, ["--reward_funcs", "nope"], "no reward 'nope': built in are accuracy, format"),
    (grpo, ["--reward_funcs", "raises.py"], "say which: raises.py:function"), (grpo, ["--reward_funcs", "nope.py:f"], "no such file: nope.py"),
    (grpo, ["--reward_funcs", "raises.py:g"], "no function 'g'"), (grpo, ["--reward_funcs", "syntax.py:f"], "raised SyntaxError"),
    (grpo, ["--reward_funcs", "exits.py:f"], "raised SystemExit: 3"),
    (grpo, ["--reward_funcs", "raises.py:f"], "'f' raised RuntimeError: no network at all (raises.py:2), on the completion 'made up, to try the rewards' of row"),
    (grpo, ["--reward_funcs", "short.py:f"], "returned 0 values for 8 completions"), (grpo, ["--reward_funcs", "nan.py:f"], "returned nan"),
    (grpo, ["--reward_funcs", "text.py:f"], "returned str"),
    (grpo, ["--reward_funcs", "hangs.py:f", "--reward_timeout", "0.2"], "'f' raised TimeoutError: no answer in 0.2 s (--reward_timeout) (hangs.py:3), on the whole batch"),
    (ppo, ["--reward_funcs", "hangs.py:g", "--reward_timeout", "0.2"], "'g' raised TimeoutError: no answer in 0.2 s"),
    (sft, ["--resume_from_checkpoint", "another"], "was written with --"),
    (sft, ["--resume_from_checkpoint", "damaged"], "--resume_from_checkpoint damaged: damaged: its checksums do not fit"),
    (sft, ["--resume_from_checkpoint", "empty"], "--resume_from_checkpoint empty: no checkpoint is there"),
    (dpo, ["--resume_from_checkpoint", "another"], "another is of another script, or of another version of it: give this run an --output_dir of its own"),
    (grpo, ["--reward_funcs", "late.py:f", "--batch_size", "2", "--eval_fraction", "0"], "raised ZeroDivisionError"),
    (dpo, ["--label_smoothing", "0.1", "--loss_type", "ipo"], "--label_smoothing 0.1 has no effect without --loss_type sigmoid"), (dpo, ["--beta", "0"], "--beta must be above 0"),
    (dpo, ["--label_smoothing", "0.7"], "--label_smoothing must be at least 0 and below 0.5, not 0.7"), (dpo, ["--dataset_name", "ok.jsonl"], "no known format"),
    (dpo, ["--dataset_name", "same.jsonl"], "no pair to train on is left"), (dpo, ["--dataset_name", "unlike.jsonl"], "unlike.jsonl:1: 'chosen' does not begin"),
    (reward_model, ["--dataset_name", "scores.jsonl"], "scores.jsonl:2: the score 'score' is not a number"),
    (reward_model, ["--dataset_name", "named.jsonl", "--eval_fraction", "0"], "named.jsonl:2: the scores are ['y'], those of the first row ['x']"),
    (reward_model, ["--eval_dataset_name", "oks.jsonl"], "no such file"), (reward_model, ["--lora_dropout", "-1"], "--lora_dropout must be at least 0"),
    (grpo, ["--reward_funcs", "empty"], "empty is no reward model that can be loaded"),
    (ppo, ["--kl_target", "6", "--kl_coef", "0"], "--kl_target 6.0 has no effect without --kl_coef above 0: give both"), (ppo, ["--kl_target", "6", "--kl_gain", "6"], "unknown argument --kl_gain"), (ppo, ["--gae_lambda", "1.5"], "--gae_lambda must be at least 0 and at most 1, not 1.5"),
    (ppo, ["--sft_coef", "0.1"], "--sft_coef 0.1 has no effect without --sft_dataset"), (ppo, ["--sft_dataset", "ok.jsonl"], "has no effect without --sft_coef"),
    (ppo, ["--sft_dataset", "role.jsonl", "--sft_coef", "0.1"], "role.jsonl:1: message 1 has the unknown role"),
    (ppo, ["--value_clip", "-1"], "--value_clip must be at least 0"), (ppo, ["--num_minibatches", "9"], "--num_minibatches 9 is more than"),
    (ppo, ["--reward_funcs", "empty"], "empty is no reward model"), (ppo, ["--score_clip", "0"], "--score_clip must be above 0"),
    (ppo, ["--sft_dataset", "", "--sft_coef", "0.1"], "has no effect without --sft_dataset"), (grpo, ["--reward_weights", "0"], "--reward_weights are all 0"),
    (ppo, ["--sft_dataset", "ok.jsonl", "--sft_coef", "0.1", "--sft_fraction", "1e9"], "unknown argument --sft_fraction"),
    (grpo, ["--demo_threshold", "0", "--demo_column", "answer"], "unknown argument --demo_column"),
    (grpo, ["--demo_threshold", "0", "--dataset_name", "ok.jsonl"], "no prompt has a demonstration in a column 'demonstration'"),
    (ppo, ["--dataset_name", "ok.jsonl", "--num_minibatches", "4", "--batch_size", "8", "--eval_fraction", "0"], "is more than the 3 completions of a rollout"),
    (sft, ["--num_train_epochs", "0", "--max_steps", "0"], "nothing to do: give --max_steps"), (ppo, ["--num_train_epochs", "-1"], "must be at least 0"),
    (sft, ["--num_train_epochs", "1e300"], "would never end"), (sft, ["--model_name_or_path", "./headless"], "holds no weights for lm_head.weight"),
    (ppo, ["--beta", "0.1"], "the weight of the KL term is --kl_coef"),
    (sft, ["--output_dir", "ok.jsonl"], "--output_dir ok.jsonl"), (sft, ["--output_dir", "foreign"], "it is no run of ours"),
    (sft, ["--resume_from_checkpoint", "nowhere"], "nowhere: no checkpoint is there (or say 'latest')"),
    *((script, [flag, "ran"], "ran is a run: give ran/model") for script, flag in ((sft, "--model_name_or_path"), (ppo, "--value_model"), (grpo, "--reward_funcs"))),
    (sft, ["--model_name_or_path", "./no_checkpointing", "--gradient_checkpointing"], "add --gradient_checkpointing False: CTRLLMHeadModel does not support activation checkpointing"),
    (sft, ["--freeze_layers", "1"], "--freeze_layers must be at least 0 and below 1, not 1.0"),
    (sft, ["--freeze_layers", "0.5", "--lora_r", "4"], "--freeze_layers 0.5 has no effect beside --lora_r"),
    (sft, ["--adversarial_epsilon", "0"], "--adversarial_epsilon must be above 0"), (sft, ["--adversarial", "pgd"], "invalid choice: 'pgd'"),
    (sft, ["--learning_rate", "1e20", "--max_grad_norm", "0", "--max_steps", "40"], "gradient's norm nan"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("errors")
    for name, text in FILES.items():
        (path / name).write_text(text)
    (path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}\n')
    (path / "empty").mkdir()
    (path / "foreign" / "model").mkdir(parents=True)
    (path / "foreign" / "model" / "precious").write_text("keep me")
    (path / "another").mkdir()
    state = {"step": 1, "args": asdict(sft.Args(dataset_name="other")), "data": {}, "weights": {}, "optimizer": {}, "kept": {}}
    torch.save(state, path / "another" / "state.pt")
    torch.save(state | {"data": {"x": torch.zeros(2)}}, (path / "tensor").mkdir() or path / "tensor" / "state.pt")
    (path / "damaged").mkdir()
    torch.save({"step": 1, "args": {}, "weights": {"x": torch.zeros(1000)}}, path / "damaged" / "state.pt")
    with open(path / "damaged" / "state.pt", "r+b") as file:  # one byte of the weights
        file.seek(os.path.getsize(path / "damaged" / "state.pt") // 2)
        file.write(b"!")
    torch.save([1], (path / "strange").mkdir() or path / "strange" / "state.pt")
    (path / "theirs.html").write_text("<!doctype html>keep me")
    nans = tiny_model("llama")
    with torch.no_grad():
        nans.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    nans.save_pretrained(path / "nans")
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(path / "nans")
    for name in ("gaps", "mute"):
        shutil.copytree(CHECKPOINT, path / name)
    file = path / "gaps" / "tokenizer.json"
    tokens = json.loads(file.read_text())
    tokens["model"]["vocab"]["<far>"] = 5000
    file.write_text(json.dumps(tokens))
    file = path / "mute" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": []}))
    small = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    for name, more in ("mixtral", {"router_jitter_noise": 0.1, "num_local_experts": 4}), ("lfm2", {"layer_types": ["conv", "full_attention"]}):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **small, **more)).save_pretrained(path / name)
        AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(path / name)
    config = AutoConfig.for_model("bert", num_labels=1, **{k: v for k, v in small.items() if k != "num_key_value_heads"})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path / "bert")
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(path / "bert")
    tiny_model("llama").save_pretrained(path / "wide")
    (path / "ran").mkdir()
    (path / "ran" / "metrics.jsonl").write_text("{}")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("ctrl", vocab_size=320, n_positions=4096, n_embd=64, dff=64, n_layer=1, n_head=2)).save_pretrained(path / "no_checkpointing")
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(path / "no_checkpointing")
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(path / "headless")
    tiny_model("llama").save_pretrained(path / "headless", state_dict={
        k: v for k, v in tiny_model("llama").state_dict().items() if k != "lm_head.weight"})
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.add_tokens([f"<{i}>" for i in range(100)])
    tokenizer.save_pretrained(path / "wide")
    for name, base, weights in (("orphan", "/nowhere/base", True), ("bare", CHECKPOINT, False), ("nameless", None, True), ("garbled", "\ud800", True), ("prompts", CHECKPOINT, True),
                                ("activated", CHECKPOINT, True), ("pissa", CHECKPOINT, True)):
        (path / name).mkdir()
        kind = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2} if name == "prompts" else {"peft_type": "LORA", "r": 4}
        kind |= {"activated": {"alora_invocation_tokens": [5, 6]}, "pissa": {"init_lora_weights": "pissa_niter_4"}}.get(name, {})
        (path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "task_type": "CAUSAL_LM", **kind}))
        if weights:
            (path / name / "adapter_model.safetensors").write_text("")
    for name, kind, stored in (("prompt", "PROMPT_TUNING", None), ("gptq", None, {"quant_method": "gptq", "bits": 4}),
                               ("four", None, {"quant_method": "bitsandbytes", "load_in_4bit": True})):
        shutil.copytree(CHECKPOINT, path / name)
        if stored:
            config = json.loads((path / name / "config.json").read_text())
            (path / name / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
        else:
            (path / name / "adapter_config.json").write_text(json.dumps(
                {"peft_type": kind, "base_model_name_or_path": CHECKPOINT, "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}))
            (path / name / "adapter_model.safetensors").write_text("")
    return path


@pytest.mark.parametrize("script, flags, sentence", CASES, ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else "")
def test_one_sentence(script, flags, sentence, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script.__file__])
    argv = [os.path.join(TINY, os.path.basename(script.__file__).replace(".py", ".json")), "--output_dir", "out", "--max_steps", "1",
            "--batch_size", "4", *(["--max_completion_length", "8"] if script is not reward_model else []), *flags]

    def child():
        with common.user_errors():
            script.main(common.parse_args(script.Args, argv))
    status = in_child(child)
    error = capfd.readouterr().err
    assert os.WEXITSTATUS(status) == 2, error
    assert error.startswith(os.path.basename(script.__file__) + ": error: ") and error.count("\n") == 1 + sentence.count("\n"), error
    assert sentence in error
    for name in ("foreign/model/precious", "theirs.html"):
        assert (folder / name).read_text().endswith("keep me")


def test_what_a_run_reads_is_not_replaced_by_it(tmp_path, monkeypatch):
    """A reward model, its alias, demonstrations, a reward's file or an adapter's base inside output_dir, and a folder that is
    resumed though it is no run."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "rm"
    (out / "model").mkdir(parents=True)
    (out / "model" / "precious.py").write_text("def f(completions):\n    return [1.0] * len(completions)\n")
    for name in ("args.json", "samples.jsonl"):
        (out / name).write_text("{}")
    os.symlink(out / "model", tmp_path / "alias")
    tiny = [os.path.join(TINY, "ppo.json"), "--output_dir", "rm"]
    for flags in (["--reward_funcs", "rm/model"], ["--reward_funcs", "alias:score"], ["--reward_funcs", "rm/model/precious.py:f"],
                  ["--sft_dataset", "rm/samples.jsonl", "--sft_coef", "1"], ["--model_name_or_path", "alias"],
                  ["--value_model", "rm/model"]):
        with pytest.raises(common.UserError, match="lies inside the run that would be replaced"):
            common.open_run(common.parse_args(ppo.Args, [*tiny, *flags]))
    with pytest.raises(common.UserError, match="already holds a run"):
        common.open_run(common.parse_args(ppo.Args, [*tiny, "--overwrite_output_dir", "False", "--resume_from_checkpoint", "latest"]))
    os.remove(out / "args.json")
    with pytest.raises(common.UserError, match="it is no run of ours"):
        common.open_run(common.parse_args(ppo.Args, [*tiny, "--resume_from_checkpoint", "latest"]))


def test_a_run_that_failed_at_its_start_is_begun_again_by_the_same_command(tmp_path):
    """It has an evaluation in its log, and nothing that was trained; two steps are refused, as is anything that is no file."""
    (tmp_path / "r.py").write_text("def mine(completions):\n    return [1 / (c[0] == 'm') for c in completions]\n")
    flags = [os.path.join(TINY, "grpo.json"), "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--batch_size", "2",
             "--num_generations", "2", "--eval_fraction", "0.001", "--overwrite_output_dir", "False", "--max_completion_length", "8"]
    go = lambda *more: grpo.main(common.parse_args(grpo.Args, [*flags, *more]))
    for _ in range(2):
        def child():
            with pytest.raises(common.UserError, match=r"'mine' raised ZeroDivisionError: division by zero \(r.py:2\)"):
                go("--reward_funcs", f"{tmp_path}/r.py:mine")
        assert in_child(child) == 0 and (tmp_path / "out" / "args.json").exists()
    assert in_child(go) == 0
    shutil.rmtree(tmp_path / "out" / "model")
    with pytest.raises(common.UserError, match="already holds a run"):
        go()
    os.remove(tmp_path / "out" / "metrics.jsonl")
    (tmp_path / "out" / "metrics.jsonl").mkdir()
    with pytest.raises(common.UserError, match="already holds a run"):
        go()


@pytest.mark.parametrize("name, sentence", [("args.json", "args.json: argument --learning_rate"), ("unknown.json", "did you mean learning_rate"),
                                            ("two.json", "did you mean learning_rate\\?\n  unknown argument packing: rows are not"),
                                            ("list.json", "must hold one JSON object"), ("broken.json", "is not valid JSON"),
                                            ("missing.json", "cannot read the arguments file"), ("stray", "expected --flag value")])
def test_arguments_files(name, sentence, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(common.UserError, match=sentence):
        common.parse_args(sft.Args, [name])


@pytest.mark.parametrize("flags", [["--dataset_name", "missing.jsonl"], ["--learning_rate", "0"], ["--chat_template_path", "nope"],
                                   ["--model_name_or_path", "out/model"], ["--model_name_or_path", "./nowhere"]], ids=str)
def test_a_mistake_does_not_cost_the_run_that_was_there(flags, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = [SFT, "--output_dir", "out", "--max_steps", "1", "--batch_size", "2", "--eval_fraction", "0", "--overwrite_output_dir"]
    sft.main(common.parse_args(sft.Args, argv))
    before = sorted((p, os.path.getmtime(os.path.join(p, f)), f) for p, _, fs in os.walk("out") for f in fs)
    assert len(before) > 5
    with pytest.raises(common.UserError):
        sft.main(common.parse_args(sft.Args, argv + flags))
    assert before == sorted((p, os.path.getmtime(os.path.join(p, f)), f) for p, _, fs in os.walk("out") for f in fs)


def test_a_real_process_exits_with_2_and_says_it_once(tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "grpo.py"), "--learning_rat", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and os.listdir(tmp_path) == []
    assert done.stderr == "grpo.py: error: unknown argument --learning_rat; did you mean --learning_rate?\n"


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "args.json", "the output"])
def test_a_full_disk_is_one_sentence(name, tmp_path, monkeypatch, capfd):
    """Of a log, of args.json, and of what the output goes to; exit code 2, as every mistake."""
    argv = [os.path.join(TINY, "grpo.json"), "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--batch_size", "2",
            "--max_completion_length", "4", "--eval_fraction", "0"]
    monkeypatch.setattr(sys, "argv", ["grpo.py"])

    def child():
        if name == "the output":
            monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
        else:
            full = open("/dev/full", "w")
            monkeypatch.setattr(common, "open", lambda path, *mode, **more: full if str(path).endswith(name) and mode and mode[0] != "rb" else open(path, *mode, **more), raising=False)
        with common.user_errors():
            grpo.main(common.parse_args(grpo.Args, argv))
    assert os.WEXITSTATUS(in_child(child)) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and os.strerror(errno.ENOSPC) in error and ("out" if name == "args.json" else name) in error


def test_output_that_takes_no_utf8_shows_escapes(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "\u00e9", "completion": "\u4e2d"}\n' * 3, encoding="utf-8")
    done = subprocess.run([sys.executable, os.path.join(ROOT, "sft.py"), SFT, "--dataset_name", "d.jsonl", "--max_steps", "1", "--eval_fraction", "0"],
                          cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "\\xe9" in done.stdout and "[[\\u4e2d" in done.stdout


def test_two_runs_do_not_share_a_folder(tmp_path):
    """The second is refused before it reads data; the lock ends with its process, however that ends."""
    argv = [SFT, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--batch_size", "2", "--eval_fraction", "0"]
    start = lambda *flags: sft.main(common.parse_args(sft.Args, [*argv, *flags]))

    def second():
        with pytest.raises(common.UserError, match="another run is writing to .*out: choose another --output_dir"):
            start("--dataset_name", "missing.jsonl")

    def dies():
        common.read_rows = lambda *_: os.kill(os.getpid(), 9)
        start()
    file = common.lock(str(tmp_path / "out"))
    assert in_child(second) == 0
    os.close(file)
    assert os.WTERMSIG(in_child(dies)) == 9
    assert in_child(start) == 0


def test_skip_bad_rows_counts_them(folder, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(folder)
    argv = [SFT, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--eval_fraction", "0", "--dataset_name", "broken.jsonl", "--skip_bad_rows"]
    sft.main(common.parse_args(sft.Args, argv))
    assert "broken.jsonl: skipped 1" in capfd.readouterr().out


def test_no_pickle_is_loaded_and_nothing_is_evaluated():
    for name in (n for n in os.listdir(ROOT) if n.endswith(".py")):
        with open(os.path.join(ROOT, name)) as file:
            source = file.read()
        for word in ("torch.load(", "pickle.load", " eval(", "exec("):
            allowed = r"spec\.loader\.exec_module\(|torch\.load\([^\n]*, weights_only=True\)"
            assert word not in re.sub(allowed, "", source), f"{name} has {word}"


def test_trackers_through_accelerate(tmp_path):
    pytest.importorskip("tensorboard")
    from conftest import run
    run(sft, tmp_path / "out", "--max_steps", 2, "--batch_size", 2, "--logging_steps", 1, "--eval_fraction", 0.001, "--report_to", "tensorboard")
    for _ in range(2):  # a run that is replaced leaves no curve
        events = [f for _, _, files in os.walk(tmp_path / "out" / "tracker") for f in files if "tfevents" in f]
        assert len(events) == 1
        run(sft, tmp_path / "out", "--max_steps", 2, "--batch_size", 2, "--logging_steps", 1, "--eval_fraction", 0.001, "--report_to", "tensorboard")


def test_a_resumed_run_has_one_curve(tmp_path):
    pytest.importorskip("tensorboard")
    from conftest import run
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    flags = ["--max_steps", 5, "--batch_size", 2, "--logging_steps", 1, "--eval_fraction", 0, "--log_with", "tensorboard", "--save_steps", 2]
    run(sft, tmp_path / "out", *flags)
    shutil.rmtree(tmp_path / "out" / "model")  # as if killed after step 5, with a checkpoint of step 4
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000005")
    logged = run(sft, tmp_path / "out", *flags, "--resume_from_checkpoint", "latest")
    folder, = (path for path, _, files in os.walk(tmp_path / "out" / "tracker") if files)
    curves = EventAccumulator(folder).Reload()
    assert [event.step for event in curves.Scalars("loss")] == [1, 2, 3, 4, 5] == [record["step"] for record in logged]


# ---- trust -----------------------------------------------------------------------------------------------------------------

class Payload:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("kind", ["model", "adapter", "reward", "checkpoint"])
def test_no_pickle_is_loaded(kind, tmp_path):
    """Weights in a pickle that runs code: refused in a sentence, and the code has not run."""
    folder, trap = tmp_path / "model", tmp_path / "executed"
    flags = [os.path.join(TINY, "grpo.json"), "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    if kind == "adapter":
        folder.mkdir()
        AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": CHECKPOINT, "r": 4,
                                                                "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}))
        torch.save({"x": Payload(trap)}, folder / "adapter_model.bin")
    elif kind == "checkpoint":
        folder.mkdir()
        torch.save({"step": 1, "args": {}, "x": Payload(trap)}, folder / "state.pt")
    else:
        shutil.copytree(CHECKPOINT, folder)
        os.remove(folder / "model.safetensors")
        torch.save({"x": Payload(trap)}, folder / "pytorch_model.bin")
    flag = {"reward": "--reward_funcs", "checkpoint": "--resume_from_checkpoint"}.get(kind, "--model_name_or_path")
    with pytest.raises(common.UserError):
        grpo.main(common.parse_args(grpo.Args, [*flags, flag, str(folder)]))
    assert not trap.exists()


def test_a_latest_checkpoint_that_runs_code_is_passed_over(tmp_path, capsys):
    whole = {"step": 1, "args": {}, "data": {}, "weights": {}, "optimizer": {}, "kept": {}}
    for path, state in (("step-00000001", whole), ("step-00000002", {"step": 2, "x": Payload(tmp_path / "executed")})):
        (tmp_path / "checkpoints" / path).mkdir(parents=True)
        torch.save(state, tmp_path / "checkpoints" / path / "state.pt")
    args = common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"])
    path, state = common.find_checkpoint(args)
    assert path.endswith("step-00000001") and state == whole and not (tmp_path / "executed").exists()
    assert "passing over" in capsys.readouterr().out


def test_code_that_comes_with_a_model_runs_only_if_asked(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    with pytest.raises(common.UserError):
        grpo.main(common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--output_dir", str(tmp_path / "out"),
                                                "--model_name_or_path", str(tmp_path / "model")]))
    assert not (tmp_path / "executed").exists()


def test_four_bits_without_bitsandbytes(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn.modules", None)
    with pytest.raises(common.UserError, match="needs the package 'bitsandbytes'"):
        grpo.main(common.parse_args(grpo.Args, [os.path.join(TINY, "grpo.json"), "--output_dir", str(tmp_path / "out"), "--lora_r", "4",
                                                "--load_in_4bit"]))


@pytest.mark.parametrize("package, flags, sentence", [
    ("bitsandbytes", ["--optim", "adamw_8bit"], "--optim adamw_8bit needs the package 'bitsandbytes'"),
    ("datasets", ["--dataset_name", "org/rows"], "'org/rows' is no file here, and a dataset needs the package 'datasets'"),
    ("pyarrow.parquet", ["--dataset_name", "a.parquet"], "a.parquet: Parquet needs the package 'pyarrow'")])
def test_what_needs_an_optional_package_says_so(package, flags, sentence, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(common.UserError, match=sentence):
        sft.main(common.parse_args(sft.Args, [SFT, "--output_dir", "out", *flags]))


def test_a_huge_row_is_cut_and_counted(tmp_path, capsys):
    """1 MB in one row beside a short one: cut to --max_length, said, trained on."""
    (tmp_path / "huge.jsonl").write_text(json.dumps({"prompt": "1+1", "completion": "2" * 1_000_000}) + "\n" + '{"prompt": "1+2", "completion": "3"}\n')
    sft.main(common.parse_args(sft.Args, [SFT, "--output_dir", str(tmp_path / "out"), "--dataset_name", str(tmp_path / "huge.jsonl"), "--max_steps", "1",
                                          "--eval_fraction", "0", "--model_name_or_path", CHECKPOINT]))
    assert re.search(r"1 cut to \d+ tokens", capsys.readouterr().out)


@pytest.mark.parametrize("script", [sft, dpo, reward_model, grpo, ppo], ids=lambda s: s.__name__)
@pytest.mark.parametrize("lacks", ["pad", "template", "eos"])
def test_models_without_pad_template_or_eos(script, lacks, tmp_path, monkeypatch, capsys):
    """The first two train, and the saved model has what was missing; without EOS nothing could end, and that is said."""
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    if lacks == "template":
        os.remove(tmp_path / "model" / "chat_template.jinja")
    else:
        path = tmp_path / "model" / "tokenizer_config.json"
        config = json.loads(path.read_text())
        del config[f"{lacks}_token"]
        path.write_text(json.dumps(config))
    argv = [os.path.join(TINY, f"{script.__name__}.json"), "--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(tmp_path / "model"),
            "--max_steps", "1", "--batch_size", "4", "--eval_fraction", "0.01", *(["--max_completion_length", "8"] if script is not reward_model else [])]
    main = lambda: script.main(common.parse_args(script.Args, argv))
    if lacks == "eos":
        with pytest.raises(common.UserError, match="EOS|eos|end-of-"):
            main()
    else:
        main()
        saved = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
        assert saved.pad_token_id is not None and saved.chat_template


def test_what_fsdp_cannot_do_is_refused(monkeypatch):
    from types import SimpleNamespace
    from accelerate.utils import DistributedType
    fake = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False, device=torch.device("cpu"), process_index=0, num_processes=1)
    monkeypatch.setattr(common, "Accelerator", lambda **options: fake)
    args = common.parse_args(dpo.Args, [os.path.join(TINY, "dpo.json"), "--lora_r", "4", "--precompute_ref_log_probs", "False"])
    with pytest.raises(common.UserError, match="set fsdp_version: 2"):
        common.make_accelerator(args)
    fake.is_fsdp2 = True
    with pytest.raises(common.UserError, match="an adapter cannot be switched off in the middle of a step"):
        dpo.main(args)
    args.optim = "adamw_8bit"
    with pytest.raises(common.UserError, match="adamw_8bit cannot be sharded"):
        common.make_accelerator(args)
