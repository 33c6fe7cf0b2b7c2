"""Train the bridge between a frozen audio encoder and a frozen language model.

    python train.py --encoder hubert --decoder qwen3-8b        LoquaciousSet, streamed
    python train.py --dataset mine.jsonl --out out/mine        the embedded pair on your own files
    python train.py --init-from assets/default --dataset mine.jsonl --out out/mine
    python train.py --resume out/mine
    torchrun --nproc_per_node=4 train.py --encoder hubert --decoder qwen3-8b

Phase 1 (--ctc-steps): the projector learns to spell by CTC; the decoder is not run.
Phase 2 (--steps): cross-entropy through the frozen decoder, plus a little CTC.
Ctrl-C or SIGTERM saves and stops. What is in --out can be used at any time.
"""
import argparse
import datetime
import functools
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from bench import matmul_flops, model_flops, peak_memory
from data import (SAMPLE_RATE, InputError, augment, finished_rows, first_line, is_hub_id,
                  load_audio, make_batches, no_speech, open_stream, read_clips, stream_clips,
                  write_file)
from eval import corpus_wer
from tinyaudio import DECODINGS, TinyAudio

TRAINING_SETS = {  # name -> hub id, config, split
    "loquacious": ("speechbrain/LoquaciousSet", "medium", "train"),
    "librispeech": ("openslr/librispeech_asr", "clean", "train.360"),
}
MAX_SECONDS = 30  # longer clips are left out
NO_SPEECH = 0.03  # fraction of clips that are added: noise and tones, with an empty text
WINDOW = 1000  # clips of a stream that are shuffled and batched together
MODEL = ("encoder", "decoder", "stack", "hidden", "lora")  # flags of the model

@functools.cache
def warn(message):
    """Print each message only once."""
    print(f"train.py: {message}", file=sys.stderr)

