"""train.py on toy backbones: what a run writes, how it is stopped and resumed, what it survives."""

import importlib.util
import io
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import soundfile
import torch
from torch.overrides import TorchFunctionMode
from conftest import ROOT, SENTENCES, tone

import train
from data import InputError
from tinyaudio import Encoder, TinyAudio

@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Neither measure this machine nor draw, and give the signals back."""
    # The real one draws random numbers, too, which may not change what is trained.
    monkeypatch.setattr(train, "matmul_flops", lambda *_: 1e12 + torch.rand(1).item())
    monkeypatch.setattr(train, "plot", lambda *_: None)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

@pytest.fixture(scope="module")
def calm(train_flags):
    """A short run without chance, of small steps, so that rounding stays small."""
    return [*train_flags, *"--ctc-steps 3 --steps 3 --lr 1e-4 --mask 0 --dropout 0".split()]

@pytest.fixture(scope="module")
def calm_losses(calm, tmp_path_factory):
    out = tmp_path_factory.mktemp("calm")
    train.main([*calm, "--out", str(out)])
    return losses(out)

def losses(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["lr"], row["norm"]) for row in rows if "loss" in row]

def close(found, expected, tolerance):
    return len(found) == len(expected) and np.allclose(found, expected, rtol=tolerance)

def start(*arguments):
    """Python with these arguments, running."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], text=True, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

def test_a_run_learns_and_writes_its_files(trained):
    files = {"config.json", "model.safetensors", "README.md", "state.pt", "log.jsonl",
             "frames-0-train", "frames-0-val"}
    drawn = {"plot.png"} if importlib.util.find_spec("matplotlib") else set()
    assert {file.name for file in trained.iterdir()} == files | drawn
    steps, loss, rates, norms = zip(*losses(trained))
    assert steps == tuple(range(1, 17)) and all(map(math.isfinite, norms))
    assert loss[7] < loss[0] / 2 and loss[15] < loss[8]  # both phases learn
    assert rates[0] == 5e-3 and rates[3] == max(rates) == 2e-2 and rates[7] < 5e-3  # phase 1
    assert rates[8] == 1.25e-3 and rates[11] == 5e-3 and rates[15] < 1e-3  # warm-up, cosine
    rows = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["val_loss"]) for row in rows if "wer" in row)
    wers = {row["step"]: "+".join(row["wer"]) for row in rows if "wer" in row}
    assert wers == {4: "ctc", 8: "ctc", 12: "ctc+greedy+joint", 16: "ctc+greedy+joint"}
    assert re.match(r"---\n.*\d+ steps. WER", (trained / "README.md").read_text(), re.S)
    assert isinstance(TinyAudio.from_pretrained(str(trained), "cpu").transcribe(tone(1)), str)

