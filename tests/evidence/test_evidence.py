"""tests/evidence/evidence.py: its tables and pictures on a few constructed runs, and on those that are committed."""
from __future__ import annotations

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import evidence
import evidence_report
from evidence import Config, Plan, Setting
from evidence_report import report_text, rule_table
from evidence_rules import DEFAULTS, OURS, RULES, allows, choose_thresholds, outcome, read_runs
from gate import clustered_ratio

COMMITTED = evidence.RESULTS
AGREES, OWN, LOW = "published", "own answers", "direction"


def figure(value: float) -> list[float]:
    """A figure that is known to 0.05."""
    return [value, value - 0.05, value + 0.05, 200]


def row(task: str = "bar", verifier: str = "verifier", verifier_seed: int = 0, student_seed: int = 0, tau: float = 0.5,
        change: float = 0.2, agreement: float = 0.9, own: float = 0.9, low: float = 0.8, **more: Any) -> dict[str, Any]:
    """A run whose student starts at 0.5."""
    setting = Setting(task, verifier, verifier_seed, "student", student_seed, "logits", tau)
    measures = dict.fromkeys(evidence.MEASURES, figure(0.5))
    measures["rubric_accuracy"] = figure(agreement)
    measures["own_answer_accuracy"] = figure(own)
    measures["direction"] = [low + 0.1, low, 1.0, 40]
    result = {
        "gate": "PASS", "published_gate": "PASS", "gate_after": "PROMOTE", "baseline": figure(0.5),
        "final": figure(0.5 + change), "change": figure(change), "parsed": [200, 200], "loss_first": 0.693,
        "loss_last": 0.6, "diagnosis": "none of them", "steps": 90, "warnings": 0,
        "rounds": [[100, 60, 50, 45], [200, 140, 100, 30]], "measures": measures,
        "by_margin": [[0.0, 0.8, 50, 60], [0.5, low, 40, 45]], "seconds": 10.0}
    return asdict(setting) | result | more


def grid() -> list[dict[str, Any]]:
    """Good verifiers on both tasks; one that is wrong on red, of which only its own answers tell; one harmless."""
    rows = []
    for seed, student, tau in product(range(3), range(2), (0.0, 0.5)):
        key: dict[str, Any] = {"verifier_seed": seed, "student_seed": student, "tau": tau}
        rows += [
            row(**key),
            row("red", "verifier-0", **key),
            row("red", change=-0.3 - tau / 10, own=0.1, warnings=1, **key),
            row("red", "verifier-50", change=0.01, low=0.3, **key)]
    return rows


# ---- rules

def test_outcome() -> None:
    outcomes = {change: outcome(row(change=change)) for change in (-0.06, -0.04, 0.0, 0.04, 0.06)}
    assert outcomes == {-0.06: "harmful", -0.04: "neither", 0.0: "neither", 0.04: "neither", 0.06: "helpful"}


@pytest.mark.parametrize("figures, blocked", [
    ({}, []), ({"agreement": 0.49}, [AGREES]), ({"own": 0.49}, [OWN]), ({"low": 0.49}, [LOW]),
    ({"agreement": 0.5, "own": 0.5, "low": 0.5}, []), ({"agreement": 0.1, "low": 0.2}, [AGREES, LOW])])
def test_rules(figures: dict[str, float], blocked: list[str]) -> None:
    run = row(**figures)
    assert [rule for rule in RULES if not allows(rule, run, DEFAULTS)] == blocked
    assert allows(OURS, run, DEFAULTS) is not bool(blocked)


def test_chosen_thresholds() -> None:
    helpful = [row(change=0.2, agreement=agreement) for agreement in (0.8, 0.7)]
    harmful = [row(change=-0.2, agreement=agreement) for agreement in (0.6, 0.3)]
    assert choose_thresholds(helpful + harmful) == {AGREES: pytest.approx(0.15), OWN: 0.0, LOW: 0.0}
    one_more = row(change=0.2, own=0.3)
    assert choose_thresholds([one_more, *helpful, *harmful])[OWN] == 0.0           # nothing to choose by
    thresholds = choose_thresholds([row(change=0.0)])
    assert set(thresholds.values()) == {0.0}


def test_share_counts_verifiers() -> None:
    rows = []
    for seed, student in product(range(4), range(5)):
        rows.append(row(verifier_seed=seed, student_seed=student, own=0.9 if seed else 0.1))
    clustered = clustered_ratio([(0, 5), (5, 5), (5, 5), (5, 5)])
    text = evidence_report.share(rows, lambda run: allows(OWN, run, DEFAULTS))
    assert text == f"15 of 20 [{clustered['low']:.2f}, {clustered['high']:.2f}]"
    assert clustered["low"] < 0.3
    assert evidence_report.share([], bool) == "0 of 0"


def test_rule_table() -> None:
    calls = {}
    for line in rule_table(grid(), DEFAULTS).splitlines()[2:]:
        name, _, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        calls[name] = [cell.split(" [")[0] for cell in cells]
    assert calls == {AGREES: ["12 of 12", "0 of 24", "12 of 12"], OWN: ["0 of 12", "0 of 24", "12 of 12"],
                     LOW: ["12 of 12", "0 of 24", "0 of 12"], OURS: ["0 of 12", "0 of 24", "0 of 12"]}


def test_part_table() -> None:
    lines = evidence_report.part_table(grid()).splitlines()
    assert lines[2:] == ["| `red` | 12 | 12 | 0 | 12 | 0 |", "| `verifier` | 12 | 12 | 0 | 12 | 0 |",
                         "| `student`, `logits`, tau 0 | 6 | 6 | 0 | 6 | 0 |",
                         "| `student`, `logits`, tau 0.5 | 6 | 6 | 0 | 6 | 0 |"]


