"""The kinds of input that are broken, the command that reads each, and what is right.

A kind is a function of a `random.Random` and the workshop; it puts files into the workshop's folder and returns the
`Case`. What is known to be broken has to be refused, what is known to be good to be taken; of all else only a
traceback, a refusal without a name and a wait without end are faults.
"""

import contextlib
import io
import json
import random
import shutil
import struct
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from tests.fuzz import mutations
from vispec import SpecModel, generate
from vispec.evaluation import speed
from vispec.evaluation.answers import FORMAT
from vispec.ge_data import allocation_llava_pretrain_gen, allocation_llava_shargpt, allocation_qwen_shargpt
from vispec.ge_data.run_folder import read_manifest
from vispec.ge_data.sample_file import make_sample, write_sample
from vispec.model import loading, spec_model
from vispec.model.drafts.config import SIZES
from vispec.train import config, draft_vocab, main, main_medusa, main_mtp, trainer

GOLDEN = Path(__file__).parents[1] / "golden"
TARGET, QWEN = GOLDEN / "llava_next" / "target", GOLDEN / "qwen2_5_vl" / "target"
DRAFT = GOLDEN / "llava_next" / "draft_vispec"
WIDTH, VOCABULARY = 64, 37
"""Of the recorded pair; the last id stands for an image and is in no text."""
REFUSED, ACCEPTED, EITHER = "refused", "accepted", "either"


@dataclass(frozen=True)
class Case:
    """One input."""

    told: str
    """What is wrong with it."""
    run: Callable[[], object]
    """The command, which returns its exit code; or a call."""
    right: str = EITHER
    names: tuple[str, ...] = ()
    """A refusal has one of them; empty: anything."""
    api: bool = False


