"""How fast, and what a run costs.

    python bench.py                                               measures the bundled model here
    python bench.py --plan --encoder hubert --decoder qwen3-8b    memory, hours, dollars of a run

Median of three timed runs after one warm-up, in seconds of sound per second.
"""
import itertools
import statistics
import sys
import timeit
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pad_sequence
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data import SAMPLE_RATE, InputError, load_audio, make_batches, read_clips
from tinyaudio import Projector, TinyAudio, fetch, locate

ASSETS = Path(__file__).parent / "assets"
SMALL = dict(num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
             tie_word_embeddings=True)
CONFIGS = {  # published sizes: known without a network
    "hubert": hf.HubertConfig(hidden_size=1280, num_hidden_layers=48, num_attention_heads=16,
                              intermediate_size=5120, conv_bias=True, feat_extract_norm="layer"),
    "whisper": hf.WhisperConfig(d_model=1280, encoder_layers=32, encoder_attention_heads=20,
                                encoder_ffn_dim=5120, num_mel_bins=128),
    "qwen3-8b": hf.Qwen3Config(num_hidden_layers=36, num_key_value_heads=8,
                               intermediate_size=12288),  # width 4096, 32 heads
    "qwen3-1.7b": hf.Qwen3Config(**SMALL, hidden_size=2048, intermediate_size=6144),
    "qwen3-0.6b": hf.Qwen3Config(**SMALL, hidden_size=1024, intermediate_size=3072),
    "smollm3-3b": hf.SmolLM3Config(),
}
GPUS = {  # memory in GB, dense bf16 TFLOP/s of the data sheet, usual rent in USD per hour
    "RTX 4090": (24, 165, 0.45),
    "A40": (48, 150, 0.50),
    "A100": (80, 312, 1.60),
    "H100": (80, 989, 2.80),
}
PLANNED_MFU = 0.35

def parameters(module):
    return sum(p.numel() for p in module.parameters())

def median_time(run):
    """Seconds that `run` takes, which must wait for the device, and what it returns."""
    result = run()  # compiles what it needs
    return statistics.median(timeit.repeat(run, number=1, repeat=3)), result

