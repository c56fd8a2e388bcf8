"""Tasks that name what a photo shows: the breeds of Oxford-IIIT Pet, and any folder of classes.

    python finetune.py --task breeds --init runs/study/seed0/pretrain_animal/model.pt
    python finetune.py --task classify --images flowers --init MODEL.pt       # flowers/train/CLASS/*.jpg, val/, test/

Losses, validation, test records and the names of any photo. finetune.py, baseline.py and evaluate.py are the command lines;
breeds are class folders that a list stands for. To add a task whose classes come from elsewhere, subclass Classification
with a read_parts of its own.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import splits
from batches import Augmentation, Examples, TrainBatches
from engine import Distributed, EngineError, Parser, at_least, fraction, seed_number
from folders import Label, LabelledParts, label_parts, read_class_folders
from models import build_classifier
from objective import Reading, Task, TestSetting, as_input, block_activations, mean_records, mean_scores, open_store
from runs import RunFolder
from splits import PETS_FOLDER, PETS_PARTS, PetEntry, Split

VALIDATION_BATCH = 64
FREQUENCIES = "class frequencies (look at no image)"  # the reference predictor


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Weigh images [n] so that all classes among them count the same and the mean weight is 1."""
    counts = np.bincount(labels)
    return len(labels) / (np.count_nonzero(counts) * counts[labels])


