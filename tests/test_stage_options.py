"""What stages run with when it is not given, and stages taken out of a cascade and put back."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from small_cascade import small_cascade

from cdm_diffusers import (
    CascadedDDPMScheduler,
    CascadedDiffusionPipeline,
    ContinuousDDPMScheduler,
    SuperResolutionPipeline,
)
from cdm_diffusers.model_cards import write_card
from cdm_diffusers.pipelines.fit import check_same_forward_process
from cdm_diffusers.pipelines.stages import CascadeStage


BARE = {"default_num_inference_steps": None, "default_augmentation_levels": None}


def images(pipe, *arguments, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(*arguments, generator=torch.Generator().manual_seed(0), output_type="pt", **options).images


def test_defaults_of_a_cascade():
    cascade = small_cascade(default_guidance_scales={"super_res_1": 1.5})
    assert cascade.stage_options() == {
        "num_inference_steps": {"base": 3, "super_res_1": 3, "super_res_2": 3},
        "augmentation_levels": {"super_res_1": 5},
        "guidance_scale": {"base": 1.0, "super_res_1": 1.5, "super_res_2": 1.0},
    }
    assert small_cascade(**BARE).stage_options() == {
        "num_inference_steps": {"base": 20, "super_res_1": 20, "super_res_2": 40},
        "augmentation_levels": {"super_res_1": 0},
        "guidance_scale": {"base": 1.0, "super_res_1": 1.0, "super_res_2": 1.0},
    }


def test_what_is_given_goes_before_defaults():
    cascade = small_cascade(default_guidance_scales={"super_res_1": 1.5})
    given = cascade.stage_options({"base": 7, "super_res_2": None}, {"super_res_1": 0}, {"base": 2.0})
    assert given["num_inference_steps"] == {"base": 7, "super_res_1": 3, "super_res_2": 3}
    assert given["augmentation_levels"] == {"super_res_1": 0}
    assert given["guidance_scale"] == {"base": 2.0, "super_res_1": 1.5, "super_res_2": 1.0}
    assert cascade.stage_options(4, guidance_scale=3)["num_inference_steps"] == dict.fromkeys(
        ("base", "super_res_1", "super_res_2"), 4
    )


def test_calls_run_with_the_options():
    cascade = small_cascade(default_guidance_scales={"super_res_1": 1.5})
    assert torch.equal(images(cascade, [0, 1]), images(cascade, [0, 1], **cascade.stage_options()))
    stage = cascade.stage_pipeline("super_res_1")
    assert stage.stage_options() == {"num_inference_steps": 3, "augmentation_level": 5, "guidance_scale": 1.5}
    low_res = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(images(stage, low_res, 0), images(stage, low_res, 0, **stage.stage_options()))
    without_noise = cascade.stage_pipeline("super_res_2")
    assert without_noise.stage_options(2)["augmentation_level"] is None
    assert len(images(without_noise, torch.rand(1, 1, 8, 8), 0, **without_noise.stage_options(2))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": {"super_res_9": 5}}, r"`num_inference_steps` names the stages \['super_res_9'\]"),
        ({"augmentation_levels": {"super_res_9": 5}}, r"`augmentation_levels` names the stages \['super_res_9'\]"),
        ({"guidance_scale": {"super_res_9": 5}}, r"`guidance_scale` names the stages \['super_res_9'\]"),
        ({"num_inference_steps": {"base": 0}}, "`num_inference_steps` of stage `base` is 0"),
        ({"augmentation_levels": {"super_res_1": 21}}, r"stage `super_res_1` is 21; it must be an integer in 0\.\.20"),
        ({"augmentation_levels": {"super_res_2": 1}}, "stage `super_res_2` is 1, but the stage takes none"),
        ({"augmentation_levels": 5}, "`augmentation_levels` is 5; it must be a dict"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` of stage `base` is nan"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        small_cascade().stage_options(**options)
    with pytest.raises(ValueError, match=message):
        small_cascade()(0, **options)


def test_defaults_out_of_range():
    with pytest.raises(ValueError, match=r"`augmentation_level` of stage `super_res_1` is 21; .* 0\.\.20"):
        small_cascade(default_augmentation_levels={"super_res_1": 21})


def test_stages_that_do_not_run_need_no_options():
    """With an image to start from, one guidance scale is for the stages that run."""
    base = small_cascade(num_stages=1, num_classes=None).base_unet
    parts = small_cascade(num_stages=2).components | {"base_unet": base}
    mixed = CascadedDiffusionPipeline(**parts, default_num_inference_steps={"super_res_1": 2})
    assert len(images(mixed, 0, image=torch.rand(1, 1, 4, 4), guidance_scale=2.0)) == 1
    with pytest.raises(ValueError, match=r"`guidance_scale` of stage `base` is 2\.0, but"):
        mixed.stage_options(guidance_scale={"base": 2.0})


def test_cards_say_what_calls_do(tmp_path):
    cascade = small_cascade(**BARE).with_schedulers({"base": "ddim"})
    write_card(cascade, tmp_path, "clothes")
    rows = [line for line in (tmp_path / "README.md").read_text().splitlines() if "4x4" in line or "8x8" in line]
    assert "| DDIMScheduler | 10 | - | 1.0 |" in rows[-2]
    assert "| CascadedDDPMScheduler | 20 | 0 | 1.0 |" in rows[-1]


# ---------------------------------------------------------------------------------------------------------------------
# One stage by itself


def test_stage_pipelines_are_what_from_stages_joins():
    cascade = small_cascade(default_guidance_scales={"base": 1.2, "super_res_2": 1.5})
    stages = [cascade.stage_pipeline(stage.name) for stage in cascade.stages]
    assert [type(stage) for stage in stages] == [CascadedDiffusionPipeline, *[SuperResolutionPipeline] * 2]
    joined = CascadedDiffusionPipeline.from_stages(*stages)
    assert joined.components == cascade.components
    for name in ("id2label", "source_resolution", *(key for key in cascade.config if key.startswith("default_"))):
        assert joined.config[name] == cascade.config[name], name
    assert torch.equal(images(joined, [0, 2]), images(cascade, [0, 2]))
    with pytest.raises(ValueError, match=r"`name` is 'super_res_3'; it must be one of the stages \['base', "):
        cascade.stage_pipeline("super_res_3")


# ---------------------------------------------------------------------------------------------------------------------
# The same forward process


def pair(scheduler, noising_scheduler):
    cascade = small_cascade(num_stages=2)
    return CascadeStage("base", cascade.base_unet, scheduler), CascadeStage(
        "super_res_1", cascade.super_res_1_unet, scheduler, noising_scheduler
    )


def changed(index, factor):
    """A cosine process with one alpha-bar, or what it lacks to 1, multiplied."""
    scheduler = CascadedDDPMScheduler(4000, variance_type="fixed_small")
    alpha_bar = scheduler.table.alphas_cumprod.clone()
    alpha_bar[index] = alpha_bar[index] * factor if index else 1 - (1 - alpha_bar[index]) * factor
    scheduler.table = type(scheduler.table)(alpha_bar)
    return scheduler


@pytest.mark.parametrize(("index", "factor"), [(-1, 1 / 5), (-1, 1.000001), (0, 0.999), (2000, 1.000001)])
def test_another_process_is_refused(index, factor):
    scheduler = CascadedDDPMScheduler(4000, variance_type="fixed_small")
    for stages in (pair(scheduler, changed(index, factor)), pair(changed(index, factor), scheduler)):
        with pytest.raises(ValueError, match="their alpha-bar tables differ"):
            check_same_forward_process(*stages)


def test_a_process_of_zero_terminal_snr_is_refused_in_its_own_words():
    noising = CascadedDDPMScheduler(20, variance_type="fixed_small")
    own = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 20}
    scheduler = DDIMScheduler(**own, rescale_betas_zero_snr=True)
    message = r"`rescale_betas_zero_snr` of stage `base` is True; .* \(zero terminal SNR\), .* stage `super_res_1` was"
    with pytest.raises(ValueError, match=message) as error:
        check_same_forward_process(*pair(scheduler, noising))
    assert "CascadedDDPMScheduler" not in str(error.value)
    check_same_forward_process(*pair(DDIMScheduler(**own), noising))


def test_the_same_process_is_accepted():
    """Of whichever class, saved and loaded, and computed in another order."""
    for arguments in ({"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "linear", "beta_start": 1e-6}):
        scheduler = CascadedDDPMScheduler(2000, variance_type="fixed_small", beta_end=1e-2, **arguments)
        check_same_forward_process(*pair(scheduler, ContinuousDDPMScheduler.from_config(scheduler.config)))
        back = CascadedDDPMScheduler.from_config(DDIMScheduler.from_config(scheduler.config).config)
        check_same_forward_process(*pair(scheduler, back))
        back.table = type(back.table)((1 - back.table.betas).log().cumsum(0).exp())
        assert not torch.equal(back.table.alphas_cumprod, scheduler.table.alphas_cumprod)
        check_same_forward_process(*pair(scheduler, back))


# ---------------------------------------------------------------------------------------------------------------------
# Names of Diffusers' pipelines that a cascade has for each stage


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scheduler", "no single `scheduler`, but one for each stage: use `base_scheduler` and so on"),
        ("unet", "no single `unet`, but one for each stage: use `base_unet` and so on"),
        ("noising_scheduler", "no single `noising_scheduler`, but one for each stage: use `super_res_1_noising_"),
    ],
)
def test_a_cascade_has_no_single(name, message):
    cascade = small_cascade(num_stages=2)
    with pytest.raises(AttributeError, match=message):
        setattr(cascade, name, DDIMScheduler())
    with pytest.raises(AttributeError, match=message):
        getattr(cascade, name)
    assert not hasattr(cascade, name)
    cascade.base_scheduler = DDIMScheduler.from_config(cascade.base_scheduler.config)
    assert cascade.config.base_scheduler == ("diffusers", "DDIMScheduler")
    stage = cascade.stage_pipeline("super_res_1")
    stage.scheduler = cascade.base_scheduler
    assert stage.stage.scheduler is cascade.base_scheduler


def partly_guided():
    """The base was trained with label dropout, the stage after it was not."""
    cascade = small_cascade(num_stages=2)
    unet = cascade.super_res_1_unet
    arguments = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    cascade.register_modules(super_res_1_unet=type(unet)(**arguments | {"null_class": False}))
    return cascade


def test_one_guidance_scale_is_for_the_stages_that_take_it(caplog):
    cascade = partly_guided()
    with caplog.at_level("WARNING"):
        assert cascade.stage_options(guidance_scale=3.0)["guidance_scale"] == {"base": 3.0, "super_res_1": 1.0}
    assert "`guidance_scale` is 3.0; the stages ['super_res_1'] were trained without label dropout" in caplog.text
    assert torch.equal(images(cascade, 0, guidance_scale=3.0), images(cascade, 0, guidance_scale={"base": 3.0}))
    caplog.clear()
    assert cascade.stage_options(guidance_scale=1.0)["guidance_scale"] == {"base": 1.0, "super_res_1": 1.0}
    assert small_cascade().stage_options(guidance_scale=2.0)["guidance_scale"]["super_res_2"] == 2.0
    assert not caplog.records
    with pytest.raises(ValueError, match="`guidance_scale` of stage `super_res_1` is 3"):
        cascade.stage_options(guidance_scale={"super_res_1": 3.0})


def test_numbers_of_numpy():
    cascade = small_cascade()
    given = {"num_inference_steps": np.int64(3), "guidance_scale": np.float32(2)}
    assert cascade.stage_options(**given) == cascade.stage_options(3, guidance_scale=2.0)
    with pytest.raises(ValueError, match="must be an integer"):
        cascade.stage_options(True)


def test_class_names_match_without_case():
    cascade = small_cascade()
    assert torch.equal(images(cascade, "ankle BOOT"), images(cascade, "Ankle boot"))
    twins = small_cascade(id2label={0: "Bow", 1: "bow", 2: "BOW"})
    assert torch.equal(images(twins, "bow"), images(twins, 1))
    with pytest.raises(ValueError, match=r"names the classes \[0, 1, 2\]: give the index"):
        images(twins, "bOw")


def test_stages_fit_whatever_samples_them():
    """A solver of Diffusers does not hide that a stage was trained on other noise."""
    cascade = small_cascade(num_stages=2)
    stages = [cascade.stage_pipeline(name) for name in ("base", "super_res_1")]
    fast = CascadedDiffusionPipeline.from_stages(stages[0].with_schedulers("unipc"), stages[1])
    assert type(fast.base_scheduler).__name__ == "UniPCMultistepScheduler"
    stages[1].noising_scheduler = CascadedDDPMScheduler(num_train_timesteps=21, variance_type="fixed_small")
    for base in (stages[0], stages[0].with_schedulers("unipc")):
        with pytest.raises(ValueError, match="alpha-bar tables differ"):
            CascadedDiffusionPipeline.from_stages(base, stages[1])
