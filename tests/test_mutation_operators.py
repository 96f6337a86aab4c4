"""Operators generate the faults that they are named for, in formulas only."""

import ast

import pytest
import torch
from mutants import ROOT, generated
from mutation_operators import detachments_of, mutants_of, with_probes


def changes(*lines, signature="x: Tensor, y: Tensor) -> Tensor"):
    """The operators and new texts of the mutants of a function with these lines."""
    source = f"def f({signature}:\n" + "".join(f"    {line}\n" for line in lines)
    return [(mutant.operator, mutant.new) for mutant in mutants_of(source)]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("return x + y", [("- for +", "(x - y)"), ("drop term", "x"), ("drop term", "y")]),
        ("return x - y", [("+ for -", "(x + y)"), ("drop term", "x"), ("drop term", "(-y)")]),
        ("return x * y", [("drop factor", "x"), ("drop factor", "y")]),
        ("return x / y", [("drop factor", "x"), ("* for /", "(x * y)")]),
        ("return x**2", [("drop power", "x"), ("off by one", "(x ** 3)")]),
        ("return 0.5 * x", [("drop factor", "0.5"), ("drop factor", "x"), ("wrong constant", "(1.0 * x)")]),
        ("return -x", [("drop sign", "x")]),
        ("x += y", [("- for +", "x -= y")]),
        ("return x < y", [("negate comparison", "(x >= y)")]),
        ("return x if self.half else y", [("other branch", "(y if self.half else x)")]),
        ("return x.exp()", [("drop exp", "x")]),
        ("return torch.log(x)", [("drop log", "x")]),
        ("return F.softplus(x)", [("drop softplus", "x")]),
        ("return x.detach()", [("drop detach", "x")]),
        ("return x.clamp(-30, 20)", [("drop clamp", "x")]),
        ("return x.mean()", [("sum for mean", "x.sum()")]),
        ("return x.sum(1)", [("mean for sum", "x.mean(1)"), ("wrong axis", "x.sum(0)")]),
        ("return torch.cat(parts, dim=-1)", [("wrong axis", "torch.cat(parts, dim=0)")]),
        ("return x.amax((2, 3))", [("amin for amax", "x.amin((2, 3))"), ("missing axis", "x.amax((2,))")]),
        ("return kl(x, y)", [("swap arguments", "kl(y, x)")]),
        ("return torch.where(self.known, x, y)", [("swap arguments", "torch.where(self.known, y, x)")]),
        ("return torch.randn_like(x)", [("rand_like for randn_like", "torch.rand_like(x)")]),
        ("return x[:, 1:n]", [("off by one", "2:n"), ("off by one", "1:n + 1")]),
        ("return x[:-1]", [("off by one", ":")]),
        ("return range(n)", [("off by one", "range(n - 1)")]),
    ],
)
def test_operators_generate_expected_mutants(line, wanted):
    assert changes(line) == wanted


def test_no_grad_block_is_mutated_to_enable_grad():
    assert changes("with torch.no_grad():", "    return x") == [("drop no_grad", "torch.enable_grad()")]


@pytest.mark.parametrize(
    "lines",
    [
        ['"""Return x - y."""', "return x"],
        ["if len(x) < 2:", '    raise AezooError(f"got {len(x) - 1}")', "return x"],
        ["assert len(x) > 1", "return x"],
        ["return x + 1e-6"],  # guards against rounding
        ["return x.clamp(min=1e-8)"],
        ["return x.clamp(min=torch.finfo(x.dtype).tiny)"],
        ["chunk = 2**24 // x.numel()", "return x.split(chunk)"],  # memory limits
        ["return x if self._across_ranks() else x"],
        ["if torch.compiler.is_compiling():", "    return x - y", "return x"],
        ["return x.unflatten(1, self.sizes[:1] + (2,))"],  # shapes
        ["return parts + [x]"],
        ["return x.to(device=y.device + 1)"],
        ["return self.likelihood.mean(x)"],
        ["chunk = max(1, size // n)", "return x.split(chunk)"],
    ],
)
def test_non_formula_lines_are_not_mutated(lines):
    assert changes(*lines) == []


def test_a_function_without_tensors_is_no_formula():
    assert changes("return n - 1", signature="n: int) -> int") == []
    assert changes("return n - 1", signature="n: int) -> Tensor") != []
    source = "class A:\n    def __init__(self, x: Tensor) -> None:\n        self.x = x - 1\n"
    assert mutants_of(source) == []


def test_nested_functions_are_attributed_to_their_method():
    method = "    def f(self, x: Tensor) -> Tensor:\n        def g(v):\n            return -v\n        return g(-x)\n"
    source = f"class A:\n{method}"
    assert [(m.function, m.operator, m.ordinal, m.line) for m in mutants_of(source)] == [
        ("A.f", "drop sign", 1, 4),
        ("A.f", "drop sign", 2, 5),
    ]


def test_fault_offset_handles_non_ascii_text():
    source = 'def f(x: Tensor) -> Tensor:\n    return g("π", -x)\n'
    (mutant,) = mutants_of(source)
    assert source[mutant.start :].startswith(mutant.old) and mutant.old == "-x"


def test_each_sub_expression_is_detached_and_probed_by_name():
    source = "def f(x: Tensor, *, n: int) -> Tensor:\n    scaled = n * x[:1]\n    return (scaled + x.square()).sum()\n"
    made = {mutant.old: mutant.new for mutant in detachments_of(source)}
    assert made["scaled + x.square()"] == "(scaled + x.square()).detach()" and made["x"] == "x.detach()"
    assert {"n * x[:1]", "x[:1]", "x.square()", "(scaled + x.square()).sum()"} < made.keys()
    seen = {}
    names = {"Tensor": torch.Tensor, "probe": lambda name, value: (seen.setdefault(name, value), value)[1]}
    exec(compile(with_probes(source, "a.py: ", "probe"), "a.py", "exec"), names)
    assert names["f"](torch.ones(3), n=2) == 9
    assert {*seen} == {f"a.py: {mutant.name}" for mutant in detachments_of(source)}
    values = {mutant.old: seen[f"a.py: {mutant.name}"] for mutant in detachments_of(source)}
    assert values["n * x[:1]"] == 2 and values["(scaled + x.square()).sum()"] == 9


def test_package_faults_have_unique_identities():
    faults = generated()
    assert len(faults) > 5000
    assert len({fault.identity for fault in faults}) == len(faults)
    file = ROOT / faults[0].file
    first, again = (mutants_of(file.read_text(encoding="utf-8")) for _ in range(2))
    assert first == again
    rooms = {fault.file.split("/")[1] for fault in faults}
    assert rooms == {
        "models",
        "bases",
        "distributions",
        "quantisers",
        "manifolds",
        "nets",
        "metrics",
        "corruptions.py",
        "autoencoder.py",
    }


@pytest.mark.slow
def test_every_fault_changes_module_and_parses():
    faults = generated()
    texts = {fault.file: (ROOT / fault.file).read_text(encoding="utf-8") for fault in faults}
    trees = {file: ast.dump(ast.parse(text)) for file, text in texts.items()}
    assert all(fault.occurrences() == 1 for fault in faults[::100])
    assert all(texts[fault.file].startswith(fault.old, fault.start) for fault in faults)
    for fault in faults[::20]:
        assert ast.dump(ast.parse(fault.changed(texts[fault.file]))) != trees[fault.file], fault.identity
