"""Packed pair rows: log-probabilities and gradients as of two rows of their own, and what their keys depend on. (Hidden
states: test_model.py.)"""
from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo import sequence_logps
from model import VLM, load_vlm
from model.attention import PackedTree, Tree, attend
from model.batch import collate
from model.pairs import CHOSEN, PROMPT, REJECTED, CompletionRows, PairRows, pack_completions, pack_pairs, row_length
from tiny import CONFIGS, chat, example_chats, picture, write_checkpoint


@pytest.fixture(scope="module", params=CONFIGS)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return load_vlm(write_checkpoint(tmp_path_factory.mktemp("pairs") / request.param, CONFIGS[request.param]()))


def triples(vlm: VLM) -> list[tuple]:
    """Pairs of different lengths: both sides end with a stop token, one, or none; single tokens; only a stop token; the
    same first tokens, the same completion."""
    stop = max(vlm.stop_ids)
    sides = [([5, 6, 7, stop], [9, stop]), ([11], [12, 13, 14, 15, 16, stop]), ([stop], [6]),
             ([70, 71, 72], [70, stop]), ([30, 31], [30, 31])]
    return [(c, *side) for c, side in zip([*example_chats(), chat(picture(30, 40), "once more")], sides)]


def packed_logps(vlm: VLM, pairs: list[tuple]) -> Tensor:
    """(2B,) of the chosen sides, then the rejected."""
    rows = pack_pairs(vlm.processor, pairs)
    hidden = vlm.hidden(rows.batch, vlm.image_features(rows.batch))
    return sequence_logps(rows.predictors(hidden), vlm.head_weight, rows.targets, rows.mask)


def separate_logps(vlm: VLM, messages: list, completion: list[int]) -> Tensor:
    """The naive way: one row [prompt | completion], its full logits, shifted by one."""
    pictures: dict = {}
    [prompt] = vlm.processor.rows([messages], pictures)
    row = prompt.continued(completion)
    logps = vlm(collate([row], pictures, vlm.processor.pad_id))[0].log_softmax(-1)
    return logps[len(prompt.ids) - 1:-1].gather(1, torch.tensor(completion)[:, None]).sum()


