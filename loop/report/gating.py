"""The page of gate.py, beside its report: what is recommended, each verifier's verdict and measures, its pairs."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loop.report.candidates import Items, candidates_of_records, candidates_section
from loop.report.charts import intervals
from loop.report.page import Page, Section, Table, Verdict, Verdicts, leave_page
from loop.report.rows import Room
from tasks import Item

Report = Mapping[str, Any]
FIGURES = {                                             # of a gate before training: name -> how a page calls it
    "rubric_accuracy": "verifier's agreement with exact match",
    "baseline_accuracy": "mean correctness of the candidates",
    "balanced_accuracy": "verifier's balanced accuracy",
    "direction": "q, all pairs",
    "direction_at_margin": "q from the margin tau on",
    "own_answer_accuracy": "verifier's own answers",
    "greedy_accuracy": "student's greedy answers",
    "own_difference": "verifier less student",
    "pick_lift": "best-scored less mean candidate",
}
DIFFERENCES = ("verifier less student", "best-scored less mean candidate")
COSTS = {
    "parameters": "{:,} parameters",
    "seconds_per_verdict": "{:.4g} seconds a verdict",
    "tokens_per_verdict": "{:.1f} tokens a verdict",
}
MEASURES_SAY = ("Points with 95 % intervals. q is the share of mixed pairs (exactly one side right) whose chosen side "
                "is the right one: above 1/2 training pushes towards right answers, below it towards wrong ones.")


def leave_gate_page(out: str, report: Report, records: Mapping[str, Sequence[Mapping[str, Any]]],
                    items: Sequence[Item]) -> None:
    """Write the page beside the report `out`, X.html for X.json, and name it.

    `records` are those of each verifier, by its name; `items` what they are about, none where it is not known.
    """
    by_id = {item.id: item for item in items}
    leave_page(page_beside(Path(out)), lambda: gate_page(out, report, records, by_id))


def page_beside(path: Path) -> Path:
    """Where the page of a report lies."""
    return path.with_name(path.name.removesuffix(".json") + ".html")


def gate_page(out: str, report: Report, records: Mapping[str, Sequence[Mapping[str, Any]]], items: Items) -> Page:
    """The page of one verifier, or of several."""
    reports: Mapping[str, Report] = report.get("verifiers") or dict.fromkeys(records, report)
    passed = [name for name, each in reports.items() if each["verdict"] == "PASS"]
    best = report.get("recommended", passed[0] if passed else None)

    sections = []
    order = sorted(reports.items(), key=lambda entry: -entry[1]["rubric_accuracy"]["value"])
    again = report.get("again")
    if again:
        verdict = Verdict(f"{best or 'the best'}, measured again", again["verdict"], again["reasons"])
        words = "The best of several looks better than it is on those items that it was the best of."
        sections.append(Section("On fresh items", words, [Verdicts([verdict])]))
    if len(reports) > 1:
        sections.insert(0, Section("The verifiers", blocks=[verifiers_table(order)]))
    room = Room().shared(len(reports))
    for name, each in order:
        if len(reports) > 1:
            sections.append(Section(name, level=1))
        sections += verifier_sections(each, records.get(name, ()), items, room)

    word = "PASS" if best else "BLOCK"
    lead = "This verifier may not train this student on this task."
    if best:
        lead = "This verifier may train this student on this task, as far as was measured."
    if "recommendation" in report:
        lead, _, _ = report["recommendation"].partition(" It was measured again on")
    return Page(f"Gate before training: {word}", f"gate.py, {out}", "good" if best else "bad", lead, sections)


def verifiers_table(order: Sequence[tuple[str, Report]]) -> Table:
    """A row a verifier, in this order."""
    rows = []
    for name, report in order:
        cells = [name, report["verdict"]]
        for key in ("rubric_accuracy", "balanced_accuracy", "direction", "own_answer_accuracy"):
            cells.append(shown(report.get(key)))
        cost = report.get("cost")
        cells.append("–" if cost is None else f"{cost:.2f}×")
        rows.append(cells)
    return Table(["verifier", "verdict", "agreement", "balanced", "q", "own answers", "cost"], rows)


def shown(figure: Mapping[str, Any] | None) -> str:
    """A figure with its interval; a dash where it is not known."""
    if not figure or figure["value"] is None:
        return "–"
    if figure["low"] is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def verifier_sections(report: Report, records: Sequence[Mapping[str, Any]], items: Items,
                      room: Room) -> list[Section]:
    """One verifier's verdict, measures and pairs."""
    costs = []
    for name, form in COSTS.items():
        if report.get(name) is not None:
            costs.append(form.format(report[name]))
    sections = [
        Section("What the gate says", "; ".join(costs),
                [Verdicts([Verdict("Before training", report["verdict"], report["reasons"])])]),
        Section("What was measured", MEASURES_SAY, gate_measures(report)),
    ]
    pairs = candidates_section(candidates_of_records(records, "gate"), items, room,
                               "The pairs that training would form", "the records")
    if pairs:
        sections.append(pairs)
    return sections


def gate_measures(report: Report) -> list[Any]:
    """A gate's figures on one axis, and q by margin."""
    figures = {label: report.get(name) for name, label in FIGURES.items()}
    return [intervals("The verifier and the student", figures, 0.5, "The line stands at 1/2.", differences=DIFFERENCES),
            direction_by_margin(report)]


def direction_by_margin(report: Report) -> Any:
    """q over the pairs of each least margin."""
    by_margin = {}
    for row in report.get("direction_by_margin", []):
        by_margin[f"margin at least {row['min_margin']:g}, {row['pairs']:,} pairs"] = row["direction"]
    return intervals("q by margin, before training", by_margin, 0.5)
