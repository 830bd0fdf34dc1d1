"""Model folders that were put together wrongly, or to do harm: one sentence that names the file."""
from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import generate, load_vlm, next_digits
from model.qwen3_vl import Qwen3VL
from model.settings import LARGEST, read_settings
from model.vlm import NonFiniteLogits
from tiny import CONFIGS, chat, write_checkpoint

DEEP = "[" * 100_000
TEXT = {"qwen3_vl": "text_config", "qwen2_5_vl": None, "mllama": "text_config"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each family, to be copied."""
    root = tmp_path_factory.mktemp("families")
    return {family: write_checkpoint(root / family, config()) for family, config in CONFIGS.items()}


def refused(folder: Path) -> str:
    """What load_vlm says of the folder: one line of less than 600 characters."""
    with pytest.raises(ValueError) as raised:
        load_vlm(folder)
    message = str(raised.value)
    assert len(message) < 600 and "\n" not in message, message
    return message


def change_json(path: Path, change: Callable[[dict], Any]) -> None:
    """Read a JSON file, change it, write it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---- config.json

# (families, "text" or "vision", field, value, what the message says)
FIELDS = [
    ("all", "text", "hidden_size", 2 ** 20, f"above {LARGEST}"),
    ("all", "text", "vocab_size", 10 ** 400, f"above {LARGEST}"),
    ("all", "text", "num_hidden_layers", 10 ** 6, "above 4096"),
    ("all", "text", "intermediate_size", 1e3, "not a positive integer"),
    ("all", "text", "num_attention_heads", 5, "does not divide"),
    ("all", "text", "num_key_value_heads", 3, "does not divide"),
    ("all", "text", "rms_norm_eps", 0, "not a number between 0 and 1"),
    ("all", "text", "rms_norm_eps", float("nan"), "not a number between 0 and 1"),
    ("all", "text", "rms_norm_eps", 1.0, "not a number between 0 and 1"),
    ("all", "text", "rms_norm_eps", True, "not a number between 0 and 1"),
    ("all", "text", "rope_theta", -1.0, "not a positive number"),
    ("all", "text", "rope_theta", float("inf"), "not a positive number"),
    ("all", "text", "rope_theta", 10 ** 400, "not a positive number"),
    ("all", "text", "rope_theta", True, "not a positive number"),
    ("all", "text", "layer_types", 3, "not a list"),
    ("qwen3_vl", "vision", "hidden_size", 34, "a head of the tower is 17 wide"),
    ("qwen2_5_vl", "vision", "hidden_size", 33, "hidden_size is 33, which num_heads, 2, does not divide"),
    ("mllama", "vision", "hidden_size", 33, "vision_output_dim is 96; it is computed here as 99 only"),
    ("all", "vision", "patch_size", 2000, "above 1024"),
    ("qwen3_vl", "vision", "patch_size", 7, "patch_size is 4, and .* has patch_size 7; these are not one model's"),
    ("mllama", "vision", "patch_size", 29, "image_size is 28, less than patch_size, 29"),
    ("qwen3_vl", "text", "head_dim", 15, "even width"),
    ("qwen3_vl", "vision", "depth", 10 ** 5, "above 4096"),
    ("qwen3_vl", "vision", "deepstack_visual_indexes", [0, 3], "holds 3, and there are layers 0 to 2"),
    ("qwen3_vl", "vision", "deepstack_visual_indexes", [2, 2], "names a layer twice"),
    ("qwen3_vl", "vision", "deepstack_visual_indexes", [-1], "holds -1, and there are layers"),
    ("qwen3_vl", "vision", "deepstack_visual_indexes", [True], "holds True, and there are layers"),
    ("qwen3_vl", "vision", "deepstack_visual_indexes", [[0]], "holds .0., and there are layers"),
    ("qwen3_vl", "vision", "num_position_embeddings", 35, "not a square"),
    ("qwen3_vl", "vision", "in_channels", 4, "in_channels is 4; it is computed here as 3 only"),
    ("qwen3_vl", "vision", "spatial_merge_size", 4, "merge_size is 2, and .* has spatial_merge_size 4"),
    ("qwen2_5_vl", "vision", "fullatt_block_indexes", [4], "holds 4, and there are layers 0 to 3"),
    ("qwen2_5_vl", "vision", "window_size", 7, "less than a cell of 8 pixels"),
    ("mllama", "text", "cross_attention_layers", [5], "holds 5, and there are layers 0 to 4"),
    ("mllama", "vision", "intermediate_layers_indices", [1, 4], "holds 4, and there are layers 0 to 3"),
    ("mllama", "vision", "intermediate_layers_indices", ["1", 3], "holds '1', and there are layers"),
    ("mllama", "vision", "max_num_tiles", 3, "supported_aspect_ratios holds .1, 4., not"),
    ("mllama", "vision", "max_num_tiles", 5, "must hold .1, 5. once"),
    ("mllama", "vision", "max_num_tiles", 10 ** 9, "above 64"),
    ("mllama", "vision", "supported_aspect_ratios", [3], "holds 3, not rows and columns"),
    ("mllama", "vision", "image_size", 56, "height is 28, and .* has image_size 56"),
    ("mllama", "vision", "norm_eps", 5, "not a number between 0 and 1"),
]


@pytest.mark.parametrize("family, part, field, value, told", [
    (family, *case) for names, *case in FIELDS for family in (CONFIGS if names == "all" else [names])])
def test_fields_out_of_range(family: str, part: str, field: str, value: Any, told: str, folders: dict[str, Path],
                             tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a weight is read. What depends on the field may be what is named."""
    shutil.copytree(folders[family], tmp_path / "model")
    path = tmp_path / "model" / "config.json"

    def change(config: dict) -> None:
        name = "vision_config" if part == "vision" else TEXT[family]
        fields = config[name] if name else config
        fields[field] = value

    def no_weights(*_: object) -> None:
        raise AssertionError("a weight was read")

    change_json(path, change)
    monkeypatch.setattr("model.load_weights", no_weights)
    message = refused(tmp_path / "model")
    assert re.search(told, message), message
    assert "config.json" in message


@pytest.mark.parametrize("family, section", [
    *(("qwen3_vl", section) for section in ([4, 2], [9, -1, 0], [4, 2, "2"], [8.0, 0, 0])),
    ("qwen2_5_vl", [4, 2, 1]), ("qwen2_5_vl", [4, 2])])
def test_sections_of_rotary_positions(family: str, section: list, folders: dict[str, Path], tmp_path: Path) -> None:
    """Three counts; where they are sections, and not interleaved, they must share out the whole head."""
    shutil.copytree(folders[family], tmp_path / "model")
    change_json(tmp_path / "model" / "config.json",             # which holds the text's fields at its top in old files
                lambda config: config.get("text_config", config)["rope_scaling"].update(mrope_section=section))
    assert "mrope_section is [" in refused(tmp_path / "model")


def test_what_transformers_computes_is_computed(folders: dict[str, Path], tmp_path: Path) -> None:
    """Interleaved counts beyond a head's width have no effect; taps beyond the decoder's layers are not added."""
    config = json.loads((folders["qwen3_vl"] / "config.json").read_text())
    taps = config["vision_config"]["deepstack_visual_indexes"]
    shutil.copytree(folders["qwen3_vl"], tmp_path / "model")
    change_json(tmp_path / "model" / "config.json",
                lambda config: config["text_config"]["rope_scaling"].update(mrope_section=[16, 8, 8]))
    load_vlm(tmp_path / "model")
    with torch.device("meta"):
        config["text_config"]["num_hidden_layers"] = len(taps) - 1
        (tmp_path / "short").mkdir()
        (tmp_path / "short" / "config.json").write_text(json.dumps(config))
        assert len(Qwen3VL(read_settings(tmp_path / "short", "config.json")).decoder.layers) == len(taps) - 1


@pytest.mark.parametrize("factors, told", [
    ({"low_freq_factor": 4.0}, "not below high_freq_factor"), ({"factor": 0}, "factor is 0, not a positive number"),
    ({"original_max_position_embeddings": 0}, "not a positive integer"),
])
def test_rope_of_llama_3(factors: dict, told: str, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["mllama"], tmp_path / "model")
    change_json(tmp_path / "model" / "config.json",
                lambda config: config["text_config"]["rope_scaling"].update(factors))
    assert told in refused(tmp_path / "model")


# ---- pictures

@pytest.mark.parametrize("field, value, told", [
    ("image_mean", [0.5, 0.5], "not three finite numbers"), ("image_mean", [0, 0, 10 ** 400], "three finite numbers"),
    ("image_mean", [0, 0, True], "three finite numbers"), ("image_std", [0.5, 0.5, 0], "must be above 0"),
    ("image_std", [0.5, 0.5, float("nan")], "three finite numbers"), ("resample", 99, "resample is 99, not one of"),
    ("resample", [3], "resample is [3], not one of"), ("resample", True, "resample is True, not one of"),
    ("size", {"shortest_edge": 5000, "longest_edge": 4096}, "the smaller first"),
    ("size", {"shortest_edge": True, "longest_edge": 4096}, "not two positive integers"),
    ("size", {"shortest_edge": 2 ** 40, "longest_edge": 2 ** 41}, "pictures are enlarged to 1099511627776 pixels"),
    ("merge_size", 4, "merge_size is 4, and"), ("patch_size", "4", "patch_size is '4', not a positive integer"),
])
def test_preprocessing_out_of_range(field: str, value: Any, told: str, folders: dict[str, Path],
                                    tmp_path: Path) -> None:
    shutil.copytree(folders["qwen3_vl"], tmp_path / "model")
    change_json(tmp_path / "model" / "preprocessor_config.json", lambda content: content.update({field: value}))
    message = refused(tmp_path / "model")
    assert "preprocessor_config.json" in message and told in message, message


def test_files_of_another_family(folders: dict[str, Path], tmp_path: Path) -> None:
    """The preprocessing, or the tokenizer, of the other one."""
    for family, other in (("qwen3_vl", "mllama"), ("mllama", "qwen3_vl")):
        for name, told in (("preprocessor_config.json", "the field"), ("tokenizer.json", "lacks the control token")):
            folder = tmp_path / f"{family}-{name}"
            shutil.copytree(folders[family], folder)
            shutil.copy(folders[other] / name, folder / name)
            message = refused(folder)
            assert name in message and told in message


# ---- JSON

@pytest.mark.parametrize("content, told", [
    (DEEP, "maximum recursion depth"), ('{"a": ' + "[" * 150 + "]" * 150 + "}", "more than 100 deep"),
    ("[1]", "does not hold a JSON object"), ("\ufeff{}", "is not JSON: Unexpected UTF-8 BOM"),
    ("1" * 5000, "is not JSON: Exceeds the limit"), ('{"a": "' + "x" * 10 ** 6, "is not JSON: Unterminated string"),
])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "preprocessor_config.json",
                                  "tokenizer.json", "tokenizer_config.json"])
def test_json_that_is_none(name: str, content: str, told: str, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["qwen3_vl"], tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_text(content, encoding="utf-8")
    message = refused(tmp_path / "model")
    assert message.startswith(str(path)) and told in message, message
    path.write_bytes(b'{"a": "\xff"}')
    assert "is not JSON: 'utf-8' codec" in refused(tmp_path / "model")
    path.unlink()
    path.mkdir()
    assert f"cannot read {path}: Is a directory" == refused(tmp_path / "model")


@pytest.mark.parametrize("field", ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"])
def test_placeholders_beyond_the_embedding(field: str, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["qwen3_vl"], tmp_path / "model")
    for number, told in ((272, "config.json: the largest id of a placeholder is 272"), (-1, f"{field} is -1, not")):
        change_json(tmp_path / "model" / "config.json", lambda config: config.update({field: number}))
        assert told in refused(tmp_path / "model")


def test_stop_tokens_beyond_the_embedding(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["qwen3_vl"], tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    for stop, told in ((272, "eos_token_id is 272, and the model's embedding has 272 rows"),
                       (10 ** 400, "no token id or list of them"), (True, "no token id")):
        change_json(path, lambda content: content.update(eos_token_id=stop))
        assert told in refused(tmp_path / "model")


# ---- the tokenizer

def broken_tokenizers() -> dict[str, tuple[Callable[[dict], Any], str]]:
    """Changes of tokenizer.json, and what is said of them. The last three make the library panic."""
    beyond = {"id": 300, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True}
    empty = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
    return {
        "a merge of nothing": (lambda t: t["model"].update(merges=[["q", "zz"]]), "out of vocabulary"),
        "no such model": (lambda t: t["model"].update(type="Foo"), "is no tokenizer that can be used"),
        "no such part": (lambda t: t.update(pre_tokenizer={"type": "Foo"}), "is no tokenizer that can be used"),
        "a broken expression": (lambda t: t.update(pre_tokenizer={
            "type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}), "Oniguruma error"),
        "no control tokens": (lambda t: t.update(added_tokens=[]), "lacks the control token"),
        "beyond": (lambda t: t["model"]["vocab"].update({"zz": 300}), "the largest id is 300, and the model's emb"),
        "a new token": (lambda t: [t["added_tokens"].append({**beyond, "content": f"<{k}>"}) for k in range(20)],
                        "and the model's embedding has 272 rows"),
        "an empty pattern": (lambda t: t.update(normalizer=empty), "is no tokenizer that can be used: index out of"),
        "no length": (lambda t: t.update(pre_tokenizer={"type": "FixedLength", "length": 0}), "chunk size must be"),
    }


@pytest.mark.parametrize("name", broken_tokenizers())
def test_tokenizers_that_cannot_be_used(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    change, told = broken_tokenizers()[name]
    shutil.copytree(folders["qwen3_vl"], tmp_path / "model")
    change_json(tmp_path / "model" / "tokenizer.json", change)
    message = refused(tmp_path / "model")
    assert "tokenizer.json" in message and told in message, message


def test_a_placeholder_that_is_a_word(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["qwen3_vl"], tmp_path / "model")
    tokens = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    change_json(tmp_path / "model" / "config.json", lambda config: config.update(image_token_id=tokens["A"]))
    assert "which is what the tokenizer makes of the text 'A'" in refused(tmp_path / "model")


# ---- weights

@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", "x" * 5000, "a\0"])
def test_an_index_that_leaves_the_folder(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Even where the other file is there."""
    shutil.copytree(folders["qwen3_vl"], tmp_path / "model")
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / "other.safetensors")
    tensors = load_file(tmp_path / "other.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, name)}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not a name like model-00001-of-00002.safetensors" in refused(tmp_path / "model")


@pytest.mark.parametrize("header", [
    b"[]", b"{", DEEP.encode(), b"\xff", b"{}", b'{"a": {"dtype": "F32"}}',
    b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 8], "data_offsets": [0, 4]}}',
])
def test_absurd_headers(header: bytes, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["qwen3_vl"], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    for length in (len(header), 2 ** 63, 2 ** 64 - 1):
        path.write_bytes(struct.pack("<Q", length) + header + b"\0" * 4)
        assert refused(tmp_path / "model").startswith(f"{path} is not a whole safetensors file")


def test_a_tensor_with_a_long_name(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["qwen3_vl"], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path) | {"x\n" * 5000: torch.zeros(1)}, path)
    assert "which the model does not have" in refused(tmp_path / "model")


