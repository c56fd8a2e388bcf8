"""Tests say what seeds can show and no more: against scipy and statsmodels, by simulation, and in the report's words."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired
from study_folder import write_study

import comparisons as compared
import figures
import power
from comparisons import Comparison, correct
from metrics import (
    chi_quantile,
    detectable_effect,
    deviation_interval,
    known_spread_effect,
    paired_t_test,
    pairs_needed,
    t_interval,
    t_test_power,
)
from power import factor_rows, paper_difference, recommended_seeds, seeds_for, times_known
from report import get_args_parser, main
from results import verdict
from study import read_plan, write_lines

README = (Path(__file__).parents[1] / "README.md").read_text()
DRAWING = ("forest", "curve_panels", "image_grid", "bands", "scatter")
POINTS = st.floats(-3, 3).map(lambda value: round(value, 3))


def seed_values(seeds):
    """Differences in points, one a seed, that are not all the same."""
    return st.lists(POINTS, min_size=seeds, max_size=seeds).filter(lambda values: np.std(values) > 0.01)


def compare(values, reason=""):
    """A comparison of two arms with these differences in points, tested as those of a study are."""
    arm = SimpleNamespace(label="arm")
    result = Comparison(arm, arm, "iou", list(range(len(values))), list(values), [], None, None, reason)
    if len(values) >= compared.FEWEST_SEEDS and not reason:
        result.p = paired_t_test(values)
        result.tost = compared.tost(values, compared.MARGIN)
    return result


def family(*differences):
    """Comparisons that are corrected together."""
    found = [compare(values) for values in differences]
    correct(found)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@given(st.floats(0.001, 0.999), st.integers(1, 300))
def test_quantiles_of_chi_are_scipys(p, df):
    assert chi_quantile(p, df) == pytest.approx(scipy.stats.chi.ppf(p, df), rel=1e-7, abs=1e-9)


def test_a_probability_that_is_none_has_no_quantile():
    with pytest.raises(ValueError, match="probability"):
        chi_quantile(1.0, 3)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_interval_of_a_spread_covers_it_as_often_as_it_says(n):
    rng = np.random.default_rng(n)
    found = np.array([deviation_interval(x) for x in rng.normal(5, 2, (2500, n))])
    covered = np.mean((found[:, 1] <= 2) & (found[:, 2] >= 2))
    assert abs(covered - 0.95) < 0.02
    assert np.all(found[:, 1] < found[:, 0]) and np.all(found[:, 0] < found[:, 2])


def test_one_value_has_no_spread():
    assert all(math.isnan(value) for value in deviation_interval([0.3]))


def slow_power(effect, pairs, level):
    """The power of a two-sided paired t-test: the normal tails beyond the threshold, integrated over the spread.

    The edges keep the integration from stepping over the few spreads at which the threshold decides.
    """
    df = pairs - 1
    threshold = scipy.stats.t.isf(level / 2, df)

    def rejected(chi):
        limit = threshold * chi / math.sqrt(df)
        shift = effect * math.sqrt(pairs)
        return scipy.stats.chi.pdf(chi, df) * (
            scipy.stats.norm.sf(limit - shift) + scipy.stats.norm.cdf(-limit - shift)
        )

    last = math.sqrt(df) + 10
    per_limit = math.sqrt(df) / threshold  # a spread of so much moves the limit by one
    steps = [(effect * math.sqrt(pairs) + step) * per_limit for step in (-8, -2, 0, 2, 8)]
    edges = sorted({0.0, last, *(min(max(step, 0.0), last) for step in steps)})
    parts = [scipy.integrate.quad(rejected, *ends, epsabs=1e-12, limit=200)[0] for ends in pairwise(edges)]
    return sum(parts)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 6), st.integers(2, 40), st.sampled_from([0.05, 0.05 / 6, 0.001]))
def test_the_power_is_that_of_a_slow_integration(effect, pairs, level):
    assert t_test_power(effect, pairs, level) == pytest.approx(slow_power(effect, pairs, level), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("pairs", [3, 4, 5, 7, 10, 30])
def test_the_smallest_effect_that_is_found_is_statsmodels(pairs):
    theirs = TTestPower().solve_power(nobs=pairs, alpha=0.05, power=0.8, alternative="two-sided")
    assert detectable_effect(pairs) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("pairs", [3, 4, 5, 7, 10, 30])
@pytest.mark.parametrize("tests", [1, 4, 6])
def test_scipys_noncentral_t_finds_that_effect_with_the_power(pairs, tests):
    """At corrected levels the solver of statsmodels 0.15 ends at other effects, as its own power shows."""
    level = 0.05 / tests
    shift = detectable_effect(pairs, 0.8, level) * math.sqrt(pairs)
    threshold = scipy.stats.t.isf(level / 2, pairs - 1)
    upper = scipy.stats.nct.sf(threshold, pairs - 1, shift)  # the lower tail has less than 1e-6
    assert upper == pytest.approx(0.8, abs=1e-6)


@settings(max_examples=12, deadline=None)
@given(st.floats(0.12, 20), st.sampled_from([1, 4, 6]))
def test_the_number_of_pairs_is_the_smallest_from_three_on_that_has_the_power(effect, tests):
    level = 0.05 / tests
    found = pairs_needed(effect, 0.8, level)
    assert found >= 3 and t_test_power(effect, found, level) >= 0.8
    assert found == 3 or t_test_power(effect, found - 1, level) < 0.8


def test_no_spread_takes_the_fewest_seeds_and_a_tiny_effect_more_than_anyone_counts():
    assert seeds_for(2.4, 0.0, tests=6) == 3
    assert pairs_needed(1e-6) is None and pairs_needed(0.0) is None
    assert pairs_needed(0.2, most=100) is None and pairs_needed(0.2, most=1000) == 199


def test_simulated_studies_find_what_their_seeds_could_have_shown():
    """Six tests of independent arms, one of them with a true difference: it is found after Holm in 80 % of the studies."""
    rng = np.random.default_rng(11)
    effect = detectable_effect(5, 0.8, 0.05 / 6)
    found = 0
    studies = 600
    for _ in range(studies):
        differences = rng.normal(0, 1, (6, 5))
        differences[0] += effect
        found += family(*differences)[0].verdict in (compared.DIFFERENT, compared.SMALL)
    assert found / studies >= 0.8 - 4 * math.sqrt(0.16 / studies)
    assert found / studies < 0.9  # a little more than promised, where another test is significant by chance


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts


def slow_holm(p_values):
    """Holm's corrected p: the largest, among the p that are no larger, of each times the number of p not below it."""
    corrected = []
    for p in p_values:
        steps = [smaller * sum(other >= smaller for other in p_values) for smaller in p_values if smaller <= p]
        corrected.append(min(1, max(steps)))
    return corrected


