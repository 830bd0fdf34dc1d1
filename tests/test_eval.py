"""eval.py: figures by hand, the command line, answers from elsewhere, and asking a model that can be interrupted."""
from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

import eval as ev
import gate
from locks import held_elsewhere
from tasks import Item
from tasks.jsonl import Response

ROOT = Path(__file__).parents[1]


def choice(name: str, answer: str | None = "a dog", **group: str) -> Item:
    return Item(name, "blink", ("?",), answer=answer, answer_type="choice", choices=("a dog", "a cat"), group=group)


def answered(items: list[Item], texts: list[str], **more: object) -> list[ev.Answer]:
    return ev.score_answers(items, [Response(text, **more) for text in texts])


def close(figure: dict, value: float, n: int) -> bool:
    assert figure["low"] <= figure["value"] <= figure["high"] and figure["low"] < figure["high"]
    return abs(figure["value"] - value) < 1e-12 and figure["n"] == n


# ---- figures

@pytest.mark.parametrize("right, n", [(0, 10), (10, 10), (1, 1), (5, 10), (81, 263), (0, 0)])
def test_a_share_of_items_has_the_exact_interval(right, n):
    outcomes = [True] * right + [None] * 3 + [False] * (n - right)
    assert ev.share(outcomes) == gate.proportion(right, n)


def test_a_share_of_nothing():
    nothing = {"value": None, "low": 0.0, "high": 1.0, "n": 0}
    assert ev.share([None, None]) == ev.share([None, None], verdicts=2) == ev.accuracy([]) == nothing
    assert ev.table_line("x", nothing).split() == ["x", "-"]


def test_verdicts_of_a_pair_are_not_independent():
    outcomes = [True, True, False, None, True, False, None, None] * 10
    assert ev.share(outcomes, verdicts=2) == gate.clustered_ratio([(2, 2), (0, 1), (1, 2), (0, 0)] * 10)
    both = [True, True, False, False] * 20                     # both orders agree: 40 pairs, not 80 verdicts
    wide, narrow = ev.accuracy(both, verdicts=2), ev.share(both)
    assert wide["n"] == 40 and wide["value"] == narrow["value"] == 0.5 and wide["low"] < narrow["low"] < 0.5


def test_report():
    items = [choice(str(k), sub_task="x" if k < 3 else "y") for k in range(4)]
    answers = answered(items, ["A", "B", "A", "who knows"], token_ids=(1, 2), finish_reason="stop")
    answers[3] = ev.Answer("3", "who knows", None, False, "length", 6)
    figures = ev.report(items, answers)
    assert close(figures["accuracy"], 0.5, 4) and close(figures["parse_rate"], 0.75, 4)
    assert close(figures["truncation_rate"], 0.25, 4) and figures["mean_tokens"] == 3.0
    assert close(figures["groups"]["sub_task"]["x"], 2 / 3, 3) and close(figures["groups"]["sub_task"]["y"], 0, 1)
    assert close(figures["macro"], 1 / 3, 4) and figures["official"] == figures["macro"]     # BLINK publishes the mean
    assert "by sub_task" in ev.table(figures) and json.dumps(figures)


def test_unknown_lengths_stay_unknown():
    items = [choice("1")]
    figures = ev.report(items, answered(items, ["A"]))
    assert figures["mean_tokens"] is None and figures["truncation_rate"] == gate.proportion(0, 0)
    assert "macro" not in figures and "truncation_rate" in ev.table(figures)


def test_an_item_counts_for_each_of_its_skills():
    items = [Item(str(k), "mathvista", ("?",), answer="5", answer_type="integer", group={"skills": skills})
             for k, skills in enumerate((["algebra", "logic"], ["logic"], []))]
    groups = ev.report(items, answered(items, ["5", "6", "5"]))["groups"]["skills"]
    assert close(groups["algebra"], 1, 1) and close(groups["logic"], 0.5, 2)


def test_items_and_answers_that_do_not_belong_together():
    items = [choice("1"), choice("2")]
    with pytest.raises(ValueError):
        ev.score_answers(items, [Response("A")])
    with pytest.raises(ValueError, match="do not belong together"):
        ev.report(items, answered(items[::-1], ["A", "A"]))


# ---- judges

