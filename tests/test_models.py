"""The checks of `aezoo.testing` on all models, and models on which each of them fails."""

import random
import warnings
from unittest import SkipTest

import broken_models
import promises
import pytest
import torch
from golden import VARIANTS, own_models
from representative_models import BACKBONES, REPRESENTATIVE, SLOW_REPRESENTATIVE, of_graphs

import aezoo
from aezoo import testing
from aezoo.testing import CHECKS, SHAPES, SLOW_CHECKS, SharedNoise, check_ddp, check_model, subject_of

# warnings fail the checks, even those that pyproject.toml ignores elsewhere
strict = pytest.mark.filterwarnings("error")
ALONE = [check for check in CHECKS if check is not check_ddp]
# checks with fits of their own, which depend only on the class; check_checkpoint also fits variants
NOT_OF_VARIANTS = ("check_compile", "check_export", "check_onnx", "check_overfits", "check_state_dict", "check_ddp")
NOT_OF_VARIANTS += ("check_loop", "check_seed", "check_deterministic_evaluation", "check_resume")


def name_of_check(check):
    return check.__name__.removeprefix("check_")


def run(check, *subjects):
    try:
        check(*subjects)
    except SkipTest as reason:
        if check is testing.check_batch_mean and subject_of(subjects[0]).cls.compares_samples:
            pytest.skip(str(reason))
        pytest.fail(f"{check.__name__} did not run: {reason}")


# slower than all other checks except check_ddp
GRAPHS = (testing.check_compile, testing.check_export, testing.check_onnx)
# checks that fit or start a run
FITS = (
    *(testing.check_overfits, testing.check_resume, testing.check_loop, testing.check_checkpoint, testing.check_seed),
    testing.check_deterministic_evaluation,
)
# one for each kind of loss: inductor takes most of a minute for each
COMPILED = ("vae", "vq_vae", "jumprelu_sae", "mean_scale_hyperprior")
# networks of the same kind give the same result
LESS_OFTEN = (
    *(testing.check_bf16, testing.check_inputs_unchanged, testing.check_batch_of_one, testing.check_batch_mean),
    *(testing.check_constructor, testing.check_state_dict),
)
# graphs, and checks partly covered by check_resume and the golden values of each model
REPRESENTATIVE_ONLY = (*GRAPHS, testing.check_overfits, testing.check_seed)


def applies(check, cls):
    return check is not testing.check_indices or cls.discrete_code


def of_models():
    """Every model with every check that applies to it."""
    for name in own_models():
        for check in ALONE:
            if applies(check, aezoo.model_class(name)):
                late = (check in FITS and name not in REPRESENTATIVE) or (check in GRAPHS and name != "dense_ae")
                late |= check in LESS_OFTEN and name not in SLOW_REPRESENTATIVE
                # all models if the figures of guarantees are measured, see tests/promises.py
                all_checks = name in SLOW_REPRESENTATIVE or promises.is_recording()
                if check in REPRESENTATIVE_ONLY and not all_checks:
                    continue
                # check_onnx includes it; dense_ae represents the graphs in the default run
                if check is testing.check_export and name != "dense_ae":
                    continue
                # these also take long to overfit
                late |= check is testing.check_overfits and name in ("mae", "vq_vae")
                marks = [pytest.mark.slow] if late else []
                yield pytest.param(name, check, id=f"{name}-{name_of_check(check)}", marks=marks)


@strict
@pytest.mark.parametrize(("name", "check"), [*of_models()])
def test_model(name, check):
    run(check, of_graphs(name) if check in (*GRAPHS, *FITS) else name)


def of_variants():
    for variant in VARIANTS:
        for check in CHECKS:
            if check.__name__ not in NOT_OF_VARIANTS and applies(check, variant.cls):
                yield pytest.param(variant, check, id=f"{variant.label}-{name_of_check(check)}")


@strict
@pytest.mark.slow
@pytest.mark.parametrize(("variant", "check"), [*of_variants()])
def test_variant(variant, check):
    run(check, variant)


def buffers(subject):
    return {name for name, _ in subject.build().named_buffers()}


def with_more_state():
    """Variants with buffers that training changes, other than those of the model with its defaults."""
    found = [variant for variant in VARIANTS if buffers(variant) - buffers(subject_of(variant.cls))]
    assert 10 < len(found) < len(VARIANTS)
    return found


def not_sample_means():
    """Models with buffers that training changes, or whose loss is not a mean over samples, and representatives.

    For others, the gradient in two processes is the mean of two gradients, as check_batch_mean shows.
    """
    subjects = [subject_of(name) for name in own_models()]
    found = [
        subject.label
        for subject in subjects
        if buffers(subject) or subject.cls.compares_samples or subject.label in SLOW_REPRESENTATIVE
    ]
    assert len(SLOW_REPRESENTATIVE) < len(found) < len(subjects)
    return found


