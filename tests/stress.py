"""Kill a training with SIGKILL at random moments, resume it, and demand the result of an undisturbed run, bit for bit.

python tests/stress.py 20        # pre-training and fine-tuning, 20 kills each (the suite does 3)
"""

import contextlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TIMINGS = ("seconds", "img_s", "mfu", "mem_gb")


def command(script: str, *flags) -> list[str]:
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]


def result_of(folder: Path) -> tuple:
    """Weights, metrics and log of a finished run, without what time and place put into them."""
    weights = torch.load(folder / "model.pt", weights_only=True)["model"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    texts = [{k: v for k, v in line.items() if k not in (*TIMINGS, "args")} for line in lines]
    metrics = json.loads((folder / "metrics.json").read_text())
    return weights, texts, {k: v for k, v in metrics.items() if k not in TIMINGS}


def assert_same(a: Path, b: Path) -> None:
    first, second = result_of(a), result_of(b)
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(first[0][k], second[0][k]) for k in first[0]), "weights differ"
    assert first[1] == second[1], "logs differ"
    assert first[2] == second[2], "metrics differ"


def start_and_kill(args: list[str], epochs: int, seconds: float) -> str:
    """Start a training and kill it some seconds after a number of epochs -> what it printed."""
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("epoch"):
            epochs -= 1
        if epochs == 0:
            break
    with contextlib.suppress(subprocess.TimeoutExpired):  # somewhere in the epoch after, or in its checkpoint
        process.wait(seconds)
    process.kill()
    process.communicate()
    return output


def stress(script: str, flags: list, folder: Path, kills: int, seed: int = 0) -> int:
    """Kill and resume a run -> how many of its processes started from a checkpoint."""
    draw = random.Random(seed)
    flags = [*flags, "--save_minutes", 0]
    subprocess.run(command(script, *flags, "--output_dir", folder / "undisturbed"), check=True, capture_output=True)
    args = command(script, *flags, "--output_dir", folder / "killed")
    outputs = []
    for _ in range(kills):
        outputs.append(start_and_kill(args, draw.randint(1, 3), draw.uniform(0, 0.1)))
    last = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert last.returncode == 0, last.stdout
    outputs.append(last.stdout)
    assert_same(folder / "undisturbed", folder / "killed")
    return sum("resumed" in output and "at step 0" not in output for output in outputs)


def main(kills: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = ["--num_train", 80, "--num_val", 16, "--num_pets", 60]
        draw = command("prepare", "demo", "--data_root", folder / "data", *sizes)
        subprocess.run(draw, check=True, capture_output=True)
        flags = [
            "--data_root",
            folder / "data",
            "--cache_dir",
            folder / "cache",
            "--model",
            "mae_tiny",
            "--img_size",
            64,
        ]
        flags += ["--cache_size", 64, "--device", "cpu", "--batch_size", 8, "--warmup_epochs", 1, "--log_every", 3]
        for script in ("pretrain", "finetune"):
            more = ["--epochs", 25]
            if script == "finetune":
                more = ["--epochs", 40, "--init", folder / "pretrain/killed/model.pt"]
            resumed = stress(script, [*flags, *more], folder / script, kills)
            print(f"{script}: {kills} kills, {resumed} resumed from a checkpoint, result equal to an undisturbed run")
            assert resumed


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
