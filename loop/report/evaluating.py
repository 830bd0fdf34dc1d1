"""The page of eval.py, beside its report: the figures, by group too, and what was answered, the wrong answers first."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loop.report.candidates import read_object, read_rows
from loop.report.charts import intervals
from loop.report.page import Page, Section, leave_page
from loop.report.rows import Answered, Room, Row, cut, fill, picture_views, question_of, truth_of
from tasks import Item
from tasks.jsonl import key_of
from tasks.output import Output

FIGURES = {
    "official": "official figure", "accuracy": "accuracy", "macro": "mean over groups",
    "both_orders_accuracy": "right in both orders", "consistency": "both orders agree",
    "first_position_rate": "names the response shown first", "parse_rate": "an answer was found",
    "unparsed_rate": "no preference was found", "truncation_rate": "cut off",
}
MOST_GROUPS = 60                                        # rows of a chart


def leave_eval_page(out: Output, items: Sequence[Item]) -> None:
    """Write the page of an evaluation, from its report and answers, and name it."""
    by_key = {key_of(item): item for item in items}
    leave_page(out.page, lambda: eval_page(out.report, out.answers, by_key))


def eval_page(report: Path, answers: Path, items: Mapping[tuple[str, bool], Item]) -> Page:
    """The page of the figures in `report` and of the lines of `answers`."""
    figures = read_object(report)
    lines = read_rows(answers)
    official = figures["official"]
    figure = f"{official['value']:.3f} [{official['low']:.3f}, {official['high']:.3f}]"

    wrong = [line for line in lines if not line["correct"]]
    right = [line for line in lines if line["correct"]]
    unread = [line for line in wrong if line["extracted"] is None]
    read = [line for line in wrong if line["extracted"] is not None]
    rows = fill(Room(), unread + read + right, lambda line: answer_row(line, items), answers.name)
    words = f"{len(lines):,} answers: {len(right):,} right, {len(wrong):,} wrong, and these first."
    if unread:
        words += f" In {len(unread):,} of them no answer was found."
    return Page(
        title=f"{figures['task']}: {figure}",
        program=f"eval.py, {report}",
        tone="plain",
        lead=f"{official['n']:,} items, scored by exact match. The interval holds the true share 95 % of the time.",
        sections=[
            Section("What was measured", blocks=measured(figures)),
            Section("The answers", words, [rows]),
        ],
    )


def measured(figures: Mapping[str, Any]) -> list[Any]:
    """The figures on one axis; accuracy by every kind of group."""
    blocks = [intervals("All items", {label: figures.get(name) for name, label in FIGURES.items()})]
    for key, by_value in figures["groups"].items():
        shown = dict(list(by_value.items())[:MOST_GROUPS])
        caption = ""
        if len(shown) < len(by_value):
            caption = f"{len(by_value) - len(shown)} of {len(by_value)} are left out here; all are in the report."
        blocks.append(intervals(f"Accuracy by {key}", shown, caption=caption))
    return blocks


def answer_row(line: Mapping[str, Any], items: Mapping[tuple[str, bool], Item]) -> Row:
    """A line of answers.jsonl."""
    swapped = line.get("swapped", False)
    item = items.get((line["id"], swapped))
    note = "right" if line["correct"] else "wrong"
    if line["extracted"] is None:
        note = "no answer found"
    if line["finish_reason"] == "length":
        note += ", cut off"
    if swapped:
        note += ", responses swapped"

    answers = [Answered(cut(line["response"]), correct=line["correct"])]
    if line["extracted"] not in (None, line["response"]):
        answers.append(Answered(cut(line["extracted"]), "read as", line["correct"]))
    pictures, remark = picture_views(item)
    tone = "good" if line["correct"] else "bad"
    return Row(line["id"], question_of(item), note, tone, answers, truth_of(item), pictures, remark)
