"""Why accuracy on held-out items fell: wrong pairs, a gain that does not transfer, or answers that lost their form."""
from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NotRequired, TypedDict

from gate import Figure, format_figure, paired_difference

DRIFT = ("parse_rate", "truncation_rate", "mean_tokens", "outside_options")     # of _quantities, on held-out items


class AnswerRow(TypedDict):
    """A student's answer to one item, as a side of a line of held_out.jsonl; other keys are not read."""
    correct: bool
    answer: Any                                         # what was read from the response, or None
    finish_reason: str | None                           # "stop" or "length", None where it is not known
    tokens: int | None
    choice: bool                                        # is the item a choice question?
    score: NotRequired[float | None]                    # the verifier's, where it was asked


class Change(Figure):
    """A paired difference, trained minus frozen, with both means."""
    frozen: float | None
    trained: float | None


Sides = tuple[Sequence[AnswerRow], Sequence[AnswerRow]]         # the frozen and the trained student's, item by item


def explain_change(held_out: Sides, trained_on: Sides) -> dict[str, Any]:
    """Why held-out accuracy fell, from both students' answers to held-out items and to items that were trained on.

    A quantity "fell" or "rose" if the interval of its paired difference excludes 0. Returns:

        diagnosis     "wrong direction": accuracy on trained-on items fell as well
                      "does not transfer": there, accuracy or the verifier's mean score rose
                      "none of them": neither, or held-out accuracy did not fall
                      "not measured": no trained-on item has a label, so there was nothing to ask about again
        trained_on    the changes in accuracy and in the verifier's score on trained-on items
        drift         the changes in the form of held-out answers: DRIFT; `outside_options` is the share of answers to
                      choice questions that end by themselves and name no option
        reasons       sentences: the diagnosis; then whether answers may have lost their form alone, because the parse
                      rate fell by as much as accuracy, or because more answers were cut off
    """
    on_held_out = _changes(held_out)
    on_trained = _changes(trained_on)
    accuracy = on_held_out["accuracy"]

    diagnosis = _diagnose(accuracy, on_trained)
    reasons = [
        f"{diagnosis}: accuracy moved by {format_figure(accuracy)} on held-out items and by "
        f"{format_figure(on_trained['accuracy'])} on items trained on that have an answer, the verifier's mean score "
        f"of what was said to these by {format_figure(on_trained['verifier_score'])}"]
    if accuracy["high"] < 0:
        reasons += _form_reasons(held_out, on_held_out)
    return {
        "diagnosis": diagnosis,
        "trained_on": {name: on_trained[name] for name in ("accuracy", "verifier_score")},
        "drift": {name: on_held_out[name] for name in DRIFT},
        "reasons": reasons,
    }


def _diagnose(accuracy: Change, on_trained: dict[str, Change]) -> str:
    """The diagnosis of explain_change; `accuracy` is the change on held-out items."""
    if on_trained["accuracy"]["n"] == 0:
        return "not measured"
    if accuracy["high"] >= 0:                           # held-out accuracy did not fall
        return "none of them"
    if on_trained["accuracy"]["high"] < 0:
        return "wrong direction"
    if on_trained["accuracy"]["low"] > 0 or on_trained["verifier_score"]["low"] > 0:
        return "does not transfer"
    return "none of them"


def _form_reasons(held_out: Sides, changes: dict[str, Change]) -> list[str]:
    """Why a fall of accuracy may be one of the answers' form or length alone."""
    reasons = []
    parsed = changes["parse_rate"]
    accuracy_change = changes["accuracy"]["value"]
    if parsed["value"] is not None and accuracy_change is not None and parsed["value"] <= accuracy_change:
        lost = []                                       # the trained student's answers that are no longer right
        for frozen, trained in zip(*held_out, strict=True):
            if frozen["correct"] and not trained["correct"]:
                lost.append(trained["answer"])
        reasons.append(
            f"it may be the form, not the answers: the parse rate moved by {format_figure(parsed)}, and "
            f"{lost.count(None)} of the {len(lost)} right answers that were lost cannot be read")

    truncated = changes["truncation_rate"]
    if truncated["low"] > 0:
        reasons.append(
            f"it may be the length: the share of answers that were cut off moved by {format_figure(truncated)}")
    return reasons


def _quantities(row: AnswerRow) -> dict[str, float | None]:
    """What is compared of an answer: numbers of at least 0, None where the answer has no such thing."""
    reason = row["finish_reason"]
    no_option = row["answer"] is None and reason == "stop"
    return {
        "accuracy": row["correct"],
        "verifier_score": row.get("score"),
        "parse_rate": row["answer"] is not None,
        "truncation_rate": None if reason is None else reason == "length",
        "mean_tokens": row["tokens"],
        "outside_options": no_option if row["choice"] else None,
    }


def _changes(sides: Sides) -> dict[str, Change]:
    """The change of every quantity, by its name, over the items where it is known of both answers."""
    known: dict[str, list[tuple[float, float]]] = {
        "accuracy": [], "verifier_score": [], **{name: [] for name in DRIFT}}
    for frozen_row, trained_row in zip(*sides, strict=True):
        frozen = _quantities(frozen_row)
        trained = _quantities(trained_row)
        for name, pairs in known.items():
            old = frozen[name]
            new = trained[name]
            if old is not None and new is not None:
                pairs.append((old, new))
    return {name: _change(pairs) for name, pairs in known.items()}


def _change(pairs: Sequence[tuple[float, float]]) -> Change:
    """The paired difference and the means of (frozen, trained) values.

    The interval is made for values of at most 1, so larger ones (token counts) are scaled down and the figure back.
    """
    old = [frozen for frozen, _ in pairs]
    new = [trained for _, trained in pairs]
    unit = max([1, *old, *new])
    scaled = paired_difference([value / unit for value in old], [value / unit for value in new])
    return {
        "value": None if scaled["value"] is None else scaled["value"] * unit,
        "low": scaled["low"] * unit,
        "high": scaled["high"] * unit,
        "n": scaled["n"],
        "frozen": fmean(old) if old else None,
        "trained": fmean(new) if new else None,
    }
