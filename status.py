"""Tell how far a study is, from its plan and logs alone, also while it runs.

    python status.py runs/study                    # a table of all runs: state, step, rate, time left
    python status.py runs/study --watch            # one line every few seconds, as run_all.sh --jobs shows it

Standard library only.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from arms import Arm, find_arm
from carry_out import Files, is_held, takes_much_memory
from study import DEFAULT_TASK, PlanLine, PlanParser, flag_values, one_line, read_plan

PURPOSES = {
    "pretrain": "learning to fill in hidden patches of {images}",
    "finetune": "learning to {goal} after pre-training on {images}",
    "baseline": "learning to {goal} from random weights ({label})",
    "mae": "learning to fill in hidden patches of {images}",
    "tokens": "learning to name hidden patches of {images}",
    "splitmask": "learning to name and to match the halves of {images}",
    "ijepa": "learning to predict features of hidden parts of {images}",
    "dino": "learning to see two crops of {images} alike",
    "labels": "learning what images show ({images})",
}
GOALS = {"segment": "outline pets", "breeds": "tell breeds apart", "classify": "tell classes apart"}
# How long a run takes compared with the others, until one of its kind has begun: roughly the demo's on two
# cores, which ResNet-50 has both of.
USUAL = {("pretrain", ""): 2.4, ("labels", ""): 1.5, ("train", ""): 1.0, ("train", "resnet50"): 1.3}
QUIET_SECONDS = 15  # between lines where there is no terminal
STALE_SECONDS = 300  # without a new line in its log a run is taken for stopped


@dataclass
class Progress:
    """How far one run is."""

    line: PlanLine
    arm: Arm
    state: str  # waiting, running, finished, failed
    step: int = 0
    updates: int | None = None  # all that it will make
    seconds: float = 0.0  # of training so far

    @property
    def kind(self) -> tuple[str, str]:
        """Runs of one kind take about as long for an update."""
        if self.line.stage != "pretrain":
            return "train", self.arm.network
        return self.arm.flags.get("objective", "pretrain"), self.arm.network

    @property
    def purpose(self) -> str:
        """Say what the run does and why."""
        task = (flag_values(self.line.command.split(), "--task") or [DEFAULT_TASK])[-1]
        goal = GOALS.get(task, f"do {task}")
        purpose = self.arm.flags.get("objective", self.line.stage)
        return PURPOSES[purpose].format(goal=goal, images=self.arm.images, label=self.arm.label)


def last_step(log: Path) -> tuple[int, float]:
    """Read the last complete line of log.jsonl that has a step -> (step, seconds)."""
    try:
        with open(log, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 20_000))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:  # not written yet, or removed because the run is repeated
        return 0, 0.0
    for text in reversed(lines):
        try:
            entry = json.loads(text)
            return int(entry["step"]), float(entry["seconds"])
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    return 0, 0.0


def read_progress(study: Path, line: PlanLine) -> Progress:
    """Read how far a run is."""
    arm = find_arm(line.stage, line.arm, line.sweep, line.value)
    files = Files(study, line)
    progress = Progress(line, arm, "waiting")
    if not files.config.exists():
        if files.failure.exists():
            progress.state = "failed"
        return progress
    try:
        progress.updates = int(json.loads(files.config.read_text())["updates"])
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        return progress
    progress.step, progress.seconds = last_step(files.folder / "log.jsonl")
    if files.failure.exists():  # also of a finished run, whose new flags were refused
        progress.state = "failed"
    elif files.metrics.exists():
        progress.state = "finished"
        progress.step = progress.updates
    else:
        progress.state = "running" if is_running(files) else "stopped"
    return progress


def is_running(files: Files) -> bool:
    """Tell whether a run is being carried out; of one that was started by hand, whether it has written to its log lately."""
    if files.lock.exists():
        return is_held(files.lock)
    newest = 0.0
    for path in (files.config, files.folder / "log.jsonl", files.log):
        with contextlib.suppress(FileNotFoundError):  # a run that is repeated is removed first
            newest = max(newest, path.stat().st_mtime)
    return time.time() - newest < STALE_SECONDS


def seconds_of_kinds(runs: list[Progress]) -> dict[tuple[str, str], float]:
    """Estimate how long a run of each kind takes, from those that have made some steps; empty if none has."""
    measured: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run.step > 0 and run.updates:
            measured.setdefault(run.kind, []).append(run.updates * run.seconds / run.step)
    known = {kind: statistics.median(values) for kind, values in measured.items()}
    if not known:
        return {}
    scale = statistics.median(seconds / USUAL.get(kind, 1.0) for kind, seconds in known.items())
    kinds = {run.kind for run in runs}
    return {kind: known.get(kind, scale * USUAL.get(kind, 1.0)) for kind in kinds}


def seconds_left(runs: list[Progress], jobs: int) -> float | None:
    """Estimate the time that all trainings still take; None before the first steps of the first one."""
    usual = seconds_of_kinds(runs)
    if not usual:
        return None
    alone = 0.0
    side_by_side = []
    for run in runs:
        if run.state in ("finished", "failed"):
            continue
        done = run.step / run.updates if run.updates else 0.0
        seconds = (1 - done) * usual[run.kind]
        if takes_much_memory(run.line):
            alone += seconds
        else:
            side_by_side.append(seconds)
    return alone + sum(side_by_side) / max(1, min(jobs, len(side_by_side)))


def show_seconds(seconds: float | None) -> str:
    """Format a duration; what is not known yet is said."""
    if seconds is None:
        return "not known yet"
    minutes = int(seconds + 0.5) // 60
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if minutes:
        return f"{minutes} min {int(seconds + 0.5) % 60:02d} s"
    return f"{seconds:.0f} s"


def summary(runs: list[Progress], jobs: int) -> str:
    """Say in a line what runs, why, and how long it still takes."""
    finished = sum(run.state == "finished" for run in runs)
    parts = [f"{finished} of {len(runs)} trainings finished"]
    failed = sum(run.state == "failed" for run in runs)
    if failed:
        parts.append(f"{failed} failed")
    for run in runs:
        if run.state == "running":
            share = 100 * run.step / max(1, run.updates)
            parts.append(f"{run.purpose} ({share:.0f} %)")
    left = seconds_left(runs, jobs)
    about = "" if left is None else "about "
    return f"{'; '.join(parts)}; time left: {about}{show_seconds(left)}"


def watch(study: Path, plan: list[PlanLine], jobs: int) -> None:
    """Repeat the summary until this process is ended: in place on a terminal, as plain lines otherwise."""
    on_terminal = sys.stderr.isatty()
    shown = ""
    while True:
        text = summary([read_progress(study, line) for line in plan], jobs)
        if on_terminal:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{text[:width]}")
            sys.stderr.flush()
            time.sleep(1)
        else:
            if text != shown:
                print(text, file=sys.stderr, flush=True)
            shown = text
            time.sleep(QUIET_SECONDS)


def print_table(runs: list[Progress]) -> None:
    """Print the state of all runs in columns."""
    rows = [("run", "state", "update", "of", "updates/s", "time left")]
    for run in runs:
        pace = run.step / run.seconds if run.seconds else 0.0
        left = "–"
        if run.state == "running" and pace:
            left = show_seconds((run.updates - run.step) / pace)
        of = f"{run.updates:,}" if run.updates else "–"
        rows.append((run.line.folder, run.state, f"{run.step:,}", of, f"{pace:.2f}" if pace else "–", left))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join(cells))


def get_args_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = PlanParser("status.py", allow_abbrev=False, description="How far a study is")
    parser.add_argument("study", type=Path, help="folder that run_all.sh writes, with study.tsv")
    parser.add_argument("--watch", action="store_true", help="repeat one line until interrupted")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, for the time left")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the state of a study once, or again and again."""
    plan = read_plan(args.study / "study.tsv")
    if args.watch:
        watch(args.study, plan, args.jobs)
    runs = [read_progress(args.study, line) for line in plan]
    print_table(runs)
    print(summary(runs, args.jobs))


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of this output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"status.py: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
