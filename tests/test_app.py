"""The web demo without a browser: what may be asked of it, what runs, what is shown, and what stays of an upload."""

import asyncio
import base64
import configparser
import io
import os
import re
import runpy
import signal
import sys
import threading
import time
import zipfile
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT
from small_cascade import SIZES, small_cascade

from cdm_diffusers import CascadedDiffusionPipeline
from cdm_diffusers.app import generation, rendering
from cdm_diffusers.app.config import AppConfig, Limits
from cdm_diffusers.app.facts import class_names, stage_facts
from cdm_diffusers.app.generation import Settings, generate
from cdm_diffusers.app.uploads import low_res_of, take_upload


@pytest.fixture(scope="module")
def cascade():
    return small_cascade()


def bytes_of(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


# ---------------------------------------------------------------------------------------------------------------------
# Facts


def test_facts_are_those_of_the_cascade(cascade):
    base, first, second = stage_facts(cascade, Limits(max_steps=30))
    assert (base.title, first.title) == ("base: 4x4", "super_res_1: 4x4 to 8x8")
    assert (base.steps, base.most_steps, second.most_steps) == (3, 20, 30)  # T = 20 and 40
    assert (base.highest_level, first.level, first.highest_level, second.level) == (None, 5, 20, None)
    assert base.scale == 1.0 and base.solver == "ancestral"
    assert stage_facts(cascade, Limits(max_steps=2))[0].steps == 2
    assert class_names(cascade) == ["T-shirt/top", "Trouser", "Ankle boot"]
    assert class_names(small_cascade(id2label=None)) == ["0", "1", "2"]
    assert class_names(small_cascade(num_classes=None)) == []


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def test_stages_appear_as_they_finish_and_are_those_of_a_call(cascade, monkeypatch):
    monkeypatch.setattr(generation, "SECONDS_BETWEEN_UPDATES", 0)
    fetched, on_step_end = threading.Semaphore(1), generation._Watched.on_step_end
    monkeypatch.setattr(
        generation._Watched, "on_step_end", lambda *arguments: fetched.acquire() and on_step_end(*arguments)
    )
    settings = Settings(
        class_labels=["Trouser", "Ankle boot"],
        num_images=2,
        seed=7,
        num_inference_steps={"base": 4},
        augmentation_levels={"super_res_1": 9},
        guidance_scale={"base": 2.0},
        scheduler={"super_res_2": "ddim", "base": "ancestral"},
    )
    updates = []
    for update in generate(cascade, settings, Limits()):
        updates.append(update)
        fetched.release()
    assert [(update.stage, update.step, update.num_steps) for update in updates] == [
        *(("base", step, 4) for step in (1, 2, 3, 4)),
        *((stage, step, 3) for stage in ("super_res_1", "super_res_2") for step in (1, 2, 3)),
    ]
    assert [len(update.images) for update in updates] == [1] * 4 + [2] * 3 + [3] * 3
    expected = cascade.with_schedulers({"super_res_2": "ddim"})
    expected.set_progress_bar_config(disable=True)
    stages = expected(
        ["Trouser", "Ankle boot"],
        num_images_per_label=2,
        num_inference_steps={"base": 4},
        augmentation_levels={"super_res_1": 9},
        guidance_scale={"base": 2.0},
        generator=torch.Generator().manual_seed(7),
        output_stages=True,
    ).stages
    for name, images in stages.items():
        assert bytes_of(updates[-1].images[name]) == bytes_of(images), name


def test_updates_that_nobody_fetches_are_not_held(cascade, monkeypatch):
    monkeypatch.setattr(generation, "SECONDS_BETWEEN_UPDATES", 0)
    updates = generate(cascade, Settings(class_labels=["Trouser"]), Limits())
    next(updates)
    with generation._sampling:  # which the run has left
        (last,) = updates
    assert (last.stage, last.step, list(last.images)) == ("super_res_2", 3, list(SIZES))


def test_rates_are_of_the_stage():
    images = {"base": [None] * 8}
    update = generation.Update("base", step=5, num_steps=20, seconds=2.0, images=images, captions=[""] * 8)
    assert (update.images_per_second, update.seconds_left) == (1.0, 6.0)
    assert "base: step 5 of 20, 1 images/s, 6 s left" in rendering.progress(update)


def test_s_changes_nothing_else():
    """Neither the base's images nor the noise: another s is nearer than another seed."""
    pipeline = CascadedDiffusionPipeline.from_pretrained(ROOT / "checkpoints" / "fashion-mnist-32")

    def images(level, seed=0):
        steps = {"base": 4, "super_res_1": 3, "super_res_2": 1}
        levels = {"super_res_1": level}
        settings = Settings(class_labels=["Bag"], seed=seed, num_inference_steps=steps, augmentation_levels=levels)
        return list(generate(pipeline, settings, Limits()))[-1].images

    some, more, other = images(100), images(400), images(100, seed=1)
    assert bytes_of(some["base"]) == bytes_of(more["base"])
    arrays = [np.stack([np.asarray(image, float) for image in of["super_res_1"]]) for of in (some, more, other)]
    assert 1 < abs(arrays[1] - arrays[0]).mean() < abs(arrays[2] - arrays[0]).mean() / 2


@pytest.mark.parametrize("conditional", [True, False])
def test_a_picture_starts_at_the_stage_of_its_size(conditional):
    cascade = small_cascade(num_classes=3 if conditional else None)
    settings = Settings(class_labels=["Trouser"] if conditional else [], num_images=2)
    for size, stages in ((4, ["super_res_1", "super_res_2"]), (8, ["super_res_2"])):
        picture = torch.rand(1, 1, size, size)
        update = list(generate(cascade, settings, Limits(), picture, consistency=True))[-1]
        assert list(update.images) == stages and len(update.images["super_res_2"]) == 2
        kept = np.asarray(update.images[stages[0]][0], float).reshape(size, 2, size, 2).mean((1, 3))
        assert abs(kept - 255 * picture[0, 0].numpy()).max() < 1


def test_captions_and_bounds_are_those_of_the_stages_that_run():
    cascade = small_cascade()
    cascade.register_modules(super_res_2_unet=small_cascade(num_classes=None).super_res_2_unet)
    settings, limits = Settings(class_labels=["Trouser", "Ankle boot"], num_images=2), Limits(max_images=4)
    captions = ["Trouser"] * 2 + ["Ankle boot"] * 2
    for size, expected in ((None, captions), (4, captions), (8, [""] * 2)):
        picture = None if size is None else torch.rand(1, 1, size, size)
        update = list(generate(cascade, settings, limits, picture))[-1]
        assert update.captions == expected and len(update.images["super_res_2"]) == len(expected)
    with pytest.raises(ValueError, match="3 for each of 2 classes, 6 in all"):
        generate(cascade, Settings(class_labels=["Trouser", "Ankle boot"], num_images=3), limits)


def test_steps_that_a_cascade_was_saved_with_are_bounded_too(cascade):
    settings, limits = Settings(class_labels=["Trouser"], num_inference_steps={"base": 2}), Limits(max_steps=2)
    with pytest.raises(ValueError, match="`num_inference_steps` of stage `super_res_1` is 3; it must be at most 2"):
        generate(cascade, settings, limits)
    settings = Settings(class_labels=["Trouser"], num_inference_steps={"super_res_2": 2})
    assert list(generate(cascade, settings, limits, torch.rand(1, 1, 8, 8)))  # the others do not run


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"num_images": 9}, "`num_images` is 9 for each of 2 classes, 18 in all; it must be at most 16 in all"),
        (
            {"num_inference_steps": {"base": 101}},
            "`num_inference_steps` of stage `base` is 101; it must be at most 100",
        ),
        ({"class_labels": []}, "`class_labels` is empty; it must have at least one class: choose one."),
        (
            {"augmentation_levels": {"super_res_1": 21}},
            "`augmentation_level` of stage `super_res_1` is 21; it must be",
        ),
        ({"scheduler": {"base": "ddim"}, "num_inference_steps": {"base": 50}}, "DDIMScheduler takes"),
    ],
)
def test_what_is_too_much_is_refused(cascade, chosen, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        list(generate(cascade, Settings(**{"class_labels": ["Trouser", "Ankle boot"], **chosen}), Limits()))


@pytest.mark.parametrize(("name", "value"), [("seed", None), ("seed", -1), ("seed", 2**32), ("num_images", 0)])
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}; it must be "):
        Settings(**{name: value})


