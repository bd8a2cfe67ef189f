"""Habits of Diffusers' users: what docs/diffusers_habits.md says of each, row by row."""

import ast
import json
import re
from pathlib import Path
from typing import NamedTuple

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, QuantoConfig, SchedulerMixin, TorchAoConfig
from diffusers.utils import is_xformers_available
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from small_cascade import small_cascade

from cdm_diffusers import (
    CascadedDDPMScheduler,
    CascadedDiffusionPipeline,
    CascadedUNet2DModel,
    ContinuousDDPMScheduler,
    SuperResolutionPipeline,
)


ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "diffusers_habits.md").read_text()


class Row(NamedTuple):
    habit: str
    verdict: str
    note: str
    test: str

    @property
    def names(self) -> list[str]:
        """What the habit puts into code."""
        return re.findall(r"`([^`]+)`", self.habit)


LINES = [line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith("|---")]
ROWS = [
    row for row in (Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in LINES) if row[1] != "here"
]
TESTS = {
    node.name
    for file in (ROOT / "tests").glob("test_*.py")
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.FunctionDef)
}
SCHEDULERS = [(name, row.verdict) for row in ROWS if row.test == "`test_schedulers_of_the_page`" for name in row.names]


@pytest.fixture(scope="module")
def cascade() -> CascadedDiffusionPipeline:
    return small_cascade()


@pytest.fixture(scope="module")
def folder(cascade, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "cascade"
    cascade.save_pretrained(folder)
    return folder


def tensors(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe([0, 2], generator=torch.Generator().manual_seed(0), output_type="pt").images


def attending_unet() -> CascadedUNet2DModel:
    torch.manual_seed(0)
    unet = CascadedUNet2DModel(
        8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_resolutions=(4,),
        attention_head_dim=8,
    )  # fmt: skip
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return unet.eval()


@torch.no_grad()
def output_of(unet) -> torch.Tensor:
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return unet(sample, torch.tensor([3, 700])).sample


def assert_similar(output: torch.Tensor, expected: torch.Tensor):
    """As int8 weights change it: by less than a hundredth, but by something."""
    assert 0 < (output - expected).norm() < 0.03 * expected.norm()


# ---------------------------------------------------------------------------------------------------------------------
# The page


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.habit)
def test_each_row_has_its_test(row):
    assert row.verdict in ("works", "refused", "not applicable", "not tried")
    assert row.test.strip("`") in TESTS


def test_the_page_is_whole():
    known = " ".join(row.habit for row in ROWS)
    schedulers = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    methods = {name for kind in (CascadedDiffusionPipeline, CascadedUNet2DModel) for name in dir(kind)}
    expected = schedulers | {name for name in methods if re.match("(enable_|fuse_|from_pipe|set_attn)", name)}
    assert {name for name in expected if not re.search(rf"\b{name}\b", known)} == set()


# ---------------------------------------------------------------------------------------------------------------------
# Loading and saving


def test_sharded_files(cascade, tmp_path):
    cascade.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list((tmp_path / "base_unet").glob("*-of-*.safetensors"))) > 1
    assert torch.equal(tensors(CascadedDiffusionPipeline.from_pretrained(tmp_path)), tensors(cascade))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_low_cpu_mem_usage(cascade, folder, low_cpu_mem_usage):
    loaded = CascadedDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(tensors(loaded), tensors(cascade))


def test_device_maps(cascade, folder):
    for device_map in ("cpu", "balanced"):
        loaded = CascadedDiffusionPipeline.from_pretrained(folder, device_map=device_map)
        torch.testing.assert_close(tensors(loaded).cpu(), tensors(cascade), rtol=0, atol=1e-4)
    unet = CascadedUNet2DModel.from_pretrained(folder, subfolder="base_unet", device_map="auto")
    assert set(unet.hf_device_map) == {""}


def test_from_pipe(cascade):
    for pipe in (CascadedDiffusionPipeline.from_pipe(cascade), CascadedDiffusionPipeline(**cascade.components)):
        assert pipe.base_unet is cascade.base_unet
    again = CascadedDiffusionPipeline.from_pipe(cascade)
    assert again.config.id2label == cascade.config.id2label
    assert torch.equal(tensors(again), tensors(cascade))


@pytest.mark.parametrize("other", [SuperResolutionPipeline, DDPMPipeline])
def test_from_pipe_of_another_class(cascade, other):
    with pytest.raises(ValueError, match=r"expected .*'scheduler', 'unet'"):
        other.from_pipe(cascade)
    with pytest.raises(ValueError, match=r"expected .*'base_scheduler', 'base_unet'"):
        CascadedDiffusionPipeline.from_pipe(cascade.stage_pipeline("super_res_1"))


