"""Laws of STFPM (Wang et al. 2021): the distances of maps, a perfect student, and the product of maps."""

import pytest
import torch
import torch.nn.functional as F
from frozen_feature_laws import (  # noqa: F401
    images,
    small,
    test_bfloat16_keeps_statistics_in_float32,
    test_fitted_model_finds_and_locates_defects,
    test_image_decoder_does_not_affect_code_map_or_score,
    test_missing_network_is_refused_in_one_line,
    test_saved_model_contains_the_weights_of_its_network,
    test_training_does_not_change_frozen_network,
    test_two_ranks_of_frozen_features_equal_one_process,
    test_vectors_and_volumes_are_refused,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401

import aezoo


def test_distances_are_one_minus_cosine() -> None:
    model, x = small("student_teacher"), images(3)
    maps, imitated = model.maps(x), model.student(x)
    found = model.distances(x, maps)
    wanted = [1 - F.cosine_similarity(t, s) for t, s in zip(maps, imitated, strict=True)]
    for d, each, t, s in zip(found, wanted, maps, imitated, strict=True):
        present = (t.norm(dim=1) > 0) & (s.norm(dim=1) > 0)
        torch.testing.assert_close(d[present], each[present])
    imitation = sum(d.flatten(1).mean(1) for d in found).mean()
    torch.testing.assert_close(model.loss(x)["imitation"], imitation)


def test_student_equal_to_teacher_gives_a_zero_map() -> None:
    model, x = small("student_teacher").requires_grad_(False), images(3)
    assert float(model.loss(x)["imitation"]) > 0.1
    model.student.load_state_dict(model.backbone.state_dict())
    assert float(model.loss(x)["imitation"]) == 0
    assert not model.anomaly_map(x).any()


def test_map_is_product_of_enlarged_distances() -> None:
    model, x = small("student_teacher"), images(3)
    wanted = torch.ones(3, 12, 13, dtype=torch.float64)
    for d in model.distances(x, model.maps(x)):
        wanted = wanted * F.interpolate(d[:, None], (12, 13), mode="bilinear")[:, 0]
    torch.testing.assert_close(model.anomaly_map(x), wanted)
    torch.testing.assert_close(model.score(x), wanted.flatten(1).max(1).values)


@pytest.mark.parametrize("features", ["timm:resnet18,out_indices=1:2", "torchvision:resnet18,pretrained=false"])
def test_student_starts_from_separate_weights_and_statistics(features: str) -> None:
    torch.manual_seed(0)
    model = aezoo.create_model("student_teacher", (3, 32, 32), features=features).train()
    pairs = zip(model.student.parameters(), model.backbone.parameters(), strict=True)
    assert all(a.ndim == 1 or not torch.equal(a, b) for a, b in pairs)
    norms = [m for m in model.student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(not m.training and m.weight.requires_grad for m in norms)
    # the statistics are from images, so that no map vanishes
    assert all(float(m.running_var.min()) > 0 and not torch.equal(m.running_mean, 0 * m.running_mean) for m in norms)
    assert all(0.1 < float(found.detach().std()) < 10 for found in model.student(torch.rand(4, 3, 32, 32)))
