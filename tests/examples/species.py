"""A task: tell cats from dogs on Oxford-IIIT Pet, whose file names start with a capital letter for cats."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batches import Augmentation, Examples, TrainBatches
from models import build_classifier
from objective import Task, TestSetting, mean_records, mean_scores, open_store
from runs import RunFolder


def is_cat(images: Sequence[str]) -> np.ndarray:
    return np.array([Path(image).name[0].isupper() for image in images], np.int64)


def score(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    logits = model(batch["images"]).float()
    loss = F.cross_entropy(logits, batch["label"], reduction="none")
    return {"loss": loss, "accuracy": logits.argmax(1) == batch["label"]}


class Species(Task):
    name = "species"
    model_kind = "classifier"
    scores = {"loss": "cross-entropy", "accuracy": "accuracy"}
    select = "accuracy"

    def build_model(self, **options) -> nn.Module:
        return build_classifier(self.args.model, img_size=self.args.img_size, **options)

    def model_options(self) -> dict:
        return {"num_classes": 2}

    def open(self, run: RunFolder) -> TrainBatches:
        self.val_store = open_store(self.args, self.dist, self.val_split.images, size=self.args.img_size)
        self.val_labels = torch.from_numpy(is_cat(self.val_store.images)).to(self.dist.device)
        images = open_store(self.args, self.dist, self.split.images)
        examples = Examples(images, targets={"label": is_cat(images.images)})
        return self.train_batches(examples, Augmentation(self.args.img_size))

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(network(batch["images"], batch.get("drop_path")).float(), batch["label"])

    def validate(self, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        batches = self.eval_batches(self.val_store, {"label": self.val_labels}, batch_size=64)
        return mean_scores(batches, lambda batch: score(self.model, batch), self.scores, self.dist, stopping)

    @classmethod
    def test(cls, model: nn.Module, img_size: int, setting: TestSetting) -> dict[str, np.ndarray]:
        store = setting.open_store(setting.test_split().images, img_size)
        batches = setting.batches(model, store, {"label": torch.from_numpy(is_cat(store.images))})
        values = setting.collect(batches, lambda batch: score(model, batch))
        return mean_records([Path(image).stem for image in store.images], **values)
