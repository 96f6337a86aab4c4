"""Saved models on the Hugging Face hub: addresses such as `hf://user/name@revision`, upload and download.

Only the two files that `aezoo.save_model` writes are downloaded. They pass the same checks as a saved model on disk,
because the authors of a repository are not trusted. The hub, the cache, the token and offline mode are configured as
for huggingface_hub (`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` or `hf auth login`, `HF_HUB_OFFLINE`).
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import aezoo
from aezoo.errors import AezooError, install_hint

SCHEME = "hf://"
CARD = "README.md"
FILES = ("config.json", "model.safetensors")
_OWN: dict[str, Any] = {"library_name": "aezoo", "library_version": aezoo.__version__}
# arguments of all downloads, see `downloading`
_DOWNLOAD: ContextVar[dict[str, Any] | None] = ContextVar("_DOWNLOAD", default=None)
_PART = r"[A-Za-z0-9_](?:[\w.-]*[\w])?"
_NAME = re.compile(rf"{_PART}/{_PART}", re.ASCII)


class NotAnAezooModelError(AezooError):
    """The repository exists but does not contain a model of aezoo."""


def is_address(path: str | Path) -> bool:
    """Return whether a path is an address on the hub, which is not a valid file name."""
    return str(path).startswith(SCHEME)


def local_path(path: str) -> str:
    """Return the path given by a model's hyperparameter that refers to another model, if it is local.

    Raises:
        AezooError: it is an address. An untrusted checkpoint can contain this hyperparameter, and only addresses typed
            by the user may access the network.
    """
    if is_address(path):
        raise AezooError(
            f"{path} is not downloaded, since this setting may come from a file: "
            f"aezoo.save_model(aezoo.load_model({path!r}), FOLDER) and give FOLDER"
        )
    return path


def is_repository(name: str) -> bool:
    """Return whether a name has the form `user/name`."""
    return (
        _NAME.fullmatch(name) is not None
        and len(name) <= 96
        and not ("--" in name or ".." in name or name.endswith(".git"))
    )


def check_name(name: str) -> str:
    """Return the name of a repository after checking its form.

    Raises:
        AezooError: the name does not have the form `user/name`.
    """
    if not is_repository(name):
        raise AezooError(f"{name!r} is not a repository: give user/name, at most 96 letters, digits and single - . _")
    return name


def split(address: str) -> tuple[str, str, str | None]:
    """Split an address, `hf://user/name[/path][@revision]`, into repository, path and revision.

    The path is empty for the whole repository.

    Raises:
        AezooError: the address does not have this form.
    """
    whole, at, revision = address.removeprefix(SCHEME).partition("@")
    if at and not revision:
        raise AezooError(f"{address} has no revision after the @: give a branch, a tag or a commit, or remove the @")
    user, _, rest = whole.rstrip("/").partition("/")
    name, _, inside = rest.partition("/")
    if any(part in ("", ".", "..") for part in inside.split("/")) and inside:
        raise AezooError(f"{address} is not a path in a repository: give hf://user/name/folder/file")
    return check_name(f"{user}/{name}" if name else user), inside, revision or None


@contextlib.contextmanager
def downloading(
    *,
    force_download: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Iterator[None]:
    """Context in which downloads use these arguments of `huggingface_hub.hf_hub_download`.

    Args:
        force_download: download files even if they are in the cache.
        token: token of the hub; None or True uses that of huggingface_hub, False none.
        cache_dir: folder of the cache; None uses that of huggingface_hub.
        local_files_only: only use files in the cache.
    """
    arguments = {
        "force_download": force_download,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    before = _DOWNLOAD.set(arguments)
    try:
        yield
    finally:
        _DOWNLOAD.reset(before)


def fetch(address: str) -> Path:
    """Download a saved model and return its folder in huggingface_hub's cache; cached files are not downloaded again.

    Args:
        address: `hf://user/name`, or `hf://user/name@revision` with a branch, a tag or a commit.

    Raises:
        NotAnAezooModelError: the repository exists but has no aezoo model.
        AezooError: the repository or revision does not exist, or is not in the cache and there is no network; or
            huggingface_hub is not installed.
    """
    name, inside, revision = split(address)
    if inside:
        raise NotAnAezooModelError(f"{address} is not an aezoo model, which is a whole repository: give hf://user/name")
    missing = []
    with _errors_in_one_line(name, revision):
        from huggingface_hub import errors, hf_hub_download, snapshot_download

        own = _OWN | (_DOWNLOAD.get() or {})
        folder = snapshot_download(name, revision=revision, allow_patterns=[*FILES], **own)
        for file in FILES:
            # offline, versions before 2 return an incomplete download
            if not (Path(folder) / file).is_file():
                try:
                    hf_hub_download(name, file, revision=Path(folder).name, **own)
                except errors.EntryNotFoundError as error:
                    if isinstance(error, errors.LocalEntryNotFoundError):
                        raise
                    missing.append(file)
    if missing:
        raise NotAnAezooModelError(
            f"{address} is not an aezoo model, it has no {' and no '.join(missing)}: upload one with aezoo.push_to_hub"
        )
    return Path(folder)


class Repository:
    """The files of one commit of a repository, downloaded on demand.

    Attributes:
        files: names of all files; offline, of those in huggingface_hub's cache.

    Args:
        name: `user/name`.
        revision: a branch, a tag or a commit; None is the default branch.

    Raises:
        AezooError: the repository or revision does not exist, or is not in the cache and there is no network; or
            huggingface_hub is not installed.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self._revision = name, revision
        with _errors_in_one_line(name, revision):
            from huggingface_hub import HfApi, constants, snapshot_download

            own = _DOWNLOAD.get() or {}
            try:
                if constants.HF_HUB_OFFLINE or own.get("local_files_only"):
                    raise ConnectionError
                info = HfApi(token=own.get("token"), **_OWN).model_info(
                    name, revision=revision or constants.DEFAULT_REVISION
                )
                self._commit, self.files = info.sha, frozenset(file.rfilename for file in info.siblings or ())
            except Exception as error:
                if not (isinstance(error, ConnectionError) or _is_transport_error(error)) or _status(error) is not None:
                    raise
                folder = Path(snapshot_download(name, revision=revision, **own | {"local_files_only": True}))
                self._commit = folder.name
                found = filter(Path.is_file, folder.rglob("*"))
                self.files = frozenset(path.relative_to(folder).as_posix() for path in found)

    def download(self, file: str) -> Path:
        """Return the path of a file in huggingface_hub's cache, downloading it if needed.

        Raises:
            AezooError: the file is not in the cache and cannot be downloaded.
        """
        with _errors_in_one_line(self.name, self._revision):
            from huggingface_hub import hf_hub_download

            # by the name of the revision, which is the key of the cache when offline
            own = _OWN | (_DOWNLOAD.get() or {})
            path = hf_hub_download(self.name, file, revision=self._revision, **own)
            if self._commit not in Path(path).parts:
                path = hf_hub_download(self.name, file, revision=self._commit, **own)
            return Path(path)


