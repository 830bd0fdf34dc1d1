"""What a run of train.py leaves behind: its files, its metrics, every pair accounted for, what is asked again."""
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import train
from dpo import METRICS
from eval import score
from gate import proportion
from loop.diagnosis import explain_change
from loop.optimise import learning_rate
from model import generate, load_vlm
from replay import Pair
from runs import CHECKPOINTS, by_id, config, rows, start, state, summary, tree
from tasks import Item
from train import Config
from verifier import score_candidates


def test_files(whole: Path) -> None:
    files = tree(whole)
    assert {n for n in files if "/" not in n} == {
        "candidates", "checkpoints", "config.json", "gate_records.jsonl", "held_out.jsonl", "metrics.jsonl", "pairs",
        "report.html", "summary.json", "trained_on.jsonl"}
    assert {n for n in files if n.startswith("pairs/") and not n.startswith("pairs/images/")} == {
        "pairs/round-1.jsonl", "pairs/round-2.jsonl", "pairs/images"}
    found = summary(whole)
    assert found["pre_gate"]["verdict"] in ("PASS", "BLOCK") and found["pre_gate"]["reasons"]
    assert found["post_gate"]["verdict"] == "REJECT" and len(found["post_gate"]["reasons"]) >= 1
    assert [set(found[n]) for n in ("baseline_accuracy", "final_accuracy")] == [{"value", "low", "high", "n"}] * 2
    assert found["baseline_accuracy"]["n"] == found["final_accuracy"]["n"] == 16


def test_metrics(whole: Path) -> None:
    """Names as TRL's; at step 1 the policy is the reference, so the loss is ln 2 and no reward differs from 0."""
    first, *log = rows(whole / "metrics.jsonl")
    assert first["step"] == 0 and set(first) == {"step", "eval/accuracy", "eval/parse_rate", "eval/truncation_rate"}
    assert [row["step"] for row in log] == list(range(1, 13))
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
             "logps/rejected", "grad_norm", "lr"}
    assert all(names <= set(row) for row in log) and names > set(METRICS)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(log[0][name]) < 1e-4 < abs(log[-1][name])
    cfg = config(whole)
    planned = cfg.rounds * cfg.steps_per_round
    assert all(row["lr"] == learning_rate(cfg.lr, cfg.warmup_steps, row["step"], planned) for row in log)
    assert [row["round"] for row in log] == [1] * 6 + [2] * 6
    assert [row["step"] for row in log if "eval/accuracy" in row] == [3, 6, 9, 12]
    found, losses = summary(whole), [row["loss"] for row in log]
    assert found["steps"] == 12 and found["loss_first"] == losses[0]
    assert found["loss_last"] == pytest.approx(sum(losses[-10:]) / len(losses[-10:]))


def test_every_pair_is_accounted_for(whole: Path) -> None:
    for number, told in enumerate(summary(whole)["rounds"], 1):
        pairs = rows(whole / "pairs" / f"round-{number}.jsonl")
        assert told["round"] == number and told["pairs"] == len(pairs) > 0 and not told["skipped"]
        assert told["items"] == 48 == told["pairs"] + told["unparsed"] + told["tie"] + told["same_text"]
        assert all(0 < p["margin"] == pytest.approx(p["chosen_score"] - p["rejected_score"]) for p in pairs)
        assert told["above_margin"] == sum(p["margin"] >= 0.5 for p in pairs)


def test_pairs_are_in_trls_format(whole: Path) -> None:
    """Messages; as many places as pictures; each picture once, as the item has it; the reference's figures."""
    told = [pair for number in (1, 2) for pair in rows(whole / "pairs" / f"round-{number}.jsonl")]
    named = set()
    for pair in told:
        item = by_id()[pair["item_id"]]
        assert pair["prompt"] == [{"role": "user", "content": [
            {"type": "image"}, {"type": "text", "text": "How tall is the red bar? Answer with a number."}]}]
        for side in ("chosen", "rejected"):
            assert pair[side] == [{"role": "assistant", "content": [{"type": "text", "text": pair[f"{side}_text"]}]}]
            assert pair[f"reference_{side}_logp"] < 0 and pair[f"{side}_tokens"] and pair["reference_key"]
        [image] = pair["images"]
        assert (whole / "pairs" / image).read_bytes() == item.images[0] and image == f"images/{digest(item)}.png"
        named.add(image.removeprefix("images/"))
    assert {path.name for path in (whole / "pairs" / "images").iterdir()} == named and len(named) > 3


