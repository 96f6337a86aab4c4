"""explore: its page in Chromium shows the numbers that models give in Python, from any file server."""

import contextlib
import json
import socket
import tarfile
import threading
import urllib.request

import numpy as np
import pytest
import torch
from refusals import refused_in_one_line as refused

import aezoo
from aezoo.cli import explore as command
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.io import onnxruntime_web
from aezoo.tasks import explore as task
from aezoo.tasks.explore import Subject
from aezoo.tasks.samples import SampleSet
from aezoo.training.data_units import DataUnits
from tests import site_check

slow = pytest.mark.slow
# relative to the largest number, above float32 rounding
TOLERANCE = 1e-4
IS_IDLE = """() => window.explorer?.cards.length > 0 && explorer.cards.every(card =>
  card.x_hat && [card.inputChanged, card.codeChanged, card.gridChanged].every(run => run.isIdle()))"""
PIXELS = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"


@contextlib.contextmanager
def served(folder):
    with command.server(folder) as serving:
        threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{serving.server_port}"
        finally:
            serving.shutdown()


def answer(address, host=None):
    request = urllib.request.Request(address, headers={} if host is None else {"Host": host})
    return urllib.request.urlopen(request, timeout=10)


# ---- refusals, the server, the runtime -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "other", "message"),
    [
        ((6,), (6,), "one takes samples of 6: use aezoo embed"),
        ((2, 8, 8), (2, 8, 8), "one takes samples of 2x8x8"),
        ((1, 8, 8), (1, 4, 4), "other takes 1x4x4 and one 1x8x8: models on one page must take the same shape"),
    ],
)
def test_models_that_no_page_can_show_are_refused(tmp_path, shape, other, message):
    models = [aezoo.create_model("dense_ae", size, hidden_dims=(), latent_dim=2) for size in (shape, other)]
    with pytest.raises(AezooError, match=message):
        task.explore([Subject("one", models[0]), Subject("other", models[1])], out=tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_data_without_a_known_white_are_refused(tmp_path):
    model = aezoo.create_model("dense_ae", (1, 8, 8), hidden_dims=(), latent_dim=2)
    model.data_units = DataUnits({"offset": torch.zeros(()), "factor": torch.ones(())})
    with pytest.raises(AezooError, match="one does not say which value is white"):
        task.explore([Subject("one", model)], out=tmp_path / "page")


def test_command_refuses_impossible_flags(capsys):
    assert "give runs or tags" in refused(capsys, "explore", "--serve", "false")
    assert "port takes a number from 0" in refused(capsys, "explore", "vae.mnist_2d", "--port", "70000")
    assert "seed takes a number from 0" in refused(capsys, "explore", "vae.mnist_2d", "--seed", "-1")
    assert "unknown flag --prot, did you mean --port?" in refused(capsys, "explore", "vae.mnist_2d", "--prot", "1")


def test_server_gives_types_that_browsers_run(tmp_path):
    for name in ("a.wasm", "a.mjs", "a.js", "index.html"):
        (tmp_path / name).write_text("x")
    with served(tmp_path) as address:
        types = [answer(f"{address}/{name}").headers["Content-Type"] for name in ("a.wasm", "a.mjs", "a.js", "")]
        assert types == ["application/wasm", "text/javascript", "text/javascript", "text/html"]
        with pytest.raises(urllib.error.HTTPError, match="403"):
            answer(f"{address}/index.html", host="elsewhere.example")
        port = int(address.rpartition(":")[2])
        with pytest.raises(AezooError, match=f"cannot serve on port {port}"), command.server(tmp_path, port):
            pass


def test_server_prints_nothing_if_browsers_disconnect(tmp_path, capfd):
    (tmp_path / "large.bin").write_bytes(bytes(2**23))
    with served(tmp_path) as address:
        port = int(address.rpartition(":")[2])
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(f"GET /large.bin HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
                client.recv(100)
        assert answer(f"{address}/large.bin").read(1) == b"\0"
    assert capfd.readouterr().err == ""


def test_runtime_is_read_from_package_folder_and_cache(tmp_path, monkeypatch):
    dist = tmp_path / "package" / "dist"
    dist.mkdir(parents=True)
    for name in onnxruntime_web.FILES:
        (dist / name).write_bytes(name.encode())
    with tarfile.open(tmp_path / "packed.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    wanted = {name: name.encode() for name in onnxruntime_web.FILES}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for given in (dist, dist.parent, tmp_path / "packed.tgz"):
        assert onnxruntime_web.locate(given) == wanted
    onnxruntime_web.cache_folder().parent.mkdir(parents=True)
    dist.rename(onnxruntime_web.cache_folder())
    assert onnxruntime_web.locate() == wanted


def test_missing_runtime_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AezooError, match=r"npm is not installed: run `npm pack .*--runtime FILE\.tgz"):
        onnxruntime_web.locate()
    (tmp_path / "other.tgz").write_bytes(b"no archive")
    with tarfile.open(tmp_path / "empty.tgz", "w:gz"):
        pass
    for name in ("other.tgz", "empty.tgz", "none.tgz"):
        with pytest.raises(AezooError, match=f"{name} does not contain ort"):
            onnxruntime_web.locate(tmp_path / name)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'no network' >&2; exit 1\n")
    npm.chmod(0o755)
    with pytest.raises(AezooError, match=r"npm cannot download onnxruntime-web \(no network\)"):
        onnxruntime_web.locate()


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a `page` for two tags and a model of scaled images without samples."""
    if site_check.chromium() is None:
        pytest.skip("there is no Chromium here")
    try:
        onnxruntime_web.locate()
    except AezooError as error:
        pytest.skip(str(error))
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", (1, 28, 28), likelihood="gaussian", hidden_dims=(16,), latent_dim=5)
    scaling = {"offset": torch.tensor(33.0, dtype=torch.double), "factor": torch.tensor(79.0, dtype=torch.double)}
    model.data_units = DataUnits(scaling, white=255)
    aezoo.save_model(model, home / "<b>odd")
    models = ["vae.mnist_2d", "vq_vae.mnist", str(home / "<b>odd")]
    main(["explore", *models, "--out", str(home / "page"), "--serve", "false"])
    return home


@pytest.fixture(scope="module")
def chrome(home):
    with served(home) as address, site_check.browser() as browser:
        yield browser, f"{address}/page/"


@pytest.fixture
def page(chrome):
    """The loaded page in Chromium; asserts at the end that there were no errors or requests to other hosts."""
    yield from opened(*chrome)


def opened(browser, address, wrong=None, before=lambda page: None, **settings):
    wrong = [] if wrong is None else wrong
    page = browser.new_context(viewport={"width": 1280, "height": 1000}, **settings).new_page()
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request", lambda request: wrong.append(request.url) if not request.url.startswith((address, "data:")) else None
    )
    before(page)
    page.goto(address)
    settled(page)
    yield page
    page.context.close()
    assert wrong == []


def waited_for(page, condition):
    """Wait by polling: the page's content security policy forbids Playwright's way."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(page.inner_text("body")[:500])


def settled(page):
    """Wait until each card shows the results of the current image and its code."""
    waited_for(page, IS_IDLE)


def numbers(page, card, name):
    return np.array(page.evaluate(f"[...explorer.cards[{card}].{name}]"), np.float64)


def close(found, expected):
    expected = expected.detach().double().flatten().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


def picture(page, part, card=0):
    """The pixels of a canvas of a card."""
    return page.locator(f".card >> nth={card}").locator(f"[data-part={part}]").evaluate(PIXELS)


@slow
def test_folder_contains_all_files_that_the_page_reads(home):
    page = home / "page"
    manifest = json.loads((page / "manifest.json").read_text())
    assert [model["label"] for model in manifest["models"]] == ["vae.mnist_2d", "vq_vae.mnist", str(home / "<b>odd")]
    assert [model["set"] for model in manifest["models"]] == [0, 0, None]
    (samples,) = manifest["sets"]
    assert (samples["name"], samples["train"]["n"], samples["test"]["n"]) == ("mnist5k", 1000, 60)
    train = np.fromfile(page / samples["train"]["file"], np.uint8).reshape(-1, 1, 28, 28)
    codes = np.fromfile(page / "models/0/codes.bin", "<f4").reshape(1000, 2)
    with torch.no_grad():
        close(codes.flatten(), aezoo.load_model("vae.mnist_2d").encode(torch.from_numpy(train).float() / 255))
    # the labels are those of the same samples
    module = aezoo.DataModule("mnist5k")
    x, y = module.tensors("train")
    assert x.dtype == torch.float32
    shown = torch.from_numpy(train[:20]).float() / 255
    rows = (x.unsqueeze(0) == shown.unsqueeze(1)).flatten(2).all(2).int().argmax(1)
    assert y[rows].tolist() == samples["train_labels"][:20]
    assert {path.name for path in (page / "runtime").iterdir()} == {*onnxruntime_web.FILES}
    assert not [*page.rglob("README.md")] and not [*page.rglob(".tmp*")]


@slow
def test_page_gives_the_numbers_of_the_models(page, home):
    pixels = (np.random.default_rng(3).random(784) ** 3 * 255).round().astype(np.uint8)
    page.evaluate("p => explorer.setInput(p.map(x => x / 255))", pixels.tolist())
    settled(page)
    x = torch.from_numpy(pixels).float().reshape(1, 1, 28, 28) / 255
    for card, path in enumerate(["vae.mnist_2d", "vq_vae.mnist", home / "<b>odd"]):
        model = aezoo.load_model(path).eval()
        scaled = x if card < 2 else ((x.double() * 255 - 33) / 79).float()
        with torch.no_grad():
            x_hat = model(scaled)
            close(numbers(page, card, "zOfInput"), model.encode(scaled))
            close(numbers(page, card, "x_hat"), x_hat if card < 2 else (x_hat.double() * 79 + 33) / 255)
            close(np.array([page.evaluate(f"explorer.cards[{card}].score")]), model.anomaly_score(scaled))
    about = page.evaluate("explorer.cards.map(card => card.parts.verified.textContent)")
    assert all(text.startswith("✓ Checked here") for text in about)


@slow
def test_dragging_in_the_plane_changes_the_picture(page):
    plane = page.locator("[data-part=plane]").first
    plane.scroll_into_view_if_needed()
    box, before = plane.bounding_box(), picture(page, "decoded")
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.3, steps=5)
    page.mouse.up()
    settled(page)
    z = numbers(page, 0, "z")
    at = page.evaluate("(c => c.range.map(([low, high], k) => (c.z[k] - low) / (high - low)))(explorer.cards[0])")
    assert at == pytest.approx([0.9, 0.7], abs=0.01)
    moved = picture(page, "decoded")
    assert moved != before
    with torch.no_grad():
        expected = aezoo.load_model("vae.mnist_2d").decode(torch.from_numpy(z).float()[None])
    close(numbers(page, 0, "decoded"), expected)
    assert np.abs(np.array(moved)[::4] - 255 * expected.numpy().flatten()).max() < 1
    # also by the keyboard and by a slider
    plane.focus()
    page.keyboard.press("ArrowUp")
    settled(page)
    assert numbers(page, 0, "z")[1] > z[1] and picture(page, "decoded") != moved
    slider = page.locator("[data-part=sliders] input").first
    slider.focus()
    page.keyboard.press("Home")
    settled(page)
    assert page.evaluate("(c => c.z[c.sliders[0].d] === c.model.low[c.sliders[0].d])(explorer.cards[0])")
    page.get_by_role("button", name="Mean code").first.click()
    close(numbers(page, 0, "z"), torch.from_numpy(numbers(page, 0, "model.mean")))


@slow
def test_drawing_noise_and_files_reach_the_models(page, tmp_path):
    from PIL import Image

    page.get_by_role("button", name="Blank canvas").click()
    settled(page)
    blank, canvas = numbers(page, 0, "x_hat"), page.locator("#canvas")
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 40, steps=8)
    page.mouse.up()
    settled(page)
    drawn = np.array(page.evaluate("[...explorer.input.pixels]")).reshape(28, 28)
    assert drawn[8:20, 13:15].min() > 0.9 and drawn[:, :9].max() == 0
    assert np.abs(numbers(page, 0, "x_hat") - blank).max() > 0.3
    assert page.locator("[data-part=nearest]").first.inner_text().startswith("1")  # a bar looks like a one
    page.locator("#noise").focus()
    page.keyboard.press("End")
    settled(page)
    assert np.abs(np.array(page.evaluate("[...explorer.input.pixels]")).reshape(28, 28) - drawn).mean() > 0.2
    assert "before" in page.locator("[data-part=errors]").first.inner_text()
    pixels = np.zeros((56, 56), np.uint8)
    pixels[:, 28:] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    page.locator("#file").set_input_files(tmp_path / "half.png")
    waited_for(page, "explorer.input.clean[27] === 1 && explorer.input.clean[0] === 0")
    given = np.array(page.evaluate("[...explorer.input.clean]")).reshape(28, 28)
    assert given[:, :13].max() == 0 and given[:, 15:].min() == 1
    page.locator("#invert").check()
    waited_for(page, "explorer.input.clean[27] === 0")
    assert np.allclose(np.array(page.evaluate("[...explorer.input.clean]")).reshape(28, 28), 1 - given, atol=0.01)


