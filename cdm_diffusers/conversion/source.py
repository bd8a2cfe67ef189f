"""Where a converted stage comes from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    r"""
    Where a converted stage comes from.

    Args:
        file (`str`): the converted file or repository.
        repository (`str`): where the original code is.
        url (`str`, *optional*): where the file is published.
        license (`str`): of the weights, by the Hub's identifiers.
        data (`str`), figures (`str`): what it was trained on, and what its publishers measured.
        assumptions (`tuple[str, ...]`): what the conversion assumed.
    """

    file: str
    repository: str
    url: str | None
    license: str
    data: str
    figures: str
    assumptions: tuple[str, ...]
