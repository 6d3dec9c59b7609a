"""What a URL gives, within limits."""

import http.client
import time
import urllib.request
from urllib.parse import urlsplit

from vispec.version import __version__

SCHEMES = ("http", "https")
MOST_BYTES = 50_000_000
SECONDS = 30.0
"""For all of a file; the server may be silent for as long once more."""


def is_url(text: str) -> bool:
    """Whether a text names something on the web, and not a file."""
    return text.lower().startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def fetch(url: str) -> bytes:
    """The content behind a URL of http or https.

    Raises:
        OSError: it cannot be had, is larger than MOST_BYTES or takes longer than SECONDS; the message says which.
    """
    deadline = time.monotonic() + SECONDS
    try:
        # some servers refuse Python's own name
        request = urllib.request.Request(url, headers={"User-Agent": f"vispec/{__version__}"})
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            if urlsplit(answer.url).scheme not in SCHEMES:
                raise OSError(f"redirected to {answer.url}")
            return content_of(answer, deadline)
    except (http.client.HTTPException, ValueError) as error:  # a broken answer, a URL that is none
        raise OSError(f"{type(error).__name__}: {error}") from None


def content_of(answer: http.client.HTTPResponse, deadline: float) -> bytes:
    """All of an answer; `deadline` is by time.monotonic().

    Raises:
        OSError: it is too large, too late or broken off.
    """
    content = bytearray()
    while part := answer.read1():
        content += part
        if len(content) > MOST_BYTES:
            raise OSError(f"larger than {MOST_BYTES:,} bytes")
        left(deadline)
    if len(content) < int(answer.headers.get("Content-Length") or 0):
        raise OSError(f"broken off after {len(content):,} bytes")
    return bytes(content)


def left(deadline: float) -> float:
    """Seconds until it; OSError where there are none."""
    if (seconds := deadline - time.monotonic()) <= 0:
        raise OSError(f"not there after {SECONDS:g} seconds")
    return seconds