@slow
def test_missing_parts_are_explained_and_names_are_escaped(page, home):
    cards = page.locator(".card")
    assert cards.nth(2).locator("h2").inner_text() == str(home / "<b>odd") and page.locator("b").count() == 0
    assert "The range of codes is unknown" in cards.nth(2).inner_text()
    assert "no threshold" in cards.nth(2).inner_text()
    assert "codebook's entries" in cards.nth(1).inner_text()
    assert (
        not cards.nth(1).locator("[data-part=walk]").is_visible()
        and cards.nth(0).locator("[data-part=walk]").is_visible()
    )
    page.get_by_label("model 3").select_option("none")
    waited_for(page, "explorer.cards.length === 2")
    assert cards.count() == 2 and page.url.endswith("?model=vae.mnist_2d&model=vq_vae.mnist")


@slow
def test_page_fits_phones_and_is_dark_where_wanted(chrome):
    for page in opened(*chrome, color_scheme="dark"):
        page.set_viewport_size({"width": 390, "height": 800})
        waited_for(page, site_check.AS_WIDE_AS_SCREEN)
        background, text = page.evaluate(site_check.BRIGHTNESS)
        assert background < 0.2 and text > 0.8


@slow
def test_page_warns_of_numbers_that_are_not_the_models(chrome, home):
    wrong = bytearray((home / "page/models/0/check.bin").read_bytes())
    wrong[:4] = np.float32(np.frombuffer(wrong[:4], "<f4")[0] + 2e-4).tobytes()

    def replace(page):
        page.route("**/models/0/check.bin", lambda route: route.fulfill(body=bytes(wrong)))

    for page in opened(*chrome, before=replace):
        assert "Do not trust this card" in page.locator(".card").nth(0).inner_text()
        assert "✓ Checked here" in page.locator(".card").nth(1).inner_text()


