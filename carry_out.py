"""Carry out one line of a study's plan: skip it, repeat it, or run it with a log. run_all.sh calls this for each line.

    python carry_out.py runs/study --run seed0/finetune_animal --flags "--device cpu"
    python carry_out.py runs/study --list in_order                # one after another, separated by NUL

A run that has finished under the same command is skipped; one whose parent was trained again is removed and repeated. A
stop request (SIGTERM, Ctrl-C) is passed on, so that the training writes a checkpoint. Standard library only.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from arms import RESNET
from study import PlanLine, PlanParser, generations, one_line, read_plan

HERE = Path(__file__).resolve().parent
LISTS = ("in_order", "side_by_side", "alone", "others", "unfinished", "tests", "untested")
START_SECONDS = 20  # in which a run that is to start has started
# SIGUSR1: Slurm says that a time limit is near.
STOPPED_BY = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}
SET_DEATH_SIGNAL = 1  # of prctl(2)


class Files:
    """What a run leaves in the study's folder."""

    def __init__(self, study: Path, line: PlanLine):
        name = run_name(line)
        self.folder = study / line.folder
        self.config = self.folder / "config.json"
        self.metrics = self.folder / "metrics.json"  # marks a finished run
        self.log = study / "logs" / f"{name}.log"
        self.command = study / "logs" / f"{name}.command"  # of the run that finished
        self.failure = study / "logs" / f"{name}.failed"
        self.lock = study / "logs" / f"{name}.lock"  # held while the run is carried out
        self.parent = study / line.parent / "metrics.json" if line.parent else None


def run_name(line: PlanLine) -> str:
    """Name a run in logs and messages."""
    return f"seed{line.seed}_{line.stage}_{line.arm}"


def find_line(plan: list[PlanLine], folder: str) -> PlanLine:
    """Find the line of a run. Raises ValueError if there is none."""
    for line in plan:
        if line.folder == folder:
            return line
    raise ValueError(f"the plan has no run {folder!r}")


def list_folders(study: Path, plan: list[PlanLine], which: str) -> list[str]:
    """List folders of runs, relative to the study's for --run; those of tests as paths.

    which: in_order (generation after generation), side_by_side (all, in the order that leaves no GPU idle), alone (those
    that a CPU makes with nothing beside them), others (side_by_side without these), unfinished, tests (whatever is
    tested), or untested (those of them that are finished and not tested yet).
    """
    if which == "in_order":
        return [line.folder for lines in generations(plan) for line in lines]
    if which == "alone":
        return [line.folder for line in plan if takes_much_memory(line)]
    if which in ("side_by_side", "others"):
        folders = []
        for lines in generations(plan):
            # ResNet-50 takes longest next to pre-training, so it begins early.
            lines = sorted(lines, key=lambda line: (line.seed, not takes_much_memory(line)))
            if which == "others":
                lines = [line for line in lines if not takes_much_memory(line)]
            folders.extend(line.folder for line in lines)
        return folders
    if which == "unfinished":
        return [line.folder for line in plan if is_unfinished(Files(study, line))]
    tested = [study / line.folder for line in plan if line.stage != "pretrain"]
    if which == "untested":
        tested = [folder for folder in tested if (folder / "metrics.json").exists() and not is_tested(folder)]
    return [str(folder) for folder in tested]


def takes_much_memory(line: PlanLine) -> bool:
    """Tell whether a run of the demo takes as much memory as three others: 1.8 GB of ResNet-50 against 0.6 GB."""
    return line.arm == RESNET.name


def is_unfinished(files: Files) -> bool:
    """Tell whether a run has not ended, or its last command failed, though one with other flags had ended well before."""
    return files.failure.exists() or not files.metrics.exists()


def is_finished(files: Files, command: str) -> bool:
    """Tell whether this very command has finished before."""
    if not files.metrics.exists() or not files.command.exists():
        return False
    return files.command.read_bytes() == os.fsencode(command)  # as text, a carriage return would be read as another


