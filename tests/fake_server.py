"""Servers in threads of the test's process, which fail in every way a server can."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer:
    """
    What a fake server answers. `script` maps a path to what its next calls do: a status, or "drop" (closes the
    connection), "hang" (answers too late) or "restart" (forgets what it knew, and closes the connection).
    """

    def __init__(self):
        self.script: dict[str, list] = {}
        self.calls: list[tuple[str, dict]] = []
        self.lock, self.done = threading.Lock(), threading.Event()
        self.key: str | None = None

    def answer(self, path: str, body: dict) -> Any:
        """What becomes JSON, or bytes that are sent as they are."""
        raise NotImplementedError

    def restart(self) -> None:
        raise NotImplementedError


@contextmanager
def serving(fake: FakeServer) -> Iterator[str]:
    """The address of a fake server that runs in threads of this process."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            with fake.lock:
                fake.calls.append((path, body))
                steps = fake.script.get(path, [])
                step = steps.pop(0) if steps else 200
                if path != "/health" and fake.key and self.headers["Authorization"] != f"Bearer {fake.key}":
                    step = 401
            if step == "drop":
                return self.connection.close()
            if step == "hang":
                fake.done.wait(10.0)
                return None
            if step == "restart":
                fake.restart()
                return self.connection.close()
            found = fake.answer(path, body) if step == 200 else {"error": f"scripted {step}"}
            content = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(step)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 1024  # beyond it, connections wait for a second
        daemon_threads = True

        def handle_error(self, *args):
            """A client that went away."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        fake.done.set()
        server.shutdown()
        server.server_close()
