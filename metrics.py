"""Scores of segmentations from 3 x 3 counts, and the statistics that compare them. Needs numpy only; copy it alone.

    counts = np.load("test.npz")["counts"]          # int64 [images, 3, 3]: rows truth, columns prediction
    dataset_scores(counts)["miou"]                  # counts summed over images first, the common practice
    image_iou(counts)                               # the IoU of each image first, as the original study scored
    bootstrap(counts, lambda c: scores(c)["iou"])   # Interval(value, low, high) over test images
    macro_average_precision(logits, shown)          # how well scores [n, categories] rank what images show

Classes in order: 0 pet, 1 background, 2 border. Intervals over seeds are Student's t; over images, the bootstrap.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

CLASSES = ("pet", "background", "border")
PET = 0
BACKGROUND = 1
BORDER = 2


class Interval(NamedTuple):
    """A value with its confidence limits: numbers, or arrays of one shape."""

    value: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray


# -- Scores


def ratio(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Divide a by b elementwise; nan where b is 0, without a warning."""
    a, b = np.broadcast_arrays(np.asarray(a, float), np.asarray(b, float))
    undefined = np.full(a.shape, np.nan)
    return np.divide(a, b, out=undefined, where=b != 0)


def mean(values: ArrayLike, axis: int | None = None) -> np.ndarray:
    """Average the values that are not nan; nan where there are none, without a warning."""
    total = np.nansum(values, axis)
    number = np.sum(~np.isnan(values), axis)
    return ratio(total, number)


def _as_counts(counts: ArrayLike) -> np.ndarray:
    """Convert pixel counts [..., 3, 3] to float; raise ValueError for another shape."""
    c = np.asarray(counts, float)
    if c.shape[-2:] != (3, 3):
        raise ValueError(f"counts must have the shape [..., 3, 3], got {list(c.shape)}")
    return c


def scores(counts: ArrayLike) -> dict[str, np.ndarray]:
    """Score pixel counts [..., 3, 3] (rows truth, columns prediction): name to array [...] in [0, 1].

    - accuracy: share of correct pixels.
    - iou_pet, iou_background, iou_border: per class. miou: their mean over the classes in truth or prediction.
    - iou: the paper's binary IoU of the animal; border is background in truth and prediction. It equals iou_pet.
    - dice: of the same two masks.
    - iou_border_as_pet: border is animal in truth and prediction.
    - iou_border_ignored: pixels whose truth is border are dropped; a predicted border elsewhere is not animal.

    A score whose union is empty is nan. Raises ValueError for another shape.
    """
    c = _as_counts(counts)
    truth = c.sum(-1)
    predicted = c.sum(-2)
    correct = np.diagonal(c, axis1=-2, axis2=-1)
    total = c.sum((-2, -1))
    iou = ratio(correct, truth + predicted - correct)

    pet = correct[..., PET]
    pet_truth = truth[..., PET]
    background = correct[..., BACKGROUND]
    pet_or_border = total - truth[..., BACKGROUND] - predicted[..., BACKGROUND] + background
    pet_on_background = c[..., BACKGROUND, PET]
    return {
        "accuracy": ratio(correct.sum(-1), total),
        "iou_pet": iou[..., PET],
        "iou_background": iou[..., BACKGROUND],
        "iou_border": iou[..., BORDER],
        "miou": mean(iou, -1),
        "iou": iou[..., PET],
        "iou_border_as_pet": ratio(pet_or_border, total - background),
        "iou_border_ignored": ratio(pet, pet_truth + pet_on_background),
        "dice": ratio(2 * pet, pet_truth + predicted[..., PET]),
    }


def dataset_scores(counts: ArrayLike) -> dict[str, np.ndarray]:
    """Score the sum of counts [n, 3, 3] over images: every pixel weighs the same."""
    return scores(np.asarray(counts).sum(0))


def image_scores(counts: ArrayLike) -> dict[str, np.ndarray]:
    """Average the scores of each image in counts [n, 3, 3]: every image weighs the same, nan are left out."""
    return {name: mean(values, 0) for name, values in scores(counts).items()}


