"""The record of a study: a PostgreSQL database, an SQLite file or a journal.

optuna and SQLAlchemy are imported when a record is opened, so that a mistake in `--storage` is reported at once.
"""

import importlib
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from aezoo.errors import AezooError, install_hint

_POSTGRESQL = ("postgresql", "postgres", "postgresql+psycopg")
_SQLITE = "sqlite:///"
_SQLITE_FILES = (".db", ".sqlite", ".sqlite3")
# beginning of a line in optuna's journal
_ENTRY = b'{"op_code":'
# seconds to wait for an answer of a server, and for another process to release an SQLite file
_CONNECT, _SQLITE_BUSY = 10.0, 60.0
_OPENINGS = 5


def hide_passwords(text: str) -> str:
    """The text with *** for the passwords of all addresses in it."""
    text = re.sub(r"(\w+://[^\s:/@]*):\S*@", r"\1:***@", text)
    return re.sub(r"(?i)\b((?:ssl)?password)=[^\s&'\"]+", r"\1=***", text)


def check(storage: str) -> None:
    """Refuse a value of `--storage` that cannot be used.

    Raises:
        AezooError: it is neither the address of a PostgreSQL database nor a file.
    """
    if not is_database(storage):
        path = storage.removeprefix(_SQLITE)
        if "://" in path or not path or Path(path).is_dir():
            raise AezooError(
                f"--storage {hide_passwords(storage)}: give postgresql://USER@HOST/DATABASE, or a file: study.db or "
                "study.log"
            )
        return
    try:
        parts = urlsplit(storage)
        host, database = parts.hostname or dict(parse_qsl(parts.query)).get("host"), parts.path.strip("/")
        _ = parts.port
        escaped = storage.count("@") == parts.netloc.count("@") <= 1 and not parts.fragment
    except ValueError:
        escaped = False
    if not escaped or re.search(r"\s", storage):
        # the address itself may show a part of the password
        raise AezooError(
            "--storage: this address cannot be read; percent-encode special characters of its password, "
            "@ as %40, / as %2F and # as %23"
        )
    if not host or not database:
        raise AezooError(
            f"--storage {hide_passwords(storage)}: the {'database' if host else 'host'} is missing in "
            "postgresql://USER@HOST/DATABASE"
        )
    try:
        importlib.import_module("psycopg")
    except ImportError as error:  # also of libpq
        raise AezooError(f"--storage postgresql://... needs psycopg: {install_hint('tune')} ({error})") from error


def is_database(storage: str) -> bool:
    """Whether it is the address of a database server."""
    return storage.partition("://")[0] in _POSTGRESQL and "://" in storage


def open_storage(storage: str) -> Any:
    """Optuna's storage for a value of `--storage`; what does not exist is created."""
    import optuna
    from sqlalchemy.engine import URL, make_url
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError
    from sqlalchemy.pool import NullPool

    if not is_database(storage):
        path = Path(storage.removeprefix(_SQLITE))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not storage.startswith(_SQLITE) and path.suffix not in _SQLITE_FILES:
            return _open_journal(path)
        url = URL.create("sqlite", database=str(path))
        connect = {"timeout": _SQLITE_BUSY}
    else:
        url = make_url(storage).set(drivername="postgresql+psycopg")
        connect = {} if "connect_timeout" in url.query else {"connect_timeout": _CONNECT}
    # a server takes about 100 connections, which hundreds of workers would keep open, most of them idle
    arguments = {"poolclass": NullPool, "connect_args": connect}
    for opening in range(_OPENINGS):
        try:
            return optuna.storages.RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=arguments)
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            # workers that start at the same time create the same tables
            if ("exist" not in str(error) and "UNIQUE" not in str(error)) or opening == _OPENINGS - 1:
                raise
            time.sleep(0.5)
    raise AssertionError


def reason(error: BaseException) -> str:
    """Why a record could not be read or written, in one line and without passwords."""
    inner: BaseException = error
    while inner.__cause__ is not None and not hasattr(inner, "orig"):
        inner = inner.__cause__
    return hide_passwords(" ".join(str(getattr(inner, "orig", None) or inner).split())[:300])


def cure(why: str) -> str:
    """How to fix a failure of a database server, by its message."""
    if "authentication failed" in why or "no password supplied" in why:
        return "check user and password, which PGPASSWORD or ~/.pgpass may contain"
    if re.search(r'database ".*" does not exist', why):
        return "create the database first"
    return "check that the server runs and can be reached from this machine"


def _open_journal(path: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    # with a relative path optuna does not recognise the lock of a killed process and waits forever
    path = path.absolute()

    class Lock(JournalFileSymlinkLock):
        """Repairs the end of the journal before anything is appended to it."""

        def acquire(self) -> bool:
            acquired = super().acquire()
            _truncate_partial_line(path)
            return acquired

    backend = JournalFileBackend(str(path), lock_obj=Lock(str(path)))
    return JournalStorage(backend)


def _truncate_partial_line(path: Path) -> None:
    """Remove an incomplete line that a killed process or a full disk has left at the end of a journal.

    Otherwise the next line would be appended to it, and neither could be read.
    """
    with path.open("rb+") as file:
        if file.seek(0, 2) == 0:
            return
        file.seek(-1, 2)
        if file.read() == b"\n":
            return
        file.seek(0)
        whole, end, partial = file.read().rpartition(b"\n")
        if partial.startswith(_ENTRY) or _ENTRY.startswith(partial):
            file.truncate(len(whole + end))
