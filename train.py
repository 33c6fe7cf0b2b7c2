"""Train the bridge between a frozen audio encoder and a frozen language model.

    python train.py --encoder hubert --decoder qwen3-8b        LoquaciousSet, streamed
    python train.py --dataset mine.jsonl --out out/mine        the embedded pair on your own files
    python train.py --init-from assets/default --dataset mine.jsonl --out out/mine
    python train.py --resume out/mine
    torchrun --nproc_per_node=4 train.py --encoder hubert --decoder qwen3-8b

Phase 1 (--ctc-steps): the projector learns to spell by CTC; the decoder is not run. Phase 2
(--steps): cross-entropy through the frozen decoder, and a little of the CTC loss.
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
import random
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
from data import (SAMPLE_RATE, InputError, augment, finished_rows, first_line, is_hub_id, load_audio,
                  make_batches, no_speech, open_stream, read_clips, stream_clips, write_file)
from eval import corpus_wer
from tinyaudio import DECODINGS, TinyAudio

TRAINING_SETS = {  # name -> hub id, config, split
    "loquacious": ("speechbrain/LoquaciousSet", "medium", "train"),
    "librispeech": ("openslr/librispeech_asr", "clean", "train.360"),
}
MAX_SECONDS = 30  # longer clips are left out
NO_SPEECH = 0.03  # fraction of clips with noise and tones and an empty text that is added
WINDOW = 1000  # clips of a stream that are shuffled and sorted into batches together
WARMUP = 100  # steps, of each phase
MODEL = {"encoder": "whisper-base", "decoder": "smollm2-135m", "stack": 5, "hidden": None,
         "lora": 0}

def parse_args(argv):
    """The flags, and the saved state of --resume."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--encoder", help="hubert, whisper, whisper-base (default), a hub id or a folder")
    add("--decoder", help="qwen3-8b, smollm3-3b, smollm2-135m (default), a hub id or a folder")
    add("--stack", type=int, help="encoder frames per projector frame (default 5)")
    add("--hidden", type=int, help="width of the projector (default: 13M parameters)")
    add("--lora-rank", type=int, dest="lora", help="of a trained update of the decoder (none)")
    add("--init-from", metavar="CKPT", help="start from a trained checkpoint")
    add("--dataset", default="loquacious", help="loquacious, librispeech, a hub id, or your files")
    add("--config", help="of a set of the Hub")
    add("--split", help="of a set of the Hub")
    add("--val", help="files to validate on; default: some clips of --dataset are held out")
    add("--val-clips", type=int, default=50, help="clips to validate on")
    add("--out", default="out", help="folder of the checkpoint, log.jsonl and plot.png")
    add("--resume", metavar="OUT", help="go on with an interrupted run; takes no other flag")
    add("--ctc-steps", type=int, default=4000, help="steps of phase 1")
    add("--steps", type=int, default=60000, help="steps of phase 2")
    add("--batch-seconds", type=float, default=120, help="sound of a batch, with its padding")
    add("--accumulate", type=int, default=1, help="batches of a step")
    add("--lr", type=float, default=1e-3, help="peak learning rate; phase 1 has 4 times as much")
    add("--ctc-weight", type=float, default=0.1, help="of the CTC loss in phase 2")
    add("--mask", type=float, default=0.15, help="fraction of stacked frames that are masked")
    add("--dropout", type=float, default=0.15, help="in the projector")
    add("--word-dropout", type=float, default=0, help="fraction of answer tokens that are hidden")
    add("--augment", type=float, default=0, help="fraction of clips with other speed, with noise")
    add("--compile", action="store_true", help="compile the decoder: a slow start, then faster")
    add("--checkpointing", action="store_true", help="less memory, a third slower")
    add("--keep-frames", type=float, default=4, metavar="GB", help="encode files only once")
    add("--log-every", type=int, default=20, help="steps between log lines")
    add("--eval-every", type=int, default=500, help="steps between validations and checkpoints")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    add("--device", help="cuda, mps or cpu; default: the best that is here")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not args.resume:
        return args, None
    if vars(args) != {**vars(parser.parse_args([])), "resume": args.resume}:
        parser.error("--resume takes no other flag: the run goes on as it was started")
    try:
        state = torch.load(Path(args.resume, "state.pt"), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise InputError(f"{args.resume} has no run to resume: {first_line(error)}") from None
    return argparse.Namespace(**{**state["args"], "out": args.resume}), state

def warn(message):
    print(f"train.py: {message}", file=sys.stderr)

def usable(clips, left_out):
    """The clips that can be trained on, with their `seconds`. Counts the others by reason."""
    good = []
    for clip in clips:
        audio = clip["audio"]
        try:
            file = io.BytesIO(audio) if isinstance(audio, bytes) else audio
            clip["seconds"] = soundfile.info(file).duration
        except (soundfile.SoundFileError, OSError, TypeError):
            clip["seconds"] = 0
        if clip["seconds"] < 0.1:
            left_out["unreadable or under 0.1 s"] += 1
        elif clip["seconds"] > MAX_SECONDS:
            left_out[f"over {MAX_SECONDS} s"] += 1
        elif not clip["text"]:
            left_out["without text"] += 1
        else:
            good.append(clip)
    return good

def stream_windows(rows, args, left_out, held_out=(), number=0, position=None):
    """Endless windows of a stream: (number, position before it, its usable clips)."""
    if position:
        rows.load_state_dict(position)
    iterator = iter(rows)
    while True:
        position = rows.state_dict()
        clips = list(stream_clips(itertools.islice(iterator, WINDOW), args.dataset))
        clips = usable([clip for clip in clips if clip["name"] not in held_out], left_out)
        if not clips:
            raise InputError(f"{args.dataset}: no clip of {WINDOW} in a row is usable")
        yield number, position, clips
        number += 1

def read_wave(clip):
    """Samples of a clip; None, with one warning, if it is broken or longer than its header says."""
    try:
        wave = load_audio(clip["audio"])
        if len(wave) > SAMPLE_RATE * (clip["seconds"] + 0.1):
            raise InputError(f"{clip['name']}: longer than its header says")
        return wave
    except InputError as error:
        if not clip.get("broken"):
            warn(f"left out {error}")
        clip["broken"] = True

def load_batch(model, clips, pool, share=0, rng=None):
    """frames (B, T, D), lengths (B,), and their clips, less those that cannot be read."""
    if "frames" in clips[0]:
        lengths = torch.tensor([len(clip["frames"]) for clip in clips], device=model.device)
        frames = pad_sequence([clip["frames"] for clip in clips], batch_first=True)
        return frames.to(model.device), lengths, clips
    waves = list(pool.map(read_wave, clips))
    clips = [clip for clip, wave in zip(clips, waves) if wave is not None]
    waves = [wave for wave in waves if wave is not None]
    if share:
        waves = [augment(wave, rng, share, MAX_SECONDS) for wave in waves]
    return *(model.encoder(waves) if waves else (None, None)), clips

def keep_frames(model, clips, args, pool):
    """Encode files once: clip["frames"] (T, D) in bfloat16. Returns the clips that can be read."""
    for batch in tqdm(make_batches([clip["seconds"] for clip in clips], args.batch_seconds),
                      desc="encoding, once", unit="batch", disable=None):
        frames, lengths, good = load_batch(model, [clips[i] for i in batch], pool)
        for i, clip in enumerate(good):
            clip["frames"] = frames[i, :lengths[i]].to("cpu", torch.bfloat16, copy=True)
    return [clip for clip in clips if "frames" in clip]

def make_steps(windows, model, args, start, rank, world, pool):
    """Endless optimizer steps: (place behind it, its batches). Their order follows from the seed
    and the number of the window alone: --resume is exact."""
    for number, position, clips in windows:
        if position:
            clips = clips + no_speech(round(NO_SPEECH * len(clips)), [args.seed, number, rank])
        rng = np.random.default_rng([args.seed, number])
        batches = make_batches([clip["seconds"] for clip in clips], args.batch_seconds, rng)
        # Every process has a stream of its own; of files all have the same, and share batches.
        first, by = (0, 1) if position else (rank, world)
        size = args.accumulate * by
        for index in range(start, math.ceil(len(batches) / size)):
            rng = np.random.default_rng([args.seed, number, index, rank])
            mine = batches[index * size:(index + 1) * size][first::by]
            loaded = [load_batch(model, [clips[i] for i in batch], pool, args.augment, rng)
                      for batch in mine]
            yield {"number": number, "position": position, "index": index + 1}, loaded
        start = 0

def prefetch(items):
    """The items of a generator, each made in a thread while the last one is used."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items)
        while True:
            item, future = future.result(), pool.submit(next, items)
            yield item

def load_data(args, model, rank, world, place, pool):
    """Endless steps from a place on, clips to validate on, and a line about both."""
    left_out, rows = Counter(), None
    if args.dataset in TRAINING_SETS or is_hub_id(args.dataset):
        hub_id, config, split = TRAINING_SETS.get(args.dataset, (args.dataset, None, "train"))
        rows = open_stream(hub_id, args.config or config, args.split or split)
        # This shuffles files; clips are shuffled in windows, which --resume can restore.
        rows = rows.shuffle(args.seed, buffer_size=1).repeat(None)
        clips = next(stream_windows(rows, args, Counter()))[2]  # some of them to validate on
    elif args.config or args.split:
        raise InputError("--config and --split are for sets of the Hub, not for files")
    else:
        clips = usable(read_clips(args.dataset), left_out)
    val = usable(read_clips(args.val), left_out) if args.val else clips[:]
    random.Random(args.seed).shuffle(val)
    val = val[:args.val_clips if args.val else min(args.val_clips, len(val) // 10 + 1)]
    held_out = {clip["name"] for clip in val}
    clips = [clip for clip in clips if clip["name"] not in held_out]
    if not clips or not val:
        raise InputError(f"{len(clips)} clips of {args.dataset} to train on and {len(val)} of "
                         f"{args.val or 'them'} to validate on; left out: {describe(left_out)}")
    if rows:
        from datasets.distributed import split_dataset_by_node
        # Words to come are not known: CTC may spell with all tokens that are made of letters.
        tokens = map(model.tokenizer.decode, range(len(model.tokenizer)))
        model.set_ctc_tokens([x for x in tokens if x.isascii() and x.strip().isalpha()])
        windows = prefetch(stream_windows(split_dataset_by_node(rows, rank, world), args, left_out,
                                          held_out, place["number"], place["position"]))
        about = "streamed"
    else:
        model.set_ctc_tokens([clip["text"] for clip in clips])
        clips += no_speech(min(300, round(NO_SPEECH * len(clips))), args.seed)
        seconds = sum(clip["seconds"] for clip in clips)
        about = f"{seconds / 3600:.2f} h in {len(clips)} clips"
        size = seconds * model.encoder.frame_rate * model.encoder.dim * 2 / 1e9
        if size <= args.keep_frames and not args.augment:
            clips, val = (keep_frames(model, part, args, pool) for part in (clips, val))
            about += f", {size:.2f} GB of frames kept"
        windows = ((epoch, None, clips) for epoch in itertools.count(place["number"]))
    steps = make_steps(windows, model, args, place["index"], rank, world, pool)
    return prefetch(steps), val, f"{about}; left out: {describe(left_out)}"

def describe(left_out):
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"

def build_model(args, state):
    """The model of --resume, of --init-from, which flags may not contradict, or a new one."""
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
        model = TinyAudio(**{**MODEL, **asked}, device=args.device)
        model.config["decode"] = "ctc" if args.ctc_steps else "greedy"
    model.projector.mask, model.projector.dropout = args.mask, args.dropout
    model.word_dropout = args.word_dropout
    if model.device.type == "cpu":  # the backward pass of fused attention is slow there
        model.decoder.set_attn_implementation("eager")
    for layer in model.decoder.base_model.layers:
        if args.checkpointing:  # keep the inputs of layers alone (Chen et al. 2016)
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        if args.compile:
            layer.compile(dynamic=True)
    return model.train()

@torch.no_grad()
def validate(model, clips, args, decodings, pool):
    """WER of the clips by each way of decoding, and the last one's text of the first clip."""
    model.eval()
    texts = {decode: dict.fromkeys([clip["name"] for clip in clips], "") for decode in decodings}
    for batch in make_batches([clip["seconds"] for clip in clips], args.batch_seconds):
        frames, lengths, good = load_batch(model, [clips[i] for i in batch], pool)
        for decode in decodings if good else ():
            answers = model.decode(*model.projector(frames, lengths), decode)
            texts[decode].update(zip((clip["name"] for clip in good),
                                     map(model.detokenize, answers)))
    model.train()
    references = [clip["text"] for clip in clips]
    wers = {decode: corpus_wer(references, list(texts[decode].values())) for decode in decodings}
    return wers, texts[decodings[-1]][clips[0]["name"]]

def plot(out, rows):
    """Draw loss, WER and speed into plot.png, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for phase, name in ((1, "phase 1: CTC"), (2, "phase 2: cross-entropy")):
        steps = [(row["step"], row["loss"]) for row in rows if row["phase"] == phase and "loss" in row]
        left.plot(*zip(*steps or [(np.nan, np.nan)]), label=name)
    for decode in DECODINGS:
        wers = [(row["step"], 100 * row["wer"][decode]) for row in rows if decode in row.get("wer", ())]
        right.plot(*zip(*wers or [(np.nan, np.nan)]), ".-", label=decode)
    for axis, title in ((left, "training loss per token"), (right, "WER in %, validation clips")):
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.legend()
    figure.savefig(out / "plot.png", dpi=80)

def start_processes():
    """This process's rank and the number of processes, as torchrun sets them."""
    if "RANK" not in os.environ:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))  # of one validation
    return dist.get_rank(), dist.get_world_size()