def read_entry(path: Path, *keys: str) -> object:
    """Read an entry of a JSON file; None where there is none, or the file is missing or damaged."""
    try:
        value = json.loads(path.read_text())
        for key in keys:
            value = value[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value


def is_stale(files: Files) -> bool:
    """Tell whether a run started from other weights than there are now; by hashes, for clocks may be wrong."""
    if files.parent is None or not files.config.exists() or not files.parent.exists():
        return False
    now = read_entry(files.parent, "files", "model.pt")
    then = read_entry(files.config, "experiment", "init")
    if now and then:
        return now != then
    return files.parent.stat().st_mtime_ns > files.config.stat().st_mtime_ns


def is_tested(folder: Path) -> bool:
    """Tell whether the test records of a run are of its weights."""
    weights = read_entry(folder / "metrics.json", "files", "model.pt")
    tested = read_entry(folder / "test.json", "weights")
    return tested is not None and tested == weights and (folder / "test.npz").exists()


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a run's lock, so that those which start from it can wait for its end; any death frees it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_held(path: Path) -> bool:
    """Tell whether a run is being carried out."""
    if not path.exists():
        return False
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


def ancestors(plan: list[PlanLine], line: PlanLine) -> list[PlanLine]:
    """List the run that a run starts from, the one that this starts from, and so on."""
    found = []
    while line.parent:
        line = find_line(plan, line.parent)
        found.append(line)
    return found


def wait_for(before: list[Files]) -> None:
    """Wait for the end of the run that another one starts from, if it runs or is about to; runs side by side need it.

    before: the run that it starts from, and those that this one waits for in turn.
    """
    parent = before[0]
    idle_since = time.monotonic()
    while time.monotonic() - idle_since < START_SECONDS:
        if any(is_held(files.lock) for files in before):
            idle_since = time.monotonic()
        elif parent.metrics.exists() or parent.failure.exists():
            return
        time.sleep(0.2)


def end_with_parent() -> None:
    """Ask the system to stop this process when its parent dies, which a killed parent cannot do any more (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGTERM)


class Child:
    """A training in a session of its own, so that only this process decides what reaches it."""

    def __init__(self, words: list[str], output: BinaryIO | int):
        self.stop_signal = 0
        self.has_passed_on = False
        for number in STOPPED_BY:
            signal.signal(number, self._take)
        self.process = None
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        options = {"stdout": output, "stderr": subprocess.STDOUT, "env": environment}
        self.process = subprocess.Popen(words, start_new_session=True, preexec_fn=end_with_parent, **options)
        if self.stop_signal:  # it came while the process was made
            self._pass_on()

    def _take(self, number: int, frame: object) -> None:
        if not self.stop_signal:
            self.stop_signal = number
        self._pass_on()

    def _pass_on(self) -> None:
        """Ask the training to stop, once: Ctrl-C reaches this process from the terminal and from run_all.sh."""
        if self.process is None or self.has_passed_on:
            return
        self.has_passed_on = True
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def wait(self) -> int:
        """Wait for the end -> exit code: that of the stop request, unless the training failed for another reason."""
        code = self.process.wait()
        if code < 0:
            code = 128 - code
        if self.stop_signal and code in (0, *STOPPED_BY.values()):
            return STOPPED_BY[self.stop_signal]
        if code == 255:
            return 1  # at 255 xargs would start no further run
        return code


def copy_output(source: BinaryIO, log: BinaryIO) -> None:
    """Copy what a training prints to its log and to the screen, as it comes."""
    while block := source.read1(1 << 16):
        log.write(block)
        log.flush()
        sys.stdout.buffer.write(block)
        sys.stdout.buffer.flush()


def run_logged(words: list[str], log: Path, on_screen: bool) -> int:
    """Run a command with its output in a log, and on the screen if wanted -> exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"{shlex.join(words)}\n".encode(errors="surrogateescape"))
        file.flush()
        if not on_screen:
            return Child(words, file).wait()
        child = Child(words, subprocess.PIPE)
        copy_output(child.process.stdout, file)
        return child.wait()


def bash_words(command: str) -> list[str]:
    """Split a command of the plan, which is quoted for bash (study.quote), also where it holds $'...'."""
    script = 'eval "words=($1)"; printf "%s\\0" "${words[@]}"'
    output = subprocess.run(["bash", "-c", script, "bash", command], capture_output=True, check=True).stdout
    return [os.fsdecode(word) for word in output.split(b"\0")[:-1]]


def command_of(line: PlanLine, flags: list[str]) -> list[str]:
    """Give the command of a run without what starts a script: the plan's, and flags that depend on the machine."""
    script, *words = bash_words(line.command)
    return [str(HERE / script), *words, *flags]


def record_of(line: PlanLine, flags: list[str]) -> str:
    """Write the command as it is recorded when the run has finished."""
    return shlex.join(command_of(line, flags))


