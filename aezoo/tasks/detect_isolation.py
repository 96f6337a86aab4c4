"""Isolation forest (Liu et al. 2008, https://doi.org/10.1109/ICDM.2008.17), fitted by scikit-learn, scored by torch.

Each tree splits a random subset of psi <= 256 training samples at random values of random columns until every sample is
alone or the depth is log2(psi). Anomalies are alone after few splits. With the path length h_t(x), the number of splits
on the way of x through tree t plus the expected number c(n) of further splits for the n samples left at its end,

    score(x) = 2^(-mean_t h_t(x) / c(psi))        c(n) = 2 H(n - 1) - 2 (n - 1) / n        H(i) = ln(i) + 0.5772...

which does not depend on the units of columns. Trees are tensors, so that the score is a part of exported graphs.

Shapes: B batch, N training samples, D columns, T trees, Q nodes of the largest tree.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

N_TREES = 100
_EULER = 0.5772156649015329
# of a tree: log2 of 256 samples
_MAX_DEPTH = 8


def fit_forest(x_ND: Tensor, seed: int) -> dict[str, Tensor]:
    """Grow the trees.

    Args:
        x_ND: (N, D), finite.
        seed: of the subsets and the splits.

    Returns:
        The trees, tensors by name: `split_column` (T, Q), `split_value` (T, Q), where samples of at most this value go
        to the first of `children` (T, Q, 2), `path_length` (T, Q) in units of c(psi), and `n_samples` (T, Q), those of
        the subset that reach a node. The children of a leaf are the leaf itself.
    """
    from sklearn.ensemble import IsolationForest

    forest = IsolationForest(n_estimators=N_TREES, random_state=seed).fit(x_ND.float().numpy())
    trees = [estimator.tree_ for estimator in forest.estimators_]
    size = max(tree.node_count for tree in trees)
    columns = np.zeros((len(trees), size), np.int32)
    values, lengths, counts = (np.full((len(trees), size), fill, np.float32) for fill in (np.inf, 0, 1))
    children = np.tile(np.arange(size, dtype=np.int32)[:, None], (len(trees), 1, 2))
    norm = _expected_splits(forest.max_samples_) or 1.0
    for t, (tree, drawn) in enumerate(zip(trees, forest.estimators_features_, strict=True)):
        splits = np.flatnonzero(tree.children_left >= 0)
        columns[t, splits] = drawn[tree.feature[splits]]
        # the largest float32 that is not above: values in float32 go the same way
        rounded = tree.threshold[splits].astype(np.float32)
        above = rounded > tree.threshold[splits]
        values[t, splits] = np.where(above, np.nextafter(rounded, np.float32(-np.inf)), rounded)
        children[t, splits] = np.stack([tree.children_left[splits], tree.children_right[splits]], 1)
        counts[t, : tree.node_count] = tree.n_node_samples
        further = [_expected_splits(int(n)) for n in tree.n_node_samples]
        lengths[t, : tree.node_count] = (tree.compute_node_depths() - 1 + further) / norm
    return {
        "split_column": torch.from_numpy(columns),
        "split_value": torch.from_numpy(values),
        "children": torch.from_numpy(children),
        "path_length": torch.from_numpy(lengths),
        "n_samples": torch.from_numpy(counts),
    }


def forest_score(x_BD: Tensor, trees: Mapping[str, Tensor]) -> Tensor:
    """2^(-mean path length / c(psi)), (B, D) -> (B,), in float64."""
    node_BT, _ = _walk(x_BD.float(), trees)
    return torch.exp2(-_of_nodes(trees["path_length"], node_BT).double().mean(1))


def split_shares(x_BD: Tensor, trees: Mapping[str, Tensor]) -> Tensor:
    """How much the splits at each column isolate each sample, (B, D) -> (B, D), at least 0.

    A split of n samples of which m go the way of the sample counts log(n / m), since the counts of a path add up to the
    logarithm of psi / (samples left), divided by the path length of the tree; this is summed over the trees.
    """
    node_BT, passed = _walk(x_BD.float(), trees)
    length_BT = _of_nodes(trees["path_length"], node_BT).double()
    found_BD = torch.zeros(x_BD.shape, dtype=torch.float64)
    for before_BT, after_BT in passed:
        n_BT, m_BT = (_of_nodes(trees["n_samples"], node_BT).double() for node_BT in (before_BT, after_BT))
        # the leaf of a single training sample has length 0, and no splits
        weight_BT = torch.where(length_BT > 0, torch.log(n_BT / m_BT) / length_BT, 0.0)
        found_BD.scatter_add_(1, _of_nodes(trees["split_column"], before_BT).long(), weight_BT)
    return found_BD


def _walk(x_BD: Tensor, trees: Mapping[str, Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The leaf that each sample reaches in each tree, (B, T), and the nodes before and after each split."""
    node_BT = torch.zeros(len(x_BD), len(trees["split_value"]), dtype=torch.long)
    passed = []
    for _ in range(_MAX_DEPTH):
        column_BT = _of_nodes(trees["split_column"], node_BT).long()
        goes_right_BT = x_BD.gather(1, column_BT) > _of_nodes(trees["split_value"], node_BT)
        left_BT, right_BT = (_of_nodes(trees["children"][..., side], node_BT).long() for side in (0, 1))
        following_BT = torch.where(goes_right_BT, right_BT, left_BT)
        passed.append((node_BT, following_BT))
        node_BT = following_BT
    return node_BT, passed


def _of_nodes(values_TQ: Tensor, node_BT: Tensor) -> Tensor:
    """The values of a node of each tree, (T, Q), (B, T) -> (B, T)."""
    return values_TQ.T.gather(0, node_BT)


def _expected_splits(n: int) -> float:
    """c(n), the mean path length of an unsuccessful search in a binary tree of n samples."""
    return 0.0 if n <= 1 else 1.0 if n == 2 else 2 * (math.log(n - 1) + _EULER) - 2 * (n - 1) / n