def test_time_is_bounded(cascade):
    settings = Settings(class_labels=["Trouser"], num_inference_steps={"base": 20})
    with pytest.raises(ValueError, match=r"longer than 0\.001 seconds and was stopped: choose fewer steps or images"):
        list(generate(cascade, settings, Limits(max_seconds=0.001)))


def test_closing_ends_sampling_and_lets_the_next_in(cascade, monkeypatch):
    monkeypatch.setattr(generation, "SECONDS_BETWEEN_UPDATES", 0)
    calls, network = [], cascade.base_unet
    handle = network.register_forward_pre_hook(lambda *_: calls.append(time.sleep(0.02)))
    try:
        settings = Settings(class_labels=["Trouser"], num_inference_steps={"base": 20})
        first, second = (generate(cascade, settings, Limits()) for _ in range(2))
        next(first)
        assert not generation._sampling.acquire(blocking=False)  # one at a time
        waiting = threading.Thread(target=list, args=(second,))
        waiting.start()
        first.close()
        waiting.join(30)
        assert not waiting.is_alive()
    finally:
        handle.remove()
    assert 20 < len(calls) < 30  # all of the second, a few of the first


def test_sampling_ends_with_the_server_and_may_begin_again(cascade, monkeypatch):
    """In the middle, and that of those who wait."""
    monkeypatch.setattr(generation, "_closing", threading.Event())
    calls, settings = [], Settings(class_labels=["Trouser"], num_inference_steps={"base": 20})
    handle = cascade.base_unet.register_forward_pre_hook(lambda *_: calls.append(time.sleep(0.02)))
    try:
        for _ in range(2):
            with generation.ending_sampling(patience=60):
                first, second = (generate(cascade, settings, Limits()) for _ in range(2))
                next(first)
                waiting = threading.Thread(target=pytest.raises, args=(ValueError, list, second))
                waiting.start()
            assert "super_res_2" not in {update.stage for update in first}
            waiting.join(30)
            assert not waiting.is_alive()
            with pytest.raises(ValueError, match="The server is stopping"):
                list(generate(cascade, settings, Limits()))
    finally:
        handle.remove()
    assert 2 <= len(calls) < 2 * 20  # none of the second, and a few of the first


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def shown(html: str) -> list[Image.Image]:
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]


