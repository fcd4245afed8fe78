"""Makes the table and the curves of real models: what each script does to a small pretrained one, on a CPU.

    pip install matplotlib==3.11.2
    python tests/figures/real_models.py --models FOLDER --gsm8k FILE --pairs FILE [--only grpo-0] [--quick]

FOLDER holds smol (SmolLM2-135M-Instruct), gemma (Gemma 3 270M) and qwen (Qwen2.5-Coder-0.5B-Instruct) as
Hugging Face folders. --gsm8k is a file of GSM8K's questions, --pairs one of prompt, chosen, rejected.
Each run is a script as a user calls it. The model that it saved is then judged here, by plain transformers
and peft, without a line of the scripts: on held-out rows, greedily, and a completion that was cut is wrong.
CPU minutes are the script's alone, its evaluations included. What was done stands in results.jsonl: a program
that was cut goes on there, and makes again what other commands would lead to now.
The task "extraction": a sentence of GSM8K that begins with a name and holds one number -> both, as JSON.
"""

import argparse
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time

import curves
import matplotlib
import torch
from matplotlib import pyplot
from pipelines import ROOT, read_metrics
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

ASK = ('Sentence: "{}"\nReply with only a JSON object with two keys: "name", who the sentence is about, and '
       '"number", the number in it.')
REWARDS = '''import json


def fields(completions, name, number, **columns):
    """Half a point for each field that is right, in a JSON object."""
    scores = []
    for text, who, value in zip(completions, name, number):
        try:
            got = json.loads(text.strip().removeprefix("```json").removesuffix("```"))
            scores.append(((got.get("name") == who) + (float(got.get("number", "nan")) == value)) / 2)
        except (ValueError, TypeError, AttributeError):
            scores.append(0.0)
    return scores


def both(completions, name, number, **columns):
    """1 where both are right."""
    return [float(score == 1) for score in fields(completions, name, number)]
'''
RIGHT = "both fields right, %"


# ---- the runs ----------------------------------------------------------------------------------------------

ALL = "--lora_r 16 --gradient_checkpointing False --save_steps 100000 --logging_steps 1 --eval_steps 10 "
DATA = "--dataset_name {{out}}/{0}.jsonl --eval_dataset_name {{out}}/{0}-held.jsonl "
JSON, SOLVE, PREFER, SAMPLED = map(DATA.format, ("extraction", "gsm8k", "pairs", "pairs-{start}"))
CHECK = "--reward_funcs {out}/rewards.py:fields {out}/rewards.py:both json --reward_weights 1 0 0 "
LEARNED = CHECK.replace("{out}/rewards.py:fields", "{out}/rm-{start}/merged")
SHORT = JSON + "--max_completion_length 48 --temperature 0.7 "
GRPO = SHORT + CHECK + "--batch_size 4 --num_generations 8 --learning_rate 3e-4 "
PPO = SHORT + ("--batch_size 32 --num_iterations 2 --learning_rate 3e-4 --share_trunk --vf_coef 1 "
               "--kl_coef 0.02 ")
SCORES = "--batch_size 8 --learning_rate 3e-4 --merge"  # an adapter's folder does not load in one line
LOSS = "--max_completion_length 0 --learning_rate 3e-4 "  # greedy answers are judged here
# name -> (script, model or run that it starts from, what is judged, updates, flags)
RUNS = {
    **{f"grpo-{seed}": ("grpo", "smol", "extraction", 16, f"{GRPO}--seed {seed}") for seed in range(3)},
    "sft-gsm8k": ("sft", "smol", "gsm8k", 30, SOLVE + LOSS + "--batch_size 16"),
    "dpo": ("dpo", "smol", "preference", 20, PREFER + "--batch_size 8 --learning_rate 1e-4"),
    "rm": ("reward_model", "smol", "score", 20, PREFER + SCORES),
    "ppo": ("ppo", "smol", "extraction", 20, PPO + CHECK),
    "rm-smol": ("reward_model", "smol", "score", 20, SAMPLED + SCORES),
    "ppo-rm": ("ppo", "smol", "extraction", 20, PPO + LEARNED),
    "sft": ("sft", "smol", "extraction", 3, JSON + LOSS + "--batch_size 4 --merge"),  # more leaves no errors
    "rm-sft": ("reward_model", "sft", "score", 20, SAMPLED + SCORES),
    "sft-ppo": ("ppo", "sft", "extraction", 20, PPO + LEARNED),
    "sft-grpo": ("grpo", "sft", "extraction", 16, GRPO),
    "sft-gemma": ("sft", "gemma", "gsm8k", 8, SOLVE + LOSS + "--batch_size 16"),
    "grpo-qwen": ("grpo", "qwen", "extraction", 4, GRPO),
}
PIPELINES = [("grpo-0",), ("ppo",), ("rm-smol", "ppo-rm"), ("sft", "sft-grpo"), ("sft", "rm-sft", "sft-ppo")]
PICTURE = {"sft": "sft-gsm8k", "reward_model": "rm", "dpo": "dpo", "ppo": "ppo", "grpo": "grpo-0"}


