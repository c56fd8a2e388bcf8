"""Train objectives at the demo's size until they have learnt what they are asked, and ask their frozen encoders for pets.

    python tests/check_objectives.py objectives                              # drawn photos, about 20 minutes on two cores
    python tests/check_objectives.py objectives --data_root DIR --only ijepa dino --seeds 0

Each run must beat what its objective can be had for without learning, on animal and on non-animal validation images; exit
code 1 if one does not. The probes are reported beside those of the random encoders that the runs began as: at this size
not every objective has features that a breed or a trimap can be read from.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from check_demo import Claim

from engine import read_json
from probe_records import TRIMAP, load_probe, random_folder
from study import DEMO_IMG_SIZE, DEMO_MODEL, DEMO_OBJECTIVES, DEMO_PRETRAIN, flag_words

HERE = Path(__file__).resolve().parents[1]
LISTS = ("animal", "non_animal")
SEEDS = (0, 1, 2)
UPDATES = {"tokens": 600, "splitmask": 400, "ijepa": 800, "dino": 500}
SETTINGS = {"ijepa": {"teacher_momentum": 0.99}}  # where more updates ask for other settings than the demo's
CLASS_TOKEN = ("dino",)  # objectives that train it
PROBES = {"knn": "20-NN", "linear": "linear", TRIMAP: "trimap IoU"}


class Run(NamedTuple):
    """One pre-training: its objective, its seed, and its folder."""

    objective: str
    seed: int
    folder: Path

    @property
    def pool(self) -> str:
        """What stands for an image in its probes."""
        return "cls" if self.objective in CLASS_TOKEN else "mean"


# ----------------------------------------------------------------------------------------------------------------------
# Training and probing


def python(script: str, *words: object) -> None:
    """Run a script of the project with one thread. Raises RuntimeError with its last lines if it fails."""
    command = [sys.executable, str(HERE / script), *map(str, words)]
    done = subprocess.run(command, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        tail = (done.stdout + done.stderr)[-1000:]
        raise RuntimeError(f"{script} {' '.join(command[2:])} failed:\n{tail}")


def train(run: Run, args: argparse.Namespace) -> None:
    """Pre-train, or go on with what is there."""
    epochs = UPDATES[run.objective] // 100
    flags = {**DEMO_PRETRAIN, **DEMO_OBJECTIVES[run.objective], **SETTINGS.get(run.objective, {})}
    flags |= {"epochs": epochs, "epoch_updates": 100, "warmup_epochs": epochs / 10, "val_epochs": epochs}
    where = ["--data_root", args.data_root, "--cache_dir", args.cache_dir, "--output_dir", run.folder]
    words = ["--model", DEMO_MODEL, "--objective", run.objective, "--split", "all", "--meters", *flag_words(flags)]
    python("pretrain.py", *words, "--seed", run.seed, *where, *args.flags.split())
    print(f"trained: {run.folder}", flush=True)


def probe(run: Run, args: argparse.Namespace) -> None:
    """Ask the frozen encoder and the random one that it began as."""
    where = ["--data_root", args.data_root, "--cache_dir", args.cache_dir]
    python("probe.py", run.folder, "--random", "--pool", run.pool, *where)


def in_parallel(work: Callable[[Run, argparse.Namespace], None], runs: list[Run], args: argparse.Namespace) -> None:
    """Do the same for all runs, on each core one."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for future in [pool.submit(work, run, args) for run in runs]:
            future.result()


# ----------------------------------------------------------------------------------------------------------------------
# What must hold


def claims_of(run: Run) -> list[Claim]:
    """Check that a run has learnt what it was asked, on each list of validation images."""
    metrics = read_json(run.folder / "metrics.json")
    check = {"tokens": of_tokens, "splitmask": of_splitmask, "ijepa": of_ijepa, "dino": of_dino}[run.objective]
    claims = []
    for name in LISTS:
        for text, holds in check(metrics, name):
            claims.append(Claim(f"{run.objective}, seed {run.seed}, {name} images: {text}", bool(holds)))
    return claims


