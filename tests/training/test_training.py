"""Both stages on a made-up corpus: they learn, they resume exactly, and what they train is what is streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from streamtalk_export.blendshapes import ARKIT_NAMES
from streamtalk_export.checkpoint import read_state
from streamtalk_export.config import load_config
from streamtalk_export.mel import MelEncoder
from streamtalk_training import bundled, corpus, runs, sounds, stage1, stage2
from streamtalk_training.coarticulation import controls_from_weights
from streamtalk_training.curves import plot
from streamtalk_training.dataset import (
    CLOCK_S,
    CLOCK_SCALE,
    FAVOURED,
    MotionData,
    blink_clock,
    clip_mel,
    crops,
    frame_features,
    mel_data,
    motion_data,
    spoken_visemes,
)
from streamtalk_training.hearing import disturbed
from streamtalk_training.metrics import blinks
from streamtalk_training.motion import (
    MotionSpace,
    face_maps,
    lip_gap_loss,
    lip_gap_vectors,
    sealing,
    widened,
)
from streamtalk_training.pack import ARCHITECTURE, checkpoint, mean, pack, sharpened, sharpening, trained
from streamtalk_training.pack import main as pack_main
from streamtalk_training.shipped import WEIGHTS, alike, calmed, grown, redrawn, unpacked
from streamtalk_training.stage2 import energy_score
from streamtalk_training.talker import Talker, decoded_stream, mouth_latents, rollout
from streamtalk_training.validate import Validation, eyelids, scores, streamed
from streamtalk_training.visemes import Phone, tables
from streamtalk_training.voices import TRAIN_FLITE_VOICES
from tests.training.tiny import (
    GAINS,
    LIP_PAIRS,
    SHAPES,
    USED,
    VERTICES,
    tiny_clips,
    tiny_config,
    tiny_space,
)

SPACE = tiny_space()
BUNDLED = Path(__file__).parents[2] / "models/bundled/config.yaml"
CONFIG = tiny_config(SPACE)
STAGE1 = stage1.Stage1(steps=40, batch=4, frames=12, windows=4)
STAGE2 = stage2.Stage2(steps=12, batch=3, hint_batch=3, frames=12, windows=3)
MAPS = face_maps(SPACE, ARKIT_NAMES, SHAPES)
SAME_SUM = 2e-5  # the same sums in another order, in float32


@pytest.fixture(scope="module")
def motion() -> MotionData:
    return motion_data(tiny_clips(), SPACE, GAINS)


@pytest.fixture(scope="module")
def autoencoder(motion: MotionData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("stage1")
    return stage1.train(CONFIG, SPACE, motion, STAGE1, folder).state_dict()


def random_talker() -> Talker:
    torch.manual_seed(0)
    return Talker(CONFIG).eval()


def test_stage1_learns_and_logs(motion: MotionData, tmp_path: Path) -> None:
    plan = stage1.Stage1(steps=100, batch=4, frames=12, windows=4)
    stage1.train(CONFIG, SPACE, motion, plan, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 100]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_stage1_resumed_equals_uninterrupted(motion: MotionData, tmp_path: Path) -> None:
    whole = stage1.train(CONFIG, SPACE, motion, STAGE1, tmp_path / "whole").state_dict()
    stage1.train(CONFIG, SPACE, motion, STAGE1, tmp_path / "cut", until=17)
    again = stage1.train(CONFIG, SPACE, motion, STAGE1, tmp_path / "cut").state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


def test_stage2_resumed_equals_uninterrupted(
    motion: MotionData, autoencoder: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    mel = mel_data((clip.pcm for clip in tiny_clips()), MelEncoder(CONFIG.audio))
    whole = stage2.train(CONFIG, SPACE, motion, mel, autoencoder, STAGE2, tmp_path / "whole").state_dict()
    stage2.train(CONFIG, SPACE, motion, mel, autoencoder, STAGE2, tmp_path / "cut", until=7)
    again = stage2.train(CONFIG, SPACE, motion, mel, autoencoder, STAGE2, tmp_path / "cut").state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
    frozen = [name for name in autoencoder if name.startswith(("encoder.", "quantize."))]
    for name in frozen:
        torch.testing.assert_close(whole[f"autoencoder.{name}"], autoencoder[name], rtol=0, atol=0)


def test_neither_half_of_a_latent_tells_of_the_other_half_of_the_face(motion: MotionData) -> None:
    """Of which the encoder as such leaves a trace: that is why the halves are encoded one by one."""
    talker, lips = random_talker(), mouth_latents(CONFIG)
    moved = crops(motion, None, None, 3, 12, np.random.default_rng(0)).motion
    other_mouth, other_upper = moved.clone(), moved.clone()
    other_mouth[..., : SPACE.mouth] += torch.randn(3, 13, SPACE.mouth)
    other_upper[..., SPACE.mouth :] += torch.randn(3, 13, SPACE.width - SPACE.mouth)
    with torch.no_grad():
        latents, *others = (
            stage2.apart(talker, each, SPACE.mouth) for each in (moved, other_mouth, other_upper)
        )
        traced = talker.autoencoder.encoder(other_mouth) - talker.autoencoder.encoder(moved)
    torch.testing.assert_close(others[0][..., lips:], latents[..., lips:], rtol=0, atol=0)
    torch.testing.assert_close(others[1][..., :lips], latents[..., :lips], rtol=0, atol=0)
    for each, half in zip(others, (slice(lips), slice(lips, None)), strict=True):
        assert float((each - latents)[..., half].abs().max()) > 1e-3
    assert float(traced[..., lips:].abs().max()) > 1e-3


def test_a_run_begins_with_the_weights_of_another(
    motion: MotionData, autoencoder: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Its first step is a small one, away from the given weights and from stage 1's decoder, and trains all."""
    mel = mel_data((clip.pcm for clip in tiny_clips()), MelEncoder(CONFIG.audio))
    torch.manual_seed(5)
    begin = stage2.Student(CONFIG)
    given = {name: value.clone() for name, value in begin.state_dict().items()}
    plan = replace(STAGE2, steps=2).continuing()
    assert plan.peak_rate == stage2.CONTINUED_RATE * STAGE2.peak_rate
    of_run = (CONFIG, SPACE, motion, mel, autoencoder, plan, tmp_path)
    begun = stage2.train(*of_run, until=1, begin=begin).state_dict()
    expected = {name.removeprefix("talker."): value for name, value in given.items()}
    expected |= {f"autoencoder.{name}": value for name, value in autoencoder.items()}
    moved = {name: float((value - expected[name]).abs().max()) for name, value in begun.items()}
    assert 0 < max(moved.values()) < 1e-4  # the rate warms up
    trained = [name for name, most in moved.items() if most > 0]
    for part in ("audio_encoder", "diff_ar_network", "autoencoder.decoder"):
        assert any(name.startswith(part) for name in trained), part
    again = stage2.train(
        *of_run, begin=stage2.Student(CONFIG)
    ).state_dict()  # goes on, and does not begin anew
    step = max(float((again[name] - value).abs().max()) for name, value in begun.items())
    assert 0 < step < 2e-4