def test_images_in_the_making_are_small_and_finished_ones_encoded_once(monkeypatch):
    encoded, png = [], rendering.png
    monkeypatch.setattr(rendering, "png", lambda image: encoded.append(image.width) or png(image))
    gallery, images = rendering.Gallery([]), {"base": [Image.new("L", (128, 128))]}
    for stage, step, widths in (
        ("base", 1, [64]),
        ("super_res_1", 1, [128, 64]),
        ("super_res_1", 2, [128, 64]),
        ("super_res_1", 3, [128, 256]),
    ):
        images[stage] = images.get(stage) or [Image.new("L", (256, 256))]
        html = gallery.show(generation.Update(stage, step, 3, 1.0, images, ["Bag"]))
        assert [image.width for image in shown(html)] == widths
        assert html.count('<section class="cdm-large">') == len(widths)
    assert encoded == [64, 128, 64, 64, 256]
    assert rendering.preview(Image.new("L", (127, 127))).width == 127


def test_pictures_and_downloads_carry_the_images(cascade):
    settings = Settings(class_labels=["T-shirt/top", "Trouser"], num_images=2)
    update = list(generate(cascade, settings, Limits()))[-1]
    images, captions = update.images, update.captions
    assert captions == ["T-shirt/top"] * 2 + ["Trouser"] * 2
    html = rendering.Gallery(stage_facts(cascade, Limits())).show(update)
    assert bytes_of(shown(html)) == [image.tobytes() for of_stage in images.values() for image in of_stage]
    assert 'alt="Trouser (super_res_2: 8x8 to 16x16)"' in html
    grid, archive = re.findall(r'href="data:[^;]+;base64,([^"]+)"', rendering.downloads(images, captions))
    assert Image.open(io.BytesIO(base64.b64decode(grid))).size == (110 + 2 * (3 * 64 + 8), 2 * 72)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(archive))) as packed:
        assert len(packed.namelist()) == 12 and "super_res_2/02-Trouser.png" in packed.namelist()
        last = Image.open(io.BytesIO(packed.read("super_res_2/02-Trouser.png")))
        assert last.tobytes() == images["super_res_2"][2].tobytes()


