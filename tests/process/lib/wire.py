"""The wire as bytes: frames that are right, and frames that are not.

Names and numbers come from lib/wire.h itself. A client here has no opinion: it sends what it is told,
malformed or not, and hands out what comes back, each wait bounded.
"""
import os
import re
import socket
import struct
import time

MAGIC = b"HRTHv1\0\0"
HEADER = struct.Struct("<IHHQ")  # body_len, type, flags, id
OPTION = struct.Struct("<HHI")   # tag, zero, len
CRITICAL = 0x8000
LIMIT_S = 20.0                   # longest wait for anything

_HEADER_FILE = os.path.join(os.path.dirname(__file__), "..", "..", "..", "lib", "wire.h")


def _numbers(prefix):
    with open(_HEADER_FILE, encoding="utf-8") as file:
        text = file.read()
    found = re.findall(r"\b" + prefix + r"_(\w+) = (WIRE_TAG_CRITICAL \| )?(\d+)", text)
    return {name: int(number) | (CRITICAL if critical else 0) for name, critical, number in found}


TYPE = _numbers("WIRE")  # {"HELLO": 1, "COMPLETE": 2, ...}
TAG = _numbers("TAG")    # {"VERSION": 1, "STOP": 0x801d, ...}
TYPE_NAME = {number: name for name, number in TYPE.items()}
TAG_NAME = {number: name for name, number in TAG.items()}

# Tags whose values are not text; every other one is.
_REALS = {TAG[n] for n in ("TEMPERATURE", "TOP_P", "MIN_P", "REPEAT_PENALTY")}
_BYTES = {TAG[n] for n in ("FINGERPRINT", "IDS", "VECTOR", "ON_BEHALF_OF")}
_TEXTS = {TAG[n] for n in (
    "VERSION", "CLIENT", "STATUS_PATH", "MODEL", "PROMPT", "ROLE", "CONTENT", "STOP", "NAME", "TEXT",
    "REASON", "CODE", "SENTENCE", "OPTION", "STATE", "INFO", "STATS", "VARIANT")}


def option(tag, value=b""):
    """An option: the tag by name or number; bytes as they are, text as UTF-8, a whole number as 8
    bytes, a real as 4."""
    number = TAG[tag] if isinstance(tag, str) else tag
    if isinstance(value, bool):
        value = struct.pack("<I", value)
    elif isinstance(value, int):
        value = struct.pack("<Q", value)
    elif isinstance(value, float):
        value = struct.pack("<f", value)
    elif isinstance(value, str):
        value = value.encode()
    return OPTION.pack(number, 0, len(value)) + value


def header(kind, request_id, body_len, flags=0):
    number = TYPE[kind] if isinstance(kind, str) else kind
    return HEADER.pack(body_len, number, flags, request_id)


def frame(kind, request_id, *options, flags=0):
    """A frame: options are bytes (see option()) or pairs of tag and value."""
    body = b"".join(o if isinstance(o, bytes) else option(*o) for o in options)
    return header(kind, request_id, len(body), flags) + body


class Frame:
    """A frame that came in: `type` by name, `options` a list of (name or number, value)."""

    def __init__(self, kind, flags, request_id, body):
        self.type = TYPE_NAME.get(kind, kind)
        self.flags, self.id, self.body = flags, request_id, body
        self.options = []
        at = 0
        while at < len(body):
            tag, zero, length = OPTION.unpack_from(body, at)
            value = body[at + OPTION.size:at + OPTION.size + length]
            assert zero == 0 and len(value) == length, "the daemon sent a malformed option"
            self.options.append((TAG_NAME.get(tag, tag), _value(tag, value)))
            at += OPTION.size + length

    def get(self, name, default=None):
        return next((value for tag, value in self.options if tag == name), default)

    def __repr__(self):
        return f"{self.type}#{self.id} {self.options}"


def _value(tag, value):
    if tag in _TEXTS:
        return value.decode("utf-8", "replace")
    if tag in _REALS:
        return struct.unpack("<f", value)[0]
    if tag in _BYTES or tag not in TAG_NAME:
        return value
    return int.from_bytes(value, "little")


class Closed(Exception):
    """The daemon closed the connection."""


class Client:
    """One raw connection. With hello=False not even the magic is sent."""

    def __init__(self, path, hello=True, limit_s=LIMIT_S):
        self.limit_s = limit_s
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(limit_s)
        self.sock.connect(str(path))
        self.buffer = b""
        self.magic_seen = False
        self.next_id = 1
        self.hello = None
        self.waiting = []  # frames read while looking for another id's
        if hello:
            self.send(MAGIC + frame("HELLO", 0, ("VERSION", "test"), ("CLIENT", "process-test")))
            self.hello = self.receive()
            assert self.hello.type == "HELLO", self.hello

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.sock.close()

    def send(self, data):
        self.sock.sendall(data)

    def request(self, kind, *options, request_id=None):
        """Sends a request and returns its id."""
        if request_id is None:
            request_id, self.next_id = self.next_id, self.next_id + 1
        self.send(frame(kind, request_id, *options))
        return request_id

    def _fill(self, n):
        while len(self.buffer) < n:
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                raise Closed(self.buffer)
            self.buffer += data

    def _take(self, n):
        self._fill(n)
        data, self.buffer = self.buffer[:n], self.buffer[n:]
        return data

    def receive(self):
        """The next frame, whatever its id. Closed at the end, TimeoutError after limit_s."""
        if self.waiting:
            return self.waiting.pop(0)
        return self._read_frame()

    def _read_frame(self):
        if not self.magic_seen:
            magic = self._take(len(MAGIC))
            assert magic == MAGIC, f"the daemon opens with {magic!r}"
            self.magic_seen = True
        body_len, kind, flags, request_id = HEADER.unpack(self._take(HEADER.size))
        return Frame(kind, flags, request_id, self._take(body_len))

    def replies(self, request_id):
        """All frames of a request up to and with its done or error; others' are kept for later."""
        got, others = [], []
        end = time.monotonic() + self.limit_s
        while time.monotonic() < end:
            reply = self.receive()
            if reply.id != request_id:
                others.append(reply)
                continue
            got.append(reply)
            if reply.type in ("DONE", "ERROR"):
                self.waiting = others + self.waiting
                return got
        raise TimeoutError(f"request {request_id} did not end: {got}")

    def ask(self, kind, *options):
        """A request and all its replies."""
        return self.replies(self.request(kind, *options))

    def rest(self):
        """Everything up to the daemon's close, as bytes."""
        try:
            while True:
                self._fill(len(self.buffer) + 1)
        except Closed:
            data, self.buffer = self.buffer, b""
            return data

    def frames_to_end(self):
        """All frames up to the daemon's close."""
        got = []
        try:
            while True:
                got.append(self.receive())
        except Closed:
            return got


def text_of(replies):
    """The text of a stream's frames."""
    return "".join(r.get("TEXT", "") for r in replies if r.type in ("TOKENS", "ITEM"))
