"""The two gates: may this verifier train this student, and may the trained student be deployed?

    agreement   rubric accuracy: share of [score >= 0.5] == [exact match]; no score disagrees
    direction   q = P(the chosen side is right | exactly one side is right), over all pairs that
                training would form; q(tau) over those of a margin >= tau, which are replayed
    form        is an answer found in the chosen side as often as in the rejected one?
    published   BLOCK if agreement < baseline ("When Good Verifiers Go Bad", arXiv 2606.14629)
    ours        BLOCK, too, unless the lower end of q > 1/2, or if the upper end of q(tau) < 1/2, or
                if form is shown to suffer, or the verifier to answer worse than the student
    after       PROMOTE iff a gain is shown on held-out items (see gate_after)

The baseline is the mean correctness of the frozen student's candidates. By agreement alone, a
verifier that accepts everything passes. Training follows the sign of 2 q - 1 (see replay.py), so
q > 1/2 has to be shown: q = 1/2 passes at most 2.5 % of the time, q = 0.8 at least 95 % from 35
mixed pairs (one side right) on. Intervals are 95 %.

    python gate.py --records a.jsonl [b.jsonl ...] --out report.json    # no torch; several: ranked
    python gate.py (--student S | --candidates LOG) --verifier V1 V2 --task bar     # asks first

A record is one scored candidate: {"item": str, "correct": bool, "score": number in [0, 1] or null}.
Optional keys: see replay.Record. What is not there is not measured, and the report says so.
Exit status: 0 PASS (of any verifier), 3 BLOCK, 2 usage and inputs, 1 anything else.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean, median
from typing import Any, TypedDict

Call = Callable[..., Any]
Record = Mapping[str, Any]      # a scored candidate, see replay.Record
Measures = dict[str, Any]       # figures, counts and a table, by name, as JSON holds them
Check = tuple[bool, str]        # of a rule: does it hold, and why?
Report = dict[str, Any]         # verdict, reasons, rule, costs and Measures of one verifier
ALPHA = 0.05                    # of an interval on both sides together, of a test on its one side
ACCEPT = 0.5                    # a score from here on says "right"
MIN_DIRECTION = 0.5             # the q at which the mean update changes sign
MARGINS = (0.0, 0.1, 0.25, 0.5, 0.75)           # for which q(tau) is reported; 0.0: all pairs
LEAST_OF_CLASS = 20             # items with right (wrong) candidates, for an interval over both
NEARLY = 0.05                   # a cheaper verifier must be shown to lack less agreement than this
USAGE = (ValueError, argparse.ArgumentError, FileNotFoundError, PermissionError)    # can be mended
ENDS = (*USAGE, FloatingPointError, MemoryError, OSError, ModuleNotFoundError)      # end in a line
RATES = {"truncated": "truncation_rate", "candidate_parsed": "answer_parse_rate",
         "candidate_truncated": "answer_truncation_rate"}
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


def format_figure(figure: Mapping[str, Any] | None, form: str = ".3f") -> str:
    """A figure as "value [low, high]"; "unknown" where there is none."""
    if figure is None or figure["n"] == 0:
        return "unknown"
    if figure["low"] is None:
        return f"{figure['value']:{form}} [unknown]"
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


def quantile(alpha: float, df: float = math.inf) -> float:
    """What Student's t with `df` degrees of freedom exceeds with probability alpha / 2."""
    z = NormalDist().inv_cdf(1 - alpha / 2)
    return z + (z ** 3 + z) / (4 * df)              # to the order 1 / df


def proportion(successes: int, n: int, alpha: float = ALPHA) -> Figure:
    """Share of n independent trials with the exact (Clopper-Pearson) interval."""
    assert 0 <= successes <= n, (successes, n)
    return {"value": successes / n if n else None, "low": _lower_end(successes, n, alpha),
            "high": 1 - _lower_end(n - successes, n, alpha), "n": n}


