"""lmms-eval's --log_samples files, OUT/MODEL/DATE_samples_TASK.jsonl: one object a question.

    doc_id            the question's row in the data set
    target            its answer, always as text
    resps             what the model said; left out where it equals filtered_resps
    filtered_resps    what the task's filters left of it, which was judged: a text, or a list
    token_counts      tokens of the first response
    METRIC            an object of the task's own: it holds the question's id and the verdict

`--repeats K` asks K times, but by default the log holds the first response alone: all K are written with
`--reasoning_tags none`, or by a task whose filter is take_first_k. A task with several filters has a row for each.
Older versions write lists inside lists, and the data set's row as `doc`. Read from the code of versions 0.2 to 0.7.3.

MMMU's log has no verdict: it is the letter that was read against the answer. Of an open question the log does not
settle it, for versions differ in what they make of what was read.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tasks.jsonl import MOST_TOKENS, Response
from tasks.loading import shown
from tasks.logs import LogRow, as_verdict

NAME = "lmms-eval"
FIELDS = ("doc_id", "filtered_resps")                       # by which a row is known
ID_KEYS = ("id", "question_id", "idx", "pid", "ID")         # of a metric, or of the data set's row
VERDICT_KEYS = ("is_correct", "true_false", "score")        # of a metric: BLINK, MathVista, the two judge benchmarks
READING_KEYS = ("pred_parsed", "prediction")
NUMBERS = ("acc_score", "llm_as_judge_eval")                # metrics that are the verdict themselves


def read_row(row: dict[str, Any], where: str) -> LogRow:
    """A line's object; ValueError that names the line where it holds no text of a response."""
    doc_id = row["doc_id"]
    if type(doc_id) is not int or doc_id < 0:
        raise ValueError(f"{where}: doc_id is {shown(doc_id)}, not a row's number")
    judged_texts = texts_of(row["filtered_resps"], where)
    texts = texts_of(row["resps"], where) if "resps" in row else judged_texts
    judged = texts.index(judged_texts[0]) if judged_texts[0] in texts else 0

    responses = [Response(text) for text in texts]
    tokens = tokens_of(row)
    if tokens is not None:
        responses[0] = Response(texts[0], range(tokens))
    names = ids_of(row)
    numbered = [f"{name}#{doc_id}" for name in names]       # how an id is told apart that the data set gives twice
    return LogRow(
        where=where,
        responses=tuple(responses),
        names=(*names, *numbered),
        position=doc_id,
        target=str(row.get("target", "")),
        judged=judged,
        verdict=verdict_of(row),
        reading=reading_of(row))


def texts_of(value: Any, where: str) -> list[str]:
    """The texts in a list, in lists inside it, or the one text; ValueError where there is none, or something else."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: a response is {shown(value)}, not a text; only tasks that generate text have such")
    texts = []
    for entry in value:
        texts += texts_of(entry, where)
    return texts


def tokens_of(row: dict[str, Any]) -> int | None:
    """The number of tokens of the first response, None where the model did not tell."""
    counts = row.get("token_counts")
    first = counts[0] if isinstance(counts, list) and counts else None
    tokens = first.get("output_tokens") if isinstance(first, dict) else None
    return tokens if type(tokens) is int and 0 <= tokens <= MOST_TOKENS else None


def metrics_of(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The metrics that are objects. `doc`, the data set's row of older logs, is none."""
    for name, value in row.items():
        if isinstance(value, dict) and name != "doc":
            yield value


def ids_of(row: dict[str, Any]) -> list[str]:
    """What metrics, and the data set's row of older logs, call the question."""
    doc = row.get("doc")
    ids: dict[str, None] = {}                               # a set that keeps its order
    for value in (*metrics_of(row), doc if isinstance(doc, dict) else {}):
        for key in ID_KEYS:
            if type(value.get(key)) in (str, int) and value[key] != "":
                ids[str(value[key])] = None
    return list(ids)


def verdict_of(row: dict[str, Any]) -> bool | None:
    """Was the judged response right? None where the log does not say."""
    for metric in metrics_of(row):
        if "parsed_pred" in metric:
            return mmmu_verdict(metric)
        for key in VERDICT_KEYS:
            if key in metric:
                return as_verdict(metric[key])
    for name in NUMBERS:
        if name in row:
            return as_verdict(row[name])
    return None


def mmmu_verdict(metric: dict[str, Any]) -> bool | None:
    """The letter that was read against the answer's; None of an open question."""
    if metric.get("question_type") != "multiple-choice":
        return None
    return first_reading(metric["parsed_pred"]) == metric.get("answer")


def reading_of(row: dict[str, Any]) -> str | None:
    """What the harness took the answer to be, as far as the log says."""
    for metric in metrics_of(row):
        if "parsed_pred" in metric:
            return str(first_reading(metric["parsed_pred"]))
        for key in READING_KEYS:
            if metric.get(key) is not None:
                return str(metric[key])
    return None


def first_reading(readings: Any) -> Any:
    """What was read in the first of the responses that were judged: MMMU's metric has a list of them."""
    return readings[0] if isinstance(readings, list) and readings else readings
