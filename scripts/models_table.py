"""The table of docs/models.md: what decoding does with the families of VLMs that this version of transformers has.

    python scripts/models_table.py --out docs/models.md

Every family is tried on tiny random models and prompts built by hand (the tests' own, `tests/layout_models.py` and its
neighbours): greedy answers of both arms must be those of the model's own generate(), token for token. The rows of other
versions in the file stay as they are. A difference ends the command with exit code 1.
"""

import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import decoder_kinds
import layout_models
import pytest
import torch
import transformers
from further_layouts import FURTHER
from oracle import oracle
from test_batches import batch_of, prompts_of
from test_refused_targets import tiny_mllama
from tiny_models import FAMILIES, generate, image_prompt, random_head, random_target
from transformers import PreTrainedModel
from video_models import VIDEO_FAMILIES, video_prompt, video_target

from vispec import SpecModel
from vispec.cli import Parser, one_line, run_cli
from vispec.files import write_atomic
from vispec.model.drafts import PromptLookup
from vispec.model.refusals import refuse_decoder, refuse_layers
from vispec.model.target import find_decoder
from vispec.model.windows import KINDS

ROOT = Path(__file__).resolve().parent.parent
CASES = {"text": ".", "one image": ".a.", "two images": ".a.b.", "touching": ".ab."}
COLUMNS = (*CASES, "draft heads", "batch", "video")
WORKS, UNTRIED = "yes", "–"
NEW, TREE = 24, "12/3/4"

Prompt = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """How a family is built, and how its prompts are laid out: "." is text, a letter an image, a capital a video."""

    build: Callable[[], PreTrainedModel]
    prompt: Callable[[PreTrainedModel, str], Prompt] | None = None
    """None: only whether it is refused can be tried."""
    batch: Callable[[PreTrainedModel], tuple[list[Prompt], Prompt]] | None = None
    """Single prompts, and the batch of them."""
    video: bool = False


def families() -> dict[str, Family]:
    """By the name that their row gets."""
    found = {}
    for name in FAMILIES:
        prompt = lambda target, layout: image_prompt(target, 1, layout)  # noqa: E731
        found[name] = Family(lambda name=name: random_target(name, 1), prompt, _plain_batch)
    for name, known in (layout_models.LAYOUTS | FURTHER).items():
        found[name] = Family(
            lambda known=known: layout_models.layout_model(known),
            lambda _, layout, known=known: layout_models.layout_prompt(known, 1, layout),
            lambda _, known=known: _layout_batch(known),
        )
    for name in VIDEO_FAMILIES:
        prompt = lambda target, layout: video_prompt(target, 1, layout)  # noqa: E731
        found[name] = Family(lambda name=name: video_target(name, 1), prompt, _video_batch, video=True)
    kinds = decoder_kinds.WINDOWS | decoder_kinds.SCALES | decoder_kinds.LATENT
    for kind in kinds:
        build = lambda kind=kind: decoder_kinds.target_over(kind, 0)  # noqa: E731
        found[f"llava over {kind}"] = Family(build, _square_prompt, _square_batch)
    found["paligemma"] = Family(lambda: decoder_kinds.paligemma(0, "gemma"), _square_prompt, _square_batch)
    found["paligemma2"] = Family(lambda: decoder_kinds.paligemma(0, "gemma2"), _square_prompt, _square_batch)
    found["gemma3"] = Family(lambda: decoder_kinds.gemma3(0), _square_prompt, _square_batch)
    found["mllama"] = Family(tiny_mllama)
    return found


def row(name: str, family: Family) -> list[str] | None:
    """The cells of a family's row; None where this version of transformers does not have it."""
    try:
        target = family.build()
    except pytest.skip.Exception:
        return None
    try:
        SpecModel(target)
    except ValueError as error:
        return [name, f"refused: {one_line(error)}", *[""] * (len(COLUMNS) - 1)]
    cells = []
    for column in COLUMNS:
        try:
            cells.append(_cell(target, family, column))
        except Exception as error:  # whatever goes wrong is what the table is to say
            cells.append(f"refused: {one_line(error)}" if isinstance(error, ValueError) else f"error: {error!r}")
    return [name, *cells]


def _cell(target: PreTrainedModel, family: Family, column: str) -> str:
    if family.prompt is None:
        return UNTRIED
    if column in CASES:
        layout = CASES[column]
        return _compare(target, [family.prompt(target, layout)])
    if column == "draft heads":
        inputs = family.prompt(target, CASES["two images"])
        expected = generate(target, inputs, max_new_tokens=NEW)
        for method in ("vispec", "eagle2"):
            model = SpecModel(target, random_head(target, method, 3), tree=TREE)
            _require(torch.equal(model.specgenerate(**inputs, max_new_tokens=NEW), expected), method)
        return WORKS
    if column == "batch":
        prompts, batch = family.batch(target)
        expected = [generate(target, inputs, max_new_tokens=NEW)[0, -NEW:] for inputs in prompts]
        out = SpecModel(target, PromptLookup(), tree=TREE).specgenerate(**batch, max_new_tokens=NEW)
        _require(torch.equal(out[:, -NEW:], torch.stack(expected)), "a row of a batch")
        return WORKS
    if not family.video:
        return UNTRIED
    return _compare(target, [family.prompt(target, layout) for layout in (".A.", ".a.A.")])


