"""Train the bridge between a frozen audio encoder and a frozen language model.

    python train.py --dataset assets/quickstart/train.jsonl --val assets/quickstart/test.jsonl --out out/quickstart
    python train.py --encoder hubert --decoder qwen3-8b --dataset "data/*.parquet" --out out/mine
    python train.py --resume out/mine

Phase 1 (--ctc-steps) teaches the projector to spell in the decoder's own embeddings, by CTC; the decoder is not run.
Phase 2 (--steps) is cross-entropy through the frozen decoder, with a little of the CTC loss kept.
Ctrl-C or SIGTERM saves and stops; what is in --out can be used at any time.
"""

import argparse
import io
import json
import math
import random
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from eval import corpus_wer
from tinyaudio import (SAMPLE_RATE, InputError, TinyAudio, first_line, load_audio, make_batches, read_clips, read_whole_rows,
                       write_whole)


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--encoder", default="whisper-base", help="hubert, whisper, whisper-base, a hub id or a folder")
    add("--decoder", default="smollm2-135m", help="qwen3-8b, smollm3-3b, smollm2-135m, a hub id or a folder ...")
    add("--dataset", help=".jsonl, .csv, .tsv, .parquet files (globs, commas between) or a folder")
    add("--val", help="the same, to watch the WER on; by default 50 clips of --dataset are held out")
    add("--out", default="out", help="folder of the checkpoint and log.jsonl")
    add("--resume", metavar="OUT", help="go on with an interrupted run, exactly; takes no other flag")
    add("--init-from", metavar="CKPT", help="start from a trained checkpoint instead of from nothing")
    add("--stack", type=positive, default=5, help="encoder frames per projector frame")
    add("--hidden", type=int, help="hidden width of the projector (by default about 13M parameters)")
    add("--lora", type=int, default=0, metavar="RANK", help="train a low-rank update of the decoder too, in phase 2 (0: none)")
    add("--ctc-steps", type=int, default=2000, help="steps of phase 1")
    add("--steps", type=int, default=2000, help="steps of phase 2")
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
    add("--speed", type=float, default=0, metavar="SHARE", help="play each clip up to so much faster or slower, e.g. 0.1")
    add("--noise", type=float, default=0, metavar="SHARE", help="add noise to so many of the clips, e.g. 0.3")
    add("--speech-free", type=float, default=0.03, help="share of clips of noise and tones, without text, that are added")
    add("--compile", action="store_true", help="compile the decoder's layers (slow to start, then faster)")
    add("--keep-frames", type=float, default=4, metavar="GB",
        help="encode the data once and keep the frames in memory if they take at most this much")
    add("--log-every", type=positive, default=20, help="steps between log lines")
    add("--eval-every", type=positive, default=500, help="steps between validations, each of which saves a checkpoint")
    add("--val-clips", type=positive, default=50, help="clips to validate on")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.resume:
        if any(value != parser.get_default(name) for name, value in vars(args).items() if name != "resume"):
            parser.error("--resume takes no other flag: the run goes on as it was started")
        try:
            state = torch.load(Path(args.resume) / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"{args.resume} has no run to resume ({first_line(error)})") from None
        return argparse.Namespace(**{**state["args"], "out": args.resume}), state
    if not args.dataset:
        parser.error("--dataset is needed")
    if (Path(args.out) / "state.pt").exists():
        raise InputError(f"{args.out} holds a run already: continue it with --resume {args.out}, or choose another --out")
    return args, None


# ------------------------------------------------------------------------------------------------------------- data


def measure(clips, max_seconds):
    """Add `seconds` to each clip from its header. Returns the usable ones; says how many were left out and why."""
    usable, broken, empty, long = [], [], 0, 0
    for clip in clips:
        try:
            source = io.BytesIO(clip["audio"]) if isinstance(clip["audio"], bytes) else clip["audio"]
            clip["seconds"] = soundfile.info(source).duration
        except (soundfile.SoundFileError, OSError, TypeError):
            broken.append(clip["name"])
            continue
        if clip["seconds"] > max_seconds:
            long += 1
        elif not clip["text"] or clip["seconds"] < 0.1:
            empty += 1
        else:
            usable.append(clip)
    if broken:
        warn(f"left out {len(broken)} clips that are not readable audio, the first is {broken[0]}")
    if long or empty:
        warn(f"left out {long} clips over {max_seconds:g} s and {empty} without text or under 0.1 s")
    if not usable:
        raise InputError("no usable clip in the dataset")
    return usable


def warn(message):
    tqdm.write(f"train.py: {message}", file=sys.stderr)