def image_iou_each(counts: ArrayLike, smooth: float = 0.001) -> np.ndarray:
    """Score each image of counts [..., 3, 3] like the original study: [...] in (0, 1].

    (intersection + smooth) / (union + smooth) in pixels, of pet against everything else. An image without pet in truth
    and prediction scores 1, where scores()["iou"] is nan.
    """
    c = _as_counts(counts)
    intersection = c[..., PET, PET]
    truth = c[..., PET, :].sum(-1)
    predicted = c[..., PET].sum(-1)
    union = truth + predicted - intersection
    return (intersection + smooth) / (union + smooth)


def image_iou(counts: ArrayLike, smooth: float = 0.001) -> np.ndarray:
    """Average image_iou_each over counts [n, 3, 3], as the original study averages its images."""
    return image_iou_each(counts, smooth).mean(0)


def boundary_iou(boundary: ArrayLike) -> dict[str, dict[str, np.ndarray]]:
    """Score boundaries [n, 2, 2] of n images, over the data set and as a mean over images.

    boundary[i]: for each of two masks, pet and pet or border, its intersection and union in pixels. Returns the keys
    "dataset" and "image", each with "pet" and "pet_or_border".

    Boundary IoU: Cheng et al., CVPR 2021. Images without a boundary in either mask do not enter the mean over images.
    """
    b = np.asarray(boundary, float)
    intersection = b[..., 0]
    union = b[..., 1]
    levels = {"dataset": ratio(intersection.sum(0), union.sum(0)), "image": mean(ratio(intersection, union), 0)}
    return {level: {"pet": value[0], "pet_or_border": value[1]} for level, value in levels.items()}


# -- Ranking


def average_precision(scores: ArrayLike, shown: ArrayLike) -> float:
    """Average the precision at each image that shows a category: scores [n], shown [n] 0 or 1 -> number in (0, 1].

    The area under the curve of precision against recall as a step function. Images of equal scores count as one step, so
    equal scores for all give the base rate. nan where no image shows the category.
    """
    values = np.asarray(scores, float)
    order = np.argsort(-values, kind="stable")
    ranked = values[order]
    found = np.cumsum(np.asarray(shown, float)[order])
    last_of_equals = np.append(ranked[1:] != ranked[:-1], True)
    found = found[last_of_equals]
    precision = found / (np.flatnonzero(last_of_equals) + 1)
    gained = np.diff(found, prepend=0.0)
    return float(ratio((gained * precision).sum(), found[-1]))


def macro_average_precision(scores: ArrayLike, shown: ArrayLike) -> float:
    """Average average_precision over the categories that some image shows: scores and shown [n, categories]."""
    columns = zip(np.asarray(scores).T, np.asarray(shown).T, strict=True)
    return float(mean([average_precision(values, truth) for values, truth in columns]))


# -- Student's t

NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)  # on [-1, 1]


def t_cdf(t: float, df: float) -> float:
    """Compute P(T <= t) of Student's t with df >= 1 degrees of freedom, to 1e-14."""
    if math.isnan(t):
        return math.nan
    if math.isinf(t):
        return float(t > 0)
    # With t = sqrt(df) tan(angle) the density is cos(angle) ** (df - 1), up to a factor.
    angle = math.atan(abs(t) / math.sqrt(df))
    negligible = 40 / math.sqrt(df)  # beyond 40 standard deviations the density vanishes
    half = min(angle, negligible) / 2
    density = np.cos(half * (NODES + 1)) ** (df - 1)
    log_gammas = math.lgamma((df + 1) / 2) - math.lgamma(df / 2)
    factor = math.exp(log_gammas) / math.sqrt(math.pi)
    area = factor * half * float(WEIGHTS @ density)
    return 0.5 + math.copysign(min(0.5, area), t)


