"""Plan a study: one line for each run, with the command that makes it.

    python study.py plan --seeds 0 1 2 --model mae_base --output runs/study          # a tab-separated table
    python study.py plan --sweep label_fraction --extra_arms pets my_split
    python study.py plan --audit                                # our protocol, with one choice of the original code each
    python study.py settings --demo                                                  # what run_all.sh needs to know
    python study.py status runs/study                                                # how far each run is, see status.py

`run_all.sh` writes the table to OUTPUT/study.tsv and carries it out line by line; `report.py` reads it. A line's parent
stands above it; `generations` tells which lines do not depend on each other. The arms are those of arms.py.
Standard library only, so that a plan can be shown before anything is installed; splits.py is asked where it can be.
"""

import argparse
import hashlib
import importlib.util
import itertools
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

from arms import (
    ANIMAL_FRACTION,
    ARMS,
    CHOICES,
    CONTROLS,
    HALF,
    IMAGENET,
    LABEL_FRACTION,
    LABELS,
    MIXED,
    NUM_IMAGES,
    OBJECTIVE,
    STAGES,
    SWEEPS,
    Arm,
    audit_arms,
    baseline_arms,
    extra_arms,
    label_sweep_arms,
    objective_sweep_arms,
    own_arms,
    size_sweep_arms,
    sweep_arms,
)
from protocols import PROTOCOLS, protocol_flags

SCRIPTS = {"pretrain": "pretrain.py", "finetune": "finetune.py", "baseline": "baseline.py"}
DEFAULT_OBJECTIVE = "mae"
DEFAULT_TASK = "segment"
DEFAULT_EXTRA_ARMS = ("pets", "all")
KNOWN_EXTRA_ARMS = (*DEFAULT_EXTRA_ARMS, *CONTROLS, IMAGENET.name)  # others are looked up in splits.py
MODEL = "mae_base"
IMG_SIZE = 224
PAPER_ANIMALS = 25_739  # list entries of the paper's animal split
PAPER_MIXED = 25_918  # and of its mixed split, which is a little larger

# The same path at a size that two CPU cores finish in minutes. Epochs are counted in updates, so that few photos train as
# long as many; the rates were chosen on validation images of the drawn data.
DEMO_MODEL = "mae_demo"
DEMO_IMG_SIZE = 64
DEMO_SIZE = {"img_size": DEMO_IMG_SIZE, "cache_size": 96, "compile": False, "log_every": 10}
DEMO_PRETRAIN = {**DEMO_SIZE, "epochs": 4, "epoch_updates": 250, "batch_size": 16, "blr": "32e-3", "warmup_epochs": 0.4}
DEMO_SEGMENT = {
    **DEMO_SIZE,
    "epochs": 7,
    "epoch_updates": 80,
    "val_epochs": 1,
    "batch_size": 4,
    "blr": "128e-3",
    "warmup_epochs": 0.7,
    "crop_scale": 1,
    "flips": False,
}
DEMO = {
    "pretrain": DEMO_PRETRAIN,
    "finetune": {**DEMO_SEGMENT, "layer_decay": 1, "drop_path": 0},
    "baseline": DEMO_SEGMENT,
}
DEMO_MAE = {"drop_path": 0}
DEMO_HALF = {"epoch_updates": 40}  # half of the labels for as many epochs, as in the study
# Its first convolutions see little at 64 pixels, and an update costs ten times one of the others': fewer, larger batches.
DEMO_RESNET = {"epochs": 4, "epoch_updates": 18, "batch_size": 8, "blr": "32e-3", "warmup_epochs": 0.4}
# What slurm.py sets itself, or what makes sbatch submit nothing.
SLURM_FLAGS = ("--array", "--dependency", "--wrap", "--parsable", "--test-only", "--version", "--help", "--usage")
SLURM_SHORT_FLAGS = {"-a": "--array", "-d": "--dependency", "-V": "--version", "-h": "--help"}
# Labels: 1,000 updates of the autoencoder take as many operations as 443 of these, so that with 2 epochs more they equal 11.
DEMO_LABEL_EPOCHS = (2, 11)
DEMO_LABELS = {"epoch_updates": 50, "warmup_epochs": 0.5}
DEMO_LABEL_RATES = {"none": "16e-3", "mae": "8e-3"}
DEMO_SIZE_SHARES = (0.1, 0.5)  # fewer images than a batch could not be trained on
# Objectives: their updates cost up to five of the autoencoder's, and here each is asked for two trainings.
DEMO_OBJECTIVE = {"epochs": 3, "epoch_updates": 100, "warmup_epochs": 0.4}
DEMO_OBJECTIVE_FINETUNE = {"epochs": 3}
DEMO_OBJECTIVES = {
    "mae": {},
    "tokens": {"tokenizer": "kmeans", "vocabulary": 512},
    "splitmask": {"tokenizer": "kmeans", "vocabulary": 512},
    "ijepa": {"blr": "16e-3", "context_ratio": 0.3125, "teacher_momentum": 0.97},
    "dino": {
        "blr": "16e-3",
        "head_hidden": 512,
        "head_bottleneck": 64,
        "prototypes": 256,
        "teacher_temperature": 0.02,
        "freeze_epochs": 0.1,
        "drop_path": 0,
    },
    "labels": {"blr": "16e-3", "drop_path": 0},
}
# Flags that say what a line of a sweep is: the user's, which come last, would make its name false.
SWEPT_IN_PRETRAINING = {
    ANIMAL_FRACTION: ("animal_fraction",),
    LABELS: ("objective",),
    NUM_IMAGES: ("image_fraction", "num_images"),
    OBJECTIVE: ("objective",),
}
SWEPT_IN_FINETUNING = {LABEL_FRACTION: ("label_fraction",), OBJECTIVE: ("load",)}
DEMO_MOST_JOBS = 5  # runs of the demo that can be made at the same time