def test_the_best_step_is_kept_and_the_last_one_goes_on(calm, tmp_path, monkeypatch, capsys):
    said = iter([(0.3,), (0.3, 0.1, 0.2), (0.3, 0.2, 0.2), (0.3, 0.2, 0.2)])
    monkeypatch.setattr(train, "validate", lambda *_: (
        (1.5, 2.5), dict(zip(("ctc", "greedy", "joint"), next(said))), ("hi", "hello")))
    assert train.main([*calm, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "config.json").read_text())["decode"] == "greedy"
    assert "\n4 steps. WER of validation clips: 30.00% by ctc, 10.00% by greedy" in (
        tmp_path / "README.md").read_text()
    printed = capsys.readouterr().out
    for words in ("device: cpu", "M trained", "left out:", "step 1, phase 1, epoch 0, loss ",
                  ", x_real_time ", "step 3/6 val_loss 1.5, ", "step 6/6 val_loss 2.5, ",
                  "10.0 % greedy", "best: step 4\n", "hyp: hello", f"--model {tmp_path}"):
        assert words in printed, words
    flags = ["--resume", str(tmp_path), "--steps", "4", "--batch-seconds", "5"]
    assert train.main(flags) == 0
    printed = capsys.readouterr().out
    assert "--steps is now 4, and was 3\n" in printed and "--batch-seconds is now 5" in printed
    assert [step for step, *_ in losses(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]

@pytest.mark.parametrize("kill", [False, True])
def test_a_run_that_is_stopped_or_killed_goes_on(train_flags, trained, tmp_path, kill):
    process = start("train.py", *train_flags, "--out", tmp_path)
    for line in process.stdout:
        if line.startswith("step 6, "):
            process.kill() if kill else process.terminate()
            break
    rest = process.stdout.read()
    assert process.wait() == (-9 if kill else 143), rest
    assert kill or f"--resume {tmp_path}" in rest
    assert len(losses(tmp_path)) < 16
    state = torch.load(tmp_path / "state.pt")
    assert len(state["optimizer"]["state"]) == 7  # phase 1 does not touch the LoRA
    with open(tmp_path / "log.jsonl", "a") as file:  # what a crash may leave
        file.write('{"step": 15, "loss": 0.0, "lr": 0.0, "norm": 0.0}\n{"step": 16, "lo')
    assert train.main(["--resume", str(tmp_path)]) == 0
    assert losses(tmp_path) == losses(trained)
    for file in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / file).read_bytes() == (trained / file).read_bytes()

def test_two_processes_share_the_clips_and_train_as_one(calm, dataset, tmp_path):
    few = Path(dataset).with_name("few.jsonl")  # a step has all of them
    few.write_text("".join(Path(dataset).read_text().splitlines(keepends=True)[:14]))
    flags = [*calm, "--dataset", few, "--accumulate", 1, "--batch-seconds", 99, "--log-every", 1]
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2
    two = start(*torchrun, "train.py", *flags, "--out", tmp_path / "two")
    train.main([*map(str, flags), "--out", str(tmp_path / "one")])
    printed = two.communicate(timeout=300)[0]
    assert two.returncode == 0, printed
    assert printed.count("step 3, phase") == 1  # only one of them prints
    assert close(losses(tmp_path / "two"), losses(tmp_path / "one"), 5e-3)
    names = [{file.name for file in Path(tmp_path, "two", f"frames-{rank}-train").iterdir()}
             for rank in (0, 1)]
    assert len(names[0]) == len(names[1]) == 6 and not names[0] & names[1]
    with pytest.raises(InputError, match="by 2 processes, not by 1"):
        train.main(["--resume", str(tmp_path / "two")])

