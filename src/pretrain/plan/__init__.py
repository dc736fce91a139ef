"""The plan room: what a configuration comes to before anything runs."""

from pretrain.plan.count import count_parameters, flops_per_token, matrices
from pretrain.plan.dial import resolve
from pretrain.plan.memory import activation_bytes, rows_that_fit, rows_up_to

__all__ = [
    "activation_bytes",
    "count_parameters",
    "flops_per_token",
    "matrices",
    "resolve",
    "rows_that_fit",
    "rows_up_to",
]
