"""Prompts that begin alike: who shares a row, that nothing else changes, and next_digits against full passes."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model import VLM, generate, load_vlm, next_digits
from model.batch import Row, collate
from model.prompts import group_prompts, pack_prompts, shared_length
from model.samples import unfinished
from tiny import CONFIGS, chat, picture, write_checkpoint
from verifier import rubric_chat

WORDS = "a long question about everything that is to be seen here, and about what is not?"


@pytest.fixture(scope="module", params=CONFIGS)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return load_vlm(write_checkpoint(tmp_path_factory.mktemp("prompts") / request.param, CONFIGS[request.param]()))


def alike() -> list[list[dict]]:
    """Three rubric prompts of one item, two of another (of two pictures), one alone, two without pictures."""
    items = [chat(picture(30, 40, 1), WORDS), chat(picture(30, 40, 2), picture(64, 32, 3), WORDS), chat(WORDS)]
    return [*(rubric_chat(items[0], c) for c in ("7", "seventy seven", "8")), *(rubric_chat(items[1], c) for c in "12"),
            chat(picture(30, 40, 1), "hello"), *(rubric_chat(items[2], c) for c in ("x", "y y"))]


def rows_of(vlm: VLM, chats: list) -> tuple[list, dict]:
    pictures: dict = {}
    return vlm.processor.rows(chats, pictures), pictures


def groups_of(vlm: VLM, rows: list) -> list[list[int]]:
    return [group.members for group in group_prompts(rows, vlm.processor.image_id)]


def test_who_shares_a_row(vlm: VLM) -> None:
    rows, pictures = rows_of(vlm, alike())
    assert groups_of(vlm, rows) == [[0, 1, 2], [3, 4], [5], [6, 7]]
    packed = pack_prompts(rows, pictures, vlm.processor.image_id, vlm.processor.pad_id)
    assert sorted(i for p in packed for i in p.numbers.flatten().tolist() if i >= 0) == list(range(len(rows)))
    assert any(-1 in p.numbers.tolist()[-1] for p in packed) and packed[0].numbers.tolist()[0] == [0, 1, 2]
    tokens = sum(int(p.batch.attention_mask.sum()) for p in packed)
    assert tokens < 0.65 * sum(len(row.ids) for row in rows)
    for prompts in packed:                              # each prompt's own tokens, in their order, at its own positions
        for g, numbers in enumerate(prompts.numbers.tolist()):
            for k, number in enumerate(numbers):
                if number >= 0:
                    mine, row = prompts.visible[g, k], rows[number]
                    assert prompts.batch.input_ids[g][mine].tolist() == row.ids
                    assert prompts.batch.position_ids[:, g, mine].tolist() == row.positions.tolist()
                    assert prompts.position[g, k] == row.positions.max()
                    assert mine.nonzero().max() == prompts.last[g, k]


def test_what_keeps_prompts_apart(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another picture; a picture after the words; less than half in common; a row that would grow too long."""
    first = chat(picture(30, 40, 1), WORDS + "a")
    for other in (chat(picture(30, 40, 2), WORDS + "b"), chat(WORDS + "b"), chat(WORDS, picture(30, 40, 1), "b"),
                  chat(picture(30, 40, 1), "b" * 400)):
        rows, _ = rows_of(vlm, [first, other])
        assert groups_of(vlm, rows) == [[0], [1]], other
    same, _ = rows_of(vlm, [first, first])
    assert shared_length(*same, vlm.processor.image_id) == len(same[0].ids) - 1            # one is left to predict from
    monkeypatch.setattr("model.prompts.MAX_SHARED_ROW", 800)
    rows, _ = rows_of(vlm, [chat(WORDS * 3 + str(i) * 190) for i in range(4)])             # 250 alike, 200 of its own
    assert groups_of(vlm, rows) == [[0, 1], [2, 3]]


def test_a_neighbour_that_shares_less_is_kept_apart(vlm: VLM) -> None:
    """Two items of three prompts each, whose questions begin alike: what they share would cost each item its own."""
    rows, pictures = rows_of(vlm, [chat(WORDS * 2 + question * 60 + c) for question in "xy" for c in "abc"])
    assert groups_of(vlm, rows) == [[0, 1, 2], [3, 4, 5]]
    for group in group_prompts(rows, vlm.processor.image_id):
        members = [rows[i] for i in group.members]
        [prompts] = pack_prompts(members, pictures, vlm.processor.image_id, vlm.processor.pad_id)
        assert prompts.batch.input_ids.shape == (1, group.tokens)


def test_rows_of_other_lengths_are_kept_apart(vlm: VLM) -> None:
    """Of what is computed at most half is padding, however long one prompt is."""
    rows, pictures = rows_of(vlm, [chat("b" * n) for n in (1, 2, 900, 3, 4, 70, 5, 6)])
    packed = pack_prompts(rows, pictures, vlm.processor.image_id, vlm.processor.pad_id)
    assert sorted(i for p in packed for i in p.numbers.flatten().tolist()) == list(range(8)) and len(packed) < 5
    for prompts in packed:
        assert prompts.batch.input_ids.numel() <= 2 * prompts.batch.attention_mask.sum()


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 1.0, "n": 3, "seed": 4},
                                 {"temperature": 1.0, "n": 2, "top_p": 0.8}])
