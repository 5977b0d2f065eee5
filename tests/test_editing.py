"""Zero-shot editing against OpenAI's code, what each edit promises, and the command."""

import numpy as np
import pytest
import torch
from conftest import golden, relative_error, tiny
from PIL import Image

import data
import edit
from sampling import editing, tasks
from training import trainer

CASE = {name: array.double() for name, array in golden("editing").items()}
SIGMAS = CASE["sigmas"][:-1].tolist()  # the last is sigma_min, where the original adds and evaluates nothing


def denoiser(x, sigma):
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return (0.36 * x / (0.36 + s**2)).clamp(-1, 1)


def noise_at(i):
    return CASE["noises"][i - 1]


# The functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["colorize", "superres8"])
def test_edits_match_the_original(name):
    constraint = editing.colorisation() if name == "colorize" else editing.super_resolution(8)
    assert relative_error(editing.visible(CASE["images"], constraint), CASE[f"{name}_known"]) < 1e-6
    x = editing.edit(denoiser, CASE["images"], *constraint, SIGMAS, CASE["z"], noise_at)
    assert relative_error(x, CASE[name]) < 1e-6 and x.dtype == torch.float64
    # Nothing of the reference but its known coordinates is used.
    again = editing.edit(denoiser, CASE[f"{name}_known"], *constraint, SIGMAS, CASE["z"], noise_at)
    assert relative_error(again, CASE[name]) < 1e-6


def rough(x, sigma):
    """Far from the reference, and not clamped."""
    return 3 * torch.sin(5 * x) + 0.1 * sigma.view(-1, 1, 1, 1)


def free_and_edited(constraint):
    z, x = CASE["z"].float(), CASE["images"].float()
    free = editing.edit(rough, x, *constraint._replace(known_mask=torch.tensor(False)), [80.0, 2.0], z, noise_at)
    return x, free, editing.edit(rough, x, *constraint, [80.0, 2.0], z, noise_at)


def test_inpainting_keeps_the_known_pixels_and_changes_the_others():
    known = torch.zeros(16, 16, dtype=torch.bool)
    known[:, 5:] = True
    x, _, out = free_and_edited(editing.inpainting(known))
    assert (out - x)[..., 5:].abs().max() < 1 / 255 and (out - x)[..., :5].abs().mean() > 0.5
    # What lay in the hole is not looked at, be it no number at all.
    holed = torch.where(known, x, torch.nan)
    args = [80.0, 2.0], CASE["z"].float(), noise_at
    assert torch.equal(editing.edit(rough, holed, *editing.inpainting(known), *args), out)


def test_each_image_may_have_its_own_mask():
    known = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    x, _, out = free_and_edited(editing.inpainting(known))
    same = (out == x).all(1, keepdim=True)
    assert torch.equal(same, known)


def test_colorisation_keeps_the_grey_and_the_models_colours():
    x, _, out = free_and_edited(editing.colorisation())
    grey = torch.tensor([0.2989, 0.5870, 0.1140]).view(1, 3, 1, 1)
    assert ((out - x) * grey).sum(1).abs().max() < 1e-5  # before the final clamp
    assert (out - x).abs().mean() > 0.5
    # One evaluation: what is added to the model's picture is along the grey direction alone.
    once = editing.edit(rough, x, *editing.colorisation(), [80.0], CASE["z"].float())
    added = once - rough(80 * CASE["z"].float(), torch.full((2,), 80.0))
    assert torch.allclose(added, (added * grey).sum(1, keepdim=True) * grey / grey.square().sum(), atol=1e-5)


@pytest.mark.parametrize("factor", [2, 4, 16])
def test_super_resolution_keeps_the_block_means_and_the_models_details(factor):
    def means(images):
        return torch.nn.functional.avg_pool2d(images, factor)

    def details(images):
        return images - means(images).repeat_interleave(factor, 2).repeat_interleave(factor, 3)

    x, _, out = free_and_edited(editing.super_resolution(factor))
    assert (means(out) - means(x)).abs().max() < 1e-5  # before the final clamp
    assert (out - x).abs().mean() > 0.5
    once = editing.edit(rough, x, *editing.super_resolution(factor), [80.0], CASE["z"].float())
    assert torch.allclose(details(once), details(rough(80 * CASE["z"].float(), torch.full((2,), 80.0))), atol=1e-5)


