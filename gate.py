"""The two gates: may this verifier train this student, and may the trained student be deployed?

    agreement   rubric accuracy: share of [score >= 0.5] == [exact match]; no score disagrees
    direction   q(tau) = P(the chosen side is right | margin >= tau, exactly one side is right)
    published   BLOCK if agreement < baseline ("When Good Verifiers Go Bad", arXiv 2606.14629)
    ours        PASS iff agreement >= baseline, the lower end of q(tau) > 1/2, and the verifier's
                own answers are at least as accurate as the student's
    after       PROMOTE iff difference > 0 and its lower end > -0.02, paired on held-out items

The baseline is the frozen student's accuracy. By agreement alone, a verifier that accepts
everything equals it, and one that rejects everything passes for a weak student. Training follows
the sign of 2 q - 1 (see replay.py), so q > 1/2 has to be shown: by the exact interval q = 1/2
passes at most 2.5 % of the time, and q = 0.8 at least 95 % from 35 mixed pairs (one side right)
on. Own answers are compared as points: chance may block. Intervals are 95 %. Standard library only.

    python gate.py --records a.jsonl [b.jsonl ...] --out report.json    # no torch; several: ranked
    python gate.py --student S --verifier V1 V2 --task bar              # asks the models first

A record is one scored candidate: {"item": str, "correct": bool, "score": number in [0, 1] or null}.
Optional keys: text, truncated, candidate_*, greedy_*, own_*, seconds, tokens (see class Record).
Exit status: 0 PASS (of any), 3 BLOCK, 2 what the caller can mend (a flag, a file), 1 all else.
"""
from __future__ import annotations

import argparse
import errno
import json
import math
import os
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any, Required, TypedDict

Call = Callable[..., Any]
Measures = dict[str, Any]       # figures, counts and a table, by name, as JSON holds them
Report = dict[str, Any]         # verdict, reasons, rule, costs and Measures of one verifier
Z = 1.959963984540054           # the normal distribution's 97.5 % quantile
ACCEPT = 0.5                    # a score from here on says "right"
MIN_DIRECTION = 0.5             # the q at which the mean update changes sign
NEEDED_MIXED = 35               # mixed pairs that show q = 0.8 at least 19 times in 20
NEARLY = 0.05                   # a cheaper verifier must be shown to lack less agreement than this
RATES = {"truncated": "truncation_rate", "candidate_parsed": "answer_parse_rate",
         "candidate_truncated": "answer_truncation_rate"}
USAGE = (ValueError, FileExistsError, argparse.ArgumentError)       # what the caller can mend, and
NAMES = (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)   # OSErrors
ITEM_RATES = {"own_correct": "own_answer_accuracy", "own_parsed": "own_parse_rate",
              "own_truncated": "own_truncation_rate", "greedy_correct": "greedy_accuracy",
              "greedy_parsed": "greedy_parse_rate", "greedy_truncated": "greedy_truncation_rate"}


# ---- statistics
class Figure(TypedDict):
    """A measured value with its 95 % interval over n trials or items; None where n is 0."""
    value: float | None
    low: float
    high: float
    n: int


def format_figure(figure: Figure | None, form: str = ".3f") -> str:
    """A figure as "value [low, high]"; "unknown" where there is none."""
    if figure is None or figure["n"] == 0:
        return "unknown"
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


def proportion(successes: int, n: int) -> Figure:
    """Share of n independent trials with the exact (Clopper-Pearson) interval."""
    assert 0 <= successes <= n, (successes, n)
    return {"value": successes / n if n else None, "low": _lower_end(successes, n),
            "high": 1 - _lower_end(n - successes, n), "n": n}


def _lower_end(successes: int, n: int) -> float:
    """The p at which as many successes or more have a probability of 2.5 %, by bisection."""
    low = 0.0
    high = successes / max(n, 1)
    for _ in range(60):
        middle = (low + high) / 2
        if _upper_tail(successes, n, middle) > 0.025:
            high = middle
        else:
            low = middle
    return low


def _upper_tail(k: int, n: int, p: float) -> float:
    """P(X >= k) for X ~ Binomial(n, p), 0 < p < 1: P(X = j) is added from j = k upwards."""
    if k > n:
        return 0.0
    if k <= 0 or k < n * p:                         # the other tail, where terms fall
        return 1.0 - _upper_tail(n - k + 1, n, 1.0 - p)
    total = 1.0                                     # in units of P(X = k)
    term = 1.0
    j = k
    while j < n and term > 1e-17 * total:
        term = term * (n - j) / (j + 1) * p / (1.0 - p)     # P(X = j + 1) from P(X = j)
        total += term
        j += 1
    log_choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return min(1.0, total * math.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p)))


