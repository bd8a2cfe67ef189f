"""The training loop of one stage of a cascade, base or super-resolution (Algorithm 1 of the paper)."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    gather_object,
    patch_environment,
    set_seed,
)
from diffusers.optimization import get_scheduler
from diffusers.utils import logging
from PIL import Image
from tqdm.auto import tqdm

from ..data.fingerprints import commit_of, identity_of
from ..data.memory import ImageData, held_in_memory
from ..data.sources import open_images
from ..data.streams import Place
from ..data.survey import check_before_training
from ..data.transforms import area_resize, random_crop, random_flip, to_float
from ..draws import draw
from ..files import replace_folder, reveal, temporary_name, write_json, writing
from ..model_cards import SOURCE
from ..models import CascadedUNet2DModel
from ..pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from ..pipelines.loading import PARTS, check_output
from ..presets import StagePreset
from ..processes import ending_together, from_main, held_by_main, open_state
from ..publishing import prepare_if_asked, push_if_asked
from .batches import BATCH, ImageBatches, LaneBatches, Noise, Split, StreamBatches
from .checkpoints import (
    TrainingState,
    checkpoint_to_resume,
    how_to_go_on,
    last_good,
    loading,
    naming_last_good,
    read_checkpoint,
    read_state,
    rotate,
    write_state,
)
from .config import RunConfig, TrainingConfig
from .cpu import check_mixed_precision, warn_of_slow_cpu
from .ema import LerpEMAModel
from .export import check_inference_steps, pipeline_of, save_pipeline, saved_part_names
from .pretrained import Pretrained, load_pretrained
from .progress import farewell, interruption, introduction, warnings
from .resolve import (
    check_resumable,
    data_config,
    drawn_for,
    flatten,
    resolve_channels_last,
    resolve_preset,
    run_description,
    was_streamed_whole,
)
from .same_data import DATA_NAME, check_same_data
from .sharding import (
    check_sharding,
    gather,
    gather_optimizer,
    load_optimizer,
    shard,
    shard_of,
    sharding_asked,
    whole,
)
from .signals import Interrupted, StopSignals, end_by, obey_parent
from .stage import Stage, build_stage
from .trackers import check_tracker, log_sample_grid
from .validation import Validation


logger = logging.get_logger(__name__)

# What a command trains, given the number of processes and the configuration of the checkpoint that it goes on from:
# the resolved preset, and what makes the [`Trainer`].
Plan = Callable[[int, dict[str, Any] | None], tuple[StagePreset, Callable[..., "Trainer"]]]


def train_base(config: TrainingConfig) -> None:
    """[`train`] of a base stage."""
    train(config, super_resolution=False)


def train_super_resolution(config: TrainingConfig) -> None:
    """[`train`] of a super-resolution stage."""
    train(config, super_resolution=True)


def train(config: TrainingConfig, super_resolution: bool) -> None:
    """
    Trains one stage and leaves a pipeline folder with its EMA weights in `config.output_dir`.

    Args:
        config ([`TrainingConfig`]): the options of the command line.
        super_resolution (`bool`): which kind of stage `config.preset` must name.

    Raises:
        ValueError: for options, data or a checkpoint that do not fit, or while another run has the folder.
        RuntimeError: when a loss or a gradient is not finite; what was saved before stays.
        OSError: when something cannot be read or written; what was saved before stays.
        SystemExit, KeyboardInterrupt: after SIGTERM and Ctrl-C, once the current step is saved.
    """

    def plan(num_processes: int, saved: dict[str, Any] | None):
        preset = resolve_preset(config, super_resolution, num_processes, saved)
        name = config.pretrained_model_name_or_path
        return preset, partial(Trainer, pretrained=None if name is None else load_pretrained(name, preset.unet))

    carry_out(plan, config)


def carry_out(plan: Plan, config: RunConfig) -> None:
    """[`train`] of what is planned, alone in its folder, and by all processes or by none."""
    output_dir = Path(config.output_dir)
    is_sharded = sharding_asked()
    opened_before = torch.distributed.is_available() and torch.distributed.is_initialized()  # by an experiment
    state = open_state()
    with ending_together(state, lambda: how_to_go_on(output_dir)), held_by_main(state, output_dir, "a training"):
        train_alone(plan, config, state, is_sharded)
    if not opened_before:
        state.destroy_process_group()


def train_alone(plan: Plan, config: RunConfig, state: PartialState, is_sharded: bool) -> None:
    """[`train`] in a folder that no other run has."""
    checkpoint = checkpoint_to_resume(config.resume_from_checkpoint, Path(config.output_dir))
    saved = None if checkpoint is None else read_checkpoint(checkpoint)[0]
    preset, make_trainer = plan(state.num_processes, saved)
    if config.validation_steps and config.validation_inference_steps is not None:
        check_inference_steps(preset, config.validation_inference_steps)
    parts = saved_part_names(preset)
    from_main(lambda: check_output(config.output_dir, parts, "output_dir", (*PARTS, SOURCE)))
    accelerator = make_accelerator(config, preset, state)
    if accelerator.is_main_process:
        prepare_if_asked(config, config.output_dir)
    if is_sharded:
        check_sharding(config, accelerator.num_processes)
    channels_last = not is_sharded and resolve_channels_last(
        config.channels_last, saved, config.compile, accelerator.device
    )
    config = dataclasses.replace(config, channels_last=channels_last)
    of_data = data_config(config, preset)
    if config.dataset_revision is not None:  # resolved once, since branches and tags move
        commit = from_main(partial(commit_of, config.dataset_name, config.dataset_revision))
        config, of_data = (dataclasses.replace(each, dataset_revision=commit) for each in (config, of_data))
    with accelerator.main_process_first():
        data = open_images(of_data)
    data = dataclasses.replace(data, identity=from_main(lambda: identity_of(data, of_data)))
    check_before_training(data, preset.training.train_batch_size, accelerator.is_main_process)
    if data.id2label is not None:
        unet = dataclasses.replace(preset.unet, num_classes=len(data.id2label))
        preset = dataclasses.replace(preset, unet=unet)
    if config.hold_in_memory:
        data = held_in_memory(data, preset.unet.sample_size, accelerator.device, config.dataloader_num_workers)
    num_examples = None if config.streaming else len(data.dataset)
    division = {"num_processes": accelerator.num_processes, "drawn_for": drawn_for(saved)}
    if config.streaming and not was_streamed_whole(saved):
        division["num_lanes"] = data.stream.num_lanes(preset.training.train_batch_size)
    resolved = run_description(config, preset, data.id2label, num_examples, **division)
    with naming_last_good(Path(config.output_dir)):
        trainer = make_trainer(config, preset, data, accelerator, resolved, is_sharded)
        trainer.start(checkpoint)
        trainer.run()
        trainer.finish()


def make_accelerator(config: RunConfig, preset: StagePreset, state: PartialState) -> Accelerator:
    """Accelerate's object for this run: precision, accumulation, trackers."""
    check_tracker(config.report_to)
    # Shards are made by this package, see `shard`.
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        accelerator = Accelerator(
            cpu=state.device.type == "cpu",
            mixed_precision=preset.training.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            dataloader_config=DataLoaderConfiguration(
                # For `StreamBatches`.
                dispatch_batches=config.streaming and state.num_processes > 1,
            ),
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=str(Path(config.output_dir) / config.logging_dir),
        )
    check_mixed_precision(accelerator)
    warn_of_slow_cpu(accelerator)
    return accelerator


