"""Time steps that are searched: the search itself, and calls and folders that have time steps of their own."""

import itertools
import json

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from known_gaussian import GaussianDenoiser
from small_cascade import small_cascade

from cdm_diffusers import (
    CascadedDDPMScheduler,
    CascadedDiffusionPipeline,
    ContinuousDDPMScheduler,
    SuperResolutionPipeline,
)
from cdm_diffusers.conversion.assemble_cascade import assemble_cascade
from cdm_diffusers.conversion.config import AssembleConfig
from cdm_diffusers.pipelines.solver_names import SOLVERS
from cdm_diffusers.pipelines.stages import StageOptions
from cdm_diffusers.studies.time_steps import best_grid, find_timesteps, fine_grid, follow, jump_costs


TIMES = {"super_res_1": [18, 9, 2], "super_res_2": [37, 20, 5, 1]}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(pipe, *arguments, **options) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(*arguments, generator=seeded(), output_type="pt", **options).images


# ---------------------------------------------------------------------------------------------------------------------
# The search


@pytest.mark.parametrize("growth", [1.0, 1.15, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 7])
def test_dynamic_programming_finds_what_trying_all_grids_finds(num_steps, growth):
    num_points = 7
    costs = np.random.default_rng(num_steps).random((num_points, num_points + 1))
    costs[np.tril_indices(num_points, 0, num_points + 1)] = np.inf

    def cost_of(grid: tuple[int, ...]) -> float:
        return sum(growth**k * costs[i, j] for k, (i, j) in enumerate(itertools.pairwise((*grid, num_points))))

    grids = [(0, *others) for others in itertools.combinations(range(1, num_points), num_steps - 1)]
    assert best_grid(costs, num_steps, growth) == list(min(grids, key=cost_of))


def test_more_steps_than_points_are_refused():
    with pytest.raises(ValueError, match="`num_inference_steps` is 4; it must be at most 3"):
        best_grid(np.ones((3, 4)), 4)


def gaussian_base(std: float) -> CascadedDiffusionPipeline:
    """Data whose pixels are N(0, std^2): x of the ODE is known, and the farther std is from 1 the more it bends."""
    scheduler = CascadedDDPMScheduler(1000, variance_type="fixed_small", clip_sample=False)
    unet = GaussianDenoiser(8, mean=0.0, std=std)
    unet.alphas_cumprod = scheduler.alphas_cumprod
    pipe = CascadedDiffusionPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_trajectories_of_a_gaussian_are_those_of_its_ode():
    """x / alpha at the noise sigma / alpha is proportional to sqrt(std^2 + (sigma / alpha)^2)."""
    pipe = gaussian_base(0.25)
    found = follow(pipe.stages[0], StageOptions(guidance_scale=1.0), None, None, seeded(), 4, num_points=400)
    exact = np.sqrt(0.25**2 + found.sigmas**2)
    ratio = found.points / found.points[:1]
    np.testing.assert_allclose(ratio, np.broadcast_to((exact / exact[0])[:, None, None], ratio.shape), rtol=0.05)
    assert found.sigmas[-1] == 0 and len(found.timesteps) + 1 == len(found.points)


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++", "unipc"])
@pytest.mark.parametrize("num_steps", [4, 8])
def test_the_searched_grid_ends_nearer_to_the_truth(solver, num_steps):
    std = 0.25
    pipe = gaussian_base(std)
    trajectories = follow(pipe.stages[0], StageOptions(guidance_scale=1.0), None, None, seeded(), 4)
    times = find_timesteps(trajectories, [num_steps])[num_steps]
    assert len(times) == num_steps and times == sorted(set(times), reverse=True)
    pipe = pipe.with_schedulers(solver)
    errors = []
    for grid in ({"num_inference_steps": num_steps}, {"timesteps": times}):
        made = images(pipe, batch_size=4, **grid) * 2 - 1
        errors.append(abs(made.std().item() / std - 1))
    assert errors[1] < 0.7 * errors[0]


