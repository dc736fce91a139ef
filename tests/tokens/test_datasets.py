import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import write_shard

from pretrain.config import Config, config_from_dict, config_to_dict
from pretrain.errors import DataError, UsageError
from pretrain.tokenizer import build_tokenizer
from pretrain.tokens import DataOrder, MixedOrder, TrainingBatches, is_tokens, open_corpus, training_order
from pretrain.tokens.shards import Manifest

TEXT = "Some text to learn from, and a little more of it. "


def prepared(folder: Path, train: list[str], val: list[str], kind: str = "byte") -> str:
    """Shards of our own."""
    folder.mkdir()
    tokenizer = build_tokenizer(kind, 0, train)
    shards = [write_shard(folder, "train", i, [text], tokenizer) for i, text in enumerate(train)]
    shards += [write_shard(folder, "val", i, [text], tokenizer) for i, text in enumerate(val)]
    Manifest.of(tokenizer, shards).save(folder)
    tokenizer.save(folder / "tokenizer.json")
    return str(folder)


def nanogpt(folder: Path, train: int, val: int = 0) -> str:
    """A folder as nanoGPT's, of byte tokens."""
    folder.mkdir()
    (folder / "readme.md").write_text("what nanoGPT's folders have")
    for name, count in (("train", train), ("val", val)):
        if count:
            np.random.default_rng(count).integers(0, 256, count).astype(np.uint16).tofile(folder / f"{name}.bin")
    return str(folder)


@pytest.fixture
def byte_json(tmp_path: Path) -> str:
    """The path of a tokenizer.json of bytes."""
    build_tokenizer("byte", 0, []).save(tmp_path / "byte.json")
    return str(tmp_path / "byte.json")


def config(*paths: str, length: int = 16, **data) -> Config:
    tree = {"data": {"paths": list(paths), **data}, "model": {"context_length": length}, "train": {"batch_tokens": 0}}
    tree["train"]["batch_tokens"] = 4 * length
    return config_from_dict(tree, "test")


def test_our_shards(tmp_path: Path):
    path = prepared(tmp_path / "a", [TEXT * 3, TEXT], [TEXT * 2])
    assert is_tokens([path])
    corpus = open_corpus([path])
    train, val = corpus.stream("train"), corpus.stream("val")
    assert corpus.tokenizer.decode(train.windows(np.array([0]), len(train))[0]) == TEXT * 4
    assert corpus.tokenizer.decode(val.windows(np.array([0]), len(val))[0]) == TEXT * 2
    assert corpus.fingerprint == Manifest.load(Path(path)).fingerprint
    assert corpus.bytes_per_token == pytest.approx(4 * len(TEXT) / (4 * len(TEXT) + 2))


def test_a_shard_that_is_torn_or_missing(tmp_path: Path):
    path = prepared(tmp_path / "a", [TEXT], [TEXT])
    file = tmp_path / "a" / "val-00000.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"val-00000\.bin has \d+ bytes, not"):
        open_corpus([path])
    file.unlink()
    with pytest.raises(DataError, match=r"val-00000\.bin is missing"):
        open_corpus([path])


def test_unfinished_shards_are_not_taken_for_those_of_another_program(tmp_path: Path):
    path = prepared(tmp_path / "a", [TEXT], [])
    (tmp_path / "a" / "manifest.json").unlink()
    (tmp_path / "a" / "plan.json").write_text("{}")
    assert is_tokens([path])
    with pytest.raises(DataError, match="a is not finished; go on with the 'pretrain data prepare'"):
        open_corpus([path], "byte")


def test_files_of_other_programs(tmp_path: Path, byte_json: str):
    folder = nanogpt(tmp_path / "other", 1000, 200)
    train, val = (np.fromfile(tmp_path / "other" / f"{split}.bin", np.uint16) for split in ("train", "val"))
    for paths in ([folder], [f"{folder}/*.bin"], [f"{folder}/train.bin", f"{folder}/val.bin"]):
        assert is_tokens(paths)
        corpus = open_corpus(paths, byte_json)
        assert (corpus.tokens("train"), corpus.tokens("val")) == (1000, 200)
        assert corpus.stream("train").windows(np.array([0]), 1000)[0].tolist() == train.tolist()
        assert corpus.stream("val").windows(np.array([0]), 200)[0].tolist() == val.tolist()
        assert corpus.bytes_per_token == 0
        assert corpus.tokenizer.vocab_size == 257
    without_val = open_corpus([f"{folder}/train.bin"], byte_json)
    assert len(without_val.stream("val")) == 0
    assert without_val.fingerprint != corpus.fingerprint


def test_tokens_without_a_vocabulary_need_one(tmp_path: Path, byte_json: str):
    folder = nanogpt(tmp_path / "other", 1000)
    for kind in ("", "bpe", "char"):
        with pytest.raises(UsageError, match=r"without their vocabulary.*--tokenizer.kind gpt2, or the path"):
            open_corpus([folder], kind)
    with pytest.raises(UsageError, match="no such kind or file"):
        open_corpus([folder], str(tmp_path / "absent.json"))
    (tmp_path / "other" / "train.bin").write_bytes(np.full(1000, 257, dtype=np.uint16).tobytes())
    with pytest.raises(DataError, match="has the token 257"):
        open_corpus([folder], byte_json)


