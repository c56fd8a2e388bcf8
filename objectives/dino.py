"""Objective `dino`: two crops of an image, one seen by a slow copy of the network, must be told to be the same image.

    python pretrain.py --objective dino --split animal
    python pretrain.py --objective dino --split animal --local_crops 8          # small crops too, at 1.5 times the cost

Self-distillation without labels (Caron et al. 2021, *Emerging properties in self-supervised vision transformers*). The
student predicts, from each crop, which of K prototypes the teacher sees in another crop of the same image; the teacher is
the moving average of the student. Two collapses satisfy the loss: the teacher's answer may become uniform (its entropy ln
K), against which a low temperature helps, or always the same (0), against which its mean is taken off (the centre). What is
kept and measured is the teacher's encoder. The recipe is ours, untuned, for 15,000 updates of ViT-B: K 4,096, momentum 0.99
instead of 0.996, no warm-up of the temperature.
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batches import Augmentation, Draw, EvalBatches, uniform
from colours import BLUR_MARGIN, Colours
from engine import Distributed, Parser, at_least, fraction
from models import ViT, encoder_sizes, init_weights, interpolate_pos_embed, matrix_product_flops, patchify
from objective import block_activations, sum_over
from pretraining import VALIDATION_SEED, Pretraining, add_weight_decay_schedule
from teacher import Teacher, momentum_at

GLOBAL_CROPS = 2
LOCAL_SHARE = 96 / 224  # side of a local crop as a share of the side of a global one
LEAST_LOCAL = 0.05  # smallest local crop as a share of the image's area
MOST_PROTOTYPES = 262_144  # four times those of Caron et al.
LISTS = ("animal", "non_animal")


# -- The network --------------------------------------------------------------------------------------------------------


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """Give x as it is, but with its gradient times a factor [], which may be 0."""
    constant = x.detach()
    return constant + factor * (x - constant)


class Head(nn.Module):
    """Three linear layers to a narrow vector of length 1, and its cosine with K prototypes: [B, D] -> [B, K].

    A linear layer whose weights are normalised with the gain 1 is such a cosine (Caron et al., appendix C).
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.apply(init_weights)
        nn.init.normal_(self.prototypes, std=bottleneck**-0.5)  # about length 1

    def forward(self, x: Tensor, learning: Tensor | None = None) -> Tensor:
        """learning: factor [] of the prototypes' gradient; None: 1."""
        directions = F.normalize(self.mlp(x).float(), dim=-1)
        prototypes = F.normalize(self.prototypes, dim=-1)
        if learning is not None:
            prototypes = scale_gradient(prototypes, learning)
        return F.linear(directions, prototypes)  # in autocast's precision, as in the authors' code


