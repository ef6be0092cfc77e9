"""The whole model: recorded features in faithful mode, independence of batch mates in fast mode."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from engine.config import Config
from engine.errors import ConfigError
from engine.loaders.batch import Batch
from engine.mimrl.model import build_model, fit_length
from engine.mimrl.names import split_reference_state
from engine.model import batch_text
from engine.model.encoders import ENCODERS
from engine.model.fusion import CubeMLPFusion
from engine.model.text_encoder import PrecomputedText, TextEncoder, load_text_encoder
from engine.training.parts import parameter_groups
from tests.golden.common import assert_values, cases, load, part

AUDIO, VISION, TIME, WIDTH = 4, 6, 10, 16
LENGTHS = [(5, 8, 3), (9, 2, 14), (3, 12, 7), (8, 1, 1), (6, 5, 9)]  # tokens, audio, vision; some beyond TIME


def tiny_bert(**settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return TextEncoder(BertModel(BertConfig(**sizes, intermediate_size=24, max_position_embeddings=32, **settings)))


def config(mode="fast", **model) -> Config:
    shapes = [(5, 3, WIDTH), (4, 3, WIDTH)]
    settings = {"d_common": WIDTH, "cubemlp": {"d_hiddens": shapes, "d_outs": shapes}} | model
    loss = "CE" if settings.get("task") == "classification" else "MAE"
    return Config(mode=mode, data={"time_len": TIME}, model=settings, train={"loss": loss})


def samples(lengths=LENGTHS):
    g = torch.Generator().manual_seed(0)
    for tokens, audio, vision in lengths:
        yield (
            torch.randint(1, 40, (tokens,), generator=g),
            torch.randn(audio, AUDIO, generator=g),
            torch.randn(vision, VISION, generator=g),
        )


def make_batch(rows, pad_tokens_to=None) -> Batch:
    """Padded to its own longest rows, as loaders do."""
    rows = list(rows)
    ids, audio, vision = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in zip(*rows, strict=True))
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r[0]) for r in rows], batch_first=True)
    if pad_tokens_to:
        ids, mask = fit_length(ids, pad_tokens_to), fit_length(mask, pad_tokens_to)
    return Batch(
        index=torch.arange(len(rows)),
        ids=[str(i) for i in range(len(rows))],
        label=torch.zeros(len(rows), 1),
        token_ids=ids,
        token_mask=mask,
        text=None,
        audio=audio,
        audio_length=torch.tensor([len(r[1]) for r in rows]),
        vision=vision,
        vision_length=torch.tensor([len(r[2]) for r in rows]),
    )


def model(mode="fast", text=None, **settings):
    text = text or tiny_bert()
    torch.manual_seed(0)
    return build_model(config(mode, **settings), AUDIO, VISION, text).eval()


def outputs(module, batch):
    with torch.no_grad():
        output = module(batch)
    return {"prediction": output.prediction, **output.features}


def largest_change(module, rows):
    """Largest difference of any output between a sample in the batch and alone, in half of it, in another order."""
    together = outputs(module, make_batch(rows))
    n = len(rows)
    order = list(reversed(range(n)))
    change = 0.0
    for pick in [*([i] for i in range(n)), list(range(n // 2)), order]:
        among = outputs(module, make_batch([rows[i] for i in pick]))
        change = max(change, *((among[k] - together[k][pick]).abs().max().item() for k in together))
    return change


@cases("model_")
def test_recorded_features_of_the_first_step(name, info):
    """Stage 1 of step 0: the parameters are the README's rule, the inputs are recorded, faithful mode."""
    step = part(load(name), "step0.")
    state = {}
    for k, key in enumerate(info["param_order"]):
        r = np.random.RandomState(info["param_seed"] + k).randn(*info["param_shapes"][key]).astype(np.float32)
        norm = ("ln_" in key or "LayerNorm" in key) and key.endswith("weight")
        state[key] = torch.from_numpy(np.float32(norm) + np.float32(0.05) * r)
    cube = {k: info[k] for k in ("d_hiddens", "d_outs", "activate", "bias", "ln_first", "res_project")}
    settings = {k: info[k] for k in ("d_common", "encoder", "compose_t", "compose_k")}
    _, audio_dim, vision_dim = info["d_in"]
    module = build_model(
        Config(mode="faithful", data={"time_len": info["time_len"]}, model={**settings, "cubemlp": cube}),
        audio_dim,
        vision_dim,
        TextEncoder(BertModel(BertConfig(**info["bert"]))),
    ).eval()
    module.load_state_dict(split_reference_state(state)[0])
    rows = len(step["label"])
    unused_length = torch.ones(rows, dtype=torch.long)  # faithful mode counts frames itself
    batch = Batch(
        index=torch.arange(rows),
        ids=[""] * rows,
        label=step["label"],
        token_ids=step["input_ids"].long(),
        token_mask=step["attention_mask"].long(),
        text=None,
        audio=step["audio"],
        audio_length=unused_length,
        vision=step["vision"],
        vision_length=unused_length,
    )
    for key, value in outputs(module, batch).items():
        assert_values(value, step[f"stage1.{key}"], f"{name} {key}")
    # the recordings tell the modes apart
    module.faithful = False
    with pytest.raises(AssertionError):
        assert_values(outputs(module, batch)["T"], step["stage1.T"])


