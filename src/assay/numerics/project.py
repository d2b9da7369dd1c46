"""Random projections whose entries are counters hashed: device, shard, batch and order cannot matter.

Everything random is a function of a whole number: splitmix64(key ^ counter), where the key hashes the seed and the
parameter's name, and the counter is a row, a column, or both. Only integers decide, and only on the CPU, so every
device has the same tables. Legend: b examples, t positions, o outputs, i inputs, r rank, k numbers kept, p entries of
a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import isqrt, prod
from typing import ClassVar, TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor

T = TypeVar("T")

# Entries of formed gradients, and of matrices, that are held at a time: 16 MB of them in float32.
FORMED = 1 << 22
# Entries of one addition on the CPU: too few for torch to wake further threads, which would cost more than the sum.
SERIAL = 1 << 14


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of Steele, Lea & Flood 2014 on uint64, elementwise, modulo 2^64."""
    with np.errstate(over="ignore"):
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def rademacher(rows: int, columns: int, *, seed: int, label: str) -> Tensor:
    """`[rows, columns]` float32 of +-1/sqrt(rows), so that E<Px, Py> = <x, y>.

    Var<Px, Py> = (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2) / rows (Achlioptas 2003).
    """
    counters = (np.arange(rows, dtype=np.uint64)[:, None] << np.uint64(32)) | np.arange(columns, dtype=np.uint64)
    signs = (_hashed(counters, seed, label) >> np.uint64(63)).astype(np.float32) * 2 - 1
    return torch.from_numpy(signs / np.float32(np.sqrt(rows)))


