"""Methods of parameter-efficient transfer learning as modules composed of this package's operators."""

from petl_kernels.nn.bottleneck_adapter import BottleneckAdapter

__all__ = ["BottleneckAdapter"]
