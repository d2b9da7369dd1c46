"""One block of shared memory for all tensors of a worker's state.

Sent one by one, each tensor is a file descriptor of its own, and a process can be started with 250 of them: fewer than
three marks of a small transformer have. In one block they are one descriptor, and workers share its pages.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Sums of vector instructions may depend on where rows begin: every tensor begins as a fresh one does.
ALIGNMENT = 64


@dataclass(frozen=True)
class Packed:
    """An object without its tensors, and where they lie in the block."""

    stream: bytes
    places: list[tuple[int, tuple[int, ...], torch.dtype]]
    """Offset in bytes, shape and type of each."""
    block: torch.Tensor | None


def pack(value: Any) -> Packed:
    """All plain CPU tensors that `value` holds, copied into one block; others are pickled with it."""
    import torch

    kept: dict[int, torch.Tensor] = {}  # by identity: one that is held twice is sent once, and alive until then
    order: dict[int, int] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if type(obj) is not torch.Tensor or obj.device.type != "cpu" or obj.layout != torch.strided:
                return None
            # A copy of other strides would be summed in another order.
            if obj.requires_grad or not obj.is_contiguous() or obj.is_quantized:
                return None
            kept[id(obj)] = obj
            return order.setdefault(id(obj), len(order))

    stream = io.BytesIO()
    Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    places, end = [], 0
    for key in order:
        tensor = kept[key]
        places.append((end, tuple(tensor.shape), tensor.dtype))
        end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    if not end:
        return Packed(stream.getvalue(), places, None)
    block = torch.empty(end, dtype=torch.uint8).share_memory_()
    for key, place in zip(order, places, strict=True):
        _at(block, place).copy_(kept[key])
    return Packed(stream.getvalue(), places, block)


def unpack(packed: Packed) -> Any:
    """The object again, its tensors views of the block."""
    import torch

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: int) -> torch.Tensor:
            place = packed.places[pid]
            return torch.empty(place[1], dtype=place[2]) if packed.block is None else _at(packed.block, place)

    return Unpickler(io.BytesIO(packed.stream)).load()


def _at(block: torch.Tensor, place: tuple[int, tuple[int, ...], torch.dtype]) -> torch.Tensor:
    offset, shape, dtype = place
    count = 1
    for side in shape:
        count *= side
    return block[offset : offset + count * dtype.itemsize].view(dtype).view(shape)
