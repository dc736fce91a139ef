import pytest

from pretrain.config import ScheduleConfig
from pretrain.optim import learning_rate_factor


def factors(steps: int, **settings) -> list[float]:
    schedule = ScheduleConfig(**settings)
    return [learning_rate_factor(schedule, step, steps) for step in range(steps)]


def test_the_book_warms_up_from_an_initial_rate_and_follows_a_cosine():
    """LLMs-from-scratch, appendix D: 135 steps, 27 of warmup, 1e-5 → 1e-3 → 1e-5."""
    rates = [1e-3 * f for f in factors(135, kind="cosine", warmup_steps=27, warmup_from=0.01, final=0.01)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[1] - rates[0] == pytest.approx((1e-3 - 1e-5) / 27)
    assert rates[27] == pytest.approx(1e-3)
    assert rates[81] == pytest.approx((1e-3 + 1e-5) / 2)  # half way through the 108 steps of decay
    assert rates[134] > 1e-5  # the end of the cosine is one step past the last


def test_warmup_from_nothing_does_not_waste_the_first_step():
    assert factors(10, kind="constant", warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_linear_stays_then_falls():
    """nanochat of October 2025: constant, then down to 0 over the last 20 %."""
    rates = factors(100, kind="linear", warmup_steps=0, decay_fraction=0.2)
    assert rates[:81] == [1.0] * 81
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
    assert factors(100, kind="linear", warmup_steps=0, decay_fraction=0.2, final=0.5)[90] == pytest.approx(0.75)


def test_odd_lengths():
    assert factors(1, kind="cosine", warmup_steps=0) == [1.0]
    assert factors(3, kind="linear", warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])
    assert factors(5, kind="linear", warmup_steps=0, decay_fraction=0) == [1.0] * 5
