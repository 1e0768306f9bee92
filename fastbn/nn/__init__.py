"""The layers."""

from fastbn.nn.accumulated import AccumulatedBatchNorm1d, AccumulatedBatchNorm2d, AccumulatedBatchNorm3d
from fastbn.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastbn.nn.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from fastbn.nn.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from fastbn.nn.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from fastbn.nn.masked import MaskedBatchNorm1d, MaskedBatchNorm2d
from fastbn.nn.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, Ramp
from fastbn.nn.sync import SyncBatchNorm
from fastbn.nn.whitening import WhiteningBatchNorm1d, WhiteningBatchNorm2d

__all__ = [
    "AccumulatedBatchNorm1d",
    "AccumulatedBatchNorm2d",
    "AccumulatedBatchNorm3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "MaskedBatchNorm1d",
    "MaskedBatchNorm2d",
    "Ramp",
    "SyncBatchNorm",
    "WhiteningBatchNorm1d",
    "WhiteningBatchNorm2d",
]
