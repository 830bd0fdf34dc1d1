"""loop/report/: what the pages show of a run, in which order, and that nothing in a run is taken for markup."""
from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loop.report import __main__ as again
from loop.report import training
from loop.report.candidates import candidates_row, paired, read_candidates
from loop.report.charts import Curve, axis, intervals, panel, read_log, smooth
from loop.report.gating import leave_gate_page, page_beside
from loop.report.page import Notes, Page, Section, leave_page, render, write_page
from loop.report.rows import MOST_BYTES, MOST_ROWS, PictureView, Room, cut, fill, picture_view, picture_views
from report_folder import HOSTILE, figure, make_items, make_run, picture
from tasks import Item


def page_text(folder: Path, items: dict[str, Item]) -> str:
    return render(training.training_page(folder, items)).decode()


def test_page_of_a_run(tmp_path: Path) -> None:
    """The outcome and both verdicts with their reasons come first; then curves, measures, pairs, answers."""
    make_run(tmp_path / "run")
    page = page_text(tmp_path / "run", make_items(6))
    told = ["bar: promoted", "Held-out accuracy went from 0.400 to 0.700, while the DPO loss went from 0.693 to 0.500",
            "why before", "why after", "9.5", "900 tokens/s", "1.2 GB", "preprocessing 25%", "watched accuracy</figcap",
            "DPO loss</figcaption>", "interval not known", "margin at least 0.5, 7 pairs", "round 1, 6 pairs",
            "The pairs that the rounds formed", "wrong way, margin 0.90", "right before, wrong now", "config.json"]
    places = [page.find(words) for words in told]
    assert -1 not in places and places == sorted(places)
    assert page.startswith("<!DOCTYPE html>") and "<script" not in page and "http://" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count('<article class="row') == 12 and page.count("<img ") == 12


def test_the_confidently_wrong_ones_come_first(tmp_path: Path) -> None:
    make_run(tmp_path / "run", count=9)
    pairs = paired(read_candidates(tmp_path / "run"), make_items(9))
    assert [pair.item_id for pair in pairs[:3]] == ["q0", "q3", "q6"]       # the chosen side is wrong, margins fall
    assert [pair.sides for pair in pairs] == [(False, True)] * 3 + [(True, False)] * 6
    assert pairs[0].margin == 0.9 > pairs[1].margin > pairs[2].margin
    page = page_text(tmp_path / "run", make_items(9))
    assert "9 items gave 9 pairs: 3 wrong way; 6 right way." in page
    first = page[page.index('<article class="row bad'):]
    assert first.index("<b>1.00</b>") < first.index('class="role chosen"') < first.index('class="role rejected"')


