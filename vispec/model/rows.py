"""What generations remember, row by row, so that rows can join a batch and leave it."""

from dataclasses import fields, replace

import torch


class Rows:
    """Base of dataclasses with one row for each prompt of a batch.

    Their fields are tensors with the rows first, None, or again something with the methods below; whatever else they
    hold is the same for all rows.
    """

    def room_for(self, batch_size: int, capacity: int) -> "Rows":
        """Zeros for as many rows like those of this one; `capacity` is for what grows with the text, in tokens."""

        def room(value):
            if isinstance(value, torch.Tensor):
                return value.new_zeros(batch_size, *value.shape[1:])
            return value.room_for(batch_size, capacity) if hasattr(value, "room_for") else value

        return replace(self, **{field.name: room(getattr(self, field.name)) for field in fields(self)})

    def part(self, start: int, stop: int) -> "Rows":
        """The rows [start, stop), in the same memory."""

        def part(value):
            if isinstance(value, torch.Tensor):
                return value[start:stop]
            return value.part(start, stop) if hasattr(value, "part") else value

        return replace(self, **{field.name: part(getattr(self, field.name)) for field in fields(self)})

    def zero_(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if hasattr(value, "zero_"):
                value.zero_()

    def copy_(self, other: "Rows") -> None:
        """Hold what another one with as many rows holds."""
        for field in fields(self):
            value = getattr(self, field.name)
            if hasattr(value, "copy_"):
                value.copy_(getattr(other, field.name))
