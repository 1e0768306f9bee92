"""Whitening matrices W of covariances S, with W (S + eps) W^T = 1, as differentiable functions in float64.

    zca:        W = (S + eps)^(-1/2) = V diag(l + eps)^(-1/2) V^T of the eigendecomposition S = V diag(l) V^T
                (Huang et al. 2018, Decorrelated Batch Normalization)
    pca:        W = diag(l + eps)^(-1/2) V^T
    iternorm:   the same matrix as zca by Newton's iterations (Huang et al. 2019, Iterative Normalization: Beyond
                Standardization towards Efficient Whitening)

The matrix of ZCA is a smooth function of S, although its eigenvectors are not: where two eigenvalues meet they may
turn by any angle, and their derivative has 1 / (l_i - l_j). So its derivative is not taken through them. With
s = sqrt(l + eps) it is the solution of a Lyapunov equation, V ((V^T dS V) / -(s_i s_j (s_i + s_j))) V^T, which has no
differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def iternorm(cov: Tensor, eps: float, iterations: int) -> Tensor:
    """Return P / sqrt(t), P the result of `iterations` steps of P <- (3 P - P^3 N) / 2 from 1, N = (S + eps) / t.

    cov: float64 (groups, d, d), symmetric. t is the trace of S + eps, so that the eigenvalues of N are in (0, 1]. A
    step multiplies 1 - p^2 n, of an eigenvalue n of N and p of P, by less than 3/4 + (1 - p^2 n) / 4: small
    eigenvalues take about 1.1 steps for each factor of 0.4 that they are below 1, and a few more. P N is kept beside P
    and updated as P is: with both, rounding errors do not grow (Higham 2008, Functions of Matrices, chapter 6).
    """
    shifted = _with_eps(cov, eps)
    trace = shifted.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    if cov.shape[-1] == 1:  # one step from the solution, which is 1
        return trace.rsqrt()
    y = shifted / trace
    identity = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    p = identity.expand_as(cov)
    for step in range(iterations):
        half = 1.5 * identity - 0.5 * (y if step == 0 else p @ y)
        p = half if step == 0 else half @ p
        if step + 1 < iterations:
            y = y @ half
    return p * trace.rsqrt()


def zca(cov: Tensor, eps: float) -> Tensor:
    """Return (S + eps)^(-1/2), symmetric. cov: float64 (groups, d, d), symmetric.

    Negative eigenvalues, which rounding makes of zeros, are taken to be 0.
    """
    return _apply_zca(cov, eps)[0]


def pca(cov: Tensor, eps: float) -> Tensor:
    """Return diag(l + eps)^(-1/2) V^T, the rows by falling eigenvalues. cov: float64 (groups, d, d), symmetric.

    The largest element of each eigenvector is positive. Neither this choice nor the order is a continuous function of
    S, and the derivative has 1 / (l_i - l_j): eigenvalues that are equal except for rounding are taken to keep their
    eigenvectors, which keeps it finite.
    """
    return _apply_pca(cov, eps)[0]


def _with_eps(cov: Tensor, eps: float) -> Tensor:
    return cov + eps * torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)


def _eigen(cov: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (sqrt(l + eps), V), by rising eigenvalues."""
    values, vectors = torch.linalg.eigh(cov)
    return (values.clamp(min=0) + eps).sqrt(), vectors


def _symmetric(x: Tensor) -> Tensor:
    return 0.5 * (x + x.mT)


class _OfEigenvectors(torch.autograd.Function):
    """A matrix of a covariance, with the roots and eigenvectors that its derivative needs."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cov, ctx.eps = inputs
        ctx.save_for_backward(cov, *output[1:])
        ctx.mark_non_differentiable(*output[1:])


class _Zca(_OfEigenvectors):
    @staticmethod
    def forward(cov: Tensor, eps: float) -> tuple[Tensor, ...]:
        roots, vectors = _eigen(cov, eps)
        return (vectors / roots[:, None]) @ vectors.mT, roots, vectors

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        cov, roots, vectors = ctx.saved_tensors
        if torch.is_grad_enabled():  # torch's derivative of eigenvectors, which needs eigenvalues apart
            roots, vectors = _eigen(cov, ctx.eps)
        row, column = roots[..., :, None], roots[..., None, :]
        turned = vectors.mT @ _symmetric(grad) @ vectors
        return vectors @ (turned / -(row * column * (row + column))) @ vectors.mT, None


class _Pca(_OfEigenvectors):
    @staticmethod
    def forward(cov: Tensor, eps: float) -> tuple[Tensor, ...]:
        roots, vectors = _principal(cov, eps)
        return vectors.mT / roots[..., None], roots, vectors

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        cov, roots, vectors = ctx.saved_tensors
        if torch.is_grad_enabled():
            roots, vectors = _principal(cov, ctx.eps)
        turned = vectors.mT @ (grad.mT / roots[..., None, :])  # V^T times the gradient of V
        scaled = (grad.mT * vectors).sum(-2) / (-2 * roots**3)  # the gradient of the eigenvalues
        return _symmetric(vectors @ (turned * _gaps(roots) + torch.diag_embed(scaled)) @ vectors.mT), None


def _principal(cov: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `_eigen` by falling eigenvalues, the largest element of each vector positive."""
    roots, vectors = (t.flip(-1) for t in _eigen(cov, eps))
    signs = vectors.gather(-2, vectors.detach().abs().argmax(-2, keepdim=True)).detach().sign()
    return roots, vectors * signs


def _gaps(roots: Tensor) -> Tensor:
    """Return 1 / (l_j - l_i) in row i and column j, and 0 where the two are equal except for the rounding of `eigh`."""
    values = roots.square()
    gaps = values[..., None, :] - values[..., :, None]
    rounding = torch.finfo(values.dtype).eps * values.shape[-1] * values.amax(-1)[..., None, None]
    apart = gaps.abs() > rounding
    return torch.where(apart, 1 / torch.where(apart, gaps, 1.0), 0.0)


_apply_zca: Callable[..., Any] = _Zca.apply  # typed in some releases of torch
_apply_pca: Callable[..., Any] = _Pca.apply
