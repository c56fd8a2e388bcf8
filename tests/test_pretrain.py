"""Pre-training lowers the loss below what predicting nothing gives, under fixed validation masks, and says what it did."""

import itertools
import json
import os
import shutil
import statistics
import types

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import IMG, SMALL, MemoryStore, drawn_root, log, mae_checkpoint, metrics, needs_photos, refusal, run

import augment
import pretrain
from engine import setup
from models import patchify
from weights import load_model

TINY = ["--model", "mae_tiny", *SMALL]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return [*TINY, "--data_root", drawn_root(tmp_path_factory), "--cache_dir", tmp_path_factory.mktemp("cache")]


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """A run long enough to over-fit, of 16 unique photos -> (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("run") / "animal"
    text = run(
        "pretrain",
        *flags,
        "--output_dir",
        folder,
        "--animal_images unique --num_images 16 --epochs 200 --batch_size 16",
        "--blr 2.4e-2 --warmup_epochs 10 --log_every 25 --clip_grad 1",
    )
    return folder, text


def falls_steadily(losses):
    return all(later < 1.02 * earlier for earlier, later in itertools.pairwise(losses))


def test_the_training_loss_falls_steadily_far_below_that_of_predicting_zero(trained):
    losses = [line["loss"] for line in log(trained[0], "train")]
    assert falls_steadily(losses)
    assert losses[-1] < 0.92 * min(metrics(trained[0])["predict_zero"].values())


def test_validation_ends_below_the_loss_of_predicting_zero(trained):
    m = metrics(trained[0])
    assert m["last"]["loss_animal"] < 0.97 * m["predict_zero"]["animal"]
    assert m["last"]["loss_non_animal"] < 0.97 * m["predict_zero"]["non_animal"]


def test_the_learning_rate_warms_up_and_follows_half_a_cosine(flags, tmp_path):
    run(
        "pretrain",
        *flags,
        "--output_dir",
        tmp_path / "run",
        "--num_images 16 --epochs 6 --batch_size 8 --warmup_epochs 1.5 --log_every 1 --min_lr 1e-6 --blr 1e-3",
    )
    rates, lr = [line["lr"] for line in log(tmp_path / "run", "train")], 1e-3 * 8 / 256
    expected = [
        lr * (s + 1) / 3 if s < 3 else 1e-6 + (lr - 1e-6) * (1 + np.cos(np.pi * (s - 3) / 9)) / 2 for s in range(12)
    ]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_an_epoch_may_be_a_number_of_updates_more_than_there_are_images(flags, tmp_path):
    words = [*flags, "--output_dir", tmp_path / "run", "--num_images 4 --batch_size 4 --epochs 2"]
    words += ["--warmup_epochs 0.4 --log_every 1 --min_lr 1e-6 --blr 1e-3"]
    run("pretrain", *words, "--epoch_updates", 5)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["updates"], config["epoch_updates"], config["n_train"]) == (10, 5, 4)
    assert metrics(tmp_path / "run")["updates"] == 10
    assert [(line["epoch"], line["step"]) for line in log(tmp_path / "run", "val")] == [(1, 5), (2, 10)]
    lr = 1e-3 * 4 / 256
    warmup = [lr / 2, lr]
    cosine = [1e-6 + (lr - 1e-6) * (1 + np.cos(np.pi * step / 8)) / 2 for step in range(8)]
    assert [line["lr"] for line in log(tmp_path / "run", "train")] == pytest.approx(warmup + cosine, rel=1e-12)
    for other in (["--epoch_updates", 6], []):
        assert "holds another experiment: epoch_updates was 5, now" in refusal("pretrain", *words, *other)


def test_an_epoch_of_as_many_updates_as_a_pass_is_a_pass(flags, tmp_path):
    for name, more in (("pass", []), ("updates", ["--epoch_updates", 2])):
        words = ["--num_images 16 --batch_size 8 --epochs 2 --blr 1e-2", "--output_dir", tmp_path / name]
        run("pretrain", *flags, *words, *more)
    networks = [torch.load(tmp_path / name / "model.pt", weights_only=True)["model"] for name in ("pass", "updates")]
    assert all(torch.equal(networks[0][key], networks[1][key]) for key in networks[0])


def test_the_figure_shows_input_reconstruction_and_original_of_named_images(trained):
    arrays = np.load(trained[0] / "reconstruction.npz")
    for name in ("original", "masked", "reconstruction"):
        assert arrays[name].shape == (8, IMG, IMG, 3)
        assert arrays[name].dtype == np.uint8
    assert len(arrays["ids"]) == len(set(arrays["ids"])) == 8
    assert Image.open(trained[0] / "reconstruction.png").size == (3 * IMG, 8 * IMG)
    grid = IMG // 16
    same = (arrays["masked"] == arrays["original"]).reshape(8, grid, 16, grid, 16, 3).all((2, 4, 5))
    filled = (arrays["reconstruction"] == arrays["original"]).reshape(8, grid, 16, grid, 16, 3).all((2, 4, 5))
    assert (same.sum((1, 2)) == grid**2 // 4).all(), "a quarter of the patches is visible"
    assert (filled == same).all(), "visible patches are kept, the others predicted"


def masked_pixels(flags, *more) -> pretrain.MaskedPixels:
    """Make the objective as main does, without training it."""
    words = [str(flag) for flag in (*flags, "--num_images", 16, *more)]
    return pretrain.MaskedPixels(pretrain.get_args_parser().parse_args(words), setup("cpu"))


def fixed_noise(count: int, patches: int) -> torch.Tensor:
    """Draw the masks that every run validates with."""
    return torch.from_numpy(np.random.default_rng(20170).random((count, patches), np.float32))


def test_validation_is_the_mean_over_each_image_once_under_fixed_masks_for_any_batch_size(flags, trained):
    model = load_model(str(trained[0] / "model.pt"))[0]
    for batch_size in (8, 3):
        mae = masked_pixels(flags, "--batch_size", batch_size)
        mae.open(types.SimpleNamespace(dir=trained[0]))
        mae.model = model
        store = mae.stores["animal"]
        noise = fixed_noise(len(store), model.num_patches)
        each = []
        with torch.no_grad():
            for i in range(len(store)):
                x = augment.normalise(store.gather([i]).float())
                each.append(model(x, 0.75, noise[i : i + 1])[0].item())
            scores = mae.validate(0, lambda: False)
        assert scores["loss_animal"] == pytest.approx(statistics.fmean(each), rel=1e-5)
    assert scores["loss_animal"] == pytest.approx(metrics(trained[0])["last"]["loss_animal"], rel=1e-5)


def test_the_loss_of_predicting_zero_is_that_of_the_hidden_patches_alone(flags):
    mae = masked_pixels(flags, "--batch_size", 8)
    images = torch.randint(0, 256, (5, 3, IMG, IMG), dtype=torch.uint8)
    images[:, :, :32] = 128  # flat patches, whose normalised pixels are zero, as half of the image
    noise = fixed_noise(5, 16)
    mae.stores = {"some": MemoryStore(images)}
    mae.targets = {"some": {"noise": noise}}
    zero = mae.predict_zero()["some"]
    patches = patchify(augment.normalise(images.float()), 16)
    hidden = noise.argsort(dim=1, stable=True).argsort(dim=1) >= 4
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    assert zero == pytest.approx((target**2).mean(-1)[hidden].mean().item(), rel=1e-5)


def test_a_run_records_what_it_did(trained):
    folder, text = trained
    config, m = json.loads((folder / "config.json").read_text()), metrics(folder)
    for record in (config, m):
        assert (record["script"], record["kind"]) == ("pretrain", "mae")
    assert config["updates"] == m["updates"] == 200
    assert config["n_train"] == config["n_unique"] == config["batch_size"] == 16
    assert config["manifest"]["train"]["sha256"] == config["experiment"]["train"]
    assert [line["epoch"] for line in log(folder, "val")] == list(range(1, 201))
    for fact in ("mae_tiny", "GFLOP per training image", "fp32", "200 updates of 16 images", "16 unique images"):
        assert fact in text
    assert not list(folder.glob("last*.pt"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_train_like_float32_on_a_cpu(flags, tmp_path, precision):
    def losses(name):
        run(
            "pretrain",
            *flags,
            "--output_dir",
            tmp_path / name,
            "--num_images 16 --epochs 3 --batch_size 8 --warmup_epochs 0 --log_every 1 --blr 1e-2",
            "--precision",
            name,
        )
        return [line["loss"] for line in log(tmp_path / name, "train")]

    assert losses(precision) == pytest.approx(losses("fp32"), rel=0.03)


def test_training_continues_from_a_checkpoint_and_says_what_it_took(flags, trained, tmp_path):
    text = run(
        "pretrain",
        *flags,
        "--output_dir",
        tmp_path / "on",
        "--init",
        trained[0] / "model.pt",
        "--num_images 16 --animal_images unique --epochs 1 --batch_size 16 --blr 0",
    )
    assert "missing none; unexpected none" in text
    assert metrics(tmp_path / "on")["last"]["loss_animal"] == metrics(trained[0])["last"]["loss_animal"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(flags, tmp_path):
    text = run("pretrain", *flags, "--output_dir", tmp_path / "dry", "--dry_run", "--num_images", 16, "--batch_size", 8)
    assert "plan: 300 updates of 8 images, 150 epochs, lr 4.69e-06" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (["--batch_size", 300], "--batch_size 300 is larger than the split's 16 images; use at most 16"),
        (["--img_size", 60, "--batch_size", 8], "60"),
        (["--mask_ratio", 1, "--batch_size", 8], "mask_ratio must lie in [0, 1)"),
        (["--blr", -1], "argument --blr: must be at least 0, got -1"),
        (["--epoch_updates", 0], "argument --epoch_updates: must be at least 1, got 0"),
        (["--micro_batch_size", 3, "--batch_size", 8], "nearest valid size is 9"),
        (["--split", "animal", "--animal_fraction", 0.2], "contradicts --split animal"),
    ],
)
def test_wrong_use_is_refused_in_one_line(flags, tmp_path, wrong, reason):
    assert reason in refusal("pretrain", *flags, "--output_dir", tmp_path / "no", "--num_images", 16, *wrong)


@needs_photos
def test_on_64_real_photos_the_loss_falls_steadily(tmp_path):
    run(
        "pretrain",
        *TINY,
        "--data_root",
        os.environ["SAMPLE_ROOT"],
        "--cache_dir",
        tmp_path,
        "--output_dir",
        tmp_path / "run",
        "--split pets --num_images 64 --epochs 60 --batch_size 16 --blr 6e-3 --warmup_epochs 5 --log_every 40 --clip_grad 1",
    )
    losses = [line["loss"] for line in log(tmp_path / "run", "train")]
    assert falls_steadily(losses)
    assert losses[-1] < 0.94 * metrics(tmp_path / "run")["predict_zero"]["animal"]


@needs_photos
@pytest.mark.slow
def test_at_full_size_the_loss_of_64_real_photos_ends_clearly_below_that_of_predicting_zero(tmp_path):
    run(
        "pretrain",
        "--model mae_small --device cpu --cache_size 224",
        "--data_root",
        os.environ["SAMPLE_ROOT"],
        "--cache_dir",
        tmp_path,
        "--output_dir",
        tmp_path / "run",
        "--split animal --animal_images unique --num_images 64 --epochs 60 --batch_size 16",
        "--blr 4e-3 --warmup_epochs 5 --log_every 40 --clip_grad 1",
    )
    losses = [line["loss"] for line in log(tmp_path / "run", "train")]
    assert falls_steadily(losses)
    assert losses[-1] < 0.9 * metrics(tmp_path / "run")["predict_zero"]["animal"]


def test_the_data_are_named_by_their_counts_unless_they_bring_a_name(flags, tmp_path, tmp_path_factory):
    root = shutil.copytree(drawn_root(tmp_path_factory), tmp_path / "root")
    words = ["--data_root", root, "--cache_dir", tmp_path / "cache", "--batch_size", 4, "--dry_run"]
    assert "images of drawn demo photos" in run("pretrain", *flags, *words)
    (root / "DATASET.txt").write_bytes(b"")
    assert "images of unknown data" in run("pretrain", *flags, *words)
    (root / "DATASET.txt").unlink()
    assert "images of 56 COCO photos of 123,287" in run("pretrain", *flags, *words)
    finetune = ["--init", mae_checkpoint(tmp_path_factory), "--model", "mae_tiny", *SMALL]
    assert "images of 46 pets of 7,349" in run("finetune", *finetune, *words)
