"""Score trained segmenters on the test images, once, into records from which every number of the report is derived.

    python evaluate.py test runs/study/seed0/finetune_animal runs/study/seed0/baseline_resnet50
    python evaluate.py reference --img_size 224 --output runs/study/reference.npz     # trivial predictors, stride-32 ceiling
    python evaluate.py predict --checkpoint runs/study/seed0/finetune_animal/model.pt cat.jpg dog.png

`test` writes test.npz and panels.npz into each run's folder; about 10 s per run and 1,103 images on a GPU. `predict` writes
a mask (PNG with trimap values: 1 pet, 2 background, 3 border) and an overlay for any image file.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import augment
import data
import splits
from batches import EvalBatches
from engine import EngineError, Parser, Precision, Progress, launch, setup, write_atomic
from metrics import dataset_scores
from weights import load_model

PALETTE = [0, 0, 0, 230, 159, 0, 0, 0, 0, 86, 180, 233]  # unused, pet, background, border; safe for colour-blind eyes
BILINEAR = {"mode": "bilinear", "align_corners": False}
SUMMARY = "IoU {iou:.3f}, accuracy {accuracy:.3f}, mIoU {miou:.3f}"


def confusion(truth: torch.Tensor, pred: torch.Tensor, classes: int = 3) -> torch.Tensor:
    """Count pixels per image by class: truth, pred [B, H, W] integers -> int64 [B, classes, classes], rows = truth."""
    labels = torch.arange(classes, device=truth.device)[:, None]
    rows, columns = ((x.flatten(1)[:, None] == labels).double() for x in (truth, pred))
    return (rows @ columns.mT).long()  # free of synchronisation, and exact: autocast leaves float64 alone


def boundaries(truth: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
    """Count the boundaries' (intersection, union) of {pet} and of {pet or border}: classes [B, H, W] -> int64 [B, 2, 2].

    A boundary is a mask's pixels within 2 % of the diagonal of its outline or the image's edge (Cheng et al. 2021).
    """
    width = max(1, round(0.02 * (truth.shape[-2] ** 2 + truth.shape[-1] ** 2) ** 0.5))

    def band(mask):
        outside = F.pad(1 - mask.float(), (width,) * 4, value=1.0)[:, None]
        return mask & (F.max_pool2d(F.max_pool2d(outside, (2 * width + 1, 1), 1), (1, 2 * width + 1), 1)[:, 0] > 0)

    pairs = (band(truth == 0), band(pred == 0)), (band(truth != 1), band(pred != 1))
    return torch.stack([torch.stack([(a & b).sum((1, 2)), (a | b).sum((1, 2))], 1) for a, b in pairs], 1)


def load_segmenter(path, device: torch.device) -> tuple[torch.nn.Module, int]:
    """Load what finetune.py or baseline.py trained -> (model, input size). Raises EngineError for an autoencoder."""
    model, checkpoint = load_model(str(path))
    if checkpoint["model_config"]["kind"] != "segmenter":
        raise EngineError(f"{path} is a pre-trained autoencoder; fine-tune it: finetune.py --init {path}")
    return model.to(device), checkpoint["model_config"]["img_size"]


@torch.no_grad()
def test_records(model, store: data.ImageStore, truth: torch.Tensor, args, device, precision) -> tuple[dict, dict]:
    """Score images, with truth [N, S, S], at size S and each file's own -> arrays of test.npz and of panels.npz."""
    ids, parts, panels = np.array([Path(x).stem for x in store.images]), defaultdict(list), {}
    # Shown in the report: spread over the alphabetical list, chosen before any score is known.
    panel = np.argsort(ids)[np.linspace(0, len(ids) - 1, min(6, len(ids))).round().astype(int)]
    batches = EvalBatches(store, img_size=truth.shape[-1], batch_size=args.batch_size, device=device)
    with Progress("testing", len(ids)) as progress:
        for index, images in batches:
            target = truth[index].to(device).long()
            with precision.autocast():
                logits = model(images).float()
            pred = logits.argmax(1)
            parts["counts"].append(confusion(target, pred))
            parts["boundary"].append(boundaries(target, pred))
            parts["loss_sum"].append(F.cross_entropy(logits, target, reduction="none").double().sum((1, 2)))
            for i, k in enumerate(index.tolist()):  # native sizes differ, so images go one by one here
                trimap, path = (Path(args.data_root, x) for x in (data.trimap_path(store.images[k]), store.images[k]))
                native = torch.from_numpy(data.read_trimap(trimap, path)).to(device).long()[None]
                large = F.interpolate(logits[i : i + 1], native.shape[1:], **BILINEAR).argmax(1)
                parts["counts_native"].append(confusion(native, large))
                parts["boundary_native"].append(boundaries(native, large))
                if k in panel:
                    photo = augment.denormalise(images[i]).round().clamp(0, 255).permute(1, 2, 0)
                    panels[k] = [x.byte().cpu().numpy() for x in (photo, target[i], pred[i])]
            progress.update(len(index))
    records = {k: torch.cat(v).cpu().numpy() for k, v in parts.items()}
    records |= {"ids": ids, "img_size": np.array(truth.shape[-1]), "pixels": np.full(len(ids), truth[0].numel())}
    shown = {name: np.stack([panels[k][i] for k in panel]) for i, name in enumerate(("images", "truth", "pred"))}
    return records, {"ids": ids[panel], **shown}


