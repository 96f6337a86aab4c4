"""The command line: light commands here, without torch; training commands in `aezoo.cli.lightning_cli`."""

import argparse
import atexit
import contextlib
import difflib
import gc
import importlib
import os
import shlex
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import aezoo
from aezoo import registry
from aezoo.cli import LIGHTNING_COMMANDS, LIGHTWEIGHT_COMMANDS, TASK_COMMANDS, measured
from aezoo.cli.recipes import find_recipe, recipes
from aezoo.errors import AezooError
from aezoo.io import terminal
from aezoo.training import launcher
from aezoo.training.tags import Tag
from aezoo.training.traits import TAGS

HELP = """\
usage: aezoo COMMAND ...

Information
  list [WORD] [--family F] [--tag T]
                                   models: name, family, tags, paper; a word is part of a name, a family or a tag
  list --pretrained                pretrained weights, such as vae.mnist: data, figure, size, licence
  info NAME [--shape C H W]        a model's paper, objective, hyperparameters, figures and better models; with
                                   a shape its size
  recipes                          ready-made configurations
  cp RECIPE DEST                   copy a recipe to change it

Train and use
  fit -c RECIPE                    train with a recipe, or with a YAML file of your own
  fit --model NAME --data SET      train any model on any data; every flag can be in the YAML too
  fit ... --resume auto            the same, or continue the last run of that command if it was stopped
  fit --resume RUN                 continue a run that was stopped
  validate | test | predict --ckpt_path RUN_OR_FILE
  report RUN [RUN ...]             one HTML file about a run, or a comparison: curves and their diagnosis,
                                   pictures, results of commands, settings that differ, time, environment
  tune -c RECIPE --search.model.lr log:1e-4:1e-2 --trials 20
                                   search for the best settings of fit over many runs

Use a trained model: each takes --ckpt_path RUN_OR_FILE_OR_TAG, --input FILE or --data..., and --help
  reconstruct                      reconstructions, the error of each sample, the best and the worst
  generate                         new samples from the model's prior or a fitted one; walks, FID and KID
  denoise --corrupt gaussian:0.3   denoised samples, compared with filters
  impute RUN FILE                  missing values (NaN, empty cells, --mask FILE) filled in; --hide 0.2 measures errors
  detect                           anomaly scores and p-values, compared with PCA, kNN and isolation forest
  embed                            codes, a picture of them, accuracy of classifiers on them; --nearest 5
  compress                         .aez files, lossless or lossy, compared with PNG, WebP, JPEG, xz, PCA
  decompress --input FILE.aez      back to .npy or .png
  export RUN --what score          an .onnx, .pt2 or .safetensors file that runs without aezoo; encode, decode,
                                   reconstruct, score with its threshold, indices
  explore RUN_OR_TAG ...           a page of models in the browser: draw, encode, decode, walk through the codes
  import SOURCE [OUT]              weights of other libraries, from files or hf://owner/name, as a saved model

Measure
  benchmark NAME ...               speed, quality, bits, quantisers, tasks, disentangle, dictionaries, probe,
                                   adbench, kodak, scaling, latency, peers, report

Examples
  aezoo fit -c vae
  aezoo fit --model topk_sae --data digits --model.k 8 --trainer.max_epochs 30
  aezoo fit --model vae --data array --data.root my_data.npy --model.likelihood gaussian:learned
  aezoo fit --model.help vae       the flags of one model; `aezoo fit --help_all`: all flags
  aezoo test --ckpt_path runs/vae/0
  aezoo generate --ckpt_path vae.mnist
  tensorboard --logdir runs
"""
BENCHMARKS = {
    "speed": "training and inference: samples/s, step time, memory, FLOPs, start-up, scaling over devices",
    "quality": "reconstruction error and probe accuracy, compared with PCA, for models, code sizes and seeds",
    "tasks": "generate, denoise, detect, embed, compress, compared with the usual alternatives",
    "disentangle": "how well codes separate the factors of shapes: MIG, SAP, DCI and others, over seeds",
    "dictionaries": "whether sparse models find the atoms of a known dictionary: MCC, L0, FVU, dead share, over seeds",
    "probe": "accuracy of a linear probe and of kNN on codes, for masked and other models, over seeds",
    "bits": "reconstruction error of quantised models at equal bits, and usage of their codes, over seeds",
    "quantisers": "speed and memory of quantisers, 512 to 65,536 codes, compared with vector-quantize-pytorch",
    "adbench": "anomaly detectors of the zoo and of PyOD on ADBench's tables: AUROC, AUPR, ranks, time of a fit",
    "kodak": "bits and errors of the Kodak photographs, compared with JPEG, WebP, AVIF and JPEG XL by BD-rates",
    "scaling": "how time and memory grow with samples, code, width, image and codebook size, and for each command",
    "latency": "microseconds that the anomaly score of one sample takes, by the exported file and by the model",
    "peers": "the same networks trained by aezoo, by hand-written loops and by other libraries",
    "report": "tables and pictures from the CSVs that the others wrote",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; `argv` replaces `sys.argv[1:]`. Exit code 2: an error that the user must correct."""
    whole = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    if whole:
        launcher.end_with_launcher()
    terminal.open_missing_streams()
    terminal.replace_unencodable()
    if whole:
        _shorten_warnings()
    try:
        _run(argv, whole)
    except AezooError as error:
        print(f"aezoo: {terminal.printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # the reader of the pipe has ended: for `aezoo list | head` this is not an error, but a run ends with it
        if argv and argv[0] in (*LIGHTNING_COMMANDS, *TASK_COMMANDS, "benchmark", "tune"):
            sys.exit(128 + 13)  # SIGPIPE, as in shells
    except OSError as error:
        if error.filename is None:
            if (reason := terminal.unwritable_output(after=error)) is None:
                raise
            _refuse_output(reason)
        where = terminal.printable(os.fsdecode(error.filename))
        print(f"aezoo: cannot read or write {where}: {error.strerror}; give another path", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\naezoo: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        failure = terminal.unwritable_output()
        terminal.detach_unwritable_streams()
        if failure is not None and not isinstance(sys.exception(), SystemExit):
            _refuse_output(failure)


def _shorten_warnings() -> None:
    """Show a warning as one line without its source line; importing Lightning installs another format."""
    warnings.formatwarning = lambda message, *_, **__: f"aezoo: warning: {' '.join(str(message).split())}\n"


def _refuse_output(reason: str) -> NoReturn:
    print(f"aezoo: cannot write the output: {reason}; free disk space, or write it elsewhere", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def import_errors_in_one_line(whole: bool) -> Iterator[None]:
    """Pause garbage collection during imports, a quarter of their time; permanently if `whole`."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if whole:
            _shorten_warnings()
            gc.freeze()
            atexit.register(gc.unfreeze)  # triton 3.9 lists unfreed objects at exit
        if enabled:
            gc.enable()


def _run(argv: list[str], whole: bool = False) -> None:
    match argv:
        case ["help", command, *_] if command in (*LIGHTWEIGHT_COMMANDS, *LIGHTNING_COMMANDS, *TASK_COMMANDS):
            _run([command, "--help"], whole)
        case ["help", command, *_] if not command.startswith("-"):
            _run([command])
        case [] | ["-h" | "--help" | "help", *_]:
            print(HELP, end="")
        case ["--version" | "-V", *_]:
            print(f"aezoo {aezoo.__version__}")
        case ["list", *rest]:
            _list(rest)
        case ["info", *rest]:
            _info(rest)
        case ["recipes", *rest]:
            _recipes(rest)
        case ["cp", *rest]:
            _cp(rest)
        case ["benchmark", *rest]:
            _benchmark(rest)
        case ["report", *rest]:
            from aezoo.cli import report

            report.main(rest)
        case ["import", *rest]:
            with import_errors_in_one_line(whole):
                _import(rest)
        case ["tune", *rest]:
            with import_errors_in_one_line(whole):
                from aezoo.cli import tune

            tune.main(rest)
        case ["explore", *_]:
            with import_errors_in_one_line(whole):
                from aezoo.cli import explore

            explore.main(argv)
        case [command, *rest] if command in LIGHTNING_COMMANDS and {"-h", "--help"} & {*rest}:
            from aezoo.cli import short_help

            print(short_help.text(command), end="")
        case [command, *rest] if command in LIGHTNING_COMMANDS:
            argv = [command, *("--help" if word == "--help_all" else word for word in rest)]
            with import_errors_in_one_line(whole):
                from aezoo.cli import lightning_cli

            lightning_cli.main(argv)
        case [command, *_] if command in TASK_COMMANDS:
            with import_errors_in_one_line(whole):
                from aezoo.cli import task_commands

            task_commands.main(argv)
        case [command, *_]:
            near = difflib.get_close_matches(command, [*LIGHTWEIGHT_COMMANDS, *LIGHTNING_COMMANDS, *TASK_COMMANDS], n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise AezooError(f"unknown command {command!r}{hint} See `aezoo --help`.")


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"aezoo {command}", description=description)


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 10_000


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        print(line if len(line) <= _width() else line[: _width() - 1] + "…")


def _list(argv: list[str]) -> None:
    parser = _parser("list", "Models: name, family, tags and paper.")
    parser.add_argument(
        "pattern", nargs="*", default=["*"], help="parts of names, families or tags, or shell patterns such as 'v*ae'"
    )
    parser.add_argument("--family", help="only one family: classic, sparse, variational, ... or plugin")
    parser.add_argument("--tag", help=f"only models for one use: {', '.join(TAGS)}")
    parser.add_argument("--pretrained", action="store_true", help="weights by their tags, which --ckpt_path takes")
    arguments = parser.parse_args(argv)
    if arguments.pretrained:
        _list_pretrained(arguments.pattern, arguments.family, arguments.tag)
        return
    names = registry.search(arguments.pattern, arguments.family, arguments.tag)
    if not names:
        raise AezooError(f"no model matches {' '.join(arguments.pattern)!r}: `aezoo list` shows all")
    rows = []
    for name in names:
        entry = registry.find(name)
        try:
            summary = registry.summary(name)
        except AezooError as error:
            warnings.warn(str(error), stacklevel=1)
            summary = f"(broken plug-in of {entry.owner})"
        rows.append((name, entry.family, ", ".join(registry.uses_of(name)) or "-", summary))
    _table(rows)


def _list_pretrained(words: Sequence[str], family: str | None, tag: str | None) -> None:
    tags = registry.search_tags(words, family, tag)
    if not tags:
        raise AezooError(f"no pretrained weights match {' '.join(words)!r}: `aezoo list --pretrained` shows all")
    rows = [("tag", "data", "figure", "size", "licence")]
    rows += [(tag.name, str(tag.data["name"]), _figure(tag), f"{tag.bytes / 1e6:.2f} MB", tag.license) for tag in tags]
    _table(rows)


def _figure(tag: Tag) -> str:
    """The most important figure: ours, otherwise the authors'."""
    return str(next(iter((*tag.figures, tag.authors_figure)), None) or "")


def _info(argv: list[str]) -> None:
    parser = _parser("info", "Paper, objective and hyperparameters of a model.")
    parser.add_argument("name", help="a model, see `aezoo list`, or a tag of `aezoo list --pretrained`")
    parser.add_argument(
        "--shape", nargs="+", type=int, metavar="N", help="shape of one sample, e.g. 1 28 28: counts parameters"
    )
    arguments = parser.parse_args(argv)
    recipe = {name.lower(): name for name in recipes()}.get(arguments.name.lower())
    if recipe is not None and registry.resolve(arguments.name) is None:
        raise AezooError(
            f"{recipe} is a recipe, not a model: aezoo fit -c {recipe} trains it, aezoo cp {recipe} copies its "
            "settings; `aezoo recipes` lists all"
        )
    if (tag := registry.find_tag(arguments.name)) is not None:
        _info_tag(tag)
        return
    if (hint := registry.suggest_tags(arguments.name)) and registry.resolve(arguments.name) is None:
        raise AezooError(f"no model or pretrained weights are named {arguments.name!r}: {hint}")
    entry = registry.find(arguments.name)
    card = registry.card(arguments.name)
    uses = "".join(f"for {use}: {TAGS.get(use, '')}\n" for use in registry.uses_of(entry.name))
    print(f"{entry.name} ({entry.family}, {entry.owner})\n{card.summary}\n{uses}\n{card.text}\n\n{card.about}\n")
    print(f"Hyperparameters: --model.NAME VALUE, or aezoo.create_model({entry.name!r}, NAME=VALUE)")
    indent = " " * 34
    for name, kind, default, meaning in card.parameters:
        if name != "input_shape":
            head = f"  {name}: {kind} = {default}"
            text = textwrap.fill(meaning, max(60, min(_width(), 110)), initial_indent=indent, subsequent_indent=indent)
            print(head.ljust(33) + " " + text.lstrip() if len(head) < 33 else f"{head}\n{text}")
    if tags := registry.tags_of(entry.name):
        print("\nPretrained weights: --ckpt_path TAG, or aezoo.load_model(TAG)")
        _table([(f"  {tag.name}", f"{tag.bytes / 1e6:.2f} MB", tag.license, _figure(tag)) for tag in tags])
    if arguments.shape:
        _count(entry.name, tuple(arguments.shape))
    print("", *measured.lines(entry.name), sep="\n")


def _info_tag(tag: Tag) -> None:
    """The description of pretrained weights."""
    low, high = tag.input_range
    settings = ", ".join(f"{key} {value}" for key, value in tag.data.items() if key != "name")
    rows = [
        ("model", tag.model),
        ("data", f"{tag.data['name']}{f' ({settings})' if settings else ''}"),
        ("samples", f"{'x'.join(map(str, tag.input_shape))}, from {low:g} to {high:g}"),
        ("size", f"{tag.bytes / 1e6:.2f} MB"),
        ("licence", tag.license),
        ("source", f"{tag.source}@{tag.revision}" if tag.is_remote else f"package {tag.owner}"),
        *(
            (f"{figure.metric}", f"{figure.value:.4g} ({figure.split}{figure.note and ', ' + figure.note})")
            for figure in tag.figures
        ),
        *(("authors' figure", str(figure)) for figure in filter(None, [tag.authors_figure])),
        *((name, text) for name, text in (("settings", tag.recipe), ("made by", tag.command)) if text),
    ]
    print(tag.name)
    _table([(f"  {name}", text) for name, text in rows])


def _count(name: str, shape: tuple[int, ...]) -> None:
    with contextlib.redirect_stderr(None):
        model = registry.create_model(name, shape)
    by_part = {key: sum(p.numel() for p in part.parameters()) for key, part in model.named_children()}
    total = sum(p.numel() for p in model.parameters())
    parts = ", ".join(f"{key} {count:,}" for key, count in by_part.items() if count)
    print(f"\nWith input shape {shape}: {total:,} parameters ({parts}); code shape {model.code_shape}")
    own = getattr(model, "own_hidden_dims", None)
    if own is not None and {"net", "hidden_dims"} <= {*model.hparams}:
        from aezoo import nets

        by_dims: dict[tuple[int, ...], list[str]] = {}
        for net in nets.NETS:
            with contextlib.suppress(AezooError):  # a network that does not take the shape
                by_dims.setdefault(nets.default_hidden_dims(net, shape, own.get(net)), []).append(net)
        print("Default hidden_dims: " + "; ".join(f"{', '.join(of)} {dims}" for dims, of in by_dims.items()))


def _recipes(argv: list[str]) -> None:
    _parser("recipes", "Ready-made configurations: aezoo fit -c NAME.").parse_args(argv)
    rows = []
    for name, path in recipes().items():
        head = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        reached = next((line for line in head if line.startswith("reached:")), "")
        rows.append((name, head[0] if head else "", reached))
    _table(rows)


def _cp(argv: list[str]) -> None:
    parser = _parser("cp", "Copy a recipe, to change it and train with aezoo fit -c FILE.")
    parser.add_argument("recipe", help="a name of `aezoo recipes`")
    parser.add_argument("dest", help="a file or an existing folder")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    arguments = parser.parse_args(argv)
    source, dest = find_recipe(arguments.recipe), Path(arguments.dest)
    if dest.is_dir():
        dest = dest / source.name
    if dest.exists() and not arguments.force:
        raise AezooError(f"{dest} exists: choose another name, or replace it with --force")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, dest)
    except OSError as error:
        raise AezooError(f"cannot write {dest}: {error.strerror}") from error
    print(f"{dest}\nchange it, then: aezoo fit -c {shlex.quote(str(dest))}")


