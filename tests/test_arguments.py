"""Forwarded constructor arguments: signatures, checks, hyperparameters, command line options and cards."""

import ast
import copy
import inspect
import pickle
import re
import sys
from pathlib import Path
from typing import Any, Unpack, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from golden import own_models
from torch import Tensor, nn

import aezoo
from aezoo import registry
from aezoo.autoencoder import Autoencoder
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.models.variational.beta_vae import BetaVAE
from aezoo.models.variational.vae import VAE
from aezoo.testing import check_constructor, check_gradients, check_seed
from aezoo.training.arguments import OptimizerArgs, TrainingArgs
from aezoo.training.traits import Traits

SHARED = ["likelihood", "lr", "optimizer", "weight_decay", "lr_schedule", "warmup_steps"]


class Linear(Autoencoder, defaults={"likelihood": "gaussian", "lr": 0.1}, sparse_code=True):
    """One linear layer as encoder and decoder.

    Args:
        width: size of the code.
        **kwargs: see `Autoencoder`.
    """

    def __init__(self, input_shape: tuple[int, ...], *, width: int = 2, **kwargs: Unpack[TrainingArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        self.code_shape = (width,)
        self.encoder = nn.Linear(self.input_shape[0], width)
        self.decoder = nn.Linear(width, self.input_shape[0])

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.encoder(x)), x).mean()
        return {"loss": nll, "nll": nll}


class Wide(Linear, defaults={"width": 3, "lr": 0.2}):
    """The same with other defaults."""


class Fixed(Linear):
    """Sets an argument of its parent itself, which it then no longer takes.

    Args:
        depth: unused.
        **kwargs: see `Linear`.
    """

    def __init__(self, input_shape: tuple[int, ...], *, depth: int = 1, **kwargs: Unpack[OptimizerArgs]) -> None:
        super().__init__(input_shape, likelihood="laplace", **kwargs)


class Quick(Autoencoder, defaults={"lr": 0.5}):
    """A base without a constructor."""


class Mixed(Linear, Quick):
    """Has no defaults of its own."""


class Old(VAE):
    """A model with an explicit constructor, as in earlier versions.

    Args:
        input_shape: shape of one sample.
        latent_dim: size of the code.
        extra: unused.
    """

    has_prior = False

    def __init__(self, input_shape: tuple[int, ...], *, latent_dim: int = 3, extra: str = "a") -> None:
        super().__init__(input_shape, latent_dim=latent_dim, net="mlp", hidden_dims=(5,))
        extra = extra.upper()
        self.save_hyperparameters()


def defaults(cls: type) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(cls).parameters.items() if name != "input_shape"}


# ---- signatures ------------------------------------------------------------------------------------------------------


def test_signature_includes_forwarded_arguments():
    assert [*inspect.signature(Linear).parameters] == ["input_shape", "width", *SHARED]
    parameter = inspect.signature(Linear).parameters["lr"]
    assert (parameter.kind, parameter.annotation, parameter.default) == (parameter.KEYWORD_ONLY, float, 0.1)
    assert [*inspect.signature(Linear.__init__).parameters] == ["self", "input_shape", "width", *SHARED]


def test_defaults_come_from_nearest_class():
    assert {name: defaults(Linear)[name] for name in ("likelihood", "lr")} == {"likelihood": "gaussian", "lr": 0.1}
    assert defaults(Wide) == defaults(Linear) | {"width": 3, "lr": 0.2}
    assert defaults(BetaVAE) == defaults(VAE) | {"beta": 4.0}
    wide = Wide((4,))
    assert (wide.code_shape, wide.lr, type(wide.likelihood)) == ((3,), 0.2, type(Linear((4,)).likelihood))
    assert (Wide((4,), width=5, lr=0.3).code_shape, Wide((4,), lr=0.3).lr) == ((5,), 0.3)


def test_fixed_argument_is_removed_from_signature():
    assert [*inspect.signature(Fixed).parameters] == ["input_shape", "depth", "lr", *SHARED[2:]]
    assert type(Fixed((4,)).likelihood).__name__ == "Laplace"
    with pytest.raises(TypeError, match=r"^Fixed.__init__\(\) got an unexpected keyword argument 'likelihood'$"):
        Fixed((4,), likelihood="gaussian")


def test_multiple_inheritance_follows_mro():
    # the default of Linear comes first, or without one that of Quick
    assert defaults(Mixed)["lr"] == Mixed((4,)).lr == 0.1

    class Bare(Autoencoder):
        def __init__(self, input_shape: tuple[int, ...], *, width: int = 2, **kwargs: Unpack[TrainingArgs]) -> None:
            super().__init__(input_shape, **kwargs)

    class Both(Bare, Quick):
        pass

    assert defaults(Bare)["lr"] == Bare((4,)).lr == 1e-3
    assert defaults(Both)["lr"] == Both((4,)).lr == Both((4,)).hparams["lr"] == 0.5


