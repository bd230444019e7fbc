"""Shards on workers of Dask: killed workers, killed drivers, and the bytes of one run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import tree
from slurm_cluster import wait_for

from fastembed import cli, cluster
from fastembed.cluster import INDEX, Elastic, Resources, TaskArray
from fastembed.cluster.workers import connected, gpus_of, place_of

distributed = pytest.importorskip("distributed", reason="distributed is not installed")
if importlib.util.find_spec("dask_jobqueue") is None:
    pytest.skip("dask-jobqueue is not installed", allow_module_level=True)

# Of a task's process: its shell, what ties it to its worker, the worker.
HEAD = """
import json, os, signal, subprocess, sys, time
index = int(sys.argv[1])
def parent(pid):
    return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
worker = parent(parent(os.getppid()))
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "it's a {folder}"
    folder.mkdir()
    return folder


def array(folder, program: str, indices, *arguments: str) -> TaskArray:
    """Tasks that run a program of Python with their index as the first argument."""
    command = [sys.executable, "-S", "-c", HEAD + program, INDEX, *arguments]
    return TaskArray("probe", command, indices, folder / "logs", "part_%06d", folder)


@pytest.fixture(scope="module")
def scheduler():
    """Somebody's cluster: a scheduler and two workers, started again by their nannies."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=None
    ) as running:
        yield running


@pytest.fixture
def there(scheduler):
    """Its address, once both workers are back from what the test before did to them."""
    with distributed.Client(scheduler) as client:
        client.wait_for_workers(2, timeout=120)
    return scheduler.scheduler_address.replace("tcp://", "dask://")


def attempts(tasks: TaskArray, index: int) -> list[str]:
    number = tasks.indices.index(index) + 1
    (log,) = (tasks.logs / "scheduler").glob(f"probe_*_dask_{number}.log")
    return re.findall(r"^worker attempt .*$", log.read_text(), re.MULTILINE)


# What is asked for


def test_places():
    assert [place_of(name) for name in ("slurm", "lsf", "local")] == ["slurm", "lsf", "local"]
    for name in ("dask://host:8786", "tcp://1.2.3.4:8786", "tls://host:1", "some/scheduler.json"):
        assert place_of(name) == "dask"
    for name in ("pbs", "host:8786", "http://host:8786", "dask://", ""):
        with pytest.raises(ValueError, match="cluster must be slurm, lsf, local, dask://HOST:PORT"):
            place_of(name)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("slurm",), "workers: --cluster slurm needs their number"),
        (("dask://a:1", 3), "workers: those of dask://a:1 are there already"),
        (("local", 0), "workers must be at least 1; got 0"),
        (("local", 1.5), "workers must be a whole number; got 1.5"),
        (("local", 1, -1), "retries must be at least 0; got -1"),
    ],
)
def test_bad_clusters(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Elastic(*arguments)


def test_what_a_place_cannot_give_is_refused(folder):
    tasks = array(folder, "pass", [1])
    asked = {
        "memory_gb": 3, "walltime": "2:00", "queue": "q", "project": "p", "options": ("-x",),
        "gpus": 1,
    }  # fmt: skip
    for name, value in asked.items():
        with pytest.raises(ValueError, match=f"{name}: --cluster local has none to give"):
            cluster.submit(tasks, Resources(**{name: value}), Elastic("local", 1))
        if name != "gpus":
            with pytest.raises(ValueError, match=f"{name}: its workers are there already"):
                cluster.submit(tasks, Resources(**{name: value}), Elastic("dask://a:1"))
        for place in ("slurm", "lsf"):
            Elastic(place, 1).check(Resources(**{name: value}))
    with pytest.raises(ValueError, match="gpus must be a number for Dask's GPU resource"):
        cluster.submit(tasks, Resources(gpus="a100:2"), Elastic("dask://a:1"))
    for place, option in [("slurm", "--output=x"), ("lsf", "-J")]:
        with pytest.raises(ValueError, match="is set by the submission itself"):
            cluster.submit(tasks, Resources(options=(option,)), Elastic(place, 1))
    percent = TaskArray("a", ["true"], [1], folder / "100%J")
    with pytest.raises(ValueError, match="slurm would replace the %"):
        cluster.submit(percent, Resources(), Elastic("slurm", 1))
    assert list(folder.iterdir()) == []
    assert gpus_of(Resources(gpus=2), Elastic("tcp://a:1")) == {"GPU": 2}
    assert gpus_of(Resources(gpus=2), Elastic("slurm", 1)) is None  # its jobs have them


def test_nobody_there_is_told(folder):
    tasks = array(folder, "pass", [1])
    import dask

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "200ms"}),
        pytest.raises(OSError, match=r"no Dask scheduler answers at dask://127\.0\.0\.1:9"),
    ):
        cluster.submit(tasks, Resources(), Elastic("dask://127.0.0.1:9"))
    with pytest.raises(FileNotFoundError, match=r"no scheduler's file .*none\.json"):
        cluster.submit(tasks, Resources(), Elastic(str(folder / "none.json")))
    assert cluster.active(tasks) == {}


# An existing cluster


def test_the_same_logs_and_statuses_as_here(folder, there):
    program = (
        "print(json.dumps([os.getcwd(), sys.argv[1:], os.environ.get('OMP_NUM_THREADS'), "
        "os.environ.get('MKL_NUM_THREADS')])); print('bad luck', file=sys.stderr); "
        "sys.exit(3 if index == 5 else 0)"
    )
    nasty = ("it's", 'a "b" $HOME `id` \\ %d', "two\nlines", "", "*", "ä")
    tasks = array(folder, program, [3, 5, 8, 13], *nasty)
    seen = []
    submission = cluster.submit(
        tasks, Resources(processors=2), Elastic(there), progress=seen.append
    )
    assert submission.failed == {5: 3}
    assert seen[-1] == cluster.Standing(total=4, done=4, failed=1, running=0)
    assert max(now.running for now in seen) <= 2
    for index in tasks.indices:
        assert json.loads(tasks.log(index, "out").read_text()) == [
            str(folder), [str(index), *nasty], "2", None,
        ]  # fmt: skip
        assert len(attempts(tasks, index)) == 1  # a failure is not tried again
    assert tasks.failure(5) == "exit status 3; bad luck"
    assert tasks.status(5).job == "dask_2"
    # What one left unfinished, the other goes on with.
    assert cluster.missing(tasks) == (5,)
    again = dataclasses.replace(tasks, indices=(5,))
    assert cluster.submit(again, Resources(), "local").failed == {5: 3}
    assert tasks.status(5).job == "local_1"
    files = {path.name for path in tasks.logs.glob("part_*")}
    assert files == {f"part_{i:06d}.{s}" for i in (3, 5, 8, 13) for s in ("out", "err", "status")}


def test_no_more_at_a_time_than_asked_for(folder, there):
    tasks = array(folder, "print(time.time()); time.sleep(0.2); print(time.time())", range(4))
    assert cluster.submit(tasks, Resources(running_limit=1), Elastic(there)).failed == {}
    spans = sorted(
        tuple(map(float, tasks.log(i, "out").read_text().split())) for i in tasks.indices
    )
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))


def test_a_dead_worker_leaves_no_second_writer(folder, there):
    """Its task's processes die with it, before the next attempt begins."""
    program = """
def lines():
    return open("written").read().count(chr(10)) if os.path.exists("written") else 0
if index == 1 and not os.path.exists("first"):
    open("first", "w").close()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-S", "-c",
        "import time\\nwhile True: open('written', 'a').write('x\\\\n'); time.sleep(0.001)"])
    while lines() < 20: time.sleep(0.01)
    os.kill(worker, signal.SIGKILL)
    time.sleep(60)
before = lines(); time.sleep(0.5); print(before, lines())
"""
    tasks = array(folder, program, [0, 1, 2])
    assert cluster.submit(tasks, Resources(), Elastic(there)).failed == {}
    before, after = tasks.log(1, "out").read_text().split()
    assert before == after and int(before) >= 20
    assert len(attempts(tasks, 1)) == 2
    assert cluster.missing(tasks) == ()


