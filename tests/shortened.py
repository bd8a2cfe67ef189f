"""
The commands and the Python of a document, made short: `python tests/shortened.py < STEPS`, a JSON list of lists of
words, in a folder where FASHION_MNIST holds a few pictures, and small networks lie under the names of large ones.

Each step has a process of its own, forked from one that has imported what takes long.
"""

import importlib
import json
import multiprocessing
import runpy
import sys
from itertools import pairwise
from pathlib import Path
from urllib.request import urlopen

import torch
from documents import words_of_cdm
from forkserver import PRELOADED
from golden import TWINS
from scripts import ROOT

from cdm_diffusers.commands.main import COMMANDS, main


TRAINING = (
    "--max_train_steps 2 --train_batch_size 4 --lr_warmup_steps 1 --validation_inference_steps 2 --report_to none"
)
# What each command is given besides.
SHORTER = {
    "train base": TRAINING,
    "train sr": TRAINING,
    "train classifier": "--num_train_epochs 1 --train_batch_size 10",
    "distill": "--phase_steps 1 --train_batch_size 4 --lr_warmup_steps 0 --validation_steps 0 --report_to none",
    "sample": "--num_inference_steps 2 --num_images_per_label 1",
    "sample-set": "--num_images 20 --batch_size 20 --num_inference_steps 2",
    "search": "--num_images 20 --batch_size 20 --seeds 0 --ensemble_images 2",
    "cas": "--num_train_epochs 1 --train_batch_size 10 --num_seeds 1",
    "likelihood": "--num_images 2 --num_terms 2",
    "select-checkpoint": "--num_images 20 --num_final_images 20 --num_inference_steps 2",
    "reproduce": "--num_images 20 --sampling_seeds 0 1 --max_train_steps 2 --train_data_dir FASHION_MNIST",
    "app": "--port 0",
    "benchmarks/consistency.py": "--num_images 2 --num_samples 2",
    "benchmarks.gpu": "--toy --device cpu --minutes 5",
}
# Networks of the paper's size, made small.
SMALL_NETWORK = (
    "--block_out_channels 8 16 --layers_per_block 1 --norm_num_groups 4 --attention_resolutions 0 "
    "--mid_block_attention false"
)
# The same where a word is given.
SHORTER_WITH = {
    ("train base", "--compile"): "--no_compile",
    ("train sr", "--compile"): "--no_compile",
    ("train base", "imagenet_64"): SMALL_NETWORK,
    ("train sr", "imagenet_64_to_256"): f"{SMALL_NETWORK} --gradient_accumulation_steps 2 --validation_steps 0",
    ("train base", "runs/augmentation/good-base"): "--max_train_steps 300",
    ("train base", "runs/unlabelled/base"): "--max_train_steps 300",
    ("examples/avatars/measure.py", "train"): "--num_train_epochs 1",
    ("assemble", "imagenet-64"): '--default_num_inference_steps {"base":5,"super_res_1":5}',
    ("evaluate", "--num_reference_images"): "--num_reference_images 20",
    ("search", "--num_inference_steps"): "--num_inference_steps 2",
    ("search", "--augmentation_levels"): "--augmentation_levels 0 500 --num_inference_steps 2",
    ("search", "--grid"): '--grid {"num_inference_steps":[2],"scheduler":["ancestral","unipc"]}',
}
# Processors without instructions for bf16 emulate it: minutes a step at 64x64.
SHORTER_WITH |= {(command, "bf16"): "--mixed_precision no" for command in ("train base", "train sr", "distill")}
# What stands for files and data sets that are not there.
PLACES = {"/usr/share/datasets/fashion-mnist": "FASHION_MNIST"}
# Options that are left out with their value: guided-diffusion's code is not here.
LEFT_OUT = {"--guided_diffusion"}
NETWORKS = {
    "64x64_diffusion.pt": TWINS["small cosine 1000"],
    "64_256_upsampler.pt": TWINS["small linear 4000"],
    "ema_0.9999_200000.pt": TWINS["128x128"],
}
# Programs that are not run, and who runs what they would.
LEFT_TO_OTHERS = {
    "make": "tests/test_installed.py installs, and other tests run what the targets run",
    "pip": "tests/test_installed.py",
    "npm": "tests/test_avatars.py",
    "node": "tests/test_avatars.py; pictures lie there already",
    "curl": "files of gigabytes; small ones lie there already",
}
# Configurations of `reproduce` that are run dry, since they end at once where a weak base is as good as a good one:
# with stages that are trained for two steps. tests/test_reproduce.py covers such rows with other stages.
RUN_DRY = {f"configs/augmentation{name}.json" for name in ("", "_every_level", "_unlabelled")}


