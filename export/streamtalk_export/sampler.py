"""Fixed-step samplers as tables of two coefficients a step.

Every step of the samplers used here is `x' = coef_x0 * x0 + coef_xt * x`, `x0` being what the head predicts.
DDIM: Song et al. 2021 (arXiv 2010.02502), eq. 12 with eta 0, for a model that predicts x0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streamtalk_export.config import ConfigError, Sampler, ScheduleConfig

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SamplerTable:
    """`timesteps` [N] int64 from noisy to clean; `coef_x0`, `coef_xt` [N] float64."""

    timesteps: npt.NDArray[np.int64]
    coef_x0: F64
    coef_xt: F64

    def __len__(self) -> int:
        return len(self.timesteps)


def alphas_cumprod(schedule: ScheduleConfig) -> F64:
    """Cumulative product of `1 - beta`, [num_train_timesteps] float64."""
    n = schedule.num_train_timesteps
    if schedule.beta_schedule == "scaled_linear":
        betas = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, n) ** 2
    else:
        betas = np.linspace(schedule.beta_start, schedule.beta_end, n)
    return np.asarray(np.cumprod(1.0 - betas), dtype=np.float64)


def sampler_table(schedule: ScheduleConfig, steps: int, rule: Sampler) -> SamplerTable:
    """The coefficients of `steps` steps of `rule`.

    `ddim_legacy` is what the release's pinned library computes for this prediction type: it takes `x0` where
    DDIM takes the predicted noise. Published results were made that way.
    """
    n = schedule.num_train_timesteps
    if not 1 <= steps <= n:
        raise ConfigError(f"steps is {steps}; expected 1 to {n} (num_train_timesteps).")
    ratio = n // steps
    timesteps = np.arange(steps, dtype=np.int64)[::-1] * ratio + schedule.steps_offset
    if timesteps[0] >= n:
        raise ConfigError(
            f"steps {steps} with steps_offset {schedule.steps_offset} reaches timestep {timesteps[0]}; "
            f"{n} were trained."
        )
    table = alphas_cumprod(schedule)
    final = 1.0 if schedule.set_alpha_to_one else table[0]
    previous = timesteps - ratio
    ab = table[timesteps]
    ab_previous = np.where(previous >= 0, table[np.maximum(previous, 0)], final)
    if rule == "ddim_legacy":
        coef_x0 = np.sqrt(ab_previous) + np.sqrt(1 - ab_previous)
        coef_xt = np.zeros(steps)
    else:
        coef_xt = np.sqrt((1 - ab_previous) / (1 - ab))
        coef_x0 = np.sqrt(ab_previous) - coef_xt * np.sqrt(ab)
    return SamplerTable(timesteps.copy(), coef_x0, coef_xt)
