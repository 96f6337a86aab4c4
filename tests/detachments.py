"""Find the sub-expressions that change the first gradients of a golden model when they are detached.

    python tests/detachments.py FILE ...      print them as JSON, one per line
    python tests/detachments.py --count       count those of all formulas, and those that golden values detect

The formulas are imported with a call around each sub-expression. A first step of every golden model that uses them,
without and with labels, finds those that are tensors with a gradient; then each of these is detached in turn. One that
changes no gradient is not a fault: its gradient reaches no parameter, or is replaced by another, as in a
straight-through estimator. One that has the same effect as an earlier one of the same function is the same fault.
"""

import argparse
import builtins
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from mutants import ROOT, formula_files, users
from mutation_operators import with_probes

PROBE = "__detachment_probe__"
# smaller relative differences are due to another order of sums
ROUNDING = 1e-9
# a sub-expression that changes no gradient of this many models is assumed to change none
MAX_SETTINGS = 6


class Detachment(NamedTuple):
    """A fault.

    Attributes:
        identity: see `mutants.Fault`.
        label: the golden model whose gradients it changes.
        noticed: whether they change by more than the tolerance of golden values.
    """

    identity: str
    label: str
    noticed: bool


class Probe:
    """Called on each sub-expression: detaches the chosen one, or records which are tensors."""

    def __init__(self) -> None:
        self.chosen = ""
        self.tensors: set[str] = set()
        self.others: set[str] = set()

    def __call__(self, identity: str, value: Any) -> Any:
        if identity == self.chosen:
            return value.detach()
        if not self.chosen:
            if not isinstance(value, sys.modules["torch"].Tensor):
                self.others.add(identity)
            elif value.requires_grad:
                self.tensors.add(identity)
        return value


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = Path(self.path)
        tree = with_probes(path.read_text(encoding="utf-8"), f"{path.relative_to(ROOT).as_posix()}: ", PROBE)
        return compile(tree, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def __init__(self, files: Sequence[str]) -> None:
        self._paths = {str(ROOT / file) for file in files}

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname.startswith("aezoo.") else None
        if spec is not None and spec.origin in self._paths:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def install(files: Sequence[str]) -> Probe:
    """Import these files of the package with a probe; must be called before anything else imports them."""
    probe = Probe()
    setattr(builtins, PROBE, probe)
    sys.meta_path.insert(0, _Finder(files))
    return probe


def detachments(files: Sequence[str], probe: Probe, counts: Counter[str]) -> Iterator[Detachment]:
    """The faults of these files; `counts` is incremented by the outcome for each tensor with a gradient."""
    import golden
    import torch

    recorded = golden.recorded()
    subjects = {subject.label: subject for subject in golden.subjects()}
    labels = dict.fromkeys(label for file in files for _, label in users(file))

    def gradients(label: str, labelled: bool) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        model, _ = golden.first_step(subjects[label], labelled)
        found = {name: p.grad for name, p in sorted(model.named_parameters()) if p.grad is not None}
        return found, golden.gradient_digest(model)

    settings, others = [], set()
    for label in labels:
        changes = set()
        for labelled in (False, True):
            probe.chosen, probe.tensors, probe.others = "", set(), set()
            start = time.perf_counter()
            change = digest(gradients(label, labelled)[0])
            if change not in changes:  # most models do not read labels
                changes.add(change)
                settings.append((labelled, time.perf_counter() - start, label, probe.tensors))
            others |= probe.others
    tried: Counter[str] = Counter()
    found: set[str] = set()
    known = set()
    for labelled, _, label, tensors in sorted(settings):
        wanted = sorted((name for name in tensors - others - found if tried[name] < MAX_SETTINGS), key=_place)
        probe.chosen = "none"
        right = gradients(label, labelled)[0] if wanted else {}
        for identity in wanted:
            tried[identity] += 1
            probe.chosen = identity
            try:
                wrong, values = gradients(label, labelled)
            except Exception as error:
                change, noticed = repr(type(error)), True
            else:
                noticed = not labelled and bool(
                    golden.differences(recorded[label] | {"gradient": values}, recorded[label], golden.TOLERANCE)
                )
                if not differ(wrong, right):
                    continue
                change = digest(wrong)
            found.add(identity)
            mark = (identity.rpartition(": ")[0], label, labelled, change)
            if mark not in known:
                known.add(mark)
                yield Detachment(identity, label, noticed)
    counts.update({"tensors": len(tried), "equivalent": len(tried) - len(found), "same": len(found) - len(known)})


def _place(identity: str) -> tuple[str, int]:
    function, _, ordinal = identity.rpartition(" ")
    return function, int(ordinal)


def digest(gradients: dict[str, Any]) -> str:
    """A hash of gradients."""
    return sha256(b"".join(gradient.numpy().tobytes() for gradient in gradients.values())).hexdigest()


def differ(wrong: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether gradients differ by more than rounding; a missing gradient is zero."""
    norms = {name: float(gradient.norm()) for name, gradient in right.items()}
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    for name in wrong.keys() | right.keys():
        off = wrong[name] - right[name] if name in wrong and name in right else wrong.get(name, right.get(name))
        if not float(off.norm()) <= ROUNDING * max(norms.get(name, 0.0), 1e-6 * whole):
            return True
    return False


def is_noticed(fault: Detachment, probe: Probe) -> bool:
    """Whether the fault changes the golden values of the model, including those of its next steps."""
    import golden

    if fault.noticed:
        return True
    (subject,) = (subject for subject in golden.subjects() if subject.label == fault.label)
    probe.chosen = fault.identity
    try:
        values = golden.golden_values(subject)
    except Exception:
        return True
    return bool(golden.differences(values, golden.recorded()[fault.label], golden.TOLERANCE))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="of these files (default: all with formulas)")
    parser.add_argument("--count", action="store_true", help="count them, and name those that golden values miss")
    options = parser.parse_args()
    files = options.files or formula_files()
    probe, counts = install(files), Counter[str]()
    faults = []
    for fault in detachments(files, probe, counts):
        faults.append(fault)
        print(json.dumps(fault), flush=True)
    if options.count:
        missed = [fault for fault in faults if not is_noticed(fault, probe)]
        for fault in missed:
            print(f"golden values of {fault.label} miss {fault.identity}")
        print(
            f"{counts['tensors']} tensors that have a gradient: {counts['equivalent']} change none, "
            f"{counts['same']} are the same as others, {len(faults)} faults, "
            f"{len(faults) - len(missed)} of them noticed by golden values"
        )


if __name__ == "__main__":
    main()
