"""The listed private names of libraries exist and are used, and no others are used."""

import json
import subprocess
import sys
from pathlib import Path

import private_name_scan as scan
import pytest

from aezoo.training import private_names
from aezoo.training.private_names import PRIVATE_NAMES


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.name)
def test_private_name_exists_in_installed_library(entry):
    try:
        scan.find(entry.name)
    except LookupError as error:
        files = ", ".join(entry.files)
        pytest.fail(f"{error}, which {files} uses: {entry.why}. Without it: {entry.without}")


@pytest.mark.slow
@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.name)
def test_entry_lists_files_using_the_name(entry):
    assert entry.files == scan.files_of(entry.name), "run python tests/private_name_scan.py --write"


@pytest.mark.slow
def test_every_used_private_name_is_listed():
    assert not scan.unlisted(), "use a public name, or add an entry to aezoo/training/private_names.py"


def test_names_are_listed_once_with_reason_and_consequence():
    assert len({entry.name for entry in PRIVATE_NAMES}) == len(PRIVATE_NAMES)
    assert all(entry.why and entry.without for entry in PRIVATE_NAMES)


@pytest.mark.slow
def test_fit_runs_without_any_name_that_only_speed_needs():
    script = Path(scan.__file__).with_name("missing_private_names.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout[run.stdout.index("{") :]) == {}


def test_names_that_only_speed_needs_are_used_only_there():
    uses = {file for entry in PRIVATE_NAMES if entry.without == private_names._SLOWER for file in entry.files}
    assert all(file.startswith("speed/") for file in uses), sorted(uses)


def test_missing_private_name_is_reported():
    for name, words in (
        ("torch._no_such_function", "torch has no _no_such_function"),
        ("lightning.pytorch.Trainer._no_such_attribute", "Trainer has no _no_such_attribute"),
        ("no_such_library.x", "no module no_such_library"),
    ):
        with pytest.raises(LookupError, match=words):
            scan.find(name)


@pytest.mark.parametrize(
    ("line", "use"),
    [
        ("from torch._inductor import ir", "torch._inductor.ir"),
        ("import torch._dynamo as dynamo\ndynamo.reset()", "torch._dynamo.reset"),
        ("import torch\ndef f(x): torch._foreach_add_(x, x)", "torch._foreach_add_"),
        ("import torch\ngetattr(torch.ops.mkldnn, '_linear_pointwise', None)", "torch.ops.mkldnn._linear_pointwise"),
        ("def f(trainer): trainer._results.clear()", "_results"),
        ("def f(trainer): setattr(trainer, '_unheard_of', 1)", "_unheard_of"),
        ("from torch import nn\nclass A(nn.Module):\n    def _apply(self, fn): return self", "_apply"),
        ("from torch import nn\nclass A(nn.Module):\n    def f(self): return self._modules", "_modules"),
        ("def f():\n    import torch._dynamo.config as settings\n    return settings", "torch._dynamo.config"),
        ("NEEDED = ('fit_loop._unheard_of.done', 'val_check_batch')", "_unheard_of"),
        ("def f(loop): return all(hasattr(loop, name) for name in ['_unheard_of'])", "_unheard_of"),
        ("def f(module): vars(module)['_unheard_of'] = 1", "_unheard_of"),
        ("def f(module): return vars(module)['_unheard_of']", "_unheard_of"),
        (
            "from lightning.pytorch import LightningModule\nclass A(LightningModule):\n"
            "    def f(self): self._hparams_name = None",
            "_hparams_name",
        ),
        (
            "from lightning.pytorch import LightningModule\nclass A(LightningModule):\n"
            "    def f(self): self._hparams_initial = None",
            "_hparams_initial",
        ),
    ],
)
def test_private_name_use_is_detected(line, use, tmp_path, monkeypatch):
    (tmp_path / "aezoo_example.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(scan, "ROOT", tmp_path)
    monkeypatch.delitem(scan.sys.modules, "aezoo_example", raising=False)
    assert use in scan.File(tmp_path / "aezoo_example.py", own=set(), theirs=set()).uses


def test_own_private_names_are_not_counted(tmp_path, monkeypatch):
    text = "from torch import nn\nclass A(nn.Module):\n    _mine = 1\n    def f(self): return self._mine, self._other\n"
    (tmp_path / "aezoo_own_names.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(scan, "ROOT", tmp_path)
    assert not scan.File(tmp_path / "aezoo_own_names.py", own=set(), theirs=set()).uses