COCO_FILES = ("coco/annotations/instances_train2017.json", "coco/annotations/instances_val2017.json")
PETS_FILES = ("oxford-iiit-pet/annotations/list.txt",)


class PlanError(ValueError):
    """Wrong use; the message is one line that says what to do."""

    exit_code = 2


class PlanLine(NamedTuple):
    """One run of a study. Folders are relative to the study's; `command` is quoted for a shell, without the launcher."""

    seed: int
    stage: str
    arm: str
    folder: str
    parent: str  # folder of the run that it starts from, or empty
    sweep: str
    value: float | None
    command: str


# ----------------------------------------------------------------------------------------------------------------------
# The table


def write_lines(lines: Iterable[PlanLine]) -> str:
    """Write plan lines as a tab-separated table with a header."""
    rows = ["\t".join(PlanLine._fields)]
    for line in lines:
        value = "" if line.value is None else f"{line.value:g}"
        rows.append("\t".join(map(str, line._replace(value=value))))
    return "\n".join([*rows, last_line(rows)]) + "\n"


def last_line(rows: list[str]) -> str:
    """Write the line that ends a table: without it, or with another one, lines are missing or changed."""
    text = "\n".join(rows).encode(errors="surrogateescape")
    return f"# end, checksum {hashlib.sha256(text).hexdigest()[:16]}"


def read_lines(text: str) -> list[PlanLine]:
    """Read what write_lines wrote. Raises ValueError for another table."""
    *whole, end = text.removesuffix("\n").split("\n")
    rows = [row.split("\t") for row in whole]
    if not rows or tuple(rows[0]) != PlanLine._fields:
        raise ValueError(f"its first line must be {', '.join(PlanLine._fields)}, separated by tabs")
    if end != last_line(whole):
        raise ValueError("its last line is no checksum of the lines above it: some are missing or changed")
    lines = []
    for cells in rows[1:]:
        if len(cells) != len(PlanLine._fields):
            raise ValueError(f"a line has {len(cells)} columns instead of {len(PlanLine._fields)}: {cells[0][:40]} ...")
        line = PlanLine(*cells)
        if line.stage not in STAGES:
            raise ValueError(f"unknown stage {line.stage!r}; stages are {', '.join(STAGES)}")
        value = float(line.value) if line.value else None
        lines.append(line._replace(seed=int(line.seed), value=value))
    generations(lines)
    return lines


def generations(lines: list[PlanLine]) -> list[list[PlanLine]]:
    """Divide a plan into runs that depend on no other, those that start from one of these, and so on, each in its order.

    Raises PlanError where a run stands before the one that it starts from.
    """
    place: dict[str, int] = {}
    found: list[list[PlanLine]] = []
    for line in lines:
        number = 0
        if line.parent:
            if line.parent not in place:
                raise PlanError(f"{line.folder} starts from {line.parent}, which the plan does not list before it")
            number = place[line.parent] + 1
        place[line.folder] = number
        if number == len(found):
            found.append([])
        found[number].append(line)
    return found


