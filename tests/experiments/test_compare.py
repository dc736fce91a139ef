"""Groups of runs, and what may be said of them."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import TINY

from pretrain.cli import main
from pretrain.config import load_config
from pretrain.errors import UsageError
from pretrain.evaluation.measure import held_out_targets
from pretrain.experiments.compare import PARTS, _parts, bootstrap, compare, holm, t_test, t_within, within
from pretrain.experiments.groups import groups_at
from pretrain.runs import Run
from pretrain.tokens import Origin
from pretrain.training import train


def finished(folder: Path, seed: int, bits: float | None, tokens: str = "one text", **overrides) -> Run:
    """A run directory as a finished run leaves it, without weights."""
    run = Run.create(folder, load_config("quickstart", **{"train.seed": seed, **overrides}))
    Origin(tokens=tokens).save(folder)
    (folder / "summary.json").write_text(json.dumps({"val_loss": bits and 2 * bits, "val_bpb": bits}))
    return run


def sweep(folder: Path, values: dict[float, Sequence[float]]) -> str:
    """Runs of several learning rates, each with its bits per byte by seed."""
    for rate, every in values.items():
        for seed, bits in enumerate(every, 1):
            finished(folder / f"{rate}-{seed}", seed, bits, **{"optim.lr": rate})
    return str(folder)


# Student's t ------------------------------------------------------------------------------------------------------


def test_student_by_the_tables():
    for freedom, wanted in {1: 12.706, 2: 4.303, 4: 2.776, 10: 2.228, 30: 2.042, 10_000: 1.960}.items():
        assert t_within(0.95, freedom) == pytest.approx(wanted, abs=5e-4)
    assert t_within(0.99, 2) == pytest.approx(9.925, abs=5e-4)


def test_student_as_scipy_has_it():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 1.37, 2.5, 7, 80.2):
        for t in (0.02, 0.7, 3.1, 40):
            between = within(math.atan(t / math.sqrt(freedom)), freedom)
            assert between == pytest.approx(1 - 2 * stats.t.sf(t, freedom), abs=1e-12)
        for share in (0.6, 0.95, 0.9996):
            assert t_within(share, freedom) == pytest.approx(stats.t.ppf((1 + share) / 2, freedom), rel=1e-8)
    draw = np.random.default_rng(1)
    for n, m in ((2, 2), (3, 5), (8, 4)):
        a, b = draw.normal(1, 0.1, n), draw.normal(1.1, 0.3, m)
        theirs = stats.ttest_ind(a, b, equal_var=False)
        _, difference, low, high, p, _ = t_test(dict(enumerate(a)), dict(enumerate(b)), False, 0.95)
        assert (difference, p) == pytest.approx((a.mean() - b.mean(), theirs.pvalue))
        assert (low, high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
        a, b = draw.normal(1, 0.1, n), draw.normal(1.1, 0.1, n)
        theirs = stats.ttest_rel(a, b)
        backwards = {seed: b[seed] for seed in reversed(range(n))}
        method, _, low, high, p, _ = t_test(dict(enumerate(a)), backwards, True, 0.95)
        assert method == f"paired t of {n} seeds"
        assert p == pytest.approx(theirs.pvalue)
        assert (low, high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_one_seed_against_several_varies_as_they_do():
    method, difference, low, high, p, _ = t_test({5: 2.0}, {1: 1.0, 2: 1.1, 3: 0.9}, False, 0.95)
    reach = 4.3027 * 0.1 * math.sqrt(1 + 1 / 3)
    assert "of 1 and 3 seeds" in method
    assert (difference, low, high) == pytest.approx((1.0, 1 - reach, 1 + reach), abs=1e-4)
    assert p == pytest.approx(0.0131, abs=1e-4)  # t = 8.660 with two degrees of freedom


def test_numbers_without_any_spread():
    same, lower = {1: 1.0, 2: 1.0}, {1: 0.5, 2: 0.5}
    for paired in (True, False):
        assert t_test(same, same, paired, 0.95)[1:] == (0.0, 0.0, 0.0, 1.0, None)  # no number of seeds would decide
        assert t_test(lower, same, paired, 0.95)[1:5] == pytest.approx((-0.5, -0.5, -0.5, 0.0))


@pytest.mark.parametrize("paired", [True, False])
def test_equal_settings_seem_to_differ_in_five_cases_of_a_hundred(paired: bool):
    """What a seed gives both alike, its beginning and its order of data, helps only the paired test."""
    draw, wrong, found = np.random.default_rng(2), 0, 0
    for _ in range(1000):
        shared = draw.normal(0, 0.03, 3)
        a, b = (dict(enumerate(shared + draw.normal(0, 0.01, 3))) for _ in range(2))
        wrong += t_test(a, b, paired, 0.95)[4] < 0.05
        found += t_test({seed: value + 0.05 for seed, value in a.items()}, b, paired, 0.95)[4] < 0.05
    assert 0.03 < wrong / 1000 < 0.07 if paired else wrong / 1000 < 0.01
    assert found / 1000 > 0.7 if paired else found / 1000 < 0.5


def test_groups_that_share_nothing_seem_to_differ_as_rarely():
    draw = np.random.default_rng(5)
    drawn = ([dict(enumerate(draw.normal(0, spread, 3))) for spread in (0.01, 0.02)] for _ in range(1000))
    assert 0.02 < sum(t_test(a, b, paired=False, level=0.95)[4] < 0.05 for a, b in drawn) / 1000 < 0.07


@pytest.mark.parametrize("paired", [True, False])
def test_so_many_more_seeds_would_show_it(paired: bool):
    a, b = {1: 1.0, 2: 1.02, 3: 0.99}, {1: 1.015, 2: 1.02, 3: 1.02}
    *_, more = t_test(a, b, paired, 0.95)
    assert more is not None
    values = [[numbers[seed] for seed in a] for numbers in (a, b)]
    spread = (
        [np.std(np.subtract(values[0], values[1]), ddof=1), 0] if paired else [np.std(each, ddof=1) for each in values]
    )
    draw, shown, seeds = np.random.default_rng(3), 0, 3 + more
    for _ in range(500):
        drawn = [draw.normal(np.mean(each), deviation, seeds) for each, deviation in zip(values, spread, strict=True)]
        first, second = (dict(enumerate(each.tolist())) for each in drawn)
        shown += t_test(first, second, paired, 0.95)[4] < 0.05
    assert 0.75 < shown / 500 < 0.88
    assert t_test(a, {1: 1.0001, 2: 1.0201, 3: 0.98}, False, 0.95)[-1] is None


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


# Groups -----------------------------------------------------------------------------------------------------------


def test_runs_that_differ_only_in_their_seed_are_a_group(tmp_path: Path):
    same = {"log.name": "x", "train.device": "cpu", "checkpoint.every": 7, "data.paths": ["elsewhere.txt"]}
    finished(tmp_path / "a", 1, 1.0)
    finished(tmp_path / "b", 2, 1.1, **same)
    finished(tmp_path / "c", 3, 1.1, tokens="another text")
    finished(tmp_path / "d", 4, 1.1, **{"eval.stride": 64})
    finished(tmp_path / "again", 1, 1.0)
    groups = groups_at([str(tmp_path / name) for name in ("a", "a/", "b", "c", "d", "again")])
    assert [group.name for group in groups] == ["a, b", "c", "d", "again"]
    assert [len(group.runs) for group in groups] == [2, 1, 1, 1]


def test_a_folder_is_groups_by_what_differs(tmp_path: Path):
    one, other = (sweep(tmp_path / name, {0.01: [1, 1.1], 0.02: [1.2, 1.3, 1.4]}) for name in ("one", "other"))
    values = ["optim.lr 0.01", "optim.lr 0.02"]
    assert [group.name for group in groups_at([one])] == values
    assert [len(group.runs) for group in groups_at([one])] == [2, 3]
    names = [group.name for group in groups_at([one, other])]
    assert names == [f"{place}: {value}" for place in (one, other) for value in values]
    equal = [sweep(tmp_path / name, {0.01: [1, 1.1]}) for name in ("first", "second")]
    assert [group.name for group in groups_at(equal)] == ["first", "second"]
    for size in (300, 400):  # the same text is other tokens
        finished(tmp_path / "sizes" / str(size), 1, 1.0, f"of {size}", **{"tokenizer.vocab_size": size})
    assert [group.name for group in groups_at([str(tmp_path / "sizes")])] == [
        f"tokenizer.vocab_size {size}" for size in (300, 400)
    ]
    finished(tmp_path / "sizes" / "other", 1, 1.0, "of other text", **{"tokenizer.vocab_size": 300})
    assert all("data.paths" in group.name for group in groups_at([str(tmp_path / "sizes")]))


def test_a_run_that_is_named_twice_is_refused(tmp_path: Path):
    folder = sweep(tmp_path / "runs", {0.01: (2.0, 2.1)})
    with pytest.raises(UsageError, match=r"0\.01-2 is at .*runs and at .*0\.01-2; name it once"):
        groups_at([folder, f"{folder}/0.01-2"])


def test_so_many_minutes_are_the_setting_whatever_steps_they_are(tmp_path: Path):
    for seed, steps in ((1, 100), (2, 110)):
        run = finished(tmp_path / str(seed), seed, 1.0, **{"train.minutes": 1})
        file = run.folder / "config.toml"
        file.write_text(file.read_text().replace("steps = 0\n", f"steps = {steps}\n", 1))
        assert Run.open(run.folder).config.train.steps == steps
    assert len(groups_at([str(tmp_path)])) == 1


# Verdicts ---------------------------------------------------------------------------------------------------------


def test_worse_better_and_cannot_tell(tmp_path: Path, capsys):
    place = sweep(tmp_path / "lr", {0.01: [1.0, 1.02, 1.01], 0.02: [1.005, 1.018, 1.02], 0.2: [1.5, 1.525, 1.51]})
    runs = [f"{place}/{rate}-{seed}" for rate in ("0.01", "0.02", "0.2") for seed in (1, 2, 3)]
    assert main(["compare", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [group["seeds"] for group in found["groups"]] == [[1, 2, 3]] * 3
    wanted = {"mean": 1.01, "deviation": 0.01, "least": 1.0, "greatest": 1.02}
    assert found["groups"][0]["bits_per_byte"] == pytest.approx(wanted)
    assert found["groups"][0]["loss"] == pytest.approx({name: 2 * value for name, value in wanted.items()})
    middle, highest = found["verdicts"]
    assert (middle["verdict"], highest["verdict"]) == ("cannot tell", "worse")
    reach = 4.3027 * np.std([0.5, 0.505, 0.5], ddof=1) / math.sqrt(3)
    mean = np.mean([0.5, 0.505, 0.5])
    shown = [highest[name] for name in ("difference", "low", "high")]
    assert shown == pytest.approx([mean, mean - reach, mean + reach], abs=1e-5)
    assert middle["method"] == "paired t of 3 seeds"
    assert middle["more_seeds"] > 10
    words = f"Cannot tell 0.02-1, 0.02-2, 0.02-3 from 0.01-1, 0.01-2, 0.01-3: about {middle['more_seeds']} more seeds"
    assert words in middle["words"]
    assert "p is corrected for 2 comparisons with the first (Holm)" in found["notes"][0]
    assert main(["compare", place]) == 0
    printed = capsys.readouterr().out
    assert "optim.lr 0.2 is worse than optim.lr 0.01. Difference +0.5017 bits per byte" in printed
    assert "for 3 comparisons of all pairs" in printed
    assert main(["compare", *runs[6:], *runs[:3]]) == 0
    assert "0.01-1, 0.01-2, 0.01-3 is better than 0.2-1, 0.2-2, 0.2-3." in capsys.readouterr().out


def test_many_comparisons_make_a_verdict_rarer(tmp_path: Path):
    values = {0.1: [1.0, 1.01, 1.02], 0.2: [1.04, 1.06, 1.05]}
    (alone,) = compare(groups_at([sweep(tmp_path / "two", values)])).verdicts
    more = {rate / 10: [1.0 + rate / 1000, 1.02, 1.01] for rate in range(3, 9)}
    among = compare(groups_at([sweep(tmp_path / "many", {**values, **more})])).verdicts
    same = next(verdict for verdict in among if verdict.group == "optim.lr 0.2")
    assert alone.verdict == "worse"
    assert (same.verdict, same.low, same.high) == ("cannot tell", alone.low, alone.high)
    assert 7 * alone.p < same.p < 28 * alone.p  # all 28 pairs count, as the best was chosen among them


def test_each_of_a_single_folder_is_compared_with_its_best(tmp_path: Path):
    place = sweep(tmp_path / "lr", {0.1: [2.0, 2.01], 0.2: [1.0, 1.01], 0.3: [3.0, 3.02]})
    assert [verdict.against for verdict in compare(groups_at([place])).verdicts] == ["optim.lr 0.2"] * 2
    alone = sweep(tmp_path / "alone", {0.1: [2.0, 2.01]})
    places = [f"{alone}/0.1-1", f"{alone}/0.1-2", place]
    assert [verdict.against for verdict in compare(groups_at(places)).verdicts] == ["0.1-1, 0.1-2"] * 3


def test_pairs_are_of_the_same_seeds_and_data(tmp_path: Path):
    one = sweep(tmp_path / "one", {0.01: [1.0, 1.1, 1.15]})

    def method(name: str, first: int = 1, **overrides) -> str:
        for seed, bits in enumerate((1.1, 1.2, 1.25), first):
            finished(tmp_path / name / str(seed), seed, bits, **{"optim.lr": 0.5, **overrides})
        return compare(groups_at([one, str(tmp_path / name)])).verdicts[0].method

    assert method("same") == "paired t of 3 seeds"
    assert method("model", **{"model.layers": 7}) == "paired t of 3 seeds"
    for name, value in (("train.batch_tokens", 4096), ("data.order", "random"), ("model.context_length", 64)):
        assert method(name, **{name: value}) == "Welch's t of 3 and 3 seeds"
    assert method("seeds", first=2) == "Welch's t of 3 and 3 seeds"


def test_forks_of_one_checkpoint_share_its_chance_and_it_is_said(tmp_path: Path):
    folder = sweep(tmp_path / "runs", {0.01: (2.0, 2.1), 0.02: (2.2, 2.3)})
    for number, run in enumerate(sorted(Path(folder).iterdir())):
        fork = {"parent": "stable", "step": 8, "weights": f"hash {number}"}
        (run / "fork.json").write_text(json.dumps(fork))
    assert not any("forks" in note for note in compare(groups_at([folder])).notes)
    for run in Path(folder).glob("0.02-*"):
        (run / "fork.json").write_text(json.dumps({"parent": "stable", "step": 8, "weights": "one hash"}))
    assert any("are forks of one checkpoint" in note for note in compare(groups_at([folder])).notes)


def test_what_does_not_compare_is_left_out_or_refused(tmp_path: Path, capsys):
    place = sweep(tmp_path / "lr", {0.01: [1.0, 1.02], 0.02: [1.0, 1.03]})
    (tmp_path / "lr" / "0.02-2" / "summary.json").unlink()
    finished(tmp_path / "lr" / "lost", 3, None, **{"optim.lr": 0.02})
    finished(tmp_path / "lr" / "nan", 3, math.nan, **{"optim.lr": 0.01})
    assert main(["compare", place, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [group["seeds"] for group in found["groups"]] == [[1, 2], [1]]
    assert found["notes"][0].startswith(f"Left out: {place}/nan has no held-out loss at its end")
    assert found["notes"][1] == f"Left out: {place}/0.02-2 is not finished."
    assert found["notes"][2].startswith(f"Left out: {place}/lost has no held-out loss at its end")

    finished(tmp_path / "overlap", 1, 1.0, **{"eval.stride": 64})
    assert main(["compare", f"{place}/0.01-1", str(tmp_path / "overlap")]) == 2
    assert "were measured with eval.stride 0 and 64, which do not compare" in capsys.readouterr().err
    assert main(["compare", f"{place}/0.02-2"]) == 2
    assert "there is nothing to compare. Left out:" in capsys.readouterr().err
    assert main(["compare", f"{place}/0.01-1", f"{place}/0.01-2"]) == 0
    assert "there is nothing to compare it with" in capsys.readouterr().out
    for wrong, code, message in (
        (["compare"], 2, "RUN is missing"),
        (["compare", "absent"], 1, "absent does not exist"),
    ):
        assert main(wrong) == code
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert message in said.err


# One seed each ----------------------------------------------------------------------------------------------------


def test_a_bootstrap_finds_the_interval_of_independent_parts():
    draw, n = np.random.default_rng(4), 5000
    sizes, documents = np.full(n, 4), np.arange(n) // 5
    theirs = draw.normal(2.0, 0.5, n)
    ours = theirs + draw.normal(0.01, 0.2, n)
    method, difference, low, high, p, _ = bootstrap(*(_parts(nats, sizes, documents) for nats in (ours, theirs)))
    bits = (ours - theirs) / (4 * math.log(2))
    reach = 1.96 * bits.std(ddof=1) / math.sqrt(n)
    assert method == f"bootstrap over the documents, in {PARTS} parts"
    assert difference == pytest.approx(bits.mean())
    assert (low, high) == pytest.approx((bits.mean() - reach, bits.mean() + reach), abs=0.2 * reach)
    assert p < 0.05
    # Losses that go together within a document make the interval wider, as they should.
    together = np.repeat(draw.normal(0.01, 0.2, n // 5), 5)
    _, _, low, high, _, _ = bootstrap(*(_parts(nats, sizes, documents) for nats in (theirs + together, theirs)))
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / (4 * math.log(2)) / math.sqrt(n / 5), rel=0.2)


def test_a_text_of_one_long_document_is_cut_into_blocks():
    sizes, nats = np.full(1000, 3), np.ones(1000)
    for documents in (np.zeros(1000, int), np.minimum(np.arange(1000), 30)):  # one; and one that has most of the text
        a, b = _parts(nats, sizes, documents), _parts(2 * nats, sizes, documents)
        assert bootstrap(a, b)[0] == "bootstrap over 50 blocks of 60 bytes"
    other = _parts(np.ones(600), np.full(600, 5), np.zeros(600, int))  # the same text by another tokenizer
    assert other[1][:, 1] == pytest.approx(60)
    assert len(_parts(np.ones(5), np.full(5, 9), np.zeros(5, int))[1]) == PARTS  # so few tokens that most are empty


@pytest.fixture(scope="module")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny runs: of 12 steps, ten times longer, of another vocabulary, of overlapping windows."""
    folder = tmp_path_factory.mktemp("trained")
    more = {"long": {"train.steps": 120}, "bpe": {"tokenizer.kind": "bpe", "tokenizer.vocab_size": 300}}
    for name, overrides in {"short": {}, **more, "overlapping": {"eval.stride": 8}}.items():
        settings = {**TINY, "data.paths": [str(text_file)], "train.device": "cpu", **overrides}
        train(load_config("quickstart", **settings), folder / name)
    return folder


