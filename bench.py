"""How fast is it? The machine's limit, training, how the cost grows, and decoding, measured side by side in one run.

    python bench.py                         the shipped model on speech of assets/quickstart: a table, and bench.json
    python bench.py --plot bench.png        and a picture (needs matplotlib)

A figure is the median of three runs behind one to warm up, or of as many as --seconds are enough for. The learning rate is
zero, so that all ways of training have to show the same loss, but for those that hear 30 s of padding.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from tinyaudio import SAMPLE_RATE, InputError, TinyAudio, load_audio, make_batches, read_clips
from train import matmul_flops, model_flops, peak_memory

ASSETS = Path(__file__).parent / "assets"


def make_clips(model, count):
    """Clips of 3 to 16 s, one to four commands one after another: dicts wave, padded (to 30 s), answer, and the frames of both."""
    pool, clips = itertools.cycle(read_clips(str(ASSETS / "quickstart" / "test.jsonl"))), []
    for size in itertools.islice(itertools.cycle([1, 4, 2, 1]), count):
        commands = list(itertools.islice(pool, size))
        wave = np.concatenate([load_audio(command["audio"]) for command in commands])
        clip = {"wave": wave, "padded": np.pad(wave, (0, 30 * SAMPLE_RATE - len(wave))),
                "answer": model.tokenize(" ".join(command["text"] for command in commands))}
        clips.append(clip | {f"{kind} frames": model.encoder([clip[kind]])[0][0] for kind in ("wave", "padded")})
    return clips


def measure(run, seconds):
    """Median time of `run`, which has to wait for the device, and what it returned."""
    run()  # compiles what it needs
    times = []
    while len(times) < 3 and sum(times) < seconds:
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def decoder_flops(model, positions=512):
    """FLOP/s of the matrix products in a layer of the decoder, at so many positions."""
    weights = [p for p in model.decoder.base_model.layers[0].parameters() if p.ndim == 2]
    inputs = [torch.randn(positions, weight.shape[1], device=model.device, dtype=weight.dtype) for weight in weights]
    elapsed, _ = measure(lambda: sum(F.linear(x, weight)[0, 0].item() for x, weight in zip(inputs * 20, weights * 20)), 5)
    return 40 * positions * sum(weight.numel() for weight in weights) / elapsed


def logits_everywhere(model, audio, counts, answers):
    """`TinyAudio.lm_loss` as transformers computes it: the vocabulary at every position, most of which have no label."""
    prompts, answers = model.embed_prompt(audio, counts), [answer + [model.tokenizer.eos_token_id] for answer in answers]
    rows = [torch.cat([prompt, model.embed(torch.tensor(answer, device=model.device))]) for prompt, answer in zip(prompts, answers)]
    labels = [torch.tensor([-100] * len(prompt) + answer, device=model.device) for prompt, answer in zip(prompts, answers)]
    return model.decoder(inputs_embeds=pad_sequence(rows, True), labels=pad_sequence(labels, True, -100), num_items_in_batch=1,
                         use_cache=False).loss


def train_epoch(model, optimizer, batches, phase=2, kind="wave frames", everywhere=False):
    """A step for each batch of clips, from their waves or frames. Returns the loss per token."""
    total, dtype = 0.0, model.embed.weight.dtype
    for batch in batches:
        answers, sounds = [clip["answer"] for clip in batch], [clip[kind] for clip in batch]
        frames, lengths = model.encoder(sounds) if "frames" not in kind else (
            pad_sequence(sounds, True), torch.tensor([len(sound) for sound in sounds], device=model.device))
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            loss = (logits_everywhere(model, *model.projector(frames, lengths), answers) if everywhere else
                    model.loss(frames, lengths, answers, ctc_weight=phase == 1, lm_weight=phase == 2)[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    return total / sum(len(clip["answer"]) + 1 for batch in batches for clip in batch)


def reset_peak(device):
    """Let `peak_memory` count from here: what was freed goes back, and Linux forgets the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def transformers_greedy(model, audio, counts):
    """Greedy decoding by `generate` of transformers; answers end where ours do, at an end token, a limit or a loop."""
    prompts, limits, answers = model.embed_prompt(audio, counts), model.token_limits(counts), [[] for _ in audio]
    mask = pad_sequence([torch.ones(len(prompt), device=model.device) for prompt in prompts], True, padding_side="left")
    found = model.decoder.generate(inputs_embeds=pad_sequence(prompts, True, padding_side="left"), attention_mask=mask.long(),
                                   max_new_tokens=max(limits), do_sample=False)
    for answer, tokens, limit in zip(answers, found.tolist(), limits):
        model.extend(answer, tokens, limit)
    return answers


