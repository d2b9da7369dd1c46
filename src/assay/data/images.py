"""Labelled images as a pool and a target of pixels: .npz files, MNIST's own files, Parquet files of encoded images."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assay.core.errors import InputError
from assay.core.keys import digest, digest_file
from assay.data.plant import Truth, key, opaque, permuted, tabulate

Take = Literal["first", "random"]
IDX = {"train": "train", "test": "t10k"}
# How the sums of squares are taken: a few images at a time, in float64.
BLOCK = 4096


@dataclass(frozen=True)
class _Half:
    """Images of one half: labels of all, and the pixels `[n, height, width, channels]` uint8 of some rows."""

    labels: np.ndarray
    pixels: Callable[[np.ndarray], np.ndarray]


def labelled_images(
    path: Path, *, size: int | None = None, count: int | None = None, take: Take = "random", flip: float = 0.0,
    seed: int = 0,
) -> tuple[pa.Table, pa.Table, pa.Table, dict[str, Any]]:  # fmt: skip
    """A pool of `size` training images, a target of `count` test images (all, where not given), the truth about wrong
    labels, and what was done to the pixels.

    `path` is an .npz with x_train, y_train, x_test and y_test; a folder with MNIST's own files, gzipped or not
    (`train-images-idx3-ubyte` and so on); or a folder with train.parquet and test.parquet, columns image (encoded) and
    label. `take` 'first' reads files from the top, as published recipes do; 'random' draws by (seed, row). Pixels are
    scaled to 0..1 and then, for each channel, moved to mean 0 and standard deviation 1 of the images of the pool; they
    are laid out as channel, row, column. A share `flip` of the pool's labels is made wrong, and `truth` names them.
    """
    halves = _read(path)
    classes = int(max(half.labels.max() for half in halves.values())) + 1
    chosen = {}
    for name, wanted in (("train", size), ("test", count)):
        half = halves[name]
        rows = np.arange(len(half.labels)) if take == "first" else np.array(permuted(len(half.labels), seed, name))
        if wanted is not None and wanted > len(rows):
            what = {"train": "pool.size", "test": "target.count"}[name]
            raise InputError(f"{what} = {wanted}, and there are {len(rows)} images", where=path, fix=f"lower {what}")
        chosen[name] = rows[:wanted]
    pixels = {name: halves[name].pixels(rows) for name, rows in chosen.items()}
    mean, std = _moments(pixels["train"])
    own = chosen["train"].tolist()
    labels = halves["train"].labels
    wrong = sorted(own, key=lambda i: key(seed, "flip", i))[: round(flip * len(own))]
    given = {i: (int(labels[i]) + 1 + key(seed, "class", i) % (classes - 1)) % classes for i in wrong} if flip else {}

    def table(name: str) -> pa.Table:
        rows, x = chosen[name].tolist(), (pixels[name] / np.float32(255) - mean) / std
        flat = np.moveaxis(x, 3, 1).astype(np.float32).reshape(len(rows), -1)
        kept = [given.get(i, int(labels[i])) if name == "train" else int(halves[name].labels[i]) for i in rows]
        column = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
        return pa.table({
            "id": pa.array([opaque(seed, name, i) for i in rows], pa.string()),
            "pixels": column.cast(pa.list_(pa.float32())),
            "label": pa.array(kept, pa.int64()), "domain": pa.array([f"class {k}" for k in kept], pa.string()),
        })  # fmt: skip

    flipped = [(opaque(seed, "train", i), "flipped", "", str(int(labels[i]))) for i in own if i in given]
    height, width, channels = pixels["train"].shape[1:]
    about = {
        "shape": [channels, height, width], "classes": classes, "mean": mean.tolist(), "std": std.tolist(),
        "scale": 255, "take": take,
    }  # fmt: skip
    return table("train"), table("test"), tabulate(flipped, Truth._fields), about


def fingerprint(path: Path) -> str:
    """Hash of the file, or of all files in the folder, that images are read from."""
    if not path.exists():
        raise InputError("no such file or folder of images", where=path, fix="check pool.path")
    files = (
        [path] if path.is_file() else sorted(p for p in path.iterdir() if "ubyte" in p.name or p.suffix == ".parquet")
    )
    return digest([(file.name, digest_file(file)) for file in files])


def _moments(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, `[c]` float32, of pixels / 255."""
    count, total, squares = pixels[..., 0].size, 0.0, 0.0
    for start in range(0, len(pixels), BLOCK):
        x = pixels[start : start + BLOCK].astype(np.float64) / 255
        total, squares = total + x.sum(axis=(0, 1, 2)), squares + (x * x).sum(axis=(0, 1, 2))
    mean = np.asarray(total) / count
    std = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 0.0))
    return mean.astype(np.float32), np.where(std > 0, std, 1.0).astype(np.float32)