def shortened(command: str, words: list[str]) -> list[str]:
    """The words of a command, or of another program, then those that make it short."""
    words = [PLACES.get(word, word) for before, word in pairwise(["", *words]) if not {before, word} & LEFT_OUT]
    further = [SHORTER.get(command, "")]
    further += [more for (name, word), more in SHORTER_WITH.items() if name == command and word in words]
    if words[0] in NETWORKS:
        further += [f"--{name} {value}" for name, value in NETWORKS[words[0]].settings.items()]
    return [*words, *" ".join(further).split()]


def small_config(file: str) -> str:
    """A configuration of `reproduce` with small batches, two steps and few levels in place of what `file` has."""
    content = json.loads(Path(file).read_text())
    own = [stage["options"] for stage in content["stages"].values() if "options" in stage]
    for trained in (content["training"], *own):
        trained["train_batch_size"] = 4
    for experiment in content["experiments"].values():
        experiment |= {"batch_sizes": [2, 4]} if "batch_sizes" in experiment else {}
        experiment.get("evaluation", {}).pop("num_reference_images", None)
        experiment["num_inference_steps"] = dict.fromkeys(experiment["num_inference_steps"], 2)
        for several in {"levels", "steps"} & experiment.keys():
            experiment[several] = experiment[several][:2]
    if "classification" in content:
        content["classification"] |= {"num_images": 20, "num_train_epochs": 1, "num_seeds": 1, "train_batch_size": 10}
    small = Path(f"small-{Path(file).name}")
    small.write_text(json.dumps(content))
    return str(small)


def visit_once() -> None:
    """Lets `cdm app` end when it has been visited, instead of waiting."""
    import gradio

    gradio.Blocks.block_thread = lambda page: (urlopen(page.local_url).close(), page.close())


def run_command(words: list[str]) -> None:
    command = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
    words = words[len(command.split()) :]
    if RUN_DRY & set(words):
        words.append("--dry_run")
    if "--dry_run" not in words:
        words = shortened(command, words)
        if command == "reproduce":
            words = [small_config(word) if word.startswith("configs/") else word for word in words]
        elif command == "app":
            visit_once()
    main([*command.split(), *words])


def run_script(*words: str) -> None:
    """A script that is not a command of cdm: its file, or -m and its name, and its words."""
    is_module = words[0] == "-m"
    name, *further = words[is_module:]
    sys.argv = [name, *shortened(name, further)]
    if is_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / name), run_name="__main__")


def run(program: str, *words: str) -> None:
    """A step: a program and its words, or "Python" and a block of it."""
    if program == "Python":
        text = words[0] if torch.cuda.is_available() else words[0].replace('.to("cuda")', "")
        exec(compile(text, "block", "exec"), {"__name__": "__main__"})
    elif program == "hf":
        sys.argv = [program, *words]
        importlib.import_module("huggingface_hub.cli.hf").main()
    elif program not in LEFT_TO_OTHERS:
        given = words_of_cdm(program, *words)
        if given is None:
            run_script(*words)
        else:
            main(given) if given[0].startswith("-") else run_command(given)


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    for step in json.load(sys.stdin):
        process = multiprocessing.get_context("fork").Process(target=run, args=step)
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{' '.join(step)}: ended with {process.exitcode}")
