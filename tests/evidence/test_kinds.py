"""tests/evidence/kinds.py: the verifiers that are functions, the rules on constructed runs, the committed tables."""
from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import evidence
import kinds
import kinds_report
from eval import load_task
from evidence_rules import outcome, read_runs
from gate import clustered_proportion
from kinds import TRAINED, Config, Setting
from kinds_report import OURS, RULES, half_report, told, worst_kind, write_report
from kinds_verifiers import KINDS, make_verifier

COMMITTED = evidence.RESULTS
ITEMS = load_task("bar", limit=60)


def row(kind: str = "position", draw: int = 0, change: float = 0.2, **more: Any) -> dict[str, Any]:
    """A run that every rule lets through, of a student that starts at 0.5."""
    pilot = {"p_accuracy_fell": 0.5, "p_parse_rate_fell": 1.0}
    result = {
        "kind": kind, "draw": draw, "gates": "replay", "half": Setting(kind, draw).half, "task": "bar",
        "student": "student-0", "parameters": {}, "before": 0.5, "after": 0.5 + change,
        "change": [change, change - 0.05, change + 0.05, 1000],
        "measures": {"direction": [0.9, 0.8, 0.95, 90], "direction_at_margin": [0.9, 0.8, 0.95, 80],
                     "own_difference": None},
        "form": {"p_value": 0.6}, "pilots": {"20": pilot, "60": pilot}, "gate": "PASS", "published_gate": "PASS",
        "rounds": [[100, 90, 80, 70]], "probes": [[100, 0.9, 0.8, 0.95, 80, 1, 2, 0.7]], "warnings": 0,
        "gate_after": "PROMOTE", "seconds": 20.0}
    return result | more


# ---- the verifiers

@pytest.mark.parametrize("kind", KINDS)
def test_verifiers(kind: str) -> None:
    """Scores in [0, 1] or none, the same whenever asked; draws differ; right answers are not all of it."""
    texts = [*map(str, range(1, 10)), "6", "6", "", "what", " is 3"]
    differing = 0
    for draw in range(15):
        parameters, spoiled = make_verifier(kind, draw)
        assert parameters and make_verifier(kind, draw)[0] == parameters
        for item in ITEMS[:10]:
            scores = spoiled(item, texts)
            assert scores == spoiled(item, texts) and len(scores) == len(texts)
            assert all(score is None or 0 <= score <= 1 for score in scores)
            known = [score for score in scores if score is not None]
            best = texts[scores.index(max(known))]
            differing += best != item.answer
    assert differing
    assert len({str(make_verifier(kind, draw)[0]) for draw in range(15)}) >= 5


def test_noise_is_as_frequent_as_it_says() -> None:
    """Of mixed pairs of two texts, right and wrong, a share q points the right way."""
    items = load_task("bar", limit=1500)
    parameters, spoiled = make_verifier("noise, q 0.75 to 0.95", 3)
    right_way = 0
    for item in items:
        right, wrong = spoiled(item, [item.answer, "10"])
        right_way += right > wrong
    assert right_way / len(items) == pytest.approx(parameters["q"], abs=0.03)


def test_halves() -> None:
    """Each kind is in one half, students and tasks alternate, and every run is one of its half."""
    halves = {kind: Setting(kind, 0).half for kind in (*KINDS, *TRAINED)}
    assert set(halves.values()) == {"choose", "judge"} and len(halves) >= 12
    for half in ("choose", "judge"):
        settings = kinds.settings_of(half)
        count = list(halves.values()).count(half)
        assert len(settings) == len(set(settings)) == count * kinds.DRAWS[half]
    settings = [Setting("position", draw) for draw in range(15)]
    assert len({setting.student for setting in settings}) == len(kinds.STUDENTS)
    assert [setting.task for setting in settings].count("bar") == 8


def test_items_that_judge_are_no_others() -> None:
    judging = {item.id for item in kinds.judging_items("bar")}
    assert len(judging) == kinds.JUDGING
    assert not judging & {item.id for item in load_task("bar")}


# ---- the rules

def test_outcome() -> None:
    outcomes = {change: outcome(row(change=change)) for change in (-0.06, -0.04, 0.04, 0.06)}
    assert outcomes == {-0.06: "harmful", -0.04: "neither", 0.04: "neither", 0.06: "helpful"}


@pytest.mark.parametrize("change, stopped", [
    ({}, []),
    ({"published_gate": "BLOCK"}, ["published", "the gate without its pilot"]),
    ({"measures": {"direction": [0.6, 0.5, 0.7, 90], "direction_at_margin": [0.9, 0.8, 0.95, 80],
                   "own_difference": None}}, ["direction alone", "the gate without its pilot"]),
    ({"form": {"p_value": 0.05}}, ["the gate without its pilot"]),
    ({"gate": "BLOCK"}, ["the gate", "the gate, then probes", "the gate, then the stop on regression", "all of them"]),
    ({"probes": [[100, 0.2, 0.1, 0.49, 80, 1, 2, 0.7]]}, ["the gate, then probes", "all of them"]),
    ({"probes": [[100, 0.9, 0.8, 0.95, 80, 9, 0, 0.002]]}, ["the gate, then probes", "all of them"]),
    ({"warnings": 1}, ["the gate, then the stop on regression", "all of them"]),
    ({"gate_after": "REJECT"}, ["the gate after training alone", "all of them"])])
