"""The web demo as its visitors have it: served by the command, in a real browser, at a phone's width and a desk's."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import ROOT

from cdm_diffusers import CascadedDiffusionPipeline


pytest.importorskip("gradio", reason="gradio is not installed; the extra `app` has it")
selenium = pytest.importorskip("selenium", reason="selenium is not installed; the extra `browser` has it")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow("starts the demo and a browser, and samples in them"),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium or no chromedriver on this machine"),
]

from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402


PIPELINE = ROOT / "checkpoints" / "fashion-mnist-32"
PATIENCE = 120  # seconds, on a busy machine
MAX_UPLOADS = 8  # of all tests together, which come from one address


@contextmanager
def serving(pipeline: Path, folder: Path, *options: str) -> Iterator[str]:
    """The address of the demo, whose temporary files are in `folder`. It is terminated at the end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "cdm_diffusers", "app", str(pipeline), "--port", "0", *options]
    with open(folder / "errors", "w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"{pipeline.name}: http://127.0.0.1:"), (folder / "errors").read_text()[-3000:]
        yield line.split()[1]
    finally:
        process.terminate()
        process.wait(30)
    assert [path.name for path in folder.iterdir() if path.name.startswith("cdm-app-")] == []
    assert process.returncode == 0
    assert not re.search("Traceback|terminate called", (folder / "errors").read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, folder of temporary files) of the demo."""
    folder = tmp_path_factory.mktemp("served")
    with serving(PIPELINE, folder, "--max_upload_megabytes", "1", "--max_uploads", str(MAX_UPLOADS)) as address:
        yield address, folder


# (title, sources of images) of the stages that are on view
SECTIONS = """return [...document.querySelectorAll('.cdm-stages section')].filter(section => section.offsetParent)
.map(section => [section.querySelector('h4').innerText, [...section.querySelectorAll('img')].map(img => img.src)])"""


def decoded(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


class Visitor:
    """A browser at the demo."""

    def __init__(self, address: str, folder: Path, width: int):
        self.address = address
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(address)
        self.wait(lambda: self.shown("button.primary"))

    def wait(self, condition):
        """What `condition` returns, once it is true; elements that the page has replaced are looked up anew."""
        patient = WebDriverWait(self.driver, PATIENCE, 0.05, [StaleElementReferenceException])
        return patient.until(lambda _: condition(), "The page shows something else.")

    def shown(self, selector: str, text: str | None = None) -> list:
        elements = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return [
            item for item in elements if item.is_displayed() and text in (None, item.text.strip().partition("\n")[0])
        ]

    def click(self, selector: str, text: str | None = None) -> None:
        element = self.wait(lambda: self.shown(selector, text))[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def tab(self, name: str) -> None:
        self.click("button[role=tab]", name)
        self.wait(lambda: self.shown("button[role=tab][aria-selected=true]", name))

    def upload(self, file: Path) -> None:
        self.wait(lambda: self.driver.find_elements(By.CSS_SELECTOR, "#upload input[type=file]"))[0].send_keys(
            str(file)
        )

    def type(self, label: str, value: int) -> None:
        field = self.wait(lambda: self.shown(f"input[aria-label='{label}']"))[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.TAB)

    def said(self) -> str:
        return " ".join(item.text for item in self.shown(".cdm-progress"))

    def finish(self) -> dict[str, list[Image.Image]]:
        """The images of each stage, by its title, of the run that was started."""
        self.wait(lambda: self.shown(".cdm-downloads a"))
        found = self.driver.execute_script(SECTIONS)
        return {title: [decoded(source) for source in sources] for title, sources in found}

    def requests(self) -> set[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}


@pytest.fixture
def visit(server, tmp_path):
    """Makes visitors. At the end, none has asked another machine for anything, nor met an error of the page's own."""
    visitors = []

    def enter(width: int = 1440) -> Visitor:
        visitors.append(Visitor(server[0], tmp_path, width))
        return visitors[-1]

    yield enter
    try:
        for visitor in visitors:
            elsewhere = {url for url in visitor.requests() if not url.startswith((server[0], "data:", "blob:"))}
            assert elsewhere == set()
            log = [entry["message"] for entry in visitor.driver.get_log("browser") if entry["level"] == "SEVERE"]
            assert [message for message in log if "/upload" not in message and " Response" not in message] == []
    finally:
        for visitor in visitors:
            visitor.driver.quit()


def post_half(address: str) -> None:
    """A visitor who goes away in the middle of an upload."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    head = (
        "POST /gradio_api/upload HTTP/1.1\r\nHost: demo\r\nContent-Length: 500000\r\n"
        "Content-Type: multipart/form-data; boundary=line\r\n\r\n--line\r\n"
        'Content-Disposition: form-data; name="files"; filename="half.png"\r\n\r\n'
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + bytes(200_000))
        time.sleep(1)


def temporary_files(server) -> list[Path]:
    """And folders, which are named by a SHA-256 of what is in them."""
    return [path for path in server[1].glob("cdm-app-*/**/*") if path.is_file() or len(path.name) == 64]


@pytest.mark.parametrize("width", [390, 1440])
def test_a_sample_is_what_the_pipeline_makes(visit, width, tmp_path):
    visitor = visit(width)
    assert visitor.driver.execute_script("return document.documentElement.scrollWidth") <= width
    visitor.click("button.primary", "Sample")
    seen = set()
    visitor.wait(lambda: seen.add(visitor.said()) or visitor.shown(".cdm-downloads a"))
    assert any(re.match(r"base: step \d+ of 25, [\d.]+ images/s, \d+ s left", said) for said in seen), seen
    stages = visitor.finish()
    pipeline = CascadedDiffusionPipeline.from_pretrained(PIPELINE)
    pipeline.set_progress_bar_config(disable=True)
    classes = ["T-shirt/top", "Trouser", "Pullover", "Dress"]
    expected = pipeline(
        classes, num_images_per_label=2, generator=torch.Generator().manual_seed(0), output_stages=True
    ).stages
    titles = ["base: 8x8", "super_res_1: 8x8 to 16x16", "super_res_2: 16x16 to 32x32"]
    assert list(stages) == titles
    for title, images in zip(titles, expected.values(), strict=True):
        assert [image.tobytes() for image in stages[title]] == [image.tobytes() for image in images]

    visitor.click(".cdm-downloads a", "Grid (PNG)")
    visitor.wait(lambda: (tmp_path / "samples.png").is_file())
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (110 + 2 * (3 * 64 + 8), 4 * 72)
    assert visitor.driver.execute_script("return document.documentElement.scrollWidth") <= width
    for name in ("Turn s", "Your picture", "Compare"):  # all within reach
        visitor.tab(name)


def test_turning_s_changes_the_stage_that_takes_it(visit):
    visitor = visit()
    visitor.tab("Turn s")
    visitor.click("button.primary", "Sample at s")
    before = visitor.finish()
    slider = visitor.shown("input[type=range][max='4000']")[0]
    ActionChains(visitor.driver).move_to_element(slider).click().perform()  # to the middle
    visitor.wait(lambda: not visitor.shown(".cdm-downloads a"))
    after = visitor.finish()
    same = [[a.tobytes() == b.tobytes() for a, b in zip(before[title], after[title], strict=True)] for title in before]
    assert all(same[0]) and not any(same[1]) and not any(same[2])


def test_a_picture_is_enlarged_and_not_kept(visit, server, tmp_path):
    Image.effect_mandelbrot((300, 200), (-3, -2.5, 2, 2.5), 50).convert("RGB").save(tmp_path / "mine.png")
    visitor = visit()
    visitor.tab("Your picture")
    visitor.click("button.primary", "Enlarge")
    visitor.wait(lambda: "There is no picture yet, or no longer: upload one first." in toasts(visitor))
    visitor.upload(tmp_path / "mine.png")
    visitor.wait(lambda: len(visitor.shown(".cdm-stages section")) == 2)
    assert temporary_files(server) == []
    visitor.click("button.primary", "Enlarge")
    stages = visitor.finish()
    assert [len(images) for title, images in stages.items() if title.startswith("super_res")] == [8, 8]
    assert temporary_files(server) == []


def toasts(visitor: Visitor) -> str:
    return " ".join(item.text for item in visitor.shown(".toast-body"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text.png", b"no picture", "The file cannot be read as a picture; it must be one of PNG, JPEG"),
        ("large.png", b"x" * 1_500_000, "exceed the maximum allowed size of 1.0 Mb"),
    ],
)
def test_what_is_no_picture_is_a_sentence_and_not_kept(visit, server, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    visitor = visit(390)
    visitor.tab("Your picture")
    visitor.upload(tmp_path / name)
    visitor.wait(lambda: said in toasts(visitor))
    assert temporary_files(server) == []


def test_an_upload_that_breaks_off_leaves_nothing(server):
    post_half(server[0])
    time.sleep(1)
    assert temporary_files(server) == []


def test_uploads_are_bounded_in_a_sentence(visit, server, tmp_path):
    visitor = visit(390)
    visitor.tab("Your picture")
    for number in range(MAX_UPLOADS + 1):
        Image.new("L", (20, 20), 10 * number).save(tmp_path / "mine.png")
        visitor.upload(tmp_path / "mine.png")
        time.sleep(1)
    visitor.wait(lambda: f"This page takes {MAX_UPLOADS} pictures" in toasts(visitor))
    assert temporary_files(server) == []


def test_two_visitors_at_once(visit):
    first, second = visit(), visit(390)
    for visitor, seed in ((first, 1), (second, 2)):
        visitor.type("Seed", seed)
    for visitor in (first, second):
        visitor.click("button.primary", "Sample")
    last = [visitor.finish()["super_res_2: 16x16 to 32x32"] for visitor in (first, second)]
    assert [len(images) for images in last] == [8, 8]
    assert [image.tobytes() for image in last[0]] != [image.tobytes() for image in last[1]]


def test_two_settings_side_by_side(visit):
    visitor = visit(390)
    visitor.tab("Compare")
    visitor.click("button.primary", "Compare")
    visitor.wait(lambda: visitor.shown(".cdm-downloads a"))
    a, b = (item.rect for item in visitor.shown(".cdm-stages"))
    assert a["y"] == b["y"] and a["x"] + a["width"] <= b["x"] and b["x"] + b["width"] <= 390


def test_stop_ends_sampling(visit):
    visitor = visit()
    visitor.type("number input for Images of each class (at most 16 in all)", 4)
    visitor.click("button.label-wrap", "base: 8x8")
    visitor.wait(lambda: visitor.shown("input[aria-label='number input for Steps']"))
    visitor.type("number input for Steps", 100)  # longer than a busy browser takes to click
    visitor.click("button.primary", "Sample")
    visitor.wait(lambda: "of 100" in visitor.said())
    visitor.click("button", "Stop")
    visitor.wait(lambda: visitor.said() == "Stopped.")
    time.sleep(1)
    assert visitor.said() == "Stopped." and not visitor.shown(".cdm-downloads a")
    visitor.type("number input for Steps", 5)
    visitor.click("button.primary", "Sample")
    assert len(visitor.finish()) == 3


def test_a_colour_cascade_and_a_server_that_is_ended_while_it_samples(tmp_path, monkeypatch):
    """Pictures of 256 pixels in the end; the second time the server ends in the middle, without a word."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # whose threads an interpreter that ends too early trips over
    with ExitStack() as after, serving(ROOT / "checkpoints" / "avatars-256", tmp_path) as address:
        visitor = Visitor(address, tmp_path, 390)
        after.callback(visitor.driver.quit)  # once the server has ended
        visitor.click("button.primary", "Sample")
        sizes = [{image.size for image in images} for images in visitor.finish().values()]
        assert sizes == [{(16, 16)}, {(64, 64)}, {(256, 256)}]
        visitor.click("button.primary", "Sample")
        visitor.wait(lambda: "super_res_2" in visitor.said())
