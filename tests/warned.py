"""What was warned of."""

from collections.abc import Iterable
from warnings import WarningMessage


def user_warnings(caught: Iterable[WarningMessage]) -> list[str]:
    """What the warnings that users see say.

    Others come by chance: of files that another test left open, when its garbage is collected, and of libraries, when
    this test is the first to import them.
    """
    return [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
