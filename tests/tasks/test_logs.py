"""Logs of lmms-eval and VLMEvalKit: how they are told apart and read, which item a row is about, what verdict it holds,
and what eval.py makes of them."""
from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import eval as evaluation
import harness_logs as made
from tasks import Item
from tasks.log_files import read_log
from tasks.logs import compare, verdict_table


def lmms_mmmu(**how: object) -> list[dict]:
    """Two responses an item; the harness reads the first, and an open question's verdict is not in the log."""
    said = [["B", "A"], ["(A)", "B"], ["x is 3.429", "2"], ["1.0", "7"], ["H", "I"]]
    parsed = [["B"], ["A"], [[3.43]], [[1.0]], ["A"]]
    return [made.lmms_row(k, row["answer"], said[k], made.mmmu_metrics(row, parsed[k]), **how)
            for k, row in enumerate(made.MMMU_ROWS)]


def texts(log) -> list[list[str]]:
    return [[response.text for response in row.responses] for row in log.rows]


def ids(log) -> list[str]:
    return [item.id for item in log.items]


# ---- lmms-eval

def test_all_responses_of_lmms_eval(tmp_path: Path) -> None:
    items = made.items_of("mmmu")
    rows = lmms_mmmu()
    random.Random(0).shuffle(rows)                          # several processes write one after the other
    log = read_log(made.write_lines(tmp_path / "log.jsonl", rows), items)
    assert log.harness == "lmms-eval" and ids(log) == [item.id for item in items] and not log.missing
    assert texts(log) == [["B", "A"], ["(A)", "B"], ["x is 3.429", "2"], ["1.0", "7"], ["H", "I"]]
    assert [row.verdict for row in log.rows] == [True, True, None, None, False]
    assert [row.reading for row in log.rows] == ["B", "A", "[3.43]", "[1.0]", "A"]
    assert [len(row.responses[0].token_ids) for row in log.rows] == [1, 3, 10, 3, 1]
    assert log.rows[0].responses[1].token_ids is None       # the log counts those of the first alone


def test_the_default_tags_leave_the_first_response(tmp_path: Path) -> None:
    log = read_log(made.write_lines(tmp_path / "log.jsonl", lmms_mmmu(tags=True)), made.items_of("mmmu"))
    assert texts(log) == [["B"], ["(A)"], ["x is 3.429"], ["1.0"], ["H"]]


def test_what_the_filter_chose_was_judged(tmp_path: Path) -> None:
    """A majority vote takes another than the first; a filter that changes the text leaves the first."""
    row = made.MMMU_ROWS[0]
    metrics = made.mmmu_metrics(row, ["B"])
    vote = made.lmms_row(0, "B", ["A", "B", "B"], metrics, filtered="B")
    cut = made.lmms_row(1, "A", ["<think>so</think>A", "B"], made.mmmu_metrics(made.MMMU_ROWS[1], ["A"]), filtered="A")
    log = read_log(made.write_lines(tmp_path / "log.jsonl", [vote, cut]), made.items_of("mmmu"))
    assert [response.text for response in log.judged_responses] == ["B", "<think>so</think>A"]


def test_older_logs_nest_lists_and_hold_the_row(tmp_path: Path) -> None:
    old = {"doc_id": 3, "doc": {"id": "validation_Art_Theory_1"}, "target": "B", "arguments": {"0": "x"},
           "resps": [["B", "A"]], "filtered_resps": ["B"], "doc_hash": "0", "acc_score": 1.0}
    log = read_log(made.write_lines(tmp_path / "log.jsonl", [old]), made.items_of("mmmu"))
    assert ids(log) == ["validation_Art_Theory_1"] and texts(log) == [["B", "A"]] and log.rows[0].verdict is True


def test_a_row_for_every_filter_is_one_row(tmp_path: Path) -> None:
    """maj@3 and pass@3 of the same samples; the one that holds them all counts. Other samples are another run."""
    row = made.MMMU_ROWS[0]
    metrics = made.mmmu_metrics(row, ["A"])
    vote = made.lmms_row(0, "B", ["A"], metrics)
    passed = made.lmms_row(0, "B", ["A", "B", "A"], metrics, filtered=["A", "B", "A"])
    for rows in ([vote, passed], [passed, vote]):
        log = read_log(made.write_lines(tmp_path / "log.jsonl", rows), made.items_of("mmmu"))
        assert texts(log) == [["A", "B", "A"]]
        assert log.repeated == 1 and "1 rows repeat responses" in " ".join(log.notes())
    alike = made.lmms_row(0, "B", ["A", "A"], metrics, filtered=["A", "A"])
    log = read_log(made.write_lines(tmp_path / "log.jsonl", [vote, alike]), made.items_of("mmmu"))
    assert texts(log) == [["A", "A"]]
    other = made.lmms_row(0, "B", ["C"], metrics)
    with pytest.raises(ValueError, match=r"line 2: a second row for item 'validation_Art_Theory_1', with other respon"):
        read_log(made.write_lines(tmp_path / "log.jsonl", [passed, other]), made.items_of("mmmu"))


