"""Counts what code does with tensors that hold no values: bytes that are alive at once, products, decompositions.

The tensors are PyTorch's `FakeTensor`: shapes, dtypes and devices are those of a real run, and operations cost nothing.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import bs_exp.linalg.pivoting  # noqa: F401  makes the operation below

_ATEN = torch.ops.aten
# What comparisons of values answer: that of code for which all is well.
_ALIKE = (_ATEN.allclose.default, _ATEN.equal.default)
_ANY = (_ATEN.any.default, _ATEN.any.dim)
_PRODUCTS = (_ATEN.matmul.default, _ATEN.linear.default)
_ATTENTIONS = ("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")


class Decomposition(NamedTuple):
    """One kind of factorisation of matrices of one shape (rows, columns); of solves, that of the right sides."""

    kind: str
    rows: int
    columns: int


# Operation -> its name for people, and the matrices of its size that LAPACK takes as workspace beside its results.
_DECOMPOSITIONS: Mapping[Any, tuple[str, float]] = {
    _ATEN._linalg_eigh.default: ("eigenvectors", 2.0),
    _ATEN.linalg_eigh.default: ("eigenvectors", 2.0),
    # Where eigenvalues alone are asked for, PyTorch makes vectors too while a mode like the ledger is entered.
    _ATEN.linalg_eigvalsh.default: ("eigenvectors", 2.0),
    _ATEN.linalg_cholesky_ex.default: ("cholesky", 0.0),
    _ATEN.linalg_solve_triangular.default: ("triangular solve", 0.0),
    _ATEN.cholesky_solve.default: ("cholesky solve", 0.0),
    _ATEN._linalg_solve_ex.default: ("solve", 1.0),
    _ATEN.linalg_qr.default: ("qr", 1.0),
    _ATEN._linalg_svd.default: ("svd", 4.0),
    _ATEN.linalg_svd.default: ("svd", 4.0),
    torch.ops.bs_exp.interpolation.default: ("pivoted qr", 3.0),
}


@dataclass
class Work:
    """What a stage does: bytes alive at once on the host and on the device, and operations.

    `flops` are those of matrix products by device type and dtype, `moved` the bytes that all other operations read and
    write by device type, `calls` their number.
    """

    host_bytes: int = 0
    device_bytes: int = 0
    calls: int = 0
    flops: Counter[tuple[str, torch.dtype]] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    decompositions: Counter[tuple[str, Decomposition]] = field(default_factory=Counter)

    def times(self, factor: float) -> Work:
        """The same work so many times, one after the other: it needs no more memory."""
        return Work(
            self.host_bytes,
            self.device_bytes,
            round(self.calls * factor),
            _scaled(self.flops, factor),
            _scaled(self.moved, factor),
            _scaled(self.decompositions, factor),
        )

    def then(self, other: Work) -> Work:
        """One after the other."""
        return Work(
            max(self.host_bytes, other.host_bytes),
            max(self.device_bytes, other.device_bytes),
            self.calls + other.calls,
            self.flops + other.flops,
            self.moved + other.moved,
            self.decompositions + other.decompositions,
        )

    def extended(self, longer: Work, steps: float) -> Work:
        """The work that grows by the difference to a `longer` one with each of so many further steps behind that."""
        # Counters leave out what is not above 0.
        return Work(
            longer.host_bytes + round(steps * max(0, longer.host_bytes - self.host_bytes)),
            longer.device_bytes + round(steps * max(0, longer.device_bytes - self.device_bytes)),
            longer.calls + round(steps * (longer.calls - self.calls)),
            longer.flops + _scaled(longer.flops - self.flops, steps),
            longer.moved + _scaled(longer.moved - self.moved, steps),
            longer.decompositions + _scaled(longer.decompositions - self.decompositions, steps),
        )

    def without(self, other: Work) -> Work:
        """The work without that of a part of it, whose memory it has all the same."""
        return Work(
            self.host_bytes,
            self.device_bytes,
            max(0, self.calls - other.calls),
            self.flops - other.flops,
            self.moved - other.moved,
            self.decompositions - other.decompositions,
        )


def _scaled(counts: Counter[Any], factor: float) -> Counter[Any]:
    return Counter({key: round(count * factor) for key, count in counts.items()})


class Ledger(TorchDispatchMode):
    """While it is entered, tensors that are made hold no values, and what is done with them is counted.

    Questions about values get the answers of code for which all is well: all is finite, equal, positive, and nothing is
    zero. Where a mask chooses elements, all are chosen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._alive: dict[int, tuple[bool, int]] = {}
        self._now = [0, 0]  # host, device
        self._no: set[int] = set()  # storages of truth values that are false, and of what is zero
        self._work = Work()
        self._stack: list[ExitStack] = []

    def __enter__(self) -> Self:
        stack = ExitStack()
        stack.enter_context(self.fake)
        super().__enter__()  # type: ignore[no-untyped-call]
        self._stack.append(stack)
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.pop().close()

    @contextmanager
    def counting(self) -> Iterator[Work]:
        """Counts the work until the end of the context, in which the ledger is entered; memory that was alive before
        does not count."""
        outer, (host, device) = self._work, self._now
        found = self._work = Work(host, device)
        try:
            with self:
                yield found
        finally:
            found.host_bytes -= host
            found.device_bytes -= device
            self._work = outer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ALIKE:
            return True
        if func is _ATEN._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._value(args[0])
        if func is _ATEN.index.Tensor:
            args = (args[0], _chosen(args[1]))
        found = _all_elements(args[0]) if func is _ATEN.nonzero.default else func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in made:
            self._note(tensor, known)
        if made:
            self._count(func, args, kwargs, found, given, made)
            if func is _ATEN.tril.default or (func in _ANY and self._is_none(given[0])):
                self._no.add(made[0].untyped_storage()._cdata)
        return found

    def _value(self, scalar: Tensor) -> bool | int | float:
        if scalar.dtype is torch.bool:
            return scalar.untyped_storage()._cdata not in self._no
        return 1.0 if scalar.dtype.is_floating_point else 0

    def _is_none(self, asked: Tensor) -> bool:
        """Whether `any` of these is false: of comparisons, and of what is below a triangle."""
        return asked.dtype is torch.bool or asked.untyped_storage()._cdata in self._no

    def _note(self, tensor: Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in known or place in self._alive:
            return
        on_device = tensor.device.type not in ("cpu", "meta")
        self._alive[place] = (on_device, storage.nbytes())
        self._now[on_device] += storage.nbytes()
        weakref.finalize(storage, self._gone, place)
        self._reach()

    def _gone(self, place: int) -> None:
        on_device, nbytes = self._alive.pop(place, (False, 0))
        self._now[on_device] -= nbytes
        self._no.discard(place)

    def _reach(self, host: int = 0, device: int = 0) -> None:
        self._work.host_bytes = max(self._work.host_bytes, self._now[0] + host)
        self._work.device_bytes = max(self._work.device_bytes, self._now[1] + device)

    def _count(self, func: Any, args: Any, kwargs: Any, found: Any, given: list[Tensor], made: list[Tensor]) -> None:
        device = made[0].device.type
        self._work.calls += 1
        if (entry := _DECOMPOSITIONS.get(func)) is not None:
            kind, workspace = entry
            rows, columns = shape_of(func, args, kwargs)
            self._work.decompositions[device, Decomposition(kind, rows, columns)] += 1
            space = round(workspace * rows * columns * made[0].element_size())
            self._reach(*((space, 0) if device == "cpu" else (0, space)))
        elif flops := _flops(func, args, kwargs, found):
            self._work.flops[device, made[0].dtype] += flops
        elif not _is_view(func):
            self._work.moved[device] += sum(tensor.nbytes for tensor in (*given, *made))


def shape_of(func: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of what is factorised, or of the right sides that are solved for, which stand as columns."""
    kind, _ = _DECOMPOSITIONS[func]
    rows, columns = args[0].shape[-2:]
    if kind in ("triangular solve", "solve"):
        # The matrix is square, and what is solved for stands beside it, or is a vector.
        columns = args[1].numel() // max(1, args[0].numel() // rows)
    return rows, columns


def _flops(func: Any, args: Any, kwargs: Any, found: Any) -> int:
    packet = func._overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=found))
    # In inference mode, what is made of other operations comes here as a whole.
    if func in _PRODUCTS:
        return 2 * int(found.numel()) * int(args[0].shape[-1])
    if packet.__name__ in _ATTENTIONS:
        query, key = args[0].shape, args[1].shape
        return int(4 * query[:-2].numel() * query[-2] * key[-2] * query[-1])
    return 0


def _is_view(func: Any) -> bool:
    return any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)


def _chosen(indices: Any) -> list[Tensor | None]:
    """Indices in which a mask chooses all elements."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool:
            found += [torch.empty(index.numel(), dtype=torch.long, device=index.device)] * index.ndim
        else:
            found.append(index)
    return found


def _all_elements(mask: Tensor) -> Tensor:
    return torch.empty(mask.numel(), mask.ndim, dtype=torch.long, device=mask.device)
