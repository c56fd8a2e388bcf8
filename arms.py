"""The arms of the study: what each one trains, what it starts from, and how the report names and draws it.

    ARMS["finetune", "animal"].label        # "Finetuned-Animals"
    find_arm("finetune", "dose_0.25").value # 0.25

An arm is one kind of run; a study repeats it for each seed. `study.py plan` turns arms into commands, `report.py` reads
their labels, colours and the paper's values from here. Standard library only. Paper: tables 1 and 2, sections 2.1 and 2.2.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

# Colours of Okabe and Ito (2008), which colour-blind readers can distinguish.
BLACK = "#000000"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
RED = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#808080"

STAGES = ("pretrain", "finetune", "baseline")
SCHEDULE = ("epochs", "epoch_updates", "batch_size", "warmup_epochs")  # flags that say how long and in which batches
ANIMAL_FRACTION = "animal_fraction"
LABEL_FRACTION = "label_fraction"
LABELS = "labels"
NUM_IMAGES = "num_images"
OBJECTIVE = "objective"
SWEEPS = (ANIMAL_FRACTION, LABEL_FRACTION, LABELS, NUM_IMAGES, OBJECTIVE)
AUDIT = "audit"  # the sweep over choices of the original code, which has no values
DOSES = (0, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
LABEL_SHARES = (0.05, 0.1, 0.25, 0.5)  # all labels: the arms that the sweep belongs to
# Epochs of pre-training on labels. 150 epochs of a Masked Autoencoder take as many operations as 83 of these, so that with
# 15 more they equal 100 from random weights.
LABEL_EPOCHS = (15, 50, 100)
SIZE_SHARES = (0.01, 0.05, 0.1, 0.5)  # of the images of a split; all: the arms that the sweep belongs to
# What the sweep over objectives compares, each pre-trained on the images of two arms.
MAE = "mae"
OBJECTIVES = (MAE, "tokens", "splitmask", "ijepa", "dino", "labels")
MAE_DECODER = "mae_decoder"  # a further line of that sweep: the autoencoder, fine-tuned with its decoder
LABEL_RATES = {"none": "1e-3", "mae": "5e-4"}  # base rates of pre-training on labels, by what came before


PRETRAIN_EPOCHS = 150  # the default of pretrain.py
PRETRAIN_WARMUP_EPOCHS = 10


class Style(NamedTuple):
    """How an arm is drawn in every figure: colour, line and marker in matplotlib's notation."""

    colour: str
    line: str
    marker: str


class PaperScores(NamedTuple):
    """A row of the paper's Table 2: loss, IoU in [0, 1], accuracy in percent."""

    loss: float
    iou: float
    accuracy: float


class PaperProtocol(NamedTuple):
    """What the paper says of an arm's training; None where it says nothing."""

    model: str
    img_size: int
    epochs: int
    images: int | None


class ArmKey(NamedTuple):
    """What identifies an arm: a stage of STAGES and a name."""

    stage: str
    name: str


@dataclass(frozen=True)
class Arm:
    """One kind of run. `parent` names the pre-training arm whose weights it starts from; a pre-training may have one too."""

    stage: str
    name: str
    label: str  # in tables and legends
    images: str  # its pre-training images in a few words
    style: Style
    flags: dict[str, object] = field(default_factory=dict)  # of its script, see study.flag_words
    parent: str = ""
    network: str = ""  # empty: the study's --model
    paper: PaperScores | None = None
    protocol: PaperProtocol | None = None
    own_schedule: bool = False  # its schedule (SCHEDULE) need not be that of the other arms
    sweep: str = ""
    value: float | None = None  # its place in the sweep
    line: str = ""  # the line of the sweep's figure that it is a point of

    @property
    def key(self) -> ArmKey:
        return ArmKey(self.stage, self.name)

    @property
    def title(self) -> str:
        """Stage and name, as in the names of run folders."""
        return f"{self.stage}_{self.name}"


@dataclass(frozen=True)
class SweepLine:
    """One line in the figure of a sweep. `own`: the study's arms that are points of it, if their settings are equal."""

    sweep: str
    name: str
    label: str
    style: Style
    own: dict[float, ArmKey]


