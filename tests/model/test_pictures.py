"""Pictures are preprocessed once: what a processor remembers of them, and the limits of their size."""
from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from golden.make import PREPROCESSING, sample_pictures
from model import VLM, generate, images, load_vlm, save_vlm
from model.images import MllamaImages, PictureReader, QwenImages
from model.processor import Processor
from model.vlm import FeatureCache
from tiny import CONFIGS, chat, picture, write_checkpoint

QWEN = ("qwen3_vl", "qwen2_5_vl")


@dataclass
class Counts:
    """How often pictures were resized, and their pixels made."""
    resized: int = 0
    pixels: int = 0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    """Counts what the readers of pictures do."""
    counted = Counts()

    def count(reader: type[PictureReader]) -> None:
        resize_levels, make_pixels = reader.resize_levels, reader.make_pixels

        def counting_resize(self: PictureReader, *args: object) -> np.ndarray:
            counted.resized += 1
            return resize_levels(self, *args)

        def counting_pixels(self: PictureReader, levels: np.ndarray, *device: torch.device) -> torch.Tensor:
            counted.pixels += 1
            return make_pixels(self, levels, *device)

        monkeypatch.setattr(reader, "resize_levels", counting_resize)
        monkeypatch.setattr(reader, "make_pixels", counting_pixels)

    count(QwenImages)
    count(MllamaImages)
    yield counted


def load_tiny(family: str, folder: Path) -> VLM:
    """A family's tiny checkpoint."""
    return load_vlm(write_checkpoint(folder, CONFIGS[family]()))


def reader_of(family: str, folder: Path) -> PictureReader:
    """The reader of a family's published preprocessing."""
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING[family]))
    return MllamaImages(folder) if family == "mllama" else QwenImages(folder)


# ---- once

@pytest.mark.parametrize("family", CONFIGS)
def test_a_picture_met_again_is_not_preprocessed(family: str, tmp_path: Path, counts: Counts) -> None:
    """Rows, positions and keys are those of the first time; no pixels are made for them."""
    processor = load_tiny(family, tmp_path).processor
    first = processor([chat(picture(50, 30), "what?")])
    assert (counts.resized, counts.pixels) == (1, 0)
    again = processor([chat(picture(50, 30), "what?"), chat("and", picture(50, 30), "here?")])
    assert (counts.resized, counts.pixels) == (1, 0)

    assert torch.equal(again.input_ids[0][:first.input_ids.shape[1]], first.input_ids[0])
    assert again.pictures == first.pictures
    assert len(again.pictures) == 1


@pytest.mark.parametrize("family", CONFIGS)
def test_pixels_of_a_picture_met_again(family: str, tmp_path: Path, counts: Counts) -> None:
    """They are made when they are read, and are the first time's, whatever the caller did to his picture."""
    reader = reader_of(family, tmp_path)
    image = picture(70, 90)
    first = reader(image)
    again = reader(image)
    image.paste((0, 0, 0), (0, 0, 70, 90))
    image.close()
    assert torch.equal(first.pixels, again.pixels)
    assert (counts.resized, counts.pixels) == (2, 2)


@pytest.mark.parametrize("family", CONFIGS)
def test_features_that_are_kept_need_no_pixels(family: str, tmp_path: Path, counts: Counts) -> None:
    """A picture is preprocessed once and encoded once, however often the model is asked about it."""
    vlm = load_tiny(family, tmp_path).requires_grad_(False)
    vlm.feature_cache = FeatureCache(10**8)
    for question in ("what?", "where?", "how many?"):
        chats = [chat(picture(50, 30), question), chat(picture(50, 30), picture(40, 40, 1), question)]
        generate(vlm, chats, max_new_tokens=2, temperature=0)
        vlm.processor.rows(chats, {})
    assert counts.resized == 2
    assert counts.pixels == 2


@pytest.mark.parametrize("family", PREPROCESSING)
def test_what_is_remembered_tells_pictures_apart(family: str, tmp_path: Path) -> None:
    """Sizes, modes and transparency: facts from memory are those of a new reader."""
    reader = reader_of(family, tmp_path)
    pictures = sample_pictures()
    for image in pictures.values():
        reader(image)
    for name, image in pictures.items():
        assert reader(image) == reader_of(family, tmp_path)(image), name

    turned = picture(64, 32)
    as_one_row = Image.frombytes("RGB", (32, 64), turned.tobytes())
    assert reader(turned).key != reader(as_one_row).key


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: Counts) -> None:
    """The picture that was not met for the longest time is forgotten first."""
    monkeypatch.setattr(images, "KNOWN_PICTURES", 2)
    reader = reader_of("qwen2_5_vl", tmp_path)
    for seed in (0, 1, 0, 2, 0):
        reader(picture(30, 30, seed))
    assert counts.resized == 3
    assert len(reader.known) == 2
    reader(picture(30, 30, 1))
    assert counts.resized == 4


