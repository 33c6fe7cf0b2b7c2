"""Toy backbones: the real classes with small random weights, saved to folders as `from_pretrained` expects them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers as hf
from tokenizers import ByteLevelBPETokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

@pytest.fixture(scope="session", autouse=True)
def cache():
    """A cache folder of our own, so that the embedded backbones are converted anew."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TINYAUDIO_CACHE"] = folder
        yield Path(folder)


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SENTENCES = ["turn on the light", "set a timer for two minutes", "what is three plus four", "call anna at six"]


def toy_tokenizer():
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES * 10, vocab_size=320, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return hf.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>",
                                      chat_template=CHAT_TEMPLATE)


WAV2VEC2 = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
                num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
LARGE = dict(WAV2VEC2, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
WHISPER = dict(d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
               encoder_ffn_dim=64, decoder_ffn_dim=64)
LLAMA = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, bos_token_id=0, eos_token_id=2, pad_token_id=2)
ENCODERS = {
    "whisper": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
    "hubert": lambda: hf.HubertForCTC(hf.HubertConfig(**LARGE)),
    "hubert-base": lambda: hf.HubertModel(hf.HubertConfig(**WAV2VEC2)),
    "wav2vec2": lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**LARGE)),
    "wavlm": lambda: hf.WavLMModel(hf.WavLMConfig(**LARGE)),
}
DECODERS = {
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA, head_dim=8)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**LLAMA)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
}


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """name -> folder of each toy backbone."""
    root = tmp_path_factory.mktemp("toys")
    torch.manual_seed(0)
    for name, build in {**ENCODERS, **DECODERS}.items():
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():  # the usual 0.02 would leave all frames and all tokens alike
                if parameter.ndim > 1:
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
        model.save_pretrained(root / name)
        if name == "whisper":
            hf.WhisperFeatureExtractor().save_pretrained(root / name)
        elif name in ENCODERS:
            hf.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(root / name)
        else:
            toy_tokenizer().save_pretrained(root / name)
    folders = {name: str(root / name) for name in {**ENCODERS, **DECODERS}}
    return {**folders, "whisper-own": whisper_with_tokenizer(root / "whisper-own")}


def whisper_with_tokenizer(folder):
    """A Whisper that can be run with its own decoder."""
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES * 10, vocab_size=320, special_tokens=special)
    hf.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=special[0], pad_token=special[0]).save_pretrained(folder)
    hf.WhisperFeatureExtractor().save_pretrained(folder)
    ends = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0, decoder_start_token_id=1)
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER, vocab_size=320, **ends))
    model.generation_config = hf.GenerationConfig(**ends, is_multilingual=True, lang_to_id={"<|en|>": 2}, task_to_id={"transcribe": 3},
                                                  no_timestamps_token_id=4, max_length=448)
    model.save_pretrained(folder)
    return str(folder)


def tone(seconds, seed=0):
    """A wave (samples,) with some life in it: a wandering tone and noise."""
    rng = np.random.default_rng(seed)
    size = int(seconds * 16_000)
    pitch = np.interp(np.arange(size), np.arange(0, size + 1600, 1600), rng.uniform(100, 900, size // 1600 + 2)[:len(range(0, size + 1600, 1600))])
    return (0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000) + 0.02 * rng.standard_normal(size)).astype(np.float32)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A .jsonl of 24 short clips and a 25th that is not audio."""
    root = tmp_path_factory.mktemp("data")
    lines = []
    for i in range(24):
        soundfile.write(root / f"{i}.wav", tone(1 + i % 5 / 4, i), 16_000)
        lines.append(f'{{"audio": "{i}.wav", "text": "{SENTENCES[i % 4]}"}}')
    (root / "broken.wav").write_text("this is no audio")
    lines.append('{"audio": "broken.wav", "text": "never heard"}')
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")
    return str(root / "train.jsonl")


@pytest.fixture(scope="session")
def train_flags(toys, dataset):
    """A run of a few steps of each phase."""
    return ["--encoder", toys["whisper"], "--decoder", toys["llama"], "--dataset", dataset, "--ctc-steps", 8, "--steps", 8,
            "--batch-seconds", 6, "--accumulate", 2, "--warmup", 2, "--ctc-lr", 1e-3, "--lr", 5e-3, "--log-every", 1, "--eval-every", 4,
            "--val-clips", 3, "--lora-rank", 2, "--no-speech", 0.1, "--device", "cpu"]


@pytest.fixture(scope="session")
def trained(train_flags, tmp_path_factory):
    """Folder of a finished toy run, and the process that made it."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, run("train.py", *train_flags, "--out", out)


def run(script, *arguments, cwd=None, check=True, **options):
    """Run one of the scripts as a user does. Returns the finished process; `check` demands exit status 0."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=cwd or ROOT, text=True,
                          capture_output=True, timeout=900, **options)
    assert "Traceback" not in done.stderr, done.stderr
    assert not check or done.returncode == 0, done.stderr
    return done
