"""Scores mean what they say: each against the formula written out again on the same features, by whatever way it came.

Inception has seeded random weights: its published ones are not at hand offline. The arithmetic around it is the same.
"""

import hashlib
import math
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import tiny
from sklearn.datasets import load_digits
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from config import Metrics
from metrics import classifier, scores, weights
from sampling.samples import ImageSamples, read_images
from sources.codecs import to_float, to_uint8
from sources.images import ImageSet
from training import trainer

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import second_score

DIGITS = torch.tensor(np.rint(load_digits().images * 255 / 16).astype(np.uint8))[:, None]


def make(images):
    return ImageSet(name="made", num_classes=10, labels=torch.arange(len(images)) % 10, images=images)


def noisy_digits(count, seed):
    """Draws of one distribution, uint8 (count, 1, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(DIGITS), (count,), generator=generator)
    return (DIGITS[rows] + 40 * torch.randn(count, 1, 8, 8, generator=generator)).clamp(0, 255).to(torch.uint8)


def pictures(count, channels, seed):
    """Smooth coloured pictures, uint8 (count, channels, 32, 32)."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def statistics(features):
    """Mean and covariance as EDM's fid.py adds them up (of n - 1): float64 sums of x and x x^T."""
    x = features.double().numpy()
    mu = x.sum(0) / len(x)
    return mu, (x.T @ x - len(x) * np.outer(mu, mu)) / (len(x) - 1)


def by_sqrtm(a, b):
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features (N, D), as the paper (1706.08500) and EDM have it."""
    (mu_a, sigma_a), (mu_b, sigma_b) = statistics(a), statistics(b)
    root = scipy.linalg.sqrtm(sigma_a @ sigma_b)
    return float(((mu_a - mu_b) ** 2).sum() + np.real(np.trace(sigma_a + sigma_b - 2 * root)))


def by_nuclear_norm(a, b):
    """The same without a root: tr (A B)^(1/2) is the sum of singular values of X_a X_b^T. Exact where A is singular."""
    a, b = a.double().numpy(), b.double().numpy()
    x, y = ((v - v.mean(0)) / math.sqrt(len(v) - 1) for v in (a, b))
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(apart + (x**2).sum() + (y**2).sum() - 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum())


# Classifier features --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    """A classifier of random weights whose features have the scale of a trained one's."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = classifier.Classifier(1, 8, 10)
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                layer.momentum = 1.0
        network.train()(DIGITS)
    return network.eval()


@pytest.fixture
def scored(network, tmp_path):
    """A function of samples and training images: their scores, through the product, by that classifier."""

    def scored(samples, images, *names):
        dataset, shape = make(images), {"channels": 1, "resolution": 8, "classes": 10}
        path = tmp_path / f"classifier-v{classifier.VERSION}-{scores.file_name(dataset)}.pt"
        torch.save({"state": network.state_dict(), "shape": shape, "accuracy": 1.0}, path)
        settings = Metrics(features="classifier", scores=list(names), num=100)
        return scores.score(samples, dataset, settings, tmp_path, "cpu", log=pytest.fail)

    return scored


def features_of(network, images):
    with torch.no_grad():
        return network(images)[0]


@pytest.mark.parametrize(("n", "m"), [(10, 10), (40, 1500), (64, 64), (65, 70), (300, 1500), (1500, 1500)])
def test_fid_is_the_distance_by_sqrtm(n, m, network, scored):
    samples, images = noisy_digits(n, 1), DIGITS[:m]  # 64 features: up to 64 images their covariance is singular
    a, b = features_of(network, samples), features_of(network, images)
    found = scored(samples, images, "fid")["fid"]
    print(f"{n} against {m}: {found:.8g}, sqrtm {by_sqrtm(a, b):.8g}, without a root {by_nuclear_norm(a, b):.8g}")
    assert found == pytest.approx(by_sqrtm(a, b), rel=1e-5) == pytest.approx(by_nuclear_norm(a, b), rel=1e-5)