def clustered_ratio(pairs: Iterable[tuple[float, float]]) -> Figure:
    """R = sum a / sum b over items (a, b), 0 <= a <= b: say, a of an item's b candidates are right.

    Items are independent, the trials within an item are not. So the interval is Wilson's with an
    effective number of trials R (1 - R) / V, at most sum b, and with Student's t. V, the variance
    of R, is m / (m - 1) sum (a - R b)^2 / (sum b)^2 over m items. For this number a fifth of an
    average item is added, half of it right, so V > 0; at R = 0 or 1 an item counts as one trial.
    """
    items = [(a, b) for a, b in pairs if b > 0]
    if not items:
        return proportion(0, 0)
    m = len(items)
    df = max(m - 1, 1)
    trials = math.fsum(b for _, b in items)
    share = math.fsum(a for a, _ in items) / trials
    tenth = 0.1 / m                                 # of an average item, as a share of the trials
    residuals = [(a - share * b) / trials for a, b in items]
    squares = math.fsum(residual ** 2 for residual in residuals)
    squares += tenth / m * (share ** 2 + (1 - share) ** 2)      # one tenth wrong and one right
    variance = squares * m / df
    smooth_share = (share + tenth) / (1 + 2 * tenth)
    effective = smooth_share * (1 - smooth_share) / variance
    t = Z + (Z ** 3 + Z) / (4 * df)                 # Student's quantile to the order 1 / df
    w = t * t / min(effective, trials)              # Wilson's interval in terms of t^2 / trials
    centre = share + w / 2
    half_width = math.sqrt(share * (1 - share) * w + w * w / 4)
    low = min(max(0.0, (centre - half_width) / (1 + w)), share)
    high = max(min(1.0, (centre + half_width) / (1 + w)), share)
    return {"value": share, "low": low, "high": high, "n": round(trials)}


def balanced_ratio(first: Sequence[tuple[float, float]],
                   second: Sequence[tuple[float, float]]) -> Figure:
    """Mean of two clustered ratios over the same items, listed in the same order: its interval is
    that of items of one size that have the same influences on the mean."""
    one = clustered_ratio(first)
    two = clustered_ratio(second)
    if one["value"] is None or two["value"] is None:
        return proportion(0, 0)
    mean = (one["value"] + two["value"]) / 2
    n = one["n"] + two["n"]
    m = len(first)
    items = []
    size = 4 * n / m            # sum b caps the trials, and such a mean can be surer than n tosses
    for (a, b), (c, d) in zip(first, second, strict=True):      # influence on R: (a - R b) / sum b
        influence_one = (a - one["value"] * b) / one["n"] / 2
        influence_two = (c - two["value"] * d) / two["n"] / 2
        items.append((size * (mean + m * (influence_one + influence_two)), size))
    return clustered_ratio(items) | {"value": mean, "n": n}


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Figure:
    """mean(after) - mean(before) on the same items, with the interval of Agresti and Min (2005):
    they add 1/2 to each cell of the paired 2 x 2 table. An item's value is a bool or a share."""
    changes = [float(new) - float(old) for old, new in zip(before, after, strict=True)]
    n = len(changes)
    if n == 0:
        return {"value": None, "low": -1.0, "high": 1.0, "n": 0}
    total = math.fsum(changes)
    centre = total / (n + 2)                        # the cells are two items: half rose, half fell
    mean_square = (math.fsum(change * change for change in changes) + 1) / (n + 2)
    half_width = Z * math.sqrt((mean_square - centre ** 2) / (n + 2))
    return {"value": total / n, "low": max(-1.0, centre - half_width),
            "high": min(1.0, centre + half_width), "n": n}


def mcnemar(before: Sequence[bool], after: Sequence[bool], fell: bool = False) -> float:
    """Exact McNemar p value, two-sided or that accuracy `fell`: changed items are coin tosses."""
    pairs = [(bool(old), bool(new)) for old, new in zip(before, after, strict=True)]
    lost = pairs.count((True, False))
    gained = pairs.count((False, True))
    if fell:
        return _upper_tail(lost, lost + gained, 0.5)
    return min(1.0, 2 * _upper_tail(max(lost, gained), lost + gained, 0.5))


