"""Pre-training on labels: targets, loss and average precision as defined, labels found by path, and what it learns."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import relative_error
from small_runs import SMALL, drawn_root, log, mae_checkpoint, metrics, needs_photos, on_two_processes
from stress import assert_same

import data
import finetune
import pretrain
import splits
from engine import EngineError, setup
from metrics import average_precision, macro_average_precision
from objectives.labels import Labels, label_loss, lowest_loss, prior_logits, soft_targets
from weights import load_model

QUICK = settings(deadline=None, database=None, max_examples=60)


@st.composite
def labelled(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw labels [N, C], at least one for each image, and logits [N, C], some of them equal."""
    shape = draw(st.tuples(st.integers(1, 12), st.integers(2, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    shown = rng.random(shape) < draw(st.floats(0.05, 0.95))
    shown[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = True
    logits = rng.normal(0, 2, shape).round(draw(st.integers(0, 3)))
    return torch.tensor(shown, dtype=torch.float32), torch.tensor(logits, dtype=torch.float32)


# -- Targets, losses, trivial predictors --------------------------------------------------------------------------------


def slow_loss(logits: list[float], shown: list[float], kind: str) -> float:
    """Compute the loss of an image category by category."""
    total = 0.0
    for logit, is_shown in zip(logits, shown, strict=True):
        if kind == "bce":
            probability = 1 / (1 + math.exp(-logit))
            total -= math.log(probability if is_shown else 1 - probability) / len(logits)
        elif is_shown:
            probability = math.exp(logit) / sum(math.exp(other) for other in logits)
            total -= math.log(probability) / sum(shown)
    return total


@QUICK
@given(labelled(), st.sampled_from(["softmax", "bce"]))
def test_the_loss_is_that_of_a_loop_over_categories(case, kind):
    shown, logits = case
    expected = [slow_loss(*row, kind) for row in zip(logits.tolist(), shown.tolist(), strict=True)]
    assert label_loss(logits, shown, kind).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@QUICK
@given(labelled())
def test_targets_share_an_image_equally_among_what_it_shows(case):
    shown, _ = case
    targets = soft_targets(shown)
    assert torch.allclose(targets.sum(1), torch.ones(len(shown)))
    for row, of_image in zip(targets, shown, strict=True):
        assert row[of_image == 1].tolist() == pytest.approx([1 / of_image.sum().item()] * int(of_image.sum()))
        assert not row[of_image == 0].any()


@QUICK
@given(labelled(), st.sampled_from(["softmax", "bce"]))
def test_no_prediction_without_an_image_beats_the_prior_and_none_at_all_the_lowest_loss(case, kind):
    shown, logits = case
    many = shown.repeat(1000, 1)  # among which the images that the prior adds do not count
    prior = prior_logits(many, kind)
    assert prior.isfinite().all()
    reached = label_loss(prior.expand_as(shown), shown, kind).mean().item()
    for constant in logits:
        assert reached <= label_loss(constant.expand_as(shown), shown, kind).mean().item() + 1e-3
    assert lowest_loss(shown, kind) <= label_loss(logits, shown, kind).mean().item() + 1e-6
    perfect = 50 * shown if kind == "softmax" else 100 * shown - 50
    assert label_loss(perfect, shown, kind).mean().item() == pytest.approx(lowest_loss(shown, kind), abs=1e-5)


# -- Average precision --------------------------------------------------------------------------------------------------


def slow_average_precision(scores: list[float], shown: list[float]) -> float:
    """Average over the images that show a category the precision among all images with at least their score."""
    precisions = []
    for score, is_shown in zip(scores, shown, strict=True):
        if is_shown:
            listed = [truth for other, truth in zip(scores, shown, strict=True) if other >= score]
            precisions.append(sum(listed) / len(listed))
    return sum(precisions) / len(precisions) if precisions else math.nan


@QUICK
@given(labelled())
def test_average_precision_is_that_of_a_loop_over_images(case):
    shown, logits = case
    each = []
    for scores, truth in zip(logits.T.tolist(), shown.T.tolist(), strict=True):
        expected = slow_average_precision(scores, truth)
        assert average_precision(scores, truth) == pytest.approx(expected, nan_ok=True)
        each.append(expected)
    assert macro_average_precision(logits.numpy(), shown.numpy()) == pytest.approx(np.nanmean(each))


@QUICK
@given(labelled())
def test_average_precision_is_scikit_learns(case):
    ranking = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    shown, logits = (tensor.numpy() for tensor in case)
    seen = shown.any(0)
    expected = ranking.average_precision_score(shown[:, seen], logits[:, seen], average="macro")
    assert macro_average_precision(logits, shown) == pytest.approx(expected)


@QUICK
@given(labelled())
def test_equal_scores_have_the_base_rate(case):
    shown = case[0].numpy()
    seen = shown.any(0)
    assert macro_average_precision(np.zeros_like(shown), shown) == pytest.approx(shown[:, seen].mean())


# -- Which images, and which labels -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Drawn photos of which three training and two validation images have lost their labels."""
    root = tmp_path_factory.mktemp("photos") / "drawn"
    shutil.copytree(drawn_root(tmp_path_factory), root)
    for part, number in (("train2017", 3), ("val2017", 2)):
        path = root / f"coco/annotations/instances_{part}.json"
        content = json.loads(path.read_text())
        bare = set(plain_images(content)[:number])
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] not in bare]
        path.write_text(json.dumps(content))
    return root


def plain_images(content: dict) -> list[int]:
    """List the ids of the images that show no animal."""
    animals = {entry["id"] for entry in content["categories"] if entry["supercategory"] == "animal"}
    shown = {entry["image_id"] for entry in content["annotations"] if entry["category_id"] in animals}
    return [entry["id"] for entry in content["images"] if entry["id"] not in shown]


@pytest.fixture(scope="module")
def flags(root, tmp_path_factory):
    words = ["--objective", "labels", "--model", "mae_tiny", *SMALL, "--data_root", root]
    words += [
        "--cache_dir",
        tmp_path_factory.mktemp("cache"),
        "--batch_size",
        8,
        "--warmup_epochs",
        1,
        "--log_every",
        1,
    ]
    return [str(word) for word in words]


def parse(flags, *more):
    words = [*flags, *map(str, more)]
    return pretrain.resolve(pretrain.get_args_parser("labels").parse_args(words))


def train(flags, *more) -> None:
    """Pre-train on labels in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        pretrain.main(pretrain.get_args_parser("labels").parse_args([*flags, *map(str, more)]))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def labels_in_file(root, part: str, image: str) -> set[str]:
    """Read the categories of an image from the annotations as published."""
    content = json.loads((root / f"coco/annotations/instances_{part}.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    [number] = [entry["id"] for entry in content["images"] if image.endswith(entry["file_name"])]
    return {names[entry["category_id"]] for entry in content["annotations"] if entry["image_id"] == number}


@pytest.mark.parametrize("split", ["animal", "non_animal", "mixed", "all"])
def test_images_without_a_label_are_left_out_by_name_and_arms_still_make_equal_updates(flags, root, split):
    labels = Labels(parse(flags, "--split", split), setup("cpu"))
    whole = pretrain.MaskedPixels(pretrain.get_args_parser().parse_args(same_flags(flags, split)), setup("cpu"))
    bare = {image for image in whole.split.images if not labels_in_file(root, "train2017", image)}
    assert len(bare) == (0 if split == "animal" else len(labels.split.manifest["unlabelled"]))
    assert set(labels.split.manifest["unlabelled"]) == bare
    assert [image for image in whole.split.images if image not in bare] == list(labels.split.images)
    assert labels.epoch_images == whole.epoch_images
    assert bool(labels.remarks()) == bool(bare)
    assert labels.split.sha256 != whole.split.sha256
    read = {image for reading in labels.readings() for image in reading.images}
    assert read == {image for listed in labels.lists() for image in listed.images}
    for image in read:
        assert labels_in_file(root, image.split("/")[1], image)


def same_flags(flags: list[str], split: str) -> list[str]:
    """Give the flags of the study's own objective that choose the same images."""
    kept = [word for word in flags if word not in ("--objective", "labels")]
    return [*kept, "--split", split]


@pytest.mark.parametrize("what", ["pets", "no labels"])
def test_a_list_in_which_no_image_has_a_label_is_refused_in_one_line(flags, root, tmp_path, what):
    more = ["--split", "pets"]
    if what == "no labels":
        other = shutil.copytree(root, tmp_path / "bare")
        path = other / "coco/annotations/instances_train2017.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
        more = ["--split", "all", "--data_root", other]
    with pytest.raises(splits.TooFewImagesError, match=r"none of the .* has a label of COCO; choose a --split"):
        Labels(parse(flags, *more), setup("cpu"))


def test_validation_labels_that_training_does_not_know_are_refused_in_one_line(flags, root, tmp_path):
    other = shutil.copytree(root, tmp_path / "other")
    path = other / "coco/annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 999, "name": "unicorn", "supercategory": "animal"})
    path.write_text(json.dumps(content))
    with pytest.raises(data.DataError, match="val2017 has categories that train2017 lacks, such as 'unicorn'"):
        Labels(parse(flags, "--data_root", other), setup("cpu"))


def test_labels_are_found_by_path_so_that_an_unreadable_image_shifts_none(flags, root, tmp_path, monkeypatch):
    other = shutil.copytree(root, tmp_path / "damaged")
    monkeypatch.setattr(data, "MAX_UNREADABLE", 0.1)
    labels = Labels(
        parse(flags, "--split", "all", "--data_root", other, "--cache_dir", tmp_path / "cache"), setup("cpu")
    )
    damaged = labels.split.images[5]
    (other / damaged).write_bytes(b"no image")
    batches = labels.open(type("Run", (), {"dir": tmp_path})())
    store = batches.examples.images
    assert store.dropped == [damaged]
    assert len(store) == len(labels.split.images) - 1
    names = labels.train_part.categories
    for image, row in zip(store.images, batches.examples.targets["shown"], strict=True):
        assert {names[column] for column in np.flatnonzero(row)} == labels_in_file(root, "train2017", image)
    [(batch,)] = [next(batches.run(0, 1))]
    index = batches.prepare(0).index
    assert batch["shown"].tolist() == batches.examples.targets["shown"][index].tolist()


# -- Training -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """A run long enough to learn 8 images by heart -> its folder."""
    folder = tmp_path_factory.mktemp("run") / "labels"
    words = ["--animal_images", "unique", "--num_images", 8, "--epochs", 60, "--blr", 3e-2, "--drop_path", 0]
    words += ["--val_epochs", 60]
    train(flags, *words, "--output_dir", folder)
    return folder


def test_training_beats_the_prior_and_ends_near_the_lowest_loss_that_there_is(trained):
    record = metrics(trained)
    last = np.mean([line["loss"] for line in log(trained, "train")[-4:]])
    prior = record["train_labels"]["prior_loss"]
    lowest = record["train_labels"]["lowest_loss"]
    assert lowest - 1e-3 < last < lowest + 0.3 * (prior - lowest)


def test_validation_and_what_it_must_beat_are_computed_over_all_images_at_once(trained, root):
    record = metrics(trained)
    assert set(record["trivial"]["label prior"]) == set(Labels.scores)
    for name in ("animal", "non_animal"):
        lowest = record["lowest"][f"loss_{name}"]
        assert lowest < record["trivial"]["label prior"][f"loss_{name}"]
        assert lowest < record["last"][f"loss_{name}"]
        assert 0 < record["trivial"]["label prior"][f"ap_{name}"] < 1
        assert 0 < record["last"][f"ap_{name}"] <= 1
    done = log(trained, "done")[0]
    assert done["trivial"] == record["trivial"]


def test_the_encoder_is_kept_under_the_usual_keys_and_fine_tuning_takes_it(flags, trained, tmp_path):
    model, content = load_model(trained / "model.pt")
    assert content["model_config"]["kind"] == "vit"
    assert not any(key.startswith("head.") for key in content["model"])
    words = [flag for flag in flags if flag not in ("--objective", "labels")]
    args = finetune.get_args_parser().parse_args([*words, "--init", str(trained / "model.pt"), "--load", "encoder"])
    started = finetune.TASKS["segment"](args, setup("cpu"))
    for key, tensor in model.state_dict().items():
        assert torch.equal(started.model.state_dict()[key], tensor), key


def test_loading_the_encoder_alone_leaves_the_decoder_of_an_autoencoder_fresh(flags, tmp_path_factory, capsys):
    words = [flag for flag in flags if flag not in ("--objective", "labels")]
    checkpoint = mae_checkpoint(tmp_path_factory)
    saved = torch.load(checkpoint, weights_only=True)["model"]
    loaded = {}
    for part in ("all", "encoder"):
        words_of_part = [*words, "--init", str(checkpoint), "--load", part]
        args = finetune.get_args_parser().parse_args(words_of_part)
        loaded[part] = finetune.TASKS["segment"](args, setup("cpu")).model.state_dict()
        assert args.roles["load"] == "arm"
        assert ("the decoder starts fresh" in capsys.readouterr().out) == (part == "encoder")
    key = "decoder_blocks.0.attn.qkv.weight"
    assert torch.equal(loaded["all"][key], saved[key])
    assert not torch.equal(loaded["encoder"][key], saved[key])
    assert torch.equal(loaded["encoder"]["blocks.0.attn.qkv.weight"], saved["blocks.0.attn.qkv.weight"])


def test_after_an_autoencoder_the_encoder_goes_on_at_a_lower_rate(flags, tmp_path_factory, tmp_path, capsys):
    checkpoint = mae_checkpoint(tmp_path_factory, "mae_tiny", 32)
    assert parse(flags).blr == 1e-3
    assert parse(flags, "--init", checkpoint).blr == 5e-4
    assert parse(flags, "--init", checkpoint, "--blr", 0.1).blr == 0.1
    labels = Labels(parse(flags, "--init", checkpoint), setup("cpu"))
    printed = capsys.readouterr().out
    assert "positions interpolated: pos_embed" in printed
    assert "new head 4 (head)" in printed
    saved = torch.load(checkpoint, weights_only=True)["model"]
    assert torch.equal(labels.model.blocks[0].attn.qkv.weight, saved["blocks.0.attn.qkv.weight"])
    train(flags, "--init", checkpoint, "--epochs", 1, "--output_dir", tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text())["experiment"]["blr"] == 5e-4


def test_layers_decay_and_the_class_token_is_not_pulled_to_zero(flags):
    labels = Labels(parse(flags, "--layer_decay", 0.5), setup("cpu"))
    groups = {name: group for group in labels.parameter_groups() for name in group["names"]}
    assert groups["head.1.weight"]["lr_scale"] == 1
    assert groups["blocks.3.mlp.fc1.weight"]["lr_scale"] == 0.5
    assert groups["patch_embed.proj.weight"]["lr_scale"] == 0.5**5
    assert groups["cls_token"]["weight_decay"] == 0
    assert "pos_embed" not in groups


TRAIN = """
import sys, pretrain
pretrain.main(pretrain.get_args_parser("labels").parse_args(sys.argv[1:]))
"""


def test_one_process_two_processes_and_accumulation_give_the_same_result(flags, tmp_path, tmp_path_factory):
    words = ["--epochs", 2, "--drop_path", 0.3, "--init", mae_checkpoint(tmp_path_factory)]
    train(flags, *words, "--output_dir", tmp_path / "one")
    train(flags, *words, "--micro_batch_size", 2, "--output_dir", tmp_path / "accumulated")
    on_two_processes(TRAIN, *flags, *words, "--output_dir", tmp_path / "two")
    expected = torch.load(tmp_path / "one/model.pt", weights_only=True)["model"]
    losses = [line["loss"] for line in log(tmp_path / "one", "train")]
    for name in ("accumulated", "two"):
        assert [line["loss"] for line in log(tmp_path / name, "train")] == pytest.approx(losses, rel=1e-5)
        found = torch.load(tmp_path / name / "model.pt", weights_only=True)["model"]
        for key, tensor in expected.items():
            assert relative_error(found[key], tensor) < 1e-4, key
        for record in ("last", "trivial"):
            first = metrics(tmp_path / "one")[record]
            assert set(metrics(tmp_path / name)[record]) == set(first)
        assert metrics(tmp_path / name)["last"] == pytest.approx(metrics(tmp_path / "one")["last"], rel=1e-4)


def test_yes_or_no_for_each_category_is_accumulated_and_compared_with_its_own_prior(flags, tmp_path):
    words = ["--epochs", 1, "--label_loss", "bce"]
    train(flags, *words, "--output_dir", tmp_path / "one")
    train(flags, *words, "--micro_batch_size", 2, "--output_dir", tmp_path / "accumulated")
    one = metrics(tmp_path / "one")
    assert one["last"] == pytest.approx(metrics(tmp_path / "accumulated")["last"], rel=1e-4)
    assert one["train_labels"]["lowest_loss"] == 0
    assert 0 < one["train_labels"]["prior_loss"] < math.log(2)


def test_a_run_that_is_stopped_in_a_validation_ends_as_an_undisturbed_one(flags, tmp_path, monkeypatch):
    words = ["--epochs", 4, "--blr", 1e-2]
    train(flags, *words, "--output_dir", tmp_path / "undisturbed")
    whole = Labels.logits_of

    def stop(labels, name, stopping):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(labels, name, stopping)

    with monkeypatch.context() as patch, pytest.raises(EngineError, match="the same command continues the run"):
        patch.setattr(Labels, "logits_of", stop)
        train(flags, *words, "--output_dir", tmp_path / "stopped")
    train(flags, *words, "--output_dir", tmp_path / "stopped")
    assert_same(tmp_path / "undisturbed", tmp_path / "stopped")


def test_other_labels_of_the_same_images_are_another_experiment(flags, root, tmp_path):
    other = shutil.copytree(root, tmp_path / "other")
    first = Labels(parse(flags, "--data_root", other), setup("cpu"))
    path = other / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    animal = first.split.images[0]
    [number] = [entry["id"] for entry in content["images"] if animal.endswith(entry["file_name"])]
    thing = next(entry["id"] for entry in content["categories"] if entry["supercategory"] != "animal")
    content["annotations"].append({**content["annotations"][0], "id": 10**6, "image_id": number, "category_id": thing})
    path.write_text(json.dumps(content))
    second = Labels(parse(flags, "--data_root", other), setup("cpu"))
    assert second.split.images == first.split.images
    changed = {key for key, value in first.identity().items() if second.identity()[key] != value}
    assert changed == {"labels"}


@needs_photos
def test_on_real_photos_predictions_beat_the_label_prior(tmp_path):
    words = ["--model", "mae_tiny", *SMALL, "--data_root", os.environ["SAMPLE_ROOT"], "--cache_dir", tmp_path]
    words += ["--objective", "labels", "--split", "all", "--batch_size", 16, "--epochs", 10, "--epoch_updates", 15]
    words += ["--blr", 8e-3, "--warmup_epochs", 1, "--val_epochs", 10]
    train([str(word) for word in words], "--output_dir", tmp_path / "run")
    record = metrics(tmp_path / "run")
    prior = record["trivial"]["label prior"]
    assert sum(record["last"][f"loss_{name}"] for name in ("animal", "non_animal")) < 0.98 * (
        prior["loss_animal"] + prior["loss_non_animal"]
    )
    assert record["last"]["ap_animal"] > prior["ap_animal"]
