"""Counts equal brute force, test records hold every image's pixels once, and predict makes masks of any image file."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_runs import IMG, SMALL, drawn_root, mae_checkpoint, refusal, run

import augment
import data
import splits
from metrics import dataset_scores
from segmentation import REFERENCES, boundaries, confusion, predict
from weights import load_model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return drawn_root(tmp_path_factory)


@pytest.fixture(scope="module")
def flags(root, tmp_path_factory):
    return ["--data_root", root, "--cache_dir", tmp_path_factory.mktemp("cache"), "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(root, flags, tmp_path_factory):
    """A finished fine-tuned run, tested with 3 images at a time (8 = 3 + 3 + 2)."""
    folder = tmp_path_factory.mktemp("run") / "tuned"
    run(
        "finetune",
        "--model mae_tiny",
        *SMALL,
        *flags,
        "--init",
        mae_checkpoint(tmp_path_factory),
        "--output_dir",
        folder,
        "--epochs 6 --batch_size 8 --warmup_epochs 1 --blr 3e-2",
    )
    run("evaluate", "test", folder, *flags, "--batch_size", 3)
    return folder


# -- counting -----------------------------------------------------------------------------------------------------------


@st.composite
def mask_pairs(draw, low=1, high=24):
    """Truth and prediction [B, H, W] of classes 0, 1, 2: blobs, single classes and noise."""
    b, h, w = draw(st.integers(1, 3)), draw(st.integers(low, high)), draw(st.integers(low, high))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    cells = draw(st.integers(1, 6))

    def one():
        coarse = rng.integers(0, draw(st.integers(1, 3)), (b, -(-h // cells), -(-w // cells)))
        return torch.from_numpy(coarse.repeat(cells, 1).repeat(cells, 2)[:, :h, :w])

    return one(), one()


@settings(max_examples=50, deadline=None)
@given(mask_pairs())
def test_confusion_equals_counting_pixel_by_pixel(pair):
    truth, pred = pair
    expected = np.zeros((len(truth), 3, 3), int)
    for i, y, x in np.ndindex(*truth.shape):
        expected[i, truth[i, y, x], pred[i, y, x]] += 1
    found = confusion(truth, pred)
    assert found.dtype == torch.int64
    assert (found.numpy() == expected).all()


def band(mask, width):
    """Pixels of a mask [H, W] that have a pixel outside of it, or the image's edge, within `width` rows and columns."""
    h, w = mask.shape
    out = np.zeros_like(mask)
    for y, x in zip(*np.nonzero(mask), strict=True):
        inside = y >= width and x >= width and y + width < h and x + width < w
        window = mask[max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1]
        out[y, x] = not (inside and window.all())
    return out


@settings(max_examples=40, deadline=None)
@given(mask_pairs(low=5, high=60))
def test_boundary_counts_equal_direct_morphology(pair):
    truth, pred = pair
    width = max(1, round(0.02 * np.hypot(*truth.shape[1:])))
    found = boundaries(truth, pred).numpy()
    for i in range(len(truth)):
        for k, member in enumerate((lambda m: m == 0, lambda m: m != 1)):
            a, b = (band(member(m[i].numpy()), width) for m in (truth, pred))
            assert found[i, k].tolist() == [(a & b).sum(), (a | b).sum()]


def test_a_perfect_prediction_has_its_whole_boundary_in_common():
    truth = torch.ones(1, 100, 100, dtype=torch.long)
    truth[:, 20:70, 30:80] = 0
    band_size = 50**2 - 44**2  # 2 % of the diagonal is 3 pixels
    assert boundaries(truth, truth)[0, 0].tolist() == [band_size, band_size]


# -- test records -------------------------------------------------------------------------------------------------------


def test_records_hold_each_test_image_once_with_all_of_its_pixels(root, folder):
    r, images = np.load(folder / "test.npz"), splits.pets_split(root, "test").images
    n = len(images)
    assert sorted(r["ids"]) == sorted(Path(x).stem for x in images)
    shapes = {
        "counts": (n, 3, 3),
        "counts_native": (n, 3, 3),
        "boundary": (n, 2, 2),
        "boundary_native": (n, 2, 2),
        "pixels": (n,),
        "loss_sum": (n,),
        "img_size": (),
        "ids": (n,),
        "unreadable": (0,),
    }
    assert {k: r[k].shape for k in r} == shapes
    for name in ("counts", "counts_native", "boundary", "boundary_native", "pixels"):
        assert r[name].dtype == np.int64
    assert r["loss_sum"].dtype == np.float64
    assert r["img_size"] == IMG
    assert (r["pixels"] == IMG**2).all()
    assert (r["counts"].sum((1, 2)) == IMG**2).all()
    for name, count in zip(r["ids"], r["counts_native"], strict=True):
        trimap = np.array(Image.open(root / data.trimap_path(f"{name}.jpg")))
        assert count.sum(1).tolist() == [(trimap == k).sum() for k in (1, 2, 3)]
    for name in ("boundary", "boundary_native"):
        assert (r[name][..., 0] <= r[name][..., 1]).all()


