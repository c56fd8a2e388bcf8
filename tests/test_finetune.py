"""Fine-tuning trains the parts it says at the rates it says, scores each image once, and refuses what does not fit."""

import dataclasses
import json
import os
import re
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_runs import (
    IMG,
    SMALL,
    drawn_root,
    log,
    mae_checkpoint,
    metrics,
    needs_photos,
    on_two_processes,
    refusal,
    run,
)

import augment
import data
import finetune
import splits
from engine import param_groups, setup
from metrics import dataset_scores
from models import build_segmenter
from objective import Task
from segmentation import Segmentation, confusion
from weights import ENCODER_KEYS, load_model

TINY = ["--model", "mae_tiny", *SMALL]


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    return mae_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return drawn_root(tmp_path_factory)


@pytest.fixture(scope="module")
def flags(root, init, tmp_path_factory):
    return [*TINY, "--data_root", root, "--cache_dir", tmp_path_factory.mktemp("cache"), "--init", init]


@pytest.fixture(scope="module")
def tuned(flags, tmp_path_factory):
    """Four epochs of fine-tuning -> (folder, what was printed)."""
    folder = tmp_path_factory.mktemp("run") / "tuned"
    text = run(
        "finetune",
        *flags,
        "--output_dir",
        folder,
        "--epochs 4 --val_epochs 1 --batch_size 8 --warmup_epochs 1.5 --blr 3e-2 --log_every 1",
    )
    return folder, text


def short(flags, folder, *more):
    """One epoch of four updates."""
    return run(
        "finetune",
        *flags,
        "--output_dir",
        folder,
        "--epochs 1 --batch_size 8 --warmup_epochs 0 --log_every 1 --blr 1e-2",
        *more,
    )


# -- which parameter trains at which rate -------------------------------------------------------------------------------


def expected_scale(name, depth=12, decay=0.65):
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return decay ** (depth + 1)
    block = re.match(r"blocks\.(\d+)\.", name)
    return decay ** (depth - int(block[1])) if block else 1.0


def test_encoder_layers_decay_downwards_and_decoder_and_head_train_at_the_full_rate():
    model = build_segmenter("mae_small", img_size=32)
    groups = param_groups(model, 0.05, 0.65, Task.no_decay)
    rates = {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name in g["names"]}
    assert set(rates) == {name for name, _ in model.named_parameters()} - {"mask_token"}
    for name, (scale, decay) in rates.items():
        assert scale == pytest.approx(expected_scale(name), rel=1e-12), name
        exempt = "norm" in name or name.endswith("bias") or name in ("cls_token", "pos_embed", "decoder_pos_embed")
        assert decay == (0 if exempt else 0.05), name
    for name in ("norm.weight", "decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.mlp.fc1.weight"):
        assert rates[name][0] == 1
    assert rates["decoder_pred.weight"] == (1, 0.05)


def test_a_dry_run_prints_the_rate_of_every_group_and_writes_nothing(root, tmp_path_factory, tmp_path):
    init = mae_checkpoint(tmp_path_factory, "mae_small", 32)
    text = run(
        "finetune",
        "--model mae_small --img_size 32 --device cpu",
        "--data_root",
        root,
        "--init",
        init,
        "--batch_size 32 --dry_run",
        "--output_dir",
        tmp_path / "dry",
        "--cache_dir",
        tmp_path,
    )
    lr = 5e-4 * 32 / 256
    printed = {
        (first, float(decay)): float(rate)
        for rate, decay, first in re.findall(r"lr (\S+) \(x .*?weight_decay (\S+) .*tensors: (\S+) \.\.\.", text)
    }
    for i in range(12):
        for decay, first in ((0.05, f"blocks.{i}.attn.qkv.weight"), (0, f"blocks.{i}.norm1.weight")):
            assert printed[first, decay] == pytest.approx(lr * 0.65 ** (12 - i), rel=1e-3)
    assert printed["cls_token", 0] == pytest.approx(lr * 0.65**13, rel=1e-3)
    assert printed["decoder_embed.weight", 0.05] == pytest.approx(lr, rel=1e-3)
    assert len(printed) == 2 * 14
    assert "tensors: mask_token" not in text
    assert not list(tmp_path.iterdir())


