"""Pixels bit for bit and token ids one for one: against live transformers and against golden digests; published ids
with the real tokenizers, whose tokenizer.json files QWEN3_TOKENIZER, QWEN2_5_TOKENIZER and LLAMA3_2_TOKENIZER name."""
from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from golden.make import GOLDEN, PREPROCESSING, digest, reference_pixels, sample_pictures
from model import load_vlm, save_vlm
from model.images import MllamaImages, QwenImages, choose_tiles, fit_canvas, smart_resize
from model.processor import Chat, MllamaProcessor, Processor, Qwen25Processor, QwenProcessor
from tiny import CONFIGS, chat, picture, write_checkpoint

QWEN_CONFIG = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
               "vision_end_token_id": 151653}
SHOT = picture(28, 28)
# By family: the variable that names a real tokenizer.json, the processor, and what it reads of config.json.
FAMILIES = {"qwen3_vl": ("QWEN3_TOKENIZER", QwenProcessor, QWEN_CONFIG),
            "qwen2_5_vl": ("QWEN2_5_TOKENIZER", Qwen25Processor, QWEN_CONFIG),
            "mllama": ("LLAMA3_2_TOKENIZER", MllamaProcessor, {"image_token_index": 128256})}


def write_preprocessing(folder: Path, family: str, **changes: object) -> Path:
    """The published preprocessor_config.json of a family, with `changes`."""
    content = {**PREPROCESSING[family], **changes}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


def load_images(folder: Path, family: str) -> QwenImages | MllamaImages:
    """The preprocessing of pictures that a folder's preprocessor_config.json asks for."""
    if family == "mllama":
        return MllamaImages(folder)
    return QwenImages(folder)


def tiny_processor(family: str, folder: Path) -> Processor:
    """The processor of a family's tiny checkpoint."""
    config = CONFIGS[family]()
    return load_vlm(write_checkpoint(folder, config)).processor


# ---- pixels

@pytest.mark.parametrize("family", PREPROCESSING)
def test_pixels_are_bit_exact(family: str, tmp_path: Path) -> None:
    images = load_images(write_preprocessing(tmp_path, family), family)
    golden = json.loads((GOLDEN / "pixels.json").read_text())[family]
    pictures = sample_pictures()
    assert pictures.keys() == golden.keys()
    for name, image in pictures.items():
        assert digest(images(image).pixels) == golden[name], name


@pytest.mark.parametrize("family", PREPROCESSING)
def test_pixels_equal_transformers(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    images = load_images(write_preprocessing(tmp_path, family), family)
    for name, image in sample_pictures().items():
        expected = reference_pixels(family, image)
        assert torch.equal(images(image).pixels, expected), name


def test_mllama_batch_equals_transformers(tmp_path: Path) -> None:
    """Pictures filled up to the most of a chat, aspect ratio ids and masks, and what each token sees."""
    pytest.importorskip("transformers")
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )
    processor = tiny_processor("mllama", tmp_path)
    shots = [picture(30, 40), picture(90, 20, 1), picture(20, 200, 2), picture(28, 28, 3)]
    chats = [chat(shots[0], "one"), chat("x", shots[1], shots[2], "two of them", shots[3], "and one")]
    batch = processor(chats)

    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    reference = MllamaImageProcessorPil(**settings)
    theirs = reference(images=[shots[:1], shots[1:]], return_tensors="pt")
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        assert torch.equal(getattr(batch, name), theirs[name]), name

    real = batch.attention_mask.bool()
    spans = []
    for ids, is_real in zip(batch.input_ids, real):
        spans.append(get_cross_attention_token_mask(ids[is_real].tolist(), processor.image_id))
    dense = convert_sparse_cross_attention_mask_to_dense(spans, theirs["num_tiles"], 4, batch.input_ids.shape[1])
    assert np.array_equal(batch.cross_attention_mask[real], dense[real])