def upload(
    folder: Path,
    name: str,
    *,
    revision: str | None,
    private: bool | None,
    message: str,
    token: str | None,
    card: bool,
    create_pr: bool | None,
) -> str:
    """Upload the files of a saved model and its card to a repository, which is created if it does not exist.

    Args:
        folder: folder written by `save_model`, with a `README.md` and its pictures.
        name: `user/name`.
        revision: a branch, created if it does not exist; None is the default branch.
        private: whether a new repository is private; None uses the owner's settings.
        message: commit message.
        token: token of the hub; None uses that of huggingface_hub.
        card: upload the card and its pictures even if there is a card.
        create_pr: create a pull request instead of a commit.

    Returns:
        The URL of the commit or the pull request.

    Raises:
        AezooError: the user is not logged in or has no write access, there is no network, or huggingface_hub is not
            installed.
    """
    check_name(name)
    with _errors_in_one_line(name, None, writes=True):
        from huggingface_hub import CommitOperationAdd, HfApi, get_token

        if not (token or get_token()):
            raise AezooError("not logged in to the hub: run `hf auth login`, set HF_TOKEN, or pass token=...")
        api = HfApi(token=token or None, **_OWN)
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        # the owner may have edited the card
        if not card and api.file_exists(name, CARD, revision=revision):
            files = [*FILES]
            print(f"aezoo: {CARD} of {name} is kept; use replace_card=True to replace it", file=sys.stderr)
        # a single commit, which upload_folder does not guarantee, so that weights and settings are consistent
        additions = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=folder / file) for file in files]
        commit = api.create_commit(name, additions, commit_message=message, revision=revision, create_pr=create_pr)
    return str(commit.pr_url or commit.commit_url)


@contextlib.contextmanager
def _errors_in_one_line(name: str, revision: str | None, writes: bool = False) -> Iterator[None]:
    """Convert errors of the hub to one-line messages with advice."""
    try:
        yield
    except AezooError:
        raise
    except ModuleNotFoundError as error:
        raise AezooError(f"models on the hub need huggingface_hub: {install_hint('hub')}") from error
    except Exception as error:  # from requests or httpx, depending on the version of huggingface_hub
        raise AezooError(_error_line(error, name, revision, writes)) from error


def _error_line(error: Exception, name: str, revision: str | None, writes: bool) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT.partition("://")[2]
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and isinstance(cause, Exception) and cause not in causes:
        causes.append(cause)
    status = next((code for code in map(_status, causes) if code is not None), None)
    if any(isinstance(cause, errors.GatedRepoError) for cause in causes):
        return f"{name} requires you to accept its conditions: accept them at {constants.ENDPOINT}/{name}"
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
        return f"{name} has no revision {revision!r}: give one of its branches, tags or commits after the @"
    if status in (401, 403) and writes:
        return (
            f"no permission to write to {name} on {hub} ({status}): use a token with write access, by `hf auth login` "
            "or HF_TOKEN, and a user or an organisation of yours before the /"
        )
    if status in (401, 404) or any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes):
        return f"{hub} has no repository {name}, or it is private: check the name, or log in with `hf auth login`"
    if status is not None:
        return f"{hub} refuses {name} ({status}): {' '.join(str(error).split())[:200]}"
    if not writes and (_DOWNLOAD.get() or {}).get("local_files_only"):
        return f"{name} is not in the cache, and local_files_only disables downloads from {hub}: remove it"
    if constants.HF_HUB_OFFLINE:
        missing = "" if writes else f"{name} is not in the cache, and "
        return f"{missing}HF_HUB_OFFLINE disables access to {hub}: remove it from the environment"
    if any(isinstance(cause, OSError) or _is_transport_error(cause) for cause in causes):
        kept = "" if writes else f", and {name} is not in the cache"
        return f"cannot reach {hub}{kept}: check the network, the disk of the cache and HF_ENDPOINT, then try again"
    return f"error of the hub for {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _status(error: Exception) -> int | None:
    code: Any = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def _is_transport_error(error: Exception) -> bool:
    # after a refused connection, huggingface_hub 1.3 retries with a client that it has closed
    is_retry = isinstance(error, RuntimeError) and "client has been closed" in str(error)
    return is_retry or type(error).__module__.partition(".")[0] in ("requests", "httpx", "httpx2", "urllib3")
