"""What both pipelines share: stages, and the loop that samples one of them."""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils.hub_utils import _add_variant
from diffusers.utils.torch_utils import randn_tensor
from typing_extensions import Self

from ..models import CascadedUNet2DModel
from ..publishing import hub_errors, keep_documents, upload
from ..schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler
from ..schedulers.ancestral import MOST_STEPS
from .denoising import AncestralSampler, Denoiser, SolverSampler
from .inputs import check_augmentation_level, check_count, check_guidance_scale
from .solvers import OWN_SCHEDULERS


# Of `from_pretrained`, which find the other files of a repository; and of `save_pretrained`, which say where to upload
HUB_OPTIONS = ("revision", "token", "cache_dir")
PUBLICATION = ("repo_id", "private", "token", "commit_message", "create_pr")

# Which draws make the image of a seed. It changes whenever the same seed begins to make other images, so that samples
# of the old rule are not mixed with those of the new one.
NOISE_RULE = "the noise of conditioning augmentation, whatever s is, before x_T"


def noise_rule(stages: "list[CascadeStage]", augmentation_levels: dict[str, int], truncated: bool) -> str | None:
    """[`NOISE_RULE`] where its last change changed the images of a seed, at s = 0 and when truncated; else None."""
    levels = [augmentation_levels[stage.name] for stage in stages if stage.noising_scheduler is not None]
    return NOISE_RULE if levels and (truncated or 0 in levels) else None


class StageOptions(NamedTuple):
    """How a stage is sampled: number of steps, s, and w of guidance. None is the default, and s of stages without."""

    num_inference_steps: int | None = None
    augmentation_level: int | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True)
