"""Train the same variational models with the zoo and with pythae, and compare the bounds that they reach.

    python -m benchmarks.peers quality
    python -m benchmarks.peers quality --models vae iwae --epochs 20 --seeds 1

Both train the network 784-200-200-code on the digits of mnist5k, binarised once, with the same initial weights, the
same batches in the same order, Adam and the same number of epochs. Each step of both starts from the same seed, so vae,
beta_vae and vamp_vae also get the same noise, which would otherwise cause differences of about a nat. The other models
draw their noise in another order than pythae. The parties do not report the figures themselves: the trained weights of
both are loaded into one model of the zoo, which estimates on the same test digits

    elbo             E_q[log p(x|z) + log p(z) - log q(z|x)], --elbo-samples draws for each digit
    log_likelihood   the importance weighted bound on log p(x), --importance-samples draws

in nats per digit; larger is better. `tighter_by` is the zoo's log_likelihood minus pythae's for the same seed. `gap`,
in the summary printed at the end, is the mean of `tighter_by` over seeds and the standard error of that mean.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import common
from .environments import EnvironmentFailure, default_folder, python_for
from .peer_runs import RunFailure, train
from .peer_scripts.job import Job

# arguments of each model in the zoo; pythae's script translates them to pythae's names
MODELS: dict[str, tuple[str, ...]] = {
    "vae": (),
    "beta_vae": ("beta=0.5",),
    "iwae": ("n_samples=8",),
    "miwae": ("n_groups=4", "n_samples=4"),
    "piwae": ("n_groups=4", "n_samples=4"),
    "ciwae": ("n_samples=8", "beta=0.05"),
    "vamp_vae": ("n_components=100",),
}
PARTIES = ("aezoo", "pythae")
KEY = ("model", "party", "seed", "epochs", "batch", "latent_dim", "importance_samples", "elbo_samples")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = common.build_parser("peers quality", __doc__)
    add, count = parser.add_argument, common.at_least(1)
    add(
        "--models",
        nargs="+",
        choices=list(MODELS),
        default=list(MODELS),
        metavar="NAME",
        help="models to train (default: all)",
    )
    add("--seeds", type=count, default=3, metavar="N", help="seeds 0 to N - 1 of weights, order and noise (default 3)")
    add("--epochs", type=count, default=100, metavar="N", help="epochs of 4,000 digits (default 100)")
    add("--batch", type=count, default=100, metavar="N", help="digits per step (default 100)")
    add("--latent-dim", type=count, default=20, metavar="N", help="numbers in a code (default 20)")
    add(
        "--importance-samples",
        type=count,
        default=1000,
        metavar="N",
        help="draws per digit for log_likelihood (default 1000)",
    )
    add("--elbo-samples", type=count, default=100, metavar="N", help="draws per digit for elbo (default 100)")
    add(
        "--timeout",
        type=common.seconds,
        default=3600.0,
        metavar="S",
        help="give up a run after this many seconds (default 3600)",
    )
    add(
        "--envs",
        type=Path,
        default=default_folder(),
        metavar="DIR",
        help="folder of pythae's environment (default %(default)s)",
    )
    return parser.parse_args(argv)


def model_options(name: str) -> dict[str, Any]:
    """The arguments of a model in the form that the zoo takes."""
    pairs = (option.split("=") for option in MODELS[name])
    return {key: float(value) if "." in value else int(value) for key, value in pairs}


def prepare(folder: Path, arguments: argparse.Namespace, seed: int) -> tuple[Any, Path, Path]:
    """Test digits, and the files of training digits and of initial weights."""
    import numpy as np
    import torch

    import aezoo
    from aezoo.training.seeding import mix

    data = aezoo.DataModule("mnist5k", binarise="static")
    # bytes, because a party may need them
    digits = {stage: (data.tensors(stage)[0].flatten(1) * 255).byte() for stage in ("train", "test")}
    steps = range(-(-len(digits["train"]) // arguments.batch))
    # seeds of the zoo's loop, see `Autoencoder`
    noise = [[mix(seed, 0, epoch, step) for step in steps] for epoch in range(arguments.epochs)]
    np.savez(folder / "data.npz", x_train=digits["train"].numpy(), noise_seeds=np.array(noise))
    torch.manual_seed(seed)
    model: Any = aezoo.create_model("vae", (784,), hidden_dims=(200, 200), latent_dim=arguments.latent_dim)
    np.savez(folder / "weights.npz", *[parameter.detach().numpy() for parameter in model.parameters()])
    return digits["test"].float() / 255, folder / "data.npz", folder / "weights.npz"


def evaluate(name: str, latent_dim: int, trained: Path, x: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Bounds on log p(x) of trained weights, estimated by the same model of the zoo for both parties."""
    import numpy as np
    import torch

    import aezoo

    # a model is a vae whatever bound it was trained on; a VampPrior is part of the model
    kind, extra = ("vamp_vae", model_options(name)) if name == "vamp_vae" else ("vae", {})
    model: Any = aezoo.create_model(kind, (784,), hidden_dims=(200, 200), latent_dim=latent_dim, **extra).eval()
    with np.load(trained) as file, torch.no_grad():
        for i, parameter in enumerate([*model.encoder.parameters(), *model.decoder.parameters()]):
            parameter.copy_(torch.from_numpy(file[f"w{i}"]))
        if name == "vamp_vae":
            held = torch.from_numpy(file["pseudo_inputs"]).reshape(model.pseudo_K.shape)
            model.pseudo_K.copy_(torch.logit(held, 1e-6))
    torch.manual_seed(0)
    log_w = [model.log_likelihood(x, 1) for _ in range(arguments.elbo_samples)]
    bound = torch.cat([model.log_likelihood(part, arguments.importance_samples) for part in x.split(100)])
    return {"elbo": float(torch.stack(log_w).mean()), "log_likelihood": float(bound.mean())}


