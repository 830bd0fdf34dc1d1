"""Model folders: what is wrong with one is a sentence that names it, and a save is whole or not at all."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import FAMILIES, checkpoint, load_vlm, save_vlm
from model.lora import add_adapters
from model.settings import read_settings
from published import CONFIGS as PUBLISHED
from published import PARAMETERS
from tiny import CONFIGS, disk_name, write_checkpoint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def set_field(path: Path, key: str, value: object, part: str | None = None) -> None:
    """Overwrite, or add, one field of a JSON file, or of the object `part` in it."""
    content = read_json(path)
    fields = content[part] if part else content
    fields[key] = value
    path.write_text(json.dumps(content))


def remove_field(path: Path, key: str, part: str | None = None) -> None:
    """Remove one field of a JSON file, or of the object `part` in it."""
    content = read_json(path)
    fields = content[part] if part else content
    del fields[key]
    path.write_text(json.dumps(content))


def set_weight(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """Overwrite, or add, one tensor of model.safetensors."""
    weights = load_file(folder / WEIGHTS)
    weights[name] = tensor
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny checkpoint of each family."""
    return write_family(request.param, tmp_path / "model")


def write_family(family: str, folder: Path, shards: int = 1) -> Path:
    config = CONFIGS[family]()
    return write_checkpoint(folder, config, shards=shards)


def norm_name(folder: Path) -> str:
    """The name that the decoder's last norm has in the files of `folder`; it has 48 numbers."""
    family = read_json(folder / "config.json")["model_type"]
    return disk_name(family, "model.language_model.norm.weight")


def text_part(folder: Path) -> str | None:
    """Where the language model's fields stand in config.json: in an object, or at the top."""
    return "text_config" if "text_config" in read_json(folder / "config.json") else None


# ---- weights