def test_other_tokenizers_are_refused(tmp_path: Path, byte_json: str):
    ours = prepared(tmp_path / "a", [TEXT], [])
    assert open_corpus([ours], byte_json).fingerprint == open_corpus([ours], "bpe").fingerprint
    other = prepared(tmp_path / "b", [TEXT], [], kind="char")
    with pytest.raises(DataError, match=r"b was made with another tokenizer than that in .*a;"):
        open_corpus([ours, other])
    with pytest.raises(UsageError, match=r"b was not made with --tokenizer\.kind"):
        open_corpus([other], byte_json)


def test_what_is_text_and_what_is_tokens(tmp_path: Path):
    ours, foreign = prepared(tmp_path / "a", [TEXT], []), nanogpt(tmp_path / "other", 100)
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text(TEXT)
    (text / "model.bin").write_bytes(b"weights")
    assert not is_tokens([])
    assert not is_tokens([str(text), str(text / "a.txt"), "absent", "*.txt", "https://example.org/train.bin"])
    assert is_tokens([ours, foreign, "fineweb_train_*.bin", "a.ds"])
    with pytest.raises(
        UsageError, match=rf"mixes token shards \({ours}\) with text \({text}\); .* data prepare {text}"
    ):
        is_tokens([str(text), ours])


def test_missing_files(tmp_path: Path, byte_json: str):
    with pytest.raises(DataError, match=r"absent\.bin cannot be read"):
        open_corpus([str(tmp_path / "absent.bin")], byte_json)
    with pytest.raises(DataError, match=r"\*\.bin: there are no such files"):
        open_corpus([str(tmp_path / "*.bin")], byte_json)


def test_without_weights_all_is_one_stream(tmp_path: Path):
    paths = [prepared(tmp_path / "a", [TEXT * 3], []), prepared(tmp_path / "b", [TEXT * 9], [])]
    corpus = open_corpus(paths)
    order = training_order(corpus, config(*paths))
    assert isinstance(order, DataOrder)
    assert order.tokens == corpus.tokens("train") == 12 * len(TEXT) + 2
    assert corpus.fingerprint != open_corpus(paths[::-1]).fingerprint


def test_weights_choose_among_data_sets(tmp_path: Path, byte_json: str):
    paths = [prepared(tmp_path / "a", ["a" * 400], []), prepared(tmp_path / "b", ["b" * 900, "b" * 300], ["b" * 90])]
    paths.append(str(tmp_path / "c.bin"))
    np.full(700, ord("c"), dtype=np.uint32).tofile(paths[-1])  # of another dtype, and of another program
    corpus = open_corpus(paths)
    order = training_order(corpus, config(*paths, weights=[1.0, 2.0, 1.0]))
    assert isinstance(order, MixedOrder)
    batches = TrainingBatches(corpus.stream("train"), order, rows=1000)
    letters = [chr(row.mode().values) for row in batches.batch(0)[1]]
    assert [letters.count(letter) for letter in "abc"] == [250, 500, 250]
    assert batches.epoch(1) == pytest.approx(1000 / (25 + 75 + 43))


def test_stages_begin_at_a_step(tmp_path: Path):
    paths = [prepared(tmp_path / letter, [letter * 400], []) for letter in "ab"]
    corpus = open_corpus(paths)
    tree = config_to_dict(config(*paths, weights=[1.0, 0.0], stages=["0.77: 0 1"]))
    tree["train"]["steps"] = 10
    staged = config_from_dict(tree, "test")
    batches = TrainingBatches(corpus.stream("train"), training_order(corpus, staged), rows=4)
    read = ["".join(chr(row.mode().values) for row in batches.batch(step)[1]) for step in (0, 7, 8, 9, 30)]
    assert read == ["aaaa", "aaaa", "bbbb", "bbbb", "bbbb"]  # 7.7 steps are 8
    for stages in (["0.99: 0 1"], ["0.31: 0 1", "0.34: 1 1"]):
        tree["data"]["stages"] = stages
        with pytest.raises(UsageError, match=r"train\.steps 10 are too few for data\.stages: one of them has no step"):
            training_order(corpus, config_from_dict(tree, "test"))


def test_too_short_for_a_context(tmp_path: Path):
    short, long = prepared(tmp_path / "a", ["a" * 10], ["b" * 5]), prepared(tmp_path / "b", [TEXT * 20], [])
    both = open_corpus([short, long])
    with pytest.raises(DataError, match=r"a: 11 training tokens are fewer than one context of 16 .*context_length 5"):
        training_order(both, config(short, long, weights=[0.5, 0.5]))
    with pytest.raises(DataError, match=r"a, .*b: 6 validation tokens are fewer than one context of 16"):
        training_order(both, config(short, long))
    assert training_order(both, config(short, long, length=5)).windows > 0
    with pytest.raises(UsageError, match="less than one in 1000"):
        training_order(both, config(short, long, length=5, weights=[1e-5, 1.0]))


def test_weights_of_text_and_of_one_path_twice(tmp_path: Path):
    path = prepared(tmp_path / "a", [TEXT * 3], [])
    twice = config(path, path, weights=[1.0, 3.0])
    assert isinstance(training_order(open_corpus([path, path]), twice), MixedOrder)
    with pytest.raises(UsageError, match=r"data\.weights are of token shards, not text"):
        training_order(open_corpus([path]), twice)  # as after text of two paths became one data set


def test_weights_without_training_tokens(tmp_path: Path):
    one, other = prepared(tmp_path / "a", [TEXT * 2], []), prepared(tmp_path / "b", [], [TEXT])
    changed = dataclasses.replace(config(one, other), data=config(one, other, weights=[1.0, 1.0]).data)
    with pytest.raises(DataError, match=r"b: 0 training tokens are fewer .*; add more$"):
        training_order(open_corpus([one, other]), changed)
