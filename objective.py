"""The contract between the training loop and what is trained: pre-training objectives and downstream tasks.

An `Objective` says what is trained and how it is judged; `trainer.train(objective, args, dist)` does the rest: schedule,
accumulation, processes, checkpoints, logs. To add one, subclass it in a file of its own and name it in one dictionary:
OBJECTIVES in pretrain.py, or TASKS in tasks.py for a downstream task.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import augment
import data
import engine
import folders
import splits
from batches import Augmentation, Draw, EvalBatches, Examples, TrainBatches, uniform
from data import ImageStore
from engine import Distributed, EngineError, Parser, Precision, Progress
from runs import RunFolder
from splits import Split
from weights import ENCODER_KEYS, identify, load_pretrained


class ScoringNetwork:
    """A network as validation calls it: compiled for the size of the first batch, plain for another.

    The last batch of a list is often smaller than the others, and compiling for its size would take longer than it.
    """

    def __init__(self, plain: nn.Module, compiled: nn.Module):
        self.plain = plain
        self.compiled = compiled
        self.batch_size: int | None = None

    def __call__(self, images: Tensor, *others: Any, **options: Any) -> Any:
        """Call the network on images [B, C, H, W]."""
        if self.batch_size is None:
            self.batch_size = len(images)
        network = self.plain
        if len(images) == self.batch_size:
            network = self.compiled
        return network(images, *others, **options)


class Reading(NamedTuple):
    """Images that a run reads, or their trimaps. size: side of the decoded squares; None: trimaps as they are."""

    images: tuple[str, ...]
    size: int | None
    kind: str = "image"  # or "trimap"
    root: str | None = None  # the folder that the paths are relative to; None: --data_root


class Objective:
    """What is trained and how it is judged.

    __init__ builds the network and lists the images, but reads no pixels (--dry_run ends there). It sets:
    model: the network whose weights are trained and kept (a teacher lives outside it);
    split: the training images; epoch_images: how many of them are a nominal epoch;
    batch_size: images per update.
    """

    name = ""  # the value of --objective or --task; "kind" in config.json
    scores = {"loss": "loss"}  # what validate() returns: key -> words for the report
    select: str | None = None  # the score whose highest value picks the weights; None: the last epoch's
    keep_best = True  # False: keep the last epoch's weights, whatever their score
    recordable = False  # True: loss() depends on batch, parameters and buffers alone, so --cuda_graph may replay it
    betas = (0.9, 0.95)  # of the optimizer
    memory_format = torch.contiguous_format
    model: nn.Module
    split: Split
    epoch_images: int
    batch_size: int
    compiled: ScoringNetwork | None = None  # set by the loop if it compiles the model

    @property
    def scoring_network(self) -> Callable:
        """Give what validation calls: the model, compiled if the loop does so."""
        if self.compiled is None:
            return self.model
        return self.compiled

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        """Add this objective's own flags; those of other objectives never reach config.json."""

    def __init__(self, args: argparse.Namespace, dist: Distributed):
        self.args = args
        self.dist = dist

    def parameter_groups(self) -> list[dict]:
        """Group the trainable parameters by rate and decay, see engine.param_groups."""
        return engine.param_groups(self.model, self.args.weight_decay)

    def flops(self) -> float:
        """Count the floating-point operations of a training step per image."""
        return self.model.flops(training=True)

    def activation_values(self) -> int | None:
        """Estimate how many values an image keeps for the backward pass; None if that is unknown."""
        return None

    def identity(self) -> dict[str, str]:
        """Give what else defines the experiment besides the flags: hashes of lists and checkpoints."""
        return {"train": self.split.sha256}

    def remarks(self) -> list[str]:
        """Say in sentences what every reader of the result must know; the plan and the report repeat them."""
        return []

    def lists(self) -> list[Split]:
        """Give all lists of images that training and validation read."""
        return [self.split]

    def readings(self) -> list[Reading]:
        """List what training, validation and test read. Only self.args are there yet, see list_readings."""
        return []

    def data_title(self) -> str:
        """Name the data: the first line of DATASET.txt, which other data than the study's bring along, or by counts."""
        if getattr(self.args, "images", None):
            return folders.name_folder(self.args.images)
        path = Path(self.args.data_root, "DATASET.txt")
        if path.is_file():
            lines = path.read_text(errors="replace").splitlines()
            return lines[0] if lines else "unknown data"
        photos = {}
        for split in self.lists():
            photos.update(split.manifest["photos"])
        return splits.name_data(photos)

    def draws(self) -> dict[str, Draw]:
        """Name the random numbers that the loss needs of each training image."""
        return {}

    def views(self) -> dict[str, Augmentation]:
        """Name further crops of each training image that the loss compares, and how they are cut."""
        return {}

    def open(self, run: RunFolder) -> TrainBatches:
        """Open caches, stores and validation data; give the training batches."""
        raise NotImplementedError

    def train_batches(self, examples: Examples, augmentation: Augmentation) -> TrainBatches:
        """Make the training batches that the flags ask for, with the objective's draws and views."""
        return TrainBatches(
            examples,
            augmentation,
            batch_size=self.batch_size,
            seed=self.args.seed,
            micro_batch_size=self.args.micro_batch_size,
            draws=self.draws(),
            views=self.views(),
            dist=self.dist,
        )

    def eval_batches(self, store: ImageStore, targets: dict[str, Tensor], batch_size: int) -> EvalBatches:
        """Make batches of all images of a store at input size; targets: name -> tensor [N, ...] on the device."""
        return EvalBatches(
            store,
            img_size=self.args.img_size,
            batch_size=batch_size,
            targets=targets,
            inputs=inputs_of(self.model),
            dist=self.dist,
        )

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Compute the scalar loss of a micro-batch under autocast; calls network exactly once, as DDP requires."""
        raise NotImplementedError

    def after_step(self, step: int, total_steps: int) -> None:
        """Update what follows the network once a global step: a teacher, a centre. step counts from 1."""

    def compile_others(self) -> None:
        """Compile what is called besides the model, such as a teacher; called by the loop if it compiles the model."""

    def validate(self, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Score the network on every process; None on all of them if stopping() became true on one meanwhile."""
        raise NotImplementedError

    def state(self) -> dict:
        """Give what last.pt must hold besides network and optimizer: tensors and plain values."""
        return {}

    def load_state(self, state: dict) -> None:
        """Take back what state() gave."""

    def findings(self) -> dict:
        """Say what open() has found out about the data, for the log: name -> plain values."""
        return {}

    def finish(self) -> dict:
        """Draw figures after the last step; give further metrics.

        "trivial" among them shows what any training must beat: name -> the scores that it has among those of validate().
        """
        return {}

    def export(self, weights: dict[str, Tensor]) -> dict:
        """Make the content of model.pt: weights under facebookresearch/mae's keys, and model_config to rebuild them."""
        raise NotImplementedError


