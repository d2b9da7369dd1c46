"""Labels drawn from a model's own distribution, each by a hash of its example and position."""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from torch import Tensor

from assay.numerics.project import splitmix64


def uniforms(keys: np.ndarray, positions: int, *, seed: int, label: str = "labels") -> Tensor:
    """`[b, positions]` float64 in the open interval (0, 1): of (seed, label, key, position), and of nothing else.

    `keys` `[b]` uint64 are hashes of the examples' ids.
    """
    salt = np.uint64(xxhash.xxh3_64_intdigest(f"{seed}/{label}".encode()))
    rows = splitmix64(np.asarray(keys, dtype=np.uint64) ^ salt)
    drawn = splitmix64(rows[:, None] ^ splitmix64(np.arange(positions, dtype=np.uint64))[None, :])
    return torch.from_numpy(((drawn >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def categorical(logits: Tensor, u: Tensor) -> Tensor:
    """Class of each row, `[n]` int64, from logits `[n, v]` and uniforms `[n]`: the first whose cumulative probability
    exceeds u. A class of probability 0 is never drawn."""
    exact = logits if logits.dtype == torch.float64 else logits.float()
    cumulative = exact.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    reached = u.to(cumulative.device)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, reached, right=True)[:, 0]
    return found.clamp_max_(logits.shape[-1] - 1)
