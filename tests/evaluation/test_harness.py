"""Tasks of lm-eval: ours against its own ``hf`` loader on the export of the same run, on tasks made here."""

import csv
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TINY

from pretrain.cli import main
from pretrain.config import load_config
from pretrain.errors import DataError, UsageError
from pretrain.hf.export import export_run
from pretrain.io import read_jsonl
from pretrain.runs import Run
from pretrain.training import train

pytest.importorskip("lm_eval")

WHO = ["Ada", "Noël", "the fox", "王さん", "a child"]
TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{who}} sees"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
num_fewshot: 2
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
""",
    "begin": """
output_type: loglikelihood
doc_to_text: ""
doc_to_target: "{{who}} hears"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "write": """
output_type: generate_until
doc_to_text: "{{text}} {{who}}"
doc_to_target: "{{who}}"
generation_kwargs: {until: [".", "ll"], max_gen_toks: 12}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]
  - name: whole
    filter: [{function: take_first}]
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four tasks with their data."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(1)
    docs = []
    for _ in range(20):
        choices = [f" {each}." for each in draw.sample(WHO, 3)]
        text = " ".join(f"{draw.choice(WHO)} calls {draw.choice(WHO)}." for _ in range(draw.randint(1, 9)))
        docs.append({"who": draw.choice(WHO), "choices": choices, "label": draw.randrange(3), "text": text})
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'docs.jsonl'}}}}}\ntest_split: test\n"
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: tiny_{name}\n{data}{text}")
    (folder / "gone.yaml").write_text(f"task: tiny_gone\n{data.replace('docs.jsonl', 'none.jsonl')}{TASKS['read']}")
    return folder


GPT2 = {
    "tokenizer.kind": "bpe",
    "tokenizer.vocab_size": 300,
    "model.position": "learned",
    "model.norm": "layernorm",
    "model.mlp": "gelu_tanh",
    "model.qk_norm": False,
    "model.embedding_norm": False,
    "model.logit_softcap": 0.0,
    "model.tied_head": True,
}
SHAPES = {"ours": {"tokenizer.kind": "byte"}, "gpt2": GPT2}  # ours is exported with its code


@pytest.fixture(autouse=True)
def _few_tasks(monkeypatch: pytest.MonkeyPatch):
    """Of lm-eval's 14,000 tasks, only those of arc: to list them all takes 10 s."""
    from lm_eval.tasks._index import TaskIndex

    files = TaskIndex._iter_yaml_files
    few = staticmethod(lambda root: files(root / "arc" if root.parent.name == "lm_eval" else root))
    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", few)


