"""The ledger counts what PyTorch does, without doing it."""

from __future__ import annotations

import pytest
import torch

from bs_exp.estimate.ledger import Decomposition, Ledger, Work

_LARGE = 1 << 20  # a matrix of so many rows and columns takes 8 TiB


def test_memory_that_is_alive_at_once() -> None:
    ledger = Ledger()
    with ledger.counting() as work:
        one = torch.empty(_LARGE, _LARGE, dtype=torch.float64)
        two = one.clone()  # the peak: both, and a row that is no copy
        row = one[0]
        del one, two
        three = torch.empty(1000)
        del row, three
    assert work.host_bytes == 2 * 8 * _LARGE**2
    with ledger.counting() as again:
        kept = torch.empty(10, dtype=torch.float32)
    assert again.host_bytes == 40
    with ledger.counting() as later:
        torch.empty(5, dtype=torch.float32)
    assert later.host_bytes == 20 and len(kept) == 10  # what was there before does not count


def test_products_and_factorisations() -> None:
    with Ledger().counting() as work:
        a, b = torch.empty(30, 40), torch.empty(40, 50)
        product = a @ b
        with torch.inference_mode():
            torch.nn.functional.linear(product, torch.empty(60, 50))
        gram = torch.empty(64, 64, dtype=torch.float64)
        torch.linalg.eigh(gram)
        torch.linalg.eigvalsh(gram)
        torch.linalg.cholesky(gram)
        torch.linalg.qr(torch.empty(64, 16, dtype=torch.float64))
    assert work.flops == {("cpu", torch.float32): 2 * 30 * 40 * 50 + 2 * 30 * 50 * 60}
    assert work.decompositions == {
        ("cpu", Decomposition("eigenvectors", 64, 64)): 2,
        ("cpu", Decomposition("cholesky", 64, 64)): 1,
        ("cpu", Decomposition("qr", 64, 16)): 1,
    }


def test_solves_are_of_the_size_of_their_triangle() -> None:
    ledger = Ledger()
    with ledger.counting() as work:
        triangle, wide, tall = torch.empty(8, 8), torch.empty(8, 100), torch.empty(100, 8)
        torch.linalg.solve_triangular(triangle, wide, upper=True)
        torch.linalg.solve_triangular(triangle, tall, upper=True, left=False)
        torch.cholesky_solve(wide, triangle)
        torch.linalg.solve_ex(triangle, wide)
        torch.linalg.solve_ex(triangle, torch.empty(8))
    found = {(d.kind, d.rows, d.columns): n for (_, d), n in work.decompositions.items()}
    assert found == {
        ("triangular solve", 8, 100): 2, ("cholesky solve", 8, 100): 1, ("solve", 8, 100): 1, ("solve", 8, 1): 1
    }  # fmt: skip


def test_questions_about_values_are_answered_as_if_all_were_well() -> None:
    with Ledger().counting():
        values = torch.empty(8)
        assert bool(values.isfinite().all()) and not bool((values == 0.0).any())
        assert float(values.mean()) == 1.0 and int(torch.linalg.cholesky_ex(torch.empty(4, 4)).info) == 0
        assert bool(values.any()) and not bool(torch.empty(4, 4).tril(-1).any())
        assert torch.allclose(values, values + 1) and values[values > 0].shape == (8,)


@pytest.mark.gpu
def test_host_and_device_apart() -> None:
    """What moves between the host and a device counts where it is."""
    with Ledger().counting() as work:
        here = torch.empty(1000)
        there = here.to("cuda")
        (there + there).cpu()
    assert work.host_bytes == 8000 and work.device_bytes == 8000


def test_work_one_after_the_other_needs_the_memory_of_the_larger() -> None:
    one, two = Work(host_bytes=5, calls=1), Work(host_bytes=3, calls=2)
    assert one.then(two).host_bytes == 5 and one.then(two).calls == 3
    assert two.extended(one, 2).host_bytes == 5 + 2 * 2
