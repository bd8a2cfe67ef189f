"""Options of the commands that may upload what they made, as in Diffusers' example scripts."""

from .declarations import option, options


@options
class HubOptions:
    """Where to upload, as whom, and under which licence."""

    license: str | None = option(
        "Licence of the data and so of the weights, for the model card, by the Hub's identifiers (cc-by-4.0, ...). "
        "Default: the card says that none is given.",
        None,
    )
    push_to_hub: bool = option("Upload the pipeline to the Hub.", False)
    hub_model_id: str | None = option("OWNER/NAME to upload to. Default: the output folder's name, as you.", None)
    hub_token: str | None = option("Token of the Hub. Default: that of `hf auth login`, or of HF_TOKEN.", None)
    hub_private_repo: bool | None = option(
        "Whether a repository that is made is private. Default: as the Hub does for you.", None
    )
