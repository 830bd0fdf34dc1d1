"""The figures of a judge and of its iterations: what summary.json, metrics.jsonl and the table show.

A figure is {"value", "low", "high", "n"}, with a 95 % interval.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

from eval import Answer, judge_report
from gate import Figure, clustered_ratio, format_figure
from loop.judgments import BothOrders, Judgment, kept_judgments
from tasks.rewardbench import Comparison

COLUMNS = {"kept_share": "kept share", "order_consistency": "order consistency",
           "first_position_rate": "first position", "heldout_accuracy": "held-out accuracy"}    # figure -> its heading


class JudgeFigures(TypedDict):
    """A judge's figures on held-out pairs in both orders; eval.judge_report says what each is."""
    order_consistency: Figure
    first_position_rate: Figure
    heldout_accuracy: Figure
    both_orders_accuracy: Figure
    unparsed_rate: Figure


class JudgedFigures(TypedDict):
    """An iteration's figures before its training."""
    iteration: int                          # from 1
    pairs: int                              # that were judged
    kept_share: Figure                      # of their judgments, by the filter
    trained_on: int                         # judgments


class IterationFigures(JudgedFigures, JudgeFigures):
    """An iteration's figures: what it trained on, and the judge that came of it."""


def judge_figures(judged: Iterable[BothOrders]) -> JudgeFigures:
    """The figures of a judge by its judgments of held-out pairs. A verdict that cannot be read is wrong."""
    shown = []
    answers = []
    for both_orders in judged:
        for judgment in both_orders:
            swapped = judgment.side == 2
            shown.append(Comparison(judgment.item_id, "jsonl", (), swapped=swapped))
            answers.append(scored_answer(judgment))

    report = judge_report(shown, answers)
    return {
        "order_consistency": report["consistency"],
        "first_position_rate": report["first_position_rate"],
        "heldout_accuracy": report["accuracy"],
        "both_orders_accuracy": report["both_orders_accuracy"],
        "unparsed_rate": report["unparsed_rate"],
    }


def scored_answer(judgment: Judgment) -> Answer:
    """The judgment as eval.py's reports take it."""
    return Answer(
        id=judgment.item_id,
        response=judgment.text,
        answer=None if judgment.verdict is None else str(judgment.verdict),
        correct=judgment.verdict == judgment.side,
        finish_reason=None,
        tokens=None,
    )


def judged_figures(number: int, judged: Sequence[BothOrders], order_filter: bool,
                   examples: Sequence[Judgment]) -> JudgedFigures:
    """The figures of iteration `number`, which judged the pairs and chose `examples` of the judgments to train on."""
    shares = []                             # (kept, of 1) of each pair: pairs, not judgments, are independent
    for both_orders in judged:
        kept = kept_judgments([both_orders], order_filter)
        shares.append((len(kept) / 2, 1))
    return {
        "iteration": number,
        "pairs": len(judged),
        "kept_share": clustered_ratio(shares),
        "trained_on": len(examples),
    }


# ---- showing them

def logged_values(figures: JudgeFigures | IterationFigures) -> dict[str, float | None]:
    """The figures of the table without their intervals, for metrics.jsonl."""
    values = {}
    for name in COLUMNS:
        if name in figures:
            values[name] = figures[name]["value"]
    return values


def table(rows: dict[int, JudgeFigures | IterationFigures]) -> str:
    """One line an iteration, by its number; 0 is the judge that the run started from."""
    heads = [f"{head:>20}" for head in COLUMNS.values()]
    lines = ["  ".join(["iteration", "trained on", *heads])]
    for number, figures in rows.items():
        cells = [f"{number:9}", f"{figures.get('trained_on', '-'):>10}"]
        for name in COLUMNS:
            text = format_figure(figures[name]) if name in figures else "-"
            cells.append(f"{text:>20}")
        lines.append("  ".join(cells))
    return "\n".join(lines)
