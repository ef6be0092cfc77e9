"""The engine's BERT against transformers' own: names, results, gradients and random draws are equal, bit by bit."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

from engine.errors import ConfigError
from engine.model import bert, fused_bert
from engine.model.text_encoder import TextEncoder, encode_without_padding, load_text_encoder, text_encoder_from_config

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}


def folder_of(path, **settings):
    torch.manual_seed(0)
    model = BertModel(BertConfig(max_position_embeddings=40, **SMALL | settings))
    model.save_pretrained(path)
    return path


def batch(width=12):
    length = torch.tensor([12, 3, 7, 1])
    mask = (torch.arange(width) < length[:, None]).long()
    return torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(1)) * mask, mask


@pytest.fixture
def both(tmp_path):
    """The same weights in the engine's model and in transformers'."""
    own = load_text_encoder(str(folder_of(tmp_path)))
    assert type(own.model) is bert.Bert
    return own, TextEncoder(AutoModel.from_pretrained(tmp_path).float())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_results_gradients_and_draws_are_those_of_transformers(both, train, full):
    (ids, mask), found = batch(), []
    mask = torch.ones_like(mask) if full else mask
    for encoder in both:
        encoder.train(train)
        torch.manual_seed(3)
        padded, packed = encoder(ids, mask), encode_without_padding(encoder, ids, mask)
        ((padded + packed) * mask[..., None]).square().sum().backward()
        gradients = {name: p.grad for name, p in encoder.named_parameters()}
        found.append((padded, packed, gradients, torch.get_rng_state()))
    (padded, packed, gradients, state), (padded2, packed2, gradients2, state2) = found
    assert torch.equal(padded, padded2) and torch.equal(packed, packed2) and torch.equal(state, state2)
    assert list(gradients) == list(gradients2)  # in this order an optimiser numbers them
    assert all(torch.equal(gradients[name], gradients2[name]) for name in gradients)


def test_names_and_descriptions_go_both_ways(both):
    own, other = both
    state = own.state_dict()
    assert list(state) == list(other.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert not own.model.training and not other.model.training
    assert own.vocabulary == other.vocabulary == 50 and own.positions == other.positions == 40
    for description in (own.describe(), other.describe()):  # a run folder of any version has one of them
        assert json.loads(json.dumps(description)) == description
        rebuilt = text_encoder_from_config(description)
        rebuilt.load_state_dict(state)
        settings = {key: value for key, value in description.items() if key != "model_type"}
        again = TextEncoder(AutoModel.from_config(AutoConfig.for_model("bert", **settings)))
        again.load_state_dict(state)
        ids, mask = batch()
        assert torch.equal(rebuilt.eval()(ids, mask), again.eval()(ids, mask))


def test_the_gpus_kernels_take_it(both):
    assert all(fused_bert.fusable(encoder.model) for encoder in both)
    (ids, mask), found = batch(), []
    for encoder in both:
        bias = fused_bert.mask_of(encoder.model, mask)
        found.append(fused_bert.last_hidden_state(encoder.eval().model, ids, bias))
    assert torch.equal(*found)


def test_loading_draws_nothing(tmp_path):
    folder = folder_of(tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_text_encoder(str(folder))
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_weights_are_as_berts_authors_drew_them():
    torch.manual_seed(0)
    model = text_encoder_from_config({"model_type": "bert", **SMALL, "vocab_size": 5000, "hidden_size": 64}).model
    words = model.get_input_embeddings().weight
    assert not words[0].any() and words[1:].std().item() == pytest.approx(0.02, rel=0.02)
    layer = model.encoder.layer[0]
    assert layer.intermediate.dense.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not layer.intermediate.dense.bias.any() and bool((layer.output.LayerNorm.weight == 1).all())


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_act": "relu"}, {"is_decoder": True}, {"position_embedding_type": "relative_key"}, {"dtype": "float16"},
        {"attn_implementation": "eager"}, {"never_heard_of": 1}, {"hidden_size": 16.0}, {"num_hidden_layers": True},
        {"num_attention_heads": 3}, {"num_attention_heads": 0}, {"pad_token_id": 50}, {"model_type": "roberta"},
        {"hidden_dropout_prob": 1.5}, {"attention_probs_dropout_prob": float("nan")}, {"initializer_range": -1.0},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_other_settings_are_left_to_transformers(settings):
    assert bert.is_plain({"model_type": "bert", **SMALL})
    assert not bert.is_plain({"model_type": "bert", **SMALL, **settings})


def test_a_damaged_description_is_one_line():
    with pytest.raises(ConfigError, match="text encoder's model_type"):
        text_encoder_from_config({"model_type": "bert", **SMALL, "hidden_dropout_prob": 1.5})


def test_a_folder_of_another_kind_is_left_to_transformers(tmp_path):
    assert type(load_text_encoder(str(folder_of(tmp_path / "relu", hidden_act="relu"))).model) is BertModel
    half = tmp_path / "half"
    BertModel(BertConfig(max_position_embeddings=40, **SMALL)).half().save_pretrained(half)
    assert type(load_text_encoder(str(half)).model) is BertModel
    adapted = folder_of(tmp_path / "adapted")
    (adapted / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert bert.load_bert(adapted) is None
    lacking = folder_of(tmp_path / "lacking")
    settings = json.loads((lacking / "config.json").read_text(encoding="utf-8"))
    (lacking / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}), encoding="utf-8")
    assert bert.load_bert(lacking) is None
    with pytest.raises(ConfigError, match=r"weights lack encoder\.layer\.2"):
        load_text_encoder(str(lacking))


def test_more_tokens_than_positions_is_one_line(tmp_path):
    encoder = load_text_encoder(str(folder_of(tmp_path)))
    with pytest.raises(ConfigError, match=r"41 tokens.*at most 40"):
        encoder(torch.ones(1, 41, dtype=torch.long), torch.ones(1, 41, dtype=torch.long))