def test_completions_are_those_of_each_prompt_alone(vlm: VLM, how: dict[str, Any]) -> None:
    chats = alike()
    together = generate(vlm, chats, max_new_tokens=7, **how)
    assert together == [generate(vlm, [each], max_new_tokens=7, **how)[0] for each in chats]
    assert together == generate(vlm, chats, max_new_tokens=7, batch_size=2, **how)
    assert len({c.token_ids for row in together for c in row}) > (3 if how["temperature"] else 1)


@torch.no_grad()
def test_hidden_states_are_those_of_each_prompt_alone(vlm: VLM) -> None:
    rows, pictures = rows_of(vlm, alike())
    for prompts in pack_prompts(rows, pictures, vlm.processor.image_id, vlm.processor.pad_id):
        hidden = vlm.hidden(prompts.batch, vlm.image_features(prompts.batch))
        for g, numbers in enumerate(prompts.numbers.tolist()):
            for k, number in enumerate(numbers):
                if number >= 0:
                    batch = collate([rows[number]], pictures, vlm.processor.pad_id)
                    alone = vlm.hidden(batch, vlm.image_features(batch))[0]
                    assert (hidden[g][prompts.visible[g, k]] - alone).abs().max() < 1e-5 * alone.abs().max()


def test_finished_samples_are_dropped(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a head that often stops, what is left of the batch goes on as if nothing had been dropped."""
    plain, sizes = vlm.logits, []
    bump = torch.zeros(len(vlm.head_weight))
    bump[max(vlm.stop_ids)] = plain(torch.zeros(1, vlm.head_weight.shape[1])).max() + 3.0

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return plain(hidden) + bump
    monkeypatch.setattr(vlm, "logits", logits, raising=False)
    how = {"n": 4, "max_new_tokens": 30, "temperature": 1.0, "top_p": 0.95}
    together = generate(vlm, alike(), **how)
    assert sizes[0] == 3 * 3 * 4 and min(sizes) < 9
    assert together == [generate(vlm, [each], **how)[0] for each in alike()]
    lengths = {len(c.token_ids) for row in together for c in row}
    assert min(lengths) < 4 and max(lengths) > 12


def test_the_drawn_prompts() -> None:
    """What prompts.py draws."""
    rows = [Row([ord(letter) for letter in text], np.tile(np.arange(len(text)), (3, 1)), []) for text in
            ("abcde", "abcfg", "uvw")]
    [prompts] = pack_prompts(rows, {}, image_id=0, pad_id=ord("_"))
    assert ["".join(map(chr, ids)) for ids in prompts.batch.input_ids.tolist()] == ["abcdefg", "uvw____"]
    assert prompts.batch.position_ids[0, 0].tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert prompts.numbers.tolist() == [[0, 1], [2, -1]] and prompts.last.tolist() == [[4, 6], [2, 0]]
    shown = {number: columns.nonzero()[:, 0].tolist() for number, columns in prompts.numbered(
        prompts.visible.flatten(0, 1))}
    assert shown == {0: [0, 1, 2, 3, 4], 1: [0, 1, 2, 5, 6], 2: [0, 1, 2]}


def test_unfinished() -> None:
    done = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0]]).bool().flatten()
    groups, samples = unfinished(done, 3)
    assert groups.tolist() == [1, 2] and samples.tolist() == [3, 4, 7, 8]
    assert unfinished(torch.tensor([False, True, False]), 1)[1].tolist() == [0, 2]


@torch.no_grad()
def test_next_digits(vlm: VLM) -> None:
    """Of prompts that share a row: as the definition has it, from the full logits of each prompt and reply alone."""
    chats, replies = alike(), ("{s: ", "{s: 0.")
    chats += [chats[-1], chats[-1], chats[0], chats[0]]            # equal ones share all but a token
    found = torch.tensor(next_digits(vlm, chats, replies, batch_size=7))
    assert found.shape == (len(chats), 2, 10)
    vocabulary = {token: i for token, i in vlm.processor.tokenizer.get_vocab().items() if token[0] in "0123456789"}
    for messages, each in zip(chats, found):
        for reply, digits in zip(replies, each):
            rows, pictures = rows_of(vlm, [messages])
            ids = vlm.processor.encode(reply)
            row = rows[0].continued(ids)
            odds = vlm(collate([row], pictures, vlm.processor.pad_id))[0, -1].softmax(-1)
            expected = [sum(odds[i].item() for token, i in vocabulary.items() if token[0] == str(d)) for d in range(10)]
            assert digits.tolist() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="do not begin those"):
        next_digits(vlm, chats, ("{t", "{s: 0."))
