"""fastbn.autograd.inverse_sqrt: the matrices against their definitions, and derivatives where eigenvalues meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastbn.autograd.inverse_sqrt import iternorm, pca, zca
from tests.stock import normal

EPS = 1e-3
FUNCTIONS = {
    "zca": lambda cov: zca(cov, EPS),
    "pca": lambda cov: pca(cov, EPS),
    "iternorm": lambda cov: iternorm(cov, EPS, 5),
    "iternorm to the end": lambda cov: iternorm(cov, EPS, 30),
}


@pytest.fixture(autouse=True)
def node_or_function():
    """Run once: no node takes part in these."""


def _with_eigenvalues(*values: float, seed: int = 0) -> Tensor:
    """Return a covariance (1, d, d) with these eigenvalues, and eigenvectors at random."""
    vectors, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    return (vectors * torch.tensor(values, dtype=torch.float64) @ vectors.mT)[None]


def _cov(groups: int = 2, d: int = 4) -> Tensor:
    x = normal(groups, d, 50) * torch.linspace(0.5, 2, d, dtype=torch.float64)[:, None]
    return x @ x.mT / 50


def _shifted(cov: Tensor) -> Tensor:
    return cov + EPS * torch.eye(cov.shape[-1], dtype=torch.float64)


def _papers_iterations(cov: Tensor, iterations: int) -> Tensor:
    """Return the matrix of Huang et al. 2019, algorithm 1, as it is written there."""
    shifted = _shifted(cov)
    trace = torch.einsum("gii->g", shifted)[:, None, None]
    p = torch.eye(cov.shape[-1], dtype=torch.float64).expand_as(cov)
    for _ in range(iterations):
        p = 0.5 * (3 * p - p @ p @ p @ (shifted / trace))
    return p / trace.sqrt()


@pytest.mark.parametrize("d", [1, 4])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 9])
def test_the_iterations_of_the_paper(iterations, d):
    if d == 1:  # N = 1, and so is every P
        torch.testing.assert_close(iternorm(_cov(d=1), EPS, iterations), _shifted(_cov(d=1)).rsqrt())
    torch.testing.assert_close(iternorm(_cov(d=d), EPS, iterations), _papers_iterations(_cov(d=d), iterations))


@pytest.mark.parametrize("name", ["zca", "pca", "iternorm to the end"])
def test_they_whiten(name):
    cov = _cov()
    matrix = FUNCTIONS[name](cov)
    # Rounding of float64 times the ratio of the largest eigenvalue to the smallest one, below 50 here: 1.1e-14, and
    # less than ten operations that round.
    identity = torch.eye(4, dtype=torch.float64).expand_as(cov)
    torch.testing.assert_close(matrix @ _shifted(cov) @ matrix.mT, identity, rtol=0, atol=1e-13)
    assert matrix.dtype == torch.float64
    if name != "pca":
        torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=1e-13)  # the same rounding, of elements below 3


def test_principal_components_are_in_order_and_have_a_sign():
    cov = _with_eigenvalues(0.5, 4.0, 2.0)
    matrix = pca(cov, 0.0)
    torch.testing.assert_close(matrix.norm(dim=-1), torch.tensor([[4.0, 2.0, 0.5]], dtype=torch.float64).rsqrt())
    largest = matrix.gather(-1, matrix.abs().argmax(-1, keepdim=True))
    assert (largest > 0).all() and (matrix < 0).any()


@pytest.mark.parametrize("smallest", [0.3, 1e-2, 1e-4])
def test_enough_iterations_make_zca(smallest):
    """The eigenvalue p of P follows the same recursion as a number, from which the distance to the limit is known."""
    cov = _with_eigenvalues(1.0, 0.7, smallest)
    values = _shifted(cov)
    trace = torch.einsum("gii->g", values)
    n = (smallest + EPS) / trace.item()
    iterations, p = 0, 1.0
    while iterations < 4 or 1 - p * p * n > 1e-9:
        p, iterations = 0.5 * (3 * p - p**3 * n), iterations + 1
    error = 1 - p * n**0.5  # relative; the smallest eigenvalue has the largest
    assert iterations <= 25
    exact, matrix = zca(cov, EPS), iternorm(cov, EPS, iterations)
    # The norm of a 3 by 3 matrix is at most three times its largest element. To what the iterations leave comes the
    # rounding of float64 times 1 / n, the ratio of the trace to the smallest eigenvalue.
    largest = exact.abs().max().item() * 3
    torch.testing.assert_close(matrix, exact, rtol=0, atol=(error + 1e-13 / n) * largest)
    if iterations > 6:  # a few iterations leave what the bound says, so that it is no loose one
        p = 1.0
        for _ in range(3):
            p = 0.5 * (3 * p - p**3 * n)
        left = (iternorm(cov, EPS, 3) - exact).abs().max().item()
        assert left > 0.2 * (1 - p * n**0.5) * (smallest + EPS) ** -0.5


@pytest.mark.parametrize("name", ["zca", "pca", "iternorm"])
def test_first_and_second_derivative(name):
    x = normal(2, 3, 7) * torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None]

    def function(x):
        return FUNCTIONS[name](x @ x.mT / 7)

    x.requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize(
    "values", [(2.0, 2.0, 2.0), (2.0, 2.0, 0.5), (1.0, 1.0 + 1e-14, 0.0), (0.0, 0.0, 0.0)], ids=str
)
def test_zca_is_smooth_where_eigenvalues_meet(values):
    """Against the Lyapunov equation W X + X W = -W B W that the derivative of W = S^(-1/2) solves, by brute force."""
    cov = _with_eigenvalues(*values).requires_grad_()
    grad = normal(1, 3, 3, seed=4)
    (actual,) = torch.autograd.grad(zca(cov, EPS), cov, grad)
    root = torch.linalg.inv(zca(cov.detach(), EPS))[
        0
    ].contiguous()  # R = (S + eps)^(1/2);  dS = R dR + dR R,  dW = -W dR W
    identity = torch.eye(3, dtype=torch.float64)
    of_root = torch.kron(root, identity) + torch.kron(identity, root)
    inverse = torch.linalg.inv(root).contiguous()
    of_inverse = -torch.kron(inverse, inverse) @ torch.linalg.inv(of_root)
    symmetric = 0.5 * (grad + grad.mT)
    expected = (of_inverse.mT @ symmetric.reshape(9)).view(1, 3, 3)
    # Roots are between 0.03 and 1.4: the Kronecker product of inverses has a condition of 2,000, times the rounding.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_the_derivative_of_principal_components_is_finite_where_eigenvalues_meet():
    for values in ((2.0, 2.0, 0.5), (0.0, 0.0, 0.0)):
        cov = _with_eigenvalues(*values).requires_grad_()
        (grad,) = torch.autograd.grad(pca(cov, EPS), cov, normal(1, 3, 3))
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_eigenvalues_that_rounding_made_negative(name):
    cov = _with_eigenvalues(1.0, 0.5, -1e-9).requires_grad_()
    matrix = FUNCTIONS[name](cov)
    (grad,) = torch.autograd.grad(matrix, cov, normal(1, 3, 3))
    assert matrix.isfinite().all() and grad.isfinite().all()
    far = _with_eigenvalues(1.0, 0.5, -1e-2)  # more than eps
    if "iternorm" not in name:
        assert FUNCTIONS[name](far).isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap(name):
    cov = _cov(groups=3)
    batched = torch.func.vmap(lambda each: FUNCTIONS[name](each[None])[0])(cov)
    torch.testing.assert_close(batched, FUNCTIONS[name](cov))
    jacobian = torch.func.jacrev(FUNCTIONS[name])(cov)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(FUNCTIONS[name], cov))
