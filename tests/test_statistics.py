"""Student's t, tests and bootstrap agree with tables, with cases worked by hand and with their promised coverage."""

import math

import numpy as np
import pytest

from metrics import (
    Interval,
    bootstrap,
    detectable_difference,
    detectable_effect,
    holm,
    paired_bootstrap,
    paired_t_test,
    scores,
    t_cdf,
    t_interval,
    t_quantile,
    t_test_power,
    tost,
)


def iou(counts):
    return scores(counts)["iou"]


# 97.5 % quantiles as printed in tables.
TABLE = [(1, 12.706205), (2, 4.302653), (4, 2.776445), (9, 2.262157), (30, 2.042272), (1e7, 1.959964)]


@pytest.mark.parametrize(("df", "value"), TABLE)
def test_t_quantiles_are_those_of_the_tables(df, value):
    assert t_quantile(0.975, df) == pytest.approx(value, abs=2e-6)
    assert t_quantile(0.025, df) == pytest.approx(-value, abs=2e-6)


@pytest.mark.parametrize("t", [-30.0, -2.0, -0.3, -1e-9, 0.0, 0.4, 1.0, 3.0, 1e4])
def test_t_cdf_has_the_closed_forms_of_one_and_two_degrees_of_freedom(t):
    assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-12)
    assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)


def test_t_quantile_inverts_the_cdf_and_refuses_what_is_no_probability():
    for p in (1e-5, 0.2, 0.5, 0.9, 0.9999):
        assert t_cdf(t_quantile(p, 3.5), 3.5) == pytest.approx(p, rel=1e-9)
    with pytest.raises(ValueError, match="probability"):
        t_quantile(1.0, 3)


def test_the_t_interval_of_one_to_five_is_the_textbook_one():
    mean, low, high = t_interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-5)


def test_one_value_has_a_mean_and_no_interval():
    mean, low, high = t_interval([0.7])
    assert mean == 0.7 and math.isnan(low) and math.isnan(high)


def test_the_paired_t_test_agrees_with_a_case_worked_by_hand():
    # mean 2, standard deviation 1, n 3: t = 2 * sqrt(3), and with two degrees of freedom p has a closed form.
    t = 2 * math.sqrt(3)
    assert paired_t_test([1, 2, 3]) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert paired_t_test([0.0, 0.0]) == 1 and paired_t_test([1.0, 1.0]) == 0
    assert math.isnan(paired_t_test([1.0])) and math.isnan(paired_t_test([1.0, math.nan]))


def test_tost_agrees_with_a_case_worked_by_hand():
    # mean 0, standard error 1 / sqrt(3), margin 2: both sides have t = 2 sqrt(3) with two degrees of freedom.
    t = 2 * math.sqrt(3)
    assert tost([-1, 0, 1], 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)))
    assert tost([1, 2, 3], 2) == pytest.approx(0.5)  # the mean lies on the margin
    assert tost([4, 5, 6], 2) > 0.5 and math.isnan(tost([0.0], 2))
    assert tost([0.1, 0.1], 0.5) == 0 and tost([0.9, 0.9], 0.5) == 1


def test_holm_agrees_with_a_case_worked_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04, and never falling: 0.06 stays.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])


def test_holm_does_not_count_what_was_not_tested():
    assert holm([0.02, math.nan, 0.03]) == pytest.approx([0.04, math.nan, 0.04], nan_ok=True)
    assert holm([]).shape == (0,)


def test_the_t_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    for n in (2, 3, 5):
        intervals = np.array([t_interval(x) for x in rng.normal(0.7, 0.01, (2500, n))])
        covered = np.mean((intervals[:, 1] <= 0.7) & (intervals[:, 2] >= 0.7))
        assert abs(covered - 0.95) < 0.02


