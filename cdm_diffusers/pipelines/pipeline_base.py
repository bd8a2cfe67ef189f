"""What both pipelines share: loading and saving, callbacks, and the loop that samples a stage."""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor

from ..hub import check_reached, hub_errors
from ..models import constant_conditions
from ..plain import plain
from ..publishing import keep_documents, upload
from .denoising import AncestralSampler, Denoiser, SolverSampler, has_hooks
from .inputs import check_guidance_scale
from .model_index import check_complete, check_components
from .stages import CascadeStage


# Arguments of `from_pretrained` by which the other files of a repository are found; and of `save_pretrained` that say
# where to upload
HUB_OPTIONS = ("revision", "token", "cache_dir")
PUBLICATION = ("repo_id", "private", "token", "commit_message", "create_pr")


def added_to_config(**entries) -> dict[str, Any]:
    """Config entries added in later versions; None is left out, since earlier versions do not know the entry."""
    return {name: plain(value) for name, value in entries.items() if value is not None}


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
            ValueError: the callback did not return a dict, or returned something other than such a sample in it.
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
    _hub_options: dict[str, Any] = {}  # with which this pipeline was loaded from the Hub

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `pipe._interrupt = True`, which ends sampling after the current step."""
        return self._interrupt

    @property
    def current_stage(self) -> str | None:
        """The name of the stage being sampled."""
        return self._current_stage

    @property
    def guidance_scale(self) -> float | None:
        """
        The guidance weight w of the stage being sampled, or sampled last. A callback that sets `pipe._guidance_scale`
        changes it from the stage's next step on, including steps after a restart. Unlike in Diffusers' pipelines, 1 is
        no guidance, and 0 the null class alone. It is a finite number in -1e6..1e6.
        """
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the stage being sampled, or sampled last."""
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
            hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            if not kwargs.get("local_files_only"):
                check_reached(pretrained_model_name_or_path, **hub_options)
            with hub_errors(pretrained_model_name_or_path):
                pipeline = cls._from_hub(pretrained_model_name_or_path, kwargs)
            pipeline._hub_options = hub_options
            return pipeline
        try:
            check_complete(cls, pretrained_model_name_or_path, pretrained_model_name_or_path, kwargs)
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
            ValueError: a component that it names is not a network or scheduler.
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
            except (OSError, ValueError):  # it was never downloaded
                folder = None
            if folder is not None:
                check_complete(cls, name, folder, kwargs)
            raise

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
        As [`DiffusionPipeline.save_pretrained`], and keeps the other documents of the folder or Hub repository that
        the pipeline was loaded from: card, samples, configurations and figures. If there is no card, one is written.

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
            repo_id (`str`): "NAME" or "OWNER/NAME", created if it does not exist.
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
    def _execution_device(self) -> torch.device:
        """As in Diffusers, which goes through all networks several times; here only where one of them is offloaded."""
        unets = [stage.unet for stage in self.stages]
        devices = {next(unet.parameters()).device for unet in unets}
        if len(devices) > 1 or any(map(has_hooks, unets)):
            return super()._execution_device
        return devices.pop()

    @property
    def _origin(self) -> str | None:
        """The folder or Hub id that the pipeline was loaded from."""
        origin = self.config.get("_name_or_path")
        return None if origin is None else os.fspath(origin)

    def _checked_id2label(self, id2label: dict | None, num_classes: int | None) -> dict[int, str] | None:
        """`id2label` with int keys, which JSON turns into strings."""
        if id2label is None:
            return None
        if not isinstance(id2label, Mapping) or not all(re.fullmatch(r"-?\d+", str(index)) for index in id2label):
            raise ValueError(f"`id2label` is {id2label!r}; it must be a dict from class indices to class names.")
        id2label = {int(index): str(name) for index, name in id2label.items()}
        if num_classes is None or not all(0 <= index < num_classes for index in id2label):
            raise ValueError(f"`id2label` has the keys {list(id2label)}; the networks have {num_classes} classes.")
        return id2label

    def _initial_noise(self, stage: CascadeStage, sampler, batch_size: int, generator) -> torch.Tensor:
        """x_T ~ N(0, I), float32, at the scale of the scheduler."""
        size = stage.unet.config.sample_size
        shape = (batch_size, stage.unet.config.in_channels, size, size)
        noise = randn_tensor(shape, generator=generator, device=sampler.times.device, dtype=torch.float32)
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
            ValueError: the result, or an output of the network, is not finite; limiting x_0 would hide the latter.
                Checked once, at the end, so that no step waits for the device.
        """
        self._current_stage, self._num_timesteps = name, len(sampler.timesteps)
        self._guidance_scale = denoiser.guidance_scale
        try:
            with constant_conditions(), self.progress_bar(total=len(sampler.timesteps)) as progress_bar:
                progress_bar.set_description(name)
                for index, timestep in enumerate(sampler.timesteps):
                    if self.interrupt:
                        break
                    sample = sampler.step(index, denoiser, sample, generator)
                    sample = on_step_end(self, index, timestep, sample)
                    denoiser.guidance_scale = check_guidance_scale(name, self.guidance_scale, denoiser.unet)
                    _show_rate(progress_bar, len(sample) * (index + 1) / len(sampler.timesteps))
                    progress_bar.update()
        finally:
            self._current_stage = None
        if denoiser.refine is not None and not self.interrupt:
            sample = denoiser.refine(sample)  # some solvers do not end exactly on their last x_0
        if not denoiser.is_finite(sample):
            raise ValueError(
                f"Stage `{name}` made NaN or infinite values: check its weights, its dtype (float16 overflows where "
                "bfloat16 and float32 do not) and `guidance_scale`."
            )
        return sample


def _show_rate(progress_bar: Any, num_images: float) -> None:
    """Images per second after the time left, if the bar keeps time; `num_images`, fractions included, are done."""
    elapsed = getattr(progress_bar, "format_dict", {}).get("elapsed")
    if elapsed:
        progress_bar.set_postfix_str(f"{num_images / elapsed:.3g} images/s", refresh=False)
