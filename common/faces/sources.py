"""Which reader understands which data set: the one table that decides."""

from collections.abc import Callable
from pathlib import Path

from common.errors import DataError, unknown_name
from common.faces.celeba import read_celeba
from common.faces.folder import read_folder
from common.faces.index import FaceIndex
from common.faces.twins import read_twins
from common.faces.vggface2 import read_vggface2

_READERS: dict[str, Callable[[Path], FaceIndex]] = {
    "celeba": read_celeba,
    "vggface2": read_vggface2,
    "twins": read_twins,
    "folder": read_folder,
}
DATASETS = tuple(_READERS)


def read_index(dataset: str, root: Path) -> FaceIndex:
    """Every picture that the layout in `root` names, without opening one.

    dataset: one of DATASETS.  Raises DataError with one line: an unknown data set, a missing folder or metadata file, a
    malformed line (file and line number), a picture path that leaves the folder, a picture named twice, no pictures.
    """
    reader = _READERS.get(dataset)
    if reader is None:
        raise DataError(unknown_name("data set", dataset, DATASETS))
    return reader(root)
