"""Prompts have a length: what is refused, by all four programs and before anything is asked; what --skip-long makes of
it; that lengths are those of the prompts themselves, and cost next to nothing."""
from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import eval as ev
import gate
import judge
import train
from eval import load_task
from loop import lengths
from loop.lengths import answer_uses, fitting, verifier_uses, why_too_long
from loop.loading import processor_alone
from loop.survey import draw_twice, survey, survey_and_judge
from loop.survey_flags import SurveyConfig
from model import load_vlm
from model.images import PictureReader
from replay import Record
from tasks import Item
from tasks.pictures import FORMATS, open_image, picture_size
from tasks.splits import split_items
from tiny import CONFIGS, picture, write_checkpoint
from verifier import VERDICTS, comparison_chat, rubric_chat

TINY = Path(gate.__file__).parent / "model" / "tiny"
POSITIONS = 4096                                        # of the tiny models
LONG = "how many words are there " * 40                 # 1,000 bytes and characters


def flags(**changes: Any) -> SimpleNamespace:
    values = {"max_prompt_tokens": None, "max_new_tokens": 16, "verdict_tokens": 16, "min_pixels": None,
              "max_pixels": None}
    return SimpleNamespace(**values | changes)


def encoded(width: int, height: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(width, height).save(file, form)
    return file.getvalue()


def item(name: str, text: str, *pictures: bytes | Path) -> Item:
    return Item(name, "jsonl", (*range(len(pictures)), text), pictures, "1", "integer")


def write_items(path: Path, *texts: str) -> Path:
    """Items "q0", "q1", .. with these questions, all answered by 1."""
    rows = []
    for number, text in enumerate(texts):
        rows.append({"id": f"q{number}", "question": text, "images": [], "choices": None, "answer": "1",
                     "answer_type": "integer", "precision": None})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompt_length(folder: Path, chat: list[dict]) -> int:
    """As the model's own processor has it."""
    return load_vlm(folder).processor([chat]).input_ids.shape[1]


# ---- refused

def run_train(data: Path, out: Path, *words: str) -> int:
    return with_arguments(train.cli, "train.py", "--task", "jsonl", "--data", data, "--out", out, *words)


def run_judge(data: Path, out: Path, *words: str) -> int:
    return with_arguments(judge.cli, "judge.py", "--task", "jsonl", "--data", data, "--out", out, *words)


def run_eval(data: Path, out: Path, *words: str) -> int:
    arguments = ["--model", TINY / "student", "--task", "jsonl", "--data", data, "--out", out, *words]
    return ev.main([str(word) for word in arguments])


def run_gate(data: Path, out: Path, *words: str) -> int:
    arguments = ["--student", TINY / "student", "--verifier", TINY / "verifier", "--task", "jsonl", "--data", data,
                 "--k", 2, "--max-new-tokens", 4, "--verdict-tokens", 4, "--out", out / "report.json", *words]
    return gate.main([str(word) for word in arguments])


def with_arguments(cli: Callable[[], int], *words: Any) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(word) for word in words])
        patch.setattr("signal.signal", lambda *_: None)
        return cli()


PROGRAMS = [run_train, run_judge, run_eval, run_gate]


