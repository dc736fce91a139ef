"""What a configuration needs, before anything runs.

memory (a dry run), cluster (several processes), data, speed (measured or assumed) → plan → words → warn
"""

from pretrain.plan.plan import Plan, make_plan
from pretrain.plan.warn import warnings
from pretrain.plan.words import describe
