"""Answer files with numbers that one can compute by hand."""

import json
from pathlib import Path

SETTINGS = {"benchmark": "coco_caption", "temperature": 0.0, "max_new_tokens": 9, "dtype": "float32", "num_choices": 1}


def choice(ids, wall, decode, accepted=None, plain_steps=0) -> dict:
    """Without `accepted`, one of the baseline's; `plain_steps` are those of an arm that drafts, beside its rounds."""
    steps = len(ids) - 1 if accepted is None else len(accepted) + plain_steps
    fields = {"index": 0, "turns": ["x"], "output_ids": [ids], "idxs": [steps - 1], "new_tokens": [len(ids)]}
    fields |= {"wall_time": [wall], "decode_time": [decode]}
    return fields if accepted is None else fields | {"acceptance_length": accepted}


def write(path: Path, answers: dict, provenance: dict | None = None, **settings) -> Path:
    """An answer file of {question: choices} with its settings, and what made it, beside it."""
    lines = [{"question_id": name, "choices": choices} for name, choices in answers.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = {"settings": SETTINGS | settings, "provenance": provenance or {}, "left_out": []}
    path.with_name(path.name + ".meta.json").write_text(json.dumps(meta))
    return path
