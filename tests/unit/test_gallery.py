"""Pictures of a client's own people: they may go to an MLflow, so nobody's name is written in them."""

import dataclasses

from matplotlib.text import Text

from common.private_figures import private_pictures
from tests.unit.packs_in_memory import CPU, memory_pack, recogniser_for


def test_people_are_numbers_in_every_picture():
    pack = memory_pack()
    pack = dataclasses.replace(pack, people=tuple(f"Ada Zenkgraf {number}" for number in range(len(pack.people))))

    pictures = private_pictures(recogniser_for(pack), pack, CPU, client="mine", seed=1)

    assert set(pictures) == {"confusion.png", "embeddings.png"}
    written = [text.get_text() for figure in pictures.values() for text in figure.findobj(Text)]
    assert any("mine" in text for text in written)  # texts are found at all
    assert not [text for text in written if "Zenkgraf" in text]
    on_the_axis = [text.get_text() for text in pictures["confusion.png"].axes[0].get_xticklabels()]
    assert on_the_axis == [str(label) for label in range(pack.num_classes)]