class Task(Objective):
    """A downstream task: trained by finetune.py from a checkpoint or by baseline.py from random weights, tested once.

    A task gives build_model, open, loss, validate and test; one on other images than the pets also gives its lists.
    """

    model_kind = ""  # the kind of network in model_config, see models.BUILDERS
    betas = (0.9, 0.999)
    no_decay = ("cls_token", "pos_embed", "decoder_pos_embed")  # besides all one-dimensional parameters

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        """Add the flags of every task on the pets."""
        Task.add_label_arguments(parser)
        recipe = parser.flags("labels", role="recipe")
        recipe(
            "--pets_listing",
            choices=splits.PETS_LISTS,
            default="list.txt",
            help="every_jpg: all files of the image folder, as in the original code, also those that list.txt leaves out",
        )
        recipe(
            "--pets_division",
            choices=splits.PETS_DIVISIONS,
            default="disjoint",
            help="leaking: shuffle anew for each part, as in the original code: 70 %% of the test images are trained on",
        )

    @staticmethod
    def add_label_arguments(parser: Parser) -> None:
        """Add the flags of every task: how many labels there are, and which weights are kept."""
        arm = parser.flags("labels", role="arm")
        arm(
            "--train_fraction",
            type=engine.fraction,
            default=1.0,
            help="random part of the training images; 0.5 is the half arm",
        )
        arm(
            "--equal_updates",
            action=argparse.BooleanOptionalAction,
            default=False,
            help="as many updates as with all labels; the batch shrinks to the number of images if need be",
        )
        recipe = parser.flags("optimisation", role="recipe")
        recipe(
            "--keep",
            choices=["best", "last"],
            default="best",
            help="the weights to keep: those of the best validation score, or the last epoch's",
        )

    @staticmethod
    def add_transfer_arguments(parser: Parser) -> None:
        """Add the flags that only make sense when training starts from a checkpoint (finetune.py)."""

    def __init__(self, args: argparse.Namespace, dist: Distributed):
        super().__init__(args, dist)
        self.keep_best = args.keep == "best"
        self.frozen = self.encoder_is_frozen()
        # Frozen features must not change from step to step.
        self.drop_path = 0.0 if self.frozen else args.drop_path
        torch.manual_seed(args.seed)
        try:
            self.model = self.build_model(drop_path=self.drop_path, **self.model_options())
        except ValueError as error:
            raise EngineError(str(error)) from None
        # From random weights (baseline.py) there is nothing to choose from.
        self.init_sha256 = load_init(self.model, args.init, dist, part=getattr(args, "load", "all"))
        if self.frozen:
            for name, parameter in self.model.named_parameters():
                if name.startswith(ENCODER_KEYS):
                    parameter.requires_grad = False
        self.split = self.training_split(args.train_fraction)
        self.val_split = self.validation_split()
        self.epoch_images = len(self.split.images)
        if args.equal_updates:
            self.epoch_images = len(self.training_split(1.0).images)
        # A whole epoch is counted in updates, so few images may make smaller batches.
        self.batch_size = min(args.batch_size, len(self.split.images))

    def build_model(self, **options: object) -> nn.Module:
        """Build the network of --model; options: drop_path and model_options()."""
        raise NotImplementedError

    def model_options(self) -> dict:
        """Give what else defines the network besides its name and input size."""
        return {}

    def training_split(self, train_fraction: float) -> Split:
        """List the training images, or the part of them that --train_fraction asks for."""
        return splits.pets_split(
            self.args.data_root,
            "train",
            train_fraction=train_fraction,
            split_seed=self.args.split_seed,
            source=pets_source(vars(self.args)),
        )

    def validation_split(self) -> Split:
        """List the validation images."""
        source = pets_source(vars(self.args))
        return splits.pets_split(self.args.data_root, "val", split_seed=self.args.split_seed, source=source)

    def remarks(self) -> list[str]:
        """Say how many of the test images are trained on, if any are."""
        source = pets_source(vars(self.args))
        if source.division != "leaking":
            return []
        test = set(splits.pets_split(self.args.data_root, "test", source=source).images)
        share = len(test.intersection(self.split.images)) / len(test)
        return [f"this run leaks: {100 * share:.1f} % of the test images are trained on (--pets_division leaking)"]

    def draws(self) -> dict[str, Draw]:
        """Name the draws of stochastic depth; the loss passes them to the network."""
        if self.drop_path == 0 or not hasattr(self.model, "blocks"):
            return {}
        return {"drop_path": uniform(len(self.model.blocks), 2)}

    def encoder_is_frozen(self) -> bool:
        """Tell whether only what follows the encoder is trained."""
        return getattr(self.args, "freeze", "none") == "encoder"

    def parameter_groups(self) -> list[dict]:
        return engine.param_groups(self.model, self.args.weight_decay, self.args.layer_decay, self.no_decay)

    def flops(self) -> float:
        return self.model.flops(training=not self.frozen)

    def lists(self) -> list[Split]:
        return [self.split, self.val_split]

    def readings(self) -> list[Reading]:
        args = self.args
        test = splits.pets_split(args.data_root, "test", source=pets_source(vars(args)))
        return [
            Reading(self.training_split(args.train_fraction).images, args.cache_size),
            Reading(self.validation_split().images, args.img_size),
            Reading(test.images, args.img_size),
        ]

    def identity(self) -> dict[str, str]:
        return {"train": self.split.sha256, "init": self.init_sha256, "val": self.val_split.sha256}

    def export(self, weights: dict[str, Tensor]) -> dict:
        config = {"img_size": self.args.img_size, "kind": self.model_kind, "name": self.args.model}
        return {"model": weights, "model_config": {**config, **self.model_options()}}

    @classmethod
    def test(cls, model: nn.Module, img_size: int, setting: "TestSetting") -> dict[str, np.ndarray]:
        """Score a trained network on the test images -> arrays of test.npz, one row per image (see mean_records)."""
        raise NotImplementedError

    @classmethod
    def summary(cls, records: dict[str, np.ndarray]) -> str:
        """Say in a line what test() found."""
        sums = zip(records["score_names"], records["numerators"].sum(0), records["denominators"].sum(0), strict=True)
        return ", ".join(f"{name} {numerator / denominator:.3f}" for name, numerator, denominator in sums)


