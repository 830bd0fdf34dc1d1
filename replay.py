"""Scored candidates, preference pairs, and the margin-gated replay buffer.

    record    a scored candidate of a labelled item, as the gates read it (class Record)
    pair      chosen = argmax score, rejected = argmin score, among the K candidates of an item
    margin    m = s_top - s_bottom
    gate      a pair enters the buffer iff m >= tau (`min_margin`); when it is full, the oldest
              pairs leave first
    step      a batch is a share 1 - rho of fresh pairs and a share rho (`ratio`) drawn from the
              buffer

"When Good Verifiers Go Bad" (arXiv 2606.14629) says that only pairs with a high margin enter the
replay buffer. Threshold, capacity, ratio and eviction are not published; they are ours. Nothing
here that trains reads a label; records and what is counted of them are for the gate and the log.

What does the margin gate do to the update? The paper announces a theorem on variance, whose text
is not known to us, so this is ours. Take a pair with exactly one right side. Let m be its margin,
g its gradient in the right direction, and d = +1 if the chosen side is the right one, else d = -1.
The pair contributes d g. Let q(m) = P(d = +1 | m), q = q(tau) = P(d = +1 | m >= tau), and
g(m) = E[g | m].

    mean       E[d g | m >= tau] = E[(2 q(m) - 1) g(m) | m >= tau]             (1)
               if d and g are independent given m; and
               E[d g | m >= tau] = (2 q - 1) E[g | m >= tau]                   (2)
               if d and g are uncorrelated given m >= tau
    variance   Var(d g) = 4 q (1 - q) g^2                                      (3)
               of one pair with fixed g; the mean of n(tau) independent pairs has 1 / n(tau) of it

Proof. E[d | m] = 2 q(m) - 1; its product with g(m), averaged over m, is (1). Given m >= tau,
E[d g] = E[d] E[g] + Cov(d, g), and without the covariance this is (2). Since d^2 = 1,
Var(d) = 1 - (2 q - 1)^2 = 4 q (1 - q), which is (3).

Independence at each m is not enough for (2): where q(m) and g(m) change together, d and g are
correlated over all m >= tau, and even the sign of (2) can be wrong.

So a margin gate that moves q away from 1/2, up or down, makes a pair's contribution steadier. But
the sign of the update is that of q - 1/2: tau can make a wrong update steadily wrong. And the mean
of a batch may vary more than without tau, because fewer pairs are left.

Standard library only.
"""
from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict

REFUSALS = ("unparsed", "tie", "same_text")     # why an item gives no pair, in order of the checks
# Keys of a record that are true or false, of a candidate, and of an item in all of its records.
CANDIDATE_KEYS = ("truncated", "candidate_parsed", "candidate_truncated")
ITEM_KEYS = ("greedy_correct", "greedy_parsed", "greedy_truncated", "own_correct", "own_parsed",
             "own_truncated")
Call = Callable[..., Any]


@dataclass(frozen=True)
class Pair:
    """A preference pair. Token ids are those that were sampled, the stop token included.

    `reference_*_logp` are the reference model's summed log-probabilities in nats, None until they
    are computed, and `reference_key` names what they were computed from. `row_tokens` counts the
    tokens of the pair's packed row, pictures included. A pair that no verifier has scored has None
    for its scores, a margin of 0, and is never replayed.
    """
    item_id: str
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    chosen_score: float | None
    rejected_score: float | None
    chosen_text: str = ""
    rejected_text: str = ""
    reference_chosen_logp: float | None = None
    reference_rejected_logp: float | None = None
    reference_key: str = ""
    row_tokens: int = 0

    @property
    def margin(self) -> float:
        if self.chosen_score is None or self.rejected_score is None:
            return 0.0
        return margin(self.chosen_score, self.rejected_score)


def margin(top: float, bottom: float) -> float:
    """s_top - s_bottom, as decimals give it: 0.7 - 0.2 is 0.5, which in binary it is not quite."""
    return round(top - bottom, 9)