def test_frames_are_encoded_once_and_more_clips_and_words_can_come(
        calm, dataset, tmp_path, monkeypatch):
    def encode(encoder, features):
        asked.append(len(features))
        if len(asked) == stop:
            raise KeyboardInterrupt
        return encode_batch(encoder, features)
    asked, stop, encode_batch = [], 3, Encoder.encode
    monkeypatch.setattr(Encoder, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        train.main([*calm, "--out", str(tmp_path / "out")])
    done = sum(asked[:2]) - 1
    next(Path(tmp_path, "out", "frames-0-train").iterdir()).write_bytes(b"")  # a power cut
    asked.clear()
    stop = None
    resume = ["--resume", str(tmp_path / "out")]
    assert train.main(resume) == 0 and sum(asked) + done == 25  # 3 of them validate, one is noise
    whole = tmp_path / "whole"
    assert train.main([*calm, "--out", str(whole)]) == 0
    assert losses(tmp_path / "out") == losses(whole)
    asked.clear()
    few = Path(dataset).with_name("few.jsonl")
    few.write_text("".join(Path(dataset).read_text().splitlines(keepends=True)[:2]))
    (tmp_path / "more.jsonl").write_text(json.dumps({"audio": dataset.replace(
        "train.jsonl", "2.wav"), "text": "a zebra"}))
    more = [*resume, "--steps", "4", "--dataset", f"{dataset},{tmp_path / 'more.jsonl'}"]
    with pytest.raises(SystemExit):  # clips that were trained on would validate
        train.main(more)
    shutil.rmtree(tmp_path / "out" / "frames-0-train")  # as users do to free the disk
    assert train.main([*more, "--val", str(few)]) == 0 and sum(asked) > 20
    assert losses(tmp_path / "out")[-1][0] == 7 and "7 steps" in (
        tmp_path / "out" / "README.md").read_text()  # the best by the new clips

def test_a_clip_that_was_recorded_anew_is_encoded_anew(calm, tmp_path):
    args, _ = train.parse_args(calm)
    model, frames = train.build_model(args), []
    for seed in (1, 2):
        row = {"name": "a.wav", "audio": tone(2, seed), "text": "turn on the light"}
        [clip] = train.usable([row], model, {})
        train.encode_once(tmp_path, model, [clip], 9)
        frames.append(clip["frames"].read_bytes())
    assert len(frames[0]) == len(frames[1]) and frames[0] != frames[1]

def test_a_folder_with_a_run_and_other_flags_are_refused(train_flags, trained, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    for out, name in ((trained, "model.safetensors"), (tmp_path, "README.md")):
        with pytest.raises(InputError, match=f"holds a {name}.*--resume"):
            train.main([*train_flags, "--out", str(out)])
    with pytest.raises(SystemExit) as status:
        train.main(["--resume", str(trained), "--lr", "1"])
    assert status.value.code == 2 and "--resume does not take --lr" in capsys.readouterr().err
    for flag in ("--seed -1", "--lora-rank -1", "--dropout 1.5", "--batch-seconds nan",
                 "--ctc-steps -1", "--accumulate 0"):
        with pytest.raises(SystemExit):
            train.main([*train_flags, *flag.split()])
        assert f"{flag[:6]}" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(InputError, match="no run to resume"):
        train.main(["--resume", str(tmp_path)])
    torch.save({"args": {}}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="earlier version"):
        train.main(["--resume", str(tmp_path)])

def test_what_stops_before_the_long_work(calm, dataset, tmp_path, monkeypatch):
    rows = [{**row, "audio": f"../{Path(dataset).parent.name}/{row['audio']}"}
            for row in map(json.loads, open(dataset))]
    other = Path(dataset).parent / "other.jsonl"
    other.write_text("\n".join(map(json.dumps, rows)))
    for val in (dataset, other):
        with pytest.raises(InputError, match="no usable clip beside those to validate"):
            train.main([*calm, "--val", str(val), "--out", str(tmp_path / "a")])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="wandb"):
        train.main([*calm, "--wandb", "x", "--out", str(tmp_path / "b")])
    assert not (tmp_path / "b" / "state.pt").exists()

def test_a_full_disk_leaves_the_last_checkpoint(calm, tmp_path, monkeypatch):
    def full(file, data):
        if "state.pt" in file.name:
            data = data[:len(data) // 2]
        with open(file, "wb") as half:
            half.write(data)
        if "state.pt" in file.name:
            raise OSError(28, "No space left on device")
    assert train.main([*calm, "--steps", "0", "--out", str(tmp_path)]) == 0
    before, names = (tmp_path / "state.pt").read_bytes(), set(tmp_path.iterdir())
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="state.pt: No space left"):
        train.main(["--resume", str(tmp_path), "--steps", "1"])
    assert set(tmp_path.iterdir()) == names
    assert (tmp_path / "state.pt").read_bytes() == before

@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no closed terminals")
def test_a_closed_terminal_saves_and_a_second_ctrl_c_ends_at_once(calm, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    process = start("-u", "train.py", *calm, "--steps", 9999, "--out", tmp_path)
    while "step 5, " not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP
    assert torch.load(tmp_path / "state.pt")["step"] >= 5
    for kind, status, said in (("SIGHUP", 0, ["1"]), ("SIGINT", 130, ["1", "2"])):
        code = (f"import signal, sys, train; train.catch_signals(); print(1); sys.stdout.flush(); "
                f"signal.raise_signal(signal.{kind}); print(2); sys.stdout.flush(); "
                "'{kind}' == 'SIGHUP' or signal.raise_signal(2)")
        process = start("-u", "-c", code.replace("{kind}", kind))
        lines = process.communicate(timeout=60)[0].splitlines()
        assert process.returncode == status and [x for x in lines if len(x) == 1] == said
        assert ("stopping after this step; Ctrl-C again stops at once" in lines) == bool(status)

def test_init_from_takes_over_the_model(toys, dataset, tmp_path):
    flags = ["--init-from", str(tmp_path / "first"), "--dataset", dataset, "--ctc-steps", "0"]
    flags += ["--steps", "1", "--lr", "0", "--device", "cpu", "--out", str(tmp_path / "second")]
    model = TinyAudio(toys["hubert"], toys["qwen3"], stack=4, hidden=16, lora=3, device="cpu")
    model.ctc.blank.data += 0.123
    model.save_pretrained(tmp_path / "first")
    others = {"encoder": toys["wavlm"], "decoder": toys["llama"], "stack": 3, "hidden": 8}
    for key, value in {**others, "lora": 2}.items():
        flag = "--lora-rank" if key == "lora" else f"--{key}"
        with pytest.raises(InputError, match=rf"{key}.* {value}\b"):
            train.main([*flags, flag, str(value)])
    train.main(flags)
    found = TinyAudio.from_pretrained(str(tmp_path / "second"), "cpu", merge=False)
    assert {**found.config, "decode": ""} == {**model.config, "decode": ""}
    for part in ("projector", "lora"):
        for x, y in zip(getattr(found, part).parameters(), getattr(model, part).parameters()):
            torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)

@pytest.fixture
def stream(toys, tmp_path, monkeypatch):
    """Flags of a run on a stream of 28 clips, two of them unusable, in windows of 10; its dev
    split has 2 more."""
    rows = []
    for i in range(30):
        file = io.BytesIO()
        soundfile.write(file, tone(1.5 + i / 50, i), 16_000, format="flac")
        audio = b"this is no audio" if i == 7 else file.getvalue()
        rows.append({"wav": {"bytes": audio, "path": None}, "ID": str(i),
                     "text": "" if i == 3 else SENTENCES[i % 4].upper()})
    folder = tmp_path / "speechbrain" / "LoquaciousSet"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: medium\n  data_files:\n  - split: train\n    path: train-*\n"
        "  - split: dev\n    path: dev-*\n---\n")
    table = datasets.Dataset.from_list(rows).cast_column("wav", datasets.Audio(16_000))
    for name, part in (("train-0", range(15)), ("train-1", range(15, 28)), ("dev-0", (28, 29))):
        table.select(part).to_parquet(folder / f"{name}.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "WINDOW", 10)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    flags = ("--dataset speechbrain/LoquaciousSet:medium --ctc-steps 5 --steps 5 --batch-seconds 9 "
             "--log-every 1 --eval-every 4 --lr 1e-4 --device cpu")
    return ["--encoder", toys["whisper"], "--decoder", toys["llama"], *flags.split()]

