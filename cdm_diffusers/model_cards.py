"""Model cards for the Hub: what a stage was trained on, how, how it measures, and how to use it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def write_stage_card(
    pipeline: Any, resolved_config: dict[str, Any], figures: dict[str, float | None], output_dir: Path
) -> None:
    """
    Writes `README.md` into the folder of a trained stage's pipeline.

    Args:
        pipeline ([`CascadedDiffusionPipeline`] or [`SuperResolutionPipeline`]): what is in the folder.
        resolved_config (`dict`): the run's `training_config.json`.
        figures (`dict`): what was measured: `loss`, and mean and standard deviation of samples and data.
        output_dir (`Path`): the folder of the pipeline.
    """
    unet, data = resolved_config["unet"], resolved_config["data"]
    low_res = unet["low_res_size"]
    size = unet["sample_size"]
    kind = f"{size}x{size} base" if low_res is None else f"{low_res}x{low_res} to {size}x{size} super-resolution"
    source = data["dataset_name"] or f"a local folder, `{Path(data['train_data_dir']).name}`"
    card_data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="image-to-image" if low_res else "unconditional-image-generation",
        tags=["cdm_diffusers", "cascaded-diffusion", type(pipeline).__name__],
        datasets=[data["dataset_name"]] if data["dataset_name"] else None,
    )
    examples = "a stream" if data["num_examples"] is None else f"{data['num_examples']:,} images"
    sections = [
        f"---\n{card_data.to_yaml()}\n---",
        f"# {resolved_config['name']}: {kind} stage of a cascaded diffusion model",
        "A stage of a cascade, as in [Cascaded Diffusion Models for High Fidelity Image Generation]"
        "(https://arxiv.org/abs/2106.15282), trained with `cdm_diffusers`. These are the EMA weights.",
        "![samples](samples.png)" if (output_dir / "samples.png").is_file() else "",
        f"## How to use\n\n```python\n{usage(pipeline, data)}\n```",
        f"## Data\n\n{source}: {examples}, brought to {data['source_resolution']}x{data['source_resolution']} pixels"
        f" (BigGAN's centre crop), then area-averaged to {size}x{size}."
        + (f" {len(data['id2label'])} classes." if data["id2label"] else " No class labels."),
        "## Hyperparameters\n\n"
        + table(
            {
                f"{s}.{n}": v
                for s in ("unet", "scheduler", "augmentation", "training")
                for n, v in (resolved_config[s] or {}).items()
            }
        ),
        "## Figures\n\n"
        + table({n: "not measured" if v is None else f"{v:.4f}" for n, v in figures.items()})
        + "\n\nMeans and deviations are over all pixels in [-1, 1]; the samples are the few of the picture above.",
    ]
    ModelCard("\n\n".join(section for section in sections if section) + "\n").save(output_dir / "README.md")


def write_cascade_card(
    name: str, pipeline: Any, resolved_configs: dict[str, dict[str, Any]], figures: str | None, output_dir: Path
) -> None:
    """
    Writes `README.md` into the folder of a cascade.

    Args:
        name (`str`): of the cascade.
        pipeline ([`CascadedDiffusionPipeline`]): what is in the folder.
        resolved_configs (`dict`): for each stage's name its run's `training_config.json`; stages without one are said
            to be of unknown training.
        figures (`str`, *optional*): what was measured, in markdown.
        output_dir (`Path`): the folder; a `samples.png` in it is shown.
    """
    sizes = " -> ".join(
        f"{stage.unet.config.sample_size}x{stage.unet.config.sample_size}" for stage in pipeline.stages
    )
    data = next((config["data"] for config in resolved_configs.values()), {})
    card_data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["cdm_diffusers", "cascaded-diffusion", type(pipeline).__name__],
        datasets=[data["dataset_name"]] if data.get("dataset_name") else None,
    )
    labels, options = pipeline.config.id2label, pipeline.stage_options()
    sections = [
        f"---\n{card_data.to_yaml()}\n---",
        f"# {name}: a cascade {sizes}",
        "A cascade of diffusion models, as in [Cascaded Diffusion Models for High Fidelity Image Generation]"
        "(https://arxiv.org/abs/2106.15282), made with `cdm_diffusers`. After `import cdm_diffusers`, Diffusers' own "
        "`DiffusionPipeline.from_pretrained` loads it too.",
        "![samples, every stage beside the next](samples.png)" if (output_dir / "samples.png").is_file() else "",
        f"## How to use\n\n```python\n{usage(pipeline, {'id2label': labels})}\n```",
        f"## Classes\n\n{', '.join(f'{index} {name}' for index, name in labels.items())}" if labels else "",
        "## Stages\n\n"
        + "\n".join(
            [
                "| stage | size | parameters | predicts | scheduler | steps | s | guidance | trained on | "
                "images seen |",
                "|---|---|---|---|---|---|---|---|---|---|",
                *(stage_row(stage, resolved_configs.get(stage.name), options) for stage in pipeline.stages),
            ]
        )
        + "\n\nScheduler, steps, s and guidance are the defaults of a call. `training_config.json` has "
        "every hyperparameter.",
        f"## Figures\n\n{figures}" if figures else "",
    ]
    ModelCard("\n\n".join(section for section in sections if section) + "\n").save(output_dir / "README.md")


def stage_row(stage: Any, resolved: dict[str, Any] | None, options: dict[str, dict[str, Any]]) -> str:
    """
    A stage's row in the card of its cascade.

    Args:
        stage ([`CascadeStage`]): the stage.
        resolved (`dict`, *optional*): its run's `training_config.json`.
        options (`dict`): what [`CascadedDiffusionPipeline.stage_options`] returns.
    """
    size, parameters = stage.unet.config.sample_size, stage.unet.num_parameters() / 1e6
    prediction = stage.scheduler.config.prediction_type
    trained_on = images_seen = "unknown"
    if resolved is not None:
        data, training = resolved["data"], resolved["training"]
        trained_on = data["dataset_name"] or f"a local folder, `{Path(data['train_data_dir']).name}`"
        images_seen = f"{training['max_train_steps'] * training['train_batch_size']:,}"
    cells = [stage.name, f"{size}x{size}", f"{parameters:.2f}M", prediction, type(stage.scheduler).__name__]
    cells += [
        options["num_inference_steps"][stage.name],
        options["augmentation_levels"].get(stage.name, "-"),
        options["guidance_scale"][stage.name] if stage.unet.config.null_class else "-",
        trained_on,
        images_seen,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def usage(pipeline: Any, data: dict[str, Any]) -> str:
    """Code that loads a pipeline and samples; `data` has the class names, `id2label`, or None for them."""
    name = type(pipeline).__name__
    lines = [f"from cdm_diffusers import {name}", "", f'pipe = {name}.from_pretrained("path/to/this/folder")']
    arguments = []
    if name == "SuperResolutionPipeline":
        arguments.append("low_res_image")
    if data["id2label"]:
        label = next(iter(data["id2label"].values()))
        arguments.append(f'class_labels=["{label}"]')
    return "\n".join([*lines, f"images = pipe({', '.join(arguments)}).images"])


def table(rows: dict[str, Any]) -> str:
    """Names and values as a table in markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
