"""Triton implementation of `bottleneck_adapter`: launch settings and entry points over `triton_kernels`.

One launch forward, two or three backward: dz by rows, then dx and the parameters' gradients by slabs of channels,
then, of more than one group of rows, the sum over the groups in a fixed order. No atomics: results are bit-identical
from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from petl_kernels.ops.bottleneck_adapter import triton_kernels as kernels

_MAX_RANK = 512
_INTERPRETED = not isinstance(kernels._bottleneck_adapter_fwd_kernel, triton.JITFunction)
_RAW_BF16 = False
if _INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder

    _RAW_BF16 = not getattr(InterpreterBuilder, "mended", False)  # as tests/triton_interpreter.py does


class _Device(NamedTuple):
    """What launch settings depend on: processors to fill, and lanes per warp (AMD has 64)."""

    processors: int
    warp_size: int


@cache
def _device(device: torch.device) -> _Device:
    if device.type != "cuda":
        return _Device(132, 32)  # the interpreter runs what an H100 would
    properties = torch.cuda.get_device_properties(device)
    return _Device(properties.multi_processor_count, getattr(properties, "warp_size", 32))


_SUM_BLOCK = 512

# Launch settings. The bounds on tiles are where the kernels, compiled for sm_80, sm_90, sm_100 and gfx942, begin to
# spill registers or pass the shared memory; tests/test_triton.py compiles them all.


def _block(wanted: int, size: int) -> int:
    """A tile width of at most `wanted` for a matrix width `size`; 16 is the least that `tl.dot` takes."""
    return max(16, min(wanted, triton.next_power_of_2(size)))


def _warps(count: int, device: _Device) -> int:
    return max(1, count * 32 // device.warp_size)


def _row_settings(n: int, d: int, r: int, itemsize: int, device: _Device) -> dict[str, int]:
    """Tiles of the kernels that walk rows: as many rows as still give every processor a program."""
    half = itemsize == 2
    block_r = _block(_MAX_RANK, r)
    most = max(16, min(64, (8192 if half else 2048) // block_r))
    fill = n // device.processors
    width = max(16, min(64, (8192 if half else 4096) // block_r))
    return dict(
        BLOCK_M=min(most, 64 if fill >= 64 else 32 if fill >= 32 else 16),
        BLOCK_D=_block(width, d),
        BLOCK_R=block_r,
        num_warps=_warps(8, device),
        num_stages=3 if half and device.warp_size == 32 else 2,  # a third stage passes gfx942's 64 KiB
    )


def _held_slabs(d: int, itemsize: int, settings: dict[str, int]) -> int:
    """How many of x's slabs of 128 columns stay in registers for the whole forward: 96 KiB of a processor's 256.

    Held, they are read once; the others are read again, from the L2 cache, for the residual. Products of float32
    operands leave no registers for them.
    """
    if itemsize != 2 or settings["BLOCK_R"] > 64:
        return 0
    width = _block(128, d)
    room = 96 * 1024 // (settings["BLOCK_M"] * itemsize * width)
    return min(triton.cdiv(d, width), 8, room)


def _slab_settings(d: int, r: int, itemsize: int, device: _Device) -> dict[str, int]:
    """Tiles of the kernel that walks slabs of channels; two float32 accumulators of BLOCK_R x BLOCK_D stay in it.

    As wide as they allow: every slab reads z and dz again, 2 r / BLOCK_D passes over N x d.
    """
    block_r = _block(64, r)
    rows, width = (16, 64) if itemsize == 4 else (32, 8192 // max(block_r, 32))
    return dict(BLOCK_M=rows, BLOCK_D=_block(width, d), BLOCK_R=block_r, num_warps=_warps(8, device), num_stages=2)


def _row_groups(n: int, d: int, r: int, partials: bool, device: _Device, settings: dict[str, int]) -> int:
    """Groups of rows: enough to fill the device, each of at least 4 r rows where it leaves partial sums behind."""
    programs = triton.cdiv(d, settings["BLOCK_D"]) * triton.cdiv(r, settings["BLOCK_R"])
    rows = 4 * max(r, 16) if partials else settings["BLOCK_M"]
    return max(1, min(triton.cdiv(device.processors, programs) if partials else 65535, n // rows))


def _precision() -> str:
    """How `tl.dot` multiplies float32: as `torch.backends.cuda.matmul` says for matrix products everywhere."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _rows(t: Tensor) -> tuple[Tensor, int]:
    """A tensor [..., d] and the stride of its rows; copied only where rows have no single stride or are not dense."""
    if t.is_contiguous():
        return t, t.shape[-1]
    if t.stride(-1) == 1 or t.shape[-1] == 1:
        try:
            return t, t.view(-1, t.shape[-1]).stride(0)
        except RuntimeError:
            pass  # the leading dimensions do not merge
    return t.contiguous(), t.shape[-1]


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def unsupported(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    residual: Tensor | None,
    scale: float | Tensor,
    activation: str,
) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    if x.dtype == torch.float64:
        return "it has no float64 kernels; float32, bfloat16 and float16 work"
    if w_down.shape[0] > _MAX_RANK:
        return f"its bottleneck is at most {_MAX_RANK} wide, got r = {w_down.shape[0]}"
    if x.device.type != "cuda" and not (_INTERPRETED and x.device.type == "cpu"):
        return f"it needs tensors on a GPU, got {x.device.type} (or TRITON_INTERPRET=1 set before triton is imported)"
    if _RAW_BF16 and torch.bfloat16 in (x.dtype, w_down.dtype):
        return "Triton's interpreter multiplies the raw bits of bfloat16; float32 and float16 work in it"
    return None


