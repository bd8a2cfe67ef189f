"""What a search has found: a row for each setting, a table, plots, and the best setting in the pipeline's folder."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin

from ..evaluation.intervals import mean_and_error
from ..files import held, replace_folder, temporary_name, write_json, writing
from ..pipelines import CascadedDiffusionPipeline
from ..pipelines.solvers import solver_name
from ..tables import markdown_table, plus_minus
from .config import Setting


# What augmentation will do from which ratio of distances on generated and on real inputs; see docs/evaluation.md.
NOTHING_TO_REPAIR = "there is next to nothing for augmentation to repair"
OUTLOOKS = (
    (1.3, "augmentation can be expected to pay"),
    (1.1, "augmentation may pay a little"),
    (-math.inf, NOTHING_TO_REPAIR),
)
# Figures of a row that are no distances from a split: their titles and formats in tables.
OTHER_FIGURES = {
    "recognised": ("recognised", ".2%"),
    "crps": ("CRPS", ".4f"),
    "spread_over_error": ("spread over error", ".2f"),
}
# Arguments of a call, for which a pipeline's config has no place.
CALL_ONLY = ("truncated", "restart_timestep", "consistency")


def summarise(
    lines: list[dict[str, Any]],
    stage: str,
    seeds: list[int],
    select_split: str,
    max_evaluations: int | None = None,
    only_storable: bool = False,
    select: str = "distance",
) -> list[dict[str, Any]]:
    """
    Results of the same setting together, in the order of their first.

    Args:
        lines: of `results.jsonl`.
        stage: the searched one.
        seeds: what a setting must have been sampled with to be the best.
        select_split: the split by the distance from which settings are compared.
        max_evaluations: of the stage's network, for a setting to be the best.
        only_storable: whether only a setting that a pipeline's config can hold may be the best.
        select: "distance", "recognition" or "crps": the figure by which settings are compared.

    Returns:
        `list[dict]`: "setting"; "seeds"; "figures" by name, each {"mean", "standard_error" (None for one seed),
        "values"}; "evaluations" of each stage's network per image; "seconds" for all images of one seed; "is_best"
        for the setting with the best mean figure of those that sample from generated images and meet the conditions
        above; and "is_optimal" where no other setting of the same conditioning is better with as few evaluations of
        the stage.
    """
    by_setting = {}
    for line in lines:
        by_setting.setdefault(json.dumps(line["setting"], sort_keys=True), []).append(line)
    rows = [_row(of_setting) for of_setting in by_setting.values()]
    allowed = [
        row
        for row in rows
        if row["setting"]["conditioning"] == "generated"
        and set(seeds) <= set(row["seeds"])
        and not (only_storable and any(row["setting"].get(name) for name in CALL_ONLY))
        and (max_evaluations is None or row["evaluations"][stage] <= max_evaluations)
    ]

    def cost(row: dict[str, Any]) -> float:
        return _cost(row, select, select_split)

    best = min(allowed, key=cost, default=None)
    for row in rows:
        row["is_best"] = row is best
        row["is_optimal"] = not any(_dominates(other, row, stage, cost) for other in rows)
    return rows


def _row(lines: list[dict[str, Any]]) -> dict[str, Any]:
    first = lines[0]
    figures = {}
    for name in first["figures"]:
        values = [line["figures"][name] for line in lines]
        figures[name] = {**mean_and_error(values), "values": values}
    return {
        "setting": first["setting"],
        "seeds": [line["seed"] for line in lines],
        "figures": figures,
        "evaluations": first["evaluations"],
        "seconds": sum(line["seconds"] for line in lines) / len(lines),
        "num_images": first["num_images"],
        "num_features": first["num_features"],
    }


def _distance(row: dict[str, Any], split: str) -> float:
    return row["figures"][split]["mean"]


def _cost(row: dict[str, Any], select: str, split: str) -> float:
    """What is least in the best row; infinite where its figure was not measured."""
    name, sign = {"distance": (split, 1), "recognition": ("recognised", -1), "crps": ("crps", 1)}[select]
    return sign * row["figures"][name]["mean"] if name in row["figures"] else math.inf


def _dominates(
    other: dict[str, Any], row: dict[str, Any], stage: str, cost: Callable[[dict[str, Any]], float]
) -> bool:
    a, b = ((r["evaluations"][stage], cost(r)) for r in (other, row))
    same = other["setting"]["conditioning"] == row["setting"]["conditioning"]
    return same and a != b and a[0] <= b[0] and a[1] <= b[1]


def compared_setting(settings: list[Setting]) -> Setting | None:
    """
    The setting of the smallest s among those that are not truncated, on generated images; of several the first,
    preferably without a restart.
    """
    candidates = [one for one in settings if one.conditioning == "generated" and not one.truncated]
    return min(
        candidates, key=lambda one: (one.augmentation_level or 0, one.restart_timestep is not None), default=None
    )


def outlook_of(rows: list[dict[str, Any]], split: str) -> dict[str, Any] | None:
    """
    Whether augmentation can be expected to pay: it repairs what generated low-resolution images have that real ones do
    not, so the stage must do worse on them at the smallest s.

    Args:
        rows: of [`summarise`].
        split: the training images', the distances from which are compared.

    Returns:
        `dict`: "augmentation_level", mean distances on "generated" and on "real" inputs, their "ratio", "ratios" by
        seed, what "augmentation" will do, None with too few images to say, and the "lowest_level", s of the smallest
        distance on generated inputs; None where no row on real images has a counterpart on generated ones, or where
        its distance is 0.
    """
    settings = [Setting(**row["setting"]) for row in rows]
    compared = compared_setting([one for one in settings if not one.truncated and one.from_real_images() in settings])
    if compared is None:
        return None
    generated, real = (rows[settings.index(one)] for one in (compared, compared.from_real_images()))
    on = [dict(zip(row["seeds"], row["figures"][split]["values"], strict=True)) for row in (generated, real)]
    seeds = [seed for seed in on[0] if seed in on[1]]
    if any(on[1][seed] == 0 for seed in seeds):
        return None
    means = [sum(values[seed] for seed in seeds) / len(seeds) for values in on]
    ratio = means[0] / means[1]
    level = compared.augmentation_level
    alike = [
        row for row, one in zip(rows, settings, strict=True) if replace(one, augmentation_level=level) == compared
    ]
    lowest = min(alike, key=lambda row: _distance(row, split))
    return {
        "augmentation_level": level,
        "generated": means[0],
        "real": means[1],
        "ratio": ratio,
        "ratios": {seed: on[0][seed] / on[1][seed] for seed in seeds},
        "augmentation": _verdict(ratio) if real["num_images"] >= 2 * real["num_features"] else None,
        "lowest_level": lowest["setting"].get("augmentation_level"),
    }


def _verdict(ratio: float) -> str:
    return next(words for least, words in OUTLOOKS if ratio >= least)


def outlook_line(outlook: dict[str, Any], first: dict[str, Any]) -> str:
    """A sentence about it; `first` is a row."""
    level, verdict = outlook["augmentation_level"], outlook["augmentation"]
    left_open = (
        "Whether augmentation will pay is left open: with fewer than twice as many images as the "
        f"{first['num_features']:,} features both distances are far too large, and their ratio too near 1."
    )
    said = f". {left_open}" if verdict is None else f": {verdict}."
    if verdict == NOTHING_TO_REPAIR and outlook["lowest_level"] != level:
        said += (
            f" s = {outlook['lowest_level']} has a smaller distance all the same, but not because it repairs the "
            "base's errors."
        )
    return (
        f"Generated/ground-truth ratio{'' if level is None else f' at s = {level}'}: {outlook['ratio']:.3g} "
        f"({outlook['generated']:.4g} on generated low-resolution images, {outlook['real']:.4g} on real training "
        f"images){said}"
    )


def write_report(
    rows: list[dict[str, Any]],
    real: dict[str, float],
    description: dict[str, Any],
    folder: Path,
    select_split: str,
    max_evaluations: int | None = None,
    outlook: dict[str, Any] | None = None,
    select: str = "distance",
) -> None:
    """
    `table.md`, `quality-over-s.png` (if s varies), `quality-over-evaluations.png` (of generated conditioning), and
    `augmentation.json`, the `outlook` (if there is one).
    """
    text = settings_table(rows, real, description, select_split, max_evaluations, select)
    if outlook is not None:
        text += f"\n\n{outlook_line(outlook, rows[0])}"
        write_json(folder / "augmentation.json", outlook)
    (folder / "table.md").write_text(text + "\n")
    print(text)
    label = description["distance"], f"Extractor: {description['extractor']}; {rows[0]['num_images']:,} samples"
    if len({row["setting"].get("augmentation_level") for row in rows}) > 1:
        plot_levels(rows, label).savefig(folder / "quality-over-s.png", dpi=120)
    generated = [row for row in rows if row["setting"]["conditioning"] == "generated"]
    if generated:
        plot = plot_evaluations(generated, description["stage"], label, select_split, select)
        plot.savefig(folder / "quality-over-evaluations.png", dpi=120)


# ------------------------------------------------------------------------------------------------------------------
# What is shown
# ------------------------------------------------------------------------------------------------------------------


def varied(rows: list[dict[str, Any]]) -> list[str]:
    """Axes along which the settings differ."""
    names = dict.fromkeys(name for row in rows for name in row["setting"])
    return [name for name in names if len({json.dumps(row["setting"].get(name)) for row in rows}) > 1]


def splits_of(rows: list[dict[str, Any]]) -> list[str]:
    """The training and the validation split, from which distances were measured."""
    return [name for name in rows[0]["figures"] if name not in OTHER_FIGURES]


def settings_table(
    rows: list[dict[str, Any]],
    real: dict[str, float],
    description: dict[str, Any],
    select_split: str,
    max_evaluations: int | None = None,
    select: str = "distance",
) -> str:
    """
    Rows in markdown, best first by the selecting figure.

    Args:
        real: distances from each split of as many real images of the other one.
    """
    axes, splits, first = varied(rows), splits_of(rows), rows[0]
    shared = [f"{_words(name)} {_shown(value)}" for name, value in first["setting"].items() if name not in axes]
    other_split = splits[1] if select_split == splits[0] else splits[0]
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    within = "" if max_evaluations is None else f" within {max_evaluations} network evaluations"
    figures = {split: (f"{description['distance']}, {split!r}", ".4g") for split in splits}
    figures |= {name: how for name, how in OTHER_FIGURES.items() if any(name in row["figures"] for row in rows)}
    by = {
        "distance": f"by the distance from {select_split!r}, so that its distance from {other_split!r} is the one to "
        "report",
        "recognition": "by the share recognised",
        "crps": f"by the CRPS on real inputs of {select_split!r}; where spread over error is 1, samples of one input "
        "differ by as much as they err",
    }[select]
    chosen = [row for row in rows if row["setting"]["conditioning"] == "generated"]
    few = (
        f"These are no more images than the {first['num_features']:,} features: distances are far too large, and "
        "comparable only with distances of as many images."
    )
    lines = [
        f"Stage `{description['stage']}`, measured at `{description['measured_stage']}`. Extractor: "
        f"{description['extractor']}. {first['num_images']:,} samples; seeds {', '.join(map(str, seeds))}.",
        f"All settings: {', '.join(shared)}.",
        "",
        f"Means over seeds ± standard error. **best**{within}: selected {by}. front: no other is better by that with "
        "as few network evaluations of the stage.",
        f"As many real images of the other split: {', '.join(f'{real[name]:.4g} from {name!r}' for name in splits)}.",
        *(["Rows on real inputs, 'train' or 'test', are for comparison only."] if len(chosen) < len(rows) else []),
        *([few] if first["num_images"] <= first["num_features"] else []),
        "",
    ]
    header = [*map(_words, axes), *(title for title, _ in figures.values()), "network evaluations", "seconds", ""]
    cells = [
        [
            *(_shown(row["setting"].get(name)) for name in axes),
            *(
                plus_minus(row["figures"][name], style) if name in row["figures"] else "-"
                for name, (_, style) in figures.items()
            ),
            " + ".join(f"{count:g}" for count in row["evaluations"].values()),
            f"{row['seconds']:.0f}",
            ", ".join(["**best**"] * row["is_best"] + ["front"] * (row["is_optimal"] and row in chosen)),
        ]
        for row in sorted(rows, key=lambda row: _cost(row, select, select_split))
    ]
    return "\n".join([*lines, markdown_table(header, cells)])


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def _panels(splits: list[str], label: tuple[str, str]) -> tuple[Any, list]:
    """A figure with a panel for each split; `label` is that of the vertical axis, and the title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(label[1], fontsize=10)
    panels = figure.subplots(1, len(splits), sharey=True)
    for panel, split in zip(panels, splits, strict=True):
        panel.set_title(f"from images of split {split!r}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(label[0])
    return figure, panels


def plot_levels(rows: list[dict[str, Any]], label: tuple[str, str]) -> Any:
    """Distance over s, a line for each combination of the other axes (Table 3), with standard errors."""
    axes = [name for name in varied(rows) if name != "augmentation_level"]
    curves = {}
    for row in rows:
        name = ", ".join(f"{_words(axis)}: {_shown(row['setting'].get(axis))}" for axis in axes)
        curves.setdefault(name, []).append(row)
    splits = splits_of(rows)
    figure, panels = _panels(splits, label)
    for panel, split in zip(panels, splits, strict=True):
        for name, curve in curves.items():
            curve = sorted(curve, key=lambda row: row["setting"]["augmentation_level"])
            levels = [row["setting"]["augmentation_level"] for row in curve]
            figures = [row["figures"][split] for row in curve]
            errors = [figure["standard_error"] or 0 for figure in figures]
            panel.errorbar(levels, [f["mean"] for f in figures], errors, marker="o", capsize=3, label=name)
        panel.set_xlabel("s (augmentation level)")
    if axes:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=2)
    return figure