# ---- records
class Record(TypedDict, total=False):
    """A candidate that a verifier has scored. Keys from `text` on may be null or absent."""
    item: Required[str]                             # id of the question
    correct: Required[bool]                         # exact match with the known answer
    score: Required[float | None]                   # in [0, 1], null where none could be read
    text: str | None                                # the candidate; equal texts are not paired
    truncated: bool | None                          # was the verdict cut off?
    candidate_parsed: bool | None                   # was an answer found in the candidate?
    candidate_truncated: bool | None
    seconds: float | None                           # what the verdict cost; of equal texts that
    tokens: float | None                            # were asked about once, the first carries it
    greedy_correct: bool | None                     # the student's greedy answer to the question:
    greedy_parsed: bool | None                      # the same in all records of an item
    greedy_truncated: bool | None
    own_correct: bool | None                        # the verifier's
    own_parsed: bool | None
    own_truncated: bool | None


def gather_records(items: Sequence[Any], *, greedy: Call, sample: Call, score: Call, own: Call,
                   correct: Call) -> list[Record]:
    """Ask student and verifier about `items` (each has an `.id`); returns one record a candidate.

    `greedy(items)`, `own(items)`: the student's, the verifier's greedy completions (.text and
    .finish_reason); `sample(items)`: K of the student's for each; `score(items, texts)`: verdicts
    (.value, .truncated; optional: .seconds, .tokens); `correct(item, text)`: .correct and .answer.
    """
    samples = sample(items)
    texts = [[completion.text for completion in completions] for completions in samples]
    rows = zip(items, samples, score(items, texts), greedy(items), own(items), strict=True)
    records = []
    for item, completions, verdicts, student_answer, verifier_answer in rows:
        answers = _grade(item, student_answer, "greedy", correct)
        answers |= _grade(item, verifier_answer, "own", correct)
        for completion, verdict in zip(completions, verdicts, strict=True):
            candidate = _grade(item, completion, "candidate", correct)
            record: Any = {"item": item.id, "correct": candidate.pop("candidate_correct"),
                           "score": verdict.value, "text": completion.text,
                           "truncated": bool(verdict.truncated), **candidate, **answers}
            costs = {cost: getattr(verdict, cost, None) for cost in ("seconds", "tokens")}
            record |= {cost: value for cost, value in costs.items() if value is not None}
            records.append(record)
    return records


def _grade(item: Any, completion: Any, whose: str, correct: Call) -> dict[str, bool]:
    """The three keys of a record that are about a completion."""
    match = correct(item, completion.text)
    return {f"{whose}_correct": bool(match.correct), f"{whose}_parsed": match.answer is not None,
            f"{whose}_truncated": completion.finish_reason == "length"}


def read_records(path: str | Path) -> list[Record]:
    """The records of a JSON Lines file; whatever is wrong is a ValueError that names the line."""
    records: list[Record] = []
    first_seen: dict[tuple[str, str], tuple[Any, int]] = {}    # (item, key) -> value, line number
    for number, line in enumerate(Path(path).read_bytes().rstrip().split(b"\n"), 1):
        try:
            record = json.loads(line.decode("utf-8-sig").strip() or "null")
            check_record(record)
            for key in ITEM_RATES:
                seen = first_seen.setdefault((record["item"], key), (record.get(key), number))
                if record.get(key) != seen[0]:
                    raise ValueError(f'"{key}" of {record["item"]!r} differs from line {seen[1]}')
        except (ValueError, RecursionError) as error:       # of json and of the decoder, too
            raise ValueError(f"{path}, line {number}: {getattr(error, 'msg', error)}") from None
        records.append(record)
    return records


def check_record(record: Any) -> None:
    """ValueError that says what is wrong with a record."""
    if not isinstance(record, dict) or not {"item", "correct", "score"} <= record.keys():
        raise ValueError(f"a record is an object with item, correct and score, not {record!r:.80}")
    for key in ("item", "correct", "text", *RATES, *ITEM_RATES):
        value = record.get(key)
        if value is None and key not in ("item", "correct"):
            continue
        kind, words = (str, "a string") if key in ("item", "text") else (bool, "true or false")
        if not isinstance(value, kind):
            raise ValueError(f'"{key}" must be {words}, not {value!r}')
    for key, most in (("score", 1), ("seconds", 1e15), ("tokens", 1e15)):   # 1e15: sums stay finite
        value = record.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value <= most):    # NaN compares false
            raise ValueError(f'"{key}" must be a number in [0, {most:g}] or null, not {value!r}')


