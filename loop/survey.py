"""A survey: a student answers once for all verifiers, each verifier answers and scores the student's candidates."""
from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from eval import load_task
from eval import score as exact_match
from loop.cached_model import CachedModel, CostedScore
from loop.candidates import LoggedCandidates, read_candidates
from loop.endpoint import is_served
from loop.lengths import TOO_LONG, answer_uses, fitting, verifier_uses, with_unasked
from loop.memory import enough_memory
from loop.sequential import measure_until_settled
from loop.served import FAILED
from loop.served_survey import ServedAnswers
from loop.survey_flags import SurveyConfig
from replay import Record, gather_records, select_pair
from tasks import Item
from tasks.endings import check_can_write
from tasks.jsonl import Response, check_replaceable
from tasks.splits import shared_pictures

Report = dict[str, Any]
AnyModel = CachedModel | ServedAnswers                  # loaded, or behind a server
UNSCORED = CostedScore(None, "")                        # in place of a verdict that was never asked for


class Decide(Protocol):
    """The flags of gate.py's decision."""

    @property
    def out(self) -> str:
        """The report's file."""

    @property
    def min_direction(self) -> float:
        """What q has to be shown to exceed."""


# (flags, records by verifier, what else was measured of each) -> what is recommended, the report on each
Judge = Callable[..., tuple[Report, dict[str, Report]]]
Shown = tuple[dict[str, list[Record]], list[Item]]      # each verifier's records, and the items that they are about


@dataclass(frozen=True)
class Surveyed:
    """What a verifier said of the student's candidates: a record each, with what both models answered themselves."""
    records: list[Record]
    measures: Report                                    # what is measured of the survey itself


@dataclass(frozen=True)
class Answered:
    """What the student said: by item id, so that any of the items can be picked. Logs hold no greedy answers."""
    greedy: dict[str, Response]
    samples: dict[str, list[Response]]
    group: dict[str, str]                               # items that share pictures -> a name for these

    def texts(self, item: Item) -> list[str]:
        """The candidates of an item."""
        return [completion.text for completion in self.samples[item.id]]

    def has_failed(self, item: Item) -> bool:
        """Whether the requests for its candidates failed, so that there is nothing to judge."""
        return FAILED in self.samples[item.id]


def survey(cfg: SurveyConfig, items: Sequence[Item], cache: Path, least: float = 0.5,
           logged: LoggedCandidates | None = None) -> dict[str, Surveyed]:
    """Each verifier's records, by its name. The student answers once for all of them, or has answered in logs.

    All models are found before one is asked, and one at a time is in memory. `cache` is the folder of what they
    answered before. `least`: of q, see loop/sequential.py. ValueError where a model is not there, and where an item is
    too long for one; with cfg.skip_long such an item has empty answers and no scores.
    """
    asked = items
    if logged is None:
        asked = fitting(items, answer_uses(cfg.student, cfg), cfg.skip_long)
    judged = {}                                         # what each verifier is asked about
    for name in cfg.verifier:
        uses = verifier_uses(name, cfg, cfg.verdict)
        judged[name] = fitting(asked, uses, cfg.skip_long, logged.texts if logged else None)
    student = None if logged else open_model(cfg.student, cfg, cache)
    verifiers = [open_model(name, cfg, cache) for name in cfg.verifier]
    check_can_write(cache, "--cache")

    if logged is None:
        answered = ask_student(cfg, student, items, asked)
    else:
        answered = Answered({}, logged.samples, shared_pictures(items))
    unanswered = {item.id for item in asked if answered.has_failed(item)}

    surveyed = {}
    for verifier in verifiers:
        too_long = len(items) - len(judged[verifier.name])
        part = [item for item in judged[verifier.name] if item.id not in unanswered]
        if cfg.sequential:
            found = survey_until_settled(cfg, verifier, items, part, answered, least)
        else:
            found = survey_all(cfg, verifier, items, part, answered)
        verifier.forget()
        failed = verifier.failed_requests + (student.failed_requests if student else 0)
        measures = found.measures | {"too_long": too_long, "failed_requests": failed}
        surveyed[verifier.name] = replace(found, measures=measures)
    return surveyed


