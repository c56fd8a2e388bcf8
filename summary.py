"""The numbers of a study that matter, in at most three lines for a terminal."""

from arms import ANIMAL, MIXED, NON_ANIMAL, OWN, RESNET, SUPERVISED, ArmKey
from comparisons import Comparison, compare
from groups import Study
from records import SEGMENT
from results import best_trivial

MAIN_ARMS = (ANIMAL, NON_ANIMAL, MIXED, OWN, SUPERVISED, RESNET)
PRETRAINED = (ANIMAL, NON_ANIMAL, MIXED, OWN)


def summary_lines(study: Study, comparisons: list[Comparison]) -> list[str]:
    """Give the main arms' scores, the predictor that looks at no image, and what pre-training changes.

    comparisons: those that have been made; what is missing among them is computed.
    """
    kinds = study.kinds(pretraining=False)
    if not kinds:
        return []
    task = kinds[0]
    keys = [key for key in MAIN_ARMS if study.main_of(key, task)]
    if not keys:
        return []
    score = study.main(keys[0])[0].select
    parts = [f"{study.arms[key].label} {mean_score(study, key, score):.3f}" for key in keys]
    name = "IoU" if task == SEGMENT else f"{task} {score}"
    lines = [f"test {name}: {', '.join(parts)}"]
    if task == SEGMENT:
        trivial = best_trivial(study)
        if trivial:
            lines.append(f"best predictor that looks at no image ({trivial.name}): {trivial.iou:.3f}")
    if SUPERVISED in keys:
        changes = pretraining_changes(study, keys, comparisons)
        if changes:
            lines.append(changes)
    return lines


def mean_score(study: Study, key: ArmKey, score: str) -> float:
    """Average the test score of an arm over its seeds."""
    values = [run.score(score) for run in study.main(key)]
    return sum(values) / len(values)


def pretraining_changes(study: Study, keys: list[ArmKey], comparisons: list[Comparison]) -> str:
    """List the differences to the network from scratch; empty where no seed has both."""
    made = {(comparison.a.key, comparison.b.key): comparison for comparison in comparisons}
    parts = []
    interval = ""
    for key in PRETRAINED:
        if key not in keys:
            continue
        comparison = made.get((key, SUPERVISED)) or compare(study, key, SUPERVISED)
        if not comparison.values:
            continue
        estimate = comparison.mean
        interval = "95 % t-interval over seeds"
        if len(comparison.values) == 1:
            [estimate] = comparison.images
            interval = "95 % bootstrap interval over test images"
        words = f"{study.arms[key].images} {estimate.points(1)}"
        parts.append(words)
    if not parts:
        return ""
    return f"pre-trained − scratch, points [{interval}]: {', '.join(parts)}"
