"""Objective `labels`: learn which of COCO's categories an image shows, from random weights or after another pre-training.

    python pretrain.py --objective labels --split animal                                    # from random weights
    python pretrain.py --objective labels --split animal --init runs/pretrain/model.pt      # a Masked Autoencoder first

Multi-label pre-training at COCO's size, as weakly supervised pre-training and what precedes it do at that of the web (Singh
et al. 2023, *The effectiveness of MAE pre-pretraining for billion-scale pretraining*). By default the cross-entropy of a
soft-max over all categories with a target of 1/k for each of the k that an image shows (Mahajan et al. 2018). No network can
bring it below the mean of ln k, 0.897 on train2017; the shares of the categories alone reach 3.909. The recipe is ours,
untuned: rate 1e-3 from random weights, 5e-4 after a pre-training, 50 epochs.
"""

import argparse
import functools
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
import splits
from batches import Draw, Examples, uniform
from data import DataError, ImageStore
from engine import EngineError, Parser, at_least, fraction
from metrics import macro_average_precision
from models import ViT, encoder_sizes, init_weights, matrix_product_flops
from objective import block_activations, sum_over
from pretraining import Pretraining
from splits import CocoPart, Split

LOSSES = ("softmax", "bce")
NO_DECAY = ("cls_token",)  # besides all one-dimensional parameters


class LabelPredictor(ViT):
    """ViT encoder, the mean of its patch tokens, LayerNorm and one linear layer that predicts num_labels categories.

    Position embeddings stay fixed, as in the other pre-trainings. sizes: arguments of `ViT`.
    """

    fresh_keys = ("head.",)

    def __init__(self, num_labels: int, **sizes: object) -> None:
        super().__init__(**sizes)
        linear = nn.Linear(self.embed_dim, num_labels)
        init_weights(linear)
        self.head = nn.Sequential(nn.LayerNorm(self.embed_dim, eps=1e-6), linear)

    def forward(self, images: Tensor, drop_path: Tensor | None = None) -> Tensor:
        """Predict logits [B, num_labels] of images [B, 3, H, W]; drop_path: see `ViT.forward_features`."""
        features = self.forward_features(images, drop_path)
        return self.head(features[:, 1:].mean(dim=1))

    def head_flops(self, tokens: int) -> float:
        return matrix_product_flops(self.head, 1)


# -- Targets and losses -------------------------------------------------------------------------------------------------


def shown_categories(coco: CocoPart, categories: Sequence[str], images: Sequence[str]) -> np.ndarray:
    """Look the labels of images up by their paths -> float32 [N, C], 1 where an image shows a category."""
    column = {name: number for number, name in enumerate(categories)}
    shown = np.zeros((len(images), len(categories)), np.float32)
    for row, image in enumerate(images):
        for name in coco.labels_of(image):
            shown[row, column[name]] = 1
    return shown


def soft_targets(shown: Tensor) -> Tensor:
    """Share the weight of an image equally among the categories that it shows: [N, C] -> [N, C], rows sum to 1."""
    return shown / shown.sum(1, keepdim=True)


def label_loss(logits: Tensor, shown: Tensor, kind: str) -> Tensor:
    """Compute the loss of each image: logits [N, C], shown [N, C] 0 or 1 -> [N].

    kind: "softmax", cross-entropy with targets 1/k; "bce", binary cross-entropy, the mean over categories.
    """
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, shown, reduction="none").mean(1)
    return F.cross_entropy(logits, soft_targets(shown), reduction="none")


def prior_logits(shown: Tensor, kind: str) -> Tensor:
    """Find the prediction with the lowest loss that looks at no image: shown [N, C] of the training images -> logits [C].

    An image that shows everything is added, and for "bce" one that shows nothing: what was never shown stays possible.
    """
    count, categories = shown.shape
    if kind == "bce":
        return torch.logit((shown.sum(0) + 1) / (count + 2))
    shares = (soft_targets(shown).sum(0) + 1 / categories) / (count + 1)
    return shares.log()


def lowest_loss(shown: Tensor, kind: str) -> float:
    """Compute the loss of a network that knows the labels: the mean of ln k for "softmax", 0 for "bce"."""
    if kind == "bce":
        return 0.0
    return shown.sum(1).log().mean().item()


# -- The objective ------------------------------------------------------------------------------------------------------