def below(metrics: dict, score: str, predictor: str) -> tuple[str, bool]:
    """Compare a score with that of a trivial predictor, which must be higher."""
    value = metrics["last"][score]
    bound = metrics["trivial"][predictor][score]
    return f"{score} {value:.3f} is below {predictor} ({bound:.3f})", value < bound


def of_tokens(metrics: dict, name: str) -> list[tuple[str, bool]]:
    return [below(metrics, f"loss_{name}", "copy mixture")]


def of_splitmask(metrics: dict, name: str) -> list[tuple[str, bool]]:
    tokens = below(metrics, f"cross_entropy_{name}", "copy mixture")
    return [tokens, below(metrics, f"info_nce_{name}", "chance")]


def of_ijepa(metrics: dict, name: str) -> list[tuple[str, bool]]:
    explained = metrics["last"][f"r2_{name}"]
    spread = metrics["last"]["spread"]
    rank = metrics["last"]["rank"]
    return [
        (f"R² {explained:.3f} against the best constant of each position is above 0.2", explained > 0.2),
        (f"spread {spread:.2f} is above 0.2, rank {rank:.1f} above 2: no collapse", spread > 0.2 and rank > 2),
    ]


def of_dino(metrics: dict, name: str) -> list[tuple[str, bool]]:
    most = math.log(DEMO_OBJECTIVES["dino"]["prototypes"])
    entropy = metrics["last"][f"entropy_{name}"]
    loss = metrics["last"][f"loss_{name}"]
    share = entropy / most
    return [
        (f"entropy {entropy:.2f} is {share:.2f} of ln K, between 0.1 and 0.9", 0.1 < share < 0.9),
        (f"loss {loss:.3f} is below ln K ({most:.3f})", loss < most),
        below(metrics, f"loss_{name}", "best constant"),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# What is reported


def table_of_probes(runs: list[Run]) -> list[str]:
    """Write what frozen encoders know, beside random ones: mean and standard deviation over seeds."""
    lines = [
        "test score of a probe: trained / random, mean ± standard deviation over seeds; * more than both deviations"
    ]
    for objective in dict.fromkeys(run.objective for run in runs):
        of_objective = [run for run in runs if run.objective == objective]
        cells = []
        for name, words in PROBES.items():
            trained = [load_probe(run.folder, run.pool).score(name) for run in of_objective]
            randoms = [load_probe(random_of(run), run.pool).score(name) for run in of_objective]
            gain = statistics.fmean(trained) - statistics.fmean(randoms)
            mark = "*" if gain > max(deviation(trained), deviation(randoms)) else " "
            cells.append(f"{words} {in_words(trained)} / {in_words(randoms)}{mark}")
        lines.append(f"{objective:10} " + "   ".join(cells))
    return lines


def random_of(run: Run) -> Path:
    return random_folder(run.folder, DEMO_MODEL, DEMO_IMG_SIZE, run.seed)


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def in_words(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {deviation(values):.3f}"


def main(args: argparse.Namespace) -> int:
    """Train, probe, print -> exit code."""
    if args.data_root is None:
        args.data_root = str(args.output / "drawn")
        python("prepare.py", "demo", "--data_root", args.data_root)
    args.cache_dir = str(args.output / "cache")
    runs = [Run(name, seed, args.output / f"{name}_seed{seed}") for seed in args.seeds for name in args.only]
    in_parallel(train, runs, args)
    in_parallel(probe, runs, args)
    claims = [claim for run in runs for claim in claims_of(run)]
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}: {claim.text}")
    print("\n".join(table_of_probes(runs)))
    return int(not all(claim.holds for claim in claims))


def get_args_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser("check_objectives.py", description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, help="folder of runs and caches; what is finished there is not repeated")
    parser.add_argument("--data_root", help="photos laid out as in the README (default: drawn ones)")
    parser.add_argument("--only", nargs="+", choices=list(UPDATES), default=list(UPDATES), help="objectives")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="of the pre-trainings")
    parser.add_argument("--flags", default="", help="further flags of pretrain.py, in one word")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
