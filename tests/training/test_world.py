"""Several processes that train together, started by torchrun as users start them: real gloo groups on this machine."""

import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.evaluation.test_core import write_bundle
from tests.training.test_loop import change, learned, weights
from tests.training.test_validation import EVALS

from pretrain.cli import main
from pretrain.config import Config, GroupConfig, load_config
from pretrain.fitting import END_SECONDS
from pretrain.io import read_jsonl
from pretrain.runs import Run
from pretrain.runs.checkpoint import checkpoints
from pretrain.training import train

pytestmark = pytest.mark.slow

LAUNCH = """
import sys
from pathlib import Path
import pretrain.training.step as step_module
from pretrain.config import *
from pretrain.errors import PretrainError
from pretrain.training import Console, train
{prelude}
try:
    train({config!r}, {out!r}, Console())
except PretrainError as error:
    print(error, file=sys.stderr)
    raise SystemExit(error.exit_code)
"""


def start(config: Config, out: Path, processes: int, prelude: str = "", options: tuple[str, ...] = ()):
    script = out.parent / f"{out.name}-{processes}.py"
    script.write_text(LAUNCH.format(config=config, out=str(out), prelude=prelude))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}"]
    command += [f"--master-port={port}", "--master-addr=127.0.0.1", *options, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_ADDR2LINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_together(config: Config, out: Path, processes: int, prelude: str = "", options: tuple[str, ...] = ()) -> Run:
    process = start(config, out, processes, prelude, options)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    return Run.open(out)


def losses(run: Run) -> list[float]:
    return [record["train/loss"] for record in learned(run)]


def assert_near(run: Run, other: Run) -> None:
    """The same losses, norms and validation, but for rounding."""
    mine, theirs = learned(run), learned(other)
    assert [r["step"] for r in mine] == [r["step"] for r in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        measured = (
            "val/loss",
            "val/bpb",
            "val/part_loss",
            "val/average_loss",
            "train/eval_loss",
            "test/loss",
            "test/bpb",
        )
        for name in ("train/loss", "train/grad_norm", *measured):
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=1e-5 if name != "train/grad_norm" else 2e-4), (a, b)


@pytest.fixture(scope="module")
def base(tmp_path_factory, text_file: Path) -> Config:
    from tests.conftest import TINY

    from pretrain.config import load_config

    return load_config("quickstart", **{**TINY, "data.paths": [str(text_file)], "sample.max_tokens": 4})


def several_documents(folder: Path, text: Path) -> Path:
    """The lines of a text as documents of four files."""
    lines = text.read_text(encoding="utf-8").splitlines()
    (folder / "documents").mkdir()
    for number in range(4):
        rows = [json.dumps({"text": line}) for line in lines[number::4]]
        (folder / "documents" / f"{number}.jsonl").write_text("\n".join(rows))
    return folder / "documents"


NANOCHAT = {
    "optim__weight_decay": 0.1,
    "optim__cautious": True,
    "optim__nanochat_decay": True,
    "optim__row_equilibration": True,
    "optim__renormalize": True,
    "optim__normuon_beta2": 0.9,
    "optim__groups": {"head": GroupConfig(betas=(0.8, 0.96), weight_decay=0.01), "stream_scale": GroupConfig(lr=0.005)},
}
CASES = {
    "ddp, muon, accumulation": (2, {"parallel__kind": "ddp", "train__micro_batch": 2}),
    "fsdp, muon": (2, {"parallel__kind": "fsdp"}),
    "ddp, all that is measured": (
        2,
        {"parallel__kind": "ddp", **EVALS, "eval__train_tokens": 9 * 32, "data__test_fraction": 0.1},
    ),
    "fsdp, adamw, accumulation": (2, {"parallel__kind": "fsdp", "optim__kind": "adamw", "train__micro_batch": 2}),
    "fsdp, uneven everything": (
        3,  # 8 rows and 2 layers of odd shapes over 3 processes; cautious decay, value embeddings, tied head
        {
            "parallel__kind": "fsdp",
            "optim__weight_decay": 0.1,
            "optim__cautious": True,
            "model__value_embeddings": True,
            "model__tied_head": True,
            "model__mlp_width": 50,
        },
    ),
    "ddp, nanochat's optimizer": (2, {"parallel__kind": "ddp", **NANOCHAT}),
    "fsdp, nanochat's optimizer": (3, {"parallel__kind": "fsdp", "model__mlp_width": 50, **NANOCHAT}),
    "ddp, a live stream": (2, {"parallel__kind": "ddp", "data__stream": True, "data__split": "hash"}),
    "ddp, an average": (2, {"parallel__kind": "ddp", "optim__ema": 0.9, "eval__calibrate": True}),
    "fsdp, an average": (
        2,
        {"parallel__kind": "fsdp", "optim__ema": 0.9, "parallel__reshard": False, "eval__calibrate": True},
    ),
    "hsdp": (4, {"parallel__kind": "hsdp"}),
    "hsdp, nanochat's optimizer": (4, {"parallel__kind": "hsdp", **NANOCHAT}),
}


@pytest.mark.parametrize("name", CASES)
def test_several_processes_learn_what_one_does(base: Config, tmp_path: Path, name: str):
    processes, fields = CASES[name]
    config = change(base, **fields)
    if config.data.stream:
        config = change(config, data__paths=(str(several_documents(tmp_path, Path(base.data.paths[0]))),))
    alone = train(config, tmp_path / "alone")
    # hsdp: as on two machines of two processes each
    prelude = 'import os; os.environ["LOCAL_WORLD_SIZE"] = "2"' if "hsdp" in name else ""
    together = run_together(config, tmp_path / "together", processes, prelude)
    assert_near(together, alone)
    assert len(read_jsonl(together.samples)) == len(read_jsonl(alone.samples))
    assert [c.step for c in checkpoints(together.checkpoints)] == [c.step for c in checkpoints(alone.checkpoints)]


COUNTED_MEMORY = """
import os
import pretrain.training.loop, pretrain.training.setup, pretrain.training.step as step
pretrain.training.loop.ENLARGING_FLOPS, pretrain.training.setup.rows_that_fit = 0, lambda *_: 1
step.passing_memory, step.free_memory = lambda _: 10, lambda _: 30 if os.environ["RANK"] == "1" else 1000
"""
"""A row takes 10 bytes; rank 1 has memory for 2 of them, rank 0 for all."""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_enlarge_the_micro_batch_to_what_fits_in_all(base: Config, tmp_path: Path, kind: str):
    config = change(base, parallel__kind=kind)
    run = run_together(config, tmp_path / "together", 2, COUNTED_MEMORY)
    assert_near(run, train(config, tmp_path / "alone"))
    (event,) = read_jsonl(run.folder / "events.jsonl")
    assert event["text"] == "memory allows micro-batches of 2 rows instead of 1; the global batch is unchanged"
    assert run.checkpoint(12).state["micro_rows"] == 2


@pytest.mark.parametrize("kinds", [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_checkpoint_goes_on_in_another_number_of_processes(base: Config, tmp_path: Path, kinds: tuple[str, str]):
    """Saved by 2, resumed by 1 and by 3, from one kind to the other."""
    before, after = kinds
    base = change(base, **NANOCHAT)  # of whose state each process has some matrices
    alone = train(base, tmp_path / "alone")
    run = run_together(change(base, parallel__kind=before), tmp_path / "two", 2)
    shutil.rmtree(run.checkpoint(12).folder)
    run.reopen()
    shutil.copytree(run.folder, tmp_path / "one")
    assert_near(run_together(change(base, parallel__kind=after), tmp_path / "two", 3), alone)
    assert_near(train(base, tmp_path / "one"), alone)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_average_and_the_best_of_several_processes(base: Config, tmp_path: Path, kind: str, capsys):
    """A run that overfits leaves its best, measured as by one process; after a resume every bit is the same."""
    (tmp_path / "noise.txt").write_text("".join(random.Random(5).choices("abcdefghijklmnopqrstuvwxyz012345", k=600)))
    config = change(
        base, data__paths=(str(tmp_path / "noise.txt"),), data__val_fraction=0.2, train__steps=34, eval__every=5,
        eval__tokens=64, checkpoint__keep_best=True, checkpoint__every=17, optim__lr=0.2, optim__embedding_lr=0.1,
        optim__head_lr=0.1, schedule__kind="constant", train__batch_tokens=128, optim__ema=0.8, parallel__kind=kind,
    )  # fmt: skip
    run = run_together(config, tmp_path / "run", 2)
    plain = train(change(config, train__steps=1), tmp_path / "plain")

    def saved(run: Run) -> dict[str, torch.Tensor]:
        names = {name: t for name, t in weights(plain.newest_checkpoint()).items() if "random" not in name}
        whole = {name: torch.full_like(t, math.nan) for name, t in names.items()}
        run.newest_checkpoint().load(whole)
        return whole

    before, first = saved(run), run.summary
    assert first is not None
    assert first["model_step"] < 34
    for options, loss in (([], "val_loss"), (["--step", "34"], "last_val_loss")):
        capsys.readouterr()
        assert main(["eval", str(run.folder), "--json", *options]) == 0
        assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(first[loss], rel=1e-5)
    shutil.rmtree(run.checkpoint(34).folder)
    run.reopen()
    after = saved(run_together(config, run.folder, 2))
    assert sum(name.startswith("ema.") for name in before) == sum(name.startswith("model.") for name in before) > 0
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert run.summary is not None
    assert all(run.summary[name] == first[name] for name in first if name not in ("seconds", "tokens_per_second"))


MEASURED = """
import os
import pretrain.training.start as start_module
from pretrain.sizing import Speed
measure = start_module.measure_training
def made_up(*arguments):
    measure(*arguments)  # all of them do, and exchange gradients
    return Speed(5.0, 0.0, 0.0), 1
start_module.measure_training = made_up
start_module.seconds_left = lambda config, started: 60 * config.train.minutes + 100 * int(os.environ["RANK"])
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_fits_is_chosen_once_for_all(text_file: Path, tmp_path: Path, kind: str):
    """The time that is left is rank 0's, and the run goes on with what was chosen."""
    given = {"data.paths": [str(text_file)], "train.minutes": 1, "parallel.kind": kind, "train.precision": "fp32"}
    given |= {"model.layers": 1, "model.width": 32, "sample.max_tokens": 0, "log.backends": ["none"]}
    config = load_config("fit", **given)
    run = run_together(config, tmp_path / "run", 2, MEASURED)
    assert run.config.train.steps == int((60 - END_SECONDS) // 5)
    assert set(run.config.fit.chosen) == set(config.fit.fields)
    again = run_together(config, tmp_path / "run", 2, "import pretrain.training.start as s; del s.measure_training")
    assert again.config == run.config


def test_moved_text_is_found_by_all(base: Config, tmp_path: Path):
    """Rank 0 finds that it is the same; all read the stream at its new place, or stop if it is another."""
    moves = {"data__stream": True, "data__split": "hash", "parallel__kind": "ddp", "train__steps": 6}
    documents = several_documents(tmp_path, Path(base.data.paths[0]))
    run = run_together(change(base, data__paths=(str(documents),), **moves), tmp_path / "run", 2)
    moved, other = tmp_path / "moved", tmp_path / "other"
    documents.rename(moved)
    shutil.copytree(moved, other)
    (other / "0.jsonl").write_text((other / "1.jsonl").read_text())
    process = start(change(base, data__paths=(str(other),), **moves), run.folder, 2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert errors.count("another configuration (data.paths") == 1
    longer = run_together(change(base, data__paths=(str(moved),), **{**moves, "train__steps": 8}), run.folder, 2)
    assert longer.config.data.paths == (str(moved),)
    assert [record["step"] for record in learned(longer)] == list(range(1, 9))


def test_a_killed_process_and_torchrun_starts_them_all_again(base: Config, tmp_path: Path):
    """Killed when it has written its part of the second checkpoint, which the others therefore never commit."""
    config = change(base, parallel__kind="ddp", checkpoint__keep_last=0)
    die_once = f"""
import os, signal
import pretrain.runs.checkpoint as module
write = module._write_tensors
def dying(file, *rest):
    digest = write(file, *rest)
    mark = Path({str(tmp_path / "died")!r})
    if file.name == "shard-00002.safetensors" and "00000008" in str(file) and not mark.exists():
        mark.write_text(" ".join(path.name for path in file.parent.parent.iterdir()))
        os.kill(os.getpid(), signal.SIGKILL)
    return digest
module._write_tensors = dying
"""
    run = run_together(config, tmp_path / "run", 2, die_once, ("--max-restarts=2",))
    assert set((tmp_path / "died").read_text().split()) == {"step-00000004", "step-00000008.tmp"}
    assert {path.name for path in run.checkpoints.iterdir()} == {f"step-{step:08d}" for step in (4, 8, 12)}
    assert_near(run, train(base, tmp_path / "alone"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hanging_process_is_named(rank: int, base: Config, tmp_path: Path):
    config = change(base, parallel__timeout_seconds=6.0, guard__grace_seconds=2.0)
    hang = f"""
import time
step = step_module.train_step
def hanging(state, *hooks):
    if state.progress.step == 5 and state.world.rank == {rank}:
        time.sleep(1000)
    return step(state, *hooks)
step_module.train_step = hanging
"""
    process = start(config, tmp_path / "run", 2, hang)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"waiting for other processes failed: rank {rank} on " in errors
    assert "last seen waiting for data after step 5" in errors
    # And before the others give up, by one that does not hang: where they may not be able to say it themselves (NCCL).
    warned = [line for line in (printed + errors).splitlines() if "no progress for" in line]
    assert all(f"; rank {rank} on " in line for line in warned)
    assert sum(line.startswith("pretrain: rank 1: ") for line in warned) == (rank == 0)
    assert len(warned) >= 1


def test_a_nan_on_one_rank_skips_the_step_on_all(base: Config, tmp_path: Path):
    config = change(base, parallel__kind="ddp")
    poison = """
from pretrain.model import GPT
import torch
forward, calls = GPT.forward, []
def poisoned(model, *args, **kwargs):
    result = forward(model, *args, **kwargs)
    if torch.is_grad_enabled():
        calls.append(1)
        import os
        if len(calls) == 4 and os.environ["RANK"] == "1":
            return result * torch.nan
    return result
GPT.forward = poisoned
"""
    run = run_together(config, tmp_path / "run", 2, poison)
    assert [r["step"] for r in learned(run) if r["train/skipped"]] == [4]
    (event,) = read_jsonl(run.events)
    assert (event["event"], event["step"]) == ("skipped", 4)


FULL_AT_FIRST = """
import errno, os
from {module} import {owner} as owner
work, calls = owner.{name}, []
def full(*args):
    calls.append(1)
    if {condition}:
        raise OSError(errno.ENOSPC, "No space left on device")
    return work(*args)
owner.{name} = full
"""


@pytest.mark.parametrize(
    ("module", "owner", "name", "condition"),
    [
        ("pretrain.runs", "checkpoint", "_write_tensors", "os.environ['RANK'] == '1' and len(calls) == 1"),
        ("pretrain.training.callbacks", "RunFiles", "on_save", "args[1] == 4"),
    ],
)
def test_a_save_that_fails_on_one_fails_on_all(
    base: Config, tmp_path: Path, module: str, owner: str, name: str, condition: str
):
    """None of them waits for a commit that does not come."""
    full = FULL_AT_FIRST.format(module=module, owner=owner, name=name, condition=condition)
    run = run_together(change(base, checkpoint__keep_last=0), tmp_path / "run", 2, full)
    assert [c.step for c in checkpoints(run.checkpoints)] == [8, 12]
    assert [event["event"] for event in read_jsonl(run.events)] == ["save_failed"]


def test_processes_that_disagree_are_named(base: Config, tmp_path: Path):
    disagree = """
import os, dataclasses
if os.environ["RANK"] == "1":
    from pretrain.runs import Run
    from pretrain.training.world import World
    run_on_rank0 = World.run_on_rank0
    def other(world, work):
        run = run_on_rank0(world, work)
        if isinstance(run, Run):
            run = Run(run.folder, dataclasses.replace(run.config, eval=EvalConfig(every=3)))
        return run
    World.run_on_rank0 = other
"""
    process = start(base, tmp_path / "run", 2, disagree)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the processes disagree on the configuration: rank 0 has " in errors
    assert "(different from rank 0: 1)" in errors


def test_one_signal_stops_all_and_saves(base: Config, tmp_path: Path):
    config = change(base, train__steps=2000, checkpoint__every=0, eval__every=500, parallel__kind="fsdp")
    process = start(config, tmp_path / "run", 2)
    deadline = time.monotonic() + 120
    while len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to its processes
    output, errors = process.communicate(timeout=60)
    done = len(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert f"stopped after step {done} of 2000, all saved" in output + errors
    assert [c.step for c in checkpoints(tmp_path / "run" / "checkpoints")] == [done]


def test_the_end_waits_for_a_copy_only_while_every_process_may(base: Config, tmp_path: Path):
    """After a signal to rank 1 alone, of which rank 0, which copies, knows no more than that there was one."""
    slow = """
import os, signal, time
from pretrain.runs.copy import RunCopy
put, step = RunCopy._put, step_module.train_step
def slowly(copy, folder, name):
    time.sleep(60 * ("step-" in name))
    put(copy, folder, name)
def signalled(state, *hooks):
    if state.progress.step == 5 and state.world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(state, *hooks)
RunCopy._put, step_module.train_step = slowly, signalled
"""
    config = change(base, parallel__kind="ddp", checkpoint__copy_to=str(tmp_path / "copy"), guard__grace_seconds=8.0)
    process = start(config, tmp_path / "run", 2, slow)
    output, errors = process.communicate(timeout=120)
    assert "of 12, all saved here, but not all is copied" in output + errors
    assert "not saved within" not in output + errors


@pytest.mark.parametrize("behind", [0, 1])
def test_a_signal_is_noticed_at_the_next_step(base: Config, tmp_path: Path, behind: int):
    """To one process, in step 6 of 12; numbers fetched every 50 steps and, ``behind``, a step later, as on GPUs."""
    late = f"""
import os, signal
from collections import deque
from pretrain.training.loop import Trainer
made, step = Trainer.__post_init__, step_module.train_step
def later(trainer):
    made(trainer)
    trainer.fetch_every, trainer.asked = 50, deque(maxlen=1 + {behind})
def signalled(state, *hooks):
    if state.progress.step == 5 and state.world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(state, *hooks)
Trainer.__post_init__, step_module.train_step = later, signalled
"""
    process = start(change(base, parallel__kind="ddp", eval__every=0), tmp_path / "run", 2, late)
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"stopped after step {6 + behind} of 12, all saved" in output + errors
    run = Run.open(tmp_path / "run")
    assert [c.step for c in checkpoints(run.checkpoints)] == [4, 6 + behind]
    assert_near(
        run_together(change(base, parallel__kind="ddp", eval__every=0), run.folder, 2),
        train(change(base, eval__every=0), tmp_path / "alone"),
    )


NOTED = """
import os, resource
import torch.distributed as dist
import pretrain.runs.checkpoint as module
def note(what, value):
    with open(Path({folder!r}, what + os.environ["RANK"]), "a") as out:
        out.write(f"{{value}}\\n")
save, sha256, new_group = module.CheckpointWriter.save, module.sha256_of, dist.new_group
def noted_save(writer, step, tensors, *rest):
    save(writer, step, tensors, *rest)
    copied, held = (sum(tensor.nbytes for tensor in each.values()) for each in (writer._copies, tensors))
    note("copied", copied / held)
def noted_sha256(file):
    note("hashed", f"{{file.parent.name[:13]}} {{file.name}}")
    return sha256(file)
def noted_group(*args, **options):
    note("groups", options)
    return new_group(*args, **options)
module.CheckpointWriter.save, module.sha256_of, dist.new_group = noted_save, noted_sha256, noted_group
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 250))
"""


@pytest.mark.parametrize(("kind", "processes"), [("ddp", 2), ("hsdp", 4)])
def test_each_process_saves_hashes_and_verifies_only_its_share(base: Config, tmp_path: Path, kind: str, processes: int):
    """And what they saved goes on as if nothing had happened, from the one before where one file is damaged."""
    prelude = NOTED.format(folder=str(tmp_path))
    prelude += 'os.environ["LOCAL_WORLD_SIZE"] = "2"\n'  # hsdp: as on two machines

    def noted(what: str) -> list[list[str]]:
        files = [tmp_path / f"{what}{rank}" for rank in range(processes)]
        values = [file.read_text().splitlines() for file in files]
        for file in files:
            file.unlink()
        return values

    config = change(base, parallel__kind=kind, checkpoint__keep_last=0, **NANOCHAT)
    run = run_together(config, tmp_path / "run", processes, prelude)
    assert all(float(copied) < 0.6 for each in noted("copied") for copied in each)
    assert [len(each) for each in noted("groups")] == [1] * processes
    shards = [f"shard-{rank + 1:05d}.safetensors" for rank in range(processes)]
    for rank, hashed in enumerate(noted("hashed")):
        states = ["state.json"] if rank == 0 else []
        names = [f"step-{step:08d} {name}" for step in (4, 8, 12) for name in [shards[rank], *states]]
        assert hashed == names
    run.reopen()
    last = run.checkpoint(12).folder / shards[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"?")
    process = start(config, run.folder, processes, prelude)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    assert (output + errors).count("skipping damaged checkpoint step-00000012") == 1
    assert errors.count(f"may need {256 + 4 * processes} open files") == 1
    assert errors.count(f"ulimit -n {256 + 4 * processes}") == 1
    verified = [line for each in noted("hashed") for line in each if not line.endswith("COMMIT")]
    # Each by one process; then step 12 is saved again.
    expected = [f"step-{step:08d} {name}" for step in (12, 8, 12) for name in [*shards, "state.json"]]
    assert sorted(verified) == sorted(expected)
    assert_near(run, train(config, tmp_path / "alone"))


def test_processes_share_the_questions_of_core_and_one_may_take_longer(base: Config, tmp_path: Path):
    """Than processes wait for each other in training; each question is answered by one, with the same result."""
    bundle = write_bundle(tmp_path / "bundle")
    core = {"eval__core_every": 12, "eval__core_bundle": str(bundle), "checkpoint__every": 0}
    config = change(base, parallel__kind="ddp", parallel__timeout_seconds=5.0, **core)
    slow = f"""
import os, time
import pretrain.evaluation.core as core_module
ask, slow_once = core_module.prepare_questions, [0] * 100 + [1]
def counted(scorer, task, indices):
    with open(Path({str(tmp_path)!r}, "asked-" + os.environ["RANK"]), "a") as asked:
        asked.writelines(f"{{task.label}} {{index}}\\n" for index in indices)
    if os.environ["RANK"] == "1" and slow_once.pop():
        time.sleep(8)
    return ask(scorer, task, indices)
core_module.prepare_questions = counted
"""
    run = run_together(config, tmp_path / "run", 2, slow)
    asked = [(tmp_path / f"asked-{rank}").read_text().splitlines() for rank in range(2)]
    alone = train(change(base, **core), tmp_path / "alone")
    names = [name for name in learned(alone)[-1] if name.startswith("core/")]
    assert names
    assert [learned(run)[-1][name] for name in names] == [learned(alone)[-1][name] for name in names]
    assert len(set(asked[0]) | set(asked[1])) == len(asked[0]) + len(asked[1])
    assert abs(len(asked[0]) - len(asked[1])) <= len(names) / 2


def test_core_of_a_sharded_model_needs_no_validation_before_it(base: Config, tmp_path: Path):
    core = {"eval__core_every": 4, "eval__core_bundle": str(write_bundle(tmp_path / "bundle"))}
    config = change(base, parallel__kind="fsdp", eval__every=0, **core)
    run, alone = run_together(config, tmp_path / "run", 2), train(change(base, eval__every=0, **core), tmp_path / "one")
    measured = [[record["val/core"] for record in learned(each) if "val/core" in record] for each in (run, alone)]
    assert measured[0] == pytest.approx(measured[1])
    assert len(measured[0]) == 3


def test_a_mistake_is_said_once(base: Config, tmp_path: Path):
    config = change(base, data__paths=(str(tmp_path / "missing.txt"),))
    process = start(config, tmp_path / "run", 2)
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert (output + errors).count("missing.txt: no such file") == 1
