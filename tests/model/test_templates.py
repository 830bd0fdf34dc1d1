"""The chat templates that folders hold render the prompts that our processors make; which template a copy holds."""
from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from model import load_vlm, save_vlm
from model.checkpoint import CHAT_TEMPLATES
from model.processor import Chat, Processor
from tiny import CONFIGS, chat, picture, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TINY = sorted(path.parent for path in (ROOT / "model" / "tiny").glob("*/config.json"))
NAME = "chat_template.jinja"
SHOT = picture(30, 40)


def turn(role: str, *parts: object) -> dict:
    """One message; a single text is a string, as many write it."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": role, "content": parts[0]}
    [message] = chat(*parts)
    return {**message, "role": role}


CHATS = {
    "text": [turn("user", "How many legs has a spider?")],
    "picture": [turn("user", SHOT, "What is this?")],
    "around": [turn("user", "Before ", SHOT, " between\n\n", picture(16, 64, 1), SHOT, "\nafter ")],
    "turns": [turn("user", SHOT, "Color?"), turn("assistant", "Red."), turn("user", " Sure? "),
              turn("assistant", "Yes")],
    "system": [turn("system", "  Be brief.\n"), turn("user", "x", "y"), turn("assistant", "z\n"), turn("user", "")],
    "system and picture": [turn("system", "Be brief."), turn("user", SHOT), turn("assistant", "A bar."),
                           turn("user", "And here?", picture(50, 20, 2))],
    "late system": [turn("user", "{{ x }} {% y %} <b>&amp;"), turn("system", "now"), turn("user", "Ünï 图")],
    "nothing": [],
}


def render(template: str, messages: Chat, add_generation_prompt: bool) -> str:
    """The prompt, rendered as transformers and the servers do."""
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(messages=messages, add_generation_prompt=add_generation_prompt)


def ids_of_prompt(folder: Path, prompt: str) -> list[int]:
    """The ids of a rendered prompt, control tokens read as such."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.encode(prompt, add_special_tokens=False).ids


def unrepeated(ids: list[int], image_id: int) -> list[int]:
    """The ids with one placeholder a picture; Qwen's pictures never touch, for control tokens stand between them."""
    short = []
    for token, run in groupby(ids):
        short += [token] if token == image_id else list(run)
    return short


def our_ids(processor: Processor, messages: Chat, add_generation_prompt: bool) -> list[int]:
    """Our prompt, each picture one placeholder."""
    [row] = processor.rows([messages], {}, add_generation_prompt)
    is_qwen = hasattr(processor, "vision_start_id")
    return unrepeated(row.ids, processor.image_id) if is_qwen else row.ids


# ---- what they render

@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("family", CONFIGS)
def test_template_renders_our_prompt(family: str, name: str, add_generation_prompt: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIGS[family]())
    if family == "mllama":                              # the tiny tokenizer lacks <|image|>, as the id needs none
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens([f"<|unused-{number}|>" for number in range(4)] + ["<|image|>"])
        tokenizer.save(str(folder / "tokenizer.json"))
    processor = load_vlm(folder).processor
    template = (CHAT_TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    prompt = render(template, CHATS[name], add_generation_prompt)
    assert ids_of_prompt(folder, prompt) == our_ids(processor, CHATS[name], add_generation_prompt)


@pytest.mark.parametrize("messages, told", [
    ([turn("tool", "x")], "unknown role tool"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "content must be text"),
])
@pytest.mark.parametrize("family", CONFIGS)
def test_template_refuses_what_we_refuse(family: str, messages: Chat, told: str) -> None:
    template = (CHAT_TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    with pytest.raises(TemplateError, match=told):
        render(template, messages, True)


def test_mllama_template_refuses_pictures_of_a_system() -> None:
    template = (CHAT_TEMPLATES / "mllama.jinja").read_text(encoding="utf-8")
    with pytest.raises(TemplateError, match="a system message cannot hold pictures"):
        render(template, [turn("system", SHOT, "x")], True)


@pytest.mark.parametrize("folder", TINY, ids=[folder.name for folder in TINY])
def test_transformers_speaks_to_the_shipped_folders(folder: Path) -> None:
    """Its apply_chat_template gives the ids of our processor."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    processor = load_vlm(folder).processor
    for name, messages in CHATS.items():
        if not messages:                                # transformers needs a message
            continue
        for add_generation_prompt in (True, False):
            encoded = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
            assert encoded["input_ids"] == our_ids(processor, messages, add_generation_prompt), name


# ---- which template a folder holds

@pytest.mark.parametrize("folder", TINY, ids=[folder.name for folder in TINY])
def test_shipped_folders_hold_the_family_template(folder: Path) -> None:
    assert (folder / NAME).read_bytes() == (CHAT_TEMPLATES / "qwen3_vl.jinja").read_bytes()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_copy_without_a_template_gets_the_family_template(family: str, tmp_path: Path) -> None:
    """It is served by the prompts with which it was trained and measured; the folder itself is left as it is."""
    folder = write_checkpoint(tmp_path / "model", CONFIGS[family]())
    (folder / "tokenizer_config.json").write_text("{}")
    save_vlm(load_vlm(folder), tmp_path / "copy")
    assert (tmp_path / "copy" / NAME).read_bytes() == (CHAT_TEMPLATES / f"{family}.jinja").read_bytes()
    assert not (folder / NAME).exists()


@pytest.mark.parametrize("path, content", [
    ("chat_template.json", json.dumps({"chat_template": "published"})),
    ("chat_template.jinja", "published"),
    ("tokenizer_config.json", json.dumps({"chat_template": "published"})),
])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_folders_own_template_is_kept(family: str, path: str, content: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CONFIGS[family]())
    (folder / path).write_text(content)
    save_vlm(load_vlm(folder), tmp_path / "copy")
    assert {file.name for file in (tmp_path / "copy").iterdir()} == {file.name for file in folder.iterdir()}
    assert (tmp_path / "copy" / path).read_text() == content
