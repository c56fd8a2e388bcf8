"""Write a synthetic study folder as the scripts leave it: configurations, logs, metrics and test records, no checkpoints."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from arms import (
    ANIMAL_FRACTION,
    ARMS,
    AUDIT,
    DOSES,
    LABEL_FRACTION,
    LABELS,
    NUM_IMAGES,
    OBJECTIVE,
    Arm,
    audit_arms,
    extra_arms,
    find_arm,
    sweep_arms,
)
from study import PlanLine, run_folder, write_lines

BASE_IOU = {
    "animal": 0.78,
    "half": 0.75,
    "non_animal": 0.765,
    "mixed": 0.778,
    "mae": 0.70,
    "resnet50": 0.74,
    "pets": 0.77,
}
IMAGES = 560  # labelled training images
ROLES = {
    "recipe": "img_size epochs batch_size weight_decay warmup_epochs min_lr clip_grad mask_ratio crop_scale val categories "
    "norm_pix_loss elastic inputs trimap_resize keep pets_listing pets_division objective label_loss",
    "network": "model blr layer_decay drop_path weights head freeze output train_positions",
    "arm": "split num_images image_fraction animal_fraction animal_images train_fraction equal_updates load",
    "seed": "seed split_seed train init",
    "computation": "device precision output_dir",
}
SCORES = {
    "mae": {"loss_animal": "loss on animal images", "loss_non_animal": "loss on non-animal images"},
    "tokens": {"accuracy_masked": "accuracy on masked tokens"},
    "splitmask": {"loss_animal": "loss on animal images"},
    "ijepa": {"loss_animal": "loss on animal images"},
    "dino": {"loss_animal": "loss on animal images", "knn": "20-NN accuracy"},
    "labels": {"loss_animal": "cross-entropy of labels, animal images", "ap_animal": "average precision"},
    "segment": {"loss": "cross-entropy", "iou": "IoU"},
    "breeds": {"loss": "cross-entropy", "top1": "accuracy"},
}
USUAL = {  # flags that an audit changes
    "elastic": 0.0,
    "inputs": "imagenet",
    "trimap_resize": "nearest",
    "keep": "best",
    "pets_listing": "list.txt",
    "pets_division": "disjoint",
    "output": "unpatchify",
    "train_positions": True,
}
# Operations of an image on labels; 10 epochs of an autoencoder, at 1e9, equal 35 of labels.
FLOPS = {"labels": 1e9 * 10 / 35, "dino": 4.8e9}  # others: 1e9
LEAK = "this run leaks: 69.8 % of the test images are trained on (--pets_division leaking)"
SELECT = {"segment": "iou", "breeds": "top1"}


@dataclass
class Options:
    """How the runs of a study differ from the usual ones; `changes` are flags."""

    n: int = 150  # test images
    epochs: int = 10
    animal_images: str = "unique"
    objective: str = "mae"
    task: str = "segment"
    changes: dict = field(default_factory=dict)


def role_of() -> dict[str, str]:
    return {key: role for role, keys in ROLES.items() for key in keys.split()}


def counts(rng, n, quality, size=128):
    """Random 3 x 3 counts [n, 3, 3] of images whose pixels are right with about the given share."""
    share = rng.beta(4, 6, n)
    truth = np.stack([share * 0.85, 1 - share, share * 0.15], 1) * size**2
    right = np.clip(quality + rng.normal(0, 0.05, n), 0.3, 0.99)[:, None, None]
    eye = np.eye(3)
    return np.round(truth[:, :, None] * (right * eye + (1 - right) / 2 * (1 - eye))).astype(np.int64)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def labels_of(arm: Arm) -> float:
    """Share of the labels that an arm has."""
    return arm.flags.get("train_fraction", 1)


def flags_of(arm: Arm, seed: int, options: Options) -> dict:
    """The flags that a run of this arm has."""
    args = {"model": arm.network or "mae_tiny", "img_size": 128}
    args["epochs"] = 3 if arm.network and "epochs" not in options.changes else options.epochs
    args["batch_size"] = 32 if arm.stage == "pretrain" else 16
    args |= {"blr": 8e-3, "weight_decay": 0.05, "warmup_epochs": 1.0, "seed": seed, "split_seed": seed}
    if arm.stage == "pretrain":
        args |= {"split": arm.name, "mask_ratio": 0.75, "norm_pix_loss": True}
        args["animal_images"] = "unique" if arm.sweep in (ANIMAL_FRACTION, LABELS) else options.animal_images
    else:
        args["train_fraction"] = labels_of(arm)
        args["equal_updates"] = arm.sweep == LABEL_FRACTION
        args["crop_scale"] = 0.5
        args |= USUAL | {"layer_decay": 1.0}
    if arm.stage == "finetune":
        args |= {"layer_decay": 0.65, "drop_path": 0.1, "load": arm.flags.get("load", "all")}
    if arm.sweep == LABELS and arm.stage == "pretrain":
        args |= {"objective": "labels", "label_loss": "softmax", "epochs": int(arm.value), "blr": 1e-3}
    if arm.sweep == OBJECTIVE and arm.stage == "pretrain":
        args |= {"objective": arm.line, "split": arm.flags["split"], "blr": 1e-3}
        if arm.line == "tokens":  # with a recipe of its own
            args |= {"mask_ratio": 0.383, "min_lr": 1e-6, "clip_grad": 3.0}
    if arm.sweep == NUM_IMAGES and arm.stage == "pretrain":
        args |= arm.flags
    if arm.sweep == AUDIT:
        args |= arm.flags
    return args | options.changes


def config_of(arm: Arm, seed: int, args: dict, options: Options) -> dict:
    """config.json of a run."""
    kind = arm.flags.get("objective", options.objective) if arm.stage == "pretrain" else options.task
    leaks = arm.stage != "pretrain" and args["pets_division"] == "leaking"
    size = 2000 if arm.stage == "pretrain" else int(IMAGES * labels_of(arm))
    n_train = round(size * arm.flags.get("image_fraction", 1))
    if arm.sweep == LABEL_FRACTION and arm.stage != "pretrain":
        size = IMAGES
    steps = size // args["batch_size"]
    experiment = {**args, "train": f"{seed}{arm.name}", "init": f"{seed}{arm.parent or arm.line or arm.name}"}
    if arm.stage != "pretrain":
        experiment["val"] = "v"
    return {
        "script": arm.stage,
        "kind": kind,
        "scores": SCORES[kind],
        "select": SELECT.get(kind),
        "remarks": [LEAK] if leaks else [],
        "args": args,
        "experiment": experiment,
        "roles": role_of(),
        "versions": {"python": "3.12", "torch": "2.6"},
        "git": "abc123",
        "hardware": {"device": "Test CPU", "world_size": 1},
        "precision": "fp32",
        "params": 10,
        "flops_per_image": FLOPS.get(kind, 1e9),
        "updates": steps * args["epochs"],
        "epoch_updates": steps,
        "batch_size": args["batch_size"],
        "n_train": n_train,
        "n_unique": n_train,
        "data": {"root": "data/demo", "title": "drawn demo photos"},
        "manifest": {
            "train": {"name": arm.name, "sha256": "0123456789abcdef", "entries": n_train, "animal_images": 900}
        },
    }


def quality_of(arm: Arm, rng) -> float:
    """Share of right pixels, about the IoU."""
    quality = BASE_IOU.get(arm.line or arm.name, 0.75)
    if arm.sweep == ANIMAL_FRACTION:
        quality = 0.76 + 0.02 * arm.value
    if arm.sweep == LABELS:
        quality = {"none": 0.72, "mae": 0.75}[arm.line] + 2e-4 * arm.value
    if arm.sweep == NUM_IMAGES:
        quality -= 0.02 * (1 - arm.value)
    quality += rng.normal(0, 0.004)
    if arm.sweep == LABEL_FRACTION:
        quality -= 0.06 * (1 - arm.value) ** 3
    return quality


def validation(arm: Arm, kind: str, fade: float, quality: float, rng) -> dict:
    """The scores of one validation."""
    if kind == "mae":
        bonus = {"animal": -0.03, "non_animal": 0.01}.get(arm.name, 0)
        loss_animal = 0.6 + bonus + 0.4 * fade + rng.normal(0, 0.003)
        return {"loss_animal": loss_animal, "loss_non_animal": 0.62 - bonus + 0.4 * fade}
    loss = 0.4 + 0.8 * fade + rng.normal(0, 0.02)
    names = ("iou", "iou_pet", "iou_background", "iou_border", "miou", "accuracy")
    if kind == "breeds":
        names = ("top1",)
    if kind == "labels":  # after an autoencoder it falls faster
        speed = 3 if arm.line == "mae" else 1
        return {"loss_animal": 2.5 + fade**speed, "ap_animal": 0.4 * (1 - fade)}
    if kind == "tokens":
        return {"accuracy_masked": 0.3 * (1 - fade)}
    if kind in ("splitmask", "ijepa", "dino"):
        return {"loss_animal": 2 + fade, "knn": 0.3 * (1 - fade), "rank": 20.0, "spread": 0.8}
    return {"loss": loss, **dict.fromkeys(names, quality * (1 - fade))}


def write_records(path: Path, task: str, ids: np.ndarray, quality: float, pictures: dict, rng) -> None:
    """Write test.npz, and of a segmentation panels.npz."""
    n = len(ids)
    if task != "segment":
        right = (rng.random(n) < quality).astype(float)
        loss = rng.uniform(0.3, 0.5, n)
        arrays = {"numerators": np.stack([right, loss], 1), "denominators": np.ones((n, 2))}
        np.savez(path / "test.npz", ids=ids, score_names=np.array(["top1", "loss"]), **arrays)
        return
    shape = (6, 64, 64)
    disc = (np.hypot(*np.meshgrid(*[np.linspace(-1, 1, 64)] * 2)) * 4).clip(0, 3)
    truth = np.broadcast_to(np.select([disc < 2, disc < 2.4], [0, 2], 1), shape).astype(np.uint8)
    pred = np.where(rng.random(shape) < quality, truth, 1).astype(np.uint8)
    np.savez(path / "panels.npz", ids=ids[:6], images=pictures["original"], truth=truth, pred=pred)
    both = counts(rng, n, quality + 0.1)
    edge = np.stack([rng.integers(200, 500, (n, 2)), rng.integers(600, 700, (n, 2))], -1)
    pixels = both.sum((1, 2))
    losses = {"loss_sum": pixels * rng.uniform(0.3, 0.5, n), "pixels": pixels}
    edges = {"boundary": edge, "boundary_native": edge * 2}
    np.savez(path / "test.npz", ids=ids, counts=both, counts_native=both * 4, img_size=128, **losses, **edges)


def write_run(study: Path, seed: int, arm: Arm, options: Options | None = None) -> PlanLine:
    """Write one finished run and return its line of study.tsv."""
    options = options or Options()
    folder = run_folder(seed, arm.stage, arm.name)
    path = study / folder
    path.mkdir(parents=True)
    rng = np.random.default_rng([seed, *map(ord, arm.stage + arm.name)])
    args = flags_of(arm, seed, options)
    config = config_of(arm, seed, args, options)
    write_json(path / "config.json", config)
    quality = quality_of(arm, rng)
    pretraining = arm.stage == "pretrain"
    steps = config["epoch_updates"]
    log = [{"event": "config"}]
    vals = []
    for epoch in range(1, args["epochs"] + 1):
        fade = np.exp(-epoch / 4)
        place = {"step": epoch * steps, "epoch": epoch}
        log.append({"event": "train", **place, "loss": 0.35 + fade + rng.normal(0, 0.02), "lr": 1e-3})
        vals.append({**place, **validation(arm, config["kind"], fade, quality, rng)})
        log.append({"event": "val", **vals[-1], "seconds": epoch * 2.0})
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    metrics = {"kind": config["kind"], "last": vals[-1], "seconds": 66.0, "img_s": 310.5, "mfu": None, "mem_gb": None}
    metrics |= {"updates": config["updates"], "epochs": args["epochs"], "hardware": config["hardware"]}
    if config["kind"] == "mae":
        metrics["predict_zero"] = {"animal": 1.0, "non_animal": 1.0}
    if config["kind"] == "labels":
        metrics["trivial"] = {"label prior": {"loss_animal": 3.2, "ap_animal": 0.1}}
        metrics["lowest"] = {"loss_animal": 0.6}
    if config["kind"] == "dino":
        metrics["trivial"] = {"all the same": {"loss_animal": 8.3}}
    if not pretraining:
        metrics["best"] = vals[-1]
    write_json(path / "metrics.json", metrics)
    shape = (8 if pretraining else 6, 64, 64, 3)
    pictures = {name: rng.integers(0, 255, shape, dtype=np.uint8) for name in ("original", "masked", "reconstruction")}
    if not pretraining:
        pet = "dog" if args["pets_division"] == "leaking" else "cat"  # another division has other test images
        ids = np.array([f"{pet}_{k}" for k in range(options.n)])
        write_records(path, options.task, ids, quality, pictures, rng)
    elif options.objective == "mae":
        np.savez(path / "reconstruction.npz", **pictures, ids=np.array([f"i{k}" for k in range(8)]))
    parent = run_folder(seed, "pretrain", arm.parent) if arm.parent else ""
    return PlanLine(seed, arm.stage, arm.name, folder, parent, arm.sweep, arm.value, f"{arm.stage}.py --seed {seed}")


def write_study(study: Path, seeds=(0, 1), sweeps=(), extra=(), audit=False, **options) -> Path:
    """Write a whole study; options go to every run."""
    arms = list(ARMS.values())
    for split in extra:
        arms += extra_arms(split)
    for sweep in sweeps:
        arms += sweep_arms(sweep)
    if audit:
        arms += audit_arms()
    own_doses = {min(DOSES), 0.5, max(DOSES)}  # the arms of every study
    arms = [arm for arm in arms if arm.sweep != ANIMAL_FRACTION or arm.value not in own_doses]
    study.mkdir(parents=True, exist_ok=True)
    usual = Options(**options)
    lines = [write_run(study, seed, arm, usual) for seed in seeds for arm in arms]
    (study / "study.tsv").write_text(write_lines(lines))
    if usual.task != "segment":
        return study
    rng = np.random.default_rng(0)
    names = {"all_animal": 0.3, "all_background": 0.6, "mean_mask": 0.5}
    reference = {f"counts_{name}": counts(rng, usual.n, quality) for name, quality in names.items()}
    ids = np.array([f"cat_{k}" for k in range(usual.n)])
    np.savez(study / "reference.npz", ids=ids, img_size=128, **reference)
    return study


def rewrite_run(study: Path, seed: int, stage: str, name: str, **options) -> None:
    """Write one run again, with other options."""
    write_run(study, seed, find_arm(stage, name), Options(**options))
