"""Carry out a study by Slurm: one job array for each generation of runs, one after another, then tests and report.

    bash run_all.sh --slurm "--partition=gpu --gres=gpu:1 --time=2:00:00"          # submits all jobs and leaves
    bash run_all.sh --slurm "--partition=gpu --gres=gpu:1 --time=2:00:00" --jobs 8  # at most eight runs at a time

run_all.sh calls `slurm.py submit`, and every task of an array `slurm.py train`, which carries out one line of the plan.
Before its time limit a run writes a checkpoint and puts itself back into the queue. The folders of the study, the data and
the environment must lie on a file system that all nodes share. Standard library only, but for a look at the job's GPUs.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from carry_out import STOPPED_BY, Files, carry_out, is_finished, is_stale, record_of, run_name
from study import PlanError, PlanLine, generations, one_line, quote, read_args, read_plan

HERE = Path(__file__).resolve().parent
WARNING_SECONDS = 120  # before the time limit a run is asked for a checkpoint
TIME_LIMIT_CODE = STOPPED_BY[signal.SIGUSR1]
CHECKPOINT = re.compile(rb"checkpoint written at step (\d+) ")  # what a stopped training says last


# ----------------------------------------------------------------------------------------------------------------------
# Submitting


def check_request(args: argparse.Namespace) -> None:
    """Refuse what cannot be submitted, before anything is written."""
    if args.dry_run:
        return
    if shutil.which("sbatch") is None:
        raise PlanError("--slurm: sbatch not found; start this on a login node of a Slurm cluster, or use --jobs here")
    refuse_while_queued(Path(args.output))


def refuse_while_queued(study: Path) -> None:
    """Refuse to work in a study whose jobs still wait or run."""
    submitted = read_jobs(study)
    if not submitted or shutil.which("squeue") is None:
        return
    try:
        mine = ask("squeue", "--me", "--noheader", "--format=%F")  # %F: the array's number, or the job's own
    except PlanError as error:
        advice = f"repeat this later, or remove {quote(str(jobs_file(study)))} if no job of this study is left"
        raise PlanError(f"{error}; {advice}") from None
    queued = [job for job in submitted if job in mine.split()]
    if queued:
        jobs = " ".join(queued)
        problem = f"jobs of {quote(str(study))} are still in the queue ({jobs})"
        raise PlanError(f"{problem}; wait for them, or end them first with: scancel {jobs}")


def jobs_file(study: Path) -> Path:
    """Name the file that lists the jobs of a study."""
    return study / "logs" / "slurm.jobs"


def read_jobs(study: Path) -> list[str]:
    """Read the numbers of the jobs that were submitted last."""
    try:
        return jobs_file(study).read_text().split()
    except FileNotFoundError:
        return []


def ask(*command: str) -> str:
    """Run one of Slurm's commands -> what it printed. Raises PlanError with its own words if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=False)
    except FileNotFoundError:
        raise PlanError(f"{command[0]} not found; start this on a login node of the Slurm cluster") from None
    if done.returncode == 0:
        return done.stdout
    words = (done.stderr or done.stdout).split("\n")[0].strip() or f"exit code {done.returncode}"
    raise PlanError(f"{command[0]} refused: {words}")


def read_number(answer: str) -> str:
    """Read what sbatch --parsable answers: the number of the job, which a cluster's name may follow."""
    last = answer.strip().split("\n")[-1]  # some sites print a greeting first
    number = last.split(";")[0]
    if not number.isdecimal():
        raise PlanError(f"sbatch answered {one_line(last)!r} instead of a job's number; look at the flags in --slurm")
    return number


