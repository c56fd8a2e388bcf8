"""Features of frozen encoders on Oxford-IIIT Pet: computed once for each encoder and kept in its folder.

    encoder = load_encoder(Path("runs/study/seed0/pretrain_animal/model.pt"))
    pets = open_pets(setting, encoder.img_size)
    features = read_features(folder, encoder, pets, setting)      # from probe_features.npz, if that is of this encoder
    features.mean, features.tokens                                # [N, D], [N, L, D]

An encoder is the ViT inside any checkpoint that weights.py reads, the backbone of a ResNet-50, or random weights.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import data
import splits
from data import ImageStore
from engine import EngineError, Progress, hash_file, read_json, write_atomic, write_json
from models import ResNet50, ViT, build_mae, build_segmenter, build_vit
from objective import TestSetting
from weights import identify, load_model, load_pretrained, model_config_of, read_checkpoint

FORMAT = 1  # of the kept features; another one is computed anew
ARRAYS = "probe_features.npz"
RECORD = "probe_features.json"


# ----------------------------------------------------------------------------------------------------------------------
# Encoders


class Encoded(NamedTuple):
    """What an encoder makes of images: patch tokens [B, L, D] row by row, and the class token [B, D] if it has one."""

    tokens: Tensor
    cls: Tensor | None


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder; weights: the SHA-256 that identifies them."""

    network: nn.Module
    model: str  # its named size, see models.MODELS
    img_size: int
    weights: str

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of its patch tokens."""
        if isinstance(self.network, ViT):
            return self.network.grid
        side = -(-self.img_size // 32)  # ResNet-50's stride
        return side, side

    def encode(self, images: Tensor) -> Encoded:
        """Encode images [B, 3, H, W] that are scaled as the network takes them."""
        if isinstance(self.network, ViT):
            features = self.network.forward_features(images).float()
            return Encoded(features[:, 1:], features[:, 0])
        maps = self.network.backbone(images).float()
        return Encoded(maps.flatten(2).mT, None)


def load_encoder(path: Path, model: str = "mae_base", img_size: int = 224) -> Encoder:
    """Load the encoder of a checkpoint; model and img_size say what a file is that does not say so itself.

    Raises CheckpointError for a file that cannot be read or does not fit, EngineError for a network without such an encoder.
    """
    weights = identify(path)
    content = read_checkpoint(path)
    config = model_config_of(content)
    if config:
        network, _ = load_model(path)
        model = config["name"]
        img_size = config.get("img_size", 224)
    else:
        network = build_encoder(model, img_size)
        print(f"{path}: {load_pretrained(network, content, part='encoder')}", flush=True)
    if not isinstance(network, (ViT, ResNet50)):
        raise EngineError(f"{path} holds a {type(network).__name__}, which has neither a ViT nor a ResNet-50 to ask")
    if not isinstance(img_size, int):
        raise EngineError(f"{path} takes images of {img_size}; probes take square ones")
    return Encoder(network, model, img_size, weights)


def build_encoder(model: str, img_size: int) -> ViT:
    """Build a ViT of a named size; a ValueError is reported as wrong use."""
    try:
        return build_vit(model, img_size=img_size).eval()
    except ValueError as error:
        raise EngineError(str(error)) from None


def random_encoder(model: str, img_size: int, seed: int) -> Encoder:
    """Make the encoder that a pre-training of this size and seed begins with."""
    torch.manual_seed(seed)
    if model == "resnet50":
        network = build_segmenter(model, img_size=img_size)
    else:
        network = build_mae(model, img_size=img_size)
    return Encoder(network.eval(), model, img_size, hash_tensors(network))


def hash_tensors(network: nn.Module) -> str:
    """Compute the SHA-256 of a network's tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# The photos that encoders are asked about


@dataclass(frozen=True)
class Pets:
    """All three parts of Oxford-IIIT Pet in one list, without the photos that cannot be read.

    labels int64 [N]: breeds; truth uint8 [N, S, S]: trimaps at input size; parts: train, val, test -> places in the list.
    """

    store: ImageStore
    labels: Tensor
    truth: Tensor
    parts: dict[str, Tensor]
    num_breeds: int

    @property
    def images(self) -> tuple[str, ...]:
        return self.store.images

    @property
    def sha256(self) -> str:
        """Hash of the list and of what is asked about it."""
        rows = [[image, label] for image, label in zip(self.images, self.labels.tolist(), strict=True)]
        sizes = {part: len(places) for part, places in self.parts.items()}
        return hashlib.sha256(json.dumps([rows, sizes]).encode()).hexdigest()


