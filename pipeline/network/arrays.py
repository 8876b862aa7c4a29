"""Torch tensors in the hands of NumPy code: a function of arrays becomes a part of a graph.

NumPy asks the arguments of its functions whether they compute themselves (NEP 13 and NEP 18); these do, in
torch. A scorer that was written for arrays can so be traced as it is, and there is no second one to keep
equal to it. What is not known here is refused by NumPy, as a TypeError that names the function.

In-place changes bind a new tensor: what shares memory with it in NumPy, a view or an array that `out=` names,
does not see them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

_DTYPES = {
    np.dtype(each): torch.from_numpy(np.empty(0, each)).dtype
    for each in ("bool", "int32", "int64", "float16", "float32", "float64")
}
_NAMES = {theirs: ours for ours, theirs in _DTYPES.items()}

_UFUNCS: dict[str, Callable[..., Tensor]] = {
    "equal": torch.eq,
    "invert": torch.bitwise_not,
    "power": torch.pow,
}
"""Those that have another name in torch."""


class Array(NDArrayOperatorsMixin):
    """A tensor that NumPy's functions take for an array."""

    __hash__ = object.__hash__

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def dtype(self) -> np.dtype[Any]:
        """As NumPy calls it."""
        return _NAMES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def T(self) -> Array:
        """The matrix, transposed."""
        return Array(self.tensor.T)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, *_: Any, **__: Any) -> NDArray[Any]:
        raise TypeError("the values are not known before the graph runs")

    def __getitem__(self, key: Any) -> Array:
        return Array(self.tensor[_key(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        given, where = _tensor(value, self.dtype), _key(key)
        if isinstance(where, Tensor) and where.dtype == torch.bool:
            self.tensor = torch.where(where, given, self.tensor)
        else:
            self.tensor = torch.index_put(self.tensor, where, given)

    def astype(self, dtype: DTypeLike, copy: bool = True) -> Array:
        """The same values as another type."""
        return Array(_tensor(self, np.dtype(dtype)))

    def copy(self) -> Array:
        """The same values, which change apart."""
        return Array(self.tensor)

    def sum(self, axis: int | None = None, dtype: DTypeLike | None = None, keepdims: bool = False) -> Array:
        """Sum over an axis, or of all."""
        given = self.tensor if dtype is None else _tensor(self, np.dtype(dtype))
        return Array(given.sum(dim=axis, keepdim=keepdims))

    def max(self, axis: int, keepdims: bool = False) -> Array:
        """Largest entry over an axis."""
        return Array(self.tensor.amax(axis, keepdims))

    def min(self, axis: int, keepdims: bool = False) -> Array:
        """Smallest entry over an axis."""
        return Array(self.tensor.amin(axis, keepdims))

    def argmax(self, axis: int) -> Array:
        """Where the largest entry over an axis is."""
        return Array(self.tensor.argmax(axis))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        function = _torch(ufunc.__name__)
        if method != "__call__" or function is None or options.keys() - {"out", "where"}:
            return NotImplemented
        out = options.get("out", (None,))[0]
        kinds = [getattr(each, "dtype", type(each)) for each in inputs]  # Python's numbers give way
        taken = ufunc.resolve_dtypes((*kinds, *[None] * ufunc.nout))
        made = function(*(_tensor(each, kind) for each, kind in zip(inputs, taken, strict=False)))
        if "where" in options:
            made = torch.where(_tensor(options["where"]), made, _tensor(out))
        if not isinstance(out, Array):
            return Array(made)
        out.tensor = made
        return out

    def __array_function__(self, function: Any, types: Any, given: Any, options: Any) -> Any:
        if function not in _FUNCTIONS:
            return NotImplemented
        made = _FUNCTIONS[function](*given, **options)
        return Array(made) if isinstance(made, Tensor) else list(map(Array, made))


def _torch(name: str) -> Callable[..., Tensor] | None:
    """What NumPy's or SciPy's ufunc of a name is in torch, if it is there."""
    found: Callable[..., Tensor] | None = _UFUNCS.get(name) or getattr(torch, name, None)
    return found or getattr(torch.special, name, None)


def _tensor(value: Any, dtype: np.dtype[Any] | None = None) -> Tensor:
    """A number, an array or an `Array` as a tensor."""
    wanted = None if dtype is None else _DTYPES[dtype]
    found: Tensor = torch.as_tensor(value.tensor if isinstance(value, Array) else value, dtype=wanted)
    return found


def _promoted(values: Sequence[Any]) -> list[Tensor]:
    """Values as tensors of one type, the one that NumPy computes in."""
    kinds = [getattr(each, "dtype", each) for each in values]  # Python's numbers have none, and give way
    return [_tensor(each, np.result_type(*kinds)) for each in values]


def _key(key: Any) -> Any:
    """An index with tensors in place of arrays."""
    if isinstance(key, tuple):
        return tuple(map(_key, key))
    return _tensor(key) if isinstance(key, Array | np.ndarray) else key


def _norm(x: Array, ord: float = 2, axis: int | None = None, keepdims: bool = False) -> Tensor:
    if axis is None:
        raise TypeError("linalg.norm without an axis")  # of a matrix it is another one
    found: Tensor = torch.linalg.vector_norm(x.tensor, ord, axis, keepdims)
    return found


def _where(condition: Any, *values: Any) -> Tensor:
    yes, no = _promoted(values)
    return torch.where(_tensor(condition), yes, no)


def _joined(join: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of arrays and an axis that brings them to one type first."""

    def joined(arrays: Sequence[Any], axis: int = 0) -> Tensor:
        return join(_promoted(arrays), axis)

    return joined


def _taken(a: Array, indices: Array, axis: int) -> Tensor:
    if axis != 1:
        raise TypeError(f"take_along_axis along axis {axis}")
    found: Tensor = a.tensor[torch.arange(len(a))[:, None], indices.tensor]
    return found  # gather under vmap fixes how many rows


def _searchsorted(a: Array, v: Any, side: str = "left") -> Tensor:
    before = torch.lt if side == "left" else torch.le
    return before(a.tensor, _tensor(v)[..., None]).sum(-1)  # torch.searchsorted has no rule for vmap


_FUNCTIONS: dict[Any, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    # whoever asks for a part of an order gets all of it
    np.argpartition: lambda a, kth, axis=-1: torch.argsort(a.tensor, axis),
    np.argsort: lambda a, axis=-1, kind=None: torch.argsort(a.tensor, axis),  # ONNX has no stable one
    np.concatenate: _joined(torch.cat),
    np.cumsum: lambda a, axis: torch.cumsum(a.tensor, axis),
    np.einsum: lambda terms, *arrays: torch.einsum(terms, *_promoted(arrays)),
    np.linalg.norm: _norm,
    np.partition: lambda a, kth, axis=-1: torch.sort(a.tensor, axis).values,
    np.searchsorted: _searchsorted,
    np.sort: lambda a, axis=-1: torch.sort(a.tensor, axis).values,
    np.split: lambda a, places, axis: torch.tensor_split(a.tensor, tuple(places.tolist()), axis),
    np.stack: _joined(torch.stack),
    np.take_along_axis: _taken,
    np.where: _where,
    np.zeros_like: lambda a: torch.zeros_like(a.tensor),
}
