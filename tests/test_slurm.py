"""Submission to a real Slurm: slurmctld and slurmd of one node, started here and ended again."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from pathlib import Path

import pytest
from conftest import read_outputs, tree
from slurm_cluster import MAX_ARRAY_SIZE, SlurmCluster, wait_for, why_not

from fastembed import cli, cluster
from fastembed.cluster import INDEX, Elastic, Resources, TaskArray

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no Slurm here: {why_not()}")


@pytest.fixture(scope="module")
def slurm():
    before = dict(os.environ)
    with SlurmCluster() as running:
        os.environ.update(running.environment)
        yield running
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    return folder


def array(folder, program: str, indices, *arguments: str, name: str = "probe") -> TaskArray:
    """Tasks that run a line of Python with their index as the first argument."""
    head = "import os, signal, sys, time; index = int(sys.argv[1]); "
    command = [sys.executable, "-S", "-c", head + program, INDEX, *arguments]
    return TaskArray(name, command, indices, folder / "logs", "volume_%06d", folder)


def test_everything_that_was_asked_for_reaches_slurm(slurm, folder):
    names = ["SLURM_CPUS_PER_TASK", "SLURM_MEM_PER_NODE", "OMP_NUM_THREADS"]
    tasks = array(folder, f"print(*map(os.environ.get, {names}))", [4, 8])
    resources = Resources(
        processors=2, memory_gb=1.5, walltime="2:00", queue="gpu", gpus=1, running_limit=1,
        options=("--hold", "--comment=seen"),
    )  # fmt: skip
    (job,) = cluster.submit(tasks, resources).jobs
    shown = slurm.job(job)
    expected = {
        "TimeLimit": "02:00:00", "NumCPUs": "2", "CPUs/Task": "2", "MinMemoryNode": "1.50G",
        "Partition": "gpu", "TresPerNode": "gres:gpu:1", "ArrayTaskId": "1-2%1",
        "JobName": "probe", "Comment": "seen", "NumNodes": "1-1",
    }  # fmt: skip
    assert {name: shown.get(name) for name in expected} == expected
    assert cluster.active(tasks) == dict.fromkeys([4, 8], f"slurm job {job}")
    slurm.ask("scontrol", "release", job)
    slurm.wait()
    assert tasks.log(8, "out").read_text() == "2 1536 2\n"
    assert cluster.missing(tasks) == ()


def test_sparse_indices_beyond_the_largest_array_within_one_running_limit(slurm, folder):
    indices = (3, 7, 20, 21, 22, 23, 1999, 100_000)
    assert len(indices) > MAX_ARRAY_SIZE - 1
    program = "print(time.time()); time.sleep(0.3); print(time.time())"
    tasks = array(folder, program, indices)
    submission = cluster.submit(tasks, Resources(memory_gb=0.1, running_limit=2))
    assert len(submission.jobs) == 2
    slurm.wait()
    assert cluster.missing(tasks) == ()
    spans = [tuple(map(float, tasks.log(i, "out").read_text().split())) for i in indices]
    at_once = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(at_once) == 2  # reached, and never passed
    assert sorted(path.name for path in tasks.logs.glob("*.out")) == [
        f"volume_{index:06d}.out" for index in indices
    ]


def test_killed_tasks_and_only_these_are_missing_and_run_again(slurm, folder):
    stuck = (3, 12, 15)
    program = (
        "print(os.getpid(), os.getppid(), flush=True); "
        f"time.sleep(60) if index in {stuck} and not os.path.exists('go') else None"
    )
    tasks = array(folder, program, range(20))
    resources = Resources(memory_gb=0.1)
    submission = cluster.submit(tasks, resources)
    assert len(submission.jobs) == 4

    def others_have_ended():
        started = all(tasks.log(i, "out").exists() and tasks.log(i, "out").read_text()
                      for i in range(20))  # fmt: skip
        return started and all(tasks.finished(i) for i in range(20) if i not in stuck)

    wait_for(others_have_ended, "19 ended tasks", 60)
    assert cluster.missing(tasks) == ()  # three still run: to submit them would run them twice
    assert sorted(cluster.active(tasks)) == list(stuck)
    with pytest.raises(ValueError, match=r"indices 3,12,15 of probe are still queued or running"):
        cluster.submit(tasks, resources)

    child, shell = map(int, tasks.log(15, "out").read_text().split())
    os.kill(shell, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    os.kill(int(tasks.log(12, "out").read_text().split()[0]), signal.SIGKILL)
    slurm.ask("scancel", tasks.status(3).job)
    slurm.wait()

    assert cluster.missing(tasks) == stuck
    assert tasks.status(3).state == 128 + signal.SIGTERM
    assert "CANCELLED" in tasks.failure(3)  # what slurmstepd said
    assert tasks.failure(12).startswith("killed by SIGKILL")
    assert tasks.failure(15).startswith("no exit status: killed with its shell")
    stamps = {i: tasks.log(i, "status").stat().st_mtime_ns for i in range(20)}

    (folder / "go").touch()
    again = array(folder, program, cluster.missing(tasks))
    assert again.indices == stuck
    cluster.submit(again, resources)
    slurm.wait()
    assert cluster.missing(tasks) == ()
    changed = [i for i in range(20) if tasks.log(i, "status").stat().st_mtime_ns != stamps[i]]
    assert tuple(changed) == stuck


def test_exit_status_and_memory_limit_are_found(slurm, folder):
    program = "block = b'x' * 400_000_000 if index else None; time.sleep(30 if index else 0); "
    tasks = array(folder, program + "raise SystemExit('the model is missing')", [0, 1])
    (job,) = cluster.submit(tasks, Resources(memory_gb=0.1)).jobs
    slurm.wait()
    assert slurm.job(f"{job}_1")["ExitCode"] == "1:0"
    assert tasks.failure(0) == "exit status 1; the model is missing"
    assert "exceeded memory limit" in tasks.failure(1)
    assert cluster.missing(tasks) == (0, 1)


def test_a_refusal_is_told_and_leaves_nothing(slurm, folder):
    tasks = array(folder, "pass", [0])
    with pytest.raises(OSError, match=r"sbatch failed .* invalid partition specified: nowhere"):
        cluster.submit(tasks, Resources(queue="nowhere"))
    with pytest.raises(OSError, match=r"emory|Requested node configuration"):
        cluster.submit(tasks, Resources(memory_gb=64))  # the node has 4
    assert list(tasks.logs.glob("*.*")) == []


def test_shards_of_a_command_leave_the_bytes_of_one_run(slurm, plates, tmp_path, capsys):
    plates.fill(6)
    command = [
        "multichannel", "--manifest", str(plates.manifest), "--model", "timm:test_vit.r160_in1k",
        "--weights", "random", "--img-size", "160", "--precision", "fp32", "--output-dir",
    ]  # fmt: skip
    assert cli.main([*command, str(tmp_path / "one")]) == 0
    many = tmp_path / "in two"
    submit = ["submit", "--shards", "2", "--num-processors", "1", "--memory-gb", "1.9"]
    assert cli.main([*submit, "--", *command, str(many)]) == 0
    assert "2 tasks submitted as slurm job" in capsys.readouterr().out
    slurm.wait(120)
    errors = (many / "logs" / "multichannel_000001.err").read_text()
    expected = read_outputs(tmp_path / "one")
    assert {k: v for k, v in read_outputs(many).items() if k.endswith(".npy")} == {
        k: v for k, v in expected.items() if k.endswith(".npy")
    }, errors
    assert cli.main([*submit, "--missing", "--", *command, str(many)]) == 0
    assert "0 of 2 shards to submit again" in capsys.readouterr().err


# Workers of Dask as jobs


def test_workers_are_jobs_with_what_was_asked_for(slurm, folder):
    pytest.importorskip("distributed", reason="distributed is not installed")
    names = ["SLURM_CPUS_PER_TASK", "SLURM_MEM_PER_NODE", "OMP_NUM_THREADS", "MKL_NUM_THREADS"]
    program = (
        f"print(*map(os.environ.get, {names}), flush=True); "
        "job = os.environ['SLURM_JOB_ID']; "
        "print(os.popen(f'scontrol show job {job}').read())"
    )
    tasks = array(folder, program, [4, 8])
    resources = Resources(
        processors=2, memory_gb=1.5, walltime="2:00", queue="gpu", gpus=1,
        options=("--comment=it's seen",),
    )  # fmt: skip
    assert cluster.submit(tasks, resources, Elastic("slurm", workers=1)).failed == {}
    said, shown = tasks.log(8, "out").read_text().split("\n", 1)
    assert said == "2 1536 2 None"
    expected = [
        "TimeLimit=02:00:00", "NumCPUs=2", "CPUs/Task=2", "MinMemoryNode=1.50G", "Partition=gpu",
        "TresPerNode=gres:gpu:1", "JobName=probe-worker", "Comment=it's seen", "NumNodes=1",
    ]  # fmt: skip
    assert [part for part in expected if f"{part} " not in shown and f"{part}\n" not in shown] == []
    assert not slurm.ask("squeue", "-h", "--states=pending,running").strip()
    assert not list((folder / "logs").rglob("tls_*"))  # the certificate of the run


def test_a_refused_worker_ends_the_run(slurm, folder):
    pytest.importorskip("distributed", reason="distributed is not installed")
    tasks = array(folder, "pass", [0])
    with pytest.raises(OSError, match=r"sbatch failed .* invalid partition specified: nowhere"):
        cluster.submit(tasks, Resources(queue="nowhere"), Elastic("slurm", workers=2))
    assert cluster.missing(tasks) == (0,)


LONG = "FASTEMBED_SLURM_CANCELS" not in os.environ
IF_LONG = pytest.mark.skipif(LONG, reason="the long form: FASTEMBED_SLURM_CANCELS=20")


@pytest.mark.parametrize("form", [pytest.param("npy", marks=IF_LONG), "zarr"])
def test_cancelled_workers_leave_the_bytes_of_one_run(slurm, plates, tmp_path, monkeypatch, form):
    """FASTEMBED_SLURM_CANCELS=20 for the long form."""
    dask = pytest.importorskip("dask", reason="dask is not installed")
    cancels = int(os.environ.get("FASTEMBED_SLURM_CANCELS", 1))
    monkeypatch.setitem(dask.config.config["distributed"]["deploy"], "lost-worker-timeout", "1s")
    plates.fill(24)
    command = [
        "multichannel", "--manifest", str(plates.manifest), "--model", "timm:test_vit.r160_in1k",
        "--weights", "random", "--img-size", "160", "--precision", "fp32", "--format", form,
        "--output-dir",
    ]  # fmt: skip
    out, logs = tmp_path / "in shards", tmp_path / "logs"
    submit = [
        "submit", "--cluster", "slurm", "--workers", "2", "--retries", "20", "--shards", "2",
        "--num-processors", "1", "--memory-gb", "1.9", "--logs", str(logs), "--", *command,
        str(out),
    ]  # fmt: skip
    cancelled = []

    def cancel():
        chosen = random.Random(11)
        while len(cancelled) < cancels and not ended.wait(chosen.uniform(0.5, 3)):
            # Those whose worker has a shard, whose status names it as running.
            busy = [p for p in logs.glob("*.status") if "status=running" in p.read_text()]
            jobs = slurm.ask("squeue", "-h", "--states=running", "--format=%A").split()
            if busy and jobs:
                cancelled.append(chosen.choice(jobs))
                slurm.ask("scancel", cancelled[-1])

    ended = threading.Event()
    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        assert cli.main(submit) == 0
    finally:
        ended.set()
        thread.join()
    assert len(cancelled) == cancels
    starts = [p.read_text().count("worker attempt") for p in logs.rglob("*_dask_*.log")]
    assert 1 <= sum(starts) - 2 <= cancels
    assert cli.main([*command, str(tmp_path / "one")]) == 0
    assert tree(out) == tree(tmp_path / "one")


def test_volumes_of_which_two_are_killed_end_complete_and_verified(slurm, tmp_path):
    """FASTEMBED_SLURM_VOLUMES=20 for the long form."""
    pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    from test_volumes_job import make_sections, options_of

    count = int(os.environ.get("FASTEMBED_SLURM_VOLUMES", 4))
    out = tmp_path / "out"
    submit = [
        "volumes", "submit", *options_of(make_sections(tmp_path / "sections"), out),
        "--num-volumes", str(count), "--memory-gb", "1.9", "--num-processors", "2",
        "--walltime", "0:10", "--no-gpu",
    ]  # fmt: skip
    assert cli.main(submit) == 0
    victims = []

    def two_are_killed():
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = process.joinpath("cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"preprocess" in words and str(out).encode() in b"\0".join(words):
                index = int(words[words.index(b"--volume-index") + 1])
                if index % 2 and index not in victims and len(victims) < 2:
                    os.kill(int(process.name), signal.SIGKILL)
                    victims.append(index)
        return len(victims) == 2

    wait_for(two_are_killed, "two killed tasks", 300)
    slurm.wait(600)
    check = ["volumes", "check", "--output-dir", str(out), "--num-volumes", str(count)]
    assert cli.main(check) == 3
    finished = set(range(count)) - set(victims)
    stamps = {i: (out / f"volume_{i:06d}_metadata.json").stat().st_mtime_ns for i in finished}
    assert not any((out / f"volume_{i:06d}_metadata.json").exists() for i in victims)
    assert cli.main([*submit, "--missing"]) == 0
    slurm.wait(600)
    assert cli.main([*check, "--verify"]) == 0
    for i, stamp in stamps.items():
        assert (out / f"volume_{i:06d}_metadata.json").stat().st_mtime_ns == stamp
