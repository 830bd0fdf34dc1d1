"""The two gates: may this verifier train this student, and may the trained student be deployed?

    agreement   rubric accuracy: share of candidates with [score >= 0.5] == [exact match]; no score disagrees
    direction   q(tau) = P(the chosen side is right | margin >= tau, exactly one side is right)
    published   BLOCK if agreement < baseline ("When Good Verifiers Go Bad", arXiv 2606.14629)
    ours        PASS iff agreement >= baseline, the lower end of q(tau) > 1/2, and own answers >= the student's
    after       PROMOTE iff difference > 0 and its lower end > -0.02, paired on held-out items

By agreement alone a verifier that accepts everything equals the baseline, and one that rejects everything scores
1 - baseline and passes a weak student. The update follows the sign of 2 q - 1, so q > 1/2 has to be shown: by its
exact interval q = 1/2 passes at most 2.5 % of the time, q = 0.8 at least 95 % from 35 mixed pairs (one side right)
on. Own answers are compared as points: a lower share blocks unproved. Intervals: 95 %. Standard library only.

    python gate.py --records records.jsonl --out report.json        # no model, no torch
    python gate.py --student S --verifier V1 V2 --task bar          # asks the models, ranks the verifiers

A record is one scored candidate, {"item": str, "correct": bool, "score": number in [0, 1] or null}; optional are text,
truncated (the verdict was), candidate_{parsed,truncated}, and, the same in all records of an item, the verifier's and
the student's greedy answers: {own,greedy}_{correct,parsed,truncated}. Exit status: 0 PASS (of any), 3 BLOCK, 2 usage.
"""
from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

Figure = dict[str, Any]                         # {"value": float | None, "low": float, "high": float, "n": int}
Sides = tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]      # scored answers of before and after, by item
Z = 1.959963984540054                           # the normal distribution's 97.5 % quantile
ACCEPT = 0.5                                    # a score from here on says "right"
MIN_DIRECTION = 0.5                             # the q at which the mean update changes sign
NEEDED_MIXED = 35                               # mixed pairs that show q = 0.8 at least 19 times in 20
RATES = {"truncated": "truncation_rate", "candidate_parsed": "answer_parse_rate",
         "candidate_truncated": "answer_truncation_rate"}
ITEM_RATES = {"own_correct": "own_answer_accuracy", "own_parsed": "own_parse_rate",
              "own_truncated": "own_truncation_rate", "greedy_correct": "greedy_accuracy",
              "greedy_parsed": "greedy_parse_rate", "greedy_truncated": "greedy_truncation_rate"}


@dataclass(frozen=True)
class Decision:
    """PASS or BLOCK before training, PROMOTE or REJECT after it; a no comes with every reason for it."""
    verdict: str
    reasons: list[str]
    measures: dict[str, Any]


def measure_rubric_accuracy(verifier_model: Callable[[Any], Any], task_items: Iterable[Any],
                            rubric_prompt_fn: Callable[[Any], Any], task_native_scorer: Callable[[Any], Any]) -> float:
    """Share of items whose verdict [score >= 0.5] agrees with exact match; an unparsed verdict disagrees.

    `verifier_model(rubric_prompt_fn(item))` is a score in [0, 1], None, or a reply's text (read by verifier.py, which
    nothing else here needs); `task_native_scorer(item)`: is the item's candidate right (bool, or its `.correct`)?
    """
    agreed = []
    for item in task_items:
        score, right = verifier_model(rubric_prompt_fn(item)), task_native_scorer(item)
        if isinstance(score, str):
            from verifier import parse_score
            score = parse_score(score)
        if score is not None and not 0.0 <= score <= 1.0:
            raise ValueError(f"a verifier's score must lie in [0, 1], not {score!r}")
        agreed.append(score is not None and (score >= ACCEPT) == bool(getattr(right, "correct", right)))
    if not agreed:
        raise ValueError("rubric accuracy needs items, not 0 of them")
    return sum(agreed) / len(agreed)