def load_waves(clips):
    """The waves of those clips that can be decoded, and the clips; a broken one is left out with one warning."""
    waves, good = [], []
    for clip in clips:
        try:
            waves.append(load_audio(clip["audio"]))
            if len(waves[-1]) / SAMPLE_RATE > clip["seconds"] + 0.1:
                raise InputError(f"{len(waves.pop()) / SAMPLE_RATE:.1f} s long, more than its header says")
            good.append(clip)
        except InputError as error:
            if not clip.get("broken"):
                warn(f"left out {clip['name']}: {error}")
            clip["broken"] = True
    return waves, good


def coloured_noise(size, rng):
    """Noise (size,) from white to brown, of RMS 1."""
    frequencies = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    spectrum = rng.standard_normal((2, len(frequencies))) / np.maximum(frequencies, 20) ** rng.choice([0, 0.5, 1])
    noise = np.fft.irfft(spectrum[0] + 1j * spectrum[1], size)
    return noise / noise.std()


def augment(wave, rng, speed, noise, max_seconds):
    """A clip as it might have been said and recorded too: faster or slower by up to a share of `speed` (Ko et al. 2015), and with
    noise, 5 to 30 dB below it, for a share of `noise` of all clips."""
    if speed:
        factor = max(rng.uniform(1 - speed, 1 + speed), len(wave) / SAMPLE_RATE / max_seconds + 1e-3)
        wave = soxr.resample(wave, SAMPLE_RATE * factor, SAMPLE_RATE)
    if rng.random() < noise:
        loudness = np.sqrt(np.square(wave).mean())
        wave = wave + coloured_noise(len(wave), rng).astype(np.float32) * loudness * 10 ** (-rng.uniform(5, 30) / 20)
    return wave


def speech_free(count, seed):
    """`count` clips of 1 to 12 s without speech and without text: noise from white to brown, hum, tones and chords, from
    loud to hardly audible, of which the model learns to stay silent."""
    rng, clips = np.random.default_rng(seed), []
    for number in range(count):
        size = int(rng.uniform(1, 12) * SAMPLE_RATE)
        tones = sum(np.sin(2 * np.pi * pitch * np.arange(size) / SAMPLE_RATE) for pitch in rng.uniform(50, 2000, rng.integers(1, 5)))
        wave = coloured_noise(size, rng) * rng.choice([0, 0.1, 1], p=[0.1, 0.3, 0.6]) + tones * rng.choice([0, 1])
        wave = (wave / max(1e-9, np.abs(wave).max()) * 10 ** rng.uniform(-3, 0)).astype(np.float32)
        clips.append({"name": f"speech-free {number}", "audio": wave, "text": "", "seconds": size / SAMPLE_RATE})
    return clips


def keep_frames(model, clips, batch_seconds):
    """Encode all clips once; sets clip["frames"], (T, D) in bfloat16, in memory. Returns those that could be decoded."""
    with tqdm(total=len(clips), unit="clip", desc="encoding, once", file=sys.stderr) as progress:
        for batch in make_batches([clip["seconds"] for clip in clips], batch_seconds):
            waves, good = load_waves([clips[i] for i in batch])
            for clip, frames, length in zip(good, *(model.encoder(waves) if good else ((), ()))):
                clip["frames"] = frames[:length].to("cpu", torch.bfloat16, copy=True)
            progress.update(len(batch))
    return [clip for clip in clips if "frames" in clip]


def make_steps(clips, args, epoch, index):
    """The endless plan of the run from a position on: (epoch, index, batches of clips), one item per optimizer step.
    Each epoch's order follows from the seed and its number alone, which is what makes --resume exact."""
    while True:
        rng = np.random.default_rng([args.seed, epoch])
        batches = make_batches([clip["seconds"] for clip in clips], args.batch_seconds, rng)
        steps = [batches[i:i + args.accumulate] for i in range(0, len(batches), args.accumulate)]
        for index in range(index, len(steps)):
            yield epoch, index, [[clips[i] for i in batch] for batch in steps[index]]
        epoch, index = epoch + 1, 0


def collate(batch, rng=None, args=None, longest=30):
    """Clips -> (frames (B, T, D), lengths (B,)) if they are kept, else waves; and the clips that could be read. Runs in a
    thread of its own while the step before is computed."""
    if "frames" in batch[0]:
        frames = [clip["frames"] for clip in batch]
        return (pad_sequence(frames, batch_first=True), torch.tensor([len(clip) for clip in frames])), batch
    waves, good = load_waves(batch)
    if rng and (args.speed or args.noise):
        waves = [augment(wave, rng, args.speed, args.noise, longest) for wave in waves]
    return waves, good


def encode(model, inputs):
    """What `collate` made of a batch -> frames (B, T, D), lengths (B,) on the model's device."""
    if isinstance(inputs, list):
        return model.encoder(inputs)
    return tuple(tensor.to(model.device) for tensor in inputs)


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


