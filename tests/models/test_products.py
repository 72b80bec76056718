"""Products of few tokens on a CPU: in blocks of rows or from the left where it pays, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.models import modeling_basis_sharing
from bs_exp.models.modeling_basis_sharing import (
    BLOCKS,
    LEFT_IN_FLOAT32,
    MOST_TOKENS,
    arrangement,
    linear,
    taken,
)
from bs_exp.protocols import Layout
from bs_exp.types import LoadedModel
from tests.support.factorised import compressed_twin

HAS_TILES = modeling_basis_sharing._has_tiles
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")


class Called(TorchDispatchMode):
    """Counts the batched products that are computed, and those with the factor `[rows, ..]` on the left."""

    def __init__(self, rows: int = -1) -> None:
        super().__init__()
        self.batched = self.left = 0
        self.rows = rows

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.batched += func is torch.ops.aten.bmm.default
        self.left += func in (torch.ops.aten.mm.default, torch.ops.aten.mv.default) and len(args[0]) == self.rows
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, factors of any size, and no tiles."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(modeling_basis_sharing, "_has_tiles", lambda: False)
    monkeypatch.setattr(modeling_basis_sharing, "LEAST_NUMBERS", 1)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def factor(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype))


def number(x: Tensor, w: Tensor) -> int:
    with Called(len(w)) as called:
        linear(x, w)
    return called.batched + called.left


@pytest.fixture
def tiles(small_ones_too: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies tiles."""
    monkeypatch.setattr(modeling_basis_sharing, "_has_tiles", lambda: True)


FEW = [(24,), (1, 1, 24), (3, 24), (2, 5, 24), (LEFT_IN_FLOAT32.stop, 24), (MOST_TOKENS, 24)]


def check(shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool, way: str) -> None:
    """The product in a way equals that in fp64, with one call of a kernel."""
    w, bias = factor(4 * BLOCKS, 24, dtype), torch.randn(4 * BLOCKS).to(dtype) if with_bias else None
    x = torch.randn(*shape).to(dtype)
    found = linear(x, w, bias)
    exact = nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
    assert arrangement(x, w) == way and number(x, w) == 1
    assert found.shape == exact.shape and found.is_contiguous() and found.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=rounding)


@needs_mkl
@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("with_bias", [False, True])
@torch.no_grad()
def test_the_same_numbers_in_blocks(shape: tuple[int, ...], with_bias: bool) -> None:
    check(shape, torch.float32, with_bias, "blocks")


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("with_bias", [False, True])
@torch.no_grad()
def test_the_same_numbers_from_the_left(shape: tuple[int, ...], with_bias: bool) -> None:
    check(shape, torch.bfloat16, with_bias, "left")


@pytest.mark.usefixtures("tiles")
@torch.no_grad()
def test_in_fp32_from_the_left_between_few_and_many_tokens() -> None:
    torch.set_num_threads(1)
    for shape in ((LEFT_IN_FLOAT32.start, 24), (2, 5, 24), (LEFT_IN_FLOAT32.stop - 1, 24)):
        check(shape, torch.float32, False, "left")
    for tokens in (LEFT_IN_FLOAT32.start - 1, LEFT_IN_FLOAT32.stop):
        assert number(torch.randn(tokens, 24), factor(16, 24)) == 0


@torch.no_grad()
def test_a_torch_that_cannot_tell_has_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_basis_sharing, "_has_tiles", HAS_TILES.__wrapped__)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert number(torch.randn(1, 24).bfloat16(), factor(16, 24, torch.bfloat16)) == 0


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    ("tokens", "rows", "dtype", "around"),
    [
        (MOST_TOKENS + 1, 16, torch.float32, torch.no_grad),
        (1, BLOCKS + 1, torch.float32, torch.no_grad),
        (2, 16, torch.float64, torch.no_grad),
        (MOST_TOKENS + 1, 16, torch.bfloat16, torch.no_grad),
        (2, 16, torch.float16, torch.no_grad),
        (1, 16, torch.float32, nullcontext),  # training keeps its bits
        (2, 16, torch.bfloat16, nullcontext),
        (0, 16, torch.float32, torch.no_grad),
    ],
)
def test_in_one_piece(
    tokens: int, rows: int, dtype: torch.dtype, around: Callable[[], AbstractContextManager[object]]
) -> None:
    w, x = factor(rows, 24, dtype), torch.randn(tokens, 24).to(dtype)
    with around():
        assert number(x, w) == 0
        assert torch.equal(linear(x, w), nn.functional.linear(x, w))


@pytest.mark.parametrize("shape", [(24,), (0, 24), (5, 24), (2, 3, 24)])
@pytest.mark.parametrize("around", [torch.no_grad, nullcontext])
def test_inputs_are_taken(shape: tuple[int, ...], around: Callable[[], AbstractContextManager[object]]) -> None:
    x, features = torch.randn(*shape), torch.tensor([3, 5, 17])
    with around():
        assert torch.equal(taken(x, features), x[..., features])


@torch.no_grad()
def test_one_thread_and_many_leave_it_to_mkl() -> None:
    for threads in (1, BLOCKS + 1):
        torch.set_num_threads(threads)
        assert number(torch.randn(1, 24), factor(16, 24)) == 0


@needs_mkl
@pytest.mark.parametrize("layout", [PlainLayout(), PivotedLayout()])
@torch.no_grad()
def test_models_write_the_same(
    layout: Layout, dense: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed_twin(dense("llama"), layout).eval()
    ids = torch.arange(1, 7)[None]

    def answer() -> tuple[Tensor, Tensor]:
        written = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return model(ids).logits, written

    with Called() as called:
        logits, written = answer()
    assert called.batched > 0
    monkeypatch.setattr(modeling_basis_sharing, "MOST_TOKENS", 0)
    one_piece, expected = answer()
    torch.testing.assert_close(logits, one_piece, rtol=1e-5, atol=1e-5)
    assert torch.equal(written, expected)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_exported_layer_is_one_product(dtype: torch.dtype) -> None:
    """Exporters and compilers see the two products that a layer is, and choose by themselves."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = factor(16, 24, dtype)

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.w)

    graph = torch.export.export(Product(), (torch.randn(2, 24).to(dtype),)).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == ["aten.linear.default"]
