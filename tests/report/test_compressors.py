"""General compressors as baselines: against the published definition, and with a PPMd made up where there is none."""

import json
import lzma
import random
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.report import baselines as module
from pretrain.report import compressors
from pretrain.report.baselines import baselines
from pretrain.report.compressors import bits_per_byte, xz

STAND_IN = """
import zlib

def compress(text, max_order, mem_size):  # the shorter, the nearer the order is to 8
    assert 2**24 <= mem_size <= 2**29
    return zlib.compress(text) + bytes(abs(max_order - 8) * len(text) // 100)
"""


def words(count: int, seed: int) -> bytes:
    draw = random.Random(seed)
    return " ".join(draw.choice(["to", "be", "or", "not", "question", "slings"]) for _ in range(count)).encode()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch):
    module = types.ModuleType("pyppmd")
    module.__spec__ = ModuleSpec("pyppmd", None)
    exec(STAND_IN, vars(module))
    monkeypatch.setitem(sys.modules, "pyppmd", module)


def test_xz_is_that_of_the_program():
    for text in (b"", b"a", words(50, 0), words(20_000, 1)):
        assert xz(text) == len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def test_bits_are_of_the_held_out_text_given_the_training_text():
    train, held_out = words(3000, 1), words(500, 2)
    extreme = 9 | lzma.PRESET_EXTREME
    more = len(lzma.compress(train + held_out, preset=extreme)) - len(lzma.compress(train, preset=extreme))
    settings = {"xz": {"xz -9e": xz}, "none": {"bad": lambda text: 2 * len(text), "good": len}}
    assert bits_per_byte(settings, train, held_out) == {
        "xz": ("xz -9e", 8 * more / len(held_out)),
        "none": ("good", 8.0),
    }


def test_memory_that_lacks_is_no_error():
    def greedy(text: bytes) -> int:
        raise MemoryError

    assert bits_per_byte({"greedy": {"greedy": greedy}, "none": {"none": len}}, b"abc", b"de") == {"none": ("none", 8)}


def test_the_best_order_of_ppmd(stand_in):
    found = bits_per_byte({"PPMd": compressors.compressors()["PPMd"]}, words(3000, 1), words(500, 2))
    assert found["PPMd"][0] == "PPMd, order 8"


def test_real_ppmd():
    pyppmd = pytest.importorskip("pyppmd")
    text = words(3000, 1)
    assert compressors.ppmd(text, 6) == len(pyppmd.compress(text, max_order=6, mem_size=2**29))


def test_they_are_on_the_page_and_kept(make_run, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(compressors, "find_spec", lambda name: None if name == "pyppmd" else object())
    run = make_run()
    found = baselines(run)
    assert found is not None
    text = Path(run.config.data.paths[0]).read_text(encoding="utf-8")
    cut = int(0.95 * len(text))
    train, held_out = (part.encode() for part in (text[:cut], text[cut:]))
    assert (found.compressed_bytes, found.compressed_all) == ((len(train), len(held_out)), True)
    assert found.compressed == {"xz": ("xz -9e", 8 * (xz(train + held_out) - xz(train)) / len(held_out))}
    with monkeypatch.context() as patch:
        patch.setattr(module, "bits_per_byte", None)
        assert baselines(run) == found
        assert main(["report", str(run.folder)]) == 0
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert f"all the text, {len(train):,} bytes of training text, then {len(held_out):,} of held-out text" in page
    assert "it goes on learning inside that, which a GPT does not" in page


def test_one_that_was_installed_later_is_measured(make_run, stand_in, monkeypatch):
    run = make_run()
    with monkeypatch.context() as patch:
        patch.setattr(compressors, "find_spec", lambda name: None if name == "pyppmd" else object())
        before = baselines(run)
    now = baselines(run)
    assert before is not None
    assert now is not None
    assert (list(before.compressed), list(now.compressed)) == (["xz"], ["xz", "PPMd"])
    assert now.compressed["xz"] == before.compressed["xz"]


def test_what_takes_seconds_waits_for_the_command(make_run, monkeypatch, capsys):
    monkeypatch.setattr(module, "AT_ONCE_BYTES", 10_000)
    monkeypatch.setattr(module, "TRAIN_BYTES", 4000)
    monkeypatch.setattr(module, "HELD_OUT_BYTES", 300)
    run = make_run()
    found = baselines(run)
    assert found is not None
    assert found.compressed == {}
    assert json.loads((run.folder / module.CACHE).read_text())["compressed"] == {}
    assert main(["report", str(run.folder)]) == 0
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "learns from the last 4,000 bytes of training text, then 300 of held-out text" in page
    found = baselines(run)
    assert found is not None
    text = Path(run.config.data.paths[0]).read_text(encoding="utf-8")
    cut = int(0.95 * len(text))
    train, held_out = text[:cut].encode()[-4000:], text[cut:].encode()[:300]
    assert found.compressed["xz"][1] == 8 * (xz(train + held_out) - xz(train)) / 300
    assert not found.compressed_all


def test_a_cache_of_before_is_read(make_run, monkeypatch):
    run = make_run()
    found = baselines(run)
    file = run.folder / module.CACHE
    tree = json.loads(file.read_text())
    for name in ("compressed", "compressed_bytes", "compressed_all"):
        del tree[name]
    file.write_text(json.dumps(tree))
    monkeypatch.setattr(module, "measure_baselines", None)
    assert baselines(run) == found
