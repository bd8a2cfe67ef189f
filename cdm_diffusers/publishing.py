"""Folders of pipelines on their way to the Hub and back: what is kept of them, and what is uploaded."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.utils import logging
from huggingface_hub import create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .hub import INDEX, write_errors
from .model_cards import CARD, DOCUMENTS, is_ours, published_at, write_card


if TYPE_CHECKING:
    from .options import HubOptions


logger = logging.get_logger(__name__)


def find_document(origin: str, name: str, **options: Any) -> Path | None:
    """
    A file beside the pipeline in a folder or on the Hub; None where there is none, with a warning where the Hub was
    not reached.

    Args:
        origin: folder or Hub id.
        name: of the file.
        options: `revision`, `token` and `cache_dir`, for the Hub.
    """
    file = Path(origin) / name
    if os.path.isdir(origin):
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(origin, name, **options))
    except LocalEntryNotFoundError:
        logger.warning(f"The Hub was not reached: {name} of {origin} is not kept.")
    except (EntryNotFoundError, ValueError, OSError):  # there is no such file, or no longer such a place
        pass
    return None


def keep_documents(pipeline: Any, folder: Path, origin: str | None, **options: Any) -> None:
    """
    Puts the documents of the folder or Hub id that a pipeline was loaded from beside its copy in `folder`, and a card
    where there is none. A card that somebody wrote stays.

    Args:
        pipeline ([`CascadedDiffusionPipeline`] or [`SuperResolutionPipeline`]): what `folder` holds.
        folder (`Path`): where it was saved.
        origin (`str`, *optional*): what `from_pretrained` was given.
        options: as in [`find_document`].
    """
    for name in DOCUMENTS if origin else ():
        source, target = find_document(origin, name, **options), folder / name
        if source is not None and not (target.is_file() and (name == CARD and _is_by_hand(target))):
            _copy(source, target)
    if not (folder / CARD).is_file():
        write_card(pipeline, folder)


def _copy(source: Path, target: Path) -> None:
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)


def _is_by_hand(card: Path) -> bool:
    return not is_ours(card.read_text(encoding="utf-8"))


def parts_of(folder: Path) -> list[str]:
    """Patterns of what belongs to the pipeline in a folder: not checkpoints, logs and other traces of training."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    components = [name for name, value in index.items() if isinstance(value, list) and (folder / name).is_dir()]
    return [INDEX, *DOCUMENTS, "*.py", *(f"{name}/*" for name in components)]


def prepare_repository(repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """
    Makes sure that a model repository exists and may be written to, before anything expensive happens.

    Returns:
        Its full name.

    Raises:
        OSError: the Hub was not reached, or refuses.
    """
    with write_errors(repo_id):
        return create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id


def upload(
    folder: Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    path_in_repo: str | None = None,
    origin: str | None = None,
) -> Any:
    """
    Uploads the pipeline in `folder` with its documents. The example of the card loads from `repo_id` then; a card that
    somebody wrote on the Hub is not replaced by one that this package wrote.

    Args:
        folder: what [`~DiffusionPipeline.save_pretrained`] or a command wrote. Its card is changed.
        repo_id: "NAME" or "OWNER/NAME".
        token, private, commit_message, create_pr, path_in_repo: as in `huggingface_hub`.
        origin: folder or Hub id that the pipeline was loaded from, which the card may name.

    Returns:
        [`huggingface_hub.CommitInfo`].

    Raises:
        OSError: the Hub was not reached, or refuses.
    """
    repo_id = prepare_repository(repo_id, token, private)
    card, left_out = folder / CARD, [CARD] if path_in_repo else []
    if card.is_file():
        there = None if _is_by_hand(card) else find_document(repo_id, CARD, token=token)
        if there is not None and _is_by_hand(there):
            left_out = [CARD]
        text = published_at(card.read_text(encoding="utf-8"), repo_id, origin)
        card.write_text(text, encoding="utf-8")
    with write_errors(repo_id):
        return upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            allow_patterns=parts_of(folder),
            ignore_patterns=left_out,
            token=token,
            commit_message=commit_message or "Upload a pipeline of cdm_diffusers",
            create_pr=create_pr,
        )


# ---------------------------------------------------------------------------------------------------------------------
# For commands with `HubOptions`


def prepare_if_asked(config: "HubOptions", output: str | Path) -> None:
    """[`prepare_repository`] where a command is to upload what it will have put into `output`."""
    if config.push_to_hub:
        prepare_repository(config.repository(output), config.hub_token, config.hub_private_repo)


def push_if_asked(config: "HubOptions", output: str | Path) -> None:
    """[`upload`] of the folder `output`, where a command is to do so."""
    if not config.push_to_hub:
        return
    name = config.repository(output)
    try:
        commit = upload(Path(output), name, token=config.hub_token, private=config.hub_private_repo)
    except OSError as error:
        raise OSError(
            f"{output} is complete, but was not uploaded ({str(error).splitlines()[0]}). Upload it later, after "
            f"`import cdm_diffusers`: `DiffusionPipeline.from_pretrained({str(output)!r}).push_to_hub({name!r})`."
        ) from error
    print(f"Uploaded to {commit.commit_url}")
