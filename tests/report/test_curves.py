import json
import math
from pathlib import Path

import numpy as np
import pytest

from pretrain.io import append_jsonl, keep_steps
from pretrain.report.curves import SMOOTHED, Curves, Table, Tail, thinned


def test_a_tail_gives_each_whole_line_once(tmp_path: Path):
    file = tmp_path / "m.jsonl"
    tail = Tail(file)
    assert list(tail.new()) == []
    append_jsonl(file, {"step": 1}, {"step": 2})
    assert list(tail.new()) == [{"step": 1}, {"step": 2}]
    with file.open("a") as out:
        out.write('{"step": 3')
    assert list(tail.new()) == []
    with file.open("a") as out:
        out.write('}\nnot JSON\n[1]\n{"step": 4}\n')
    assert list(tail.new()) == [{"step": 3}, {"step": 4}]
    assert list(tail.new()) == []


@pytest.mark.parametrize("grown", [False, True])
def test_a_file_that_a_resume_rewrote_is_read_anew(tmp_path: Path, grown: bool):
    file = tmp_path / "m.jsonl"
    append_jsonl(file, *({"step": step, "time": 1} for step in range(1, 10)))
    tail = Tail(file)
    assert len(list(tail.new())) == 9
    keep_steps(file, 5)
    if grown:
        append_jsonl(file, *({"step": step, "time": 2} for step in range(6, 20)))
    again = list(tail.new())
    assert again[0] is None
    assert [record["step"] for record in again[1:] if record] == list(range(1, 20 if grown else 6))
    file.unlink()
    assert list(tail.new()) == [None]
    assert list(tail.new()) == []


def test_overwritten_in_place(tmp_path: Path):
    file = tmp_path / "m.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n')
    tail = Tail(file)
    list(tail.new())
    file.write_text('{"step": 7}\n{"step": 8}\n')
    assert list(tail.new()) == [None, {"step": 7}, {"step": 8}]


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
    assert set(curves.train.columns) == {"step", "tokens", "train/loss", "train/grad_norm", "new", SMOOTHED}
    assert curves.train.column("step").tolist() == [1, 2, 3]
    assert curves.train.column("train/loss")[2:].tolist() == [2.0]
    assert np.isnan(curves.train.column("new")).tolist() == [True, False, True]
    assert curves.train.column(SMOOTHED).tolist() == pytest.approx([4.0, 4.0, (0.95 * 4 + 2) / 1.95])
    assert curves.val.column("val/loss").tolist() == [3.0]
    assert curves.val.column("tokens").tolist() == [9.0]
    assert (curves.skipped, curves.skips) == ([(2, 1)], {1: 1})
    assert curves.clipped(1.0, first=1) == (1, 2)  # step 1 came before clipping began
    assert curves.clipped(0.0, first=1) == (0, 0)
    keep_steps(file, 1)
    curves.refresh()
    assert len(curves.train) == 1
    assert curves.skips == {}


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
