"""The Triton kernels of `gpu.lora`."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def two_gemm(
    x, a, b, y, h,
    stride_xn, stride_xk, stride_ar, stride_ak, stride_bm, stride_br,
    n, k, r, m, scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h = scale x a^T for a tile of rows, then y = h b^T for the same rows, column tile by column tile."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    here, ranked = row[:, None] < n, rank < r
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for start in range(0, k, BLOCK_D):
        at = start + column
        left = tl.load(x + row[:, None] * stride_xn + at[None, :] * stride_xk, here & (at[None, :] < k), 0.0)
        inside = ranked[None, :] & (at[:, None] < k)
        right = tl.load(a + rank[None, :] * stride_ar + at[:, None] * stride_ak, inside, 0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    kept = (total * scale).to(h.dtype.element_ty)
    tl.store(h + row[:, None] * r + rank[None, :], kept, here & ranked[None, :])
    for start in range(0, m, BLOCK_D):
        at = start + column
        inside = ranked[:, None] & (at[None, :] < m)
        up = tl.load(b + at[None, :] * stride_bm + rank[:, None] * stride_br, inside, 0.0)
        out = tl.dot(kept, up, input_precision="ieee")
        tl.store(y + row[:, None] * m + at[None, :], out.to(y.dtype.element_ty), here & (at[None, :] < m))


@triton.jit
def product_over_rows(
    g, h, out, stride_gn, stride_gm, n, m, r, scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """scale g^T h for a tile of g's columns and a group of rows, in float32."""
    group, groups = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    rank = tl.arange(0, BLOCK_R)
    wide, ranked = column[:, None] < m, rank[None, :] < r
    total = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
    for start in range(group * BLOCK_N, n, groups * BLOCK_N):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
        left = tl.load(g + column[:, None] * stride_gm + row[None, :] * stride_gn, wide & (row[None, :] < n), 0.0)
        right = tl.load(h + row[:, None] * r + rank[None, :], (row[:, None] < n) & ranked, 0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    to = out + (group * m + column[:, None]) * r + rank[None, :]
    tl.store(to, total * scale, wide & ranked)
