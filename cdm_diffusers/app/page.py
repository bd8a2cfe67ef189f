"""The page: controls made from the facts of a cascade, and what they start."""

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse
from starlette.middleware import Middleware

from ..pipelines import CascadedDiffusionPipeline
from ..pipelines.inputs import tensor_to_images
from ..pipelines.solver_names import SOLVER_NAMES
from . import rendering
from .config import MINUTES, AppConfig, Limits
from .facts import StageFacts, class_names, stage_facts
from .gate import CALL, Calls, Gate, Quota
from .generation import Settings, generate
from .uploads import low_res_of, take_upload


SAMPLING = {"concurrency_limit": 1, "concurrency_id": "sampling"}
HIGHEST_SCALE = 10.0
MOST_VISITORS = 100  # whose states are held at a time, some 150 kB each


@dataclass(frozen=True)
class Panel:
    """Controls by what they set: an option of [`Settings`], and the stage where it has one."""

    controls: dict[tuple[str, str | None], gr.components.Component]

    def settings(self, values: tuple) -> Settings:
        """The settings that `values`, in the order of the controls, stand for."""
        chosen: dict[str, Any] = {}
        for (option, stage), value in zip(self.controls, values, strict=True):
            if stage is None:
                chosen[option] = value
            elif value is not None:
                chosen.setdefault(option, {})[stage] = value
        return Settings(**chosen)


@dataclass(frozen=True)
class View:
    """Where a run is shown."""

    progress: gr.HTML
    pictures: gr.HTML
    downloads: gr.HTML

    @classmethod
    def make(cls) -> "View":
        """An empty one, placed here on the page."""
        return cls(gr.HTML(rendering.said("")), gr.HTML(), gr.HTML())