class Workshop:
    """A folder for the files of a case, and what all cases share: a loaded target, good files to break."""

    def __init__(self, folder: Path):
        self.folder, self.shared = folder / "case", folder / "shared"
        self._patches = [
            # loading what is not broken takes longer than all else
            mock.patch.object(generate, "load_processor", _remembering(generate.load_processor)),
            mock.patch.object(loading, "load_target", _remembering(loading.load_target)),
            mock.patch.object(spec_model, "load_target", _remembering(spec_model.load_target)),
        ]

    def __enter__(self) -> "Workshop":
        for patch in self._patches:
            patch.start()
        self.model = SpecModel.from_pretrained(str(TARGET), str(DRAFT))
        _write_samples(self.shared / "samples")
        with open("/dev/null", "w") as nowhere, mock.patch("sys.stdout", nowhere), mock.patch("sys.stderr", nowhere):
            # a run that is killed when its second epoch is trained
            with mock.patch.object(trainer, "write_state", side_effect=(None, KeyboardInterrupt)):
                with contextlib.suppress(KeyboardInterrupt):
                    main_mtp.main(self.training(self.shared / "samples", self.shared / "cp"))
        return self

    def __exit__(self, *_) -> None:
        for patch in self._patches:
            patch.stop()

    def empty(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def put(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be a link to a good file
        path.write_bytes(content)
        return path

    def links(self, source: Path, name: str) -> Path:
        """A folder of links to the files of a good one, of which some can be replaced by `put`."""
        folder = self.folder / name
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).symlink_to(file)
        return folder

    def training(self, samples: Path, cpdir: Path, basepath: Path = TARGET) -> list[str]:
        flags = ["--basepath", str(basepath), "--configpath", str(DRAFT / "config.json"), "--num-epochs", "2"]
        return [*flags, "--tmpdir", str(samples), "--cpdir", str(cpdir), "--num-workers", "0"]


def _remembering(load: Callable) -> Callable:
    """A loader that loads a recorded model once."""
    found = {}

    def remembered(path, *args, **kwargs):
        key = f"{path} {args} {kwargs}"
        if not str(path).startswith(str(GOLDEN)):
            return load(path, *args, **kwargs)
        return found[key] if key in found else found.setdefault(key, load(path, *args, **kwargs))

    return remembered


def _write_samples(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for number, images in enumerate(([], [(2, 6)], [(1, 4), (5, 7)])):
        mask = torch.arange(12) > 7
        embeds, hidden = torch.randn(2, 12, WIDTH, generator=generator)
        ids = torch.randint(3, VOCABULARY, (12,), generator=generator)
        write_sample(folder / f"{number:08d}.safetensors", make_sample(ids, mask, images, embeds, hidden, "all"))


def _text(base: Path, *more: str) -> list[str]:
    """Flags of a first token by prompt lookup."""
    flags = ["--base-model-path", str(base), "--method", "lookup", "--max-new-tokens", "1"]
    return [*flags, *more, "what is this?"]


# --- pictures ---


def _saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _odd_dds(rng: random.Random) -> bytes:
    """A DDS file whose pixel format no decoder knows."""
    header = struct.pack("<4I", 124, 0x1007, 4, 4) + bytes(56)
    return b"DDS " + header + struct.pack("<8I", 32, 0x4, rng.randrange(2**32), 0, 0, 0, 0, 0) + bytes(200)


def _broken_pcx(rng: random.Random) -> bytes:
    content = bytearray(_saved(Image.new("P", (20, 10)), "PCX"))
    content[rng.randrange(4, len(content))] ^= 255
    return bytes(content[: rng.randrange(70, len(content))])


def _wide_png() -> bytes:
    """A small file that says it has 10¹⁰ pixels."""
    content = _saved(Image.new("1", (8, 8)), "PNG")
    return content[:16] + struct.pack(">II", 100_000, 100_000) + content[24:]


def pictures(rng: random.Random, shop: Workshop) -> Case:
    size = rng.choice(((60, 40), (60, 40), (1, 1), (300, 1), (1, 300)))
    image = Image.fromarray(np.random.default_rng(rng.randrange(99)).integers(0, 255, (*size, 3), dtype=np.uint8))
    form = rng.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"))
    kind = rng.choice(("bytes", "bytes", "bytes", "note", "mode", "DDS", "PCX", "EPS", "large"))
    if kind == "bytes":
        content, told, broken = mutations.binary_bytes(rng, _saved(image, form))
        told, right = f"{form} {told}", REFUSED if broken else EITHER
    elif kind == "note":
        form = rng.choice(("PNG", "JPEG", "WEBP"))
        note = rng.choice((b"II*\0", b"garbage!", b"", b"MM\0*\0\0\0\x08\0\x01\x01\x12", rng.randbytes(20)))
        content, told, right = _saved(image.resize((60, 40)), form, exif=b"Exif\0\0" + note), f"{form} EXIF", ACCEPTED
    elif kind == "mode":
        mode = rng.choice(("1", "L", "LA", "P", "RGBA", "I;16", "I", "F", "CMYK", "LAB"))
        form = "TIFF" if mode not in ("1", "L", "LA", "P", "RGBA", "I;16") else "PNG"
        image = Image.new(mode, (60, 40), 1 if mode[0] in "1LPIF" and mode not in ("LA", "LAB") else None)
        content, told, right = _saved(image, form), f"{form} {mode}", ACCEPTED
    elif kind == "EPS":
        content, told, right = _saved(image, "EPS"), kind, REFUSED
    else:
        content = {"DDS": lambda: _odd_dds(rng), "PCX": lambda: _broken_pcx(rng), "large": _wide_png}[kind]()
        told, right = kind, REFUSED
    base = rng.choice((TARGET, QWEN))
    path = shop.put("picture.png", content)
    if base == QWEN and right == ACCEPTED and size not in ((60, 40),):
        right = EITHER
    return Case(told, lambda: generate.main(_text(base, "--image", str(path))), right, ("--image", "pictures of"))


# --- draft heads ---


def checkpoints(rng: random.Random, shop: Workshop) -> Case:
    folder, right = shop.links(DRAFT, "draft"), EITHER
    kind = rng.choice(("config", "config", "text", "bytes", "tensors", "tensors", "vocabulary"))
    if kind == "config":
        values, told = mutations.json_value(rng, json.loads((DRAFT / "config.json").read_text()))
        odd = [key for key in SIZES if key in values and (type(values[key]) is not int or values[key] < 1)]
        odd += [key for key in ("rms_norm_eps", "rope_theta") if not _positive(values.get(key, 1))]
        right = REFUSED if odd else EITHER
        shop.put("draft/config.json", mutations.json_bytes(values))
    elif kind == "text":
        content, told, broken = mutations.text_bytes(rng, (DRAFT / "config.json").read_bytes())
        right = REFUSED if broken or content in (b"{}", b"[]", b"null") else EITHER
        shop.put("draft/config.json", content)
    elif kind == "vocabulary":
        ids = torch.tensor(rng.choice(([3, 4, 5], [5, 4], [-1], [10**6], [], [0.5])))
        extra = rng.choice(({}, {"vocab_size": torch.tensor(VOCABULARY)}))
        note = rng.choice(({}, {"vispec": "{"}, {"vispec": "[]"}, {"vispec": "{}"}))
        content = mutations.save({"ids": ids, **extra}, note)
        content, told, _ = mutations.binary_bytes(rng, content) if rng.random() < 0.5 else (content, str(ids), True)
        shop.put("draft/draft_vocab.safetensors", content)
    else:
        weights = (DRAFT / "model.safetensors").read_bytes()
        if kind == "bytes":
            content, told, broken = mutations.binary_bytes(rng, weights)
        else:
            content, told, name = mutations.tensors(rng, weights)
            broken = told != "embed_tokens.weight missing" and "float64" not in told
        right = REFUSED if broken else EITHER
        shop.put("draft/model.safetensors", content)
    told = f"{kind}: {told}"
    return Case(told, lambda: _decode_with(shop.model, folder), right, (str(folder),), api=True)


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _decode_with(model: SpecModel, folder: Path) -> None:
    """A head that is taken must not change a token."""
    taken = SpecModel.from_pretrained(model.target.model, str(folder), total_token=6, depth=2, top_k=2)
    prompt = torch.tensor([[1, 5, 6, 7, 8]])
    answers = [call(prompt, max_new_tokens=6) for call in (taken.specgenerate, taken.baseline_generate)]
    assert torch.equal(*answers), "the head changes the answer"


# --- targets ---

CONFIG_KEYS = (
    ("text_config", "vocab_size", 99), ("text_config", "hidden_act", "none-such"),
    ("text_config", "rope_scaling", {"rope_type": "none-such", "factor": 2.0}), ("text_config", "rope_scaling", "x"),
    ("text_config", "num_attention_heads", 0), ("text_config", "num_hidden_layers", 99),
    ("text_config", "hidden_size", 65), (None, "quantization_config", {"quant_method": "gptq", "bits": 4}),
    (None, "model_type", "none-such"), (None, "model_type", 3), ("vision_config", "hidden_size", -1),
)  # fmt: skip
TEMPLATES = (
    "{{ raise_exception('System role not supported') }}", "{% for m in messages %}{{ 'x' + m['content'] }}{% endfor %}",
    "{% for", "{{ messages[99].role }}", "{{ 1 / 0 }}", "{{ none_such() }}",
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}",
)  # fmt: skip
TEXT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
              "preprocessor_config.json", "processor_config.json", "chat_template.json")  # fmt: skip


