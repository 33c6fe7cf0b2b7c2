"""sample.py as a user runs it: formats, many files, odd files, broken files."""

import io
import json
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import ROOT, run, tone

from sample import clock, make_cues


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    """(paths that can be transcribed, paths that cannot), of every kind that people have."""
    root, wave = tmp_path_factory.mktemp("odd"), tone(1.0)
    good, bad = [], []

    def put(kind, name, data):
        path = root / name
        path.write_bytes(data)
        kind.append(path)

    def encode(samples, rate=16_000, **options):
        file = io.BytesIO()
        soundfile.write(file, samples, rate, **{"format": "WAV", **options})
        return file.getvalue()

    plain, flac = encode(wave), encode(tone(20.0), format="FLAC")
    for subtype in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAW", "ULAW", "IMA_ADPCM"):
        put(good, f"{subtype}.wav", encode(wave, subtype=subtype))
    for rate in (8_000, 44_100, 192_000):
        put(good, f"{rate}.wav", encode(wave, rate))
    put(good, "channels.wav", encode(np.stack([wave] * 8, 1)))
    put(good, "apple.aiff", encode(wave, format="AIFF"))
    put(good, "UPPER.WAV", plain)
    put(good, "no-suffix", plain)
    put(good, "wrong-suffix.mp3", plain)
    put(good, "täglich 音 🎙.wav", plain)
    put(good, "two\nlines\tand a tab.wav", plain)
    put(good, "trailing.wav", plain + b"garbage" * 99)
    put(good, "4GB-header.wav", plain[:4] + struct.pack("<I", 0xFFFFFFF0) + plain[8:40] + struct.pack("<I", 0xFFFFFF00) + plain[44:])
    put(good, "one-sample.wav", encode(wave[:1]))
    put(good, "too-loud.wav", encode(wave * 50, subtype="FLOAT"))
    put(good, "digital-silence.wav", encode(wave * 0))
    (root / "link.wav").symlink_to(good[0])
    good.append(root / "link.wav")

    put(bad, "empty.wav", b"")
    put(bad, "header-only.wav", plain[:20])
    put(bad, "no-samples.wav", encode(wave[:0]))
    put(bad, "text.wav", b"this is not sound\n" * 50)
    put(bad, "picture.flac", b"\x89PNG\r\n\x1a\n" + bytes(500))
    put(bad, "random.mp3", np.random.default_rng(0).bytes(5000))
    put(bad, "archive.ogg", b"PK\x03\x04" + bytes(300))
    put(bad, "truncated.flac", flac[:60])
    put(bad, "damaged.flac", flac[:5000] + bytes(5000) + flac[10_000:])
    put(bad, "nan.wav", encode(np.where(np.arange(16_000) == 9, np.nan, wave), subtype="FLOAT"))
    put(bad, "infinity.wav", encode(np.where(np.arange(16_000) == 9, np.inf, wave), subtype="FLOAT"))
    (root / "broken-link.wav").symlink_to(root / "nowhere.wav")
    (root / "folder-of-nothing").mkdir()
    (root / "folder-of-nothing" / "notes.txt").write_text("no audio here")
    put(bad, "locked.wav", plain)
    bad += [root / "broken-link.wav", root / "folder-of-nothing", root / "missing.wav"]
    (root / "locked.wav").chmod(0)
    if os.access(root / "locked.wav", os.R_OK):  # root may read all
        bad.remove(root / "locked.wav")
    return good, bad


def test_each_bad_file_is_one_line_and_the_others_go_on(trained, odd_files):
    good, bad = odd_files
    assert len(good) + len(bad) >= 38
    files = [path for pair in zip(good, bad) for path in pair] + good[len(bad):]
    done = run("sample.py", *files, "--model", trained[0], check=False)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        str(path).replace("\n", "\\n").replace("\t", "\\t") for path in files if path in good]
    complaints = [line for line in done.stderr.splitlines() if line.startswith("sample.py: ")]  # libmpg123 has notes of its own
    assert len(complaints) == len(bad), done.stderr
    for path in bad:
        assert sum(str(path) in line for line in complaints) == 1, (path, done.stderr)


