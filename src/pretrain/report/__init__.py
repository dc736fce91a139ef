"""The report room: a run in pictures and words."""

from pretrain.report.plot import plot_run
from pretrain.report.words import explain

__all__ = ["explain", "plot_run"]