def targets(rng: random.Random, shop: Workshop) -> Case:
    folder, right = shop.links(TARGET, "target"), EITHER
    name = rng.choice(TEXT_FILES)
    values = json.loads((TARGET / name).read_text())
    kind = rng.choice(("known", "template", "text", "text", "values", "values", "weights", "index"))
    if kind == "known":
        part, key, value = rng.choice(CONFIG_KEYS)
        values = json.loads((TARGET / "config.json").read_text())
        (values[part] if part else values)[key] = value
        name, content, told, right = "config.json", mutations.json_bytes(values), f"{key} {value}", REFUSED
    elif kind == "template":
        told = rng.choice(TEMPLATES)
        name, content, right = "chat_template.json", mutations.json_bytes({"chat_template": told}), REFUSED
    elif kind == "text":
        content, told, broken = mutations.text_bytes(rng, (TARGET / name).read_bytes())
        right = REFUSED if broken else EITHER
    elif kind == "values":
        values, told = mutations.json_value(rng, values)
        content = mutations.json_bytes(values)
    elif kind == "index":
        (folder / "model.safetensors").unlink()
        index = rng.choice(({}, {"weight_map": {}}, {"weight_map": {"a": "../../x.safetensors"}}, {"weight_map": 3},
                            {"weight_map": {"a": "gone.safetensors"}}, {"weight_map": {"a": 1}}))  # fmt: skip
        name, content, told, right = "model.safetensors.index.json", mutations.json_bytes(index), str(index), REFUSED
    else:
        name = "model.safetensors"
        weights = (TARGET / name).read_bytes()
        if rng.random() < 0.5:
            content, told, broken = mutations.binary_bytes(rng, weights)
        else:
            content, told, tensor = mutations.tensors(rng, weights)
            broken = any(word in told for word in ("missing", "scalar", "empty", "one row", "one dim", "NaN", "infin"))
            broken = broken and "position_ids" not in tensor
        right = REFUSED if broken else EITHER
    shop.put(f"target/{name}", content)
    command = rng.choice(("text", "text", "picture", "training", "config", "data"))
    if command in ("text", "picture"):
        more = ["--image", str(GOLDEN / "llava_next" / "case0.png")] if command == "picture" else []
        run = lambda: generate.main(_text(folder, *more))  # noqa: E731
    elif command == "training":
        flags = shop.training(shop.shared / "samples", shop.folder / "cp", folder)
        run = lambda: main_mtp.main([*flags, "--dry-run"])  # noqa: E731
    elif command == "config":
        run = lambda: config.main([str(folder)])  # noqa: E731
    else:
        shop.put("rows/text.json", json.dumps(TEXT_ROWS).encode())
        run = _data(shop, allocation_qwen_shargpt.main, folder)
    if command in ("training", "config", "data") and right == REFUSED:
        right = EITHER  # each reads a part of the files alone
    return Case(f"{command}, {name}: {told}", run, right, (str(folder), "the target"))


