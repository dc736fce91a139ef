import math

import pytest
import torch

from pretrain.runs.metrics import SMOOTHING, Smoothed, fetch


def test_tensors_become_numbers_and_the_rest_stays():
    records = [{"step": step, "train/loss": torch.tensor(float(step)), "time": 0.5} for step in (1, 2)]
    assert fetch(records) == [{"step": step, "train/loss": float(step), "time": 0.5} for step in (1, 2)]
    assert fetch([{"step": 3}]) == [{"step": 3}]
    assert fetch([]) == []


def test_the_smoothed_loss_is_a_mean_of_the_last_steps():
    losses = [5.0, 4.0, 3.0, 2.0]
    weights = [SMOOTHING ** (len(losses) - 1 - i) for i in range(len(losses))]
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    mean = Smoothed()
    assert math.isnan(mean.add(None))
    assert [mean.add(loss) for loss in losses][0::3] == pytest.approx([5.0, expected])
    assert [mean.add(loss) for loss in (None, math.inf, math.nan)] == pytest.approx([expected] * 3)
