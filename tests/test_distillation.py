"""Distillation: its targets against samplers and closed forms, and runs that end in students of few steps."""

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from forkserver import FORKSERVER
from known_gaussian import GaussianDenoiser
from safetensors.torch import load_file
from small_cascade import small_cascade
from test_commands import refusal
from test_training_loop import (
    CLASSES,
    AtDiskCalls,
    KillAt,
    assert_same_run,
    carry_out_here,
    images,  # noqa: F401
    in_process_groups,
)

from cdm_diffusers import (
    CascadedDDPMScheduler,
    CascadedDiffusionPipeline,
    CascadedUNet2DModel,
    DistillationLoss,
    SuperResolutionPipeline,
)
from cdm_diffusers.conversion.training_checkpoints import convert_training_checkpoint
from cdm_diffusers.diffusion import look_up, per_image, prediction_for
from cdm_diffusers.losses import GridTimes
from cdm_diffusers.pipelines.denoising import Denoiser, SolverSampler
from cdm_diffusers.pipelines.solvers import solver_on_grid
from cdm_diffusers.training.config import DistillationConfig
from cdm_diffusers.training.distillation import Phase, Predictor, distill, phases_of
from cdm_diffusers.training.teacher import (
    load_teacher,
    student_augmentation,
    student_preset,
    student_weights,
)


COSINE = CascadedDDPMScheduler(num_train_timesteps=1000, variance_type="fixed_small", prediction_type="v_prediction")
DDIM = DDIMScheduler.from_config(COSINE.config, timestep_spacing="trailing")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(prediction_type="v_prediction", **config):
    """The best denoiser of pixels from N(0.3, 0.25^2), for which x_0 needs no clipping."""
    network = GaussianDenoiser(prediction_type=prediction_type, **config)
    network.alphas_cumprod = COSINE.table.alphas_cumprod
    return network


def predicting_v(network):
    return Predictor(network, "v_prediction")


def loss_on_grid(teacher_steps, student_steps, **options):
    _, indices, levels = solver_on_grid(DDIM, teacher_steps)
    return DistillationLoss(levels.flip(0), indices.flip(0), student_steps, **options)


def noisy(loss, time):
    """x_t (B, 1, 4, 4) of the Gaussian's images, each at its own time of the grid."""
    times = loss.times(time)
    shape = (len(time), 1, 4, 4)
    x_0 = 0.3 + 0.25 * torch.randn(shape, generator=seeded(1))
    return per_image(times.alpha) * x_0 + per_image(times.sigma) * torch.randn(shape, generator=seeded(2))


def sampled(network, num_steps, x_t, prediction_type="v_prediction"):
    """x_t, at the grid's last time, and what the pipelines' sampler makes of it: all of its images."""
    scheduler = DDIMScheduler.from_config(DDIM.config, prediction_type=prediction_type)
    sampler, path = SolverSampler(scheduler, "timestep", num_steps, "cpu"), [x_t]
    for index in range(num_steps):
        path.append(sampler.step(index, Denoiser(network), path[-1], None))
    return path


class Exact(torch.nn.Module):
    """A student that has learnt its target: v or x_0 of x~, at the times of the student's grid."""

    dtype = torch.float32
    config = SimpleNamespace(patch_size=1, block_out_channels=(1,))

    def __init__(self, loss, teacher):
        super().__init__()
        self.loss, self.teacher = loss, teacher

    def forward(self, x_t, timestep, return_dict):
        time = (self.loss.tables["condition"][1:] == timestep).nonzero().flatten() + 1
        times, time = self.loss.times(time), time.expand(len(x_t))
        x_0 = self.loss.target(self.teacher, self.teacher, x_t, time)
        return (prediction_for(self.loss.prediction_type).of_x_0(x_0, x_t, times.alpha, times.sigma),)