# --- rows of data ---


def _turns(question: str, answer: str = "a dog.") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


TEXT_ROWS = [{"id": "a", "conversations": _turns("what?")}, {"id": "b", "conversations": _turns("why?") * 2}]
IMAGE_ROWS = [{"id": "a", "image": "a.png", "conversations": _turns("<image>\nname it")},
              {"id": "b", "image": "b.png", "conversations": _turns("<image>\nand it")}]  # fmt: skip
BAD_ROWS = (
    None, 3, "x", [], {}, {"messages": [{"role": "user", "content": "x"}]}, {"conversations": []},
    {"conversations": _turns("\ud83d")}, {"conversations": _turns("<image>")}, {"conversations": [None]},
    {"conversations": _turns("<image>"), "image": ["a.png"]}, {"conversations": _turns("<image>"), "image": "../a"},
    {"conversations": _turns("<image>"), "image": "/etc/passwd"}, {"conversations": _turns("<image>"), "image": "a\0"},
    {"conversations": _turns("<image>" * 2), "image": "a.png"}, {"conversations": _turns("<image>"), "image": "gone"},
    {"conversations": _turns("<image> <placeholder>"), "image": "a.png"}, {"conversations": {"from": "human"}},
    {"conversations": _turns("<image>"), "image": "x" * 5000}, {"conversations": _turns(""), "image": "."},
)  # fmt: skip


def _data(shop: Workshop, command: Callable, base: Path) -> Callable:
    """Data generation over all rows; each of them must become a sample or be told, and no malformed one be tried
    again for ever.
    """
    out = shop.folder / "out"
    flags = ["--outdir", str(out), "--model", str(base), "--data-folder", str(shop.folder / "rows")]
    image = command is allocation_llava_pretrain_gen.main
    flags += ["--store", "tokens", *(["--max-new-tokens", "2", "--batch-size", "2"] if image else [])]

    def run() -> int:
        code = command(flags)
        manifest = read_manifest(out)
        counted = [entry["count"] for kind in ("skipped", "failed") for entry in manifest[kind].values()]
        assert manifest["samples"] + sum(counted) == manifest["rows"], "rows that nothing is said of"
        bugs = ("TypeError", "KeyError", "AttributeError", "IndexError", "RecursionError")
        assert not any(reason.startswith(bugs) for reason in manifest["failed"]), list(manifest["failed"])
        return code

    return run


