"""A temporary PostgreSQL server for tests, in a temporary folder."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

USER, PASSWORD = "aezoo", "p@ss/w0rd#1"
QUOTED = "p%40ss%2Fw0rd%231"


def binaries() -> Path | None:
    """The folder of Debian's newest server, or of the one in PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    path = found[-1] if found else shutil.which("initdb")
    return Path(path).parent if path and shutil.which("setpriv") else None


@contextlib.contextmanager
def server() -> Iterator[int]:
    """Start a server on 127.0.0.1 and yield its port; it ends with this process in any case."""
    folder = Path(tempfile.mkdtemp(prefix="aezoo-postgres-"))
    own = binaries()
    assert own is not None
    drop = ["setpriv", "--pdeathsig=QUIT"]
    if os.geteuid() == 0:  # initdb and postgres refuse to run as root
        user = pwd.getpwnam("nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        drop += [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    data = str(folder / "data")
    try:
        subprocess.run(
            [*drop, own / "initdb", "-D", data, "-U", USER, "-A", "scram-sha-256", "-E", "UTF8", "--no-sync",
             f"--pwfile={folder / 'password'}", "--no-locale"],
            check=True, capture_output=True, cwd=folder,
        )  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with (folder / "log").open("wb") as log, subprocess.Popen(
            [*drop, own / "postgres", "-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1",
             "-c", "unix_socket_directories=", "-c", "fsync=off"],
            stdout=log, stderr=log, cwd=folder,
        ) as process:  # fmt: skip
            try:
                end = time.monotonic() + 60
                while True:
                    try:
                        connect(port).close()
                        break
                    except psycopg.OperationalError:
                        assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                        time.sleep(0.1)
                yield port
            finally:
                process.send_signal(signal.SIGINT)  # fast shutdown, which does not wait for clients
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def connect(port: int, database: str = "postgres") -> psycopg.Connection:
    """A connection in which each statement is a separate transaction."""
    return psycopg.connect(host="127.0.0.1", port=port, user=USER, password=PASSWORD, dbname=database, autocommit=True)


def create_database(port: int, name: str) -> str:
    """Create an empty database and return its address, with the password."""
    with connect(port) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql://{USER}:{QUOTED}@127.0.0.1:{port}/{name}"
