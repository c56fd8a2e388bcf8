"""Ask frozen encoders what they know of Oxford-IIIT Pet: breeds from image features, trimaps from patch tokens.

    python probe.py runs/study/seed0/pretrain_animal --random       # and the random encoder that it began as
    python probe.py runs/study --random                             # all pre-trainings of a study
    python probe.py mae_pretrain_vit_base.pth --model mae_base      # a published checkpoint

Breeds: cosine k-NN (Caron et al. 2021), a linear classifier, and linear classifiers on 1, 5 and 10 images of each breed,
drawn five times (Singh et al. 2023). Trimaps: a linear classifier of the patch tokens, enlarged to the input. Every choice
is made on the validation images; the test images are scored once, after the last choice.
Writes probe.json, probe.npz (each test image) and the features into the folder of the run; probe_cls.* with --pool cls.
An encoder of the demo (320 photos at 64 px) takes about 20 s of one CPU core.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import engine
import probes
from engine import (
    LARGEST_SIZE,
    EngineError,
    Parser,
    Precision,
    Progress,
    at_least,
    hash_file,
    launch,
    read_json,
    seed_number,
    write_atomic,
    write_json,
)
from features import Encoder, Pets, key_of, load_encoder, open_pets, random_encoder, read_features
from metrics import dataset_scores
from models import MODELS
from objective import TestSetting
from probe_records import POOLS, SHOTS, few_images_note, random_folder, record_name
from probes import Bank, Linear, Standard, fit_path, knn_votes, one_hot, standardise, take_shots
from segmentation import NUM_CLASSES, confusion, upsample
from study import read_plan

DRAWS = 5  # of each number of shots
SHOTS_SEED = 20171  # the same draws for every encoder, so that they are compared in pairs
TRIMAP_STRENGTHS = (1e-2, 1e-4, 1e-6)  # there are far more patches than features, so little depends on it
TRIMAP_BATCH = 64  # images whose logits are enlarged at a time
VERSION = 1  # of the probes; records of another one are made anew


# ----------------------------------------------------------------------------------------------------------------------
# What is asked of


@dataclass(frozen=True)
class Part:
    """One part of the pets on the device: features [n, D], tokens [n, L, D], breeds [n], trimaps [n, S, S]."""

    features: Tensor
    tokens: Tensor
    labels: Tensor
    truth: Tensor


@dataclass(frozen=True)
class Material:
    """What probes are fitted to and chosen by, and how many breeds there are; grid: rows and columns of the tokens."""

    train: Part
    val: Part
    num_breeds: int
    grid: tuple[int, int]


def top1(found: Tensor, labels: Tensor) -> float:
    """Give the share of breeds int64 [..., n] that equal the labels [n]."""
    return (found == labels).double().mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# Breeds


@dataclass(frozen=True)
class BreedProbe:
    """A probe whose every choice is made. predict: features [n, D] -> breeds int64 [draws, n]."""

    name: str
    predict: Callable[[Tensor], Tensor]
    validation: float  # top-1 on the validation images, mean over draws
    strength: float | None = None  # of the regulariser, where there is one


def ask_neighbours(material: Material, name: str, temperature: float | None) -> BreedProbe:
    """Make the k-NN classifier of the training images; nothing is chosen."""
    train = material.train
    bank = Bank(train.features, train.labels, material.num_breeds)

    def predict(features: Tensor) -> Tensor:
        return knn_votes(features, bank, temperature=temperature).argmax(1)[None]

    return BreedProbe(name, predict, top1(predict(material.val.features), material.val.labels))


def ask_linear(material: Material, name: str, draws: Sequence[Tensor], progress: Progress) -> BreedProbe:
    """Fit linear classifiers to each draw (indices) of the training images, and choose one regulariser for all draws.

    Features are standardised by all training images, which takes no label. Of equally good regularisers the strongest.
    """
    train = material.train
    standard = standardise(train.features)
    paths = []
    for chosen in draws:
        targets = one_hot(train.labels[chosen], material.num_breeds)
        paths.append(fit_path(train.features[chosen], targets, standard, update=progress.update))

    def predict_by(strength: float, features: Tensor) -> Tensor:
        rows = standard(features)
        return torch.stack([path[strength](rows).argmax(1) for path in paths])

    found = {}
    for strength in probes.STRENGTHS:
        found[strength] = top1(predict_by(strength, material.val.features), material.val.labels)
    best = max(found, key=found.get)
    return BreedProbe(name, lambda features: predict_by(best, features), found[best], best)


def draw_shots(labels: Tensor, shots: int) -> list[Tensor]:
    """Draw `shots` images of each breed, DRAWS times -> indices of each draw; the same for every encoder."""
    draws = []
    for number in range(DRAWS):
        order = data.seeded_rng(SHOTS_SEED, number).permutation(len(labels))
        draws.append(take_shots(labels, torch.from_numpy(order).to(labels.device), shots))
    return draws


def ask_breeds(material: Material) -> list[BreedProbe]:
    """Make all probes of the breeds."""
    train = material.train
    everything = torch.arange(len(train.labels), device=train.labels.device)
    found = [ask_neighbours(material, "knn", probes.TEMPERATURE), ask_neighbours(material, "knn_plain", None)]
    fits = (1 + DRAWS * len(SHOTS)) * len(probes.STRENGTHS)
    with Progress("linear classifiers of breeds", fits, unit="fit") as progress:
        found.append(ask_linear(material, "linear", [everything], progress))
        for shots in SHOTS:
            draws = draw_shots(train.labels, shots)
            found.append(ask_linear(material, f"shot_{shots}", draws, progress))
    return found


def breed_scores(probe: BreedProbe, found: Tensor, labels: Tensor) -> dict:
    """Score the predictions [draws, n] of a probe on test images: means over draws, and their standard deviation."""
    right = (found == labels).double()
    each = right.mean(1)
    of_breeds = [right[:, labels == number].mean(1) for number in labels.unique().tolist()]
    scores = {
        "top1": each.mean().item(),
        "per_class": torch.stack(of_breeds).mean().item(),
        "validation_top1": probe.validation,
    }
    if probe.strength is not None:
        scores["strength"] = probe.strength
    if len(each) > 1:
        scores["draws"] = each.tolist()
        scores["std"] = each.std().item()
    return scores


# ----------------------------------------------------------------------------------------------------------------------
# Trimaps


@dataclass(frozen=True)
class TrimapProbe:
    """A linear classifier of patch tokens whose every choice is made; validation: its IoU on the validation images."""

    count: Callable[[Part], Tensor]
    validation: float
    strength: float


def patch_shares(truth: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute which share of each patch is pet, background and border: trimaps [n, S, S] -> float32 [n * L, 3]."""
    shares = []
    for part in truth.split(TRIMAP_BATCH):
        planes = F.one_hot(part.long(), NUM_CLASSES).permute(0, 3, 1, 2).float()
        shares.append(F.adaptive_avg_pool2d(planes, grid).flatten(2).mT.flatten(0, 1))
    return torch.cat(shares)


