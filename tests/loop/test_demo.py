"""The demo on a small scale, by its command; its table and its page, from made figures too."""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import judge
import train
from locks import held_elsewhere
from loop import demo
from loop.ranks import Ranks, exit_status

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ["task", "frozen baseline", "agreement", "(candidates)", "own answers", "(student)", "published rule",
           "gate before", "loss first", "last", "final accuracy", "gate after"]
SMALL = ["--gate-items", "48", "--watch-items", "8", "--held-out-items", "16", "--items-per-round", "32",
         "--rounds", "1", "--k", "4", "--min-pairs", "1", "--epochs", "99", "--steps-per-round", "3",
         "--eval-every", "2", "--device", "cpu"]


def cells(text: str) -> list[list[str]]:
    """A printed table, row by row: cells stand two blanks apart."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def summary(task: str, before: str, after: str | None, losses: bool = True) -> dict[str, Any]:
    """What finish() writes, as far as the demo reads it; no gate after training where nothing was trained."""
    def figure(value: float) -> dict[str, float]:
        return {"value": value, "low": 0.0, "high": 1.0, "n": 9}
    return {"task": task, "baseline_accuracy": figure(0.5) if after else None,
            "pre_gate": {"verdict": before, "reasons": ["why"], "published_verdict": "PASS",
                         "rubric_accuracy": figure(0.91), "baseline_accuracy": figure(0.42),
                         "own_answer_accuracy": figure(0.93), "greedy_accuracy": figure(0.44)},
            "post_gate": {"verdict": after, "reasons": ["why"]} if after else None,
            "final_accuracy": figure(0.625) if after else None,
            "loss_first": 0.6931 if losses else None, "loss_last": 0.41 if losses else None}


def write(folder: Path, outcome: dict[str, tuple[str, str | None]], losses: bool = True) -> None:
    """A finished demo's two runs, as far as the report reads them."""
    for task, (before, after) in outcome.items():
        (folder / task).mkdir(parents=True)
        (folder / task / "summary.json").write_text(json.dumps(summary(task, before, after, losses)))
        log = [{"step": 0, "eval/accuracy": 0.5}]
        if losses:
            log += [{"step": k, "round": 1 + k // 5, "loss": 0.7 - k / 50} for k in range(1, 9)]
            log += [{"step": 9, "round": 2, "loss": 0.5, "eval/accuracy": 0.75}]
        if after:                                                           # a run that the gate stopped has no log
            (folder / task / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


# ---- the command

def test_small_demo(tmp_path: Path) -> None:
    """Both tasks by the ordinary program, then the table and the page. On so few items the gates may say either; the
    exit status follows from what they said. Asked again, it touches nothing."""
    out = tmp_path / "d"
    command = [sys.executable, "train.py", "--out", str(out), *SMALL]
    how = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True,
           "timeout": 300}
    done = subprocess.run(command, **how)
    assert "Traceback" not in done.stderr, done.stderr
    summaries = {task: json.loads((out / task / "summary.json").read_text()) for task in ("bar", "red")}
    said = {task: (s["pre_gate"]["verdict"], (s["post_gate"] or {}).get("verdict")) for task, s in summaries.items()}
    assert done.returncode == (0 if said == {"bar": ("PASS", "PROMOTE"), "red": ("BLOCK", "REJECT")} else 1)
    assert [line for line in done.stdout.splitlines() if line.startswith("== ")] == ["== bar", "== red"]
    shown = done.stdout.splitlines()
    [head] = [k for k, line in enumerate(shown) if line.split()[:2] == ["task", "frozen"]]
    table = cells("\n".join(shown[head:head + 3]))
    assert table[0] == COLUMNS and [row[0] for row in table[1:]] == ["bar", "red"]
    assert all(len(row) == len(COLUMNS) for row in table)
    for _, *row in table[1:]:
        assert row[0] != "-" and {row[5], row[6]} <= {"PASS", "BLOCK"}
    assert shown[-1] == f"page: {out / 'report.html'}"
    page = (out / "report.html").read_text()
    assert page.index("<table>") < page.index("<figure>") < page.index('class="row ') and page.count("data:image/") > 20
    assert {p.name for p in out.iterdir()} == {"bar", "red", "report.html"}
    assert f"page: {out / 'red' / 'report.html'}" in shown
    for task in ("bar", "red"):
        settings = json.loads((out / task / "config.json").read_text())
        assert settings["task"] == task and settings["force"] is (task == "red") and settings["rounds"] == 1
        assert (out / task / "metrics.jsonl").is_file() or summaries[task]["pre_gate"]["verdict"] == "BLOCK"
    assert summaries["red"]["steps"] == 3 and summaries["red"]["post_gate"]["verdict"]
    assert not (out / "red" / "deploy").exists() or summaries["red"]["post_gate"]["verdict"] == "PROMOTE"


@pytest.fixture(autouse=True)
def same_handler() -> Iterator[None]:
    """The program sets a signal handler; the one of before is put back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("words", [[], ["--resume"]], ids=str)
def test_existing_folder(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture) -> None:
    """Exit 2, one sentence, nothing touched; the demo is not resumed either."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "d"), "--device", "cpu", *words])
    try:
        status = train.cli()
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and said.startswith("train.py: ") and ("--resume" if words else "d exists") in said
    assert (tmp_path / "d" / "mine").read_text() == "mine"


def test_run_asks_main_for_both_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It replaces runs/demo, where it was not told another folder, and forces the second task alone."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs" / "demo", demo.EXPECTED)
    (tmp_path / "runs" / "demo" / "report.html").write_text("old")
    asked = []

    def main(cfg: train.Config, ranks: Any) -> int:
        asked.append((cfg.task, cfg.force, cfg.out, cfg.seed))
        write(Path(cfg.out).parent, {cfg.task: demo.EXPECTED[cfg.task]})
        return 0
    assert demo.run(main, train.Config(seed=7), Ranks("cpu")) == 0
    assert asked == [("bar", False, "runs/demo/bar", 7), ("red", True, "runs/demo/red", 7)]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["demo"]
    assert (tmp_path / "runs" / "demo" / "report.html").read_text() != "old"


@pytest.mark.parametrize("script, folder", [("train", "demo/bar"), ("judge", "judge-demo")])
def test_a_demo_that_cannot_start_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str,
                                                         folder: str) -> None:
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "runs" / folder / "summary.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--student" if script == "train" else "--verifier", "nope"])
    assert (train.cli() if script == "train" else judge.cli()) != 0
    assert kept.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]
    shutil.rmtree("runs")
    assert (train.cli() if script == "train" else judge.cli()) != 0 and not list(tmp_path.iterdir())


