"""train.py's command line: what is wrong is one sentence, before any weight is loaded."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import train
from runs import argv, command, config, no_weights, one_sentence, spawn
from train import Config


@pytest.mark.parametrize("words, told", [
    (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
    (["--task", "bear"], "invalid choice: 'bear'"), (["--k", "1"], "--k must be at least 2, not 1"),
    (["--k", "two"], "invalid int value"), (["--lr", "nan"], "--lr must be in [0, 1], not nan"),
    (["--beta", "nan"], "--beta must be a finite number, not nan"), (["--lr", "2"], "--lr must be in [0, 1], not 2"),
    (["--rounds", "0"], "--rounds must be at least 1"), (["--replay-ratio", "1"], "--replay-ratio must be in"),
    (["--loss-type", "ipo", "--label-smoothing", "0.1"], "no meaning with --loss-type ipo"),
    (["--trainable", "vision"], "--trainable must be all, language or layers:A-B, not 'vision'"),
    (["--lora-rank", "4", "--trainable", "all"], "it has no meaning with --trainable all"),
    (["--verdict", "text"], "invalid choice: 'text'"),
    (["--tas", "bar"], "unrecognized arguments: --tas")], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_usage(words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
               capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("model.load_vlm", no_weights)
    monkeypatch.setattr(train, "load_task", no_weights)
    assert command(monkeypatch, "--out", str(tmp_path / "run"), *words) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["--beta", "inf"], ["--nll-coefficient", "inf"],
                                   ["--feature-cache-gb", "inf"]], ids=" ".join)
def test_infinity_is_out_of_range(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("model.load_vlm", no_weights)
    monkeypatch.setattr(train, "load_task", no_weights)
    assert command(monkeypatch, "--task", "bar", "--out", str(tmp_path / "run"), *words) == 2
    assert words[0] in capsys.readouterr().err.splitlines()[-1]


def test_help_explains_every_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert command(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in text for name in vars(Config()))
    assert "Exit status: 0 promoted; 3 a gate said no" in text


@pytest.mark.parametrize("flags, told", [
    ({"student": "no/such/folder"}, "no/such/folder is neither a folder nor a hub id"),
    ({"verifier": "no/such/folder"}, "no/such/folder is neither a folder nor a hub id"),
    ({"held_out_items": 1000}, "too few items with answers"), ({"task": "mmmu"}, "give --data"),
    ({"split": "test"}, "no split 'test'")], ids=str)
def test_what_is_missing_is_named(flags: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture) -> None:
    """Exit 2, one sentence, and no folder that would be in the next attempt's way."""
    assert command(monkeypatch, *argv(config(tmp_path / "run", **flags))) == 2
    assert told in one_sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
                                  ) -> None:
    """A benchmark's files without the package that reads them: how to install it, not a traceback."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    out = str(tmp_path / "run")
    assert command(monkeypatch, "--task", "mathvista", "--data", str(tmp_path), "--out", out, "--device", "cpu") == 1
    assert "pip install pyarrow" in one_sentence(capsys)


def test_one_sentence_from_the_program_itself(tmp_path: Path) -> None:
    """train.py as a user starts it: a bad value, and a student that is not there."""
    out = str(tmp_path / "run")
    for words in (["--k", "1"], ["--student", "no/such/folder"]):
        done = spawn(["train.py"], "--task", "bar", "--out", out, *words)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("train.py: ") and not Path(out).exists()
