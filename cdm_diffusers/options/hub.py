"""Options of the commands that may upload what they made, as in Diffusers' example scripts."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from .declarations import option, options


def _check_license(license: str, info: ValidationInfo) -> str:
    if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", license):
        raise ValueError(
            f"`{info.field_name}` is {license!r}; it must be an identifier of the Hub, lower-case letters, digits, "
            "dots and dashes (cc-by-4.0, mit, ...): give `other` where there is none, and say in the card which."
        )
    return license


License = Annotated[str, AfterValidator(_check_license)]


@options
class HubOptions:
    """Where to upload, as whom, and under which licence."""

    license: License | None = option(
        "Licence of the data and so of the weights, for the model card, by the Hub's identifiers (cc-by-4.0, ...). "
        "Default: the card says that none is given.",
        None,
    )
    push_to_hub: bool = option("Upload the pipeline to the Hub.", False)
    hub_model_id: str | None = option(
        "OWNER/NAME to upload to. Default: the output folder's name, under your account.", None
    )
    hub_token: str | None = option("Token of the Hub. Default: that of `hf auth login`, or of HF_TOKEN.", None)
    hub_private_repo: bool | None = option(
        "Whether a newly created repository is private. Default: as set for your account on the Hub.", None
    )

    def repository(self, output: str | Path) -> str:
        """The name of the repository for the folder `output`."""
        return self.hub_model_id or Path(output).resolve().name
