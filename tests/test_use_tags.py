"""Tags by use: every model has some, class and source agree, and the command for each tag works."""

import ast

import pytest
import torch
from golden import own_models
from representative_models import others_slow

import aezoo
from aezoo import registry
from aezoo.bases.multimodal import Multimodal
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.nets.blocks.dictionary import Dictionary
from aezoo.tasks.impute import impute
from aezoo.testing import subject_of
from aezoo.testing.subject import quiet_and_isolated
from aezoo.training.traits import TAGS

# denoising is for models used neither for their codes nor for samples
FIXED = {
    *("anomaly", "generation", "compression", "representation", "disentanglement", "interpretability"),
    *("multimodal", "tokenizer", "latent diffusion", "imputation", "denoising"),
}
REPRESENTATIVES = ("memory_ae", "vae", "factorized_prior", "dense_ae", "beta_vae", "topk_sae", "mvae", "vq_vae")
REPRESENTATIVES += ("autoencoder_kl", "jnf", "asymmetric_kl", "dncnn")


def tagged(tag):
    return [name for name in own_models() if tag in registry.uses_of(name)]


def built(name):
    subject = subject_of(name)
    torch.manual_seed(0)
    return subject.build().eval(), subject.data(16)


def test_the_tags_are_fixed():
    assert set(TAGS) == FIXED


@pytest.mark.parametrize("name", own_models())
def test_every_model_gives_tags_in_its_own_file(name):
    uses, cls = registry.uses_of(name), aezoo.model_class(name)
    assert uses and set(uses) <= FIXED and len(set(uses)) == len(uses)
    assert cls.tags == uses
    tree = ast.parse(registry.source_of(registry.find(name)).read_text())
    given = [k for node in tree.body if isinstance(node, ast.ClassDef) for k in node.keywords if k.arg == "tags"]
    assert len(given) == 1


def test_list_models_takes_tags():
    assert set(aezoo.list_models(tag="anomaly")) >= {"deep_svdd", "dagmm", "vae"}
    assert "topk_sae" not in aezoo.list_models(tag="anomaly")
    assert aezoo.list_models(tag="latent_diffusion") == aezoo.list_models(tag="latent diffusion")
    assert "autoencoder_kl" in aezoo.list_models(tag="latent-diffusion")
    assert aezoo.list_models("v*", tag="anomaly") == ["vae"]
    assert aezoo.list_models(tag="anomaly", family="classic") == ["dense_ae", "memory_ae"]
    assert {name.partition(".")[0] for name in aezoo.list_models(tag="anomaly", pretrained=True)} <= {
        *aezoo.list_models(tag="anomaly")
    }
    with pytest.raises(AezooError, match=r"^unknown tag 'anomoly', did you mean 'anomaly'\? There are anomaly, "):
        aezoo.list_models(tag="anomoly")
    with pytest.raises(AezooError, match=r"^unknown tag 'qqqq': There are anomaly, "):
        aezoo.list_models(tag="qqqq")


def test_search_finds_tags():
    assert registry.search(["anomaly"]) == aezoo.list_models(tag="anomaly")
    assert registry.search(["imput"]) == aezoo.list_models(tag="imputation")
    assert registry.search(["tokeniz"], "masked") == ["maetok"]
    assert registry.search(["v*"], tag="anomaly") == ["vae"]


def test_list_and_info_show_tags(capsys):
    main(["list", "--tag", "anomaly"])
    rows = {row.split()[0]: row for row in capsys.readouterr().out.splitlines()}
    assert list(rows) == aezoo.list_models(tag="anomaly")
    assert "generation, representation, anomaly" in rows["vae"] and "http" in rows["vae"]
    main(["list", "anomaly"])
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()] == list(rows)
    main(["info", "dagmm"])
    assert "\nfor anomaly: how strange a sample is: aezoo detect\n" in capsys.readouterr().out
    main(["list", "--pretrained", "--tag", "generation"])
    assert "vae.mnist" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["list", "--tag", "generaton"])
    assert stop.value.code == 2 and "did you mean 'generation'?" in capsys.readouterr().err


def test_a_class_inherits_tags_or_declares_them():
    parent = type("Parent", (aezoo.Autoencoder,), {}, tags=("anomaly",))
    assert type("Child", (parent,), {}).tags == ("anomaly",)
    assert type("Other", (parent,), {}, tags=("generation",)).tags == ("generation",)
    assert aezoo.Autoencoder.tags == ()
    with pytest.raises(AezooError, match=r"^Odd: unknown tag 'anomoly', did you mean 'anomaly'\?"):
        type("Odd", (aezoo.Autoencoder,), {}, tags=("anomoly",))
    with pytest.raises(AezooError, match=r"^Odd: tags takes a tuple, got 'anomaly'$"):
        type("Odd", (aezoo.Autoencoder,), {}, tags="anomaly")


# ---- commands for tagged models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", others_slow(tagged("anomaly"), REPRESENTATIVES))
def test_anomaly_models_work_with_detect(name):
    model, x = built(name)
    with quiet_and_isolated():
        result = aezoo.detect(model, x, baselines=False, n_shown=0)
    assert len(result.scores) == len(x) and torch.isfinite(torch.as_tensor(result.scores)).all()


