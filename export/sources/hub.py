"""Models on a hub: what is needed of one is downloaded to huggingface_hub's cache, and nothing else."""

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from memedge.engine.errors import ExportError
from memedge.export.sources.check_traits import check_index
from memedge.export.sources.weights import INDEX, kind_of, reason

ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def download(
    repository: str,
    revision: str | None,
    choose: Callable[[Sequence[str], object], list[str]],
    progress: Callable[[str], None],
) -> Path:
    """Return the folder of a model in the cache, whose name is the resolved commit; download what is not there.

    The environment variables of huggingface_hub hold (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT).

    Args:
        repository: org/name.
        revision: a branch, tag or commit; None: main.
        choose: returns those of the repository's files that are needed, given their names and, where there is a
            transformer among them, the pipeline's class; or raises ExportError.
        progress: is told what is downloaded, and if the hub does not answer and the cache is used.

    Raises:
        ExportError: the model or revision cannot be found, needs a login, or cannot be reached and is not in the cache.
    """
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # the transport's errors are of a library that changes with huggingface_hub's version
        if isinstance(error, RevisionNotFoundError | HFValidationError):
            raise _told(repository, revision, error) from error
        if (cached := _cached(repository, revision)) is None:
            raise _told(repository, revision, error) from error
        why = "is offline" if isinstance(error, OfflineModeIsEnabled) else "does not give it"
        progress(f"the hub {why}: taking {repository} from the cache, commit {cached.name}")
        return cached
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    try:
        files = choose(list(sizes), _kind(repository, sizes, info.sha))
    except ExportError:
        if INDEX in sizes:  # it may name another family, of which no part is as expected
            with suppress(HfHubHTTPError, LocalEntryNotFoundError):
                check_index(Path(hf_hub_download(repository, INDEX, revision=info.sha)), repository)
        raise
    missing = [
        name for name in files if not isinstance(try_to_load_from_cache(repository, name, revision=info.sha), str)
    ]
    if missing:
        progress(f"downloading {repository}: {len(missing)} files, {sum(sizes[name] for name in missing) / 1e9:.1f} GB")
    try:
        # The revision's name, not the commit: the cache is to know it when there is no network.
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise _told(repository, revision, error) from error
    if missing:
        progress(f"reading {repository}")
    return folder


def _kind(repository: str, names: Collection[str], commit: str | None) -> object:
    """Return the pipeline's class of a model with a transformer, whose family the names of its files do not tell."""
    if INDEX not in names or not any(name.startswith("transformer/") for name in names):
        return None
    with suppress(HfHubHTTPError, LocalEntryNotFoundError):
        return kind_of(Path(hf_hub_download(repository, INDEX, revision=commit)).parent)
    return None


def _cached(repository: str, revision: str | None) -> Path | None:
    """Return the folder of a model in the cache; it may be incomplete, which who reads it will find."""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[INDEX], local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _told(repository: str, revision: str | None, error: Exception) -> ExportError:
    """Return the sentence for what went wrong."""
    if isinstance(error, GatedRepoError):
        return ExportError(
            f"{repository} is gated: accept its terms on its page on the hub and log in with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return ExportError(f"{repository} has no revision {revision}: give a branch, tag or commit that it has.")
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return ExportError(
            f"There is no {repository}, neither here nor on the hub: check the name, or, if it is private, log in with "
            "`hf auth login`."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return ExportError(f"{repository} is not in the cache and HF_HUB_OFFLINE is set: unset it to download it once.")
    return ExportError(
        f"{repository} is not in the cache and the hub cannot be reached ({reason(error)}): check the network, or give "
        "a folder."
    )
