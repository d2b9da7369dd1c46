"""`doctor`: versions, devices, extras, and a short proof that the numbers are right on this machine."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

from assay.core.run import environment

EXTRAS = {"hf": ("datasets",)}


def examine() -> dict[str, Any]:
    """Everything, as JSON; `ok` is false when a self-test fails."""
    start = time.perf_counter()
    tests = {
        name: _try(test)
        for name, test in (("projection", _projection), ("gradients", _gradients), ("training", _training))
    }
    extras = {
        extra: all(importlib.util.find_spec(p) is not None for p in packages) for extra, packages in EXTRAS.items()
    }
    import torch

    devices = ["cpu"] + [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "environment": environment(), "devices": devices, "extras": extras, "tests": tests,
        "ok": all(t["ok"] for t in tests.values()), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _try(test: Any) -> dict[str, Any]:
    try:
        return {"ok": True, "detail": test()}
    except Exception as error:  # a diagnosis must list every failure, whatever it is
        return {"ok": False, "detail": f"{type(error).__name__}: {error}"}


def _projection() -> str:
    """Hashed signs are the same on every machine."""
    from assay.numerics.project import rademacher

    signs = "".join("+" if x > 0 else "-" for x in rademacher(4, 8, seed=0, label="doctor").flatten().tolist())
    expected = "++-+++--+-++++-+-++-------+-+-+-"
    assert signs == expected, f"got {signs}, expected {expected}"
    return "hashed signs as expected"


def _gradients() -> str:
    """Per-example gradients by hooks against autograd, in float64."""
    import torch

    from assay.numerics.persample import gradients
    from assay.train.models import Classifier, init_params

    task = Classifier(inputs=6, hidden=(5,), classes=3)
    params = init_params(task.module, 0, torch.float64)
    batch = {"x": torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6), "y": torch.tensor([0, 1, 2, 0])}
    found, _ = gradients(task.module, task.loss, params, batch)
    leaves = {n: p.requires_grad_() for n, p in params.items()}
    whole = torch.autograd.grad(task.loss(leaves, batch).sum(), list(leaves.values()))
    gap = max(float((found[n].sum(0).view_as(g) - g).abs().max()) for n, g in zip(leaves, whole, strict=True))
    assert gap < 1e-12, f"largest gap {gap:.1e}"
    return f"hooks equal autograd (gap {gap:.0e})"


def _training() -> str:
    """Two workers and this process train to the same bits."""
    from assay.engine import local

    alone, apart = list(local.map(_train, None, [0, 0], workers=1)), list(local.map(_train, None, [0, 0], workers=2))
    assert alone == apart, "training in a worker gives other bits than in this process"
    return "same bits in workers and here"


def _train(_: None, seed: int) -> str:
    import numpy as np
    import torch

    from assay.train import optim
    from assay.train.models import Classifier, init_params
    from assay.train.recipe import Recipe

    task, recipe = Classifier(inputs=8, hidden=(16,), classes=4), Recipe(steps=20)
    params = init_params(task.module, seed)
    x = torch.from_numpy(np.sin(np.arange(256, dtype=np.float32)).reshape(32, 8))
    batch, names = {"x": x, "y": torch.arange(32) % 4}, list(params)
    state = optim.init(recipe, list(params.values()))
    for step in range(20):
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        grads = torch.autograd.grad(task.loss(leaves, batch).mean(), list(leaves.values()))
        values, state = optim.update(recipe, list(grads), state, list(params.values()), step)
        params = dict(zip(names, values, strict=True))
    return "".join(p.numpy().tobytes().hex() for p in params.values())


def show(found: dict[str, Any]) -> None:
    """The same for people."""
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table(show_header=False, box=None)
    for key, value in found["environment"].items():
        table.add_row(key, str(value))
    table.add_row("devices", ", ".join(found["devices"]))
    for extra, there in found["extras"].items():
        table.add_row(f"extra {extra}", "installed" if there else f"missing: pip install 'assay-data\\[{extra}]'")
    for name, test in found["tests"].items():
        table.add_row(f"test {name}", ("ok: " if test["ok"] else "FAILED: ") + test["detail"])
    console.print(table)
    console.print(f"{'all well' if found['ok'] else 'something is wrong'}, {found['seconds']:.1f} s")
