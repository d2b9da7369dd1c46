"""Labelled images: three ways of keeping them, one pool of pixels, and wrong labels whose truth is known."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from assay import study
from assay.core.errors import InputError
from assay.core.pool import Pool
from assay.data import toys
from assay.data.images import fingerprint, labelled_images
from assay.job import run_study
from assay.numerics import persample
from assay.train.models import read_task, write_task
from assay.train.vision import ImageClassifier
from helpers import looped, wide


def arrays(channels: int = 1) -> dict[str, np.ndarray]:
    """30 and 12 small images of 3 classes."""
    rng = np.random.default_rng(0)
    shape = (4, 6) if channels == 1 else (4, 6, channels)
    found = {}
    for name, n in (("train", 30), ("test", 12)):
        found[f"x_{name}"] = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        found[f"y_{name}"] = (np.arange(n) % 3).astype(np.uint8)
    return found


def npz(folder: Path, name: str = "images", **changed: Any) -> Path:
    np.savez(folder / f"{name}.npz", allow_pickle=False, **{**arrays(), **changed})
    return folder / f"{name}.npz"


def idx(folder: Path, held: dict[str, np.ndarray], zipped: bool) -> Path:
    folder.mkdir()
    for name, prefix in (("train", "train"), ("test", "t10k")):
        for kind, array in (("images", held[f"x_{name}"]), ("labels", held[f"y_{name}"])):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            data, file = head + array.tobytes(), f"{prefix}-{kind}-idx{array.ndim}-ubyte"
            if zipped:
                (folder / f"{file}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / file).write_bytes(data)
    return folder


def pixels(table: pa.Table) -> np.ndarray:
    return np.array(table["pixels"].to_pylist())


def test_pixels_are_scaled_moved_and_recorded(tmp_path):
    held: dict[str, Any] = arrays()
    pool, target, truth, about = labelled_images(npz(tmp_path), size=20, count=5, take="first")
    x = held["x_train"][:20] / 255.0
    assert about == {
        "shape": [1, 4, 6], "classes": 3, "mean": pytest.approx([x.mean()]), "std": pytest.approx([x.std()]),
        "scale": 255, "take": "first",
    }  # fmt: skip
    assert np.allclose(pixels(pool), ((x - x.mean()) / x.std()).reshape(20, 24), atol=1e-5)
    unseen = (held["x_test"][:5] / 255.0 - x.mean()) / x.std()
    assert np.allclose(pixels(target), unseen.reshape(5, 24), atol=1e-5), "the target is moved as the pool is"
    assert pool["label"].to_pylist() == held["y_train"][:20].tolist() and truth.num_rows == 0
    assert target["label"].to_pylist() == held["y_test"][:5].tolist()


def test_mnists_own_files_say_the_same_as_an_npz(tmp_path):
    want = labelled_images(npz(tmp_path), take="first")
    for zipped in (False, True):
        got = labelled_images(idx(tmp_path / str(zipped), arrays(), zipped), take="first")
        assert got[0].equals(want[0]) and got[1].equals(want[1]) and got[3] == want[3]


@pytest.mark.parametrize("struct", [False, True])
def test_encoded_colour_images(tmp_path, struct):
    image = pytest.importorskip("PIL.Image", reason="encoded images need Pillow: assay-data[images]")
    held = arrays(channels=3)
    for name in ("train", "test"):
        data = []
        for x in held[f"x_{name}"]:
            file = io.BytesIO()
            image.fromarray(x).save(file, format="PNG")
            data.append({"bytes": file.getvalue(), "path": None} if struct else file.getvalue())
        table = pa.table({"image": data, "label": held[f"y_{name}"].astype(int).tolist()})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    npz(tmp_path, "same", **held)
    got, want = labelled_images(tmp_path, size=9, seed=3), labelled_images(tmp_path / "same.npz", size=9, seed=3)
    assert got[0].equals(want[0]) and got[1].equals(want[1]) and got[3]["shape"] == [3, 4, 6]
    first = held["x_train"][0].astype(float) / 255
    x = labelled_images(tmp_path, take="first")[0]
    mean, std = (held["x_train"] / 255.0).mean(axis=(0, 1, 2)), (held["x_train"] / 255.0).std(axis=(0, 1, 2))
    assert np.allclose(pixels(x)[0].reshape(3, 4, 6), ((first - mean) / std).transpose(2, 0, 1), atol=1e-5)


def test_a_draw_is_keyed_and_spreads_over_the_file(tmp_path):
    held: dict[str, Any] = arrays()
    held["y_train"] = np.sort(held["y_train"])
    file = npz(tmp_path, **held)
    drawn = [labelled_images(file, size=12, seed=seed)[0] for seed in (0, 0, 1)]
    assert drawn[0].equals(drawn[1]) and not drawn[0].equals(drawn[2])
    assert len(set(drawn[0]["label"].to_pylist())) == 3, "a file that is sorted by class is no trap"
    more = labelled_images(file, size=15, seed=0)[0]
    assert more["id"].to_pylist()[:12] == drawn[0]["id"].to_pylist(), "a larger draw holds the smaller"


def test_planted_labels_and_their_truth(tmp_path):
    file = npz(tmp_path)
    honest, _, none, _ = labelled_images(file, seed=2)
    pool, target, truth, _ = labelled_images(file, flip=0.2, seed=2)
    own = dict(zip(honest["id"].to_pylist(), honest["label"].to_pylist(), strict=True))
    given = dict(zip(pool["id"].to_pylist(), pool["label"].to_pylist(), strict=True))
    wrong = {i for i in own if own[i] != given[i]}
    assert len(wrong) == 6 and wrong == set(truth["id"].to_pylist()) and none.num_rows == 0
    assert {i: str(own[i]) for i in truth["id"].to_pylist()} == dict(
        zip(truth["id"].to_pylist(), truth["detail"].to_pylist(), strict=True)
    )
    assert all(0 <= label < 3 for label in given.values())
    assert set(pool.column_names) == {"id", "pixels", "label", "domain"}, "no method can see which labels are wrong"
    assert pool["domain"].to_pylist() == [f"class {k}" for k in pool["label"].to_pylist()]
    assert target.equals(labelled_images(file, seed=2)[1]), "the target's labels stay right"


def test_bad_images(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        fingerprint(tmp_path / "no.npz")
    (tmp_path / "junk.npz").write_bytes(b"junk")
    (tmp_path / "empty").mkdir()
    broken = idx(tmp_path / "broken", arrays(), False)
    labels = broken / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    for path, why in (
        (tmp_path / "junk.npz", "unreadable"), (tmp_path / "empty", "unreadable"), (broken, "unreadable"),
        (npz(tmp_path, "a", x_train=np.zeros((30, 4, 6))), "unreadable"),
        (npz(tmp_path, "b", y_test=np.zeros(12)), "unreadable"),
        (npz(tmp_path, "c", y_test=np.full(12, -1)), "no list of classes"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why):
            labelled_images(path)
    with pytest.raises(InputError, match="pool.size = 31"):
        labelled_images(npz(tmp_path), size=31)
    with pytest.raises(InputError, match="target.count = 13"):
        labelled_images(npz(tmp_path), count=13)


def test_a_file_is_known_by_its_content(tmp_path):
    first = fingerprint(npz(tmp_path))
    assert fingerprint(npz(tmp_path)) == first
    held: dict[str, Any] = arrays()
    held["x_test"][0, 0, 0] ^= 1
    assert fingerprint(npz(tmp_path, **held)) != first


def test_digits_of_chosen_sizes():
    train, test, truth = toys.digits(flip=0.0, train=1000, test=300)
    assert (train.num_rows, test.num_rows, truth.num_rows) == (1000, 300, 0)
    whole, rest, _ = toys.digits(flip=0.0)
    assert whole.slice(0, 1000).equals(train) and whole.slice(1000, 100).equals(test.slice(0, 100))
    assert len(whole) + len(rest) == 1797
    for sizes in ({"train": 1796}, {"train": 1500, "test": 298}):
        with pytest.raises(InputError, match="there are 1797"):
            toys.digits(**sizes)


def test_what_a_study_may_say_of_images():
    def parsed(**parts: Any) -> study.Study:
        base = {"pool": {"builtin": "images", "path": "a.npz"}, "target": {}, "task": {"kind": "convnet"}}
        return study.parse({**base, **parts})

    assert parsed().supplied()["path"] == Path("a.npz")
    linear = parsed(task={"kind": "classifier", "inputs": 784, "dropout": 0.1, "hidden": [5], "activation": "relu"})
    assert linear.task.classifier().describe()["dropout"] == 0.1
    assert isinstance(parsed().task.classifier(), ImageClassifier)
    for parts, match in (
        ({"pool": {"builtin": "images"}}, "no path"), ({"target": {"path": "b"}}, "target.path does nothing"),
        ({"task": {}}, "does not fit the pool"), ({"task": {"kind": "convnet", "dropout": 0.1}}, "dropout"),
        ({"pool": {"builtin": "digits", "take": "first"}, "task": {"kind": "classifier"}}, "pool.take"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            parsed(**parts)


def test_the_convnet_is_the_sum_that_it_says(tmp_path):
    task = ImageClassifier(shape=(2, 5, 4), filters=(3, 6), classes=4)
    assert task.inputs == 40
    params = wide(task)
    x = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 3, 1])
    h = x.view(3, 2, 5, 4)
    for layer in ("convs.0", "convs.1"):
        h = F.gelu(F.conv2d(h, params[f"{layer}.weight"], params[f"{layer}.bias"], stride=2, padding=1))
    assert h.shape == (3, 6, 2, 1)
    logits = h.flatten(2).mean(dim=2) @ params["readout.weight"].T + params["readout.bias"]
    want = logits.logsumexp(dim=1) - logits[torch.arange(3), y]
    assert torch.allclose(task.loss(params, {"x": x, "y": y}), want, rtol=1e-12)
    assert task.forward_flops(np.ones(2)) == 2 * (2 * 9 * (2 * 3 * 3 * 2 + 3 * 6 * 2 * 1) + 2 * 6 * 4)
    write_task(tmp_path / "task.json", task)
    assert read_task(tmp_path / "task.json") == task
    with pytest.raises(InputError, match="filters"):
        ImageClassifier(hidden=(4,))


def test_gradients_of_the_convnet_by_its_rules(tmp_path):
    task = ImageClassifier(shape=(1, 4, 6), filters=(3, 4), classes=3)
    table = labelled_images(npz(tmp_path))[0]
    pool = Pool.from_columns(table)
    task.prepare(pool, tmp_path)
    encoded, params = task.encoded(tmp_path), wide(task)
    want = looped(task, params, encoded, np.arange(4))
    got, _ = persample.gradients(task.module, task.loss, params, encoded.inputs(np.arange(4)))
    for name in params:
        assert torch.allclose(got[name], want[name].flatten(1), rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("kind", ["classifier", "convnet"])
def test_a_study_of_images_runs(tmp_path, kind):
    held: dict[str, Any] = arrays()
    for name in ("train", "test"):  # bright where the class says, so that there is something to learn
        held[f"x_{name}"][np.arange(len(held[f"y_{name}"])), held[f"y_{name}"], :] = 255
    task = {"kind": "classifier", "inputs": 24, "hidden": [8], "dropout": 0.1} if kind == "classifier" else {
        "kind": "convnet", "shape": [1, 4, 6], "filters": [4, 8]
    }  # fmt: skip
    recipe = {"terms_per_step": 10, "optimiser": "momentum", "lr": 0.1}
    chosen = study.parse({
        "pool": {"builtin": "images", "path": str(npz(tmp_path, **held)), "flip": 0.1}, "target": {"count": 12},
        "task": {**task, "classes": 3}, "budget": "50%", "methods": ["random", "loss", "graddot"],
        "proxy": {"steps": 20, "recipe": recipe}, "train": {"steps": 20, "recipe": recipe},
        "verify": {"seeds": 2, "random": 1},
    })  # fmt: skip
    result = run_study(chosen, tmp_path / "run", workers=1)
    assert [a["name"] for a in result["arms"]] == ["random-1", "loss", "graddot"]
    assert all(0 < a["judged_loss"] < 3 for a in result["arms"])
    (made,) = (tmp_path / "run").rglob("made.json")
    assert json.loads(made.read_text())["shape"] == [1, 4, 6]
    again = run_study(chosen, tmp_path / "run", workers=1)
    assert [a["judged_loss"] for a in again["arms"]] == [a["judged_loss"] for a in result["arms"]]
