"""Many runs in one folder: sweeps over settings and seeds, and the search for the best settings.

    engine.sweep(config, "runs/sweep", {"train.lr": [1e-3, 5e-4]}, seeds=range(5))
    engine.tune(config, "runs/tune", {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, trials=30)

`settings` and `space` read what is to be run, `plan` keeps it in the folder, `pool` and `worker` are the processes that
train, `sweeping`, `tuning` and `study` say which run is next, and `files` writes tables and the report.
"""

from engine.sweeps.sweeping import SweepResult, sweep
from engine.sweeps.tuning import TuneResult, tune

__all__ = ["SweepResult", "TuneResult", "sweep", "tune"]
