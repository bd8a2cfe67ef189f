"""From a (resolved) preset to the objects that are trained."""

import dataclasses
from dataclasses import dataclass

from ..conditioning_augmentation import BlurConditioningAugmentation, GaussianConditioningAugmentation
from ..losses import HybridLoss, SimpleLoss
from ..models import CascadedUNet2DModel
from ..presets import GaussianAugmentationPreset, SchedulerPreset, StagePreset
from ..schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler


@dataclass
class Stage:
    """
    One stage of a cascade, ready to train. `augmentation` is None for a base stage and for one without conditioning
    augmentation; `noising_scheduler` also for a stage with blur augmentation.
    """

    unet: CascadedUNet2DModel
    scheduler: CascadedDDPMScheduler | ContinuousDDPMScheduler
    noising_scheduler: CascadedDDPMScheduler | None
    augmentation: GaussianConditioningAugmentation | BlurConditioningAugmentation | None
    loss: SimpleLoss | HybridLoss


def build_stage(preset: StagePreset, unet: CascadedUNet2DModel | None = None) -> Stage:
    """Network (`unet`, or freshly initialised), diffusion process, conditioning augmentation and loss of a preset."""
    if unet is None:
        unet = CascadedUNet2DModel(**dataclasses.asdict(preset.unet))
    scheduler = build_scheduler(preset.scheduler)
    noising_scheduler = augmentation = None
    if isinstance(preset.augmentation, GaussianAugmentationPreset):
        arguments = dataclasses.asdict(preset.augmentation)
        draws = {name: arguments.pop(name) for name in ("level", "zero_level_probability")}
        noising_scheduler = CascadedDDPMScheduler(variance_type="fixed_small", **arguments)
        augmentation = GaussianConditioningAugmentation(noising_scheduler, **draws)
    elif preset.augmentation is not None:
        augmentation = BlurConditioningAugmentation(**dataclasses.asdict(preset.augmentation))
    vlb_weight = preset.training.vlb_weight
    loss = SimpleLoss(scheduler) if vlb_weight is None else HybridLoss(scheduler, vlb_weight)
    return Stage(unet, scheduler, noising_scheduler, augmentation, loss)


def build_scheduler(preset: SchedulerPreset) -> CascadedDDPMScheduler | ContinuousDDPMScheduler:
    """The scheduler of a preset's diffusion process."""
    arguments = dataclasses.asdict(preset)
    if arguments.pop("continuous"):
        return ContinuousDDPMScheduler(**arguments)
    for name in [name for name in arguments if name.startswith("inference_")]:
        del arguments[name]
    return CascadedDDPMScheduler(**arguments)
