"""Toy backbones: the real classes with small random weights, in folders as a user has them."""

import os
import subprocess
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # before torch is imported

import numpy as np
import pytest
import soundfile
import torch
import transformers as hf
from tokenizers import ByteLevelBPETokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

SENTENCES = ["turn on the light", "set a timer for two minutes", "what is three plus four",
             "call anna at six"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and "
    "not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
IDS = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0, decoder_start_token_id=314)
WAV2VEC2 = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
LARGE = dict(WAV2VEC2, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
WHISPER = dict(IDS, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
               decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=318)
LLAMA = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=320, bos_token_id=0, eos_token_id=2, pad_token_id=2)
TOYS = {  # name -> class, configuration
    "whisper": (hf.WhisperForConditionalGeneration, hf.WhisperConfig(**WHISPER)),
    "hubert": (hf.HubertForCTC, hf.HubertConfig(**LARGE)),
    "hubert-base": (hf.HubertModel, hf.HubertConfig(**WAV2VEC2)),
    "wav2vec2": (hf.Wav2Vec2Model, hf.Wav2Vec2Config(**LARGE)),
    "wavlm": (hf.WavLMModel, hf.WavLMConfig(**LARGE)),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**LLAMA, head_dim=8)),
    "smollm3": (hf.SmolLM3ForCausalLM, hf.SmolLM3Config(**LLAMA)),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
}

@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Where the embedded backbones are converted, once for all tests."""
    os.environ.setdefault("TINYAUDIO_CACHE", str(tmp_path_factory.mktemp("cache")))
    return Path(os.environ["TINYAUDIO_CACHE"])

@pytest.fixture(scope="session")
def embedded(cache):
    """Folders of the embedded pair. If it cannot be had, the test is skipped and says why."""
    import offline
    try:
        return [offline.folder(name) for name in offline.PACKAGES]
    except offline.InputError as error:
        pytest.skip(str(error))

@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """name -> folder of each toy backbone. "whisper-own" has a decoder that can be run, too."""
    root = tmp_path_factory.mktemp("toys")
    bpe = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(SENTENCES * 10, vocab_size=314, special_tokens=special)
    torch.manual_seed(0)
    for name, (kind, config) in TOYS.items():
        model, folder = kind(config), str(root / name)
        for weight in model.parameters():  # the usual 0.02 would leave all frames and tokens alike
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, 0, weight[0].numel() ** -0.5)
        model.save_pretrained(folder)
        if name == "whisper":
            hf.WhisperFeatureExtractor().save_pretrained(folder)
            tasks = dict(lang_to_id={"<|en|>": 315}, task_to_id={"transcribe": 316})
            hf.GenerationConfig(**IDS, **tasks, no_timestamps_token_id=317, max_length=40,
                                is_multilingual=True).save_pretrained(folder)
            bpe.save_model(folder)
            special = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
            tokenizer = hf.WhisperTokenizer.from_pretrained(folder, extra_special_tokens=special)
            tokenizer.save_pretrained(folder)
        elif config.model_type in ("hubert", "wav2vec2", "wavlm"):
            hf.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
        else:
            hf.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>",
                                       chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    folders = {name: str(root / name) for name in TOYS}
    return {**folders, "whisper-own": folders["whisper"]}

def tone(seconds, seed=0):
    """A wave (samples,) with some life in it: a wandering tone and noise."""
    rng, size = np.random.default_rng(seed), int(seconds * 16_000)
    knots = np.arange(0, size + 1600, 1600)
    pitch = np.interp(np.arange(size), knots, rng.uniform(100, 900, len(knots)))
    wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000)
    return (wave + 0.02 * rng.standard_normal(size)).astype(np.float32)

@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A .jsonl of 24 short clips and a 25th that is not audio."""
    root = tmp_path_factory.mktemp("data")
    for i in range(24):
        soundfile.write(root / f"{i}.wav", tone(1 + i % 5 / 4, i), 16_000)
    (root / "broken.wav").write_text("this is no audio")
    lines = [f'{{"audio": "{name}.wav", "text": "{SENTENCES[i % 4]}"}}\n'
             for i, name in enumerate([*range(24), "broken"])]
    (root / "train.jsonl").write_text("".join(lines))
    return str(root / "train.jsonl")

@pytest.fixture(scope="session")
def train_flags(toys, dataset):
    """A run of a few steps of each phase."""
    steps = ("--ctc-steps 8 --steps 8 --batch-seconds 6 --accumulate 2 --lr 5e-3 --log-every 1 "
             "--eval-every 4 --lora-rank 2 --device cpu")
    names = ["--encoder", toys["whisper"], "--decoder", toys["llama"], "--dataset", dataset]
    return names + steps.split()

@pytest.fixture(scope="session")
def trained(train_flags, tmp_path_factory):
    """Folder of a finished toy run."""
    import train
    out = tmp_path_factory.mktemp("run") / "out"
    train.main([*train_flags, "--out", str(out)])
    return out

def run(script, *args, check=True, cwd=ROOT, **options):
    """Run one of the scripts as a user does. `check` demands exit status 0."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True, **options)
    assert "Traceback" not in done.stderr, done.stderr
    assert not check or done.returncode == 0, done.stderr
    return done
