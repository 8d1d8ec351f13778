"""PyTorch's layer normalisation on this package's operator."""

from __future__ import annotations

from torch import Tensor, nn

from petl_kernels.ops.layer_norm import layer_norm


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` whose forward is `petl_kernels.layer_norm`: the same arguments, parameters and state_dict.

    Of a normalised shape of more than one dimension, and of an input that the shape does not fit, the forward is
    PyTorch's own.

    Shapes: x [..., d] -> [..., d]; weight [d], bias [d].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension of x [..., d]."""
        if len(self.normalized_shape) != 1 or input.shape[-1:] != self.normalized_shape:
            return super().forward(input)
        return layer_norm(input, self.weight, self.bias, self.eps)
