"""Write a synthetic study folder as the scripts leave it: configurations, logs, metrics and test records, no checkpoints."""

import json

import numpy as np

BASE_IOU = {
    "animal": 0.78,
    "half": 0.75,
    "non_animal": 0.765,
    "mixed": 0.778,
    "mae": 0.70,
    "resnet50": 0.74,
    "pets": 0.77,
}


def counts(rng, n, quality, size=128):
    """Random 3 x 3 counts [n, 3, 3] of images whose pixels are right with about the given share."""
    share = rng.beta(4, 6, n)
    truth = np.stack([share * 0.85, 1 - share, share * 0.15], 1) * size**2
    right = np.clip(quality + rng.normal(0, 0.05, n), 0.3, 0.99)[:, None, None]
    eye = np.eye(3)
    return np.round(truth[:, :, None] * (right * eye + (1 - right) / 2 * (1 - eye))).astype(np.int64)


def write_json(path, value):
    path.write_text(json.dumps(value))


def write_run(study, seed, stage, arm, *, n=150, epochs=10, animal_images="unique", **changes):
    """Write one finished run and return its line of study.tsv."""
    name = f"seed{seed}/{stage}_{arm}"
    path = study / name
    path.mkdir(parents=True)
    rng = np.random.default_rng([seed, *map(ord, stage + arm)])
    parent, _, labels = arm.partition("_labels_")
    n_train, batch = (
        (2000, 32) if stage == "pretrain" else (int(560 * (0.5 if arm == "half" else float(labels or 1))), 16)
    )
    epochs = 3 if arm == "resnet50" and "epochs" not in changes else epochs
    steps = (560 if labels else n_train) // batch
    args = {
        "model": "resnet50" if arm == "resnet50" else "mae_tiny",
        "img_size": 128,
        "epochs": epochs,
        "batch_size": batch,
    }
    args |= {"blr": 8e-3, "weight_decay": 0.05, "warmup_epochs": 1.0, "seed": seed, "split_seed": seed}
    if stage == "pretrain":
        args |= {"split": arm, "animal_images": "unique" if "dose" in arm else animal_images, "mask_ratio": 0.75}
    else:
        args |= {
            "train_fraction": float(labels or 1) if arm != "half" else 0.5,
            "equal_updates": bool(labels),
            "crop_scale": 0.5,
        }
    if stage == "finetune":
        args |= {"layer_decay": 0.65, "drop_path": 0.1}
    args |= changes
    experiment = {k: v for k, v in args.items() if k != "output_dir"} | {
        "train": f"{seed}{arm}",
        "init": f"{seed}{'animal' if arm == 'half' else parent}",
    }
    if stage != "pretrain":
        experiment["val"] = "v"
    hardware = {"device": "Test CPU", "world_size": 1}
    write_json(path / "config.json", {
        "kind": stage, "args": args, "experiment": experiment, "versions": {"python": "3.12", "torch": "2.6"},
        "git": "abc123", "hardware": hardware, "precision": "fp32", "params": 10, "flops_per_image": 1e9,
        "updates": steps * epochs, "epoch_updates": steps, "batch_size": batch, "n_train": n_train, "n_unique": n_train,
        "data": {"root": "data/demo", "title": "drawn demo photos"},
        "manifest": {"train": {"name": arm, "sha256": "0123456789abcdef", "entries": n_train, "animal_images": 900}},
    })  # fmt: skip
    quality = 0.76 + 0.02 * float(arm[5:]) if arm.startswith("dose_") else BASE_IOU.get(parent, 0.75)
    quality += rng.normal(0, 0.004)
    quality -= 0.06 * (1 - float(labels)) ** 3 if labels else 0
    log, vals = [{"event": "config"}], []
    for epoch in range(1, epochs + 1):
        fade = np.exp(-epoch / 4)
        val = {"step": epoch * steps, "epoch": epoch}
        log.append({"event": "train", **val, "loss": 0.35 + fade + rng.normal(0, 0.02), "lr": 1e-3})
        if stage == "pretrain":
            bonus = {"animal": -0.03, "non_animal": 0.01}.get(arm, 0)
            val |= {
                "loss_animal": 0.6 + bonus + 0.4 * fade + rng.normal(0, 0.003),
                "loss_non_animal": 0.62 - bonus + 0.4 * fade,
            }
        else:
            scores = dict.fromkeys(
                ("iou", "iou_pet", "iou_background", "iou_border", "miou", "accuracy"), quality * (1 - fade)
            )
            val |= {"loss": 0.4 + 0.8 * fade + rng.normal(0, 0.02), **scores}
        vals.append(val)
        log.append({"event": "val", **val, "seconds": epoch * 2.0})
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    metrics = {"kind": stage, "last": vals[-1], "seconds": 66.0, "img_s": 310.5, "mfu": None, "mem_gb": None}
    metrics |= {"updates": steps * epochs, "epochs": epochs, "hardware": hardware}
    metrics |= {"predict_zero": {"animal": 1.0, "non_animal": 1.0}} if stage == "pretrain" else {"best": vals[-1]}
    write_json(path / "metrics.json", metrics)
    shape = (8 if stage == "pretrain" else 6, 64, 64)
    pictures = {k: rng.integers(0, 255, (*shape, 3), dtype=np.uint8) for k in ("original", "masked", "reconstruction")}
    if stage == "pretrain":
        np.savez(path / "reconstruction.npz", **pictures, ids=np.array([f"i{k}" for k in range(8)]))
        return f"{seed}\t{stage}\t{arm}\t{name}\n"
    disc = (np.hypot(*np.meshgrid(*[np.linspace(-1, 1, 64)] * 2)) * 4).clip(0, 3)
    truth = np.broadcast_to(np.select([disc < 2, disc < 2.4], [0, 2], 1), shape).astype(np.uint8)
    pred = np.where(rng.random(shape) < quality, truth, 1).astype(np.uint8)
    ids = np.array([f"cat_{k}" for k in range(n)])
    np.savez(path / "panels.npz", ids=ids[:6], images=pictures["original"], truth=truth, pred=pred)
    both = counts(rng, n, quality + 0.1)
    edge = np.stack([rng.integers(200, 500, (n, 2)), rng.integers(600, 700, (n, 2))], -1)
    pixels = both.sum((1, 2))
    losses = {"loss_sum": pixels * rng.uniform(0.3, 0.5, n), "pixels": pixels}
    edges = {"boundary": edge, "boundary_native": edge * 2}
    np.savez(path / "test.npz", ids=ids, counts=both, counts_native=both * 4, img_size=128, **losses, **edges)
    return f"{seed}\t{stage}\t{arm}\t{name}\n"


