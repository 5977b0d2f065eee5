"""A page to try a trained model in a browser: python demo.py --ckpt FILE   (pip install -r requirements-demo.txt)

The page shows the command line that makes the same pictures; its answers come by way of those lines (studio.py).
"""

from __future__ import annotations

import functools
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config
from config import ConfigError, RunFailed
from edit import TASKS
from sampling import choices
from studio import Studio

if TYPE_CHECKING:  # both are imported after the arguments are known to be right
    import gradio
    import torch
    from PIL import Image

TABS = {  # edit.py's task -> its tab, its button, what to do there
    "inpaint": ("Fill in", "Fill in", "Paint over what the model is to make anew."),
    "stroke": (
        "Draw",
        "Make a picture of it",
        "Draw; the model makes a picture that looks like it from afar. More noise changes more.",
    ),
    "colorize": ("Colour", "Colour it", "The model sees the picture's grey alone, and gives it colours."),
    "superres": ("Enlarge", "Add details", "The model sees means of blocks of pixels alone, and adds the details."),
    "interpolate": (
        "Between two",
        "Go from one to the other",
        "Two samples, or pictures of yours, and what lies between them. More noise changes more.",
    ),
}
QUIET = {"show_progress": "hidden", "api_visibility": "private"}
SIDE = 480  # pixels of a canvas and of a grid on the page, about
CSS = """
.gradio-container {width: 100%; max-width: 1180px !important; margin: 0 auto !important}
img {image-rendering: pixelated}
.said p {color: var(--body-text-color-subdued); font-size: 0.95em}
"""


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when stopped, 2 for bad input."""
    args = arguments().parse_args(argv)
    return config.exit_code(lambda: run(args))


def arguments() -> config.Arguments:
    """The command's options."""
    parser = config.Arguments(description="Try a trained model in a browser.", allow_abbrev=False)
    add, path = parser.add_argument, config.path_text
    add("--ckpt", type=path, required=True, metavar="FILE", help="checkpoint, as runs/NAME/checkpoints/last.ckpt")
    add("--cfg", type=path, metavar="FILE", help="settings of the run [the run folder's config.yml]")
    add("--port", type=choices.count, metavar="N", help="of http://127.0.0.1:N [the first free from 7860]")
    add("--share", action="store_true", help="give it a public address for a week, by way of Gradio's servers")
    return parser