def shares(training, held):
    return [(training, "training", 0.62, 0.2), (held, "held out", 0.62, 0.4)]


curves.LINES = {
    "sft": (shares("token_accuracy", "eval/token_accuracy"), "loss, nats a token", [("loss", "", 0, 0)]),
    "reward_model": (shares("accuracy", "eval/accuracy"), "loss of a pair", [("loss", "", 0, 0)]),
    "dpo": (shares("rewards/accuracies", "eval/rewards/accuracies"), "reward",
            [("rewards/chosen", "chosen", 0.6, 0.68), ("rewards/rejected", "rejected", 0.62, 0.38)]),
    "ppo": (shares("rewards/both/mean", "eval/rewards/both/mean"), "KL, nats a token", [("kl", "", 0, 0)]),
    "grpo": (shares("rewards/both/mean", "eval/rewards/both/mean"), "entropy", [("entropy", "", 0, 0)]),
}


# ---- data --------------------------------------------------------------------------------------------------

def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(args, name, rows):
    with open(f"{args.out}/{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{name:20} {len(rows):5} rows", flush=True)


def extraction(questions, small):
    """Sentences that begin with a name and hold one number, in digits -> {sentence: row}. A name is a word
    that is not in `small`, the words that some question has in small letters."""
    spelled = re.compile(r"\b(one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|half|twice|dozen"
                         r"|\w+teen|(twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand)\b", re.I)
    rows = {}
    for sentence in re.split(r"(?<=[.?!])\s+", " ".join(questions)):
        name = re.match(r"(?!\w+day )([A-Z][a-z]+) (?!and |of |from )[a-z][^\"]*\.$", sentence)
        numbers = re.findall(r"[\w/:%-]*\d[\w.,/:%-]*", sentence.rstrip("."))
        if (name and name[1].lower() not in small and not spelled.search(sentence) and len(numbers) == 1
                and re.fullmatch(r"\d[\d,]*(\.\d+)?", numbers[0])):
            answer = {"name": name[1], "number": json.loads(numbers[0].replace(",", ""))}
            rows[sentence] = {"prompt": ASK.format(sentence), "completion": json.dumps(answer),
                              "schema": list(answer), **answer}
    return rows


