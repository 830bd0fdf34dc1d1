"""Encoded pictures in chats: read as opened ones are, opened once, in threads, within a memory cap."""
from __future__ import annotations

import io
import json
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from golden.make import PREPROCESSING
from model import VLM, generate, images, load_vlm, processor, sources
from model.images import MllamaImages, PictureReader, QwenImages
from model.kept import Kept
from model.pairs import pack_pairs
from model.sources import Ahead
from model.vlm import FeatureCache
from tasks.pictures import PictureFile, open_image
from tiny import CONFIGS, chat, picture, write_checkpoint


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def encoded_pictures() -> dict[str, bytes]:
    """Every format that is opened, and what preprocessing must notice: transparency, palettes, a turned camera."""
    rgb = picture(90, 52)
    rgba = rgb.convert("RGBA")
    rgba.putalpha(Image.fromarray(np.tile(np.arange(90, dtype=np.uint8), (52, 1))))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "PNG": encode(rgb), "PNG alpha": encode(rgba), "PNG palette": encode(rgb.quantize(16), transparency=3),
        "PNG grey": encode(rgb.convert("L")), "PNG transparent": encode(rgb, transparency=rgb.getpixel((4, 4))),
        "JPEG turned": encode(rgb, "JPEG", exif=turned), "JPEG CMYK": encode(rgb.convert("CMYK"), "JPEG"),
        "WEBP alpha": encode(rgba, "WEBP", lossless=True), "GIF": encode(rgb, "GIF"), "BMP": encode(rgb, "BMP"),
        "TIFF": encode(rgb, "TIFF"), "TIFF turned": encode(rgb, "TIFF", exif=turned),
    }


def reader_of(family: str, folder: Path) -> PictureReader:
    """The reader of a family's published preprocessing."""
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING[family]))
    return MllamaImages(folder) if family == "mllama" else QwenImages(folder)


def load_tiny(family: str, folder: Path) -> VLM:
    """A family's tiny checkpoint, frozen, keeping features."""
    vlm = load_vlm(write_checkpoint(folder, CONFIGS[family]())).requires_grad_(False)
    vlm.feature_cache = FeatureCache(10 ** 8)
    return vlm


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The threads that opened a PictureFile, one entry a time; even small pictures are worth a thread."""
    threads: list[str] = []
    real = PictureFile.open_picture

    def open_picture(self: PictureFile) -> Image.Image:
        threads.append(threading.current_thread().name)
        return real(self)

    monkeypatch.setattr(PictureFile, "open_picture", open_picture)
    monkeypatch.setattr(images, "WORTH_A_THREAD", 0)
    yield threads
    sources.threads().shutdown()                        # what nobody takes is done before the next test counts
    sources.threads.cache_clear()


# ---- the same pictures

@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("family", PREPROCESSING)
def test_encoded_equals_opened(family: str, ahead: bool, tmp_path: Path, opened: list[str]) -> None:
    """Grid, tokens, key and pixels: when it is met first, when it is met again, prepared in a thread or not."""
    lazy, eager = reader_of(family, tmp_path), reader_of(family, tmp_path)
    for name, data in encoded_pictures().items():
        expected = eager(open_image(data))
        if ahead:
            lazy.prepare([PictureFile(data)])
        first, again = lazy(PictureFile(data)), lazy(PictureFile(data))
        assert first == again == expected, name
        for found in (first, again):
            assert torch.equal(found.pixels, expected.pixels), name
        if ahead:
            lazy.prepare([PictureFile(data)], wanted=lambda key: True)      # its features are gone
        assert torch.equal(lazy(PictureFile(data)).pixels_on(torch.device("cpu")), expected.pixels), name
    assert any(thread.startswith("pictures") for thread in opened) == ahead


@pytest.mark.parametrize("family", CONFIGS)
def test_answers_and_pairs_are_the_same(family: str, tmp_path: Path, opened: list[str]) -> None:
    """So a run of earlier code, whose pairs carry keys, goes on with this one."""
    pictures = list(encoded_pictures().values())
    rows, answers = [], []
    for show in (PictureFile, open_image):
        a, b, c = [show(data) for data in pictures[:3]]
        chats = [chat(a, "what?"), chat(b, c, "and?")]
        vlm = load_tiny(family, tmp_path)
        answers.append(generate(vlm, chats, n=2, max_new_tokens=4, seed=3))
        rows.append(pack_pairs(vlm.processor, [(messages, [5, 6], [7]) for messages in chats]))
    assert rows[0].keys == rows[1].keys
    assert torch.equal(rows[0].batch.input_ids, rows[1].batch.input_ids)
    assert torch.equal(rows[0].batch.position_ids, rows[1].batch.position_ids)
    assert answers[0] == answers[1]
    assert len(opened) == 3


def test_every_level_is_normalised_as_published(tmp_path: Path) -> None:
    """In fp64 to the factor, in fp32 from then on; transformers' own pixels are compared in test_processor.py."""
    for family in PREPROCESSING:
        normalize = reader_of(family, tmp_path).normalize
        levels = np.arange(256, dtype=np.uint8)
        scaled = (levels.astype(np.float64) * (1 / 255)).astype(np.float32)
        expected = (scaled[:, None] - normalize.mean) / normalize.std                     # (256, C)
        found = normalize(torch.from_numpy(levels).view(256, 1, 1, 1).expand(256, 3, 2, 2))
        assert np.array_equal(found[:, :, 1, 1].numpy(), expected)