def test_a_stream_is_trained_on_and_resumed_where_it_was(stream, tmp_path, monkeypatch):
    make_steps, validate, heard, held_out, stop = train.make_steps, train.validate, set(), set(), []

    def listen(*arguments):
        for place, batches in make_steps(*arguments):
            heard.update(clip["name"] for *_, clips in batches for clip in clips)
            yield place, batches
    def hold_out(model, clips, *others):
        held_out.update(clip["name"] for clip in clips)
        if stop:
            signal.raise_signal(stop.pop())
        return validate(model, clips, *others)
    monkeypatch.setattr(train, "make_steps", listen)
    monkeypatch.setattr(train, "validate", hold_out)
    assert train.main([*stream, "--out", "whole"]) == 0
    # Clips without a path are told apart, and those to validate on are never trained on.
    assert 1 <= len(held_out) <= 2 and len(heard | held_out) == 26 and not heard & held_out
    stop.append(signal.SIGTERM)
    assert train.main([*stream, "--out", "stopped"]) == 143
    assert len(losses(tmp_path / "stopped")) == 5
    assert train.main(["--resume", "stopped"]) == 0 and not heard & held_out
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")

def test_a_stream_that_breaks_off_loses_no_step(stream, tmp_path, monkeypatch):
    def break_off(rows, name):
        if next(count) == 3:  # the clips to validate on, and two windows are read
            raise InputError("the stream broke off")
        return stream_clips(rows, name)
    stream_clips, count = train.stream_clips, itertools.count()
    flags = [*stream, "--eval-every", "99"]
    train.main([*flags, "--out", "whole"])
    monkeypatch.setattr(train, "stream_clips", break_off)
    with pytest.raises(InputError, match="broke off"):
        train.main([*flags, "--out", "broken"])
    assert 1 < torch.load("broken/state.pt")["step"] == len(losses(tmp_path / "broken")) < 10
    assert train.main(["--resume", "broken"]) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")

