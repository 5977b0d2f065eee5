"""demo.py: the shown commands make what its page shows; and the page itself, in a browser where there is one."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image, ImageDraw

import config
import demo
import edit
import generate
from studio import Studio
from training import trainer

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LABELLED = {"name": "digits", "conditional": True}


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Studio:
    """Of digits, with classes and guidance."""
    folder = tmp_path_factory.mktemp("run")
    trainer.train(tiny(folder, network={"label_dropout": 0.1}, data=LABELLED))
    return Studio(str(folder / "checkpoints" / "last.ckpt"))


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path)))


def same_by_command(answer, folder: Path) -> bool:
    """Whether the shown line, run, makes the same pictures, in the same order."""
    _, script, *words = shlex.split(answer.command)
    folder.mkdir()
    if "--out" in words:
        words[words.index("--out") + 1] = str(folder / "out")
    else:
        words += ["--out", str(folder / "out")]
    assert {"generate.py": generate, "edit.py": edit}[Path(script).name].main(words) == 0
    made = sorted(path for path in (folder / "out").rglob("*.png") if re.search(r"\d\d\.png$", path.name))
    return torch.equal(torch.stack([pixels(path) for path in made]), answer.images[:, 0])


# What the page asks ---------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_command(studio, tmp_path):
    plain = studio.sample(5, 3)
    asked = studio.sample(5, 3, "7", levels=" 80, 2 ,0.5,", guidance=2.5)
    assert plain.images.shape == (5, 1, 8, 8) and not torch.equal(plain.images, asked.images)
    assert "--class=7 --sigmas=80,2,0.5 --guidance=2.5" in asked.command
    assert "5 samples" in asked.said and "seed 3, class 7, guidance 2.5" in asked.said and " s on cpu" in asked.said
    assert same_by_command(plain, tmp_path / "plain") and same_by_command(asked, tmp_path / "asked")
    assert not torch.equal(studio.sample(5, 3, steps=4).images, plain.images)


def test_edits_are_those_of_the_command(studio, tmp_path):
    sample = studio.keep(demo.as_pil(studio.sample(1, 0).images[0]), "sample")
    layer = Image.new("RGBA", (420, 420))
    ImageDraw.Draw(layer).rectangle((60, 60, 200, 120), fill="#e03131")
    mask = studio.mask([layer])
    assert pixels(mask).nonzero().tolist() == [[y, x] for y in (1, 2) for x in (1, 2, 3)]  # of 52.5 pixels each
    drawing = Image.new("RGB", (420, 420))
    ImageDraw.Draw(drawing).line((100, 50, 300, 350), fill="white", width=60)
    other = studio.keep(demo.as_pil(studio.sample(1, 1).images[0]), "sample")
    answers = {
        "inpaint": studio.edit("inpaint", [sample], 3, 1, steps=4, mask=mask),
        "stroke": studio.edit("stroke", [studio.drawing(drawing)], 2, 0, "3", steps=2, sigma=0.8, guidance=2),
        "superres": studio.edit("superres", [sample], 2, 0, steps=3, factor=2),
        "interpolate": studio.edit("interpolate", [sample, other], 4, 0, steps=2, sigma=1.5),
    }
    assert other != sample and "sample.guidance=2" in answers["stroke"].command
    assert list(answers) == studio.tasks  # colour is for models of colours
    for task, answer in answers.items():
        assert same_by_command(answer, tmp_path / task), task
        assert len(answer.around) == 1 + (task == "interpolate")
    kept = (pixels(mask) == 0).expand(3, 1, 8, 8)
    assert torch.equal(answers["inpaint"].images[kept], pixels(sample).expand(3, 1, 8, 8)[kept])


def test_nearest_images_are_those_of_the_command(studio, tmp_path, capsys):
    answer = studio.sample(12, 0, nearest=True)
    assert same_by_command(answer, tmp_path / "a")
    [written] = (tmp_path / "a" / "out").rglob("nearest.png")
    assert torch.equal(pixels(written), answer.around[0].permute(1, 2, 0))
    assert answer.said.split("sample. ")[1] in capsys.readouterr().out
    with pytest.raises(config.ConfigError, match="at least 10"):
        studio.sample(9, 0, nearest=True)


def test_what_the_model_takes(studio, tmp_path):
    assert studio.classes == [str(number) for number in range(10)]
    assert (studio.guidance, studio.factors, studio.levels, studio.heun) == ((1.0, 8.0), [2, 4, 8], "sigmas", False)
    assert studio.two_levels() == [80.0, 0.821] and studio.hiding_noise() == 0.5
    trainer.train(tiny(tmp_path, objective={"name": "edm"}, data={"channels": 3}, train={"steps": 2}))
    colour = Studio(str(tmp_path / "checkpoints" / "last.ckpt"))
    assert (colour.guidance, colour.classes, colour.heun) == (None, [], True)
    assert colour.tasks == ["inpaint", "stroke", "colorize", "superres", "interpolate"]
    answer = colour.sample(2, 0, steps=3)
    assert "5 evaluations" in answer.said and "sample.heun_steps=3" in answer.command


def test_a_flow_map_is_asked_for_times(tmp_path):
    trainer.train(tiny(tmp_path / "run", objective={"name": "imf", "guidance": 3.0}, data=LABELLED, train={"steps": 2}))
    flow = Studio(str(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    assert (flow.levels, flow.guidance) == ("times", (1.0, 3.0)) and flow.two_levels() == [1.0, 0.5]
    answer = flow.sample(3, 0, levels="1, 0.3", guidance=2)
    assert "--times=1,0.3" in answer.command and same_by_command(answer, tmp_path / "a")


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda s, f: s.read(f / "note.txt"), "cannot be read"),
        (lambda s, f: s.read(f / "broken.png"), "cannot be read"),
        (lambda s, f: s.mask([]), "Nothing is painted"),
        (lambda s, f: s.mask([Image.new("RGBA", (9, 9))]), "Nothing is painted"),
        (lambda s, f: s.drawing(None), "Nothing is drawn"),
        (lambda s, f: s.drawing(Image.new("RGB", (9, 9), "white")), "Nothing is drawn"),
        (lambda s, f: s.sample(1, 0, levels="80 and 2"), "80 and 2 are no sigmas: write numbers"),
        (lambda s, f: s.sample(1, 0, levels="-1,5"), "must descend"),
        (lambda s, f: s.sample(1, 0, levels="900"), "above"),
    ],
)
def test_wrong_input_is_one_sentence(studio, tmp_path, ask, said):
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nxxxx")
    with pytest.raises(config.ConfigError, match=said) as error:
        ask(studio, tmp_path)
    assert "\n" not in str(error.value)


def test_a_wrong_command_is_one_line(tmp_path, capsys):
    assert demo.main(["--ckpt", str(tmp_path / "none.ckpt")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    (tmp_path / "lost.ckpt").write_bytes(b"")
    with pytest.raises(config.ConfigError, match="--cfg: there is no config"):
        Studio(str(tmp_path / "lost.ckpt"))


def test_without_gradio_it_says_what_to_install(studio, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo.main(["--ckpt", studio.words[3]]) == 2
    assert capsys.readouterr().err == "demo.py needs Gradio: pip install -r requirements-demo.txt\n"


def test_vectors_are_refused(tmp_path):
    np.savez(tmp_path / "v.npz", vectors=np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32))
    cfg = {"network": {"name": "mlp", "width": 8, "depth": 1}, "data": {"name": "npz", "path": str(tmp_path / "v.npz")}}
    raw = {"objective": {"name": "ect"}, "train": {"steps": 2, "batch_size": 8}, "metrics": {"at_end": False}}
    trainer.train(config.parse({**raw, **cfg, "run": {"dir": str(tmp_path / "run"), "device": "cpu"}}))
    with pytest.raises(config.ConfigError, match="makes vectors, and the demo is for images"):
        Studio(str(tmp_path / "run" / "checkpoints" / "last.ckpt"))


def test_a_place_in_the_grid_is_that_sample():
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 1, 8, 8) * 20 + 10
    for size in (8, 32, 600):
        drawn = demo.in_grid(images.repeat_interleave(size // 8, 2).repeat_interleave(size // 8, 3))
        for x, y in [(5, 5), (drawn.width - 5, 5), (drawn.width // 2 + 9, drawn.height // 2), (9, drawn.height - 5)]:
            value = drawn.getpixel((x, y))[0]
            assert demo.place_in_grid((x, y), 12, size) == (value - 10) // 20


# In a browser ---------------------------------------------------------------------------------------------------------


LABELS = """import json, sys, demo
from studio import Studio
for ckpt in sys.argv[1:]:
    print(json.dumps([str(getattr(block, "label", None)) for block in demo.page(Studio(ckpt)).blocks.values()]))"""


def test_a_page_has_what_the_model_takes(tmp_path):
    pytest.importorskip("gradio")
    for objective in ({"name": "edm"}, {"name": "imf", "guidance": 4.0}):
        given = {"name": "digits", "conditional": "guidance" in objective, "channels": 3}
        trainer.train(tiny(tmp_path / objective["name"], objective=objective, data=given, train={"steps": 2}))
    ckpts = [str(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("edm", "imf")]
    words = [sys.executable, "-W", "error::UserWarning", "-c", LABELS, *ckpts]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)  # Gradio leaves event loops open
    assert done.returncode == 0, done.stderr
    plain, guided = (set(json.loads(line)) for line in done.stdout.splitlines()[-2:])
    assert {"Sample", "Fill in", "Draw", "Colour", "Enlarge", "Between two", "Seed"} <= plain & guided
    assert not {"Class", "Guidance"} & plain and {"Class", "Guidance"} <= guided
    assert {"Heun steps", "All noise levels"} <= plain and {"Steps", "All times"} <= guided


@pytest.fixture(scope="module")
def address(studio):
    """Of the page, run as a user does."""
    pytest.importorskip("gradio")
    words = [sys.executable, "demo.py", "--ckpt", studio.words[3]]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        said = ""
        for line in run.stdout:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                break
        run.terminate()
        assert found, said


@pytest.fixture(scope="module")
def page(address):
    """The page, and what went wrong on it."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.faults, page.hosts = [], set()
        page.on("console", lambda m: page.faults.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("request", lambda r: page.hosts.add(r.url.split("/")[2]) if r.url.startswith("http") else None)
        page.goto(address)
        page.get_by_text("16 samples").wait_for(timeout=60_000)
        yield page
        browser.close()
        assert page.faults == [] and page.hosts == {address.split("/")[2]}


def command(page, words: str) -> str:
    """The command that the open tab shows once it holds these words."""
    shown = page.locator(".cm-content:visible").filter(has_text=re.compile(words))
    shown.wait_for(timeout=60_000)
    return " ".join(shown.inner_text().split())


def stroke(page, *points):
    """Move the mouse, pressed, between points given from the middle of the canvas."""
    box = page.locator("canvas:visible").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x + points[0][0], y + points[0][1])
    page.mouse.down()
    for dx, dy in points[1:]:
        page.mouse.move(x + dx, y + dy, steps=8)
    page.mouse.up()
    time.sleep(1)  # the canvas sends what was painted


