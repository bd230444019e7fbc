"""Arrays of tasks: what is asked for, what runs, and what is left; here and on a documented LSF."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastembed import cli, cluster
from fastembed.cluster import INDEX, Resources, TaskArray, format_indices, last_error, parse_indices
from fastembed.cluster.schedulers import Lsf, Slurm

NASTY = ("it's", 'a "b" $HOME `id` \\ %d', "two\nlines", "", "*", "ä", "-x", "{other}")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    return folder


def array(folder, program, indices, *arguments, name="probe") -> TaskArray:
    head = "import json, os, sys, time; index = int(sys.argv[1]); "
    command = [sys.executable, "-S", "-c", head + program, INDEX, *arguments]
    return TaskArray(name, command, indices, folder / "logs", "volume_%06d", folder)


def tree(folder) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Indices, resources, descriptions


@pytest.mark.parametrize(
    "text, expected",
    [("7", (7,)), ("3,7,20-22", (3, 7, 20, 21, 22)), (" 5 - 6 , 0", (5, 6, 0)), ("4-4", (4,))],
)
def test_indices(text, expected):
    assert parse_indices(text) == expected
    assert parse_indices(format_indices(expected)) == tuple(sorted(expected))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must look like 3,7,20-40; got ''"),
        ("3,,4", "got ''"),
        ("1-", "got '1-'"),
        ("-3", "got '-3'"),
        ("1-2-3", "got '1-2-3'"),
        ("x", "got 'x'"),
        ("٣", "must look like"),
        ("9-3", "must go upwards; got '9-3'"),
        ("1-5,4", "index 4 comes twice"),
        ("0-99999999999", "at most 1000000 indices"),
    ],
)
def test_bad_indices(text, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse_indices(text)


@pytest.mark.parametrize(
    "walltime, slurm, lsf",
    [
        ("2:00", "--time=2:00:00", "2:00"),  # two hours, as LSF and the volumes' users write it
        (90, "--time=1:30:00", "1:30"),
        ("90", "--time=1:30:00", "1:30"),
        ("0:30:01", "--time=0:30:01", "0:31"),
        ("1-02:30:00", "--time=26:30:00", "26:30"),
        ("100:05", "--time=100:05:00", "100:05"),
    ],
)
def test_walltime_in_the_words_of_each_scheduler(folder, walltime, slurm, lsf):
    tasks, resources = array(folder, "pass", [1]), Resources(walltime=walltime)
    assert slurm in Slurm.command(tasks, resources, "a_001", 0, 1, None)
    line = Lsf.command(tasks, resources, "a_001", 0, 1, None)
    assert line[line.index("-W") + 1] == lsf


@pytest.mark.parametrize(
    "change, message",
    [
        ({"walltime": "1:70"}, "walltime must be minutes, H:MM, H:MM:SS or D-HH:MM:SS; got '1:70'"),
        ({"walltime": "2h"}, "got '2h'"),
        ({"walltime": "0:00"}, "walltime must be above 0"),
        ({"processors": 0}, "processors must be at least 1; got 0"),
        ({"processors": 1.5}, "processors must be a whole number; got 1.5"),
        ({"memory_gb": 0}, "memory_gb must be above 0"),
        ({"memory_gb": float("nan")}, "memory_gb must be above 0"),
        ({"running_limit": -1}, "running_limit must be at least 1; got -1"),
        ({"gpus": -1}, "gpus must not be negative"),
        ({"options": "--qos=high"}, "options must be a list of arguments"),
    ],
)
def test_bad_resources(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Resources(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "a b"}, "name must be of letters"),
        ({"name": "../x"}, "name must be of letters"),
        ({"pattern": "volume"}, "pattern must be a name with one %d"),
        ({"pattern": "../%06d"}, "pattern must be a name with one %d"),
        ({"pattern": "%d_%d"}, "pattern must be a name with one %d"),
        ({"command": "rm -rf x"}, "command must be a list of arguments"),
        ({"command": []}, "command must be a list of arguments"),
        ({"command": ["a\0b"]}, "without NUL"),
        ({"indices": []}, "indices must not be empty"),
        ({"indices": [1, 1]}, "each must come once"),
        ({"indices": [-1]}, "must not be negative"),
    ],
)
def test_bad_arrays(tmp_path, change, message):
    good = {"name": "a", "command": ["true"], "indices": [1], "logs": tmp_path}
    with pytest.raises((ValueError, TypeError), match=message):
        TaskArray(**(good | change))


@pytest.mark.parametrize("scheduler", ["slurm", "lsf", "local"])
def test_a_dry_run_touches_nothing_and_says_all(folder, scheduler):
    (folder / "logs").mkdir()
    (folder / "logs" / "probe_001.sh").touch()
    before = tree(folder)
    planned = cluster.submit(array(folder, "pass", [7]), Resources(), scheduler, dry_run=True)
    assert tree(folder) == before
    assert planned.script.name == "probe_002.sh"
    assert str(planned.script) in " ".join(planned.commands[0]).replace("'\"'\"'", "'")
    checked = subprocess.run(["bash", "-n"], input=planned.text, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_what_a_scheduler_lacks_is_refused(folder, monkeypatch):
    tasks = array(folder, "pass", [1])
    for change, message in [
        ({"queue": "q"}, "queue: local has none"),
        ({"project": "p"}, "project: local has none"),
        ({"options": ("-x",)}, "options: local has none"),
        ({"gpus": "num=1"}, "gpus must be a number for local"),
    ]:
        with pytest.raises(ValueError, match=message):
            cluster.submit(tasks, Resources(**change), "local")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ValueError, match="each task needs 2, and there are 1 here"):
        cluster.submit(tasks, Resources(gpus=2), "local")
    for scheduler, option in [("slurm", "--array=1"), ("lsf", "-J")]:
        with pytest.raises(ValueError, match="is set by the submission itself"):
            cluster.submit(tasks, Resources(options=(option,)), scheduler)
    with pytest.raises(ValueError, match="slurm, lsf, local or an Elastic; got 'pbs'"):
        cluster.submit(tasks, Resources(), "pbs")
    percent = TaskArray("a", ["true"], [1], folder / "100%J")
    with pytest.raises(ValueError, match="slurm would replace the %"):
        cluster.submit(percent, Resources(), "slurm")
    assert tree(folder) == {}


# Here


def test_arguments_arrive_as_they_are(folder):
    tasks = array(folder, "print(json.dumps([os.getcwd(), *sys.argv[1:]]))", [0, 12], *NASTY)
    assert cluster.submit(tasks, Resources(), "local").failed == {}
    for index in (0, 12):
        said = json.loads(tasks.log(index, "out").read_text())
        assert said == [str(folder), str(index), *NASTY]


def test_local_statuses_limit_gpus_and_environment(folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "99")  # as inside another job
    program = (
        "start = time.time(); time.sleep(0.2); print(json.dumps([start, time.time(), "
        "os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS']])); "
        "print('bad luck', file=sys.stderr); sys.exit(3 if index in (2, 30) else 0)"
    )
    tasks = array(folder, program, [1, 2, 30, 31, 32])
    seen = []
    resources = Resources(processors=3, gpus=2, memory_gb=0.01)
    submission = cluster.submit(
        tasks, dataclasses.replace(resources, running_limit=4), "local",
        progress=seen.append,
    )  # fmt: skip
    assert submission.failed == {2: 3, 30: 3}
    assert seen[-1] == cluster.Standing(total=5, done=5, failed=2, running=0)
    said = [json.loads(tasks.log(i, "out").read_text()) for i in tasks.indices]
    assert {devices for _, _, devices, _ in said} == {"4,5", "6,7"}  # two at a time: 5 GPUs
    assert {threads for *_, threads in said} == {"3"}
    for start, end, devices, _ in said:
        sharing = [s for s, e, other, _ in said if other == devices and s < end and e > start]
        assert sharing == [start]
    assert cluster.missing(tasks) == (2, 30)
    assert tasks.failure(30) == "exit status 3; bad luck"
    assert tasks.finished(1)
    assert oct((folder / "logs" / "probe_001.sh").stat().st_mode)[-3:] == "700"


def test_a_scheduler_that_is_not_asked_in_vain(folder, lsf, monkeypatch):
    """What every task has ended of needs no scheduler; what may be held does."""
    cluster.submit(array(folder, "os.kill(os.getppid(), 9)", [0, 1]), Resources(), "lsf")
    tasks = array(folder, "pass", [0, 1])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(OSError, match="bjobs is not on the PATH"):
        cluster.missing(tasks)
    monkeypatch.undo()
    monkeypatch.setenv("FAKE_LSF", str(folder.parent / "lsf.json"))
    monkeypatch.setenv("PATH", f"{folder.parent}/bin:/usr/bin:/bin")
    assert cluster.missing(tasks) == (0, 1)
    assert tasks.failure(0).startswith("no exit status: killed with its shell")
    assert cluster.submit(tasks, Resources(), "local").failed == {}
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert cluster.missing(tasks) == ()


def test_another_command_is_not_finished(folder):
    assert cluster.submit(array(folder, "pass", [0, 1]), Resources(), "local").failed == {}
    other = array(folder, "pass", [0, 1], "--shard", f"{INDEX}/2")
    assert cluster.missing(other) == (0, 1)
    assert other.failure(0) == "finished, but with another command"
    assert cluster.missing(array(folder, "pass", [0, 1, 2])) == (2,)


def test_local_holds_to_the_walltime(folder):
    tasks = array(folder, "time.sleep(30 if index else 0)", [0, 1])
    start = time.monotonic()
    failed = cluster.submit(tasks, Resources(walltime="0:00:01", running_limit=2), "local").failed
    assert failed == {1: 128 + signal.SIGTERM}
    assert time.monotonic() - start < 10
    assert tasks.failure(1) == "killed by SIGTERM; TERM_RUNLIMIT: ended after its walltime"


def test_a_stop_ends_the_tasks_and_is_written_down(folder):
    """Ctrl-C: the tasks get SIGTERM and time to clean up; their index is held until then."""
    program = (
        "import signal; signal.signal(signal.SIGTERM, lambda *a: (open(f'clean{index}', 'w'), "
        "sys.exit(9))); print(os.getpid(), flush=True); time.sleep(60)"
    )
    tasks = array(folder, program, [5, 6, 7])
    driver = (
        "import sys; sys.path[:0] = [sys.argv[1]]; from pathlib import Path; import test_cluster\n"
        "tasks = test_cluster.array(Path(sys.argv[2]), sys.argv[3], [5, 6, 7])\n"
        "test_cluster.cluster.submit(tasks, test_cluster.Resources(running_limit=2), 'local')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver, str(Path(__file__).parent), str(folder), program],
        stderr=subprocess.PIPE,
    )
    outs = [tasks.log(i, "out") for i in (5, 6)]
    deadline = time.monotonic() + 60
    while not all(out.exists() and out.read_text() for out in outs):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert sorted(cluster.active(tasks)) == [5, 6, 7]
    assert cluster.missing(tasks) == ()
    with pytest.raises(ValueError, match=r"indices 5-7 of probe are still queued or running"):
        cluster.submit(tasks, Resources(), "local")
    pids = [int(out.read_text()) for out in outs]
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert [tasks.status(i) and tasks.status(i).state for i in (5, 6, 7)] == [9, 9, None]
    assert (folder / "clean5").exists()
    assert cluster.missing(tasks) == (5, 6, 7)
    assert tasks.failure(7) == "not started"


def test_a_command_that_is_not_there(folder):
    tasks = TaskArray("a", ["/no/such program"], [1], folder / "logs", cwd=folder)
    assert cluster.submit(tasks, Resources(), "local").failed == {1: 127}
    assert "No such file or directory" in tasks.failure(1)


def test_a_damaged_status_is_told(folder):
    tasks = array(folder, "pass", [1])
    tasks.logs.mkdir()
    tasks.log(1, "status").write_text("status=fine\n")
    with pytest.raises(ValueError, match=r"volume_000001\.status is not a task's status"):
        tasks.finished(1)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", None),
        ("one\n\n two \n", "one two"),
        ("a\nb\nc\nd\n", "b c d"),
        (
            "Traceback (most recent call last):\n  File x, line 1\n"
            "torch.cuda.OutOfMemoryError: CUDA out of memory\nTried 2 GB\n",
            "torch.cuda.OutOfMemoryError: CUDA out of memory Tried 2 GB",
        ),
        ("ValueError: first\nTraceback:\nKeyError: 'b'\nbye\n", "KeyError: 'b' bye"),
        ("fastembed: warning: slow\nfastembed: no such file\n", "fastembed: no such file"),
        (
            "  0%| |\r 50%|#|\rOSError: [Errno 28] No space left\n",
            "OSError: [Errno 28] No space left",
        ),
        ("x" * 100_000 + "\nRuntimeError: at the end\n", "RuntimeError: at the end"),
    ],
)
def test_last_error(tmp_path, text, expected):
    log = tmp_path / "log.err"
    log.write_text(text)
    assert last_error(log) == expected
    assert last_error(tmp_path / "none") is None


# LSF, as IBM documents it: see fake_lsf.py


def test_everything_that_was_asked_for_reaches_lsf(folder, lsf):
    tasks = array(folder, "print(os.environ['OMP_NUM_THREADS'], *sys.argv[2:])", [3, 7], *NASTY[:2])
    resources = Resources(
        processors=16, memory_gb=64, walltime="2:00", queue="gpu_short", gpus="num=1:gmem=24G",
        project="cellmap", running_limit=5, options=("-sp", "50"),
    )  # fmt: skip
    submission = cluster.submit(tasks, resources, "lsf")
    assert submission.jobs == ("101",)
    assert lsf()["101"]["options"] == {
        "-J": ["probe[1-2]%5"], "-n": ["16"], "-R": ["span[hosts=1]", "rusage[mem=65536MB/job]"],
        "-M": ["65536MB"], "-W": ["2:00"], "-q": ["gpu_short"], "-gpu": ["num=1:gmem=24G"],
        "-P": ["cellmap"], "-sp": ["50"],
        "-oo": [f"{tasks.logs}/scheduler/probe_001_%J_%I.log"],
    }  # fmt: skip
    assert cluster.missing(tasks) == ()
    assert tasks.log(7, "out").read_text() == "16 " + " ".join(NASTY[:2]) + "\n"
    assert tasks.status(7).job == "101_2"


def test_lsf_arrays_beyond_the_largest_wait_for_each_other(folder, lsf, monkeypatch):
    monkeypatch.setenv("FAKE_LSF_ARRAY", "3")
    tasks = array(folder, "print(index)", [5, 9, 100, 2000, 2001, 2002, 70_000])
    assert cluster.submit(tasks, Resources(running_limit=2), "lsf").jobs == ("101", "102", "103")
    jobs = lsf()
    assert [jobs[j]["options"]["-J"] for j in jobs] == [
        ["probe[1-3]%2"], ["probe[1-3]%2"], ["probe[1-1]%2"],
    ]  # fmt: skip
    assert [jobs[j]["options"].get("-w") for j in jobs] == [
        None, ["numended(101,*)"], ["numended(102,*)"],
    ]  # fmt: skip
    assert [tasks.log(i, "out").read_text() for i in tasks.indices] == [
        f"{i}\n" for i in tasks.indices
    ]
    cluster.submit(tasks, Resources(), "lsf")  # no limit: none waits
    assert all("-w" not in lsf()[job]["options"] for job in ("104", "105", "106"))


def test_lsf_memory_limit_is_found_and_held_tasks_are_not_missing(folder, lsf, monkeypatch):
    program = "os.kill(os.getpid(), 9) if index == 8 and not os.path.exists('go') else None"
    tasks = array(folder, program, [7, 8])
    cluster.submit(tasks, Resources(memory_gb=1), "lsf")
    assert cluster.missing(tasks) == (8,)
    failure = tasks.failure(8)
    assert failure.startswith("killed by SIGKILL; ") and "TERM_MEMLIMIT: job killed" in failure
    monkeypatch.setenv("FAKE_LSF_HOLD", "1")
    again = array(folder, program, [8])
    cluster.submit(again, Resources(memory_gb=2), "lsf")
    assert cluster.active(tasks) == {8: "lsf job 102"}
    assert cluster.missing(tasks) == ()
    with pytest.raises(ValueError, match="indices 8 of probe are still queued or running"):
        cluster.submit(again, Resources(), "lsf")


def test_lsf_refusals_are_told_and_leave_nothing(folder, lsf, monkeypatch):
    tasks = array(folder, "pass", [1])
    with pytest.raises(OSError, match=r"bsub failed with status 255, saying: bsub: -gpu: bad"):
        cluster.submit(tasks, Resources(gpus="a100:2"), "lsf")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OSError, match="bsub is not on the PATH of this machine"):
        cluster.submit(tasks, Resources(), "lsf")
    assert list(tasks.logs.glob("*.*")) == []


# The command


def run(*arguments: str) -> int:
    return cli.main(["submit", *map(str, arguments)])


def test_submit_prints_script_and_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = run(
        "--shards", "16", "--indices", "3,7-9", "--gpu", "--memory-gb", "64", "--walltime", "2:00",
        "--queue", "gpu", "--running-limit", "4", "--scheduler-option=--qos=high",
        "--scheduler-option=--nice 5", "--dry-run", "--",
        "multichannel", "--manifest", "a b.csv", "--output-dir", "out", "--model", "dinov3:vitl16",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert status == 0
    assert "indices=(3 {7..9})" in said
    assert (
        f"{sys.executable} -m fastembed.cli multichannel --manifest 'a b.csv' --output-dir out "
        '--model dinov3:vitl16 --shard "$index"/16'
    ) in said
    line = said.splitlines()[-1]
    for part in ("--array=1-4%4", "--mem=65536M", "--time=2:00:00", "--cpus-per-task=8",
                 "--gres=gpu:1", "--partition=gpu", "--qos=high --nice 5"):  # fmt: skip
        assert part in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--shards 2", "submit needs a command"),
        ("--shards 2 -- parity", "parity has no --shard"),
        ("--shards 2 -- submit --shards 3", "submit has no --shard"),
        ("--shards 2 -- panoptic --data_path a --shard 1/2", "leave it out of the command"),
        ("--shards 2 -- panoptic --data_path a --overwrite", "run it without submit"),
        ("--shards 2 -- panoptic --data_path a{index}", "would be replaced"),
        ("--shards 2 --indices 1-2 -- panoptic --data_path a", "must be below --shards 2; got 2"),
        ("--shards 2 --no-gpu --gpus 2 -- panoptic --data_path a", "contradict each other"),
        ("--shards 2 --walltime x -- panoptic --data_path a", "walltime must be minutes"),
        ("--shards 2 -- multichannel --output-dir o --model a", "serves one machine"),
        ("--shards 2 -- multichannel --output-dir o --model a --db embedded", "serves one machine"),
        (
            "--shards 2 -- multichannel --output-dir o --model a --db postgresql://me:secret@h/d",
            "would stand in a script",
        ),
        (
            "--shards 2 -- multichannel --output-dir o --model a --db-password secret",
            "would stand in a script",
        ),
    ],
)
def test_submit_refuses(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments.split()) == 2
    said = capsys.readouterr().err
    assert message in said and "secret" not in said
    assert list(tmp_path.iterdir()) == []


def test_submit_holds_the_command_against_its_own_options(capsys, tmp_path):
    with pytest.raises(SystemExit):
        run("--shards", "2", "--", "panoptic", "--data_path", tmp_path, "--colour", "red")
    assert "unrecognized arguments: --colour red" in capsys.readouterr().err


def test_submit_local_tells_failures_and_missing_runs_them(capsys, tmp_path):
    manifest = tmp_path / "tensors.csv"
    command = [
        "--", "multichannel", "--manifest", manifest, "--output-dir", tmp_path / "out",
        "--model", "timm:test_vit.r160_in1k", "--weights", "random",
    ]  # fmt: skip
    assert run("--scheduler", "local", "--shards", "2", "--indices", "1", *command) == 3
    said = capsys.readouterr()
    assert "0 of 1 tasks done" in said.out
    assert "failed: 1" in said.err and "tensors.csv" in said.err
    assert run("--scheduler", "local", "--shards", "2", "--missing", "--dry-run", *command) == 0
    said = capsys.readouterr()
    assert "2 of 2 shards to submit again" in said.err and "  1: exit status 1; " in said.err
