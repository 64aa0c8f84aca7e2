"""What can be watched while a ViT trains: its graph, and where it looks in pictures of people it does not train on.

The pictures show faces, so they stay in the run's folder and in TensorBoard's, and never go to MLflow.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from common.faces.batches import to_float
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.models.attention import attention_of
from common.models.recogniser import EmbeddingModel
from common.models.vit_backbone import VitBackbone
from common.plots.attention import attention_maps
from common.tracking.run import TrackedRun
from simulation.trainee import Trainee

NUM_PICTURES: Final = 6
NUM_LOOKS: Final = 5  # over all epochs, about


def shown_pictures(pack: FacePack) -> NDArray[np.int64]:
    """One picture of each of a few validation people: [at most 6] int64, with families siblings side by side."""
    indices, person, family = pack.shown_in(Split.VAL_PEOPLE)
    first = np.sort(np.unique(person, return_index=True)[1])
    return indices[first[np.argsort(family[first], kind="stable")]][:NUM_PICTURES]


def show_graph(trainee: Trainee, tracked: TrackedRun) -> None:
    """Show the graph of what embeds, in TensorBoard."""
    if trainee.settings.tracking.tensorboard == "none":
        return
    size = trainee.settings.data.image_size
    example = torch.zeros(2, 3, size, size)
    tracked.log_graph(EmbeddingModel(trainee.recogniser.backbone).cpu(), example)


def is_time_to_look(epoch: int, total: int) -> bool:
    """After the first epoch and about NUM_LOOKS times in all, but not after the last.  epoch: in [1, total]."""
    return epoch < total and (epoch == 1 or epoch % max(1, total // NUM_LOOKS) == 0)


def show_attention(trainee: Trainee, tracked: TrackedRun) -> None:
    """Draw the present model's attention; a model without attention, or no validation people, draws nothing."""
    backbone = trainee.recogniser.backbone
    if not isinstance(backbone, VitBackbone):
        return
    pack = next((pack for pack in trainee.clients.values() if len(pack.indices(Split.VAL_PEOPLE))), None)
    if pack is None:
        return
    rows = shown_pictures(pack)
    pictures = np.asarray(pack.pictures[rows])
    was_training = backbone.training
    backbone.eval()
    maps = attention_of(backbone, to_float(torch.from_numpy(pictures)).to(trainee.compute.device))
    backbone.train(was_training)
    names = [pack.people[person] for person in pack.person[rows].tolist()]
    tracked.keep_figure(attention_maps(pictures, maps, names, title="Where the model looks"), "plots/attention.png")
