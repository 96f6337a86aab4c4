"""What a third-party package tests of its model: one line."""

from aezoo.testing import check_model


def test_mirror_ae_keeps_the_contract():
    check_model("mirror_ae")