def _lower_end(successes: int, n: int, alpha: float) -> float:
    """The p at which as many successes or more have a probability of alpha / 2, by bisection."""
    low = 0.0
    high = successes / max(n, 1)
    for _ in range(60):
        middle = (low + high) / 2
        if _upper_tail(successes, n, middle) > alpha / 2:
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
    for j in range(k, n):
        term *= (n - j) / (j + 1) * p / (1.0 - p)           # P(X = j + 1) from P(X = j)
        total += term
        if term < 1e-17 * total:
            break
    log_choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return min(1.0, total * math.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p)))


def clustered_ratio(pairs: Iterable[tuple[float, float]], alpha: float = ALPHA) -> Figure:
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
    trials = math.fsum(b for _, b in items)
    share = math.fsum(a for a, _ in items) / trials
    tenth = 0.1 / m                                 # of an average item, as a share of the trials
    residuals = [(a - share * b) / trials for a, b in items]
    squares = math.fsum(residual ** 2 for residual in residuals)
    squares += tenth / m * (share ** 2 + (1 - share) ** 2)      # one tenth wrong and one right
    variance = squares * m / max(m - 1, 1)
    smooth_share = (share + tenth) / (1 + 2 * tenth)
    effective = smooth_share * (1 - smooth_share) / variance
    t = quantile(alpha, max(m - 1, 1))
    w = t * t / min(effective, trials)              # Wilson's interval in terms of t^2 / trials
    centre = share + w / 2
    half_width = math.sqrt(share * (1 - share) * w + w * w / 4)
    low = min(max(0.0, (centre - half_width) / (1 + w)), share)
    high = max(min(1.0, (centre + half_width) / (1 + w)), share)
    return {"value": share, "low": low, "high": high, "n": round(trials)}


def clustered_proportion(clusters: Iterable[tuple[int, int]], alpha: float = ALPHA) -> Figure:
    """R of clusters (successes, trials): the exact interval where each has one trial; where not, it
    is widened to hold that of `clustered_ratio`, so that it is never surer than n coin tosses."""
    clusters = [(successes, n) for successes, n in clusters if n]
    figure = proportion(sum(a for a, _ in clusters), sum(n for _, n in clusters), alpha)
    if all(n == 1 for _, n in clusters):
        return figure
    wider = clustered_ratio(clusters, alpha)
    return figure | {"low": min(figure["low"], wider["low"]),
                     "high": max(figure["high"], wider["high"])}


