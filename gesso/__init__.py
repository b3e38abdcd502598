"""Gesso pre-trains object detectors on large box data sets, transfers them, and shows why that helped.

The public names are those of ``gesso.api``; each is resolved on first use, so that ``import gesso`` stays light.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "DetectionTable",
    "GessoError",
    "Index",
    "LabelSpace",
    "Predictions",
    "RunConfig",
    "RunResult",
    "TrainedDetector",
    "from_torchvision",
    "import_data",
    "load",
    "recipe",
    "score_coco",
    "to_torchvision",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("gesso.api"), name)
    raise AttributeError(f"gesso has no public name '{name}'; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
