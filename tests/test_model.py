"""The model on toy backbones: equal to transformers, and independent of what else is in a batch."""

import itertools
import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as hf
from conftest import SENTENCES, tone

from data import InputError
from tinyaudio import (DECODINGS, TRANSCRIBE, Projector, TinyAudio, ctc_prefix_extend, find_device,
                       load_decoder, load_encoder)

WAVES = [tone(seconds, i) for i, seconds in enumerate((2.0, 0.05, 3.31, 1.237, 0.9, 2.999))]
SILENCE = 1  # a token that nobody says, whose embedding is the blank of the toy models

def build(toys, decoder="llama", lora=0, few=False):
    """A toy model of full precision. few: its CTC head has three tokens."""
    torch.manual_seed(0)
    model = TinyAudio(toys["whisper"], toys[decoder], lora=lora, device="cpu", dtype=torch.float32)
    model.set_ctc_tokens(sum(map(model.tokenize_answer, SENTENCES), []))
    if few:
        model.ctc.tokens = model.ctc.tokens[[20, 50, 70]]
        model.ctc.classes = {token: i for i, token in enumerate(model.ctc.tokens.tolist(), 1)}
    model.ctc.blank.data = model.embed.weight[SILENCE].clone()
    return model.eval()

def one_line(call, *args):
    """The message of the InputError that a call must raise."""
    with pytest.raises(InputError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)

@pytest.mark.parametrize("name", ["whisper", "hubert", "hubert-base", "wav2vec2", "wavlm"])
def test_frames_are_those_of_transformers_and_do_not_depend_on_the_batch(toys, name):
    """Whisper's at exactly 30 s, where theirs pads nothing."""
    model, waves = hf.AutoModel.from_pretrained(toys[name]).eval(), [*WAVES, tone(30)]
    model = model.encoder if name == "whisper" else model
    extractor = hf.AutoFeatureExtractor.from_pretrained(toys[name])
    inputs = extractor(waves[-1], sampling_rate=16_000, return_tensors="pt")
    encoder = load_encoder(toys[name], "cpu", torch.float32)
    frames = encoder(waves)
    expected = model(**inputs).last_hidden_state[0]
    torch.testing.assert_close(frames[-1], expected, atol=1e-4, rtol=0)
    for wave, clip in zip(WAVES, frames):
        assert abs(len(clip) - 50 * len(wave) / 16_000) <= 1 and clip.std() > 0.1
        torch.testing.assert_close(clip, encoder([wave])[0], atol=1e-4, rtol=0)

def test_backbones_that_cannot_be_had(toys, tmp_path):
    name = "facebook/hubert-xlarge-ls960-ft"  # the tests run without the Hub
    assert name in one_line(load_encoder, "hubert") and name in one_line(load_encoder, name)
    assert "is a llama model, not Whisper" in one_line(load_encoder, toys["llama"])
    for name, device in (("hubert", "gpu"), ("whisper", "cuda:99"), ("llama", "cuda:99")):
        load, folder = load_decoder if name == "llama" else load_encoder, str(tmp_path / name)
        assert "smollm2-135m" in one_line(load, "no-such-name")
        assert str(tmp_path) in one_line(load, str(tmp_path))
        assert f"no device {device}" in one_line(load, toys[name], device)
        shutil.copytree(toys[name], folder)
        weights = safetensors.torch.load_file(f"{folder}/model.safetensors")
        del weights[next(key for key in weights if "layers.1." in key and "q_proj.weight" in key)]
        safetensors.torch.save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
        assert "lacks 1 weights, such as " in one_line(load, folder, "cpu")
    (tmp_path / "llama/chat_template.jinja").unlink()
    assert "no chat template" in one_line(load_decoder, str(tmp_path / "llama"))

def test_decoders_of_another_build_and_big_ones_on_a_cpu(toys, tmp_path, monkeypatch):
    def folder(config):
        target = tmp_path / config.model_type
        hf.AutoTokenizer.from_pretrained(toys["llama"]).save_pretrained(target)
        config.save_pretrained(target)
        return str(target)
    odd = (hf.GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2),
           hf.Gemma3TextConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1))
    for config in odd:
        line = one_line(load_decoder, folder(config))
        assert f"is a {config.model_type} model, which is built otherwise" in line
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    big = folder(hf.Qwen3Config(num_hidden_layers=5, intermediate_size=12288, vocab_size=320))
    assert "1.1 billion parameters" in one_line(load_decoder, big)
    assert "no file named model.safetensors" in one_line(load_decoder, big, "cpu")  # it would run
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert "does not see the GPU that is here" in one_line(find_device)
    assert find_device("cpu").type == "cpu"

