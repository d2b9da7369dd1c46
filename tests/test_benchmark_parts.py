"""What the comparisons with other libraries rest on: all are given the same tokens, and what they did is checked."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return lambda name: importlib.import_module(f"parts.{name}")


def test_documents_are_cut_where_the_tokenizer_cuts(parts, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    module = parts("world")
    monkeypatch.setattr(module, "TEXTS", 500)
    made = module.world(tmp_path, documents=600, layers=1, width=32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.model)
    texts = [json.loads(line)["text"] for line in made.documents.read_text(encoding="utf-8").splitlines()]
    tokens = tokenizer(texts)["input_ids"]
    assert tuple(len(row) for row in tokens) == made.lengths
    assert len(tokens) == 600 and max(made.lengths) == module.LENGTH
    assert len(set(texts)) > 590  # more documents than texts, and yet no round repeats the last one

    again = module.world(tmp_path / "again", documents=600, layers=1, width=32)
    assert again.lengths == made.lengths and again.documents.read_bytes() == made.documents.read_bytes()
    weights = "model.safetensors"
    assert (again.model / weights).read_bytes() == (made.model / weights).read_bytes()


def test_a_cut_loses_whole_words_only(parts):
    from tokenizers import Tokenizer

    from assay.core.pool import Pool
    from assay.train.models import train_tokenizer

    module = parts("world")
    words = ["alpha", "zq", "quixotic", "beta"]
    text = " ".join(words[i * i % 4] + str(i) for i in range(100))
    tokenizer = train_tokenizer(Pool.from_columns({"id": ["0"], "text": [text]}), vocab=300)
    (cut,), (length,) = module._cut(tokenizer, [text])
    whole = Tokenizer.from_str(tokenizer).encode(text).ids
    assert Tokenizer.from_str(tokenizer).encode(cut).ids == whole[:length]
    assert text.startswith(cut) and module.LENGTH - 12 < length <= module.LENGTH


def test_a_peer_that_is_not_there_is_left_out_and_said(parts, tmp_path, capsys):
    peers = parts("peers")
    assert peers.rows(True, 10, tmp_path / "python") == []
    said = capsys.readouterr().err
    assert all(f"{peer.name} is left out" in said for peer in peers.PEERS)


def test_the_option_comes_before_the_environment(parts, tmp_path, monkeypatch):
    peers = parts("peers")
    monkeypatch.delenv("ASSAY_PEERS", raising=False)
    assert peers.interpreter() == peers.PYTHON
    monkeypatch.setenv("ASSAY_PEERS", str(tmp_path / "a"))
    assert peers.interpreter() == tmp_path / "a"
    assert peers.interpreter(tmp_path / "b") == tmp_path / "b"


@pytest.mark.parametrize("fault", ["short", "zero", "nan"])
def test_less_than_the_task_is_not_timed(parts, fault):
    peers = parts("peers")
    features = np.ones((5000, 3), dtype=np.float32)
    peers.check("a tool", features, 5000)
    if fault == "short":
        features = features[:-1]
    else:
        features[4999] = 0 if fault == "zero" else [0, np.nan, 0]
    with pytest.raises(RuntimeError, match="a tool wrote"):
        peers.check("a tool", features, 5000)
