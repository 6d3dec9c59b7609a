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
        self._places = _places_on_device(self._layer_devices)
        self._buffers: dict[torch.device, torch.Tensor] = {}  # (layers, keys and values, B, heads, capacity, D)
        self._numbers = torch.arange(self.capacity, device=self.lengths.device)  # of all slots
        self.slots = self.lengths[:, None]
        """(B, n) where the pass writes."""
        self._reserved_slots = self.slots
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
        self.slots = self._reserved_slots = self.lengths[:, None] + self._numbers[offset : offset + n]
        self._passes = {}

    def aim(self, start: int, stop: int) -> None:
        """Let the next pass write to the reserved slots [start, stop) alone; it sees all that are reserved."""
        self.slots = self._reserved_slots[:, start:stop]
        self._passes = {device: (self.slots.to(device), *rest) for device, (_, *rest) in self._passes.items()}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """As transformers' layers ask it: keys and values (B, heads, n, D) of a layer; returns all that are visible."""
        return self.write(layer_idx, torch.stack([key_states, value_states]))

    def write(self, layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values (2, B, heads, n, D) of one layer; returns views of all that the pass sees."""
        device = self._layer_devices[layer]
        if device not in self._passes:
            self._passes[device] = self._begin_pass(device, states)
        slots, layers, keys, values = self._passes[device]
        place = self._places[layer]
        # not by `scatter_`, which in half precision on a CPU converts the whole buffer to float32 and back
        if len(slots) == 1:
            layers[place].index_copy_(3, slots[0], states)
        else:
            rows = torch.arange(len(slots), device=device)[:, None]
            layers[place].permute(1, 3, 0, 2, 4).index_put_((rows, slots), states.permute(1, 3, 0, 2, 4))
        return keys[place], values[place]

    def _begin_pass(self, device: torch.device, states: torch.Tensor) -> tuple:
        """(B, n) slots to write, then for each layer where to, and its visible keys and values (B, heads, m, D)."""
        buffer = self._buffers[device] if device in self._buffers else self._allocate(device, states)
        keys, values = buffer[..., : self._visible, :].unbind(1)
        return self.slots.to(device), buffer.unbind(), keys.unbind(), values.unbind()

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
        for device, buffer in self._buffers.items():
            for row, source, target in zip(range(len(path)), sources.to(device), targets.to(device), strict=True):
                # a third of the time of one gather and scatter with indices that are expanded to the buffer's shape
                kept = buffer[:, :, row].index_select(3, source)
                buffer[:, :, row].index_copy_(3, target, kept)

    def part(self, start: int, stop: int) -> "TreeCache":
        """A cache over the rows [start, stop), in the same memory."""
        part = copy.copy(self)
        part.lengths = self.lengths[start:stop]
        part._whole = self, slice(start, stop)
        part._buffers = {device: buffer[:, :, start:stop] for device, buffer in self._buffers.items()}
        return part

    def enlarged(self, capacity: int) -> "TreeCache":
        """A cache of as many rows with more slots, which holds what this one holds."""
        other = TreeCache(self._layer_devices, len(self.lengths), capacity)
        other.used = self.used
        other.lengths.copy_(self.lengths)
        for device, buffer in self._buffers.items():
            other._buffers[device] = F.pad(buffer, (0, 0, 0, other.capacity - self.capacity))
        return other

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

    def _allocate(self, device: torch.device, states: torch.Tensor) -> torch.Tensor:
        if self._whole is not None:
            whole, rows = self._whole
            buffer = whole._buffers[device] if device in whole._buffers else whole._allocate(device, states)
            self._buffers[device] = buffer[:, :, rows]
            return self._buffers[device]
        heads, head_dim = states.shape[2], states.shape[4]
        shape = (self._layer_devices.count(device), 2, len(self.lengths), heads, self.capacity, head_dim)
        # zeros, not empty: slots that no token has written yet are masked, but a NaN there would survive the mask
        self._buffers[device] = torch.zeros(shape, dtype=states.dtype, device=device)
        return self._buffers[device]


def _takes_layers() -> bool:
    """transformers 5 gives `Cache` a list of layers; 4.51 has no such argument."""
    return "layers" in Cache.__init__.__code__.co_varnames


def _places_on_device(devices: list[torch.device]) -> list[int]:
    """The index of each layer among the layers of its own device."""
    return [devices[:i].count(device) for i, device in enumerate(devices)]
