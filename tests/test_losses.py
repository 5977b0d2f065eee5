"""Distances between batches."""

import math

import pytest
import torch
import torchvision

from objectives import losses

A = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
B = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_l1_and_l2_average_over_a_sample():
    assert torch.allclose(losses.l1(A, B)[1], (A[1] - B[1]).abs().sum() / 32)
    assert torch.allclose(losses.l2(A, B)[1], ((A[1] - B[1]) ** 2).sum() / 32)


def test_pseudo_huber_is_on_the_whole_sample_not_per_element():
    c = 0.00054 * math.sqrt(32)
    whole = math.sqrt(float(((A[2] - B[2]) ** 2).sum()) + c * c) - c
    assert float(losses.pseudo_huber(A, B)[2]) == pytest.approx(whole, rel=1e-12)
    per_element = float(((A[2] - B[2]) ** 2 + c * c).sqrt().sub(c).sum())
    assert abs(per_element / whole - 1) > 0.5  # the other loss is far off: this test can see it


def test_pseudo_huber_without_c_is_the_distance_with_a_finite_slope_at_zero():
    a = A.clone().requires_grad_()
    loss = losses.pseudo_huber(a, torch.cat([A[:1], B[1:]]), c=0.0)
    loss.sum().backward()
    assert loss[0].item() == pytest.approx(0, abs=1e-100) and torch.isfinite(a.grad).all()
    assert float(a.grad[1].norm()) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 5, 2), (3, 1, 4, 4), (3, 1, 2, 4, 4)])
def test_every_distance_takes_any_shape(shape):
    a, b = torch.randn(shape), torch.randn(shape)
    for distance in (losses.l1, losses.l2, losses.pseudo_huber):
        assert distance(a, b).shape == (3,)


def test_lpips_without_weights_names_the_options(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(losses.WeightsMissing, match=r"objective\.lpips_weights.*objective\.metric: l2"):
        losses.LPIPS()
    with pytest.raises(losses.WeightsMissing, match=r"missing\.pth"):
        losses.LPIPS(str(tmp_path / "missing.pth"))


def test_lpips_resizes_small_images_and_agrees_with_its_definition(tmp_path):
    torch.manual_seed(0)
    vgg = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    torch.save({f"features.{k}": v for k, v in vgg.state_dict().items()}, tmp_path / "vgg.pth")
    lpips = losses.LPIPS(str(tmp_path / "vgg.pth"))
    a, b = torch.rand(2, 1, 32, 32) * 2 - 1, torch.rand(2, 1, 32, 32) * 2 - 1
    assert torch.allclose(lpips(a, b), lpips_by_hand(vgg, lpips.net, a, b), rtol=1e-4)
    assert lpips(a, a).abs().max() == 0 and (lpips(a, b) > 0).all()


@torch.no_grad()
def lpips_by_hand(vgg, net, a, b):
    """1801.03924 eq. 1 on torchvision's VGG16: unit-normalised features after relu 1_2, 2_2, 3_3, 4_3 and 5_3."""
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total, features = 0, []
    for x in (a, b):
        x = torch.nn.functional.interpolate(x, size=(224, 224), mode="bilinear").repeat(1, 3, 1, 1)
        x, found = (x - mean[:, None, None]) / std[:, None, None], []
        for number, layer in enumerate(vgg):
            x = layer(x)
            if number in (3, 8, 15, 22, 29):
                found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        features.append(found)
    for level, (fa, fb) in enumerate(zip(*features, strict=True)):
        weights = getattr(net, f"lin{level}").model[-1].weight
        total = total + ((fa - fb) ** 2 * weights).sum(1).mean((1, 2))
    return total
