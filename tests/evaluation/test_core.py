import csv
import http.server
import itertools
import json
import math
import random
import shutil
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tests.conftest import TINY

from pretrain.cli import main
from pretrain.config import Config, load_config
from pretrain.errors import DataError
from pretrain.evaluation import GPTScorer, answer_task, bundle, evaluate_core, huggingface, open_bundle, read_tasks
from pretrain.evaluation.bundle import Example
from pretrain.evaluation.core import Answer, prepare_questions, prompts
from pretrain.evaluation.huggingface import HFScorer
from pretrain.evaluation.scorer import Scorer
from pretrain.io import read_jsonl
from pretrain.model import GPT
from pretrain.text.download import _Downloader
from pretrain.tokenizer import build_tokenizer
from pretrain.training import evaluator, train

WORDS = [
    "the", "a", "red", "blue", "old", "small", "house", "tree",
    "fox", "king", "sees", "hears", "finds", "and", "then", "of",
    "over", "Zoë", "王", "happily", "never",
]  # fmt: skip


def write_bundle(folder: Path, shots: int = 2) -> Path:
    """A bundle with a task of each kind, made of random words."""
    draw = random.Random(7)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    choice = [
        {"query": words(1, 30), "choices": [words(1, 4) for _ in range(draw.randint(2, 4))], "gold": 1}
        for _ in range(24)
    ]
    choice += [{"query": words(3, 9), "choices": ["A", "B", "C"], "gold": draw.randint(0, 2)} for _ in range(8)]
    choice += [  # an option that is the beginning of the others, first and last; options that are equal
        {"query": "one", "choices": ["red", "red house"], "gold": 0},
        {"query": "two", "choices": ["red house", "red"], "gold": 1},
        {"query": "three", "choices": ["red", "red", "blue"], "gold": 0},
    ]
    schema = [
        {"context_options": [f"{words(1, 9)} {n}" for n in ("fox", "king")], "continuation": words(1, 6), "gold": 1}
        for _ in range(16)
    ]
    language = [{"context": f" {words(2, 20)} \n", "continuation": words(1, 3)} for _ in range(16)]
    kinds = {"multiple_choice": choice, "schema": schema, "language_modeling": language}
    (folder / "eval_data/some").mkdir(parents=True)
    for kind, items in kinds.items():
        text = "\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n"
        (folder / f"eval_data/some/{kind}.jsonl").write_text(text, encoding="utf-8")
    labels = ["copa", "winograd", "squad"]
    tasks = [
        {"label": label, "icl_task_type": kind, "dataset_uri": f"some/{kind}.jsonl", "num_fewshot": [shots]}
        for label, kind in zip(labels, kinds, strict=True)
    ]
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))  # JSON is YAML
    rows = "".join(f"{label},{base}\n" for label, base in zip(labels, (50, 50, 0), strict=True))
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + rows)
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def make_scorer(context: int, kind: str = "byte", **settings: object) -> GPTScorer:
    """A model that has learned nothing, but whose predictions differ clearly."""
    tokenizer = build_tokenizer(kind, 300, [" ".join(WORDS), "and then"] * 40)
    config = load_config("quickstart", **{**TINY, "model.context_length": context, "train.batch_tokens": context})
    model = GPT(replace(config.model, init="gpt2", **settings), tokenizer.vocab_size, tokenizer.bos_id)
    model.init_weights(torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.head.weight.mul_(40)
        if model.smear is not None:
            model.smear.fill_(0.5)
        if model.bigram_embedding is not None:
            model.bigram_embedding.weight.normal_(generator=torch.Generator().manual_seed(4))
    return GPTScorer(model, tokenizer)


def read_items(folder: Path, entry: dict) -> list[dict]:
    with open(folder / "eval_data" / entry["dataset_uri"], encoding="utf-8") as lines:
        items = [json.loads(line) for line in lines]
    random.Random(1337).shuffle(items)
    return items


def reference(scorer: Scorer, logits_of, entry: dict, items: list[dict], index: int) -> Answer:
    """One question as the paper and nanochat ask it, written plainly: each option alone through the whole model."""
    kind, shots = entry["icl_task_type"], entry["num_fewshot"][0]
    item = items[index]
    drawn = random.Random(1234 + index).sample([i for i in range(len(items)) if i != index], shots) if shots else []
    if kind == "multiple_choice":
        shown = "".join(f"{items[i]['query']} {items[i]['choices'][items[i]['gold']]}\n\n" for i in drawn)
        texts = [f"{shown}{item['query']} {choice}" for choice in item["choices"]]
    elif kind == "schema":
        shown = "".join(
            f"{items[i]['context_options'][items[i]['gold']]} {items[i]['continuation']}\n\n" for i in drawn
        )
        texts = [f"{shown}{context} {item['continuation']}" for context in item["context_options"]]
    else:
        shown = "".join(f"{items[i]['context'].strip()} {items[i]['continuation']}\n\n" for i in drawn)
        before = f"{shown}{item['context'].strip()} "
        texts = [before.strip(), before + item["continuation"]]
    rows = [scorer.encode([text])[0] for text in texts]
    if kind == "multiple_choice":
        start = 0
        while all(len(row) > start and row[start] == rows[0][start] for row in rows):
            start += 1
        starts = [start] * len(rows)
    elif kind == "schema":
        end = 0
        while all(len(row) > end and row[-1 - end] == rows[0][-1 - end] for row in rows):
            end += 1
        starts = [len(row) - end for row in rows]
    else:
        assert rows[1][: len(rows[0])] == rows[0]
        rows, starts = rows[1:], [len(rows[0])]
    losses, right = [], True
    for row, start in zip(rows, starts, strict=True):
        cut = max(0, len(row) - (scorer.context_length or len(row)))
        row, fits, start = row[cut:], start - cut >= 1, max(1, start - cut)
        logits = logits_of(torch.tensor([row]))[0].double()
        targets = torch.tensor(row[start:], dtype=torch.long)
        each = F.cross_entropy(logits[start - 1 : -1], targets, reduction="none")
        losses.append(each.mean().item() if len(each) else math.nan)
        right = right and fits and bool((logits[start - 1 : -1].argmax(-1) == targets).all())
    if kind == "language_modeling":
        return Answer(right, tuple(losses))
    return Answer(losses.index(min(losses)) == item["gold"], tuple(losses))


@torch.no_grad()
def compare_with_reference(folder: Path, scorer: Scorer, logits_of, count: int = 0) -> list[Answer]:
    every = []
    entries = yaml.safe_load((folder / "core.yaml").read_text())["icl_tasks"]
    for task, entry in zip(read_tasks(folder), entries, strict=True):
        items = read_items(folder, entry)
        answers = answer_task(scorer, task, count)
        assert len(answers) == min(count or len(items), len(items))
        for index, answer in enumerate(answers):
            expected = reference(scorer, logits_of, entry, items, index)
            assert answer.losses == pytest.approx(expected.losses, abs=1e-4, nan_ok=True), (task.label, index)
            gaps = sorted(expected.losses)
            if task.kind == "language_modeling" or gaps[1] - gaps[0] > 1e-4:
                assert answer.correct == expected.correct, (task.label, index)
        every += answers
    return every


@pytest.mark.parametrize("context", [48, 150, 2000])
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_answers_are_those_of_one_option_at_a_time(made: Path, context: int, kind: str):
    scorer = make_scorer(context, kind)
    answers = compare_with_reference(made, scorer, scorer.model)
    assert 0 < sum(answer.correct for answer in answers) < len(answers)


@pytest.mark.parametrize(
    "settings",
    [
        {"smear": True, "value_embeddings": True, "bigram_rows": 64, "residual_scalars": True},
        {"ngram_heads": 2, "document_mask": True, "window_pattern": "SSL", "window": 7},
        {"position": "learned", "kv_heads": 1, "vocab_multiple": 64},
    ],
)
def test_every_kind_of_model_shares_beginnings_rightly(made: Path, settings: dict):
    scorer = make_scorer(512, **settings)
    compare_with_reference(made, scorer, scorer.model, count=12)


@torch.no_grad()
def test_language_that_is_predicted_counts(made: Path):
    """A continuation is right exactly when greedy generation writes it."""
    scorer, task = make_scorer(1000), read_tasks(made)[2]
    letters = torch.tensor([97 <= token <= 122 for token in range(257)])
    scorer.model.head.weight[~letters] = 0  # so that it writes nothing else
    scorer = GPTScorer(scorer.model, scorer.tokenizer)
    right, wrong = [], []
    for index in range(len(task.examples)):
        before = prompts(task, index)[0].removesuffix(task.examples[index].continuations[0]).strip()
        tokens = scorer.encode([before])[0]
        for _ in range(3):
            tokens.append(int(scorer.model(torch.tensor([tokens]))[0, -1].argmax()))
        written = scorer.tokenizer.decode(tokens)[len(before) :]
        assert len(written) == 3
        right.append(Example((before,), (written,), 0))
        wrong.append(Example((before,), (written[:2] + ("a" if written[2] != "a" else "b"),), 0))
    for examples, correct in ((right, True), (wrong, False)):
        asked = replace(task, shots=0, delimiter="", examples=tuple(examples))
        assert all(answer.correct == correct for answer in answer_task(scorer, asked))


@pytest.mark.parametrize(("context", "share"), [(2000, 1.25), (150, 1.0)])
def test_hardly_more_is_computed_than_must_be(made: Path, monkeypatch: pytest.MonkeyPatch, context: int, share: float):
    """What options have in common is run once, also by some of them where others were cropped; little is padding."""
    scorer, task = make_scorer(context), read_tasks(made)[0]
    computed: list[int] = []
    stream = GPTScorer._stream

    def counted(self: GPTScorer, tokens: torch.Tensor, *others) -> torch.Tensor:
        computed.append(tokens.numel())
        return stream(self, tokens, *others)

    monkeypatch.setattr(GPTScorer, "_stream", counted)
    answer_task(scorer, task)
    together = apart = 0
    for options in prepare_questions(scorer, task, range(len(task.examples))):
        rows = sorted({tuple(option.tokens[:-1]) for option in options if option.start < len(option.tokens)})
        alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
        common = len(list(alike)) if len(rows) > 1 else 0
        together += common + sum(len(row) - common for row in rows)
        apart += sum(map(len, rows))
    assert apart > (2 if context == 2000 else 1) * together
    assert sum(computed) < share * together


def test_the_real_tasks(shared_data: Path):
    folder = shared_data / "core_bundle"
    for context, count in ((128, 3), (1024, 1)):
        scorer = make_scorer(context, "bpe", layers=1)
        compare_with_reference(folder, scorer, scorer.model, count)
    assert len(read_tasks(folder)) == 8


def test_few_shot_examples_are_those_of_the_whole_task(made: Path):
    scorer, task = make_scorer(600), read_tasks(made)[0]
    every, some = answer_task(scorer, task), answer_task(scorer, task, 5)
    assert [a.correct for a in every[:5]] == [a.correct for a in some]
    for a, b in zip(every, some, strict=False):
        assert a.losses == pytest.approx(b.losses, abs=1e-5, nan_ok=True)
    assert prompts(task, 3) == prompts(read_tasks(made)[0], 3)
    own = task.examples[3].options(" ")
    solved = prompts(task, 3)[0].removesuffix(own[0]).split("\n\n")[:-1]
    assert len(solved) == 2
    known = {e.options(" ")[e.gold] for i, e in enumerate(task.examples) if i != 3}
    assert set(solved) <= known


def test_the_mean_is_of_centered_accuracies_and_says_when_partial(made: Path):
    scorer = make_scorer(200)
    state = torch.get_rng_state()
    scorer.model.train()
    random.seed(5)
    before = random.getstate()
    result = evaluate_core(scorer, read_tasks(made))
    assert scorer.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == before
    bases = (0.5, 0.5, 0.0)
    centered = [(task.accuracy - base) / (1 - base) for task, base in zip(result.tasks, bases, strict=True)]
    assert result.core == pytest.approx(sum(centered) / 3)
    assert result.name == "CORE (3 of 22 tasks)"
    assert len(result.missing) == 19
    assert len(bundle.CORE_TASKS) == len(set(bundle.CORE_TASKS)) == 22


def logits_of_transformers(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def test_transformers_models(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    transformers = pytest.importorskip("transformers")
    tokenizer = build_tokenizer("byte", 0, [])
    torch.manual_seed(0)
    common = {"vocab_size": tokenizer.vocab_size, "bos_token_id": 256, "eos_token_id": 256}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    models = {
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_positions=300, n_embd=32, n_layer=2, n_head=2, **common)
        ),
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(max_position_embeddings=2000, num_key_value_heads=1, **small, **common)
        ),
    }
    for name, model in models.items():
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save(folder / "tokenizer.json")
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.hf, bos_token="<|endoftext|>")
        fast.save_pretrained(folder)
        scorer = HFScorer(folder, torch.device("cpu"))
        assert scorer.context_length == (300 if name == "gpt2" else 2000)
        if name == "llama":  # as with a large vocabulary: batches are scored in halves
            monkeypatch.setattr(huggingface, "CHUNK_ELEMENTS", 100)
        compare_with_reference(made, scorer, partial(logits_of_transformers, model.eval()), count=10)


