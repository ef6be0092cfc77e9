"""What the shapes of a published checkpoint's parameters tell about the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from engine.config import Config
from engine.errors import CheckpointError
from engine.mimrl.names import AXES, engine_to_reference


class Shapes:
    """What the shapes of the parameters tell about the model."""

    def __init__(self, where: str, model: Mapping[str, Tensor], objective: Mapping[str, Tensor]):
        self.where, self.model, self.objective = where, model, objective
        self.d_common, self.text_dim = self["text_projection.weight"]
        self.encoder, self.audio_dim = self._sequence("audio_encoder")
        _, self.vision_dim = self._sequence("vision_encoder")

    def __getitem__(self, name: str) -> tuple[int, ...]:
        tensor = self.model.get(name, self.objective.get(name))
        if tensor is None:
            raise CheckpointError(
                self.where,
                f"no parameter {engine_to_reference(name)}",
                "every parameter of the published MIMRL model",
                "Import a checkpoint of the whole model.",
            )
        return tuple(tensor.shape)

    def _sequence(self, name: str) -> tuple[str, int]:
        if f"{name}.conv.weight" in self.model:
            return "conv", self[f"{name}.conv.weight"][1]
        gates, width = self[f"{name}.rnn.weight_ih_l0"]
        return ("gru" if gates == 3 * self.d_common else "lstm"), width

    def settings(self, assumed: Config) -> dict[str, Any]:
        """{our key: value} of everything that shapes determine; where they leave a choice, `assumed` makes it."""
        inferred: dict[str, Any] = {"model.d_common": self.d_common, "model.encoder": self.encoder}
        inferred |= self._cubemlp()
        inferred |= self._compose(inferred["model.cubemlp.d_outs"][-1], assumed)
        last = max(int(name.split(".")[2]) for name in self.model if name.startswith("head.layers."))
        inferred["model.num_class"] = self[f"head.layers.{last}.weight"][0]
        inferred["model.task"] = "regression" if inferred["model.num_class"] == 1 else "classification"
        if self.objective:
            separate = "estimators.F_T.critic.g.0.weight" in self.objective
            inferred["objective.critic"] = "separate" if separate else "concat"
            inferred["objective.hidden"] = self[f"estimators.F_T.critic.{'g' if separate else 'f'}.0.weight"][0]
            if separate:
                inferred["objective.embed"] = self["estimators.F_T.critic.g.6.weight"][0]
            if "estimators.F_T.baseline.mlp.0.weight" in self.objective:
                inferred["objective.baseline"] = "unnormalized"
            elif assumed.objective.baseline == "unnormalized":
                inferred["objective.baseline"] = "constant"
        return inferred

    def _cubemlp(self) -> dict[str, Any]:
        blocks = 1 + max((int(n.split(".")[2]) for n in self.model if n.startswith("fusion.blocks.")), default=0)
        axes = tuple(AXES.values())
        d_hiddens, d_outs, d_ins, projected, norms = [], [], [], [], []
        for i in range(blocks):
            block = [f"fusion.blocks.{i}.{axis}" for axis in axes]
            d_ins.append(tuple(self[f"{b}.fc1.weight"][1] for b in block))
            d_hiddens.append(tuple(self[f"{b}.fc1.weight"][0] for b in block))
            d_outs.append(tuple(self[f"{b}.fc2.weight"][0] for b in block))
            norms.append(tuple(self[f"{b}.norm.weight"][0] for b in block))
            projected.append(f"{block[0]}.residual.weight" in self.model)
        inferred = {
            "data.time_len": d_ins[0][0],
            "model.cubemlp.d_hiddens": d_hiddens,
            "model.cubemlp.d_outs": d_outs,
            "model.cubemlp.res_project": projected,
            "model.cubemlp.bias": "fusion.blocks.0.time.fc1.bias" in self.model,
        }
        if d_ins != d_outs:  # where no axis changes its length, both places of the LayerNorm have the same size
            inferred["model.cubemlp.ln_first"] = norms == d_ins
        return inferred

    def _compose(self, cube: tuple[int, int, int], assumed: Config) -> dict[str, str]:
        """cat multiplies the width of the fused feature by the length of the axis; mean and sum look alike."""
        t, k, d = cube
        width = self["head.layers.0.weight"][1]
        wanted = (assumed.model.compose_t, assumed.model.compose_k)
        fits = [
            (how_t, how_k)
            for how_t in ("mean", "sum", "cat")
            for how_k in ("mean", "sum", "cat")
            if d * (t if how_t == "cat" else 1) * (k if how_k == "cat" else 1) == width
        ]
        if not fits:
            raise CheckpointError(
                self.where,
                f"a classifier of input width {width} after a cube of {t}-{k}-{d}",
                f"{d}, {d * k}, {d * t} or {d * t * k}",
                "Import a checkpoint of the published model.",
            )
        how_t, how_k = wanted if wanted in fits else fits[0]
        return {"model.compose_t": how_t, "model.compose_k": how_k}

    def bert(self) -> dict[str, int]:
        """BertConfig's sizes."""
        prefix = "text_encoder.model."
        vocab, hidden = self[f"{prefix}embeddings.word_embeddings.weight"]
        layers = {int(name.split(".")[4]) for name in self.model if name.startswith(f"{prefix}encoder.layer.")}
        return {
            "vocab_size": vocab,
            "hidden_size": hidden,
            "num_hidden_layers": len(layers),
            "intermediate_size": self[f"{prefix}encoder.layer.0.intermediate.dense.weight"][0],
            "max_position_embeddings": self[f"{prefix}embeddings.position_embeddings.weight"][0],
            "type_vocab_size": self[f"{prefix}embeddings.token_type_embeddings.weight"][0],
        }
