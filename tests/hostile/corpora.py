"""The corpora, by name."""

from tests.hostile.encoders import ENCODERS
from tests.hostile.pickles import PICKLES
from tests.hostile.reports import REPORTS
from tests.hostile.runs import RUNS
from tests.hostile.yamls import YAMLS

CORPORA = {"pickles": PICKLES, "runs": RUNS, "encoders": ENCODERS, "yaml": YAMLS, "reports": REPORTS}
