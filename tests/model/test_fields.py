"""The fields of config.json: what is computed for one value only is an error with any other, the unknown is warned of,
and every spelling that the published files and transformers use is taken in silence."""
from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model import FAMILIES, VLM
from model.settings import read_settings
from published import CONFIGS as PUBLISHED
from tiny import CONFIGS as TINY

SPELLINGS = [("qwen3_vl", "published"), ("qwen3_vl", "transformers 5"), ("qwen2_5_vl", "published"),
             ("qwen2_5_vl", "transformers 4"), ("qwen2_5_vl", "transformers 5"), ("mllama", "published"),
             ("mllama", "transformers 5")]
# What the files of Llama-3.2-Vision hold beside the fields that matter: all that transformers 4 writes of any model.
ALL_OF_TRANSFORMERS_4 = {
    "_name_or_path": "", "add_cross_attention": False, "bad_words_ids": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False,
    "finetuning_task": None, "id2label": {"0": "LABEL_0"}, "is_decoder": False, "label2id": {"LABEL_0": 0},
    "max_length": 20, "num_beams": 1, "output_attentions": False, "prefix": None, "pruned_heads": {},
    "return_dict": True, "temperature": 1.0, "tf_legacy_loss": False, "torch_dtype": "bfloat16", "torchscript": False,
    "typical_p": 1.0, "use_bfloat16": False, "dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def build(folder: Path, config: dict) -> VLM:
    """The model of a configuration, without memory."""
    (folder / "config.json").write_text(json.dumps(config))
    settings = read_settings(folder, "config.json")
    with torch.device("meta"):
        return FAMILIES[config["model_type"]](settings)


def shapes(vlm: VLM) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in vlm.named_parameters()}


def set_field(config: dict, path: str, value: Any) -> None:
    """Set "text_config.rope_scaling.type"; the objects on the way are made."""
    *parts, field = path.split(".")
    for part in parts:
        config = config.setdefault(part, {})
    config[field] = value


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name: str, tmp_path: Path) -> None:
    """As they are, and with all that transformers 4 writes into each part."""
    config = copy.deepcopy(PUBLISHED[name])
    plain = shapes(build(tmp_path, config))
    for part in (config, config["vision_config"], config.get("text_config", config)):
        part.update(ALL_OF_TRANSFORMERS_4)
    assert shapes(build(tmp_path, config)) == plain


