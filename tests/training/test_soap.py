"""SOAP: Adam where no side is rotated, and blind to a rotation of the parameters where both are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bs_exp.training.soap import Soap, power_iteration

BETAS = (0.9, 0.99)


def descend(
    start: Tensor, optimizer: str, *, max_precond_dim: int = 64, left: Tensor | None = None, steps: int = 25
) -> Tensor:
    """Minimises `||S (left^T P) R||^2` from `left @ start`: a badly conditioned quadratic, from noisy gradients."""
    generator = torch.Generator().manual_seed(1)
    size = len(start)
    inputs, outputs = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=start.dtype)).Q
        @ torch.diag(torch.logspace(-1.0, 0.5, size, dtype=start.dtype))
        @ torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=start.dtype)).Q
        for _ in range(2)
    )
    turn = torch.eye(size, dtype=start.dtype) if left is None else left
    parameter = torch.nn.Parameter(turn @ start)
    made: torch.optim.Optimizer = (
        torch.optim.Adam([parameter], lr=0.02, betas=BETAS, eps=0.0)
        if optimizer == "adam"
        else Soap([parameter], lr=0.02, betas=BETAS, precondition_frequency=3, max_precond_dim=max_precond_dim)
    )
    for _ in range(steps):
        made.zero_grad()
        batch = torch.randn(2 * size, size, generator=generator, dtype=start.dtype)
        (batch @ inputs @ (turn.T @ parameter) @ outputs).square().mean().backward()
        made.step()
    return turn.T @ parameter.detach()


@pytest.fixture
def start() -> Tensor:
    return torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_without_rotations_it_is_adam(start: Tensor) -> None:
    torch.testing.assert_close(descend(start, "soap", max_precond_dim=4), descend(start, "adam"), rtol=1e-6, atol=1e-6)


def test_turning_the_problem_turns_the_path(start: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    torch.testing.assert_close(descend(start, "soap", left=turn), descend(start, "soap"), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(descend(start, "adam", left=turn), descend(start, "adam"), atol=1e-3)


def test_it_is_faster_than_adam_on_a_badly_conditioned_problem(start: Tensor) -> None:
    assert descend(start, "soap", steps=400).norm() < 0.5 * descend(start, "adam", steps=400).norm()


def test_directions_without_gradients_stay(start: Tensor) -> None:
    """Gradients of rank 1 in fp32: rounding errors of the other directions must not become steps."""
    parameter = torch.nn.Parameter(start.float())
    left, right = torch.randn(5, 1), torch.randn(1, 5)
    made = Soap([parameter], lr=0.1, betas=BETAS, precondition_frequency=2, max_precond_dim=64)
    for _ in range(6):
        made.zero_grad()
        (left * parameter * right).sum().backward()
        made.step()
    moved = torch.linalg.svdvals((parameter.detach() - start.float()).double())
    assert moved[0] > 0.1
    assert moved[1] < 0.05 * moved[0]


def test_power_iteration_converges_to_eigenvectors() -> None:
    generator = torch.Generator().manual_seed(3)
    square = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    covariance = square @ square.T
    basis = torch.eye(5, dtype=torch.float64)
    for _ in range(500):
        basis, order = power_iteration(covariance, basis)
    assert order.tolist() == list(range(5))
    rotated = basis.T @ covariance @ basis
    torch.testing.assert_close(rotated.diagonal(), torch.linalg.eigvalsh(covariance).flip(0))
    torch.testing.assert_close(rotated, torch.diag(rotated.diagonal()), rtol=0, atol=1e-9)