RESNET = ArmKey("baseline", "resnet50")
SUPERVISED = ArmKey("baseline", "mae")
ANIMAL = ArmKey("finetune", "animal")
HALF = ArmKey("finetune", "half")
NON_ANIMAL = ArmKey("finetune", "non_animal")
MIXED = ArmKey("finetune", "mixed")
PRETRAIN_ANIMAL = ArmKey("pretrain", "animal")
OWN = ArmKey("finetune", "images")  # after pre-training on one's own images, which takes the place of all splits
PRETRAIN_OWN = ArmKey("pretrain", "images")
IMAGENET = ArmKey("finetune", "imagenet")  # starts from a file of published weights


class Control(NamedTuple):
    """An extra arm that changes one thing of a pre-training, to tell what its effect comes from."""

    split: str
    images: str  # in a few words
    flags: dict[str, object]


# The two without people have equally many images. Predicting another image's pixels leaves what all images have in common.
CONTROLS = {
    "animal_no_person": Control("animal", "animals without people", {"exclude_categories": "person"}),
    "non_animal_no_person": Control("non_animal", "non-animals without people", {"exclude_categories": "person"}),
    "other_targets": Control("animal", "animals, other images' pixels", {"targets": "other"}),
}

# Comparisons that were chosen before any result was known.
PLANNED = [
    (ANIMAL, NON_ANIMAL),
    (ANIMAL, MIXED),
    (ANIMAL, HALF),
    (ANIMAL, SUPERVISED),
    (NON_ANIMAL, SUPERVISED),
    (ANIMAL, RESNET),
    (OWN, SUPERVISED),
    (OWN, RESNET),
]

STYLES = {
    "animal": Style(RED, "-", "o"),
    "half": Style(ORANGE, "--", "v"),
    "non_animal": Style(BLUE, "-", "s"),
    "mixed": Style(GREEN, "-", "D"),
    "mae": Style(PURPLE, "-.", "^"),
    "resnet50": Style(BLACK, ":", "X"),
    "pets": Style(SKY, "--", "P"),
    "all": Style(GREY, "--", "*"),
    "images": Style(RED, "-", "o"),
}
OTHER_STYLE = Style(GREY, "-", "o")
OBJECTIVE_STYLES = {
    MAE_DECODER: Style(BLACK, "-", "X"),
    MAE: Style(GREY, "-", "o"),
    "tokens": Style(ORANGE, "-", "s"),
    "splitmask": Style(RED, "-", "D"),
    "ijepa": Style(BLUE, "-", "^"),
    "dino": Style(GREEN, "-", "v"),
    "labels": Style(PURPLE, "-", "P"),
}
OBJECTIVE_LABELS = {
    MAE_DECODER: "MAE with its decoder",
    MAE: "MAE",
    "tokens": "tokens (BEiT)",
    "splitmask": "SplitMask",
    "ijepa": "I-JEPA",
    "dino": "DINO",
    "labels": "labels",
}
LABEL_STYLES = {"none": Style(ORANGE, "--", "s"), "mae": Style(BLUE, "-", "o")}

# Shades between the two ends of a scale (matplotlib's cividis), closer together for large shares.
DOSE_STYLES = {
    0: Style("#00224e", "-", "o"),
    0.05: Style("#3c4a6c", "-", "^"),
    0.1: Style("#535a6d", "-", "v"),
    0.25: Style("#7d7c78", "-", "p"),
    0.5: Style("#b0a571", "-", "<"),
    0.75: Style("#dbc75a", "-", "^"),
    1: Style("#fee838", "-", "8"),
}

IMAGES = {
    "animal": "animals",
    "non_animal": "non-animals",
    "mixed": "mixed",
    "pets": "Pets",
    "all": "all of COCO",
    "images": "own images",
    "mae": "no pre-training",
}


def pretrain_arm(split: str, protocol: PaperProtocol | None = None) -> Arm:
    """Describe pre-training on a split of splits.py."""
    images = IMAGES.get(split, split)
    style = STYLES.get(split, OTHER_STYLE)
    label = f"pre-training ({images})"
    return Arm("pretrain", split, label, images, style, {"split": split}, protocol=protocol)


