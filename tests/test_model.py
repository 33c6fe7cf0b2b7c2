"""The model on toy backbones: parity with transformers, and results that do not depend on the batch."""

import itertools
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as hf
from conftest import SENTENCES, tone
from torch.nn.utils.rnn import pad_sequence

from tinyaudio import (DRAFTED, CTCHead, InputError, Projector, TinyAudio, length_mask, load_decoder, load_encoder, loop_length, prefix_extend, prefix_start,
                       realign)

WAVES = [tone(seconds, i) for i, seconds in enumerate((2.0, 0.05, 3.31, 1.237, 0.9, 2.999))]


def build(toys, encoder="whisper", decoder="llama", **options):
    torch.manual_seed(0)
    model = TinyAudio(toys[encoder], toys[decoder], device="cpu", dtype=torch.float32, **options)
    model.spell_with(SENTENCES)
    with torch.no_grad():
        model.ctc.blank.normal_(0, 0.1)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------- encoder


@pytest.mark.parametrize("name", ["whisper", "hubert", "hubert-base", "wav2vec2", "wavlm"])
def test_frames_do_not_depend_on_the_batch(toys, name):
    encoder = load_encoder(toys[name], "cpu", torch.float32)
    frames, lengths = encoder(WAVES)
    assert frames.std() > 0.1
    for wave, clip, length in zip(WAVES, frames, lengths.tolist()):
        alone, (length_alone,) = encoder([wave])
        assert length == length_alone and abs(length - 50 * len(wave) / 16_000) <= 1
        torch.testing.assert_close(clip[:length], alone[0], atol=1e-4, rtol=0)
        assert not clip[length:].any()


def test_whisper_frames_equal_those_of_transformers_where_both_run(toys):
    """At exactly 30 s there is nothing to pad, so the two must agree."""
    encoder = load_encoder(toys["whisper"], "cpu", torch.float32)
    reference = hf.WhisperModel.from_pretrained(toys["whisper"]).encoder.eval()
    mel = hf.WhisperFeatureExtractor()(tone(30), sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        expected = reference(mel).last_hidden_state
    torch.testing.assert_close(encoder([tone(30)])[0], expected, atol=1e-5, rtol=0)


def test_hubert_frames_equal_those_of_transformers(toys):
    wave = tone(2)
    encoder = load_encoder(toys["hubert"], "cpu", torch.float32)
    reference = hf.HubertModel.from_pretrained(toys["hubert"]).eval()
    values = torch.from_numpy((wave - wave.mean()) / np.sqrt(wave.var() + 1e-7))[None]
    with torch.no_grad():
        torch.testing.assert_close(encoder([wave])[0], reference(values).last_hidden_state, atol=1e-4, rtol=0)


def test_a_clip_longer_than_whispers_positions_is_refused(toys):
    with pytest.raises(InputError, match="31.0 s"):
        load_encoder(toys["whisper"], "cpu")([tone(31)])


def test_names_that_lead_nowhere(toys, tmp_path):
    with pytest.raises(InputError, match="whisper-base"):
        load_encoder("no-such-name")
    with pytest.raises(InputError, match="embedded pair"):
        load_encoder("facebook/hubert-xlarge-ls960-ft")  # the tests run without the Hub
    with pytest.raises(InputError, match="not an audio encoder"):
        load_encoder(toys["llama"])
    with pytest.raises(InputError, match="nothing usable"):
        load_decoder(str(tmp_path))
    shutil.copytree(toys["llama"], tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "logits_scaling": 8.0}))
    with pytest.raises(InputError, match="plain logits .logits_scaling"):
        load_decoder(str(tmp_path / "odd"))
    with pytest.raises(InputError, match="no device gpu"):
        load_encoder(toys["whisper"], "gpu")


