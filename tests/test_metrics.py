"""Scores agree with brute force on masks and with the cases known by heart."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import boundary_iou, dataset_scores, image_iou, image_iou_each, image_scores, scores

masks = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40)


def count(pairs):
    counts = np.zeros((3, 3), dtype=np.int64)
    for truth, prediction in pairs:
        counts[truth, prediction] += 1
    return counts


def overlap(truth, prediction):
    union = sum(t or p for t, p in zip(truth, prediction, strict=True))
    return sum(t and p for t, p in zip(truth, prediction, strict=True)) / union if union else math.nan


def brute_force(pairs):
    """Every score from the pixels themselves."""
    truth, pred = zip(*pairs, strict=True)
    classes = [overlap([t == k for t in truth], [p == k for p in pred]) for k in range(3)]
    present = [v for v in classes if not math.isnan(v)]
    kept = [(t, p) for t, p in pairs if t != 2]
    sizes = sum(t == 0 for t in truth) + sum(p == 0 for p in pred)
    return {
        "accuracy": sum(t == p for t, p in pairs) / len(pairs),
        "iou_pet": classes[0],
        "iou_background": classes[1],
        "iou_border": classes[2],
        "miou": sum(present) / len(present),
        "iou": overlap([t == 0 for t in truth], [p == 0 for p in pred]),
        "iou_border_as_pet": overlap([t != 1 for t in truth], [p != 1 for p in pred]),
        "iou_border_ignored": overlap([t == 0 for t, _ in kept], [p == 0 for _, p in kept]),
        "dice": 2 * sum(t == p == 0 for t, p in pairs) / sizes if sizes else math.nan,
    }


@settings(max_examples=150, deadline=None)
@given(masks)
def test_scores_agree_with_brute_force_on_any_mask(pairs):
    found, expected = scores(count(pairs)), brute_force(pairs)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name


@settings(max_examples=40, deadline=None)
@given(st.lists(masks, min_size=1, max_size=5))
def test_dataset_scores_pool_pixels_and_image_scores_average_images(images):
    counts = np.stack([count(pairs) for pairs in images])
    pooled, single = brute_force([p for pairs in images for p in pairs]), [brute_force(pairs) for pairs in images]
    for name, value in dataset_scores(counts).items():
        assert value == pytest.approx(pooled[name], nan_ok=True)
    for name, value in image_scores(counts).items():
        kept = [s[name] for s in single if not math.isnan(s[name])]
        assert value == pytest.approx(np.mean(kept) if kept else math.nan, nan_ok=True)


def test_a_perfect_prediction_scores_one_everywhere():
    assert all(v == 1 for v in scores(np.diag([5, 7, 2])).values())


def test_an_inverted_prediction_scores_zero():
    assert all(v == 0 for k, v in scores([[0, 6, 0], [4, 0, 0], [0, 0, 0]]).items() if k != "iou_border")


def test_a_class_that_never_occurs_is_nan_and_does_not_enter_the_mean():
    found = scores(np.diag([5, 5, 0]))
    assert math.isnan(found["iou_border"]) and found["miou"] == 1


def test_a_mask_of_border_only_has_no_animal_unless_border_counts_as_animal():
    found = scores([[0, 0, 0], [0, 0, 0], [0, 0, 9]])
    assert found["iou_border"] == found["iou_border_as_pet"] == found["accuracy"] == found["miou"] == 1
    assert math.isnan(found["iou"]) and math.isnan(found["iou_border_ignored"])


def test_empty_counts_give_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(math.isnan(v) for v in scores(np.zeros((3, 3))).values())
        assert all(math.isnan(v) for v in image_scores(np.zeros((4, 3, 3))).values())


def test_leading_axes_are_kept_and_other_shapes_refused():
    assert scores(np.ones((4, 5, 3, 3)))["miou"].shape == (4, 5)
    with pytest.raises(ValueError, match=r"\[2, 2\]"):
        scores(np.ones((2, 2)))


def test_boundary_iou_pools_or_averages_and_skips_images_without_a_boundary():
    found = boundary_iou([[[1, 2], [3, 4]], [[3, 4], [0, 0]]])
    assert found["dataset"] == {"pet": 4 / 6, "pet_or_border": 3 / 4}
    assert found["image"] == {"pet": (1 / 2 + 3 / 4) / 2, "pet_or_border": 3 / 4}


@settings(max_examples=100, deadline=None)
@given(st.lists(masks, min_size=1, max_size=5))
def test_the_image_iou_agrees_with_brute_force_on_any_masks(images):
    expected = []
    for pairs in images:
        intersection = sum(t == 0 and p == 0 for t, p in pairs)
        union = sum(t == 0 or p == 0 for t, p in pairs)
        expected.append((intersection + 0.001) / (union + 0.001))
    counts = np.stack([count(pairs) for pairs in images])
    assert image_iou_each(counts) == pytest.approx(expected, abs=1e-12)
    assert image_iou(counts) == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_the_image_iou_of_cases_known_by_heart():
    empty = np.diag([0, 8, 1])
    missed = np.array([[0, 3, 1], [0, 5, 0], [0, 0, 0]])
    half = np.array([[2, 1, 0], [0, 5, 0], [1, 0, 0]])
    each = image_iou_each(np.stack([empty, missed, half]))
    assert each == pytest.approx([1, 0.001 / 4.001, 2.001 / 4.001])
    assert image_iou_each(half, smooth=1) == pytest.approx(3 / 5)
    assert image_iou(np.stack([empty, missed, half])).shape == ()
    assert image_iou_each(np.ones((4, 5, 3, 3))).shape == (4, 5)
    with pytest.raises(ValueError, match=r"\[2, 2\]"):
        image_iou(np.ones((2, 2)))


def test_the_image_iou_without_smoothing_is_the_mean_of_the_binary_iou():
    counts = np.random.default_rng(0).integers(1, 60, (50, 3, 3))
    assert image_iou(counts, smooth=0) == pytest.approx(image_scores(counts)["iou"], abs=1e-12)
