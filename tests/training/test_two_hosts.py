"""Two hosts with addresses of their own: network namespaces joined by a virtual cable.

Skipped where such cannot be made: it takes root and iproute2 (``apt install iproute2``).
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.cli.test_cli import options
from tests.training.test_world import assert_near

from pretrain.cli import main
from pretrain.io import read_jsonl
from pretrain.runs import Run

pytestmark = pytest.mark.slow


@dataclass
class Host:
    namespace: str
    device: str
    address: str
    processes: list[subprocess.Popen] = field(default_factory=list)

    def start(self, meet: str, *args: str) -> subprocess.Popen:
        """One process of a run of two machines that meet at ``meet``."""
        command = ["ip", "netns", "exec", self.namespace, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={meet}:29500"]
        # Both namespaces have one host name, so that they must be told who of them waits for the other.
        command += [
            f"--rdzv-conf=is_host={int(self.address == meet)}",
            f"--local-addr={self.address}",
            "-m",
            "pretrain",
            "train",
            *args,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.device}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.processes.append(process)
        return process

    def kill(self) -> None:
        """End every process here at once, and let nothing more in or out, as when the power fails."""
        subprocess.run(["ip", "-n", self.namespace, "link", "set", self.device, "down"], check=True)
        pids = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        for pid in pids.stdout.split():
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if not shutil.which("ip"):
        pytest.skip("iproute2 is not installed")
    mark = f"{os.getpid() % 10**6}"
    a = Host(f"pretrain-{mark}a", f"pt{mark}a", "10.213.77.1")
    b = Host(f"pretrain-{mark}b", f"pt{mark}b", "10.213.77.2")
    setup = [f"netns add {host.namespace}" for host in (a, b)]
    setup.append(f"link add {a.device} netns {a.namespace} type veth peer name {b.device} netns {b.namespace}")
    for host in (a, b):
        setup.append(f"-n {host.namespace} addr add {host.address}/24 dev {host.device}")
        setup += [f"-n {host.namespace} link set {device} up" for device in ("lo", host.device)]
    try:
        for line in setup:
            made = subprocess.run(["ip", *line.split()], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
        yield a, b
    finally:
        for host in (a, b):
            for process in host.processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)


def test_two_hosts_learn_what_one_does(hosts: tuple[Host, Host], text_file: Path, tmp_path: Path):
    settings = ["quickstart", "--data", str(text_file), *options(sample__max_tokens=0), "--out"]
    together = [host.start(hosts[0].address, *settings, str(tmp_path / "together")) for host in hosts]
    for process in together:
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 0, output + errors
    assert main(["train", *settings, str(tmp_path / "alone")]) == 0
    assert_near(Run.open(tmp_path / "together"), Run.open(tmp_path / "alone"))


def test_a_host_that_dies_is_named(hosts: tuple[Host, Host], text_file: Path, tmp_path: Path):
    """Its cable gives no answer any more, not even that the connection is closed."""
    out = tmp_path / "run"
    endless = options(train__steps=100000, eval__every=0, checkpoint__every=0, parallel__timeout_seconds=8.0)
    staying, dying = (
        host.start(hosts[0].address, "--data", str(text_file), "--out", str(out), *endless) for host in hosts
    )
    deadline = time.monotonic() + 120
    while len(read_jsonl(out / "metrics.jsonl")) < 3 and time.monotonic() < deadline and staying.poll() is None:
        time.sleep(0.05)
    hosts[1].kill()
    assert dying.wait(timeout=30) != 0
    _, errors = staying.communicate(timeout=120)
    assert staying.returncode != 0
    assert "pretrain: waiting for other processes failed: rank 1 on " in errors
    assert " s, last seen " in errors
