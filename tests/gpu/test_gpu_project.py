"""Sketches give the same numbers on the device as on the CPU."""

from __future__ import annotations

import pytest
import torch

from assay.numerics.project import sketch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: sketches run on the CPU only")


@pytest.mark.parametrize("kind", ["factored", "sparse", "masked", "dense"])
def test_device_gives_the_numbers_of_the_cpu(kind: str) -> None:
    rng = torch.Generator().manual_seed(0)
    d, a = (torch.randn(3, 8, n, generator=rng, dtype=torch.float64) for n in (70, 90))
    ids = torch.randint(0, 300, (3, 8), generator=rng)
    made = sketch(kind, 16, 5)
    pairs = [
        (made.outer("w", d, a), made.outer("w", d.cuda(), a.cuda())),
        (made.lookup("e", ids, d, 300), made.lookup("e", ids.cuda(), d.cuda(), 300)),
        (made.full("g", d[:, 0]), made.full("g", d[:, 0].cuda())),
    ]
    for cpu, device in pairs:
        assert torch.allclose(cpu, device.cpu(), rtol=1e-12, atol=1e-12), float((cpu - device.cpu()).abs().max())


def test_sparse_is_the_same_to_the_last_bit() -> None:
    """Its sums have one order everywhere: there are no atomic additions."""
    x = torch.randn(4, 300, 500, generator=torch.Generator().manual_seed(0))
    made = sketch("sparse", 1024, 5)
    assert torch.equal(made.full("w", x), made.full("w", x.cuda()).cpu())
