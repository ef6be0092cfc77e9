"""Moving from the reference: names, command line, checkpoints."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import checkpoint
from engine.config import Config, keys, load_config
from engine.errors import CheckpointError, ConfigError, EngineError, OutputError
from engine.loaders.batch import Batch
from engine.mimrl.checkpoints import import_checkpoint
from engine.mimrl.commands import DATASETS, FLAGS, flag_table, import_command, render_command
from engine.mimrl.names import engine_to_reference, reference_to_engine, split_reference_state
from tests.loaders.test_text import small_tokenizer

DOCS = Path(__file__).resolve().parents[1] / "docs" / "moving_from_mimrl.md"

FLAGSHIP = r"""!python Main.py --task_name mosiDec --dataset mosi_Dec --log_scale 0-0-0 --normalize 0-1-1 \
  --batch_size 128 --num_workers 8 --d_common 128 --encoders gru --activate gelu --time_len 100 \
  --d_hiddens 50-3-128=10-3-128 --d_outs 50-3-128=10-3-128 --dropout_mlp 0.0-0.0-0.0 --dropout 0.1-0.1-0.1-0.1 \
  --bias --res_project 1-1 --critic_type separate --baseline_type constant --bound_type infonce --mi_lr_rate 1.0 \
  --cmi_lr_rate 1.0 --loss_mi_coefficient1 1-1-1-1-1-1-1-1-1-1-1 \
  --loss_mi_coefficient2 0.01-0.01-0.01-0.01-0.01-0.01-0.01-0.01 --k_neighbor 2 --radius 1.0 \
  --cmi_last_acticate sigmoid --stage1_n 2 --seed 0 --loss MAE --gradient_clip 1.5 --epochs_num 70 --optm Adam \
  --learning_rate 4e-3 --bert_freeze no --bert_lr_rate 0.01 --weight_decay 0.0 --lr_decrease multi_step \
  --lr_decrease_iter 9-60 --lr_decrease_rate 0.1 --save_best_features --parallel