def test_a_task_that_kills_its_worker_is_given_up(folder, there):
    """However often it would: distributed counts tasks that only waited there as well."""
    program = "os.kill(worker, signal.SIGKILL) if index == 2 else None; time.sleep(0.1)"
    tasks = array(folder, program, range(5))
    failed = cluster.submit(tasks, Resources(), Elastic(there, retries=2)).failed
    assert failed == {2: 137}
    assert len(attempts(tasks, 2)) == 3
    assert cluster.missing(tasks) == (2,)
    assert "TERM_WORKERS: 3 workers died with this task" in tasks.failure(2)


def test_a_worker_that_ends_in_good_time_hands_its_task_on(folder):
    """As one does before its job's time limit: the task stops politely, and is no failure."""
    program = """
if os.path.exists("first"): sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: (open("clean", "w"), sys.exit(9)))
open("first", "w").close(); time.sleep(60)
"""
    tasks = array(folder, program, [4])

    def end_worker(client):
        wait_for((folder / "first").exists, "the task", 60)
        (busy,) = [worker for worker, keys in client.processing().items() if keys]
        client.run(
            lambda dask_worker: dask_worker.loop.add_callback(dask_worker.close_gracefully),
            workers=[busy],
        )

    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=None
        ) as theirs,
        distributed.Client(theirs) as client,
    ):
        thread = threading.Thread(target=end_worker, args=(client,))
        thread.start()
        failed = cluster.submit(tasks, Resources(), Elastic(client, retries=0)).failed
        thread.join()
    assert failed == {} and (folder / "clean").exists()
    assert len(attempts(tasks, 4)) == 2 and cluster.missing(tasks) == ()


