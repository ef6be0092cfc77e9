import torch

from engine.demo.information import compare_with_truth
from engine.demo.latents import CMI_TERMS, MI_TERMS, LatentModel, true_information
from engine.information.estimate import Estimate


def test_rows_have_the_reports_shape(monkeypatch):
    """Names, truth and estimates; the estimators are tested in tests/truth and with the slow demo."""
    from engine.demo import information

    def found(value):
        return Estimate(value, (value - 1, value + 1), 0.1, "method", {}, 100)

    monkeypatch.setattr(information, "estimate_mi", lambda x, y, **_: found(float(len(x))))
    monkeypatch.setattr(information, "estimate_cmi", lambda x, y, z, **_: found(float(z.shape[1])))
    threads, seen = torch.get_num_threads(), []
    model = LatentModel(shared=0.3)
    rows = compare_with_truth(samples=100, model=model, on_term=seen.append)
    assert [r["name"] for r in rows] == seen == [*MI_TERMS, *CMI_TERMS]
    assert all(r["true"] == true_information(model)[r["name"]] for r in rows)
    assert rows[0]["estimates"] == {"estimate": 100.0, "low": 99.0, "high": 101.0}
    assert {r["name"]: r["estimates"]["estimate"] for r in rows[2:]} == {
        "I(A;C|T)": 3.0, "I(T;A|C)": 1.0, "I(V;C|T)": 3.0, "I(T;V|C)": 1.0, "I(T;C|A)": 3.0, "I(T;C|V)": 3.0
    }  # fmt: skip
    assert torch.get_num_threads() == threads
