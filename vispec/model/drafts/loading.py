"""Loading a draft for a target, whichever kind its files are of: a draft head, or a whole VLM."""

from collections.abc import Mapping

from safetensors import safe_open

from vispec.files import read_json
from vispec.methods import VLM
from vispec.model.drafts.base import Draft, load_draft
from vispec.model.drafts.checkpoints import check_place, find_draft
from vispec.model.drafts.vlm import VLMDraft
from vispec.model.hub_files import CONFIG, INDEX, SAFETENSORS, find_file
from vispec.model.loading import has_parts, load_target
from vispec.model.target import Target
from vispec.model.target_files import check_safetensors

TOWER = "vis"
"""In the names of vision towers: vision_tower, vision_model, visual, …"""


def find_any_draft(path: str, method: str | None = None, **hub) -> None:
    """Look at a draft's files before minutes of loading.

    Args:
        path, method, hub: see `load_any_draft`.

    Raises:
        ValueError: one of them is missing or wrong.
    """
    if not is_vlm(path, method, **hub):
        find_draft(path, **hub)


def load_any_draft(
    path: str,
    target: Target,
    method: str | None = None,
    num_q: int | None = None,
    draft_vocab: bool = True,
    image_rows: float | None = None,
    target_hub: Mapping | None = None,
    **hub,
) -> Draft:
    """Load a draft in the target's dtype, as a whole on its last device.

    Args:
        path: a folder or a hub id.
        method: of vispec.methods.MODELS; told by the files, and checked against them when given.
        num_q, draft_vocab, hub: see `load_draft`.
        image_rows: of a VLM, see `VLMDraft`; None keeps all.
        target_hub: what tells the hub where the target's tokenizer is.

    Raises:
        ValueError: files are missing or wrong, or the draft does not fit what was asked or the target's tokenizer.
    """
    hub = {name: value for name, value in hub.items() if value is not None}
    base, target_hub = target.model.name_or_path, target_hub or {}
    if is_vlm(path, method, **hub):
        if num_q is not None:
            raise ValueError(f"num_q {num_q} is of a head with a vision adaptor, and {path} is a whole VLM")
        place = None if target.device.type == "cpu" else {"": target.device}
        vlm = VLMDraft(load_target(path, target.dtype, place, **hub), 1.0 if image_rows is None else image_rows)
        vlm.check_tokenizer(base, hub, target_hub)
        return vlm
    if image_rows is not None:
        raise ValueError(f"draft_image_rows is of a smaller VLM as the draft, and {path} is a draft head")
    head = load_draft(path, method, num_q, target.dtype, target.embed_tokens.weight, draft_vocab, **hub)
    if head.draft_vocab is not None:
        head.draft_vocab.check_tokenizer(base, **target_hub)
    return head.to(target.device)


def is_vlm(path: str, method: str | None = None, **hub) -> bool:
    """Whether a draft's files are those of a VLM.

    Raises:
        ValueError: they should be, and are not; or there is no such place.
    """
    check_place(path, **hub)
    if method not in (None, VLM):
        return False
    config = find_file(path, CONFIG, **hub)
    whole = config is not None and has_parts(read_json(config))
    if method == VLM and not whole:
        found = f"no {CONFIG} there" if config is None else f"{CONFIG} is none of a VLM"
        raise ValueError(f"{path}: {found}, and method {VLM!r} takes a whole one")
    return whole and (method == VLM or _sees(path, **hub))


def _sees(path: str, **hub) -> bool:
    """Whether a vision tower is among the weights: a head may have been saved with its target's config."""
    weights = find_file(path, SAFETENSORS, **hub)
    if weights is None:
        return find_file(path, INDEX, **hub) is not None
    check_safetensors(weights)
    with safe_open(weights, framework="pt") as tensors:
        return any(TOWER in name for name in tensors.keys())