# ---------------------------------------------------------------------------------------------------------------------
# Targets


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize(("teacher_steps", "student_steps"), [(2, 1), (8, 4), (64, 32)])
def test_a_student_arrives_where_two_steps_of_its_teacher_do(teacher_steps, student_steps, prediction_type):
    """On the whole way, from the same x_T, by the pipelines' sampler."""
    network, loss = gaussian(), loss_on_grid(teacher_steps, student_steps, prediction_type=prediction_type)
    x_T = torch.randn(5, 1, 4, 4, generator=seeded())
    path = sampled(network, teacher_steps, x_T)
    of_student = sampled(Exact(loss, partial(predicting_v(network), {})), student_steps, x_T, prediction_type)
    for ours, theirs in zip(of_student, path[::2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    assert (path[0] - path[-1]).abs().max() > 0.5


def test_targets_are_the_papers():
    """x~ = (z'' - (sigma'' / sigma) z) / (alpha'' - (sigma'' / sigma) alpha), of two DDIM steps in float64."""
    loss, network = loss_on_grid(8, 4), gaussian()
    time = torch.tensor([8, 6, 4, 2])
    x_t = noisy(loss, time)
    target = loss.target(partial(predicting_v(network), {}), partial(predicting_v(network), {}), x_t, time)

    levels = np.concatenate([[1.0], solver_on_grid(DDIM, 8)[2].flip(0).numpy()])
    alpha, sigma = (values[:, None, None, None] for values in (np.sqrt(levels), np.sqrt(1 - levels)))

    def ddim(z, t, s):
        x = 0.3 + alpha[t] * 0.25**2 * (z - alpha[t] * 0.3) / (alpha[t] ** 2 * 0.25**2 + sigma[t] ** 2)
        return alpha[s] * x + sigma[s] / sigma[t] * (z - alpha[t] * x)

    t, z = time.numpy(), x_t.double().numpy()
    after = ddim(ddim(z, t, t - 1), t - 1, t - 2)
    ratio = sigma[t - 2] / sigma[t]
    expected = (after - ratio * z) / (alpha[t - 2] - ratio * alpha[t])
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-4, atol=2e-6)


def test_targets_stay_in_the_range_of_images():
    """They are means of predictions, which are clipped: no sampler clips them again."""
    loss, network = loss_on_grid(8, 4), gaussian(mean=0.9, std=0.8)
    time = torch.tensor([8, 6, 4, 2]).repeat(50)
    target = loss.target(*[partial(predicting_v(network), {})] * 2, noisy(loss, time), time)
    assert target.abs().max() == 1 and (target.abs() < 1).any()


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("weighting", ["truncated_snr", "snr_plus_one"])
def test_the_loss_is_that_of_x_0_in_the_papers_weights(weighting, prediction_type):
    loss = loss_on_grid(8, 4, weighting=weighting, prediction_type=prediction_type)
    x_0 = 0.3 + 0.25 * torch.randn(64, 1, 4, 4, generator=seeded(1))
    seen, teacher = {}, partial(predicting_v(gaussian()), {})

    def student(x_t, condition):
        seen.update(x_t=x_t, condition=condition)
        return 0.5 * x_t

    ours = loss(student, teacher, teacher, x_0, seeded())
    time = torch.searchsorted(loss.tables["condition"][1:], seen["condition"]) + 1
    assert set(time.tolist()) == {2, 4, 6, 8}
    alpha, sigma = (per_image(values.double()) for values in loss.times(time)[1:])
    predicted = output = 0.5 * seen["x_t"].double()
    if prediction_type == "v_prediction":
        predicted = alpha * seen["x_t"].double() - sigma * output
    squares = (loss.target(teacher, teacher, seen["x_t"], time).double() - predicted) ** 2
    snr = (alpha / sigma) ** 2
    weight = snr.clamp(min=1) if weighting == "truncated_snr" else snr + 1
    torch.testing.assert_close(ours.double(), (weight * squares).mean((1, 2, 3)), rtol=2e-4, atol=1e-8)


def test_consistency_targets_are_the_students_own_a_step_later():
    """Song et al.'s for one step; for two, at the end of each part the teacher's (Heek et al.)."""
    teacher = partial(predicting_v(gaussian()), {})
    time = torch.arange(1, 9)

    def own(x_t, times):
        return x_t.tanh() * 0.5

    whole, halves = (loss_on_grid(8, steps, anywhere=True) for steps in (1, 2))
    assert whole.tables["start"].tolist() == time.tolist()
    x_t = noisy(whole, time)
    x_0 = teacher(x_t, whole.times(time))
    before = whole.times(time - 1)
    x_before = per_image(before.alpha) * x_0 + per_image(before.sigma / whole.times(time).sigma) * (
        x_t - per_image(whole.times(time).alpha) * x_0
    )
    target = whole.target(teacher, own, x_t, time)
    torch.testing.assert_close(target[1:], own(x_before, None)[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target[:1], x_0[:1])
    target = halves.target(teacher, own, x_t, time)
    torch.testing.assert_close(target[[0, 4]], x_0[[0, 4]])
    share = look_up(halves.tables["share"], time)
    assert (share[[0, 4]] == 0).all() and ((share > 0) & (share <= 1))[[1, 2, 3, 5, 6, 7]].all()


@pytest.mark.parametrize(
    ("prediction_type", "of_student"),
    [("epsilon", "v_prediction"), ("v_prediction", "v_prediction"), ("sample", "sample")],
)
def test_in_as_many_steps_students_learn_what_their_teacher_predicts(prediction_type, of_student):
    """The variance is left out, and the target is the v or x_0 that the teacher's x_0 stands for."""
    loss = loss_on_grid(8, 8, prediction_type=of_student)
    network = gaussian(prediction_type, learned_variance=True)

    def student(x_t, condition):
        return gaussian(of_student)(x_t, condition)[0]

    x_0 = 0.3 + 0.25 * torch.randn(64, 1, 4, 4, generator=seeded(1))
    losses = loss(student, partial(Predictor(network, prediction_type), {}), None, x_0, seeded())
    # epsilon of float32, divided by alpha of 0.006
    assert losses.max() < (1e-8 if prediction_type == "epsilon" else 1e-11)


def test_guidance_is_folded_in_at_times_and_levels_of_each_image():
    cascade = small_cascade()
    for stage in cascade.stages[:2]:
        torch.nn.init.normal_(stage.unet.conv_out.weight, std=0.1)
        conditions = {"class_labels": torch.tensor([0, 1, 2])}
        if stage.name != "base":
            conditions |= {"low_res": torch.rand(3, 1, 4, 4), "augmentation_level": torch.tensor([0, 5, 20])}
        size = stage.unet.config.sample_size
        x_t, index = torch.randn(3, 1, size, size, generator=seeded()), torch.tensor([4, 9, 14])
        alpha, sigma = COSINE.table.signal_and_noise(index + 1)
        x_0 = Predictor(stage.unet, "epsilon", 1.5)(conditions, x_t, GridTimes(index, alpha, sigma))
        for row in range(3):
            of_row = {name: values[row : row + 1] for name, values in conditions.items()}
            of_class, of_null = (
                stage.unet(x_t[row : row + 1], index[row], **of_row | {"class_labels": torch.tensor([label])}).sample
                for label in (row, 3)
            )
            epsilon = of_null + 1.5 * (of_class - of_null)
            expected = ((x_t[row] - sigma[row] * epsilon) / alpha[row]).clamp(-1, 1)
            torch.testing.assert_close(x_0[row : row + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_students_begin_with_their_teachers_weights(patch_size):
    """What they predict is what the teacher does, without its variance."""
    arguments = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "num_attention_heads": 1}
    arguments |= {"attention_resolutions": (), "num_classes": 3, "patch_size": patch_size}
    teacher = CascadedUNet2DModel(learned_variance=True, null_class=True, **arguments)
    torch.nn.init.normal_(teacher.conv_out.weight)
    student = CascadedUNet2DModel(**arguments)
    student.load_state_dict(student_weights(teacher, student))
    call = torch.randn(2, 3, 8, 8), torch.tensor([3, 7]), torch.tensor([0, 2])
    torch.testing.assert_close(student(*call).sample, teacher(*call).sample[:, :3])


# ---------------------------------------------------------------------------------------------------------------------
# Options


def options(**given):
    return DistillationConfig(**{"pipeline": "x", "output_dir": "y", "dataset_name": "a/b"} | given)


def test_phases():
    phases = phases_of(options(start_steps=16, end_steps=1, phase_steps=[10]), learns_v=True)
    assert phases == [
        Phase(16, 16, 0, 10),
        Phase(16, 8, 10, 20),
        Phase(8, 4, 20, 30),
        Phase(4, 2, 30, 50),
        Phase(2, 1, 50, 70),
    ]
    phases = phases_of(options(start_steps=12, end_steps=3, phase_steps=[5, 7]), learns_v=False)
    assert phases == [Phase(12, 6, 0, 5), Phase(6, 3, 5, 12)]
    given = options(start_steps=30, end_steps=2, method="consistency", phase_steps=[5])
    assert phases_of(given, learns_v=True) == [Phase(30, 30, 0, 5), Phase(30, 2, 5, 15)]
    assert phases_of(given, learns_v=False) == [Phase(30, 2, 0, 10)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"start_steps": 6, "end_steps": 4}, r"`start_steps` is 6; it must be `end_steps`, 4, times 2, 4, 8, \.\.\."),
        ({"start_steps": 12, "end_steps": 2}, r"`start_steps` is 12; it must be `end_steps`, 2, times 2, 4, 8"),
        ({"start_steps": 4, "end_steps": 4, "method": "consistency"}, "`start_steps` is 4; .* times 2 or more"),
        ({"phase_steps": [1, 2]}, r"`phase_steps` is \[1, 2\]; it must be 1 number, or 4: 64 to 32, 32 to 16"),
        (
            {"timesteps": [9, 5, 1], "end_steps": 2},
            "The number of `timesteps` is 3; it must be `end_steps`, 2, times 2",
        ),
        ({"timesteps": [9, 5, 1], "start_steps": 4}, "`start_steps` is 4, but `timesteps` has 3 entries: leave one"),
    ],
)
def test_phases_that_do_not_add_up_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        phases_of(options(**given), learns_v=False)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """4x4 -> 8x8 of the images' classes: a guided base that predicts epsilon, and a stage that is told s."""
    folder = tmp_path_factory.mktemp("teacher") / "cascade"
    pipeline = small_cascade(2, id2label=dict(enumerate(CLASSES)), default_guidance_scales={"base": 1.5})
    for stage in pipeline.stages:
        torch.nn.init.normal_(stage.unet.conv_out.weight, std=0.05)
    pipeline.save_pretrained(folder)
    return str(folder)


