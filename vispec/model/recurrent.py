"""Layers that keep one state of all the text so far: gated delta nets (linear attention) and short convolutions.

The branches of a tree would each need a state of their own, so these layers follow chains alone. A pass over a chain
leaves every state as it was before, and remembers what its tokens bring to it; once it is known how many of them are
accepted, `commit` lets so many in. Of a gated delta net that takes its recurrent rule once more, not its large
projections, and the rows of a batch may go different ways.

B rows, n tokens of a pass, H hidden size, C channels and K width of a convolution, V value heads of sizes D and D'.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from vispec.model.cache import TreeCache, places_on_device
from vispec.model.text_decoder import AGREEMENT

LINEAR, CONVOLUTION = "linear_attention", "conv"
"""Kinds of layers, as configs name them; and below, where such a layer has its module."""
MODULES = {LINEAR: "linear_attn", CONVOLUTION: "conv"}
PARTS = {
    LINEAR: {"conv1d", "norm", "out_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"},
    CONVOLUTION: {"conv", "in_proj", "out_proj"},
}
RULE, CONVOLVE = "torch_recurrent_gated_delta_rule", "causal_conv1d_fn"
"""What a gated delta net calls, by their names beside its class."""


def known_states(decoder: nn.Module) -> frozenset[str]:
    """Of these kinds those that the decoder has, and that are built as they are known here."""
    found = {kind: [getattr(layer, name, None) for layer in decoder.layers] for kind, name in MODULES.items()}
    return frozenset(
        kind
        for kind, modules in found.items()
        if any(modules) and all(_is_known(module, kind) for module in modules if module is not None)
    )


def _is_known(module: nn.Module, kind: str) -> bool:
    beside = sys.modules[type(module).__module__]
    called = [CONVOLVE] if kind == CONVOLUTION else [RULE, CONVOLVE]
    return {name for name, _ in module.named_children()} == PARTS[kind] and all(hasattr(beside, f) for f in called)


class StateCache(TreeCache):
    """A cache for a decoder of which some layers keep a state instead of keys and values; it follows chains alone.

    Args:
        layer_devices, batch_size, capacity: see `TreeCache`.
        keeps_keys: for each layer whether it does.
    """

    def __init__(
        self, layer_devices: Sequence[torch.device], batch_size: int, capacity: int, keeps_keys: Sequence[bool]
    ):
        super().__init__(layer_devices, batch_size, capacity)
        self._arguments = list(layer_devices), batch_size, list(keeps_keys)
        # buffers of keys have no room for the other layers
        self._layer_devices = [device if keeps else None for device, keeps in zip(*self._arguments[::2], strict=True)]
        self._places = places_on_device(self._layer_devices)
        self._convolutions: dict[int, torch.Tensor] = {}  # (all rows, C, K) of each layer: its newest inputs
        self._states: dict[int, torch.Tensor] = {}  # (all rows, V, D, D') of each gated delta net
        self._rows = slice(0, batch_size)
        self._windows: dict[int, torch.Tensor] = {}  # (B, C, K + n) of the layers of a pass over a chain
        self._heard: dict[int, tuple[nn.Module, torch.Tensor]] = {}  # the nets of such a pass, and their inputs

    def reserve(self, n: int, offset: int = 0) -> None:
        super().reserve(n, offset)
        self._windows, self._heard = {}, {}

    def hear(self, net: nn.Module, hidden: torch.Tensor) -> None:
        """A gated delta net is about to read (B, n, H), a chain."""
        self._heard[net.layer_idx] = net, hidden

    # --- as transformers' layers ask it ---

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """(B, C, K), which a pass over one token changes in place; None before a prompt."""
        return self._held(self._convolutions, layer_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._held(self._states, layer_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int
    ) -> torch.Tensor:
        """What a convolution over (B, C, n) has to see: them behind what is held."""
        if state_idx != 0:
            raise ValueError(f"layer {layer_idx} keeps several states, of which one is known here")
        held = self.get_conv_state(layer_idx)
        if held is None:
            window = F.pad(conv_states, (max(conv_kernel_size - conv_states.shape[-1], 0), 0))
            self._store(self._convolutions, layer_idx, window[..., -conv_kernel_size:])
        else:
            window = self._windows[layer_idx] = torch.cat([held, conv_states], dim=-1)
        return window

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0
    ) -> torch.Tensor:
        """The state (B, V, D, D') after a pass; that after all of a chain is of no use."""
        if layer_idx not in self._windows:
            self._store(self._states, layer_idx, recurrent_states)
        return recurrent_states

    def _held(self, states: dict[int, torch.Tensor], layer: int) -> torch.Tensor | None:
        return states[layer][self._rows] if self.used and layer in states else None

    def _store(self, states: dict[int, torch.Tensor], layer: int, state: torch.Tensor) -> None:
        if layer not in states:
            states[layer] = state.new_zeros(self._arguments[1], *state.shape[1:])
        states[layer][self._rows].copy_(state)

    # --- what becomes of a pass ---

    def commit(self, counts: torch.Tensor) -> None:
        super().commit(counts)
        for layer, window in self._windows.items():
            held, accepted = self._convolutions[layer][self._rows], counts.to(window.device)[:, None]
            if layer in self._states:
                state = self._states[layer][self._rows]
                state.copy_(advanced(*self._heard[layer], window, state, accepted))
            newest = accepted + torch.arange(held.shape[-1], device=window.device)
            held.copy_(window.gather(2, newest[:, None].expand_as(held)))
        self._windows, self._heard = {}, {}

    def part(self, start: int, stop: int) -> "StateCache":
        part = super().part(start, stop)
        part._rows = slice(self._rows.start + start, self._rows.start + stop)
        return part

    def enlarged(self, capacity: int) -> "StateCache":
        other = super().enlarged(capacity)
        other._convolutions, other._states = self._convolutions, self._states
        return other

    def _empty(self, capacity: int) -> "StateCache":
        devices, rows, keeps_keys = self._arguments
        return StateCache(devices, rows, capacity, keeps_keys)

    def move(self, source: int, target: int) -> None:
        super().move(source, target)
        for state in (*self._convolutions.values(), *self._states.values()):
            state[target].copy_(state[source])


def advanced(
    net: nn.Module, hidden: torch.Tensor, window: torch.Tensor, state: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """(B, V, D, D') the state of a gated delta net when it has read the first counts[b] tokens of a pass.

    A token whose strength is 0 and whose decay is exp(0) leaves the state as it is, so the others are read as such.

    Args:
        hidden: (B, n, H) the pass's tokens.
        window: (B, C, K + n) what its convolution has seen.
        state: before the pass.
        counts: (B, 1).
    """
    beside, convolution, n = sys.modules[type(net).__module__], net.conv1d, hidden.shape[1]
    mixed = getattr(beside, CONVOLVE)(
        window, convolution.weight.squeeze(1), convolution.bias, activation=net.activation
    )[..., -n:].transpose(1, 2)
    query, key, value = mixed.split([net.key_dim, net.key_dim, net.value_dim], dim=-1)
    read = (torch.arange(n, device=hidden.device) < counts)[..., None]
    decay = -net.A_log.float().exp() * F.softplus(net.in_proj_a(hidden).float() + net.dt_bias)
    _, state = getattr(beside, RULE)(
        query.unflatten(-1, (-1, net.head_k_dim)),
        key.unflatten(-1, (-1, net.head_k_dim)),
        value.unflatten(-1, (-1, net.head_v_dim)),
        g=decay * read,
        beta=net.in_proj_b(hidden).sigmoid() * read,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return state


class RecurrentLayers:
    """Those of a text decoder that keep a state.

    Args:
        decoder: its layers of such kinds are known, see `known_states`.
        devices: of its layers.

    Raises:
        ValueError: the state of a layer cannot be led as the layer itself leads it.
    """

    def __init__(self, decoder: nn.Module, devices: Sequence[torch.device]):
        self._keeps_keys = [not any(hasattr(layer, name) for name in MODULES.values()) for layer in decoder.layers]
        self._devices = devices
        nets = (getattr(layer, MODULES[LINEAR], None) for layer in decoder.layers)
        self._nets = [net for net in nets if net is not None]
        if self._nets:
            self._check(self._nets[0])

    def __bool__(self) -> bool:
        return not all(self._keeps_keys)

    def new_cache(self, batch_size: int, capacity: int) -> TreeCache:
        if self:
            return StateCache(self._devices, batch_size, capacity, self._keeps_keys)
        return TreeCache(self._devices, batch_size, capacity)

    @contextmanager
    def watch(self, cache: StateCache) -> Iterator[None]:
        """Let the cache hear what the nets read in a pass over a chain."""

        # a pass of another thread may meet a hook that is half added or half removed, and then gives it no kwargs
        def tell(net, args, kwargs=None):
            if kwargs is None or kwargs.get("cache_params") is not cache:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            cache.hear(net, hidden)
            # the reference rule fills the pass up to a whole chunk, of 64 tokens where it is not told
            return args, {**kwargs, "chunk_size": hidden.shape[1]}

        with ExitStack() as hooks:
            for net in self._nets:
                hooks.enter_context(net.register_forward_pre_hook(tell, with_kwargs=True))
            yield

    @torch.no_grad()
    def _check(self, net: nn.Module) -> None:
        """The state after a part of a chain is the one after the same tokens in one piece."""
        name, weight = type(net).__name__, net.in_proj_a.weight
        if any(parameter.is_meta for parameter in net.parameters()):
            raise ValueError(f"{name} is loaded when it is needed: its state cannot be led from outside")
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 6, weight.shape[1], generator=generator).to(weight)
        kept, straight = self.new_cache(1, 8), self.new_cache(1, 8)
        for cache, pieces in ((kept, ((0, 2, 2), (2, 6, 2))), (straight, ((0, 4, 4),))):
            for start, stop, accepted in pieces:
                cache.reserve(stop - start)
                with self.watch(cache):
                    net(hidden[:, start:stop], cache_params=cache)
                cache.commit(torch.full_like(cache.lengths, accepted))
        for states in ("get_conv_state", "get_recurrent_state"):
            found, expected = (getattr(cache, states)(net.layer_idx) for cache in (kept, straight))
            if not (found - expected).norm() <= AGREEMENT[weight.dtype] * expected.norm():
                raise ValueError(f"{name} leads its state otherwise than the gated delta nets that are known here")
