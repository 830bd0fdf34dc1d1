"""judge.py's loop: what a run writes, that it resumes bit for bit, what it reads, how it ends."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import judge
from eval import load_task
from judge import Judgment
from loop import judge_splits
from loop.ranks import Ranks
from loop.report.candidates import read_rows
from loop.speed import without_wall_clock
from model import load_vlm
from tasks import Item
from tasks.jsonl import export_items

ROOT = Path(__file__).resolve().parents[2]
FEW = {"items": 24, "held_out_items": 12, "iterations": 2, "patience": 2, "epochs": 2, "batch_size": 4,
       "save_every": 1, "n": 8, "votes": 3}


def config(out: Path, **flags: Any) -> judge.Config:
    return judge.Config(**{**FEW, "task": "red", "out": str(out), **flags})


def files(folder: Path) -> dict[str, Any]:
    """What must be the same in every repetition: not the folder's own name, nor how fast it went."""
    found: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
                             if path.is_file() and "checkpoints" not in path.parts and path.name != "config.json"}
    assert found.pop("report.html").startswith(b"<!DOCTYPE html>")
    found["metrics.jsonl"] = [without_wall_clock(row) for row in read_rows(folder / "metrics.jsonl")]
    if "deploy/README.md" in found:
        found["deploy/README.md"] = found["deploy/README.md"].replace(bytes(folder), b"RUN")
    return found


@pytest.fixture(scope="module", autouse=True)
def few_items() -> Iterator[None]:
    """The demo's tasks draw thousands of pictures; the first eighty do."""
    def load_few(name: str, data: str | None, split: str | None) -> list[Item]:
        return load_task(name, data, split, limit=None if data else 80)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_splits, "load_task", load_few)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("judge") / "run"
    with Ranks("cpu") as ranks:
        status = judge.main(config(out), ranks)
    assert (out / "deploy").is_dir() == (status == 0)
    return out


def test_from_the_command_line(tmp_path: Path) -> None:
    """Anyone's questions; the judge that comes of it is one that eval.py could load."""
    export_items(load_task("red", limit=40), tmp_path / "mine.jsonl")
    flags = [word for name, value in FEW.items() for word in ("--" + name.replace("_", "-"), str(value))]
    flags += ["--task", "jsonl", "--data", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, str(ROOT / "judge.py"), *flags], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode in (0, 3), done.stderr
    assert "held-out accuracy" in done.stdout and "kept share" in done.stdout
    if done.returncode == 0:
        assert load_vlm(tmp_path / "run" / "deploy").file_dtype == torch.bfloat16