def own_arms() -> tuple[Arm, Arm]:
    """Describe pre-training on one's own images, which --images of pretrain.py names, and the fine-tuning that follows."""
    images = IMAGES["images"]
    style = STYLES["images"]
    pretraining = Arm("pretrain", PRETRAIN_OWN.name, f"pre-training ({images})", images, style)
    return pretraining, Arm("finetune", OWN.name, "Finetuned-Own", images, style, parent=PRETRAIN_OWN.name)


def extra_arms(split: str) -> list[Arm]:
    """Describe pre-training on a further split and the fine-tuning that follows it, or a control."""
    if split in CONTROLS or split == IMAGENET.name:
        return control_arms(split)
    pretraining = pretrain_arm(split)
    label = {"pets": "Finetuned-Pets", "all": "Finetuned-All"}.get(split, f"Finetuned-{split}")
    finetuning = Arm("finetune", split, label, pretraining.images, pretraining.style, parent=split)
    return [pretraining, finetuning]


def control_arms(name: str) -> list[Arm]:
    """Describe a control of CONTROLS, or the fine-tuning of published ImageNet weights."""
    if name == IMAGENET.name:
        style = Style(BLACK, "-.", "d")
        return [Arm("finetune", name, "Finetuned-ImageNet", "ImageNet, published weights", style, {"load": "encoder"})]
    control = CONTROLS[name]
    style = STYLES[control.split]._replace(line=":")
    flags = {"split": control.split, **control.flags}
    pretraining = Arm("pretrain", name, f"pre-training ({control.images})", control.images, style, flags)
    return [pretraining, Arm("finetune", name, f"Finetuned, {control.images}", control.images, style, parent=name)]


def dose_arms(share: float) -> tuple[Arm, Arm]:
    """Describe pre-training on a mixture with this share of animals, and the fine-tuning that follows it."""
    name = f"dose_{share:g}"
    images = f"{100 * share:g} % animals"
    flags = {"split": "mixed", "animal_fraction": share, "animal_images": "unique"}
    place = {"sweep": ANIMAL_FRACTION, "value": float(share), "line": "dose"}
    style = DOSE_STYLES.get(share, OTHER_STYLE)
    pretraining = Arm("pretrain", name, f"pre-training ({images})", images, style, flags, **place)
    finetuning = Arm("finetune", name, images, images, style, parent=name, **place)
    return pretraining, finetuning


def label_arm(arm: Arm, share: float) -> Arm:
    """Describe an arm with this share of the labels, at as many updates as with all of them."""
    name = f"{arm.name}_labels_{share:g}"
    words = f"{arm.images}, {100 * share:g} % of labels"
    flags = {"train_fraction": share, "equal_updates": True}
    place = {"sweep": LABEL_FRACTION, "value": float(share), "line": arm.name}
    return Arm(arm.stage, name, words, words, arm.style, flags, arm.parent, **place)


def label_pretraining_arms(before: str, epochs: float) -> list[Arm]:
    """Describe pre-training on the labels of animal images, and the fine-tuning that follows it from the encoder alone.

    before: what comes first, "none" or "mae", the study's autoencoder. epochs: of labels; 0 fine-tunes what came first.
    """
    name = f"labels_{before}_{epochs:g}"
    words = f"{epochs:g} epochs of labels"
    first = ""
    if before == "mae":
        first = "animal"
        words = f"MAE, then {words}" if epochs else "MAE, its encoder alone"
    style = LABEL_STYLES[before]
    place = {"sweep": LABELS, "value": float(epochs), "line": before}
    load = {"load": "encoder"}  # pre-training on labels has no decoder, so no arm keeps one
    if epochs == 0:
        return [Arm("finetune", name, words, words, style, load, first, **place)]
    flags = {"objective": "labels", "split": "animal", "epochs": f"{epochs:g}", "blr": LABEL_RATES[before]}
    pretraining = Arm("pretrain", name, f"pre-training ({words})", words, style, flags, first, **place)
    return [pretraining, Arm("finetune", name, words, words, style, load, name, **place)]


def label_sweep_arms(lengths: Iterable[float]) -> list[Arm]:
    """Describe pre-training on labels for each of these numbers of epochs, from random weights and after the MAE."""
    arms = label_pretraining_arms("mae", 0)
    for before in LABEL_RATES:
        for epochs in lengths:
            arms.extend(label_pretraining_arms(before, epochs))
    return arms


