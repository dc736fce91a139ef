"""The plan room: what a configuration comes to before anything runs.

count (parameters, FLOPs)  →  dial (derived fields)  →  memory (a rehearsal), cluster (several processes)
→  speed (measured or assumed)  →  plan (all of it)  →  warn, words
"""

from pretrain.plan.cluster import kind_that_fits
from pretrain.plan.count import count_parameters, flops_per_token, matrices
from pretrain.plan.dial import resolve
from pretrain.plan.memory import activation_bytes, recompute_blocks, rows_that_fit, rows_up_to
from pretrain.plan.plan import Plan, make_plan
from pretrain.plan.words import describe

__all__ = [
    "Plan",
    "activation_bytes",
    "count_parameters",
    "describe",
    "flops_per_token",
    "kind_that_fits",
    "make_plan",
    "matrices",
    "recompute_blocks",
    "resolve",
    "rows_that_fit",
    "rows_up_to",
]