def test_hub_downloads_show_their_progress(toys, capsys):
    assert not huggingface_hub.utils.are_progress_bars_disabled()
    load_encoder(toys["whisper"], "cpu")
    assert capsys.readouterr().err == f"loading {toys['whisper']}\n"  # and no bar of weights

def test_greedy_is_plain_whatever_the_generation_config_says(toys, tmp_path):
    shutil.copytree(toys["llama"], tmp_path, dirs_exist_ok=True)
    odd = hf.GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1, suppress_tokens=[5])
    odd.save_pretrained(tmp_path)
    found = [build({**toys, "llama": folder}).transcribe(WAVES, "greedy")
             for folder in (toys["llama"], str(tmp_path))]
    assert found[0] == found[1]

def test_the_prompt_is_kept_with_the_checkpoint(toys, tmp_path):
    model = build(toys)
    model.save_pretrained(tmp_path / "ckpt")
    shutil.copytree(toys["llama"], tmp_path / "llama")
    (tmp_path / "llama/chat_template.jinja").write_text("Today: 2 May. {{ messages[1].content }}")
    config = json.loads((tmp_path / "ckpt/config.json").read_text())
    config["decoder"] = str(tmp_path / "llama")
    (tmp_path / "ckpt/config.json").write_text(json.dumps(config))
    loaded = TinyAudio.from_pretrained(tmp_path / "ckpt", "cpu", torch.float32)
    assert loaded.prompt() == model.prompt()
    assert loaded.prompt("Sum up: <audio>")[0] == loaded.tokenize("Today: 2 May. Sum up: ")

def test_of_a_hub_id_only_the_two_files_are_downloaded(toys, tmp_path, monkeypatch):
    def download(name, allow_patterns):
        hub.mkdir()
        for file in allow_patterns:
            shutil.copy(tmp_path / "ckpt" / file, hub)
        return str(hub)
    hub, model = tmp_path / "hub", build(toys)
    model.save_pretrained(tmp_path / "ckpt")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = TinyAudio.from_pretrained("owner/name", "cpu", torch.float32)
    assert sorted(file.name for file in hub.iterdir()) == ["config.json", "model.safetensors"]
    assert loaded.config == model.config

def test_frozen_parts_are_submodules_that_stay_in_eval(toys):
    pair = load_encoder(toys["whisper"], "cpu"), load_decoder(toys["llama"], "cpu")
    model = TinyAudio(*pair).train()
    assert {"encoder", "decoder", "projector", "ctc", "lora"} == dict(model.named_children()).keys()
    assert model.projector.training
    assert not any(m.training for part in (model.encoder, model.decoder) for m in part.modules())
    assert {name.split(".")[0] for name in model.trained()} == {"projector", "ctc"}
    assert model.to("meta").device.type == "meta"
    assert model.config["encoder"] == toys["whisper"] and model.config["decoder"] == toys["llama"]

def test_size_of_the_trained_part():
    """HuBERT-XL to Qwen3-8B and to SmolLM3-3B, Whisper base to SmolLM2-135M."""
    projectors = [Projector(*widths) for widths in ((1280, 4096), (1280, 2048), (512, 576))]
    assert [projector.hidden for projector in projectors] == [1232, 1536, 1024]
    sizes = [sum(p.numel() for p in projector.parameters()) for projector in projectors]
    assert [round(size / 1e6, 1) for size in sizes] == [12.9, 13.0, 3.2]

def test_stacking_drops_no_frame_and_sound_is_as_loud_as_words(toys):
    model, frames = build(toys), torch.randn(1, 13, 32, requires_grad=True)
    [audio] = model.projector(frames)
    assert audio.shape == (3, 32)
    (audio * torch.randn(3, 32)).sum().backward()
    assert (frames.grad.abs().sum(-1) > 0).all()  # the last three too have a say
    rms = model.embed.weight.square().mean().sqrt().expand(3)
    torch.testing.assert_close(audio.square().mean(-1).sqrt(), rms, rtol=1e-3, atol=0)