@cache
def t_quantile(p: float, df: float) -> float:
    """Invert t_cdf by bisection; raise ValueError unless p is in (0, 1)."""
    if not 0 < p < 1:
        raise ValueError(f"a quantile needs a probability in (0, 1), got {p}")
    tail = min(p, 1 - p)
    low = -math.pi / 2  # angles as in t_cdf
    high = 0.0
    for _ in range(80):
        middle = (low + high) / 2
        if t_cdf(math.sqrt(df) * math.tan(middle), df) < tail:
            low = middle
        else:
            high = middle
    return math.copysign(math.sqrt(df) * math.tan(low), p - 0.5)


def t_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Estimate a normal mean with its confidence interval from values [n]; n = 1 has nan limits."""
    x = np.asarray(values, float)
    n = len(x)
    centre = float(x.mean())
    half_width = math.nan
    if n > 1:
        deviation = float(x.std(ddof=1))
        half_width = t_quantile(0.5 + level / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(centre, centre - half_width, centre + half_width)


def t_statistic(differences: ArrayLike, expected: float = 0.0) -> float:
    """Compute (mean - expected) / standard error of values [n].

    Infinite where the values do not vary, 0 where they all equal `expected`, nan for n < 2 or with a nan.
    """
    x = np.asarray(differences, float)
    if len(x) < 2 or np.isnan(x).any():
        return math.nan
    distance = float(x.mean() - expected)
    error = float(x.std(ddof=1)) / math.sqrt(len(x))
    if error > 0:
        return distance / error
    if distance == 0:
        return 0.0
    return math.copysign(math.inf, distance)


def paired_t_test(differences: ArrayLike) -> float:
    """Compute the two-sided p-value of "the mean of differences [n] is 0"; nan for n < 2."""
    df = max(len(differences) - 1, 1)
    return 2 * t_cdf(-abs(t_statistic(differences)), df)


def tost(differences: ArrayLike, margin: float) -> float:
    """Compute the p-value of equivalence by two one-sided t-tests (Schuirmann 1987); nan for n < 2.

    Small when the mean of differences [n] lies within (-margin, margin).
    """
    df = max(len(differences) - 1, 1)
    p_lower = t_cdf(-t_statistic(differences, -margin), df)
    p_upper = t_cdf(t_statistic(differences, margin), df)
    return max(p_lower, p_upper)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Correct p-values [m] for m tests, step down (Holm 1979); nan stays nan and is not counted as a test."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)  # nan comes last
    tests = np.sum(~np.isnan(p))
    remaining = tests - np.arange(len(p))
    stepped = np.maximum.accumulate(remaining * p[order])
    corrected = np.empty(p.shape)
    corrected[order] = np.minimum(1, stepped)
    return corrected


# -- How well a spread is known


def _chi_density(chi: np.ndarray, df: float) -> np.ndarray:
    """Compute the density at chi [n] > 0 of the root of a chi-squared variable with df degrees of freedom."""
    log_factor = (1 - df / 2) * math.log(2) - math.lgamma(df / 2)
    chi = np.maximum(chi, np.finfo(float).tiny)  # whose logarithm is finite
    return np.exp(log_factor + (df - 1) * np.log(chi) - chi**2 / 2)


def _chi_range(df: float) -> tuple[float, float]:
    """Bound where the density of chi is not negligible; its standard deviation is below 1."""
    centre = math.sqrt(df)
    return max(0.0, centre - 12), centre + 12


@cache
def chi_quantile(p: float, df: float) -> float:
    """Find the root of the p-quantile of chi-squared with df >= 1, by bisection; raise ValueError unless p is in (0, 1)."""
    if not 0 < p < 1:
        raise ValueError(f"a quantile needs a probability in (0, 1), got {p}")
    lowest, highest = _chi_range(df)
    low = lowest
    high = highest
    for _ in range(60):
        middle = (low + high) / 2
        half = (middle - lowest) / 2
        chi = lowest + half * (NODES + 1)
        below = half * float(WEIGHTS @ _chi_density(chi, df))
        if below < p:
            low = middle
        else:
            high = middle
    return low


def deviation_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Estimate the standard deviation of normal values [n] with its confidence interval; all nan for n = 1."""
    x = np.asarray(values, float)
    df = len(x) - 1
    if df < 1:
        return Interval(math.nan, math.nan, math.nan)
    deviation = float(x.std(ddof=1))
    length = math.sqrt(df) * deviation
    low = length / chi_quantile(0.5 + level / 2, df)
    high = length / chi_quantile(0.5 - level / 2, df)
    return Interval(deviation, low, high)