def test_the_slow_reference_of_holm_is_statsmodels():
    for p_values in np.random.default_rng(0).uniform(0, 0.2, (5, 6)):
        assert slow_holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]))


FAMILIES = st.sampled_from([3, 5]).flatmap(lambda seeds: st.lists(seed_values(seeds), min_size=1, max_size=4))


@settings(max_examples=40, deadline=None)
@given(FAMILIES)
def test_p_values_are_those_of_scipy_and_statsmodels(differences):
    found = family(*differences)
    p = [scipy.stats.ttest_1samp(values, 0).pvalue for values in differences]
    margin = compared.MARGIN
    equivalence = [ttost_paired(np.array(values), np.zeros(len(values)), -margin, margin)[0] for values in differences]
    assert [c.p for c in found] == pytest.approx(p, rel=1e-7, abs=1e-12)
    assert [c.tost for c in found] == pytest.approx(equivalence, rel=1e-7, abs=1e-12)
    assert [c.holm for c in found] == pytest.approx(slow_holm(p), rel=1e-7, abs=1e-12)
    assert [c.tost_holm for c in found] == pytest.approx(slow_holm(equivalence), rel=1e-7, abs=1e-12)
    for comparison, values in zip(found, differences, strict=True):
        effect = detectable_effect(len(values), 0.8, 0.05 / len(differences))
        assert comparison.detectable == pytest.approx(effect * np.std(values, ddof=1))
        assert comparison.detectable_alone <= comparison.detectable


