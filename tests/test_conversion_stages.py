"""Whole files to pipeline folders: by the scripts, assembled to cascades, interrupted; and our own checkpoints."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from golden import SR3_TWINS, TWINS, draw_inputs, draw_weights, golden_outputs, golden_shapes, twin_weights
from safetensors.torch import save_file

from cdm_diffusers import (
    CascadedDDPMScheduler,
    CascadedDiffusionPipeline,
    CascadedUNet2DModel,
    SuperResolutionPipeline,
)
from cdm_diffusers.conversion import stages
from cdm_diffusers.conversion.openai_structure import OpenAISettings
from cdm_diffusers.conversion.sr3 import SR3Settings
from cdm_diffusers.conversion.training_checkpoints import convert_training_checkpoint
from cdm_diffusers.training.config import TrainingConfig
from cdm_diffusers.training.resolve import resolve_preset, run_description
from cdm_diffusers.training.stage import build_stage


ROOT = Path(__file__).parent.parent
BASE, UPSAMPLER = "small cosine 1000", "small linear 4000"


def run(script, *arguments):
    """Runs a script with its command line, as it runs by itself; what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return printed.getvalue()


def save_twin(name, folder):
    path = folder / f"{name.replace(' ', '_')}.pt"
    torch.save(twin_weights(name), path)
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A base by the function, its upsampler by the script with its flags, and both as a cascade by the script."""
    folder = tmp_path_factory.mktemp("converted")
    base = save_twin(BASE, folder)
    stages.convert_openai_checkpoint(base, folder / "base", OpenAISettings(**TWINS[BASE].settings))
    flags = [word for name, value in TWINS[UPSAMPLER].settings.items() for word in (f"--{name}", value)]
    script = "conversion/convert_openai_checkpoint.py"
    printed = run(script, save_twin(UPSAMPLER, folder), "--output", folder / "upsampler", *flags)
    assert "rescale_timesteps: False (given)" in printed and "diffusion_steps: 4000 (given)" in printed
    script = "conversion/assemble_cascade.py"
    run(script, "--base", folder / "base", "--super-res", folder / "upsampler", "--output", folder / "cascade")
    return folder


def sample(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe([2, 7], num_inference_steps=3, generator=generator, output_type="pt", **options)


def test_converted_stages_hold_the_original_networks(converted):
    base = CascadedDiffusionPipeline.from_pretrained(converted / "base")
    upsampler = SuperResolutionPipeline.from_pretrained(converted / "upsampler")
    for name, unet in ((BASE, base.base_unet), (UPSAMPLER, upsampler.unet)):
        with torch.no_grad():
            output = unet(**draw_inputs(TWINS[name])).sample
        golden = torch.from_numpy(golden_outputs()[name])
        assert (output - golden).abs().max() < 1e-5 * golden.abs().max()
    assert base.base_scheduler.config.beta_schedule == "squaredcos_cap_v2" and len(base.base_scheduler) == 1000
    assert base.config.default_num_inference_steps == {"base": 250}
    assert upsampler.scheduler.config.beta_schedule == "linear" and len(upsampler.scheduler) == 4000
    assert upsampler.noising_scheduler is None and upsampler.config.default_num_inference_steps == 250


def test_a_converted_pair_samples_saves_and_loads(converted, tmp_path):
    cascade = CascadedDiffusionPipeline.from_pretrained(converted / "cascade")
    output = sample(cascade, output_stages=True)
    assert output.images.shape == (2, 3, 16, 16) and output.stages["base"].shape == (2, 3, 8, 8)
    assert output.images.std() > 0.05
    cascade.save_pretrained(tmp_path / "again")
    again = sample(CascadedDiffusionPipeline.from_pretrained(tmp_path / "again"))
    assert torch.equal(torch.as_tensor(again.images), torch.as_tensor(output.images))


def test_a_foreign_base_with_a_stage_of_ours(converted, tmp_path):
    unet = CascadedUNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_resolutions=(),
        attention_head_dim=8,
        norm_num_groups=4,
        num_classes=10,
        low_res_size=8,
        augmentation_level_embedding=True,
        learned_variance=True,
    )
    noising = CascadedDDPMScheduler(1000, variance_type="fixed_small")
    SuperResolutionPipeline(unet, CascadedDDPMScheduler(), noising, default_augmentation_level=100).save_pretrained(
        tmp_path / "ours"
    )
    cascade = CascadedDiffusionPipeline.from_stages(converted / "base", tmp_path / "ours")
    assert sample(cascade, truncated=True).images.shape == (2, 3, 16, 16)
    other = SuperResolutionPipeline(unet, CascadedDDPMScheduler(), CascadedDDPMScheduler(4000))
    with pytest.raises(ValueError, match="their alpha-bar tables differ"):
        CascadedDiffusionPipeline.from_stages(converted / "base", other)


def test_cards_say_where_weights_come_from(converted):
    card = (converted / "base" / "README.md").read_text()
    assert "license: mit" in card and "small_cosine_1000.pt" in card
    assert "https://github.com/openai/guided-diffusion" in card and "- base: new_attention_order: True (given)" in card
    source = json.loads((converted / "upsampler" / "source.json").read_text())
    assert source["repository"] == "https://github.com/openai/improved-diffusion" and source["url"] is None
    card = (converted / "cascade" / "README.md").read_text()
    assert "license: mit" in card and "| super_res_1 | small_linear_4000.pt |" in card


def test_a_published_file_has_labels_and_figures(tmp_path, monkeypatch):
    """A small network with a published one's entry: nothing is given."""
    shapes = golden_shapes()["twins"][BASE] | {"label_emb.weight": [1000, 128]}
    path = tmp_path / "64x64_diffusion.pt"
    torch.save(draw_weights(shapes, 0), path)
    published = next(file for file in stages.openai.KNOWN_FILES if file.name == "64x64_diffusion")
    structure = stages.read_openai_structure(draw_weights(shapes, 0))
    settings = OpenAISettings(**TWINS[BASE].settings)
    file = stages.openai.KnownFile(
        published.name, structure, settings, published.data, published.figures, num_inference_steps=5
    )
    monkeypatch.setattr(stages.openai, "KNOWN_FILES", (file,))
    notes = stages.convert_openai_checkpoint(path, tmp_path / "stage")
    assert notes[0] == "structure: that of 64x64_diffusion"
    pipe = CascadedDiffusionPipeline.from_pretrained(tmp_path / "stage")
    assert pipe.config.id2label[207] == "golden retriever" and len(pipe.config.id2label) == 1000
    assert pipe.config.default_num_inference_steps == {"base": 5}
    assert pipe("tench, Tinca tinca", num_inference_steps=1).images[0].size == (8, 8)
    card = (tmp_path / "stage" / "README.md").read_text()
    assert "FID 2.07" in card and "jul-2021/64x64_diffusion.pt" in card and 'class_labels=["tench' in card