def test_kid_precision_and_recall_are_their_formulas(network, scored):
    samples, images = noisy_digits(200, 1), DIGITS[:200]
    x, y = (features_of(network, v).double() for v in (samples, images))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def without_itself(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    def covered(points, by):  # 1904.06991: within the distance of some point's third neighbour
        radii = torch.cdist(by, by).kthvalue(4, dim=1).values
        return float((torch.cdist(points, by) <= radii).any(1).double().mean())

    found = scored(samples, images, "kid", "prc")
    kid = without_itself(kernel(x, x)) + without_itself(kernel(y, y)) - 2 * kernel(x, y).mean()  # 1801.01401
    print(found, float(kid), covered(x, y), covered(y, x))
    assert found["kid"] == pytest.approx(float(kid), rel=1e-4)  # a subset is all 200 images
    assert found["precision"] == pytest.approx(covered(x, y)) and found["recall"] == pytest.approx(covered(y, x))
    assert 0 < found["recall"] != found["precision"] < 1


def test_few_samples_score_worse_by_the_inverse_of_their_number(network, scored):
    images = noisy_digits(50_000, 0)  # and perfect samples: distance c (1 / samples + 1 / images), c the same for all
    few, many = (scored(noisy_digits(n, 1), images, "fid")["fid"] for n in (5_000, 50_000))
    print(f"perfect samples: {few:.5f} of 5,000, {many:.5f} of 50,000, {few / many:.2f} times")
    assert few / many == pytest.approx(5.5, rel=0.15)


# Inception ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(inception_file, tmp_path_factory):
    """Pictures, their features by the network alone, EDM's reference of the second half, and a file of that."""
    network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=inception_file)
    samples, images = pictures(10, 3, 1), pictures(11, 3, 2)  # far fewer than 2048 features: singular covariances
    a, b = network(samples)[0], network(images)[0]
    reference = tmp_path_factory.mktemp("reference") / "reference.npz"
    mu, sigma = statistics(b)
    np.savez(reference, mu=mu, sigma=sigma)
    return SimpleNamespace(samples=samples, images=images, a=a, b=b, reference=str(reference))


