"""A real Slurm on this machine, for the duration of a ``with`` block: munged, slurmctld and one slurmd per node.

Needs root and the Debian packages slurmctld, slurmd, slurm-client and munge; no systemd, no cgroups.
The daemons are children of this process and run in the foreground; all they write lies in one
temporary directory. It proves how jobs are handled, not how fast: the nodes share this machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue", "sinfo", "scontrol")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


@dataclass(frozen=True)
class Node:
    """A node as it is configured in Slurm; several share this machine and may promise more than it has."""

    name: str
    partition: str
    cpus: int = 2
    memory: int = 5000
    """In MiB."""
    gpus: int = 0


NODES = (
    *(Node("learn0", "learner", gpus=1), Node("learn1", "learner", gpus=1)),
    *(Node("score0", "scorer"), Node("score1", "scorer")),
)


def unavailable() -> str | None:
    """Return the reason why Slurm cannot run here, or None."""
    if os.geteuid() != 0:
        return "not root: slurmd starts jobs for others"
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurmctld slurmd slurm-client munge)"
    return None


class LocalSlurm:
    """``with LocalSlurm() as slurm:`` sets SLURM_CONF, so that sbatch and the other commands use it."""

    def __init__(self, nodes: tuple[Node, ...] = NODES) -> None:
        self.nodes = nodes
        self.home = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds a unix socket
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._of_nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._before: str | None = None

    def __enter__(self) -> LocalSlurm:
        self._before = os.environ.get("SLURM_CONF")
        try:
            self._configure()
            os.environ["SLURM_CONF"] = str(self.home / "slurm.conf")
            self._daemon("munged", "--foreground", f"--key-file={self.home}/munge.key", f"--socket={self.home}/munge",
                         f"--pid-file={self.home}/munged.pid", f"--seed-file={self.home}/munge.seed",
                         f"--log-file={self.home}/munged.log")  # fmt: skip
            self._until(lambda: (self.home / "munge").is_socket(), "munged opens its socket")
            self._daemon("slurmctld", "-D", "-c")
            for node in self.nodes:
                self._switch_on(node.name)
            self._until(self._idle, "all nodes are idle")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._daemons and (jobs := self.jobs()):
                self.run("scancel", *jobs)
                self._until(lambda: not self.jobs(), "the queue is empty")
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
            for daemon in self._daemons:
                try:
                    daemon.wait(15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
            os.environ.pop("SLURM_CONF", None)
            if self._before is not None:
                os.environ["SLURM_CONF"] = self._before
            shutil.rmtree(self.home, ignore_errors=True)

    # Asking -----------------------------------------------------------------------------------

    def run(self, program: str, *arguments: str) -> str:
        """Return what a Slurm command prints. It may take 20 seconds."""
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=False)
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def jobs(self) -> list[str]:
        """Return the ids of the jobs that are pending or running."""
        return self.run("squeue", "--noheader", "--format=%i").split()

    def show(self, job: str) -> dict[str, str]:
        """Return the fields of ``scontrol show job`` for a job, which may have ended."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    # Nodes that fail --------------------------------------------------------------------------

    def power_off(self, node: str) -> None:
        """End all processes of a node's jobs and daemons without notice to Slurm, as when a node dies."""
        daemon = self._of_nodes.pop(node)
        self._daemons.remove(daemon)
        daemon.kill()
        daemon.wait(15)
        jobs = self.run("squeue", "--noheader", "--format=%i", "--nodelist", node).split()
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and _belongs(process, node, self.home, jobs):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process.name), signal.SIGKILL)

    def power_on(self, node: str) -> None:
        if node not in self._of_nodes:
            self._switch_on(node)
        self._until(lambda: self.state(node) in ("idle", "mixed", "allocated"), f"{node} is back")

    def state(self, node: str) -> str:
        """Return a node's state in Slurm: idle, mixed, down and so on, with an asterisk if it does not respond."""
        return self.run("sinfo", "--noheader", "--partition=all", "--nodes", node, "--format=%T").strip()

    def _switch_on(self, node: str) -> None:
        self._of_nodes[node] = self._daemon("slurmd", "-D", "-N", node)

    # Starting ---------------------------------------------------------------------------------

    def _daemon(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [shutil.which(program, path=_PATH) or program, *arguments]
        with (self.home / f"{program}-{len(list(self.home.glob('*.out')))}.out").open("wb") as out:
            # a session of its own, so that Ctrl-C in the terminal does not reach it
            daemon = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        self._daemons.append(daemon)
        return daemon

    def _idle(self) -> bool:
        try:
            states = self.run("sinfo", "--noheader", "--Node", "--partition=all", "--format=%T").split()
        except RuntimeError:
            return False
        return states == ["idle"] * len(self.nodes)

    def _until(self, condition: object, what: str, seconds: float = 60.0) -> None:
        assert callable(condition)
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [d for d in self._daemons if d.poll() is not None]
            if dead or time.monotonic() > deadline:
                said = "\n".join(f"{p.name}: {p.read_text()[-500:]}" for p in sorted(self.home.glob("*.out")))
                raise RuntimeError(f"Slurm: waited until {what}; ended: {[d.args for d in dead]}\n{said}")
            time.sleep(0.05)

    def _configure(self) -> None:
        home, host = self.home, socket.gethostname().split(".")[0]
        home.chmod(0o755)  # munged refuses a socket in a directory others cannot enter
        key = home / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        ports = _free_ports(1 + len(self.nodes))
        lines = [
            "ClusterName=tests",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            *("SlurmUser=root", "SlurmdUser=root"),
            *("AuthType=auth/munge", "CredType=cred/munge", f"AuthInfo=socket={home}/munge"),
            # without cgroups; pgid and not linuxproc, which leaves workers behind when a batch shell dies
            *("ProctrackType=proctrack/pgid", "TaskPlugin=task/none", "JobAcctGatherType=jobacct_gather/none"),
            *("AccountingStorageType=accounting_storage/none", "MpiDefault=none", "SwitchType=switch/none"),
            *("SelectType=select/cons_tres", "SelectTypeParameters=CR_Core_Memory", "GresTypes=gpu"),
            # nodes have what is configured here, not what the machine has
            *("SlurmdParameters=config_overrides", "ReturnToService=2"),
            "SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1",
            *("KillWait=10", "MinJobAge=600", "MessageTimeout=10", "SlurmdTimeout=10"),
            *(f"StateSaveLocation={home}/state", f"SlurmdSpoolDir={home}/spool-%n"),
            *(f"SlurmctldPidFile={home}/slurmctld.pid", f"SlurmdPidFile={home}/slurmd-%n.pid"),
        ]
        (home / "state").mkdir()
        gres = []
        for node, port in zip(self.nodes, ports[1:], strict=True):
            lines.append(
                f"NodeName={node.name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={node.cpus} "
                f"RealMemory={node.memory} State=UNKNOWN" + (f" Gres=gpu:{node.gpus}" if node.gpus else "")
            )
            for i in range(node.gpus):
                # a character device stands for a GPU: with a plain file CUDA_VISIBLE_DEVICES stays empty
                device = home / f"{node.name}-gpu{i}"
                os.mknod(device, 0o20666, os.makedev(1, 3))
                gres.append(f"NodeName={node.name} Name=gpu File={device}")
        for partition in sorted({node.partition for node in self.nodes}):
            names = ",".join(node.name for node in self.nodes if node.partition == partition)
            lines.append(f"PartitionName={partition} Nodes={names} MaxTime=INFINITE State=UP")
        lines.append("PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        (home / "slurm.conf").write_text("\n".join(lines) + "\n")
        (home / "gres.conf").write_text("\n".join(gres) + "\n")


def _belongs(process: Path, node: str, home: Path, jobs: list[str]) -> bool:
    """Return whether a process belongs to a job on a node of the Slurm in ``home``, or is the daemon of one."""
    try:
        environment = (process / "environ").read_bytes().split(b"\0")
        command = (process / "cmdline").read_bytes().decode(errors="replace")
        if any(command.startswith(f"slurmstepd: [{job}.") for job in jobs):
            # jobs of another Slurm may have the same numbers
            return any(os.readlink(file).startswith(str(home)) for file in (process / "fd").iterdir())
    except OSError:
        return False
    return {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={home}/slurm.conf".encode()} <= set(environment)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
