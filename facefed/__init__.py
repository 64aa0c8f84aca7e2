"""FaceFed from Python: open a data set, run a federation on this machine, load a model, embed faces, compare them.

docs/API.md has an example.  These names are what programs of others may rely on; everything below `common`, `clients`,
`server` and `simulation` may change with any version.
"""

from facefed.data import FaceData, open_data
from facefed.federation import Federated, simulate
from facefed.model import Model, compare, load_model

__all__ = ["FaceData", "Federated", "Model", "compare", "load_model", "open_data", "simulate"]
