"""Prints the table of what is promised, how closely, and which tests hold it.

    python tests/promises.py                                                         seconds

A test that holds a promise carries its key: @pytest.mark.promise("any cut"). tests/README.md has the table
with the files of the tests.
"""

import os
import sys

import pytest

PROMISES = {  # key -> (what is promised, how closely)
    "formulas": ("losses and their gradients are the formulas' on plain transformers' logits, row by row", "1e-5"),
    "perturbed": ("FGM's and NEFTune's gradients are plain transformers' on `inputs_embeds`; tied, untied, LoRA",
                  "1e-5"),
    "any cut": ("any `--micro_batch_tokens`, checkpointing on or off, gives the same gradient", "1e-6 relative"),
    "audit": ("the shares on the audit page add up to the loss that training reports at that step", "1e-6"),
    "processes": ("two processes give what one gives: update, rollouts, evaluation",
                  "1e-6 relative; rollouts identical"),
    "sharded": ("sharded over two processes by FSDP2 is one process: every metric and the saved model; full, LoRA, "
                "QLoRA", "metrics 1e-4, weights 1e-5"),
    "resume": ("killed after any step, in a rollout or inside a checkpoint, and resumed, is never stopped",
               "bit for bit"),
    "batch mates": ("a completion is the same alone and in any batch", "identical tokens"),
    "softmax": ("what is sampled is the whole softmax at `--temperature`; greedy is `generate()`'s",
                "chi-squared; identical tokens"),
    "decoder": ("the decoder for GPUs, run on a CPU, samples what the other one does; windows, LoRA, 4 bit",
                "identical tokens; log-probs 2e-5"),
    "no waiting": ("a micro-batch makes the host wait for the device once, and once more where transformers looks",
                   "counted"),
    "lag": ("`--rollout_lag 1` in a process of its own is the same in one process, killed and resumed too", "bit for bit"),
    "ratio": ("in a rollout's first update the ratio is 1, and KL is 0 at the start", "1e-5"),
    "reference": ("the reference policy is the start, and stays", "bit for bit"),
    "value": ("the value starts as the reward model's score at every position; `value/`, loaded plainly, is what it became",
              "1e-5, 1e-4"),
    "ln 2": ("DPO starts at ln 2 and rewards 0 for every kind of reference, from an adapter and in 4 bit too", "1e-6"),
    "scores": ("a saved reward model scores the same in plain transformers and peft, on either padding side", "1e-4"),
    "saved": ("full, adapter and merged folders say in plain transformers and peft what the trained model says",
              "same greedy text; logits 1e-4"),
    "files": ("files of OpenAI, LLaMA-Factory and TRL are read as they are, and TRL's reward functions run unchanged",
              "same text"),
}


def table(items, names=True):
    """Collected tests -> the lines of the table, promises in their order; without `names` with the files of
    the tests alone. KeyError for an unknown key."""
    tests = {key: {} for key in PROMISES}  # a dict keeps the order, and each name once
    for item in items:
        for mark in item.iter_markers("promise"):
            name = f"{item.path.name}: {item.function.__name__}" if names else item.path.name
            tests[mark.args[0]][f"`{name}`"] = True
    rows = [f"| {what} | {close} | {', '.join(tests[key])} |" for key, (what, close) in PROMISES.items()]
    return ["| promise | how closely | tests |", "|---|---|---|", *rows]


class Collector:
    """A plugin that keeps what pytest has collected."""

    def pytest_collection_finish(self, session):
        self.items = session.items


def collect():
    """Every test of this folder, the long ones too, none of them run."""
    collector, words = Collector(), ["--collect-only", "-qqq", "-n", "0", "-m", "long or not long"]
    with open(os.devnull, "w") as nowhere:
        stdout, sys.stdout = sys.stdout, nowhere
        try:
            pytest.main([*words, os.path.dirname(os.path.abspath(__file__))], plugins=[collector])
        finally:
            sys.stdout = stdout
    return collector.items


if __name__ == "__main__":
    print("\n".join(table(collect())))