"""


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def leaves(config: Config) -> dict:
    def walk(node, prefix):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(), ""))


class TestNames:
    @pytest.mark.parametrize(
        "reference, ours",
        [
            ("bertmodel.encoder.layer.0.output.dense.bias", "text_encoder.model.encoder.layer.0.output.dense.bias"),
            ("bertmodel.pooler.dense.weight", "text_encoder.model.pooler.dense.weight"),
            ("W_t.weight", "text_projection.weight"),
            ("rnn_a.weight_hh_l1_reverse", "audio_encoder.rnn.weight_hh_l1_reverse"),
            ("conv_v.bias", "vision_encoder.conv.bias"),
            ("ln_v.weight", "vision_encoder.norm.weight"),
            ("mlp_encoder.layers_stack.1.mlp_l.fc1.weight", "fusion.blocks.1.time.fc1.weight"),
            ("mlp_encoder.layers_stack.0.mlp_k.fc2.bias", "fusion.blocks.0.modality.fc2.bias"),
            ("mlp_encoder.layers_stack.12.res_projection_d.weight", "fusion.blocks.12.channel.residual.weight"),
            ("mlp_encoder.layers_stack.0.ln_k.bias", "fusion.blocks.0.modality.norm.bias"),
            ("classifier.3.weight", "head.layers.3.weight"),
            ("vmi_estimator_f_t.critic_model.MLP_g.6.bias", "estimators.F_T.critic.g.6.bias"),
            ("vmi_estimator_t_v.critic_model.MLP_h.0.weight", "estimators.T_V.critic.h.0.weight"),
            ("vmi_estimator_f_a.critic_model.MLP_f.2.weight", "estimators.F_A.critic.f.2.weight"),
            ("vmi_estimator_f_v.baseline_model.MLP.4.bias", "estimators.F_V.baseline.mlp.4.bias"),
            ("vcmi_estimator_tc_a.classifier.mlp.2.weight", "estimators.TC_A.classifier.2.weight"),
        ],
    )
    def test_both_directions(self, reference, ours):
        assert reference_to_engine(reference) == ours
        assert engine_to_reference(ours) == reference
        assert reference_to_engine(f"module.{reference}") == ours
        assert reference_to_engine(f"module.module.{reference}") == ours

    @pytest.mark.parametrize(
        "name",
        [
            "mlp_encoder.layers_stack.0.mlp_l.activation.weight",
            "vmi_estimator_t_t.critic_model.MLP_g.0.bias",
            "vcmi_estimator_ac_v.classifier.mlp.0.bias",
            "classifier.weight",
            "transformer.layer.0.weight",
        ],
    )
    def test_unknown(self, name):
        with pytest.raises(CheckpointError) as caught:
            reference_to_engine(name)
        one_line(caught, name)

    def test_no_counterpart(self):
        with pytest.raises(CheckpointError) as caught:
            engine_to_reference("fusion.encoder.layers.0.linear1.weight")
        one_line(caught, "fusion=cubemlp")

    def test_split(self):
        state = {
            "module.W_t.weight": torch.zeros(1),
            "module.bertmodel.embeddings.position_ids": torch.zeros(1),
            "module.vmi_estimator_f_t.critic_model.MLP_g.0.bias": torch.ones(1),
        }
        model, objective, unused = split_reference_state(state)
        assert list(model) == ["text_projection.weight"]
        assert list(objective) == ["estimators.F_T.critic.g.0.bias"]
        assert unused == ["bertmodel.embeddings.position_ids"]

    def test_split_names_the_first_unknown_ones(self):
        state = {f"module.extra{i}.weight": torch.zeros(1) for i in range(5)}
        with pytest.raises(CheckpointError) as caught:
            split_reference_state(state, "ref.pth.tar")
        one_line(caught, "ref.pth.tar", "extra0.weight, extra1.weight, extra2.weight and 2 more")


# What each flag alone changes: the rest of the command, and our settings that then differ from the bare command's.
EFFECTS = {
    "task_name": ("run7", {}),
    "dataset": ("avec2019", {"data.dataset": "avec2019"}),
    "normalize": ("0-1-1", {"data.normalize_audio": "minmax", "data.normalize_vision": "minmax"}),
    "log_scale": ("0-0-1", {"data.log_vision": True}),
    "text": ("glove", {"text_encoder": "features", "data.text_features": "glove"}),
    "audio": ("mfcc", {"data.audio_features": "mfcc"}),
    "video": ("au", {"data.vision_features": "au"}),
    "batch_size": ("64", {"batch_size": 64}),
    "num_workers": ("8", {}),
    "persistent_workers": ("", {}),
    "pin_memory": ("", {}),
    "drop_last": ("", {"data.drop_last": True}),
    "task": (
        "classification --num_class 2 --loss CE",
        {"model.task": "classification", "model.num_class": 2, "train.loss": "CE"},
    ),
    "num_class": (
        "7 --task classification --loss Focal",
        {"model.task": "classification", "model.num_class": 7, "train.loss": "Focal"},
    ),
    "d_common": ("64", {"model.d_common": 64}),
    "encoders": ("conv", {"model.encoder": "conv"}),
    "features_compose_t": ("cat", {"model.compose_t": "cat"}),
    "features_compose_k": ("sum", {"model.compose_k": "sum"}),
    "activate": ("leakyrelu", {"model.cubemlp.activate": "leakyrelu"}),
    "time_len": ("50", {"data.time_len": 50}),
    "d_hiddens": ("50-3-64=10-2-32", {"model.cubemlp.d_hiddens": [(50, 3, 64), (10, 2, 32)]}),
    "d_outs": ("50-3-64=10-2-32", {"model.cubemlp.d_outs": [(50, 3, 64), (10, 2, 32)]}),
    "dropout_mlp": ("0.0-0.1-0.2", {"model.cubemlp.dropout": (0.0, 0.1, 0.2)}),
    "dropout": ("0-0.1-0.2-0.3", {"model.dropout": (0.0, 0.1, 0.2, 0.3)}),
    "bias": ("", {"model.cubemlp.bias": True}),
    "ln_first": ("", {"model.cubemlp.ln_first": True}),
    "res_project": (
        "t-no --d_outs 10-2-128=10-2-128",
        {"model.cubemlp.res_project": [True, False], "model.cubemlp.d_outs": [(10, 2, 128), (10, 2, 128)]},
    ),
    "critic_type": ("concat", {"objective.critic": "concat"}),
    "baseline_type": ("gaussain", {"objective.baseline": "gaussian"}),
    "bound_type": ("smile", {"objective.bound": "smile"}),
    "loss_mi_coefficient1": ("1-2-3-4-5-6-7-8-9-10-11", {"objective.c1": [float(i) for i in range(1, 12)]}),
    "loss_mi_coefficient2": ("1-2-3-4-5-6-7-8", {"objective.c2": [float(i) for i in range(1, 9)]}),
    "mi_lr_rate": ("0.5", {"train.mi_lr_rate": 0.5}),
    "cmi_lr_rate": ("0.5", {}),
    "k_neighbor": ("3", {"objective.k_neighbor": 3}),
    "radius": ("2.0", {}),
    "cmi_last_acticate": ("hardtanh", {"objective.cmi_last_activate": "hardtanh"}),
    "stage1_n": ("2", {"train.stage1_n": 2}),
    "seed": ("5", {"seed": 5}),
    "loss": ("SIMSE", {"train.loss": "SIMSE"}),
    "gradient_clip": ("-1", {"train.clip_value": None}),
    "epochs_num": ("70", {"epochs": 70}),
    "optm": ("SGD", {"train.optimizer": "sgd"}),
    "learning_rate": ("1e-3", {"train.lr": 1e-3}),
    "bert_freeze": ("part", {"text.freeze": "part"}),
    "bert_lr_rate": ("0.01", {"text.lr_rate": 0.01}),
    "weight_decay": ("1e-4", {"train.weight_decay": 1e-4}),
    "lr_decrease": ("exp", {"train.schedule.kind": "exp"}),
    "lr_decrease_iter": ("20", {"train.schedule.step_size": 20}),
    "lr_decrease_rate": ("0.5", {"train.schedule.rate": 0.5}),
    "save_best_features": ("", {"output.features": True}),
    "print_params": ("", {}),
    "check_gradient": ("", {}),
    "parallel": ("", {}),
    "cuda": ("1", {"device": "cuda:1"}),
}


class TestCommand:
    def test_flagship(self):
        """The published MOSI command gives the preset of the same recipe, in faithful mode, with its text encoder."""
        config, notes = import_command(FLAGSHIP)
        expected = load_config(
            "mosi-paper", ["mode=faithful", "text_encoder=bert-base-uncased", "output.features=true"]
        )
        assert leaves(config) == leaves(expected) | {"preset": ""}
        text = "\n".join(notes)
        for name in ("task_name", "num_workers", "cmi_lr_rate", "radius", "parallel", "normalize 0-1-1"):
            assert f"--{name}" in text
        assert "audio" not in text, "features are chosen by the data set in `*_Dec` data"

    def test_defaults_of_the_reference(self):
        config, notes = import_command("python Main.py")
        assert config.batch_size == 16
        assert config.data.time_len == 100
        assert config.model.cubemlp.d_hiddens == config.model.cubemlp.d_outs == [(10, 2, 128), (5, 2, 128)]
        assert config.model.cubemlp.dropout == (0.5,) * 3
        assert config.model.dropout == (0.5,) * 4
        assert config.model.cubemlp.res_project == [True, True]
        assert not config.model.cubemlp.bias
        assert config.objective.c1 == [0.1] * 11
        assert config.objective.c2 == [0.1] * 8
        assert config.objective.k_neighbor == 2
        assert config.train.stage1_n == 1
        assert config.train.clip_value == 1.0
        assert config.epochs == 2
        assert (config.train.optimizer, config.train.lr) == ("adam", 4e-3)
        assert config.text.lr_rate == -1
        assert (config.train.schedule.kind, config.train.schedule.step_size) == ("step", 60)
        assert config.train.schedule.rate == 0.1
        assert config.train.loss == "MAE"
        assert config.mode == "faithful"
        assert config.data.clip is None
        assert any("defaults" in note and "batch_size 16" in note for note in notes)

    def test_every_flag_of_the_reference_is_here(self):
        assert {flag.name for flag in FLAGS} == set(EFFECTS)
        known = {key.name for key in keys()}
        for flag in FLAGS:
            assert flag.fate in ("mapped", "unused", "unsupported")
            assert bool(flag.keys) == (flag.fate == "mapped")
            assert set(flag.keys.split()) <= known, flag.name

    @pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
    def test_each_flag_alone(self, flag):
        value, expected = EFFECTS[flag.name]
        base = leaves(import_command("python Main.py")[0])
        config, notes = import_command(f"python Main.py --{flag.name} {value}")
        found = leaves(config)
        assert {key: found[key] for key in found if found[key] != base[key]} == expected
        if flag.fate == "mapped":
            assert set(flag.keys.split()) & set(expected)
        else:
            assert any(note.startswith(f"--{flag.name}: {flag.fate}") for note in notes)

    def test_config_survives_yaml(self, tmp_path):
        config, notes = import_command(FLAGSHIP)
        (tmp_path / "config.yaml").write_text(render_command(config, notes), encoding="utf-8")
        assert load_config(tmp_path / "config.yaml") == config

    def test_a_notebooks_way_of_writing_it(self):
        text = (
            "cmd = 'python Main.py --dataset mosi_Dec --batch_size 64  '+\\\n"
            "'--d_common 64 --bias '+\\\n"
            "'--parallel '\nprint(cmd)\n!{cmd}\n"
        )
        config, _ = import_command(text)
        assert (config.batch_size, config.model.d_common, config.model.cubemlp.bias) == (64, 64, True)

    def test_equals_signs_and_beginnings_of_flags(self):
        config, _ = import_command("python Main.py --batch_size=64 --learn 1e-3 --d_outs=10-3-128=5-3-128")
        assert (config.batch_size, config.train.lr) == (64, 1e-3)
        assert config.model.cubemlp.d_outs == [(10, 3, 128), (5, 3, 128)]

    @pytest.mark.parametrize(
        "kind, numbers, key, value",
        [
            ("multi_step", "9-60", "milestones", [9, 60]),
            ("multi_step", "9", "milestones", [9]),
            ("step", "7", "step_size", 7),
            ("plateau", "4", "patience", 4),
        ],
    )
    def test_schedules(self, kind, numbers, key, value):
        schedule = import_command(f"--lr_decrease {kind} --lr_decrease_iter {numbers}")[0].train.schedule
        assert schedule.kind == kind
        assert getattr(schedule, key) == value

    @pytest.mark.parametrize("dataset", DATASETS)
    def test_every_data_set(self, dataset):
        config, notes = import_command(f"--dataset {dataset} --normalize 0-1-0")
        assert config.data.dataset == DATASETS[dataset]
        assert config.data.normalize_audio == ("none" if "_Dec" in dataset else "minmax")
        if config.data.dataset == "custom" and "pom" not in dataset:
            assert any(f"--dataset {dataset}: unsupported" in note for note in notes)

    @pytest.mark.parametrize(
        "command, words",
        [
            ("--k_neighbour 3", ["--k_neighbour", "Did you mean --k_neighbor?"]),
            ("--batch_size 32 --frobnicate", ["unknown flag --frobnicate"]),
            ("--bias 1", ["a value without a flag 1"]),
            ("--loss MEA", ["--loss", "MEA", "MAE"]),
            ("--optm SAM", ["--optm", "SAM"]),
            ("--dataset mosi", ["--dataset", "mosi_Dec"]),
            ("--d_hiddens 10-2=3", ["--d_hiddens", "50-3-128=10-3-128"]),
            ("--d_hiddens 10-3-128", ["d_hiddens"]),
            ("--loss_mi_coefficient2 1-1", ["2 values", "8 values"]),
            ("--loss_mi_coefficient2 1e-3-1-1-1-1-1-1-1", ["--loss_mi_coefficient2", "no exponents"]),
            ("--res_project 1-2", ["--res_project", "1-2"]),
            ("--seed x", ["--seed", "an integer"]),
            ("--batch_size", ["--batch_size", "expected one argument"]),
            ("--d 3", ["ambiguous"]),
            ("--lr_decrease_iter 9-60", ["--lr_decrease_iter", "multi_step"]),
            ("--k_neighbor 12", ["objective.k_neighbor", "batch_size 16"]),
            ("--task classification --num_class 1 --loss BCE", ["num_class"]),
            ("--task_name 'a\" ", ["--task_name"]),
            ("my_config.yaml", ["my_config.yaml", "python Main.py"]),
        ],
    )
    def test_problems_are_one_line(self, command, words):
        with pytest.raises(ConfigError) as caught:
            import_command(command)
        one_line(caught, *words)

    def test_documentation_holds_the_table(self):
        assert flag_table() in DOCS.read_text(encoding="utf-8"), "regenerate it with engine.mimrl.commands.flag_table()"


BERT = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 16}  # fmt: skip


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"} | BERT))
    return str(folder)


def reference_state(command: str, seed: int = 0) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """The model that the command describes: its state dict under the reference's names, and our model itself."""
    from engine.mimrl.model import build_model
    from engine.mimrl.terms import mimrl_objective
    from engine.model.text_encoder import text_encoder_from_config

    config = import_command(command)[0].resolve()
    torch.manual_seed(seed)
    model = build_model(config, 5, 7, text_encoder_from_config({"model_type": "bert"} | BERT)).eval()
    objective = mimrl_objective(config.objective, model.fused_dim, config.model.d_common)
    state = {**model.state_dict(), **objective.estimator_state()}
    return {f"module.{engine_to_reference(name)}": tensor for name, tensor in state.items()}, model