def gradients(vlm: VLM, value: Tensor) -> dict[str, Tensor]:
    vlm.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in vlm.named_parameters()}


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def test_logps_and_gradients_equal_separate_rows(vlm: VLM) -> None:
    """Of one number that depends on every side with a weight of its own, so that no two can be mistaken."""
    pairs = triples(vlm)
    weights = torch.tensor([1.0, -0.5, 0.75, 0.3, -0.2, -1.0, 0.6, 0.4, -0.8, 0.9])
    found = packed_logps(vlm, pairs)
    expected = torch.stack([separate_logps(vlm, pair[0], pair[which]) for which in (1, 2) for pair in pairs])
    assert bool(((found - expected).abs() <= 1e-5 * expected.abs()).all())
    assert found[4].item() == pytest.approx(found[9].item(), rel=1e-6)                     # one completion twice
    ours, theirs = (gradients(vlm, values @ weights) for values in (found, expected))
    assert all(close(ours[name], theirs[name]) for name in ours), {
        name: ((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in ours
        if not close(ours[name], theirs[name])}


@torch.no_grad()
def test_a_pair_does_not_depend_on_its_batch(vlm: VLM) -> None:
    pairs = triples(vlm)
    together = packed_logps(vlm, pairs)
    alone = torch.stack([packed_logps(vlm, [pair]) for pair in pairs]).T.flatten()
    back = packed_logps(vlm, pairs[::-1]).view(2, -1).flip(1).flatten()
    assert close(together, alone) and close(together, back)


@torch.no_grad()
def test_sides_do_not_see_each_other(vlm: VLM) -> None:
    """Another chosen side, of another length, leaves the rejected one's log-probability; and the other way round."""
    messages = example_chats()[1]
    for other in ([8], [99, 98, 97, 96, 95]):
        first = packed_logps(vlm, [(messages, [5, 6, 7], [9, 10])])
        assert close(packed_logps(vlm, [(messages, other, [9, 10])])[1], first[1])
        assert close(packed_logps(vlm, [(messages, [5, 6, 7], other)])[0], first[0])


@torch.no_grad()
def test_swapped_sides(vlm: VLM) -> None:
    pairs = triples(vlm)
    swapped = packed_logps(vlm, [(c, b, a) for c, a, b in pairs])
    assert close(packed_logps(vlm, pairs), torch.cat(swapped.chunk(2)[::-1]))


def test_targets_and_their_sources(vlm: VLM) -> None:
    """The first token of BOTH sides comes from the prompt's last column, the stop token from the one before it."""
    pairs = triples(vlm)
    rows = pack_pairs(vlm.processor, pairs)
    lengths = [len(row.ids) for row in vlm.processor.rows([c for c, *_ in pairs], {})]
    for s, (b, which) in enumerate((b, which) for which in (1, 2) for b in range(len(pairs))):
        completion, kept = list(pairs[b][which]), rows.mask[s]
        assert rows.targets[s][kept].tolist() == completion and not rows.targets[s][~kept].any()
        start = lengths[b] + (len(pairs[b][1]) if which == 2 else 0)
        assert rows.sources[s][kept].tolist() == [lengths[b] - 1, *range(start, start + len(completion) - 1)]
        assert rows.batch.input_ids[b, start:start + len(completion)].tolist() == completion
        positions = rows.batch.position_ids[:, b]
        after = positions[:, :lengths[b]].max() + 1 + torch.arange(len(completion))
        assert torch.equal(positions[:, start:start + len(completion)], after.expand(3, -1))


def test_the_drawn_pair(vlm: VLM) -> None:
    """What pairs.py draws, behind as many columns as the prompt has more than three tokens."""
    rows = pack_pairs(vlm.processor, [(chat("hi"), [5, 6], [7, 8, 9])])
    more = len(vlm.processor.rows([chat("hi")], {})[0].ids) - 3
    assert rows.targets.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert (rows.sources - more)[rows.mask].tolist() == [2, 3, 2, 5, 6]
    assert (rows.batch.position_ids[0, 0, more:] - more).tolist() == [0, 1, 2, 3, 4, 3, 4, 5]


def expected_completion_rows(vlm: VLM, examples: list[tuple]) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, sources and mask by the definition: the token before, in the row, predicts the next."""
    prompts = vlm.processor.rows([messages for messages, _ in examples], {})
    targets = torch.zeros(len(examples), max(len(ids) for _, ids in examples), dtype=torch.long)
    sources, mask = targets.clone(), targets.bool()
    for b, (prompt, (_, ids)) in enumerate(zip(prompts, examples)):
        targets[b, :len(ids)], mask[b, :len(ids)] = torch.tensor(ids), True
        sources[b, :len(ids)] = len(prompt.ids) - 1 + torch.arange(len(ids))
    return targets, sources, mask


def test_completions_behind_their_prompts(vlm: VLM) -> None:
    """One row [prompt | completion] each, right-padded, and which state predicts which token of it."""
    examples = [(messages, chosen) for messages, chosen, _ in triples(vlm)]
    packed = pack_completions(vlm.processor, examples).to("cpu")
    assert isinstance(packed, CompletionRows)
    pictures: dict = {}
    prompts = vlm.processor.rows([messages for messages, _ in examples], pictures)
    rows = [prompt.continued(ids) for prompt, (_, ids) in zip(prompts, examples)]
    batch = collate(rows, pictures, vlm.processor.pad_id)
    for name in ("input_ids", "attention_mask", "position_ids", "sees"):
        if hasattr(batch, name):
            assert torch.equal(getattr(packed.batch, name), getattr(batch, name))
    assert packed.batch.placed == batch.placed and packed.batch.tree is None
    for ours, expected in zip((packed.targets, packed.sources, packed.mask), expected_completion_rows(vlm, examples)):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)
    hidden = torch.randn(*batch.input_ids.shape, 3, generator=torch.Generator().manual_seed(0))
    expected = hidden[torch.arange(len(rows))[:, None], packed.sources]
    assert torch.equal(packed.predictors(hidden), expected)


@torch.no_grad()
def test_logps_of_completions(vlm: VLM) -> None:
    examples = [(messages, chosen) for messages, chosen, _ in triples(vlm)]
    rows = pack_completions(vlm.processor, examples)
    hidden = vlm.hidden(rows.batch, vlm.image_features(rows.batch))
    found = sequence_logps(rows.predictors(hidden), vlm.head_weight, rows.targets, rows.mask)
    assert close(found, torch.stack([separate_logps(vlm, *example) for example in examples]))


def test_predictors_take_each_row_its_own_states() -> None:
    rows = PairRows(None, torch.zeros(4, 2), torch.tensor([[0, 1], [2, 3], [0, 2], [2, 0]]), torch.ones(4, 2), [])
    hidden = torch.arange(8.0).view(2, 4, 1)                            # row 0: 0 to 3, row 1: 4 to 7
    assert rows.predictors(hidden)[..., 0].tolist() == [[0, 1], [6, 7], [0, 2], [6, 4]]


def dense_mask(segments: list[list[int]], length: int) -> Tensor:
    """(B, 1, T, T) by the definition: causal, and only to the beginning or to one's own end; padding to anything."""
    mask = torch.ones(len(segments), 1, length, length, dtype=torch.bool).tril()
    for b, row in enumerate(segments):
        for i in range(len(row)):
            for j in range(i + 1):
                mask[b, 0, i, j] = row[j] == 0 or row[j] == row[i]
    return mask


@pytest.mark.parametrize("segments", [
    [[PROMPT] * 5 + [CHOSEN] * 4 + [REJECTED] * 2, [PROMPT, CHOSEN] + [REJECTED] * 3, [PROMPT] * 9 + [CHOSEN] * 2],
    [[0] * 3 + [1] * 2 + [2] * 5 + [3], [0] * 6 + [1] * 4, [0, 1, 2, 3, 3]], [[0] * 4 + [1]]])
def test_tree_attention(segments: list[list[int]]) -> None:
    """Against one softmax over a dense mask: values and gradients, wherever there is a token."""
    length, generator = max(map(len, segments)) + 2, torch.Generator().manual_seed(0)
    shapes = [(len(segments), heads, length, 8) for heads in (4, 2, 2)]
    found = []
    for tree in (True, False):
        q, k, v = (torch.randn(s, generator=generator.manual_seed(i)).requires_grad_() for i, s in enumerate(shapes))
        y = Tree.of(segments, length).attend(q, k, v) if tree else attend(q, k, v, dense_mask(segments, length))
        real = torch.tensor([[t < len(row) for t in range(length)] for row in segments])
        kept = y.transpose(1, 2)[real]
        (kept * torch.arange(1.0, 1 + kept[..., 0].numel()).view(len(kept), -1, 1)).sum().backward()
        assert y.shape == q.shape and y.isfinite().all()                # padding too: NaN times 0 is NaN
        found.append([kept.detach(), q.grad, k.grad, v.grad])
    assert all(close(a, b, 1e-6) for a, b in zip(*found))


def test_the_drawn_tree() -> None:
    """What Tree draws: who attends to whom in "a b c | d e | f g h", read off the attention itself."""
    tree = Tree.of([[0, 0, 0, 1, 1, 2, 2, 2]], 8)
    same = torch.zeros(1, 1, 8, 8)
    weights = tree.attend(same, same, torch.eye(8)[None, None])[0, 0]                      # (8, 8) who reads from whom
    drawn = re.findall(r"^ +[a-h]   ((?:[x.] ?)+)", Tree.__doc__, re.MULTILINE)
    expected = [[mark == "x" for mark in marks.split()] for marks in drawn]
    assert [len(marks) for marks in expected] == list(range(1, 9))
    assert [row[:i + 1] for i, row in enumerate((weights > 0).tolist())] == expected
    assert not weights.triu(1).any()


def test_the_drawn_packed_tree() -> None:
    """What PackedTree draws, sequence by sequence. Where a row has fewer suffixes than another, it has fewer
    sequences."""
    packed = PackedTree.of(Tree.of([[0, 0, 0, 1, 1, 2, 2, 2]], 8).sizes, 8)
    for name, places, starts in zip(("queries", "keys"), (packed.queries, packed.keys), packed.starts, strict=True):
        sequences = places.tensor_split(starts[1:-1].tolist())
        found = [" ".join("abcdefgh"[place] for place in sequence) for sequence in sequences]
        [drawn] = re.findall(rf"^ +{name} +(.+)$", PackedTree.__doc__, re.MULTILINE)
        assert re.split(r" {2,}", drawn) == found and starts[-1] == len(places)
    assert (packed.most_queries, packed.most_keys) == (3, 6)
    uneven = PackedTree.of(Tree.of([[0, 1, 2], [0, 0]], 3).sizes, 3)
    assert uneven.queries.tolist() == [0, 1, 2, 3, 4] and uneven.starts[0].tolist() == [0, 1, 2, 3, 5]


def test_the_row_is_as_long_as_was_said(vlm: VLM) -> None:
    for example in (chat("hello"), chat(picture(30, 40), "what?"), *example_chats()):
        rows = pack_pairs(vlm.processor, [(example, [5, 6, 7], [9, 8])])
        assert row_length(vlm.processor, example, [5, 6, 7], [9, 8]) == rows.batch.attention_mask.sum()


def test_keys_name_prompt_pictures_and_tokens(vlm: VLM) -> None:
    def key(messages: list, chosen: Any = (5, 6), rejected: Any = (7,), more: tuple = ()) -> str:
        return pack_pairs(vlm.processor, [(messages, chosen, rejected), *more]).keys[0]
    base = key(chat(picture(30, 40, 1), "what?"))
    assert base == key(chat(picture(30, 40, 1), "what?")) == key(chat(picture(30, 40, 1), "what?"), [5, 6], [7])
    assert base == key(chat(picture(30, 40, 1), "what?"), more=((chat("x"), [1] * 9, [2]),))   # nor on the batch
    others = [key(chat(picture(30, 40, 2), "what?")), key(chat(picture(30, 40, 1), "What?")),
              key(chat(picture(40, 30, 1), "what?")), key(chat("what?", picture(30, 40, 1))), key(chat("what?")),
              key(chat(picture(30, 40, 1), picture(30, 40, 1), "what?")),
              *(key(chat(picture(30, 40, 1), "what?"), *sides) for sides in (
                  ((7,), (5, 6)), ((5,), (6, 7)), ((5, 6, 7), (7,)), ((5, 8), (7,)), ((5, 6), (8,))))]
    assert len({base, *others}) == 1 + len(others)
    pictures = [picture(30, 40, seed) for seed in (1, 2)]
    assert key(chat(*pictures, "?")) != key(chat(*pictures[::-1], "?"))


@pytest.mark.parametrize("sides", [([], [1]), ([1], []), ((), ())])
def test_empty_completions(vlm: VLM, sides: tuple) -> None:
    with pytest.raises(ValueError, match="without tokens"):
        pack_pairs(vlm.processor, [(chat("hi"), *sides)])
    if [] in sides:
        with pytest.raises(ValueError, match="without tokens"):
            pack_completions(vlm.processor, [(chat("hi"), sides[0]), (chat("hi"), sides[1])])