@slow
def test_run_shows_its_own_samples_and_threshold(tmp_path, monkeypatch):
    """With the data recorded in a run, and without npm."""
    x = (np.random.default_rng(0).random((60, 1, 8, 8)) * 255).astype(np.uint8)
    np.savez(tmp_path / "data.npz", x=x, y=np.array(["cat", "dog"])[np.arange(60) % 2])
    flags = ["--data", str(tmp_path / "data.npz"), "--trainer.max_epochs", "1", "--data.binarise", "threshold"]
    main(["fit", "--model", "vae", *flags, "--trainer.default_root_dir", str(tmp_path / "runs")])
    (run,) = (path.parent for path in (tmp_path / "runs").rglob("config.yaml"))
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    for name in onnxruntime_web.FILES:
        (runtime / name).write_bytes(b"")
    main(["explore", str(run), "--serve", "false", "--out", str(tmp_path / "page"), "--runtime", str(runtime)])
    manifest = json.loads((tmp_path / "page/manifest.json").read_text())
    (model,), (samples,) = manifest["models"], manifest["sets"]
    assert model["is_binary"] and model["threshold"] > 0 and "held-out samples" in model["calibration"]
    assert samples["classes"] == ["cat", "dog"] and samples["name"] == "data.npz"
    assert {*np.fromfile(tmp_path / "page" / samples["test"]["file"], np.uint8)} == {0, 255}


def test_samples_become_bytes_in_which_255_is_white(tmp_path):
    model = aezoo.create_model("dense_ae", (1, 2, 2), likelihood="gaussian", hidden_dims=(), latent_dim=2)
    model.data_units = DataUnits({"offset": torch.tensor(10.0), "factor": torch.tensor(5.0)}, white=255)
    values = torch.tensor([0.0, 100.0, 255.0, 300.0]).reshape(1, 1, 2, 2)
    samples = SampleSet.from_data((values - 10) / 5)
    files = task._Files(tmp_path)
    sets = task._Sets(files, 0)
    assert sets.add(Subject("one", model, test=samples)) == 0
    assert np.fromfile(files.written[0], np.uint8).tolist() == [0, 100, 255, 255]
    assert sets.add(Subject("other", model, test=samples)) == 0 and len(files.written) == 1
