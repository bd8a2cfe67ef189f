"""The benchmarks: what they compare is the same, what they print is what pages say, and all run at toy size."""

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import gpu, scaling
from benchmarks.measuring import call, compare, quartiles, rivals, summary
from benchmarks.preset_costs import count_kept_bytes
from cdm_diffusers import CascadedDDPMScheduler, CascadedUNet2DModel, SuperResolutionPipeline
from cdm_diffusers.models.costs import build_on_meta
from cdm_diffusers.presets import get_preset


ROOT = Path(__file__).parents[1]

SCALING_PAGE = (ROOT / "docs" / "scaling.md").read_text()


def benchmark(name, *arguments):
    """What `python -m benchmarks.NAME` prints."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_rivals_compute_the_same():
    networks = rivals(None, image_size=16, width=32, blocks=1)
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([3, 500]), torch.tensor([0, 999])
    with torch.no_grad():
        ours, theirs = (call(networks[name].eval(), x, t, labels) for name in ("ours", "UNet2DModel"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.std() > 0


def test_a_folder_without_guided_diffusion_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`guided_diffusion` is '.*'; it must be a folder with .*: clone it there"):
        rivals(str(tmp_path), 16, 32, 1)


def test_ratios_are_medians_within_rounds():
    figures = summary([2.0, 3.0, 8.0], [1.0, 1.0, 2.0])
    assert figures == {
        "milliseconds": 3000.0,
        "quartiles": [2500.0, 5500.0],
        "ratio": 3.0,
        "ratio_quartiles": [2.5, 3.5],
    }
    assert quartiles([5.0]) == [5.0, 5.0]


def test_rivals_take_turns_in_both_orders():
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "ab"}
    figures = compare(works, 2, clock=lambda work, device: work() or 1.0)
    assert "".join(calls) == "ba" + "ab" + "ba"
    assert figures["b"]["ratio"] == 1.0


@pytest.mark.slow("every part once, half a minute")
def test_the_gpu_module_runs_at_toy_size(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    gpu.main(["--toy", "--device", "cpu", "--minutes", "5", "--output", str(file)])
    results = json.loads(file.read_text())["results"]
    assert {result["part"] for result in results} == set(gpu.SHARES)
    assert not [result for result in results if "failed" in result or "left_out" in result]
    peers = {result["of"]: result["forward"]["ratio"] for result in results if result["part"] == "peers"}
    named = ("again", "channels_last", "bf16 weights", "compiled", "CUDA graphs", "CUDA graphs, bf16 weights")
    assert {"UNet2DModel", *(f"ours, {name}" for name in named)} == set(peers)
    assert all(0.05 < ratio < 20 for ratio in peers.values())
    printed = capsys.readouterr().out
    assert "| part | of |" in printed and printed.count("| presets |") == 2 * len(gpu.TOY_PRESETS)


def test_what_takes_too_long_is_left_out_and_the_rest_goes_on(tmp_path):
    file = tmp_path / "gpu.json"
    arguments = ["--toy", "--device", "cpu", "--output", str(file), "--parts", "rates"]
    options = gpu.parse_args(arguments)
    running = gpu.Benchmark(options)

    def fail():
        raise RuntimeError("no such kernel")

    def compile_slowly():
        try:
            time.sleep(5)
        except Exception as error:
            raise RuntimeError("the compiler failed") from error

    running.note("rates", {"of": "a"}, compile_slowly, 0.05)
    running.note("rates", {"of": "b"}, lambda: {}, -1.0)
    running.note("rates", {"of": "c"}, fail, 5.0)
    running.note("rates", {"of": "d"}, lambda: {"tflops": 1.0}, 5.0)
    said = [
        {k: v for k, v in one.items() if k not in ("part", "took")} for one in json.loads(file.read_text())["results"]
    ]
    assert said == [
        {"of": "a", "left_out": "took more than 0 s"},
        {"of": "b", "left_out": "no time left for this part"},
        {"of": "c", "failed": "RuntimeError: no such kernel"},
        {"of": "d", "tflops": 1.0},
    ]


@pytest.mark.slow("each starts processes that import torch")
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("training", ["--measure", "peers", "--sample_size", 16, "--width", 32, "--blocks", 1], 2),
        ("training", ["--measure", "channels_last", "average", "--presets", "fashion_mnist_8"], 3),
        ("data", ["--num_images", 16, "--workers", 0], 6),
        ("data", ["--measure", "stream", "--gigabytes", 0.02, "--megabytes", 13, "--workers", 0], 1),
        ("memory", ["--against", "batch", "steps", "stages", "processes", "--values", 1, 2, "--resolution", 16], 8),
        ("preset_costs", ["--measure", "fashion_mnist_8", "--batch_size", 1], 1),
        ("startup", ["--measure", "pipeline"], 1),
    ],
)
def test_a_benchmark_prints_json_lines(name, arguments, expected, tmp_path):
    rounds = [] if name == "data" and "stream" in arguments else ["--rounds", 1]
    if name == "memory":
        rounds += ["--plot", tmp_path / "plot.png"]
    lines = benchmark(name, *arguments, *rounds)
    assert len(lines) == expected and all(line["benchmark"] == name and line["torch"] for line in lines)
    assert name != "memory" or (tmp_path / "plot.png").stat().st_size > 1000


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def commands_of(page):
    """Arguments of `benchmarks.scaling`, and the table that follows."""
    found = re.findall(r"`python -m benchmarks\.scaling ([^`]*)`(?:.*\n)+?\n((?:\|.*\n)+)", page)
    return [(command.split(), text.strip()) for command, text in found]


def test_the_scaling_page_says_what_its_commands_print():
    found = commands_of(SCALING_PAGE)
    assert [arguments[0] for arguments, _ in found] == list(scaling.QUESTIONS)
    for arguments, text in found:
        (printed,) = scaling.tables(scaling.parse(arguments)).values()
        assert printed == text


def test_the_scaling_page_states_the_defaults():
    defaults = vars(scaling.parse([]))
    stated = dict(re.findall(r"^\| `--(\w+)` \| ([^|]+) \|", SCALING_PAGE, re.MULTILINE))
    assert {name: str(value) for name, value in defaults.items() if name in stated} == {
        name: value.strip() for name, value in stated.items()
    }
    assert set(defaults) - set(stated) == {"questions", "presets", "gpus"}


BUFFERS = 0.1  # GiB of the libraries, as the page says


def counted_memory(name):
    """GiB of a training step of one image as the page's first table says, without gradient checkpointing."""
    preset = get_preset(name)
    unet = build_on_meta(preset.unet)
    return (20 * unet.num_parameters() + count_kept_bytes(unet, preset.training.crop_size)) / 2**30


