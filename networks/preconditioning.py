"""The wrapper that turns a raw network into a denoiser (2206.00364 tab. 1; 2303.01469 app. C; 2410.11081 sec. 3)."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .layers import plain_kernels
from .unet import dropout_keys_of


class Wrapper(nn.Module):
    """What denoisers and flow maps share: a raw network, what it is given beside x, and the arithmetic inside it.

    In training mode a network with dropout is given keys, from which its masks follow (see layers.dropout): calls with
    the same `dropout_keys` drop the same units, however they are computed. Without keys they are drawn from torch's
    global generator, once a call and outside of compiled code.
    """

    started = ""  # how, where its weights come from another kind of model
    autocast: torch.dtype | None = None  # bfloat16 or float16 inside the network; None: as around the call
    compiled_jvp: Callable[..., tuple[Tensor, Tensor]] | None = None  # network_jvp, where training compiles it

    def __init__(self, model: nn.Module, precond: str, c_noise: str, sigma_data: float, sigma_max: float) -> None:
        super().__init__()
        self.model = model
        self.precond = precond
        self.c_noise = c_noise
        self.sigma_data = sigma_data
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

    def network_jvp(
        self, u: Tensor, c: Tensor, du: Tensor, dc: Tensor, labels: tuple[Tensor | None, ...], more: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The network's own output at (u, c) and its derivative along (du, dc)."""
        return torch.func.jvp(lambda u, c: self.model.forward(u, c, *labels, **more), (u, c), (du, dc))

    def noise_label(self, sigma: Tensor) -> Tensor:
        """c_noise(sigma), what the network is told of the noise level; (B,) -> (B,)."""
        if self.c_noise == "t":
            return torch.atan(sigma / self.sigma_data)
        log_sigma = sigma.clamp(min=1e-8).log()  # finite at sigma = 0
        return log_sigma / 4 if self.c_noise == "log" else log_sigma * 250

    def _casting(self, x: Tensor) -> contextlib.AbstractContextManager:
        return torch.autocast(x.device.type, self.autocast) if self.autocast else contextlib.nullcontext()

    def _given(
        self, x: Tensor, dtype: torch.dtype, class_labels: Tensor | None = None, augment_labels: Tensor | None = None,
        condition: Tensor | None = None, dropout_keys: Tensor | None = None,
    ) -> tuple[tuple[Tensor | None, Tensor | None], dict[str, Tensor]]:  # fmt: skip
        """What the network is given beside x and c_noise: the two kinds of labels, and what not every network takes."""
        labels = (
            self._labels("class_labels", class_labels, self.label_dim, x),
            self._labels("augment_labels", augment_labels, self.augment_dim, x),
        )
        more = {} if condition is None else {"condition": condition.to(dtype)}
        keys = dropout_keys_of(self.model, x, dropout_keys)
        if keys is not None:
            more["dropout_keys"] = keys
        return tuple(None if value is None else value.to(dtype) for value in labels), more

    @staticmethod
    def _cast(x: Tensor, *levels: Tensor) -> tuple[Tensor, ...]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.to(dtype), *(level.to(dtype).expand(x.shape[0]) for level in levels)

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


