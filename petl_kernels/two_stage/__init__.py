"""The two-stage paradigm over ordinary nn.Linear and nn.LayerNorm modules: align, choose channels, tune only those.

Stage 1 tunes the scale and shift of every layer norm (`tune_layer_norms`); stage 2 scores the channels of the model
that came out of it by a first-order Taylor expansion of the loss (`score_channels`), keeps the k best of each layer
(`select`) and tunes nothing else (`tune_channels`). What a task changed is one small file (`save_task`), applied to
and removed from a frozen backbone that many tasks share (`apply_task`).

Source: TTC-Tuning (arXiv:2303.07910) and SCT (arXiv:2309.08513). Of TTC-Tuning only the paradigm is public: the form
and the aggregation of its score, k, the tuned module and its placement are not. Ours are: the gate form `g * a` of
Molchanov et al. 2019 on activations, squared per batch; a k that the caller gives, the same for every layer; the rows
(or columns) of the chosen channels in every frozen nn.Linear, tuned in place instead of a module of their own. SCT's
score without gradients (`score_channels_l2`) follows its code.
"""

from petl_kernels.two_stage.layer_norms import tune_layer_norms
from petl_kernels.two_stage.scores import score_channels, score_channels_l2
from petl_kernels.two_stage.selection import Selection, select
from petl_kernels.two_stage.task_files import Applied, apply_task, save_task
from petl_kernels.two_stage.tuning import Tuned, merge_channels, tune_channels

__all__ = [
    "Applied",
    "Selection",
    "Tuned",
    "apply_task",
    "merge_channels",
    "save_task",
    "score_channels",
    "score_channels_l2",
    "select",
    "tune_channels",
    "tune_layer_norms",
]
