"""Triton implementation of `norm_adapter`: launch settings and entry points over `triton_kernels`.

One launch forward. Two or three backward: dz and the row's share of the norm's gradient; dx and the adapter's gradients
by slabs of channels, with the bottleneck's kernel; then the sums over groups of rows, in a fixed order. No atomics:
results are bit-identical from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from petl_kernels.ops import _triton
from petl_kernels.ops._adapter_norm import new_statistics
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._triton import Device, block, dense, rows, warps, workspace
from petl_kernels.ops.bottleneck_adapter import triton as bottleneck
from petl_kernels.ops.norm_adapter import triton_kernels as kernels

_MAX_RANK = 128
_SUM_BLOCK = 512


def _settings(d: int, r: int, itemsize: int, device: Device) -> dict[str, int]:
    """Tiles of the forward: sixteen rows, of which 16-bit ones of up to 1024 columns stay in registers.

    The bounds are where the kernels, compiled for sm_90 and gfx942, begin to spill.
    """
    half, nvidia = itemsize == 2, device.warp_size == 32
    block_r = max(64 if half else 16, block(_MAX_RANK, r))
    held = half and d <= 1024
    width = block(128 if held else 64 if half else max(16, min(64, 2048 // block_r)), d)
    return dict(
        SLABS=triton.cdiv(d, width) if held else 0,
        BLOCK_M=16,
        BLOCK_D=width,
        BLOCK_R=block_r,
        num_warps=warps(8, device),
        num_stages=2 if nvidia else 1,
    )


def _slab_settings(d: int, r: int, itemsize: int, device: Device) -> dict[str, int]:
    """The bottleneck's; half as wide where what the norm takes more of spills."""
    settings = bottleneck._slab_settings(d, r, itemsize, device)
    if (itemsize == 4 or r > 64) and settings["BLOCK_D"] > 32:
        settings["BLOCK_D"] //= 2
    return settings


def unsupported(x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, w_down: Tensor, *_: Any) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    if w_down.shape[0] > _MAX_RANK:
        return f"its bottleneck is at most {_MAX_RANK} wide, got r = {w_down.shape[0]}"
    return _triton.cannot_run(x, ln_weight, w_down)


