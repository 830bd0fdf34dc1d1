"""loop/survey.py and the cached models it asks, by gate.py's command: what is asked once, what is kept and when it is
not believed, costs; by stand-ins for models, whose answers, prices and mistakes are known, and by the shipped ones."""
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

import pytest
from PIL import Image

import gate
from eval import load_task
from locks import held_elsewhere
from loop import asking, cached_model, lengths, loading, survey
from loop.survey import draw_items
from loop.survey_flags import SurveyConfig
from model import generate, load_vlm, next_digits
from replay import select_pair
from tasks import Item
from verifier import CANDIDATE, REPLIES, RUBRIC, VERDICTS

TINY = Path(gate.__file__).parent / "model" / "tiny"
PROMPT, REPLY = 10, 2                                   # tokens of every prompt and of every reply
SECONDS = {"student": 1.0, "right": 2.0, "wrong": 1.0, "rough": 0.5, "lucky": 2.0}     # of a stand-in, a prompt


def items(count: int, colour: int = 0) -> list[Item]:
    """Questions whose answers are 1 to 9, a picture with each; every seventh answer is not known."""
    made = []
    for number in range(count):
        encoded = io.BytesIO()
        Image.new("RGB", (2, 2), (colour, number, 0)).save(encoded, "PNG")
        picture = encoded.getvalue()
        answer = str(1 + number % 9)
        known = answer if number % 7 else None
        made.append(Item(f"q{number}", "bar", (0, f"say {answer}"), (picture,), known, "integer"))
    return made


class StandInProcessor:
    """Every prompt has as many tokens."""

    def __call__(self, chats: list) -> list:
        return chats

    def rows(self, chats: list, _: dict) -> list[SimpleNamespace]:
        return [SimpleNamespace(ids=[0] * PROMPT) for _ in chats]


