"""Scores: the right numbers, cached, quiet; every mendable failure is one line. Digits only, no network."""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity.feature_extractor_clip as clip
import torch_fidelity.feature_extractor_inceptionv3 as inception
from sklearn.datasets import load_digits

from metrics import classifier, nearest, scores, weights
from sources.images import ImageSet


def config(*scores, features="classifier", weights=None, reference=None):
    return SimpleNamespace(
        features=features, scores=list(scores or ["fid"]), weights=weights, reference=reference, num=100
    )


def make(images, labels, name="digits"):
    return ImageSet(name=name, num_classes=10, labels=labels, images=images)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small gain nothing from more, and lose much on a busy machine."""
    with classifier.one_thread():
        yield


@pytest.fixture(scope="session")
def digits():
    raw = load_digits()
    return make(torch.tensor(np.rint(raw.images * 255 / 16).astype(np.uint8))[:, None], torch.tensor(raw.target))


@pytest.fixture(scope="session")
def few(digits):
    return make(digits.images[:300], digits.labels[:300], "few digits")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache that tests share, so that each classifier is trained once."""
    return tmp_path_factory.mktemp("scores")


def noisy(images, level, seed=0):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + level * noise).clamp(0, 255).to(torch.uint8)


def features(cache, dataset, images):
    path, _ = classifier.classifier_weights(dataset, scores.file_name(dataset), cache, torch.device("cpu"), print)
    with torch.no_grad():
        return classifier.load_classifier(path)(images)[0].double().numpy()


def frechet(a, b):
    """The Frechet distance of two sets of features, through the symmetric square root."""
    sa, sb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(sa)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sb @ root).clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa) + np.trace(sb) - 2 * cross


# The classifier and its scores


def test_fid_is_zero_on_itself_and_grows_with_noise(digits, cache):
    assert abs(scores.score(digits.images, digits, config(), cache, "cpu")["fid"]) < 1e-3
    fids = [scores.score(noisy(digits.images, n), digits, config(), cache, "cpu")["fid"] for n in (8, 24, 64)]
    assert fids == sorted(fids) and fids[0] > 0.01 and fids[-1] > 10 * fids[0]


def test_fid_is_the_frechet_distance_of_the_features(digits, cache):
    samples = noisy(digits.images[:500], 24)
    expected = frechet(features(cache, digits, samples), features(cache, digits, digits.images))
    assert scores.score(samples, digits, config(), cache, "cpu")["fid"] == pytest.approx(expected, rel=1e-3)


def test_other_scores_mean_what_they_say(few, cache):
    cfg = config("kid", "isc", "prc")
    own = scores.score(few.images, few, cfg, cache, "cpu")
    assert list(own) == ["kid", "isc", "precision", "recall"]
    assert own["precision"] == own["recall"] == 1 and own["isc"] > 3.5 and abs(own["kid"]) < 0.03
    sevens = few.images[few.labels == 7]
    one_class = scores.score(sevens, few, cfg, cache, "cpu")
    assert one_class["precision"] == 1 and one_class["recall"] < 0.3 and one_class["isc"] < 2
    blurred = scores.score(noisy(few.images, 90), few, cfg, cache, "cpu")
    assert blurred["precision"] < 0.5 and blurred["kid"] > 0.1


def test_classifier_reads_digits_it_never_saw(digits, cache):
    path, _ = classifier.classifier_weights(digits, scores.file_name(digits), cache, torch.device("cpu"), print)
    assert torch.load(path, weights_only=True)["accuracy"] > 0.96


def test_held_out_images_are_held_out(few, monkeypatch):
    reads, fetch = [], classifier.fetch
    monkeypatch.setattr(
        classifier, "fetch", lambda images, rows: (reads.append(set(rows.tolist())), fetch(images, rows))[1]
    )
    classifier.train_classifier(few, torch.device("cpu"), print)
    *training, held_out = reads
    assert len(held_out) == 30 and not held_out & set.union(*training)
    assert len(set.union(held_out, *training)) == 300


