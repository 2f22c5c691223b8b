"""ssl_fast: contrastive self-supervised learning that is fast, and takes large batches on little memory."""

from ssl_fast import functional, nn
from ssl_fast._op import backend
from ssl_fast.accelerate import accelerate
from ssl_fast.augment import TwoViews
from ssl_fast.cached import CachedStep, cached_step, checkpoint_stages
from ssl_fast.fold import fold_conv_bn
from ssl_fast.methods import BarlowTwins, MoCo, SimCLR
from ssl_fast.ops._info_nce_clip import CLIPLoss
from ssl_fast.ops._info_nce_sup_con import SupConLoss
from ssl_fast.ops.barlow_twins import BarlowTwinsLoss
from ssl_fast.ops.ema import EMA, cosine_momentum, ema_update_, update_momentum
from ssl_fast.ops.info_nce import InfoNCE
from ssl_fast.ops.nt_xent import NTXentLoss
from ssl_fast.queue import KeyQueue
from ssl_fast.sync_batch_norm import convert_sync_batchnorm

__version__ = "0.1.0"

__all__ = [
    "BarlowTwins",
    "BarlowTwinsLoss",
    "CLIPLoss",
    "CachedStep",
    "EMA",
    "InfoNCE",
    "KeyQueue",
    "MoCo",
    "NTXentLoss",
    "SimCLR",
    "SupConLoss",
    "TwoViews",
    "accelerate",
    "backend",
    "cached_step",
    "checkpoint_stages",
    "convert_sync_batchnorm",
    "cosine_momentum",
    "ema_update_",
    "fold_conv_bn",
    "functional",
    "nn",
    "update_momentum",
    "__version__",
]