def _import(argv: list[str]) -> None:
    parser = _parser("import", "Read a model that another library has written and save it as a model of aezoo.")
    parser.add_argument("source", help="a file, a folder, or hf://owner/name[/path][@revision]")
    parser.add_argument("out", nargs="?", help="the folder to write; by default imported/ and the name of the source")
    parser.add_argument("--force", action="store_true", help="replace a saved model")
    arguments = parser.parse_args(argv)
    from aezoo.io import checkpoint, hub_files, importers
    from aezoo.security import archives

    last = arguments.source.removeprefix(hub_files.SCHEME).partition("@")[0].rstrip("/")
    out = Path(
        arguments.out or Path("imported") / archives.safe_name(last if last != arguments.source else Path(last).stem)
    )
    if any((out / name).exists() for name in (checkpoint.CONFIG, checkpoint.WEIGHTS)) and not arguments.force:
        raise AezooError(f"{out} contains a saved model: choose another folder, or replace it with --force")
    imported = importers.import_model(arguments.source)
    model = imported.model
    checkpoint.save_model(model, out)
    print(f"found {imported.found}", *imported.notes, sep="\n  ")
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {registry.name_of(type(model))}, input shape {model.input_shape}, {size:,} parameters")
    print(f"use it: aezoo embed --ckpt_path {shlex.quote(str(out))} --input FILE, or aezoo.load_model({str(out)!r})")


def _benchmark(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: aezoo benchmark NAME ...        each has a --help of its own\n")
        _table([(f"  {name}", text) for name, text in BENCHMARKS.items()])
        return
    name, *rest = argv
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise AezooError(f"unknown benchmark {name!r}{hint} See `aezoo benchmark`.")
    here = Path(__file__).parent.parent
    package = "aezoo.benchmarks"  # where the wheel has them
    if not (here / "benchmarks").is_dir():
        package = "benchmarks"
        sys.path.insert(0, str(here.parent))
    if code := importlib.import_module(f"{package}.{name}").main(rest):
        sys.exit(code)
