"""The embedded default: the tiny VLM and its draft head that are shipped with the package."""

from pathlib import Path

from vispec.cli import UserError

WEIGHTS = Path(__file__).parent / "demo" / "weights"
TARGET, DRAFT = WEIGHTS / "target", WEIGHTS / "draft"

TREE = {"total_token": 16, "depth": 7, "top_k": 2}
"""A tree that pays for a target of this size on a CPU, see docs/measuring.md."""
TREE_NAME = "/".join(map(str, TREE.values()))

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