def carry_out(study: Path, line: PlanLine, args: argparse.Namespace) -> int:
    """Run a line of the plan, unless it is finished -> exit code."""
    name = run_name(line)
    files = Files(study, line)
    command = command_of(line, args.flags)
    words = [*args.launch, *command]
    if args.dry_run:
        print(f"\n== {name}\n$ {shlex.join(words)}", flush=True)
        return 0
    if args.wait and line.parent:
        wait_for([Files(study, earlier) for earlier in ancestors(read_plan(args.plan), line)])
    if files.parent is not None and not files.parent.exists():
        print(f"== {name}: not run, for {line.parent} is not finished", file=sys.stderr, flush=True)
        return 1
    record = shlex.join(command)
    if is_finished(files, record) and not is_stale(files):
        files.failure.unlink(missing_ok=True)  # of other flags that were refused meanwhile
        print(f"== {name}: finished before, skipped", flush=True)
        return 0
    if is_stale(files):
        print(f"== {name}: what it starts from has been trained again, so it is repeated", flush=True)
        shutil.rmtree(files.folder)
    if not args.quiet:
        print(f"\n== {name}\n$ {shlex.join(words)}", flush=True)
    files.failure.unlink(missing_ok=True)
    start = time.monotonic()
    with held(files.lock):
        code = run_logged(words, files.log, on_screen=not args.quiet)
    seconds = time.monotonic() - start
    if code == 0:
        # Without the launcher, which differs between nodes; after success, so that a refused command is refused again.
        files.command.write_bytes(os.fsencode(record))
        print(f"   {name}: {seconds:.0f} s", flush=True)
        return 0
    explain_failure(name, files, words, code, seconds)
    return code


def explain_failure(name: str, files: Files, words: list[str], code: int, seconds: float) -> None:
    """Say what failed and how to repeat it, here and in a file that run_all.sh lists at its end."""
    text = (
        f"run_all.sh: stage {name} failed with exit code {code} after {seconds:.0f} s.\n"
        f"  log:     {files.log}\n"
        f"  repeat:  {shlex.join(words)}\n"
        "  then the same run_all.sh command goes on from there.\n"
    )
    if code in STOPPED_BY.values():
        text = text.replace("failed with exit code", "was stopped, exit code")
    else:
        files.failure.write_text(text, errors="surrogateescape")
    print(f"\n{text}", end="", file=sys.stderr, flush=True)


def get_args_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = PlanParser("carry_out.py", allow_abbrev=False, description="Carry out one line of a study's plan")
    parser.add_argument("study", type=Path, help="the study's folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="FOLDER", help="the run to carry out, as the plan names its folder")
    what.add_argument("--list", choices=LISTS, help="list folders instead")
    parser.add_argument("--plan", type=Path, help="table of runs (default: study.tsv in the study's folder)")
    parser.add_argument("--launch", type=bash_words, default=[sys.executable], help="what starts a script")
    parser.add_argument("--flags", type=shlex.split, default=[], help="further flags of the script")
    parser.add_argument("--quiet", action="store_true", help="output to the log alone")
    parser.add_argument("--wait", action="store_true", help="wait for the run that it starts from, if that one runs")
    parser.add_argument("--dry_run", action="store_true", help="show the command and leave")
    return parser


def gpu_of_slot(slot: int, visible: str) -> str:
    """Name the GPU of a slot of xargs, among those that CUDA_VISIBLE_DEVICES names, or all if it is empty."""
    if not visible:
        return str(slot)
    names = visible.split(",")
    if slot >= len(names):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible} leaves no GPU for run {slot + 1}; lower --gpus and --jobs")
    return names[slot].strip()


def main(args: argparse.Namespace) -> int:
    """Carry out a line, or list lines."""
    args.plan = args.plan or args.study / "study.tsv"
    plan = read_plan(args.plan)
    if args.list:
        folders = list_folders(args.study, plan, args.list)
        sys.stdout.write("".join(f"{folder}\0" for folder in folders))
        return 0
    if int(os.environ.get("JOB_GPUS", "0")) > 0:  # runs side by side: each slot of xargs is a GPU
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_of_slot(int(os.environ["JOB_SLOT"]), visible)
    end_with_parent()
    return carry_out(args.study, find_line(plan, args.run), args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="surrogateescape")
    sys.stderr.reconfigure(errors="surrogateescape")
    try:
        sys.exit(main(get_args_parser().parse_args()))
    except (ValueError, OSError) as error:
        print(f"carry_out.py: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
