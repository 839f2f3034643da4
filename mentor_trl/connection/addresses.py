"""Addresses of servers."""

from collections.abc import Sequence

import httpx

from ..errors import SetupError


def checked_address(url: str) -> str:
    """An address without its last slash; a [`SetupError`] if it is none."""
    try:
        address = httpx.URL(url)
        if address.scheme in ("http", "https") and address.host:
            return url.rstrip("/")
    except (httpx.InvalidURL, TypeError):
        pass
    raise SetupError(f"{url!r} is not the address of a server: give one as http://127.0.0.1:8000.")


def addresses(value: str | Sequence[str]) -> list[str]:
    """
    Addresses of one or several servers, from a list or a text with commas.

    Raises:
        [`SetupError`]: if there is none, one is no address, or one is given twice.

    Example:
    ```python
    >>> addresses("http://a:1, http://b:2/")
    ['http://a:1', 'http://b:2']
    ```
    """
    parts = value.split(",") if isinstance(value, str) else value
    found = [checked_address(part.strip() if isinstance(part, str) else part) for part in parts]
    if not found:
        raise SetupError("No address of a server is given: give one as http://127.0.0.1:8000.")
    twice = next((url for url in found if found.count(url) > 1), None)
    if twice is not None:
        raise SetupError(f"The address {twice} is given twice, and would get twice the rows. Name each server once.")
    return found
