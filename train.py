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
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from bench import matmul_flops, model_flops, peak_memory, prepare
from data import (SAMPLE_RATE, InputError, augment, first_line, is_hub_id, load_audio,
                  make_batches, no_speech, open_stream, read_clips, run, stream_clips, write_file)
from eval import corpus_wer
from tinyaudio import DECODINGS, TinyAudio

TRAINING_SETS = {  # on the Hub
    "loquacious": "speechbrain/LoquaciousSet:medium:train",
    "librispeech": "openslr/librispeech_asr:clean:train.360",
}
MAX_SECONDS = 30  # longer clips are left out
NO_SPEECH = 0.03  # fraction of clips that are added: noise and tones, with an empty text
WINDOW = 1000  # clips of a stream that are shuffled and batched together
AT_LEAST_1 = ("stack", "hidden", "batch_seconds", "accumulate", "log_every", "eval_every")
FRACTIONS = ("mask", "dropout", "augment")
MODEL = ("encoder", "decoder", "stack", "hidden", "lora")  # flags of the model

def parse_args(argv):
    """The flags, and the state to start from, which is that of --resume."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--encoder", help="hubert, whisper, whisper-base (default), a hub id or a folder")
    add("--decoder", help="qwen3-8b, smollm3-3b, smollm2-135m (default), a hub id or a folder")
    add("--stack", type=int, help="encoder frames per projector frame (default 5)")
    add("--hidden", type=int, help="projector width (default: twice the encoder's, 13M at most)")
    add("--lora-rank", type=int, dest="lora", help="train a LoRA of the decoder too")
    add("--init-from", metavar="CKPT", help="start from a trained checkpoint")
    add("--dataset", default="loquacious", help="loquacious, librispeech, your files or folder, or "
                                                "owner/name:config:split of the Hub")
    add("--val", help="files to validate on (default: a tenth of --dataset, at most 50 clips)")
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
    add("--augment", type=float, default=0, help="fraction of clips with other speed, noise")
    add("--compile", action="store_true", help="compile the decoder")
    add("--checkpointing", action="store_true", help="less memory, a third slower")
    add("--keep-frames", type=float, default=4, metavar="GB",
        help="memory for frames: if all fit, files are encoded once; with --augment up to 3 copies")
    add("--log-every", type=int, default=20, help="steps between log lines")
    add("--eval-every", type=int, default=500, help="steps between validations")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    add("--device", help="cuda, mps or cpu (default: the best one)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        low, high = int(name in AT_LEAST_1), 1 if name in FRACTIONS else 1e9
        if isinstance(value, (int, float)) and not low <= value <= high:  # nor NaN
            parser.error(f"--{name.replace('_', '-')} is {value}, not from {low} to {high:g}")
    if not args.resume:
        return args, {"step": 0, "rows": [], "place": {"number": 0, "position": None, "done": 0}}
    if args != parser.parse_args(["--resume", args.resume]):
        parser.error("--resume takes no other flag: the run goes on as it was started")
    try:
        state = torch.load(Path(args.resume, "state.pt"), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise InputError(f"{args.resume} has no run to resume: {first_line(error)}") from None
    return argparse.Namespace(**{**state["args"], "out": args.resume, "resume": args.resume}), state

def usable(clips, model, left_out):
    """Clips to train on, with `seconds` and `answer` (token ids). left_out counts the others."""
    def measure(clip):  # by decoding it: headers may be wrong
        try:
            return len(load_audio(clip["audio"])) / SAMPLE_RATE
        except InputError as error:
            print(f"train.py: left out {error}", file=sys.stderr)
            return 0
    good, rate = [], model.encoder.frame_rate / model.projector.stack
    with ThreadPoolExecutor(8) as pool:
        for clip, seconds in zip(clips, pool.map(measure, clips)):
            answer = model.tokenize_answer(clip["text"])
            if not 0.1 <= seconds <= MAX_SECONDS:
                left_out[f"unreadable or not 0.1 to {MAX_SECONDS} s long"] += 1
            elif not answer:
                left_out["without text"] += 1
            elif len(answer) > seconds * rate:  # no CTC path
                left_out["with more text than sound"] += 1
            else:
                good.append({**clip, "seconds": seconds, "answer": answer})
    return good

def stream_windows(rows, args, model, held_out, place):
    """Endless windows of a stream: its number, the position before it, its usable clips."""
    if place["position"]:
        rows.load_state_dict(place["position"])
    iterator = iter(rows)
    for number in itertools.count(place["number"]):
        position = rows.state_dict()
        clips = stream_clips(itertools.islice(iterator, WINDOW), args.dataset)
        clips = usable([x for x in clips if x["name"] not in held_out], model, Counter())
        silent = no_speech(round(NO_SPEECH * len(clips)), [args.seed, number])
        yield number, position, clips + silent

def load_batch(model, clips, share, rng):
    """Frames (B, T, D) and lengths (B,) of clips. A share of them has another speed, or noise."""
    if "frames" in clips[0]:
        frames = [clip["frames"] for clip in clips]
        lengths = torch.tensor(list(map(len, frames)), device=model.device)
        return pad_sequence(frames, batch_first=True).to(model.device), lengths
    waves = [augment(load_audio(clip["audio"]), rng, share, MAX_SECONDS) for clip in clips]
    return model.encoder(waves)

def make_steps(windows, model, args, start, rank, world):
    """Endless optimizer steps: the place after each, and its batches. A place is the number of the
    window, the stream's position before it, and the count of its batches that are done. Their
    order depends only on the seed and that number, so --resume is exact."""
    size = args.accumulate * world
    for number, position, clips in windows:
        rng = np.random.default_rng([args.seed, number])
        batches = make_batches(clips, args.batch_seconds, rng)
        for done in range(start, len(batches), size):
            rng = np.random.default_rng([args.seed, number, done, rank])
            mine = batches[done:done + size][rank::world]
            loaded = [(*load_batch(model, batch, args.augment, rng), batch) for batch in mine]
            yield {"number": number, "position": position, "done": done + size}, loaded
        start = 0

def prefetch(items):
    """Items of an endless generator. A thread makes the next one in advance."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items)
        while True:
            item, future = future.result(), pool.submit(next, items)
            yield item