# ---- once

@pytest.mark.parametrize("family", CONFIGS)
def test_opened_once(family: str, tmp_path: Path, opened: list[str]) -> None:
    """However often a model is asked, and in however many chats of one call it stands."""
    vlm = load_tiny(family, tmp_path)
    shown = PictureFile(encode(picture(50, 30)))
    for question in ("what?", "where?", "what?"):
        vlm.prepare([chat(shown, question)])
        generate(vlm, [chat(shown, question), chat(shown, "and?")], max_new_tokens=2, temperature=0)
    pack_pairs(vlm.processor, [(chat(shown, "what?"), [5], [6])])
    assert len(opened) == 1
    assert vlm.processor.images.ahead.begun.bytes == 0


def test_opened_again_where_features_are_gone(tmp_path: Path, opened: list[str]) -> None:
    """In a thread, if that was begun; and neither digest nor rows are made again."""
    vlm = load_tiny("qwen3_vl", tmp_path)
    shown = PictureFile(encode(picture(50, 30)))
    kept = vlm.image_features(vlm.processor([chat(shown, "what?")]))
    vlm.feature_cache = FeatureCache(10 ** 8)
    vlm.prepare([chat(shown, "what?")])
    again = vlm.image_features(vlm.processor([chat(shown, "what?")]))
    assert torch.equal(kept[0], again[0])
    assert len(opened) == 2 and opened[1].startswith("pictures")


def test_the_sizes_count_the_tokens(tmp_path: Path, opened: list[str]) -> None:
    """A prompt's length is known before a picture is opened."""
    vlm = load_tiny("qwen3_vl", tmp_path)
    for data in encoded_pictures().values():
        asked = chat(PictureFile(data), "what?")
        length = vlm.processor.count_tokens(asked)
        assert not opened
        assert vlm.processor([asked]).input_ids.shape[1] == length
        opened.clear()


def test_limits_of_encoded_pictures(tmp_path: Path, opened: list[str]) -> None:
    """Under other limits it is another picture; under the first ones again it is known. What a thread began under the
    limits before is not used."""
    vlm = load_tiny("qwen2_5_vl", tmp_path)
    shown = PictureFile(encode(picture(100, 60)))
    found = []
    for most in (4096, 1024, 4096):
        vlm.prepare([chat(shown, "?")])
        vlm.processor.limit_pixels(64, most)
        assert not vlm.processor.images.ahead.begun.entries
        [seen] = vlm.processor([chat(shown, "?")]).pictures
        [features] = vlm.image_features(vlm.processor([chat(shown, "?")]))
        assert features.shape[-2] == seen.tokens
        found.append((seen.tokens, seen.key))
    assert found[0] == found[2] != found[1]


def test_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a number of bytes; and a text that spells a picture's key is a text."""
    vlm = load_tiny("qwen3_vl", tmp_path)
    shown = PictureFile(encode(picture(50, 30)))
    pictures: dict[str, Any] = {}
    [row, other] = vlm.processor.rows([chat(shown, "what?"), chat(shown, "where?")], pictures)
    assert vlm.processor.rows([chat(shown, "what?")], {})[0] is row is not other
    [unprompted] = vlm.processor.rows([chat(shown, "what?")], {}, add_generation_prompt=False)
    assert unprompted.ids == row.ids[:len(unprompted.ids)] and len(unprompted.ids) < len(row.ids)

    [key] = pictures
    vlm.processor.kept_rows = Kept(10 ** 6)
    spelled = vlm.processor._row([1, key])
    assert vlm.processor._row([1, pictures[key]]).ids != spelled.ids

    monkeypatch.setattr(processor, "TOKEN_BYTES", 1)
    vlm.processor.kept_rows = Kept(len(row.ids) + 1)
    for question in ("what?", "where?", "what?"):
        vlm.processor.rows([chat(shown, question)], {})
        assert len(vlm.processor.kept_rows) == 1


