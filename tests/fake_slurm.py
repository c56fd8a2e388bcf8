"""Slurm's commands as stand-ins that write down what they were asked, and a queue that runs what was submitted."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fake_study import DEADLINE

# sbatch numbers jobs from 100 on and refuses the one that FAKE_SBATCH_REFUSES counts; squeue shows what the file "queue"
# holds.
PROGRAM = """#!{python}
import json, os, pathlib, sys

state = pathlib.Path({state!r})
name = pathlib.Path(sys.argv[0]).name
asked = state / name
with open(asked, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
count = len(asked.read_text().splitlines())
if name == "sbatch":
    if os.environ.get("FAKE_SBATCH_REFUSES") == str(count):
        sys.exit("sbatch: error: invalid partition specified: nowhere\\nsbatch: error: Batch job submission failed")
    print(99 + count)
if name == "squeue":
    print((state / "queue").read_text() if (state / "queue").exists() else "")
"""


@dataclass
class Job:
    """One job that was submitted."""

    number: int
    options: dict[str, str]

    @property
    def tasks(self) -> list[int | None]:
        """Numbers of the array's tasks; [None] if the job is no array."""
        if "--array" not in self.options:
            return [None]
        return expand(self.options["--array"])


def expand(array: str) -> list[int]:
    """Read what sbatch takes for --array: 1-3,7%2 -> [1, 2, 3, 7]."""
    numbers = []
    for part in array.split("%")[0].split(","):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


class FakeSlurm:
    """A folder with the commands, for PATH, and what they wrote down."""

    def __init__(self, folder: Path):
        self.state = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        for name in ("sbatch", "squeue", "scancel", "scontrol"):
            program = self.bin / name
            program.write_text(PROGRAM.format(python=sys.executable, state=str(folder)))
            program.chmod(0o755)

    def path(self, earlier: str) -> str:
        """Put the commands in front of PATH."""
        return f"{self.bin}{os.pathsep}{earlier}"

    def asked(self, name: str) -> list[list[str]]:
        """Read the words of each call of a command."""
        file = self.state / name
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines()]

    def jobs(self) -> list[Job]:
        """List the jobs that were submitted."""
        jobs = []
        for place, words in enumerate(self.asked("sbatch")):
            options = dict(word.partition("=")[::2] for word in words)
            jobs.append(Job(100 + place, options))
        return jobs

    def run(self, job: Job, cwd: Path, env: dict[str, str]) -> list[int]:
        """Run a job, its tasks one after another -> their exit codes."""
        codes = []
        for task in job.tasks:
            process = self.start(job, task, cwd, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            process.communicate(timeout=DEADLINE)
            codes.append(process.returncode)
        return codes

    def start(self, job: Job, task: int | None, cwd: Path, env: dict[str, str], **options) -> subprocess.Popen:
        """Start a task of a job as Slurm does: with a shell, and the variables that say which it is."""
        more = {"SLURM_JOB_ID": str(job.number), "SLURM_CPUS_ON_NODE": "1"}
        if task is not None:
            more["SLURM_ARRAY_TASK_ID"] = str(task)
        return subprocess.Popen(["sh", "-c", job.options["--wrap"]], cwd=cwd, env={**env, **more}, **options)