@pytest.mark.parametrize("name, load", [("whisper", load_encoder), ("hubert", load_encoder), ("llama", load_decoder)])
def test_weights_that_are_not_there_are_not_made_up(toys, tmp_path, name, load):
    shutil.copytree(toys[name], tmp_path / "a")
    weights = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")
    lost = next(key for key in weights if "layers.1." in key and key.endswith("fc1.weight" if name == "whisper" else "q_proj.weight"))
    safetensors.torch.save_file({key: weights[key] for key in weights if key != lost}, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 weights of a .*layers.1"):
        load(str(tmp_path / "a"), "cpu")


# -------------------------------------------------------------------------------------------------------- projector


@pytest.mark.parametrize("decoder, hidden, millions", [
    (hf.Qwen3Config(hidden_size=4096), 1232, 12.9), (hf.SmolLM3Config(hidden_size=2048), 1536, 13.0)])
def test_size_of_the_trained_part(decoder, hidden, millions):
    """HuBERT-XL (width 1280) to Qwen3-8B and to SmolLM3-3B."""
    encoder = hf.HubertConfig(hidden_size=1280)
    with torch.device("meta"):
        trained = Projector(encoder.hidden_size, decoder.hidden_size), CTCHead(decoder.hidden_size)
    assert trained[0].hidden == hidden
    count = sum(p.numel() for part in trained for p in part.parameters() if p.requires_grad)
    assert round(count / 1e6, 1) == millions
    assert Projector(512, 576).hidden == 1024  # whisper-base to SmolLM2-135M


def test_stacking_drops_no_sound():
    projector = Projector(16, 32).eval()
    frames = torch.randn(1, 13, 16, requires_grad=True)
    audio, counts = projector(frames, torch.tensor([13]))
    assert audio.shape == (1, 3, 32) and counts.tolist() == [3]
    audio.square().sum().backward(torch.tensor(1.0))
    weights = torch.randn(1, 3, 32)
    frames.grad = None
    (projector(frames, torch.tensor([13]))[0] * weights).sum().backward()
    assert (frames.grad.abs().sum(-1) > 0).all()  # every frame, the last three too, has a say


def test_sound_arrives_as_loud_as_words(toys):
    model = build(toys)
    audio, counts = model.projector(*model.encoder(WAVES[:1]))
    rms = model.embed.weight.square().mean().sqrt()
    torch.testing.assert_close(audio.square().mean(-1).sqrt(), rms.expand(1, counts[0]), rtol=1e-3, atol=0)


# --------------------------------------------------------------------------------------------------- prompt and loss


@pytest.mark.parametrize("decoder", ["qwen3", "smollm3", "llama"])
def test_prompt_is_the_chat_template_around_the_audio(toys, decoder):
    model = build(toys, decoder=decoder)
    prefix, suffix = model.prompt()
    text = model.tokenizer.decode(prefix) + "<audio>" + model.tokenizer.decode(suffix)
    assert text == ("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nTranscribe: <audio><|im_end|>\n"
                    "<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_prompt_of_a_template_that_knows_no_system_role(toys):
    model = build(toys)
    model.tokenizer.chat_template = ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
                                     "{{ strftime_now('%d %B') }}User: {{ messages[0].content }} Assistant:")
    prefix, suffix = model.prompt()
    assert model.tokenizer.decode(prefix) == "User: Transcribe: " and model.tokenizer.decode(suffix) == " Assistant:"


@pytest.mark.parametrize("encoder", ["whisper", "hubert"])
@pytest.mark.parametrize("decoder", ["qwen3", "smollm3", "llama"])
def test_lm_loss_equals_the_loss_of_transformers(toys, encoder, decoder):
    """Ours skips the logits that no label needs and the attention mask; theirs computes everything."""
    model = build(toys, encoder, decoder)
    frames, lengths = model.encoder(WAVES)
    answers = [model.tokenize(SENTENCES[i % 4]) for i in range(len(WAVES))]
    total, parts = model.loss(frames, lengths, answers, ctc_weight=0)
    assert total.item() == parts["lm"].item() and parts["ctc"] == 0

    audio, counts = model.projector(frames, lengths)
    expected = 0.0
    for clip, count, answer in zip(audio, counts, answers):
        prefix, suffix = model.prompt()
        ids = answer + [model.tokenizer.eos_token_id]
        embeddings = torch.cat([model.embed(torch.tensor(prefix)), clip[:count], model.embed(torch.tensor(suffix + ids))])
        labels = torch.tensor([-100] * (len(prefix) + int(count) + len(suffix)) + ids)
        expected += model.decoder(inputs_embeds=embeddings[None], labels=labels[None]).loss.item() * len(ids)
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_losses_do_not_depend_on_the_batch(toys):
    model = build(toys)
    answers = [model.tokenize(SENTENCES[i % 4]) for i in range(len(WAVES))]
    _, together = model.loss(*model.encoder(WAVES), answers)
    alone = [model.loss(*model.encoder([wave]), [answer])[1] for wave, answer in zip(WAVES, answers)]
    assert together["lm"].item() == pytest.approx(sum(part["lm"].item() for part in alone), rel=1e-4)
    assert together["ctc"].item() == pytest.approx(sum(part["ctc"].item() for part in alone), rel=1e-4)


def test_ctc_loss_sums_over_all_alignments(toys):
    """Against every path of three frames that spells the two tokens, counted one by one."""
    model = build(toys)
    audio = torch.randn(1, 3, 32) * 0.03
    answer = model.tokenize("turn on")[:2]
    assert len(answer) == 2
    p = model.ctc(audio, model.embed.weight).softmax(-1)[0]
    classes = [model.ctc.tokens.tolist().index(token) + 1 for token in answer]
    paths = [path for path in np.ndindex(3, 3, 3)
             if [x for i, x in enumerate(path) if x and (i == 0 or path[i - 1] != x)] == [1, 2]]
    probability = sum(torch.stack([p[i, [0, *classes][x]] for i, x in enumerate(path)]).prod() for path in paths)
    assert model.ctc_loss(audio, torch.tensor([3]), [answer]).item() == pytest.approx(-probability.log().item(), rel=1e-4)


def test_phase_1_never_runs_the_decoder_and_only_the_bridge_learns(toys, monkeypatch):
    model = build(toys).train()
    answers = [model.tokenize(SENTENCES[0])] * 2
    frames, lengths = model.encoder(WAVES[::2][:2])
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder.base_model, "forward", None)
        model.loss(frames, lengths, answers, ctc_weight=1, lm_weight=0)[0].backward()
    model.loss(frames, lengths, answers, ctc_weight=0.1)[0].backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learning == {name for name, p in model.named_parameters() if name.startswith(("projector.", "ctc."))}
    assert not model.decoder.training and not model.encoder.training and model.projector.training


