"""--audit: the shares on a page add up to the loss that training reports, and a browser shows its tokens."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, run
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import common
import dpo
import grpo
import ppo
import reward_model
import sft

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SFT = os.path.join(TINY, "sft")


class Page(HTMLParser):
    """Reads a page back: .loss, .rest, and .rows of title, text, columns {name: [cell a token]}."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.rows, self.texts, self.refused = [], {}, []
        self.tag = self.id = None
        self.feed(html)
        self.loss = float(self.texts["loss"])
        self.rest = float(self.texts.get("rest", 0))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.refused += [name for name in attributes if name in ("src", "href") or name.startswith("on")]
        self.tag, self.id = tag, attributes.get("id")
        if tag == "article":
            self.rows.append({"title": "", "tokens": [], "cells": [], "names": []})
        if tag == "span" and self.rows:
            self.rows[-1]["tokens"].append("")
        if tag == "tr" and self.rows:
            self.rows[-1]["cells"].append([])
        if tag == "td":
            self.rows[-1]["cells"][-1].append("")

    def handle_endtag(self, tag):
        self.tag = self.id = None

    def handle_data(self, data):
        if self.id:
            self.texts[self.id] = self.texts.get(self.id, "") + data
        elif self.rows and self.tag in ("h2", "small"):
            self.rows[-1]["title"] += data
        elif self.rows and self.tag == "span":
            self.rows[-1]["tokens"][-1] += data
        elif self.tag == "th":
            self.rows[-1]["names"].append(data)
        elif self.rows and self.tag == "td":
            self.rows[-1]["cells"][-1][-1] += data.rstrip("\n")

    def column(self, name):
        """One list a row; NaN where the cell is empty."""
        return [[float(cells[row["names"].index(name)] or "nan") for cells in row["cells"][1:]]
                for row in self.rows]

    def total(self):
        titles = " ".join(row["title"] for row in self.rows)
        constants = map(float, re.findall(r"of which (\S+) at no token", titles))
        return sum(map(sum, self.column("share"))) + sum(constants) + self.rest


def audit(script, tmp_path, *flags):
    """script.main() with --audit -> the page; its output_dir does not come into being."""
    path, out = tmp_path / "page.html", tmp_path / "never"
    defaults = os.path.join(TINY, f"{script.__name__}.json")
    argv = [defaults, "--output_dir", out, "--audit", path, *flags]
    script.main(common.parse_args(script.Args, list(map(str, argv))))
    assert not out.exists()
    return Page(path.read_text())


def first_rows(name, tmp_path, count=12):
    with open(os.path.join(TINY, name)) as file, open(tmp_path / "few.jsonl", "w") as out:
        out.writelines(line for _, line in zip(range(count), file))
    return tmp_path / "few.jsonl"


@pytest.fixture
def few(tmp_path):
    """Twelve problems, so that reading them takes no time."""
    return first_rows("addition.jsonl", tmp_path)


CASES = [(sft, 1, ["--micro_batch_tokens", 200]),
         (sft, 2, ["--adversarial", "fgm", "--lora_r", 4, "--model_name_or_path", SFT]),
         (dpo, 1, []), (dpo, 3, ["--label_smoothing", 0.1, "--micro_batch_tokens", 300]),
         (dpo, 3, ["--loss_type", "ipo", "--sft_coef", 0, "--lora_r", 4]), (dpo, 3, ["--loss_type", "hinge"]),
         (reward_model, 2, ["--center_rewards_coefficient", 0.01]),
         (grpo, 1, []),
         (grpo, 3, ["--kl_coef", 0.1, "--num_iterations", 3, "--learning_rate", 1e-3, "--best_fraction", 0.5,
                    "--sft_coef", 0.1]),
         (ppo, 4, ["--kl_coef", 0.1, "--share_trunk"]), (ppo, 1, ["--sft_coef", 0.1])]


