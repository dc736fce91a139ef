import json
import math
from pathlib import Path

import numpy as np
import pytest

from pretrain.io import append_jsonl, keep_steps
from pretrain.report.curves import SKIPPED, Curves, Table, thinned
from pretrain.runs.metrics import SMOOTHED_LOSS


def losses(curves: Curves) -> list[float]:
    curves.refresh()
    return curves.train.column("train/loss").tolist()


def test_each_whole_line_is_taken_in_once(tmp_path: Path):
    file = tmp_path / "m.jsonl"
    curves = Curves(file)
    assert losses(curves) == []
    append_jsonl(file, {"time": 1.0})  # no step: left out
    append_jsonl(file, {"step": 1, "train/loss": 4}, {"step": 2, "train/loss": 3})
    assert losses(curves) == [4, 3]
    with file.open("a") as out:
        out.write('{"step": 3, "train/loss"')
    assert losses(curves) == [4, 3]
    with file.open("a") as out:
        out.write(': 2}\nnot JSON\n{"step": 4, "train/loss": 1}\n')
    assert losses(curves) == [4, 3, 2, 1]
    assert losses(curves) == [4, 3, 2, 1]


@pytest.mark.parametrize("grown", [False, True])
def test_a_file_that_a_resume_rewrote_is_read_anew(tmp_path: Path, grown: bool):
    file = tmp_path / "m.jsonl"
    append_jsonl(file, *({"step": step, "train/loss": 1} for step in range(1, 10)))
    curves = Curves(file)
    assert losses(curves) == [1] * 9
    keep_steps(file, 5)
    if grown:
        append_jsonl(file, *({"step": step, "train/loss": 2} for step in range(6, 20)))
    assert losses(curves) == [1] * 5 + [2] * (14 if grown else 0)
    file.unlink()
    assert losses(curves) == []


def test_overwritten_in_place(tmp_path: Path):
    file = tmp_path / "m.jsonl"
    file.write_text('{"step": 1, "train/loss": 1}\n{"step": 2, "train/loss": 1}\n')
    curves = Curves(file)
    file.write_text('{"step": 1, "train/loss": 7}\n{"step": 2, "train/loss": 8}\n')
    assert losses(curves) == [7, 8]


def test_curves_of_lines_that_come_bit_by_bit(tmp_path: Path):
    file = tmp_path / "m.jsonl"
    curves = Curves(file)
    assert len(curves.train) == 0
    append_jsonl(file, {"step": 1, "train/loss": 4.0, "train/grad_norm": 5.0, "fine": True, "why": "x"})
    curves.refresh()
    append_jsonl(file, {"step": 2, "train/loss": None, "train/grad_norm": 5.0, "train/skipped": 1.0, "new": 7})
    append_jsonl(file, {"step": 3, "train/loss": 2.0, "train/grad_norm": 0.5, "tokens": 9, "val/loss": 3.0})
    append_jsonl(file, {"step": 3, "train/loss": 9.0})
    curves.refresh()
    given = {"step", "tokens", "train/loss", "train/grad_norm", "new", SKIPPED}
    assert set(curves.train.columns) == given | {SMOOTHED_LOSS}
    assert curves.train.column("step").tolist() == [1, 2, 3]
    assert curves.train.column("train/loss")[2:].tolist() == [2.0]
    assert np.isnan(curves.train.column("new")).tolist() == [True, False, True]
    assert curves.train.column(SMOOTHED_LOSS).tolist() == pytest.approx([4.0, 4.0, (0.9 * 4 + 2) / 1.9])
    assert curves.val.column("val/loss").tolist() == [3.0]
    assert curves.val.column("tokens").tolist() == [9.0]
    assert curves.skipped() == [(2, 1)]
    assert curves.clipped(1.0, first=1) == (1, 2)  # step 1 came before clipping began
    assert curves.clipped(0.0, first=1) == (0, 0)
    keep_steps(file, 1)
    curves.refresh()
    assert len(curves.train) == 1
    assert curves.skipped() == []


def test_before_the_first_step_and_both_of_the_last(tmp_path: Path):
    file = tmp_path / "m.jsonl"
    append_jsonl(file, {"step": 0, "tokens": 0, "val/loss": 5.0, "val/bpb": 7.0, "train/eval_loss": 5.5})
    curves = Curves(file)
    assert (len(curves.train), curves.train.last("step")) == (0, None)
    append_jsonl(file, {"step": 1, "train/loss": 4.0}, {"step": 1, "train/loss": 4.0})
    last = {"val/loss": 3.0, "val/bpb": 4.0, "val/part_loss": 3.5, "val/part_bpb": 4.5, "train/eval_loss": 3.1}
    append_jsonl(file, {"step": 2, "train/loss": 3.3, **last})
    curves.refresh()
    assert curves.train.column("step").tolist() == [1, 2]
    assert "train/eval_loss" not in curves.train.columns
    assert curves.val.column("step").tolist() == [0, 2]
    assert curves.val.column("val/loss").tolist() == [5.0, 3.5]
    assert curves.val.column("val/bpb").tolist() == [7.0, 4.5]
    assert curves.val.column("train/eval_loss").tolist() == [5.5, 3.1]
    assert (curves.val.last("val/loss of all"), curves.val.last("val/bpb of all")) == (3.0, 4.0)
    assert math.isnan(curves.val.column("val/loss of all")[0])
    assert curves.lowest() == (2, 3.5)
    append_jsonl(file, {"step": 3, "train/loss": 3.3, "val/loss": math.nan}, {"step": 4, "val/loss": 3.6})
    curves.refresh()
    assert curves.lowest() == (2, 3.5)
    assert Curves(tmp_path / "none.jsonl").lowest() is None


def test_thinning_keeps_spikes_ends_and_order():
    table = Table()
    random = np.random.default_rng(0)
    for step in range(1, 50_001):
        loss = 30.0 if step == 31_234 else math.nan if step == 400 else 3 + random.normal() / 10
        norm = 99.0 if step == 44_444 else 1.0
        table.add({"step": step, "tokens": 10 * step, "loss": loss, "norm": norm})
    thin = thinned(table, 2000)
    assert 500 < len(thin["step"]) <= 2002
    assert thin["step"] == sorted(set(thin["step"]))
    assert (thin["step"][0], thin["step"][-1]) == (1, 50_000)
    assert thin["loss"][thin["step"].index(31_234)] == 30.0
    assert thin["norm"][thin["step"].index(44_444)] == 99.0
    assert {len(column) for column in thin.values()} == {len(thin["step"])}
    assert all(tokens == 10 * step for step, tokens in zip(thin["step"], thin["tokens"], strict=True))
    json.dumps(thin, allow_nan=False)


def test_few_rows_stay_as_they_are():
    table = Table()
    for step in range(1, 6):
        table.add({"step": step, "loss": math.nan if step == 3 else step / 3})
    assert thinned(table, 5)["loss"] == [0.333333, 0.666667, None, 1.33333, 1.66667]
    assert thinned(Table(), 10) == {"step": []}
    assert table.last("loss") == 5 / 3
    assert table.last("other") is None