def load_data(args, model, place):
    """Endless windows of clips from a place on, and the clips to validate on."""
    left_out, stream, rng = Counter(), None, np.random.default_rng(args.seed)
    if args.dataset in TRAINING_SETS or is_hub_id(args.dataset):
        stream = open_stream(TRAINING_SETS.get(args.dataset, args.dataset), "train")
        stream = stream.shuffle(args.seed, buffer_size=1).repeat(None)  # of files, not of clips
        clips = list(stream_clips(stream.take(WINDOW), args.dataset))  # to choose --val from
    else:
        clips = read_clips(args.dataset)
    clips = usable(clips, model, left_out)
    val = rng.permutation(clips)[:min(50, len(clips) // 10 + 1)].tolist()
    if args.val:
        val = usable(read_clips(args.val), model, left_out)
    held_out = {clip["name"] for clip in val}
    clips = [clip for clip in clips if clip["name"] not in held_out]
    seconds = sum(clip["seconds"] for clip in clips)
    print(f"{args.dataset}{', its first clips' if stream else ''}: {seconds / 3600:.2f} h in "
          f"{len(clips)} clips, and {len(val)} to validate on; left out: "
          f"{dict(left_out) or 'nothing'}")
    if not clips or not val:
        raise InputError(f"no usable clip in {args.val or args.dataset}")
    if stream:  # the texts are not known yet: CTC may use every token that is made of letters
        texts = enumerate(map(model.tokenizer.decode, range(len(model.tokenizer))))
        model.set_ctc_tokens(i for i, x in texts if x.isascii() and x.strip().isalpha())
        return prefetch(stream_windows(stream, args, model, held_out, place)), val
    model.set_ctc_tokens(token for clip in clips for token in clip["answer"])
    clips += no_speech(min(300, round(NO_SPEECH * len(clips))), args.seed)
    size = seconds * model.encoder.frame_rate * model.encoder.dim * 2 / 1e9
    copies = min(3 if args.augment else 1, int(args.keep_frames / size))
    if copies:
        clips = [dict(clip) for clip in clips * copies]  # each with frames of its own
        for batch in tqdm(make_batches(clips, args.batch_seconds), "encoding, once", disable=None):
            for clip, x, length in zip(batch, *load_batch(model, batch, args.augment, rng)):
                clip["frames"] = x[:length].to("cpu", torch.bfloat16, copy=True)
    return ((epoch, None, clips) for epoch in itertools.count(place["number"])), val

def build_model(args):
    """The model of --resume, of --init-from (flags may not contradict it), or a new one."""
    asked = {key: getattr(args, key) for key in MODEL if getattr(args, key) is not None}
    if source := args.resume or args.init_from:
        model = TinyAudio.from_pretrained(source, args.device, merge=False)
        for key, value in asked.items():
            if value != model.config[key]:
                raise InputError(f"{source} has {key} {model.config[key]}, not {value}")
    else:
        config = {"encoder": "whisper-base", "decoder": "smollm2-135m", "decode": "ctc", **asked}
        model = TinyAudio(**config, device=args.device)
    model.projector.mask, model.projector.dropout = args.mask, args.dropout
    prepare(model, args.compile, args.checkpointing)
    return model.train()

def validate(model, clips, decodings):
    """WER of the clips by each way of decoding, and the text of the first clip by the last way."""
    sounds, references = ([clip[key] for clip in clips] for key in ("audio", "text"))
    model.eval()
    texts = {decode: model.transcribe(sounds, decode) for decode in decodings}
    model.train()
    wers = {decode: corpus_wer(references, found) for decode, found in texts.items()}
    return wers, texts[decodings[-1]][0]

def plot(out, rows):
    """Draw loss and WER into plot.png, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*[(row["step"], row["loss"]) for row in rows if "loss" in row]))
    left.set(title="loss per token: CTC, then cross-entropy", xlabel="step", ylim=(0, None))
    for decode in rows[-1]["wer"]:
        wers = [(row["step"], row["wer"][decode]) for row in rows if decode in row.get("wer", ())]
        right.plot(*zip(*wers), ".-", label=decode)
    right.set(title="WER of the validation clips", xlabel="step", ylim=(0, None))
    right.legend()
    figure.savefig(out / "plot.png", dpi=80)

def save(args, model, optimizer, rows, step, place):
    """Write what `TinyAudio.from_pretrained` reads, and state.pt for --resume."""
    wers = next((row["wer"] for row in reversed(rows) if "wer" in row), {})  # {}: none yet
    found = [f"{wer:.2%} by {decode}" for decode, wer in wers.items()]
    model.save_pretrained(args.out, f"{step} steps. WER of validation clips: {', '.join(found)}")
    file = Path(args.out, "state.pt.unfinished")  # as `write_file`, without a copy in memory
    torch.save({"args": vars(args), "step": step, "place": place, "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "rows": rows}, file)
    file.replace(Path(args.out, "state.pt"))

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
    out, log_file = Path(args.out), Path(args.out, "log.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    if (out / "state.pt").exists() and not args.resume:
        raise InputError(f"{out} holds a run: go on with --resume {out}, or choose another --out")
    rows = state["rows"]  # of the log
    if rank == 0:  # before the long work, as --out may not be writable
        write_file(log_file, "".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32
    model = build_model(args)
    windows, val = load_data(args, model, state["place"])
    steps = prefetch(make_steps(windows, model, args, state["place"]["done"], rank, world))
    parameters = list(model.parameters())
    bridge = [*model.projector.parameters(), *model.ctc.parameters()]  # all that phase 1 trains
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0, fused=True)
    if args.resume:
        model.load_state_dict(state["model"])  # in float32
        optimizer.load_state_dict(state["optimizer"])
    elif rank == 0:  # from here on the run can be resumed
        save(args, model, optimizer, **state)
    dtype = model.embed.weight.dtype
    peak = matmul_flops(model.device, dtype) * world
    print(f"{model.config['encoder']} -> {sum(p.numel() for p in parameters) / 1e6:.2f}M trained "
          f"-> {model.config['decoder']}, {dtype}, {model.device} x {world} at {peak / 1e12:.2f} "
          f"TFLOP/s, {len(model.ctc.tokens)} CTC tokens")
    if args.wandb and rank == 0:
        import wandb
        wandb.init(project=args.wandb, config=vars(args), dir=out)

    def log(row):
        rows.append(row)
        if rank == 0:
            with open(log_file, "a") as file:
                file.write(json.dumps(row) + "\n")
            if args.wandb:
                wandb.log(row, step=row["step"])

    stop, bad_steps, sums, since = [], 0, Counter(), time.perf_counter()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    total = args.ctc_steps + args.steps
    trained_ctc = args.ctc_steps or args.init_from  # an untrained one is of no use in phase 2
    for step in range(state["step"] + 1, total + 1):
        # Learning rate, and weights of the CTC loss and the cross-entropy
        if step <= args.ctc_steps:
            phase, end, weights = 1, args.ctc_steps, (1, 0)
            lr = 4 * args.lr * schedule(step, args.ctc_steps)
        else:
            phase, end, weights = 2, total, (args.ctc_weight if trained_ctc else 0, 1)
            lr = args.lr * schedule(step - args.ctc_steps, args.steps)
        optimizer.param_groups[0]["lr"] = lr

        # Batches of this step, made while the last step ran
        place, batches = next(steps)
        clips = [clip for _, _, batch in batches for clip in batch]

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
        trained = bridge if phase == 1 else parameters
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # not in this step's loss
        if world > 1:
            values = torch.tensor([float(x) for x in counts.values()], device=model.device)
            for x in (values, *(p.grad for p in trained)):
                dist.all_reduce(x)
            counts = dict(zip(counts, values.tolist()))
        for p in trained:
            p.grad /= counts["tokens"]

        # Clip and step
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        bad_steps = 0 if math.isfinite(norm) else bad_steps + 1
        if not bad_steps:
            optimizer.step()
            sums.update(counts)
        else:
            print(f"train.py: step {step} is skipped, its loss or gradient is not finite: "
                  + ", ".join(clip["name"] for clip in clips), file=sys.stderr)
            if bad_steps == 5:
                raise InputError(f"five bad steps in a row: lower --lr; {out} has the checkpoint")
        optimizer.zero_grad()

        # Log
        check = step == end or step % args.eval_every == 0 or counts["stop"]
        if sums and (check or step % args.log_every == 0):
            elapsed, tokens = time.perf_counter() - since, sums["tokens"]
            ctc, lm = float(sums["ctc"]) / tokens, float(sums["lm"]) / tokens
            row = {"step": step, "phase": phase, "epoch": place["number"],  # a stream's window
                   "loss": ctc if phase == 1 else lm, "ctc": ctc, "lr": lr, "norm": norm,
                   "x_real_time": sums["seconds"] / elapsed, "mfu": sums["flops"] / elapsed / peak,
                   "memory_gb": peak_memory(model.device),
                   "minutes_left": (end - step) * elapsed / sums["steps"] / 60}  # of the phase
            print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
            log(row)
            sums, since = Counter(), time.perf_counter()

        # Validate and save
        if rank == 0 and check:  # the other processes wait in all_reduce
            if not counts["stop"]:
                with torch.compiler.set_stance("force_eager"):  # decoding has other shapes
                    wers, text = validate(model, val, DECODINGS if phase == 2 else ("ctc",))
                model.config["decode"] = min(wers, key=wers.get)
                log({"step": step, "phase": phase, "wer": wers})
                plot(out, rows)
                print(f"step {step}/{total} WER of {len(val)} clips: "
                      + ", ".join(f"{100 * wer:.1f} % {name}" for name, wer in wers.items())
                      + f"\n    ref: {val[0]['text']}\n    hyp: {text}")
            save(args, model, optimizer, rows, step, place)
            since = time.perf_counter()
        if counts["stop"]:
            print(f"stopped after step {step}: python train.py --resume {out} goes on")
            return 128 + (stop[0] if stop else signal.SIGTERM)
    print(f"done: python sample.py --model {out} file.wav")
    return 0

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows a line when it is written
    try:
        run(main)
    except torch.OutOfMemoryError:
        sys.exit("train.py: out of memory: lower --batch-seconds and raise --accumulate, or use "
                 "--checkpointing; --resume goes on from the last checkpoint")