def data(rng: random.Random, shop: Workshop) -> Case:
    image = rng.random() < 0.5
    rows, name = (IMAGE_ROWS, "blip_laion_cc_sbu_558k.json") if image else (TEXT_ROWS, "text.json")
    kind, right = rng.choice(("file", "values", "values", "row", "lines", "note")), EITHER
    content = mutations.json_bytes(rows)
    told = kind
    if kind == "file":
        content, told, broken = mutations.text_bytes(rng, content)
        right = REFUSED if broken or content in (b"{}", b"[]", b"null") else EITHER
    elif kind == "values":
        rows, told = mutations.json_value(rng, rows)
        content = mutations.json_bytes(rows)
    elif kind == "row":
        bad = rng.choice(BAD_ROWS)
        content, told = mutations.json_bytes([bad]), f"{bad!r:.80}"
        right = EITHER if not image and isinstance(bad, dict) and bad.get("conversations") else REFUSED
    elif kind == "lines" and not image:
        lines = [json.dumps(row).encode() for row in rows]
        lines[1], told, broken = mutations.text_bytes(rng, lines[1])
        name, content, right = "text.jsonl", b"\n".join(lines), REFUSED if broken and lines[1].strip() else EITHER
    shop.put(f"rows/{name}", content)
    for picture in ("a.png", "b.png"):
        shop.put(f"rows/{picture}", _saved(Image.new("RGB", (50, 40), "green"), "PNG"))
    if kind == "note":  # a run that is there
        written, told, _ = mutations.text_bytes(rng, b'{"arguments": {}, "target": {"model": "a"}, "complete": true}')
        shop.put("out/manifest.json", written)
    command = rng.choice((allocation_llava_shargpt.main, allocation_qwen_shargpt.main))
    command = allocation_llava_pretrain_gen.main if image else command
    base = QWEN if command is allocation_qwen_shargpt.main else TARGET
    names = (str(shop.folder / "rows"), str(shop.folder / "out"))
    return Case(f"{'image' if image else 'text'} rows, {told}", _data(shop, command, base), right, names)


# --- sample files ---


def samples(rng: random.Random, shop: Workshop) -> Case:
    folder = shop.links(shop.shared / "samples", "samples")
    name = f"{rng.randrange(3):08d}.safetensors"
    content, right = (folder / name).read_bytes(), EITHER
    kind = rng.choice(("tensors", "tensors", "tensors", "bytes", "note", "manifest"))
    command = rng.choice(("plan", "plan", "vocabulary"))
    if kind == "tensors":
        content, told, tensor = mutations.tensors(rng, content)
        # numbers that are not finite are found by training; the rows of a file without images are none
        broken = not any(word in told for word in ("float64", "NaN", "infinite", "int64", "0.5"))
        read = tensor in ("input_ids", "loss_mask", "images") or command == "plan"
        empty = "images" in tensor or tensor == "image_embeds"
        right = REFUSED if broken and read and not empty else EITHER
    elif kind == "bytes":
        content, told, broken = mutations.binary_bytes(rng, content)
        right = REFUSED if broken else EITHER
    elif kind == "note":
        told = rng.choice(("", "{", "[]", "3", "null", '{"image": 3}', "[" * mutations.DEEP, '{"image": null}'))
        content = mutations.save(mutations.load(content), {"vispec": told})
        told = f"note {told:.20}"
    else:
        manifest = {"arguments": {"stage": "text"}, "complete": True,
                    "target": {"model": "a", "revision": "b", "dtype": "float32"}}  # fmt: skip
        written, told, _ = mutations.text_bytes(rng, mutations.json_bytes(manifest))
        if rng.random() < 0.6:
            values, told = mutations.json_value(rng, manifest)
            written = mutations.json_bytes(values)
        shop.put("samples/manifest.json", written)
    shop.put(f"samples/{name}", content)
    if command == "plan":
        train = rng.choice((main.main, main_mtp.main, main_medusa.main))
        run = lambda: train([*shop.training(folder, shop.folder / "cp"), "--dry-run"])  # noqa: E731
    else:
        flags = ["--counts", str(folder), "--size", "20", "--base-model-path", str(TARGET)]
        run = lambda: draft_vocab.main(flags)  # noqa: E731
    return Case(f"{command}, {kind}: {told}", run, right, (str(folder),))


# --- answer files ---

COLUMNS = ("output_ids", "idxs", "wall_time", "decode_time")


