"""The ClientApp: what came goes back as it is."""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, _: Context) -> Message:
    return Message(content=RecordDict({"arrays": message.content["arrays"]}), reply_to=message)
