"""Reports of runs, made only from the files in their folders."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_runs import HOSTILE, overfitted, write_csv, write_metrics, write_picture, write_run

from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.report import charts, runs, write_report
from aezoo.report.explain import explain
from aezoo.report.markup import text
from aezoo.report.runs import read_run

TAGS = {
    "html", "head", "meta", "title", "link", "style", "body", "header", "footer", "main", "nav", "section", "h1", "h2",
    "h3", "p", "ul", "li", "a", "b", "div", "span", "pre", "table", "thead", "tbody", "tr", "th", "td", "figure",
    "figcaption", "img", "svg", "g", "path", "circle", "text", "details", "summary",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "name", "content", "http-equiv", "rel", "href", "id", "class", "src", "alt", "scope", "viewbox",
    "role", "aria-label", "aria-hidden", "d", "x", "y", "cx", "cy", "r", "width", "height", "text-anchor",
}  # fmt: skip
VOID = {"meta", "link", "img", "path", "circle"}


class Page(HTMLParser):
    """A page's tags, addresses and text; tags that are not closed in order fail."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.addresses, self.words, self._open = [], [], [], []
        self.feed(Path(path).read_text("utf-8"))
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "vae" / "0")


# ---- report of one run -----------------------------------------------------------------------------------------------


def test_report_contains_the_figures_of_the_run_folder(run):
    text = Page(write_report(run)).text
    train, val = overfitted()
    best = val.index(min(val))
    for words in (
        "vae on mnist5k", "vae/0 · started 2026-12-02 00:56 UTC, finished", "aezoo fit --model vae",
        f"val/loss, nats per sample {min(val):.4g} epoch {best + 1} of 30, the best",
        "test/loss, nats per sample 101.2",
        f"loss {train[best]:.4g} {min(val):.4g} {train[-1]:.4g} {val[-1]:.4g} 101.2 nats per sample",
        "overfitting", "Worse than PCA of the same size",
        "deviance 201.1", "scores.csv: the first 5 of 500 rows", "model.latent_dim 16",
        "training samples/s, median of the epochs 5,015",
        "time of the fit 1 min 30 s", "time of an epoch, with validation and files 3.02 s",
        "844,896", "1 × 28 × 28",
        "a processor", "seed 0",
    ):  # fmt: skip
        assert words in text, words


