"""The embedded default: the tiny VLM, its draft head, a smaller VLM, and questions, shipped with the package."""

from pathlib import Path

from vispec.cli import UserError
from vispec.files import read_json
from vispec.model.shape import TreeShape

WEIGHTS = Path(__file__).parent / "demo" / "weights"
TARGET, DRAFT = WEIGHTS / "target", WEIGHTS / "draft"
SMALL = WEIGHTS / "small"
"""A smaller VLM with the target's tokenizer, which can draft for it too."""
QUESTIONS = WEIGHTS / "questions"

TREE = TreeShape(16, 7, 2)
"""A tree that pays for a target of this size on a CPU, see docs/measuring.md."""
TREE_NAME = str(TREE)

DTYPE = "float32"
"""Where identity of the outputs holds; the files are bfloat16."""


def require_weights() -> tuple[str, str]:
    """Folders of the shipped target and draft head.

    Raises:
        UserError: they are not there; says how to make them.
    """
    for folder in (TARGET, DRAFT):
        if not (folder / "config.json").is_file():
            raise UserError(f"the embedded weights are missing: no {folder}; `sh vispec/demo/rebuild.sh` makes them")
    return str(TARGET), str(DRAFT)


def questions() -> list[tuple[Path, str]]:
    """Questions about scenes that the pair has not seen: the picture's file and the text.

    Raises:
        UserError: they are not there; says how to make them.
    """
    file = QUESTIONS / "questions.json"
    if not file.is_file():
        made_by = "`python -m vispec.demo.ship_questions` makes them"
        raise UserError(f"the embedded questions are missing: no {file}; {made_by}")
    texts = read_json(file, list)
    return [(QUESTIONS / f"{index}.png", text) for index, text in enumerate(texts)]