def test_a_stream_in_another_script_is_spelt_too(stream):
    args, _ = train.parse_args([*stream, "--dataset", "loquacious"])
    model = train.build_model(args)
    train.load_data(args, model, 0, 1)
    assert all(model.tokenizer.decode(token).isascii() for token in model.ctc.classes)
    file = "speechbrain/LoquaciousSet/dev-0.parquet"
    rows = [{**row, "text": "\u0434\u0430"} for row in pyarrow.parquet.read_table(file).to_pylist()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    _, val = train.load_data(args, model, 0, 1)
    assert len(val) == 2 and all(set(clip["answer"]) <= model.ctc.classes.keys() for clip in val)
    assert not set(model.tokenizer.all_special_ids) & model.ctc.classes.keys()

def test_clips_that_were_trained_on_do_not_validate_when_more_come(calm, dataset):
    file, found = Path(dataset).with_name("grows.jsonl"), []
    for count in (10, 19):
        file.write_text("".join(open(dataset).readlines()[:count]))
        args, _ = train.parse_args([*calm, "--dataset", str(file)])
        clips = train.load_data(args, train.build_model(args), 0, 1)
        found.append([{clip["name"] for clip in part} for part in clips])
    (trained, first), (_, then) = found
    assert len(first) == len(then) == 2 and not trained & then

@pytest.mark.parametrize("shards", [2, 1])
def test_each_process_has_its_part_of_a_stream_and_the_dev_split_validates(stream, shards):
    if shards == 1:
        Path("speechbrain/LoquaciousSet/train-1.parquet").unlink()
    args, _ = train.parse_args([*stream, "--dataset", "loquacious"])
    model, heard = train.build_model(args), []
    for rank in (0, 1):
        rows, val = train.load_data(args, model, rank, 2)
        clips = train.stream_clips(itertools.islice(rows, 7), "")  # half of a shard
        heard += [clip["name"] for clip in clips]
        assert len(val) == 2
    assert len(set(heard)) == 14 and not set(heard) & {clip["name"] for clip in val}

class Syncs(TorchFunctionMode):
    """Counts what would wait for a GPU. Lengths (int64) are on the CPU anyway. (transformers has
    a bool() of its own in each forward pass.)"""
    count, names = 0, ("item", "tolist", "cpu", "numpy", "__float__", "__int__")

    def __torch_function__(self, function, types, arguments=(), options=None):
        asked = function.__name__ in self.names and arguments[0].dtype != torch.int64
        self.count += asked
        return function(*arguments, **options or {})

def test_a_step_waits_once_for_the_device(calm, tmp_path, monkeypatch):
    def next_step(items):
        with ThreadPoolExecutor(1) as thread:  # the mode does not see other threads
            counts.append(syncs.count)
            return thread.submit(next, items).result()
    counts, syncs = [], Syncs()
    monkeypatch.setattr(train, "next", next_step, raising=False)
    monkeypatch.setattr(train, "prefetch", lambda items: items)
    with syncs:
        train.main([*calm, "--log-every", "99", "--eval-every", "99", "--out", str(tmp_path)])
    assert len(counts) == 6 and np.diff(counts)[[0, 1, 3, 4]].tolist() == [1] * 4  # the norm

def test_bad_steps_are_skipped_and_five_in_a_row_end_the_run(calm, tmp_path, monkeypatch, capsys):
    def bad_loss(*arguments):
        total, parts = loss(*arguments)
        training = torch.is_grad_enabled()
        return total * (math.nan if training and next(count) in bad else 1), parts
    loss, count, bad = TinyAudio.loss, itertools.count(), (0, 1, 2, 3, 5)
    monkeypatch.setattr(TinyAudio, "loss", bad_loss)
    flags = [*calm, "--accumulate", "1"]
    assert train.main([*flags, "--out", str(tmp_path / "a")]) == 0
    named = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert len(named) == 5 and all(".wav" in line for line in named)
    bad = range(100)
    with pytest.raises(InputError, match="five bad steps in a row"):
        train.main([*flags, "--out", str(tmp_path / "b")])
    for name in "ab":
        tensors = safetensors.torch.load_file(tmp_path / name / "model.safetensors").values()
        assert all(tensor.isfinite().all() for tensor in tensors)

def test_broken_clips_are_left_out_once(calm, dataset, tmp_path, capsys):
    def write(name, *files):
        texts = {good[5]: "two plus " * 9, good[4]: "<noise>", good[0]: "two two two two two two"}
        rows = [json.dumps({"audio": str(file), "text": texts.get(file, "turn on the light")})
                for file in files]
        (tmp_path / name).write_text("\n".join(rows))
        return str(tmp_path / name)
    flac, good = io.BytesIO(), [Path(dataset).parent / f"{i}.wav" for i in range(8)]
    soundfile.write(flac, tone(20), 16_000, format="flac")
    data = flac.getvalue()  # the header stays as it is
    (tmp_path / "damaged.flac").write_bytes(data[:5000] + bytes(5000) + data[10_000:])
    (tmp_path / "empty.wav").write_bytes(b"")
    mine = write("mine.jsonl", "damaged.flac", "empty.wav", "missing.wav", *good[:6])
    flags = [*calm, "--dataset", mine, "--accumulate", "1", "--keep-frames", "0"]
    val = ["--val", write("val.jsonl", *good[6:]), "--out", str(tmp_path / "a")]
    assert train.main([*flags, *val]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("damaged.flac: ") == 1 and "3 clips, and 2 to" in printed.out
    for reason in ("s long': 3,", "'without text': 1", "'with more text than sound': 2"):
        assert reason in printed.out
    val = ["--val", write("none.jsonl", "empty.wav"), "--out", str(tmp_path / "b")]
    with pytest.raises(InputError, match=r"none\.jsonl.* left out: .*: 1"):
        train.main([*flags, *val])

@pytest.mark.parametrize("flags, tolerance, same", [
    ("--keep-frames 0", 3e-2, True),  # the frames that are kept are rounded to bfloat16
    ("--checkpointing", 1e-3, True),
    ("--augment 0.8", 3e-2, False)])
def test_what_may_change_the_result(calm, calm_losses, tmp_path, flags, tolerance, same):
    train.main([*calm, *flags.split(), "--out", str(tmp_path)])
    found = losses(tmp_path)
    assert np.isfinite(found).all() and close(found, calm_losses, tolerance) == same

def test_compiling_changes_nothing_but_speed(calm, calm_losses, tmp_path, monkeypatch):
    def trace(layer, **options):  # all but the slow last part, which makes machine code
        compiled.append(layer)
        compile_layer(layer, backend="eager", **options)
    compiled, compile_layer = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    train.main([*calm, "--compile", "--out", str(tmp_path)])
    assert len(compiled) == 2 and close(losses(tmp_path), calm_losses, 1e-3)