@pytest.mark.parametrize("task", ["mathvista", "blink"])
def test_the_ids_and_verdicts_of_other_tasks(task: str, tmp_path: Path) -> None:
    if task == "mathvista":
        read = [("18", "18"), ("14 years", "14"), ("5.77", None), ("[2014, 2016]", "[2014, 2016]"), ("(b)", "(b)")]
        rows = [made.lmms_row(k, row["answer"], [read[k][0]], made.mathvista_metrics(row, *read[k]))
                for k, row in enumerate(made.MATHVISTA_ROWS)]
        right = [True, True, False, True, True]             # a float's precision is 2.0, which it cannot round to
    else:
        parsed = ["B", "T", "A", ""]
        rows = [made.lmms_row(0, row["answer"], [said], made.blink_metrics(row, said, parsed[k]))
                for k, (row, said) in enumerate(zip(made.BLINK_ROWS, ["(B)", "The 1", "A", "left"]))]
        right = [True, False, True, False]
    log = read_log(made.write_lines(tmp_path / "log.jsonl", rows), made.items_of(task))
    assert [row.verdict for row in log.rows] == right and not log.missing and not log.foreign


def test_pairs_are_in_the_order_that_was_shown(tmp_path: Path) -> None:
    """By row where the data set gives an id twice; swapped where the responses' lengths add up to an odd number."""
    items = made.items_of("vl_rewardbench")
    rows = [made.lmms_row(k, row["human_ranking"], [f"Overall Judgment: Answer {k % 2 + 1} is better."],
                          made.vl_metrics(row, float(k % 3 == 0))) for k, row in enumerate(made.VL_ROWS)]
    log = read_log(made.write_lines(tmp_path / "log.jsonl", rows), items)
    assert ids(log) == [item.id for item in items] and ids(log)[4] == "RLAIF-V-1#4"
    lengths = [sum(map(len, row["response"])) for row in made.VL_ROWS]
    assert [item.swapped for item in log.items] == [length % 2 == 1 for length in lengths]
    assert {item.swapped for item in log.items} == {True, False}
    assert texts(log)[4] == ["Overall Judgment: Answer 1 is better."]
    assert "one order alone" in " ".join(log.notes())


def test_without_ids_the_row_number_is_checked(tmp_path: Path) -> None:
    """lmms-eval's reasoning tasks log no id. The numbers count if the answers are those of these rows, all of them."""
    rows = [made.lmms_row(k, row["answer"], [f"it is {k}"], {"llm_as_judge_eval": float(k % 2)})
            for k, row in enumerate(made.MMMU_ROWS)]
    items = made.items_of("mmmu")
    log = read_log(made.write_lines(tmp_path / "log.jsonl", rows[::-1]), items)
    assert texts(log) == [[f"it is {k}"] for k in range(5)]
    assert [row.verdict for row in log.rows] == [False, True, False, True, False]

    rows[4]["target"] = "B"
    with pytest.raises(ValueError, match=r"no ids .* line 5 has the answer 'B', item 'validation_Math_3' has 'i'"):
        read_log(made.write_lines(tmp_path / "log.jsonl", rows), items)


# ---- VLMEvalKit

@pytest.mark.parametrize("write", [made.write_table, made.write_records])
def test_predictions_of_vlmevalkit(write, tmp_path: Path) -> None:
    """A row of the dev split is counted; a response may hold tabs, quotation marks, lines, and be long."""
    long = 'He said "B",\tthen\nnothing. ' + "x" * 200_000
    said = ["A", long, "(A)", "3.429", "", "nan"]
    log = read_log(write(tmp_path / "model_MMMU_DEV_VAL", made.kit_mmmu(said)), made.items_of("mmmu"))
    assert log.harness == "VLMEvalKit" and log.foreign == ["dev_Art_Theory_1"] and not log.missing
    assert texts(log) == [[text] for text in said[1:]]
    assert {row.verdict for row in log.rows} == {None}
    assert "1 of its rows are about no item of the task" in " ".join(log.notes())
    assert "no verdict of VLMEvalKit" in verdict_table(compare(log, scored(log)))


def scored(log) -> list[evaluation.Answer]:
    return evaluation.score_answers(log.items, log.judged_responses)


@pytest.mark.parametrize("write", [made.write_table, made.write_records])
def test_hits_of_vlmevalkit(write, tmp_path: Path) -> None:
    """Not those of open questions, of which its evaluation makes options of which A is always the truth."""
    rows = made.kit_mmmu(["A", "B", "B", "A", "7", "I"], [1, 1, 0, 1, 0, 1])
    log = read_log(write(tmp_path / "judged", rows), made.items_of("mmmu"))
    assert [row.verdict for row in log.rows] == [True, False, None, None, True]