def count_pixels(linear: Linear, standard: Standard, part: Part, grid: tuple[int, int]) -> Tensor:
    """Classify the patches of a part, enlarge the logits to the trimaps, and count pixels by class -> int64 [n, 3, 3]."""
    counts = []
    for tokens, truth in zip(part.tokens.split(TRIMAP_BATCH), part.truth.split(TRIMAP_BATCH), strict=True):
        logits = linear(standard(tokens)).mT.unflatten(2, grid)
        enlarged = upsample(logits, tuple(truth.shape[1:]))
        counts.append(confusion(truth.long(), enlarged.argmax(1)))
    return torch.cat(counts)


def ask_trimaps(material: Material) -> TrimapProbe:
    """Fit a linear classifier to the patch tokens of the training images, and choose its regulariser."""
    rows = material.train.tokens.flatten(0, 1)
    standard = standardise(rows)
    targets = patch_shares(material.train.truth, material.grid)
    with Progress("linear classifiers of patches", len(TRIMAP_STRENGTHS), unit="fit") as progress:
        path = fit_path(rows, targets, standard, TRIMAP_STRENGTHS, progress.update)
    found = {}
    for strength, linear in path.items():
        counts = count_pixels(linear, standard, material.val, material.grid)
        found[strength] = float(dataset_scores(counts.cpu().numpy())["iou"])
    best = max(found, key=found.get)
    return TrimapProbe(lambda part: count_pixels(path[best], standard, part, material.grid), found[best], best)


