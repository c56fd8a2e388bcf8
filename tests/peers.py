"""Peers' implementations with the sizes of this project's models, for tests and benchmarks (requirements-dev.txt)."""

import functools
import itertools

import torch
from torch import nn

import augment
import data
from models import MaskedAutoencoder, build_segmenter, unpatchify


def transformers_mae(model: MaskedAutoencoder, mask_ratio: float = 0.75) -> nn.Module:
    """Build transformers' ViTMAEForPreTraining (SDPA) of a model's size."""
    import transformers

    blocks, decoder = model.blocks, model.decoder_blocks
    config = transformers.ViTMAEConfig(
        image_size=model.img_size[0], patch_size=model.patch_size, hidden_size=model.norm.weight.numel(),
        num_hidden_layers=len(blocks), num_attention_heads=blocks[0].attn.num_heads,
        intermediate_size=blocks[0].mlp.fc1.out_features, decoder_hidden_size=model.decoder_norm.weight.numel(),
        decoder_num_hidden_layers=len(decoder), decoder_num_attention_heads=decoder[0].attn.num_heads,
        decoder_intermediate_size=decoder[0].mlp.fc1.out_features, norm_pix_loss=model.norm_pix_loss, mask_ratio=mask_ratio,
        layer_norm_eps=1e-6, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.ViTMAEForPreTraining(config)


class TimmSegmenter(nn.Module):
    """timm's ViT encoder of a model's size with one linear layer to class logits: the form of head="linear"."""

    def __init__(self, model: MaskedAutoencoder, num_classes: int = 3, drop_path: float = 0.1):
        super().__init__()
        import timm

        dim = model.norm.weight.numel()
        sizes = dict(embed_dim=dim, depth=len(model.blocks), num_heads=model.blocks[0].attn.num_heads, num_classes=0)
        sizes |= dict(img_size=model.img_size, patch_size=model.patch_size, drop_path_rate=drop_path)
        self.encoder = timm.create_model("vit_base_patch16_224", **sizes)
        self.head = nn.Linear(dim, model.patch_size**2 * num_classes)
        self.patch_size, self.grid = model.patch_size, model.grid

    def forward(self, images, drop_path=None):
        """Predict class logits [B, num_classes, H, W]; drop_path is accepted and ignored: timm draws its own."""
        return unpatchify(self.head(self.encoder.forward_features(images)[:, 1:]), self.patch_size, self.grid)


class Photos(torch.utils.data.Dataset):
    """Photos read, cropped, flipped and normalised one by one with PIL and torchvision, as most training scripts do."""

    def __init__(self, paths: list[str], size: int):
        from torchvision.transforms import v2

        crop = v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(augment.MEAN, augment.STD)]
        self.paths, self.transform = paths, v2.Compose([crop, v2.RandomHorizontalFlip(), *to_tensor])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(data.read_image(self.paths[index]))


def peers_of(task: str, name: str, own: nn.Module, loss) -> dict:
    """Build other projects' networks for a task: name -> (module, loss(network, batch), FLOP of a training step per image).

    own, loss: this project's network of the size `name` and its loss. timm's encoder has no MAE decoder, so it is compared
    with the linear head, the same network on both sides.
    """
    if task == "pretrain":
        flops = own.flops(mask_ratio=0.75)
        peer = transformers_mae(own), lambda net, batch: net(batch["images"], noise=batch["noise"]).loss, flops
        return {"transformers ViTMAE (SDPA), synthetic": peer}
    if task == "finetune":
        linear = build_segmenter(name, img_size=own.img_size[0], head="linear", drop_path=0.1)
        own, peer = ((module, loss, linear.flops()) for module in (linear, TimmSegmenter(linear)))
        return {"this project, linear head, synthetic": own, "timm ViT, linear head, synthetic": peer}
    return {}


def pil_paths(files: list[str], size: int, count: int, workers: int) -> tuple[dict, dict]:
    """Make the data path of most scripts: name -> function of one batch of count images, in workers and on one core."""
    photos = Photos((files * (4 * count // len(files) + 1))[: max(len(files), 4 * count)], size)
    options = {"num_workers": workers, "drop_last": True, "persistent_workers": True}
    loader = torch.utils.data.DataLoader(photos, count, True, **options)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    order = itertools.cycle(range(len(photos)))
    many = {f"PIL + torchvision, {workers} DataLoader workers": functools.partial(next, batches)}
    return many, {"PIL + torchvision: decode, crop, flip": lambda: [photos[next(order)] for _ in range(count)]}