@pytest.mark.parametrize("write", [made.write_table, made.write_records])
def test_mathvista_of_vlmevalkit(write, tmp_path: Path) -> None:
    """Its index is the data set's pid, which is believed if questions and answers agree; `res` is what was read."""
    items = made.items_of("mathvista")
    read = ["C", "14", "5.774", "[2014, 2016]", "(b) of them"]
    rows = [row | {"id": None} for row in made.kit_mathvista(["x"] * 5, read)]
    log = read_log(write(tmp_path / "m", rows), items)
    assert ids(log) == ["1", "2", "3", "4", "5"]
    assert [row.verdict for row in log.rows] == [True, True, False, None, None]     # unrounded; the last are left open
    assert read_log(write(tmp_path / "m", made.kit_mathvista(["x"] * 5, ["D", "14.0", "5.770", "", "E"])),
                    items).rows[0].verdict is False         # two options are alike, and it takes the first alone


def test_an_index_that_is_another_number(tmp_path: Path) -> None:
    """Counted from 0 it names the item before; the order within a category is taken, for the answers agree."""
    rows = made.kit_mathvista([f"it is {k}" for k in range(5)])
    for row in rows:
        row["index"] -= 1
        row["category"] = ""
    items = made.items_of("mathvista")
    log = read_log(made.write_table(tmp_path / "m.tsv", rows), items)
    assert texts(log) == [[f"it is {k}"] for k in range(5)]
    with pytest.raises(ValueError, match="4 rows of category '' where the task has 5: their order does not tell"):
        read_log(made.write_table(tmp_path / "m.tsv", rows[1:]), items)


def test_an_index_is_believed_if_question_and_answer_agree(tmp_path: Path) -> None:
    """One that is an id by chance, of an item with the same question or the same answer, is not."""
    def number(name: str, question: str, answer: str) -> Item:
        return Item(name, "mathvista", (question,), answer=answer, answer_type="integer")
    rows = [{"index": 1, "question": "How old?", "answer": "14", "prediction": "x"}]
    path = made.write_table(tmp_path / "m.tsv", rows)
    second = number("2", "How old?", "14")
    assert ids(read_log(path, [second, number("1", "Hint: look.\nHow  old?", "14")])) == ["1"]
    for other in (number("1", "How old?", "15"), number("1", "How long?", "14")):
        with pytest.raises(ValueError, match="their order does not tell which is which"):
            read_log(path, [second, other])


def test_blink_of_vlmevalkit(tmp_path: Path) -> None:
    rows = made.kit_blink(["B", "D", "B", "A"], [1, 1, 0, 1])
    items = made.items_of("blink")
    other_order = [items[3], items[1], items[2], items[0]]                          # of the subtasks
    log = read_log(made.write_table(tmp_path / "b.tsv", rows), other_order)
    assert ids(log) == [item.id for item in other_order] and texts(log) == [["A"], ["D"], ["B"], ["B"]]
    assert [row.verdict for row in log.rows] == [True, True, False, True]

    other_answers = [items[0], items[2], items[1], items[3]]
    with pytest.raises(ValueError, match=r"row 2 has the answer 'D', item 'val_Counting_3' has '5'"):
        read_log(tmp_path / "b.tsv", other_answers)


