"""The augmentation pipe against geometry worked out by hand, and against itself."""

import math

import pytest
import torch

from objectives.draws import Draws
from sources import augment as pipe
from sources.codecs import ImageCodec


def smooth(count: int = 2, size: int = 32, channels: int = 3) -> torch.Tensor:
    """Blobs off the centre, well inside the image: a resampled one can be compared with a drawn one."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(count, channels, 2, generator=generator) * 6 - 3
    y, x = torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * 2, indexing="ij")
    return blob(x, y, centres)


def blob(x: torch.Tensor, y: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    dx, dy = x - centres[..., 0, None, None], y - centres[..., 1, None, None]
    return torch.exp(-(dx**2 + 2 * dy**2) / 18)


def numbers(count: int, **values: float) -> torch.Tensor:
    a = torch.zeros(count, 8)
    for name, value in values.items():
        a[:, int(name[1])] = value
    return a


def test_p_zero_is_the_identity_with_zero_labels():
    x = torch.randn(4, 3, 8, 8)
    out, labels = pipe.augment(x, 0.0, Draws(0, 4))
    assert torch.equal(out, x)
    assert torch.equal(labels, torch.zeros(4, pipe.AUGMENT_DIM))


def test_an_image_that_is_not_moved_is_returned_bit_for_bit_and_resampling_by_nothing_loses_nothing():
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(pipe.transform(x, numbers(2)), x)
    assert torch.allclose(pipe.resample(x, torch.eye(3).expand(2, 3, 3)), x, atol=1e-5)


def test_mirrors_are_exact():
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(pipe.transform(x, numbers(2, a0=1)), x.flip(3))
    assert torch.equal(pipe.transform(x, numbers(2, a1=1)), x.flip(2))
    assert torch.equal(pipe.transform(x, numbers(2, a0=1, a1=1)), x.flip(2, 3))


def test_rotation_by_90_degrees_turns_against_the_clock_for_positive_angles():
    x = smooth()
    out = pipe.transform(x, numbers(2, a3=math.pi / 2))
    assert (out - x.rot90(1, (2, 3))).abs().max() < 0.03
    assert (out - x.rot90(-1, (2, 3))).abs().max() > 0.3
    assert (pipe.transform(x, numbers(2, a3=math.pi)) - x.flip(2, 3)).abs().max() < 0.03


def test_whole_pixel_translation_moves_right_and_down_and_reflects():
    x = torch.randn(2, 3, 16, 16)
    out = pipe.transform(x, numbers(2, a6=1, a7=0.5))  # 16 / 8 = 2 and 1 pixels
    assert torch.allclose(out[:, :, 1:, 2:], x[:, :, :-1, :-2], atol=1e-5)
    assert torch.allclose(out[:, :, 0, 2:], x[:, :, 1, :-2], atol=1e-5)


def test_scale_and_stretch_follow_the_drawn_shape():
    size, centres = 32, torch.zeros(1, 1, 2)
    y, x = torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * 2, indexing="ij")
    image = blob(x, y, centres)
    grown = pipe.transform(image, numbers(1, a2=1.5))
    s = 2**0.3
    assert (grown - blob(x / s, y / s, centres)).abs().max() < 0.01
    wide = pipe.transform(image, numbers(1, a5=1.5))
    assert (wide - blob(x / s, y * s, centres)).abs().max() < 0.01
    tall = pipe.transform(image, numbers(1, a5=1.5, a4=math.pi / 2))
    assert (tall - blob(x * s, y / s, centres)).abs().max() < 0.01
    diagonal = pipe.transform(image, numbers(1, a5=2.0, a4=math.pi / 4))
    u, v = (x - y) / 2**0.5, (x + y) / 2**0.5  # a4 counts against the clock, with y pointing down
    u, v = u / 2**0.4, v * 2**0.4
    assert (diagonal - blob((u + v) / 2**0.5, (v - u) / 2**0.5, centres)).abs().max() < 0.01


def test_translation_comes_last_and_scale_first():
    x = smooth(1)
    both = pipe.transform(x, numbers(1, a2=1.0, a6=1.0))
    in_turn = pipe.transform(pipe.transform(x, numbers(1, a2=1.0)), numbers(1, a6=1.0))
    assert (both - in_turn)[..., 8:24, 8:24].abs().max() < 0.02
    wrong = pipe.transform(pipe.transform(x, numbers(1, a6=1.0)), numbers(1, a2=1.0))
    assert (both - wrong)[..., 8:24, 8:24].abs().max() > 0.08


def test_labels_are_table_6s_in_its_order():
    a = torch.tensor([[1.0, 1.0, 0.5, math.pi / 2, math.pi / 3, 2.0, -0.25, 0.75]])
    expected = [1, 1, 0.5, -1, 1, 2 * 0.5, 2 * 0.75**0.5, -0.25, 0.75]
    assert torch.allclose(pipe.labels(a), torch.tensor([expected]), atol=1e-6)


def test_how_often_and_how_far():
    count, p = 40_000, 0.12
    a = pipe.draw(p, Draws(3, count))
    share = (a != 0).float().mean(0)
    expected = torch.tensor([0.5, p / 2, p, p, p / 2, p, p, p])  # half of the stretches are along the axes
    assert torch.allclose(share, expected, atol=4 * (0.25 / count) ** 0.5)
    for column in (2, 5, 6, 7):
        kept = a[:, column][a[:, column] != 0]
        assert abs(kept.std().item() - 1) < 0.05 and abs(kept.mean().item()) < 0.06
    assert a[:, 3].max() > 3.1 and a[:, 3].min() < -3.1
    assert torch.equal(a[:, 6] != 0, a[:, 7] != 0)  # one decision for both directions


def test_upright_leaves_out_what_turns_an_image_and_changes_nothing_else():
    whole, upright = pipe.draw(0.9, Draws(3, 50)), pipe.draw(0.9, Draws(3, 50), upright=True)
    assert (whole[:, 1] != 0).any() and (whole[:, 3] != 0).any()
    whole[:, [1, 3]] = 0
    assert torch.equal(whole, upright)
    codec = ImageCodec(8, 3, augment_dim=pipe.AUGMENT_DIM, augment=0.9, upright=True)
    _, told = codec.to_model(torch.zeros(50, 3, 8, 8, dtype=torch.uint8), None, Draws(3, 50))
    assert torch.equal(told["augment_labels"], pipe.labels(upright))


def test_a_pure_function_of_the_draws_however_the_batch_is_split():
    x = smooth(6)
    whole, labels = pipe.augment(x, 1.0, Draws(5, 6))
    again, _ = pipe.augment(x, 1.0, Draws(5, 6))
    assert torch.equal(whole, again)
    parts = [pipe.augment(x[i : i + 2], 1.0, Draws(5, 2, start=i, total=6)) for i in (0, 2, 4)]
    assert torch.equal(labels, torch.cat([part[1] for part in parts]))
    assert torch.allclose(whole, torch.cat([part[0] for part in parts]), atol=1e-5)
    assert not torch.equal(labels, pipe.augment(x, 1.0, Draws(6, 6))[1])
    state = torch.get_rng_state()
    pipe.augment(x, 1.0, Draws(5, 6))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 12, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_shape_and_dtype_are_kept(shape, dtype):
    x = torch.rand(shape).to(dtype)
    out, labels = pipe.augment(x, 1.0, Draws(1, len(x)))
    assert out.shape == x.shape and out.dtype == dtype and out.isfinite().all()
    assert labels.shape == (len(x), pipe.AUGMENT_DIM) and labels.dtype == torch.float32


def test_autocast_does_not_blur_and_large_batches_go_in_pieces(monkeypatch):
    x, draws = smooth(5), (5, 5)
    plain, _ = pipe.augment(x, 1.0, Draws(*draws))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pipe.augment(x, 1.0, Draws(*draws))[0], plain)
    monkeypatch.setattr(pipe, "PIXELS_AT_ONCE", 1)
    assert torch.allclose(pipe.augment(x, 1.0, Draws(*draws))[0], plain, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_wait_for_the_device():
    x = smooth(4).cuda()
    expected = pipe.transform(x.cpu(), pipe.draw(1.0, Draws(0, 4, device="cuda")).cpu())
    pipe.augment(x, 1.0, Draws(0, 4, device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = pipe.augment(x, 1.0, Draws(0, 4, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(out.cpu(), expected, atol=1e-3)
