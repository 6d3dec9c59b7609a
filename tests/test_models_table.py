"""docs/models.md says what decoding does: some rows under transformers 4, all of them under transformers 5."""

import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import models_table

ROOT = Path(__file__).resolve().parent.parent

REPRESENTATIVE = ("llava_onevision", "smolvlm", "mistral3", "gemma3", "mllama")
NAMES = REPRESENTATIVE if transformers.__version__ < "5" else tuple(models_table.families())
TITLE = f"## transformers {transformers.__version__}\n"


@pytest.mark.parametrize("name", NAMES)
def test_the_row_of_a_family(name):
    _, found, section = (ROOT / "docs" / "models.md").read_text().partition(TITLE)
    if not found:
        pytest.skip(f"the table does not tell of transformers {transformers.__version__}")
    cells = models_table.row(name, models_table.families()[name])
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith(f"| {name} |")]
    assert rows == ([] if cells is None else [models_table.line(cells)])


def test_sections_are_replaced_in_place():
    document = "# Title\n\nText.\n\n## transformers 1\n\nold\n\n## transformers 2\n\nkept\n"
    found = models_table.with_section(document, "## transformers 1\n\nnew\n")
    assert found == document.replace("old", "new")
    first = "## transformers 3\n\nnew\n"
    assert models_table.with_section("# Title\n", first) == f"# Title\n\n{first}"
