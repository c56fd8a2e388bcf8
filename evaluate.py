"""Score trained networks on the test images, once, into records from which every number of the report is derived.

    python evaluate.py test runs/study/seed0/finetune_animal runs/study/seed0/baseline_resnet50
    python evaluate.py reference --img_size 224 --output runs/study/reference.npz     # trivial predictors
    python evaluate.py predict --checkpoint runs/study/seed0/finetune_animal/model.pt cat.jpg dog.png

`test` writes test.npz (and panels.npz) into each run's folder; about 10 s per run and 1,103 images on a GPU. `predict`
writes a mask (PNG with trimap values: 1 pet, 2 background, 3 border) and an overlay for any image file; a network that names
classes prints its first five guesses.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import splits
from classification import Classification, classify
from engine import (
    LARGEST_SIZE,
    EngineError,
    Parser,
    Precision,
    at_least,
    hash_file,
    launch,
    read_json,
    setup,
    write_atomic,
    write_json,
)
from metrics import PET
from objective import Task, TestSetting
from segmentation import REFERENCES, Segmentation, predict, reference_records, summary_of
from tasks import TASKS
from weights import identify, load_model

# Colours of the file values 0 to 3: unused, pet, background, border; told apart by colour-blind readers.
PALETTE = [0, 0, 0, 230, 159, 0, 0, 0, 0, 86, 180, 233]


REFERENCE_BATCH = 64  # images at a time, of predictors that look at none
GUESSES = 5  # classes that predict names for an image


def load_network(path: Path, device: torch.device) -> tuple[torch.nn.Module, dict]:
    """Load what finetune.py or baseline.py trained -> (network, checkpoint). EngineError for an encoder."""
    model, checkpoint = load_model(str(path))
    if checkpoint["model_config"]["kind"] in ("mae", "vit"):
        raise EngineError(f"{path} is a pre-trained autoencoder; fine-tune it: finetune.py --init {path}")
    return model.to(device), checkpoint


def read_config(run: Path) -> dict:
    """Read the task ("kind") and flags ("args") of a run; an empty dictionary if only its weights are there."""
    record = run / "config.json"
    if not record.exists():
        return {}
    try:
        content = read_json(record)
        return {"kind": content["kind"], "args": dict(content["args"])}
    except (ValueError, KeyError, TypeError):
        raise EngineError(f"{record} cannot be read; train the run again") from None


def task_of(run: Path, recorded: dict, config: dict) -> type[Task]:
    """Find the task of a run by its record; without one, the first task whose networks are of this kind."""
    if recorded:
        name = recorded["kind"]
        if name not in TASKS:
            raise EngineError(f"{run} was trained on the task {name!r}; known: {', '.join(TASKS)}")
        return TASKS[name]
    for task in TASKS.values():
        if task.model_kind == config["kind"]:
            return task
    raise EngineError(f"{run}/model.pt holds a {config['kind']!r}, which no task tests")


def is_tested(run: Path, weights: str) -> bool:
    """Tell whether a run's records are there, unchanged, and of these weights; clocks may be wrong, hashes are not."""
    try:
        record = read_json(run / "test.json")
        files = {name: hash_file(run / name) for name in record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return record == {"weights": weights, "files": files}


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays into a compressed .npz, completely or not at all."""
    write_atomic(path, lambda file: np.savez_compressed(file, **arrays))


def write_records(run: Path, records: dict[str, np.ndarray], weights: str) -> None:
    """Write panels.npz (the examples, if a task shows some), test.npz, and test.json: of which weights they are."""
    prefix = "panel_"
    panels = {name.removeprefix(prefix): array for name, array in records.items() if name.startswith(prefix)}
    if panels:
        write_arrays(run / "panels.npz", panels)
    scores = {name: array for name, array in records.items() if not name.startswith(prefix)}
    write_arrays(run / "test.npz", scores)
    names = ("panels.npz", "test.npz") if panels else ("test.npz",)
    write_json(run / "test.json", {"weights": weights, "files": {name: hash_file(run / name) for name in names}})


def main_test(args: argparse.Namespace) -> None:
    """Test finished runs."""
    runs = [Path(run) for run in args.runs]
    for run in runs:
        if not (run / "model.pt").exists():
            raise EngineError(f"{run} has no model.pt: it is not a finished run; repeat its training command first")
    dist = setup(args.device)
    precision = Precision(args.precision, dist.device)
    for run in runs:
        weights = identify(run / "model.pt")
        if is_tested(run, weights) and not args.again:
            print(f"{run}: tested before; nothing to do (--again repeats it)")
            continue
        model, checkpoint = load_network(run / "model.pt", dist.device)
        config = checkpoint["model_config"]
        recorded = read_config(run)
        task = task_of(run, recorded, config)
        flags = recorded.get("args", {})
        if args.images is not None:
            if "images" not in flags:
                raise EngineError(f"{run} was not trained on a folder of classes; leave --images out")
            flags["images"] = args.images
        setting = TestSetting(args.data_root, args.cache_dir, args.batch_size, dist, precision, flags)
        records = task.test(model, config["img_size"], setting)
        write_records(run, records, weights)
        print(f"{run}: {task.summary(records)}")


def main_reference(args: argparse.Namespace) -> None:
    """Score what any network should beat."""
    dist = setup(args.device)
    precision = Precision("fp32", dist.device)
    setting = TestSetting(args.data_root, args.cache_dir, REFERENCE_BATCH, dist, precision, vars(args))
    records = reference_records(setting, args.img_size)
    write_arrays(Path(args.output), records)
    for name in REFERENCES:
        print(f"{name}: {summary_of(records[f'counts_{name}'])}")


def free_stem(folder: Path, image: Path, number: int, used: set[Path], inputs: set[Path]) -> Path:
    """Choose the start of an image's output names: two folders may hold the same name, and inputs are never replaced."""
    stem = folder / image.stem
    while True:
        outputs = [Path(f"{stem}_{end}.png").resolve() for end in ("mask", "overlay")]
        if stem not in used and not inputs.intersection(outputs):
            return stem
        stem = stem.with_name(f"{stem.name}_{number}")


def write_prediction(image: Image.Image, classes: np.ndarray, stem: Path) -> None:
    """Write the mask [H, W] of classes 0, 1, 2 and the image with the mask over it."""
    mask = Image.fromarray(classes + 1)
    mask.putpalette(PALETTE)
    mask.save(f"{stem}_mask.png")
    Image.blend(image, mask.convert("RGB"), 0.5).save(f"{stem}_overlay.png")


def is_drawn_demo(run: Path) -> bool:
    """Tell whether a run was trained on the drawn demo data, as far as its record says."""
    try:
        title = json.loads((run / "config.json").read_text())["data"]["title"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return str(title).startswith("drawn demo photos")


class Masks:
    """Writes the mask and the overlay of each image into a folder."""

    what = "masks"

    def __init__(self, args: argparse.Namespace, checkpoint: dict):
        self.folder = Path(args.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.inputs = {Path(path).resolve() for path in args.images}
        self.img_size = checkpoint["model_config"]["img_size"]
        self.used: set[Path] = set()

    def show(self, model: torch.nn.Module, image: Image.Image, path: str, device: torch.device) -> None:
        """Segment an image and say where its mask is."""
        classes = predict(model, image, self.img_size, device)
        stem = free_stem(self.folder, Path(path), len(self.used), self.used, self.inputs)
        self.used.add(stem)
        write_prediction(image, classes, stem)
        share = 100 * (classes == PET).mean()
        outputs = ", ".join(data.show_path(f"{stem}_{end}.png") for end in ("mask", "overlay"))
        print(f"{data.show_path(path)}: pet {share:.1f} % of the pixels -> {outputs}")


class Names:
    """Prints the most probable classes of each image, a line `name, probability` for each."""

    what = "names"

    def __init__(self, args: argparse.Namespace, checkpoint: dict):
        self.img_size = checkpoint["model_config"]["img_size"]
        numbered = [f"class {number}" for number in range(checkpoint["model_config"]["num_classes"])]
        self.classes = checkpoint.get("classes", numbered)

    def show(self, model: torch.nn.Module, image: Image.Image, path: str, device: torch.device) -> None:
        """Print an image's path and its most probable classes."""
        probabilities = classify(model, image, self.img_size, device)
        print(f"{data.show_path(path)}:")
        for number in np.argsort(-probabilities, kind="stable")[:GUESSES]:
            print(f"  {data.show_path(self.classes[number])}, {probabilities[number]:.3f}")


PREDICTIONS = {Segmentation.model_kind: Masks, Classification.model_kind: Names}


def main_predict(args: argparse.Namespace) -> None:
    """Segment image files, or name what they show."""
    device = setup(args.device).device
    path = Path(args.checkpoint)
    model, checkpoint = load_network(path, device)
    kind = checkpoint["model_config"]["kind"]
    if kind not in PREDICTIONS:
        raise EngineError(f"{path} holds a {kind!r}; predict shows what {' or '.join(PREDICTIONS)}s find")
    prediction = PREDICTIONS[kind](args, checkpoint)
    if is_drawn_demo(path.parent):
        print(f"note: this network was trained on a few drawn pets; its {prediction.what} of photos mean nothing")
    failed = 0
    for image_path in args.images:
        try:
            image = data.read_image(image_path)
        except (data.DataError, OSError) as error:
            print(f"skipped: {error}")
            failed += 1
            continue
        prediction.show(model, image, image_path, device)
    if failed:
        raise EngineError(f"{failed} of {len(args.images)} images could not be read", 1)


def get_args_parser() -> Parser:
    """Make the parser of the three commands."""
    parser = Parser("evaluate.py", description="Test-set records, reference points and predictions")
    commands = parser.add_subparsers(dest="command", required=True)
    test = commands.add_parser("test", help="score finished runs on the test images")
    test.set_defaults(function=main_test)
    test.add_argument("runs", nargs="+", help="folders of finished finetune.py or baseline.py runs")
    test.add_argument(
        "--batch_size", type=at_least(1, int), default=64, help="images at a time; does not change the scores"
    )
    test.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="as in training")
    test.add_argument("--again", action="store_true", help="score again what was scored before")
    test.add_argument("--images", metavar="DIR", help="of --task classify, if the folder of classes has moved")
    reference = commands.add_parser("reference", help="scores of predictors that look at no image")
    reference.set_defaults(function=main_reference)
    reference.add_argument(
        "--img_size", type=at_least(1, int, LARGEST_SIZE), default=224, help="input size of the runs they stand beside"
    )
    reference.add_argument("--output", default="reference.npz", help="file to write")
    reference.add_argument("--pets_listing", choices=splits.PETS_LISTS, default="list.txt", help="as in training")
    reference.add_argument("--pets_division", choices=splits.PETS_DIVISIONS, default="disjoint", help="as in training")
    reference.add_argument("--trimap_resize", choices=data.TRIMAP_RESIZE, default="nearest", help="as in training")
    guess = commands.add_parser("predict", help="masks and overlays of any image files, or their classes")
    guess.set_defaults(function=main_predict)
    guess.add_argument("images", nargs="+", help="image files")
    guess.add_argument("--checkpoint", required=True, help="model.pt of a fine-tuned run or a baseline")
    guess.add_argument("--output_dir", default="predictions", help="folder to write to")
    for command in (test, reference):
        command.add_argument("--data_root", default="data", help="folder with oxford-iiit-pet/")
        command.add_argument("--cache_dir", default="cache", help="folder of the decoded images")
    for command in (test, reference, guess):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run the chosen command."""
    args.function(args)


if __name__ == "__main__":
    launch(main, get_args_parser())