def run(args: Any) -> None:
    """Show the page until Ctrl-C."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if not Path(args.ckpt).is_file():
        raise ConfigError(f"--ckpt: {args.ckpt}: there is no such file; training keeps runs/NAME/checkpoints/last.ckpt")
    try:
        import gradio as gr
    except ImportError:
        raise ConfigError("demo.py needs Gradio: pip install -r requirements-demo.txt") from None
    studio = Studio(args.ckpt, args.cfg)
    os.environ["GRADIO_TEMP_DIR"] = str(studio.folder)  # uploads lie beside the pictures made here
    # Gradio's own fonts come from here, none from Google; the system's are the calmer ones.
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=("system-ui", "sans-serif"))
    shown = {"theme": theme, "css": CSS, "footer_links": [], "ssr_mode": False, "max_file_size": "64mb"}
    try:
        page(studio).launch(server_port=args.port, share=args.share, run_history=False, **shown)
    except OSError as error:
        raise ConfigError(f"--port: {' '.join(str(error).split())[:200]}") from None


# The page -------------------------------------------------------------------------------------------------------------


def page(studio: Studio) -> gradio.Blocks:
    """The page, to be launched."""
    import gradio as gr

    with gr.Blocks(title=f"{studio.cfg.run.folder.name}: a trained model", analytics_enabled=False) as blocks:
        gr.Markdown(studio.name())
        picture = gr.State()  # the file of the picture that is edited
        views, uploads = [], []  # where it is seen, and the buttons that bring another
        with gr.Tabs() as tabs:
            with gr.Tab("Sample", id="sample"):
                grid, images, nearest = sample_tab(studio, blocks)
            for task in studio.tasks:
                with gr.Tab(TABS[task][0], id=task):
                    edit_tab(studio, blocks, task, picture, views, uploads)

        def shown(path: str | Path) -> list[Any]:
            seen = large(studio.read(path))
            return [str(path), *[seen] * len(views)]

        def clicked(images: torch.Tensor, nearest: bool, event: Any) -> list[Any]:
            if nearest:
                raise ConfigError("Switch the nearest training images off, then click a sample to edit it.")
            sample = images[place_in_grid(event.index, len(images), images.shape[-1])]
            return [gr.Tabs(selected=views and studio.tasks[0]), *shown(studio.keep(as_pil(sample), "sample"))]

        def first() -> list[Any]:
            return shown(studio.keep(as_pil(studio.sample(1, 0).images[0]), "sample"))

        clicked.__annotations__ = {"event": gr.SelectData}  # Gradio looks here for what to give
        if views:
            blocks.load(sentence(first), None, [picture, *views], **QUIET)
            grid.select(sentence(clicked), [images, nearest], [tabs, picture, *views], **QUIET)
        for upload in uploads:
            upload.upload(sentence(shown), upload, [picture, *views], **QUIET)
    return blocks


def sample_tab(studio: Studio, blocks: gradio.Blocks) -> tuple[Any, Any, Any]:
    """Samples that follow the sliders; the grid, the state that holds its images, the switch of nearest images."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            seed, of_class, guidance = seed_class_guidance(studio)
            most, usual = (40, studio.cfg.sample.heun_steps) if studio.heun else (8, 1)
            steps = gr.Slider(1 + studio.heun, most, usual, step=1, label="Heun steps" if studio.heun else "Steps")
            first, start = (0, 0.5) if studio.heun else studio.two_levels()
            top = 5 if studio.levels == "sigmas" else 1
            what = "noise level" if studio.levels == "sigmas" else "time"
            second = gr.Slider(0.02, top, start, step=0.01, label=f"Second {what}", visible=False)
            num = gr.Slider(1, 100, 16, step=1, label="Samples")
            nearest = gr.Checkbox(False, label="Nearest training images beside them")
            example = "80, 2, 0.5" if studio.levels == "sigmas" else "1, 0.7, 0.3"
            info = f"One for each evaluation, as {example}; empty: the model's own"
            levels = gr.Textbox(label=f"All {what}s", info=info, lines=1)
        with gr.Column(scale=3):
            grid = still("Samples: click one to edit it" if studio.tasks else "Samples", SIDE + 20)
            said, command = told_of()
    images = gr.State()

    def draw(
        seed: int, of_class: str, guidance: float | None, steps: int, second_level: float, num: int, nearest: bool,
        levels: str,
    ) -> list[Any]:  # fmt: skip
        own = steps == 2 and not studio.heun and not levels.strip()
        if own and second_level != start:
            levels = f"{first:g}, {second_level:g}"
        answer = studio.sample(num, seed, of_class, steps, levels, guidance, nearest)
        shown = as_pil(answer.around[0]) if nearest else in_grid(answer.images)
        return [shown, answer.said, answer.command, answer.images, gr.update(visible=own)]

    inputs = [seed, of_class, guidance, steps, second, num, nearest, levels]
    moved = [blocks.load, levels.submit, levels.blur]
    moved += [control.change for control in inputs[:-1] if not isinstance(control, gr.State)]
    outputs = [grid, said, command, images, second]
    gr.on(moved, sentence(draw), inputs, outputs, trigger_mode="always_last", **QUIET)
    return grid, images, nearest


