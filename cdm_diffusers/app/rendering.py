"""What the page shows, as HTML with its pictures inline: none of them is written to disk."""

import base64
import io
import zipfile
from collections.abc import Iterable
from html import escape

from PIL import Image

from ..commands.pictures import file_name
from ..data.pictures import CELL_SIZE, labelled_grid
from .facts import StageFacts
from .generation import Update


PREVIEW_SIZE = 64
LARGE_SIZE = 128  # from which on a stage's images take the full width
STYLE = """
footer { display: none !important; }
.cdm-stages { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); }
.cdm-stages h4 { margin: 0 0 4px; font-weight: 600; }
.cdm-images { display: grid; gap: 6px; grid-template-columns: repeat(auto-fill, minmax(60px, 1fr)); }
.cdm-large { grid-column: 1 / -1; }
.cdm-large .cdm-images { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }
.cdm-images figure { margin: 0; min-width: 0; }
.cdm-images img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; display: block; }
.cdm-images img { border: 1px solid var(--border-color-primary); border-radius: 4px; }
.cdm-images figcaption { font-size: 12px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.cdm-progress { min-height: 36px; }
.cdm-bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); margin-bottom: 4px; }
.cdm-bar div { height: 100%; border-radius: 3px; background: var(--color-accent); }
.cdm-downloads { display: flex; flex-wrap: wrap; gap: 8px; }
.cdm-downloads a { padding: 8px 14px; border: 1px solid var(--border-color-primary); border-radius: 6px; }
.cdm-downloads a { color: var(--body-text-color); text-decoration: none; }
@media (max-width: 480px) {
  .gradio-container main { padding: 12px !important; }
  .tab-container button { padding: 0 9px !important; font-size: 14px !important; }
}
"""


def progress(update: Update) -> str:
    """A bar and a line: which stage takes which step, how fast, and for how long."""
    line = f"{update.stage}: step {update.step} of {update.num_steps}, {update.images_per_second:.3g} images/s"
    if update.step < update.num_steps:
        line += f", {update.seconds_left:.0f} s left"
    bar = f'<div class="cdm-bar"><div style="width: {update.step / update.num_steps:.0%}"></div></div>'
    return said(line, bar)


def finished(num_images: int, seconds: float) -> str:
    """What is shown at the end."""
    return said(f"{num_images} images in {seconds:.1f} s.")


def said(line: str, bar: str = "") -> str:
    """A line in place of the progress."""
    return f'<div class="cdm-progress" role="status">{bar}<div>{escape(line)}</div></div>'


class Gallery:
    """The images of a run: small while their stage samples, whole and encoded once when it has finished."""

    def __init__(self, facts: list[StageFacts]):
        self.titles = {stage.name: stage.title for stage in facts}
        self.finished: dict[str, str] = {}

    def show(self, update: Update) -> str:
        """The images of each stage so far, each with its caption."""
        sections = []
        for name, images in update.images.items():
            title, size = self.titles.get(name, name), images[0].width
            if name == update.unfinished_stage:
                sections.append(section(title, [preview(image) for image in images], update.captions, size))
            else:
                if name not in self.finished:
                    self.finished[name] = section(title, images, update.captions, size)
                sections.append(self.finished[name])
        return side_by_side(sections)


def side_by_side(sections: Iterable[str]) -> str:
    """Each [`section`] beside the one before, as far as there is room."""
    return f'<div class="cdm-stages">{"".join(sections)}</div>'


def section(title: str, images: list[Image.Image], captions: list[str], size: int) -> str:
    """Images under a title, each with its caption; `size` is that of the stage, whatever theirs."""
    figures = [
        f'<figure><img alt="{escape(f"{caption} ({title})".strip())}" src="{data_uri(png(image), "image/png")}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for image, caption in zip(images, captions, strict=True)
    ]
    kind = ' class="cdm-large"' if size >= LARGE_SIZE else ""
    return f'<section{kind}><h4>{escape(title)}</h4><div class="cdm-images">{"".join(figures)}</div></section>'


def preview(image: Image.Image) -> Image.Image:
    """The image at less than twice [`PREVIEW_SIZE`]."""
    return image.reduce(max(1, image.width // PREVIEW_SIZE))


def downloads(stages: dict[str, list[Image.Image]], captions: list[str]) -> str:
    """Links to a grid of all stages and to the images one by one."""
    links = {
        "Grid (PNG)": ("samples.png", data_uri(png(grid(stages, captions)), "image/png")),
        "Images (ZIP)": ("samples.zip", data_uri(archive(stages, captions), "application/zip")),
    }
    anchors = [f'<a download="{name}" href="{uri}">{text}</a>' for text, (name, uri) in links.items()]
    return f'<div class="cdm-downloads">{"".join(anchors)}</div>'


def grid(stages: dict[str, list[Image.Image]], captions: list[str]) -> Image.Image:
    """One picture: a row for each run of equal captions, every stage's image beside the next."""
    rows: list[tuple[str, list[tuple[Image.Image, ...]]]] = []
    for caption, images in zip(captions, zip(*stages.values(), strict=True), strict=True):
        if not rows or rows[-1][0] != caption:
            rows.append((caption, []))
        rows[-1][1].append(images)
    last = list(stages.values())[-1]
    return labelled_grid(rows, max(CELL_SIZE, last[0].width))


def archive(stages: dict[str, list[Image.Image]], captions: list[str]) -> bytes:
    """A ZIP of a PNG per image, in a folder per stage."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for stage, images in stages.items():
            for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
                packed.writestr(f"{stage}/{number:02d}-{file_name(caption)}.png", png(image))
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    """The content of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """`content` as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
