"""The command line: what it writes, and that every bad input is one sentence and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from streamtalk import Frame, Talker
from streamtalk.app import cli
from streamtalk.app.audio import devices
from streamtalk.app.cli import main, run_mic
from streamtalk.app.output.npz import NPY_HEADER_BYTES
from streamtalk.model import sha256_of
from tests.runtime.app.audio.test_microphone import FakePortAudio
from tests.runtime.toy import LANDMARKS, SHAPES, SPEAKERS, Toy, speech

Array = npt.NDArray[Any]
ROOT = Path(__file__).parents[3]
SCRIPT = [sys.executable, str(ROOT / "run_mic.py")]
SECOND = 16000
VIVID = 100
"""Between the channels of a pixel of pure paint, of 255; backdrop, captions and a film's soft edges stay below."""


def write_wav(path: Path, pcm: Array, rate: int = 16000) -> Path:
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((pcm * 32767).astype("<i2").tobytes())
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_wav(tmp_path / "clip.wav", 0.5 * speech(SECOND))


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def script(engine: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*SCRIPT, "--engine", str(engine), *arguments],
        capture_output=True,
        check=False,
        timeout=60,
        **options,
    )


def test_frames_are_those_of_the_api(engine: Path, talker: Talker, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    arguments = ["--engine", str(engine), "--wav", str(clip), "--fast", "--out", str(out)]
    assert run_mic([*arguments, "--seed", "7", "--speaker", "ada=.7,bo=.3"]) == 0
    pcm = (0.5 * speech(SECOND) * 32767).astype("<i2") / np.float32(32768)
    with talker.open({"ada": 0.7, "bo": 0.3}, seed=7) as stream:
        made = [frame_arrays(frame) for frame in stream.push(pcm)]
        made += [frame_arrays(frame) for frame in stream.flush()]
    frames, weights = map(np.array, zip(*made, strict=True))
    with np.load(out) as data:
        still = {"fps", "faces", "colors", "template", "blendshape_names", *LANDMARKS}
        assert set(data.files) == {"vertices", "time_s", "blendshapes", *still}
        np.testing.assert_array_equal(data["vertices"], frames)
        np.testing.assert_array_equal(data["faces"], talker.faces)
        np.testing.assert_array_equal(data["template"], stream.template)
        np.testing.assert_array_equal(data["colors"], talker.colors_of({"ada": 0.7, "bo": 0.3}), strict=True)
        np.testing.assert_array_equal(data["blendshapes"], weights, strict=True)
        assert tuple(data["blendshape_names"]) == talker.blendshape_names == SHAPES
        for name, vertices in LANDMARKS.items():
            np.testing.assert_array_equal(data[name], vertices, strict=True)


def frame_arrays(frame: Frame) -> tuple[Array, Array]:
    assert frame.blendshapes is not None
    return frame.vertices.copy(), frame.blendshapes.copy()


def test_json_is_one_object_and_the_status_one_line(
    engine: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_mic(["--engine", str(engine), "--wav", str(clip), "--fast", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["frames"] == report["fps"] == 30
    assert report["delay_s"] == 0.09
    assert report["late"] == 0
    assert report["audio_s"] == 1
    assert 0 < report["rtf"] < 1
    assert report["backend"] == "onnxruntime-cpu"
    latency = report["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]
    assert len(err.splitlines()) == 1
    assert "30 frames  latency p50" in err


def test_a_file_plays_in_real_time(engine: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert main(["run", "--engine", str(engine), "--wav", str(clip), "--json"]) == 0
    assert 1 <= time.monotonic() - began < 3
    report = json.loads(capsys.readouterr().out)
    assert 1 <= report["wall_s"] < 2
    assert report["rtf"] < 0.5


def test_late_frames_are_counted(
    engine: Path, clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        def audio(self, _samples: Array) -> None: ...
        def frame(self, _frame: Any) -> None:
            time.sleep(0.06)

        def close(self) -> None: ...

    monkeypatch.setattr(cli, "_outputs", lambda *_: [Slow()])
    assert run_mic(["--engine", str(engine), "--wav", str(clip), "--json"]) == 0
    assert 20 <= json.loads(capsys.readouterr().out)["late"] <= 29


def test_stdin_is_the_same_audio(engine: Path, tmp_path: Path) -> None:
    s16 = (0.5 * speech(SECOND) * 32767).astype("<i2")
    f32 = (s16 / np.float32(32768)).astype("<f4")
    for raw_format, content in (("s16le", s16), ("f32le", f32)):
        done = script(
            engine,
            "--stdin",
            "--stdin-format",
            raw_format,
            "--out",
            f"{raw_format}.npz",
            input=content.tobytes(),
        )
        assert done.returncode == 0, done.stderr
    a, b = (np.load(tmp_path / f"{name}.npz")["vertices"] for name in ("s16le", "f32le"))
    assert a.shape == (30, 4, 3)
    np.testing.assert_array_equal(a, b)


def test_other_rates_are_resampled(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_wav(tmp_path / "a.wav", 0.5 * speech(44100), rate=44100)
    assert run_mic(["--engine", str(engine), "--wav", "a.wav", "--fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 30


def test_a_film_with_sound_and_a_contact_sheet(engine: Path, clip: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    arguments = ["--engine", str(engine), "--wav", str(clip), "--fast", "--out", "x.mp4"]
    assert run_mic([*arguments, "--contact-sheet", "x.png", "--out", "x.npz"]) == 0
    with av.open("x.mp4") as film:
        assert sum(1 for _ in film.decode(video=0)) == 30
    with av.open("x.mp4") as film:
        assert sum(frame.samples for frame in film.decode(audio=0)) == pytest.approx(SECOND, abs=2048)
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.wav", "x.mp4", "x.npz", "x.png"]


def test_the_speakers_own_colours_are_drawn(toy: Toy, clip: Path, tmp_path: Path) -> None:
    av, image = pytest.importorskip("av"), pytest.importorskip("PIL.Image")
    engine = toy.write(tmp_path / "painted")
    arrays: dict[str, Any] = toy.identity
    arrays["identity_colors"][:] = np.diag([255, 255, 255])[:, None]  # ada is red, bo green, cy blue
    np.savez(engine / "identity.npz", **arrays)
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["identity_sha256"] = sha256_of(engine / "identity.npz")
    (engine / "manifest.json").write_text(json.dumps(manifest))
    for channel, name in enumerate(SPEAKERS):
        arguments = ["--engine", str(engine), "--wav", str(clip), "--fast", "--speaker", name]
        assert run_mic([*arguments, "--contact-sheet", "x.png", "--out", "x.mp4"]) == 0
        with av.open("x.mp4") as film:
            first = next(film.decode(video=0)).to_ndarray(format="rgb24")
        for picture in (np.array(image.open("x.png").convert("RGB")), first):
            vivid = picture[np.ptp(picture, axis=-1) > VIVID]
            assert len(vivid) > 0
            assert set(vivid.argmax(axis=-1)) == {channel}


def corrupt(engine: Path, target: Path) -> str:
    directory = shutil.copytree(engine, target)
    graph = directory / "hop.onnx"
    graph.write_bytes(graph.read_bytes()[:-10])
    return str(directory)


BAD: dict[str, tuple[list[str], str]] = {
    "no file": (["--wav", "none.wav"], "no sound file none.wav"),
    "empty file": (["--wav", "empty.wav"], "empty.wav is empty"),
    "no samples": (["--wav", "zero.wav"], "zero.wav holds no samples"),
    "too short": (["--wav", "short.wav"], "short.wav is too short: 18.8 ms, and one frame needs 33.3 ms"),
    "no sound": (["--wav", "text.wav"], "text.wav is not a sound file"),
    "folder": (["--wav", "."], "is a folder"),
    "speaker": (["--wav", "clip.wav", "--speaker", "zoe"], "No speaker 'zoe'. This model knows ada, bo, cy"),
    "speaker index": (["--wav", "clip.wav", "--speaker", "3"], "No speaker 3"),
    "blend": (["--wav", "clip.wav", "--speaker", "ada=x"], "'ada=x' is not NAME=WEIGHT"),
    "seed": (["--wav", "clip.wav", "--seed", "-1"], "seed"),
    "seed text": (["--wav", "clip.wav", "--seed", "x"], "invalid int value"),
    "backend": (
        ["--wav", "clip.wav", "--backend", "abacus"],
        "There are: auto, tensorrt, tensorrt_rtx, onnxruntime-cuda, onnxruntime-cpu",
    ),
    "threads": (["--wav", "clip.wav", "--threads", "100000"], "threads"),
    "out suffix": (["--wav", "clip.wav", "--out", "/dev/full"], "must end in .npz"),
    "out folder": (["--wav", "clip.wav", "--out", "none/x.npz"], "there is no folder"),
    "out device": (["--wav", "clip.wav", "--out", "full.npz"], "not a regular file"),
    "sheet folder": (["--wav", "clip.wav", "--contact-sheet", "none/x.png"], "there is no folder"),
    "two sources": (["--wav", "clip.wav", "--stdin"], "not allowed with"),
    "fast microphone": (["--fast"], "--fast needs"),
    "option": (["--bogus"], "--bogus"),
    "engine": (["--wav", "clip.wav", "--engine", "none"], "python export.py"),
    "corrupt engine": (["--wav", "clip.wav", "--engine", "corrupt"], "not the file that was exported"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence_and_exit_code_2(
    engine: Path,
    clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no sound " * 100)
    (tmp_path / "full.npz").symlink_to("/dev/full")
    write_wav(tmp_path / "zero.wav", speech(0))
    write_wav(tmp_path / "short.wav", speech(300))
    corrupt(engine, tmp_path / "corrupt")
    before = sorted(tmp_path.rglob("*"))
    assert clip.exists()
    assert run_mic(["--engine", str(engine), "--out", "good.npz", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-made is left


def test_a_bad_sample_keeps_what_came_before(engine: Path) -> None:
    pcm = 0.5 * speech(3 * SECOND)
    pcm[2 * SECOND + 5] = np.nan
    arguments = ["--engine", str(engine), "--stdin-format", "f32le", "--stdin", "--out", "x.npz", "--json"]
    done = subprocess.run([*SCRIPT, *arguments], input=pcm.tobytes(), capture_output=True, check=False)
    assert done.returncode == 2
    assert b"stdin: sample 32005 is not a number" in done.stderr
    assert b"Traceback" not in done.stderr
    frames = json.loads(done.stdout)["frames"]
    assert 55 <= frames <= 60
    assert len(np.load("x.npz")["vertices"]) == frames


def test_clipping_is_a_warning(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_wav(tmp_path / "a.wav", np.clip(3 * speech(SECOND), -1, 1))
    assert run_mic(["--engine", str(engine), "--wav", "a.wav", "--fast"]) == 0
    assert "% of the samples clip" in capsys.readouterr().err


def test_no_portaudio_no_device(
    engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "portaudio", lambda: FakePortAudio(names=["Speakers"]))
    assert main(["devices"]) == 0
    assert "No sound input device" in capsys.readouterr().out
    assert run_mic(["--engine", str(engine)]) == 2
    assert "No sound input device" in capsys.readouterr().err
    monkeypatch.setattr(cli, "portaudio", FakePortAudio)
    assert run_mic(["--list-devices"]) == 0
    assert "USB Mic" in capsys.readouterr().out
    assert run_mic(["--engine", str(engine), "--device", "7"]) == 2
    assert "No input device 7" in capsys.readouterr().err

    class NoLibrary:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.setattr(cli, "portaudio", devices.portaudio)
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoLibrary(), *sys.meta_path])
    for arguments in (["--list-devices"], ["--engine", str(engine)]):
        assert run_mic(arguments) == 2
        assert "apt install libportaudio2" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_was_made(engine: Path, tmp_path: Path, number: signal.Signals) -> None:
    write_wav(tmp_path / "long.wav", 0.5 * speech(20 * SECOND))
    arguments = ["--wav", "long.wav", "--out", "x.npz", "--json"]
    running = subprocess.Popen(
        [*SCRIPT, "--engine", str(engine), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 20
    part = tmp_path / "x.npz.part"
    while not (part.exists() and part.stat().st_size > 1500):
        assert time.monotonic() < end
        time.sleep(0.02)
    running.send_signal(number)
    out, err = running.communicate(timeout=20)
    assert running.returncode == 130
    assert "Traceback" not in err
    report = json.loads(out)
    assert report["interrupted"]
    assert len(np.load("x.npz")["vertices"]) == report["frames"] > 10
    assert report["frames"] == int(report["audio_s"] * 16000 * 30) // 16000


def test_ctrl_c_ends_a_quiet_pipe(engine: Path, tmp_path: Path) -> None:
    running = subprocess.Popen(
        [*SCRIPT, "--engine", str(engine), "--stdin", "--out", "x.npz"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert running.stdin is not None
    running.stdin.write((0.5 * speech(SECOND) * 32767).astype("<i2").tobytes())
    running.stdin.flush()
    end = time.monotonic() + 20
    part = tmp_path / "x.npz.part"
    headers = 62 + NPY_HEADER_BYTES  # a zip64 entry of this name, and what says that it is an array
    while not (part.exists() and part.stat().st_size >= headers + 28 * 48):
        assert time.monotonic() < end
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert running.returncode == 0
    assert b"Traceback" not in err
    assert len(np.load("x.npz")["vertices"]) == 30


def test_a_reader_that_went_away(engine: Path, clip: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [*SCRIPT, "--engine", str(engine), "--wav", str(clip), "--fast", "--out", "x.npz", "--json"]
    for stdout in (writer, Path("/dev/full").open("w")):  # noqa: SIM115
        done = subprocess.run(arguments, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2
        assert "stdout cannot be written" in done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        assert len(np.load("x.npz")["vertices"]) == 30


def test_stderr_may_be_closed(engine: Path, clip: Path) -> None:
    command = " ".join([*SCRIPT, "--engine", str(engine), "--wav", str(clip), "--fast", "--json", "2>&-"])
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout)["frames"] == 30


def test_help_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    assert "--contact-sheet" in capsys.readouterr().out
    assert main([]) == 2