def plot_evaluations(
    rows: list[dict[str, Any]], stage: str, label: tuple[str, str], select_split: str, select: str = "distance"
) -> Any:
    """
    Distance over evaluations of the stage's network, a colour for each solver; and the Pareto front of the figure that
    selects.
    """
    splits = splits_of(rows)
    figure, panels = _panels(splits, label)
    by = {"distance": f"distance from {select_split!r}", "recognition": "recognition", "crps": "CRPS"}[select]
    ticks = sorted({row["evaluations"][stage] for row in rows})
    for panel, split in zip(panels, splits, strict=True):
        for solver in dict.fromkeys(row["setting"].get("scheduler", "own") for row in rows):
            points = [row for row in rows if row["setting"].get("scheduler", "own") == solver]
            errors = [row["figures"][split]["standard_error"] or 0 for row in points]
            counts = [row["evaluations"][stage] for row in points]
            panel.errorbar(counts, [_distance(row, split) for row in points], errors, fmt="o", capsize=3, label=solver)
        front = sorted((row["evaluations"][stage], _distance(row, split)) for row in rows if row["is_optimal"])
        front.append((ticks[-1], front[-1][1]))
        panel.step(*zip(*front, strict=True), where="post", color="black", lw=1, label=f"Pareto front of {by}")
        for row in rows:
            if row["is_best"]:
                point = row["evaluations"][stage], _distance(row, split)
                panel.plot(*point, marker="*", ms=16, mfc="none", mec="black", ls="", label="best")
        panel.set(xscale="log", xlabel=f"network evaluations of stage {stage}")
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        panel.set_xticks([], minor=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=4)
    return figure