def test_imagenet_names_are_unique():
    names = stages.imagenet_id2label()
    assert list(names) == list(range(1000)) and len(set(names.values())) == 1000
    assert (names[0], names[999]) == ("tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing_that_loads(converted, tmp_path, monkeypatch, error):
    def fail(*arguments, **options):
        raise error("the disk is full")

    monkeypatch.setattr(stages, "write_card", fail)
    path = next(converted.glob("small_cosine*.pt"))
    with pytest.raises(error):
        stages.convert_openai_checkpoint(path, tmp_path / "stage", OpenAISettings(**TWINS[BASE].settings))
    assert not (tmp_path / "stage").exists()


def test_a_refused_file_leaves_no_folder(tmp_path):
    path = save_twin(BASE, tmp_path)
    with pytest.raises(ValueError, match=r"`image_size`, .*must be given"):
        stages.convert_openai_checkpoint(path, tmp_path / "stage")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match="is cut off"):
        stages.convert_openai_checkpoint(path, tmp_path / "stage", OpenAISettings(**TWINS[BASE].settings))
    assert not (tmp_path / "stage").exists()


@pytest.mark.parametrize("one_buffer", [False, True])
def test_weights_are_written_shard_by_shard(converted, tmp_path, monkeypatch, one_buffer):
    """Also those that lie in one buffer and have gradients, as OpenAI's training in half precision saves them."""
    monkeypatch.setattr(stages, "SHARD_SIZE", "300KB")
    path = next(converted.glob("small_cosine*.pt"))
    if one_buffer:
        weights = twin_weights(BASE)
        buffer = torch.nn.Parameter(torch.cat([weight.flatten() for weight in weights.values()]))
        parts = buffer.split([weight.numel() for weight in weights.values()])
        path = tmp_path / "one_buffer.pt"
        torch.save({name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}, path)
    stages.convert_openai_checkpoint(path, tmp_path / "stage", OpenAISettings(**TWINS[BASE].settings))
    shards = list((tmp_path / "stage" / "base_unet").glob("*.safetensors"))
    assert len(shards) > 2 and max(shard.stat().st_size for shard in shards) < 500_000
    whole = CascadedDiffusionPipeline.from_pretrained(converted / "base").base_unet.state_dict()
    parts = CascadedDiffusionPipeline.from_pretrained(tmp_path / "stage").base_unet.state_dict()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_sr3_by_the_script(tmp_path):
    name = "small sr3"
    path = tmp_path / "I1_E1_gen.pth"
    torch.save(twin_weights(name), path)
    flags = ["--image_size", 16, "--low_res", 4, "--norm_groups", 16]
    printed = run("conversion/convert_sr3_checkpoint.py", path, "--output", tmp_path / "stage", *flags)
    assert "linear_end: 0.2 (in the file)" in printed
    pipe = SuperResolutionPipeline.from_pretrained(tmp_path / "stage")
    assert pipe.config.default_num_inference_steps == SR3_TWINS[name].settings["diffusion_steps"]
    images = pipe(torch.rand(2, 3, 4, 4), num_inference_steps=3, output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    assert "license: apache-2.0" in (tmp_path / "stage" / "README.md").read_text()
    optimizer = tmp_path / "I1_E1_opt.pth"
    torch.save({"epoch": 1, "iter": 1, "scheduler": None, "optimizer": {}}, optimizer)
    with pytest.raises(ValueError, match=r"the one that ends in `_gen.pth`"):
        stages.convert_sr3_checkpoint(optimizer, tmp_path / "other", SR3Settings(image_size=16))


# ---------------------------------------------------------------------------------------------------------------------
# Our own training


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint folder as the training loop leaves it, with weights of two kinds."""
    config = TrainingConfig(
        preset="imagenet_16_to_64",
        output_dir="unused",
        train_data_dir=str(tmp_path),
        sample_size=16,
        low_res_size=8,
        source_resolution=16,
        block_out_channels=[8, 16],
        layers_per_block=1,
        attention_resolutions=[8],
        attention_head_dim=4,
        num_attention_heads=None,
        norm_num_groups=4,
    )
    preset = resolve_preset(config, super_resolution=True)
    resolved = run_description(config, preset, {0: "cat", 1: "dog"}, num_examples=12, num_processes=1)
    resolved["unet"]["num_classes"] = 2
    folder = tmp_path / "checkpoint-20"
    folder.mkdir()
    (folder / "training_config.json").write_text(json.dumps(resolved))
    (folder / "progress.json").write_text(json.dumps({"step": 20, "loss": 0.5}))
    unet = CascadedUNet2DModel(**{n: tuple(v) if isinstance(v, list) else v for n, v in resolved["unet"].items()})
    for seed, file in enumerate(("ema.safetensors", "model.safetensors")):
        shapes = {name: list(tensor.shape) for name, tensor in unet.state_dict().items()}
        save_file(draw_weights(shapes, seed), folder / file)
    return folder, preset, unet


@pytest.mark.parametrize("weights, seed", [("ema", 0), ("raw", 1)])
def test_weights_of_our_own_checkpoints(checkpoint, tmp_path, weights, seed):
    folder, preset, unet = checkpoint
    script = "conversion/convert_training_checkpoint.py"
    if weights == "raw":
        run(script, folder, "--output", tmp_path / "stage", "--weights", "raw")
    else:
        convert_training_checkpoint(folder, tmp_path / "stage")
    pipe = SuperResolutionPipeline.from_pretrained(tmp_path / "stage")
    shapes = {name: list(tensor.shape) for name, tensor in unet.state_dict().items()}
    for name, tensor in draw_weights(shapes, seed).items():
        assert torch.equal(pipe.unet.state_dict()[name], tensor)
    expected = build_stage(preset)
    for loaded, built in ((pipe.scheduler, expected.scheduler), (pipe.noising_scheduler, expected.noising_scheduler)):
        assert type(loaded) is type(built)
        assert {name: loaded.config[name] for name in built.config} == dict(built.config)
    assert pipe.config.id2label == {0: "cat", 1: "dog"}
    assert pipe.config.default_num_inference_steps == preset.inference.num_inference_steps
    card = (tmp_path / "stage" / "README.md").read_text()
    sentence = "the EMA weights of the" if weights == "ema" else "the last weights, not their average, of the"
    assert f"These are {sentence} checkpoint at step 20." in card
    assert json.loads((tmp_path / "stage" / "training_config.json").read_text())["name"] == "imagenet_16_to_64"


def test_damaged_checkpoints_of_ours(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    with pytest.raises(ValueError, match="`weights` is 'last'"):
        convert_training_checkpoint(folder, tmp_path / "stage", "last")
    for progress in ([], {}, {"step": "20", "loss": 0.5}, {"step": 20}):
        (folder / "progress.json").write_text(json.dumps(progress))
        with pytest.raises(ValueError, match=r"progress.json' was not written by training, or is damaged"):
            convert_training_checkpoint(folder, tmp_path / "stage")
    (folder / "progress.json").write_text(json.dumps({"step": 20, "loss": None}))
    (folder / "ema.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="incomplete or damaged"):
        convert_training_checkpoint(folder, tmp_path / "stage")
    with pytest.raises(ValueError, match="which is not a checkpoint folder"):
        convert_training_checkpoint(tmp_path, tmp_path / "stage")
