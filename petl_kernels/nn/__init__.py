"""Methods of parameter-efficient transfer learning as modules composed of this package's operators."""

from petl_kernels.nn.adapter_bank import AdapterBank
from petl_kernels.nn.adapter_norm import AdapterNorm, NormAdapter
from petl_kernels.nn.adapter_plus import AdapterPlus
from petl_kernels.nn.bottleneck_adapter import BottleneckAdapter
from petl_kernels.nn.channel_adapter import ChannelAdapter
from petl_kernels.nn.channel_linear import ChannelLinear
from petl_kernels.nn.diff_pruning import DiffPruningLinear, expected_l0, project_diffs
from petl_kernels.nn.ia3 import IA3Linear
from petl_kernels.nn.layer_norm import LayerNorm
from petl_kernels.nn.lora import LoRALinear
from petl_kernels.nn.lora_merged import LoRAMergedLinear
from petl_kernels.nn.mam import MAM
from petl_kernels.nn.multi_head_parallel import MultiHeadParallelAdapter
from petl_kernels.nn.multihead_attention import IA3MultiheadAttention, LoRAMultiheadAttention
from petl_kernels.nn.parallel import AdaptFormer, LowRankPAL, ParallelAdapter, PfeifferAdapter
from petl_kernels.nn.prefix import PrefixAdapter

__all__ = [
    "MAM",
    "AdaptFormer",
    "AdapterBank",
    "AdapterNorm",
    "AdapterPlus",
    "BottleneckAdapter",
    "ChannelAdapter",
    "ChannelLinear",
    "DiffPruningLinear",
    "IA3Linear",
    "IA3MultiheadAttention",
    "LayerNorm",
    "LoRALinear",
    "LoRAMergedLinear",
    "LoRAMultiheadAttention",
    "LowRankPAL",
    "MultiHeadParallelAdapter",
    "NormAdapter",
    "ParallelAdapter",
    "PfeifferAdapter",
    "PrefixAdapter",
    "expected_l0",
    "project_diffs",
]