# ---- measures
def agrees(score: float | None, correct: bool) -> bool:
    """Does a verdict say what exact match says? One without a score does not."""
    return score is not None and (score >= ACCEPT) == correct


def measure_rubric_accuracy(verifier_model: Call, task_items: Iterable[Any],
                            rubric_prompt_fn: Call, task_native_scorer: Call) -> float:
    """Share of items whose verdict [score >= 0.5] agrees with exact match.

    `verifier_model(prompt)`: a score in [0, 1], None, or a reply, which verifier.py reads;
    `task_native_scorer(item)`: is the item's candidate right (a bool, or its .correct)?
    """
    agreed = []
    for item in task_items:
        score = verifier_model(rubric_prompt_fn(item))
        right = task_native_scorer(item)
        if isinstance(score, str):
            from verifier import parse_score
            score = parse_score(score)
        if score is not None and not 0.0 <= score <= 1.0:
            raise ValueError(f"a verifier's score must lie in [0, 1], not {score!r}")
        agreed.append(agrees(score, bool(getattr(right, "correct", right))))
    if not agreed:
        raise ValueError("rubric accuracy needs items, not 0 of them")
    return sum(agreed) / len(agreed)


def should_deploy_self_dpo(rubric_accuracy: float, frozen_student_baseline: float) -> bool:
    """The published rule: run the loop unless rubric accuracy is below the student's accuracy."""
    for value in (rubric_accuracy, frozen_student_baseline):
        if not 0.0 <= value <= 1.0:                 # NaN compares false
            raise ValueError(f"an accuracy must lie in [0, 1], not {value!r}")
    return rubric_accuracy >= frozen_student_baseline


def measure(records: Iterable[Record], pair_rule: Call, min_margin: float) -> Measures:
    """Every measure of one verifier's records, by name.

    `pair_rule(item, texts, scores)`: the indices (top, bottom) of the pair that training would
    form, or a reason for none. `pick_lift`, a mean over items: accuracy of the best-scored
    candidate (of several the mean; of all if no score was read) minus the mean candidate's.
    """
    from replay import label_pairs
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        check_record(record)
        groups[record["item"]].append(record)
    if not groups:
        raise ValueError("no records to measure")
    rows = list(groups.values())
    counts: dict[str, list[tuple[int, int]]] = defaultdict(list)    # name -> (a, b) of each item
    for row in rows:
        for name, count in _count_candidates(row).items():
            counts[name].append(count)
    mean_accuracy = [right / size for right, size in counts["baseline_accuracy"]]
    picked_accuracy = [right / size for right, size in counts.pop("picked, right")]
    balanced = balanced_ratio(counts.pop("agreement, right"), counts.pop("agreement, wrong"))
    figures = {name: clustered_ratio(items) for name, items in counts.items()}
    for key, name in ITEM_RATES.items():            # the same in all records of an item
        known = _known_values((row[0] for row in rows), key)
        figures[name] = proportion(known.count(True), len(known))
    pairs = label_pairs(groups, pair_rule)
    at_tau = _direction(pairs, min_margin)
    return {
        "items": len(groups), "records": sum(map(len, rows)), "min_margin": min_margin,
        **{name: figure for name, figure in figures.items() if figure["n"]},
        "balanced_accuracy": balanced, "direction": at_tau["direction"],
        "mixed_share": proportion(at_tau["mixed"], at_tau["pairs"]),
        "direction_by_margin": [_direction(pairs, tau) for tau in (0.0, 0.1, 0.25, 0.5, 0.75)],
        "pick_lift": paired_difference(mean_accuracy, picked_accuracy)}


def _count_candidates(row: Sequence[Record]) -> dict[str, tuple[int, int]]:
    """(a, b) of an item by the name of a share: of b candidates it holds for a."""
    size = len(row)
    scores = _known_values(row, "score")
    best = max(scores, default=None)
    picked = [record["correct"] for record in row if record["score"] == best]
    of_right = [agrees(record["score"], True) for record in row if record["correct"]]
    of_wrong = [agrees(record["score"], False) for record in row if not record["correct"]]
    counts = {
        "baseline_accuracy": (len(of_right), size), "parse_rate": (len(scores), size),
        "rubric_accuracy": (sum(of_right) + sum(of_wrong), size),
        "agreement, right": (sum(of_right), len(of_right)),
        "agreement, wrong": (sum(of_wrong), len(of_wrong)),
        "accept_rate": (sum(score >= ACCEPT for score in scores), size),
        "picked, right": (sum(picked), len(picked))}
    for key, name in RATES.items():
        known = _known_values(row, key)
        counts[name] = (known.count(True), len(known))
    return counts


