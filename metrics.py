"""Scores of segmentations from 3 x 3 counts, and the statistics that compare them. Pure numpy; works when copied alone.

    counts = np.load("test.npz")["counts"]          # int64 [images, 3, 3]: rows truth, columns prediction
    dataset_scores(counts)["miou"]                  # counts summed over images first, the common practice
    bootstrap(counts, lambda c: scores(c)["iou"])   # (value, low, high) over test images

Classes in order: 0 pet, 1 background, 2 border. Intervals over seeds are Student's t; over images, the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

CLASSES = ("pet", "background", "border")
PET, BACKGROUND, BORDER = range(3)


def ratio(a, b) -> np.ndarray:
    """Divide a by b elementwise; nan where b is 0, without a warning."""
    a, b = np.broadcast_arrays(np.asarray(a, float), np.asarray(b, float))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0)


def mean(values, axis: int | None = None) -> np.ndarray:
    """Average what is not nan; nan where nothing is left, without a warning."""
    values = np.asarray(values, float)
    return ratio(np.nansum(values, axis), np.sum(~np.isnan(values), axis))


def scores(counts) -> dict[str, np.ndarray]:
    """Score pixel counts [..., 3, 3] (rows truth, columns prediction) -> name to array [...], all in [0, 1].

    accuracy; iou_pet, iou_background, iou_border and their mean miou (over the classes that occur in truth or prediction);
    iou: the paper's binary IoU of the animal, border counted as background in truth and prediction, which equals iou_pet;
    dice of the same masks; iou_border_as_pet: border counted as animal in both; iou_border_ignored: pixels whose *truth* is
    border are dropped, a predicted border elsewhere is not animal. An empty union gives nan.
    """
    c = np.asarray(counts, float)
    if c.shape[-2:] != (3, 3):
        raise ValueError(f"counts must have the shape [..., 3, 3], got {list(c.shape)}")
    truth, pred, hit = c.sum(-1), c.sum(-2), np.diagonal(c, axis1=-2, axis2=-1)
    per_class, pet, total = ratio(hit, truth + pred - hit), hit[..., PET], c.sum((-2, -1))
    animal = total - truth[..., BACKGROUND] - pred[..., BACKGROUND] + hit[..., BACKGROUND]  # pet or border, in both
    return {
        "accuracy": ratio(hit.sum(-1), total),
        **{f"iou_{name}": per_class[..., k] for k, name in enumerate(CLASSES)},
        "miou": mean(per_class, -1),
        "iou": per_class[..., PET],
        "iou_border_as_pet": ratio(animal, total - hit[..., BACKGROUND]),
        "iou_border_ignored": ratio(pet, truth[..., PET] + c[..., BACKGROUND, PET]),
        "dice": ratio(2 * pet, truth[..., PET] + pred[..., PET]),
    }


def dataset_scores(counts) -> dict[str, np.ndarray]:
    """Score the sum of counts [n, 3, 3] over images: every pixel weighs the same."""
    return scores(np.asarray(counts).sum(0))


def image_scores(counts) -> dict[str, np.ndarray]:
    """Average the scores of each image in counts [n, 3, 3]: every image weighs the same, those with nan are left out."""
    return {k: mean(v, 0) for k, v in scores(counts).items()}


def boundary_iou(boundary) -> dict[str, dict[str, np.ndarray]]:
    """Boundary IoU of [n, 2, 2] (mask; intersection, union) -> {"dataset", "image"} -> {"pet", "pet_or_border"}."""
    b = np.asarray(boundary, float)
    levels = {"dataset": ratio(b[..., 0].sum(0), b[..., 1].sum(0)), "image": mean(ratio(b[..., 0], b[..., 1]), 0)}
    return {level: {"pet": v[0], "pet_or_border": v[1]} for level, v in levels.items()}


# -- Student's t --------------------------------------------------------------------------------------------------------


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b), by Lentz's continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side only
        return 1 - incomplete_beta(b, a, 1 - x)
    f, c, d = 1.0, 1.0, 0.0
    for i in range(1000):
        m = i // 2
        if i % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)) if i else 1.0
        d, c = 1 / ((1 + term * d) or 1e-300), (1 + term / c) or 1e-300
        f *= c * d
        if i and abs(c * d - 1) < 1e-15:
            break
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    return front * (f - 1) / a


def t_cdf(t: float, df: float) -> float:
    """Probability that Student's t with df > 0 degrees of freedom is at most t."""
    if math.isinf(t) or math.isnan(t):
        return math.nan if math.isnan(t) else float(t > 0)
    if t * t < df:  # near the middle the other form would cancel
        return 0.5 + math.copysign(0.5 * incomplete_beta(0.5, df / 2, t * t / (df + t * t)), t)
    tail = 0.5 * incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return 1 - tail if t > 0 else tail


