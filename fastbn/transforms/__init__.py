"""What changes a model as a whole, in place."""

from fastbn.transforms.convert import convert, revert, reverted
from fastbn.transforms.freeze import freeze, unfreeze
from fastbn.transforms.registry import register
from fastbn.transforms.report import LayerReport, Report, report

__all__ = ["LayerReport", "Report", "convert", "freeze", "register", "report", "revert", "reverted", "unfreeze"]
