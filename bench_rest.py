"""What a study's time goes to besides training steps: start, decoding, checkpoints, tests. For bench.py --tasks rest."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import data
from engine import EngineError
from objective import Objective, TestSetting
from trainer import Trainer

MOST_DECODED = 512  # photos, enough for a rate
POLL_SECONDS = 0.02
LONGEST_START = 600.0  # seconds


def decode_rate(data_root: str, images: list[str], cache_size: int, folder: str) -> float:
    """Decode photos into a new cache -> photos per second, on all cores."""
    chosen = images[:MOST_DECODED]
    with tempfile.TemporaryDirectory(dir=folder) as cache_dir:
        start = time.perf_counter()
        data.build_cache(data_root, chosen, cache_dir=cache_dir, cache_size=cache_size)
        return len(chosen) / (time.perf_counter() - start)


def checkpoint_seconds(trainer: Trainer) -> float:
    """Write a checkpoint of a training -> seconds."""
    start = time.perf_counter()
    trainer.save()
    return time.perf_counter() - start


def test_rate(task: Objective, setting: TestSetting) -> tuple[float, int]:
    """Test a task's network on the test images, at input and at native size -> (images per second, images)."""
    model = task.model.eval()
    task.test(model, task.args.img_size, setting)  # decodes what is not in the cache yet
    start = time.perf_counter()
    records = task.test(model, task.args.img_size, setting)
    count = len(records["ids"])
    return count / (time.perf_counter() - start), count


def first_step_seconds(command: list[str], run: Path, kernels: str) -> float:
    """Start a training -> seconds from its command until its first step is done.

    kernels: folder of compiled kernels; an empty one makes the training compile them. Raises EngineError if the training
    ends without a step.
    """
    log = run / "log.jsonl"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": kernels}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        while process.poll() is None and not has_step(log):
            if time.perf_counter() - start > LONGEST_START:
                break
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - start
        stepped = has_step(log)
        process.kill()
        process.wait()
        if not stepped:
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines()
            raise EngineError(f"the training started by {' '.join(command)} made no step: {lines[-1:]}", 1)
    return seconds


def has_step(log: Path) -> bool:
    """Tell whether a run's log has the line of a training step."""
    if not log.exists():
        return False
    whole_lines = log.read_text().rpartition("\n")[0].splitlines()
    return any(json.loads(line)["event"] == "train" for line in whole_lines)


def pretrain_command(data_root: str, cache_dir: str, model: str, img_size: int, device: str) -> list[str]:
    """Give the command of a pre-training that logs each of its steps."""
    script = Path(__file__).with_name("pretrain.py")
    return [
        *(sys.executable, str(script), "--split=all", f"--model={model}", f"--img_size={img_size}"),
        *(f"--data_root={data_root}", f"--cache_dir={cache_dir}", f"--device={device}"),
        *("--log_every=1", "--epochs=1", "--epoch_updates=1000", "--warmup_epochs=0"),
    ]