def signs(counters: np.ndarray, *, seed: int, label: str) -> Tensor:
    """64 signs for each counter, `[..., 64 n]` of int8 +-1 from `[..., n]`: the bits of its hash, lowest first."""
    words = _hashed(counters, seed, label).astype("<u8")
    return torch.from_numpy(np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").astype(np.int8) * 2 - 1)


def _hashed(counters: np.ndarray, seed: int, label: str) -> np.ndarray:
    return splitmix64(counters ^ np.uint64(xxhash.xxh3_64_intdigest(f"{seed}/{label}".encode())))


def _counters(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint64)


class Sketch(ABC):
    """A linear map of one parameter's per-example gradients to few numbers, given as factors or in full.

    A gradient `[o, i]` comes as its factors, sum_t d_t a_t^T, which go through `out` and `into` one by one and then
    through `merge`; or it comes formed, to `full`. Both ways give the same numbers, so that uses of a shared parameter
    add up whatever layers they are in. Maps are keyed by the parameter's name; the same for every batch and device.
    All are unbiased for inner products: E<Sx, Sy> = <x, y> over seeds.
    """

    together: ClassVar[bool] = False
    """Whether the parameters' numbers are added up, being maps to one space, rather than laid side by side."""

    factored: ClassVar[bool] = False
    """Whether `out` and `into` shrink their sides, so that neither d nor the gradient need ever be whole."""

    @abstractmethod
    def width(self, name: str, shape: Sequence[int]) -> int:
        """How many numbers the gradient of a parameter of this shape becomes."""

    @abstractmethod
    def full(self, name: str, grad: Tensor) -> Tensor:
        """`[b, *shape]` -> `[b, width]`."""

    def out(self, name: str, d_bto: Tensor) -> Tensor:
        """The output side, `[..., o]` -> `[..., r]`."""
        return d_bto

    def into(self, name: str, a_bti: Tensor) -> Tensor:
        """The input side, `[..., i]` -> `[..., s]`."""
        return a_bti

    def merge(self, name: str, d_btr: Tensor, a_bts: Tensor) -> Tensor:
        """Sum over positions of the product of the two sides, `[b, width]`."""
        step = max(1, FORMED // (d_btr.shape[-1] * a_bts.shape[-1]))
        some = [slice(i, i + step) for i in range(0, len(d_btr), step)]
        return torch.cat([self.full(name, d_btr[rows].transpose(1, 2) @ a_bts[rows]) for rows in some])

    def outer(self, name: str, d_bto: Tensor, a_bti: Tensor) -> Tensor:
        """Sketch of sum_t d_t a_t^T, `[b, width]`."""
        return self.merge(name, self.out(name, d_bto), self.into(name, a_bti))

    def lookup(self, name: str, ids_bt: Tensor, d_bti: Tensor, entries: int) -> Tensor:
        """Sketch of the gradient of an embedding `[entries, i]`: row ids_t receives d_t. `[b, width]`."""
        grad = d_bti.new_zeros(d_bti.shape[0], entries, d_bti.shape[-1])
        return self.full(name, grad.scatter_add_(1, ids_bt[..., None].expand_as(d_bti), d_bti))


class Exact(Sketch):
    """No compression: the gradient itself, rows of matrices first."""

    def width(self, name: str, shape: Sequence[int]) -> int:
        return prod(shape)

    def full(self, name: str, grad: Tensor) -> Tensor:
        return grad.reshape(len(grad), -1)


class _Keyed(Sketch):
    """What a seed determines. Tables are made once for each device and type, and are made anew in another process."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._held: dict[tuple[object, ...], object] = {}

    def _table(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_held": {}}


class Factored(_Keyed):
    """Two-sided projection of matrix gradients, G `[o, i]` -> P_o G P_i^T `[r, r]` (LoGra, Choe et al. 2024).

    Vectors (norm gains, biases) get a dense projection to r numbers; further axes of a weight (convolutions) count as
    inputs. A side that is no larger than r is kept as it is, without error.

    Variance: E<SG, SH>^2 = sum K_o[a,b,c,d] K_i[j,l,m,n] G_aj H_bl G_cm H_dn for entries of +-1/sqrt(r), with
    K[a,b,c,d] = 1_ab 1_cd + (1_ac 1_bd + 1_ad 1_bc - 2 1_abcd) / r. For G = u v^T and H = w z^T this is
    (<u,w>^2 + V(u,w)) (<v,z>^2 + V(v,z)), V that of `rademacher`: for G = H of norm 1, (1 + 2 (1 - sum u^4) / r)
    (1 + 2 (1 - sum v^4) / r), where Gaussian entries give (1 + 2/r)^2. Parameters add up.
    """

    factored: ClassVar[bool] = True

    def __init__(self, rank: int, seed: int) -> None:
        super().__init__(seed)
        assert rank > 0, "rank 0 is `Exact`"
        self.rank = rank

    def side(self, name: str, side: str, size: int, like: Tensor) -> Tensor | None:
        """`[r, size]` in the type and on the device of `like`, or None where this side is kept."""
        if size <= self.rank:
            return None

        def make() -> Tensor:
            return rademacher(self.rank, size, seed=self.seed, label=f"{name}/{side}").to(like.device, like.dtype)

        return self._table((name, side, size, like.device, like.dtype), make)

    def _apply(self, name: str, side: str, x: Tensor) -> Tensor:
        matrix = self.side(name, side, x.shape[-1], x)
        return x if matrix is None else x @ matrix.T

    def out(self, name: str, d_bto: Tensor) -> Tensor:
        return self._apply(name, "out", d_bto)

    def into(self, name: str, a_bti: Tensor) -> Tensor:
        return self._apply(name, "in", a_bti)

    def merge(self, name: str, d_btr: Tensor, a_bts: Tensor) -> Tensor:
        return (d_btr.transpose(1, 2) @ a_bts).flatten(1)

    def full(self, name: str, grad: Tensor) -> Tensor:
        if grad.dim() == 2:
            return self._apply(name, "out", grad)
        g_boi = grad.flatten(2)
        return self._apply(name, "out", self._apply(name, "in", g_boi).transpose(1, 2)).transpose(1, 2).flatten(1)

    def lookup(self, name: str, ids_bt: Tensor, d_bti: Tensor, entries: int) -> Tensor:
        left = self.side(name, "out", entries, d_bti)
        if left is None:
            return super().lookup(name, ids_bt, d_bti, entries)
        return self.merge(name, left.T[ids_bt], self.into(name, d_bti))

    def width(self, name: str, shape: Sequence[int]) -> int:
        sides = (shape[0], prod(shape[1:])) if len(shape) > 1 else (shape[0],) if shape else (1,)
        return prod(min(self.rank, side) for side in sides)


class Sparse(_Keyed):
    """Sparse Johnson-Lindenstrauss map of the whole gradient to k numbers: a signed sum over buckets, O(p).

    Each entry goes to `nonzeros` = s buckets, one in each of s equal parts of the k, as +-1/sqrt(s). Buckets are not
    drawn one by one: the gradient is cut into rows, each a quarter of a part long, and each row is added in whole,
    with a sign for each entry, from a start drawn for that row (going round at the end). Entries of one row never
    meet; entries of two rows or two parameters meet with probability s/k, as they would in any hash, so

    Variance: Var<Sx, Sy> = (1/k) sum over pairs e < f not in one row of (x_e y_f + x_f y_e)^2, which is at most
    (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_e^2 y_e^2) / k, that of a dense matrix of +-1/sqrt(k), whatever s is. (Given the
    starts, it varies from seed to seed as it does for single buckets; with rows as long as a part, up to thrice that.)

    Sums have one order on every device: rows in turn, no atomic additions.

    All parameters share the k numbers (`together`). Shares of k for each would need all sizes, would leave a norm's
    gain few numbers however large its gradient, and have variance sum_l |x_l|^2 |y_l|^2 / k_l instead of
    |x|^2 |y|^2 / k; by Cauchy's inequality that is no smaller unless x and y lie in different parameters.

    Source: Kane & Nelson 2014 (blocks); Charikar, Chen & Farach-Colton 2002; for gradients Hu et al. 2025 (GraSS).
    """

    together: ClassVar[bool] = True

    def __init__(self, size: int, seed: int, nonzeros: int = 1) -> None:
        super().__init__(seed)
        assert size > 0 and size % nonzeros == 0, f"{size} numbers do not make {nonzeros} equal parts"
        self.size, self.nonzeros, self.part = size, nonzeros, size // nonzeros
        self.row = max(1, self.part // 4)

    def width(self, name: str, shape: Sequence[int]) -> int:
        return self.size

    def signs(self, name: str, part: int, entries: int, like: Tensor) -> Tensor:
        """`[entries]` of +-1/sqrt(s)."""

        def make() -> Tensor:
            made = signs(_counters(-(-entries // 64)), seed=self.seed, label=f"{name}/sign/{part}")[:entries]
            return made.to(like.device, like.dtype) / self.nonzeros**0.5

        return self._table((name, part, entries, like.device, like.dtype), make)

    def starts(self, name: str, part: int, entries: int) -> list[int]:
        """Where each row of entries begins, in 0 .. k/s - 1."""

        def make() -> list[int]:
            drawn = _hashed(_counters(-(-entries // self.row)), self.seed, f"{name}/start/{part}")
            return (drawn % np.uint64(self.part)).tolist()

        return self._table((name, part, entries), make)

    def full(self, name: str, grad: Tensor) -> Tensor:
        x_bp = grad.reshape(len(grad), -1)
        return torch.cat([self._added(name, x_bp, part) for part in range(self.nonzeros)], dim=1)

    def _added(self, name: str, x_bp: Tensor, part: int) -> Tensor:
        examples, entries = x_bp.shape
        table, starts = self.signs(name, part, entries, x_bp), self.starts(name, part, entries)
        # Longer than a part, so that a row is one slice wherever it starts.
        sums = x_bp.new_zeros(examples, self.part + self.row)
        step = max(1, SERIAL // self.row if x_bp.device.type == "cpu" else examples)
        for some in (slice(i, i + step) for i in range(0, examples, step)):
            for at, start in enumerate(starts):
                cells = slice(at * self.row, min((at + 1) * self.row, entries))
                sums[some, start : start + cells.stop - cells.start].addcmul_(x_bp[some, cells], table[cells])
        sums[:, : self.row] += sums[:, self.part :]
        return sums[:, : self.part]

    def lookup(self, name: str, ids_bt: Tensor, d_bti: Tensor, entries: int) -> Tensor:
        width, parts = d_bti.shape[-1], []
        cells = ids_bt[..., None] * width + torch.arange(width, device=ids_bt.device)
        for part in range(self.nonzeros):
            table = self.signs(name, part, entries * width, d_bti).view(entries, width)
            starts = torch.tensor(self.starts(name, part, entries * width), device=ids_bt.device)
            buckets = (starts[cells // self.row] + cells % self.row) % self.part
            sums = d_bti.new_zeros(len(d_bti), self.part)
            parts.append(sums.scatter_add_(1, buckets.flatten(1), (d_bti * table[ids_bt]).flatten(1)))
        return torch.cat(parts, dim=1)


class Masked(_Keyed):
    """A few rows and columns of each matrix gradient, then `Sparse` (FactGraSS, Hu et al. 2025).

    Of a side of n, the m with the smallest hashes are kept, times sqrt(n/m); the m x m block is formed and sketched,
    never the gradient. Vectors are sketched whole. `side` m is 2 sqrt(k) unless told, the paper's four entries for
    each number kept.

    Variance: with U = G * H entry by entry, q1 = m/n and q2 = q1 (m-1)/(n-1) of each side, the masked product has
    E<MG, MH>^2 = E(U, U), E(U, V) = (q2_o q2_i (sum U)(sum V) + (q1-q2)_o q2_i sum of products of row sums +
    q2_o (q1-q2)_i sum of products of column sums + (q1-q2)_o (q1-q2)_i sum U V) / (q1_o q1_i)^2. The sketch adds at
    most (E(G^2, H^2) + E(U, U) - 2 sum U^2 / (q1_o q1_i)) / k, the mean over masks of its own. The masks' part does
    not fall with k: it is small for gradients that are spread over many entries.
    """

    factored: ClassVar[bool] = True
    together: ClassVar[bool] = True

    def __init__(self, size: int, seed: int, side: int | None = None) -> None:
        super().__init__(seed)
        self.side, self._sparse = side or 2 * isqrt(size), Sparse(size, seed)

    def width(self, name: str, shape: Sequence[int]) -> int:
        return self._sparse.size

    def kept(self, name: str, side: str, size: int, like: Tensor) -> Tensor | None:
        """Which coordinates of a side stay, ascending `[m]`, or None where all do."""
        if size <= self.side:
            return None

        def make() -> Tensor:
            drawn = _hashed(_counters(size), self.seed, f"{name}/mask/{side}")
            return torch.from_numpy(np.sort(np.argsort(drawn, kind="stable")[: self.side])).to(like.device)

        return self._table((name, side, size, like.device), make)

    def _cut(self, name: str, side: str, x: Tensor) -> Tensor:
        kept = self.kept(name, side, x.shape[-1], x)
        return x if kept is None else x.index_select(-1, kept) * (x.shape[-1] / self.side) ** 0.5

    def out(self, name: str, d_bto: Tensor) -> Tensor:
        return self._cut(name, "out", d_bto)

    def into(self, name: str, a_bti: Tensor) -> Tensor:
        return self._cut(name, "in", a_bti)

    def merge(self, name: str, d_btr: Tensor, a_bts: Tensor) -> Tensor:
        return self._sparse.merge(name, d_btr, a_bts)

    def full(self, name: str, grad: Tensor) -> Tensor:
        if grad.dim() > 2:
            grad = self.out(name, self.into(name, grad.flatten(2)).transpose(1, 2)).transpose(1, 2)
        return self._sparse.full(name, grad)

    def lookup(self, name: str, ids_bt: Tensor, d_bti: Tensor, entries: int) -> Tensor:
        d_bti, kept = self.into(name, d_bti), self.kept(name, "out", entries, d_bti)
        if kept is None:
            return self._sparse.lookup(name, ids_bt, d_bti, entries)
        places = torch.searchsorted(kept, ids_bt.contiguous()).clamp(max=self.side - 1)
        scale = (kept[places] == ids_bt).to(d_bti.dtype) * (entries / self.side) ** 0.5
        return self._sparse.lookup(name, places, d_bti * scale[..., None], self.side)


class Dense(_Keyed):
    """The whole gradient times a `[k, p]` matrix of +-1/sqrt(k): the reference, p k operations an example.

    The matrix is made anew for each batch, in pieces; variance as of `rademacher` with k rows, over all parameters.
    Source: Achlioptas 2003; for gradients Park et al. 2023 (TRAK).
    """

    together: ClassVar[bool] = True

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(seed)
        self.size = size

    def width(self, name: str, shape: Sequence[int]) -> int:
        return self.size

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Columns of the matrix as rows, `[stop - start, k]` of int8 +-1: a counter has 64 rows of one column."""
        columns, words = np.arange(start, stop, dtype=np.uint64), _counters(-(-self.size // 64))
        counters = (columns[:, None] << np.uint64(32)) | words
        return signs(counters, seed=self.seed, label=f"{name}/dense")[:, : self.size]

    def full(self, name: str, grad: Tensor) -> Tensor:
        x_bp = grad.reshape(len(grad), -1)
        found, step = x_bp.new_zeros(len(x_bp), self.size), max(1, FORMED // self.size)
        for start in range(0, x_bp.shape[1], step):
            cells = x_bp[:, start : start + step]
            found += cells @ self.piece(name, start, start + cells.shape[1]).to(x_bp.device, x_bp.dtype)
        return found / self.size**0.5


KINDS: dict[str, Callable[[int, int], Sketch]] = {
    "factored": Factored, "sparse": Sparse, "masked": Masked, "dense": Dense, "exact": lambda size, seed: Exact(),
}  # fmt: skip


def sketch(kind: str, size: int, seed: int) -> Sketch:
    """The sketch of a name. `size` is the rank of "factored" and the numbers kept of the others; 0 is `Exact`."""
    return KINDS[kind](size, seed) if size else Exact()