class CascadeStage:
    r"""
    One stage of a cascade: `name` ("base", "super_res_1", ...), the network, the scheduler it samples with, and the
    forward process of its Gaussian conditioning augmentation (None for a base and for stages without).
    """

    name: str
    unet: CascadedUNet2DModel
    scheduler: SchedulerMixin
    noising_scheduler: CascadedDDPMScheduler | ContinuousDDPMScheduler | None = None

    def __post_init__(self):
        takes_level = self.unet.config.augmentation_level_embedding
        if self.noising_scheduler is None and takes_level:
            raise ValueError(
                f"The network of stage `{self.name}` is told an augmentation level, but the stage has no "
                "`noising_scheduler` to make the noise with."
            )
        if self.noising_scheduler is not None and not isinstance(self.noising_scheduler, OWN_SCHEDULERS):
            raise ValueError(
                f"The `noising_scheduler` of stage `{self.name}` is a {type(self.noising_scheduler).__name__}; it "
                "must be the CascadedDDPMScheduler or ContinuousDDPMScheduler of the preceding stage's training."
            )

    def default_num_inference_steps(self, recommended: int | None) -> int:
        """What was recommended, else T for CascadedDDPMScheduler and 100 for others; Diffusers' take at most 100 and
        half of T, since solvers need few steps and cannot use all of a cosine schedule."""
        num_train_timesteps = self.scheduler.config.num_train_timesteps
        if isinstance(self.scheduler, CascadedDDPMScheduler):
            return recommended or num_train_timesteps
        if isinstance(self.scheduler, ContinuousDDPMScheduler):
            return recommended or min(100, num_train_timesteps)
        return min(recommended or 100, 100, max(1, num_train_timesteps // 2))

    def _check_default(self, default: StageOptions):
        for option, lowest in (("num_inference_steps", 1), ("augmentation_level", 0)):
            value = getattr(default, option)
            if value is not None:
                check_count(f"The default `{option}` of stage `{self.name}`", value, lowest, MOST_STEPS)

    def options(self, given: StageOptions, default: StageOptions) -> StageOptions:
        """
        What was given, else the default, else [`default_num_inference_steps`], s = 0 and no guidance.

        Raises:
            ValueError: a number is out of range, or the stage takes no s or no guidance.
        """
        self._check_default(default)
        steps, level, scale = given
        if steps is None:
            steps = self.default_num_inference_steps(default.num_inference_steps)
        if level is None and self.noising_scheduler is not None:
            level = default.augmentation_level or 0
        if scale is None:
            scale = 1.0 if default.guidance_scale is None else default.guidance_scale
        return StageOptions(
            check_count(f"`num_inference_steps` of stage `{self.name}`", steps, highest=MOST_STEPS),
            check_augmentation_level(self.name, level, self.noising_scheduler),
            check_guidance_scale(self.name, scale, self.unet),
        )

    def denoiser(
        self, class_labels: torch.Tensor | None, low_res: torch.Tensor | None, level: int | None, guidance_scale: float
    ) -> Denoiser:
        """The network with its conditions; those that it was trained without are left out."""
        config = self.unet.config
        return Denoiser(
            self.unet,
            class_labels=None if config.num_classes is None else class_labels,
            low_res=low_res,
            augmentation_level=level if config.augmentation_level_embedding else None,
            guidance_scale=guidance_scale,
        )


def num_classes_of(stages: list[CascadeStage]) -> int | None:
    """Classes of the conditional stages, None if there are none."""
    return next((stage.unet.config.num_classes for stage in stages if stage.unet.config.num_classes is not None), None)


def load_index(kind: type[DiffusionPipeline], name: str | os.PathLike) -> dict[str, Any]:
    """
    `model_index.json` of a folder or of a Hub id.

    Raises:
        OSError: there is none, or it is no JSON.
        ValueError: it is not that of a pipeline, or names as a component what is none.
    """
    try:
        index = kind.load_config(name)
    except RecursionError:
        index = []
    file = f"The model_index.json of {os.fspath(name)!r}"
    if not isinstance(index, dict):
        problem = f"is of type {type(index).__name__}; it must be an object"
    elif not isinstance(index.get("_class_name"), str | list):
        problem = f"has the `_class_name` {index.get('_class_name')!r}; it must be the name of a class"
    else:
        check_components(kind, index, file, name)
        return index
    raise ValueError(f"{file} {problem}: take a whole copy of the pipeline.")


def check_components(
    kind: type[DiffusionPipeline],
    index: Mapping[str, Any],
    file: str = "The model_index.json",
    folder: str | os.PathLike | None = None,
) -> None:
    """
    Args:
        file: how errors call it.
        folder: where components may carry their own code. Without it, what such code may hold is left to Diffusers.

    Raises:
        ValueError: an entry of `index` is not the library and class of a network or scheduler, as its name wants.
    """
    components, _ = kind._get_signature_keys(kind)
    for part in components:
        wanted = SchedulerMixin if part.endswith("scheduler") else CascadedUNet2DModel
        if part in index and not _is_component(part, index[part], wanted.__name__, folder):
            raise ValueError(
                f"{file} has {index[part]!r} as `{part}`; it must be [library, class] of a {wanted.__name__}, or "
                "[null, null] for none: take a whole copy of the pipeline, or import the library first if it is yours."
            )


def _is_component(part: str, entry: Any, wanted: str, folder: str | os.PathLike | None) -> bool:
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        return False
    library, name = entry
    if library is name is None:
        return True
    if not isinstance(library, str) or not isinstance(name, str):
        return False
    found = component_class(entry)
    if found is None and library not in LOADABLE_CLASSES:
        return folder is None or Path(folder, part, f"{library}.py").is_file()
    # by name, since the code that a folder carries has classes of its own
    return wanted in [base.__name__ for base in getattr(found, "__mro__", ())]


def component_class(entry: Sequence[str]) -> Any:
    """What an entry [library, class] names, None where that is nothing: no library is imported because a file says."""
    library, name = entry
    return getattr(sys.modules.get(library), name, None)


class StepEnd:
    """`callback_on_step_end` with the tensors it asked for."""

    def __init__(self, callback: Callable | None, tensor_inputs: list[str] | None, known: list[str]):
        if callback is not None and not callable(callback):
            raise ValueError(
                f"`callback_on_step_end` is {callback!r}; it must be a function of (pipe, step, timestep, tensors)."
            )
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback.tensor_inputs
        tensor_inputs = known if tensor_inputs is None else tensor_inputs
        if not isinstance(tensor_inputs, (list, tuple)) or any(name not in known for name in tensor_inputs):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` is {tensor_inputs!r}; there is only {known}.")
        self.callback = callback
        self.tensor_inputs = tensor_inputs

    def __call__(self, pipe: DiffusionPipeline, step: int, timestep: torch.Tensor, sample: torch.Tensor):
        """
        The sample to go on with.

        Raises:
            ValueError: the callback returned no dict, or something else than such a sample in it.
        """
        if self.callback is None:
            return sample
        tensors = {"sample": sample}
        outputs = self.callback(pipe, step, timestep, {name: tensors[name] for name in self.tensor_inputs})
        if not isinstance(outputs, Mapping):
            raise ValueError(
                f"`callback_on_step_end` returned {outputs!r}; it must return a dict: the one it was given, or {{}}."
            )
        changed = outputs.get("sample", sample)
        if not torch.is_tensor(changed) or changed.shape != sample.shape:
            came = tuple(changed.shape) if torch.is_tensor(changed) else repr(changed)
            raise ValueError(
                f'`callback_on_step_end` returned the "sample" {came}; it must be a tensor of shape '
                f"{tuple(sample.shape)}."
            )
        return changed


class PixelDiffusionPipeline(DiffusionPipeline):
    """Base of [`CascadedDiffusionPipeline`] and [`SuperResolutionPipeline`]: loading, and the loop over steps."""

    _callback_tensor_inputs = ["sample"]
    _interrupt = False
    _current_stage = None
    _guidance_scale: float | None = None
    _num_timesteps = 0
    _hub_options: dict[str, Any] = {}  # how the Hub was asked for this pipeline

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `pipe._interrupt = True`, which ends sampling after the current step."""
        return self._interrupt

    @property
    def current_stage(self) -> str | None:
        """The name of the stage that is sampled at the moment."""
        return self._current_stage

    @property
    def guidance_scale(self) -> float | None:
        """
        The weight w of the stage that is sampled at the moment, or was last. A callback that sets
        `pipe._guidance_scale` changes it from the next step of the stage on, those after a restart too. Unlike in
        Diffusers' pipelines, 1 is no guidance, and 0 the null class alone. It is a finite number in -1e6..1e6.
        """
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the stage that is sampled at the moment, or was last."""
        return self._num_timesteps

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        r"""
        Loads a folder that [`~DiffusionPipeline.save_pretrained`] wrote, or a Hub id; `kwargs` are those of
        [`DiffusionPipeline.from_pretrained`] (`dtype`, `variant`, `device_map`, ...). Pickled weights are loaded only
        with `use_safetensors=False`.

        Raises:
            `OSError`: the folder is incomplete or damaged; the message says where.
            `ValueError`: the folder holds another kind of pipeline, or pickled weights.
        """
        kwargs = {"use_safetensors": True, **kwargs}
        if not os.path.isdir(pretrained_model_name_or_path):
            with hub_errors(pretrained_model_name_or_path):
                pipeline = cls._from_hub(pretrained_model_name_or_path, kwargs)
            pipeline._hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            return pipeline
        try:
            cls._check_complete(pretrained_model_name_or_path, pretrained_model_name_or_path, kwargs)
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            raise OSError(f"{pretrained_model_name_or_path} is incomplete or damaged: {error}") from error

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """
        What [`DiffusionPipeline.from_pretrained`] makes of `model_index.json`, whichever class it is called on.

        Raises:
            ValueError: it names as a component what is none.
        """
        check_components(cls, config_dict)
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def _from_hub(cls, name: str, kwargs: dict[str, Any]) -> Self:
        try:
            return super().from_pretrained(name, **kwargs)
        except (OSError, TypeError, LookupError, AttributeError, RecursionError):
            try:
                folder = cls.download(name, **{**kwargs, "local_files_only": True})
            except (OSError, ValueError):  # it never came
                folder = None
            if folder is not None:
                cls._check_complete(name, folder, kwargs)
            raise

    @classmethod
    def _check_complete(cls, name: str | os.PathLike, folder: str | os.PathLike, kwargs: dict[str, Any]) -> None:
        index = load_index(cls, folder)
        components, _ = cls._get_signature_keys(cls)
        absent = [part for part in components if part not in (*index, *kwargs, *cls._optional_components)]
        if absent:
            raise ValueError(f"{name} holds a {index['_class_name']} without {absent}, which is not a {cls.__name__}.")
        for part in components:
            if part not in index or index[part][0] is None or part in kwargs:
                continue
            if not os.path.isdir(os.path.join(folder, part)):
                raise OSError(f"the folder of component `{part}` is missing.")
            pickle, safetensors = (_weights_file(Path(folder, part), kind, kwargs) for kind in ("bin", "safetensors"))
            if kwargs["use_safetensors"] and pickle is not None and safetensors is None:
                raise ValueError(
                    f"{name} holds the weights of `{part}` as a pickle, {pickle.name}; pickles are not read, "
                    "since they can run code: where you trust it, load it once with `use_safetensors=False`, and save "
                    "the pipeline by `save_pretrained`."
                )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        r"""
        As [`DiffusionPipeline.save_pretrained`], and keeps what else the folder or Hub id held that the pipeline was
        loaded from: its card, samples, configurations and figures. Where there is no card, one is written.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            safe_serialization, variant, max_shard_size: as in Diffusers.
            push_to_hub (`bool`, defaults to `False`): whether to upload the folder, too.
            kwargs: with `push_to_hub`, its arguments and `repo_id`, which is by default the folder's name.
        """
        folder = Path(save_directory)
        publication = {name: kwargs.pop(name) for name in PUBLICATION if name in kwargs}
        super().save_pretrained(folder, safe_serialization, variant, max_shard_size, **kwargs)
        keep_documents(self, folder, self._origin, **self._hub_options)
        if push_to_hub:
            upload(folder, **{"repo_id": folder.resolve().name, "origin": self._origin, **publication})

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> Any:
        r"""
        Uploads the pipeline to the Hub with the documents that [`save_pretrained`] keeps.

        Args:
            repo_id (`str`): "NAME" or "OWNER/NAME", which is made where there is none.
            commit_message, private, token, create_pr, safe_serialization, variant, subfolder: as in Diffusers.

        Returns:
            `huggingface_hub.CommitInfo`: its `repo_url`, `oid` and so on.

        Raises:
            `OSError`: the Hub was not reached, or refuses.
        """
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, repo_id.split("/")[-1])
            self.save_pretrained(folder, safe_serialization, variant)
            commit = {"commit_message": commit_message, "create_pr": create_pr, "path_in_repo": subfolder}
            return upload(folder, repo_id, private=private, token=token, origin=self._origin, **commit)

    @property
    def _origin(self) -> str | None:
        """The folder or Hub id that the pipeline was loaded from."""
        origin = self.config.get("_name_or_path")
        return None if origin is None else os.fspath(origin)

    def _checked_id2label(self, id2label: dict | None, num_classes: int | None) -> dict[int, str] | None:
        """`id2label` with the int keys that JSON has made strings."""
        if id2label is None:
            return None
        if not isinstance(id2label, Mapping) or not all(re.fullmatch(r"-?\d+", str(index)) for index in id2label):
            raise ValueError(f"`id2label` is {id2label!r}; it must be a dict of indices of classes to their names.")
        id2label = {int(index): str(name) for index, name in id2label.items()}
        if num_classes is None or not all(0 <= index < num_classes for index in id2label):
            raise ValueError(f"`id2label` has the keys {list(id2label)}; the networks have {num_classes} classes.")
        return id2label

    def _initial_noise(self, stage: CascadeStage, sampler, batch_size: int, generator) -> torch.Tensor:
        """x_T ~ N(0, I), float32, at the scale of the scheduler."""
        size = stage.unet.config.sample_size
        shape = (batch_size, stage.unet.config.in_channels, size, size)
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        return noise * sampler.scheduler.init_noise_sigma

    def _denoise(
        self,
        name: str,
        sampler: AncestralSampler | SolverSampler,
        denoiser: Denoiser,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        on_step_end: StepEnd,
    ) -> torch.Tensor:
        """
        Takes `sample` down the grid of `sampler`: the reverse process of one stage (Algorithm 2).

        Raises:
            ValueError: the result is not finite, or an output of the network was not, which limits of x_0 hide. It is
                read once, at the end, so that no step waits for the device.
        """
        self._current_stage, self._num_timesteps = name, len(sampler.timesteps)
        self._guidance_scale = denoiser.guidance_scale
        try:
            with self.progress_bar(total=len(sampler.timesteps)) as progress_bar:
                progress_bar.set_description(name)
                for index, timestep in enumerate(sampler.timesteps):
                    if self.interrupt:
                        break
                    sample = sampler.step(index, denoiser, sample, generator)
                    sample = on_step_end(self, index, timestep, sample)
                    denoiser.guidance_scale = check_guidance_scale(name, self.guidance_scale, denoiser.unet)
                    progress_bar.update()
        finally:
            self._current_stage = None
        if not sample.isfinite().all() & denoiser.is_finite:
            raise ValueError(
                f"Stage `{name}` made NaN or infinite values: check its weights, its dtype (float16 overflows where "
                "bfloat16 and float32 do not) and `guidance_scale`."
            )
        return sample


def _weights_file(folder: Path, kind: str, kwargs: dict[str, Any]) -> Path | None:
    """The file of weights, or the index of its shards, that loading with `kwargs` looks for."""
    names = (f"diffusion_pytorch_model.{kind}", f"diffusion_pytorch_model.{kind}.index.json")
    files = (folder / _add_variant(name, kwargs.get("variant")) for name in names)
    return next(filter(Path.is_file, files), None)