# Where a bundle comes from ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/pretrain/core"


@pytest.fixture
def zipped(made: Path, tmp_path: Path) -> Path:
    shutil.make_archive(str(tmp_path / "bundle"), "zip", root_dir=made)
    return tmp_path / "bundle.zip"


def test_a_zip_file_is_read_as_it_is(made: Path, zipped: Path, cache: Path):
    assert read_tasks(open_bundle(str(zipped))) == read_tasks(made)
    assert not cache.exists()


def test_a_bundle_one_folder_down(made: Path, tmp_path: Path):
    expected = read_tasks(made)
    shutil.move(made, tmp_path / "outer/eval_bundle")
    shutil.make_archive(str(tmp_path / "outer"), "zip", root_dir=tmp_path / "outer")
    for place in ("outer", "outer.zip"):
        assert read_tasks(open_bundle(str(tmp_path / place))) == expected


@pytest.mark.parametrize("uri", ["../evil.jsonl", "eval_data/../../evil.jsonl", "/tmp/evil.jsonl"])
def test_what_is_above_a_zip_file_is_not_in_it(uri: str, made: Path, tmp_path: Path):
    evil = (made / "eval_data/some/schema.jsonl").read_text()
    (tmp_path / "evil.jsonl").write_text(evil)
    text = (made / "core.yaml").read_text()
    (made / "core.yaml").write_text(text.replace("some/schema.jsonl", uri))
    shutil.make_archive(str(tmp_path / "bundle"), "zip", root_dir=made)
    with zipfile.ZipFile(tmp_path / "bundle.zip", "a") as archive:
        archive.writestr(uri, evil)
    with pytest.raises(DataError, match="outside of the bundle"):
        read_tasks(open_bundle(str(tmp_path / "bundle.zip")))