def _read(path: Path) -> dict[str, _Half]:
    try:
        if path.is_file():
            halves = _npz(path)
        elif (path / "train.parquet").exists():
            halves = {name: _parquet(path / f"{name}.parquet") for name in ("train", "test")}
        else:
            halves = {name: _idx(path, prefix) for name, prefix in IDX.items()}
    except (OSError, ValueError, KeyError, EOFError, pa.ArrowException) as error:
        raise InputError(
            "unreadable images", where=path, why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="give an .npz with x_train, y_train, x_test and y_test, a folder with MNIST's own files, or a folder "
            "with train.parquet and test.parquet (columns image and label)",
        ) from error  # fmt: skip
    for name, half in halves.items():
        if half.labels.ndim != 1 or half.labels.dtype.kind not in "iu" or not len(half.labels) or half.labels.min() < 0:
            raise InputError(f"the {name} labels are no list of classes", where=path, fix="whole numbers from 0")
    return halves


def _npz(path: Path) -> dict[str, _Half]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: _half(arrays[f"x_{name}"], arrays[f"y_{name}"]) for name in ("train", "test")}


def _half(images: np.ndarray, labels: np.ndarray) -> _Half:
    """Of an array `[n, height, width]` or `[n, height, width, channels]` of bytes."""
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
        raise ValueError(f"images are {images.dtype} of shape {images.shape}, with {len(labels)} labels")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}")
    return _Half(labels.astype(np.int64), lambda rows: images[rows])


def _idx(folder: Path, prefix: str) -> _Half:
    """MNIST's own format: two zero bytes, a type (8 is uint8), the number of axes, their sizes as big-endian int32."""
    found = []
    for kind, axes in (("images", 3), ("labels", 1)):
        names = [f"{prefix}-{kind}{dot}idx{axes}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
        file = next((folder / name for name in names if (folder / name).exists()), None)
        if file is None:
            raise OSError(f"there is no {names[0]} (or {names[1]})")
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        shape = np.frombuffer(data, ">i4", axes, offset=4)
        if data[:4] != bytes([0, 0, 8, axes]) or len(data) != 4 + 4 * axes + int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"{file.name} is not the file that its name says")
        found.append(np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape))
    return _half(*found)


def _parquet(path: Path) -> _Half:
    """Encoded images (bytes, or Hugging Face's {bytes, path}) and labels; only the rows asked for are decoded."""
    table = pq.read_table(path, columns=["image", "label"])

    def pixels(rows: np.ndarray) -> np.ndarray:
        values = table["image"].take(pa.array(rows)).to_pylist()
        decoded = [_decoded(v["bytes"] if isinstance(v, dict) else v, path) for v in values]
        if len({x.shape for x in decoded}) > 1:
            raise InputError("the images are of different sizes", where=path, fix="resize them to one size")
        return np.stack(decoded)

    return _Half(np.asarray(table["label"].to_pylist()), pixels)


def _decoded(data: bytes, path: Path) -> np.ndarray:
    try:
        from PIL import Image  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError(
            "encoded images need Pillow",
            where=path,
            why="it reads JPEG and PNG",
            fix='pip install "assay-data[images]"',
        ) from error
    try:
        image = Image.open(io.BytesIO(data))
        return np.asarray(image if image.mode == "L" else image.convert("RGB")).reshape(*image.size[::-1], -1)
    except OSError as error:
        raise InputError("an image cannot be decoded", where=path, why=str(error), fix="drop or mend it") from error