def test_prompt_is_the_chat_template_around_the_audio(toys):
    model = build(toys)
    assert "<audio>".join(map(model.tokenizer.decode, model.prompt("Sum up: <audio>"))) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nSum up: <audio><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    model.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "User: {{ messages[0].content }} Assistant:")
    assert model.render(TRANSCRIBE) == "User: Transcribe: <audio> Assistant:"
    model.config["prompt"] = model.render(TRANSCRIBE)
    assert model.prompt() == tuple(map(model.tokenize, ("User: Transcribe: ", " Assistant:")))
    for task in ("Sum up", "<audio> or <audio>"):
        assert "where the sound goes" in one_line(model.prompt, task)

def answers_of(model):
    return [model.tokenize_answer(SENTENCES[i % 4]) for i in range(len(WAVES))]

@pytest.mark.parametrize("decoder", ["qwen3", "smollm3", "llama"])
def test_loss_is_that_of_transformers_clip_by_clip(toys, decoder):
    """Ours leaves out the logits that no label needs, and the mask."""
    model = build(toys, decoder=decoder)
    before, after = model.prompt()
    lm, ctc = 0.0, 0.0
    for wave, clip, answer in zip(WAVES, model.encode(WAVES), answers_of(model)):
        ids = [*answer, model.tokenizer.eos_token_id]
        x = torch.cat([model.embed_ids(before), clip, model.embed_ids(after + ids)])[None]
        labels = torch.tensor([[-100] * (x.shape[1] - len(ids)) + ids])
        lm += model.decoder(inputs_embeds=x, labels=labels).loss.item() * len(ids)
        ctc += model.loss(model.encoder([wave]), [answer])[1][0].item()
    total, parts = model.loss(model.encoder(WAVES), answers_of(model), 0.3)
    found = [total.item(), *parts.tolist()]
    assert found == pytest.approx([lm + 0.3 * ctc, ctc, lm], rel=1e-4)

def paths_of(log_probs):
    """log p of every text (classes) there can be, summed over all paths."""
    totals = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        text = tuple(token for token, _ in itertools.groupby(path) if token)
        log_p = sum(log_probs[frame, token] for frame, token in enumerate(path))
        totals[text] = np.logaddexp(totals.get(text, -np.inf), log_p)
    return totals

@pytest.mark.parametrize("few", [False, True])  # of a few all are said: none is left over
def test_ctc_loss_is_that_of_all_classes_and_so_is_its_gradient(toys, few):
    model, audio = build(toys, few=few), (torch.randn(4, 60, 32) * 0.03).requires_grad_()
    a, b, c = model.ctc.tokens[:3].tolist()
    counts, answers = [60, 50, 40, 3], [[a, b, c], [c, c], [], [c, c]]  # too long counts 0
    clips = [clip[:count] for clip, count in zip(audio, counts)]
    log_probs = model.ctc(audio, model.ctc_words).log_softmax(-1).transpose(0, 1)
    expected = torch.nn.functional.ctc_loss(
        log_probs, torch.tensor([1, 2, 3, 3, 3, 3, 3]), counts, list(map(len, answers)),
        reduction="sum", zero_infinity=True)
    losses = model.ctc_loss(clips, answers), expected
    torch.testing.assert_close(*losses)
    found, gradient = (torch.autograd.grad(loss, audio)[0] for loss in losses)
    assert found.abs().max() > 0.1 and torch.allclose(found, gradient, 1e-3, 1e-3)

def test_phase_1_never_runs_the_decoder_and_only_the_bridge_learns(toys, monkeypatch):
    model = build(toys).train()
    frames = model.encoder(WAVES[2:4])
    for lm_weight, forward in ((0, None), (1, model.decoder.base_model.forward)):
        monkeypatch.setattr(model.decoder.base_model, "forward", forward)
        model.zero_grad()
        model.loss(frames, answers_of(model)[:2], 1, lm_weight)[0].backward()
        for name, p in model.named_parameters():
            learns = p.grad is not None and bool(p.grad.any())
            assert learns == name.startswith(("projector.", "ctc."))

def test_masking_and_dropout_in_training_alone(toys):
    for name in ("mask", "dropout"):
        model = build(toys)
        setattr(model.projector, name, 0.5)
        batch = model.encoder(WAVES[:1]), answers_of(model)[:1]
        assert model.loss(*batch)[0] == model.loss(*batch)[0]
        model.train()
        assert model.loss(*batch)[0] != model.loss(*batch)[0]
        assert not model.encoder.training and not model.decoder.training

