"""The contrastive losses' kernels over chunks of scores, as the host functions launch them."""

from __future__ import annotations

from engine.kernels.contrastive import triton as kernels
from tests.aot.compiling import AotCase

# Pointers that a set of roles needs: what is positive, and what is left out.
LABELS = {"labels_ptr": "*i64", "key_labels_ptr": "*i64"}
IDS = {"row_ids_ptr": "*i64", "key_ids_ptr": "*i64"}
ROLES = {
    "diagonal": (kernels.DIAGONAL, {}),
    "labels": (kernels.LABELLED, LABELS),
    "listed": (kernels.LISTED, {"positives_ptr": "*i64"}),
    "everything": (kernels.LABELLED, {**LABELS, **IDS, "mask_ptr": "*u8"}),
}
POINTERS = ("positives_ptr", *LABELS, *IDS, "mask_ptr")


def cases() -> list[AotCase]:
    cases = []
    sizes = dict.fromkeys(("begin", "height", "rows", "columns", "listed", "slots"), "i32")
    for roles, (role, given) in ROLES.items():
        for kind in ("softmax", "hard", "sigmoid"):
            quick = (roles, kind) in (("diagonal", "hard"), ("labels", "softmax"), ("everything", "sigmoid"))
            absent = {name: None for name in POINTERS if name not in given}
            bias = {"bias_ptr": "*fp32"} if kind == "sigmoid" else {}
            absent |= {} if bias else {"bias_ptr": None}
            constants = {
                **absent, "ROLE": role, "HAS_IDS": "row_ids_ptr" in given, "HAS_MASK": "mask_ptr" in given,
                "EXCLUDE_SELF": roles in ("labels", "everything"), "IS_SIGMOID": kind == "sigmoid",
                "HARDNESS": 0.5 if kind == "hard" else 0.0,
            }  # fmt: skip
            chunk = {"scores_ptr": "*fp32", "scale_ptr": "*fp32", **bias, **given}

            def add(name: str, kernel, more: dict, config: dict, extra: dict, quick: bool, parts=(chunk, constants)):
                blocks = {key: value for key, value in config.items() if key.startswith("BLOCK")}
                cases.append(
                    AotCase(
                        f"contrastive.{name}", kernel, {**parts[0], **more}, {**parts[1], **extra, **blocks},
                        num_warps=config["num_warps"], quick=quick,
                    )
                )  # fmt: skip

            add(
                f"statistics/{kind}/{roles}", kernels._statistics, {"out_ptr": "*fp32", **sizes}, kernels.STATISTICS,
                {"WITH_TOTAL": kind == "softmax"}, quick,
            )  # fmt: skip
            for out in ("fp32", "bf16", "split"):
                tensors = {"grads_ptr": "*fp32", "state_ptr": "*fp32", "sums_ptr": "*fp32"}
                tensors["out_ptr"] = "*fp32" if out == "fp32" else "*bf16"
                add(
                    f"gradients/{kind}/{roles}/{out}", kernels._gradients, {**tensors, **sizes, "plane": "i32"},
                    kernels.GRADIENTS, {"SPLIT": out == "split"}, quick and (out == "split" or roles == "labels"),
                )  # fmt: skip
    return cases