# ----------------------------------------------------------------------------------------------------------------------
# One encoder


class Answers(NamedTuple):
    """What was found out about an encoder: scores and meters for probe.json, arrays for probe.npz."""

    scores: dict
    meters: dict
    arrays: dict[str, np.ndarray]


def ask(encoder: Encoder, pets: Pets, folder: Path, setting: TestSetting, pool: str) -> Answers:
    """Make all choices on training and validation images, then score the test images once."""
    features = read_features(folder, encoder, pets, setting)
    pooled = features.mean if pool == "mean" else features.cls
    device = setting.dist.device

    def take(name: str) -> Part:
        places = pets.parts[name]
        tensors = (pooled, features.tokens, pets.labels, pets.truth)
        return Part(*(tensor[places].to(device) for tensor in tensors))

    material = Material(take("train"), take("val"), pets.num_breeds, encoder.grid)
    meters = {
        "images": probes.measure_collapse(material.train.features),
        "patches": probes.measure_collapse(material.train.tokens.flatten(0, 1)),
    }
    breed_probes = ask_breeds(material)
    trimap_probe = ask_trimaps(material)
    return score_test(breed_probes, trimap_probe, take("test"), meters)


def score_test(breed_probes: list[BreedProbe], trimap_probe: TrimapProbe, test: Part, meters: dict) -> Answers:
    """Score finished probes on the test images."""
    scores = {}
    numerators = []
    for probe in breed_probes:
        found = probe.predict(test.features)
        scores[probe.name] = breed_scores(probe, found, test.labels)
        numerators.append((found == test.labels).double().mean(0).cpu().numpy())
    counts = trimap_probe.count(test).cpu().numpy()
    pixels = {name: float(value) for name, value in dataset_scores(counts).items()}
    scores["trimap"] = {**pixels, "validation_iou": trimap_probe.validation, "strength": trimap_probe.strength}
    right = np.stack(numerators, axis=1)
    arrays = {
        "labels": test.labels.cpu().numpy(),
        "score_names": np.array([probe.name for probe in breed_probes]),
        "numerators": right,
        "denominators": np.ones_like(right),
        "counts": counts,
    }
    return Answers(scores, meters, arrays)


def most_frequent(pets: Pets) -> float:
    """Score the breed that most training photos show, on the test photos: what can be had without looking."""
    train = pets.labels[pets.parts["train"]]
    usual = train.bincount().argmax()
    return top1(usual, pets.labels[pets.parts["test"]])


# ----------------------------------------------------------------------------------------------------------------------
# Records


