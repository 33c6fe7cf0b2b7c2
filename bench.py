"""How fast, and what a run costs.

    python bench.py                                               the bundled model, here
    python bench.py --random --encoder hubert --decoder qwen3-8b  this pair, with random weights
    python bench.py --plan --encoder hubert --decoder qwen3-8b    memory, hours, dollars of a run

The fastest of four runs, in seconds of sound per second. Training has its frames ready. MFU is the
share of this device's own matrix products.
"""
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from timeit import repeat

import numpy as np
import torch
import transformers as hf
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data import SAMPLE_RATE, load_audio, make_batches, read_clips, run
from tinyaudio import Encoder, Projector, TinyAudio, fetch, find_device
from train import matmul_flops, model_flops, parameters, peak_memory, prepare

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
GPUS = {  # GB, GB/s and dense bf16 TFLOP/s of the data sheet, usual rent in USD per hour
    "RTX 4090": (24, 1008, 165, 0.45),
    "A40": (48, 696, 150, 0.50),
    "A100": (80, 2039, 312, 1.60),
    "H100": (80, 3350, 989, 2.80),
}

def random_pair(args, device):
    """Encoder and decoder in bfloat16 with random weights, made on the device."""
    heard, spoken = [CONFIGS.get(name) or fetch(hf.AutoConfig.from_pretrained, name)
                     for name in (args.encoder, args.decoder)]
    with torch.device(device):
        whisper = heard.model_type == "whisper"
        encoder = WhisperEncoder(heard) if whisper else hf.AutoModel.from_config(heard)
        decoder = hf.AutoModelForCausalLM.from_config(spoken, dtype=torch.bfloat16)
    return encoder.bfloat16(), decoder

def plan(args):
    """Print what training takes. The backbones are on the meta device: they have no weights."""
    encoder, decoder = random_pair(args, "meta")
    projector = Projector(encoder.config.hidden_size, decoder.config.hidden_size)
    linear = [layer for layer in decoder.base_model.modules() if isinstance(layer, nn.Linear)]
    width_in = sum(layer.in_features for layer in linear)
    width_out = sum(layer.out_features for layer in linear)
    n_encoder, n_projector, n_decoder = map(parameters, (encoder, projector, decoder))
    n_lora = args.lora_rank * (width_in + width_out)
    trained = n_projector + n_lora
    vocabulary = decoder.get_input_embeddings().weight.numel()
    body = parameters(decoder.base_model) - vocabulary
    # Of a second of sound: 10 frames, 3.3 tokens, 3 positions of the prompt
    seconds, rate, layers = args.batch_seconds[0], 10 + 3.3 + 3, decoder.config.num_hidden_layers
    # Bytes: an output of a linear layer leaves about 4.2, a logit 10, LoRA keeps inputs too. CTC
    # has about half of the vocabulary: its embeddings in bfloat16, and logits in float32.
    per_position = 4.23 * width_out + (2 * width_in if n_lora else 0)
    flops_per_weight = 4
    if args.checkpointing:  # one layer and the inputs of all are kept, and layers run again
        per_position = per_position / layers + 2 * layers * decoder.config.hidden_size
        flops_per_weight = 6
    memory = {"frozen weights": 2 * (n_encoder + n_decoder),
              "trained, AdamW": 16 * trained,
              "activations": seconds * (rate * per_position + 33 * decoder.config.vocab_size),
              "CTC": (seconds * 10 * 4 * decoder.config.vocab_size + 2 * vocabulary) / 2,
              "CUDA": 2e9}
    total, parts = sum(memory.values()), [f"{name} {x / 1e9:.1f}" for name, x in memory.items()]
    flops = 2 * 50 * n_encoder + 6 * 10 * n_projector + 4 * (3.3 + 10 / 2) * vocabulary
    flops += rate * (flops_per_weight * body + 6 * n_lora)
    print(f"{args.encoder} {n_encoder / 1e6:.0f}M -> projector {n_projector / 1e6:.2f}M (hidden "
          f"{projector.hidden}) -> {args.decoder} {n_decoder / 1e6:.0f}M: "
          f"{trained / (n_encoder + trained + n_decoder):.2%} is trained\n"
          f"{total / 1e9:.1f} GB at --batch-seconds {seconds:g}: {', '.join(parts)}\n"
          f"{flops / 1e9:.0f} GFLOP per second of sound in phase 2; 2000 h of sound at 35% MFU and "
          "60 validations, calculated:\n\n"
          "| GPU | x real time | hours | to validate | USD | fits |\n|---|---|---|---|---|---|")
    for name, (gb, bandwidth, teraflops, price) in GPUS.items():
        speed = 0.35 * teraflops * 1e12 / flops
        # 200 clips in 17 batches, greedy and joint, 40 tokens each: all weights are read each time
        validation = 60 * 17 * 2 * 40 * 2 * n_decoder / (bandwidth * 1e9) / 3600
        hours, fits = 2000 / speed + validation, "yes" if total / 1e9 < gb else "no"
        print(f"| {name}, {gb} GB | {speed:.0f} | {hours:.1f} | {validation:.1f} | "
              f"{hours * price:.2f} | {fits} |")

