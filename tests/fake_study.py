"""A study whose scripts train nothing: to test what run_all.sh, carry_out.py and status.py do with them, without torch."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from carry_out import Files
from study import PlanLine, quote, read_plan, write_lines

ROOT = Path(__file__).parents[1]
DEADLINE = 60  # seconds
SCRIPTS = (
    "run_all.sh",
    "setup.sh",
    "requirements.txt",
    "study.py",
    "arms.py",
    "protocols.py",
    "carry_out.py",
    "slurm.py",
    "status.py",
)

# A training appends to "starts" in its folder, does what the environment variable FAKE says for the folder's name (an exit
# code, or "wait" for a stop request and the file "release" next to the plan), and leaves what a finished run leaves. One
# that was stopped tells of a checkpoint at the step that FAKE_STEP says.
TRAINING = """
import json, os, pathlib, signal, sys, time

folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
stops = []
signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    start = {"words": sys.argv[1:], "pid": os.getpid()}
    start["gpus"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    start["threads"] = os.environ.get("OMP_NUM_THREADS")
    file.write(json.dumps(start) + "\\n")
print(folder.name, "says hello", flush=True)
wanted = json.loads(os.environ.get("FAKE", "{}")).get(folder.name, 0)
end = time.monotonic() + 60
code = wanted
if isinstance(wanted, str):
    _, code = wanted.split()
    while time.monotonic() < end and not (stops and (folder.parent.parent / "release").exists()):
        time.sleep(0.01)
        if stops:
            (folder / "stopped").touch()
    (folder / "stops").write_text(str(len(stops)))
    print("checkpoint written at step", os.environ.get("FAKE_STEP", "3"), "of 10", flush=True)
(folder / "config.json").write_text(json.dumps({"updates": 10}))
if int(code) == 0:
    (folder / "metrics.json").write_text("{}")
sys.exit(int(code))
"""
# Whatever else run_all.sh calls; what FAKE names waits for a stop request and then ends well.
OTHER = """
import json, os, pathlib, signal, sys, time

print(" ".join(sys.argv), flush=True)
name = pathlib.Path(sys.argv[0]).name
stops = []
signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))
if name in json.loads(os.environ.get("FAKE", "{}")):
    pathlib.Path(f"{name}.started").touch()
    end = time.monotonic() + 60
    while time.monotonic() < end and not stops:
        time.sleep(0.01)
    print(name, "ends well", flush=True)
"""


def make_scripts(folder: Path) -> Path:
    """Copy the real scripts that start trainings, and write fake ones for all others."""
    folder.mkdir(exist_ok=True)
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder)
    for name in ("pretrain.py", "finetune.py", "baseline.py"):
        (folder / name).write_text(TRAINING)
    for name in ("prepare.py", "evaluate.py", "report.py", "check_plan.py", "read_data.py"):
        (folder / name).write_text(OTHER)
    return folder


def environment(fake: dict | None = None, **more: str) -> dict[str, str]:
    """Return the environment of a script: this interpreter first, and how fake trainings behave."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {
        name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    }
    return {**kept, "PATH": path, "FAKE": json.dumps(fake or {}), **more}


def plan_line(study: Path, stage: str, arm: str, *more: str, parent: str = "") -> PlanLine:
    """Write a line of a plan by hand."""
    folder = f"seed0/{stage}_{arm}"
    words = [f"{stage}.py", *more, "--output_dir", str(study / folder)]
    command = " ".join(quote(word) for word in words)
    return PlanLine(0, stage, arm, folder, parent, "", None, command)


def make_plan(study: Path, *more: str) -> list[PlanLine]:
    """Write the plan of a pre-training, a fine-tuning of it and a baseline into a study's folder; `more` are flags."""
    lines = [
        plan_line(study, "pretrain", "animal", *more),
        plan_line(study, "finetune", "animal", *more, parent="seed0/pretrain_animal"),
        plan_line(study, "baseline", "mae", *more),
    ]
    study.mkdir(exist_ok=True)
    (study / "study.tsv").write_text(write_lines(lines))
    return lines


def files_of(study: Path, folder: str) -> Files:
    """Name the files of a run of a study's plan."""
    for line in read_plan(study / "study.tsv"):
        if line.folder == folder:
            return Files(study, line)
    raise AssertionError(folder)


def starts(study: Path, folder: str) -> list[dict]:
    """Read what each start of a run saw."""
    path = study / folder / "starts"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(ready: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until something is so, while a process runs."""

    def is_ready() -> bool:
        if ready():
            return True
        assert process.poll() is None, process.communicate()
        return False

    wait_until(is_ready)


def wait_until(ready: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + DEADLINE
    while not ready():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """Wait for the end of a process -> what it printed on both streams."""
    try:
        return process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
