"""What may be shown of an address that has a password in it, and of a text that quotes one."""

import re
from urllib.parse import unquote, urlsplit, urlunsplit

DATABASES = ("postgresql", "mysql")  # also with a driver, as in mysql+pymysql
_SECRET_IN_QUERY = re.compile(r"([?&][^=&]*pass[^=&]*=)([^&]*)", re.IGNORECASE)


def shown_uri(uri: str) -> str:
    """The address without a password or user name, fit for logs and files; also one that is not well formed."""
    text = _SECRET_IN_QUERY.sub(r"\1***", uri)
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = urlsplit("")
    if "@" in parts.netloc:
        return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]))
    scheme, mark, rest = text.partition("://")
    # A "/" or "#" in a password ends the netloc before the "@"; in a server's path an "@" is nothing special.
    if mark and "@" in rest and scheme.partition("+")[0].lower() in DATABASES:
        return f"{scheme}://***@{rest.rpartition('@')[2]}"
    return text


def without_password(text: str, uri: str) -> str:
    """A text in which neither the address nor a password of it can be read."""
    clean = text.replace(uri, shown_uri(uri))
    given = passwords_in(uri)
    for secret in sorted({form for one in given for form in (one, unquote(one))}, key=len, reverse=True):
        clean = clean.replace(secret, "***")
    return clean


def passwords_in(uri: str) -> list[str]:
    """The passwords of an address, as written: before its host, and in its query."""
    try:
        given = [urlsplit(uri).password or ""]
    except ValueError:
        given = []
    return [one for one in (*given, *(found.group(2) for found in _SECRET_IN_QUERY.finditer(uri))) if one]