def make_model(args):
    """The pair with random weights, as a `TinyAudio`."""
    encoder, decoder = random_pair(args, find_device(args.device))
    tokenizer = fetch(hf.AutoTokenizer.from_pretrained, "smollm2-135m")
    extractor = (hf.WhisperFeatureExtractor(encoder.config.num_mel_bins)
                 if isinstance(encoder, WhisperEncoder) else hf.Wav2Vec2FeatureExtractor())
    model = TinyAudio(Encoder(encoder, extractor), (decoder, tokenizer)).eval()
    model.set_ctc_tokens(range(len(tokenizer)))
    model.token_limits = lambda audio, *_: [len(clip) // 3 for clip in audio]  # else endless
    return model

def make_clips(model, count):
    """Clips of one to four commands: dicts wave (samples,), seconds, answer, frames (T, D)."""
    commands, clips = read_clips(str(ASSETS / "quickstart" / "test.jsonl")), []
    for i in range(count):
        said = commands[i % 80:i % 80 + 1 + i % 4]
        wave = np.concatenate([load_audio(command["audio"]) for command in said])
        answer = model.tokenize_answer(" ".join(command["text"] for command in said))
        clips.append({"wave": wave, "seconds": len(wave) / SAMPLE_RATE, "answer": answer,
                      "frames": model.encoder([wave])[0]})
    return clips

def train(model, clips, name):
    """Forward and backward of B clips with frames, by the loss of a phase: CTC, or cross-entropy
    alone. Returns the loss, a sum over tokens."""
    dtype, answers = model.embed.weight.dtype, [clip["answer"] for clip in clips]
    frames = [clip["frames"] for clip in clips]
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        loss, _ = model.loss(frames, answers, "phase 1" in name, "phase 2" in name)
    loss.backward()
    model.zero_grad()
    return loss.item()

def decode(model, clips, name):
    """Encode B clips and decode them as `name` says; greedy is `generate` of transformers."""
    audio = model.encode([clip["wave"] for clip in clips])
    if name != "encoder":
        model.decode(audio, name)
    return audio[-1].sum().item()  # waits for the device

def measure(args):
    """Print a table of decoding and training speeds."""
    model = make_model(args) if args.random else TinyAudio.from_pretrained(args.model, args.device)
    cuda, dtype = model.device.type == "cuda", model.embed.weight.dtype
    gpu = torch.cuda.get_device_name(model.device) if cuda else "CPU"
    peak = matmul_flops(model.device, dtype)
    clips = sorted(make_clips(model, args.clips), key=lambda clip: -clip["seconds"])
    print("{encoder} -> {decoder}: ".format(**model.config)
          + f"{len(clips)} clips, {dtype}, {gpu}, {peak / 1e12:.3f} TFLOP/s\n\n"
          "| | x real time | loss | MFU | GB |\n|---|---|---|---|---|")

    def show(run, name, size, batches):
        """Time run(model, clips, name) of all batches and print the row."""
        if cuda:
            torch.cuda.reset_peak_memory_stats(model.device)
        losses, heard, loss, mfu = [], sum(batches, []), "", ""
        once = lambda: losses.append(sum(run(model, clips, name) for clips in batches))
        try:
            with torch.compiler.set_stance("default" if "--compile" in name else "force_eager"):
                elapsed = min(repeat(once, number=1, repeat=4))
        except torch.OutOfMemoryError:
            model.zero_grad()
            return print(f"| {name}, {size} | out of memory | | | |", flush=True)
        speed = sum(clip["seconds"] for clip in heard) / elapsed
        if run == train:
            flops = model_flops(model, heard, "phase 1" in name, "phase 2" in name) / elapsed
            mfu = f"{flops / peak:.0%}"
            loss = f"{losses[0] / sum(len(clip['answer']) + 1 for clip in heard):.3f}"
        memory = peak_memory(model.device)
        print(f"| {name}, {size} | {speed:.1f} | {loss} | {mfu} | {memory:.1f} |", flush=True)

    for size in args.batch:
        some = clips[::max(1, len(clips) // max(size, 4))]  # of all lengths
        batches = [some[i:i + size] for i in range(0, len(some), size)]
        for how in ("encoder", "greedy", "joint"):
            show(decode, how, f"batch {size}", batches)
    prepare(model, True, args.checkpointing)
    for size in args.batch_seconds:
        for name in "phase 1", "phase 2, --compile", "phase 2":
            show(train, name, f"{size:g} s", make_batches(clips, size))

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ASSETS / "default"), help="folder of a checkpoint")
    add("--plan", action="store_true", help="calculate 2000 h of training")
    add("--random", action="store_true", help="measure the pair")
    add("--encoder", default="hubert", help="of --random and --plan")
    add("--decoder", default="qwen3-8b", help="of --random and --plan")
    add("--clips", type=int, default=32, help="clips that are measured")
    add("--batch", type=int, nargs="+", default=[1, 8, 32], help="clips decoded at once")
    add("--batch-seconds", type=float, nargs="+", default=[120], help="of a batch in training")
    add("--checkpointing", action="store_true")
    add("--lora-rank", type=int, default=0, help="of --plan")
    add("--device", help="cuda, mps or cpu; default: the best that is here")
    args = parser.parse_args(argv)
    if min(args.clips, *args.batch, *args.batch_seconds) <= 0:
        parser.error("--clips, --batch and --batch-seconds must be above 0")
    if args.lora_rank and not args.plan:
        parser.error("--lora-rank is for --plan: what is measured has the rank of its checkpoint")
    return plan(args) if args.plan else measure(args)

if __name__ == "__main__":
    run(main)
