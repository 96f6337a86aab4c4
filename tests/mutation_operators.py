"""Operators that put faults into formulas, on the syntax tree of the current code.

A formula is a function with tensors or arrays in its signature, without its docstring, messages and checks of
arguments. Code for other devices, compilers or several processes is left out, and so are guards against rounding, such
as small constants, whose changes no test could detect.
"""

import ast
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

Mutants = Iterator[tuple[str, ast.AST]]

UNARY_FUNCTIONS = {
    *("exp", "log", "sqrt", "rsqrt", "square", "abs", "log1p", "expm1", "sigmoid", "tanh", "relu", "softplus"),
    *("softmax", "log_softmax", "logsigmoid", "normalize", "cumsum", "floor", "round", "sign", "detach"),
    *("clamp", "clamp_min", "clamp_max", "clip"),
}
# functions with an axis as their first argument, or as the one after the tensor
AXIS_FUNCTIONS = {
    *("sum", "mean", "std", "var", "amax", "amin", "argmax", "argmin", "max", "min", "prod", "any", "all", "norm"),
    *("softmax", "log_softmax", "logsumexp", "cumsum", "cumprod", "flip", "unbind", "cat", "stack", "argsort"),
}
REPLACEMENTS = {
    **{"sum": "mean", "mean": "sum", "amax": "amin", "amin": "amax", "argmax": "argmin", "argmin": "argmax"},
    **{"maximum": "minimum", "minimum": "maximum", "add_": "sub_", "sub_": "add_", "cos": "sin", "sin": "cos"},
    **{"randn": "rand", "randn_like": "rand_like", "rand": "randn", "rand_like": "randn_like"},
}
SYMMETRIC = {
    *("maximum", "minimum", "max", "min", "add", "mul", "isclose"),
    *("mse_loss", "l1_loss", "smooth_l1_loss", "cosine_similarity"),
}
IGNORED_CALLS = {
    *("isinstance", "hasattr", "getattr", "setattr", "zip", "register_buffer", "warn", "cast", "expand", "view"),
    *("reshape", "unflatten", "new_empty", "empty", "new_zeros", "zeros", "new_ones", "ones", "at_least", "one_of"),
}
# values of these arguments are not part of a formula
IGNORED_ARGUMENTS = {"device", "dtype", "generator", "strict", "memory_format", "non_blocking", "persistent"}
IGNORED_CONDITIONS = {
    *("_across_ranks", "is_compiling", "is_exporting", "is_available", "is_initialized", "is_tracing", "device"),
    *("is_cuda", "is_cpu", "dtype", "isinstance", "is_grad_enabled", "requires_grad"),
}
IGNORED_FUNCTIONS = {"__init__", "__repr__", "extra_repr", "parameter_groups", "configure_optimizers", "setup"}
MODULES = {"torch", "F", "nn", "math", "np", "linalg", "special", "functional"}
ATOMS = (ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript, ast.Slice, ast.stmt)
GUARD_WORDS = ("eps", "tiny", "jitter", "floor", "finfo")
MIN_CONSTANT, MAX_CONSTANT = 1e-3, 1000