def test_a_frozen_encoder_has_no_rate_at_all(flags, tmp_path):
    for more in (["--freeze", "encoder"], ["--head", "linear"]):
        text = run("finetune", *flags, "--output_dir", tmp_path / "dry", "--dry_run", "--batch_size", 8, *more)
        first = re.findall(r"tensors: (\S+) \.\.\.", text)
        assert first
        assert all(name.startswith("decoder_") for name in first)


def test_the_learning_rate_warms_up_and_follows_half_a_cosine(tuned):
    lr, warmup, total = 3e-2 * 8 / 256, 6, 16
    expected = [
        lr * (s + 1) / warmup
        if s < warmup
        else 1e-6 + (lr - 1e-6) * (1 + np.cos(np.pi * (s - warmup) / (total - warmup))) / 2
        for s in range(total)
    ]
    assert [line["lr"] for line in log(tuned[0], "train")] == pytest.approx(expected, rel=1e-12)


# -- what is loaded, trained and kept -----------------------------------------------------------------------------------


def test_a_full_checkpoint_gives_all_but_the_head(tuned, init):
    keys = list(torch.load(init, weights_only=True)["model"])
    line = next(x for x in tuned[1].splitlines() if x.startswith("init:"))
    assert f"loaded {len(keys) - 2} (" in line
    assert "new head 2 (decoder_pred); missing none; unexpected none" in line
    assert "starts fresh" not in line


def test_an_encoder_alone_starts_the_decoder_fresh_and_says_so(flags, init, tmp_path):
    state = torch.load(init, weights_only=True)["model"]
    torch.save({"model": {k: v for k, v in state.items() if k.startswith(ENCODER_KEYS)}}, tmp_path / "encoder.pth")
    text = short(flags, tmp_path / "run", "--init", tmp_path / "encoder.pth")
    assert "the decoder starts fresh" in text
    assert "missing none" not in text


@pytest.mark.parametrize("option", [["--freeze", "encoder"], ["--head", "linear"]])
def test_frozen_features_stay_as_they_were_and_the_rest_trains(flags, init, tmp_path, option):
    short(flags, tmp_path / "run", *option)
    before, (model, content) = torch.load(init, weights_only=True)["model"], load_model(str(tmp_path / "run/model.pt"))
    after = content["model"]
    for key in (k for k in before if k.startswith(ENCODER_KEYS)):
        assert torch.equal(before[key], after[key]), key
    if option[0] == "--head":
        assert {k for k in after if not k.startswith(ENCODER_KEYS)} == {"decoder_pred.weight", "decoder_pred.bias"}
    else:
        trained = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
        assert trained == {"decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred"}
    assert model(torch.zeros(1, 3, IMG, IMG)).shape == (1, 3, IMG, IMG)


def test_end_to_end_every_tensor_trains_but_the_mask_token(tuned, init):
    before, after = (torch.load(p, weights_only=True)["model"] for p in (init, tuned[0] / "model.pt"))
    assert set(before) == set(after)
    assert [k for k in before if torch.equal(before[k], after[k])] == ["mask_token"]


def test_validation_runs_every_third_epoch_and_after_the_last_unless_told_otherwise(flags, tmp_path):
    schedule = "--epochs 7 --epoch_updates 1 --batch_size 4 --warmup_epochs 0"
    run("finetune", *flags, "--output_dir", tmp_path / "run", schedule)
    assert [line["epoch"] for line in log(tmp_path / "run", "val")] == [3, 6, 7]


def test_the_weights_kept_are_those_of_the_best_validation_iou(flags, tuned):
    folder, _ = tuned
    vals = log(folder, "val")
    assert [v["epoch"] for v in vals] == [1, 2, 3, 4]
    best = max(vals, key=lambda v: v["iou"])
    kept = {k: v for k, v in metrics(folder)["best"].items() if k != "seconds"}
    assert kept == {k: v for k, v in best.items() if k not in ("event", "seconds")}
    task = segmentation(flags, load_model(str(folder / "model.pt"))[0])
    with torch.no_grad():
        again = task.validate(0, lambda: False)
    assert again["iou"] == best["iou"]
    assert again["loss"] == pytest.approx(best["loss"], rel=1e-6)