def _answers(method: str) -> list[dict]:
    lines = []
    for question in (1, "b"):
        choice = {"index": 0, "turns": ["x"], "output_ids": [[5, 6, 7, 8]], "idxs": [2], "new_tokens": [4],
                  "wall_time": [1.0], "decode_time": [0.75], "captured": "none"}  # fmt: skip
        choice |= {} if method == "baseline" else {"acceptance_length": [1, 0], "idxs": [1]}
        lines.append({"question_id": question, "answer_id": "a", "tstamp": 1.0, "method": method, "choices": [choice]})
    return lines


def answers(rng: random.Random, shop: Workshop) -> Case:
    broken_one, right = rng.choice(("baseline", "vispec")), EITHER
    kind = rng.choice(("line", "line", "line", "file", "settings", "settings file"))
    for method in ("baseline", "vispec"):
        settings = {"benchmark": "gqa", "method": method, "base_model": "t", "temperature": 0.0, "max_new_tokens": 9,
                    "dtype": "float32", "num_choices": 1, "spec_model": "d", "tree": [30, 3, 8]}  # fmt: skip
        meta = {"format": FORMAT, "settings": settings, "left_out": [{"question_id": 9, "reason": "r"}],
                "provenance": {"versions": {"torch": "2"}, "git_revision": "a"}, "resumed": []}  # fmt: skip
        lines = _answers(method)
        beside, content = mutations.json_bytes(meta), b"".join(json.dumps(one).encode() + b"\n" for one in lines)
        if method == broken_one and kind == "line":
            line, told = mutations.json_value(rng, lines[0])
            choice = line["choices"][0] if isinstance(line.get("choices"), list) and line["choices"] else None
            whole = isinstance(choice, dict) and all(isinstance(choice.get(name), list) for name in COLUMNS)
            right = EITHER if whole else REFUSED
            content = json.dumps(line).encode() + b"\n" + json.dumps(lines[1]).encode() + b"\n"
        elif method == broken_one and kind == "settings":
            meta, told = mutations.json_value(rng, meta)
            beside = mutations.json_bytes(meta)
        elif method == broken_one and kind == "file":
            content, told, broken = mutations.text_bytes(rng, content)
            right = REFUSED if broken and "one byte more" not in told else EITHER
        elif method == broken_one:
            beside, told, broken = mutations.text_bytes(rng, beside)
            right = REFUSED if broken else EITHER
        shop.put(f"r/{method}.jsonl", content)
        shop.put(f"r/{method}.jsonl.meta.json", beside)
    folder = shop.folder / "r"
    flags = ["--results", str(folder), "--format", rng.choice(("md", "csv", "json"))]
    if rng.random() < 0.5:
        flags = ["--baseline", str(folder / "baseline.jsonl"), "--spec", str(folder / "vispec.jsonl")]
        flags += ["--json"] if rng.random() < 0.5 else []
    told = f"{flags[0]}, {broken_one}'s {kind}: {told}"
    return Case(told, lambda: speed.main(flags), right, (str(folder),))


# --- states of training ---


def states(rng: random.Random, shop: Workshop) -> Case:
    folder, right = shop.folder / "cp", REFUSED
    shutil.copytree(shop.shared / "cp", folder)
    kind = rng.choice(("bytes", "values", "values", "head", "moments", "metrics.jsonl", "training.json"))
    path = folder / "resume.pt"
    if kind == "bytes":
        content, told, broken = mutations.binary_bytes(rng, path.read_bytes())
        path.write_bytes(content)
        right = REFUSED if broken else EITHER
    elif kind in ("metrics.jsonl", "training.json"):
        content, told, _ = mutations.text_bytes(rng, (folder / kind).read_bytes())
        shop.put(f"cp/{kind}", content)
        right = EITHER
    else:
        state = torch.load(path, weights_only=True)
        if kind == "values":
            key = rng.choice(sorted(state))
            value = rng.choice((*mutations.ODD_VALUES, torch.zeros(3), {"x": torch.zeros(2)}, [[0.0] * 99]))
            told = f"{key}: {value!r:.50}"
            right = EITHER if key in ("format", "epoch", "step_in_epoch", "seconds", "draft_vocab", "moments") else REFUSED
            state[key] = value
        elif kind == "head":
            name = rng.choice(sorted(state["head"]))
            state["head"], told = mutations.tensor(rng, state["head"], name)
        else:
            number, name = rng.choice(sorted(state["moments"])), rng.choice(("step", "exp_avg", "exp_avg_sq"))
            state["moments"][number], told = mutations.tensor(rng, state["moments"][number], name)
            right = EITHER if name == "step" or "in it" in told else REFUSED
        torch.save(state, path)
        told = f"{name} {told}" if kind in ("head", "moments") else told
    flags = shop.training(shop.shared / "samples", folder)
    more = rng.choice(([], ["--dry-run"])) if "." not in kind else []
    return Case(f"{kind}: {told}", lambda: main_mtp.main([*flags, *more]), right, (str(folder), "--cpdir"))


