"""Where elastic runs get their workers: an existing Dask scheduler, jobs of Slurm or LSF, here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .resources import Resources
from .schedulers import SCHEDULERS, submit_job
from .tasks import TaskArray, last_error

_ASKED = ("memory_gb", "walltime", "queue", "gpus", "project", "options")
# What of it each place can give. Elsewhere than on Slurm and LSF the workers are there already, or
# are processes of this machine, with nothing to hold them to.
_CAN = {"slurm": _ASKED, "lsf": _ASKED, "local": (), "dask": ("gpus",)}
_WHY = {
    "local": "--cluster local has none to give; --scheduler local shares out memory, time and GPUs",
    "dask": "its workers are there already, with what they were started with",
}
_CONFIGURATION = {
    # Shards take minutes or hours. Dask would think of half a second until the first has ended,
    # and ask for too few workers.
    "distributed.scheduler.unknown-task-duration": "1h",
    # A worker runs one; the others wait where any worker can have them.
    "distributed.scheduler.worker-saturation": 1.0,
}
# Its pages need a package that we do not, and port 8787 can be taken.
_NO_DASHBOARD = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
_LOOK_SECONDS = 15.0
_LOST_JOBS = 3


@dataclass(frozen=True)
class Elastic:
    """A cluster of Dask workers that shards are handed to, one at a time each.

    Args:
        cluster: ``slurm`` or ``lsf``: workers are jobs, submitted with a task's `Resources`;
            ``local``: processes of this machine; or an existing scheduler: its address
            (``dask://HOST:PORT``, ``tcp://``, ``tls://``), the file that it wrote
            (``scheduler.json``), or a `distributed.Client`.
        workers: how many there may be at a time, for the first three. One that ends while shards
            are left is replaced; one that has nothing left to do ends.
        retries: how often a shard starts again after its worker died with it.

    Raises:
        TypeError, ValueError: names the argument and its rule.
    """

    cluster: Any
    workers: int | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        own = self.place != "dask"
        if own and self.workers is None:
            raise ValueError(f"workers: --cluster {self.cluster} needs their number")
        if not own and self.workers is not None:
            raise ValueError(f"workers: those of {self.cluster} are there already")
        for name, least in (("workers", 1), ("retries", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be a whole number; got {value!r}")
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")

    @property
    def place(self) -> str:
        """``slurm``, ``lsf``, ``local``, or ``dask`` for a scheduler that is there already."""
        return place_of(self.cluster)

    def check(self, resources: Resources) -> None:
        """What a place cannot give is refused, never left out in silence.

        Raises:
            ValueError: names what it is.
        """
        for name in _ASKED:
            value = getattr(resources, name)
            if value and name not in _CAN[self.place]:
                raise ValueError(f"{name}: {_WHY[self.place]}; got {value!r}")
        if self.place == "dask" and resources.gpus and not str(resources.gpus).isdigit():
            raise ValueError(f"gpus must be a number for Dask's GPU resource; got {resources.gpus}")
        if self.place in SCHEDULERS:
            for option in resources.options:
                if option.partition("=")[0] in SCHEDULERS[self.place].reserved:
                    raise ValueError(f"options: {option} is set by the submission itself")


class Connection:
    """A client, and the jobs of its workers where these are jobs.

    Args:
        client: of Dask; known once there is a scheduler.
        log: path of a job's log.

    `keep` has Dask end no more workers for lack of tasks: cancelled ones that still clean up are
    none in its eyes.
    """

    def __init__(
        self, place: str, client: Any = None, log: Callable[[str], Path] | None = None
    ) -> None:
        self.client, self.cluster = client, None
        self.keep: Callable[[], object] = lambda: None
        self.jobs: dict[Any, str] = {}  # of a worker's name
        self.refused: list[Exception] = []
        self._place, self._log = place, log
        self._arrived: set[Any] = set()
        self._lost: list[str] = []
        self._looked = time.monotonic()

    def check(self) -> None:
        """Raises what went wrong with the jobs; asks after them now and then.

        A job that ends before its worker came (a node without the folder, too little memory) would
        be waited for for ever: neither Dask nor dask-jobqueue asks. It is replaced; where no
        worker ever came, only so often.

        Raises:
            OSError: the scheduler refused a job, with what it said; none of the first jobs came.
        """
        if self.refused:
            raise self.refused[0]
        if self._place not in SCHEDULERS or time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        jobs = dict(self.jobs)  # before the two questions: what is submitted later is in neither
        try:
            held = {job for job, _ in SCHEDULERS[self._place].held()}
        except OSError:
            return  # a busy scheduler: the next time will do
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        self._arrived |= {worker["name"] for worker in workers}
        lost = [name for name, job in jobs.items() if job not in held]
        for name in lost:
            job = self.jobs.pop(name)
            if name not in self._arrived:
                self._lost.append(job)
                self.cluster.sync(self.cluster.scale_down, [name])
        if len(self._lost) >= _LOST_JOBS and not self._arrived:
            log = self._log(self._lost[-1])
            said = last_error(log) or "nothing"
            raise OSError(
                f"{len(self._lost)} jobs ended before a worker came; the last said: {said} ({log})"
            )


def place_of(cluster: Any) -> str:
    """See `Elastic.place`.

    Raises:
        ValueError: no cluster is called so.
    """
    if cluster in ("slurm", "lsf", "local"):
        return cluster
    if not isinstance(cluster, str):
        return "dask"
    scheme, found, rest = cluster.partition("://")
    if (found and scheme in ("dask", "tcp", "tls") and rest) or cluster.endswith(".json"):
        return "dask"
    raise ValueError(
        "cluster must be slurm, lsf, local, dask://HOST:PORT, tcp://HOST:PORT, tls://HOST:PORT or "
        f"a scheduler's file NAME.json; got {cluster!r}"
    )


@contextlib.contextmanager
def connected(
    elastic: Elastic, tasks: TaskArray, resources: Resources, stem: str
) -> Iterator[Connection]:
    """A connection to the cluster; one that is made for this ends with it, its jobs too.

    Raises:
        ImportError: Dask is not installed.
        OSError: nobody answers at the address.
    """
    distributed = _distributed()
    import dask

    with contextlib.ExitStack() as stack:
        if elastic.place == "dask":
            client = elastic.cluster
            if isinstance(client, str):
                client = stack.enter_context(_client(client))
            yield Connection(elastic.place, client)
            return
        connection = Connection(
            elastic.place, log=lambda job: tasks.scheduler_log(stem, f"worker_{job}")
        )
        stack.enter_context(dask.config.set(_CONFIGURATION))
        # Whoever can reach a scheduler can have it run anything: it talks to holders of a
        # certificate only, which is made for this one run.
        security = distributed.Security.temporary()
        if elastic.place == "local":
            cluster = distributed.LocalCluster(
                n_workers=0,
                threads_per_worker=1,
                memory_limit=0,
                scheduler_kwargs=_NO_DASHBOARD,
                security=security,
            )
        else:
            folder = stack.enter_context(_private_folder(tasks.logs / "scheduler"))
            security = _written(security, folder)
            cluster = _job_cluster(elastic, tasks, resources, stem, security, folder, connection)
        connection.cluster = stack.enter_context(cluster)
        adaptive = cluster.adapt(minimum=0, maximum=elastic.workers, interval="1s")
        connection.keep = lambda: cluster.loop.add_callback(adaptive.stop)
        connection.client = stack.enter_context(distributed.Client(cluster))
        stack.callback(_quiet)
        yield connection


def _quiet() -> None:
    """No word of Dask on connections that end because we end them; its cluster undoes this."""
    for handler in logging.getLogger("distributed").handlers:
        handler.setLevel(logging.CRITICAL)


def worker_script(elastic: Elastic, tasks: TaskArray, resources: Resources, stem: str) -> str:
    """The script of a worker's job, as far as it is known before there is a scheduler."""
    _distributed()
    kind, options = _job(
        elastic, tasks, resources, stem, Path("CERTIFICATE"), Connection(elastic.place)
    )
    return kind("tls://SCHEDULER", name="WORKER", protocol="tls://", **options).job_script()


def _distributed():
    try:
        import distributed
    except ImportError as error:
        raise ImportError(
            "clusters of Dask need the extra: pip install 'fastembed-vision[cluster]'"
        ) from error
    return distributed


def _dask_jobqueue():
    """dask-jobqueue, without the handlers for Ctrl-C and SIGTERM that it sets on import."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        import dask_jobqueue
    except ImportError as error:
        raise ImportError(
            "workers as jobs need the extra: pip install 'fastembed-vision[cluster]'"
        ) from error
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
    return dask_jobqueue


def _client(address: str):
    distributed = _distributed()
    if address.endswith(".json"):
        if not Path(address).is_file():
            raise FileNotFoundError(f"cluster: there is no scheduler's file {address}")
        place = {"scheduler_file": address}
    else:
        place = {"address": address.replace("dask://", "tcp://", 1)}
    try:
        return distributed.Client(**place)
    except OSError as error:
        raise OSError(f"cluster: no Dask scheduler answers at {address}: {error}") from error


@contextlib.contextmanager
def _private_folder(parent: Path) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="tls_", dir=parent)  # mode 0700
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _written(security, folder: Path):
    """The same with its key and certificate in files, where the jobs find them."""
    places = {"ca_file": "ca", "worker_cert": "cert", "worker_key": "key"}
    for name, file in places.items():
        (folder / file).write_text(getattr(security, f"tls_{name}"))
    files = {
        f"tls_{role}_{what}": str(folder / what)
        for role in ("client", "scheduler", "worker")
        for what in ("cert", "key")
    }
    return _distributed().Security(require_encryption=True, tls_ca_file=str(folder / "ca"), **files)


def _job_cluster(elastic, tasks, resources, stem, security, folder: Path, connection: Connection):
    dask_jobqueue = _dask_jobqueue()
    kind, options = _job(elastic, tasks, resources, stem, folder, connection)
    cluster = {"slurm": dask_jobqueue.SLURMCluster, "lsf": dask_jobqueue.LSFCluster}
    configured = _configured(elastic.place, "scheduler-options", {})
    return cluster[elastic.place](
        job_cls=kind,
        security=security,
        scheduler_options={**_NO_DASHBOARD, **configured},
        **options,
    )


def _job(elastic, tasks, resources, stem, folder: Path, connection: Connection):
    """dask-jobqueue's class for the place, and its options: the one place where they are chosen.

    What a worker's job asks for stands on the line that submits it, in the words of `Slurm` and
    `Lsf`, as for an array: dask-jobqueue knows neither GPUs nor LSF's units of memory, and quotes
    nothing. Of its own directives none is left. What a site has in jobqueue.yaml beside them
    (network interface, prologue, local folder, ..) stays.
    """
    from distributed.core import Status

    dask_jobqueue = _dask_jobqueue()
    place = elastic.place
    base = {"slurm": dask_jobqueue.slurm.SLURMJob, "lsf": dask_jobqueue.lsf.LSFJob}[place]
    line = SCHEDULERS[place].worker_command(tasks, resources, stem)

    class WorkerJob(base):
        def __init__(self, *args, security=None, **options):
            # The certificate's path comes by the environment: here it would not be quoted.
            super().__init__(*args, **options)

        async def start(self) -> None:
            try:
                await super().start()
                connection.jobs[self.name] = self.job_id
            except OSError as error:
                # Raised here it would end in a log: whoever waits for the tasks raises it.
                connection.refused.append(error)
                self.status = Status.running

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed

        async def _submit_job(self, script_filename: str) -> str:
            return await asyncio.to_thread(submit_job, line, Path(script_filename).read_text())

    arguments = ["--nthreads", "1", "--memory-limit", "0", "--no-dashboard"]
    if resources.seconds:
        # It ends itself in good time, and with it the shard, which goes on elsewhere.
        lifetime = resources.seconds - min(90, resources.seconds // 4)
        arguments += ["--lifetime", f"{lifetime}s"]
    tls = {"ca": "CA_FILE", "cert": "WORKER__CERT", "key": "WORKER__KEY"}
    prologue = [
        f"export DASK_DISTRIBUTED__COMM__TLS__{name}={shlex.quote(str(folder / file))}"
        for file, name in tls.items()
    ]
    return WorkerJob, {
        "cores": 1,
        "processes": 1,
        "memory": f"{resources.megabytes or 1024}MiB",  # asked for, and of no effect: see arguments
        "python": shlex.quote(sys.executable),
        "job_name": f"{tasks.name}-worker",
        "job_directives_skip": ["#SBATCH", "#BSUB"],
        "job_script_prologue": [*_configured(place, "job-script-prologue", []), *prologue],
        "worker_extra_args": [*_configured(place, "worker-extra-args", []), *arguments],
    }


def _configured(place: str, name: str, default: Any) -> Any:
    """What the site's jobqueue.yaml says."""
    import dask

    return dask.config.get(f"jobqueue.{place}.{name}", default) or default


def gpus_of(resources: Resources, elastic: Elastic) -> dict[str, int] | None:
    """What a task asks of existing workers, in Dask's words: ``dask worker --resources GPU=1``."""
    return {"GPU": int(resources.gpus)} if elastic.place == "dask" and resources.gpus else None
