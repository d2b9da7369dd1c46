"""What one more copy of an example, added to one step of training, would do to a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from assay.core.task import Inputs


@dataclass(frozen=True)
class Additions:
    """Steps of a training run with their adjoints: by them, any example is scored that never was in the run."""

    task: Any
    names: tuple[str, ...]
    slow: set[str]
    """Parameters whose gradients have no rule."""
    steps: Sequence[tuple[Mapping[str, Tensor], Tensor]]
    """Weights before a step, and d f_c / d(its gradient), `[p, c]` over `names`."""
    terms: int

    def utilities(self, inputs: Inputs, sizes: np.ndarray) -> np.ndarray:
        """-d f_c / d zeta_i of examples of `sizes` terms, where zeta_i n_i loss_i / T is added to the loss of a step:
        `[steps, b, c]`, positive where the copy lowers f_c."""
        from assay.numerics.curvature import dots

        found = [dots(self.task, dict(p), inputs, a, self.names, self.slow).double().numpy() for p, a in self.steps]
        return -np.stack(found) * sizes[None, :, None] / self.terms
