"""Faults of all kinds, in all files and at all moments: each ends with the same result to the bit, or in a line about it.

    python tests/stress.py kills 20                  # pre-training and fine-tuning, 20 kills each (the suite does 3)
    python tests/stress.py studies 20 --seed 0       # run_all.sh, one process of it, or all, killed at random moments
    python tests/stress.py files 10000 --seed 0      # damage to small files, in this process
    python tests/stress.py processes 300 --seed 0    # trainings killed, stopped, out of disk; ranks; damage between

A silent other result, a traceback, or a line that names nothing is a failure: exit code 1.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TIMINGS = ("seconds", "img_s", "mfu", "mem_gb", "files", "checksum")  # and the hashes of files that hold timings
FAILURES = ("silent", "traceback")
VERDICTS = ("same", "refused", "told", *FAILURES)


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


def kill_trainings(kills: int) -> None:
    """Kill a pre-training and a fine-tuning again and again."""
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


def print_table(outcomes: list) -> None:
    """Print how often each kind of fault had which verdict."""
    counts = {}
    for outcome in outcomes:
        for kind in (outcome.damage, outcome.target):
            counts.setdefault(kind, Counter())[outcome.verdict] += 1
    width = max(map(len, counts))
    print(f"{'':{width}}" + "".join(f"{verdict:>11}" for verdict in VERDICTS))
    for kind in [*sorted({o.damage for o in outcomes}), *sorted({o.target for o in outcomes})]:
        print(f"{kind:{width}}" + "".join(f"{counts[kind][verdict]:11,}" for verdict in VERDICTS))
    total = Counter(outcome.verdict for outcome in outcomes)
    print(f"{'all':{width}}" + "".join(f"{total[verdict]:11,}" for verdict in VERDICTS))


def campaign(world, number: int, seed: int, first: int = 0) -> list:
    """Try faults that follow from the seed and their number -> their outcomes; failures are printed at once."""
    outcomes = []
    for place in range(first, first + number):
        outcome = world.try_fault(random.Random(f"{seed} {place}"))
        outcomes.append(outcome)
        if outcome.verdict in FAILURES:
            print(f"fault {place} of seed {seed}: {outcome}", flush=True)
    return outcomes


def run_campaign(args: argparse.Namespace) -> int:
    """Run a campaign on files or processes and print its table -> exit code."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.modules.setdefault("stress", sys.modules["__main__"])
    from fault_processes import ProcessWorld
    from fault_world import World
    from faults import open_folder

    torch.set_num_threads(1)
    start = time.monotonic()
    with open_folder() as folder:
        world = World(folder) if args.what == "files" else ProcessWorld(folder)
        outcomes = campaign(world, args.number, args.seed, args.first)
    print_table(outcomes)
    failures = sum(outcome.verdict in FAILURES for outcome in outcomes)
    print(f"{len(outcomes):,} faults in {time.monotonic() - start:.0f} s, seed {args.seed}: {failures} failures")
    return int(failures > 0)


def main(args: argparse.Namespace) -> int:
    if args.what == "kills":
        kill_trainings(args.number)
        return 0
    if args.what == "studies":
        sys.path.insert(0, str(ROOT / "tests"))
        from study_kills import kill_studies

        kill_studies(args.number, args.seed)
        return 0
    return run_campaign(args)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("stress.py", description="Faults of all kinds")
    parser.add_argument("what", choices=["kills", "studies", "files", "processes"])
    parser.add_argument("number", type=int, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="another seed tries other faults (default: 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first fault (default: 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