@strict
@pytest.mark.slow
def test_variants_with_state_resume():
    for variant in with_more_state():
        run(testing.check_resume, variant)


def with_more_options():
    """Options of codebooks that the variants do not have."""
    nets = {"latent_dim": 4, "hidden_dims": (8, 8), "codebook_size": 6}
    revived = {"dead_below": 6.0, "decay": 0.5}
    return [
        *(subject_of(n, **nets, **revived, update=u) for n in ("vq_vae", "rq_vae") for u in ("ema", "gradient")),
        subject_of("vq_vae", **nets, cosine=True),
        subject_of("vq_vae", **nets, **revived, n_groups=2),
        subject_of("rq_vae", **nets, dropout=0.6),
        subject_of("fsq_vae", depth=2, dropout=0.6, hidden_dims=(8, 8)),
        subject_of("lfq_vae", latent_dim=12, hidden_dims=(8, 8), entropy_weight=3.0),
        subject_of("sim_vq_vae", **nets, estimator="rotation"),
    ]


@strict
@pytest.mark.slow
def test_two_processes_train_every_model_like_one():
    names = own_models() if promises.is_recording() else not_sample_means()
    backbones = [subject_of(name, net=net) for name, net in BACKBONES]
    others = [*with_more_state(), *backbones, *with_more_options(), broken_models.CorrectModel]
    run(check_ddp, *map(of_graphs, names), *others)  # in one launch, since two processes take half a minute to start


@pytest.mark.slow
@pytest.mark.parametrize("check", SLOW_CHECKS, ids=name_of_check)
@pytest.mark.parametrize("name", own_models() if promises.is_recording() else COMPILED)
def test_model_slowly(name, check):
    """All models if the figures of guarantees are measured, otherwise one of each kind."""
    run(check, name if promises.is_recording() else of_graphs(name))
    promises.add("inductor", name, {"models": 1})


@pytest.mark.slow
def test_the_registry_takes_vectors_images_sequences_and_volumes():
    for shape in SHAPES:
        takers = {name for name in own_models() if subject_of(name).takes(shape)}
        assert takers >= {"dense_ae", "vae", "topk_sae"} | ({"conv_ae", "resnet_ae"} if len(shape) > 1 else set())


# ---- models with mistakes --------------------------------------------------------------------------------------------

