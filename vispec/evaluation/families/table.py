"""docs/models.md: a section for each version of transformers, of which a run writes its own and keeps the others."""

import re

import torch
import transformers
from transformers import AutoModelForImageTextToText

from vispec.cli import one_line
from vispec.evaluation.families.registry import FAMILIES
from vispec.evaluation.families.trial import COLUMNS, NEW_TOKENS, NOT_TRIED, TREE, WORKS, Outcome
from vispec.model.parts import find_decoder
from vispec.model.refusals import refuse_decoder, refuse_layers

COMMAND = "python -m vispec.evaluation.families --out docs/models.md"
HEAD = f"""# Which models?

What decoding does with the classes behind `AutoModelForImageTextToText` of transformers. A family needs no code of its
own as long as its prompt becomes rows of embeddings and its text decoder takes a mask; where it does not, it is refused
with a line that says why.

`{COMMAND}` writes the section of the installed version anew, on tiny models with random weights and prompts built by
hand: no processor and no published weights are used. Evolla and Phi-4-multimodal, which that class does not load, are
handed over as objects.

- {WORKS}: plain decoding and trees ({TREE}: nodes, depth, width) give the model's own greedy `generate()` token for
  token in float32, {NEW_TOKENS} tokens, with prompt lookup and with a draft that knows the answer on changing branches.
  Where layers keep one state of the whole text, chains of that depth do ({TREE.chain}); trees are refused.
- heads: random ViSpec and EAGLE-2 heads, two images. batch: three rows with two images, none and one, padded on the
  left, each answered as alone. video: one, two that touch, and a batch of rows with one, none and another.
- {NOT_TRIED}: not tried here, or the family does not have it.
"""

Row = dict[str, Outcome]


def section(rows: dict[str, Row]) -> str:
    """What the file says of the installed version.

    Args:
        rows: outcomes by family and column.
    """
    refused = {name: reason for name, row in rows.items() if (reason := reason_alone(row))}
    taken = {name: row for name, row in rows.items() if name not in refused}
    more, same, untried = by_default_config(set(rows))
    lines = [_title(), "", f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [table_row(name, row) for name, row in taken.items()]
    lines += ["", "What the tiny models have, and why something is not answered:", ""]
    lines += [f"- {name}: {FAMILIES[name].remark}." for name in taken if FAMILIES[name].remark]
    lines += [note for name, row in taken.items() for note in notes(name, row)]
    lines += ["", "Refused when they are handed over, by the tiny model or by the default config:", ""]
    lines += [f"- {name}: {reason}" for name, reason in sorted({**more, **refused}.items())]
    lines += ["", f"Other names of classes that were tried: {', '.join(same) or 'none'}.", ""]
    return "\n".join([*lines, f"Not tried: {', '.join(untried) or 'none'}.", ""])


def said_of(name: str, row: Row) -> list[str]:
    """The lines that a section has about what came of a family's trial."""
    reason = reason_alone(row)
    return [f"- {name}: {reason}"] if reason else [table_row(name, row), *notes(name, row)]


def table_row(name: str, row: Row) -> str:
    return f"| {name} | {' | '.join(row[column].verdict for column in COLUMNS)} |"


def reason_alone(row: Row) -> str | None:
    """Why a family is not taken at all; None where it is."""
    first = next(iter(row.values()))
    return first.reason if all(outcome == first for outcome in row.values()) and first.reason else None


def notes(name: str, row: Row) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for column, outcome in row.items():
        if outcome.reason:
            by_reason.setdefault(f"{outcome.verdict}: {outcome.reason}", []).append(column)
    return [f"- {name}, {', '.join(columns)}: {reason}" for reason, columns in by_reason.items()]


def by_default_config(rows: set[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Of the families of the installed version without a row of their name: why their default config is refused, whose
    class was tried under another name, and those of which nothing was tried.

    Models are built without memory for their weights.
    """
    classes = AutoModelForImageTextToText._model_mapping
    tried = {FAMILIES[name].model_type for name in rows}
    known = {classes[made] for made in classes if made.model_type in tried}
    others = [made for made in classes if made.model_type not in rows]
    same = sorted(made.model_type for made in others if classes[made] in known and made.model_type not in tried)
    refused, untried = {}, {}
    for made in others:
        name = made.model_type
        if name in same:
            continue
        try:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(made())
        except Exception as error:  # a default config that builds no model says nothing about decoding
            untried[name] = f"{name} (no model of its default config: {one_line(error)})"
            continue
        try:
            decoder = find_decoder(model)
            refuse_layers(model, decoder)
            refuse_decoder(model, decoder, model.get_output_embeddings())
        except ValueError as error:
            refused[name] = one_line(error)
        else:
            untried[name] = name
    return refused, same, sorted(text for name, text in untried.items() if name not in tried)


def section_of(document: str) -> str:
    """What the document says of the installed version; "" where it has no such section."""
    return next((text for text in _sections(document) if text.splitlines()[0] == _title()), "")


def with_section(document: str, text: str) -> str:
    """The document with this text in the place of its version's section; sections in the order of their versions."""
    kept = [old for old in _sections(document) if old.splitlines()[0] != text.splitlines()[0]]
    return "\n".join(part.strip() + "\n" for part in [HEAD, *sorted([*kept, text])])


def _sections(document: str) -> list[str]:
    return re.split(r"^(?=## )", document, flags=re.MULTILINE)[1:]


def _title() -> str:
    return f"## transformers {transformers.__version__}"
