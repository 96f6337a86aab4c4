"""Photographs composed of squares, and the table of results."""

import torch

from benchmarks import photos


def test_photograph_is_put_together_from_its_squares():
    photograph = torch.rand(3, 128, 192)
    seen = []

    def model(x):
        seen.append(x)
        return x

    assert torch.equal(photos._reconstructed(model, photograph), photograph)
    squares = torch.cat(seen)
    assert squares.shape == (6, 3, 64, 64) and torch.equal(squares[4], photograph[:, 64:, 64:128])
    assert photos._psnr(photograph, photograph + 0.1).__round__(4) == 20


def test_table_has_a_row_for_each_model():
    row = {
        "model": "vae",
        "code": "32",
        "psnr": "20.1234",
        "psnr_pca": "21",
        "ssim": "0.5",
        "epochs": "9",
        "seconds": "90",
    }
    assert photos.as_markdown([row]).splitlines()[-1] == "| `vae` | 32 | 20.12 | 21.00 | 0.50 | 9 |"