# ------------------------------------------------------------------------------------------------------------------
# The best setting
# ------------------------------------------------------------------------------------------------------------------


def write_best(
    rows: list[dict[str, Any]],
    pipeline: CascadedDiffusionPipeline,
    stage: str,
    folder: Path,
    about: dict[str, Any],
    name: str | None = None,
) -> None:
    """
    Steps or time steps, s and guidance into the config of the pipeline in `folder`, the solver as its component;
    `search-STAGE.json` beside them says how they were found.

    Args:
        about: further entries of `search-STAGE.json`.
        name: of the settings among which the best one is stored instead, for `pipe(..., settings=name)`; then the file
            is `search-STAGE-NAME.json`, and the solver stays.

    Raises:
        ValueError: no row is the best, or it has another solver than the pipeline and is to be stored by name.
    """
    best = next((row for row in rows if row["is_best"]), None)
    if best is None:
        raise ValueError(
            f"`write_best`: no setting within `max_evaluations` can be stored in the pipeline's config "
            f"({' and '.join(CALL_ONLY)} are arguments of calls); give a larger `max_evaluations` or other settings."
        )
    setting = best["setting"]
    schedules = {stage: setting["inference_schedule"]} if "inference_schedule" in setting else None
    changed = pipeline.with_schedulers({stage: setting.get("scheduler")}, schedules)
    scheduler = getattr(changed, f"{stage}_scheduler")
    own = solver_name(getattr(pipeline, f"{stage}_scheduler"))
    if name is not None and (schedules is not None or setting.get("scheduler", own) != own):
        raise ValueError(
            f"`write_as` is {name!r}, but the best setting has another solver than the pipeline, "
            f"{schedules or setting.get('scheduler')!r}: settings by name share that of the pipeline. "
            "Search it alone, or give --write_best."
        )
    with held(folder, "storing the best setting"):
        index = json.loads((folder / "model_index.json").read_text())
        if name is None:
            save_scheduler(scheduler, folder / f"{stage}_scheduler")
            store_setting(index, setting, stage, scheduler)
        else:
            store_named(index, setting, stage, name)
        write_json(folder / "model_index.json", index)
        file = folder / f"search-{stage if name is None else f'{stage}-{name}'}.json"
        write_json(file, {**best, **about, "num_settings": len(rows)})