def test_page_loads_nothing_and_has_no_script(run):
    page = Page(write_report(run))
    assert {tag for tag, _ in page.tags} <= TAGS
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert sum(address.startswith("data:image/png;base64,") for address in page.addresses) == 2
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {address[1:] for address in page.addresses if address.startswith("#")} == ids
    policy = next(attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    style = (run / "report.html").read_text("utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


def test_settings_that_are_not_defaults_are_marked(run):
    source = write_report(run).read_text("utf-8")
    changed = re.findall(r"<span class=changed>(.*?)</span>", source)
    assert changed == ["[400, 200]"]  # chosen by default for this network
    write_run(run, latent_dim=3, lr=1e-3, likelihood="bernoulli", weight_decay=0.0)
    changed = re.findall(r"<span class=changed>(.*?)</span>", write_report(run).read_text("utf-8"))
    assert changed == ["3", "[400, 200]"]


def test_text_from_outside_is_escaped(tmp_path):
    run = write_run(tmp_path / "<b>run" / "0", model=HOSTILE, latent_dim=HOSTILE)
    write_csv(run / f"<i>{HOSTILE.replace('/', '_')}" / "table.csv", [{HOSTILE: HOSTILE, "x": 1}])
    write_picture(run / "pictures" / f"{HOSTILE.replace('/', '_')}.png")
    rows = [{"epoch": i, f"val/{HOSTILE}": i, "train/loss": 1} for i in range(3)]
    write_csv(run / "metrics.csv", rows)
    record = {"fits": [{"started": HOSTILE, "environment": {HOSTILE: HOSTILE}}], "model": {HOSTILE: HOSTILE}}
    (run / "run.json").write_text(json.dumps(record))
    page = Page(write_report(run))
    assert {tag for tag, _ in page.tags} <= TAGS
    assert {name for _, attrs in page.tags for name in attrs} <= ATTRIBUTES
    assert page.text.count("alert('x')") >= 8 and "\u202e" not in (run / "report.html").read_text("utf-8")
    write_run(tmp_path / "other" / "1", latent_dim=HOSTILE * 2)
    both = Page(write_report([run, tmp_path / "other" / "1"], tmp_path / "both.html"))
    assert {tag for tag, _ in both.tags} <= TAGS and both.text.count("alert('x')") >= 8


def test_characters_that_cannot_be_shown_are_replaced():
    # undecodable bytes of a file name, a text direction mark, and control characters
    assert text("a\udcffb\u202ec\x1bd\r") == "a\ufffdb\ufffdc\ufffdd\ufffd"
    assert text("a\tb\n<&\"'") == "a b &lt;&amp;&quot;&#x27;"


def test_pictures_are_embedded_within_limits(run, monkeypatch):
    (run / "pictures" / "drawing.png").write_text("<svg onload='alert(1)'/>")
    (run / "pictures" / "link.png").symlink_to(run / "config.yaml")
    monkeypatch.setattr("aezoo.report.page._MAX_PICTURE", 2**13)
    with (run / "pictures" / "reconstructions.png").open("ab") as file:
        file.write(bytes(2**13))
    page = Page(write_report(run))
    assert [attrs["alt"] for tag, attrs in page.tags if tag == "img"] == ["anomalies"]
    assert "reconstructions: 0.0 MiB, in vae/0/pictures" in page.text and "drawing" not in page.text


# ---- the generalisation gap ------------------------------------------------------------------------------------------

FALLING = [100 - 3 * i for i in range(20)]
GAPS = {
    "none": (FALLING, [loss - 1 for loss in FALLING], "there is no generalisation gap"),
    "small": (FALLING, [loss + 1 for loss in FALLING], "a small generalisation gap of 1, 1.8% of the decrease"),
    "large": (FALLING, [loss + 10 for loss in FALLING], "a generalisation gap of 10, 17.5% of the decrease"),
    "level": ([5.0] * 9, [6.0] * 9, "gap of 1; training loss has not fallen since epoch 1"),
    "grown": (*overfitted(), "In the 13 epochs after it, training loss fell by"),
    "no validation": (FALLING, [None] * 20, "no losses of validation samples"),
    "diverged": ([math.nan] * 3, [math.nan] * 3, "the training has diverged"),
    "infinite": ([1.0, math.inf, 0.5], [2.0, math.inf, 1.5], "At the best epoch, 3, validation loss is 1.5"),
}


@pytest.mark.parametrize(("train", "val", "words"), GAPS.values(), ids=GAPS)
def test_generalisation_gap_is_explained_by_numbers(tmp_path, train, val, words):
    write_metrics(tmp_path, train, val)
    assert any(words in line for line in explain(read_run(tmp_path, "run"))), explain(read_run(tmp_path, "run"))
    write_report(tmp_path)


def test_gap_at_the_end_is_the_difference_of_the_losses(tmp_path):
    train, val = overfitted()
    write_metrics(tmp_path, train, val)
    run, best = read_run(tmp_path, "run"), val.index(min(val))
    line = next(line for line in explain(run) if line.startswith("In the"))
    assert f"fell by {train[best] - train[-1]:.4g}, and validation loss is {val[-1] - val[best]:.4g} higher" in line
    assert f"the gap grew to {val[-1] - train[-1]:.4g}" in line


# ---- several runs ----------------------------------------------------------------------------------------------------


def test_comparison_shows_only_settings_that_differ(tmp_path):
    for i, settings in enumerate([{}, {"lr": 0.01}, {"beta": 4.0}]):
        write_run(tmp_path / "runs" / str(i), **settings)
    page = Page(write_report([tmp_path / "runs"], tmp_path / "three.html"))
    settings = page.text.partition("Only the settings that differ")[2].partition("Time and environment")[0]
    assert re.findall(r"\bmodel\.\w+", settings) == ["model.lr", "model.beta"]
    assert "model.lr 0.001 (default) 0.01 0.001 (default)" in settings and "model.beta – – 4.0" in settings
    assert "Comparison of 3 runs" in page.text and "likelihood" not in page.text
    # settings missing in a config are not shown as different
    (tmp_path / "runs" / "0" / "config.yaml").write_text("model: {class_path: vae, init_args: {lr: 0.001}}\n")
    page = Page(write_report([tmp_path / "runs"], tmp_path / "three.html"))
    settings = page.text.partition("Only the settings that differ")[2].partition("Time and environment")[0]
    assert re.findall(r"\b(?:model|data|trainer)\.\w+", settings) == [
        "model.lr", "model.latent_dim", "model.hidden_dims", "model.beta",
    ]  # fmt: skip


def test_comparison_reports_losses_that_cannot_be_compared(tmp_path):
    first, second = (write_run(tmp_path / name / "0") for name in "ab")
    write_run(second, likelihood="gaussian")
    text = Page(write_report([first, second], tmp_path / "two.html")).text
    assert "different likelihoods, so their losses are not comparable" in text
    (second / "config.yaml").write_text("data: {name: digits}\n")
    text = Page(write_report([first, second], tmp_path / "two.html")).text
    assert "different data, so their figures are not comparable" in text


def test_runs_are_named_apart(tmp_path):
    folders = [write_run(tmp_path / home / "vae" / "0") for home in "ab"]
    assert [run.label for run in runs.find_runs(folders)] == list(map(str, folders))
    assert [run.label for run in runs.find_runs([folders[0], folders[0] / "metrics.csv"])] == ["vae/0"]


# ---- incomplete runs -------------------------------------------------------------------------------------------------


def test_killed_run_has_a_report(run):
    (run / "run.json").unlink()
    with (run / "metrics.csv").open("a") as file:
        file.write("30,19\n31,2016,100.0,5031,1.0,0.0")
    text = Page(write_report(run)).text
    assert "stopped before its end, or still running" in text and "epoch 17 of 30, the best" in text


def test_run_of_another_layout_is_read(tmp_path):
    # as Lightning's own CSVLogger writes it: YAML tuples, and separate lines for steps, epochs and validation
    (tmp_path / "hparams.yaml").write_text("latent_dim: 8\nhidden_dims: !!python/tuple\n- 4\n- 2\n_hidden: 1\n")
    lines = [
        "epoch,step,train/loss_step,train/loss_epoch,val/loss",
        "0,1,9,,",
        "0,2,,8,",
        "0,2,,,7",
        "1,4,,6,",
        "1,4,,,5",
        "",
    ]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    run = read_run(tmp_path, "run")
    assert run.settings == {"model.latent_dim": 8, "model.hidden_dims": [4, 2]}
    assert run.metrics["train/loss"] == [8, 6] and run.metrics["val/loss"] == [7, 5] and run.epochs == [1, 2]
    assert "validation loss is 5 and training loss 6" in Page(write_report(tmp_path)).text
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"epoch": -1, "val/loss": 9}\n{"epoch": 0, "val/loss": 4}\n{"epo')
    assert read_run(tmp_path, "run").metrics["val/loss"] == [4]


BROKEN = {
    "config.yaml": ["", "a: [", "- 1", "a: &a [*a]", "model: {class_path: {}}", "model: {class_path: x, init_args: 3}"],
    "metrics.csv": ["", "epoch", "epoch\nx\n1e99\nnan\n-1\n", f"epoch,val/loss\n0,{'9' * 200_000}", "epoch,a\n0,1,2,3"],
    "run.json": ["", "[]", '{"fits": {}, "curves": [], "model": 3}', "[" * 10**5,
                 '{"fits": [{"seconds": "x", "environment": [], "epochs": null}, 3], "curves": {"decoded": [1, "x"]}}'],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name in BROKEN for text in BROKEN[name]])
def test_damaged_file_does_not_prevent_the_report(run, name, text):
    (run / name).write_text(text)
    assert "deviance" in Page(write_report(run)).text


def test_folder_without_a_file_of_epochs_has_a_report(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {class_path: vae}\n")
    text = Page(write_report(tmp_path)).text
    assert "No epoch has ended" in text and "no metrics.csv with an epoch: there are no curves" in text


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_steep_start_does_not_set_the_axis():
    y = [1e6, *[5 - i / 50 for i in range(99)]]
    svg, cut = charts.chart([charts.Line(range(1, 101), y, "c0", "loss")], "loss")
    assert cut and ">4.5</text>" in svg and "000,000" not in svg
    svg, cut = charts.chart([charts.Line(range(1, 101), [*y[1:], 3.0], "c0", "loss")], "loss")
    assert not cut


VALUES = (
    [1.0], [2.0, 2.0], [0, 0], [1e299, -1e299], [math.nan, 3, math.inf], [5e-324, 0], [1e15, 1e15 + 1],
)  # fmt: skip


@pytest.mark.parametrize("y", VALUES, ids=str)
def test_curve_of_any_values_is_drawn(y):
    svg, _ = charts.chart([charts.Line(range(1, len(y) + 1), y, "c0", "x", marked=0, label="1")], "x")
    path = re.search(r'<g class="c0"><title>x</title><path d="(.*?)"', svg)
    assert path and all(math.isfinite(float(word)) for word in re.findall(r"-?[\d.]+|nan|inf", path[1]))


def test_long_curve_keeps_few_points_and_its_last():
    y = [math.sin(i) for i in range(20_000)]
    svg, _ = charts.chart([charts.Line(range(1, 20_001), y, "c0", "x")], "x")
    assert len(svg) < 20_000


@pytest.mark.parametrize(
    ("known", "n", "pieces"),
    [
        (range(0, 101, 10), 101, 1),
        # the first of 20 epochs, the even ones and the last
        ([0, *range(1, 20, 2)], 20, 1),
        ([*range(5), *range(8, 12), *range(14, 20)], 20, 3),
    ],
    ids=["every tenth", "every second", "two gaps"],
)
def test_validation_every_few_epochs_is_a_line_not_dots(known, n, pieces):
    y = [float(i) if i in known else math.nan for i in range(n)]
    svg, _ = charts.chart([charts.Line(range(n), y, "c0", "x")], "x")
    assert re.search(r'<path d="(M[^"]*)"/></g>', svg)[1].count("M") == pieces


def test_no_finite_value_gives_no_chart():
    for value in (math.nan, math.inf, 1e305):
        assert charts.chart([charts.Line([1], [value], "c0", "x")], "x") == ("", False)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command_writes_into_the_run_or_the_working_folder(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent.parent)
    main(["report", "vae/0"])
    assert capsys.readouterr().out == "vae/0/report.html\n" and (run / "report.html").is_file()
    write_run(run.parent / "1")
    main(["report", "vae/0", "vae/1"])
    main(["report", "vae/1/metrics.csv", "--out", "new/folder/one.html"])
    assert capsys.readouterr().out == "report.html\nnew/folder/one.html\n"
    assert Page("report.html").text.startswith("Comparison of 2 runs")
    assert Page("new/folder/one.html").text.startswith("vae on mnist5k")
    assert not list(Path().rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["none"], "none does not exist: give the folder of a run, such as runs/vae/0"),
        (["empty"], "empty is not a run and contains none: give the folder of a run, such as runs/vae/0"),
        (["empty/file"], "empty/file is not a run and contains none"),
        (["vae/0", "--out", "empty/file/x.html"], "cannot write empty/file/x.html: "),
        (["vae/0", "--out", "empty"], "cannot write empty: Is a directory; give another file with --out"),
        (["many"], "21 runs are too many to compare in one report: give at most 20"),
    ],
)
def test_mistake_is_one_line(run, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(run.parent.parent)
    Path("empty").mkdir()
    Path("empty/file").touch()
    for i in range(21):
        Path(f"many/{i}/checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit, match="2"):
        main(["report", *arguments])
    error = capsys.readouterr().err
    assert error.startswith(f"aezoo: {line}") and error.count("\n") == 1
    assert not list(Path().rglob(".tmp-*"))


def test_no_run_is_refused():
    with pytest.raises(AezooError, match="which run"):
        write_report([])
