"""A server for tests of `foveate.rollout.server.engine`: it answers after a while and can be told to hang. Answers name
the request, and the weights that the server was given last.

    python fake_server.py PORT
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATE = {"version": None, "tokens": 0, "hangs": False, "aborts": 0, "asked": 0, "memory": []}
LOCK = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer({**STATE, "pid": os.getpid()})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        getattr(self, self.path.strip("/"))(body)

    def publish(self, body):
        STATE["version"] = body["version"]
        STATE["memory"].append("publish")
        self.answer({})

    def sleep(self, _body):
        STATE["memory"].append("sleep")
        self.answer({})

    def wake(self, body):
        STATE["memory"].append(body["what"])
        self.answer({})

    def hang(self, _body):
        STATE["hangs"] = True
        self.answer({})

    def abort(self, _body):
        with LOCK:
            STATE["aborts"] += 1
        self.answer({})

    def generate(self, body):
        with LOCK:
            STATE["asked"] += 1
        aborts, until, own = STATE["aborts"], time.monotonic() + body["seconds"], 0
        while time.monotonic() < until or STATE["hangs"]:
            if STATE["aborts"] != aborts:
                return self.answer({"finish": "abort", "tokens": own, "version": STATE["version"]})
            time.sleep(0.005)
            own += 1
            with LOCK:
                STATE["tokens"] += 0 if STATE["hangs"] else 1
        return self.answer({"finish": "stop", "seed": body["seed"], "version": STATE["version"]})

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
