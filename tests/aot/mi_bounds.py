"""The bounds from embeddings (fused), and from scores that are stored."""

from __future__ import annotations

from engine.kernels.mi_bounds import scores, splitting
from engine.kernels.mi_bounds import triton as fused
from engine.kernels.mi_bounds.plan import MAX_WIDTH
from engine.kernels.mi_bounds.tiles import KINDS, LSE
from tests.aot.compiling import ARCHS, AotCase


def cases() -> list[AotCase]:
    return _fused_cases() + _score_cases()


def _fused_cases() -> list[AotCase]:
    """Every kernel in fp32 (tf32x3), tf32 and bf16, in the configurations that the host functions launch."""
    cases = []
    pointers = {"q_ptr": "*{}", "k_ptr": "*{}", "scale_ptr": "*fp32"}
    sizes = {"rows": "i32", "columns": "i32"}
    no_positives = {"positives_ptr": None, "EXCLUDE_SELF": False}
    sides_of = {
        "rows": (True, False, False, True, False),
        "columns": (False, True, False, False, False),
        "keys": (False, True, False, False, True),
        "symmetric": (True, True, False, True, False),
        "sigmoid": (True, False, True, True, False),
    }

    def add(name: str, kernel, signature: dict, constexprs: dict, configs: dict, quick: bool):
        typed = {key: kind.format(element) for key, kind in signature.items()}
        found = configs["half" if dtype == "bf16" else dtype]
        for size in found:
            # those of one architecture are compiled for it alone, the others where they are launched
            archs = (size,) if isinstance(size, int) else tuple(a for a in ARCHS if size == "few" or a not in found)
            if size != "many" or found["few"] != found["many"]:
                rows = 1 if size == "few" else fused.FEW_ROWS
                config = fused.tile(configs, "half" if dtype == "bf16" else dtype, rows, MAX_WIDTH, archs[0])
                launch = {key: config.pop(key) for key in ("num_warps", "num_stages")}
                label = f"sm{size}" if isinstance(size, int) else size
                cases.append(
                    AotCase(
                        f"mi_bounds.{name}/{dtype}/{label}", kernel, typed, {**dot, **constexprs, **config}, dot=True,
                        quick=quick, archs=archs, **launch,
                    )
                )  # fmt: skip

    for dtype, input_precision in (("fp32", "tf32x3"), ("tf32", "tf32"), ("bf16", "ieee")):
        element = "bf16" if dtype == "bf16" else "fp32"
        dot = {"PRECISION": input_precision, "UPCAST": False}
        rounds = {"ROUND": dtype == "tf32"}
        for kind in KINDS:
            add(
                f"statistics/{kind}",
                fused._statistics,
                {**pointers, "joint_ptr": "*fp32", "rest_ptr": "*fp32", **sizes},
                {"KIND": KINDS[kind], "TAU": 5.0},
                fused.STATISTICS,
                dtype == "bf16" and kind == "lse",
            )
        outputs = {"losses_ptr": "*fp32", "state_ptr": "*fp32", "pull_ptr": "*fp32"}
        for pull in (False, True):
            add(
                f"infonce/{'rows' if pull else 'values'}",
                fused._infonce,
                {**pointers, **outputs, **sizes, "slots": "i32"},
                {**no_positives, **rounds, "HAS_POSITIVES": False, "PULL": pull},
                fused.INFONCE,
                dtype != "tf32" and pull,
            )
        for variant, (has_own, has_other, is_sigmoid, owns_rows, is_share) in sides_of.items():
            found, absent = {"diagonal_ptr": "*fp32"}, {}
            for side, has in (("own", has_own), ("other", has_other)):
                for what in ("weight", "shift"):
                    if has and not (is_sigmoid and what == "shift"):
                        found[f"{side}_{what}_ptr"] = "*fp32"
                    else:
                        absent[f"{side}_{what}_ptr"] = None
            add(
                f"gradients/{variant}",
                fused._gradients,
                {
                    "own_ptr": "*{}", "other_ptr": "*{}", "scale_ptr": "*fp32", "factor_ptr": "*fp32", "out_ptr": "*{}",
                    **found, "own_count": "i32", "other_count": "i32",
                },
                {
                    **no_positives, **absent, **rounds, "HAS_OWN": has_own, "HAS_OTHER": has_other,
                    "IS_SIGMOID": is_sigmoid, "OWNS_ROWS": owns_rows, "IS_SHARE": is_share, "HAS_FACTORS": False,
                    "POSITIVES": fused.DIAGONAL,
                },
                fused.GRADIENTS,
                dtype != "tf32" and variant in ("rows", "keys"),
            )  # fmt: skip
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32"}
    cases.append(AotCase("mi_bounds.round", fused._round, signature, {"BLOCK": fused.ROUND_BLOCK}))
    return cases


