"""A stand-in for Kaggle that kagglesdk and the real `kaggle` command talk to; see the fixture `kaggle` for its use.

    server.site                what Kaggle has: datasets, kernels, submissions (site.py); set what you like
    server.site.runs.append(Run(statuses=["RUNNING", "ERROR"], failure="out of memory"))      # of the next push
    server.faults.append(Fault("CreateDatasetVersion", status=503))                           # once; times=3 for thrice
    server.requests            each request: call, JSON, bytes of its body
    server.stalled.wait(30)    until an upload has stalled: Fault("PUT", breaks_after_bytes=1000, stalls=True)
    server.hung_up.wait(30)    until the client of a stalled upload has gone
    server.trespasses          requests for any other host, all refused; the fixture fails the test if there are any

The client reaches it as a proxy (http_proxy), so requests come in absolute form: http://localhost/api/v1/SERVICE/METHOD.
Uploads are PUT to /uploads/TOKEN, resumable as Google's: `Content-Range: bytes */N` asks, 308 with `Range` answers.
"""

import json
import socketserver
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from tests.fakes.kaggle.calls import CALLS, Refusal, check_fields
from tests.fakes.kaggle.site import TOKEN, Blob, Site

API = "/api/v1/"


@dataclass
class Fault:
    """Something that goes wrong at a call: its method's name, PUT for uploads.

    It happens `times` times, and only where `where` stands in the request's JSON or, for an upload, is the file's name.
    """

    call: str
    where: str = ""
    times: int = 1
    seconds: float = 0  # the answer is late
    status: int = 0  # an HTTP error in place of the answer
    message: str = ""  # Kaggle's own words; without them a gateway's page, which the command words otherwise
    answer: dict = field(default_factory=dict)  # put into the answer under HTTP 200; with "error" in it nothing else happens
    loses_answer: bool = False  # all is done as asked, but the connection closes without an answer
    loses: tuple[str, ...] = ()  # CreateDataset, CreateDatasetVersion: these files are left out
    cuts: tuple[str, ...] = ()  # likewise: these files lose their last byte
    breaks_after_bytes: int | None = None  # PUT: only these bytes are kept; then `status`, or the connection is closed
    stalls: bool = False  # PUT: and instead of being closed it is silent until the client has gone


def error_under_200(call: str, message: str) -> Fault:
    """CreateDataset, CreateDatasetVersion, SaveKernel: Kaggle's way to fail with HTTP 200."""
    return Fault(call, answer={"error": message} if call == "SaveKernel" else {"status": "error", "error": message})


@dataclass
class Request:
    """One request as it came. `bytes` is the length of its body as far as it came."""

    call: str
    url: str
    fields: dict
    bytes: int = 0