def all_sum(values, device):
    """Sums over all processes."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()

def save(args, model, optimizer, step, place, rows):
    """Write state.pt for --resume, and what `TinyAudio.from_pretrained` reads."""
    places = [{**place, "rng": torch.get_rng_state()}]
    if model.device.type == "cuda":
        places[0]["cuda_rng"] = torch.cuda.get_rng_state()
    if dist.is_initialized():
        mine, places = places[0], [None] * dist.get_world_size()
        dist.all_gather_object(places, mine)
        if dist.get_rank() > 0:
            return
    file, wers = io.BytesIO(), [row["wer"] for row in rows if "wer" in row][-1:]
    torch.save({"args": vars(args), "step": step, "places": places, "config": model.config,
                "model": model.trained(), "optimizer": optimizer.state_dict()}, file)
    try:
        write_file(Path(args.out, "state.pt"), file.getvalue())
        model.save_pretrained(args.out, f"After {step} steps, WER on validation clips: {wers}")
    except OSError as error:
        raise InputError(f"cannot write the checkpoint of step {step}: {first_line(error)}; "
                         f"make room, then --resume {args.out}") from None

def schedule(step, steps):
    """Share of the peak learning rate: linear warm-up, then a cosine down to a twentieth."""
    warmup = min(WARMUP, steps // 2)
    if step <= warmup:
        return step / warmup
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup)))

def train(args, state):
    rank, world = start_processes()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32
    out, pool = Path(args.out), ThreadPoolExecutor(min(8, os.cpu_count()))
    out.mkdir(parents=True, exist_ok=True)
    if (out / "state.pt").exists() and not state:
        raise InputError(f"{out} holds a run: go on with --resume {out}, or choose another --out")
    if state and len(state["places"]) != world:
        raise InputError(f"{out} was trained by {len(state['places'])} processes: use as many")
    model = build_model(args, state)
    place = state["places"][rank] if state else {"number": 0, "position": None, "index": 0}
    steps, val, about = load_data(args, model, rank, world, place, pool)
    bridge = [*model.projector.parameters(), *model.ctc.parameters()]
    parameters, dtype = [*bridge, *model.lora.parameters()], model.embed.weight.dtype
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    torch.manual_seed(args.seed + rank)  # every process drops out other units
    first, total, rows = state["step"] if state else 0, args.ctc_steps + args.steps, []
    if state:
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(place["rng"])
        if "cuda_rng" in place and model.device.type == "cuda":
            torch.cuda.set_rng_state(place["cuda_rng"])
        rows = [row for row in finished_rows(out / "log.jsonl") if row["step"] <= first]
    else:
        save(args, model, optimizer, 0, place, rows)  # from here on the run can be resumed
    peak, say = matmul_flops(model.device, dtype) * world, print if rank == 0 else lambda *_: None
    say(f"{model.config['encoder']} -> {sum(p.numel() for p in parameters) / 1e6:.2f}M trained -> "
        f"{model.config['decoder']}, {dtype}, {model.device} x {world} at {peak / 1e12:.2f} TFLOP/s"
        f"; {about}; {len(model.ctc.tokens)} CTC tokens")
    if rank == 0:
        write_file(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        if args.wandb:
            import wandb
            wandb.init(project=args.wandb, config=vars(args), dir=out)

    def log(row):
        rows.append({key: round(x, 5) if isinstance(x, float) else x for key, x in row.items()})
        if rank == 0:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            if args.wandb:
                wandb.log(rows[-1], step=row["step"])

    stop, bad_steps, sums, since = [], 0, Counter(), time.perf_counter()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    for step in range(first + 1, total + 1):
        # Learning rate
        phase = 1 if step <= args.ctc_steps else 2
        done, length = (step, args.ctc_steps) if phase == 1 else (step - args.ctc_steps, args.steps)
        lr = schedule(done, length) * args.lr * (4 if phase == 1 else 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        spelled = args.ctc_steps or args.init_from  # else the CTC head is untrained
        weights = (1, 0) if phase == 1 else (args.ctc_weight if spelled else 0, 1)

        # Batch, made while the last step ran
        try:
            place, batches = next(steps)
        except InputError as error:  # a stream broke off
            if world == 1:
                save(args, model, optimizer, step - 1, place, rows)
            raise InputError(f"{error}; go on with --resume {out}") from None
        everything = [clip for _, _, clips in batches for clip in clips]
        for clip in everything:
            clip.setdefault("answer", model.tokenize(clip["text"]))
        tokens = sum(len(clip["answer"]) + 1 for clip in everything)
        tokens, stopping = all_sum([tokens, len(stop)], model.device)

        # Forward and backward: the sum over all tokens of the step, divided by their number
        for frames, lengths, clips in (batch for batch in batches if batch[2]):
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                loss, parts = model.loss(frames, lengths, [c["answer"] for c in clips], *weights)
            (loss / tokens).backward()
            sums.update(parts, flops=model_flops(model, clips, *weights))
        for p in (bridge if phase == 1 else parameters) if world > 1 else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # had no clip
            dist.all_reduce(p.grad)

        # Clip and step
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        bad_steps = 0 if math.isfinite(norm) else bad_steps + 1
        if bad_steps:
            names = ", ".join(clip["name"] for clip in everything)
            warn(f"step {step} is skipped, its loss or gradient is not finite: {names}")
            if bad_steps == 5:
                raise InputError(f"five bad steps in a row: lower --lr; {out} has the checkpoint")
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = sum(clip["seconds"] for clip in everything)
        sums.update(tokens=tokens / world, seconds=seconds, steps=1)

        # Log
        ends_phase = step in (args.ctc_steps, total)
        if step % args.log_every == 0 or ends_phase or stopping:
            elapsed, names = time.perf_counter() - since, ("ctc", "lm", "tokens", "seconds", "flops")
            ctc, lm, tokens, seconds, flops = all_sum([float(sums[x]) for x in names], model.device)
            log({"step": step, "phase": phase, "epoch": place["number"],
                 "loss": (ctc if phase == 1 else lm) / tokens, "ctc": ctc / tokens, "lr": lr,
                 "norm": norm, "audio_s_per_s": seconds / elapsed, "mfu": flops / elapsed / peak,
                 "memory_gb": peak_memory(model.device), "seconds": elapsed})
            left = (length - done) * elapsed / sums["steps"] / 60
            say("step {step}/{total} phase {phase} epoch {epoch} loss {loss:.3f} ctc {ctc:.3f} lr "
                "{lr:.1e} norm {norm:.2f} {audio_s_per_s:.0f}x real time MFU {mfu:.0%} "
                "{memory_gb:.1f} GB {left:.1f} min left".format(**rows[-1], total=total, left=left))
            sums, since = Counter(), time.perf_counter()

        # Validate and save
        if step % args.eval_every == 0 or ends_phase or stopping:
            if rank == 0 and not stopping:
                decodings = DECODINGS if phase == 2 else ("ctc",)
                with torch.compiler.set_stance("force_eager"):  # decoding has other shapes
                    wers, text = validate(model, val, args, decodings, pool)
                model.config["decode"] = min(wers, key=wers.get)
                log({"step": step, "phase": phase, "wer": wers})
                plot(out, rows)
                say(f"step {step}/{total} WER of {len(val)} clips: "
                    + ", ".join(f"{100 * wer:.1f} % {name}" for name, wer in wers.items())
                    + f"\n    ref: {val[0]['text']}\n    hyp: {text}")
            save(args, model, optimizer, step, place, rows)
            since = time.perf_counter()
        if stopping:
            say(f"stopped after step {step}: python train.py --resume {out} goes on")
            return 128 + (stop[0] if stop else signal.SIGTERM)
    say(f"done: python sample.py --model {out} file.wav")
    return 0

def main(argv=None):
    """Returns the exit status."""
    return train(*parse_args(argv))

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
