"""Fitted lines of sweeps: least squares as scipy's, intervals that cover the truth, and what figure and tables say."""

import json
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from study_folder import counts, write_study

import figures
from arms import ANIMAL_FRACTION, LABEL_FRACTION
from metrics import bootstrap, line_weights, scores, t_interval
from report import get_args_parser, main
from slopes import fit_sweep, over_seeds, reason_against

DOSES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
DRAWING = ("forest", "curve_panels", "image_grid", "bands", "scatter")
NUMBERS = st.floats(-100, 100).map(lambda value: round(value, 3))


def run_of(seed, iou, ids=("a",), pixels=None):
    """A tested run with this score."""
    return SimpleNamespace(seed=seed, iou=iou, test={"ids": np.array(ids), "counts": pixels})


def runs_of(score, doses, seeds):
    """Runs whose score is a function of dose and seed."""
    return {dose: [run_of(seed, score(dose, seed)) for seed in seeds] for dose in doses}


def scored_runs(rng, doses, seeds, n=60):
    """Runs with pixel counts of n images that get better with the dose."""
    found = {}
    for dose in doses:
        found[dose] = []
        for seed in seeds:
            pixels = counts(rng, n, 0.7 + 0.1 * dose)
            iou = float(scores(pixels.sum(0))["iou"])
            found[dose].append(run_of(seed, iou, [f"i{k}" for k in range(n)], pixels))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Least squares


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=12, unique_by=lambda point: point[0]))
def test_the_line_is_scipys(points):
    x, y = np.array(points).T
    theirs = scipy.stats.linregress(x, y)
    size = max(1, np.abs(y).max()) * (1 + np.abs(x).max() / np.std(x)) / min(1, np.std(x))
    assert line_weights(x) @ y == pytest.approx([theirs.intercept, theirs.slope], abs=1e-10 * size)


@pytest.mark.parametrize("x", [[1.0], [2.0, 2.0, 2.0]])
def test_one_place_has_no_line(x):
    with pytest.raises(ValueError, match="two places"):
        line_weights(x)


def test_a_score_that_is_straight_in_the_dose_has_its_slope_and_no_misfit():
    fit = fit_sweep(ANIMAL_FRACTION, runs_of(lambda dose, seed: 0.7 + 0.02 * dose + 0.001 * seed, DOSES, (0, 1, 2)))
    assert fit.slope == pytest.approx((0.2, 0.2, 0.2), abs=1e-9) and fit.step == "10 % more animals"
    assert fit.misfit == pytest.approx(0, abs=1e-9) and fit.each == pytest.approx([0.2, 0.2, 0.2])
    assert (fit.shares[0], fit.shares[-1]) == (0, 100)
    assert fit.line.value == pytest.approx(0.701 + 0.02 * fit.shares / 100)


def test_a_score_that_gains_a_point_with_each_doubling_of_the_labels_has_slope_one():
    shares = (0.05, 0.1, 0.25, 0.5, 1.0)
    fit = fit_sweep(LABEL_FRACTION, runs_of(lambda share, seed: 0.8 + 0.01 * math.log2(share), shares, (0, 1, 2)))
    assert fit.slope.value == pytest.approx(1) and fit.step == "each doubling of the labels"
    assert fit.line.value[0] == pytest.approx(0.8 + 0.01 * math.log2(0.05)) and fit.line.value[-1] == pytest.approx(0.8)


def test_the_misfit_is_the_distance_of_the_farthest_dose_from_the_line():
    fit = fit_sweep(ANIMAL_FRACTION, runs_of(lambda dose, seed: 0.7 + 0.03 * (dose == 0.5), (0.0, 0.5, 1.0), (0, 1, 2)))
    assert fit.slope.value == pytest.approx(0) and fit.misfit == pytest.approx(2)  # the mean is 1 above the ends


def test_the_slope_over_seeds_is_the_t_interval_of_each_seeds_slope():
    rng = np.random.default_rng(3)
    noise = dict(zip([(dose, seed) for dose in DOSES for seed in range(4)], rng.normal(0, 0.01, 28), strict=True))
    runs = runs_of(lambda dose, seed: 0.7 + noise[dose, seed], DOSES, range(4))
    fit = fit_sweep(ANIMAL_FRACTION, runs)
    each = [scipy.stats.linregress(np.array(DOSES) * 10, [100 * runs[d][k].iou for d in DOSES]).slope for k in range(4)]
    assert fit.interval == "t over seeds" and fit.each == pytest.approx(each)
    assert fit.slope == pytest.approx(tuple(t_interval(each)))
    middle = [np.polyval(np.polyfit(DOSES, [runs[d][k].iou for d in DOSES], 1), 0.5) for k in range(4)]
    place = list(fit.shares).index(50)
    band = [fit.line.value[place], fit.line.low[place], fit.line.high[place]]
    assert band == pytest.approx(list(t_interval(middle)))