def small_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    return Batch(
        index=torch.arange(2), ids=["a", "b"], label=torch.zeros(2, 1),
        token_ids=torch.randint(0, 30, (2, 6), generator=generator), token_mask=torch.ones(2, 6, dtype=torch.long),
        text=None, audio=torch.randn(2, 8, 5, generator=generator), audio_length=torch.tensor([8, 8]),
        vision=torch.randn(2, 9, 7, generator=generator), vision_length=torch.tensor([9, 9]),
    )  # fmt: skip


SMALL = "python Main.py --dataset mosi_Dec --d_common 16 --time_len 6 --d_hiddens 4-3-8=2-2-8 --d_outs 5-3-16=3-2-12 "
ARCHITECTURES = {
    "gru": SMALL + "--bias",
    "no bias, ln_first, lstm": SMALL + "--ln_first --encoders lstm --features_compose_k sum",
    "cat over both, wide head": SMALL.replace("3-2-12", "5-3-16") + "--features_compose_t cat --features_compose_k cat",
    "cat over time, conv": SMALL + "--features_compose_t cat --encoders conv --activate tanh --bias",
    "identity residual": SMALL.replace("5-3-16=3-2-12", "6-3-16=6-3-16") + "--res_project 0-0 --bias --ln_first",
    "one block, concat critic": SMALL.replace("4-3-8=2-2-8", "4-3-8").replace("5-3-16=3-2-12", "5-2-16")
    + "--res_project 1 --critic_type concat --bound_type tuba --baseline_type unnormalized",
    "classification": SMALL + "--task classification --num_class 3 --loss CE --bound_type js --baseline_type gaussain",
}


