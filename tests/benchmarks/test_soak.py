"""Every bound of the soak kept, and every one broken on purpose."""

from __future__ import annotations

import json
import mmap
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from benchmarks.soak import BLOCK_S, WARM_UP_S, Machine, Motion, Soak, main
from benchmarks.soak_audio import MINUTE_S, Programme, read_speech
from benchmarks.soak_bounds import Bound, judge
from benchmarks.soak_control import ControlProcess
from benchmarks.soak_record import Record, Spread, Trend, resident_bytes

from streamtalk import Frame, StreamTalkError, Talker
from streamtalk.model import Clock
from tests.runtime.toy import Toy

ROOT = Path(__file__).parents[2]
SPEECH = ROOT / "models" / "bundled" / "demo.wav"
RATE, FPS, DELAY_S = 16000, 30, 0.1
CLOCK = Clock(RATE, FPS, hop=1, context_samples=0, lookahead_samples=round(DELAY_S * RATE))
MINUTES = 3
MEMORY_MINUTES = 12
"""The least that memory is judged after, with its warm-up."""


def talking(i: int) -> float:
    """A lip opening in metres."""
    return float(0.01 * (1 + np.sin(i)))


def quiet(_: int) -> float:
    return 1.0


@dataclass
class Fake:
    """A stream and its machine, where time passes only as the test says."""

    frame_s: float = 0.004
    slower_each_frame_s: float = 0.0
    leak_bytes: float = 0.0
    """Each frame."""
    opening: Callable[[int], float] = talking
    late_every: int = 0
    busy: Callable[[int], float] = quiet
    """How many times as long the machine takes at frame i."""

    delay_s: float = DELAY_S
    template: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((2, 3), np.float32))
    clock_s: float = 0.0
    samples: int = 0
    made: int = 0

    def push(self, pcm: npt.NDArray[np.float32]) -> Iterator[Frame]:
        self.samples += len(pcm)
        while self.made < (self.samples / RATE - self.delay_s) * FPS:
            i = self.made
            self.made += 1
            self.clock_s += self.busy(i) * (self.frame_s + i * self.slower_each_frame_s)
            self.clock_s += 0.05 if self.late_every and i % self.late_every == 0 else 0
            vertices = np.zeros((2, 3), np.float32)
            vertices[0, 1] = self.opening(i)
            yield Frame(i, i / FPS, vertices, None)

    def machine(self) -> Machine:
        return Machine(lambda: self.clock_s, self.sleep, lambda: 10**8 + int(self.leak_bytes * self.made))

    def sleep(self, seconds: float) -> None:
        self.clock_s += seconds


