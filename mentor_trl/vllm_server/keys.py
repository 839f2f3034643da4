"""Keys of servers: made by `mentor-trl serve`, kept where only their user can read them, found by its clients."""

import ipaddress
import os
import secrets
import socket
import stat
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import SetupError


# Environment variables of clients and, but for the first, of the server
KEY, KEY_FILE = "MENTOR_TRL_API_KEY", "MENTOR_TRL_API_KEY_FILE"


def default_key_file(port: int) -> Path:
    """Where the key of the server at a port of this machine is kept."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "mentor_trl" / f"{socket.gethostname()}-{port}.key"


def store_key(key: str, port: int) -> Path:
    """
    Keep the key of the server at a port, in the place of the one before it, in a file that only this user can read. A
    [`SetupError`] if it cannot be kept so.
    """
    file = default_key_file(port)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = file.parent.stat()
        if found.st_uid != os.geteuid():
            raise PermissionError(f"{file.parent} belongs to user {found.st_uid}")
        if stat.S_IMODE(found.st_mode) & 0o077:
            file.parent.chmod(0o700)
        partial = file.with_suffix(f".{secrets.token_hex(4)}")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(f"{key}\n")
        partial.replace(file)
    except OSError as error:
        raise SetupError(
            f"The server's key cannot be kept in {file}: {error}. Set XDG_STATE_HOME to a folder of yours, or give a "
            "key by --api-key-file."
        ) from error
    return file


def read_key(file: str | os.PathLike) -> str:
    """The key in a file; a [`SetupError`] names one that cannot be read, or holds none."""
    try:
        return checked_key(Path(file).expanduser().read_text(encoding="utf-8").strip(), f"The file {file}")
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"The server's key cannot be read from {file}: {error}.") from error


def checked_key(key: str, source: str) -> str:
    """A key, if it can be one; a [`SetupError`] names its `source` if not."""
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        raise SetupError(f"{source} holds no key: one word of ASCII characters is needed.")
    return key


def key_of(url: str, file: str | None = None) -> str | None:
    """
    The key for a server, if there is one: from the file, from `MENTOR_TRL_API_KEY` or `MENTOR_TRL_API_KEY_FILE`, or,
    for a server on this machine, from where `mentor-trl serve` has put it.
    """
    if file is not None:
        return read_key(file)
    if os.environ.get(KEY):
        return checked_key(os.environ[KEY], KEY)
    if os.environ.get(KEY_FILE):
        return read_key(os.environ[KEY_FILE])
    address = urlsplit(url)
    if not is_this_machine(address.hostname or ""):
        return None
    default = default_key_file(address.port or {"http": 80, "https": 443}.get(address.scheme, 0))
    return read_key(default) if os.path.exists(default) else None


def is_this_machine(host: str) -> bool:
    """Whether a host is a loopback address, or this machine's own name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", socket.gethostname().lower())
