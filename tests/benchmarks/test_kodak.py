"""Compression of photographs: BD-rates of known curves, and points of a model and of image formats."""

import numpy as np
import pytest
from PIL import Image

from aezoo.errors import AezooError
from benchmarks import kodak, report
from benchmarks.common import read_csv

CURVE = [(0.1, 25.0), (0.2, 28.0), (0.5, 32.0), (1.0, 36.0)]


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_bd_rate_of_a_multiple_of_the_bits(factor):
    found = kodak.bd_rate(CURVE, [(factor * bits, quality) for bits, quality in reversed(CURVE)])
    assert found == pytest.approx(factor - 1)


def test_bd_rate_is_averaged_over_the_common_range():
    # twice the bits in the lower half of the qualities, equal bits above, with a short step in between
    other = [(0.2, 25.0), (0.4, 28.0), (0.5, 28.01), (0.5, 32.0)]
    reference = [(0.1, 25.0), (0.2, 28.0), (0.5, 28.01), (0.5, 32.0)]
    expected = np.exp(3 / 7 * np.log(2)) - 1
    assert kodak.bd_rate(reference, other) == pytest.approx(expected, rel=0.01)


def test_bd_rate_needs_a_common_range():
    assert kodak.bd_rate(CURVE, [(0.1, 40.0), (0.2, 41.0)]) is None
    assert kodak.bd_rate(CURVE, [(0.1, 28.0)]) is None
    assert kodak.bd_rate(CURVE, [(0.1, 28.0), (0.3, 28.0)]) is None


@pytest.fixture
def photographs(tmp_path):
    generator = np.random.default_rng(0)
    for i, (height, width) in enumerate([(192, 256), (256, 192)]):
        small = generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        image.save(tmp_path / f"kodim{i:02}.png")
    return tmp_path


@pytest.mark.slow
def test_models_and_formats_become_points_and_rates(photographs, tmp_path):
    out = tmp_path / "out"
    words = ["--kodak", str(photographs), "--runs", str(tmp_path / "runs"), "--models", "gained_hyperprior"]
    kodak.main([*words, "--seconds", "3", "--results", str(out)])
    (path,) = out.glob("kodak-*.csv")
    (command,), rows = read_csv(path)
    assert command == "python -m benchmarks.kodak --kodak FOLDER --models gained_hyperprior --seconds 3"
    curves = {name: [row for row in rows if row["method"] == name] for name in ("JPEG", "WEBP", "gained_hyperprior")}
    for name, points in curves.items():
        bits = [float(row["bits_per_pixel"]) for row in points]
        assert len(points) > 3 and bits == sorted(bits) and bits[-1] > 1.2 * bits[0], name
        assert all(5 < float(row["psnr"]) < 60 and 0 < float(row["ms_ssim"]) <= 1 for row in points), name
    jpeg = photographs / "x.jpg"
    size = 0
    for file in sorted(photographs.glob("*.png")):
        Image.open(file).save(jpeg, quality=50, optimize=True)
        size += jpeg.stat().st_size
    point = next(row for row in curves["JPEG"] if row["quality"] == "50")
    assert float(point["bits_per_pixel"]) == pytest.approx(8 * size / (2 * 192 * 256), rel=1e-3)
    page = report.pages(out, out)[0]["photographs.md"]
    assert "BD-rate" in page and "| gained_hyperprior |" in page


def test_missing_photographs_are_refused(tmp_path):
    with pytest.raises(AezooError, match=r"contains no kodim01\.png"):
        kodak.main(["--kodak", str(tmp_path)])