@pytest.mark.parametrize("name", others_slow(tagged("generation"), REPRESENTATIVES))
def test_generation_models_work_with_generate(name):
    model, x = built(name)
    if model.has_prior:
        samples = aezoo.generate(model, n=3).samples
    else:
        samples = aezoo.generate(model, n=3, fit_on=x, n_components=2).samples
    assert samples.shape == (3, *model.input_shape) and torch.isfinite(torch.as_tensor(samples)).all()
    assert samples.std() > 0


@pytest.mark.parametrize("name", others_slow(tagged("compression"), REPRESENTATIVES))
def test_compression_models_write_files(name, tmp_path):
    model, x = built(name)
    result = aezoo.compress(model, x, compare=False, out=str(tmp_path))
    assert result.mode != "lossless"  # the model's own code, not bits-back coding
    assert list(tmp_path.glob("*.aez"))


@pytest.mark.parametrize("name", others_slow(tagged("representation"), REPRESENTATIVES))
def test_representation_models_work_with_embed(name):
    model, x = built(name)
    codes = torch.as_tensor(aezoo.embed(model, x, n_shown=0).codes)
    assert codes.shape == (len(x), *model.code_shape) and torch.isfinite(codes).all()


@pytest.mark.parametrize("name", others_slow(tagged("denoising"), REPRESENTATIVES))
def test_denoising_models_work_with_denoise(name):
    model, x = built(name)
    result = aezoo.denoise(model, x, corrupt="gaussian:0.2", baselines=False, n_shown=0)
    assert torch.isfinite(torch.as_tensor(result.x_hat)).all() and result.x_hat.shape == x.shape
    assert type(model).tags[0] != "denoising" or model.corruption is not None or name in ("dncnn", "noise2void")


@pytest.mark.parametrize("name", others_slow(tagged("imputation"), REPRESENTATIVES))
def test_imputation_ignores_missing_values(name):
    model, x = built(name)
    if isinstance(model, Multimodal):
        first = model.split(x)[0]
        others = torch.cat([first, *(torch.rand_like(part) for part in model.split(x)[1:])], model.decoder.dim + 1)
        one, two = (model.reconstruct_from(samples, (0,)) for samples in (x, others))
        lacking = torch.cat([first, *(part * torch.nan for part in model.split(x)[1:])], model.decoder.dim + 1)
        if model.takes_missing:
            assert torch.isfinite(model(lacking)).all()
    else:
        visible = torch.rand(len(x), 1, *model.input_shape[1:]) > 0.5
        one, two = (model.inpaint(samples, visible) for samples in (x, x.where(visible, torch.rand_like(x))))
        assert torch.equal(one.where(visible, 0), x.where(visible, 0))
        lacking = x.where(visible, torch.nan)
    assert one.shape == x.shape and torch.isfinite(one).all()
    assert torch.equal(one, two)
    found = torch.from_numpy(impute(model, lacking, n_shown=0).x_hat)
    torch.testing.assert_close(found, one.where(lacking.isnan(), x))


@pytest.mark.parametrize("name", others_slow(tagged("disentanglement"), REPRESENTATIVES))
def test_disentanglement_models_have_a_vector_code(name):
    model, x = built(name)
    assert len(model.code_shape) == 1 and model.code_shape[0] > 1
    walk = torch.as_tensor(aezoo.generate(model, x, traverse=True, walks=1, steps=2, fit_on=x).samples)
    assert torch.isfinite(walk).all()


@pytest.mark.parametrize("name", others_slow(tagged("tokenizer"), REPRESENTATIVES))
def test_tokenizers_give_tokens(name):
    model, x = built(name)
    if model.discrete_code:
        indices = model.encode_indices(x)
        assert not indices.is_floating_point() and len(indices) == len(x)
    else:
        tokens, width = model.code_shape
        assert tokens > 1 and width > 1
    assert model(x).shape == x.shape


@pytest.mark.parametrize("name", others_slow(tagged("latent diffusion"), REPRESENTATIVES))
def test_latent_diffusion_codes_have_positions(name):
    model, x = built(name)
    assert len(model.code_shape) >= 2 and model.encode(x).shape == (len(x), *model.code_shape)


@pytest.mark.parametrize("name", others_slow(tagged("interpretability"), REPRESENTATIVES))
def test_interpretability_models_have_a_dictionary(name):
    model, x = built(name)
    assert isinstance(model.decoder, Dictionary)
    assert model.encode(x).shape == (len(x), *model.code_shape)


def test_multimodal_models_are_tagged():
    named = {name for name in own_models() if issubclass(aezoo.model_class(name), Multimodal)}
    assert named == set(tagged("multimodal"))
    # all of them complete samples from some of their parts
    assert named < set(tagged("imputation"))


def test_models_with_a_trait_have_its_tag():
    for name in own_models():
        cls, uses = aezoo.model_class(name), registry.uses_of(name)
        assert not cls.takes_missing or "imputation" in uses
        assert registry.find(name).family != "compression" or "compression" in uses
        assert registry.find(name).family != "latent_diffusion" or "latent diffusion" in uses
