"""tasks/pictures.py: whatever a picture's bytes are, it is decoded or refused in one sentence that names it."""
from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.sources import to_rgb
from tasks import Item
from tasks.pictures import DECODER_ERRORS, open_image, picture_format

MUTATIONS = 600


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The picture as a file's bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pictures() -> dict[str, bytes]:
    """Small pictures of every format that is opened, in the modes that it knows."""
    generator = np.random.RandomState(0)
    rgb = Image.fromarray(generator.randint(0, 256, (20, 24, 3), np.uint8))
    deep = Image.fromarray(generator.randint(0, 65536, (20, 24)).astype(np.uint16))
    palette = rgb.quantize(16)
    rgba = rgb.convert("RGBA")
    rgba.putalpha(100)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(180)]}

    files = {
        "PNG P": encode(palette, "PNG", transparency=bytes([0, 128, 255, 3])),
        "PNG RGB transparent": encode(rgb, "PNG", transparency=(1, 2, 3)),
        "PNG I;16": encode(deep, "PNG"),
        "JPEG EXIF": encode(rgb, "JPEG", exif=turned),
        "JPEG progressive": encode(rgb, "JPEG", progressive=True),
        "WEBP": encode(rgb, "WEBP"),
        "WEBP RGBA": encode(rgba, "WEBP", lossless=True, exif=turned),
        "WEBP animated": encode(rgb, "WEBP", **frames),
        "GIF P": encode(palette, "GIF", transparency=2),
        "GIF animated": encode(rgb, "GIF", duration=10, **frames),
        "BMP P": encode(palette, "BMP"),
        "TIFF I;16": encode(deep, "TIFF"),
        "TIFF P": encode(palette, "TIFF"),
    }
    modes = {"PNG": ("1", "L", "LA", "RGBA"), "JPEG": ("L", "CMYK"), "BMP": ("1", "RGB"), "TIFF": ("1", "LA", "CMYK")}
    for kind, names in modes.items():
        for mode in names:
            files[f"{kind} {mode}"] = encode(rgb.convert(mode), kind)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files[f"TIFF {compression}"] = encode(rgb, "TIFF", compression=compression)
    return files


PICTURES = pictures()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The bytes with some changed, cut off, put in or taken out; headers more often than the rest."""
    changed = bytearray(data)
    at = rng.randrange(len(changed))
    kind = rng.choice(("change", "change", "change", "cut", "put in", "take out"))
    if kind == "change":
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            end = rng.choice((len(changed), min(len(changed), 80)))
            changed[rng.randrange(end)] = rng.choice((0, 255, rng.randrange(256)))
    elif kind == "cut":
        del changed[at:]
    elif kind == "put in":
        changed[at:at] = rng.randbytes(rng.choice((1, 4, 40)))
    else:
        del changed[at:at + rng.choice((1, 4, 40))]
    return bytes(changed)


@pytest.mark.parametrize("name", PICTURES)
def test_whole_pictures(name: str) -> None:
    image = open_image(PICTURES[name])
    assert image.size == (24, 20) and to_rgb(image).mode == "RGB"
    assert picture_format(PICTURES[name]) == name.split()[0].lower()


def test_damaged_pictures() -> None:
    """Either outcome will do, but no other error than ValueError, even where warnings are errors."""
    rng = random.Random(14)
    refused = 0
    for number in range(MUTATIONS):
        name = rng.choice(list(PICTURES))
        data = mutate(PICTURES[name], rng)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                to_rgb(open_image(data, f"item {number}"))
            except ValueError as error:
                refused += 1
                assert str(error).startswith(f"cannot decode a picture of item {number}: "), name
                assert len(str(error)) < 400 and "\n" not in str(error) and "0x" not in str(error), name
    assert MUTATIONS // 3 < refused < MUTATIONS


@pytest.mark.parametrize("raised", DECODER_ERRORS)
def test_every_error_of_a_decoder(raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's decoders raise nearly anything; its second line, and what follows the first 200 characters, go."""
    def fail(*_: object) -> None:
        raise raised("x" * 1000 + "\nmore")

    path = tmp_path / "a.png"
    path.write_bytes(PICTURES["PNG L"])
    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ValueError, match=rf"^cannot decode the picture {path}: x{{200}}$"):
        open_image(path)


@pytest.mark.parametrize("name", ["PNG P", "PNG RGB transparent", "JPEG CMYK"])
def test_a_picture_that_cannot_be_converted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decoder finds nothing wrong with it; what a model's preprocessing does first would fail."""
    def fail(*_: object) -> None:
        raise KeyError("palette")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ValueError, match="cannot decode a picture of item 1: 'palette'"):
        open_image(PICTURES[name], "item 1")


def test_other_formats_are_not_opened() -> None:
    rgb = Image.new("RGB", (4, 4))
    for kind in ("PPM", "TGA", "PCX", "ICO"):
        with pytest.raises(ValueError, match="cannot decode a picture: it is not PNG or JPEG or WEBP or GIF or BMP"):
            open_image(encode(rgb, kind))
    for nothing in (b"", b"no picture at all"):
        with pytest.raises(ValueError, match="it is not PNG"):
            open_image(nothing)


def test_absurd_sizes_take_no_memory() -> None:
    """The header alone decides: the files have 30,000 and more pixels a side, and no pixels."""
    def png_chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2 ** 30, 2 ** 30, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"")
    bmp = bytearray(PICTURES["BMP RGB"])
    bmp[18:26] = struct.pack("<II", 30000, 30000)
    gif = bytearray(PICTURES["GIF P"])
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    for data in (png, bytes(bmp), bytes(gif)):
        with pytest.raises(ValueError, match="cannot decode a picture: Image size .* exceeds limit"):
            open_image(data)


def test_an_item_names_its_picture(tmp_path: Path) -> None:
    item = Item(id="q7", task="jsonl", prompt=(0, "?"), images=(b"broken",))
    with pytest.raises(ValueError, match="a picture of item 'q7'"):
        item.chat()
    with pytest.raises(ValueError, match=r"cannot read the picture .*gone\.png: No such file"):
        open_image(tmp_path / "gone.png")


def test_a_picture_that_is_decoded_late() -> None:
    """Whoever asks a model without a task hands it a picture that Pillow has not read yet."""
    cut = Image.open(io.BytesIO(PICTURES["PNG RGBA"][:600]))
    with pytest.raises(ValueError, match=r"a picture \(PNG, RGBA\) cannot be decoded: "):
        to_rgb(cut)
