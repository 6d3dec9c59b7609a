"""Hooks that look into a pass of transformers' own modules.

They sit on modules that all threads share, so whoever sets them holds the model's lock; passes of other threads over
the same modules are none of their business.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

Watched = dict[int, torch.Tensor | None]
"""Takes what goes into some layers of a pass, whose numbers are its keys: the residual stream, before any norm."""


@contextmanager
def watching(layers: nn.ModuleList, watched: Watched) -> Iterator[None]:
    """Let a pass of this thread through stock layers fill `watched`, (B, n, H) each."""
    me = threading.get_ident()

    # a pass of another thread may meet a hook that is half added or half removed, and then gives it no kwargs
    def see(number: int, layer: nn.Module, args: tuple, kwargs: Mapping = MappingProxyType({})) -> None:
        if threading.get_ident() == me:
            watched[number] = args[0] if args else kwargs["hidden_states"]

    with ExitStack() as hooks:
        for number in watched:
            hooks.enter_context(layers[number].register_forward_pre_hook(partial(see, number), with_kwargs=True))
        yield


@contextmanager
def watching_prompt(decoder: nn.Module, embed_tokens: nn.Module, lm_head: nn.Module) -> Iterator[dict]:
    """Record a text decoder's merged embeddings, positions and features in this thread's pass over a prompt.

    Only its last row gets logits.
    """
    seen: dict[str, torch.Tensor | None] = {}
    me = threading.get_ident()

    # see above
    def decoder_inputs(module, args, kwargs=None):
        if threading.get_ident() == me:
            embeds = kwargs["inputs_embeds"]
            # a class that reads no images leaves its decoder to embed the text
            seen["embeds"] = embed_tokens(kwargs["input_ids"]) if embeds is None else embeds
            seen["positions"] = kwargs.get("position_ids")

    def decoder_outputs(module, args, output):
        if threading.get_ident() == me:
            seen["hidden"] = output[0]

    def head_inputs(module, args):
        if threading.get_ident() == me:
            return (args[0][:, -1:], *args[1:])

    with (
        decoder.register_forward_pre_hook(decoder_inputs, with_kwargs=True),
        decoder.register_forward_hook(decoder_outputs),
        lm_head.register_forward_pre_hook(head_inputs),
    ):
        yield seen