def forward(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: str,
    save_z: bool,
) -> tuple[Tensor, Tensor]:
    """y [..., d_out] and z [..., r] (empty unless `save_z`); shapes and dtypes as in the op's schema."""
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty((*x.shape[:-1], d_out), dtype=dtype)
    z = x.new_empty((*x.shape[:-1], r) if save_z else (0,))
    n = y.numel() // d_out
    if n == 0:
        return y, z
    sequential = residual is x
    x, stride_xm = _rows(x)
    device = _device(x.device)
    settings = _row_settings(n, d_in, r, x.element_size(), device)
    held = _held_slabs(d_in, x.element_size(), settings) if sequential else 0
    if held:
        settings["BLOCK_D"] = _block(128, d_in)  # fewer unrolled slabs
    if sequential:
        residual, stride_rm = x, stride_xm
    else:
        residual, stride_rm = (None, 0) if residual is None else _rows(residual)
    with torch.cuda.device_of(x):
        kernels._bottleneck_adapter_fwd_kernel[(triton.cdiv(n, settings["BLOCK_M"]),)](
            x,
            w_down.contiguous(),
            _dense(b_down),
            w_up.contiguous(),
            _dense(b_up),
            residual,
            _dense(scale),
            y,
            z if save_z else None,
            n,
            stride_xm,
            stride_rm,
            float(alpha),
            D_IN=d_in,
            D_OUT=d_out,
            R=r,
            CHANNEL_SCALE=scale is not None and scale.numel() > 1,
            ACTIVATION=activation,
            PRECISION=_precision(),
            HELD=held,
            **settings,
        )
    return y, z


def backward(
    g: Tensor,
    x: Tensor | None,
    z: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: str,
    add_g: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of (x, w_down, b_down, w_up, b_up, scale); an empty tensor for each that is not needed."""
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    n, d = g.numel() // d_out, max(d_in, d_out)
    dx = z.new_empty((*g.shape[:-1], d_in) if needs[0] else (0,))
    grads = tuple(
        z.new_empty((0,)) if p is None or not need else p.new_empty(p.shape)
        for p, need in zip((w_down, b_down, w_up, b_up, scale), needs[1:])
    )
    g, stride_gm = _rows(g)
    x, stride_xm = _rows(x) if x is not None and needs[1] else (None, 0)
    w_down, w_up, b_up, scale = w_down.contiguous(), w_up.contiguous(), _dense(b_up), _dense(scale)
    device, itemsize, alpha = _device(g.device), z.element_size(), float(alpha)
    by_slabs = _slab_settings(d, r, itemsize, device)
    chunks = triton.cdiv(r, by_slabs["BLOCK_R"])
    groups = _row_groups(n, d, r, any(needs[1:]), device, by_slabs)
    channel = scale is not None and scale.numel() > 1
    shares = (groups,) * 4 + (groups * chunks,)
    targets, parts = _targets(grads, needs[1:], shares, d_out, scalar_scale=scale is not None and not channel)
    sizes: dict[str, Any] = dict(D_OUT=d_out, R=r, CHANNEL_SCALE=channel)
    common: dict[str, Any] = dict(sizes, ACTIVATION=activation, PRECISION=_precision())
    with torch.cuda.device_of(g):
        dz = torch.empty_like(z) if any(needs[:3]) else None
        if dz is not None and n > 0:
            by_rows = _row_settings(n, d_out, r, itemsize, device)
            kernels._bottleneck_adapter_bwd_dz_kernel[(triton.cdiv(n, by_rows["BLOCK_M"]),)](
                g, z, w_up, scale, dz, n, stride_gm, alpha, **common, **by_rows
            )
        kernels._bottleneck_adapter_bwd_slab_kernel[(triton.cdiv(d, by_slabs["BLOCK_D"]), groups, chunks)](
            g,
            x,
            z,
            dz,
            w_down,
            w_up,
            b_up,
            scale,
            dx if needs[0] else None,
            *targets,
            n,
            stride_gm,
            stride_xm,
            alpha,
            D_IN=d_in,
            ADD_G=add_g,
            **common,
            **by_slabs,
        )
        if any(part is not None for part in parts):
            longest = max(grad.numel() for part, grad in zip(parts, grads) if part is not None)
            kernels._bottleneck_adapter_bwd_sum_kernel[(triton.cdiv(longest, _SUM_BLOCK), 5)](
                *parts, *grads, groups, shares[4], D_IN=d_in, BLOCK_P=8, BLOCK=_SUM_BLOCK, **sizes
            )
    return dx, *grads


def _targets(
    grads: Sequence[Tensor], needs: Sequence[bool], shares: Sequence[int], d_out: int, scalar_scale: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Where the slab kernel writes each parameter's gradient, and which of these are partial sums in workspace.

    A gradient of one share is written in place. That of a scalar scale has d_out values per share, still to be summed.
    """
    summed = [need and (count > 1) for need, count in zip(needs, shares)]
    lengths = [grad.numel() * count for grad, count in zip(grads, shares)]
    if needs[4] and scalar_scale:
        summed[4], lengths[4] = True, d_out * shares[4]
    # Rounded up to 4 floats, so that each part starts on the 16 bytes that vector accesses want.
    padded = [(length + 3) // 4 * 4 if partial else 0 for length, partial in zip(lengths, summed)]
    if not any(summed):
        return [grad if need else None for grad, need in zip(grads, needs)], [None] * 5
    workspace = grads[0].new_empty(sum(padded), dtype=torch.float32).split(padded)
    parts = [part if partial else None for part, partial in zip(workspace, summed)]
    return [p if p is not None else grad if need else None for p, grad, need in zip(parts, grads, needs)], parts
