"""Train the bridge between a frozen audio encoder and a frozen language model.

    python train.py --encoder hubert --decoder qwen3-8b        LoquaciousSet, streamed
    python train.py --dataset mine.jsonl --out out/mine        the embedded pair on your own files
    python train.py --init-from assets/default --dataset mine.jsonl --out out/mine
    python train.py --resume out/mine                          goes on, or trains more: --steps
    torchrun --nproc_per_node=4 train.py --encoder hubert --decoder qwen3-8b

Phase 1 (--ctc-steps): the projector learns to spell by CTC; the decoder is not run.
Phase 2 (--steps): cross-entropy through the frozen decoder, plus a little CTC.
Ctrl-C or SIGTERM saves and stops. --out holds the best checkpoint so far, by the WER of --val.
"""
import argparse
import datetime
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from timeit import repeat

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import (SAMPLE_RATE, InputError, augment, first_line, is_hub_id, load_audio, make_batches,
                  no_speech, open_stream, read_clips, run, stream_clips, write_file)
from eval import corpus_wer, is_english
from tinyaudio import DECODINGS, TinyAudio, find_device

HUB_SETS = {  # name -> what to train on, what to validate on
    "loquacious": ["speechbrain/LoquaciousSet:medium:train",
                   "speechbrain/LoquaciousSet:medium:dev"],
    "librispeech": ["openslr/librispeech_asr:clean:train.360",
                    "openslr/librispeech_asr:clean:validation"],
}
MAX_SECONDS = 30  # longer clips are left out
NO_SPEECH = 0.03  # fraction of clips that are added: noise and tones, with an empty text
WINDOW = 1000  # clips of a stream that are shuffled and batched together
AT_LEAST_1 = ("stack", "hidden", "batch_seconds", "accumulate", "log_every", "eval_every")
FRACTIONS = ("mask", "dropout", "augment")
MODEL = ("encoder", "decoder", "stack", "hidden", "lora")  # flags of the model
RESUMABLE = ("steps", "dataset", "val", "device", "batch_seconds", "accumulate", "wandb",
             "checkpointing", "keep_frames")
