"""The distilled cascades that ship with the repository: few calls, and clothes and faces all the same."""

import json
from pathlib import Path

import pytest
import torch

from cdm_diffusers import CascadedDiffusionPipeline
from cdm_diffusers.evaluation.classifier import Classifier
from cdm_diffusers.evaluation.sample import counted_evaluations
from cdm_diffusers.evaluation.tables import quality_table, recognition_tables
from cdm_diffusers.pipelines.fingerprints import fingerprint


CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
STUDENT = CHECKPOINTS / "fashion-mnist-32-distilled"


@pytest.fixture(scope="module")
def pipe():
    pipe = CascadedDiffusionPipeline.from_pretrained(STUDENT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_its_defaults_are_seven_calls_and_its_samples_are_recognised(pipe):
    labels = torch.arange(10).repeat_interleave(8)
    with counted_evaluations(pipe) as evaluations:
        images = pipe(labels.tolist(), generator=torch.Generator().manual_seed(7), output_type="pt").images
    assert evaluations == {"base": 4 * 80, "super_res_1": 2 * 80, "super_res_2": 80}
    classifier = Classifier.from_pretrained(CHECKPOINTS / "fashion-mnist-classifier")
    with torch.no_grad():
        logits, _ = classifier(2 * images - 1)
    data = json.loads((STUDENT / "recognition.json").read_text())["stages"]["super_res_2"]["data"]
    # The standard error of the mean of 80 images is 0.03.
    assert (2 * images - 1).mean().item() == pytest.approx(data["mean"], abs=0.12)
    # At a true rate of 90%, fewer than 64 of 80 has a probability of 0.2%.
    assert (logits.argmax(1) == labels).float().mean() >= 0.8


@pytest.mark.parametrize(
    "student, distilled",
    [("fashion-mnist-32-distilled", {"base", "super_res_1"}), ("avatars-256-distilled", {"base"})],
)
def test_what_they_say_of_their_teachers_is_true(student, distilled):
    """Stages that were not distilled are their teacher's."""
    configs = json.loads((CHECKPOINTS / student / "training_config.json").read_text())
    pipe, teacher = (
        CascadedDiffusionPipeline.from_pretrained(CHECKPOINTS / name)
        for name in (student, student.removesuffix("-distilled"))
    )
    for stage, of_teacher in zip(pipe.stages, teacher.stages, strict=True):
        said = configs[stage.name].get("distillation")
        assert (stage.name in distilled) == (said is not None)
        if said is None:
            weights = of_teacher.unet.state_dict()
            assert all(torch.equal(weight, weights[name]) for name, weight in stage.unet.state_dict().items())
        else:
            assert (CHECKPOINTS / student.removesuffix("-distilled")).match(said["pipeline"])
            assert said["stage"] == stage.name and said["fingerprint"] == fingerprint([of_teacher])
            assert said["phases"][-1][1] == pipe.config.default_num_inference_steps[stage.name]


def test_avatars_take_eight_calls_and_look_like_their_teachers():
    """The same noise makes nearly the same 16x16 images, which the stages after it start from."""
    student, teacher = (
        CascadedDiffusionPipeline.from_pretrained(CHECKPOINTS / name)
        for name in ("avatars-256-distilled", "avatars-256")
    )
    student.set_progress_bar_config(disable=True)
    teacher.set_progress_bar_config(disable=True)
    with counted_evaluations(student) as evaluations:
        student(["micah"], generator=torch.Generator().manual_seed(0), output_type="pt")
    assert evaluations == {"base": 4, "super_res_1": 3, "super_res_2": 1}
    assert student.evaluations(settings="fewest") == {"base": 3, "super_res_1": 3, "super_res_2": 1}
    assert set(student.config.settings["fewest"]["timesteps"]["base"]) < {3983, 2999, 1999, 999}  # what it was taught
    images = [
        pipe.stage_pipeline("base")(
            list(range(13)), generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images
        for pipe in (student, teacher)
    ]
    between = (images[0][:, None] - images[1][None]).abs().mean((2, 3, 4))  # (13, 13), of a range of 1
    assert between.diagonal().mean() < 0.05 < between[~torch.eye(13, dtype=torch.bool)].min()


def test_the_card_has_what_was_measured():
    card = "".join((STUDENT / "README.md").read_text().split())
    for report, table in (("recognition", recognition_tables), ("quality", quality_table)):
        assert "".join(table(json.loads((STUDENT / f"{report}.json").read_text())).split()) in card