class TestImport:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_round_trip(self, name, tmp_path, bert_folder):
        """Every architecture comes back with the same predictions and estimators, and from shapes alone too."""
        from engine.trainer import load_run

        command = ARCHITECTURES[name]
        state, model = reference_state(command)
        torch.save({"epoch": 3, "model": state, "optim_main": {"state": {}}}, tmp_path / "best_valid_model.pth.tar")
        import_checkpoint(tmp_path / "best_valid_model.pth.tar", tmp_path / "run", command, text_encoder=bert_folder)
        run = load_run(tmp_path / "run")
        batch = small_batch()
        with torch.no_grad():
            assert torch.equal(run.model(batch).prediction, model(batch).prediction)
        for key, tensor in run.objective.estimator_state().items():
            assert torch.equal(tensor, state[f"module.{engine_to_reference(key)}"]), key
        assert (run.config.text_encoder, run.config.mode) == (bert_folder, "faithful")
        assert json.loads((tmp_path / "run" / "text_encoder" / "config.json").read_text())["hidden_size"] == 32

        expected = import_command(command)[0]
        import_checkpoint(tmp_path / "best_valid_model.pth.tar", tmp_path / "alone", text_encoder=bert_folder)
        alone = load_config(tmp_path / "alone" / "config.yaml")
        told, told_by_shapes = leaves(expected), leaves(alone)
        from_shapes = (
            "data.time_len model.d_common model.encoder model.num_class model.task model.cubemlp.d_hiddens "
            "model.cubemlp.d_outs model.cubemlp.bias model.cubemlp.res_project objective.critic objective.hidden "
            "objective.embed"
        )
        for key in from_shapes.split():
            assert told_by_shapes[key] == told[key], key
        assert alone.model.cubemlp.ln_first == (expected.model.cubemlp.ln_first and name != "identity residual")
        for key in ("model.compose_t", "model.compose_k"):
            assert (told_by_shapes[key] == "cat") == (told[key] == "cat")

    @pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "lr": 0.1}, lambda s: {"net": s}])
    def test_where_the_state_may_be(self, wrap, tmp_path, bert_folder):
        state, _ = reference_state(ARCHITECTURES["gru"])
        torch.save(wrap(state), tmp_path / "x.pth.tar")
        import_checkpoint(tmp_path / "x.pth.tar", tmp_path / "run", text_encoder=bert_folder)
        saved, meta = checkpoint.load(tmp_path / "run" / "best.safetensors")
        assert torch.equal(saved["model"]["text_projection.weight"], state["module.W_t.weight"])
        assert (meta["audio_dim"], meta["vision_dim"], meta["epoch"]) == (5, 7, None)

    def test_the_run_holds_its_tokenizer(self, tmp_path, bert_folder):
        """So that it predicts where the text encoder's folder is not."""
        from engine.loaders.text import load_tokenizer
        from engine.trainer import load_run

        encoder = small_tokenizer(tmp_path / "encoder")
        shutil.copy(Path(bert_folder) / "config.json", encoder)
        wanted = load_tokenizer(str(encoder)).fingerprint
        state, _ = reference_state(ARCHITECTURES["gru"])
        torch.save(state, tmp_path / "x.pth.tar")
        import_checkpoint(tmp_path / "x.pth.tar", tmp_path / "run", text_encoder=str(encoder))
        shutil.rmtree(encoder)
        assert load_run(tmp_path / "run").tokenizer.fingerprint == wanted
        notes = import_checkpoint(tmp_path / "x.pth.tar", tmp_path / "other", text_encoder=bert_folder)
        assert any(note.startswith("tokenizer: ") and "tokenizer.json" in note for note in notes)

    def test_notes_tell_what_is_certain(self, tmp_path, bert_folder):
        state, _ = reference_state(ARCHITECTURES["cat over time, conv"])
        torch.save(state, tmp_path / "x.pth.tar")
        notes = import_checkpoint(tmp_path / "x.pth.tar", tmp_path / "run", text_encoder=bert_folder)
        certain = next(note for note in notes if note.startswith("from the shapes"))
        assumed = next(note for note in notes if note.startswith("ASSUMED"))
        assert "compose_t=cat" in certain and "encoder=conv" in certain
        assert "compose_k=mean" in assumed and "activate=gelu" in assumed

    def test_config_instead_of_command(self, tmp_path, bert_folder):
        state, _ = reference_state(ARCHITECTURES["gru"])
        torch.save(state, tmp_path / "x.pth.tar")
        config = import_command(ARCHITECTURES["gru"] + " --activate elu")[0]
        config.save(tmp_path / "config.yaml")
        for given, out in ((config, "one"), (tmp_path / "config.yaml", "two")):
            notes = import_checkpoint(tmp_path / "x.pth.tar", tmp_path / out, config=given, text_encoder=bert_folder)
            assert load_config(tmp_path / out / "config.yaml").model.cubemlp.activate == "elu"
            assert any(note.startswith("from the config") and "elu" in note for note in notes)

    def test_pooler_and_position_ids_are_left_out(self, tmp_path, bert_folder):
        state, _ = reference_state(ARCHITECTURES["gru"])
        state["module.bertmodel.pooler.dense.weight"] = torch.zeros(32, 32)
        state["module.bertmodel.pooler.dense.bias"] = torch.zeros(32)
        state["module.bertmodel.embeddings.position_ids"] = torch.arange(16)[None]
        torch.save(state, tmp_path / "x.pth.tar")
        notes = import_checkpoint(tmp_path / "x.pth.tar", tmp_path / "run", text_encoder=bert_folder)
        assert any(note.startswith("not used") and "pooler" in note and "position_ids" in note for note in notes)

    def test_text_encoder_from_shapes(self, tmp_path):
        state, _ = reference_state(ARCHITECTURES["gru"])
        torch.save(state, tmp_path / "x.pth.tar")
        notes = import_checkpoint(tmp_path / "x.pth.tar", tmp_path / "run")
        text = json.loads((tmp_path / "run" / "text_encoder" / "config.json").read_text())
        assert text | BERT | {"num_attention_heads": 1} == text
        assert any("ASSUMED are 1 attention heads" in note for note in notes)
        assert any("tokenizer: unknown" in note for note in notes)

    def test_without_estimators(self, tmp_path, bert_folder):
        from engine.trainer import load_run

        state, _ = reference_state(ARCHITECTURES["gru"])
        torch.save({k: v for k, v in state.items() if "mi_estimator" not in k}, tmp_path / "x.pth.tar")
        notes = import_checkpoint(tmp_path / "x.pth.tar", tmp_path / "run", text_encoder=bert_folder)
        assert any("untrained" in note for note in notes)
        load_run(tmp_path / "run")

    def test_half_precision_becomes_fp32(self, tmp_path, bert_folder):
        state, _ = reference_state(ARCHITECTURES["gru"])
        torch.save({k: v.half() for k, v in state.items()}, tmp_path / "x.pth.tar")
        import_checkpoint(tmp_path / "x.pth.tar", tmp_path / "run", text_encoder=bert_folder)
        saved, _ = checkpoint.load(tmp_path / "run" / "best.safetensors")
        assert saved["model"]["text_projection.weight"].dtype == torch.float32


