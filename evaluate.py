"""Score trained segmenters on the test images, once, into records from which every number of the report is derived.

    python evaluate.py test runs/study/seed0/finetune_animal runs/study/seed0/baseline_resnet50
    python evaluate.py reference --img_size 224 --output runs/study/reference.npz     # trivial predictors, stride-32 ceiling
    python evaluate.py predict --checkpoint runs/study/seed0/finetune_animal/model.pt cat.jpg dog.png

`test` writes test.npz and panels.npz into each run's folder; about 10 s per run and 1,103 images on a GPU. `predict` writes
a mask (PNG with trimap values: 1 pet, 2 background, 3 border) and an overlay for any image file.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import augment
import data
import splits
from engine import EngineError, Parser, Precision, Progress, launch, setup, write_atomic
from metrics import dataset_scores
from weights import load_model

COLOURS = ((230, 159, 0), (0, 0, 0), (86, 180, 233))  # pet, background, border; safe for colour-blind eyes


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def confusion(truth: torch.Tensor, pred: torch.Tensor, classes: int = 3) -> torch.Tensor:
    """Count pixels per image by class: truth, pred [B, H, W] integers -> int64 [B, classes, classes], rows = truth.

    A product of one-hot masks: exact in float32 below 2^24 pixels an image, and free of synchronisation on GPUs.
    """
    with torch.autocast(truth.device.type, enabled=False):
        labels = torch.arange(classes, device=truth.device)[:, None]
        rows, columns = ((x.flatten(1)[:, None] == labels).float() for x in (truth, pred))
        return (rows @ columns.transpose(1, 2)).round().long()


def boundary_counts(truth: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
    """Intersection and union of two masks' boundary bands: bool [B, H, W] -> int64 [B, 2] (Cheng et al. 2021, Boundary IoU).

    A band holds the mask's pixels within 2 % of the image diagonal of its outline; the image's edge counts as outline.
    """
    width = max(1, round(0.02 * (truth.shape[-2] ** 2 + truth.shape[-1] ** 2) ** 0.5))

    def band(mask):
        outside = F.pad(1 - mask.float(), (width,) * 4, value=1.0)[:, None]
        near = F.max_pool2d(F.max_pool2d(outside, (2 * width + 1, 1), 1), (1, 2 * width + 1), 1)[:, 0]
        return mask & (near > 0)

    a, b = band(truth), band(pred)
    return torch.stack([(a & b).flatten(1).sum(1), (a | b).flatten(1).sum(1)], dim=1)


def boundaries(truth: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
    """Boundary counts of {pet} and of {pet or border}: classes [B, H, W] -> int64 [B, 2, 2]."""
    return torch.stack([boundary_counts(truth == 0, pred == 0), boundary_counts(truth != 1, pred != 1)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Test records


class TestSet:
    """The test images at an input size, with their truth at that size and at each file's own."""

    def __init__(self, args, img_size: int, device: torch.device):
        split = splits.pets_split(args.data_root, "test")
        options = {"kind": "image", "cache_dir": args.cache_dir, "cache_size": img_size}
        data.build_cache(args.data_root, split.images, progress=Progress, **options)
        self.store = data.ImageStore(args.data_root, split.images, device=device, **options)
        self.ids, self.img_size = [Path(x).stem for x in self.store.images], img_size
        self.truth = data.load_truth(args.data_root, self.store.images, img_size)
        root = Path(args.data_root)
        self.read_native = [
            functools.partial(data.read_trimap, root / data.trimap_path(x), root / x) for x in self.store.images
        ]
        # Shown in the report: spread over the alphabetical list, chosen before any score is known.
        order = np.argsort(self.ids)
        self.panel = order[np.linspace(0, len(order) - 1, min(6, len(order))).round().astype(int)]


