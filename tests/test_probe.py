"""probe.py sees no test image before its last choice, never mixes up labels, and trusts no stale or damaged file."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_runs import IMG, drawn_root, mae_checkpoint, refusal, run

import data
import features
import probe
import probes
import splits
from engine import Distributed, Precision
from models import build_mae, build_segmenter, build_vit
from objective import TestSetting
from probe_records import PROBES, Probed, load_probe, random_folder
from segmentation import confusion

CPU = torch.device("cpu")
FEW = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Fit roughly: what is tested here is the same after few steps as at the minimum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "STRENGTHS", (1.0, 1e-2))
        patch.setattr(probes, "MOST_STEPS", 6)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return drawn_root(tmp_path_factory)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def flags(root, cache):
    return ["--data_root", root, "--cache_dir", cache, "--device", "cpu"]


def setting_of(root, cache) -> TestSetting:
    return TestSetting(str(root), str(cache), 16, Distributed(0, 0, 1, CPU), Precision("fp32", CPU), {})


@pytest.fixture(scope="module")
def made(flags, tmp_path_factory):
    """The folder of a checkpoint, probed with the random encoder beside it."""
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    folder.mkdir()
    shutil.copy(mae_checkpoint(tmp_path_factory), folder / "model.pt")
    text = run("probe", folder, "--random", *flags)
    return folder, text


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the probed folder."""
    return shutil.copytree(made[0], tmp_path / "pretrain")


# -- Collapse ------------------------------------------------------------------------------------------------------------


def test_the_probes_of_a_collapsed_encoder_know_the_most_frequent_breed_at_best(root, cache, tmp_path):
    network = build_vit("mae_tiny", img_size=IMG)
    torch.nn.init.zeros_(network.norm.weight)
    torch.nn.init.ones_(network.norm.bias)
    config = {"kind": "vit", "name": "mae_tiny", "img_size": IMG}
    torch.save({"model": network.state_dict(), "model_config": config}, tmp_path / "model.pt")
    run("probe", tmp_path, "--data_root", root, "--cache_dir", cache, "--device", "cpu")
    record = load_probe(tmp_path).record
    for rows in ("images", "patches"):
        assert record["meters"][rows] == pytest.approx({"spread": 0, "rank": 1}, abs=1e-6)
    breeds = set(splits.pets_breeds(root).values())
    assert record["scores"]["linear"]["per_class"] <= 1 / len(breeds - missing_in_test(root)) + 1e-9


def missing_in_test(root) -> set[int]:
    breeds = splits.pets_breeds(root)
    return set(breeds.values()) - {breeds[image] for image in splits.pets_split(root, "test").images}


# -- Trimaps ------------------------------------------------------------------------------------------------------------


@FEW
@given(st.integers(1, 3), st.sampled_from([(1, 1), (2, 2), (4, 4), (2, 4)]), st.integers(0, 2**32))
def test_shares_of_patches_equal_counting_their_pixels(count, grid, seed):
    truth = np.random.default_rng(seed).integers(0, 3, (count, 8, 8)).astype(np.uint8)
    found = probe.patch_shares(torch.from_numpy(truth), grid).reshape(count, *grid, 3)
    height, width = 8 // grid[0], 8 // grid[1]
    for image, row, column in np.ndindex(count, *grid):
        patch = truth[image, row * height : (row + 1) * height, column * width : (column + 1) * width]
        expected = [(patch == number).mean() for number in range(3)]
        assert found[image, row, column].tolist() == pytest.approx(expected)


def test_a_trimap_that_the_tokens_spell_out_is_found_exactly():
    coarse = torch.randint(0, 2, (40, 4, 4), generator=torch.Generator().manual_seed(0))
    truth = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2).byte()
    tokens = F.one_hot(coarse.flatten(1), 3).half()
    part = probe.Part(tokens.float().mean(1), tokens, torch.zeros(40, dtype=torch.int64), truth)
    asked = probe.ask_trimaps(probe.Material(part, part, 2, (4, 4)))
    centres = truth[:, 4::8, 4::8]
    counts = asked.count(part)
    assert counts.sum() == truth.numel()
    assert asked.validation > 0.75  # the enlarged logits round the corners of patches
    standard = probes.standardise(tokens.flatten(0, 1))
    targets = probe.patch_shares(truth, (4, 4))
    linear = probes.fit_linear(tokens.flatten(0, 1), targets, standard, 1e-3)
    assert torch.equal(linear(standard(tokens)).argmax(2).reshape(40, 4, 4), centres.long())


# -- Labels -------------------------------------------------------------------------------------------------------------


def test_breeds_are_numbered_by_their_class_ids(root):
    breeds = splits.pets_breeds(root)
    entries = splits.read_pets_list(root)
    ids = sorted({entry.class_id for entry in entries})
    assert len(breeds) == len(entries)
    for entry in entries:
        assert ids[breeds[f"oxford-iiit-pet/images/{entry.name}.jpg"]] == entry.class_id


