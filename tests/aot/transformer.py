"""A transformer's layer: LayerNorm with dropout, GELU, and attention."""

from __future__ import annotations

from engine.kernels.dropout import reference as dropout
from engine.kernels.transformer import plan
from engine.kernels.transformer import triton as kernels
from engine.kernels.transformer.op import NARROW
from tests.aot.compiling import AotCase


def cases() -> list[AotCase]:
    """BERT's layers at MiniLM's and BERT-base's widths, with dropout, in training's precisions; and the embeddings'."""
    cases = []
    for name, low, c in (("bf16", "bf16", 384), ("bf16", "bf16", 768), ("fp32", "fp32", 384)):
        common = {"n": "i32", "c": "i32"}
        norm = {"weight": "*fp32", "seed": "*i64", "eps": "fp32", "number": "i32", **common}
        inside = {"x": f"*{low}", "bias": "*fp32", "residual": "*fp32", **norm}
        outside = {"x": "*fp32", **norm}  # the embeddings': neither bias nor residual
        result = {"shift": "*fp32", "y": "*fp32"}
        slopes = {"grad": "*fp32", "sums": "*fp32"}
        both = low != "fp32"
        given = {"small": f"*{low}"} if both else {}
        more = {"grad_low": f"*{low}"} if both else {}
        for place, after, forward, backward in (
            ("layer", False, {**inside, **result, **given},
             {**inside, **slopes, **more, "dx": f"*{low}", "dresidual": "*fp32"}),
            ("embeddings", True, {**outside, **result, **given}, {**outside, **slopes, **more, "dx": "*fp32"}),
        ):  # fmt: skip
            if place == "embeddings" and not both:
                continue
            for kernel, signature, blocks in (
                (kernels.add_norm_kernel, forward, kernels._norm_blocks(c)),
                (kernels.add_norm_backward_kernel, backward, plan.norm_blocks(c)),
            ):
                warps = blocks.pop("num_warps")
                fixed = {**kernels._drop(0.1, after), **blocks}
                absent = {k: None for k in kernel.arg_names if k not in signature and k not in fixed}
                title = f"transformer.{kernel.__name__.removesuffix('_kernel')}/{place}/c{c}/{name}"
                cases.append(AotCase(title, kernel, signature, {**fixed, **absent}, num_warps=warps))
                if c == 384:  # in evaluation nothing is dropped, and there is no seed
                    given_here = {k: v for k, v in signature.items() if k != "seed"}
                    without = {**fixed, **kernels._drop(0.0, after), **absent, "seed": None}
                    cases.append(AotCase(f"{title}/undropped", kernel, given_here, without, num_warps=warps))
        width = {"x": f"*{low}", "bias": "*fp32", **common}
        for kernel, signature in (
            (kernels.bias_gelu_kernel, {**width, "y": f"*{low}"}),
            (kernels.bias_gelu_backward_kernel, {**width, "grad": f"*{low}", "dx": f"*{low}", "sums": "*fp32"}),
        ):
            if c == 384:
                title = f"transformer.{kernel.__name__.removesuffix('_kernel')}/{name}"
                cases.append(AotCase(title, kernel, signature, dict(kernels.GELU)))
    return cases + _attention_cases() + _embedding_cases()


def _embedding_cases() -> list[AotCase]:
    """Positions that are counted and those that are given; and the sums of all parts."""
    cases = []
    sizes = dict.fromkeys(("n", "length", "vocabulary", "places", "c"), "i32")
    forward = dict.fromkeys(("words", "positions", "types", "x"), "*fp32")
    backward = dict.fromkeys(("grad", "parts", "of_words", "of_places", "of_types"), "*fp32")
    blocks = dict(kernels.EMBED_BACKWARD)
    warps = blocks.pop("num_warps")
    for name, given, fixed in (("counted", {}, {"position": None}), ("given", {"position": "*i64"}, {})):
        signature = {"token_ids": "*i64", **sizes, **given}
        cases += [
            AotCase(
                f"transformer.embed/{name}", kernels.embed_kernel, signature | forward, {**kernels.EMBED, **fixed}
            ),
            AotCase(
                f"transformer.embed_backward/{name}", kernels.embed_backward_kernel,
                signature | backward | {"programs": "i32", "padding": "i32"}, {**blocks, **fixed}, num_warps=warps,
            ),
        ]  # fmt: skip
    signature = {f"p{i}": "*fp32" for i in range(16)} | {"out": "*fp32", "rows": "i32", "width": "i32"}
    return [*cases, AotCase("transformer.sum_parts", kernels.sum_parts_kernel, signature, dict(kernels.SUM))]


def _attention_cases() -> list[AotCase]:
    """Texts of up to 32 and 64 tokens with MiniLM's heads, and 64 with BERT-base's."""
    cases = []
    common = {
        "qkv": "*bf16", "q_bias": "*fp32", "k_bias": "*fp32", "v_bias": "*fp32", "mask": "*bf16", "seed": "*i64",
        "mask_text": "i32", "mask_row": "i32", "length": "i32", "c": "i32", "d": "i32", "scale": "fp32",
        "number": "i32",
    }  # fmt: skip
    own = {
        kernels.attention_kernel: {"out": "*bf16"},
        kernels.attention_backward_kernel: {"grad": "*bf16", "dqkv": "*bf16", "sums": "*fp32"},
    }
    for length, width in ((32, 32), (64, 32), (64, 64)):
        blocks = kernels._text_blocks(length, width)
        warps = blocks.pop("num_warps")
        fixed = {"THRESHOLD": dropout.threshold(0.1), "SCALE": 1 / 0.9, **blocks}
        for kernel, more in own.items():
            title = f"transformer.{kernel.__name__.removesuffix('_kernel')}/L{length}/d{width}"
            signature = {**common, **more}
            cases.append(AotCase(f"{title}/bf16", kernel, signature, fixed, num_warps=warps, dot=True))
            if width <= NARROW:
                of_tokens = signature | {"mask": "*i64"}
                cases.append(AotCase(f"{title}/bf16/tokens", kernel, of_tokens, fixed, num_warps=warps, dot=True))
            if length == 32:
                undropped = {k: v for k, v in signature.items() if k != "seed"}
                without = {**fixed, "THRESHOLD": 0, "SCALE": 1.0, "seed": None}
                cases.append(AotCase(f"{title}/bf16/undropped", kernel, undropped, without, num_warps=warps, dot=True))
    return cases
