"""Pre-training objectives: what they share, and the flags that choose their images.

An objective of pretrain.py subclasses `Pretraining` in a file of its own, see objectives/. Each is trained on a split of
COCO or on one's own images, validated on the same fixed images with the same fixed draws, and keeps its encoder under the
same keys, so that everything downstream takes any of them.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import folders
import splits
from batches import Augmentation, EvalBatches, Examples, TrainBatches
from data import ImageStore
from engine import Distributed, EngineError, Parser, at_least, fraction
from meters import Meter, MeterPhotos
from models import ViT
from objective import Objective, Reading, load_init, open_store, sum_over
from runs import RunFolder
from splits import Split
from weights import ENCODER_KEYS

LARGEST_VALIDATION_BATCH = 256
VALIDATION_SEED = 20170  # of what pre-training validates with: masks, noise


class Pretraining(Objective):
    """An objective of pretrain.py: trained on a split of COCO, judged on fixed animal and non-animal images of val2017.

    With --images it is trained on one's own images and judged on a few of them that are held out, in the list "held_out".

    A subclass gives build_model and loss. Random numbers that the loss needs come from draws(); validation takes them from
    one fixed seed, so they are the same for every arm, seed and machine. The encoder kept in model.pt is the part of the
    network that has the keys of models.ViT; `encoder` is the one that --meters measures.
    """

    meters = False  # whether the features are measured at each validation unless a flag says otherwise
    scores = {"loss_animal": "loss on animal images", "loss_non_animal": "loss on non-animal images"}

    def __init__(self, args: argparse.Namespace, dist: Distributed):
        super().__init__(args, dist)
        torch.manual_seed(args.seed)
        try:
            self.model = self.build_model()
        except ValueError as error:
            raise EngineError(str(error)) from None
        self.init_sha256 = load_init(self.model, args.init, dist)
        self.split = self.training_split()
        self.held_out = self.validation_splits()
        self.scores = self.score_names()
        if args.meters:
            self.scores = {**self.scores, **self.meter_photos.scores()}
        # Images that an objective leaves out shorten its list, not its schedule.
        self.epoch_images = images_of_an_epoch(args, self.image_lists)
        self.batch_size = args.batch_size

    def build_model(self) -> nn.Module:
        """Build the network of --model; a ValueError is reported as wrong use."""
        raise NotImplementedError

    @staticmethod
    def default_blr(args: argparse.Namespace) -> float:
        """Give the base rate where it depends on other flags: an objective that makes it None by default says it here."""
        raise NotImplementedError

    def score_names(self) -> dict[str, str]:
        """Name what score_validation() returns for the validation lists of this run: score -> words for the report."""
        if self.args.images and self.scores is Pretraining.scores:
            return {"loss_held_out": "loss on held-out images"}
        return self.scores

    @property
    def encoder(self) -> ViT:
        """Give the encoder that is kept; a teacher, where it is the teacher's."""
        return self.model

    @functools.cached_property
    def meter_photos(self) -> MeterPhotos:
        """Choose the photos that --meters measures: pets where there are some, else images that are held out."""
        if splits.has_pets(self.args.data_root):
            return MeterPhotos.of_pets(self.args.data_root)
        held_out = self.validation_splits().values()
        return MeterPhotos.without_labels(tuple(image for split in held_out for image in split.images))

    @property
    def meter_root(self) -> str | None:
        """Name the folder that the paths of these photos are relative to; None: that of the training images."""
        return self.args.data_root if self.meter_photos.queries else None

    @functools.cached_property
    def image_lists(self) -> "PretrainingLists":
        """What the flags ask for. Only self.args are there yet."""
        return pretraining_lists(self.args)

    def training_split(self) -> Split:
        """List the images to train on."""
        return self.image_lists.train

    def validation_splits(self) -> dict[str, Split]:
        """List the images to validate on: animals and non-animals, or those of one's own that are held out."""
        return self.image_lists.held_out

    def lists(self) -> list[Split]:
        return [self.split, *self.held_out.values()]

    def remarks(self) -> list[str]:
        """Say what of one's own images is left out, and why."""
        return list(self.image_lists.remarks)

    def readings(self) -> list[Reading]:
        lists = [self.training_split(), *self.validation_splits().values()]
        readings = [Reading(split.images, self.args.cache_size, root=self.args.images) for split in lists]
        if self.args.meters:
            root = self.meter_root or self.args.images
            readings.append(Reading(self.meter_photos.images, self.args.img_size, root=root))
        return readings

    def identity(self) -> dict[str, str]:
        validation = {f"val_{name}": split.sha256 for name, split in self.held_out.items()}
        return {"train": self.split.sha256, "init": self.init_sha256, **validation}

    def augmentation(self) -> Augmentation:
        """Say how training images are cropped and flipped."""
        return Augmentation(self.args.img_size, crop_scale=(0.2, 1.0))

    def examples(self, store: ImageStore) -> Examples:
        """Join the training images with what else belongs to each, such as targets."""
        return Examples(store)

    def validation_targets(self, images: Sequence[str]) -> dict[str, Tensor]:
        """Give what validation batches carry besides images: fixed draws, name -> tensor [N, ...]."""
        rng = np.random.default_rng(VALIDATION_SEED)
        return {name: torch.from_numpy(draw(rng, len(images))) for name, draw in self.draws().items()}

    def open(self, run: RunFolder) -> TrainBatches:
        self.run_dir = run.dir
        self.stores: dict[str, ImageStore] = {}
        self.targets: dict[str, dict[str, Tensor]] = {}
        for name, part in self.held_out.items():
            store = open_store(self.args, self.dist, part.images)
            targets = self.validation_targets(store.images)
            self.stores[name] = store
            # On the device once: a copy for each batch would make a GPU wait.
            self.targets[name] = {key: target.to(self.dist.device) for key, target in targets.items()}
        self.meter = None
        if self.args.meters:
            self.meter = self.open_meter()
        store = open_store(self.args, self.dist, self.split.images)
        return self.train_batches(self.examples(store), self.augmentation())

    def open_meter(self) -> Meter:
        """Open the photos that are measured, decoded at input size."""
        photos = self.meter_photos
        options = {"size": self.args.img_size, "root": self.meter_root}
        store = open_store(self.args, self.dist, photos.images, **options)

        def batches(store: ImageStore, targets: dict[str, Tensor]) -> EvalBatches:
            return self.eval_batches(store, targets, self.validation_batch_size)

        return Meter(store, photos, batches, self.dist)

    def validate(self, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Score the objective, and measure the features of its encoder."""
        scores = self.score_validation(step, stopping)
        if scores is None or self.meter is None:
            return scores
        measured = self.meter.measure(self.encoder, stopping)
        if measured is None:
            return None
        return scores | measured

    def score_validation(self, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Average the loss over each list of validation images, each image once."""
        scores = {}
        for name in self.stores:
            mean = self.mean_over(name, self._loss_of_model, stopping)
            if mean is None:
                return None
            scores[f"loss_{name}"] = mean
        return scores

    def _loss_of_model(self, batch: dict[str, Tensor]) -> Tensor:
        return self.loss(self.scoring_network, batch)

    @property
    def validation_batch_size(self) -> int:
        """Images that a process scores at a time."""
        return min(self.args.micro_batch_size or self.args.batch_size, LARGEST_VALIDATION_BATCH)

    def mean_over(
        self, name: str, loss_of: Callable[[dict[str, Tensor]], Tensor], stopping: Callable[[], bool] = lambda: False
    ) -> float | None:
        """Average loss_of(batch) over the images of a validation list; None if a process was to stop meanwhile."""
        store = self.stores[name]
        batches = self.eval_batches(store, self.targets[name], self.validation_batch_size)

        def score(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": loss_of(batch).double() * len(batch["images"])}

        totals = {"loss": torch.zeros((), dtype=torch.float64, device=self.dist.device)}
        sums = sum_over(batches, score, totals, self.dist, stopping)
        if sums is None:
            return None
        return sums["loss"].item() / len(store)

    def export(self, weights: dict[str, Tensor]) -> dict:
        encoder = {key: value for key, value in weights.items() if key.startswith(ENCODER_KEYS)}
        config = {"img_size": self.args.img_size, "kind": "vit", "name": self.args.model}
        return {"model": encoder, "model_config": config}


# What chooses images of COCO, with the defaults.
USUAL_SPLIT = {"split": "animal", "animal_fraction": None, "animal_images": "per_category", "categories": None}


def add_split_arguments(parser: Parser) -> None:
    """Add the flags that choose the images of a pre-training."""
    arm = parser.flags("split", role="arm")
    arm(
        "--split",
        choices=splits.split_names(),
        default=USUAL_SPLIT["split"],
        help="which images to pre-train on; see `prepare.py splits`",
    )
    arm("--animal_fraction", type=float, help="share of animal images in the mixed split, 0 to 1 (default 0.5)")
    arm(
        "--num_images",
        type=at_least(1, int),
        help="size of the split (default: that of the animal split, so that arms are matched)",
    )
    arm(
        "--image_fraction",
        type=fraction,
        default=1.0,
        help="random part of the split's images, trained for as many updates as the whole split",
    )
    arm(
        "--animal_images",
        choices=splits.ANIMAL_IMAGES,
        default=USUAL_SPLIT["animal_images"],
        help="count an image once per animal category (the paper), once, or only if it has exactly one",
    )
    arm(
        "--exclude_categories",
        nargs="+",
        metavar="CATEGORY",
        help="leave out images that show one of these COCO categories: people stand in 60 %% of the non-animal images and "
        "in 31 %% of the animal ones",
    )
    recipe = parser.flags("split", role="recipe")
    recipe("--categories", nargs="+", help="COCO categories that take the place of the animals, for other studies")
    how = parser.flags("split", role="computation")  # its content defines the experiment, not its path
    how(
        "--images",
        metavar="DIR",
        help="pre-train on all image files below this folder instead of a split of COCO; 5 %% of them are held out",
    )


def add_weight_decay_schedule(parser: Parser, start: float = 0.04, end: float = 0.4) -> None:
    """Add the flag of a weight decay that grows over the training, as for DINO and I-JEPA; start is --weight_decay's."""
    parser.set_defaults(weight_decay=start)
    recipe = parser.flags("optimisation", role="recipe")
    recipe(
        "--weight_decay_end",
        type=at_least(0),
        default=end,
        help="weight decay that half a cosine leads to, from --weight_decay",
    )


class PretrainingLists(NamedTuple):
    """What a pre-training reads: training images, lists of validation images by name, and remarks on them.

    whole: how many images there would be without --image_fraction.
    """

    train: Split
    held_out: dict[str, Split]
    whole: int
    remarks: tuple[str, ...] = ()


def pretraining_lists(args: argparse.Namespace) -> PretrainingLists:
    """List the images that the flags of a pre-training ask for; EngineError for flags that contradict each other."""
    if args.image_fraction < 1 and args.num_images is not None:
        raise EngineError("--image_fraction and --num_images both say how many images; leave one of them out")
    if args.images is None:
        whole = select_coco(args, args.num_images)
        held_out = splits.mae_validation(args.data_root, categories=args.categories, cache_dir=args.cache_dir)
        train = part_of(whole, args.image_fraction, functools.partial(select_coco, args))
        return PretrainingLists(train, held_out, len(whole.images))
    for flag, usual in USUAL_SPLIT.items():
        if getattr(args, flag) != usual:
            raise EngineError(f"--{flag} chooses images of COCO, and --images takes their place; leave one of them out")
    own = folders.read_tree(args.images, args.num_images, args.split_seed)
    train = part_of(
        own.train, args.image_fraction, lambda count: folders.read_tree(args.images, count, args.split_seed).train
    )
    return PretrainingLists(train, {"held_out": own.held_out}, len(own.train.images), own.remarks)


def select_coco(args: argparse.Namespace, num_images: int | None) -> Split:
    """Select num_images images of COCO by the flags; None: as many as the flags say."""
    options = {**split_options(args), "num_images": num_images}
    return splits.select_split(args.data_root, args.split, animal_fraction=args.animal_fraction, **options)


def part_of(whole: Split, share: float, select: Callable[[int], Split]) -> Split:
    """Select a share of a list by select(number of images), at least one image."""
    if share == 1:
        return whole
    return select(max(1, round(share * len(whole.images))))


def split_options(args: argparse.Namespace) -> dict:
    """Give the flags that select_split and reference_size share."""
    names = ("num_images", "animal_images", "categories", "split_seed", "cache_dir", "exclude_categories")
    return {name: getattr(args, name) for name in names}


def images_of_an_epoch(args: argparse.Namespace, lists: PretrainingLists) -> int:
    """Count the images of a nominal epoch; --image_fraction does not change it.

    A split of another size than the animal split trains for as many updates as an arm of that size, unless --num_images
    sets the size on purpose. Splits that are shares of animals have that size anyway, unless categories are excluded.
    One's own images are an epoch.
    """
    whole = args.split in splits.ANIMAL_FRACTIONS and not args.exclude_categories
    if args.images or args.num_images is not None or whole:
        return lists.whole
    return splits.reference_size(args.data_root, **split_options(args))
