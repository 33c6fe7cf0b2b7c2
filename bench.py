"""How fast, and what a run costs.

    python bench.py                                               the bundled model, here
    python bench.py --random --encoder hubert --decoder qwen3-8b  this pair, with random weights
    python bench.py --plan --encoder hubert --decoder qwen3-8b    memory, hours, dollars of a run

The fastest of four runs, in seconds of sound per second.
"""
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from timeit import repeat

import numpy as np
import torch
import transformers as hf
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import tinyaudio
from data import SAMPLE_RATE, load_audio, make_batches, read_clips, run
from tinyaudio import Encoder, Projector, TinyAudio, fetch, find_device

ASSETS = Path(__file__).parent / "assets"
CONFIGS = {  # published sizes: known without a network
    "hubert": hf.HubertConfig(hidden_size=1280, num_hidden_layers=48, num_attention_heads=16,
                              intermediate_size=5120, conv_bias=True, feat_extract_norm="layer"),
    "whisper": hf.WhisperConfig(d_model=1280, encoder_layers=32, encoder_attention_heads=20,
                                encoder_ffn_dim=5120, num_mel_bins=128),
    "qwen3-8b": hf.Qwen3Config(num_hidden_layers=36, num_key_value_heads=8,
                               intermediate_size=12288),  # width 4096, 32 heads
    "smollm3-3b": hf.SmolLM3Config(),
}
GPUS = {  # memory in GB, dense bf16 TFLOP/s of the data sheet, usual rent in USD per hour
    "RTX 4090": (24, 165, 0.45),
    "A40": (48, 150, 0.50),
    "A100": (80, 312, 1.60),
    "H100": (80, 989, 2.80),
}

def parameters(module):
    return sum(p.numel() for p in module.parameters())

def matmul_flops(device, dtype):
    """FLOP/s of a plain matrix product, against which MFU is counted."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(repeat(lambda: (a @ b)[0, 0].item(), number=1, repeat=4))

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

def prepare(model, compiled, checkpointing):
    """Make the decoder ready for training: compiled, or with less memory."""
    if model.device.type == "cpu":  # the backward pass of fused attention is slow there
        model.decoder.set_attn_implementation("eager")
    for layer in model.decoder.base_model.layers:
        if checkpointing:  # keep only the inputs of layers (Chen et al. 2016)
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if compiled:
            layer.compile(dynamic=True)

def peak_memory(device):
    """Peak in GB so far: of the GPU, or of this process where Linux tells it, else 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM"))

def random_pair(args, device):
    """Encoder and decoder in bfloat16 with random weights, made on the device."""
    heard, spoken = [CONFIGS.get(name) or fetch(hf.AutoConfig.from_pretrained, name)
                     for name in (args.encoder, args.decoder)]
    with torch.device(device):
        whisper = heard.model_type == "whisper"
        encoder = WhisperEncoder(heard) if whisper else hf.AutoModel.from_config(heard)
        decoder = hf.AutoModelForCausalLM.from_config(spoken, dtype=torch.bfloat16)
    return encoder.bfloat16().requires_grad_(False).eval(), decoder.requires_grad_(False).eval()