def test_what_is_shown_is_escaped(cascade):
    image = Image.new("L", (4, 4))
    html = rendering.section("<b>", [image], ['<script>"'], image.width)
    assert "<script>" not in html and "&lt;script&gt;&quot;" in html
    assert "<b>" not in html + rendering.said("<b>")


# ---------------------------------------------------------------------------------------------------------------------
# Uploads


def save(folder, image: Image.Image, name: str = "picture.png", **options):
    image.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize(
    ("mode", "channels", "name"),
    [("RGB", 3, "x.jpg"), ("RGBA", 1, "x.png"), ("L", 3, "x.webp"), ("P", 1, "x.gif"), ("I;16", 1, "x.png")],
)
def test_a_picture_becomes_what_a_stage_takes_and_its_file_goes(tmp_path, mode, channels, name):
    file = save(tmp_path, Image.new(mode, (40, 24)), name)
    pixels = take_upload(file, 8, channels, Limits())
    assert pixels.shape == (channels, 8, 8) and pixels.dtype == torch.uint8
    assert not list(tmp_path.iterdir())
    assert low_res_of(pixels, 4).shape == (1, channels, 4, 4)
    assert low_res_of(pixels, 4).max() == (1.0 if mode == "RGBA" else 0.0)  # transparent pixels are white


def test_low_res_is_the_average_of_the_picture(tmp_path):
    ramp = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    pixels = take_upload(save(tmp_path, ramp), 8, 1, Limits())
    expected = np.asarray(ramp, float).reshape(4, 2, 4, 2).mean((1, 3)) / 255
    assert np.allclose(low_res_of(pixels, 4)[0, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no picture", "cannot be read as a picture; it must be one of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "cannot be read as a picture"),
        ((3000, 1000), r"has 3000x1000 pixels; it must have at most 2 million: shrink it first"),
        ((7, 20), "has 7x20 pixels; it must have at least 8x8"),
        ("cut", "cannot be read as a picture"),
        (b"x" * 1_250_000, r"has 1\.2 megabytes; it must have at most 1\."),
    ],
)
def test_what_is_no_picture_is_a_sentence_and_its_file_goes(tmp_path, content, said):
    file = tmp_path / "picture.png"
    if isinstance(content, tuple):
        save(tmp_path, Image.new("L", content))
    elif content == "cut":
        save(tmp_path, Image.effect_noise((50, 50), 50))
        file.write_bytes(file.read_bytes()[:500])
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        take_upload(file, 8, 1, Limits(max_upload_megabytes=1, max_upload_megapixels=2))
    assert not list(tmp_path.iterdir())


