"""What the fused optimizers share: the checks of a step over many tensors, and the table that kernels read it from.

Of each parameter everything is updated, or the rows (dim 0) or columns (dim 1) that its `channels` name; a vector's
channels are its elements. Optimizer state is compact: just what is updated, in the parameter's dtype.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from petl_kernels.ops._rows import DTYPES
from petl_kernels.ops._validate import check_channels

# The columns of a table: five addresses that may change from step to step, then the layout. 0 stands for "none".
# csrc/bindings/cpu.cpp and the Triton kernels read them in this order.
FIELDS: tuple[str, ...] = ("param", "grad", "state_0", "state_1", "step", "channels", "dtype", "selection")
FIELDS += ("rows", "cols", "param_row", "param_col", "grad_row", "grad_col")
NUMBERS = 6  # hyper-parameters per tensor, of either optimizer
_ALL, _ROWS, _COLUMNS = 0, 1, 2

Tensors = Sequence[Tensor]


def compact_shape(param: Tensor, channels: Tensor | None, dim: int) -> tuple[int, ...]:
    """The shape of what is updated, which is that of the state."""
    shape = list(param.shape)
    if channels is not None:
        shape[dim] = channels.numel()
    return tuple(shape)


def check_selection(op: str, param: Tensor, channels: Any, dim: Any) -> None:
    """Channels of a matrix or vector that exist."""
    if param.dim() not in (1, 2):
        raise ValueError(f"{op}: a tensor with channels must be 1-D or 2-D, got {list(param.shape)}")
    if isinstance(dim, bool) or dim not in range(param.dim()):
        raise ValueError(f"{op}: dim must be {'0 or 1' if param.dim() == 2 else '0 for a vector'}, got {dim!r}")
    check_channels(op, channels, param.shape[dim], param, "the tensor")


def check_param(op: str, name: str, value: Any) -> None:
    """A dense floating-point tensor, each element of which has a place of its own in memory."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be dense, got {value.layout}")
    if value.numel() and _span(value) is None:
        raise ValueError(f"{op}: {name} must not overlap itself, got strides {value.stride()}")


