"""The parallel adapter of He et al., and the methods that are one at other places or with other defaults."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from petl_kernels.nn.bottleneck_adapter import BottleneckAdapter


class ParallelAdapter(BottleneckAdapter):
    """(Scaled) parallel adapter: `residual + scale * (relu(x w_down^T + b_down) w_up^T + b_up)`.

    He et al. 2021 (arXiv:2110.04366, table 1): beside a sub-layer whose input is x and whose output, before the
    residual connection, is `residual`. Beside the feed-forward part, with r = 512 and a scale of 4, it is half of their
    MAM adapter. Starts as the identity on `residual`. 2 d r + d + r parameters.

    Args:
        d_model, bottleneck: widths d and r.
        scale: a float (theirs: 4.0 for summarisation and translation, 2.0 on GLUE, 1.0 for the unscaled PA),
            "learned" for one trained scalar, or "channel" for one per channel.
        options: what else `BottleneckAdapter` takes, but for its form.

    Shapes and errors: those of `BottleneckAdapter` in its parallel form.
    """

    def __init__(
        self,
        d_model: int,
        bottleneck: int = 512,
        *,
        scale: float | str = 4.0,
        activation: str = "relu",
        init: str = "lora",
        **options: Any,
    ) -> None:
        super().__init__(d_model, bottleneck, scale=scale, activation=activation, init=init, form="parallel", **options)


class AdaptFormer(ParallelAdapter):
    """AdaptFormer's branch: `residual + 0.1 * (relu(x w_down^T + b_down) w_up^T + b_up)`.

    Chen et al. 2022 (arXiv:2205.13535), as in their code: in a pre-LN block with `a = x + attn(norm1(x))` the output is
    `a + drop_path(mlp(norm2(a))) + scale * branch(a)`. The branch reads a itself, *before* norm2, and has no stochastic
    depth; dropout acts on the bottleneck. Only adapters and head train.

    Args:
        d_model, bottleneck, scale, dropout, options: as for `ParallelAdapter`, with the paper's defaults.
    """

    def __init__(
        self, d_model: int, bottleneck: int = 64, *, scale: float | str = 0.1, dropout: float = 0.1, **options: Any
    ) -> None:
        super().__init__(d_model, bottleneck, scale=scale, dropout=dropout, **options)


class LowRankPAL(ParallelAdapter):
    """The low-rank variant of projected attention layers: `residual + gelu(x w_down^T + b_down) w_up^T + b_up`.

    Stickland and Murray 2019 (arXiv:1902.02671), as in their code: parallel to a whole layer, whose input is x; the
    result goes into the layer's last residual sum, before its layer norm. The backbone trains as well.

    Args:
        d_model, bottleneck: widths d and r; 100 in the paper, for d = 768.
        options: as for `ParallelAdapter`; weights start normal with std 0.02, as BERT's do.
    """

    def __init__(self, d_model: int, bottleneck: int = 100, **options: Any) -> None:
        super().__init__(d_model, bottleneck, **{"scale": 1.0, "activation": "gelu", "init": "bert", **options})


class PfeifferAdapter(ParallelAdapter):
    """Pfeiffer's adapter between two uses of one layer norm: `norm(h + scale * f(norm(h + x)) + x)`.

    Pfeiffer et al. 2020 (arXiv:2005.00247), as He et al. run it in post-LN models (arXiv:2110.04366): h is the
    feed-forward part's output after its dropout and x its residual. The branch f reads what the block would have given,
    and the *same* layer norm is applied again to the result.

    Args:
        d_model, bottleneck: widths d and r; the `adapters` library takes d / 16.
        options: as for `ParallelAdapter`; weights start normal with std 0.02, biases at 0.
    """

    def __init__(self, d_model: int, bottleneck: int, **options: Any) -> None:
        super().__init__(d_model, bottleneck, **{"scale": 1.0, "init": "bert", **options})

    def forward(self, h: Tensor, x: Tensor, norm: nn.Module) -> Tensor:  # type: ignore[override]
        """The block's output [..., d].

        Args:
            h: the sub-layer's output, [..., d].
            x: its residual, [..., d].
            norm: the block's own layer norm, which is applied twice.
        """
        return norm(super().forward(norm(h + x), h) + x)