class World:
    """Stand-ins for the models below `folder`, a record of what they were asked, and a clock that only they move."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder = folder
        self.out = folder / "report.json"
        self.items = items(60)
        self.calls: list[tuple[str, str, int]] = []     # model, what it was asked, how many prompts
        self.loaded: list[str] = []
        self.clock = 0.0
        self.opened = 0                                 # chats since the last call
        self.fail_at: int | None = None                 # the call that fails, from 1
        self.luck = 0                                   # verdicts that `lucky` still gets right
        for name in SECONDS:
            self.change(name, f"{name} as it was made")

        real_chat = Item.chat

        def chat(item: Item) -> list[dict]:
            self.opened += 1
            return real_chat(item)
        patch.setattr(Item, "chat", chat)
        patch.setattr(survey, "load_task", lambda *_: self.items)
        patch.setattr(lengths, "processor_alone", self.processor_alone)
        patch.setattr(cached_model, "load_vlm", self.load)
        patch.setattr(cached_model, "generate", self.generate)
        patch.setattr(asking, "generate", self.generate)
        patch.setattr(cached_model.time, "perf_counter", lambda: self.clock)

    def change(self, name: str, content: str) -> None:
        """Another model under the same name."""
        (self.folder / name).mkdir(exist_ok=True)
        (self.folder / name / "config.json").write_text(content)

    def processor_alone(self, name: str, *_: Any) -> tuple[None, None]:
        """Stands in for what reads a model's positions: there is no limit to prompts."""
        cached_model.resolve_folder(name)
        return None, None

    def load(self, folder: Path, *_: Any) -> SimpleNamespace:
        """Stands in for load_vlm."""
        self.loaded.append(folder.name)
        weight = SimpleNamespace(numel=lambda: len(folder.name))
        vlm = SimpleNamespace(name=folder.name, processor=StandInProcessor(), parameters=lambda: [weight] * 3,
                              prepare=lambda chats: None)
        vlm.requires_grad_ = lambda _: vlm
        vlm.image_features = self.encode
        return vlm

    def encode(self, batch: list) -> None:
        """Stands in for the tower: it takes long."""
        self.clock += 1000 * len(batch)

    def generate(self, vlm: Any, chats: list, n: int = 1, **how: Any) -> list[list[SimpleNamespace]]:
        """Stands in for generate."""
        texts = ["".join(part.get("text", "") for part in chat[-1]["content"]) for chat in chats]
        asked = "answers"
        if texts[0].startswith(RUBRIC):
            asked = "verdicts"
        elif how["temperature"]:
            asked = "samples"
        self.calls.append((vlm.name, asked, len(chats)))
        if self.fail_at == len(self.calls):
            raise OSError("the power failed")
        assert self.opened <= how["batch_size"]                         # not the pictures of all items at once
        self.opened = 0
        self.clock += SECONDS[vlm.name] * len(chats)

        rows = []
        for text in texts:
            said = [self.say(vlm.name, text, draw) for draw in range(n)]
            rows.append([SimpleNamespace(text=reply, token_ids=(1,) * REPLY, finish_reason="stop") for reply in said])
        return rows

    def say(self, name: str, text: str, draw: int) -> str:
        """A reply. The student knows a third of the answers, `wrong` none; `rough` misjudges the answer 5."""
        truth = re.search(r"say (\d)", text)[1]
        if text.startswith(RUBRIC):
            right = text.rpartition(CANDIDATE)[2] == truth
            mistaken = name == "wrong" or (name == "rough" and truth == "5") or (name == "lucky" and self.luck <= 0)
            self.luck -= name == "lucky"
            return json.dumps({"score": float(right != mistaken)})
        known = name in ("right", "rough", "lucky") or (name == "student" and (int(truth) + draw) % 3 == 0)
        return truth if known else "0"

    def ask(self, *verifiers: str, **flags: Any) -> int:
        """gate.py's command; what was asked before is forgotten."""
        self.calls = []
        self.loaded = []
        self.opened = 0
        values = {"student": self.folder / "student", "task": "bar", "items": 45, "k": 4, "out": self.out} | flags
        words = ["--verifier", *(str(self.folder / name) for name in verifiers)]
        for name, value in values.items():
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return gate.main(words)

    def config(self, verifier: str) -> SurveyConfig:
        """The flags of the same survey with one verifier."""
        return SurveyConfig(student=str(self.folder / "student"), verifier=[str(self.folder / verifier)], task="bar",
                            items=45, k=4)

    def report(self) -> dict[str, Any]:
        """The report, verifiers by the last part of their paths."""
        report = json.loads(self.out.read_text())
        if "verifiers" in report:
            report["verifiers"] = {Path(path).name: part for path, part in report["verifiers"].items()}
        return report

    def asked(self) -> dict[tuple[str, str], int]:
        """How many prompts each model was asked, by purpose."""
        counts: dict[tuple[str, str], int] = {}
        for name, what, size in self.calls:
            counts[name, what] = counts.get((name, what), 0) + size
        return counts


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
    wrong, right = report["verifiers"]["wrong"], report["verifiers"]["right"]
    assert list(report["verifiers"]) == ["wrong", "right"]
    assert (wrong["verdict"], right["verdict"]) == ("BLOCK", "PASS")
    assert wrong["direction"]["value"] == 0.0 and right["own_answer_accuracy"]["value"] == 1.0
    assert right["items"] == 45 and right["records"] == 180
    assert (right["parameters"], right["tokens_per_verdict"]) == (3 * len("right"), PROMPT + REPLY)
    assert (wrong["seconds_per_verdict"], right["seconds_per_verdict"]) == (1.0, 2.0)
    assert (wrong["cost"], right["cost"]) == (1.0, 2.0)
    assert right["difference_from_best"]["value"] == 0.0 and wrong["difference_from_best"]["value"] == -1.0
    assert report["recommended"] == str(world.folder / "right")

    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["PASS", "BLOCK"]           # the best agreement first
    assert all(word in lines[0] for word in ("parameters", "seconds_per_verdict", "cost"))
    assert lines[-2] == report["recommendation"] and "of 2 verifiers" in report["recommendation"]
    assert "right: verdicts (json)" in said.err and "student: samples" in said.err