def test_candidates_that_are_equal_are_counted(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    [wrong, *_] = paired(read_candidates(tmp_path / "run"), {})
    assert wrong.sides == (None, None)                  # without the items nothing is known of the truth
    pairs = paired(read_candidates(tmp_path / "run"), make_items(6))
    right = next(pair for pair in pairs if pair.item_id == "q1")
    row = candidates_row(right, make_items(2)["q1"])
    assert [(answer.text, answer.score, answer.correct, answer.role, answer.count) for answer in row.answers] == [
        ("3", 0.8, True, "chosen", 2), ("2", 0.2, False, "rejected", 1)]
    assert row.question == "How many?" and row.truth == "3" and row.tone == "good"


def test_pairs_that_were_given_have_two_sides(tmp_path: Path) -> None:
    """No candidates are on the disk: the pairs' own two texts and scores are shown."""
    make_run(tmp_path / "run")
    (tmp_path / "run" / "candidates" / "round-1.jsonl").unlink()
    row = {"item_id": "q1", "chosen_text": "3", "rejected_text": "4", "chosen_score": 0.75, "rejected_score": 0.5}
    (tmp_path / "run" / "pairs" / "round-1.jsonl").write_text(json.dumps(row) + "\n")
    [pair] = paired(read_candidates(tmp_path / "run"), make_items(2))
    assert (pair.texts, pair.margin, pair.sides) == (["3", "4"], 0.25, (True, False))


def test_a_run_that_the_gate_stopped(tmp_path: Path) -> None:
    """What the gate looked at is shown; there are no curves."""
    make_run(tmp_path / "run", after=None)
    page = page_text(tmp_path / "run", make_items(6))
    assert "bar: blocked" in page and "The pairs that the gate looked at" in page and "<svg" not in page
    assert "wrong way, margin 0.90, gate" in page and "After training" not in page


@pytest.mark.parametrize("name", ["summary.json", "held_out.jsonl", "metrics.jsonl", "candidates"])
def test_what_is_not_there_is_left_out(name: str, tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    path = tmp_path / "run" / name
    path.rename(tmp_path / "away")
    if name == "candidates":
        (tmp_path / "run" / "pairs" / "round-1.jsonl").unlink()
    page = page_text(tmp_path / "run", {})
    assert ("This run has not ended." in page) == (name == "summary.json")
    assert "the question is not at hand" in page
    assert ("truth not known" in page) == (name != "candidates")            # the gate's records know it


def test_nothing_is_taken_for_markup(tmp_path: Path) -> None:
    """Questions, answers, reasons, ids, settings."""
    make_run(tmp_path / "run", text=HOSTILE)
    for name in ("config.json", "summary.json"):
        path = tmp_path / "run" / name
        hostile = json.dumps(HOSTILE)
        path.write_text(path.read_text().replace('"why before"', hostile).replace('"lr": 3e-05', f'"lr": {hostile}'))
    page = page_text(tmp_path / "run", make_items(6, question=HOSTILE))
    assert "<script" not in page and "<img src=x" not in page and 'onerror="' not in page
    assert page.count("&lt;script&gt;") > 12 and "{{ 7 * 7 }}" in page
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy and policy[1].startswith("default-src 'none';") and "script" not in policy[1]


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    write_page(tmp_path / "p.html", Page("\ud83d", "p", "plain", "x", [Section("s", blocks=[Notes(["\udc00"])])]))
    assert "<title>?</title>" in (tmp_path / "p.html").read_text(encoding="utf-8")


# ---- room

def test_most_rows_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    make_run(tmp_path / "run", count=500)
    page = page_text(tmp_path / "run", make_items(500, image=picture()))
    assert page.count('<article class="row') == MOST_ROWS == 200
    assert "400 of 500 are left out here; all are in candidates/ and pairs/." in page
    assert "400 of 500 are left out here; all are in held_out.jsonl." in page
    assert page.index("right before, wrong now") < page.index("wrong before, right now")    # they take turns
    changes = re.findall(r"right before, wrong now|wrong before, right now", page)
    assert changes[:4] == ["right before, wrong now", "wrong before, right now"] * 2


@pytest.mark.parametrize("text", ['"' * 9999, "…" * 9999], ids=['"', "…"])
def test_a_page_is_below_20_megabytes(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its texts grow when they are escaped, and however large its pictures are."""
    views = [PictureView("data:image/png;base64," + "A" * 50_000, 320, 320)] * 4
    monkeypatch.setattr("loop.report.candidates.picture_views", lambda _: (views, ""))
    monkeypatch.setattr("loop.report.training.picture_views", lambda _: (views, ""))
    make_run(tmp_path / "run", count=120, text=text)
    page = render(training.training_page(tmp_path / "run", make_items(120, question=text)))
    assert 17_000_000 < len(page) < 20_000_000 and b"are left out here" in page


def test_room_is_what_is_measured() -> None:
    """fill() stops before its rows are larger than there is room for."""
    items = make_items(50)
    def row(name: str) -> Any:
        return training.held_out_row({"id": name, "frozen": {"response": "a" * 1000, "correct": True},
                                      "trained": {"response": "b", "correct": False}}, items[name])
    size = row("q0").size
    rows = fill(Room(rows=40, size=10 * size + 100), list(items), row, "the file")
    assert len(rows.rows) == 10 and rows.left_out == "40 of 50 are left out here; all are in the file."
    assert len(fill(Room(40, MOST_BYTES), list(items), row, "f").rows) == 40
    assert fill(Room(), list(items), row, "f").left_out == ""
    assert cut("a" * 1501) == "a" * 1500 + " … (1 more characters)" and cut("a" * 1500) == "a" * 1500


# ---- pictures

@pytest.mark.parametrize("size, kind, shown, as_it_is", [
    ((32, 32), "PNG", (32, 32), True), ((320, 200), "JPEG", (320, 200), True), ((1000, 500), "JPEG", (320, 160), False),
    ((40, 40), "BMP", (40, 40), False), ((200, 1000), "PNG", (64, 320), False)])
def test_pictures_are_scaled(size: tuple[int, int], kind: str, shown: tuple[int, int], as_it_is: bool) -> None:
    encoded = picture(*size, kind)
    view = picture_view(encoded, "item")
    head, _, data = view.source.partition(",")
    assert re.fullmatch(r"data:image/(png|jpeg);base64", head)
    assert (base64.b64decode(data) == encoded) == as_it_is
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (view.width, view.height) == shown
    assert view.is_tiny == (max(shown) < 100)


def test_what_is_transparent_lies_on_white() -> None:
    encoded = io.BytesIO()
    Image.new("RGBA", (500, 500), (255, 0, 0, 0)).save(encoded, "PNG")
    view = picture_view(encoded.getvalue(), "item")
    with Image.open(io.BytesIO(base64.b64decode(view.source.partition(",")[2]))) as image:
        assert image.convert("RGB").getpixel((5, 5)) == (255, 255, 255)


def test_a_broken_picture_costs_its_place_alone(tmp_path: Path) -> None:
    item = Item("q", "bar", (0, "x"), (b"no picture", picture(), tmp_path / "gone.png", *[picture()] * 3), answer="3")
    views, remark = picture_views(item)
    assert len(views) == 2 and remark == "picture 1 cannot be shown; picture 3 cannot be shown; 2 more pictures"


# ---- charts

def test_curves() -> None:
    rows = [{"step": 0, "eval/accuracy": 0.5}, {"step": 1, "round": 1, "loss": 0.7},
            {"step": 2, "round": 2, "loss": 0.5, "eval/accuracy": 0.75}]
    log = read_log(rows)
    assert (log.accuracy, log.loss, log.starts) == ([(0, 0.5), (2, 0.75)], [(1, 0.7), (2, 0.5)], [1, 2])
    drawn = panel("title", [Curve("accuracy", "accuracy", log.accuracy, True)], [2], low=0.0, high=1.0)
    (x0, y0, first), (x1, y1, _) = drawn.curves[0].dots
    assert x0 == 42 and x1 == 406 and first == "step 0: 0.500"
    assert y0 == pytest.approx(93) and y1 == pytest.approx(52.5) and drawn.rules == [406]
    assert [text for _, text in drawn.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert panel("title", [Curve("accuracy", "accuracy", [])]) is None
    assert panel("one", [Curve("loss", "loss", [(0, 0.7)])]).curves[0].path.startswith("42.0,")


def test_smooth() -> None:
    points = [(1, 1.0), (2, 2.0), (3, 6.0), (7, 7.0)]
    assert smooth(points, 2) == [(1, 1.0), (2, 1.5), (3, 4.0), (7, 6.5)]
    assert smooth(points, 9)[-1] == (7, 4.0) and smooth([]) == []


@pytest.mark.parametrize("low, high", [(0, 1), (0.55, 0.75), (-0.6, 1), (0.5, 0.5), (0, 0), (3e-7, 9e-7), (0, 12345)])
def test_axes_hold_their_values(low: float, high: float) -> None:
    found = axis(low, high)
    assert found.low <= low and high <= found.high and found.low < found.high and 3 <= len(found.ticks) <= 8


def test_intervals_share_one_axis() -> None:
    """From below 0 where a difference is; unknown figures are left out, unknown ends are said."""
    found = intervals("t", {"a": figure(0.5), "d": {"value": -0.5, "low": -0.6, "high": -0.4, "n": 9}, "none": None,
                            "empty": {"value": None, "low": 0, "high": 1, "n": 0}}, 0.5, differences=("d",))
    assert [row.name for row in found.rows] == ["a", "d"] and found.rows[1].text == "-0.500"
    a, d = found.rows
    assert (a.at, a.start, a.length) == (75.0, 70.0, 10.0) and (d.at, d.start) == (25.0, 20.0) and found.level == 75.0
    assert intervals("t", {"none": None}) is None
    [open_ended] = intervals("t", {"b": {"value": 0.5, "low": None, "high": None, "n": 3}}).rows
    assert (open_ended.start, open_ended.length) == (open_ended.at, 0.0) and "interval not known" in open_ended.note


# ---- writing

def test_a_page_that_cannot_be_written_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    leave_page(tmp_path / "report.html", lambda: Page("t", "p", "plain", "l"))
    said = capsys.readouterr().out
    assert said.startswith(f"no page: cannot write {tmp_path / 'report.html'}: the disk is full")
    assert said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_what_is_no_page_of_ours_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "report.html"
    path.write_text("<html>mine</html>")
    leave_page(path, lambda: Page("t", "p", "plain", "l"))
    assert path.read_text() == "<html>mine</html>" and "is left as it is" in capsys.readouterr().out
    path.unlink()
    for title in ("one", "two"):
        leave_page(path, lambda: Page(title, "p", "plain", "l"))
        assert f"<title>{title}</title>" in path.read_text()
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_without_jinja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    leave_page(tmp_path / "report.html", lambda: Page("t", "p", "plain", "l"))
    assert capsys.readouterr().out.startswith("no page: ") and not list(tmp_path.iterdir())


# ---- the command

def test_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The same page as the run left, byte for byte; without the data, a page without pictures."""
    make_run(tmp_path / "run")
    items = make_items(6)
    leave_page(tmp_path / "run" / "report.html", lambda: training.training_page(tmp_path / "run", items))
    before = (tmp_path / "run" / "report.html").read_bytes()
    monkeypatch.setattr(training, "load_task", lambda *_: list(items.values()))
    assert again.main(str(tmp_path / "run")) == 0
    assert (tmp_path / "run" / "report.html").read_bytes() == before

    def gone(*_: Any) -> list[Item]:
        raise FileNotFoundError("no such folder: data")
    monkeypatch.setattr(training, "load_task", gone)
    assert again.main(str(tmp_path / "run")) == 0
    assert "without questions and pictures: no such folder: data" in capsys.readouterr().out
    assert b"<img" not in (tmp_path / "run" / "report.html").read_bytes()


@pytest.mark.parametrize("words", [(), ("a", "b"), ("--help",)])
def test_usage(words: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    assert again.main(*words) == 2 and capsys.readouterr().err.startswith("usage: python -m loop.report RUN")


@pytest.mark.parametrize("name, content", [
    ("config.json", None), ("config.json", "[]"), ("summary.json", "{"), ("summary.json", '{"post_gate": 3}'),
    ("metrics.jsonl", "3\n"), ("held_out.jsonl", '{"id": "q"}\n'), ("gate_records.jsonl", "{}\n")])
def test_what_is_no_run(name: str, content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                        capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(training, "load_task", lambda *_: [])
    make_run(tmp_path / "run", after=None)
    (tmp_path / "run" / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / "run" / name).write_text(content)
    assert again.main(str(tmp_path / "run")) == 2 and not (tmp_path / "run" / "report.html").exists()
    said = capsys.readouterr().err
    assert said.startswith(f"loop.report: {tmp_path / 'run'} is not a run's folder: ") and said.count("\n") == 1


# ---- gate.py

def test_page_of_a_gate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One verifier, then two: the table and the advice; records without texts."""
    make_run(tmp_path / "run", after=None)
    records = [json.loads(line) for line in (tmp_path / "run" / "gate_records.jsonl").read_text().splitlines()]
    report = json.loads((tmp_path / "run" / "summary.json").read_text())["pre_gate"]
    out = str(tmp_path / "report.json")
    leave_gate_page(out, report, {"v": records}, list(make_items(6).values()))
    assert capsys.readouterr().out == f"page: {tmp_path / 'report.html'}\n"
    page = (tmp_path / "report.html").read_text()
    assert "may not train this student" in page and "why before" in page and page.count("<article") == 6 == page.count(
        "<img ")

    for record in records:
        del record["text"]
    both = {"recommended": "w", "recommendation": "w is recommended: why. It was measured again on fresh items: PASS.",
            "again": report | {"verdict": "PASS", "reasons": ["again why"]},
            "verifiers": {"v": report, "w": report | {"verdict": "PASS", "rubric_accuracy": figure(0.95)}}}
    leave_gate_page(out, both, {"v": records, "w": records}, [])
    page = (tmp_path / "report.html").read_text()
    assert "<p>w is recommended: why.</p>" in page and page.index("<table>") < page.index("again why")
    assert page.index('<h2 class="part">w</h2>') < page.index('<h2 class="part">v</h2>')
    assert "(candidate 0; the records hold no text)" in page and page.count("<article") == 12
    assert page_beside(Path("a/b.json")) == Path("a/b.html") and page_beside(Path("b.html")) == Path("b.html.html")
