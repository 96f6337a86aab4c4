"""Names, families, plug-ins and cards; plug-ins are distributions on the path, without pip."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from golden import own_models

import aezoo
from aezoo import registry
from aezoo.cli.config_resolution import expand
from aezoo.deprecated.paths import ATTRIBUTES, MODULES, MOVED
from aezoo.errors import AezooError

PLUGIN = '''"""A plug-in (Nobody 2020), https://example.org/paper"""

from aezoo.models.classic.linear_ae import LinearAE


class MyAE(LinearAE):
    """A plug-in."""
'''


@pytest.fixture(autouse=True)
def _fresh_registry():
    registry.entries.cache_clear()
    yield
    registry.entries.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution with one module and entry points on the path."""
    modules = []

    def put(package, points, source=PLUGIN):
        module = package.replace("-", "_")
        site = tmp_path / f"{package}-site"
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {module}{attribute}" for name, attribute in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[aezoo.models]", *lines, ""]))
        (site / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(site)
        modules.append(module)
        registry.entries.cache_clear()
        return module

    yield put
    for module in modules:
        sys.modules.pop(module, None)


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


# ---- names -----------------------------------------------------------------------------------------------------------


def test_the_models_of_the_zoo():
    expected = {
        "classic": ["contractive_ae", "conv_ae", "denoising_ae", "dense_ae", "linear_ae", "resnet_ae"],
        "sparse": ["sparse_ae_kl", "sparse_ae_l1", "topk_sae"],
        "variational": ["vae"],
    }
    for family, names in expected.items():
        assert set(names) <= set(aezoo.list_models(family=family))
        assert set(names) <= set(aezoo.list_models())


def test_list_models_takes_patterns():
    assert aezoo.list_models("sparse_ae_*") == ["sparse_ae_kl", "sparse_ae_l1"]
    assert aezoo.list_models(["linear_*", "vae"]) == ["linear_ae", "vae"]
    assert aezoo.list_models(["linear_*", "lin*"]) == ["linear_ae"]
    assert aezoo.list_models("?ae") == ["aae", "mae", "rae", "vae"]
    assert aezoo.list_models("*_ae", family="variational") == []
    assert aezoo.list_models("none*") == []


def test_list_models_refuses_an_unknown_family():
    with pytest.raises(AezooError, match=r"unknown family 'variatonal': choose from classic, .*plugin"):
        aezoo.list_models(family="variatonal")
    assert aezoo.list_models("nothing", family="plugin") == []


def test_models_are_listed_in_natural_order(install):
    install("number-ae", {f"n_ae_{i}": ":MyAE" for i in (10, 2, 1, 100)} | {"n_ae": ":MyAE", "n2_b": ":MyAE"})
    assert aezoo.list_models("n[2_]*") == ["n2_b", "n_ae", "n_ae_1", "n_ae_2", "n_ae_10", "n_ae_100"]


def test_plugins_are_sorted_among_models_by_name(install):
    install("one", {"aaa": ":MyAE", "zzz": ":MyAE"})
    names = aezoo.list_models()
    assert names[0] == "aaa"
    assert names[-1] == "zzz"


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("dense", "dense_ae"),
        ("convolutional", "conv_ae"),
        ("denoising", "denoising_ae"),
        ("sparse", "sparse_ae_l1"),
        ("variational", "vae"),
    ],
)
def test_short_names_refer_to_models(word, name):
    assert aezoo.model_class(word) is aezoo.model_class(name)
    assert type(aezoo.create_model(word, input_shape=(1, 8, 8))) is aezoo.model_class(name)
    assert registry.card(word) == registry.card(name)
    assert word not in aezoo.list_models()


def test_names_are_found_in_each_spelling():
    for word, name in [("VAE", "vae"), ("Dense-AE", "dense_ae"), ("TopKSAE", "topk_sae"), ("Convolutional", "conv_ae")]:
        assert registry.find(word).name == name
    letters = [name.replace("_", "") for name in aezoo.list_models()]
    assert len(set(letters)) == len(letters)


def test_search_matches_parts_of_names_and_families():
    sparse = aezoo.list_models(family="sparse")
    assert registry.search(["sparse"]) == registry.search(["Spars"]) == sorted({*sparse, "k_sparse"}, key=sparse.index)
    assert registry.search(["latent-diff"], "latent_diffusion") == aezoo.list_models(family="latent_diffusion")
    assert registry.search(["conv"]) == ["conv_ae", "masked_conv_ae"]
    assert registry.search(["conv", "linear_*"], "classic") == ["conv_ae", "linear_ae"]
    assert registry.search(["v*ae"]) == aezoo.list_models("v*ae")
    assert registry.search(["my"]) == []


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("vea", "vae"), ("VEA", "vae"), ("dens-ae", "dense_ae"), ("convolutionl", "convolutional"), ("topk", "topk_sae")],
)
def test_unknown_name_suggests_a_similar_one(asked, meant):
    for call in (aezoo.create_model, aezoo.model_class, registry.card):
        with pytest.raises(AezooError, match=f"unknown model '{asked}', did you mean .*'{meant}'"):
            call(asked)


def test_dissimilar_name_gets_no_suggestion():
    with pytest.raises(AezooError, match=r"unknown model 'qqqqqq'\. See `aezoo list`"):
        aezoo.create_model("qqqqqq")


def test_unknown_hyperparameter_suggests_a_similar_one():
    with pytest.raises(AezooError, match="vae has no hyperparameter 'latent_dims': did you mean 'latent_dim'"):
        aezoo.create_model("variational", input_shape=(4,), latent_dims=3)
    with pytest.raises(AezooError, match=r"vae has no hyperparameter 'qqqq': It has latent_dim, .*beta"):
        aezoo.create_model("vae", qqqq=3)


def test_create_model_passes_values_on():
    model = aezoo.create_model("vae", input_shape=[3, 8, 8], latent_dim=5, hidden_dims=(9,))
    assert (model.input_shape, model.code_shape) == ((3, 8, 8), (5,))
    assert aezoo.create_model("vae").input_shape == (1, 28, 28)


@pytest.mark.parametrize("name", own_models())
def test_names_and_classes_roundtrip(name):
    cls = aezoo.model_class(name)
    assert registry.name_of(cls) == name
    assert cls.__module__ == f"aezoo.models.{registry.find(name).family}.{name}"


def test_unregistered_class_has_no_name():
    class Mine(aezoo.model_class("vae")):
        """A class that is not registered."""

    assert registry.name_of(Mine) is None
    assert registry.name_of(aezoo.Autoencoder) is None


# ---- plug-ins --------------------------------------------------------------------------------------------------------


def test_plugin_model_is_listed_and_created(install):
    module = install("nice-ae", {"nice_ae": ":MyAE"})
    assert module not in sys.modules
    assert aezoo.list_models(family="plugin") == ["nice_ae"]
    assert registry.card("nice_ae").summary == "A plug-in (Nobody 2020), https://example.org/paper"
    assert module not in sys.modules, "listing or describing a plug-in must not run it"
    model = aezoo.create_model("nice_ae", input_shape=(6,), latent_dim=2)
    assert type(model).__name__ == "MyAE"
    assert registry.name_of(type(model)) == "nice_ae"
    assert registry.find("nice_ae").owner == "nice-ae"
    assert registry.import_plugins() == ["nice_ae"]


def test_plugin_gives_or_inherits_tags_and_needs_none(install):
    own = "\n\nclass Strange(MyAE, tags=('anomaly', 'latent diffusion')):\n    pass\n"
    bare = "from aezoo import Autoencoder\n\n\nclass Bare(Autoencoder):\n    pass\n"
    module = install("nice-ae", {"nice_ae": ":MyAE", "strange_ae": ":Strange"}, PLUGIN + own)
    install("bare-ae", {"bare_ae": ":Bare"}, bare)
    install("lost-ae", {"lost_ae": ":Lost"}, "class Lost(:\n")
    assert registry.uses_of("nice_ae") == registry.uses_of("linear_ae") == ("representation",)
    assert registry.uses_of("strange_ae") == ("anomaly", "latent diffusion")
    assert registry.uses_of("bare_ae") == registry.uses_of("lost_ae") == ()
    assert "strange_ae" in aezoo.list_models(tag="anomaly") and "strange_ae" in registry.search(["anomaly"])
    assert {"nice_ae", "bare_ae", "lost_ae"}.isdisjoint(aezoo.list_models(tag="anomaly"))
    assert module not in sys.modules


def test_plugin_may_use_nested_attribute(install):
    deep = "import types\n\n\nhome = types.SimpleNamespace(models=types.SimpleNamespace(Deep=MyAE))\n"
    install("deep-ae", {"deep_ae": ":home.models.Deep"}, PLUGIN + deep)
    model = aezoo.create_model("deep_ae", input_shape=(6,), latent_dim=2)
    assert registry.name_of(type(model)) == "deep_ae"


def test_two_packages_with_one_name_are_both_named(install):
    install("first-ae", {"my_ae": ":MyAE"})
    install("second-ae", {"my_ae": ":MyAE"})
    for call in (aezoo.list_models, lambda: aezoo.create_model("vae"), lambda: registry.card("my_ae")):
        with pytest.raises(AezooError, match="'my_ae'") as caught:
            call()
        assert "first-ae (first_ae:MyAE)" in str(caught.value)
        assert "second-ae (second_ae:MyAE)" in str(caught.value)


def test_a_plugin_cannot_take_a_name_of_the_zoo(install):
    install("greedy-ae", {"vae": ":MyAE"})
    with pytest.raises(AezooError, match="two models are named 'vae'") as caught:
        aezoo.list_models()
    assert "aezoo (aezoo.models.variational.vae)" in str(caught.value)
    assert "greedy-ae (greedy_ae)" in str(caught.value)


def test_plugin_cannot_use_reserved_short_name(install):
    install("greedy-ae", {"sparse": ":MyAE"})
    with pytest.raises(AezooError, match="greedy-ae registers 'sparse', a word that aezoo reserves for sparse_ae_l1"):
        aezoo.list_models()


def test_duplicate_package_on_path_is_counted_once(install, tmp_path, monkeypatch):
    install("nice-ae", {"nice_ae": ":MyAE"})
    copy = tmp_path / "again"
    (tmp_path / "nice-ae-site").rename(copy)
    install("nice-ae", {"nice_ae": ":MyAE"})
    monkeypatch.syspath_prepend(copy)
    assert aezoo.list_models(family="plugin") == ["nice_ae"]


@pytest.mark.parametrize(
    ("source", "attribute", "reason"),
    [
        ("import a_package_that_nobody_has\n", ":MyAE", "No module named 'a_package_that_nobody_has'"),
        ("class MyAE(:\n", ":MyAE", "SyntaxError"),
        ("1 / 0\n", ":MyAE", "ZeroDivisionError"),
        ("raise SystemExit(3)\n", ":MyAE", "SystemExit: 3"),
        ("", ":MyAE", "has no attribute 'MyAE'"),
        (
            "class MyAE: pass\n",
            ":MyAE",
            "the model 'sad_ae', sad_ae of package sad-ae, must give one subclass of aezoo.A",
        ),
        ("MyAE = 3\n", ":MyAE", "must give one subclass of aezoo.Autoencoder"),
        ("from aezoo import Autoencoder\n", "", "must give one subclass of aezoo.Autoencoder"),
    ],
)
def test_a_broken_plugin_is_named_and_the_rest_works(install, source, attribute, reason):
    install("sad-ae", {"sad_ae": attribute}, source)
    install("nice-ae", {"nice_ae": ":MyAE"})
    with pytest.warns(UserWarning, match="sad-ae") as caught:
        assert registry.import_plugins() == ["nice_ae"]
    (warning,) = [str(w.message) for w in caught]
    assert "sad-ae" in warning
    assert reason in warning
    assert "left out" in warning
    assert len(warning.splitlines()) == 1
    with pytest.raises(AezooError, match="sad-ae"):
        aezoo.create_model("sad_ae")
    assert "sad_ae" in aezoo.list_models()
    assert aezoo.create_model("vae", input_shape=(4,)).input_shape == (4,)


def test_working_plugins_raise_no_warning(install):
    install("nice-ae", {"nice_ae": ":MyAE"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.import_plugins()


@pytest.mark.parametrize("source", ["class MyAE(:\n", "\x00"])
def test_card_of_broken_plugin_names_package(install, source):
    install("sad-ae", {"sad_ae": ":MyAE"}, source)
    with pytest.raises(AezooError, match="'sad_ae' of package sad-ae is broken"):
        registry.card("sad_ae")


def test_card_of_missing_plugin_module_names_package(install, tmp_path):
    install("gone-ae", {"gone_ae": ":MyAE"})
    (tmp_path / "gone-ae-site" / "gone_ae.py").unlink()
    with pytest.raises(AezooError, match="no source file for gone_ae of package gone-ae"):
        registry.card("gone_ae")


# ---- cards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", own_models())
def test_summary_names_paper_and_url(name):
    summary = registry.card(name).summary
    assert re.fullmatch(r"\S.* \(.*\b(19|20)\d\d\b.*\), https?://\S+", summary), summary
    assert summary == (inspect.getdoc(sys.modules[aezoo.model_class(name).__module__]) or "").splitlines()[0]


@pytest.mark.parametrize("name", own_models())
def test_card_lists_class_parameters(name):
    card, cls = registry.card(name), aezoo.model_class(name)
    assert card.text
    assert card.about
    parameters = inspect.signature(cls).parameters
    assert [p[0] for p in card.parameters] == list(parameters)
    for parameter, kind, default, meaning in card.parameters:
        assert kind
        assert meaning
        if parameter != "input_shape":
            assert eval(compile(ast.parse(default, mode="eval"), "default", "eval")) == parameters[parameter].default


def test_card_without_constructor_has_parent_arguments(install):
    own = "\n\nclass Middle(MyAE):\n    pass\n\n\nclass Last(Middle):\n    '''A plug-in of a plug-in.'''\n"
    install("nice-ae", {"last_ae": ":Last"}, PLUGIN + own)
    card = registry.card("last_ae")
    assert card.about == "A plug-in of a plug-in."
    assert card.parameters == registry.card("linear_ae").parameters
    install("ring-ae", {"ring_ae": ":A"}, "class A(B): pass\nclass B(A): pass\nclass C(x.Y): pass\n")
    assert registry.card("ring_ae").parameters == ()


def test_dotted_plugin_name_and_kwargs_are_supported(install):
    source = (
        PLUGIN + "\n    def __init__(self, input_shape, **kwargs):\n        super().__init__(input_shape, **kwargs)\n"
    )
    module = install("nice-ae", {"nice.ae": ":MyAE"}, source)
    flags = expand(["fit", "--model", "nice.ae", "--data", "digits"]).argv
    assert flags[flags.index("--model") + 1] == f"{module}.MyAE"
    assert aezoo.create_model("nice.ae", input_shape=(4,), latent_dim=3).code_shape == (3,)


def test_card_describes_reexported_class(tmp_path, monkeypatch, install):
    module = install("handing-on", {"handed_ae": ":Handed"}, "from .far_away.models import MyAE as Handed\n")
    home = tmp_path / "handing-on-site"
    (home / module).mkdir()
    (home / f"{module}.py").rename(home / module / "__init__.py")
    (home / module / "far_away").mkdir()
    (home / module / "far_away" / "__init__.py").touch()
    (home / module / "far_away" / "models.py").write_text("from handing_on.far_away.own import MyAE\n")
    init = "\n    def __init__(self, input_shape, *, width: int = 3):\n        pass\n"
    (home / module / "far_away" / "own.py").write_text(PLUGIN + init)
    card = registry.card("handed_ae")
    assert card.summary == "A plug-in (Nobody 2020), https://example.org/paper"
    assert ("width", "int", "3", "") in card.parameters
    (home / module / "far_away" / "own.py").unlink()
    assert registry.card("handed_ae").parameters == ()
    # a cyclic import, in which no module defines the class
    (home / module / "far_away" / "models.py").write_text("from handing_on import Handed as MyAE\n")
    assert registry.card("handed_ae").parameters == ()


@pytest.mark.slow
def test_cards_and_names_need_no_torch():
    code = (
        "import sys, aezoo; from aezoo import registry; names = aezoo.list_models()\n"
        "cards = [registry.card(name) for name in names]; assert all(c.summary and c.parameters for c in cards)\n"
        "print(len(names), sorted(m for m in ('torch', 'lightning', 'numpy', 'sklearn') if m in sys.modules))"
    )
    assert python(code) == f"{len(aezoo.list_models())} []"


def test_import_aezoo_loads_no_torch():
    code = "import sys; before = set(sys.modules); import aezoo; print(*sorted(set(sys.modules) - before))"
    loaded = python(code).split()
    assert "aezoo" in loaded
    assert not {"torch", "lightning", "numpy", "aezoo.autoencoder"} & set(loaded)
    assert len(loaded) < 30, loaded


@pytest.mark.slow
def test_submodules_are_available_after_import_aezoo():
    code = "import aezoo; print(aezoo.registry.find.__name__, hasattr(aezoo, 'nowhere'), hasattr(aezoo, '_none'))"
    assert python(code) == "find False False"


@pytest.mark.parametrize("old", [*MODULES])
def test_old_module_path_warns_and_redirects(old):
    sys.modules.pop(f"aezoo.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"aezoo.{old} is now {MODULES[old]}") as warned:
        module = importlib.import_module(f"aezoo.{old}")
    assert len(warned) == 1
    new = importlib.import_module(MODULES[old])
    names = [name for name in vars(new) if not name.startswith("__") and f"{old}.{name}" not in MOVED]
    assert names and all(getattr(module, name) is getattr(new, name) for name in names)


@pytest.mark.filterwarnings("ignore:aezoo.* is now:DeprecationWarning")
@pytest.mark.parametrize("path", [*MOVED])
def test_moved_names_are_found_at_old_paths(path):
    old, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(f"aezoo.{old}"), name)
    assert found is getattr(importlib.import_module(MOVED[path]), ATTRIBUTES.get(name, name))


@pytest.mark.slow
def test_documented_old_paths_keep_working():
    code = "from aezoo.checkpoint import load_run; from aezoo.acceleration import keep_pages; import aezoo.constraint"
    code += "; print(load_run.__module__, keep_pages.__module__, aezoo.constraint.Constrained.__module__)"
    assert python(code) == "aezoo.io.checkpoint aezoo.speed.malloc aezoo.training.projected_weights"


def test_public_names_exist():
    assert all(getattr(aezoo, name) is not None for name in aezoo.__all__)
    assert set(aezoo.__all__) <= set(dir(aezoo))
    assert len(aezoo.__all__) <= 21  # the core, import_model, show, a function for each command, at_size and tiled
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        aezoo.create_modle  # noqa: B018


def test_model_files_are_short() -> None:
    folder = Path(aezoo.__file__).parent / "models"
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*/*.py")}
    assert {path.stem for path in lines} >= {*aezoo.list_models()}
    assert max(lines.values()) <= 300, max(lines, key=lines.__getitem__)
