"""Tests of a third-party package's model."""

from aezoo.testing import check_model


def test_mirror_ae_keeps_the_contract():
    # test_model_of_the_documentation_keeps_the_contract covers the graphs of third-party models
    check_model("mirror_ae", exclude=["check_compile", "check_export", "check_onnx"])
