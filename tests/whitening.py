"""The definition of whitening group by group, by the formulas of the papers, and correlated input for it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbn.autograd.whitening import Whitening
from tests.stock import normal


def matrix_of(cov: Tensor, method: str, iterations: int, eps: float) -> Tensor:
    """Return the whitening matrix of one covariance [d, d] by the formulas of the papers, differentiable."""
    d = len(cov)
    shifted = cov + eps * torch.eye(d, dtype=cov.dtype)
    if method == "iternorm":
        p = torch.eye(d, dtype=cov.dtype)
        for _ in range(iterations):
            p = 1.5 * p - 0.5 * torch.linalg.matrix_power(p, 3) @ shifted / shifted.trace()
        return p / shifted.trace().sqrt()
    values, vectors = torch.linalg.eigh(shifted)
    if method == "zca":
        return vectors @ torch.diag(values.rsqrt()) @ vectors.mT
    signs = torch.stack([column[column.abs().argmax()].sign() for column in vectors.detach().unbind(1)])
    return torch.flip(torch.diag(values.rsqrt()) @ (vectors * signs).mT, (0,))


def definition(
    x: Tensor, whitening: Whitening, mean: Tensor | None = None, cov: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (whitened x, mean, biased covariance (groups, d, d)), group by group."""
    method, iterations, d, eps = whitening
    rows = x.transpose(0, 1).reshape(x.shape[1], -1)
    mean = rows.mean(1) if mean is None else mean
    rows = rows - mean[:, None]
    covs, results = [], []
    for group, part in enumerate(rows.split(d)):
        covs.append(part @ part.mT / part.shape[1] if cov is None else cov[group])
        results.append(matrix_of(covs[-1], method, iterations, eps) @ part)
    z = torch.cat(results).view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
    return z, mean, torch.stack(covs)


def correlated(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return an input whose channels are correlated, with a mean of their own each."""
    channels = shape[1]
    mix = torch.eye(channels, dtype=torch.float64) + 0.4 * normal(channels, channels, seed=99)
    x = torch.tensordot(normal(*shape, seed=seed), mix, dims=([1], [1])).movedim(-1, 1)
    return (x + torch.linspace(-1, 1, channels, dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))).to(dtype)
