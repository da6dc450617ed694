# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Downloads the page `/metrics` of a server that need not be what it claims to be."""

import http.client
from concurrent.futures import Future
from threading import Thread
from urllib.error import HTTPError, URLError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    UnknownHandler,
)

from vllm_vtw.untrusted_files import shorten

MAX_BYTES = 16 << 20
"""The size of the largest page that is read."""
TIMEOUT = 10.0
"""How long it may take until the page has been read, in seconds."""
MAX_PLAIN = 80
"""The number of characters of the longest text that `plain` leaves as it is."""
HANDLERS = (
    *(ProxyHandler, HTTPHandler, HTTPSHandler, HTTPRedirectHandler),
    *(HTTPErrorProcessor, HTTPDefaultErrorHandler, UnknownHandler),
)
"""Those of `urllib.request.urlopen` without files, FTP and data URLs, to which a server could redirect."""


def metrics_url(server: str) -> str:
    """The URL of a server's metrics.

    Args:
        server: The server's URL, or that of its metrics. `http://` and a slash at the end may be left out.
    """
    url = server if "://" in server else f"http://{server}"
    return f"{url.rstrip('/').removesuffix('/metrics')}/metrics"


def read_page(url: str) -> str:
    """Downloads a page.

    Raises:
        ValueError: The page cannot be read, is too large, or takes too long. The message is one line.
    """
    page: Future[bytes] = Future()

    def download() -> None:
        try:
            page.set_result(_download(url))
        except Exception as error:  # whatever it is, the main thread has to see it
            page.set_exception(error)

    # A socket's timeout alone starts anew with every byte that a server sends.
    Thread(target=download, daemon=True).start()
    try:
        return page.result(TIMEOUT).decode(errors="replace")
    except HTTPError as error:
        raise ValueError(f"{plain(url)} answers with HTTP status {error.code}") from error
    except (OSError, UnicodeError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, TimeoutError):
            raise ValueError(f"{plain(url)} takes more than {TIMEOUT:g} seconds") from error
        said = getattr(reason, "strerror", None) or shorten(reason)
        raise ValueError(f"cannot connect to {plain(url)}: {said}") from error


def _download(url: str) -> bytes:
    opener = OpenerDirector()
    for handler in HANDLERS:
        opener.add_handler(handler())
    with opener.open(url, timeout=TIMEOUT) as response:
        page = response.read(MAX_BYTES + 1)
    if len(page) > MAX_BYTES:
        raise ValueError(f"{plain(url)} has more than the {MAX_BYTES >> 20} MiB that are read")
    return page


def plain(text: str) -> str:
    """A text that another program sent, as messages show it: as it is, if it is short and printable."""
    return text if len(text) <= MAX_PLAIN and text.isprintable() else shorten(text)
