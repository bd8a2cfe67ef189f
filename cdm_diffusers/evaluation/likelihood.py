r"""
Bits per dimension: Eq. (1) for each stage of a cascade, and Eq. (3) for the cascade as a whole.

Both are upper bounds of -log p(x_0), for the ancestral sampler on the full grid of T training steps, with the variance
and the limit of x_0 that the sampler uses:

    L(x_0) = L_T(x_0) + sum over t > 1 of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) - log p(x_0 | x_1)

in nats, divided by dim(x_0) ln 2. In Eq. (3) a stage whose image the next one sees noised to s >= 1 contributes L_T
and the KL terms of t > s, and nothing else; the last stage contributes all of L(x_0 | z_s).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.utils.torch_utils import randn_tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data.splits import open_split
from ..data.transforms import area_resize, to_float, to_uint8
from ..diffusion import DiffusionTable, diffuse, discretized_gaussian_nll, gaussian_kl
from ..files import write_json
from ..pipelines import SuperResolutionPipeline
from ..pipelines.denoising import Denoiser
from ..pipelines.fit import check_same_forward_process
from ..pipelines.loading import Pipeline, load_pipeline
from ..pipelines.solvers import OWN_SCHEDULERS, scheduler_of
from ..pipelines.stages import CascadeStage, num_classes_of
from ..processes import ending_together, open_state
from .batches import joined, run_over, share_of
from .config import LikelihoodConfig
from .intervals import mean_and_error
from .sample import image_generator
from .tables import likelihood_table


TERMS = ("prior", "kl", "decoder")


def measure_likelihood(config: LikelihoodConfig) -> dict[str, Any]:
    """
    Bounds the likelihood of real images, with any number of processes, writes `config.output` and prints a table.

    Returns:
        `dict`: what is in `config.output`.

    Raises:
        ValueError: pipeline, options and data do not fit each other, or there is no bound.
    """
    state = open_state()
    with ending_together(state):
        return measure_together(config, state)


def measure_together(config: LikelihoodConfig, state: PartialState) -> dict[str, Any]:
    """[`measure_likelihood`] by processes that end together."""
    pipeline = load_pipeline(config.pipeline).to(config.device)
    stages = [dataclasses.replace(stage, scheduler=scheduler_of(stage, "ancestral")) for stage in pipeline.stages]
    levels = stage_levels(pipeline, stages, config.augmentation_level)
    alone = select_stages(stages, config.stages)
    chain = [] if config.cascade is None else cascade_up_to(stages, levels, config.cascade)
    if not alone and not chain:
        raise ValueError("`stages` is none, and there is no `cascade`: name what is to be measured.")
    dataset, indices = open_data(config, pipeline, stages)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)

    options = {"seed": config.seed, "batch_size": config.batch_size, "device": config.device}
    report = {"num_images": len(indices), "stages": {}, "cascade": None}
    for stage in alone:
        bound = StageBound(stage, config.num_terms)
        nats = nats_of([(bound, levels[stage.name])], dataset, indices, **options)[stage.name]
        report["stages"][stage.name] = stage_figures(bound, nats, levels[stage.name])
    if chain:
        stops = [levels[stage.name] for stage in chain[1:]] + [0]
        bounds = [StageBound(stage, config.num_terms, stop) for stage, stop in zip(chain, stops, strict=True)]
        told = [(bound, levels[bound.stage.name]) for bound in bounds]
        nats = nats_of(told, dataset, indices, **options)
        report["cascade"] = cascade_figures(bounds, nats, levels)
    report["settings"] = dataclasses.asdict(config)
    if state.is_main_process:
        write_json(Path(config.output), report)
        print(likelihood_table(report))
    return report


# ------------------------------------------------------------------------------------------------------------------
# Pipeline, options and data
# ------------------------------------------------------------------------------------------------------------------


def stage_levels(pipeline: Pipeline, stages: list[CascadeStage], asked: int | None) -> dict[str, int | None]:
    """s of each stage, None for those without Gaussian conditioning augmentation."""
    noised = [stage.name for stage in stages if stage.noising_scheduler is not None]
    if asked is not None and not noised:
        raise ValueError(f"`augmentation_level` is {asked}, but no stage of the pipeline takes one: leave it out.")
    if isinstance(pipeline, SuperResolutionPipeline):
        return {pipeline.stage.name: pipeline.stage_options(augmentation_level=asked)["augmentation_level"]}
    levels = pipeline.stage_options(augmentation_levels=dict.fromkeys(noised, asked))["augmentation_levels"]
    return {stage.name: levels.get(stage.name) for stage in stages}


def select_stages(stages: list[CascadeStage], names: list[str] | None) -> list[CascadeStage]:
    """The stages of these `names`: all for None, none for ["none"]; ValueError for unknown ones."""
    if names == ["none"]:
        return []
    known = [stage.name for stage in stages]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ValueError(f"`stages` has {unknown}; the pipeline has {known}.")
    return [stage for stage in stages if names is None or stage.name in names]


def cascade_up_to(stages: list[CascadeStage], levels: dict[str, int | None], last: str) -> list[CascadeStage]:
    """
    The stages of Eq. (3) for the images of stage `last`.

    Raises:
        ValueError: there is no such stage, or no bound: a stage is conditioned on an image without noise.
    """
    names = [stage.name for stage in stages]
    if last not in names or stages[0].unet.config.low_res_size is not None:
        raise ValueError(f"`cascade` is {last!r}; give one of the stages of a cascade with a base. There are {names}.")
    chain = stages[: names.index(last) + 1]
    for before, stage in itertools.pairwise(chain):
        level = levels[stage.name]
        if not level:
            why = "takes none (no Gaussian conditioning augmentation)" if level is None else "is given s = 0"
            raise ValueError(
                f"`cascade` is {last!r}: Eq. (3) needs s >= 1, but stage {stage.name!r} {why}. The image that it is "
                "conditioned on is then an exact function of x_0, the KL term that ends in it is infinite, and "
                f"nothing is bounded. Give {'' if level is None else 'an `augmentation_level` of at least 1, or '}"
                f"`cascade={before.name}` for the stages before it; `stages` gives the bits per dimension of "
                f"{stage.name!r} given the low-resolution image."
            )
        check_own_scheduler(before)
        check_same_forward_process(before, stage)
    return chain


def check_own_scheduler(stage: CascadeStage) -> None:
    """ValueError unless the stage samples with a scheduler of this package."""
    if not isinstance(stage.scheduler, OWN_SCHEDULERS):
        raise ValueError(
            f"Stage {stage.name!r} samples with {type(stage.scheduler).__name__}, which has no reverse distribution "
            f"to bound: load the pipeline with {' or '.join(kind.__name__ for kind in OWN_SCHEDULERS)} there."
        )


def open_data(config: LikelihoodConfig, pipeline: Pipeline, stages: list[CascadeStage]) -> tuple[Dataset, list[int]]:
    """The split at its source resolution, and the indices of the images that are measured."""
    last = stages[-1].unet.config
    num_classes = num_classes_of(stages)
    data_config = config.split_config(
        config.split,
        source_resolution=pipeline.config.source_resolution or last.sample_size,
        num_channels=last.out_channels,
        padding=config.padding,
        class_conditional=num_classes is not None,
    )
    numbers = {index: str(index) for index in range(num_classes or 0)}
    data = open_split(data_config, id2label=pipeline.config.id2label or numbers)
    count = len(data.dataset) if config.num_images is None else config.num_images
    if not 2 <= count <= len(data.dataset):
        raise ValueError(f"`num_images` is {count}; the split {config.split!r} has {len(data.dataset)} (2 at least).")
    order = torch.randperm(len(data.dataset), generator=torch.Generator().manual_seed(config.seed))
    return data.dataset, order[:count].tolist()


# ------------------------------------------------------------------------------------------------------------------
# The bound of one stage
# ------------------------------------------------------------------------------------------------------------------


class StageBound:
    r"""
    The terms of Eq. (1) for one stage, in nats and float64, from t = T down to `stop_at`.

    Args:
        stage ([`CascadeStage`]): network and scheduler; of this package, since others have no reverse distribution.
        num_terms (`int`, *optional*):
            How many terms of the sum over t are evaluated for each image. The times are cut into that many strata,
            equal in the mean of index and log signal-to-noise ratio, along which the terms vary; one time is drawn in
            each and weighted by the stratum's length. By default all terms are.
        stop_at (`int`, defaults to 0):
            s: what the process arrives at is z_s and not x_0, as in the first sum of Eq. (3); s = T leaves L_T alone.
    """

    def __init__(self, stage: CascadeStage, num_terms: int | None = None, stop_at: int = 0):
        check_own_scheduler(stage)
        self.stage, self.scheduler, self.stop_at = stage, stage.scheduler, stop_at
        table = stage.scheduler.table
        self.prior_alpha_bar = table.alpha_bar(len(table))
        indices = torch.arange(stop_at, len(table))
        self.table = table.respace(indices, start=float(table.alpha_bar(stop_at)))
        by_timestep = stage.unet.config.time_conditioning == "timestep"
        self.times = indices if by_timestep else self.table.alphas_cumprod.sqrt().float()
        self.has_decoder = stop_at == 0
        self.strata = cut_strata(self.table, int(self.has_decoder), num_terms)

    def __call__(
        self, x_0: torch.Tensor, denoiser: Callable[[list[torch.Generator]], Denoiser], generators
    ) -> dict[str, torch.Tensor]:
        r"""
        Args:
            x_0 (`torch.Tensor` of shape `(B, C, H, W)`):
                Images in [-1, 1]; where the process arrives at x_0, 8-bit values.
            denoiser (`Callable`): makes the network with its conditions, their noise drawn from `generators`.
            generators (`list[torch.Generator]`): one per image; they decide times and noise.

        Returns:
            `dict[str, torch.Tensor]`: nats (B,) of each of `TERMS`.
        """
        x_0 = x_0.double()
        draws = torch.stack([torch.rand(len(self.strata), generator=generator) for generator in generators])
        kl = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
        for (low, high), draw in zip(self.strata, draws.T, strict=True):
            position = (low + (draw * (high - low)).long().clamp(max=high - low - 1)).to(x_0.device)
            kl += (high - low) * self.kl(x_0, denoiser(generators), position, generators)
        decoder = self.decoder(x_0, denoiser(generators), generators) if self.has_decoder else torch.zeros_like(kl)
        return {"prior": self.prior(x_0), "kl": kl, "decoder": decoder}

    def prior(self, x_0: torch.Tensor) -> torch.Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, I)) of each image (B,)."""
        zero = x_0.new_zeros(())
        alpha_bar = self.prior_alpha_bar.to(x_0.device)
        return image_sum(gaussian_kl(alpha_bar.sqrt() * x_0, torch.log1p(-alpha_bar), zero, zero))

    def kl(self, x_0: torch.Tensor, denoise: Denoiser, position: torch.Tensor, generators) -> torch.Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each image (B,) at t = stop_at + position + 1."""
        x_t, mean, log_variance = self.reverse(x_0, denoise, position, generators)
        true_mean = self.table.posterior_mean(x_0, x_t, position)
        return image_sum(gaussian_kl(true_mean, self.table.posterior_log_variance(position), mean, log_variance))

    def decoder(self, x_0: torch.Tensor, denoise: Denoiser, generators) -> torch.Tensor:
        """-log p(x_0 | x_1) of each image (B,)."""
        position = torch.zeros(len(x_0), dtype=torch.int64, device=x_0.device)
        _, mean, log_variance = self.reverse(x_0, denoise, position, generators)
        return image_sum(discretized_gaussian_nll(x_0, mean, 0.5 * log_variance))

    def reverse(self, x_0: torch.Tensor, denoise: Denoiser, position: torch.Tensor, generators):
        """x_t ~ q(x_t | x_0), and mean and log variance of p(x_{t-1} | x_t)."""
        noise = randn_tensor(x_0.shape, generator=generators, device=x_0.device, dtype=x_0.dtype)
        x_t = diffuse(x_0, noise, *self.table.signal_and_noise(position + 1, x_0.device))
        prediction, raw_variance = (output.double() for output in denoise(x_t, self.times.to(x_0.device)[position]))
        _, mean, log_variance = self.scheduler.reverse_moments(self.table, position, x_t, prediction, raw_variance)
        return x_t, mean, log_variance


def cut_strata(table: DiffusionTable, first: int, num_terms: int | None) -> list[tuple[int, int]]:
    """Half-open ranges that partition the positions from `first`, at most `num_terms` (default: all positions)."""
    count = len(table)
    if num_terms is None or num_terms >= count - first:
        return [(position, position + 1) for position in range(first, count)]
    drops = (torch.logit(table.alphas_cumprod_prev) - torch.logit(table.alphas_cumprod))[first:]
    weight = torch.cumsum(drops / drops.sum() + 1 / len(drops), dim=0) / 2  # rises to 1
    cuts = torch.searchsorted(weight, torch.arange(1, num_terms, dtype=torch.float64) / num_terms) + 1 + first
    edges = sorted({first, *cuts.tolist(), count})
    return list(itertools.pairwise(edges))


def image_sum(values: torch.Tensor) -> torch.Tensor:
    """Over all pixels of each image: (B, C, H, W) to (B,)."""
    return values.sum(dim=(1, 2, 3))


# ------------------------------------------------------------------------------------------------------------------
# Over the data
# ------------------------------------------------------------------------------------------------------------------


def nats_of(
    bounds: list[tuple[StageBound, int | None]],
    dataset: Dataset,
    indices: list[int],
    seed: int,
    batch_size: int,
    device: str,
) -> dict[str, dict[str, torch.Tensor]]:
    """
    The terms of each image (N,), in nats, by stage, for `bounds`: stages, each with the s of its low-resolution input.

    A stage's images are area averages. Those that end in a decoder are rounded to 8 bits first, without which there
    is no probability but only a density; those that end in z_s stay as they were in training.
    """
    loader = DataLoader(Numbered(dataset, indices), batch_size)
    names = [bound.stage.name for bound, _ in bounds]
    state = PartialState()
    calls = sum(len(bound.strata) + bound.has_decoder for bound, _ in bounds) * len(share_of(loader, state))

    def terms(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        images, of_batch = to_float(batch["image"]), []
        for bound, level in bounds:
            generators = [image_generator(seed, index) for index in batch["index"].tolist()]
            denoiser = conditional_denoiser(bound.stage, images, batch.get("label"), level, bar)
            x_0 = area_resize(images, bound.stage.unet.config.sample_size)
            if bound.has_decoder:
                x_0 = to_float(to_uint8(x_0))
            nats = bound(x_0, denoiser, generators)
            of_batch += [nats[term] for term in TERMS]
        return tuple(of_batch)

    with tqdm(total=calls, desc=" and ".join(names), unit="call", disable=not state.is_main_process) as bar:
        of_set = iter(joined(run_over(loader, terms, device, "likelihood", disable=True)))
    return {name: {term: next(of_set) for term in TERMS} for name in names}


class Numbered(Dataset):
    """The images of a data set at `indices`, each with its own as "index"."""

    def __init__(self, dataset: Dataset, indices: list[int]):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {**self.dataset[self.indices[place]], "index": self.indices[place]}


def conditional_denoiser(
    stage: CascadeStage, images: torch.Tensor, labels: torch.Tensor | None, level: int | None, bar
) -> Callable[[list[torch.Generator]], Denoiser]:
    """
    Makes `stage`'s network conditioned on labels and on z_s, drawn anew for each call: the area average of the
    images (B, C, R, R), float as in training, noised to s = `level`.
    """
    size = stage.unet.config.low_res_size
    low_res = None if size is None else area_resize(images, size)

    def denoiser(generators: list[torch.Generator]) -> Denoiser:
        bar.update()
        noised = stage.noising_scheduler.forward_marginal(low_res, level, generators) if level else low_res
        return stage.denoiser(labels, noised, level, guidance_scale=1.0)

    return denoiser


# ------------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------------


def mean_and_error_of(values: torch.Tensor) -> dict[str, float]:
    """Mean and error of (N,) values of independent images: over images, times and noise."""
    return mean_and_error(values.tolist())


def stage_figures(bound: StageBound, nats: dict[str, torch.Tensor], level: int | None) -> dict[str, Any]:
    """Bits per dimension of one stage's images, given labels and low-resolution images."""
    unet = bound.stage.unet.config
    per_dimension = 1 / (unet.out_channels * unet.sample_size**2 * math.log(2))
    return {
        "bits_per_dimension": mean_and_error_of(sum(nats.values()) * per_dimension),
        "terms": {name: mean_and_error_of(values * per_dimension) for name, values in nats.items()},
        "size": unet.sample_size,
        "low_res_size": unet.low_res_size,
        "augmentation_level": level,
        "variance_type": bound.scheduler.config.variance_type,
        "num_terms": len(bound.strata) + 1,
        "of_terms": len(bound.table),
    }


def cascade_figures(
    bounds: list[StageBound], nats: dict[str, dict[str, torch.Tensor]], levels: dict[str, int | None]
) -> dict[str, Any]:
    """Eq. (3), per dimension of the last stage's images, and what each stage's terms contribute to it."""
    unet = bounds[-1].stage.unet.config
    per_dimension = 1 / (unet.out_channels * unet.sample_size**2 * math.log(2))
    totals = {name: sum(terms.values()) for name, terms in nats.items()}
    return {
        "bits_per_dimension": mean_and_error_of(sum(totals.values()) * per_dimension),
        "stages": {name: mean_and_error_of(total * per_dimension) for name, total in totals.items()},
        "nats": mean_and_error_of(sum(totals.values())),
        "size": unet.sample_size,
        "augmentation_levels": {name: levels[name] for name in totals if levels[name] is not None},
        "num_terms": {bound.stage.name: len(bound.strata) + bound.has_decoder for bound in bounds},
        "of_terms": {bound.stage.name: len(bound.table) for bound in bounds},
    }
