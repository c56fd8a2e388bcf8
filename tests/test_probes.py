"""The mathematics of probes equals slow references and scikit-learn, and its meters show a collapse."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import probes

FEW = settings(max_examples=25, deadline=None)


# -- The classifiers ----------------------------------------------------------------------------------------------------


@st.composite
def labelled(draw):
    """Features float64 [N, D] of clusters with their labels [N], each class at least once, and the number of classes."""
    classes = draw(st.integers(2, 5))
    count = draw(st.integers(classes, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = rng.permutation(np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)]))
    width = draw(st.integers(2, 12))
    centres = draw(st.sampled_from([0.0, 1.0, 4.0])) * rng.normal(size=(classes, width))
    rows = (centres[labels] + rng.normal(size=(count, width))) * rng.uniform(0.1, 10, width) + rng.normal(size=width)
    return torch.from_numpy(rows), torch.from_numpy(labels), classes


@FEW
@given(labelled(), st.integers(1, 30), st.sampled_from([None, 0.07, 1.0]))
def test_votes_of_neighbours_equal_a_slow_loop_and_scikit_learn(case, neighbours, temperature):
    from sklearn.neighbors import KNeighborsClassifier

    rows, labels, classes = case
    queries = rows.flip(0) + 0.3 * rows.roll(1, 0)
    found = probes.knn_votes(queries, probes.Bank(rows, labels, classes), neighbours, temperature)
    for query, votes in zip(queries, found, strict=True):
        similar = F.cosine_similarity(rows, query[None], dim=1)
        expected = torch.zeros(classes, dtype=torch.float64)
        for place in similar.argsort(descending=True)[:neighbours]:
            expected[labels[place]] += 1 if temperature is None else torch.exp(similar[place] / temperature)
        assert torch.allclose(votes, expected, rtol=1e-9)
    weights = "uniform"
    if temperature is not None:
        weights = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731
    theirs = KNeighborsClassifier(min(neighbours, len(rows)), metric="cosine", weights=weights).fit(rows, labels)
    shares = found / found.sum(1, keepdim=True)
    assert np.allclose(theirs.predict_proba(queries), shares, atol=1e-9)


@FEW
@given(labelled(), st.sampled_from([10.0, 1.0, 0.1, 1e-2]))
def test_a_linear_classifier_equals_scikit_learns(case, strength):
    from sklearn.linear_model import LogisticRegression

    rows, labels, classes = case
    standard = probes.standardise(rows)
    ours = probes.fit_path(rows, probes.one_hot(labels, classes), standard, [10 * strength, strength])[strength]
    unit = ((rows - rows.mean(0)) / rows.std(0, correction=0)).numpy()
    inverse = 1 / (strength * len(rows))
    if classes == 2:  # it keeps the difference of the two weights alone, whose square is twice the sum of theirs
        inverse *= 2
    theirs = LogisticRegression(C=inverse, tol=1e-9, max_iter=5000).fit(unit, labels)
    shares = ours(standard(rows)).softmax(1)
    assert np.allclose(theirs.predict_proba(unit), shares, atol=2e-4)


@FEW
@given(labelled(), st.sampled_from([1.0, 1e-2]), st.integers(0, 2**32))
def test_shares_of_classes_count_like_repeated_rows(case, strength, seed):
    rows, _, classes = case
    counts = np.random.default_rng(seed).multinomial(4, np.full(classes, 1 / classes), len(rows))
    shares = torch.from_numpy(counts / 4)
    repeated = rows.repeat_interleave(4, 0)
    labels = torch.cat([torch.arange(classes).repeat_interleave(torch.from_numpy(row)) for row in counts])
    standard = probes.standardise(rows)
    once = probes.fit_linear(rows, shares, standard, strength)
    often = probes.fit_linear(repeated, probes.one_hot(labels, classes), standard, strength)
    assert torch.allclose(once.weight, often.weight, atol=1e-5)


def test_rows_in_half_precision_are_fitted_in_chunks_as_in_one_piece(monkeypatch):
    rows = torch.randn(50, 6).half()
    targets = probes.one_hot(torch.arange(50) % 3, 3)
    whole = probes.fit_linear(rows, targets, probes.standardise(rows), 0.1)
    monkeypatch.setattr(probes, "CHUNK", 7)
    parts = probes.fit_linear(rows, targets, probes.standardise(rows), 0.1)
    assert torch.allclose(whole.weight, parts.weight, atol=1e-6)
    assert probes.measure_collapse(rows)["rank"] == pytest.approx(slow_rank(rows.double()), rel=1e-3)


@FEW
@given(labelled(), st.integers(0, 2**32))
def test_shots_are_as_many_of_each_class_as_there_are_and_nested(case, seed):
    _, labels, classes = case
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    smaller = set()
    for shots in (1, 5, 10):
        chosen = probes.take_shots(labels, order, shots).tolist()
        assert len(set(chosen)) == len(chosen) and smaller <= set(chosen)
        counts = labels[chosen].bincount(minlength=classes)
        assert counts.tolist() == labels.bincount(minlength=classes).clamp(max=shots).tolist()
        smaller = set(chosen)


# -- Meters of collapse -------------------------------------------------------------------------------------------------


def slow_rank(rows: torch.Tensor) -> float:
    shares = torch.linalg.svdvals(rows)
    shares = shares[shares > 0] / shares.sum()
    return float(np.exp(-sum(float(share) * np.log(float(share)) for share in shares)))


@FEW
@given(labelled())
def test_meters_equal_their_definitions(case):
    rows, _, _ = case
    unit = np.stack([row / np.linalg.norm(row) for row in rows.numpy()])
    assert probes.unit_spread(rows) == pytest.approx(unit.std(0).mean() * np.sqrt(rows.shape[1]), abs=1e-9)
    assert probes.rank_me(rows) == pytest.approx(slow_rank(rows), rel=1e-3)
    assert 0 <= probes.unit_spread(rows) <= 1
    assert 1 <= probes.rank_me(rows) <= min(rows.shape) + 1e-9


def test_meters_show_a_collapse():
    one_direction = torch.linspace(1, 2, 40)[:, None] * torch.randn(1, 8)
    for collapsed in (torch.ones(40, 8), one_direction, one_direction.half()[:1].expand(40, 8)):
        assert probes.unit_spread(collapsed) < 1e-6
        assert probes.rank_me(collapsed) == pytest.approx(1, abs=1e-3)
    healthy = torch.randn(400, 8)
    assert probes.unit_spread(healthy) > 0.9 and probes.rank_me(healthy) > 7
    assert probes.rank_me(torch.zeros(5, 3)) == 0
