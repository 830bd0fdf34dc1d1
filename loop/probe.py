"""The probe: between rounds, does the verifier still point the right way on what the student says by now?

The gate before training measures the verifier on the frozen student's candidates. Training moves the student to where
the verifier's scores are high, and there the verifier may be wrong: it is exploited. So before every round but the
first the student samples answers to --probe-items of the gate's items again (their answers are known, and they are
never trained on), the verifier scores them, and direction and form of the pairs are measured anew. Where they are shown
to have turned, that is a warning, and with --stop-on-regression the end of the run.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gate import ALPHA, MIN_DIRECTION, format_figure, forms, proportion
from loop.pilot import LoopSteps, Scored, draw_items
from loop.rounds import labelled_pairs
from loop.run import Run
from loop.state import State
from model import VLM
from replay import Pair, count_directions
from tasks import Item

DRAWS = 500                                             # added to a round's number: other samples than the round's


@dataclass(frozen=True)
class Probe:
    """What the pairs of the gate's items look like before a round."""
    round: int                                          # counted from 1
    items: int
    pairs: int
    direction: dict[str, Any]                           # q: of the mixed pairs, those that point the right way
    chosen_unread: int                                  # pairs with an answer in the rejected side alone
    rejected_unread: int                                # and in the chosen side alone
    p_form: float                                       # that the chosen side is not read less often

    @property
    def holds(self) -> bool:
        """Is it not shown that the pairs point the wrong way, or prefer answers without form?"""
        return self.direction["high"] >= MIN_DIRECTION and self.p_form > ALPHA

    @property
    def reason(self) -> str:
        """What was seen, in words."""
        q = self.direction
        return (f"before round {self.round} q is {format_figure(q)} on {q['n']} mixed pairs of {self.items} items of "
                f"the gate; an answer is found on the rejected side alone in {self.chosen_unread} of {self.pairs} "
                f"pairs, on the chosen side alone in {self.rejected_unread} (p = {self.p_form:.2g})")


def probe(run: Run, student: VLM, verifier: VLM, gate_items: Sequence[Item], state: State, loop: LoopSteps) -> None:
    """Measure before round `state.round` + 1, and add what was seen, and what it warns of, to `state`."""
    cfg = run.cfg
    number = state.round + 1
    items, _ = draw_items(gate_items, cfg.probe_items, cfg.seed)
    candidates = loop.sample(run, student, items, DRAWS + number)
    scored = Scored(items, candidates, loop.score(run, verifier, items, candidates))

    seen = measure_pairs(number, items, scored.pairs(cfg.least_margin))
    state.probes.append(asdict(seen))
    run.say(f"probe: {seen.reason}")
    if not seen.holds:
        warning = f"the verifier is exploited: {seen.reason}"
        state.warnings.append(warning)
        run.say(f"WARNING {warning}")


def measure_pairs(number: int, items: Sequence[Item], pairs: Sequence[Pair]) -> Probe:
    """Direction and form of the pairs before round `number`; each is of another item, and no two share a picture."""
    labelled = labelled_pairs(pairs, items)
    counts = count_directions(labelled, tau=0.0)
    form = forms(labelled)
    return Probe(
        round=number,
        items=len(items),
        pairs=len(pairs),
        direction=proportion(counts.right_way, counts.mixed),
        chosen_unread=form["chosen_unread"],
        rejected_unread=form["rejected_unread"],
        p_form=form["p_value"],
    )