def available_gibibytes():
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20


@pytest.mark.slow("a training step of a network of the paper's size, a minute or more and gigabytes")
@pytest.mark.parametrize("name", scaling.PRESET_NAMES)
def test_full_size_presets_take_their_steps_within_the_memory_that_the_page_says(name):
    if available_gibibytes() < counted_memory(name) + 2:
        pytest.skip(f"{counted_memory(name):.0f} GiB are not free here")
    (line,) = benchmark("memory", "--presets", name, "--device", "cpu")
    most = counted_memory(name) + BUFFERS
    assert line["sampling"]["gibibytes"] < line["training"]["gibibytes"] < most


def test_crops_at_toy_size(tmp_path):
    """An untrained stage that adds its upsampled input: samples are near the images, and each half of a crop is."""
    arguments = replace(
        get_preset("avatars_64_to_256").unet,
        sample_size=32,
        low_res_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        num_classes=2,
        low_res_skip=True,
        patch_size=2,
    )
    torch.manual_seed(0)
    scheduler = CascadedDDPMScheduler(20, variance_type="fixed_small", prediction_type="sample")
    SuperResolutionPipeline(CascadedUNet2DModel(**asdict(arguments)), scheduler).save_pretrained(tmp_path / "stage")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((32, 32)).save(tmp_path / "images" / name / f"{number}.png")
    words = ["--train_data_dir", tmp_path / "images", "--dataset_split", "train", "--num_images", 4, "--crop_size", 16]
    words += ["--border", 2, "--times", 5, 15, "--picture", tmp_path / "edges.png"]
    (figures,) = benchmark("crops", "--stage", tmp_path / "stage", *words)
    assert figures["whole"] == pytest.approx(
        (12**2 * figures["whole_inside"] + 112 * figures["whole_at_borders"]) / 256
    )
    assert 0 < figures["crps"] < 0.05 and list(figures["power"]) == ["1 to 2", "2 to 4", "4 to 8", "8 to 16"]
    assert figures["power"]["1 to 2"] == pytest.approx(1, abs=0.1)
    assert Image.open(tmp_path / "edges.png").size == (4 * 32 * 4, 2 * 32 * 4)
