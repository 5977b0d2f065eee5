"""The training images nearest to a sample, and how near is a copy."""

import torch
from torch import Tensor

from metrics.common import Images, ImageSet, fetch, progress, spread


def nearest(samples: Images, dataset: ImageSet, k: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """The k nearest training images of each sample: distances float32 (N, k), ascending, and indices int64 (N, k).

    The distance is the root mean square difference of pixels in [0, 1], the normalised l2 of 2301.13188, section 4:
    0 is a copy; for what else counts as one see `copy_threshold`. By blocks, brute force, results on the CPU.
    """
    k = min(k, len(dataset))
    found = []
    with progress("nearest images", len(samples)) as bar:
        for rows in torch.arange(len(samples)).split(1024):
            found.append(nearest_block(fetch(samples, rows), dataset, k, device))
            bar.update(len(rows))
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


def nearest_block(samples: Tensor, dataset: ImageSet, k: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """`nearest` for a block of samples: a matrix product finds candidates, plain differences measure and order them."""
    x = samples.to(device).flatten(1).float() - 128  # centred: smaller squares, less rounding
    best = torch.empty(len(x), 0, device=x.device)
    found = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    for rows in torch.arange(len(dataset)).split(2048):
        y = fetch(dataset, rows).to(device).flatten(1).float() - 128
        squared = (x**2).sum(1, keepdim=True) + (y**2).sum(1) - 2 * (x @ y.T)
        best, found = torch.cat([best, squared], 1), torch.cat([found, rows.to(device).expand(len(x), -1)], 1)
        best, keep = best.topk(min(k + 8, best.shape[1]), largest=False)  # 8 to spare for ties broken by rounding
        found = found.gather(1, keep)
    exact = torch.empty(found.shape, device=x.device)
    for column in range(found.shape[1]):
        y = fetch(dataset, found[:, column].cpu()).to(device).flatten(1).float() - 128
        exact[:, column] = ((x - y) ** 2).mean(1).sqrt() / 255
    exact, order = exact.sort(dim=1, stable=True)
    return exact[:, :k].cpu(), found.gather(1, order)[:, :k].cpu()


def copy_threshold(dataset: ImageSet, device: str | torch.device, share: float = 0.01) -> float:
    """The distance to a training image up to which a sample counts as a copy of it (`nearest` gives distances).

    As near as that lie only `share` of the training images to another training image, so about `share` of new images
    of the same kind would count by chance, and more copies than that are memory. Measured on up to 2,000 training
    images spread evenly over the set, each against all. Mirrored copies are not looked for.
    """
    some = fetch(dataset, spread(len(dataset), 2000))
    distances, _ = nearest(some, dataset, 2, device)  # the first is the image itself
    return float(distances[:, -1].quantile(share, interpolation="lower"))
