"""A real Slurm of three nodes on one machine, in a private folder.

munged, slurmctld and one slurmd a node are started by hand; nodes differ by name and port alone. Run it
inside `unshare --pid --fork --kill-child --mount --mount-proc --uts` (`make test-slurm` does), so that
everything ends with the tests and the private hosts file is seen by nobody else.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

NODES = ("n1", "n2", "n3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare")
_PORT = 33_000 + 10 * secrets.randbelow(400)  # two clusters on one machine keep out of each other's way
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


class Cluster:
    """Daemons and commands of the cluster.

    Args:
        folder: private, short path (munge's socket lies in it).
    """

    def __init__(self, folder: Path) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            raise RuntimeError(f"{missing} not found: apt-get install slurmctld slurmd slurm-client munge")
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("munge", "log", "state", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._write_hosts()
        (folder / "slurm.conf").write_text(_configuration(folder))

    def _write_hosts(self) -> None:
        hosts = self.folder / "hosts"
        names = " ".join(("localhost", socket.gethostname(), *NODES))
        hosts.write_text(f"127.0.0.1 {names}\n")
        subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)

    def start(self) -> None:
        """Start the daemons and wait until all nodes are idle."""
        munge = self.folder / "munge"
        munge.chmod(0o755)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={munge / 'sock'}", *files)
        _wait(lambda: (munge / "sock").exists(), 20, "munged opened no socket")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._nodes[node] = self._daemon("slurmd", "-D", "-N", node)
        self._wait_for_idle_nodes()

    def _wait_for_idle_nodes(self) -> None:
        _wait(lambda: self._idle() == len(NODES), 180, f"the nodes are not idle, see {self.folder}/log")

    def _daemon(self, *command: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "log" / f"{len(self._daemons)}-{command[0]}.out", "wb") as log:
            daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
        self._daemons.append(daemon)
        return daemon

    def lose(self, node: str) -> None:
        """End all processes of a node at once, and let the controller know without waiting for its timeout.

        `State=DOWN` alone is not a lost node: its slurmd answers, so it is back in a moment, and kills what
        the next start of the same job has begun on it.
        """
        self._nodes[node].kill()
        self._nodes[node].wait()
        doomed: set[int] = set()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"SLURMD_NODENAME={node}".encode() not in (path / "environ").read_bytes().split(b"\0"):
                    continue
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                doomed.add(int(path.name))
                if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd"):
                    doomed.add(parent)
        for pid in sorted(doomed):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def bring_back(self, node: str) -> None:
        """Start a lost node again, and wait until it is idle."""
        self._nodes[node] = self._daemon("slurmd", "-D", "-N", node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        self._wait_for_idle_nodes()

    @contextlib.contextmanager
    def configured(self, line: str) -> Iterator[None]:
        """Add a line to slurm.conf for a while."""
        path = self.folder / "slurm.conf"
        before = path.read_text()
        path.write_text(f"{line}\n{before}")
        try:
            self.run("scontrol", "reconfigure")
            yield
        finally:
            path.write_text(before)
            self.run("scontrol", "reconfigure")

    def _idle(self) -> int:
        command = ["sinfo", "-hNp", "low", "-t", "idle", "-o", "%N"]
        return len(subprocess.run(command, env=self.environment, capture_output=True).stdout.split())

    def stop(self) -> None:
        """Cancel what runs and end the daemons."""
        self.run("scancel", "--user=root", check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(timeout=60)

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a Slurm command; a busy controller may need to be asked again."""
        for _ in range(5):
            done = subprocess.run(command, env=self.environment, text=True, capture_output=True)
            if done.returncode == 0 or not check:
                return done.stdout
            time.sleep(2)
        raise AssertionError(f"{command} failed: {done.stderr}")

    def submit(
        self,
        script: Path,
        options: Sequence[str],
        variables: Mapping[str, str],
        words: Sequence[str],
        folder: Path | None = None,
    ) -> int:
        """`sbatch` in `folder`; returns the job's number."""
        command = ["sbatch", "--parsable", *options, str(script), *words]
        environment = {**self.environment, **variables}
        done = subprocess.run(command, env=environment, cwd=folder, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def field(self, job: int, name: str) -> str:
        """One entry of `scontrol show job`."""
        text = self.run("scontrol", "-o", "show", "job", str(job))
        found = re.search(rf"\b{name}=(\S*)", text)
        assert found is not None, text
        return found[1]

    def wait_for(self, job: int, is_so: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until something holds of a job, failing with its output when it ends before."""

        def holds_or_ended() -> bool:
            return is_so() or self.field(job, "JobState") in ENDED

        _wait(holds_or_ended, seconds, f"job {job}: {what}\n{self.output(job)[-3000:]}")
        assert is_so(), f"job {job} is {self.field(job, 'JobState')}: {what}\n{self.output(job)[-3000:]}"

    def wait_until(self, is_so: Callable[[], bool], seconds: float, complaint: str) -> None:
        """Wait until something holds, whatever becomes of jobs."""
        _wait(is_so, seconds, complaint)

    def ended(self, job: int, seconds: float) -> str:
        """Wait for the end of a job; returns its state."""
        _wait(
            lambda: self.field(job, "JobState") in ENDED,
            seconds,
            f"job {job} runs on\n{self.output(job)[-3000:]}",
        )
        return self.field(job, "JobState")

    def output(self, job: int) -> str:
        """What the batch script of a job printed."""
        path = Path(self.field(job, "StdOut"))
        return path.read_text(errors="replace") if path.exists() else ""


def _wait(is_so: Callable[[], bool], seconds: float, complaint: str) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise AssertionError(complaint)
        time.sleep(0.3)


def _configuration(folder: Path) -> str:
    host = socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={_PORT + 1 + index} CPUs=2 "
        "RealMemory=4000 State=UNKNOWN"
        for index, node in enumerate(NODES)
    )
    return f"""ClusterName=tests
FirstJobId={_PORT - 32_000}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CryptoType=crypto/munge
SlurmctldPort={_PORT}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
KillWait=60
MinJobAge=3600
InactiveLimit=0
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=01:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace Nodes=ALL MaxTime=01:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=90
PartitionName=cancel Nodes=ALL MaxTime=01:00:00 State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime=90
PartitionName=high Nodes=ALL MaxTime=01:00:00 State=UP PriorityTier=10 PreemptMode=OFF
"""
