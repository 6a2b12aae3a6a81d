"""The GPU benchmark on a GPU of host memory: what it runs, and what it makes of the figures."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import gpu
from benchmarks.gpu_runs import StageRun, hops, opened, steps, turns
from benchmarks.latency_rows import summary

from streamtalk import Talker
from streamtalk.backends import Choice
from streamtalk.cuda.driver import open_driver
from streamtalk.errors import BackendError, MissingDependencyError
from streamtalk.identity import read_identity
from streamtalk.manifest import read_manifest
from tests.runtime.cuda.fake import fake_gpu
from tests.runtime.toy import Toy

FRAMES = 7


@pytest.fixture
def talker(tmp_path: Path) -> Any:
    """Three voices on the fake device."""
    directory = Toy(hop=2, batch=3, window_samples=2934).write(tmp_path / "engine")
    manifest = read_manifest(directory)
    identity = read_identity(directory, manifest)
    return Talker(manifest, identity, Choice(fake_gpu(directory, manifest), {}))


def test_turns_and_hops_are_timed_with_all_voices(talker: Any) -> None:
    calls = talker.choice.backend.driver.calls
    with opened(talker) as slots:
        calls.clear()
        assert len(list(turns(slots, talker.manifest, FRAMES))) == FRAMES
        # A hop's first turn runs twice, and its encoder once.
        hops_run = -(-FRAMES // talker.manifest.hop)
        assert calls.count("launch") == FRAMES + 2 * hops_run
        assert np.isfinite(slots.vertices()).all()
        assert len(list(hops(slots, talker.manifest, 3))) == 3


def test_a_stage_is_run_on_its_own_memory(talker: Any) -> None:
    backend = talker.choice.backend
    before = set(backend.driver.memory)
    with closing(StageRun(backend.driver, backend.frame, talker.manifest)) as run:
        backend.driver.calls.clear()
        assert run(4) > 0
        assert backend.driver.calls.count("launch") == 4
    assert set(backend.driver.memory) == before
    assert backend.frame.open_runs == 0


@pytest.mark.parametrize("staggered", [False, True])
def test_steps_are_timed_where_every_voice_has_a_frame(talker: Any, staggered: bool) -> None:
    pcm = np.zeros(16000, np.float32)
    whole = (len(pcm) - talker.manifest.window_samples) * talker.fps // 16000
    assert whole - 6 <= len(list(steps(talker, pcm, staggered))) <= len(pcm) * talker.fps // 16000


def test_targets_are_read_off_the_rows() -> None:
    rows = [
        summary("vocaset", "released-streaming", "frame-0", 0.0, "frame", [6e-3], fps=30),
        summary("vocaset", "tensorrt_rtx", "", 0.0, "frame", [0.25e-3, 0.25e-3, 0.25e-3], fps=30),
        summary("vocaset", "tensorrt_rtx", "", 0.0, "audio_encoder", [0.8e-3]),
        summary("vocaset", "tensorrt_rtx", "batch-512-step", 0.0, "total", [1 / 30], fps=30),
        summary("biwi", "tensorrt_rtx", "", 0.0, "frame", [9.0], fps=25),
    ]
    found = {target.name.partition(": ")[2]: target for target in gpu.targets(rows)}
    assert found["frame p50"].met and found["frame p99"].met
    assert not found["audio encoder p50"].met
    assert found["times faster than the released first frame"].measured == pytest.approx(24)
    assert found["real-time streams at hop 4"].measured == pytest.approx(512)
    assert {asdict(target)["bound"] for target in found.values()} == set(gpu.TARGETS.values())


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        open_driver()
    except (BackendError, MissingDependencyError) as error:
        assert gpu.main([]) == 2
        assert str(error) in capsys.readouterr().err
    else:
        pytest.skip("this machine has a GPU")
