"""A real SLURM of two nodes on this one machine, from Debian's packages: what `sbatch launch.sh` is tested on."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
NODES = ("node1", "node2")
CPUS = 8  # pretended, on each node
DEVICES = ("null", "zero", "full", "random")  # each stands for a GPU
KILL_WAIT = 120  # seconds from SIGTERM to SIGKILL; more than the usual 30, because the machine of a test may be busy
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/munge/socket
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait={kill_wait}
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.11 Port={ports[1]} CPUs={cpus} RealMemory=8000 Gres=gpu:{gpus}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.12 Port={ports[2]} CPUs={cpus} RealMemory=8000 Gres=gpu:{gpus}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=node[1-2] Default=YES PriorityTier=1 GraceTime=300
PartitionName=high Nodes=node[1-2] PriorityTier=2
"""


class Cluster:
    """SLURM's commands, pointed at the test's own daemons."""

    def __init__(self, home: Path):
        self.home = home
        self.environment = {**os.environ, "SLURM_CONF": str(home / "slurm.conf")}

    def call(self, *command: str, env: dict[str, str] | None = None) -> str:
        """The output of one of SLURM's commands; its errors fail the test."""
        done = subprocess.run(
            command, env={**self.environment, **(env or {})}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts …"""
        shown = self.call("scontrol", "show", "job", "--oneliner", number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, number: str, seconds: float) -> dict[str, str]:
        """Wait until a job has ended, and tell how."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"job {number} is still {job['JobState']} after {seconds} s"
            time.sleep(0.2)
        return job

    def is_up(self) -> bool:
        shown = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"], env=self.environment, capture_output=True, text=True
        )
        states = shown.stdout.split()
        return len(states) >= len(NODES) and set(states) == {"idle"}


def install() -> None:
    """Install SLURM from Debian's packages where it is missing; skip the test where that cannot be done."""
    if os.geteuid() != 0:
        pytest.skip("a SLURM for the tests needs root")
    missing = [package for command, package in PACKAGES.items() if shutil.which(command) is None]
    if not missing:
        return
    if not Path("/etc/debian_version").exists() or shutil.which("apt-get") is None:
        pytest.skip(f"the tests' SLURM comes from Debian's packages, and there is no apt here for {' '.join(missing)}")
    policy = Path("/usr/sbin/policy-rc.d")  # keeps the packages from starting daemons of their own
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-qq", "--yes", "--no-install-recommends", *missing]):
            done = subprocess.run(["apt-get", *command], env=quiet, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"apt-get {' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    finally:
        if made:
            policy.unlink()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in sockets]


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start munged, slurmctld and a slurmd a node, in a directory of their own; stop them at the end."""
    install()
    home = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: the name of a socket may have 107 characters
    home.chmod(0o755)
    for name in ("munge", "state", "log", "spool", *(f"spool/{node}" for node in NODES)):
        (home / name).mkdir(mode=0o755)
    host = socket.gethostname().split(".")[0]
    filled = CONFIGURATION.format(
        home=home, host=host, ports=free_ports(3), cpus=CPUS, gpus=len(DEVICES), kill_wait=KILL_WAIT
    )
    (home / "slurm.conf").write_text(filled)
    gpus = [f"NodeName=node[1-2] Name=gpu File=/dev/{device}\n" for device in DEVICES]
    (home / "gres.conf").write_text("".join(gpus))
    key = home / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))

    cluster = Cluster(home)
    munged = ["munged", "--foreground", "--force", f"--socket={home}/munge/socket", f"--key-file={key}"]
    munged += [f"--pid-file={home}/munge/pid", f"--seed-file={home}/munge/seed"]
    daemons = [munged, ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    running = []
    try:
        with open(home / "log" / "daemons.log", "ab") as log:
            for command in daemons:
                running.append(subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log))
                if command is munged:
                    wait_until((home / "munge" / "socket").exists, cluster, "munged")
        wait_until(cluster.is_up, cluster, "SLURM")
        yield cluster
    finally:
        stop(cluster, running)
        shutil.rmtree(home, ignore_errors=True)


def wait_until(ready: Callable[[], bool], cluster: Cluster, what: str) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        logs = [file.read_text()[-2000:] for file in (cluster.home / "log").iterdir()]
        assert time.monotonic() < deadline, f"{what} does not start:\n" + "\n".join(logs)
        time.sleep(0.1)


def stop(cluster: Cluster, daemons: list[subprocess.Popen]) -> None:
    """End the jobs, which would outlive the daemons, then the daemons, the last started first."""
    subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], env=cluster.environment, timeout=30)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        left = subprocess.run(["squeue", "--noheader"], env=cluster.environment, capture_output=True, timeout=30)
        if not left.stdout.strip():
            break
        time.sleep(0.2)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