@torch.no_grad()
def test_records(model: torch.nn.Module, test: TestSet, device: torch.device, precision: Precision, batch_size: int):
    """Score a model on the test images -> (records of every image, panels of a few), as dictionaries of arrays."""
    parts: dict[str, list] = {
        k: [] for k in ("counts", "counts_native", "loss_sum", "pixels", "boundary", "boundary_native")
    }
    panels: dict[int, tuple] = {}
    batches = augment.EvalBatches(test.store, img_size=test.img_size, batch_size=batch_size, device=device)
    with Progress("testing", len(test.ids)) as progress:
        for index, images in batches:
            truth = test.truth[index.cpu()].to(device).long()
            with precision.autocast():
                logits = model(images).float()
            pred = logits.argmax(1)
            loss = F.cross_entropy(logits, truth, reduction="none").flatten(1).double().sum(1)
            parts["counts"].append(confusion(truth, pred))
            parts["boundary"].append(boundaries(truth, pred))
            parts["loss_sum"].append(loss)
            parts["pixels"].append(torch.full_like(loss, truth[0].numel(), dtype=torch.int64))
            for i, k in enumerate(index.tolist()):  # native sizes differ, so images go one by one here
                native = torch.from_numpy(test.read_native[k]()).to(device).long()[None]
                large = F.interpolate(
                    logits[i : i + 1], size=native.shape[-2:], mode="bilinear", align_corners=False
                ).argmax(1)
                parts["counts_native"].append(confusion(native, large))
                parts["boundary_native"].append(boundaries(native, large))
                if k in test.panel:
                    panels[k] = (augment.denormalise(images[i : i + 1])[0], truth[i], pred[i])
            progress.update(len(index))
    records = {k: torch.cat(v).cpu().numpy() for k, v in parts.items()} | {
        "ids": np.array(test.ids),
        "img_size": np.array(test.img_size),
    }
    chosen = [panels[k] for k in test.panel]
    shown = torch.stack([x.round().clamp(0, 255).byte().permute(1, 2, 0).cpu() for x, _, _ in chosen]).numpy()
    masks = {name: torch.stack([c[i].byte().cpu() for c in chosen]).numpy() for i, name in ((1, "truth"), (2, "pred"))}
    return records, {"ids": np.array([test.ids[k] for k in test.panel]), "images": shown, **masks}


def save_npz(path: Path, arrays: dict) -> None:
    write_atomic(path, lambda f: np.savez_compressed(f, **arrays))


