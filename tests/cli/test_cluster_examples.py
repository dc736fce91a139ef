"""The files of examples/cluster: what they start is what our command line takes."""

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from pretrain.cli.parsing import parse
from pretrain.cli.train import Train

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
SCRIPTS = ["slurm.sbatch", "two-machines.sh"]


def check_train(words: list[str]) -> Train:
    """The arguments behind `train`, read as the command does."""
    assert words[0] == "train"
    return parse(Train, words[1:], "train")


def put_on_path(folder: Path, **programs: str) -> dict[str, str]:
    """Programs by name as shell scripts, and the environment in which they are found first."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_shell_reads_the_scripts(name: str):
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", CLUSTER / name], check=True)


def test_two_machines(tmp_path: Path):
    from torch.distributed.run import parse_args

    environment = put_on_path(tmp_path / "bin", torchrun='printf "%s\\n" "$@"')
    command = ["bash", CLUSTER / "two-machines.sh", "10.0.0.1", "--data", "/shared/text"]
    words = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    agent = parse_args(words)
    assert (agent.nnodes, agent.rdzv_endpoint, agent.max_restarts) == ("2", "10.0.0.1:29500", 3)
    assert (agent.module, agent.training_script) == (True, "pretrain")
    assert check_train(agent.training_script_args).config.data.paths == ("/shared/text",)


@pytest.mark.parametrize("ending", ["finished", "time limit", "failed"])
def test_slurm_goes_on_after_its_time_limit_and_only_then(tmp_path: Path, ending: str):
    """The script itself, with stand-ins for SLURM's programs: srun runs for a while, as pretrain would."""
    out, log = tmp_path / "run", tmp_path / "log"
    out.mkdir()
    work = {
        "finished": f"touch {out}/summary.json",
        "failed": "exit 2",
        "time limit": f'trap "echo saved >> {log}; exit 130" USR1; touch {out}/started; while true; do sleep 0.1; done',
    }[ending]
    environment = put_on_path(
        tmp_path / "bin",
        scontrol=f'if [ "$1" = show ]; then echo node7; echo node8; else echo "scontrol $*" >> {log}; fi',
        srun=f'printf "%s\\n" "$@" > {tmp_path}/words; env | grep ^PET_ > {tmp_path}/pet\n{work}',
    )
    environment |= {"SLURM_NNODES": "2", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-8]"}
    environment |= {"SLURM_JOB_NAME": "pretrain", "OUT": str(out)}
    script = subprocess.Popen(["bash", CLUSTER / "slurm.sbatch", "--model.depth", "26"], env=environment)
    if ending == "time limit":
        deadline = time.monotonic() + 60
        while not (out / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        script.send_signal(signal.SIGUSR1)
    assert script.wait(timeout=60) == (2 if ending == "failed" else 0)
    written = log.read_text().splitlines() if log.exists() else []
    assert written == (["saved", "scontrol requeue 4711"] if ending == "time limit" else [])

    words = (tmp_path / "words").read_text().split("\n")[:-1]
    arguments = check_train(words[words.index("pretrain") + 1 :])
    assert (arguments.nproc, arguments.out, arguments.config.model.depth) == ("gpu", str(out), 26)
    assert "PET_RDZV_ENDPOINT=node7:24711" in (tmp_path / "pet").read_text()
    text = (CLUSTER / "slurm.sbatch").read_text()
    warned = int(re.findall(r"#SBATCH --signal=B:USR1@(\d+)", text)[0])
    assert warned > arguments.config.guard.grace_seconds + 10  # what the launcher adds


def test_kubernetes():
    job = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker, elastic = job["spec"]["pytorchReplicaSpecs"]["Worker"], job["spec"]["elasticPolicy"]
    assert worker["replicas"] == elastic["minReplicas"] == elastic["maxReplicas"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    words = [*container["command"], *container["args"]]
    assert words[0] == "pretrain"
    arguments = check_train(words[1:])
    assert arguments.nproc == "gpu"
    assert pod["terminationGracePeriodSeconds"] > arguments.config.guard.grace_seconds + 10
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all(any(path.startswith(f"{m}/") for m in mounts) for path in (arguments.out, *arguments.config.data.paths))


def test_every_command_in_the_page_is_one_of_ours():
    """Every `pretrain train …` of docs/cluster.md, with what stands for a value replaced."""
    page = (CLUSTER.parents[1] / "docs" / "cluster.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```(?:sh)?\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    commands = re.findall(r"pretrain (train(?: [^\n|#;]*)?)", code)
    assert len(commands) >= 4
    for command in commands:
        check_train(shlex.split(command.replace("RECIPE", "quickstart")))
