"""A run in pictures and words: one HTML page, plots, the closing words of training."""

from pretrain.report.page import write_report
from pretrain.report.plot import plot_run
from pretrain.report.words import explain