def test_masking_and_dropout_only_while_training(toys):
    model = build(toys)
    model.projector.mask, model.projector.dropout = 0.5, 0.5
    frames, lengths = model.encoder(WAVES[:1])
    assert torch.equal(model.projector(frames, lengths)[0], model.projector(frames, lengths)[0])
    audio, counts = model.projector(frames, lengths)
    model.word_dropout, answers = 0.5, [model.tokenize(SENTENCES[1])]
    seen = model.lm_loss(audio, counts, answers)
    assert torch.equal(seen, model.lm_loss(audio, counts, answers))
    model.train()
    assert not torch.equal(model.projector(frames, lengths)[0], model.projector(frames, lengths)[0])
    assert not torch.equal(seen, model.lm_loss(audio, counts, answers))


# --------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("decoder", ["qwen3", "smollm3", "llama"])
def test_greedy_decoding_equals_that_of_transformers_in_any_batch(toys, decoder):
    model = build(toys, decoder=decoder)
    audio, counts = model.projector(*model.encoder(WAVES))
    together = model.generate(audio, counts)
    assert len({tuple(answer) for answer in together}) > 1
    for i, (clip, count) in enumerate(zip(audio, counts)):
        prompt = model.embed_prompt(audio[i:i + 1], counts[i:i + 1])[0]
        limit = int(6.5 * count * 0.1 + 10)
        expected = model.decoder.generate(inputs_embeds=prompt[None], attention_mask=torch.ones(1, len(prompt)),
                                          max_new_tokens=limit, do_sample=False)[0].tolist()
        if 2 in expected:
            expected = expected[:expected.index(2)]
        for end in range(1, len(expected) + 1):  # transformers lets loops run
            if loop_length(expected[:end]):
                expected = expected[:end]
                break
        assert together[i] == expected
        assert model.generate(clip[None, :count], counts[i:i + 1]) == [expected]