class Queue:
    """Submits jobs; in a dry run prints the same lines for a shell, with variables in place of the jobs' numbers."""

    def __init__(self, args: argparse.Namespace):
        self.study = Path(args.output)
        self.dry_run = args.dry_run
        self.title = self.study.absolute().name
        self.flags = args.slurm
        self.submitted: list[str] = []
        if not self.dry_run:
            self.study.joinpath("logs").mkdir(parents=True, exist_ok=True)
            jobs_file(self.study).unlink(missing_ok=True)

    def submit(self, name: str, command: list[str], *options: str) -> str:
        """Submit a job that becomes a command -> its number. A refusal takes back what was submitted before."""
        words = ["sbatch", "--parsable", f"--job-name={self.title}-{name}", *self._common(), *self.flags, *options]
        words.append(f"--wrap=exec {shlex.join(command)}")
        if self.dry_run:
            # Numbers of earlier jobs are variables, which single quotes would hide.
            line = shlex.join(words)
            line = re.sub(r"'(--dependency=[a-z]+:[$:a-z0-9]+)'", r'"\1"', line)
            print(f"\n{name}=$({line})")
            return f"${name}"
        try:
            number = read_number(ask(*words))
        except PlanError as error:
            raise PlanError(f"{error}{self.take_back()}") from None
        self.submitted.append(number)
        with open(jobs_file(self.study), "a") as file:
            file.write(f"{number}\n")
        return number

    def _common(self) -> list[str]:
        """Give the options of every job; the user's own come after them and win."""
        logs = str(self.study / "logs" / "slurm-").replace("%", "%%")
        return [
            f"--output={logs}%x-%A.%a.out",
            "--open-mode=append",  # a job that was put back into the queue goes on in the same file
            "--requeue",
            f"--signal=B:USR1@{WARNING_SECONDS}",
            "--kill-on-invalid-dep=yes",
        ]

    def take_back(self) -> str:
        """Cancel what was submitted, for half a chain would end in a report without runs -> what to add to the refusal."""
        if not self.submitted:
            return "; nothing was submitted"
        jobs = " ".join(self.submitted)
        try:
            ask("scancel", *self.submitted)
        except PlanError as error:
            return f"; and {error}: end the jobs before it with: scancel {jobs}"
        jobs_file(self.study).unlink(missing_ok=True)
        return f"; the jobs before it were cancelled ({jobs})"


def unfinished_rows(study: Path, plan: list[PlanLine], flags: list[str]) -> set[int]:
    """Number the lines of a plan, from 1, that have not finished or start from one that will be trained again."""
    rows = set()
    again = set()
    for row, line in enumerate(plan, 1):
        files = Files(study, line)
        done = is_finished(files, record_of(line, flags)) and not is_stale(files)
        done = done and not files.failure.exists()  # of other flags that were refused meanwhile; its job removes it
        if not done or line.parent in again:
            rows.add(row)
            again.add(line.folder)
    return rows


def array_of(rows: list[int], at_once: int | None) -> str:
    """Write the rows of an array as sbatch takes them: [1, 2, 3, 7], 2 -> 1-3,7%2."""
    parts: list[list[int]] = []
    for row in rows:
        if parts and row == parts[-1][1] + 1:
            parts[-1][1] = row
        else:
            parts.append([row, row])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
    return f"{text}%{at_once}" if at_once else text


def device_flags(args: argparse.Namespace) -> list[str]:
    """Give the flags of the trainings: those of run_all.sh on the same kind of machine, so that a study may go on there."""
    return ["--device", "cpu"] if args.gpus == 0 else []


def submit(table: Path, words: list[str]) -> None:
    """Submit what is left of a study: reading, an array for each generation of runs, tests and report."""
    args = read_args(words, "run_all.sh")
    check_request(args)
    study = Path(args.output)
    plan = read_plan(table)
    flags = device_flags(args)
    rows = unfinished_rows(study, plan, flags)
    queue = Queue(args)
    words = [word for word in words if word != "--dry_run"]
    script = ["bash", str(HERE / "run_all.sh"), *words]
    if args.dry_run:
        show_preparation(study, words)
    earlier = []
    if rows:
        earlier.append(queue.submit("read", ["env", "RUN_ALL_PART=read", *script]))
    for number, lines in enumerate(generations(plan), 1):
        wanted = [row for row, line in enumerate(plan, 1) if row in rows and line in lines]
        if not wanted:
            continue
        train = [sys.executable, str(HERE / "slurm.py"), "train", str(study), *flags]
        # Without its data a run cannot be made. A failed run stops no other, so the next generation is asked anyway.
        kind = "afterok" if len(earlier) == 1 else "afterany"
        options = [f"--array={array_of(wanted, args.jobs)}", f"--dependency={kind}:{earlier[-1]}"]
        earlier.append(queue.submit(f"runs{number}", train, *options))
    options = [f"--dependency=afterany:{':'.join(earlier)}"] if earlier else []
    queue.submit("report", ["env", "RUN_ALL_PART=report", *script], *options)
    if not args.dry_run:
        explain(study, len(rows), len(plan), queue.submitted)


