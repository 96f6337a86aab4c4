"""Virtual environments for parties whose packages may conflict with those of the project."""

import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

# packages that pip installs for a party; parties not named here run in this environment
PACKAGES: dict[str, tuple[str, ...]] = {
    "keras_torch": ("keras>=3,<4",),
    "keras_jax": ("keras>=3,<4", "jax"),
    # CPU wheels; `tensorflow` is the same with GPU code
    "keras_tensorflow": ("keras>=3,<4", "tensorflow-cpu"),
    "pythae": ("pythae",),
}
# the same for --accelerator cuda, where they differ
CUDA_PACKAGES: dict[str, tuple[str, ...]] = {
    "keras_jax": ("keras>=3,<4", "jax[cuda12]"),
    "keras_tensorflow": ("keras>=3,<4", "tensorflow[and-cuda]"),
}
# these parties can also import this environment's packages, after their own, so all PyTorch parties run the same build
SHARED = ("keras_torch", "pythae")


class EnvironmentFailure(RuntimeError):
    """pip could not make an environment; the message is one line."""


def default_folder() -> Path:
    """The folder of environments if --envs is not given."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "aezoo-peers"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "aezoo-peers"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aezoo-peers"


def python_for(party: str, folder: Path, accelerator: str = "cpu") -> str:
    """The interpreter that runs a party on cpu or cuda; makes its environment in `folder` if it does not exist.

    Raises:
        EnvironmentFailure: pip's last line.
    """
    party = party.removesuffix("_bf16")
    if party not in PACKAGES:
        return sys.executable
    packages = PACKAGES[party]
    home = folder / party
    if accelerator == "cuda" and party in CUDA_PACKAGES:
        packages, home = CUDA_PACKAGES[party], folder / f"{party}_cuda"
    wanted = "\n".join(packages)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    mark = home / "complete"
    if python.exists() and mark.is_file() and mark.read_text() == wanted:
        return str(python)
    print(f"making the environment of {party} in {home} ...", flush=True)
    try:
        venv.create(home, clear=True, with_pip=True)
        if party in SHARED:
            _share_packages(home)
        command = [str(python), "-m", "pip", "install", "--quiet", *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentFailure(f"no environment for {party}: {error}") from error
    if done.returncode:
        last = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise EnvironmentFailure(f"no environment for {party}: {last}")
    mark.write_text(wanted)
    return str(python)


def _share_packages(home: Path) -> None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise EnvironmentFailure("torch is not installed")
    packages = Path(spec.origin).parent.parent
    (site,) = [*home.glob("lib/python*/site-packages"), *home.glob("Lib/site-packages")][:1]
    (site / "shared.pth").write_text(f"{packages}\n")
