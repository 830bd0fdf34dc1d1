"""Settings: the JSON files of a model folder, each field checked when it is read.

Whatever is wrong with a file or a field is a ValueError that names it. There are no defaults: a number that we made up
must not stand in for a published one. Which fields a family computes is in fields.py, how they fit together in
ranges.py.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROPE_TYPES = ("default", "llama3")                      # the rotary frequencies that a family computes
DEEPEST = 100                                           # lists and objects inside each other, in a JSON file
LARGEST = 2 ** 20 - 1                                   # of counts and widths, unless LARGEST_OF says another
LARGEST_TOKEN = 2 ** 31 - 1
LARGEST_NUMBER = 1e30                                   # fp32 ends at 3e38

# Fields of the settings files by what they must hold. Settings checks a field when it is read.
POSITIVE_INTEGERS = frozenset((
    "attention_heads", "depth", "head_dim", "height", "hidden_size", "image_size", "in_channels", "in_chans",
    "intermediate_size", "max_image_tiles", "max_num_tiles", "max_position_embeddings", "merge_size",
    "num_attention_heads", "num_channels", "num_global_layers", "num_heads", "num_hidden_layers",
    "num_key_value_heads", "num_position_embeddings", "original_max_position_embeddings", "out_hidden_size",
    "patch_size", "spatial_merge_size", "temporal_patch_size", "vision_output_dim", "vocab_size", "width",
    "window_size"))
LARGEST_OF = {                                          # far above what is published, far below what a machine holds
    "depth": 4096, "num_global_layers": 4096, "num_hidden_layers": 4096,
    "height": 4096, "image_size": 4096, "width": 4096, "patch_size": 1024,
    "max_image_tiles": 64, "max_num_tiles": 64, "merge_size": 16, "spatial_merge_size": 16, "temporal_patch_size": 64,
    "max_position_embeddings": LARGEST_TOKEN, "original_max_position_embeddings": LARGEST_TOKEN,
}
POSITIVE_NUMBERS = frozenset(("factor", "high_freq_factor", "low_freq_factor", "rope_theta"))
EPSILONS = frozenset(("norm_eps", "rms_norm_eps"))      # between 0 and 1
TOKENS = frozenset((
    "image_token_id", "image_token_index", "video_token_id", "vision_end_token_id", "vision_start_token_id"))
LISTS = frozenset((
    "cross_attention_layers", "deepstack_visual_indexes", "fullatt_block_indexes", "image_mean", "image_std",
    "intermediate_layers_indices", "layer_types", "mrope_section", "supported_aspect_ratios"))
OBJECTS = frozenset((
    "image_processor", "rope_parameters", "rope_scaling", "size", "text_config", "vision_config", "weight_map"))


class Settings(dict):
    """A JSON object of a model folder. Reading a field that is missing or malformed is a ValueError that names it."""

    source = ""                                         # the file that it was read from, for error messages

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        wrong = malformed(key, value)
        if wrong:
            raise ValueError(f"{self.source}: {key} is {value!r:.80}, {wrong}")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The field, or `default` where it is missing or null."""
        if super().get(key) is None:
            return default
        return self[key]

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.source} lacks the field {key!r}")


def malformed(key: str, value: Any) -> str | None:
    """What is wrong with a field's value, "not a list"; None where nothing is."""
    if key in POSITIVE_INTEGERS:
        largest = LARGEST_OF.get(key, LARGEST)
        if type(value) is not int or value < 1:         # True is an int by inheritance, and no number here
            return "not a positive integer"
        return f"above {largest}, the largest that is read" if value > largest else None
    if key in POSITIVE_NUMBERS and not (is_number(value) and value > 0):
        return "not a positive number"
    if key in EPSILONS and not (is_number(value) and 0 < value < 1):
        return "not a number between 0 and 1"
    if key in TOKENS and not is_token(value):
        return "not a token's id"
    if key in LISTS and not isinstance(value, list):
        return "not a list"
    if key in OBJECTS and not isinstance(value, Settings):
        return "not an object"
    return None


