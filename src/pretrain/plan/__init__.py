"""What a configuration comes to before anything runs.

memory (a dry run), cluster (several processes) → speed (measured or assumed) → plan (all of it) → warn, words
"""

from pretrain.plan.plan import Plan, make_plan
from pretrain.plan.words import describe

__all__ = ["Plan", "describe", "make_plan"]
