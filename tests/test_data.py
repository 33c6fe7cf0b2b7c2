"""What goes in: sound of all kinds, texts, data files, batches, augmentation."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from conftest import ROOT, tone

from data import (InputError, augment, clean_text, is_hub_id, load_audio, make_batches, no_speech,
                  read_audio, read_clips, split_audio, write_file)

@pytest.mark.parametrize("suffix, rate, channels", [
    ("wav", 8000, 1), ("flac", 96_000, 3), ("mp3", 44_100, 2), ("ogg", 48_000, 1)])
def test_formats_come_out_as_mono_16_khz(tmp_path, suffix, rate, channels):
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(tmp_path / f"a.{suffix}", np.stack([wave] * channels, axis=1), rate)
    samples = load_audio(tmp_path / f"a.{suffix}")
    assert samples.dtype == np.float32 and samples.shape == pytest.approx((16_000,), abs=1600)
    pitch = int(np.abs(np.fft.rfft(samples[:16_000], 16_000)).argmax())
    assert pitch == pytest.approx(440, abs=1)
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.1)

def encode(kind, wave, **options):
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format=kind, **options)
    return file.getvalue()

def test_what_can_be_read_comes_and_then_what_is_missing_is_said():
    wave, tag = tone(20), b"APETAGEX" + bytes(9) + b"APETAGEX" + bytes(24) + b"TAG" + bytes(125)
    flac, mp3, ogg = (encode(kind, wave) for kind in ("flac", "mp3", "ogg"))
    wav, opus = encode("wav", wave), encode("ogg", wave, subtype="OPUS")
    guess = encode("mp3", np.pad(wave, (32_000, 0)), bitrate_mode="VARIABLE")
    frame = guess.index(b"\xff\xf3", 4)  # the first one is the table
    unknown = flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]
    piped = wav[:40] + b"\xff" * 4 + wav[44:]
    for data, seconds, message in (
            (flac[:len(flac) // 2], 10, "of 20.0 s"), (mp3[:len(mp3) // 2], 10, "of 20.0 s"),
            (wav[:len(wav) // 2], 10, "of 20.0 s"), (flac + flac, 20, "bytes follow"),
            (opus[:len(opus) // 2], 9, "end is missing"),
            (mp3 + bytes(9999) + b"no" * 9999, 20, "bytes follow"), (ogg + opus, 40, None),
            (mp3 + tag + mp3, 40, None), (mp3 + tag + bytes(9999), 20, None), (unknown, 20, None),
            (guess[frame:], 22, None), (guess[frame:] + bytes(9999) + mp3, 42, None),
            (piped, 20, None), (wav + b"note" + bytes(9999), 20, None)):
        pieces, blocks = [], split_audio(read_audio(data))
        with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
            pieces.extend(piece for _, piece in blocks)
        assert len(np.concatenate(pieces)) / 16_000 == pytest.approx(seconds, abs=0.5)
    slow = io.BytesIO()
    soundfile.write(slow, wave, 8000, format="ogg")  # joined files of two rates: all of both
    assert len(load_audio(slow.getvalue() + ogg)) == pytest.approx(3 * len(wave), abs=10)

def test_every_way_to_hand_over_a_clip_gives_the_same(tmp_path):
    wave, path = tone(0.5), tmp_path / "a.wav"
    soundfile.write(path, wave, 16_000, subtype="FLOAT")
    data, tensor = path.read_bytes(), torch.from_numpy(wave)
    found = SimpleNamespace(data=tensor[None], sample_rate=16_000)
    pipe, end = os.pipe()
    open(end, "wb").write(data)
    for source in (path, str(path), data, io.BytesIO(data), wave, wave[:, None], wave[None],
                   bytearray(data), memoryview(data), open(pipe, "rb"), np.stack([wave, -wave]),
                   SimpleNamespace(get_all_samples=lambda: found),
                   np.stack([wave, wave]), np.stack([wave, wave], 1), tensor, tensor[None],
                   tensor.clone().requires_grad_(), {"array": wave, "sampling_rate": None},
                   {"bytes": data, "path": "x.wav"}, {"bytes": None, "path": str(path)}):
        np.testing.assert_array_equal(load_audio(source), wave)
    for kind, half, middle in ((np.uint8, 2**7, 2**7), (np.int8, 2**7, 0), (np.int16, 2**15, 0),
                               (np.int32, 2**31, 0), (np.int64, 2**15, 0), (np.int64, 2**23, 0)):
        samples = (wave.astype(float) * half + middle).astype(kind)
        samples[0] = middle - half  # the lowest that there is
        np.testing.assert_allclose(load_audio(samples)[1:], wave[1:], atol=1 / half + 1e-6)
    assert len(load_audio(wave, sample_rate=8000)) == 16_000
    assert load_audio(tensor.bfloat16()).dtype == np.float32
    assert len(load_audio(encode("wav", tone(50)), longest=31)) == 31 * 16_000

def test_unusable_sound_is_one_line_that_names_the_file(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "loud.wav", tone(1) * 2**15, 16_000, subtype="FLOAT")
    (tmp_path / "lfs.wav").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "a.raw").write_bytes(b"OggS" + bytes(9999))
    soundfile.write(tmp_path / "short.wav", tone(0.02), 16_000)
    names = ("lfs.wav", "a.raw", "short.wav", "text.wav", "empty.wav", "none.wav", "nan.wav",
             "loud.wav", "missing.wav", ".", "")
    others = (tone(0.02), np.zeros((2, 3, 100)), None, ["a", "b"], [[1, 2], [3]], b"", 5, {},
              np.zeros(9, np.uint16), np.zeros(9, complex), tone(1) * 2**15, {"path": None})
    for source in (*(str(tmp_path / name) for name in names), *others):
        with pytest.raises(InputError) as error:
            load_audio(source)
        name = source if isinstance(source, str) else "audio input"
        assert str(error.value).startswith(f"{name}: ") and "\n" not in str(error.value)

def test_long_sound_is_cut_in_its_pauses_and_nothing_is_lost():
    wave = np.concatenate([np.pad(tone(19.5, i), (0, 8000)) for i in range(5)])
    starts, pieces = zip(*split_audio(np.array_split(wave, 77)))
    ends = np.cumsum(list(map(len, pieces))) / 16_000
    assert starts == (0, *ends[:-1])
    np.testing.assert_array_equal(np.concatenate(pieces), wave)
    assert len(pieces) == 5 and all(len(piece) <= 28 * 16_000 for piece in pieces)
    assert all(19.4 <= cut % 20 <= 20 for cut in ends[:-1])

def test_reference_texts_lose_capitals_and_tags():
    for raw, clean in {"HELLO THERE": "hello there", "WELL <COMMA> YES <PERIOD>": "well, yes.",
                       "so <inaudible> it  [background noise] goes": "so it goes", "": "",
                       "Hi.": "Hi.", "3 < 4 and 5 > 2": "3 < 4 and 5 > 2"}.items():
        assert clean_text(raw) == clean

def test_data_files_of_every_kind_hold_the_same_clips(tmp_path):
    rows = [{"audio": f"clips/a.{i}.wav", "text": f"text {i}"} for i in range(3)]
    (tmp_path / "clips").mkdir()
    table = []
    for i, row in enumerate(rows):
        soundfile.write(tmp_path / row["audio"], tone(0.5, i), 16_000)
        (tmp_path / f"clips/a.{i}.txt").write_text(row["text"])
        data = (tmp_path / row["audio"]).read_bytes()
        table.append({**row, "audio": {"bytes": data, "path": None}})
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        lines = ["audio", "text"], *(row.values() for row in rows)
        (tmp_path / name).write_text("\n".join(map(mark.join, lines)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.tsv", "a.parquet", "clips"):
        clips = read_clips(str(tmp_path / name))
        assert len({clip["name"] for clip in clips}) == 3
        for i, (clip, row) in enumerate(zip(clips, rows)):
            assert clip["text"] == row["text"]
            np.testing.assert_allclose(load_audio(clip["audio"]), tone(0.5, i), atol=1e-4)
    assert len(read_clips(f"{tmp_path}/a.?sv, {tmp_path}/a.jsonl")) == 9

@pytest.mark.parametrize("name, content, texts", [
    ("a b.csv", '\ufeffaudio,text\r\n"1,5.wav","yes, 1"\r\n2.wav,\r\n', ["yes, 1", ""]),
    ("a.tsv", 'audio\ttext\n1,5.wav\t"oh" he said\n2.wav\t"two\n', ['"oh" he said', '"two']),
    ("a.csv", 'id,path,sentence\n7,"1,5.wav",A b.\n7,2.wav,C D\n', ["A b.", "c d"]),
    ("validated.tsv", 'client_id\tpath\tsentence\nx\t1,5.wav\tA\ny\t2.wav\tB\n', ["a", "b"]),
    ("metadata.csv", 'file_name,transcript\n"1,5.wav",if a < b and c > d\n2.wav,<b>\n',
     ["if a < b and c > d", ""]),
    ("[1].jsonl", '{"file_name": "1,5.wav", "transcription": 42}\n'
                  '{"audio_filepath": "2.wav", "text": NaN}\n', ["42", ""]),
    ("a, b.json", '[{"audio": "1,5.wav", "text": "a"},\n {"audio": "2.wav", "text": "b"}]',
     ["a", "b"]),
    ("manifest.json", '{"audio_filepath": "1,5.wav", "text": "a"}\n'
                      '{"audio_filepath": "2.wav", "text": null}\n', ["a", ""])])
def test_data_files_as_others_leave_them(tmp_path, name, content, texts):
    (tmp_path / "1.jsonl").write_text("not this one")
    (tmp_path / name).write_bytes(content.encode())
    clips = read_clips(str(tmp_path / name))
    assert [clip["text"] for clip in clips] == texts
    assert [clip["audio"] for clip in clips] == [f"{tmp_path}/1,5.wav", f"{tmp_path}/2.wav"]

@pytest.mark.parametrize("name, content", [
    ("missing.jsonl: No such", None), ("a.docx", b""), ("a.parquet", b"PAR1"), ("a.jsonl", b"no"),
    ("list.jsonl", b"[1]\n"), ("no_text.jsonl", b'{"audio": "a.wav"}\n'),
    ("no_audio.csv", b"id,text\n1,one\n"), ("l.jsonl#1: its text", b'{"path": 1, "text": []}'),
    ("latin.csv is not in UTF-8", b"audio,text\na,\xe9\n"),
    ("a.csv: row 1: more", b"audio,text\n1.wav,one, two\n"),
    ("a.csv: row 2", b'audio,text\n1.wav,one\n2.wav,"two\n3.wav,three\n'),
    ("a.jsonl: row 3", b'{"audio": 1, "text": ""}\n{"audio": 1, "text": ""}\n{"audio\n'),
    (r"needed are one of audio, .* and one of text, ", b"id,note\n1,one\n")])
def test_data_files_that_cannot_be_read(tmp_path, name, content):
    file = tmp_path / (re.split("[ :#]", name)[0] if "." in name[:12] else "a.csv")
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=name) as error:
        read_clips(str(file))
    assert "\n" not in str(error.value)

def test_a_row_may_be_a_stretch_of_a_file(tmp_path):
    wave, rows = tone(25), [{"duration": 24.9}, {"offset": 0, "duration": 0.5},
                            {"offset": 9.75, "duration": 0.5}, {"offset": 24.5}]
    soundfile.write(tmp_path / "a.flac", wave, 16_000)
    rows = [{"audio": "a.flac", "text": "", **row} for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    clips = read_clips(str(tmp_path / "a.jsonl"))
    assert len({clip["name"] for clip in clips}) == 4
    for clip, start, end in zip(clips, (0, 0, 156_000, 392_000), (400_000, 8_000, 164_000, None)):
        np.testing.assert_allclose(load_audio(clip["audio"]), wave[start:end], atol=1e-4)

@pytest.mark.parametrize("code, status, out, err", [
    ("print('\u65e5')", 0, "\u65e5\n".encode(), b""), ("raise KeyboardInterrupt", 130, b"", b""),
    ("os.close(1) or os.dup2(pipe(), 1) and print(9)", 1, b"", b"")])
def test_scripts_end_without_a_traceback(code, status, out, err):
    head = "import os, data\ndef pipe():\n a, b = os.pipe()\n os.close(a)\n return b\n"
    done = subprocess.run([sys.executable, "-c", f"{head}def main():\n {code}\ndata.run(main)"],
                          cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "cp1252"},
                          capture_output=True)
    assert (done.returncode, done.stdout, done.stderr.replace(b"\r", b"")) == (status, out, err)

def test_folders_and_names_of_data(tmp_path, monkeypatch):
    """Recordings without a text, Common Voice's layout, and names that are no hub ids."""
    (tmp_path / "out" / "clips").mkdir(parents=True)
    for name in ("a.FLAC", "b.m4a", "clips/c.aiff", "._a.FLAC"):
        (tmp_path / "out" / name).touch()
    (tmp_path / "out" / "a.txt").write_text("AT SIX\n")
    clips = read_clips(str(tmp_path / "out"))
    assert [(Path(clip["audio"]).name, clip["text"]) for clip in clips] == [
        ("a.FLAC", "at six"), ("b.m4a", ""), ("c.aiff", "")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "a.tsv").write_text("path\ttext\nc.aiff\tone\n")
    assert read_clips("out/a.tsv")[0]["audio"] == "out/clips/c.aiff"
    (tmp_path / "out" / "c.aiff").touch()
    assert read_clips("out/a.tsv")[0]["audio"] == "out/c.aiff"
    (tmp_path / "out" / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="out/b.txt is not in UTF-8"):
        read_clips("out")
    for name in ("", "out/a.tsv,", "out/a.tsv, ,out"):
        with pytest.raises(InputError, match="a name is missing"):
            read_clips(name)
    names = {"speechbrain/LoquaciousSet": True, "a/b:clean:train.360": True, "out/mine": False,
             "a/b.csv": False, "a/b.parquet": False, "out": False, "a/b/c": False}
    assert {name: is_hub_id(name) for name in names} == names

