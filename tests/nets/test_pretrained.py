"""Cached weights of torch.hub: their location, and messages for missing and broken files."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from aezoo.errors import AezooError
from aezoo.nets.blocks.pretrained import cached_file, cached_weights


@pytest.fixture(autouse=True)
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()


def load(module: nn.Module, name: str, file: Path | None = None) -> None:
    with cached_weights(name, "do without", file) as state:
        module.load_state_dict(state)


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "inception_v3"])
def test_cached_file_matches_torchvision_location(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Path] = []

    def fetch(url: str, file: str, *_: Any, **__: Any) -> None:
        fetched.append(Path(file))
        raise ConnectionError

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(ConnectionError):
        torchvision.models.get_model_weights(name).DEFAULT.get_state_dict()
    assert fetched == [cached_file(name)]


def test_missing_and_broken_weights_are_refused_with_advice(tmp_path: Path) -> None:
    net, advice = (
        nn.Linear(2, 3),
        r"fetch them once, python -c .*models\.resnet18\(weights='DEFAULT'\)\", or do without$",
    )
    with pytest.raises(AezooError, match=rf"^no weights of resnet18 in .*\.pth: {advice}"):
        load(net, "resnet18")
    file = cached_file("resnet18")
    file.write_bytes(b"no weights")
    with pytest.raises(
        AezooError, match=rf"resnet18-\w+\.pth contains no weights of resnet18 \(\w+\): remove it and {advice}"
    ):
        load(net, "resnet18")
    torch.save(nn.Linear(2, 4).state_dict(), file)
    with pytest.raises(AezooError, match=r"\(RuntimeError\): remove it and fetch") as refused:
        load(net, "resnet18")  # of another shape, for which torch's message has several lines
    assert "\n" not in str(refused.value)
    for content, said in ((None, "no weights of a line in"), (b"", r"contains no weights of a line \(\w+\)")):
        own = tmp_path / "own.pth"
        if content is not None:
            own.write_bytes(content)
        with pytest.raises(AezooError, match=rf"{said}.*: give another path, or do without$"):
            load(net, "a line", own)


def test_matching_weights_are_loaded(tmp_path: Path) -> None:
    net, given = nn.Linear(2, 3), nn.Linear(2, 3)
    for name, file in (("resnet18", None), ("a line", tmp_path / "own.pth")):
        torch.save(given.state_dict(), file or cached_file(name))
        load(net, name, file)
        assert torch.equal(net.weight, given.weight)
