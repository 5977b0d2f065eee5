"""EDM's augmentation pipe (Karras et al. 2022, 2206.00364, appendix F.2, table 6).

Eight random numbers per image make one affine transformation. They are also given to the network as nine labels, so
that it learns which images were transformed and, asked with labels of zero, draws none that are ("non-leaky").
CIFAR-10's published setting is p = 0.12.
"""

import functools
import math

import torch
import torch.nn.functional as F

from objectives.draws import Draws

AUGMENT_DIM = 9  # labels per image
SCALE = 2**0.2  # one standard deviation of isotropic and of anisotropic scaling
TRANSLATE = 0.125  # one standard deviation of translation, in image sides
PIXELS_AT_ONCE = 2**26  # of the enlarged images: 256 MiB in float32

# The sym6 wavelet's low-pass filter (Daubechies 1992, symlets), as in StyleGAN2-ADA (2006.06676, appendix B.2). Being
# orthonormal, it takes an image to twice its resolution and back without loss.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip


def flip(images: torch.Tensor, flags: torch.Tensor, dim: int = 3) -> torch.Tensor:
    """Mirror left to right (dim 3) or upside down (dim 2) the images (B, C, H, W) whose flag (B,), bool, is set."""
    return torch.where(flags[:, None, None, None], images.flip(dim), images)


