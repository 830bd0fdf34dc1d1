"""loop/cached_model.py: how a batch's cost is shared, and what a file of answers must hold to be believed."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from loop.cached_model import CostedScore, read_answers, share_costs, write_answers
from verifier import Score

TEXTS = [["a", "b", "a"], ["c", "c"], ["a"]]            # four distinct ones


def batch(tokens: int) -> dict[str, Any]:
    """What is kept of a batch of verdicts on TEXTS."""
    scores = [[(0.25, text, False) for text in row] for row in TEXTS]
    return {"scores": scores, "seconds": 2.0, "tokens": tokens, "asked": 4, "parameters": 1}


def test_costs_go_to_the_first_of_equal_texts() -> None:
    rows = share_costs(batch(40), TEXTS)
    assert [[score.seconds for score in row] for row in rows] == [[0.5, 0.5, None], [0.5, None], [0.5]]
    assert [[score.tokens for score in row] for row in rows] == [[10, 10, None], [10, None], [10]]
    assert rows[0][1] == CostedScore(0.25, "b", False, 0.5, 10) and isinstance(rows[0][1], Score)


def test_shares_of_tokens_add_up() -> None:
    rows = share_costs(batch(43), TEXTS)
    assert [[score.tokens for score in row] for row in rows] == [[11, 11, None], [11, None], [10]]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path, key = tmp_path / "answers.json", {"model": "m"}
    assert read_answers(path, key) is None
    assert write_answers(path, key, [("a", 1)]) == [["a", 1]] == read_answers(path, key)
    assert read_answers(path, {"model": "other"}) is None
    path.write_text(path.read_text().replace('"a"', '"b"'))
    assert read_answers(path, key) is None


def test_what_cannot_be_read_is_asked_for_again(tmp_path: Path) -> None:
    """Deeper than a parser goes, or as deep as it just goes; no text; a folder."""
    key = {"model": "m"}
    path = tmp_path / "answers.json"
    write_answers(path, key, 1)
    whole = path.read_text()
    for depth in (600, 900, 950, 980, 100_000):
        path.write_text(whole.replace('"value": 1', '"value": ' + "[" * depth + "]" * depth))
        assert read_answers(path, key) is None
    path.write_bytes(b"\xff\xfe")
    assert read_answers(path, key) is None
    path.unlink()
    path.mkdir()
    assert read_answers(path, key) is None
