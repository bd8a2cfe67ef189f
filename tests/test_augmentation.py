"""What `cdm reproduce augmentation` concludes, from features of which the right verdict is known."""

import pytest
import torch

from cdm_diffusers.evaluation.metrics import FeatureStatistics
from cdm_diffusers.studies.augmentation import check_gate, compare_inputs, ratio_of, verdict_of
from cdm_diffusers.studies.config import ReproduceConfig, read_settings
from cdm_diffusers.studies.experiments import CONTROL, GOOD, TRAIN, WEAK, AugmentationExperiment


WIDTH, NUM_IMAGES, LEVELS = 4, 1000, (0, 500, 1000)
REFERENCE = FeatureStatistics(
    torch.zeros(WIDTH, dtype=torch.float64), torch.eye(WIDTH, dtype=torch.float64), 10**6
)  # N(0, c^2) is (c - 1)^2 away in each of 4 directions
TRUTH = (1.4, 1.4, 1.45)
REPAIRED = (1.8, 1.5, 1.7)


def swept(*trainings):
    """Features of each training by level: the same noise in all rows, times each row's scale."""
    noise = torch.randn(NUM_IMAGES, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {level: [scales[place] * noise for scales in trainings] for place, level in enumerate(LEVELS)}


def concluded(weak=(REPAIRED,) * 3, good=(TRUTH,) * 3, control=(REPAIRED,) * 3, truth=(TRUTH,) * 3):
    features = {WEAK: swept(*weak), GOOD: swept(*good), CONTROL: swept(*control), TRAIN: swept(*truth)}
    compared = compare_inputs(features, REFERENCE, margin=0.03)
    assert [one["input"] for one in compared] == [WEAK, GOOD, CONTROL]
    return compared


def test_a_benefit_with_the_weak_base_and_none_with_the_good_one():
    weak, good, control = concluded(weak=[(1.8, 1.5, 1.7), (1.81, 1.5, 1.7), (1.79, 1.5, 1.7)])
    assert [one["verdict"] for one in (weak, good, control)] == ["benefit", "none", "benefit"]
    assert [one["prediction"] for one in (weak, good, control)] == ["benefit", "none", "benefit"]
    assert weak["level"] == 500
    exact = 4 * (0.5**2 - 0.8**2)  # on ground truth, s = 500 changes nothing
    error = weak["beyond_ground_truth"]["standard_error"]
    assert weak["beyond_ground_truth"]["value"] == pytest.approx(exact, abs=2.5 * error) and error < -exact / 8
    assert weak["distance"] == pytest.approx(4 * 0.8**2, rel=0.2)
    assert weak["beyond_ground_truth"]["over_trainings"]["sign_test"] == pytest.approx(0.25)
    low, high = weak["beyond_ground_truth"]["interval_over_images"]
    assert low < weak["beyond_ground_truth"]["value"] < high < 0


@pytest.mark.parametrize(
    ("weak", "verdict", "of_these"),
    [
        ([(1.8, 1.8, 1.9)] * 3, "refuted", "refuted"),  # s does nothing, though the base is bad
        ([(1.8, 1.802, 1.9)] * 3, "refuted", "refuted"),  # by less than 3% of the distance
        ([(1.8, 1.95, 2.0)] * 3, "worse", "worse"),
        ([(1.8, 1.6, 2.0), (1.8, 1.9, 2.0), (1.8, 1.5, 2.0)], "undecided", "benefit"),  # trainings disagree
    ],
)
def test_other_verdicts_on_the_weak_base(weak, verdict, of_these):
    result = concluded(weak=weak)[0]
    assert (result["verdict"], result["verdict_of_these_trainings"]) == (verdict, of_these)


def test_what_changes_real_images_as_much_is_no_benefit():
    """An artefact of the network at s = 0, which lowers all distances by the same."""
    artefact = (1.8, 1.4, 1.5)
    weak, good, _ = concluded(
        weak=[artefact] * 3, truth=[artefact] * 3, good=[artefact] * 3, control=[(2.6, 1.4, 1.5)] * 3
    )
    assert weak["change"]["value"] < -1 and (weak["verdict"], good["verdict"]) == ("refuted", "none")


def test_what_only_harms_real_images_more_is_no_benefit():
    """Beyond ground truth's its change is below 0, but nothing has become better."""
    weak = concluded(weak=[(1.8, 1.85, 1.9)] * 3, truth=[(1.2, 1.6, 1.7)] * 3)[0]
    assert weak["beyond_ground_truth"]["interval"][1] < 0 < weak["change"]["interval"][0]
    assert weak["verdict"] == "undecided"


def test_without_the_effect_in_the_positive_control_nothing_is_concluded():
    weak, good, control = concluded(control=[(1.8, 1.8, 1.8)] * 3)
    assert [one["verdict"] for one in (weak, good, control)] == ["void", "void", "none"]


def test_one_training_is_judged_by_its_images():
    weak = concluded(weak=[REPAIRED], good=[TRUTH], control=[REPAIRED], truth=[TRUTH])[0]
    assert weak["beyond_ground_truth"]["over_trainings"] is None and weak["verdict"] == "benefit"
    assert weak["beyond_ground_truth"]["interval"] == weak["beyond_ground_truth"]["interval_over_images"]


@pytest.mark.parametrize(
    ("beyond", "change", "verdict"),
    [
        ([-0.03, 0.03], [-1, -1], "none"),
        ([-0.029, -0.01], [-1, -1], "none"),
        ([-0.031, -0.01], [-1, -0.5], "benefit"),
        ([-0.031, -0.01], [-1, 0.5], "undecided"),
        ([0.01, 0.031], [-1, 1], "worse"),
        ([-0.031, 0.01], [-1, -0.5], "undecided"),
    ],
)
def test_words(beyond, change, verdict):
    assert verdict_of(beyond, change, 0.03) == verdict


def test_the_gate():
    assert check_gate([1.4, 1.3], [1.0, 1.0], 1.3) == pytest.approx(
        {"weak": 1.35, "ground_truth": 1.0, "ratio": 1.35, "needed": 1.3}
    )
    with pytest.raises(
        ValueError, match=r"smallest s is 1.25, 1.25 times that .* \(1\); it must be at least 1.3 times"
    ):
        check_gate([1.3, 1.2], [1.0, 1.0], 1.3)
    assert check_gate([0.1], [-0.01], 1.3)["ratio"] == float("inf")


def test_the_solver_is_compared_with_its_check():
    same, other = swept((1.5, 1.6, 1.7))[0][0], swept((1.5, 1.6, 1.7))[500][0]
    assert ratio_of([(same, same)] * 2, REFERENCE)["interval"] == pytest.approx([1, 1])
    ratio = ratio_of([(same, other)], REFERENCE)
    assert ratio["value"] == pytest.approx((0.5 / 0.6) ** 2, rel=0.05) and ratio["interval"][1] < 1


def test_the_configuration_is_the_design():
    """That of docs/results.md, in configs/augmentation.json."""
    config = ReproduceConfig(name="augmentation", config="configs/augmentation.json", output_dir="x")
    settings = read_settings(config)
    experiment = settings.experiment("augmentation")
    assert isinstance(experiment, AugmentationExperiment)
    assert (experiment.gate, experiment.margin) == (1.3, 0.03)
    levels = [0, 100, 250, 500, 1000, 1500, 2000, 2500, 3200]
    assert list(dict.fromkeys(row.x for row in experiment.rows if row.x is not None)) == levels
    assert len(experiment.rows) == 5 * 9 * 3 + 3 and settings.sampling.num_images >= 1000
    for row in experiment.rows[:-3]:
        assert row.arm.sampling["num_inference_steps"]["super_res_1"] == 10
        assert row.arm.sampling["scheduler"]["super_res_1"] == "unipc"
    check = experiment.rows[-1].arm.sampling
    assert check["num_inference_steps"] == {"base": 250, "super_res_1": 250}
    assert check["scheduler"] == {"base": "ancestral", "super_res_1": "ancestral"}


@pytest.mark.parametrize("changes", [{"weak": ["a", "b"]}, {"levels": [0]}, {"super_res": []}])
def test_what_cannot_be_compared_is_refused(changes):
    from cdm_diffusers.studies.experiments import augmentation

    options = {"good": ["a"], "weak": ["b"], "super_res": ["c"], "num_inference_steps": {"base": 1}} | changes
    with pytest.raises(ValueError, match="as many good stages as weak ones, a training and two levels"):
        augmentation(**options)
