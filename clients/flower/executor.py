"""Takes the messages that the SuperNode of this process has got, has the trainer answer them, and hands the answers in.

It stands in for Flower's SuperExec and for the ClientApp process that it starts for each message (1.3 s of CPU each).
And it runs what this site installed and nothing else: the bundle that comes with a run is never unpacked, let alone
imported.  See docs/adr/0017-executor.md for what it uses of Flower's inside, which a test pins.
"""

import logging
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from clients.egress import refusal
from clients.flower.handover import CLIENT_FAILED, KEY, TrainerGone, hand_over
from clients.flower.pace import Pace

ACQUIRE_TASK = "/flwr.proto.Runtime/AcquireTask"
LOOK_EVERY_S = 5.0  # beside being told: a message may have come while the last was answered

log = logging.getLogger("facefed.client")


class Executor:
    """Answers one message after the other, for as long as its SuperNode lives."""

    def __init__(self, meeting: Path, *, name: str, port: int, pace: Pace, ledger: Path) -> None:
        """meeting: the folder where the trainer is met.  name: the site's.  port: of the SuperNode's own API.

        ledger: the folder of the egress ledger, for what is said here in the trainer's place.
        """
        self._meeting, self._name, self._pace, self._ledger = meeting, name, pace, ledger
        self._address = f"127.0.0.1:{port}"
        self._secret = (meeting / KEY).read_bytes()

    def serve(self) -> None:
        """Take what comes, for ever; whatever one message brings about, the next is taken."""
        guard = SuperExecAuthHttpInterceptor(master_secret=self._secret, protected_methods=frozenset({ACQUIRE_TASK}))
        with self._client(guard) as client:
            while True:
                self._pace.wait_for_work(LOOK_EVERY_S)
                try:
                    found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
                    if found.HasField("task") and found.token:
                        self._execute(found.token)
                except Exception as error:
                    log.warning("a message could not be answered (%s)", repr(error))

    def _client(self, *more: ProtobufClientInterceptor) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self._address,
            insecure=True,  # its address is 127.0.0.1, and either side proves itself
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *more],
            retry_invoker=None,
        )

    def _execute(self, token: str) -> None:
        with self._client(RuntimeTokenHttpInterceptor(token)) as client:
            heart = HeartbeatSender(lambda: _beats(client))
            heart.start()
            context: Context | None = None
            status, details = SubStatus.FAILED, "the message could not be taken"
            try:
                message, context, _, _ = pull_task_input(client)
                push_message(client, self._answered(message), context)
                status, details = SubStatus.COMPLETED, ""
            finally:
                push_task_output(client, context, status, details)
                heart.stop()
                self._pace.tell_done()

    def _answered(self, message: Message) -> Message:
        try:
            answer = hand_over(self._meeting, message.content)
        except TrainerGone as gone:
            answer = refusal(self._ledger, self._name, message.content, f"{self._name}: {gone}")
        if isinstance(answer, str):
            return Message(Error(code=CLIENT_FAILED, reason=answer), reply_to=message)
        return Message(answer, reply_to=message)


def _beats(client: RuntimeHttpClient) -> bool:
    """Tell the SuperNode that its message is being worked on.  (Flower's own ends the process when nobody wants it.)"""
    try:
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.HTTPError:
        return False
    return True
