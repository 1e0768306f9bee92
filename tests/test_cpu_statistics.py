"""The CPU adds up half types in float32 where that is good enough: statistics of data where it is not, and of float32,
for each instruction set and both kinds of layout."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastbn import _C, _ops

COUNT = 10 * 100  # of a channel, as 10 images of 10 x 10


def _hard_data() -> dict[tuple[str, torch.dtype], tuple[torch.Tensor, float]]:
    """[10, 19, 10, 10] and the relative error that the variance may have."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(10, 19, 10, 10, generator=generator, dtype=torch.float64)
    data = {f"mean {mean:g}": (normal + mean, 1e-6) for mean in (1e2, 1e4, 1e6)}
    # The five samples that a pivot is the median of are in the first row or column of images whose border is padded.
    border = torch.zeros(10, 10, dtype=torch.bool)
    border[0] = border[:, 0] = True
    data["padded"] = (torch.where(border, 0.0, normal + 100), 1e-6)
    # The samples alone are far off, so that sums about them cancel.
    sampled = torch.zeros(COUNT, dtype=torch.bool)
    sampled[[COUNT * (2 * i + 1) // 10 for i in range(5)]] = True
    sampled = sampled.view(10, 1, 10, 10)
    data["pivot far off"] = (torch.where(sampled, 30.0, normal * 0.01), 1e-6)
    data["squares overflow"] = (normal * 1e25, 1e-6)
    data["squares vanish"] = (normal * 1e-25, 1e-6)
    data["nearly infinite"] = (torch.sign(normal) * 3e38, 1e-6)
    one_bad = normal.clone()
    one_bad[3, 7, 5, 5] = torch.inf
    one_bad[4, 11, 5, 5] = torch.nan
    data["inf and NaN in two channels"] = (one_bad, 1e-6)
    return {
        (name, dtype): (values.to(dtype), bound)
        for name, (values, bound) in data.items()
        for dtype in (torch.float32, torch.bfloat16)
    }


def _statistics(formats=(torch.contiguous_format, torch.channels_last)):
    ops = _ops.namespace("cpu")
    return {
        (name, str(layout)): ops.channel_stats(values.contiguous(memory_format=layout))
        for name, (values, _) in _hard_data().items()
        for layout in formats
    }


@pytest.mark.parametrize("instruction_set", _C.build_info()["cpu_instruction_sets"])
def test_variance_of_hard_data(instruction_set, tmp_path):
    saved = tmp_path / "statistics.pt"
    program = "import sys, torch; from tests import test_cpu_statistics as t; torch.save(t._statistics(), sys.argv[1])"
    environment = os.environ | {"FASTBN_CPU": instruction_set, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program, str(saved)], env=environment, check=True, timeout=120)
    data = _hard_data()
    for (name, layout), (mean, var) in torch.load(saved).items():
        values, bound = data[name]
        rows = values.double().transpose(0, 1).flatten(1)
        exact_mean = rows.mean(1)
        exact = (rows - exact_mean[:, None]).square().mean(1)
        finite = exact.isfinite() & (exact > 0)
        assert torch.equal(var[exact == 0], exact[exact == 0]), (name, layout)
        assert torch.equal(exact.isfinite(), var.isfinite()), (name, layout)
        if not finite.any():  # bfloat16 rounds 1e6 plus a normal value to a constant
            continue
        error = ((var - exact).abs() / exact)[finite].max().item()
        assert error <= bound, f"{name}, {layout}: relative error {error:.2g}"
        off = ((mean - exact_mean).abs() / exact.sqrt())[finite].max().item()
        assert off <= bound, f"{name}, {layout}: mean off by {off:.2g} standard deviations"