@dataclass(frozen=True)
class Demo:
    """A cascade on a page."""

    pipeline: CascadedDiffusionPipeline
    limits: Limits
    stages: list[StageFacts]
    classes: list[str]

    # -----------------------------------------------------------------------------------------------------------------
    # What runs

    def show(self, settings: Settings, **arguments: Any) -> Iterator[tuple]:
        """Values of a [`View`] while a run goes on and when it has ended."""
        began, gallery = time.monotonic(), rendering.Gallery(self.stages)
        updates = generate(self.pipeline, settings, self.limits, **arguments)
        yield rendering.said("Starts."), "", ""
        for update in updates:
            yield rendering.progress(update), gallery.show(update), ""
        done = rendering.finished(len(update.captions), time.monotonic() - began)
        yield done, gr.skip(), rendering.downloads(update.images, update.captions)

    def side_by_side(self, first: Settings, second: Settings) -> Iterator[tuple]:
        """Progress, the pictures of A and of B, and downloads of both; each is a sampling within the limits."""
        began, images = time.monotonic(), {}
        runs = {name: generate(self.pipeline, chosen, self.limits) for name, chosen in (("A", first), ("B", second))}
        yield rendering.said("Starts."), "", "", ""
        for name, updates in runs.items():
            gallery = rendering.Gallery(self.stages)
            for update in updates:
                html = gallery.show(update)
                shown = (html, gr.skip()) if name == "A" else (gr.skip(), html)
                yield rendering.progress(update), *shown, ""
            images |= {f"{name}_{stage}": of_stage for stage, of_stage in update.images.items()}
        done = rendering.finished(2 * len(update.captions), time.monotonic() - began)
        yield done, gr.skip(), gr.skip(), rendering.downloads(images, update.captions)

    # -----------------------------------------------------------------------------------------------------------------
    # Controls

    def main_panel(self) -> Panel:
        """Classes, images, seed, and what each stage takes."""
        controls = {}
        labels = self.classes[: min(4, self.limits.max_images)]
        if labels:
            controls["class_labels", None] = gr.Dropdown(self.classes, value=labels, multiselect=True, label="Classes")
        most, count = self.limits.max_images, max(1, min(2, self.limits.max_images // max(1, len(labels))))
        controls["num_images", None] = gr.Slider(
            1, most, count, step=1, precision=0, label=f"Images of each class (at most {most} in all)"
        )
        return Panel(controls | self.how())

    def how(self) -> dict:
        """Seed, and what each stage takes."""
        controls = {("seed", None): gr.Number(0, label="Seed", precision=0)}
        for stage in self.stages:
            with gr.Accordion(stage.title, open=False):
                controls["num_inference_steps", stage.name] = gr.Slider(
                    1, stage.most_steps, stage.steps, step=1, precision=0, label="Steps"
                )
                if stage.highest_level is not None:
                    controls["augmentation_levels", stage.name] = self.level_slider(stage, "s")
                if stage.scale is not None:
                    controls["guidance_scale", stage.name] = gr.Slider(
                        0, max(HIGHEST_SCALE, stage.scale), stage.scale, step=0.1, label="Guidance w (1 is none)"
                    )
                controls["scheduler", stage.name] = gr.Dropdown(
                    list(SOLVER_NAMES), value=stage.solver, label="Solver", filterable=False
                )
        return controls

    def level_slider(self, stage: StageFacts, label: str) -> gr.Slider:
        """s of a stage that takes one."""
        return gr.Slider(0, stage.highest_level, stage.level, step=1, precision=0, label=label)

    # -----------------------------------------------------------------------------------------------------------------
    # Tabs

    def sample_tab(self, panel: Panel) -> None:
        """All stages, as they finish."""
        start, stop = _buttons("Sample")
        view = View.make()

        def run(*values: Any) -> Iterator[tuple]:
            yield from self.show(panel.settings(values))

        _on(start.click, run, list(panel.controls.values()), view, stop)

    def level_tab(self, panel: Panel) -> None:
        """A slider over s of each stage that takes one; all else, the noise too, stays."""
        gr.Markdown(
            "Before a stage upsamples its input, noise is added to it, up to step s of the forward process. "
            "At s = 0 the stage trusts its input; the larger s is, the more it draws anew. "
            "The seed and all other settings stay, and so does the noise itself: whatever changes is due to s."
        )
        sliders = {
            ("augmentation_levels", stage.name): self.level_slider(stage, f"s of {stage.title}")
            for stage in self.stages
            if stage.highest_level is not None
        }
        start, stop = _buttons("Sample at s")
        view, turned = View.make(), Panel(panel.controls | sliders)

        def run(*values: Any) -> Iterator[tuple]:
            yield from self.show(turned.settings(values))

        for trigger in (start.click, *(slider.release for slider in sliders.values())):
            _on(trigger, run, list(turned.controls.values()), view, stop)

    def picture_tab(self, panel: Panel) -> None:
        """The super-resolution stages on a visitor's picture."""
        stages = [stage for stage in self.stages if stage.low_res_size is not None]
        largest = max(stage.low_res_size for stage in stages)
        gr.Markdown(
            "A picture is cropped to a square and shrunk to what the stage takes. Only that is kept, in memory and "
            f"for at most {MINUTES} minutes; its file is removed at once."
        )
        upload = gr.File(label="Picture", file_types=["image"], height=120, elem_id="upload")
        upload.preprocess = lambda payload: payload and Path(payload.path)  # Gradio's own leaves files behind
        pixels = gr.State(time_to_live=60 * MINUTES)
        seen = gr.HTML()
        sizes = {stage.title: stage.low_res_size for stage in stages}
        first = gr.Dropdown(list(sizes), value=next(iter(sizes)), label="Start at", filterable=False)
        is_kept_to = gr.Checkbox(label="Keep to the picture (consistency)")
        start, stop = _buttons("Enlarge")
        view = View.make()

        def take(file: Path | None) -> tuple:
            if file is None:
                return gr.skip(), gr.skip(), gr.skip()
            try:
                taken = take_upload(file, largest, self.pipeline.base_unet.config.out_channels, self.limits)
            finally:
                with contextlib.suppress(OSError):
                    file.parent.rmdir()  # Gradio makes a folder for each content
            inputs = {stage.name: 2 * low_res_of(taken, stage.low_res_size) - 1 for stage in stages}
            sections = [
                rendering.section(f"What {name} takes", tensor_to_images(pixels, "pil"), [""], pixels.shape[-1])
                for name, pixels in inputs.items()
            ]
            return None, taken, rendering.side_by_side(sections)

        def run(taken: Any, title: str, consistency: bool, *values: Any) -> Iterator[tuple]:
            if taken is None:
                raise ValueError("There is no picture yet, or no longer: upload one first.")
            picture = low_res_of(taken, sizes[title])
            yield from self.show(panel.settings(values), picture=picture, consistency=consistency)

        upload.upload(_told(take), upload, [upload, pixels, seen], concurrency_limit=1, api_visibility="private")
        _on(start.click, run, [pixels, first, is_kept_to, *panel.controls.values()], view, stop)

    def compare_tab(self, panel: Panel) -> None:
        """Two settings side by side."""
        gr.Markdown("A has the settings that all tabs share. B has the same classes, and these:")
        what = {key: control for key, control in panel.controls.items() if key[0] in ("class_labels", "num_images")}
        other = Panel(what | self.how())
        start, stop = _buttons("Compare")
        progress = gr.HTML(rendering.said(""))
        with gr.Row():
            shown = []
            for name in "AB":
                with gr.Column(min_width=140):
                    gr.Markdown(f"### {name}")
                    shown.append(gr.HTML())
        downloads = gr.HTML()
        inputs = [*panel.controls.values(), *other.controls.values()]

        def run(*values: Any) -> Iterator[tuple]:
            count = len(panel.controls)
            yield from self.side_by_side(panel.settings(values[:count]), other.settings(values[count:]))

        _on(start.click, run, inputs, [progress, *shown, downloads], stop)


class Page(gr.Blocks):
    """
    Blocks that fetch nothing: Gradio downloads any input, of any control, that claims to be a file at a URL. What a
    control refuses leaves no traceback in the log. Of `calls`, those that no longer count end.
    """

    calls: Calls

    async def process_api(
        self, block_fn: Any, inputs: list[Any], *arguments: Any, request: Any = None, **options: Any
    ) -> dict[str, Any]:
        """
        One step of a call.

        Raises:
            gradio.Error: its visitor has made newer calls.
        """
        number = None if request is None else request.headers.get(CALL)
        if number is not None and not self.calls.counts(int(number)):
            message = f"This ended, since newer calls took its place: {self.calls.most} count from one address."
            raise gr.Error(message, duration=None, print_exception=False)
        return await super().process_api(block_fn, inputs, *arguments, request=request, **options)

    async def preprocess_data(self, *arguments: Any, **options: Any) -> list[Any]:
        """
        Raises:
            gradio.Error: a visitor has posted what a control does not take.
        """
        try:
            return await super().preprocess_data(*arguments, **options)
        except gr.Error as error:
            error.print_exception = False
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise gr.Error("A control has a value that it does not take.", print_exception=False) from error

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """
        Raises:
            gradio.Error: there is a file at a URL among `inputs`, as a visitor has posted them.
        """
        super().validate_inputs(block_fn, inputs)
        traverse(inputs, _check_is_upload, is_file_obj_with_meta)


def _check_is_upload(file: dict) -> None:
    if is_http_url_like(file["path"]):
        raise gr.Error("A file must be uploaded; none is fetched from a URL.", print_exception=False)


def build_page(pipeline: CascadedDiffusionPipeline, limits: Limits, title: str) -> gr.Blocks:
    """
    The page of a cascade, to be launched.

    Args:
        title: what the page is called.
    """
    demo = Demo(pipeline, limits, stage_facts(pipeline, limits), class_names(pipeline))
    with Page(title=title, analytics_enabled=False, delete_cache=(60, 60 * MINUTES)) as page:
        page.calls = Calls(limits.max_calls)
        sizes = " to ".join(f"{stage.size}x{stage.size}" for stage in demo.stages)
        gr.Markdown(f"# {title}\nA cascade of {len(demo.stages)} stages, {sizes}.")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                panel = demo.main_panel()
            with gr.Column(scale=2, min_width=300), gr.Tabs():
                with gr.Tab("Sample"):
                    demo.sample_tab(panel)
                if any(stage.highest_level is not None for stage in demo.stages):
                    with gr.Tab("Turn s"):
                        demo.level_tab(panel)
                if len(demo.stages) > 1:
                    with gr.Tab("Your picture"):
                        demo.picture_tab(panel)
                with gr.Tab("Compare"):
                    demo.compare_tab(panel)
    return page.queue(max_size=limits.max_queue, api_open=False)


def launch(page: gr.Blocks, config: AppConfig) -> None:
    """
    Starts serving `page`, in threads of its own. It requests nothing from other machines: no fonts, no statistics.

    Raises:
        OSError: there is no such address or free port on this machine.
    """
    page.launch(
        server_name=config.host,
        server_port=config.port or None,
        share=False,
        ssr_mode=False,
        footer_links=[],
        enable_monitoring=False,
        state_session_capacity=MOST_VISITORS,
        max_file_size=config.max_upload_megabytes * 2**20,
        app_kwargs={"middleware": [Middleware(Gate, quota=Quota(config), calls=page.calls)]},
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=rendering.STYLE,
        quiet=True,
        prevent_thread_lock=True,
    )


def _buttons(start: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(start, variant="primary", min_width=120), gr.Button("Stop", min_width=80)


def _on(trigger: Callable, run: Callable, inputs: list, view: View | list, stop: gr.Button) -> None:
    """Starts `run` upon `trigger`, one at a time on the whole page, and ends it, and says so, upon `stop`."""
    outputs = [view.progress, view.pictures, view.downloads] if isinstance(view, View) else view
    event = trigger(
        _told(run),
        inputs,
        outputs,
        show_progress="minimal",
        show_progress_on=outputs[0],
        api_visibility="private",
        **SAMPLING,
    )
    stop.click(None, cancels=[event])
    # Once the run has ended: an update on its way would overwrite what the button itself said.
    event.failure(lambda: rendering.said("Stopped."), None, outputs[0], queue=False, api_visibility="private")


def _told(function: Callable) -> Callable:
    """`function`, with its errors shown as sentences on the page."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def told(*values: Any) -> Iterator[Any]:
            with _errors_as_sentences():
                yield from function(*values)
    else:

        @functools.wraps(function)
        def told(*values: Any) -> Any:
            with _errors_as_sentences():
                return function(*values)

    return told


@contextlib.contextmanager
def _errors_as_sentences() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        message = "The machine ran out of memory: choose fewer images or classes, or try again later."
        raise gr.Error(message, duration=None, print_exception=False) from error
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error(
            "Something failed on the server, whose log says what: try other settings.", duration=None
        ) from error
