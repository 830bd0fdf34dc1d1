"""The README's commands are ones the scripts accept, and the files it names exist."""
from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tasks.flags import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"(?:python|torchrun(?: --standalone)? --nproc-per-node \w+) (train|eval|gate|judge)\.py([^`\n#&;]*)")


def commands() -> list[tuple[str, list[str]]]:
    """(script, arguments) of every command, lines that end in a backslash joined."""
    found = COMMAND.findall(README.replace("\\\n", " "))
    return [(script, [word for word in shlex.split(words) if word != "..."]) for script, words in found]


@pytest.mark.parametrize("script, words", commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_flags_are_known(script: str, words: list[str]) -> None:
    words = ["0" if word == "$s" else word for word in words]
    program = importlib.import_module(script)
    parser = program.build_parser() if script == "gate" else build_parser(program.Config, None)
    program.Config(**vars(parser.parse_args(words)))


def test_commands_are_found() -> None:
    assert {script for script, _ in commands()} == {"train", "eval", "gate", "judge"} and len(commands()) >= 12


def test_the_two_commands_stand_on_lines_of_their_own() -> None:
    lines = README.splitlines()
    assert "pip install -r requirements.txt && python train.py" in lines
    assert "pip install -r requirements.txt && pytest" in lines


def test_named_files_exist() -> None:
    block = README.split("## The files")[1].split("```")[1]
    for name in re.findall(r"[\w./]+\.py\b", block):
        assert (ROOT / name).exists() or list(ROOT.glob(f"*/{name}")) or list(ROOT.glob(f"*/*/{name}")), name
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(?:(?:model|tests|tasks|loop)/[\w./-]+)`", README):
        assert (ROOT / name.strip("`")).exists(), name