# The power of a paired t-test by adaptive quadrature with scipy 1.17, checked against statsmodels 0.15's TTestPower:
# pairs, smallest effect for (power 0.8, level 0.05), (0.9, 0.05) and (0.8, 0.01), power of the effect 0.8 at level 0.05.
REFERENCES = [
    (2, 11.5498884, 14.8241213, 57.6924617, 0.0788206145),
    (3, 3.26404355, 3.92344851, 7.3198923, 0.134885399),
    (5, 1.68199697, 1.96588882, 2.62897376, 0.280992064),
    (10, 0.996001371, 1.15456499, 1.33203211, 0.616232763),
    (30, 0.529235615, 0.612445495, 0.66220697, 0.98847524),
]


@pytest.mark.parametrize(("pairs", "usual", "powerful", "strict", "power"), REFERENCES)
def test_the_power_of_the_paired_t_test_agrees_with_reference_values(pairs, usual, powerful, strict, power):
    assert detectable_effect(pairs) == pytest.approx(usual, rel=1e-6)
    assert detectable_effect(pairs, power=0.9) == pytest.approx(powerful, rel=1e-6)
    assert detectable_effect(pairs, level=0.01) == pytest.approx(strict, rel=1e-6)
    assert t_test_power(0.8, pairs) == pytest.approx(power, rel=1e-6)
    assert t_test_power(-0.8, pairs) == pytest.approx(power, rel=1e-6)


@pytest.mark.parametrize("pairs", [2, 3, 10, 1000])
@pytest.mark.parametrize("level", [0.05, 0.001])
def test_without_an_effect_the_power_is_the_level_and_it_grows_with_the_effect(pairs, level):
    assert t_test_power(0, pairs, level) == pytest.approx(level, rel=1e-8)
    powers = [t_test_power(effect, pairs, level) for effect in (0, 0.05, 0.2, 1, 5, 1e4)]
    assert powers == sorted(powers) and powers[-1] == pytest.approx(1)


def test_with_many_pairs_the_detectable_effect_is_that_of_the_normal_test():
    normal = 1.959963985 + 0.841621234  # 97.5 % and 80 % quantiles
    assert detectable_effect(100_000) * math.sqrt(100_000) == pytest.approx(normal, rel=1e-4)


@pytest.mark.parametrize(("pairs", "power"), [(3, 0.8), (5, 0.5), (10, 0.9)])
def test_simulated_studies_find_the_detectable_difference_as_often_as_promised(pairs, power):
    rng = np.random.default_rng(pairs)
    studies = 100_000
    differences = rng.normal(detectable_effect(pairs, power) * 0.02, 0.02, (studies, pairs))
    t = differences.mean(1) / differences.std(1, ddof=1) * math.sqrt(pairs)
    detected = np.mean(np.abs(t) > t_quantile(0.975, pairs - 1))
    assert abs(detected - power) < 5 * math.sqrt(power * (1 - power) / studies)


def test_the_detectable_difference_is_in_the_unit_of_the_differences_whatever_their_mean():
    differences = np.array([0.01, -0.02, 0.03, 0.00, 0.02])
    found = detectable_difference(differences)
    assert found == pytest.approx(1.6819969660 * differences.std(ddof=1), rel=1e-8)
    assert detectable_difference(100 * differences + 7) == pytest.approx(100 * found)
    assert detectable_difference(list(differences), power=0.9) > found
    assert detectable_difference([0.1, 0.1, 0.1]) == pytest.approx(0, abs=1e-12)
    assert math.isnan(detectable_difference([0.1])) and math.isnan(detectable_difference([0.1, math.nan]))


@pytest.mark.parametrize(("power", "level"), [(0.05, 0.05), (1.0, 0.05), (0.8, 0.0), (0.8, 0.9)])
def test_a_power_outside_its_range_is_refused(power, level):
    with pytest.raises(ValueError, match="power"):
        detectable_difference([0.1, 0.2], power, level)