def should_deploy_self_dpo(rubric_accuracy: float, frozen_student_baseline: float) -> bool:
    """The published rule: run the loop unless rubric accuracy is below the frozen student's accuracy."""
    for value in (rubric_accuracy, frozen_student_baseline):
        if not 0.0 <= value <= 1.0:                                    # NaN compares false
            raise ValueError(f"an accuracy must lie in [0, 1], not {value!r}")
    return rubric_accuracy >= frozen_student_baseline


def proportion(successes: int, n: int) -> Figure:
    """Share of n independent trials with the exact (Clopper-Pearson) interval, found by bisection."""
    assert 0 <= successes <= n, (successes, n)

    def least(k: int) -> float:                                        # the p at which P(X >= k) is 2.5 %
        low, high = 0.0, k / max(n, 1)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if _upper_tail(k, n, middle) > 0.025 else (middle, high)
        return low
    return {"value": successes / n if n else None, "low": least(successes), "high": 1 - least(n - successes), "n": n}


def _upper_tail(k: int, n: int, p: float) -> float:
    """P(X >= k) for X ~ Binomial(n, p), 0 < p < 1; terms are added from X = k on, where they fall."""
    if k > n:
        return 0.0
    if k <= 0 or k < n * p:
        return 1.0 - _upper_tail(n - k + 1, n, 1.0 - p)
    total, term, j = 1.0, 1.0, k
    while j < n and term > 1e-17 * total:
        term, j = term * (n - j) / (j + 1) * p / (1.0 - p), j + 1
        total += term
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return min(1.0, total * math.exp(choose + k * math.log(p) + (n - k) * math.log1p(-p)))


def clustered_ratio(pairs: Iterable[tuple[float, float]]) -> Figure:
    """R = sum a / sum b over items (a, b), 0 <= a <= b; in the interval items, not trials, are independent.

    Wilson's interval with Student's t for R(1-R)/V trials, V = m/(m-1) sum (a - R b)^2 / (sum b)^2. For their number a
    fifth of an average item is added, half of it right, so V is never 0: at R = 0 or 1 an item counts as one trial.
    """
    pairs = [(a, b) for a, b in pairs if b > 0]
    m, trials = len(pairs), math.fsum(b for _, b in pairs)
    if m == 0:
        return proportion(0, 0)
    share, half, df = math.fsum(a for a, _ in pairs) / trials, 0.1 / m, max(m - 1, 1)
    squares = math.fsum(((a - share * b) / trials) ** 2 for a, b in pairs) + half / m * (share ** 2 + (1 - share) ** 2)
    smooth = (share + half) / (1 + 2 * half)
    t = Z + (Z ** 3 + Z) / (4 * df)                                    # Student's quantile to the order 1 / df
    w = t * t / min(smooth * (1 - smooth) / (squares * m / df), trials)
    centre, width = share + w / 2, math.sqrt(share * (1 - share) * w + w * w / 4)
    return {"value": share, "low": min(max(0.0, (centre - width) / (1 + w)), share),
            "high": max(min(1.0, (centre + width) / (1 + w)), share), "n": round(trials)}