def test_each_verdict_is_what_its_p_values_say():
    clear, equal, both, open_ = family([3.0, 3.1, 2.9], [0.01, -0.01, 0.0], [0.1, 0.101, 0.099], [2.0, -1.0, 0.5])
    assert clear.verdict == "different"
    assert equal.verdict == "equivalent"
    assert both.verdict == "different, within ±0.5"
    assert open_.verdict == "inconclusive"
    [untested] = family([1.0, 1.01])
    assert untested.verdict == "not tested" and math.isnan(untested.holm) and math.isnan(untested.detectable)


def test_what_was_not_tested_makes_the_other_tests_no_stricter():
    tested = [compare([0.5, 0.6, 0.9]), compare([0.1, 0.2, 0.4])]
    alone = [compare([0.5, 0.6, 0.9]), compare([0.1, 0.2, 0.4]), compare([1.0, 1.1, 1.2], reason="updates 1 / 2")]
    correct(tested)
    correct(alone)
    assert [c.holm for c in tested] == [c.holm for c in alone[:2]]
    assert [c.detectable for c in tested] == [c.detectable for c in alone[:2]]


@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_arms_are_called_different_in_at_most_one_study_of_twenty(seeds):
    rng = np.random.default_rng(seeds)
    studies = 1000
    wrong = 0
    for _ in range(studies):
        arms = rng.normal(0, 1, (5, seeds))  # four differences to one arm, so they are not independent
        verdicts = [c.verdict for c in family(*(arms[0] - arms[1:]))]
        wrong += any(verdict.startswith("different") for verdict in verdicts)
    assert 0.02 < wrong / studies < 0.05 + 3 * math.sqrt(0.0475 / studies)


@pytest.mark.parametrize("seeds", [3, 5])
def test_arms_at_the_margin_are_called_equivalent_in_at_most_one_study_of_twenty(seeds):
    rng = np.random.default_rng(10 + seeds)
    studies = 1500
    spread = 0.1  # points
    wrong = 0
    for _ in range(studies):
        [found] = family(rng.normal(compared.MARGIN, spread, seeds))
        wrong += found.verdict in (compared.EQUIVALENT, compared.SMALL)
    assert abs(wrong / studies - 0.05) < 4 * math.sqrt(0.0475 / studies)


# ----------------------------------------------------------------------------------------------------------------------
# The recommendation


def test_the_papers_difference_is_that_of_its_table():
    assert paper_difference() == 2.4


def test_the_recommended_seeds_are_the_fewest_that_need_less_than_twice_a_known_spreads_difference():
    assert recommended_seeds(6) == recommended_seeds(4) == 5
    for tests in range(1, 12):
        level = 0.05 / tests
        known = scipy.stats.norm.isf(level / 2) + scipy.stats.norm.isf(0.2)
        seeds = recommended_seeds(tests)
        assert known_spread_effect(seeds, 0.8, level) == pytest.approx(known / math.sqrt(seeds))
        assert detectable_effect(seeds, 0.8, level) < 2 * known / math.sqrt(seeds)
        if seeds > 3:
            assert detectable_effect(seeds - 1, 0.8, level) >= 2 * known / math.sqrt(seeds - 1)


def run_power(capsys, *words):
    power.main(power.get_args_parser().parse_args(words))
    return capsys.readouterr().out


def test_the_readme_has_the_numbers_that_the_command_prints(capsys):
    printed = run_power(capsys)
    rows = {row["seeds"]: row for row in factor_rows(6, 2.4)}
    text = " ".join(README.split())
    found = ", ".join(f"{rows[n]['corrected']:.2f} with {n}" for n in (4, 5, 7, 10))
    assert f"a difference of {rows[3]['corrected']:.2f} times its spread over seeds with 3 seeds, {found}" in text
    spreads = ", ".join(f"{rows[n]['spread']:.2f} with {n}" for n in (4, 5, 7, 10))
    assert (
        f"2.4 points between animals and non-animals are found up to a spread of {rows[3]['spread']:.2f} points" in text
    )
    assert f"with 3 seeds, {spreads}" in text
    assert f"**{recommended_seeds(6)} seeds are recommended**" in text and times_known(4, 6) > 2 > times_known(5, 6)
    for row in rows.values():
        assert f" | {row['corrected']:.2f} | {row['times_known']:.1f} | {row['spread']:.2f} |" in printed
    assert "5 seeds are recommended" in printed


