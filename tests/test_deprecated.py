"""Old names of methods: plug-ins that call or override them keep working, with a DeprecationWarning."""

import importlib
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import aezoo
from aezoo.bases.distillation import DistilledAutoencoder
from aezoo.bases.entropy_coded import EntropyCoded
from aezoo.bases.mixture_prior import MixturePrior
from aezoo.bases.multimodal import MissingModalities, Multimodal
from aezoo.bases.perceptual_adversarial import PerceptualAdversarial
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.bases.token_prior import IndexPrior
from aezoo.bases.triplet import TripletAutoencoder
from aezoo.deprecated.methods import METHODS
from aezoo.deprecated.paths import ATTRIBUTES, IN_PLACE, MODULES
from aezoo.models.compression.scale_hyperprior import ScaleHyperprior
from aezoo.models.latent_diffusion.autoencoder_kl import AutoencoderKL
from aezoo.models.latent_diffusion.va_vae import VAVAE
from aezoo.models.quantised.vq_vae import VQVAE
from aezoo.models.sparse.sae_l1 import SAEL1
from aezoo.models.variational.mmvae import MMVAE

CLASSES = (
    aezoo.Autoencoder,
    AutoencoderKL,
    DiscreteAutoencoder,
    DistilledAutoencoder,
    EntropyCoded,
    IndexPrior,
    MMVAE,
    MissingModalities,
    MixturePrior,
    Multimodal,
    PerceptualAdversarial,
    SAEL1,
    ScaleHyperprior,
    TripletAutoencoder,
)
MATCH = "is now [a-z_]+, and the old name goes with the next release"
NAMES = [(cls, *names) for cls in CLASSES for names in METHODS[f"{cls.__module__}.{cls.__qualname__}"].items()]


def test_every_class_with_deprecated_names_is_tested():
    assert {f"{cls.__module__}.{cls.__qualname__}" for cls in CLASSES} == {*METHODS}


@pytest.mark.parametrize(("cls", "old", "new"), NAMES)
def test_deprecated_name_calls_renamed_method(cls, old, new, monkeypatch):
    monkeypatch.setattr(cls, new, lambda self, *args, **kwargs: (self, args, kwargs))
    model = object.__new__(cls)
    with pytest.warns(DeprecationWarning, match=rf"{cls.__name__}\.{old} is now {new}") as warned:
        assert getattr(model, old)(1, b=2) == (model, (1,), {"b": 2})
    assert warned[0].filename == __file__


@pytest.mark.parametrize(("cls", "old", "new"), NAMES)
def test_deprecated_override_replaces_renamed_method(cls, old, new, monkeypatch):
    monkeypatch.setattr(cls, new, lambda self, *args: ("parent", *args))

    def method(self, *args):
        return ("child", *getattr(super(made, self), old)(*args))

    with pytest.warns(DeprecationWarning, match=rf"Own\.{old} is now {new}") as warned:
        made = type("Own", (cls,), {old: method})
    assert warned[0].filename == __file__
    further = type("Further", (made,), {})
    for own in (object.__new__(made), object.__new__(further)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert getattr(own, new)(3) == getattr(own, old)(3) == ("child", "parent", 3)


def test_super_call_in_deprecated_override_works():
    with pytest.warns(DeprecationWarning, match=MATCH):

        class Own(VAVAE):
            def besides(self, x, z, mu, g_R):
                return super().besides(x, z, mu, g_R)

    torch.manual_seed(0)
    model, other = Own((3, 16, 16)), VAVAE((3, 16, 16))
    other.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 16, 16)
    torch.manual_seed(1)
    ours = model.loss(x)
    torch.manual_seed(1)
    assert {k: v.item() for k, v in ours.items()} == {k: v.item() for k, v in other.loss(x).items()}


def test_new_override_precedes_deprecated_parent_override():
    with pytest.warns(DeprecationWarning, match=MATCH):

        class Old(VQVAE):
            def books(self, indices):
                return {"old": (indices, ())}

    class New(Old):
        def codebooks(self, indices):
            return {"new": (indices, ())}

    assert [*object.__new__(Old).codebooks(None)] == ["old"]
    assert [*object.__new__(New).codebooks(None)] == ["new"]


def test_deprecated_override_in_mixin_is_used():
    class Mixin:
        def start_from(self, x):
            return "mixin"

    with pytest.warns(DeprecationWarning, match=r"Own\.start_from is now init_from_data"):

        class Own(Mixin, aezoo.Autoencoder):
            pass

    assert object.__new__(Own).init_from_data(None) == "mixin"


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_model_with_deprecated_names_trains():
    """It counts steps, initialises from data and reads its own rows."""
    with pytest.warns(DeprecationWarning, match=MATCH):

        class Own(aezoo.model_class("dense_ae")):
            def __init__(self, input_shape):
                super().__init__(input_shape)
                self.keep_steps()
                self.keep_started()
                self.began_with = 0

            def start_from(self, x):
                self.began_with = len(x)

            def loss(self, x, y=None):
                rows = self.of_all_ranks(x)[self.own_rows(x)]
                return {"loss": super().loss(rows)["loss"] + self.own_rank() + 0 * self.share_of_steps(10)}

    with pytest.warns(DeprecationWarning, match=MATCH):
        model = Own((1, 28, 28))
    loader = DataLoader(torch.rand(16, 1, 28, 28), 8)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.warns(DeprecationWarning, match=MATCH):
        trainer.fit(model, loader, loader)
    assert (model.began_with, int(model.steps), bool(model.started)) == (8, 1, True)


@pytest.mark.filterwarnings("ignore:aezoo.* is now")
@pytest.mark.parametrize("old", [*ATTRIBUTES])
def test_deprecated_module_name_resolves_to_new_one(old):
    module, _, name = old.rpartition(".")
    modules = [importlib.import_module(f"aezoo.{each}") for each in ([module] if module else MODULES)]
    assert any(getattr(each, name, None) is not None for each in modules)


@pytest.mark.parametrize("old", [*IN_PLACE])
def test_deprecated_name_in_current_module_warns(old):
    module, _, name = old.rpartition(".")
    home = importlib.import_module(f"aezoo.{module}")
    with pytest.warns(DeprecationWarning, match=f"{name} is now {IN_PLACE[old]}"):
        found = getattr(home, name)
    assert found is getattr(home, IN_PLACE[old])
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        home.nothing  # noqa: B018
