"""Compiled kernels that make parameter-efficient transfer learning fast."""

from petl_kernels import methods, nn, optim, two_stage
from petl_kernels.integrations import FuseReport, fuse, unfuse
from petl_kernels.methods import attach, detach
from petl_kernels.ops._explain import Explanation, explain
from petl_kernels.ops._select import use_impl
from petl_kernels.ops.adapter_bank import adapter_bank
from petl_kernels.ops.adapter_norm import adapter_norm
from petl_kernels.ops.bottleneck_adapter import bottleneck_adapter
from petl_kernels.ops.channel_adapter import channel_adapter
from petl_kernels.ops.channel_importance import channel_importance
from petl_kernels.ops.channel_linear import channel_linear
from petl_kernels.ops.channel_scale import channel_scale
from petl_kernels.ops.layer_norm import layer_norm
from petl_kernels.ops.norm_adapter import norm_adapter

__version__ = "0.1.0"
__all__ = [
    "Explanation",
    "FuseReport",
    "adapter_bank",
    "adapter_norm",
    "attach",
    "bottleneck_adapter",
    "channel_adapter",
    "channel_importance",
    "channel_linear",
    "channel_scale",
    "detach",
    "explain",
    "fuse",
    "layer_norm",
    "methods",
    "nn",
    "norm_adapter",
    "optim",
    "two_stage",
    "unfuse",
    "use_impl",
]