def parse_args(argv):
    """The flags, and the saved state if there is --resume."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--encoder", help="hubert, whisper, whisper-base (default), a hub id or a folder")
    add("--decoder", help="qwen3-8b, smollm3-3b, smollm2-135m (default), a hub id or a folder")
    add("--stack", type=int, help="encoder frames per projector frame (default 5)")
    add("--hidden", type=int, help="width of the projector (default: 13M parameters)")
    add("--lora-rank", type=int, dest="lora", help="train a LoRA of the decoder too")
    add("--init-from", metavar="CKPT", help="start from a trained checkpoint")
    add("--dataset", default="loquacious", help="loquacious, librispeech, a hub id, or files")
    add("--config", help="of a Hub dataset")
    add("--split", help="of a Hub dataset")
    add("--val", help="files to validate on (default: part of --dataset)")
    add("--val-clips", type=int, default=50, help="clips to validate on")
    add("--out", default="out", help="folder of the checkpoint, log.jsonl and plot.png")
    add("--resume", metavar="OUT", help="continue a run; no other flag")
    add("--ctc-steps", type=int, default=4000, help="steps of phase 1")
    add("--steps", type=int, default=60000, help="steps of phase 2")
    add("--batch-seconds", type=float, default=120, help="audio per batch, with padding")
    add("--accumulate", type=int, default=1, help="batches per step")
    add("--lr", type=float, default=1e-3, help="peak learning rate; phase 1: times 4")
    add("--ctc-weight", type=float, default=0.1, help="weight of the CTC loss in phase 2")
    add("--mask", type=float, default=0.15, help="fraction of stacked frames masked")
    add("--dropout", type=float, default=0.15, help="in the projector")
    add("--word-dropout", type=float, default=0, help="fraction of answer tokens hidden")
    add("--augment", type=float, default=0, help="fraction of clips with other speed, noise")
    add("--compile", action="store_true", help="compile the decoder")
    add("--checkpointing", action="store_true", help="less memory, a third slower")
    add("--keep-frames", type=float, default=4, metavar="GB", help="encode files only once")
    add("--log-every", type=int, default=20, help="steps between log lines")
    add("--eval-every", type=int, default=500, help="steps between validations")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    add("--device", help="cuda, mps or cpu (default: the best one)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not args.resume:
        return args, None
    if args != parser.parse_args(["--resume", args.resume]):
        parser.error("--resume takes no other flag: the run goes on as it was started")
    try:
        state = torch.load(Path(args.resume, "state.pt"), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise InputError(f"{args.resume} has no run to resume: {first_line(error)}") from None
    return argparse.Namespace(**{**state["args"], "out": args.resume}), state

def usable(clips, left_out):
    """The clips to train on, with their `seconds`. Counts the others in left_out, by reason."""
    good = []
    for clip in clips:
        audio = clip["audio"]
        try:
            audio = io.BytesIO(audio) if isinstance(audio, bytes) else audio
            clip["seconds"] = soundfile.info(audio).duration
        except (soundfile.SoundFileError, OSError, TypeError):
            clip["seconds"] = 0
        if not 0.1 <= clip["seconds"] <= MAX_SECONDS:
            left_out[f"unreadable or not 0.1 to {MAX_SECONDS} s long"] += 1
        elif not clip["text"]:
            left_out["without text"] += 1
        else:
            good.append(clip)
    return good

def stream_windows(rows, args, left_out, held_out=(), number=0, position=None):
    """Endless windows of a stream: its number, the position before it, its usable clips."""
    if position:
        rows.load_state_dict(position)
    iterator = iter(rows)
    for number in itertools.count(number):
        position = rows.state_dict()
        clips = stream_clips(itertools.islice(iterator, WINDOW), args.dataset)
        clips = usable([clip for clip in clips if clip["name"] not in held_out], left_out)
        if not clips:
            raise InputError(f"{args.dataset}: no clip of {WINDOW} in a row is usable")
        yield number, position, clips

def read_wave(clip):
    """Samples of a clip; None, with a warning, if it is broken."""
    try:
        wave = load_audio(clip["audio"])
        if len(wave) > SAMPLE_RATE * (clip["seconds"] + 0.1):
            raise InputError(f"{clip['name']}: longer than its header says")
        return wave
    except InputError as error:
        warn(f"left out {error}")

def batches_of(clips, args, rng=None):
    """Lists of clips of similar length; rng shuffles them."""
    batches = make_batches([clip["seconds"] for clip in clips], args.batch_seconds, rng)
    return [[clips[i] for i in batch] for batch in batches]

def load_batches(model, batches, pool, share=0, rng=np.random):
    """Of each batch: frames (B, T, D), lengths (B,) and the clips, without broken ones."""
    for clips in batches:
        if "frames" in clips[0]:
            lengths = torch.tensor([len(clip["frames"]) for clip in clips], device=model.device)
            frames = pad_sequence([clip["frames"] for clip in clips], batch_first=True)
            yield frames.to(model.device), lengths, clips
            continue
        waves = list(pool.map(read_wave, clips))
        clips = [clip for clip, wave in zip(clips, waves) if wave is not None]
        waves = [augment(x, rng, share, MAX_SECONDS) for x in waves if x is not None]
        if clips:
            yield *model.encoder(waves), clips

def keep_frames(model, clips, args, pool):
    """Encode clips once: clip["frames"] (T, D) in bfloat16. Returns those that can be read."""
    batches = tqdm(batches_of(clips, args), "encoding, once", disable=None)
    for frames, lengths, good in load_batches(model, batches, pool):
        for clip, x, length in zip(good, frames, lengths):
            clip["frames"] = x[:length].to("cpu", torch.bfloat16, copy=True)
    return [clip for clip in clips if "frames" in clip]

def make_steps(windows, model, args, start, rank, world, pool):
    """Endless optimizer steps: the place after each, and its batches. A place is the number of the
    window, the stream's position before it, and the index of the next step in it. The order of
    batches depends only on the seed and that number, so --resume is exact."""
    size = args.accumulate * world
    for number, position, clips in windows:
        if position:  # of a stream
            clips = clips + no_speech(round(NO_SPEECH * len(clips)), [args.seed, number])
        batches = batches_of(clips, args, np.random.default_rng([args.seed, number]))
        for index in range(start, math.ceil(len(batches) / size)):
            rng = np.random.default_rng([args.seed, number, index, rank])
            mine = batches[index * size:(index + 1) * size][rank::world]
            loaded = list(load_batches(model, mine, pool, args.augment, rng))
            yield {"number": number, "position": position, "index": index + 1}, loaded
        start = 0

def prefetch(items):
    """Items of an endless generator. A thread makes the next one in advance."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items)
        while True:
            item, future = future.result(), pool.submit(next, items)
            yield item

