"""An object store that holds a made-up tree of images and takes its time: only lists, and only as S3 does.

    python benchmarks/far_store.py FOLDERS FILES SECONDS

Prints its port, and serves until its standard input ends.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

PAGE = 1000
"""Names in an answer, as with S3."""

_ANSWER = (
    '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{}'
    "<IsTruncated>{}</IsTruncated>{}</ListBucketResult>"
)
_FOLDER = "<CommonPrefixes><Prefix>set/{:04d}/</Prefix></CommonPrefixes>"
_FILE = (
    "<Contents><Key>{}{:06d}.JPEG</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
    '<ETag>"0"</ETag><Size>100000</Size></Contents>'
)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folders = files = 0
    seconds = 0.0

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._say(404, b"")

    def do_GET(self) -> None:
        time.sleep(self.seconds)
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        prefix, start = asked.get("prefix", ""), int(asked.get("continuation-token", 0))
        whole = self.folders if prefix == "set/" else self.files
        stop = min(start + int(asked.get("max-keys", PAGE)), whole)
        named = (
            _FOLDER.format(n) if prefix == "set/" else _FILE.format(prefix, n) for n in range(start, stop)
        )
        further = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < whole else ""
        self._say(200, _ANSWER.format("".join(named), str(stop < whole).lower(), further).encode())

    def _say(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


def main(arguments: Sequence[str]) -> None:
    """Serve."""
    _Handler.folders, _Handler.files, _Handler.seconds = (
        int(arguments[0]),
        int(arguments[1]),
        float(arguments[2]),
    )
    server = _Server(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
