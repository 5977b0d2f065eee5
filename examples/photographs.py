"""Real photographs without a download, for the latent configs: python examples/photographs.py [--out DIR] [--quick]

Cuts ten colour photographs that come with scikit-learn and scikit-image (pip install scikit-image) into 64-pixel tiles,
at scales from 1 to 1/2, overlapping: DIR/train, 400 of each, and DIR/held_out, 40 of each, from its right-hand part, of
which no training tile shows a pixel. A class is a photograph. DIR: data/photographs. Half a minute.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, LONGEST = 64, 640  # pixels: of a tile, and of the longer side of a photograph before it is cut
NAMES = ["astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket"]


def photographs() -> dict[str, Image.Image]:
    """Name -> RGB photograph, its longer side at most LONGEST pixels."""
    from sklearn.datasets import load_sample_image

    try:
        import skimage.data
    except ImportError:
        raise SystemExit("examples/photographs.py: needs scikit-image; pip install scikit-image") from None
    arrays = {name: getattr(skimage.data, name)() for name in NAMES}
    arrays |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    arrays["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    images = {name: Image.fromarray(array) for name, array in sorted(arrays.items())}
    for image in images.values():
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return images


def cut(image: Image.Image, number: int, rng: np.random.Generator) -> list[Image.Image]:
    """Square tiles from anywhere in the image, SIDE to 2 SIDE pixels wide (even in the logarithm), shrunk to SIDE."""
    tiles = []
    for _ in range(number):
        width = round(SIDE * 2 ** rng.uniform())
        left, top = (int(rng.integers(size - width + 1)) for size in image.size)
        box = (left, top, left + width, top + width)
        tiles.append(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box))
    return tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("data/photographs"), help="folder [data/photographs]")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the tiles")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    numbers = {"train": 20, "held_out": 2} if args.quick else {"train": 400, "held_out": 40}
    for name, image in photographs().items():
        edge = image.width - max(2 * SIDE, image.width // 4)
        parts = {
            "train": image.crop((0, 0, edge, image.height)),
            "held_out": image.crop((edge, 0, image.width, image.height)),
        }
        for part, number in numbers.items():
            folder = args.out / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for i, tile in enumerate(cut(parts[part], number, rng)):
                tile.save(folder / f"{i:04d}.png")
    for part, number in numbers.items():
        print(f"written: {args.out / part}, {number} tiles of {SIDE} pixels of each photograph")


if __name__ == "__main__":
    main()
