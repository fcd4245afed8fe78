"""What holds for all scripts: functions and constants of one name are one, flags are read, importing does nothing, limits of form."""

import ast
import glob
import os
import re

import pytest
from conftest import ROOT

SCRIPTS = [p for p in sorted(glob.glob(os.path.join(ROOT, "*.py"))) if not p.endswith("common.py")]
OWN = {"Args", "main", "evaluate", "collate", "load_examples"}  # the names that mean something else in each script


def definitions(path):
    with open(path) as file:
        source = file.read()
    named = {node.targets[0].id if isinstance(node, ast.Assign) else getattr(node, "name", None): ast.get_source_segment(source, node)
             for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign))}
    return named, source


def test_functions_of_the_same_name_are_byte_identical():
    seen, shared = {}, 0
    for path in SCRIPTS:
        for name, text in definitions(path)[0].items():
            if name not in OWN:
                shared += name in seen
                assert seen.setdefault(name, text) == text, f"{name} in {os.path.basename(path)} has drifted"
    assert shared >= 8


@pytest.mark.parametrize("path", SCRIPTS, ids=os.path.basename)
def test_every_flag_is_read(path):
    with open(os.path.join(ROOT, "common.py")) as file:
        common_source = file.read()
    source = definitions(path)[1]
    fields = re.findall(r"^    (\w+): .*HfArg\(", source, re.M)
    assert len(fields) >= 25
    for name in fields:
        assert re.search(rf"args\.{name}\b", source + common_source) or re.search(rf'getattr\(args, "{name}"', common_source), \
            f"--{name} is read nowhere"


@pytest.mark.parametrize("path", SCRIPTS + [os.path.join(ROOT, "common.py")], ids=os.path.basename)
def test_form(path):
    """At most 110 columns; the banners in their order; no function but main over 60 lines or so."""
    source = definitions(path)[1]
    assert [i for i, line in enumerate(source.splitlines(), 1) if len(line) > 110] == []
    if not path.endswith("common.py"):
        banners = re.findall(r"^# ---- (\w+)", source, re.M)
        order = ["arguments", "loss", "rewards", "data", "rollout", "evaluation", "training"]
        assert banners == [b for b in order if b in banners] and {"arguments", "loss", "data", "evaluation", "training"} <= set(banners)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            assert node.end_lineno - node.lineno <= 66, f"{node.name} is too long to read at once"
