"""A document too long to be read at once has the tokens of the whole, whatever the tokenizer, up to a bound."""

import importlib
import json
import random
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import TINY
from tests.training.test_loop import new_run

from pretrain.cli import main
from pretrain.config import DataConfig, TokenizerConfig, load_config
from pretrain.errors import Interrupted
from pretrain.io import read_jsonl
from pretrain.text import ReadStats, find_pieces, formats, pieces, problems
from pretrain.text.pieces import join_ranges
from pretrain.text.split import NOTHING, TRAIN, VAL, Part, Shares, join_parts
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokenizer.patterns import byte_level
from pretrain.tokens import ORIGIN, Manifest, find_text, jobs
from pretrain.tokens.prepare import PLAN, prepare_text
from pretrain.tokens.source import HASH, read_parts
from pretrain.tokens.stream import LiveBatches
from pretrain.training.start import train

prepare_module = importlib.import_module("pretrain.tokens.prepare")  # the name is that of a function, too

WORDS, NO_WORDS = "inside words", "all"


def letters(count: int, seed: int = 0) -> str:
    """Text without a blank, in which most cuts change tokens."""
    return "".join(random.Random(seed).choices("abé", k=count))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By where cuts change tokens: one that cuts words as GPT-2 does, and one that cuts none."""
    folder = tmp_path_factory.mktemp("tokenizers")
    words = build_tokenizer("bpe", 400, [" ".join(letters(60, seed) for seed in range(300))])
    words.save(folder / "words.json")
    words.hf.pre_tokenizer = byte_level(words.hf.model, "").pre_tokenizer
    words.hf.save(str(folder / "no_words.json"))
    places = {WORDS: str(folder / "words.json"), NO_WORDS: str(folder / "no_words.json")}
    assert all(Tokenizer.load(place).cuts == cuts for cuts, place in places.items())
    return places


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 100 characters and ranges of 250 bytes, joined up to 2,000."""
    monkeypatch.setattr(formats, "PART_CHARACTERS", 100)
    monkeypatch.setattr(formats, "CUT_WINDOW", 20)
    monkeypatch.setattr(formats, "CHUNK", 70)
    monkeypatch.setattr(pieces, "RANGE_BYTES", 250)
    monkeypatch.setattr(jobs, "JOB_BYTES", 1)
    monkeypatch.setattr(prepare_module, "SMALL_JOBS", 1000)  # in this process
    for module in (formats, pieces, problems):
        monkeypatch.setattr(module, "WHOLE", 2000)


def write(place: Path, text: str, suffix: str) -> Path:
    file = place / f"text{suffix}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"text": text}) + "\n" if suffix == ".jsonl" else text, newline="")
    return file


def ids_of(folder: Path, split: str) -> list[int]:
    files = [folder / shard.file for shard in Manifest.load(folder).shards if shard.split == split]
    return [id for file in files for id in np.fromfile(file, "<u2").tolist()]


def as_text(ids: Iterable[int]) -> str:
    """A character for each id."""
    return "".join(map(chr, ids))


def whole_ids(tokenizer: str, *texts: str) -> list[int]:
    loaded = Tokenizer.load(tokenizer)
    return [id for text in texts for id in [loaded.bos_id, *loaded.encode(text)]]


TEXTS = {
    "letters": letters(1100),
    "blanks far apart": " ".join(letters(draw, draw) for draw in (300, 5, 40, 7, 260, 9, 333)),
    "words": "The quick brown fox, 42 times.\r\nJumps \n\nover.\n" * 25,
    "no letters": " -" * 900,
}