def test_any_draft_leaves_the_answer_as_it_is_and_a_good_one_saves_passes(toys):
    model = build(toys, decoder="qwen3")
    audio, counts = model.projector(*model.encoder(WAVES))
    plain = model.generate(audio, counts)
    rng = np.random.default_rng(0)
    broken = [[token if rng.random() < 0.7 else int(rng.integers(3, 300)) for token in answer if rng.random() < 0.8] for answer in plain]
    for drafts in (plain, broken, [[5] * 90] * len(WAVES), [[]] + plain[1:], plain[::-1]):
        assert model.generate(audio, counts, drafts=drafts) == plain
    good, bad = (len(list(model.passes(audio, counts, drafts=drafts))) for drafts in (plain, broken))
    assert good <= max(map(len, plain)) // (DRAFTED + 1) + 1 < bad
    assert len(list(model.passes(audio, counts, drafts=broken))) < max(map(len, plain))


def test_draft_is_taken_up_again_behind_a_disagreement():
    starts = {1, 4, 5, 9}  # and 2, 3, 8 go on with a word
    assert realign([1, 2, 3, 4], 3, starts) == [4]  # the draft had two too many
    assert realign([1, 2, 4, 5], 9, starts) == [4, 5]  # another word
    assert realign([4, 5], 8, starts) == [4, 5]  # a word was longer
    assert realign([2, 3, 4, 5], 8, starts) == [4, 5]  # a word went on differently
    assert realign([1, 2], 9, starts) == [] == realign([], 9, starts)


def ctc_totals(log_probs):
    """log p of every text there can be, summed over all paths."""
    totals = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        text = tuple(token for token, _ in itertools.groupby(path) if token)
        totals[text] = np.logaddexp(totals.get(text, -np.inf), sum(log_probs[frame, token] for frame, token in enumerate(path)))
    return totals


def test_prefix_scores_sum_over_all_that_begins_with_a_text():
    log_probs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1).numpy()
    totals = ctc_totals(log_probs)
    padded = np.concatenate([log_probs, [[0, -np.inf, -np.inf, -np.inf]] * 2])[None]  # certain silence changes nothing
    for text in [(1,), (2, 2), (3, 1, 3), (1, 1, 2)]:
        paths, last = prefix_start(padded), 0
        for token in text:
            with np.errstate(invalid="ignore"):
                scores, grown = prefix_extend(padded, np.array([0]), paths, np.array([last]), np.array([[1, 2, 3]]))
            paths, last = grown[..., token - 1], token
        begins = np.logaddexp.reduce([total for found, total in totals.items() if found[:len(text)] == text])
        assert scores[0, token - 1] == pytest.approx(begins)
        assert np.logaddexp(*paths[0, -1]) == pytest.approx(totals[text])


@pytest.mark.parametrize("weight", [0.3, 0.9])
def test_joint_decoding_finds_the_text_of_the_highest_score(toys, weight):
    """A beam that holds everything against a sum over all texts and paths, for short sound and three tokens."""
    model = build(toys)
    model.ctc.tokens = model.ctc.tokens[[20, 60, 80]]
    audio, counts = model.projector(*model.encoder([tone(0.5, 7), tone(0.3, 8)]))
    found = model.search(audio, counts, weight, beam=10_000, choices=3)
    for clip, (ids, count) in enumerate(zip(found, counts)):
        log_probs = model.ctc(audio[clip:clip + 1, :count], model.embed.weight)[0].double().log_softmax(-1).detach().numpy()
        texts = {tuple(model.ctc.tokens[np.array(text, dtype=int) - 1].tolist()): ctc for text, ctc in ctc_totals(log_probs).items()}
        scores = {text: weight * ctc - (1 - weight) * model.lm_loss(audio[clip:clip + 1], count[None], [list(text)]).item()
                  for text, ctc in texts.items()}
        assert tuple(ids) == max(scores, key=scores.get)
        assert model.search(audio[clip:clip + 1, :count], count[None], weight, beam=10_000, choices=3) == [ids]


