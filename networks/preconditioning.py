"""The wrapper that turns a raw network into a denoiser (2206.00364 tab. 1; 2303.01469 app. C; 2410.11081 sec. 3)."""

import contextlib

import torch
from torch import Tensor, nn


class Preconditioner(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise).

    precond: "edm", "cm" whose boundary is D(x; sigma_min) = x, or "trigflow": edm in the clock t = atan(sigma/sd), with
    the sign of F turned. c_noise: "log" is ln(sigma)/4, "log250" is 250 ln(sigma), "t" is t. The arithmetic is float32
    (float64 for float64 x), whatever the network computes in: its weights' dtype, or what `autocast` says.
    """

    autocast: torch.dtype | None = None  # bfloat16 or float16 inside the network; None: as around the call

    def __init__(
        self,
        model: nn.Module,
        precond: str = "edm",
        c_noise: str = "log",
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        super().__init__()
        if precond not in ("edm", "cm", "trigflow"):
            raise ValueError(f"precond is {precond!r}; it must be edm, cm or trigflow")
        if c_noise not in ("log", "log250", "t"):
            raise ValueError(f"c_noise is {c_noise!r}; it must be log, log250 or t")
        self.model = model
        self.precond = precond
        self.c_noise = c_noise
        self.sigma_data = sigma_data
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        # What a network of this package says of itself; a network of yours need not.
        self.img_resolution: int | None = getattr(model, "img_resolution", None)
        self.img_channels: int | None = getattr(model, "img_channels", None)
        self.label_dim: int = getattr(model, "label_dim", 0)
        self.augment_dim: int = getattr(model, "augment_dim", 0)
        image = (self.img_channels, self.img_resolution, self.img_resolution)
        self.shape: tuple[int, ...] = getattr(model, "shape", image)  # of one sample
        self.condition_dim: int = getattr(model, "condition_dim", 0)
        self.codec: nn.Module | None = None  # between data and what the model sees, where this repository loads them

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Estimate of the clean data, of x's shape; float32, or float64 if x is float64.

        x: (B, ...) noisy data. sigma: (B,) its noise levels. class_labels: (B, label_dim) one-hot or None (the null
        label). augment_labels: (B, augment_dim) or None (not augmented). condition: (B, condition_dim), for networks
        that have one. ValueError for labels or conditions of another shape.
        """
        x, sigma = self._cast(x, sigma)
        f = self.raw(x, sigma, class_labels, augment_labels, condition).to(x.dtype)
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
        eps = self.sigma_min if self.precond == "cm" else 0.0
        c_skip = self.sigma_data**2 / ((sigma - eps) ** 2 + self.sigma_data**2)
        c_out = self.sigma_data * (sigma - eps) / (sigma**2 + self.sigma_data**2).sqrt()
        return c_skip * x - c_out * f if self.precond == "trigflow" else c_skip * x + c_out * f

    def raw(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """F(c_in x, c_noise(sigma)), the network's own output in its own dtype; arguments as in `forward`."""
        x, sigma = self._cast(x, sigma)
        class_labels = self._labels("class_labels", class_labels, self.label_dim, x)
        augment_labels = self._labels("augment_labels", augment_labels, self.augment_dim, x)
        c_in = (sigma**2 + self.sigma_data**2).rsqrt().reshape(-1, *[1] * (x.ndim - 1))
        dtype = next(self.model.parameters()).dtype
        inputs = (c_in * x, self.noise_label(sigma), class_labels, augment_labels)
        inputs = [None if t is None else t.to(dtype) for t in inputs]
        more = {} if condition is None else {"condition": condition.to(dtype)}
        cast = torch.autocast(x.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with cast:
            return self.model(*inputs, **more)

    def noise_label(self, sigma: Tensor) -> Tensor:
        """c_noise(sigma), what the network is told of the noise level; (B,) -> (B,)."""
        if self.c_noise == "t":
            return torch.atan(sigma / self.sigma_data)
        log_sigma = sigma.clamp(min=1e-8).log()  # finite at sigma = 0
        return log_sigma / 4 if self.c_noise == "log" else log_sigma * 250

    @staticmethod
    def _cast(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.to(dtype), sigma.to(dtype).expand(x.shape[0])

    @staticmethod
    def _labels(name: str, labels: Tensor | None, dim: int, x: Tensor) -> Tensor | None:
        if dim == 0 and labels is None:
            return None
        if labels is None:
            return x.new_zeros(x.shape[0], dim)
        if labels.shape != (x.shape[0], dim):
            needs = f"({x.shape[0]}, {dim})" if dim else "none"
            raise ValueError(f"{name} has shape {tuple(labels.shape)}; this network needs {needs}")
        return labels
