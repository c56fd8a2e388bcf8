"""Other projects' networks and data path at the sizes of this project's, for bench.py --peers (requirements-dev.txt)."""

import importlib.metadata
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

import augment
import data
from engine import EngineError
from models import LinearSegmenter, MaskedAutoencoder, build_segmenter, unpatchify
from objective import Objective

PACKAGES = ("transformers", "timm")


def package_versions(peers: Iterable[str]) -> dict[str, str]:
    """Look up the versions of the packages among the peers; EngineError if one is not installed."""
    versions = {}
    for package in PACKAGES:
        if package not in peers:
            continue
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            problem = f"--peers needs {package}, which is not installed"
            raise EngineError(f"{problem}; `pip install -r requirements-dev.txt`") from None
    return versions


# -- networks -----------------------------------------------------------------------------------------------------------


def transformers_mae(model: MaskedAutoencoder, mask_ratio: float) -> nn.Module:
    """Build transformers' ViTMAEForPreTraining (SDPA) of a model's size."""
    import transformers

    encoder = model.blocks[0]
    decoder = model.decoder_blocks[0]
    config = transformers.ViTMAEConfig(
        image_size=model.img_size[0],
        patch_size=model.patch_size,
        hidden_size=model.norm.weight.numel(),
        num_hidden_layers=len(model.blocks),
        num_attention_heads=encoder.attn.num_heads,
        intermediate_size=encoder.mlp.fc1.out_features,
        decoder_hidden_size=model.decoder_norm.weight.numel(),
        decoder_num_hidden_layers=len(model.decoder_blocks),
        decoder_num_attention_heads=decoder.attn.num_heads,
        decoder_intermediate_size=decoder.mlp.fc1.out_features,
        norm_pix_loss=model.norm_pix_loss,
        mask_ratio=mask_ratio,
        layer_norm_eps=1e-6,
        attn_implementation="sdpa",
    )
    return transformers.ViTMAEForPreTraining(config)


class TimmSegmenter(nn.Module):
    """timm's ViT encoder of a model's size with one linear layer to class logits: the form of LinearSegmenter."""

    def __init__(self, model: LinearSegmenter, drop_path: float):
        super().__init__()
        import timm

        dim = model.norm.weight.numel()
        self.encoder = timm.create_model(
            "vit_base_patch16_224",
            img_size=model.img_size,
            patch_size=model.patch_size,
            embed_dim=dim,
            depth=len(model.blocks),
            num_heads=model.blocks[0].attn.num_heads,
            num_classes=0,
            drop_path_rate=drop_path,
        )
        self.head = nn.Linear(dim, model.patch_size**2 * model.num_classes)
        self.patch_size = model.patch_size
        self.grid = model.grid

    def forward(self, images: Tensor, drop_path: Tensor | None = None) -> Tensor:
        """Predict class logits [B, num_classes, H, W]; drop_path is accepted and ignored: timm draws its own."""
        features = self.encoder.forward_features(images)[:, 1:]
        return unpatchify(self.head(features), self.patch_size, self.grid)


# -- training -----------------------------------------------------------------------------------------------------------


class Peer(Objective):
    """Another network in the place of an objective's own, trained by the same loop on the same batches.

    loss: (network, batch) -> scalar loss. flops: floating-point operations of a training step per image.
    """

    name = "peer"

    def __init__(self, own: Objective, model: nn.Module, loss: Callable[..., Tensor], flops: float):
        super().__init__(own.args, own.dist)
        self.model = model
        self.split = own.split
        self.epoch_images = own.epoch_images
        self.batch_size = own.batch_size
        self.betas = own.betas
        self._loss = loss
        self._flops = flops

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self._loss(network, batch)

    def flops(self) -> float:
        return self._flops


def peers_of(task: str, own: Objective, names: Iterable[str]) -> dict[str, Peer]:
    """Build the contestants of an objective among the named peers; none for tasks that have no peers."""
    if task == "pretrain" and "transformers" in names:
        return pretraining_peers(own)
    if task == "finetune" and "timm" in names:
        return segmentation_peers(own)
    return {}


def pretraining_peers(own: Objective) -> dict[str, Peer]:
    """Build transformers' Masked Autoencoder, which takes the masks of this project's batches."""

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return network(batch["images"], noise=batch["noise"]).loss

    network = transformers_mae(own.model, own.args.mask_ratio)
    return {"transformers ViTMAE (SDPA), synthetic": Peer(own, network, loss, own.flops())}


def segmentation_peers(own: Objective) -> dict[str, Peer]:
    """Build timm's ViT and this project's, both trained in full under a linear head: timm has no MAE decoder."""
    drop_path = own.args.drop_path
    linear = build_segmenter(own.args.model, img_size=own.args.img_size, head="linear", drop_path=drop_path)
    timm_network = TimmSegmenter(linear, drop_path)
    flops = linear.flops(training=True)
    return {
        "this project, linear head, synthetic": Peer(own, linear, own.loss, flops),
        "timm ViT, linear head, synthetic": Peer(own, timm_network, own.loss, flops),
    }


# -- data ---------------------------------------------------------------------------------------------------------------


class Photos(torch.utils.data.Dataset):
    """Photos read, cropped, flipped and normalised one by one with PIL and torchvision, as most training scripts do."""

    def __init__(self, paths: Sequence[str], size: int):
        self.paths = paths
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(augment.MEAN, augment.STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(data.read_image(self.paths[index]))


def photos_for(files: Sequence[str], size: int, count: int) -> Photos:
    """Make a data set of these files, repeated until they fill four batches of `count` images."""
    repeats = math.ceil(4 * count / len(files))
    return Photos(list(files) * repeats, size)


def loader_batches(photos: Photos, count: int, workers: int) -> Iterator[Tensor]:
    """Yield shuffled batches [count, 3, H, W] without end from a DataLoader's worker processes."""
    loader = torch.utils.data.DataLoader(
        photos, count, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


def one_core_batches(photos: Photos, count: int) -> Iterator[list[Tensor]]:
    """Yield batches without end, made in this process."""
    order = itertools.cycle(range(len(photos)))
    while True:
        yield [photos[next(order)] for _ in range(count)]