def test_what_is_said_of_stages_that_are_not_there(cascade, capsys, tmp_path):
    words = ["distill", cascade, "--output_dir", str(tmp_path / "run"), "--train_data_dir", str(tmp_path)]
    for further, said in (
        (["--stage", "super_res_2"], f"`stage` is 'super_res_2'; it must be one of the stages of {cascade!r}"),
        ([], "`stage` is None; it must be one of the stages"),
        (["--stage", "base", "--augmentation_level", "3"], "`augmentation_level` of stage `base` is 3"),
        (["--stage", "base", "--start_steps", "5"], "`start_steps` is 5"),
        (["--stage", "base", "--method", "progresive"], "`method` is 'progresive'"),
        (["--stage", "base", "--timesteps", "3", "9", "--end_steps", "1"], "`timesteps` is [3, 9]; it must be a list"),
        (["--stage", "base", "--timesteps", "99", "9", "--end_steps", "1"], "a list of indices in 0..19, from high"),
    ):
        assert said in refusal(capsys, *words, *further)
    assert "nothing" in refusal(capsys, "distill", str(tmp_path / "nothing"), *words[2:])


def test_s_is_the_teachers(cascade):
    """All s where it is told s, or the one that was asked for."""
    for given, level in (({}, None), ({"augmentation_level": 7}, 7)):
        config = options(pipeline=cascade, stage="super_res_1", end_steps=1, **given)
        teacher = load_teacher(config)
        assert teacher.stage.name == "super_res_1"
        assert student_augmentation(teacher, config.augmentation_level).level == level
        preset = student_preset(config, teacher, 10, 1)
        assert preset.inference.augmentation_level == (level or 5)
        assert preset.unet.augmentation_level_embedding and not preset.unet.null_class
    base = load_teacher(options(pipeline=cascade, stage="base"))
    assert student_augmentation(base, None) is None


