"""What a third-party package tests of its model."""

from aezoo.testing import check_model


def test_mirror_ae_keeps_the_contract():
    # graphs of models from elsewhere: test_model_of_the_documentation_keeps_the_contract
    check_model("mirror_ae", exclude=["check_compile", "check_export", "check_onnx"])
