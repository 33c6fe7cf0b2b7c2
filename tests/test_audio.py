"""What goes in: sound files of all kinds, reference texts, data files."""

import io
import json

import numpy as np
import pytest
import soundfile
from conftest import tone

from tinyaudio import InputError, clean_text, load_audio, make_batches, read_clips, split_audio


@pytest.mark.parametrize("suffix, rate, channels", [
    ("wav", 8000, 1), ("wav", 96_000, 3), ("flac", 44_100, 2), ("mp3", 44_100, 2), ("ogg", 48_000, 1)])
def test_formats_come_out_as_mono_16_khz(tmp_path, suffix, rate, channels):
    time = np.arange(rate) / rate
    wave = np.stack([0.5 * np.sin(2 * np.pi * 440 * time)] * channels, axis=1)
    soundfile.write(tmp_path / f"a.{suffix}", wave, rate)
    samples = load_audio(tmp_path / f"a.{suffix}")
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) - 16_000) < 1600  # mp3 pads
    spectrum = np.abs(np.fft.rfft(samples[:16_000], 16_000))
    assert abs(int(spectrum.argmax()) - 440) <= 1  # resampled at the right rate: the pitch stays
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.1)


def test_path_bytes_file_and_array_give_the_same(tmp_path):
    wave = tone(0.5)
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    data = (tmp_path / "a.wav").read_bytes()
    for source in (tmp_path / "a.wav", str(tmp_path / "a.wav"), data, io.BytesIO(data), wave, np.stack([wave, wave], 1)):
        np.testing.assert_array_equal(load_audio(source), wave)
    assert len(load_audio(wave, sample_rate=8000)) == 2 * len(wave)
    np.testing.assert_allclose(load_audio((wave * 32767).astype(np.int16)), wave, atol=1e-4)


def test_unusable_sound_is_one_line_that_names_the_file(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16_000, subtype="FLOAT")
    for name in ("text.wav", "empty.wav", "none.wav", "nan.wav", "missing.wav", "."):
        with pytest.raises(InputError) as error:
            load_audio(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_long_sound_is_cut_in_its_pauses_and_nothing_is_lost():
    wave = np.concatenate([np.concatenate([tone(19.5, i), np.zeros(8000, np.float32)]) for i in range(5)])
    starts, pieces = zip(*split_audio(np.array_split(wave, 77)))
    assert starts == tuple(np.cumsum([0, *map(len, pieces)])[:-1] / 16_000)
    np.testing.assert_array_equal(np.concatenate(pieces), wave)
    assert all(len(piece) <= 28 * 16_000 for piece in pieces)
    cuts = np.cumsum([len(piece) for piece in pieces])[:-1] / 16_000
    assert all(19.4 <= cut % 20 <= 20 or cut % 20 == 0 for cut in cuts), cuts


@pytest.mark.parametrize("raw, clean", [
    ("HELLO THERE", "hello there"), ("Hello there.", "Hello there."), ("WELL <COMMA> YES <PERIOD>", "well, yes."),
    ("so <inaudible> it  [noise] goes", "so it goes"), ("", "")])
def test_clean_text(raw, clean):
    assert clean_text(raw) == clean


def test_data_files_of_every_kind_hold_the_same_clips(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"audio": f"clips/{i}.wav", "text": f"text {i}"} for i in range(3)]
    (tmp_path / "clips").mkdir()
    for i, row in enumerate(rows):
        soundfile.write(tmp_path / row["audio"], tone(0.5, i), 16_000)
        (tmp_path / "clips" / f"{i}.txt").write_text(row["text"])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        lines = [separator.join(("audio", "text"))] + [separator.join(row.values()) for row in rows]
        (tmp_path / f"a.{suffix}").write_text("\n".join(lines))
    embedded = [{"audio": {"bytes": (tmp_path / row["audio"]).read_bytes(), "path": None}, "text": row["text"]} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(embedded), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.tsv", "a.parquet", "clips"):
        clips = read_clips(str(tmp_path / name))
        assert [clip["text"] for clip in clips] == ["text 0", "text 1", "text 2"], name
        for i, clip in enumerate(clips):
            np.testing.assert_allclose(load_audio(clip["audio"]), tone(0.5, i), atol=1e-4)
    assert len(read_clips(f"{tmp_path}/*.jsonl,{tmp_path}/a.csv")) == 6


def test_data_files_as_spreadsheets_and_recorders_leave_them(tmp_path):
    soundfile.write(tmp_path / "1.wav", tone(0.5), 16_000)
    soundfile.write(tmp_path / "1.2.wav", tone(0.7), 16_000)
    (tmp_path / "1.txt").write_text("one\n")
    (tmp_path / "1.2.txt").write_text("two\n")
    (tmp_path / "1.json").write_text("{}")
    assert {clip["audio"].rpartition("/")[2]: clip["text"] for clip in read_clips(str(tmp_path))} == {"1.wav": "one", "1.2.wav": "two"}
    (tmp_path / "excel, with a comma.csv").write_text("\ufeffaudio,text\r\n1.wav,\"yes, one\"\r\n1.2.wav,\r\n")
    assert [clip["text"] for clip in read_clips(str(tmp_path / "excel, with a comma.csv"))] == ["yes, one", ""]
    (tmp_path / "a.tsv").write_text('audio\ttext\n1.wav\t"oh" he said\n1.2.wav\t"two\n')
    assert [clip["text"] for clip in read_clips(str(tmp_path / "a.tsv"))] == ['"oh" he said', '"two']
    (tmp_path / "a.jsonl").write_text('{"audio": "1.wav", "text": 42}\n\n{"audio": "1.2.wav", "text": null}\n')
    assert [clip["text"] for clip in read_clips(str(tmp_path / "a.jsonl"))] == ["42", ""]


def test_data_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"audio": "a.wav"}\n')
    (tmp_path / "worse.jsonl").write_text("no json\n")
    for name in ("missing.jsonl", "bad.jsonl", "worse.jsonl", "a.docx"):
        with pytest.raises(InputError, match=name):
            read_clips(str(tmp_path / name))


def test_batches_hold_every_clip_once_within_the_limit():
    rng = np.random.default_rng(0)
    seconds = rng.uniform(0.5, 20, 500)
    for shuffle in (None, rng):
        batches = make_batches(seconds, 120, shuffle)
        assert sorted(sum(batches, [])) == list(range(500))
        assert all(seconds[batch].max() * len(batch) <= 120 for batch in batches)
        padding = 1 - seconds.sum() / sum(seconds[batch].max() * len(batch) for batch in batches)
        assert padding < 0.1  # at random it would be about a half
    assert make_batches(seconds, 120, np.random.default_rng(1)) != make_batches(seconds, 120, np.random.default_rng(2))
    assert make_batches([50.0], 10) == [[0]]  # a clip longer than a batch is a batch
    assert make_batches([], 10) == []
