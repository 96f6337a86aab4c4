"""Formulas of docstrings are converted to LaTeX."""

import ast
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
        (
            "log p(x) >= E_q(z|x)[log p(x|z)]",
            r"\log \hspace{0.17em} p(x) \ge \mathbb{E}_{q(z \mid x)}[\log \hspace{0.17em} p(x \mid z)]",
        ),
        ("KL(q(z|x) || N(0, I))", r"\mathrm{KL}(q(z \mid x) \| \mathcal{N}(0, I))"),
        ("beta |KL - C|", r"\beta |\mathrm{KL} - C|"),
        ("E_q_i[-log p(x_i|z)]", r"\mathbb{E}_{q_{i}}[-\log \hspace{0.17em} p(x_{i} \mid z)]"),
        ("||x - x_hat_m||^2", r"\|x - \hat{x}_{m}\|^{2}"),
        ("g(y^) + f(x~) + rhohat_j + f'(x)", r"g(\hat{y}) + f(\tilde{x}) + \hat{\rho}_{j} + f'(x)"),
        ("sum_(i<=l) e_i sum_{i != j} C_ij^2", r"\sum_{i \le l} e_{i} \sum_{i \ne j} C_{ij}^{2}"),
        ("lam_s 255^2 + 1/2 w_ssim s_n+1", r"\lambda_{s} 255^{2} + \tfrac{1}{2} w_{\mathrm{ssim}} s_{n+1}"),
        ("E[log|det dz_t|] - E(z)", r"\mathbb{E}[\log |\det \hspace{0.17em} dz_{t}|] - E(z)"),
        ("max(free_bits, KL_l)", r"\max (\mathrm{free\_bits}, \mathrm{KL}_{l})"),
        ("y^_<t ~ N(0, sqrt(s^2 (1 + a)))", r"\hat{y}_{<t} \sim \mathcal{N}(0, \sqrt{s^{2} (1 + a)})"),
        ("h_i-1 (1 + 1e-4)^1/7 - C^-1", r"h_{i-1} (1 + 10^{-4})^{\tfrac{1}{7}} - C^{-1}"),
        ("E_x,u E_q(x)q(z)[cos(E_kp, D_kp)]", r"\mathbb{E}_{x,u} \mathbb{E}_{q(x)q(z)}[\cos (E_{kp}, D_{kp})]"),
        ("v = w where w > 0, else 0 in the rest", r"v = w\text{ where }w > 0,\text{ else }0\text{ in the rest}"),
        ("E[x | y] = max_theta f(x)", r"\mathbb{E}[x \mid y] = \max_{\theta}\hspace{0.17em} f(x)"),
        ("min(max_capacity, #{i: s_i >= s})", r"\min (\mathrm{max\_capacity}, \#\{i: s_{i} \ge s\})"),
        ("m the mean of a set of M, for i in M", r"m\text{ the mean of a set of }M,\text{ for }i \in M"),
    ],
)
def test_notation_becomes_latex(plain, expected):
    assert close(typeset.latex(plain)) == close(expected)


def formulas(name):
    """The LaTeX of the formulas in the docstring of a model's file."""
    source = registry.source_of(registry.find(name)).read_text(encoding="utf-8")
    for line in ast.get_docstring(ast.parse(source)).splitlines():
        pieces = typeset.parts(line) if line.startswith("    ") else typeset.symbols(line)
        yield from (typeset.latex(text) for formula, text in pieces if formula)


def test_words_are_not_typeset_as_formulas():
    text = "With a beta of 0.1, A of input_shape and beta-VAE (see https://a.org/x_1, `x_1`) x~, q(z|x) and 2^24."
    assert [piece for formula, piece in typeset.symbols(text) if formula] == ["beta", "x~", "q(z|x)", "2^24"]
    assert typeset.parts("    L = a + b     of the paper, section 3   http://a.org/x=1") == [
        (True, "L = a + b"),
        (False, "of the paper, section 3"),
        (False, "http://a.org/x=1"),
    ]


def code_block(text):
    return f'<div class="language-text highlight"><pre><span></span><code>{text}\n</code></pre></div>'


def test_html_of_docstrings_has_typeset_formulas_but_no_code():
    page = "<h3>q(z|x)</h3><p>(B, D): <code>q(z|x)</code> &lt; -log p(x | z), <a title='q(z|x)'>2^24</a>.</p>"
    expected = page.replace(
        "-log p(x | z),", f'<span class="unbroken">{typeset.element("-log p(x | z)", "span")},</span>'
    )
    expected = expected.replace("2^24", typeset.element("2^24", "span"))
    assert typeset.in_html(page) == expected
    python = code_block("class A(B, c=1):\n    x = 1 &lt; 2")
    assert typeset.in_html(python) == python
    assert typeset.in_html(code_block("a = b c &lt; d")) == typeset.block(["a = b c < d"])
    assert 'class="formula"' in typeset.block(["a = b c < d"])


@pytest.mark.parametrize("name", [name for name in registry.list_models() if registry.find(name).owner == "aezoo"])
def test_each_formula_is_typeset(name):
    for text in formulas(name):
        plain = re.sub(r"\\[{}]", "", text)
        depth = 0
        for sign in plain:
            depth += {"{": 1, "}": -1}.get(sign, 0)
            assert depth >= 0
        assert depth == 0
        assert not re.search(r"[_^]\{?[_^]|~|(?<!\\)\|\||>=|<=|!=|->", text)
    text = typeset.latex(objective(name).strip("`"))
    # names of several letters must be commands, in \mathrm, \text or \operatorname, or indices
    outside = re.sub(r"\\(mathrm|text|operatorname|hspace)\{[^{}]*\}|\\[A-Za-z]+|_\{[^{}]*\}|\\_", " ", text)
    assert {*re.findall(r"[A-Za-z]{2,}", outside)} <= {"dh", "dx", "dz", "MK"}
    assert not re.search(r"\^\)", text)
