"""The ClientApp that Flower starts for every message: hands it to the site's resident trainer, and the answer back.

It imports neither torch nor the data, so that a message costs as little as Flower lets it.
"""

from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from clients.handover import TrainerGone, hand_over

CLIENT_FAILED = 500  # as in common.wire, which this file must not import
TRAINER = "trainer"  # the node's configuration: the folder where the trainer is met


def respond(message: Message, context: Context) -> Message:
    """Answer one message."""
    try:
        answer = hand_over(Path(str(context.node_config[TRAINER])), message.content)
    except TrainerGone as gone:
        answer = f"{context.node_config.get('name', 'client')}: {gone}"
    if isinstance(answer, str):
        return Message(Error(code=CLIENT_FAILED, reason=answer), reply_to=message)
    return Message(answer, reply_to=message)


app = ClientApp()
app.query()(respond)
app.train()(respond)
app.evaluate()(respond)
