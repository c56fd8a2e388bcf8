"""Meters of collapse, read at each validation of a pre-training: do features differ, and do neighbours agree on the breed?

    photos = MeterPhotos.of_pets(data_root)             # which photos, and their breeds
    meter = Meter(store, photos, batches, dist)
    meter.measure(encoder, stopping)                    # {"spread": 0.8, "rank": 61.2, ..., "knn": 0.31}

A loss that falls does not show that an encoder learns: where it predicts its own features, all of them may become one. Read
beside a random encoder of the same size (`probe.py --random`), whose features differ too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import splits
from batches import EvalBatches
from data import ImageStore, seeded_rng
from engine import Distributed
from models import ViT, take_rows
from objective import sum_over
from probes import NEIGHBOURS, Bank, knn_votes, measure_collapse

BANK_IMAGES = 1024  # training photos whose breeds are known, at most
QUERY_IMAGES = 512  # validation photos that are asked, at most
TOKENS = 4  # patch tokens of an image that the meters of tokens see
SEED = 20171  # of the choice of photos and tokens: the same for every run
PHOTO_STREAM = 0
TOKEN_STREAM = 1

COLLAPSE_SCORES = {
    "spread": "spread of image features (1 at most, collapsed 0)",
    "rank": "effective rank of image features",
    "token_spread": "spread of patch features",
    "token_rank": "effective rank of patch features",
}
KNN_SCORES = {"knn": f"{NEIGHBOURS}-NN accuracy of breeds, Pets validation"}


class MeterPhotos(NamedTuple):
    """Photos that are measured. breeds: of each photo, by its path; queries: those that are asked for theirs."""

    images: tuple[str, ...]
    breeds: dict[str, int]
    queries: frozenset[str]

    @staticmethod
    def of_pets(data_root: str | Path) -> "MeterPhotos":
        """Choose training and validation photos of Oxford-IIIT Pet; DataError if its list cannot be read."""
        rng = seeded_rng(SEED, PHOTO_STREAM)
        bank = choose(rng, splits.pets_split(data_root, "train").images, BANK_IMAGES)
        queries = choose(rng, splits.pets_split(data_root, "val").images, QUERY_IMAGES)
        return MeterPhotos((*bank, *queries), splits.pets_breeds(data_root), frozenset(queries))

    @staticmethod
    def without_labels(images: tuple[str, ...]) -> "MeterPhotos":
        """Choose among images of which nothing is known."""
        rng = seeded_rng(SEED, PHOTO_STREAM)
        return MeterPhotos(tuple(choose(rng, images, QUERY_IMAGES)), {}, frozenset())

    def scores(self) -> dict[str, str]:
        """Name what is measured: score -> words for the report."""
        if self.queries:
            return {**COLLAPSE_SCORES, **KNN_SCORES}
        return COLLAPSE_SCORES


def choose(rng: np.random.Generator, images: tuple[str, ...], most: int) -> list[str]:
    """Draw at most `most` images, in their order."""
    places = rng.permutation(len(images))[:most]
    return [images[place] for place in sorted(places)]


class Meter:
    """Measures an encoder on photos that are opened already.

    batches: makes the batches of a store from targets (name -> tensor [N, ...] on the device).
    """

    def __init__(
        self,
        store: ImageStore,
        photos: MeterPhotos,
        batches: Callable[[ImageStore, dict[str, Tensor]], EvalBatches],
        dist: Distributed,
    ):
        self.store = store
        self.batches = batches
        self.dist = dist
        # By the paths that the store kept: an unreadable photo takes its breed along.
        asked = [image in photos.queries for image in store.images]
        self.asked = torch.tensor(asked, device=dist.device)
        self.breeds = torch.tensor([photos.breeds.get(image, 0) for image in store.images], device=dist.device)
        self.has_both = any(asked) and not all(asked)

    def measure(self, encoder: ViT, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Measure the features of an encoder; None on every process if one was to stop meanwhile.

        knn is missing where no photo of either part can be read.
        """
        found = self.features(encoder, stopping)
        if found is None:
            return None
        images, tokens = found
        scores = measure_collapse(images)
        of_tokens = measure_collapse(tokens.flatten(0, 1))
        scores |= {f"token_{name}": value for name, value in of_tokens.items()}
        if self.has_both:
            scores["knn"] = self.accuracy(images)
        return scores

    def features(self, encoder: ViT, stopping: Callable[[], bool]) -> tuple[Tensor, Tensor] | None:
        """Compute the mean of the patch tokens [N, D] and some of the patch tokens [N, TOKENS, D]; None as in measure."""
        count = len(self.store.images)
        rng = seeded_rng(SEED, TOKEN_STREAM)
        places = rng.integers(0, encoder.num_patches, (count, TOKENS))
        targets = {"places": torch.from_numpy(places).to(self.dist.device)}
        totals = {
            "images": torch.zeros(count, encoder.embed_dim, device=self.dist.device),
            "tokens": torch.zeros(count, TOKENS, encoder.embed_dim, device=self.dist.device),
        }
        nothing = {name: zeros.clone() for name, zeros in totals.items()}

        def score(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            tokens = encoder.forward_features(batch["images"])[:, 1:].float()
            found = {"images": tokens.mean(1), "tokens": take_rows(tokens, batch["places"])}
            return {name: nothing[name].index_copy(0, batch["index"], rows) for name, rows in found.items()}

        sums = sum_over(self.batches(self.store, targets), score, totals, self.dist, stopping)
        if sums is None:
            return None
        return sums["images"], sums["tokens"]

    def accuracy(self, images: Tensor) -> float:
        """Let the nearest training photos vote on the breed of each validation photo, by features [N, D]."""
        known = ~self.asked
        bank = Bank(images[known], self.breeds[known], int(self.breeds.max()) + 1)
        predicted = knn_votes(images[self.asked], bank).argmax(1)
        return (predicted == self.breeds[self.asked]).double().mean().item()