def test_with_a_spread_the_command_counts_the_seeds(capsys):
    printed = run_power(capsys, "--spread", "1.2")
    assert f"2.4 points at a spread of 1.2 take {seeds_for(2.4, 1.2, 6)} seeds for each of 6 tests (Holm)." in printed
    printed = run_power(capsys, "--spread", "100", "--difference", "0.1", "--tests", "1")
    assert "0.1 points at a spread of 100 take > 1,000 seeds for a single test." in printed


# ----------------------------------------------------------------------------------------------------------------------
# The report's words


def draw_nothing(path, *_, **__):
    Image.new("RGB", (1, 1)).save(path)


def report(study):
    """Make the report without drawing -> its text."""
    with mock.patch.multiple(figures, **dict.fromkeys(DRAWING, draw_nothing)):
        main(get_args_parser().parse_args([str(study)]))
    return (study / "report/report.md").read_text()


def table(study, name):
    return json.loads((study / f"report/{name}.json").read_text())


@pytest.fixture(scope="module")
def five_seeds(tmp_path_factory):
    """A study of five seeds; the first few of them are studies of their own."""
    return write_study(tmp_path_factory.mktemp("five") / "study", seeds=range(5), n=30, epochs=2)


@pytest.fixture
def study_of(five_seeds):
    """Make the report of the first seeds of a study -> its text; the plan is put back afterwards."""
    plan = five_seeds / "study.tsv"
    whole = read_plan(plan)

    def make(seeds):
        plan.write_text(write_lines([line for line in whole if line.seed < seeds]))
        return report(five_seeds)

    yield make
    plan.write_text(write_lines(whole))


@pytest.mark.parametrize("seeds", [1, 2])
def test_with_fewer_than_three_seeds_there_is_no_test_and_the_report_says_why(study_of, five_seeds, seeds):
    text = study_of(seeds)
    section = text.split("## Planned differences")[1].split("\n## ")[0]
    assert "p (Holm)" not in section and "verdict" not in section and not re.search(r"\bp = 0", text)
    rows = table(five_seeds, "differences")
    assert len(rows) == 6 and not any({"p", "holm", "tost", "detectable", "verdict"} & set(row) for row in rows)
    if seeds == 1:
        assert "One seed cannot show" in section and "mean [95 % t-interval]" not in section
        return
    assert "2 seeds: the intervals are shown and no test is made." in section
    assert f"only differences of {detectable_effect(2):.1f} times their own spread" in section
    assert all(row["mean_low"] < row["mean"] < row["mean_high"] for row in rows)
    assert all("2 seeds, and tests are made from 3 on" in row["reason"] for row in rows)
    assert "not tested: 2 seeds, and tests are made from 3 on" in text.split("\n## ")[0]


@pytest.mark.parametrize("seeds", [1, 2])
def test_without_three_seeds_what_seeds_can_show_stays_in_units_of_the_spread(study_of, five_seeds, seeds):
    section = study_of(seeds).split("## How many seeds a difference takes")[1].split("\n## ")[0]
    assert "How large the spread is cannot be computed here, since no difference has 3 seeds." in section
    assert "**5 seeds are recommended: " in section and "| 5 | 2.78 | 1.24 | 1.68 | 2.76 | 1.8 | 0.87 |" in section
    assert not (five_seeds / "report/seeds.json").exists()