@pytest.mark.parametrize("decoder", ["qwen3", "smollm3", "llama"])
def test_greedy_equals_transformers_one_by_one(toys, decoder):
    model = build(toys, decoder=decoder)
    audio, mask = model.encode(WAVES), torch.ones(1, 999)
    for end in (model.end, model.generate(audio)[0][5]):  # none ends, and some end
        model.end = end
        for clip, prompt, answer in zip(audio, model.embed_prompt(audio), model.generate(audio)):
            found = model.decoder.generate(
                inputs_embeds=prompt[None], attention_mask=mask[:, :len(prompt)],
                max_new_tokens=len(clip) + 10, eos_token_id=end, do_sample=False)[0].tolist()
            assert answer == [token for token in found if token != end]

def test_decoding_never_hands_a_strided_view_to_the_last_layer(toys):
    """PyTorch would copy the weights of the layer for every clip of the batch."""
    model, seen = build(toys), []
    model.decoder.get_output_embeddings().register_forward_hook(
        lambda head, inputs, output: seen.append(inputs[0].is_contiguous()))
    audio = model.encode(WAVES)
    model.generate(audio)
    model.joint(audio)
    assert len(seen) > 2 and all(seen)

def test_prefix_scores_sum_over_all_that_begins_with_a_text():
    log_probs = np.log(np.random.default_rng(0).dirichlet(np.ones(4), 5))
    totals, blanks = paths_of(log_probs), log_probs[:, 0].cumsum()
    for text in [(1,), (2, 2), (3, 1, 3), (1, 1, 2)]:
        ends, last = np.stack([np.full(5, -np.inf), blanks], axis=1)[None], 0
        for token in text:
            scores, longer = ctc_prefix_extend(log_probs[None], np.array([0]), ends,
                                               np.array([last]), np.array([[1, 2, 3]]))
            ends, last = longer[:, token - 1], token
        begins = [p for found, p in totals.items() if found[:len(text)] == text]
        assert scores[0, last - 1] == pytest.approx(np.logaddexp.reduce(begins))
        assert np.logaddexp(*ends[0, -1]) == pytest.approx(totals[text])

@pytest.mark.parametrize("weight", [0.3, 0.9])
def test_joint_finds_the_text_of_the_highest_score(toys, weight):
    """A beam that holds everything, against all texts and paths of short sound and 3 tokens."""
    model = build(toys, few=True)
    audio = model.encode([tone(0.5, 7), tone(0.3, 8)])
    found = model.joint(audio, weight, beams=10_000, choices=3)
    for clip, ids in zip(audio, found):
        log_probs, scores = model.ctc(clip, model.ctc_words).log_softmax(-1).detach().numpy(), {}
        for text, ctc in paths_of(log_probs).items():
            text = tuple(model.ctc.tokens[[c - 1 for c in text]].tolist())
            scores[text] = weight * ctc - (1 - weight) * model.lm_loss([clip], [list(text)]).item()
        assert tuple(ids) == max(scores, key=scores.get)
        assert model.joint([clip], weight, beams=10_000, choices=3) == [ids]

def test_what_is_said_is_found_and_aligned(toys):
    model = build(toys)
    a, b, c = model.ctc.tokens[[40, 50, 60]].tolist()
    audio = model.embed_ids([SILENCE, SILENCE, a, SILENCE, b, b, SILENCE, b, c, SILENCE])
    audio += 0.02 * torch.randn(audio.shape)
    both = [audio, audio[:7]]
    assert model.ctc_greedy(both) == [[a, b, b, c], [a, b]]
    # Joint decoding tries what is heard, and not only what the language model expects.
    assert model.joint(both, 0.99, choices=2) == [[a, b, b, c], [a, b]]
    frames, probabilities = model.align(audio, [a, b, b, c])
    assert frames.tolist() in ([2, 4, 7, 8], [2, 5, 7, 8]) and (probabilities > 0.9).all()
    assert (model.align(audio, [a, c, b])[1] < 0.1).any()  # that is not what was said
    assert [len(x) for x in model.align(audio, [a, b] * 9)] == [18, 18]  # too many for it