class Surprise:
    def __reduce__(self):
        return (print, ("code from a pickle ran",))


class TestRefusedImport:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "ref.pth.tar"

    def refused(self, path, *words, error=CheckpointError, **arguments):
        out = path.parent / "run"
        with pytest.raises(error) as caught:
            import_checkpoint(path, out, **arguments)
        assert isinstance(caught.value, EngineError)
        assert not (out / "config.yaml").exists(), "a refused import leaves no run"
        assert not (out / "best.safetensors").exists()
        return one_line(caught, *words)

    def test_missing(self, path):
        self.refused(path, str(path), "no such file")

    def test_code_in_the_pickle(self, path, capsys):
        torch.save({"model": {"W_t.weight": torch.zeros(1)}, "opt": Surprise()}, path)
        self.refused(path, "runs code", "print")
        assert capsys.readouterr().out == ""

    def test_whole_module(self, path):
        torch.save(nn.Linear(2, 2), path)
        self.refused(path, "runs code", "state_dict")

    def test_plain_pickle_of_something(self, path):
        path.write_bytes(pickle.dumps({"a": Path("x")}))
        self.refused(path)

    @pytest.mark.parametrize("length", [0, 10, 1000])
    def test_truncated(self, path, length):
        torch.save({"W_t.weight": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:length])
        self.refused(path, "cannot read")

    def test_no_state_inside(self, path):
        torch.save({"epoch": 3, "optim_main": {}}, path)
        self.refused(path, "a dict of epoch, optim_main")
        torch.save([torch.zeros(1)], path)
        self.refused(path, "list")

    def test_another_model(self, path):
        torch.save(nn.Sequential(nn.Linear(2, 2)).state_dict(), path)
        self.refused(path, "0.weight, 0.bias", "published MIMRL model")

    @pytest.mark.parametrize(
        "missing",
        [
            "W_t.weight",
            "rnn_v.weight_ih_l0",
            "ln_a.bias",
            "mlp_encoder.layers_stack.0.mlp_d.fc2.weight",
            "bertmodel.encoder.layer.1.output.dense.bias",
            "vcmi_estimator_tc_v.classifier.mlp.4.bias",
            "classifier.0.weight",
        ],
    )
    def test_missing_parameter(self, path, missing, bert_folder):
        state, _ = reference_state(ARCHITECTURES["gru"])
        del state[f"module.{missing}"]
        torch.save(state, path)
        message = self.refused(path, text_encoder=bert_folder)
        assert missing in message or reference_to_engine(missing) in message

    def test_misshapen_parameter(self, path, bert_folder):
        state, _ = reference_state(ARCHITECTURES["gru"])
        state["module.rnn_a.weight_hh_l1"] = torch.zeros(3, 3)
        torch.save(state, path)
        self.refused(path, "audio_encoder.rnn.weight_hh_l1", "[3, 3]", text_encoder=bert_folder)

    @pytest.mark.parametrize(
        "wrong, words",
        [
            ("--d_common 32", ["model.d_common=16", "32"]),
            ("--time_len 7", ["data.time_len=6", "7"]),
            ("--encoders lstm", ["model.encoder=gru", "lstm"]),
            ("--features_compose_t cat", ["model.compose_t=mean", "cat"]),
            ("--ln_first", ["model.cubemlp.ln_first=false", "true"]),
            ("--critic_type concat", ["objective.critic=separate", "concat"]),
        ],
    )
    def test_command_at_odds_with_the_shapes(self, path, wrong, words, bert_folder):
        state, _ = reference_state(ARCHITECTURES["gru"])
        torch.save(state, path)
        command = f"{ARCHITECTURES['gru']} {wrong}"
        self.refused(path, "as the command says", *words, command=command, text_encoder=bert_folder)

    def test_other_text_encoder(self, path, tmp_path):
        state, _ = reference_state(ARCHITECTURES["gru"])
        torch.save(state, path)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"} | BERT | {"hidden_size": 64}))
        self.refused(path, "hidden_size 32", "64", text_encoder=str(tmp_path / "other"))
        self.refused(path, "text_encoder", text_encoder=str(tmp_path / "nowhere"), error=ConfigError)

    def test_command_and_config(self, path):
        self.refused(path, "both", command="python Main.py", config=Config(), error=ConfigError)

    def test_folder_in_use_or_unwritable(self, path, tmp_path, bert_folder):
        state, _ = reference_state(ARCHITECTURES["gru"])
        torch.save(state, path)
        (tmp_path / "used").mkdir()
        (tmp_path / "used" / "config.yaml").write_text("")
        with pytest.raises(OutputError) as caught:
            import_checkpoint(path, tmp_path / "used")
        one_line(caught, "another run")
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError) as caught:
            import_checkpoint(path, tmp_path / "file" / "run", text_encoder=bert_folder)
        one_line(caught, "a file where a folder is needed")
