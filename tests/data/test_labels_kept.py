"""Training on few labels: which samples keep theirs, for all loaders, and invalid numbers."""

import numpy as np
import pytest
import torch
from PIL import Image

import aezoo
from aezoo.data import DataModule
from aezoo.data.classes import label_names, labels_of, paths_of
from aezoo.errors import AezooError

RNG = np.random.default_rng(0)


def kept(**plain):
    """All labels and the kept ones, of digits' training split."""
    return DataModule("digits").tensors("train")[1], DataModule("digits", **plain).tensors("train")[1]


def test_labelled_subset_is_balanced_and_rest_is_minus_one():
    y, few = kept(num_labels=50)
    labelled = few >= 0
    assert torch.equal(few[labelled], y[labelled])
    assert few[labelled].bincount().tolist() == [5] * 10
    assert set(few[~labelled].tolist()) == {-1}
    assert few.dtype == torch.int64


def test_only_training_labels_are_removed():
    everything, few = DataModule("digits"), DataModule("digits", num_labels=50)
    for stage in ("train", "val", "test"):
        (x, y), (few_x, few_y) = everything.tensors(stage), few.tensors(stage)
        assert torch.equal(x, few_x)
        assert torch.equal(y, few_y) == (stage != "train")
    assert few.num_classes == 10
    assert dict(few.hparams)["num_labels"] == 50
    assert torch.equal(DataModule("digits", num_labels=0).tensors("train")[1], everything.tensors("train")[1])


def test_kept_labels_are_seeded_and_nested():
    first, again, other = (kept(num_labels=50, seed=seed)[1] for seed in (3, 3, 4))
    more = kept(num_labels=80, seed=3)[1]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(more[first >= 0], first[first >= 0])
    # spread over the set, not its first samples
    where = (first >= 0).nonzero()[:, 0].double()
    assert 0.3 * len(first) < where.mean() < 0.7 * len(first)


def test_kept_labels_are_seeded_without_splitting(tmp_path):
    np.savez(tmp_path / "whole.npz", x=RNG.random((200, 4)), y=np.arange(200) % 2)
    whole = {"name": str(tmp_path / "whole.npz"), "val_fraction": 0, "test_fraction": 0}
    (x, first), (again, other) = (DataModule(**whole, num_labels=20, seed=seed).tensors("train") for seed in (3, 4))
    assert torch.equal(x, again)
    assert not torch.equal(first, other)


def pairs(batches):
    """Sorted pairs of samples, as bytes, and labels."""
    return sorted((x.numpy().tobytes(), int(y)) for xs, ys in batches for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("memory", ["on", "off"])
@pytest.mark.parametrize("binarise", ["none", "threshold"])
def test_batches_have_kept_labels_for_both_loaders(memory, binarise):
    module = DataModule("digits", num_labels=50, memory=memory, num_workers=0, batch_size=64, binarise=binarise)
    x, y = module.dataset("train").x, module.dataset("train").y
    assert pairs(module.train_dataloader()) == pairs([(x, y)])
    assert torch.equal(y, kept(num_labels=50)[1])


def test_labels_are_shared_among_chosen_classes():
    y = DataModule("digits", train_classes=[3, 7], num_labels=10).tensors("train")[1]
    assert y[y >= 0].bincount().nonzero()[:, 0].tolist() == [3, 7]
    assert y[y >= 0].bincount().tolist()[3::4] == [5, 5]


@pytest.mark.parametrize("memory", ["on", "off"])
@pytest.mark.parametrize("workers", [0, 1])
def test_folder_labels_can_be_limited(tmp_path, memory, workers):
    for name, value in (("cats", 10), ("dogs", 200)):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.fromarray(np.full((4, 4), value + i, np.uint8)).save(tmp_path / name / f"{i}.png")
    module = DataModule(str(tmp_path), num_labels=6, memory=memory, num_workers=workers, batch_size=8)
    y = labels_of(module.dataset("train"))
    assert y[y >= 0].bincount().tolist() == [3, 3]
    seen = torch.cat([labels for _, labels in module.train_dataloader()])
    assert sorted(seen.tolist()) == sorted(y.tolist())
    for x, labels in module.train_dataloader():
        light = (x.float().amax((1, 2, 3)) > (100 if x.dtype == torch.uint8 else 0.4)).long()
        assert torch.equal(light[labels >= 0], labels[labels >= 0])
    plain = DataModule(str(tmp_path), num_workers=0)
    assert torch.equal(module.tensors("train")[0], plain.tensors("train")[0])


@pytest.mark.parametrize(
    ("n", "match"),
    [
        (55, "multiple of 10"),
        (2000, r"200 samples of each class, but the training split of digits has \d+ of '0': lower it"),
        (-1, "at least 0"),
    ],
)
def test_invalid_label_counts_are_refused_in_one_line(n, match):
    with pytest.raises(AezooError, match=match) as refusal:
        DataModule("digits", num_labels=n).setup()
    assert "\n" not in str(refusal.value)


def test_data_without_classes_are_refused_in_one_line():
    x = RNG.random((40, 4))
    for y in (None, RNG.random(40), RNG.random((40, 3))):
        with pytest.raises(AezooError, match="has no classes") as refusal:
            DataModule.from_arrays(x, y, num_labels=4).setup()
        assert "\n" not in str(refusal.value)
    with pytest.raises(AezooError, match="contradict"):
        DataModule("digits", num_labels=50, labels="ignore")


def test_missing_label_is_not_read_as_last_class():
    assert label_names(torch.tensor([1, -1, 0]), ("a", "b")).tolist() == ["b", "-1", "a"]
    assert label_names(torch.tensor([3, -1]), None).tolist() == ["3", "-1"]


@pytest.mark.slow
def test_callbacks_and_tasks_accept_unlabelled_samples(tmp_path, monkeypatch):
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import TensorBoardLogger

    from aezoo.callbacks import LatentScatter, Projector, Reconstructions
    from aezoo.tasks.detect import detect
    from aezoo.tasks.embed import embed

    module = DataModule("digits", num_labels=50, batch_size=256)
    # as if labels were missing where callbacks read them
    module.setup()
    module._splits["val"].y[::2] = -1
    model = aezoo.create_model("semi_supervised_vae", module.input_shape, hidden_dims=(16,), latent_dim=2)
    callbacks = [LatentScatter(every_n_epochs=1), Projector(), Reconstructions(every_n_epochs=1)]
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, logger=logger, callbacks=callbacks,
                         enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1)  # fmt: skip
    trainer.fit(model, module)
    assert {"-1", "3"} <= set((tmp_path / "run" / "version_0" / "projector" / "labels.tsv").read_text().split())
    assert (tmp_path / "run" / "version_0" / "pictures" / "latents.png").is_file()
    model.eval()
    found = embed(model, module, fit_on=module)
    assert len(found.codes) == len(module.dataset("test"))
    anomalies = detect(model, module, normal="3")
    assert len(anomalies.scores) == len(module.dataset("test"))


@pytest.mark.parametrize("how", [{"num_labels": 4}, {"binarise": "static"}, {"num_labels": 4, "binarise": "threshold"}])
@pytest.mark.parametrize("memory", ["on", "off"])
def test_samples_keep_their_files(tmp_path, how, memory):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.fromarray(np.full((4, 4), 25 * i + 1, np.uint8)).save(tmp_path / name / f"{i}.png")
    module = DataModule(str(tmp_path), memory=memory, num_workers=0, **how)
    plain = DataModule(str(tmp_path), num_workers=0)
    for stage in ("train", "test"):
        assert paths_of(module.dataset(stage)) == paths_of(plain.dataset(stage)) is not None
