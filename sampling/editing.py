"""Zero-shot editing: samples that keep given linear coordinates of a reference image (2303.01469 algorithm 4).

    known = edit(model, x, *inpainting(mask), sigmas, z)  # any model(x, sigma, **conditions) -> clean data
    known = edit(to_data(flow_map), x, *inpainting(mask), times, z, clock="time")

Sampling is sampler.multistep's: sigmas are descending noise levels (or times), all of them evaluated; z is N(0, 1);
`noise_at` and the other settings (sigma_min, clock, conditions) go to it as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sampler import Model, NoiseAt, multistep, shares

GREY = (0.2989, 0.5870, 0.1140)  # red, green and blue in grey, as 2303.01469 and OpenAI's code have it


def edit(
    model: Model,
    reference: torch.Tensor,  # (B, ...) or (1, ...), in [-1, 1]; its known coordinates are kept, the others not read
    A: Callable[[torch.Tensor], torch.Tensor],  # invertible linear map of an image to coordinates
    A_inverse: Callable[[torch.Tensor], torch.Tensor],
    known_mask: torch.Tensor,  # bool, broadcast to A(reference): True where kept (the paper's 1 - Omega)
    sigmas: Sequence[float],
    z: torch.Tensor,  # (B, ...)
    noise_at: NoiseAt | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Clean data (B, ...) with the reference's known coordinates, not clamped: multistep sampling, put right each step.

    It starts at sigmas[0] z, as OpenAI's code does. The paper starts at y + sigmas[0] z, with y = visible(...): that
    is `under(z, y, sigmas[0])` in place of z, the same at sigma 80, and better where the first level is low.
    """
    known_mask = known_mask.to(z.device)
    kept = A(reference)

    def put_right(x: torch.Tensor, sigma: torch.Tensor, **conditions: torch.Tensor | None) -> torch.Tensor:
        return A_inverse(torch.where(known_mask, kept, A(model(x, sigma, **conditions))))

    return multistep(put_right, z, sigmas, noise_at, **settings)


# Linear constraints ---------------------------------------------------------------------------------------------------


class Constraint(NamedTuple):
    """Which linear coordinates of images (B, C, H, W) an edit keeps: three arguments of `edit`."""

    A: Callable[[torch.Tensor], torch.Tensor]
    A_inverse: Callable[[torch.Tensor], torch.Tensor]
    known_mask: torch.Tensor


def inpainting(known: torch.Tensor) -> Constraint:
    """Keep the pixels where `known`, bool (H, W) or (B, 1, H, W), is True."""
    return Constraint(torch.positive, torch.positive, known)  # pixels are coordinates


def colorisation() -> Constraint:
    """Keep the grey of RGB images: coordinate 0 is the channels along GREY, the other two are across it."""
    axes = orthogonal(torch.tensor(GREY))

    def A(x: torch.Tensor) -> torch.Tensor:  # the matrix is symmetric: its own inverse
        return torch.einsum("dc,bchw->bdhw", axes.to(x), x)

    return Constraint(A, A, torch.tensor([True, False, False]).view(3, 1, 1))


