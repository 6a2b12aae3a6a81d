"""Every voice of the corpus, and where the optional engines are found.

The test voices (accents, variants and flite's `awb`) speak in evaluation only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streamtalk_training import flite, neural, pico
from streamtalk_training.festival import Festival, find_festival
from streamtalk_training.statistical import Statistical, find_statistical

# The first accents are doubled because most listeners' English is nearest to them.
TRAIN_ACCENTS = (
    *("en-us", "en-us", "en-us", "en-gb-x-rp", "en-gb-x-rp"),
    *("en-gb-scotland", "en-029", "en-gb-x-gbclan", "en"),
)
TEST_ACCENTS = ("en-us-nyc", "en-gb-x-gbcwmd")
FOREIGN_ACCENTS = (
    *("de", "fr", "es", "it", "pt-br", "pl", "nl", "ru"),
    *("sv", "tr", "fi", "cs", "hu", "id", "sw"),
)
TRAIN_VARIANTS = (
    *("", "", "", "f1", "f1", "f2", "f2", "f3", "f3", "f4", "m1", "m1", "m2", "m2", "m3", "m3"),
    *("m5", "m6", "m7", "m8", "klatt", "klatt2", "klatt4", "klatt5", "klatt6", "Alicia", "Andrea", "Andy"),
    *("Annie", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario"),
    *("Michael", "Mike", "Nguyen", "Reed", "RicishayMax", "Storm", "adam", "anika", "announcer", "antonio"),
    *("belinda", "benjamin", "boris", "caleb", "david", "ed", "edward", "edward2", "grandma", "grandpa"),
    *("gustave", "ian", "iven", "iven2", "iven3", "iven4", "john", "kaukovalta", "linda", "marcelo"),
    *("michel", "miguel", "mike2", "norbert", "pablo", "paul", "pedro", "quincy", "rob", "robert"),
    *("sandro", "shelby", "steph2", "steph3", "travis", "victor", "whisper", "whisperf"),
)
TEST_VARIANTS = ("f5", "m4", "klatt3", "steph", "max", "Alex", "aunty", "zac")
TRAIN_FLITE_VOICES = ("slt", "rms", "kal16")
FLITE_MEAN_PITCH_HZ = {"slt": 175.0, "rms": 100.0, "kal16": 105.0}  # rms keeps its own, whatever is asked
TEST_FLITE_VOICE = "awb"
PICO_VOICES = ("en-US", "en-GB")
FESTIVAL_VOICES = ("cmu_us_slt_arctic_hts", "kal_diphone", "ked_diphone")


@dataclass(frozen=True)
class Engines:
    """Programs and data that may be missing: the corpus does without what is None."""

    wordnet: Path | None = None
    flite: Path | None = None
    festival: Festival | None = None
    soundfont: Path | None = None
    pico: Path | None = None
    abroad: Festival | None = None
    neural: bool = False
    english: Path | None = None
    statistical: Statistical | None = None

    def found(self) -> dict[str, bool]:
        """What is at hand, by name: two corpora are comparable where this is the same."""
        return {name: value not in (None, False) for name, value in vars(self).items()}


def find_engines(root: Path) -> Engines:
    """What was unpacked below `root` (Debian packages, `dpkg -x`), or is installed where `root` is `/`.

    flite alone is also found on the path where `root` lacks it, and Pico and the neural voices are Python packages.
    """
    share = root / "usr" / "share"
    speaker = find_festival(root)
    wordnet, soundfont = share / "wordnet", share / "sounds" / "sf2" / "TimGM6mb.sf2"
    return Engines(
        wordnet if (wordnet / "data.noun").exists() else None,
        flite.find_flite(root),
        speaker,
        soundfont if soundfont.exists() else None,
        pico.find_pico(),
        speaker if speaker is not None and speaker.abroad else None,
        neural.neural_voices_installed(),
        neural.find_english_styles(root),
        find_statistical(root, speaker),
    )