def test_batches_hold_every_clip_once_within_the_limit():
    clips = [{"seconds": x} for x in np.random.default_rng(0).uniform(0.5, 20, 500)]
    found = [make_batches(clips, 120, np.random.default_rng(seed)) for seed in (1, 2)]
    assert found[0] != found[1]
    for batches in [*found, make_batches(clips, 120)]:
        assert {id(clip) for clip in sum(batches, [])} == {id(clip) for clip in clips}
        seconds = [[clip["seconds"] for clip in batch] for batch in batches]
        room = [max(batch) * len(batch) for batch in seconds]
        assert max(room) <= 120 and sum(map(sum, seconds)) / sum(room) > 0.9  # at random a half
    assert make_batches(clips[:1], 0.1) == [clips[:1]] and make_batches([], 10) == []

def test_speed_and_noise_stay_in_their_ranges():
    wave = tone(2)
    assert np.array_equal(augment(wave, np.random.default_rng(0), 0, 30), wave)
    heard = [augment(wave, np.random.default_rng(seed), 0.5, 30) for seed in range(200)]
    speeds = [len(wave) / len(x) for x in heard if len(x) != len(wave)]
    noises = [x - wave for x in heard if len(x) == len(wave)]
    ratios = [20 * np.log10(wave.std() / noise.std()) for noise in noises if noise.any()]
    assert 0.899 < min(speeds) < 0.92 and 1.08 < max(speeds) < 1.101 and 70 < len(speeds) < 130
    assert 4.99 < min(ratios) < 8 and 27 < max(ratios) < 30.01 and 30 < len(ratios) < 70
    for seed in range(20):  # every clip changes, and none gets longer than the encoder hears
        one = augment(wave, np.random.default_rng(seed), 1, 2.01)
        assert len(one) <= 2.01 * 16_000 and not np.array_equal(one, wave)

def test_no_speech_is_sound_without_text():
    clips = no_speech(30, seed=0)
    peaks = [np.abs(clip["audio"]).max() for clip in clips]
    assert min(peaks) < 0.01 and 0.5 < max(peaks) <= 1
    for clip in clips:
        assert 1 <= clip["seconds"] == len(clip["audio"]) / 16_000 <= 12 and clip["text"] == ""

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_file(tmp_path / "a", "old")
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match="c: "):
        write_file(tmp_path / "c", "new")
    with open(tmp_path / "a") as old:
        write_file(tmp_path / "a", b"new")
        assert old.read() == "old"  # the new one took its place, and did not write over it
    assert (tmp_path / "a").read_text() == "new"
    write_file(tmp_path / ("b" * 246), "name \udcff")  # of a file, and no UTF-8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b" * 246, "c"]
