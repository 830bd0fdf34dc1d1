"""The flags of train.py that are about what is measured: the gates, the watch split, the pilot and the probes."""
from __future__ import annotations

from dataclasses import dataclass

from loop.flags import TrainingFlags
from tasks.flags import flag


@dataclass(frozen=True)
class GateFlags(TrainingFlags):
    """How the verifier is measured before training, and the student in its course and after it."""
    # Gates and splits
    force: bool = flag(False, "train even if the gate says BLOCK")
    gate_items: int = flag(200, "items the verifier is measured on before training", low=1)
    gate_rule: str = flag("ours", "paper: the published rule alone", choices=("ours", "paper"))
    watch_items: int = flag(200, "items of the curve that the loss hides", low=1)
    held_out_items: int = flag(500, "items evaluated once, at the end", low=1)
    trained_on_items: int = flag(200, "items of round 1 that are asked again at the end", low=0)
    min_low: float = flag(-0.02, "promote above this lower end of the gain", low=-1, high=1)
    require_gain: bool = flag(False, "promote only if a gain of 0 is excluded, too")
    pilot_steps: int = flag(20, "steps of a trial before round 1, undone again (0: none)", low=0)
    pilot_items: int = flag(200, "items of the train split that are answered around it", low=1)
    probe_items: int = flag(0, "of the gate's items, measured again before each round (0: none)", low=0)
    stop_on_regression: bool | None = flag(None, "stop (exit 3) once watched accuracy fell significantly (default: "
                                                 "unless --force)")

    @property
    def stops_on_regression(self) -> bool:
        """--stop-on-regression; where nothing is said, on unless the run is forced."""
        return not self.force if self.stop_on_regression is None else self.stop_on_regression
