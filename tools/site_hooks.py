"""What mkdocs does beside its own work: formulas become MathML, and links into the repository become plain names."""

import re
from typing import Any

from latex2mathml.converter import convert

# [text](../examples/cpc.py): a file of the repository that is no page of the site.
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)(?!docs/)[^)\s]+\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(lambda link: link[1] if link[1].startswith("`") else f"`{link[1]}`", markdown)


def on_page_content(html: str, **_: Any) -> str:
    return FORMULA.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    text = found[2].strip()
    for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(entity, sign)
    display = "block" if found[1] == "div" else "inline"
    return convert(text[2:-2].strip(), display=display)
