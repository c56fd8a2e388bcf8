"""What features know: k-NN and linear classifiers on frozen features, few-shot draws, and meters of collapse.

    standard = standardise(train)
    path = fit_path(train, one_hot(labels, 37), standard)     # a linear classifier for each strength of the regulariser
    path[1e-3](standard(test)).argmax(1)                      # its predictions
    knn_votes(test, Bank(train, labels, 37)).argmax(1)

All sums are made in float64 and in a fixed order, so that a probe has one result on every device. Rows of features may be in
half precision: they are converted in chunks. Shapes: N rows, D features, C classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import without_compiler

CHUNK = 16_384  # rows that are converted to float64 at a time
NEIGHBOURS = 20  # Caron et al. 2021 (DINO), section 4.1
TEMPERATURE = 0.07  # of the votes, in DINO's code
STRENGTHS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # of the L2 regulariser; scikit-learn's C is 1 / (strength * N)
MOST_STEPS = 100  # of L-BFGS; the weakest regularisers would take more, and gain nothing on validation images


# ----------------------------------------------------------------------------------------------------------------------
# Standardised features


class Standard(NamedTuple):
    """What brings features to zero mean and unit variance: mean and scale of each of D features."""

    mean: Tensor
    scale: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Standardise rows [..., D] -> float64 [..., D]."""
        return (rows.double() - self.mean) / self.scale


def identity(rows: Tensor) -> Tensor:
    return rows


def moments(rows: Tensor, change: Callable[[Tensor], Tensor] = identity) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of each feature over rows [N, D], after `change` -> two float64 [D]."""
    parts = rows.split(CHUNK)
    total = sum(change(part.double()).sum(0) for part in parts)
    mean = total / len(rows)
    squares = sum((change(part.double()) - mean).square().sum(0) for part in parts)
    return mean, (squares / len(rows)).sqrt()


def standardise(rows: Tensor) -> Standard:
    """Measure what standardises rows [N, D]; a feature that does not vary keeps its scale."""
    mean, deviation = moments(rows)
    varies = deviation > 1e-12 * (1 + mean.abs())  # a constant's deviation is rounding
    return Standard(mean, torch.where(varies, deviation, 1.0))


# ----------------------------------------------------------------------------------------------------------------------
# Nearest neighbours


class Bank(NamedTuple):
    """Features [N, D] whose labels int64 [N] are known, of C classes."""

    features: Tensor
    labels: Tensor
    num_classes: int


def knn_votes(
    queries: Tensor, bank: Bank, neighbours: int = NEIGHBOURS, temperature: float | None = TEMPERATURE
) -> Tensor:
    """Let the nearest rows of a bank by cosine similarity vote on each query [n, D] -> votes float64 [n, C].

    A vote weighs exp(similarity / temperature), as in DINO; temperature None: all weigh the same. Of equally near rows
    the first in the bank counts.
    """
    unit_queries = F.normalize(queries.double(), dim=1)
    unit_bank = F.normalize(bank.features.double(), dim=1)
    similarity = unit_queries @ unit_bank.T
    order = similarity.sort(dim=1, descending=True, stable=True)
    labels = bank.labels[order.indices[:, :neighbours]]
    weights = torch.ones_like(labels, dtype=torch.float64)
    if temperature is not None:
        weights = (order.values[:, :neighbours] / temperature).exp()
    return (one_hot(labels, bank.num_classes) * weights[..., None]).sum(1)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Write labels int64 [...] as shares of the classes, float64 [..., C]."""
    return F.one_hot(labels, num_classes).double()


# ----------------------------------------------------------------------------------------------------------------------
# Linear classifiers


@dataclass(frozen=True)
class Linear:
    """A linear classifier: weight float64 [C, D], bias [C]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Compute logits [..., C] of standardised rows [..., D]."""
        return F.linear(rows, self.weight, self.bias)