def edit_tab(
    studio: Studio, blocks: gradio.Blocks, task: str, picture: Any, views: list[Any], uploads: list[Any]
) -> None:
    """A task of edit.py: what it takes, its button, its results."""
    import gradio as gr

    _, label, what = TABS[task]
    option, between = gr.State(), task == "interpolate"
    with gr.Row():
        with gr.Column(min_width=440):
            gr.Markdown(what)
            if between:
                with gr.Row():
                    sources = [end(studio, blocks, number) for number in (1, 2)]
            elif task == "stroke":
                sources = [canvas(studio, drawing=True)]
            else:
                sources = [picture]
                views.append(canvas(studio) if task == "inpaint" else still("Picture", SIDE))
            with gr.Row():
                if sources == [picture]:
                    uploads.append(gr.UploadButton("Take a picture of mine", file_types=["image"]))
                button = gr.Button(label, variant="primary")
        with gr.Column(min_width=440):
            with gr.Row():
                seen = still("It sees", 190, scale=1, min_width=130, visible=not between)
                grid = still("Results", SIDE - 60, scale=3, min_width=300)
            said, command = told_of()
    with gr.Row():
        if task in ("stroke", "interpolate"):
            option = gr.Slider(0.1, 5, round(studio.hiding_noise(), 2), step=0.05, label="Noise on it")
        elif task == "superres":
            option = gr.Radio(studio.factors, value=studio.factors[0], label="Times smaller")
        elif task == "inpaint":
            option = views[-1]
        seed, of_class, guidance = seed_class_guidance(studio)
        _, usual_num, usual_steps = TASKS[task]
        num = gr.Slider(1, 16, usual_num, step=1, label="Results")
        steps = gr.Slider(1, 80, usual_steps, step=1, label="Steps")

    def make(seed: int, of_class: str, guidance: float | None, num: int, steps: int, option: Any, *given: Any) -> Any:
        options = {"superres": {"factor": option}, "colorize": {}}.get(task, {"sigma": option})
        if task == "inpaint":
            options = {"mask": studio.mask((option or {}).get("layers", []))}
        elif task == "stroke":
            given = [studio.drawing((given[0] or {}).get("composite"))]
        answer = studio.edit(task, list(map(Path, given)), num, seed, of_class, steps, guidance, **options)
        results = in_grid(answer.images, columns=4 if between and num > 4 else None)
        return [None if between else in_grid(answer.around, side=SIDE // 3), results, answer.said, answer.command]

    inputs = [seed, of_class, guidance, num, steps, option, *sources]
    button.click(sentence(make), inputs, [seen, grid, said, command], api_visibility="private")


def seed_class_guidance(studio: Studio, usual: int = 0) -> tuple[Any, Any, Any]:
    """The controls of all tabs; what the model does not take is no control, but the value for nothing."""
    import gradio as gr

    seed = gr.Slider(0, 100, usual, step=1, label="Seed")
    of_class, guidance = gr.State(""), gr.State()
    if studio.classes:
        of_class = gr.Dropdown([("any", ""), *((name, name) for name in studio.classes)], value="", label="Class")
    if studio.guidance:
        low, high = studio.guidance
        guidance = gr.Slider(low, high, studio.cfg.sample.guidance or low, step=0.1, label="Guidance")
    return seed, of_class, guidance


def end(studio: Studio, blocks: gradio.Blocks, number: int) -> Any:
    """One of two pictures to go between, a sample or a picture of the user's: the state that holds its file."""
    import gradio as gr

    path = gr.State()
    with gr.Column(min_width=140):
        view = still(f"Picture {number}", 200)
        seed, of_class, _ = seed_class_guidance(studio, number)
        upload = gr.UploadButton("Take one of mine", file_types=["image"])

    def sampled(seed: int, of_class: str) -> list[Any]:
        return taken(studio.keep(as_pil(studio.sample(1, seed, of_class).images[0]), "sample"))

    def taken(path: str | Path) -> list[Any]:
        return [str(path), large(studio.read(path))]

    moved = [blocks.load, seed.change, *([of_class.change] if studio.classes else [])]
    gr.on(moved, sentence(sampled), [seed, of_class], [path, view], trigger_mode="always_last", **QUIET)
    upload.upload(sentence(taken), upload, [path, view], **QUIET)
    return path


# Parts of the page ---------------------------------------------------------------------------------------------------


def sentence(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, for an event of the page: bad input becomes a sentence there, and the page stays as it is."""
    import gradio as gr

    from metrics.scores import ScoreError

    @functools.wraps(function)
    def told(*values: Any) -> Any:
        try:
            return function(*values)
        except (ConfigError, RunFailed, ScoreError, OSError) as error:
            said = str(error).removeprefix("--input: ")
            gr.Warning(re.sub(r"\S*[/\\]", "", said), duration=12, title="")
            return gr.skip()

    return told


def told_of() -> tuple[Any, Any]:
    """Where it is said what pictures are, and which command makes them."""
    import gradio as gr

    said = gr.Markdown(elem_classes="said")
    how = {"wrap_lines": True, "show_line_numbers": False, "lines": 1, "buttons": ["copy"], "interactive": False}
    return said, gr.Code("# comes with the pictures", "shell", label="The same on the command line", **how)


def still(label: str, height: int, **settings: Any) -> Any:
    """A picture that is only looked at."""
    import gradio as gr

    return gr.Image(label=label, format="png", interactive=False, height=height, buttons=["download"], **settings)


def canvas(studio: Studio, drawing: bool = False) -> Any:
    """Where a mask is painted over a picture, or a drawing made: white on black for grey models, colours on white."""
    import gradio as gr
    from PIL import Image

    side = SIDE - 60
    colours, ground = ["#e03131"], None
    if drawing and studio.model.codec.image_shape[0] == 1:
        colours, ground = ["#ffffff", "#aaaaaa", "#555555", "#000000"], "black"
    elif drawing:
        colours = ["#222222", "#ffffff", "#e03131", "#f08c00", "#f2d16b", "#2f9e44", "#1971c2", "#7b4b2a"]
        ground = "white"
    brush = gr.Brush(default_size=side // 12, colors=colours, default_color=colours[0], color_mode="fixed")
    how = {"type": "pil", "sources": (), "transforms": (), "layers": False, "brush": brush, "format": "png"}
    value = ground and Image.new("RGB", (side, side), ground)
    return gr.ImageEditor(value, label="Canvas", canvas_size=(side, side), fixed_canvas=True, height=side + 70, **how)


def as_pil(image: torch.Tensor) -> Image.Image:
    """PIL's image of a uint8 (1 or 3, H, W)."""
    from metrics import pictures

    return pictures.to_pil(image)


def in_grid(images: torch.Tensor, columns: int | None = None, side: int = SIDE) -> Image.Image:
    """uint8 images (N, C, R, R) side by side, small ones enlarged to fill about `side` pixels, without blur."""
    from metrics import pictures

    columns = columns or math.ceil(math.sqrt(len(images)))
    return pictures.to_pil(pictures.grid(images, columns, side // columns))


def place_in_grid(point: Sequence[int], count: int, size: int) -> int:
    """Which of `count` images of `size` pixels lies at a point (x, y) of `in_grid`'s picture."""
    columns = math.ceil(math.sqrt(count))
    cell = size * max(1, round(SIDE // columns / size)) + 2
    return min(int(point[1] // cell) * columns + min(int(point[0] // cell), columns - 1), count - 1)


def large(image: torch.Tensor) -> Image.Image:
    """One uint8 image (C, R, R) enlarged without blur, in RGB."""
    from PIL import Image

    factor = max(1, (SIDE - 60) // image.shape[-1])
    side = factor * image.shape[-1]
    return as_pil(image).convert("RGB").resize((side, side), Image.Resampling.NEAREST)


if __name__ == "__main__":
    sys.exit(main())