def test_the_recommended_one_is_measured_again(world: World, capsys: pytest.CaptureFixture) -> None:
    """On as many other items, where there are so many: it was the best of several on the first ones."""
    assert world.ask("wrong", "right") == 0
    assert "not measured again: too few other items" in world.report()["recommendation"]

    world.items = items(120)
    assert world.ask("wrong", "right") == 0
    report = world.report()
    assert report["again"]["verdict"] == "PASS" and report["again"]["items"] == 45
    assert "measured again on fresh items: PASS" in report["recommendation"]
    assert world.asked()["right", "verdicts"] == 180 and world.asked()["wrong", "verdicts"] == 90

    drawn = []
    for part in survey.draw_twice(world.items, world.config("right")):
        [surveyed] = survey.survey(world.config("right"), part, world.folder / "cache").values()
        drawn.append({record["item"] for record in surveyed.records})
    assert len(drawn[0]) == len(drawn[1]) == 45 and not drawn[0] & drawn[1]


def test_one_that_is_blocked_on_fresh_items_is_not_recommended(world: World) -> None:
    """`lucky` judges rightly for as long as it is one of several."""
    world.items = items(120)
    world.luck = 90
    assert world.ask("wrong", "lucky") == 3
    report = world.report()
    assert report["verifiers"]["lucky"]["verdict"] == "PASS" and report["again"]["verdict"] == "BLOCK"
    assert report["recommended"] is None and "wrong direction" in report["recommendation"]


def test_sequential(world: World) -> None:
    """The student answers all items; the verifier is asked until the direction is settled, and about no item whose
    candidates are all right or all wrong beyond the first ones."""
    flags = {"sequential": True, "fixed_items": 5, "batch_size": 4, "items": 45}
    assert world.ask("right", **flags) == 0
    report = world.report()
    told = report["sequential"]
    assert told["outcome"] == "shown" and told["fixed_items"] == 5 and 5 < told["items"] < 20
    assert report["items"] == 5 and report["direction"]["n"] == told["items"] and report["direction"]["low"] > 0.5
    assert world.asked()["right", "answers"] == 5 and world.asked()["student", "samples"] == 45
    assert world.asked()["right", "verdicts"] == 2 * told["items"]
    assert any(reason.startswith("sequential: shown after") for reason in report["reasons"])

    assert world.ask("wrong", **flags) == 3
    report = world.report()
    assert report["sequential"]["outcome"] == "futile"                  # given up before it is shown to be wrong
    assert any("direction not shown" in why for why in report["reasons"])
    assert world.ask("wrong", **flags | {"fixed_items": 20}) == 3
    report = world.report()
    assert report["sequential"]["outcome"] == "wrong" and any("wrong direction" in why for why in report["reasons"])


def test_one_verifier(world: World) -> None:
    assert world.ask("wrong") == 3
    report = world.report()
    assert report["verdict"] == "BLOCK" and report["cost"] == 1.0 and report["recommended"] is None
    assert world.ask("right") == 0 and world.report()["recommended"] == str(world.folder / "right")


def test_a_model_that_is_not_there(world: World, capsys: pytest.CaptureFixture) -> None:
    """Nobody is asked for hours before the last name turns out to be wrong."""
    world.out.write_text("old")
    assert world.ask("right", "absent") == 2
    error = capsys.readouterr().err
    assert "absent" in error and error.count("\n") == 1 and not world.calls and world.out.read_text() == "old"


def test_no_item_with_an_answer(world: World, capsys: pytest.CaptureFixture) -> None:
    world.items = [replace(item, answer=None) for item in world.items]
    assert world.ask("right") == 2
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
    ({"batch_size": 15}, STUDENT | own("right")), ({"dtype": "bfloat16"}, STUDENT | own("right"))], ids=str)