def fit_linear(
    rows: Tensor, targets: Tensor, standard: Standard, strength: float, start: Linear | None = None
) -> Linear:
    """Fit multinomial logistic regression to rows [N, D] and the shares of the classes [N, C], by L-BFGS.

    Minimised is the mean cross-entropy of the standardised rows plus strength / 2 times the squared norm of the weight;
    the bias is free. start: where the search begins, which changes the way to the minimum and not the minimum.
    """
    count = len(rows)
    weight = torch.zeros(targets.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    bias = torch.zeros(targets.shape[1], dtype=torch.float64, device=rows.device)
    if start is not None:
        weight.copy_(start.weight)
        bias.copy_(start.bias)

    def loss_and_gradient() -> Tensor:
        loss = 0.5 * strength * weight.square().sum()
        weight.grad = strength * weight
        bias.grad = torch.zeros_like(bias)
        for part, target in zip(rows.split(CHUNK), targets.split(CHUNK), strict=True):
            part = standard(part)
            target = target.double()
            log_shares = F.log_softmax(F.linear(part, weight, bias), dim=1)
            loss = loss - (target * log_shares).sum() / count
            error = (log_shares.exp() - target) / count
            weight.grad += error.T @ part
            bias.grad += error.sum(0)
        return loss

    optimizer = without_compiler(torch.optim.LBFGS)(
        [weight, bias],
        max_iter=MOST_STEPS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(loss_and_gradient)
    return Linear(weight, bias)


def do_nothing(number: int) -> None:
    pass


def fit_path(
    rows: Tensor,
    targets: Tensor,
    standard: Standard,
    strengths: Sequence[float] = STRENGTHS,
    update: Callable[[int], object] = do_nothing,
) -> dict[float, Linear]:
    """Fit a classifier for each strength, from the strongest on; each search begins where the one before ended.

    update(1) is called after each, to show how far it is.
    """
    path = {}
    last = None
    for strength in strengths:
        last = fit_linear(rows, targets, standard, strength, last)
        path[strength] = last
        update(1)
    return path


def take_shots(labels: Tensor, order: Tensor, shots: int) -> Tensor:
    """Take the first `shots` images of each class, or all it has, of an order int64 [N] -> indices, sorted by class.

    Fewer shots of one order lie in more of them.
    """
    ordered = labels[order]
    chosen = [order[ordered == number][:shots] for number in labels.unique().tolist()]
    return torch.cat(chosen)


# ----------------------------------------------------------------------------------------------------------------------
# Meters of collapse


def unit_spread(rows: Tensor) -> float:
    """Average the standard deviation of the features of l2-normalised rows [N, D], times sqrt(D): 1 at most, collapsed 0.

    Chen and He 2021 (SimSiam), section 4.1.
    """
    _, deviation = moments(rows, lambda part: F.normalize(part, dim=1))
    return deviation.mean().item() * math.sqrt(rows.shape[1])


def gram_matrix(rows: Tensor) -> Tensor:
    """Multiply rows [N, D] by themselves -> [D, D], or [N, N] where that is smaller; both have the same eigenvalues."""
    count, width = rows.shape
    if count < width:
        whole = rows.double()
        return whole @ whole.T
    return sum(part.double().T @ part.double() for part in rows.split(CHUNK))


def rank_me(rows: Tensor) -> float:
    """Compute the effective rank of rows [N, D]: the exponential of the entropy of their normalised singular values.

    1 if all rows are multiples of one, min(N, D) at most (Garrido et al. 2023, RankMe). Rows that are all zero have rank 0.
    """
    gram = gram_matrix(rows)
    squares = torch.linalg.eigvalsh(gram)
    noise = squares.max() * len(gram) * torch.finfo(torch.float64).eps
    singular = torch.where(squares > noise, squares, 0.0).sqrt()
    if singular.sum() == 0:
        return 0.0
    shares = singular / singular.sum()
    return torch.special.entr(shares).sum().exp().item()


def measure_collapse(rows: Tensor) -> dict[str, float]:
    """Take both meters of rows [N, D]."""
    return {"spread": unit_spread(rows), "rank": rank_me(rows)}
