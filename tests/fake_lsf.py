"""Stands in for bsub, bjobs, bkill and bparams: takes what IBM documents, refuses the rest.

Runs arrays, each task to its end, and single jobs beside us. Installed as four programs.
Read from the command reference of IBM Spectrum LSF 10.1,
https://www.ibm.com/docs/en/spectrum-lsf/10.1.0?topic=bsub-options and the pages below it:

- bsub -J: "job_name[index_list]%job_slot_limit"; index start-end[:step], positive; the largest
  index is at most MAX_JOB_ARRAY_SIZE, 1000 by default. Job Arrays: names of a-z A-Z 0-9 . - _
- bsub -M: mem_limit[!] in KB, or what LSF_UNIT_FOR_LIMITS says, or with a unit K KB M MB ..
- bsub -R: "res_req", repeatable; rusage[mem=value], value/job | /host | /task since 10.1.0.9
  (Release notes, Resource management); span[hosts=1]
- bsub -W: [hour:]minute, minutes may pass 59. bsub -n: min_tasks[,max_tasks]
- bsub -oo: overwrites the file; %J is the job, %I the index. Without -e, errors go there too
- bsub -gpu: num=..:mode=..:gmem=.. ; -q queue; -P project; -sp priority
- bsub -w: the job must be known; numended(ID, number | *) for arrays
- bsub < script: the job's script comes by standard input where no command is given
- bkill job: ends all processes of a job; by default SIGINT, SIGTERM, then SIGKILL
- command: "anything that is provided to a UNIX Bourne shell", its words joined
- Job Arrays: LSB_JOBID and LSB_JOBINDEX in the environment of each element
- bjobs -noheader -o "jobid jobindex": pending and running jobs of the caller; none is
  "No unfinished job found". bparams -a: MAX_JOB_ARRAY_SIZE = n

State (known jobs, what was asked) is a JSON file in FAKE_LSF. FAKE_LSF_HOLD keeps jobs pending.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

UNIT = r"(?:[KMGTPEZ]B?)"
GPU = rf"mode=(?:shared|exclusive_process)|gmem=\d+{UNIT}?|j_exclusive=(?:yes|no)"
OPTIONS = {
    "-J": r"([A-Za-z0-9._-]+)(?:\[(\d+-\d+(?::\d+)?|\d+)\](?:%([1-9]\d*))?)?",
    "-M": rf"[1-9]\d*{UNIT}?!?",
    "-W": r"(?:\d+:)?\d+",
    "-n": r"[1-9]\d*(?:,[1-9]\d*)?",
    "-R": rf"span\[hosts=1\]|rusage\[mem=[1-9]\d*{UNIT}?(?:/(?:job|host|task))?\]",
    "-oo": r"/.+",
    "-gpu": rf"num=\d+(?::(?:{GPU}))*",
    "-q": r"[\w -]+",
    "-P": r"\S+",
    "-sp": r"\d+",
    "-w": r"numended\((\d+),\s*\*\)",
}
REPEATABLE = {"-R"}


def main() -> int:
    program, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    path = Path(os.environ["FAKE_LSF"])
    state = json.loads(path.read_text()) if path.exists() else {"jobs": {}}
    largest = int(os.environ.get("FAKE_LSF_ARRAY", "1000"))
    if program == "bparams":
        print(f"Parameters:\n    MAX_JOB_ARRAY_SIZE = {largest}\n    MAX_JOBID = 999999")
        return 0
    if program == "bkill":
        (job,) = arguments
        if job not in state["jobs"]:
            return complain(f"Job <{job}>: No matching job found")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(state["jobs"][job]["process"], signal.SIGTERM)
        print(f"Job <{job}> is being terminated")
        return 0
    if program == "bjobs":
        if arguments != ["-noheader", "-o", "jobid jobindex"]:
            return complain("bjobs: not documented")
        held = [(job, i) for job, known in state["jobs"].items() for i in known["held"]]
        held += [(job, 0) for job, known in state["jobs"].items() if alive(known.get("process"))]
        if not held:
            return complain("No unfinished job found")
        print("\n".join(f"{job} {i}" for job, i in held))
        return 0
    return bsub(arguments, state, largest, path)


def bsub(arguments: list[str], state: dict, largest: int, path: Path) -> int:
    options: dict[str, list[str]] = {}
    while arguments and arguments[0].startswith("-"):
        name = arguments.pop(0)
        if name not in OPTIONS or not arguments:
            return complain(f"bsub: {name}: not documented, or without its value")
        value = arguments.pop(0)
        if not re.fullmatch(OPTIONS[name], value):
            return complain(f"bsub: {name}: bad value {value!r}")
        if name in options and name not in REPEATABLE:
            return complain(f"bsub: {name}: given twice")
        options.setdefault(name, []).append(value)
    if not arguments:
        return single(options, sys.stdin.read(), state, path)
    indices = re.fullmatch(OPTIONS["-J"], options["-J"][0])[2]
    first, _, last = indices.partition("-")
    if int(first) < 1 or int(last or first) > largest:
        return complain("Bad job name. Job not submitted.")
    if "-w" in options and re.fullmatch(OPTIONS["-w"], options["-w"][0])[1] not in state["jobs"]:
        return complain("Dependency condition invalid or never satisfied. Job not submitted.")
    job, numbers = str(101 + len(state["jobs"])), range(int(first), int(last or first) + 1)
    hold = "FAKE_LSF_HOLD" in os.environ
    held = list(numbers) if hold else []
    state["jobs"][job] = {"options": options, "command": arguments, "held": held}
    path.write_text(json.dumps(state))
    for number in () if hold else numbers:
        output = Path(options["-oo"][0].replace("%J", job).replace("%I", str(number)))
        with output.open("w") as stream:
            done = subprocess.run(
                ["/bin/sh", "-c", " ".join(arguments)],
                env=os.environ | {"LSB_JOBID": job, "LSB_JOBINDEX": str(number)},
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd="/",
            )
            if done.returncode == 137:
                stream.write("TERM_MEMLIMIT: job killed after reaching LSF memory usage limit.\n")
    print(f"Job <{job}> is submitted to default queue <normal>.")
    return 0


def single(options: dict[str, list[str]], script: str, state: dict, path: Path) -> int:
    """A job of its own, that goes on when we end."""
    if not script.startswith("#!"):
        return complain("bsub: no command")
    job = str(101 + len(state["jobs"]))
    file = path.with_name(f"job_{job}.sh")
    file.write_text(script)
    file.chmod(0o700)
    with Path(options["-oo"][0].replace("%J", job)).open("w") as stream:
        process = subprocess.Popen(
            [str(file)],
            env=os.environ | {"LSB_JOBID": job},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,
        )
    state["jobs"][job] = {
        "options": options, "command": script, "held": [], "process": process.pid,
    }  # fmt: skip
    path.write_text(json.dumps(state))
    print(f"Job <{job}> is submitted to default queue <normal>.")
    return 0


def alive(process: int | None) -> bool:
    return process is not None and Path(f"/proc/{process}").exists()


def complain(text: str) -> int:
    print(text, file=sys.stderr)
    return 255


if __name__ == "__main__":
    sys.exit(main())