@torch.no_grad()
def validate(model, clips, batch_seconds, decodings):
    """WER of the clips by each way of decoding; and a transcript to look at, by the last of them."""
    model.eval()
    texts = {decode: {} for decode in decodings}
    for batch in make_batches([clip["seconds"] for clip in clips], batch_seconds):
        inputs, good = collate([clips[i] for i in batch])
        if good:
            audio, counts = model.projector(*encode(model, inputs))
            for decode, found in texts.items():
                found |= zip((clip["name"] for clip in good), map(model.detokenize, model.hear(audio, counts, decode)))
    model.train()
    wers = {decode: corpus_wer([clip["text"] for clip in clips], [found.get(clip["name"], "") for clip in clips])
            for decode, found in texts.items()}
    return wers, (clips[0]["text"], texts[decodings[-1]].get(clips[0]["name"], ""))


# ------------------------------------------------------------------------------------------------------------- main


def main():
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is written
    args, state = parse_args()
    torch.manual_seed(args.seed)
    out = Path(args.out)

    clips, val = read_clips(args.dataset), read_clips(args.val) if args.val else []
    model = TinyAudio(args.encoder, args.decoder, args.stack, args.hidden, args.lora, device=args.device)
    longest = min(args.max_seconds, model.encoder.max_seconds)
    clips, val = measure(clips, longest), measure(val, longest) if val else []
    random.Random(args.seed).shuffle(clips)
    random.Random(args.seed).shuffle(val)
    if not val:
        held_out = min(args.val_clips, len(clips) // 10 + 1)
        val, clips = clips[:held_out], clips[held_out:]
    val, measured = val[:args.val_clips], clips
    if args.init_from and not state:
        model.load_trained(args.init_from)
    model.spell_with([clip["text"] for clip in clips])
    model.projector.mask, model.projector.dropout = args.mask, args.dropout
    model.decode = "ctc" if args.ctc_steps else "greedy"  # until a validation knows better
    model.train()
    if model.device.type == "cpu":
        model.decoder.set_attn_implementation("eager")  # the backward pass of fused attention is slow there
    if args.compile:
        if not hasattr(model.decoder.base_model, "layers"):
            raise InputError(f"--compile does not know the layers of {args.decoder}: leave it out")
        for layer in model.decoder.base_model.layers:
            layer.compile(dynamic=True)

    clips += speech_free(min(300, round(args.speech_free * len(clips))), args.seed)
    hours = sum(clip["seconds"] for clip in clips) / 3600
    size = hours * 3600 * model.encoder.frame_rate * model.encoder.dim * 2 / 1e9
    kept = size <= args.keep_frames and not (args.speed or args.noise)  # which differ from epoch to epoch
    if kept:
        clips, val = (keep_frames(model, part, args.batch_seconds) for part in (clips, val))
    if not clips or not val:
        raise InputError(f"{len(clips)} clips to train on and {len(val)} to validate on are not enough")
    for clip in clips:
        clip["answer"] = model.tokenize(clip["text"])

    parameters = [p for p in model.parameters() if p.requires_grad]
    dtype = model.embed.weight.dtype
    peak = matmul_flops(model.device, dtype)
    print(f"{args.encoder} -> {sum(p.numel() for p in parameters) / 1e6:.2f}M trained -> {args.decoder}, {dtype}, {model.device} "
          f"at {peak / 1e12:.2f} TFLOP/s; {hours:.2f} h in {len(clips)} clips, frames {size:.2f} GB {'kept' if kept else 'not kept'}; "
          f"spelling with {len(model.ctc.tokens)} tokens")

    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    step, epoch, index = 0, 0, 0
    if state:
        model.ctc.tokens = state["model"]["ctc.tokens"].to(model.device)
        model.load_state_dict(state["model"], strict=False)
        model.decode = state["decode"]
        optimizer.load_state_dict(state["optimizer"])
        step, epoch, index = state["step"], state["epoch"], state["index"]
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and model.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])
    out.mkdir(parents=True, exist_ok=True)
    log_file = out / "log.jsonl"
    rows = read_whole_rows(log_file) if state and log_file.exists() else []
    write_whole(log_file, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)))

    def log(row):
        with open(log_file, "a") as file:
            file.write(json.dumps({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}) + "\n")

    def save():
        """All that --resume needs is in state.pt; the other files are what `TinyAudio.load` reads."""
        snapshot = {"args": vars(args), "step": step, "epoch": epoch, "index": index, "model": model.trained(), "decode": model.decode,
                    "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        if model.device.type == "cuda":
            snapshot["cuda_rng"] = torch.cuda.get_rng_state()
        write_whole(out / "state.pt", lambda path: torch.save(snapshot, path))
        model.save(out)

    stop = []

    def on_signal(number, _):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the run at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    total = args.ctc_steps + args.steps
    plan = make_steps(clips, args, epoch, index)
    loader = ThreadPoolExecutor(1)

    def prefetch():
        epoch, index, batches = next(plan)
        return epoch, index, [collate(batch, np.random.default_rng([args.seed, epoch, index]), args, longest) for batch in batches]

    future = loader.submit(prefetch)
    progress = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty())
    sums, since = Counter(), time.perf_counter()  # of the steps since the last log line
    while step < total:
        epoch, index, batches = future.result()
        future = loader.submit(prefetch)  # the next step's data, while this one runs

        # Each phase has a schedule of its own: linear warm-up, then a cosine down to a twentieth.
        phase, peak_lr, position, length = ((1, args.ctc_lr, step, args.ctc_steps) if step < args.ctc_steps else
                                            (2, args.lr, step - args.ctc_steps, args.steps))
        warmup = min(args.warmup, length // 2)
        lr = peak_lr * ((position + 1) / warmup if position < warmup else
                        0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (position - warmup) / (length - warmup))))
        for group in optimizer.param_groups:
            group["lr"] = lr
        ctc_weight, lm_weight = (1, 0) if phase == 1 else (args.ctc_weight if args.ctc_steps or args.init_from else 0, 1)

        # One loss over the whole step: the sum over its tokens, divided once by their number.
        tokens = max(1, sum(len(clip["answer"]) + 1 for _, good in batches for clip in good))
        for inputs, good in batches:
            if not good:
                continue
            frames, lengths = encode(model, inputs)
            answers = [clip["answer"] for clip in good]
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                loss, parts = model.loss(frames, lengths, answers, ctc_weight, lm_weight)
            (loss / tokens).backward()
            sums.update({name: part.item() for name, part in parts.items()})
            sums.update(frames=lengths.sum().item(), padded_frames=frames.shape[0] * frames.shape[1],
                        flops=model_flops(model, lengths.tolist(), answers, ctc_weight, lm_weight, kept))
        sums.update(tokens=tokens, steps=1)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
        if not math.isfinite(norm):
            raise InputError(f"the gradient is not finite at step {step}: lower --lr; {out} keeps the last checkpoint")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, index = step + 1, index + 1
        progress.update()

        ends_phase = step in (args.ctc_steps, total)
        if step % args.log_every == 0 or ends_phase or stop:
            elapsed = time.perf_counter() - since
            row = {"step": step, "phase": phase, "epoch": epoch, "loss": sums["lm" if phase == 2 else "ctc"] / sums["tokens"],
                   "ctc": sums["ctc"] / sums["tokens"], "lr": lr, "norm": norm,
                   "audio_s_per_s": sums["frames"] / model.encoder.frame_rate / elapsed, "mfu": sums["flops"] / elapsed / peak,
                   "padding": 1 - sums["frames"] / max(1, sums["padded_frames"]), "seconds": elapsed}
            log(row)
            tqdm.write("step {step}/{total} phase {phase} epoch {epoch} loss {loss:.3f} ctc {ctc:.3f} lr {lr:.1e} norm {norm:.2f} "
                       "{audio_s_per_s:.0f}x real time mfu {mfu:.0%} padding {padding:.0%} phase left {left:.1f} min".format(
                           **row, total=total, left=(length - position - 1) * elapsed / sums["steps"] / 60))
            sums, since = Counter(), time.perf_counter()
        if step % args.eval_every == 0 or ends_phase or stop:
            if not stop:
                with torch.compiler.set_stance("force_eager"):  # generation is of other shapes
                    decodings = ("ctc",) if phase == 1 else ("ctc", "greedy") if step < total else ("ctc", "greedy", "joint")
                    wers, (reference, hypothesis) = validate(model, val, args.batch_seconds, decodings)
                model.decode = min(wers, key=wers.get)
                log({"step": step, "phase": phase, "wer": wers})
                tqdm.write(f"step {step}/{total} WER " + ", ".join(f"{100 * wer:.1f} % {name}" for name, wer in wers.items())
                           + f" ({len(val)} clips)\n    ref: {reference}\n    hyp: {hypothesis}")
            save()
            since = time.perf_counter()
        if stop:
            print(f"stopped by signal {stop[0]} after step {step}; python train.py --resume {out} goes on")
            sys.exit(128 + stop[0])
    broken = sum("broken" in clip for clip in measured)
    print(f"done: {out} holds the checkpoint; python sample.py --model {out} file.wav" + (f"; {broken} broken clips left out" if broken else ""))


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("train.py: out of memory: lower --batch-seconds (and raise --accumulate); --resume goes on from the last checkpoint")
    except KeyboardInterrupt:  # once training has begun, Ctrl-C saves and stops
        sys.exit("train.py: interrupted before the first step")