def digest(item: Item) -> str:
    [name] = item.picture_hashes
    return name


def test_direction_of_every_round(whole: Path) -> None:
    """q of the round's pairs, by the labels: recounted from the pairs that were written."""
    for number, told in enumerate(summary(whole)["rounds"], 1):
        pairs = rows(whole / "pairs" / f"round-{number}.jsonl")
        sides = [[score(by_id()[p["item_id"]], p[side]).correct for side in ("chosen_text", "rejected_text")]
                 for p in pairs]
        won = [chosen for chosen, rejected in sides if chosen != rejected]
        assert told["mixed"] == len(won) > 3 and told["right_way"] == sum(won)
        assert told["direction"] == proportion(sum(won), len(won))


def test_what_was_trained_on_is_asked_again(whole: Path) -> None:
    """Round 1's items, with the frozen and the trained student's greedy answers and the verifier's scores of them; the
    gate after training says what they and the held-out ones amount to."""
    told, held_out = rows(whole / "trained_on.jsonl"), rows(whole / "held_out.jsonl")
    round_one = train.round_items(config(whole), train.load_splits(config(whole)).train, 0)
    assert {row["id"] for row in told} == {item.id for item in round_one} and len(told) == 48
    items, frozen, verifier = [by_id()[r["id"]] for r in told], load_vlm(Config().student), load_vlm(Config().verifier)
    answers = [answer for [answer] in generate(frozen, [i.chat() for i in items], max_new_tokens=16, temperature=0)]
    assert [a.text for a in answers] == [row["frozen"]["response"] for row in told]
    assert [score(item, a.text).correct for item, a in zip(items, answers)] == [r["frozen"]["correct"] for r in told]
    for side in ("frozen", "trained"):
        values = [value.value for [value] in score_candidates(
            lambda chats: [reply for [reply] in generate(verifier, chats, max_new_tokens=16, temperature=0)],
            [item.chat() for item in items], [[row[side]["response"]] for row in told])]
        assert values == [row[side]["score"] for row in told] and len(set(values)) > 1
    found, sides = summary(whole)["post_gate"], [[[row[side] for row in each] for side in ("frozen", "trained")]
                                                 for each in (held_out, told)]
    why = explain_change(*sides)
    assert {name: found[name] for name in ("diagnosis", "drift", "trained_on")} == {
        name: why[name] for name in ("diagnosis", "drift", "trained_on")}
    assert found["reasons"][-len(why["reasons"]):] == why["reasons"] and found["trained_on"]["accuracy"]["n"] == 48
    assert found["drift"]["parse_rate"]["n"] == 16 and found["drift"]["outside_options"]["n"] == 0


def test_fewer_are_asked_again(whole: Path, tmp_path: Path) -> None:
    """As many as the flag says, of the same items; how many has no bearing on what is trained."""
    out = tmp_path / "run"
    assert start(config(out, trained_on_items=5, rounds=1)) == 3
    told, frozen = rows(out / "trained_on.jsonl"), [row["frozen"] for row in rows(whole / "trained_on.jsonl")]
    assert len(told) == 5 and all(row["frozen"] in frozen for row in told)
    assert (out / "pairs" / "round-1.jsonl").read_bytes() == (whole / "pairs" / "round-1.jsonl").read_bytes()


def test_stored_reference_is_the_references_own(whole: Path) -> None:
    """The log-probabilities in a checkpoint are those of the frozen student, also after steps of training."""
    frozen = load_vlm(Config().student)
    saved = state(whole, CHECKPOINTS[6])
    pairs = [Pair(**p) for p in saved["state"]["fresh"][:8]]
    assert saved["step"] == 8 and saved["state"]["round"] == 1 and len(pairs) > 1
    with torch.no_grad():
        one_by_one = [train.pair_logps(frozen, [p], by_id())[1:] for p in pairs]
    assert torch.tensor(one_by_one).view(-1, 2).sub(torch.tensor(
        [(p.reference_chosen_logp, p.reference_rejected_logp) for p in pairs])).abs().max() < 1e-4
    assert any(not torch.equal(saved["model"][n], p) for n, p in frozen.named_parameters() if n in saved["model"])
