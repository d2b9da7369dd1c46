"""Attribution of a classifier by dattri: influence functions, TRAK, TracIn.

Pool and targets are one batch each: dattri's explicit, CG and LiSSA solvers add up the inverses of the batches'
Hessians, which is right for one batch alone; and it solves anew for each pair of batches, so that one is also fastest.
TracIn without a projector is exact; projections are normal, drawn once a checkpoint.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribute_common import Folder, attribute, margins
from dattri.algorithm import influence_function as influence  # pyright: ignore[reportMissingImports]
from dattri.algorithm.tracin import TracInAttributor  # pyright: ignore[reportMissingImports]
from dattri.algorithm.trak import TRAKAttributor  # pyright: ignore[reportMissingImports]
from dattri.task import AttributionTask  # pyright: ignore[reportMissingImports]
from torch.utils.data import DataLoader, TensorDataset

TARGETS = 75
SOLVERS = {
    "exact": influence.IFAttributorExplicit,
    "cg": influence.IFAttributorCG,
    "lissa": influence.IFAttributorLiSSA,
    "arnoldi": influence.IFAttributorArnoldi,
    "datainf": influence.IFAttributorDataInf,
}


def whole(x: torch.Tensor, y: torch.Tensor, batch: int | None = None) -> Any:
    return DataLoader(TensorDataset(x, y), batch_size=batch or len(x))


def logits(module: Any, params: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Also of one example without a batch axis, and of labels that were made numbers with a fraction."""
    x, y = batch
    x, y = (x, y) if x.dim() == 2 else (x[None], y[None])
    return torch.func.functional_call(module, params, (x,)), y.long()


def task(folder: Folder, models: list[int], *, trak: bool = False) -> tuple[Any, Any]:
    """The task, and its module. Targets are losses or minus the margins; for TRAK both sides are margins."""
    module = folder.module(models[0])

    def loss(params: Any, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(*logits(module, params, batch))

    def margin(params: Any, batch: Any) -> torch.Tensor:
        return margins(*logits(module, params, batch)).mean()

    states = [folder.models[k] for k in models]
    if trak:
        return AttributionTask(loss_func=margin, model=module, checkpoints=states), module
    target = (lambda params, batch: -margin(params, batch)) if folder.margin else loss
    return AttributionTask(loss_func=loss, target_func=target, model=module, checkpoints=states), module


def trak(folder: Folder, job: dict[str, Any]) -> torch.Tensor:
    options = job["options"]
    made, module = task(folder, job["models"], trak=True)

    def correct(params: Any, batch: Any) -> torch.Tensor:
        return torch.exp(-torch.nn.functional.cross_entropy(*logits(module, params, batch)))

    projector = {"proj_dim": options["dim"], "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"}
    attributor = TRAKAttributor(made, correct, projector, regularization=options["damping"])
    if job["method"] == "trak-self":  # it gives scores of the loader that it is given
        return attributor.self_attribute(whole(folder.x, folder.y)).reshape(-1, 1)
    attributor.cache(whole(folder.x, folder.y))
    return attributor.attribute(whole(folder.tx, folder.ty))


def tracin(folder: Folder, models: list[int], options: dict[str, Any], cosine: bool) -> torch.Tensor:
    """`rates`: the weight of each checkpoint."""
    made, _ = task(folder, models)
    rates = torch.tensor(options.get("rates", [1.0 / len(models)] * len(models)))
    attributor = TracInAttributor(made, rates, cosine)
    attributor.projector_kwargs = None  # the option None means the default projector of 512 numbers
    return attributor.attribute(whole(folder.x, folder.y), whole(folder.tx, folder.ty))


def score(folder: Folder, job: dict[str, Any], scratch: Path) -> np.ndarray:
    method, models, options = job["method"], job["models"], dict(job["options"])
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        if method in ("trak", "trak-self"):
            found = trak(folder, job)
        elif method in ("graddot", "gradcos", "tracin"):
            found = tracin(folder, models, options, method == "gradcos")
        else:
            # The Fisher of DataInf has a batch of one gradient. Of the targets only a few fit into memory at once: 300
            # in one batch of CG on 4,810 weights took 24 GB.
            targets = options.pop("targets", TARGETS if method in ("cg", "lissa") else None)
            if method == "exact":  # it is given the options of CG, and has no steps
                options.pop("max_iter", None)
            attributor = SOLVERS[method](task(folder, models)[0], **options)
            attributor.cache(whole(folder.x, folder.y))
            found = attributor.attribute(whole(folder.x, folder.y), whole(folder.tx, folder.ty, targets))
    return found.detach().numpy().T


if __name__ == "__main__":
    attribute(__doc__, score)