def test_subclass_defaults_do_not_change_parent_signature():
    before = inspect.signature(VAE)

    class Own(VAE, defaults={"beta": 9.0}):
        pass

    assert inspect.signature(VAE) == before
    assert VAE((4,)).beta == 1.0
    assert Own((4,)).beta == 9.0


@pytest.mark.parametrize("name", own_models())
def test_argument_group_types_match_constructors(name):
    cls = aezoo.model_class(name)
    parameters = inspect.signature(cls).parameters
    for parent in cls.__mro__:
        init = vars(parent).get("__init__")
        hint = get_type_hints(init).get("kwargs") if inspect.isfunction(init) and parent is not object else None
        if get_origin(hint) is Unpack:
            for key, kind in get_type_hints(get_args(hint)[0]).items():
                assert key not in parameters or parameters[key].annotation == kind, key
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())


def test_a_copy_and_a_pickle_keep_arguments():
    model = Wide((4,), lr=0.3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is Wide
        assert other.hparams == model.hparams


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"widht": 3}, "Wrong: default of an unknown argument 'widht', did you mean 'width'\\?$"),
        ({"qqqq": 3}, "default of an unknown argument 'qqqq': it has width, likelihood, lr, "),
        ({"input_shape": 3}, "Wrong: input_shape takes a list of whole numbers, got 3"),
        ({"width": "3"}, "Wrong: width takes a whole number of at most 64 bits, got '3'$"),
    ],
)
def test_a_wrong_default_is_refused_when_the_class_is_made(given, message):
    with pytest.raises(AezooError, match=message) as error:
        type("Wrong", (Linear,), {}, defaults=given)
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_refused_in_the_name_of_the_class():
    words = r"^BetaVAE.__init__\(\) got an unexpected keyword argument 'latent', did you mean 'latent_dim'\?$"
    with pytest.raises(TypeError, match=words):
        BetaVAE((4,), latent=3)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'input_shape'"):
        BetaVAE()
    with pytest.raises(AezooError, match=r"^beta_vae: lr takes a finite number of at most 1e9, got 'a'$"):
        BetaVAE((4,), lr="a")
    with pytest.raises(AezooError, match=r"^beta_vae: hidden_dims takes a list of whole numbers, got 8: give \(8,\)$"):
        BetaVAE((4,), hidden_dims=8)
    with pytest.raises(AezooError, match="no hyperparameter 'latent_dmi': did you mean 'latent_dim'"):
        aezoo.create_model("beta_vae", (4,), latent_dmi=3)


# ---- hyperparameters -------------------------------------------------------------------------------------------------


def test_hyperparameters_are_complete_without_being_saved():
    model = BetaVAE((4,), latent_dim=3)
    assert dict(model.hparams) == defaults(BetaVAE) | {"latent_dim": 3, "hidden_dims": (400,), "input_shape": (4,)}
    assert dict(model.hparams_initial) == dict(model.hparams)
    assert dict(Linear(input_shape=(4,)).hparams) == defaults(Linear) | {"input_shape": (4,)}


def test_a_checkpoint_gives_the_same_model(tmp_path):
    model = Wide((4,), width=5, warmup_steps=2)
    path = tmp_path / "wide.ckpt"
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save(content | {"hparams_name": model._hparams_name, "pytorch-lightning_version": "2.6.0"}, path)
    other = Wide.load_from_checkpoint(path, weights_only=True)
    assert other.hparams == model.hparams
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_old_style_models_are_supported():
    model = Old((4,), latent_dim=2)
    assert dict(model.hparams) == {"input_shape": (4,), "latent_dim": 2, "extra": "A"}  # value at save_hyperparameters
    assert dict(model.hparams_initial) == dict(model.hparams)
    assert not model.has_prior
    assert model.normal_prior
    check_constructor(Old, extra="B")


def test_ignored_arguments_are_not_hyperparameters():
    class Helped(Old):
        def __init__(self, input_shape: tuple[int, ...], *, helper: Any = None, other: Any = None) -> None:
            super().__init__(input_shape)
            self.save_hyperparameters(ignore=["helper"])

    assert dict(Helped((4,), helper=len).hparams) == {"input_shape": (4,), "other": None}
    assert "other" not in Helped((4,), other=nn.Linear(1, 1)).hparams  # modules are saved as weights


def test_repeated_save_hyperparameters_has_no_effect():
    class Again(Linear):
        def __init__(self, input_shape: tuple[int, ...], *, more: int = 1, **kwargs: Unpack[TrainingArgs]) -> None:
            super().__init__(input_shape, **kwargs)
            self.save_hyperparameters()
            self.save_hyperparameters("more")
            self.save_hyperparameters({"width": 2}, logger=False)

    model = Again((4,), lr=0.4)
    assert dict(model.hparams) == defaults(Linear) | {"lr": 0.4, "input_shape": (4,), "more": 1}
    assert not model._log_hyperparams


