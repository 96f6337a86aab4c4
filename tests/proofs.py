"""Count what each model has passed: a pytest plugin, loaded by `--proofs`.

    pytest tests/laws tests/test_models.py -m "slow or not slow" -k "not slowly" --proofs=tests/proofs.json

writes for every model how many checks of the contract and how many laws (tests under tests/laws that build it) passed
in that run. Models that a fixture builds for several tests count in the first of them. The README's table of models
shows the figures; `python -m benchmarks.recipes --tables` writes it.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).with_suffix(".json")
KINDS = ("contract", "laws")


class Proofs:
    """The plugin, in the process that gathers reports and in those that run tests.

    Args:
        file: where the counts go.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.built = file, set()
        self.counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self._record()

    def _record(self) -> None:
        from aezoo.autoencoder import Autoencoder

        original_init = Autoencoder.__init__

        def recording_init(model: Autoencoder, *args: Any, **kwargs: Any) -> None:
            self.built.add(type(model))
            original_init(model, *args, **kwargs)

        Autoencoder.__init__ = recording_init

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.built.clear()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        from aezoo.registry import name_of

        result = yield
        callspec = getattr(item, "callspec", None)
        if "laws" in item.path.parts:
            names = {name_of(cls) for cls in self.built} - {None}
            item.user_properties.append(("laws", sorted(names)))
        elif item.path.name == "test_models.py" and callspec is not None and "check" in callspec.params:
            item.user_properties.append(
                ("contract", [str(callspec.params["name"])] if "name" in callspec.params else [])
            )
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for kind, names in report.user_properties:
                if kind in self.counts:
                    self.counts[kind].update(names)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        names = sorted({*self.counts["contract"], *self.counts["laws"]})
        found = {name: {kind: self.counts[kind][name] for kind in KINDS} for name in names}
        self.file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
