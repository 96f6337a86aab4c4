"""A folder in an object store, s3://bucket/prefix, whose files are cached on this machine.

`ObjectFolder` lists and reads objects by boto3, with boto3's settings: AWS_ACCESS_KEY_ID, AWS_PROFILE,
AWS_ENDPOINT_URL, AWS_MAX_ATTEMPTS and so on. `FileCache` stores files of such a folder in a local folder of limited
size that all processes of a machine share. A process that reads a file has a shared lock on it, and a process that
writes a file has an exclusive lock on its unfinished `.part-NAME`. To free disk space, only files without a lock are
deleted. Nothing has to be cleaned up after a kill.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple, TypedDict

from aezoo.errors import AezooError, install_hint
from aezoo.io import atomic_files
from aezoo.security import policy
from aezoo.training.keyword_groups import Argument

SCHEME = "s3://"
_ADDRESS = re.compile(r"s3://([A-Za-z0-9][\w.-]{1,61}[A-Za-z0-9])(?:/([^\x00-\x1f]*?))?/*", re.ASCII)
# names of files that any file system allows, and that differ from those of the cache itself
_NAME = re.compile(r"\w[\w.-]{0,199}", re.ASCII)
_MOST_OBJECTS = 10**6
_BLOCK = 2**20
_CONNECTIONS = 4
# seconds between attempts, doubled each time
_PAUSE, _LONGEST_PAUSE = 0.5, 20.0
_LOCK, _PART = ".lock", ".part-"
_UNREACHABLE = "the server cannot be reached: check the network and AWS_ENDPOINT_URL"
_CAUSES = {
    "NoSuchBucket": "there is no such bucket: check its name, and AWS_ENDPOINT_URL for a store that is not Amazon's",
    "NoCredentialsError": "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "PartialCredentialsError": "one of the two credentials is missing: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "AWS_PROFILE names a profile that is in no AWS configuration file: correct one of them",
    "AccessDenied": "access is denied: the credentials need s3:ListBucket and s3:GetObject there",
    "PreconditionFailed": "it has been overwritten since this command started: run the command again",
    "NoSuchKey": "it has been deleted since this command started: run the command again",
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
        "the credentials are not accepted: renew AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN",
    ),
    "ValueError": "AWS_ENDPOINT_URL is not an address: give one such as https://store.example:9000",
    "FlexibleChecksumError": "its content does not match its checksum: upload it again",
}


class ObjectStoreArgs(TypedDict, total=False):
    """Settings of sources that read from an object store."""

    cache_dir: Annotated[str, Argument(
        "", "Where stream keeps chunks of an s3:// address, for all processes of the machine; by default "
        "~/.cache/aezoo/chunks."
    )]  # fmt: skip
    cache_bytes: Annotated[int, Argument(
        2**35, "The most bytes that these chunks may take (32 GiB); the least recently used ones are deleted.", 1
    )]  # fmt: skip


class Object(NamedTuple):
    """An object as its store lists it.

    Attributes:
        size: its bytes.
        tag: a text that changes with its content.
    """

    size: int
    tag: str


def is_address(root: str) -> bool:
    """Whether the location of a set is an address, not a path."""
    return "://" in root


def without_credentials(address: str) -> str:
    """The address without user and password, for messages."""
    return re.sub(r"://.*@", "://***@", address)


class ObjectFolder:
    """The objects below s3://bucket/prefix; listed by the constructor.

    Args:
        address: the address.
        allow_remote: whether the user has said that addresses may be opened; `--allow_remote` does so, too.

    Attributes:
        address: the address without a slash at the end.
        objects: the objects by their paths below the prefix, in order, without hidden ones.

    Raises:
        AezooError: the address may not be opened, or cannot be.
    """

    def __init__(self, address: str, allow_remote: bool = False) -> None:
        shown = without_credentials(address)
        if not address.startswith(SCHEME):
            raise AezooError(f"{shown} is an address, and only s3:// addresses are opened (SECURITY.md): copy or mount "
                             "the folder first, and give its path with --data.root")  # fmt: skip
        if not (allow_remote or policy.allows_remote()):
            raise AezooError(f"{shown} is an address, and addresses are not opened unless you allow it: add "
                             "--allow_remote (in Python: allow_remote=True), or copy the folder first")  # fmt: skip
        found = _ADDRESS.fullmatch(address)
        if found is None:
            raise AezooError(f"{shown} is not the address of a folder: give s3://bucket/prefix, and credentials by "
                             "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE")  # fmt: skip
        self.bucket, prefix = found[1], (found[2] or "").strip("/")
        self.address = f"{SCHEME}{self.bucket}{'/' if prefix else ''}{prefix}"
        self._prefix = f"{prefix}/" if prefix else ""
        self._opened: tuple[int, Any] = (0, None)
        self.objects = dict(sorted(self._list()))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": (0, None)}

    @property
    def client(self) -> Any:
        """boto3's client, one per process, as connections do not survive a fork."""
        process, client = self._opened
        if client is None or process != os.getpid():
            try:
                import boto3
            except ImportError:
                raise AezooError(f"{SCHEME} needs the package boto3: {install_hint('s3')}") from None
            try:
                client = boto3.Session().client("s3")
            except Exception as error:  # boto raises errors of many kinds, with values of the environment in them
                raise self._refusal(error) from None
            self._opened = (os.getpid(), client)
        return client

    def _list(self) -> Iterator[tuple[str, Object]]:
        client = self.client
        page: dict[str, Any] = {}
        for _ in range(_MOST_OBJECTS // 1000 + 1):
            try:
                page = client.list_objects_v2(Bucket=self.bucket, Prefix=self._prefix, **_next(page))
                for entry in page.get("Contents", ()):
                    path = str(entry["Key"])[len(self._prefix) :]
                    if path and not any(part.startswith(".") or not part for part in path.split("/")):
                        yield path, Object(int(entry["Size"]), str(entry["ETag"]))
            except Exception as error:
                raise self._refusal(error) from None
            if not page.get("NextContinuationToken"):
                return
        raise AezooError(
            f"{self.address} has more than {_MOST_OBJECTS:,} objects: give the prefix of the data set only"
        )

    def blocks(self, path: str, most: int | None = None) -> Iterator[bytes]:
        """The content of an object in order; after a lost connection, reading continues where it stopped.

        Args:
            path: its path below the prefix.
            most: how many bytes to read; by default all.

        Raises:
            AezooError: it cannot be read: as many attempts in a row have failed as boto is set to make.
        """
        size, tag = self.objects[path]
        end = size if most is None else min(size, most)
        client, offset, failures, failed_at = self.client, 0, 0, 0
        attempts = (client.meta.config.retries or {}).get("total_max_attempts", 5)
        while offset < end:
            try:
                # without a range, boto compares the whole object with the checksum in the store
                part = {} if (offset, end) == (0, size) else {"Range": f"bytes={offset}-{end - 1}"}
                key = self._prefix + path
                response = client.get_object(Bucket=self.bucket, Key=key, IfMatch=tag, **part)
                with contextlib.closing(response["Body"]) as body:
                    if response["ContentLength"] != end - offset:
                        raise AezooError(f"{self.address}/{path} has an unexpected size: run the command again")
                    for block in body.iter_chunks(_BLOCK):
                        offset += len(block)
                        yield block
            except AezooError:
                raise
            except Exception as error:
                # a few bytes per attempt are not progress
                failures = 1 if offset - failed_at >= _BLOCK else failures + 1
                failed_at = offset
                if offset >= end or failures >= attempts or not _is_transient(error):
                    raise self._refusal(error, path) from None
                time.sleep(min(_LONGEST_PAUSE, _PAUSE * 2 ** (failures - 1)))

    def first_bytes(self, paths: Iterable[str], most: int) -> list[bytes]:
        """The first bytes of some objects."""
        self.client  # noqa: B018  threads share it
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            return list(pool.map(lambda path: b"".join(self.blocks(path, most)), paths))

    def digest(self) -> str:
        """A name for this content of the folder; it changes when an object is replaced."""
        content = [self.client.meta.endpoint_url, self.address, *self.objects.items()]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    def _refusal(self, error: Exception, path: str = "") -> AezooError:
        """The message for boto's error, whose text may contain an address with credentials, or text from the server."""
        from botocore.exceptions import ClientError

        kind = type(error).__name__
        if isinstance(error, ClientError):
            kind = str(error.response.get("Error", {}).get("Code", kind))
            kind = kind if re.fullmatch(r"\w{1,60}", kind, re.ASCII) else "an unknown error"
        cause = _CAUSES.get("AccessDenied" if kind == "403" else kind)
        if cause is None:
            cause = f"{_UNREACHABLE} ({kind})" if _is_transient(error) else f"the store answered {kind}"
        where = f"{self.address}/{path}" if path else self.address
        return AezooError(f"{where} cannot be read: {cause}")


def _next(page: dict[str, Any]) -> dict[str, str]:
    token = page.get("NextContinuationToken")
    return {"ContinuationToken": token} if token else {}


def _is_transient(error: Exception) -> bool:
    """Whether another attempt may succeed: not if the server has answered that the request is wrong."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError

    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500
    return isinstance(error, ConnectionError | HTTPClientError | IncompleteReadError)


class FileCache:
    """Files of an object folder in a local folder, at most `most` bytes including those of other sets.

    Args:
        objects: the object folder.
        root: the folder of the cache; empty for the default.
        most: the most bytes that the files may take.

    Attributes:
        folder: where the files of this content of the object folder are.

    Raises:
        AezooError: the folder cannot be written.
    """

    def __init__(self, objects: ObjectFolder, root: str, most: int) -> None:
        self.objects, self.most = objects, most
        if sys.platform == "win32":
            raise AezooError(f"{objects.address} needs file locks that Windows lacks: copy the folder first, and give "
                             "its path with --data.root")  # fmt: skip
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "aezoo" / "chunks"
        self.root = (Path(root) if root else default).expanduser().absolute()
        self.folder = self.root / objects.digest()
        self._last = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None

    def keep(self, path: str, most: int) -> None:
        """Download a small file, which is not deleted.

        Args:
            path: its path below the folder.
            most: the most bytes it may have.
        """
        size = self.objects.objects[path].size
        if size > most:
            raise AezooError(f"{self.objects.address}/{path} has {size:,} bytes, and at most {most:,} are read: "
                             "give the folder of a data set")  # fmt: skip
        file = self.folder / path
        if not file.is_file():
            content = b"".join(self.objects.blocks(path))
            atomic_files.write(file, lambda opened: opened.write(content), cure="give another --data.cache_dir")

    def check(self, paths: Sequence[str], group: int) -> None:
        """Refuse files for which the cache is too small.

        Args:
            paths: the files, below the folder.
            group: how many of them are in use at a time.
        """
        for path in paths:
            name = path.rpartition("/")[2]
            if not _NAME.fullmatch(name) or name.endswith(".json"):
                raise AezooError(f"{self.objects.address} has a chunk called {name[:100]!r}: name chunks by letters, "
                                 "digits, dots and dashes")  # fmt: skip
        sizes = sorted(self.objects.objects[path].size for path in paths)
        if (least := sum(sizes[-group:])) > self.most:
            raise AezooError(f"--data.cache_bytes {self.most} is too small for {self.objects.address}, of which up to "
                             f"{group} chunks are in use at a time: give at least {least}")  # fmt: skip

    def fetch(self, paths: Iterable[str]) -> None:
        """Download those files that are missing, several at a time."""
        missing = [path for path in paths if not (self.folder / path).exists()]
        if len(missing) < 2:
            return  # `held` downloads it
        self.objects.client  # noqa: B018  threads share it
        pool = ThreadPoolExecutor(_CONNECTIONS)
        try:
            for _ in pool.map(self._download, missing):
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    @contextlib.contextmanager
    def held(self, path: str) -> Iterator[None]:
        """A context in which a file exists, complete, and is not deleted by other processes."""
        file, size = self.folder / path, self.objects.objects[path].size
        while True:
            try:
                opened = file.open("rb")
            except FileNotFoundError:
                self._download(path)
                continue
            with opened:
                _lock(opened, shared=True)
                found = os.fstat(opened.fileno())
                if found.st_nlink and found.st_size == size:
                    if path != self._last:
                        self._last = path
                        os.utime(file)  # the time of the last use
                    yield
                    return
                if found.st_nlink:
                    file.unlink(missing_ok=True)

    def _download(self, path: str) -> None:
        file, size = self.folder / path, self.objects.objects[path].size
        part = file.with_name(f"{_PART}{file.name}")
        try:
            file.parent.mkdir(exist_ok=True)
            with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as opened:
                _lock(opened)  # another process may be downloading it
                if not _is_open_at(opened, part):
                    return
                if file.exists():
                    part.unlink()
                    return
                try:
                    self._reserve(opened, size)
                    for block in self.objects.blocks(path):
                        opened.write(block)
                    opened.flush()
                    os.fsync(opened.fileno())
                    with self._locked():  # otherwise a process that frees space may see neither name
                        part.replace(file)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise self._unwritable(error) from None

    def _reserve(self, part: IO[bytes], size: int) -> None:
        """Wait until there is enough space, and give the file its final size, by which other processes count it."""
        os.ftruncate(part.fileno(), 0)
        while True:
            with self._locked():
                if self._make_room(size):
                    os.ftruncate(part.fileno(), size)
                    return
            time.sleep(0.05)  # files that are being read will soon be unlocked

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """A context in which no other process frees space, or begins or completes a file."""
        with (self.root / _LOCK).open("ab") as lock:
            _lock(lock)
            yield

    def _make_room(self, size: int) -> bool:
        files: list[tuple[float, Path, int]] = []
        for path in self.root.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                if path.is_file() and path.name != _LOCK and path.suffix != ".json":
                    files.append((found.st_mtime, path, found.st_size))
        total = size + sum(taken for _, _, taken in files)
        for _, path, taken in sorted(files):
            if total <= self.most:
                break
            with contextlib.suppress(FileNotFoundError, BlockingIOError, PermissionError), path.open("rb") as opened:
                _lock(opened, wait=False)
                path.unlink()
                total -= taken
        return total <= self.most

    def _unwritable(self, error: OSError) -> AezooError:
        return AezooError(f"cannot write chunks into {self.root} ({error.strerror or error}): free disk "
                          "space, lower --data.cache_bytes, or give another --data.cache_dir")  # fmt: skip


def _lock(file: IO[bytes], shared: bool = False, wait: bool = True) -> None:
    """Lock an open file until it is closed."""
    import fcntl  # which Windows lacks

    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def _is_open_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