def make_data(args):
    """The files of the runs. The first quarter of the questions, and of the pairs' prompts, is held out."""
    questions, pairs, few = read(args.gsm8k), read(args.pairs), 4 if args.quick else 96
    cut, prompts = len(questions) // 4, list(dict.fromkeys(pair["prompt"] for pair in pairs))
    asked = [row["question"] for row in questions]
    small = set(re.findall(r"\b[a-z]+\b", " ".join(asked)))
    train, held = extraction(asked[cut:], small), extraction(asked[:cut], small)
    write(args, "extraction", list(train.values()))
    write(args, "extraction-held", [row for sentence, row in held.items() if sentence not in train][:few])
    write(args, "gsm8k", questions[cut:])
    write(args, "gsm8k-held", questions[:few])
    one_each = {pair["prompt"]: pair for pair in pairs}
    write(args, "pairs", [pair for pair in pairs if pair["prompt"] in prompts[len(prompts) // 4:]])
    write(args, "pairs-held", [one_each[prompt] for prompt in prompts[:len(prompts) // 4]][:few])
    with open(f"{args.out}/rewards.py", "w") as file:
        file.write(REWARDS)


def sample_pairs(model, tokenizer, args, start):
    """A model's own pairs: of four samples of a prompt the best and the worst by the check."""
    torch.manual_seed(0)
    for part in ("", "-held"):
        rows, pairs = read(f"{args.out}/extraction{part}.jsonl")[:8 if args.quick else 256], []
        texts = complete(model, tokenizer, [row["prompt"] for row in rows for _ in range(4)], 48,
                         do_sample=True, temperature=0.7, top_k=0)
        for at, row in enumerate(rows):
            worst, *_, best = sorted(texts[4 * at:4 * at + 4], key=lambda completion: points(completion, row))
            if points(worst, row) < points(best, row):
                pairs.append({"prompt": row["prompt"], "chosen": best[0], "rejected": worst[0]})
        write(args, f"pairs-{start}{part}", pairs)


# ---- the judge: plain transformers and peft ----------------------------------------------------------------

def chat(tokenizer, prompt, *answer):
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), (prompt, *answer))]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answer)


def stop_ids(model, tokenizer):
    """Ids that end an answer: the generation config's and the tokenizer's."""
    ids = model.generation_config.eos_token_id if model.can_generate() else None
    return {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}


@torch.no_grad()
def complete(model, tokenizer, prompts, limit, **how):
    """-> [(text, whether it ended)], in batches of 32."""
    found, stops = [], stop_ids(model, tokenizer)
    for start in range(0, len(prompts), 32):
        inputs = tokenizer([chat(tokenizer, prompt) for prompt in prompts[start:start + 32]], padding=True,
                           add_special_tokens=False, return_token_type_ids=False, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=limit, eos_token_id=sorted(stops),
                             pad_token_id=tokenizer.pad_token_id, **(how or {"do_sample": False}))
        for ids in out[:, inputs["input_ids"].shape[1]:].tolist():
            end = next((place for place, token in enumerate(ids) if token in stops), None)
            found.append((tokenizer.decode(ids[:end], skip_special_tokens=True), end is not None))
    return found


def points(completion, row):
    """0: cut, or no JSON object with both keys; 1: one; 2, 3: with one, with both fields right."""
    text, ended = completion
    try:
        got = json.loads(re.sub(r"^```(json)?|```$", "", text.strip()))
        if not ended or not {"name", "number"} <= set(got):
            return 0
        same = re.fullmatch(r"-?\d+(\.\d+)?", str(got["number"])) and float(got["number"]) == row["number"]
        return 1 + (got["name"] == row["name"]) + bool(same)
    except (ValueError, TypeError):
        return 0


def encode(model, tokenizer, prompt, answer):
    """Ids of prompt and answer, its end of turn last, and where the answer begins."""
    begin, stops = len(chat(tokenizer, prompt)), stop_ids(model, tokenizer)
    text = tokenizer(chat(tokenizer, prompt, answer), add_special_tokens=False, return_offsets_mapping=True)
    ids = text["input_ids"]
    first = next(place for place, (start, _) in enumerate(text["offset_mapping"]) if start >= begin)
    last = next((place for place in range(first, len(ids)) if ids[place] in stops), len(ids) - 1)
    return ids[:last + 1], first


@torch.no_grad()
def log_probs(model, tokenizer, prompt, answer):
    ids, first = encode(model, tokenizer, prompt, answer)
    logits = model(torch.tensor([ids])).logits[0, first - 1:-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[first:])[:, None])[:, 0]


def percent(flags):
    return 100 * sum(map(bool, flags)) / len(flags)


def judge_extraction(model, tokenizer, rows, args):
    texts = complete(model, tokenizer, [row["prompt"] for row in rows], 48)
    got = [points(text, row) for text, row in zip(texts, rows)]
    return {"JSON with both keys, %": percent(got), RIGHT: percent([each == 3 for each in got])}


def last_number(text):
    """The number after #### at the end of a text, or None."""
    found = re.search(r"#### \$?(-?\d[\d,]*(?:\.\d+)?)\s*$", text)
    return found and float(found[1].replace(",", ""))


def judge_gsm8k(model, tokenizer, rows, args):
    texts = complete(model, tokenizer, [row["question"] for row in rows], 32 if args.quick else 256)
    found = [last_number(text) if ended else None for text, ended in texts]
    losses = torch.cat([-log_probs(model, tokenizer, row["question"], row["answer"]) for row in rows])
    return {"loss, nats a token": losses.mean().item(),
            "ends with #### N, %": percent([number is not None for number in found]),
            "right, %": percent([number == last_number(row["answer"]) for number, row in zip(found, rows)])}


def judge_preference(model, tokenizer, rows, args):
    """What DPO calls a reward is measured against the model with its adapter off."""
    def margins():
        return [(log_probs(model, tokenizer, row["prompt"], row["chosen"]).sum()
                 - log_probs(model, tokenizer, row["prompt"], row["rejected"]).sum()).item() for row in rows]
    now = margins()
    figures = {"chosen likelier, %": percent([margin > 0 for margin in now])}
    if getattr(model, "peft_config", None):
        model.disable_adapters()
        gains = [after - before for after, before in zip(now, margins())]
        figures |= {"chosen gained more, %": percent([gain > 0 for gain in gains]),
                    "margin gained, nats": sum(gains) / len(gains)}
    return figures


@torch.no_grad()
def judge_score(model, tokenizer, rows, args):
    scores = [[model(torch.tensor([encode(model, tokenizer, row["prompt"], row[side])[0]])).logits.item()
               for side in ("chosen", "rejected")] for row in rows]
    return {"pairs ordered right, %": percent([chosen > rejected for chosen, rejected in scores]),
            "margin": sum(chosen - rejected for chosen, rejected in scores) / len(scores)}


JUDGES = {"extraction": judge_extraction, "gsm8k": judge_gsm8k, "preference": judge_preference,
          "score": judge_score}


# ---- running, each thing once ------------------------------------------------------------------------------

class Program:
    def __init__(self, args):
        self.args, self.path, self.found = args, f"{args.out}/results.jsonl", {}
        self.known = {row["key"]: row for row in (read(self.path) if os.path.exists(self.path) else [])}

    def once(self, what, name, function, *inputs):
        """The dict that function(*inputs) gives, or gave before, of a model made by the same commands."""
        key = f"{what}{', quick' * self.args.quick}: {self.commands(name)}"
        if key not in self.known:
            self.known[key] = {"what": what, "name": name, **(function(*inputs) or {}), "key": key}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.known[key]) + "\n")
            print({each: value for each, value in self.known[key].items() if each != "key"}, flush=True)
        return self.known[key]

    def folder(self, name):
        if name not in RUNS:
            return os.path.join(os.path.abspath(self.args.models), name)
        return f"{self.args.out}/{name}/{'merged' if '--merge' in RUNS[name][4] else 'model'}"

    def words(self, name):
        script, start, _, updates, flags = RUNS[name]
        few = ["--max_steps", str(updates)]
        if self.args.quick:
            small = {"grpo": ["--num_generations", "2"], "dpo": ["--max_length", "256"],
                     "reward_model": ["--max_length", "256"]}
            few = ["--max_steps", "2", "--batch_size", "2", *small.get(script, [])]
        return [f"{script}.py", "--model_name_or_path", self.folder(start),
                *(ALL + flags).format(out=self.args.out, start=start).split(), *few,
                "--output_dir", f"{self.args.out}/{name}", "--overwrite_output_dir"]

    def needs(self, name):
        """The runs that one needs: that of its start, that of its reward model."""
        _, start, *_, flags = RUNS[name]
        return [each for each in (start, f"rm-{start}" if LEARNED in flags else None) if each in RUNS]

    def commands(self, name):
        if name not in RUNS:
            return self.folder(name)
        return " && ".join([*map(self.commands, self.needs(name)), shlex.join(self.words(name))])

    def train(self, name):
        """Runs a script, with its output in NAME.log -> its CPU minutes and its own evaluations."""
        def cpu_seconds():
            return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        log, words, start, used = f"{self.args.out}/{name}.log", self.words(name), time.time(), cpu_seconds()
        with open(log, "w") as file:
            if subprocess.run([sys.executable, *words], cwd=ROOT, stdout=file, stderr=file).returncode:
                sys.exit(f"python {shlex.join(words)}\nfailed: see {log}")
        own = [line for line in read_metrics(f"{self.args.out}/{name}") if "eval/" in str(line)]
        return {"cpu_minutes": (cpu_seconds() - used) / 60, "minutes": (time.time() - start) / 60,
                "own_before": own[0], "own_after": own[-1]}

    def judge(self, name, task, held, run):
        """Figures of a model on held-out rows, in fp32. The tokenizer is the run's: gemma has no template."""
        kind = AutoModelForSequenceClassification if task == "score" else AutoModelForCausalLM
        model = kind.from_pretrained(self.folder(name), dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(self.folder(run), padding_side="left")
        if task == "pairs":
            return sample_pairs(model, tokenizer, self.args, name)
        return JUDGES[task](model, tokenizer, read(f"{self.args.out}/{held}.jsonl"), self.args)

    def make(self, name):
        """A run, after those that it needs: its record with the figures before and after goes to `found`."""
        _, start, task, _, flags = RUNS[name]
        for each in self.needs(name):
            self.make(each)
        held = f"{task}-held" if task in ("extraction", "gsm8k") else "pairs-held"
        if SAMPLED in flags:
            self.once("pairs", start, self.judge, start, "pairs", None, start)
            held = f"pairs-{start}-held"
        run = self.once("run", name, self.train, name)
        own = run["own_before"]  # a reward model begins with a random head, which is saved nowhere
        before = ({"pairs ordered right, %": 100 * own["eval/accuracy"], "margin": own["eval/margin"]}
                  if task == "score" else self.once(task, start, self.judge, start, task, held, name))
        after = self.once(task, name, self.judge, name, task, held, name)
        self.found[name] = run | {"before": before, "after": after}


# ---- table and pictures ------------------------------------------------------------------------------------

def table(program):
    print("\n| run | starts from | seed | CPU minutes | held out | before | after |\n" + "|---" * 7 + "|")
    for name, run in program.found.items():
        script, start, *_, flags = RUNS[name]
        cells = [f"{name}: `{script}.py`", start, (re.findall(r"--seed (\d+)", flags) or ["0"])[0],
                 f"{run['cpu_minutes']:.1f}"]
        for figure in [each for each in run["after"] if each not in ("what", "name", "key")]:
            before = f"{run['before'][figure]:.3g}" if figure in run["before"] else ""
            print("|", " | ".join([*cells, figure, before, f"{run['after'][figure]:.3g}"]), "|")
            cells = [""] * 4
    print("\nBefore reward_model.py: its own figure, of a random head. The models were quantised, and are "
          "bf16 again.\nIn MODELS, OUT (--models, --output_dir):\n")
    for name in program.found:
        words = shlex.join(program.words(name)).replace(program.args.out, "OUT")
        print(f"{name}: python", words.replace(os.path.abspath(program.args.models), "MODELS"))


def pipeline(program, names):
    """[(CPU minutes, % right)] along the stages, the minutes of each spread evenly over its steps."""
    line, spent = [], 0
    for name in names:
        metrics, run = read_metrics(f"{program.args.out}/{name}"), program.found[name]
        shares = [(each["step"] / metrics[-1]["step"], 100 * each["eval/rewards/both/mean"])
                  for each in metrics if "eval/rewards/both/mean" in each]
        if RUNS[name][0] == "sft":
            shares = [(0, run["before"][RIGHT]), (1, run["after"][RIGHT])]
        line += [(spent + at * run["cpu_minutes"], share) for at, share in shares]
        spent += run["cpu_minutes"]
    return line


def draw(program, theme):
    """One picture with a column a script, and one of all pipelines on one axis."""
    text, dim, grid, *colours = curves.INK[theme]
    out, found = program.args.out, program.found
    columns = {script: curves.read(f"{out}/{name}") for script, name in PICTURE.items() if name in found}
    if columns:
        curves.draw(columns, theme, f"{out}/curves-{theme}.svg")
    lines = {names: pipeline(program, names) for names in PIPELINES if set(names) <= set(found)}
    if not lines:
        return
    style = {"font.size": 9, "axes.edgecolor": grid, "xtick.color": dim, "ytick.color": dim,
             "text.color": text, "axes.labelcolor": dim, "axes.spines.top": False,
             "axes.spines.right": False, "legend.frameon": False}
    with matplotlib.rc_context(style):
        figure, axis = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
        for (names, line), colour in zip(lines.items(), [*colours, dim, text]):
            axis.plot(*zip(*line), "o-", ms=3, color=colour, label=", ".join(names))
        axis.set(xlabel="CPU minutes, all stages", ylabel=RIGHT, ylim=(0, 100))
        axis.legend(loc="lower right")
        figure.savefig(f"{out}/pipelines-{theme}.svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser()
    for flag in ("--models", "--gsm8k", "--pairs"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--output_dir", dest="out", help="default: out/real_models, or out/real_models-quick")
    parser.add_argument("--only", nargs="+", choices=RUNS)
    parser.add_argument("--quick", action="store_true", help="two small updates a run, few held-out rows")
    args = parser.parse_args()
    args.out = os.path.abspath(args.out or os.path.join(ROOT, "out", "real_models" + "-quick" * args.quick))
    os.makedirs(args.out, exist_ok=True)
    logging.disable_progress_bar()
    make_data(args)
    program = Program(args)
    names = args.only or [name for name in RUNS if not args.quick or name not in ("grpo-1", "grpo-2")]
    for name in names:
        program.make(name)
    table(program)
    for theme in curves.INK:
        draw(program, theme)


if __name__ == "__main__":
    matplotlib.use("Agg")
    main()
