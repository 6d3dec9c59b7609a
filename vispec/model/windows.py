"""Layers that see a part of the text: the newest tokens (a sliding window), or those of the same chunk.

What a tree's token sees in such a layer is decided by places in the text, not by slots of the cache: the nodes of a
tree lie side by side there. transformers' own masks count slots, so these layers' attention modules are given ours.

B rows, n tokens of a pass, m visible slots.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from vispec.model.cache import TreeCache

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
KINDS = frozenset((FULL, SLIDING, CHUNKED))
"""Of layers, as configs name them."""

READS_LAYER_TYPES = find_spec("transformers.masking_utils") is not None
"""Older transformers keep a config's `layer_types` without a look at it."""


class Window(NamedTuple):
    kind: str
    size: int

    def hides(self, seeing: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Whether the tokens at the places `seeing` must not see those at the places `seen`."""
        if self.kind == CHUNKED:
            return seeing // self.size != seen // self.size
        return seeing - seen >= self.size


class Windows:
    """Those of a text decoder.

    Args:
        model: the target.
        decoder: its text decoder.

    Raises:
        ValueError: a layer has a window that cannot be set, or whose size is not known.
    """

    def __init__(self, model: PreTrainedModel, decoder: nn.Module):
        windows = _layer_windows(model, decoder)
        self._attentions = [
            (window, getattr(layer, "self_attn", None))
            for window, layer in zip(windows, decoder.layers, strict=False)
            if window is not None
        ]
        if any(attention is None for _, attention in self._attentions):
            raise ValueError(f"{type(model).__name__} has layers with windows and without self_attn: not known here")

    def __bool__(self) -> bool:
        return bool(self._attentions)

    @contextmanager
    def set(self, cache: TreeCache, ancestors: torch.Tensor, mask: torch.Tensor) -> Iterator[None]:
        """Let the decoder's pass of this thread see through the windows.

        Args:
            cache: with the pass reserved.
            ancestors: see `Target.forward`.
            mask: (B, 1, n, m) of the layers without a window, made for this pass.
        """
        seeing, seen = cache.places(ancestors)
        lowest = torch.finfo(mask.dtype).min
        masks = {
            window: mask.masked_fill(window.hides(seeing[:, None, :, None], seen[:, None, None]), lowest)
            for window in {window for window, _ in self._attentions}
        }
        with ExitStack() as hooks:
            for window, attention in self._attentions:
                hooks.enter_context(attention.register_forward_pre_hook(_giving(masks[window]), with_kwargs=True))
            yield


def _giving(mask: torch.Tensor) -> Callable:
    """A hook that gives an attention module this mask in passes of this thread."""
    me = threading.get_ident()

    # a pass of another thread may meet a hook that is half added or half removed, and then gives it no kwargs
    def give(module, args, kwargs=None):
        if threading.get_ident() != me:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        return args, {**kwargs, "attention_mask": mask.to(hidden.device)}

    return give


def _layer_windows(model: PreTrainedModel, decoder: nn.Module) -> list[Window | None]:
    """The window of each layer, as configs with `layer_types` give them, or as transformers 4 gives them."""
    name, config = type(model).__name__, model.config.get_text_config()
    layers = decoder.layers
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) if READS_LAYER_TYPES else None
    if kinds is None:
        if getattr(config, "attention_chunk_size", None) is not None:
            raise ValueError(f"{name} attends in chunks, which needs transformers 5 here")
        if not size or not getattr(config, "use_sliding_window", True):
            return [None] * len(layers)
        own = [getattr(getattr(layer, "self_attn", None), "sliding_window", size) for layer in layers]
        return [Window(SLIDING, int(window)) if window else None for window in own]
    sizes = {SLIDING: size, CHUNKED: getattr(config, "attention_chunk_size", None)}
    unknown = sorted({kind for kind in kinds if kind in (SLIDING, CHUNKED) and not sizes[kind]})
    if unknown:
        raise ValueError(f"{name} has {', '.join(unknown)} layers, and its config does not say how far they see")
    return [Window(kind, int(sizes[kind])) if kind in sizes else None for kind in kinds]