# --- flags ---


def _commands(shop: Workshop) -> dict[Callable, list[str]]:
    """Commands with arguments that are good."""
    rows = ["--outdir", str(shop.folder / "out"), "--model", str(TARGET), "--data-folder", str(shop.folder / "rows")]
    shop.put("rows/text.json", json.dumps(TEXT_ROWS).encode())
    training = [*shop.training(shop.shared / "samples", shop.folder / "cp"), "--dry-run"]
    return {
        generate.main: _text(TARGET),
        speed.main: ["--results", str(shop.folder)],
        main.main: training,
        main_mtp.main: training,
        main_medusa.main: training,
        draft_vocab.main: ["--counts", str(shop.shared / "samples"), "--size", "20", "--base-model-path", str(TARGET)],
        config.main: [str(TARGET)],
        allocation_llava_shargpt.main: [*rows, "--store", "tokens"],
    }


def _parser_of(command: Callable) -> ArgumentParser:
    class Found(Exception):
        pass

    def stop(parser, *_):
        raise Found(parser)

    with mock.patch.object(ArgumentParser, "parse_args", stop):
        try:
            command([])
        except Found as found:
            return found.args[0]


def flags(rng: random.Random, shop: Workshop) -> Case:
    commands = _commands(shop)
    command = rng.choice(list(commands))
    parser, good = _parser_of(command), commands[command]
    # what writes elsewhere than into the case's folder, what reads another program's output
    known = [action for action in parser._actions if action.option_strings and action.dest not in ("help", "worker")]
    if not known:
        return Case("no flag is known", lambda: command([*good, "--none-such"]), REFUSED)
    action = rng.choice(known)
    flag, value = action.option_strings[-1], rng.choice(mutations.ODD_TEXTS)
    numbers = action.type in (int, float) or getattr(action.type, "__name__", "") in ("count", "whole")
    right = REFUSED if numbers and value in ("", "x", "\ud83d", "a\0b", "é", "None", "[]", "nan", "%s") else EITHER
    kind = rng.choice(("value", "value", "value", "none", "twice", "unknown"))
    more = {"value": [f"{flag}={value}"], "none": [flag], "twice": [f"{flag}={value}", f"{flag}=1"]}
    extra = more.get(kind, [f"{flag}x", value])
    told = f"{command.__module__} {' '.join(extra)!r:.80}"
    if flag in ("--outdir", "--cpdir", "--figure"):
        extra = [flag]  # they are written to
    return Case(told, lambda: command([*extra, *good] if action.nargs != "+" else [*good, *extra]),
                right if kind == "value" and flag not in good and extra != [flag] else EITHER,
                (flag, flag.lstrip("-").replace("-", "_"), value or "''", "1: ", str(shop.shared)))  # fmt: skip


# --- the interface ---

PROMPT = {"input_ids": [[1, 5, 6, 7, 8, 9]]}
NUMBERS = ("temperature", "top_p", "top_k", "max_new_tokens", "max_length")
OWN = ("repetition_penalty", "num_return_sequences", "min_new_tokens", "num_beams", "do_sample", "seed", "stop_strings",
       "eos_token_id", "typical_p", "min_p", "no_repeat_ngram_size", "generation_config", "logits_processor")  # fmt: skip


