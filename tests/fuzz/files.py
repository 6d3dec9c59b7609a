"""Files that are broken, the command that reads each, and what is right.

A kind is a function of a `random.Random` and the workshop; it puts files into the workshop's folder and returns the
`Case`. What is known to be broken has to be refused, what is known to be good to be taken; of all else only a
traceback, a refusal without a name and a wait without end are faults.
"""

import io
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.answer_files import choice, write
from tests.fuzz import mutations
from tests.fuzz.workshop import ACCEPTED, DRAFT, EITHER, GOLDEN, QWEN, REFUSED, TARGET, VOCABULARY, Case, Workshop
from vispec import SpecModel, generate
from vispec.evaluation import speed
from vispec.evaluation.answer_file import meta_path
from vispec.ge_data import allocation_llava_pretrain_gen, allocation_llava_shargpt, allocation_qwen_shargpt
from vispec.ge_data.run_folder import read_manifest
from vispec.model.drafts.config import SIZES
from vispec.train import config, draft_vocab, main, main_medusa, main_mtp


def text_flags(base: Path, *more: str) -> list[str]:
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


def _wide_png(_: random.Random) -> bytes:
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
    else:
        makers = {"DDS": _odd_dds, "PCX": _broken_pcx, "large": _wide_png, "EPS": lambda _: _saved(image, "EPS")}
        content, told, right = makers[kind](rng), kind, REFUSED
    base = rng.choice((TARGET, QWEN))
    path = shop.put("picture.png", content)
    return Case(told, lambda: generate.main(text_flags(base, "--image", str(path))), right, ("--image", "pictures of"))


# --- draft heads ---


def checkpoints(rng: random.Random, shop: Workshop) -> Case:
    folder, right = shop.links(DRAFT, "draft"), EITHER
    kind = rng.choice(("config", "config", "text", "bytes", "tensors", "tensors", "vocabulary"))
    if kind == "config":
        values = json.loads((DRAFT / "config.json").read_text()) | rng.choice(mutations.CONFIGS_OF_OTHERS)
        values, told = mutations.json_value(rng, values)
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
            # a head may leave the table to the target, be of another dtype, and have fewer queries
            broken = told not in ("embed_tokens.weight missing", "imadpt.q one row less") and "float64" not in told
        right = REFUSED if broken else EITHER
        shop.put("draft/model.safetensors", content)
    return Case(f"{kind}: {told}", lambda: _decode_with(shop.model, folder), right, (str(folder),), api=True)


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _decode_with(model: SpecModel, folder: Path) -> None:
    """A head that is taken must not change a token."""
    taken = SpecModel.from_pretrained(model.target.model, str(folder), total_token=6, depth=2, top_k=2)
    prompt = torch.tensor([[1, 5, 6, 7, 8]])
    answers = [call(prompt, max_new_tokens=6) for call in (taken.specgenerate, taken.baseline_generate)]
    assert torch.equal(*answers), "the head changes the answer"


# --- targets ---

TEXT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
              "preprocessor_config.json", "processor_config.json", "chat_template.json")  # fmt: skip


def targets(rng: random.Random, shop: Workshop) -> Case:
    folder, right = shop.links(TARGET, "target"), EITHER
    name = rng.choice(TEXT_FILES)
    values = json.loads((TARGET / name).read_text())
    kind = rng.choice(("known", "template", "text", "text", "values", "values", "weights", "index"))
    if kind == "known":
        part, key, value = rng.choice(mutations.CONFIG_KEYS)
        values = json.loads((TARGET / "config.json").read_text())
        (values[part] if part else values)[key] = value
        name, content, told, right = "config.json", mutations.json_bytes(values), f"{key} {value}", REFUSED
    elif kind == "template":
        told = rng.choice(mutations.TEMPLATES)
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
        run = lambda: generate.main(text_flags(folder, *more))  # noqa: E731
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
    return Case(f"{command}, {name}: {told}", run, right, (str(folder), "the target", "the prompt"))


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
        manifest = {"arguments": {"stage": "text", "model": str(TARGET)}, "complete": True,
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
        flags = ["--counts", str(folder), "--size", "20"]
        flags += [] if kind == "manifest" else ["--base-model-path", str(TARGET)]
        run = lambda: draft_vocab.main(flags)  # noqa: E731
    return Case(f"{command}, {kind}: {told}", run, right, (str(folder), "--base-model-path"))


# --- answer files ---

COLUMNS = ("output_ids", "idxs", "wall_time", "decode_time")


def answers(rng: random.Random, shop: Workshop) -> Case:
    broken_one, right = rng.choice(("baseline", "vispec")), EITHER
    kind = rng.choice(("line", "line", "line", "file", "settings", "settings file"))
    for method in ("baseline", "vispec"):
        accepted = None if method == "baseline" else [1, 0]
        choices = {question: [choice([5, 6, 7, 8], 1.0, 0.75, accepted)] for question in (1, "b")}
        made_by = {"versions": {"torch": "2"}, "git_revision": "a"}
        path = write(shop.folder / "r" / f"{method}.jsonl", choices, made_by, method=method, base_model="t")
        content, beside = path.read_bytes(), meta_path(path).read_bytes()
        lines, meta = [json.loads(line) for line in content.splitlines()], json.loads(beside)
        meta["left_out"] = [{"question_id": 9, "reason": "r"}]
        if method == broken_one and kind == "line":
            line, told = mutations.json_value(rng, lines[0])
            found = line["choices"][0] if isinstance(line.get("choices"), list) and line["choices"] else None
            whole = isinstance(found, dict) and all(isinstance(found.get(name), list) for name in COLUMNS)
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
        path.write_bytes(content)
        meta_path(path).write_bytes(beside)
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
            right = REFUSED if key in ("identity", "sums", "head") else EITHER
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