# ---- an earlier demo

RUNS = ("bar", "red")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished demo, named by its page."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/demo")
    write(folder, demo.EXPECTED)
    (folder / "report.html").write_text("earlier")
    return folder


def named(folder: Path) -> str:
    """Which demo lies there; nothing else lies beside it."""
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]
    return (folder / "report.html").read_text()


def make_new(folder: Path, runs: tuple[str, ...] = RUNS) -> None:
    """A new demo as far as it came: its finished runs and, at the end, its page."""
    write(folder, {task: demo.EXPECTED[task] for task in runs})
    if runs == RUNS:
        (folder / "report.html").write_text("new")


def test_a_new_demo_takes_the_place(folder: Path) -> None:
    with demo.replaced(folder, RUNS, Ranks("cpu")):
        assert not folder.exists()
        make_new(folder)
    assert named(folder) == "new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("runs", [(), ("bar",)])
def test_a_demo_that_fails_costs_nobody_the_earlier_one(folder: Path, error: type[BaseException], runs: tuple) -> None:
    with pytest.raises(error), demo.replaced(folder, RUNS, Ranks("cpu")):
        make_new(folder, runs)
        raise error
    assert named(folder) == "earlier"


@pytest.mark.parametrize("runs", [(), ("bar",), RUNS], ids=str)
@pytest.mark.parametrize("moment", ["at work", "in a rename", "in a removal"])
def test_a_demo_that_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str, runs: tuple) -> None:
    """Whatever it left, the next start finds the earlier demo, or the new one if it was finished; so does the one after
    that, which is killed while it tidies up."""
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed
    before = folder.with_name(".demo.before")
    folder.rename(before)                               # what a killed one leaves: no cleaning up
    if runs:
        make_new(folder, runs)
    (folder.parent / ".demo.lock").write_text("71 node-3")
    if moment != "at work":
        with monkeypatch.context() as patch:
            patch.setattr(*(("os.replace", killed) if moment == "in a rename" else ("shutil.rmtree", killed)))
            with contextlib.suppress(Killed):
                demo.settle(folder, before, RUNS)
    with pytest.raises(KeyError), demo.replaced(folder, RUNS, Ranks("cpu")):
        raise KeyError
    assert named(folder) == ("new" if runs == RUNS else "earlier")