# ---- faults

def test_a_damaged_picture_is_refused_in_its_turn(tmp_path: Path, opened: list[str]) -> None:
    """Not when a thread finds out; those before it can still be asked about."""
    vlm = load_tiny("qwen3_vl", tmp_path)
    whole = encode(picture(50, 30))
    good, bad = PictureFile(whole, "item 'a'"), PictureFile(whole[:len(whole) // 2], "item 'b'")
    vlm.prepare([chat(good, "?"), chat(bad, "?")])
    generate(vlm, [chat(good, "?")], max_new_tokens=1, temperature=0)
    for _ in range(2):
        with pytest.raises(ValueError, match="^chat 0: cannot decode a picture of item 'b': "):
            generate(vlm, [chat(bad, "?")], max_new_tokens=1, temperature=0)
    assert vlm.processor.images.ahead.begun.bytes == 0


def test_a_file_that_changed(tmp_path: Path) -> None:
    """What was computed from it would be another picture's."""
    path = tmp_path / "a.png"
    path.write_bytes(encode(picture(50, 30)))
    reader = reader_of("qwen3_vl", tmp_path)
    shown = PictureFile(path)
    seen = reader(shown)
    path.write_bytes(encode(picture(50, 30, 1)))
    assert reader(shown).key == seen.key                # nothing is read
    with pytest.raises(ValueError, match=rf"^the picture {path} has changed since it was first read$"):
        assert reader(shown).pixels is None


def test_what_is_no_picture(tmp_path: Path) -> None:
    """A path has a method open(), too."""
    vlm = load_tiny("qwen3_vl", tmp_path)
    for other in (tmp_path, b"bytes", None, "a.png"):
        with pytest.raises(ValueError, match="chat 0: content must be text or a PIL image"):
            vlm.processor([chat(""), [{"role": "user", "content": [{"type": "image", "image": other}]}]][1:])


def test_warnings_of_threads_stay_where_they_were() -> None:
    """Pillow's are silenced, and nobody else's; however many threads decode, the filters are the same afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(encode(picture(5, 5)))
        before = list(warnings.filters)
        list(sources.threads().map(open_image, [encode(picture(9, 9))] * 20))
        assert warnings.filters == before
        with pytest.raises(UserWarning):
            warnings.warn("not Pillow's", stacklevel=1)


# ---- what is kept, what is begun

def test_kept() -> None:
    kept: Kept[str, int] = Kept(10)
    for name in "ab":
        kept.keep(name, ord(name), 4)
    assert kept.get("a") == 97 and kept.get("c") is None
    kept.keep("c", 99, 4)                               # b was not used for the longest time
    assert list(kept.entries) == ["a", "c"] and kept.bytes == 8
    kept.keep("c", 0, 5)                                # takes the place of the other c
    assert kept.get("c") == 0 and kept.bytes == 9
    kept.keep("d", 1, 11)
    assert list(kept.entries) == ["a", "c"]
    assert kept.drop("a") == 97 and kept.drop("a") is None and kept.bytes == 5


def test_ahead() -> None:
    ahead = Ahead(10)
    done = []
    for key in "aabc":
        ahead.begin(key, lambda: done.append(1) or len(done), 4)
    assert ahead.take("a") is None                      # dropped: b and c are newer
    assert {ahead.take("b"), ahead.take("c")} <= {1, 2, 3} and ahead.take("c") is None
    assert ahead.begun.bytes == 0


def test_a_call_takes_half_of_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]) -> None:
    """So that the pictures of the next chunk do not displace those of the chunk that is about to be read."""
    size = 3 * 64 * 64
    monkeypatch.setattr(images, "AHEAD_BYTES", 4 * size)
    reader = reader_of("qwen3_vl", tmp_path)
    reader.limit(64 * 64, 64 * 64)
    chunks = [[PictureFile(encode(picture(64, 64, 10 * chunk + seed))) for seed in range(5)] for chunk in range(2)]
    for chunk in chunks:
        reader.prepare(chunk)
    begun = [reader.name(shown) in reader.ahead.begun.entries for chunk in chunks for shown in chunk]
    assert begun == [True, True, False, False, False] * 2
    assert reader.ahead.begun.bytes == 4 * size
