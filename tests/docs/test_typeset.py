"""Objectives of docstrings become the LaTeX that they mean."""

import importlib.util
import re
from pathlib import Path

import pytest

from aezoo import registry
from benchmarks.recipes import objective

PATH = Path(__file__).parents[2] / "docs" / "hooks" / "typeset.py"
spec = importlib.util.spec_from_file_location("typeset", PATH)
typeset = importlib.util.module_from_spec(spec)
spec.loader.exec_module(typeset)


def close(text):
    return text.replace(" ", "")


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ("log p(x) >= E_q(z|x)[log p(x|z)]", r"\log p(x) \ge \mathbb{E}_{q(z \mid x)}[\log p(x \mid z)]"),
        ("KL(q(z|x) || N(0, I))", r"\mathrm{KL}(q(z \mid x) \| \mathcal{N}(0, I))"),
        ("beta |KL - C|", r"\beta |\mathrm{KL} - C|"),
        ("E_q_i[-log p(x_i|z)]", r"\mathbb{E}_{q_{i}}[-\log p(x_{i} \mid z)]"),
        ("||x - x_hat_m||^2", r"\|x - \hat{x}_{m}\|^{2}"),
        ("g(y^) + f(x~) + rhohat_j + f'(x)", r"g(\hat{y}) + f(\tilde{x}) + \hat{\rho}_{j} + f'(x)"),
        ("sum_(i<=l) e_i sum_{i != j} C_ij^2", r"\sum_{i \le l} e_{i} \sum_{i \ne j} C_{ij}^{2}"),
        ("lam_s 255^2 + 1/2 w_ssim s_n+1", r"\lambda_{s} 255^{2} + \tfrac{1}{2} w_{\mathrm{ssim}} s_{n+1}"),
        ("E[log|det dz_t|] - E(z)", r"\mathbb{E}[\log |\det dz_{t}|] - E(z)"),
        ("max(free_bits, KL_l)", r"\max (\mathrm{free\_bits}, \mathrm{KL}_{l})"),
    ],
)
def test_notation_becomes_latex(plain, expected):
    assert close(typeset.latex(plain)) == close(expected)


@pytest.mark.parametrize("name", [name for name in registry.list_models() if registry.find(name).owner == "aezoo"])
def test_each_objective_is_typeset(name):
    text = typeset.latex(objective(name).strip("`"))
    plain = re.sub(r"\\[{}]", "", text)
    depth = 0
    for sign in plain:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0
    # names of several letters are commands, in \mathrm, \text or \operatorname, or indices
    outside = re.sub(r"\\(mathrm|text|operatorname)\{[^{}]*\}|\\[A-Za-z]+|_\{[^{}]*\}|\\_", " ", text)
    assert {*re.findall(r"[A-Za-z]{2,}", outside)} <= {"dh", "dx", "dz", "MK"}
    assert not re.search(r"\^\)|~|(?<!\\)\|\||>=|<=|!=", text)
