"""Which data sets there are: the one table that decides.  A new one is a reader in a file of its own, and a row here.

`--help` of every program shows these names, so nothing heavy is imported: readers are named, and found when one is
used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What the programs need to know of a data set before they open its folder.

    reader: MODULE:FUNCTION; the function takes (name, root), may rely on root being a folder, and returns a FaceIndex.
    needs: what root should hold; it ends the line that says there is no such folder.
    points: alignment (landmarks, box) -> the file that it needs, for the line that says it is not there.  Without the
        file, and for an alignment without a row, pictures are cut to the centre square instead.
    attributes: MODULE:FUNCTION that reads what its people are, as `celeba.read_attributes` does; "": nobody says.
    has_families: whether the layout tells siblings; its training batches are of pairs then.
    by_default: whether it belongs to the federation that is meant where no client is named.
    drawing: MODULE:OBJECT, the `synthetic.Layout` by which `facefed data synth` draws one; "": it cannot.
    """

    reader: str
    needs: str
    points: Mapping[str, str] = field(default_factory=dict)
    attributes: str = ""
    has_families: bool = False
    by_default: bool = False
    drawing: str = ""


DATASETS: dict[str, DataSet] = {
    "celeba": DataSet(
        reader="common.faces.celeba:read_celeba",
        needs="CelebA needs the folder that holds identity_CelebA.txt and img_align_celeba/",
        points={"landmarks": "list_landmarks_align_celeba.txt"},
        attributes="common.faces.celeba:read_attributes",
        by_default=True,
        drawing="simulation.data.synthetic:CELEBA",
    ),
    "vggface2": DataSet(
        reader="common.faces.vggface2:read_vggface2",
        needs="VGGFace2 needs the folder that holds train/ and test/",
        points={
            "landmarks": "bb_landmark/loose_landmark_{train,test}.csv",
            "box": "bb_landmark/loose_bb_{train,test}.csv",
        },
        attributes="common.faces.vggface2:read_attributes",
        by_default=True,
        drawing="simulation.data.synthetic:VGGFACE2",
    ),
    "twins": DataSet(
        reader="common.faces.twins:read_twins",
        needs="twins need the folder that holds train_dataset_infor.json and one folder a person",
        has_families=True,
        by_default=True,
        drawing="simulation.data.synthetic:TWINS",
    ),
    "folder": DataSet(
        reader="common.faces.index:read_folder",
        needs="give the folder that holds one folder a person",
    ),
}
DEFAULT_CLIENTS = tuple(name for name, row in DATASETS.items() if row.by_default)
DRAWN = tuple(name for name, row in DATASETS.items() if row.drawing)
OF_FAMILIES = tuple(name for name, row in DATASETS.items() if row.has_families)
