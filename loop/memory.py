"""Running out of memory, on a GPU or not: one sentence, with the flags that help.

As a program (`python -m loop.memory`) it says how much memory a run will take: memory_table.py.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")      # CUDA's, the CPU allocator's, cuBLAS's


@contextmanager
def enough_memory(cfg: Any) -> Iterator[None]:
    """Around a program's work: where memory runs out, a MemoryError names those flags of `cfg` that help.

    torch has no one class for this: an OutOfMemoryError is a RuntimeError, and so is what its CPU allocator raises. Any
    other RuntimeError is left as it is.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not any(words in text for words in NO_MEMORY):
            raise
        place = "GPU memory" if "CUDA" in text or "CUBLAS" in text else "memory"
        size = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
        asked = f" (tried to allocate {size[1]})" if size else ""
        raise MemoryError(f"out of {place}{asked}; what helps: {', '.join(helpful_flags(vars(cfg)))}") from None


def helpful_flags(values: dict[str, Any]) -> list[str]:
    """What would take less memory, of the flags that a program has (name -> value)."""
    # Where a batch is cut into passes of so many tokens, its size costs no memory.
    sizes = ("micro_tokens", "sample_batch") if "micro_tokens" in values else ("batch_size",)
    advice = []
    for name in sizes:
        if values.get(name, 1) > 1:
            advice.append(f"a smaller --{name.replace('_', '-')} (it is {values[name]})")

    advice.append("a smaller --max-pixels")
    if values.get("feature_cache_gb"):
        advice.append("a smaller --feature-cache-gb")
    if values.get("shard") is False and not values.get("lora_rank"):
        advice.append("--shard under torchrun")
    if values.get("recompute") is False:
        advice.append("--recompute")
    if values.get("lora_rank") == 0 and values.get("trainable") != "all":
        advice.append("--lora-rank")
    if values.get("dtype") == "float32":
        advice.append("--dtype bfloat16")
    return advice


if __name__ == "__main__":
    from loop.memory_table import cli
    from tasks.endings import exit_with
    exit_with(cli)