def plan(args):
    """Print what training takes. The backbones are on the meta device: they have no weights."""
    encoder, decoder = random_pair(args, "meta")
    projector = Projector(encoder.config.hidden_size, decoder.config.hidden_size)
    n_encoder, n_projector, n_decoder = map(parameters, (encoder, projector, decoder))
    seconds, rate = args.batch_seconds[0], 10 + 3.3 + 3  # per second: frames, tokens, prompt
    widths = [getattr(layer, "out_features", 0) for layer in decoder.base_model.modules()]
    # An output of a linear layer leaves about 4.2 bytes, a logit 10.
    per_position, flops_per_weight = 4.23 * sum(widths), 4
    if args.checkpointing:  # one layer and the inputs of all are kept, and layers run again
        layers = decoder.config.num_hidden_layers
        per_position = per_position / layers + 2 * layers * decoder.config.hidden_size
        flops_per_weight = 6
    activations = seconds * (rate * per_position + 3.3 * 10 * decoder.config.vocab_size)
    memory = {"frozen weights": 2 * (n_encoder + n_decoder),
              "projector and AdamW": 16 * n_projector, "activations": activations, "CUDA": 2e9}
    total, parts = sum(memory.values()), [f"{name} {x / 1e9:.1f}" for name, x in memory.items()]
    vocabulary = decoder.get_input_embeddings().weight.numel()
    body = parameters(decoder.base_model) - vocabulary
    flops = 2 * 50 * n_encoder + 6 * 10 * n_projector + 4 * 3.3 * vocabulary
    flops += flops_per_weight * rate * body
    print(f"{args.encoder} {n_encoder / 1e6:.0f}M -> projector {n_projector / 1e6:.2f}M (hidden "
          f"{projector.hidden}) -> {args.decoder} {n_decoder / 1e6:.0f}M: "
          f"{n_projector / (n_encoder + n_projector + n_decoder):.2%} is trained\n"
          f"{total / 1e9:.1f} GB at --batch-seconds {seconds:g}: {', '.join(parts)}\n"
          f"{flops / 1e9:.0f} GFLOP per second of sound in phase 2; 2000 h of sound at 35% MFU, "
          "calculated:\n\n| GPU | x real time | hours | USD | fits |\n|---|---|---|---|---|")
    for name, (gb, teraflops, price) in GPUS.items():
        speed = 0.35 * teraflops * 1e12 / flops
        hours, fits = 2000 / speed, "yes" if total / 1e9 < gb else "no"
        print(f"| {name}, {gb} GB | {speed:.0f} | {hours:.1f} | {hours * price:.2f} | {fits} |")

