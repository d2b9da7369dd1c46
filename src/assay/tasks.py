"""The stage that makes the task: tokenizer and model as the study says, and pool and target as the model reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.core.run import Ledger
from assay.core.selection import Selection
from assay.engine import local
from assay.specs import dialogue
from assay.study import Study

if TYPE_CHECKING:
    from assay.core.pool import Pool
    from assay.core.task import Task
    from assay.job import Job

# What workers import for any model of transformers.
MODELLING = ("assay.train.hf", "transformers.modeling_utils", "transformers.modeling_layers")


def build_task(job: Job) -> None:
    """Train the tokenizer on the pool, train the weights that all begin from if there are to be some, and encode pool
    and target for the model."""
    spec = job.study.task
    if spec.kind == "causal":
        job.task = _causal(job)
    job.progress.begin("encode", 4, "tokenise")
    if spec.kind != "causal":
        text = _tokenizer(job) if spec.kind == "text" else ""
        job.task = built_in(job.study, text)
    job.progress.advance()
    assert job.task is not None
    for pool in (job.pool, job.target.selecting, job.target.judging):
        job.encodings[pool.fingerprint] = _encoded(job, job.task, pool)
        job.progress.advance()
    job.progress.end()


def built_in(study: Study, tokenizer: str) -> Task:
    """A decoder with this tokenizer, a classifier, or the user's own."""
    from assay.train.models import LanguageModel

    spec = study.task
    if spec.kind == "module":
        return study.user_task
    if spec.kind != "text":
        return spec.classifier()
    shape = {"width": spec.width, "layers": spec.layers, "heads": spec.heads, "context": spec.context}
    return LanguageModel(tokenizer=tokenizer, vocab=spec.vocab, **shape)


def sketch_task(study: Study, sample: Pool, folder: Path) -> Task:
    """The task as it will be, to measure with: its tokenizer is that of a sample of the pool, its weights are none."""
    from assay.train.models import train_tokenizer

    spec = study.task
    if spec.model is not None:
        return causal(study, spec.model)
    text = train_tokenizer(sample, vocab=spec.vocab, seed=study.seed) if spec.kind in ("text", "causal") else ""
    if spec.kind != "causal":
        return built_in(study, text)
    return causal(study, str(_written(study, folder, text)))


def causal(study: Study, path: str, *, fine_tune: bool = False, whole: bool = False) -> Any:
    """A causal model in a folder or on the hub; `whole`: its loss is that of whole texts, whatever the study says."""
    from assay.train.hf import CausalLM

    spec, completions = study.task, dialogue(study.pool) and not whole
    return CausalLM(
        path=path, context=spec.context, completion_only=completions, template=spec.template, fine_tune=fine_tune
    )


def _tokenizer(job: Job) -> str:
    """The JSON of a tokenizer trained on the pool."""
    from assay.train.models import train_tokenizer

    pool, vocab, seed = job.pool, job.study.task.vocab, job.study.seed

    def build(part: Path, _: Ledger) -> None:
        (part / "tokenizer.json").write_text(train_tokenizer(pool, vocab=vocab, seed=seed))

    step = job.run.step("tokenizer", (pool.fingerprint, vocab, seed), build, label="train tokenizer")
    return (step / "tokenizer.json").read_text()


def _encoded(job: Job, task: Task, pool: Pool) -> Path:
    key = task.describe(), pool.fingerprint
    return job.run.step("encode", key, lambda part, _: task.prepare(pool, part), label="tokenise")


def _written(study: Study, folder: Path, tokenizer: str) -> Path:
    from assay.train.fresh import read_config, write_model

    assert study.task.config is not None
    write_model(folder, read_config(study.task.config), tokenizer, context=study.task.context)
    return folder


def _causal(job: Job) -> Task:
    """The causal model of the study; with `pretrain`, after its first training."""
    from assay.train.fresh import read_config

    study, spec = job.study, job.study.task
    if spec.model is not None:
        return causal(study, spec.model, fine_tune=spec.weights == "stored")
    assert spec.config is not None
    text, config = _tokenizer(job), read_config(spec.config)
    key = config, text, spec.context
    folder = job.run.step("model", key, lambda part, _: _keep(_written(study, part, text)), label="make the model")
    if not spec.pretrain.passes:
        return causal(study, str(folder))
    return causal(study, str(_pretrained(job, folder)), fine_tune=True)


def _keep(_: Path) -> None:
    """A step's build returns nothing."""


@dataclass(frozen=True)
class _First:
    task: Any
    encoded: Path
    rows: np.ndarray
    selection: Selection
    source: Path


def _train_first(shared: _First, item: tuple[Any, Path]) -> None:
    from assay.train.fresh import write_weights
    from assay.train.loop import train

    recipe, part = item
    work = part / "training"
    trained = train(shared.task, shared.task.encoded(shared.encoded), shared.rows, shared.selection, recipe, work)
    write_weights(part, shared.source, trained.params)
    for file in work.iterdir():
        file.unlink()
    work.rmdir()


def _pretrained(job: Job, source: Path) -> Path:
    """A folder with the model of `source` after `pretrain.passes` over the pool's texts, contaminated rows left out."""
    spec = job.study.task.pretrain
    job.progress.begin("pretrain", 1, "train the weights that all begin from")
    task = causal(job.study, str(source), whole=True)
    encoded = _encoded(job, task, job.pool)
    rows = np.flatnonzero(~np.isin(job.pool.ids, job.hits.ids))
    sizes = task.encoded(encoded).sizes[rows]
    steps = max(1, math.ceil(spec.passes * int(sizes.sum()) / spec.recipe.terms_per_step))
    recipe = spec.recipe.model_copy(update={"steps": steps, "seed": 200_000 + job.study.seed})
    chosen = Selection.everything(job.pool.ids[rows])
    shared = _First(task, encoded, rows, chosen, source)

    def build(part: Path, ledger: Ledger) -> None:
        list(local.map(_train_first, shared, [(recipe, part)]))
        ledger.spent(task.training_flops(sizes, steps * recipe.terms_per_step))

    key = {
        "task": task.describe(), "pool": job.pool.fingerprint, "recipe": recipe.spec(),
        "selection": chosen.fingerprint,
    }  # fmt: skip
    path = job.run.step("pretrain", key, build, label="pretrain")
    job.progress.advance()
    job.progress.end()
    return path
