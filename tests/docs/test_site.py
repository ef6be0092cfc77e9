"""The documentation builds as a site, strictly: no broken link, anchor, reference or page that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import engine
from engine import kernels

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the site is built by mkdocs, of the extra docs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_built(site: Path):
    pages = {path.stem for path in (PROJECT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}


def test_the_reference_has_every_public_name(site: Path):
    text = (site / "kernels_reference.html").read_text(encoding="utf-8")
    assert all(re.search(rf'id="engine\.kernels\.([\w.]+\.)?{name}"', text) for name in kernels.__all__)
    text = (site / "python_reference.html").read_text(encoding="utf-8")
    # Config is described key by key on its own page.
    names = set(engine.__all__) - {"__version__", "Config"}
    assert [name for name in sorted(names) if f'id="engine.{name}"' not in text] == []


def test_formulas_are_mathml_and_nothing_is_fetched(site: Path):
    text = (site / "concepts.html").read_text(encoding="utf-8")
    assert (
        text.count("<math") >= 20 and "arithmatex" not in text and "$" not in re.sub(r"<script.*?</script>", "", text)
    )
    fetched = [
        (page.name, address)
        for page in site.glob("*.html")
        for address in re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)"', page.read_text("utf-8"))
    ]
    assert fetched == []


def test_no_link_leads_out_of_the_site_into_the_repository(site: Path):
    for page in site.glob("*.html"):
        assert not re.findall(r'href="\.\./(?:examples|engine|bench)[^"]*"', page.read_text("utf-8")), page.name