# -- Power of the paired t-test


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    """Compute the standard normal distribution function of x [n]."""
    return np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in x])


def _noncentral_t_tail(threshold: float, df: float, shift: float) -> float:
    """Compute P(T > threshold > 0) of noncentral t, (Z + shift) / (chi / sqrt(df)), to about 1e-12.

    For a given chi the event is Z > threshold * chi / sqrt(df) - shift. Its probability is integrated over the density of
    chi, piecewise: within the range of chi, and where that normal probability falls from 1 to 0.
    """
    slope = threshold / math.sqrt(df)
    lowest, highest = _chi_range(df)
    fall = np.clip([(shift - 9) / slope, shift / slope, (shift + 9) / slope], lowest, highest)
    edges = [lowest, *fall, highest]
    total = 0.0
    for start, end in pairwise(edges):
        half = (end - start) / 2
        if half == 0:
            continue
        chi = start + half * (NODES + 1)
        beyond = _normal_cdf(shift - slope * chi)
        total += half * float(WEIGHTS @ (_chi_density(chi, df) * beyond))
    return total


def t_test_power(effect: float, pairs: int, level: float = 0.05) -> float:
    """Compute the probability that a two-sided paired t-test rejects at `level`.

    effect: the true mean difference in units of the standard deviation of the differences; pairs >= 2.
    """
    df = pairs - 1
    threshold = t_quantile(1 - level / 2, df)
    shift = effect * math.sqrt(pairs)
    upper = _noncentral_t_tail(threshold, df, shift)
    lower = _noncentral_t_tail(threshold, df, -shift)
    return upper + lower


@cache
def detectable_effect(pairs: int, power: float = 0.8, level: float = 0.05) -> float:
    """Invert t_test_power by bisection; raise ValueError unless 0 < level < power < 1.

    Returns the smallest effect, in standard deviations of the differences, that is detected with the given power.
    """
    if not 0 < level < power < 1:
        raise ValueError(f"a power must lie between the level {level} and 1, got {power}")
    low = 0.0
    high = 1.0
    while t_test_power(high, pairs, level) < power:
        low = high
        high = 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        if t_test_power(middle, pairs, level) < power:
            low = middle
        else:
            high = middle
    return high


def detectable_difference(differences: ArrayLike, power: float = 0.8, level: float = 0.05) -> float:
    """Compute the smallest true mean difference that a paired t-test finds with the given power.

    The test has as many pairs as differences [n], whose standard deviation is taken for the true one. In their unit; nan
    for n < 2 or with a nan. Raises ValueError unless 0 < level < power < 1.
    """
    x = np.asarray(differences, float)
    if len(x) < 2 or np.isnan(x).any():
        return math.nan
    return detectable_effect(len(x), power, level) * float(x.std(ddof=1))


def known_spread_effect(pairs: int, power: float = 0.8, level: float = 0.05) -> float:
    """Compute what detectable_effect would be if the standard deviation were known instead of estimated: a z-test's."""
    normal = NormalDist()
    return (normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)) / math.sqrt(pairs)


def pairs_needed(effect: float, power: float = 0.8, level: float = 0.05, most: int = 1000) -> int | None:
    """Count the pairs, from 3 on, with which a paired t-test finds this effect with the given power; None above `most`.

    effect: the true mean difference in standard deviations of the differences, as in t_test_power; may be infinite.
    """
    if effect >= detectable_effect(3, power, level):
        return 3
    if t_test_power(effect, most, level) < power:
        return None
    too_few = 3
    enough = most
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if t_test_power(effect, middle, level) < power:
            too_few = middle
        else:
            enough = middle
    return enough


# -- Straight lines


