"""The picture behind an `image_url`: of a data: URL, or of the web where the server's owner has named the host."""

import base64
import binascii
import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from urllib.parse import SplitResult, urljoin, urlsplit

from PIL import Image

from vispec.pictures import UnreadableImage, read_picture
from vispec.serve.protocol import ApiError
from vispec.version import __version__
from vispec.web import SCHEMES, SECONDS, content_of, left

MOST_REDIRECTS = 3
NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""Addresses that gateways translate to the IPv4 ones at their ends."""
REDIRECTS = (301, 302, 303, 307, 308)
_DATA = re.compile(r"data:(?:image/[\w.+-]+)?(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class PictureLimits:
    """What pictures of a request may be."""

    pixels: int
    images: int
    hosts: Collection[str] = ()
    """From which http(s) URLs are fetched."""


def picture_of(url: str, limits: PictureLimits, name: str) -> Callable[[], Image.Image]:
    """How to open the picture of an `image_url`, which raises ApiError where it is none.

    Args:
        name: of the part of the request, for messages.

    Raises:
        ApiError: it cannot be had.
    """
    wrong = partial(ApiError, 400, param=name, code="invalid_image")
    match = _DATA.match(url[:200])
    if match:
        try:
            content = base64.b64decode(url[match.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise wrong(f"{name}: what follows base64, is not in base64") from None
    elif urlsplit_or_none(url) is None or urlsplit(url).scheme not in SCHEMES:
        raise wrong(f"{name}: expected data:image/…;base64,… or a URL of http or https")
    else:
        content = fetch_allowed(url, limits.hosts, wrong)

    def opened() -> Image.Image:
        try:
            return read_picture(BytesIO(content), most=limits.pixels)
        except UnreadableImage as error:
            raise wrong(f"{name} cannot be read as a picture ({error})") from None

    return opened


def urlsplit_or_none(url: str) -> SplitResult | None:
    try:
        split = urlsplit(url)
        split.port  # noqa: B018 (raises where it is no number)
    except ValueError:
        return None
    return split


def fetch_allowed(url: str, hosts: Collection[str], wrong: Callable[[str], ApiError]) -> bytes:
    """The content behind a URL of one of these hosts; every redirect is held to the same rules."""
    deadline = time.monotonic() + SECONDS
    for _ in range(MOST_REDIRECTS + 1):
        split = urlsplit_or_none(url)
        if split is None or split.scheme not in SCHEMES or split.username is not None:
            raise wrong(f"{url[:200]} is no URL of http or https that is followed")
        host = (split.hostname or "").rstrip(".").lower()
        if host not in hosts:
            raise wrong(f"pictures of {host or 'no host'} are not fetched (the server's --allow-url names hosts)")
        try:
            answer = _get(split, host, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise wrong(
                f"{url[:200]} cannot be fetched ({type(error).__name__}: {' '.join(str(error).split())})"
            ) from None
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise wrong(f"more than {MOST_REDIRECTS} redirects")


def public_address(host: str, port: int) -> str:
    """An address of a host, all of whose addresses are public.

    Raises:
        OSError: it has none, or others.
    """
    found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        known = ipaddress.ip_address(address)
        inner = getattr(known, "ipv4_mapped", None) or getattr(known, "sixtofour", None) or known
        inner = ipaddress.IPv4Address(int(known) % 2**32) if known in NAT64 else inner
        if not (known.is_global and inner.is_global) or inner.is_multicast:
            raise OSError(f"{host} has the address {address}, which is not public")
    return found[0]


def _get(split: SplitResult, host: str, deadline: float) -> bytes | str:
    """The content, or where a redirect leads; of the very address that was checked."""
    port = split.port or (443 if split.scheme == "https" else 80)
    address = public_address(host, port)
    connection = http.client.HTTPConnection(host, port, timeout=left(deadline))
    connection.sock = socket.create_connection((address, port), timeout=left(deadline))
    try:
        if split.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        path = (split.path or "/") + (f"?{split.query}" if split.query else "")
        connection.request("GET", path, headers={"User-Agent": f"vispec/{__version__}", "Accept": "image/*"})
        answer = connection.getresponse()
        if answer.status in REDIRECTS and (place := answer.getheader("Location")):
            return place
        if answer.status != 200:
            raise OSError(f"HTTP status {answer.status}")
        return content_of(answer, deadline)
    finally:
        connection.close()
