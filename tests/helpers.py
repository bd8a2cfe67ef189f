"""What several test modules share."""

from dataclasses import asdict

from cdm_diffusers.models.arguments import UNetArguments


def small_twin(preset: UNetArguments) -> dict:
    """
    Arguments of a [`CascadedUNet2DModel`] with `preset`'s levels, blocks, attention, conditions and options, but with
    8 base channels (times the preset's multipliers), heads of 8 channels where the preset gives their width, and no
    dropout.
    """
    base = preset.block_out_channels[0]
    arguments = asdict(preset)
    arguments["block_out_channels"] = tuple(8 * channels // base for channels in preset.block_out_channels)
    arguments["norm_num_groups"] = 4
    arguments["dropout"] = 0.0
    if preset.attention_head_dim is not None:
        arguments["attention_head_dim"] = 8
    return arguments
