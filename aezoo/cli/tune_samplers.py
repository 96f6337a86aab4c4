"""optuna's samplers for a study with any number of workers: the draws of a trial depend on its number in the study."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from aezoo.cli.tune_search import Search
from aezoo.training.seeding import mix


class WorkerSampler(BaseSampler):
    """Seeds a sampler of optuna again for each trial, by the seed of the study and the number of the trial.

    So no two workers draw the same numbers, and an interrupted study of one worker gives the same result.

    Args:
        name: tpe, cmaes, grid or random.
        seed: seed of the study.
        searches: the settings to search.
        place: the number of a trial in the study, from 0; a trial that runs again has the same number.
    """

    def __init__(self, name: str, seed: int, searches: Sequence[Search], place: Callable[[FrozenTrial], int]) -> None:
        self._name, self._seed, self._place = name, seed, place
        self._grid = _Grid(searches, seed) if name == "grid" else None
        self._sampler: BaseSampler = RandomSampler(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        place = self._place(trial)
        seed = mix(self._seed, place) % 2**32
        if self._grid is not None:
            self._grid.place = place
            self._sampler = self._grid
        elif self._name == "cmaes":
            # the first trial has no earlier results
            self._sampler = CmaEsSampler(seed=seed, warn_independent_sampling=False)
        elif self._name == "random":
            self._sampler = RandomSampler(seed)
        else:
            # trials that run on other workers count as bad, so that workers do not all try the same settings
            self._sampler = TPESampler(seed=seed, constant_liar=True)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._sampler.after_trial(study, trial, state, values)


class _Grid(RandomSampler):
    """All combinations in an order drawn from the seed, each for one trial of the study.

    optuna's GridSampler lets workers that start at the same time take the same combination and so miss another.
    """

    def __init__(self, searches: Sequence[Search], seed: int) -> None:
        super().__init__(seed)
        self.place = 0
        self._names = [search.name for search in searches]
        self._points = [*itertools.product(*(search.values() for search in searches))]
        random.Random(seed).shuffle(self._points)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # a trial beyond the grid, which another worker has completed meanwhile, is withdrawn before it runs
        return self._points[self.place % len(self._points)][self._names.index(param_name)]
