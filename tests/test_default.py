"""The embedded backbones and the shipped checkpoint, on real speech."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run

import offline
from eval import corpus_wer
from offline import InputError
from tinyaudio import TinyAudio, load_audio, load_decoder, load_encoder, read_clips

SPEECH = ROOT.parent / "shared" / "speech" / "dev.parquet"


@pytest.fixture(scope="module")
def model():
    return TinyAudio.load(ROOT / "assets" / "default", "cpu", torch.float32)


# -------------------------------------------------------------------------------------------------- embedded backbones


def test_backbones_are_converted_once_and_load_fast():
    for name, load in (("whisper-base", load_encoder), ("smollm2-135m", load_decoder)):
        load(name)
        start = time.time()
        load(name)
        assert time.time() - start < 3
    assert {file.name for file in offline.cache_folder().iterdir()} == {"whisper-base", "smollm2-135m"}


def test_decoder_is_the_genuine_model():
    """A wrong conversion would still be half sane: a forgotten q/k order gives a perplexity of about 70."""
    decoder, tokenizer = load_decoder("smollm2-135m", "cpu", torch.float32)
    assert sum(p.numel() for p in decoder.parameters()) == 134_515_008
    ids = tokenizer("The sun rises in the east and sets in the west. Water boils at one hundred degrees Celsius at sea level, "
                    "and ice floats because it is less dense than the liquid.", return_tensors="pt").input_ids
    assert decoder(ids, labels=ids).loss.exp().item() < 14
    assert decoder.get_input_embeddings().weight.square().mean().sqrt().item() == pytest.approx(0.1356, abs=1e-4)


def test_encoder_is_the_genuine_model():
    encoder = load_encoder("whisper-base", "cpu", torch.float32)
    assert sum(p.numel() for p in encoder.parameters()) == 20_590_592
    assert encoder.model.conv1.weight.std().item() == pytest.approx(0.0482, abs=1e-4)


def test_missing_or_damaged_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYAUDIO_CACHE", str(tmp_path / "cache"))
    package, file, sha256 = offline.PACKAGES["smollm2-135m"][0]
    monkeypatch.setitem(offline.PACKAGES, "smollm2-135m", [(package, file, "0" * 64)])
    with pytest.raises(InputError, match="sha256 differs"):
        load_decoder("smollm2-135m")
    monkeypatch.setitem(offline.PACKAGES, "smollm2-135m", [("no-such-package", file, sha256)])
    with pytest.raises(InputError, match="no-such-package is not installed"):
        load_decoder("smollm2-135m")
    assert not list((tmp_path / "cache").iterdir())  # nothing half-made is left


# ------------------------------------------------------------------------------------------------- shipped checkpoint


def test_the_first_command_of_the_readme():
    done = run("sample.py")
    clip = read_clips("assets/quickstart/test.jsonl")[0]
    assert done.stdout.count("\n") == 1 and corpus_wer([clip["text"]], [done.stdout]) < 0.5


def test_python_use_is_three_lines(tmp_path):
    clip = read_clips(str(ROOT / "assets/quickstart/test.jsonl"))[0]
    model = TinyAudio.load(ROOT / "assets" / "default")
    one = model.transcribe(clip["audio"])
    assert isinstance(one, str) and model.transcribe([clip["audio"], clip["audio"]]) == [one, one]


def sixteen_clips():
    """Mixed lengths, synthetic voices and, where it is at hand, real ones."""
    clips = read_clips(str(ROOT / "assets/quickstart/test.jsonl"))[::10][:8]
    return clips + (read_clips(str(SPEECH))[::50][:8] if SPEECH.exists() else clips)


@pytest.mark.parametrize("decode", ["greedy", "ctc"])
def test_batch_equals_one_by_one(model, decode):
    waves = [load_audio(clip["audio"]) for clip in sixteen_clips()]
    assert model.transcribe(waves, decode) == [model.transcribe(wave, decode) for wave in waves]


def test_it_hears_synthetic_commands(model):
    clips = read_clips(str(ROOT / "assets/quickstart/test.jsonl"))
    assert corpus_wer([clip["text"] for clip in clips], model.transcribe([clip["audio"] for clip in clips])) < 0.45


@pytest.mark.skipif(not SPEECH.exists(), reason="needs the real speech of ../shared/speech, which is not part of the project")
def test_it_hears_real_speech(model):
    clips = read_clips(str(SPEECH))[:40]
    assert corpus_wer([clip["text"] for clip in clips], model.transcribe([clip["audio"] for clip in clips])) < 0.4


def test_the_shipped_checkpoint_is_small():
    assert sum(file.stat().st_size for file in (ROOT / "assets" / "default").iterdir()) < 10e6