def select_pair(
    item_id: str, texts: Sequence[str], scores: Sequence[float | None]
) -> tuple[int, int] | str:
    """Indices (top, bottom) of the best- and the worst-scored candidate of an item.

    If the item gives no pair, the reason instead, one of REFUSALS: fewer than two scores could be
    read, all are equal, or both candidates say the same. Scores are in [0, 1]; None stands for one
    that could not be read, and is never paired. Among several best (or worst) candidates a stable
    hash decides, so that neither their order nor the machine does.
    """
    texts = [text.strip() for text in texts]
    known = {index: score for index, score in enumerate(scores) if score is not None}
    if len(known) < 2:
        return "unparsed"
    best = max(known.values())
    worst = min(known.values())
    if best == worst:
        return "tie"

    tops = [index for index, score in known.items() if score == best]
    bottoms = [index for index, score in known.items() if score == worst]
    top = min(tops, key=lambda index: _draw(item_id, texts, index))
    bottom = min(bottoms, key=lambda index: _draw(item_id, texts, index))
    if texts[top] == texts[bottom]:
        return "same_text"
    return top, bottom


def _draw(item_id: str, texts: Sequence[str], index: int) -> bytes:
    """A candidate's lot: the hash of its item, its text, and how often that text came before it."""
    text = texts[index]
    occurrence = texts[:index].count(text)
    key = repr((item_id, text, occurrence))
    return hashlib.sha256(key.encode()).digest()


def form_pairs(
    item_ids: Sequence[str], candidates: Sequence[Sequence[Any]], scores: Sequence[Sequence[Any]]
) -> tuple[list[Pair], dict[str, int]]:
    """The pair of every item that gives one, and how many items gave none, by reason.

    A candidate has `.token_ids` and `.text`. A score has `.value`, a number in [0, 1], or None
    where none could be read.
    """
    pairs = []
    refused = dict.fromkeys(REFUSALS, 0)
    for item_id, row, verdicts in zip(item_ids, candidates, scores, strict=True):
        texts = [candidate.text for candidate in row]
        values = [verdict.value for verdict in verdicts]
        outcome = select_pair(item_id, texts, values)
        if isinstance(outcome, str):
            refused[outcome] += 1
            continue

        top, bottom = outcome
        pairs.append(Pair(
            item_id=item_id,
            chosen=row[top].token_ids,
            rejected=row[bottom].token_ids,
            chosen_score=values[top],
            rejected_score=values[bottom],
            chosen_text=row[top].text,
            rejected_text=row[bottom].text,
        ))
    return pairs, refused


# ---- records: what the gates read, and whoever has a verifier can write