def test_classifier_and_statistics_are_made_once(few, cache, monkeypatch):
    first = scores.score(few.images[:100], few, config(), cache, "cpu")
    seen, forward = [], classifier.ClassifierFeatures.forward
    monkeypatch.setattr(classifier, "train_classifier", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(
        classifier.ClassifierFeatures, "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1]
    )
    assert scores.score(few.images[:100], few, config(), cache, "cpu") == first
    assert sum(seen) == 100  # the samples, not the training set


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


@pytest.mark.parametrize("damage", ["empty", "cut", "evil", "another network"])
def test_bad_cached_classifier_is_trained_again_bit_for_bit(few, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    expected = scores.score(few.images[:100], few, config(), tmp_path, "cpu")
    (path,) = tmp_path.glob("classifier-*.pt")
    good, said = torch.load(path, weights_only=True), []
    if damage == "another network":
        torch.save({**good, "shape": {**good["shape"], "classes": 3}}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "evil": pickle.dumps(Evil())}[damage])
    torch.set_num_threads(2)
    again = scores.score(few.images[:100], few, config(), tmp_path, "cpu", log=said.append)
    assert again["fid"] == pytest.approx(expected["fid"], rel=1e-3)
    torch.set_num_threads(1)
    assert "cannot be read" in said[0] and not (tmp_path / "evil").exists()
    again = torch.load(path, weights_only=True)
    assert again["shape"] == good["shape"]
    assert all(torch.equal(again["state"][name], value) for name, value in good["state"].items())
    assert not list(tmp_path.glob("*.tmp"))


def test_statistics_of_another_classifier_are_not_used(few, tmp_path):
    expected = scores.score(few.images, few, config(), tmp_path, "cpu")["fid"]
    (path,) = tmp_path.glob("classifier-*.pt")
    file = torch.load(path, weights_only=True)
    file["state"]["body.0.0.weight"] *= -1
    torch.save(file, path)
    assert scores.score(few.images, few, config(), tmp_path, "cpu")["fid"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "evil"])
def test_bad_cached_statistics_are_computed_again(few, tmp_path, monkeypatch, cache, damage):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    path, _ = classifier.classifier_weights(few, scores.file_name(few), cache, torch.device("cpu"), print)
    (tmp_path / path.name).write_bytes(path.read_bytes())
    cfg, said = config("fid", "prc"), []
    expected = scores.score(few.images[:100], few, cfg, tmp_path, "cpu", log=said.append)
    paths = sorted((tmp_path / "fidelity").iterdir())
    assert len(paths) == 2 and not said
    for path in paths:
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        evil = tmp_path / "evil.zip"
        torch.save({"mu": Evil()}, evil)
        damaged = {"empty": b"", "cut": whole[:middle], "flipped": flipped, "evil": evil.read_bytes()}
        path.write_bytes(damaged[damage])
    assert scores.score(few.images[:100], few, cfg, tmp_path, "cpu", log=said.append) == expected
    assert len(said) == 2 and all("computing them again" in line for line in said)
    assert not (tmp_path / "evil").exists() and sorted((tmp_path / "fidelity").iterdir()) == paths
    scores.score(few.images[:100], few, cfg, tmp_path, "cpu", log=said.append)
    assert len(said) == 2  # the new ones are good


def test_cache_key_holds_the_content(few):
    images, labels = few.images.clone(), few.labels.clone()
    images[7, 0, 3, 3] ^= 1
    labels[7] = (labels[7] + 1) % 10
    others = [make(images, few.labels), make(few.images, labels), make(few.images, None)]
    others += [make(few.images[:-1], few.labels[:-1]), make(few.images, few.labels, "a/b")]
    names = {scores.file_name(dataset) for dataset in [make(few.images, few.labels), *others]}
    assert len(names) == 6 and not any("/" in name for name in names)
    assert scores.file_name(make(few.images.clone(), few.labels)) in names


def test_global_state_and_terminal_are_left_alone(few, tmp_path, capfd):
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]
    said = []
    with torch.inference_mode():  # as a sampler may call it
        scores.score(few.images[:50], few, config("fid", "kid", "isc", "prc"), tmp_path, "cpu", log=said.append)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpy_before)
    assert capfd.readouterr() == ("", "") and "held-out" in said[1]


class Stream:
    """Samples that are made when read, and count it."""

    def __init__(self, images):
        self.images, self.reads = images, 0

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        self.reads += len(indices)
        return self.images[indices]


def test_samples_may_stream(few, cache):
    stream = Stream(noisy(few.images[:130], 16))
    expected = scores.score(stream.images, few, config(), cache, "cpu")
    assert scores.score(stream, few, config(), cache, "cpu") == expected
    assert stream.reads <= 130 + 2  # once each; looks at the first by us and by torch-fidelity


@pytest.mark.parametrize(("channels", "resolution"), [(1, 8), (1, 28), (3, 32), (3, 50), (3, 64), (1, 3)])
def test_classifier_takes_any_image(channels, resolution):
    images = torch.randint(0, 256, (2, channels, resolution, resolution), dtype=torch.uint8)
    out, logits = classifier.Classifier(channels, resolution, 7).eval()(images)
    assert out.shape == (2, 64) and logits.shape == (2, 7) and torch.isfinite(logits).all() and (out >= 0).all()


def test_shift_moves_at_most_its_reach():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[0, 0, 4, 4] = 9
    moved = classifier.shift(image.expand(200, -1, -1, -1), torch.Generator().manual_seed(0))
    _, _, rows, columns = moved.nonzero(as_tuple=True)
    assert len(rows) == 200 and set(zip(rows.tolist(), columns.tolist(), strict=True)) == {
        (r, c) for r in (3, 4, 5) for c in (3, 4, 5)
    }


