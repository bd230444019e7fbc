"""A private one-node Slurm: its own munged, slurmctld and slurmd, in a folder, ended with it."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
MAX_ARRAY_SIZE = 6  # so task numbers up to 5: small, for arrays that have to be split
CPUS, MEMORY_MB = 4, 4000

# linuxproc and task/none need no cgroups; CR_Core_Memory has memory counted as cores are. The
# node claims what the tests ask for, not what this machine has.
CONFIGURATION = """\
ClusterName=fastembed
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1
MaxArraySize={array}
KillWait=2
CompleteWait=0
ReturnToService=2
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherParams=OverMemoryKill
JobAcctGatherFrequency=task=1
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:2 State=UNKNOWN
PartitionName=short Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes={host} MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here, None if it can."""
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (apt-get install slurm-wlm munge)"
    if os.getuid() != 0:
        return "slurmd runs tasks as their users only for root"
    return None


class SlurmCluster:
    """Use it in a with block; `environment` is what its client programs need."""

    def __init__(self) -> None:
        # Not pytest's folder: a socket's path may be no longer than 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="fastembed-slurm-"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        configuration = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0], folder=folder, ports=_free_ports(2),
            array=MAX_ARRAY_SIZE, cpus=CPUS, memory=MEMORY_MB,
        )  # fmt: skip
        (folder / "slurm.conf").write_text(configuration)
        for device in ("gpu0", "gpu1"):  # Slurm counts the files, nobody opens them
            (folder / device).touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
        )  # fmt: skip
        wait_for((folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        wait_for(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"), "an idle node", 30)

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.said").open("wb") as said:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=os.environ | self.environment,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                )
            )

    def ask(self, *command: str) -> str:
        """What a client program prints; empty where it fails."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True
        )
        return done.stdout

    def job(self, name: str) -> dict[str, str]:
        """`scontrol show job` of a job or a task such as 12_3."""
        text = self.ask("scontrol", "show", "job", name)
        return dict(part.partition("=")[::2] for part in text.split() if "=" in part)

    def wait(self, seconds: float = 60) -> None:
        """Until no job is left."""
        wait_for(lambda: not self.ask("squeue", "-h").strip(), "an empty queue", seconds)

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) == 3:
            self.ask("scancel", "--user=root", "--full", "--signal=KILL")
            self.ask("scancel", "--user=root")
            for _ in range(50):
                if not self.ask("squeue", "-h").strip():
                    break
                time.sleep(0.1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def wait_for(condition, what: str, seconds: float = 30) -> None:
    """Polls until it holds; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"no {what} within {seconds:g} s")
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