# ---------------------------------------------------------------------------------------------------------------------
# Memory and speed


def test_sequential_offloading(cascade, folder):
    loaded = CascadedDiffusionPipeline.from_pretrained(folder)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="requires accelerator"):
            loaded.enable_sequential_cpu_offload()
        pytest.skip("the hooks of accelerate need an accelerator")
    loaded.enable_sequential_cpu_offload()
    assert next(loaded.base_unet.parameters()).is_meta
    torch.testing.assert_close(tensors(loaded).cpu(), tensors(cascade), rtol=0, atol=1e-4)


def test_compiling_in_place(cascade, folder):
    loaded = CascadedDiffusionPipeline.from_pretrained(folder)
    loaded.base_unet.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(tensors(loaded), tensors(cascade), rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "unipc", "heun", "ipndm"])
def test_default_device(solver):
    pipe = small_cascade().with_schedulers(dict.fromkeys(("base", "super_res_1"), solver))
    expected = tensors(pipe)
    with torch.device("meta"):
        assert torch.equal(tensors(pipe), expected)
        for kind in (CascadedDDPMScheduler, ContinuousDDPMScheduler):
            scheduler = kind(num_train_timesteps=20)
            scheduler.set_timesteps(5, stop_at=2, start_at=15)
            assert scheduler.timesteps.device.type == "cpu" and len(scheduler.timesteps) > 1


def test_xformers_is_asked_for():
    if is_xformers_available():
        pytest.skip("xformers is installed; what happens with it was not tried")
    with pytest.raises(ModuleNotFoundError, match="xformers"):
        attending_unet().enable_xformers_memory_efficient_attention()


def test_methods_without_effect(cascade):
    expected = tensors(cascade)
    cascade.enable_attention_slicing()
    assert torch.equal(tensors(cascade), expected)
    unet = attending_unet()
    expected, names = output_of(unet), set(unet.state_dict())
    unet.fuse_qkv_projections()
    assert torch.equal(output_of(unet), expected) and set(unet.state_dict()) == names


def test_methods_that_are_not_there(cascade):
    absent = [name.removeprefix("pipe.") for row in ROWS if "not there" in row.note for name in row.names]
    assert len(absent) == 7
    assert [name for name in absent if hasattr(cascade, name) or hasattr(cascade.base_unet, name)] == []


def test_hardware_that_is_not_there():
    unet = attending_unet()
    if not diffusers.utils.is_torch_npu_available():
        with pytest.raises(ImportError, match="npu"):
            unet.enable_npu_flash_attention()
    with pytest.raises(RuntimeError, match=r"torch\.distributed must be available and initialized"):
        unet.enable_parallelism(config=None)
    assert hasattr(unet, "enable_xla_flash_attention")


# ---------------------------------------------------------------------------------------------------------------------
# Adapters and quantization


def with_lora() -> CascadedUNet2DModel:
    unet = attending_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "first")
    return unet


def test_lora_is_fused_weighted_and_unloaded():
    plain = output_of(attending_unet())
    unet = with_lora()
    adapted = output_of(unet)
    assert (adapted - plain).abs().max() > 1e-3
    unet.disable_lora()
    torch.testing.assert_close(output_of(unet), plain)
    unet.enable_lora()
    torch.testing.assert_close(output_of(unet), adapted)
    unet.fuse_lora()
    torch.testing.assert_close(output_of(unet), adapted, rtol=1e-4, atol=1e-5)
    unet.unfuse_lora()
    unet.set_adapters("first", 0.0)
    torch.testing.assert_close(output_of(unet), plain, rtol=1e-4, atol=1e-5)
    unet.delete_adapters("first")
    torch.testing.assert_close(output_of(unet), plain, rtol=1e-4, atol=1e-5)
    unet = with_lora()
    unet.unload_lora()
    assert not any("lora" in name for name in unet.state_dict())
    torch.testing.assert_close(output_of(unet), plain)