@pytest.mark.parametrize("size, qwen3, qwen2_5", [
    ((480, 640), (480, 640), (476, 644)),
    ((720, 1280), (704, 1280), (728, 1288)),
    ((1080, 1920), (1088, 1920), (1092, 1932)),
    ((224, 224), (256, 256), (224, 224)),
    ((4096, 4096), (4096, 4096), (3584, 3584)),
    ((18, 187), (96, 832), (28, 196)),
])
def test_published_sizes(size: tuple[int, int], qwen3: tuple[int, int], qwen2_5: tuple[int, int]) -> None:
    assert smart_resize(*size, 32, 65536, 16777216) == qwen3
    assert smart_resize(*size, 28, 3136, 12845056) == qwen2_5


@pytest.mark.parametrize("size, tiles, resized", [
    ((224, 224), (1, 1), (560, 560)),
    ((480, 640), (1, 2), (480, 640)),
    ((561, 561), (2, 2), (561, 561)),
    ((720, 1280), (2, 2), (630, 1120)),
    ((1080, 1920), (2, 2), (630, 1120)),
    ((300, 900), (1, 2), (300, 900)),
    ((2000, 200), (4, 1), (2000, 200)),
    ((18, 187), (1, 1), (53, 560)),
])
def test_published_tiles(size: tuple[int, int], tiles: tuple[int, int], resized: tuple[int, int]) -> None:
    height, width = size
    rows, columns = tiles
    assert choose_tiles(height, width, 560, 4) == tiles
    assert fit_canvas(height, width, rows * 560, columns * 560, 560) == resized


def test_too_elongated_names_the_chat(tmp_path: Path) -> None:
    processor = tiny_processor("qwen3_vl", tmp_path)
    chats = [chat("fine"), chat(picture(1005, 5), "thin")]
    with pytest.raises(ValueError, match="chat 1: a picture of 1005 x 5 is too elongated"):
        processor(chats)


def test_newer_preprocessing_file(tmp_path: Path) -> None:
    """transformers 5 nests the fields in processor_config.json; it counts where both files are there."""
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"image_processor": PREPROCESSING["qwen3_vl"]}))
    assert QwenImages(tmp_path).max_pixels == 16777216
    write_preprocessing(tmp_path, "qwen2_5_vl")
    assert QwenImages(tmp_path).max_pixels == 16777216
    path.write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
    assert QwenImages(tmp_path).max_pixels == 12845056
    path.write_text(json.dumps({"image_processor": {"patch_size": 16}}))
    with pytest.raises(ValueError, match="merge_size"):
        QwenImages(tmp_path)


LIMITS = {"shortest_edge": 3136, "longest_edge": 50176}


@pytest.mark.parametrize("spelling", [
    {"size": LIMITS},
    {"size": LIMITS, "min_pixels": None, "max_pixels": None},
    {"size": {"min_pixels": 3136, "max_pixels": 50176}},
    {"size": None, "min_pixels": 3136, "max_pixels": 50176},
    {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 3136, "max_pixels": 50176},
    {"size": {"shortest_edge": 3136, "longest_edge": 2}, "max_pixels": 50176},
])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_spellings_of_limits(family: str, spelling: dict, tmp_path: Path) -> None:
    content = {key: value for key, value in PREPROCESSING[family].items() if "pixels" not in key and key != "size"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**content, **spelling}))
    reader = QwenImages(tmp_path)
    assert (reader.min_pixels, reader.max_pixels) == (3136, 50176)


@pytest.mark.parametrize("limits, told", [
    ({}, "gives no pixel limits"),
    ({"size": {"shortest_edge": 3136}}, "gives no pixel limits"),
    ({"size": {"height": 560, "width": 560}}, "gives no pixel limits"),
    ({"min_pixels": 3136, "max_pixels": 3135}, "the pixel limits are 3136 and 3135"),
    ({"min_pixels": "a", "max_pixels": 3135}, "the pixel limits are 'a' and 3135"),
    ({"min_pixels": -1, "max_pixels": 3135}, "the pixel limits are -1 and 3135"),
    ({"min_pixels": 1, "max_pixels": 1e9}, "the pixel limits are 1 and 1000000000.0"),
])
def test_limits_that_are_none(limits: dict, told: str, tmp_path: Path) -> None:
    content = {key: value for key, value in PREPROCESSING["qwen3_vl"].items() if key != "size"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**content, **limits}))
    with pytest.raises(ValueError, match=f"preprocessor_config.json.* {told}"):
        QwenImages(tmp_path)