MISTAKES = [
    ("constructor", broken_models.UndocumentedArgument, "do not describe latent_dim"),
    ("constructor", broken_models.DocumentsUnknownArgument, "describe latent_size"),
    ("constructor", broken_models.UntypedKwargs, "instead of \\*kwargs"),
    ("constructor", broken_models.PositionalArgument, "latent_dim must be keyword-only"),
    ("constructor", broken_models.MissingDefault, "latent_dim needs a default"),
    ("constructor", broken_models.ModuleArgument, "default of act is a ReLU"),
    ("constructor", broken_models.MissingHyperparameter, "hparams lack scale"),
    ("constructor", broken_models.MutatesArguments, "changes the lists"),
    ("shapes", broken_models.HardCodedShape, "RuntimeError"),
    ("shapes", broken_models.TorchErrorForShape, "refuse it with an AezooError"),
    ("shapes", broken_models.RefusesEveryShape, "takes none of the shapes"),
    ("shapes", broken_models.WrongCodeShape, "encode gives shape \\(3, 1, 8\\)"),
    ("shapes", broken_models.BatchMeanScore, "score gives shape \\(\\)"),
    ("shapes", broken_models.SamplesWithoutPrior, "has_prior is False"),
    ("shapes", broken_models.PriorWithoutSamples, "AezooError"),
    ("loss", broken_models.MissingLoss, "must return named scalars"),
    ("loss", broken_models.DetachedLoss, "no gradient"),
    ("loss", broken_models.InfiniteTerm, "entropy = -inf"),
    ("loss", broken_models.UnreducedTerm, "'size' that is not a scalar"),
    ("loss", broken_models.TermNamedLikeMetric, "'mse', which every evaluation"),
    ("loss", broken_models.InfiniteGradient, "gradient of encoder.* is not finite"),
    ("batch_of_one", broken_models.UnbiasedBatchVariance, "loss = nan|degrees of freedom"),
    ("gradients", broken_models.DetachedCode, "encoder.1.bias, encoder.1.weight"),
    ("gradients", broken_models.UnusedLayer, "unused.bias, unused.weight"),
    ("inputs_unchanged", broken_models.InPlaceNoise, "loss changes its input"),
    ("inputs_unchanged", broken_models.InPlaceDecode, "decode changes its input"),
    ("indices", broken_models.OneBasedIndices, "of a codebook of 8"),
    ("indices", broken_models.UnquantisedForward, "decode_indices\\(encode_indices\\(x\\)\\) is off"),
    ("indices", broken_models.NonCausalDistribution, "codes\\(encode_symbols\\(x\\)\\) is not encode"),
    ("indices", broken_models.DiscreteWithoutIndices, "aezoo.bases.quantised.DiscreteAutoencoder"),
    ("batch_mean", broken_models.SumOverBatch, "loss of a batch given twice is off"),
    ("batch_independence", broken_models.BatchStatisticsInEvaluation, "encode of single samples"),
    ("deterministic_evaluation", broken_models.NoiseInEvaluation, "encode differs"),
    ("deterministic_evaluation", broken_models.DropoutInEvaluation, "encode differs"),
    ("deterministic_evaluation", broken_models.BufferUpdateInEvaluation, "evaluation changes seen"),
    ("loop", broken_models.UnloggedTerms, "train/loss, train/nll"),
    ("loop", broken_models.PredictionWithoutScore, "KeyError: 'score'"),
    ("loop", broken_models.WrongPredictedScore, "the predicted score is off"),
    ("overfits", broken_models.ShiftedTarget, "reconstructs with mse"),
    ("overfits", broken_models.WrongSign, "reconstructs with mse"),
    ("overfits", broken_models.OptimizesCopies, "the loss only goes from"),
    ("seed", broken_models.UnseededNoise, "losses differ"),
    ("seed", broken_models.SeedsInConstructor, "resets torch's random state"),
    ("seed", broken_models.SeedsInLoss, "resets torch's random state"),
    ("state_dict", broken_models.LazyBuffer, "an evaluation changes the state_dict"),
    ("state_dict", broken_models.UnregisteredBuffer, "offset is a plain tensor"),
    ("checkpoint", broken_models.UnregisteredBuffer, "encode is not the same after load_from_checkpoint"),
    ("checkpoint", broken_models.NonPersistentBuffer, "load_from_checkpoint changes weights or buffers"),
    ("resume", broken_models.CounterOutsideCheckpoint, "continues from step 3 of 6 ends with other decoder"),
    ("resume", broken_models.LateWeightChange, "continues from step 4 of 6 ends with other"),
    ("bf16", broken_models.PenaltyInHalfPrecision, "size is computed in torch.bfloat16"),
    ("bf16", broken_models.CancellationInHalfPrecision, "loss under bf16 is off"),
    ("compile", broken_models.DifferentWhenCompiled, "the compiled loss is off"),
    ("compile", broken_models.BufferWhenCompiled, "a compiled loss changes the state_dict's keys or shapes"),
    ("export", broken_models.FixedBatchSize, "fails check_export"),
    ("export", broken_models.DataDependentBranch, "fails check_export"),
    ("export", broken_models.DifferentIndicesWhenExported, "encode_indices of a batch of 7 gives other indices"),
    ("onnx", broken_models.OperatorMissingInONNX, "fails check_onnx"),
]


@pytest.mark.parametrize(
    ("check", "cls", "message"), MISTAKES, ids=[f"{check}-{cls.__name__}" for check, cls, _ in MISTAKES]
)
def test_model_with_mistake_fails_check(check, cls, message):
    with pytest.raises(AssertionError, match=message) as caught:
        getattr(testing, f"check_{check}")(cls)
    assert str(caught.value).startswith(f"{cls.__name__} fails check_{check}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
def test_mistakes_of_two_processes_are_caught():
    wrong = [
        broken_models.UnreducedStatistic,
        broken_models.UnreducedGradient,
        broken_models.UnreducedBuffer,
        broken_models.FailsOnTwoRanks,
    ]
    with pytest.raises(AssertionError) as caught:
        check_ddp(*wrong, broken_models.CorrectModel)
    lines = str(caught.value).splitlines()
    assert [line.split(" fails check_ddp: ")[0] for line in lines] == [cls.__name__ for cls in wrong]
    assert "loss at step 0, two processes against one, is off" in lines[0]
    assert "two processes against one, is off" in lines[1]
    assert "seen is off by" in lines[2]
    assert "cannot train on two ranks" in lines[3]


def test_every_check_has_a_failing_example():
    caught = {check for check, _, _ in MISTAKES} | {"ddp"}
    assert {check.__name__ for check in CHECKS} == {f"check_{name}" for name in caught}


# ---- use by plug-ins -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_check_model_accepts_unregistered_class():
    assert check_model(broken_models.CorrectModel, exclude=["check_ddp"], widths=(16,)) == {}


class TwoOptimisers(broken_models.CorrectModel):
    """Manual optimisation with two optimisers."""

    automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), self.lr) for part in (self.encoder, self.decoder)]

    def training_step(self, batch, batch_idx):
        x, y = self.begin_step(batch, batch_idx)
        terms, values = self.step_terms(x, y)
        self.zero_grad()
        self.manual_backward(terms["loss"])
        for optimizer in self.optimizers():
            optimizer.step()
        self.end_step(terms, values, len(x))
        return terms