def toast(page) -> str:
    said = page.locator(".toast-body").last
    said.wait_for(timeout=30_000)
    text = " ".join(said.inner_text().split())
    page.get_by_role("button", name="Close").last.click()
    return text


def test_samples_follow_the_sliders(page):
    box = page.get_by_label("number input for Steps").first
    box.fill("2")
    box.press("Enter")
    command(page, "--steps 2")
    box = page.get_by_label("number input for Second noise level")
    box.fill("1.5")
    box.press("Enter")
    command(page, "--sigmas=80,1.5")
    page.get_by_label("Nearest training images").click()
    page.get_by_text("copies:").wait_for(timeout=60_000)
    page.get_by_label("Nearest training images").click()
    page.get_by_text("copies:").wait_for(timeout=60_000, state="detached")


def test_a_mask_is_painted_over_a_clicked_sample(page, studio, tmp_path):
    page.get_by_role("tab", name="Sample").click()
    levels = re.search(r"--sigmas=(\S+)", command(page, "generate.py"))
    grid = page.locator("img:visible").first.bounding_box()
    page.mouse.click(grid["x"] + grid["width"] * 0.6, grid["y"] + grid["height"] * 0.4)  # the seventh
    page.get_by_text("Paint over").wait_for()
    time.sleep(2)
    page.get_by_role("button", name="Fill in").click()
    assert "Nothing is painted yet" in toast(page)
    stroke(page, (-100, -100), (100, -90))
    page.get_by_role("button", name="Fill in").click()
    words = shlex.split(command(page, "edit.py inpaint"))
    mask, sample = (pixels(Path(words[words.index(option) + 1])) for option in ("--mask", "--input"))
    assert 4 <= int((mask > 0).sum()) <= 24 and not (mask[4:] > 0).any()
    expected = studio.sample(16, 0, levels=levels[1] if levels else "", guidance=1).images
    assert torch.equal(sample, expected[6, 0])


def test_two_samples_are_gone_between(page):
    page.get_by_role("tab", name="Between two").click()
    page.get_by_role("button", name="Go from one to the other").click()
    page.get_by_text("8 results, 3 evaluations").wait_for(timeout=60_000)
    assert len(re.findall(r"sample-\w+\.png", command(page, "edit.py interpolate").replace("- ", "-"))) == 2


def test_a_wrong_file_is_a_sentence(page, tmp_path):
    (tmp_path / "note.png").write_text("hello")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nxxxx")
    page.get_by_role("tab", name="Fill in").click()
    for name in ("note.png", "broken.png"):
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Take a picture of mine").first.click()
        chooser.value.set_files(tmp_path / name)
        assert f"{name} cannot be read" in toast(page)
