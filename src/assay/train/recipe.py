"""`Recipe`: all that determines a training run besides its data."""

from __future__ import annotations

import math
from typing import Any, Literal

import pydantic

from assay.core.errors import InputError
from assay.core.method import Count, NonNegative, Positive


class Recipe(pydantic.BaseModel):
    """Optimiser, schedule, length and seed. The same Recipe and Selection give the same weights, bit for bit, on one
    kind of device.

    A step minimises `(1/T) sum_i w_i n_i loss_i + (weight_decay/2) |params|^2` over the examples that fit in T =
    `terms_per_step` loss terms (tokens for a language model, examples for a classifier), with loss_i the mean over the
    n_i terms of example i. T is a constant: weights never change the denominator. AdamW decays decoupled from the loss
    (Loshchilov & Hutter 2019); SGD and momentum decay inside the gradient.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    steps: Count = 100
    terms_per_step: Count = 2048
    optimiser: Literal["sgd", "momentum", "adamw"] = "adamw"
    lr: Positive = 3e-3
    momentum: NonNegative = 0.9
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Positive = 1e-8
    eps_root: NonNegative = 0.0
    """Added to AdamW's second moment inside its root; above 0 the update can be differentiated at zero gradients."""
    weight_decay: NonNegative = 0.01
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: float = pydantic.Field(default=0.1, ge=0, le=1)
    final: float = pydantic.Field(default=0.1, ge=0, le=1)
    clip: NonNegative = 1.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at step 0..steps-1: linear warm-up over the share `warmup`, then down to `final` x lr.

        >>> r = Recipe(steps=10, lr=1.0, warmup=0.2, final=0.0, schedule="linear")
        >>> [round(r.rate(s), 3) for s in (0, 1, 2, 9)]
        [0.5, 1.0, 1.0, 0.125]
        """
        rising = math.ceil(round(self.warmup * self.steps, 6))  # 0.07 x 100 is a little over 7
        if step < rising:
            return self.lr * (step + 1) / rising
        if self.schedule == "constant":
            return self.lr
        done = (step - rising) / max(1, self.steps - rising)
        shape = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (self.final + (1 - self.final) * shape)

    def with_seed(self, seed: int) -> Recipe:
        return self.model_copy(update={"seed": seed})

    def spec(self) -> dict[str, Any]:
        plain = self.model_dump(mode="json")
        # Left out at 0: a recipe keeps the key that it always had.
        return {name: value for name, value in plain.items() if name != "eps_root" or value}


def overlaid(method: str, known: Recipe | None, own: dict[str, Any] | None) -> Recipe:
    """The recipe of a method's own trainings: the scoring models', with the keys of `own` laid over it.

    Raises `InputError` where there is nothing to go by, or a key no recipe has.
    """
    if known is None and not own:
        raise InputError(
            f"{method} does not know how to train", why="the scoring models come without a recipe",
            fix="give it one: recipe = {steps = 300, lr = 0.1, optimiser = 'momentum'}",
        )  # fmt: skip
    try:
        return Recipe(**{**(known.model_dump() if known else {}), **(own or {})})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{method}: recipe.{first['loc'][0]} cannot be {first['input']!r}", why=first["msg"],
            fix="give keys of a recipe, such as {steps = 300, lr = 0.1, optimiser = 'momentum'}",
        ) from error  # fmt: skip
