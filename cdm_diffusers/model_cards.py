"""Model cards: what a pipeline is, what it was trained on, under which licence, how it measures, and how to use it."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .tables import escaped, markdown_table, unescaped


CARD, GRID = "README.md", "samples.png"
CONFIGURATION, VALIDATION, SOURCE = "training_config.json", "validation.json", "source.json"
REPORTS = ("recognition.json", "quality.json")
# What a folder holds besides the pipeline, and a copy or an upload of it keeps.
DOCUMENTS = (CARD, GRID, CONFIGURATION, VALIDATION, SOURCE, *REPORTS)

PAPER = "[Cascaded Diffusion Models for High Fidelity Image Generation](https://arxiv.org/abs/2106.15282)"
_MARK = re.compile(
    r"\n<!-- cdm_diffusers wrote this; `cdm card` rewrites it while it is unchanged: ([0-9a-f]{16}) -->\n$"
)
_EXAMPLE = re.compile(r"^```python\n(?:(?!```).*\n)*?.*from_pretrained(?:.|\n)*?^```$", re.MULTILINE)
_LOCATION = re.compile(r'(?<=from_pretrained\()"(?:[^"\\]|\\.)*"')


def figure_names(distance: str) -> dict[str, str]:
    """What the figures of `cdm evaluate` are called, whose Frechet distance is called `distance`."""
    return {
        "frechet_distance": distance,
        "frechet_distance_extrapolated": f"{distance}, extrapolated",
        "precision": "precision",
        "recall": "recall",
        "kernel_distance": "kernel distance",
        "kernel_distance_rbf": "kernel distance (RBF)",
    }


def write_card(
    pipeline: Any, folder: Path, title: str | None = None, tables: Sequence[str] = (), **given: Any
) -> None:
    r"""
    Writes `README.md` into the folder of a pipeline, from what the folder holds: the configurations of its training,
    where converted stages come from, measured figures and a grid of samples.

    Args:
        pipeline ([`CascadedDiffusionPipeline`] or [`SuperResolutionPipeline`]): what is in the folder.
        folder (`Path`): the folder.
        title (`str`, *optional*): by default the folder's name.
        tables (`Sequence[str]`): what was measured, in markdown.
        given: `location`, `license`, `dataset_name` and `code` of [`card_text`].
    """
    title = title or folder.resolve().name
    names = [stage.name for stage in pipeline.stages]
    text = card_text(
        pipeline,
        title,
        configs=by_stage(_read(folder / CONFIGURATION), names),
        sources=by_stage(_read(folder / SOURCE), names),
        validation=_read(folder / VALIDATION),
        reports=[report for file in REPORTS if (report := _read(folder / file))],
        tables=tables,
        has_grid=(folder / GRID).is_file(),
        **{"location": title, **given},
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def card_text(
    pipeline: Any,
    title: str,
    *,
    location: str,
    license: str | None = None,
    dataset_name: str | None = None,
    configs: dict[str, dict[str, Any]],
    sources: dict[str, dict[str, Any]],
    validation: dict[str, Any],
    reports: Sequence[dict[str, Any]],
    tables: Sequence[str],
    has_grid: bool,
    code: bool = False,
) -> str:
    r"""
    A model card with its metadata and its mark (see [`is_ours`]).

    Args:
        pipeline, title, tables: as in [`write_card`].
        location (`str`): what `from_pretrained` takes in the example: a folder or a Hub id.
        license (`str`, *optional*):
            Of weights and data, by the Hub's identifiers. By default that of converted weights, where all stages are
            converted; none is assumed for others.
        dataset_name (`str`, *optional*): data set of the Hub; by default that of the training.
        configs, sources (`dict`): `training_config.json` and `source.json` of each stage that has one.
        validation (`dict`): of one stage: its loss, moments of samples and data, and which weights these are.
        reports (`Sequence[dict]`): JSON of `cdm recognition` and `cdm evaluate`.
        has_grid (`bool`): whether there is a `samples.png`.
        code (`bool`): whether the folder carries its code.
    """
    license = license or _license_of(sources, len(pipeline.stages))
    datasets = [dataset_name] if dataset_name else _datasets_of(configs)
    upsamples, labels = _upsamples(pipeline), pipeline.config.id2label
    results = _results(reports, datasets, upsamples)
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="image-to-image" if upsamples else "unconditional-image-generation",
        tags=["cdm_diffusers", "cascaded-diffusion", type(pipeline).__name__],
        datasets=datasets or None,
        **({"model_name": title, "eval_results": results} if results else {}),
    )
    sections = {
        f"# {escaped(title)}": f"{_kind(pipeline)}, as in {PAPER}, made with `cdm_diffusers`.{_weights(validation)}",
        "": "![samples](samples.png)" if has_grid else "",
        "## How to use": _example(pipeline, location, code),
        "## Licence": _license_section(license),
        "## Classes": ", ".join(f"{index} {escaped(name)}" for index, name in (labels or {}).items()),
        "## Data": _data_section(configs, dataset_name),
        "## Stages": _stages_section(pipeline, configs),
        "## First weights": _pretrained_section(configs),
        "## Distillation": _distillation_section(configs),
        "## Figures": "\n\n".join(filter(None, [*tables, _validation_table(validation)])),
        "## Where the weights come from": _origins(sources) if sources else "",
        "## Intended use and limits": _limits(pipeline, measured=bool(reports)),
    }
    body = "\n\n".join(f"{head}\n\n{section}".strip() for head, section in sections.items() if section)
    return _marked(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


# ---------------------------------------------------------------------------------------------------------------------
# Cards that are there


def is_ours(text: str) -> bool:
    """Whether a card is as this package wrote it: its last line has a digest of all others."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def published_at(text: str, location: str, origin: str | None = None) -> str:
    """
    A card whose example loads the pipeline from `location`. In cards that somebody wrote, only examples that load it
    from the folder `origin` change.
    """
    if is_ours(text):
        return _marked(_LOCATION.sub(lambda _: _literal(location), _MARK.sub("", text)))
    own = {"path/to/this/folder", origin}
    return _LOCATION.sub(lambda match: _literal(location) if json.loads(match[0]) in own else match[0], text)