WAYS = {  # name -> a function of a model and a batch that gives the token ids of every clip
    "generate of transformers": transformers_greedy,
    "plain greedy": lambda model, *batch: model.generate(*batch),
    "draft and verify": lambda model, *batch: model.generate(*batch, drafts=model.respell(model.spell(*batch))),
    "joint": lambda model, *batch: model.search(*batch),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "default"), help="folder of a checkpoint")
    parser.add_argument("--clips", type=int, default=32, help="to train on and to decode")
    parser.add_argument("--seconds", type=float, default=8, help="to spend on a figure")
    parser.add_argument("--plot", metavar="PNG", help="draw them, too")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the best there is")
    args, rows = parser.parse_args(), {}

    def row(part, what, seconds, elapsed, note="", base=None):
        """Keep and print how many seconds of sound take a second, and how many times as many that is as in the line `base`."""
        speed = rows.setdefault(part, {})[what] = seconds / elapsed
        print(f"| {part} | {what} | {speed:.1f} | {f'{speed / rows[part][base]:.2f}' if base else ''} | {note} |", flush=True)

    decoding = TinyAudio.load(args.model, args.device)  # with its low-rank update merged
    model = TinyAudio(**json.loads((Path(args.model) / "config.json").read_text()), device=args.device).train()
    model.load_trained(args.model)
    if model.device.type == "cpu":
        model.decoder.set_attn_implementation("eager")  # as train.py does
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    clips, peak = make_clips(model, args.clips), decoder_flops(model)
    waves, answers, lengths = zip(*[(clip["wave"], clip["answer"], len(clip["wave frames"])) for clip in clips])
    seconds = [len(wave) / SAMPLE_RATE for wave in waves]
    print(f"{args.model}, {len(clips)} clips, {sum(seconds):.0f} s, {model.embed.weight.dtype}, {model.device}: {peak / 1e12:.3f} TFLOP/s at the "
          f"decoder's shapes, {matmul_flops(model.device, model.embed.weight.dtype) / 1e12:.3f} at 2048 x 2048\n\n"
          "| | | x real time | ratio | |\n|---|---|---|---|---|")

    ten = [np.resize(wave, 10 * SAMPLE_RATE) for wave in waves[:8]]
    elapsed, _ = measure(lambda: model.encoder(ten)[0].sum().item(), args.seconds)
    need = 2 * model.encoder.frame_rate * sum(p.numel() for p in model.encoder.parameters())
    row("encoder", "clips of 10 s", 10 * len(ten), elapsed, f"limit {peak / need:.0f}")

    buckets = [[clips[i] for i in batch] for batch in make_batches(seconds, 30)]
    size = -(-len(clips) // len(buckets))
    fixed = [clips[i:i + size] for i in range(0, len(clips), size)]
    for layer in model.decoder.base_model.layers:
        layer.compile(dynamic=True)
    for phase, what, batches, how in [
            (1, "all tricks", buckets, {}), (2, "all tricks", buckets, {}), (2, "no --compile", buckets, {}),
            (2, "30 s padding", buckets, {"kind": "padded frames"}), (2, "logits everywhere", buckets, {"everywhere": True}),
            (2, "no length buckets", fixed, {}), (2, "frames not kept", buckets, {"kind": "wave"}),
            (2, "one clip at a time", [[clip] for clip in clips], {}), (2, "naive: without any", fixed, {"kind": "padded", "everywhere": True})]:
        with torch.compiler.set_stance("force_eager" if "compile" in what or "naive" in what else "default"):
            elapsed, loss = measure(lambda: train_epoch(model, optimizer, batches, phase, **how), args.seconds)
        mfu = model_flops(model, lengths, answers, phase == 1, phase == 2, True) / elapsed / peak
        row(f"phase {phase}", what, sum(seconds), elapsed, f"loss {loss:.3f}, MFU {mfu:.0%}", "all tricks")

    for length, count in [(2, 1), (5, 1), (10, 1), (20, 1), (30, 1), (60, 1), (10, 2), (10, 4), (10, 8), (10, 16), (10, 32)]:
        frames = model.encoder([np.resize(waves[0], min(length, 30) * SAMPLE_RATE)])[0][0]
        batch = [{"wave frames": frames.repeat(-(-length // 30), 1), "answer": (answers[0] * 30)[:3 * length]}] * count
        reset_peak(model.device)
        elapsed, _ = measure(lambda: train_epoch(model, optimizer, [batch]), args.seconds)
        row("a step of phase 2", f"{count} x {length} s", count * length, elapsed, f"{elapsed:.2f} s, {peak_memory(model.device):.2f} GB")

    for size in (1, 4, 16):
        batches = [sorted(waves, key=len)[i:i + size] for i in range(0, len(waves), size)]
        for way, decode in WAYS.items():
            elapsed, found = measure(lambda: [ids for batch in batches for ids in decode(decoding, *decoding.listen(batch))], args.seconds)
            first = found if size == 1 and way == next(iter(WAYS)) else first
            row("decoding", f"batch {size}, {way}", sum(seconds), elapsed, f"{sum(map(list.__eq__, found, first))} of {len(waves)} texts equal",
                f"batch 1, {next(iter(WAYS))}")

    Path("bench.json").write_text(json.dumps(rows, indent=2) + "\n")
    if args.plot:
        import matplotlib.pyplot as plt
        names, speeds = zip(*[(f"{part}, {what}", speed) for part in rows for what, speed in rows[part].items()][::-1])
        plt.figure(figsize=(7, 0.2 * len(names))).gca().set(xscale="log", xlabel="seconds of sound a second")
        plt.barh(names, speeds, color="0.4")
        plt.savefig(args.plot, bbox_inches="tight", dpi=70)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"bench.py: {error}")
