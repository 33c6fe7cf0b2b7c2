"""train.py and sample.py as a user runs them, on toy backbones."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from conftest import ROOT, run, tone

from train import no_speech


def losses(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["norm"], row["lr"]) for row in rows if "loss" in row]


def test_training_logs_validates_and_saves(trained):
    out, done = trained
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "log.jsonl", "lora.safetensors",
                                                           "projector.safetensors", "state.pt"]
    steps = losses(out)
    assert [step for step, *_ in steps] == list(range(1, 17))
    assert steps[7][1] < steps[0][1] and steps[15][1] < steps[8][1]  # both phases learn
    rates = [rate for *_, rate in steps]
    assert rates[:2] == [5e-4, 1e-3] and rates[8:10] == [2.5e-3, 5e-3] and rates[7] < 2e-4 and rates[15] < 1e-3  # warm-up, cosine
    assert len(re.findall(r"WER \d", done.stdout)) == 4
    for word in ("phase 1", "phase 2", "norm", "real time", "mfu", "padding", "left"):
        assert word in done.stdout
    assert "broken.wav, which is not readable audio" in done.stderr and "left out 1 clips not readable audio" in done.stdout


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_that_is_stopped_and_resumed_equals_one_that_was_not(train_flags, tmp_path, kept, trained):
    flags = [*train_flags, *([] if kept else ["--keep-frames", 0])]
    whole = tmp_path / "whole"
    if kept:
        whole = trained[0]
    else:
        run("train.py", *flags, "--out", whole)
    out = tmp_path / "stopped"
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, flags), "--out", str(out)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if line.startswith(f"step {'5' if kept else '11'}/"):
            process.send_signal(signal.SIGTERM if kept else signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait() == (143 if kept else 130) and "--resume" in rest
    assert len(losses(out)) < 16
    with open(out / "log.jsonl", "a") as file:  # what a later crash would have left
        file.write(json.dumps({"step": 15, "loss": 0.0, "norm": 0.0, "lr": 0.0}) + "\n")
    run("train.py", "--resume", out)
    assert losses(out) == losses(whole)
    assert (out / "projector.safetensors").read_bytes() == (whole / "projector.safetensors").read_bytes()


def test_a_killed_run_can_be_resumed(train_flags, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, train_flags), "--out", str(out)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (out / "state.pt").exists() and time.time() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    run("train.py", "--resume", out)
    assert [step for step, *_ in losses(out)] == list(range(1, 17))


def test_one_phase_recipe_and_init_from(train_flags, trained, tmp_path):
    plain = run("train.py", *train_flags, "--ctc-steps", 0, "--ctc-weight", 0, "--hidden", 16, "--out", tmp_path / "plain")
    assert "phase 1" not in plain.stdout
    more = run("train.py", *train_flags, "--init-from", trained[0], "--out", tmp_path / "more")
    assert losses(tmp_path / "more")[0][1] < losses(trained[0])[0][1] and more.returncode == 0
    run("train.py", *train_flags, "--init-from", tmp_path / "plain", "--ctc-steps", 0, "--steps", 1, "--out", tmp_path / "narrow")
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["hidden"] == 16


def test_init_from_several_takes_their_mean(train_flags, trained, tmp_path):
    a, b, mean = trained[0], tmp_path / "b", tmp_path / "mean"
    run("train.py", *train_flags, "--init-from", a, "--ctc-steps", 0, "--steps", 2, "--out", b)
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps({**config, "decode": "joint"}))
    run("train.py", *train_flags, "--init-from", f"{b},{a}", "--ctc-steps", 0, "--steps", 0, "--out", mean)
    assert json.loads((mean / "config.json").read_text())["decode"] == "joint"
    for file in ("projector.safetensors", "lora.safetensors"):
        first, second, both = (safetensors.torch.load_file(folder / file) for folder in (a, b, mean))
        for name, tensor in both.items():
            expected = first[name] if name == "ctc.tokens" else ((first[name].float() + second[name].float()) / 2).to(tensor.dtype)
            assert torch.equal(tensor, expected), name
    (b / "lora.safetensors").unlink()
    done = run("train.py", *train_flags, "--init-from", f"{a},{b}", "--out", tmp_path / "mixed", check=False)
    assert done.returncode == 1 and "some have not" in done.stderr.splitlines()[-1]
    done = run("train.py", *train_flags, "--init-from", f"{a},{tmp_path / 'nowhere'}", "--out", tmp_path / "missing", check=False)
    assert done.returncode == 1 and "nowhere" in done.stderr.splitlines()[-1] and "no checkpoint" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("flags, message", [
    (["--dataset", "missing.jsonl"], "missing.jsonl"),
    (["--dataset", "assets/quickstart/test.jsonl", "--encoder", "nothing"], "nothing is no model"),
    (["--dataset", "assets/quickstart/test.jsonl", "--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
    (["--resume", "missing"], "missing has no run to resume"),
    (["--resume", "missing", "--lr", "1"], "--resume takes no other flag"),
    (["--device", "cpu"], "speechbrain/LoquaciousSet"),
])
def test_wrong_flags_are_one_line(flags, message):
    done = run("train.py", *flags, check=False)
    assert done.returncode and message in done.stderr.splitlines()[-1]


def test_no_speech_clips_are_sound_without_text():
    clips = no_speech(40, seed=0)
    assert all(np.isfinite(clip["audio"]).all() and np.abs(clip["audio"]).max() <= 1 and clip["text"] == "" for clip in clips)
    assert all(len(clip["audio"]) == pytest.approx(16_000 * clip["seconds"]) and 1 <= clip["seconds"] <= 12 for clip in clips)
    assert min(np.abs(clip["audio"]).max() for clip in clips) < 0.01 and max(np.abs(clip["audio"]).max() for clip in clips) > 0.5
    assert [clip["seconds"] for clip in no_speech(40, seed=0)] == [clip["seconds"] for clip in clips]


def test_a_finished_run_is_not_overwritten(train_flags, trained):
    done = run("train.py", *train_flags, "--out", trained[0], check=False)
    assert done.returncode == 1 and "--resume" in done.stderr


def test_sample_prints_text_alone_or_with_paths_and_goes_on_past_bad_files(trained, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1), 16_000)
    soundfile.write(tmp_path / "ä b.flac", np.stack([tone(2, 1)] * 3, 1), 96_000)
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "empty.wav").write_bytes(b"")
    model = ["--model", trained[0], "--device", "cpu"]
    one = run("sample.py", tmp_path / "a.wav", *model)
    assert one.stdout.count("\n") == 1 and "\t" not in one.stdout and one.stderr == ""
    names = ["a.wav", "text.wav", "ä b.flac", "empty.wav", "missing.wav"]
    many = run("sample.py", *(tmp_path / name for name in names), *model, check=False)
    assert many.returncode == 1
    rows = [line.split("\t") for line in many.stdout.splitlines()]
    assert [path for path, _ in rows] == [str(tmp_path / "a.wav"), str(tmp_path / "ä b.flac")]
    assert rows[0][1] == one.stdout.strip()
    errors = many.stderr.splitlines()
    assert len(errors) == 3 and all(name in error for name, error in zip(("text.wav", "empty.wav", "missing.wav"), errors))


def test_sample_with_a_checkpoint_that_is_none(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1), 16_000)
    done = run("sample.py", tmp_path / "a.wav", "--model", tmp_path, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "config.json" in done.stderr
