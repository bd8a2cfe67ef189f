"""What `cdm reproduce augmentation` concludes, from features of which the right verdict is known."""

import json
from pathlib import Path

import pytest
import torch

from cdm_diffusers.evaluation.metrics import FeatureStatistics
from cdm_diffusers.studies import verdicts as module
from cdm_diffusers.studies.config import ReproduceConfig, read_settings
from cdm_diffusers.studies.experiments import (
    FEW_STEPS,
    GOOD,
    TRAIN,
    VALIDATION,
    WEAK,
    AugmentationExperiment,
    augmentation,
    check_heading,
    control_heading,
)
from cdm_diffusers.studies.verdicts import (
    BENEFIT,
    PREDICTIONS,
    Verdicts,
    agreed,
    check_gate,
    choose_noise,
    conclude,
    verdict_of,
)


WIDTH, NUM_IMAGES, LEVELS = 4, 1000, (0, 100, 500, 1000)
CONTROL = control_heading(0.2)
REFERENCE = FeatureStatistics(
    torch.zeros(WIDTH, dtype=torch.float64), torch.eye(WIDTH, dtype=torch.float64), 10**6
)  # N(0, c^2) is (c - 1)^2 away in each of 4 directions
TRUTH = (1.4, 1.4, 1.4, 1.45)
REPAIRED = (1.8, 1.79, 1.5, 1.7)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(module, "NUM_REPLICATES", 200)