# ---- logits

@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(value: float, temperature: float, folders: dict[str, Path],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, or only after some tokens; and where digits are read instead of drawn."""
    vlm = load_vlm(folders["qwen3_vl"])
    asked = chat("how many?")
    ordinary = vlm.logits
    calls = 0
    first_bad = 1

    def spoiled(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = ordinary(hidden)
        if calls >= first_bad:
            logits[-1, 7] = value
        return logits

    monkeypatch.setattr(vlm, "logits", spoiled)
    for first_bad in (1, 3):
        calls = 0
        vlm.stop_ids = frozenset((258,)) if first_bad == 1 else frozenset()
        with pytest.raises(NonFiniteLogits, match="qwen3_vl gives NaN or infinity, computed in torch.float32"):
            generate(vlm, [asked], n=2, max_new_tokens=5, temperature=temperature)
    calls = 0
    first_bad = 1
    with pytest.raises(NonFiniteLogits):
        next_digits(vlm, [asked], [""])


def test_weights_that_overflow(folders: dict[str, Path], tmp_path: Path) -> None:
    """Finite in the file, as load_vlm demands, and too large to be multiplied."""
    shutil.copytree(folders["qwen3_vl"], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("language_model.norm.weight"))
    weights[name] = torch.full_like(weights[name], 3e38)
    save_file(weights, path, metadata={"format": "pt"})
    vlm = load_vlm(tmp_path / "model")
    with pytest.raises(ArithmeticError, match="its answers would mean nothing"):
        generate(vlm, [chat("hello")], max_new_tokens=2, temperature=0.0)


def test_settings_name_their_file(folders: dict[str, Path]) -> None:
    config = read_settings(folders["qwen3_vl"], "config.json")
    config["image_token_id"] = -1
    with pytest.raises(ValueError, match="config.json: image_token_id is -1, not a token's id"):
        config["image_token_id"]
