"""Networks that are small enough to be compared with slow formulas, and helpers that several tests of networks share."""

import pytest
import torch
from torch import nn

from models import ViT, patchify

SMALL_ENCODER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = {**SMALL_ENCODER, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def spread(model: nn.Module, seed: int = 0, std: float = 0.05) -> nn.Module:
    """Give every parameter (biases and norms too) a random value, so that no term is hidden by a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def encode(model: ViT, images: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_encoder(patchify(images, model.patch_size), **kwargs)


def encoder_only(state: dict) -> dict:
    """Keep the encoder's keys of a state dict, as facebookresearch/mae's encoder-only files do."""
    return {key: value for key, value in state.items() if not key.startswith(("decoder", "mask_token"))}


def transformers_mae(norm_pix_loss: bool = True, mask_ratio: float = 0.75, **sizes) -> nn.Module:
    """Build transformers' ViTMAEForPreTraining with the arguments of `MaskedAutoencoder`."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTMAEConfig(
        image_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        hidden_size=sizes["embed_dim"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["num_heads"],
        intermediate_size=4 * sizes["embed_dim"],
        decoder_hidden_size=sizes["decoder_embed_dim"],
        decoder_num_hidden_layers=sizes["decoder_depth"],
        decoder_num_attention_heads=sizes["decoder_num_heads"],
        decoder_intermediate_size=4 * sizes["decoder_embed_dim"],
        norm_pix_loss=norm_pix_loss,
        mask_ratio=mask_ratio,
        layer_norm_eps=1e-6,
    )
    return transformers.ViTMAEForPreTraining(config)


def photos(count: int, seed: int = 0) -> torch.Tensor:
    """Random images of the size of SMALL_ENCODER [count, 3, 32, 32]."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def change_patch(images: torch.Tensor, patch: int) -> torch.Tensor:
    """Replace the pixels of one of the 4 x 4 patches of all images."""
    changed = images.clone()
    row, column = divmod(patch, 4)
    changed[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 5
    return changed
