"""Logs as lmms-eval 0.7.3 and VLMEvalKit (e8e78f0) write them, on small benchmarks whose rows are made up.

What lmms-eval keeps of a row was checked against files that its own code had written, VLMEvalKit's table against
pandas' to_csv.
"""
from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from benchmark_files import BLINK, MATHVISTA, MMMU
from eval import make_item
from tasks import Item

VL_IDS = ("RLAIF-V-1", "mathverse_5", "wildvision-2", "hallucination_pair-3", "RLAIF-V-1", "svit-99")
VL_ROWS = [{"id": name, "query": "<image>\nWhat is it?", "response": [f"A dog {k}.", f"A cat {'x' * k}."],
            "image": None, "human_ranking": [1, 0] if k == 1 else [0, 1]} for k, name in enumerate(VL_IDS)]
BLINK_ROWS = [{"idx": f"val_{task}_{k}", "sub_task": task, "question": "Which?", "choices": choices, "answer": answer,
               "prompt": "Which?"} for k, (task, _, choices, answer) in enumerate(BLINK, 1)]
MMMU_ROWS = [{name: value for name, value in row.items() if not name.startswith("image_")} for row in MMMU]
MATHVISTA_ROWS = [{"query": f"Hint: look.\nQuestion: {row['question']}", "choices": None, "precision": None,
                   "question_type": "multi_choice" if row.get("choices") else "free_form"} | row for row in MATHVISTA]


def items_of(task: str) -> list[Item]:
    """The items as load_task gives them, without pictures."""
    rows = {"mathvista": MATHVISTA_ROWS, "mmmu": MMMU_ROWS, "blink": BLINK_ROWS}.get(task)
    if rows is not None:
        return [make_item(task, row) for row in rows]
    names = [f"{name}#{k}" if VL_IDS.count(name) > 1 else name for k, name in enumerate(VL_IDS)]
    return [make_item(task, row | {"id": name}) for row, name in zip(VL_ROWS, names)]


# ---- lmms-eval

def lmms_row(doc_id: int, target: Any, said: list[str], metrics: dict, filtered: Any = None,
             tags: bool = False) -> dict:
    """A line. `filtered`: what the filters left, by default the first response; `tags`: --reasoning_tags, the default,
    after which nothing but the filtered responses is known."""
    filtered = said[0] if filtered is None else filtered
    resps = filtered if tags else said
    row = {"doc_id": doc_id, "target": str(target), "resps": resps, "filtered_resps": filtered,
           "token_counts": [{"input_tokens": 9, "output_tokens": len(said[0])}], "doc_hash": "0" * 64,
           **metrics, "input": "the prompt"}
    if resps == filtered or resps == [filtered]:
        del row["resps"]
    return row


def mmmu_metrics(row: dict, parsed: list) -> dict:
    metric = {"id": row["id"], "subdomain": row["id"].split("_")[1], "question_type": row["question_type"],
              "answer": row["answer"], "parsed_pred": parsed}
    return {"mmmu_acc": metric, "mmmu_acc_pass_at_k": metric, "submission": {row["id"]: str(parsed[0])}}


def blink_metrics(row: dict, said: str, parsed: str) -> dict:
    truth = row["answer"].strip("()")
    return {"blink_acc": {"id": row["idx"], "gt_content": truth, "pred_parsed": parsed, "pred": said,
                          "sub_task": row["sub_task"], "is_correct": parsed == truth}}


def mathvista_metrics(row: dict, extraction: str, prediction: str | None) -> dict:
    metric = {"question_id": row["pid"], "query": row["query"], "choices": row["choices"], "answer": row["answer"],
              "extraction": extraction, "prediction": prediction, "true_false": prediction == row["answer"],
              "question_type": row["question_type"], "answer_type": row["answer_type"], "precision": row["precision"],
              "category": "general-vqa", "skills": ["arithmetic reasoning"], "split": "testmini"}
    return {"llm_as_judge_eval": metric, "submission": metric}


def vl_metrics(row: dict, score: float) -> dict:
    return {"vlreward_score": {"question_id": row["id"], "category": "general", "score": score}}


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- VLMEvalKit

def write_table(path: Path, rows: list[dict]) -> Path:
    """As data.to_csv(path, sep="\\t", index=False, quoting=csv.QUOTE_ALL): what is not known is empty."""
    columns = list(rows[0])
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow(["" if row[column] is None else row[column] for column in columns])
    return path


def write_records(path: Path, rows: list[dict]) -> Path:
    """As json.dump(data.to_dict("records")): what is not known is NaN."""
    records = [{name: float("nan") if value is None else value for name, value in row.items()} for row in rows]
    path.write_text(json.dumps(records, indent=4, ensure_ascii=False), encoding="utf-8")
    return path


def kit_mmmu(said: list[str], hits: list[int] | None = None) -> list[dict]:
    """MMMU_DEV_VAL: a row of the dev split, which the task does not hold, and the open questions without options."""
    rows = []
    for k, (row, prediction) in enumerate(zip([{**MMMU_ROWS[0], "id": "dev_Art_Theory_1"}, *MMMU_ROWS], said), 1):
        options = eval(row["options"])
        if hits is not None and not options:
            options = [row["answer"], "Other Answers"]      # as its evaluation leaves them
        cells = dict.fromkeys("ABCDEFGHI") | dict(zip("ABCDEFGHI", options))
        rows.append({"index": k, "id": row["id"], "question": row["question"], **cells, "answer": row["answer"],
                     "split": row["id"].split("_")[0], "category": "Art_Theory", "prediction": prediction})
        if hits is not None:
            rows[-1] |= {"hit": hits[k - 1], "log": "Match Log: B. "}
    return rows


def kit_mathvista(said: list[str], read: list[str] | None = None) -> list[dict]:
    rows = []
    for k, (row, prediction) in enumerate(zip(MATHVISTA_ROWS, said)):
        option = "ABCDEFGH"[row["choices"].index(row["answer"])] if row["choices"] else None
        rows.append({"index": int(row["pid"]), "question": row["query"], "answer": row["answer"],
                     "question_type": row["question_type"], "answer_type": row["answer_type"],
                     "choices": str(row["choices"] or []), "skills": "['arithmetic reasoning']",
                     "task": "math word problem", "category": "math-targeted-vqa", "answer_option": option,
                     "prediction": prediction})
        if read is not None:
            rows[-1] |= {"res": read[k], "log": "Succeed"}
    return rows


def kit_blink(said: list[str], hits: list[int]) -> list[dict]:
    """No id is left of BLINK's: rows are in order within a subtask, which is spelled in another way."""
    rows = []
    for k, (row, prediction) in enumerate(zip(BLINK_ROWS, said)):
        cells = dict.fromkeys("ABCD") | dict(zip("ABCD", row["choices"]))
        rows.append({"index": 100 + k, "question": row["question"], **cells, "answer": row["answer"].strip("()"),
                     "category": row["sub_task"].replace("_", " "), "prediction": prediction, "hit": hits[k],
                     "log": ""})
    return rows


def kit_vl(said: list[str], scores: list[float]) -> list[dict]:
    return [{"index": k, "question": "What is it?", "response": str(row["response"]),
             "answer": str(row["human_ranking"]), "category": "general", "prediction": prediction, "score": score}
            for k, (row, prediction, score) in enumerate(zip(VL_ROWS, said, scores))]
