"""Small files in the layouts in which people download the benchmarks: the same columns, types and file names.

    python tests/helpers/benchmark_files.py FOLDER      writes FOLDER/mathvista, mmmu, blink and both reward benches

Rows are made up. They hold what the real ones do: null picture structs and pictures whose bytes are null, null and
empty lists, doubles with nulls, a struct with a list inside, several row groups, JPEG bytes under a .png name, a
palette picture, option lists written as text, list answers, hidden answers, doubled ids. Needs pyarrow.
"""
from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from PIL import Image


def picture(k: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded 8 x 8 picture, another for every k."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (k * 37 % 256, k * 91 % 256, 50)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict], schema: object) -> None:
    import pyarrow as pa
    from pyarrow import parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=2, compression="snappy")


def image(k: int | None, kind: str = "PNG", mode: str = "RGB") -> dict | None:
    return None if k is None else {"bytes": picture(k, kind, mode), "path": f"{k}.png"}


MATHVISTA = [
    {"pid": "1", "question": "Which?", "choices": ["9", "12", "18", "18"], "answer": "18", "answer_type": "text"},
    {"pid": "2", "question": "How old?", "unit": "years", "answer": "14", "answer_type": "integer"},
    {"pid": "3", "question": "How long?", "precision": 2.0, "answer": "5.77", "answer_type": "float", "unit": "g"},
    {"pid": "4", "question": "Which years?", "answer": "[2014, 2016]", "answer_type": "list"},
    {"pid": "5", "question": "Which sign?", "choices": ["(c)", "(a)", "(e)", "(d)", "(b)"], "answer": "(b)",
     "answer_type": "text"}]


def mathvista(folder: Path, as_json: bool = False) -> None:
    """testmini as two parquet files, test with its answers hidden; or testmini.json and images/."""
    rows = []
    for k, row in enumerate(MATHVISTA):
        skills = [["arithmetic reasoning", "statistical reasoning"], ["arithmetic reasoning"], []][k % 3]
        meta = {"category": "math-targeted-vqa", "context": "table", "grade": "elementary school", "img_height": 8,
                "img_width": 8, "language": "english", "skills": skills, "source": "Made", "split": "testmini",
                "task": "math word problem"}
        rows.append({"choices": None, "unit": None, "precision": None, "metadata": meta, "image": f"images/{k + 1}.jpg",
                     "question_type": "multi_choice" if row.get("choices") else "free_form",
                     "query": f"Hint: look.\nQuestion: {row['question']}"} | row)
    if as_json:
        (folder / "images").mkdir(parents=True)
        for k, row in enumerate(rows):
            (folder / row["image"]).write_bytes(picture(k, ("PNG", "JPEG", "WEBP")[k % 3]))
        (folder / "data").mkdir()
        content = {row["pid"]: {key: value for key, value in row.items() if key != "pid"} for row in rows}
        (folder / "data" / "testmini.json").write_text(json.dumps(content))
        return
    for k, row in enumerate(rows):
        row["decoded_image"] = image(k, ("PNG", "JPEG", "WEBP")[k % 3], ("RGB", "L")[k % 2])
    rows[3]["decoded_image"] = None
    schema = mathvista_schema()
    write_parquet(folder / "data" / "testmini-00000-of-00002-0123456789abcdef.parquet", rows[:3], schema)
    write_parquet(folder / "data" / "testmini-00001-of-00002-0123456789abcdef.parquet", rows[3:], schema)
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", [{**row, "answer": ""} for row in rows], schema)


def mathvista_schema() -> object:
    import pyarrow as pa
    text = {name: pa.string() for name in ("pid", "question", "image", "unit", "answer", "question_type", "answer_type",
                                           "query")}
    meta = {name: pa.string() for name in ("category", "context", "grade", "language", "source", "split", "task")}
    meta |= {"img_height": pa.int64(), "img_width": pa.int64(), "skills": pa.list_(pa.string())}
    return pa.schema({**text, "decoded_image": image_type(), "choices": pa.list_(pa.string()),
                      "precision": pa.float64(), "metadata": pa.struct(meta)})


def image_type() -> object:
    import pyarrow as pa
    return pa.struct({"bytes": pa.binary(), "path": pa.string()})


MMMU = [
    {"id": "validation_Art_Theory_1", "question": "<image 1> Who made it?", "options": "['Klee', \"O'Keeffe\", 'Miró']",
     "answer": "B", "question_type": "multiple-choice", "image_1": 1},
    {"id": "validation_Art_Theory_2", "question": "Which continues <image 1>?", "options": "['<image 2>', '<image 3>']",
     "answer": "A", "question_type": "multiple-choice", "image_1": 2, "image_2": 3, "image_3": 4},
    {"id": "validation_Math_1", "question": "What is x in <image 1> and <image 1>?", "options": "[]",
     "answer": "['24/7', '3.429']", "question_type": "short-answer", "image_1": 5, "image_2": 6},
    {"id": "validation_Math_2", "question": "How much is it? <image 1>", "options": "[]", "answer": "0.9965",
     "question_type": "open"},
    {"id": "validation_Math_3", "question": "Nine? <image 2> <image 1>", "options": str(list("abcdefghi")),
     "answer": "I", "question_type": "multiple-choice", "image_1": 7, "image_2": 8}]