@pytest.fixture(scope="module", params=SHAPES)
def run(request: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    overrides = {**TINY, "data.paths": [str(text_file)], "train.steps": 40, "model.context_length": 64}
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return train(load_config("quickstart", **overrides | SHAPES[request.param]), folder)


def instances(kind: str, arguments: list[tuple]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def hf_loader(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm-eval's own loader of the run's export."""
    pytest.importorskip("accelerate", reason="lm-eval's hf loader needs it")
    from lm_eval.models import huggingface

    folder = tmp_path_factory.mktemp("export") / "model"
    export_run(run, "hf", folder)
    # Its cache of logits (0.4.13) confuses continuations of different lengths that end the same text.
    loader: Any = huggingface.HFLM
    return loader(pretrained=str(folder), device="cpu", trust_remote_code=True, batch_size=3, logits_cache=False)


def test_each_answer_is_that_of_the_hf_loader_on_the_export(run: Run, hf_loader: Any, text_file: Path):
    from pretrain.evaluation import GPTScorer
    from pretrain.evaluation.harness import Harness

    text, draw = text_file.read_text(encoding="utf-8"), random.Random(0)
    pieces = [text[start : start + draw.randint(2, 150)] for start in draw.sample(range(len(text) - 200), 30)]
    pairs = [(piece, " " + who) for piece in pieces for who in WHO]  # of the same context, some longer than the model's
    pairs += [(piece + "  ", "x") for piece in pieces] + [("", piece[:20]) for piece in pieces]
    pairs += [(piece[:9], piece[9:30]) for piece in pieces if len(piece) > 9]  # cut in the middle of words
    words = [piece.rpartition(" ")[0] for piece in pieces]
    pairs += [(piece, " ") for piece in words if piece.strip()]  # a token, which may be the likeliest
    pairs += [("<|endoftext|>", " a child"), ("", "  a")]
    ours = Harness(GPTScorer(run.load_model(), run.tokenizer()))
    found = ours.loglikelihood(instances("loglikelihood", pairs))
    wanted = hf_loader.loglikelihood(instances("loglikelihood", pairs))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-5, abs=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert len({greedy for _, greedy in found}) == 2
    [(score, _)] = ours.loglikelihood(instances("loglikelihood", [("  ", "a")]))  # the hf loader stops at this
    assert score == pytest.approx(found[-1][0], rel=1e-5)

    whole = [(piece,) for piece in [*pieces, text[:900], ""]]
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", whole))
    wanted = hf_loader.loglikelihood_rolling(instances("loglikelihood_rolling", whole))
    assert found == pytest.approx(wanted, rel=1e-5)

    asked = [(piece, {"until": [".", "ee"], "max_gen_toks": 20}) for piece in pieces[:15]]
    asked += [
        (piece, {"until": "\n", "do_sample": False, "temperature": 0.7, "max_gen_toks": 9}) for piece in pieces[15:]
    ]
    found = ours.generate_until(instances("generate_until", asked))
    assert found == hf_loader.generate_until(instances("generate_until", asked))
    assert len(set(found)) > 3
    with pytest.raises(UsageError, match="num_beams"):
        ours.generate_until(instances("generate_until", [("a", {"num_beams": 2})]))
    with pytest.raises(DataError, match=r"65 tokens after its context.*context of 64"):
        ours._loglikelihood_tokens([(("a", "b"), [1], [2] * 65)])


@pytest.mark.parametrize("run", ["gpt2"], indirect=True)
def test_tasks_of_ones_own_by_the_command(run: Run, tasks: Path, tmp_path: Path, capsys):
    names = ",".join(f"tiny_{name}" for name in TASKS)
    command = ["eval", str(run.folder), "--tasks", names, "--tasks-dir", str(tasks)]
    assert main([*command, "--json", "--max-per-task", "12", "--num-fewshot", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    scores = result["tasks"]
    assert result["val_loss"] > 0
    assert [score["examples"] for score in scores.values()] == [12] * 4
    assert [score["num_fewshot"] for score in scores.values()] == [1] * 4
    assert set(scores["tiny_write"]["metrics"]) == {"exact_match,strict", "exact_match,whole"}
    accuracy = scores["tiny_choose"]["metrics"]["acc"]
    assert accuracy["stderr"] == pytest.approx((accuracy["value"] * (1 - accuracy["value"]) / 11) ** 0.5)
    stored = read_jsonl(run.folder / "tasks.jsonl")[-1]
    assert (stored["step"], stored["max_per_task"], stored["tasks"]) == (40, 12, scores)

    # Bits per byte of the texts, from the log-probabilities of their tokens: no text is longer than the context here.
    docs = [json.loads(line)["text"] for line in (tasks / "docs.jsonl").read_text().splitlines()]
    model, tokenizer, nats = run.load_model(), run.tokenizer(), 0.0
    short = [doc for doc in docs if len(tokenizer.encode(doc)) <= 64]
    (tasks / "docs.jsonl").rename(tmp_path / "all")
    (tasks / "docs.jsonl").write_text("".join(json.dumps({"text": doc}) + "\n" for doc in short))
    for doc in short:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(doc)]])
        nats -= model(ids[:, :-1]).double().log_softmax(-1).gather(2, ids[:, 1:, None]).sum().item()
    table = tmp_path / "numbers.csv"
    try:
        assert main([*command[:3], "tiny_read", *command[4:], "--csv", str(table)]) == 0
    finally:
        (tmp_path / "all").replace(tasks / "docs.jsonl")
    rows = {row["measure"]: row for row in csv.DictReader(table.open())}
    bits = nats / math.log(2) / sum(len(doc.encode()) for doc in short)
    assert float(rows["tiny_read/bits_per_byte"]["value"]) == pytest.approx(bits, rel=1e-5)
    assert int(rows["tiny_read/bits_per_byte"]["examples"]) == len(short) > 3
    assert re.search(rf"tiny_read +bits_per_byte +{len(short)} +{bits:.4f}", capsys.readouterr().out)


@pytest.mark.parametrize("run", ["gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "tiny_chose"], 2, "no task 'tiny_chose'; did you mean 'tiny_choose'?"),
        (["--tasks", "tiny_gone"], 1, "tiny_gone: the data cannot be loaded (FileNotFoundError"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    run: Run, tasks: Path, capsys, arguments: list, code: int, message: str
):
    capsys.readouterr()
    assert main(["eval", str(run.folder), "--tasks-dir", str(tasks), *arguments]) == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("pretrain: ")
    assert message in last