# What users can mend


def message(*args, **kwargs):
    with pytest.raises(scores.ScoreError) as caught:
        scores.score(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unlabelled_set_and_unfit_samples(few, cache):
    unlabelled = make(few.images, None)
    assert "metrics.features=inception" in message(few.images, unlabelled, config(), cache, "cpu")
    assert "at least 10" in message(few.images[:9], few, config(), cache, "cpu")
    assert "both must be alike" in message(few.images[..., :7], few, config(), cache, "cpu")
    assert "both must be alike" in message(few.images.float(), few, config(), cache, "cpu")
    assert "metrics.reference" in message(few.images, few, config(reference="x.npz"), cache, "cpu")


def test_no_inception_weights(few, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    said = message(few.images, few, config(features="inception"), tmp_path, "cpu", log=lambda _: None)
    assert "metrics.weights=PATH" in said and inception.URL_INCEPTION_V3 in said and "not known" in said


def test_a_silent_server_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SILENCE", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/weights-6726825d.pth"
        with pytest.raises(scores.ScoreError, match="could not be fetched"):
            weights.download("a network", url, tmp_path / "weights-6726825d.pth", lambda _: None)
    assert socket.getdefaulttimeout() is None and not list(tmp_path.iterdir())


def test_bad_weights_files(few, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    path = tmp_path / "weights.pth"
    cfg = config(features="inception", weights=str(path))
    assert "no file" in message(few.images, few, cfg, tmp_path, "cpu")
    path.write_bytes(pickle.dumps(Evil()))
    assert "metrics.weights=PATH" in message(few.images, few, cfg, tmp_path, "cpu")
    assert not (tmp_path / "evil").exists()
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, path)
    assert "another network" in message(few.images, few, cfg, tmp_path, "cpu")


# Inception, with random weights


def test_inception_scores_grey_images_and_reference_statistics(few, inception_file, tmp_path):
    small = make(few.images[:10], few.labels[:10])
    network = inception.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=inception_file)

    cfg = config("kid", "prc", features="inception", weights=inception_file)
    same = scores.score(small.images, small, cfg, tmp_path, "cpu")
    assert same["precision"] == same["recall"] == 1
    (kept,) = (tmp_path / "fidelity").glob("*-features-2048.pt")
    values = torch.load(kept, weights_only=True)
    expected = network(small.images[:2].expand(-1, 3, -1, -1))[0]
    torch.testing.assert_close(values[:2], expected, rtol=1e-3, atol=1e-4)
    values = values.double().numpy()

    reference = tmp_path / "reference.npz"  # a point: no root of a 2048 x 2048 matrix to wait for
    np.savez(reference, mu=np.full(2048, 0.25), sigma=np.zeros((2048, 2048)))
    cfg = config("fid", features="inception", weights=inception_file, reference=str(reference))
    expected = ((values.mean(0) - 0.25) ** 2).sum() + values.var(0, ddof=1).sum()
    assert scores.score(small.images, small, cfg, tmp_path, "cpu")["fid"] == pytest.approx(expected, rel=1e-3)

    alone = scores.score(small.images, None, cfg, tmp_path, "cpu")["fid"]  # the training set is not needed
    assert alone == pytest.approx(expected, rel=1e-3)

    np.savez(reference, mu=np.zeros(64), sigma=np.zeros((64, 64)))
    assert "(2048,)" in message(small.images, small, cfg, tmp_path, "cpu")
    reference.write_bytes(b"not numpy's")
    assert "no npz" in message(small.images, small, cfg, tmp_path, "cpu")


# DINOv2 and CLIP, with stand-ins for the networks


class Means(torch.nn.Module):
    """Three features of an image (B, 3, 224, 224): the means of its channels."""

    input_resolution = 224

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return x.mean((2, 3))


@pytest.fixture(scope="module")
def flat():
    """Images of one colour each, and samples of brighter ones: whatever the way of resizing, the features are known."""
    levels = torch.randint(0, 200, (120, 3, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = levels.expand(-1, -1, 4, 4).contiguous()
    return make(images[:60], None, "flat"), images[60:] + 40


def means_score(flat, mean, std):
    sets = [(images[:, :, 0, 0] / 255 - torch.tensor(mean)) / torch.tensor(std) for images in (flat[1], flat[0].images)]
    return frechet(*[values.double().numpy() for values in sets])


def test_dinov2_scores(flat, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "load", lambda *args: (asked.append(args), Means())[1])
    cfg = config(features="dinov2")
    fid = scores.score(flat[1], flat[0], cfg, tmp_path, "cpu", log=lambda _: None)["fid"]
    assert set(asked) == {("facebookresearch/dinov2", "dinov2_vitb14")}
    assert fid == pytest.approx(means_score(flat, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), rel=1e-3)
    assert scores.features_name(cfg) == "DINOv2 ViT-B/14 features"


def test_dinov2_out_of_reach(few, tmp_path, monkeypatch):
    def refuse(*_):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load", refuse)
    said = message(few.images, few, config(features="dinov2"), tmp_path, "cpu", log=lambda _: None)
    assert "DINOv2 could not be fetched" in said and "not known" in said and "metrics.features=classifier" in said
    assert socket.getdefaulttimeout() is None
    given = config(features="dinov2", weights="x.pth")
    assert "metrics.weights" in message(few.images, few, given, tmp_path, "cpu", log=lambda _: None)


def test_clip_scores_with_the_real_file_only(few, flat, tmp_path, monkeypatch):
    path = tmp_path / "ViT-B-32.pt"
    path.write_bytes(b"TorchScript")
    cfg = config(features="clip", weights=str(path))
    ran = []
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: (ran.append(1), torch.nn.Identity())[1])
    assert "SHA-256" in message(few.images, few, cfg, tmp_path, "cpu") and not ran

    monkeypatch.setitem(weights.CLIP_FILES["clip-vit-b-32"], "hash", hashlib.sha256(b"TorchScript").hexdigest())
    monkeypatch.setattr(clip, "build_model", lambda *_: SimpleNamespace(visual=Means()))
    fid = scores.score(flat[1], flat[0], cfg, tmp_path, "cpu")["fid"]
    colours = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    assert ran and fid == pytest.approx(means_score(flat, *colours), rel=1e-3)
    path.unlink()
    assert "ViT-B-32.pt as metrics.weights=PATH" in message(few.images, few, cfg, tmp_path, "cpu")


def test_features_are_named():
    said = scores.describe({"fid": 1.23456, "recall": 0.5}, config(), 5000)
    assert said == "fid 1.235, recall 0.5 (classifier features, 5,000 samples)"
    assert "Inception features" in scores.describe({"fid": 1.0}, config(features="inception"), 10)


# The nearest training images


def test_nearest_known_case():
    levels = torch.tensor([0, 51, 102, 255], dtype=torch.uint8)
    dataset = make(levels[:, None, None, None].expand(-1, 3, 2, 2), None)
    samples = torch.full((1, 3, 2, 2), 61, dtype=torch.uint8)
    distances, indices = nearest.nearest(samples, dataset, 3, "cpu")
    assert indices.tolist() == [[1, 2, 0]] and indices.dtype == torch.int64
    torch.testing.assert_close(distances, torch.tensor([[10, 41, 61]]) / 255)
    assert nearest.nearest(samples, dataset, 9, "cpu")[1].shape == (1, 4)


def test_nearest_is_exact_over_blocks():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4500, 1, 4, 4), generator=generator, dtype=torch.uint8)
    samples = torch.randint(0, 256, (1100, 1, 4, 4), generator=generator, dtype=torch.uint8)
    samples[[3, 1050]] = images[[4321, 17]]  # copies
    distances, indices = nearest.nearest(Stream(samples), make(images, None), 2, "cpu")
    assert distances[3, 0] == distances[1050, 0] == 0 and indices[[3, 1050], 0].tolist() == [4321, 17]
    assert distances.dtype == torch.float32
    pairs = samples.double().flatten(1), images.double().flatten(1)
    full = torch.cdist(*pairs, compute_mode="donot_use_mm_for_euclid_dist") / 16**0.5 / 255
    torch.testing.assert_close(distances.double(), full.topk(2, largest=False).values, rtol=1e-6, atol=0)
    torch.testing.assert_close(full.gather(1, indices), distances.double(), rtol=1e-6, atol=0)


def test_what_counts_as_a_copy():
    levels = torch.arange(0, 200, 2, dtype=torch.uint8)
    levels[1] = 1  # two images one level apart, all others at least two
    dataset = make(levels[:, None, None, None].expand(-1, 1, 4, 4), None)
    assert nearest.copy_threshold(dataset, "cpu", share=0.015) == pytest.approx(1 / 255)
    assert nearest.copy_threshold(dataset, "cpu", share=0.5) == pytest.approx(2 / 255)
    levels[50] = levels[51]  # a picture that is there twice
    assert nearest.copy_threshold(make(dataset.images, None), "cpu") == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_scores_as_the_cpu(few, cache):
    samples = noisy(few.images, 16)
    expected = scores.score(samples, few, config("fid", "prc"), cache, "cpu")
    found = scores.score(samples, few, config("fid", "prc"), cache, "cuda")
    assert found["fid"] == pytest.approx(expected["fid"], rel=0.02)
    distances, _ = nearest.nearest(samples.cuda(), few.to("cuda"), 1, "cuda")
    torch.testing.assert_close(distances, nearest.nearest(samples, few, 1, "cpu")[0])