def test_rules(change: dict[str, Any], stopped: list[str]) -> None:
    run = row(**change)
    assert [name for name, rule in RULES.items() if not rule(run)] == stopped


def test_shares_count_verifiers_and_kinds() -> None:
    """Each draw of a function is a verifier; a trained checkpoint is one whatever the student."""
    rows = [row(draw=draw, gate="PASS" if draw < 3 else "BLOCK") for draw in range(10)]
    rows += [row("trained, knows both", draw) for draw in range(6)]
    by_verifier = clustered_proportion([(1, 1)] * 3 + [(0, 1)] * 7 + [(2, 2)] * 3)
    by_kind = clustered_proportion([(3, 10), (6, 6)])
    counted, _, kinds_alike = told(rows, RULES[OURS])
    assert counted == f"9 of 16 [{by_verifier['low']:.2f}, {by_verifier['high']:.2f}]"
    assert kinds_alike == f"[{by_kind['low']:.2f}, {by_kind['high']:.2f}]"
    assert told([], RULES[OURS]) == ["none", "-", "-"]


def test_bound_is_one_sided() -> None:
    """29 verifiers with none let through: below 10 %."""
    rows = [row("size", draw, gate="BLOCK") for draw in range(29)]
    assert told(rows, RULES[OURS])[1] == "9.8 %"


def test_report(tmp_path: Path) -> None:
    rows = [row(draw=draw, change=-0.3, gate="PASS" if draw == 4 else "BLOCK") for draw in range(6)]
    rows += [row("size", draw) for draw in range(5)]
    rows += [row("noise, q 0.6 to 0.75", draw, change=-0.3) for draw in range(3)]
    rows += [row("majority", draw) for draw in range(2)]
    text = write_report(rows, tmp_path / "kinds.md")
    assert (tmp_path / "kinds.md").read_text(encoding="utf-8") == text
    assert "16 runs" in text and "## Judged on" in text and "## Chosen on" in text
    assert "11 runs, " in text and "6 harmful, 0 neither, 5 helpful" in text       # the weak noise stands apart
    assert "Worst kind: position, 1 harmful runs let through" in text
    assert "| the gate | 1 of 6 [" in text
    assert "| noise, q 0.6 to 0.75 | 3, 0, 0 |" in text
    assert worst_kind([row()]) == "none, no harmful run was let through"
    assert half_report("Judged on", rows)[0] == "## Judged on"


def test_twins(tmp_path: Path) -> None:
    rows = [row(draw=draw, change=0.1) for draw in range(3)]
    rows += [row(draw=draw, gates="fresh", change=-0.2) for draw in range(2)]
    text = write_report(rows, tmp_path / "kinds.md")
    assert "| position | 2 | +10.0 | -20.0 | 0.90 | 0.90 |" in text
    assert "3 runs, " in text                           # twins are no runs of their half
    assert len(kinds.settings_of("fresh")) == len(kinds.FRESH) * kinds.FRESH_DRAWS


# ---- what is run

def test_only_what_is_missing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kinds.jsonl").write_text(json.dumps(row(draw=1)) + "\n", encoding="utf-8")
    asked: list[Any] = []
    monkeypatch.setattr(kinds, "make_models", lambda cfg, missing: asked.append(missing))
    monkeypatch.setattr(kinds, "make_runs", lambda cfg, loop, missing, path: asked.append(missing))
    settings = [Setting("position", 0), Setting("position", 1)]
    assert kinds.run(Config(results=str(tmp_path)), settings, {}) == 0
    assert asked == [settings[:1], settings[:1]]
    assert kinds.run(Config(results=str(tmp_path), report=True), settings, {}) == 0
    assert len(asked) == 2
    assert kinds.run(Config(results=str(tmp_path / "none"), report=True), settings, {}) == 1


def test_committed_report(tmp_path: Path) -> None:
    """kinds.md is what --report makes of kinds.jsonl; every kind has its draws; the recorded gate is what its figures
    and its pilot say."""
    rows = read_runs(evidence.RESULTS / "kinds.jsonl")
    assert (evidence.RESULTS / "kinds.md").read_text(encoding="utf-8") == write_report(rows, tmp_path / "kinds.md")
    settings = [setting for half in ("choose", "judge", "fresh") for setting in kinds.settings_of(half)]
    assert {kinds.run_key(run) for run in rows} == {kinds.run_key(asdict(setting)) for setting in settings}
    for run in rows:
        held = kinds_report.figures_hold(run) and kinds_report.pilot_holds(run, kinds.PILOT)
        assert held is (run["gate"] == "PASS"), (run["kind"], run["draw"])
