"""Compress Mixture-of-Experts checkpoints larger than memory.

What is listed in `__all__` is imported when it is first used, and torch with it.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import DamagedError as DamagedError
    from .errors import InterruptedRunError as InterruptedRunError
    from .errors import NumbersError as NumbersError
    from .errors import OtherRunError as OtherRunError
    from .errors import OverBudgetError as OverBudgetError
    from .errors import ReamStreamError as ReamStreamError
    from .errors import UnsupportedModelError as UnsupportedModelError
    from .errors import UsageError as UsageError
    from .evaluation.api import compress as compress
    from .evaluation.api import evaluate as evaluate
    from .evaluation.api import observe as observe
    from .evaluation.api import plan as plan
    from .evaluation.inspection import inspect as inspect
    from .evaluation.verify import verify as verify
    from .settings import Method as Method
    from .settings import Settings as Settings

__version__ = "0.1.0"

_MODULES = {
    "evaluation.api": ("plan", "compress", "evaluate", "observe"),
    "evaluation.verify": ("verify",),
    "evaluation.inspection": ("inspect",),
    "settings": ("Method", "Settings"),
    "errors": (
        "ReamStreamError",
        "UsageError",
        "DamagedError",
        "UnsupportedModelError",
        "OtherRunError",
        "OverBudgetError",
        "NumbersError",
        "InterruptedRunError",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


class _Deferred(ModuleType):
    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        value = getattr(import_module(self.__name__), name)
        setattr(self, name, value)
        return value


def deferred(name: str) -> ModuleType:
    """Return a module that is imported when its first attribute is used.

    What looks at files only, such as ``ream-stream status``, then takes no seconds for torch.
    """
    return _Deferred(name)
