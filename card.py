"""The card of exported weights: what they are, how to load them, which run made them, and whose data they have seen.

    print(make_card(exported, find_run(Path("runs/study/seed0/pretrain_animal/model.pt"))))

All that is said of a run is read from config.json and metrics.json beside its checkpoint. See export.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from augment import MEAN, STD
from engine import EngineError, one_line, read_json

STUDY = (
    "a reimplementation of *Impact of the pre-training data distribution on the fine-tuned performance of MAEs* (2024): "
    "which images should a Masked Autoencoder see before it is fine-tuned?"
)
COCO_LICENCE = "annotations CC BY 4.0; photos under the terms of Flickr and of those who took them"
PETS_LICENCE = "CC BY-SA 4.0"
DRAWN_LICENCE = "drawn by this project's own code, no photo was used"
CODE_LICENCE = "MIT"
UNKNOWN_LICENCES = {
    "MS COCO, if this project pre-trained it": COCO_LICENCE,
    "Oxford-IIIT Pet, if this project fine-tuned it": PETS_LICENCE,
}
FORM = "in the form of"  # what the title of each card says
DRAWN = "drawn demo photos"  # how the title of the demo's data begins


class Run(NamedTuple):
    """What is known of the run that wrote a checkpoint: named facts, and its mask ratio where it has one."""

    training: dict[str, object]
    licences: dict[str, object]
    mask_ratio: float | None


class Records(NamedTuple):
    """What a run has recorded; metrics is empty if it has not ended."""

    name: str
    config: dict
    metrics: dict


@dataclass(frozen=True)
class Exported:
    """What was exported: from where, to where, and how it is loaded."""

    checkpoint: Path
    checkpoint_sha256: str
    model: nn.Module  # the network that it holds
    name: str  # the network's named size
    project: str  # in whose form the weights are
    weights: Path
    weights_sha256: str
    values: int  # numbers in the file of weights
    left_out: str
    code: str  # Python that loads the weights


def make_card(exported: Exported, run: Run | None) -> str:
    """Write a card in Markdown; run: what is known of the checkpoint's run, None if nothing is."""
    training = "Its run is unknown: no config.json of a run lies beside the checkpoint."
    licences: dict[str, object] = UNKNOWN_LICENCES
    if run is not None:
        training = as_list(run.training)
        licences = run.licences
    sections = {
        "Use": f"```python\n{exported.code}\n```",
        "Network": as_list(describe_network(exported)),
        "Training": training,
        "Files": as_list(describe_files(exported)),
        "Licences": as_list({"Code": CODE_LICENCE, **licences}),
    }
    text = f"# {exported.name} {FORM} {exported.project}\n"
    for head, content in sections.items():
        text += f"\n## {head}\n\n{content}\n"
    return text


def as_list(facts: dict[str, object]) -> str:
    """Write named facts as the items of a list."""
    return "\n".join(f"- **{name}**: {one_line(str(value))}" for name, value in facts.items())


def describe_network(exported: Exported) -> dict[str, str]:
    """Describe the network and its input."""
    model = exported.model
    height, width = model.img_size
    facts: dict[str, str] = {}
    if hasattr(model, "blocks"):
        heads = model.blocks[0].attn.num_heads
        facts["Patch size"] = f"{model.patch_size} × {model.patch_size} pixels"
        facts["Encoder"] = f"{len(model.blocks)} blocks, {model.embed_dim} features, {heads} heads"
    facts["Image size"] = f"{height} × {width} pixels, RGB"
    facts["Normalisation"] = normalisation(model)
    if exported.project == "timm":
        facts["Normalisation"] += "; timm's own default may be another"
    facts["Values in this file"] = f"{exported.values:,}"
    facts["Tensors left out"] = exported.left_out
    return facts


def normalisation(model: nn.Module) -> str:
    """Say how the network's images are scaled."""
    if getattr(model, "inputs", "imagenet") == "unit":
        return "none: pixels from 0 to 1"
    return f"pixels from 0 to 1, less ImageNet's mean {MEAN}, divided by its standard deviation {STD}"


