"""Folders that the newest transformers saves from random models: ours opens them and agrees; config.json in the
spellings of different years."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from model import load_vlm, save_vlm
from model.settings import Settings, read_settings, rope_settings
from tiny import CONFIGS, chat, example_chats, load_reference, picture, reference_inputs, write_checkpoint

TOLERANCE = 1e-4                                        # largest difference over largest logit


def save_by_transformers(family: str, folder: Path, work: Path) -> Path:
    """A random model, its tokenizer and its preprocessing, all as transformers writes them from objects in memory."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    source = write_checkpoint(work, CONFIGS[family]())
    config = transformers.AutoConfig.from_pretrained(source)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.generation_config = transformers.GenerationConfig.from_pretrained(source)
    model.save_pretrained(folder)

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    tokenizer.save_pretrained(folder)
    reader = MllamaImageProcessorPil if family == "mllama" else Qwen2VLImageProcessorPil
    reader.from_pretrained(source).save_pretrained(folder)
    return folder


def nest_preprocessing(folder: Path) -> None:
    """Move preprocessor_config.json where a whole processor of transformers 5 writes it."""
    path = folder / "preprocessor_config.json"
    content = {"image_processor": json.loads(path.read_text()), "processor_class": "Processor"}
    (folder / "processor_config.json").write_text(json.dumps(content))
    path.unlink()


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_saved_by_transformers(family: str, tmp_path: Path) -> None:
    folder = save_by_transformers(family, tmp_path / "saved", tmp_path / "work")
    nest_preprocessing(folder)
    config = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in config["text_config"]
    assert config["dtype"] == "bfloat16"

    vlm = load_vlm(folder)
    assert vlm.file_dtype == torch.bfloat16
    if family == "mllama":
        vlm.follow = "transformers"
    reference = load_reference(folder)
    for messages in example_chats():
        batch = vlm.processor([messages])
        ours = vlm(batch)
        theirs = reference(**reference_inputs(vlm, batch)).logits
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_saved_there_and_back(family: str, tmp_path: Path) -> None:
    """Ours writes a folder of transformers' again: the same files, tensors of the same names and bits."""
    folder = save_by_transformers(family, tmp_path / "saved", tmp_path / "work")
    vlm = load_vlm(folder, dtype=None)
    save_vlm(vlm, tmp_path / "copy")
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes(), path.name
    again = load_vlm(tmp_path / "copy", dtype=None)
    assert again.disk_names == vlm.disk_names
    for name, parameter in vlm.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_processor_of_transformers(tmp_path: Path) -> None:
    """The whole processor where it can be built without torchvision: its folder holds no preprocessor_config.json."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    folder = write_checkpoint(tmp_path / "model", CONFIGS["mllama"]())
    expected = load_vlm(folder).processor([chat(picture(90, 20), "?")])

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), additional_special_tokens=["<|image|>"])
    template = "{{ 'one of its own' }}"
    processor = transformers.MllamaProcessor(MllamaImageProcessorPil.from_pretrained(folder), tokenizer, template)
    (folder / "preprocessor_config.json").unlink()
    shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    processor.save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()

    vlm = load_vlm(folder)
    batch = vlm.processor([chat(picture(90, 20), "?")])
    assert torch.equal(batch.input_ids, expected.input_ids)
    assert torch.equal(batch.pixel_values, expected.pixel_values)
    save_vlm(vlm, tmp_path / "copy")
    assert (tmp_path / "copy" / "chat_template.jinja").read_text() == template
    assert (tmp_path / "copy" / "processor_config.json").exists()


# ---- the spellings of rotary settings

SECTIONS = {"mrope_section": [4, 2, 2]}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def settings_of(content: dict[str, Any], folder: Path) -> Settings:
    (folder / "config.json").write_text(json.dumps(content))
    return read_settings(folder, "config.json")


@pytest.mark.parametrize("content, kind", [
    ({"rope_theta": 5e6, "rope_scaling": {"rope_type": "default", **SECTIONS}}, "default"),
    ({"rope_theta": 5e6, "rope_scaling": {"type": "mrope", **SECTIONS}}, "default"),
    ({"rope_theta": 5e6, "rope_scaling": {"type": "mrope", "rope_type": "mrope", **SECTIONS}}, "default"),
    ({"rope_theta": 5e6, "rope_scaling": {"type": "default", "rope_type": "default", **SECTIONS}}, "default"),
    ({"rope_theta": 5e6, "rope_scaling": SECTIONS}, "default"),
    ({"rope_theta": 5e6, "rope_scaling": {"type": "llama3", **LLAMA3}}, "llama3"),
    ({"rope_scaling": {"rope_theta": 5e6, "type": "mrope", **SECTIONS}}, "default"),
    ({"rope_parameters": {"rope_theta": 5e6, "rope_type": "default", **SECTIONS}}, "default"),
    ({"rope_parameters": {"rope_theta": 5e6, "type": "mrope", **SECTIONS}}, "default"),
    ({"rope_theta": 5e6, "rope_parameters": {"rope_type": "llama3", **LLAMA3}, "rope_scaling": None}, "llama3"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e6, "rope_type": "default", **SECTIONS}}}, "default"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e6, "rope_type": "default", **SECTIONS},
                          "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}},
      "layer_types": ["full_attention", "full_attention"]}, "default"),
    ({"rope_theta": 5e6, "rope_scaling": {"rope_type": "default", "partial_rotary_factor": 1.0, **SECTIONS},
      "partial_rotary_factor": None}, "default"),
])
def test_rope_spellings(content: dict[str, Any], kind: str, tmp_path: Path) -> None:
    theta, scaling = rope_settings(settings_of(content, tmp_path))
    assert theta == 5e6
    assert scaling["rope_type"] == kind
    expected = LLAMA3 if kind == "llama3" else SECTIONS
    for name, value in expected.items():
        assert scaling[name] == value


@pytest.mark.parametrize("content, told", [
    ({"rope_theta": 5e6, "rope_scaling": {"type": "yarn", "factor": 4.0, **SECTIONS}}, "rope_type 'yarn' is not one"),
    ({"rope_parameters": {"rope_theta": 5e6, "rope_type": "dynamic", **SECTIONS}}, "rope_type 'dynamic' is not one"),
    ({"rope_theta": 5e6, "rope_scaling": {"rope_type": ["x"], **SECTIONS}}, r"rope_type \['x'\] is not one"),
    ({"rope_theta": 5e6, "rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear"}},
     "rope_type 'linear' is not one"),
    ({"rope_theta": 5e6, "rope_scaling": SECTIONS, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_theta": 5e6, "rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"rope_theta": "5e6", "rope_scaling": SECTIONS}, "rope_theta is '5e6', not a positive number"),
    ({"rope_theta": 0, "rope_scaling": SECTIONS}, "rope_theta is 0, not a positive number"),
    ({"rope_scaling": SECTIONS}, "lacks the field 'rope_theta'"),
    ({"rope_theta": 5e6}, "lacks the field 'rope_scaling'"),
    ({"rope_theta": 5e6, "rope_scaling": None}, "rope_scaling is None, not an object"),
    ({"rope_theta": 5e6, "rope_parameters": [1]}, r"rope_parameters is \[1\], not an object"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e6}, "sliding_attention": {"rope_theta": 1e4}}},
     "differ between types of attention layers"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e6}}, "layer_types": ["chunked_attention"]},
     "lacks the field 'chunked_attention'"),
])
def test_rope_that_is_not_ours(content: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"config\.json:? .*{told}"):
        rope_settings(settings_of(content, tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_spellings_of_one_model(family: str, tmp_path: Path) -> None:
    """The published config and the one by layer type give the same logits to the last bit."""
    logits = []
    for spelling in ("published", "transformers 5", "by layer type"):
        by_layer_type = spelling == "by layer type"
        config = CONFIGS[family](spelling="transformers 5" if by_layer_type else spelling)
        if by_layer_type:
            text = config["text_config"]
            text["rope_parameters"] = {"full_attention": text["rope_parameters"]}
            text["layer_types"] = ["full_attention"] * text["num_hidden_layers"]
        vlm = load_vlm(write_checkpoint(tmp_path / spelling, config))
        logits.append(vlm(vlm.processor([chat("a", picture(30, 40), "b")])))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