@pytest.mark.parametrize("constraint", [editing.colorisation(), editing.super_resolution(4)])
def test_the_maps_are_orthogonal_and_undo_each_other(constraint):
    x = CASE["images"]
    y = constraint.A(x)
    assert torch.allclose(constraint.A_inverse(y), x, atol=1e-12)
    assert y.norm() == pytest.approx(float(x.norm()), rel=1e-12)


def test_a_factor_that_leaves_nothing_to_add_is_refused():
    with pytest.raises(ValueError, match="2 or more"):
        editing.super_resolution(1)


def test_edits_serve_any_shape_and_pass_conditions_on():
    def model(x, sigma, class_labels=None):
        return x + class_labels

    known = torch.tensor([True, False, False])
    out = editing.edit(
        model,
        torch.zeros(1, 3),
        *editing.inpainting(known),
        sigmas=[2.0],
        z=torch.ones(4, 3),
        class_labels=torch.tensor(5.0),
    )
    assert torch.equal(out, torch.tensor([0.0, 7.0, 7.0]).expand(4, 3))


def test_stroke_and_denoise_start_at_their_own_level():
    seen = []

    def spy(x, sigma):
        seen.append((x, sigma))
        return 0 * x

    x, z = CASE["images"], CASE["z"]
    editing.stroke(spy, x, [3.0, 1.0], z, noise_at)
    editing.denoise(spy, x, [0.4])
    assert torch.allclose(seen[0][0], x + 3 * z) and torch.equal(seen[0][1], torch.full((2,), 3.0, dtype=x.dtype))
    assert torch.allclose(seen[1][0], (1 - 0.002**2) ** 0.5 * noise_at(1))  # as in sampler.multistep
    assert torch.allclose(seen[2][0], x) and float(seen[2][1][0]) == 0.4


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5, 2.0])
def test_the_noise_level_is_estimated(sigma):
    ramp = torch.linspace(-1, 1, 33)
    clean = torch.stack([ramp[:, None] * ramp, (ramp[:, None] > 0.3).float().expand(33, 33)])[:, None]
    noise = torch.randn(2, 1, 33, 33, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)  # each image has its own
    assert torch.allclose(editing.noise_level(clean + sigma * scale * noise), sigma * scale.flatten(), rtol=0.15)
    assert editing.noise_level(clean).max() < 0.01


