"""The autoencoder that latents are made by (Rombach et al. 2022, 2112.10752 app. G): reconstruction and a weak KL."""

from __future__ import annotations

import torch

from objectives.common import Output
from objectives.draws import Draws
from objectives.losses import Distance


def kl_to_normal(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, std^2) || N(0, 1)) in nats, summed over a sample's elements: (B, ...) twice -> (B,)."""
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).reshape(len(mean), -1).sum(1)


class KLAutoencoder(torch.nn.Module):
    """distance(y, x) + lpips_weight LPIPS(y, x) + kl_weight KL / d, y decoded from a drawn latent, d an image's values.

    As in 2112.10752, whose loss is d times this one, without its discriminator.
    """

    def __init__(
        self,
        distance: Distance,  # of pixels: losses.l1 or l2, a mean over them
        kl_weight: float = 1e-6,
        perceptual: Distance | None = None,  # losses.LPIPS, where lpips_weight is above 0
        lpips_weight: float = 0.0,
    ):
        super().__init__()
        self.distance, self.kl_weight = distance, kl_weight
        self.perceptual, self.lpips_weight = perceptual, lpips_weight

    def forward(
        self,
        model: torch.nn.Module,  # networks.Autoencoder
        x: torch.Tensor,  # (B, C, R, R) in [-1, 1]
        step: int = 0,
        draws: Draws | None = None,
        noise: torch.Tensor | None = None,  # (B, c, r, r), of the latent
        **conditions: torch.Tensor,  # an autoencoder is told no class
    ) -> Output:
        mean, std = model.encode(x)
        if noise is None:
            noise = (draws or Draws.fresh(x)).normal(mean.shape, mean.dtype)
        y = model.decode(mean + std * noise)
        pixels, kl = self.distance(y, x), kl_to_normal(mean, std)
        loss = pixels + self.kl_weight * kl / x[0].numel()
        log = {"distance": pixels.mean(), "kl": kl.mean()}
        if self.perceptual is not None:
            seen = self.perceptual(y, x)
            loss = loss + self.lpips_weight * seen
            log["lpips"] = seen.mean()
        return Output(loss, log)