NEGATED = {ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
OTHER_AXIS = {0: 1, 1: 0, 2: 1, 3: 2, -1: 0, -2: -1, -3: -1}


@dataclass(frozen=True)
class Mutant:
    """One change of a formula.

    Attributes:
        function: its qualified name.
        operator: what was done, in a few words.
        ordinal: number, from 1, of the change by this operator in the function.
        line: line number.
        start: offset of the replaced text, in characters.
        old: the replaced text.
        new: the new text.
    """

    function: str
    operator: str
    ordinal: int
    line: int
    start: int
    old: str
    new: str

    @property
    def name(self) -> str:
        """Unique among the mutants of the module."""
        return f"{self.function}: {self.operator} {self.ordinal}"


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    return [mutant for _, mutant in _mutants(ast.parse(source), source, OPERATORS)]


def detachments_of(source: str) -> list[Mutant]:
    """The mutants of a module that detach one sub-expression, whether or not it is a tensor with a gradient."""
    return [mutant for _, mutant in _mutants(ast.parse(source), source, (_detach,))]


def with_probes(source: str, prefix: str, probe: str) -> ast.Module:
    """The syntax tree of a module with a function call around each sub-expression.

    Args:
        source: the module's text.
        prefix: prepended to a mutant's name in the function's first argument.
        probe: the name of the function, which takes that name and the value, and returns the new value.
    """
    tree = ast.parse(source)
    names = {node: f"{prefix}{mutant.name}" for node, mutant in _mutants(tree, source, (_detach,))}

    class Wrapper(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            changed = self.generic_visit(node)
            if node not in names:
                return changed
            return ast.Call(ast.Name(probe, ast.Load()), [ast.Constant(names[node]), changed], [])

    return ast.fix_missing_locations(Wrapper().visit(tree))


def _mutants(
    tree: ast.Module, source: str, operators: tuple[Callable[[ast.AST], Mutants], ...]
) -> Iterator[tuple[ast.AST, Mutant]]:
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = source.splitlines()

    def position(line: int, byte: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:byte].decode())

    counts: dict[tuple[str, str], int] = defaultdict(int)
    seen: set[tuple[int, int, str]] = set()
    for name, function in _formulas(tree):
        for node, operator, changed in _changes(function, operators):
            start, end = position(node.lineno, node.col_offset), position(node.end_lineno, node.end_col_offset)
            new = ast.unparse(changed)
            if not isinstance(changed, ATOMS):
                new = f"({new})"
            if (start, end, new) not in seen and new.strip("()") != ast.unparse(node).strip("()"):
                seen.add((start, end, new))
                counts[name, operator] += 1
                ordinal = counts[name, operator]
                yield node, Mutant(name, operator, ordinal, node.lineno, start, source[start:end], new)


def _formulas(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions with tensors or arrays in their signature, including their nested functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _formulas(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            arguments = chain(node.args.posonlyargs, node.args.args, node.args.kwonlyargs)
            signature = [node.returns, *(argument.annotation for argument in arguments)]
            text = " ".join(ast.unparse(part) for part in signature if part is not None)
            if node.name not in IGNORED_FUNCTIONS and ("Tensor" in text or "ndarray" in text):
                yield f"{prefix}{node.name}", node
            else:
                yield from _formulas(node, f"{prefix}{node.name}.")


def _names(node: ast.AST) -> set[str]:
    parts = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return parts | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def _called_name(node: ast.AST) -> str:
    """The last part of the name of the called function."""
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", getattr(node.func, "id", ""))
    return ""


def _is_module_function(call: ast.Call) -> bool:
    """Whether a call is one of a function of a module and not of a method."""
    function = call.func
    if isinstance(function, ast.Name):
        return True
    owner = function.value if isinstance(function, ast.Attribute) else None
    if isinstance(owner, ast.Attribute):  # torch.linalg.norm
        return owner.attr in MODULES and isinstance(owner.value, ast.Name) and owner.value.id in MODULES
    return isinstance(owner, ast.Name) and owner.id in MODULES


def _number(node: ast.AST) -> float | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _number(node.operand)
        return None if value is None else -value
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    return None


def _is_guard(node: ast.AST) -> bool:
    """Whether an expression only guards against rounding: a small number, or one with such a name."""
    value = _number(node)
    if value is not None:
        return 0 < abs(value) < MIN_CONSTANT
    return any(word in name.lower() for name in _names(node) for word in GUARD_WORDS)


def _is_limit(node: ast.AST) -> bool:
    """Whether an expression contains large integers or powers of numbers, such as chunk sizes."""
    for part in ast.walk(node):
        value = _number(part)
        power = isinstance(part, ast.BinOp) and isinstance(part.op, ast.Pow) and _number(part.left) is not None
        if power or (isinstance(value, int) and value >= MAX_CONSTANT):
            return True
    return False


def _is_no_number(node: ast.AST) -> bool:
    """Whether an operand is a string, a list or a shape."""
    if isinstance(node, ast.JoinedStr | ast.List | ast.Tuple | ast.Dict | ast.Set | ast.ListComp):
        return True
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Slice) and _is_no_number(node.value)
    return (getattr(node, "attr", "") or getattr(node, "id", "")).endswith(("shape", "dims", "sizes"))


def _is_check(node: ast.If) -> bool:
    return isinstance(node.body[-1], ast.Raise)


def _formula_children(node: ast.AST) -> Iterator[ast.AST]:
    """The children of a node that may belong to a formula."""
    if isinstance(node, ast.FunctionDef):
        yield from node.body
    elif isinstance(node, ast.AnnAssign):
        yield from [node.value] if node.value else []
    elif isinstance(node, ast.Assign):
        yield node.value
    elif isinstance(node, ast.If):
        if not _is_check(node) and not _names(node.test) & IGNORED_CONDITIONS:
            yield node.test
            yield from node.body
        yield from node.orelse
    elif isinstance(node, ast.IfExp) and _names(node.test) & IGNORED_CONDITIONS:
        yield node.orelse
    elif isinstance(node, ast.Call):
        yield from [] if isinstance(node.func, ast.Name) else [node.func]
        # integers bounded by max and min are chunk sizes and the like
        bounds = isinstance(node.func, ast.Name) and node.func.id in ("max", "min")
        if not bounds and _called_name(node) not in IGNORED_CALLS:
            yield from node.args
            yield from (keyword.value for keyword in node.keywords if keyword.arg not in IGNORED_ARGUMENTS)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    elif not isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.ClassDef | ast.Import | ast.ImportFrom):
        yield from ast.iter_child_nodes(node)


def _changes(
    function: ast.FunctionDef, operators: tuple[Callable[[ast.AST], Mutants], ...]
) -> Iterator[tuple[Any, str, ast.AST]]:
    """The nodes of a function that an operator changes, with the operator's name and the new node."""
    without_gradient = any("no_grad" in ast.unparse(decorator) for decorator in function.decorator_list)
    waiting: list[ast.AST] = [function]
    while waiting:
        node = waiting.pop()
        for operator in operators:
            for name, changed in operator(node):
                if not (without_gradient and "detach" in name):
                    yield node, name, changed
        waiting.extend(reversed([*_formula_children(node)]))


def _replace_fields(node: Any, **fields: Any) -> Any:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


# ---- operators, from a node to the nodes that may replace it ---------------------------------------------------------


def _arithmetic(node: ast.AST) -> Mutants:
    if not isinstance(node, ast.BinOp) or _is_limit(node) or _is_no_number(node.left) or _is_no_number(node.right):
        return
    if isinstance(node.op, ast.Add | ast.Sub):
        if _is_guard(node.left) or _is_guard(node.right):
            return
        plus = isinstance(node.op, ast.Add)
        yield ("- for +" if plus else "+ for -"), _replace_fields(node, op=ast.Sub() if plus else ast.Add())
        yield "drop term", node.left
        yield "drop term", node.right if plus else ast.UnaryOp(ast.USub(), node.right)
    elif isinstance(node.op, ast.Mult):
        yield "drop factor", node.left
        yield "drop factor", node.right
    elif isinstance(node.op, ast.Div):
        yield "drop factor", node.left
        yield "* for /", _replace_fields(node, op=ast.Mult())
    elif isinstance(node.op, ast.Pow):
        yield "drop power", node.left


def _constant(node: ast.AST) -> Mutants:
    if not isinstance(node, ast.BinOp) or _is_limit(node) or _is_no_number(node.left) or _is_no_number(node.right):
        return
    for side in ("left", "right"):
        value = _number(getattr(node, side))
        if value is None or _is_guard(getattr(node, side)) or _number(node.left) is not None is not _number(node.right):
            continue
        whole = isinstance(value, int)
        yield (
            ("off by one" if whole else "wrong constant"),
            _replace_fields(node, **{side: ast.Constant(value + 1 if whole else 2 * value if value else 1.0)}),
        )


def _sign(node: ast.AST) -> Mutants:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and _number(node) is None:
        yield "drop sign", node.operand


def _assignment(node: ast.AST) -> Mutants:
    if isinstance(node, ast.AugAssign) and not _is_no_number(node.target) and not _is_no_number(node.value):
        others = {ast.Add: ("- for +", ast.Sub), ast.Sub: ("+ for -", ast.Add), ast.Mult: ("/ for *", ast.Div)}
        if type(node.op) in others:
            name, other = others[type(node.op)]
            yield name, _replace_fields(node, op=other())


def _comparison(node: ast.AST) -> Mutants:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and not _names(node) & IGNORED_CONDITIONS:
        other = NEGATED.get(type(node.ops[0]))
        if other is not None:
            yield "negate comparison", _replace_fields(node, ops=[other()])


def _condition(node: ast.AST) -> Mutants:
    if (
        isinstance(node, ast.IfExp)
        and not isinstance(node.test, ast.Compare)
        and not _names(node.test) & IGNORED_CONDITIONS
    ):
        yield "other branch", _replace_fields(node, body=node.orelse, orelse=node.body)


def _function(node: ast.AST) -> Mutants:
    if not isinstance(node, ast.Call):
        return
    name, is_module_function = _called_name(node), _is_module_function(node)
    has_axes = is_module_function or all(_number(part) is not None or isinstance(part, ast.Tuple) for part in node.args)
    has_axes |= name.endswith("_")  # in place: add_(x)
    if (
        name in REPLACEMENTS and isinstance(node.func, ast.Attribute) and has_axes
    ):  # and not, say, a likelihood's mean(params)
        changed = _replace_fields(node, func=_replace_fields(node.func, attr=REPLACEMENTS[name]))
        yield f"{REPLACEMENTS[name].strip('_')} for {name.strip('_')}", changed
    guards = any(
        _is_guard(part) for part in (*node.args[is_module_function:], *(keyword.value for keyword in node.keywords))
    )
    if name in UNARY_FUNCTIONS and not (name.startswith(("clamp", "clip")) and guards):
        value = node.args[0] if is_module_function and node.args else getattr(node.func, "value", None)
        if value is not None and not (is_module_function and not node.args):
            yield f"drop {name.partition('_m')[0]}", value


def _axis(node: ast.AST) -> Mutants:
    if not isinstance(node, ast.Call):
        return
    place = int(_is_module_function(node))
    if _called_name(node) in AXIS_FUNCTIONS and len(node.args) > place:
        axis = node.args[place]
        if _number(axis) in OTHER_AXIS:
            new = ast.Constant(OTHER_AXIS[_number(axis)])
            yield "wrong axis", _replace_fields(node, args=[*node.args[:place], new, *node.args[place + 1 :]])
        if isinstance(axis, ast.Tuple) and len(axis.elts) > 1:
            shorter = _replace_fields(axis, elts=axis.elts[:-1])
            yield "missing axis", _replace_fields(node, args=[*node.args[:place], shorter, *node.args[place + 1 :]])
    for i, keyword in enumerate(node.keywords):
        if keyword.arg in ("dim", "axis") and _number(keyword.value) in OTHER_AXIS:
            other = _replace_fields(keyword, value=ast.Constant(OTHER_AXIS[_number(keyword.value)]))
            yield "wrong axis", _replace_fields(node, keywords=[*node.keywords[:i], other, *node.keywords[i + 1 :]])


def _order(node: ast.AST) -> Mutants:
    """Swapped arguments; for `where`, the two values."""
    if not isinstance(node, ast.Call) or _called_name(node) in SYMMETRIC | IGNORED_CALLS:
        return
    first = 1 if _called_name(node) == "where" and _is_module_function(node) else 0
    pair = node.args[first : first + 2]
    if len(pair) == 2 and not any(isinstance(part, ast.Starred | ast.Constant | ast.Lambda) for part in pair):
        yield (
            "swap arguments",
            _replace_fields(node, args=[*node.args[:first], *reversed(pair), *node.args[first + 2 :]]),
        )


def _index(node: ast.AST) -> Mutants:
    """Bounds of slices and ranges, and single indices."""
    if isinstance(node, ast.Slice):
        for side in ("lower", "upper"):
            bound = getattr(node, side)
            if bound is not None and not _is_limit(bound):
                more = _number(bound)
                new = ast.BinOp(bound, ast.Add(), ast.Constant(1)) if more is None else ast.Constant(int(more) + 1)
                yield "off by one", _replace_fields(node, **{side: None if more == -1 else new})
    elif isinstance(node, ast.Call) and _called_name(node) == "range" and node.args:
        place = int(len(node.args) > 1)
        new = ast.BinOp(node.args[place], ast.Sub(), ast.Constant(1))
        yield "off by one", _replace_fields(node, args=[*node.args[:place], new, *node.args[place + 1 :]])


def _no_grad(node: ast.AST) -> Mutants:
    if _called_name(node) == "no_grad":
        yield "drop no_grad", _replace_fields(node, func=_replace_fields(node.func, attr="enable_grad"))


def _detach(node: ast.AST) -> Mutants:
    tensor = isinstance(node, ast.Name | ast.Attribute | ast.Subscript | ast.Call | ast.BinOp | ast.UnaryOp | ast.IfExp)
    if tensor and isinstance(getattr(node, "ctx", None) or ast.Load(), ast.Load) and _number(node) is None:
        yield "detach", ast.Call(ast.Attribute(node, "detach", ast.Load()), [], [])


OPERATORS: tuple[Callable[[ast.AST], Mutants], ...] = (
    *(_arithmetic, _constant, _sign, _assignment, _comparison, _condition),
    *(_function, _axis, _order, _index, _no_grad),
)
