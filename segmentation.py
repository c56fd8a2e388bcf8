"""The study's task: segment Oxford-IIIT Pet photos into pet, background and border, as their trimaps do.

Training, validation, test records, reference predictors and masks of any photo. finetune.py, baseline.py and evaluate.py
are its command lines.
"""

import argparse
import functools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import augment
import data
import splits
from batches import Augmentation, Examples, TrainBatches
from engine import Distributed, EngineError, Parser, Progress, at_least, fraction
from metrics import BACKGROUND, BORDER, CLASSES, PET, dataset_scores
from models import INPUTS, build_segmenter
from objective import Reading, Task, TestSetting, as_input, block_activations, open_store, pets_source, sum_over
from runs import RunFolder

NUM_CLASSES = len(CLASSES)
VALIDATION_BATCH = 64
PANELS = 6  # test images shown in the report
REFERENCES = ("all_animal", "all_background", "mean_mask")
POSITIONS = ("pos_embed", "decoder_pos_embed")
SMALLEST_ELASTIC = 21  # pixels; smaller images cannot mirror the margin that the deformation's blur needs


def confusion(truth: Tensor, pred: Tensor, classes: int = NUM_CLASSES) -> Tensor:
    """Count pixels per image by class: truth, pred [B, H, W] integers -> int64 [B, classes, classes], rows = truth."""
    labels = torch.arange(classes, device=truth.device)[:, None]
    truth_hot = (truth.flatten(1)[:, None] == labels).double()
    pred_hot = (pred.flatten(1)[:, None] == labels).double()
    return (truth_hot @ pred_hot.mT).long()  # free of synchronisation, and exact: autocast leaves float64 alone


def boundary_band(mask: Tensor, width: int) -> Tensor:
    """Find a mask's pixels within `width` pixels of its outline or the image's edge: bool [B, H, W] -> bool [B, H, W]."""
    outside = F.pad(1 - mask.float(), (width,) * 4, value=1.0)[:, None]
    window = 2 * width + 1
    near = F.max_pool2d(outside, (window, 1), 1)
    near = F.max_pool2d(near, (1, window), 1)
    return mask & (near[:, 0] > 0)


def boundaries(truth: Tensor, pred: Tensor) -> Tensor:
    """Count the boundaries' (intersection, union) of {pet} and of {pet or border}: classes [B, H, W] -> int64 [B, 2, 2].

    A boundary is the band of 2 % of the image's diagonal along a mask's outline (Cheng et al. 2021, Boundary IoU).
    """
    height, width = truth.shape[-2:]
    band_width = max(1, round(0.02 * (height**2 + width**2) ** 0.5))
    counts = []
    for foreground in ((PET,), (PET, BORDER)):
        in_truth = boundary_band(is_any(truth, foreground), band_width)
        in_pred = boundary_band(is_any(pred, foreground), band_width)
        intersection = (in_truth & in_pred).sum((1, 2))
        union = (in_truth | in_pred).sum((1, 2))
        counts.append(torch.stack([intersection, union], 1))
    return torch.stack(counts, 1)