def test_decode_trusts_ctc_with_silence_and_answers_without_end(toys, monkeypatch):
    model = build(toys)
    a, b, c = model.ctc.tokens[[40, 50, 60]].tolist()
    audio = list(model.embed_ids([[a, b], [SILENCE] * 2, [b, c]]))
    for decode, name in (("greedy", "generate"), ("joint", "joint")):
        monkeypatch.setattr(model, name, lambda audio: [[c, c, c], [a] * 12])
        assert model.decode(audio, decode) == [[c, c, c], [], [b, c]]
    assert model.decode(audio, "ctc") == [[a, b], [], [b, c]]
    assert "ctc, greedy, joint" in one_line(model.decode, audio, "beam")
    model.ctc.tokens = model.ctc.tokens[:0]
    assert "from_pretrained" in one_line(model.decode, audio)

def test_transcribe_takes_one_or_many_of_any_length(toys):
    model, long = build(toys), np.concatenate([tone(20, 1), np.zeros(16_000), tone(20, 2)])
    model.end = model.generate(model.encode(WAVES))[0][5]  # so that some answers end
    texts = {decode: model.transcribe([*WAVES, long], decode) for decode in DECODINGS}
    assert len(set(map(tuple, texts.values()))) == 3
    for decode, expected in texts.items():
        assert [model.transcribe(wave, decode) for wave in [*WAVES, long]] == expected
        assert model.transcribe([], decode) == []
    assert len(texts["ctc"][-1]) > 3 * len(texts["ctc"][2])  # all of it is heard

def test_save_and_load_the_trained_part_alone(toys, tmp_path):
    model = build(toys)
    model.config["decode"] = "ctc"
    model.save_pretrained(tmp_path, notes="It was trained on toys.")
    card, weights = (tmp_path / "README.md").read_text(), [*tmp_path.glob("*.safetensors")]
    assert toys["whisper"] in card and "from_pretrained" in card and "trained on toys." in card
    size = sum(x.numel() for x in model.trained().values())
    assert sum(file.stat().st_size for file in weights) < 2 * size + 5000  # bfloat16
    loaded = TinyAudio.from_pretrained(tmp_path, "cpu", torch.float32)
    torch.testing.assert_close(loaded.trained(), model.trained(), rtol=0.005, atol=1e-6)
    assert loaded.ctc.classes == model.ctc.classes
    assert loaded.config == model.config == json.loads((tmp_path / "config.json").read_text())
    assert loaded.transcribe(WAVES) == loaded.transcribe(WAVES, "ctc")

def test_low_rank_update_starts_as_nothing_and_is_merged(toys, tmp_path):
    plain, model = build(toys), build(toys, lora=4)
    model.projector.load_state_dict(plain.projector.state_dict())
    batch = plain.encoder(WAVES), answers_of(plain)
    expected, loss = plain.loss(*batch)[0], model.loss(*batch)[0]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert len(model.lora) == 14
    for part in model.lora.values():
        assert part.b.grad.any()
        torch.nn.init.normal_(part.b, 0, 0.2)
    model.save_pretrained(tmp_path)
    apart, merged = (TinyAudio.from_pretrained(tmp_path, "cpu", torch.float32, merge=merge)
                     for merge in (False, True))
    losses = [each.loss(*batch)[0].item() for each in (model, apart, merged)]
    assert losses == pytest.approx(losses[:1] * 3, rel=0.005)  # saved in bfloat16
    assert losses[1] == pytest.approx(losses[2], rel=1e-5) and abs(losses[2] - expected) > 1
    trained = {name.split(".")[0] for name, p in merged.named_parameters() if p.requires_grad}
    assert trained == {"projector", "ctc"}
    with pytest.raises(ValueError, match="merged"):
        merged.save_pretrained(tmp_path)

def test_checkpoints_that_cannot_be_used(toys, tmp_path):
    build(toys).save_pretrained(tmp_path)
    config, (weights,) = tmp_path / "config.json", tmp_path.glob("*.safetensors")
    good, data = json.loads(config.read_text()), weights.read_bytes()
    odd = safetensors.torch.save({"odd": torch.zeros(1)})
    configs = {**good, "surprise": 1}, {**good, "hidden": 48}, {**good, "lora": 2}, {"stack": 5}, []
    for text, tensors in (*((json.dumps(bad), data) for bad in configs), ("{", data),
                          *((json.dumps(good), bad) for bad in (data[:1000], b"", odd))):
        config.write_text(text)
        weights.write_bytes(tensors)
        one_line(TinyAudio.from_pretrained, tmp_path)
    weights.unlink()
    one_line(TinyAudio.from_pretrained, tmp_path)
    for name in ("no/such-model", "assets/missing", "whisper-base"):  # a backbone is no checkpoint
        assert name in one_line(TinyAudio.from_pretrained, name)