def balanced_ratio(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> Figure:
    """Mean of two clustered ratios over the same items, in the same order: each item's influences on both add up."""
    one, two, m = clustered_ratio(first), clustered_ratio(second), len(first)
    if not one["n"] or not two["n"]:
        return proportion(0, 0)
    value, n = (one["value"] + two["value"]) / 2, one["n"] + two["n"]
    influence = [(a - one["value"] * b) / one["n"] / 2 + (c - two["value"] * d) / two["n"] / 2
                 for (a, b), (c, d) in zip(first, second, strict=True)]
    size = 4 * n / m                            # such a mean may vary less than one of n tosses does
    return clustered_ratio((size * (value + m * u), size) for u in influence) | {"value": value, "n": n}


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Figure:
    """mean(after) - mean(before) on the same items (bools or shares), with Agresti and Min's (2005) closed interval.

    They add 1/2 to each cell of the paired 2 x 2 table: close to 95 % from small n on, and wide where all are equal.
    """
    changes = [float(a) - float(b) for b, a in zip(before, after, strict=True)]
    n, total = len(changes), math.fsum(changes)
    centre, square = total / (n + 2), (math.fsum(d * d for d in changes) + 1) / (n + 2)
    half = Z * math.sqrt((square - centre ** 2) / (n + 2)) if n else 1.0
    return {"value": total / n if n else None, "low": max(-1.0, centre - half), "high": min(1.0, centre + half), "n": n}


def mcnemar(before: Sequence[bool], after: Sequence[bool], fell: bool = False) -> float:
    """Exact McNemar p value, two-sided or that accuracy `fell`: items that changed are tosses of a fair coin."""
    changed = [bool(b) for b, a in zip(before, after, strict=True) if bool(a) != bool(b)]
    n, lost = len(changed), sum(changed)
    return _upper_tail(lost, n, 0.5) if fell else min(1.0, 2 * _upper_tail(max(lost, n - lost), n, 0.5))


def fell_significantly(before: Sequence[bool], after: Sequence[bool], alpha: float = 0.05) -> bool:
    """Did accuracy fall on the same items, by the one-sided exact McNemar test at level `alpha`?"""
    return mcnemar(before, after, fell=True) <= alpha


def gather_records(items: Sequence[Any], *, greedy: Callable, sample: Callable, score: Callable, own: Callable,
                   correct: Callable) -> list[dict[str, Any]]:
    """Ask student and verifier about `items` (each has an `.id`); returns one record a candidate.

    `greedy`, `own`: the student's and the verifier's greedy completions (.text, .finish_reason); `sample`: K of the
    student's for each item; `score`, given items and texts: the verdicts on them (.value, .truncated); `correct`,
    given an item and a text: exact match (.correct, and .answer, None where none could be read).
    """
    def judged(item: Any, completion: Any, who: str) -> dict[str, bool]:
        verdict = correct(item, completion.text)
        return {who + "_correct": bool(verdict.correct), who + "_parsed": verdict.answer is not None,
                who + "_truncated": completion.finish_reason == "length"}
    samples, records = sample(items), []
    scores = score(items, [[c.text for c in row] for row in samples])
    for item, row, verdicts, student, verifier in zip(items, samples, scores, greedy(items), own(items), strict=True):
        answers = judged(item, student, "greedy") | judged(item, verifier, "own")
        for completion, verdict in zip(row, verdicts, strict=True):
            candidate = judged(item, completion, "candidate")
            records.append({"item": item.id, "correct": candidate.pop("candidate_correct"), "score": verdict.value,
                            "text": completion.text, "truncated": bool(verdict.truncated), **candidate, **answers})
    return records


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines file; whatever is wrong with it is a ValueError that names the line."""
    records, first = [], {}
    for number, line in enumerate(Path(path).read_bytes().rstrip().split(b"\n"), 1):
        try:
            records.append(json.loads(line.decode("utf-8-sig").strip() or "null"))
            check_record(records[-1])
            for key in ITEM_RATES:
                value, seen = first.setdefault((records[-1]["item"], key), (records[-1].get(key), number))
                if records[-1].get(key) != value:
                    raise ValueError(f'"{key}" of item {records[-1]["item"]!r} differs from line {seen}')
        except (ValueError, RecursionError) as error:                  # json's and the decoder's are ValueErrors too
            raise ValueError(f"{path}, line {number}: {getattr(error, 'msg', error)}") from None
    return records


def check_record(record: Any) -> None:
    """ValueError that says what is wrong with a record."""
    if not isinstance(record, dict) or not {"item", "correct", "score"} <= record.keys():
        raise ValueError('a record must be an object with "item", "correct" and "score", not ' + repr(record)[:80])
    for key in ("item", "correct", "text", *RATES, *ITEM_RATES):
        kind, word = (str, "a string") if key in ("item", "text") else (bool, "true or false")
        if not isinstance(record.get(key), kind) and (key in ("item", "correct") or record.get(key) is not None):
            raise ValueError(f'"{key}" must be {word}, not {record[key]!r}')
    score = record["score"]
    if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 1):
        raise ValueError(f'"score" must be a number in [0, 1] or null, not {score!r}')


def measure(records: Iterable[dict[str, Any]], pair_rule: Callable, min_margin: float) -> dict[str, Any]:
    """Every measure of the records, by name; `pair_rule(item, texts, scores)` is (top, bottom) or a reason for none.

    Candidates without a text are told apart by their position. `pick_lift`, a mean over items: accuracy of the
    best-scored candidate (of several the mean) minus the mean candidate's, so 0 where no score could be read.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        check_record(record)
        read, accepts = record["score"] is not None, (record["score"] or 0.0) >= ACCEPT
        judged = {"read": read, "accepts": accepts, "agrees": read and accepts == record["correct"]}
        groups.setdefault(record["item"], []).append(record | judged)
    if not groups:
        raise ValueError("no records to measure")
    rows = list(groups.values())

    def counts(key: str, among: Callable = lambda r: True) -> list[tuple[int, int]]:
        return [(sum(r[key] for r in row if among(r)), sum(map(among, row))) for row in rows]
    best = [max((r["score"] for r in row if r["read"]), default=None) for row in rows]
    picks = [fmean(r["correct"] for r in row if r["score"] == top) for row, top in zip(rows, best)]
    at_tau, *by_margin = _directions(groups, pair_rule, (min_margin, 0.0, 0.1, 0.25, 0.5, 0.75))
    found = {"items": len(rows), "records": sum(map(len, rows)), "min_margin": min_margin,
             "baseline_accuracy": clustered_ratio(counts("correct")),
             "rubric_accuracy": clustered_ratio(counts("agrees")),
             "balanced_accuracy": balanced_ratio(*(counts("agrees", lambda r: r["correct"] == c) for c in (1, 0))),
             "accept_rate": clustered_ratio(counts("accepts")), "parse_rate": clustered_ratio(counts("read")),
             "direction": at_tau["direction"], "mixed_share": proportion(at_tau["mixed"], at_tau["pairs"]),
             "direction_by_margin": by_margin,
             "pick_lift": paired_difference([fmean(r["correct"] for r in row) for row in rows], picks)}
    found |= {name: rate for key, name in RATES.items()
              if (rate := clustered_ratio(counts(key, lambda r: r.get(key) is not None)))["n"]}
    found |= {name: proportion(sum(known), len(known)) for key, name in ITEM_RATES.items()
              if (known := [row[0][key] for row in rows if row[0].get(key) is not None])}
    return found


def _directions(groups: dict[str, list[dict[str, Any]]], pair_rule: Callable, taus: Sequence[float]) -> Iterator[dict]:
    """q(tau) for each tau, with the numbers of pairs and of mixed pairs (one side right) that have such a margin."""
    pairs = []
    for item, row in groups.items():
        texts = [str(k) if r.get("text") is None else r["text"] for k, r in enumerate(row)]
        pair = pair_rule(item, texts, [r["score"] for r in row])
        pairs += [] if isinstance(pair, str) else [(row[pair[0]], row[pair[1]])]
    for tau in taus:
        kept = [(top["correct"], low["correct"]) for top, low in pairs
                if round(top["score"] - low["score"], 9) >= tau]               # 0.7 - 0.2 reaches 0.5
        won = [top for top, low in kept if top != low]
        yield {"min_margin": tau, "direction": proportion(sum(won), len(won)), "pairs": len(kept), "mixed": len(won)}


def decide_before(measures: dict[str, Any], rule: str = "ours", min_direction: float = MIN_DIRECTION) -> Decision:
    """The rule "ours" above, or "paper": the published one alone. Own answers count where they are known."""
    assert rule in ("ours", "paper"), rule
    base, own = measures["baseline_accuracy"], measures.get("own_answer_accuracy")
    checks = [_not_below(f"agreement (verdicts read: {measures['parse_rate']['value']:.1%})",
                         measures["rubric_accuracy"], "the candidates' mean correctness", base)]
    if rule == "ours":
        checks.append(_direction_shown(measures, min_direction))
        checks += [_not_below("accuracy of the verifier's own answers", own, "the student's accuracy",
                              measures.get("greedy_accuracy", base))] if own else []
    passed = all(ok for ok, _ in checks)
    return Decision("PASS" if passed else "BLOCK", [why for ok, why in checks if ok == passed], measures)


def _not_below(name: str, figure: Figure, base_name: str, base: Figure) -> tuple[bool, str]:
    ok, overlap = should_deploy_self_dpo(figure["value"], base["value"]), figure["high"] >= base["low"]
    cure = "" if ok else f"; {'more items would settle it' if overlap else 'use another verifier or mend its prompt'}"
    return ok, f"{name}, {_text(figure)}, is {'not ' * ok}below {base_name}, {_text(base)}{cure}"


def _direction_shown(measures: dict[str, Any], least: float) -> tuple[bool, str]:
    low, value, high, n = (measures["direction"][key] for key in ("low", "value", "high", "n"))
    found = (f"{round((value or 0) * n)} of {n} mixed pairs (one side right) with a margin of at least "
             f"{measures['min_margin']:g} point the right way, 95 % interval {low:.2f} to {high:.2f}")
    if low > least:
        return True, f"direction shown: {found}"
    if high < least or n >= NEEDED_MIXED and value <= least:
        return False, f"{'wrong direction' if high < least else 'no direction'}: {found}; use another verifier"
    needed = max(NEEDED_MIXED, math.ceil(n * ((value - low) / (value - least)) ** 2) if n and value > least else 0)
    items = f" ({math.ceil(measures['items'] * needed / n)} items like these)" if n else ""
    return False, f"direction not shown: {found}; about {needed} mixed pairs are needed{items}"


def _text(figure: Figure | None) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" if figure and figure["n"] else "unknown"


def gate_after(before: Sequence[bool], after: Sequence[bool], trained: bool = True, min_low: float = -0.02) -> Decision:
    """PROMOTE a gain on the held-out items whose paired interval excludes a loss of two points (`min_low`)."""
    change, p = paired_difference(before, after), mcnemar(before, after)
    old, new = (proportion(sum(map(bool, answers)), len(answers)) for answers in (before, after))
    found = f"held-out accuracy went from {_text(old)} to {_text(new)}, by {_text(change)}, exact McNemar p = {p:.2g}"
    faults = {"nothing was trained": not trained, f"no gain: {found}": trained and (change["value"] or 0) <= 0,
              f"a change of {min_low:+g} is not excluded: {found}": trained and change["low"] <= min_low}
    reasons = [why for why, failed in faults.items() if failed]
    return Decision("REJECT" if reasons else "PROMOTE", reasons or [f"a gain: {found}"], {
        "baseline_accuracy": old, "final_accuracy": new, "difference": change, "p_value": p})


def explain_change(held_out: Sides, trained_on: Sides) -> dict[str, Any]:
    """Why held-out accuracy fell, by the frozen and the trained student's answers to held-out and to trained-on items.

    An answer has correct, answer, finish_reason, tokens, choice (is it to a choice question?) and, if known, score (the
    verifier's). A figure is a paired difference beside the two means; it fell or rose if its interval excludes 0.
    `diagnosis`: "wrong direction" where accuracy on trained-on items fell too; "does not transfer" where it or the mean
    score there rose; "none of them"; "not measured" where no such item has an answer. `drift`: of held-out answers;
    `outside_options` are those to choice questions that end and name no option. `reasons` says this in words, and
    where the fall may be the form's: the parse rate fell by as much, or truncation rose.
    """
    accuracy, seen = (_moved(sides, lambda a: a["correct"]) for sides in (held_out, trained_on))
    score, parsed = _moved(trained_on, lambda a: a.get("score")), _moved(held_out, lambda a: a["answer"] is not None)
    cut = _moved(held_out, lambda a: a["finish_reason"] and a["finish_reason"] == "length")
    outside = _moved(held_out, lambda a: a["answer"] is None and a["finish_reason"] == "stop" if a["choice"] else None)
    fell = accuracy["high"] < 0
    name = ("not measured" if not seen["n"] else "wrong direction" if fell and seen["high"] < 0 else
            "does not transfer" if fell and max(seen["low"], score["low"]) > 0 else "none of them")
    reasons = [f"{name}: accuracy moved by {_text(accuracy)} on held-out items and by {_text(seen)} on items trained "
               f"on that have an answer, the verifier's mean score of what was said to these by {_text(score)}"]
    if fell and parsed["value"] <= accuracy["value"]:
        lost = [new["answer"] for old, new in zip(*held_out) if old["correct"] and not new["correct"]]
        reasons.append(f"it may be the form, not the answers: the parse rate moved by {_text(parsed)}, and "
                       f"{lost.count(None)} of the {len(lost)} right answers that were lost cannot be read")
    if fell and cut["low"] > 0:
        reasons.append(f"it may be the length: the share of answers that were cut off moved by {_text(cut)}")
    drift = {"parse_rate": parsed, "truncation_rate": cut, "mean_tokens": _moved(held_out, lambda a: a["tokens"]),
             "outside_options": outside}
    return {"diagnosis": name, "trained_on": {"accuracy": seen, "verifier_score": score}, "drift": drift,
            "reasons": reasons}


def _moved(sides: Sides, read: Callable[[dict[str, Any]], float | None]) -> Figure:
    """Paired difference, trained minus frozen, of what `read` finds (at least 0, or None) in both; and both means."""
    pairs = [pair for pair in zip(*(map(read, side) for side in sides), strict=True) if None not in pair]
    old, new = [b for b, _ in pairs], [a for _, a in pairs]
    unit = max([1, *old, *new])                                        # the interval is made for values of at most 1
    change = paired_difference([b / unit for b in old], [a / unit for a in new])
    change |= {end: change[end] * unit for end in ("value", "low", "high") if pairs}
    return change | {"frozen": fmean(old) if old else None, "trained": fmean(new) if new else None}


def _flag(default: Any, help: str, low: float = -math.inf, high: float = math.inf, choices: tuple | None = None) -> Any:
    return field(default_factory=lambda: default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Config:
    records: str = _flag("", "JSON Lines file of scored candidates: no model is asked")
    out: str = _flag("report.json", "file of the report")
    rule: str = _flag("ours", "ours, or the published rule alone", choices=("ours", "paper"))
    min_margin: float = _flag(0.5, "the loop's tau: pairs of a smaller margin do not count", 0, 1)
    min_direction: float = _flag(MIN_DIRECTION, "the lower end of the direction must lie above this", 0, 1)
    student: str = _flag("", "folder or hub id of the student")
    verifier: list[str] = _flag([], "folders or hub ids of the verifiers")
    task: str = _flag("", "name of the task")
    data: str = _flag("", "directory of the task's data, where it needs one")
    split: str = _flag("", "split of the data (default: the task's own choice)")
    items: int = _flag(200, "items to ask about, drawn from those with an answer", 1)
    k: int = _flag(8, "candidates an item", 2)
    temperature: float = _flag(1.0, "sampling temperature of the candidates", 1e-6, 1e6)
    top_p: float = _flag(0.9, "nucleus that the candidates are sampled from", 1e-6, 1)
    max_new_tokens: int = _flag(256, "longest answer", 1)
    verdict_tokens: int = _flag(64, "longest verdict", 1)
    verdict: str = _flag("json", "how the verifier scores: json, logits, ... (the names of verifier.VERDICTS)")
    batch_size: int = _flag(16, "prompts that are prefilled together", 1)
    seed: int = _flag(0, "seed of the choice of items and of the sampling", 0)
    device: str = _flag("", "cpu or cuda (default: cuda where there is one)")
    cache: str = _flag("", "folder of what the models answered (default: gate_cache beside the report)")

    def __post_init__(self) -> None:
        from tasks.flags import check_ranges
        if [bool(self.student), bool(self.verifier), bool(self.task)] != [not self.records] * 3:
            raise ValueError("give either --records, or all of --student, --verifier and --task")
        for name in ("records", "data"):
            if (path := Path(getattr(self, name))).is_file() and Path(self.out).exists() and path.samefile(self.out):
                raise ValueError(f"--out {self.out} is the file of --{name}, which the report would replace")
        if Path(self.out).is_dir():
            raise ValueError(f"--out {self.out} is a folder; the report is a file")
        check_ranges(self)
        if not self.records:
            from tasks import TASKS
            from verifier import VERDICTS
            for name, known in (("task", TASKS), ("verdict", VERDICTS)):
                if getattr(self, name) not in known:
                    raise ValueError(f"--{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")


def _show(reports: dict[str, dict[str, Any]]) -> None:
    """Print the table, the best agreement first, and every verifier's reasons."""
    names = ("rubric_accuracy", "baseline_accuracy", "own_answer_accuracy", "direction", "balanced_accuracy")
    forms = {"parameters": "{:,}", "seconds_per_verdict": "{:.4g}", "tokens_per_verdict": "{:.1f}", "cost": "{:.2f}x"}
    forms = {name: form for name, form in forms.items() if all(name in report for report in reports.values())}
    order = sorted(reports.items(), key=lambda named: -named[1][names[0]]["value"])
    print("verdict", *(f"{name:20}" for name in names), *(f"{name:>19}" for name in forms), "verifier", sep="  ")
    for path, report in order:
        print(f"{report['verdict']:7}", *(f"{_text(report.get(name)):20}" for name in names),
              *(f"{form.format(report[name]):>19}" for name, form in forms.items()), path, sep="  ")
    for path, report in order:
        print(f"\n{path}", *report["reasons"], sep="\n  - ")


def main(argv: list[str] | None = None) -> int:
    from replay import select_pair
    from tasks.flags import parse_flags
    from tasks.jsonl import write_whole
    cfg, reports, advice = parse_flags(Config, __doc__, argv), {}, {}
    try:
        if cfg.records:
            asked = {cfg.records: (read_records(cfg.records), {})}
        else:
            from loop.survey import recommend, survey
            asked = survey(cfg)
        for path, (records, costs) in asked.items():
            made = decide_before(measure(records, select_pair, cfg.min_margin), cfg.rule, cfg.min_direction)
            reports[path] = {"verdict": made.verdict, "reasons": made.reasons, "rule": cfg.rule} | costs | made.measures
        if not cfg.records:
            advice = recommend(reports, {path: records for path, (records, _) in asked.items()})
        whole = advice | ({"verifiers": reports} if len(reports) > 1 else reports[path])
        write_whole(Path(cfg.out), json.dumps(whole, indent=2) + "\n")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"gate.py: {error}", file=sys.stderr)
        return 2 if cfg.records else 1
    _show(reports)
    if advice:
        print(f"\n{advice['recommendation']}")
    return 0 if any(report["verdict"] == "PASS" for report in reports.values()) else 3


if __name__ == "__main__":
    sys.exit(main())