def test_broken_metadata_and_a_file_that_is_gone_are_sentences(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.5  # orientation, resolution
    file = save(tmp_path, Image.new("L", (8, 8)), "picture.jpg", exif=exif.tobytes())
    content = file.read_bytes()
    file.write_bytes(content.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x01"))  # a byte in place of a fraction
    with pytest.raises(ValueError, match="The file cannot be read as a picture"):
        take_upload(file, 8, 1, Limits())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"The file is gone, .*: upload it again"):
        take_upload(file, 8, 1, Limits())


# ---------------------------------------------------------------------------------------------------------------------
# The page


def labels_of(page) -> list[str]:
    return [getattr(block, "label", None) for block in page.blocks.values()]


def test_stopping_is_said_after_the_run_has_ended():
    """In answer to the click itself, an update on its way would overwrite it."""
    pytest.importorskip("gradio", reason="gradio is not installed; the extra `app` has it")
    from cdm_diffusers.app.page import build_page

    fns = build_page(small_cascade(), Limits(), "A cascade").fns
    stops = [fn for fn in fns.values() if fn.cancels]
    ended = [index for stop in stops for index in stop.cancels]
    assert [fns[index].concurrency_id for index in ended] == len(stops) * ["sampling"]
    for index in ended:
        (said,) = [fn for fn in fns.values() if fn.trigger_after == index]
        assert said.trigger_only_on_failure and "Stopped." in said.fn()
    assert all(stop.outputs == [] for stop in stops)


def test_the_page_is_made_of_facts():
    pytest.importorskip("gradio", reason="gradio is not installed; the extra `app` has it")
    from cdm_diffusers.app.page import build_page

    page = build_page(small_cascade(), Limits(max_queue=3), "A cascade")
    labels = labels_of(page)
    assert not page.analytics_enabled and page._queue.max_size == 3
    assert [labels.count(name) for name in ("Sample", "Turn s", "Your picture", "Compare")] == [1, 1, 1, 1]
    assert labels.count("s") == 2 and labels.count("Solver") == 2 * len(SIZES)  # A and B
    sampling = [fn for fn in page.fns.values() if fn.concurrency_id == "sampling"]
    assert len(sampling) == 5 and {fn.concurrency_limit for fn in sampling} == {1}
    assert {fn.api_visibility for fn in page.fns.values()} == {"private"}

    page = build_page(small_cascade(num_stages=1, num_classes=None), Limits(), "A base")
    labels = labels_of(page)
    assert not {"Turn s", "Your picture", "Classes", "s"} & set(labels) and "Compare" in labels


def test_no_control_takes_a_file_from_an_address(monkeypatch):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed; the extra `app` has it")
    from cdm_diffusers.app.page import build_page

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", mock.AsyncMock(side_effect=OSError))
    page = build_page(small_cascade(), Limits(), "A cascade")
    file = {"path": "http://example.org/large.png", "meta": {"_type": "gradio.FileData"}}
    controls = [(fn, place) for fn in page.fns.values() for place in range(len(fn.inputs))]
    assert len(controls) > 50
    for fn, place in controls:
        posted = [None] * place + [[file] if place % 2 else file] + [None] * (len(fn.inputs) - place - 1)
        with pytest.raises(gradio.Error, match="A file must be uploaded; none is fetched from a URL"):
            asyncio.run(page.preprocess_data(fn, posted, None))


def test_what_controls_refuse_is_no_traceback():
    gradio = pytest.importorskip("gradio", reason="gradio is not installed; the extra `app` has it")
    from cdm_diffusers.app.page import build_page

    page = build_page(small_cascade(), Limits(), "A cascade")
    sample = next(fn for fn in page.fns.values() if fn.concurrency_id == "sampling")
    for place, control in enumerate(sample.inputs):
        posted = [other.value for other in sample.inputs]
        posted[place] = -3
        if isinstance(control, gradio.Slider | gradio.Dropdown):
            with pytest.raises(gradio.Error) as refusal:
                asyncio.run(page.preprocess_data(sample, posted, None))
            assert not refusal.value.print_exception
        else:  # the seed, which the settings check
            assert -3 in asyncio.run(page.preprocess_data(sample, posted, None))


def test_calls_end_when_their_visitor_has_made_newer_ones(monkeypatch):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed; the extra `app` has it")
    from cdm_diffusers.app.gate import CALL
    from cdm_diffusers.app.page import build_page

    page = build_page(small_cascade(), Limits(max_calls=2), "A cascade")
    monkeypatch.setattr(gradio.Blocks, "process_api", mock.AsyncMock(return_value={"data": []}))
    requests = [SimpleNamespace(headers={CALL: str(page.calls.add("1.2.3.4"))}) for _ in range(3)]
    for request in (*requests[1:], None, SimpleNamespace(headers={})):
        assert asyncio.run(page.process_api(0, [], request=request)) == {"data": []}
    with pytest.raises(gradio.Error, match="newer calls took its place: 2 count from one address"):
        asyncio.run(page.process_api(0, [], request=requests[0]))


@pytest.mark.parametrize(
    ("error", "said", "is_logged"),
    [
        (ValueError("`s` is 9; it must be less."), "`s` is 9; it must be less.", False),
        (torch.OutOfMemoryError("CUDA"), "ran out of memory: choose fewer images", False),
        (RuntimeError("shape"), "Something failed on the server", True),
    ],
)
def test_every_error_is_a_sentence(error, said, is_logged):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed; the extra `app` has it")
    from cdm_diffusers.app.page import _told

    def fail():
        raise error
        yield

    with pytest.raises(gradio.Error, match=said) as refusal:
        list(_told(fail)())
    assert refusal.value.print_exception == is_logged


def test_each_setting_of_a_comparison_is_bounded(cascade, monkeypatch):
    pytest.importorskip("gradio", reason="gradio is not installed; the extra `app` has it")
    from cdm_diffusers.app.page import Demo

    limits = Limits(max_images=2)
    demo = Demo(cascade, limits, stage_facts(cascade, limits), class_names(cascade))
    two, three = (Settings(class_labels=["Trouser"], num_images=count) for count in (2, 3))
    progress, *_, downloads = list(demo.side_by_side(two, two))[-1]
    assert "4 images in" in progress
    archive = re.search(r'href="data:application/zip;base64,([^"]+)"', downloads)[1]
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(archive))) as packed:
        assert len(packed.namelist()) == 2 * 2 * len(SIZES) and "B_super_res_2/01-Trouser.png" in packed.namelist()
    monkeypatch.setattr(generation._Watched, "run", lambda _: pytest.fail("sampled A before B was looked at"))
    with pytest.raises(ValueError, match="`num_images` is 3 for each of 1 classes"):
        list(demo.side_by_side(two, three))


