"""The evaluation room: how good a model is, in numbers that others can compare."""

from pretrain.evaluation.loss import LossResult, evaluate_loss

__all__ = ["LossResult", "evaluate_loss"]