@pytest.mark.parametrize("first, second, expected", [
    ([1, 2, 3], [10, 20, 90], "+1.00"), ([1, 2, 3], [3, 2, 1], "-1.00"), ([1, 1, 2, 2], [1, 2, 1, 2], "+0.00"),
    ([1, 2, 3], [5, 5, 5], "-"), ([1, 2], [1, 2], "-")])
def test_rank_correlation(first: list[float], second: list[float], expected: str) -> None:
    assert evidence_report.rank_correlation(first, second) == expected


def test_auroc() -> None:
    assert evidence_report.auroc([3, 2], [1, 2]) == "0.88"
    assert evidence_report.auroc([], [1]) == "-"
    assert "| verifier's - student's greedy accuracy | 1.00 | - | 1.00 |" in evidence_report.measure_table(grid())


# ---- the report

def test_report(tmp_path: Path) -> None:
    coverage = {"data_sets": 10, "intervals": {"direction": {"good": 0.95, "coin": 0.97}},
                "direction": {"mixed_pairs": [35, 400], "most_at_0.5": 0.0249, "least_at_0.8": 0.957}}
    text = evidence_report.write_report(grid(), coverage, tmp_path)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == text
    assert "48 runs" in text and "12 harmful, 12 neither, 24 helpful" in text
    assert "in 48 of 48 runs that had pairs, and in 12 of 12 of the harmful ones" in text
    assert "warning from the watch split came in 12 of 12 harmful runs and in 0 of 24 helpful ones" in text
    assert "| `red` | `verifier` | 6 | -30.0 | -35.0 | 6 of 6 | 0.80 (300) | 0.80 (240) |" in text
    assert "| `red` | `verifier` | `student` | `logits` | 0.90 (600 of 1200) | 0.30 (1200 of 2400) |" in text
    assert "promoted 12 of 12 harmful, 12 of 12 neither, 24 of 24 helpful runs" in text and "none of them 12" in text
    assert "| direction | 2 | 95.0 % | 97.0 % |" in text and "95.7 %" in text
    if not list(tmp_path.glob("*.png")):
        pytest.importorskip("matplotlib")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["loss.png", "rules.png"]


def test_report_of_a_run_without_pairs() -> None:
    without = row("red", change=0.0, rounds=[[0, 0, 0, 0]] * 2, loss_first=None, loss_last=None, low=0.0)
    without["measures"]["direction"] = [None, 0.0, 1.0, 0]
    without["by_margin"] = [[0.0, None, 0, 0], [0.5, None, 0, 0]]
    text = report_text([*grid(), without])
    assert "in 48 of 48 runs that had pairs" in text
    assert "49 runs" in text


def test_the_order_of_runs_does_not_matter() -> None:
    rows = grid()
    assert report_text(rows) == report_text(rows[::-1])


def test_committed_report() -> None:
    """table.md is what --report makes of runs.jsonl, and the rules are those of gate.py."""
    rows = read_runs(COMMITTED / "runs.jsonl")
    coverage = json.loads((COMMITTED / "coverage.json").read_text(encoding="utf-8"))
    assert (COMMITTED / "table.md").read_text(encoding="utf-8") == report_text(rows, coverage)
    for run in rows:
        for rule, name in ((AGREES, "published_gate"), (OURS, "gate")):
            assert allows(rule, run, DEFAULTS) is (run[name] == "PASS")

    settings = {evidence.row_key(asdict(setting)) for setting in evidence.whole_plan().settings}
    assert {evidence.row_key(run) for run in rows} == settings
    assert len(rows) == len(settings)
    assert all(path.stat().st_size < 150_000 for path in COMMITTED.glob("*.png"))


# ---- what is run

def write_runs(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A runs.jsonl of these runs."""
    lines = [json.dumps(run) + "\n" for run in rows]
    (folder / "runs.jsonl").write_text("".join(lines), encoding="utf-8")


def test_only_what_is_missing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = []
    for run in grid():
        settings.append(Setting(**{name: run[name] for name in Setting.__dataclass_fields__}))
    write_runs(tmp_path, grid()[1:])
    asked: list[Any] = []
    monkeypatch.setattr(evidence, "make_models", lambda cfg, plan, missing: asked.append(missing))
    monkeypatch.setattr(evidence, "make_runs", lambda cfg, plan, missing, path: asked.append(missing))
    monkeypatch.setattr(evidence, "simulate", lambda cfg, plan, path: None)

    plan = Plan(tuple(settings), make=(), loop={}, data_sets=1, truth_items=1)
    assert evidence.run(Config(results=str(tmp_path)), plan) == 0
    assert asked == [[settings[0]], [settings[0]]]
    assert evidence.run(Config(results=str(tmp_path), report=True), plan) == 0
    assert len(asked) == 2


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plan = Plan((), make=(), loop={}, data_sets=1, truth_items=1)
    assert evidence.run(Config(results=str(tmp_path), report=True), plan) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_shipped_models_are_not_made(tmp_path: Path) -> None:
    cfg = Config(work=str(tmp_path))
    for name, (checkpoint, flags) in evidence.MODELS.items():
        shipped = evidence.model_folder(cfg, name, 0) == evidence.TINY / checkpoint
        assert shipped is (not flags)
        assert tmp_path in evidence.model_folder(cfg, name, 1).parents
    needed = evidence.needed_models(evidence.whole_plan().settings)
    folders = {evidence.model_folder(cfg, *model) for model in needed}
    assert len(folders) == len(needed) == 5 + 1 + 4 * 3