def matmul_flops(device, dtype):
    """FLOP/s of a plain matrix product, against which MFU is counted."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_time(lambda: (a @ b)[0, 0].item())[0]

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
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM"))

def plan(args):
    """Print what training takes. The backbones are fake tensors: no weights are loaded."""
    heard, config = [CONFIGS.get(name) or fetch(hf.AutoConfig.from_pretrained, locate(name))
                     for name in (args.encoder, args.decoder)]
    rate, saved = 10 + 3.3 + 3, {}  # positions per second: frames, tokens, prompt of 10 s clips

    def keep(x):
        saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x
    with FakeTensorMode():
        whisper = heard.model_type == "whisper"
        encoder = WhisperEncoder(heard) if whisper else hf.AutoModel.from_config(heard)
        decoder = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        decoder.requires_grad_(False)
        projector = Projector(heard.hidden_size, config.hidden_size)
        x = torch.randn(1, round(args.batch_seconds * rate), config.hidden_size).bfloat16()
        with saved_tensors_hooks(keep, lambda x: x):
            decoder.base_model(inputs_embeds=x.requires_grad_(), use_cache=False)
        for weight in decoder.parameters():  # they are there anyway
            saved.pop(weight.untyped_storage()._cdata, None)
    n_encoder, n_projector, n_decoder = map(parameters, (encoder, projector, decoder))
    logits = 10 * 3.3 * args.batch_seconds * config.vocab_size  # bf16, float32 and gradient
    memory = {"frozen weights": 2 * (n_encoder + n_decoder),
              "projector and AdamW": 16 * n_projector,
              "activations": sum(saved.values()) + logits, "CUDA": 2e9}
    total, parts = sum(memory.values()), [f"{name} {x / 1e9:.1f}" for name, x in memory.items()]
    flops = 2 * 50 * n_encoder + rate * (6 * n_projector + 4 * n_decoder)
    print(f"{args.encoder} {n_encoder / 1e6:.0f}M -> projector {n_projector / 1e6:.2f}M (hidden "
          f"{projector.hidden}) -> {args.decoder} {n_decoder / 1e6:.0f}M: "
          f"{n_projector / (n_encoder + n_projector + n_decoder):.2%} is trained\n"
          f"{total / 1e9:.1f} GB at --batch-seconds {args.batch_seconds:g}: {', '.join(parts)}\n"
          f"{flops / 1e9:.0f} GFLOP per second of sound in phase 2; {args.hours:g} h of sound at "
          f"{PLANNED_MFU:.0%} MFU, calculated:\n\n| GPU | x real time | hours | USD | fits |\n"
          "|---|---|---|---|---|")
    for name, (gb, teraflops, price) in GPUS.items():
        speed = teraflops * 1e12 * PLANNED_MFU / flops
        hours, fits = args.hours / speed, "yes" if total / 1e9 < gb else "no"
        print(f"| {name}, {gb} GB | {speed:.0f} | {hours:.1f} | {hours * price:.2f} | {fits} |")

def make_clips(model, count):
    """Clips of one to four commands: dicts wave, seconds, answer, frames (T, D)."""
    commands, clips = read_clips(str(ASSETS / "quickstart" / "test.jsonl")), []
    for i in range(count):
        said = commands[i % 80:i % 80 + 1 + i % 4]
        wave = np.concatenate([load_audio(command["audio"]) for command in said])
        clips.append({"wave": wave, "seconds": len(wave) / SAMPLE_RATE,
                      "frames": model.encoder([wave])[0][0],
                      "answer": model.tokenize_answer(" ".join(command["text"] for command in said))})
    return clips

def naive_loss(model, frames, lengths, answers):
    """As a first attempt would have it: logits everywhere."""
    prompts = model.embed_prompt(*model.projector(frames, lengths))
    ids = [answer + [model.end] for answer in answers]
    x = pad_sequence([torch.cat([x, model.embed_ids(y)]) for x, y in zip(prompts, ids)], True)
    labels = [torch.tensor([-100] * len(prompt) + y) for prompt, y in zip(prompts, ids)]
    labels = pad_sequence(labels, True, padding_value=-100).to(model.device)
    return model.decoder(inputs_embeds=x, labels=labels, num_items_in_batch=1).loss

def train_epoch(model, batches, phase, naive=False):
    """Forward and backward over the batches, without a step. Returns the loss per token.
    naive: frames are not kept, and every clip is padded to 30 s."""
    total, dtype = 0.0, model.embed.weight.dtype
    for clips in batches:
        answers, frames = ([clip[key] for clip in clips] for key in ("answer", "frames"))
        lengths = torch.tensor(list(map(len, frames)), device=model.device)
        inputs = pad_sequence(frames, True), lengths, answers
        if naive:
            waves = [np.pad(c["wave"], (0, 30 * SAMPLE_RATE - len(c["wave"]))) for c in clips]
            inputs = *model.encoder(waves), answers
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            if naive:
                loss = naive_loss(model, *inputs)
            else:
                loss, _ = model.loss(*inputs, ctc_weight=phase == 1, lm_weight=phase == 2)
        loss.backward()
        model.zero_grad()
        total += loss.item()
    return total / sum(len(clip["answer"]) + 1 for clips in batches for clip in clips)

def measure(args):
    """Print a table of training and decoding speeds."""
    decoding = TinyAudio.from_pretrained(args.model, args.device)
    model = TinyAudio.from_pretrained(args.model, args.device, merge=False).train()
    if model.device.type == "cpu":
        model.decoder.set_attn_implementation("eager")  # as train.py does
    dtype, speeds, clips = model.embed.weight.dtype, {}, make_clips(model, args.clips)
    seconds, peak = [clip["seconds"] for clip in clips], matmul_flops(model.device, dtype)
    print(f"{len(clips)} clips, {sum(seconds):.0f} s, {dtype}, {model.device}, {peak / 1e12:.3f} "
          "TFLOP/s\n\n| | x real time | loss | MFU |\n|---|---|---|---|")
    for layer in model.decoder.base_model.layers:
        layer.compile(dynamic=True)
    buckets = make_batches(clips, 30)
    mixed = [clips[i::len(buckets)] for i in range(len(buckets))]
    for name, phase, batches in [("phase 1", 1, buckets), ("phase 2, --compile", 2, buckets),
                                 ("phase 2", 2, buckets), ("phase 2, naive", 2, mixed)]:
        with torch.compiler.set_stance("default" if "--compile" in name else "force_eager"):
            elapsed, loss = median_time(lambda: train_epoch(model, batches, phase, "naive" in name))
        mfu = model_flops(model, clips, phase == 1, phase == 2) / elapsed / peak
        speeds[name] = sum(seconds) / elapsed
        print(f"| {name} | {speeds[name]:.1f} | {loss:.3f} | {mfu:.0%} |", flush=True)
    waves = sorted((clip["wave"] for clip in clips), key=len)
    for size, how in itertools.product(args.batch, ("greedy", "joint")):
        batches = [waves[i:i + size] for i in range(0, len(waves), size)]
        elapsed, _ = median_time(lambda: [decoding.decode(*decoding.encode(batch), how)
                                          for batch in batches])
        print(f"| {how}, batch {size} | {sum(seconds) / elapsed:.1f} | | |", flush=True)
    print(f"\nphase 2: {speeds['phase 2, --compile'] / speeds['phase 2, naive']:.1f}x naive")

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ASSETS / "default"), help="folder of a checkpoint")
    add("--clips", type=int, default=32, help="to train on and to decode")
    add("--batch", type=int, nargs="+", default=[1, 4, 16], help="clips decoded at once")
    add("--plan", action="store_true", help="calculate a run, with the flags below")
    add("--encoder", default="hubert")
    add("--decoder", default="qwen3-8b")
    add("--hours", type=float, default=2000, help="of sound")
    add("--batch-seconds", type=float, default=120)
    add("--device", help="cuda, mps or cpu; default: the best that is here")
    args = parser.parse_args(argv)
    return plan(args) if args.plan else measure(args)

if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"bench.py: {error}")