def size_arms(split: str, share: float) -> tuple[Arm, Arm]:
    """Describe pre-training on this share of a split's images, at as many updates as on all, and the fine-tuning."""
    name = f"{split}_images_{share:g}"
    images = f"{100 * share:g} % of the {IMAGES[split]}"
    flags = {"split": split, "image_fraction": share}
    place = {"sweep": NUM_IMAGES, "value": float(share), "line": split}
    style = STYLES[split]
    pretraining = Arm("pretrain", name, f"pre-training ({images})", images, style, flags, **place)
    return pretraining, Arm("finetune", name, images, images, style, parent=name, **place)


def size_sweep_arms(shares: Iterable[float]) -> list[Arm]:
    """Describe pre-training on each of these shares of the animal images and of the non-animal ones."""
    arms: list[Arm] = []
    for key in SIZE_SWEEP:
        for share in shares:
            arms.extend(size_arms(key.name, share))
    return arms


def objective_arms(objective: str, split: str) -> tuple[Arm, Arm]:
    """Describe pre-training by an objective on a split, and the fine-tuning that follows it from the encoder alone."""
    name = f"{OBJECTIVE}_{objective}_{split}"
    label = f"{OBJECTIVE_LABELS[objective]}, {IMAGES[split]}"
    flags: dict[str, object] = {"objective": objective, "split": split, "meters": True}
    if objective == "labels":  # whose usual schedule is shorter
        flags |= {"epochs": PRETRAIN_EPOCHS, "warmup_epochs": PRETRAIN_WARMUP_EPOCHS}
    style = OBJECTIVE_STYLES[objective]
    place = {"sweep": OBJECTIVE, "line": objective}
    images = IMAGES[split]
    pretraining = Arm("pretrain", name, f"pre-training ({label})", images, style, flags, **place)
    return pretraining, Arm("finetune", name, label, images, style, {"load": "encoder"}, name, **place)


def decoder_arm(split: str) -> Arm:
    """Describe the fine-tuning of an autoencoder of the sweep over objectives with its decoder."""
    place = {"sweep": OBJECTIVE, "line": MAE_DECODER}
    label = f"{OBJECTIVE_LABELS[MAE_DECODER]}, {IMAGES[split]}"
    name = f"{OBJECTIVE}_{MAE_DECODER}_{split}"
    parent = f"{OBJECTIVE}_{MAE}_{split}"
    return Arm("finetune", name, label, IMAGES[split], OBJECTIVE_STYLES[MAE_DECODER], {}, parent, **place)


def objective_sweep_arms(own_autoencoders: bool) -> list[Arm]:
    """Describe each objective on animal and on non-animal images.

    own_autoencoders: False takes the study's autoencoders; True trains some for the sweep, where its updates are others.
    """
    arms: list[Arm] = []
    for objective in OBJECTIVES:
        for key in OBJECTIVE_SWEEP:
            pretraining, finetuning = objective_arms(objective, key.name)
            if objective != MAE:
                arms += [pretraining, finetuning]
            elif own_autoencoders:
                arms += [pretraining, finetuning, decoder_arm(key.name)]
            else:
                arms.append(replace(finetuning, parent=key.name))
    return arms


def pretrained_arms() -> list[Arm]:
    """Describe the paper's three pre-trainings."""
    return [
        pretrain_arm("animal", PaperProtocol("mae_base", 224, 150, 25_739)),
        pretrain_arm("non_animal"),
        pretrain_arm("mixed", PaperProtocol("mae_base", 224, 150, 25_918)),
    ]


def finetuned_arms() -> list[Arm]:
    """Describe the paper's four fine-tunings."""
    return [
        Arm(
            "finetune",
            "animal",
            "Finetuned-Animals",
            IMAGES["animal"],
            STYLES["animal"],
            parent="animal",
            paper=PaperScores(0.34, 0.785, 86.7),
            protocol=PaperProtocol("mae_base", 224, 100, 5_144),
        ),
        Arm(
            "finetune",
            "half",
            "Finetuned-Half",
            IMAGES["animal"],
            STYLES["half"],
            flags={"train_fraction": 0.5},
            parent="animal",
            paper=PaperScores(0.35, 0.757, 86.5),
        ),
        Arm(
            "finetune",
            "non_animal",
            "Finetuned-Non-Animals",
            IMAGES["non_animal"],
            STYLES["non_animal"],
            parent="non_animal",
            paper=PaperScores(0.37, 0.761, 85.4),
        ),
        Arm(
            "finetune",
            "mixed",
            "Finetuned-Mixed",
            IMAGES["mixed"],
            STYLES["mixed"],
            parent="mixed",
            paper=PaperScores(0.32, 0.781, 86.8),
        ),
    ]


