"""Scores of segmentations from 3 x 3 counts, and the statistics that compare them. Pure numpy; works when copied alone.

    counts = np.load("test.npz")["counts"]          # int64 [images, 3, 3]: rows truth, columns prediction
    dataset_scores(counts)["miou"]                  # counts summed over images first, the common practice
    bootstrap(counts, lambda c: scores(c)["iou"])   # (value, low, high) over test images

Classes in order: 0 pet, 1 background, 2 border. Intervals over seeds are Student's t; over images, the bootstrap.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np

CLASSES = ("pet", "background", "border")
PET, BACKGROUND, BORDER = range(3)


def ratio(a, b) -> np.ndarray:
    """Divide a by b elementwise; nan where b is 0, without a warning."""
    a, b = np.broadcast_arrays(np.asarray(a, float), np.asarray(b, float))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0)


def mean(values, axis: int | None = None) -> np.ndarray:
    """Average what is not nan; nan where nothing is left, without a warning."""
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


# -- Student's t: with t = sqrt(df) tan(angle) the density is cos(angle) ** (df - 1), up to a factor
NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)


def t_cdf(t: float, df: float) -> float:
    """Probability that Student's t with df >= 1 degrees of freedom is at most t, to 1e-14."""
    if not math.isfinite(t):
        return math.nan if math.isnan(t) else float(t > 0)
    half = min(math.atan(abs(t) / math.sqrt(df)), 40 / math.sqrt(df)) / 2  # beyond 40 deviations there is nothing
    factor = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    area = factor * half * float(WEIGHTS @ np.cos(half * (NODES + 1)) ** (df - 1))
    return 0.5 + math.copysign(min(0.5, area), t)


@cache
def t_quantile(p: float, df: float) -> float:
    """Invert t_cdf for p in (0, 1), by bisection."""
    if not 0 < p < 1:
        raise ValueError(f"a quantile needs a probability in (0, 1), got {p}")
    low, high = -math.pi / 2, 0.0
    for _ in range(80):
        middle = (low + high) / 2
        below = t_cdf(math.sqrt(df) * math.tan(middle), df) < min(p, 1 - p)
        low, high = (middle, high) if below else (low, middle)
    return math.copysign(math.sqrt(df) * math.tan(low), p - 0.5)


def t_interval(values, level: float = 0.95) -> tuple[float, float, float]:
    """Mean and confidence interval of a normal mean from values [n] -> (mean, low, high); n = 1: nan limits."""
    x, half = np.asarray(values, float), math.nan
    if len(x) > 1:
        half = t_quantile(0.5 + level / 2, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def t_statistic(differences, expected: float = 0.0) -> float:
    """(mean - expected) / standard error of values [n]: infinite where they do not vary, nan for n < 2 or with a nan."""
    x = np.asarray(differences, float)
    if len(x) < 2 or np.isnan(x).any():
        return math.nan
    distance, error = float(x.mean() - expected), float(x.std(ddof=1)) / math.sqrt(len(x))
    return distance / error if error > 0 else math.copysign(math.inf, distance) if distance else 0.0


def paired_t_test(differences) -> float:
    """Two-sided p-value of "the mean of differences [n] is 0"; nan for n < 2."""
    return 2 * t_cdf(-abs(t_statistic(differences)), max(len(differences) - 1, 1))


def tost(differences, margin: float) -> float:
    """P-value of equivalence: small when the mean of differences [n] lies within (-margin, margin); nan for n < 2."""
    sides = -t_statistic(differences, -margin), t_statistic(differences, margin)
    return max(t_cdf(t, max(len(differences) - 1, 1)) for t in sides)


def holm(p_values) -> np.ndarray:
    """Correct p-values [m] for m tests, step down (Holm 1979); nan stays nan and does not count as a test."""
    p = np.asarray(p_values, float)
    order, out = np.argsort(p), np.empty(p.shape)  # nan comes last
    left = np.sum(~np.isnan(p)) - np.arange(len(p))
    out[order] = np.minimum(1, np.maximum.accumulate(left * p[order]))
    return out


# -- Bootstrap over images
def bootstrap(records, statistic: Callable, resamples: int = 10_000, level: float = 0.95, seed: int = 0):
    """Interval of a statistic of summed records over n images -> (value, low, high).

    records [n, ...]: one image's counts each; statistic: sums [..., ...] -> values, for any number of leading axes. The
    percentile interval, widened by sqrt(n / (n - 1)) about the value because resampling n understates the spread.
    For a mean over images pass records [n, 2] of (value, 1) and `lambda s: s[..., 0] / s[..., 1]`.
    """
    x = np.asarray(records, float)
    n, value, rng, draws = len(x), statistic(x.sum(0)), np.random.default_rng(seed), []
    chunk = max(1, 2_000_000 // n)
    for start in range(0, resamples, chunk):  # a bounded piece of the [resamples, n] weights at a time
        rows = min(chunk, resamples - start)
        picks = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        weights = np.bincount(picks.ravel(), minlength=rows * n).reshape(rows, n)
        draws.append(statistic((weights @ x.reshape(n, -1)).reshape(rows, *x.shape[1:])))
    tails = np.nanquantile(np.concatenate(draws), [0.5 - level / 2, 0.5 + level / 2], axis=0)
    return value, *(value + (tails - value) * math.sqrt(n / max(n - 1, 1)))


def paired_bootstrap(records_a, records_b, statistic: Callable, resamples: int = 10_000, level=0.95, seed: int = 0):
    """Interval of statistic(a) - statistic(b) when both saw the same n images -> (difference, low, high); see bootstrap."""
    a, b = np.asarray(records_a), np.asarray(records_b)
    if a.shape != b.shape:
        raise ValueError(f"paired records must have one shape, got {list(a.shape)} and {list(b.shape)}")
    pair, axis = np.stack([a, b], axis=1), -a.ndim
    return bootstrap(pair, lambda s: statistic(s.take(0, axis)) - statistic(s.take(1, axis)), resamples, level, seed)
