"""Train the bridge between a frozen audio encoder and a frozen language model.

    python train.py --encoder hubert --decoder qwen3-8b                 LoquaciousSet, streamed: about a day on one GPU
    python train.py --encoder hubert --decoder qwen3-8b --plan          what that takes, without loading any weights
    torchrun --nproc_per_node=4 train.py --encoder hubert --decoder qwen3-8b
    python train.py --encoder whisper-base --decoder smollm2-135m --dataset mine.jsonl --out out/mine
    python train.py --resume out/mine
    python train.py --plot out/mine                                     loss, WER and speed as out/mine/plot.png
    python train.py --push out/mine user/name                           to the Hugging Face Hub

Phase 1 (--ctc-steps) teaches the projector to spell in the decoder's own embeddings, by CTC; the decoder is not run.
Phase 2 (--steps) is cross-entropy through the frozen decoder, with a little of the CTC loss kept.
Ctrl-C or SIGTERM saves and stops; what is in --out can be used at any time.
"""

import argparse
import datetime
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from eval import corpus_wer, encoded_audio, is_hub_id, open_stream
from tinyaudio import (DECODERS, DECODINGS, ENCODERS, SAMPLE_RATE, InputError, Projector, TinyAudio, clean_text, first_line, from_hub, load_audio,
                       locate, make_batches, read_clips, read_config, read_whole_rows, write_whole)

TRAINING_SETS = {  # name -> hub id, config, split, audio column, text column
    "loquacious": ("speechbrain/LoquaciousSet", "medium", "train", "wav", "text"),
    "librispeech": ("openslr/librispeech_asr", "clean", "train.360", "audio", "text"),
}


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--encoder", default="whisper-base", help="hubert, whisper, whisper-base, a hub id or a folder")
    add("--decoder", default="smollm2-135m", help="qwen3-8b, smollm3-3b, smollm2-135m, a hub id or a folder ...")
    add("--dataset", default="loquacious", help="loquacious, librispeech, a hub id, or .jsonl, .csv, .tsv, .parquet files (globs) or a "
        "folder; several with commas between, and mixed by weight as in a:0.7,b:0.3")
    add("--config", help="of a dataset on the Hub, such as clean, small, medium or large of loquacious")
    add("--split", help="of a dataset on the Hub")
    add("--audio-column", help="of a dataset on the Hub")
    add("--text-column", help="of a dataset on the Hub")
    add("--val", help="files to watch the WER on; by default --val-clips of --dataset are held out")
    add("--out", default="out", help="folder of the checkpoint and log.jsonl")
    add("--resume", metavar="OUT", help="go on with an interrupted run, exactly; takes no other flag")
    add("--init-from", metavar="CKPT", help="start from a trained checkpoint instead of from nothing, or, of several with commas between, "
        "from their mean")
    add("--stack", type=positive, default=5, help="encoder frames per projector frame")
    add("--hidden", type=int, help="hidden width of the projector (by default that of --init-from, or about 13M parameters)")
    add("--lora-rank", type=int, default=0, help="train a low-rank update of the decoder too, in phase 2 (0: none)")
    add("--ctc-steps", type=int, default=4000, help="steps of phase 1")
    add("--steps", type=int, default=60000, help="steps of phase 2")
    add("--ctc-weight", type=float, default=0.1, help="weight of the CTC loss in phase 2, if there was a phase 1")
    add("--batch-seconds", type=float, default=120, help="seconds of audio, padding included, per forward pass")
    add("--accumulate", type=positive, default=1, help="forward passes per optimizer step")
    add("--max-seconds", type=float, default=30, help="leave out longer clips")
    add("--ctc-lr", type=float, default=4e-3, help="peak learning rate of phase 1")
    add("--lr", type=float, default=1e-3, help="peak learning rate of phase 2")
    add("--warmup", type=int, default=100, help="warm-up steps of each phase")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--mask", type=float, default=0.15, help="share of stacked frames masked while training")
    add("--dropout", type=float, default=0.15, help="dropout in the projector")
    add("--word-dropout", type=float, default=0, metavar="SHARE", help="hide so many of the answer's own tokens from the decoder, e.g. 0.15")
    add("--speed", type=float, default=0, metavar="SHARE", help="play each clip up to so much faster or slower, e.g. 0.1")
    add("--noise", type=float, default=0, metavar="SHARE", help="add noise to so many of the clips, e.g. 0.3")
    add("--no-speech", type=float, default=0.03, metavar="SHARE", help="add so many clips of silence, noise and tones, without text")
    add("--compile", action="store_true", help="compile the decoder's layers (slow to start, then faster)")
    add("--checkpointing", action="store_true", help="recompute the decoder's activations in the backward pass: less memory, a third slower")
    add("--keep-frames", type=float, default=4, metavar="GB",
        help="encode local data once and keep the frames in memory if they take at most this much")
    add("--window", type=positive, default=1000, help="clips of a stream that are shuffled and sorted into batches together")
    add("--workers", type=positive, default=min(8, os.cpu_count()), help="threads that decode and resample")
    add("--log-every", type=positive, default=20, help="steps between log lines")
    add("--eval-every", type=positive, default=500, help="steps between validations, each of which saves a checkpoint")
    add("--val-clips", type=positive, default=50, help="clips to validate on")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    add("--push-to-hub", metavar="NAME", help="upload the finished checkpoint to the Hugging Face Hub, as user/name")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    add("--seed", type=int, default=0)
    add("--plan", nargs="?", type=float, const=0.0, metavar="HOURS", help="print parameters, memory, time and price of the run, or of so "
        "many hours of audio, and stop")
    add("--plot", metavar="OUT", help="draw log.jsonl of a run and stop")
    add("--push", nargs=2, metavar=("OUT", "NAME"), help="upload a checkpoint and stop")
    args = parser.parse_args()
    if args.resume:
        if any(value != parser.get_default(name) for name, value in vars(args).items() if name != "resume"):
            parser.error("--resume takes no other flag: the run goes on as it was started")
        try:
            state = torch.load(Path(args.resume) / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"{args.resume} has no run to resume ({first_line(error)})") from None
        return argparse.Namespace(**{**vars(parser.parse_args([])), **state["args"], "out": args.resume}), state
    return args, None