def _score_cases() -> list[AotCase]:
    """The kernels over stored scores, as the host functions launch them."""
    cases = []
    chunk = {"scores_ptr": "*fp32", "scale_ptr": "*fp32", "begin": "i32", "height": "i32"}
    given = {"scores_ptr": "*fp32", "begin": "i32", "height": "i32"}
    plain = {"positives_ptr": None, "HAS_POSITIVES": False, "EXCLUDE_SELF": False}
    log_alpha, log_beta = scores._log_weights(0.01)
    weights = {"LOG_ALPHA": log_alpha, "LOG_BETA": log_beta}

    def add(name: str, kernel, signature: dict, constexprs: dict, config: dict, quick: bool = True):
        blocks = {key: value for key, value in config.items() if key.startswith("BLOCK")}
        launch = {key: value for key, value in config.items() if key.startswith("num")}
        cases.append(AotCase(f"mi_bounds.{name}", kernel, signature, {**constexprs, **blocks}, quick=quick, **launch))

    rows_and_columns = {"rows": "i32", "columns": "i32"}
    for kind in KINDS:
        add(
            f"chunk_rows/{kind}",
            scores._rows,
            {**chunk, "joint_ptr": "*fp32", "rest_ptr": "*fp32", **rows_and_columns},
            {**plain, "KIND": KINDS[kind], "TAU": 5.0, "SCALED": True},
            scores.ROWS,
            kind == "lse",
        )
    for name, out in (("values", None), ("fp32", "*fp32"), ("bf16", "*bf16"), ("split", "*bf16")):
        add(
            f"chunk_infonce/{name}",
            scores._infonce_rows,
            {
                **chunk, "losses_ptr": "*fp32", "state_ptr": "*fp32", **rows_and_columns, "slots": "i32",
                "plane": "i32", **({"out_ptr": out} if out else {}),
            },
            {
                **plain, "WITH_GRADIENT": out is not None, "SPLIT": name == "split", "FACTOR": 1.0,
                **({} if out else {"out_ptr": None}),
            },
            scores.GRADIENT_ROWS if out else scores.ROWS,
        )  # fmt: skip
    for is_first in (True, False):
        add(
            f"chunk_columns/{'first' if is_first else 'next'}",
            scores._columns,
            {**chunk, "parts_ptr": "*fp32", "columns": "i32", "part_height": "i32", "slots": "i32"},
            {"IS_FIRST": is_first},
            scores.COLUMNS,
        )
    add(
        "merge_parts",
        scores._merge_parts,
        {"parts_ptr": "*fp32", "out_ptr": "*fp32", "columns": "i32", "slots": "i32"},
        {"PARTS": scores.PARTS},
        {key: value for key, value in scores.COLUMNS.items() if key != "BLOCK_M"},
    )
    both = {"row_weight_ptr": "*fp32", "diagonal_ptr": "*fp32"}
    row_shift, column = {"row_shift_ptr": "*fp32"}, {"col_weight_ptr": "*fp32", "col_shift_ptr": "*fp32"}
    for name, source, shifted, has_columns, out in (
        ("chunk_gradients/exponential/fp32", chunk, True, False, "*fp32"),
        ("chunk_gradients/exponential/bf16", chunk, True, False, "*bf16"),
        ("chunk_gradients/exponential/split", chunk, True, False, "*bf16"),
        ("chunk_gradients/symmetric/bf16", chunk, True, True, "*bf16"),
        ("chunk_gradients/sigmoid/bf16", chunk, False, False, "*bf16"),
        ("score_gradients/exponential", given, True, False, "*fp32"),
        ("score_gradients/sigmoid", given, False, False, "*fp32"),
    ):
        present = {**both, **(row_shift if shifted else {}), **(column if has_columns else {})}
        absent = {key: None for key in (*row_shift, *column) if key not in present}
        if source is given:
            absent["scale_ptr"] = None
        add(
            name,
            scores._gradients,
            {**source, **present, "out_ptr": out, **rows_and_columns, "plane": "i32"},
            {
                **plain, **absent, "IS_SIGMOID": not shifted, "HAS_COLUMNS": has_columns, "SCALED": source is chunk,
                "SPLIT": name.endswith("split"),
            },
            scores.CELLS,
        )  # fmt: skip
    state = {"baseline_ptr": "*fp32", "state_ptr": "*fp32", "count": "i32", "slots": "i32"}
    for name, source in (("chunk", chunk), ("score", given)):
        scaled = {"SCALED": True} if source is chunk else {"SCALED": False, "scale_ptr": None}
        outputs = {f"{what}_ptr": "*fp32" for what in ("joint", "rest", "excess", "shares")}
        add(f"{name}_mixture", scores._mixture, {**source, **state, **outputs}, {**weights, **scaled}, scores.MIXTURE)
        more = {"row_rest_ptr": "*fp32", "weight_ptr": "*fp32", "grad_ptr": "*fp32"}
        for out in ("fp32", "bf16", "split") if source is chunk else ("fp32",):
            add(
                f"{name}_mixture_gradients/{out}",
                scores._mixture_gradients,
                {**source, **state, **more, "out_ptr": "*bf16" if out == "split" else f"*{out}", "plane": "i32"},
                {**weights, **scaled, "SPLIT": out == "split"},
                scores.MIXTURE_CELLS,
            )
    add(
        "split_rows",
        splitting._split_rows,
        {"x_ptr": "*fp32", "out_ptr": "*bf16", "rows": "i32", "width": "i32"},
        {},
        splitting.PIECES,
    )
    pieces = {f"{name}_ptr": "*fp32" for name in ("a", "b", "c", "out")}
    sizes = {"rows": "i32", "width": "i32", "group_step": "i32"}
    add("fold", splitting._fold, {**pieces, **sizes}, {"A": 3, "B": 2, "C": 1}, splitting.PIECES)
    add(
        "score_rows/lse",
        scores._rows,
        {**given, "joint_ptr": "*fp32", "rest_ptr": "*fp32", **rows_and_columns},
        {**plain, "scale_ptr": None, "KIND": LSE, "TAU": 5.0, "SCALED": False},
        scores.ROWS,
    )
    return cases