def test_with_one_seed_the_interval_is_the_bootstrap_over_images():
    runs = scored_runs(np.random.default_rng(1), (0.0, 0.5, 1.0), (4,))
    fit = fit_sweep(ANIMAL_FRACTION, runs)
    assert fit.interval == "bootstrap over images" and fit.seeds == [4] and fit.each == pytest.approx([fit.slope.value])

    rng = np.random.default_rng(8)
    slopes = []
    for _ in range(1000):
        picks = rng.integers(0, 60, 60)  # the same images for every run
        iou = [scores(run.test["counts"][picks].sum(0))["iou"] for [run] in runs.values()]
        slopes.append(100 * np.polyfit([0, 5, 10], iou, 1)[0])
    low, high = np.quantile(slopes, [0.025, 0.975])
    assert (fit.slope.low, fit.slope.high) == pytest.approx((low, high), abs=0.12 * (high - low))


def test_two_seeds_that_disagree_have_the_wide_interval_of_two_seeds():
    fit = fit_sweep(ANIMAL_FRACTION, runs_of(lambda dose, seed: 0.7 + 0.02 * dose * seed, (0.0, 0.5, 1.0), (0, 1)))
    assert fit.each == pytest.approx([0, 0.2]) and fit.interval == "t over seeds"
    assert fit.slope == pytest.approx(tuple(t_interval([0, 0.2]))) and fit.slope.low < -1 < 1 < fit.slope.high


# ----------------------------------------------------------------------------------------------------------------------
# Coverage


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_over_seeds_covers_the_true_slope_as_often_as_it_says(seeds):
    rng = np.random.default_rng(seeds)
    doses = np.array(DOSES)
    weights = line_weights(doses)[1:]
    covered = []
    for _ in range(2500):
        level = rng.normal(0.75, 0.02, (seeds, 1))  # of a seed at all doses
        iou = level + 0.02 * doses + rng.normal(0, 0.01, (seeds, len(doses)))
        found = over_seeds([[SimpleNamespace(iou=value) for value in row] for row in iou], weights)
        covered.append(found.low[0] <= 0.02 <= found.high[0])
    assert abs(np.mean(covered) - 0.95) < 0.02


def test_the_bootstrap_covers_the_true_slope_as_often_as_it_says():
    weights = line_weights([0, 1, 2])[1:]

    def draw(rng, n, trials):
        """Counts [n, trials, 3, 3, 3] of images that are hard or easy at all doses."""
        share = rng.beta(4, 6, (n, trials, 1))
        right = 0.75 + 0.02 * np.arange(3) + rng.normal(0, 0.05, (n, trials, 1)) + rng.normal(0, 0.03, (n, trials, 3))
        right = np.clip(right, 0.2, 0.99)[..., None, None]
        truth = np.stack([0.85 * share, 1 - share, 0.15 * share], -1)[..., None] * 10_000
        return truth * (right * np.eye(3) + (1 - right) / 2 * (1 - np.eye(3)))

    def slope(sums):
        return (scores(sums)["iou"] @ weights.T)[..., 0]

    truth = float(slope(draw(np.random.default_rng(90), 200_000, 1).sum(0))[0])
    rng = np.random.default_rng(4)
    covered = []
    for seed in range(4):
        _, low, high = bootstrap(draw(rng, 150, 300), slope, resamples=600, seed=seed)
        covered.append((low <= truth) & (truth <= high))
    assert abs(np.mean(covered) - 0.95) < 0.025


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be fitted


def test_two_doses_have_no_line_and_a_seed_that_lacks_a_dose_does_not_count():
    runs = runs_of(lambda dose, seed: 0.7 + dose / 100, (0.0, 0.5, 1.0), (0, 1, 2, 3))
    runs[0.5] = runs[0.5][1:]
    assert fit_sweep(ANIMAL_FRACTION, runs).seeds == [1, 2, 3]
    assert fit_sweep(ANIMAL_FRACTION, {dose: runs[dose] for dose in (0.0, 1.0)}) is None
    assert reason_against({dose: runs[dose] for dose in (0.0, 1.0)}) == "2 doses, and a line takes 3"
    runs[0.5] = [run_of(7, 0.7)]
    assert fit_sweep(ANIMAL_FRACTION, runs) is None and reason_against(runs) == "no seed has a run at every dose"