def test_lora_is_swapped_in_place(tmp_path):
    other = with_lora()
    for name, parameter in other.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    other.save_lora_adapter(tmp_path / "other", "first")
    with_lora().save_lora_adapter(tmp_path / "first", "first")
    unet = attending_unet()
    unet.enable_lora_hotswap(target_rank=4)
    options = {"prefix": None, "weight_name": "pytorch_lora_weights.safetensors", "adapter_name": "first"}
    unet.load_lora_adapter(str(tmp_path / "first"), **options)
    before = output_of(unet)
    unet.load_lora_adapter(str(tmp_path / "other"), hotswap=True, **options)
    torch.testing.assert_close(output_of(unet), output_of(other), rtol=1e-4, atol=1e-5)
    assert (output_of(unet) - before).abs().max() > 1e-3


def test_quanto(tmp_path):
    quanto = pytest.importorskip("optimum.quanto")
    attending_unet().save_pretrained(tmp_path)
    unet = CascadedUNet2DModel.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights_dtype="int8"))
    assert any(isinstance(module, quanto.QLinear) for module in unet.modules())
    assert_similar(output_of(unet), output_of(attending_unet()))


def test_saved_quanto(tmp_path):
    pytest.importorskip("optimum.quanto")
    attending_unet().save_pretrained(tmp_path / "plain")
    options = {"quantization_config": QuantoConfig(weights_dtype="int8")}
    unet = CascadedUNet2DModel.from_pretrained(tmp_path / "plain", **options)
    unet.save_pretrained(tmp_path / "saved")
    assert torch.equal(output_of(CascadedUNet2DModel.from_pretrained(tmp_path / "saved")), output_of(unet))
    config, file = tmp_path / "saved" / "config.json", tmp_path / "saved" / "diffusion_pytorch_model.safetensors"
    entries, weights = json.loads(config.read_text()), load_file(file)
    config.write_text(json.dumps(entries | {"mid_block_attention": False}))
    with pytest.raises(OSError, match=r"has 22 weights besides the network's weights, 'mid_block\.attentions\.0\."):
        CascadedUNet2DModel.from_pretrained(tmp_path / "saved")
    config.write_text(json.dumps(entries))
    del weights["time_embedding.linear_1.weight._data"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(OSError, match=r"lacks 1 of the network's weights, 'time_embedding\.linear_1\.weight\._data'"):
        CascadedUNet2DModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "is_taken"),
    [
        ("time_embedding.linear_1.weight._data", True),
        ("time_embedding.linear_1.input_scale", True),
        ("time_embedding.linear_3.weight._data", False),
        ("time_embedding.scale", False),
    ],
)
def test_entries_that_a_quantizer_adds_to_layers_are_taken(tmp_path, monkeypatch, name, is_taken):
    """In whatever format: those of layers that the network has."""
    unet = attending_unet()
    unet.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), name: torch.ones(1)}, file, {"format": "pt"})
    message = f"has 1 weights besides the network's weights, '{name}'"
    with pytest.raises(OSError, match=re.escape(message)):
        CascadedUNet2DModel.from_pretrained(tmp_path)
    monkeypatch.setattr(CascadedUNet2DModel, "hf_quantizer", object(), raising=False)
    if is_taken:
        assert torch.equal(output_of(CascadedUNet2DModel.from_pretrained(tmp_path)), output_of(unet))
    else:
        with pytest.raises(OSError, match=re.escape(message)):
            CascadedUNet2DModel.from_pretrained(tmp_path)


def test_torchao(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    attending_unet().save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    unet = CascadedUNet2DModel.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    assert any("Int8" in type(parameter).__name__ for parameter in unet.parameters())
    assert_similar(output_of(unet), output_of(attending_unet()))


# ---------------------------------------------------------------------------------------------------------------------
# Calling


@pytest.mark.parametrize("arguments", [{"prompt": "a boot"}, {"height": 32}, {"width": 32}])
def test_arguments_that_are_not_there(cascade, arguments):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(arguments))}'"):
        cascade([0], **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Schedulers


@pytest.mark.parametrize(("name", "verdict"), SCHEDULERS)
def test_schedulers_of_the_page(name, verdict):
    if not hasattr(diffusers, name):
        pytest.skip(f"this version of Diffusers has no {name}")
    pipe = small_cascade()
    if verdict == "works":
        kind = getattr(diffusers, name)
        for stage in pipe.stages:
            setattr(pipe, f"{stage.name}_scheduler", kind.from_config(stage.scheduler.config))
        images = tensors(pipe)
        assert images.isfinite().all() and images.std() > 0.01
        return
    pipe.base_scheduler = type(name, (SchedulerMixin,), {"config": pipe.base_scheduler.config})()
    with pytest.raises(ValueError, match=f"Stage `base`: {name} is not supported; use one of .*DDIMScheduler"):
        tensors(pipe)