def open_pets(setting: TestSetting, size: int) -> Pets:
    """Decode the pets at a size where the cache lacks them; DataError if they are of one breed or a part is empty.

    Labels are found by a photo's path, never by its place: photos that cannot be read are left out of the list.
    """
    part_of = {}
    for part in splits.PETS_PARTS:
        for image in splits.pets_split(setting.data_root, part).images:
            part_of[image] = part
    breeds = splits.pets_breeds(setting.data_root)
    store = setting.open_store(list(part_of), size)
    labels = torch.tensor([breeds[image] for image in store.images])
    parts = {}
    for part in splits.PETS_PARTS:
        places = [place for place, image in enumerate(store.images) if part_of[image] == part]
        advice = "`python prepare.py verify` names the cause"
        data.require(places, f"no {part} photo of Oxford-IIIT Pet can be read; {advice}")
        parts[part] = torch.tensor(places)
    found = labels[parts["train"]].unique()
    data.require(len(found) > 1, "the training photos of Oxford-IIIT Pet are of one breed; probes tell several apart")
    truth = data.load_truth(setting.data_root, store.images, size)
    return Pets(store, labels, truth, parts, max(breeds.values()) + 1)


# ----------------------------------------------------------------------------------------------------------------------
# Features


@dataclass(frozen=True)
class Features:
    """Features of the photos of a list: mean of the patch tokens and class token [N, D], patch tokens [N, L, D] in half.

    cls is None for a network without class token.
    """

    mean: Tensor
    cls: Tensor | None
    tokens: Tensor


def key_of(encoder: Encoder, pets: Pets, setting: TestSetting) -> dict:
    """Name all that features follow from."""
    return {
        "format": FORMAT,
        "weights": encoder.weights,
        "images": pets.sha256,
        "pixels": pets.store.checksum,
        "img_size": encoder.img_size,
        "precision": setting.precision.name,
    }


def read_features(folder: Path, encoder: Encoder, pets: Pets, setting: TestSetting) -> Features:
    """Read the features that are kept in a folder, or compute and keep them where they are of something else or damaged."""
    key = key_of(encoder, pets, setting)
    kept = read_kept(folder, key)
    if kept is None:
        kept = compute_features(encoder, pets, setting)
        write_atomic(folder / ARRAYS, lambda file: np.savez(file, **kept))
        write_json(folder / RECORD, {"key": key, "sha256": hash_file(folder / ARRAYS)})
    tensors = {name: torch.from_numpy(array) for name, array in kept.items()}
    return Features(tensors["mean"], tensors.get("cls"), tensors["tokens"])


def read_kept(folder: Path, key: dict) -> dict[str, np.ndarray] | None:
    """Read the arrays that read_features kept; None if they are missing, of another key, or not what was written."""
    try:
        record = read_json(folder / RECORD)
        if record["key"] != key or record["sha256"] != hash_file(folder / ARRAYS):
            return None
        with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.no_grad()
def compute_features(encoder: Encoder, pets: Pets, setting: TestSetting) -> dict[str, np.ndarray]:
    """Encode all photos -> mean and cls float32 [N, D], tokens float16 [N, L, D]. EngineError if one is not finite."""
    encoder.network.to(setting.dist.device)
    columns: dict[str, list[np.ndarray]] = {"mean": [], "cls": [], "tokens": []}
    with Progress("features", len(pets.images)) as progress:
        for batch in setting.batches(encoder.network, pets.store, {}):
            with setting.precision.autocast():
                encoded = encoder.encode(batch["images"])
            columns["mean"].append(encoded.tokens.mean(1).cpu().numpy())
            columns["tokens"].append(encoded.tokens.half().cpu().numpy())
            if encoded.cls is not None:
                columns["cls"].append(encoded.cls.cpu().numpy())
            progress.update(len(batch["images"]))
    arrays = {name: np.concatenate(parts) for name, parts in columns.items() if parts}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise EngineError("the encoder's features are not finite: its weights are broken; train it again", 1)
    return arrays
