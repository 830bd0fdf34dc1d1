"""loop/gates.py: pictures make clusters in both gates, which q decides, and what --require-gain asks for."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gate import decide_before, measure
from loop import gates
from loop.pilot import Scored
from loop.state import State
from model import Completion
from replay import select_pair
from runs import config, few_items
from tasks.splits import Splits
from verifier import Score

ITEMS = list(few_items("bar")[:4])
SHARED = [*ITEMS, replace(ITEMS[2], id="again")]        # two questions about one picture


def test_items_that_share_a_picture_are_one_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the records of the gate before, and in the gate after; where no two do, nothing is said of clusters."""
    answer = Completion((1,), "1", "stop")
    monkeypatch.setattr(gates, "greedy_completions", lambda run, vlm, items, label: [answer] * len(items))
    scored = Scored(SHARED, [[answer, answer]] * 5, [[Score(0.9, ""), Score(0.2, "")]] * 5)
    records = gates.make_records(None, None, None, scored)
    name = min(ITEMS[2].id, "again")
    found = {record["item"]: record.get("group") for record in records}
    assert len(records) == 10 and found == {item.id: None for item in ITEMS} | {ITEMS[2].id: name, "again": name}
    clusters = gates.picture_clusters(SHARED)
    assert clusters == [ITEMS[0].id, ITEMS[1].id, name, ITEMS[3].id, name]
    assert gates.picture_clusters(ITEMS) is None


@pytest.mark.parametrize("require_gain", [False, True])
def test_what_the_gate_after_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require_gain: bool) -> None:
    asked: dict[str, Any] = {}

    def gate_after(before: list[bool], after: list[bool], **how: Any) -> Any:
        asked.update(how)
        return SimpleNamespace(verdict="REJECT", reasons=["why"], measures={})
    monkeypatch.setattr(gates, "gate_after", gate_after)
    monkeypatch.setattr(gates, "greedy_answers", lambda run, vlm, items, label: [SimpleNamespace(correct=True)] * 5)
    monkeypatch.setattr(gates, "compare_answers", lambda *_, **__: {"reasons": []})
    monkeypatch.setattr(gates, "load_vlm", lambda *_: None)
    monkeypatch.setattr(gates, "frozen", lambda vlm, cfg: vlm)
    run = SimpleNamespace(cfg=config(tmp_path, require_gain=require_gain, min_low=-0.1), save_candidate=lambda _: None,
                          ranks=SimpleNamespace(device="cpu", first=True), deploy_or_discard=lambda *_, **__: None)
    state = State(step=1, frozen_held_out=[SimpleNamespace(correct=False)] * 5, frozen_reviewed=[])
    gates.deploy_gate(run, SimpleNamespace(dtype=None), None, Splits([], [], SHARED, []), [], state)
    assert asked == {"trained": True, "min_low": -0.1, "require_gain": require_gain,
                     "clusters": gates.picture_clusters(SHARED)}


def direction_records() -> list[dict[str, Any]]:
    """40 pairs of a large margin point the right way, 80 of a small one the wrong way."""
    records = []
    for number in range(120):
        large = number < 40
        for correct in (True, False):
            score = (0.9 if correct else 0.1) if large else (0.6 if correct else 0.7)
            records.append({"item": f"q{number}", "correct": correct, "score": score, "text": str(correct)})
    return records


def test_which_q_decides() -> None:
    """That of the pairs that would be trained on: of all, or, where tau gates both shares, of those from tau on."""
    measures = measure(direction_records(), select_pair, 0.5)
    everything = gates.decide(measures, "ours", 0.0)
    assert everything == decide_before(measures) and "wrong direction: 40 of 120" in " ".join(everything.reasons)
    gated = gates.decide(measures, "ours", 0.5)
    told = " ".join(gated.reasons)
    assert "direction shown: 40 of 40" in told and "here q is that of a margin of at least 0.5" in told
    assert "wrong direction" not in told and measures["direction"]["n"] == 120
    assert gates.decide(measures, "paper", 0.5) == decide_before(measures, "paper")
