"""What can be wrong with a file: its bytes, the values of its JSON, its tensors.

Each mutation is drawn from a `random.Random`, so that a number repeats it. Those of bytes say besides whether what they
make is surely broken: only then may a reader not take it.
"""

import copy
import json
import random
from collections.abc import Mapping

import torch
from safetensors.torch import load, save

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 623952\n"
DEEP = 100_000
ODD_VALUES = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, -0.0, 0.5, 1e308, float("nan"), float("inf"), -float("inf"),
    "", "x", "0", "1", "é\u2028", "\ud83d", "<image>", "../x", "/etc/passwd", "a\0b", [], [None], [[]], [0], ["x"], {},
    {"": None}, {"x": []},
)  # fmt: skip
ODD_TEXTS = (
    "", "x", "0", "-1", "1", "nan", "inf", "-inf", "1e400", "1_0", "0x10", "²", "٣", "1.5", "9" * 25, "\ud83d", "a\0b",
    "é", "True", "None", "[]", "../x", "nowhere/at/all", "{T}", "%s", "x" * 5000, "30/3/8", "0/0/0", "auto",
)  # fmt: skip
"""Values of flags."""
CONFIGS_OF_OTHERS = (
    {}, {"head_dim": 16}, {"rope_scaling": {"mrope_section": [2, 3, 3]}}, {"rope_parameters": {"rope_theta": 1e4}},
    {"transformer_layer_config": {"head_dim": 16}, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
)  # fmt: skip
"""Configs of draft heads say more where others have made them."""
CONFIG_KEYS = (
    ("text_config", "vocab_size", 99), ("text_config", "hidden_act", "none-such"),
    ("text_config", "rope_scaling", {"rope_type": "none-such", "factor": 2.0}), ("text_config", "rope_scaling", "x"),
    ("text_config", "num_attention_heads", 0), ("text_config", "num_hidden_layers", 99),
    ("text_config", "hidden_size", 65), (None, "quantization_config", {"quant_method": "gptq", "bits": 4}),
    (None, "model_type", "none-such"), (None, "model_type", 3), ("vision_config", "hidden_size", -1),
)  # fmt: skip
"""Of a target's config what no version of transformers knows, or what its weights are not."""
TEMPLATES = (
    "{{ raise_exception('System role not supported') }}", "{% for m in messages %}{{ 'x' + m['content'] }}{% endfor %}",
    "{% for", "{{ messages[99].role }}", "{{ 1 / 0 }}", "{{ none_such() }}",
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}",
)  # fmt: skip
"""Chat templates that refuse, that want strings, and that are none."""


def text_bytes(rng: random.Random, content: bytes) -> tuple[bytes, str, bool]:
    """A file of text or JSON as it should not be: its bytes, what was done, and whether that is surely no JSON."""
    place = rng.randrange(1, max(len(content), 2))
    kinds = {
        "empty": (b"", True),
        "spaces": (b" \n", True),
        "a git-lfs pointer": (LFS, True),
        f"cut after {place} bytes": (content[:place], False),
        "only [": (b"[", True),
        "a BOM before it": (b"\xef\xbb\xbf" + content, False),
        "UTF-16": (content.decode().encode("utf-16"), True),
        "Latin-1": (content.replace(b"a", b"\xe9", 1) if b"a" in content else b"\xe9", True),
        "nested 100,000 deep": (b"[" * DEEP + b"]" * DEEP, True),
        "objects 100,000 deep": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, True),
        "NUL bytes": (bytes(len(content)), True),
        "a long number": (b"9" * 5000, True),
        "one byte more": (content + b"]", True),
        "{}": (b"{}", False),
        "[]": (b"[]", False),
        "null": (b"null", False),
    }
    told = rng.choice(list(kinds))
    return kinds[told][0], told, kinds[told][1]


def binary_bytes(rng: random.Random, content: bytes) -> tuple[bytes, str, bool]:
    """A picture, an archive or a file of weights as it should not be, see `text_bytes`."""
    place = rng.randrange(1, len(content))
    head = rng.randrange(min(len(content), 64))
    kinds = {
        "empty": (b"", True),
        "a git-lfs pointer": (LFS, True),
        "text": (b"<!DOCTYPE html><html>Not found</html>", True),
        "NUL bytes": (bytes(len(content)), True),
        "4 bytes": (content[:4], True),
        f"cut after {place} bytes": (content[:place], False),
        f"byte {head} flipped": (_flipped(content, head, rng), False),
        f"byte {place} flipped": (_flipped(content, place, rng), False),
        "zeros in its second half": (content[: len(content) // 2] + bytes(len(content) - len(content) // 2), False),
        "more behind it": (content + b"more" * 9, False),
    }
    told = rng.choice(list(kinds))
    return kinds[told][0], told, kinds[told][1]


def _flipped(content: bytes, place: int, rng: random.Random) -> bytes:
    return content[:place] + bytes([content[place] ^ rng.randrange(1, 256)]) + content[place + 1 :]


def json_value(rng: random.Random, value, only: tuple = ()) -> tuple[object, str]:
    """A JSON value with one part changed, removed or put into a list; `only` names the keys that are changed."""
    value = copy.deepcopy(value)
    owner, key = rng.choice([place for place in _places(value) if not only or place[1] in only])
    told = f"{key!r}"
    kind = rng.choice(("value", "value", "value", "remove", "list"))
    if kind == "remove":
        del owner[key]
        return value, f"{told} removed"
    owner[key] = rng.choice(ODD_VALUES) if kind == "value" else [owner[key]]
    return value, f"{told}: {owner[key]!r:.60}"


def _places(value) -> list[tuple]:
    """All parts of a JSON value, as (what holds it, its key or index)."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in list(pairs) for place in ((value, key), *_places(part))]


def json_bytes(value) -> bytes:
    return json.dumps(value, indent=1).encode()


def tensors(rng: random.Random, content: bytes) -> tuple[bytes, str, str]:
    """A safetensors file with one tensor changed: its bytes, what was done, and the tensor's name."""
    found = load(content)
    name = rng.choice(sorted(found))
    found, told = tensor(rng, found, name)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__")
    return save({name: value.contiguous() for name, value in found.items()}, metadata), f"{name} {told}", name


def tensor(rng: random.Random, found: Mapping[str, torch.Tensor], name: str) -> tuple[dict, str]:
    """Tensors with the one of that name changed, and what was done; all of it but "float64" is broken."""
    one = found[name]
    number = rng.choice((-1, 2**31 - 1, 10**6)) if not one.is_floating_point() else rng.choice((1e30, 0.5))
    kinds = {
        "missing": None,
        "a scalar": torch.zeros((), dtype=one.dtype),
        "empty": one[:0] if one.dim() else one.new_zeros(0),
        "one row less": one[:-1] if one.dim() else one.new_zeros(2),
        "one dimension more": one[None],
        "uint8": one.to(torch.uint8),
        "int64 for it" if one.is_floating_point() else "float32 for it": one.to(
            torch.int64 if one.is_floating_point() else torch.float32
        ),
    }
    if one.is_floating_point():
        kinds["float64"] = one.double()
        kinds["NaN in it"] = torch.where(torch.arange(one.numel()).view(one.shape) == 0, torch.nan, one)
        kinds["all infinite"] = torch.full_like(one, torch.inf)
    elif one.dtype != torch.bool and one.numel():
        kinds[f"{number} in it"] = torch.where(torch.arange(one.numel()).view(one.shape) == 0, number, one)
    told = rng.choice(list(kinds))
    others = {key: value for key, value in found.items() if key != name}
    return others if kinds[told] is None else {**others, name: kinds[told]}, told