THREADS = ThreadPoolExecutor(min(8, os.cpu_count()))  # that decode sound

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
    add("--val", help="the same, to validate on: of the Hub 200 clips (default: the dev split of "
                      "loquacious and librispeech, else a tenth of --dataset, at most 50 clips)")
    add("--out", default="out", help="folder of checkpoint, log and plot (%(default)s)")
    add("--resume", metavar="OUT", help="continue a run; of the other flags it takes "
                                        + ", ".join(RESUMABLE))
    add("--ctc-steps", type=int, default=4000, help="steps of phase 1 (%(default)s)")
    add("--steps", type=int, default=60000, help="steps of phase 2 (%(default)s)")
    add("--batch-seconds", type=float, default=120, help="audio per batch (%(default)s)")
    add("--accumulate", type=int, default=1, help="batches per step (%(default)s)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (%(default)s); phase 1: times 4")
    add("--ctc-weight", type=float, default=0.1, help="weight of CTC in phase 2, if there was a "
                                                      "phase 1 (%(default)s)")
    add("--mask", type=float, default=0.15, help="fraction of frames masked (%(default)s)")
    add("--dropout", type=float, default=0.15, help="in the projector (%(default)s)")
    add("--augment", type=float, default=0, help="fraction of clips with other speed, noise")
    add("--compile", action="store_true", help="compile the decoder")
    add("--checkpointing", action="store_true", help="less memory, a third slower")
    add("--keep-frames", type=float, default=20, metavar="GB", help="disk for frames (20): "
        "files are encoded once if all fit and --augment is 0")
    add("--log-every", type=int, default=20, help="steps between log lines (%(default)s)")
    add("--eval-every", type=int, default=1000, help="steps between validations (%(default)s)")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    add("--device", help="cuda, mps or cpu (default: the best one)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        low, high = int(name in AT_LEAST_1), 1 if name in FRACTIONS else 1e9
        if isinstance(value, (int, float)) and not low <= value <= high:  # NaN fails, too
            parser.error(f"--{name.replace('_', '-')} is {value}, not from {low} to {high:g}")
    if not args.resume:
        return args, {"step": 0, "rows": [], "places": None}
    try:
        state = torch.load(Path(args.resume, "state.pt"), map_location="cpu", weights_only=True)
        if "places" not in state:
            raise ValueError("it is of an earlier version")
    except Exception as error:  # torch.load raises many kinds
        raise InputError(f"{args.resume} has no run to resume: {first_line(error)}") from None
    old = {**state["args"], "resume": args.resume}
    args = parser.parse_args(argv, argparse.Namespace(**old))  # only flags that stand in argv
    for name in [name for name, value in vars(args).items() if value != old[name]]:
        flag = f"--{name.replace('_', '-')}"
        if name not in RESUMABLE:
            parser.error(f"--resume does not take {flag}: the run goes on as it was started")
        print(f"{flag} is now {getattr(args, name)}, and was {old[name]}")
    args.out = args.resume
    if args.dataset != old["dataset"]:
        if not args.val:  # it would be chosen anew, from clips that were trained on
            parser.error("--resume with another --dataset needs --val")
        state["places"] = None  # the new set begins at its first clip
    if args.val != old["val"]:  # the best step is looked for anew
        for row in (row for row in state["rows"] if "wer" in row):
            row["old_wer"] = row.pop("wer")
    return args, state

def usable(clips, model, left_out):
    """Clips to train on, with `seconds`, `sound` (a hash) and `answer` (token ids). left_out counts
    the others."""
    def measure(clip):  # by decoding it: headers may be wrong
        try:
            wave = load_audio(clip["audio"], longest=MAX_SECONDS + 1)
            return len(wave) / SAMPLE_RATE, hashlib.md5(wave).hexdigest()
        except InputError as error:
            print(f"train.py: left out {error}", file=sys.stderr)
            return 0, ""
    good, rate = [], model.encoder.frame_rate / model.projector.stack
    for clip, (seconds, sound) in zip(clips, THREADS.map(measure, clips)):
        answer = model.tokenize_answer(clip["text"])
        repeats = sum(first == second for first, second in itertools.pairwise(answer))
        if not 0.1 <= seconds <= MAX_SECONDS:
            left_out[f"unreadable or not 0.1 to {MAX_SECONDS} s long"] += 1
        elif not answer:
            left_out["without text"] += 1
        elif len(answer) + repeats > seconds * rate:  # no CTC path: repeats need a blank between
            left_out["with more text than sound"] += 1
        else:
            good.append({**clip, "seconds": seconds, "sound": sound, "answer": answer})
    return good

def encode_batch(model, clips, share=0, seed=0):
    """Frames (T, D) of each clip. A share of the clips has another speed, or noise."""
    def to_features(clip, rng):
        wave = augment(load_audio(clip["audio"]), rng, share, MAX_SECONDS)
        return model.encoder.features(wave)
    rngs = np.random.default_rng(seed).spawn(len(clips))
    return model.encoder.encode(list(THREADS.map(to_features, clips, rngs)))

def encode_once(folder, model, clips, batch_seconds):
    """Give each clip its `frames`: a file of the folder that holds (T, D) in bfloat16. --resume
    encodes only what has no file yet."""
    folder.mkdir(exist_ok=True)
    for clip in clips:
        clip["frames"] = folder / clip["sound"]
    left = [x for x in clips if not x["frames"].exists() or not x["frames"].stat().st_size]
    for batch in tqdm(make_batches(left, batch_seconds), "encoding, once", disable=None):
        for clip, frames in zip(batch, encode_batch(model, batch)):
            frames = frames.to("cpu", torch.bfloat16).view(torch.int16)  # NumPy has no bfloat16
            write_file(clip["frames"], frames.numpy().tobytes())
    for clip in clips:  # a data file's sound would stay in main memory
        del clip["audio"]

def load_batch(model, clips, share=0, seed=0):
    """Frames (T, D) of each clip: read from its file `frames`, or encoded."""
    if "frames" not in clips[0]:
        return encode_batch(model, clips, share, seed)
    read = [torch.from_numpy(np.fromfile(clip["frames"], np.int16)) for clip in clips]
    return [x.view(torch.bfloat16).view(-1, model.encoder.dim).to(model.device) for x in read]

def stream_windows(rows, args, model, val, place):
    """Endless windows of a stream: its number, the position before it, its usable clips."""
    if place["position"]:
        rows.load_state_dict(place["position"])
    iterator, held_out = iter(rows), {clip["name"] for clip in val}
    for number in itertools.count(place["number"]):
        position = rows.state_dict()
        clips = stream_clips(itertools.islice(iterator, WINDOW), args.dataset)
        clips = usable([x for x in clips if x["name"] not in held_out], model, Counter())
        if not clips:
            print(f"train.py: window {number} of the stream has no usable clip", file=sys.stderr)
        silent = no_speech(round(NO_SPEECH * len(clips)), [args.seed, number])
        yield number, position, clips + silent

def file_windows(clips, args, model, place, rank, world):
    """Endless epochs of clips of files. They are encoded once if --augment leaves them as they are
    and all frames fit."""
    seconds = sum(clip["seconds"] for clip in clips)
    clips = clips + no_speech(min(300, round(NO_SPEECH * len(clips))), [args.seed, rank])
    size = seconds * model.encoder.frame_rate * model.encoder.dim * 2 / 1e9
    if not args.augment and size <= args.keep_frames / world:
        encode_once(Path(args.out, f"frames-{rank}-train"), model, clips, args.batch_seconds)
    return ((epoch, None, clips) for epoch in itertools.count(place["number"]))

def make_steps(windows, model, args, place, rank):
    """Endless optimizer steps of this process: the place after each, and its batches. A place is
    the number of the window, the stream's position before it, and the count of its batches that
    are done. Their order depends only on the seed, the rank and that number, so --resume is exact.
    """
    start = place["done"]
    for number, position, clips in windows:
        rng = np.random.default_rng([args.seed, number, rank])
        batches = make_batches(clips, args.batch_seconds, rng)
        for first in range(start, len(batches), args.accumulate):
            done = first + args.accumulate
            seeds = [[args.seed, number, rank, i] for i in range(first, done)]
            loaded = [(load_batch(model, batch, args.augment, seed), batch)
                      for batch, seed in zip(batches[first:done], seeds)]
            yield {"number": number, "position": position, "done": done}, loaded
        start = 0

def prefetch(items):
    """Items of an endless generator. A thread makes the next one in advance."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items)
        while True:
            item, future = future.result(), pool.submit(next, items)
            yield item

def load_data(args, model, rank, world):
    """What this process trains on, a list of clips or a stream; and the clips to validate on."""
    def read(name, split, count):
        if not is_hub_id(name):
            return read_clips(name)
        rows = open_stream(name, split).shuffle(args.seed, buffer_size=WINDOW)
        return list(stream_clips(rows.take(count), name))
    train_name, val_name = HUB_SETS.get(args.dataset, (args.dataset, None))
    if args.val:
        val_name = HUB_SETS.get(args.val, (None, args.val))[1]
    streamed, left_out = is_hub_id(train_name), Counter()
    clips = [] if streamed and val_name else read(train_name, "train", WINDOW)
    if val_name:
        val = read(val_name, "validation", 200)
    else:
        # By a hash of the file's name: if clips are added later, hardly one changes sides
        clips = sorted(clips, key=lambda clip: hashlib.md5(
            Path(clip["name"]).name.encode(errors="backslashreplace")).digest())
        val = clips[:min(50, len(clips) // 10 + 1)]
    held_out = {os.path.realpath(clip["name"]) for clip in val}
    val = usable(val, model, left_out)
    if not val:
        raise InputError(f"{val_name or args.dataset} has no usable clip to validate on; "
                         f"left out: {dict(left_out) or 'nothing'}")
    if streamed:
        print(f"{args.dataset}: a stream, and {len(val)} clips to validate on; left out of them: "
              f"{dict(left_out) or 'nothing'}")
        # The texts are not known yet. In English CTC may use tokens of letters, else every token
        tokens = set(range(len(model.tokenizer))) - set(model.tokenizer.all_special_ids)
        if is_english(clip["text"] for clip in val):
            texts = {token: model.tokenizer.decode(token) for token in tokens}
            tokens = [token for token, x in texts.items() if x.isascii() and x.strip().isalpha()]
        model.set_ctc_tokens(tokens)
        from datasets.distributed import split_dataset_by_node
        rows = open_stream(train_name, "train")
        by = "shards" if rows.num_shards >= world else "examples"
        rows = split_dataset_by_node(rows, rank, world, strategy=by)
        return rows.shuffle(args.seed, buffer_size=1).repeat(None), val  # of files, not of clips
    clips = [clip for clip in clips if os.path.realpath(clip["name"]) not in held_out]
    model.set_ctc_tokens(token for clip in clips for token in model.tokenize_answer(clip["text"]))
    clips = usable(clips[rank::world], model, left_out)
    print(f"{args.dataset}: {sum(clip['seconds'] for clip in clips) / 3600:.2f} h in {len(clips)} "
          f"clips{' for each process' if world > 1 else ''}, and {len(val)} to validate on; left "
          f"out: {dict(left_out) or 'nothing'}")
    if not clips:
        raise InputError(f"{args.dataset} has no usable clip beside those to validate on")
    return clips, val

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

def prepare(model, compiled, checkpointing):
    """Make the decoder ready for training: compiled, or with less memory."""
    if model.device.type == "cpu":  # the backward pass of fused attention is slow there
        model.decoder.set_attn_implementation("eager")
    for layer in model.decoder.base_model.layers:
        if checkpointing:  # keep only the inputs of layers (Chen et al. 2016)
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if compiled:
            layer.compile(dynamic=True)

def matmul_flops(device, dtype):
    """FLOP/s of a plain matrix product, against which MFU is counted."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(repeat(lambda: (a @ b)[0, 0].item(), number=1, repeat=4))

def parameters(module):
    return sum(p.numel() for p in module.parameters())

def model_flops(model, clips, ctc_weight, lm_weight):
    """FLOPs of a step: per position 2 for a frozen weight, 2 more where gradients pass through
    it, 6 for a trained weight."""
    frames = sum(clip["seconds"] for clip in clips) * model.encoder.frame_rate
    positions, words = frames / model.projector.stack, sum(len(c["answer"]) + 1 for c in clips)
    flops, vocabulary = 6 * positions * parameters(model.projector), model.embed.weight.numel()
    if "frames" not in clips[0]:
        flops += 2 * frames * parameters(model.encoder)
    if ctc_weight:
        flops += 4 * positions * len(model.ctc.tokens) * model.embed.weight.shape[1]
    if lm_weight:
        every = positions + words + len(clips) * sum(map(len, model.prompt()))
        body = parameters(model.decoder.base_model) - vocabulary
        flops += every * (4 * body + 6 * parameters(model.lora)) + 4 * words * vocabulary
    return flops

def peak_memory(device):
    """Peak in GB so far: of the GPU, or of this process where Linux tells it, else 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM"))

@torch.no_grad()
def validate(model, clips, phase, batch_seconds):
    """CTC loss and cross-entropy (0 in phase 1) per token of clips with frames, WER of each
    decoding, and the reference and hypothesis of one clip."""
    decodings = DECODINGS if phase == 2 else ("ctc",)
    losses, references, texts = 0, [], {decode: [] for decode in decodings}
    model.eval()
    for batch in make_batches(clips, min(120, batch_seconds)):
        frames, answers = load_batch(model, batch), [clip["answer"] for clip in batch]
        losses += model.loss(frames, answers, 1, phase == 2)[1]
        audio = model.projector(frames)
        references += [clip["text"] for clip in batch]
        for decode in decodings:
            texts[decode] += map(model.detokenize, model.decode(audio, decode))
    model.train()
    losses = losses / sum(len(clip["answer"]) + 1 for clip in clips)
    wers = {decode: corpus_wer(references, texts[decode]) for decode in decodings}
    return losses.tolist(), wers, (references[-1], texts[decodings[-1]][-1])

def plot(out, rows):
    """Draw losses and WER into plot.png, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, style in (("loss", "-"), ("val_loss", ".-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        left.plot(*zip(*points), style, label=name)
    left.set(title="loss per token: CTC, then cross-entropy", xlabel="step", ylim=(0, None))
    for decode in rows[-1]["wer"]:
        wers = [(row["step"], row["wer"][decode]) for row in rows if decode in row.get("wer", ())]
        right.plot(*zip(*wers), ".-", label=decode)
    right.set(title="WER of the validation clips", xlabel="step", ylim=(0, None))
    left.legend()
    right.legend()
    figure.savefig(out / "plot.png", dpi=80)

def schedule(step, steps):
    """Fraction of the peak learning rate: linear warm-up, then a cosine down to a twentieth."""
    warmup = min(100, steps // 2)
    if step <= warmup:
        return step / warmup
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup)))

def best_step(rows):
    """The step of the lowest WER so far; None before the first validation."""
    tested = [row for row in rows if "wer" in row]
    best = min(reversed(tested), key=lambda row: min(row["wer"].values()), default={"step": None})
    return best["step"]

def save(args, model, optimizer, rows, step, places):
    """Write state.pt for --resume; and, if no step was better, what `from_pretrained` reads."""
    if best_step(rows) in (step, None):
        wers = rows[-1].get("wer", {}) if rows else {}
        found = ", ".join(f"{wer:.2%} by {decode}" for decode, wer in wers.items())
        model.save_pretrained(args.out, f"{step} steps. WER of validation clips: {found}")
    state = {"args": vars(args), "step": step, "places": places, "rows": rows,
             "trained": model.trained(), "tokens": list(model.ctc.classes),
             "optimizer": optimizer.state_dict()}
    file = io.BytesIO()
    torch.save(state, file)
    write_file(Path(args.out, "state.pt"), file.getbuffer())

def catch_signals():
    """A list that fills with what asks for a stop; the loop looks at it behind each step. A second
    Ctrl-C stops at once, as the stream may hang."""
    stop = []

    def ask(number, frame):
        if stop and "WORLD_SIZE" not in os.environ:  # torchrun sends each signal twice
            os._exit(128 + number)
        stop.append(number)
        if number == signal.SIGINT:
            with suppress(OSError):
                os.write(2, b"stopping after this step; Ctrl-C again stops at once\n")
        elif number != signal.SIGTERM:  # SIGHUP: the terminal is gone, and print would fail
            sys.stdout = sys.stderr = open(os.devnull, "w")
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, ask)
    return stop

