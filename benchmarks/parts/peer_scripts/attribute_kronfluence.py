"""Attribution of a classifier by kronfluence: EK-FAC, K-FAC, diagonal and identity preconditioners.

The Fisher is the true one, of sampled labels; losses are summed, as its documentation asks. Pool and targets go through
in batches as large as the data, which is fastest here. Factors and scores are written to disk: it has no other way.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribute_common import Folder, attribute, margins
from kronfluence.analyzer import Analyzer, prepare_model  # pyright: ignore[reportMissingImports]
from kronfluence.arguments import FactorArguments, ScoreArguments  # pyright: ignore[reportMissingImports]
from kronfluence.task import Task  # pyright: ignore[reportMissingImports]
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

BATCH = 5000


class Classification(Task):
    """What is measured of a target is its loss, or minus its margin."""

    def __init__(self, margin: bool) -> None:
        self.margin = margin

    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
        x, y = batch
        logits = model(x)
        if sample:
            y = torch.multinomial(logits.detach().softmax(dim=1), 1)[:, 0]
        return cross_entropy(logits, y, reduction="sum")

    def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
        x, y = batch
        logits = model(x)
        return -margins(logits, y).sum() if self.margin else cross_entropy(logits, y, reduction="sum")


def score(folder: Folder, job: dict[str, Any], scratch: Path) -> np.ndarray:
    """Option `damping`: a number, or None for a tenth of each layer's mean eigenvalue."""
    (model,) = job["models"]
    torch.manual_seed(0)
    task = Classification(folder.margin)
    ready = prepare_model(folder.module(model), task)
    analyzer = Analyzer("scores", ready, task, cpu=True, disable_tqdm=True, output_dir=str(scratch))
    strategy = {"graddot": "identity"}.get(job["method"], job["method"])
    pool, targets = TensorDataset(folder.x, folder.y), TensorDataset(folder.tx, folder.ty)
    batch = min(BATCH, len(pool))
    analyzer.fit_all_factors(
        "factors", pool, per_device_batch_size=batch, factor_args=FactorArguments(strategy=strategy)
    )
    arguments = ScoreArguments(damping_factor=job["options"]["damping"])
    analyzer.compute_pairwise_scores(
        "pairs", "factors", targets, pool, per_device_query_batch_size=min(job["options"].get("queries", BATCH),
        len(targets)), per_device_train_batch_size=batch, score_args=arguments,
    )  # fmt: skip
    return analyzer.load_pairwise_scores("pairs")["all_modules"].numpy()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    attribute(__doc__, score)
