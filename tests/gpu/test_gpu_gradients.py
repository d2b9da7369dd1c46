"""Per-example gradients on a CUDA device against those of the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from assay.numerics.ghost import products
from assay.numerics.persample import audit, flatten, gradients
from assay.numerics.project import Factored, Sketch, Sparse
from assay.train.models import init_params
from helpers import language, text_pool, wide

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: gradients run on the CPU only")


@pytest.mark.parametrize("sketch", [Factored(8, 1), Sparse(256, 1)], ids=["factored", "sparse"])
def test_devices_agree_in_float64(tmp_path: Path, sketch: Sketch) -> None:
    task, encoded = language(text_pool(9), tmp_path)
    params, inputs = wide(task), encoded.inputs(np.arange(9))
    there, moved = ({n: v.cuda() for n, v in held.items()} for held in (params, inputs))
    here, _ = gradients(task.module, task.loss, params, inputs, sketch)
    away, _ = gradients(task.module, task.loss, there, moved, sketch)
    gap = (flatten(here, sketch) - flatten(away, sketch).cpu()).abs().max()
    assert float(gap) < 1e-10 * float(flatten(here, sketch).abs().max())
    assert not audit(task.module, task.loss, there, moved, sketch).fallback
    dots = products(task.module, task.loss, there, moved, [there])
    assert torch.allclose(dots.cpu(), products(task.module, task.loss, params, inputs, [params]), rtol=1e-10)


def test_bfloat16_keeps_the_direction(tmp_path: Path) -> None:
    task, encoded = language(text_pool(9), tmp_path, width=64)
    held = init_params(task.module, 0), encoded.inputs(np.arange(9))
    params, inputs = ({n: v.cuda() for n, v in x.items()} for x in held)
    sketch = Factored(16, 1)
    exact = flatten(gradients(task.module, task.loss, params, inputs, sketch)[0], sketch)
    with torch.autocast("cuda", torch.bfloat16):
        half = flatten(gradients(task.module, task.loss, params, inputs, sketch)[0], sketch)
    assert half.dtype == torch.float32, "sums run in single precision"
    assert float(torch.cosine_similarity(exact, half).min()) > 0.98
