"""Projected per-example gradients by traker: `TRAKer.featurize` of every linear layer's weights but the head's.

Fastest sensible settings: documents sorted by length, a `BasicProjector` of one block, so that its normal matrix is
drawn once and kept (by default it is drawn anew for every hundred dimensions of every batch), and no
`finalize_features`, which is of no use to one who wants the gradients.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from common import arguments, linear, pad, read
from trak import TRAKer  # pyright: ignore[reportMissingImports]
from trak.modelout_functions import AbstractModelOutput  # pyright: ignore[reportMissingImports]
from trak.projectors import BasicProjector, ProjectionType  # pyright: ignore[reportMissingImports]


class Loss(AbstractModelOutput):
    """The summed loss of a document as the model's output; the chain rule's other factor is then 1."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(model, weights, buffers, tokens, labels) -> torch.Tensor:
        kept = {"input_ids": tokens[None], "use_cache": False}
        logits = torch.func.functional_call(model, (weights, buffers), args=(), kwargs=kept).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")

    def get_out_to_loss_grad(self, model, weights, buffers, batch) -> torch.Tensor:
        return torch.ones(len(batch[0]), 1)


def main() -> None:
    chosen = arguments(__doc__)
    model, rows = read(chosen.model, chosen.documents, "eager")  # the fused kernels have no rule for `vmap`
    names = [f"{name}.weight" for name in linear(model)]
    size = sum(model.get_parameter(name).numel() for name in names)
    projector = BasicProjector(
        grad_dim=size, proj_dim=chosen.dim, seed=0, proj_type=ProjectionType.normal, device="cpu",
        block_size=chosen.dim,
    )  # fmt: skip
    traker = TRAKer(
        model=model, task=Loss(), train_set_size=len(rows), save_dir=str(chosen.out / "trak"), device="cpu",
        projector=projector, proj_dim=chosen.dim, use_half_precision=False, grad_wrt=names,
        logging_level=logging.WARNING,
    )  # fmt: skip
    traker.load_checkpoint(model.state_dict(), model_id=0)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    for start in range(0, len(order), chosen.batch):
        some = order[start : start + chosen.batch]
        traker.featurize(pad([rows[index] for index in some]), inds=np.array(some))
    np.save(chosen.out / "features.npy", traker.saver.current_store["grads"])


if __name__ == "__main__":
    main()
