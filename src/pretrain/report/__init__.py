"""The report room: a run in pictures and words, and its model for others."""

from pretrain.hf.export import export_run
from pretrain.report.page import write_report
from pretrain.report.plot import plot_run
from pretrain.report.words import explain

__all__ = ["explain", "export_run", "plot_run", "write_report"]
