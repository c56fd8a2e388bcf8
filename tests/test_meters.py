"""Meters of collapse: which photos they measure, that they tell a collapse, and that they change nothing."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import IMG, SMALL, drawn_root, log, run

import data
import meters
import pretrain
import splits
from batches import EvalBatches
from data import ImageStore
from engine import setup
from meters import COLLAPSE_SCORES, KNN_SCORES, Meter, MeterPhotos
from models import build_vit
from probes import measure_collapse

CPU = setup("cpu")


def open_store(root, images, cache) -> ImageStore:
    data.build_cache(root, images, cache_dir=cache, cache_size=IMG)
    return ImageStore(root, images, cache_dir=cache, cache_size=IMG)


def batches_of(size: int):
    """Make the batches of a store, of so many images."""

    def batches(store, targets):
        return EvalBatches(store, img_size=IMG, batch_size=size, targets=targets)

    return batches


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> MeterPhotos:
    return MeterPhotos.of_pets(drawn_root(tmp_path_factory))


@pytest.fixture(scope="module")
def store(photos, tmp_path_factory) -> ImageStore:
    return open_store(drawn_root(tmp_path_factory), photos.images, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return build_vit("mae_tiny", img_size=IMG).eval()


def measured(store, photos, encoder, size=5):
    with torch.no_grad():
        return Meter(store, photos, batches_of(size), CPU).measure(encoder, lambda: False)


def test_training_photos_are_the_bank_and_validation_photos_the_queries(photos, tmp_path_factory, monkeypatch):
    root = drawn_root(tmp_path_factory)
    train = splits.pets_split(root, "train").images
    val = splits.pets_split(root, "val").images
    assert photos.images == (*train, *val)
    assert photos.queries == set(val)
    monkeypatch.setattr(meters, "BANK_IMAGES", 7)
    monkeypatch.setattr(meters, "QUERY_IMAGES", 3)
    fewer = MeterPhotos.of_pets(root)
    assert len(fewer.images) == 10
    assert len(fewer.queries) == 3
    assert fewer.queries <= photos.queries
    assert fewer == MeterPhotos.of_pets(root)


def test_the_numbers_are_those_of_features_computed_one_by_one(store, photos, encoder):
    found = measured(store, photos, encoder)
    assert set(found) == {*COLLAPSE_SCORES, *KNN_SCORES}
    rows = []
    with torch.no_grad():
        for batch in batches_of(1)(store, {}):
            rows.append(encoder.forward_features(batch["images"])[0, 1:].mean(0))
    rows = torch.stack(rows)
    for name, value in measure_collapse(rows).items():
        assert found[name] == pytest.approx(value, rel=1e-4)
    asked = [place for place, image in enumerate(store.images) if image in photos.queries]
    bank = [place for place in range(len(rows)) if place not in asked]
    unit = F.normalize(rows.double(), dim=1)
    right = 0
    for place in asked:
        similarity = unit[bank] @ unit[place]
        votes: dict[int, float] = {}
        for near in similarity.argsort(descending=True)[:20].tolist():
            breed = photos.breeds[store.images[bank[near]]]
            votes[breed] = votes.get(breed, 0.0) + float((similarity[near] / 0.07).exp())
        right += max(votes, key=votes.get) == photos.breeds[store.images[place]]
    assert found["knn"] == pytest.approx(right / len(asked))


def test_batches_of_another_size_give_the_same_numbers(store, photos, encoder):
    assert measured(store, photos, encoder, 5) == pytest.approx(measured(store, photos, encoder, 38), rel=1e-3)


def test_features_that_are_all_the_same_are_shown(store, photos, encoder):
    healthy = measured(store, photos, encoder)
    with torch.no_grad():
        encoder.norm.weight.zero_()
        encoder.norm.bias.fill_(0.3)
    collapsed = measured(store, photos, encoder)
    for kind in ("", "token_"):
        assert collapsed[f"{kind}spread"] < 1e-3 < 0.05 < healthy[f"{kind}spread"]
        assert collapsed[f"{kind}rank"] == pytest.approx(1, abs=1e-3)
        assert healthy[f"{kind}rank"] > 2


def test_features_on_a_line_have_a_spread_but_no_rank(store, photos, encoder):
    """Features may differ and still say one thing alone: the rank tells."""
    with torch.no_grad():
        direction = torch.randn(encoder.embed_dim)
        features = encoder.forward_features

        def on_a_line(images):
            return features(images)[..., :1] * direction

        encoder.forward_features = on_a_line
        found = measured(store, photos, encoder)
    assert found["rank"] == pytest.approx(1, abs=1e-3)


def test_an_unreadable_photo_takes_its_breed_along(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_UNREADABLE", 0.1)
    root = tmp_path / "data"
    shutil.copytree(drawn_root(tmp_path_factory), root)
    whole = MeterPhotos.of_pets(root)
    (root / whole.images[0]).write_bytes(b"no photo")
    store = open_store(root, whole.images, tmp_path / "cache")
    assert store.images == whole.images[1:]
    meter = Meter(store, whole, batches_of(4), CPU)
    assert meter.breeds.tolist() == [whole.breeds[image] for image in whole.images[1:]]
    assert meter.asked.sum() == len(whole.queries)


def test_a_stop_request_ends_the_measurement(store, photos, encoder):
    assert Meter(store, photos, batches_of(4), CPU).measure(encoder, lambda: True) is None


def test_without_pets_held_out_images_are_measured_and_no_breeds_asked(tmp_path_factory, tmp_path):
    images = drawn_root(tmp_path_factory) / "oxford-iiit-pet" / "images"
    flags = ["--images", images, "--data_root", tmp_path / "nothing", "--cache_dir", tmp_path / "cache"]
    words = [str(word) for word in (*SMALL, *flags, "--model", "mae_tiny", "--meters")]
    objective = pretrain.MaskedPixels(pretrain.get_args_parser().parse_args(words), CPU)
    assert set(objective.scores) == {"loss_held_out", *COLLAPSE_SCORES}
    assert set(objective.meter_photos.images) == set(objective.held_out["held_out"].images)
    assert objective.meter_root is None


def test_meters_are_logged_at_each_validation_and_change_no_weight(tmp_path_factory, tmp_path):
    flags = [*SMALL, "--data_root", drawn_root(tmp_path_factory), "--cache_dir", tmp_path / "cache"]
    flags += ["--model", "mae_tiny", "--epochs", 2, "--batch_size", 8]
    run("pretrain", *flags, "--output_dir", tmp_path / "plain")
    run("pretrain", *flags, "--meters", "--output_dir", tmp_path / "measured")
    plain, shown = (torch.load(tmp_path / name / "model.pt")["model"] for name in ("plain", "measured"))
    assert all(torch.equal(plain[key], shown[key]) for key in plain)
    lines = log(tmp_path / "measured", "val")
    assert len(lines) == 2
    for line in lines:
        assert {*COLLAPSE_SCORES, *KNN_SCORES, "loss_animal"} <= set(line)
        assert np.isfinite([line[name] for name in COLLAPSE_SCORES]).all()
    config = json.loads((tmp_path / "measured/config.json").read_text())
    assert config["scores"]["knn"] == "20-NN accuracy of breeds, Pets validation"
    assert "meters" not in config["experiment"]
