"""Networks of which each process holds a shard (FSDP2), and their tensors."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..models import CascadedUNet2DModel
from ..processes import REFUSED, check_launcher
from .config import RunConfig


REFUSED_OF_FSDP = {
    "FSDP_OFFLOAD_PARAMS": ("FSDP with `--fsdp_offload_params`", "leave it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "FSDP with `--fsdp_activation_checkpointing`",
        "give `--gradient_checkpointing` to the training instead",
    ),
}


def sharding_asked() -> bool:
    """
    Whether `accelerate launch --use_fsdp --fsdp_version 2`, or the environment that it makes, asks for shards.

    Raises:
        ValueError: for other ways of dividing a network, which would be ignored.
    """
    is_fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP")
    check_launcher(REFUSED | (REFUSED_OF_FSDP if is_fsdp else {}))
    if is_fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            f"`fsdp_version` is {os.environ.get('FSDP_VERSION', '1')}; it must be 2: add `--fsdp_version 2` to "
            "`accelerate launch --use_fsdp`."
        )
    return is_fsdp


def check_sharding(config: RunConfig, num_processes: int) -> None:
    """
    Raises:
        ValueError: for options that a sharded network does not take, and where there is nothing to shard among.
    """
    if num_processes == 1:
        raise ValueError(
            "`accelerate launch --use_fsdp` shards a network among processes, and there is only 1: give "
            "`--num_processes`, or leave `--use_fsdp` out."
        )
    for name in ("compile", "channels_last"):
        if getattr(config, name):
            raise ValueError(f"`{name}` is True, which FSDP does not take: leave out `--{name}` or `--use_fsdp`.")


def shard(unet: CascadedUNet2DModel, accelerator: Accelerator) -> None:
    """
    Replaces the network's parameters by shards, one in each process; each block is whole only while it is used. This
    is not left to accelerate, which on CPUs silently ignores it.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    reshards = None if parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", True) else False
    for module in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshards)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded. If it is, every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor`, which all processes have, or this process's shard of it where `like` is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def gather(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """
    Named tensors without shards, those that were sharded on the CPU. Every process must call it.

    Args:
        keep: whether this process is to have them; others get an empty dict, and never hold more than one.
    """
    gathered = {}
    for name, tensor in tensors.items():
        is_sharded, tensor = isinstance(tensor, DTensor), whole(tensor)
        if keep:
            gathered[name] = tensor.cpu() if is_sharded else tensor
    return gathered


def gather_optimizer(optimizer: torch.optim.Optimizer, keep: bool) -> dict:
    """The `state_dict` of an optimizer, as [`gather`]."""
    state = optimizer.state_dict()
    return state | {"state": {index: gather(values, keep) for index, values in state["state"].items()}}


def is_adams(state: Any, parameters: list[torch.Tensor]) -> bool:
    """Whether `state` is the `state_dict` of an Adam optimizer of `parameters`, by names and shapes."""
    try:
        return all(
            {name: value.shape for name, value in values.items()}
            == {"step": (), "exp_avg": parameters[index].shape, "exp_avg_sq": parameters[index].shape}
            for index, values in state["state"].items()
        )
    except (AttributeError, IndexError, KeyError, TypeError):
        return False


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """
    Loads what [`gather_optimizer`] gave, on every process. Hyperparameters stay those of `optimizer`.

    Raises:
        ValueError: `state` is not that of an Adam optimizer of the same parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not is_adams(state, parameters):
        raise ValueError("the optimizer's state is that of another optimizer or network")
    shards = {
        index: {name: shard_of(value, parameters[index]) if value.ndim else value for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({"state": shards, "param_groups": optimizer.state_dict()["param_groups"]})