# ---------------------------------------------------------------------------------------------------------------------
# Runs

TINY = {
    "start_steps": 4,
    "end_steps": 1,
    "phase_steps": [2, 2, 2],
    "train_batch_size": 4,
    "checkpointing_steps": 1,
    "source_resolution": 8,
    "learning_rate": 1e-3,
    "random_flip": True,
    "validation_steps": 0,
    "report_to": "none",
    "logging_steps": 2,
}


def distil_here(given, before=None):
    return carry_out_here(distill, DistillationConfig(**given), before)


def run(given, before=None):
    """A distillation in a process of its own; its exceptions are raised here."""
    with ProcessPoolExecutor(1, mp_context=FORKSERVER) as pool:
        return pool.submit(distil_here, given, before).result()


@pytest.fixture(scope="module")
def base_options(cascade, images):  # noqa: F811
    return TINY | {"pipeline": cascade, "stage": "base", "train_data_dir": str(images)}


@pytest.fixture(scope="module")
def unbroken(base_options, tmp_path_factory):
    """A run that nothing stopped: v, then two halvings."""
    folder = tmp_path_factory.mktemp("unbroken")
    run(base_options | {"output_dir": str(folder)})
    return folder


def test_students_are_stages_as_any_other(cascade, unbroken, tmp_path):
    """Their defaults are the grid of the distillation; they join, save, and say where they come from."""
    teacher = CascadedDiffusionPipeline.from_pretrained(cascade)
    for folder, num_steps in ((unbroken / "student-4-steps", 4), (unbroken / "student-2-steps", 2), (unbroken, 1)):
        student = CascadedDiffusionPipeline.from_pretrained(folder)
        assert student.config.default_num_inference_steps == {"base": num_steps}
        assert student.base_scheduler.config.prediction_type == "v_prediction"
        assert not student.base_unet.config.null_class and not student.base_unet.config.learned_variance
        solver, indices, _ = solver_on_grid(student.base_scheduler, num_steps)
        assert solver.__class__ is DDIMScheduler
        assert indices.tolist() == [18, 13, 9, 4][:: 4 // num_steps]  # of 19 times with signal left
    joined = CascadedDiffusionPipeline.from_stages(unbroken, teacher.stage_pipeline("super_res_1"))
    assert joined.evaluations() == {"base": 1, "super_res_1": 3}
    assert joined("boot", output_type="pt").images.shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="label dropout"):
        joined("boot", guidance_scale={"base": 2.0})

    said = json.loads((unbroken / "training_config.json").read_text())["distillation"]
    assert said.pop("fingerprint") == load_teacher(options(pipeline=cascade, stage="base")).fingerprint
    assert said == {
        "pipeline": cascade,
        "stage": "base",
        "method": "progressive",
        "guidance_scale": 1.5,
        "augmentation_level": None,
        "loss_weighting": "truncated_snr",
        "phases": [[4, 4, 2], [4, 2, 2], [2, 1, 2]],
        "timesteps": None,
    }
    card = (unbroken / "README.md").read_text()
    assert "base is distilled from stage base of cascade" in card and "w = 1.5" in card and "in 1 step of DDIM" in card