class FakeControl:
    """Another process of the same machine: it does not age."""

    def __init__(self, fake: Fake) -> None:
        self.fake, self.resets = fake, 0

    def push(self, _: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        return np.array([1e3 * self.fake.busy(self.fake.made) * self.fake.frame_s])

    def reset(self) -> None:
        self.resets += 1


class Hush(Programme):
    """No audio, and no time spent to make it."""

    def __init__(self) -> None:
        super().__init__(np.zeros(10 * RATE, np.float32), RATE)

    def fill(self, key: int) -> None:
        pass


def soak(
    fake: Fake, minutes: int = MINUTES, control: bool = False, real_time: bool = False
) -> dict[str, Bound]:
    run = Soak(
        fake,
        Hush(),
        minutes,
        CLOCK,
        Motion(fake.template, np.array([[0, 1]], np.int32), 1.0),
        real_time=real_time,
        control=FakeControl(fake) if control else None,
        machine=fake.machine(),
    )
    return {bound.name: bound for bound in judge(run.run())}


def broken(bounds: dict[str, Bound]) -> set[str]:
    return {name for name, bound in bounds.items() if bound.met is False}


@pytest.mark.parametrize(
    ("control", "real_time"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_a_steady_stream_keeps_every_bound(control: bool, real_time: bool) -> None:
    bounds = soak(Fake(), control=control, real_time=real_time)
    assert [bound.met for bound in bounds.values()] == [True, None, True, True]
    assert bounds["latency"].value == pytest.approx(0, abs=0.1)
    assert f"of {MINUTES * MINUTE_S * FPS} frames" in bounds["late"].note


@pytest.mark.parametrize("control", [False, True])
def test_getting_slower_breaks_latency(control: bool) -> None:
    a_tenth = 0.1 * 0.004 / (FPS * MINUTE_S * MINUTES)
    bounds = soak(Fake(slower_each_frame_s=a_tenth), control=control)
    assert broken(bounds) == {"latency"}
    assert bounds["latency"].value == pytest.approx(10 * (MINUTES - 1) / MINUTES, abs=1.5)  # bins of 1 %


def test_a_machine_that_gets_slower_breaks_latency_only_without_a_control() -> None:
    def busy(i: int) -> float:
        return 1 + i / 2000

    assert broken(soak(Fake(busy=busy))) == {"latency"}
    assert broken(soak(Fake(busy=busy), control=True)) == set()


def test_a_latency_is_that_of_a_hop() -> None:
    """The other frames of a hop are there with its first, and would be the median."""
    fake = Fake(busy=lambda i: float(i % 4 == 0))
    motion = Motion(fake.template, None, 1.0)
    record = Soak(fake, Hush(), MINUTES, replace(CLOCK, hop=4), motion, machine=fake.machine()).run()
    assert record.column("p50_ms")[0] == pytest.approx(4, rel=0.01)
    assert record.frames == MINUTES * MINUTE_S * FPS


def test_getting_faster_breaks_nothing() -> None:
    assert not broken(soak(Fake(frame_s=0.01, slower_each_frame_s=-2e-7)))


def test_a_leak_breaks_memory() -> None:
    per_frame = 1e6 / (3600 * FPS)
    just_over = soak(Fake(leak_bytes=1.05 * per_frame), MEMORY_MINUTES)
    assert broken(just_over) == {"memory"}
    assert just_over["memory"].value == pytest.approx(1.05, rel=0.01)
    just_under = soak(Fake(leak_bytes=0.95 * per_frame), MEMORY_MINUTES)
    assert [bound.met for bound in just_under.values()] == [True] * 4


def test_memory_is_not_judged_where_it_cannot_be() -> None:
    leaking = soak(Fake(leak_bytes=1000))
    assert leaking["memory"].met is None
    assert "at least 10" in leaking["memory"].note
    fake = Fake()
    machine = Machine(lambda: fake.clock_s, fake.sleep, lambda: None)
    motion = Motion(fake.template, None, 1.0)
    record = Soak(fake, Hush(), MINUTES, CLOCK, motion, machine=machine).run()
    bound = {bound.name: bound for bound in judge(record)}["memory"]
    assert bound.met is None
    assert "statm" in bound.note


@pytest.mark.parametrize(
    "opening",
    [
        lambda i: 0.01 * (1 + np.sin(i)) * (1 + 0.1 * i / (FPS * MINUTE_S * MINUTES)),
        lambda i: 0.01 + 0.01 * np.sin(i) * (1 - 0.1 * i / (FPS * MINUTE_S * MINUTES)),
        lambda i: float("nan") if i == 3999 else 0.01 * (1 + np.sin(i)),
        lambda i: 0.0 if i > 2500 else 0.01 * (1 + np.sin(i)),
    ],
    ids=["mean", "spread", "one frame not finite", "frozen"],
)
def test_an_output_that_drifts_breaks_output(opening: Any) -> None:
    assert broken(soak(Fake(opening=opening))) == {"output"}


@pytest.mark.parametrize("real_time", [False, True])
def test_late_frames_break_late(real_time: bool) -> None:
    # A frame that takes 50 ms is late by itself; at 4 ms each those behind it catch up at once.
    assert broken(soak(Fake(late_every=5000), real_time=real_time)) == {"late"}


def test_one_late_frame_in_ten_thousand_is_allowed() -> None:
    late = soak(Fake(late_every=15_000), MEMORY_MINUTES)["late"]
    assert late.value  # the slow one, and the next
    assert late.met


def test_too_slow_for_its_own_frame_rate_is_late_all_the_time() -> None:
    value = soak(Fake(frame_s=1.02 / FPS), minutes=2)["late"].value
    assert value is not None
    assert value > 9000


def test_real_time_hands_out_no_audio_before_its_time() -> None:
    fake = Fake()
    early = []
    push = fake.push

    def watched(pcm: npt.NDArray[np.float32]) -> Iterator[Frame]:
        early.append(fake.clock_s < (fake.samples + len(pcm)) / RATE - 1e-9)
        return push(pcm)

    fake.push = watched  # type: ignore[method-assign]
    soak(fake, minutes=2, real_time=True)
    assert len(early) == (2 * MINUTE_S + WARM_UP_S) / BLOCK_S
    assert not any(early)


def test_the_control_has_the_first_and_the_last_minute_and_is_new_for_the_last() -> None:
    fake = Fake()
    control = FakeControl(fake)
    motion = Motion(fake.template, None, 1.0)
    record = Soak(fake, Hush(), 4, CLOCK, motion, control=control, machine=fake.machine()).run()
    assert np.isfinite(record.column("control_p50_ms")).tolist() == [True, False, False, True]
    assert control.resets == 1


def test_minutes_differ_and_a_key_gives_its_own_again() -> None:
    programme = Programme(read_speech(SPEECH, RATE), RATE)
    programme.fill(0)
    first = programme.minute.copy()
    programme.fill(1)
    assert np.abs(programme.minute - first).mean() > 0.001
    assert np.abs(first).max() <= 1
    for minute in (first, programme.minute):
        loud = np.sqrt(np.square(minute.reshape(-1, 1600)).mean(1))
        assert np.quantile(loud, 0.9) > 5 * np.quantile(loud, 0.1)  # pauses, and speech between them
    programme.fill(0)
    np.testing.assert_array_equal(programme.minute, first)


def test_sums_agree_with_numpy() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1000) + 3
    spread, trend = Spread(), Trend()
    for i, value in enumerate(values):
        spread.add(float(value))
        trend.add(i / 100, 4e9 + 5 * i + float(value))
    assert spread.mean == pytest.approx(values.mean())
    assert spread.std == pytest.approx(values.std())
    assert trend.slope == pytest.approx(np.polyfit(np.arange(1000) / 100, 5 * np.arange(1000) + values, 1)[0])
    assert Trend().slope is None


@pytest.mark.skipif(resident_bytes() is None, reason="no /proc/self/statm here")
def test_a_real_leak_shows(engine: Path) -> None:
    talker = Talker.load(engine, threads=1)
    # Pages of their own: what other tests gave back to the heap would hide a leak from there.
    hoard: list[mmap.mmap] = []
    with talker.open() as stream:

        class Leaking:
            delay_s, template = stream.delay_s, stream.template

            def push(self, pcm: npt.NDArray[np.float32]) -> Iterator[Frame]:
                for frame in stream.push(pcm):
                    hoard.append(mmap.mmap(-1, mmap.PAGESIZE))
                    hoard[-1][0] = 1
                    yield frame

        programme = Programme(read_speech(SPEECH, RATE), RATE)
        motion = Motion(stream.template, talker.landmarks["lip_pairs"], 1.0)
        record = Soak(Leaking(), programme, 2, talker.manifest.clock, motion).run()
    slope = record.memory.slope
    assert slope is not None
    assert slope / 1e6 == pytest.approx(mmap.PAGESIZE * FPS * 3600 / 1e6, rel=0.5)


def test_the_soak_itself_keeps_nothing() -> None:
    fake = Fake()
    run = Soak(fake, Hush(), MINUTES, CLOCK, Motion(fake.template, None, 1.0), machine=fake.machine())
    levels = []

    def watch(_minute: int, _record: Record) -> None:
        levels.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        run.run(watch)
    finally:
        tracemalloc.stop()
    assert levels[-1] - levels[0] < 4096  # of 3600 frames: a byte a frame that stays would nearly show


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Toy(n_vertices=8).write(tmp_path_factory.mktemp("toy") / "engine")


def test_the_command(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["--engine", str(engine), "--minutes", "2", "--threads", "1"]
    code = main([*arguments, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")])
    written = json.loads((tmp_path / "a.json").read_text())
    assert [bound["name"] for bound in written["bounds"]] == ["latency", "memory", "output", "late"]
    assert code == int(any(bound["met"] is False for bound in written["bounds"]))
    assert len(written["minutes"]) == 2
    assert written["minutes"][0]["frames"] == written["minutes"][1]["frames"] == MINUTE_S * FPS
    assert written["minutes"][1]["control_p50_ms"] > 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 4
    assert len(output.err.splitlines()) == 2


def test_a_control_that_dies_is_a_sentence(engine: Path) -> None:
    with ControlProcess(engine, "auto", 1) as control:
        assert len(control.push(np.zeros(RATE, np.float32))) > 0
        control._process.kill()
        with pytest.raises(StreamTalkError, match="--no-control"):
            control.push(np.zeros(RATE, np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "1"], "at least 2"),
        (["--engine", "nowhere"], "No exported model"),
        (["--wav", "nowhere.wav"], "no sound file"),
        (["--json", "nowhere/a.json"], "cannot be written"),
        (["--backend", "abacus"], "abacus"),
    ],
)
def test_what_a_user_can_fix_is_one_sentence(
    engine: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--engine", str(engine), "--minutes", "2", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
