"""Llama-3.2-Vision: its true ids, what it keeps of a picture, how often it computes what, and mixed batches."""
from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from model import FAMILIES, VLM, generate, load_vlm, next_digits
from model.mllama import CrossAttention, CrossLayer, Mllama
from model.pairs import pack_pairs
from model.processor import Chat
from model.samples import banned_tokens
from model.settings import read_settings
from model.vlm import FeatureCache
from published import CONFIGS as PUBLISHED
from tiny import chat, load_like_transformers, mllama_config, picture, preprocessor_config, write_checkpoint

VOCABULARY = 128_256                                    # rows of the head; <|image|> comes after them
CONTROL_TOKENS = {"<|begin_of_text|>": 128_000, "<|end_of_text|>": 128_001, "<|finetune_right_pad_id|>": 128_004,
                  "<|start_header_id|>": 128_006, "<|end_header_id|>": 128_007, "<|eom_id|>": 128_008,
                  "<|eot_id|>": 128_009, "<|python_tag|>": 128_010}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mllama") / "tiny", mllama_config())


@pytest.fixture(params=["meta", "transformers"])
def vlm(request: pytest.FixtureRequest, folder: Path) -> VLM:
    """Frozen, and treating tokens before the first picture in either way."""
    model = load_like_transformers(folder) if request.param == "transformers" else load_vlm(folder)
    return model.requires_grad_(False)


def mixed_chats() -> list[Chat]:
    """Two pictures, none, one, and two with text between them, of different arrangements of tiles."""
    return [
        chat(picture(70, 24, 3), picture(24, 24, 4), "which of the two, and why?"),
        chat("hello"),
        chat(picture(30, 40), "what is this?"),
        chat("a", picture(16, 64, 1), "b", picture(50, 20, 2), "c"),
    ]


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether the largest difference is below 1e-5 of the largest value."""
    assert ours.shape == theirs.shape
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


# ---- the true ids

def true_tokenizer() -> Tokenizer:
    """As many tokens as the published one has, and control tokens at their ids: bytes, filling, 256 control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    filling = [f"<{i}>" for i in range(128_000 - len(alphabet))]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *filling])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    by_id = {number: token for token, number in CONTROL_TOKENS.items()}
    control = [by_id.get(i, f"<|reserved_{i}|>") for i in range(128_000, VOCABULARY)]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in [*control, "<|image|>"]])
    assert tokenizer.token_to_id("<|image|>") == VOCABULARY
    return tokenizer


def quarter_width_config() -> dict:
    """The published configuration with its true vocabulary and ids, at a quarter of the width, with few layers."""
    config = copy.deepcopy(PUBLISHED["Llama-3.2-11B-Vision"])
    config["text_config"].update(hidden_size=1024, intermediate_size=3584, num_attention_heads=8, num_key_value_heads=2,
                                 num_hidden_layers=2, cross_attention_layers=[1])
    config["vision_config"].update(hidden_size=320, intermediate_size=1280, attention_heads=4, num_hidden_layers=2,
                                   num_global_layers=1, intermediate_layers_indices=[1], vision_output_dim=640,
                                   image_size=28)
    return config


@pytest.fixture(scope="module")
def quarter(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """That model with random weights, made in memory."""
    folder = tmp_path_factory.mktemp("quarter")
    (folder / "config.json").write_text(json.dumps(quarter_width_config()))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config("mllama")))
    true_tokenizer().save(str(folder / "tokenizer.json"))
    settings = read_settings(folder, "config.json")
    with torch.device("meta"):
        vlm = FAMILIES["mllama"](settings)
    vlm = vlm.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in vlm.parameters():
        parameter.uniform_(-1, 1, generator=generator).mul_(parameter.shape[-1] ** -0.5)
    vlm.processor = vlm.make_processor(folder, settings)
    vlm.stop_ids = frozenset(settings["text_config"]["eos_token_id"])
    return vlm


def test_no_id_is_banned_at_the_true_numbers(quarter: VLM) -> None:
    """<|image|> has no row in the head, and the head no row that the tokenizer does not know."""
    assert quarter.image_token_id == quarter.processor.image_id == VOCABULARY == len(quarter.head_weight)
    assert len(quarter.decoder.embed_tokens.weight) == VOCABULARY + 8
    banned = banned_tokens(quarter)
    assert banned.shape == (0,)
    assert banned.dtype == torch.long


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_speaks_at_the_true_numbers(quarter: VLM, temperature: float) -> None:
    options = {"n": 2, "max_new_tokens": 3, "temperature": temperature}
    chats = [chat(picture(30, 40), "what is this?"), chat("hello")]
    for samples in generate(quarter, chats, **options):
        for completion in samples:
            assert 1 <= len(completion.token_ids) <= 3
            assert max(completion.token_ids) < VOCABULARY
    digits = torch.tensor(next_digits(quarter, chats, ["0", "0."]))
    assert digits.shape == (2, 2, 10)
    assert digits.isfinite().all()


# ---- how often what is computed