@pytest.mark.parametrize("cuts", [WORDS, NO_WORDS])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("name", TEXTS)
def test_shards_have_the_tokens_of_whole_documents(tmp_path: Path, small, tokenizers, monkeypatch, cuts, suffix, name):
    file, after = write(tmp_path / "in", TEXTS[name], suffix), tmp_path / "in/z.txt"
    after.write_text("a b")
    made = []
    for split in ({"val_fraction": 0.0}, {"val_paths": (str(file),)}):
        data = DataConfig(paths=(str(file.parent),), **split)
        folder = tmp_path / f"out{len(made)}"
        made.append(prepare_text(data, TokenizerConfig(tokenizers[cuts]), folder, shard_tokens=50).manifest)
        assert made[-1].problems == {}
    assert ids_of(tmp_path / "out0", TRAIN) == whole_ids(tokenizers[cuts], TEXTS[name], "a b")
    assert ids_of(tmp_path / "out1", VAL) == whole_ids(tokenizers[cuts], TEXTS[name])
    assert made[0].documents(TRAIN) == 2


@pytest.mark.parametrize("cuts", [WORDS, NO_WORDS])
@pytest.mark.parametrize("kind", ["bpe", "given"])
def test_a_tail_is_cut_at_its_character_and_nowhere_else(tmp_path: Path, small, tokenizers, monkeypatch, cuts, kind):
    if kind == "bpe" and cuts == NO_WORDS:
        return  # no bpe of our own
    text = TEXTS["blanks far apart"]
    file = write(tmp_path, text, ".txt")
    data, out = DataConfig(paths=(str(file),), val_fraction=0.3), tmp_path / "out"
    wanted = TokenizerConfig("bpe", 300) if kind == "bpe" else TokenizerConfig(tokenizers[cuts])
    prepare_text(data, wanted, out)
    tokenizer, cut = str(out / "tokenizer.json"), int(0.7 * len(text))
    assert ids_of(out, TRAIN) == whole_ids(tokenizer, text[:cut])
    assert ids_of(out, VAL) == whole_ids(tokenizer, text[cut:])


