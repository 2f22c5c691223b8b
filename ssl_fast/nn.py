"""The modules of the ops' home pages that replace those of torch.nn."""

from ssl_fast.ops.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