class DinoNetwork(ViT):
    """ViT encoder and a head on its class token, for crops of two sizes. sizes: arguments of `ViT`."""

    fresh_keys = ("head.",)

    def __init__(self, hidden: int, bottleneck: int, prototypes: int, **sizes: object) -> None:
        super().__init__(**sizes)
        self.head = Head(self.embed_dim, hidden, bottleneck, prototypes)

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None = None,
        drop_path: Tensor | None = None,
        learning: Tensor | None = None,
    ) -> Tensor:
        """Score prototypes: global crops [G, 3, H, W] and local crops [L, 3, h, w] -> logits [G + L, K], in this order.

        drop_path: uniform draws [G + L, depth, 2], see `ViT.forward_features`; learning: see `Head`.
        """
        count = len(global_crops)
        of_global = None if drop_path is None else drop_path[:count]
        tokens = self.forward_features(global_crops, of_global)[:, 0]
        if local_crops is not None:
            of_local = None if drop_path is None else drop_path[count:]
            of_local_crops = self.forward_resized(local_crops, of_local)[:, 0]
            tokens = torch.cat([tokens, of_local_crops])
        return self.head(tokens, learning)

    def forward_resized(self, images: Tensor, drop_path: Tensor | None = None) -> Tensor:
        """Encode images of another size than img_size, with interpolated positions; see `ViT.forward_features`."""
        height, width = images.shape[2:]
        grid = (height // self.patch_size, width // self.patch_size)
        pos_embed = interpolate_pos_embed(self.pos_embed, self.grid, grid)
        patches = patchify(images, self.patch_size)
        return self.forward_encoder(patches, drop_path=self.branch_scales(drop_path), pos_embed=pos_embed)

    def head_flops(self, tokens: int) -> float:
        return matrix_product_flops(self.head, 1)

    def local_flops(self, patches: int) -> float:
        """Count the operations of training on a local crop of so many patches, as `ViT.flops` does."""
        embedding = matrix_product_flops(self.patch_embed, patches)
        forward = embedding + matrix_product_flops(self.blocks, patches + 1) + self.head_flops(patches + 1)
        return 3 * forward - embedding


def nearest_size(img_size: int, patch_size: int) -> int:
    """Give the side of local crops in pixels: 96 where global ones have 224, rounded to whole patches."""
    patches = round(LOCAL_SHARE * img_size / patch_size)
    return max(1, patches) * patch_size


# -- The loss -----------------------------------------------------------------------------------------------------------


def cross_entropy_of_views(student: Tensor, teacher: Tensor) -> Tensor:
    """Average the cross-entropy over all pairs of a teacher's crop and another crop of the student's -> [B].

    student: log-probabilities [V, B, K] of all crops, global ones first; teacher: probabilities [2, B, K] of these.
    """
    of_global = -(teacher.flip(0) * student[:GLOBAL_CROPS]).sum(-1)  # each with the other one
    of_local = -(teacher.sum(0) * student[GLOBAL_CROPS:]).sum(-1)  # each with both
    pairs = GLOBAL_CROPS * (len(student) - 1)
    return (of_global.sum(0) + of_local.sum(0)) / pairs


def entropy(probabilities: Tensor) -> Tensor:
    """Compute the entropy of distributions [..., K] in nats -> [...]."""
    return torch.special.entr(probabilities).sum(-1)


class Centre:
    """Mean of the teacher's logits [K], moving from one global batch to the next.

    It is linear in the logits, so micro-batches and processes only add to a sum.
    """

    def __init__(self, prototypes: int, dist: Distributed):
        self.dist = dist
        self.mean = torch.zeros(prototypes, device=dist.device)
        self.total = torch.zeros(prototypes, device=dist.device)

    def observe(self, logits: Tensor) -> None:
        """Add the logits [n, K] of crops to the sum of this step."""
        self.total += logits.sum(0)

    def update(self, crops: int, momentum: float) -> None:
        """Move towards the mean over so many crops of all processes, and begin a new sum."""
        mean = self.dist.sum(self.total) / crops
        self.mean.lerp_(mean, 1 - momentum)
        self.total.zero_()


# -- The objective ------------------------------------------------------------------------------------------------------


class Crops(NamedTuple):
    """The crops of B images, one view after another."""

    global_crops: Tensor  # [2 B, 3, H, W]
    local_crops: Tensor | None  # [N B, 3, h, w]


def score_words(lists: tuple[str, ...]) -> dict[str, str]:
    """Name the scores on lists of validation images for the report."""
    words = {}
    for name in lists:
        images = f"{name.replace('_', '-')} images"
        words[f"loss_{name}"] = f"cross-entropy of teacher and student, {images}"
        words[f"entropy_{name}"] = f"entropy of the teacher, {images}"
        words[f"kl_{name}"] = f"divergence of the student from the teacher, {images}"
        words[f"prototypes_{name}"] = f"prototypes in use, {images}"
    return words


class Dino(Pretraining):
    """Self-distillation between crops of an image."""

    name = "dino"
    meters = True
    scores = score_words(LISTS)

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        """Add the flags of crops, head, teacher and temperatures."""
        parser.set_defaults(blr=5e-4, min_lr=1e-6, clip_grad=3.0)
        add_weight_decay_schedule(parser, start=0.04, end=0.4)
        recipe = parser.flags("objective", role="recipe")
        recipe(
            "--local_crops", type=at_least(0, int), default=0, help="small crops of each image for the student alone"
        )
        recipe(
            "--least_global",
            type=at_least(LEAST_LOCAL, float, 1),
            default=0.25,
            help="smallest global crop and largest local one, as a share of the image's area",
        )
        recipe(
            "--colours",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="jitter, grey, blur and solarise; without, crops of one image are told by their colours",
        )
        recipe(
            "--prototypes",
            type=at_least(2, int, MOST_PROTOTYPES),
            default=4096,
            help="K, what the head chooses among; Caron et al. have 65,536",
        )
        recipe("--head_hidden", type=at_least(1, int), default=2048, help="width of the head's hidden layers")
        recipe("--head_bottleneck", type=at_least(1, int), default=256, help="width of the head's last but one layer")
        recipe(
            "--freeze_epochs",
            type=at_least(0),
            default=1,
            help="epochs at the start in which the prototypes stay; more if the loss does not fall",
        )
        recipe("--student_temperature", type=fraction, default=0.1, help="of the student's soft-max")
        recipe(
            "--teacher_temperature",
            type=fraction,
            default=0.04,
            help="of the teacher's soft-max; lower it if the loss stays at ln K",
        )
        recipe(
            "--teacher_momentum",
            type=at_least(0, float, 1),
            default=0.99,
            help="share of its own weights that the teacher keeps at an update; grows to 1. The fewer updates, the lower",
        )
        recipe("--centre_momentum", type=at_least(0, float, 1), default=0.9, help="that of the mean of its logits")
        recipe("--drop_path", type=at_least(0), default=0.1, help="stochastic depth of the student's last block")

    def __init__(self, args: argparse.Namespace, dist: Distributed):
        if args.images:
            self.scores = score_words(("held_out",))
        super().__init__(args, dist)
        self.teacher = Teacher(self.model).to(dist.device)
        self.centre = Centre(args.prototypes, dist)
        epoch_updates = args.epoch_updates or self.epoch_images // self.batch_size
        self.frozen_steps = round(args.freeze_epochs * epoch_updates)
        self.learning = torch.zeros((), device=dist.device)  # 1 once the prototypes learn
        self.set_learning(0)
        self.constant_losses: dict[str, float] = {}

    def build_model(self) -> nn.Module:
        smallest = min(view.img_size for view in (self.augmentation(), *self.views().values()))
        if self.args.colours and smallest <= BLUR_MARGIN:
            raise ValueError(
                f"crops of {smallest} px are too small to be blurred; raise --img_size or give --no-colours"
            )
        args = self.args
        head = {"hidden": args.head_hidden, "bottleneck": args.head_bottleneck, "prototypes": args.prototypes}
        return DinoNetwork(**head, img_size=args.img_size, drop_path=args.drop_path, **encoder_sizes(args.model))

    def remarks(self) -> list[str]:
        remarks = super().remarks()
        if self.args.freeze_epochs >= self.args.epochs:
            problem = f"--freeze_epochs {self.args.freeze_epochs:g} of {self.args.epochs} epochs"
            remarks.append(f"{problem}: the prototypes never learn; freeze them for a tenth of the epochs or less")
        return remarks

    @property
    def encoder(self) -> ViT:
        return self.teacher.network

    def compile_others(self) -> None:
        self.teacher.compile()

    # -- Crops ----------------------------------------------------------------------------------------------------------

    @property
    def local_size(self) -> int:
        """Side of the local crops in pixels."""
        return nearest_size(self.args.img_size, encoder_sizes(self.args.model).get("patch_size", 16))

    def global_view(self, blur: float, solarise: float) -> Augmentation:
        """Say how a global crop is made; blur, solarise: their probabilities."""
        colours = Colours(blur=blur, solarise=solarise) if self.args.colours else None
        return Augmentation(self.args.img_size, crop_scale=(self.args.least_global, 1.0), colours=colours)

    def augmentation(self) -> Augmentation:
        """Say how the first global crop is made."""
        return self.global_view(blur=1.0, solarise=0.0)

    def views(self) -> dict[str, Augmentation]:
        """Say how the second global crop and the local ones are made."""
        views = {"global_2": self.global_view(blur=0.1, solarise=0.2)}
        colours = Colours(blur=0.5) if self.args.colours else None
        scale = (LEAST_LOCAL, self.args.least_global)
        for number in range(1, self.args.local_crops + 1):
            views[f"local_{number}"] = Augmentation(self.local_size, crop_scale=scale, colours=colours)
        return views

    def join(self, batch: dict[str, Tensor], first: str) -> Crops:
        """Join the views of a batch; first: the name of its first global crops."""
        global_crops = torch.cat([batch[first], batch["global_2"]])
        local_views = [batch[f"local_{number}"] for number in range(1, self.args.local_crops + 1)]
        return Crops(global_crops, torch.cat(local_views) if local_views else None)

    def draws(self) -> dict[str, Draw]:
        if self.args.drop_path == 0:
            return {}
        crops = GLOBAL_CROPS + self.args.local_crops
        return {"drop_path": uniform(crops, len(self.model.blocks), 2)}

    # -- Training -------------------------------------------------------------------------------------------------------

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        crops = self.join(batch, first="images")
        drop_path = batch.get("drop_path")
        if drop_path is not None:
            drop_path = drop_path.transpose(0, 1).flatten(0, 1)  # one view after another
        taught = self.teacher(crops.global_crops).float()
        self.centre.observe(taught)
        learnt = network(*crops, drop_path, self.learning)
        return cross_entropy_of_views(self.log_probabilities(learnt), self.probabilities(taught)).mean()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn the teacher's logits [2 B, K] into probabilities [2, B, K]."""
        sharpened = (logits - self.centre.mean) / self.args.teacher_temperature
        return sharpened.softmax(-1).unflatten(0, (GLOBAL_CROPS, -1))

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Turn the student's logits [V B, K] into log-probabilities [V, B, K]."""
        sharpened = logits.float() / self.args.student_temperature
        crops = GLOBAL_CROPS + self.args.local_crops
        return sharpened.log_softmax(-1).unflatten(0, (crops, -1))

    def after_step(self, step: int, total_steps: int) -> None:
        """Let the teacher follow, move its centre, and release the prototypes when they have been kept long enough."""
        momentum = momentum_at(step, total_steps, self.args.teacher_momentum, shape="cosine")
        self.teacher.update(self.model, momentum)
        self.centre.update(GLOBAL_CROPS * self.batch_size, self.args.centre_momentum)
        self.set_learning(step)

    def set_learning(self, step: int) -> None:
        """Say whether the prototypes learn after so many steps."""
        self.learning.fill_(float(step >= self.frozen_steps))

    def state(self) -> dict:
        return {
            "teacher": self.teacher.state(),
            "centre": self.centre.mean,
            "learning": self.learning,
            "constant_losses": self.constant_losses,
        }

    def load_state(self, state: dict) -> None:
        self.teacher.load_state(state["teacher"])
        self.centre.mean.copy_(state["centre"])
        self.learning.copy_(state["learning"])
        self.constant_losses = state["constant_losses"]

    # -- Validation -----------------------------------------------------------------------------------------------------

    def score_validation(self, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Score fixed crops of each validation image."""
        scores = {}
        for name in self.stores:
            sums = self.sums_of(name, stopping)
            if sums is None:
                return None
            scores |= self.scores_of(name, sums)
        return scores

    def sums_of(self, name: str, stopping: Callable[[], bool]) -> dict[str, Tensor] | None:
        """Add up losses, entropies and the teacher's probabilities [K] over a list; None if a process was to stop."""
        batches = EvalBatches(
            self.stores[name],
            img_size=self.args.img_size,
            batch_size=self.validation_batch_size,
            views={"global_1": self.augmentation(), **self.views()},
            seed=VALIDATION_SEED,
            dist=self.dist,
        )

        def score(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            crops = self.join(batch, first="global_1")
            taught = self.probabilities(self.teacher(crops.global_crops).float())
            learnt = self.log_probabilities(self.scoring_network(*crops))
            return {
                "loss": cross_entropy_of_views(learnt, taught).double().sum(),
                "entropy": entropy(taught).mean(0).double().sum(),
                "probabilities": taught.mean(0).double().sum(0),
            }

        zero = torch.zeros((), dtype=torch.float64, device=self.dist.device)
        zeros = torch.zeros(self.args.prototypes, dtype=torch.float64, device=self.dist.device)
        totals = {"loss": zero, "entropy": zero.clone(), "probabilities": zeros}
        return sum_over(batches, score, totals, self.dist, stopping)

    def scores_of(self, name: str, sums: dict[str, Tensor]) -> dict[str, float]:
        """Turn the sums over a list into scores, and remember the loss of the best answer that looks at no image."""
        count = len(self.stores[name])
        loss = sums["loss"].item() / count
        of_teacher = sums["entropy"].item() / count
        of_mean = entropy(sums["probabilities"] / count).item()
        self.constant_losses[f"loss_{name}"] = of_mean
        return {
            f"loss_{name}": loss,
            f"entropy_{name}": of_teacher,
            f"kl_{name}": loss - of_teacher,
            f"prototypes_{name}": math.exp(of_mean),
        }

    # -- What is kept ---------------------------------------------------------------------------------------------------

    def finish(self) -> dict:
        """Score both collapses, and the answer that is best among those that look at no image: the teacher's mean."""
        uniform_loss = math.log(self.args.prototypes)
        trivial = {"best constant": self.constant_losses, "uniform collapse": {}, "collapse to one prototype": {}}
        for name in self.stores:
            trivial["uniform collapse"] |= {f"loss_{name}": uniform_loss, f"entropy_{name}": uniform_loss}
            trivial["collapse to one prototype"][f"entropy_{name}"] = 0.0  # and no loss, which none could be below
        return {"trivial": trivial}

    def export(self, weights: dict[str, Tensor]) -> dict:
        """Keep the teacher's encoder."""
        return super().export(self.teacher.state())

    def flops(self) -> float:
        of_student = GLOBAL_CROPS * self.model.flops(training=True)
        of_teacher = GLOBAL_CROPS * self.model.flops(training=False)
        return of_student + of_teacher + self.args.local_crops * self.model.local_flops(self.local_patches)

    @property
    def local_patches(self) -> int:
        """Patches of a local crop."""
        return (self.local_size // self.model.patch_size) ** 2

    def activation_values(self) -> int:
        of_global = GLOBAL_CROPS * block_activations(self.model.blocks, self.model.num_patches + 1)
        of_local = self.args.local_crops * block_activations(self.model.blocks, self.local_patches + 1)
        return of_global + of_local
