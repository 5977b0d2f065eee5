"""EDM: denoising at a log-normal noise level; trains the teacher (Karras et al. 2022, 2206.00364)."""

from __future__ import annotations

import torch

from objectives.common import Model, Output, append_dims, by_level
from objectives.draws import Draws
from objectives.losses import l2


class EDM(torch.nn.Module):
    """loss = lambda(sigma) |D(x + sigma z; sigma) - x|^2, lambda = (sigma^2 + sd^2) / (sigma sd)^2 (2206.00364 tab. 1).

    The square is averaged over a sample's elements and over the batch. logvar: loss exp(-u) + u, where u(sigma) is what
    the network learns of the loss's logarithm, model.logvar(sigma) (B,); every noise level then weighs the same
    (2312.02696 eq. 15 and 21; EDM2 adds up what is averaged here).
    """

    def __init__(
        self,
        P_mean: float = -1.2,  # mean of ln sigma
        P_std: float = 1.2,  # standard deviation of ln sigma
        sigma_data: float = 0.5,  # standard deviation of the data
        logvar: bool = False,  # weigh the loss by what the network learns of its size
    ):
        super().__init__()
        self.P_mean, self.P_std, self.sigma_data, self.logvar = P_mean, P_std, sigma_data, logvar

    def forward(
        self, model: Model, x: torch.Tensor, step: int = 0, draws: Draws | None = None,
        sigma: torch.Tensor | None = None, noise: torch.Tensor | None = None, **conditions: torch.Tensor | None,
    ) -> Output:  # fmt: skip
        """x (B, ...) clean data; noise levels sigma (B,) and noise (B, ...) may be given."""
        draws = draws or Draws.fresh(x)
        if sigma is None:
            sigma = (self.P_mean + self.P_std * draws.normal((len(x),))).exp()
        if noise is None:
            noise = draws.normal(x.shape, x.dtype)
        D = model(x + append_dims(sigma, x) * noise, sigma, **conditions)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        loss = weight * l2(D, x)
        log = by_level(loss, sigma)
        if self.logvar:
            u = model.logvar(sigma)
            loss = loss * torch.exp(-u) + u
        return Output(loss, log)
