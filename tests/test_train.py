"""Training at full scale, as far as it can be run without a GPU and without the Hub: streams, processes, crashes, uploads."""

import base64
import io
import itertools
import json
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
import torch
import transformers as hf
from conftest import ROOT, SENTENCES, run, tone
from test_eval import hub_folder
from test_scripts import losses

import train
from tinyaudio import Encoder, Projector, TinyAudio, placement


def start(*arguments, **options):
    """One of the scripts, running."""
    return subprocess.Popen([sys.executable, "-u", *map(str, arguments)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            **options)


# ------------------------------------------------------------------------------------------------------------- streams


@pytest.fixture(scope="module")
def loquacious(tmp_path_factory):
    """A folder in which speechbrain/LoquaciousSet is a local dataset of 30 clips, one of them without text and two too long."""
    root = tmp_path_factory.mktemp("hub")
    hub_folder(root / "speechbrain" / "LoquaciousSet", "medium", "train", "wav", "text",
               {"ID": "a", "duration": 1.5, "start": 0.0, "sex": "unk", "spk_id": "7"})
    return root


@pytest.fixture(scope="module")
def stream_flags(toys, dataset):
    return [ROOT / "train.py", "--encoder", toys["whisper"], "--decoder", toys["llama"], "--ctc-steps", 6, "--steps", 6, "--batch-seconds", 3,
            "--warmup", 2, "--log-every", 1, "--eval-every", 5, "--val-clips", 3, "--window", 10, "--max-seconds", 1.05, "--device", "cpu",
            "--dataset", f"loquacious:0.7,{dataset}:0.3", "--speed", 0.1, "--noise", 0.5]


def test_a_mixed_stream_is_trained_on_and_resumed_where_it_was(stream_flags, loquacious, tmp_path):
    whole = start(*stream_flags, "--out", tmp_path / "whole", cwd=loquacious)
    printed = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0 and "Traceback" not in printed, printed
    assert "streamed" in printed and "clips over 1.05 s" in printed
    rows = losses(tmp_path / "whole")
    assert [step for step, *_ in rows] == list(range(1, 13))
    stopped = start(*stream_flags, "--out", tmp_path / "stopped", cwd=loquacious)
    for line in stopped.stdout:
        if line.startswith("step 8/"):
            stopped.terminate()
            break
    assert "--resume" in stopped.stdout.read() and stopped.wait() == 143
    state = torch.load(tmp_path / "stopped" / "state.pt", weights_only=True)
    assert "examples_iterable" in state["ranks"][0]["place"]["position"]  # of an `IterableDataset`
    resumed = start(ROOT / "train.py", "--resume", tmp_path / "stopped", cwd=loquacious)
    assert resumed.wait(300) == 0, resumed.stdout.read()
    assert losses(tmp_path / "stopped") == rows


def test_weights_of_a_mixture_are_kept(loquacious, dataset, monkeypatch):
    monkeypatch.chdir(loquacious)
    args = train.argparse.Namespace(dataset=f"{dataset}:0.75, loquacious:0.25", config=None, split=None, audio_column=None,
                                    text_column=None, seed=0)
    clips, stream = train.open_dataset(args)
    names = [row["audio"]["path"] for row in stream.take(400)]
    assert clips is None and 0.7 < sum(name.endswith(".wav") for name in names) / 400 < 0.8
    assert sum(name.endswith("broken.wav") for name in names) > 5  # small sets are repeated


def test_the_rows_of_a_stream_become_clips(loquacious, monkeypatch):
    monkeypatch.chdir(loquacious)
    args = train.argparse.Namespace(dataset="loquacious", config=None, split=None, audio_column=None, text_column=None, seed=0, window=30)
    left_out = train.Counter()
    number, position, clips = next(train.stream_windows(train.open_dataset(args)[1], args, 1.05, left_out, held_out={"0.flac"}))
    assert number == 0 and left_out == {"over 1.05 s": 2, "without text": 1, None: 26} and len(clips) == 26
    assert {clip["text"] for clip in clips} == set(SENTENCES)  # were in capitals
    assert all(isinstance(clip["audio"], bytes) and 0.5 <= clip["seconds"] <= 1.05 for clip in clips)


def test_clips_of_a_stream_that_have_no_path_are_told_apart():
    """And none that is held out for validation is trained on, in no window and no repetition."""
    from datasets import Dataset, Features, Value

    files = [io.BytesIO() for _ in range(20)]
    for i, file in enumerate(files):
        soundfile.write(file, tone(0.5, i), 16_000, format="wav")
    rows = Dataset.from_dict({"audio": [{"bytes": file.getvalue(), "path": None} for file in files], "text": [str(i) for i in range(20)]},
                             features=Features({"audio": {"bytes": Value("binary"), "path": Value("string")}, "text": Value("string")}))
    args = train.argparse.Namespace(dataset="any", out="out", window=20)

    def windows(held_out):
        return train.stream_windows(rows.to_iterable_dataset().repeat(None), args, 30, train.Counter(), held_out)

    names = {clip["name"]: clip["text"] for clip in next(windows(()))[2]}
    assert len(names) == 20
    held_out = set(list(names)[::4])
    for _, _, clips in itertools.islice(windows(held_out), 3):
        assert {clip["text"] for clip in clips} == {text for name, text in names.items() if name not in held_out}


def test_a_stream_that_breaks_off_says_how_to_go_on():
    class Broken:
        def state_dict(self):
            return {"row": 0}

        def __iter__(self):
            yield {"audio": {"bytes": b"", "path": "a.wav"}, "text": "a"}
            raise ConnectionError("Name or service not known")

    args = train.argparse.Namespace(dataset="loquacious", out="out/mine", window=10)
    with pytest.raises(train.InputError, match=r"loquacious: the stream broke off \(Name or service not known\); --resume out/mine"):
        next(train.stream_windows(Broken(), args, 30, train.Counter()))


# --------------------------------------------------------------------------------------------------------------- sizes

HUBERT_XL = hf.HubertConfig(hidden_size=1280, num_hidden_layers=48, num_attention_heads=16, intermediate_size=5120, conv_bias=True,
                            feat_extract_norm="layer", do_stable_layer_norm=True)
WHISPER_TURBO = hf.WhisperConfig(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, decoder_layers=4,
                                 decoder_attention_heads=20, decoder_ffn_dim=5120, num_mel_bins=128, vocab_size=51866)
QWEN3_8B = hf.Qwen3Config(hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                          intermediate_size=12288, vocab_size=151936, tie_word_embeddings=False)
SMOLLM3_3B = hf.SmolLM3Config(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=4,
                              intermediate_size=11008, vocab_size=128256, tie_word_embeddings=True)


@pytest.mark.parametrize("encoder, decoder, millions, hidden", [(HUBERT_XL, QWEN3_8B, (958, 8191, 12.93), 1232),
                                                                 (WHISPER_TURBO, SMOLLM3_3B, (637, 3075, 12.98), 1536)])
def test_sizes_of_the_big_pairs(encoder, decoder, millions, hidden):
    """From their configurations, without memory: widths, frame rate and the share that is trained."""
    with torch.device("meta"):
        parts = hf.AutoModel.from_config(encoder), hf.AutoModelForCausalLM.from_config(decoder), Projector(encoder.hidden_size, decoder.hidden_size)
        frames = torch.empty(2, 1499, encoder.hidden_size)
        audio, counts = parts[2](frames, torch.tensor([1499, 1001], device="cpu"))
    if encoder.model_type == "whisper":
        parts, frame_count = (parts[0].encoder, *parts[1:]), encoder.max_source_positions
    else:
        frame_count = parts[0]._get_feat_extract_output_lengths(torch.tensor(16_000 * 30 + 80)).item()
    assert frame_count == 30 * Encoder.frame_rate
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    assert sizes == pytest.approx(millions, rel=0.005) and parts[2].hidden == hidden
    assert audio.shape == (2, 300, decoder.hidden_size) and counts.tolist() == [300, 201]
    if decoder is QWEN3_8B:
        assert 100 * sizes[2] / sum(sizes) == pytest.approx(0.14, abs=0.005)


def test_plan_of_the_headline_pair(tmp_path):
    HUBERT_XL.save_pretrained(tmp_path / "hubert-xl")
    QWEN3_8B.save_pretrained(tmp_path / "qwen3-8b")
    flags = ["--encoder", tmp_path / "hubert-xl", "--decoder", tmp_path / "qwen3-8b", "--plan", 2250]
    lines = run("train.py", *flags).stdout.splitlines()
    assert "962M, frozen" in lines[0] and "12.94M, hidden 1232" in lines[0] and "8191M, frozen" in lines[0] and "0.14% is trained" in lines[0]
    assert "frozen weights 18.3 GB" in lines[1] and "encoder 96, decoder 5" in lines[2]
    fits = {line.split(",")[0][2:]: line.endswith("| yes |") for line in lines if line.startswith(("| RTX", "| A", "| H"))}
    assert fits == {"RTX 4090": False, "A40": True, "A100": True, "H100": True}
    tight = run("train.py", *flags, "--checkpointing", "--batch-seconds", 60).stdout.splitlines()
    assert any(line.startswith("| RTX 4090") and line.endswith("| yes |") for line in tight)


# ------------------------------------------------------------------------------------------------- processes and crashes


def test_two_processes_have_the_gradients_of_one(train_flags, tmp_path):
    flags = [*train_flags, "--mask", 0, "--dropout", 0]
    run("train.py", *flags, "--accumulate", 2, "--out", tmp_path / "one")
    two = start("-m", "torch.distributed.run", "--nproc_per_node", 2, ROOT / "train.py", *flags, "--accumulate", 1, "--out", tmp_path / "two")
    printed = two.communicate(timeout=600)[0]
    assert two.returncode == 0, printed
    assert len([line for line in printed.splitlines() if line.startswith("step 3/16")]) == 1  # only one of them prints
    one, two = np.array(losses(tmp_path / "one")), np.array(losses(tmp_path / "two"))
    assert one.shape == two.shape == (16, 4) and np.allclose(one, two, rtol=2e-3)  # step, loss, gradient norm, learning rate
    assert np.allclose(one[0], two[0], rtol=1e-5)
    refused = run("train.py", "--resume", tmp_path / "two", check=False)
    assert refused.returncode == 1 and "trained by 2 processes" in refused.stderr


def test_ten_kills_leave_a_run_that_can_be_resumed(train_flags, trained, tmp_path):
    out, rng = tmp_path / "out", random.Random(0)
    flags = [*train_flags, "--eval-every", 1]
    for kill in range(10):
        process = start(ROOT / "train.py", *(["--resume", out] if (out / "state.pt").exists() else [*flags, "--out", out]))
        for line in process.stdout:
            if " -> " in line:  # all is loaded, the first checkpoint is near
                break
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.wait()
        if (out / "config.json").exists():
            TinyAudio.load(out, "cpu")
    run("train.py", "--resume", out)
    assert losses(out) == losses(trained[0])


def test_a_full_disk_keeps_the_last_checkpoint(train_flags, trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    state = torch.load(out / "state.pt", weights_only=True)
    state["step"], before = 8, (out / "state.pt").read_bytes()
    torch.save(state, out / "state.pt")
    before = (out / "state.pt").read_bytes()
    full = start(ROOT / "train.py", "--resume", out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    printed = full.communicate(timeout=300)[0]
    assert full.returncode == 1 and "cannot write the checkpoint of step 12" in printed and "Traceback" not in printed
    assert (out / "state.pt").read_bytes() == before and not list(out.glob("*.unfinished"))
    run("train.py", "--resume", out)


def test_clips_to_validate_on_that_cannot_be_used_are_an_error(train_flags, tmp_path):
    (tmp_path / "val.jsonl").write_text('{"audio": "nowhere.wav", "text": "a"}\n')
    done = run("train.py", *train_flags, "--val", tmp_path / "val.jsonl", "--out", tmp_path / "out", check=False)
    assert done.returncode == 1 and "no usable clip in" in done.stderr.splitlines()[-1] and "1 clips not readable audio" in done.stderr


def test_two_runs_do_not_share_a_folder(train_flags, tmp_path):
    first = start(ROOT / "train.py", *train_flags, "--steps", 5000, "--out", tmp_path)
    for line in first.stdout:
        if line.startswith("step 1/"):
            break
    second = run("train.py", *train_flags, "--out", tmp_path, check=False)
    resumed = run("train.py", "--resume", tmp_path, check=False)
    first.kill()
    assert second.returncode == resumed.returncode == 1
    assert "another run is writing to" in second.stderr.splitlines()[-1] and "another run is writing to" in resumed.stderr.splitlines()[-1]


def test_a_loss_that_is_not_finite_is_skipped_once_and_then_named(train_flags, tmp_path):
    done = run("train.py", *train_flags, "--ctc-lr", 1e38, "--warmup", 0, "--out", tmp_path / "out", check=False)
    skipped, stopped = [line for line in done.stderr.splitlines() if "is not finite; clips: " in line]
    assert done.returncode == 1 and skipped.endswith("skipped") and ".wav" in skipped and "lower --lr" in stopped


def test_an_offending_clip_is_found(toys):
    model = TinyAudio(toys["whisper"], toys["llama"], device="cpu")
    model.spell_with(["on"])
    frames = torch.randn(3, 20, 32)
    frames[1, 5] = torch.nan
    clips = [{"name": name, "answer": model.tokenize("on")} for name in "abc"]
    heard = [(frames, torch.tensor([20, 20, 20]), clips)]
    assert train.find_offenders(model, heard, (1, 0)) == ["b"]
    assert train.find_offenders(model, [(frames[::2], torch.tensor([20, 20]), clips[::2])], (0, 1)) == ["a", "c"]


@pytest.mark.parametrize("options", [["--checkpointing"], ["--compile"], ["--checkpointing", "--compile"]])
def test_checkpointing_and_compilation_change_nothing_but_speed(train_flags, trained, tmp_path, options):
    run("train.py", *train_flags, *options, "--out", tmp_path / "out")
    rounding = 5e-3 if placement("cpu")[1] == torch.float32 else 3e-2  # compiled layers round to bfloat16 less often
    assert np.allclose(np.array(losses(tmp_path / "out")), np.array(losses(trained[0])), rtol=rounding)


# ------------------------------------------------------------------------------------------------------- augmentation


def test_speed_and_noise_change_the_clip_and_nothing_else():
    wave = tone(2)
    same = train.augment(wave, np.random.default_rng(0), 0, 0, 30)
    assert np.array_equal(same, wave)
    lengths = [len(train.augment(wave, np.random.default_rng(seed), 0.1, 0, 30)) / len(wave) for seed in range(50)]
    assert 0.9 < min(lengths) < 0.95 and 1.05 < max(lengths) < 1.12
    assert len(train.augment(wave, np.random.default_rng(0), 0.5, 0, 2.01)) <= 2.01 * 16_000  # not longer than the encoder hears
    noisy = [train.augment(wave, np.random.default_rng(seed), 0, 0.5, 30) for seed in range(60)]
    ratios = [10 * np.log10(np.mean(wave**2) / np.mean((x - wave) ** 2)) for x in noisy if not np.array_equal(x, wave)]
    assert 18 < len(ratios) < 42 and 4.9 < min(ratios) < 12 and 23 < max(ratios) < 30.1
    again = train.augment(wave, np.random.default_rng(7), 0.1, 1, 30)
    assert np.array_equal(again, train.augment(wave, np.random.default_rng(7), 0.1, 1, 30)) and again.dtype == np.float32


# ----------------------------------------------------------------------------------------------------------------- Hub


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub's HTTP interface as creating, committing to and downloading a model needs."""

    files = {}

    def reply(self, body, status=200, headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", "X-Repo-Commit": "0" * 40, **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        url = f"http://{self.headers['Host']}/user/mine"
        if self.headers["Authorization"] != "Bearer hf_secret":
            self.reply({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.reply({"url": url, "name": "user/mine", "id": "1"})
        elif "/preupload/" in self.path:
            self.reply({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply({"commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True})
        else:
            self.reply({}, 200)

    def do_GET(self):
        path = self.path.split("?")[0]
        if "/resolve/" in path:
            name = path.split("/", 5)[-1]
            data = self.files.get(name)
            self.reply(data or b"", 200 if data else 404, {"ETag": f'"{hash(data):x}"', **({} if data else {"X-Error-Code": "EntryNotFound"})})
        elif "/tree/" in path:
            self.reply([{"type": "file", "path": name, "size": len(data), "oid": f"{hash(data):x}"} for name, data in self.files.items()])
        elif path.startswith("/api/models/user/mine"):
            self.reply({"id": "user/mine", "modelId": "user/mine", "sha": "0" * 40, "private": False, "tags": [], "downloads": 0, "likes": 0,
                        "siblings": [{"rfilename": name} for name in self.files]})
        elif path == "/api/whoami-v2":
            self.reply({"name": "user", "type": "user"})
        else:
            self.reply({"error": "not found"}, 404)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_a_checkpoint_goes_to_the_hub_and_comes_back(trained, toys, tmp_path, monkeypatch):
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {**train.os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
           "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    done = run("train.py", "--push", out, "user/mine", env=hub)
    assert "uploaded" in done.stdout
    assert {"projector.safetensors", "lora.safetensors", "config.json", "README.md", "log.jsonl"} <= set(Hub.files) <= {
        "projector.safetensors", "lora.safetensors", "config.json", "README.md", "log.jsonl", "plot.png"}
    assert Hub.files["projector.safetensors"] == (out / "projector.safetensors").read_bytes()
    card = Hub.files["README.md"].decode()
    assert "16 steps" in card and "--ctc-steps 8" in card and 'TinyAudio.load("user/mine")' in card and "WER" in card and str(tmp_path) not in card
    soundfile.write(tmp_path / "a.wav", tone(1), 16_000)
    local = run("sample.py", tmp_path / "a.wav", "--model", out, "--format", "json", env=hub)
    back = run("sample.py", tmp_path / "a.wav", "--model", "user/mine", "--format", "json", env=hub)
    assert json.loads(back.stdout)["text"] == json.loads(local.stdout)["text"]
    denied = run("train.py", "--push", out, "user/mine", env={**hub, "HF_TOKEN": "hf_wrong"}, check=False)
    assert denied.returncode == 1 and "hf auth login" in denied.stderr.splitlines()[-1]
    assert run("train.py", "--push", tmp_path, "user/mine", env=hub, check=False).returncode == 1
    server.shutdown()


def test_plot(trained, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    shutil.copy(trained[0] / "log.jsonl", tmp_path)
    run("train.py", "--plot", tmp_path)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "plot.png").stat().st_size > 5000
