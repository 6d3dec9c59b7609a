"""README and docs against the code: commands, flags, links, tables, and the Python example on the embedded pair."""

import json
import re
from math import prod
from pathlib import Path

import documents
import pytest
import torch
from documents import DOCUMENTS, README, ROOT
from PIL import Image

from vispec import embedded
from vispec.demo.scenes import render, scene_of
from vispec.evaluation.benchmarks import BENCHMARKS
from vispec.evaluation.published import AVERAGE, published
from vispec.ge_data.command import LAST_ROW
from vispec.ge_data.sample_file import make_sample

GOLDEN = Path(__file__).parent / "golden"
PICTURE = ROOT / "figs" / "scene.png"
TRAINING, MEASURING = ROOT / "docs" / "training.md", ROOT / "docs" / "measuring.md"
COMMANDS = [(path, *command) for path in DOCUMENTS for command in documents.commands(path)]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def test_the_python_example_runs(tmp_path, capsys):
    (code,) = documents.blocks(README, "python")
    assert len([line for line in code.splitlines() if line]) <= 10
    target, draft = embedded.require_weights()
    picture = tmp_path / "x.png"
    render(scene_of("eval", 0)).save(picture)
    for shown, local in (
        ("llava-hf/llava-v1.6-vicuna-7b-hf", target),
        ("JLKang/ViSpec-llava-v1.6-vicuna-7b-hf", draft),
        ("figs/scene.png", str(picture)),
    ):
        assert f'"{shown}"' in code
        code = code.replace(f'"{shown}"', repr(local))
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().endswith("</s>")


@pytest.mark.parametrize(
    ("program", "words"), [command[1:] for command in COMMANDS], ids=[f"{c[0].name}-{c[1]}" for c in COMMANDS]
)
def test_a_command_is_understood(program, words):
    """No flag that the program does not have, none abbreviated, none missing, no value of the wrong kind."""
    assert documents.flags_in(words) <= documents.flags_of(program)
    documents.parser_of(program).parse_args(words)


@each_document
def test_flags_and_commands_in_the_text(document):
    known = set().union(*map(documents.flags_of, documents.programs()))
    for code in documents.inline_code(document):
        words = code.split()
        program, words = documents.split_command(words) or (None, words)
        unknown = documents.flags_in(words) - (documents.flags_of(program) if program else known)
        assert not unknown, f"{code}: {unknown}"


@each_document
def test_names_of_modules(document):
    text = document.read_text(encoding="utf-8")
    for name in sorted(set(re.findall(r"\bvispec(?:\.[A-Za-z]\w*)+", text))):
        assert documents.resolves(name), name
    stems = {program.rsplit(".", 1)[-1] for program in documents.programs()}
    assert set(re.findall(r"\b(?:allocation|gen)_\w+(?![\w<*])", text)) <= stems


@each_document
def test_links_and_files(document):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = document.parent / name if name else document
            assert target.exists(), link
            assert not anchor or anchor in documents.anchors(target), link
    # what --figure names is written, and ScienceQA's texts are the user's
    files = re.findall(r"(?<!--figure )(?<![\w/])(?:docs|figs|scripts|tests|vispec)/(?!data/)[\w./-]*", text)
    assert not [file for file in files if not (ROOT / file.rstrip(".")).exists()]


@each_document
def test_make_targets_and_extras(document):
    code = "\n".join([*documents.inline_code(document), *documents.blocks(document, "bash")])
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"^make ([\w-]+)", code, flags=re.MULTILINE)) <= set(targets)
    extras = re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"pip install -e '\.\[(\w+)\]'", code)) <= set(extras)


def test_the_published_pairs():
    rows = documents.table(README, "| `--base-model-path` |")
    targets = json.loads((GOLDEN / "published_chat_templates.json").read_text(encoding="utf-8"))
    assert {base.strip("`") for base, _ in rows} == targets.keys() and len(rows) == len(targets)
    for base, draft in rows:
        assert draft == f"`JLKang/ViSpec-{base.strip('`').split('/')[1]}`"


