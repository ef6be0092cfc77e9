from tests.golden.common import entries, golden_dir


def pytest_report_header() -> str:
    return f"golden: {golden_dir()} ({len(entries(''))} recordings)"