def open_model(name: str, cfg: SurveyConfig, cache: Path) -> AnyModel:
    """A model that is asked: loaded from its folder, or behind a server."""
    return ServedAnswers(name, cfg, cache) if is_served(name) else CachedModel(name, cfg, cache)


def ask_student(cfg: SurveyConfig, student: AnyModel, items: Sequence[Item], asked: Sequence[Item]) -> Answered:
    """The student's greedy answers and candidates; those of items that are not in `asked` are empty."""
    ids = [item.id for item in items]
    greedy = with_unasked(items, asked, student.greedy(asked), TOO_LONG)
    samples = with_unasked(items, asked, student.samples(asked), [TOO_LONG] * cfg.k)
    student.forget()
    return Answered(
        greedy=dict(zip(ids, greedy, strict=True)),
        samples=dict(zip(ids, samples, strict=True)),
        group=shared_pictures(items))


def survey_all(cfg: SurveyConfig, verifier: AnyModel, items: Sequence[Item], part: Sequence[Item],
               answered: Answered) -> Surveyed:
    """One verifier on all of the items; it is not asked about those that are not in `part`."""
    if not part:
        raise ValueError("no candidate is there to be judged: every request to the student failed")
    own = verifier.greedy(part)
    scores, parameters = verifier.judge(part, [answered.texts(item) for item in part])
    return Surveyed(make_records(items, part, answered, own, scores), {"parameters": parameters})


def survey_until_settled(cfg: SurveyConfig, verifier: AnyModel, items: Sequence[Item], part: Sequence[Item],
                         answered: Answered, least: float) -> Surveyed:
    """One verifier on the first `fixed_items`, and on others until its direction is settled: see loop/sequential.py.

    The records are those of the first items: all but the direction is measured on these alone, at a number of items
    that does not depend on what was seen. Of the others only those are scored whose pair can be mixed.
    """
    first = items[:cfg.fixed_items]
    fits = {item.id for item in part}
    first_part = [item for item in first if item.id in fits]
    others = [item for item in part if item not in first and has_mixed_candidates(item, answered.texts(item))]

    def score(batch: Sequence[Item]) -> list[list[CostedScore]]:
        if not batch:
            return []
        scores, measures["parameters"] = verifier.judge(batch, [answered.texts(item) for item in batch])
        return scores

    def outcome(item: Item, scores: Sequence[CostedScore]) -> tuple[str, bool] | None:
        texts = answered.texts(item)
        pair = select_pair(item.id, texts, [score.value for score in scores])
        if isinstance(pair, str):
            return None
        chosen_right, rejected_right = (exact_match(item, texts[index]).correct for index in pair)
        return (answered.group.get(item.id, item.id), chosen_right) if chosen_right != rejected_right else None

    measures: Report = {}
    scores, result = measure_until_settled(
        [*first_part, *others], score, outcome, len(first_part), cfg.batch_size, least, cfg.useful_direction)
    own = verifier.greedy(first_part)
    records = make_records(first, first_part, answered, own, scores[:len(first_part)])
    told = {"outcome": result.outcome, "items": result.items, "fixed_items": len(first)}
    return Surveyed(records, {**measures, "direction": result.direction, "sequential": told})


def has_mixed_candidates(item: Item, texts: Iterable[str]) -> bool:
    """Whether some candidates are right and some wrong, so that the item's pair can be mixed."""
    return len({exact_match(item, text).correct for text in texts}) == 2


def make_records(items: Sequence[Item], part: Sequence[Item], answered: Answered,
                 own: Sequence[Response], scores: Sequence[list[CostedScore]]) -> list[Record]:
    """The records of the items; a verifier's own answers and scores are those of the items in `part`."""
    all_own = with_unasked(items, part, own, TOO_LONG)
    given = dict(zip((item.id for item in part), scores, strict=True))
    all_scores = [given.get(item.id) or [UNSCORED] * len(answered.samples[item.id]) for item in items]
    return gather_records(
        items,
        greedy=lambda items: [answered.greedy.get(item.id) for item in items],
        sample=lambda items: [answered.samples[item.id] for item in items],
        score=lambda items, texts: all_scores,
        own=lambda items: all_own,
        correct=exact_match,
        group=lambda item: answered.group.get(item.id),
    )


