"""A data set of faces, opened: aligned, packed once, and divided into what serves training, validation and test."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from common.faces.pack import FacePack

Part = Literal["all", "training", "validation", "test"]
CACHE: Final = ".facefed/packs"  # as the programs have it, so that nothing is packed twice


@dataclass(frozen=True, kw_only=True)
class FaceData:
    """The pictures of one holder.

    people: their names.  num_pictures: that can be used.  left_out: (file, reason) of each picture that cannot.
    """

    people: tuple[str, ...]
    num_pictures: int
    left_out: tuple[tuple[str, str], ...]
    image_size: int  # px, side of an aligned picture
    pack: "FacePack" = field(repr=False)  # for FaceFed's own use

    def faces(self, part: Part = "all", most: int | None = None) -> tuple[NDArray[np.uint8], list[str]]:
        """Aligned faces, uint8 RGB [N, S, S, 3], and the name of each one's person.

        part: "validation" and "test" are people whom training never sees.  most: the first so many; None: all.
        """
        from common.faces.splits import Split

        codes = {"training": Split.TRAIN, "validation": Split.VAL_PEOPLE, "test": Split.TEST_PEOPLE}
        rows = np.arange(len(self.pack)) if part == "all" else self.pack.indices(codes[part])
        chosen = rows[:most]
        return self.pack.pictures[chosen], [self.people[person] for person in self.pack.person[chosen]]


def open_data(
    folder: str | Path,
    dataset: str = "folder",
    *,
    settings: Mapping[str, object] = {},
    cache_dir: str | Path = CACHE,
) -> FaceData:
    """The data set in a folder; packed at the first call, which takes a while, and found again at the next.

    folder: of one folder a person, or an official layout.  dataset: folder, celeba, vggface2 or twins.
    settings: "data.image_size" and the like, as in docs/SETTINGS.md, where they are not the defaults.
    Raises facefed's errors: ConfigError for a setting, DataError for a folder that holds no such data.
    """
    from common import config
    from common.errors import UserError, unknown_name
    from common.faces.datasets import DATASETS
    from common.faces.pack import open_pack
    from common.settings import Settings
    from common.system.files import private_files
    from common.system.runtime import go_silent, num_cores

    go_silent()
    if dataset not in DATASETS:
        raise UserError(unknown_name("dataset", dataset, tuple(DATASETS)))
    given = config.with_values(Settings(), settings)
    place, cache = Path(folder).expanduser().resolve(), Path(cache_dir).expanduser().resolve()
    with private_files(shared=False):
        pack = open_pack(dataset, place, given.data, cache, workers=num_cores())
    return FaceData(
        people=pack.people,
        num_pictures=len(pack),
        left_out=pack.quarantined,
        image_size=pack.image_size,
        pack=pack,
    )