@pytest.fixture
def judged(inception_file, tmp_path, monkeypatch):
    """A function of samples: their score to a reference, and the mean and covariance of features that it was made of.

    Without a reference: a point, whose distance costs little.
    """
    np.savez(tmp_path / "point.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    kept, real = [], scores.inception_statistics
    monkeypatch.setattr(scores, "inception_statistics", lambda options: kept.append(real(options)) or kept[-1])

    def judged(samples, reference=tmp_path / "point.npz"):
        cfg = Metrics(features="inception", weights=inception_file, reference=str(reference), num=100)
        found = scores.score(samples, None, cfg, tmp_path, "cpu", log=lambda _: None)
        return found["fid"], kept[-1]["mu"], kept[-1]["sigma"]

    return judged


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_inception_fid_to_images_and_to_edms_statistics(known, judged, inception_file, tmp_path):
    expected, said = by_nuclear_norm(known.a, known.b), []
    cfg = Metrics(features="inception", weights=inception_file, num=100)
    to_images = scores.score(known.samples, make(known.images), cfg, tmp_path, "cpu", log=said.append)["fid"]
    to_file, mu, sigma = judged(known.samples, known.reference)
    print(f"to images {to_images:.8g}, to a reference {to_file:.8g}, written out {expected:.8g}")
    assert [to_images, to_file] == pytest.approx([expected] * 2, rel=1e-4)

    own_mu, own_sigma = statistics(known.a)
    apart = np.abs(mu - own_mu).max() / np.abs(own_mu).max(), np.abs(sigma - own_sigma).max() / np.abs(own_sigma).max()
    print(f"mean and covariance against EDM's sums: {apart[0]:.1e}, {apart[1]:.1e} of the largest")
    assert max(apart) < 1e-9

    assert said[-1].startswith(f"{inception_file} is not torch-fidelity's Inception") and "no FID" in said[-1]
    kept = [path.name for path in (tmp_path / "fidelity").iterdir()]  # what no other weights will find
    assert kept and all(f"-rgb-{sha256(inception_file)[:16]}-" in name for name in kept)


def test_pngs_score_as_arrays_and_as_torch_fidelity_reads_them(known, judged, inception_file, tmp_path):
    folder, own = tmp_path / "pngs", statistics(known.a)
    ImageSamples(None).write(known.samples, None, 0, folder)
    _, mu, sigma = judged(read_images(folder, tiny(tmp_path), None))
    options = {"batch_size": 64, "cuda": False, "save_cpu_ram": True, "verbose": False, "input1": str(folder)}
    options |= {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": inception_file}
    theirs = scores.inception_statistics(options)  # its own reader of folders
    assert equal((theirs["mu"], theirs["sigma"]), (mu, sigma))
    assert np.array_equal(mu, known.a.double().numpy().mean(0)) and np.allclose(sigma, own[1], rtol=0, atol=1e-12)


def test_a_grey_image_scores_as_three_equal_channels_resized_as_tensorflow_1_does(judged):
    seen, grey = [], pictures(10, 1, 4)

    def look(module, inputs):
        if isinstance(module, torch.nn.Conv2d) and not seen:
            seen.append(inputs[0].double())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    expected = judged(grey)
    hook.remove()
    assert equal(judged(grey.expand(-1, 3, -1, -1)), expected)

    source = torch.arange(299, dtype=torch.float64) * 32 / 299  # corners of pixels, not their centres, are aligned
    low = source.long()
    weight = torch.zeros(299, 32, dtype=torch.float64)
    weight[torch.arange(299), low] = 1 - (source - low)
    weight[torch.arange(299), (low + 1).clamp(max=31)] += source - low
    resized = ((weight @ grey.double() @ weight.T - 128) / 128).expand(-1, 3, -1, -1)
    usual = torch.nn.functional.interpolate(grey.double(), size=299, mode="bilinear") / 128 - 1
    print(f"largest difference {(seen[0] - resized).abs().max():.1e}; to torch's {(seen[0] - usual).abs().max():.2f}")
    torch.testing.assert_close(seen[0], resized, rtol=0, atol=1e-5)
    assert (usual - resized).abs().max() > 0.1


def test_the_published_weights_are_known_by_their_hash(inception_file, monkeypatch):
    monkeypatch.setattr(weights, "URL_INCEPTION_V3", f"https://x/weights-{sha256(inception_file)[:8]}.pth")
    path, name = weights.published_weights("inception", inception_file, pytest.fail)
    assert (str(path), name) == (inception_file, "rgb")  # the name of statistics that caches hold already


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("wrong", ["nan", "infinite", "lopsided", "negative", "cut", "npy", "pickle"])
def test_a_reference_that_is_none_is_refused_before_features_are_computed(wrong, inception_file, tmp_path):
    path, mu, sigma = tmp_path / "reference.npz", np.zeros(2048), np.eye(2048)
    sigma[3, 4] = {"nan": np.nan, "infinite": np.inf, "lopsided": 0.5}.get(wrong, 0)
    sigma[3, 3] = -1 if wrong == "negative" else 1
    np.savez(path, mu=mu, sigma=sigma)
    if wrong == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif wrong == "npy":
        with path.open("wb") as file:
            np.save(file, mu)
    elif wrong == "pickle":  # as EDM2 publishes them
        path.write_bytes(pickle.dumps({"fid": {"mu": mu, "sigma": sigma}}))
    cfg = Metrics(features="inception", weights=inception_file, reference=str(path), num=100)
    with pytest.raises(scores.ScoreError, match=r"metrics\.reference=.* no (npz|mean)") as caught:
        scores.score(pictures(10, 3, 0), None, cfg, tmp_path, "cpu", log=pytest.fail)
    assert "\n" not in str(caught.value)


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_pixels_are_rounded_as_edm_rounds_them():
    assert torch.equal(to_uint8(to_float(torch.arange(256, dtype=torch.uint8))), torch.arange(256, dtype=torch.uint8))
    x = 2.4 * torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) - 1.2
    edm = (x * 127.5 + 128).clip(0, 255).to(torch.uint8)
    other = (to_uint8(x) != edm).float().mean()
    print(f"{other:.1e} of pixels differ by a level from EDM's (ties)")
    assert other < 2e-5 and (to_uint8(x).int() - edm.int()).abs().max() <= 1


def test_a_second_classifier_judges_beside_the_runs_own(tmp_path, monkeypatch, capsys):
    """benchmarks/second_score.py: its first column is the run's own score, its second another classifier's."""
    settings = {"metrics": {"num": 500, "features": "classifier", "at_end": True}, "data": {"conditional": True}}
    trainer.train(tiny(tmp_path / "run", objective={"name": "meanflow"}, **settings))
    own = float(re.search(r"score at .*: fid ([\d.]+)", capsys.readouterr().out)[1])
    monkeypatch.setattr(sys, "argv", ["second_score.py", str(tmp_path / "run"), "--seed", "0"])
    assert second_score.main() == 0
    one, two = re.findall(r"run  (\d) steps?  ([\d.]+)  ([\d.]+)\n", capsys.readouterr().out)
    assert (one[0], two[0]) == ("1", "2") and float(one[1]) == pytest.approx(own, rel=1e-3)
    assert float(one[2]) != pytest.approx(own, rel=1e-2)
