"""The judge that improves itself: pairs without labels, the filter, what is trained on, and the loop that does it."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import judge as loop
import verifier
from eval import load_task
from loop import make_tiny
from loop.ranks import Ranks
from model import generate, load_vlm
from tasks import Item
from tasks.jsonl import export_items
from tasks.rewardbench import Comparison, show
from verifier import (
    COMPARISON,
    KINDS,
    Judgment,
    Score,
    SyntheticPair,
    alter_chat,
    altered_pair,
    balanced,
    comparison_chat,
    correct_pair,
    judge_pairs,
    kept_judgments,
    majority_pair,
    pairwise_scores,
)

ROOT = Path(__file__).resolve().parents[1]
FEW = {"items": 24, "held_out_items": 12, "iterations": 2, "patience": 2, "epochs": 2, "batch_size": 4,
       "save_every": 1, "n": 8, "votes": 3}
Chats = list[list[dict]]


# ---- majority pairs

def number(text: str) -> int | None:
    return int(text.strip(".")) if text.strip(".").isdigit() else None


@pytest.mark.parametrize("texts, outcome", [
    (["3"] * 9 + ["4"] * 7, ("3", "4")), (["4"] * 5 + ["3"] * 4 + ["2"], None),
    (["3"] * 4 + ["1", "2", "5"], "few_votes"),
    (["3"] * 8 + ["4"] * 8, "tie"), (["3"] * 6 + ["4"] * 6 + ["5"] * 4, "tie"), (["3"] * 16, "unanimous"),
    (["3"] * 10 + ["dunno"] * 6, "unanimous"), (["dunno"] * 16, "unparsed"), ([], "unparsed"),
    (["dunno"] * 11 + ["3"] * 4 + ["4"], "few_votes"), (["dunno"] * 9 + ["3"] * 5 + ["4"] * 2, ("3", "4")),
    (["3"] * 3 + ["3."] * 2 + ["4"] * 4, None), (["1"] * 4 + ["2"] * 4, "few_votes")])
def test_majority(texts: list[str], outcome: Any) -> None:
    """5 votes at least, none for what cannot be read, "3" and "3." the same; None: some pair, better by its answer."""
    found = majority_pair("q", texts, number, seed=0)
    if isinstance(outcome, str):
        assert found == outcome
        return
    most = max(map(number, texts), key=lambda a: -1 if a is None else list(map(number, texts)).count(a))
    assert isinstance(found, SyntheticPair) and found.item_id == "q" and {found.better, found.worse} <= set(texts)
    assert number(found.better) == most and number(found.worse) not in (most, None)
    assert outcome is None or (found.better, found.worse) == outcome


def test_the_draw_is_seeded() -> None:
    texts = ["3"] * 8 + ["1", "2", "4", "5", "6", "7", "8", "9"]
    drawn = [majority_pair("q", texts, number, seed) for seed in range(40)]
    assert drawn == [majority_pair("q", texts, number, seed) for seed in range(40)]
    assert len({pair.worse for pair in drawn}) >= 6                         # any other candidate, not the second best
    assert len({majority_pair(f"q{k}", texts, number, 0).worse for k in range(40)}) >= 6


@pytest.mark.parametrize("correct, outcome", [
    ([True, False], ("a", "b")), ([False, True], ("b", "a")), ([True, True], "none_wrong"),
    ([False, None], "none_right"), ([True, None], "none_wrong"), ([None, None], "none_right")])
def test_correct_pair(correct: list[bool | None], outcome: Any) -> None:
    found = correct_pair("q", ["a", "b"], correct, 0)
    assert found == (outcome if isinstance(outcome, str) else SyntheticPair("q", *outcome))


# ---- altered pairs

@pytest.mark.parametrize("kind, response, altered, outcome", [
    ("attribute", "A red car is parked by the road.", "A blue car is parked by the road.", "pair"),
    ("attribute", "A big dog sleeps.", "A small dog sleeps.", "pair"),
    ("attribute", "A big dog sleeps.", "A large dog sleeps.", "unchanged"),              # another word for the same
    ("attribute", "A grey cat.", "A gray cat.", "unchanged"),
    ("attribute", "A red ball and a blue cube.", "A blue cube and a red ball.", "unchanged"),       # another order
    ("attribute", "A red car.", "A RED car!", "unchanged"), ("attribute", "A **red** car.", "A red car.", "unchanged"),
    ("attribute", "A car by the road.", "A red car by the road.", "added"),
    ("attribute", "A red car by the road.", "A car by the road.", "added"),
    ("attribute", "A red car is parked by the road.", "Look, what a splendid blue automobile stands there!", "style"),
    ("attribute", "A red car.", "", "added"), ("attribute", "A red car.", "A car with 3 doors.", "added"),
    ("count", "There are three birds on the wire.", "There are four birds on the wire.", "pair"),
    ("count", "There are three birds on the wire.", "There are 3 birds on the wire.", "unchanged"),
    ("count", "It cost 2,000 dollars.", "It cost 2000 dollars.", "unchanged"),
    ("count", "It is 3.50.", "It is 3.5.", "unchanged"),
    ("count", "Population 1234567.", "Population 1234568.", "pair"),
    ("count", "There are three birds.", "There are three red birds.", "unchanged"),      # not the error asked for
    ("position", "The cup stands left of the plate.", "The cup stands right of the plate.", "pair"),
    ("position", "The lamp is over the table.", "The lamp is above the table.", "unchanged"),
    ("position", "The cup stands left of the plate.", "The cup stands left of the plate.", "unchanged")])
def test_alterations(kind: str, response: str, altered: str, outcome: str) -> None:
    found = altered_pair("q", response, altered, kind)
    assert found == (SyntheticPair("q", response, altered) if outcome == "pair" else outcome)


def test_a_long_alteration_takes_bounded_time() -> None:
    start = time.perf_counter()
    for text in ("a red b " * 200_000, "1,1" * 300_000, "red " * 300_000, "1." * 500_000):
        altered_pair("q", text, text.replace("red", "blue") + "2", "attribute")
        altered_pair("q", text, text + "2", "count")
    assert time.perf_counter() - start < 10


def test_alteration_prompt() -> None:
    picture, words = {"type": "image", "image": object()}, {"type": "text", "text": "Describe {response}."}
    chat = [{"role": "user", "content": [picture, words]}]
    for kind, words in KINDS.items():
        [message] = alter_chat(chat, "A {question} red car.", kind)
        assert message["content"][0] is picture
        text = "".join(part["text"] for part in message["content"][1:])
        assert words in text and "Describe {response}." in text and text.endswith("A {question} red car.")


# ---- comparisons

def test_comparison_prompt_is_the_benchmarks() -> None:
    """The same text and pictures as `eval.py --task jsonl` shows; braces in a response stay what they are."""
    item = load_task("red", limit=1)[0]
    question = item.prompt[1]
    pair = show(Comparison("x", "jsonl", (), item.images, question=question, responses=("{second}", "5")))

    def flat(chat: list[dict]) -> tuple[str, list]:
        content = chat[0]["content"]
        return ("".join(part.get("text", "<picture>") for part in content),
                [part["image"].tobytes() for part in content if part["type"] == "image"])
    assert flat(comparison_chat(item.chat(), "{second}", "5")) == flat(pair.chat())
    assert flat(comparison_chat([{"role": "user", "content": "Why?"}], "a", "b"))[0] == COMPARISON.replace(
        "{question}", "Why?").replace("{first}", "a").replace("{second}", "b")


def shown(chat: list[dict]) -> tuple[str, str]:
    """The two answers of a comparison prompt."""
    text = "".join(part.get("text", "") for part in chat[-1]["content"])
    return re.search(r"Answer 1: (.*)\n\nAnswer 2: (.*)\n\nExplain", text).groups()


class Judge:
    """Answers comparisons by a rule (first, second) -> 1, 2 or None; remembers what it was asked."""

    def __init__(self, rule: Callable[[str, str], int | None], cut: bool = False):
        self.rule, self.cut, self.asked = rule, cut, []

    def __call__(self, chats: Chats) -> list[SimpleNamespace]:
        self.asked += map(shown, chats)
        sides = [self.rule(*shown(chat)) for chat in chats]
        return [SimpleNamespace(text=f"Hm. Answer {s} is better." if s else "Both are fine.", token_ids=(7, s or 0),
                                finish_reason="length" if self.cut else "stop") for s in sides]


def larger(a: str, b: str) -> int | None:
    return 1 if a > b else 2 if b > a else None


def question(*names: str) -> Chats:
    return [[{"role": "user", "content": name}] for name in names]


PAIRS = [SyntheticPair("a", "9", "1"), SyntheticPair("b", "2", "8"), SyntheticPair("c", "6", "5")]


def test_judgments_in_both_orders() -> None:
    judge = Judge(larger)
    judged = judge_pairs(judge, question("qa", "qb", "qc"), PAIRS)
    assert judge.asked == [("9", "1"), ("1", "9"), ("2", "8"), ("8", "2"), ("6", "5"), ("5", "6")]
    assert judged[0] == (Judgment("a", "9", "1", 1, 1, (7, 1), "Hm. Answer 1 is better."),
                         Judgment("a", "1", "9", 2, 2, (7, 2), "Hm. Answer 2 is better."))
    assert [[j.agrees for j in both] for both in judged] == [[True, True], [False, False], [True, True]]
    with pytest.raises(ValueError):
        judge_pairs(judge, question("qa"), PAIRS)


@pytest.mark.parametrize("rule, both, each", [
    (larger, ["a", "a", "c", "c"], ["a", "a", "c", "c"]),
    (lambda a, b: 1, [], ["a", "b", "c"]), (lambda a, b: 2, [], ["a", "b", "c"]),        # a judge of places
    (lambda a, b: None, [], []),
    (lambda a, b: larger(a, b) if a == "9" else None, [], ["a"]),
    (lambda a, b: 1 if a > b else None, [], ["a", "b", "c"][::2])])
def test_filter(rule: Callable, both: list[str], each: list[str]) -> None:
    """A pair is kept if both orders agree with it; a judge that always names the first answer keeps none."""
    judged = judge_pairs(Judge(rule), question("qa", "qb", "qc"), PAIRS)
    assert [j.item_id for j in kept_judgments(judged)] == both
    assert [j.item_id for j in kept_judgments(judged, both_orders=False)] == each
    assert kept_judgments(judge_pairs(Judge(rule, cut=True), question("qa", "qb", "qc"), PAIRS)) == []


@pytest.mark.parametrize("sides, most, left", [
    ((1, 2, 1, 2), 100, 2), ((1, 1, 1, 2), 100, 1), ((1, 1, 1), 100, 0), ((), 100, 0), ((2, 2, 1, 2, 1), 100, 2),
    ((1, 2, 1, 2, 1, 2), 5, 2), ((1, 2), 1, 0)])
def test_balance(sides: tuple[int, ...], most: int, left: int) -> None:
    judgments = [Judgment(str(k), "x", "y", side, side, (k,), "") for k, side in enumerate(sides)]
    found = balanced(judgments, 0, most)
    assert sorted(j.side for j in found) == [1] * left + [2] * left
    assert found == [j for j in judgments if j in found] == balanced(judgments, 0, most)


# ---- pairwise scores

@pytest.mark.parametrize("rule, texts, values", [
    (larger, ["3", "1", "2"], [1.0, 0.0, 0.5]), (larger, ["1", "2"], [0.0, 1.0]),
    (lambda a, b: 1, ["3", "1", "2"], [0.5, 0.5, 0.5]), (lambda a, b: 2, ["1", "2"], [0.5, 0.5]),
    (lambda a, b: None, ["3", "1"], [None, None]), (lambda a, b: None, ["3", "3", "1"], [None, None, None]),
    (larger, ["3", "3", "1"], [0.75, 0.75, 0.0]), (larger, ["3", "3"], [0.5, 0.5]), (larger, ["3"], [None]),
    (larger, [], []),
    (larger, ["1", "1", "1", "2"], [1 / 3, 1 / 3, 1 / 3, 1.0]),
    (lambda a, b: larger(a, b) if a == "3" else None, ["3", "1", "2"], [0.5, 0.0, 0.0]),
    (lambda a, b: larger(a, b) if "3" not in (a, b) else None, ["3", "1", "2"], [None, 0.0, 0.5])])
def test_pairwise_scores(rule: Callable, texts: list[str], values: list[float | None]) -> None:
    """The share won of 2 (K - 1) comparisons; unparsed is not won; equal texts are halves, and are not asked about."""
    judge = Judge(rule)
    [found] = pairwise_scores(judge, question("q"), [texts])
    assert [s.value for s in found] == pytest.approx(values)
    assert len(judge.asked) == len(set(judge.asked)) == len(set(texts)) * (len(set(texts)) - 1)


def test_pairwise_items_are_apart() -> None:
    found = pairwise_scores(Judge(larger, cut=True), question("a", "b", "c"), [["1", "2"], [], ["2", "1"]])
    assert found == [[Score(0.0, "0 of 2 won", True), Score(1.0, "2 of 2 won", True)], [],
                     [Score(1.0, "2 of 2 won", True), Score(0.0, "0 of 2 won", True)]]
    with pytest.raises(ValueError):
        pairwise_scores(Judge(larger), question("a"), [])


# ---- the loop

def config(out: Path, **flags: Any) -> loop.Config:
    return loop.Config(**{**FEW, "task": "red", "out": str(out), **flags})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and "checkpoints" not in path.parts and path.name != "config.json"}


@pytest.fixture(scope="module", autouse=True)
def few_items() -> Iterator[None]:
    """The demo's tasks draw thousands of pictures; the first eighty do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_task", lambda name, *rest: load_task(name, *rest, limit=None if rest[0] else 80))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("judge") / "run"
    with Ranks("cpu") as ranks:
        status = loop.main(config(out), ranks)
    assert (out / "deploy").is_dir() == (status == 0)
    return out