NO_THREE_NUMBERS = [[0.5, 0.5], 0.5, None, ["a", 0.5, 0.5], [[0.5], 0.5, 0.5], [0.5, 0.5, float("nan")]]


@pytest.mark.parametrize("family, key, value", [
    *product(["qwen3_vl"], ["patch_size", "merge_size", "temporal_patch_size"], [0, -1, 1.5, "x", None, True]),
    *product(PREPROCESSING, ["image_mean", "image_std"], NO_THREE_NUMBERS),
    ("mllama", "max_image_tiles", 0),
    ("mllama", "size", [28, 28]),
    ("qwen3_vl", "size", 448),
    ("mllama", "image_std", [0.5, 0, 0.5]),
    ("qwen3_vl", "image_std", [0.5, 1e-60, 0.5]),
])
def test_malformed_preprocessing(family: str, key: str, value: object, tmp_path: Path) -> None:
    write_preprocessing(tmp_path, family, **{key: value})
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: .*{key} "):
        load_images(tmp_path, family)


@pytest.mark.parametrize("family, key, value", [
    *product(PREPROCESSING, ["do_resize", "do_rescale", "do_normalize"], [False]),
    *product(PREPROCESSING, ["rescale_factor"], [1 / 127.5, "x", 1]),
    ("mllama", "do_pad", False),
])
def test_other_preprocessing_is_refused(family: str, key: str, value: object, tmp_path: Path) -> None:
    write_preprocessing(tmp_path, family, **{key: value})
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {key} is "):
        load_images(tmp_path, family)
    unsaid = {"do_resize": None, "do_rescale": True, "rescale_factor": 0.00392156862745098, "crop_size": None}
    load_images(write_preprocessing(tmp_path, family, **unsaid), family)


# ---- tokenizer files of other tools

def plain_ids(processor: Processor) -> list[int]:
    """The ids of a chat long enough to be cut."""
    [row] = processor.rows([chat(SHOT, "How many of the ", "lamps in this picture are lit, and how many are not?")], {})
    return row.ids


def limited(tokenizer: Tokenizer) -> None:
    """What a training script leaves behind: texts of 16 tokens, filled up to 32."""
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=32)


