"""fastbn: a drop-in BatchNorm for PyTorch whose forward and backward are fused kernels."""

from fastbn import functional
from fastbn._version import __version__
from fastbn.inspect.explain import explain
from fastbn.inspect.info import info
from fastbn.inspect.limits import set_max_sms
from fastbn.nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    SyncBatchNorm,
)
from fastbn.ops.dispatch import Plan
from fastbn.transforms.checkpoint import checkpoint_safe
from fastbn.transforms.compile_pass import compile_pass
from fastbn.transforms.convert import convert, revert, reverted
from fastbn.transforms.fold import fold
from fastbn.transforms.freeze import freeze, unfreeze
from fastbn.transforms.tools import register_with_tools

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Plan",
    "SyncBatchNorm",
    "__version__",
    "checkpoint_safe",
    "compile_pass",
    "convert",
    "explain",
    "fold",
    "freeze",
    "functional",
    "info",
    "register_with_tools",
    "revert",
    "reverted",
    "set_max_sms",
    "unfreeze",
]