@pytest.mark.parametrize("name", ["short", "bpe", "overlapping"])
def test_targets_add_up_to_what_the_run_measured(trained: Path, name: str):
    run = Run.open(trained / name)
    nats, sizes, documents = held_out_targets(run)
    assert nats.sum() / sizes.sum() / math.log(2) == pytest.approx((run.summary or {})["val_bpb"], rel=1e-9)
    assert documents.max() == 0


def test_one_seed_each_is_compared_over_the_text(trained: Path, tmp_path: Path, capsys):
    shutil.copytree(trained / "short", tmp_path / "copy")
    names = [str(trained / "short"), str(tmp_path / "copy"), str(trained / "long"), str(trained / "bpe")]
    assert main(["compare", *names, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    same, longer, bpe = found["verdicts"]
    assert (same["verdict"], same["difference"], same["p"], same["more_seeds"]) == ("cannot tell", 0, 1, None)
    assert (longer["verdict"], longer["of"]) == ("better", "weights")
    for verdict, group in ((longer, 2), (bpe, 3)):
        measured = found["groups"][group]["bits_per_byte"]["mean"] - found["groups"][0]["bits_per_byte"]["mean"]
        assert verdict["difference"] == pytest.approx(measured)
        assert verdict["low"] < measured < verdict["high"] < 0
    assert any("another seed may reverse it" in note for note in found["notes"])
    assert any("bits per byte do" in note for note in found["notes"])
    without = compare(groups_at(names), measure=False)
    assert without.verdicts == []
    assert "by 'pretrain compare'" in without.notes[-1]


def test_another_text_is_refused(trained: Path, text_file: Path, tmp_path: Path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8").replace("Ada", "Eva"), encoding="utf-8")
    settings = {**TINY, "data.paths": [str(other)], "train.device": "cpu"}
    run = train(load_config("quickstart", **settings), tmp_path / "run")
    with pytest.raises(UsageError, match="were measured on different text; measure them on the same: pretrain eval"):
        compare(groups_at([str(trained / "short"), str(run.folder)]))
