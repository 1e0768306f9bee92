"""fastbn: a drop-in BatchNorm for PyTorch whose forward and backward are fused kernels."""

from fastbn import _check as _check  # first: says in one sentence what is missing
from fastbn import functional
from fastbn._version import __version__
from fastbn.inspect.doctor import Diagnosis, Finding, doctor
from fastbn.inspect.explain import explain
from fastbn.inspect.info import info
from fastbn.inspect.limits import set_max_sms
from fastbn.nn import (
    AccumulatedBatchNorm1d,
    AccumulatedBatchNorm2d,
    AccumulatedBatchNorm3d,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    MaskedBatchNorm1d,
    MaskedBatchNorm2d,
    SyncBatchNorm,
    WhiteningBatchNorm1d,
    WhiteningBatchNorm2d,
)
from fastbn.ops.dispatch import Plan
from fastbn.transforms.accumulate import accumulate
from fastbn.transforms.checkpoint import checkpoint_safe
from fastbn.transforms.compile_pass import compile_pass
from fastbn.transforms.convert import convert, revert, reverted
from fastbn.transforms.fold import fold
from fastbn.transforms.freeze import freeze, unfreeze
from fastbn.transforms.population import population_stats
from fastbn.transforms.tools import register_with_tools

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
    "Diagnosis",
    "Finding",
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
    "Plan",
    "SyncBatchNorm",
    "WhiteningBatchNorm1d",
    "WhiteningBatchNorm2d",
    "__version__",
    "accumulate",
    "checkpoint_safe",
    "compile_pass",
    "convert",
    "doctor",
    "explain",
    "fold",
    "freeze",
    "functional",
    "info",
    "population_stats",
    "register_with_tools",
    "revert",
    "reverted",
    "set_max_sms",
    "unfreeze",
]