@pytest.mark.promise("audit")
@pytest.mark.parametrize("script, step, flags", CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_the_shares_add_up_to_the_loss_that_training_reports(script, step, flags, tmp_path):
    few = first_rows("preferences.jsonl" if script in (dpo, reward_model) else "addition.jsonl", tmp_path)
    if script is ppo and "--sft_coef" in flags:
        flags = [*flags, "--sft_dataset", few]
    flags = [*flags, "--dataset_name", few, "--batch_size", 4, "--eval_fraction", 0,
             "--max_steps", max(step, 2)]
    metrics = next(m for m in run(script, tmp_path / "trained", *flags) if m["step"] == step and "loss" in m)
    page = audit(script, tmp_path, *flags, *(["--audit_step", step] if step > 1 else []))
    tolerance = 1e-6 * max(1, abs(metrics["loss"]))
    assert abs(page.loss - metrics["loss"]) < tolerance
    assert abs(page.total() - metrics["loss"]) < tolerance
    assert page.refused == [] and len(page.rows) >= 2
    if "trained_tokens" in metrics and "--sft_dataset" not in flags:
        assert sum(map(sum, page.column("mask"))) == metrics["trained_tokens"]
    if script in (ppo, grpo) and "--sft_dataset" not in flags:
        pairs = zip(sum(page.column("ratio"), []), sum(page.column("mask"), []))
        away = [abs(ratio - 1) for ratio, mask in pairs if mask]
        assert sum(away) / len(away) == pytest.approx(metrics["ratio/deviation"], abs=1e-5)
    elif script is ppo:
        assert metrics["ratio/deviation"] == pytest.approx(0, abs=1e-5)


def test_a_figure_stands_at_its_own_token(tmp_path, few):
    """Index t is about token t: plain transformers gives its log-prob after those before it."""
    flags = ["--model_name_or_path", SFT, "--dataset_name", few, "--batch_size", 4, "--eval_fraction", 0]
    page = audit(sft, tmp_path, *flags)
    args = common.parse_args(sft.Args, list(map(str, ["--output_dir", tmp_path / "never", *flags])))
    tokenizer = common.load_tokenizer(args)
    train = [row["input_ids"].long() for row in sft.load_rows(args, tokenizer)[0]]
    ids_of = {"".join(common.token_texts(tokenizer, ids)): ids for ids in train}
    model = AutoModelForCausalLM.from_pretrained(SFT).eval()
    trained = sum(map(sum, page.column("mask")))
    for row, mask, *cells in zip(page.rows, *map(page.column, ("mask", "log-prob", "share"))):
        ids = ids_of["".join(row["tokens"])]
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
        want, mask = torch.cat([torch.zeros(1), logprobs]), torch.tensor(mask).bool()
        shown, share = map(torch.tensor, cells)
        torch.testing.assert_close(shown[mask], want[mask], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(share[mask], -want[mask] / trained, rtol=1e-4, atol=1e-5)
        assert mask.any() and not mask[0] and not share[~mask].any() and shown[~mask].isnan().all()


def test_scored_rows(tmp_path):
    with open(tmp_path / "scored.jsonl", "w") as file:
        for i in range(6):
            row = {"prompt": f"{i}+1", "completion": str(i + 1), "score": {"a": i / 6, "b": 1}}
            file.write(json.dumps(row) + "\n")
    page = audit(reward_model, tmp_path, "--dataset_name", tmp_path / "scored.jsonl", "--eval_fraction", 0)
    assert abs(page.total() - page.loss) < 1e-6
    assert page.rows[0]["names"][3:] == ["score a", "given a", "score b", "given b", "share"]


def test_dpo_shares_by_hand():
    """Of the docstring: log-ratios 2 and 1 against 0, beta 0.1; L(0) = ln 2, L(3) = 0.5544, slope -0.0463."""
    args = common.parse_args(dpo.Args, [os.path.join(TINY, "dpo.json"), "--beta", "0.1", "--sft_coef", "0"])
    logprobs = torch.tensor([[0.0, 0.0, -1.0, -2.0], [0.0, 0.0, -3.0, 0.0]])
    ref_logprobs = torch.tensor([[0.0, 0.0, -3.0, -3.0], [0.0, 0.0, -3.0, 0.0]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]])
    mb = SimpleNamespace(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask, weight=torch.ones(2, 1),
                         ref_sum=ref_logprobs.sum(-1, keepdim=True))
    page = dpo.pair_shares(mb, args)
    want = torch.tensor([[0, 0, -0.0925280, -0.0462640], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(page["share"], want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(page["constants"], torch.tensor([0.6931472, 0], dtype=torch.float64))
    assert page["columns"]["reward"][0].div(args.beta).tolist() == pytest.approx([0, 0, 2, 1])


def test_tokens_join_to_the_text_and_nothing_is_markup(tmp_path, tokenizer):
    """Markup, half characters, white space and special tokens of a row's text come back as they were."""
    nasty = "<script>alert(1)</script> &amp; \"'\t  two\n\nlines \r é€😀 \x00 <|end|> </span>"
    with open(tmp_path / "rows.jsonl", "w") as file:
        for i in range(3):
            file.write(json.dumps({"prompt": f"{i}? {nasty}", "completion": f"{nasty} {i}"}) + "\n")
    page = audit(sft, tmp_path, "--dataset_name", tmp_path / "rows.jsonl", "--eval_fraction", 0)
    text = (tmp_path / "page.html").read_text()
    assert text.count("<script>") == 1 and text.count("</script>") == 1
    flags = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--eval_fraction", "0"]
    args = common.parse_args(sft.Args, [os.path.join(TINY, "sft.json"), *flags])
    train = [row["input_ids"] for row in sft.load_rows(args, common.load_tokenizer(args))[0]]
    ids_of = {tokenizer.decode(ids, clean_up_tokenization_spaces=False): ids for ids in train}
    seen = ["".join(row["tokens"]).replace("\u2400", "\0").replace("\u240d", "\r") for row in page.rows]
    assert sorted(seen) == sorted(ids_of) and any("<script>" in s and "€😀" in s for s in seen)
    for row, whole in zip(page.rows, seen):
        assert len(row["tokens"]) == len(row["cells"]) - 1 == len(ids_of[whole])


def test_token_texts_with_bytes_and_a_lost_space():
    """As in Llama: a word's leading space is stripped at the start alone, and bytes stand in for what is not
    in the vocabulary."""
    tokens = ["<unk>", "▁a", "▁b", "c", *(f"<0x{b:02X}>" for b in range(256))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    bytes_of = [4 + b for b in "€".encode()]
    assert common.token_texts(fast, [1, 2, *bytes_of, 3, 2]) == ["a", " b", "", "", "€", "c", " b"]
    for broken in ([1, *bytes_of[:2]], [*bytes_of[:1], 1, 2], bytes_of[1:] + bytes_of, [4 + 0xff] * 9):
        texts = common.token_texts(fast, broken)
        assert len(texts) == len(broken) and "".join(texts)


@pytest.mark.parametrize("break_it", [lambda share: share * 1.001, lambda share: share + 1e-6,
                                      lambda share: share * float("nan")])
def test_shares_that_do_not_add_up_are_refused(break_it, tmp_path, few, monkeypatch):
    page_rows = common.page_rows

    def broken(mb, share, *rest, **more):
        return page_rows(mb, break_it(share), *rest, **more)
    monkeypatch.setattr(common, "page_rows", broken)
    with pytest.raises(common.UserError, match="shares add up to"):
        audit(sft, tmp_path, "--dataset_name", few, "--batch_size", 4, "--eval_fraction", 0)
    assert not (tmp_path / "page.html").exists()


def test_more_rows_than_are_shown(tmp_path, few, monkeypatch):
    monkeypatch.setattr(common, "PAGE_ROWS", 3)
    page = audit(sft, tmp_path, "--dataset_name", few, "--batch_size", 8, "--eval_fraction", 0)
    assert len(page.rows) == 3 and page.rest > 0 and abs(page.total() - page.loss) < 1e-6


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", [sft, dpo], ids=lambda x: x.__name__)
def test_an_earlier_run_stays_as_it_is_and_can_be_looked_into(script, tmp_path):
    """With --resume_from_checkpoint the page is of the step after the checkpoint; no file of the run is
    touched."""
    few = first_rows("preferences.jsonl" if script is dpo else "addition.jsonl", tmp_path)
    flags = ["--dataset_name", few, "--batch_size", 4, "--eval_fraction", 0, "--max_steps", 4,
             "--save_steps", 2]
    latest = ["--resume_from_checkpoint", "latest"]
    metrics = run(script, tmp_path / "run", *flags)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    before = contents(tmp_path / "run")
    for more, step in ([], 1), (latest, 3), ([*latest, "--audit_step", 4], 4):
        where = ["--output_dir", tmp_path / "run", "--audit", tmp_path / "page.html"]
        argv = [os.path.join(TINY, f"{script.__name__}.json"), *flags, *more, *where]
        script.main(common.parse_args(script.Args, list(map(str, argv))))
        page = Page((tmp_path / "page.html").read_text())
        assert page.loss == pytest.approx(metrics[step - 1]["loss"], abs=1e-6)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("flags, says", [
    (["--audit", "page.txt"], "an .html file"), (["--audit", "nowhere/page.html"], "an .html file"),
    (["--audit_step", 2], "has no effect without --audit"),
    (["--audit", "page.html", "--audit_step", 99], "no step 99, since")], ids=str)
def test_mistakes_are_one_sentence(flags, says, tmp_path, few, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [os.path.join(TINY, "sft.json"), "--output_dir", "never", "--dataset_name", few, "--batch_size", 4,
            "--eval_fraction", 0, "--max_steps", 3]
    with pytest.raises(common.UserError, match=says):
        sft.main(common.parse_args(sft.Args, list(map(str, [*argv, *flags]))))


@pytest.mark.long
@pytest.mark.parametrize("script", [sft, dpo], ids=lambda x: x.__name__)
def test_two_processes_write_the_page_of_one(script, tmp_path):
    pages = []
    for n in 1, 2:
        path = tmp_path / f"{n}.html"
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
        command = [sys.executable, *(several if n > 1 else []), script.__file__, "--audit", path,
                   "--batch_size", "5", "--audit_step", "2", "--output_dir", tmp_path / "never"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("audit    wrote") == 1, done.stdout + done.stderr
        pages.append(Page(path.read_text()))
    assert [row["tokens"] for row in pages[0].rows] == [row["tokens"] for row in pages[1].rows]
    assert pages[0].loss == pytest.approx(pages[1].loss, abs=1e-5)
    assert not (tmp_path / "never").exists()


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")
def test_in_a_browser(tmp_path, few):
    """Focus and arrow keys show a token's figures, as they stand in its table; the page is painted orange."""
    page = audit(sft, tmp_path, "--dataset_name", few, "--batch_size", 4, "--eval_fraction", 0)
    html = (tmp_path / "page.html").read_text()
    press = ("<script>document.querySelectorAll('.tokens')[1].firstElementChild.focus();"
             "for (const key of ['End', 'ArrowLeft', 'ArrowLeft', 'ArrowRight'])"
             " document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));"
             "document.title = document.activeElement.textContent; scrollTo(0, 0)</script></body>")
    (tmp_path / "pressed.html").write_text(html.replace("</body>", press))

    def browse(*flags):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,700",
                   f"--user-data-dir={tmp_path}/profile", *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    dom = browse("--dump-dom", f"file://{tmp_path}/pressed.html")
    panel = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", dom)
    cells = page.rows[1]["cells"][-2]
    assert [name for name, _ in panel] == page.rows[1]["names"]
    assert [value for _, value in panel][2:] == cells[2:]
    assert f"<title>{page.rows[1]['tokens'][-2].replace('>', '&gt;')}</title>" in dom
    browse(f"--screenshot={tmp_path}/page.png", f"file://{tmp_path}/page.html")
    image = pytest.importorskip("PIL.Image").open(tmp_path / "page.png").convert("RGB")
    orange = sum(n for n, (r, g, b) in image.getcolors(10**6) if r > 180 and 80 < g < 180 and b < 130)
    assert orange > 2000
