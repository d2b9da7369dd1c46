"""The judgement of a language model against a plain loop over transformers' own full logits."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from assay.core.errors import InputError  # noqa: E402
from assay.core.method import Scorer, make  # noqa: E402
from assay.core.pool import Pool  # noqa: E402
from assay.core.run import Run  # noqa: E402
from assay.measure import Measurer, uses_model  # noqa: E402
from assay.train.hf import CausalLM  # noqa: E402
from assay.train.models import init_params, train_tokenizer  # noqa: E402
from helpers import classifier, language, text_pool, vector_pool  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 400
ASKED = {"template": "Read: {text}\nGood? ", "yes": ["the", "sees"], "no": ["under"]}
TEXTS = ["the cat runs", "a small tree sees 42", "x = y + 1", "the dog under the green tree runs over a cat " * 6, "z"]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of random weights, and one whose logits are capped, so that they are no plain readout."""
    path = tmp_path_factory.mktemp(request.param)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    if request.param == "llama":
        config = transformers.LlamaConfig(**sizes)
    else:
        config = transformers.Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=3.0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(train_tokenizer(text_pool(60), vocab=VOCAB))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return path


def measurer(out: Path, texts: list[str], **options: Any) -> Measurer:
    run = Run.open(out, {"name": "ask"})
    run.close()
    pool = Pool.from_columns({"text": texts})
    return Measurer(run, pool, pool, **options)


def asked(out: Path, folder: Path, texts: list[str], **fields: Any) -> np.ndarray:
    options = {"name": "ask_llm", "llm": str(folder), "context": 48, **ASKED, **fields}
    return measurer(out, texts).table(make(Scorer, options)).values


def plainly(folder: Path, texts: list[str], context: int = 48) -> np.ndarray:
    """One prompt at a time: all logits of all positions, softmax, sums over the first tokens of the words."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encode = lambda t: tokenizer.encode(t, add_special_tokens=False).ids  # noqa: E731
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    before, after = [0, *encode("Read: ")], encode("\nGood? ")
    rows = []
    for text in texts:
        middle = encode(text)[: context - len(before) - len(after)]
        with torch.no_grad():
            logits = model(torch.tensor([before + middle + after])).logits[0, -1].double()
        p = logits.softmax(0).numpy()
        yes = sum(p[i] for i in {encode(w)[0] for w in ASKED["yes"]})
        no = sum(p[i] for i in {encode(w)[0] for w in ASKED["no"]})
        rows.append([np.log(yes) - np.log(no), yes, yes + no])
    return np.array(rows)


def test_log_odds_are_those_of_full_logits(folder: Path, tmp_path: Path) -> None:
    """Batches of unlike length, padded; a text too long loses its end and not the question."""
    found = asked(tmp_path, folder, TEXTS)
    np.testing.assert_allclose(found, plainly(folder, TEXTS), atol=2e-5)
    assert len(set(np.round(found[:, 0], 4))) == len(TEXTS)


def test_batch_order_and_company_do_not_matter(folder: Path, tmp_path: Path) -> None:
    whole = asked(tmp_path / "a", folder, TEXTS)
    turned = asked(tmp_path / "b", folder, TEXTS[::-1])[::-1]
    alone = np.concatenate([asked(tmp_path / f"{k}", folder, [t]) for k, t in enumerate(TEXTS)])
    np.testing.assert_allclose(turned, whole, atol=2e-5)
    np.testing.assert_allclose(alone, whole, atol=2e-5)


def test_a_text_cannot_write_special_tokens(folder: Path, tmp_path: Path) -> None:
    """The end mark in a text is read as its characters; in the template it is the mark."""
    made = make(Scorer, {"name": "ask_llm", "llm": str(folder), "context": 48, **ASKED})
    context = SimpleNamespace(pool=Pool.from_columns({"text": TEXTS}))
    state = made.init(context)  # type: ignore[arg-type]
    (prompt,) = state.prompts(["a <|end|> b"])
    assert prompt.count(0) == 1, "only the start mark"
    marked = make(Scorer, {**made.spec(), "template": "<|end|>{text} "})
    assert marked.init(context).prompts(["a"])[0].count(0) == 2  # type: ignore[arg-type]
    lengths = np.array([len(p) for p in state.prompts(TEXTS)])
    assert state.flops(context.pool) == pytest.approx(state.task.forward_flops(lengths)), "the ledger has the prompts"
    again = pickle.loads(pickle.dumps(state))
    assert "weights" not in again.__dict__, "weights are read where they are needed"
    assert (again.ask(TEXTS) == state.ask(TEXTS)).all()


def test_the_scoring_models_are_asked_where_none_is_named(tmp_path: Path) -> None:
    """The built-in decoder: mean over the models of what their full logits say."""
    pool = text_pool(6)
    task, _ = language(pool, tmp_path / "pool", context=40)
    models = [init_params(task.module, s) for s in (1, 2)]
    made = make(Scorer, {"name": "ask_llm", **ASKED})
    assert uses_model(made) and not uses_model(make(Scorer, {"name": "ask_llm", "llm": "somewhere"}))
    texts = pool.column("text")
    run = Run.open(tmp_path / "run", {"name": "ask"})
    run.close()
    at = Measurer(
        run, pool, pool, task=task, models=models, encodings={pool.fingerprint: tmp_path / "pool"}, key="k"
    )  # fmt: skip
    found = at.table(made).values
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(task.tokenizer)
    encode = lambda t: tokenizer.encode(t).ids  # noqa: E731
    before, after = [0, *encode("Read: ")], encode("\nGood? ")
    truth = np.zeros(len(texts))
    for k, text in enumerate(texts):
        ids = torch.tensor([before + encode(text)[: 40 - len(before) - len(after)] + after])
        for params in models:
            with torch.no_grad():
                z = task.logits(params, {"tokens": ids})[0, -1].double()
            yes, no = ([*{encode(w)[0] for w in ASKED[side]}] for side in ("yes", "no"))
            truth[k] += float(z[yes].logsumexp(0) - z[no].logsumexp(0)) / 2
    np.testing.assert_allclose(found[:, 0], truth, atol=1e-5)


def test_other_weights_in_the_folder_are_another_method(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "m")
    code = lambda: make(Scorer, {"name": "ask_llm", "llm": str(tmp_path / "m"), "context": 48}).code()  # noqa: E731
    before = code()
    assert before == code()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(tmp_path / "m")
    assert code() != before


def test_what_cannot_be_asked_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be told apart"):
        asked(tmp_path / "1", folder, TEXTS, yes=["the"], no=["the "])
    with pytest.raises(InputError, match="leaves no room"):
        asked(tmp_path / "2", folder, TEXTS, template="word " * 60 + "{text}")
    with pytest.raises(InputError, match="must name"):
        make(Scorer, {"name": "ask_llm", "template": "no text"})
    with pytest.raises(InputError, match="no such model directory"):
        asked(tmp_path / "3", Path("./nowhere/at/all"), TEXTS)
    pool = vector_pool(6)
    task, _ = classifier(pool, tmp_path / "vectors")
    context = SimpleNamespace(pool=pool, task=task, models=[init_params(task.module, 0)])
    with pytest.raises(InputError, match="no language model"):
        make(Scorer, "ask_llm").init(context)  # type: ignore[arg-type]
    (tmp_path / "pickled").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "pickled" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="is a pickle"):
        asked(tmp_path / "4", tmp_path / "pickled", TEXTS)
    assert CausalLM(path=str(folder), context=48).start == 0
