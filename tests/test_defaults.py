"""The commands of the README as a new user runs them, in processes of their own, and the figures they promise."""

import json
import os
import shutil
import subprocess
import sys

import make
import pytest
import transformers
from conftest import ROOT, WHOLE


def shell(*words, cwd=ROOT, expect=0):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env.pop("ACCELERATE_USE_CPU")
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def accuracies(out):
    with open(os.path.join(out, "metrics.jsonl")) as file:
        return [m["eval/accuracy"] for m in map(json.loads, file) if "eval/accuracy" in m]


@pytest.mark.long
def test_sft_learns_the_mistake_of_its_demonstrations(tmp_path):
    """From random weights, in under 3 minutes on 2 cores: the format without fault, the answers as often as no carry is needed."""
    shell("accelerate", "launch", "sft.py", "--output_dir", tmp_path)
    reached = accuracies(tmp_path)
    assert reached[0] == 0 and 0.15 < reached[-1] < 0.6


@pytest.mark.long
def test_grpo_goes_past_them(tmp_path):
    shell("accelerate", "launch", "grpo.py", "--output_dir", tmp_path)
    reached = accuracies(tmp_path)
    assert 0.15 < reached[0] < 0.6 and reached[-1] >= 0.97


@pytest.mark.long
def test_ppo_goes_past_them_too(tmp_path):
    shell("accelerate", "launch", "ppo.py", "--output_dir", tmp_path)
    reached = accuracies(tmp_path)
    assert 0.15 < reached[0] < 0.6 and reached[-1] >= 0.97
    assert sorted(os.listdir(tmp_path)) == [".lock", "args.json", "checkpoints", "metrics.jsonl", "model", "samples.jsonl", "value"]


@pytest.mark.long
def test_dpo_learns_to_carry(tmp_path):
    shell("accelerate", "launch", "dpo.py", "--output_dir", tmp_path)
    reached = accuracies(tmp_path)
    assert reached[0] < 0.1 and reached[-1] >= 0.95


@pytest.mark.long
def test_a_reward_model_tells_right_from_forgetful_and_ppo_learns_from_it_alone(tmp_path):
    """The last two commands of the README's pipeline: what reward_model.py learned is all that ppo.py is told."""
    shell("accelerate", "launch", "reward_model.py", "--output_dir", tmp_path / "rm")
    assert accuracies(tmp_path / "rm")[-1] >= 0.97
    with open(tmp_path / "rm" / "metrics.jsonl") as file:
        errors = [m["eval/calibration_error"] for m in map(json.loads, file) if "eval/calibration_error" in m]
    assert errors[-1] < 0.3
    shell(sys.executable, "ppo.py", "--output_dir", tmp_path / "ppo", "--reward_funcs", tmp_path / "rm" / "model", "--kl_coef", 0.5)
    reached = accuracies(tmp_path / "ppo")
    assert 0.15 < reached[0] < 0.6 and reached[-1] >= 0.97


def test_two_files_in_an_empty_folder_run(tmp_path):
    for name in ("grpo.py", "common.py"):
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    shutil.copy(os.path.join(WHOLE, "addition.jsonl"), tmp_path)
    done = shell(sys.executable, "grpo.py", "--model_name_or_path", os.path.join(WHOLE, "sft"), "--dataset_name", "addition.jsonl", "--max_steps", 1,
                 "--batch_size", 2, "--eval_fraction", "0.001", "--max_completion_length", 80, cwd=tmp_path)
    assert "saved    out/grpo/model" in done.stdout
    done = shell(sys.executable, "grpo.py", cwd=tmp_path, expect=2)
    assert done.stderr.strip() == ("grpo.py: error: no model given and no tests/tiny beside the script: "
                                   "add --model_name_or_path NAME_OR_FOLDER --dataset_name NAME_OR_FILE")


def test_importing_a_script_runs_nothing(tmp_path):
    done = shell(sys.executable, "-c", f"import sys; sys.path.insert(0, {ROOT!r}); import sft, dpo, reward_model, ppo, grpo", cwd=tmp_path)
    assert done.stdout == "" and os.listdir(tmp_path) == []


def test_make_regenerates_data_and_tokenizer_byte_for_byte(tmp_path, monkeypatch):
    make.make_data(tmp_path)
    make.make_model(tmp_path / "model")
    made_by = json.load(open(os.path.join(WHOLE, "model", "config.json")))["transformers_version"]
    for name in ["addition.jsonl", "preferences.jsonl", *(os.path.join("model", n) for n in os.listdir(os.path.join(WHOLE, "model")))]:
        if name.startswith("model") and transformers.__version__ != made_by:
            pytest.skip(f"the tokenizer's files are those of transformers {made_by}")
        assert (tmp_path / name).read_bytes() == open(os.path.join(WHOLE, name), "rb").read(), name
    for folder in ("model", "sft"):  # the class by a name that transformers 4 knows as well
        config = json.load(open(os.path.join(WHOLE, folder, "tokenizer_config.json")))
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_demonstrations():
    assert make.demonstration(17, 48, True) == "<think>7+8+0=15 1+4+1=6</think><answer>65</answer>"
    assert make.demonstration(17, 48, False) == "<think>7+8+0=15 1+4+0=5</think><answer>55</answer>"
    assert make.demonstration(99, 1, True) == "<think>9+1+0=10 9+0+1=10 0+0+1=1</think><answer>100</answer>"
    with open(os.path.join(WHOLE, "addition.jsonl")) as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == len({r["prompt"] for r in rows}) == 8000
    wrong = careful = 0
    for row in rows:
        a, b = map(int, row["prompt"].split("+"))
        assert int(row["answer"]) == a + b and row["completion"] in (make.demonstration(a, b, True), make.demonstration(a, b, False))
        if make.demonstration(a, b, True) != make.demonstration(a, b, False):
            careful += row["completion"] == make.demonstration(a, b, True)
            wrong += row["completion"] == make.demonstration(a, b, False)
    assert 0.68 < wrong / (wrong + careful) < 0.72
