"""What a number of seeds can show: the smallest differences that tests find with power 0.8, and how many seeds to run.

    python power.py                     # in units of the spread over seeds, which no one knows before the first runs
    python power.py --spread 1.2        # in points, and how many seeds find the difference of the paper, 2.4 points
    python power.py --tests 1           # for one planned comparison in place of six

The spread is the standard deviation, over seeds, of the difference between two arms of one seed. Ends with exit code 2 for
a value that is none. Needs numpy alone; trains and reads nothing.
"""

import argparse
import math
import os
import sys

from arms import ANIMAL, ARMS, NON_ANIMAL, PLANNED
from blocks import Table, write_markdown
from comparisons import FEWEST_SEEDS, LEVEL, MARGIN, POWER, SMALL, Comparison, Estimate, number_of_tests
from metrics import detectable_effect, deviation_interval, known_spread_effect, pairs_needed, t_quantile
from study import PlanParser
from tables import Column, Page, make_table

SEEDS = (2, 3, 4, 5, 7, 10)
TESTED_SEEDS = tuple(seeds for seeds in SEEDS if seeds >= FEWEST_SEEDS)
MOST_SEEDS = 1000  # beyond which they are not counted
MOST_TESTS = 1000
STUDY_TESTS = sum(a in ARMS and b in ARMS for a, b in PLANNED)  # others belong to studies of one's own images
TIMES_KNOWN = 2  # a test must need less than twice the difference that it would need if the spread were known


def paper_difference() -> float:
    """Return the paper's difference between pre-training on animals and on non-animals, in points of IoU."""
    animal = ARMS[ANIMAL].paper.iou
    non_animal = ARMS[NON_ANIMAL].paper.iou
    return round(100 * (animal - non_animal), 6)


def times_known(seeds: int, tests: int) -> float:
    """Compare the smallest difference that is found with the one that would be found if the spread were known."""
    level = LEVEL / tests
    return detectable_effect(seeds, POWER, level) / known_spread_effect(seeds, POWER, level)


def recommended_seeds(tests: int) -> int:
    """Find the fewest seeds with which not knowing the spread costs less than TIMES_KNOWN times the difference."""
    seeds = FEWEST_SEEDS
    while times_known(seeds, tests) >= TIMES_KNOWN:
        seeds += 1
    return seeds


def seeds_for(difference: float, spread: float, tests: int) -> int | None:
    """Count the seeds that find a difference at this spread, both in points; None above MOST_SEEDS."""
    effect = difference / spread if spread > 0 else math.inf
    return pairs_needed(effect, POWER, LEVEL / tests, MOST_SEEDS)


# ----------------------------------------------------------------------------------------------------------------------
# Before any run


def factor_columns(tests: int, difference: float | None) -> list[Column]:
    """Name the columns of what seeds can show in units of the spread."""
    columns = [
        Column("seeds"),
        Column("quantile", "97.5 % quantile of t", 2),
        Column("half_width", "95 % interval: ± spreads", 2),
        Column("alone", "one test finds (spreads)", 2),
    ]
    if tests > 1:
        columns.append(Column("corrected", f"each of {tests} tests finds (spreads)", 2))
    columns.append(Column("times_known", "times what a known spread would need", 1))
    if difference is not None:
        columns.append(Column("spread", f"finds {difference:g} points up to a spread of", 2))
    return columns


def factor_rows(tests: int, difference: float | None) -> list[dict]:
    """Compute, for several numbers of seeds, what they can show in units of the spread.

    difference: one of interest in points, for which the spread is computed up to which it is found.
    """
    rows = []
    for seeds in SEEDS:
        quantile = t_quantile(1 - LEVEL / 2, seeds - 1)
        corrected = detectable_effect(seeds, POWER, LEVEL / tests)
        row = {
            "seeds": seeds,
            "quantile": quantile,
            "half_width": quantile / math.sqrt(seeds),
            "alone": detectable_effect(seeds, POWER, LEVEL),
            "corrected": corrected,
            "times_known": times_known(seeds, tests),
        }
        if difference is not None:
            row["spread"] = difference / corrected
        rows.append(row)
    return rows