def test_summary(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert 1 <= len(summary["iterations"]) <= 2 and summary["heldout"] == "answers"
    for row in summary["iterations"]:
        for name in ("kept_share", "order_consistency", "first_position_rate", "heldout_accuracy"):
            assert row[name].keys() == {"value", "low", "high", "n"} and 0 <= row[name]["value"] <= 1, name
        assert row["trained_on"] % 2 == 0
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(summary["steps"] + 1))
    assert [row["heldout_accuracy"] for row in rows if "heldout_accuracy" in row] == [
        row["heldout_accuracy"]["value"] for row in [summary["initial"], *summary["iterations"]]]
    assert all(row["loss"] >= 0 for row in rows[1:])
    judged = [json.loads(line) for line in (whole / "pairs" / "judged-1.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (whole / "pairs" / "training.jsonl").read_text().splitlines()]
    assert len(judged) == 2 * len(pairs) and all(j["token_ids"] for j in judged)


@pytest.mark.parametrize("stop_after", [0, 1, 3, 5])
def test_resume_repeats_the_run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    """Stopped after any step, resumed: the same files, bit for bit."""
    out, rows = tmp_path / "run", []

    def log(run: Any, row: dict) -> None:
        logged(run, row)
        rows.append(row)
        if row["step"] == stop_after and len(rows) == stop_after + 1:
            os.kill(os.getpid(), signal.SIGTERM)
    logged = judge.Run.log
    monkeypatch.setattr(judge.Run, "log", log)
    with Ranks("cpu") as ranks, pytest.raises(judge.Interrupted):
        judge.main(config(out), ranks)
    assert not (out / "summary.json").exists()
    with Ranks("cpu") as ranks:
        judge.main(config(out, resume=True), ranks)
    assert files(out) == files(whole)


def test_a_finished_run_stays_as_it_is(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture) -> None:
    """Resumed, it says how it ended, loads nothing and ends so again; without its checkpoints it is refused."""
    shutil.copytree(whole, tmp_path / "run")
    deployed = json.loads((whole / "summary.json").read_text())["deployed"]
    monkeypatch.setattr(judge, "load_trainable", None)
    with Ranks("cpu") as ranks:
        assert judge.main(config(tmp_path / "run", resume=True), ranks) == (0 if deployed else 3)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'run'} is finished: ")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with Ranks("cpu") as ranks, pytest.raises(ValueError, match="holds no checkpoint, although metrics.jsonl is at"):
        judge.main(config(tmp_path / "run", resume=True), ranks)
    assert files(tmp_path / "run") == files(whole)


def test_no_answer_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Items whose answers are absent: the same training pairs as with them; held-out pairs are labelled majority's."""
    known = load_task("red", limit=80)
    for name, items in (("known", known), ("blind", [replace(item, answer=None) for item in known])):
        monkeypatch.setattr(judge_splits, "load_task", lambda *_, items=items: items)
        with Ranks("cpu") as ranks:
            judge.main(config(tmp_path / name, iterations=1), ranks)
    for name in ("training.jsonl", "judged-1.jsonl"):
        one, other = ((tmp_path / run / "pairs" / name).read_bytes() for run in ("known", "blind"))
        assert one == other, name
    said = {name: json.loads((tmp_path / name / "summary.json").read_text())["heldout"] for name in ("known", "blind")}
    assert said == {"known": "answers", "blind": "majority"}
    assert capsys.readouterr().out.count("no held-out answer is known") == 1


def test_training_items_lose_their_answers() -> None:
    splits, known = judge.load_splits(config(Path("x")))
    assert known and all(item.answer is None for item in splits.train) and len(splits.train) == 24
    assert all(item.answer is not None for item in splits.held_out) and len(splits.held_out) == 12
    splits, _ = judge.load_splits(config(Path("x"), pairs="correct"))
    assert all(item.answer is not None for item in splits.train)


def test_a_judge_of_places_learns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture) -> None:
    """Always the first answer: no pair is kept, nothing is trained, nothing deployed; the run says so, exit 3."""
    def first(judgment: Judgment) -> Judgment:
        return replace(judgment, verdict=1)
    asked = judge.ask_judge
    monkeypatch.setattr(judge, "ask_judge", lambda *a, **k: [tuple(map(first, both)) for both in asked(*a, **k)])
    with Ranks("cpu") as ranks:
        assert judge.main(config(tmp_path / "run"), ranks) == 3
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 0 and summary["deployed"] is None and not (tmp_path / "run/deploy").exists()
    assert [row["kept_share"]["value"] for row in summary["iterations"]] == [0]
    for name, value in (("first_position_rate", 1), ("heldout_accuracy", 0.5), ("order_consistency", 0)):
        assert summary["initial"][name]["value"] == summary["iterations"][0][name]["value"] == value
    assert "nothing to train on" in capsys.readouterr().out


@pytest.mark.parametrize("flags, status, words", [
    (["--iterations", "0"], 2, "--iterations"), (["--pairs", "wrong"], 2, "--pairs"), (["--votes", "20"], 2, "--votes"),
    (["--data", "x"], 2, "--data"), (["--temperature", "0"], 2, "--temperature"), (["--unknown"], 2, "--unknown"),
    (["--task", "red", "--verifier", "/nowhere", "--held-out-items", "8"], 2, "nowhere"),
    (["--task", "jsonl", "--data", "/nowhere"], 2, "nowhere"), (["--task", "red", "--resume"], 2, "resume"),
    (["--task", "red", "--held-out-items", "5000"], 2, "too few")])
def test_bad_flags(flags: list[str], status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                   capsys: pytest.CaptureFixture) -> None:
    """One sentence, and nothing on disk."""
    found, said = said_by(monkeypatch, capsys, *flags, *(["--out", str(tmp_path / "run")] if "--task" in flags else []))
    assert found == status and words in said and len(said.strip().splitlines()) == 1, said
    assert not (tmp_path / "run").exists()


def said_by(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *flags: str) -> tuple[int, str]:
    """The exit status of judge.py with these flags, and what it writes to stderr."""
    monkeypatch.setattr(sys, "argv", ["judge.py", *flags])
    try:
        status = judge.cli()
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


def test_an_earlier_run_is_kept(whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    before = files(whole)
    status, said = said_by(monkeypatch, capsys, "--task", "red", "--out", str(whole))
    assert status == 2 and "--resume" in said and files(whole) == before


def test_pairs_are_no_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    row = {"id": "p", "question": "?", "images": [], "responses": ["a", "b"], "better": 1}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    flags = ("--task", "jsonl", "--data", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "run"))
    status, said = said_by(monkeypatch, capsys, *flags)
    assert status == 2 and "pairs" in said and not (tmp_path / "run").exists()
