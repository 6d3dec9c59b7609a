"""Flags and arguments that are broken, as kinds of cases: see `tests.fuzz.files`."""

import json
import random
from argparse import ArgumentParser
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch

from tests.fuzz import mutations
from tests.fuzz.files import TEXT_ROWS, text_flags
from tests.fuzz.workshop import DRAFT, EITHER, REFUSED, TARGET, Case, Workshop
from tests.tiny_models import image_prompt
from vispec import SpecModel, generate
from vispec.cli import count, limit, number, whole
from vispec.evaluation import speed
from vispec.ge_data import allocation_llava_shargpt
from vispec.train import config, draft_vocab, main, main_medusa, main_mtp

# --- flags ---


def _commands(shop: Workshop) -> dict[Callable, list[str]]:
    """Commands with arguments that are good."""
    rows = ["--outdir", str(shop.folder / "out"), "--model", str(TARGET), "--data-folder", str(shop.folder / "rows")]
    shop.put("rows/text.json", json.dumps(TEXT_ROWS).encode())
    training = [*shop.training(shop.shared / "samples", shop.folder / "cp"), "--dry-run"]
    return {
        generate.main: text_flags(TARGET),
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
    numbers = action.type in (int, float, count, whole, number, limit)
    right = REFUSED if numbers and value in ("", "x", "\ud83d", "a\0b", "é", "None", "[]", "nan", "%s") else EITHER
    kind = rng.choice(("value", "value", "value", "none", "twice", "unknown"))
    more = {"value": [f"{flag}={value}"], "none": [flag], "twice": [f"{flag}={value}", f"{flag}=1"]}
    extra = more.get(kind, [f"{flag}x", value])
    told = f"{command.__module__} {' '.join(extra)!r:.80}"
    if flag in ("--outdir", "--cpdir", "--figure"):
        extra = [flag]  # they are written to
    return Case(told, lambda: command([*extra, *good] if action.nargs != "+" else [*good, *extra]),
                right if kind == "value" and flag not in good and extra != [flag] else EITHER,
                (flag, flag.lstrip("-").replace("-", "_"), value or "config.json", "1: ", "the prompt has",
                 str(shop.shared)))  # fmt: skip


# --- the interface ---

PROMPT = {"input_ids": [[1, 5, 6, 7, 8, 9]]}
NUMBERS = ("temperature", "top_p", "top_k", "max_new_tokens", "max_length")
OWN = ("repetition_penalty", "num_return_sequences", "min_new_tokens", "num_beams", "do_sample", "seed", "min_p",
       "stop_strings", "eos_token_id", "typical_p", "no_repeat_ngram_size", "generation_config", "logits_processor")


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
        arguments, told = good | {name: odd}, f"{name}={odd!r:.40}"
        names = (name, name.split("_")[-1], "stop", "min_length")
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
        names = (name, "a tree", str(DRAFT), "load it", "no such folder", "neither a folder")
        return Case(f"from_pretrained({name}={odd!r:.40})", call, EITHER, names, api=True)
    else:
        name = rng.choice(("max_tokens", "pixels", "top", "stop", "messages", "none_such"))
        arguments, told, names, right = good | {name: odd}, f"{name}={odd!r:.40}", (name,), REFUSED
    length = {} if {"max_new_tokens", "max_length"} & arguments.keys() else {"max_new_tokens": 3}

    def call() -> None:
        found = getattr(model, method)(**arguments, **length)
        if method == "stream":
            list(found)

    return Case(f"{method}({told})", call, right, names, api=True)
