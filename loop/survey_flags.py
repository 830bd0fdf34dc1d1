"""Who is asked about what, and how: the flags of gate.py where it asks models. Nothing here imports torch."""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from tasks import TASKS
from tasks.flags import DTYPES, RequestFlags, check_pixel_range, check_ranges, flag, flag_name
from verifier import VERDICTS

SAMPLING = ("k", "temperature", "top_p")                # flags of how a student is asked for candidates


@dataclass(frozen=True)
class SurveyConfig(RequestFlags):
    """Flags of a survey of models."""
    student: str = flag("", "folder or hub id of the student, or http://HOST:PORT/v1#NAME")
    candidates: list[str] = flag([], "in place of a student: files of its answers, as other harnesses log them")
    verifier: list[str] = flag([], "folders or hub ids of the verifiers, or http://HOST:PORT/v1#NAME")
    task: str = flag("", "name of the task", choices=tuple(TASKS))
    data: str | None = flag(None, "folder or file that holds the task's data; the shapes tasks need none")
    split: str | None = flag(None, "split of the data (default: the task's own)")
    items: int = flag(200, "items to ask about, drawn from those with an answer", low=1)
    sequential: bool = flag(False, "score items until the direction is settled; --items is then the most")
    fixed_items: int = flag(60, "with --sequential: items that all else is measured on", low=1)
    useful_direction: float = flag(0.75, "with --sequential: q below which it is given up", low=0, high=1)
    k: int = flag(8, "candidates an item", low=2)
    temperature: float = flag(1.0, "sampling temperature of the candidates; own answers are greedy", low=1e-6, high=1e6)
    top_p: float = flag(0.9, "nucleus that the candidates are sampled from", low=1e-6, high=1)
    max_new_tokens: int = flag(256, "longest answer", low=1)
    verdict: str = flag("json", "how the verifier scores", choices=tuple(VERDICTS))
    verdict_tokens: int = flag(64, "longest verdict", low=1)
    max_prompt_tokens: int | None = flag(None, "longest prompt (default: what each model has room for)", low=1)
    skip_long: bool = flag(False, "items with longer prompts are not asked about, and count as wrong")
    batch_size: int = flag(16, "prompts prefilled together, items in a file of the cache", low=1)
    seed: int = flag(0, "seed of the choice of items and of the sampling", low=0)
    device: str | None = flag(None, "cpu or cuda (default: cuda where there is one)")
    dtype: str | None = flag(None, "default: bfloat16 on cuda, float32 on cpu", choices=DTYPES)
    eager: bool = flag(True, "on a GPU: decode as written; --no-eager compiles and captures it (has run on no GPU)")
    min_pixels: int | None = flag(None, "enlarge smaller pictures to this area (default: the model's own)", low=1)
    max_pixels: int | None = flag(None, "shrink larger pictures to this area: less memory", low=1)
    cache: str | None = flag(None, "folder of what models answered (default: gate_cache beside the report)")
    feature_cache_gb: ClassVar[float] = 4.0             # memory for image features that a model keeps between calls

    def __post_init__(self) -> None:
        if not (self.verifier and self.task and (self.student or self.candidates)):
            raise ValueError("give --records, or --verifier, --task and --student or --candidates")
        check_ranges(self)
        if self.candidates:
            self.check_nothing_is_sampled()
        if self.sequential and len(self.verifier) > 1:
            raise ValueError("--sequential measures one verifier: several are compared on the same items")
        check_pixel_range(self.min_pixels, self.max_pixels)

    def check_nothing_is_sampled(self) -> None:
        """ValueError where flags say how to sample, though the candidates come from logs."""
        if self.student:
            raise ValueError("--candidates stand in place of a student: give one of --student and --candidates")
        for entry in fields(self):
            if entry.name in SAMPLING and getattr(self, entry.name) != entry.default:
                raise ValueError(f"{flag_name(entry)} says how to sample, and --candidates leave nothing to sample")
