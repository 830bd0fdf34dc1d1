"""gate.py as a program: reports, exit statuses, bad records and flags, and a copy of it in an empty folder."""
from __future__ import annotations

import ast
import json
import math
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import gate
from gate_data import coin, good, records_of, rejects_all, write_records
from loop import survey
from loop.survey_flags import SurveyConfig
from replay import check_record
from verifier import VERDICTS

ROOT = Path(gate.__file__).parent


def run(*flags: Any) -> subprocess.CompletedProcess:
    """gate.py as its own process, in which torch cannot be imported."""
    code = ("import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = 'gate.py'; "
            "runpy.run_path('gate.py', run_name='__main__')")
    return subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)


# ---- one file of records

FIGURES = ("baseline_accuracy", "rubric_accuracy", "balanced_accuracy", "accept_rate", "direction", "mixed_share",
           "pick_lift", "own_answer_accuracy", "greedy_accuracy", "parse_rate")


def test_records_command(tmp_path: Path) -> None:
    records = write_records(tmp_path / "good.jsonl", records_of(good, 0, own_correct=True, greedy_correct=True))
    done = run("--records", records, "--out", tmp_path / "new" / "report.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["verdict"] == "PASS" and report["rule"] == "ours" and report["items"] == 200
    for name in FIGURES:
        assert list(report[name]) == ["value", "low", "high", "n"] and report[name]["low"] < report[name]["high"]
    assert not {"recommended", "verifiers", "cost", "seconds_per_verdict", "tokens_per_verdict"} & report.keys()
    assert "PASS" in done.stdout and "direction shown" in done.stdout
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json"]


def test_records_command_blocks(tmp_path: Path) -> None:
    records = write_records(tmp_path / "r.jsonl", records_of(rejects_all, 0, accuracy=0.18))
    out = tmp_path / "report.json"
    assert run("--records", records, "--out", out).returncode == 3
    report = json.loads(out.read_text())
    assert report["verdict"] == "BLOCK" and len(report["reasons"]) == 1 and report["direction"]["value"] is None
    assert run("--records", records, "--out", out, "--rule", "paper").returncode == 0
    assert json.loads(out.read_text())["rule"] == "paper"


def test_thresholds_are_flags(tmp_path: Path) -> None:
    records = write_records(tmp_path / "r.jsonl", records_of(good, 0))
    out = tmp_path / "report.json"
    flags = ["--records", str(records), "--out", str(out)]
    assert gate.main([*flags, "--min-direction", "0.99"]) == 3
    assert gate.main([*flags, "--min-margin", "0.97"]) == 0            # all pairs are trained on, whatever is replayed
    report = json.loads(out.read_text())
    assert report["min_margin"] == 0.97 and report["direction_at_margin"]["n"] < report["direction"]["n"]


def test_costs_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    records = write_records(tmp_path / "r.jsonl", records_of(good, 0, seconds=0.25, tokens=40))
    out = tmp_path / "report.json"
    assert gate.main(["--records", str(records), "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert (report["seconds_per_verdict"], report["tokens_per_verdict"]) == (0.25, 40.0)
    head = capsys.readouterr().out.splitlines()[0]
    assert "seconds_per_verdict" in head and "tokens_per_verdict" in head and "cost" not in head.split()


# ---- several files

def verifier_files(folder: Path, **verifiers: Any) -> list[str]:
    """One file for each verifier, with costs of (seconds, tokens), on the same candidates."""
    paths = []
    for name, (verifier, seconds) in verifiers.items():
        costs = {} if seconds is None else {"seconds": seconds, "tokens": 10 * seconds}
        records: list[Any] = [dict(record) for record in records_of(good, 0, **costs)]
        if verifier is not good:
            for record in records:
                record["score"] = verifier(record)
        paths.append(str(write_records(folder / f"{name}.jsonl", records)))
    return paths


def always_right(record: dict[str, Any]) -> float:
    return 1.0 if record["correct"] else 0.0


def always_wrong(record: dict[str, Any]) -> float:
    return 0.0 if record["correct"] else 1.0


def test_several_files_are_ranked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = verifier_files(tmp_path, wrong=(always_wrong, 1), dear=(always_right, 8), cheap=(always_right, 2))
    out = tmp_path / "report.json"
    assert gate.main(["--records", *paths, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert list(report) == ["recommended", "recommendation", "verifiers"] and list(report["verifiers"]) == paths
    wrong, dear, cheap = report["verifiers"].values()
    assert (wrong["verdict"], dear["verdict"], cheap["verdict"]) == ("BLOCK", "PASS", "PASS")
    assert (wrong["cost"], dear["cost"], cheap["cost"]) == (1.0, 8.0, 2.0)
    assert (dear["seconds_per_verdict"], dear["tokens_per_verdict"]) == (8, 80.0)
    assert wrong["difference_from_best"]["value"] == -1.0
    assert report["recommended"] == paths[2]

    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == report["recommendation"] and "pass, and it is the cheapest" in lines[-2]
    assert lines[-1] == f"page: {tmp_path / 'report.html'}"
    assert [line.split()[0] for line in lines[1:4]] == ["PASS", "PASS", "BLOCK"]       # the best agreement first
    assert all(word in lines[0] for word in ("seconds_per_verdict", "tokens_per_verdict", "cost"))


def test_several_files_without_costs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = verifier_files(tmp_path, less=(good, 1), best=(always_right, None))
    out = tmp_path / "report.json"
    assert gate.main(["--records", *paths, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["recommended"] == paths[1] and "what a verdict costs is not known" in report["recommendation"]
    less, best = report["verifiers"].values()
    assert less["cost"] is None and best["cost"] is None
    assert less["seconds_per_verdict"] == 1 and "seconds_per_verdict" not in best
    assert "cost" not in capsys.readouterr().out.splitlines()[0].split()


def test_of_several_files_none_passes(tmp_path: Path) -> None:
    paths = verifier_files(tmp_path, a=(always_wrong, 1), b=(always_wrong, 2))
    out = tmp_path / "report.json"
    assert gate.main(["--records", *paths, "--out", str(out)]) == 3
    assert json.loads(out.read_text())["recommended"] is None


def test_files_of_other_candidates_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = write_records(tmp_path / "a.jsonl", records_of(good, 0))
    second = write_records(tmp_path / "b.jsonl", records_of(coin, 1))
    out = tmp_path / "report.json"
    assert gate.main(["--records", str(first), str(second), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{first} and {second} hold different candidates of item 'item 0'" in error
    assert error.count("\n") == 1 and not out.exists()


# ---- a copy in an empty folder

def run_copied(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """gate.py and replay.py alone, in a Python that has its standard library only."""
    for name in ("gate.py", "replay.py"):
        shutil.copy(ROOT / name, folder)
    return subprocess.run([sys.executable, "-S", "-E", "-s", "gate.py", *flags], cwd=folder, capture_output=True,
                          text=True)


def test_a_copy_decides_and_ranks(tmp_path: Path) -> None:
    write_records(tmp_path / "records.jsonl", records_of(good, 0))
    done = run_copied(tmp_path, "--records", "records.jsonl", "--out", "report.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "PASS"

    verifier_files(tmp_path, a=(good, 2), b=(always_right, 1))
    done = run_copied(tmp_path, "--records", "a.jsonl", "b.jsonl", "--out", "report.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["recommended"] == "b.jsonl"


def test_a_copy_explains_itself_and_asks_no_models(tmp_path: Path) -> None:
    helped = run_copied(tmp_path, "--help")
    assert helped.returncode == 0 and "--min-margin" in helped.stdout and "arXiv 2606.14629" in helped.stdout
    asked = run_copied(tmp_path, "--student", "s", "--verifier", "v", "--task", "bar")
    assert asked.returncode == 2 and asked.stderr.startswith("gate.py: models cannot be asked (No module named")
    assert asked.stderr.count("\n") == 1


def test_top_level_imports_are_the_standard_library() -> None:
    names = set()
    for node in ast.parse(Path(gate.__file__).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    assert names and {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


# ---- bad records

LINE = {"item": "a", "correct": True, "score": 0.5}
WRONG = [
    {"score": 1.5}, {"score": -0.1}, {"score": math.nan}, {"score": math.inf}, {"score": "0.5"}, {"score": True},
    {"correct": 1}, {"correct": None}, {"item": 3}, {"text": 3}, {"truncated": "no"}, {"own_correct": 0},
    {"own_correct": False}, {"seconds": -1}, {"seconds": math.nan}, {"seconds": "1"}, {"seconds": True},
    {"tokens": math.inf}, {"tokens": 10 ** 400}, {"tokens": [3]}]


@pytest.mark.parametrize("third, word", [
    (b"{", "line 3"), (b"[1]", "object"), (b"", "object"), (b"[" * 100_000, "line 3"),
    (json.dumps({"item": "a", "correct": True}).encode(), "score"),
    (json.dumps({"item": "a", "score": 1}).encode(), "correct"),
    (json.dumps({"correct": True, "score": 1}).encode(), "item"),
    *((json.dumps(LINE | wrong).encode(), next(iter(wrong))) for wrong in WRONG),
    (json.dumps(LINE | {"item": "caf\u00e9"}, ensure_ascii=False).encode("latin-1"), "utf-8")])
def test_bad_records_are_one_sentence(third: bytes, word: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = json.dumps(LINE | {"own_correct": True}).encode()
    path, out = tmp_path / "bad.jsonl", tmp_path / "report.json"
    path.write_bytes(b"\n".join([first, json.dumps(LINE | {"item": "b"}).encode(), third, first, b""]))
    out.write_text("old")
    assert gate.main(["--records", str(path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "line 3" in error and word in error and error.count("\n") == 1 and out.read_text() == "old"


def test_null_and_zero_costs_are_records() -> None:
    for costs in ({"seconds": None, "tokens": None}, {"seconds": 0, "tokens": 0}, {"seconds": 0.5, "tokens": 10 ** 15}):
        check_record(LINE | costs)


def test_unreadable_records(tmp_path: Path) -> None:
    empty, out = tmp_path / "empty.jsonl", tmp_path / "report.json"
    empty.write_text("")
    for path, word in ((empty, "line 1"), (tmp_path / "missing.jsonl", "missing.jsonl"), (tmp_path, str(tmp_path))):
        done = run("--records", path, "--out", out)
        assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1 and not out.exists()


# ---- flags

@pytest.mark.parametrize("flags", [
    [], ["--records", "r", "--student", "s"], ["--student", "s"], ["--student", "s", "--verifier", "v"],
    ["--records", "r", "--min-margin", "1.5"], ["--records", "r", "--min-margin", "nan"],
    ["--records", "r", "--k", "1"], ["--records", "r", "--rule", "theirs"], ["--records", "r", "--wat"],
    ["--records", "r", "--items", "0"], ["--records", "r", "--out", "tests"],
    ["--student", "s", "--verifier", "v", "--task", "bar", "--verdict", "oracle"],
    ["--student", "s", "--verifier", "v", "--task", "bear"],
    ["--student", "s", "--verifier", "v", "w", "--task", "bar", "--sequential"], ["--records"], ["--rec", "r"]])
def test_usage_errors(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    assert gate.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("gate.py: ") and error.count("\n") == 1


def test_help_explains_every_flag(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        gate.main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for flag in [*fields(gate.Config), *fields(SurveyConfig)]:
        assert f"--{flag.name.replace('_', '-')}" in words and flag.metadata.get("help", "") in words
    assert "(default 200)" in words and "(default 0)" in words and "{ours,paper}" in words


@pytest.mark.parametrize("name", ["records", "data"])
@pytest.mark.parametrize("link", [False, True])
def test_the_report_replaces_no_input(tmp_path: Path, name: str, link: bool, capsys: pytest.CaptureFixture) -> None:
    """Refused before anything is read: by the same name, and by another name of the same file."""
    path = write_records(tmp_path / "r.jsonl", records_of(good, 0, items=3))
    before = path.read_bytes()
    out = path
    if link:
        out = tmp_path / "link.json"
        out.symlink_to(path)
    words = [f"--{name}", str(path), "--out", str(out)]
    if name == "data":
        words += ["--student", "s", "--verifier", "v", "--task", "jsonl"]
    assert gate.main(words) == 2
    error = capsys.readouterr().err
    assert f"--{name}" in error and error.count("\n") == 1
    assert path.read_bytes() == before and {entry.name for entry in tmp_path.iterdir()} == {"r.jsonl", out.name}


def test_verdicts_are_the_verifiers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    asked = []

    def fake_survey(cfg: SurveyConfig, *_: object) -> dict:
        asked.append(cfg.verdict)
        raise ValueError("nobody is at home")
    monkeypatch.setattr(survey, "survey", fake_survey)
    models = ["--student", "s", "--verifier", "v", "--task", "bar"]
    for name in VERDICTS:
        assert gate.main([*models, "--verdict", name]) == 2
    assert asked == list(VERDICTS)
    assert gate.main([*models, "--verdict", "oracle"]) == 2
    assert "--verdict" in (error := capsys.readouterr().err) and all(name in error for name in VERDICTS)