@pytest.fixture
def own_process():
    """What `serve` sets for its process is put back."""
    handler = signal.getsignal(signal.SIGTERM)
    with mock.patch.dict(os.environ):
        yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the server's own
def test_an_address_of_another_machine_is_named(own_process):
    pytest.importorskip("gradio", reason="gradio is not installed; the extra `app` has it")
    from cdm_diffusers.app.serve import serve

    config = AppConfig(pipeline=str(ROOT / "checkpoints" / "fashion-mnist-32"), host="192.0.2.1", port=7861)
    with pytest.raises(
        OSError, match=r"`host` is '192\.0\.2\.1' and `port` is 7861; they must be .*: Cannot find empty"
    ):
        serve(config)


def test_without_gradio_the_extra_is_named(capsys, monkeypatch, own_process):
    from cdm_diffusers.commands.main import main

    monkeypatch.delitem(sys.modules, "cdm_diffusers.app.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit):
        main(["app", "nothing"])
    assert capsys.readouterr().err == 'cdm app: error: gradio is not installed: pip install "cdm-diffusers[app]".\n'


def test_the_space_needs_what_the_package_needs(monkeypatch):
    space, setup = ROOT / "examples" / "space", configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = setup["options"]["install_requires"].split("\n")
    assert (space / "requirements.txt").read_text().splitlines() == [line for line in required if line]
    version = re.search(r"sdk_version: (.+)", (space / "README.md").read_text())[1]
    assert f"gradio=={version}" in (ROOT / "constraints.txt").read_text().splitlines()
    served = []
    monkeypatch.setattr("cdm_diffusers.app.serve.serve", served.append)
    monkeypatch.setenv("PIPELINE", "me/my-cascade")
    runpy.run_path(str(space / "app.py"))
    assert [(config.pipeline, config.host, config.port) for config in served] == [("me/my-cascade", "0.0.0.0", 7860)]


def test_options():
    config = AppConfig(pipeline="x", max_steps=7)
    assert (config.host, config.port, config.max_steps) == ("127.0.0.1", 7860, 7)
    with pytest.raises(ValueError, match="`port` is 65536; it must be between 0 and 65535"):
        AppConfig(pipeline="x", port=65536)
