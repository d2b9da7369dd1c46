"""A small convolutional network for labelled images, and its Task."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from assay.core.errors import InputError
from assay.train.models import Classifier


class ConvNet(nn.Module):
    """3 x 3 convolutions of stride 2 with an activation after each, the mean over places, and a linear readout.

    No normalisation: examples of a batch cannot mix, and the loss is smooth in the data weights.
    """

    def __init__(self, shape: tuple[int, int, int], filters: tuple[int, ...], classes: int, activation: str) -> None:
        super().__init__()
        self.shape, self.activation = shape, {"gelu": F.gelu, "relu": F.relu}[activation]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise((shape[0], *filters)))
        self.readout = nn.Linear(filters[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Flat images `[b, channels x height x width]` to logits."""
        x = x.reshape(-1, *self.shape)
        for conv in self.convs:
            x = self.activation(conv(x))
        return self.readout(x.mean(dim=(2, 3)))


@dataclass(frozen=True, kw_only=True)
class ImageClassifier(Classifier):
    """Cross-entropy of a class given an image (columns `pixels`, laid out as channel, row, column, and `label`)."""

    shape: tuple[int, int, int] = (3, 32, 32)
    """Channels, height and width."""
    filters: tuple[int, ...] = (24, 48, 96)

    def __post_init__(self) -> None:
        if self.hidden or self.dropout or self.first != "normal" or not self.filters:
            raise InputError(
                "a convnet has filters, and neither hidden layers nor dropout, nor another draw of first weights",
                where="task", fix="set task.filters alone, such as [24, 48, 96]",
            )  # fmt: skip
        object.__setattr__(self, "inputs", int(np.prod(self.shape)))

    @cached_property
    def module(self) -> nn.Module:
        return ConvNet(self.shape, self.filters, self.classes, self.activation)

    def describe(self) -> dict[str, Any]:
        fields = {k: v for k, v in asdict(self).items() if k not in ("inputs", "hidden", "dropout", "first")}
        return {"task": "convnet", **fields, "shape": list(self.shape), "filters": list(self.filters)}

    def forward_flops(self, terms: np.ndarray) -> float:
        """2 x 9 x (channels in x channels out) a place of a convolution's output, and 2 x weights of the readout."""
        height, width = self.shape[1:]
        total = 2 * self.filters[-1] * self.classes
        for a, b in pairwise((self.shape[0], *self.filters)):
            height, width = -(-height // 2), -(-width // 2)
            total += 2 * 9 * a * b * height * width
        return float(np.sum(terms)) * total