def test_a_run_records_what_it_did(tuned):
    folder, text = tuned
    config, m = json.loads((folder / "config.json").read_text()), metrics(folder)
    for record in (config, m):
        assert (record["script"], record["kind"]) == ("finetune", "segment")
    assert config["updates"] == m["updates"] == 16
    assert config["n_train"] == m["n_train"] == m["n_unique"] == 32
    assert m["epochs"] == 4
    for fact in ("mae_tiny", "fp32", "16 updates of 8 images, 4 epochs", "32 unique images of drawn demo photos"):
        assert fact in text
    assert {p.name for p in folder.iterdir()} == {".lock", "config.json", "log.jsonl", "metrics.json", "model.pt"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_train_like_float32_on_a_cpu(flags, tmp_path, precision):
    losses = []
    for name in (precision, "fp32"):
        short(flags, tmp_path / name, "--precision", name)
        losses.append([line["loss"] for line in log(tmp_path / name, "train")])
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


# -- which images, how many updates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_the_half_arm_sees_a_subset_of_the_full_arms_images(root, seed):
    full, half = (splits.pets_split(root, "train", train_fraction=f, split_seed=seed).images for f in (1, 0.5))
    assert set(half) < set(full)
    assert (len(half), len(full)) == (16, 32)
    assert not set(full) & set(splits.pets_split(root, "val").images)


def plan(flags, *more):
    text = run("finetune", *flags, "--dry_run", "--output_dir", "never_written", *more)
    updates, batch, epochs = re.search(r"plan: ([\d,]+) updates of (\d+) images, (\d+) epochs", text).groups()
    return int(updates.replace(",", "")), int(batch), int(epochs)


def test_fewer_labels_mean_fewer_updates_unless_equal_updates_are_asked_for(flags):
    assert plan(flags, "--batch_size", 8) == (400, 8, 100)
    assert plan(flags, "--batch_size", 8, "--train_fraction", 0.5) == (200, 8, 100)
    assert plan(flags, "--batch_size", 8, "--train_fraction", 0.5, "--equal_updates") == (400, 8, 100)
    assert plan(flags, "--batch_size", 8, "--train_fraction", 0.1, "--equal_updates") == (400, 3, 100)


def test_with_equal_updates_three_labels_train_and_validate_as_often_as_all(flags, tmp_path):
    short(flags, tmp_path / "few", "--train_fraction", 0.1, "--equal_updates")
    m = metrics(tmp_path / "few")
    assert (m["updates"], m["epochs"], m["n_train"]) == (4, 1, 3)


# -- validation ---------------------------------------------------------------------------------------------------------


def arguments(flags):
    return finetune.get_args_parser().parse_args([str(f) for f in flags])


def segmentation(flags, model, images=None) -> Segmentation:
    """Make the task as main does, with a trained network and perhaps other validation images."""
    task = Segmentation(arguments(flags), setup("cpu"))
    task.model = model
    if images is not None:
        task.val_split = dataclasses.replace(task.val_split, images=images)
    task.open(None)
    return task


def test_validation_equals_pixel_by_pixel_counting_with_each_image_once(flags, tuned):
    args, model = arguments(flags), load_model(str(tuned[0] / "model.pt"))[0]
    images = splits.pets_split(args.data_root, "val").images
    task = segmentation(flags, model)
    counts, losses = np.zeros((3, 3), int), []
    with torch.no_grad():
        found = task.validate(0, lambda: False)
        for i in range(len(images)):
            trimap = Image.open(f"{args.data_root}/{data.trimap_path(images[i])}").resize((IMG, IMG), Image.NEAREST)
            truth = torch.from_numpy(np.array(trimap)).long() - 1
            logits = model(augment.normalise(task.val_store.gather([i]).float()))[0]
            losses += F.cross_entropy(logits[None], truth[None], reduction="none").flatten().tolist()
            np.add.at(counts, (truth.flatten().numpy(), logits.argmax(0).flatten().numpy()), 1)
    assert counts.sum() == len(images) * IMG**2
    assert found["loss"] == pytest.approx(statistics.fmean(losses), rel=1e-5)
    for k, name in enumerate(("pet", "background", "border")):
        union = counts[k].sum() + counts[:, k].sum() - counts[k, k]
        assert found[f"iou_{name}"] == counts[k, k] / union
    assert found["iou"] == found["iou_pet"]
    assert found["accuracy"] == np.trace(counts) / counts.sum()


COUNT_ON_TWO = """
import json, sys, torch
from test_finetune import many_images, segmentation
from weights import load_model

task = segmentation(sys.argv[2:], load_model(sys.argv[1])[0], many_images(sys.argv[2:]))
with torch.no_grad():
    print(json.dumps(task.validate(0, lambda: False)))
"""


def many_images(flags) -> tuple[str, ...]:
    """Repeat the validation images until two processes have 66 and 65 for batches of 64."""
    return (22 * splits.pets_split(arguments(flags).data_root, "val").images)[:131]


def test_two_processes_validate_to_the_same_scores_with_a_last_batch_that_is_not_full(flags, tuned):
    task = segmentation(flags, load_model(str(tuned[0] / "model.pt"))[0], many_images(flags))
    with torch.no_grad():
        alone = task.validate(0, lambda: False)
    for out in on_two_processes(COUNT_ON_TWO, tuned[0] / "model.pt", *flags):
        together = json.loads(out.splitlines()[-1])
        assert together.pop("loss") == pytest.approx(alone["loss"], rel=1e-6)
        assert together == {k: v for k, v in alone.items() if k != "loss"}


# -- over-fitting -------------------------------------------------------------------------------------------------------


def overfit(monkeypatch, root, folder, script, *flags):
    """Train on 16 photos as they are, ten times an epoch, and validate on the same -> the best validation scores."""
    split = splits.pets_split(root, "train")
    lists = {k: dataclasses.replace(split, images=n * split.images[:16]) for k, n in (("train", 10), ("val", 1))}
    monkeypatch.setattr(splits, "pets_split", lambda root, part, **_: lists[part])
    run(
        script,
        "--device cpu",
        "--data_root",
        root,
        "--cache_dir",
        folder / "cache",
        "--output_dir",
        folder / "run",
        "--batch_size 16 --crop_scale 1 --no-flips --weight_decay 0",
        *flags,
    )
    return metrics(folder / "run")["best"]


@pytest.mark.parametrize("photos", ["drawn", pytest.param("real", marks=needs_photos)])
def test_sixteen_photos_are_learnt_by_heart(monkeypatch, root, tmp_path_factory, tmp_path, photos):
    where = os.environ["SAMPLE_ROOT"] if photos == "real" else root
    init = mae_checkpoint(tmp_path_factory, "mae_tiny", 48)
    best = overfit(
        monkeypatch,
        where,
        tmp_path,
        "finetune",
        "--model mae_tiny --img_size 48 --cache_size 48",
        "--init",
        init,
        "--epochs 26 --blr 5e-2 --layer_decay 1 --drop_path 0 --warmup_epochs 2 --clip_grad 1",
    )
    assert best["accuracy"] > 0.98


@needs_photos
@pytest.mark.slow
def test_at_full_size_sixteen_real_photos_are_learnt_by_heart(monkeypatch, tmp_path_factory, tmp_path):
    init = mae_checkpoint(tmp_path_factory, "mae_tiny", 224)
    best = overfit(
        monkeypatch,
        os.environ["SAMPLE_ROOT"],
        tmp_path,
        "finetune",
        "--model mae_tiny --cache_size 224",
        "--init",
        init,
        "--epochs 60 --blr 5e-2 --layer_decay 1 --drop_path 0 --warmup_epochs 2 --clip_grad 1",
    )
    print("accuracy", best["accuracy"])
    assert best["accuracy"] > 0.98


@needs_photos
@pytest.mark.slow
def test_at_full_size_a_few_epochs_clear_the_trivial_predictors(tmp_path_factory, tmp_path):
    root, init = os.environ["SAMPLE_ROOT"], mae_checkpoint(tmp_path_factory, "mae_small", 224)
    run(
        "finetune",
        "--model mae_small --device cpu --cache_size 224",
        "--data_root",
        root,
        "--cache_dir",
        tmp_path,
        "--init",
        init,
        "--output_dir",
        tmp_path / "run",
        "--epochs 6 --batch_size 16 --warmup_epochs 1 --blr 4e-3 --layer_decay 1",
    )
    train, val = (data.load_truth(root, splits.pets_split(root, part).images, 224) for part in ("train", "val"))
    mean_mask = torch.stack([(train == k).float().mean(0) for k in range(3)]).argmax(0)
    guesses = [torch.full_like(val, 0), torch.full_like(val, 1), mean_mask.expand_as(val)]
    trivial = [float(dataset_scores(confusion(val.long(), g.long()).numpy())["iou"]) for g in guesses]
    print("IoU", metrics(tmp_path / "run")["best"]["iou"], "trivial", trivial)
    assert metrics(tmp_path / "run")["best"]["iou"] > max(trivial) + 0.02


# -- what is refused ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_size_is_refused_with_the_model_it_fits(flags, tmp_path_factory, tmp_path):
    wrong = mae_checkpoint(tmp_path_factory, "mae_small", 32)
    message = refusal("finetune", *flags, "--init", wrong, "--output_dir", tmp_path / "no", "--batch_size", 8)
    assert "is of another model size" in message
    assert "it fits --model mae_small" in message


def copy_root(root, target):
    """Copy the drawn pets; the photos stay where they are."""
    pets = target / "oxford-iiit-pet"
    (pets / "annotations/trimaps").mkdir(parents=True)
    (pets / "images").symlink_to(root / "oxford-iiit-pet/images")
    (pets / "annotations/list.txt").write_text((root / "oxford-iiit-pet/annotations/list.txt").read_text())
    for path in (root / "oxford-iiit-pet/annotations/trimaps").iterdir():
        (pets / "annotations/trimaps" / path.name).symlink_to(path)
    return target


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("damage", ["size", "value"])
def test_a_trimap_that_cannot_be_right_is_named(flags, root, tmp_path, part, damage):
    other = copy_root(root, tmp_path / "data")
    name = data.trimap_path(splits.pets_split(root, part).images[-1])
    trimap = np.array(Image.open(root / name))
    if damage == "size":
        trimap = trimap[:-1]
    else:
        trimap[3, 4] = 7
    (other / name).unlink()
    Image.fromarray(trimap).save(other / name)
    message = refusal(
        "finetune",
        *flags,
        "--data_root",
        other,
        "--cache_dir",
        tmp_path / "cache",
        "--batch_size 8 --epochs 1",
        "--output_dir",
        tmp_path / "no",
    )
    assert name in message
    found = f"{trimap.shape[1]} x {trimap.shape[0]}, but its image is" if damage == "size" else "found values 1 to 7"
    assert found in message


def test_an_empty_list_of_pets_is_refused(flags, root, tmp_path):
    other = copy_root(root, tmp_path / "data")
    (other / "oxford-iiit-pet/annotations/list.txt").write_text("#Image CLASS-ID SPECIES BREED ID\n")
    message = refusal("finetune", *flags, "--data_root", other, "--output_dir", tmp_path / "no")
    assert "list.txt must name at least 7 images" in message


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (["--batch_size", 64], "--batch_size 64 is larger than the split's 32 images; use at most 32"),
        (["--batch_size", 8, "--micro_batch_size", 3], "nearest valid size is 9"),
        (["--batch_size", 8, "--crop_scale", 0], "argument --crop_scale: must lie in (0, 1], got 0"),
        (["--batch_size", 8, "--layer_decay", 0], "argument --layer_decay: must lie in (0, 1], got 0"),
        (["--batch_size", 8, "--train_fraction", 1.5], "argument --train_fraction: must lie in (0, 1], got 1.5"),
        (["--batch_size", 8, "--drop_path", 1], "drop_path must lie in [0, 1), got 1.0"),
        (["--batch_size", 8, "--img_size", 60], "60"),
        (["--batch_size", 8, "--epochs", 0], "argument --epochs: must be at least 1, got 0"),
    ],
)
def test_wrong_use_is_refused_in_one_line(flags, tmp_path, wrong, reason):
    assert reason in refusal("finetune", *flags, "--output_dir", tmp_path / "no", *wrong)
