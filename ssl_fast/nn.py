"""The modules of the ops' home pages that replace those of torch.nn."""

from ssl_fast.ops.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ssl_fast.ops.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from ssl_fast.ops.layer_norm import LayerNorm, LayerNorm2d
from ssl_fast.sync_batch_norm import SyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "SyncBatchNorm",
]