def balanced_ratio(first: Sequence[tuple[float, float]],
                   second: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Mean of two clustered ratios over the same items, in the same order: its interval is that of
    items of one size that have the same influences on the mean. Its ends are None where fewer than
    LEAST_OF_CLASS items count for one of the two: it would hold the truth too seldom."""
    one = clustered_ratio(first)
    two = clustered_ratio(second)
    rarer = min(sum(b > 0 for _, b in first), sum(d > 0 for _, d in second))
    if one["value"] is None or two["value"] is None:
        return {**proportion(0, 0)}
    mean = (one["value"] + two["value"]) / 2
    n = one["n"] + two["n"]
    if rarer < LEAST_OF_CLASS:
        return {"value": mean, "low": None, "high": None, "n": n}

    m = len(first)
    items = []
    size = 4 * n / m            # sum b caps the trials, and such a mean can be surer than n tosses
    for (a, b), (c, d) in zip(first, second, strict=True):
        influence = (a - one["value"] * b) / one["n"]           # on a ratio: (a - R b) / sum b
        influence += (c - two["value"] * d) / two["n"]
        items.append((size * (mean + m * influence / 2), size))
    return {**clustered_ratio(items), "value": mean, "n": n}


def paired_difference(before: Sequence[float], after: Sequence[float],
                      clusters: Sequence[str] | None = None, alpha: float = ALPHA) -> Figure:
    """mean(after) - mean(before) on the same items; an item's value is a bool or a share.

    The interval is Bonett and Price's (2012): they add two items, of which one rose and one fell,
    or, where `clusters` names the cluster of each item, two clusters of average size.
    """
    changes = [float(new) - float(old) for old, new in zip(before, after, strict=True)]
    n = len(changes)
    if n == 0:
        return {"value": None, "low": -1.0, "high": 1.0, "n": 0}
    names = range(n) if clusters is None else clusters
    sums: dict[Any, list[float]] = defaultdict(list)
    for name, change in zip(names, changes, strict=True):
        sums[name].append(change)
    m = len(sums)
    centre = math.fsum(changes) * m / n / (m + 2)
    squares = (1 - centre) ** 2 + (1 + centre) ** 2             # of the two that are added
    for cluster in sums.values():
        squares += ((math.fsum(cluster) - centre * len(cluster)) * m / n) ** 2
    t = quantile(alpha) if m == n else quantile(alpha, max(m - 1, 1))
    half_width = t * math.sqrt(squares) / (m + 2)
    return {"value": math.fsum(changes) / n, "low": max(-1.0, centre - half_width),
            "high": min(1.0, centre + half_width), "n": n}


def mcnemar(before: Sequence[bool], after: Sequence[bool], fell: bool = False) -> float:
    """Exact McNemar p value, two-sided or that accuracy `fell`: changed items are coin tosses."""
    pairs = [(bool(old), bool(new)) for old, new in zip(before, after, strict=True)]
    lost = pairs.count((True, False))
    gained = pairs.count((False, True))
    if fell:
        return _upper_tail(lost, lost + gained, 0.5)
    return min(1.0, 2 * _upper_tail(max(lost, gained), lost + gained, 0.5))


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


def measure(records: Iterable[Record], pair_rule: Call, min_margin: float,
            alpha: float = ALPHA) -> Measures:
    """Every measure of one verifier's records, by name. Items of one `group` are one cluster.

    `pair_rule(item, texts, scores)`: the indices (top, bottom) of the pair that training would
    form, or a reason for none. `alpha`: of the tests and of the interval of q, which decide.
    `pick_lift`, a mean over items: accuracy of the best-scored candidate (of several the mean; of
    all if no score was read) minus the mean candidate's.
    """
    from replay import check_agreement, check_record, label_pairs
    records = list(records)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        check_record(record)
        groups[record["item"]].append(record)
    if not groups:
        raise ValueError("no records to measure")
    check_agreement(records)
    rows = list(groups.values())
    clusters = {item: row[0].get("group") or f"item {item}" for item, row in groups.items()}
    names = list(clusters.values())
    counts: dict[str, list[tuple[int, int]]] = defaultdict(list)    # name -> (a, b) of each item
    for row in rows:
        for name, count in _count_candidates(row).items():
            counts[name].append(count)
    mean_accuracy = [right / size for right, size in counts["baseline_accuracy"]]
    picked_accuracy = [right / size for right, size in counts.pop("picked, right")]
    summed = {name: _sum_clusters(names, items) for name, items in counts.items()}
    balanced = balanced_ratio(summed.pop("agreement, right"), summed.pop("agreement, wrong"))
    figures = {name: clustered_ratio(items) for name, items in summed.items()}
    for key, name in ITEM_RATES.items():            # the same in all records of an item
        known = [(row[0].get(key) is True, row[0].get(key) is not None) for row in rows]
        figures[name] = clustered_proportion(_sum_clusters(names, known))
    figures["own_difference"] = _own_difference(rows, names, mean_accuracy)
    costs = {}
    for key, average in (("seconds", median), ("tokens", fmean)):   # a median leaves out warm-up
        spent = _known_values(records, key)
        if spent:
            costs[f"{key}_per_verdict"] = average(spent)

    pairs = label_pairs(groups, pair_rule)
    by_margin = [_direction(pairs, tau, clusters, alpha) for tau in MARGINS]
    return {
        "items": len(groups), "clusters": len(set(names)), "records": len(records),
        "min_margin": min_margin, "alpha": alpha, **costs,
        **{name: figure for name, figure in figures.items() if figure["n"]},
        "balanced_accuracy": balanced, "direction": by_margin[0]["direction"],
        "direction_at_margin": _direction(pairs, min_margin, clusters, alpha)["direction"],
        "mixed_share": by_margin[0]["mixed_share"], "direction_by_margin": by_margin,
        "form": forms(pairs), "pick_lift": paired_difference(mean_accuracy, picked_accuracy, names)}


def _sum_clusters(names: Iterable[str], counts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(sum a, sum b) of each cluster, in the order of their names' first appearance."""
    sums: dict[str, tuple[int, int]] = {}
    for name, (a, b) in zip(names, counts, strict=True):
        before = sums.get(name, (0, 0))
        sums[name] = (before[0] + a, before[1] + b)
    return list(sums.values())


def _own_difference(rows: Sequence[Sequence[Record]], names: Sequence[str],
                    mean_accuracy: Sequence[float]) -> Figure:
    """The verifier's accuracy minus the student's greedy one, or else its candidates', paired."""
    greedy: Sequence[float | None] = [row[0].get("greedy_correct") for row in rows]
    if set(greedy) == {None}:
        greedy = mean_accuracy
    own = [row[0].get("own_correct") for row in rows]
    known = [row for row in zip(greedy, own, names, strict=True) if None not in row]
    before, after, clusters = zip(*known, strict=True) if known else ((), (), ())
    return paired_difference(before, after, clusters)


def _count_candidates(row: Sequence[Record]) -> dict[str, tuple[int, int]]:
    """(a, b) of an item by the name of a share: of b candidates it holds for a."""
    size = len(row)
    scores = _known_values(row, "score")
    best = max(scores, default=None)
    picked = [record["correct"] for record in row if record["score"] == best]
    of_right = [agrees(record["score"], True) for record in row if record["correct"]]
    of_wrong = [agrees(record["score"], False) for record in row if not record["correct"]]
    counts = {
        "baseline_accuracy": (len(of_right), size),
        "rubric_accuracy": (sum(of_right) + sum(of_wrong), size),
        "agreement, right": (sum(of_right), len(of_right)),
        "agreement, wrong": (sum(of_wrong), len(of_wrong)),
        "accept_rate": (sum(score >= ACCEPT for score in scores), size),
        "parse_rate": (len(scores), size),
        "picked, right": (sum(picked), len(picked)),
    }
    for key, name in RATES.items():
        known = _known_values(row, key)
        counts[name] = (known.count(True), len(known))
    return counts


def _known_values(records: Iterable[Record], key: str) -> list[Any]:
    """The values of a key where it is neither absent nor null."""
    return [record.get(key) for record in records if record.get(key) is not None]


def _direction(pairs: Iterable[Any], tau: float, clusters: Mapping[str, str],
               alpha: float) -> dict[str, Any]:
    """q(tau), and the numbers of pairs and of mixed pairs (one side right) with such a margin."""
    reaching = [pair for pair in pairs if pair.margin >= tau]
    names = [clusters[pair.item_id] for pair in reaching]
    q = [(pair.is_right_way, pair.is_mixed) for pair in reaching]       # right way, of mixed
    mixed = [(pair.is_mixed, 1) for pair in reaching]
    figure = clustered_proportion(_sum_clusters(names, q), alpha)
    return {"min_margin": tau, "direction": figure, "pairs": len(reaching), "mixed": figure["n"],
            "mixed_share": clustered_proportion(_sum_clusters(names, mixed))}


def forms(pairs: Iterable[Any]) -> dict[str, Any]:
    """Which side is read less often: the exact one-sided McNemar p that it is the chosen one. No
    label is needed. Beside it both sides' mean length in characters, and share that was cut off."""
    from replay import count_form
    form = count_form(pairs)
    one_sided = form.chosen_unread + form.rejected_unread
    return vars(form) | {"p_value": _upper_tail(form.chosen_unread, one_sided, 0.5)}


# ---- decisions
@dataclass(frozen=True)
class Decision:
    """PASS or BLOCK before training, PROMOTE or REJECT after; a refusal names all that failed."""
    verdict: str
    reasons: list[str]
    measures: Measures


def decide_before(measures: Measures, rule: str = "ours",
                  min_direction: float = MIN_DIRECTION) -> Decision:
    """The rule "ours" above, or "paper" alone. What is not known blocks nothing; reasons say so."""
    assert rule in ("ours", "paper"), rule
    checks = [_check_agreement(measures)]
    if rule == "ours":
        checks += [_check_direction(measures, min_direction), _check_replay(measures),
                   _check_form(measures), _check_own_answers(measures)]
    if not measures["parse_rate"]["value"]:
        unread = f"no verdict of this verifier could be read ({measures['records']} asked for)"
        checks.insert(0, (False, f"{unread}, so nothing below is about its judgment: raise "
                          "--verdict-tokens, or choose another --verdict or verifier"))
    passed = all(holds for holds, _ in checks)
    reasons = [reason for holds, reason in checks if holds == passed]
    return Decision("PASS" if passed else "BLOCK", reasons, measures)


def _check_agreement(measures: Measures) -> Check:
    """The published rule. The intervals say whether a no may be chance."""
    agreement = measures["rubric_accuracy"]
    baseline = measures["baseline_accuracy"]
    holds = should_deploy_self_dpo(agreement["value"], baseline["value"])
    is_near = agreement["high"] >= baseline["low"]
    advice = "more items would settle it" if is_near else "use another verifier or mend its prompt"
    return holds, (f"agreement (verdicts read: {measures['parse_rate']['value']:.1%}), "
                   f"{format_figure(agreement)}, is {'not ' if holds else ''}below the candidates' "
                   f"mean correctness, {format_figure(baseline)}{'' if holds else '; ' + advice}")


def _check_direction(measures: Measures, least: float) -> Check:
    """Is it shown that the pairs that would be trained on, of any margin, point the right way?"""
    q: Figure = measures["direction"]
    told = _told_direction(q, measures["alpha"])
    if q["low"] > least:
        return True, f"direction shown: {told}"
    if q["high"] < least:
        return False, f"wrong direction: {told}; use another verifier"
    return False, f"direction not shown: {told}"


def _check_replay(measures: Measures) -> Check:
    """Is it not shown that the pairs that would be replayed point the wrong way?"""
    q: Figure = measures["direction_at_margin"]
    holds = q["high"] >= MIN_DIRECTION
    return holds, (f"{'direction' if holds else 'wrong direction'} from a margin of "
                   f"{measures['min_margin']:g} on: {_told_direction(q, measures['alpha'])}")


def _told_direction(q: Figure, alpha: float) -> str:
    """A direction in words."""
    return (f"{round((q['value'] or 0) * q['n'])} of {q['n']} mixed pairs (one side right) point "
            f"the right way, {100 * (1 - alpha):.3g} % interval {q['low']:.2f} to {q['high']:.2f}")


def _check_form(measures: Measures) -> Check:
    """Is it not shown that the chosen side is read less often than the rejected one?"""
    form = measures["form"]
    if not form["pairs"]:
        return True, "form not measured: no pair has candidate_parsed on both sides"
    holds = form["p_value"] > measures["alpha"]
    verdict = "form" if holds else "prefers answers without form, and training would end in them"
    return holds, (f"{verdict}: of {form['pairs']} pairs where it is known, an answer is found on "
                   f"the rejected side alone in {form['chosen_unread']}, on the chosen side alone "
                   f"in {form['rejected_unread']} (p = {form['p_value']:.2g})")


def _check_own_answers(measures: Measures) -> Check:
    """Is it not shown that the verifier answers worse than the student?"""
    difference: Figure | None = measures.get("own_difference")
    if difference is None:
        return True, "own answers not measured: no item's own_correct is known"
    holds = difference["high"] >= 0
    verdict = "not shown to be worse" if holds else "worse, use another verifier"
    return holds, (f"own answers {verdict}: the verifier's accuracy less the student's is "
                   f"{format_figure(difference, '+.3f')} on {difference['n']} of "
                   f"{measures['items']} items")


def gate_after(before: Sequence[bool], after: Sequence[bool], trained: bool = True,
               min_low: float = -0.02, require_gain: bool = False,
               clusters: Sequence[str] | None = None) -> Decision:
    """PROMOTE where a gain is shown on the same held-out items, before and after training.
    Shown: exact one-sided McNemar p <= 0.05 (where `clusters` names what items share: the lower end
    of the 90 % interval > 0, too). Besides, the 95 % interval must exclude a change of `min_low`,
    and with `require_gain` a change of 0. The chance of PROMOTE on 500 items:

        share of items that change    5 %     10 %    20 %    30 %
        no change of accuracy         0.034   0.038   0.040   0.042
        5 points better               1.000   0.970   0.780   0.626
    """
    change = paired_difference(before, after, clusters)
    p_gain = mcnemar(after, before, fell=True)
    least_gain = paired_difference(before, after, clusters, 2 * ALPHA)["low"]
    is_shown = p_gain <= ALPHA and (clusters is None or least_gain > 0)
    old = proportion(sum(map(bool, before)), len(before))
    new = proportion(sum(map(bool, after)), len(after))
    measures = {"baseline_accuracy": old, "final_accuracy": new, "difference": change,
                "p_value": mcnemar(before, after), "p_gain": p_gain}
    outcome = (f"held-out accuracy went from {format_figure(old)} to {format_figure(new)}, "
               f"by {format_figure(change, '+.3f')}, exact one-sided McNemar p = {p_gain:.2g}")
    faults = [] if trained else ["nothing was trained"]
    if trained and (change["value"] or 0) <= 0:
        faults.append(f"no gain: {outcome}")
    elif trained and not is_shown:
        faults.append(f"a gain is not shown: {outcome}")
    for least, is_asked in ((min_low, True), (0.0, require_gain)):
        if trained and is_asked and change["low"] <= least:
            faults.append(f"a change of {least:+g} is not excluded: {outcome}")
    if faults:
        return Decision("REJECT", faults, measures)
    return Decision("PROMOTE", [f"a gain is shown: {outcome}"], measures)


# ---- ranking of verifiers
def item_agreement(records: Iterable[Record]) -> dict[str, float]:
    """For each item the share of its candidates on which the verdict agrees with exact match."""
    agreed: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        agreed[record["item"]].append(agrees(record["score"], record["correct"]))
    return {item: fmean(row) for item, row in agreed.items()}


def recommend(reports: dict[str, Report], records: dict[str, Sequence[Record]]
              ) -> tuple[Report, dict[str, Report]]:
    """The cheapest verifier that passes and is shown to agree nearly as often as the best.
    The paper ranks by agreement, not by size; more compute buys nothing, it says. Unless all costs
    are known, the best is taken. Returns `recommended` (a name or None), `recommendation`, and the
    reports with `cost`, over the least, and `difference_from_best`, in paired agreement.
    """
    from replay import check_same_candidates
    check_same_candidates(records)
    agreement = {name: item_agreement(rows) for name, rows in records.items()}
    group = {row["item"]: row.get("group") or row["item"] for row in next(iter(records.values()))}
    passed = [name for name, report in reports.items() if report["verdict"] == "PASS"]
    best = max(passed or reports, key=lambda name: fmean(agreement[name].values()))
    clusters = [group[item] for item in agreement[best]]
    least = min(report.get("seconds_per_verdict", 0) for report in reports.values())
    ranked = {}
    near = []                                       # of those that pass
    for name, report in reports.items():
        shares = [agreement[name][item] for item in agreement[best]]
        difference = paired_difference(list(agreement[best].values()), shares, clusters)
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
    of_passed = f"{pick} is recommended: {len(passed)} of {len(reports)} verifiers pass, and it"
    if reports[pick]["cost"] is None:
        return (f"{of_passed} agrees best; what a verdict costs is not known of all (0 seconds "
                "count as unknown).")
    gap = reports[pick]["difference_from_best"]
    beside = "" if pick == best else f" ({format_figure(gap, '+.3f')} from {best})"
    why = (f"{of_passed} is the cheapest whose agreement is shown to be less than {NEARLY:g} below "
           f"that of the best{beside}")
    if all(reports[name]["cost"] <= reports[pick]["cost"] for name in passed):
        return f"{why}; none that passes costs more."
    is_less = gap["value"] and gap["high"] < 0
    buys = f"{-gap['value']:.3f} of agreement" if is_less else "nothing that was measured"
    return f"{why}; beyond it, more verifier compute buys {buys}."


# ---- the program
@dataclass(frozen=True)
class Config:
    """How to decide; whom to ask, where there are no records, is loop/survey.py's SurveyConfig."""
    records: Sequence[str] = ()
    out: str = "report.json"
    rule: str = "ours"
    min_margin: float = 0.5
    min_direction: float = MIN_DIRECTION

    def __post_init__(self) -> None:
        for value in (self.min_margin, self.min_direction):
            if not 0 <= value <= 1:                 # or NaN
                raise ValueError(f"margins and directions are in [0, 1], and {value} is not")
        out = Path(self.out)
        folder = next(path for path in out.absolute().parents if os.path.exists(path))
        can_hold = folder.is_dir() and os.access(folder, os.W_OK) and len(out.name) <= 200
        if not can_hold or out.is_dir():
            raise ValueError(f"--out {out} is a folder, or a file that {folder} cannot hold")
        if out.resolve() in [Path(path).resolve() for path in self.records]:
            raise ValueError(f"--out {out} would replace a file of --records")


def build_parser() -> argparse.ArgumentParser:
    """A parser of Config's flags; what is not given keeps its default there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--records", nargs="+", help="JSON Lines files, one a verifier")
    parser.add_argument("--out", help="file of the report (default report.json)")
    parser.add_argument("--rule", choices=("ours", "paper"), help="default ours; paper: published")
    parser.add_argument("--min-margin", type=float, help="the loop's tau, of replay (default 0.5)")
    parser.add_argument("--min-direction", type=float, help="to exceed by q's low (default 0.5)")
    return parser


def print_reports(reports: dict[str, Report], advice: Report) -> None:
    """Print the table, the best agreement first, every verifier's reasons, and the advice."""
    figures = ("rubric_accuracy", "baseline_accuracy", "own_answer_accuracy", "direction",
               "balanced_accuracy")
    costs = {"parameters": "{:,}", "seconds_per_verdict": "{:.4g}", "tokens_per_verdict": "{:.1f}",
             "cost": "{:.2f}x"}
    for report in reports.values():                 # what is not known of all is left out
        costs = {name: form for name, form in costs.items() if report.get(name) is not None}
    head = [f"{name:20}" for name in figures] + [f"{name:>19}" for name in costs]
    lines = ["  ".join(["verdict", *head, "verifier"])]
    order = sorted(reports.items(), key=lambda entry: -entry[1]["rubric_accuracy"]["value"])
    for verifier, report in order:
        cells = [f"{format_figure(report.get(name)):20}" for name in figures]
        cells += [f"{form.format(report[name]):>19}" for name, form in costs.items()]
        lines.append("  ".join([f"{report['verdict']:7}", *cells, verifier]))
    lines += ["\n  - ".join([f"\n{verifier}", *report["reasons"]]) for verifier, report in order]
    lines += [f"\n{advice['recommendation']}"] if advice else []
    try:
        print("\n".join(lines), flush=True)
    except OSError:                                 # `| head`, or a full disk: the rest is lost
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def judge(cfg: Config, records: dict[str, Sequence[Record]],
          known: Mapping[str, Report] | None = None) -> tuple[Report, dict[str, Report]]:
    """What is recommended of several verifiers, and the report on each by its name, with what else
    is `known` of it. Each of m is tested at ALPHA / m: the more there are, the stricter."""
    from replay import select_pair
    reports: dict[str, Report] = {}
    for name, rows in records.items():
        measures = measure(rows, select_pair, cfg.min_margin, ALPHA / len(records))
        measures |= (known or {}).get(name, {})
        decision = decide_before(measures, cfg.rule, cfg.min_direction)
        if decision.verdict == "PASS" and cfg.rule == "ours":
            decision.reasons.append("necessary, not sufficient: no pilot was run")
        reports[name] = {"verdict": decision.verdict, "reasons": decision.reasons, "rule": cfg.rule,
                         **measures}
    return recommend(reports, records) if len(reports) > 1 or known else ({}, reports)


def end(error: BaseException) -> int:
    """Say in one line why the program ends; 2 where the caller can mend it, 1 for all else."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(error).split()))
    shown = line if len(line) < 580 else f"{line[:350]} ... {line[-220:]}"
    print(f"gate.py: {shown}", file=sys.stderr)
    return 2 if isinstance(error, USAGE) else 1


def interrupted(*_: Any) -> None:
    os.write(2, b"\ngate.py: interrupted; the same command continues\n")
    os._exit(1)


def main(argv: list[str] | None = None) -> int:
    """Measure every verifier, from records or by asking models; returns the exit status."""
    from replay import read_records
    parser = build_parser()
    unknown = "unrecognized arguments"
    leave_page: Any = None                          # beside a copy of this file there is no page
    try:                                            # what lies above this file is imported here
        from loop.report.gating import leave_gate_page as leave_page
        from loop.survey_flags import SurveyConfig
        from tasks.flags import add_flags
        add_flags(parser, SurveyConfig)
    except ModuleNotFoundError as error:            # a copy of this file decides from records
        unknown = f"models cannot be asked ({error}), so these flags are unknown"
    try:
        parsed, others = parser.parse_known_args(argv)
        if others:
            raise ValueError(f"{unknown}: {' '.join(others)}")
        given = vars(parsed)
        cfg = Config(**{name: given.pop(name) for name in vars(Config()) if name in given})
        if bool(cfg.records) == bool(given):
            raise ValueError("give --records, or --verifier, --task and --student or --candidates")
        shown: Any = ({path: read_records(path) for path in cfg.records}, ())  # records, and items
        if given:
            questions = SurveyConfig(**given)       # checked before torch takes its seconds
            from loop.survey import survey_and_judge
            from tasks.lock import take_lock
            _lock = take_lock(Path(f"{cfg.out}.lock"), cfg.out)     # until main() returns
            advice, reports, shown = survey_and_judge(questions, cfg, judge)
        else:
            advice, reports = judge(cfg, shown[0])
        whole = advice | ({"verifiers": reports} if len(reports) > 1 else [*reports.values()][-1])
        aside = Path(f"{cfg.out}.{os.getpid()}.tmp")    # renamed: --out is never half-written
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
            aside.replace(cfg.out)
        finally:
            aside.unlink(missing_ok=True)           # of a disk that is full
    except ENDS as error:
        return end(error)
    print_reports(reports, advice)
    if leave_page:
        leave_page(cfg.out, whole, *shown)
    passed = any(report["verdict"] == "PASS" for report in reports.values())
    return 0 if passed and advice.get("recommended", True) else 3


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)       # an exception can get lost in imports
    signal.signal(signal.SIGTERM, interrupted)
    sys.exit(main())