def _known_values(records: Iterable[Record], key: str) -> list[Any]:
    """The values of a key in the records where it is neither absent nor null."""
    return [record.get(key) for record in records if record.get(key) is not None]


def _direction(pairs: Iterable[tuple[float, bool, bool]], tau: float) -> dict[str, Any]:
    """q(tau), and the numbers of pairs and of mixed pairs (one side right) with such a margin."""
    from replay import count_directions
    counts = count_directions(pairs, tau)
    q = proportion(counts.right_way, counts.mixed)
    return {"min_margin": tau, "direction": q, "pairs": counts.pairs, "mixed": counts.mixed}


# ---- decisions
@dataclass(frozen=True)
class Decision:
    """PASS or BLOCK before training, PROMOTE or REJECT after; a refusal names all that failed."""
    verdict: str
    reasons: list[str]
    measures: Measures


def decide_before(
        measures: Measures, rule: str = "ours", min_direction: float = MIN_DIRECTION) -> Decision:
    """The rule "ours" above, or "paper", the published one alone. Own answers count if known."""
    assert rule in ("ours", "paper"), rule
    baseline = measures["baseline_accuracy"]
    name = f"agreement (verdicts read: {measures['parse_rate']['value']:.1%})"
    agreement = measures["rubric_accuracy"]
    checks = [_not_below(name, agreement, "the candidates' mean correctness", baseline)]
    if rule == "ours":
        checks.append(_direction_shown(measures, min_direction))
    if rule == "ours" and "own_answer_accuracy" in measures:
        name = "accuracy of the verifier's own answers"
        student = measures.get("greedy_accuracy") or baseline
        own = measures["own_answer_accuracy"]
        checks.append(_not_below(name, own, "the student's accuracy", student))
    if not measures["parse_rate"]["value"]:
        unread = f"no verdict of this verifier could be read ({measures['records']} asked for)"
        checks.insert(0, (False, f"{unread}, so nothing below is about its judgment: raise "
                          "--verdict-tokens, or choose another --verdict or verifier"))
    passed = all(holds for holds, _ in checks)
    reasons = [reason for holds, reason in checks if holds == passed]
    return Decision("PASS" if passed else "BLOCK", reasons, measures)


def _not_below(name: str, figure: Figure, base_name: str, base: Figure) -> tuple[bool, str]:
    """Is the value at least the base's, and why? The intervals say whether a no may be chance."""
    assert figure["value"] is not None and base["value"] is not None
    shown = f"{name}, {format_figure(figure)}"
    base_shown = f"below {base_name}, {format_figure(base)}"
    if should_deploy_self_dpo(figure["value"], base["value"]):
        return True, f"{shown}, is not {base_shown}"
    if figure["high"] >= base["low"]:
        return False, f"{shown}, is {base_shown}; more items would settle it"
    return False, f"{shown}, is {base_shown}; use another verifier or mend its prompt"


def _direction_shown(measures: Measures, least: float) -> tuple[bool, str]:
    """Does the interval of q(tau) lie above `least`, and why? Of a no: what would show it?"""
    direction: Figure = measures["direction"]
    low = direction["low"]
    q = direction["value"] or 0
    n = direction["n"]
    counted = (f"{round(q * n)} of {n} mixed pairs (one side right) with a margin of at least "
               f"{measures['min_margin']:g} point the right way, "
               f"95 % interval {low:.2f} to {direction['high']:.2f}")
    if low > least:
        return True, f"direction shown: {counted}"
    if direction["high"] < least:
        return False, f"wrong direction: {counted}; use another verifier"
    if n >= NEEDED_MIXED and q <= least:
        return False, f"no direction: {counted}; use another verifier"
    needed = NEEDED_MIXED
    if q > least:                                   # q - low shrinks with 1 / sqrt(n)
        needed = max(needed, math.ceil(n * ((q - low) / (q - least)) ** 2))
    items = f" ({math.ceil(measures['items'] * needed / n)} items like these)" if n else ""
    return False, f"direction not shown: {counted}; about {needed} mixed pairs are needed{items}"