def save_scheduler(scheduler: SchedulerMixin, final: Path) -> None:
    """A scheduler's folder, in the place of the one that is there."""
    temporary = temporary_name(final)
    with writing("The scheduler", temporary):
        scheduler.save_pretrained(temporary)
        replace_folder(temporary, final)


def store_named(index: dict[str, Any], setting: dict[str, Any], stage: str, name: str) -> None:
    """Puts the setting of a stage among those that a `model_index.json` has by `name`."""
    index["settings"] = index.get("settings") or {}
    named = index["settings"].setdefault(name, {})
    for argument, axis in (
        ("num_inference_steps", "num_inference_steps"),
        ("augmentation_levels", "augmentation_level"),
        ("guidance_scale", "guidance_scale"),
        ("timesteps", "timesteps"),
    ):
        others = {other: value for other, value in named.pop(argument, {}).items() if other != stage}
        values = others | ({} if setting.get(axis) is None else {stage: setting[axis]})
        named |= {argument: values} if values else {}


def store_setting(index: dict[str, Any], setting: dict[str, Any], stage: str, scheduler: SchedulerMixin) -> None:
    """Puts the setting of a stage, and the class of its scheduler, into the content of a `model_index.json`."""
    library = type(scheduler).__module__.split(".")[0]
    index[f"{stage}_scheduler"] = [library, type(scheduler).__name__]
    for name, axis in (
        ("default_num_inference_steps", "num_inference_steps"),
        ("default_augmentation_levels", "augmentation_level"),
        ("default_guidance_scales", "guidance_scale"),
        ("default_timesteps", "timesteps"),
    ):
        if setting.get(axis) is not None and (axis, setting[axis]) != ("guidance_scale", 1.0):
            index[name] = {**(index.get(name) or {}), stage: setting[axis]}
        elif axis in ("guidance_scale", "timesteps") and index.get(name):
            index[name].pop(stage, None)