def test_records_equal_scoring_the_images_one_by_one(root, folder):
    r, (model, _) = np.load(folder / "test.npz"), load_model(str(folder / "model.pt"))
    for i, name in enumerate(r["ids"]):
        path = root / "oxford-iiit-pet/images" / f"{name}.jpg"
        small = np.asarray(Image.open(path).resize((IMG, IMG), Image.BICUBIC))
        trimap = Image.open(root / data.trimap_path(path.name))
        truth = torch.from_numpy(np.array(trimap.resize((IMG, IMG), Image.NEAREST))).long()[None] - 1
        with torch.no_grad():
            logits = model(augment.normalise(torch.tensor(small).permute(2, 0, 1)[None].float()))
        assert r["loss_sum"][i] == pytest.approx(F.cross_entropy(logits, truth, reduction="sum").item(), rel=1e-4)
        assert abs(r["counts"][i] - confusion(truth, logits.argmax(1))[0].numpy()).sum() <= 4  # rounded logits
        native = torch.from_numpy(np.array(trimap)).long()[None] - 1
        large = torch.from_numpy(predict(model, data.read_image(path), IMG))[None].long()
        assert abs(r["counts_native"][i] - confusion(native, large)[0].numpy()).sum() <= 40


def test_panels_show_the_same_examples_for_every_model(folder):
    panels, r = np.load(folder / "panels.npz"), np.load(folder / "test.npz")
    k = len(panels["ids"])
    assert k == 6
    assert list(panels["ids"]) == sorted(panels["ids"]), "spread over the alphabet, not chosen by score"
    assert panels["images"].shape == (k, IMG, IMG, 3)
    for name in ("truth", "pred"):
        assert panels[name].shape == (k, IMG, IMG)
        assert panels[name].dtype == np.uint8
    for i, name in enumerate(panels["ids"]):
        truth, pred = (torch.from_numpy(panels[x][i : i + 1]).long() for x in ("truth", "pred"))
        assert (confusion(truth, pred)[0].numpy() == r["counts"][list(r["ids"]).index(name)]).all()


def test_a_second_test_does_nothing_unless_asked_and_batches_do_not_matter(folder, flags):
    before = dict(np.load(folder / "test.npz"))
    stamp = (folder / "test.npz").stat().st_mtime_ns
    assert "nothing to do" in run("evaluate", "test", folder, *flags)
    assert (folder / "test.npz").stat().st_mtime_ns == stamp
    text = run("evaluate", "test", folder, *flags, "--again", "--batch_size", 8)
    after = np.load(folder / "test.npz")
    assert abs(after["counts"] - before["counts"]).sum() <= 8
    assert after["loss_sum"] == pytest.approx(before["loss_sum"], rel=1e-4)
    iou = float(re.search(r"IoU ([\d.]+)", text)[1])
    assert iou == pytest.approx(float(dataset_scores(after["counts"])["iou"]), abs=6e-4)


def test_a_pretrained_run_is_not_a_segmenter(folder, flags, tmp_path, tmp_path_factory):
    checkpoint = mae_checkpoint(tmp_path_factory)
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/model.pt").write_bytes(checkpoint.read_bytes())
    expected = "is a pre-trained autoencoder; fine-tune it: finetune.py --init"
    assert expected in refusal("evaluate", "test", tmp_path / "pretrain", *flags)
    assert expected in refusal("evaluate", "predict", "--checkpoint", checkpoint, "--device", "cpu", "cat.jpg")
    (tmp_path / "empty").mkdir()
    assert "has no model.pt: it is not a finished run" in refusal("evaluate", "test", tmp_path / "empty", *flags)


def test_sizes_below_one_are_refused(folder, flags):
    assert "argument --batch_size: must be at least 1, got 0" in refusal(
        "evaluate", "test", folder, *flags, "--batch_size", 0
    )
    assert "argument --img_size: must be at least 1, got 0" in refusal("evaluate", "reference", *flags, "--img_size", 0)


# -- reference points ---------------------------------------------------------------------------------------------------


def test_reference_points_are_those_of_the_test_trimaps(root, flags, folder, tmp_path):
    run("evaluate", "reference", *flags, "--img_size", IMG, "--output", tmp_path / "reference.npz")
    ref, r = np.load(tmp_path / "reference.npz"), np.load(folder / "test.npz")
    assert list(ref["ids"]) == list(r["ids"])
    truth = r["counts"].sum(2)
    for name, column in (("all_animal", 0), ("all_background", 1)):
        expected = np.zeros_like(r["counts"])
        expected[:, :, column] = truth
        assert (ref[f"counts_{name}"] == expected).all()
    assert (ref["counts_mean_mask"].sum(2) == truth).all()
    assert ref["counts_mean_mask"].dtype == np.int64
    assert {name.removeprefix("counts_") for name in ref if name.startswith("counts_")} == set(REFERENCES)
    scores = {name: dataset_scores(ref[f"counts_{name}"]) for name in REFERENCES}
    assert scores["all_background"]["iou"] == 0
    assert scores["mean_mask"]["accuracy"] >= scores["all_background"]["accuracy"] - 0.1


