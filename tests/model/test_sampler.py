"""The sampler: one draw against its definition by counts, whose numbers a sample is drawn with, how it ends. (Batches,
banned ids, stop ids and greedy against transformers: test_model.py.)"""
from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model import VLM, generate, load_vlm
from model.draw import Sampling, draw, draw_tokens, draw_uniforms, nucleus_by_threshold
from model.sampler import Completion
from tiny import chat, example_chats, picture, qwen3_vl_config, write_checkpoint

DRAWS = 40_000
ALMOST_1 = math.nextafter(1.0, 0.0)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return load_vlm(write_checkpoint(tmp_path_factory.mktemp("sampler") / "qwen3_vl", qwen3_vl_config()))


# ---- one draw

LOGITS = torch.tensor([0.3, -1.2, 2.0, -torch.inf, 1.1, 0.2, -3.0, 1.9, -0.4])


def definition(logits: Tensor, top_p: float, top_k: int) -> list[float]:
    """Probabilities by the definition, token by token: sort, keep the top_k, renormalise, keep tokens until those
    before hold top_p, renormalise."""
    weights = [math.exp(x) for x in logits.tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k or None]
    total, before, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if before >= top_p:
            break
        kept.append(i)
        before += weights[i] / total
    mass = sum(weights[i] for i in kept)
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(weights))]


def counts(logits: Tensor, top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> list[int]:
    uniforms = torch.rand(DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    tokens, finite = draw_tokens(logits.expand(DRAWS, -1), top_p, top_k, uniforms)
    assert finite.all()
    return torch.bincount(tokens, minlength=len(logits)).tolist()


def chi_square(found: list[int], expected: list[float]) -> float:
    assert all(n == 0 for n, p in zip(found, expected) if p == 0), "a token that was ruled out was drawn"
    return sum((n - DRAWS * p) ** 2 / (DRAWS * p) for n, p in zip(found, expected) if p)


@pytest.mark.parametrize("top_p, top_k", [
    (1.0, 0), (1.0, 3), (1.0, 1), (1.0, 100), (0.9, 0), (0.5, 0), (1e-6, 0), (0.99, 0), (0.9, 4),
    (0.6, 3), (0.75, 2), (0.3, 5)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_distribution(temperature: float, top_p: float, top_k: int) -> None:
    """At most 7 degrees of freedom: 29.9 is exceeded once in 10,000 tables."""
    scaled = LOGITS / temperature
    assert chi_square(counts(scaled, top_p, top_k), definition(scaled, top_p, top_k)) < 29.9


def test_top_p_counts_within_top_k() -> None:
    """The likeliest holds 0.8 of the two likeliest, but 0.4 of all."""
    logits = torch.tensor([0.1, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1]).log()
    assert counts(logits, top_p=0.75, top_k=2)[1] == DRAWS
    assert sum(n > 0 for n in counts(logits, top_p=0.75)) == 5
    assert sum(n > 0 for n in counts(logits, top_p=0.85, top_k=2)) == 2


def test_top_p_takes_the_smallest_set() -> None:
    """A set that holds exactly top_p is enough."""
    halves = torch.tensor([0.5, 0.25, 0.25]).log()
    assert counts(halves, top_p=0.5) == [DRAWS, 0, 0]
    assert sum(n > 0 for n in counts(halves, top_p=0.51)) == 2 and sum(n > 0 for n in counts(halves, top_p=0.76)) == 3


def test_ties() -> None:
    """Of equal tokens top_k keeps exactly k and top_p as many as are needed; all are drawn as often as each other."""
    even = torch.zeros(8)
    assert chi_square(counts(even), [1 / 8] * 8) < 29.9
    for options, kept in (({"top_k": 3}, 3), ({"top_p": 0.5}, 4), ({"top_p": 0.5, "top_k": 6}, 3)):
        found = [n for n in counts(even, **options) if n]
        assert len(found) == kept and all(abs(n - DRAWS / kept) < 500 for n in found)
    peaks = torch.tensor([0.0, 5.0, 0.0, 5.0, 5.0])
    assert {i for i, n in enumerate(counts(peaks, top_k=3)) if n} == {1, 3, 4}


@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.9, 0), (1.0, 4), (0.9, 4)])
def test_extreme_uniforms(top_p: float, top_k: int) -> None:
    """0 and the largest number below 1 draw tokens that have probability, at whichever end the impossible ones are."""
    inf = torch.inf
    for logits in ([-inf, 1.0, 0.5, -inf, 0.0, -inf], [1.0, 0.5, 0.0, -inf, -inf, -inf],
                   [-inf, -inf, -inf, 0.0, 0.5, 1.0], [-inf, -inf, 7.0, -inf, -inf, -inf],
                   [0.0, 0.0, 0.0, -200.0, -200.0, -inf]):
        row = torch.tensor([logits])
        for uniform in (0.0, 1e-300, 0.5, ALMOST_1):
            for nucleus in (None, nucleus_by_threshold):
                [token] = draw_tokens(row, top_p, top_k, torch.tensor([uniform], dtype=torch.float64), nucleus)[0]
                assert row[0, token] > -inf
    wide = torch.randn(1, 150_000, generator=torch.Generator().manual_seed(0))
    assert 0 <= draw_tokens(wide, top_p, top_k, torch.tensor([ALMOST_1], dtype=torch.float64))[0].item() < 150_000


def test_rows_are_drawn_on_their_own() -> None:
    logits = torch.stack((LOGITS, LOGITS.flip(0), torch.zeros(9)))
    uniforms = torch.tensor([0.1, 0.6, 0.99], dtype=torch.float64)
    for top_p, top_k in ((1.0, 0), (0.8, 0), (0.8, 4)):
        for nucleus in (None, nucleus_by_threshold):
            together, _ = draw_tokens(logits, top_p, top_k, uniforms, nucleus)
            alone = [draw_tokens(logits[i:i + 1], top_p, top_k, uniforms[i:i + 1], nucleus)[0].item() for i in range(3)]
            assert together.tolist() == alone
    assert draw_tokens(torch.zeros(3, 9), 1.0, 0, uniforms)[0].tolist() == [0, 5, 8]    # the inverse, in token order


def sorted_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The nucleus as draw_tokens cuts it where it sorts, each token's probability in its own column."""
    total = probabilities.sum(-1, keepdim=True, dtype=torch.float64)
    largest, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = largest.double().cumsum(-1) - largest.double()
    kept = largest.masked_fill(before >= top_p * total, 0)
    return torch.zeros_like(probabilities).scatter(1, tokens, kept)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.25, 0.5, 0.51, 0.9, 0.999])