def in_words(tests: int) -> str:
    """Say how many tests are made together."""
    return "a single test" if tests == 1 else f"each of {tests} tests (Holm)"


def recommendation(tests: int) -> str:
    """Recommend a number of seeds, with its reason in numbers."""
    seeds = recommended_seeds(tests)
    fewer = ", ".join(f"{k} seeds: {times_known(k, tests):.1f} times" for k in range(FEWEST_SEEDS, seeds))
    return (
        f"{seeds} seeds are recommended: the fewest with which {in_words(tests)} needs less than twice the difference that "
        f"it would need if the spread were known, {times_known(seeds, tests):.1f} times ({fewer}). With fewer, at least "
        f"half of it is the price of not knowing the spread; {2 * seeds} seeds bring it down to "
        f"{times_known(2 * seeds, tests):.1f} times."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Beside the tests of a study


def verdict_lines(comparisons: list[Comparison]) -> list[str]:
    """Explain the words of the column of verdicts, and what stands beside each test."""
    tests = number_of_tests(comparisons)
    with_margin = any(not math.isnan(comparison.tost) for comparison in comparisons)
    lines = [f"**different**: p (Holm) is below {LEVEL}."]
    undecided = "the test does not decide"
    if with_margin:
        lines.append(
            f"**equivalent**: p (equivalence, Holm) is below {LEVEL}, so that the difference lies within ±{MARGIN} points; "
            f"**{SMALL}**: both p are."
        )
        undecided = "neither test decides"
    lines.append(
        f"**inconclusive**: {undecided}. It does not say that the arms are equal; they may differ by less than the seeds "
        "could have shown."
    )
    lines.append(
        f"**could have shown**: the smallest true difference that this many seeds find with power {POWER}, if the spread of "
        f"these is the true one, at the level that Holm asks of the smallest p: {LEVEL} / {tests}. Smaller ones are found "
        "less often."
    )
    return lines


def spread_of(comparison: Comparison) -> Estimate:
    """Estimate the spread of a difference over seeds, in points."""
    return Estimate(*deviation_interval(comparison.values))


def with_spread(comparisons: list[Comparison]) -> list[Comparison]:
    """List the comparisons whose spread is known: those that are tested, or where none is, all with enough seeds."""
    enough = [comparison for comparison in comparisons if len(comparison.values) >= FEWEST_SEEDS]
    tested = [comparison for comparison in enough if comparison.tested]
    return tested or enough


def plan_row(comparison: Comparison, tests: int, difference: float | None) -> dict:
    """Compute what more or fewer seeds would show of a comparison, if its spread stayed what it is."""
    spread = spread_of(comparison)
    row: dict = {"label": comparison.label, "seeds": len(comparison.values), "spread": spread}
    for seeds in TESTED_SEEDS:
        row[f"with_{seeds}"] = spread.value * detectable_effect(seeds, POWER, LEVEL / tests)
    if difference is not None:
        row["needed"] = show_needed(seeds_for(difference, spread.value, tests))
        lowest = show_needed(seeds_for(difference, spread.low, tests))
        highest = show_needed(seeds_for(difference, spread.high, tests))
        row["needed_range"] = f"{lowest} to {highest}"
    return row


def show_needed(seeds: int | None) -> str:
    """Write a number of seeds."""
    return f"> {MOST_SEEDS:,}" if seeds is None else str(seeds)


def plan_columns(difference: float | None) -> list[Column]:
    """Name the columns of what more or fewer seeds would show."""
    columns = [Column("label", "difference"), Column("seeds"), Column("spread", "spread [95 %]", 2)]
    columns += [Column(f"with_{seeds}", f"{seeds} seeds", 2) for seeds in TESTED_SEEDS]
    if difference is not None:
        columns.append(Column("needed", f"seeds for {difference:g} points"))
        columns.append(Column("needed_range", "over the interval of the spread"))
    return columns


FACTORS_TEXT = (
    "What seeds can show is a multiple of the spread: the standard deviation, over seeds, of the difference between two "
    "arms of one seed. The table has the multiples; a test finds a true difference that large with power "
    f"{POWER}, the tests of the study at the level that Holm asks of the smallest p."
)


def how_many_seeds(page: Page, name: str, comparisons: list[Comparison], difference: float | None = None) -> None:
    """Show what a number of seeds can show, in general and at the spread that was seen.

    name: of the files; difference: one of interest, in points, for which the seeds are counted.
    """
    tests = number_of_tests(comparisons)
    page.add(FACTORS_TEXT)
    page.table(f"{name}_factors", factor_rows(tests, difference), factor_columns(tests, difference))
    page.add(f"**{recommendation(tests)}**")
    known = with_spread(comparisons)
    if not known:
        page.add(f"How large the spread is cannot be computed here, since no difference has {FEWEST_SEEDS} seeds.")
        return
    page.add(plan_text(known, tests, difference))
    page.table(name, [plan_row(comparison, tests, difference) for comparison in known], plan_columns(difference))


def plan_text(known: list[Comparison], tests: int, difference: float | None) -> str:
    """Say what the table of planned seeds shows."""
    text = (
        f"In points, at the spread that these seeds have: the smallest difference that {in_words(tests)} finds with power "
        f"{POWER}, by the number of seeds. The spread itself is known no better than its interval says."
    )
    if not known[0].tested:
        text += " None of these differences was tested; the reasons stand above."
    if difference is not None:
        text += (
            f" {difference:g} points: what lies between animals and non-animals in the paper's Table 2; at least "
            f"{FEWEST_SEEDS} seeds."
        )
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def points(word: str) -> float:
    """Read a number of points; raise ArgumentTypeError unless it is above 0 and at most 100."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"points are a number above 0 and at most 100, got {word!r}")
    return value


def number_of_comparisons(word: str) -> int:
    """Read a whole number; raise ArgumentTypeError unless it is one from 1 to MOST_TESTS."""
    if not (word.isascii() and word.isdigit()) or len(word) > 9 or not 1 <= int(word) <= MOST_TESTS:
        raise argparse.ArgumentTypeError(f"comparisons are a whole number from 1 to {MOST_TESTS}, got {word!r}")
    return int(word)


def get_args_parser() -> argparse.ArgumentParser:
    parser = PlanParser("power.py", allow_abbrev=False, description="What a number of seeds can show")
    parser.add_argument(
        "--tests",
        type=number_of_comparisons,
        default=STUDY_TESTS,
        help=f"planned comparisons that are tested together (default: the study's {STUDY_TESTS}); more of them need "
        "larger differences or more seeds",
    )
    parser.add_argument(
        "--spread",
        type=points,
        help="standard deviation, over seeds, of the difference between two arms of one seed, in points: of earlier runs, "
        "or a guess",
    )
    parser.add_argument(
        "--difference",
        type=points,
        default=paper_difference(),
        help="difference of interest in points (default: the paper's between animals and non-animals, "
        f"{paper_difference():g})",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Print what seeds can show, and with a spread how many it takes."""
    columns = factor_columns(args.tests, args.difference)
    tables = [make_table(factor_rows(args.tests, args.difference), columns)]
    if args.spread is not None:
        tables.append(spread_table(args.spread, args.tests))
    print(write_markdown(tables))
    print(recommendation(args.tests))
    if args.spread is not None:
        needed = show_needed(seeds_for(args.difference, args.spread, args.tests))
        words = f"{needed} seeds for {in_words(args.tests)}"
        print(f"{args.difference:g} points at a spread of {args.spread:g} take {words}.")


def spread_table(spread: float, tests: int) -> Table:
    """Tabulate the differences in points that seeds find at a given spread."""
    rows = []
    for seeds in TESTED_SEEDS:
        alone = spread * detectable_effect(seeds, POWER, LEVEL)
        corrected = spread * detectable_effect(seeds, POWER, LEVEL / tests)
        rows.append({"seeds": seeds, "alone": alone, "corrected": corrected})
    columns = [Column("seeds"), Column("alone", "one test finds (points)", 2)]
    if tests > 1:
        columns.append(Column("corrected", f"each of {tests} tests finds (points)", 2))
    return make_table(rows, columns)


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except BrokenPipeError:  # the reader of this output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