DRIVER = """
import sys
sys.path[:0] = [sys.argv[1]]
from pathlib import Path
import test_elastic as t
tasks = t.array(Path(sys.argv[2]), sys.argv[3], [5, 6, 7])
t.cluster.submit(tasks, t.Resources(), t.Elastic(sys.argv[4]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_driver_that_ends_ends_its_tasks(folder, there, number):
    """Politely, and workers that are not ours stay; then the same goes on."""
    program = (
        "signal.signal(signal.SIGTERM, lambda *a: (open(f'clean{index}', 'w'), sys.exit(9)))\n"
        "print(os.getpid(), flush=True); time.sleep(0 if os.path.exists('go') else 60)"
    )
    tasks = array(folder, program, [5, 6, 7])
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(Path(__file__).parent), str(folder), program, there],
        stderr=subprocess.PIPE,
    )
    outs = [tasks.log(i, "out") for i in (5, 6)]
    wait_for(lambda: all(out.exists() and out.read_text() for out in outs), "two tasks", 60)
    assert sorted(cluster.active(tasks)) == [5, 6, 7]
    with pytest.raises(ValueError, match=r"indices 5-7 of probe are still queued or running"):
        cluster.submit(tasks, Resources(), Elastic(there))
    pids = [int(out.read_text()) for out in outs]
    process.send_signal(number)
    assert (b"KeyboardInterrupt" in process.communicate(timeout=60)[1]) == (number == signal.SIGINT)

    def statuses():
        return [tasks.status(i) and tasks.status(i).state for i in (5, 6, 7)]

    wait_for(lambda: statuses() == [9, 9, None], "the tasks' end")
    assert (folder / "clean5").exists() and (folder / "clean6").exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert cluster.missing(tasks) == (5, 6, 7)
    (folder / "go").touch()
    assert cluster.submit(tasks, Resources(), Elastic(there)).failed == {}


def test_a_scheduler_that_goes_away_is_told(folder):
    tasks = array(folder, "open('begun', 'w').close(); time.sleep(60)", [1])
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, memory_limit=0, dashboard_address=None
    ) as theirs:

        def close():
            wait_for((folder / "begun").exists, "the task", 60)
            theirs.close()

        thread = threading.Thread(target=close)
        thread.start()
        with pytest.raises(OSError, match=r"the Dask scheduler .* dropped the shards"):
            cluster.submit(tasks, Resources(), Elastic(theirs.scheduler_address))
        thread.join()
    wait_for(lambda: not cluster.active(tasks) and cluster.missing(tasks) == (1,), "its end")


# Clusters of our own


def test_the_terminals_interrupt_ends_tasks_politely(folder):
    """It reaches the workers as well as the driver: they are of its group of processes."""
    program = (
        "signal.signal(signal.SIGTERM, lambda *a: (open('clean', 'w'), sys.exit(9)))\n"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    tasks = array(folder, program, [5])
    driver = DRIVER.replace("[5, 6, 7]", "[5]").replace("sys.argv[4]", "'local', 1")
    process = subprocess.Popen(
        [sys.executable, "-c", driver, str(Path(__file__).parent), str(folder), program],
        start_new_session=True, stderr=subprocess.PIPE,
    )  # fmt: skip
    out = tasks.log(5, "out")
    wait_for(lambda: out.exists() and out.read_text(), "the task", 100)
    os.killpg(process.pid, signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=100)[1]
    assert (folder / "clean").exists() and tasks.status(5).state == 9


def test_strangers_are_refused(folder):
    """Who reaches a scheduler of Dask can have it run anything: ours asks for a certificate."""
    with connected(
        Elastic("local", 1), array(folder, "pass", [0]), Resources(), "probe_001"
    ) as ours:
        address = ours.client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        other = distributed.Security.temporary()
        for place, security in [(address.replace("tls", "tcp"), None), (address, other)]:
            with pytest.raises(OSError):
                distributed.Client(place, security=security, timeout="1s", set_as_default=False)
        assert ours.client.scheduler_info()["workers"] == {}


@pytest.mark.parametrize("form", ["npy", "zarr"])
def test_workers_killed_at_random_leave_the_bytes_of_one_run(plates, tmp_path, capsys, form):
    """FASTEMBED_ELASTIC_KILLS=20 for the long form."""
    kills = int(os.environ.get("FASTEMBED_ELASTIC_KILLS", 1))
    plates.fill(24)
    command = [
        "multichannel", "--manifest", str(plates.manifest), "--model", "timm:test_vit.r160_in1k",
        "--weights", "random", "--img-size", "160", "--precision", "fp32", "--format", form,
        "--output-dir",
    ]  # fmt: skip
    out, logs = tmp_path / "in shards", tmp_path / "logs"
    submit = [
        "submit", "--cluster", "local", "--workers", "2", "--retries", "20", "--shards", "2",
        "--num-processors", "1", "--logs", str(logs), "--", *command, str(out),
    ]  # fmt: skip
    driver = subprocess.Popen([sys.executable, "-m", "fastembed.cli", *submit])
    victims = kill_workers(driver, logs, kills)
    assert driver.wait(timeout=240) == 0
    assert len(victims) == kills
    died = sum(text.read_text().count("worker attempt") for text in logs.rglob("*_dask_*.log")) - 2
    assert 1 <= died <= kills
    assert cli.main([*command, str(tmp_path / "one")]) == 0
    assert tree(out) == tree(tmp_path / "one")
    assert cli.main(["submit", "--missing", *submit[1:]]) == 0
    assert "0 of 2 shards to submit again" in capsys.readouterr().err


def kill_workers(driver: subprocess.Popen, logs: Path, kills: int) -> list[int]:
    """SIGKILL to workers that have a task, each after a random while."""
    chosen, victims = random.Random(7), []
    while len(victims) < kills and driver.poll() is None:
        time.sleep(chosen.uniform(0.5, 4))
        busy = [pid for pid in children(driver.pid) if any("/bin/bash" in c for c in below(pid))]
        if busy:
            victims.append(chosen.choice(busy))
            with contextlib.suppress(ProcessLookupError):
                os.kill(victims[-1], signal.SIGKILL)
    return victims


def children(pid: int) -> list[int]:
    text = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return list(map(int, text.stdout.split()))


def below(pid: int) -> list[str]:
    """Command lines of all that descends from a process."""
    found = []
    for child in children(pid):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        found += below(child)
    return found


def test_keys_are_private(folder, lsf):
    """While the run lasts, and gone after it."""
    program = (
        "import glob; found = [os.path.dirname(p) for p in glob.glob('logs/scheduler/tls_*/key')]; "
        "print([oct(os.stat(p).st_mode)[-3:] for p in found])"
    )
    tasks = array(folder, program, [1])
    assert cluster.submit(tasks, Resources(), Elastic("lsf", workers=1)).failed == {}
    assert tasks.log(1, "out").read_text() == "['700']\n"
    assert not list(tasks.logs.rglob("tls_*"))


def test_workers_of_lsf(folder, lsf):
    """What is documented of bsub, bkill and scripts by standard input: see fake_lsf.py."""
    tasks = array(folder, "print(os.environ['OMP_NUM_THREADS'], worker)", [3, 7])
    resources = Resources(
        processors=16, memory_gb=64, walltime="2:00", queue="gpu_short", gpus="num=1:gmem=24G",
        project="cellmap", options=("-sp", "50"),
    )  # fmt: skip
    assert cluster.submit(tasks, resources, Elastic("lsf", workers=1)).failed == {}
    said = [tasks.log(index, "out").read_text().split() for index in (3, 7)]
    assert said[0] == said[1] and said[0][0] == "16"  # one worker, one after the other
    (job,) = lsf().values()
    assert job["options"] == {
        "-J": ["probe-worker"], "-n": ["16"], "-R": ["span[hosts=1]", "rusage[mem=65536MB/job]"],
        "-M": ["65536MB"], "-W": ["2:00"], "-q": ["gpu_short"], "-gpu": ["num=1:gmem=24G"],
        "-P": ["cellmap"], "-sp": ["50"],
        "-oo": [f"{tasks.logs}/scheduler/probe_001_worker_%J.log"],
    }  # fmt: skip
    assert "#BSUB" not in job["command"]  # all of it is on the line
    assert "--lifetime 7110s" in job["command"] and "--nthreads 1" in job["command"]
    wait_for(lambda: not Path(f"/proc/{job['process']}").exists(), "the job's end")


def test_a_refusal_of_lsf_ends_the_run(folder, lsf):
    tasks = array(folder, "pass", [1])
    with pytest.raises(OSError, match=r"bsub failed with status 255, saying: bsub: -gpu: bad"):
        cluster.submit(tasks, Resources(gpus="a100:2"), Elastic("lsf", workers=2))


def test_jobs_whose_workers_never_come_end_the_run(folder, lsf, monkeypatch):
    """Dask would wait for them for ever."""
    import dask

    monkeypatch.setattr("fastembed.cluster.workers._LOOK_SECONDS", 0.3)
    tasks = array(folder, "pass", [1])
    site = {"jobqueue.lsf.job-script-prologue": ["echo OSError: no such module; exit 1"]}
    with (
        dask.config.set(site),
        pytest.raises(OSError, match=r"3 jobs ended before a worker came; the last said: OSError"),
    ):
        cluster.submit(tasks, Resources(), Elastic("lsf", workers=1))
    assert len(lsf()) >= 3


def test_what_a_site_says_stays(folder):
    """Of jobqueue.yaml: what comes before the worker, and how it is reached."""
    import dask

    tasks = array(folder, "pass", [1])
    site = {"jobqueue.slurm.job-script-prologue": ["module load x"],
            "jobqueue.slurm.interface": "lo", "jobqueue.slurm.queue": "not this"}  # fmt: skip
    before = signal.getsignal(signal.SIGINT)
    with dask.config.set(site):
        planned = cluster.submit(tasks, Resources(), Elastic("slurm", workers=1), dry_run=True)
    assert "module load x\nexport DASK_DISTRIBUTED__COMM__TLS__" in planned.worker
    assert "--interface lo" in planned.worker and "not this" not in planned.worker
    assert planned.commands[0][:2] == ("sbatch", "--parsable")
    checked = subprocess.run(["bash", "-n"], input=planned.worker, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    assert signal.getsignal(signal.SIGINT) is before  # dask-jobqueue 0.9.0 sets its own
    assert list(folder.iterdir()) == []


# The commands


def said_by(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--cluster slurm", "--workers: --cluster slurm needs their number"),
        ("--cluster slurm --workers 2 --scheduler lsf", "--scheduler is for arrays of tasks"),
        ("--workers 2", "--workers is for --cluster; arrays have --running-limit"),
        ("--retries 2", "--retries is for --cluster"),
        ("--cluster pbs --workers 2", "--cluster must be slurm, lsf, local, dask://HOST:PORT"),
        ("--cluster dask://a:1 --workers 2", "--workers: those of dask://a:1 are there already"),
        ("--cluster local --workers 2 --retries -1", "--retries must be at least 0; got -1"),
    ],
)
def test_options_that_contradict_each_other(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    line = ["submit", "--shards", "2", *arguments.split(), "--", "panoptic", "--data_path", "a"]
    status, _, said = said_by(capsys, *line)
    assert status == 2 and message in said
    assert list(tmp_path.iterdir()) == []


SHARDED = {
    "multichannel": "--manifest a.csv --output-dir o --model b",
    "panoptic": "--data_path a --cache_dir o",
    "maps": "--input a --output o",
}


@pytest.mark.parametrize("command", SHARDED)
def test_every_sharded_command_by_a_dry_run(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    words = [command, *SHARDED[command].split()]
    asked = "--num-processors 3 --memory-gb 5 --walltime 1:00 --gpus 1 --queue q --project p"
    for scheduler, option in [("slurm", "--gres=gpu:1"), ("lsf", "-gpu num=1")]:
        line = ["submit", "--cluster", scheduler, "--workers", "4", "--shards", "9", "--dry-run"]
        status, said, _ = said_by(capsys, *line, *asked.split(), "--", *words)
        assert status == 0
        assert f"-m fastembed.cli {command}" in said and '--shard "$index"/9' in said
        assert option in said and "-m distributed.cli.dask_worker" in said
    status, said, _ = said_by(
        capsys, "submit", "--cluster", "dask://a:1", "--shards", "9", "--dry-run", "--", *words
    )
    assert status == 0 and said.splitlines()[-1].endswith(f"{command}_001.sh NUMBER")
    assert list(tmp_path.iterdir()) == []


def test_submit_of_volumes_and_cellpose_too(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "volumes submit --num-volumes 3 --output-dir o --data-root d --workers 2 --dry-run"
    status, said, _ = said_by(capsys, *line.split(), "--cluster", "slurm", "--cluster-workers", "4")
    assert status == 0 and '--volume-index "$index"' in said and "--workers=2" in said
    assert "--gres=gpu:1" in said and "--mem=65536M --time=2:00:00" in said
    status, said, _ = said_by(capsys, *line.split(), "--cluster", "tcp://a:1")
    assert status == 0 and "indices=({0..2})" in said
    step = "-- budget --data cells --output-dir study"
    line = f"cellpose submit --shards 3 --dry-run --cluster slurm --workers 4 {step}"
    status, said, _ = said_by(capsys, *line.split())
    assert status == 0 and "cellpose budget" in said and "--partition=l40s" in said
    assert f"{tmp_path}/study/logs/slurm/budget_001.sh" in said
    assert list(tmp_path.iterdir()) == []
