"""What can go wrong between a client and its server."""

import httpx

from ..errors import EngineError


class ServerError(EngineError):
    """The server failed in spite of all attempts, or refused a request."""


class WrongServer(ServerError):
    """Something answers, but it is not the server that is needed."""


class KeyRefused(WrongServer):
    """The server wants a key, and another one than it was given."""


class WeightsLost(ServerError):
    """The server does not have the policy's current weights, and only the trainer can send them again."""


class Exhausted(ServerError):
    """A call failed in every attempt, by what may be otherwise the next time."""


class Failed(Exception):
    """The server answered 5xx."""


TRANSIENT = (httpx.TransportError, Failed)