def test_jumps_to_the_next_point_cost_nothing():
    pipe = gaussian_base(0.5)
    costs = jump_costs(follow(pipe.stages[0], StageOptions(guidance_scale=1.0), None, None, seeded(), 2, 10))
    assert np.isinf(costs[np.tril_indices(len(costs), 0, costs.shape[1])]).all()
    assert costs[np.arange(len(costs)), np.arange(len(costs)) + 1].max() < 1e-9 < costs[0, 2]


def test_the_fine_grid_falls_from_where_solvers_start():
    grid = fine_grid(CascadedDDPMScheduler(4000).alphas_cumprod)
    assert grid == sorted(set(grid), reverse=True) and grid[-1] == 0 and 3900 < grid[0] < 3999
    assert len(grid) > 50


# ---------------------------------------------------------------------------------------------------------------------
# Calls


@pytest.mark.parametrize("name", ["ancestral", *SOLVERS])
def test_evenly_spread_times_given_by_hand_change_nothing(name):
    """The solver's own times are its time steps, for those that choose no levels themselves; here all are whole."""
    cascade = small_cascade(num_stages=1).with_schedulers(name)
    for parameter in cascade.base_unet.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    sampler = cascade._runs(cascade.stages, cascade._options(cascade.stages, 10), False, None, "cpu")
    times = sampler[0].sampler.times.unique().flip(0).tolist()
    if name == "heun":
        with pytest.raises(ValueError, match="`timesteps` are given, but `use_karras_sigmas` is True"):
            images(cascade, [0, 1], timesteps=times)
        return
    torch.testing.assert_close(
        images(cascade, [0, 1], timesteps=times), images(cascade, [0, 1], num_inference_steps=10), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", ["ancestral", *(name for name in SOLVERS if name != "heun")])
def test_networks_are_told_the_times(name, monkeypatch):
    levels = small_cascade().super_res_2_scheduler.alphas_cumprod[torch.tensor(TIMES["super_res_2"])].sqrt()
    cascade, told = small_cascade().with_schedulers(name), []
    for stage in cascade.stages[1:]:
        forward = stage.unet.forward
        monkeypatch.setattr(
            stage.unet,
            "forward",
            lambda x, t, forward=forward, **further: told.append(float(t)) or forward(x, t, **further),
        )
    images(cascade, [0], timesteps=TIMES)
    assert told[:3] == TIMES["super_res_1"]
    assert told[3:] == pytest.approx(levels.tolist(), rel=1e-5)
    assert cascade.evaluations(timesteps=TIMES) == {"base": 3, "super_res_1": 3, "super_res_2": 4}


def test_heun_without_levels_of_its_own_takes_times():
    cascade = small_cascade(num_stages=1)
    cascade.base_scheduler = HeunDiscreteScheduler.from_config(cascade.base_scheduler.config)
    assert cascade.evaluations(timesteps=[15, 3]) == {"base": 3}
    assert images(cascade, [0], timesteps=[15, 3]).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": {"base": [3, 5]}}, r"`timesteps` of stage `base` is \[3, 5\]; it must be a list of indices in"),
        ({"timesteps": {"base": [20, 5]}}, r"it must be a list of indices in 0..19, from high to low"),
        ({"timesteps": {"base": []}}, r"`timesteps` of stage `base` is \[\]"),
        ({"timesteps": {"bass": [3]}}, r"`timesteps` names the stages \['bass'\]"),
        (
            {"timesteps": {"base": [9, 1]}, "num_inference_steps": 3},
            "has 2 entries, but `num_inference_steps` is 3: leave one",
        ),
    ],
)
def test_times_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        images(small_cascade(), [0], **options)