def describe_files(exported: Exported) -> dict[str, object]:
    """Give the hashes of the checkpoint and of what was made of it."""
    return {
        f"SHA-256 of {exported.weights.name}": exported.weights_sha256,
        f"SHA-256 of {exported.checkpoint.name}, from which it was exported": exported.checkpoint_sha256,
        "Exported by": f"weights.py with torch {torch.__version__}",
    }


# ---------------------------------------------------------------------------------------------------------------------
# The run


def find_run(checkpoint: Path) -> Run | None:
    """Read what lies beside a checkpoint; None if it is of no run. EngineError if the records are damaged or no run's."""
    folder = checkpoint.absolute().parent
    if checkpoint.name != "model.pt" or not (folder / "config.json").is_file():
        return None
    metrics = {}
    if (folder / "metrics.json").is_file():
        metrics = read_json(folder / "metrics.json")
    records = Records(f"{folder.parent.name}/{folder.name}", read_json(folder / "config.json"), metrics)
    try:
        training = {**describe_data(records.config), **describe_training(records)}
        return Run(training, list_licences(records.config), records.config["args"].get("mask_ratio"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"config.json and metrics.json in {folder} are not those of a run ({error!r})"
        raise EngineError(f"{problem}; copy model.pt into a folder of its own to export it") from None


def describe_data(config: dict) -> dict[str, object]:
    """Name the study, the images and what chose them."""
    split = config["manifest"]["train"]
    return {
        "Study": STUDY,
        "Data": config["data"]["title"],
        "Split": f"{split['name']}, {split['entries']:,} images of which {split['unique']:,} are different",
        "SHA-256 of the split": split["sha256"],
        "Arm": list_flags(config, "arm"),
    }


def describe_training(records: Records) -> dict[str, object]:
    """Say how a network was trained, and how well it does on the validation images."""
    config = records.config
    args = config["args"]
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    hardware = config["hardware"]
    facts = {
        "Run": f"{records.name}, by {config['script']}.py",
        "Objective or task": config["kind"],
        "Seed": f"{args['seed']}, of the split {args['split_seed']}",
        "Starting weights": starting_weights(config),
        "Updates": f"{config['updates']:,} of {config['batch_size']} images",
        "Recipe": f"{list_flags(config, 'network')}, {list_flags(config, 'recipe')}",
        "Validation": list_scores(records),
        "Versions": f"{versions}, git {config['git']}",
        "Hardware": f"{hardware['world_size']} × {hardware['device']}, {config['precision']}",
    }
    if config.get("remarks"):
        facts["Note"] = "; ".join(config["remarks"])
    return facts


def list_flags(config: dict, role: str) -> str:
    """List the flags of a role that have a value."""
    shown = []
    for name, value in config["args"].items():
        if config["roles"][name] == role and value is not None:
            shown.append(f"{name} {value}")
    return ", ".join(shown)


def starting_weights(config: dict) -> str:
    """Name the weights that a training started from."""
    args = config["args"]
    if args.get("init"):
        return f"{args['init']}, SHA-256 {config['experiment']['init']}"
    if args.get("weights"):  # of ResNet-50: a file, or torchvision's
        return f"{args['weights']}, {config['experiment']['init']}"
    return "random"


def list_scores(records: Records) -> str:
    """List the validation scores of the weights that a run has kept."""
    if not records.metrics:
        return "the run has not ended"
    scores = records.metrics["last"]
    if "best" in records.metrics and records.config["args"].get("keep", "best") == "best":
        scores = records.metrics["best"]
    shown = []
    for name, words in records.config["scores"].items():
        if scores.get(name) is not None:
            shown.append(f"{words} {scores[name]:.4f}")
    return ", ".join(shown)


def list_licences(config: dict) -> dict[str, object]:
    """Give the licences of the data that a run has trained on."""
    if config["data"]["title"].startswith(DRAWN):
        return {"Data": DRAWN_LICENCE}
    facts: dict[str, object] = {}
    photos = config["manifest"]["train"]["photos"]
    if any(part != "pets" for part in photos):
        facts["MS COCO"] = COCO_LICENCE
    if "pets" in photos:
        facts["Oxford-IIIT Pet"] = PETS_LICENCE
    if starting_weights(config) != "random":
        facts["Starting weights"] = "what they were trained on has licences of its own"
    return facts