def test_formats(trained, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.concatenate([tone(20), np.zeros(16_000), tone(20, 1)]), 16_000)
    whole = json.loads(run("sample.py", tmp_path / "a.wav", "--model", trained[0], "--format", "json").stdout)
    assert set(whole) == {"file", "text", "duration", "segments", "words", "seconds"} and whole["duration"] == 41
    assert [segment["start"] for segment in whole["segments"]] == [0, *(s["end"] for s in whole["segments"][:-1])]
    assert " ".join(segment["text"] for segment in whole["segments"]) == whole["text"]
    assert " ".join(word["word"] for word in whole["words"]) == whole["text"]
    starts = [word["start"] for word in whole["words"]]
    assert starts == sorted(starts) and all(word["start"] <= word["end"] <= 41 and 0 <= word["probability"] <= 1 for word in whole["words"])
    assert run("sample.py", tmp_path / "a.wav", "--model", trained[0]).stdout == "".join(s["text"] + "\n" for s in whole["segments"])
    srt = run("sample.py", tmp_path / "a.wav", "--model", trained[0], "--format", "srt").stdout
    cues = re.findall(r"(\d+)\n(\d\d:\d\d:\d\d,\d{3}) --> (\d\d:\d\d:\d\d,\d{3})\n(.+)\n\n", srt)
    assert [int(number) for number, *_ in cues] == list(range(1, len(cues) + 1))
    assert " ".join(text for *_, text in cues) == whole["text"]
    vtt = run("sample.py", tmp_path / "a.wav", "--model", trained[0], "--format", "vtt").stdout
    assert vtt.startswith("WEBVTT\n\n") and vtt.count(" --> ") == len(cues)
    tsv = run("sample.py", tmp_path / "a.wav", "--model", trained[0], "--format", "tsv").stdout.splitlines()
    assert tsv[0] == "start\tend\ttext" and len(tsv) == len(cues) + 1


def test_subtitles_break_at_pauses_and_before_they_are_too_long():
    def words(*times):
        return [{"words": [{"word": "word", "start": time, "end": time + 0.4} for time in times]}]

    assert [cue[:2] for cue in make_cues(words(0, 0.5, 2.0))] == [(0, 0.9), (2.0, 2.4)]
    assert all(end - start <= 6 and len(text) <= 80 for start, end, text in make_cues(words(*np.arange(0, 60, 0.25))))
    assert clock(3661.0006) == "01:01:01.001" and clock(59.9996, ",") == "00:01:00,000"


def test_a_folder_into_a_folder_and_again(trained, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.wav", "deep/b.flac"):
        soundfile.write(tmp_path / "in" / name, tone(1), 16_000)
    (tmp_path / "in" / "broken.wav").write_text("no sound")
    command = ["sample.py", tmp_path / "in", "--out", tmp_path / "out", "--model", trained[0]]
    assert run(*command, check=False).returncode == 1
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")) == ["a.txt", "deep/b.txt"]
    (tmp_path / "out" / "a.txt").write_text("mine")
    assert "2 of 3 are in" in run(*command, check=False).stderr and (tmp_path / "out" / "a.txt").read_text() == "mine"
    run(*command, "--overwrite", check=False)
    assert (tmp_path / "out" / "a.txt").read_text() != "mine"
    soundfile.write(tmp_path / "in" / "a.flac", tone(1), 16_000)
    assert "two files would be written as" in run(*command, check=False).stderr


def test_standard_input_stream_and_tasks(trained, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(2), 16_000)
    command = [sys.executable, str(ROOT / "sample.py"), "--model", str(trained[0])]

    def piped(*flags):
        with open(tmp_path / "a.wav", "rb") as file:
            done = subprocess.run([*command, *flags], stdin=file, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout

    spelled = piped(str(tmp_path / "a.wav"), "--decode", "ctc")
    assert piped("-", "--decode", "ctc") == spelled
    described = piped("-", "--task", "describe")
    assert described != spelled and described == piped("-", "--task", "describe", "--stream")
    assert any(piped("-", "--prompt", prompt) != described for prompt in ("Summarise: <audio>", "on <audio> six", "<audio> call anna"))
    assert piped("--text", "turn on the light").strip()
    assert "<audio>" in run("sample.py", "--prompt", "Summarise", check=False).stderr


def test_a_reader_that_leaves_early_is_no_error(trained, tmp_path):
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", tone(1), 16_000)
    command = f"{sys.executable} {ROOT / 'sample.py'} {tmp_path} --model {trained[0]} | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
