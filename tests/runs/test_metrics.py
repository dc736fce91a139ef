import math

import pytest
import torch

from pretrain.runs.metrics import Smoothed, fetch


def test_tensors_become_numbers_and_the_rest_stays():
    records = [{"step": step, "train/loss": torch.tensor(float(step)), "time": 0.5} for step in (1, 2)]
    assert fetch(records) == [{"step": step, "train/loss": float(step), "time": 0.5} for step in (1, 2)]
    assert fetch([{"step": 3}]) == [{"step": 3}]
    assert fetch([]) == []


def test_the_smoothed_loss_is_nanochats():
    mean, expected = Smoothed(), 0.0
    assert math.isnan(mean.loss)
    for step, loss in enumerate([5.0, 4.0, 3.0, 2.5, 2.25]):
        expected = 0.9 * expected + (1 - 0.9) * loss
        assert mean.add({"step": step + 1, "train/loss": loss}) == expected / (1 - 0.9 ** (step + 1))


def test_skipped_steps_and_losses_that_are_not_finite_are_left_out():
    good = [{"train/loss": 5.0, "train/skipped": 0.0}, {"train/loss": 4.0}]
    bad = [{"train/loss": None, "train/skipped": 1.0}, {"train/loss": 90.0, "train/skipped": 2.0}, {"val/loss": 3.0}]
    bad += [{"train/loss": loss} for loss in (math.nan, math.inf)]
    assert math.isnan(Smoothed(bad).loss)
    assert Smoothed([*bad, good[0], *bad, good[1], *bad]).loss == pytest.approx((0.9 * 5 + 4) / 1.9)
