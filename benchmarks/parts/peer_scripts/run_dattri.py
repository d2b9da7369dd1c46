"""Projected per-example gradients by dattri's LoGra: two-sided normal projections of every linear layer but the head.

Fastest sensible settings: documents sorted by length so that batches have little padding, no Hessian (`Identity`),
gradients kept in memory and written once at the end.
"""

from __future__ import annotations

import numpy as np
import torch
from common import arguments, linear, pad, read
from dattri.algorithm.logra import LoGraAttributor  # pyright: ignore[reportMissingImports]
from dattri.task import AttributionTask  # pyright: ignore[reportMissingImports]


def loss(model, batch, device) -> torch.Tensor:
    """Summed over documents and tokens, so that a document's gradient does not depend on its batch."""
    logits = model(batch["input_ids"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def collate(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return dict(zip(("input_ids", "labels"), pad(rows), strict=True))


def main() -> None:
    chosen = arguments(__doc__)
    model, rows = read(chosen.model, chosen.documents, "sdpa")
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    batches = torch.utils.data.DataLoader(
        [rows[index] for index in order],  # type: ignore[arg-type]
        batch_size=chosen.batch,
        collate_fn=collate,
    )
    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    logra = LoGraAttributor(
        task, layer_names=linear(model), hessian="Identity", proj_dim=chosen.dim, offload="none",
        cache_dir=str(chosen.out / "cache"),
    )  # fmt: skip
    logra.cache(batches)
    held = logra.offload_manager.cached_gradients
    features = np.concatenate([held[index].numpy() for index in range(len(batches))])
    ordered = np.empty_like(features)
    ordered[order] = features
    np.save(chosen.out / "features.npy", ordered)


if __name__ == "__main__":
    main()