def is_number(value: Any) -> bool:
    """Whether a value is a number that fp32 holds; NaN, infinity and True are none."""
    return type(value) in (int, float) and abs(value) < LARGEST_NUMBER


def is_token(value: Any) -> bool:
    """Whether a value may be a token's id."""
    return type(value) is int and 0 <= value <= LARGEST_TOKEN


def read_settings(folder: Path, name: str) -> Settings:
    """The JSON file `name` of a model folder; objects inside it are Settings too. ValueError if it is none."""
    path = Path(folder) / name

    def to_settings(value: dict) -> Settings:
        settings = Settings(value)
        settings.source = str(path)
        return settings

    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_hook=to_settings)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {name}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{path} is not JSON: maximum recursion depth, lists or objects lie too deep") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, Settings):
        raise ValueError(f"{path} does not hold a JSON object")
    check_depth(settings, path)
    return settings


def check_depth(value: Any, path: Path) -> None:
    """ValueError where lists and objects lie more than DEEPEST deep: whatever walks such a file would fail later."""
    level = [value]
    for _ in range(DEEPEST):
        inner = []
        for entry in level:
            if isinstance(entry, dict):
                inner += entry.values()
            elif isinstance(entry, list):
                inner += entry
        level = [entry for entry in inner if isinstance(entry, (dict, list))]
        if not level:
            return
    raise ValueError(f"{path} is not JSON that is read here: lists and objects lie more than {DEEPEST} deep")


def renamed_field(settings: Settings, name: str, other_name: str) -> Any:
    """A field that files of different age call `name` or `other_name`; `name` counts where both are there."""
    if name not in settings and other_name in settings:
        return settings[other_name]
    return settings[name]


def rope_settings(text_config: Settings) -> tuple[float, Settings]:
    """(theta, scaling) of a text config, in any of its spellings; scaling["rope_type"] is one of ROPE_TYPES.

        published       "rope_theta": 5e6, "rope_scaling": {"rope_type": "default", "mrope_section": ..}
        older           "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": ..}
        transformers 5  "rope_parameters": {"rope_theta": 5e6, "rope_type": "default", "mrope_section": ..}
        by layer type   "rope_parameters": {"full_attention": {"rope_theta": 5e6, ..}, ..}

    Where a file holds both, rope_scaling counts, as in transformers. ValueError for what would give other frequencies.
    """
    rope = rope_of_all_layers(text_config)
    theta = rope["rope_theta"] if "rope_theta" in rope else text_config["rope_theta"]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "mrope":                                 # an older name: its frequencies are the usual ones
        kind = "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"{text_config.source}: rope_type {kind!r:.80} is not one of {', '.join(ROPE_TYPES)}")
    for fields in (rope, text_config):
        share = fields.get("partial_rotary_factor", 1)
        if share != 1:
            raise ValueError(f"{text_config.source}: partial_rotary_factor is {share!r:.80}; whole heads are rotated")

    scaling = Settings(rope)
    scaling["rope_type"] = kind
    scaling.source = text_config.source
    return theta, scaling


def rope_of_all_layers(text_config: Settings) -> Settings:
    """rope_scaling or rope_parameters as the file holds it; one that is given by layer type must be one for all."""
    rope = text_config.get("rope_scaling") or text_config.get("rope_parameters")
    if rope is None:
        rope = text_config["rope_scaling"]              # the error says what is wrong with it
    by_layer_type = bool(rope) and all(isinstance(value, Settings) for value in rope.values())
    if not by_layer_type:
        return rope
    layer_types = text_config.get("layer_types") or list(rope)
    if not all(isinstance(layer_type, str) for layer_type in layer_types):
        raise ValueError(f"{text_config.source}: layer_types is {layer_types!r:.80}, not a list of names")
    first, *others = [rope[layer_type] for layer_type in sorted(set(layer_types))]
    if any(settings != first for settings in others):
        raise ValueError(f"{text_config.source}: rope_parameters differ between types of attention layers")
    return first