def _odd_tensor(rng: random.Random, good: torch.Tensor) -> tuple[object, str]:
    kinds = {
        "a list": good.tolist(), "numpy": good.numpy(), "uint8": good.to(torch.uint8), "bool": good.bool(),
        "complex": good.to(torch.complex64), "float64": good.double(), "empty": good[..., :0], "a scalar": good.sum(),
        "one dimension less": good[0], "one more": good[None], "all -100": torch.full_like(good, -100),
        "all 10⁶": torch.full_like(good, 10**6), "half of it": good[..., : good.shape[-1] // 2], "on meta":
        good.to("meta"), "NaN": torch.full_like(good.float(), torch.nan), "int32": good.int(), "None": None,
        "text": "x", "twice": torch.cat([good, good]),
    }  # fmt: skip
    told = rng.choice(list(kinds))
    return kinds[told], told


def api(rng: random.Random, shop: Workshop) -> Case:
    model = shop.model
    method = rng.choice(("specgenerate", "baseline_generate", "generate", "generate", "stream"))
    good = {"input_ids": torch.tensor(PROMPT["input_ids"])}
    good["attention_mask"] = torch.ones_like(good["input_ids"])
    odd = rng.choice((*mutations.ODD_VALUES, torch.ones(2), torch.tensor(3), np.float32(0.5), np.int64(2), 1 + 2j))
    odd = 3 if isinstance(odd, int) and not isinstance(odd, bool) and odd > 2**31 else odd  # a huge one is no fault
    kind = rng.choice(("tensor", "tensor", "number", "number", "own", "tree", "loading", "unknown"))
    broken = not isinstance(odd, int | float | np.number) or isinstance(odd, bool) or not np.isfinite(odd)
    if kind == "tensor":
        name = rng.choice(("input_ids", "input_ids", "attention_mask", "pixel_values", "image_sizes"))
        if name in ("pixel_values", "image_sizes"):
            from tests.tiny_models import image_prompt

            good = image_prompt(model.target.model, 0, "a.")
        value, told = _odd_tensor(rng, good[name])
        words = ("a list", "numpy", "complex", "empty", "a scalar", "-100", "NaN", "text")
        broken = told != "all -100" or name != "pixel_values"
        right = REFUSED if broken and name != "image_sizes" and any(word in told for word in words) else EITHER
        arguments, told, names = good | {name: value}, f"{name} {told}", (name, "prompt", "image", "row")
    elif kind == "number":
        name = rng.choice(NUMBERS)
        odd = 3 if odd is None and name == "max_length" else odd  # generate() itself needs one of both lengths
        arguments, told, names = good | {name: odd}, f"{name}={odd!r:.40}", (name, "no room")
        right = REFUSED if broken and not (odd is None and (name == "max_length" or method == "generate")) else EITHER
    elif kind == "own":
        method, name, right = "generate", rng.choice(OWN), EITHER
        arguments, told, names = good | {name: odd}, f"{name}={odd!r:.40}", (name, name.split("_")[-1], "stop")
    elif kind == "tree":
        name, right = rng.choice(("total_token", "depth", "top_k", "tree", "draft", "target")), EITHER
        right = REFUSED if name in ("total_token", "depth", "top_k") and broken else EITHER
        call = lambda: SpecModel(**{"target": model.target.model, name: odd})  # noqa: E731
        return Case(f"SpecModel({name}={odd!r:.40})", call, right, (name, "a tree"), api=True)
    elif kind == "loading":
        name = rng.choice(("method", "num_q", "torch_dtype", "dtype", "tree", "total_token", "spec_model_path",
                           "device_map", "spec_subfolder", "base_model_path"))  # fmt: skip
        paths = {"base_model_path": str(TARGET), "spec_model_path": str(DRAFT)}
        call = lambda: SpecModel.from_pretrained(**paths | {name: odd})  # noqa: E731
        return Case(f"from_pretrained({name}={odd!r:.40})", call, EITHER, (name, "a tree", str(DRAFT), "load it"), api=True)
    else:
        name = rng.choice(("max_tokens", "pixels", "top", "stop", "messages", "none_such"))
        arguments, told, names, right = good | {name: odd}, f"{name}={odd!r:.40}", (name,), REFUSED
    length = {} if {"max_new_tokens", "max_length"} & arguments.keys() else {"max_new_tokens": 3}

    def call() -> None:
        found = getattr(model, method)(**arguments, **length)
        if method == "stream":
            list(found)

    return Case(f"{method}({told})", call, right, names, api=True)


KINDS = {kind.__name__: kind for kind in (pictures, checkpoints, targets, data, samples, answers, states, flags, api)}
"""By name; the number of a case chooses among them in turn."""
