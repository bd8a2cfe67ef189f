"""The one table of samplers: names, classes, and stages that sample with them."""

import inspect
import logging
from dataclasses import replace

import pytest
import torch
from scripts import run
from small_cascade import small_cascade

from cdm_diffusers import CascadedDDPMScheduler, CascadedDiffusionPipeline, ContinuousDDPMScheduler
from cdm_diffusers.pipelines.denoising import make_sampler
from cdm_diffusers.pipelines.solver_names import SOLVER_NAMES, SOLVERS
from cdm_diffusers.pipelines.solvers import SOLVER_CLASSES, scheduler_of, solver_name


def test_names():
    assert SOLVER_NAMES[0] == "ancestral" and len(SOLVER_NAMES) == 13 and len(SOLVER_CLASSES) == 11
    for name in SOLVER_NAMES:
        assert f'"{name}"' in inspect.getdoc(CascadedDiffusionPipeline.with_schedulers), name


@pytest.mark.parametrize("before", SOLVER_NAMES)
@pytest.mark.parametrize("name", SOLVER_NAMES)
def test_every_solver_replaces_every_other(before, name):
    for stage in small_cascade().with_schedulers(before).stages:
        solver = scheduler_of(stage, name)
        assert solver_name(solver) == name
        if name == "ancestral":
            is_continuous = stage.unet.config.time_conditioning == "noise_level"
            assert type(solver) is (ContinuousDDPMScheduler if is_continuous else CascadedDDPMScheduler)
        else:
            assert type(solver).__name__ == SOLVERS[name][0]
            assert solver.config.get("use_karras_sigmas", False) == (name == "heun")


@pytest.mark.parametrize("name", SOLVERS)
def test_nothing_is_warned_of_that_was_never_set(name, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    for stage in small_cascade().stages:
        solver = scheduler_of(stage, name)
        assert scheduler_of(replace(stage, scheduler=solver), "ancestral").config == stage.scheduler.config
    assert not caplog.records


@pytest.mark.parametrize("name", SOLVERS)
def test_a_single_step_begins_with_noise(name):
    for stage in small_cascade().stages:
        sampler = make_sampler(stage.name, stage.unet, scheduler_of(stage, name), 1, "cpu")
        noisiest = max(float(stage.scheduler.alphas_cumprod[-1].sqrt()), 0.08)  # where there is signal left
        assert len(sampler.timesteps) == 1 and sampler.alpha.item() <= noisiest + 1e-6


@pytest.mark.parametrize("name", SOLVERS)
def test_a_cascade_samples_with_each(name):
    changed = small_cascade().with_schedulers(name)
    changed.set_progress_bar_config(disable=True)
    images = changed([0, 1], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt")[0]
    assert images.isfinite().all() and images.std() > 0.01


def test_assembling_needs_no_evaluation(tmp_path):
    """Swapping a solver while what evaluation and training need is missing."""
    cascade = small_cascade(num_stages=2)
    for name in ("base", "super_res_1"):
        cascade.stage_pipeline(name).save_pretrained(tmp_path / name)
    program = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(('matplotlib', 'scipy', 'transformers', 'peft', 'datasets')))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    stages = ["--base", tmp_path / "base", "--super-res", tmp_path / "super_res_1", "--output", tmp_path / "cascade"]
    run("-c", program, "conversion/assemble_cascade.py", *stages, "--schedulers", '{"super_res_1": "heun"}')
    assembled = CascadedDiffusionPipeline.from_pretrained(tmp_path / "cascade")
    assert [solver_name(stage.scheduler) for stage in assembled.stages] == ["ancestral", "heun"]