def test_missing_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights[norm_name(folder)]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model\.language_model\.norm\.weight \(1 tensors"):
        load_vlm(folder)


def test_extra_tensor(folder: Path) -> None:
    set_weight(folder, "stray", torch.zeros(1))
    with pytest.raises(ValueError, match="holds stray, which the model does not have"):
        load_vlm(folder)


def test_misshapen_tensor(folder: Path) -> None:
    set_weight(folder, norm_name(folder), torch.zeros(47))
    with pytest.raises(ValueError, match=r"norm\.weight has shape \(47,\), the model needs \(48,\)"):
        load_vlm(folder)


def test_old_rope_buffers_are_ignored(folder: Path) -> None:
    set_weight(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(6))
    load_vlm(folder)


def test_truncated_file(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    for length in (len(whole) - 1, 100, 0):
        (folder / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
            load_vlm(folder)


def test_absent_shard_and_absent_tensor(tmp_path: Path) -> None:
    folder = write_family("qwen3_vl", tmp_path / "model", shards=3)
    set_field(folder / INDEX, "ghost", "model-00001-of-00003.safetensors", part="weight_map")
    with pytest.raises(ValueError, match="names ghost, which no shard holds"):
        load_vlm(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names model-00002-of-00003\.safetensors, which is absent"):
        load_vlm(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers(value: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """One number among many; the largest of the dtype are numbers, although their sum is not."""
    folder = write_family("qwen3_vl", tmp_path / "model")
    name = "model.language_model.embed_tokens.weight"
    largest = torch.finfo(dtype).max
    weight = torch.full((272, 48), largest, dtype=dtype)
    set_weight(folder, name, weight)
    load_vlm(folder, dtype=None)
    weight.view(-1)[7777] = float(value)
    set_weight(folder, name, weight)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*embed_tokens\.weight holds NaN or infinity"):
        load_vlm(folder)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float8_e4m3fn])
def test_dtypes_that_are_no_weights(dtype: torch.dtype, folder: Path) -> None:
    ones = torch.ones(48).to(dtype)
    set_weight(folder, norm_name(folder), ones)
    with pytest.raises(ValueError, match=rf"norm\.weight is {dtype}; weights are torch\.float32, "):
        load_vlm(folder)


@pytest.mark.parametrize("content, told", [
    ([], r"weight_map is \[\], not an object"),
    (None, "weight_map is None"),
    ({"a": 1}, "the file of a is 1, not a name"),
    ({"a": ["b"]}, "the file of a is .*, not a name"),
])
def test_malformed_index(content: object, told: str, tmp_path: Path) -> None:
    folder = write_family("qwen3_vl", tmp_path / "model", shards=2)
    set_field(folder / INDEX, "weight_map", content)
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json: {told}"):
        load_vlm(folder)


def test_pickles_are_not_opened(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds pickled weights only"):
        load_vlm(folder)


def test_no_weights_and_no_such_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        load_vlm(folder)
    with pytest.raises(ValueError, match="is neither a folder nor a hub id"):
        load_vlm(folder / "nowhere" / "deep" / "down")


# ---- settings

@pytest.mark.parametrize("value", [None, "abc", [], {}, 1.5, True, -1, [258, None], [[258]]])
def test_malformed_stop_tokens(value: object, folder: Path) -> None:
    set_field(folder / "generation_config.json", "eos_token_id", value)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is "):
        load_vlm(folder)


@pytest.mark.parametrize("value", [None, "abc", 1.5, -1, 0, True, [48], {}])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_counts_that_are_none(key: str, value: object, folder: Path) -> None:
    set_field(folder / "config.json", key, value, part=text_part(folder))
    message = f"config.json: {key} is {value!r}, not a positive integer"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_vlm(folder)


@pytest.mark.parametrize("value", [None, "abc", [{}], 1])
@pytest.mark.parametrize("key", ["text_config", "vision_config"])
def test_parts_that_are_none(key: str, value: object, folder: Path) -> None:
    if key == "text_config" and value is None and text_part(folder) is None:
        pytest.skip("a flat file, in which null is as good as absent")
    set_field(folder / "config.json", key, value)
    message = f"config.json: {key} is {value!r}, not an object"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_vlm(folder)


@pytest.mark.parametrize("value", [None, "abc", 1, {}])
@pytest.mark.parametrize("family, part, key", [
    ("qwen3_vl", "vision_config", "deepstack_visual_indexes"),
    ("qwen2_5_vl", "vision_config", "fullatt_block_indexes"),
    ("mllama", "text_config", "cross_attention_layers"),
    ("mllama", "vision_config", "supported_aspect_ratios"),
])
def test_lists_that_are_none(family: str, part: str, key: str, value: object, tmp_path: Path) -> None:
    folder = write_family(family, tmp_path)
    set_field(folder / "config.json", key, value, part=part)
    message = f"config.json: {key} is {value!r}, not a list"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_vlm(folder)


@pytest.mark.parametrize("value", [[], ["qwen3_vl"], None, {}, 1])
def test_model_type_that_is_no_name(value: object, folder: Path) -> None:
    set_field(folder / "config.json", "model_type", value)
    message = f"model_type {value!r} is not one of"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_vlm(folder)


def test_unknown_model_type(folder: Path) -> None:
    set_field(folder / "config.json", "model_type", "llava")
    with pytest.raises(ValueError, match="model_type 'llava' is not one of"):
        load_vlm(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "preprocessor_config.json",
                                  "tokenizer.json"])
def test_settings_absent_or_cut_short(name: str, folder: Path) -> None:
    whole = (folder / name).read_text()
    (folder / name).write_text(whole[:-5])
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        load_vlm(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"holds no {name}"):
        load_vlm(folder)


def test_tokenizer_settings_cut_short(folder: Path) -> None:
    """Not needed, but where they are there they are read when the model is saved, after hours of training."""
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{% for')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        load_vlm(folder)


# By family: (object of config.json or None for the top, field).
PUBLISHED_FIELDS = {
    "qwen3_vl": [
        ("text_config", "rms_norm_eps"),
        ("text_config", "rope_theta"),
        ("text_config", "head_dim"),
        ("vision_config", "hidden_size"),
        ("vision_config", "deepstack_visual_indexes"),
        (None, "tie_word_embeddings"),
        (None, "image_token_id"),
    ],
    "qwen2_5_vl": [
        (None, "rms_norm_eps"),
        (None, "rope_theta"),
        (None, "rope_scaling"),
        (None, "tie_word_embeddings"),
        ("vision_config", "in_chans"),
        ("vision_config", "window_size"),
        ("vision_config", "fullatt_block_indexes"),
    ],
    "mllama": [
        ("text_config", "rope_scaling"),
        ("text_config", "cross_attention_layers"),
        ("vision_config", "image_size"),
        ("vision_config", "intermediate_layers_indices"),
        ("vision_config", "attention_heads"),
        (None, "image_token_index"),
    ],
}
NEWER_NAMES = {"in_chans": "in_channels", "image_token_index": "image_token_"}


@pytest.mark.parametrize("family, part, field",
                         [(family, *names) for family, fields in PUBLISHED_FIELDS.items() for names in fields])
def test_no_default_stands_in_for_a_field(family: str, part: str | None, field: str, tmp_path: Path) -> None:
    folder = write_family(family, tmp_path)
    remove_field(folder / "config.json", field, part)
    newer = NEWER_NAMES.get(field, field)
    with pytest.raises(ValueError, match=f"config.json lacks the field '({field}|{newer})"):
        load_vlm(folder)


# ---- saving

def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_interrupted_save_leaves_the_old_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load_vlm(folder)
    before = contents(folder)
    for function in ("model.copy_settings", "model.save_weights", "model.checkpoint._sync"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(function, interrupt)
            save_vlm(vlm, folder)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    with torch.no_grad():
        vlm.decoder.norm.weight += 1
    save_vlm(vlm, folder)
    assert torch.equal(load_vlm(folder).decoder.norm.weight, vlm.decoder.norm.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_shards_of_a_save(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100_000)
    vlm = load_vlm(folder)
    copy = tmp_path / "copy"
    save_vlm(vlm, copy)

    shards = sorted(copy.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = read_json(copy / INDEX)
    assert set(index["weight_map"]) == set(load_file(folder / WEIGHTS))
    total = sum(parameter.nbytes for parameter in vlm.parameters())
    assert index["metadata"]["total_size"] == total

    loaded_copy = load_vlm(copy)
    for name, parameter in vlm.named_parameters():
        assert torch.equal(loaded_copy.get_parameter(name), parameter)


def test_dtypes(folder: Path, tmp_path: Path) -> None:
    """In memory as asked, or as in the file; saved as held, or as asked."""
    half = tmp_path / "half"
    save_vlm(load_vlm(folder), half, dtype=torch.bfloat16)
    saved = load_file(half / WEIGHTS).values()
    as_in_the_file = load_vlm(half, dtype=None).parameters()
    as_by_default = load_vlm(half).parameters()
    assert {tensor.dtype for tensor in saved} == {torch.bfloat16}
    assert {parameter.dtype for parameter in as_in_the_file} == {torch.bfloat16}
    assert {parameter.dtype for parameter in as_by_default} == {torch.float32}


def test_what_stands_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    """Licences, their conditions, the card, and templates are copied; pickles, pictures and folders are not."""
    copied = ["LICENSE", "LICENSE.txt", "NOTICE", "README.md", "USE_POLICY.md", "chat_template.json", "merges.txt",
              "special_tokens_map.json", "additional_chat_templates/tool_use.jinja"]
    left = ["training_args.bin", "figure.png", "notes.md", "original/params.json"]
    for name in (*copied, *left):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"the content of {name}")
    (folder / "chat_template.json").write_text('{"chat_template": "published"}')
    copy = tmp_path / "copy"
    save_vlm(load_vlm(folder), copy)
    for name in copied:
        assert (copy / name).read_bytes() == (folder / name).read_bytes(), name
    for name in left:
        assert not (copy / name).exists(), name


# ---- sizes from shapes

def file_bytes(folder: Path) -> int:
    """The bytes of all tensors in a folder's safetensors files."""
    return sum(tensor.nbytes for path in folder.glob("*.safetensors") for tensor in load_file(path).values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_size_of_a_copy(dtype: torch.dtype | None, folder: Path, tmp_path: Path) -> None:
    """Adapters add nothing: they are merged."""
    vlm = load_vlm(folder)
    add_adapters(vlm.decoder.layers, rank=2)
    save_vlm(vlm, tmp_path / "copy", dtype)
    assert checkpoint.saved_bytes(vlm, vlm.disk_names, dtype) == file_bytes(tmp_path / "copy")


@pytest.mark.parametrize("rank", [0, 2])
def test_size_of_a_training_checkpoint(rank: int, folder: Path, tmp_path: Path) -> None:
    """What a step of AdamW leaves to be saved, but for some kilobytes of names and counts."""
    vlm = load_vlm(folder).requires_grad_(False)
    chosen = vlm.decoder.layers[1:]
    if rank:
        add_adapters(chosen, rank)
    else:
        chosen.requires_grad_(True)
    trained = {name: parameter for name, parameter in vlm.named_parameters() if parameter.requires_grad}
    optimiser = torch.optim.AdamW(trained.values())
    sum(parameter.sum() for parameter in trained.values()).backward()
    optimiser.step()

    path = tmp_path / "state.pt"
    torch.save({"model": trained, "optimiser": optimiser.state_dict()}, path)
    expected = checkpoint.training_bytes(vlm)
    assert expected == 12 * sum(parameter.numel() for parameter in trained.values())
    assert expected <= path.stat().st_size <= expected + 2000 * len(trained)


def test_a_download_that_fails_and_gives_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TimeoutError
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match="^owner/name is not a local folder and cannot be downloaded: TimeoutError$"):
        checkpoint.resolve_folder("owner/name")


def test_sizes_of_a_published_model(tmp_path: Path) -> None:
    """From shapes alone, no memory: Qwen3-VL-2B's language model takes about 20 GB a checkpoint."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-VL-2B"]))
    with torch.device("meta"):
        vlm = FAMILIES["qwen3_vl"](read_settings(tmp_path, "config.json"))
    names = [name for name, _ in vlm.named_parameters()]
    assert checkpoint.saved_bytes(vlm, names, torch.bfloat16) == 2 * PARAMETERS["Qwen3-VL-2B"]
    vlm.tower.requires_grad_(False)
    assert checkpoint.training_bytes(vlm) == 12 * (1_409_410_048 + 311_164_928)
