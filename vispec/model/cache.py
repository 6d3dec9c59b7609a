"""Preallocated keys and values for tree decoding.

A round of tree decoding writes N tokens, then keeps a few of them. `TreeCache` makes both cheap: all layers of one
device share one buffer, tokens are written by slot number, and keeping a path is one gather over that buffer. Rows of a
batch have lengths of their own, so rows may keep different numbers of tokens.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

Home = tuple[torch.device, int | None]
"""Whose buffer it is: that of a device's layers, or of a single one among them."""
CUDA_ALIGNMENT = 16
"""Attention kernels of GPUs want a mask whose rows are so many numbers long, or they copy it in every layer."""


class TreeCache(Cache):
    """Keys and values of one generation, for a transformers decoder or for a draft head.

    Every row b holds `lengths[b]` committed tokens in the slots 0 … lengths[b]-1. A forward pass over n tokens is
    announced by `reserve(n)`; its keys land in the slots after the committed ones and stay provisional until
    `commit` (all of them, in order) or `keep` (a path through them) makes them part of the row.

    Args:
        layer_devices: the device of each decoder layer, in order.
        batch_size: number of rows B.
        capacity: slots of a row; who needs more goes on with the cache `enlarged`.
    """

    def __init__(self, layer_devices: Sequence[torch.device], batch_size: int, capacity: int):
        super().__init__(layers=[]) if _takes_layers() else super().__init__()
        self._alignment = CUDA_ALIGNMENT if layer_devices[-1].type == "cuda" else 1
        self.capacity = self._aligned(capacity)
        self.used = 0
        """Host-side upper bound of `lengths`, as low as the host knows: attention looks at the slots below it."""
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=layer_devices[-1])
        """Committed tokens of each row, (B,), on the device of the last layer."""
        self._layer_devices = list(layer_devices)
        self._places = places_on_device(self._layer_devices)
        self._homes: list[tuple[Home, int] | None] = [None] * len(self._layer_devices)  # buffer and place of each layer
        self._buffers: dict[Home, torch.Tensor] = {}  # (layers, keys and values, B, heads, capacity, D)
        self._numbers = torch.arange(self.capacity, device=self.lengths.device)  # of all slots
        self.slots = self.lengths[:, None]
        """(B, n) where the pass writes."""
        self._reserved_slots = self.slots
        self._passes: dict[Home, tuple] = {}  # what all layers of a buffer need in this pass
        self._visible = 0
        self._reserved = 0
        self._whole: tuple[TreeCache, slice] | None = None  # of a part: whose rows it has

    def reserve(self, n: int, offset: int = 0) -> None:
        """Announce a pass over n tokens a row, to be written `offset` slots after the committed ones.

        Raises:
            ValueError: the cache has too few slots.
        """
        self._reserved = offset + n
        self._visible = self.used + self._reserved
        if self._visible > self.capacity:
            raise ValueError(f"the cache has {self.capacity} slots, the pass needs {self._visible}")
        self.slots = self._reserved_slots = self.lengths[:, None] + self._numbers[offset : offset + n]
        self._passes = {}

    def aim(self, start: int, stop: int) -> None:
        """Let the next pass write to the reserved slots [start, stop) alone; it sees all that are reserved."""
        self.slots = self._reserved_slots[:, start:stop]
        self._passes = {home: (self.slots.to(home[0]), *rest) for home, (_, *rest) in self._passes.items()}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """As transformers' layers ask it: keys and values (B, heads, n, D) of a layer; returns all that are visible."""
        if key_states.shape == value_states.shape:
            return self.write(layer_idx, torch.stack([key_states, value_states]))
        # latent attention: what keys and values are made of has widths of its own, and lies side by side
        both, _ = self.write(layer_idx, torch.cat([key_states, value_states], dim=-1)[None])
        return both.split([key_states.shape[-1], value_states.shape[-1]], dim=-1)

    def write(self, layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values (2, B, heads, n, D) of one layer; returns views of all that the pass sees.

        Keys and values that lie side by side are one, (1, B, heads, n, D), and come back twice.
        """
        home, place = self._homes[layer] or self._find_home(layer, states)
        if home not in self._passes:
            self._passes[home] = self._begin_pass(home, states)
        slots, layers, keys, values = self._passes[home]
        # not by `scatter_`, which in half precision on a CPU converts the whole buffer to float32 and back
        if len(slots) == 1:
            layers[place].index_copy_(3, slots[0], states)
        else:
            rows = torch.arange(len(slots), device=home[0])[:, None]
            layers[place].permute(1, 3, 0, 2, 4).index_put_((rows, slots), states.permute(1, 3, 0, 2, 4))
        return keys[place], values[place]

    def _find_home(self, layer: int, states: torch.Tensor) -> tuple[Home, int]:
        """The buffer of a layer and its place there: one that is not like the first of its device has its own."""
        device = self._layer_devices[layer]
        shared = self._buffers.get((device, None))
        alike = shared is None or (shared.shape[1], *shared.shape[3::2]) == (len(states), *states.shape[2::2])
        self._homes[layer] = ((device, None), self._places[layer]) if alike else ((device, layer), 0)
        return self._homes[layer]

    def _begin_pass(self, home: Home, states: torch.Tensor) -> tuple:
        """(B, n) slots to write, then for each layer where to, and its visible keys and values (B, heads, m, D)."""
        buffer = self._buffers[home] if home in self._buffers else self._allocate(home, states)
        visible = buffer[..., : self._visible, :].unbind(1)
        return self.slots.to(home[0]), buffer.unbind(), visible[0].unbind(), visible[-1].unbind()

    def keys(self, layer: int, slots: int) -> torch.Tensor:
        """(B, heads, slots, D) keys of a layer that has been written, from the first slot on."""
        home, place = self._homes[layer]
        return self._buffers[home][place, 0, :, :, :slots]

    def mask(self, ancestors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Additive attention mask of the reserved pass.

        Args:
            ancestors: (B, n, m) bool; which of the m provisional tokens (those before `offset` included) each of the n
                tokens sees.
            dtype: of the result.

        Returns:
            (B, 1, n, visible): 0 where attention is allowed (committed tokens and ancestors), the lowest number
            of `dtype` elsewhere.
        """
        batch, n, m = ancestors.shape
        # slots behind the pass become visible to it, which takes a mask that hides them: other passes see no more
        # than was written
        self._visible = self._aligned(self._visible)
        # what each token sees: the committed ones, the provisional ones it is told, and not what is behind these
        table = torch.full((batch, n, 1 + m + 1), torch.finfo(dtype).min, dtype=dtype, device=ancestors.device)
        table[..., 0].zero_()
        table[..., 1:-1].masked_fill_(ancestors, 0)
        column = (self._numbers[: self._visible] - self.lengths[:, None] + 1).clamp_(0, m + 1)
        return table.gather(2, column[:, None].expand(-1, n, -1))[:, None]

    def places(self, ancestors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in the text the reserved pass's tokens (B, n) and all visible ones (B, visible) stand, from 0.

        A tree's nodes lie in slots side by side, whatever their depth.

        Args:
            ancestors: (B, m, m), which of all provisional tokens each of them sees; `mask` has been called before.
        """
        depths = ancestors.sum(2) - 1
        behind = self._numbers[: self._visible] - self.lengths[:, None]
        inside = depths.gather(1, behind.clamp(0, depths.shape[1] - 1))
        seeing = depths[:, -self.slots.shape[1] :]
        return self.lengths[:, None] + seeing, self.lengths[:, None] + torch.where(behind < 0, behind, inside)

    def committed_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """(B, 1, visible) additive mask of the reserved passes: 0 at committed tokens, all else is hidden."""
        self._visible = self._aligned(self._visible)
        hidden = self._numbers[: self._visible] >= self.lengths[:, None, None]
        return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)

    def commit(self, counts: torch.Tensor) -> None:
        """Make the first counts[b] provisional tokens of row b committed; the host only knows that `used` grows."""
        self.lengths += counts
        self.used += self._reserved

    def keep(self, path: torch.Tensor) -> None:
        """Move the provisional tokens of a path behind the first one, which stays where it is, in every layer.

        Args:
            path: (B, p) indices of provisional tokens, ascending in every row; surplus columns may repeat any index,
                but there may not be more than the pass has slots behind the first.
        """
        p = path.shape[1]
        lengths = self.lengths[:, None]
        sources, targets = lengths + path, lengths + self._numbers[1 : p + 1]
        for (device, _), buffer in self._buffers.items():
            for row, source, target in zip(range(len(path)), sources.to(device), targets.to(device), strict=True):
                # a third of the time of one gather and scatter with indices that are expanded to the buffer's shape
                kept = buffer[:, :, row].index_select(3, source)
                buffer[:, :, row].index_copy_(3, target, kept)

    def part(self, start: int, stop: int) -> "TreeCache":
        """A cache over the rows [start, stop), in the same memory."""
        part = copy.copy(self)
        part.lengths = self.lengths[start:stop]
        part._whole = self, slice(start, stop)
        part._buffers = {home: buffer[:, :, start:stop] for home, buffer in self._buffers.items()}
        return part

    def enlarged(self, capacity: int) -> "TreeCache":
        """A cache of as many rows with more slots, which holds what this one holds."""
        other = self._empty(capacity)
        other.used = self.used
        other.lengths.copy_(self.lengths)
        other._homes = list(self._homes)
        for home, buffer in self._buffers.items():
            other._buffers[home] = F.pad(buffer, (0, 0, 0, other.capacity - self.capacity))
        return other

    def _empty(self, capacity: int) -> "TreeCache":
        return TreeCache(self._layer_devices, len(self.lengths), capacity)

    def restart(self) -> None:
        """Begin with the first slot again."""
        self.lengths.zero_()
        self.used = 0

    def clear(self) -> None:
        """The same, and forget all numbers: a NaN of the last answer would survive the mask."""
        self.restart()
        for buffer in self._buffers.values():
            buffer.zero_()

    def move(self, source: int, target: int) -> None:
        """Let the row `source` take the place of the row `target`."""
        for buffer in self._buffers.values():
            buffer[:, :, target].copy_(buffer[:, :, source])
        self.lengths[target] = self.lengths[source]

    def saved(self, n: int) -> tuple[list, dict[Home, torch.Tensor]]:
        """Copies of the first n slots of a cache of one row, and which layer is where in them."""
        return list(self._homes), {home: buffer[..., :n, :].clone() for home, buffer in self._buffers.items()}

    def restore(self, saved: tuple[list, dict[Home, torch.Tensor]], n: int) -> None:
        """Begin a row with the first n tokens of what another cache of these layers has saved."""
        self._homes[:], states = saved
        for home, kept in states.items():
            buffer = self._buffers[home] if home in self._buffers else self._allocate(home, kept[0])
            buffer[..., :n, :].copy_(kept[..., :n, :])
        self.lengths.fill_(n)
        self.used = n

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.used

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that a pass sees and the offset of the first one (asked by transformers 5 when it builds a mask)."""
        n = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.used + n, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.used

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.capacity

    def _aligned(self, slots: int) -> int:
        return -(-slots // self._alignment) * self._alignment

    def _allocate(self, home: Home, states: torch.Tensor) -> torch.Tensor:
        if self._whole is not None:
            whole, rows = self._whole
            buffer = whole._buffers[home] if home in whole._buffers else whole._allocate(home, states)
            self._buffers[home] = buffer[:, :, rows]
            return self._buffers[home]
        device, alone = home
        layers = self._layer_devices.count(device) if alone is None else 1
        kinds, _, heads, _, width = states.shape
        shape = (layers, kinds, len(self.lengths), heads, self.capacity, width)
        # zeros, not empty: slots that no token has written yet are masked, but a NaN there would survive the mask
        self._buffers[home] = torch.zeros(shape, dtype=states.dtype, device=device)
        return self._buffers[home]


def _takes_layers() -> bool:
    """transformers 5 gives `Cache` a list of layers; 4.51 has no such argument."""
    return "layers" in Cache.__init__.__code__.co_varnames


def places_on_device(devices: list[torch.device]) -> list[int]:
    """The index of each layer among the layers of its own device."""
    return [devices[:i].count(device) for i, device in enumerate(devices)]