@pytest.mark.parametrize("name", [
    "notes.txt", "bar/notes.txt", "bar/deploy/notes", "judge/config.json", "red2/config.json", "bar/eval/report.json",
    "red/checkpoints/mine/state.pt", ".hidden"])
def test_what_no_demo_has_made_is_not_removed(folder: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    before = sorted(folder.parent.rglob("*"))
    assert exit_status("train.py", lambda ranks: demo.run(None, train.Config(), ranks), train.Config(device="cpu")) == 2
    assert f"train.py: runs/demo holds {name}, which the demo did not make" in capsys.readouterr().err
    assert sorted(folder.parent.rglob("*")) == before and (folder / name).read_text() == "mine"


def test_what_a_demo_makes_is_known(folder: Path) -> None:
    """Every file of a run, those of a killed one too."""
    files = ["bar/pairs/round-1.jsonl", "bar/pairs/images/12ab.png", "red/pairs/images/12ab.png.34cd.tmp",
             "bar/export/swift/pairs.jsonl", "red/export/llamafactory/dataset_info.json", "bar/gate_records.jsonl",
             "bar/candidates/round-1.jsonl", "red/held_out.jsonl", "red/trained_on.jsonl", "bar/.lock",
             "bar/report.html", "red/report.html.12ab.tmp", "report.html",
             "bar/checkpoints/step-000001-001/state.pt", "red/checkpoints/.step-000001-001.7.new/state.pt",
             "bar/deploy/model.safetensors", "bar/deploy/chat_template.jinja", "bar/deploy/config.json",
             "bar/deploy/README.md", "demo.png", "demo.txt", "red/.candidate.7.new/model.safetensors",
             ".red.7.new/config.json", "red/summary.json.12ab.tmp"]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    demo.check_demo(folder, RUNS)


@pytest.mark.parametrize("name", [".demo.lock", "demo/red/.lock"])
def test_another_process_is_at_it(folder: Path, name: str) -> None:
    """Another demo, or one of its runs that is resumed by itself."""
    with held_elsewhere(folder.parent / name), pytest.raises(ValueError, match="is in use by process 71 on node-3"):
        demo.run(None, train.Config(), Ranks("cpu"))
    (folder.parent / name).unlink()
    assert named(folder) == "earlier"


def test_a_link_in_its_place(folder: Path) -> None:
    folder.rename("elsewhere")
    folder.symlink_to(Path("elsewhere").absolute())
    with pytest.raises(ValueError, match="runs/demo is not a folder"):
        demo.run(None, train.Config(), Ranks("cpu"))
    assert folder.is_symlink() and Path("elsewhere/report.html").exists()


# ---- the report

@pytest.mark.parametrize("outcome, status", [
    ({"bar": ("PASS", "PROMOTE"), "red": ("BLOCK", "REJECT")}, 0),
    ({"bar": ("PASS", "REJECT"), "red": ("BLOCK", "REJECT")}, 1),
    ({"bar": ("PASS", "PROMOTE"), "red": ("BLOCK", "PROMOTE")}, 1),
    ({"bar": ("PASS", "PROMOTE"), "red": ("PASS", "REJECT")}, 1),
    ({"bar": ("BLOCK", None), "red": ("BLOCK", "REJECT")}, 1)], ids=str)
def test_report_says_whether_it_went_as_expected(outcome: dict[str, tuple[str, str | None]], status: int,
                                                 tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, outcome)
    assert demo.report(tmp_path) == status
    shown = capsys.readouterr().out
    assert all(name in shown for name in COLUMNS)
    head, *tasks, where, page = shown.splitlines()[-5:]
    wrong = sum(outcome[task] != demo.EXPECTED[task] for task in outcome)
    assert head.startswith(f"{wrong} of 2 tasks did not" if wrong else "Both tasks went as they should")
    for line, (task, (before, after)) in zip(tasks, outcome.items()):
        assert line.startswith(f"- {task} ({demo.TITLES[task]}): {before} before training, ")
        assert f", {after or 'no gate'} after it, " in line
        assert demo.MEANINGS[after] in line and ("as it should be" in line) == (
            (before, after) == demo.EXPECTED[task])
    assert where.startswith(f"Both runs are in {tmp_path}. ") and page == f"page: {tmp_path / 'report.html'}"
    assert all(line.removeprefix("- ") in (tmp_path / "report.html").read_text() for line in tasks)


def test_report_of_what_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, {"bar": ("PASS", "PROMOTE")})
    assert demo.main(str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error == f"loop.demo: {tmp_path} is not a finished demo: {tmp_path / 'red'} holds no summary.json\n"


@pytest.mark.parametrize("file, content", [
    ("summary.json", '{"pre_gate": null}'), ("summary.json", '{"pre_gate": {"verdict": "PASS"}, "post_gate": [1]}'),
    ("metrics.jsonl", "3"), ("metrics.jsonl", '{"loss": 1}'), ("metrics.jsonl", '{"step": "x", "loss": "y"}')])
def test_report_of_what_no_demo_wrote(file: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, demo.EXPECTED)
    whole = json.loads((tmp_path / "bar" / "summary.json").read_text())
    if file == "summary.json":
        content = json.dumps(whole | json.loads(content))
    (tmp_path / "bar" / file).write_text(content + "\n")
    assert demo.main(str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"loop.demo: {tmp_path} is not a finished demo: ") and error.count("\n") == 1


def test_report_without_losses(tmp_path: Path) -> None:
    """Every round was skipped: the loop logged what it watched and no loss."""
    write(tmp_path, {"bar": ("PASS", "REJECT"), "red": ("BLOCK", "REJECT")}, losses=False)
    assert demo.report(tmp_path) == 1
    page = (tmp_path / "report.html").read_text()
    assert "bar: watched accuracy" in page and "DPO loss</figcaption>" not in page


def test_a_page_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture) -> None:
    """One sentence; the status is still the demo's."""
    def full(*_: Any) -> None:
        raise OSError("cannot write the page: the disk is full")
    write(tmp_path, demo.EXPECTED)
    monkeypatch.setattr("loop.report.page.write_bytes_whole", full)
    assert demo.report(tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no page: cannot write the page: the disk is full"


def test_table() -> None:
    """A row a task; what is not known is a dash."""
    rows = cells(demo.table({"bar": summary("bar", "PASS", "PROMOTE"), "red": summary("red", "BLOCK", None, False)}))
    assert rows[0] == COLUMNS
    assert rows[1] == ["bar", "0.500", "0.910", "0.420", "0.930", "0.440", "PASS", "PASS", "0.693", "0.410", "0.625",
                       "PROMOTE"]
    assert rows[2] == ["red", "-", "0.910", "0.420", "0.930", "0.440", "PASS", "BLOCK", "-", "-", "-", "-"]
    lines = demo.table({"bar": summary("bar", "PASS", "PROMOTE")}).splitlines()
    assert len({len(line) for line in lines}) == 1
