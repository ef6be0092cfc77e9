"""`report.html`: one self-contained page about a run, made from the run's folder alone.

Nothing is fetched when it is opened: charts are inline SVG, style and script are inline, and a Content-Security-Policy
forbids everything else. The page names the files that the run does not have, and leaves out their sections.
"""

from __future__ import annotations

from pathlib import Path

from engine.files import require_made_here, user_path, write_text
from engine.report.environment import environment as environment
from engine.report.folder import Run as Run
from engine.report.folder import read_run
from engine.report.page import render
from engine.run_folder import require_no_run_file


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write `report.html` into a run folder from what lies there, atomically.

    Args:
        run: folder of a run; an unfinished one is reported as far as it came.
        out: another file for the page, where the run folder cannot be written to. Of existing files only a page is
            replaced.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: the folder is missing or holds no run, or a file of it is not what the run wrote.
        OutputError: the page cannot be written, or `out` is another kind of file.
    """
    content = read_run(run)
    path = content.folder / "report.html" if out is None else user_path(out)
    if out is not None:
        if not path.parent.is_dir() or not path.parent.samefile(content.folder):
            require_no_run_file(path)
        require_made_here(path, b"<!doctype html", "a page")
    write_text(path, render(content))
    return path
