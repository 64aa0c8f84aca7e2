"""Speaks to the server before the SuperNode does, to tell apart what Flower reports alike or retries in silence."""

import socket
import ssl

from common.errors import UserError
from common.system.certs import ClientFiles
from common.system.processes import host_port, is_healthy

WITHIN_S = 10.0
QUESTIONS = 2  # at most, one after the other
# X.509 verification results, from openssl/x509_vfy.h.
NOT_YET_VALID, EXPIRED, WRONG_HOST, WRONG_ADDRESS = 9, 10, 62, 64


def examine(host: str, port: int, tls: ClientFiles | None, *, within_s: float = WITHIN_S) -> None:
    """Return when the server there is the one that is meant, or cannot be reached now.

    Raises UserError: another authority's certificate, one for another name, one that is not valid today, or one side
    speaks TLS and the other does not.  within_s: for each question.
    """
    if tls is None:
        _expect_plain_text(host, port, within_s)
    else:
        _expect_tls(host, port, tls, within_s)


def _expect_tls(host: str, port: int, tls: ClientFiles, within_s: float) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls.ca)
    try:
        _shake_hands(host, port, context, within_s)
    except ssl.SSLCertVerificationError as error:
        raise UserError(f"the server at {host_port(host, port)} {_fault(error, host, tls)}") from None
    except ssl.SSLError:
        if _answers_plain_text(host, port, within_s):
            raise UserError(
                f"the server at {host_port(host, port)} speaks plain text, and --tls asks for TLS; nothing was sent."
                " Start flower-server with --tls, or check the address."
            ) from None
    except OSError:
        return  # it has just gone; whoever waits for it goes on waiting


def _fault(error: ssl.SSLCertVerificationError, host: str, tls: ClientFiles) -> str:
    if error.verify_code == EXPIRED:
        return "has a certificate that expired; its operator makes a new one (`facefed certs renew`)."
    if error.verify_code == NOT_YET_VALID:
        return "has a certificate that is not valid yet; is this machine's clock right?"
    if error.verify_code in (WRONG_HOST, WRONG_ADDRESS):
        return (
            f"has a certificate for another name than {host}; use the name that it was made for, or have it made for"
            " this one (`facefed certs renew --server-name`)."
        )
    return (
        f"has a certificate that {tls.ca} did not issue ({error.verify_message}): it is not your federation's server,"
        " or its authority was replaced. Ask its operator for ca.crt."
    )


def _expect_plain_text(host: str, port: int, within_s: float) -> None:
    if _answers_plain_text(host, port, within_s):
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only whether it speaks TLS; nothing is sent
    try:
        _shake_hands(host, port, context, within_s)
    except OSError:
        return
    raise UserError(
        f"the server at {host_port(host, port)} speaks TLS; give --tls DIR, the folder that its operator made for you."
    )


def _shake_hands(host: str, port: int, context: ssl.SSLContext, within_s: float) -> None:
    with (
        socket.create_connection((host, port), timeout=within_s) as raw,
        context.wrap_socket(raw, server_hostname=host),
    ):
        return


def _answers_plain_text(host: str, port: int, within_s: float) -> bool:
    """Whether /health is there; a server with TLS answers a refusal at most."""
    return is_healthy(host, port, timeout_s=within_s)