def test_joint_decoding_tries_what_is_heard_and_not_only_what_the_language_model_expects(toys):
    model = build(toys)
    for ids in ([40, 55], [71, 46], [62, 80]):
        ids = model.ctc.tokens[ids].tolist()
        assert model.search(model.embed(torch.tensor([ids])), torch.tensor([2]), weight=0.99, choices=2) == [ids]


def test_alignment_is_the_best_path_through_a_text(toys):
    model = build(toys)
    audio, counts = model.projector(*model.encoder(WAVES[2:3]))
    audio, ids = audio[0, :7], model.tokenize("two minutes")[:3]
    log_probs = torch.log_softmax(model.ctc(audio[None], model.embed.weight)[0], -1)
    classes = (torch.searchsorted(model.ctc.tokens, torch.tensor(ids, dtype=torch.int32)) + 1).tolist()
    best = max((path for path in itertools.product([0] + classes, repeat=7) if [c for c, _ in itertools.groupby(path) if c] == classes),
               key=lambda path: sum(log_probs[frame, c].item() for frame, c in enumerate(path)))
    for (first, end, probability), c in zip(model.align(audio, ids), classes):
        frames = [frame for frame, found in enumerate(best) if found == c]
        assert (first, end) == (frames[0], frames[-1] + 1)
        assert probability == pytest.approx(log_probs[frames, c].exp().mean().item(), abs=1e-5)
    assert len(model.align(audio, ids * 9)) == 27  # more tokens than frames


def test_greedy_ctc_collapses_repeats_and_blanks(toys, monkeypatch):
    model = build(toys)
    path = torch.tensor([[0, 3, 3, 0, 3, 5, 5, 0, 7]])
    monkeypatch.setattr(model.ctc, "forward", lambda audio, embeddings: torch.nn.functional.one_hot(path, 20).float())
    tokens = model.ctc.tokens.tolist()
    assert model.spell(torch.zeros(1, 9, 32), torch.tensor([9])) == [[tokens[2], tokens[2], tokens[4], tokens[6]]]
    assert model.spell(torch.zeros(1, 9, 32), torch.tensor([6])) == [[tokens[2], tokens[2], tokens[4]]]


def test_where_the_decoder_loops_the_clip_is_decoded_jointly(toys, monkeypatch):
    model = build(toys)
    audio, counts = model.listen(WAVES)
    answers, spelled = model.generate(audio, counts), model.spell(audio, counts)
    lost = [loop_length(answer) > 0 or len(answer) >= limit for answer, limit in zip(answers, model.token_limits(counts))]
    joint = model.search(audio, counts)
    expected = [[] if not ids else again if is_lost else answer for answer, again, ids, is_lost in zip(answers, joint, spelled, lost)]
    assert any(lost) and expected != answers and not any(map(loop_length, joint))
    assert model.hear(audio, counts, "greedy") == expected
    monkeypatch.setattr(model, "search", lambda audio, counts: [[7] * 20 for _ in audio])
    expected = [ids if is_lost or not ids else answer for answer, ids, is_lost in zip(answers, spelled, lost)]
    assert model.hear(audio, counts, "greedy") == expected


def test_loops_are_found_and_cut():
    assert loop_length([1, 2, 3, 4] + [5, 6, 7] * 3) == 6
    assert loop_length([1, 2] + [9] * 8) == 7
    assert loop_length([9] * 7) == 0  # "no no no no no no no" has been said
    assert loop_length([5, 6, 7, 8] * 2) == 0
    assert loop_length(list(range(50))) == 0


def test_transcribe_takes_one_or_many_of_any_length(toys):
    model = build(toys)
    texts = model.transcribe(WAVES)
    assert [model.transcribe(wave) for wave in WAVES] == texts
    assert model.transcribe(WAVES, decode="ctc") != texts
    assert model.transcribe([]) == []
    assert isinstance(model.transcribe(tone(40)), str)  # longer than Whisper's positions