@pytest.mark.parametrize("cuts", [WORDS, NO_WORDS])
def test_any_number_of_workers_gives_the_tokens_of_the_whole(tmp_path: Path, tokenizers, monkeypatch, cuts: str):
    """Processes of their own, to which only the ranges of the text are small."""
    monkeypatch.setattr(pieces, "RANGE_BYTES", 50_000)
    monkeypatch.setattr(prepare_module, "SMALL_BYTES", 0)
    text = letters(150_000) + " and " + letters(100_000, 1)
    file = write(tmp_path, text, ".txt")
    data = DataConfig(paths=(str(file),), val_fraction=0.0)
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        made = prepare_text(data, TokenizerConfig(tokenizers[cuts]), out, workers=workers).manifest
        assert made.problems == {}
        assert ids_of(out, TRAIN) == whole_ids(tokenizers[cuts], text)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("cuts", [WORDS, NO_WORDS])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_stream_has_the_tokens_of_whole_documents(tmp_path: Path, small, tokenizers, cuts, suffix, packing):
    text = TEXTS["blanks far apart"]
    file = write(tmp_path, text, suffix)
    data = DataConfig(paths=(str(file),), stream=True, readers=1, order="sequential", packing=packing, val_fraction=0)
    expected = whole_ids(tokenizers[cuts], text)
    rows, length = 2, 15

    def stream(whole: bool = True) -> LiveBatches:
        loaded = Tokenizer.load(tokenizers[cuts])
        return LiveBatches(find_text(data), loaded, data, rows=rows, length=length, seed=3, whole=whole)

    batches, state, steps, taken = stream(), {}, 3 * len(expected) // (rows * length), []  # into the third epoch
    for step in range(steps):
        inputs, targets = batches.batch(step)
        taken.append(np.concatenate([inputs.numpy(), targets.numpy()[:, -1:]], axis=1))
        if step == steps // 2:
            state = batches.state(step + 1)
    assert batches.read.problems == {}
    batches.close()
    for row in (row for batch in taken for row in batch):
        if packing == "concatenate":
            assert as_text(row) in as_text(expected * 4)
        else:  # stretches of the document, in some order
            assert all(stretch in as_text(expected) for stretch in as_text(row).split(chr(expected[0])))
    again = stream()
    again.restore(state)
    for step in range(steps // 2 + 1, steps):
        assert np.array_equal(again.batch(step)[0].numpy(), taken[step][:, :-1])
    again.close()


@pytest.mark.parametrize("cuts", [WORDS, NO_WORDS])
def test_commands_measure_whole_documents(tmp_path: Path, small, tokenizers, capsys, cuts: str):
    text = TEXTS["letters"]
    file, place, run = write(tmp_path, text, ".txt"), tokenizers[cuts], str(tmp_path / "run")
    expected = whole_ids(place, text)
    assert main(["tokenizer", "show", place, "--file", str(file), "--tokens", "0", "--json"]) == 0
    output = capsys.readouterr()
    assert [token["id"] for token in json.loads(output.out)["shown"]] == expected[1:]
    settings = {**TINY, "tokenizer.kind": place, "train.steps": 1, "data.val_fraction": 0, "model.context_length": 16}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    assert main(["plan", "--data", str(file), "--no-measure", *options]) == 0
    assert main(["train", "--data", str(file), "--out", run, *options]) == 0
    assert main(["eval", run, "--data", str(file), "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out.splitlines()[-1])["tokens"] == len(expected) - 1
    assert "is cut" not in output.out + output.err


def test_beyond_the_bound_a_cut_is_counted(tmp_path: Path, small, tokenizers, capsys):
    text = letters(4500)
    for suffix in (".txt", ".jsonl"):
        file = write(tmp_path / suffix, text, suffix)
        for cuts, place in tokenizers.items():
            out = tmp_path / f"{cuts}{suffix}"
            command = ["data", "prepare", str(file), "--out", str(out), "--val-fraction", "0", "--tokenizer", place]
            assert main(command) == 0
            counted = Manifest.load(out).problems["cut"]
            assert counted >= 2
            said = f"problem   {counted} places where a long document is cut; tokens beside them may differ"
            assert said in capsys.readouterr().out
            assert 0 < len(ids_of(out, TRAIN)) - len(whole_ids(place, text)) <= 3 * counted


@pytest.mark.parametrize("cuts", ["none", WORDS, NO_WORDS])
def test_joined_parts_are_cut_only_where_tokens_stay(tmp_path: Path, small, cuts: str):
    draw = random.Random(1)
    for number in range(60):
        text = " ".join(letters(draw.choice([1, 5, 30, 400]), draw.random()) for _ in range(draw.randrange(1, 9)))
        text = text[: draw.randrange(1, 1900)]
        for suffix in (".txt", ".jsonl"):
            file, stats = write(tmp_path, text, suffix), ReadStats(cuts=cuts)
            found = join_ranges(find_pieces([str(file)]), cuts)
            parts = [part.text for piece in found for part in read_parts([piece], "text", TRAIN, NOTHING, stats)]
            assert "".join(parts) == text, number
            assert stats.problems == {}
            if cuts == NO_WORDS and len(text.encode()) <= 2000:
                assert len(parts) == 1
            if cuts == WORDS:
                assert all(before[-1].isalnum() and after[0] == " " for before, after in pairwise(parts))


def test_the_side_of_a_document_does_not_depend_on_the_tokenizer(tmp_path: Path, small):
    for seed in range(12):
        for suffix in (".txt", ".jsonl"):
            file = write(tmp_path, letters(1000, seed), suffix)
            sides = []
            for cuts in ("none", WORDS, NO_WORDS):
                found = join_ranges(find_pieces([str(file)]), cuts)
                read = [read_parts([piece], "text", HASH, Shares(0.5), ReadStats(cuts=cuts)) for piece in found]
                sides.append({part.split for parts in read for part in parts})
            assert sides[0] == sides[1] == sides[2]
            assert len(sides[0]) == 1


def test_parts_of_both_sides_are_not_joined():
    parts = [Part("a", TRAIN, True, True), Part("b", TRAIN, False, True), Part("c", VAL, True, True)]
    parts += [Part("d", VAL, False), Part("e", VAL, False, True)]
    assert list(join_parts(parts)) == [
        Part("ab", TRAIN, True),
        Part("cd", VAL, True),
        Part("e", VAL, False, True),
    ]


# What earlier versions began ----------------------------------------------------------------------------------------


def test_what_an_earlier_version_began_is_finished_as_it_was_begun(tmp_path: Path, small, tokenizers, monkeypatch):
    """Its finished jobs have the old cuts; the others get them too, and the cuts are counted as they were."""
    file, keeps_whole = write(tmp_path, TEXTS["letters"], ".txt"), prepare_module._keeps_whole
    data, wanted = DataConfig(paths=(str(file),), val_fraction=0.0), TokenizerConfig(tokenizers[NO_WORDS])
    monkeypatch.setattr(prepare_module, "_keeps_whole", lambda folder: False)
    expected = prepare_text(data, wanted, tmp_path / "expected").manifest
    assert expected.problems["cut"] > 5
    assert ids_of(tmp_path / "expected", TRAIN) != whole_ids(tokenizers[NO_WORDS], TEXTS["letters"])

    done = []

    def stops(*task):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task)
        return jobs.tokenize_job(*task)

    monkeypatch.setattr(prepare_module, "tokenize_job", stops)
    with pytest.raises(Interrupted):
        prepare_text(data, wanted, tmp_path / "out")
    as_an_older_plan(tmp_path / "out")
    monkeypatch.setattr(prepare_module, "tokenize_job", jobs.tokenize_job)
    monkeypatch.setattr(prepare_module, "_keeps_whole", keeps_whole)
    for _ in range(2):  # the second finds it complete
        made = prepare_text(data, wanted, tmp_path / "out").manifest
        assert made == expected
    assert ids_of(tmp_path / "out", TRAIN) == ids_of(tmp_path / "expected", TRAIN)


def test_a_plan_of_an_earlier_version_without_tokens_gives_way(tmp_path: Path, small, tokenizers, monkeypatch):
    file, out = write(tmp_path, TEXTS["letters"], ".txt"), tmp_path / "out"
    data, wanted = DataConfig(paths=(str(file),), val_fraction=0.0), TokenizerConfig(tokenizers[NO_WORDS])
    with monkeypatch.context() as earlier:
        earlier.setattr(prepare_module, "_keeps_whole", lambda folder: False)
        earlier.setattr(prepare_module, "SMALL_JOBS", 0)  # whose folder is kept
        earlier.setattr(prepare_module, "run_in_processes", killed)
        with pytest.raises(SystemExit):
            prepare_text(data, wanted, out)
    as_an_older_plan(out)
    prepare_text(data, wanted, out)
    assert ids_of(out, TRAIN) == whole_ids(tokenizers[NO_WORDS], TEXTS["letters"])


def killed(*_: object) -> None:
    raise SystemExit


def as_an_older_plan(folder: Path) -> None:
    plan = json.loads((folder / PLAN).read_text())
    assert plan.pop("whole") is False
    (folder / PLAN).write_text(json.dumps(plan))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_stream_of_an_earlier_version_goes_on_as_it_began(tmp_path: Path, small, tokenizers, suffix: str):
    """Its origin does not say that documents are kept whole, and its cursors count the old parts."""
    file = write(tmp_path, TEXTS["letters"], suffix)
    settings = {"tokenizer.kind": tokenizers[NO_WORDS], "data.stream": True, "data.val_fraction": 0, "data.readers": 2}
    settings |= {"model.context_length": 16, "train.batch_tokens": 64, "train.steps": 12, "data.order": "sequential"}
    settings |= {"checkpoint.every": 4, "eval.every": 0, "data.paths": (str(file),)}
    config = load_config("quickstart", **{**TINY, **settings})
    losses = {}
    for name in ("new", "old", "resumed"):
        run = new_run(config, tmp_path / name)
        if name != "new":  # as an earlier version wrote it
            tree = json.loads((run.folder / ORIGIN).read_text())
            assert tree.pop("whole") is True
            (run.folder / ORIGIN).write_text(json.dumps(tree))
        train(config, run.folder)
        if name == "resumed":
            train(config, run.folder, resume_from=8)
        losses[name] = [record["train/loss"] for record in read_jsonl(run.metrics)]
    assert len(losses["old"]) == 12
    assert losses["resumed"] == losses["old"] != losses["new"]
