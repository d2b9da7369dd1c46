"""What an optimiser's state says about the scale of each weight: the metric in which its steps are short."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from assay.core.errors import InputError
from assay.core.task import Params

# Least second moment that a weight is given, as a part of its parameter's root mean square.
FLOOR = 0.01


def preconditioner(state: Mapping[str, Any], *, gradient: Params | None = None) -> dict[str, Tensor]:
    """Adam's metric P by parameter name: P = 1 / (sqrt(v_hat) + eps), v_hat = v / (1 - b2^steps).

    `state` has the slot `square` (v by name) and, where they are known, the numbers `steps`, `betas` and `eps`; without
    `steps` v is taken as it stands, the others are those of a `Recipe`. With a `gradient`, v first takes that in, as
    the optimiser does in the step it is for: v <- b2 v + (1 - b2) g^2. An entry that training hardly met, such as a
    rare token's, then moves by at most sqrt(1 / (1 - b2)) and not by |g| / eps.

    Raises `InputError` when there is no slot `square`. Source: Kingma & Ba 2015, arXiv:1412.6980.
    """
    if not state.get("square"):
        raise InputError(
            "the scoring model comes without second moments", where="metric = 'adam'",
            why="they are the state of AdamW after training; this model has none",
            fix="metric = 'sgd', or train the scoring models with optimiser = 'adamw'",
        )  # fmt: skip
    _, b2 = state.get("betas", (0.9, 0.95))
    steps, eps = state.get("steps"), state.get("eps", 1e-8)
    found = {}
    for name, square in state["square"].items():
        if gradient is not None:
            g = gradient[name].to(square.dtype)
            square = b2 * square + (1 - b2) * g * g
        taken = None if steps is None else steps + (gradient is not None)
        bias = 1.0 if taken is None else 1 - b2**taken
        found[name] = 1 / (torch.sqrt(square / bias) + eps)
    return found


def feature_metric(state: Mapping[str, Any], kind: str, exponent: float = 0.25) -> dict[str, Any]:
    """Factors of *per-example* gradients, by name: (v_hat)^-exponent. At 1/4 dot products are those of Adam's metric P.

    A feature is then multiplied by sqrt(P) on either side of a product: sqrt(P) = (v_hat)^(-1/4), with v_hat held above
    (FLOOR rms)^2 of its parameter, so that weights which training hardly met do not outweigh all others. kind 'adam':
    one factor for each entry, for which each example's gradient is formed whole. 'adafactor': of the best rank-one
    v_hat, rows x columns / mean (Shazeer & Stern 2018, arXiv:1804.04235), as TrackStar does (Chang et al. 2024,
    arXiv:2410.17413): factors go through the layers' rules and cost nothing.

    Raises `InputError` when there is no slot `square`.
    """
    square = {n: (1 / p).square() for n, p in preconditioner({**state, "eps": 0.0}).items()}
    found: dict[str, Any] = {}
    for name, v in square.items():
        v = v.nan_to_num(0.0, posinf=0.0)
        v = v.clamp_min(float(v.mean()) * FLOOR**2 or 1.0)
        if kind == "adam" or v.dim() < 2:
            found[name] = v**-exponent
        else:
            v_oi = v.flatten(1)
            rows, columns = v_oi.mean(dim=1), v_oi.mean(dim=0)
            found[name] = (rows / rows.mean()) ** -exponent, columns**-exponent
    return found