def measure(row: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one model with one party and evaluate it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        x, data, weights = prepare(folder, arguments, row["seed"])
        job = Job(
            party=f"{row['party']}_quality",
            data=str(data),
            weights=str(weights),
            shape=(784,),
            hidden_dims=(200, 200),
            latent_dim=arguments.latent_dim,
            variational=True,
            rows=4000,
            batch=arguments.batch,
            epochs=arguments.epochs,
            seed=row["seed"],
            options=(f"model={row['model']}", *MODELS[row["model"]], f"out={folder / 'trained.npz'}"),
        )
        try:
            python = python_for(row["party"], arguments.envs.expanduser().absolute())
            found = train(python, job, arguments.timeout)
        except (EnvironmentFailure, RunFailure) as error:
            return row | {"error": str(error)}
        row |= evaluate(row["model"], arguments.latent_dim, folder / "trained.npz", x, arguments)
        return row | {"versions": " ".join(f"{key}={value}" for key, value in found["versions"].items())}


def summary(rows: Sequence[dict[str, str]]) -> str:
    """One line per model: the means of both parties, and how much tighter the zoo's bound is."""
    lines = []
    for name in MODELS:
        found = {party: _rows_by_seed(rows, name, party) for party in PARTIES}
        seeds = sorted(found["aezoo"].keys() & found["pythae"].keys())
        if seeds:
            gaps = [found["aezoo"][seed] - found["pythae"][seed] for seed in seeds]
            error = f" +- {statistics.stdev(gaps) / len(gaps) ** 0.5:.2f}" if len(gaps) > 1 else ""
            means = [statistics.mean(found[party][seed] for seed in seeds) for party in PARTIES]
            lines.append(
                f"{name}: aezoo {means[0]:.2f}, pythae {means[1]:.2f}, gap {statistics.mean(gaps):+.2f}{error}"
            )
    return "\n".join(lines)


def _rows_by_seed(rows: Sequence[dict[str, str]], model: str, party: str) -> dict[str, float]:
    return {
        row["seed"]: float(row["log_likelihood"])
        for row in rows
        if row["model"] == model and row["party"] == party and row.get("log_likelihood")
    }


def _compare(table: common.ResultsCSV, row: dict[str, Any]) -> None:
    """Once both rows exist, write into pythae's row how much tighter the zoo's bound is."""
    with table.update():
        ours, theirs = (table.find({**row, "party": party}) for party in PARTIES)
        if ours and theirs and ours.get("log_likelihood") and theirs.get("log_likelihood"):
            theirs["tighter_by"] = common.as_text(float(ours["log_likelihood"]) - float(theirs["log_likelihood"]))


def main(argv: Sequence[str]) -> int:
    """Measure the requested rows that do not exist yet; 0 if every run succeeded."""
    arguments = parse_arguments(argv)
    path = arguments.results / f"peers-quality-{common.environment(arguments, accelerator='cpu')}.csv"
    kept = [word for i, word in enumerate(argv) if not word.startswith("--envs") and argv[i - 1 : i] != ["--envs"]]
    table = common.ResultsCSV(path, KEY, common.command_line("peers", ["quality", *kept]), arguments.again)
    requested: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for name in arguments.models:
            for party in PARTIES:
                row: dict[str, Any] = {"model": name, "party": party, "seed": seed, "epochs": arguments.epochs}
                row |= {"batch": arguments.batch, "latent_dim": arguments.latent_dim, "options": " ".join(MODELS[name])}
                row |= {"importance_samples": arguments.importance_samples, "elbo_samples": arguments.elbo_samples}
                requested.append(row)
                if not table.needs(row):
                    continue
                row = measure(row, arguments)
                columns = (*KEY, "options", "elbo", "log_likelihood", "tighter_by", "versions", "error")
                table.put({key: row.get(key) for key in columns})
                _compare(table, row)
                print(f"{name} by {party}, seed {seed}: {row.get('error') or row['log_likelihood']}", flush=True)
    rows = [there for row in requested if (there := table.find(row))]
    print(summary(rows))
    print(path)
    return 1 if any(row.get("error") for row in rows) else 0


if __name__ == "__main__":
    common.run_script(lambda: sys.exit(main(sys.argv[1:])))
