"""Compiled kernels that make parameter-efficient transfer learning fast."""

from petl_kernels import nn
from petl_kernels.integrations import FuseReport, fuse, unfuse
from petl_kernels.ops._explain import Explanation, explain
from petl_kernels.ops._select import use_impl
from petl_kernels.ops.bottleneck_adapter import bottleneck_adapter

__version__ = "0.1.0"
__all__ = ["Explanation", "FuseReport", "bottleneck_adapter", "explain", "fuse", "nn", "unfuse", "use_impl"]