class KaggleServer(ThreadingHTTPServer):
    """The server on a free loopback port, its state and its log."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.port = self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.site, self.lock = Site(), threading.RLock()
        self.stalled, self.hung_up = threading.Event(), threading.Event()
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.trespasses: list[str] = []

    def server_bind(self) -> None:
        """Bind without asking the network for this machine's name, as HTTPServer does."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request, client_address) -> None:
        """Say nothing where a client was killed; anything else is an error of the stand-in, and printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def calls(self, name: str) -> list[Request]:
        """The requests of one call, PUT and GET included."""
        return [request for request in self.requests if request.call == name]

    def uploaded_bytes(self, name: str | None = None) -> int:
        """Bytes received for files of that name, or for all files, whether they were kept or not."""
        return sum(blob.received_bytes for blob in self.site.blobs.values() if name in (None, blob.name))

    def take_fault(self, call: str, text: str) -> Fault:
        """The first fault ordered for this request, counted down; one without effect where there is none."""
        with self.lock:
            fault = next((f for f in self.faults if f.call == call and f.where in text and f.times > 0), None)
            if fault is None:
                return Fault(call)
            fault.times -= 1
            return fault


class Handler(BaseHTTPRequestHandler):
    """One connection of a client. Each request is logged before anything is done with it."""

    protocol_version = "HTTP/1.1"
    server: KaggleServer

    def log_message(self, *arguments) -> None:
        """Silence the standard library's log, a line of stderr for each request: `note` keeps them."""

    def do_CONNECT(self) -> None:
        self.refuse_stranger(self.path)

    def refuse_stranger(self, url: str) -> None:
        """Another host than localhost was wanted: somebody's request would have left this machine."""
        self.server.trespasses.append(f"{self.command} {url}")
        self.close_connection = True
        self.send(403, {"code": 403, "message": f"the stand-in refuses {url}: only http://localhost may be asked"})

    def is_stranger(self) -> bool:
        parts = urlsplit(self.path)
        return bool(parts.netloc) and parts.netloc not in {"localhost", f"127.0.0.1:{self.server.port}"}

    def do_POST(self) -> None:
        if self.is_stranger():
            return self.refuse_stranger(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, fields = urlsplit(self.path).path, json.loads(body or b"{}")
        call = path.removeprefix(API)
        request = self.note(call.rsplit("/")[-1], fields, len(body))
        fault = self.server.take_fault(request.call, body.decode())
        time.sleep(fault.seconds)
        try:
            answer = self.answer(call, fields, fault)
        except Refusal as refusal:
            error = {"code": refusal.status, "message": refusal.message} if refusal.message else b"<html></html>"
            return self.send(refusal.status, error)
        if fault.loses_answer:
            self.close_connection = True
            return None
        if "redirect" in answer:
            return self.send(302, b"", {"Location": answer["redirect"]})
        return self.send(200, answer)

    def answer(self, call: str, fields: dict, fault: Fault) -> dict:
        """What the site says to a call, spoilt as the fault has it."""
        if fault.status:
            raise Refusal(fault.status, fault.message)
        if call not in CALLS:
            raise Refusal(400, f"the stand-in does not know {call}")
        if not call.endswith("/IntrospectToken") and self.headers["Authorization"] != f"Bearer {TOKEN}":
            raise Refusal(401, "Unauthenticated")
        if "error" in fault.answer:
            return fault.answer
        with self.server.lock:
            respond, response_type = CALLS[call]
            answer = respond(self.server.site, fields)
            if response_type:
                check_fields(answer, response_type)
            if fault.loses or fault.cuts:
                files = self.server.site.datasets[answer["ref"]].versions[-1].files
                files |= {name: files[name][:-1] for name in fault.cuts}
                for name in fault.loses:
                    del files[name]
        return merged(answer, fault.answer)

    def do_PUT(self) -> None:
        """An upload, whole or from where an earlier one ended, or the question how far that came."""
        if self.is_stranger():
            return self.refuse_stranger(self.path)
        blob = self.server.site.blobs.get(urlsplit(self.path).path.removeprefix("/uploads/"))
        wanted = self.headers.get("Content-Range", "")
        request = self.note("PUT", {"name": blob.name, "range": wanted} if blob else {})
        if blob is None:
            self.close_connection = True
            return self.send(404, b"")
        fault = Fault("PUT") if wanted.startswith("bytes */") else self.server.take_fault("PUT", blob.name)
        time.sleep(fault.seconds)
        if not wanted.startswith("bytes */"):
            first = int(wanted.split()[1].split("-")[0]) if wanted else 0
            del blob.content[first:]
            if not self.receive(blob, request, fault):
                return None
        if fault.status:
            if fault.status < 500:
                blob.content.clear()  # refused, not broken off
            return self.send(fault.status, b"")
        if blob.complete:
            return self.send(200, {})
        return self.send(308, b"", {"Range": f"bytes=0-{len(blob.content) - 1}"} if blob.content else {})

    def receive(self, blob: Blob, request: Request, fault: Fault) -> bool:
        """Take the body in; False where the connection is to be closed, or was closed from the other side."""
        limit = blob.size if fault.breaks_after_bytes is None else fault.breaks_after_bytes
        for piece in self.pieces():
            kept = piece[: limit - request.bytes]
            blob.content += kept
            blob.received_bytes += len(kept)
            request.bytes += len(kept)
            if request.bytes == limit < blob.size and not fault.status:
                self.close_connection = True
                if fault.stalls:
                    self.server.stalled.set()
                    # What the client still sends is dropped until it has gone.
                    while self.rfile.read1(1 << 16):
                        pass
                    self.server.hung_up.set()
                break
        return not self.close_connection

    def pieces(self):
        """The body in pieces as they arrive; an end before its time closes the connection."""
        left = int(self.headers.get("Content-Length", 0))
        while left and (piece := self.rfile.read1(min(left, 1 << 16))):
            left -= len(piece)
            yield piece
        self.close_connection = self.close_connection or left > 0

    def do_GET(self) -> None:
        """Files of datasets and kernels."""
        if self.is_stranger():
            return self.refuse_stranger(self.path)
        path = unquote(urlsplit(self.path).path)
        self.note("GET", {"path": path})
        content = file_content(self.server.site, path)
        return self.send(404, b"") if content is None else self.send(200, content)

    def note(self, call: str, fields: dict, length: int = 0) -> Request:
        request = Request(call, self.path, fields, length)
        self.server.requests.append(request)
        return request

    def send(self, status: int, body: dict | bytes, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        # On a kept connection the body of a client's next request would wait 40 ms for the acknowledgement of its head,
        # since urllib3 leaves Nagle's algorithm on for a proxy.
        answer_headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Connection": "close"}
        for name, value in (answer_headers | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def file_content(site: Site, path: str) -> bytes | None:
    """The bytes behind /files/datasets/OWNER/SLUG/N/NAME or /files/kernels/…; None where there are none."""
    if not path.startswith("/files/"):
        return None
    kind, owner, slug, number, name = path.removeprefix("/files/").split("/", 4)
    if kind == "kernels":
        return site.kernels[f"{owner}/{slug}"].versions[int(number) - 1].run.output.get(name)
    return site.datasets[f"{owner}/{slug}"].versions[int(number) - 1].files.get(name)


def merged(answer: dict, changes: dict) -> dict:
    """The answer with the changes put in, dictionaries within it likewise."""
    both = {key: merged(answer[key], value) for key, value in changes.items() if isinstance(value, dict) and key in answer}
    return {**answer, **changes, **both}
