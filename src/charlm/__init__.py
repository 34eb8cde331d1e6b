"""charlm: character-level language models with recurrent networks.

`charlm.load` gives a trained model to write and to score texts with. Importing this package imports no torch;
its modules do, when they are imported.
"""

from os import PathLike
from typing import TYPE_CHECKING

from charlm.errors import CharlmError as CharlmError

if TYPE_CHECKING:
    from charlm.api import LanguageModel

__version__ = "0.1.0"


def load(
    model: "str | PathLike[str] | None" = None, *, device: str = "auto", implementation: str | None = None
) -> "LanguageModel":
    """A trained model: `api.LanguageModel`.

    >>> import charlm
    >>> model = charlm.load("runs/first", device="cpu")
    >>> len(model.generate("abc", length=20, seed=1))
    23

    model: a model file, a run's folder or name; by default the newest run's.
    device: auto, cpu, cuda, cuda:N or mps.
    implementation: auto, scratch, builtin or fused; by default as it was trained.

    Raises `CharlmError` for a model that is not there or damaged and a device that is not here.
    """
    from charlm.api import LanguageModel

    return LanguageModel.load(model, device=device, implementation=implementation)