def test_a_time_without_signal_is_refused_where_solvers_do_not_start_there():
    cascade = small_cascade(num_stages=1).with_schedulers("unipc")
    with pytest.raises(ValueError, match=r"Stage `base`: `timesteps` begin at 19; .* must be below"):
        images(cascade, [0], timesteps=[19, 3])


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_stored_times_are_the_defaults_of_a_call(tmp_path):
    cascade = small_cascade(default_timesteps=TIMES)
    expected = images(small_cascade(), [0, 1], timesteps=TIMES)
    assert torch.equal(images(cascade, [0, 1]), expected)
    assert torch.equal(images(cascade, [0, 1], **cascade.stage_options()), expected)
    cascade.save_pretrained(tmp_path)
    loaded = CascadedDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(images(loaded, [0, 1]), expected)
    assert loaded.stage_options()["timesteps"] == TIMES
    assert loaded.stage_options()["num_inference_steps"] == {"base": 3, "super_res_1": 3, "super_res_2": 4}
    evenly = loaded.stage_options(num_inference_steps={"super_res_2": 4})
    assert evenly["timesteps"] == {"super_res_1": TIMES["super_res_1"]}
    assert not torch.equal(images(loaded, [0, 1], num_inference_steps={"super_res_2": 4}), expected)


def test_folders_without_times_say_nothing_of_them(tmp_path):
    small_cascade().save_pretrained(tmp_path)
    assert "default_timesteps" not in json.loads((tmp_path / "model_index.json").read_text())
    assert "timesteps" not in CascadedDiffusionPipeline.from_pretrained(tmp_path).stage_options()


def test_a_stage_of_two_times_is_saved_taken_out_and_joined(tmp_path):
    """Diffusers takes lists of two in an index for components."""
    cascade = small_cascade(default_timesteps={"super_res_1": [9, 2]})
    stage = cascade.stage_pipeline("super_res_1")
    stage.save_pretrained(tmp_path)
    loaded = SuperResolutionPipeline.from_pretrained(tmp_path)
    assert loaded.stage_options()["timesteps"] == [9, 2]
    image = torch.rand(1, 1, 4, 4, generator=seeded())
    assert torch.equal(images(loaded, image, 0), images(stage, image, 0, timesteps=[9, 2]))
    joined = CascadedDiffusionPipeline.from_stages(cascade.stage_pipeline("base"), loaded)
    assert joined.stage_options()["timesteps"] == {"super_res_1": [9, 2]}


def test_another_solver_does_not_inherit_times():
    cascade = small_cascade(default_timesteps=TIMES).with_schedulers({"super_res_1": "heun"})
    assert cascade.stage_options()["timesteps"] == {"super_res_2": TIMES["super_res_2"]}


def test_times_that_do_not_fit_are_refused_as_defaults():
    with pytest.raises(ValueError, match=r"`timesteps` of stage `super_res_1` is \[30\]"):
        small_cascade(default_timesteps={"super_res_1": [30]})
    with pytest.raises(ValueError, match="`default_timesteps` names the stages"):
        small_cascade(default_timesteps={"bass": [3]})


def test_a_number_of_steps_given_in_joining_replaces_times(tmp_path):
    small_cascade(default_timesteps=TIMES).save_pretrained(tmp_path / "cascade")
    steps = {"super_res_1": 6}
    config = AssembleConfig(
        base=str(tmp_path / "cascade"), output=str(tmp_path / "joined"), default_num_inference_steps=steps
    )
    assemble_cascade(config)
    options = CascadedDiffusionPipeline.from_pretrained(tmp_path / "joined").stage_options()
    assert options["timesteps"] == {"super_res_2": TIMES["super_res_2"]}
    assert options["num_inference_steps"] == {"base": 3, "super_res_1": 6, "super_res_2": 4}


@pytest.mark.parametrize("schedule", [{}, {"inference_beta_schedule": "squaredcos_cap_v2"}])
def test_noise_levels_of_times(schedule):
    """Whatever the schedule of inference; a reverse process that stops at s keeps the times above it."""
    scheduler = ContinuousDDPMScheduler(40, **schedule)
    scheduler.set_timesteps(timesteps=[37, 20, 5])
    levels = scheduler.alphas_cumprod[torch.tensor([5, 20, 37])]
    assert torch.equal(scheduler.inference_table.alphas_cumprod, levels) and scheduler.timesteps.tolist() == [2, 1, 0]
    scheduler.set_timesteps(timesteps=[37, 20, 5], stop_at=6)
    assert torch.equal(scheduler.inference_table.alphas_cumprod, levels[1:])
    with pytest.raises(ValueError, match="were both given"):
        scheduler.set_timesteps(3, timesteps=[37, 20, 5])
