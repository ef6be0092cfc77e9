"""The page shows what was measured, and the measurement runs."""

import json

from bench import examples, machine


def test_the_page_shows_the_result_on_record():
    result = json.loads(examples.RESULT.read_text(encoding="utf-8"))
    page = (machine.ROOT / "docs" / "other_loops.md").read_text(encoding="utf-8")
    assert examples.table(result) in page
    assert list(result["examples"]) == list(examples.EXAMPLES)
    for found in result["examples"].values():
        assert found["first_steps_differ_by"] < 1e-4


def test_a_short_measurement(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{examples.START}\n{examples.END}\nafter\n", encoding="utf-8")
    arguments = ["--only", "supcon", "--steps", "2", "--rounds", "1", "--result", str(tmp_path / "result.json")]
    assert examples.main([*arguments, "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "[supervised contrast]" in text