def test_pairs_of_vlmevalkit(tmp_path: Path) -> None:
    rows = made.kit_vl(["Answer 1"] * 6, [1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    items = made.items_of("vl_rewardbench")
    log = read_log(made.write_table(tmp_path / "v.tsv", rows), items)
    assert ids(log) == [item.id for item in items] and {item.swapped for item in log.items} == {True, False}
    assert [row.verdict for row in log.rows] == [True, False, True, True, False, True]


def test_what_was_asked_in_vain(tmp_path: Path) -> None:
    rows = made.kit_mmmu(["A", "Failed to obtain answer via API.", "A", "1", "1", "I"])
    log = read_log(made.write_table(tmp_path / "m.tsv", rows), made.items_of("mmmu"))
    assert log.rows[0].failed and texts(log)[0] == [""] and "1 items were asked about in vain" in " ".join(log.notes())


# ---- files that are something else

@pytest.mark.parametrize("content, message", [
    (b"PK\x03\x04rest", "PRED_FORMAT=tsv"), (b"\x80\x04pickle", "is a pickle"),
    (b"[]", "holds no rows"), (b'"index"\t"prediction"\n', "holds no rows"),
    (b"[1]", "row 1 is 1, not an object with index and prediction"), (b"[{}]", "row 1 is {}"), (b"[", "is not JSON"),
    (b'[{"index": 1, "prediction": null}]', "row 1: prediction is None, not a text"),
    (b'"index"\t"prediction"\n"1"\n', "row 1 has another number of columns"),
    (b'"index"\t"prediction"\n"1"\t"x', "row 1 is no row of a table"),
    (b'"index"\t"prediction"\n"7"\t"x"\n', "no ids of the task's items"),
    (b'{"doc_id": 0, "filtered_resps": "B"}\n{"id": 1}\n', "line 2 has no doc_id and filtered_resps"),
    (b'{"doc_id": "0", "filtered_resps": "B"}', "line 1: doc_id is '0'"),
    (b'{"doc_id": 0, "filtered_resps": [[1.5, true]]}', "line 1: a response is 1.5, not a text"),
    (b'{"doc_id": 0, "filtered_resps": []}', "line 1: a response is [], not a text"),
    (b'{"doc_id": 9, "filtered_resps": "B", "m": {"id": "x"}}', "none of the 1 rows"),
    (b'{"doc_id": 99, "filtered_resps": "B"}', "none of the 1 rows")], ids=str)
def test_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_log(path, made.items_of("mmmu"))
    assert message in str(error.value) and len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_lines_of_our_own_are_no_log(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for content in ('{"id": "a", "response": "b"}\n', "", "words\n", '{"records": 1}'):
        path.write_text(content)
        assert read_log(path, made.items_of("mmmu")) is None


# ---- eval.py

def run(task: str, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    items: list[Item] = made.items_of(task)
    monkeypatch.setattr(evaluation, "load_task", lambda name, data, split, limit: items[:limit])
    return evaluation.main(["--task", task, *(str(word) for word in words)])


def test_our_verdict_beside_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = made.write_lines(tmp_path / "log.jsonl", lmms_mmmu())
    assert run("mmmu", monkeypatch, "--responses", path, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "holds 5 items of the task" in shown and "up to 2 responses an item; scored is the one" in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    harness = report["harness"]
    assert [harness[key] for key in ("both_right", "only_exact_match", "only_harness", "both_wrong", "no_verdict")] == [
        2, 0, 0, 1, 2]
    assert harness["differ"] == [] and "They differ on 0 of 3 items." in shown
    assert "2 items are not in this table" in shown
    assert report["accuracy"]["n"] == 5

    rows = lmms_mmmu()
    rows[0] |= {"filtered_resps": "C", "resps": ["C"]}      # read as B by the harness
    path = made.write_lines(tmp_path / "log.jsonl", rows)
    assert run("mmmu", monkeypatch, "--responses", path) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["lmms-eval:", "right", "wrong"] in lines and ["exact", "match:", "right", "1", "0"] in lines
    assert ["wrong", "1", "1"] in lines
    assert ("  'validation_Art_Theory_1' is right by lmms-eval alone; the answer is \"O'Keeffe\", exact match read 'C',"
            " lmms-eval 'B'") in shown


def test_a_log_that_lacks_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = made.write_lines(tmp_path / "log.jsonl", lmms_mmmu()[:2])
    assert run("mmmu", monkeypatch, "--responses", path) == 2
    error = capsys.readouterr().err
    assert "no response for 3 of 5 items, first 'validation_Math_1'; let --limit" in error and error.count("\n") == 1
    assert run("mmmu", monkeypatch, "--responses", path, "--limit", 2) == 0
    assert run("mmmu", monkeypatch, "--responses", path, "--limit", 1) == 0
    assert "1 of its rows are about no item of the task" in capsys.readouterr().out


def test_pairs_in_one_order_are_reported_from_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A judge that names the better response wherever it stands; of consistency nothing is claimed."""
    items = made.items_of("vl_rewardbench")
    log = read_log(made.write_table(tmp_path / "v.tsv", made.kit_vl(["?"] * 6, [1.0] * 6)), items)
    said = [f"Overall Judgment: Answer {item.answer} is better." for item in log.items]
    path = made.write_table(tmp_path / "v.tsv", made.kit_vl(said, [1.0] * 6))
    assert run("vl_rewardbench", monkeypatch, "--responses", path, "--out", tmp_path / "o.json") == 0
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["accuracy"]["value"] == 1.0 and report["accuracy"]["n"] == 6 and "consistency" not in report
    assert report["harness"]["both_right"] == 6
    answers = [json.loads(line) for line in (tmp_path / "o.answers.jsonl").read_text().splitlines()]
    assert [answer["swapped"] for answer in answers] == [item.swapped for item in log.items]


def test_a_log_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = made.write_lines(tmp_path / "report.json", lmms_mmmu())
    assert run("mmmu", monkeypatch, "--responses", path, "--out", tmp_path) == 2
    assert "is the file of --responses" in capsys.readouterr().err
