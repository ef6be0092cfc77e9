"""The axis mixes of CubeMLP."""

from __future__ import annotations

from engine.kernels.cube_mix import triton as kernels
from engine.kernels.cube_mix.cpu import STORAGE
from tests.aot.compiling import AotCase

TIME, CHANNEL, MODALITY = (100, 50, 50), (128, 128, 128), (3, 3, 3)


def cases() -> list[AotCase]:
    """The flagship's axes: every kernel in every precision for many columns, and for few ones where LayerNorm is last.
    Biases, a projection and gelu everywhere."""
    collected = []
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        for ln_first in (False, True) if precision != "fp16" else (False,):
            for few in (False, True) if precision == "bf16" and not ln_first else (False,):
                collected += _long_cases("time", TIME, precision, ln_first, few)
                collected += _long_cases("channel", CHANNEL, precision, ln_first, few)
                collected.append(_pair_case(precision, ln_first, few))
    for ln_first in (False, True):
        collected += _short_cases(ln_first)
    return [*collected, _sum_case()]


def _sum_case() -> AotCase:
    """Of the channel and modality axes."""
    inputs = {n: "i32" for n in kernels.sum_kernel.arg_names if n.startswith("n_") or n.endswith("_stride")}
    constexprs = {"ROWS": kernels.SUM_ROWS, "COLUMNS": kernels.SUM_COLUMNS}
    for prefix, (d_in, hidden, d_out) in (("", MODALITY), ("OTHER_", CHANNEL)):
        sizes = (hidden * d_in, d_out * hidden, d_out * d_in, hidden, d_out, d_out, d_out)
        constexprs |= {f"{prefix}SIZES": sizes, f"{prefix}WANTED": sizes}
    return _case("sum/fp32", kernels.sum_kernel, inputs, constexprs)


def _aot_settings(lengths: tuple[int, int, int], ln_first: bool) -> dict[str, object]:
    names = ("D_IN", "HIDDEN", "D_OUT")
    flags = {"BIAS1": True, "BIAS2": True, "RESIDUAL": True}
    return {"eps": 1e-6, "ACTIVATION": "gelu", "LN_FIRST": ln_first} | flags | dict(zip(names, lengths, strict=True))


def _aot_storage(precision: str) -> str:
    return f"*{precision}" if precision in STORAGE else "*fp32"


def _long_cases(axis: str, lengths: tuple[int, int, int], precision: str, ln_first: bool, few: bool) -> list[AotCase]:
    variant = f"{axis}{'_ln_first' if ln_first else ''}{'_few' if few else ''}/{precision}"
    settings = _aot_settings(lengths, ln_first) | {"PRECISION": precision, "inner": 384 if axis == "time" else 1}
    sizes = {name: settings[name] for name in ("D_IN", "HIDDEN", "D_OUT")}
    quick = axis == "time" and precision == "bf16" and not ln_first
    inputs = {"columns": "i32", "keep": "i32", "run": "i32"}
    inputs |= dict.fromkeys(("pre", "centred", "d1", "d2"), _aot_storage(precision))
    if axis == "time":
        inputs |= dict.fromkeys(("y", "dy"), _aot_storage(precision))
    else:
        inputs |= dict.fromkeys(("x", "dx"), _aot_storage(precision))
    block_c, collected = kernels.COLUMNS[few], []
    if axis == "time":
        blocks = kernels._forward_blocks(sizes, block_c)
        collected.append(
            _case(
                f"forward/{variant}",
                kernels.forward_kernel,
                inputs,
                settings | blocks,
                kernels._forward_warps(precision),
                True,
                quick,
            )
        )
    blocks = kernels._backward_blocks(sizes, block_c)
    collected.append(
        _case(f"backward/{variant}", kernels.backward_kernel, inputs, settings | blocks, kernels.WARPS, True, quick)
    )
    if not few:
        blocks = kernels._weight_blocks(precision)
        collected.append(
            _case(f"weights/{variant}", kernels.weights_kernel, inputs, settings | blocks, kernels.WARPS, True, quick)
        )
    return collected


def _pair_case(precision: str, ln_first: bool, few: bool) -> AotCase:
    variant = f"{'ln_first' if ln_first else 'ln_last'}{'_few' if few else ''}/{precision}"
    settings = _aot_settings(CHANNEL, ln_first) | {"PRECISION": precision, "BLOCK_S": kernels.SHORT_COLUMNS}
    settings |= dict(zip(("M_IN", "M_HIDDEN", "M_OUT"), MODALITY, strict=True))
    settings |= {"M_BIAS1": True, "M_BIAS2": True, "M_RESIDUAL": True}
    block_c = kernels.COLUMNS[few]
    settings |= kernels._forward_blocks({"HIDDEN": CHANNEL[1], "D_OUT": CHANNEL[2]}, block_c)
    inputs = {"rows": "i32", "columns": "i32", "keep": "i32"}
    inputs |= dict.fromkeys(("x", "mixed", "pre", "centred"), _aot_storage(precision))
    quick = precision == "tf32" and not ln_first
    return _case(
        f"pair_forward/{variant}",
        kernels.pair_forward_kernel,
        inputs,
        settings,
        kernels._forward_warps(precision),
        True,
        quick,
    )


def _short_cases(ln_first: bool) -> list[AotCase]:
    settings = _aot_settings(MODALITY, ln_first) | {"BLOCK_C": kernels.SHORT_COLUMNS, "inner": 128}
    inputs = {"columns": "i32", "run": "i32"}
    variant = f"modality{'_ln_first' if ln_first else ''}/fp32"
    both = {"short_forward": kernels.short_forward_kernel, "short_backward": kernels.short_backward_kernel}
    return [_case(f"{name}/{variant}", kernel, inputs, settings) for name, kernel in both.items()]


def _case(
    name: str, kernel: object, inputs: dict[str, str], constexprs: dict[str, object], warps: int = kernels.WARPS,
    dot: bool = False, quick: bool = True,
) -> AotCase:  # fmt: skip
    """Pointers are to fp32 where `inputs` does not say otherwise; both name more than one kernel takes."""
    constexprs = {k: v for k, v in constexprs.items() if k in kernel.arg_names}
    signature = {n: inputs.get(n, "*fp32") for n in kernel.arg_names if n not in constexprs}
    return AotCase(
        f"cube_mix.{name}",
        kernel,
        signature,
        constexprs,
        num_warps=warps,
        num_stages=kernels.STAGES,
        dot=dot,
        quick=quick,
    )