def test_slerp_keeps_the_norm_and_turns_evenly_each_sample_by_its_own_angle():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    half = editing.slerp(a, b, torch.tensor([0.5, 1 / 3, 0.5]))
    expected = [[0.5**0.5, 0.5**0.5], [2 * np.sin(np.pi / 6), 2 * np.cos(np.pi / 6)], [3.0, 4.0]]
    assert torch.allclose(half, torch.tensor(expected, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(editing.slerp(a, b, torch.zeros(3)), a) and torch.allclose(
        editing.slerp(a, b, torch.ones(3)), b
    )
    # The whole batch taken for one vector would give another angle.
    assert torch.allclose(half[:1], editing.slerp(a[:1], b[:1], torch.tensor([0.5])))


def test_interpolation_goes_from_the_first_image_to_the_second():
    x, z = CASE["images"], CASE["z"]
    out = editing.interpolate(lambda x, s: x, x[:1], x[1:], torch.tensor([0.0, 0.5, 1.0]), [80.0], z)
    assert torch.allclose(out[0], x[0] + 80 * z[0]) and torch.allclose(out[2], x[1] + 80 * z[1])
    assert float(out[1].norm()) == pytest.approx(80 * float(z.norm() / 2**0.5), rel=0.02)  # still noise of level 80


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two small models of 8 x 8 pixels: grey, and RGB with classes."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    for name, changes in (("grey", {}), ("rgb", {"channels": 3, "conditional": True})):
        trainer.train(tiny(folder / name, data={"dir": str(folder / "data"), **changes}, train={"lr": 0.02}))
    return folder


@pytest.fixture
def photo(tmp_path):
    return save(tmp_path / "photo.png", np.random.default_rng(0).integers(0, 256, (8, 8, 3)))


def save(path, array, **options):
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)
    return path


def call(run, task, *arguments):
    return edit.main(
        [task, "--cfg", f"{run}/config.yml", "--ckpt", f"{run}/checkpoints/last.ckpt"] + [str(a) for a in arguments]
    )


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(float)


def tiles(path):
    """The 8 x 8 pictures of a strip."""
    strip = pixels(path)
    side = strip.shape[0] - 4  # a border of 2 around each
    assert side >= 64 and side % 8 == 0
    middle = strip[2 + side // 16 : 2 + side : side // 8]
    return [middle[:, x + side // 16 : x + side : side // 8] for x in range(2, strip.shape[1], side + 2)]


def test_inpaint_writes_results_and_a_strip(runs, photo, tmp_path, capsys):
    out = tmp_path / "out"
    settings = ["--input", photo, "--mask", "0,0,3,8", "--out", out, "--num", 3, "--steps", 4]
    assert call(runs / "rgb", "inpaint", *settings, "--class", 3) == 0
    said = capsys.readouterr().out
    assert "24 of 64 pixels to be filled in" in said and "3 results, 4 evaluations each" in said
    assert [p.stem for p in sorted(out.iterdir())] == ["photo_00", "photo_01", "photo_02", "photo_strip"]
    results = [pixels(out / f"photo_{i:02d}.png") for i in range(3)]
    for result in results:
        assert np.array_equal(result[:, 3:], pixels(photo)[:, 3:])
        assert np.abs(result[:, :3] - pixels(photo)[:, :3]).mean() > 10
    assert not np.array_equal(results[0], results[1])
    first, mask, seen, *shown = tiles(out / "photo_strip.png")
    assert (mask[:, :3] == 255).all() and (mask[:, 3:] == 0).all()  # as it was read
    assert np.array_equal(first, pixels(photo)) and np.array_equal(seen[:, 3:], pixels(photo)[:, 3:])
    assert np.ptp(seen[:, :3]) == 0  # the hole
    assert np.array_equal(shown, results)


def test_the_same_seed_gives_the_same_results_whatever_their_number(runs, photo, tmp_path):
    def results(name, *arguments):
        settings = ["--input", photo, "--mask", "0,0,4,8", "--steps", 2, "--out", tmp_path / name]
        assert call(runs / "grey", "inpaint", *settings, *arguments) == 0
        return [pixels(p) for p in sorted((tmp_path / name).glob("photo_0?.png"))]

    a, b, c = results("a"), results("b", "--num", 2), results("c", "--seed", 1)
    d = results("d", "--num", 2, "--ema", 1)
    assert len(a) == 4 and all(np.abs(x - y).max() <= 1 for x, y in zip(a, b, strict=False))
    assert not np.array_equal(a[0], c[0]) and not np.array_equal(a[0], d[0])


def test_colorize_keeps_the_grey_of_a_grey_input(runs, tmp_path, capsys):
    grey = save(tmp_path / "grey.png", np.random.default_rng(1).integers(80, 176, (8, 8)))
    assert call(runs / "rgb", "colorize", "--input", grey, "--out", tmp_path / "o", "--steps", 3, "--class", 1) == 0
    assert "L made RGB" in capsys.readouterr().out
    result = pixels(tmp_path / "o" / "grey_00.png")
    inside = ((result > 0) & (result < 255)).all(2)  # where the final clamp did nothing
    assert inside.sum() > 10 and np.abs(result @ editing.GREY - pixels(grey))[inside].max() < 1.1
    assert np.ptp(result, axis=2).mean() > 5
    for shown in tiles(tmp_path / "o" / "grey_strip.png")[:2]:
        assert np.array_equal(shown, pixels(grey)[..., None].repeat(3, 2))


@pytest.mark.parametrize("size", [4, 8, 16])
def test_superres_takes_small_pictures_and_large_ones(size, runs, tmp_path):
    image = save(tmp_path / "in.png", np.random.default_rng(2).integers(110, 146, (size, size)))
    assert call(runs / "grey", "superres", "--factor", 2, "--input", image, "--out", tmp_path / "o", "--steps", 3) == 0
    result = torch.from_numpy(pixels(tmp_path / "o" / "in_00.png"))[None]
    have = torch.nn.functional.avg_pool2d(result, 2)
    need = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(pixels(image))[None], 4)
    inside = torch.nn.functional.avg_pool2d(((result > 0) & (result < 255)).double(), 2) == 1
    tolerance = 0.6 if size <= 8 else 20  # a larger picture is resized as in training, which is no plain mean
    assert inside.sum() > 5 and (have - need)[inside].abs().max() < tolerance


def test_denoise_stroke_and_interpolate(runs, tmp_path, capsys):
    one = save(tmp_path / "one.png", data.digits(tiny(tmp_path).data).images[0, 0])
    two = save(tmp_path / "two.jpg", np.random.default_rng(3).integers(0, 256, (20, 30, 3)))
    run = runs / "rgb"
    assert call(run, "denoise", "--input", one, two, "--out", tmp_path / "d") == 0
    said = capsys.readouterr().out
    assert said.count("noise level estimated at") == 2 and "two.jpg: 30 x 20 pixels, cropped to its central sq" in said
    assert "classes drawn" in said
    names = ["000_one_00", "000_one_strip", "001_two_00", "001_two_strip"]
    assert [p.stem for p in sorted((tmp_path / "d").iterdir())] == names
    assert call(run, "denoise", "--input", one, "--sigma", 0.01, "--out", tmp_path / "e") == 0
    grey = pixels(one)[..., None]
    assert np.abs(pixels(tmp_path / "e" / "one_00.png") - grey).mean() < 5  # D(x; 0) = x
    assert "estimated" not in capsys.readouterr().out

    for sigma in (0.01, 5):
        settings = ["--sigma", sigma, "--steps", 1, "--input", one, "--out", tmp_path / f"s{sigma}"]
        assert call(run, "stroke", *settings) == 0
    near, far = (np.abs(pixels(tmp_path / f"s{sigma}" / "one_00.png") - grey).mean() for sigma in (0.01, 5))
    assert near < 5 < far
    shown, seen = tiles(tmp_path / "s5" / "one_strip.png")[:2]
    assert np.array_equal(shown, grey.repeat(3, 2)) and seen.std() > 90  # noise beyond both ends

    settings = ["--input", one, two, "train.steps=5", "--sigma", 0.01, "--num", 4, "--out", tmp_path / "i"]
    assert call(run, "interpolate", *settings) == 0
    results = [pixels(tmp_path / "i" / f"one_to_two_{i:02d}.png") for i in range(4)]
    assert np.abs(results[0] - grey).mean() < 5
    steps = [np.abs(r - grey).mean() for r in results]
    assert steps == sorted(steps) and steps[-1] > 30
    assert pixels(tmp_path / "i" / "one_to_two_strip.png").shape[1] > 6 * 64
    # The noise is another at either end; the class is one, or nothing would lie between.
    assert "classes drawn: 2;" in capsys.readouterr().out
    assert call(run, "interpolate", "--input", one, one, "--sigma", 1, "--steps", 1, "--out", tmp_path / "j") == 0
    assert (
        np.abs(pixels(tmp_path / "j" / "one_to_one_00.png") - pixels(tmp_path / "j" / "one_to_one_07.png")).mean() > 5
    )


def test_denoise_takes_the_estimated_level_and_any_other(runs, tmp_path, capsys):
    noise = np.random.default_rng(4).standard_normal((8, 8, 3))
    noisy = save(tmp_path / "noisy.png", 127 + 0.2 * 127.5 * noise)
    for name, sigma in (("a", []), ("b", ["--sigma", 0.2]), ("c", ["--sigma", 2])):
        settings = ["--input", noisy, "--class", 3, "--num", 1, "--out", tmp_path / name]
        assert call(runs / "rgb", "denoise", *settings, *sigma) == 0
    assert 0.14 < float(capsys.readouterr().out.split("estimated at ")[1].split()[0]) < 0.26
    a, b, c = (pixels(tmp_path / name / "noisy_00.png") for name in "abc")
    assert np.abs(a - b).mean() < 0.3 * np.abs(c - b).mean()


def test_the_class_matters(runs, photo, tmp_path):
    for c in (1, 3):
        settings = ["--input", photo, "--factor", 8, "--num", 1, "--class", c, "--out", tmp_path / str(c)]
        assert call(runs / "rgb", "superres", *settings) == 0
    assert not np.array_equal(*(pixels(tmp_path / c / "photo_00.png") for c in "13"))


def test_a_folder_of_pictures(runs, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        save(tmp_path / "in" / f"{i}.bmp", np.full((8, 8), 90 * i))
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    assert call(runs / "grey", "stroke", "--num", 1, "--input", tmp_path / "in", "--out", tmp_path / "o") == 0
    assert len(list((tmp_path / "o").glob("*_strip.png"))) == 3


def drawings():
    """Mask files for a 16 x 16 input whose left half is to be filled in, in the ways that people make them."""
    left = np.zeros((16, 16), bool)
    left[:, :8] = True
    erased, plain = np.full((16, 16, 4), (120, 60, 200, 255)), np.full((16, 16, 3), (40, 90, 200))
    soft = erased.copy()
    stripes = left & (np.arange(16) % 2 == 0)  # each of the model's pixels holds some of it
    erased[left], soft[stripes] = 0, (120, 60, 200, 128)  # a photo whose left is erased, at once or by a soft rubber
    plain[stripes] = 255, 0, 0
    return {
        "white.png": 255.0 * left,
        "white.jpg": 255.0 * left,
        "ones.png": 1.0 * left,
        "rgb.png": np.repeat(255.0 * left[..., None], 3, 2),
        "model_size.png": 255.0 * left[::2, ::2],
        "larger.png": np.kron(255 * left, np.ones((3, 3))),
        "erased.png": erased,
        "soft.png": soft,
        "plain.png": plain,
        "stripes.png": 255.0 * stripes,
    }


@pytest.mark.parametrize("name", drawings())
def test_mask_files(name, tmp_path, capsys):
    fill = tasks.mask(str(save(tmp_path / name, drawings()[name])), (16, 16), 8)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:, :4] = True
    assert torch.equal(fill, expected) and "32 of 64 pixels" in capsys.readouterr().out


def test_a_16_bit_mask(tmp_path):
    deep = np.zeros((8, 8), np.uint16)
    deep[:2] = 65535
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert tasks.mask(str(tmp_path / "deep.png"), (8, 8), 8).sum() == 16


def test_a_box_is_cropped_and_resized_with_its_input():
    fill = tasks.mask("8,0,12,4", (32, 16), 8)  # the central 16 x 16 pixels start at 8
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:2, :2] = True
    assert torch.equal(fill, expected)


@pytest.mark.parametrize(("turn", "size"), [(1, (12, 8)), (6, (8, 12))])
def test_input_and_mask_are_upright(turn, size, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = save(tmp_path / "a.jpg", np.zeros((8, 12, 3)), exif=exif)
    assert tasks.picture(path, "--input").size == size


@pytest.mark.parametrize(
    ("task", "arguments", "expected"),
    [
        ("inpaint", ["--input", "photo.png"], "--mask: inpaint needs one"),
        ("inpaint", ["--input", "photo.png", "--mask", "none.png"], "--mask: none.png: there is no such file"),
        ("inpaint", ["--input", "photo.png", "--mask", "text.png"], "--mask: text.png cannot be read"),
        ("inpaint", ["--input", "photo.png", "--mask", "black.png"], "black.png (white is filled in) covers nothing"),
        (
            "inpaint",
            ["--input", "photo.png", "--mask", "white.png"],
            "white.png (white is filled in) covers everything",
        ),
        (
            "inpaint",
            ["--input", "photo.png", "--mask", "clear.png"],
            "(what is transparent is filled in) covers everything",
        ),
        ("inpaint", ["--input", "photo.png", "--mask", "3,3,3,5"], "3,3,3,5 (box) covers nothing"),
        ("inpaint", ["--input", "photo.png", "--mask", "0,0,80,80"], "0,0,80,80 (box) covers everything"),
        ("inpaint", ["--input", "photo.png", "--mask", "0,0,8"], "--mask: 0,0,8 is no box"),
        ("inpaint", ["--input", "photo.png", "--mask", "wide.png"], "is 20 x 10 pixels and the input 8 x 8"),
        ("inpaint", ["--input", "none.png", "--mask", "0,0,4,4"], "--input: none.png: there is no such file"),
        ("inpaint", ["--input", "text.png", "--mask", "0,0,4,4"], "--input: text.png cannot be read (not an image"),
        ("inpaint", ["--input", "cut.png", "--mask", "0,0,4,4"], "--input: cut.png cannot be read"),
        ("denoise", ["--input", "empty"], "--input: empty is a folder without pictures"),
        ("colorize", ["--input", "photo.png"], "makes grey pictures"),
        ("superres", ["--input", "photo.png"], "--factor: superres needs one"),
        ("superres", ["--input", "photo.png", "--factor", "3"], "--factor: 3 does not divide the model's 8 pixels"),
        ("superres", ["--input", "photo.png", "--factor", "1"], "choose one of 2, 4, 8"),
        ("superres", ["--input", "photo.png", "--factor", "2", "--sigma", "1"], "--sigma: superres takes none"),
        ("stroke", ["--input", "photo.png", "--mask", "0,0,4,4"], "--mask: stroke takes none; it is for inpaint"),
        ("stroke", ["--input", "photo.png", "--sigma", "81"], "--sigma: 81.0 is outside"),
        ("stroke", ["--input", "photo.png", "--sigma", "nan"], "--sigma: nan is outside"),
        ("stroke", ["--input", "photo.png", "--sigma", "1", "--sigmas", "2,1"], "--sigma: the first of --sigmas"),
        ("stroke", ["--input", "photo.png", "--sigmas", "1,2"], "--sigmas: [1.0, 2.0] must descend"),
        ("interpolate", ["--input", "photo.png"], "interpolate takes two pictures, and here are 1"),
        ("denoise", ["--input", "photo.png", "--class", "3"], "--class: this network was trained without labels"),
        ("denoise", ["--input", "photo.png", "network.model_channels=12"], "was trained with another network"),
        ("denoise", ["--input", "train.steps=3"], "--input: names no picture"),
    ],
)
def test_bad_requests_are_one_line_and_exit_2(task, arguments, expected, runs, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save("black.png", np.zeros((8, 8)))
    save("white.png", np.full((8, 8), 255))
    save("clear.png", np.zeros((8, 8, 4)))
    save("wide.png", np.eye(20)[:10] * 255)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:150])
    assert call(runs / "grey", task, *arguments, "--out", "o") == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and not (tmp_path / "o").exists()


def test_results_never_replace_files(runs, photo, tmp_path, capsys):
    assert call(runs / "grey", "denoise", "--input", photo, "--out", tmp_path) == 2
    assert "already holds something" in capsys.readouterr().err and sorted(tmp_path.iterdir()) == [photo]


@pytest.mark.parametrize("arguments", [["paint"], ["denoise", "--num", "0"], ["denoise", "--sigma", "x"], []])
def test_a_bad_command_line_is_one_line_and_exit_code_2(arguments, runs, photo, capsys):
    with pytest.raises(SystemExit) as stop:
        edit.main([*arguments, "--cfg", "c", "--ckpt", "k", "--out", "o", "--input", str(photo)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