def _compare(target: PreTrainedModel, prompts: list[Prompt]) -> str:
    """Both arms, by a draft that is often wrong and by one that is right on changing branches."""
    vocabulary = target.get_input_embeddings().weight.shape[0]
    for inputs in prompts:
        expected = generate(target, inputs, max_new_tokens=NEW)
        model = SpecModel(target, PromptLookup(), tree=TREE)
        _require(torch.equal(model.baseline_generate(**inputs, max_new_tokens=NEW), expected), "plain decoding")
        _require(torch.equal(model.specgenerate(**inputs, max_new_tokens=NEW), expected), "prompt lookup")
        with pytest.MonkeyPatch.context() as patch:
            model = SpecModel(target, oracle(patch, list(expected), vocabulary), tree=TREE)
            _require(torch.equal(model.specgenerate(**inputs, max_new_tokens=NEW), expected), "a knowing draft")
    return WORKS


def _require(same: bool, what: str) -> None:
    if not same:
        raise AssertionError(f"other tokens than generate() by {what}")


def _plain_batch(target: PreTrainedModel) -> tuple[list[Prompt], Prompt]:
    return prompts_of(target), batch_of(prompts_of(target))


def _video_batch(target: PreTrainedModel) -> tuple[list[Prompt], Prompt]:
    prompts = [video_prompt(target, seed, layout) for seed, layout in enumerate((".a.b.", "..", ".a."))]
    return prompts, batch_of(prompts)


def _layout_batch(layout: layout_models.Layout) -> tuple[list[Prompt], Prompt]:
    pieces = enumerate((".a.b.", "..", ".a."))
    prompts = [layout_models.layout_prompt(layout, seed, shown) for seed, shown in pieces]
    return prompts, layout_models.layout_batch(layout, prompts, 0)


def _square_prompt(target: PreTrainedModel, layout: str) -> Prompt:
    """For `decoder_kinds`, whose images all have the same few tokens."""
    inputs = decoder_kinds.prompt(target, 40, 1, images=0)
    count, start = sum(piece != "." for piece in layout), 3
    for piece in layout:
        if piece != ".":
            inputs["input_ids"][:, start : start + decoder_kinds.PATCHES] = decoder_kinds.IMAGE
        start += 3 if piece == "." else decoder_kinds.PATCHES
    if count:
        inputs["pixel_values"] = torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    if "token_type_ids" in inputs and type(target).__name__.startswith("Gemma3"):
        inputs["token_type_ids"] = (inputs["input_ids"] == decoder_kinds.IMAGE).long()
    return inputs


def _square_batch(target: PreTrainedModel) -> tuple[list[Prompt], Prompt]:
    sizes = ((26, 2), (9, 0), (17, 1))
    prompts = [decoder_kinds.prompt(target, length, seed, images) for seed, (length, images) in enumerate(sizes)]
    return prompts, decoder_kinds.batch_of(prompts)


def others(tried: set[str]) -> tuple[list[list[str]], list[str]]:
    """Of the other classes behind AutoModelForImageTextToText: those refused by their default config, and the rest."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    refused, untried = [], []
    for name in sorted(NAMES.keys() - tried):
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForImageTextToText.from_config(transformers.CONFIG_MAPPING[name]())
        except Exception:  # a default config that builds no model tells nothing
            untried.append(name)
            continue
        try:
            decoder = find_decoder(model)
            refuse_layers(model, KINDS)
            refuse_decoder(model, decoder, model.get_output_embeddings())
            untried.append(name)
        except ValueError as error:
            refused.append([name, one_line(error)])
    return refused, untried


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def section(rows: list[list[str]], refused: list[list[str]], untried: list[str]) -> str:
    """What the file says of this version."""
    lines = [f"## transformers {transformers.__version__}", "", f"| family | {' | '.join(COLUMNS)} |"]
    lines += ["|---" * (len(COLUMNS) + 1) + "|", *map(line, rows)]
    lines += ["", "Refused when they are handed over, by their default config:", ""]
    lines += [f"- {name}: {reason}" for name, reason in refused]
    return "\n".join([*lines, "", f"Not tried: {', '.join(untried)}.", ""])


def with_section(document: str, text: str) -> str:
    """The document with a version's section in its place, or behind the others."""
    title = text.splitlines()[0]
    before, found, rest = document.partition(f"{title}\n")
    if not found:
        return f"{document.rstrip()}\n\n{text}"
    after = re.search(r"^## ", rest, re.MULTILINE)
    return before + text + ("\n" + rest[after.start() :] if after else "")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python scripts/models_table.py", description="What decoding does with families of VLMs.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "models.md", help="(default: docs/models.md)")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    rows = []
    for name, family in families().items():
        cells = row(name, family)
        if cells is not None:
            rows.append(cells)
            print(line(cells), flush=True)
    text = section(rows, *others({name for name, *_ in rows}))
    document = with_section(args.out.read_text(encoding="utf-8"), text)
    write_atomic(args.out, lambda file: file.write(document.encode()))
    return 1 if any(cell.startswith("error") for cells in rows for cell in cells) else 0


if __name__ == "__main__":
    run_cli(main)