def super_resolution(factor: int) -> Constraint:
    """Keep the means of blocks of factor x factor pixels: coordinate 0 of a block is `factor` times its mean.

    The coordinates of (B, C, H, W) are (B, C, H / factor, W / factor, factor^2). ValueError for a factor below 2.
    """
    if factor < 2:
        raise ValueError(f"factor: {factor} leaves nothing to add; it must be 2 or more")
    axes = orthogonal(torch.ones(factor**2))

    def A(x: torch.Tensor) -> torch.Tensor:
        blocks = F.pixel_unshuffle(x, factor).unflatten(1, (-1, factor**2))  # (B, C, factor^2, rows, columns)
        return blocks.movedim(2, 4).contiguous() @ axes.to(x)

    def A_inverse(y: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle((y @ axes.to(y)).movedim(4, 2).flatten(1, 2), factor)

    return Constraint(A, A_inverse, torch.arange(factor**2) == 0)


def visible(reference: torch.Tensor, constraint: Constraint) -> torch.Tensor:
    """The reference with its unknown coordinates at 0: all that an edit sees of it."""
    known = constraint.A(reference)
    return constraint.A_inverse(torch.where(constraint.known_mask.to(known.device), known, 0))


def orthogonal(first: torch.Tensor) -> torch.Tensor:
    """A symmetric orthogonal matrix (n, n), float64, whose first row points along `first` (n,), n >= 2.

    Householder's reflection that swaps the first axis and that direction. `first` must not be the first axis itself.
    """
    direction = first.double() / torch.linalg.vector_norm(first.double())
    eye = torch.eye(len(first), dtype=torch.float64)
    normal = direction - eye[0]
    return eye - 2 * torch.outer(normal, normal) / normal.dot(normal)


# From an image that is not known exactly ------------------------------------------------------------------------------


def stroke(
    model: Model,
    drawing: torch.Tensor,  # (B, ...) or (1, ...), in [-1, 1]
    sigmas: Sequence[float],  # the first: how much of the drawing is lost in noise
    z: torch.Tensor,  # (B, ...)
    noise_at: NoiseAt | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Data that looks like the drawing from afar: multistep sampling from drawing + sigmas[0] z (SDEdit 2108.01073)."""
    z = under(z, drawing, sigmas[0], settings.get("clock", "sigma"))
    return multistep(model, z, sigmas, noise_at, **settings)


def denoise(model: Model, noisy: torch.Tensor, sigmas: Sequence[float], **settings: Any) -> torch.Tensor:
    """Clean data: multistep sampling from the noisy data itself, clean data + s times white noise (B, ...).

    s is sigmas[0]; in the clock "time", t / (1 - t) of the first time t.
    """
    nothing = torch.zeros_like(noisy)
    return multistep(model, under(nothing, noisy, sigmas[0], settings.get("clock", "sigma")), sigmas, **settings)


def under(z: torch.Tensor, x: torch.Tensor, level: float, clock: str = "sigma") -> torch.Tensor:
    """The z from which sampling starts at x + sigma z, or (1 - t) x + t z in the clock "time"."""
    of_data, of_noise = shares(level, clock)
    return z + x * (of_data / of_noise)


def noise_level(x: torch.Tensor) -> torch.Tensor:
    """Standard deviation (B,) of the white noise in images (B, C, H, W), H and W >= 2, in their own units.

    The median absolute deviation of the diagonal Haar details, of which clean images have few (Donoho & Johnstone
    1994). Too high for images with fine texture; too low where clipping to [-1, 1] took noise away.
    """
    x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
    details = (x[..., ::2, ::2] - x[..., ::2, 1::2] - x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 2
    return details.flatten(1).abs().quantile(0.5, dim=1) / 0.67449  # the median of |N(0, 1)|


def interpolate(
    model: Model,
    first: torch.Tensor,  # (1, ...) in [-1, 1]
    second: torch.Tensor,  # (1, ...)
    weights: torch.Tensor,  # (B,) in [0, 1]: 0 is `first`, 1 is `second`
    sigmas: Sequence[float],  # the first: how much of the two is lost in noise
    z: torch.Tensor,  # (2, ...): the noise of the two
    **settings: Any,
) -> torch.Tensor:
    """Data (B, ...) between two images: their noise is turned from one to the other, the images beneath it blended.

    At sigma_max, where noise is all there is, this is the interpolation of 2303.01469 appendix D.
    """
    alpha = weights.view(-1, *[1] * (z.ndim - 1)).to(z)
    of_first, of_second = (own.expand(len(alpha), *own.shape) for own in z)
    noise = slerp(of_first, of_second, weights)
    return stroke(model, torch.lerp(first, second, alpha), sigmas, noise, **settings)


def slerp(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Along the great circle from a to b (B, ...), each sample by its own angle and weight (B,)."""
    shape = (-1, *[1] * (a.ndim - 1))
    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1)
    angle = cosine.acos().clamp(1e-4, math.pi - 1e-4).view(shape)  # not 0 / 0 where a is b or -b
    alpha = weights.to(angle).view(shape)
    return (((1 - alpha) * angle).sin() * a + (alpha * angle).sin() * b) / angle.sin()