def line_weights(x: ArrayLike) -> np.ndarray:
    """Compute the weights [2, k] that turn k values at x [k] into intercept and slope of their least-squares line.

    `line_weights(x) @ y` is the line of y; for values [..., k], `values @ line_weights(x).T` are their lines [..., 2].
    Raises ValueError unless two of x differ.
    """
    doses = np.asarray(x, float)
    distances = doses - doses.mean()
    total = float(distances @ distances)
    if not total > 0:
        raise ValueError(f"a line needs values at two places, got {doses.tolist()}")
    slope = distances / total
    intercept = 1 / len(doses) - doses.mean() * slope
    return np.stack([intercept, slope])


# -- Bootstrap over images

CHUNK = 2_000_000  # weights at a time, which bounds the memory


def _resampled_sums(records: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Sum n records drawn from [n, ...] with replacement, `resamples` times: [rows, ...], in pieces."""
    rng = np.random.default_rng(seed)
    n = len(records)
    flat = records.reshape(n, -1)
    chunk = max(1, CHUNK // n)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        picks = rng.integers(0, n, (rows, n))
        cells = picks + n * np.arange(rows)[:, None]
        weights = np.bincount(cells.ravel(), minlength=rows * n).reshape(rows, n)
        sums = weights @ flat
        yield sums.reshape(rows, *records.shape[1:])


def bootstrap(
    records: ArrayLike, statistic: Callable, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Estimate a statistic of summed records [n, ...] over n images, with its percentile interval.

    records: one image's counts each; statistic: sums [..., ...] to values, for any number of leading axes. The interval is
    widened by sqrt(n / (n - 1)) about the value, because resampling n images understates the spread. For a mean over
    images pass records [n, 2] of (value, 1) and `lambda s: s[..., 0] / s[..., 1]`.
    """
    x = np.asarray(records, float)
    n = len(x)
    value = statistic(x.sum(0))
    resampled = [statistic(sums) for sums in _resampled_sums(x, resamples, seed)]
    return _percentile_interval(value, np.concatenate(resampled), n, level)


def _percentile_interval(value: np.ndarray, resampled: np.ndarray, n: int, level: float) -> Interval:
    """Take the tails of resampled values, widened about the value because resampling n images understates the spread."""
    tails = [0.5 - level / 2, 0.5 + level / 2]
    limits = np.nanquantile(resampled, tails, axis=0)
    widening = math.sqrt(n / max(n - 1, 1))
    low, high = value + (limits - value) * widening
    return Interval(value, low, high)


def paired_bootstrap(
    records_a: ArrayLike,
    records_b: ArrayLike,
    statistic: Callable,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Estimate statistic(a) - statistic(b) on the same n images, with its interval; see bootstrap.

    Raises ValueError where the records differ in shape.
    """
    a = np.asarray(records_a)
    b = np.asarray(records_b)
    if a.shape != b.shape:
        raise ValueError(f"paired records must have one shape, got {list(a.shape)} and {list(b.shape)}")
    pairs = np.stack([a, b], axis=1)
    axis = -a.ndim  # of the pair, counted from the end: any number of resamples may come before it

    def difference(sums: np.ndarray) -> np.ndarray:
        return statistic(sums.take(0, axis)) - statistic(sums.take(1, axis))

    return bootstrap(pairs, difference, resamples, level, seed)


def unpaired_bootstrap(
    records_a: ArrayLike,
    records_b: ArrayLike,
    statistic: Callable,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Estimate statistic(a) - statistic(b) on different images, drawn independently of each other; see bootstrap."""
    a = np.asarray(records_a, float)
    b = np.asarray(records_b, float)
    value = statistic(a.sum(0)) - statistic(b.sum(0))
    resampled_a = [statistic(sums) for sums in _resampled_sums(a, resamples, seed)]
    resampled_b = [statistic(sums) for sums in _resampled_sums(b, resamples, seed + 1)]
    differences = np.concatenate(resampled_a) - np.concatenate(resampled_b)
    return _percentile_interval(value, differences, min(len(a), len(b)), level)
