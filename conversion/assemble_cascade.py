"""Join separately trained stages into one CascadedDiffusionPipeline, checking that they fit, with a model card.

python conversion/assemble_cascade.py --base runs/base --super-res runs/sr-1 runs/sr-2 --output cascade
"""

import argparse
import json
from pathlib import Path

from cdm_diffusers import CascadedDiffusionPipeline
from cdm_diffusers.conversion.cards import add_sources
from cdm_diffusers.files import staged_folder, write_json
from cdm_diffusers.model_cards import write_cascade_card


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="Folder or Hub id of the base stage.")
    parser.add_argument(
        "--super-res", nargs="*", default=[], help="Folders or Hub ids of up to three super-resolution stages."
    )
    parser.add_argument("--output", required=True, type=Path, help="Folder for the cascade.")
    parser.add_argument(
        "--default-num-inference-steps", type=json.loads, help='As JSON: {"base": 100}. Default: the stages\' own.'
    )
    parser.add_argument(
        "--default-augmentation-levels",
        type=json.loads,
        help='As JSON: {"super_res_1": 400}. Default: the stages\' own.',
    )
    parser.add_argument(
        "--default-guidance-scales", type=json.loads, help='As JSON: {"base": 1.5}. Default: the stages\' own.'
    )
    parser.add_argument(
        "--schedulers",
        type=json.loads,
        help='Solvers to sample with, as JSON: {"super_res_1": "unipc"}; ancestral, ddim, dpmsolver++, '
        'sde-dpmsolver++ or unipc (takes the extra "eval"). Default: the stages\' own.',
    )
    parser.add_argument("--recognition", type=Path, help="JSON of evaluation/recognition.py, for the model card.")
    parser.add_argument("--sample-grid", type=Path, help="PNG of samples, for the model card.")
    return parser.parse_args()


def read_all(folders: dict[str, Path], file: str) -> dict[str, dict]:
    """The JSON `file` of each stage that has one."""
    return {
        name: json.loads((folder / file).read_text()) for name, folder in folders.items() if (folder / file).is_file()
    }


def main():
    args = parse_args()
    cascade = CascadedDiffusionPipeline.from_stages(args.base, *args.super_res)
    for name in ("default_num_inference_steps", "default_augmentation_levels", "default_guidance_scales"):
        if getattr(args, name) is not None:
            cascade.register_to_config(**{name: {**(cascade.config[name] or {}), **getattr(args, name)}})
    if args.schedulers:
        from cdm_diffusers.pipelines.solvers import with_schedulers

        cascade = with_schedulers(cascade, args.schedulers)
    names = [stage.name for stage in cascade.stages]
    folders = dict(zip(names, map(Path, [args.base, *args.super_res]), strict=True))
    configs, sources = read_all(folders, "training_config.json"), read_all(folders, "source.json")
    figures = None
    if args.recognition:
        from cdm_diffusers.evaluation.recognition import tables

        figures = tables(json.loads(args.recognition.read_text()))

    with staged_folder(args.output) as folder:
        cascade.save_pretrained(folder)
        write_json(folder / "training_config.json", configs)
        if args.recognition:
            (folder / "recognition.json").write_bytes(args.recognition.read_bytes())
        if args.sample_grid:
            (folder / "samples.png").write_bytes(args.sample_grid.read_bytes())
        write_cascade_card(args.output.name, cascade, configs, figures, folder)
        if sources:
            add_sources(folder / "README.md", sources, num_stages=len(folders))


if __name__ == "__main__":
    main()