def no_model(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was loaded or asked")


@pytest.mark.parametrize("run", PROGRAMS)
@pytest.mark.parametrize("words, text, limit", [
    (["--max-prompt-tokens", "100"], LONG, "the limit is 100 "),
    ([], "how many? " * 100_000, "the limit is ")], ids=["flag", "a megabyte"])
def test_a_long_item_is_refused(run: Callable, words: list[str], text: str, limit: str, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """In one sentence with its id, its length and the limit. Nothing is asked, no weight is read, nothing written."""
    for place in ("model.load_weights", "model.sampler.packed_batches"):
        monkeypatch.setattr(place, no_model)
    data = write_items(tmp_path / "items.jsonl", "how many?", text, "how many?")
    started = time.process_time()
    assert run(data, tmp_path / "out", "--device", "cpu", *words) != 0
    assert time.process_time() - started < 30

    said = capsys.readouterr().err.splitlines()[-1]
    assert "item 'q1': its prompt " in said and limit in said and "--skip-long" in said and len(said) < 600
    assert int(said.split(" has ")[1].split(" tokens")[0]) >= 500
    assert [path.name for path in tmp_path.iterdir()] == ["items.jsonl"]


def test_the_limit_itself_fits() -> None:
    """To the token; a verdict's prompt counts with the longest candidates that it can be given."""
    question = item("q", LONG)
    chat = question.chat()
    plain = prompt_length(TINY / "student", chat)
    rubric = prompt_length(TINY / "student", rubric_chat(chat, "")) + 16
    comparison = prompt_length(TINY / "student", comparison_chat(chat, "", "")) + 32
    assert plain < rubric < comparison
    for length, uses in ((plain, lambda cfg: answer_uses(TINY / "student", cfg)),
                         (rubric, lambda cfg: verifier_uses(TINY / "student", cfg, "json")),
                         (rubric, lambda cfg: verifier_uses(TINY / "student", cfg, "logits")),
                         (comparison, lambda cfg: verifier_uses(TINY / "student", cfg, "pairwise"))):
        assert why_too_long(question, uses(flags(max_prompt_tokens=length))) is None
        fault = why_too_long(question, uses(flags(max_prompt_tokens=length - 1)))
        assert f"has {length} tokens, the limit is {length - 1}" in fault
    assert lengths.VERDICT_KINDS.keys() == VERDICTS.keys()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_default_is_what_the_model_has_room_for(family: str, tmp_path: Path) -> None:
    """In files that hold the text's fields apart, and in flat ones."""
    config = CONFIGS[family]()
    write_checkpoint(tmp_path, config)
    assert [use.limit for use in answer_uses(tmp_path, flags(max_new_tokens=100))] == [POSITIONS - 100]
    assert [use.limit for use in verifier_uses(tmp_path, flags(verdict_tokens=7), "json")] == [POSITIONS - 16,
                                                                                              POSITIONS - 7]
    with pytest.raises(ValueError, match="--max-new-tokens 4096 leaves no room for a prompt"):
        answer_uses(tmp_path, flags(max_new_tokens=POSITIONS))
    assert [use.limit for use in answer_uses(tmp_path, flags(max_prompt_tokens=9999))] == [9999]

    text = config.get("text_config", config)
    for value, outcome in (("many", "max_position_embeddings is 'many'"), (0, "is 0"), (True, "is True"), (None, None)):
        text["max_position_embeddings"] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        if outcome:
            with pytest.raises(ValueError, match=outcome):
                answer_uses(tmp_path, flags())
        else:
            assert answer_uses(tmp_path, flags()) == []                 # not said: no limit
            assert answer_uses(tmp_path, flags(max_prompt_tokens=5))[0].limit == 5


# ---- left out

def test_splits_hold_no_long_items(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """train.py and judge.py: in no split, said once. Where none is long the splits are what they always were."""
    texts = [f"how many, {number}?" for number in range(30)]
    short = load_task("jsonl", write_items(tmp_path / "short.jsonl", *texts))
    texts[3] = texts[20] = LONG
    data = write_items(tmp_path / "long.jsonl", *texts)
    sizes = {"gate_items": 5, "watch_items": 4, "held_out_items": 6}
    for skip in (False, True):
        cfg = train.Config(task="jsonl", data=str(tmp_path / "short.jsonl"), skip_long=skip, **sizes)
        assert train.load_splits(cfg) == split_items(short, 5, 4, 6, seed=0)
    assert not capsys.readouterr().out

    cfg = train.Config(task="jsonl", data=str(data), skip_long=True, max_prompt_tokens=300, **sizes)
    splits = train.load_splits(cfg)
    ids = [one.id for part in (splits.gate, splits.watch, splits.held_out, splits.train) for one in part]
    assert sorted(ids) == sorted({f"q{number}" for number in range(30)} - {"q3", "q20"})
    assert capsys.readouterr().out.count("2 of 30 items are too long and left out, the first: item 'q3'") == 1

    judged, _ = judge.load_splits(judge.Config(task="jsonl", data=str(data), items=99, held_out_items=6, skip_long=True,
                                               max_prompt_tokens=400))
    assert len(judged.train) == 22 and {"q3", "q20"}.isdisjoint(one.id for one in judged.train + judged.held_out)


def test_one_rank_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RANK", "1")
    uses = answer_uses(TINY / "student", flags(max_prompt_tokens=50))
    assert [one.id for one in fitting([item("a", LONG), item("b", "how?")], uses, skip=True)] == ["b"]
    said = capsys.readouterr()
    assert not said.out and not said.err


def test_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`| head`: what is said of items that were left out is dropped, and the work goes on."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    uses = answer_uses(TINY / "student", flags(max_prompt_tokens=50))
    with os.fdopen(write_end, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert [one.id for one in fitting([item("a", LONG), item("b", "how?")], uses, skip=True)] == ["b"]


def test_nothing_fits() -> None:
    uses = answer_uses(TINY / "student", flags(max_prompt_tokens=50))
    with pytest.raises(ValueError, match="none of 2 items fits: item 'a': its prompt has"):
        fitting([item("a", LONG), item("b", LONG)], uses, skip=True)


def test_eval_counts_it_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_items(tmp_path / "items.jsonl", "how many?", LONG, "how many then?")
    out = tmp_path / "out"
    for _ in range(2):                                                  # again: the answers on disk are enough
        assert run_eval(data, out, "--device", "cpu", "--max-new-tokens", 4, "--max-prompt-tokens", 100,
                        "--skip-long") == 0
        assert capsys.readouterr().out.count("1 of 3 items are too long and left out") == 1
    report = json.loads((out / "report.json").read_text())
    assert report["too_long"] == 1 and report["accuracy"]["n"] == 3 and report["mean_tokens"] > 0
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    told = {name: answers[1][name] for name in ("id", "response", "correct", "finish_reason", "tokens")}
    assert told == {"id": "q1", "response": "", "correct": False, "finish_reason": "too_long", "tokens": None}
    asked = [json.loads(line)["id"] for line in (out / "responses.jsonl").read_text().splitlines()]
    assert asked == ["q0", "q2"]


def test_gate_counts_it_wrong(tmp_path: Path) -> None:
    data = write_items(tmp_path / "items.jsonl", "how many?", LONG, "how many then?")
    assert run_gate(data, tmp_path, "--device", "cpu", "--max-prompt-tokens", 300, "--skip-long") in (0, 3)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["too_long"] == 1 and report["items"] == 3 and report["records"] == 6


@pytest.mark.parametrize("verifiers, skip, refused", [(2, False, True), (2, True, False), (1, False, False)])
def test_items_for_a_second_look_fit(verifiers: int, skip: bool, refused: bool, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of several is measured again on fresh items: too long ones are found before anything is asked."""
    asked = []

    def stop(*_: Any) -> None:
        asked.append(1)
        raise KeyError
    monkeypatch.setattr("loop.survey.survey", stop)
    data = write_items(tmp_path / "items.jsonl", "how many?", LONG)
    cfg = SurveyConfig(
        student=str(TINY / "student"), verifier=[str(TINY / "verifier"), str(TINY / "judge")][:verifiers], task="jsonl",
        data=str(data), items=1, seed=1, skip_long=skip, max_prompt_tokens=300)
    assert [one.id for one in draw_twice(load_task("jsonl", data), cfg)[1]] == ["q1"]
    with pytest.raises(ValueError if refused else KeyError, match="item 'q1': its prompt has" if refused else None):
        survey_and_judge(cfg, gate.Config(out=str(tmp_path / "report.json")), lambda *_: ({}, {}))
    assert len(asked) == (not refused)


def test_a_verifier_with_less_room(tmp_path: Path) -> None:
    """What it cannot be asked about counts as wrong for it, not for the others."""
    small = tmp_path / "small"
    shutil.copytree(TINY / "verifier", small)
    config = json.loads((small / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 300
    (small / "config.json").write_text(json.dumps(config))
    data = write_items(tmp_path / "items.jsonl", "how many?", LONG)
    cfg = SurveyConfig(
        student=str(TINY / "student"), verifier=[str(TINY / "verifier"), str(small)], task="jsonl", data=str(data), k=2,
        max_new_tokens=4, verdict_tokens=4, device="cpu", skip_long=True)
    wide, narrow = survey(cfg, load_task("jsonl", data), tmp_path / "cache").values()
    assert (wide.measures["too_long"], narrow.measures["too_long"]) == (0, 1)

    def of_long(records: list[Record]) -> list[Record]:
        return [record for record in records if record["item"] == "q1"]
    for one, other in zip(wide.records, narrow.records, strict=True):
        assert one["text"] == other["text"] and one["greedy_correct"] == other["greedy_correct"]
    assert len(of_long(wide.records)) == 2
    for record in of_long(narrow.records):
        assert record["score"] is None and not record["own_correct"] and not record["own_parsed"]
        assert record["greedy_parsed"] == of_long(wide.records)[0]["greedy_parsed"]


# ---- counted

SIZES = [(28, 28), (30, 40), (300, 20), (57, 91), (200, 333)]


@pytest.mark.parametrize("family", CONFIGS)
def test_lengths_are_those_of_the_prompts(family: str, tmp_path: Path) -> None:
    """Of texts in several scripts, with pictures in several places and sizes; the bound is never below."""
    processor = load_vlm(write_checkpoint(tmp_path, CONFIGS[family]())).processor
    pictures = [encoded(*size) for size in SIZES]
    items = [item("plain", "how many? <|im_end|>"), item("empty", ""), item("all", "漢字 e\u0301 😀\n\n", *pictures),
             Item("between", "jsonl", ("a", 0, 1, "b\u0958", 2, "c"), tuple(pictures[:3]), "1")]
    for limits in ((None, None), (None, 1500), (2000, 9000)):
        if family != "mllama":
            processor.limit_pixels(*limits)
        for one in items:
            for kind in (lengths.QUESTION, lengths.RUBRIC, lengths.COMPARISON):
                frame = kind.frame
                length = processor([frame(one.chat())]).input_ids.shape[1]
                assert processor.count_tokens(frame(one.lazy_chat())) == length
                assert processor.most_tokens(frame(one.lazy_chat())) >= length


@pytest.mark.parametrize("name", ["student", "judge"])
def test_the_bound_holds_where_normalization_adds_bytes(name: str) -> None:
    """The tiny models' tokenizers normalize (NFC) and take unknown characters apart into bytes."""
    processor, _ = processor_alone(TINY / name)
    for text in ("\u0958" * 50, "\U0001d160" * 50, "漢" * 50, "é" * 50, "\ufb2c" * 50, "a" * 50, "<|im_end|>" * 9):
        chat = item("a", text).lazy_chat()
        assert processor.count_tokens(chat) <= processor.most_tokens(chat)


@pytest.mark.parametrize("form", FORMATS)
def test_sizes_come_from_headers(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bytes and of files; no pixel is decoded."""
    path = tmp_path / "picture"
    path.write_bytes(encoded(40, 30, form))
    assert open_image(path).size == (40, 30)

    def decode(*_: Any) -> None:
        raise AssertionError("a picture was decoded")
    for owner in (Image.Image, *(type(Image.open(path)),)):
        monkeypatch.setattr(owner, "load", decode)
    assert picture_size(path) == picture_size(path.read_bytes()) == (40, 30)


def test_no_picture_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*_: Any) -> None:
        raise AssertionError("a picture was prepared")
    monkeypatch.setattr(PictureReader, "__call__", prepare)
    monkeypatch.setattr(Image.Image, "convert", prepare)
    items = load_task("bar", limit=20)
    uses = verifier_uses(TINY / "verifier", flags(), "json")
    assert fitting(items, uses, skip=False) == items


@pytest.mark.parametrize("bad, told", [
    (item("bad", "x", b"no picture"), "cannot decode a picture"),
    (item("bad", "x", encoded(900, 2)), "item 'bad': a picture of 900 x 2 is too elongated"),
    (item("bad", "x\ud800"), "item 'bad': 'utf-8' codec can't encode")], ids=["damaged", "elongated", "surrogate"])
def test_what_cannot_be_asked_is_named(bad: Item, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        fitting([item("good", "x"), bad], answer_uses(TINY / "student", flags()), skip=True)


# ---- what it costs

def test_short_prompts_are_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = answer_uses(TINY / "student", flags()) + verifier_uses(TINY / "verifier", flags(), "json")

    def encode(text: str) -> list[int]:
        raise AssertionError(text)
    for use in uses:
        monkeypatch.setattr(use.processor, "encode", encode)
    items = load_task("bar", limit=50)
    assert fitting(items, uses, skip=False) == items


@pytest.mark.parametrize("unit", ["how many words? ", "x", "7", " ", "<|im_end|>", "\n ", "漢字"])
def test_tokenizing_is_linear(unit: str) -> None:
    """Twice the text takes about twice the time; the best of several tries, for others use the machine too."""
    processor, _ = processor_alone(TINY / "student")

    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        best = float("inf")
        for _ in range(7):
            started = time.process_time()
            processor._encode(text)
            best = min(best, time.process_time() - started)
        return best
    assert seconds(60_000) < 3.5 * seconds(30_000)
