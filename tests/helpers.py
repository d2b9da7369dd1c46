"""What several test modules share: small tasks and pools, and functions that worker processes can import."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from assay.core.errors import InputError
from assay.core.pool import Pool
from assay.core.task import Encoded, Params, Task
from assay.train.models import Classifier, LanguageModel, init_params, train_tokenizer

WORDS = "the a cat dog tree sees runs under over green small Ünïcode 42 x = y + 1 def return".split()


def text_pool(n: int, *, seed: int = 0, longest: int = 12) -> Pool:
    """Distinct texts of 1 to `longest` words."""
    rng = np.random.default_rng(seed)
    texts = [f"{i} " + " ".join(rng.choice(WORDS, rng.integers(1, longest + 1))) for i in range(n)]
    return Pool.from_columns({"text": texts})


def vector_pool(n: int, *, inputs: int = 5, classes: int = 3, seed: int = 0) -> Pool:
    rng = np.random.default_rng(seed)
    x, labels = rng.normal(size=(n, inputs)), rng.integers(0, classes, n)
    x[np.arange(n), labels % inputs] += 1.0
    return Pool.from_columns({"pixels": x.tolist(), "label": labels.tolist()})


def language(pool: Pool, path: Path, **options: Any) -> tuple[LanguageModel, Encoded]:
    sizes = {"vocab": 280, "width": 16, "layers": 2, "heads": 2, "context": 24, **options}
    task = LanguageModel(tokenizer=train_tokenizer(pool, vocab=sizes["vocab"]), **sizes)
    return task, prepared(task, pool, path)


def classifier(pool: Pool, path: Path, *, hidden: tuple[int, ...] = ()) -> tuple[Classifier, Encoded]:
    task = Classifier(inputs=5, hidden=hidden, classes=3)
    return task, prepared(task, pool, path)


def prepared(task: Task, pool: Pool, path: Path) -> Encoded:
    path.mkdir(parents=True, exist_ok=True)
    task.prepare(pool, path)
    return task.encoded(path)


def wide(task: Task, seed: int = 0) -> dict[str, Tensor]:
    """Initial values in float64, moved so that no readout is near zero and no gain is exactly one."""
    rng = torch.Generator().manual_seed(seed + 1)
    start = init_params(task.module, seed, torch.float64)
    return {n: p + 0.3 * torch.randn(p.shape, generator=rng, dtype=torch.float64) for n, p in start.items()}


def looped(task: Task, params: Params, encoded: Encoded, rows: np.ndarray) -> dict[str, Tensor]:
    """Per-example gradients of the loss, one example and one backward at a time: the truth of the rules."""
    found: dict[str, list[Tensor]] = {n: [] for n in params}
    for row in rows:
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        loss = task.loss(leaves, encoded.inputs(np.array([row]))).sum()
        for name, grad in zip(params, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            found[name].append(grad)
    return {n: torch.stack(g) for n, g in found.items()}


@functools.cache
def tiny_encoder() -> str:
    """The folder of a random BERT with its tokenizer; removed when the process ends. Skips without transformers."""
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'assay-data[hf]'")
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_str(train_tokenizer(text_pool(200), vocab=276))
    tokenizer.add_special_tokens(["[CLS]", "[SEP]", "[PAD]"])
    marks = [(t, tokenizer.token_to_id(t)) for t in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*marks)  # type: ignore[assignment]
    config = transformers.BertConfig(
        vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(config)
    for name, p in init_params(model, 0).items():
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
        model.get_parameter(name).data.copy_(p + 0.15 * noise)
    folder = tempfile.TemporaryDirectory(prefix="assay-encoder-")
    atexit.register(folder.cleanup)
    model.save_pretrained(folder.name)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder.name)
    return folder.name


# For tests/test_engine.py.


def scaled(state: int, item: int) -> int:
    time.sleep(0.01 * (item % 3))
    return state * item


def threads(state: None, item: int) -> tuple[int, float]:
    rng = np.random.default_rng(item)
    x = torch.from_numpy(rng.normal(size=(257, 129)).astype(np.float32))
    return torch.get_num_threads(), float((x @ x.T).sum())


def complain(state: None, item: int) -> int:
    if item == 3:
        raise InputError("item 3 is bad", where="row 3", why="it was made so", fix="mend it")
    return item


def crash(state: None, item: int) -> int:
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def pid_after(state: float, item: int) -> int:
    time.sleep(state)
    return os.getpid()


def note_pid(state: str, item: int) -> int:
    """Leave a file named by the process, then work for a long time."""
    Path(state, str(os.getpid())).touch()
    time.sleep(0.0 if item == 0 else 600)
    return item


def loaded(module: str, _item: int) -> bool:
    return module in sys.modules


def faults(times: int, _item: int) -> int:
    """Pages that the system handed out while a tensor of 24 MB was made so many times."""
    import resource

    torch.ones(6_000_000).add(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(6_000_000).add(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def total(state: dict, factor: int) -> float:
    """A sum over all tensors of a state."""
    return factor * float(sum(tensor.double().sum() for tensor in state["weights"].values()))