def baseline_arms() -> list[Arm]:
    """Describe the paper's two networks without pre-training."""
    return [
        Arm("baseline", "mae", "Supervised MAE", IMAGES["mae"], STYLES["mae"], paper=PaperScores(0.45, 0.699, 82.8)),
        Arm(
            "baseline",
            "resnet50",
            "ResNet-50",
            IMAGES["mae"],
            STYLES["resnet50"],
            network="resnet50",
            paper=PaperScores(0.40, 0.765, 89.3),
            protocol=PaperProtocol("resnet50", 224, 100, None),
            own_schedule=True,
        ),
    ]


# The arms of the paper, in the order in which they are run.
ARMS = {arm.key: arm for arm in [*pretrained_arms(), *finetuned_arms(), *baseline_arms()]}
TABLE_2 = [RESNET, SUPERVISED, ANIMAL, HALF, NON_ANIMAL, MIXED]  # in the paper's order
LABEL_SWEEP = [ANIMAL, NON_ANIMAL, MIXED, SUPERVISED]  # the arms that the sweep of labels is made for
SIZE_SWEEP = [ANIMAL, NON_ANIMAL]  # and those of the sweeps over the number of images, and over objectives
OBJECTIVE_SWEEP = [ANIMAL, NON_ANIMAL]


class Choice(NamedTuple):
    """A choice of the original code (see protocols.py) that an audit makes alone, on top of what a partner arm does."""

    name: str
    label: str  # in tables and figures
    partner: ArmKey  # the arm of ours that it is compared with
    flags: dict[str, object]  # what changes
    in_pretraining: bool = False  # the flags are those of pre-training
    remark: str = ""  # what a reader of its difference must know

    @property
    def key(self) -> ArmKey:
        """The arm that is tested."""
        return ArmKey(self.partner.stage, f"{AUDIT}_{self.name}")


CHOICES = [
    Choice("leak", "leaking split", ANIMAL, {"pets_division": "leaking"}, remark="test images are trained on"),
    Choice("reshape", "reshaped output", ANIMAL, {"output": "reshape"}),
    Choice("layer_decay", "layer decay from scratch", SUPERVISED, {"layer_decay": 0.75}),
    Choice("raw_pixels", "loss of raw pixels", ANIMAL, {"norm_pix_loss": False}, in_pretraining=True),
    Choice("unit_inputs", "inputs not normalised", ANIMAL, {"inputs": "unit"}),
    Choice(
        "bilinear", "bilinear trimaps", ANIMAL, {"trimap_resize": "bilinear"}, remark="the test trimaps change as well"
    ),
    Choice("last", "last epoch's weights", ANIMAL, {"keep": "last"}, remark="the same training, other weights kept"),
    Choice("elastic", "elastic deformation", ANIMAL, {"elastic": 50}),
    Choice("positions", "frozen positions", ANIMAL, {"train_positions": False}),
]


def choice_arms(choice: Choice) -> list[Arm]:
    """Describe the arm of a choice, after its own pre-training if the choice is one of pre-training."""
    partner = ARMS[choice.partner]
    name = choice.key.name
    if not choice.in_pretraining:
        flags = {**partner.flags, **choice.flags}
        return [Arm(partner.stage, name, choice.label, partner.images, OTHER_STYLE, flags, partner.parent, sweep=AUDIT)]
    before = ARMS["pretrain", partner.parent]
    flags = {**before.flags, **choice.flags}
    label = f"pre-training ({choice.label})"
    pretraining = Arm("pretrain", name, label, before.images, OTHER_STYLE, flags, sweep=AUDIT)
    finetuning = Arm(partner.stage, name, choice.label, partner.images, OTHER_STYLE, partner.flags, name, sweep=AUDIT)
    return [pretraining, finetuning]