def test_a_picture_is_encoded_once(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all that asks for it; what is kept is what tower and projector make of it, in a copy of its own."""
    vlm.feature_cache = FeatureCache(10 ** 8)
    encoded: list[str] = []
    plain = Mllama.encode_images

    def counted(self: Mllama, pictures: list) -> list[Tensor]:
        encoded.extend(picture.key for picture in pictures)
        return plain(self, pictures)
    monkeypatch.setattr(Mllama, "encode_images", counted)

    chats = mixed_chats()
    batch = vlm.processor(chats)
    expected = dict(zip([picture.key for picture in batch.pictures],
                        [plain(vlm, [picture])[0] for picture in batch.pictures], strict=True))
    with torch.no_grad():
        vlm(batch)
        generate(vlm, chats, n=2, max_new_tokens=3)
        next_digits(vlm, chats, ["0", "0."])
        pairs = pack_pairs(vlm.processor, [(messages, [5, 6], [7]) for messages in chats])
        vlm.hidden(pairs.batch, vlm.image_features(pairs.batch))
        vlm(vlm.processor(chats[:1]))

    assert sorted(encoded) == sorted(expected)
    entries = vlm.feature_cache.entries
    assert entries.keys() == expected.keys()
    for key, features in expected.items():
        assert close(entries[key], features)
        assert entries[key].untyped_storage().nbytes() == features.nbytes


def count_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of rows whenever a layer computes keys and values of pictures."""
    rows: list[int] = []
    plain = CrossAttention.keys_and_values

    def counted(self: CrossAttention, states: Tensor) -> Any:
        rows.append(len(states))
        return plain(self, states)
    monkeypatch.setattr(CrossAttention, "keys_and_values", counted)
    return rows


def test_keys_and_values_are_computed_once_a_prompt(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at each decode step nor for each sample; a pair's sides and prompts that begin alike share them."""
    layers = sum(isinstance(layer, CrossLayer) for layer in vlm.decoder.layers)
    assert layers == 2
    rows = count_keys_and_values(monkeypatch)
    for n, tokens in ((1, 1), (1, 6), (3, 6)):
        rows.clear()
        generate(vlm, [chat(picture(30, 40), "what is this?")], n=n, max_new_tokens=tokens)
        assert rows == [1] * layers

    rows.clear()
    chats = mixed_chats()
    completions = generate(vlm, chats, n=3, max_new_tokens=6)
    assert max(len(sample.token_ids) for samples in completions for sample in samples) > 1
    assert sum(rows) <= len(chats) * layers             # prompts of like length are computed together

    rows.clear()
    image = picture(30, 40)
    same_beginning = [chat(image, "which letter comes behind these in the alphabet: " + letter) for letter in "abc"]
    generate(vlm, same_beginning, n=2, max_new_tokens=4)
    assert rows == [1] * layers

    rows.clear()
    pairs = pack_pairs(vlm.processor, [(chats[0], [5, 6], [7])])
    with torch.no_grad():
        vlm.hidden(pairs.batch, vlm.image_features(pairs.batch))
    assert rows == [1] * layers

    rows.clear()
    generate(vlm, [chat("hello")], n=2, max_new_tokens=4)
    assert rows == []


# ---- chats with and without pictures in one batch

@torch.no_grad()
def test_mixed_batch_logits(vlm: VLM) -> None:
    chats = mixed_chats()
    together = vlm(vlm.processor(chats))
    for row, messages in zip(together, chats, strict=True):
        [alone] = vlm(vlm.processor([messages]))
        assert close(row[:len(alone)], alone)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_mixed_batch_samples(vlm: VLM, temperature: float) -> None:
    options = {"n": 3, "max_new_tokens": 8, "temperature": temperature, "seed": 2}
    together = generate(vlm, mixed_chats(), **options)
    assert together == [generate(vlm, [messages], **options)[0] for messages in mixed_chats()]
    assert generate(vlm, mixed_chats()[::-1], **options) == together[::-1]


def test_mixed_batch_digits(vlm: VLM) -> None:
    replies = ["0", "0.", "0.5"]
    together = torch.tensor(next_digits(vlm, mixed_chats(), replies))
    for of_chat, messages in zip(together, mixed_chats(), strict=True):
        [alone] = next_digits(vlm, [messages], replies)
        assert close(of_chat, torch.tensor(alone))


@torch.no_grad()
def test_mixed_batch_pairs(vlm: VLM) -> None:
    """Of two pictures and none, with completions of different lengths."""
    completions = [([5, 6, 7], [8]), ([9], [10, 11, 12, 13]), ([14, 15], [16]), ([17], [18])]
    pairs = [(messages, chosen, rejected)
             for messages, (chosen, rejected) in zip(mixed_chats(), completions, strict=True)]
    packed = pack_pairs(vlm.processor, pairs)
    states = packed.predictors(vlm.hidden(packed.batch, vlm.image_features(packed.batch)))
    for b, pair in enumerate(pairs):
        alone = pack_pairs(vlm.processor, [pair])
        expected = alone.predictors(vlm.hidden(alone.batch, vlm.image_features(alone.batch)))
        for side in range(2):
            in_batch = states[side * len(pairs) + b][packed.mask[side * len(pairs) + b]]
            assert close(in_batch, expected[side][alone.mask[side]])
