"""What a call costs besides its networks: nothing is made twice, no step waits for the device, and samples are those
of the loop written out."""

import json
from collections import Counter
from unittest import mock

import pytest
import torch
from scripts import run
from small_cascade import small_cascade
from torch.utils._python_dispatch import TorchDispatchMode

from cdm_diffusers import CascadedUNet2DModel
from cdm_diffusers.models import constant_conditions
from cdm_diffusers.pipelines import denoising, pipeline_base
from cdm_diffusers.pipelines.denoising import Denoiser


STEPS = {"base": 6, "super_res_1": 5, "super_res_2": 4}
GUIDED = {"base": 2.0, "super_res_1": 1.5}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def cascade():
    """Random weights, so that all that networks are told matters; guided in two stages."""
    cascade = small_cascade(default_num_inference_steps=STEPS, default_guidance_scales=GUIDED)
    for stage in cascade.stages:
        for parameter in stage.unet.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    return cascade


class Operations(TorchDispatchMode):
    """How often each operation ran, and how many copied from one device to another."""

    def __init__(self):
        super().__init__()
        self.counts, self.num_moved = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.counts[str(func)] += 1
        inputs = [one for one in (*args, *(kwargs or {}).values()) if torch.is_tensor(one) and one.ndim > 0]
        self.num_moved += torch.is_tensor(output) and any(one.device != output.device for one in inputs)
        return output


@torch.no_grad()
def test_a_call_is_the_loop_written_out(cascade):
    """Bit for bit: a plain loop over the schedulers' public `step`, everything made anew at each step."""
    labels, generator, low_res = torch.tensor([0, 2]), seeded(), None
    for stage in cascade.stages:
        unet, scheduler, weight = stage.unet, stage.scheduler, GUIDED.get(stage.name, 1)
        conditions = {"class_labels": labels}
        if stage.noising_scheduler is not None:
            low_res = stage.noising_scheduler.forward_marginal(low_res, 5, generator)
            conditions["augmentation_level"] = torch.tensor(5)
        if low_res is not None:
            conditions["low_res"] = low_res
        scheduler.set_timesteps(STEPS[stage.name])
        levels = scheduler.inference_table.alphas_cumprod.flip(0).sqrt().float()
        by_level = unet.config.time_conditioning == "noise_level"
        x = torch.randn(2, 1, *[unet.config.sample_size] * 2, generator=generator)
        for timestep, level in zip(scheduler.timesteps, levels, strict=True):
            time = level if by_level else timestep
            if weight == 1:
                output = unet(x, time, **conditions).sample
            else:
                twice = conditions | {"class_labels": torch.tensor([0, 2, 3, 3])}
                twice |= {} if low_res is None else {"low_res": torch.cat([low_res, low_res])}
                of_class, of_null = unet(torch.cat([x, x]), time, **twice).sample.chunk(2)
                output = of_null + weight * (of_class - of_null)
            x = scheduler.step(output, timestep, x, generator=generator).prev_sample
        low_res = x
    images = cascade([0, 2], generator=seeded(), output_type="pt").images
    assert torch.equal(images, (x / 2 + 0.5).clamp(0, 1))


def test_conditions_are_prepared_once(cascade, monkeypatch):
    made, to_first_level = Counter(), CascadedUNet2DModel._to_first_level

    def counting(unet, *arguments):
        made[unet.config.sample_size] += 1
        return to_first_level(unet, *arguments)

    monkeypatch.setattr(CascadedUNet2DModel, "_to_first_level", counting)
    for stage in cascade.stages:
        for name in ("class_embedding", "augmentation_embedding"):
            if (module := getattr(stage.unet, name)) is not None:
                module.register_forward_hook(lambda *_, key=(stage.name, name): made.update([key]))
    cascade([0, 2], generator=seeded())
    assert made == Counter(
        dict.fromkeys((8, 16, *((name, "class_embedding") for name in STEPS)), 1)
        | {("super_res_1", "augmentation_embedding"): 1}
    )


@torch.no_grad()
def test_constant_conditions_are_those_tensors_alone(cascade):
    unet = cascade.super_res_1_unet
    calls = [
        {"class_labels": labels, "low_res": torch.rand(len(labels), 1, 4, 4), "augmentation_level": level}
        for labels in (torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([2, 1, 0]))
        for level in (torch.tensor(3), torch.tensor(9))
    ]
    calls = [calls[0], calls[0], *calls, calls[0] | {"augmentation_level": calls[5]["augmentation_level"]}]
    images = [torch.randn(len(call["class_labels"]), 1, 8, 8) for call in calls]
    expected = [unet(x, torch.tensor(7), **call).sample for x, call in zip(images, calls, strict=True)]
    with constant_conditions():
        came = [unet(x, torch.tensor(7), **call).sample for x, call in zip(images, calls, strict=True)]
    assert all(map(torch.equal, came, expected))
    with torch.no_grad():
        unet.class_embedding.weight.add_(1)
    changed = unet(images[0], torch.tensor(7), **calls[0]).sample
    assert not torch.equal(changed, expected[0])


