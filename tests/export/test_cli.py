"""The exporter's command line: what it writes, and every way it refuses."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from streamtalk.model import FILE_NAME, Parity
from streamtalk_export import export_model as exporter
from streamtalk_export.cli import main
from streamtalk_export.directory import new_directory
from streamtalk_export.errors import ExportError
from streamtalk_export.graphs import Hop
from tests.export.golden import DATA, Driver, Golden, load_golden

GOLDEN = load_golden("vocaset_small")
SMALL = ["--config", str(DATA / "vocaset_small" / "config.yaml")]
SMALL += ["--hubert-config", str(DATA / "vocaset_small" / "hubert_config.json"), "--random-weights", "3"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "vocaset"], "needs --checkpoint FILE or --random-weights SEED"),
        (["--checkpoint", "x.ckpt"], "--config is needed"),
        (["--config", "none.yaml", "--random-weights", "1"], "neither a file nor a preset"),
        ([*SMALL[:2], "--checkpoint", "none.ckpt"], "audio_encode_dim is 40"),
        ([*SMALL[:4], "--checkpoint", "none.ckpt"], "No checkpoint at none.ckpt"),
        ([*SMALL, "--template", "none.npy"], "No template at none.npy"),
        ([*SMALL, "--targets", "coreml"], "--targets coreml is unknown"),
        ([*SMALL, "--lookahead", "1"], "lookahead of 1 ms is too short"),
        ([*SMALL, "--steps", "2000"], "expected 1 to 1000"),
        ([*SMALL, "--decode-window", "1"], "--decode-window must be at least 2"),
    ],
)
def test_refusals(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "model"
    assert main([*arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_export_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert main([*SMALL, "--out", str(tmp_path)]) == 2
    assert "is not an exported model" in capsys.readouterr().err
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ['{"name": "A web page"}', "[]", "not JSON"])
def test_another_programs_manifest_makes_no_export(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "index.html").write_text("mine")
    assert main([*SMALL, "--out", str(tmp_path)]) == 2
    assert "is not an exported model" in capsys.readouterr().err
    assert (tmp_path / "index.html").read_text() == "mine"


def test_what_a_link_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_directory(tmp_path / "link") as building:
        (building / "new").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "new").exists()


@pytest.mark.parametrize("failing", [1, 2])
def test_what_cannot_be_replaced_stays(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / FILE_NAME).write_text('{"schema": 0, "graphs": {}, "checkpoint_sha256": ""}')
    replace, calls = Path.replace, 0

    def fails(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(39, "Directory not empty")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(ExportError, match="Directory not empty"), new_directory(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (out / FILE_NAME).exists()


def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(exporter, "certify", terminated)
    assert main([*SMALL, "--out", str(tmp_path / "model"), "--history", "4"]) == 130
    assert capsys.readouterr().err.endswith("export.py: interrupted; nothing was written.\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--batch", "--history", "--hop", "--decode-window"])
def test_sizes_that_no_machine_holds_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("1000000000", "99999999999999999999"):
        with pytest.raises(SystemExit) as caught:
            main([*SMALL, option, value])
        assert caught.value.code == 2
        assert "must be 1 to 4096" in capsys.readouterr().err


def test_a_missed_bound_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = Parity(graph="hop", measure="max_abs_error", frames=1, value=float("nan"), bound=1.0)
    monkeypatch.setattr(exporter, "certify", lambda *_: [missed])
    assert main([*SMALL, "--out", str(tmp_path / "model"), "--history", "4"]) == 2
    assert "do not reproduce the model: hop max_abs_error nan > 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_settings_reach_the_manifest_and_an_export_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "model"
    options = "--history 6 --decode-window 5 --hop 2 --audio-context 0.5 --batch 2 3".split()
    options += ["--lookahead", "120", "--steps", "10", "--sampler", "ddim"]
    assert main([*SMALL, "--out", str(out), *options]) == 0
    first = Driver(out).manifest
    assert (first.history, first.decode_window, first.hop, first.steps) == (6, 5, 2, 10)
    assert first.row_counts == (1, 2, 3)
    assert (first.context_samples, first.lookahead_samples) == (8000, 1920)
    assert first.window_samples == 8000 + 534 + 1920
    assert first.checkpoint_sha256 == "random-weights-3"
    (out / "leftover.engine").touch()
    assert main([*SMALL, "--out", str(out), "--history", "4"]) == 0
    assert Driver(out).manifest.history == 4
    assert Driver(out).manifest.row_counts == (1,)
    assert Driver(out).manifest.decode_window == 4
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not (out / "leftover.engine").exists()


def test_a_graph_whose_rows_mix_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crossed(Hop):
        """Each row gets its neighbour's audio: in a graph of one row nothing is wrong."""

        def forward(self, pcm: Tensor, *rest: Any, **named: Any) -> Any:
            return super().forward(pcm.roll(1, 0), *rest, **named)

    monkeypatch.setattr(exporter, "Hop", Crossed)
    options = ["--out", str(tmp_path / "model"), "--history", "4"]
    assert main([*SMALL, *options, "--batch", "2"]) == 2
    assert "do not reproduce the model: hop_b2 max_abs_error_of_rows" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([*SMALL, *options]) == 0


def test_identity_file(exported: Callable[[Golden, str], Driver]) -> None:
    directory = exported(GOLDEN, "ddim").directory
    with np.load(directory / "identity.npz", allow_pickle=False) as identity:
        assert identity["styles"].shape == (3, 48)
        np.testing.assert_allclose(identity["start_latent"], GOLDEN["start_latent"], atol=1e-6)
        assert identity["templates"].shape == (3, 93, 3)
        assert np.array_equal(identity["templates"][2].reshape(-1), GOLDEN["template"])
        assert len(identity["speaker_names"]) == 3
        assert "identity_colors" not in identity.files


def test_the_speakers_colours_reach_the_identity_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n, V = 3, 93  # of the small preset
    paint = np.random.default_rng(0).integers(0, 256, (n, V, 3), np.uint8)
    face, out = tmp_path / "face.npz", tmp_path / "model"
    arguments = [*SMALL, "--out", str(out), "--history", "4", "--faces", str(face)]
    np.savez(face, faces=[[0, 1, 2]], identity_colors=paint)
    assert main(arguments) == 0
    with np.load(out / "identity.npz") as identity:
        np.testing.assert_array_equal(identity["identity_colors"], paint, strict=True)
        np.testing.assert_array_equal(identity["colors"], paint[0], strict=True)
    np.savez(face, faces=[[0, 1, 2]], identity_colors=paint[:2])
    assert main(arguments) == 2
    assert "`identity_colors` of 2 speakers; the model has 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--audio-context", "nan"],
        ["--lookahead", "inf"],
        ["--lookahead", "-1"],
        ["--random-weights", str(2**64)],
    ],
)
def test_numbers_out_of_range(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--config", "vocaset", *arguments])
    assert caught.value.code == 2
    assert "must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        '{"hidden_size": "wide"}',
        '{"conv_dim": [16]}',
        '{"hidden_size": 36, "num_attention_heads": 7}',
        '{"feat_extract_norm": "layer"}',
        "[1]",
        "{",
    ],
)
def test_hubert_configs_that_cannot_be(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hubert.json"
    path.write_text(text)
    assert main([*SMALL[:2], "--hubert-config", str(path), "--random-weights", "1"]) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("hop", ["5", "7"])
def test_hops_that_do_not_divide_the_probe(hop: str, tmp_path: Path) -> None:
    assert main([*SMALL, "--out", str(tmp_path / "m"), "--history", "4", "--hop", hop]) == 0