def warn(message):
    tqdm.write(f"train.py: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------- data


def open_dataset(args):
    """What --dataset names: (clips, None), a list of clips in files, or (None, stream), an endless `datasets.IterableDataset` of rows
    audio, text. Weights and sets on the Hub make a stream."""
    from datasets import Dataset, Features, Value, interleave_datasets

    parts = [re.fullmatch(r"(.+?)(?::([\d.]+))?", part.strip()).groups() for part in args.dataset.split(",") if part.strip()]
    if not any(weight or name in TRAINING_SETS or is_hub_id(name) for name, weight in parts):
        if args.config or args.split or args.audio_column or args.text_column:
            raise InputError("--config, --split, --audio-column and --text-column are for datasets on the Hub, not for files")
        return read_clips(args.dataset), None
    streams = []
    for name, _ in parts:
        if name in TRAINING_SETS or is_hub_id(name):
            source, config, *rest = TRAINING_SETS.get(name, (name, None, "train", "audio", "text"))
            asked = (args.split, args.audio_column, args.text_column)
            rows = open_stream(source, args.config or config, *(a or b for a, b in zip(asked, rest)))
        else:
            clips = read_clips(name)
            rows = Dataset.from_dict({"audio": [{"bytes": clip["audio"], "path": clip["name"]} if isinstance(clip["audio"], bytes) else
                                                {"bytes": None, "path": clip["audio"]} for clip in clips],
                                      "text": [clip["text"] for clip in clips]},
                                     features=Features({"audio": encoded_audio(), "text": Value("string")})).shuffle(args.seed)
            rows = rows.to_iterable_dataset()
        # This shuffles the order of files; clips are shuffled in windows, which --resume can restore.
        streams.append(rows.shuffle(args.seed, buffer_size=1).repeat(None))
    weights = np.array([float(weight or 1) for _, weight in parts])
    if len(streams) == 1:
        return None, streams[0]
    return None, interleave_datasets(streams, probabilities=(weights / weights.sum()).tolist(), seed=args.seed)


def measure(clips, max_seconds, left_out):
    """Those of the clips that can be trained on, with their `seconds` from the header. Counts the others in left_out."""
    usable = []
    for clip in clips:
        try:
            source = io.BytesIO(clip["audio"]) if isinstance(clip["audio"], bytes) else clip["audio"]
            clip["seconds"] = soundfile.info(source).duration
        except (soundfile.SoundFileError, OSError, TypeError):
            if not left_out["not readable audio"]:
                warn(f"left out {clip['name']}, which is not readable audio; more such clips are only counted")
            left_out["not readable audio"] += 1
            continue
        reason = (f"over {max_seconds:g} s" if clip["seconds"] > max_seconds else "under 0.1 s" if clip["seconds"] < 0.1 else
                  "without text" if not clip["text"] else None)
        left_out[reason] += 1
        if reason is None:
            usable.append(clip)
    return usable


def stream_windows(stream, args, max_seconds, left_out, held_out=(), number=0, position=None):
    """The endless windows of a stream, from a position on: (number, position before it, its usable clips)."""
    if position:
        stream.load_state_dict(position)
    rows = iter(stream)
    while True:
        position, clips = stream.state_dict(), []
        try:
            window = list(itertools.islice(rows, args.window))
        except Exception as error:  # whatever the network and the many kinds of files bring
            raise InputError(f"{args.dataset}: the stream broke off ({first_line(error)}); --resume {args.out} goes on") from None
        for row in window:
            audio = row["audio"] or {}
            name = audio.get("path") or hashlib.md5(audio.get("bytes") or b"").hexdigest()
            if name not in held_out:
                clips.append({"name": name, "audio": audio.get("bytes") or audio.get("path"), "text": clean_text(row["text"] or "")})
        clips = measure(clips, max_seconds, left_out)
        if not clips:
            raise InputError(f"{args.dataset}: none of {args.window} clips in a row is usable")
        yield number, position, clips
        number += 1


def make_steps(windows, args, index, rank, ranks):
    """The endless plan of the run: (epoch or window, position of the stream, index, batches of clips), one item per optimizer step.
    The order follows from the seed and the number of the epoch alone, which is what makes --resume exact."""
    for number, position, clips in windows:
        rng = np.random.default_rng([args.seed, number])
        if position:
            clips = clips + no_speech(round(args.no_speech * len(clips)), [args.seed, number, rank])
        batches = make_batches([clip["seconds"] for clip in clips], args.batch_seconds, rng)
        # Each process has a stream of its own, but all have the same files, and share their batches.
        start, by = (0, 1) if position else (rank, ranks)
        size = args.accumulate * by
        for index in range(index, -(-len(batches) // size)):
            mine = batches[index * size:(index + 1) * size][start::by]
            yield number, position, index, [[clips[i] for i in batch] for batch in mine]
        index = 0


def ahead(items):
    """The items of a generator, each made in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items)
        while True:
            item, future = future.result(), pool.submit(next, items)
            yield item


def load_waves(clips, pool):
    """The waves of those clips that can be decoded, and the clips; a broken one is left out with one warning."""
    def load(clip):
        try:
            wave = load_audio(clip["audio"])
            if len(wave) / SAMPLE_RATE > clip["seconds"] + 0.1:
                raise InputError(f"{len(wave) / SAMPLE_RATE:.1f} s long, more than its header says")
            return wave
        except InputError as error:
            if not clip.get("broken"):
                warn(f"left out {clip['name']}: {error}")
            clip["broken"] = True

    pairs = [(wave, clip) for wave, clip in zip(pool.map(load, clips), clips) if wave is not None]
    return [wave for wave, _ in pairs], [clip for _, clip in pairs]


def coloured_noise(size, rng):
    """Noise (size,) from white to brown, of RMS 1."""
    frequencies = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    spectrum = rng.standard_normal((2, len(frequencies))) / np.maximum(frequencies, 20) ** rng.choice([0, 0.5, 1])
    noise = np.fft.irfft(spectrum[0] + 1j * spectrum[1], size)
    return noise / noise.std()


def augment(wave, rng, speed, noise, max_seconds):
    """A clip as it might have been said and recorded too: faster or slower by up to a share of `speed` (Ko et al. 2015), and, for
    a share of `noise` of all clips, with noise 5 to 30 dB below it."""
    if speed:
        factor = max(rng.uniform(1 - speed, 1 + speed), len(wave) / SAMPLE_RATE / max_seconds + 1e-3)
        wave = soxr.resample(wave, SAMPLE_RATE * factor, SAMPLE_RATE)
    if rng.random() < noise:
        loudness = np.sqrt(np.square(wave).mean())
        wave = wave + coloured_noise(len(wave), rng).astype(np.float32) * loudness * 10 ** (-rng.uniform(5, 30) / 20)
    return wave


def no_speech(count, seed):
    """`count` clips of 1 to 12 s without speech and without text: noise from white to brown, hum, tones and chords, from
    loud to hardly audible, of which the model learns to stay silent."""
    rng, clips = np.random.default_rng(seed), []
    for number in range(count):
        size = int(rng.uniform(1, 12) * SAMPLE_RATE)
        tones = sum(np.sin(2 * np.pi * pitch * np.arange(size) / SAMPLE_RATE) for pitch in rng.uniform(50, 2000, rng.integers(1, 5)))
        wave = coloured_noise(size, rng) * rng.choice([0, 0.1, 1], p=[0.1, 0.3, 0.6]) + tones * rng.choice([0, 1])
        wave = (wave / max(1e-9, np.abs(wave).max()) * 10 ** rng.uniform(-3, 0)).astype(np.float32)
        clips.append({"name": f"no speech {number}", "audio": wave, "text": "", "seconds": size / SAMPLE_RATE})
    return clips


def keep_frames(model, clips, batch_seconds, pool):
    """Encode all clips once; sets clip["frames"], (T, D) in bfloat16, in memory. Returns those that could be decoded."""
    with tqdm(total=len(clips), unit="clip", desc="encoding, once", file=sys.stderr) as progress:
        for batch in make_batches([clip["seconds"] for clip in clips], batch_seconds):
            waves, good = load_waves([clips[i] for i in batch], pool)
            for clip, frames, length in zip(good, *(model.encoder(waves) if good else ((), ()))):
                clip["frames"] = frames[:length].to("cpu", torch.bfloat16, copy=True)
            progress.update(len(batch))
    return [clip for clip in clips if "frames" in clip]


def collate(batch, pool):
    """Clips -> (frames (B, T, D), lengths (B,)) if they are kept, else waves; and the clips that could be read."""
    if "frames" not in batch[0]:
        return load_waves(batch, pool)
    frames = [clip["frames"] for clip in batch]
    inputs = pad_sequence(frames, batch_first=True), torch.tensor([len(clip) for clip in frames])
    return tuple(tensor.pin_memory() if torch.cuda.is_available() else tensor for tensor in inputs), batch


def load_steps(steps, args, max_seconds, pool):
    """What `make_steps` plans, with the clips of each batch decoded and augmented."""
    for number, position, index, batches in steps:
        rng, loaded = np.random.default_rng([args.seed, number, index]), []
        for batch in batches:
            inputs, good = collate(batch, pool)
            if args.speed or args.noise:
                inputs = [augment(wave, rng, args.speed, args.noise, max_seconds) for wave in inputs]
            loaded.append((inputs, good))
        yield number, position, index, loaded


def encode(model, inputs):
    """What `collate` made of a batch -> frames (B, T, D), lengths (B,) on the model's device."""
    if isinstance(inputs, list):
        return model.encoder(inputs)
    return tuple(tensor.to(model.device, non_blocking=True) for tensor in inputs)


# ------------------------------------------------------------------------------------------------------ measurement


def matmul_flops(device, dtype):
    """FLOP/s of this machine at a plain matrix product, against which MFU is counted."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def model_flops(model, lengths, answers, ctc_weight, lm_weight, encoded):
    """FLOPs that a step needs: 2 per frozen parameter and position forward, 2 more where gradients pass through it,
    6 per trained parameter."""
    positions = sum(-(-length // model.projector.stack) for length in lengths)
    width = model.embed.weight.shape[1]
    flops = 6 * positions * (model.projector.linear_in.weight.numel() + model.projector.linear_out.weight.numel())
    if not encoded:
        flops += 2 * sum(lengths) * sum(p.numel() for p in model.encoder.parameters())
    if ctc_weight:
        flops += 4 * positions * width * len(model.ctc.tokens)
    if lm_weight:
        words, prompt = sum(map(len, answers)), sum(map(len, model.prompt()))
        body = sum(p.numel() for p in model.decoder.base_model.parameters()) - model.embed.weight.numel()
        flops += 6 * sum(p.numel() for p in model.lora.parameters()) * (positions + words + prompt * len(answers))
        flops += 4 * body * (positions + words + prompt * len(answers))
        flops += 4 * model.embed.weight.numel() * (words + len(answers))
    return flops


def peak_memory(device):
    """GB that the run has needed at most: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


@torch.no_grad()
def validate(model, clips, batch_seconds, decodings, pool):
    """WER of the clips by each way of decoding; and a transcript to look at, by the last of them."""
    model.eval()
    texts = {decode: {} for decode in decodings}
    for batch in make_batches([clip["seconds"] for clip in clips], batch_seconds):
        inputs, good = collate([clips[i] for i in batch], pool)
        if good:
            audio, counts = model.projector(*encode(model, inputs))
            for decode, found in texts.items():
                found |= zip((clip["name"] for clip in good), map(model.detokenize, model.hear(audio, counts, decode)))
    model.train()
    wers = {decode: corpus_wer([clip["text"] for clip in clips], [found.get(clip["name"], "") for clip in clips])
            for decode, found in texts.items()}
    return wers, (clips[0]["text"], texts[decodings[-1]].get(clips[0]["name"], ""))


@torch.no_grad()
def find_offenders(model, heard, weights):
    """Names of the clips whose loss is not finite; of all, if each by itself is fine."""
    names = [clip["name"] for frames, lengths, clips in heard for i, clip in enumerate(clips)
             if not math.isfinite(model.loss(frames[i:i + 1, :lengths[i]], lengths[i:i + 1], [clip["answer"]], *weights)[0].item())]
    return names or [clip["name"] for *_, clips in heard for clip in clips]


# ------------------------------------------------------------------------------------------- plan, plot, model card

GPUS = {  # name -> memory in GB, dense bf16 TFLOP/s of its data sheet, a usual price in USD an hour
    "RTX 4090": (24, 165, 0.45),
    "A40": (48, 150, 0.50),
    "A100": (80, 312, 1.60),
    "H100": (80, 989, 2.80),
}
MFU = 0.35  # of a run, against the data sheet


def plan(args):
    """Print what a run needs. Encoder and decoder are made from their configurations as fake tensors, without weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd.graph import saved_tensors_hooks
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    configs = [from_hub(AutoConfig.from_pretrained, locate(*pair)) for pair in ((args.encoder, ENCODERS), (args.decoder, DECODERS))]
    with FakeTensorMode():
        encoder, decoder = AutoModel.from_config(configs[0]), AutoModelForCausalLM.from_config(configs[1], dtype=torch.bfloat16)
        encoder, decoder = encoder.encoder if configs[0].model_type == "whisper" else encoder, decoder.eval().requires_grad_(False)
        width, body = configs[1].hidden_size, decoder.base_model
        projector = Projector(configs[0].hidden_size, width, 1.0, args.stack, args.hidden)
        lora = sum(args.lora_rank * (m.in_features + m.out_features) for m in body.modules() if isinstance(m, torch.nn.Linear))
        # A second of speech: stacked frames, 3.3 tokens and, in clips of 10 s, 3 positions of prompt.
        rate = 50 / args.stack + 3.3 + 3
        positions = round(args.batch_seconds * rate)
        if args.checkpointing:
            checkpoint_layers(decoder, args.decoder)
        saved, weights = {}, {p.untyped_storage()._cdata for p in decoder.parameters()}

        def count(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage  # held, so that no other takes its place
            return tensor

        with saved_tensors_hooks(count, lambda tensor: tensor):
            body(inputs_embeds=torch.randn(1, positions, width, dtype=torch.bfloat16, requires_grad=True), use_cache=False)
        sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in
                 (("encoder", encoder), ("decoder", decoder), ("projector", projector))}
    trained = sizes["projector"] + lora
    logits = args.batch_seconds * 3.3 * configs[1].vocab_size * 10  # bf16, then float32 and its gradient, of answers alone
    activations = sum(storage.nbytes() for storage in saved.values()) + logits
    if args.checkpointing:  # one layer is whole at a time
        activations += 40 * positions * width
    memory = {"frozen weights": 2 * (sizes["encoder"] + sizes["decoder"]), "trained, with gradients and AdamW": 16 * trained,
              "activations": activations}
    flops = {"encoder": 2 * sizes["encoder"] * 50, "decoder": (6 if args.checkpointing else 4) * sizes["decoder"] * rate,
             "trained": 6 * trained * rate}
    total = sum(memory.values()) / 1e9
    print(f"{args.encoder} ({sizes['encoder'] / 1e6:.0f}M, frozen) -> projector ({sizes['projector'] / 1e6:.2f}M, hidden {projector.hidden})"
          + (f" + LoRA ({lora / 1e6:.2f}M)" if lora else "") + f" -> {args.decoder} ({sizes['decoder'] / 1e6:.0f}M, frozen): "
          f"{trained / sum(sizes.values()):.2%} is trained\n"
          f"memory at --batch-seconds {args.batch_seconds:g}{', --checkpointing' if args.checkpointing else ''}: "
          + ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in memory.items()) + f"; {total:.1f} GB, and about 2 GB for CUDA and what the encoder needs for a moment\n"
          "GFLOPs per second of audio in phase 2: " + ", ".join(f"{name} {value / 1e9:.0f}" for name, value in flops.items()))
    hours = args.plan or args.batch_seconds * args.accumulate * args.steps / 3600
    print(f"{hours:.0f} h of audio in phase 2 at {MFU:.0%} MFU:\n| GPU | x real time | hours | USD | fits |\n|---|---|---|---|---|")
    for name, (capacity, teraflops, price) in GPUS.items():
        speed = teraflops * 1e12 * MFU / sum(flops.values())
        print(f"| {name}, {capacity} GB, {teraflops} TFLOP/s, ${price:.2f}/h | {speed:.0f} | {hours / speed:.1f} | "
              f"{hours / speed * price:.2f} | {'yes' if total + 2 < capacity else 'no'} |")


def plot(out):
    """Draw loss, WER and speed over the steps into out/plot.png."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_log(out)
    steps, scores = [row for row in rows if "loss" in row], [row for row in rows if "wer" in row]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for phase in sorted({row["phase"] for row in steps}):
        mine = [row for row in steps if row["phase"] == phase]
        axes[0].plot([row["step"] for row in mine], [row["loss"] for row in mine], label=("CTC", "cross-entropy")[phase - 1])
    for decode in sorted({name for row in scores for name in row["wer"]}):
        mine = [row for row in scores if decode in row["wer"]]
        axes[1].plot([row["step"] for row in mine], [100 * min(1, row["wer"][decode]) for row in mine], ".-", label=decode)
    axes[2].plot([row["step"] for row in steps], [row["audio_s_per_s"] for row in steps])
    for axis, title in zip(axes, ("training loss per token", "WER in %, on the validation clips", "seconds of audio per second")):
        axis.set(title=title, xlabel="step", ylim=(0, None))
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    write_whole(out / "plot.png", lambda path: figure.savefig(path, dpi=80, format="png"))
    print(out / "plot.png")


def read_log(out):
    """The rows of a run's log.jsonl."""
    try:
        return read_whole_rows(out / "log.jsonl")
    except (OSError, ValueError) as error:
        raise InputError(f"{out / 'log.jsonl'} is no log of a run: {first_line(error)}") from None


CARD = """---
library_name: tiny-audio
pipeline_tag: automatic-speech-recognition
language: en
{bases}---

# {title}

Speech recognition with Tiny Audio: {encoder} (frozen), a trained projector, and {decoder} ({adapted}).

```python
from tinyaudio import TinyAudio
print(TinyAudio.load("{name}").transcribe("file.wav"))
```

Trained for {steps} steps, in {hours:.2f} hours in which it heard {heard:.2f} hours of audio; the last loss was {loss:.3f} per token.
WER on its {clips} validation clips: {wers}.

    python train.py {flags}

{plot}
"""


def model_card(out, name):
    """README.md of a checkpoint on the Hub, with what config.json, log.jsonl and state.pt say of its training."""
    rows, config = read_log(out), json.loads((out / "config.json").read_text())
    args = torch.load(out / "state.pt", map_location="cpu", weights_only=True)["args"]
    steps, scores = [row for row in rows if "loss" in row], [row for row in rows if "wer" in row]
    if not steps:
        raise InputError(f"{out} has not been trained yet")
    bases = [hub_id for hub_id in (ENCODERS.get(config["encoder"], config["encoder"]), DECODERS.get(config["decoder"], config["decoder"]))
             if is_hub_id(hub_id)]
    flags = {flag: Path(value).name if Path(str(value)).is_absolute() else value for flag, value in args.items()
             if value is not None and value is not False and flag not in ("out", "push_to_hub", "wandb", "device")}
    return CARD.format(
        name=name, title=name.split("/")[1], encoder=Path(config["encoder"]).name, decoder=Path(config["decoder"]).name,
        bases="".join(["base_model:\n"] * bool(bases) + [f"- {hub_id}\n" for hub_id in bases]),
        adapted=f"frozen but for a low-rank update of rank {config['lora']}" if config["lora"] else "frozen",
        steps=steps[-1]["step"], loss=steps[-1]["loss"], hours=sum(row["seconds"] for row in steps) / 3600,
        heard=sum(row["audio_s_per_s"] * row["seconds"] for row in steps) / 3600, clips=args["val_clips"],
        wers=", ".join(f"{100 * wer:.1f} % {decode}" for decode, wer in scores[-1]["wer"].items()) if scores else "not measured",
        flags=" ".join(f"--{flag.replace('_', '-')}{'' if value is True else f' {value}'}" for flag, value in flags.items()),
        plot="![loss, WER and speed](plot.png)" if (out / "plot.png").exists() else "")


def push(out, name):
    """Upload a checkpoint with its model card, log and plot to the Hugging Face Hub."""
    from huggingface_hub import HfApi

    if not (out / "state.pt").exists():
        raise InputError(f"{out} holds no run of train.py to upload")
    if not is_hub_id(name):
        raise InputError(f"{name} is no name on the Hub: use user/name")
    try:
        plot(out)
    except InputError as error:
        warn(f"{error}; the model card goes without a plot")
    write_whole(out / "README.md", lambda path: path.write_text(model_card(out, name)))
    files = ["projector.safetensors", "lora.safetensors", "config.json", "README.md", "log.jsonl", "plot.png"]
    try:
        HfApi().create_repo(name, exist_ok=True)
        url = HfApi().upload_folder(repo_id=name, folder_path=out, allow_patterns=files, commit_message="Tiny Audio checkpoint")
    except Exception as error:
        raise InputError(f"cannot upload to {name} ({first_line(error)}); hf auth login, then python train.py --push {out} {name}") from None
    print(f"uploaded {out} to {url}")


# ------------------------------------------------------------------------------------------------------------- main


def start_from(model, folders):
    """Take over a checkpoint, or the mean of several that were trained from the same one: often better than each of them
    (model soups, Wortsman et al. 2022). The first of them says how it decodes."""
    parts = []
    for folder in folders:
        model.load_trained(folder)
        parts.append({name: tensor.clone() for name, tensor in model.trained().items()})
    if model.lora and len({(Path(folder) / "lora.safetensors").exists() for folder in folders}) > 1:
        raise InputError(f"--init-from {','.join(folders)}: some of them have a low-rank update, and some have not")
    tokens = torch.cat([part.pop("ctc.tokens") for part in parts]).unique()
    model.load_state_dict({name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}, strict=False)
    model.ctc.tokens = tokens
    model.decode = read_config(folders[0])["decode"]


def start_processes():
    """This process's rank and the number of processes, as torchrun sets them."""
    if "RANK" not in os.environ:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The others wait while the first validates.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size()


def checkpoint_layers(decoder, name):
    """Keep only the inputs of the decoder's layers for the backward pass (Chen et al. 2016)."""
    for layer in decoder_layers(decoder, name):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def decoder_layers(decoder, name):
    if not hasattr(decoder.base_model, "layers"):
        raise InputError(f"the layers of {name} are not where --compile and --checkpointing look for them: leave these out")
    return decoder.base_model.layers


def train(args, state):
    rank, ranks = start_processes()
    if args.wandb:
        try:
            import wandb
        except ImportError:
            raise InputError("--wandb needs wandb: pip install wandb") from None
    say = tqdm.write if rank == 0 else lambda *_: None
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32
    out, pool, left_out = Path(args.out), ThreadPoolExecutor(args.workers), Counter()
    out.mkdir(parents=True, exist_ok=True)
    try:
        if rank == 0:  # the lock is gone with the process, however that ends
            fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run is writing to {out}: choose another --out") from None
    except OSError as error:
        warn(f"{out} cannot be locked against a second run ({first_line(error)})")
    if (out / "state.pt").exists() and not state:
        raise InputError(f"{out} holds a run already: continue it with --resume {out}, or choose another --out")
    if state and len(state["ranks"]) != ranks:
        raise InputError(f"{out} was trained by {len(state['ranks'])} processes: resume it with as many")

    clips, stream = open_dataset(args)
    val = read_clips(args.val) if args.val else []
    starts = args.init_from.split(",") if args.init_from else []
    if starts and not args.lora_rank and (Path(starts[0]) / "lora.safetensors").exists():
        warn(f"the low-rank update of the decoder in {args.init_from} is left out: --lora-rank keeps it")
    if starts and not args.hidden:
        args.hidden = read_config(starts[0])["hidden"]
    model = TinyAudio(args.encoder, args.decoder, args.stack, args.hidden, args.lora_rank, device=args.device)
    longest = min(args.max_seconds, model.encoder.max_seconds)
    if stream:  # its first window stands for all of it; from there the validation clips are taken
        _, _, clips = next(stream_windows(stream, args, longest, Counter()))
        clips.sort(key=lambda clip: clip["name"])
    else:
        clips = measure(clips, longest, left_out)
    if not clips:
        raise InputError(f"no usable clip in {args.dataset}: {describe(left_out)}")
    val = measure(val, longest, val_left_out := Counter())
    if args.val and not val:
        raise InputError(f"no usable clip in {args.val}: {describe(val_left_out)}")
    random.Random(args.seed).shuffle(clips)
    random.Random(args.seed).shuffle(val)
    if not val:
        held_out = min(args.val_clips, len(clips) // 10 + 1)
        val, clips = clips[:held_out], clips[held_out:]
    val = val[:args.val_clips]
    if starts and not state:
        start_from(model, starts)
    model.spell_with([clip["text"] for clip in clips])
    torch.manual_seed(args.seed + rank)  # all begin with the same weights, and each drops out others
    model.projector.mask, model.projector.dropout, model.word_dropout = args.mask, args.dropout, args.word_dropout
    if args.ctc_steps:
        model.decode = "ctc"  # until a validation knows better
    model.train()
    # The backward pass of fused attention is slow on a CPU; on a GPU torch takes its flash kernel, as there is no mask.
    model.decoder.set_attn_implementation("eager" if model.device.type == "cpu" else "sdpa")
    if args.checkpointing:
        checkpoint_layers(model.decoder, args.decoder)
    if args.compile:
        for layer in decoder_layers(model.decoder, args.decoder):
            layer.compile(dynamic=True)

    if stream:
        from datasets.distributed import split_dataset_by_node
        kept, about = False, "streamed"
        clips, stream = [], split_dataset_by_node(stream, rank, ranks)
    else:
        clips += no_speech(min(300, round(args.no_speech * len(clips))), args.seed)
        hours = sum(clip["seconds"] for clip in clips) / 3600
        size = hours * 3600 * model.encoder.frame_rate * model.encoder.dim * 2 / 1e9
        kept = size <= args.keep_frames and not (args.speed or args.noise)  # which differ from epoch to epoch
        about = f"{hours:.2f} h in {len(clips)} clips, frames {size:.2f} GB {'kept' if kept else 'not kept'}"
        if kept:
            count = len(clips)
            clips, val = (keep_frames(model, part, args.batch_seconds, pool) for part in (clips, val))
            left_out["broken"] += count - len(clips)
        if not clips or not val:
            raise InputError(f"{len(clips)} clips to train on and {len(val)} to validate on are not enough")

    spelling = [*model.projector.parameters(), *model.ctc.parameters()]
    parameters = [*spelling, *model.lora.parameters()]
    dtype = model.embed.weight.dtype
    peak = matmul_flops(model.device, dtype) * ranks
    say(f"{args.encoder} -> {sum(p.numel() for p in parameters) / 1e6:.2f}M trained -> {args.decoder}, {dtype}, {model.device}"
        f"{f' x {ranks}' if ranks > 1 else ''} at {peak / 1e12:.2f} TFLOP/s; {about}; left out {describe(left_out)}; "
        f"spelling with {len(model.ctc.tokens)} tokens")

    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    step, place = 0, {"number": 0, "position": None, "index": 0}
    if state:
        model.ctc.tokens = state["model"]["ctc.tokens"].to(model.device)
        model.load_state_dict(state["model"], strict=False)
        model.decode = state["decode"]
        optimizer.load_state_dict(state["optimizer"])
        step, mine = state["step"], state["ranks"][rank]
        place = mine["place"]
        torch.set_rng_state(mine["rng"])
        if "cuda_rng" in mine and model.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda_rng"])
    log_file = out / "log.jsonl"
    if rank == 0:
        rows = read_whole_rows(log_file) if state and log_file.exists() else []
        write_whole(log_file, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)))
        if args.wandb:
            wandb.init(project=args.wandb, config=vars(args), dir=out)

    def log(row):
        row = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
        if rank == 0:
            with open(log_file, "a") as file:
                file.write(json.dumps(row) + "\n")
            if args.wandb:
                wandb.log(row, step=row["step"])

    def save():
        """All that --resume needs is in state.pt; the other files are what `TinyAudio.load` reads."""
        mine = {"place": place, "rng": torch.get_rng_state()}
        if model.device.type == "cuda":
            mine["cuda_rng"] = torch.cuda.get_rng_state()
        places = [mine] * ranks
        if ranks > 1:
            dist.all_gather_object(places, mine)
        if rank == 0:
            snapshot = {"args": vars(args), "step": step, "ranks": places, "model": model.trained(), "decode": model.decode,
                        "optimizer": optimizer.state_dict()}
            try:
                write_whole(out / "state.pt", lambda path: torch.save(snapshot, path))
                model.save(out)
            except (OSError, RuntimeError) as error:
                raise InputError(f"cannot write the checkpoint of step {step} to {out} ({first_line(error)}); the last one is still there: "
                                 f"make room, then --resume {out}") from None

    def add_up(values):
        """Sums of some numbers over all processes."""
        if ranks == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=model.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    stop = []

    def on_signal(number, _):
        if stop and time.monotonic() - stop[0][1] > 3:  # a second one ends the run at once; torchrun and Slurm may send the first twice
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.append((number, time.monotonic()))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    if not state:
        save()  # from here on the run can be resumed

    total, bad_steps = args.ctc_steps + args.steps, 0
    windows = (ahead(stream_windows(stream, args, longest, left_out, {clip["name"] for clip in val}, place["number"], place["position"]))
               if stream else ((epoch, None, clips) for epoch in itertools.count(place["number"])))
    steps = ahead(load_steps(make_steps(windows, args, place["index"], rank, ranks), args, longest, pool))
    progress = tqdm(total=total, initial=step, unit="step", disable=rank > 0 or not sys.stderr.isatty())
    sums, since = Counter(), time.perf_counter()  # of the steps since the last log line
    while step < total:
        try:
            number, position, index, batches = next(steps)  # the next step's data is prefetched while this one runs
        except InputError:  # a stream broke off
            if ranks == 1:
                save()
            raise

        # Each phase has a schedule of its own: linear warm-up, then a cosine down to a twentieth.
        phase, peak_lr, done, length = ((1, args.ctc_lr, step, args.ctc_steps) if step < args.ctc_steps else
                                        (2, args.lr, step - args.ctc_steps, args.steps))
        warmup = min(args.warmup, length // 2)
        lr = peak_lr * ((done + 1) / warmup if done < warmup else
                        0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (length - warmup))))
        for group in optimizer.param_groups:
            group["lr"] = lr
        weights = (1, 0) if phase == 1 else (args.ctc_weight if args.ctc_steps or args.init_from else 0, 1)

        # One loss over the whole step: the sum over its tokens, divided once by their number.
        for clip in (clip for _, good in batches for clip in good):
            clip.setdefault("answer", model.tokenize(clip["text"]))
        tokens, stopping = add_up([sum(len(clip["answer"]) + 1 for _, good in batches for clip in good), len(stop)])
        heard = []
        for inputs, good in batches:
            if not good:
                continue
            frames, lengths = encode(model, inputs)
            answers = [clip["answer"] for clip in good]
            heard.append((frames, lengths, good))
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                loss, parts = model.loss(frames, lengths, answers, *weights)
            (loss / max(1, tokens)).backward()
            sums.update({name: part.item() for name, part in parts.items()})
            sums.update(frames=lengths.sum().item(), padded_frames=frames.shape[0] * frames.shape[1],
                        flops=model_flops(model, lengths.tolist(), answers, *weights, kept))
        for p in (parameters if phase == 2 else spelling) if ranks > 1 else ():  # also where a process had no clip
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
        bad_steps = 0 if math.isfinite(norm) else bad_steps + 1
        if bad_steps:
            names = find_offenders(model, heard, weights)
            message = f"loss or gradient of step {step} is not finite; clips: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"
            if bad_steps == 2:
                raise InputError(f"{message}; nor was that of the step before: lower --lr and --ctc-lr, or leave these clips out; "
                                 f"{out} keeps the last checkpoint")
            warn(f"{message}; skipped")
            sums.clear()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums.update(tokens=tokens / ranks if not bad_steps else 0, steps=1)
        step, place = step + 1, {"number": number, "position": position, "index": index + 1}
        progress.update()

        ends_phase = step in (args.ctc_steps, total)
        if step % args.log_every == 0 or ends_phase or stopping:
            elapsed = time.perf_counter() - since
            names = ("ctc", "lm", "tokens", "frames", "padded_frames", "flops")
            all_sums = dict(zip(names, add_up([sums[name] for name in names])))
            row = {"step": step, "phase": phase, "epoch": number, "loss": all_sums["lm" if phase == 2 else "ctc"] / max(1, all_sums["tokens"]),
                   "ctc": all_sums["ctc"] / max(1, all_sums["tokens"]), "lr": lr, "norm": norm,
                   "audio_s_per_s": all_sums["frames"] / model.encoder.frame_rate / elapsed, "mfu": all_sums["flops"] / elapsed / peak,
                   "padding": 1 - all_sums["frames"] / max(1, all_sums["padded_frames"]), "memory_gb": peak_memory(model.device),
                   "seconds": elapsed}
            log(row)
            say("step {step}/{total} phase {phase} epoch {epoch} loss {loss:.3f} ctc {ctc:.3f} lr {lr:.1e} norm {norm:.2f} "
                "{audio_s_per_s:.0f}x real time mfu {mfu:.0%} padding {padding:.0%} memory {memory_gb:.1f} GB phase left {left:.1f} min".format(
                    **row, total=total, left=(length - done - 1) * elapsed / sums["steps"] / 60))
            sums, since = Counter(), time.perf_counter()
        if step % args.eval_every == 0 or ends_phase or stopping:
            if not stopping and rank == 0:
                with torch.compiler.set_stance("force_eager"):  # generation is of other shapes
                    wers, (reference, hypothesis) = validate(model, val, args.batch_seconds, ("ctc",) if phase == 1 else DECODINGS, pool)
                model.decode = min(wers, key=wers.get)
                log({"step": step, "phase": phase, "wer": wers})
                say(f"step {step}/{total} WER " + ", ".join(f"{100 * wer:.1f} % {name}" for name, wer in wers.items())
                    + f" ({len(val)} clips)\n    ref: {reference}\n    hyp: {hypothesis}")
            save()
            since = time.perf_counter()
        if stopping:
            say(f"stopped by a signal after step {step}; python train.py --resume {out} goes on")
            sys.exit(128 + (stop[0][0] if stop else signal.SIGTERM))
    left_out["broken"] += sum("broken" in clip for clip in clips)
    say(f"done: {out} holds the checkpoint; python sample.py --model {out} file.wav; left out {describe(left_out)}")
    if args.push_to_hub and rank == 0:
        push(out, args.push_to_hub)


def describe(left_out):
    """Counter of reasons, of which None is none -> what a reader wants to know."""
    counts = [f"{count} clips {reason}" for reason, count in left_out.items() if reason and count]
    return ", ".join(counts) or "no clip"


def main():
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is written
    args, state = parse_args()
    if args.plan is not None:
        return plan(args)
    if args.plot:
        return plot(Path(args.plot))
    if args.push:
        return push(Path(args.push[0]), args.push[1])
    train(args, state)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("train.py: out of memory: lower --batch-seconds (and raise --accumulate), or use --checkpointing; --resume goes on from "
                 "the last checkpoint")
    except KeyboardInterrupt:  # once training has begun, Ctrl-C saves and stops
        sys.exit("train.py: interrupted before the first step")