@pytest.mark.parametrize("family, spelling", SPELLINGS)
def test_spellings(family: str, spelling: str, tmp_path: Path) -> None:
    published = shapes(build(tmp_path, TINY[family]()))
    assert shapes(build(tmp_path, TINY[family](spelling=spelling))) == published


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_transformers_writes(name: str, tmp_path: Path) -> None:
    """Every field of its configuration objects, not only those that it saves."""
    transformers = pytest.importorskip("transformers")
    config = PUBLISHED[name]
    plain = shapes(build(tmp_path, config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    written = json.loads(json.dumps(transformers.AutoConfig.from_pretrained(tmp_path).to_dict()))
    assert "rope_parameters" in written["text_config"]
    assert shapes(build(tmp_path, written)) == plain


@pytest.mark.parametrize("family", ["qwen3_vl", "mllama"])
def test_a_flat_file(family: str, tmp_path: Path) -> None:
    """The language model's fields at the top, in the families whose published files nest them."""
    config = TINY[family]()
    nested = shapes(build(tmp_path, config))
    text = config.pop("text_config")
    assert shapes(build(tmp_path, {**text, **config})) == nested


QWEN = ("qwen3_vl", "qwen2_5_vl")
ALL = (*QWEN, "mllama")
# Families, a field, and a value of it that asks for another computation.
REFUSED = [
    (ALL, "text_config.hidden_act", "gelu"),
    (ALL, "text_config.use_sliding_window", True),
    (ALL, "text_config.mlp_bias", True),
    (ALL, "text_config.layer_types", ["full_attention", "sliding_attention", "full_attention"]),
    (("qwen3_vl", "mllama"), "text_config.sliding_window", 4096),
    (("qwen3_vl", "mllama"), "text_config.attention_bias", True),
    (("qwen2_5_vl",), "text_config.attention_bias", False),
    (("qwen2_5_vl", "mllama"), "text_config.head_dim", 16),
    (("mllama",), "text_config.tie_word_embeddings", True),
    (ALL, "text_config.rope_parameters.rope_type", "yarn"),
    (ALL, "text_config.rope_parameters.type", "dynamic"),
    (ALL, "text_config.rope_parameters.partial_rotary_factor", 0.5),
    (QWEN, "text_config.rope_parameters.rope_type", "llama3"),
    (QWEN, "text_config.rope_parameters.factor", 4.0),
    (("qwen3_vl",), "text_config.rope_parameters.mrope_interleaved", False),
    (("qwen2_5_vl",), "text_config.rope_parameters.mrope_interleaved", True),
    (ALL, "vision_config.hidden_act", "relu"),
    (QWEN, "vision_config.out_hidden_size", 64),
    (QWEN, "vision_config.rope_parameters.rope_theta", 5000.0),
    (("qwen2_5_vl",), "vision_config.spatial_patch_size", 2),
    (("mllama",), "vision_config.vision_output_dim", 64),
    (ALL, "quantization_config", {"quant_method": "awq"}),
    (("qwen3_vl",), "tie_word_embeddings", "yes"),
]


@pytest.mark.parametrize("family, path, value",
                         [(family, path, value) for families, path, value in REFUSED for family in families])
def test_another_computation_is_an_error(family: str, path: str, value: Any, tmp_path: Path) -> None:
    """One sentence names the file, the field and the value."""
    config = TINY[family](spelling="transformers 5")
    set_field(config, path, value)
    with pytest.raises(ValueError) as error:
        build(tmp_path, config)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: {path} is {value!r:.80}; ")
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope"])
def test_scaling_in_the_older_spelling(kind: str, tmp_path: Path) -> None:
    """Qwen2.5-VL's page recommends yarn for long contexts."""
    config = TINY["qwen2_5_vl"]()
    config["rope_scaling"].update(type=kind, factor=4.0, original_max_position_embeddings=32768)
    with pytest.raises(ValueError, match=f"config.json: rope_scaling.type is '{kind}'; "):
        build(tmp_path, config)


def test_llama_may_be_unscaled(tmp_path: Path) -> None:
    config = TINY["mllama"]()
    config["text_config"]["rope_scaling"] = {"rope_type": "default"}
    assert build(tmp_path, config).decoder.frequencies(torch.device("cpu")).shape == (6,)
    config["text_config"]["rope_scaling"]["factor"] = 8.0
    with pytest.raises(ValueError, match="rope_scaling.factor is 8.0"):
        build(tmp_path, config)


def test_a_window_that_is_switched_off(tmp_path: Path) -> None:
    """The published Qwen2.5-VL files give its width."""
    config = TINY["qwen2_5_vl"]()
    config.update(sliding_window=32768, max_window_layers=70, layer_types=["full_attention"] * 3)
    build(tmp_path, config)
    del config["use_sliding_window"]
    with pytest.raises(ValueError, match="config.json: sliding_window is 32768; "):
        build(tmp_path, config)


HARMLESS = [("torch_dtype", "bfloat16"), ("dtype", "float32"), ("transformers_version", "6.0.0"),
            ("text_config.dtype", "bfloat16"), ("text_config.use_cache", False),
            ("text_config.attention_dropout", 0.1), ("text_config.initializer_range", 0.01),
            ("vision_config.torch_dtype", None), ("vision_config.initializer_range", 0.02)]


@pytest.mark.parametrize("family", ALL)
def test_harmless_fields_are_silent(family: str, tmp_path: Path) -> None:
    config = TINY[family](spelling="transformers 5")
    plain = shapes(build(tmp_path, config))
    for path, value in HARMLESS:
        set_field(config, path, value)
    assert shapes(build(tmp_path, config)) == plain


@pytest.mark.parametrize("family", ALL)
def test_unknown_fields_are_named_once(family: str, tmp_path: Path) -> None:
    """In one warning, and the model is the same."""
    config = TINY[family](spelling="transformers 5")
    plain = shapes(build(tmp_path, config))
    for path in ("novelty", "text_config.memory_tokens", "text_config.rope_parameters.wobble", "vision_config.glasses"):
        set_field(config, path, 3)
    with pytest.warns(UserWarning) as caught:
        assert shapes(build(tmp_path, config)) == plain
    [warning] = caught
    assert str(warning.message) == (
        f"{tmp_path / 'config.json'}: fields that are not known here, and have no effect: novelty, "
        "text_config.memory_tokens, vision_config.glasses, text_config.rope_parameters.wobble")