class Preconditioner(Wrapper):
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise).

    precond: "edm", "cm" whose boundary is D(x; sigma_min) = x, or "trigflow": edm in the clock t = atan(sigma/sd), with
    the sign of F turned. c_noise: "log" is ln(sigma)/4, "log250" is 250 ln(sigma), "t" is t. The arithmetic is float32
    (float64 for float64 x), whatever the network computes in: its weights' dtype, or what `autocast` says.
    guidance_inputs: the network is also told ln w (1000 ln w where c_noise is log250) of the guidance that it is asked
    for, D_null + w (D - D_null): 1 is unguided (LCM's w, 2310.04378, is ours less 1). A second number in c_noise, it
    has the noise level's sinusoidal embedding and columns of its own in the layer behind, so that the two are added.
    """

    clock = "sigma"  # what the calls are told of the noise: its level

    def __init__(
        self,
        model: nn.Module,
        precond: str = "edm",
        c_noise: str = "log",
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        guidance_inputs: bool = False,
    ) -> None:
        super().__init__(model, precond, c_noise, sigma_data, sigma_max)
        if precond not in ("edm", "cm", "trigflow"):
            raise ValueError(f"precond is {precond!r}; it must be edm, cm or trigflow")
        if c_noise not in ("log", "log250", "t"):
            raise ValueError(f"c_noise is {c_noise!r}; it must be log, log250 or t")
        if getattr(model, "told", None) not in (None, 1 + guidance_inputs):
            raise ValueError(
                f"the network is told {model.told} numbers a sample, and this wrapper has {1 + guidance_inputs}"
            )
        self.sigma_min = sigma_min
        self.guidance_inputs = guidance_inputs
        # The fastest that the noise embedding turns, in radians for each unit of ln sigma.
        fastest = max((module.fastest for module in model.modules() if hasattr(module, "fastest")), default=1.0)
        self.turn: float = fastest * {"log": 0.25, "log250": 250.0, "t": 0.5}[c_noise]

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None,
        condition: Tensor | None = None, dropout_keys: Tensor | None = None, guidance: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Estimate of the clean data, of x's shape; float32, or float64 if x is float64.

        x: (B, ...) noisy data. sigma: (B,) its noise levels. Conditions: class_labels (B, label_dim) one-hot or None
        (the null label); augment_labels (B, augment_dim) or None (not augmented); condition (B, condition_dim), for
        networks that have one; dropout_keys, int64 (B,). With guidance_inputs only: guidance (B,), the weight w (None:
        1, unguided). ValueError for labels, conditions or guidance that the network does not take.
        """
        x, sigma = self._cast(x, sigma)
        c_skip, c_out, _, _ = self.coefficients(sigma)
        labels = (class_labels, augment_labels, condition, dropout_keys)
        F = self.raw(x, sigma, *labels, guidance=guidance).to(x.dtype)
        return wide(c_skip, x) * x + wide(c_out, x) * F

    def raw(
        self, x: Tensor, sigma: Tensor, *labels: Tensor | None, guidance: Tensor | None = None,
        **conditions: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """F(c_in x, c_noise(sigma)), the network's own output in its own dtype; arguments as in `forward`."""
        x, sigma = self._cast(x, sigma)
        _, _, c_in, c_noise = self.coefficients(sigma)
        c_noise = self._told(c_noise, guidance)
        dtype = next(self.model.parameters()).dtype
        labels, more = self._given(x, dtype, *labels, **conditions)
        with self._casting(x):
            return self.model((wide(c_in, x) * x).to(dtype), c_noise.to(dtype), *labels, **more)

    def jvp(
        self, x: Tensor, sigma: Tensor, dx: Tensor, dsigma: Tensor, raw: bool = False, guidance: Tensor | None = None,
        **conditions: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(D, its derivative along (dx, dsigma)), or F's if `raw`; shapes as in `forward`; one pass in forward mode.

        Only the network computes in its own dtype; the derivative's error is that dtype's, however small the direction.
        """
        x, sigma = self._cast(x, sigma)
        dx, dsigma = dx.to(x.dtype), dsigma.to(sigma.dtype)
        (c_skip, c_out, c_in, c_noise), d = torch.func.jvp(self.coefficients, (sigma,), (dsigma,))
        dtype = next(self.model.parameters()).dtype
        primals = wide(c_in, x) * x, self._told(c_noise, guidance)
        tangents = wide(c_in, x) * dx + wide(d[2], x) * x, self._told(d[3], None)  # ln 1 = 0: w stays as it is
        places = (v.to(dtype) for v in (*primals, *tangents))
        with self._casting(x), plain_kernels():  # the fused kernels have no forward mode
            F, dF = (self.compiled_jvp or self.network_jvp)(*places, *self._given(x, dtype, **conditions))
        if raw:
            return F, dF
        F, dF = F.to(x.dtype), dF.to(x.dtype)
        D = wide(c_skip, x) * x + wide(c_out, x) * F
        return D, wide(c_skip, x) * dx + wide(d[0], x) * x + wide(c_out, x) * dF + wide(d[1], x) * F

    def _told(self, c_noise: Tensor, guidance: Tensor | None) -> Tensor:
        """What the network is told: c_noise (B,), or (B, 2) with the guidance beside it."""
        if not self.guidance_inputs:
            if guidance is not None:
                raise ValueError("this network is not told guidance; build it with guidance_inputs")
            return c_noise
        w = torch.as_tensor(1.0 if guidance is None else guidance).to(c_noise)
        if w.shape not in (c_noise.shape, ()):
            raise ValueError(f"guidance has shape {tuple(w.shape)}; a batch of {len(c_noise)} needs ({len(c_noise)},)")
        label = w.log() * (1000 if self.c_noise == "log250" else 1)
        return torch.stack([c_noise, label.expand(c_noise.shape)], dim=1)

    def logvar(self, sigma: Tensor) -> Tensor:
        """u(sigma) of noise levels (B,), (B,) in float32 or float64: the log of the loss's size, if it is learned."""
        dtype = torch.float64 if sigma.dtype == torch.float64 else torch.float32
        return self.model.logvar(self.noise_label(sigma.to(dtype)).to(next(self.model.parameters()).dtype)).to(dtype)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in, c_noise) of noise levels (B,), (B,) each."""
        eps = self.sigma_min if self.precond == "cm" else 0.0
        c_skip = self.sigma_data**2 / ((sigma - eps) ** 2 + self.sigma_data**2)
        c_out = self.sigma_data * (sigma - eps) / (sigma**2 + self.sigma_data**2).sqrt()
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        return c_skip, -c_out if self.precond == "trigflow" else c_out, c_in, self.noise_label(sigma)


def wide(v: Tensor, x: Tensor) -> Tensor:
    """v (B,) with as many dimensions as x (B, ...)."""
    return v.reshape(-1, *[1] * (x.ndim - 1))
