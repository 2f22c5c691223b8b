"""The functions of the ops' home pages."""

from ssl_fast.ops._info_nce_clip import clip
from ssl_fast.ops._info_nce_sup_con import sup_con
from ssl_fast.ops.barlow_twins import barlow_twins
from ssl_fast.ops.batch_norm import batch_norm
from ssl_fast.ops.conv_bn import fuse_conv_bn_weights, fuse_linear_bn_weights
from ssl_fast.ops.info_nce import info_nce
from ssl_fast.ops.instance_norm import instance_norm
from ssl_fast.ops.layer_norm import layer_norm
from ssl_fast.ops.nt_xent import nt_xent
from ssl_fast.ops.two_views import two_views

__all__ = [
    "barlow_twins",
    "batch_norm",
    "clip",
    "fuse_conv_bn_weights",
    "fuse_linear_bn_weights",
    "info_nce",
    "instance_norm",
    "layer_norm",
    "nt_xent",
    "sup_con",
    "two_views",
]