def gate_after(before: Sequence[bool], after: Sequence[bool], trained: bool = True,
               min_low: float = -0.02) -> Decision:
    """PROMOTE a gain on held-out items whose paired interval excludes a change of `min_low`."""
    change = paired_difference(before, after)
    p = mcnemar(before, after)
    old = proportion(sum(map(bool, before)), len(before))
    new = proportion(sum(map(bool, after)), len(after))
    measures = {"baseline_accuracy": old, "final_accuracy": new, "difference": change, "p_value": p}
    outcome = (f"held-out accuracy went from {format_figure(old)} to {format_figure(new)}, "
               f"by {format_figure(change)}, exact McNemar p = {p:.2g}")
    faults = [] if trained else ["nothing was trained"]
    if trained and (change["value"] or 0) <= 0:
        faults.append(f"no gain: {outcome}")
    if trained and change["low"] <= min_low:
        faults.append(f"a change of {min_low:+g} is not excluded: {outcome}")
    return Decision("REJECT" if faults else "PROMOTE", faults or [f"a gain: {outcome}"], measures)


# ---- ranking of verifiers
def verdict_costs(records: Sequence[Record]) -> dict[str, float]:
    """What a verdict cost: the median of seconds, which leaves out warm-up; the mean of tokens."""
    costs = {}
    for key, average in (("seconds", median), ("tokens", fmean)):
        known = _known_values(records, key)
        if known:
            costs[f"{key}_per_verdict"] = average(known)
    return costs


def item_agreement(records: Iterable[Record]) -> dict[str, float]:
    """For each item the share of its candidates on which the verdict agrees with exact match."""
    agreed: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        agreed[record["item"]].append(agrees(record["score"], record["correct"]))
    return {item: fmean(row) for item, row in agreed.items()}


def check_same_candidates(records: dict[str, Sequence[Record]]) -> None:
    """ValueError unless all verifiers have scored the same candidates of the same items."""
    counts = {}
    for name, rows in records.items():
        counts[name] = Counter((row["item"], row.get("text"), row["correct"]) for row in rows)
    first, *others = counts
    for other in others:
        for item, _, _ in (counts[first] - counts[other]) | (counts[other] - counts[first]):
            raise ValueError(f"{first} and {other} hold different candidates of item {item!r}")


def recommend(reports: dict[str, Report], records: dict[str, Sequence[Record]]
              ) -> tuple[Report, dict[str, Report]]:
    """The cheapest verifier that passes and is shown to agree nearly as often as the best.

    The paper ranks by agreement, not by size (R2); more compute buys nothing (R3). Unless the costs
    of all are known, the best is taken. Returns `recommended` (a name or None), `recommendation`,
    and the reports with `cost`, over the least, and `difference_from_best`, in paired agreement.
    """
    check_same_candidates(records)
    agreement = {name: item_agreement(rows) for name, rows in records.items()}
    passed = [name for name, report in reports.items() if report["verdict"] == "PASS"]
    best = max(passed or reports, key=lambda name: fmean(agreement[name].values()))
    least = min(report.get("seconds_per_verdict", 0) for report in reports.values())
    ranked = {}
    near = []
    for name, report in reports.items():
        shares = [agreement[name][item] for item in agreement[best]]
        difference = paired_difference(list(agreement[best].values()), shares)
        cost = report["seconds_per_verdict"] / least if least else None     # 0: not all known
        ranked[name] = report | {"cost": cost, "difference_from_best": difference}
        if name in passed and (name == best or difference["low"] > -NEARLY):
            near.append(name)
    pick = best if passed else None
    if passed and least:
        pick = min(near, key=lambda name: ranked[name]["cost"])
    return {"recommended": pick, "recommendation": _advice(ranked, passed, best, pick)}, ranked