def mmmu(folder: Path, repack: bool = False) -> None:
    """A folder a subject, validation and test (answers "?"); or one folder for all."""
    import pyarrow as pa
    text = ("id", "question", "options", "explanation", "img_type", "answer", "topic_difficulty", "question_type",
            "subfield")
    pictures = [f"image_{k}" for k in range(1, 8)]
    schema = pa.schema({**{name: pa.string() for name in text}, **{name: image_type() for name in pictures}})
    rows = [{"explanation": "", "img_type": "['Paintings']", "topic_difficulty": "Easy", "subfield": "-"} | row
            | {name: image(row.get(name)) for name in pictures} for row in MMMU]
    rows[3]["image_2"] = {"bytes": None, "path": None}
    hidden = [{**row, "id": row["id"].replace("validation", "test"), "answer": "?"} for row in rows]
    for split, part in (("validation", rows), ("test", hidden)):
        if repack:
            write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", part, schema)
        for subject in () if repack else ("Art_Theory", "Math"):
            chosen = [row for row in part if subject in row["id"]]
            write_parquet(folder / subject / f"{split}-00000-of-00001.parquet", chosen, schema)


BLINK = [("Art_Style", 3, ["the second image", "the third image"], "(B)"), ("Counting", 1, ["0", "3", "2", "1"], "(D)"),
         ("Counting", 1, ["5", "4"], "(A)"), ("Multi-view_Reasoning", 2, ["left", "right"], "(A)")]


def blink(folder: Path) -> None:
    """A folder a subtask, val and test (answers "hidden")."""
    import pyarrow as pa
    pictures = [f"image_{k}" for k in range(1, 5)]
    schema = pa.schema({**{name: pa.string() for name in ("idx", "question", "sub_task", "answer", "prompt")},
                        **{name: image_type() for name in pictures}, "choices": pa.list_(pa.string())})
    rows = []
    for k, (task, images, choices, answer) in enumerate(BLINK):
        options = "".join(f"({letter}) {choice}\n" for letter, choice in zip("ABCD", choices))
        rows.append({"idx": f"val_{task}_{k + 1}", "sub_task": task, "question": "Which?", "choices": choices,
                     "answer": answer, "prompt": f"Which?\nSelect from the following choices.\n{options}"}
                    | {name: image(10 * k + i if i < images else None, mode="P") for i, name in enumerate(pictures)})
    for task in {row["sub_task"] for row in rows}:
        part = [row for row in rows if row["sub_task"] == task]
        hidden = [{**row, "idx": row["idx"].replace("val", "test"), "answer": "hidden"} for row in part]
        write_parquet(folder / task / "val-00000-of-00001.parquet", part, schema)
        write_parquet(folder / task / "test-00000-of-00001.parquet", hidden, schema)


def vl_rewardbench(folder: Path) -> None:
    import pyarrow as pa
    ids = ["RLAIF-V-1", "mathverse_5", "wildvision-2", "hallucination_pair-3", "RLAIF-V-1", "svit-9"]
    rows = [{"id": name, "query": "<image>\nWhat is it?", "response": [f"A dog {k}.", f"A cat {k}."], "image": image(k),
             "human_ranking": [1, 0] if k == 1 else [0, 1], "models": ["a", "b"], "judge": None, "rationale": None,
             "query_source": "made", "ground_truth": None} for k, name in enumerate(ids)]
    schema = pa.schema({**{name: pa.string() for name in ("id", "query", "judge", "rationale", "query_source",
                                                          "ground_truth")}, "image": image_type(),
                        "response": pa.list_(pa.string()), "models": pa.list_(pa.string()),
                        "human_ranking": pa.list_(pa.int64())})
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows, schema)


def mm_rewardbench(folder: Path, repack: bool = False) -> None:
    """all_data.json with its pictures; or the repack, a parquet file."""
    import pyarrow as pa
    kinds = [("pairs_1", "safety"), ("other_1", "safety"), ("math_1", "reasoning"), ("code_1", "reasoning"),
             ("nocaps_1", "open_generation/correctness_task")]
    rows = [{"ID": name, "Text": "What is it?", "Image": f"pictures/{k}.jpg", "Output1": f"A dog {k}.",
             "Output2": f"A cat {k}.", "Better": ("Output1", "Output2")[k % 2], "Category": kind}
            for k, (name, kind) in enumerate(kinds)]
    if repack:
        schema = pa.schema({**{name: pa.string() for name in rows[0]}, "Image": image_type()})
        rows = [{**row, "Image": image(k)} for k, row in enumerate(rows)]
        return write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows, schema)
    (folder / "pictures").mkdir(parents=True)
    for k, row in enumerate(rows):
        (folder / row["Image"]).write_bytes(picture(k, "JPEG"))
    (folder / "all_data.json").write_text(json.dumps(rows))


LAYOUTS = {"mathvista": mathvista, "mmmu": mmmu, "blink": blink, "vl_rewardbench": vl_rewardbench,
           "mm_rewardbench": mm_rewardbench}

if __name__ == "__main__":
    for name, write in LAYOUTS.items():
        write(Path(sys.argv[1]) / name)
