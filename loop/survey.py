"""A survey: a student answers once for all verifiers, each verifier answers and scores the student's candidates."""
from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval import load_task
from eval import score as exact_match
from loop.cached_model import CachedModel, CostedScore
from loop.lengths import TOO_LONG, answer_uses, fitting, verifier_uses, with_unasked
from loop.memory import enough_memory
from loop.survey_flags import SurveyConfig
from replay import Record, gather_records
from tasks import Item
from tasks.endings import check_can_write
from tasks.jsonl import check_replaceable
from tasks.splits import shared_pictures

Report = dict[str, Any]
# (records by verifier, what else is known of each) -> what is recommended, the report on each
Judge = Callable[[dict[str, list[Record]], Mapping[str, Report] | None], tuple[Report, dict[str, Report]]]
UNSCORED = CostedScore(None, "")                        # in place of a verdict that was never asked for


@dataclass(frozen=True)
class Surveyed:
    """What a verifier said of the student's candidates: a record each, with what both models answered themselves."""
    records: list[Record]
    parameters: int                                     # of the verifier
    too_long: int                                       # items that the student or the verifier has no room for


def survey(cfg: SurveyConfig, cache: Path, fresh: bool = False) -> dict[str, Surveyed]:
    """Each verifier's records, by its name. The student answers once for all of them.

    All models are found before one is asked, and one at a time is in memory. `cache` is the folder of what they
    answered before. With `fresh` as many other items are asked about; where there are fewer, nothing is asked.
    ValueError where no item has an answer, where a model is not there, and where an item is too long for one; with
    cfg.skip_long such an item has empty answers and no scores.
    """
    items = survey_items(cfg, fresh)
    if not items:
        return {}
    asked = fitting(items, answer_uses(cfg.student, cfg), cfg.skip_long)
    judged = {}                                         # what each verifier is asked about
    for name in cfg.verifier:
        judged[name] = fitting(asked, verifier_uses(name, cfg, cfg.verdict), cfg.skip_long)
    student = CachedModel(cfg.student, cfg, cache)
    verifiers = [CachedModel(name, cfg, cache) for name in cfg.verifier]
    check_can_write(cache, "--cache")

    greedy = with_unasked(items, asked, student.greedy(asked), TOO_LONG)
    samples = with_unasked(items, asked, student.samples(asked), [TOO_LONG] * cfg.k)
    student.forget()
    texts = {}
    for item, completions in zip(items, samples, strict=True):
        texts[item.id] = [completion.text for completion in completions]

    group = shared_pictures(items)
    surveyed = {}
    for verifier in verifiers:
        part = judged[verifier.name]
        own = with_unasked(items, part, verifier.greedy(part), TOO_LONG)
        scores, parameters = verifier.judge(part, [texts[item.id] for item in part])
        scores = with_unasked(items, part, scores, [UNSCORED] * cfg.k)
        verifier.forget()
        records = gather_records(
            items,
            greedy=lambda _: greedy,
            sample=lambda _: samples,
            score=lambda *_, scores=scores: scores,
            own=lambda _, own=own: own,
            correct=exact_match,
            group=lambda item: group.get(item.id),
        )
        surveyed[verifier.name] = Surveyed(records, parameters, too_long=len(items) - len(part))
    return surveyed


def survey_and_judge(cfg: SurveyConfig, out: Path, judge: Judge) -> tuple[Report, dict[str, Report]]:
    """Survey the verifiers and judge them; of several, the recommended one once more, on fresh items.

    The best of several looks better than it is on those items that it was the best of. `out` is the report's file,
    which must not be the data's. Returns what `judge` does.
    """
    check_replaceable(out, {"data": cfg.data}, flag="--out")
    cache = Path(cfg.cache or out.parent / "gate_cache")
    if len(cfg.verifier) > 1:
        check_fresh_lengths(cfg)

    with enough_memory(cfg):
        surveyed = survey(cfg, cache)
    records = {name: of.records for name, of in surveyed.items()}
    known = {name: {"parameters": of.parameters, "too_long": of.too_long} for name, of in surveyed.items()}
    advice, reports = judge(records, known)
    winner = advice["recommended"]
    if winner is None or len(reports) == 1:
        return advice, reports

    told = "It was not measured again: too few other items have an answer."
    with enough_memory(cfg):
        fresh = survey(replace(cfg, verifier=[winner]), cache, fresh=True)
    if fresh:
        _, again = judge({winner: fresh[winner].records}, None)
        report = again[winner]
        told = f"It was measured again on fresh items: {report['verdict']}, {'; '.join(report['reasons'])}."
        advice["again"] = report
        if report["verdict"] == "BLOCK":
            advice["recommended"] = None
    advice["recommendation"] += f" {told}"
    return advice, reports


def check_fresh_lengths(cfg: SurveyConfig) -> None:
    """ValueError where an item is too long that one of the verifiers may be asked about again.

    Found only then, it would end the program after all the asking, without a report.
    """
    if cfg.skip_long:
        return
    uses = answer_uses(cfg.student, cfg)
    for name in cfg.verifier:
        uses += verifier_uses(name, cfg, cfg.verdict)
    fitting(survey_items(cfg, fresh=True), uses, skip=False)


def survey_items(cfg: SurveyConfig, fresh: bool) -> list[Item]:
    """The items that are asked about: `cfg.items` of those with an answer, or, if `fresh`, as many of the others."""
    items = load_task(cfg.task, cfg.data, cfg.split)
    drawn = draw_items(items, cfg.items, cfg.seed)
    if fresh:
        seen = {item.id for item in drawn}
        others = [item for item in items if item.id not in seen]
        drawn = draw_items(others, cfg.items, cfg.seed)
        return drawn if len(drawn) == cfg.items else []
    if not drawn:
        raise ValueError(f"no item of {cfg.task} has an answer to measure against")
    return drawn


def draw_items(items: Iterable[Item], count: int, seed: int) -> list[Item]:
    """Up to `count` of the items that have an answer, drawn by the seed."""
    answered = [item for item in items if item.answer is not None]
    rng = random.Random(seed)
    return rng.sample(answered, min(count, len(answered)))