def test_only_a_student_of_the_same_model_is_begun_with(tmp_path: Path) -> None:
    student, path = stage2.Student(CONFIG), tmp_path / "state.pt"
    with pytest.raises(FileNotFoundError, match="to begin with"):
        stage2.student_of(path, CONFIG)
    torch.save({"model": student.state_dict()}, path)
    again = stage2.student_of(path, CONFIG).state_dict()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
    whole = path.read_bytes()
    for spoil in (
        lambda: path.write_bytes(whole[: len(whole) // 2]),
        lambda: path.write_bytes(b"nothing of the kind"),
        lambda: torch.save({"model": student.talker.state_dict()}, path),
        lambda: torch.save(student.state_dict(), path),
    ):
        spoil()
        with pytest.raises(ValueError, match="is no stage 2 of this model"):
            stage2.student_of(path, CONFIG)


def test_an_audio_encoder_grows_without_a_change_of_what_it_says() -> None:
    """Wider blocks and a fine stem begin with nothing to add, and learn; nothing shrinks."""
    larger = msgspec.structs.replace(
        CONFIG, audio=msgspec.structs.replace(CONFIG.audio, expansion=3, stem_width=8)
    )
    small, large = random_talker(), Talker(larger)
    large.load_state_dict(grown(small.state_dict(), large))
    log_mel = 10 * torch.rand(2, CONFIG.audio.mel_bins, 120)
    before, after = (talker.audio_encoder.from_log_mel(log_mel) for talker in (small, large))
    torch.testing.assert_close(after, before, rtol=0, atol=SAME_SUM)
    (after * torch.randn_like(after)).sum().backward()  # type: ignore[no-untyped-call]
    ways_out = [p for name, p in large.audio_encoder.named_parameters() if name.endswith("out.weight")]
    assert len(ways_out) == 1 + len(CONFIG.audio.dilations)
    assert all(p.grad is not None and float(p.grad[:, -8:].abs().max()) > 0 for p in ways_out)
    with pytest.raises(RuntimeError, match="size mismatch"):
        small.load_state_dict(grown(large.state_dict(), small))


def test_a_run_may_begin_with_a_deeper_audio_encoder(
    motion: MotionData, autoencoder: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """New blocks add nothing at first; the share of the hint trains the audio encoder, new blocks included, alone."""
    deeper = msgspec.structs.replace(
        CONFIG, audio=msgspec.structs.replace(CONFIG.audio, dilations=(*CONFIG.audio.dilations, 1))
    )
    torch.manual_seed(5)
    student, path = stage2.Student(CONFIG), tmp_path / "state.pt"
    torch.save({"model": student.state_dict()}, path)
    begin = stage2.student_of(path, deeper)
    log_mel = torch.randn(2, CONFIG.audio.mel_bins, 120)
    edge = 2  # log-mel frames that one block of dilation 1 needs on either side
    torch.testing.assert_close(
        begin.talker.audio_encoder.from_log_mel(log_mel),
        student.talker.audio_encoder.from_log_mel(log_mel[..., edge:-edge]),
        rtol=0,
        atol=SAME_SUM,
    )
    with pytest.raises(ValueError, match="is no stage 2 of this model"):
        torch.save({"model": begin.state_dict()}, path)
        stage2.student_of(path, CONFIG)  # blocks are not dropped

    plan = replace(STAGE2, steps=4).continuing(hint_share=0.5)
    mel = mel_data((clip.pcm for clip in tiny_clips()), MelEncoder(deeper.audio))
    before = {name: value.clone() for name, value in begin.talker.diff_ar_network.state_dict().items()}
    of_run = (deeper, SPACE, motion, mel, autoencoder, plan, tmp_path / "run")
    heard = stage2.train(*of_run, until=2, begin=begin)
    new = heard.audio_encoder.state_dict()[f"blocks.{len(CONFIG.audio.dilations)}.out.weight"]
    assert float(new.abs().max()) > 0
    for name, value in heard.diff_ar_network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    after = stage2.train(*of_run, begin=begin).diff_ar_network.state_dict()
    assert max(float((after[name] - value).abs().max()) for name, value in before.items()) > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hint-share", "0.5"], "goes with --begin"),
        (["--hint-share", "1"], "below 1"),
        (["--blinks", "15"], "go with --begin FOLDER"),
        (["--upper", "none", "--begin", "none"], "go with --begin FOLDER"),
    ],
)
def test_options_that_do_not_go_together_are_told(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        stage2.main(["--corpus", "none", "--run", "none", *options])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def packed_talker(folder: Path) -> Talker:
    """A talker, packed in `folder`, as it comes out again."""
    torch.manual_seed(5)
    talker = Talker(CONFIG)
    torch.nn.init.normal_(talker.autoencoder.decoder.vertice_map_reverse.weight)  # so that motion is seen
    pack(talker, MAPS, folder / WEIGHTS)
    return unpacked(folder, CONFIG, MAPS)


def test_a_packed_talker_comes_out_as_it_went_in_but_for_the_clock(tmp_path: Path) -> None:
    again = packed_talker(tmp_path)
    torch.manual_seed(5)
    talker = Talker(CONFIG)
    torch.nn.init.normal_(talker.autoencoder.decoder.vertice_map_reverse.weight)
    seen = torch.eye(SPACE.width)
    seen[SPACE.clock :] = 0  # nor what pads the coordinates to a multiple of three
    motion, latents = torch.randn(2, 6, SPACE.width) @ seen, torch.randn(2, 6, 8)
    half = 4e-3  # what half precision leaves of numbers about 1
    for ours, theirs in (
        (again.autoencoder.encoder(motion), talker.autoencoder.encoder(motion)),
        (again.autoencoder.decoder(latents), talker.autoencoder.decoder(latents) @ seen),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=half)
    heard = torch.randn(2, CONFIG.audio.mel_bins, 120)
    torch.testing.assert_close(
        again.audio_encoder.from_log_mel(heard), talker.audio_encoder.from_log_mel(heard), rtol=0, atol=half
    )


def test_contrast_goes_into_the_weights_of_the_stems(tmp_path: Path) -> None:
    """A sharpened talker hears spectra as the same talker would hear sharper ones; a flat one stays."""
    plain = packed_talker(tmp_path)
    sharp = Talker(CONFIG)
    sharp.load_state_dict(sharpened(plain.state_dict(), 1.3))
    bins = CONFIG.audio.mel_bins
    spectra = sharpening(bins, 1.3)
    heard = torch.randn(2, bins, 120, generator=torch.Generator().manual_seed(0))
    ours, theirs = sharp.audio_encoder.from_log_mel(heard), plain.audio_encoder.from_log_mel(spectra @ heard)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert float((ours - plain.audio_encoder.from_log_mel(heard)).detach().abs().max()) > 0.1

    torch.testing.assert_close(spectra.sum(1), torch.ones(bins))  # a flat spectrum has no shape
    torch.testing.assert_close(sharpening(bins, 1.0), torch.eye(bins))
    there_and_back = sharpening(64, 1 / 1.3) @ sharpening(64, 1.3)
    torch.testing.assert_close(there_and_back, torch.eye(64), rtol=0, atol=1e-5)
    peak = sharpening(64, 1.3)[:, 32]
    assert float(peak[32]) == pytest.approx(1.3 - 0.3 / 25)
    assert float(peak[32 + 12]) == pytest.approx(-0.3 / 25)
    assert float(peak[32 + 13]) == 0


def test_a_packed_talker_packed_again_is_the_same_but_for_its_contrast(tmp_path: Path) -> None:
    before = read_state(BUNDLED.parent / WEIGHTS)
    for contrast, changed in (
        (1.0, set()),
        (1.2, {"audio_encoder.stem.weight", "audio_encoder.fine.conv.weight"}),
    ):
        out = tmp_path / f"{contrast}.safetensors"
        pack_main(["--run", str(BUNDLED.parent), "--contrast", str(contrast), "--out", str(out)])
        after = read_state(out)
        same = {n: torch.allclose(after[n].float(), before[n].float(), rtol=1e-3, atol=1e-3) for n in before}
        assert set(after) == set(before)
        assert {name for name, alike in same.items() if not alike} == changed
    assert not (BUNDLED.parent / "space.npz").exists()


def test_pack_refuses_no_contrast_and_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in ((["--contrast", "0"], "above 0"), ([], "run python -m streamtalk_training.stage2")):
        with pytest.raises(SystemExit):
            pack_main(["--run", str(tmp_path), "--out", str(tmp_path / "out.safetensors"), *options])
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_packed_talker_of_another_model_is_refused(tmp_path: Path) -> None:
    packed_talker(tmp_path)
    smaller = msgspec.structs.replace(CONFIG, audio=msgspec.structs.replace(CONFIG.audio, dilations=(1,)))
    with pytest.raises(ValueError, match="is no talker of this model"):
        unpacked(tmp_path, smaller, MAPS)
    (tmp_path / WEIGHTS).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is no talker of this model"):
        unpacked(tmp_path, CONFIG, MAPS)
    with pytest.raises(ValueError, match="No checkpoint"):
        unpacked(tmp_path / "none", CONFIG, MAPS)


def test_the_upper_face_is_drawn_by_the_packed_talker_clip_by_clip(
    motion: MotionData, tmp_path: Path
) -> None:
    """As a stream would draw it; the labels' lips stay."""
    talker = packed_talker(tmp_path)
    mel = mel_data((clip.pcm for clip in tiny_clips()), talker.audio_encoder)
    drawn = redrawn(talker, SPACE, motion, mel, seed=0)
    lips = mouth_latents(CONFIG)
    same = slice(None), slice(SPACE.mouth)
    torch.testing.assert_close(drawn.coordinates[same], motion.coordinates[same], rtol=0, atol=0)
    assert drawn.upper.shape == (len(motion.coordinates), 8 - lips)

    longest = int(np.diff(motion.offsets).max())
    noise = torch.randn(len(motion.speakers), longest, 8, generator=torch.Generator().manual_seed(0))
    clip = 2  # all are equally long: the clips stream in their own order
    features = frame_features(
        talker.audio_encoder, mel.mel[:, mel.offsets[clip] : mel.offsets[clip + 1]].mT[None].float(), longest
    )
    latents = rollout(talker, features, torch.from_numpy(motion.speakers[[clip]]), noise[[clip]])
    rows = slice(int(motion.offsets[clip]), int(motion.offsets[clip + 1]))
    torch.testing.assert_close(drawn.upper[rows], latents[0, :, lips:], rtol=SAME_SUM, atol=SAME_SUM)
    shown = decoded_stream(talker, latents)[0, :, SPACE.mouth :]
    torch.testing.assert_close(
        drawn.coordinates[rows, SPACE.mouth :], shown, rtol=10 * SAME_SUM, atol=10 * SAME_SUM
    )
    batch = crops(drawn, None, None, 3, 12, np.random.default_rng(0))
    assert batch.upper.shape == (3, 13, 8 - lips)


def blinking(motion: MotionData, often: Sequence[int]) -> MotionData:
    """`motion` with lids that shut `often[i]` times in clip i, for a frame each."""
    lid = SPACE.to_coordinates[:, USED.index("eyeBlinkLeft")]
    coordinates = motion.coordinates.clone()
    coordinates[:, SPACE.mouth :] = 0
    for start, times in zip(motion.offsets.tolist(), often, strict=False):
        coordinates[start + 1 : start + 1 + 2 * times : 2] += torch.from_numpy(lid)
    return replace(motion, coordinates=coordinates)


def test_clips_that_blink_much_are_drawn_less_often(motion: MotionData) -> None:
    """So that crops blink as often as asked for, and those of clips that blink alike come as often as before."""
    often = [0, 3, 1, 3, 2, 0][: len(motion.speakers)]
    often += [1] * (len(motion.speakers) - len(often))
    data = blinking(motion, often)
    lengths = np.diff(data.offsets)
    minutes = lengths / 30 / 60
    clips = torch.split(data.coordinates, lengths.tolist())
    assert [len(blinks(eyelids(SPACE, clip).numpy())) for clip in clips] == often
    before = float((data.favour * often).sum() / (data.favour * minutes).sum())
    for wanted in (0.7 * before, 1.2 * before):
        calm = calmed(data, SPACE, wanted)
        assert float((calm.favour * often).sum() / (calm.favour * minutes).sum()) == pytest.approx(wanted)
        assert calm.coordinates is data.coordinates
        assert (calm.favour[1] < calm.favour[0]) == (wanted < before)
        assert calm.favour[3] / data.favour[3] == pytest.approx(calm.favour[1] / data.favour[1])
    most = max(often) / float(minutes[1])
    with pytest.raises(ValueError, match=rf"blink {before:.1f} times a minute.* not {2 * most:g}"):
        calmed(data, SPACE, 2 * most)


def test_the_upper_face_comes_from_a_talker_with_the_same_ears_and_codes(tmp_path: Path) -> None:
    talker = packed_talker(tmp_path)
    assert alike(talker, unpacked(tmp_path, CONFIG, MAPS))
    deeper = msgspec.structs.replace(CONFIG.audio, dilations=(*CONFIG.audio.dilations, 1))
    assert not alike(talker, unpacked(tmp_path, msgspec.structs.replace(CONFIG, audio=deeper), MAPS))
    other = unpacked(tmp_path, CONFIG, MAPS)
    torch.nn.init.normal_(other.autoencoder.quantize.embedding.weight)
    assert not alike(talker, other)


def test_a_run_begins_with_a_packed_talker(motion: MotionData, tmp_path: Path) -> None:
    """Without stage 1. A new hint learns first, by itself; then all but encoder and codes. Both have a mean."""
    before = packed_talker(tmp_path)
    begin = stage2.Student(CONFIG)
    begin.talker = unpacked(tmp_path, CONFIG, MAPS)
    mel = mel_data((clip.pcm for clip in tiny_clips()), before.audio_encoder)
    drawn = redrawn(before, SPACE, motion, mel, seed=0)
    codes = {name: value.clone() for name, value in before.autoencoder.state_dict().items()}
    plan = replace(STAGE2, steps=4).continuing(new_hint_steps=2)
    assert (plan.hint_first, plan.talker_start) == (0.5, 0.5)
    of_run = (CONFIG, SPACE, drawn, mel, codes, plan, tmp_path / "run/stage2")
    given = {name: value.clone() for name, value in begin.state_dict().items()}
    stage2.train(*of_run, until=2, begin=begin)
    moved = {name for name, value in begin.state_dict().items() if not torch.equal(value, given[name])}
    assert moved == {"hint.weight", "hint.bias"}
    stage2.train(*of_run, begin=begin)
    moved = {name for name, value in begin.state_dict().items() if not torch.equal(value, given[name])}
    for part in ("talker.audio_encoder", "talker.diff_ar_network", "talker.autoencoder.decoder"):
        assert any(name.startswith(part) for name in moved), part

    first, second = (trained(folder, CONFIG, MAPS) for folder in (tmp_path, tmp_path / "run"))
    assert set(first) == set(second) == set(before.state_dict())
    name = "audio_encoder.stem.weight"
    torch.testing.assert_close(
        mean([first, second], [0.5, 0.5])[name], 0.5 * (given[f"talker.{name}"] + second[name])
    )


def test_what_the_packed_talker_drew_is_what_the_upper_face_learns(
    motion: MotionData, tmp_path: Path
) -> None:
    """Its latents are taken as they are: other ones give another loss of the upper face, and the lips' all the same."""
    talker = packed_talker(tmp_path)
    student = stage2.Student(CONFIG)
    student.talker = talker
    mel = mel_data((clip.pcm for clip in tiny_clips()), talker.audio_encoder)
    drawn = redrawn(talker, SPACE, motion, mel, seed=0)
    controls, speeds = (make(SPACE, drawn.coordinates) for make in (stage2.control_map, stage2.speed_map))
    plan = STAGE2.continuing()

    def parts(data: MotionData) -> dict[str, float]:
        batch = crops(data, mel, talker.audio_encoder, 3, 12, np.random.default_rng(1))
        return stage2.stage2_loss(student, SPACE, controls, speeds, batch, plan, 0.0, 0)[1]

    ours, others = parts(drawn), parts(replace(drawn, upper=drawn.upper + 3.0))
    assert others["energy"] > ours["energy"] + 1.0
    assert others["hint"] == ours["hint"]


def test_what_is_favoured_is_drawn_more_often(motion: MotionData) -> None:
    lengths = np.diff(motion.offsets)
    favour = np.ones(len(lengths))
    favour[0] = 5.0
    clip_of_row = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    marked = replace(motion, coordinates=clip_of_row[:, None].float(), favour=favour)
    drawn = np.zeros(len(lengths))
    for seed in range(200):
        batch = crops(marked, None, None, 4, 12, np.random.default_rng(seed))
        np.add.at(drawn, batch.motion[:, -1, 0].long().numpy(), 1)
    wanted = lengths * favour * (lengths >= 12)
    np.testing.assert_allclose(drawn / drawn.sum(), wanted / wanted.sum(), atol=0.06)


def test_of_the_bundled_latents_all_but_the_mouths_are_drawn() -> None:
    config = load_config(BUNDLED)
    assert config.predictor.noise_from == mouth_latents(config)
    assert ARCHITECTURE["MODEL"]["DIFF_AR_DEC"]["noise_from"] == config.predictor.noise_from


def test_every_favoured_voice_is_one_of_the_corpus() -> None:
    voices = {f"flite {voice}" for voice in TRAIN_FLITE_VOICES}
    known = (
        voices
        | {f"sounds {kind}" for kind in sounds.SHARES}
        | {"festival", "espeak", "statistical", "neural"}
    )
    assert set(FAVOURED) <= known


def test_slow_controls_are_weighed_by_their_own_speed(motion: MotionData) -> None:
    speeds = stage2.speed_map(SPACE, motion.coordinates)
    changes = motion.coordinates.diff(dim=0)
    assert speeds.shape == (SPACE.width, len(stage2.SLOW))
    moving = (changes @ speeds).std(0) > 0.01  # the tiny space lacks the shapes of the others
    assert moving.any()
    torch.testing.assert_close((changes @ speeds).std(0)[moving], torch.ones(int(moving.sum())))
    # the same flicker of a slower control costs more: twice as slow, four times as much
    slower = stage2.speed_map(SPACE, 0.5 * motion.coordinates)
    flicker = torch.randn(50, SPACE.width)
    cost, dearer = ((flicker @ map_)[:, moving].square().mean() for map_ in (speeds, slower))
    torch.testing.assert_close(dearer, 4 * cost)


def test_the_seal_of_a_motion_is_the_closure_that_evaluation_reads() -> None:
    weights = np.zeros((5, len(ARKIT_NAMES)), np.float32)
    jaw, closing = ARKIT_NAMES.index("jawOpen"), ARKIT_NAMES.index("mouthClose")
    weights[:, jaw] = (0.3, 0.06, 0.01, 0.0, 0.2)
    weights[:, closing] = (0.15, 0.06, 0.004, 0.0, 0.0)
    used = weights[:, [ARKIT_NAMES.index(name) for name in SPACE.names]]
    sealed = sealing(SPACE, torch.from_numpy(used @ SPACE.to_coordinates.T))
    read = controls_from_weights(weights)[:, tables().controls.index("close")]
    np.testing.assert_allclose(sealed.numpy(), read, atol=1e-3)
    np.testing.assert_allclose(read, (0.5, 1.0, 0.2, 0.0, 0.0), atol=1e-6)
    without = replace(SPACE, names=tuple("x" + name for name in SPACE.names))
    assert sealing(without, torch.ones(2, SPACE.width)).abs().max() == 0


def test_every_frame_knows_the_viseme_that_sounds() -> None:
    order = list(tables().viseme_targets)
    phones = (Phone(0, 0.1, "_", "SIL"), Phone(0.1, 0.15, "a", "AA"), Phone(0.15, 0.2, "m", "PBM"))
    spoken = [order[number] for number in spoken_visemes(phones, 8)]
    # frames come at 0, .033, .067, .1, .133, .167, .2 and .233 s
    assert spoken == ["SIL", "SIL", "SIL", "AA", "AA", "PBM", "PBM", "PBM"]


def test_the_hint_learns_visemes_by_name(motion: MotionData) -> None:
    """On tones for /a/ and silence for /m/, a few steps of the hint alone tell the two apart."""
    encoder = MelEncoder(CONFIG.audio)
    mel = mel_data((clip.pcm for clip in tiny_clips()), encoder)
    torch.manual_seed(0)
    student = stage2.Student(CONFIG)
    controls, speeds = (make(SPACE, motion.coordinates) for make in (stage2.control_map, stage2.speed_map))
    optimiser = torch.optim.AdamW(student.parameters(), 3e-3)
    for step in range(60):
        batch = crops(motion, mel, student.talker.audio_encoder, 4, 24, np.random.default_rng(step))
        loss, _ = stage2.stage2_loss(student, SPACE, controls, speeds, batch, STAGE2, 0.0, step)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    heard = frame_features(student.talker.audio_encoder, batch.mel, 24)
    guessed = student.hinted(heard)[2].argmax(-1)
    assert float((guessed == batch.visemes).float().mean()) > 0.8


def test_cached_rollout_equals_the_predictor_as_trained() -> None:
    talker = random_talker()
    features, noise = torch.randn(2, 30, 16), torch.randn(2, 30, 8)
    speaker = torch.tensor([0, 1])
    latents = rollout(talker, features, speaker, noise)  # 30 frames: the window of 8 slides
    network = talker.diff_ar_network
    past = torch.cat([talker.autoencoder.start_latent().expand(2, 1, -1), latents[:, :-1]], 1)
    condition = network.conditions(past, features, network.obj_vector(speaker), history=CONFIG.window_size)
    again = network.sample(noise, condition, talker.sampler)
    torch.testing.assert_close(again, latents, rtol=SAME_SUM, atol=SAME_SUM)


def test_streamed_decoding_hears_the_last_latents_alone() -> None:
    talker = random_talker()
    latents = torch.randn(1, 9, 8)
    motion = decoded_stream(talker, latents)
    history = torch.cat([talker.autoencoder.start_latent()[None, None], latents], 1)
    for frame in (0, 1, 2, 8):
        seen = history[:, max(0, frame + 2 - talker.decode_window) : frame + 2]
        alone = talker.autoencoder.decoder(seen)[:, -1]
        torch.testing.assert_close(motion[:, frame], alone, rtol=SAME_SUM, atol=SAME_SUM)


def test_features_of_a_clip_equal_those_of_a_window() -> None:
    encoder = MelEncoder(CONFIG.audio)
    pcm = 0.1 * torch.randn(1, 16000)
    whole = encoder.from_log_mel(clip_mel(pcm, encoder))
    padded = torch.nn.functional.pad(pcm, (encoder.past_samples, 16000))
    for feature in (0, 7, 50):
        window = padded[:, 320 * feature : 320 * feature + encoder.receptive_field]
        torch.testing.assert_close(encoder(window)[:, 0], whole[:, feature], rtol=SAME_SUM, atol=SAME_SUM)


@pytest.mark.parametrize("every_phase", [False, True])
def test_crops_pair_motion_with_its_sound(motion: MotionData, every_phase: bool) -> None:
    encoder = MelEncoder(CONFIG.audio)
    clips = tiny_clips()
    mel = mel_data((clip.pcm for clip in clips), encoder)
    batch = crops(motion, mel, encoder, 8, 12, np.random.default_rng(0), every_phase=every_phase)
    features = frame_features(encoder, batch.mel, 12)
    wholes = []
    for clip in clips:
        pcm = torch.from_numpy(clip.pcm)[None]
        phases = torch.stack([clip_mel(pcm, encoder, phase) for phase in range(3)], 1)
        wholes.append(frame_features(encoder, phases if every_phase else phases[:, 0], 60)[0])
    half_precision = 2e-2  # mel frames are kept as float16
    for row in range(8):
        found = [
            (clip, frame)
            for clip in range(len(clips))
            for frame in range(49)
            if torch.equal(motion.coordinates[60 * clip + frame :][:12], batch.motion[row, 1:])
        ]
        assert any(
            (features[row] - wholes[clip][frame : frame + 12]).abs().max() < half_precision
            for clip, frame in found
        )
        if batch.at_start[row]:
            assert batch.motion[row, 0].abs().max() == 0


def test_features_of_every_phase_are_those_of_a_stream_at_hop_1() -> None:
    encoder = MelEncoder(CONFIG.audio)
    pcm = 0.1 * torch.randn(1, 16000)
    phases = torch.stack([clip_mel(pcm, encoder, phase) for phase in range(3)], 1)
    features = frame_features(encoder, phases, 20)
    padded = torch.nn.functional.pad(pcm, (encoder.past_samples, 16000))
    for frame in (0, 1, 2, 3, 19):
        first = round(frame * 16000 / 30)
        window = padded[:, first : first + encoder.receptive_field]
        torch.testing.assert_close(encoder(window)[0, 0], features[0, frame], rtol=SAME_SUM, atol=SAME_SUM)


def test_interpolated_features_resemble_exact_ones() -> None:
    encoder = MelEncoder(CONFIG.audio)
    pcm = torch.from_numpy(tiny_clips(1)[0].pcm)[None]
    phases = torch.stack([clip_mel(pcm, encoder, phase) for phase in range(3)], 1)
    exact, near = frame_features(encoder, phases, 60), frame_features(encoder, phases[:, 0], 60)
    torch.testing.assert_close(near[:, ::3], exact[:, ::3], rtol=SAME_SUM, atol=SAME_SUM)
    assert float((near - exact).detach().square().mean()) < 0.2 * float(exact.detach().var())


def test_the_blink_clock_is_due_when_the_blink_begins() -> None:
    blink = np.zeros(120, np.float32)
    blink[60:64] = (0.5, 1, 1, 0.5)
    clock = blink_clock(blink, after_s=1.0)
    slope = CLOCK_SCALE / CLOCK_S / 30
    assert clock[59] == pytest.approx(CLOCK_SCALE - slope)
    assert clock[0] == pytest.approx(CLOCK_SCALE - 60 * slope)
    assert clock[60] == pytest.approx(CLOCK_SCALE - 90 * slope)  # the next one: a second after the end
    assert (np.diff(clock) > 0).sum() == 118


def test_disturbed_sound_keeps_silence_and_time() -> None:
    generator = torch.Generator().manual_seed(0)
    mel = torch.zeros(32, 16, 50)
    assert disturbed(mel, generator).abs().max() == 0
    mel[..., 20:30] = 8.0
    other = disturbed(mel, torch.Generator().manual_seed(1))
    assert (other != mel).flatten(1).any(1).sum() > 16
    loud = other.mean(1)
    assert (loud[:, 20:30].amin(1) > loud[:, :20].amax(1)).all()
    same = disturbed(mel[:, None].expand(-1, 3, -1, -1), torch.Generator().manual_seed(1), strength=0.0)
    torch.testing.assert_close(same[:, 0], mel, rtol=0, atol=1e-5)


def test_formants_are_moved_one_by_one() -> None:
    """Another throat is not just a longer one: that would keep the ratio of two places on the mel axis."""
    at = torch.arange(64.0)
    mel = (9 - (at - 16).square()).clamp(min=0) + (9 - (at - 44).square()).clamp(min=0)
    moved = disturbed(mel[None, :, None].expand(400, -1, 10), torch.Generator().manual_seed(0)).mean(-1)
    kept = (moved[:, :30].amax(1) > 2) & (moved[:, 30:].amax(1) > 2)  # no band of theirs was lost
    low, high = moved[kept, :30].argmax(1), 30 + moved[kept, 30:].argmax(1)
    assert len(low) > 200
    assert float((high / low).std()) > 0.17  # .09 where it is stretched alone


def test_the_energy_score_prefers_the_true_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.sign(torch.randn(4000, 1, generator=generator))

    def score(draw: torch.Tensor, again: torch.Tensor) -> float:
        return float(energy_score(draw, again, true))

    fair = score(*(torch.sign(torch.randn(2, 4000, 1, generator=generator))))
    mean = score(torch.zeros(4000, 1), torch.zeros(4000, 1))
    assert fair < 0.6 and mean > 0.95  # half the distance between the two modes, against all of it


def test_mouth_and_upper_face_keep_out_of_each_others_way() -> None:
    assert mouth_latents(CONFIG) == 4
    upper, mouth = slice(SPACE.mouth, SPACE.clock), slice(0, SPACE.mouth)
    brow = np.zeros(len(USED), np.float32)
    brow[USED.index("browInnerUp")] = 1
    jaw = np.zeros(len(USED), np.float32)
    jaw[USED.index("jawOpen")] = 1
    assert (
        np.abs(SPACE.to_coordinates @ brow)[mouth].max()
        == 0
        < np.abs(SPACE.to_coordinates @ brow)[upper].max()
    )
    assert (
        np.abs(SPACE.to_coordinates @ jaw)[upper].max() == 0 < np.abs(SPACE.to_coordinates @ jaw)[mouth].max()
    )


def test_a_kept_space_is_the_same_space(tmp_path: Path) -> None:
    SPACE.save(tmp_path / "space.npz")
    again = MotionSpace.load(tmp_path / "space.npz")
    assert (again.names, again.mouth, again.clock) == (SPACE.names, SPACE.mouth, len(USED))
    np.testing.assert_array_equal(again.to_coordinates, SPACE.to_coordinates)


def test_validation_streams_and_scores(motion: MotionData, tmp_path: Path) -> None:
    talker = random_talker()
    mel = mel_data((clip.pcm for clip in tiny_clips()), talker.audio_encoder)
    predicted, true = streamed(talker, Validation(motion, mel, clips=3, frames=40))
    assert predicted.shape == true.shape == (3, 40, SPACE.width)
    perfect = scores(SPACE, true, true, 30)
    assert perfect["r jaw"] == pytest.approx(1)
    assert perfect["gap_mm"] == 0
    assert perfect["blinks"] == perfect["true blinks"] == pytest.approx(45)  # one in each clip of 1.33 s
    assert scores(SPACE, predicted, true, 30)["r jaw"] < 0.9
    folder = tmp_path / "run"
    run = runs.start(folder, talker, 1e-3)
    for step in range(30):
        run.step = step
        run.log(loss=1 / (step + 1))
    assert plot(folder).stat().st_size > 1000


def test_coordinates_are_another_spelling_of_weights() -> None:
    weights = np.random.default_rng(0).uniform(0, 1, (5, len(USED))).astype(np.float32)
    coordinates = weights @ SPACE.to_coordinates.T
    np.testing.assert_allclose(coordinates @ SPACE.to_weights.T, weights, atol=1e-5)
    offsets = coordinates @ MAPS.expand.T
    np.testing.assert_allclose(offsets @ MAPS.reduce.T, coordinates, atol=1e-4)
    vertices = offsets.reshape(5, VERTICES, 3)
    across = vertices[:, LIP_PAIRS[:, 0]] - vertices[:, LIP_PAIRS[:, 1]]
    np.testing.assert_allclose(lip_gap_vectors(SPACE, torch.from_numpy(coordinates)), across, atol=1e-6)


def test_the_lips_gap_weighs_most_where_they_meet() -> None:
    """An error of a tenth of the jaw's way, of a shut mouth and of an open one."""
    jaw = torch.from_numpy(SPACE.to_coordinates[:, SPACE.names.index("jawOpen")])

    def ratio(shut_weight: float) -> float:
        shut, open_ = (lip_gap_loss(SPACE, (at + 0.1) * jaw, at * jaw, shut_weight) for at in (0.0, 1.0))
        return float(shut / open_)

    gap_m = float(lip_gap_vectors(SPACE, jaw).norm(dim=-1).mean())
    near, meeting = np.exp(-gap_m / 0.003), np.exp(-gap_m / 0.001)
    assert ratio(0.0) == pytest.approx(5 / (1 + 4 * near), rel=0.02)
    assert ratio(10.0) == pytest.approx(15 / (1 + 4 * near + 10 * meeting), rel=0.02)


def test_a_widened_model_is_the_same_model() -> None:
    model = random_talker().autoencoder
    wide_config = msgspec.structs.replace(CONFIG.vq, n_vert=3 * VERTICES)
    wide = type(model)(wide_config)
    wide.load_state_dict(widened(model.state_dict(), MAPS))
    coordinates = torch.randn(1, 6, len(USED)) @ torch.from_numpy(SPACE.to_coordinates.T)
    expand = torch.from_numpy(MAPS.expand)
    torch.testing.assert_close(
        wide.encoder(coordinates @ expand.T), model.encoder(coordinates), rtol=0, atol=1e-4
    )
    latents = torch.randn(1, 6, 8)
    torch.testing.assert_close(wide.decoder(latents), model.decoder(latents) @ expand.T, rtol=0, atol=1e-5)


def test_a_packed_talker_is_widened_and_halved() -> None:
    talker = random_talker()
    state = checkpoint(talker, MAPS)
    assert {value.dtype for value in state.values()} == {torch.float16}
    last = state["autoencoder.decoder.vertice_map_reverse.weight"].float()
    narrow = talker.autoencoder.decoder.vertice_map_reverse.weight
    half_precision = 1e-3 * float(last.abs().max())
    torch.testing.assert_close(
        last, torch.from_numpy(MAPS.expand) @ narrow.detach(), rtol=0, atol=half_precision
    )


def test_the_mean_of_runs_is_weighed_and_of_one_architecture(tmp_path: Path) -> None:
    first, second = random_talker().state_dict(), random_talker().state_dict()
    name = "audio_encoder.blocks.0.out.weight"
    second[name] = first[name] + 1
    torch.testing.assert_close(mean([first, second], [0.25, 0.75])[name], first[name] + 0.75)
    same = mean([first, second], [0.0, 1.0])
    assert {key: value.dtype for key, value in same.items()} == {k: v.dtype for k, v in second.items()}
    assert all(torch.equal(value, second[key]) for key, value in same.items())
    for shares in ([1.0], [0.5, 0.6], [1.5, -0.5]):
        with pytest.raises(ValueError, match="as many shares that add up to 1"):
            mean([first, second], shares)
    del second[name]
    with pytest.raises(ValueError, match="different architectures"):
        mean([first, second], [0.5, 0.5])
    with pytest.raises(FileNotFoundError, match=r"streamtalk_training\.stage2"):
        trained(tmp_path, CONFIG, MAPS)


def test_a_run_goes_on_under_its_own_plan_alone(motion: MotionData, tmp_path: Path) -> None:
    stage1.train(CONFIG, SPACE, motion, STAGE1, tmp_path, until=2)
    with pytest.raises(
        ValueError, match=r"another plan \(seed was 0 and is now 1, steps was 40 and is now 50\)"
    ):
        stage1.train(CONFIG, SPACE, motion, replace(STAGE1, steps=50, seed=1), tmp_path)
    path = tmp_path / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["plan"]  # as older runs left it
    torch.save(state, path)
    stage1.train(CONFIG, SPACE, motion, replace(STAGE1, steps=50), tmp_path, until=3)
    assert torch.load(path, weights_only=True)["plan"]["steps"] == 50


def test_what_was_logged_past_the_state_is_logged_again(tmp_path: Path) -> None:
    run = runs.start(tmp_path, random_talker(), 1e-3)
    for step in (50, 100, 150):
        run.step = step
        run.log(loss=1.0)
        if step == 100:
            run.save()
    log = tmp_path / "log.jsonl"
    with log.open("a") as file:
        file.write('{"step": 2')  # cut short
    again = runs.start(tmp_path, random_talker(), 1e-3)
    assert again.step == 100
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [50, 100]


def test_stage2_wants_stage1_finished(motion: MotionData, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    with pytest.raises(FileNotFoundError, match=r"streamtalk_training\.stage1"):
        stage2.finished_stage1(path)
    stage1.train(CONFIG, SPACE, motion, STAGE1, tmp_path, until=2)
    with pytest.raises(ValueError, match="is at step 2 of 40"):
        stage2.finished_stage1(path)
    stage1.train(CONFIG, SPACE, motion, STAGE1, tmp_path)
    assert set(stage2.finished_stage1(path)) == set(torch.load(path, weights_only=True)["model"])


@pytest.mark.parametrize(
    "error", [OSError("no disk"), ValueError("no value"), ImportError("no module"), KeyError("no shape")]
)
def test_a_command_ends_in_one_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, runs.one_sentence():
        raise error
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {error.args[0]}\n"


@pytest.mark.parametrize("command", [stage1.main, stage2.main, bundled.main])
def test_a_missing_face_is_a_sentence(
    command: Callable[[Sequence[str]], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(corpus, "main", lambda _: None)
    folder = str(tmp_path)
    if command is bundled.main:
        options = ["--cache", folder, "--out", folder]
    else:
        options = ["--corpus", folder, "--run", folder, "--face", str(tmp_path / "face.npz")]
    with pytest.raises(SystemExit) as ended:
        command(options)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "face.npz" in said


def test_bundled_stops_at_the_first_step_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Sequence[str]) -> None:
        raise SystemExit(2)

    monkeypatch.setattr(corpus, "main", fails)
    monkeypatch.setattr(bundled, "load_face", lambda _: pytest.fail("went on"))
    with pytest.raises(SystemExit):
        bundled.main(["--cache", str(tmp_path)])


def test_the_rate_warms_up_holds_and_decays() -> None:
    rates = [runs.learning_rate(step, 1000, 1.0) for step in (0, 99, 600, 800, 1000)]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 0.51, 0.02])
