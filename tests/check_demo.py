"""Check the claims of the demo on a finished study.

    python tests/check_demo.py runs/demo

Prints each claim with what was measured; exit code 1 if one does not hold. Claims on how well a network does are those of
the drawn photos; a demo on other photos must only beat what can be had without looking at them.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from arms import ANIMAL, RESNET, SUPERVISED, ArmKey
from metrics import dataset_scores, paired_bootstrap, scores
from records import RunRecord, load_run
from study import read_lines

LEAST_IOU = 0.75
LEAST_BORDER_IOU = 0.10
MOST_OF_ZERO = 0.95  # share of the loss of predicting zero
DRAWN = "drawn demo photos"
TRIVIAL = ("all_animal", "all_background", "mean_mask")


class Claim(NamedTuple):
    """Something that a demo must show, and whether it does."""

    text: str
    holds: bool


def test_iou(counts: np.ndarray) -> np.ndarray:
    """Score counts [..., 3, 3] by the study's IoU."""
    return scores(counts)["iou"]


def load_study(study: Path) -> dict[ArmKey, RunRecord]:
    """Read all runs of a study of one seed. Raises ValueError if one of them is missing or damaged."""
    runs = {}
    for line in read_lines((study / "study.tsv").read_text()):
        run = load_run(study, line)
        if run.problem:
            raise ValueError(f"{line.folder}: {run.problem}")
        runs[run.key] = run
    return runs


def load_reference(study: Path) -> dict[str, float]:
    """Read the test IoU of the predictors that look at no image."""
    with np.load(study / "reference.npz") as arrays:
        return {name: float(dataset_scores(arrays[f"counts_{name}"])["iou"]) for name in TRIVIAL}


def check_pretraining(run: RunRecord) -> list[Claim]:
    """Check that a pre-training ends below predicting zero on every kind of image."""
    claims = []
    for kind, zero in run.metrics["predict_zero"].items():
        loss = run.metrics["last"][f"loss_{kind}"]
        text = f"{run.name}: loss {loss:.3f} on images {kind} is below {MOST_OF_ZERO} x predicting zero ({zero:.3f})"
        claims.append(Claim(text, loss < MOST_OF_ZERO * zero))
    return claims


def check_beats_trivial(run: RunRecord, reference: dict[str, float], names: tuple[str, ...]) -> Claim:
    """Check that a network beats predictors that look at no image."""
    bound = max(reference[name] for name in names)
    return Claim(f"{run.name}: test IoU {run.iou:.3f} beats {', '.join(names)} ({bound:.3f})", run.iou > bound)


def check_best(runs: list[RunRecord]) -> list[Claim]:
    """Check that the best network outlines pets well, and sees the border at all."""
    best = max(runs, key=test_iou_of)
    border = best.score("iou_border")
    return [
        Claim(f"{best.name}: the best test IoU {best.iou:.3f} reaches {LEAST_IOU}", best.iou >= LEAST_IOU),
        Claim(f"{best.name}: its border IoU {border:.3f} reaches {LEAST_BORDER_IOU}", border >= LEAST_BORDER_IOU),
    ]


def test_iou_of(run: RunRecord) -> float:
    return run.iou


def check_pretraining_helps(pretrained: RunRecord, scratch: RunRecord) -> Claim:
    """Check that pre-training is worth more than the test images leave uncertain."""
    found = paired_bootstrap(pretrained.test["counts"], scratch.test["counts"], test_iou)
    interval = f"{100 * found.value:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    text = f"{pretrained.name} - {scratch.name}: {interval} of test IoU are above 0"
    return Claim(text, bool(found.low > 0))


def check_study(study: Path) -> list[Claim]:
    """Check all claims on a finished study."""
    runs = load_study(study)
    reference = load_reference(study)
    claims = []
    tested = []
    for run in runs.values():
        if run.stage == "pretrain":
            claims += check_pretraining(run)
        else:
            tested.append(run)
    drawn = runs[ANIMAL].config["data"]["title"] == DRAWN
    for run in tested:
        names = TRIVIAL
        if run.key == RESNET and not drawn:
            names = ("all_animal", "all_background")  # too few photos, too few updates for more
        claims.append(check_beats_trivial(run, reference, names))
    if drawn:
        claims += check_best(tested)
        claims.append(check_pretraining_helps(runs[ANIMAL], runs[SUPERVISED]))
    return claims


def main() -> int:
    """Print the claims -> exit code."""
    parser = argparse.ArgumentParser("check_demo.py", description="Check the claims of the demo on a finished study")
    parser.add_argument("study", type=Path, help="folder that run_all.sh --demo wrote")
    args = parser.parse_args()
    try:
        claims = check_study(args.study)
    except (ValueError, OSError, KeyError) as error:
        print(f"check_demo.py: error: {args.study} is no finished demo: {error}", file=sys.stderr)
        return 1
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}: {claim.text}")
    failed = [claim for claim in claims if not claim.holds]
    for claim in failed:
        print(f"check_demo.py: this does not hold: {claim.text}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