def read_record(folder: Path, name: str, key: dict) -> dict | None:
    """Read the record of an encoder that was probed before; None if there is none, or it is of something else or damaged."""
    try:
        record = read_json(folder / f"{name}.json")
        intact = all(hash_file(folder / file) == digest for file, digest in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not intact or record.get("key") != key:
        return None
    return record


def write_record(folder: Path, name: str, record: dict, arrays: dict[str, np.ndarray]) -> None:
    """Write NAME.npz, then NAME.json, which has its hash."""
    file = f"{name}.npz"
    write_atomic(folder / file, lambda stream: np.savez_compressed(stream, **arrays))
    write_json(folder / f"{name}.json", {**record, "files": {file: hash_file(folder / file)}})


class Prober:
    """Probes encoders on the same photos, and keeps what was found in their folders."""

    def __init__(self, setting: TestSetting, pool: str, again: bool):
        self.setting = setting
        self.pool = pool
        self.again = again
        self.pets: dict[int, Pets] = {}  # by their size

    def open_pets(self, size: int) -> Pets:
        """Open the photos at a size; encoders of one size share them."""
        if size not in self.pets:
            self.pets[size] = open_pets(self.setting, size)
        return self.pets[size]

    def probe(self, encoder: Encoder, folder: Path, facts: dict) -> dict:
        """Probe an encoder, unless that was done before -> the record of probe.json, of which `facts` become a part."""
        pets = self.open_pets(encoder.img_size)
        name = record_name(self.pool)
        key = {**key_of(encoder, pets, self.setting), "pool": self.pool, "version": VERSION}
        before = read_record(folder, name, key)
        if before is not None and not self.again:
            print(f"{folder}: probed before; nothing to do (--again repeats it)", flush=True)
            return before
        print(f"{folder}: {len(pets.images):,} photos of {pets.num_breeds} breeds", flush=True)
        answers = ask(encoder, pets, folder, self.setting, self.pool)
        record = {
            "key": key,
            "model": encoder.model,
            "img_size": encoder.img_size,
            **facts,
            "photos": {part: len(places) for part, places in pets.parts.items()},
            "breeds": pets.num_breeds,
            "unreadable": pets.store.dropped,
            "most_frequent_breed": most_frequent(pets),
            "fewest_of_a_breed": pets.labels[pets.parts["train"]].bincount(minlength=pets.num_breeds).min().item(),
            "scores": answers.scores,
            "meters": answers.meters,
            "hardware": engine.hardware_name(self.setting.dist.device),
        }
        ids = [Path(pets.images[place]).stem for place in pets.parts["test"].tolist()]
        write_record(folder, name, record, {"ids": np.array(ids), **answers.arrays})
        return record


# ----------------------------------------------------------------------------------------------------------------------
# Which encoders


class Target(NamedTuple):
    """A checkpoint and the folder that its records belong into."""

    checkpoint: Path
    folder: Path


def find_targets(path: Path) -> list[Target]:
    """Find the checkpoints of a run's folder, of a file, or of the finished pre-trainings of a study."""
    if (path / "study.tsv").exists():
        return find_pretrainings(path)
    if path.is_dir():
        target = Target(path / "model.pt", path)
    elif path.name == "model.pt":
        target = Target(path, path.parent)
    else:
        target = Target(path, path.with_name(f"{path.stem}_probe"))
    if not target.checkpoint.exists():
        advice = "it is not a finished run; repeat its training command first"
        problem = f"{path} has no model.pt: {advice}" if path.is_dir() else f"{path} does not exist"
        raise EngineError(problem)
    return [target]


def find_pretrainings(study: Path) -> list[Target]:
    """Find the finished pre-trainings of a study, and name the others."""
    targets = []
    for line in read_plan(study / "study.tsv"):
        if line.stage != "pretrain":
            continue
        folder = study / line.folder
        if (folder / "metrics.json").exists() and (folder / "model.pt").exists():
            targets.append(Target(folder / "model.pt", folder))
        else:
            print(f"{folder} is not finished: not probed", flush=True)
    if not targets:
        raise EngineError(f"{study} has no finished pre-training to probe")
    return targets


def read_run(target: Target) -> dict:
    """Read what config.json says of a run: its seed, and remarks that every reader must know; nothing if it is missing."""
    path = target.folder / "config.json"
    if not path.exists():
        return {}
    config = read_json(path)
    found = {"remarks": config.get("remarks", [])}
    if "seed" in config.get("args", {}):
        found["seed"] = config["args"]["seed"]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The table on the screen

HEADS = ("encoder", "20-NN", "linear", "1-shot", "5-shot", "10-shot", "trimap IoU", "spread", "rank")
BREED_COLUMNS = ("knn", "linear", *(f"shot_{shots}" for shots in SHOTS))


def table_row(name: str, record: dict) -> list[str]:
    """Write the scores of an encoder as cells."""
    cells = [name]
    for probe in BREED_COLUMNS:
        scores = record["scores"][probe]
        text = f"{scores['top1']:.3f}"
        if "std" in scores:
            text += f" ±{scores['std']:.3f}"
        cells.append(text)
    meters = record["meters"]["images"]
    trimap = record["scores"]["trimap"]["iou"]
    return [*cells, f"{trimap:.3f}", f"{meters['spread']:.3f}", f"{meters['rank']:.1f}"]


def print_table(records: dict[str, dict]) -> None:
    """Print the scores of encoders in columns."""
    rows = [list(HEADS)]
    for name, record in records.items():
        rows.append(table_row(name, record))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells))
    usual = max(record["most_frequent_breed"] for record in records.values())
    print(
        f"breeds: test top-1 (the most frequent breed: {usual:.3f}); few shots: mean ± standard deviation of {DRAWS} draws"
    )
    for record in records.values():
        note = few_images_note(record)
        if note:
            print(f"note: {note}")
            break


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def get_args_parser() -> Parser:
    """Make the parser."""
    parser = Parser("probe.py", description="What frozen encoders know of Oxford-IIIT Pet")
    parser.add_argument(
        "runs", nargs="+", help="folders of runs, checkpoints, or a study's folder for its pre-trainings"
    )
    parser.add_argument(
        "--random",
        action="store_true",
        help="also ask a random encoder of the same size: the yardstick that every pre-training must beat",
    )
    parser.add_argument(
        "--pool",
        choices=POOLS,
        default="mean",
        help="what stands for an image: the mean of its patch tokens, or the class token, for which MAE has no loss",
    )
    parser.add_argument("--model", choices=list(MODELS), default="mae_base", help="size of a file that does not say so")
    parser.add_argument(
        "--img_size", type=at_least(1, int, LARGEST_SIZE), default=224, help="input size of a file that does not say so"
    )
    parser.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        help="of the random encoder, where the run has no config.json with its own",
    )
    parser.add_argument("--again", action="store_true", help="probe again what was probed before")
    parser.add_argument("--data_root", default="data", help="folder with oxford-iiit-pet/")
    parser.add_argument("--cache_dir", default="cache", help="folder of the decoded images")
    parser.add_argument("--batch_size", type=at_least(1, int), default=64, help="images at a time")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="of the encoder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def main(args: argparse.Namespace) -> None:
    """Probe all encoders, and print what was found."""
    targets = [target for run in args.runs for target in find_targets(Path(run))]
    dist = engine.setup(args.device)
    precision = Precision(args.precision, dist.device)
    setting = TestSetting(args.data_root, args.cache_dir, args.batch_size, dist, precision, flags={})
    prober = Prober(setting, args.pool, args.again)
    records = {}
    for target in targets:
        run = read_run(target)
        encoder = load_encoder(target.checkpoint, args.model, args.img_size)
        if args.pool == "cls" and encoder.model == "resnet50":
            raise EngineError(f"{target.checkpoint} holds a ResNet-50, which has no class token; leave --pool cls out")
        seed = run.get("seed", args.seed)
        records[str(target.folder)] = prober.probe(encoder, target.folder, run)
        beside = random_folder(target.folder, encoder.model, encoder.img_size, seed)
        if args.random and str(beside) not in records:
            random = random_encoder(encoder.model, encoder.img_size, seed)
            records[str(beside)] = prober.probe(random, beside, {"seed": seed, "random": True})
    print_table(records)


if __name__ == "__main__":
    launch(main, get_args_parser())
