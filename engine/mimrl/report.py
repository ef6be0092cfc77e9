"""What the report says about MIMRL's terms and features."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.report.words import Words

MODALITIES = {"text": "T", "audio": "A", "vision": "V"}

FEATURES = {"F": "F, fused", "T": "T, text", "A": "A, audio", "V": "V, vision"}

TERMS = {
    "I(F;T)": "what the fused feature keeps of text",
    "I(F;A)": "what the fused feature keeps of audio",
    "I(F;V)": "what the fused feature keeps of vision",
    "inv": "shared by the modalities: I(T;A) + I(T;V)",
    "spec_t": "on the label, from text only: I(T;C|A) + I(T;C|V) − I(T;A|C) − I(T;V|C)",
    "spec_a": "on the label, from audio only: I(A;C|T) − I(T;A|C)",
    "spec_v": "on the label, from vision only: I(V;C|T) − I(T;V|C)",
    "comp": "shared beyond the label: I(T;A|C) + I(T;V|C)",
}


def describe_terms(settings: Mapping[str, Any]) -> dict[str, str]:
    """Words and formula of each term. Formulas leave out the modalities that the run does not have."""
    data = settings.get("data")
    named = data.get("modalities") if isinstance(data, Mapping) else None
    absent = {letter for name, letter in MODALITIES.items() if isinstance(named, list) and name not in named}
    return {name: _without(text, absent) for name, text in TERMS.items()} if len(absent) < 3 else TERMS


def _without(text: str, absent: set[str]) -> str:
    words, colon, formula = text.partition(": ")
    if not colon:
        return text
    parts = re.findall(r"([+−]) (I\([^)]+\))", f"+ {formula}")
    kept = " ".join(f"{sign} {term}" for sign, term in parts if not absent & set(term[2:-1]))
    return f"{words}: {kept.removeprefix('+ ')}" if kept else words


def note(settings: Mapping[str, Any]) -> str:
    """How conditional estimates are to be read where they have the published form."""
    objective = settings.get("objective")
    compat = objective.get("compat") if isinstance(objective, Mapping) else None
    if compat == "mimrl" or (compat in (None, "auto") and settings.get("mode") == "faithful"):
        return (
            "In the published form a conditional estimate is 1 + half the symmetrised divergence: it reads 1, not 0, "
            "for independent samples. Read its changes and not its level."
        )
    return ""


WORDS = Words(describe_terms, FEATURES, note)