def test_intervals_have_names_and_unpack():
    interval = t_interval([1.0, 2.0, 3.0])
    assert isinstance(interval, Interval) and tuple(interval) == (interval.value, interval.low, interval.high)
    records = np.random.default_rng(8).random((30, 4, 2))
    of_arrays = bootstrap(records, lambda sums: sums[..., 0] / sums[..., 1], resamples=50)
    assert of_arrays.value.shape == of_arrays.low.shape == of_arrays.high.shape == (4,)
    assert np.all(of_arrays.low < of_arrays.value) and np.all(of_arrays.value < of_arrays.high)


def draw_images(rng, n, trials, quality=1.0):
    """Counts [n, trials, 3, 3] of images of varying animal size and skewed quality."""
    pet, right = rng.beta(2, 3, (n, trials)), 1 - rng.beta(1.2, 6 * quality, (n, trials))
    truth = np.stack([0.85 * pet, 1 - pet, 0.15 * pet], -1)[..., None] * 10_000
    right = right[..., None, None]
    return truth * (right * np.eye(3) + (1 - right) / 2 * (1 - np.eye(3)))


@pytest.mark.parametrize("name", ["iou", "miou", "accuracy"])
def test_the_image_bootstrap_covers_the_truth_as_often_as_it_says(name):
    def statistic(counts):
        return scores(counts)[name]

    truth = statistic(draw_images(np.random.default_rng(99), 300_000, 1).sum(0))[0]
    rng, covered = np.random.default_rng(2), []
    for seed in range(5):
        _, low, high = bootstrap(draw_images(rng, 200, 500), statistic, resamples=1000, seed=seed)
        covered.append((low <= truth) & (truth <= high))
    assert abs(np.mean(covered) - 0.95) < 0.02


def test_the_paired_bootstrap_covers_the_true_difference_as_often_as_it_says():
    def pair(rng, n, trials):
        a = draw_images(rng, n, trials)
        share = rng.beta(2, 20, (n, trials))[..., None, None]
        b = a * (1 - share) + share * a[..., [1, 0, 2]]  # the same images, some pixels confused
        return a, b

    a, b = pair(np.random.default_rng(98), 300_000, 1)
    truth = (iou(a.sum(0)) - iou(b.sum(0)))[0]
    rng, covered = np.random.default_rng(3), []
    for seed in range(5):
        _, low, high = paired_bootstrap(*pair(rng, 200, 500), iou, resamples=1000, seed=seed)
        covered.append((low <= truth) & (truth <= high))
    assert abs(np.mean(covered) - 0.95) < 0.02


def test_the_bootstrap_repeats_itself_and_does_not_depend_on_pieces():
    counts = draw_images(np.random.default_rng(4), 250, 1)[:, 0]
    first = bootstrap(counts, iou, resamples=500, seed=7)
    assert first == bootstrap(counts, iou, resamples=500, seed=7)
    assert first != bootstrap(counts, iou, resamples=500, seed=8)
    many = bootstrap(np.repeat(counts, 40, axis=0), iou, resamples=500, seed=7)  # 10,000 images go in several pieces
    assert many[0] == pytest.approx(first[0]) and many[2] - many[1] < 0.3 * (first[2] - first[1])


def test_a_mean_over_images_has_the_interval_of_a_mean():
    x = np.random.default_rng(5).normal(0.8, 0.1, 400)
    value, low, high = bootstrap(np.stack([x, np.ones_like(x)], 1), lambda s: s[..., 0] / s[..., 1])
    _, t_low, t_high = t_interval(x)
    assert value == pytest.approx(x.mean()) and (low, high) == pytest.approx((t_low, t_high), abs=5e-4)


def test_a_model_does_not_differ_from_itself():
    counts = draw_images(np.random.default_rng(6), 200, 1)[:, 0]
    assert paired_bootstrap(counts, counts, iou, resamples=200) == (0, 0, 0)
    with pytest.raises(ValueError, match="one shape"):
        paired_bootstrap(counts, counts[:10], iou)