class Labels(Pretraining):
    """Predict the categories that an image shows; images without a label are left out by name."""

    name = "labels"
    scores = {
        "loss_animal": "cross-entropy of labels, animal images",
        "loss_non_animal": "cross-entropy of labels, non-animal images",
        "ap_animal": "mean average precision, animal images",
        "ap_non_animal": "mean average precision, non-animal images",
    }
    recordable = True

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        """Add the flags of the loss and of supervised training."""
        parser.set_defaults(blr=None, epochs=50, warmup_epochs=5)
        recipe = parser.flags("objective", role="recipe")
        recipe(
            "--label_loss",
            choices=LOSSES,
            default="softmax",
            help="softmax: one distribution over all categories, 1/k for each of the k that an image shows; bce: yes or "
            "no for each category",
        )
        recipe("--drop_path", type=at_least(0), default=0.1, help="stochastic depth of the last encoder block")
        recipe(
            "--layer_decay",
            type=fraction,
            default=1.0,
            help="rate factor per encoder layer downwards; below 1, say 0.75, it spares what --init has learnt",
        )

    @staticmethod
    def default_blr(args: argparse.Namespace) -> float:
        """Give the rate at the default batch of 256: what --init has learnt survives a lower one."""
        return 5e-4 if args.init else 1e-3

    @functools.cached_property
    def train_part(self) -> CocoPart:
        """The labels of the training images."""
        return self._read_part("train2017")

    @functools.cached_property
    def val_part(self) -> CocoPart:
        """The labels of the validation images. DataError if they name categories that training does not know."""
        part = self._read_part("val2017")
        unknown = sorted(set(part.categories) - set(self.train_part.categories))
        if unknown:
            problem = f"val2017 has categories that train2017 lacks, such as {unknown[0]!r}"
            raise DataError(f"{problem}; fetch both again with `python prepare.py download`")
        return part

    def _read_part(self, part: str) -> CocoPart:
        return CocoPart(self.args.data_root, part, self.args.categories, self.args.cache_dir)

    def build_model(self) -> nn.Module:
        sizes = encoder_sizes(self.args.model)
        options = {"img_size": self.args.img_size, "drop_path": self.args.drop_path}
        return LabelPredictor(len(self.train_part.categories), **options, **sizes)

    def training_split(self) -> Split:
        if self.args.images:
            raise EngineError("--objective labels needs COCO's labels, and --images has none; leave one of them out")
        return splits.keep_labelled(super().training_split(), self.train_part)

    def validation_splits(self) -> dict[str, Split]:
        lists = super().validation_splits()
        return {name: splits.keep_labelled(split, self.val_part) for name, split in lists.items()}

    def identity(self) -> dict[str, str]:
        parts = [(self.train_part, self.split), *((self.val_part, split) for split in self.held_out.values())]
        digest = hashlib.sha256()
        for part, split in parts:
            digest.update(self.shown_by(part, split.images).tobytes())
        return {**super().identity(), "labels": digest.hexdigest()}

    def remarks(self) -> list[str]:
        """Say how many images are left out."""
        left_out = self.split.manifest["unlabelled"]
        if not left_out:
            return []
        return [f"{len(left_out):,} images of the split have no label and are left out (metrics.json names them)"]

    def parameter_groups(self) -> list[dict]:
        return engine.param_groups(self.model, self.args.weight_decay, self.args.layer_decay, NO_DECAY)

    def activation_values(self) -> int:
        return block_activations(self.model.blocks, self.model.num_patches + 1)

    def draws(self) -> dict[str, Draw]:
        if self.args.drop_path == 0:
            return {}
        return {"drop_path": uniform(len(self.model.blocks), 2)}

    def shown_by(self, part: CocoPart, images: Sequence[str]) -> np.ndarray:
        """Look up which categories images show -> float32 [N, C]."""
        return shown_categories(part, self.train_part.categories, images)

    def examples(self, store: ImageStore) -> Examples:
        # By the paths that the store kept: an unreadable image takes its labels along.
        self.shown = self.shown_by(self.train_part, store.images)
        return Examples(store, targets={"shown": self.shown})

    def validation_targets(self, images: Sequence[str]) -> dict[str, Tensor]:
        return {"shown": torch.from_numpy(self.shown_by(self.val_part, images))}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = network(batch["images"], batch.get("drop_path"))
        return label_loss(logits.float(), batch["shown"], self.args.label_loss).mean()

    def score_validation(self, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Score the predictions of all validation images together: average precision ranks them."""
        scores = {}
        for name in self.stores:
            logits = self.logits_of(name, stopping)
            if logits is None:
                return None
            scores |= self.scores_of(name, logits)
        return scores

    def logits_of(self, name: str, stopping: Callable[[], bool]) -> Tensor | None:
        """Predict all images of a validation list -> [N, C] in its order; None if a process was to stop meanwhile."""
        store = self.stores[name]
        nothing = torch.zeros(self.targets[name]["shown"].shape, device=self.dist.device)

        def score(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            logits = self.scoring_network(batch["images"]).float()
            return {"logits": nothing.index_copy(0, batch["index"], logits)}

        batches = self.eval_batches(store, {}, self.validation_batch_size)
        sums = sum_over(batches, score, {"logits": nothing.clone()}, self.dist, stopping)
        if sums is None:
            return None
        return sums["logits"]

    def scores_of(self, name: str, logits: Tensor) -> dict[str, float]:
        """Score predictions [N, C] of a validation list."""
        shown = self.targets[name]["shown"]
        loss = label_loss(logits, shown, self.args.label_loss).double().mean()
        precision = macro_average_precision(logits.cpu().numpy(), shown.cpu().numpy())
        return {f"loss_{name}": loss.item(), f"ap_{name}": precision}

    def finish(self) -> dict:
        """Score what looks at no image, and the labels themselves; name the images that have none."""
        kind = self.args.label_loss
        trained = torch.from_numpy(self.shown)
        prior = prior_logits(trained, kind)
        of_prior: dict[str, float] = {}
        lowest: dict[str, float] = {}
        for name in self.stores:
            shown = self.targets[name]["shown"]
            everywhere = prior.to(shown.device).expand_as(shown)
            of_prior |= self.scores_of(name, everywhere)
            lowest[f"loss_{name}"] = lowest_loss(shown, kind)
        of_training = {
            "labels_per_image": trained.sum(1).mean().item(),
            "prior_loss": label_loss(prior.expand_as(trained), trained, kind).double().mean().item(),
            "lowest_loss": lowest_loss(trained, kind),
        }
        return {
            "trivial": {"label prior": of_prior},
            "lowest": lowest,
            "train_labels": of_training,
            "unlabelled": self.split.manifest["unlabelled"],
        }