# ----------------------------------------------------------------------------------------------------- save and load


def test_save_and_load_the_trained_part_only(toys, tmp_path):
    model = build(toys)
    model.decode = "ctc"
    with torch.no_grad():
        for tensor in model.trained().values():
            if tensor.ndim == 2:
                tensor.copy_(tensor.bfloat16())  # what a file can hold
    model.save(tmp_path / "a")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["config.json", "projector.safetensors"]
    assert (tmp_path / "a" / "projector.safetensors").stat().st_size < 2 * sum(t.numel() for t in model.trained().values()) + 9000
    loaded = TinyAudio.load(tmp_path / "a", "cpu", torch.float32)
    for name, tensor in model.trained().items():
        torch.testing.assert_close(loaded.trained()[name], tensor, rtol=0, atol=0)
    assert loaded.decode == "ctc" and loaded.transcribe(WAVES) == model.transcribe(WAVES)


def test_low_rank_update_is_a_file_of_its_own(toys, tmp_path):
    plain, model = build(toys), build(toys, lora=4)
    frames, lengths = plain.encoder(WAVES)
    answers = [plain.tokenize(SENTENCES[0])] * len(WAVES)
    expected = plain.loss(frames, lengths, answers)[0]
    model.projector.load_state_dict(plain.projector.state_dict())
    model.ctc.load_state_dict(plain.ctc.state_dict())
    loss = model.loss(frames, lengths, answers)[0]
    torch.testing.assert_close(loss, expected)  # until it is trained it changes nothing
    loss.backward()
    before = model.generate(*model.listen(WAVES))
    assert len(model.lora) == 14 and all(update.b.grad.abs().sum() > 0 for update in model.lora.values())
    with torch.no_grad():
        for name, tensor in model.trained().items():
            tensor += 0.1 * torch.randn_like(tensor) * name.startswith("lora.") if tensor.is_floating_point() else 0
            if tensor.ndim == 2:
                tensor.copy_(tensor.bfloat16())
    model.save(tmp_path)
    merged = TinyAudio.load(tmp_path, "cpu", torch.float32)
    torch.testing.assert_close(merged.loss(frames, lengths, answers)[0], model.loss(frames, lengths, answers)[0])
    assert (merged.loss(frames, lengths, answers)[0] - expected).abs() > 1
    after = model.eval().generate(*model.listen(WAVES))
    assert before != after == merged.generate(*merged.listen(WAVES))  # nothing of the old decoder is left in a cache
    (tmp_path / "lora.safetensors").unlink()
    alone = TinyAudio.load(tmp_path, "cpu", torch.float32)
    assert alone.transcribe(WAVES, "ctc") == merged.transcribe(WAVES, "ctc")
    assert not alone.lora


def test_checkpoints_that_cannot_be_used(toys, tmp_path):
    build(toys).save(tmp_path / "a")
    weights, config = tmp_path / "a" / "projector.safetensors", tmp_path / "a" / "config.json"
    good_weights, good_config = weights.read_bytes(), json.loads(config.read_text())

    def message():
        with pytest.raises(InputError) as error:
            TinyAudio.load(tmp_path / "a")
        assert "\n" not in str(error.value)
        return str(error.value)

    weights.write_bytes(good_weights[:1000])
    assert "projector.safetensors" in message()
    weights.unlink()
    assert "projector.safetensors" in message()
    weights.write_bytes(good_weights)
    config.write_text(json.dumps({**good_config, "hidden": 48}))
    assert "projector.safetensors" in message()  # shapes do not fit
    config.write_text(json.dumps({**good_config, "surprise": 1}))
    assert "surprise" in message()
    config.write_text("{")
    assert "config.json" in message()
    with pytest.raises(InputError, match="no/such-model"):
        TinyAudio.load("no/such-model")


def test_length_mask():
    assert length_mask(torch.tensor([0, 2]), 3).tolist() == [[False] * 3, [True, True, False]]
    assert pad_sequence([torch.ones(2), torch.ones(1)], batch_first=True, padding_side="left").tolist() == [[1, 1], [0, 1]]