def compile_network(unet: CascadedUNet2DModel, device: torch.device) -> None:
    """Compiles the network in place."""
    # Where it changes layouts on a CPU, Inductor of torch 2.13 reads the gradient of nearest upsampling before it is
    # written (https://github.com/pytorch/pytorch/issues/185509).
    unet.compile(options={"layout_optimization": False} if device.type == "cpu" else None)


class Trainer:
    """
    One run. Its whole state is the network, the optimizer, the EMA, the gradient scaler and three counters: `step`,
    `epoch` and `epoch_batches` (batches taken from this epoch). All noise is drawn from (seed, step), and the learning
    rate is a function of the step, so nothing else needs saving.
    """

    def __init__(
        self,
        config: RunConfig,
        preset: StagePreset,
        data: ImageData,
        accelerator: Accelerator,
        resolved: dict[str, Any],
        is_sharded: bool = False,
        pretrained: Pretrained | None = None,
    ):
        self.config, self.preset, self.data = config, preset, data
        self.accelerator, self.resolved, self.pretrained = accelerator, resolved, pretrained
        if pretrained is not None:
            self.resolved = resolved | {"pretrained": pretrained.described()}
        self.output_dir = Path(config.output_dir)
        self.step = self.epoch = self.epoch_batches = 0
        self.saved_step: int | None = None
        self.signals = StopSignals(accelerator.state)
        self.last_loss: float | None = None

        self.cropped_steps = round((1 - preset.training.whole_image_fraction) * preset.training.max_train_steps)

        set_seed(config.seed)
        self.stage = self.make_stage()
        unet = self.stage.unet
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        unet.to(
            accelerator.device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format
        )
        if is_sharded:
            shard(unet, accelerator)
        if config.compile:
            compile_network(unet, accelerator.device)
        # In evaluation mode accelerate sets the precision without replicating the network; shards replace the copies.
        self.unet = accelerator.prepare_model(unet, device_placement=False, evaluation_mode=is_sharded)
        training = preset.training
        adam = torch.optim.AdamW(
            unet.parameters(),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            weight_decay=training.adam_weight_decay,
            eps=training.adam_epsilon,
            fused=True,
        )
        self.optimizer = accelerator.prepare_optimizer(adam)
        self.ema = self.make_average()
        self.split = self.make_split()
        self.images = self.make_batches()
        self.noise = Noise(config.seed, self.split, resolved["training"]["drawn_for"], accelerator.device)
        self.not_finite = torch.zeros((), dtype=torch.bool, device=accelerator.device)
        self.finite_until = 0

    def make_stage(self) -> Stage:
        """The stage with its initial weights."""
        stage = build_stage(self.preset)
        if self.pretrained is not None:
            self.pretrained.give_weights(stage.unet)
            self.pretrained = None  # its memory is free again
        return stage

    def make_average(self) -> LerpEMAModel:
        """A new average of the weights."""
        training = self.preset.training
        # EMAModel's decay is always min(decay, (1 + i) / (10 + i)); a lower bound of `decay` makes it constant.
        return LerpEMAModel(
            self.stage.unet.parameters(),
            decay=training.ema_decay,
            min_decay=0.0 if training.ema_warmup else training.ema_decay,
            foreach=True,
        )

    def make_split(self) -> Split:
        """How a step's batch is divided; in runs that began that way, how each of its micro-batches is."""
        accelerator, micro_batches = self.accelerator, self.config.gradient_accumulation_steps
        part_size = self.preset.training.train_batch_size // (accelerator.num_processes * micro_batches)
        of_batch = micro_batches if self.resolved["training"]["drawn_for"] == BATCH else 1
        by_process = self.resolved["data"].get("num_lanes") is not None
        return Split(part_size, accelerator.num_processes, accelerator.process_index, of_batch, by_process)

    def make_batches(self) -> ImageBatches | LaneBatches | StreamBatches:
        """This process's parts of the batches."""
        config, device = self.config, self.accelerator.device
        num_workers = 0 if config.hold_in_memory else config.dataloader_num_workers
        options = {
            "num_workers": num_workers,
            "persistent_workers": num_workers > 0,
            "worker_init_fn": obey_parent,
            "pin_memory": device.type == "cuda" and not config.hold_in_memory,
        }
        num_lanes = self.resolved["data"].get("num_lanes")
        if num_lanes is not None:
            group = self.signals.group
            return LaneBatches(self.data.stream, self.split, num_lanes, device, group, **options)
        if config.streaming:
            return StreamBatches(self.data.dataset, self.split, self.accelerator, **options)
        return ImageBatches(self.data.dataset, self.split, config.seed, device, **options)

    # -----------------------------------------------------------------------------------------------------------------
    # Start, loop, end

    def start(self, checkpoint: Path | None) -> None:
        """Picks up `checkpoint`, if there is one, and makes the output folder ready."""
        if checkpoint is not None:
            self.load_checkpoint(checkpoint)
        self.schedule_learning_rate(0, self.preset.training.max_train_steps)
        if self.accelerator.is_main_process:
            write_json(self.output_dir / "training_config.json", self.resolved)
        self.accelerator.wait_for_everyone()
        logs = self.output_dir / self.config.logging_dir
        if self.config.report_to == "wandb":  # which would go elsewhere if the folder were not there
            logs.mkdir(exist_ok=True)
        settings = {name: str(value) for name, value in flatten(self.resolved).items()}
        self.accelerator.init_trackers("train", settings, init_kwargs={"wandb": {"dir": str(logs)}})
        if self.accelerator.is_main_process:
            self.introduce(checkpoint)
            if self.config.validation_steps:
                self.validation = Validation(self.config, self.preset, self.data)

    def schedule_learning_rate(self, first_step: int, num_steps: int) -> None:
        """Makes the learning rate, from the current step on, that of a schedule that began at `first_step`."""
        training = self.preset.training
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = training.learning_rate
        # Not prepared: accelerate would step it once per process.
        self.lr_scheduler = get_scheduler(
            training.lr_scheduler,
            self.optimizer.optimizer,
            num_warmup_steps=training.lr_warmup_steps,
            num_training_steps=num_steps,
            last_epoch=self.step - first_step - 1,
        )

    def introduce(self, checkpoint: Path | None) -> None:
        """Prints what is trained on what, and warns of settings that spoil it."""
        accelerator, num_parameters = self.accelerator, self.stage.unet.num_parameters()
        place = accelerator.device, accelerator.num_processes
        known = self.resolved["data"]["num_examples"], *place, checkpoint, self.resolved.get("pretrained")
        print(introduction(self.config, self.preset, num_parameters, *known), flush=True)
        for sentence in warnings(self.config, self.preset):
            logger.warning(sentence)

    def run(self) -> None:
        """Takes optimizer steps until `max_train_steps`."""
        config, total = self.config, self.preset.training.max_train_steps
        batches = self.batches()
        self.start_log()
        bar = tqdm(
            initial=self.step, total=total, unit="step", mininterval=1.0, disable=not self.accelerator.is_main_process
        )
        with self.signals, bar:
            while self.step < total:
                self.optimizer_step(batches)
                bar.update()
                if self.step % config.logging_steps == 0 or self.step == total:
                    bar.set_postfix(self.log())
                if self.step % config.checkpointing_steps == 0 or self.step == total:
                    self.save_checkpoint()
                if config.validation_steps and self.step % config.validation_steps == 0 and self.step < total:
                    averages = self.averages(keep=self.accelerator.is_main_process)
                    if self.accelerator.is_main_process:
                        with contextlib.suppress(Interrupted):
                            self.validate(averages)
                    self.accelerator.wait_for_everyone()
                self.stop_if_asked()

    def finish(self) -> None:
        """A last validation, and the pipeline folder with its model card."""
        figures, grid = {"loss": self.last_loss}, None
        averages = self.averages(keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            try:
                with self.signals:
                    if self.config.validation_steps:
                        grid, moments = self.validate(averages)
                        figures |= moments
                    pipeline, license = self.ema_pipeline(averages), self.config.license
                    save_pipeline(pipeline, self.resolved, figures, grid, self.output_dir, license=license)
                    self.signals.check()
            except Interrupted:
                self.stop(self.signals.received)
            print(farewell(self.output_dir), flush=True)
            push_if_asked(self.config, self.output_dir)
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def stop_if_asked(self) -> None:
        """Saves and stops after this step, if any process has received a signal."""
        number = self.signals.agreed()
        if number:
            if self.saved_step != self.step:
                self.save_checkpoint()
            self.stop(number)

    def stop(self, number: int) -> NoReturn:
        """Ends the process as the signal `number` asks; this step's checkpoint is there."""
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            print(interruption(self.output_dir / f"checkpoint-{self.step}", number), flush=True)
        end_by(number)

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Micro-batches without end, from where the counters stand; a batch is counted as it is begun."""
        while True:
            for index, micro_batch in enumerate(self.images.epoch(self.epoch, self.epoch_batches)):
                self.epoch_batches += index % self.split.num_micro_batches == 0
                yield micro_batch
            if self.epoch_batches == 0:
                raise ValueError("the stream does not hold even one whole batch: give a smaller `train_batch_size`.")
            self.epoch, self.epoch_batches = self.epoch + 1, 0

    def optimizer_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        """One step of the optimizer, over all micro-batches, and of the average."""
        for micro_batch in range(self.config.gradient_accumulation_steps):
            batch = next(batches)
            self.noise.start(self.step, micro_batch)
            with self.accelerator.accumulate(self.unet):
                loss = self.batch_loss(batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    max_norm = self.preset.training.max_grad_norm
                    self.grad_norm = whole(self.accelerator.clip_grad_norm_(self.unet.parameters(), max_norm))
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.loss_sum += loss.detach()
            self.not_finite |= ~loss.detach().isfinite()
        if self.accelerator.scaler is None:  # otherwise the gradient scaler skips such steps
            self.not_finite |= ~self.grad_norm.isfinite()
        self.lr_scheduler.step()
        self.ema.step(self.unet.parameters())
        self.step += 1

    def batch_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Algorithm 1 on one micro-batch: images (B, C, R, R), uint8 at the source resolution or averages held in memory,
        and labels (B,) int64.
        """
        unet, training, generator = self.preset.unet, self.preset.training, self.noise.generator
        images, labels = batch["image"], batch.get("label")
        if training.random_flip:
            images = random_flip(images, generator)
        images, conditions = to_float(images), {}
        whole_size = images.shape[-1]
        if labels is not None:
            if training.label_dropout > 0:
                dropped = draw(torch.rand, labels.shape, generator, labels.device) < training.label_dropout
                labels = torch.where(dropped, unet.num_classes, labels)
            conditions["class_labels"] = labels
        if unet.low_res_size is not None:
            low_res, level = area_resize(images, unet.low_res_size), None
            if self.stage.augmentation is not None:
                low_res, level = self.stage.augmentation(low_res, generator)
            if training.crop_size is not None and self.step < self.cropped_steps:
                images, low_res = random_crop(images, low_res, training.crop_size / unet.sample_size, generator)
            conditions["low_res"] = low_res
            if unet.augmentation_level_embedding:
                conditions["augmentation_level"] = level

        return self.loss(area_resize(images, unet.sample_size * images.shape[-1] // whole_size), conditions).mean()

    def loss(self, x_0: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss (B,) of the network at images x_0 (B, C, H, W) in [-1, 1], given their conditions."""
        return self.stage.loss(partial(self.denoise, conditions), x_0, self.noise.generator)

    def denoise(self, conditions: dict[str, torch.Tensor], x_t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The network's output at x_t and a time or noise level."""
        return self.unet(x_t, condition, **conditions).sample

    # -----------------------------------------------------------------------------------------------------------------
    # Logging and validation

    def start_log(self) -> None:
        """Begins the interval that [`log`] takes means over."""
        self.loss_sum = torch.zeros((), device=self.accelerator.device)
        self.logged_step, self.logged_time = self.step, time.perf_counter()

    def log(self) -> dict[str, str]:
        """Logs the means since the last time; the only place in a step that waits for the device."""
        self.check_finite()
        steps = self.step - self.logged_step
        losses = steps * self.config.gradient_accumulation_steps
        self.last_loss = self.accelerator.reduce(self.loss_sum, "mean").item() / losses
        images = steps * self.preset.training.train_batch_size
        figures = {
            "loss": self.last_loss,
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "grad_norm": self.grad_norm.item(),
            "images_per_second": images / (time.perf_counter() - self.logged_time),
        }
        self.accelerator.log({f"train/{name}": value for name, value in figures.items()}, step=self.step)
        self.start_log()
        return {name: f"{value:.4g}" for name, value in figures.items()}

    def check_finite(self) -> None:
        """
        Raises:
            RuntimeError: if a loss or gradient since the last check was not finite, on any process.
        """
        if self.accelerator.reduce(self.not_finite.float(), "sum").item() > 0:
            raise RuntimeError(
                f"A loss or gradient of steps {self.finite_until + 1} to {self.step} is NaN or infinite; nothing was "
                f"saved since. {last_good(self.output_dir)} Resuming with a lower --learning_rate may help."
            )
        self.finite_until = self.step

    def validate(self, averages: dict[str, torch.Tensor]) -> tuple[Image.Image, dict[str, float]]:
        """Draws samples with the averaged weights and compares their moments with the data's. Main process only."""
        grid, moments = self.validation(self.ema_pipeline(averages), self.signals.check)
        file = self.output_dir / "samples" / f"step-{self.step}.png"
        file.parent.mkdir(exist_ok=True)
        temporary = temporary_name(self.output_dir / file.name)
        with writing(f"The samples of step {self.step}", temporary):
            grid.save(temporary)
            reveal(temporary, file)
        log_sample_grid(self.accelerator, grid, self.step)
        self.accelerator.log({f"validation/{name}": value for name, value in moments.items()}, step=self.step)
        return grid, moments

    def ema_pipeline(self, averages: dict[str, torch.Tensor]) -> CascadedDiffusionPipeline | SuperResolutionPipeline:
        """The stage's pipeline with the averaged weights, all of them."""
        unet = CascadedUNet2DModel.from_config(self.stage.unet.config)
        unet.to(self.accelerator.device)
        unet.load_state_dict(averages)
        return pipeline_of(unet.eval(), self.stage, self.preset, self.data.id2label)

    # -----------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def save_checkpoint(self) -> None:
        """The main process writes a temporary folder, which becomes `checkpoint-{step}` once it is on disk."""
        self.check_finite()
        final = self.output_dir / f"checkpoint-{self.step}"
        temporary = temporary_name(final)
        state = self.state(keep=self.accelerator.is_main_process)
        progress = self.progress()
        if self.accelerator.is_main_process:
            with writing(f"The checkpoint of step {self.step}", temporary):
                write_state(temporary, state)
                write_json(temporary / "training_config.json", self.resolved)
                write_json(temporary / DATA_NAME, self.data.identity)
                write_json(temporary / "progress.json", progress)
                replace_folder(temporary, final)
            rotate(self.output_dir, self.config.checkpoints_total_limit, final)
        self.saved_step = self.step
        self.accelerator.wait_for_everyone()

    def state(self, keep: bool) -> TrainingState:
        """All tensors of the run, gathered; every process must call it, and those that `keep` them get them."""
        scaler = self.accelerator.scaler
        return TrainingState(
            weights=gather(self.stage.unet.state_dict(), keep),
            averages=self.averages(keep),
            optimizer=gather_optimizer(self.optimizer.optimizer, keep),
            scaler=None if scaler is None else scaler.state_dict(),
        )

    def averages(self, keep: bool) -> dict[str, torch.Tensor]:
        """The averaged weights by name, as [`state`]."""
        names = [name for name, _ in self.stage.unet.named_parameters()]
        return gather(dict(zip(names, self.ema.shadow_params, strict=True)), keep)

    def progress(self) -> dict[str, Any]:
        """The counters that a run goes on from, and where a stream stands; every process must call it."""
        streamed = {}
        if isinstance(self.images, LaneBatches):
            places = dict(chain.from_iterable(places.items() for places in gather_object([self.images.places])))
            streamed = {"lanes": [dataclasses.asdict(places[number]) for number in sorted(places)]}
        return {
            "step": self.step,
            "epoch": self.epoch,
            "epoch_batches": self.epoch_batches,
            "ema_steps": self.ema.optimization_step,
            "loss": self.last_loss,
        } | streamed

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Puts the whole state of a run back, after checking that it is this run's."""
        saved, progress = read_checkpoint(checkpoint)
        check_resumable(saved, self.resolved, checkpoint)
        from_main(lambda: check_same_data(checkpoint, self.data.identity))
        if progress["step"] > self.preset.training.max_train_steps:
            raise ValueError(
                f"`max_train_steps` is {self.preset.training.max_train_steps}, but {checkpoint} is at step "
                f"{progress['step']}: give more steps or an earlier checkpoint."
            )
        self.step, self.epoch, self.epoch_batches = (progress[n] for n in ("step", "epoch", "epoch_batches"))
        if isinstance(self.images, LaneBatches):
            self.images.places = {number: Place(**place) for number, place in enumerate(progress["lanes"])}
        self.ema.optimization_step, self.last_loss = progress["ema_steps"], progress["loss"]
        self.finite_until = self.step
        with loading(checkpoint):
            self.load_state(read_state(checkpoint, has_scaler=self.accelerator.scaler is not None))

    def load_state(self, state: TrainingState) -> None:
        """Puts the tensors of a run back."""
        unet, scaler = self.stage.unet, self.accelerator.scaler
        unet.load_state_dict({n: shard_of(state.weights[n], value) for n, value in unet.state_dict().items()})
        for (name, _), average in zip(unet.named_parameters(), self.ema.shadow_params, strict=True):
            average.copy_(shard_of(state.averages[name], average))
        load_optimizer(self.optimizer.optimizer, state.optimizer)
        if scaler is not None:
            scaler.load_state_dict(state.scaler)
