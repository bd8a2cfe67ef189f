"""Options of `cdm app`: what it shows and where, and what a visitor may ask of the machine."""

from typing import Annotated, Literal

from annotated_types import Ge, Le

from ..evaluation.config import Device, device_option
from ..options import PositiveFloat, PositiveInt, option, options


MINUTES = 10  # for which uploads count, and for which their pixels are kept


@options
class Limits:
    """What one visitor may ask for, so that none exhausts the machine."""

    max_images: PositiveInt = option("Images of one sampling, over all classes.", 16)
    max_steps: PositiveInt = option("Steps of each stage.", 100)
    max_seconds: PositiveFloat = option("Seconds of one sampling, checked between steps.", 120.0)
    max_queue: PositiveInt = option("Calls that may wait while another runs.", 16)
    max_calls: PositiveInt = option("Calls of one address that count, the newest; older ones end.", 3)
    max_upload_megabytes: PositiveInt = option("Size of a picture's file, in megabytes (2^20 bytes).", 8)
    max_upload_megapixels: PositiveInt = option("Size of a picture, in millions of pixels.", 24)
    max_uploads: PositiveInt = option(f"Pictures that one address may upload in {MINUTES} minutes.", 30)
    max_uploaded_megabytes: PositiveInt = option(f"Megabytes that one address may upload in {MINUTES} minutes.", 64)


@options
class AppConfig(Limits):
    """
    Show a cascade in a web page: sample it, turn s, compare settings, and enlarge your own pictures.

    Example:
        cdm app checkpoints/fashion-mnist-32
        cdm app checkpoints/avatars-256 --host 0.0.0.0 --port 8000 --max_images 8 --max_steps 50
    """

    pipeline: str = option("Folder or Hub id of a cascade.", positional=True)
    host: str = option("Address to listen on; 0.0.0.0 lets other machines in.", "127.0.0.1")
    port: Annotated[int, Ge(0), Le(65535)] = option("Port to listen on; 0 takes a free one.", 7860)
    dtype: Literal["float32", "bf16", "fp16"] = option("Type of the networks' weights.", "float32")
    device: Device = device_option()