def test_the_published_numbers():
    rows = documents.table(README, "| target | T |")
    targets = json.loads((GOLDEN / "published_chat_templates.json").read_text(encoding="utf-8"))
    assert len(rows) == 8
    for name, temperature, *cells in rows:
        wanted = name.lower().replace("llava-1.6", "vicuna").replace(" ", "-")
        (target,) = [hub_id for hub_id in targets if wanted in hub_id.lower()]
        numbers = published(target, float(temperature))
        pairs = [numbers[method][AVERAGE] for method in ("medusa", "eagle2", "vispec")]
        assert cells == [f"{speedup:.2f} / {tau:.2f}" for speedup, tau in pairs]


def test_where_the_benchmarks_are():
    rows = documents.table(MEASURING, "| name | `--data-folder`")
    assert [name.strip("`") for name, *_ in rows] == list(BENCHMARKS)
    for name, folder, hub in rows:
        benchmark = BENCHMARKS[name.strip("`")]
        assert folder.startswith(f"`{benchmark.folder}`: ")
        assert (hub not in ("", "images")) == (benchmark.hub is not None)


def test_the_picture_to_ask_about_is_an_unseen_scene():
    with Image.open(PICTURE) as picture:
        assert picture.convert("RGB").tobytes() == render(scene_of("eval", 21)).tobytes()


def test_what_a_full_size_run_costs():
    """Arithmetic from the shapes of the published heads and what a sample file keeps."""
    shapes = json.loads((GOLDEN / "published_draft_shapes.json").read_text(encoding="utf-8"))
    rows = documents.table(TRAINING, "| target | image tokens |")
    assert len(rows) == 5
    for name, *cells in rows:
        image, sample, everything, tokens, trained, memory = (float(c.split()[0].replace(",", "")) for c in cells)
        wanted = name.lower().replace("llava-1.5", "llava-1.6").replace("llava-1.6", "vicuna").replace(" ", "-")
        (found,) = [dict(entry) for key, entry in shapes.items() if wanted in key.lower()]
        vocabulary, width = found.pop("embed_tokens.weight")
        parameters = sum(map(prod, found.values()))
        numbers, rest, ids_alone = stored(int(image), text=600)
        samples = LAST_ROW + 1
        stored_bytes = 2 * numbers * width + rest
        assert sample == round(stored_bytes / 1e6, 1) and everything == round(samples * stored_bytes / 1e12, 2)
        assert tokens == round(samples * ids_alone / 1e9, 1) and trained == round(parameters / 1e6)
        # float32 weights, gradients and two moments; the frozen table in float32 and the output head in bfloat16
        assert memory == round((16 * parameters + 6 * vocabulary * width) / 2**30, 1)


def test_what_passes_a_full_size_run_takes():
    costs = documents.table(TRAINING, "| target | image tokens |")
    images = {name: float(tokens.split()[0].replace(",", "")) for name, tokens, *_ in costs}
    rows = documents.table(TRAINING, "| passes of |")
    assert [name for name, *_ in rows] == list(images)
    prompt, answer, epochs, millions = 100, 500, 20, (LAST_ROW + 1) / 1e6
    for name, *cells in rows:
        text, image = millions * (prompt + answer), millions * (images[name] + prompt + answer)
        wanted = text, millions * (images[name] + prompt), millions * answer, image, epochs * (text + image)
        assert cells == [f"{tokens:,.0f} M" for tokens in wanted]
    assert "2.1 million steps" in TRAINING.read_text(encoding="utf-8") and round(millions * answer / 16, 1) == 2.1


def stored(image: int, text: int) -> tuple[int, int, int]:
    """What a file keeps of `image` image and `text` text tokens: rows of the target's width, bytes beside them, and
    bytes where token ids alone are stored."""
    ids = torch.zeros(image + text, dtype=torch.long)
    mask = torch.zeros(image + text, dtype=torch.bool)
    mask[-text // 2 :] = True
    rows = torch.zeros(image + text, 1)
    sample = make_sample(ids, mask, [(40, 40 + image)], rows, rows)
    numbers = sample.hidden.numel() + sample.image_embeds.numel()
    ids_alone = sample.input_ids.numel() * 4 + sample.loss_mask.numel()
    return numbers, ids_alone + sample.hidden_positions.numel() * 4, ids_alone