def main(argv=None):
    """Train. Returns the exit status."""
    args, state = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:  # by torchrun
        if torch.cuda.is_available() and args.device != "cpu":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=datetime.timedelta(hours=6))  # of one validation
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # only the first process prints
    print(f"device: {find_device(args.device)}")
    out, log_file = Path(args.out), Path(args.out, "log.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    written = [name for name in ("model.safetensors", "README.md") if (out / name).exists()]
    if written and not args.resume:
        raise InputError(f"{out} holds a {written[0]}, which would be lost: --resume {out} goes on "
                         f"with its run, --init-from {out} starts from it, with another --out")
    if not args.resume:
        for folder in out.glob(f"frames-{rank}-*"):  # of an earlier run
            shutil.rmtree(folder)
    places = state["places"] or [{"number": 0, "position": None, "done": 0}] * world
    if len(places) != world:
        raise InputError(f"{out} was trained by {len(places)} processes, not by {world}")
    rows = state["rows"]  # of the log
    if rank == 0:  # before the long work, as --out may not be writable, or wandb not installed
        write_file(log_file, "".join(json.dumps(row) + "\n" for row in rows))
        if args.wandb:
            import wandb
            wandb.init(project=args.wandb, config=vars(args), dir=out)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32
    model = build_model(args)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, betas=(0.9, 0.95), weight_decay=0, fused=True)
    data, val = load_data(args, model, rank, world)
    if args.resume:
        model.set_ctc_tokens(state["tokens"])
        model.load_state_dict(state["trained"], strict=False)  # in float32
        optimizer.load_state_dict(state["optimizer"])
    elif rank == 0:
        save(args, model, optimizer, rows, 0, places)
        print(f"from here on, python train.py --resume {out} goes on after a stop")
    if rank == 0:
        encode_once(out / "frames-0-val", model, val, args.batch_seconds)
    if isinstance(data, list):
        windows = file_windows(data, args, model, places[rank], rank, world)
    else:
        windows = prefetch(stream_windows(data, args, model, val, places[rank]))
    steps = prefetch(make_steps(windows, model, args, places[rank], rank))
    dtype = model.embed.weight.dtype
    peak = matmul_flops(model.device, dtype) * world
    print(f"{model.config['encoder']} -> {sum(p.numel() for p in learned) / 1e6:.2f}M trained "
          f"-> {model.config['decoder']}, {dtype}, {model.device} x {world} at {peak / 1e12:.2f} "
          f"TFLOP/s, {len(model.ctc.tokens)} CTC tokens")

    def say(text):
        with suppress(BrokenPipeError):  # a Ctrl-C ends `| tee`, too
            print(text)

    def log(row):
        rows.append(row)
        if rank == 0:
            with open(log_file, "a") as file:
                file.write(json.dumps(row) + "\n")
            if args.wandb:
                wandb.log(row, step=row["step"])

    recent, since = [], time.perf_counter()  # steps since the last log line, and its time
    place, stop, bad_steps = places[rank], catch_signals(), 0
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
        try:
            place, batches = next(steps)
        except InputError:  # such as a broken stream
            if world == 1:  # the places of others are not known here
                save(args, model, optimizer, rows, step - 1, [place])
            raise
        clips = [clip for _, batch in batches for clip in batch]

        # Forward and backward. Losses are sums over tokens; the gradient is divided at the end
        torch.manual_seed(args.seed + step * world + rank)  # --resume drops out the same units
        tokens = sum(len(clip["answer"]) + 1 for clip in clips)
        seconds, flops = sum(x["seconds"] for x in clips), model_flops(model, clips, *weights)
        losses = torch.zeros(2, device=model.device)  # CTC, cross-entropy
        for frames, batch in batches:
            answers = [clip["answer"] for clip in batch]
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                loss, parts = model.loss(frames, answers, *weights)
            loss.backward()
            losses += parts
        stopped = len(stop)
        with_grad = [p for p in learned if p.grad is not None]  # phase 1 leaves the LoRA out
        if world > 1:
            sums = torch.tensor([tokens, seconds, flops, stopped], device=model.device)
            for x in (sums, losses, *(p.grad for p in with_grad)):
                dist.all_reduce(x)
            tokens, seconds, flops, stopped = sums.tolist()
        for p in with_grad:
            p.grad /= tokens

        # Limit the gradient to norm 1, and step
        norm = torch.nn.utils.clip_grad_norm_(with_grad, 1.0).item()
        bad_steps = 0 if math.isfinite(norm) else bad_steps + 1
        if not bad_steps:
            optimizer.step()
            recent.append((tokens, seconds, flops, losses))
        else:
            print(f"train.py: step {step} is skipped, its loss or gradient is not finite: "
                  + ", ".join(clip["name"] for clip in clips), file=sys.stderr)
            if bad_steps == 5:
                raise InputError(f"five bad steps in a row: lower --lr; {out} has the checkpoint")
        optimizer.zero_grad()

        # Log
        check = step == end or step % args.eval_every == 0 or stopped
        if recent and (check or step % args.log_every == 0):
            elapsed = time.perf_counter() - since
            tokens, seconds, flops, losses = map(sum, zip(*recent))
            ctc, lm = (losses / tokens).tolist()
            row = {"step": step, "phase": phase, "epoch": place["number"],  # or window of a stream
                   "loss": ctc if phase == 1 else lm, "ctc": ctc, "lr": lr, "norm": norm,
                   "x_real_time": seconds / elapsed, "mfu": flops / elapsed / peak,
                   "memory_gb": peak_memory(model.device),
                   "minutes_left": (end - step) * elapsed / len(recent) / 60}  # of the phase
            say(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
            log(row)
            recent, since = [], time.perf_counter()

        # Validate and save
        if check:
            places = [place] * world
            if world > 1:
                dist.all_gather_object(places, place)
        if check and rank == 0:  # the other processes wait in all_reduce
            if not stopped:
                with torch.compiler.set_stance("force_eager"):  # decoding has other shapes
                    (ctc, lm), wers, texts = validate(model, val, phase, args.batch_seconds)
                model.config["decode"] = min(wers, key=wers.get)
                log({"step": step, "phase": phase, "val_loss": ctc if phase == 1 else lm,
                     "val_ctc": ctc, "wer": wers})
                plot(out, rows)
                found = ", ".join(f"{100 * wer:.1f} % {name}" for name, wer in wers.items())
                say(f"step {step}/{total} val_loss {rows[-1]['val_loss']:.4g}, WER of {len(val)} "
                    f"clips: {found}; best: step {best_step(rows)}\n"
                    f"    ref: {texts[0]}\n    hyp: {texts[1]}")
            save(args, model, optimizer, rows, step, places)
            since = time.perf_counter()
        if stopped:
            say(f"stopped after step {step}: python train.py --resume {out} goes on")
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
