"""`aezoo explore`: the page of `aezoo.tasks.explore` for runs and tags, and a server of its folder on this machine."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from aezoo.cli.config_resolution import drop_foreign_settings, for_data_set, name_data, setting
from aezoo.cli.parsing import Parser, check_flags
from aezoo.cli.task_commands import samples_of_flags, signals_as_exit
from aezoo.data import DataModule
from aezoo.errors import AezooError
from aezoo.io import checkpoint
from aezoo.security import policy
from aezoo.tasks.explore import Subject, explore

_HOST = "127.0.0.1"
# digits in this package, used instead of MNIST, which must be downloaded
_STANDS_IN = {
    "mnist": ("mnist5k", "500 of each digit of MNIST's training images, which these weights may have been trained on.")
}
# not read from the system, whose type of modules may be plain text, which browsers do not run
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
}
# seconds that a browser may take for a request
_TIMEOUT = 30


def main(argv: list[str]) -> None:
    """Write the page, and serve it until the user ends that.

    Raises:
        AezooError: what the user must correct.
    """
    argv, allowed = policy.take_flags(name_data(argv))
    policy.enforce(allowed)
    check_flags(argv, None, _parser())
    with signals_as_exit():
        config = _parser().parse_args(argv[1:])
        if not 0 <= config.port < 2**16:
            raise AezooError(f"port takes a number from 0, any free one, to {2**16 - 1}, got {config.port}")
        if not 0 <= config.seed < 2**32:
            raise AezooError(f"seed takes a number from 0 to {2**32 - 1}, got {config.seed}")
        if not config.models:
            raise AezooError("explore needs trained models: give runs or tags, such as aezoo explore vae.mnist_2d")
        found = subjects(list(dict.fromkeys(config.models)), argv[1:])
        result = explore(found, out=config.out, runtime=config.runtime, seed=config.seed, progress=True)
        print(result.summary())
        if config.serve:
            with server(result.folder, config.port) as serving:
                print(f"http://{_HOST}:{serving.server_port}/ until Ctrl-C", flush=True)
                serving.serve_forever()


def subjects(paths: Sequence[str], flags: list[str]) -> list[Subject]:
    """Models with their samples, those of their training data or of the flags `--data...` and `--input`."""
    return [_subject(path, flags) for path in paths]


def _subject(path: str, flags: list[str]) -> Subject:
    model, trained = checkpoint.load_run(path)
    known = inspect.signature(DataModule).parameters
    recorded, note = trained["settings"] or dict(trained.get("data", {})), ""
    if not trained["settings"] and setting(flags, "data", "name") is None and recorded.get("name") in _STANDS_IN:
        recorded["name"], note = _STANDS_IN[recorded["name"]]
        trained = trained | {"settings": recorded}
    stored = {key: value for key, value in recorded.items() if key in known and key != "batch_size"}
    stored = for_data_set(drop_foreign_settings(stored, flags), flags)
    parser = _parser()
    parser.set_defaults({f"data.{key}": value for key, value in stored.items()})
    config = parser.parse_args(flags)
    wanted = {
        key: inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None)
        for key in ("x", "fit_on", "calibrate_on")
    }
    config.ckpt_path = path
    found = samples_of_flags(config, model.data_units, trained, flags, wanted, False)
    data = str(config.data.root if config.data.name in ("array", "folder") else config.data.name)
    data = Path(config.input or data).name
    if note:
        data += "".join(f", {key} {value}" for key, value in recorded.items() if key != "name")
    is_binary = config.data.binarise != "none"
    return Subject(path, model, found.get("x"), found.get("fit_on"), found.get("calibrate_on"), data, note, is_binary)


def _parser() -> Parser:
    parser = Parser(
        prog="aezoo explore",
        description="Write a page on which a browser runs models of images, and serve it on this machine.",
    )
    parser.add_argument(
        "models", nargs="*", type=str, help="runs, checkpoints, saved models, or tags of `aezoo list --pretrained`"
    )
    parser.add_argument("--out", "--output", type=str, default="explore", help="Folder for the page.")
    parser.add_argument("--port", type=int, default=0, help="Port of the server; 0: any free one.")
    parser.add_argument("--serve", type=bool, default=True, help="Serve the page until Ctrl-C; false: only write it.")
    parser.add_argument(
        "--runtime", type=str | None, default=None,
        help="npm's package onnxruntime-web (.tgz), or a folder with its files; by default npm downloads it once.",
    )  # fmt: skip
    parser.add_argument(
        "--input", type=str | None, default=None,
        help="Samples to choose from, instead of the test split: .npy, .npz, .pt, an image, or a folder of images.",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choice of samples.")
    parser.add_class_arguments(DataModule, "data", instantiate=False)
    return parser


class _Handler(SimpleHTTPRequestHandler):
    """Serves the files of a folder, only for browsers on this machine."""

    timeout = _TIMEOUT

    def handle(self) -> None:
        # the browser has closed the connection
        with suppress(ConnectionError, TimeoutError):
            super().handle()

    def guess_type(self, path: Any) -> str:
        return _TYPES.get(Path(path).suffix) or super().guess_type(path)

    def send_head(self) -> Any:
        # protects against DNS rebinding: the name of another host may resolve to this address
        if self.headers.get("Host", "").rpartition(":")[0] not in (_HOST, "localhost"):
            self.send_error(403, "only for browsers on this machine")
            return None
        return super().send_head()

    def end_headers(self) -> None:
        # a page that was written again must be fetched again
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        """Do not log requests."""


@contextmanager
def server(folder: Path, port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """A server of the folder's files on the loopback.

    Raises:
        AezooError: the port is taken.
    """
    try:
        serving = ThreadingHTTPServer((_HOST, port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise AezooError(f"cannot serve on port {port}: {error.strerror}; leave out --port for a free one") from None
    serving.daemon_threads = True
    with serving:
        yield serving
