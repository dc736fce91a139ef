import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report.conftest import records

from pretrain.cli import main
from pretrain.config import load_config
from pretrain.errors import UsageError
from pretrain.io import append_jsonl
from pretrain.report import page, write_report
from pretrain.report.facts import configuration
from pretrain.report.page import View, run_names
from pretrain.runs import Run
from pretrain.runs.environment import ENVIRONMENT
from pretrain.sizing import flops_per_token

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 <!-- \u202e 王 \ud800"


class Elements(HTMLParser):
    """Tags, text and scripts of a page."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.text, self.scripts = "", []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def read(file: Path) -> Elements:
    return Elements(file.read_text(encoding="utf-8"))


def test_a_run_on_a_page(make_run, tmp_path: Path):
    run = make_run()
    elements = read(write_report([run], tmp_path / "page.html"))
    data = elements.data["runs"][0]
    assert data["train"]["train/loss"][:2] == [5.0, 3.5]
    assert data["train"]["train/momentum"][0] == 0.85
    assert data["val"]["step"] == [10, 20, 30, 40]
    assert [sample["step"] for sample in data["samples"]] == [10, 20, 30, 40]
    assert data["flops_per_token"] == flops_per_token(run.config.model, run.tokenizer().vocab_size)
    for said in (
        "held-out loss2.2750",
        "guess any token",
        "clipped to norm 1 at 30 of 40 steps (75.0%)",
        "Held-out loss 2.275 nats per token",
        "seen its training text",
    ):
        assert said in elements.text
    assert f"pretrain train --out {run.folder}" in elements.text
    assert elements.data["live"] is False


def test_it_loads_nothing_and_runs_no_script_but_its_own(make_run, tmp_path: Path):
    elements = read(write_report([make_run()], tmp_path / "page.html"))
    wanted = [v for _, attributes in elements.tags for k, v in attributes.items() if k in ("src", "href", "srcset")]
    assert [address[:5] for address in wanted] == ["data:"]
    policy = next(a["content"] for tag, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(elements.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "</" + "script" not in elements.scripts[1]


def test_no_text_of_a_run_becomes_part_of_the_page(make_run, tmp_path: Path):
    clean = read(write_report([make_run("clean")], tmp_path / "clean.html"))
    readable = EVIL.replace("\ud800", "")
    run = make_run("evil", **{"sample.prompt": readable, "data.paths": [f"{readable}/a.txt"]})
    (run.folder / ENVIRONMENT).write_text(
        json.dumps([{"command": ["pretrain", "train", EVIL], "device": EVIL, EVIL: 1}])
    )
    append_jsonl(run.metrics, {"step": 50, "tokens": 1, "time": 1, "train/loss": 1, readable: 3.0})
    with run.samples.open("a") as out:
        out.write(json.dumps({"step": 50, "prompt": EVIL, "text": EVIL * 2}) + "\n")
    with run.events.open("a") as out:
        out.write(json.dumps({"step": 50, "event": EVIL, "text": EVIL}) + "\n")
    elements = read(write_report([run], tmp_path / "evil.html"))
    assert {tag for tag, _ in elements.tags} == {tag for tag, _ in clean.tags}
    assert len(elements.scripts) == 2
    assert not set("<>&") & set(elements.scripts[0])
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
    sample = elements.data["runs"][0]["samples"][-1]
    assert sample["prompt"] == EVIL.replace("\ud800", "?")
    assert readable.strip() in elements.text.replace("'\"'\"'", "'")


def test_a_million_steps_make_a_page_of_bounded_size(make_run, tmp_path: Path, monkeypatch):
    """Here 30,000 with the limits of a page a tenth: every step costs the reader, not the page."""
    run = make_run()
    lines = records(41, 30_000)
    lines[20_000]["train/loss"] = 77.0
    append_jsonl(run.metrics, *lines)
    append_jsonl(run.samples, *({"step": 40 + i, "prompt": "", "text": "x" * 10_000} for i in range(1, 1000)))
    monkeypatch.setattr(page, "MOST_ROWS", 500)
    monkeypatch.setattr(page, "SAMPLES", 20)
    file = write_report([run], tmp_path / "page.html")
    data = read(file).data["runs"][0]
    assert file.stat().st_size < 400_000
    assert len(data["train"]["step"]) <= 502
    assert 77.0 in data["train"]["train/loss"]
    assert len(data["val"]["step"]) <= 502
    assert [data["samples"][place]["step"] for place in (0, -1)] == [10, 1039]
    assert len(data["samples"]) == 20
    append_jsonl(run.samples, *({"step": 2000 + i // 4, "prompt": str(i % 4), "text": "x"} for i in range(4000)))
    samples = View(run.folder)
    samples.refresh()
    steps = [sample["step"] for sample in samples.payload()["samples"]]
    assert steps.count(2999) == 4  # of every step that is shown, all prompts
    assert len(steps) <= 40


def test_several_runs_with_what_differs(make_run, tmp_path: Path):
    runs = [make_run("a"), make_run("b", steps=20, **{"optim.lr": 0.5, "model.layers": 3})]
    elements = read(write_report(runs, tmp_path / "page.html"))
    assert [run["name"] for run in elements.data["runs"]] == ["a", "b"]
    text = re.sub(r"\s+", " ", elements.text)
    differing = text[text.index("Configuration differences") : text.index("The loss in plain words")]
    assert re.findall(r"[a-z]+\.[a-z_]+", differing) == ["model.layers", "optim.lr"]
    assert "20 of 40" in text
    assert "Their vocabularies differ" not in text
    same = read(write_report([runs[0], make_run("c")], tmp_path / "same.html"))
    assert "repetitions of each other" in same.text


def test_groups_of_seeds_have_a_mean_and_a_band(make_run, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, (rate, seed) in enumerate([(0.01, 1), (0.01, 2), (0.02, 1), (0.02, 2), (0.04, 1)]):
        more = {"optim.lr": rate, "train.seed": seed, "checkpoint.every": 5 + seed}
        run = make_run(f"lr/{rate}-{seed}", steps=0, **more)
        append_jsonl(run.metrics, *records(1, 40 - 10 * (i == 1), **{"train/grad_norm": rate + seed}))
        if i != 1:
            (run.folder / "summary.json").write_text(json.dumps({"steps": 40, "val_loss": 2 + i, "val_bpb": 1 + i / 9}))
    assert main(["report", "lr", "--png"]) == 0
    elements = read(Path("comparison.html"))
    low, high, last = elements.data["groups"]
    assert [group["name"] for group in (low, high, last)] == ["optim.lr 0.01", "optim.lr 0.02", "optim.lr 0.04"]
    assert low["train"]["step"][-1] == 30  # the last that both runs have
    assert low["train"]["train/grad_norm"][0] == 1.51
    assert (low["train"]["train/grad_norm low"][0], low["train"]["train/grad_norm high"][0]) == (1.01, 2.01)
    assert "train/lr low" not in low["train"]  # it is the same with every seed
    assert "train/grad_norm low" not in last["train"]
    assert [run["train"] for run in elements.data["runs"]] == [{}] * 5
    assert "Groups of seeds" in elements.text
    assert "Left out: lr/0.01-2 is not finished." in elements.text
    assert "optim.lr 0.02 from optim.lr 0.01" in elements.text or "optim.lr 0.02 is" in elements.text
    (tmp_path / "lr" / "0.01-1" / "config.toml").write_text(
        (tmp_path / "lr" / "0.01-1" / "config.toml").read_text().replace("stride = 0", "stride = 8")
    )
    assert main(["report", "lr"]) == 0
    assert "eval.stride 8 and 0, which do not compare" in read(Path("comparison.html")).text


def test_names_tell_runs_apart(make_run, tmp_path: Path):
    one = make_run()
    assert run_names([one]) == ["one"]
    other = Run(tmp_path / "elsewhere" / "one", one.config)
    assert run_names([one, other]) == [f"{tmp_path.name}/one", "elsewhere/one"]


def test_a_run_without_a_single_step_or_any_shards(make_run, tmp_path: Path):
    run = make_run(steps=0)
    (run.data / "manifest.json").unlink()
    (run.folder / "tokenizer.json").unlink()
    elements = read(write_report([run], tmp_path / "page.html"))
    assert elements.data["runs"][0]["train"] == {"step": [], "train/momentum": []}
    assert "Commands" in elements.text


def test_before_the_first_step_and_both_of_the_last(make_run, tmp_path: Path):
    run = make_run(steps=0)
    append_jsonl(run.metrics, {"step": 0, "tokens": 0, "time": 1.0, "val/loss": 5.5, "val/bpb": 7.9})
    elements = read(write_report([run], tmp_path / "page.html"))
    assert elements.data["runs"][0]["val"]["val/loss"] == [5.5]
    assert elements.data["runs"][0]["train"]["step"] == []
    assert "held-out loss5.5000" in elements.text
    append_jsonl(run.metrics, *records(1, 39))
    append_jsonl(run.metrics, *records(40, 40, **{"val/loss": 2.5, "val/part_loss": 2.1, "val/part_bpb": 3.0}))
    elements = read(write_report([run], tmp_path / "page.html"))
    data = elements.data["runs"][0]
    assert data["val"]["val/loss"] == [5.5, 2.5, 2.35, 2.3, 2.1]
    assert data["val"]["val/loss of all"] == [None, None, None, None, 2.5]
    assert data["val"]["val/loss lowest"] == [None, None, None, None, 2.1]
    assert data["train"]["train/momentum"][0] == 0.85
    assert "held-out loss2.5000" in elements.text
    assert "of all held-out text. The validations before, and the curve, take 256 tokens of it" in elements.text
    assert "over these it is 2.100 now" in elements.text
    assert "has risen" not in elements.text  # the part, which compares, has fallen


def test_memorising_is_said(make_run, tmp_path: Path):
    run = make_run()
    append_jsonl(run.metrics, *records(41, 50, **{"val/loss": 3.9, "train/skipped": 2.0}))
    text = read(write_report([run], tmp_path / "page.html")).text
    assert "lowest, 2.275, after step 40, and has risen to 3.900" in text
    assert "Skipped steps, which changed nothing: 10 a spike" in text


def test_the_recipe_is_the_one_of_the_command(make_run):
    run = make_run("run", **{"optim.lr": 0.5})
    assert configuration(run, 257)[0] == ""
    start = {"command": ["pretrain", "train", "laptop", "--optim.lr", "0.5"]}
    (run.folder / ENVIRONMENT).write_text(json.dumps([start]))
    name, fields = configuration(run, 257)
    assert name == "laptop"
    assert ("optim.lr", "0.5", f"{load_config('laptop').optim.lr:g}") in fields
    assert ("train.seed", str(run.config.train.seed), "") in fields
    (run.folder / ENVIRONMENT).write_text(json.dumps([{"command": ["pretrain", "train", "gone.toml"]}]))
    name, fields = configuration(run, 257)
    assert name == ""
    assert not any(recipe for _, _, recipe in fields)


def test_passwords_in_addresses_stay_here(make_run, tmp_path: Path):
    run = make_run("run", **{"data.paths": ["s3://key:secret@host/a", "http://host/b@c?token=secret"]})
    command = ["pretrain", "train", "--data.paths", "s3://key:secret@host/a"]
    (run.folder / ENVIRONMENT).write_text(json.dumps([{"command": command}]))
    append_jsonl(run.events, {"step": 1, "event": "retry", "text": "cannot read https://me:secret@host/d"})
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "secret" not in page
    for shown in ("s3://host/a, http://host/b@c", "--data.paths s3://host/a", "cannot read https://host/d"):
        assert shown in page


def test_the_command_writes_the_page_and_pictures(make_run, tmp_path: Path, capsys, monkeypatch):
    one = make_run("one")
    make_run("two", steps=20)
    assert main(["report", str(one.folder)]) == 0
    assert capsys.readouterr().out == f"Wrote {one.folder}/report.html\n"
    monkeypatch.chdir(tmp_path)
    assert main(["report", "one", "two", "one", "--png"]) == 0
    names = ["comparison.html", "loss.png", "bits-per-byte.png", "learning-rate.png", "gradient-norm.png"]
    assert capsys.readouterr().out.split() == [w for name in [*names, "throughput.png"] for w in ("Wrote", name)]
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["report"], 2, "RUN"),
        (["report", "absent"], 1, "absent does not exist"),
        (["report", "one", "--out", "no/folder.html"], 2, "cannot write no/folder.html: give a file in a folder that"),
        (["report", "one", "--out", "."], 2, "cannot write .: give a file"),
        (["watch"], 2, "RUN"),
        (["watch", "one", "--port", "70000"], 2, "--port must be at most 65535, not 70000"),
        (["watch", "one/config.toml"], 1, "one/config.toml is not a run directory"),
    ],
)
def test_mistakes_in_one_line(make_run, tmp_path: Path, capsys, monkeypatch, args, code, message):
    make_run()
    monkeypatch.chdir(tmp_path)
    assert main(args) == code
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_disk_that_is_full(make_run, tmp_path: Path):
    with pytest.raises(UsageError, match="choose another file with --out"):
        write_report([make_run()], Path("/proc/report.html"))
