import pytest

from pretrain.cli import main
from pretrain.errors import UsageError
from pretrain.text.catalogue import CATALOGUE, TextSet


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


def test_urls_of_the_shuffled_sets_are_nanochats():
    for name, last in (("fineweb-edu-100b-shuffle", 1822), ("climbmix-400b-shuffle", 6542)):
        found = CATALOGUE[name]
        base = f"https://huggingface.co/datasets/karpathy/{name}/resolve/main/"
        every = found.files(last)
        assert len(every) == len(set(every)) == last + 1
        assert found.url(every[0]) == base + "shard_00000.parquet"
        assert found.url(every[-1]) == base + f"shard_{last:05d}.parquet"
        assert found.files(2) == ["shard_00000.parquet", "shard_00001.parquet", f"shard_{last:05d}.parquet"]


def test_urls_of_the_small_sets():
    urls = {name: [each.url(file) for file in each.files()] for name, each in CATALOGUE.items() if not each.huge}
    stories = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
    assert urls["tinystories"][0] == f"{stories}/data/train-00000-of-00004-2d5a1467fff1081b.parquet"
    assert urls["tinystories"][-1] == f"{stories}/data/validation-00000-of-00001-869c898b519ad725.parquet"
    assert urls["tinystories-v2"] == [f"{stories}/TinyStoriesV2-GPT4-{split}.txt" for split in ("train", "valid")]
    raw = "https://raw.githubusercontent.com"
    assert urls["tinyshakespeare"] == [f"{raw}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"]
    assert urls["the-verdict"] == [f"{raw}/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt"]
    assert urls["king-james-bible"] == []


def test_a_mirror_takes_the_place_of_hugging_face_or_of_any_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert CATALOGUE["tinystories-v2"].url("a b.txt") == (
        "https://mirror.example/datasets/roneneldan/TinyStories/resolve/main/a%20b.txt"
    )
    assert CATALOGUE["tinyshakespeare"].url("input.txt").startswith("https://raw.githubusercontent.com/")
    assert CATALOGUE["tinystories"].url("a.parquet", "http://host/x/") == "http://host/x/a.parquet"


@pytest.mark.parametrize("found", CATALOGUE.values(), ids=CATALOGUE)
def test_facts_agree_with_each_other(found: TextSet):
    assert found.about
    assert found.licence
    assert found.page.startswith("https://")
    assert found.bytes > 0
    assert found.huge == (len(found.train) > 100)
    files = found.files(len(found.train))
    assert {*found.sizes, *found.sha256, *found.saved_as} <= set(files)
    if found.sizes:
        assert sum(found.sizes.values()) == found.bytes
        assert set(found.sizes) == set(files)
    if found.validation:  # data.split = last_file takes the last by name
        assert max(files) == found.validation


def test_files_are_as_many_as_asked():
    assert len(CATALOGUE["tinystories"].files(2)) == 3
    with pytest.raises(UsageError, match=r"about 180 GB in all; say how many of its 1,822 training files .* -n 8"):
        CATALOGUE["fineweb-edu-100b-shuffle"].files()
    for count in (-1, 5):
        with pytest.raises(UsageError, match="tinystories has 4 training files; give 1 to that many"):
            CATALOGUE["tinystories"].files(count)


def test_the_real_texts_have_the_published_hashes(shared_data):
    import hashlib

    for name, file in (("tinyshakespeare", "input.txt"), ("the-verdict", "the-verdict.txt")):
        data = (shared_data / f"{name}.txt").read_bytes()
        assert len(data) == CATALOGUE[name].sizes[file]
        assert hashlib.sha256(data).hexdigest() == CATALOGUE[name].sha256[file]


def test_it_is_listed(capsys: pytest.CaptureFixture[str]):
    for arguments in ([], ["--list"]):
        assert main(["data", "download", *arguments]) == 0
        printed = capsys.readouterr().out
        for each in CATALOGUE.values():
            assert each.name in printed
            assert each.licence in printed
            assert each.page in printed
        assert "6,543 files, about 654.3 GB" in printed
        assert "validation: shard_06542.parquet" in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tinystorys"], "no set named 'tinystorys' in the catalogue; did you mean 'tinystories'?"),
        (["fineweb"], "no set named 'fineweb' in the catalogue; there are fineweb-edu-100b-shuffle, climbmix"),
        (["climbmix-400b-shuffle"], "say how many of its 6,542 training files"),
        (["tinystories", "-n", "9"], "-n 9: tinystories has 4 training files"),
        (["tinystories", "the-verdict"], "one set at a time, or several URLs, not tinystories the-verdict"),
        (["http://host/a.txt", "tinystories"], "one set at a time"),
        (["http://host/"], "http://host/ does not end in the name of a file"),
        (["http://host/%2e%2e"], "does not end in the name of a file"),
        (["http://a/x.txt", "http://b/x.txt?y=1"], "two URLs end in the same name x.txt"),
        (["http://host/a.txt", "-n", "2"], "-n and --base-url choose from a set of the catalogue"),
        (["http://[/a.txt"], "http://[/a.txt is not a URL"),
        (["tinystories", "--base-url", "ftp://host"], "--base-url must begin with http:// or https://"),
        (["tinystories", "--workers", "0"], "--workers must be at least 1, not 0"),
        (["tinystories", "--tries", "0"], "--tries must be at least 1, not 0"),
        (["tinystories", "--timeout", "0"], "--timeout must be above 0.0, not 0.0"),
        (["tinystories", "--shard", "1"], "did you mean '--shards'?"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path):
    assert main(["data", "download", *arguments, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert line in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_embedded_set_needs_no_download(capsys: pytest.CaptureFixture[str], tmp_path):
    assert main(["data", "download", "king-james-bible", "--out", str(tmp_path / "out")]) == 0
    assert "pretrain train" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_said_before_anything_is_downloaded(
    capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch: pytest.MonkeyPatch
):
    from pretrain.cli import download

    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 500_000_000}))
    assert main(["data", "download", "climbmix-400b-shuffle", "-n", "8", "--out", str(tmp_path / "a/b")]) == 1
    assert "take about 0.9 GB and the disk has 0.5 GB free; download fewer (-n)" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    for number in range(5):  # what is there needs no room
        with open(tmp_path / f"shard_{number:05d}.parquet{'.part' * (number > 2)}", "wb") as file:
            file.truncate(100_000_000)
    monkeypatch.setenv("HF_ENDPOINT", "no-scheme")
    assert main(["data", "download", "climbmix-400b-shuffle", "-n", "8", "--out", str(tmp_path), "--tries", "1"]) == 1
    assert "9 of 9 files could not be downloaded" in capsys.readouterr().err