def pairs(n: int, better: list[int]) -> list[Item]:
    names = ["RLHF-1", "mathverse_1", "svit-1", "RLHF-2", "mmmu_7", "wildvision-1"]
    return [ev.make_item("vl_rewardbench", {"id": names[k], "query": "?", "response": [f"a dog {k}", f"a cat {k}"],
                                            "human_ranking": [better[k] - 1, 2 - better[k]]}) for k in range(n)]


def judged(items: list[Item], judge) -> dict:
    both = ev.both_orders(items)
    return ev.report(both, answered(both, [judge(item) for item in both]))


@pytest.mark.parametrize("word", ["1", "2", "[[A]]", "Overall Judgment: Answer 2 is better."])
@pytest.mark.parametrize("better", [[1] * 6, [2] * 6, [1, 2, 1, 1, 2, 2]])
def test_a_constant_judge_gets_exactly_one_half(word, better):
    figures = judged(pairs(6, better), lambda item: word)
    assert close(figures["accuracy"], 0.5, 6) and figures["accuracy"]["value"] == 0.5
    assert close(figures["both_orders_accuracy"], 0, 6) and close(figures["consistency"], 0, 6)
    assert close(figures["first_position_rate"], float(word in ("1", "[[A]]")), 12) and close(figures["macro"], 0.5, 6)
    assert all(f["value"] == 0.5 for f in figures["groups"]["group"].values())
    assert close(figures["unparsed_rate"], 0, 12)


def test_a_judge_that_looks_at_the_responses():
    perfect = judged(pairs(4, [1, 2, 1, 1]), lambda item: item.answer)
    assert all(close(perfect[m], 1, 4) for m in ("accuracy", "both_orders_accuracy", "consistency", "macro"))
    likes_cats = judged(pairs(4, [1, 2, 1, 1]), lambda item: "1" if "cat" in item.choices[0] else "2")
    assert close(likes_cats["accuracy"], 0.25, 4) and close(likes_cats["consistency"], 1, 4)
    assert close(likes_cats["first_position_rate"], 0.5, 8)
    groups = likes_cats["groups"]["group"]
    assert {name: f["n"] for name, f in groups.items()} == {"general": 1, "hallucination": 2, "reasoning": 1}
    assert close(likes_cats["macro"], 1 / 3, 4) and close(likes_cats["official"], 0.25, 4)


def test_ties_stay_in_the_denominator():
    figures = judged(pairs(4, [1] * 4), lambda item: item.answer if item.swapped else "Both are equally good: [[C]]")
    assert close(figures["accuracy"], 0.5, 4) and close(figures["both_orders_accuracy"], 0, 4)
    assert close(figures["consistency"], 0, 4) and close(figures["unparsed_rate"], 0.5, 8)
    assert close(figures["first_position_rate"], 0, 4) and close(figures["parse_rate"], 0.5, 8)


def test_pairs_in_one_order_are_not_reported():
    items = pairs(2, [1, 1])
    with pytest.raises(ValueError, match="both orders"):
        ev.report(items, answered(items, ["1", "1"]))


# ---- the command line

