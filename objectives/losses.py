"""Distances between two batches of one shape: (B, ...) and (B, ...) -> one number a sample, (B,)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class WeightsMissing(RuntimeError):
    """A pretrained network that a metric needs is not on this machine and could not be fetched."""


def l1(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference over a sample's elements."""
    return (a - b).abs().reshape(len(a), -1).mean(1)


def l2(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over a sample's elements."""
    return (a - b).square().reshape(len(a), -1).mean(1)


def pseudo_huber(a: torch.Tensor, b: torch.Tensor, c: float | None = None) -> torch.Tensor:
    """sqrt(|a - b|^2 + c^2) - c, with |.| over the WHOLE sample, not per element (2310.14189 eq. 7).

    c=None takes the paper's 0.00054 sqrt(d), d the number of elements of a sample. c=0 is the plain distance |a - b|.
    """
    square = (a - b).square().reshape(len(a), -1).sum(1)
    if c is None:
        c = 0.00054 * math.sqrt(a[0].numel())
    # Not as a difference, which rounds where |a - b| is far below c. The floor keeps the square root's slope finite
    # where a == b and c == 0; it is below any real distance.
    return square / ((square + c * c).clamp(min=torch.finfo(square.dtype).tiny).sqrt() + c)


def adaptive(square: torch.Tensor, p: float, eps: float) -> torch.Tensor:
    """square / sg(square + eps)^p (B,): every sample weighs by its own error (2505.13447 eq. 22). p = 0: as it is."""
    return square / (square.detach() + eps) ** p


class LPIPS(torch.nn.Module):
    """Learned perceptual distance on images in [-1, 1], 1 or 3 channels (1801.03924), through the lpips package.

    Images below 256 px are resized to 224 bilinearly first, as 2303.01469 does on CIFAR-10; `resize=False` leaves them.
    `weights` is a local file with torchvision's VGG16 (vgg16-397923af.pth); None lets torchvision download it.

    Raises WeightsMissing where the VGG weights can be neither read nor downloaded.
    """

    def __init__(self, weights: str | None = None, resize: bool = True):
        super().__init__()
        self.resize = resize
        self.net = _lpips_network(weights).eval().requires_grad_(False)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) twice -> (B,)."""
        return self.net(self._prepare(a), self._prepare(b)).flatten()

    def _prepare(self, x: torch.Tensor) -> torch.Tensor:
        if self.resize and x.shape[-1] < 256:
            x = F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False)
        return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def _lpips_network(weights: str | None) -> torch.nn.Module:
    import lpips  # slow to import, and only LPIPS recipes need it
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    try:
        if weights is None:
            state = torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, map_location="cpu")
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision by arguments deprecated since 0.13
            net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # its own small weights come in the package
        _fill_vgg(net.net, state)
    except Exception as error:
        where = f"could not be read from {weights}" if weights else "could not be downloaded"
        raise WeightsMissing(
            f"objective.metric: lpips: VGG16's weights {where} ({type(error).__name__}); fetch {Path(url).name} from "
            f"{url} and set objective.lpips_weights to the file, or set objective.metric: l2"
        ) from error
    return net


def _fill_vgg(vgg: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy torchvision's VGG16 weights into lpips' slices, which keep torchvision's layer numbers as names."""
    for name, parameter in vgg.named_parameters():
        layer = name.split(".", 1)[1]  # "slice3.14.weight" -> "14.weight"
        parameter.data.copy_(state[f"features.{layer}"])


def build(
    metric: str,
    huber_c: float | None = None,
    lpips_weights: str | None = None,
    device: torch.device | str = "cpu",  # where LPIPS's network lives
    resize: bool = True,  # whether LPIPS resizes small images to 224
) -> Distance:
    """The distance called `metric`: l1, l2, pseudo_huber (with its c) or lpips (with its file)."""
    if metric == "pseudo_huber":
        return lambda a, b: pseudo_huber(a, b, huber_c)
    if metric == "lpips":
        # The bound method, not the module: an objective that holds it does not put VGG into every checkpoint.
        return LPIPS(lpips_weights, resize).to(device).forward
    return {"l1": l1, "l2": l2}[metric]
