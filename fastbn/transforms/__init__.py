"""What changes a model as a whole, in place."""

from fastbn.transforms.conventions import CONVENTIONS, Convention, batch_norm_arguments, batch_norm_state
from fastbn.transforms.convert import convert, revert, reverted
from fastbn.transforms.freeze import freeze, unfreeze
from fastbn.transforms.registry import register
from fastbn.transforms.report import LayerReport, Report, report

__all__ = [
    "CONVENTIONS",
    "Convention",
    "LayerReport",
    "Report",
    "batch_norm_arguments",
    "batch_norm_state",
    "convert",
    "freeze",
    "register",
    "report",
    "revert",
    "reverted",
    "unfreeze",
]