@torch.no_grad()
@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_large_batches_are_seen_in_parts(cascade, monkeypatch, weight):
    """On a CPU: the same images and labels as at once, and conditions made once for each part."""
    call = {"class_labels": [0, 1, 2, 1, 0], "output_type": "pt", "guidance_scale": {"super_res_1": weight}}
    whole = cascade(**call, generator=seeded()).images
    seen, unet = [], cascade.super_res_1_unet
    unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    embedded = []
    unet.class_embedding.register_forward_hook(lambda *_: embedded.append(0))
    pixels, channels = unet.config.sample_size**2, sum(unet.config.block_out_channels[:2])
    monkeypatch.setattr(denoising, "KEPT_BYTES", 2 * pixels * channels * 4)
    parts = cascade(**call, generator=seeded()).images
    expected = [2, 2, 1] if weight == 1 else [2] * 5
    assert seen == expected * STEPS["super_res_1"]
    assert len(embedded) == len(expected)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_what_is_seen_at_once():
    """Feature maps of the first level decide it, in patches and in half precision; other devices see all."""
    unet = CascadedUNet2DModel(
        sample_size=256,
        low_res_size=64,
        patch_size=4,
        block_out_channels=(64, 96),
        attention_resolutions=(),
        mid_block_attention=False,
    )
    images = torch.empty(78, 3, 256, 256, device="meta")
    assert denoising.images_at_a_time(unet, images) == 78
    images = torch.empty(78, 3, 256, 256)
    assert denoising.images_at_a_time(unet, images) == 16 * 2**20 // (64 * 64 * 160 * 4) == 6
    assert denoising.images_at_a_time(unet, images.bfloat16()) == 12
    assert denoising.images_at_a_time(unet, torch.empty(2, 3, 1024, 1024)) == 1


def test_no_network_is_looked_through_at_each_step(cascade):
    """For its dtype and device, as Diffusers' properties do several times."""
    walks, has_hooks = [], denoising.has_hooks

    def counting(module):
        walks.extend([0] * isinstance(module, CascadedUNet2DModel))
        return has_hooks(module)

    with mock.patch.object(denoising, "has_hooks", counting), mock.patch.object(pipeline_base, "has_hooks", counting):
        cascade([0], generator=seeded())
    assert len(walks) == 2 * len(STEPS)
    kind, reads = type(cascade), []
    device = kind._execution_device.fget
    with mock.patch.object(kind, "_execution_device", property(lambda pipe: reads.append(0) or device(pipe))):
        cascade([0], generator=seeded())
    assert len(reads) == 1


@pytest.mark.parametrize(("weight", "most"), [(1.0, 26), (2.0, 34)])
def test_operations_of_a_step(cascade, weight, most):
    """Each is a launch on a GPU: those that one more step of the base takes besides its network."""
    base = cascade.with_schedulers(last_stage="base")
    base.set_progress_bar_config(disable=True)
    output = torch.zeros(4, 1, 4, 4)
    counts = []
    for steps in (4, 5):
        network = mock.patch.object(base.base_unet, "forward", lambda x_t, *_, **__: (output[: len(x_t)],))
        with network, Operations() as operations:
            base([0, 1], generator=seeded(), num_inference_steps=steps, guidance_scale=weight, output_type="pt")
        counts.append(operations.counts.total())
    assert counts[1] - counts[0] <= most, operations.counts


# ---------------------------------------------------------------------------------------------------------------------
# On the meta device to read a value back is an error, as it would be a wait on a GPU


def sample_on_meta(cascade, monkeypatch, **options) -> Operations:
    """The operations of a whole call there, except for the one question whether all went well."""
    monkeypatch.setattr(Denoiser, "is_finite", lambda denoiser, sample: True)
    with Operations() as operations:
        images = cascade.to("meta")([0, 2], output_type="pt", **options).images
    assert images.is_meta and images.shape == (2, 1, 16, 16)
    return operations


@pytest.mark.parametrize("scheduler", [None, "ddim", "deis", "dpmsolver++", "euler", "heun", "ipndm", "unipc"])
def test_no_step_waits_for_the_device(cascade, monkeypatch, scheduler):
    cascade = cascade.with_schedulers(scheduler)
    cascade.set_progress_bar_config(disable=True)
    sample_on_meta(cascade, monkeypatch)
    if scheduler is None:
        sample_on_meta(cascade, monkeypatch, restart_timestep=10, truncated=True)
        sample_on_meta(cascade, monkeypatch, consistency=True)


def test_our_own_steps_copy_nothing_to_the_device(cascade, monkeypatch):
    """Neither to it nor from it: as many copies, whatever the number of steps."""
    copies = [sample_on_meta(cascade, monkeypatch, num_inference_steps=steps).num_moved for steps in (4, 4, 8)]
    assert copies[1] == copies[2]  # the first call moves weights and tables


def test_a_step_that_reads_a_value_is_noticed(cascade, monkeypatch):
    def reading(pipe, step, timestep, tensors):
        tensors["sample"].max().item()
        return tensors

    with pytest.raises(RuntimeError, match="meta"):
        sample_on_meta(cascade, monkeypatch, callback_on_step_end=reading)


@pytest.mark.slow("a process that imports torch and samples")
def test_the_benchmark_prints_a_line(cascade, tmp_path):
    cascade.save_pretrained(tmp_path)
    line = json.loads(run("-m", "benchmarks.sampling", "--pipeline", tmp_path, "--num_images", 2, "--rounds", 2))
    assert line["benchmark"] == "sampling" and "ratio" in line
    assert all(0 < share < 1 for share in line["besides_networks"])
