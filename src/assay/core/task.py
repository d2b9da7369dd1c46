"""`Task`: a model, and two functions of (params, batch): the per-example loss, and what is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from assay.core.errors import InputError
from assay.core.pool import Pool

if TYPE_CHECKING:
    from torch import Tensor, nn

Params = Mapping[str, "Tensor"]
Inputs = dict[str, "Tensor"]


class Encoded(ABC):
    """A pool as the model reads it: `len`, `sizes`, and `inputs(rows)`."""

    sizes: np.ndarray
    """Loss terms of each example: its tokens for a language model, 1 for a classifier. `[n]`, int64."""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def lengths(self) -> np.ndarray:
        """Positions each example takes up in a batch, `[n]`: what a batch costs. Its terms, unless told otherwise."""
        return self.sizes

    @abstractmethod
    def inputs(self, rows: np.ndarray) -> Inputs:
        """Tensors for these rows; padding, where there is any, contributes nothing to any loss."""


class Task(ABC):
    """Connects a model to the house. Three methods to write: `module`, `encode` and `terms`.

    `loss(params, batch)` is `[b]`: the *mean* over an example's loss terms (tokens). A training step at data weights w
    minimises `(1/T) sum_i w_i n_i loss_i`, with n_i the number of terms and T a constant of the recipe.
    A subclass is a picklable value: workers rebuild the module from it.
    """

    reduction: ClassVar[str] = "mean over the example's terms"
    measure_unit: ClassVar[str] = "nats per term"
    countable: ClassVar[bool] = False
    """Whether an example has tokens, so that budgets may be given in them."""

    def __getstate__(self) -> dict[str, Any]:
        # A module that was built already stays behind: workers build their own.
        return {name: value for name, value in self.__dict__.items() if name != "module"}

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The architecture; its own parameter values are never used."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that determines the task, as JSON: the key of everything computed with it."""

    @abstractmethod
    def prepare(self, pool: Pool, path: Path) -> None:
        """Write the pool as the model reads it into `path`, once."""

    @abstractmethod
    def encoded(self, path: Path) -> Encoded:
        """What `prepare` wrote, memory-mapped."""

    def stored(self) -> Params | None:
        """Weights that every training begins from (fine-tuning); None: each draws its own, keyed by its seed."""
        return None

    @abstractmethod
    def terms(self, params: Params, batch: Inputs) -> tuple[Tensor, Tensor]:
        """Loss terms `[b, t]` and their mask `[b, t]` (1 where a term counts)."""

    @property
    def stochastic(self) -> bool:
        """Whether training draws anything, such as dropout, by `noise`."""
        return False

    def noise(self, keys: np.ndarray) -> Inputs:
        """What training adds to the batch, `[*keys.shape, ...]` tensors by name: drawn from one uint64 for each example
        and step, and from nothing else. A batch without it is scored and evaluated without noise."""
        return {}

    def loss(self, params: Params, batch: Inputs) -> Tensor:
        """Per-example loss, `[b]`: mean over the example's terms, in nats."""
        terms, mask = self.terms(params, batch)
        return (terms * mask).sum(dim=1) / mask.sum(dim=1)

    def summed(self, params: Params, batch: Inputs) -> Tensor:
        """Per-example loss, summed over the example's terms, `[b]`: what Fisher information is made of."""
        terms, mask = self.terms(params, batch)
        return (terms * mask).sum(dim=1)

    def positions(self, batch: Inputs) -> Tensor | None:
        """Which positions of the input are no padding, `[b, t]`; None where there is no padding."""
        return None

    def resample(self, params: Params, batch: Inputs, keys: np.ndarray, seed: int) -> Inputs:
        """The batch with labels drawn from the model's own distribution, for the true Fisher information.

        A draw is a hash of the seed, the example's key (`[b]` uint64, a hash of its id) and the position.
        """
        raise InputError(
            f"{type(self).__name__} cannot draw labels from its model", why="it has no method `resample`",
            fix="labels = 'true' for the empirical Fisher information, or write the method",
        )  # fmt: skip

    def measure(self, params: Params, batch: Inputs) -> Tensor:
        """What is judged on the target, `[b]`, lower is better. The loss, unless a task says otherwise."""
        return self.loss(params, batch)

    @abstractmethod
    def forward_flops(self, terms: np.ndarray) -> float:
        """Floating-point operations of one forward pass over examples with these numbers of terms, in closed form."""

    def training_flops(self, sizes: np.ndarray, terms: float) -> float:
        """Operations of training on `terms` loss terms of examples with these sizes: three forward passes' worth, at
        the mean price of a term."""
        return 3 * self.forward_flops(sizes) / float(np.sum(sizes)) * terms

    def metrics(self, params: Params, batch: Inputs) -> dict[str, Tensor]:
        """Further per-example numbers to report, such as accuracy."""
        return {}