def main_test(args: argparse.Namespace) -> None:
    for run in args.runs:
        if not (Path(run) / "model.pt").exists():
            raise EngineError(f"{run} has no model.pt: it is not a finished run; finish its training first")
    dist = setup(args.device)
    precision, sets = Precision(args.precision, dist.device), {}
    for run in map(Path, args.runs):
        record = run / "test.npz"
        if record.exists() and record.stat().st_mtime >= (run / "model.pt").stat().st_mtime and not args.again:
            print(f"{run}: tested before; nothing to do (--again repeats it)")
            continue
        model, checkpoint = load_model(str(run / "model.pt"))
        if checkpoint["model_config"]["kind"] != "segmenter":
            raise EngineError(
                f"{run}/model.pt is a pre-trained autoencoder; fine-tune it: finetune.py --init {run}/model.pt"
            )
        img_size = checkpoint["model_config"]["img_size"]
        if img_size not in sets:
            sets[img_size] = TestSet(args, img_size, dist.device)
        records, panels = test_records(model.to(dist.device), sets[img_size], dist.device, precision, args.batch_size)
        save_npz(run / "panels.npz", panels)
        save_npz(record, records)
        scores = dataset_scores(records["counts"])
        loss = records["loss_sum"].sum() / records["pixels"].sum()
        print(
            f"{run}: loss {loss:.3f}, IoU {scores['iou']:.3f}, accuracy {scores['accuracy']:.3f}, mIoU {scores['miou']:.3f}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Reference points


def stride32_predictions(truth: torch.Tensor, stride: int = 32, steps: int = 80) -> torch.Tensor:
    """Best masks a coarse output can draw: truth [B, H, W] -> classes [B, H, W].

    Logits at 1/stride of the size are fitted to each truth directly (Adam on the cross-entropy, started from the classes'
    shares in each cell) and upsampled bilinearly, as the ResNet's are. No network with that output does clearly better.
    """
    H, W = truth.shape[-2:]
    hot = F.one_hot(truth, 3).permute(0, 3, 1, 2).float()
    coarse = F.adaptive_avg_pool2d(hot, (-(-H // stride), -(-W // stride))).clamp_min(0.01).log().requires_grad_()
    optimizer = torch.optim.Adam([coarse], lr=0.3)
    for _ in range(steps):
        logits = F.interpolate(coarse, size=(H, W), mode="bilinear", align_corners=False)
        F.cross_entropy(logits, truth, reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()
    return F.interpolate(coarse.detach(), size=(H, W), mode="bilinear", align_corners=False).argmax(1)


def main_reference(args: argparse.Namespace) -> None:
    device = setup(args.device).device
    test = splits.pets_split(args.data_root, "test")
    train = splits.pets_split(args.data_root, "train")
    truth = data.load_truth(args.data_root, test.images, args.img_size)
    shares = torch.zeros(3, args.img_size, args.img_size)
    masks = data.load_truth(args.data_root, train.images, args.img_size)
    for k in range(3):
        shares[k] = (masks == k).float().mean(0)
    arrays: dict[str, list] = {name: [] for name in ("all_animal", "all_background", "mean_mask", "stride32")}
    for batch in truth.split(64):
        batch = batch.to(device).long()
        guesses = [torch.zeros_like(batch), torch.ones_like(batch), shares.argmax(0).to(device).expand_as(batch)]
        with torch.enable_grad():
            guesses.append(stride32_predictions(batch))
        for name, guess in zip(arrays, guesses, strict=True):
            arrays[name].append(confusion(batch, guess).cpu())
    counts = {f"counts_{name}": torch.cat(v).numpy() for name, v in arrays.items()}
    save_npz(Path(args.output), {"ids": np.array([Path(x).stem for x in test.images]), **counts})
    for name in arrays:
        scores = dataset_scores(counts[f"counts_{name}"])
        print(f"{name}: IoU {scores['iou']:.3f}, accuracy {scores['accuracy']:.3f}, mIoU {scores['miou']:.3f}")


# ---------------------------------------------------------------------------------------------------------------------
# Prediction


@torch.no_grad()
def predict(
    model: torch.nn.Module, image: Image.Image, img_size: int, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Segment one image -> uint8 [H, W] at its own size: 0 pet, 1 background, 2 border."""
    small = np.asarray(image.convert("RGB").resize((img_size, img_size), Image.Resampling.BICUBIC))
    x = augment.normalise(torch.from_numpy(small.copy()).to(device).permute(2, 0, 1)[None].float())
    logits = F.interpolate(model(x).float(), size=image.size[::-1], mode="bilinear", align_corners=False)
    return logits.argmax(1)[0].byte().cpu().numpy()


def main_predict(args: argparse.Namespace) -> None:
    model, checkpoint = load_model(args.checkpoint)
    if checkpoint["model_config"]["kind"] != "segmenter":
        raise EngineError(
            f"{args.checkpoint} is a pre-trained autoencoder; fine-tune it: finetune.py --init {args.checkpoint}"
        )
    device = setup(args.device).device
    model, failed, used = model.to(device), 0, set()
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(args.images):
        try:
            image = data.read_image(path)
        except (data.DataError, OSError) as error:
            print(f"skipped: {error}")
            failed += 1
            continue
        classes = predict(model, image, checkpoint["model_config"]["img_size"], device)
        name = Path(path).stem
        while name in used:  # same name in two folders
            name = f"{name}_{number}"
        used.add(name)
        stem = Path(args.output_dir) / name
        mask = Image.fromarray(classes + 1)
        mask.putpalette([0, 0, 0, *(v for colour in COLOURS for v in colour)])
        mask.save(f"{stem}_mask.png")
        colours, share = np.array(COLOURS)[classes], np.where(classes == 1, 0.6, 0.5)[..., None]
        Image.fromarray((np.asarray(image) * (1 - share) + colours * share).astype(np.uint8)).save(
            f"{stem}_overlay.png"
        )
        print(f"{path}: pet {100 * (classes == 0).mean():.1f} % of the pixels -> {stem}_mask.png, {stem}_overlay.png")
    if failed:
        raise EngineError(f"{failed} of {len(args.images)} images could not be read", 1)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("evaluate.py", description="Test-set records, reference points and predictions")
    commands = parser.add_subparsers(dest="command", required=True)
    test = commands.add_parser("test", help="score finished runs on the test images")
    test.add_argument("runs", nargs="+", help="folders of finished finetune.py or baseline.py runs")
    test.add_argument("--batch_size", type=int, default=64, help="images at a time; does not change the scores")
    test.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="as in training")
    test.add_argument("--again", action="store_true", help="score again what was scored before")
    reference = commands.add_parser("reference", help="trivial predictors and the ceiling of a stride-32 output")
    reference.add_argument("--img_size", type=int, default=224, help="input size of the runs they stand beside")
    reference.add_argument("--output", default="reference.npz", help="file to write")
    for command in (test, reference):
        command.add_argument("--data_root", default="data", help="folder with oxford-iiit-pet/")
        command.add_argument("--cache_dir", default="cache", help="folder of the decoded images")
    guess = commands.add_parser("predict", help="masks and overlays of any image files")
    guess.add_argument("images", nargs="+", help="image files")
    guess.add_argument("--checkpoint", required=True, help="model.pt of a fine-tuned run or a baseline")
    guess.add_argument("--output_dir", default="predictions", help="folder to write to")
    for command in (test, reference, guess):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def main(args: argparse.Namespace) -> None:
    {"test": main_test, "reference": main_reference, "predict": main_predict}[args.command](args)


if __name__ == "__main__":
    launch(main, get_args_parser())
