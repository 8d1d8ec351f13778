"""Methods by name: the table of the unified view, and `attach`, which puts one into a model.

report = petl_kernels.attach(model, "houlsby", bottleneck=64, keep_trainable="classifier.*")
print(report)
report.detach()
"""

from petl_kernels.methods.attach import Attached, attach, detach
from petl_kernels.methods.attention import Inside, OnHeads
from petl_kernels.methods.blocks import Attention, Block, FeedForward, find_blocks
from petl_kernels.methods.insertions import After, Around, Beside, Insertion, Instead
from petl_kernels.methods.registry import METHODS, Method, register

__all__ = [
    "METHODS",
    "After",
    "Around",
    "Attached",
    "Attention",
    "Beside",
    "Block",
    "FeedForward",
    "Insertion",
    "Inside",
    "Instead",
    "Method",
    "OnHeads",
    "attach",
    "detach",
    "find_blocks",
    "register",
]