def augment(images: torch.Tensor, p: float, draws: Draws, upright: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform images (B, C, H, W), float in [-1, 1], each way with probability p; upright: none is turned.

    Runs on the images' device without waiting for it, and is a pure function of `draws` (on the same device). Returns
    images as given in shape and dtype (they may overshoot [-1, 1] a little), and labels (B, 9), float32.
    """
    if p == 0:
        return images, torch.zeros(len(images), AUGMENT_DIM, device=images.device)
    numbers = draw(p, draws, upright)
    return transform(images, numbers), labels(numbers)


def draw(p: float, draws: Draws, upright: bool = False) -> torch.Tensor:
    """The random numbers a0..a7 of table 6, (B, 8) float32; zeros transform nothing.

    a0, a1: mirror in x (each image with probability 1/2) and in y; a2: scale; a3: angle; a4, a5: angle and amount of
    stretching; a6, a7: translation in x and y. All but a0 are kept with probability p. Half of the stretches are along
    the image's own axes (a4 = 0): the table does not say so, the published models were trained so. upright: a1 and a3
    are 0, as in MeanFlow's and SoFlow's code.
    """
    rows = draws.count
    signs = draws.integers(2, (rows, 2)).float()
    angles = (2 * draws.uniform((rows, 2)) - 1) * math.pi
    normal = draws.normal((rows, 4))
    mirror_y, scale, rotate, stretch, translate = (draws.uniform((rows, 5)) < p).float().unbind(1)
    if upright:
        mirror_y, rotate = torch.zeros_like(mirror_y), torch.zeros_like(rotate)
    slanted = (draws.uniform((rows,)) < 0.5).float()
    kept = [torch.ones_like(scale), mirror_y, scale, rotate, stretch * slanted, stretch, translate, translate]
    return torch.cat([signs, normal[:, :1], angles, normal[:, 1:]], dim=1) * torch.stack(kept, dim=1)


def labels(numbers: torch.Tensor) -> torch.Tensor:
    """What the network is told, (B, 9), of a0..a7, (B, 8): table 6's column "conditioning", top to bottom."""
    a0, a1, a2, a3, a4, a5, a6, a7 = numbers.unbind(1)
    return torch.stack([a0, a1, a2, a3.cos() - 1, a3.sin(), a5 * a4.cos(), a5 * a4.sin(), a6, a7], dim=1)


def transform(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) transformed by a0..a7, (B, 8): mirrored exactly, the rest by one resampling.

    Images that are only mirrored, or not changed, are not resampled.
    """
    images = flip(flip(images, numbers[:, 0] > 0), numbers[:, 1] > 0, dim=2)
    _, channels, height, width = images.shape
    with torch.autocast(images.device.type, enabled=False):  # half-precision geometry would miss by pixels
        inverse = inverse_affine(numbers, height, width)
        at_once = max(1, PIXELS_AT_ONCE // (channels * 36 * height * width))
        parts = zip(images.split(at_once), inverse.split(at_once), strict=True)
        moved = torch.cat([resample(part, matrix) for part, matrix in parts])
    changed = (numbers[:, 2:] != 0).any(1)
    return torch.where(changed[:, None, None, None], moved, images)


def inverse_affine(numbers: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 3, 3): where in the input each point (x, y, 1) of the output comes from; pixels, counted from the centre."""
    _, _, a2, a3, a4, a5, a6, a7 = numbers.unbind(1)
    unscale, unstretch, zero = SCALE**-a2, SCALE**-a5, torch.zeros_like(a2)
    shift = _matrix(1 + zero, zero, -TRANSLATE * width * a6, zero, 1 + zero, -TRANSLATE * height * a7)
    stretch = _rotation(-a4) @ _matrix(unstretch, zero, zero, zero, 1 / unstretch, zero) @ _rotation(a4)
    scale = _matrix(unscale, zero, zero, zero, unscale, zero)
    return scale @ _rotation(a3) @ stretch @ shift


def _matrix(*two_rows: torch.Tensor) -> torch.Tensor:
    """(B, 3, 3) of the six entries, (B,) each, above its last row, 0 0 1."""
    zero = torch.zeros_like(two_rows[0])
    return torch.stack([*two_rows, zero, zero, zero + 1], dim=1).view(-1, 3, 3)


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros_like(angle)
    return _matrix(angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero)


def resample(images: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) seen through `inverse` (B, 3, 3): doubled, read between pixels at double density, halved.

    Beyond its border an image goes on as its reflection, for one image side; beyond that it is zero.
    """
    height, width = images.shape[2:]
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    up_y, down_y = _doubling(height, images.device, dtype)
    up_x, down_x = _doubling(width, images.device, dtype)
    fine = up_y @ images.to(dtype) @ up_x.T
    # The filter's weight is centred near its sixth tap, so pixel i of the image is pixel 2 i of the doubled one.
    y = (torch.arange(down_y.shape[1], device=images.device, dtype=dtype) - 4 - height) / 2
    x = (torch.arange(down_x.shape[1], device=images.device, dtype=dtype) - 4 - width) / 2
    out_y, out_x = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack([out_x, out_y, torch.ones_like(out_x)], dim=-1)
    source = (points.view(1, -1, 3) @ inverse.to(dtype).mT)[..., :2].view(len(images), *out_x.shape, 2)
    sides = torch.stack([x.new_full((), up_x.shape[0]), x.new_full((), up_y.shape[0])])
    grid = (4 * source - 1) / sides  # -1 and 1 are the outer edges of the doubled image
    seen = F.grid_sample(fine, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (down_y @ seen @ down_x.T).to(images.dtype)


@functools.lru_cache(maxsize=8)
def _doubling(side: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Along one axis, as matrices: an image to its reflected, doubled self; and the doubled image back.

    up, (2 (3 side - 2), side): a margin of side - 1 mirrored pixels each way, zeros between the pixels, the filter.
    down, (side, 2 side + 10): the filter at every second pixel of a doubled image that has 5 more pixels each way.
    """
    taps = torch.tensor(SYM6, dtype=torch.float64)
    taps = taps / taps.sum()

    def halving(n: int) -> torch.Tensor:  # (n, 2 n + 10): the filter at every second pixel
        return F.conv_transpose1d(torch.eye(n, dtype=torch.float64)[:, None], taps.view(1, 1, 12), stride=2)[:, 0]

    place = torch.arange(3 * side - 2) - (side - 1)
    reflected = (side - 1) - ((side - 1) - place.abs()).abs()
    up = 2 * halving(3 * side - 2).T.contiguous()[5:-5] @ F.one_hot(reflected, side).double()
    return up.to(device, dtype), halving(side).to(device, dtype)