def read_plan(table: Path) -> list[PlanLine]:
    """Read the table of a study. Raises PlanError if it is missing or damaged."""
    try:
        text = table.read_text(encoding="utf-8", errors="surrogateescape")
        return read_lines(text)
    except (FileNotFoundError, NotADirectoryError):
        problem = f"{table.parent} is no study: it has no {table.name}"
        raise PlanError(f"{problem}; give the folder that run_all.sh writes") from None
    except OSError as error:
        raise PlanError(f"{table} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise PlanError(f"{table} is damaged: {error}; repeat the run_all.sh command, which writes it anew") from None


def quote(word: str) -> str:
    """Quote a word for bash on a single line, tabs and line breaks included."""
    if not any(character in word for character in "\n\r\t"):
        return shlex.quote(word)
    for character, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        word = word.replace(character, escaped)
    return f"$'{word}'"


# ----------------------------------------------------------------------------------------------------------------------
# Arms and commands


def flag_words(flags: dict[str, object]) -> list[str]:
    """Write flags as words: {"epochs": 3, "compile": False} -> ["--epochs", "3", "--no-compile"]."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is False:
            words.append(f"--no-{name}")
        else:
            words.extend([f"--{name}", str(value)])
    return words


def study_arms(args: argparse.Namespace, paper_sizes: bool) -> list[Arm]:
    """List the arms of a study, stage after stage."""
    if names_images(args.pretrain_args):
        return [*own_arms(), *baseline_arms()]
    arms = list(ARMS.values())
    for split in args.extra_arms:
        arms.extend(extra_arms(split))
    unique = has_flag(args.pretrain_args, "--animal_images", "unique")
    for sweep in args.sweep:
        further = demo_sweep_arms(sweep) if args.demo else sweep_arms(sweep)
        if sweep == ANIMAL_FRACTION and unique:
            # With distinct images the study's own arms are the doses 0 and 1, and 0.5 where it has the same size.
            own = {0.0, 1.0} if paper_sizes else {0.0, 0.5, 1.0}
            further = [arm for arm in further if arm.value not in own]
        arms.extend(further)
    if args.audit:
        arms.extend(audit_arms())
    return sorted(arms, key=lambda arm: STAGES.index(arm.stage))


def demo_sweep_arms(sweep: str) -> list[Arm]:
    """List the arms of a sweep of the demo, which are fewer or shorter."""
    if sweep == LABELS:
        return label_sweep_arms(DEMO_LABEL_EPOCHS)
    if sweep == NUM_IMAGES:
        return size_sweep_arms(DEMO_SIZE_SHARES)
    if sweep == OBJECTIVE:
        return objective_sweep_arms(own_autoencoders=True)
    return sweep_arms(sweep)


def kind_of(arm: Arm) -> str:
    """Say which of protocols.KINDS the runs of an arm are."""
    if arm.stage != "baseline":
        return arm.stage
    if arm.network == "resnet50":
        return "resnet50"
    return "supervised"


def has_flag(words: list[str], flag: str, value: str) -> bool:
    """Check whether a command line sets a flag to this value."""
    return value in flag_values(words, flag)


def names_images(words: list[str]) -> bool:
    """Check whether a command line names a folder of one's own images."""
    return bool(flag_values(words, "--images"))


def flag_values(words: list[str], flag: str) -> list[str]:
    """List the values that a command line gives a flag, the one that counts last."""
    values = [word.removeprefix(f"{flag}=") for word in words if word.startswith(f"{flag}=")]
    for word, following in itertools.pairwise(words):
        if word == flag:
            values.append(following)
    return values


def command(arm: Arm, seed: int, args: argparse.Namespace, paper_sizes: bool) -> list[str]:
    """Write the command of a run as words: its script and flags, the user's own flags after ours so that they win."""
    output = Path(args.output)
    words = [SCRIPTS[arm.stage], "--model", arm.network or args.model]
    if arm.parent:
        words += ["--init", str(output / run_folder(seed, "pretrain", arm.parent) / "model.pt")]
    if arm.key == IMAGENET:
        words += ["--init", args.imagenet_weights]
    if arm.stage == "pretrain" and args.objective != DEFAULT_OBJECTIVE:
        words += ["--objective", args.objective]
    if arm.stage != "pretrain" and args.task != DEFAULT_TASK:
        words += ["--task", args.task]
    if args.demo:
        words += flag_words(DEMO[arm.stage])
    words += flag_words(protocol_flags(args.protocol, kind_of(arm), args.demo, args.on_gpus))
    words += flag_words(arm.flags)
    if args.demo and arm.stage == "baseline":
        words += flag_words(DEMO_RESNET if arm.network == "resnet50" else DEMO_MAE)
    if args.demo and arm.key == HALF:
        words += flag_words(DEMO_HALF)
    if arm.key == ("pretrain", MIXED.name) and paper_sizes:
        words += ["--num_images", str(PAPER_MIXED)]
    if args.demo and arm.sweep == OBJECTIVE:
        words += flag_words(demo_objective_flags(arm))
    on_labels = arm.sweep == LABELS and arm.stage == "pretrain"
    if args.demo and on_labels:
        words += flag_words({**DEMO_LABELS, "blr": DEMO_LABEL_RATES[arm.line]})
    words += args.pretrain_args if arm.stage == "pretrain" else args.finetune_args
    if on_labels:  # after the user's, which are for all pre-trainings: the sweep is one over epochs
        words += ["--epochs", f"{arm.value:g}"]
    words += ["--data_root", args.data_root, "--cache_dir", args.cache_dir]
    words += ["--seed", str(seed), "--split_seed", str(seed)]
    return [*words, "--output_dir", str(output / run_folder(seed, arm.stage, arm.name))]


def demo_objective_flags(arm: Arm) -> dict[str, object]:
    """Give what an arm of the demo's sweep over objectives is trained with."""
    if arm.stage == "pretrain":
        return {**DEMO_OBJECTIVE, **DEMO_OBJECTIVES[arm.line]}
    return DEMO_OBJECTIVE_FINETUNE


def run_folder(seed: int, stage: str, name: str) -> str:
    """Name the folder of a run below the study's folder."""
    return f"seed{seed}/{stage}_{name}"


def make_plan(args: argparse.Namespace, paper_sizes: bool) -> list[PlanLine]:
    """List all runs of a study, seed after seed, each after the run that it starts from."""
    lines = []
    for seed in args.seeds:
        for arm in study_arms(args, paper_sizes):
            folder = run_folder(seed, arm.stage, arm.name)
            parent = run_folder(seed, "pretrain", arm.parent) if arm.parent else ""
            words = " ".join(quote(word) for word in command(arm, seed, args, paper_sizes))
            lines.append(PlanLine(seed, arm.stage, arm.name, folder, parent, arm.sweep, arm.value, words))
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# What the machine, the data and the other files know


def has_gpus(args: argparse.Namespace) -> bool:
    """Check whether the study trains on GPUs. Assumed where torch is not installed yet."""
    if args.gpus is not None:
        return args.gpus > 0
    if importlib.util.find_spec("torch") is None:
        return True
    import torch

    return torch.cuda.is_available()


def has_paper_sizes(args: argparse.Namespace) -> bool:
    """Check whether the animal split is the paper's; then the mixed one has the paper's size. Assumed without data."""
    if args.demo or names_images(args.pretrain_args):
        return False
    countable = Path(args.data_root, COCO_FILES[0]).exists() and importlib.util.find_spec("torch") is not None
    if args.dry_run and not countable:
        return True
    import splits

    if not args.dry_run:
        return splits.reference_size(args.data_root, cache_dir=args.cache_dir) == PAPER_ANIMALS
    with tempfile.TemporaryDirectory() as folder:  # a dry run leaves nothing behind
        return splits.reference_size(args.data_root, cache_dir=folder) == PAPER_ANIMALS


def check_names(args: argparse.Namespace) -> None:
    """Refuse splits and models that do not exist; where torch is not installed yet, they are checked later."""
    for split in args.extra_arms:
        if ("pretrain", split) in ARMS:
            raise PlanError(f"--extra_arms {split}: this split is part of every study")
    further = set(args.extra_arms) - set(KNOWN_EXTRA_ARMS)
    if args.model in (MODEL, DEMO_MODEL) and not further:
        return
    try:
        import models
        import splits
    except ImportError:
        return
    if args.model not in models.MODELS:
        raise PlanError(f"unknown --model {args.model!r}; there are {', '.join(models.MODELS)}")
    unknown = sorted(further - set(splits.SPLITS))
    if unknown:
        names = ", ".join([*splits.SPLITS, *CONTROLS, IMAGENET.name])
        raise PlanError(f"unknown split --extra_arms {unknown[0]!r}; there are {names}")


def check_data(args: argparse.Namespace) -> None:
    """Refuse a folder without the annotations that the study reads; one's own images need none."""
    needed = []
    if not names_images(args.pretrain_args):
        needed += COCO_FILES
    if args.probes or not names_images(args.finetune_args):
        needed += PETS_FILES
    for name in needed:
        path = Path(args.data_root, name)
        if not path.exists():
            advice = f"python prepare.py download --data_root {quote(args.data_root)}"
            raise PlanError(f"{quote(str(path))} not found; get the data with: {advice}")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def one_line(text: object) -> str:
    """Write line breaks and other characters that cannot be printed as escapes: names of folders may hold them."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))


class PlanParser(argparse.ArgumentParser):
    """Reports wrong use in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see --help)\n")


