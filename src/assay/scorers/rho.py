"""Reducible loss: what a reference model knows of a text and the scoring model has yet to learn."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import digest, digest_file
from assay.core.method import Batch, Context, Cost, ModelPath, Positive, Scorer
from assay.train.recipe import Recipe, overlaid

# What of a task's description says how it reads a text: two models may differ in all else.
READING = ("task", "tokenizer", "marks", "context", "terms", "template", "inputs", "classes", "shape")


class RHO(Scorer):
    """Loss under the scoring model, less the loss under a reference model that was trained on the target alone.

    Formula: s_i = mean over scoring models of loss_i(params) - loss_i(reference)
    Reference: Mindermann et al. 2022, arXiv:2206.07137 (RHO: the second term is the irreducible loss)
    Note: the reference is a model of the study's kind, trained from its first weights for `epochs` passes over the half
        of the target that selects, by the scoring models' recipe with the keys of `recipe` laid over it; or the model
        in the folder `reference`: a scoring model of another run (its step's folder), or for a causal model any folder
        with the same tokenizer. Where the reference is instead the scoring model itself, moved a little towards the
        target, this is `loss_diff` (CoLoR-Filter), which measures utility. Here it ranks, and 0 has no meaning: a
        small reference does worse on most texts. averaged over the scoring models
    """

    reference: ModelPath = ""
    epochs: Positive = 10.0
    recipe: dict[str, Any] | None = None
    seed: int = 0

    cost: ClassVar[Cost] = "forward"
    unit: ClassVar[str] = "nats per term"

    @property
    def passes(self) -> float:
        return 2.0

    def training_terms(self, pool: float, target: float) -> float:
        return 0.0 if self.reference else self.epochs * target

    def code(self) -> str:
        """As of any method, and of the files of the model that is named."""
        return digest(Scorer.code(self), self._files) if self.reference else Scorer.code(self)

    @cached_property
    def _files(self) -> list[tuple[str, str]]:
        folder = self._folder()
        files = [*folder.glob("*.safetensors"), *folder.glob("*.json")]
        return [(f.name, digest_file(f)) for f in sorted(files) if f.name != "step.json"]

    def _folder(self) -> Path:
        from assay.train.pretrained import folder_of

        return folder_of(self.reference, weights=True)

    def init(self, context: Context) -> _State:
        if not self.reference:
            task, params = context.task, self._trained(context)
        elif self.recipe is not None:
            raise InputError("rho: a reference that is given is not trained", where="recipe", fix="leave recipe out")
        else:
            task, params = self._given(context.task)
        return _State(context.task, list(context.models), task, params)

    def score(self, state: _State, batch: Batch) -> Any:
        return state.difference(batch.inputs)

    def _trained(self, context: Context) -> Any:
        from assay.core.selection import Selection
        from assay.train.loop import load, train

        encoded, target = context.encoded(context.target), context.target
        terms = int(encoded.sizes.sum())
        recipe: Recipe = overlaid(self.name, context.recipe, self.recipe)
        changes: dict[str, Any] = {"seed": int(digest(self.seed, "rho")[:8], 16)}
        if "steps" not in (self.recipe or {}):
            changes["steps"] = max(1, math.ceil(self.epochs * terms / recipe.terms_per_step))
        recipe = recipe.model_copy(update=changes)

        def build(part: Path) -> None:
            train(context.task, encoded, np.arange(len(encoded)), Selection.everything(target.ids), recipe, part)

        key = context.task.describe(), target.fingerprint, recipe.spec()
        flops = context.task.training_flops(encoded.sizes, recipe.steps * recipe.terms_per_step)
        return load(context.kept("reference", key, build, flops=flops) / "checkpoint.safetensors").params

    def _given(self, task: Any) -> tuple[Any, Any]:
        """The reference's task and weights. Raises `InputError` when it does not read texts as the task does."""
        folder = self._folder()
        if (folder / "task.json").exists():
            from assay.train.loop import load
            from assay.train.models import read_task

            other = read_task(folder / "task.json")
            params = load(folder / "checkpoint.safetensors").params
        else:
            from assay.train.hf import CausalLM

            if not isinstance(task, CausalLM):
                raise InputError(
                    "rho: no model of this study's kind", where=folder, why="there is no task.json in it",
                    fix="give the folder steps/proxy-... of a run with the same task",
                )  # fmt: skip
            other = replace(task, path=str(folder), adapter=None, fine_tune=False)
            params = other.params()
        mine, theirs = ({k: t.describe().get(k) for k in READING} for t in (task, other))
        differing = [k for k in READING if mine[k] != theirs[k]]
        if differing:
            raise InputError(
                f"rho: the reference reads texts in another way: {', '.join(differing)}", where=folder,
                why="losses per term can be subtracted only where the terms are the same",
                fix="give a model with the same tokenizer and context",
            )  # fmt: skip
        return other, params


@dataclass(frozen=True)
class _State:
    task: Any
    models: list[Any]
    reference_task: Any
    reference: Any

    @property
    def passes(self) -> float:
        """Forward passes for each scoring model; the reference is read once for all."""
        return 1 + 1 / len(self.models)

    def difference(self, inputs: Any) -> Any:
        from assay.numerics.probe import losses

        mine = [losses(self.task, params, inputs, "float32") for params in self.models]
        return sum(mine[1:], mine[0]) / len(mine) - losses(self.reference_task, self.reference, inputs, "float32")