def survey_and_judge(cfg: SurveyConfig, decide: Decide, judge: Judge) -> tuple[Report, dict[str, Report], Shown]:
    """Survey the verifiers and judge them; of several, the recommended one once more, on fresh items.

    The best of several looks better than it is on those items that it was the best of. `decide` are the flags of the
    decision; its report must not replace the data. Returns what `judge` does, and what its page is to show.
    """
    out = Path(decide.out)
    check_replaceable(out, {"data": cfg.data}, flag="--out")
    for path in cfg.candidates:
        check_replaceable(out, {"candidates": path}, flag="--out")
    cache = Path(cfg.cache or out.parent / "gate_cache")
    of_task = load_task(cfg.task, cfg.data, cfg.split)
    logged = read_candidates(cfg.candidates, of_task) if cfg.candidates else None
    items, fresh_items = draw_twice(logged.items if logged else of_task, cfg)
    if len(cfg.verifier) > 1 and fresh_items and not cfg.skip_long:
        check_lengths(cfg, fresh_items, logged)         # now: later it would end all the asking without a report

    with enough_memory(cfg):
        surveyed = survey(cfg, items, cache, decide.min_direction, logged)
    records = {name: of.records for name, of in surveyed.items()}
    advice, reports = judge(decide, records, {name: of.measures for name, of in surveyed.items()})
    for report in reports.values():
        if logged:
            report["reasons"].append(logged.told())
        if report["failed_requests"]:
            report["reasons"].append(
                f"{report['failed_requests']} requests to served models failed for good: what they asked for is "
                "missing, and counts as wrong or as disagreement; the same command asks for it again")
        if cfg.sequential:
            told = report["sequential"]
            report["reasons"].append(
                f"sequential: {told['outcome']} after {told['items']} of {cfg.items} items; all but the direction is "
                f"measured on {told['fixed_items']}")
    winner = advice["recommended"]
    shown = (records, items)
    if winner is None or len(reports) == 1:
        return advice, reports, shown

    told = "It was not measured again: too few other items have an answer."
    if fresh_items:
        with enough_memory(cfg):
            fresh = survey(replace(cfg, verifier=[winner]), fresh_items, cache, logged=logged)
        _, again = judge(decide, {winner: fresh[winner].records}, None)
        report = again[winner]
        told = f"It was measured again on fresh items: {report['verdict']}, {'; '.join(report['reasons'])}."
        advice["again"] = report
        if report["verdict"] == "BLOCK":
            advice["recommended"] = None
    advice["recommendation"] += f" {told}"
    return advice, reports, shown


def check_lengths(cfg: SurveyConfig, items: Sequence[Item], logged: LoggedCandidates | None) -> None:
    """ValueError where an item is too long for the student or for one of the verifiers."""
    uses = [] if logged else answer_uses(cfg.student, cfg)
    for name in cfg.verifier:
        uses += verifier_uses(name, cfg, cfg.verdict)
    fitting(items, uses, False, logged.texts if logged else None)


def draw_twice(items: Sequence[Item], cfg: SurveyConfig) -> tuple[list[Item], list[Item]]:
    """The items that are asked about, `cfg.items` of those with an answer; as many others for a second look, none where
    there are fewer. ValueError where no item has an answer."""
    drawn = draw_items(items, cfg.items, cfg.seed)
    if not drawn:
        raise ValueError(f"no item of {cfg.task} has an answer to measure against")
    seen = {item.id for item in drawn}
    others = draw_items([item for item in items if item.id not in seen], cfg.items, cfg.seed)
    return drawn, others if len(others) == cfg.items else []


def draw_items(items: Iterable[Item], count: int, seed: int) -> list[Item]:
    """Up to `count` of the items that have an answer, drawn by the seed."""
    answered = [item for item in items if item.answer is not None]
    rng = random.Random(seed)
    return rng.sample(answered, min(count, len(answered)))