def make_model(args):
    """The pair with random weights, as a `TinyAudio`."""
    encoder, decoder = random_pair(args, find_device(args.device))
    tokenizer = fetch(hf.AutoTokenizer.from_pretrained, "smollm2-135m")
    extractor = (hf.WhisperFeatureExtractor(encoder.config.num_mel_bins)
                 if isinstance(encoder, WhisperEncoder) else hf.Wav2Vec2FeatureExtractor())
    tinyaudio.load_encoder = lambda *_: Encoder(encoder, extractor)
    tinyaudio.load_decoder = lambda *_: (decoder, tokenizer)
    model = TinyAudio(args.encoder, args.decoder).eval()
    model.set_ctc_tokens(range(len(tokenizer)))
    model.token_limits = lambda counts, *_: [n // 3 for n in counts.tolist()]  # else endless
    return model

def make_clips(model, count):
    """Clips of one to four commands: dicts wave (samples,), seconds, answer, frames (T, D)."""
    commands, clips = read_clips(str(ASSETS / "quickstart" / "test.jsonl")), []
    for i in range(count):
        said = commands[i % 80:i % 80 + 1 + i % 4]
        wave = np.concatenate([load_audio(command["audio"]) for command in said])
        answer = model.tokenize_answer(" ".join(command["text"] for command in said))
        clips.append({"wave": wave, "seconds": len(wave) / SAMPLE_RATE, "answer": answer,
                      "frames": model.encoder([wave])[0][0]})
    return clips

def naive_loss(model, frames, lengths, answers):
    """As a first attempt would have it: logits everywhere."""
    prompts = model.embed_prompt(*model.projector(frames, lengths))
    ids = [answer + [model.end] for answer in answers]
    x = pad_sequence([torch.cat([x, model.embed_ids(y)]) for x, y in zip(prompts, ids)], True)
    labels = [torch.tensor([-100] * len(prompt) + y) for prompt, y in zip(prompts, ids)]
    labels = pad_sequence(labels, True, padding_value=-100).to(model.device)
    return model.decoder(inputs_embeds=x, labels=labels, num_items_in_batch=1, use_cache=False).loss

def train(model, clips, name):
    """Forward and backward of B clips, phase 2 without CTC. Returns the loss, a sum over tokens."""
    dtype, naive = model.embed.weight.dtype, "naive" in name
    frames, answers = ([clip[key] for clip in clips] for key in ("frames", "answer"))
    lengths = torch.tensor(list(map(len, frames)), device=model.device)
    inputs = pad_sequence(frames, True), lengths, answers
    if naive:  # 30 s of padding, frames not kept
        waves = [np.pad(c["wave"], (0, 30 * SAMPLE_RATE - len(c["wave"]))) for c in clips]
        inputs = *model.encoder(waves), answers
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        weights = "phase 1" in name, "phase 2" in name
        loss = naive_loss(model, *inputs) if naive else model.loss(*inputs, *weights)[0]
    loss.backward()
    model.zero_grad()
    return loss.item()

def decode(model, clips, name):
    """Encode B clips and decode them as `name` says; greedy is `generate` of transformers."""
    audio, counts = model.encode([clip["wave"] for clip in clips])
    if name != "encoder":
        model.decode(audio, counts, name)
    return counts.sum().item()  # waits for the device

def measure(args):
    """Print a table of decoding and training speeds."""
    model = make_model(args) if args.random else TinyAudio.from_pretrained(args.model, args.device)
    cuda, dtype = model.device.type == "cuda", model.embed.weight.dtype
    gpu = torch.cuda.get_device_name() if cuda else "CPU"
    peaks = [matmul_flops(model.device, dtype)]
    peaks += [1e12 * teraflops for name, (_, teraflops, _) in GPUS.items()
              if re.search(rf"\b{name}\b", gpu)]
    clips, speeds = sorted(make_clips(model, args.clips), key=lambda clip: -clip["seconds"]), {}
    print(f"{len(clips)} clips, {dtype}, {gpu}, {', '.join(f'{x / 1e12:.3f}' for x in peaks)} "
          "TFLOP/s\n\n| | x real time | loss | MFU | GB |\n|---|---|---|---|---|")

    def show(run, name, size, batches):
        """Time run(model, clips, name) of all batches and print the row."""
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        losses, heard, loss, mfu = [], sum(batches, []), "", ""
        with torch.compiler.set_stance("default" if "--compile" in name else "force_eager"):
            elapsed = min(repeat(lambda: losses.append(sum(run(model, x, name) for x in batches)),
                                 number=1, repeat=4))
        speed = sum(clip["seconds"] for clip in heard) / elapsed
        if run == train:
            flops = model_flops(model, heard, "phase 1" in name, "phase 2" in name) / elapsed
            mfu = ", ".join(f"{flops / peak:.0%}" for peak in peaks)
            loss = f"{losses[0] / sum(len(clip['answer']) + 1 for clip in heard):.3f}"
        memory = peak_memory(model.device)
        print(f"| {name}, {size} | {speed:.1f} | {loss} | {mfu} | {memory:.1f} |", flush=True)
        speeds.setdefault(name, speed)

    for size in args.batch:
        some = clips[::max(1, len(clips) // max(size, 4))]  # of all lengths
        batches = [some[i:i + size] for i in range(0, len(some), size)]
        for how in ("encoder", "greedy", "joint"):
            show(decode, how, f"batch {size}", batches)
    prepare(model, True, args.checkpointing)
    for size in args.batch_seconds:
        for name in "phase 1", "phase 2, --compile", "phase 2", "phase 2, naive":
            if "naive" not in name or size == args.batch_seconds[0]:
                show(train, name, f"{size:g} s", make_batches(clips, size))
    print(f"\nphase 2: {speeds['phase 2, --compile'] / speeds['phase 2, naive']:.1f}x naive")

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ASSETS / "default"), help="folder of a checkpoint")
    add("--plan", action="store_true", help="calculate 2000 h of training")
    add("--random", action="store_true", help="measure the pair")
    add("--encoder", default="hubert")
    add("--decoder", default="qwen3-8b")
    add("--clips", type=int, default=32)
    add("--batch", type=int, nargs="+", default=[1, 8, 32], help="clips decoded at once")
    add("--batch-seconds", type=float, nargs="+", default=[120])
    add("--checkpointing", action="store_true")
    add("--device", help="cuda, mps or cpu; default: the best that is here")
    args = parser.parse_args(argv)
    return plan(args) if args.plan else measure(args)

if __name__ == "__main__":
    run(main)