def show_preparation(study: Path, words: list[str]) -> None:
    """Print what must be there before the jobs: the folder of their logs, and the plan."""
    plan = shlex.join([sys.executable, str(HERE / "study.py"), "plan", *words])
    print(f"\nmkdir -p {quote(str(study / 'logs'))}\n\n{plan} > {quote(str(study / 'study.tsv'))}")


def explain(study: Path, left: int, total: int, jobs: list[str]) -> None:
    """Say what was submitted, and how to look at it."""
    print(f"\n{left} of {total} runs are left; submitted as jobs {' '.join(jobs)}, the last one tests and reports.")
    print(f"  look:    python study.py status {quote(str(study))}; squeue --me")
    print(f"  end it:  scancel {' '.join(jobs)}   (running trainings write a checkpoint)")
    print("  repeat:  the same run_all.sh command submits what is not finished.", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Inside a job


def train(study: Path, flags: list[str]) -> int:
    """Carry out the line of the plan that this task of an array is for -> exit code."""
    plan = read_plan(study / "study.tsv")
    row = int(os.environ["SLURM_ARRAY_TASK_ID"])
    if not 1 <= row <= len(plan):
        raise PlanError(f"the plan of {study} has no line {row}; repeat the run_all.sh command")
    line = plan[row - 1]
    files = Files(study, line)
    launch = launcher(on_cpu="cpu" in flags)
    before = last_checkpoint(files.log)
    way = argparse.Namespace(flags=flags, launch=launch, quiet=True, wait=False, dry_run=False)
    code = carry_out(study, line, way)
    if code != TIME_LIMIT_CODE:
        return code
    after = last_checkpoint(files.log)
    if after == before:
        fail(files, f"{run_name(line)} made no update within its time limit; repeat run_all.sh with a longer --time")
        return 1
    print(f"   {run_name(line)}: the time limit is near; back into the queue from step {after}", flush=True)
    ask("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
    return 0


def fail(files: Files, problem: str) -> None:
    """Say what failed, here and in the file that the last job lists."""
    files.failure.parent.mkdir(parents=True, exist_ok=True)
    files.failure.write_text(f"run_all.sh: {problem}\n  log:     {files.log}\n", errors="surrogateescape")
    print(problem, file=sys.stderr, flush=True)


def last_checkpoint(log: Path) -> int:
    """Read the step of the last checkpoint that a stopped training told of; 0 if there is none."""
    try:
        told = CHECKPOINT.findall(log.read_bytes())
    except FileNotFoundError:
        return 0
    return int(told[-1]) if told else 0


def launcher(on_cpu: bool) -> list[str]:
    """Give what starts a script in this job: one process for each of its GPUs, or one with the job's cores."""
    if on_cpu:
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_ON_NODE", "1"))
        return [sys.executable]
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 0:
        advice = 'ask for one in --slurm "--gres=gpu:1 ...", or train on CPUs with --gpus 0'
        raise PlanError(f"job {os.environ.get('SLURM_JOB_ID', '')} sees no GPU; {advice}")
    if gpus == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]


def main(words: list[str]) -> int:
    """Submit a study, or carry out one of its runs in a job."""
    what, *rest = words or [""]
    if what == "submit" and rest:
        submit(Path(rest[0]), rest[1:])
        return 0
    if what == "train" and rest and "SLURM_ARRAY_TASK_ID" in os.environ:
        return train(Path(rest[0]), rest[1:])
    if what == "queued" and rest:
        refuse_while_queued(Path(rest[0]))
        return 0
    raise PlanError('slurm.py is called by run_all.sh; say: bash run_all.sh --slurm "--gres=gpu:1 --time=2:00:00"')


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="surrogateescape")
    sys.stderr.reconfigure(errors="surrogateescape")
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"run_all.sh: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