def main_test(args: argparse.Namespace) -> None:
    for run in args.runs:
        if not Path(run, "model.pt").exists():
            raise EngineError(f"{run} has no model.pt: it is not a finished run; finish its training first")
    device, sets = setup(args.device).device, {}
    precision = Precision(args.precision, device)
    for run in map(Path, args.runs):
        record, weights = run / "test.npz", run / "model.pt"
        if record.exists() and record.stat().st_mtime >= weights.stat().st_mtime and not args.again:
            print(f"{run}: tested before; nothing to do (--again repeats it)")
            continue
        model, size = load_segmenter(weights, device)
        if size not in sets:
            photos = args.data_root, splits.pets_split(args.data_root, "test").images
            options = {"cache_dir": args.cache_dir, "cache_size": size}
            data.build_cache(*photos, progress=Progress, **options)
            store = data.ImageStore(*photos, device=device, **options)
            sets[size] = store, data.load_truth(args.data_root, store.images, size)
        records, panels = test_records(model, *sets[size], args, device, precision)
        for path, arrays in ((run / "panels.npz", panels), (record, records)):
            write_atomic(path, lambda f, arrays=arrays: np.savez_compressed(f, **arrays))
        loss = records["loss_sum"].sum() / records["pixels"].sum()
        print(f"{run}: loss {loss:.3f}, {SUMMARY.format(**dataset_scores(records['counts']))}")


def stride32_predictions(truth: torch.Tensor, stride: int = 32, steps: int = 80) -> torch.Tensor:
    """Best masks a coarse output can draw: truth [B, H, W] -> classes [B, H, W].

    Logits at 1/stride of the size are fitted to each truth directly (Adam on the cross-entropy, started from the classes'
    shares in each cell) and upsampled bilinearly, as the ResNet's are. No network with that output does clearly better.
    """
    size, hot = truth.shape[1:], F.one_hot(truth, 3).permute(0, 3, 1, 2).float()
    coarse = F.adaptive_avg_pool2d(hot, [-(-side // stride) for side in size]).clamp_min(0.01).log().requires_grad_()
    optimizer = torch.optim.Adam([coarse], lr=0.3)
    for _ in range(steps):
        F.cross_entropy(F.interpolate(coarse, size, **BILINEAR), truth, reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()
    return F.interpolate(coarse.detach(), size, **BILINEAR).argmax(1)


def main_reference(args: argparse.Namespace) -> None:
    device, counts = setup(args.device).device, defaultdict(list)
    test, train = (splits.pets_split(args.data_root, part).images for part in ("test", "train"))
    truth, masks = (data.load_truth(args.data_root, images, args.img_size) for images in (test, train))
    mean_mask = torch.stack([(masks == k).float().mean(0) for k in range(3)]).argmax(0).to(device)
    for batch in truth.split(64):
        batch = batch.to(device).long()
        guesses = {"all_animal": torch.zeros_like(batch), "all_background": torch.ones_like(batch),
                   "mean_mask": mean_mask.expand_as(batch), "stride32": stride32_predictions(batch)}  # fmt: skip
        for name, guess in guesses.items():
            counts[f"counts_{name}"].append(confusion(batch, guess).cpu())
    arrays = {"ids": np.array([Path(x).stem for x in test]), "img_size": np.array(args.img_size)}
    arrays |= {k: torch.cat(v).numpy() for k, v in counts.items()}
    write_atomic(Path(args.output), lambda f: np.savez_compressed(f, **arrays))
    for name in guesses:
        print(f"{name}: {SUMMARY.format(**dataset_scores(arrays[f'counts_{name}']))}")


@torch.no_grad()
def predict(model: torch.nn.Module, image: Image.Image, img_size: int, device="cpu") -> np.ndarray:
    """Segment one image -> uint8 [H, W] at its own size: 0 pet, 1 background, 2 border."""
    small = np.array(image.convert("RGB").resize((img_size, img_size), Image.Resampling.BICUBIC))
    x = augment.normalise(torch.from_numpy(small).to(device).permute(2, 0, 1)[None].float())
    return F.interpolate(model(x).float(), image.size[::-1], **BILINEAR).argmax(1)[0].byte().cpu().numpy()


def main_predict(args: argparse.Namespace) -> None:
    device, failed, used, inputs = setup(args.device).device, 0, set(), {Path(path).resolve() for path in args.images}
    model, img_size = load_segmenter(args.checkpoint, device)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(args.images):
        try:
            image = data.read_image(path)
        except (data.DataError, OSError) as error:
            print(f"skipped: {error}")
            failed += 1
            continue
        classes, stem = predict(model, image, img_size, device), Path(args.output_dir, Path(path).stem)
        while stem in used or any(Path(f"{stem}_{end}.png").resolve() in inputs for end in ("mask", "overlay")):
            stem = stem.with_name(f"{stem.name}_{number}")  # the same name in two folders, or a file to be read
        used.add(stem)
        mask = Image.fromarray(classes + 1)
        mask.putpalette(PALETTE)
        mask.save(f"{stem}_mask.png")
        Image.blend(image, mask.convert("RGB"), 0.5).save(f"{stem}_overlay.png")
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
    guess = commands.add_parser("predict", help="masks and overlays of any image files")
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
    for name in ("batch_size", "img_size"):
        if getattr(args, name, 1) < 1:
            raise EngineError(f"--{name} must be at least 1, got {getattr(args, name)}")
    {"test": main_test, "reference": main_reference, "predict": main_predict}[args.command](args)


if __name__ == "__main__":
    launch(main, get_args_parser())
