"""fastbn: a drop-in BatchNorm for PyTorch whose forward and backward are fused kernels."""

from fastbn import functional
from fastbn._explain import Plan, explain
from fastbn._info import info
from fastbn._max_sms import set_max_sms
from fastbn.convert import convert, revert
from fastbn.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Plan",
    "convert",
    "explain",
    "functional",
    "info",
    "revert",
    "set_max_sms",
]
