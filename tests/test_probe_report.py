"""The report shows what frozen encoders know beside random ones, with intervals, and names the probes that are missing."""

import json
import shutil
import subprocess
from unittest import mock

import numpy as np
import pytest
from fake_study import ROOT, environment
from study_folder import counts, write_study
from test_report import draw_nothing, edit, report, table

import figures
from engine import hash_file, write_json
from groups import Study
from metrics import paired_bootstrap, t_interval
from probe_records import PROBES, load_probe, random_folder
from probe_results import read_probes
from records import check_file

IMAGES = 60
BREEDS = [name for name in PROBES if name != "trimap"]


def write_probe(folder, quality: float, seed: int, **key) -> None:
    """Write the records of an encoder as probe.py does."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng([seed, *map(ord, folder.name)])
    right = (rng.random((IMAGES, len(BREEDS))) < quality).astype(float)
    pixels = counts(rng, IMAGES, quality)
    np.savez(
        folder / "probe.npz",
        ids=np.array([f"cat_{number}" for number in range(IMAGES)]),
        labels=np.arange(IMAGES) % 5,
        score_names=np.array(BREEDS),
        numerators=right,
        denominators=np.ones_like(right),
        counts=pixels,
    )
    scores = {name: {"top1": right[:, place].mean(), "std": 0.02} for place, name in enumerate(BREEDS)}
    record = {
        "key": {"weights": "w", "images": "i", "precision": "fp32", "pool": "mean", **key},
        "model": "mae_tiny",
        "img_size": 128,
        "most_frequent_breed": 0.25,
        "scores": {**scores, "trimap": {"iou": 0.5}},
        "meters": {"images": {"spread": quality, "rank": 9.5}},
    }
    write_json(folder / "probe.json", {**record, "files": {"probe.npz": hash_file(folder / "probe.npz")}})


def write_probes(study, seeds) -> None:
    """Probe all pre-trainings of a study, and a random encoder of each seed."""
    for seed in seeds:
        for folder in sorted((study / f"seed{seed}").glob("pretrain_*")):
            write_probe(folder, 0.8, seed)
        write_probe(random_of(study, seed), 0.5, seed)


def random_of(study, seed: int):
    return random_folder(study / f"seed{seed}/pretrain_animal", "mae_tiny", 128, seed)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("small") / "study", n=40, epochs=3)


@pytest.fixture
def study(small, tmp_path):
    """A fresh copy of a study of two seeds whose pre-trainings are probed."""
    copy = shutil.copytree(small, tmp_path / "study")
    write_probes(copy, (0, 1))
    return copy


def row(rows, encoder):
    return next(found for found in rows if found["encoder"] == encoder)


def make_report(study, draw=False) -> str:
    if draw:
        return report(study, draw=True)
    with mock.patch.object(figures, "dot_panels", draw_nothing):
        return report(study)


def test_a_study_without_probes_has_no_section_and_misses_none(small, tmp_path):
    copy = shutil.copytree(small, tmp_path / "study")
    assert read_probes(Study(copy)) is None
    text = make_report(copy)
    assert "frozen" not in text and "probe" not in text


def test_scores_are_means_over_seeds_with_the_random_encoder_first(study):
    text = make_report(study, draw=True)
    assert "## What frozen features know" in text
    rows = table_of(study, "probes")
    assert [found["encoder"] for found in rows] == ["random weights", "animals", "non-animals", "mixed"]
    for name in PROBES:
        values = [load_probe(study / f"seed{seed}/pretrain_animal").score(name) for seed in (0, 1)]
        mean, low, high = t_interval(values)
        found = row(rows, "animals")
        assert [found[name], found[f"{name}_low"], found[f"{name}_high"]] == pytest.approx(
            [mean, max(0, low), min(1, high)]
        )
    assert row(rows, "animals")["rank"] == 9.5
    assert (study / "report/probes.png").stat().st_size > 20_000
    assert "Standard deviation over the draws of few shots: 2.0 points (1)" in text
    assert "Always naming the most frequent breed is right for 0.250" in text


def table_of(study, name):
    return json.loads((study / f"report/{name}.json").read_text())


def test_differences_are_paired_with_the_random_encoder_of_the_seed(study):
    make_report(study)
    found = row(table(study, "probe_differences"), "mixed")
    each = []
    for seed in (0, 1):
        trained = load_probe(study / f"seed{seed}/pretrain_mixed").score("linear")
        each.append(100 * (trained - load_probe(random_of(study, seed)).score("linear")))
    assert [found["linear"], found["linear_low"], found["linear_high"]] == pytest.approx(list(t_interval(each)))


def test_one_seed_has_the_paired_bootstrap_over_test_images(tmp_path):
    study = write_study(tmp_path / "study", seeds=(0,), n=40, epochs=3)
    write_probes(study, (0,))
    text = make_report(study)
    found = row(table(study, "probe_differences"), "animals")
    trained = load_probe(study / "seed0/pretrain_animal").sums("knn")
    random = load_probe(random_of(study, 0)).sums("knn")
    expected = paired_bootstrap(trained, random, lambda sums: sums[..., 0] / sums[..., 1])
    limits = [found["knn"], found["knn_low"], found["knn_high"]]
    assert limits == pytest.approx([100 * float(value) for value in expected])
    assert found["knn_low"] > 0 and "20-NN 3 of 3" in text


def test_missing_probes_are_named_and_the_others_shown(study):
    (study / "seed0/pretrain_mixed/probe.json").unlink()
    (study / "seed1/pretrain_animal/probe.npz").write_bytes(b"damaged")
    shutil.rmtree(random_of(study, 1))
    text = make_report(study)
    assert "`seed0/pretrain_mixed` is not probed (python probe.py" in text
    assert "the probe of `seed1/pretrain_animal` is unreadable: probe.npz was changed" in text
    assert text.count("the yardstick of seed 1, is not probed") == 1
    rows = table_of(study, "probes")
    assert {found["encoder"]: found["seeds"] for found in rows} == {
        "random weights": 1,
        "animals": 1,
        "non-animals": 2,
        "mixed": 1,
    }
    compared = {found["encoder"]: found["seeds"] for found in table_of(study, "probe_differences")}
    assert compared == {"animals": 1, "non-animals": 1}


def test_probes_of_other_weights_or_other_photos_are_not_shown(study):
    edit(study / "seed0/pretrain_animal/metrics.json", lambda metrics: metrics.update(files={"model.pt": "new"}))
    write_probe(study / "seed1/pretrain_mixed", 0.8, 1, images="others")
    with mock.patch("records.check_file", lambda path, files: check_file(path, {})):
        text = make_report(study)
    assert "the probe of `seed0/pretrain_animal` is of other weights" in text
    assert "`seed1/pretrain_mixed` was probed on other photos" in text
    rows = table_of(study, "probes")
    assert (row(rows, "animals")["seeds"], row(rows, "mixed")["seeds"]) == (1, 1)


def test_probes_are_a_stage_of_the_study_if_asked_for(tmp_path):
    command = ["bash", str(ROOT / "run_all.sh"), "--demo", "--gpus", "0", "--dry_run"]
    for words, number in ((["--probes"], 1), ([], 0)):
        done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("== probe: ") == number
        assert done.stdout.count("probe.py --data_root data/demo --cache_dir cache --device cpu --random") == number