@pytest.mark.parametrize("part", splits.PETS_PARTS)
def test_a_photo_that_cannot_be_read_shifts_no_label(part, root, tmp_path, monkeypatch):
    damaged_root = shutil.copytree(root, tmp_path / "data")
    lost = splits.pets_split(root, part).images[1]
    (damaged_root / lost).write_bytes(b"no photo")
    monkeypatch.setattr(data, "MAX_UNREADABLE", 0.1)
    pets = features.open_pets(setting_of(damaged_root, tmp_path / "cache"), IMG)
    breeds = splits.pets_breeds(root)
    assert pets.store.dropped == [lost] and lost not in pets.images
    assert pets.labels.tolist() == [breeds[image] for image in pets.images]
    for image, truth in zip(pets.images, pets.truth, strict=True):
        trimap = Image.open(root / data.trimap_path(image)).resize((IMG, IMG), Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(trimap) - 1, truth)
    for name, places in pets.parts.items():
        expected = [image for image in splits.pets_split(root, name).images if image != lost]
        assert [pets.images[place] for place in places.tolist()] == expected


# -- Encoders -----------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_network_one_image_at_a_time(made, root, cache):
    folder, _ = made
    encoder = features.load_encoder(folder / "model.pt")
    with np.load(folder / features.ARRAYS) as arrays:
        kept = dict(arrays)
    store = features.open_pets(setting_of(root, cache), IMG).store
    for place in (0, 17, len(store) - 1):
        pixels = store.gather([place]).float()
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        with torch.no_grad():
            tokens = encoder.network.forward_features((pixels / 255 - mean) / std)[0]
        assert np.allclose(kept["mean"][place], tokens[1:].mean(0), atol=1e-4)
        assert np.allclose(kept["cls"][place], tokens[0], atol=1e-4)
        assert np.allclose(kept["tokens"][place], tokens[1:], atol=5e-3)


@pytest.mark.parametrize("kind", ["mae", "segmenter", "encoder of another project"])
def test_the_same_encoder_is_found_in_every_checkpoint(kind, made, flags, tmp_path):
    content = torch.load(made[0] / "model.pt", weights_only=True)
    state = content["model"]
    config = content["model_config"]
    path = tmp_path / "other.pth"
    if kind == "segmenter":
        segmenter = build_segmenter("mae_tiny", img_size=IMG)
        state = {**segmenter.state_dict(), **{key: state[key] for key in build_vit("mae_tiny").state_dict()}}
        config = {**config, "kind": "segmenter"}
    if kind.startswith("encoder"):
        torch.save({"model": {key: state[key] for key in build_vit("mae_tiny").state_dict()}}, path)
    else:
        torch.save({"model": state, "model_config": config}, path)
    run("probe", path, "--model mae_tiny", "--img_size", IMG, *flags)
    assert load_probe(tmp_path / "other_probe").record["scores"] == load_probe(made[0]).record["scores"]


def test_the_random_encoder_is_the_one_that_pre_training_begins_with():
    torch.manual_seed(3)
    expected = build_mae("mae_tiny", img_size=IMG).state_dict()
    found = features.random_encoder("mae_tiny", IMG, 3)
    assert all(torch.equal(found.network.state_dict()[key], value) for key, value in expected.items())
    assert found.weights == features.random_encoder("mae_tiny", IMG, 3).weights
    assert found.weights != features.random_encoder("mae_tiny", IMG, 4).weights


def test_resnet50_is_asked_too_but_has_no_class_token(flags, tmp_path):
    torch.manual_seed(0)
    config = {"kind": "segmenter", "name": "resnet50", "img_size": 32}
    weights = build_segmenter("resnet50", img_size=32).state_dict()
    torch.save({"model": weights, "model_config": config}, tmp_path / "model.pt")
    run("probe", tmp_path, *flags)
    probed = load_probe(tmp_path)
    assert probed.record["model"] == "resnet50"
    assert probed.arrays["counts"].sum() == len(probed.arrays["ids"]) * 32**2
    assert "has no class token" in refusal("probe", tmp_path, *flags, "--pool cls")


# -- Records ------------------------------------------------------------------------------------------------------------


