"""Runs of the training scripts that are small enough for a test: drawn photos, mae_tiny at 64 px, inside this process."""

import contextlib
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models import build_mae
from objective import chosen

REPOSITORY = Path(__file__).parent.parent
IMG = 64
SMALL = ["--img_size", str(IMG), "--cache_size", str(IMG), "--device", "cpu"]
needs_photos = pytest.mark.skipif(
    not os.environ.get("SAMPLE_ROOT"), reason="SAMPLE_ROOT does not name a data root with real photos"
)


class once:  # functools.cache, without looking at the first argument
    def __init__(self, function):
        self.function, self.made = function, {}

    def __call__(self, factory, *key):
        if key not in self.made:
            self.made[key] = self.function(factory, *key)
        return self.made[key]


@once
def drawn_root(tmp_path_factory) -> Path:
    """Draw 40 + 16 COCO stand-ins and 46 pets (32 to train on, 6 to validate, 8 to test), once a session."""
    root = tmp_path_factory.mktemp("photos") / "drawn"
    run("prepare", "demo", "--data_root", root, "--num_train", 40, "--num_val", 16, "--num_pets", 46)
    return root


@once
def mae_checkpoint(tmp_path_factory, name: str = "mae_tiny", img_size: int = IMG) -> Path:
    """Write a Masked Autoencoder of random weights as pretrain.py would; its biases and norms are random too."""
    path = tmp_path_factory.mktemp("init") / f"{name}.pt"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = build_mae(name, img_size=img_size)
        for p in model.parameters():
            if p.ndim == 1:
                p.data += 0.02 * torch.randn_like(p)
    torch.save({"model": model.state_dict(), "model_config": {"kind": "mae", "name": name, "img_size": img_size}}, path)
    return path


def words_of(flags) -> list[str]:
    """Split flags into the words of a command line: "--epochs 4 --batch_size 8" stands for four of them."""
    words = []
    for flag in flags:
        if isinstance(flag, str) and flag.startswith("--"):
            words.extend(flag.split())
        else:
            words.append(str(flag))
    return words


def parser_of(script: str, words: list[str]):
    """Make the parser of a command line as the script does: that of its objective or task."""
    module = importlib.import_module(script)
    if script == "pretrain":
        return module.get_args_parser(chosen("--objective", module.OBJECTIVES, "mae", words))
    if script in ("finetune", "baseline"):
        return module.get_args_parser(chosen("--task", module.TASKS, "segment", words))
    return module.get_args_parser()


def run(script: str, *flags) -> str:
    """Run a script's main in this process -> what it printed; its errors come up as exceptions."""
    module = importlib.import_module(script)
    words = words_of(flags)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            module.main(parser_of(script, words).parse_args(words))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return out.getvalue()


def refusal(script: str, *flags) -> str:
    """Run what must be refused -> the one line that says why, from an error or, for a flag alone, from the parser."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises((ValueError, SystemExit)) as info:
        run(script, *flags)
    if info.type is SystemExit:
        assert info.value.code == 2
        message = errors.getvalue().removesuffix("\n")
    else:
        assert info.value.exit_code in (1, 2)
        message = str(info.value)
    assert message
    assert "\n" not in message
    return message


class MemoryStore:
    """Images uint8 [N, C, S, S] in memory, with the attributes of data.ImageStore that batches use."""

    def __init__(self, pixels: torch.Tensor):
        self.pixels = pixels
        self.images = tuple(f"memory/{number}.jpg" for number in range(len(pixels)))
        self.rows = np.arange(len(pixels))
        self.size = pixels.shape[-1]
        self.sizes = np.full((len(pixels), 2), self.size, np.float32)
        self.tensor = None

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, index, pin: bool = False) -> torch.Tensor:
        return self.pixels[torch.from_numpy(self.rows[np.asarray(index)])]


def log(folder, event: str) -> list[dict]:
    lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def metrics(folder) -> dict:
    return json.loads(Path(folder, "metrics.json").read_text())


# How launch() leaves: at a normal exit, gloo's threads may abort the process.
LEAVE = """
import os, sys, torch.distributed
if torch.distributed.is_initialized():
    torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""


def on_two_processes(code: str, *arguments) -> list[str]:
    """Run Python code as two gloo processes -> what each printed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code + LEAVE, *map(str, arguments)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [p.communicate(timeout=120) for p in processes]
    for p, (_, errors) in zip(processes, outputs, strict=True):
        assert p.returncode == 0, errors
    return [out for out, _ in outputs]
