"""loop/survey.py: what is asked once, what is kept and when it is not believed, costs, the ranking; by stand-ins for
models, whose answers, prices and mistakes are known, and once by the shipped tiny ones."""
from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gate
from eval import load_task
from loop import survey
from model import generate, load_vlm, next_digits
from replay import Pair
from tasks import Item
from verifier import CANDIDATE, REPLIES, RUBRIC, VERDICTS

TINY = Path(gate.__file__).parent / "model" / "tiny"
PROMPT, REPLY = 10, 2                                   # tokens of every prompt and of every reply
SECONDS = {"student": 1.0, "right": 2.0, "wrong": 1.0, "rough": 0.5}         # what a stand-in takes for a prompt


def items(count: int, colour: int = 0) -> list[Item]:
    """Questions whose answers are 1 to 9, a picture with each; every seventh answer is not known."""
    encoded = io.BytesIO()
    Image.new("RGB", (2, 2), (colour, 0, 0)).save(encoded, "PNG")
    return [Item(f"q{i}", "bar", (0, f"say {1 + i % 9}"), (encoded.getvalue(),), str(1 + i % 9) if i % 7 else None,
                 "integer") for i in range(count)]


class World:
    """Stand-ins for the models below `folder`, a record of what they were asked, and a clock that only they move."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.calls, self.loaded, self.clock, self.opened = folder, [], [], 0.0, 0
        self.items, self.fail_at, real = items(60), None, Item.chat
        for name in SECONDS:
            self.change(name, f"{name} as it was made")

        def chat(item: Item) -> list[dict]:
            self.opened += 1
            return real(item)
        patch.setattr(Item, "chat", chat)
        patch.setattr(survey, "load_task", lambda *_: self.items)
        patch.setattr(survey, "load_vlm", self.load)
        patch.setattr(survey, "generate", self.generate)
        patch.setattr(survey.time, "perf_counter", lambda: self.clock)

    def change(self, name: str, content: str) -> None:
        (self.folder / name).mkdir(exist_ok=True)
        (self.folder / name / "config.json").write_text(content)

    def load(self, folder: Path, *_: Any) -> SimpleNamespace:
        self.loaded.append(folder.name)
        def rows(chats: list, _: dict) -> list[SimpleNamespace]:
            return [SimpleNamespace(ids=[0] * PROMPT) for _ in chats]
        size = SimpleNamespace(numel=lambda: len(folder.name))
        return SimpleNamespace(name=folder.name, processor=SimpleNamespace(rows=rows), parameters=lambda: [size] * 3)

    def generate(self, vlm: Any, chats: list, n: int = 1, **how: Any) -> list[list[SimpleNamespace]]:
        texts = ["".join(part.get("text", "") for part in chat[-1]["content"]) for chat in chats]
        asked = "verdicts" if texts[0].startswith(RUBRIC) else "samples" if how["temperature"] else "answers"
        self.calls.append((vlm.name, asked, len(chats)))
        if self.fail_at == len(self.calls):
            raise ValueError("the power failed")
        assert self.opened <= how["batch_size"]                         # not the pictures of all items at once
        self.opened, self.clock = 0, self.clock + SECONDS[vlm.name] * len(chats)
        return [[SimpleNamespace(text=self.say(vlm.name, text, draw), token_ids=(1,) * REPLY, finish_reason="stop")
                 for draw in range(n)] for text in texts]

    def say(self, name: str, text: str, draw: int) -> str:
        truth = re.search(r"say (\d)", text)[1]
        if not text.startswith(RUBRIC):
            return truth if name in ("right", "rough") or name == "student" and (int(truth) + draw) % 3 == 0 else "0"
        right = text.rpartition(CANDIDATE)[2] == truth
        return json.dumps({"score": float(right != (name == "wrong" or name == "rough" and truth == "5"))})

    def ask(self, *verifiers: str, **flags: Any) -> int:
        """gate.py's command; what was asked before is forgotten."""
        self.calls, self.loaded, self.opened = [], [], 0
        words = {"student": self.folder / "student", "task": "bar", "items": 45, "k": 4, "out": self.out} | flags
        return gate.main([word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", str(value))]
                         + ["--verifier", *(str(self.folder / name) for name in verifiers)])

    @property
    def out(self) -> Path:
        return self.folder / "report.json"

    def report(self) -> dict[str, Any]:
        """The report, verifiers by the last part of their paths."""
        found = json.loads(self.out.read_text())
        if "verifiers" in found:
            found["verifiers"] = {Path(path).name: report for path, report in found["verifiers"].items()}
        return found

    def asked(self) -> dict[tuple[str, str], int]:
        """How many prompts each model was asked, by purpose."""
        return {key: sum(size for *other, size in self.calls if tuple(other) == key)
                for key in sorted({(name, what) for name, what, _ in self.calls})}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


STUDENT = {("student", "answers"): 45, ("student", "samples"): 45}


def own(name: str, verdicts: int = 90) -> dict[tuple[str, str], int]:
    """What one more verifier is asked: its own answers, and the two distinct candidates of every item."""
    return {(name, "answers"): 45, (name, "verdicts"): verdicts}


# ---- one survey

def test_one_student_serves_all(world: World, capsys: pytest.CaptureFixture) -> None:
    assert world.ask("wrong", "right") == 0
    assert world.asked() == STUDENT | own("right") | own("wrong")
    assert world.loaded == ["student", "wrong", "right"]
    report = world.report()
    found = report["verifiers"]
    assert {name: each["verdict"] for name, each in found.items()} == {"wrong": "BLOCK", "right": "PASS"}
    assert found["wrong"]["direction"]["value"] == 0.0 and found["right"]["own_answer_accuracy"]["value"] == 1.0
    assert found["right"]["items"] == 45 and found["right"]["records"] == 180
    assert (found["right"]["parameters"], found["right"]["tokens_per_verdict"]) == (3 * len("right"), PROMPT + REPLY)
    assert {name: each["seconds_per_verdict"] for name, each in found.items()} == {"wrong": 1.0, "right": 2.0}
    assert {name: each["cost"] for name, each in found.items()} == {"wrong": 1.0, "right": 2.0}
    assert found["right"]["difference_from_best"]["value"] == 0.0
    assert found["wrong"]["difference_from_best"]["value"] == -1.0
    assert report["recommended"] == str(world.folder / "right")
    said = capsys.readouterr()
    table = [line.split()[0] for line in said.out.splitlines()[1:3]]
    assert table == ["PASS", "BLOCK"]                                   # the best agreement first
    assert all(word in said.out.splitlines()[0] for word in ("parameters", "seconds_per_verdict", "cost"))
    assert said.out.splitlines()[-1] == report["recommendation"] and "of 2 verifiers" in report["recommendation"]
    assert "right: verdicts (json)" in said.err and "student: samples" in said.err


def test_one_verifier(world: World) -> None:
    assert world.ask("wrong") == 3
    report = world.report()
    assert report["verdict"] == "BLOCK" and report["cost"] == 1.0 and report["recommended"] is None
    assert world.ask("right") == 0 and world.report()["recommended"] == str(world.folder / "right")


def test_a_model_that_is_not_there(world: World, capsys: pytest.CaptureFixture) -> None:
    """Nobody is asked for hours before the last name turns out to be wrong."""
    world.out.write_text("old")
    assert world.ask("right", "absent") == 1
    error = capsys.readouterr().err
    assert "absent" in error and error.count("\n") == 1 and not world.calls and world.out.read_text() == "old"


def test_no_item_with_an_answer(world: World, capsys: pytest.CaptureFixture) -> None:
    world.items = [replace(item, answer=None) for item in world.items]
    assert world.ask("right") == 1
    assert "no item of bar has an answer" in capsys.readouterr().err and not world.calls


# ---- what is kept

def test_asked_again_nothing_is_asked(world: World) -> None:
    assert world.ask("right", "wrong") == 0
    before = world.report()
    assert world.ask("right", "wrong") == 0
    assert not world.calls and not world.loaded and world.report() == before
    assert world.ask("right", "wrong", out=world.folder / "other.json", rule="paper", min_margin=0.9) == 0
    assert not world.calls                                              # in the same folder, decided otherwise


def test_another_verifier_costs_its_own_scoring(world: World) -> None:
    assert world.ask("wrong") == 3
    assert world.ask("wrong", "right") == 0
    assert world.asked() == own("right") and world.loaded == ["right"]


def test_the_student_as_its_own_verifier(world: World) -> None:
    world.ask("student")
    assert world.asked() == STUDENT | {("student", "verdicts"): 90}     # its greedy answers are its own answers


@pytest.mark.parametrize("flags, expected", [
    ({"verdict_tokens": 8}, {("right", "verdicts"): 90}),
    ({"k": 3}, {("student", "samples"): 45, ("right", "verdicts"): 90}),
    ({"temperature": 0.5}, {("student", "samples"): 45}), ({"top_p": 0.5}, {("student", "samples"): 45}),
    ({"max_new_tokens": 8}, STUDENT | {("right", "answers"): 45}),
    ({"batch_size": 15}, STUDENT | own("right"))], ids=str)
def test_other_flags_are_asked_for(world: World, flags: dict[str, Any], expected: dict) -> None:
    """What depends on the flag, and nothing else: where the candidates come out the same, so do the verdicts."""
    world.ask("right")
    world.ask("right", **flags)
    assert world.asked() == expected


def test_other_items_models_and_wordings_are_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.ask("right", "wrong")
    world.change("right", "trained further")
    world.ask("right", "wrong")
    assert world.asked() == own("right")
    world.items = items(60, colour=200)                                 # the same ids and words, other pictures
    world.ask("right", "wrong")
    assert world.asked() == STUDENT | own("right") | own("wrong")
    world.items = [replace(item, prompt=(0, item.prompt[1] + "!")) for item in world.items]
    world.ask("right", "wrong")
    assert world.asked() == STUDENT | own("right") | own("wrong")
    world.ask("right", "wrong", seed=1)
    assert {("student", "answers"), ("student", "samples")} <= world.asked().keys()            # other items
    real = survey.code_digest
    monkeypatch.setattr(survey, "code_digest", lambda name: real(name) + "edited" * (name == "verifier.py"))
    world.ask("right", "wrong", seed=1)
    assert world.asked() == {("right", "verdicts"): 90, ("wrong", "verdicts"): 90}


def test_interrupted_it_goes_on_where_it_stopped(world: World, capsys: pytest.CaptureFixture) -> None:
    world.fail_at = 8                                                   # 3 batches answers, 3 samples, 2 own answers
    assert world.ask("right") == 1 and "the power failed" in capsys.readouterr().err
    world.fail_at = None
    assert world.ask("right") == 0
    assert world.asked() == {("right", "answers"): 29, ("right", "verdicts"): 90}              # all but 16


DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "cut off": lambda one, _: one[:len(one) // 2], "empty": lambda *_: b"", "another's": lambda _, other: other,
    "not JSON": lambda *_: b"\xff", "no object": lambda *_: b"[1]", "null": lambda *_: b"null",
    "another's answer": lambda one, other: json.dumps(json.loads(one) | {"value": json.loads(other)["value"]}).encode(),
    "edited": lambda one, _: re.sub(rb'"value": \[\[\["\d"', b'"value": [[["x"', one).replace(b"[1.0, ", b"[0.0, "),
    "nested": lambda *_: b"[" * 100_000}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_asked_for_again(world: World, damage: str) -> None:
    """One file at a time: only what belongs into it is asked for, and the report is the same as before."""
    world.ask("right")
    before, paths = world.report(), sorted((world.folder / "gate_cache").iterdir())
    assert len(paths) == 12                                             # four kinds of question, three batches each
    contents = {path: path.read_bytes() for path in paths}
    for k, path in enumerate(paths):
        broken = DAMAGES[damage](contents[path], contents[paths[k - 1]])
        assert broken != contents[path]
        path.write_bytes(broken)
        world.ask("right")
        assert len({call[:2] for call in world.calls}) == 1 and len(world.calls) <= 2
        assert world.report() == before and path.read_bytes() == contents[path]


def test_a_cache_elsewhere(world: World, capsys: pytest.CaptureFixture) -> None:
    world.ask("right", cache=world.folder / "kept" / "here")
    assert len(list((world.folder / "kept" / "here").iterdir())) == 12 and not (world.folder / "gate_cache").exists()
    (world.folder / "file").write_text("mine")
    assert world.ask("right", cache=world.folder / "file") == 1
    assert not world.calls and capsys.readouterr().err.splitlines()[-1].startswith("gate.py: ")
    assert (world.folder / "file").read_text() == "mine"


# ---- the shipped tiny models

@pytest.mark.parametrize("kind", VERDICTS)
def test_tiny_models(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every way of scoring: the scores are those of verifier.py's own function, the tokens those that it asks."""
    few = load_task("red", limit=4)
    monkeypatch.setattr(survey, "load_task", lambda *_: few)
    cfg = gate.Config(student=str(TINY / "student"), verifier=[str(TINY / "verifier-0")], task="red", k=4, device="cpu",
                      temperature=3.0, max_new_tokens=4, verdict_tokens=16, batch_size=3, verdict=kind,
                      out=str(tmp_path / "r.json"))
    [(records, costs)] = survey.survey(cfg).values()
    texts = [[r["text"] for r in records if r["item"] == item.id] for item in few]
    assert len(records) == 16 and any(len(set(row)) > 1 for row in texts)
    vlm, tokens = load_vlm(TINY / "verifier-0"), []

    def ask(chats: list) -> list:
        tokens.append(int(vlm.processor(chats).attention_mask.sum()))
        if kind == "logits":
            return next_digits(vlm, chats, REPLIES)
        replies = [reply for [reply] in generate(vlm, chats, max_new_tokens=16, temperature=0)]
        tokens.extend(len(reply.token_ids) for reply in replies)
        return replies
    scores = [s.value for row in VERDICTS[kind](ask, [item.chat() for item in few], texts) for s in row]
    by_item = {item.id: k for k, item in enumerate(few)}
    found = [r["score"] for r in sorted(records, key=lambda r: by_item[r["item"]])]
    assert found == pytest.approx(scores, abs=1e-4)
    assert len(set(found)) > 1 or kind == "pairwise"                    # which the tiny verifiers were not taught
    assert costs["tokens_per_verdict"] == pytest.approx(sum(tokens) / sum(len(set(row)) for row in texts))
    assert costs["parameters"] == sum(p.numel() for p in vlm.parameters()) and costs["seconds_per_verdict"] > 0


# ---- which verifier

Measured = tuple[str, float, list[int]]                 # verdict, seconds a verdict, right verdicts of each item's 8


def ranked(**verifiers: Measured) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    reports = {name: {"verdict": verdict, "seconds_per_verdict": seconds}
               for name, (verdict, seconds, _) in verifiers.items()}
    records = {name: [{"item": str(i), "correct": True, "score": float(j < agrees)} for i, agrees in enumerate(each)
                      for j in range(8)] for name, (*_, each) in verifiers.items()}
    return survey.recommend(reports, records), reports


def agreement(mean: float, offset: int = 0) -> list[int]:
    """200 items, of whose 8 verdicts all or none are right, `mean` of all 1,600."""
    none = round(200 * (1 - mean))
    return [0 if (i + offset) % 200 < none else 8 for i in range(200)]


GOOD, SAME, NEAR, MAYBE, POOR = (agreement(mean) for mean in (0.9, 0.9, 0.88, 0.86, 0.75))
LESS = [agrees - (agrees == 8 and i % 5 == 0) for i, agrees in enumerate(GOOD)]        # one verdict of 36 items


@pytest.mark.parametrize("verifiers, recommended, words", [
    ({"a": ("BLOCK", 1, GOOD), "b": ("BLOCK", 2, POOR)}, None, ["none passes"]),
    ({"a": ("PASS", 1, GOOD)}, "a", ["of 1 verifiers measured no other passes", "was not measured"]),
    ({"a": ("PASS", 9, POOR), "b": ("BLOCK", 1, GOOD)}, "a", ["of 2 verifiers measured no other passes"]),
    ({"a": ("PASS", 1, SAME), "b": ("PASS", 5, GOOD)}, "a", ["(it is the best)", "buys nothing that was measured"]),
    ({"b": ("PASS", 5, GOOD), "a": ("PASS", 1, SAME)}, "a", ["+0.000 [", "from the best, b",
                                                             "buys nothing that was measured"]),
    ({"a": ("PASS", 1, NEAR), "b": ("PASS", 5, GOOD)}, "a", ["-0.020 [", ", +0.0", "buys nothing that was measured"]),
    ({"a": ("PASS", 1, LESS), "b": ("PASS", 5, GOOD)}, "a", ["-0.022 [", "the best, b", "buys 0.022 of agreement"]),
    ({"a": ("PASS", 1, MAYBE), "b": ("PASS", 5, GOOD)}, "b", ["(it is the best)", "none that passes costs more"]),
    ({"a": ("PASS", 1, POOR), "b": ("PASS", 5, GOOD)}, "b", ["(it is the best)", "none that passes costs more"]),
    ({"a": ("PASS", 1, POOR), "b": ("PASS", 3, NEAR), "c": ("PASS", 9, GOOD)}, "b", ["of 3 verifiers", "the best, c"]),
    ({"a": ("BLOCK", 1, GOOD), "b": ("PASS", 3, POOR), "c": ("PASS", 9, POOR)}, "b", ["of 2 verif", "buys nothing"])])
def test_recommendation(verifiers: dict[str, Measured], recommended: str | None, words: list[str]) -> None:
    advice, reports = ranked(**verifiers)
    assert advice["recommended"] == recommended
    assert all(word in advice["recommendation"] for word in words), advice["recommendation"]
    assert advice["recommendation"].endswith(".") and "\n" not in advice["recommendation"]
    cheapest = min(seconds for _, seconds, _ in verifiers.values())
    assert {name: report["cost"] for name, report in reports.items()} == {
        name: seconds / cheapest for name, (_, seconds, _) in verifiers.items()}


def test_difference_is_from_the_best_that_passes() -> None:
    _, reports = ranked(flattered=("BLOCK", 1, GOOD), b=("PASS", 3, POOR), c=("PASS", 9, MAYBE))
    values = {name: report["difference_from_best"]["value"] for name, report in reports.items()}
    assert values == pytest.approx({"flattered": 0.04, "b": -0.11, "c": 0.0})
    expected = gate.paired_difference([a / 8 for a in MAYBE], [a / 8 for a in POOR])
    assert reports["b"]["difference_from_best"] == expected


def test_differing_on_other_items_is_less_certain() -> None:
    """The same two means: where the items that are lost are others for each, less is known of the difference."""
    together, _ = ranked(a=("PASS", 1, NEAR), b=("PASS", 5, GOOD))
    apart, _ = ranked(a=("PASS", 1, agreement(0.88, offset=100)), b=("PASS", 5, GOOD))
    assert (together["recommended"], apart["recommended"]) == ("a", "b")


@pytest.mark.parametrize("lack, least, most", [(0.05, 0.0, 0.05), (0.15, 0.0, 0.0), (0.0, 0.95, 1.0)])
def test_how_often_the_cheap_one_is_recommended(lack: float, least: float, most: float) -> None:
    """One that lacks 0.05 in truth: 1 time in 40 (5 % leave room for the best being picked by the same figures); one
    that lacks nothing: nearly always, with 200 items of 8 candidates."""
    rng, picked = np.random.default_rng(0), 0
    for _ in range(200):
        hard = rng.beta(8, 1, 200)
        dear, cheap = (rng.binomial(8, hard * share).tolist() for share in (0.95, 0.95 - lack * 9 / 8))
        advice, _ = ranked(cheap=("PASS", 1, cheap), dear=("PASS", 5, dear))
        picked += advice["recommended"] == "cheap"
    assert least * 200 <= picked <= most * 200


# ---- items and pairs

def test_draw_items() -> None:
    known = [item for item in items(60) if item.answer is not None]
    drawn = survey.draw_items(items(60), 20, 3)
    assert len(drawn) == len({item.id for item in drawn}) == 20 and all(item in known for item in drawn)
    assert drawn == survey.draw_items(items(60), 20, 3) == random.Random(3).sample(known, 20)
    assert drawn != survey.draw_items(items(60), 20, 4) and len(survey.draw_items(items(60), 99, 0)) == len(known)
    assert survey.draw_items(items(60), 0, 0) == [] == survey.draw_items([], 9, 0)


def test_right_way() -> None:
    """Mixed pairs are those with one side right; items without an answer (q0, q7) count nowhere."""
    said = {"q1": ("2", "9"), "q2": ("9", "3"), "q3": ("4", "4."), "q4": ("1", "9"), "q5": ("6", "no"),
            "q0": ("1", "2"), "q7": ("8", "1"), "q6": ("7", "2")}
    pairs = [Pair(name, (1,), (2,), 1.0, 0.0, chosen, rejected) for name, (chosen, rejected) in said.items()]
    found = survey.right_way(pairs, items(20))
    assert found == {"mixed": 4, "right_way": 3, "direction": gate.proportion(3, 4)}
    assert survey.right_way([], items(20)) == {"mixed": 0, "right_way": 0, "direction": gate.proportion(0, 0)}
