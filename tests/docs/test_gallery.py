"""The gallery: traversals of pretrained weights change one dimension per row."""

import importlib.util
import io
from pathlib import Path

import pytest
import torch
from PIL import Image

import aezoo
from aezoo.training.data_statistics import DataStatistics

HOOKS = Path(__file__).parents[2] / "docs" / "hooks"
spec = importlib.util.spec_from_file_location("gallery", HOOKS / "gallery.py")
gallery = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gallery)


def with_codes(codes, **settings):
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", (1, 4, 4), latent_dim=codes.shape[1], hidden_dims=(), **settings).eval()
    model.data_statistics = DataStatistics(codes)
    return model


def test_rows_move_one_number_and_are_sorted_by_effect():
    codes = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 3.0, 1.0])
    model = with_codes(codes)
    rows = gallery.traversals(model)
    assert rows.shape == (3, gallery.STEPS, 1, 4, 4)
    change = (rows[:, 0] - rows[:, -1]).square().flatten(1).sum(1)
    assert change.tolist() == sorted(change.tolist(), reverse=True)
    # the middle of a row is close to the sample that all rows start from
    start = codes[(codes - codes.mean(0)).square().sum(1).argmin()]
    expected = start.repeat(gallery.STEPS, 1)
    expected[:, 1] = torch.linspace(*(float(codes[:, 1].quantile(q)) for q in (0.01, 0.99)), gallery.STEPS)
    with torch.no_grad():
        torch.testing.assert_close(rows[0], model.decode(expected))


@pytest.mark.parametrize(("name", "shape"), [("dense_ae", (1, 4, 4)), ("vae", (6,)), ("vq_vae", (1, 8, 8))])
def test_models_without_codes_images_or_vectors_have_none(name, shape):
    assert gallery.traversals(aezoo.create_model(name, shape).eval()) is None


def test_prior_samples_replace_missing_codes():
    rows = gallery.traversals(aezoo.create_model("vae", (3, 8, 8), latent_dim=20).eval())
    assert rows.shape == (gallery.ROWS, gallery.STEPS, 3, 8, 8)


def test_picture_has_the_given_rows_and_columns():
    rows = torch.zeros(2, 3, 3, 4, 5)
    rows[1, 2, 0] = 2.0
    image = Image.open(io.BytesIO(gallery.picture(rows)))
    zoom, gap = gallery._ZOOM, gallery._GAP
    assert image.size == (zoom * (3 * (5 + gap) - gap), zoom * (2 * (4 + gap) - gap))
    assert image.getpixel((0, 0)) == (0, 0, 0) and image.getpixel((zoom * 5, 0)) == (255, 255, 255)
    assert image.getpixel((image.width - 1, image.height - 1)) == (255, 0, 0)


def test_page_shows_each_weights_once():
    page = gallery.page(["vae.mnist", "vq_vae.mnist"], {"vae.mnist"}, with_explorer=False)
    assert page.count("(weights/vae.mnist.png)") == page.count("(weights/vq_vae.mnist.png)") == 1
    assert page.count("traversal.png") == 1 and "(weights/vae.mnist.traversal.png)" in page


def test_page_embeds_the_explorer_where_there_is_one():
    without, page = (gallery.page(["vae.mnist"], (), with_explorer=flag) for flag in (False, True))
    assert "explorer" not in without
    assert 'src="explorer/index.html?model=' in page and "(explorer/index.html?model=vae.mnist)" in page