def test_check_model_resumes_a_model_with_several_optimisers():
    testing.check_resume(TwoOptimisers)


def test_check_model_gathers_all_failures():
    run_these = ("check_loss", "check_state_dict", "check_checkpoint")
    with pytest.raises(AssertionError) as caught:
        check_model(
            broken_models.UnregisteredBuffer, exclude=[c.__name__ for c in CHECKS if c.__name__ not in run_these]
        )
    assert [line.split(" ")[2] for line in str(caught.value).splitlines()] == ["check_state_dict:", "check_checkpoint:"]


def test_check_model_accepts_hyperparameters_and_aliases():
    quick = [check.__name__ for check in CHECKS if check.__name__ != "check_shapes"]
    assert check_model("variational", exclude=quick, latent_dim=3) == {}
    assert subject_of("variational", latent_dim=3).label == "vae(latent_dim=3)"
    with pytest.raises(aezoo.AezooError, match="check_shape"):
        check_model("vae", exclude=["check_shape"])
    with pytest.raises(aezoo.AezooError, match="did you mean"):
        check_model("vea")


def test_checks_that_cannot_run_are_reported(monkeypatch):
    class Local(broken_models.CorrectModel):
        """A local class, which another process cannot import."""

    with pytest.raises(SkipTest, match="cannot be imported"):
        check_ddp(Local)
    monkeypatch.setattr(testing.portability.graphs, "find_spec", lambda name: None)
    with pytest.raises(SkipTest, match="pip install '\\.\\[onnx\\]'"):
        testing.check_onnx(Local)
    most = [check.__name__ for check in CHECKS if check.__name__ not in ("check_onnx", "check_ddp")]
    assert set(check_model(Local, exclude=most)) == {"check_onnx", "check_ddp"}


def test_check_keeps_random_state_and_warning_filters():
    torch.manual_seed(5)
    random.seed(5)
    state, filters = torch.get_rng_state(), list(warnings.filters)
    testing.check_seed("linear_ae")
    testing.check_shapes("vae")
    assert torch.equal(state, torch.get_rng_state())
    assert warnings.filters == filters


# ---- shared noise ----------------------------------------------------------------------------------------------------

DRAWS = {
    "randn": lambda x: torch.randn(x.shape),
    "randn_like": torch.randn_like,
    "rand": lambda x: torch.rand(*x.shape),
    "rand_like": torch.rand_like,
    "normal": lambda x: torch.normal(torch.zeros_like(x), torch.ones_like(x)),
    "bernoulli": lambda x: torch.bernoulli(0.5 + 0 * x),
    "dropout": lambda x: torch.nn.functional.dropout(1 + 0 * x),
    "normal_": lambda x: x.clone().normal_(1.0, 2.0),
    "uniform_": lambda x: x.clone().uniform_(1.0, 3.0),
    "bernoulli_": lambda x: x.clone().bernoulli_(0.5),
    "exponential_": lambda x: x.clone().exponential_(),
    "distribution": lambda x: torch.distributions.Normal(x, 1.0).rsample(),
    "gamma": lambda x: torch.distributions.Gamma(x + 2, 1.0).rsample(),
    "importance samples": lambda x: torch.randn(2, *x.shape).transpose(0, 1),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
def test_shared_noise_gives_each_process_its_rows(draw):
    x = torch.zeros(6, 50)
    with SharedNoise(range(6), 6):
        whole = [draw(x) for _ in range(2)]
    assert not torch.equal(*whole)
    assert len(whole[0].unique()) > 1
    for rows in (range(3), range(3, 6)):
        with SharedNoise(rows, 6):
            part = [draw(x[list(rows)]) for _ in range(2)]
        assert all(torch.equal(p, w[list(rows)]) for p, w in zip(part, whole, strict=True))


def test_zero_dropout_draws_no_random_numbers():
    x = torch.rand(6, 5)
    drawn = []
    for training in (True, False):
        with SharedNoise(range(6), 6):
            assert torch.equal(torch.nn.functional.dropout(x, 0.0, training), x)
            drawn.append(torch.randn(6, 5))
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("randn", 0, 1),
        ("rand", 0.5, 12**-0.5),
        ("normal_", 1, 2),
        ("uniform_", 2, 2 * 12**-0.5),
        ("bernoulli", 0.5, 0.5),
        ("dropout", 1, 1),
        ("exponential_", 1, 1),
        ("gamma", 2, 2**0.5),
    ],
)
def test_shared_noise_has_requested_distribution(name, mean, std):
    with SharedNoise(range(3), 6):
        drawn = DRAWS[name](torch.zeros(3, 100_000))
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.02)
    assert float(drawn.std()) == pytest.approx(std, rel=0.02)
