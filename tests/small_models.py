"""Sizes and weights of the models that tests look into."""

import torch

# A Masked Autoencoder on 4 x 4 patches.
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
SMALL |= dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)


def spread(model: torch.nn.Module, seed: int = 0, std: float = 0.05) -> torch.nn.Module:
    """Give every parameter (biases and norms too) a random value, so that no term is hidden by a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model