# -- prediction ---------------------------------------------------------------------------------------------------------


def test_predict_works_on_its_own_for_any_size(folder):
    model, _ = load_model(str(folder / "model.pt"))
    for size in ((1, 1), (37, 91), (200, 30)):
        mask = predict(model, Image.new("RGB", size, "tan"), IMG)
        assert mask.shape == size[::-1]
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 1, 2}


@pytest.fixture
def photos(root, tmp_path):
    """Odd files: the same name twice, blanks, umlauts and quotes in names, grey, alpha, a palette, a turned one."""
    original = Image.open(next((root / "oxford-iiit-pet/images").iterdir()))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    made = {
        "a/cat.jpg": original,
        "b/cat.png": original.resize((50, 40)),
        "ünï 'code' %d\n.jpg": original,
        "grey.png": original.convert("L"),
        "alpha.png": original.convert("RGBA"),
        "gif.gif": original.convert("P"),
        "no_suffix": original,
        "-dash.jpg": original,
    }
    for name, image in made.items():
        image.save(tmp_path / name, format={".png": "PNG", ".gif": "GIF"}.get(Path(name).suffix, "JPEG"))
    exif = Image.Exif()
    exif[0x0112] = 6
    original.save(tmp_path / "turned.jpg", exif=exif)
    return [tmp_path / name for name in (*made, "turned.jpg")]


def test_predict_writes_a_mask_and_an_overlay_of_every_image(folder, photos, tmp_path):
    out = tmp_path / "out"
    text = run(
        "evaluate", "predict", "--checkpoint", folder / "model.pt", "--device", "cpu", "--output_dir", out, *photos
    )
    masks, overlays = (sorted(out.glob(f"*_{kind}.png")) for kind in ("mask", "overlay"))
    assert len(masks) == len(overlays) == len(photos)
    lines = [line for line in text.splitlines() if not line.startswith("note:")]
    assert len(lines) == len(photos)  # also for a name with a line break
    sizes = sorted(data.read_image(p).size for p in photos)
    for files in (masks, overlays):
        assert sorted(Image.open(p).size for p in files) == sizes
    for path in masks:
        with Image.open(path) as mask:
            assert set(np.unique(np.asarray(mask))) <= {1, 2, 3}
    model, _ = load_model(str(folder / "model.pt"))
    expected = predict(model, data.read_image(photos[-1]), IMG) + 1
    assert (np.asarray(Image.open(out / "turned_mask.png")) == expected).all()


def test_images_of_the_same_name_never_overwrite_each_other(folder, photos, tmp_path):
    odd, out = tmp_path / "cat_1.jpg", tmp_path / "out"  # the name that a number would give to the second cat
    Image.new("RGB", (30, 20)).save(odd)
    run(
        "evaluate",
        "predict",
        "--checkpoint",
        folder / "model.pt",
        "--device",
        "cpu",
        "--output_dir",
        out,
        *photos[:2],
        odd,
    )
    sizes = sorted(Image.open(p).size for p in (*photos[:2], odd))
    assert sorted(Image.open(p).size for p in out.glob("*_mask.png")) == sizes
    assert sorted(Image.open(p).size for p in out.glob("*_overlay.png")) == sizes


def test_unreadable_images_are_named_and_the_others_predicted(folder, photos, tmp_path, capsys):
    bad, out = tmp_path / "broken.jpg", tmp_path / "out"
    bad.write_bytes(b"not an image")
    files = [photos[0], bad, tmp_path / "missing.jpg", photos[1]]
    message = refusal(
        "evaluate", "predict", "--checkpoint", folder / "model.pt", "--device", "cpu", "--output_dir", out, *files
    )
    assert message == "2 of 4 images could not be read"
    assert len(list(out.glob("*_mask.png"))) == 2


def test_a_checkpoint_that_is_no_model_of_ours_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    message = refusal("evaluate", "predict", "--checkpoint", tmp_path / "other.pt", "--device", "cpu", "cat.jpg")
    assert "was not written by this project's training scripts" in message


@pytest.mark.parametrize("head", ["decoder", "linear"])
def test_precision_and_head_do_not_change_what_a_record_is(folder, flags, tmp_path, tmp_path_factory, head):
    if head == "linear":
        other = tmp_path / "linear"
        run(
            "finetune",
            "--model mae_tiny",
            *SMALL,
            *flags,
            "--init",
            mae_checkpoint(tmp_path_factory),
            "--output_dir",
            other,
            "--epochs 1 --batch_size 8 --head linear",
        )
    else:
        other = tmp_path / "copy"
        other.mkdir()
        (other / "model.pt").write_bytes((folder / "model.pt").read_bytes())
    run("evaluate", "test", other, *flags, "--precision", "bf16")
    r, before = np.load(other / "test.npz"), np.load(folder / "test.npz")
    assert list(r["ids"]) == list(before["ids"])
    assert (r["counts"].sum(2) == before["counts"].sum(2)).all()
    if head == "decoder":
        assert r["loss_sum"] == pytest.approx(before["loss_sum"], rel=0.03)