@pytest.fixture
def task(tmp_path) -> Path:
    path = tmp_path / "task.jsonl"
    rows = [{"id": str(k), "question": f"{k} + 1?", "images": [], "choices": None, "answer": str(k + 1),
             "answer_type": "integer",
             "precision": None, "group": {"half": "low" if k < 3 else "high"}} for k in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_responses(path: Path, *rows: tuple) -> Path:
    keys = ("id", "response", "finish_reason", "tokens")
    path.write_text("".join(json.dumps(dict(zip(keys, row))) + "\n" for row in rows))
    return path


def run(*arguments: object) -> int:
    try:
        return ev.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("arguments, message", [
    (["--task", "mmmu"], "exactly one of --model, --responses and --export"), (["--model", "m"], "--task is missing"),
    (["--task", "mmlu", "--model", "m"], "mmlu"),
    (["--task", "bar", "--model", "m", "--limit", "0"], "--limit must be at least 1, not 0"),
    (["--task", "bar", "--model", "m", "--batch-size", "-1"], "--batch-size"),
    (["--task", "bar", "--model", "m", "--colour"], "--colour"),
    (["--task", "bar", "--model", "m", "--responses", "r"], "exactly one"),
    (["--task", "bar", "--model", "m", "--limit", "x"], "'x'"),
    (["--task", "bar", "--export", "e", "--out", "o"], "leave out --out"),
    (["--task", "bar", "--export", ""], "exactly one"),
    (["--task", "mmmu", "--model", "m"], "give --data"),
    (["--task", "mmmu", "--model", "m", "--data", "gone"], "gone does not exist"),
    (["--task", "bar", "--responses", "gone.jsonl"], "cannot read gone.jsonl")])
def test_usage_errors(arguments, message, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error


def test_responses_without_torch_or_a_model(task, tmp_path):
    responses = write_responses(tmp_path / "r.jsonl", ("0", "1", "stop"), ("1", "The answer is 2.", "stop"), ("2", "4"),
                                ("3", "I cannot tell", "length"), ("4", "<think>5</think> 5"))
    script = ("import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'tqdm', 'pyarrow', 'transformers')));"
              "import eval; sys.exit(eval.main())")
    done = subprocess.run([sys.executable, "-c", script, "--task", "jsonl", "--data", task, "--responses", responses,
                           "--out", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    assert close(figures["accuracy"], 0.6, 5) and close(figures["parse_rate"], 0.8, 5)
    assert close(figures["truncation_rate"], 1 / 3, 3) and close(figures["groups"]["half"]["high"], 0.5, 2)
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert rows[1] == {"id": "1", "prompt": "1 + 1?\nAnswer with a whole number.", "response": "The answer is 2.",
                       "extracted": "2", "answer": "2", "correct": True, "finish_reason": "stop", "tokens": None}
    assert "accuracy" in done.stdout and "60.0" in done.stdout


def test_out_may_name_the_report(task, tmp_path):
    responses = write_responses(tmp_path / "r.jsonl", *((str(k), "0") for k in range(5)))
    assert run("--task", "jsonl", "--data", task, "--responses", responses, "--out", tmp_path / "x" / "a.json") == 0
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["a.answers.jsonl", "a.html", "a.json"]
    assert run("--task", "jsonl", "--data", task, "--responses", responses, "--out", responses) == 2


@pytest.mark.parametrize("arguments, message", [
    (["--export", "task.jsonl"], "task.jsonl is the file of --data"),
    (["--export", "link.jsonl"], "link.jsonl is the file of --data"),
    (["--export", "folder"], "folder is a folder"),
    (["--data", "items.json", "--responses", "answers.jsonl", "--out", "items.json"], "the file of --data"),
    (["--responses", "answers.json", "--out", "answers.json"], "answers.json is the file of --responses"),
    (["--responses", "answers.jsonl", "--out", "."], "answers.jsonl is the file of --responses"),
    (["--responses", "answers.jsonl", "--out", "folder.json"], "folder.json is a folder"),
    (["--data", "responses.jsonl", "--model", "m", "--out", "."], "responses.jsonl is the file of --data"),
    (["--model", ".", "--out", "."], "config.json is the file of --model")])
def test_what_is_read_is_not_replaced(arguments, message, task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("items.json", "responses.jsonl", "config.json"):
        (tmp_path / name).write_bytes(task.read_bytes())
    write_responses(tmp_path / "answers.jsonl", *((str(k), "0") for k in range(5)))
    (tmp_path / "answers.json").write_bytes((tmp_path / "answers.jsonl").read_bytes())
    (tmp_path / "link.jsonl").symlink_to(task)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.json").mkdir()
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    assert run("--task", "jsonl", *(["--data", "task.jsonl"] * ("--data" not in arguments)), *arguments) == 2
    assert message in capsys.readouterr().err
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_answers_of_a_model_can_be_scored_again_in_their_folder(task, tmp_path):
    responses = write_responses(tmp_path / "responses.jsonl", *((str(k), "0", "stop", 1) for k in range(5)))
    assert run("--task", "jsonl", "--data", task, "--responses", responses, "--out", tmp_path) == 0
    assert json.loads((tmp_path / "report.json").read_text())["mean_tokens"] == 1 and responses.exists()


ALL = [(str(k), "0") for k in range(5)]


@pytest.mark.parametrize("rows, message", [
    (ALL[:3], "no response for 2 of 5 questions, first '3'"),
    ([*ALL, ("0", "1")], "line 6: a second response for item '0'"),
    ([*ALL, ("9", "1")], "line 6: the task has no item '9'"), ([("0", None), *ALL[1:]], "line 1: needs"),
    ([(None, "0")], "line 1: needs"), ([(True, "0")], "line 1: needs"),
    ([("0", "0", 5)], "line 1: finish_reason is 5"), ([("0", "0", ["stop"])], "line 1: finish_reason is ['stop']"),
    *(([("0", "0", None, n)], f"line 1: tokens is {n!r}") for n in (-1, True, 2.5, "3", 2 ** 31, 10 ** 30))])
def test_bad_responses(rows, message, task, tmp_path, capsys):
    responses = write_responses(tmp_path / "r.jsonl", *rows)
    assert run("--task", "jsonl", "--data", task, "--responses", responses) == 2
    assert message in capsys.readouterr().err


def test_limit_takes_the_first_items_and_their_responses(task, tmp_path):
    responses = write_responses(tmp_path / "r.jsonl", *ALL)
    assert run("--task", "jsonl", "--data", task, "--responses", responses, "--limit", 2, "--out", tmp_path / "o") == 0
    assert json.loads((tmp_path / "o" / "report.json").read_text())["accuracy"]["n"] == 2


def test_responses_of_a_judge_come_in_both_orders(tmp_path, capsys):
    task = tmp_path / "pairs.jsonl"
    task.write_text(json.dumps({"id": 1, "question": "?", "images": [], "responses": ["a", "b"], "better": 2}) + "\n")
    responses = tmp_path / "r.jsonl"
    rows = [{"id": 1, "response": "[[B]]"}, {"id": "1", "response": "[[A]]", "swapped": True}]
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--task", "jsonl", "--data", task, "--responses", responses, "--out", tmp_path / "o.json") == 0
    assert json.loads((tmp_path / "o.json").read_text())["both_orders_accuracy"]["value"] == 1.0
    responses.write_text(json.dumps(rows[0]) + "\n")
    assert run("--task", "jsonl", "--data", task, "--responses", responses) == 2
    assert 'first \'1\' with "swapped": true' in capsys.readouterr().err


def test_hidden_answers_are_refused_but_exported(task, tmp_path, capsys):
    row = json.loads(task.read_text().splitlines()[0])
    task.write_text(task.read_text() + json.dumps({**row, "id": "h", "answer": None}) + "\n")
    assert run("--task", "jsonl", "--data", task, "--model", "m") == 2
    assert "1 of 6 answers are not known (first: 'h')" in capsys.readouterr().err
    assert run("--task", "jsonl", "--data", task, "--export", tmp_path / "e.jsonl") == 0
    assert len(ev.load_task("jsonl", tmp_path / "e.jsonl")) == 6


# ---- asking a model

@dataclass(frozen=True)
class Completion:
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A stand-in for the model package: it answers k + 1, remembers what it was asked and may break down."""
    pytest.importorskip("torch")
    pytest.importorskip("tqdm")
    monkeypatch.chdir(tmp_path)
    stub = types.SimpleNamespace()
    stub.asked, stub.loaded, stub.breaks_after = [], [], 10 ** 9

    def generate(vlm, chats, n, max_new_tokens, temperature, seed):
        assert vlm is stub.vlm and n == 1 and temperature == 0.0
        if len(stub.asked) + len(chats) > stub.breaks_after:
            raise KeyboardInterrupt
        texts = [chat[0]["content"][-1]["text"] for chat in chats]
        stub.asked += texts
        return [[Completion((1, 2, 3), str(int(text[0]) + 1), "stop")] for text in texts]

    def load_vlm(path, device, dtype):
        stub.loaded.append((path, str(device), str(dtype)))
        stub.vlm.requires_grad_ = lambda wanted: stub.vlm
        return stub.vlm
    stub.generate, stub.load_vlm = generate, load_vlm
    stub.limits = []
    processor = types.SimpleNamespace(limit_pixels=lambda *limits: stub.limits.append(limits))
    stub.vlm = types.SimpleNamespace(processor=processor, prepare=lambda chats: None)
    monkeypatch.setattr("loop.lengths.processor_alone", lambda *_: (None, None))         # no limit to prompts is known
    monkeypatch.setattr("model.generate", lambda *asked, **how: stub.generate(*asked, **how))
    monkeypatch.setattr("model.load_vlm", lambda *asked, **how: stub.load_vlm(*asked, **how))
    return stub


def test_a_model_is_asked_and_scored(task, model, tmp_path, capsys):
    assert run("--task", "jsonl", "--data", task, "--model", "m", "--device", "cpu", "--out", tmp_path / "o") == 0
    figures = json.loads((tmp_path / "o" / "report.json").read_text())
    assert figures["accuracy"]["value"] == 1.0 and figures["mean_tokens"] == 3.0 and len(model.asked) == 5
    assert model.loaded == [("m", "cpu", "torch.float32")]
    assert figures == {**figures, "truncation_rate": gate.proportion(0, 5)}
    assert run("--task", "jsonl", "--data", task, "--responses", tmp_path / "o" / "responses.jsonl") == 0
    captured = capsys.readouterr()
    assert captured.out.count("accuracy") == 2 and "5/5" in captured.err


def test_pictures_within_limits(task, model, tmp_path, capsys):
    """The model is told the limits before it is asked; answers under other limits are not mixed in."""
    command = ["--task", "jsonl", "--data", task, "--model", "m", "--out", tmp_path / "o"]
    assert run(*command, "--max-pixels", 5000, "--feature-cache-gb", 0.5) == 0
    assert model.limits == [(None, 5000)] and model.vlm.feature_cache.max_bytes == 500_000_000
    assert run(*command, "--max-pixels", 6000) == 2
    assert "max_pixels was 5000, is 6000" in capsys.readouterr().err and len(model.asked) == 5
    assert run(*command, "--max-pixels", 6000, "--min-pixels", 7000) == 2
    assert "--min-pixels 7000 is above --max-pixels 6000" in capsys.readouterr().err


def test_an_interrupted_run_asks_only_for_the_rest(task, model, tmp_path):
    command = ["--task", "jsonl", "--data", task, "--model", "m", "--batch-size", 2, "--out", tmp_path / "o"]
    model.breaks_after = 4
    with pytest.raises(KeyboardInterrupt):
        ev.main([str(a) for a in command])
    file = tmp_path / "o" / "responses.jsonl"
    assert len(file.read_text().splitlines()) == 4 and not (tmp_path / "o" / "report.json").exists()
    file.write_text(file.read_text() + '{"id": "4", "resp')               # killed while it wrote
    model.breaks_after = 10 ** 9
    assert run(*command) == 0 and len(model.asked) == 5
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["0", "1", "2", "3", "4"]
    assert run(*command) == 0 and len(model.asked) == 5
    assert json.loads((tmp_path / "o" / "report.json").read_text())["accuracy"]["value"] == 1.0


@pytest.mark.parametrize("out, written", [
    ("data/o", "data/o/responses.jsonl"), ("data/x.json", "data/x.answers.jsonl"), (None, "runs/eval/m/report.json")])
def test_what_a_run_writes_is_not_its_data(out, written, tmp_path, monkeypatch):
    """Below --data, too: a run that goes on would otherwise take its own answers for changed data."""
    monkeypatch.chdir(tmp_path)
    data = "." if out is None else "data"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part.parquet").write_text("rows")
    cfg = ev.Config(task="mmmu", model="m", data=data, out=out)
    before = ev.settings(cfg)
    (tmp_path / written).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / written).write_text("answers")
    assert ev.settings(cfg) == before
    (tmp_path / "data" / "more.parquet").write_text("rows")
    assert ev.settings(cfg) != before


def test_half_a_line_is_cut_off(task, model, tmp_path):
    """The file is cut where it lies, not written again: what was answered is on the disk at every moment."""
    command = ["--task", "jsonl", "--data", task, "--model", "m", "--out", tmp_path / "o"]
    assert run(*command) == 0
    file = tmp_path / "o" / "responses.jsonl"
    whole, node = file.read_text(), file.stat().st_ino
    for half in ('{"id": "4", "resp', "{"):
        file.write_text(whole + half)
        assert run(*command) == 0
        assert file.read_text() == whole and file.stat().st_ino == node
    assert len(model.asked) == 5


@pytest.mark.parametrize("out, lock", [("o", "o/.lock"), ("o/x.json", "o/.x.lock"), (None, "runs/eval/*/.lock")])
def test_one_process_asks_for_one_report(task, model, tmp_path, capsys, out, lock):
    """A second one is refused before it reads a response or loads a model; the lock leaves with the first."""
    command = ["--task", "jsonl", "--data", task, "--model", "m", *(["--out", tmp_path / out] if out else [])]
    assert run(*command) == 0
    [folder] = tmp_path.glob(lock.rpartition("/")[0])
    [file] = folder.glob("*responses.jsonl")
    file.write_text(file.read_text()[:-9])
    del model.asked[:], model.loaded[:]

    lock = folder / Path(lock).name
    with held_elsewhere(lock):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert run(*command) == 2
        assert "is in use by process 71 on node-3; wait for its end" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not model.loaded and run(*command) == 0
    assert len(model.asked) == 1 and len(file.read_text().splitlines()) == 5 and not lock.exists()


def test_a_model_that_is_not_there_leaves_nothing(task, model, tmp_path):
    def load_vlm(*_, **__):
        raise ValueError("nowhere is neither a folder nor a hub id")
    model.load_vlm = load_vlm
    before = sorted(tmp_path.rglob("*"))
    for out in ([], ["--out", tmp_path / "a" / "b"]):
        assert run("--task", "jsonl", "--data", task, "--model", "nowhere", *out) == 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text, told", [
    ("{", "is not JSON"), ("", "is not JSON"), ("[1]", "does not hold a JSON object"), ("\xff", "can't decode byte"),
    ("[" * 100_000, "is not JSON")], ids=["half", "empty", "list", "bytes", "deep"])
def test_damaged_settings_of_an_earlier_run(task, model, tmp_path, capsys, text, told):
    command = ["--task", "jsonl", "--data", task, "--model", "m", "--out", tmp_path / "o"]
    assert run(*command) == 0
    (tmp_path / "o" / "config.json").write_bytes(text.encode("latin-1"))
    before = (tmp_path / "o" / "responses.jsonl").read_bytes()
    assert run(*command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "o" / "config.json") in error and told in error and len(error) < 600
    assert (tmp_path / "o" / "responses.jsonl").read_bytes() == before


def test_a_smaller_run_loses_nothing(task, model, tmp_path):
    command = ["--task", "jsonl", "--data", task, "--model", "m", "--out", tmp_path / "o"]
    assert run(*command) == 0 and run(*command, "--limit", 2) == 0 and run(*command) == 0
    assert len(model.asked) == 5


@pytest.mark.parametrize("change, field", [
    (["--model", "other"], "model"), (["--max-new-tokens", "7"], "max_new_tokens")])
def test_answers_of_another_run_are_not_mixed_in(change, field, task, model, tmp_path, capsys):
    command = ["--task", "jsonl", "--data", task, "--model", "m", "--out", tmp_path / "o"]
    assert run(*command) == 0 and run(*command, *change) == 2
    assert f"holds answers of another run: {field} was" in capsys.readouterr().err and len(model.asked) == 5


def test_other_weights_in_the_same_folder_are_another_model(task, model, tmp_path, capsys):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    command = ["--task", "jsonl", "--data", task, "--model", folder, "--out", tmp_path / "o"]
    assert run(*command) == 0
    (folder / "model.safetensors").write_bytes(b"three")
    assert run(*command) == 2 and "files was" in capsys.readouterr().err
    assert run(*command[:-2]) == 0 and len(list((tmp_path / "runs" / "eval").iterdir())) == 1      # the default --out


def test_a_judge_is_asked_in_both_orders(model, tmp_path):
    task = tmp_path / "pairs.jsonl"
    rows = [{"id": str(k), "question": "?", "images": [], "responses": ["a", "b"], "better": 1} for k in range(3)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model.generate = lambda vlm, chats, **_: [[Completion((1,), "1", "stop")] for _ in chats]
    assert run("--task", "jsonl", "--data", task, "--model", "m", "--limit", 2, "--out", tmp_path / "o") == 0
    figures = json.loads((tmp_path / "o" / "report.json").read_text())
    assert figures["accuracy"]["value"] == 0.5 and figures["accuracy"]["n"] == 2
    assert [json.loads(line)["swapped"] for line in (tmp_path / "o" / "answers.jsonl").read_text().splitlines()] == \
           [False, True, False, True]


def test_eval_imports_the_standard_library_pillow_and_tasks_only():
    script = ("import sys; before = set(sys.modules); import eval;"
              "new = {m.partition('.')[0] for m in sys.modules} - before;"
              "print(sorted(m for m in new if m not in sys.stdlib_module_names))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout.replace("'", '"'))) <= {"eval", "tasks", "verifier", "PIL", "defusedxml"}