def test_checkpoints_are_students_of_their_phase(unbroken, tmp_path):
    for step, num_steps in ((1, 4), (3, 2), (6, 1)):
        convert_training_checkpoint(unbroken / f"checkpoint-{step}", tmp_path / str(step))
        student = CascadedDiffusionPipeline.from_pretrained(tmp_path / str(step))
        assert student.config.default_num_inference_steps == {"base": num_steps}


def test_phases_go_on_from_the_averaged_student(base_options, unbroken):
    """Network, average and teacher of a phase's first step; a new optimizer, and the learning rate from its top."""
    averages = load_file(unbroken / "checkpoint-2" / "ema.safetensors")
    teacher = load_file(unbroken / "checkpoint-3" / "teacher.safetensors")
    assert teacher.keys() == averages.keys() and all(torch.equal(teacher[name], averages[name]) for name in averages)
    assert not (unbroken / "checkpoint-2" / "teacher.safetensors").exists()
    optimizer = torch.load(unbroken / "checkpoint-3" / "optimizer.bin", weights_only=True)
    assert {state["step"].item() for state in optimizer["state"].values()} == {1}
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(base_options["learning_rate"] / 2)
    weights = load_file(unbroken / "checkpoint-3" / "model.safetensors")
    moved = max((weights[name] - averages[name]).abs().max() for name in averages)
    assert 0 < moved < 2 * base_options["learning_rate"]  # a step of Adam from the average


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_resumed_across_halvings_to_the_bit(base_options, unbroken, tmp_path, step):
    shutil.copytree(unbroken / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    run(base_options | {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"})
    assert_same_run(tmp_path, unbroken)
    students = [f"student-{num_steps}-steps" for num_steps, end in ((2, 4), (4, 2)) if step <= end]
    assert sorted(folder.name for folder in tmp_path.glob("student-*")) == students
    for name in students:
        file = f"{name}/base_unet/diffusion_pytorch_model.safetensors"
        assert (tmp_path / file).read_bytes() == (unbroken / file).read_bytes()


@pytest.mark.parametrize("count", [60, 110])
def test_killed_and_resumed_to_the_bit(base_options, unbroken, tmp_path, count):
    killed = base_options | {"output_dir": str(tmp_path)}
    with pytest.raises(BrokenProcessPool):
        run(killed, AtDiskCalls(KillAt(count)))
    assert not (tmp_path / "model_index.json").exists()
    run(killed | {"resume_from_checkpoint": "latest"})
    assert_same_run(tmp_path, unbroken)


def test_another_teacher_is_not_resumed(base_options, unbroken, tmp_path):
    shutil.copytree(base_options["pipeline"], tmp_path / "other")
    pipeline = CascadedDiffusionPipeline.from_pretrained(tmp_path / "other")
    torch.nn.init.normal_(pipeline.base_unet.conv_out.weight)
    pipeline.save_pretrained(tmp_path / "other")
    other = base_options | {"pipeline": str(tmp_path / "other"), "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=r"this is another run: distillation.fingerprint \("):
        run(other | {"resume_from_checkpoint": str(unbroken / "checkpoint-3")})


def test_data_of_other_classes_are_refused(base_options, tmp_path):
    names = {"label_names": "coat,bag,boot", "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="The data has other classes: number 0 is 'coat' and not 'bag'"):
        run(base_options | names)


class TimesOfCalls:
    """Writes to a file, for every call of a network, the times that it is given."""

    def __init__(self, file):
        self.file = file

    def __call__(self):
        call = CascadedUNet2DModel.forward

        def recorded(unet, sample, timestep, *args, **kwargs):
            with self.file.open("a") as file:
                file.write(f"{unet.training} {' '.join(str(int(time)) for time in timestep)}\n")
            return call(unet, sample, timestep, *args, **kwargs)

        CascadedUNet2DModel.forward = recorded


def test_times_can_be_chosen(base_options, tmp_path):
    """Students learn, and are sampled, at every second of the teacher's times; their teachers are called at all."""
    times = [18, 11, 6, 2]
    given = base_options | {"timesteps": times, "start_steps": None, "output_dir": str(tmp_path / "run")}
    run(given | {"checkpointing_steps": 6}, TimesOfCalls(tmp_path / "calls"))
    for folder, num_steps in (("run/student-4-steps", 4), ("run/student-2-steps", 2), ("run", 1)):
        student = CascadedDiffusionPipeline.from_pretrained(tmp_path / folder)
        assert student.config.default_timesteps == {"base": times[:: 4 // num_steps]}
        assert student.stage_options()["timesteps"] == {"base": times[:: 4 // num_steps]}
        assert student.evaluations() == {"base": num_steps}
    assert student("boot", output_type="pt").images.isfinite().all()
    said = json.loads((tmp_path / "run" / "training_config.json").read_text())
    assert said["distillation"]["timesteps"] == times and said["inference"]["timesteps"] == [18]
    assert "Time steps: base 18." in (tmp_path / "run" / "README.md").read_text()

    called = {True: [], False: []}  # of students that learn, and of teachers
    for line in (tmp_path / "calls").read_text().splitlines():
        is_student, *at = line.split()
        called[is_student == "True"].append(set(map(int, at)))
    of_phases = [set().union(*called[True][first : first + 2]) for first in (0, 2, 4)]
    assert of_phases[0] <= set(times) and of_phases[1] <= {18, 6} and of_phases[2] == {18}
    assert len(of_phases[0]) > 2
    assert set().union(*called[False]) == set(times)

    with pytest.raises(
        ValueError, match=r"this is another run: distillation.phases .*; distillation.timesteps \(\[18, 11, 6, 2\]"
    ):
        run(given | {"timesteps": [18, 10, 6, 2], "resume_from_checkpoint": "latest", "phase_steps": [3, 2, 2]})
    with pytest.raises(ValueError, match="`timesteps` begin at 19; with DDIMScheduler they must be below 19"):
        run(given | {"timesteps": [19, 10, 6, 2], "output_dir": str(tmp_path / "other")})


def test_super_resolution_by_consistency(cascade, base_options, tmp_path):
    """At one s, validated on the way, and the samples of the student are what its defaults make."""
    given = base_options | {"stage": "super_res_1", "method": "consistency", "output_dir": str(tmp_path)}
    given |= {"augmentation_level": 7, "end_steps": 2, "phase_steps": [2, 4], "validation_steps": 3}
    run(given | {"num_validation_images": 4})
    saved = json.loads((tmp_path / "training_config.json").read_text())
    assert saved["distillation"]["augmentation_level"] == saved["augmentation"]["level"] == 7
    assert saved["distillation"]["stage"] == "super_res_1"
    assert saved["distillation"]["phases"] == [[4, 4, 2], [4, 2, 4]]
    base = CascadedDiffusionPipeline.from_pretrained(cascade).stage_pipeline("base")
    joined = CascadedDiffusionPipeline.from_stages(base, tmp_path)
    assert joined.evaluations() == {"base": 6, "super_res_1": 2}
    assert joined.config.default_augmentation_levels == {"super_res_1": 7}
    assert joined("bag", output_type="pt").images.isfinite().all()
    assert (tmp_path / "samples" / "step-3.png").exists()


@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_teachers_that_predict_x_0_have_students_that_do(base_options, tmp_path, method):
    """A teacher that predicts the upsampled image at all times has nothing to teach: no weight moves in any phase."""
    stage = small_cascade(2).stages[1]
    unet = CascadedUNet2DModel.from_config(stage.unet.config, augmentation_level_embedding=False, low_res_skip=True)
    scheduler = CascadedDDPMScheduler.from_config(stage.scheduler.config, prediction_type="sample")
    teacher = SuperResolutionPipeline(
        unet, scheduler, id2label=dict(enumerate(CLASSES)), default_num_inference_steps=4, source_resolution=8
    )
    teacher.save_pretrained(tmp_path / "teacher")
    given = {"pipeline": str(tmp_path / "teacher"), "stage": None, "guidance_scale": None, "end_steps": 1}
    given |= {"method": method, "phase_steps": [2], "output_dir": str(tmp_path / "student")}
    run(base_options | given)
    student = SuperResolutionPipeline.from_pretrained(tmp_path / "student")
    assert student.scheduler.config.prediction_type == "sample" and student.unet.config.low_res_skip
    said = json.loads((tmp_path / "student" / "training_config.json").read_text())["distillation"]
    assert said["phases"] == ([[4, 2, 4], [2, 1, 4]] if method == "progressive" else [[4, 1, 4]])
    weights = unet.state_dict()
    for name, ours in student.unet.state_dict().items():
        torch.testing.assert_close(ours, weights[name][: len(ours)], rtol=0, atol=1e-6)  # the null class is left out


def test_students_predict_v_or_x_0():
    with pytest.raises(ValueError, match="`prediction_type` is 'epsilon'; it must be 'v_prediction' or 'sample'"):
        loss_on_grid(8, 4, prediction_type="epsilon")


def test_two_processes_take_the_same_steps(base_options, unbroken, tmp_path):
    given = base_options | {"output_dir": str(tmp_path), "train_batch_size": 2}
    with ProcessPoolExecutor(2, mp_context=FORKSERVER) as pool:
        futures = [pool.submit(distil_here, given, group) for group in in_process_groups(2)]
        assert [future.result() for future in futures] == [2, 2]
    ours, theirs = (load_file(folder / "checkpoint-6" / "ema.safetensors") for folder in (tmp_path, unbroken))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
