"""What every classifier gives, once it says its logits."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from assay.core.errors import InputError
from assay.core.task import Inputs, Params, Task
from assay.numerics.sampling import categorical, uniforms


class Labelled(Task):
    """A task of examples with a class each, `y` of a batch; one loss term an example."""

    @abstractmethod
    def logits(self, params: Params, batch: Inputs) -> Tensor:
        """`[b, classes]`; of a batch with `noise`, as training has them."""

    def terms(self, params: Params, batch: Inputs) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(self.logits(params, batch), batch["y"], reduction="none")[:, None]
        return loss, torch.ones_like(loss)

    def margin(self, params: Params, batch: Inputs) -> Tensor:
        """log p_y - log(1 - p_y), computed as logit_y - logsumexp of the others; `[b]`."""
        logits, y = self.logits(params, batch), batch["y"][:, None]
        return logits.gather(1, y)[:, 0] - logits.scatter(1, y, float("-inf")).logsumexp(dim=1)

    @torch.no_grad()
    def resample(self, params: Params, batch: Inputs, keys: np.ndarray, seed: int) -> Inputs:
        u = uniforms(keys, 1, seed=seed)[:, 0]
        return {**batch, "y": categorical(self.logits(params, batch), u)}

    def metrics(self, params: Params, batch: Inputs) -> dict[str, Tensor]:
        return {"accuracy": (self.logits(params, batch).argmax(dim=1) == batch["y"]).double()}


def check_labels(labels: np.ndarray, classes: int) -> None:
    """Raises `InputError` unless all are in 0..classes-1."""
    if len(labels) and not (0 <= labels.min() and labels.max() < classes):
        raise InputError(f"labels run from {labels.min()} to {labels.max()}", fix=f"they must be in 0..{classes - 1}")