def _advice(reports: dict[str, Report], passed: list[str], best: str, pick: str | None) -> str:
    """The sentence: which verifier, why, and what compute beyond it buys, as far as measured."""
    if pick is None:
        return f"Of {len(reports)} verifiers measured none passes, so none is recommended."
    if reports[pick]["cost"] is None:
        return (f"{pick} is recommended: of {len(passed)} verifiers that pass it agrees best; what "
                "a verdict costs is not known of all (0 seconds count as unknown).")
    if len(passed) == 1:
        return (f"{pick} is recommended: of {len(reports)} verifiers measured no other passes, so "
                "what more or less verifier compute would buy was not measured.")
    gap: Figure = reports[pick]["difference_from_best"]
    off = format_figure(gap, "+.3f")
    near = "it is the best" if pick == best else f"{off} from the best, {best}"
    why = (f"{pick} is recommended: of {len(passed)} verifiers that pass it is the cheapest whose "
           f"agreement is shown to be less than {NEARLY:g} below that of the best ({near})")
    if all(reports[name]["cost"] <= reports[pick]["cost"] for name in passed):
        return f"{why}; none that passes costs more."
    buys = "nothing that was measured"
    if gap["value"] and gap["high"] < 0:
        buys = f"{-gap['value']:.3f} of agreement"
    return f"{why}; beyond it, more verifier compute buys {buys}."


# ---- the program
def flag(default: Any, help: str, low: float = -math.inf, high: float = math.inf,
         choices: tuple[str, ...] | None = None) -> Any:
    """A field of Config that is a flag; a number must lie in [low, high]."""
    return field(default=default, metadata={"help": help, "range": (low, high), "choices": choices})


@dataclass(frozen=True)
class Config:
    records: Sequence[str] = flag((), "JSON Lines files of scored candidates, one a verifier")
    out: str = flag("report.json", "file of the report")
    rule: str = flag("ours", "ours, or the published rule alone", choices=("ours", "paper"))
    min_margin: float = flag(0.5, "the loop's tau: pairs of a smaller margin do not count", 0, 1)
    min_direction: float = flag(MIN_DIRECTION, "q's lower end must lie above this", 0, 1)
    student: str = flag("", "folder or hub id of the student")
    verifier: Sequence[str] = flag((), "folders or hub ids of the verifiers")
    task: str = flag("", "name of the task")
    data: str = flag("", "directory of the task's data, where it needs one")
    split: str = flag("", "split of the data (default: the task's own choice)")
    items: int = flag(200, "items to ask about, drawn from those with an answer", 1)
    k: int = flag(8, "candidates an item", 2)
    temperature: float = flag(1.0, "sampling temperature of the candidates", 1e-6, 1e6)
    top_p: float = flag(0.9, "nucleus that the candidates are sampled from", 1e-6, 1)
    max_new_tokens: int = flag(256, "longest answer", 1)
    verdict_tokens: int = flag(64, "longest verdict", 1)
    verdict: str = flag("json", "how the verifier scores: a name of verifier.VERDICTS, as json")
    batch_size: int = flag(16, "prompts that are prefilled together", 1)
    seed: int = flag(0, "seed of the choice of items and of the sampling", 0)
    device: str = flag("", "cpu or cuda (default: cuda where there is one)")
    dtype: str = flag("", "default: bfloat16 on cuda only", choices=("float32", "bfloat16"))
    min_pixels: int = flag(0, "enlarge smaller pictures to this area; 0: the model's own", 0)
    max_pixels: int = flag(0, "shrink larger pictures to this area; 0: the model's own", 0)
    cache: str = flag("", "folder of what models answered (default: gate_cache beside the report)")

    def __post_init__(self) -> None:
        if {bool(flag) for flag in (self.student, self.verifier, self.task)} != {not self.records}:
            raise ValueError("give either --records, or all of --student, --verifier and --task")
        out = Path(self.out)
        folder = next(path for path in out.absolute().parents if path.exists())
        if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"--out {out} is a folder, or no file can be written in {folder}")
        for name, paths in (("records", self.records), ("data", [self.data])):
            if out.exists() and any(Path(path).is_file() and out.samefile(path) for path in paths):
                raise ValueError(f"--out {out} would replace a file of --{name}")
        for option in fields(self):
            value = getattr(self, option.name)
            low, high = option.metadata["range"]
            if isinstance(value, (int, float)) and not low <= value <= high:        # or NaN
                allowed = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
                flag_name = option.name.replace("_", "-")
                raise ValueError(f"--{flag_name} must be {allowed}, not {value}")