def test_other_flags_are_asked_for(world: World, flags: dict[str, Any], expected: dict) -> None:
    """What depends on the flag, and nothing else: where the candidates come out the same, so do the verdicts."""
    world.ask("right")
    world.ask("right", **flags)
    assert world.asked() == expected


def test_pixel_limits_are_asked_for(world: World, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture) -> None:
    """Limits are tried on all models before one is asked, set on each that is loaded, and part of what is kept."""
    tried = []
    limited = []

    def processor_alone(name: str, *limits: int | None) -> tuple[None, None]:
        tried.append((Path(name).name, limits))
        return None, None
    monkeypatch.setattr(lengths, "processor_alone", processor_alone)
    monkeypatch.setattr(loading, "limit_pixels", lambda _, *limits: limited.append(limits))
    world.ask("right")
    assert limited == [(None, None)] * 2
    world.ask("right", max_pixels=5000)
    assert world.asked() == STUDENT | own("right")
    assert tried[2:] == [("student", (None, 5000)), ("right", (None, 5000))] and limited[2:] == [(None, 5000)] * 2

    world.ask("right", max_pixels=5000)
    assert not world.calls
    assert world.ask("right", min_pixels=6000, max_pixels=5000) == 2
    assert "--min-pixels 6000 is above --max-pixels 5000" in capsys.readouterr().err


def test_a_model_that_cannot_keep_the_limits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It is named before the student is asked."""
    words = ["--student", TINY / "student", "--verifier", TINY / "verifier", "--task", "bar", "--items", 2,
             "--out", tmp_path / "report.json", "--max-pixels", 1]
    assert gate.main([str(word) for word in words]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "gate_cache").exists()


def test_other_models_and_items_are_asked_for(world: World) -> None:
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
    assert STUDENT.keys() <= world.asked().keys()                       # other items


def test_another_wording_is_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.ask("right", "wrong")
    real = cached_model.code_digest

    def edited(pattern: str) -> str:
        return real(pattern) + ("edited" if pattern == "verifier.py" else "")
    monkeypatch.setattr(cached_model, "code_digest", edited)
    world.ask("right", "wrong")
    assert world.asked() == {("right", "verdicts"): 90, ("wrong", "verdicts"): 90}


@pytest.mark.parametrize("pattern", ["model/*.py", "loop/asking.py", "loop/cached_model.py"])
def test_other_code_asks_anew(world: World, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """What asks and meters is part of what the answers depend on, like the models' own code."""
    world.ask("right")
    real = cached_model.code_digest
    monkeypatch.setattr(cached_model, "code_digest", lambda name: real(name) + ("edited" if name == pattern else ""))
    world.ask("right")
    assert world.asked() == STUDENT | own("right")


def test_interrupted_it_goes_on_where_it_stopped(world: World, capsys: pytest.CaptureFixture) -> None:
    world.fail_at = 8                                                   # 3 batches answers, 3 samples, 2 own answers
    assert world.ask("right") == 1 and "the power failed" in capsys.readouterr().err
    world.fail_at = None
    assert world.ask("right") == 0
    assert world.asked() == {("right", "answers"): 29, ("right", "verdicts"): 90}              # all but 16


def with_the_value_of(content: bytes, other: bytes) -> bytes:
    """The file with another file's answers."""
    return json.dumps(json.loads(content) | {"value": json.loads(other)["value"]}).encode()


def edited(content: bytes, _: bytes) -> bytes:
    """The file with other answers or scores in it."""
    return re.sub(rb'"value": \[\[\["\d"', b'"value": [[["x"', content).replace(b"[1.0, ", b"[0.0, ")


DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {                 # of a file's content and another's
    "cut off": lambda content, _: content[:len(content) // 2], "empty": lambda *_: b"",
    "another's": lambda _, other: other, "another's answer": with_the_value_of, "edited": edited,
    "not JSON": lambda *_: b"\xff", "no object": lambda *_: b"[1]", "null": lambda *_: b"null",
    "nested": lambda *_: b"[" * 100_000}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_asked_for_again(world: World, damage: str) -> None:
    """One file at a time: only what belongs into it is asked for, and the report is the same as before."""
    world.ask("right")
    before = world.report()
    paths = sorted((world.folder / "gate_cache").iterdir())
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
    assert world.ask("right", cache=world.folder / "file") == 2
    assert not world.calls and capsys.readouterr().err.splitlines()[-1].startswith("gate.py: ")
    assert (world.folder / "file").read_text() == "mine"


def test_one_process_makes_a_report(world: World, capsys: pytest.CaptureFixture) -> None:
    """A second one for the same report is refused before it asks; one for another report shares the cache."""
    lock = world.out.with_name(world.out.name + ".lock")
    with held_elsewhere(lock):
        assert world.ask("right") != 0
        error = capsys.readouterr().err
        assert f"{world.out} is in use by process 71 on node-3; wait for its end" in error and error.count("\n") == 1
        assert not world.calls and not (world.folder / "gate_cache").exists()
        assert world.ask("right", out=world.folder / "other.json") == 0
    assert world.ask("right") == 0 and not world.calls
    assert not lock.exists() and not (world.folder / "other.json.lock").exists()


# ---- the shipped tiny models

@pytest.mark.parametrize("kind", VERDICTS)
def test_tiny_models(kind: str, tmp_path: Path) -> None:
    """By every way of scoring: the scores are those of verifier.py's own function, the tokens those that it asks."""
    few = load_task("red", limit=4)
    cfg = SurveyConfig(
        student=str(TINY / "student"), verifier=[str(TINY / "verifier-0")], task="red", k=4, device="cpu",
        temperature=3.0, max_new_tokens=4, verdict_tokens=16, batch_size=3, verdict=kind)
    [surveyed] = survey.survey(cfg, few, tmp_path / "cache").values()
    records = surveyed.records
    texts = [[record["text"] for record in records if record["item"] == item.id] for item in few]
    assert len(records) == 16 and any(len(set(row)) > 1 for row in texts)

    vlm = load_vlm(TINY / "verifier-0")
    tokens = []

    def ask(chats: list) -> list:
        tokens.append(int(vlm.processor(chats).attention_mask.sum()))
        if kind == "logits":
            return next_digits(vlm, chats, REPLIES)
        replies = [reply for [reply] in generate(vlm, chats, max_new_tokens=16, temperature=0)]
        tokens.extend(len(reply.token_ids) for reply in replies)
        return replies
    scores = []
    for row in VERDICTS[kind](ask, [item.chat() for item in few], texts):
        scores += [score.value for score in row]
    place = {item.id: k for k, item in enumerate(few)}
    found = [record["score"] for record in sorted(records, key=lambda record: place[record["item"]])]
    assert found == pytest.approx(scores, abs=1e-4)
    assert len(set(found)) > 1 or kind == "pairwise"                    # which the tiny verifiers were not taught

    costs = gate.measure(records, select_pair, 0.5)
    verdicts = sum(len(set(row)) for row in texts)
    assert costs["tokens_per_verdict"] == pytest.approx(sum(tokens) / verdicts)
    assert costs["seconds_per_verdict"] > 0
    assert sum("tokens" in record for record in records) == verdicts    # of equal texts one carries the cost
    assert surveyed.measures["parameters"] == sum(weight.numel() for weight in vlm.parameters())


# ---- items

def test_draw_items() -> None:
    known = [item for item in items(60) if item.answer is not None]
    drawn = draw_items(items(60), 20, 3)
    assert len(drawn) == len({item.id for item in drawn}) == 20 and all(item in known for item in drawn)
    assert drawn == draw_items(items(60), 20, 3) == random.Random(3).sample(known, 20)
    assert drawn != draw_items(items(60), 20, 4) and len(draw_items(items(60), 99, 0)) == len(known)
    assert draw_items(items(60), 0, 0) == [] == draw_items([], 9, 0)