def test_the_hash_costs_little(tmp_path: Path) -> None:
    """Meeting a large picture again takes a fraction of what preprocessing it takes."""
    reader = reader_of("qwen3_vl", tmp_path)
    image = picture(2000, 1500)
    started = time.perf_counter()
    assert reader(image).pixels.shape == (94 * 124, 1536)
    preprocessed = time.perf_counter()
    reader(image)
    assert time.perf_counter() - preprocessed < 0.5 * (preprocessed - started)


# ---- limits

def tokens_of(processor: Processor, image: Image.Image) -> int:
    """The placeholders of a picture."""
    batch = processor([chat(image, "?")])
    return batch.pictures[0].tokens


@pytest.mark.parametrize("family", QWEN)
def test_pixel_limits_can_be_lowered(family: str, tmp_path: Path) -> None:
    processor = load_tiny(family, tmp_path).processor
    assert tokens_of(processor, picture(100, 60)) == 60
    processor.min_pixels = 64
    processor.max_pixels = 1024
    assert tokens_of(processor, picture(100, 60)) == 15
    assert tokens_of(processor, picture(3, 3)) == 1
    with pytest.raises(ValueError, match="1024"):
        processor.min_pixels = 1025
    with pytest.raises(ValueError, match="not 64 and 0"):
        processor.max_pixels = 0


@pytest.mark.parametrize("family", QWEN)
def test_limits_are_part_of_what_is_remembered(family: str, tmp_path: Path) -> None:
    """A picture met under other limits has other tokens, another key and other features."""
    vlm = load_tiny(family, tmp_path).requires_grad_(False)
    vlm.feature_cache = FeatureCache(10**8)
    image = picture(100, 60)

    def facts(min_pixels: int | None, max_pixels: int | None) -> tuple[str, torch.Size]:
        vlm.processor.limit_pixels(min_pixels, max_pixels)
        batch = vlm.processor([chat(image, "?")])
        [features] = vlm.image_features(batch)
        assert features.shape[-2] == batch.pictures[0].tokens
        return batch.pictures[0].key, features.shape

    wide = facts(None, None)
    narrow = facts(64, 1024)
    assert narrow != wide
    assert narrow[0] != wide[0]
    assert facts(256, 4096) == wide
    assert facts(64, 1024) == narrow
    large = facts(8192, 16384)                          # above the old maximum: both limits move at once
    assert large[1] != wide[1]


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("limits, told", [
    ((0, None), "0 < min_pixels <= max_pixels, not 0 and 4096"),
    ((None, -1), "not 256 and -1"),
    ((5000, None), "not 5000 and 4096"),
    ((None, 255), "not 256 and 255"),
    ((1, 63), "max_pixels is 63, but one token is a picture of 8 x 8 pixels"),
])
def test_impossible_limits(family: str, limits: tuple[int | None, int | None], told: str, tmp_path: Path) -> None:
    processor = load_tiny(family, tmp_path).processor
    with pytest.raises(ValueError, match=told):
        processor.limit_pixels(*limits)
    assert (processor.min_pixels, processor.max_pixels) == (256, 4096)


def test_tiles_have_no_limits(tmp_path: Path) -> None:
    processor = load_tiny("mllama", tmp_path).processor
    processor.limit_pixels(None, None)
    for limits in ((None, 1024), (64, None), (64, 1024)):
        with pytest.raises(ValueError, match="cut into tiles"):
            processor.limit_pixels(*limits)


@pytest.mark.parametrize("min_pixels, max_pixels", [
    (None, 200_000),
    (3136, 50_176),
    (300_000, 400_000),
    (1_000, 1_024),
])
@pytest.mark.parametrize("family", QWEN)
def test_limits_equal_transformers(family: str, min_pixels: int | None, max_pixels: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    reader = reader_of(family, tmp_path)
    reader.limit(min_pixels or reader.min_pixels, max_pixels)
    limits = {"shortest_edge": reader.min_pixels, "longest_edge": reader.max_pixels}
    published = {key: value for key, value in PREPROCESSING[family].items() if key not in ("min_pixels", "max_pixels")}
    reference = Qwen2VLImageProcessorPil(**{**published, "size": limits})
    for name, image in sample_pictures().items():
        ours = reader(image)
        theirs = reference(images=[image], return_tensors="pt")
        assert list(ours.grid) == theirs["image_grid_thw"][0].tolist(), name
        assert torch.equal(ours.pixels, theirs["pixel_values"]), name


@pytest.mark.parametrize("family", QWEN)
def test_a_saved_copy_keeps_the_published_limits(family: str, tmp_path: Path) -> None:
    vlm = load_tiny(family, tmp_path / "model")
    vlm.processor.limit_pixels(64, 1024)
    save_vlm(vlm, tmp_path / "copy")
    name = "preprocessor_config.json"
    assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert load_vlm(tmp_path / "copy").processor.max_pixels == 4096