def with_example(text: str, pipeline: Any, location: str, code: bool) -> str:
    """A card that somebody wrote with this package's example in place of its own, or after all where it has none."""
    example = _example(pipeline, location, code)
    changed, count = _EXAMPLE.subn(lambda _: example, text, count=1)
    return changed if count else f"{text.rstrip()}\n\n## How to use\n\n{example}\n"


def said_before(folder: Path) -> dict[str, Any]:
    """Title, license and data set that the card in a folder names, to be kept by its next version."""
    if not (folder / CARD).is_file():
        return {}
    card = ModelCard.load(folder / CARD, ignore_metadata_errors=True)
    heading = re.search(r"^# (.+)$", card.text, re.MULTILINE)
    said = {
        "title": card.data.model_name or (heading and unescaped(heading[1])),
        "license": card.data.license,
        "dataset_name": (card.data.datasets or [None])[0],
    }
    return {name: value for name, value in said.items() if value}


def by_stage(content: dict[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What a JSON document says of each stage: that of a single stage is about itself alone."""
    is_of_one = "unet" in content or "license" in content
    return {names[0]: content} if is_of_one else {name: content[name] for name in names if name in content}


def _marked(text: str) -> str:
    mark = f"\n<!-- cdm_diffusers wrote this; `cdm card` rewrites it while it is unchanged: {_digest(text)} -->\n"
    return text + mark


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def usage(pipeline: Any, location: str, code: bool = False) -> str:
    """Python that loads the pipeline from `location`, makes images and saves one."""
    name = "DiffusionPipeline" if code else type(pipeline).__name__
    remote = ", trust_remote_code=True" if code else ""
    imports = [f"from {'diffusers' if code else 'cdm_diffusers'} import {name}"]
    lines, arguments = [f"pipe = {name}.from_pretrained({_literal(location)}{remote})"], []
    if _upsamples(pipeline):
        config = pipeline.unet.config
        size, mode = config.low_res_size, "L" if (config.low_res_channels or config.in_channels) == 1 else "RGB"
        imports.append("from PIL import Image")
        lines.append(f'image = Image.linear_gradient("L").convert("{mode}")  # or Image.open("your-image.png")')
        lines.append(f"image = image.resize(({size}, {size}))")
        arguments.append("image")
    if pipeline.config.id2label:
        arguments.append(f"class_labels=[{_literal(next(iter(pipeline.config.id2label.values())))}]")
    elif any(stage.unet.config.num_classes for stage in pipeline.stages):
        arguments.append("class_labels=[0]")
    lines += [f"images = pipe({', '.join(arguments)}).images", 'images[0].save("sample.png")']
    return "\n".join([*imports, "", *lines])


def _example(pipeline: Any, location: str, code: bool) -> str:
    return f"{_needs(code)}\n\n```python\n{usage(pipeline, location, code)}\n```"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _needs(code: bool) -> str:
    if code:
        return (
            "This needs Diffusers 0.42 or newer, and nothing else: `trust_remote_code=True` runs the Python files of "
            "this folder, which are the sampling code of `cdm_diffusers`. Read them before you trust them."
        )
    return (
        "This needs the Python package `cdm_diffusers`, installed from a clone of its repository; no code comes with "
        "the weights. After `import cdm_diffusers`, Diffusers' own `DiffusionPipeline.from_pretrained` loads them too."
    )


def _upsamples(pipeline: Any) -> bool:
    return pipeline.stages[0].unet.config.low_res_size is not None


def _kind(pipeline: Any) -> str:
    sizes = [f"{stage.unet.config.sample_size}x{stage.unet.config.sample_size}" for stage in pipeline.stages]
    if _upsamples(pipeline):
        low = pipeline.unet.config.low_res_size
        return f"A super-resolution stage of a cascade of diffusion models, {low}x{low} to {sizes[0]}"
    if len(sizes) == 1:
        return f"The {sizes[0]} base stage of a cascade of diffusion models"
    return f"A cascade of diffusion models, {' -> '.join(sizes)}"


def _weights(validation: dict[str, Any]) -> str:
    return f" These are {validation['weights']}." if "weights" in validation else ""


def _license_of(sources: dict[str, dict[str, Any]], num_stages: int) -> str | None:
    licenses = {source["license"] for source in sources.values()}
    if len(sources) < num_stages:
        return None
    return licenses.pop() if len(licenses) == 1 else "other"


def _license_section(license: str | None) -> str:
    if license is None:
        return "None is given. Whoever published this has not said what the data and these weights may be used for."
    return f"{escaped(license)}, as given by whoever published this."


def _datasets_of(configs: dict[str, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for config in configs.values() if (name := config["data"]["dataset_name"])))


def _data_of(config: dict[str, Any]) -> str:
    data = config["data"]
    return escaped(data["dataset_name"] or f"a local folder, {Path(data['train_data_dir']).name}")


def _data_section(configs: dict[str, dict[str, Any]], dataset_name: str | None) -> str:
    if not configs:
        return f"The data set {escaped(dataset_name)}." if dataset_name else ""
    config = next(iter(configs.values()))
    data = config["data"]
    count = "a stream" if data["num_examples"] is None else f"{data['num_examples']:,} images"
    classes = f"{len(data['id2label'])} classes" if data["id2label"] else "no class labels"
    resolution = data["source_resolution"]
    name = escaped(dataset_name) if dataset_name else _data_of(config)
    return (
        f"Trained on {name}: {count}, {classes}; brought to {resolution}x{resolution} pixels (BigGAN's centre crop), "
        "then area-averaged to the size of each stage."
    )


def _stages_section(pipeline: Any, configs: dict[str, dict[str, Any]]) -> str:
    options = pipeline.stage_options()
    header = ("stage", "size", "parameters", "predicts", "scheduler", "steps", "s", "guidance", "trained on")
    rows = [_stage_row(stage, configs.get(stage.name), options) for stage in pipeline.stages]
    table = markdown_table((*header, "images seen"), rows)
    said = "Scheduler, steps, s and guidance are the defaults of a call."
    if times := options.get("timesteps"):
        listed = times.items() if isinstance(times, dict) else [(pipeline.stage.name, times)]
        said += " Time steps: " + "; ".join(f"{name} {', '.join(map(str, of))}" for name, of in listed) + "."
    if named := pipeline.config.get("settings"):
        said += f" Settings by name: {named_settings(named)}."
    return f"{table}\n\n{said}" + (f" `{CONFIGURATION}` has every hyperparameter." if configs else "")


def named_settings(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """What calls with `settings=NAME` change, in words."""
    return "; ".join(
        f'`settings="{name}"` '
        + (
            ", ".join(f"{argument} {stage}={value}" for argument, of in named.items() for stage, value in of.items())
            or "(the defaults)"
        )
        for name, named in settings.items()
    )


def _stage_row(stage: Any, config: dict[str, Any] | None, options: dict[str, Any]) -> list[Any]:
    size, parameters = stage.unet.config.sample_size, stage.unet.num_parameters() / 1e6
    steps, level, guidance = (
        of.get(stage.name) if isinstance(of, dict) else of for name, of in options.items() if name != "timesteps"
    )
    training = config and config["training"]
    return [
        stage.name,
        f"{size}x{size}",
        f"{parameters:.2f}M",
        stage.scheduler.config.prediction_type,
        type(stage.scheduler).__name__,
        steps,
        "-" if level is None else level,
        guidance if stage.unet.config.null_class else "-",
        _data_of(config) if config else "unknown",
        f"{training['max_train_steps'] * training['train_batch_size']:,}" if training else "unknown",
    ]


def _pretrained_section(configs: dict[str, dict[str, Any]]) -> str:
    return "\n".join(
        f"- {name} began with the weights of {_stage_of(config['pretrained'])}; the images seen are those since then."
        for name, config in configs.items()
        if "pretrained" in config
    )


def _stage_of(origin: dict[str, Any]) -> str:
    place = Path(origin["pipeline"])
    shown = escaped(place.name if place.is_absolute() else str(place))
    return f"stage {origin['stage']} of {shown} (fingerprint {origin['fingerprint'][:12]})"


def _distillation_section(configs: dict[str, dict[str, Any]]) -> str:
    lines = [
        _distillation_line(name, config["distillation"], config["inference"]["num_inference_steps"])
        for name, config in configs.items()
        if "distillation" in config
    ]
    said = "Other numbers of steps than the default are not what such a stage has learnt."
    return "\n".join(lines) + f"\n\n{said}" if lines else ""


def _distillation_line(name: str, origin: dict[str, Any], num_steps: int) -> str:
    level, scale = origin["augmentation_level"], origin["guidance_scale"]
    return (
        f"- {name} is distilled from {_stage_of(origin)} by {origin['method']} "
        f"distillation: it makes in {num_steps} step{'s' * (num_steps > 1)} of DDIM what its teacher makes in "
        f"{origin['phases'][0][0]}"
        + (f", with guidance of w = {scale} folded in" if scale != 1 else "")
        + (f", at s = {level}" if level is not None else "")
        + "."
    )


def _origins(sources: dict[str, dict[str, Any]]) -> str:
    header = ("stage", "converted from", "published at", "original code", "licence", "trained on", "figures")
    keys = ("file", "url", "repository", "license", "data", "figures")
    rows = [[name, *(escaped(source[key] or "unknown") for key in keys)] for name, source in sources.items()]
    parts = [
        "Weights of others, converted for `cdm_diffusers`, which neither trained nor measured them. What they can do, "
        "and what they should not be used for, is said by their publishers, whose figures these are.",
        markdown_table(header, rows),
        "What the conversion assumed; the weights' shapes tell the rest. A network that was trained further on another"
        " noise schedule has the same shapes, and would need other settings.",
        "\n".join(f"- {name}: {line}" for name, source in sources.items() for line in source["assumptions"]),
    ]
    return "\n\n".join(parts)


def _validation_table(validation: dict[str, Any]) -> str:
    figures = {name: value for name, value in validation.items() if name != "weights"}
    if not figures:
        return ""
    rows = [(name, "not measured" if value is None else f"{value:.4f}") for name, value in figures.items()]
    return (
        markdown_table(("at the end of training", ""), rows)
        + "\n\nMeans and deviations are over all pixels in [-1, 1]; the samples are the few of the picture above."
    )


def _limits(pipeline: Any, measured: bool) -> str:
    labels = pipeline.config.id2label
    known = f"its {len(labels)} classes" if labels else "the kind that it was trained on"
    lines = []
    if _upsamples(pipeline):
        low = pipeline.unet.config.low_res_size
        lines.append(
            f"For enlarging images of exactly {low}x{low} pixels that are like {known}. Details are invented, not "
            "recovered: nobody should be identified, and nothing illegible read, by them."
        )
    else:
        lines.append(f"For making pictures of {known}, in research, teaching and play. It takes no text prompts.")
    lines.append(
        "Samples repeat what is uneven or wrong in the training data, and may resemble single training images."
    )
    lines.append("" if measured else "Nothing has been measured of their quality: look at them before you use them.")
    return " ".join(filter(None, lines))


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def check_report(report: dict[str, Any], pipeline: Any, file: str) -> None:
    """
    Args:
        report: JSON of `cdm recognition` or `cdm evaluate`.
        pipeline: as in [`write_card`].
        file: where the report was, for errors.

    Raises:
        ValueError: it says that it measured images of other classes or sizes than the pipeline makes.
    """
    sizes = [stage.unet.config.sample_size for stage in pipeline.stages]
    if "recognised" in report:
        names = list(report["recognised"]["samples"]["per_class"])
        own = list((pipeline.config.id2label or {}).values())
        if own and set(names) != set(own):
            raise ValueError(
                f"{file!r} measured samples of other classes ({_first(names)}) than this pipeline makes "
                f"({_first(own)}): give the report of its own samples."
            )
        measured = [stage["size"] for stage in report["stages"].values()]
        fits = measured in ([], sizes)
    else:
        measured = report["samples"]["size"]
        fits = measured in sizes
    if not fits:
        raise ValueError(
            f"{file!r} measured samples of size {measured}, and this pipeline makes {sizes}: give the report of its "
            "own samples."
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _results(reports: Sequence[dict[str, Any]], datasets: list[str], upsamples: bool) -> list[EvalResult]:
    """The model index: every figure with what measured it."""
    figures = [figure for report in reports for figure in _figures_of(report)]
    shared = {
        "task_type": "image-to-image" if upsamples else "unconditional-image-generation",
        "dataset_type": datasets[0] if datasets else "folder",
        "dataset_name": datasets[0] if datasets else "a local folder",
    }
    return [EvalResult(metric_type=t, metric_name=name, metric_value=value, **shared) for t, name, value in figures]


def _figures_of(report: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Type, name and value of the figures of `cdm recognition` or `cdm evaluate`."""
    if "recognised" in report:
        samples, classifier = report["recognised"]["samples"], Path(report["settings"]["classifier"]).name
        name = f"recognised as their class by the classifier {classifier}, {samples['num_images']:,} samples"
        return [("accuracy", name, samples["top_1"])]
    by = f"extractor {report['extractor']}, {report['samples']['num_images']:,} samples"
    distance = report["distance"]
    names = figure_names(distance)
    types = {"frechet_distance": "fid" if distance == "FID" else "frechet_distance"}
    figures = [
        (types.get(key, key), f"{names[key]} from {split!r}; {by}", figure["value"])
        for split, of_split in report["figures"].items()
        if split != "inception_score"
        for key, figure in of_split.items()
    ]
    score = report["figures"].get("inception_score")
    return figures + ([("inception_score", f"Inception Score; {by}", score["value"])] if score else [])
