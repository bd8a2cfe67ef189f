"""Settings that a pipeline has by name, beside its defaults."""

import json
from pathlib import Path

import pytest
import torch
from small_cascade import small_cascade

from cdm_diffusers import CascadedDiffusionPipeline
from cdm_diffusers.commands.config import PicturesConfig
from cdm_diffusers.commands.info import as_text, facts_of
from cdm_diffusers.commands.pictures import sample_pictures
from cdm_diffusers.evaluation.config import SampleConfig
from cdm_diffusers.evaluation.sample import call_options
from cdm_diffusers.model_cards import named_settings, write_card
from cdm_diffusers.pipelines.loading import load_without_weights


SETTINGS = {
    "sharp": {},
    "calibrated": {
        "num_inference_steps": {"super_res_2": 7},
        "augmentation_levels": {"super_res_1": 9},
        "guidance_scale": {"base": 1.5},
        "timesteps": {"super_res_1": [15, 4]},
    },
}
TIMES = {"super_res_2": [37, 20]}


def images(cascade, **options) -> torch.Tensor:
    cascade.set_progress_bar_config(disable=True)
    return cascade([0, 1], generator=torch.Generator().manual_seed(0), output_type="pt", **options).images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    small_cascade(settings=SETTINGS, default_timesteps=TIMES).save_pretrained(folder)
    return folder


def test_a_name_stands_for_its_arguments(folder):
    cascade = CascadedDiffusionPipeline.from_pretrained(folder)
    assert torch.equal(images(cascade, settings="calibrated"), images(cascade, **SETTINGS["calibrated"]))
    assert torch.equal(images(cascade, settings="sharp"), images(cascade))
    assert not torch.equal(images(cascade, settings="calibrated"), images(cascade))
    assert cascade.evaluations(settings="calibrated") == {"base": 6, "super_res_1": 2, "super_res_2": 7}


def test_a_name_goes_before_defaults_and_after_what_is_given(folder):
    cascade = CascadedDiffusionPipeline.from_pretrained(folder)
    assert cascade.stage_options() == {
        "num_inference_steps": {"base": 3, "super_res_1": 3, "super_res_2": 2},
        "augmentation_levels": {"super_res_1": 5},
        "guidance_scale": {"base": 1.0, "super_res_1": 1.0, "super_res_2": 1.0},
        "timesteps": TIMES,
    }
    assert cascade.stage_options({"super_res_2": 4}, {"super_res_1": 1}, settings="calibrated") == {
        "num_inference_steps": {"base": 3, "super_res_1": 2, "super_res_2": 4},
        "augmentation_levels": {"super_res_1": 1},
        "guidance_scale": {"base": 1.5, "super_res_1": 1.0, "super_res_2": 1.0},
        "timesteps": {"super_res_1": [15, 4]},
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SETTINGS, r"`settings` is 'blurred'; it must be one of \['sharp', 'calibrated'\]\."),
        (None, "`settings` is 'blurred'; this pipeline has none by name: leave it out."),
    ],
)
def test_an_unknown_name(settings, message):
    with pytest.raises(ValueError, match=message):
        images(small_cascade(settings=settings), settings="blurred")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"a": {"steps": {"base": 3}}}, r"`settings` 'a' has 'steps'; it must be one of \("),
        ({"a": {"num_inference_steps": {"bass": 3}}}, "`num_inference_steps` names the stages"),
        ({"a": {"num_inference_steps": 3}}, "`num_inference_steps` is 3; it must be a dict"),
        ({"a": {"augmentation_levels": {"base": 3}}}, "the stage takes none"),
        ({"a": 3}, "`settings` is .*; it must be a dict of names"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        small_cascade(settings=settings)


def test_folders_without_settings_say_nothing_of_them(tmp_path):
    small_cascade().save_pretrained(tmp_path)
    assert "settings" not in json.loads((tmp_path / "model_index.json").read_text())


def test_parts_of_a_cascade_keep_their_settings(folder):
    cascade = CascadedDiffusionPipeline.from_pretrained(folder)
    base = cascade.stage_pipeline("base")
    assert base.stage_options(settings="calibrated")["guidance_scale"] == {"base": 1.5}
    other = cascade.with_schedulers({"super_res_1": "unipc"})
    assert "timesteps" not in other.stage_options(settings="calibrated")
    assert cascade.stage_options(settings="calibrated")["timesteps"] == {"super_res_1": [15, 4]}


def test_settings_are_shown(folder, tmp_path):
    description = facts_of(str(folder))
    assert description["settings"] == SETTINGS
    text = as_text(description)
    assert (
        'num_inference_steps super_res_2=7, timesteps super_res_1=[15, 4]; `settings="sharp"` (the defaults)' in text
    )
    assert "time steps of super_res_2: 37, 20" in text
    write_card(load_without_weights(folder), tmp_path, "a cascade")
    card = (tmp_path / "README.md").read_text()
    assert 'Settings by name: `settings="calibrated"` ' in card and "Time steps: super_res_2 37, 20." in card


def test_pictures_of_settings(folder, tmp_path):
    def picture(**options) -> bytes:
        sample_pictures(
            PicturesConfig(
                pipeline=str(folder), output=str(tmp_path / "grid.png"), show=False, device="cpu", **options
            )
        )
        return (tmp_path / "grid.png").read_bytes()

    assert picture(settings="calibrated") != picture() == picture(settings="sharp")


def test_sets_of_samples_take_settings(folder):
    pipeline = CascadedDiffusionPipeline.from_pretrained(folder)
    config = SampleConfig(pipeline=str(folder), output_dir="", num_images=1, settings="calibrated")
    options = call_options(pipeline, config)
    assert options == pipeline.stage_options(settings="calibrated") | {"truncated": False, "restart_timestep": None}
    assert "timesteps" not in call_options(pipeline, config, first_stage=2)


def test_the_shipped_cascade_has_both():
    folder = Path(__file__).parent.parent / "checkpoints" / "fashion-mnist-32"
    pipeline = load_without_weights(folder)
    assert pipeline.stage_options(settings="sharp") == pipeline.stage_options()
    changed = pipeline.stage_options(settings="calibrated")["num_inference_steps"]
    assert changed == {**pipeline.stage_options()["num_inference_steps"], "super_res_2": 25}
    assert named_settings(pipeline.config.settings) in (folder / "README.md").read_text()
