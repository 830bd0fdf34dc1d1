"""Four splits that share neither an id nor a picture."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tasks import Item
from tasks.splits import Splits, check_disjoint, picture_groups, split_items


def item(name: str, *pictures: str, answer: str | None = "1") -> Item:
    return Item(name, "bar", ("?",), tuple(p.encode() for p in pictures) or (f"picture of {name}".encode(),), answer)


def names(items: Sequence[Item]) -> list[str]:
    return [i.id for i in items]


def by_name(splits: Splits) -> dict[str, list[str]]:
    return {name: names(part) for name, part in vars(splits).items()}


MANY = [item(f"i{k}", f"p{k // 3 if k < 30 else k}", *(["shared"] if k in (40, 50) else [])) for k in range(100)]


def pictures_of(items: Sequence[Item]) -> set[str]:
    return set().union(*(i.picture_hashes for i in items))


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_shared(seed: int) -> None:
    splits = split_items(MANY, 20, 10, 30, seed)
    assert [len(part) for part in vars(splits).values()] == [20, 10, 30, 40]
    assert sorted(names(sum(vars(splits).values(), []))) == sorted(names(MANY))
    hashes = [pictures_of(part) for part in vars(splits).values()]
    assert sum(map(len, hashes)) == len(set().union(*hashes)) == len(pictures_of(MANY))
    assert splits.by_id == {i.id: i for i in splits.train}


def test_pictures_that_are_reused_stay_together() -> None:
    """Also in a chain: a and b share one picture, b and c another."""
    chain = [item("a", "1"), item("x", "9"), item("b", "1", "2"), item("c", "2"), item("d", "3", "3"),
             item("e", "4", "2")]
    assert sorted(sorted(names(g)) for g in picture_groups(chain)) == [["a", "b", "c", "e"], ["d"], ["x"]]
    assert picture_groups([]) == [] and len(picture_groups([Item(str(k), "bar", ("?",)) for k in range(3)])) == 3
    for seed in range(10):
        for part in by_name(split_items([*chain, *MANY], 20, 10, 30, seed)).values():
            assert len({"a", "b", "c", "e"} & set(part)) in (0, 4)


def test_the_same_picture_as_bytes_and_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"same")
    [together] = picture_groups([item("a", "same"), Item("b", "bar", ("?",), (tmp_path / "p.png",))])
    assert names(together) == ["a", "b"]


def test_the_cut_depends_on_ids_and_seed() -> None:
    first = by_name(split_items(MANY, 20, 10, 30, 0))
    assert first == by_name(split_items(MANY, 20, 10, 30, 0))
    cuts = {tuple(sorted(by_name(split_items(MANY, 20, 10, 30, seed))["gate"])) for seed in range(6)}
    assert len(cuts) == 6
    back = by_name(split_items(MANY[::-1], 20, 10, 30, 0))              # the order in the file does not decide
    assert {n: sorted(part) for n, part in back.items()} == {n: sorted(part) for n, part in first.items()}
    other = by_name(split_items([replace(i, answer="7", prompt=("!",)) for i in MANY], 20, 10, 30, 0))
    assert other == first                                               # nor do answers


def test_items_without_answers_are_trained_on_only() -> None:
    hidden = [item(f"h{k}", answer=None) for k in range(20)]
    splits = split_items([*hidden, *MANY], 20, 10, 30, 0)
    assert set(names(splits.train)) >= set(names(hidden)) and len(splits.train) == 60
    assert {n: p for n, p in by_name(splits).items() if n != "train"} == {
        n: p for n, p in by_name(split_items(MANY, 20, 10, 30, 0)).items() if n != "train"}
    gate = splits.gate[0]
    pictured = replace(hidden[0], id="seen", images=gate.images)        # no answer, but the gate's picture
    assert "seen" not in names(split_items([pictured, *hidden, *MANY], 20, 10, 30, 0).train)


def test_train_split_without_what_is_measured_on() -> None:
    held = split_items(MANY, 20, 10, 30, 0)
    fresh = [item(f"t{k}", f"q{k}", answer=None) for k in range(5)]
    same_id = item(held.gate[0].id, "q9")
    same_picture = [replace(item(f"s{k}"), images=part[0].images) for k, part in enumerate(
        (held.gate, held.watch, held.held_out))]
    left = held.train[0]
    splits = split_items(MANY, 20, 10, 30, 0, train=[same_id, *fresh, *same_picture, left])
    assert splits.train == [*fresh, left] and by_name(splits) | {"train": 0} == by_name(held) | {"train": 0}
    with pytest.raises(ValueError, match="no items are left"):
        split_items(MANY, 20, 10, 30, 0, train=[same_id, *same_picture])


def test_too_few_items() -> None:
    for sizes in ((101, 1, 1), (40, 40, 21), (98, 1, 2)):
        with pytest.raises(ValueError, match=rf"too few items.*100.*{sizes[0]} \+ {sizes[1]} \+ {sizes[2]}"):
            split_items(MANY, *sizes, 0)
    singles = [item(str(k)) for k in range(10)]
    with pytest.raises(ValueError, match="no items are left"):
        split_items(singles, 4, 3, 3, 0)
    assert len(split_items(singles, 4, 3, 2, 0).train) == 1
    with pytest.raises(ValueError, match="too few"):
        split_items([replace(i, answer=None) for i in singles], 1, 1, 1, 0)


def test_ids_that_repeat() -> None:
    with pytest.raises(ValueError, match="repeat"):
        split_items([*MANY, item("i3", "another")], 20, 10, 30, 0)


def test_disjointness_is_checked() -> None:
    a, b, c, d = (item(n) for n in "abcd")
    check_disjoint(Splits([a], [b], [c], [d]))
    check_disjoint(Splits([a, replace(b, images=a.images)], [c], [d], []))                  # within a split it may be
    for bad in (Splits([a], [b], [c], [a]), Splits([a], [b], [replace(c, images=b.images)], [d]),
                Splits([a], [replace(b, images=(*b.images, *d.images))], [c], [d])):
        with pytest.raises(AssertionError):
            check_disjoint(bad)