def audit_arms() -> list[Arm]:
    """Describe the arms of an audit."""
    arms: list[Arm] = []
    for choice in CHOICES:
        arms.extend(choice_arms(choice))
    return arms


def audited_flags(arm: Arm) -> set[str]:
    """Name the flags in which an arm of an audit differs from its partner; none for any other arm."""
    for choice in CHOICES:
        if arm.sweep == AUDIT and choice.key.name == arm.name:
            return set(choice.flags)
    return set()


def in_table_order(keys: Iterable[ArmKey]) -> list[ArmKey]:
    """Sort arms as the paper's Table 2 does; further ones keep their order and follow."""

    def place(key: ArmKey) -> int:
        return TABLE_2.index(key) if key in TABLE_2 else len(TABLE_2)

    return sorted(keys, key=place)


def sweep_arms(sweep: str) -> list[Arm]:
    """Describe all arms of a sweep."""
    arms: list[Arm] = []
    if sweep == ANIMAL_FRACTION:
        for share in DOSES:
            arms.extend(dose_arms(share))
    if sweep == LABEL_FRACTION:
        for share in LABEL_SHARES:
            arms.extend(label_arm(ARMS[key], share) for key in LABEL_SWEEP)
    if sweep == LABELS:
        arms.extend(label_sweep_arms(LABEL_EPOCHS))
    if sweep == NUM_IMAGES:
        arms.extend(size_sweep_arms(SIZE_SHARES))
    if sweep == OBJECTIVE:
        arms.extend(objective_sweep_arms(own_autoencoders=False))
    return arms


def sweep_lines(sweep: str) -> list[SweepLine]:
    """Describe the lines in the figure of a sweep."""
    if sweep == ANIMAL_FRACTION:
        own = {0.0: NON_ANIMAL, 0.5: MIXED, 1.0: ANIMAL}
        return [SweepLine(sweep, "dose", "mixtures", Style(BLUE, "-", "o"), own)]
    if sweep == LABELS:
        return [
            SweepLine(sweep, "none", "from random weights", LABEL_STYLES["none"], {0.0: SUPERVISED}),
            SweepLine(sweep, "mae", "after the MAE", LABEL_STYLES["mae"], {}),
        ]
    if sweep == OBJECTIVE:
        return [SweepLine(sweep, name, OBJECTIVE_LABELS[name], style, {}) for name, style in OBJECTIVE_STYLES.items()]
    lines = []
    for key in SIZE_SWEEP if sweep == NUM_IMAGES else LABEL_SWEEP:
        arm = ARMS[key]
        lines.append(SweepLine(sweep, arm.name, arm.images, arm.style, {1.0: key}))
    return lines


def known_arms(extra: Iterable[str] = ()) -> dict[ArmKey, Arm]:
    """Collect the paper's arms, those of one's own images, of further splits, of all sweeps and of the audit."""
    arms = dict(ARMS)
    arms |= {arm.key: arm for arm in own_arms()}
    arms |= {arm.key: arm for arm in audit_arms()}
    for split in extra:
        arms |= {arm.key: arm for arm in extra_arms(split)}
    for sweep in SWEEPS:
        arms |= {arm.key: arm for arm in sweep_arms(sweep)}
    arms |= {arm.key: arm for arm in objective_sweep_arms(own_autoencoders=True)}
    return arms


def find_arm(stage: str, name: str, sweep: str = "", value: float | None = None) -> Arm:
    """Look an arm up by stage and name; one that is not described here is that of a further split or dose."""
    known = known_arms().get(ArmKey(stage, name))
    if known is not None:
        return known
    candidates: Iterable[Arm] = ()
    if sweep == ANIMAL_FRACTION and value is not None:
        candidates = dose_arms(value)
    elif sweep == NUM_IMAGES and value is not None:
        candidates = tuple(arm for key in SIZE_SWEEP for arm in size_arms(key.name, value))
    elif sweep == LABELS and value is not None:
        candidates = tuple(arm for before in LABEL_RATES for arm in label_pretraining_arms(before, value))
    elif not sweep:
        candidates = extra_arms(name)
    for arm in candidates:
        if arm.key == (stage, name):
            return arm
    return Arm(stage, name, name, name, OTHER_STYLE, sweep=sweep, value=value)
