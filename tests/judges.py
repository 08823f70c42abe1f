"""A real HTTP server on loopback that speaks the OpenAI chat protocol, or any misconduct that a test wants of it."""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass
class Reply:
    """What a server sends: a status, headers and a body; or `conduct`, which gets the handler and does as it likes."""

    body: bytes | str | dict[str, Any] = b""
    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    conduct: Callable[[BaseHTTPRequestHandler], None] | None = None


@dataclasses.dataclass
class Served:
    """A server at work. `requests`: the bodies that came, `headers`: their headers, in order."""

    url: str
    requests: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)
    closing: threading.Event = dataclasses.field(default_factory=threading.Event)


def completion(text: str | None) -> dict[str, Any]:
    """A chat completion as OpenAI's servers write it."""
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


Respond = Callable[[dict[str, Any], int], "Reply | str"]


@contextlib.contextmanager
def serving(respond: Respond) -> Iterator[Served]:
    """Serve on a free port of loopback; `respond(request, number)` gives the answer's text, or a Reply."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(served.requests)
                served.requests.append({**request, "path": self.path})
                served.headers.append(dict(self.headers))
            reply = respond(request, number)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send(Reply(completion(reply)) if isinstance(reply, str) else reply)

        def send(self, reply: Reply) -> None:
            if reply.conduct:
                self.close_connection = True
                reply.conduct(self)
                return
            body = json.dumps(reply.body) if isinstance(reply.body, dict) else reply.body
            data = body.encode() if isinstance(body, str) else body
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.closing.set()
        server.shutdown()
        server.server_close()
