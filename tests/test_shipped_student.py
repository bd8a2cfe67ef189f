"""The distilled cascade that ships with the repository: few calls, and clothes all the same."""

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
STUDENT, TEACHER = CHECKPOINTS / "fashion-mnist-32-distilled", CHECKPOINTS / "fashion-mnist-32"


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


def test_what_it_says_of_its_teacher_is_true(pipe):
    configs = json.loads((STUDENT / "training_config.json").read_text())
    teacher = CascadedDiffusionPipeline.from_pretrained(TEACHER)
    for name in ("base", "super_res_1"):
        said = configs[name]["distillation"]
        stage = next(stage for stage in teacher.stages if stage.name == name)
        assert TEACHER.match(said["pipeline"]) and said["stage"] == name
        assert said["fingerprint"] == fingerprint([stage])
        assert said["phases"][-1][1] == pipe.config.default_num_inference_steps[name]
    last = pipe.super_res_2_unet.state_dict()
    assert all(torch.equal(last[name], weight) for name, weight in teacher.super_res_2_unet.state_dict().items())


def test_the_card_has_what_was_measured():
    card = "".join((STUDENT / "README.md").read_text().split())
    for report, table in (("recognition", recognition_tables), ("quality", quality_table)):
        assert "".join(table(json.loads((STUDENT / f"{report}.json").read_text())).split()) in card