def score(network: Callable, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Score each image of a batch [b]; the mean of class_accuracy is that of the classes' accuracies."""
    logits = network(batch["images"]).float()
    predicted = logits.argmax(1)
    right = (predicted == batch["label"]).double()
    return {
        "loss": F.cross_entropy(logits, batch["label"], reduction="none"),
        "accuracy": right,
        "class_accuracy": right * batch["weight"],
        "predicted": predicted,
    }


class Classification(Task):
    """Predict the class of an image; the weights kept are those of the best validation accuracy."""

    model_kind = "classifier"
    scores = {"loss": "cross-entropy", "accuracy": "top-1 accuracy", "class_accuracy": "accuracy, mean over classes"}
    select = "accuracy"
    recordable = True

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        """Add the flags of training on classes."""
        Task.add_label_arguments(parser)
        recipe = parser.flags("classes", role="recipe")
        recipe(
            "--crop_scale",
            type=fraction,
            default=0.5,
            help="smallest crop as a share of the image's area; 1: the image as it is",
        )
        recipe("--flips", action=argparse.BooleanOptionalAction, default=True, help="random horizontal flips")
        recipe(
            "--vertical_flips",
            action=argparse.BooleanOptionalAction,
            default=False,
            help="random vertical flips, for images without an upper edge",
        )
        recipe(
            "--label_smoothing",
            type=at_least(0, maximum=0.99),
            default=0.1,
            help="share of the target spread over all classes; 0.1 as in facebookresearch/mae",
        )
        network = parser.flags("model", role="network")
        network(
            "--pool",
            choices=["mean", "cls"],
            default="mean",
            help="what the head sees of a transformer: mean of the patch tokens, or the class token",
        )

    @classmethod
    def read_parts(cls, data_root: str, flags: dict) -> LabelledParts:
        """Read the labelled images of a run with these flags."""
        raise NotImplementedError

    def __init__(self, args: argparse.Namespace, dist: Distributed):
        self.parts = self.read_parts(args.data_root, vars(args))
        super().__init__(args, dist)
        if hasattr(self.model, "backbone"):  # convolutions are faster with channels last
            self.memory_format = torch.channels_last

    def model_options(self) -> dict:
        return {"num_classes": len(self.parts.classes), "pooling": self.args.pool}

    def build_model(self, **options: object) -> nn.Module:
        return build_classifier(self.args.model, img_size=self.args.img_size, **options)

    def activation_values(self) -> int | None:
        if not hasattr(self.model, "blocks"):
            return None
        return block_activations(self.model.blocks, self.model.num_patches + 1)

    def training_split(self, train_fraction: float) -> Split:
        return self.parts.split("train", train_fraction, self.args.split_seed)

    def validation_split(self) -> Split:
        return self.parts.split("val")

    def remarks(self) -> list[str]:
        """Say what of the images is left out, and why."""
        return list(self.parts.remarks)

    def readings(self) -> list[Reading]:
        args = self.args
        parts = self.read_parts(args.data_root, vars(args))
        train = parts.split("train", args.train_fraction, args.split_seed)
        readings = [Reading(train.images, args.cache_size, root=parts.root)]
        for part in ("val", "test"):
            readings.append(Reading(parts.parts[part], args.img_size, root=parts.root))
        return readings

    def open(self, run: RunFolder) -> TrainBatches:
        args = self.args
        self.val_store = open_store(args, self.dist, self.val_split.images, size=args.img_size)
        targets = targets_of(self.parts.labels_of(self.val_store.images))
        self.val_targets = {name: target.to(self.dist.device) for name, target in targets.items()}
        images = open_store(args, self.dist, self.split.images)
        augmentation = Augmentation(
            args.img_size,
            crop_scale=None if args.crop_scale == 1 else (args.crop_scale, 1.0),
            horizontal_flip=args.flips,
            vertical_flip=args.vertical_flips,
        )
        # Looked up by path: an image that cannot be read takes its label with it.
        labels = self.parts.labels_of(images.images)
        return self.train_batches(Examples(images, targets={"label": labels}), augmentation)

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        images = batch["images"].contiguous(memory_format=self.memory_format)
        logits = network(images, batch.get("drop_path"))
        return F.cross_entropy(logits.float(), batch["label"], label_smoothing=self.args.label_smoothing)

    def validate(self, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Score exactly the validation images, each once."""
        batches = self.eval_batches(self.val_store, self.val_targets, VALIDATION_BATCH)

        def score_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            scores = score(self.scoring_network, batch)
            return {name: scores[name] for name in self.scores}

        return mean_scores(batches, score_of, self.scores, self.dist, stopping)

    def export(self, weights: dict[str, Tensor]) -> dict:
        return {**super().export(weights), "classes": list(self.parts.classes)}

    @classmethod
    def test(cls, model: nn.Module, img_size: int, setting: TestSetting) -> dict[str, np.ndarray]:
        """Score the test images; besides the scores, the records hold the true and the predicted class of each."""
        parts = cls.read_parts(setting.data_root, setting.flags)
        if model.num_classes != len(parts.classes):
            problem = f"the network knows {model.num_classes} classes, {parts.root} has {len(parts.classes)}"
            raise EngineError(f"{problem}; test it on the data that it was trained on")
        store = setting.open_store(parts.parts["test"], img_size)
        labels = parts.labels_of(store.images)
        values = setting.collect(setting.batches(model, store, targets_of(labels)), lambda batch: score(model, batch))
        predicted = values.pop("predicted").astype(np.int64)
        records = mean_records([parts.ids[image] for image in store.images], **values)
        records["denominators"][:, list(values).index("class_accuracy")] = class_weights(labels)
        records |= reference_records(parts.labels_of(parts.parts["train"]), labels, len(parts.classes))
        records |= {"classes": np.array(parts.classes), "truth": labels, "predicted": predicted}
        records["unreadable"] = np.array(store.dropped, str)
        return records

    @classmethod
    def summary(cls, records: dict[str, np.ndarray]) -> str:
        guessed = records["reference_numerators"][:, 1].mean()
        return f"{super().summary(records)}; the most frequent class has accuracy {guessed:.3f}"


def targets_of(labels: np.ndarray) -> dict[str, Tensor]:
    """Give what scoring needs besides images: class numbers int64 [n], and weights float64 [n]."""
    return {"label": torch.from_numpy(labels), "weight": torch.from_numpy(class_weights(labels))}


def reference_records(trained: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Score what looks at no image, the class frequencies of the training images, for test images of these classes [n].

    The report sets it beside the networks: numerators [n, 3] in the order of Classification.scores.
    """
    counts = np.bincount(trained, minlength=num_classes)
    shares = (counts + 1) / (counts.sum() + num_classes)  # a class may have no training image
    right = (labels == counts.argmax()).astype(np.float64)
    numerators = np.stack([-np.log(shares[labels]), right, right * class_weights(labels)], axis=1)
    return {"reference_name": np.array(FREQUENCIES), "reference_numerators": numerators}


# ----------------------------------------------------------------------------------------------------------------------
# The tasks


class Breeds(Classification):
    """The breeds of Oxford-IIIT Pet, as list.txt numbers them."""

    name = "breeds"

    @classmethod
    def read_parts(cls, data_root: str, flags: dict) -> LabelledParts:
        return read_breeds(data_root)


def read_breeds(data_root: str) -> LabelledParts:
    """Label the three parts of the pets by breed. Raises DataError for a list.txt without breeds."""
    entries = splits.read_pets_list(data_root)
    names = name_breeds(entries)
    if len(names) < 2:
        problem = f"{data_root}: all images of list.txt have the class id {entries[0].class_id}"
        raise EngineError(f"{problem}; a list with two breeds or more is needed")
    labels = {}
    for entry in entries:
        name = names[entry.class_id]
        labels[f"{PETS_FOLDER}/images/{entry.name}.jpg"] = Label(name, f"{name}/{entry.name}.jpg")
    parts = {part: splits.pets_split(data_root, part).images for part in PETS_PARTS}
    return label_parts("breeds", data_root, parts, labels, photos={"pets": len(entries)})


def name_breeds(entries: Sequence[PetEntry]) -> dict[int, str]:
    """Name each class id as its photos are named, "pug_12"; by its number where they do not agree on one name."""
    found = defaultdict(set)
    for entry in entries:
        found[entry.class_id].add(entry.name.rpartition("_")[0])
    uses = Counter(name for names in found.values() for name in names)
    named = {}
    for class_id, names in found.items():
        name = min(names)
        agreed = len(names) == 1 and name and uses[name] == 1
        named[class_id] = name if agreed else f"class {class_id}"
    return named


class ClassFolders(Classification):
    """Any folder of classes, in the layout of torchvision's ImageFolder."""

    name = "classify"

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        """Add where the folder is and how one tree is divided."""
        Classification.add_arguments(parser)
        how = parser.flags("classes", role="computation")  # its content defines the experiment, not its path
        how(
            "--images",
            metavar="DIR",
            required=True,
            help="folder with train/, val/ and test/, or with class folders, of which 70 %%, 15 %% and 15 %% are taken",
        )
        recipe = parser.flags("classes", role="recipe")
        recipe("--division_seed", type=seed_number, default=0, help="seed of that division; the same for every --seed")

    @classmethod
    def read_parts(cls, data_root: str, flags: dict) -> LabelledParts:
        if "images" not in flags:
            raise EngineError("--task classify needs --images, the folder with the classes")
        return read_class_folders(flags["images"], flags.get("division_seed", 0))


# ----------------------------------------------------------------------------------------------------------------------
# Any photo


@torch.no_grad()
def classify(model: nn.Module, image: Image.Image, img_size: int, device: torch.device | str = "cpu") -> np.ndarray:
    """Predict the probability of each class for one image -> float32 [num_classes]."""
    logits = model(as_input(image, img_size, model, device)).float()
    return logits.softmax(1)[0].cpu().numpy()
