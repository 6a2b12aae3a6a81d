"""Sampler tables and folding, against the step-by-step loop."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from streamtalk_export.config import ConfigError, Sampler, ScheduleConfig
from streamtalk_export.fold import fold_head
from streamtalk_export.graphs import FoldedHead, UnrolledHead
from streamtalk_export.network import DiffusionNetwork
from streamtalk_export.sampler import alphas_cumprod, sampler_table
from tests.export.golden import Golden

SCHEDULE = ScheduleConfig()
FOLD_TOLERANCE = 1e-8
"""Relative, in float64, as MODEL.md measured it."""


def test_timesteps_of_fifty_steps() -> None:
    table = sampler_table(SCHEDULE, 50, "ddim")
    assert table.timesteps[:2].tolist() == [981, 961]
    assert table.timesteps[-1] == 1
    assert len(table) == 50


def test_last_step_uses_the_first_alpha() -> None:
    """The step before timestep 1 - 20 < 0 has alpha_bar[0]: worked out by hand."""
    ab = alphas_cumprod(SCHEDULE)
    table = sampler_table(SCHEDULE, 50, "ddim")
    xt = np.sqrt((1 - ab[0]) / (1 - ab[1]))
    np.testing.assert_allclose(table.coef_xt[-1], xt)
    np.testing.assert_allclose(table.coef_x0[-1], np.sqrt(ab[0]) - xt * np.sqrt(ab[1]))


def test_legacy_rule_forgets_the_noisy_latent() -> None:
    table = sampler_table(SCHEDULE, 25, "ddim_legacy")
    assert not table.coef_xt.any()
    ab = alphas_cumprod(SCHEDULE)[table.timesteps[1]]
    np.testing.assert_allclose(table.coef_x0[0], np.sqrt(ab) + np.sqrt(1 - ab))


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_step_counts(steps: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 1000"):
        sampler_table(SCHEDULE, steps, "ddim")


@pytest.mark.parametrize("steps", [1, 10, 25, 50])
@pytest.mark.parametrize("sampler", ["ddim", "ddim_legacy"])
@torch.no_grad()
def test_folded_head_is_the_loop(golden: Golden, sampler: Sampler, steps: int) -> None:
    table = sampler_table(golden.config.schedule, steps, sampler)
    network = golden.model.diff_ar_network
    affine = fold_head(network, table)
    torch.manual_seed(0)
    noise = torch.randn(7, golden.config.predictor.vq_dim)
    condition = torch.randn(7, golden.config.predictor.latent_dim)
    folded = (
        noise.double() @ affine.from_noise.T + condition.double() @ affine.from_condition.T + affine.offset
    )
    double = DiffusionNetwork(golden.config.predictor).double()
    double.load_state_dict({k: v.double() for k, v in network.state_dict().items()})
    # The angles of the time embedding are float32 in the release; only what follows them is exact.
    times = double.time_emb.mlp(network.time_emb.angles(torch.from_numpy(table.timesteps)).double())
    x = noise.double()
    for i in range(steps):
        x0 = double.denoise(x, condition.double(), times[i])
        x = table.coef_x0[i] * x0 + table.coef_xt[i] * x
    assert float((folded - x).abs().max() / x.abs().max()) < FOLD_TOLERANCE
    for head in (FoldedHead(network, table), UnrolledHead(network, table)):
        torch.testing.assert_close(head(noise, condition), x.float(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_not_drawn_hears_no_noise(golden: Golden) -> None:
    """`noise_from`: folded and unrolled alike, as if that part of the noise were 0."""
    table = sampler_table(golden.config.schedule, 10, "ddim")
    whole = golden.model.diff_ar_network
    config = msgspec.structs.replace(golden.config.predictor, noise_from=golden.config.predictor.vq_dim // 2)
    partly = DiffusionNetwork(config)
    partly.load_state_dict(whole.state_dict())
    torch.manual_seed(0)
    noise = torch.randn(7, config.vq_dim)
    condition = torch.randn(7, config.latent_dim)
    silenced = noise.clone()
    silenced[:, : config.noise_from] = 0
    for head in (FoldedHead, UnrolledHead):
        latent = head(partly, table)(noise, condition)
        torch.testing.assert_close(latent, head(whole, table)(silenced, condition), rtol=1e-5, atol=1e-6)
        assert float((latent - head(whole, table)(noise, condition)).abs().max()) > 1e-3