def test_from_the_command_line(tmp_path: Path) -> None:
    """Anyone's questions; the judge that comes of it is one that eval.py could load."""
    export_items(load_task("red", limit=40), tmp_path / "mine.jsonl")
    flags = [word for name, value in FEW.items() for word in ("--" + name.replace("_", "-"), str(value))]
    flags += ["--task", "jsonl", "--data", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, str(ROOT / "verifier.py"), *flags], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode in (0, 3), done.stderr
    assert "held-out accuracy" in done.stdout and "kept share" in done.stdout
    if done.returncode == 0:
        assert load_vlm(tmp_path / "run" / "deploy").file_dtype == torch.bfloat16


def test_summary(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert 1 <= len(summary["iterations"]) <= 2 and summary["heldout"] == "answers"
    for row in summary["iterations"]:
        for name in ("kept_share", "order_consistency", "first_position_rate", "heldout_accuracy"):
            assert row[name].keys() == {"value", "low", "high", "n"} and 0 <= row[name]["value"] <= 1, name
        assert row["trained_on"] % 2 == 0
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(summary["steps"] + 1))
    assert [row["heldout_accuracy"] for row in rows if "heldout_accuracy" in row] == [
        row["heldout_accuracy"]["value"] for row in [summary["initial"], *summary["iterations"]]]
    assert all(row["loss"] >= 0 for row in rows[1:])
    judged = [json.loads(line) for line in (whole / "pairs" / "judged-1.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (whole / "pairs" / "training.jsonl").read_text().splitlines()]
    assert len(judged) == 2 * len(pairs) and all(j["token_ids"] for j in judged)


@pytest.mark.parametrize("stop_after", [0, 1, 3, 5])
def test_resume_repeats_the_run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    """Stopped after any step, resumed: the same files, bit for bit."""
    out, rows = tmp_path / "run", []

    def log(run: Any, row: dict) -> None:
        logged(run, row)
        rows.append(row)
        if row["step"] == stop_after and len(rows) == stop_after + 1:
            os.kill(os.getpid(), signal.SIGTERM)
    logged = loop.Run.log
    monkeypatch.setattr(loop.Run, "log", log)
    with Ranks("cpu") as ranks, pytest.raises(loop.Interrupted):
        loop.main(config(out), ranks)
    assert not (out / "summary.json").exists()
    with Ranks("cpu") as ranks:
        loop.main(config(out, resume=True), ranks)
    assert files(out) == files(whole)


def test_no_answer_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Items whose answers are absent: the same training pairs as with them; held-out pairs are labelled majority's."""
    known = load_task("red", limit=80)
    for name, items in (("known", known), ("blind", [replace(item, answer=None) for item in known])):
        monkeypatch.setattr(loop, "load_task", lambda *_, items=items: items)
        with Ranks("cpu") as ranks:
            loop.main(config(tmp_path / name, iterations=1), ranks)
    for name in ("training.jsonl", "judged-1.jsonl"):
        one, other = ((tmp_path / run / "pairs" / name).read_bytes() for run in ("known", "blind"))
        assert one == other, name
    said = {name: json.loads((tmp_path / name / "summary.json").read_text())["heldout"] for name in ("known", "blind")}
    assert said == {"known": "answers", "blind": "majority"}
    assert capsys.readouterr().out.count("no held-out answer is known") == 1


def test_training_items_lose_their_answers() -> None:
    splits, known = loop.load_splits(config(Path("x")))
    assert known and all(item.answer is None for item in splits.train) and len(splits.train) == 24
    assert all(item.answer is not None for item in splits.held_out) and len(splits.held_out) == 12
    splits, _ = loop.load_splits(config(Path("x"), pairs="correct"))
    assert all(item.answer is not None for item in splits.train)


def test_a_judge_of_places_learns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture) -> None:
    """Always the first answer: no pair is kept, nothing is trained, nothing deployed; the run says so, exit 3."""
    def first(judgment: Judgment) -> Judgment:
        return replace(judgment, verdict=1)
    asked = loop.ask_judge
    monkeypatch.setattr(loop, "ask_judge", lambda *a, **k: [tuple(map(first, both)) for both in asked(*a, **k)])
    with Ranks("cpu") as ranks:
        assert loop.main(config(tmp_path / "run"), ranks) == 3
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 0 and summary["deployed"] is None and not (tmp_path / "run/deploy").exists()
    assert [row["kept_share"]["value"] for row in summary["iterations"]] == [0]
    for name, value in (("first_position_rate", 1), ("heldout_accuracy", 0.5), ("order_consistency", 0)):
        assert summary["initial"][name]["value"] == summary["iterations"][0][name]["value"] == value
    assert "nothing to train on" in capsys.readouterr().out


def test_loss_is_on_the_judgment_alone() -> None:
    """Teacher-forced log-probabilities of the sampled tokens, each predicted by what precedes it."""
    vlm = load_vlm(loop.Config().verifier)
    items = load_task("red", limit=2)
    chats = [comparison_chat(item.chat(), *sides) for item, sides in zip(items, (("3", "4"), ("11", "5")))]
    said = [vlm.processor.encode("I see 3."), vlm.processor.encode("No.\n")]
    with torch.no_grad():
        found = loop.completion_logps(vlm, chats, said)
        for chat, ids, total in zip(chats, said, found):
            text = [*chat, {"role": "assistant", "content": vlm.processor.decode(ids)}]
            batch = vlm.processor([text], add_generation_prompt=False)
            start = vlm.processor([chat]).input_ids.shape[1]
            logps = vlm(batch).log_softmax(-1)[0]
            assert batch.input_ids[0, start:start + len(ids)].tolist() == ids
            expected = sum(logps[start + k - 1, token] for k, token in enumerate(ids))
            assert torch.allclose(total, expected, atol=1e-4)


@pytest.mark.parametrize("texts, kind, expected", [
    (["a dog"] * 3, "text", False), (["a dog runs over the green lawn towards its ball"] * 3, "text", True),
    (["a dog runs over the green lawn towards its ball"] * 3, "choice", False)])
def test_open_questions(texts: list[str], kind: str, expected: bool) -> None:
    assert loop.is_open(Item("q", "jsonl", ("?",), answer_type=kind), texts) is expected


@pytest.mark.parametrize("kind, choices, text, answer", [
    ("integer", None, "The answer is 4.", "4"), ("float", None, "about 2.50", "2.5"),
    ("list", None, "[1, 2]", "[1, 2]"), ("choice", ("cat", "dog"), "(B) dog", "B"),
    ("text", None, "It is a dog", "a dog"), ("integer", None, "no idea", None)])
def test_reader(kind: str, choices: tuple | None, text: str, answer: str | None) -> None:
    """What the scorer extracts, whether or not the item's answer is known, and whatever it is."""
    item = Item("q", "jsonl", ("?",), answer_type=kind, choices=choices)
    assert loop.reader(item)(text) == answer


@pytest.mark.parametrize("flags, status, words", [
    (["--iterations", "0"], 2, "--iterations"), (["--pairs", "wrong"], 2, "--pairs"), (["--votes", "20"], 2, "--votes"),
    (["--data", "x"], 2, "--data"), (["--temperature", "0"], 2, "--temperature"), (["--unknown"], 2, "--unknown"),
    (["--task", "red", "--verifier", "/nowhere", "--held-out-items", "8"], 1, "nowhere"),
    (["--task", "jsonl", "--data", "/nowhere"], 1, "nowhere"), (["--task", "red", "--resume"], 1, "resume"),
    (["--task", "red", "--held-out-items", "5000"], 1, "too few")])
def test_bad_flags(flags: list[str], status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                   capsys: pytest.CaptureFixture) -> None:
    """One sentence, and nothing on disk."""
    found, said = said_by(monkeypatch, capsys, *flags, *(["--out", str(tmp_path / "run")] if "--task" in flags else []))
    assert found == status and words in said and len(said.strip().splitlines()) == 1, said
    assert not (tmp_path / "run").exists()


def said_by(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *flags: str) -> tuple[int, str]:
    """The exit status of verifier.py with these flags, and what it writes to stderr."""
    monkeypatch.setattr(sys, "argv", ["verifier.py", *flags])
    try:
        status = verifier.main()
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


def test_an_earlier_run_is_kept(whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    before = files(whole)
    status, said = said_by(monkeypatch, capsys, "--task", "red", "--out", str(whole))
    assert status == 2 and "--resume" in said and files(whole) == before


def test_pairs_are_no_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    row = {"id": "p", "question": "?", "images": [], "responses": ["a", "b"], "better": 1}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    flags = ("--task", "jsonl", "--data", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "run"))
    status, said = said_by(monkeypatch, capsys, *flags)
    assert status == 1 and "pairs" in said and not (tmp_path / "run").exists()


# ---- the shipped judge

def test_it_is_mediocre() -> None:
    """It answers, its verdicts are read, it does better than chance at comparing, and prefers the first place."""
    vlm, items = load_vlm(loop.Config().verifier), load_task("red", limit=60)

    def ask(chats: Chats) -> list[Any]:
        return [reply for [reply] in generate(vlm, chats, max_new_tokens=40, temperature=0)]
    right = sum(reply.text == item.answer for item, reply in zip(items, ask([item.chat() for item in items])))
    pairs = [SyntheticPair(item.id, item.answer, str(int(item.answer) + 1)) for item in items]
    judgments = [j for both in judge_pairs(ask, [item.chat() for item in items], pairs) for j in both]
    assert right >= 0.8 * len(items) and sum(j.verdict is not None for j in judgments) >= 0.95 * len(judgments)
    assert 0.5 < sum(j.agrees for j in judgments) / len(judgments) < 0.85
    assert sum(j.verdict == 1 for j in judgments) / len(judgments) > 0.6


def test_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps: the settings that are shipped, the prompt's fixed pieces one token each."""
    monkeypatch.setattr(make_tiny, "compared", lambda vlm: "")                   # it asks about hundreds of pictures
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", "--only", "judge", "--judge-answer-steps", "1", "--judge-steps", "1",
                                      "--out", str(tmp_path)])
    assert make_tiny.main() == 0
    for path in Path(loop.Config().verifier).glob("*.json"):
        assert (tmp_path / "judge" / path.name).read_bytes() == path.read_bytes(), path.name
    encode = load_vlm(tmp_path / "judge").processor.encode
    assert [len(encode(piece)) for piece in re.split(r"\{\w+\}", COMPARISON)] == [1] * 4