def test_a_nucleus_without_a_sort_is_the_sorted_one(top_p: float) -> None:
    """The same tokens with the same probabilities, to the last bit: sharp, flat, ties, zeros, a single token."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(64, 40, generator=generator) * scale for scale in (0.01, 1.0, 8.0, 60.0)]
    rows.append(torch.randint(0, 4, (64, 40), generator=generator).float())             # many ties
    rows.append(torch.zeros(1, 40))
    rows.append(torch.full((1, 40), -torch.inf).index_fill(1, torch.tensor([7]), 0.0))
    rows.append(torch.tensor([[0.5, 0.25, 0.25] + [0.0] * 37]).log())                   # exactly 0.5 is enough
    probabilities = torch.cat(rows).softmax(-1)
    found = nucleus_by_threshold(probabilities, top_p)
    assert torch.equal(found, sorted_nucleus(probabilities, top_p))
    assert ((found > 0).sum(1) >= 1).all()


def test_a_wide_nucleus_without_a_sort() -> None:
    """A vocabulary as models have it, where most probabilities are tiny and many are equal."""
    logits = torch.randn(3, 150_000, generator=torch.Generator().manual_seed(0)).bfloat16().float() * 2
    probabilities = logits.softmax(-1)
    assert torch.equal(nucleus_by_threshold(probabilities, 0.9) > 0, sorted_nucleus(probabilities, 0.9) > 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("top_p, top_k, temperature", [(1.0, 0, 1.0), (0.9, 0, 1.0), (0.9, 3, 1.0), (1.0, 0, 0.0)])
def test_a_draw_says_which_rows_are_no_numbers(top_p: float, top_k: int, temperature: float, bad: float) -> None:
    logits = torch.zeros(3, 9)
    logits[1, 4] = bad
    logits[2, 4] = -math.inf                                            # ruled out, which is allowed
    uniforms = None if temperature == 0 else torch.rand(3, dtype=torch.float64)
    for nucleus in (None, nucleus_by_threshold):
        tokens, finite = draw(logits.clone(), Sampling(1, temperature, top_p, top_k), uniforms, nucleus)
        assert finite.tolist() == [True, False, True] and tokens.min() >= 0 and tokens.max() < 9


# ---- a sample's own numbers

def numbers(vlm: VLM, chats: list, n: int = 2, seed: int = 0, seen: Counter | None = None) -> Tensor:
    rows = vlm.processor.rows(chats, {})
    return draw_uniforms(rows, n, 16, seed, Counter() if seen is None else seen).flatten(0, 1)


def test_uniforms_belong_to_prompt_pictures_and_seed(vlm: VLM) -> None:
    pictures = [picture(30, 40, seed) for seed in (1, 2)]
    chats = [chat("a"), chat("b"), chat(pictures[0], "a"), chat(pictures[1], "a"), chat(*pictures, "a"),
             chat(*pictures[::-1], "a"), chat("a")]
    found = numbers(vlm, chats)
    assert found.shape == (14, 16) and found.dtype == torch.float64 and 0 <= found.min() and found.max() < 1
    assert len({tuple(row) for row in found.tolist()}) == 14            # the second chat("a") gets its own as well
    assert torch.equal(found[:2], numbers(vlm, chats[:1]))
    back = numbers(vlm, chats[5::-1])
    assert torch.equal(found[:12].view(6, 2, 16), back.view(6, 2, 16).flip(0))
    assert not torch.isin(numbers(vlm, chats, seed=1), found).any()
    seen: Counter = Counter()
    parts = [numbers(vlm, chats[i:i + 2], seen=seen) for i in range(0, 7, 2)]
    assert torch.equal(torch.cat(parts), found)


def test_uniforms_are_uniform(vlm: VLM) -> None:
    found = draw_uniforms(vlm.processor.rows([chat("a"), chat("b")], {}), 50, 200, 0, Counter()).flatten(0, 1)
    bins = torch.bincount((found * 10).long().flatten(), minlength=10)
    assert ((bins - 2000) ** 2 / 2000).sum() < 33.7                     # 9 degrees of freedom, 1 in 10,000
    assert abs(torch.corrcoef(found)[0, 1:]).max() < 0.35               # neighbouring samples are not alike


# ---- whole samples

HOW = {"n": 2, "max_new_tokens": 6, "temperature": 1.0, "seed": 5}


def test_samples_do_not_depend_on_order(vlm: VLM) -> None:
    chats = example_chats()
    found = generate(vlm, chats, **HOW)
    for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
        for size in (1, 3, 64):
            assert generate(vlm, [chats[i] for i in order], batch_size=size, **HOW) == [found[i] for i in order]


def test_equal_prompts_get_different_samples(vlm: VLM) -> None:
    """As if all their samples had been asked for at once; in one batch or several."""
    same = chat(picture(30, 40), "what is this?")
    at_once = generate(vlm, [same], **HOW | {"n": 6})[0]
    assert len({c.token_ids for c in at_once}) == 6
    for size in (1, 2, 64):
        found = generate(vlm, [same, chat("hello"), same, same], batch_size=size, **HOW)
        assert found[0] + found[2] + found[3] == at_once
        assert found[1] == generate(vlm, [chat("hello")], **HOW)[0]


def test_seeds_differ(vlm: VLM) -> None:
    found = [generate(vlm, [chat("hi")], **HOW | {"seed": seed})[0][0].token_ids for seed in range(10)]
    assert len(set(found)) == 10 and found[5] == generate(vlm, [chat("hi")], **HOW)[0][0].token_ids


def test_first_tokens_follow_the_models_distribution(vlm: VLM) -> None:
    """What generate draws, after temperature, nucleus and bans, is what its definition says: 4,000 samples."""
    from model.samples import banned_tokens
    messages, draws = chat("hello"), 4000
    with torch.no_grad():
        logits = vlm(vlm.processor([messages]))[0, -1].index_fill(0, banned_tokens(vlm), -torch.inf) / 0.25
    expected = torch.tensor(definition(logits, 0.8, 20))
    rows = generate(vlm, [messages], n=draws, max_new_tokens=1, temperature=0.25, top_p=0.8, top_k=20, seed=1)[0]
    found = torch.bincount(torch.tensor([c.token_ids[0] for c in rows]), minlength=len(logits))
    kept = expected > 0
    assert not found[~kept].any() and 5 < kept.sum() <= 20
    assert ((found - draws * expected)[kept] ** 2 / (draws * expected)[kept]).sum() < 49.0  # 19 degrees, 1 in 5,000


def test_greedy(vlm: VLM) -> None:
    chats = example_chats()
    found = generate(vlm, chats, n=3, temperature=0, max_new_tokens=5)
    assert all(row[0] == row[1] == row[2] for row in found)
    assert found == generate(vlm, chats, n=3, temperature=0, max_new_tokens=5, seed=9, top_p=0.5, top_k=7, batch_size=1)
    assert found == generate(vlm, chats, n=3, temperature=1.0, top_k=1, max_new_tokens=5)
    assert [row[0] for row in found] != [row[0] for row in generate(vlm, chats, temperature=1.0, max_new_tokens=5)]


def test_how_a_sample_ends(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways out in one batch: the stop token is kept and named, what was cut is full; nothing follows a stop."""
    [first, second] = sorted(vlm.stop_ids)
    plain = vlm.logits
    bump = torch.zeros(len(vlm.head_weight))
    bump[[first, second]] = plain(torch.zeros(1, 48)).max() + 4.0
    monkeypatch.setattr(vlm, "logits", lambda hidden: plain(hidden) + bump, raising=False)
    rows = [c for row in generate(vlm, example_chats(), n=20, max_new_tokens=4, temperature=1.0) for c in row]
    assert {c.finish_reason for c in rows} == {"stop", "length"}
    assert {c.token_ids[-1] for c in rows if c.finish_reason == "stop"} == {first, second}
    assert len({len(c.token_ids) for c in rows}) > 2
    for c in rows:
        assert not set(c.token_ids[:-1]) & {first, second}
        assert (c.finish_reason == "stop") == (c.token_ids[-1] in (first, second))
        assert len(c.token_ids) == 4 or c.finish_reason == "stop"
        assert c.text == vlm.processor.decode([i for i in c.token_ids if i < 256])


def test_cut_at_the_first_token(vlm: VLM) -> None:
    [[completion]] = generate(vlm, [chat("hi")], max_new_tokens=1, temperature=0)
    assert len(completion.token_ids) == 1 and completion.finish_reason == "length"
    assert isinstance(completion, Completion) and generate(vlm, []) == []


@pytest.mark.parametrize("name, values", [
    ("max_new_tokens", (0, -1)), ("temperature", (-0.1, 1e-9, math.inf, math.nan)),
    ("top_p", (0.0, -0.5, 1.01, math.nan)),
    ("top_k", (-1,))])
def test_out_of_range(name: str, values: tuple) -> None:
    good = {"max_new_tokens": 1, "temperature": 0, "top_p": 1.0, "top_k": 0}
    assert Sampling(**good).top_k == 0
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} is out of range: {value}"):
            Sampling(**good | {name: value})


def test_out_of_range_before_anything_is_computed() -> None:
    with pytest.raises(ValueError, match="top_p"):
        generate(SimpleNamespace(), [chat("hi")], top_p=2.0)