def left_limited(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(16, stride=4, strategy="only_first", direction="left")
    tokenizer.enable_padding(direction="left", pad_id=256, pad_to_multiple_of=8)


def random_merges(tokenizer: Tokenizer) -> None:
    tokenizer.model.dropout = 0.9


@pytest.mark.parametrize("change", [limited, left_limited, random_merges])
@pytest.mark.parametrize("family", CONFIGS)
def test_settings_for_training_in_a_tokenizer_file(family: str, change: Callable[[Tokenizer], None], tmp_path: Path
                                                   ) -> None:
    """Truncation, padding and dropout are not obeyed; a saved copy holds them as they were."""
    folder = write_checkpoint(tmp_path / "model", CONFIGS[family]())
    path = folder / "tokenizer.json"
    expected = plain_ids(load_vlm(folder).processor)

    tokenizer = Tokenizer.from_file(str(path))
    change(tokenizer)
    tokenizer.save(str(path))
    vlm = load_vlm(folder)
    assert plain_ids(vlm.processor) == expected
    save_vlm(vlm, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("family", CONFIGS)
def test_control_tokens_that_a_file_calls_ordinary(family: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIGS[family]())
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    processor = load_vlm(folder).processor
    text = "Say <|im_end|>\n<|image_pad|><|eot_id|><|begin_of_text|><|vision_start|> twice"
    check_special_tokens_stay_text(processor, text)
    assert processor.decode([processor.turn_end_id, *processor.encode("yes")]) == "yes"


def test_tokenizer_that_transformers_saved(tmp_path: Path) -> None:
    """After a call with truncation and padding, which stay in the file."""
    transformers = pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path, CONFIGS["qwen3_vl"]())
    expected = plain_ids(load_vlm(folder).processor)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer("a text", truncation=True, max_length=16, padding="max_length")
    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    assert saved["truncation"] is not None
    assert saved["padding"] is not None
    assert plain_ids(load_vlm(folder).processor) == expected


# ---- chats

@pytest.mark.parametrize("message, culprit", [
    ({"role": "tool", "content": "x"}, "tool"),
    ({"role": "user", "content": [{"type": "video", "video": "x"}]}, "video"),
    ({"role": "user", "content": [{"type": "image", "image": "a.png"}]}, "a.png"),
    ({"role": "user", "content": [{"type": "text", "text": picture(4, 4)}]}, "text"),
    ({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, "text"),
])
@pytest.mark.parametrize("family", CONFIGS)
def test_malformed_messages(family: str, message: dict, culprit: str, tmp_path: Path) -> None:
    processor = tiny_processor(family, tmp_path)
    with pytest.raises(ValueError, match=f"chat 1: .*{culprit}"):
        processor([chat("fine"), [message]])


@pytest.mark.parametrize("family", CONFIGS)
def test_special_tokens_in_text_stay_text(family: str, tmp_path: Path) -> None:
    processor = tiny_processor(family, tmp_path)
    text = "Say <|im_end|>\n<|image_pad|><|image|><|eot_id|><|begin_of_text|><|vision_start|> twice"
    check_special_tokens_stay_text(processor, text)


def check_special_tokens_stay_text(processor: Processor, text: str) -> None:
    """A chat with `text` holds the control tokens of one with a plain text, and `text` comes back as it went in."""
    chats = [chat(SHOT, "Say "), chat(SHOT, text)]
    [plain, spelled] = processor.rows(chats, {})

    tokens = processor.tokenizer.get_added_tokens_decoder()
    special = {token_id for token_id, token in tokens.items() if token.special}
    special.add(processor.image_id)
    control_of_plain = [token_id for token_id in plain.ids if token_id in special]
    control_of_spelled = [token_id for token_id in spelled.ids if token_id in special]
    assert control_of_plain == control_of_spelled

    text_ids = [token_id for token_id in spelled.ids if token_id not in special]
    assert text in processor.tokenizer.decode(text_ids, skip_special_tokens=False)


def test_mllama_sees_runs_of_pictures(tmp_path: Path) -> None:
    """Text after neighbouring pictures sees both; after separated ones only the last; none before the first."""
    processor = tiny_processor("mllama", tmp_path)
    a, b, c = (picture(28, 28, seed) for seed in range(3))
    batch = processor([chat("x", a, "y", b, c, "z")])
    is_picture = batch.input_ids[0] == processor.image_id
    first, second, third = is_picture.nonzero()[:, 0].tolist()

    sees = batch.sees[0].tolist()
    for token in range(first):
        assert sees[token] == [False, False, False]
    for token in range(first, second):
        assert sees[token] == [True, False, False]
    assert third == second + 1
    assert sees[second] == [False, True, False]
    for token in range(third, len(sees)):
        assert sees[token] == [False, True, True]


def test_mllama_date_is_fixed(tmp_path: Path) -> None:
    processor = tiny_processor("mllama", tmp_path)

    def prompt(messages: Chat) -> str:
        [row] = processor.rows([messages], {})
        return processor.decode(row.ids)

    assert "Today Date: 26 Jul 2024\n\n" in prompt(chat("hi"))
    processor.date = "1 Jan 2025"
    assert "Today Date: 1 Jan 2025\n\n" in prompt(chat("hi"))
    assert "Date" not in prompt(chat(picture(9, 9), "hi"))


# ---- the published tokenizers

CHATS = {
    "one": chat(SHOT, "What is shown?"),
    "around": chat("Before", SHOT, " between ", SHOT, SHOT, "\nafter"),
    "text": chat("How many legs has a spider?"),
    "turns": [{"role": "system", "content": "Be brief."}, *chat(SHOT, "Color?"),
              {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Sure?"}],
}
SYSTEM = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]               # Qwen2.5-VL's default
QWEN = {                                                    # one <|image_pad|> a picture, before it is repeated
    "one": [151644, 872, 198, 151652, 151655, 151653, 3838, 374, 6839, 30, 151645, 198, 151644, 77091, 198],
    "around": [151644, 872, 198, 10227, 151652, 151655, 151653, 1948, 220, 151652, 151655, 151653, 151652, 151655,
               151653, 198, 10694, 151645, 198, 151644, 77091, 198],
    "text": [151644, 872, 198, 4340, 1657, 14201, 702, 264, 34354, 30, 151645, 198, 151644, 77091, 198],
    "turns": [151644, 8948, 198, 3430, 9814, 13, 151645, 198, 151644, 872, 198, 151652, 151655, 151653, 1636, 30,
              151645, 198, 151644, 77091, 198, 6033, 13, 151645, 198, 151644, 872, 198, 39814, 30, 151645, 198, 151644,
              77091, 198],
}
DATED = [128000, 128006, 9125, 128007, 271, 38766, 1303, 33025, 2696, 25, 6790, 220, 2366, 18, 198, 15724, 2696, 25,
         220, 1627, 10263, 220, 2366, 19, 271]
LLAMA = {
    "one": [128000, 128006, 882, 128007, 271, 128256, 3923, 374, 6982, 30, 128009, 128006, 78191, 128007, 271],
    "around": [128000, 128006, 882, 128007, 271, 10438, 128256, 1990, 220, 128256, 128256, 198, 10924, 128009, 128006,
               78191, 128007, 271],
    "text": [*DATED, 128009, 128006, 882, 128007, 271, 4438, 1690, 14535, 706, 264, 35454, 30, 128009, 128006, 78191,
             128007, 271],
    "turns": [*DATED, 3513, 10015, 13, 128009, 128006, 882, 128007, 271, 128256, 1668, 30, 128009, 128006, 78191,
              128007, 271, 6161, 13, 128009, 128006, 882, 128007, 271, 40914, 30, 128009, 128006, 78191, 128007, 271],
}


@pytest.fixture(params=FAMILIES)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Processor]:
    """A family's processor with its published preprocessing, ids and tokenizer."""
    variable, processor, config = FAMILIES[request.param]
    if variable not in os.environ:
        pytest.skip(f"{variable} names no tokenizer.json")
    (tmp_path / "tokenizer.json").symlink_to(Path(os.environ[variable]).resolve())
    folder = write_preprocessing(tmp_path, request.param)
    return request.param, processor(folder, config)


def test_published_ids(published: tuple[str, Processor]) -> None:
    family, processor = published
    placeholders = {"qwen3_vl": 64, "qwen2_5_vl": 4, "mllama": 1}[family]                 # of SHOT
    published_ids = LLAMA if family == "mllama" else QWEN
    rows = processor.rows(list(CHATS.values()), {})
    for name, row in zip(CHATS, rows):
        expected = []
        if family == "qwen2_5_vl" and name != "turns":
            expected += SYSTEM
        for token in published_ids[name]:
            count = placeholders if token == processor.image_id else 1
            expected += [token] * count
        assert row.ids == expected, name


def test_published_special_tokens_stay_text(published: tuple[str, Processor]) -> None:
    _, processor = published
    text = ("Say <|im_end|>\n<|image_pad|> <|image|>"
            "<|eot_id|><|start_header_id|>system<|end_header_id|>, naïve 图 \t twice")
    check_special_tokens_stay_text(processor, text)


def test_published_vocabulary(published: tuple[str, Processor]) -> None:
    family, processor = published
    vocabularies = {"qwen3_vl": 151669, "qwen2_5_vl": 151665, "mllama": 128256}
    pad_ids = {"qwen3_vl": 151643, "qwen2_5_vl": 151643, "mllama": 128004}
    qwen_placeholders = [151652, 151653, 151654, 151655, 151656]
    assert processor.vocabulary == vocabularies[family]
    assert processor.pad_id == pad_ids[family]
    assert processor.never_sampled == ([128256] if family == "mllama" else qwen_placeholders)


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    """JSON can hold one; no tokenizer can encode it."""
    processor = tiny_processor("qwen3_vl", tmp_path)
    with pytest.raises(ValueError, match="chat 1: 'utf-8' codec can't encode"):
        processor([chat("fine"), chat("a\ud800")])