def get_args_parser(prog: str) -> PlanParser:
    """Make the parser of run_all.sh and of `study.py plan`."""
    parser = PlanParser(prog, allow_abbrev=False, description="The study of pre-training images, run by run")
    add = parser.add_argument
    add("--demo", action="store_true", help="small model, short schedule, 64 px; draws its own data unless --data_root "
        "is given (minutes on a CPU)")  # fmt: skip
    add("--data_root", help="folder with coco/ and oxford-iiit-pet/ (default: data; the demo's drawn data: data/demo)")
    add("--output", help="folder of runs and report (default: runs/study, runs/demo or runs/demo_NAME-OF-DATA_ROOT)")
    add("--gpus", type=int, help="processes on this node, one per GPU (default: all GPUs; 0: CPU)")
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at the same time, each on its own GPU or with its share of the CPU's cores (default: 1, each over "
        "all GPUs; demo on a CPU: one for each core); on a CPU, ResNet-50 comes first and alone, for its memory",
    )
    add(
        "--slurm",
        metavar="FLAGS",
        help='submit the study to Slurm with these flags of sbatch, "--partition=gpu --gres=gpu:1 --time=2:00:00": an '
        "array of jobs for each stage, then tests and report; --jobs N: at most N runs at a time; --gpus 0: on CPUs",
    )
    add("--seeds", nargs="+", default=["0"], metavar="SEED", help="repeat the study with these seeds (default: 0); "
        "differences are tested from three on, five are recommended: python power.py says why")  # fmt: skip
    add("--sweep", action="append", choices=SWEEPS, help="also run this sweep; may be given twice")
    add(
        "--extra_arms",
        nargs="*",
        metavar="SPLIT",
        help="also pre-train on these splits of splits.py (default: pets all); animal_no_person and non_animal_no_person "
        "are controls without people, other_targets predicts other images' pixels, imagenet fine-tunes --imagenet_weights",
    )
    add(
        "--imagenet_weights",
        metavar="FILE",
        help="published weights of a ViT of --model's size for --extra_arms imagenet, an anchor from 1.28 million images",
    )
    add("--model", help="size of the networks, a name of models.py (default: mae_base; demo: mae_demo)")
    add("--objective", default=DEFAULT_OBJECTIVE, metavar="NAME", help="what pre-training does (default: mae)")
    add("--task", default=DEFAULT_TASK, metavar="NAME", help="what fine-tuning and baselines do (default: segment)")
    add(
        "--protocol",
        choices=list(PROTOCOLS),
        default="ours",
        help="whose settings the trainings take; original: those of the code behind the paper, see protocols.py "
        "(default: ours)",
    )
    add(
        "--audit",
        action="store_true",
        help="also change one choice at a time from ours to the original code's, to report what each is worth",
    )
    add(
        "--probes",
        action="store_true",
        help="also ask the frozen encoder of each pre-training, and a random one, what they know (probe.py)",
    )
    add(
        "--pretrain_args",
        default="",
        metavar="FLAGS",
        help='more flags for pretrain.py: "--epochs 800 --batch_size 64"',
    )
    add("--finetune_args", default="", metavar="FLAGS", help="more flags for finetune.py and baseline.py")
    add("--cache_dir", default="cache", help="folder of decoded images (default: cache)")
    add("--dry_run", action="store_true", help="print every command and leave")
    parser.epilog = (
        "Several nodes: start it on each node with NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT) set, on a shared "
        "file system."
    )
    return parser


