"""Prompts of a family as its processor would return them: text is random, pictures are noise."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from vispec.evaluation.families.family import BREAK, IMAGE, PADDING, TEXT_FROM, VIDEO, Family, Inputs
from vispec.model.families import token_kinds
from vispec.model.inputs import forward_parameters

WORDS = 5
"""Tokens of a piece of text."""


def prompt_of(family: Family, model: PreTrainedModel, layout: str, seed: int) -> Inputs:
    """One prompt.

    Args:
        layout: "." is a few tokens of text, a letter an image by its size, a capital letter a video.
    """
    generator = torch.Generator().manual_seed(seed)
    images = [ord(piece) - ord("a") for piece in layout if piece.islower()]
    videos = [ord(piece) - ord("A") for piece in layout if piece.isupper()]
    shown = [family.images(images) if images else None, family.videos(videos) if videos else None]
    of_images, of_videos = (iter(of.ids if of else ()) for of in shown)
    ids = []
    for piece in layout:
        if piece == ".":
            ids += torch.randint(TEXT_FROM, BREAK, (WORDS,), generator=generator).tolist()
        else:
            ids += next(of_images if piece.islower() else of_videos)
    input_ids = torch.tensor([ids])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs |= {name: torch.isin(input_ids, torch.tensor(marks)).long() for name, marks in family.kinds.items()}
    if "mm_token_type_ids" in forward_parameters(model) and "mm_token_type_ids" not in inputs:
        inputs["mm_token_type_ids"] = token_kinds(model.config, input_ids)
    if family.video_as_image:
        input_ids[input_ids == VIDEO] = IMAGE
    for of in filter(None, shown):
        inputs |= of.inputs(generator)
    return inputs


def batch_of(prompts: list[Inputs], join: Callable[[list[Inputs]], Inputs] | None = None) -> Inputs:
    """What the processor would return for all of these prompts: padded on the left; `join` as in Family."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    per_token = [name for name, value in prompts[0].items() if value.shape == prompts[0]["input_ids"].shape]
    batch = {}
    for name in per_token:
        fill = PADDING if name == "input_ids" else 0
        padded = [F.pad(prompt[name], (longest - prompt[name].shape[1], 0), value=fill) for prompt in prompts]
        batch[name] = torch.cat(padded)
    parts = [{name: value for name, value in prompt.items() if name not in per_token} for prompt in prompts]
    if join is not None and any(parts):
        return {**batch, **join(parts)}
    names = {name: None for part in parts for name in part}
    return {**batch, **{name: torch.cat([part[name] for part in parts if name in part]) for name in names}}
