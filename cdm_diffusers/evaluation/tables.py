"""What the reports of the instruments say, in markdown. Needs nothing but the reports."""

from typing import Any

from ..model_cards import figure_names
from ..tables import escaped, markdown_table, plus_minus


def quality_table(report: dict[str, Any]) -> str:
    """Of `cdm evaluate`."""
    samples, figures = report["samples"], report["figures"]
    names = figure_names(report["distance"])
    rows = [
        _quality_row(f"{names[name]}, {split!r}", figure)
        for split, of_split in figures.items()
        if split != "inception_score"
        for name, figure in of_split.items()
    ]
    if "inception_score" in figures:
        rows.append(_quality_row("Inception Score", figures["inception_score"]))
    header = ("figure", "samples", "95% interval", "real images", "images: samples / real / reference")
    lines = [
        f"Extractor: {report['extractor']}. {samples['num_images']:,} samples of {samples['source']}, "
        f"{samples['size']}x{samples['size']}.",
        "",
        markdown_table(header, rows),
        "",
    ]
    return "\n".join(lines + [f"- {warning}" for warning in report["warnings"]])


def _quality_row(name: str, figure: dict[str, Any]) -> list[str]:
    low, high = figure["interval"]
    counts = [figure["num_images"], figure["real"]["num_images"]]
    if "num_reference_images" in figure:
        counts.append(figure["num_reference_images"])
    cells = [name, f"{figure['value']:.4g}", f"{low:.4g} to {high:.4g}", f"{figure['real']['value']:.4g}"]
    return [*cells, " / ".join(f"{count:,}" for count in counts)]


def recognition_tables(report: dict[str, Any]) -> str:
    """Of `cdm recognition`; for model cards, too."""
    shares, near = report["recognised"], report["nearest_training_image"]
    pixels, features = report["diversity"]["pixels"], report["diversity"]["features"]
    of_samples, of_test = shares["samples"], shares["test"]
    header = (
        "",
        f"recognised: {of_samples['num_images']:,} samples",
        f"{of_test['num_images']:,} test images",
        "within-class distance, samples / data: pixels",
        "features",
    )
    overall = [
        f"{share['top_1']:.2%} ({share['top_1_interval'][0]:.1%} to {share['top_1_interval'][1]:.1%})"
        for share in (of_samples, of_test)
    ]
    classes = [["all classes", *overall, f"{pixels['ratio']:.3f}", f"{features['ratio']:.3f}"]]
    classes += [
        [escaped(name), _share(share), _share(of_test["per_class"][name])]
        + [f"{space['per_class'][name]['ratio']:.3f}" for space in (pixels, features)]
        for name, share in of_samples["per_class"].items()
    ]
    stages = [
        [name, stage["size"]]
        + [f"{stage[key][m]:+.4f}" for m in ("mean", "std") for key in ("samples", "data", "difference")]
        for name, stage in report["stages"].items()
    ]
    stage_header = ("stage", "size", "mean: samples", "data", "difference", "std: samples", "data", "difference")
    nearest = [[m, f"{near['samples'][m]:.3f}", f"{near['test'][m]:.3f}"] for m in ("mean", "median", "smallest")]
    nearest_header = (
        "distance to the nearest training image",
        f"{near['num_images']} samples",
        "as many test images",
    )
    tables = ((header, classes), (stage_header, stages), (nearest_header, nearest))
    return "\n\n".join(markdown_table(*table) for table in tables)


def accuracy_table(results: dict[str, Any], eval_split: str) -> str:
    """Of `cdm train classifier`."""
    rows = {"all classes, top-1": results["top_1"], "all classes, top-5": results["top_5"]}
    rows |= {escaped(name): share for name, share in results["per_class"].items()}
    header = (f"{results['num_images']:,} images of {eval_split!r}", "accuracy")
    return markdown_table(header, ((name, _share(value)) for name, value in rows.items()))


def _share(value: float | None) -> str:
    return "no images" if value is None else f"{value:.2%}"


def classification_accuracy_table(report: dict[str, Any], eval_split: str) -> str:
    """Of `cdm cas`: Table 1b."""
    accuracies = report["accuracies"]
    top_1 = f"top-1 on {accuracies['samples']['num_images']:,} of {eval_split!r}"
    rows = [
        [name, f"{row['num_train_images']:,}", row["num_seeds"]]
        + [plus_minus(row[key], ".2%") for key in ("top_1", "top_5")]
        for name, row in accuracies.items()
    ]
    table = markdown_table(("trained on", "images", "seeds", top_1, "top-5"), rows)
    if "compared_with" not in report:
        return table
    return (
        f"{table}\n\n{report['share_of_real_top_1']:.1%} of the top-1 accuracy of {report['compared_with']!r}; better "
        f"than it on {report['classes_where_samples_beat_real']} of {report['num_classes']} classes."
    )


def selection_table(report: dict[str, Any]) -> str:
    """Of `cdm select-checkpoint`."""
    settings, final, real = report["settings"], report["final"], report["real_images"]
    distance = f"Frechet distance to {settings['selecting_split']!r}, {settings['num_images']:,} samples"
    rows = [
        (figures["step"], _distance(figures), "selected" if name == report["selected"] else "")
        for name, figures in report["checkpoints"].items()
    ]
    return "\n".join(
        [
            f"Extractor: {settings['extractor']}.",
            "",
            markdown_table(("step", distance, ""), rows),
            "",
            f"{report['selected']}: {_distance(final)} to {final['split']!r}, {final['num_samples']:,} new samples.",
            "As many real images of the other split: "
            f"{real[settings['selecting_split']]:.3f} and {real[final['split']]:.3f}.",
        ]
    )


def _distance(figures: dict[str, float]) -> str:
    return plus_minus({"mean": figures["distance"], "standard_error": figures["standard_error"]}, ".3f")


def likelihood_table(report: dict[str, Any]) -> str:
    """Of `cdm likelihood`: bits per dimension with standard errors."""
    parts = [f"Upper bounds in bits per dimension, of {report['num_images']:,} images, with standard errors."]
    if report["stages"]:
        header = ("stage", "images", "s", "L_T", "sum of KL", "-log p(x_0 given x_1)", "total", "terms")
        parts.append(markdown_table(header, (_bound_row(name, of) for name, of in report["stages"].items())))
    if report["cascade"] is not None:
        figures = report["cascade"]
        levels = ", ".join(f"s = {level} into {name}" for name, level in figures["augmentation_levels"].items())
        of_stages = ", ".join(f"{name} {plus_minus(part, '.4f')}" for name, part in figures["stages"].items())
        parts.append(
            f"Cascade, {figures['size']}x{figures['size']} images (Eq. 3; {levels}):\n"
            f"{plus_minus(figures['bits_per_dimension'], '.4f')}, of which {of_stages}."
        )
    return "\n\n".join(parts)


def _bound_row(name: str, figures: dict[str, Any]) -> list[Any]:
    low_res = figures["low_res_size"]
    given = "" if low_res is None else f" given {low_res}x{low_res}"
    terms = [*(figures["terms"][key] for key in ("prior", "kl", "decoder")), figures["bits_per_dimension"]]
    return [
        name,
        f"{figures['size']}x{figures['size']}{given}",
        figures["augmentation_level"],
        *(plus_minus(term, ".4f") for term in terms),
        f"{figures['num_terms']} of {figures['of_terms']}",
    ]


def figures_table(report: dict[str, Any]) -> str:
    """Of `cdm recognition` or `cdm evaluate`, as model cards show it."""
    return recognition_tables(report) if "recognised" in report else quality_table(report)