def t_quantile(p: float, df: float) -> float:
    """Invert t_cdf for p in (0, 1), by bisection."""
    if not 0 < p < 1:
        raise ValueError(f"a quantile needs a probability in (0, 1), got {p}")
    low, high = -1.0, 0.0
    while t_cdf(low, df) > min(p, 1 - p):
        low *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < min(p, 1 - p) else (low, middle)
    return math.copysign(low, p - 0.5) if p != 0.5 else 0.0


def t_interval(values, level: float = 0.95) -> tuple[float, float, float]:
    """Mean and confidence interval of a normal mean from values [n] -> (mean, low, high); n = 1: nan limits."""
    x = np.asarray(values, float)
    center, half = float(x.mean()), math.nan
    if len(x) > 1:
        half = t_quantile(0.5 + level / 2, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return center, center - half, center + half


def t_statistic(differences, expected: float = 0.0) -> float:
    """(mean - expected) / standard error of values [n]: infinite where they do not vary, nan for n < 2 or with a nan."""
    x = np.asarray(differences, float)
    if len(x) < 2 or np.isnan(x).any():
        return math.nan
    distance, error = float(x.mean() - expected), float(x.std(ddof=1)) / math.sqrt(len(x))
    return distance / error if error > 0 else math.copysign(math.inf, distance) if distance else 0.0


def paired_t_test(differences) -> float:
    """Two-sided p-value of "the mean of differences [n] is 0"; nan for n < 2."""
    return 2 * t_cdf(-abs(t_statistic(differences)), len(differences) - 1)


def tost(differences, margin: float) -> float:
    """P-value of equivalence: small when the mean of differences [n] lies within (-margin, margin); nan for n < 2."""
    df = len(differences) - 1
    return max(t_cdf(-t_statistic(differences, -margin), df), t_cdf(t_statistic(differences, margin), df))


def holm(p_values) -> np.ndarray:
    """Correct p-values [m] for m tests, step down (Holm 1979); nan stays nan and does not count as a test."""
    p = np.asarray(p_values, float)
    order = [i for i in np.argsort(p) if not np.isnan(p[i])]
    out, worst = np.full(p.shape, np.nan), 0.0
    for rank, i in enumerate(order):
        worst = out[i] = min(1.0, max(worst, (len(order) - rank) * p[i]))
    return out


# -- Bootstrap over images ----------------------------------------------------------------------------------------------


def bootstrap(records, statistic: Callable, resamples: int = 10_000, level: float = 0.95, seed: int = 0):
    """Interval of a statistic of summed records over n images -> (value, low, high).

    records [n, ...]: one image's counts each; statistic: sums [..., ...] -> values, for any number of leading axes. The
    percentile interval, widened by sqrt(n / (n - 1)) about the value because resampling n understates the spread.
    For a mean over images pass records [n, 2] of (value, 1) and `lambda s: s[..., 0] / s[..., 1]`.
    """
    x = np.asarray(records, float)
    n, value, rng, draws = len(x), statistic(x.sum(0)), np.random.default_rng(seed), []
    flat, chunk = x.reshape(n, -1), max(1, 2_000_000 // n)
    for start in range(0, resamples, chunk):  # a bounded piece of the [resamples, n] weights at a time
        rows = min(chunk, resamples - start)
        picks = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        weights = np.bincount(picks.ravel(), minlength=rows * n).reshape(rows, n)
        draws.append(statistic((weights @ flat).reshape(rows, *x.shape[1:])))
    tails = np.nanquantile(np.concatenate(draws), [0.5 - level / 2, 0.5 + level / 2], axis=0)
    low, high = value + (tails - value) * math.sqrt(n / max(n - 1, 1))
    return value, low, high


def paired_bootstrap(records_a, records_b, statistic: Callable, resamples: int = 10_000, level=0.95, seed: int = 0):
    """Interval of statistic(a) - statistic(b) when both saw the same n images -> (difference, low, high); see bootstrap."""
    a, b = np.asarray(records_a), np.asarray(records_b)
    if a.shape != b.shape:
        raise ValueError(f"paired records must have one shape, got {list(a.shape)} and {list(b.shape)}")
    pair, axis = np.stack([a, b], axis=1), -a.ndim
    return bootstrap(pair, lambda s: statistic(s.take(0, axis)) - statistic(s.take(1, axis)), resamples, level, seed)
