"""What is checked for GPUs without one: every objective and every task, also one that is named tomorrow.

And what a fault is, that is injected to see whether a check reports it.
"""

import runpy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from fake_cuda import Case, Folders
from small_runs import REPOSITORY, drawn_root

import finetune
from pretrain import OBJECTIVES
from tasks import TASKS

EXAMPLES_FOLDER = REPOSITORY / "tests/examples"
EXAMPLE_OBJECTIVES = {"denoise": runpy.run_path(str(EXAMPLES_FOLDER / "denoise.py"))["Denoising"]}
EXAMPLE_TASKS = {"species": runpy.run_path(str(EXAMPLES_FOLDER / "species.py"))["Species"]}
ON_HOST = "--cache_device cpu"  # the default is on the device
ACCUMULATED = "--micro_batch_size 4"

MAE = Case("pretrain", "mae")
SEGMENTER = Case("finetune", "segment")
LINEAR = Case("finetune", "segment", ("--head linear",))


def with_flags(case: Case, *flags: str) -> Case:
    return case._replace(flags=(*case.flags, *flags))


def variants_of(task: str) -> Iterator[str]:
    """Name the values, besides the default, of each flag of fine-tuning that chooses between networks."""
    parser = finetune.get_args_parser(task)
    for action in parser._actions:
        if parser._roles.get(action.dest) != "network" or action.dest == "model":
            continue
        for choice in action.choices or ():
            if choice != action.default:
                yield f"{action.option_strings[0]} {choice}"


# Small heads.
HEADS = {
    "tokens": ("--vocabulary 16",),
    "splitmask": ("--vocabulary 16 --decoder_depth 1",),
    "dino": ("--prototypes 16 --head_hidden 16 --head_bottleneck 8",),
}
PRETRAININGS = {name: Case("pretrain", name, HEADS.get(name, ())) for name in OBJECTIVES}
NAMED = [*PRETRAININGS.values(), *(Case("finetune", name) for name in TASKS)]
DIFFERENT = [name for name in TASKS if name != "classify"]  # whose networks are those of breeds
VARIANTS = [Case("finetune", name, (flag,)) for name in DIFFERENT for flag in variants_of(name)]
EXAMPLES = [Case("pretrain", name) for name in EXAMPLE_OBJECTIVES] + [Case("finetune", name) for name in EXAMPLE_TASKS]
CONVOLUTIONAL = [Case("baseline", name, ("--model resnet50",)) for name in DIFFERENT]
UNMASKED = with_flags(MAE, "--mask_ratio 0")
MULTI_CROP = with_flags(PRETRAININGS["dino"], "--local_crops 2 --no-colours")  # colours are the other case's
# A contrast between the images of a batch is not accumulated.
UNCONTRASTED = with_flags(PRETRAININGS["splitmask"], "--no-match")
NETWORKS = NAMED + VARIANTS + EXAMPLES + CONVOLUTIONAL + [MULTI_CROP]
NETWORKS += [with_flags(PRETRAININGS["tokens"], f"--tokenizer {name}") for name in ("random_projection", "kmeans")]
NETWORKS += [UNCONTRASTED, with_flags(PRETRAININGS["splitmask"], "--no-inpaint"), UNMASKED]
IMAGES = [with_flags(MAE, ACCUMULATED), with_flags(SEGMENTER, ACCUMULATED)]
IMAGES += [with_flags(MAE, "--targets other"), with_flags(MAE, "--targets other", ON_HOST)]
IMAGES += [
    with_flags(SEGMENTER, "--elastic 50 --trimap_resize bilinear --inputs unit", ON_HOST),
    with_flags(SEGMENTER, "--elastic 50 --crop_scale 1 --no-flips --no-train_positions --optimizer adam --clip_grad 1"),
]

IJEPA = PRETRAININGS["ijepa"]
DINO = PRETRAININGS["dino"]
TOKENS = PRETRAININGS["tokens"]
SPLITMASK = PRETRAININGS["splitmask"]
LABELS = PRETRAININGS["labels"]
BREEDS = Case("finetune", "breeds")


def make_folders(tmp_path_factory) -> Folders:
    """Draw the photos of all cases, once a session, and make the other folders."""
    data_root = drawn_root(tmp_path_factory)
    return Folders(data_root, tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("run"))


# -- Faults -----------------------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


class Fault(NamedTuple):
    """A change of the code, and the error by which the check of a training must report it."""

    inject: Callable[[Patch], None]
    check: Callable[[Case, Folders], None]
    case: Case
    error: type[Exception]
    message: str

    def __str__(self) -> str:
        return f"{self.inject.__name__}-{self.check.__name__}-{self.case.name}"

    def require_report(self, patch: Patch, folders: Folders) -> None:
        """Inject the fault; the check must raise the error."""
        self.inject(patch)
        with pytest.raises(self.error, match=self.message):
            self.check(self.case, folders)


def wrap(patch: Patch, owner: object, name: str, change: Callable) -> None:
    """Replace owner.name by a function that calls change(original, *arguments)."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))
