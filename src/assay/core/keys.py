"""Keys: content hashes and counter-based randomness, so that nothing depends on order, shard or worker."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, NaN refused.

    >>> canonical({"b": 1, "a": (2.5, None)})
    '{"a":[2.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def without_nan(value: Any) -> Any:
    """With None for the floats that JSON has no word for: NaN and the infinite.

    >>> without_nan({"a": (1.0, float("inf"))})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(*parts: Any) -> str:
    """xxh3-128 of the canonical JSON of the parts, as 32 hex digits. Not cryptographic."""
    return xxhash.xxh3_128_hexdigest(canonical(parts).encode())


def digest_ids(ids: np.ndarray) -> str:
    """xxh3-128 of ids joined by newlines, streamed."""
    hasher = xxhash.xxh3_128()
    for start in range(0, len(ids), 4096):
        hasher.update((b"\n" if start else b"") + b"\n".join(ids[start : start + 4096].tolist()))
    mapped = getattr(ids, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)  # of a mapped file: what was read does not stay with this process
    return hasher.hexdigest()


def digest_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, streamed."""
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def digest_sources(*paths: Path) -> str:
    """Hash of the text of source files and of all `.py` files under given folders, in a stable order."""
    files: list[Path] = []
    for path in paths:
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return digest([(file.name, digest_file(file)) for file in files])


def encode_ids(ids: Iterable[str | bytes]) -> np.ndarray:
    """Ids as a fixed-width byte array: a quarter of the memory of numpy's unicode arrays.

    >>> encode_ids(["b", "aa"])
    array([b'b', b'aa'], dtype='|S2')
    """
    raw = [i if isinstance(i, bytes) else i.encode() for i in ids]
    return np.array(raw, dtype=f"S{max((len(r) for r in raw), default=1) or 1}")


def decode_ids(ids: np.ndarray) -> list[str]:
    """The inverse of `encode_ids`."""
    return [i.decode() for i in ids.tolist()]


def hash_ids(ids: Sequence[bytes] | np.ndarray, *salt: Any) -> np.ndarray:
    """One uint64 for each id, keyed by the salt (seed, purpose, ...): `xxh3_64(id, seed = xxh3_64(salt))`."""
    seed = xxhash.xxh3_64_intdigest(canonical(salt).encode())
    # A few at a time: as Python objects, ids take three times the room.
    blocks = (ids[start : start + 4096] for start in range(0, len(ids), 4096))
    raw = (i for block in blocks for i in (block.tolist() if isinstance(block, np.ndarray) else block))
    return np.fromiter((xxhash.xxh3_64_intdigest(i, seed) for i in raw), dtype=np.uint64, count=len(ids))


def uniform(ids: Sequence[bytes] | np.ndarray, *salt: Any) -> np.ndarray:
    """One float64 in the open interval (0, 1) for each id, keyed by the salt; 53 random bits."""
    return ((hash_ids(ids, *salt) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def shuffled(ids: np.ndarray, *salt: Any) -> np.ndarray:
    """Positions of `ids` in a keyed random order: it depends on the set of ids, not on their order."""
    return np.lexsort((ids, hash_ids(ids, *salt)))


def write_text(path: Path, text: str) -> None:
    """Write a file aside, then rename it: a reader sees the old file or the new one, never half of one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """As `write_text`, for bytes. The temporary name carries the process id, so that two writers cannot mix."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_bytes(data)
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """Readable JSON with sorted keys, written aside and renamed."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")