def is_any(classes: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Mark the pixels of some classes: [B, H, W] -> bool [B, H, W]."""
    mask = classes == wanted[0]
    for number in wanted[1:]:
        mask = mask | (classes == number)
    return mask


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits [B, K, h, w] bilinearly to (H, W)."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


class Segmentation(Task):
    """Predict the class of every pixel; the weights kept are those of the best validation IoU."""

    name = "segment"
    model_kind = "segmenter"
    scores = {
        "loss": "cross-entropy",
        "accuracy": "pixel accuracy",
        "iou": "IoU",
        "iou_pet": "IoU pet",
        "iou_background": "IoU background",
        "iou_border": "IoU border",
        "miou": "mIoU",
    }
    select = "iou"
    recordable = True

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        """Add the flags of training on trimaps."""
        Task.add_arguments(parser)
        recipe = parser.flags("trimaps", role="recipe")
        recipe(
            "--crop_scale",
            type=fraction,
            default=0.5,
            help="smallest crop as a share of the image's area; 1: the image as it is",
        )
        recipe(
            "--flips", action=argparse.BooleanOptionalAction, default=True, help="random horizontal and vertical flips"
        )
        recipe(
            "--elastic",
            type=at_least(0),
            default=0.0,
            help="strength alpha of an elastic deformation of image and trimap, in pixels; the original code has 50",
        )
        recipe(
            "--inputs",
            choices=list(INPUTS),
            default="imagenet",
            help="unit: pixels from 0 to 1, as the original code fine-tunes; imagenet: normalised as in pre-training",
        )
        recipe(
            "--trimap_resize",
            choices=data.TRIMAP_RESIZE,
            default="nearest",
            help="bilinear: as in the original code, background appears between pet and border, and what --elastic "
            "fills in counts as pet",
        )
        network = parser.flags("model", role="network")
        network(
            "--output",
            choices=["unpatchify", "reshape"],
            default="unpatchify",
            help="reshape: read the tokens' numbers as flat class planes, as the original code does (MAE decoder only)",
        )
        network(
            "--train_positions",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="train the position embeddings; the original code freezes them (MAE only)",
        )

    @staticmethod
    def add_transfer_arguments(parser: Parser) -> None:
        """Add the choice of the head."""
        network = parser.flags("model", role="network")
        network(
            "--head",
            choices=["decoder", "linear"],
            default="decoder",
            help="linear: one layer on the frozen encoder's features, without decoder",
        )

    def __init__(self, args: argparse.Namespace, dist: Distributed):
        check_combination(args)
        super().__init__(args, dist)
        if not args.train_positions:
            for name, parameter in self.model.named_parameters():
                if name in POSITIONS:
                    parameter.requires_grad = False
        if hasattr(self.model, "backbone"):  # convolutions are faster with channels last
            self.memory_format = torch.channels_last

    def encoder_is_frozen(self) -> bool:
        return super().encoder_is_frozen() or self.model_options().get("head") == "linear"

    def model_options(self) -> dict:
        options = {}
        if "head" in self.args:  # from random weights only the complete network makes sense
            options["head"] = self.args.head
        if self.args.output != "unpatchify":
            options["output"] = self.args.output
        if self.args.inputs != "imagenet":
            options["inputs"] = self.args.inputs
        return options

    def build_model(self, **options: object) -> nn.Module:
        return build_segmenter(self.args.model, img_size=self.args.img_size, **options)

    def activation_values(self) -> int | None:
        if not hasattr(self.model, "blocks"):
            return None
        tokens = self.model.num_patches + 1
        decoder = getattr(self.model, "decoder_blocks", ())
        return block_activations(self.model.blocks, tokens) + block_activations(decoder, tokens)

    def readings(self) -> list[Reading]:
        train, val, test = super().readings()
        as_they_are = [reading._replace(size=None, kind="trimap") for reading in (val, test)]
        return [train, val, test, train._replace(kind="trimap"), *as_they_are]

    def open(self, run: RunFolder) -> TrainBatches:
        args = self.args
        self.val_store = open_store(args, self.dist, self.val_split.images, size=args.img_size)
        truth = data.load_truth(args.data_root, self.val_store.images, args.img_size, args.trimap_resize)
        self.val_truth = truth.to(self.dist.device)
        images = open_store(args, self.dist, self.split.images)
        masks = open_store(args, self.dist, images.images, "trimap")
        augmentation = Augmentation(
            args.img_size,
            crop_scale=None if args.crop_scale == 1 else (args.crop_scale, 1.0),
            horizontal_flip=args.flips,
            vertical_flip=args.flips,
            elastic=args.elastic,
            mask_resize=args.trimap_resize,
            inputs=args.inputs,
        )
        return self.train_batches(Examples(images, masks), augmentation)

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        images = batch["images"].contiguous(memory_format=self.memory_format)
        logits = network(images, batch.get("drop_path"))
        return F.cross_entropy(logits.float(), batch["masks"])

    def validate(self, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Score exactly the validation images, each once, against their trimaps at input size."""
        batches = self.eval_batches(self.val_store, {"truth": self.val_truth}, VALIDATION_BATCH)
        totals = {
            "loss": torch.zeros((), dtype=torch.float64, device=self.dist.device),
            "counts": torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64, device=self.dist.device),
        }
        sums = sum_over(batches, self._score, totals, self.dist, stopping)
        if sums is None:
            return None
        counts = sums["counts"].cpu().numpy()
        found = dataset_scores(counts[None])
        scores = {"loss": sums["loss"].item() / counts.sum().item()}
        for name in self.scores:
            if name != "loss":
                scores[name] = float(found[name])
        return scores

    def _score(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        truth = batch["truth"].long()
        logits = self.scoring_network(batch["images"]).float()
        loss = F.cross_entropy(logits, truth, reduction="sum").double()
        return {"loss": loss, "counts": confusion(truth, logits.argmax(1)).sum(0)}

    @classmethod
    def test(cls, model: nn.Module, img_size: int, setting: TestSetting) -> dict[str, np.ndarray]:
        """Score the test images at input size and at each file's own size."""
        return test_records(model, img_size, setting)

    @classmethod
    def summary(cls, records: dict[str, np.ndarray]) -> str:
        loss = records["loss_sum"].sum() / records["pixels"].sum()
        return f"loss {loss:.3f}, {summary_of(records['counts'])}"


def check_combination(args: argparse.Namespace) -> None:
    """Refuse choices of the original protocol that contradict each other."""
    resnet = args.model == "resnet50"
    linear = getattr(args, "head", "decoder") == "linear"
    if args.output == "reshape" and (resnet or linear):
        where = "resnet50" if resnet else "--head linear"
        raise EngineError(f"--output reshape reads the MAE decoder's tokens, and {where} has no decoder")
    if not args.train_positions and resnet:
        raise EngineError("--no-train_positions freezes position embeddings, and resnet50 has none")
    if resnet and args.optimizer == "adam" and args.elastic:
        raise EngineError("--elastic with --optimizer adam: the original code trains ResNet-50 without augmentation")
    if args.elastic and args.img_size < SMALLEST_ELASTIC:
        raise EngineError(f"--elastic blurs its noise over 41 pixels; --img_size must be at least {SMALLEST_ELASTIC}")


def summary_of(counts: np.ndarray) -> str:
    """Say in a line how good counts [n, 3, 3] are."""
    scores = dataset_scores(counts)
    return f"IoU {scores['iou']:.3f}, accuracy {scores['accuracy']:.3f}, mIoU {scores['miou']:.3f}"


# -- Test records -------------------------------------------------------------------------------------------------------


def open_test_set(setting: TestSetting, size: int) -> tuple[data.ImageStore, Tensor]:
    """Open the test images of a run at a size, with their trimaps uint8 [N, size, size]."""
    store = setting.open_store(setting.test_split().images, size)
    resize = setting.flags.get("trimap_resize", "nearest")
    return store, read_truth(setting.data_root, store.images, size, resize)


@functools.lru_cache(maxsize=2)  # runs of one size share their trimaps
def read_truth(data_root: str, images: tuple[str, ...], size: int, resize: str) -> Tensor:
    return data.load_truth(data_root, images, size, resize)


def choose_panels(ids: np.ndarray) -> np.ndarray:
    """Choose the images that the report shows: spread over the alphabetical list, before any score is known."""
    places = np.linspace(0, len(ids) - 1, min(PANELS, len(ids)))
    return np.argsort(ids)[places.round().astype(int)]


@torch.no_grad()
def test_records(model: nn.Module, img_size: int, setting: TestSetting) -> dict[str, np.ndarray]:
    """Score the test images -> arrays of test.npz; those named panel_* are the examples that the report shows.

    Per image: counts [n, 3, 3], boundary [n, 2, 2] and loss_sum [n] at input size; counts_native and boundary_native at
    the size of the file.
    """
    store, truth = open_test_set(setting, img_size)
    ids = np.array([Path(image).stem for image in store.images])
    shown = choose_panels(ids)
    columns = defaultdict(list)
    panels = {}
    with Progress("testing", len(ids)) as progress:
        for batch in setting.batches(model, store, {"truth": truth}):
            target = batch["truth"].long()
            with setting.precision.autocast():
                logits = model(batch["images"]).float()
            pred = logits.argmax(1)
            columns["counts"].append(confusion(target, pred))
            columns["boundary"].append(boundaries(target, pred))
            pixel_loss = F.cross_entropy(logits, target, reduction="none").double()
            columns["loss_sum"].append(pixel_loss.sum((1, 2)))
            for place, entry in enumerate(batch["index"].tolist()):
                native, large = at_native_size(logits[place], store.images[entry], setting)
                columns["counts_native"].append(confusion(native, large))
                columns["boundary_native"].append(boundaries(native, large))
                if entry in shown:
                    panels[entry] = (
                        to_photo(batch["images"][place], model.inputs),
                        to_array(target[place]),
                        to_array(pred[place]),
                    )
            progress.update(len(target))
    records = {name: torch.cat(parts).cpu().numpy() for name, parts in columns.items()}
    records["ids"] = ids
    records["img_size"] = np.array(img_size)
    records["pixels"] = np.full(len(ids), truth[0].numel())
    records["unreadable"] = np.array(store.dropped, str)
    return records | stack_panels(ids, shown, panels)


def at_native_size(logits: Tensor, image: str, setting: TestSetting) -> tuple[Tensor, Tensor]:
    """Read an image's own trimap and enlarge its logits [3, h, w] -> (truth, prediction), both int64 [1, H, W].

    Native sizes differ, so images go one by one here.
    """
    root = Path(setting.data_root)
    trimap = data.read_trimap(root / data.trimap_path(image), root / image)
    native = torch.from_numpy(trimap).to(logits.device).long()[None]
    large = upsample(logits[None], tuple(native.shape[1:])).argmax(1)
    return native, large


def to_photo(image: Tensor, inputs: str) -> np.ndarray:
    """Turn an image [3, H, W] as a network takes it back into uint8 [H, W, 3]."""
    return to_array(augment.unscale_pixels(image, inputs).round().clamp(0, 255).permute(1, 2, 0))


def to_array(tensor: Tensor) -> np.ndarray:
    return tensor.byte().cpu().numpy()


def stack_panels(ids: np.ndarray, shown: np.ndarray, panels: dict[int, tuple]) -> dict[str, np.ndarray]:
    """Stack the examples in the order in which the report shows them."""
    stacked = {"panel_ids": ids[shown]}
    for place, name in enumerate(("panel_images", "panel_truth", "panel_pred")):
        stacked[name] = np.stack([panels[entry][place] for entry in shown])
    return stacked


# -- What any network should beat ---------------------------------------------------------------------------------------


def mean_mask(masks: Tensor) -> Tensor:
    """Find the most frequent class of each pixel: trimaps [N, H, W] -> classes [H, W]."""
    shares = [(masks == number).float().mean(0) for number in range(NUM_CLASSES)]
    return torch.stack(shares).argmax(0)


def reference_records(setting: TestSetting, img_size: int) -> dict[str, np.ndarray]:
    """Score predictors that look at no image -> arrays of reference.npz, for the images that networks are tested on."""
    device = setting.dist.device
    store, truth = open_test_set(setting, img_size)
    usual = mean_mask(read_training_masks(setting, img_size)).to(device)
    counts = defaultdict(list)
    for part in truth.split(VALIDATION_BATCH):
        target = part.to(device).long()
        guesses = {
            "all_animal": torch.full_like(target, PET),
            "all_background": torch.full_like(target, BACKGROUND),
            "mean_mask": usual.expand_as(target),
        }
        for name, guess in guesses.items():
            counts[f"counts_{name}"].append(confusion(target, guess).cpu())
    records = {name: torch.cat(parts).numpy() for name, parts in counts.items()}
    records["ids"] = np.array([Path(image).stem for image in store.images])
    records["img_size"] = np.array(img_size)
    return records


def read_training_masks(setting: TestSetting, img_size: int) -> Tensor:
    """Read the trimaps of all training images, but for those whose photo cannot be opened -> uint8 [N, S, S]."""
    train = splits.pets_split(setting.data_root, "train", source=pets_source(setting.flags)).images
    kept = [image for image in train if data.can_open(Path(setting.data_root, image))]
    return data.load_truth(setting.data_root, kept, img_size, setting.flags["trimap_resize"])


# -- Any photo ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: nn.Module, image: Image.Image, img_size: int, device: torch.device | str = "cpu") -> np.ndarray:
    """Segment one image -> uint8 [H, W] at its own size: 0 pet, 1 background, 2 border."""
    logits = model(as_input(image, img_size, model, device)).float()
    classes = upsample(logits, image.size[::-1]).argmax(1)
    return to_array(classes[0])