def test_a_probe_leaves_scores_of_each_test_image_and_a_table(made, root):
    folder, text = made
    beside = random_folder(folder, "mae_tiny", IMG, 0)
    for place in (folder, beside):
        probed = load_probe(place)
        record = probed.record
        assert sorted(probed.arrays["ids"]) == sorted(
            image.split("/")[-1][:-4] for image in splits.pets_split(root, "test").images
        )
        for name in PROBES:
            if name == "trimap":
                assert probed.score(name) == pytest.approx(record["scores"][name]["iou"])
            else:
                assert probed.score(name) == pytest.approx(record["scores"][name]["top1"])
        assert len(record["scores"]["shot_5"]["draws"]) == 5
        assert record["photos"] == {"train": 32, "val": 6, "test": 8}
        assert str(place) in text
    assert load_probe(beside).record["random"] is True
    strict = (folder / "probe.json").read_text()
    json.loads(strict, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_per_class_accuracy_is_the_mean_over_the_breeds_of_the_test_images(made):
    probed = load_probe(made[0])
    right = probed.sums("linear")[:, 0]
    labels = probed.arrays["labels"]
    expected = np.mean([right[labels == number].mean() for number in np.unique(labels)])
    assert probed.record["scores"]["linear"]["per_class"] == pytest.approx(expected)


def test_a_second_probe_does_nothing_and_an_ordered_one_finds_the_same(folder, flags):
    before = load_probe(folder)
    assert "nothing to do" in run("probe", folder, *flags)
    run("probe", folder, *flags, "--again", "--batch_size", 5)
    after = load_probe(folder)
    assert after.record["scores"]["knn"] == before.record["scores"]["knn"]
    for name in PROBES:
        assert after.score(name) == pytest.approx(before.score(name), abs=1e-3)


def test_no_choice_depends_on_the_test_images(folder, flags, root, cache, monkeypatch):
    before = load_probe(folder).record
    true_open = features.open_pets

    def open_with_false_tests(setting, size):
        pets = true_open(setting, size)
        test = pets.parts["test"]
        pets.labels[test] = 0
        pets.truth[test] = 1
        return pets

    monkeypatch.setattr(probe, "open_pets", open_with_false_tests)
    run("probe", folder, *flags)
    after = load_probe(folder).record
    for name, scores in after["scores"].items():
        for choice in ("strength", "validation_top1", "validation_iou"):
            assert scores.get(choice) == before["scores"][name].get(choice)
    assert after["scores"]["trimap"]["iou"] == 0 != before["scores"]["trimap"]["iou"]
    assert after["meters"] == before["meters"]


def counted(monkeypatch) -> list:
    """Count how often features are computed."""
    calls = []
    true_compute = features.compute_features

    def compute(*arguments):
        calls.append(arguments)
        return true_compute(*arguments)

    monkeypatch.setattr(features, "compute_features", compute)
    return calls


def test_features_are_computed_once(folder, flags, monkeypatch):
    calls = counted(monkeypatch)
    run("probe", folder, *flags, "--again")
    run("probe", folder, *flags, "--pool", "cls")
    assert not calls
    assert load_probe(folder, "cls").record["key"]["pool"] == "cls"
    assert load_probe(folder).record["key"]["pool"] == "mean"


def flip_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_weights(folder) -> None:
    content = torch.load(folder / "model.pt", weights_only=True)
    content["model"]["norm.bias"] += 0.5
    torch.save(content, folder / "model.pt")


def other_record(folder) -> None:
    record = json.loads((folder / features.RECORD).read_text())
    record["key"]["images"] = "others"
    (folder / features.RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: flip_bit(folder / features.ARRAYS),
        lambda folder: flip_bit(folder / features.RECORD),
        lambda folder: (folder / features.ARRAYS).unlink(),
        other_weights,
        other_record,
    ],
    ids=["bit of the arrays", "bit of the record", "no arrays", "weights", "images"],
)
def test_stale_or_damaged_features_are_computed_anew(spoil, folder, flags, monkeypatch):
    before = load_probe(folder).record["scores"]
    spoil(folder)
    calls = counted(monkeypatch)
    run("probe", folder, *flags, "--again")
    assert len(calls) == 1
    assert (load_probe(folder).record["scores"] == before) == (spoil is not other_weights)


@pytest.mark.parametrize("file", ["probe.json", "probe.npz"])
def test_damaged_records_are_made_anew(file, folder, flags):
    before = load_probe(folder).record
    flip_bit(folder / file)
    assert "nothing to do" not in run("probe", folder, *flags)
    assert load_probe(folder).record == before


# -- Wrong use ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_probed_is_refused_in_one_line(root, flags, tmp_path, made):
    assert "it is not a finished run" in refusal("probe", tmp_path, *flags)
    assert "does not exist" in refusal("probe", tmp_path / "none.pth", *flags)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "has no layer in common" in refusal("probe", tmp_path / "other.pt", "--model mae_tiny", *flags)
    assert "not divisible by patch_size" in refusal("probe", tmp_path / "other.pt", "--img_size 50", *flags)
    broken = features.load_encoder(made[0] / "model.pt").network
    torch.nn.init.constant_(broken.norm.bias, float("nan"))
    config = {"kind": "mae", "name": "mae_tiny", "img_size": IMG}
    torch.save({"model": broken.state_dict(), "model_config": config}, tmp_path / "model.pt")
    assert "are not finite" in refusal("probe", tmp_path, *flags)
    assert not list(tmp_path.glob("**/probe*"))


def test_pets_of_one_breed_are_refused(root, flags, made, tmp_path):
    one = shutil.copytree(root, tmp_path / "data")
    path = one / "oxford-iiit-pet/annotations/list.txt"
    path.write_text(re.sub(r"^(\S+) \d+ ", r"\1 5 ", path.read_text(), flags=re.MULTILINE))
    message = refusal("probe", made[0], *flags, "--data_root", one)
    assert "are of one breed" in message


def test_test_pixels_are_counted_as_in_segmentation():
    truth = torch.randint(0, 3, (2, 8, 8))
    arrays = {"counts": confusion(truth, truth).numpy()}
    assert Probed({}, arrays).score("trimap") == 1