def list_readings(kind: type[Objective], args: argparse.Namespace) -> list[Reading]:
    """List what a run will read, which follows from its flags alone: no network is built, no checkpoint needed."""
    unbuilt = kind.__new__(kind)
    unbuilt.args = args
    return unbuilt.readings()


def image_root(data_root: str, flags: dict) -> str:
    """Name the folder that the paths of a run's images are relative to: --images where it was given, else data_root."""
    return flags.get("images") or data_root


def pets_source(flags: dict) -> splits.PetsSource:
    """Say which pets the flags of a run divide, and how; flags of earlier versions mean the default."""
    return splits.PetsSource(flags.get("pets_listing", "list.txt"), flags.get("pets_division", "disjoint"))


@dataclass(frozen=True)
class TestSetting:
    """How evaluate.py tests: where the data are, and on which device, batch size and precision.

    flags: those that the run was trained with, from its config.json.
    """

    __test__ = False  # no test case, whatever its name says to pytest

    data_root: str
    cache_dir: str
    batch_size: int
    dist: Distributed
    precision: Precision
    flags: dict

    def test_split(self) -> Split:
        """List the test images of Oxford-IIIT Pet that belong to the run's training images."""
        return splits.pets_split(self.data_root, "test", source=pets_source(self.flags))

    def open_store(self, images: Sequence[str], size: int) -> ImageStore:
        """Decode images at a size where the cache lacks them, and open them."""
        root = image_root(self.data_root, self.flags)
        options = {"cache_dir": self.cache_dir, "cache_size": size}
        data.build_cache(root, images, progress=Progress, **options)
        return ImageStore(root, images, device=self.dist.device, **options)

    def batches(self, model: nn.Module, store: ImageStore, targets: dict[str, Tensor]) -> EvalBatches:
        """Make batches of all images of a store, scaled as the model takes them; targets: name -> tensor [N, ...]."""
        on_device = {name: target.to(self.dist.device) for name, target in targets.items()}
        return EvalBatches(
            store,
            img_size=store.size,
            batch_size=self.batch_size,
            targets=on_device,
            inputs=inputs_of(model),
            dist=self.dist,
        )

    @torch.no_grad()
    def collect(
        self, batches: EvalBatches, score: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> dict[str, np.ndarray]:
        """Apply score(batch), which gives name -> value of each image [b], to all batches -> name -> values [N]."""
        columns = defaultdict(list)
        with Progress("testing", len(batches), unit="batch") as progress:
            for batch in batches:
                with self.precision.autocast():
                    scores = score(batch)
                for name, values in scores.items():
                    columns[name].append(values)
                progress.update(1)
        return {name: torch.cat(parts).double().cpu().numpy() for name, parts in columns.items()}


def inputs_of(model: nn.Module) -> str:
    """Say how a network takes pixels, see models.INPUTS."""
    return getattr(model, "inputs", "imagenet")


def as_input(image: Image.Image, img_size: int, model: nn.Module, device: torch.device | str) -> Tensor:
    """Squash one image to the size that a network takes, and scale it -> [1, 3, img_size, img_size] on the device."""
    small = np.array(image.convert("RGB").resize((img_size, img_size), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(small).to(device).permute(2, 0, 1)[None].float()
    return augment.scale_pixels(pixels, inputs_of(model))


def mean_records(ids: Sequence[str], **values: np.ndarray) -> dict[str, np.ndarray]:
    """Make test records of scores that are means over images: name -> value of each image [n].

    A score of the report is the sum of its numerators over that of its denominators, so intervals over images follow.
    """
    numerators = np.stack([np.asarray(value, np.float64) for value in values.values()], axis=1)
    return {
        "ids": np.array(ids),
        "score_names": np.array(list(values)),
        "numerators": numerators,
        "denominators": np.ones_like(numerators),
    }


def mean_scores(
    batches: Iterable[dict[str, Tensor]],
    score: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    names: Iterable[str],
    dist: Distributed,
    stopping: Callable[[], bool],
) -> dict[str, float] | None:
    """Average score(batch), which gives the named values of each image [b], over all images; None as in sum_over."""
    zero = torch.zeros((), dtype=torch.float64, device=dist.device)
    totals = {name: zero.clone() for name in (*names, "images")}

    def summed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        sums = {name: values.double().sum() for name, values in score(batch).items()}
        return {**sums, "images": len(batch["images"])}

    sums = sum_over(batches, summed, totals, dist, stopping)
    if sums is None:
        return None
    images = sums.pop("images").item()
    return {name: total.item() / images for name, total in sums.items()}


def sum_over(
    batches: Iterable[dict[str, Tensor]],
    score: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    totals: dict[str, Tensor],
    dist: Distributed,
    stopping: Callable[[], bool],
) -> dict[str, Tensor] | None:
    """Add score(batch) up over all batches of all processes, into totals (name -> zeros on the device).

    None on every process if stopping() became true on one of them meanwhile. The one validation loop of the collection.
    """
    stopped = torch.zeros((), dtype=torch.int64, device=dist.device)
    for batch in batches:
        if stopping():
            stopped += 1
            break
        for name, value in score(batch).items():
            totals[name] += value
    for total in totals.values():
        dist.sum(total)
    if dist.sum(stopped).item():
        return None
    return totals


def load_init(model: nn.Module, path: str | None, dist: Distributed, part: str = "all") -> str | None:
    """Load a checkpoint, or a part of it, into a network and say what was taken; give its SHA-256, which defines the result.

    part: see weights.PARTS.
    """
    if path is None:
        return None
    report = load_pretrained(model, path, part)
    if dist.is_main:
        print(f"init: {report}", flush=True)
    return identify(path)


def open_store(
    args: argparse.Namespace,
    dist: Distributed,
    images: Sequence[str],
    kind: str = "image",
    size: int | None = None,
    root: str | None = None,
) -> ImageStore:
    """Build the decoded cache of these images where it is missing, and open it, on the GPU if it fits.

    kind: image or trimap; size: side of the decoded square (default: --cache_size); root: the folder that the paths are
    relative to (default: that of the run's images).
    """
    size = size or args.cache_size
    root = root or image_root(args.data_root, vars(args))
    options = {"kind": kind, "cache_dir": args.cache_dir, "cache_size": size}
    data.build_cache(root, images, progress=Progress, **options)  # shown by the process that builds
    channels = 3 if kind == "image" else 1
    on_device = fits_on_device(args, dist, len(set(images)) * size**2 * channels)
    store = ImageStore(root, images, device=dist.device, on_device=on_device, **options)
    if not len(store):
        advice = "`python prepare.py verify` names the cause"
        raise EngineError(f"none of the {len(images)} images of this split can be read; {advice}")
    return store


def fits_on_device(args: argparse.Namespace, dist: Distributed, size: int) -> bool:
    """Decide whether decoded images of `size` bytes are kept on the GPU."""
    if dist.device.type != "cuda" or args.cache_device == "cpu":
        return False
    if args.cache_device == "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(dist.device)
    return size < 0.5 * free  # the network gets the other half


def block_activations(blocks: Iterable[nn.Module], tokens: int) -> int:
    """Count the values that pre-norm blocks keep per image for the backward pass.

    About 17 per token and feature (Korthikanti et al. 2022, section 4.1, without the attention matrix).
    """
    return sum(17 * tokens * block.norm1.weight.numel() for block in blocks)


def chosen(flag: str, choices: Iterable[str], default: str, argv: Sequence[str] | None = None) -> str:
    """Look up the value of a flag on the command line before the parser is made whose other flags depend on it."""
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument(flag, choices=list(choices), default=default)
    if argv is None:
        argv = sys.argv[1:]
    known, _ = early.parse_known_args([str(word) for word in argv])
    return getattr(known, flag.lstrip("-"))