def join_values(words: list[str]) -> list[str]:
    """Join flags and values that argparse would take for flags: --pretrain_args "--no-compile"."""
    joined = []
    for word in words:
        if joined and joined[-1] in ("--pretrain_args", "--finetune_args", "--slurm"):
            joined[-1] = f"{joined[-1]}={word}"
        else:
            joined.append(word)
    return joined


def read_seeds(values: list[str]) -> list[int]:
    """Read seeds from `--seeds 0 1` and `--seeds "0 1"`."""
    words = " ".join(values).split()
    if not words:
        raise PlanError("--seeds is empty")
    for word in words:
        if not (word.isascii() and word.isdigit()) or str(int(word)) != word or len(word) > 9:
            raise PlanError(f"--seeds takes whole numbers below a billion, got {word!r}")
        if words.count(word) > 1:
            raise PlanError(f"--seeds names {word} twice; a repeated seed is no further evidence")
    return [int(word) for word in words]


def read_words(flags: str) -> list[str]:
    """Split flags as a shell does."""
    try:
        return shlex.split(flags)
    except ValueError:
        raise PlanError(f"unbalanced quotes in the flags: {quote(flags)}") from None


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on other flags, and read lists."""
    args.drawn = args.demo and args.data_root is None
    if args.output is None:
        if not args.demo:
            args.output = "runs/study"
        elif args.drawn:
            args.output = "runs/demo"
        else:
            args.output = f"runs/demo_{Path(args.data_root).absolute().name}"
    if args.data_root is None:
        args.data_root = "data/demo" if args.demo else "data"
    if args.model is None:
        args.model = DEMO_MODEL if args.demo else MODEL
    if args.extra_arms == []:
        args.extra_arms = list(DEFAULT_EXTRA_ARMS)
    args.extra_arms = list(dict.fromkeys(args.extra_arms or []))
    args.sweep = [sweep for sweep in SWEEPS if sweep in (args.sweep or [])]
    args.seeds = read_seeds(args.seeds)
    args.pretrain_args = read_words(args.pretrain_args)
    args.finetune_args = read_words(args.finetune_args)
    if args.gpus is not None and args.gpus < 0:
        raise PlanError(f"--gpus takes a number of GPUs, got {args.gpus}")
    if args.jobs is not None and args.jobs < 1:
        raise PlanError(f"--jobs takes a number of runs from 1 on, got {args.jobs}")
    if args.slurm is not None:
        args.slurm = read_words(args.slurm)
        check_slurm_flags(args)
        if args.gpus:
            raise PlanError(
                f"--gpus {args.gpus} with --slurm: say --gres=gpu:N in the flags of sbatch, or --gpus 0 for CPUs"
            )
    elif args.jobs and args.gpus and args.jobs > args.gpus:
        raise PlanError(f"--jobs {args.jobs} needs a GPU for each run, --gpus gives {args.gpus}")
    return args


def check_slurm_flags(args: argparse.Namespace) -> None:
    """Refuse flags of sbatch that the study sets itself, and options of run_all.sh in their place."""
    own = {f"--{name}" for name in vars(args)} - {"--gpus", "--output"}  # which sbatch has too
    for word in args.slurm:
        name = word.split("=")[0]
        if name in own:
            raise PlanError(f"--slurm takes the flags of sbatch in quotes, got run_all.sh's own {name}")
        if SLURM_SHORT_FLAGS.get(word[:2]) or is_slurm_flag(name):
            raise PlanError(f"--slurm sets {word}, which belongs to the study; leave it out")
        if name == "--signal" and not re.fullmatch(r"--signal=B:USR1@\d+", word):
            raise PlanError(f"--slurm sets {word}; the study's jobs understand --signal=B:USR1@SECONDS alone")


def is_slurm_flag(name: str) -> bool:
    """Tell whether sbatch may take a word for a flag of SLURM_FLAGS; it knows beginnings of them, too."""
    return len(name) > len("--x") and any(flag.startswith(name) for flag in SLURM_FLAGS)


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_jobs(args: argparse.Namespace) -> int:
    """Say how many runs a CPU makes at the same time."""
    if args.slurm is not None:  # each in a job of its own
        return 1
    if args.jobs is not None:
        return args.jobs
    if args.demo:
        return min(num_cores(), DEMO_MOST_JOBS)
    return 1


def check_own_images(args: argparse.Namespace) -> None:
    """Refuse arms of COCO's splits where one's own images take their place."""
    if not names_images(args.pretrain_args):
        return
    options = {"--sweep": args.sweep, "--extra_arms": args.extra_arms, "--audit": args.audit}
    for option, value in options.items():
        if value:
            raise PlanError(f"{option} needs the splits of COCO; leave it or --images in --pretrain_args out")


def splits_flags(args: argparse.Namespace) -> str:
    """Write the flags of `prepare.py splits`: which images the study lists, its own or those of the data sets it reads."""
    if names_images(args.pretrain_args):
        return f"--images {quote(flag_values(args.pretrain_args, '--images')[-1])}"
    if names_images(args.finetune_args):
        return "--only coco"
    return ""


def check_imagenet(args: argparse.Namespace) -> None:
    """Refuse the arm of published weights without a file, and a file without the arm."""
    asked = IMAGENET.name in args.extra_arms
    if asked and args.imagenet_weights is None:
        raise PlanError(f"--extra_arms {IMAGENET.name} needs --imagenet_weights FILE, a ViT of facebookresearch/mae, timm "
                        "or transformers")  # fmt: skip
    if args.imagenet_weights is not None and not asked:
        raise PlanError(f"--imagenet_weights is for the arm --extra_arms {IMAGENET.name}; name it too")
    if asked and not args.dry_run and not Path(args.imagenet_weights).is_file():
        raise PlanError(f"--imagenet_weights {quote(args.imagenet_weights)} is no file")


def check_objective_sweeps(args: argparse.Namespace) -> None:
    """Refuse options that contradict sweeps whose arms have objectives of their own."""
    for sweep in (LABELS, OBJECTIVE):
        if sweep not in args.sweep:
            continue
        if args.objective != DEFAULT_OBJECTIVE:
            raise PlanError(f"--sweep {sweep} begins with Masked Autoencoders; leave --objective {args.objective} out")
        if args.protocol != "ours":
            raise PlanError(f"--sweep {sweep} is no part of --protocol {args.protocol}; leave one of them out")


def check_swept_flags(args: argparse.Namespace) -> None:
    """Refuse flags of trainings that change what the lines of a sweep are."""
    for sweep in args.sweep:
        refuse_swept("--pretrain_args", args.pretrain_args, sweep, SWEPT_IN_PRETRAINING.get(sweep, ()))
        refuse_swept("--finetune_args", args.finetune_args, sweep, SWEPT_IN_FINETUNING.get(sweep, ()))
    if OBJECTIVE in args.sweep and sets_flag(args.pretrain_args, "micro_batch_size"):
        raise PlanError("--sweep objective trains splitmask, which compares all images of a batch; leave "
                        "--micro_batch_size out of --pretrain_args")  # fmt: skip


def refuse_swept(option: str, words: list[str], sweep: str, flags: tuple[str, ...]) -> None:
    """Raise PlanError if the words of an option set one of the flags of a sweep."""
    for flag in flags:
        if sets_flag(words, flag):
            raise PlanError(f"{option} sets --{flag}, which --sweep {sweep} changes; leave one of them out")


def check_protocol(args: argparse.Namespace) -> None:
    """Refuse options that contradict a protocol or an audit."""
    wanted = ""
    if args.protocol != "ours":
        wanted = f"--protocol {args.protocol}"
    if args.audit:
        if wanted:
            raise PlanError(f"--audit changes our protocol one choice at a time; leave {wanted} out")
        wanted = "--audit"
    if not wanted:
        return
    if args.task != DEFAULT_TASK:
        raise PlanError(f"{wanted} is about segmentation; leave --task {args.task} out")
    if args.objective != DEFAULT_OBJECTIVE:
        raise PlanError(f"{wanted} is about Masked Autoencoders; leave --objective {args.objective} out")
    if not args.audit:
        return
    for choice in CHOICES:
        option = "--pretrain_args" if choice.in_pretraining else "--finetune_args"
        given = args.pretrain_args if choice.in_pretraining else args.finetune_args
        for flag in choice.flags:
            if sets_flag(given, flag):
                raise PlanError(f"{option} sets --{flag}, which --audit changes; leave one of them out")


def sets_flag(words: list[str], flag: str) -> bool:
    """Check whether a command line gives a flag any value, or switches it off."""
    return any(word.split("=")[0] in (f"--{flag}", f"--no-{flag}") for word in words)


def reference_flags(args: argparse.Namespace, img_size: str) -> str:
    """Write the flags of `evaluate.py reference`: those of the fine-tunings that say which images, and how trimaps."""
    flags = {"img_size": img_size}
    finetune = PROTOCOLS[args.protocol]["finetune"]
    for name in ("pets_listing", "pets_division", "trimap_resize"):
        if name in finetune:
            flags[name] = finetune[name]
        for value in flag_values(args.finetune_args, f"--{name}"):
            flags[name] = value
    return " ".join(flag_words(flags))


def leak_note(lines: list[PlanLine]) -> str:
    """Say which runs of a plan are trained on test images; "" if none is."""
    leaking = []
    for line in lines:
        divisions = flag_values(line.command.split(), "--pets_division")
        if divisions and divisions[-1] == "leaking":
            leaking.append(line.folder)
    if not leaking:
        return ""
    number = f"{len(leaking)} of {len(lines)} runs"
    return f"# {number} are trained on test images too (--pets_division leaking): {', '.join(leaking)}\n"


def shell_settings(args: argparse.Namespace) -> str:
    """Write the settings of run_all.sh as assignments for bash."""
    if not args.drawn and not args.dry_run:
        check_data(args)
    for folder in (Path(args.output), *Path(args.output).parents):
        if folder.exists() and not folder.is_dir():
            raise PlanError(f"--output {quote(args.output)}: {quote(str(folder))} is a file")
    img_size = str(DEMO_IMG_SIZE if args.demo else IMG_SIZE)
    given = flag_values(args.finetune_args, "--img_size")
    settings = {
        "DATA_ROOT": args.data_root,
        "OUTPUT": args.output,
        "CACHE": args.cache_dir,
        "GPUS": "" if args.gpus is None else str(args.gpus),
        "JOBS": "" if args.jobs is None or args.slurm is not None else str(args.jobs),
        "CPU_JOBS": str(cpu_jobs(args)),
        "CPU_THREADS": str(max(1, num_cores() // cpu_jobs(args))),
        "CPU_CORES": str(num_cores()),
        "DRAWN": str(int(args.drawn)),
        "DRY": str(int(args.dry_run)),
        "SLURM": str(int(args.slurm is not None)),
        "TASK": args.task,
        "SPLITS": splits_flags(args),
        "PROBES": str(int(args.probes)),
        "REFERENCE": reference_flags(args, given[-1] if given else img_size),
        "TITLE": f"model {args.model}, data {args.data_root}, seeds {' '.join(map(str, args.seeds))}",
    }
    return "".join(f"{name}={quote(value)}\n" for name, value in settings.items())


def read_args(words: list[str], prog: str) -> argparse.Namespace:
    """Read the options of a study; PlanError for what cannot be."""
    args = complete(get_args_parser(prog).parse_args(join_values(words)))
    check_names(args)
    check_imagenet(args)
    check_objective_sweeps(args)
    check_swept_flags(args)
    check_protocol(args)
    check_own_images(args)
    return args


def main(words: list[str]) -> None:
    """Print a plan, or the settings of run_all.sh."""
    what = words[0] if words else ""
    if what == "status":
        script = str(Path(__file__).with_name("status.py"))
        os.execv(sys.executable, [sys.executable, script, *words[1:]])
    if what not in ("plan", "settings"):
        raise PlanError("say what to print: study.py plan, study.py status FOLDER, or study.py settings for run_all.sh")
    args = read_args(words[1:], "run_all.sh" if what == "settings" else "study.py plan")
    sys.stdout.reconfigure(errors="surrogateescape")  # names of folders may be any bytes
    if what == "settings":
        sys.stdout.write(shell_settings(args))
    else:
        # Only the original protocol asks for something that CPUs lack, and asking torch takes a second.
        args.on_gpus = args.protocol != "ours" and has_gpus(args)
        lines = make_plan(args, has_paper_sizes(args))
        sys.stdout.write(write_lines(lines))
        sys.stderr.write(leak_note(lines))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        asked = "run_all.sh" if sys.argv[1:2] == ["settings"] else "study.py"  # whose options were wrong
        print(f"{asked}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
