"""Pictures go through a tower in chunks that patches bound, so that their number does not decide how much memory is
taken; the features are those of one call, to the last bit."""
from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model import VLM, generate, load_vlm
from model.images import Picture
from model.vlm import PATCHES_AT_ONCE, FeatureCache
from tiny import CONFIGS, chat, picture, write_checkpoint

SIZES = [(30, 40), (16, 64), (50, 20), (70, 24), (24, 24), (64, 64), (24, 24), (90, 10), (44, 60)]


@pytest.fixture(scope="module", params=CONFIGS)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    folder = write_checkpoint(tmp_path_factory.mktemp("chunks") / request.param, CONFIGS[request.param]())
    return load_vlm(folder).requires_grad_(False)


def count_calls(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> list[list[Picture]]:
    """A list that grows by the pictures of each call of encode_images."""
    calls: list[list[Picture]] = []
    plain = type(vlm).encode_images

    def counted(self: VLM, pictures: list[Picture]) -> list[Tensor]:
        calls.append(list(pictures))
        return plain(self, pictures)
    monkeypatch.setattr(type(vlm), "encode_images", counted)
    return calls


def many_pictures() -> list[list[dict]]:
    """Chats of one, two and no pictures of several sizes, one of them twice."""
    pictures = [picture(width, height, seed) for seed, (width, height) in enumerate(SIZES)]
    return [chat(*pictures[:2], "a"), chat(pictures[2], "b"), chat("c"), *(chat(each, "d") for each in pictures[3:]),
            chat(pictures[0], "e")]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [1, 150, 500])
def test_chunks(vlm: VLM, limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call has more patches than the limit, but for one of a single picture; every picture is in one call."""
    monkeypatch.setattr(vlm, "compute_dtype", dtype)
    batch = vlm.processor(many_pictures())
    at_once = vlm.image_features(batch)

    calls = count_calls(vlm, monkeypatch)
    monkeypatch.setattr("model.vlm.PATCHES_AT_ONCE", limit)
    in_chunks = vlm.image_features(batch)
    assert len(calls) > 1
    for pictures in calls:
        assert len(pictures) == 1 or sum(vlm.patches(each) for each in pictures) <= limit
    for one, following in pairwise(calls):               # none is smaller than it need be
        assert sum(vlm.patches(each) for each in [*one, following[0]]) > limit
    encoded = [each.key for pictures in calls for each in pictures]
    assert sorted(encoded) == sorted(each.key for each in batch.pictures)

    assert len(in_chunks) == len(at_once) == 1 + len(SIZES)
    for features, expected in zip(in_chunks, at_once, strict=True):
        assert torch.equal(features, expected)


def test_answers_are_the_same(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache that keeps all features, and with one that can hold a single picture's."""
    options = {"n": 2, "max_new_tokens": 5, "temperature": 1.0}
    expected = generate(vlm, many_pictures(), **options)
    largest = max(features.nbytes for features in vlm.image_features(vlm.processor(many_pictures())))
    monkeypatch.setattr("model.vlm.PATCHES_AT_ONCE", 150)
    for max_bytes in (10 ** 8, largest):
        monkeypatch.setattr(vlm, "feature_cache", FeatureCache(max_bytes))
        assert generate(vlm, many_pictures(), **options) == expected


def test_patches_are_what_the_tower_computes(vlm: VLM) -> None:
    """Qwen: patches. Mllama: the tokens of all tiles, used or not, 6432 of a published picture."""
    batch = vlm.processor(many_pictures())
    if hasattr(batch, "sees"):
        assert {vlm.patches(each) for each in batch.pictures} == {4 * 56}
    else:
        assert [vlm.patches(each) for each in batch.pictures] == [len(each.pixels) for each in batch.pictures]


def test_a_batch_of_large_pictures() -> None:
    """Twelve megapixels as Qwen3-VL sees them: each picture alone, however many there are; small ones by the dozen."""
    large = Picture((1, 188, 250), 11_750, "large", lambda: torch.empty(0))
    small = Picture((1, 30, 40), 300, "small", lambda: torch.empty(0))
    assert math.prod(large.grid) > PATCHES_AT_ONCE
    chunks = list(VLM().chunks([small] * 30 + [large] * 3))
    assert [len(chunk) for chunk in chunks] == [13, 13, 4, 1, 1, 1]
    assert list(VLM().chunks([])) == []
