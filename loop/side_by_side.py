"""What training changed: the frozen and the trained student's answers side by side, on held-out items and on
items that were trained on."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from eval import Answer
from loop.asking import verdicts
from loop.diagnosis import AnswerRow, explain_change
from loop.run import Run
from loop.served import Asked
from tasks import Item

BothAnswers = tuple[list[Answer], list[Answer]]         # the frozen student's and the trained one's, item by item
BothRows = tuple[list[AnswerRow], list[AnswerRow]]      # the same as lines of files hold them


def compare_answers(run: Run, verifier: Asked, held_out: tuple[Sequence[Item], BothAnswers],
                    trained_on: tuple[Sequence[Item], BothAnswers], verdict: str) -> dict[str, Any]:
    """What explain_change says of the answers to two sets of items, each given as (items, both students' answers).

    The verifier (asked in the way `verdict`) scores the answers to items that were trained on: where its score rose and
    accuracy did not, training did what the verifier wanted. Writes held_out.jsonl and trained_on.jsonl.
    """
    held_out_rows = answer_rows(*held_out)
    trained_on_rows = answer_rows(*trained_on)

    items = trained_on[0]
    frozen, trained = trained_on_rows
    texts = [[old["response"], new["response"]] for old, new in zip(frozen, trained, strict=True)]
    scores = verdicts(run, verifier, items, texts, verdict)
    for old, new, (old_score, new_score) in zip(frozen, trained, scores, strict=True):
        old["score"] = old_score.value
        new["score"] = new_score.value

    write_side_by_side(run, "held_out.jsonl", held_out_rows)
    write_side_by_side(run, "trained_on.jsonl", trained_on_rows)
    return explain_change(held_out_rows, trained_on_rows)


def answer_rows(items: Sequence[Item], answers: BothAnswers) -> BothRows:
    """Both students' answers as rows; "choice" says whether the question was a choice between options."""
    rows: BothRows = ([], [])
    for student_answers, student_rows in zip(answers, rows, strict=True):
        for item, answer in zip(items, student_answers, strict=True):
            student_rows.append(asdict(answer) | {"choice": item.answer_type == "choice"})
    return rows


def write_side_by_side(run: Run, name: str, rows: BothRows) -> None:
    """Write both students' answers to each item on one line of a file."""
    lines = []
    for frozen, trained in zip(*rows, strict=True):
        lines.append({"id": frozen["id"], "frozen": frozen, "trained": trained})
    run.write_lines(name, lines)
