"""An objective: restore an image from a noisy copy of it (a denoising autoencoder, Vincent et al. 2008)."""

import torch.nn.functional as F
from torch import Tensor, nn

from batches import Draw, uniform
from engine import Parser, at_least
from models import ViT, encoder_sizes, unpatchify
from pretraining import Pretraining


class Denoiser(ViT):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.head = nn.Linear(self.embed_dim, 3 * self.patch_size**2)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.head(self.forward_features(images)[:, 1:])
        return unpatchify(patches, self.patch_size, self.grid)


class Denoising(Pretraining):
    name = "denoise"

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        recipe = parser.flags("objective", role="recipe")
        recipe("--noise_range", type=at_least(0), default=2, help="width of the noise; pixels have a deviation of 1")

    def build_model(self) -> nn.Module:
        return Denoiser(img_size=self.args.img_size, **encoder_sizes(self.args.model))

    def draws(self) -> dict[str, Draw]:
        return {"noise": uniform(3, self.args.img_size, self.args.img_size)}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        noise = self.args.noise_range * (batch["noise"] - 0.5)
        restored = network(batch["images"] + noise)
        return F.mse_loss(restored.float(), batch["images"])