def build_parser() -> argparse.ArgumentParser:
    """A parser with a flag for each field of Config; what is not given keeps its default there."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, usage=argparse.SUPPRESS)
    for option in fields(Config):
        name = "--" + option.name.replace("_", "-")
        text = option.metadata["help"]
        if option.default == ():
            parser.add_argument(name, nargs="+", help=text)
            continue
        if option.default != "":
            text += f" (default {option.default})"
        choices = option.metadata["choices"]
        parser.add_argument(name, type=type(option.default), choices=choices, help=text)
    return parser


def print_reports(reports: dict[str, Report]) -> None:
    """Print the table, the best agreement first, and every verifier's reasons."""
    figures = ("rubric_accuracy", "baseline_accuracy", "own_answer_accuracy", "direction",
               "balanced_accuracy")
    costs = {"parameters": "{:,}", "seconds_per_verdict": "{:.4g}", "tokens_per_verdict": "{:.1f}",
             "cost": "{:.2f}x"}
    for name in [name for name in costs if any(r.get(name) is None for r in reports.values())]:
        del costs[name]                             # not known of all
    head = [f"{name:20}" for name in figures] + [f"{name:>19}" for name in costs]
    print("verdict", *head, "verifier", sep="  ")
    order = sorted(reports.items(), key=lambda entry: -entry[1]["rubric_accuracy"]["value"])
    for verifier, report in order:
        cells = [f"{format_figure(report.get(name)):20}" for name in figures]
        cells += [f"{form.format(report[name]):>19}" for name, form in costs.items()]
        print(f"{report['verdict']:7}", *cells, verifier, sep="  ")
    for verifier, report in order:
        print(f"\n{verifier}", *report["reasons"], sep="\n  - ", flush=True)


def end(error: BaseException) -> int:
    """Say in one line why the program ends; 2 where the caller can mend it, 1 for all else."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(error).split()))
    asked = "models cannot be asked: " if isinstance(error, ModuleNotFoundError) else ""
    shown = line if len(line) < 580 else f"{line[:350]} ... {line[-220:]}"
    print(f"gate.py: {asked}{shown}", file=sys.stderr)
    return 2 if isinstance(error, USAGE) or getattr(error, "errno", None) in NAMES else 1


def interrupted(*_: Any) -> None:
    os.write(2, b"\ngate.py: interrupted; the same command continues\n")
    os._exit(1)


def main(argv: list[str] | None = None) -> int:
    """Measure every verifier, from records or by asking models; returns the exit status."""
    from replay import select_pair
    reports: dict[str, Report] = defaultdict(dict)  # by the verifier's name: its file or folder
    advice: Report = {}
    try:
        given, unknown = build_parser().parse_known_args(argv)
        if unknown:
            raise ValueError(f"unrecognized arguments: {unknown}")
        cfg = Config(**vars(given))
        records: dict[str, Sequence[Record]] = {path: read_records(path) for path in cfg.records}
        if not cfg.records:                         # what lies above this file is imported here
            from eval import score as exact_match
            from loop.flags import check_asking
            check_asking(cfg)                       # before torch takes its seconds
            from loop.survey import SurveyConfig, survey
            questions = SurveyConfig(**{f.name: getattr(cfg, f.name) for f in fields(SurveyConfig)})
            cache = Path(cfg.cache or Path(cfg.out).parent / "gate_cache")
            for name, answers in survey(questions, cache).items():
                reports[name] = {"parameters": answers.parameters}
                records[name] = gather_records(
                    answers.items, greedy=answers.greedy, sample=answers.samples,
                    score=answers.verdicts, own=answers.own, correct=exact_match)
        for name, rows in records.items():
            measures = measure(rows, select_pair, cfg.min_margin)
            decision = decide_before(measures, cfg.rule, cfg.min_direction)
            decided = {"verdict": decision.verdict, "reasons": decision.reasons, "rule": cfg.rule}
            reports[name] = decided | reports[name] | verdict_costs(rows) | measures
        if len(reports) > 1 or not cfg.records:
            advice, reports = recommend(reports, records)
        whole = advice | ({"verifiers": reports} if len(reports) > 1 else reports[name])
        aside = Path(cfg.out + ".tmp")              # renamed, so that --out is never half-written
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        aside.replace(cfg.out)
    except (*USAGE, OSError, MemoryError, ModuleNotFoundError) as error:
        return end(error)
    try:
        print_reports(reports)
        if advice:
            print(f"\n{advice['recommendation']}", flush=True)
    except BrokenPipeError:                         # `| head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0 if any(report["verdict"] == "PASS" for report in reports.values()) else 3


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)       # an exception can get lost in imports
    signal.signal(signal.SIGTERM, interrupted)
    sys.exit(main())