def swept(*trainings):
    """Features of each training by level: the same noise in all rows, times each row's scale."""
    noise = torch.randn(NUM_IMAGES, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {level: [scales[place] * noise for scales in trainings] for place, level in enumerate(LEVELS)}


def verdicts(weak=(REPAIRED,) * 3, good=(TRUTH,) * 3, control=(REPAIRED,) * 3, truth=(TRUTH,) * 3, **further):
    rows = {WEAK: weak, GOOD: good, FEW_STEPS: weak, CONTROL: control, TRAIN: truth}
    return Verdicts({name: swept(*row) for name, row in rows.items()} | further, REFERENCE, None, 0.03)


def concluded(**rows):
    of_rows = verdicts(**rows)
    compared = [of_rows.judge(name, prediction) for name, prediction in PREDICTIONS.items()]
    compared = conclude(compared, of_rows.judge(CONTROL, BENEFIT), None)
    assert [one["input"] for one in compared] == [WEAK, FEW_STEPS, GOOD, CONTROL]
    return compared


def test_a_benefit_with_the_weak_base_and_none_with_the_good_one():
    one, other = (1.81, 1.79, 1.5, 1.7), (1.79, 1.79, 1.5, 1.7)
    weak, _, good, control = concluded(weak=[REPAIRED, one, other])
    assert [one["verdict"] for one in (weak, good, control)] == ["benefit", "none", "benefit"]
    assert [one["prediction"] for one in (weak, good, control)] == ["benefit", "none", "benefit"]
    first, second = weak["baselines"]
    assert (first["baseline"], second["baseline"]) == (0, 100)
    assert first["chosen"] == second["chosen"] == [[500] * 3] * 2 and first["chosen_agree"]
    exact, figure = 4 * (0.5**2 - 0.8**2), first["beyond_ground_truth"]  # on ground truth, s = 500 changes nothing
    error = figure["standard_error"]
    assert figure["value"] == pytest.approx(exact, abs=2.5 * error) and error < -exact / 8
    assert first["distance"] == pytest.approx(4 * 0.8**2, rel=0.2)
    assert figure["over_trainings"]["sign_test"] == pytest.approx(0.25)
    low, high = figure["interval_over_images"]
    assert low < figure["value"] < high < 0
    ratio = first["ratio_of_ratios"]
    assert ratio["value"] == pytest.approx((0.5 / 0.8) ** 2, rel=0.06)
    assert ratio["interval"][0] < ratio["value"] < ratio["interval"][1] < 1


@pytest.mark.parametrize(
    ("weak", "verdict", "of_these"),
    [
        ([(1.8, 1.8, 1.8, 1.9)] * 3, "refuted", "refuted"),  # s does nothing, though the base is bad
        ([(1.8, 1.8, 1.802, 1.9)] * 3, "refuted", "refuted"),  # by less than 3% of the distance
        ([(1.8, 1.9, 2.0, 2.1)] * 3, "worse", "worse"),
        ([(1.8, 1.8, 1.6, 2), (1.8, 1.8, 1.9, 2), (1.8, 1.8, 1.5, 2)], "undecided", "benefit"),  # trainings disagree
    ],
)
def test_other_verdicts_on_the_weak_base(weak, verdict, of_these):
    result = concluded(weak=weak)[0]
    assert (result["verdict"], result["verdict_of_these_trainings"]) == (verdict, of_these)


def test_what_changes_real_images_as_much_is_no_benefit():
    artefact = [(1.8, 1.4, 1.4, 1.5)] * 3
    weak = verdicts(weak=artefact, truth=artefact).judge(WEAK, BENEFIT)
    assert weak["baselines"][0]["change"]["value"] < -1 and weak["verdict"] == "none"


def test_an_artefact_at_the_smallest_s_is_none_of_a_benefit():
    """
    All inputs share an error at s = 0 that is gone at s = 100, and distances are squared: it makes more of what is far
    away already.
    """
    shared = verdicts(weak=[(1.9, 1.8, 1.8, 1.9)] * 3, truth=[(1.5, 1.4, 1.4, 1.45)] * 3)
    weak = shared.judge(WEAK, BENEFIT)
    first, second = weak["baselines"]
    assert first["beyond_ground_truth"]["interval"][1] < 0 and first["change"]["interval"][1] < 0
    assert (first["verdict"], second["verdict"], weak["verdict"]) == ("artefact", "none", "undecided")
    step = shared.first_step()
    assert step["levels"] == [0, 100] and step["ratio"]["value"] == pytest.approx((0.4 / 0.5) ** 2, rel=0.08)
    assert step["ratio"]["interval"][1] < 1
    both = concluded(weak=[(1.9, 1.8, 1.5, 1.9)] * 3, truth=[(1.5, 1.45, 1.4, 1.45)] * 3)
    assert both[-1]["verdict"] == "artefact" and both[0]["verdict"] == "void"  # the control's, from both s


def test_what_only_harms_real_images_more_is_no_benefit():
    """Beyond ground truth's its change is below 0, but nothing has become better."""
    weak = concluded(weak=[(1.8, 1.85, 1.9, 1.95)] * 3, truth=[(1.2, 1.6, 1.9, 2.3)] * 3)[0]
    first = weak["baselines"][0]
    assert first["beyond_ground_truth"]["interval"][1] < 0 < first["change"]["interval"][0]
    assert weak["verdict"] == "undecided"


def test_without_the_effect_in_the_positive_control_nothing_is_concluded():
    weak, few, good, control = concluded(control=[(1.8, 1.8, 1.8, 1.8)] * 3)
    assert [one["verdict"] for one in (weak, few, good, control)] == ["void", "void", "void", "none"]


def test_one_training_is_judged_by_its_images():
    weak = concluded(weak=[REPAIRED], good=[TRUTH], control=[REPAIRED], truth=[TRUTH])[0]
    figure = weak["baselines"][0]["beyond_ground_truth"]
    assert figure["over_trainings"] is None and weak["verdict"] == "benefit"
    assert figure["interval"] == figure["interval_over_images"]


def test_no_training_and_no_half_is_tested_by_its_own_choice():
    """Two trainings with another best s each, and a half of the images with another best s than the other."""
    rows = verdicts(weak=[(1.8, 1.79, 1.5, 1.7), (1.8, 1.79, 1.6, 1.55)], truth=[TRUTH] * 2)
    assert rows.choose(WEAK, 0) == [[1000, 500]] * 2
    one = verdicts(weak=[REPAIRED], truth=[TRUTH])
    first_half = one.features[WEAK][1000][0][: NUM_IMAGES // 2]
    first_half /= 1.7 / 1.2
    assert one.choose(WEAK, 0) == [[1000], [500]] and one.choose(WEAK, 500) == [[1000], [1000]]
    figures = one.judge_from(WEAK, 0)
    assert not figures["chosen_agree"]
    tested = [one.values(WEAK, s, half)[0] - one.values(WEAK, 0, half)[0] for half, s in ((0, 500), (1, 1000))]
    assert figures["change"]["value"] == pytest.approx(sum(tested) / 2)


def test_the_bases_compared():
    """s is chosen with the weak base for both."""
    interaction = verdicts(good=[(1.4, 1.3, 1.35, 1.4)] * 3).interaction()
    exact = 4 * ((0.5**2 - 0.8**2) - (0.35**2 - 0.4**2))
    assert interaction["value"] == pytest.approx(exact, abs=2.5 * interaction["standard_error"])
    assert interaction["interval"][1] < 0


def test_the_solver_is_checked_on_few_images():
    def checked(scale):
        few = {s: [row[:500] for row in rows[:1]] for s, rows in swept((1.8, 0, scale, 0)).items() if s in (0, 500)}
        truth = {s: [row[:500] for row in rows[:1]] for s, rows in swept(TRUTH).items() if s in (0, 500)}
        further = {check_heading(WEAK): few, check_heading(TRAIN): truth}
        return verdicts(**further).solver_check()

    same, other = checked(1.5), checked(1.7)
    assert same["num_images"] == 500 and same["levels"] == [0, 500]
    assert same["agree"] and same["difference"]["interval"] == pytest.approx([0, 0], abs=1e-9)
    exact = 4 * (0.5**2 - 0.8**2)
    assert same["change"][0]["value"] == pytest.approx(exact, rel=0.15) == same["change"][1]["value"]
    assert not other["agree"] and other["difference"]["interval"][1] < -other["margin"]
    assert other["beyond_ground_truth"][1]["value"] > other["beyond_ground_truth"][0]["value"]
    words = dict.fromkeys(module.WORDS, "benefit")
    for check, word in ((other, "void (solver)"), (same, "benefit")):
        compared = conclude([{"input": WEAK, **words}], {"input": CONTROL, **words}, check)
        assert [one["verdict"] for one in compared] == [word] * 2


def test_the_noise_of_the_control():
    ratios = {0.05: 1.2, 0.1: 2.0, 0.2: 4.0}
    assert [choose_noise(ratios, weak) for weak in (1.1, 1.3, 2.0, 3.9, 9.0)] == [0.05, 0.05, 0.1, 0.1, 0.2]


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
    assert verdict_of(beyond, change, [-0.1, 0.1], 0.03) == verdict
    lower = "artefact" if verdict == "benefit" else verdict
    assert verdict_of(beyond, change, [-0.1, -0.001], 0.03) == lower
    assert agreed(verdict, verdict) == verdict and agreed(verdict, "artefact") == "undecided"


def test_the_gate():
    assert check_gate([1.4, 1.3], [1.0, 1.0], 1.3) == pytest.approx(
        {"weak": 1.35, "ground_truth": 1.0, "ratio": 1.35, "needed": 1.3}
    )
    with pytest.raises(
        ValueError, match=r"smallest s is 1.25, 1.25 times that .* \(1\); it must be at least 1.3 times"
    ):
        check_gate([1.3, 1.2], [1.0, 1.0], 1.3)
    assert check_gate([0.1], [-0.01], 1.3)["ratio"] == float("inf")


@pytest.mark.parametrize("name", ["claims", "augmentation_every_level", "augmentation_unlabelled"])
def test_every_experiment_of_the_other_claims_is_read(name):
    file = f"configs/{name}.json"
    for experiment_name in json.loads(Path(file).read_text())["experiments"]:
        settings = read_settings(ReproduceConfig(name=experiment_name, config=file, output_dir="x"))
        rows = settings.experiment(experiment_name).rows
        assert rows and {stage.name for row in rows for stage in row.arm.stages} <= settings.stages.keys()


def test_the_configuration_is_the_design():
    """That of docs/results.md, in configs/augmentation.json."""
    config = ReproduceConfig(name="augmentation", config="configs/augmentation.json", output_dir="x")
    settings = read_settings(config)
    experiment = settings.experiment("augmentation")
    assert isinstance(experiment, AugmentationExperiment)
    assert (experiment.gate, experiment.margin) == (1.3, 0.03)
    levels, few = [0, 100, 250, 500, 1000, 1500, 2000, 2500, 3200], [0, 250, 1000, 2000, 3200]
    swept = {GOOD: levels, WEAK: levels, FEW_STEPS: few, TRAIN: levels, VALIDATION: [0, 1000, 2500]}
    swept |= {control_heading(noise): few for noise in (0.05, 0.1, 0.2, 0.3, 0.4)}
    found = {name: [row.x for row in experiment.rows if row.heading == name] for name in swept}
    assert found == {name: [s for s in of_name for _ in range(5)] for name, of_name in swept.items()}
    assert settings.sampling.num_images >= 2 * 2 * 128
    *rows, a, b, c, d = experiment.rows
    assert len(rows) == sum(map(len, found.values()))
    for row in rows:
        assert row.arm.sampling["num_inference_steps"]["super_res_1"] == 10
        assert row.arm.sampling["scheduler"] == {"base": "ancestral", "super_res_1": "unipc"}
        assert row.arm.sampling["num_inference_steps"]["base"] == (5 if row.heading == FEW_STEPS else 250)
        assert row.arm.balanced == (row.arm.ground_truth is not None) and row.arm.num_images is None
    for row, heading, level in zip((a, b, c, d), (WEAK, WEAK, TRAIN, TRAIN), (0, 1000, 0, 1000), strict=True):
        check = row.arm.sampling
        assert row.heading == check_heading(heading) and row.arm.stages[-1].name == "8_to_32_0"
        assert check["num_inference_steps"] == {"base": 250, "super_res_1": 250}
        assert check["scheduler"] == {"base": "ancestral", "super_res_1": "ancestral"}
        assert check["augmentation_levels"] == {"super_res_1": level} and row.arm.num_images == 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weak": ["a", "b"]}, "as many good stages as weak ones, a training and a noise"),
        ({"super_res": []}, "as many good stages as weak ones, a training and a noise"),
        ({"control_noises": []}, "as many good stages as weak ones, a training and a noise"),
        ({"super_res": ["c", "d", "c"]}, r"`super_res` is \['c', 'd', 'c'\]; it must be different trainings"),
        ({"control_levels": [0, 250]}, "they must be three of `levels`"),
        ({"control_levels": [0, 251, 1000]}, "they must be three of `levels`"),
        ({"control_levels": [250, 1000, 2000]}, "they must be three of `levels`"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, message):
    options = {"good": ["a"], "weak": ["b"], "super_res": ["c"], "num_inference_steps": {"base": 1}} | changes
    with pytest.raises(ValueError, match=message):
        augmentation(**options)