@pytest.mark.parametrize("fusion", ["cubemlp", "tfn", "transformer"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_fast_mode_does_not_depend_on_batch_mates(encoder, fusion):
    assert largest_change(model(encoder=encoder, fusion=fusion), list(samples())) < 1e-5


@pytest.mark.parametrize("encoder", ENCODERS)
def test_faithful_mode_depends_on_batch_mates(encoder):
    """The reference's fault, and the proof that the test of fast mode can fail."""
    assert largest_change(model("faithful", encoder=encoder), list(samples())) > 1e-3


@pytest.fixture(scope="module")
def minilm():
    return load_text_encoder("minilm")


def test_fast_mode_does_not_depend_on_batch_mates_with_minilm(minilm):
    rows = [(ids + 2000, audio, vision) for ids, audio, vision in samples()]
    assert largest_change(model(text=minilm), rows) < 1e-5
    assert largest_change(model("faithful", text=minilm), rows) > 1e-3


def test_fast_features_are_means_over_what_is_there():
    module = model()
    rows = list(samples())
    found = outputs(module, make_batch(rows))
    for i, (ids, audio, vision) in enumerate(rows):
        with torch.no_grad():
            t = module.text_projection(module.text_encoder(ids[None], torch.ones_like(ids[None])))
            a = module.audio_encoder(audio[None], torch.tensor([len(audio)]))
            v = module.vision_encoder(vision[None], torch.tensor([len(vision)]))
        for key, x in zip("TAV", (t, a, v), strict=True):
            torch.testing.assert_close(found[key][i], x[0].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text_padding", ["mean", "zero"])
def test_what_the_fusion_encoder_finds_past_the_end(text_padding):
    """Text holds the sentence's mean there, or zero; audio and vision are zero; the mask says what is real."""
    seen = {}

    class Spy(torch.nn.Module):
        dim = WIDTH

        def forward(self, x, mask):
            seen["x"], seen["mask"] = x, mask
            return x.mean((1, 2))

    module = model(text_padding=text_padding)
    module.fusion = Spy()
    text = outputs(module, make_batch(samples()))["T"]
    x, mask = seen["x"], seen["mask"]
    assert mask.sum(1).tolist() == [[min(n, TIME) for n in row] for row in LENGTHS]
    padding = torch.zeros_like(x)
    if text_padding == "mean":
        padding[:, :, 0] = text[:, None]
    torch.testing.assert_close(x[~mask], padding[~mask])
    assert (x[mask] != 0).any(-1).all()
    assert largest_change(model(text_padding=text_padding), list(samples())) < 1e-5


def test_faithful_features_average_the_padding():
    """T over [PAD] outputs, A and V over rows that are ReLU of the norm's bias; lengths come from the tensor."""
    module = model("faithful")
    torch.nn.init.normal_(module.audio_encoder.norm.bias)
    batch = make_batch(samples(), pad_tokens_to=TIME)
    batch.audio_length = torch.full_like(batch.audio_length, batch.audio.shape[1])  # must not be read
    found = outputs(module, batch)
    with torch.no_grad():
        text = module.text_projection(module.text_encoder(batch.token_ids, batch.token_mask))
        torch.testing.assert_close(found["T"], text.mean(1), rtol=1e-4, atol=1e-5)
        n, total = LENGTHS[0][1], batch.audio.shape[1]
        alone = module.audio_encoder(batch.audio[:1, :n], torch.tensor([n]))[0]
        padding = (total - n) * module.audio_encoder.norm.bias.relu()
        torch.testing.assert_close(found["A"][0], (alone.sum(0) + padding) / total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["fast", "faithful"])
def test_a_missing_modality_is_one_zero_frame(mode):
    rows = list(samples())
    whole = outputs(model(mode), make_batch(rows))
    rows[1] = (rows[1][0], torch.zeros(1, AUDIO), torch.zeros(1, VISION))
    found = outputs(model(mode), make_batch(rows))
    assert all(value.isfinite().all() for value in found.values())
    if mode == "fast":
        others = [0, 2, 3, 4]
        for key in found:
            torch.testing.assert_close(found[key][others], whole[key][others], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["A"][1], whole["A"][1])


@pytest.mark.parametrize("mode", ["fast", "faithful"])
def test_frames_beyond_time_len_reach_the_feature_but_not_the_cube(mode):
    """The encoders run over all frames; the cube is cut."""
    module = model(mode, encoder="conv")
    batch = make_batch(samples())
    assert batch.vision.shape[1] > TIME + 2
    before = outputs(module, batch)
    batch.vision[1, TIME + 1 :] += 1.0  # the convolution's reach stays behind the cut
    after = outputs(module, batch)
    torch.testing.assert_close(after["F"], before["F"], rtol=0, atol=1e-6)
    assert (after["V"][1] - before["V"][1]).abs().max() > 1e-3


def test_fit_length():
    x = torch.arange(6.0).view(1, 3, 2)
    assert torch.equal(fit_length(x, 2), x[:, :2])
    assert torch.equal(fit_length(x, 5), torch.cat([x, torch.zeros(1, 2, 2)], dim=1))
    assert fit_length(torch.ones(1, 2, dtype=torch.bool), 3).tolist() == [[True, True, False]]


@pytest.mark.parametrize("compose", ["mean", "sum", "cat"])
def test_classification_and_the_width_of_the_fused_feature(compose):
    module = model(task="classification", num_class=7, compose_k=compose, compose_t=compose)
    found = outputs(module, make_batch(samples()))
    width = WIDTH * 12 if compose == "cat" else WIDTH
    assert found["prediction"].shape == (5, 7) and found["F"].shape == (5, width) and module.fused_dim == width
    torch.testing.assert_close(module.head(found["F"]), found["prediction"])


@pytest.mark.parametrize("mode", ["fast", "faithful"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_reach_every_parameter(mode, encoder):
    module = model(mode, encoder=encoder, modality_dropout=0.0).train()  # by chance it hides all of so few samples
    module(make_batch(samples())).prediction.square().sum().backward()
    # a key's bias shifts all scores of a row alike, which the softmax undoes: its gradient is rounding
    names = [n for n, p in module.named_parameters() if p.grad is None or not (p.grad.any() or n.endswith("key.bias"))]
    assert names == []


def test_dropout_of_each_modality():
    text = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = make_batch(samples())
    for which, key in enumerate("TAV"):
        rates = [0.0] * 4
        rates[which] = 0.5
        module = model(text=text, dropout=rates, modality_dropout=0.0)
        calm, noisy = outputs(module, batch), outputs(module.train(), batch)
        changed = {k for k in "TAV" if not torch.allclose(calm[k], noisy[k], atol=1e-5)}
        assert changed == {key} and not torch.allclose(calm["F"], noisy["F"], atol=1e-5)


@pytest.mark.parametrize("which", [1, 2])
def test_modality_dropout_hides_rows_from_the_fusion_encoder_alone(which):
    text = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    module = model(text=text, dropout=[0.0] * 4, modality_dropout=0.5)
    seen = []
    module.fusion.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    batch = make_batch(samples([(3, 4, 5)] * 200))
    calm, noisy = outputs(module, batch), outputs(module.train(), batch)
    shown, hidden_or_shown = (cube[:, :, which] for cube in seen)
    kept = (hidden_or_shown != 0).any((1, 2))
    assert 60 < kept.sum() < 140
    torch.testing.assert_close(hidden_or_shown[kept], shown[kept])
    torch.testing.assert_close(seen[0][:, :, 0], seen[1][:, :, 0])
    for key in "TAV":
        torch.testing.assert_close(calm[key], noisy[key])


def test_faithful_mode_hides_nothing():
    assert model("faithful").modality_dropout == 0.0 and model("fast").modality_dropout == 0.5


def test_what_fills_the_text_is_dropped_out_like_text():
    """One mask for a sentence's mean at all its filled positions would leave most of the time axis without noise."""
    text = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    module = model(text=text, dropout=[0.5, 0.0, 0.0, 0.0], modality_dropout=0.0).train()
    seen = []
    module.fusion.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    outputs(module, make_batch(samples([(2, 4, 5)] * 50)))
    filled = seen[0][:, 2:, 0] == 0
    assert 0.4 < filled.float().mean() < 0.6
    assert (filled[:, 0] != filled[:, 1]).float().mean() > 0.3


def test_precomputed_text_features():
    module = model(text=PrecomputedText(7))
    batch = make_batch(samples())
    batch.text, batch.token_ids = torch.randn(*batch.token_mask.shape, 7), None
    found = outputs(module, batch)
    batch.text = torch.where(batch.token_mask[..., None] != 0, batch.text, torch.tensor(5.0))
    for key, value in outputs(module, batch).items():
        torch.testing.assert_close(value, found[key])
    batch.text = torch.randn(*batch.token_mask.shape, 8)
    with pytest.raises(ConfigError, match=r"text features.*width 8.*width 7"):
        module(batch)
    batch.text = None
    with pytest.raises(ConfigError, match="neither tokens nor text features"):
        module(batch)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_frames_of_another_width_are_named(encoder):
    batch = make_batch(samples())
    batch.vision = batch.vision[..., :5]
    with pytest.raises(ConfigError, match=rf"vision features.*width 5.*width {VISION}"):
        model(encoder=encoder)(batch)


def test_parameter_groups_hold_what_is_trained_once():
    text = tiny_bert()
    text.model.encoder.layer[0].requires_grad_(False)
    module = model(text=text)
    groups = parameter_groups(module, module.text_encoder)
    grouped = [id(p) for ps in groups.values() for p in ps]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    assert {id(p) for p in groups["text"]} == {id(p) for p in text.parameters() if p.requires_grad}
    assert any(p is module.text_projection.weight for p in groups["main"])


@pytest.mark.parametrize("fusion", ["cubemlp", "tfn", "transformer"])
def test_state_dict_round_trip(fusion):
    first, second = model(fusion=fusion), model(fusion=fusion)
    with torch.no_grad():
        for p in first.parameters():
            p.add_(0.1 * torch.randn_like(p))
    batch = make_batch(samples())
    assert not torch.allclose(first(batch).prediction, second(batch).prediction)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(batch).prediction, second(batch).prediction)


def test_a_fresh_fast_model_starts_from_averages():
    """Residual projections are means of stretches of an axis, in fast mode; the identity where it keeps its length."""
    module = model()
    first = module.fusion.blocks[0]
    torch.testing.assert_close(first.channel.residual.weight, torch.eye(WIDTH))
    expected = torch.zeros(5, TIME)
    for k in range(5):
        expected[k, 2 * k : 2 * k + 2] = 0.5
    torch.testing.assert_close(first.time.residual.weight, expected)
    assert not torch.equal(model("faithful").fusion.blocks[0].channel.residual.weight, torch.eye(WIDTH))


def test_a_model_can_start_at_a_value():
    module = model()
    module.start_at(0.25)
    torch.testing.assert_close(
        outputs(module, make_batch(samples()))["prediction"], torch.full((len(LENGTHS), 1), 0.25)
    )


# -- what a GPU runs in the place of torch's operations --


@pytest.fixture
def on_kernels(monkeypatch):
    """Sets whether the cube is made by one operation; the CPU's host function takes the kernel's place."""

    def choose(wanted):
        monkeypatch.setattr("engine.mimrl.model.MIMRL._stacks", lambda *_: wanted)

    return choose


def results(module, batch):
    """Prediction, features and gradients of a weighted sum of them."""
    output = module(batch)
    found = [output.prediction, *output.features.values()]
    generator = torch.Generator().manual_seed(3)
    loss = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in found)
    wanted = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*found, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("text_padding", ["mean", "zero"])
@pytest.mark.parametrize("modalities", [["text", "audio", "vision"], ["audio", "vision"]])
def test_one_operation_makes_the_same_cube(modalities, text_padding, on_kernels):
    """In evaluation, and in training without dropout; texts, frames shorter and longer than the cube."""
    c = config(text_padding=text_padding, dropout=[0.0] * 4, modality_dropout=0.0)
    c.data.modalities = modalities
    torch.manual_seed(0)
    module = build_model(c, AUDIO, VISION, tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    for training in (False, True):
        module.train(training)
        found = []
        for wanted in (False, True):
            on_kernels(wanted)
            found.append(results(module, make_batch(samples())))
        for f, e in zip(*found, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_one_operation_drops_out_and_hides(on_kernels):
    """As `hide_rows` and dropout do: audio and vision of some rows, and numbers of every modality."""
    on_kernels(True)
    seen = {}
    module = model(dropout=[0.5, 0.0, 0.0, 0.0], modality_dropout=0.5).train()
    module.fusion.register_forward_pre_hook(lambda m, given: seen.update(x=given[0]))
    torch.manual_seed(0)
    first = module(make_batch(samples(LENGTHS * 40)))
    x = seen["x"]
    shown = [x[:, :, k].flatten(1).any(1) for k in range(3)]
    assert shown[0].all() and all(0.4 < s.float().mean() < 0.6 for s in shown[1:])
    assert (shown[1] != shown[2]).any()
    assert 0.45 < (x[:, :, 0] == 0).float().mean() < 0.55
    assert all(first.features[key].abs().sum(1).all() for key in "AV")  # the means are of what is hidden, too
    torch.manual_seed(0)
    assert torch.equal(module(make_batch(samples(LENGTHS * 40))).prediction, first.prediction)


@pytest.mark.parametrize("mode, fusion", [("fast", "tfn"), ("faithful", "cubemlp"), ("fast", "cubemlp")])
def test_what_is_left_to_torchs_operations(mode, fusion, monkeypatch):
    """Other fusion encoders, which read the mask, faithful mode, and the CPU."""
    module, asked = model(mode, fusion=fusion).train(), []
    monkeypatch.setattr("engine.mimrl.model.stacks", lambda sequences: asked.append(sequences) or True)
    module(make_batch(samples()))
    assert not asked


def test_a_fusion_encoder_of_ones_own_gets_its_mask(monkeypatch):
    class Own(CubeMLPFusion):
        pass

    module = model()
    monkeypatch.setattr("engine.mimrl.model.stacks", lambda sequences: True)
    on_a_gpu = [SimpleNamespace(is_cuda=True)]
    assert module._stacks(on_a_gpu)
    module.fusion.__class__ = Own
    assert not module._stacks(on_a_gpu)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_projection_with_a_hook_is_called(hook, monkeypatch):
    projection, calls = torch.nn.Linear(4, 2, bias=False), []
    batch = SimpleNamespace(static=True, text=None, token_mask=None, token_ids=SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(batch_text, "encode_text", lambda encoder, batch: torch.ones(1, 3, 4))
    monkeypatch.setattr(batch_text, "encode_padded", lambda *_: "fused")
    assert batch_text.project_text(None, batch, projection) == "fused"
    getattr(projection, hook)(lambda *_: calls.append(1))
    assert batch_text.project_text(None, batch, projection).shape == (1, 3, 2) and calls == [1]
