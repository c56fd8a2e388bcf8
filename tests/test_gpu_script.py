"""tests/gpu.sh runs every part at tiny size on a CPU, and says in one line what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PARTS = "tests pretrain finetune resnet50 rest products scaling objectives choices study"


def command_of(*words) -> list[str]:
    return ["bash", str(ROOT / "tests/gpu.sh"), *map(str, words)]


def environment(**more) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"} | more


def gpu_script(*words, **env):
    return subprocess.run(command_of(*words), capture_output=True, text=True, env=environment(**env), timeout=900)


def verdicts(folder: Path) -> list[str]:
    """Read what became of each part."""
    return [line.split(" after")[0] for line in (folder / "summary.txt").read_text().splitlines()]


def measurements(folder: Path) -> list[dict]:
    """Read the lines that the parts wrote."""
    return [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]


def test_a_failed_part_stops_no_other_and_a_report_has_the_measurements_of_those(tmp_path):
    done = gpu_script(
        "--rehearse", "--output", tmp_path, "choices", "products", CHOICES="AdamW, foreach;no such choice"
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(f"gpu.sh: failed: choices; logs in {tmp_path}")
    assert verdicts(tmp_path) == ["== choices: FAILED", "== products: done"]
    assert "invalid choice: 'no such choice'" in (tmp_path / "choices.log").read_text()
    assert [row["task"] for row in measurements(tmp_path)] == ["products", "products"]
    assert "its matrix products alone" in (tmp_path / "BENCHMARKS.md").read_text()
    assert (tmp_path / "products.log").read_text()


def test_a_stopped_part_leaves_no_process_and_is_named(tmp_path):
    words = command_of("--rehearse", "--output", "out", "products", "scaling")
    output = tmp_path / "out"
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path) as script:
        for line in script.stdout:
            if line.startswith("decoding"):  # bench.py is at work
                break
        script.terminate()
        rest = script.stdout.read()  # ends when no process holds the pipe any more
    assert script.returncode == 143, rest
    assert verdicts(output) == ["== products: stopped"]


@pytest.mark.slow
def test_a_rehearsed_study_ends_in_its_report(tmp_path):
    parts = ("choices", "study")
    done = gpu_script("--rehearse", "--output", tmp_path, *parts, CHOICES="rows picked by torch.gather")
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(tmp_path) == [f"== {part}: done" for part in parts]
    rows = measurements(tmp_path)
    assert [row["task"] for row in rows] == ["choices", "choices"]
    assert rows[-1]["variant"] == "rows picked by torch.gather"
    assert (tmp_path / "study/report/report.html").exists()
    assert "The study is finished" in (tmp_path / "study.log").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["everything"], f"unknown part everything; parts are {PARTS}"),
        (["tests study"], f"unknown part tests study; parts are {PARTS}"),
        (["--output"], "--output needs a folder"),
        (["--output", "--rehearse"], "--output needs a folder"),
    ],
)
def test_wrong_use_ends_in_one_line(words, message):
    done = gpu_script(*words)
    assert done.returncode == 2
    assert done.stderr == f"gpu.sh: error: {message}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_rehearsal_is_offered(tmp_path):
    done = gpu_script("--output", tmp_path / "out", "pretrain")
    assert done.returncode == 2
    assert "torch sees no GPU; --rehearse runs the same" in done.stderr
    assert not (tmp_path / "out").exists()
