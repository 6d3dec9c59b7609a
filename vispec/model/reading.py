"""Reading a prompt: whole, or on from what it shares with one that has been read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from vispec.model.cache import TreeCache
from vispec.model.families import image_spans
from vispec.model.graphs import angles_by_length
from vispec.model.prefixes import KeptPrompt, digest, given
from vispec.model.prompt import Prompt
from vispec.model.refusals import naming_config
from vispec.model.target import Target

logger = logging.getLogger("vispec")


@torch.no_grad()
def read_prompt(
    target: Target, cache: TreeCache, input_ids: torch.Tensor, inputs: Mapping, layers: Sequence[int] = ()
) -> Prompt:
    """`Target.prefill` of one row, which goes on from a kept prompt where that gives the same."""
    prefixes = target.prefixes
    if prefixes is None:
        return target.prefill(cache, input_ids, inputs, layers)
    ids, source = input_ids[0].cpu(), digest(inputs, layers)
    found = prefixes.find(source, ids)
    if found is not None:
        prompt, text_from = _read_on(target, cache, input_ids, inputs, layers, *found), found[0].text_from
    else:
        prompt = target.prefill(cache, input_ids, inputs, layers)
        text_from = _text_from(target, prompt)
    shows = text_from > 0
    kind = given(inputs), shows
    if kind not in prefixes.reads_on and not torch.equal(other := _other_end(prompt, text_from), prompt.input_ids):
        reason = _why_not(target, cache, prompt, other, inputs)
        prefixes.reads_on[kind] = reason is None
        if reason is not None:
            logger.warning("prompts %s images are read whole: %s", "with" if shows else "without", reason)
    if prefixes.reads_on.get(kind):
        prefixes.keep(KeptPrompt(source, ids, replace(prompt, inputs={}), cache.saved(len(ids)), text_from))
    return prompt


def _read_on(target: Target, cache: TreeCache, input_ids, inputs: Mapping, layers, kept: KeptPrompt, n: int) -> Prompt:
    """Read what follows the first n tokens, which is text."""
    old, rest = kept.prompt, input_ids[:, n:].to(target.device)
    with naming_config(target.model):
        images = image_spans(target.model, input_ids, inputs)  # refuses ids that do not fit the images
    target.refresh()
    cache.restore(kept.keys, n)
    places = torch.arange(n, input_ids.shape[1], device=target.device)[None]
    positions = places if old.rope_delta is None else places + old.rope_delta
    causal = (places[0][:, None] >= places[0])[None]
    states = target.forward(cache, rest, positions, causal, layers)
    cache.commit(torch.full_like(cache.lengths, rest.shape[1]))
    axes = old.positions
    return replace(
        old,
        input_ids=input_ids.to(target.device),
        inputs=target.placed(inputs),
        hidden=torch.cat([old.hidden[:, :n], states.hidden], dim=1),
        embeds=torch.cat([old.embeds[:, :n], target.embed(rest)], dim=1),
        logits=target.logits(states.hidden[:, -1]),
        images=images,
        features=torch.cat([old.features[:, :n], states.features], dim=1),
        positions=None if axes is None else torch.cat([axes[..., :n], positions.expand(len(axes), -1, -1)], dim=-1),
        reused=n,
    )


def _text_from(target: Target, prompt: Prompt) -> int:
    """Tokens up to the last one that is not embedded as text: the end of the last image, video or sound."""
    known = prompt.input_ids < len(target.embed_tokens.weight)  # some families mark images by an id behind the table
    text = (prompt.embeds == target.embed(prompt.input_ids * known)).all(-1) & known
    return int((~text[0] * torch.arange(1, 1 + len(text[0]), device=text.device)).max())


def _other_end(prompt: Prompt, text_from: int) -> torch.Tensor:
    """(1, L) its ids with another text in the second half of what follows the images, where that has two halves."""
    start = (text_from + prompt.input_ids.shape[1] + 1) // 2
    other = prompt.input_ids.clone()
    other[:, start:] = other[:, start - 1]
    return other


def _why_not(target: Target, cache: TreeCache, prompt: Prompt, other: torch.Tensor, inputs: Mapping) -> str | None:
    """What keeps the target from reading on; None where tokens are read alike whatever follows them.

    That is seen by reading `other`, a prompt of another end. Shapes are the same, so most targets give the very same
    features of what stands before it; experts that tokens are routed to round by how many there are.
    """
    if target.recurrent:
        return "some layers keep a state of the text"
    if (reason := angles_by_length(target.decoder)) is not None:
        return reason
    length, same = other.shape[1], int((other == prompt.input_ids).long().cumprod(1).sum())
    keys = cache.saved(length)
    cache.restart()
    ours, theirs = (read.hidden[:, :same].float() for read in (prompt, target.prefill(cache, other, inputs)))
    cache.restore(keys, length)
    alike = (ours - theirs).norm() <= 8 * torch.finfo(target.dtype).eps * ours.norm()
    return None if alike else "what follows a token changes what it is read as"
