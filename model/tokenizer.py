"""tokenizer.json: opened so that texts are encoded whole, tried once, and its control tokens made special."""
from __future__ import annotations

from pathlib import Path
from types import TracebackType

from tokenizers import Tokenizer

from .settings import read_settings

# Words, other scripts, signs of two code points, blanks, digits, a control token spelled out, what no text should hold.
TRIAL = "Hello wörld, \u6f22\u5b57 \U0001f600 a\u0301 \t\n\n  1,234.5 <|im_end|> \x00\x7f\ufffd"


class TokenizerErrors:
    """Around calls of the tokenizers library: what it raises becomes a ValueError that names the file.

    The library has no classes of errors: it raises `Exception` itself, and where it did not foresee a file a
    PanicException, which is no Exception. No other error is touched.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is Exception or (kind is not None and kind.__name__ == "PanicException"):
            reason = (str(error).splitlines() or ["it gives no reason"])[0]
            raise ValueError(f"{self.path} is no tokenizer that can be used: {reason[:200]}") from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of `folder`, set to encode every text whole and special tokens inside it as plain text.

    Training tools leave their own truncation, padding and merge dropout in the file. These were meant for their
    batches: here they would cut or fill up each piece of a prompt. The file itself is left as it is. ValueError for a
    file that cannot be used; one that fails only when it is used is tried here.
    """
    path = Path(folder) / "tokenizer.json"
    read_settings(folder, path.name)["model"]           # a clear error if it is absent, cut short or something else
    if (Path(folder) / "tokenizer_config.json").exists():
        read_settings(folder, "tokenizer_config.json")  # likewise, and now: it is read when the model is saved

    with TokenizerErrors(path):
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        tokenizer.encode_special_tokens = True

        tokenizer.encode(TRIAL, add_special_tokens=False)
        ids = list(tokenizer.get_vocab().values())
        tokenizer.decode(ids, skip_special_tokens=True)
    if not ids:
        raise ValueError(f"{path} holds no token")
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a control token; its absence is a ValueError."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"tokenizer.json lacks the control token {token}: it is not this family's")
    return number


def mark_special(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Make sure that the tokenizer takes these control tokens for special ones.

    Some tools save them as ordinary added tokens. A text that spells one would then hold it, and answers would show it.
    """
    added = tokenizer.get_added_tokens_decoder()
    for number in ids:
        if number in added and not added[number].special:
            token = added[number]
            token.special = True
            tokenizer.add_special_tokens([token])