def check_step(
    op: str,
    params: Tensors,
    grads: Tensors,
    states: Mapping[str, Tensors],
    steps: Tensors,
    channels: Sequence[Tensor | None],
    dims: Sequence[int],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Lists of one length, and of each parameter a gradient and states that fit it. An empty state is none."""
    lists: dict[str, Sequence[Any]] = {"params": params, "grads": grads, **states, "steps": steps}
    for name, values in {**lists, "channels": channels, "dims": dims}.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{op}: {name} must be a list, got {type(values).__name__}")
        if len(values) != len(params):
            raise ValueError(f"{op}: {name} must have one entry per parameter = {len(params)}, got {len(values)}")
    for i, p in enumerate(params):
        check_param(op, f"params[{i}]", p)
        if channels[i] is not None:
            check_selection(op, p, channels[i], dims[i])
        compact = compact_shape(p, channels[i], dims[i])
        _check_like(op, f"grads[{i}]", grads[i], p, tuple(p.shape), p.dtype)
        for name, values in states.items():
            _check_like(op, f"{name}[{i}]", values[i], p, compact, p.dtype, optional="momentum" in name)
        _check_like(op, f"steps[{i}]", steps[i], p, (), torch.float32, optional="momentum_buffers" in states)
        if p.device != params[0].device:
            raise ValueError(f"{op}: params must share one device, got {params[0].device} and {p.device}")
    if len({id(p) for p in params}) < len(params):
        raise ValueError(f"{op}: params must be distinct tensors")
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if value is not None and params:
            if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.numel() != 1:
                raise TypeError(f"{op}: {name} must be None or a float32 tensor of one element, got {value!r}")
            if value.device != params[0].device:
                raise ValueError(f"{op}: {name} must be on {params[0].device}, got {value.device}")


def _check_like(
    op: str, name: str, value: Any, p: Tensor, shape: tuple[int, ...], dtype: torch.dtype, optional: bool = False
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if optional and value.shape == (0,):
        return
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be dense, got {value.layout}")
    if value.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {value.dtype}")
    if value.device != p.device:
        raise ValueError(f"{op}: {name} must be on its parameter's device {p.device}, got {value.device}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(value.shape)}")


def per_tensor(op: str, name: str, value: Any, count: int) -> list[Any]:
    """A hyper-parameter as one number per tensor: it may be given as one for all of them."""
    values = [value] * count if isinstance(value, (int, float)) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, (int, float)) for v in values):
        raise TypeError(f"{op}: {name} must be a number or a list of numbers, got {value!r}")
    if len(values) != count:
        raise ValueError(f"{op}: {name} must have one entry per parameter = {count}, got {len(values)}")
    return list(values)


def _span(t: Tensor) -> int | None:
    """How many elements of memory a tensor reaches over, or None where two of its elements may share a place."""
    span = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape) if size > 1):
        if stride < span:
            return None
        span += stride * (size - 1)
    return span


def _layout(p: Tensor, g: Tensor, states: Tensors, channels: Tensor | None, dim: int) -> tuple[int, ...] | None:
    """The fields from "selection" on, or None where no matrix with two strides describes these tensors."""
    ps, gs, contiguous = p.stride(), g.stride(), all(s.is_contiguous() for s in states)
    if channels is not None:
        k = channels.numel()
        if not contiguous:
            return None
        if p.dim() == 1:
            return (_COLUMNS, 1, k, 0, *ps, 0, *gs)
        return (_COLUMNS, p.shape[0], k, *ps, *gs) if dim else (_ROWS, k, p.shape[1], *ps, *gs)
    flat = contiguous and p.is_contiguous() and g.is_contiguous()
    if flat or (_span(p) == p.numel() and all(t.stride() == ps for t in (g, *states))):
        return (_ALL, 1, p.numel(), 0, 1, 0, 1)
    if p.dim() == 1 and contiguous:
        return (_ALL, 1, p.numel(), 0, *ps, 0, *gs)
    if p.dim() == 2 and contiguous:
        return (_ALL, *p.shape, *ps, *gs)
    if p.dim() == 2 and all(s.t().is_contiguous() for s in states):
        return (_ALL, *p.shape[::-1], *ps[::-1], *gs[::-1])
    return None


def _present(*states: Tensor) -> list[Tensor]:
    return [s for s in states if s.shape != (0,)]


def cannot_walk(params: Tensors, grads: Tensors, states: Sequence[Tensors], channels: Any, dims: Any) -> str | None:
    """Why no table describes these tensors, or None."""
    for i, p in enumerate(params):
        own = [s[i] for s in states]
        for t in (p, grads[i], *own):
            if is_traceable_wrapper_subclass(t):
                return f"its tensors must own their memory, got a {type(t).__name__}"
        if _layout(p, p, _present(*own), channels[i], dims[i]) is None:
            return f"params[{i}] and its states, of more than two dimensions, must be dense and of the same strides"
    return None


class Table:
    """The tensors of a step as kernels read them: a row of `FIELDS` each.

    Attributes:
        rows: the numbers, row after row.
        count: how many tensors.
        sizes: how many elements each updates.
        steps: their step counters.
        device: where they live.
        on_device: what an implementation keeps of this table on that device.
    """

    def __init__(
        self,
        params: Tensors,
        grads: Tensors,
        states: Sequence[Tensors],
        steps: Tensors,
        channels: Sequence[Tensor | None],
        dims: Sequence[int],
    ) -> None:
        self.rows = array("q")
        self.device = params[0].device if params else torch.device("cpu")
        self.on_device: Any = None
        self.sizes: list[int] = []
        self._channels = list(channels)  # whose memory the table points to
        self._foreign: list[int] = []  # gradients that no two strides describe beside their parameter's
        for i, p in enumerate(params):
            c = channels[i]
            present = _present(*(s[i] for s in states))
            layout = _layout(p, grads[i], present, c, dims[i])
            if layout is None:
                self._foreign.append(i)
                layout = _layout(p, p, present, c, dims[i])
                assert layout is not None  # or `cannot_walk` would have said so
            self.rows.extend((0, 0, 0, 0, 0, 0 if c is None else c.data_ptr(), DTYPES[p.dtype], *layout))
            self.sizes.append(layout[1] * layout[2])
        self.count = len(params)
        self.point_to(params, grads, states, steps)

    def point_to(self, params: Tensors, grads: Tensors, states: Sequence[Tensors], steps: Tensors) -> None:
        """Take the addresses of other tensors of the very same layouts."""
        if self._foreign:
            grads = list(grads)
            for i in self._foreign:
                grads[i] = torch.empty_like(params[i]).copy_(grads[i])
            self._copies = grads
        self.steps = steps
        columns: list[Iterable[Tensor]] = [params, grads, *states]
        for field, tensors in chain(enumerate(columns), ((FIELDS.index("step"), steps),)):
            self.rows[field :: len(FIELDS)] = array("q", list(map(Tensor.data_ptr, tensors)))


def interleaved(numbers: Sequence[Sequence[float]]) -> array[float]:
    """Hyper-parameters, given as one list per kind, tensor by tensor."""
    return array("d", chain.from_iterable(zip(*numbers)))


def step_over(
    launch: Callable[[Table, array[float], Tensor | None, Tensor | None], None],
    params: Tensors,
    grads: Tensors,
    states: Sequence[Tensors],
    steps: Tensors,
    channels: Sequence[Tensor | None],
    dims: Sequence[int],
    *rest: Any,
) -> None:
    """`launch` over a table of these tensors, made for this one step; `rest` as in the operators' schemas."""
    *numbers, grad_scale, found_inf = rest
    launch(Table(params, grads, states, steps, channels, dims), interleaved(numbers), grad_scale, found_inf)