def load_data(args, model, rank, world, place, pool):
    """Endless steps that begin at a place, clips to validate on, and a line about both."""
    left_out, stream = Counter(), None
    if args.dataset in TRAINING_SETS or is_hub_id(args.dataset):
        hub_id, config, split = TRAINING_SETS.get(args.dataset, (args.dataset, None, "train"))
        stream = open_stream(hub_id, args.config or config, args.split or split)
        stream = stream.shuffle(args.seed, buffer_size=1).repeat(None)  # of files, not of clips
        clips = next(stream_windows(stream, args, Counter()))[2]  # to choose --val from
    elif args.config or args.split:
        raise InputError("--config and --split are for sets of the Hub")
    else:
        clips = usable(read_clips(args.dataset), left_out)
    val = usable(read_clips(args.val), left_out) if args.val else clips[:]
    np.random.default_rng(args.seed).shuffle(val)
    val = val[:min(args.val_clips, len(val) if args.val else len(val) // 10 + 1)]
    held_out = {clip["name"] for clip in val}
    clips = [clip for clip in clips if clip["name"] not in held_out]
    if not clips or not val:
        raise InputError(f"{len(clips)} clips of {args.dataset} to train on and {len(val)} of "
                         f"{args.val or 'them'} to validate on; left out: {dict(left_out)}")
    if stream:
        from datasets.distributed import split_dataset_by_node
        stream = split_dataset_by_node(stream, rank, world)
        rank, world = 0, 1  # each process has its own stream and shares no batch
        number, position = place["number"], place["position"]
        windows = prefetch(stream_windows(stream, args, left_out, held_out, number, position))
        # The texts are not known yet: the CTC head gets every token that is made of letters.
        tokens = map(model.tokenizer.decode, range(len(model.tokenizer)))
        model.set_ctc_tokens([x for x in tokens if x.isascii() and x.strip().isalpha()])
        about = "streamed"
    else:
        model.set_ctc_tokens([clip["text"] for clip in clips])
        clips += no_speech(min(300, round(NO_SPEECH * len(clips))), args.seed)
        seconds = sum(clip["seconds"] for clip in clips)
        about = f"{seconds / 3600:.2f} h in {len(clips)} clips"
        size = seconds * model.encoder.frame_rate * model.encoder.dim * 2 / 1e9
        if size <= args.keep_frames and not args.augment:
            clips = keep_frames(model, clips, args, pool)
            val = keep_frames(model, val, args, pool)
            about += f", {size:.2f} GB of frames kept"
        windows = ((epoch, None, clips) for epoch in itertools.count(place["number"]))
    steps = make_steps(windows, model, args, place["index"], rank, world, pool)
    return prefetch(steps), val, f"{about}; left out: {dict(left_out) or 'nothing'}"

def build_model(args, state):
    """The model of --resume, of --init-from (flags may not contradict it), or a new one."""
    asked = {key: getattr(args, key) for key in MODEL if getattr(args, key) is not None}
    if state:
        model = TinyAudio(**state["config"], device=args.device)
        model.load_trained(state["model"], args.out)
    elif args.init_from:
        model = TinyAudio.from_pretrained(args.init_from, args.device, merge=False)
        for key, value in asked.items():
            if value != model.config[key]:
                raise InputError(f"{args.init_from} has {key} {model.config[key]}, not {value}")
    else:
        decode = "ctc" if args.ctc_steps else "greedy"
        names = {"encoder": "whisper-base", "decoder": "smollm2-135m"}
        model = TinyAudio(**{**names, **asked}, decode=decode, device=args.device)
    model.projector.mask, model.projector.dropout = args.mask, args.dropout
    model.word_dropout = args.word_dropout
    if model.device.type == "cpu":  # the backward pass of fused attention is slow there
        model.decoder.set_attn_implementation("eager")
    for layer in model.decoder.base_model.layers:
        if args.checkpointing:  # keep only the inputs of layers (Chen et al. 2016)
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        if args.compile:
            layer.compile(dynamic=True)
    return model.train()

@torch.no_grad()
def validate(model, clips, args, decodings, pool):
    """WER by each way of decoding, and the text of the first clip by the last way."""
    model.eval()
    for frames, lengths, good in load_batches(model, batches_of(clips, args), pool):
        audio, counts = model.projector(frames, lengths)
        for decode in decodings:
            for clip, answer in zip(good, model.decode(audio, counts, decode)):
                clip[decode] = model.detokenize(answer)
    model.train()
    wers, references = {}, [clip["text"] for clip in clips]
    for decode in decodings:
        wers[decode] = corpus_wer(references, [clip.get(decode, "") for clip in clips])
    return wers, clips[0].get(decodings[-1], "")

def plot(out, rows):
    """Draw loss and WER into plot.png, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    left.plot(*zip(*losses))
    left.set(title="loss per token: CTC, then cross-entropy", xlabel="step", ylim=(0, None))
    for decode in rows[-1]["wer"]:
        wers = [(row["step"], row["wer"][decode]) for row in rows if decode in row.get("wer", ())]
        right.plot(*zip(*wers), ".-", label=decode)
    right.set(title="WER of the validation clips", xlabel="step", ylim=(0, None))
    right.legend()
    figure.savefig(out / "plot.png", dpi=80)

def all_sum(sums, device):
    """Each value of a dict, summed over all processes."""
    if not dist.is_initialized():
        return sums
    values = [float(value) for value in sums.values()]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(sums, total.tolist()))

def save(args, model, optimizer, step, place, rows):
    """Write state.pt for --resume, and what `TinyAudio.from_pretrained` reads."""
    places = [place]
    if dist.is_initialized():
        places = [None] * dist.get_world_size()
        dist.all_gather_object(places, place)
        if dist.get_rank() > 0:
            return
    file = io.BytesIO()
    torch.save({"args": vars(args), "step": step, "places": places, "config": model.config,
                "model": model.trained(), "optimizer": optimizer.state_dict()}, file)
    wers = [row["wer"] for row in rows if "wer" in row][-1:]
    try:
        write_file(Path(args.out, "state.pt"), file.getvalue())
        model.save_pretrained(args.out, f"After {step} steps, WER on validation clips: {wers}")
    except OSError as error:
        raise InputError(f"cannot write the checkpoint of step {step}: {first_line(error)}; "
                         f"make room, then --resume {args.out}") from None

def schedule(step, steps):
    """Fraction of the peak learning rate: linear warm-up, then a cosine down to a twentieth."""
    warmup = min(100, steps // 2)
    if step <= warmup:
        return step / warmup
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup)))

def main(argv=None):
    """Train. Returns the exit status."""
    args, state = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:  # by torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=datetime.timedelta(hours=6))  # of one validation
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # only the first process prints
    out, pool = Path(args.out), ThreadPoolExecutor(8)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "state.pt").exists() and not state:
        raise InputError(f"{out} holds a run: go on with --resume {out}, or choose another --out")
    if state and len(state["places"]) != world:
        raise InputError(f"{out} was trained by {len(state['places'])} processes: use as many")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32
    model = build_model(args, state)
    place = state["places"][rank] if state else {"number": 0, "position": None, "index": 0}
    steps, val, about = load_data(args, model, rank, world, place, pool)
    bridge = [*model.projector.parameters(), *model.ctc.parameters()]
    parameters = [*bridge, *model.lora.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0, fused=True)
    first, rows = state["step"] if state else 0, []
    if state:
        optimizer.load_state_dict(state["optimizer"])
        rows = [row for row in finished_rows(out / "log.jsonl") if row["step"] <= first]
    else:
        save(args, model, optimizer, 0, place, rows)  # from here on the run can be resumed
    dtype = model.embed.weight.dtype
    peak = matmul_flops(model.device, dtype) * world
    print(f"{model.config['encoder']} -> {sum(p.numel() for p in parameters) / 1e6:.2f}M trained "
          f"-> {model.config['decoder']}, {dtype}, {model.device} x {world} at {peak / 1e12:.2f} "
          f"TFLOP/s; {about}; {len(model.ctc.tokens)} CTC tokens")
    if rank == 0:
        write_file(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        if args.wandb:
            import wandb
            wandb.init(project=args.wandb, config=vars(args), dir=out)

    def log(row):
        rows.append(row)
        if rank == 0:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            if args.wandb:
                wandb.log(row, step=row["step"])

    stop, bad_steps, sums, since = [], 0, Counter(), time.perf_counter()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda number, frame: stop.append(number))
    total = args.ctc_steps + args.steps
    trained_ctc = args.ctc_steps or args.init_from  # an untrained one is of no use in phase 2
    for step in range(first + 1, total + 1):
        # Learning rate, and weights of the CTC loss and the cross-entropy
        if step <= args.ctc_steps:
            phase, end, weights = 1, args.ctc_steps, (1, 0)
            lr = 4 * args.lr * schedule(step, args.ctc_steps)
        else:
            phase, end, weights = 2, total, (args.ctc_weight if trained_ctc else 0, 1)
            lr = args.lr * schedule(step - args.ctc_steps, args.steps)
        optimizer.param_groups[0]["lr"] = lr

        # Batches of this step, made while the last step ran
        try:
            place, batches = next(steps)
        except InputError as error:  # a stream broke off
            if world == 1:
                save(args, model, optimizer, step - 1, place, rows)
            raise InputError(f"{error}; go on with --resume {out}") from None
        clips = [clip for _, _, batch in batches for clip in batch]
        for clip in clips:
            clip["answer"] = model.tokenize(clip["text"])

        # Forward and backward. Losses are sums over tokens; the gradient is divided at the end
        torch.manual_seed(hash((args.seed, step, rank)))  # --resume drops out the same units
        counts = Counter(ctc=0, lm=0, flops=0, steps=1 / world, stop=len(stop),
                         tokens=sum(len(clip["answer"]) + 1 for clip in clips),
                         seconds=sum(clip["seconds"] for clip in clips))
        for frames, lengths, batch in batches:
            answers = [clip["answer"] for clip in batch]
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                loss, parts = model.loss(frames, lengths, answers, *weights)
            loss.backward()
            counts.update(parts, flops=model_flops(model, batch, *weights))
        counts = all_sum(counts, model.device)
        for p in bridge if phase == 1 else parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # had no clip
            if world > 1:
                dist.all_reduce(p.grad)
            p.grad /= max(1, counts["tokens"])

        # Clip and step
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        if math.isfinite(norm):
            bad_steps = 0
            optimizer.step()
        else:
            bad_steps += 1
            names = ", ".join(clip["name"] for clip in clips)
            warn(f"step {step} is skipped, its loss or gradient is not finite: {names}")
            if bad_steps == 5:
                raise InputError(f"five bad steps in a row: lower --lr; {out} has the checkpoint")
        optimizer.zero_grad()

        # Log
        sums.update(counts)
        last = step == end or counts["stop"]
        if step % args.log_every == 0 or last:
            elapsed, tokens = time.perf_counter() - since, max(1, sums["tokens"])
            ctc, lm = float(sums["ctc"]) / tokens, float(sums["lm"]) / tokens
            log({"step": step, "phase": phase, "epoch": place["number"],
                 "loss": ctc if phase == 1 else lm, "ctc": ctc, "lr": lr, "norm": norm,
                 "audio_s_per_s": sums["seconds"] / elapsed, "mfu": sums["flops"] / elapsed / peak,
                 "memory_gb": peak_memory(model.device), "seconds": elapsed})
            print("step {step}/{total} phase {phase} epoch {epoch} loss {loss:.3f} ctc {ctc:.3f} "
                  "lr {lr:.1e} norm {norm:.2f} {audio_s_per_s:.0f}x real time MFU {mfu:.0%} "
                  "{memory_gb:.1f} GB {left:.1f} min left".format(
                      **rows[-1], total=total, left=(end - step) * elapsed / sums["steps"] / 60))
            sums, since = Counter(), time.perf_counter()

        # Validate and save
        if step % args.eval_every == 0 or last:
            if rank == 0 and not counts["stop"]:
                decodings = DECODINGS if phase == 2 else ("ctc",)
                with torch.compiler.set_stance("force_eager"):  # decoding has other shapes
                    wers, text = validate(model, val, args, decodings, pool)
                model.config["decode"] = min(wers, key=wers.get)
                log({"step": step, "phase": phase, "wer": wers})
                plot(out, rows)
                print(f"step {step}/{total} WER of {len(val)} clips: "
                      + ", ".join(f"{100 * wer:.1f} % {name}" for name, wer in wers.items())
                      + f"\n    ref: {val[0]['text']}\n    hyp: {text}")
            save(args, model, optimizer, step, place, rows)
            since = time.perf_counter()
        if counts["stop"]:
            print(f"stopped after step {step}: python train.py --resume {out} goes on")
            return 128 + (stop[0] if stop else signal.SIGTERM)
    print(f"done: python sample.py --model {out} file.wav")
    return 0

if __name__ == "__main__":
    try:
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows a line when it is written
        sys.exit(main())
    except (InputError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("train.py: out of memory: lower --batch-seconds and raise --accumulate, or use "
                 "--checkpointing; --resume goes on from the last checkpoint")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted before the first step")
