"""charlm: character-level language models with recurrent networks.

`charlm.load` loads a trained model, which generates and scores texts. Importing this package does not import
torch; importing its modules does.
"""

from os import PathLike, fspath

from charlm.errors import CharlmError as CharlmError

TYPE_CHECKING = False  # instead of importing typing: this runs before Ctrl-C is handled

if TYPE_CHECKING:
    from charlm.api import LanguageModel

__version__ = "0.1.0"


def load(
    model: "str | PathLike[str] | None" = None, *, device: str = "auto", implementation: str | None = None
) -> "LanguageModel":
    """Load a trained model as an `api.LanguageModel`.

    >>> import charlm
    >>> model = charlm.load("runs/first", device="cpu")
    >>> len(model.generate("abc", length=20, seed=1))
    23

    model: a model file, or a run's folder or name; by default the newest run.
    device: auto, cpu, cuda, cuda:N or mps.
    implementation: auto, scratch, builtin or fused; by default the one in the model's configuration.

    Raises `CharlmError` for a model that is missing or damaged, and for a device that is not available.
    """
    from charlm.api import LanguageModel
    from charlm.nn.device import choose_device
    from charlm.storage.model_file import load_model
    from charlm.storage.run import find_model

    path = find_model(None if model is None else fspath(model))
    return LanguageModel(load_model(path, implementation, choose_device(device)))
