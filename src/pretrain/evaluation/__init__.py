"""How good a model is, in numbers that others can compare."""

from pretrain.evaluation.bundle import Task, open_bundle, read_tasks
from pretrain.evaluation.core import CoreResult, TaskResult, answer_task, evaluate_core
from pretrain.evaluation.loss import LossResult, evaluate_loss
from pretrain.evaluation.scorer import GPTScorer, Scorer
