"""Answer files with numbers that one can compute by hand."""

import json
from pathlib import Path

from vispec.evaluation.answer_file import FORMAT

SETTINGS = {"benchmark": "coco_caption", "temperature": 0.0, "max_new_tokens": 9, "dtype": "float32", "num_choices": 1}


def choice(ids, wall, decode, accepted=None, plain_steps=0) -> dict:
    """Without `accepted`, one of the baseline's; `plain_steps` are those of an arm that drafts, beside its rounds."""
    steps = len(ids) - 1 if accepted is None else len(accepted) + plain_steps
    fields = {"index": 0, "turns": ["x"], "output_ids": [ids], "idxs": [steps - 1], "new_tokens": [len(ids)]}
    fields |= {"wall_time": [wall], "decode_time": [decode]}
    return fields if accepted is None else fields | {"acceptance_length": accepted}


def line(question, *choices) -> dict:
    """The line of a question; without `choices` it has one of the baseline's."""
    return {"question_id": question, "choices": list(choices) or [choice([5], 1.0, 0.0)]}


def write(path: Path, answers: dict, provenance: dict | None = None, **settings) -> Path:
    """An answer file of {question: choices} with its settings, and what made it, beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line(name, *choices)) + "\n" for name, choices in answers.items()))
    meta = {"format": FORMAT, "settings": SETTINGS | settings, "provenance": provenance or {}, "left_out": []}
    path.with_name(path.name + ".meta.json").write_text(json.dumps(meta))
    return path
