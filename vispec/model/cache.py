"""Preallocated keys and values for tree decoding.

A round of tree decoding writes N tokens, then keeps a few of them. `TreeCache` makes both cheap: all layers of one
device share one buffer, tokens are written by slot number, and keeping a path is one gather over that buffer. Rows of a
batch have lengths of their own, so rows may keep different numbers of tokens.
"""

import copy
from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache

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
        capacity: slots of a row; who needs more copies the cache to where there is `room_for` them.
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
        self._places = _places_on_device(self._layer_devices)
        self._buffers: dict[torch.device, torch.Tensor] = {}  # (2 * layers, B, heads, capacity, head_dim), keys first
        self._numbers = torch.arange(self.capacity, device=self.lengths.device)  # of all slots
        self._slots = self.lengths[:, None]  # (B, n) where the pass writes
        self._passes: dict[torch.device, tuple] = {}  # what all layers of a device need in this pass
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
        self._slots = self.lengths[:, None] + self._numbers[offset : offset + n]
        self._passes = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Write the keys and values (B, heads, n, head_dim) of one layer; returns all that are visible to the pass."""
        device = self._layer_devices[layer_idx]
        if device not in self._passes:
            self._passes[device] = self._begin_pass(device, key_states)
        slots, visible = self._passes[device]
        keys, values = visible[2 * self._places[layer_idx]], visible[2 * self._places[layer_idx] + 1]
        _write(keys, slots, key_states)
        _write(values, slots, value_states)
        return keys, values

    def _begin_pass(self, device: torch.device, keys: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(B, n) slots to write, and the visible keys and values of all layers."""
        buffer = self._buffers[device] if device in self._buffers else self._allocate(device, keys)
        return self._slots.to(device), buffer[..., : self._visible, :].unbind()

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

    def commit(self, counts: torch.Tensor) -> None:
        """Make the first counts[b] provisional tokens of row b committed; the host only knows that `used` grows."""
        self.lengths += counts
        self.used += self._reserved

    def keep(self, path: torch.Tensor) -> None:
        """Move the provisional tokens of a path to the front of the provisional slots, in every layer.

        Args:
            path: (B, p) indices of provisional tokens, ascending in every row and beginning with 0, which stays where
                it is; surplus columns may repeat any index.
        """
        path = path[:, 1 : self._reserved]  # surplus columns may be more than the pass has slots
        p = path.shape[1]
        lengths = self.lengths[:, None]
        sources, targets = lengths + path, lengths + self._numbers[1 : p + 1]
        for device, buffer in self._buffers.items():
            for row, source, target in zip(range(len(path)), sources.to(device), targets.to(device), strict=True):
                # a third of the time of one gather and scatter with indices that are expanded to the buffer's shape
                kept = buffer[:, row].index_select(2, source)
                buffer[:, row].index_copy_(2, target, kept)

    def part(self, start: int, stop: int) -> "TreeCache":
        """A cache over the rows [start, stop), in the same memory."""
        part = copy.copy(self)
        part.lengths = self.lengths[start:stop]
        part._whole = self, slice(start, stop)
        part._buffers = {device: buffer[:, start:stop] for device, buffer in self._buffers.items()}
        return part

    def room_for(self, batch_size: int, capacity: int) -> "TreeCache":
        """An empty cache for as many rows of as many slots, with buffers like those of this one."""
        room = TreeCache(self._layer_devices, batch_size, capacity)
        for device, buffer in self._buffers.items():
            room._allocate(device, buffer[0])
        return room

    def zero_(self) -> None:
        self.lengths.zero_()
        self.used = 0
        for buffer in self._buffers.values():
            buffer.zero_()

    def copy_(self, other: "TreeCache") -> None:
        """Hold what another cache with as many rows holds; this one must be large enough."""
        slots = min(other.used, other.capacity)  # the bound may be rounded up beyond what is there
        for device, buffer in self._buffers.items():
            written, source = (x[..., :slots, :] for x in (buffer, other._buffers[device]))
            if written.data_ptr() != source.data_ptr():  # a part of this cache has nothing to bring along
                written.copy_(source)
        self.lengths.copy_(other.lengths)
        self.used = other.used

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

    def _allocate(self, device: torch.device, keys: torch.Tensor) -> torch.Tensor:
        if self._whole is not None:
            whole, rows = self._whole
            buffer = whole._buffers[device] if device in whole._buffers else whole._allocate(device, keys)
            self._buffers[device] = buffer[:, rows]
            return self._buffers[device]
        heads, head_dim = keys.shape[1], keys.shape[3]
        shape = (2 * self._layer_devices.count(device), len(self.lengths), heads, self.capacity, head_dim)
        # zeros, not empty: slots that no token has written yet are masked, but a NaN there would survive the mask
        self._buffers[device] = torch.zeros(shape, dtype=keys.dtype, device=device)
        return self._buffers[device]


def _write(buffer: torch.Tensor, slots: torch.Tensor, states: torch.Tensor) -> None:
    """Put states (B, heads, n, head_dim) into slots (B, n) of one layer's keys or values.

    Not by `scatter_`, which in half precision on a CPU converts the whole buffer to float32 and back.
    """
    if len(slots) == 1:
        buffer.index_copy_(2, slots[0], states)
    else:
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        buffer.transpose(1, 2).index_put_((rows, slots), states.transpose(1, 2))


def _takes_layers() -> bool:
    """transformers 5 gives `Cache` a list of layers; 4.51 has no such argument."""
    return "layers" in Cache.__init__.__code__.co_varnames


def _places_on_device(devices: list[torch.device]) -> list[int]:
    """The index of each layer among the layers of its own device."""
    return [devices[:i].count(device) for i, device in enumerate(devices)]