def write_study(study, seeds=(0, 1), sweeps=(), extra=False, **options):
    """Write a whole study; options go to every run."""
    arms = [("pretrain", a) for a in ("animal", "non_animal", "mixed", *(("pets", "all") if extra else ()))]
    arms += [("finetune", a) for a in ("animal", "half", "non_animal", "mixed", *(("pets", "all") if extra else ()))]
    arms += [("baseline", "mae"), ("baseline", "resnet50")]
    if "dose" in sweeps:
        arms += [(stage, f"dose_{f}") for f in (0.05, 0.1, 0.25, 0.75) for stage in ("pretrain", "finetune")]
    if "labels" in sweeps:
        arms += [
            ("finetune", f"{a}_labels_{f}") for f in (0.05, 0.1, 0.25, 0.5) for a in ("animal", "non_animal", "mixed")
        ]
        arms += [("baseline", f"mae_labels_{f}") for f in (0.05, 0.1, 0.25, 0.5)]
    study.mkdir(parents=True, exist_ok=True)
    lines = [write_run(study, seed, stage, arm, **options) for seed in seeds for stage, arm in arms]
    (study / "study.tsv").write_text("".join(lines))
    rng = np.random.default_rng(0)
    names = {"all_animal": 0.3, "all_background": 0.6, "mean_mask": 0.5, "stride32": 0.95}
    n = options.get("n", 150)
    reference = {f"counts_{k}": counts(rng, n, q) for k, q in names.items()}
    np.savez(study / "reference.npz", ids=np.array([f"cat_{k}" for k in range(n)]), img_size=128, **reference)
    return study
