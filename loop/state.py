"""Where a run of train.py is: its state, and the checkpoints that hold it."""
from __future__ import annotations

from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch

from eval import Answer
from gate import Figure, proportion
from loop.optimise import load_training_state, training_state
from loop.run import Run, state_fields
from loop.saved import as_mapping, check_tokens, check_training_state, read_value, rebuild
from model import VLM
from replay import Pair, ReplayBuffer

FINAL_STEPS = 10                                        # the loss "at the end" is the mean of this many steps


@dataclass
class State:
    """All that a checkpoint holds, with the trained weights, the optimiser's state and the replay buffer."""
    step: int = 0                                       # steps that are done
    round: int = 0                                      # rounds that are done
    position: int = 0                                   # steps of the current round that are done
    fresh: list[Pair] | None = None                     # the current round's pairs, None until they are made
    pre_gate: dict[str, Any] | None = None              # the report of the gate before training
    frozen_held_out: list[Answer] | None = None         # the frozen student's answers to the held-out split,
    frozen_reviewed: list[Answer] | None = None         # and to items of round 1, which are asked about again
    frozen_watched: list[bool] = field(default_factory=list)    # which watched items the frozen student gets right
    losses: list[float] = field(default_factory=list)   # of every step
    rounds: list[dict[str, Any]] = field(default_factory=list)      # counts and directions of every round's pairs
    probes: list[dict[str, Any]] = field(default_factory=list)      # see loop/probe.py
    looks: int = 0                                      # evaluations on the watch split since the first step
    warnings: list[str] = field(default_factory=list)   # of watched accuracy that fell, of probes

    @property
    def loss_first(self) -> float | None:
        """The first step's loss; None before it."""
        return self.losses[0] if self.losses else None

    @property
    def loss_last(self) -> float | None:
        """The mean loss of the last FINAL_STEPS steps; None before the first step."""
        return mean(self.losses[-FINAL_STEPS:]) if self.losses else None

    @property
    def regression(self) -> dict[str, Any]:
        """The outcome of a run that --stop-on-regression ended."""
        return {"verdict": "REJECT", "reasons": self.warnings}

    @property
    def baseline_accuracy(self) -> Figure | None:
        """The frozen student's accuracy on the held-out split, with its interval; None if it was not asked."""
        if not self.frozen_held_out:
            return None
        right = sum(answer.correct for answer in self.frozen_held_out)
        return proportion(right, len(self.frozen_held_out))

    def summary(self, task: str | None, post_gate: dict[str, Any] | None) -> dict[str, Any]:
        """What summary.json holds; figures that were not reached are None."""
        return {
            "task": task,
            "pre_gate": self.pre_gate,
            "post_gate": post_gate,
            "baseline_accuracy": self.baseline_accuracy,
            "final_accuracy": post_gate.get("final_accuracy") if post_gate else None,
            "loss_first": self.loss_first,
            "loss_last": self.loss_last,
            "steps": self.step,
            "rounds": self.rounds,
            "probes": self.probes,
            "warnings": self.warnings,
        }


def save(run: Run, state: State, student: VLM, optimiser: torch.optim.Optimizer, replay: ReplayBuffer) -> None:
    """Write a checkpoint, named by the step and by the number of rounds whose pairs are made."""
    fields = state_fields(state)
    fields["buffer"] = [vars(pair) for pair in replay.pairs]
    name = f"step-{state.step:06d}-{len(state.rounds):03d}"
    run.save(name, {"step": state.step, "state": fields, **training_state(student, optimiser)})


def restore(run: Run, student: VLM, optimiser: torch.optim.Optimizer, replay: ReplayBuffer) -> State:
    """The newest checkpoint's state, its weights, optimiser and buffer put in place; a new state if there is none."""
    def check(saved: dict[str, Any]) -> None:
        check_training_state(student, optimiser, saved)
        state, buffer = read_fields(saved)
        pairs = [*buffer, *(state.fresh or [])]
        check_tokens(student, [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], "state")

    saved = run.load(check)
    if saved is None:
        return State()
    load_training_state(student, optimiser, saved)
    state, buffer = read_fields(saved)
    replay.pairs.extend(buffer)
    run.say(f"resumed at step {state.step}")
    return state


def read_fields(saved: dict[str, Any]) -> tuple[State, list[Pair]]:
    """The state and the replay buffer of a checkpoint; ValueError where they are not such."""
    fields = dict(as_mapping(saved, "state"))
    buffer = read_value(fields.pop("buffer", None), list[Pair], "state.buffer")
    return rebuild(State, fields, "state"), buffer
