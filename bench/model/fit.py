"""Fits the constants of the model to measured plans, and says how far off its predictions are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from bench.model import one_pass, stream, two_phase
from bench.model.constants import GROUPS, Constants, fields_of
from bench.model.measurements import Measurement, geometric_error
from bench.model.table import LoopRecord

# Residuals, in logarithms, beyond which a measurement counts less: a plan that the model does not understand should not
# bend the constants of all others.
LOSS_SCALE = 0.1
# Relative step of the derivatives: the simulation of stream plans has steps itself, which a smaller one would see.
STEP = 1e-3

Predictor = Callable[[Constants], np.ndarray]


def group_of(measurement: Measurement) -> str:
    return measurement.schedule if measurement.schedule in ("two_phase", "stream") else "one_pass"


def predictor(group: str, measured: Sequence[Measurement], loops: Sequence[LoopRecord]) -> Predictor:
    """Return the function from constants to the times of plans, all of one group."""
    if group == "one_pass":
        features = [one_pass.features_of(m, loops) for m in measured]
        return lambda constants: one_pass.predicted_us(constants, features)
    if group == "two_phase":
        passes = [two_phase.features_of(m.case, m.plan, loops) for m in measured]
        return lambda constants: two_phase.predicted_us(constants, passes)
    cycles = [stream.cycles_of(m.case, "row_tiles" in m.plan["kernel"], loops) for m in measured]
    return lambda constants: np.array(
        [stream.predict(m.case, m.plan, c, constants).us for m, c in zip(measured, cycles, strict=True)]
    )


def fit(measured: Sequence[Measurement], loops: Sequence[LoopRecord], start: Constants | None = None) -> Constants:
    """Return the constants that fit best, of the groups that were measured; the others are those of `start`."""
    constants = start or Constants()
    for group in GROUPS:
        of_group = [m for m in measured if group_of(m) == group]
        if not of_group:
            continue
        fields = fields_of(group)
        predict = predictor(group, of_group, loops)
        us = np.array([m.us for m in of_group])

        def with_values(values: Sequence[float], base: Constants = constants, fields=fields) -> Constants:
            pairs = zip(fields, values, strict=True)
            return dataclasses.replace(base, **{field.name: float(value) for field, value in pairs})

        # The defaults rather than `start`, so that a fit does not depend on the one before.
        begin = [field.default for field in fields]
        found = least_squares(
            lambda values: np.log(predict(with_values(values)) / us),
            begin,
            bounds=([field.metadata["low"] for field in fields], [field.metadata["high"] for field in fields]),
            loss="soft_l1",
            f_scale=LOSS_SCALE,
            diff_step=STEP,
            x_scale=begin,
        )
        constants = with_values([float(f"{value:.4g}") for value in found.x])
        if group == "stream":  # whoever measured these had kernels that launch dependents early
            constants = dataclasses.replace(constants, dependent_launch_us=0.0)
    return constants


@dataclass(frozen=True)
class Error:
    """How far predictions are off: as a geometric mean, at the 90th percentile, and on average with their sign."""

    plans: int
    mean: float
    p90: float
    bias: float


def error_of(ratios: Sequence[float]) -> Error:
    logs = np.log(np.asarray(ratios))
    p90 = float(np.exp(np.percentile(np.abs(logs), 90)) - 1)
    return Error(len(ratios), geometric_error(ratios), p90, float(np.exp(logs.mean()) - 1))


def errors(measured: Sequence[Measurement], loops: Sequence[LoopRecord], constants: Constants) -> dict[str, Error]:
    """Return the error of each family of plans, and of `all` plans."""
    ratios: dict[str, list[float]] = {}
    for group in GROUPS:
        of_group = [m for m in measured if group_of(m) == group]
        if of_group:
            predicted = predictor(group, of_group, loops)(constants)
            for measurement, us in zip(of_group, predicted, strict=True):
                ratios.setdefault(measurement.family, []).append(float(us) / measurement.us)
    found = {family: error_of(values) for family, values in sorted(ratios.items())}
    return found | {"all": error_of([ratio for values in ratios.values() for ratio in values])}
