"""Methods of parameter-efficient transfer learning as modules composed of this package's operators."""

from petl_kernels.nn.bottleneck_adapter import BottleneckAdapter
from petl_kernels.nn.channel_adapter import ChannelAdapter
from petl_kernels.nn.channel_linear import ChannelLinear
from petl_kernels.nn.layer_norm import LayerNorm

__all__ = ["BottleneckAdapter", "ChannelAdapter", "ChannelLinear", "LayerNorm"]
