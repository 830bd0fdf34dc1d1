"""The gates around training, with the models at hand: the verifier before it, the student after it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from eval import score as exact_match
from gate import Decision, Measures, decide_before, gate_after, measure
from loop.asking import greedy_answers, greedy_completions
from loop.card import write_student_card
from loop.loading import frozen
from loop.pilot import LoopSteps, Scored, run_pilot
from loop.run import Run
from loop.served import Asked
from loop.side_by_side import compare_answers
from loop.state import State
from model import VLM, load_vlm
from replay import gather_records, select_pair
from tasks import Item
from tasks.splits import Splits, shared_pictures

# ---- before training

def gate_before(run: Run, student: VLM, verifier: Asked, splits: Splits, loop: LoopSteps) -> dict[str, Any]:
    """Measure the verifier on the target task; returns verdict, reasons, measures, and what the pilot saw.

    The records are kept in the run's folder, where `gate.py --records` reads them again. The pilot is run where all
    else passes, or with --force, and only by our rule.
    """
    cfg = run.cfg
    scored = score_items(run, student, verifier, splits.gate, loop)
    records = make_records(run, student, verifier, scored)
    run.write_lines("gate_records.jsonl", records)

    measures = measure(records, select_pair, cfg.min_margin)
    decision = decide(measures, cfg.gate_rule, cfg.least_margin)
    published = decide_before(measures, "paper")
    verdict = decision.verdict
    reasons = list(decision.reasons)

    pilot = None
    if cfg.gate_rule == "ours" and (verdict == "PASS" or cfg.force):
        if cfg.pilot_steps:
            pilot = run_pilot(run, student, verifier, splits, scored, loop)
            verdict, reasons = with_pilot(decision, pilot.holds, pilot.reason)
        else:
            verdict, reasons = with_pilot(decision, True, "no pilot was run (--pilot-steps 0)")

    run.say_all(f"gate before training: {verdict}", reasons)
    return {"verdict": verdict, "reasons": reasons, "published_verdict": published.verdict, **measures,
            "pilot": asdict(pilot) if pilot else None}


def score_items(run: Run, student: VLM, verifier: Asked, items: Sequence[Item], loop: LoopSteps) -> Scored:
    """The student's candidates for each item, as round 0, and the verifier's scores of them."""
    candidates = loop.sample(run, student, items, 0)
    return Scored(list(items), candidates, loop.score(run, verifier, items, candidates))


def make_records(run: Run, student: VLM, verifier: Asked, scored: Scored) -> list[Any]:
    """A record for each candidate, with what student and verifier answer themselves. Pictures that items share make
    them one group."""
    group = shared_pictures(scored.items)
    return gather_records(
        scored.items,
        greedy=lambda items: greedy_completions(run, student, items, "gate: student"),
        sample=lambda items: scored.candidates,
        score=lambda items, texts: scored.scores,
        own=lambda items: greedy_completions(run, verifier, items, "gate: verifier"),
        correct=exact_match,
        group=lambda item: group.get(item.id),
    )


def decide(measures: Measures, rule: str, least_margin: float) -> Decision:
    """The decision by q over the pairs that would be trained on: those of `least_margin` or more."""
    if least_margin == 0 or rule == "paper":
        return decide_before(measures, rule)
    decision = decide_before(measures | {"direction": measures["direction_at_margin"]}, rule)
    decision.reasons.append(f"here q is that of a margin of at least {least_margin:g}: no other pair would be trained "
                            "on (--margin-gates)")
    return decision


def with_pilot(decision: Decision, holds: bool, reason: str) -> tuple[str, list[str]]:
    """Verdict and reasons with the pilot's word: a refusal names all that failed, a PASS all that was seen."""
    if decision.verdict == "PASS":
        return ("PASS", [*decision.reasons, reason]) if holds else ("BLOCK", [reason])
    return "BLOCK", decision.reasons if holds else [*decision.reasons, reason]


# ---- after training

def deploy_gate(run: Run, student: VLM, verifier: Asked, splits: Splits, reviewed: Sequence[Item],
                state: State) -> dict[str, Any]:
    """Compare the student as it would be deployed with its frozen self; deploy it on PROMOTE, with a model card.

    It is saved first, in the dtype of the files it came from, and what was saved is evaluated.
    """
    held_out = splits.held_out
    candidate = run.save_candidate(student)
    deployed = frozen(load_vlm(candidate, run.ranks.device, student.dtype), run.cfg)

    trained = greedy_answers(run, deployed, held_out, "trained, held out")
    decision = gate_after(
        [answer.correct for answer in state.frozen_held_out],
        [answer.correct for answer in trained],
        trained=state.step > 0,
        min_low=run.cfg.min_low,
        require_gain=run.cfg.require_gain,
        clusters=picture_clusters(held_out),
    )
    seen = greedy_answers(run, deployed, reviewed, "trained, trained on")
    explanation = compare_answers(
        run, verifier,
        held_out=(held_out, (state.frozen_held_out, trained)),
        trained_on=(reviewed, (state.frozen_reviewed, seen)),
        verdict=run.cfg.verdict,
    )
    why = explanation.pop("reasons")
    reasons = decision.reasons + why if decision.verdict == "REJECT" else decision.reasons
    report = {"verdict": decision.verdict, "reasons": reasons, **decision.measures, **explanation}

    promoted = decision.verdict == "PROMOTE"
    if promoted and run.ranks.first:
        write_student_card(candidate, run.cfg, run.folder, run.ranks.world, splits.all_items, state.pre_gate, report)
    run.deploy_or_discard(candidate, keep=promoted)
    return report


def picture_clusters(items: Sequence[Item]) -> list[str] | None:
    """Of each item a name that it shares with those that show the same pictures; None where no two do."""
    group = shared_pictures(items)
    if not group:
        return None
    return [group.get(item.id, item.id) for item in items]