def forward(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: str,
    norm: str,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and z and the statistics (empty unless `save`); schema in the op's `__init__`."""
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty((*x.shape[:-1], d_out), dtype=dtype)
    z = x.new_empty((*x.shape[:-1], r) if save else (0,))
    n = y.numel() // d_out
    mean, rstd = new_statistics(x, n if save else 0, norm)
    if n == 0:
        return y, z, mean, rstd
    sequential = residual is x
    x, stride_xm = rows(x)
    if sequential:
        residual, stride_rm = x, stride_xm
    else:
        residual, stride_rm = (None, 0) if residual is None else rows(residual)
    settings = _settings(d_in, r, x.element_size(), _triton.device_of(x.device))
    with torch.cuda.device_of(x):
        kernels._norm_adapter_fwd_kernel[(triton.cdiv(n, settings["BLOCK_M"]),)](
            x,
            dense(ln_weight),
            dense(ln_bias),
            w_down.contiguous(),
            dense(b_down),
            w_up.contiguous(),
            dense(b_up),
            residual,
            dense(scale),
            y,
            z if save else None,
            mean if mean.numel() else None,
            rstd if save else None,
            n,
            stride_xm,
            stride_rm,
            float(alpha),
            float(eps),
            D_IN=d_in,
            D_OUT=d_out,
            R=r,
            RMS=norm == "rms",
            CHANNEL_SCALE=scale is not None and scale.numel() > 1,
            ACTIVATION=activation,
            PRECISION=_triton.precision(),
            ADD_X=sequential,
            **settings,
        )
    return y, z, mean, rstd


def backward(
    g: Tensor,
    x: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: str,
    norm: str,
    add_g: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of (x, ln_weight, ln_bias, w_down, b_down, w_up, b_up, scale); empty where not needed."""
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    n, d = g.numel() // d_out, max(d_in, d_out)
    dx = z.new_empty((*g.shape[:-1], d_in) if needs[0] else (0,))
    grads = new_gradients((ln_weight, ln_bias, w_down, b_down, w_up, b_up, scale), needs[1:], z)
    if n == 0:
        return dx, *(grad.zero_() for grad in grads)
    g, stride_gm = rows(g)
    w_down, w_up, b_up, scale = w_down.contiguous(), w_up.contiguous(), dense(b_up), dense(scale)
    ln_weight, ln_bias = dense(ln_weight), dense(ln_bias)
    device, itemsize, alpha = _triton.device_of(g.device), z.element_size(), float(alpha)
    channel = scale is not None and scale.numel() > 1
    of_dx, of_weight, of_bias, of_down, of_b_down, of_up, of_b_up, of_scale = needs
    # The sum over rows of dz xh and of dz, from which the norm's gradients follow too.
    of_m, of_s = of_weight or of_down, of_bias or of_down or of_b_down
    x, stride_xm = rows(x) if x is not None and (of_dx or of_m) else (None, 0)
    by_slabs = _slab_settings(d, r, itemsize, device)
    chunks = triton.cdiv(r, by_slabs["BLOCK_R"])
    shared = (of_m, of_s, of_up, of_b_up, of_scale)
    groups = bottleneck._row_groups(n, d, r, any(shared), device, by_slabs)
    lengths = (r * d_in, r, d_out * r, d_out, d_out * chunks)
    scratch = workspace([groups * size if need else 0 for need, size in zip(shared, lengths)], g)
    parts = [part if need else None for need, part in zip(shared, scratch)]
    sizes: dict[str, Any] = dict(D_IN=d_in, D_OUT=d_out, R=r, CHANNEL_SCALE=channel)
    common: dict[str, Any] = dict(sizes, PRECISION=_triton.precision())
    with torch.cuda.device_of(g):
        dz = torch.empty_like(z) if of_dx or of_m or of_s else None
        offset = slope = None
        if of_dx:
            slope = g.new_empty((n,), dtype=torch.float32)
            offset = None if norm == "rms" else torch.empty_like(slope)
        if dz is not None:
            by_rows = bottleneck._row_settings(n, d_out, r, itemsize, device)
            kernels._norm_adapter_bwd_row_kernel[(triton.cdiv(n, by_rows["BLOCK_M"]),)](
                g,
                z,
                w_down,
                dense(b_down),
                w_up,
                ln_weight,
                ln_bias,
                scale,
                dz,
                offset,
                slope,
                n,
                stride_gm,
                alpha,
                ACTIVATION=activation,
                **common,
                **by_rows,
            )
        bottleneck.kernels._bottleneck_adapter_bwd_slab_kernel[(triton.cdiv(d, by_slabs["BLOCK_D"]), groups, chunks)](
            g,
            x,
            z,
            dz,
            w_down,
            w_up,
            b_up,
            scale,
            None,
            mean if mean.numel() else None,
            rstd,
            offset,
            slope,
            ln_weight,
            dx if of_dx else None,
            *parts,
            n,
            stride_gm,
            stride_xm,
            alpha,
            ADD_G=add_g,
            ACTIVATION=activation,
            **common,
            **by_slabs,
        )
        if any(shared):
            targets = [grad if need else None for grad, need in zip(grads, needs[1:])]
            dln_weight, dln_bias, dw_down, *rest = targets
            width = 64
            longest = max(d_out * r if of_up else d_out, d_in * _SUM_BLOCK // width)
            kernels._norm_adapter_bwd_sum_kernel[(triton.cdiv(longest, _SUM_BLOCK), 4)](
                *parts,
                w_down,
                ln_weight,
                ln_bias,
                dw_down,
                dln_weight,
                dln_bias,
                *rest,
                groups,
                groups * chunks,
                BLOCK_P=8,
                BLOCK=_SUM_BLOCK,
                BLOCK_D=width,
                BLOCK_R=16,
                **sizes,
            )
    return dx, *grads
