"""The ClientApp of the bundle, which Flower wants there.  Nobody needs it: a site runs what it installed itself.

`flower-client` answers messages by `clients/flower` and never unpacks a bundle.  A SuperNode that was started in
another way would come here.
"""

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from clients.flower.trainer import CLIENT_FAILED

REASON = "this node was not started by flower-client, which runs its own site's code only; start it with that."


def respond(message: Message, _: Context) -> Message:
    """Answer that there is no answer."""
    return Message(Error(code=CLIENT_FAILED, reason=REASON), reply_to=message)


app = ClientApp()
app.query()(respond)
app.train()(respond)
app.evaluate()(respond)