@pytest.mark.parametrize("seeds", [3, 5])
def test_from_three_seeds_on_each_test_has_a_verdict_and_what_it_could_have_shown(study_of, five_seeds, seeds):
    text = study_of(seeds)
    section = text.split("## Planned differences")[1].split("\n## ")[0]
    for word in ("different", "equivalent", "inconclusive", "could have shown"):
        assert section.count(f"**{word}**: ") == 1
    rows = table(five_seeds, "differences")
    tested = [row for row in rows if row["p"] is not None]
    assert 0 < len(tested) < len(rows)
    effect = detectable_effect(seeds, 0.8, 0.05 / len(tested))
    for row in rows:
        values = [float(word) for word in row["each"].split(", ")]
        if row not in tested:
            assert row["verdict"] == "not tested" and row["detectable"] is None and row["reason"]
            continue
        assert row["detectable"] == pytest.approx(effect * np.std(values, ddof=1), abs=0.02 * effect)
        different = row["holm"] < 0.05
        equivalent = row["tost_holm"] < 0.05
        words = {(0, 0): "inconclusive", (0, 1): "equivalent", (1, 0): "different", (1, 1): "different, within ±0.5"}
        assert row["verdict"] == words[different, equivalent]
        cell = f"{row['detectable']:.2f} | {row['verdict']} |"
        assert cell in section and cell in (five_seeds / "report/report.md").read_text()
    page = (five_seeds / "report/report.html").read_text()
    assert page.count("inconclusive") >= text.count("inconclusive") - 1 and "could have shown" in page


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_seeds_that_a_difference_takes_are_counted_at_the_spread_that_was_seen(study_of, five_seeds, seeds):
    text = study_of(seeds)
    tests = sum(row["p"] is not None for row in table(five_seeds, "differences"))
    rows = table(five_seeds, "seeds")
    assert len(rows) == tests and f"that each of {tests} tests (Holm) finds with power 0.8" in text
    for row in rows:
        assert row["spread_low"] < row["spread"] < row["spread_high"] and row["seeds"] == seeds
        for count in (3, 4, 5, 7, 10):
            effect = detectable_effect(count, 0.8, 0.05 / tests)
            assert row[f"with_{count}"] == pytest.approx(effect * row["spread"])
        limits = [seeds_for(2.4, row[key], tests) for key in ("spread", "spread_low", "spread_high")]
        needed, fewest, most = (power.show_needed(limit) for limit in limits)
        assert row["needed"] == needed and row["needed_range"] == f"{fewest} to {most}"
    assert "seeds for 2.4 points" in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([3.0, 3.1, 2.9], ", a difference beyond the seeds' noise (Holm-corrected p < 0.001)."),
        ([3.0, 3.5, 2.0], ", a difference beyond the seeds' noise (Holm-corrected p = 0.023)."),
        ([0.03, -0.03, 0.0], ": equivalent within ±0.5 points (TOST, Holm-corrected p < 0.001)."),
        ([0.1, 0.101, 0.099], " (Holm-corrected p < 0.001), yet within ±0.5 points (TOST, Holm-corrected p < 0.001)."),
        (
            [2.0, -1.0, 0.5],
            ": inconclusive, neither a difference nor equivalence is shown; 3 seeds could have shown 4.9 points",
        ),
    ],
)
def test_the_sentence_on_a_difference_says_no_more_than_its_verdict(values, words):
    [found] = family(values)
    found.mean = compared.Estimate(*t_interval(values))
    assert words in verdict(found)


def test_where_no_difference_may_be_tested_the_spread_is_shown_all_the_same(tmp_path):
    study = write_study(tmp_path / "study", seeds=(0, 1, 2), n=30, epochs=2, animal_images="per_category")
    text = report(study)
    assert "None of these differences was tested; the reasons stand above." in text
    assert len(table(study, "seeds")) == 6
    assert "not tested: images counted per category." in text.split("\n## ")[0]


def test_another_task_has_verdicts_and_no_equivalence(tmp_path):
    study = write_study(tmp_path / "study", seeds=(0, 1, 2), task="breeds", n=30, epochs=2)
    text = report(study)
    assert "No margin is set within which arms would count as equivalent." in text and "**equivalent**" not in text
    rows = table(study, "task_breeds_differences")
    assert {row["verdict"] for row in rows} <= {"different", "inconclusive", "not tested"}
    assert all((row["detectable"] is None) == (row["verdict"] == "not tested") for row in rows)
    assert len(table(study, "task_breeds_seeds")) == sum(row["p"] is not None for row in rows)