def test_damaged_and_too_large_zip_files_are_refused(zipped: Path, monkeypatch: pytest.MonkeyPatch):
    content = zipped.read_bytes()
    monkeypatch.setattr(bundle, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="which no CORE bundle has"):
        open_bundle(str(zipped))
    monkeypatch.undo()
    at = content.index(b"core.yaml") + 40
    zipped.write_bytes(content[:at] + bytes(byte ^ 255 for byte in content[at : at + 20]) + content[at + 20 :])
    with pytest.raises(DataError, match=r"bundle\.zip/core\.yaml cannot be read"):
        read_tasks(open_bundle(str(zipped)))
    zipped.write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="is not a zip file"):
        open_bundle(str(zipped))


class Server(http.server.SimpleHTTPRequestHandler):
    requests: list[str] = []  # noqa: RUF012
    failures: list[int] = []  # noqa: RUF012

    def do_GET(self):
        Server.requests.append(self.path)
        failure = Server.failures.pop(0) if Server.failures else 0
        if failure == 1:  # break off in the middle
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"PK")
        elif failure:
            self.send_error(failure)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object):
        pass


@pytest.fixture
def server(zipped: Path) -> Iterator[str]:
    Server.requests, Server.failures = [], []
    handler = partial(Server, directory=str(zipped.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_a_url_is_fetched_once_and_again_where_it_broke(
    server: str, made: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    waits: list[float] = []
    monkeypatch.setattr(_Downloader, "_wait", lambda self, seconds: waits.append(seconds))
    Server.failures = [503, 1]
    for _ in range(2):
        assert read_tasks(open_bundle(f"{server}/bundle.zip")) == read_tasks(made)
        assert len(Server.requests) == 3
        assert len(waits) == 2
    Server.failures = [1] * 5
    with pytest.raises(DataError, match=r"other\.zip cannot be fetched .*; fetch it elsewhere"):
        open_bundle(f"{server}/other.zip")
    assert len(list((cache / "downloads").iterdir())) == 1
    with pytest.raises(DataError, match="HTTP 404"):
        open_bundle(f"{server}/absent.zip")


def test_no_network_is_one_line_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def wait(self: _Downloader, seconds: float):
        raise AssertionError("it waited")

    monkeypatch.setattr(_Downloader, "_wait", wait)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(DataError, match=r"cannot be fetched .*; fetch it elsewhere"):
            open_bundle(f"http://127.0.0.1:{port}/bundle.zip")
    with pytest.raises(DataError, match="only https"):
        open_bundle("http://example.com/bundle.zip")


BROKEN = {
    "no list": ("core.yaml", "a: 1", "core.yaml is not a list of CORE tasks: Object missing"),
    "not yaml": ("core.yaml", "a: [", "core.yaml is not a list of CORE tasks"),
    "object from yaml": ("core.yaml", "!!python/object/apply:os.getcwd []", "core.yaml is not a list of CORE tasks"),
    "incomplete task": ("core.yaml", "icl_tasks: [{label: copa}]", "missing required field `icl_task_type`"),
    "no tasks": ("core.yaml", "icl_tasks: []", "length >= 1 - at `$.icl_tasks`"),
    "no baseline": ("eval_meta_data.csv", "Eval Task,Random baseline\nx,1\n", "no random baseline for task 'copa'"),
    "bad baseline": ("eval_meta_data.csv", "Eval Task,Random baseline\ncopa,half\n", "eval_meta_data.csv, line 2"),
    "wrong columns": ("eval_meta_data.csv", "a,b\n1,2\n", "eval_meta_data.csv, line 2"),
    "impossible baseline": ("eval_meta_data.csv", "Eval Task,Random baseline\ncopa,100\n", "line 2: it needs"),
    "not json": ("eval_data/some/schema.jsonl", '{"a": 1\n', "schema.jsonl, line 1"),
    "no object": ("eval_data/some/schema.jsonl", "[]\n", "schema.jsonl, line 1: it must be a JSON object"),
    "no gold": ("eval_data/some/multiple_choice.jsonl", '{"query": "a", "choices": ["b"]}', "line 1: 'gold' must"),
    "gold too large": (
        "eval_data/some/multiple_choice.jsonl", '\n{"query": "a", "choices": ["b"], "gold": 1}', "line 2: 'gold' must"
    ),
    "no choices": ("eval_data/some/multiple_choice.jsonl", '{"query": "a", "choices": []}', "'choices' must be a list"),
    "blank": ("eval_data/some/language_modeling.jsonl", '{"context": "a", "continuation": " "}', "is blank"),
    "few": (
        "eval_data/some/language_modeling.jsonl", '{"context": "a", "continuation": "b"}\n' * 2, "shows 2 solved"
    ),
    "not text": ("eval_data/some/schema.jsonl", "\udcff", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_line(made: Path, name: str):
    file, content, expected = BROKEN[name]
    (made / file).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError) as error:
        read_tasks(made)
    assert expected in str(error.value)
    assert str(made) in str(error.value)
    assert "\n" not in str(error.value)


def test_tasks_stay_inside_the_bundle(made: Path):
    text = (made / "core.yaml").read_text()
    (made / "core.yaml").write_text(text.replace("some/schema.jsonl", "../../../etc/passwd"))
    with pytest.raises(DataError, match="outside of the bundle"):
        read_tasks(made)
    (made / "eval_data/some/schema.jsonl").unlink()
    (made / "core.yaml").write_text(text)
    with pytest.raises(DataError, match=r"schema\.jsonl cannot be read"):
        read_tasks(made)
    with pytest.raises(DataError, match="is no CORE bundle"):
        open_bundle(str(made / "absent"))
    with pytest.raises(DataError, match=r"no core\.yaml"):
        open_bundle(str(made / "eval_data"))


# Commands and training -------------------------------------------------------------------------------------------


def test_training_measures_core_and_learns_the_same(tiny: Config, made: Path, tmp_path: Path):
    changed = {"core_every": 5, "core_bundle": str(made), "core_max_per_task": 4}
    runs = [
        train(replace(tiny, eval=replace(tiny.eval, **settings)), tmp_path / name)
        for name, settings in (("without", {}), ("with", changed))
    ]
    plain, measured = (read_jsonl(run.metrics) for run in runs)
    assert [record["step"] for record in measured if "val/core" in record] == [5, 10, 12]
    assert not any("val/core" in record for record in plain)
    assert [r["train/loss"] for r in plain] == [r["train/loss"] for r in measured]
    result = evaluate_core(GPTScorer(runs[1].load_model(), runs[1].tokenizer()), read_tasks(made), 4)
    assert measured[-1]["val/core"] == pytest.approx(result.core)
    names = {"copa", "winograd", "squad"}
    for task in result.tasks:
        assert measured[-1][f"core/{task.label}"] == task.accuracy
        assert measured[-1][f"core/{task.label}/centered"] == pytest.approx(task.centered)
    ours = {name for name in measured[-1] if name.startswith("core/")}
    assert ours == {f"core/{name}" for name in names} | {f"core/{name}/centered" for name in names}


def test_training_measures_the_better_weights(tiny: Config, made: Path, tmp_path: Path, monkeypatch):
    """The scorer keeps copies of weights: they must be those of the average, not of the last step."""
    measured: list[torch.Tensor] = []
    tokens, wanted = torch.arange(20)[None], torch.tensor([[0, at, 65] for at in range(20)])

    def evaluate(scorer: Scorer, *others, **shared):
        measured.append(scorer.score(tokens, wanted, None, [0])[0])
        return evaluate_core(scorer, *others, **shared)

    monkeypatch.setattr(evaluator, "evaluate_core", evaluate)
    settings = {"core_every": 5, "core_bundle": str(made), "core_max_per_task": 1}
    config = replace(tiny, optim=replace(tiny.optim, ema=0.9), data=replace(tiny.data, val_fraction=0.0))
    run = train(replace(config, eval=replace(config.eval, **settings)), tmp_path / "run")
    assert read_jsonl(run.metrics)[-1]["val/weights"] == "average"
    expected = GPTScorer(run.load_model(), run.tokenizer()).score(tokens, wanted, None, [0])[0]
    assert torch.equal(measured[-1], expected)


def test_training_without_a_bundle(tiny: Config, cache: Path, tmp_path: Path, capsys, monkeypatch):
    """Offline the usual one cannot be fetched: training says so and goes on; one that is named must be there."""
    settings = {**TINY, "eval.core_every": 5, "train.device": "cpu", "data.paths": tiny.data.paths[0]}
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/bundle.zip"
        monkeypatch.setattr(bundle, "DEFAULT_BUNDLE", url)
        monkeypatch.setattr(_Downloader, "_wait", lambda *_: pytest.fail("it waited"))
        assert main(["train", "--out", str(tmp_path / "run"), *options]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CORE ")]
        assert len(said) == 1
        assert said[0].startswith(f"CORE      is not measured: {url} cannot be fetched")
        assert not any("core" in name for record in read_jsonl(tmp_path / "run/metrics.jsonl") for name in record)
        assert main(["train", "--out", str(tmp_path / "named"), *options, "--eval.core_bundle", url]) == 1
    assert "cannot be fetched" in capsys.readouterr().err
    assert not (tmp_path / "named/metrics.jsonl").exists()


def test_training_fetches_the_usual_bundle(tiny: Config, server: str, made: Path, cache: Path, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "DEFAULT_BUNDLE", f"{server}/bundle.zip")
    config = replace(tiny, eval=replace(tiny.eval, core_every=5, core_max_per_task=4))
    run = train(config, tmp_path / "run")
    result = evaluate_core(GPTScorer(run.load_model(), run.tokenizer()), read_tasks(made), 4)
    assert read_jsonl(run.metrics)[-1]["val/core"] == pytest.approx(result.core)


def test_the_command(tiny: Config, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = str(train(tiny, tmp_path / "run").folder)
    table = tmp_path / "numbers.csv"
    arguments = ["eval", run, "--core", str(made), "--max-per-task", "3", "--csv", str(table)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "CORE (3 of 22 tasks)" in printed
    assert "not CORE but a part of it" in printed
    with open(table, newline="") as lines:
        rows = {row["measure"]: row for row in csv.DictReader(lines)}
    assert {"val_loss", "copa", "winograd", "squad", "CORE (3 of 22 tasks)"} <= rows.keys()
    assert rows["squad"]["examples"] == "3"
    assert main([*arguments, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["core"]["tasks"]["copa"]["accuracy"] == float(rows["copa"]["value"])
    assert numbers["core"]["core"] == float(rows["CORE (3 of 22 tasks)"]["centered"])
    assert main(["eval", run, run, "--batches", "2", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert {"train_loss_estimate", "val_loss_estimate"} <= json.loads(lines[0]).keys()
    assert main(["eval", run, run]) == 0
    assert capsys.readouterr().out.count(run) == 2


def test_the_command_without_a_bundle_names_the_url(tiny: Config, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(bundle, "DEFAULT_BUNDLE", "http://example.com/default.zip")
    for arguments in (["eval", "RUN", "--core"], ["eval", "RUN", "--core", "--json"]):
        assert main(arguments) == 1
        assert capsys.readouterr().err.startswith("pretrain: http://example.com/default.zip: only https")
    assert main(["eval", "hf:/nowhere", "--data", "x.txt"]) == 1
    assert "no model there" in capsys.readouterr().err