def test_runs_of_different_test_images_have_a_slope_and_no_interval():
    runs = scored_runs(np.random.default_rng(5), (0.0, 0.5, 1.0), (0,))
    runs[0.5][0].test["ids"] = runs[0.5][0].test["ids"][::-1]
    fit = fit_sweep(ANIMAL_FRACTION, runs)
    assert math.isfinite(fit.slope.value) and math.isnan(fit.slope.low) and "different images" in fit.interval
    assert "[" not in fit.drawing("mixtures").label


# ----------------------------------------------------------------------------------------------------------------------
# The report


def report(study):
    """Make the report -> its text and the lines of each sweep's figure."""
    drawn = {}

    def draw_nothing(path, *args, **_):
        drawn[path.stem] = args
        Image.new("RGB", (1, 1)).save(path)

    with mock.patch.multiple(figures, **dict.fromkeys(DRAWING, draw_nothing)):
        main(get_args_parser().parse_args([str(study)]))
    return (study / "report/report.md").read_text(), {
        name: drawn[name][0] for name in ("dose", "labels") if name in drawn
    }


def table(study, name):
    return json.loads((study / f"report/{name}.json").read_text())


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """A study of three seeds with both sweeps."""
    folder = tmp_path_factory.mktemp("sweeps") / "study"
    return write_study(folder, seeds=(0, 1, 2), sweeps=("animal_fraction", "label_fraction"), n=25, epochs=2)


def test_the_report_shows_each_slope_beside_the_points(sweeps):
    text, drawn = report(sweeps)
    [row] = table(sweeps, "dose_slope")
    points = table(sweeps, "dose")
    line = scipy.stats.linregress([point["share"] / 10 for point in points], [100 * point["iou"] for point in points])
    assert row["slope"] == pytest.approx(line.slope) and row["slope_low"] < row["slope"] < row["slope_high"]
    assert (row["seeds"], row["doses"], row["step"]) == (3, 7, "10 % more animals")
    assert "in points of IoU for 10 % more animals. Interval: 95 %, Student's t over seeds." in text
    [curve] = drawn["dose"]
    assert curve.fit.label == f"line, mixtures: {limits(row)} points for 10 % more animals"
    assert len(curve.fit.iou) == len(curve.fit.low) == len(curve.fit.high) == len(curve.fit.shares)

    rows = table(sweeps, "labels_slope")
    assert [row["arm"] for row in rows] == [curve.label for curve in drawn["labels"]] and len(rows) == 4
    for row in rows:
        points = [point for point in table(sweeps, "labels") if point["arm"] == row["arm"]]
        dose = np.log2([point["share"] for point in points])
        line = scipy.stats.linregress(dose, [100 * point["iou"] for point in points])
        assert row["slope"] == pytest.approx(line.slope) and row["doses"] == 5
    assert "for each doubling of the labels. Interval: 95 %, Student's t over seeds." in text


def limits(row):
    return f"{row['slope']:+.2f} [{row['slope_low']:+.2f}, {row['slope_high']:+.2f}]"


def test_one_seed_has_the_interval_over_images_and_says_what_it_does_not_know(tmp_path):
    study = write_study(tmp_path / "study", seeds=(0,), sweeps=("animal_fraction",), n=25, epochs=2)
    text, _ = report(study)
    [row] = table(study, "dose_slope")
    assert row["interval"] == "bootstrap over images" and row["slope_low"] < row["slope"] < row["slope_high"]
    assert "with one seed the bootstrap over test images" in text and "nan" not in text


def test_a_seed_that_lacks_a_dose_is_named_beside_the_slope(tmp_path):
    study = write_study(tmp_path / "study", seeds=(0, 1, 2, 3), sweeps=("animal_fraction",), n=25, epochs=2)
    (study / "seed1/finetune_dose_0.25/metrics.json").unlink()
    report(study)
    [row] = table(study, "dose_slope")
    assert row["seeds"] == 3 and row["note"] == "without seed 1 (not at every dose)"


def test_a_sweep_of_two_doses_says_that_it_has_no_line(tmp_path):
    study = write_study(tmp_path / "study", seeds=(0,), n=25, epochs=2, sweeps=("animal_fraction",))
    for path in study.glob("seed0/finetune_*/metrics.json"):
        if path.parent.name not in ("finetune_animal", "finetune_dose_0.1"):
            path.unlink()
    text, drawn = report(study)
    [row] = table(study, "dose_slope")
    assert row["note"] == "2 doses, and a line takes 3" and "slope" not in row and drawn["dose"][0].fit is None
    assert "2 doses, and a line takes 3" in text and "Slope of the least-squares line" not in text