def test_star_args_constructor_stores_given_arguments():
    class Bulk(Linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    assert dict(Bulk((4,), width=3).hparams) == {"input_shape": (4,), "width": 3}
    assert dict(Bulk(input_shape=(4,)).hparams) == {"input_shape": (4,)}


# ---- traits ----------------------------------------------------------------------------------------------------------


def test_traits_are_attributes_and_inherited():
    assert Linear.sparse_code
    assert Wide((4,)).sparse_code
    assert not Linear.has_prior
    assert Autoencoder.not_averaged == ()

    class Back(Linear, sparse_code=False, not_averaged=("a",)):
        pass

    assert (Back.sparse_code, Back.not_averaged, Linear.sparse_code) == (False, ("a",), True)


def test_an_unknown_trait_is_refused():
    with pytest.raises(AezooError, match=r"^Odd: unknown trait 'has_piror', did you mean 'has_prior'\?$"):
        type("Odd", (Autoencoder,), {}, has_piror=True)
    with pytest.raises(AezooError, match=r"^Odd: unknown trait 'qqqq': there are has_prior, normal_prior, "):
        type("Odd", (Autoencoder,), {}, qqqq=True)
    with pytest.raises(AezooError, match=r"^Odd: has_prior takes a bool, got 'yes'$"):
        type("Odd", (Autoencoder,), {}, has_prior="yes")


def test_every_trait_is_described_and_has_a_value():
    doc = inspect.getdoc(Traits) or ""
    for name in Traits.__annotations__:
        assert f"\n    {name}: " in doc
        assert getattr(Autoencoder, name) in (False, (), "")


# ---- help, config files and cards ------------------------------------------------------------------------------------


def test_variant_help_shows_type_default_and_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "beta_vae"])
    text = " ".join(capsys.readouterr().out.split())
    for name, (_, kind, default, meaning) in {p[0]: p for p in registry.card("beta_vae").parameters}.items():
        if name != "input_shape":
            kind = re.sub(r"(.+) \| None", r"Optional[\1]", kind)
            shown = "null" if default == "None" else default.strip("'")
            assert f"{meaning} (type: {kind}, default: {shown})" in text, name


@pytest.mark.slow
def test_config_file_sets_forwarded_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"model": {"class_path": "beta_vae", "init_args": {"latent_dim": 3, "lr": 0.01, "hidden_dims": [8]}}}
    Path("c.yaml").write_text(yaml.safe_dump(settings))
    quick = ["--data.name=digits", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    main(["fit", "-c", "c.yaml", *quick, "--trainer.logger=false", "--model.net=mlp"])
    stored = next(Path("runs").rglob("*.ckpt"))
    kept = torch.load(stored, weights_only=True)["hyper_parameters"]
    assert kept == defaults(BetaVAE) | {"latent_dim": 3, "lr": 0.01, "hidden_dims": (8,), "input_shape": (1, 8, 8)}


@pytest.mark.parametrize("name", ["beta_vae", "dip_vae_ii", "mean_scale_hyperprior", "abs_topk_sae", "aae"])
def test_default_only_variant_has_no_constructor(name):
    cls = aezoo.model_class(name)
    source = inspect.getsource(sys.modules[cls.__module__])
    assert "def __init__" not in source
    assert name != "beta_vae" or len(source.splitlines()) < 30


class OfNets(NetworkAutoencoder, defaults={"hidden_dims": (6,), "likelihood": "gaussian"}):
    """Networks of any kind.

    Args:
        latent_dim: size of the code.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(self, input_shape: tuple[int, ...], *, latent_dim: int = 2, **kwargs: Unpack[NetworkArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        self.code_shape = (latent_dim,)
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.encoder(x)), x).mean()
        return {"loss": nll, "nll": nll}


@pytest.mark.parametrize("check", [check_constructor, check_gradients, check_seed])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_custom_model_passes_checks(check, net):
    check(OfNets, net=net)
    assert [*inspect.signature(OfNets).parameters][1:5] == ["latent_dim", "net", "hidden_dims", "activation"]
    assert OfNets((1, 8, 8), net=net).hidden_dims == (6,)


def span(*nodes: ast.stmt | ast.expr) -> int:
    return sum((node.end_lineno or 0) - node.lineno + 1 for node in nodes)


@pytest.mark.slow
def test_constructors_take_a_fifth_of_the_model_files():
    """Class docstrings, constructor signatures and super().__init__ calls are at most a fifth of all lines."""
    total = share = 0
    for path in (Path(aezoo.__file__).parent / "models").glob("*/*.py"):
        source = path.read_text(encoding="utf-8")
        total += len(source.splitlines())
        for cls in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]:
            share += span(cls.body[0]) if ast.get_docstring(cls) else 0
            for init in [f for f in cls.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]:
                calls = [node for node in ast.walk(init) if isinstance(node, ast.Call)]
                share += init.body[0].lineno - init.lineno
                share += span(*[call for call in calls if ast.unparse(call.func) == "super().__init__"])
    assert share <= 0.2 * total, (share, total)