class Record(TypedDict, total=False):
    """A candidate that a verifier has scored. Keys from `text` on may be null or absent."""
    item: Required[str]                             # id of the question
    correct: Required[bool]                         # exact match with the known answer
    score: Required[float | None]                   # in [0, 1], null where none could be read
    group: str | None                               # what several items share, say a picture
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
                   correct: Call, group: Call | None = None) -> list[Record]:
    """Ask student and verifier about `items` (each has an `.id`); returns one record a candidate.

    `greedy(items)`, `own(items)`: the student's, the verifier's greedy completions (.text and
    .finish_reason, which may be None), None for each that there is not; `sample(items)`: the
    student's candidates; `score(items, texts)`: verdicts (.value, .truncated; optional: .seconds,
    .tokens); `correct(item, text)`: .correct and .answer; `group(item)`: a name of what it shares
    with other items, or None.
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
            for cost in ("seconds", "tokens"):
                if getattr(verdict, cost, None) is not None:
                    record[cost] = getattr(verdict, cost)
            if group is not None and group(item) is not None:
                record["group"] = group(item)
            records.append(record)
    return records


def _grade(item: Any, completion: Any, whose: str, correct: Call) -> dict[str, bool | None]:
    """The three keys of a record that are about a completion; none where there is no completion."""
    if completion is None:
        return {}
    match = correct(item, completion.text)
    reason = completion.finish_reason
    return {f"{whose}_correct": bool(match.correct), f"{whose}_parsed": match.answer is not None,
            f"{whose}_truncated": None if reason is None else reason == "length"}


def read_records(path: str | Path) -> list[Record]:
    """The records of a JSON Lines file; whatever is wrong is a ValueError that names the line."""
    try:
        lines = Path(path).read_bytes().rstrip().split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode("utf-8-sig").strip() or "null")
            check_record(record)
        except (ValueError, RecursionError) as error:       # of json and of the decoder, too
            raise ValueError(f"{path}, line {number}: {getattr(error, 'msg', error)}") from None
        records.append(record)
    try:
        check_agreement(records)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    return records


def check_agreement(records: Iterable[Mapping[str, Any]]) -> None:
    """ValueError where two records contradict each other: in what is the same in all records of an
    item, or in whether one text answers it."""
    first_seen: dict[tuple[str, ...], tuple[Any, int]] = {}    # what it is about -> value, number
    for number, record in enumerate(records, 1):
        said: dict[tuple[str, ...], Any] = {("group",): record.get("group")}
        said |= {(key,): record.get(key) for key in ITEM_KEYS}
        if record.get("text") is not None:
            said["correct", record["text"]] = record["correct"]
        for about, value in said.items():
            seen, first = first_seen.setdefault((record["item"], *about), (value, number))
            if value != seen:
                raise ValueError(f'line {number}: "{about[0]}" of {record["item"]!r:.80} is not '
                                 f"what line {first} says")


def check_record(record: Any) -> None:
    """ValueError that says what is wrong with a record."""
    if not isinstance(record, dict) or not {"item", "correct", "score"} <= record.keys():
        raise ValueError(f"a record is an object with item, correct and score, not {record!r:.80}")

    for key in ("item", "correct", "group", "text", *CANDIDATE_KEYS, *ITEM_KEYS):
        value = record.get(key)
        if value is None and key not in ("item", "correct"):
            continue
        is_text = key in ("item", "group", "text")
        kind, words = (str, "a string") if is_text else (bool, "true or false")
        if not isinstance(value, kind):
            raise ValueError(f'"{key}" must be {words}, not {value!r}')
    for key, most in (("score", 1), ("seconds", 1e15), ("tokens", 1e15)):   # 1e15: sums stay finite
        value = record.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value <= most):    # NaN compares false
            raise ValueError(f'"{key}" must be a number in [0, {most:g}] or null, not {value!r}')


def check_same_candidates(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """ValueError unless all verifiers have scored the same candidates of the same items."""
    counts = {}
    for name, rows in records.items():
        counts[name] = Counter((row["item"], row.get("text"), row["correct"]) for row in rows)
    first, *others = counts
    for other in others:
        for item, _, _ in (counts[first] - counts[other]) | (counts[other] - counts[first]):
            raise ValueError(f"{first} and {other} hold different candidates of item {item!r}")


# ---- which way the pairs point: for the gate and the log, which know labels

@dataclass(frozen=True)
class LabelledPair:
    """The pair of an item, with the records of its two sides; "correct" must be among the keys."""
    item_id: str
    margin: float
    chosen: Mapping[str, Any]
    rejected: Mapping[str, Any]

    @property
    def is_mixed(self) -> bool:
        """Is exactly one side right?"""
        return bool(self.chosen["correct"] != self.rejected["correct"])

    @property
    def is_right_way(self) -> bool:
        """Is it mixed, with the chosen side right? (d = +1)"""
        return self.is_mixed and bool(self.chosen["correct"])


@dataclass(frozen=True)
class Directions:
    """How many pairs have a margin of at least tau; right_way / mixed estimates q(tau)."""
    pairs: int
    mixed: int                                  # exactly one side is right
    right_way: int                              # mixed, with the chosen side right: d = +1


@dataclass(frozen=True)
class Form:
    """What the two sides of pairs look like; needs no label. None: not known of any pair."""
    pairs: int                                  # where it is known if an answer is found in a side
    chosen_unread: int                          # of these, one is found in the rejected side alone
    rejected_unread: int                        # in the chosen side alone
    chosen_length: float | None                 # mean number of characters
    rejected_length: float | None
    chosen_truncated: float | None              # share of the candidates that were cut off
    rejected_truncated: float | None


def label_pairs(
    records: Mapping[str, Sequence[Any]], pair_rule: Callable[..., tuple[int, int] | str]
) -> list[LabelledPair]:
    """The pair of every item that gives one by `pair_rule`, which is called as `select_pair` is.

    `records` holds each item's candidates: mappings with "score", "correct" and, if known, "text".
    A candidate without a text is like no other.
    """
    pairs = []
    for item_id, candidates in records.items():
        texts = []
        for number, candidate in enumerate(candidates):
            text = candidate.get("text")
            texts.append(str(number) if text is None else text)
        scores = [candidate["score"] for candidate in candidates]
        outcome = pair_rule(item_id, texts, scores)
        if isinstance(outcome, str):
            continue

        top, bottom = outcome
        pair_margin = margin(scores[top], scores[bottom])
        pairs.append(LabelledPair(item_id, pair_margin, candidates[top], candidates[bottom]))
    return pairs


def count_directions(pairs: Iterable[LabelledPair], tau: float) -> Directions:
    """Count the pairs whose margin is at least tau. Nothing that trains may depend on it."""
    reaching = [pair for pair in pairs if pair.margin >= tau]
    mixed = sum(pair.is_mixed for pair in reaching)
    right_way = sum(pair.is_right_way for pair in reaching)
    return Directions(len(reaching), mixed, right_way)


def count_form(pairs: Iterable[LabelledPair]) -> Form:
    """Compare the form of both sides: a verifier that prefers answers without any trains the
    student to give such."""
    known = 0
    unread = {"chosen": 0, "rejected": 0}       # the only side without an answer
    lengths: dict[str, list[int]] = {"chosen": [], "rejected": []}
    cut: dict[str, list[bool]] = {"chosen": [], "rejected": []}
    for pair in pairs:
        sides = {"chosen": pair.chosen, "rejected": pair.rejected}
        read = {side: record.get("candidate_parsed") for side, record in sides.items()}
        if None not in read.values():
            known += 1
            if read["chosen"] != read["rejected"]:
                unread["rejected" if read["chosen"] else "chosen"] += 1
        for side, record in sides.items():
            if record.get("text") is not None:
                lengths[side].append(len(record["text"]))
            if record.get("candidate_truncated") is not None:
                cut[side].append(record["candidate_truncated"])
    return Form(known, unread["chosen"], unread["rejected"],
                _mean(lengths["chosen"]), _mean(lengths["rejected"]),
                _mean(cut["chosen"]), _mean(cut["rejected"]))


def _mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None


# ---- the buffer

class ReplayBuffer:
    """First in, first out: at most `capacity` pairs, each of a margin of at least `min_margin`."""

    def __init__(self, capacity: int, min_margin: float):
        if capacity < 1:
            raise ValueError(f"replay capacity must be at least 1, not {capacity}")
        if not 0.0 <= min_margin <= 1.0:        # NaN compares false
            raise ValueError(f"min_margin must lie in [0, 1], not {min_margin}")
        self.min_margin = min_margin
        self.pairs: deque[Pair] = deque(maxlen=capacity)

    def add(self, pairs: Iterable[Pair]) -> int:
        """Admit the scored pairs whose margin reaches the gate; returns how many did."""
        scored = [pair for pair in pairs if pair.chosen_score is not None]
        admitted = [pair for pair in scored if pair.margin >= self.min_margin]
        self.pairs.extend(admitted)
        return len(admitted)

    def batches(
        self, fresh: Sequence[Pair], batch_size: int, ratio: float, epochs: int, max_steps: int,
        seed: int
    ) -> list[list[Pair]]:
        """The batches of a round: `epochs` passes over the fresh pairs, with replayed ones added.

        Of a batch, round(ratio * batch_size) pairs are drawn from the buffer: none twice, and none
        that is in the batch as a fresh one. The rest are fresh, shuffled anew in every epoch. At
        least one pair is fresh. There are at most `max_steps` batches. They depend on the
        arguments and the buffer alone, so a run that is resumed draws the same ones again.
        """
        if not 0.0 <= ratio < 1.0:
            raise ValueError(f"the replay ratio must lie in [0, 1), not {ratio}")
        buffered = list(self.pairs)
        replayed_size = round(ratio * batch_size)
        replayed_size = min(replayed_size, batch_size - 1, len(buffered))
        fresh_size = batch_size - replayed_size

        rng = random.Random(seed)
        order: list[Pair] = []
        for _ in range(epochs):
            order += rng.sample(list(fresh), len(fresh))
        end = min(len(order), max_steps * fresh_size)

        batches = []
        for start in range(0, end, fresh_size):
            batch = order[start:start + fresh_size]
            in_batch = set(batch)
            others = [pair for pair in buffered if pair not in in_batch]
            distinct = list(dict.fromkeys(others))      # an item may have come round again
            count = min(replayed_size, len(distinct))
            replayed = rng.sample(distinct, count)
            batches.append(batch + replayed)
        return batches
