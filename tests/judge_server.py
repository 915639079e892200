"""A real HTTP server on this machine that speaks OpenAI's chat protocol, misbehaves when told to, and counts
what it is asked.
"""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer(ThreadingHTTPServer):
    """An OpenAI-compatible server.

    `script` holds what to do with the first requests; the rest is answered after `delay` seconds.
    """

    daemon_threads, request_queue_size = True, 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.delay, self.lock = [], 0.0, threading.Lock()
        self.reply = lambda body: f"heard: {body['messages'][-1]['content']}"
        self.requests, self.headers_seen, self.times, self.now, self.most = [], [], [], 0, 0

    @property
    def spec(self):
        return f"http://127.0.0.1:{self.server_port}/v1|echo"

    def prompts(self):
        return [r["messages"][-1]["content"] for r in self.requests]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        s, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with s.lock:
            s.requests.append(body)
            s.headers_seen.append(dict(self.headers))
            s.times.append(time.monotonic())
            s.now += 1
            s.most = max(s.most, s.now)
            step = s.script.pop(0) if s.script else {}
        time.sleep(step.get("delay", s.delay))
        with s.lock:
            s.now -= 1
        answer = {
            "model": "echo-2",
            "system_fingerprint": "fp_7",
            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
            "choices": [{"message": {"content": s.reply(body)}, "finish_reason": step.get("reason", "stop")}],
        }
        payload = step.get("body", json.dumps(answer)).replace(
            "{auth}", self.headers.get("Authorization", "")
        )
        try:
            self.send_response(step.get("status", 200))
            for name, value in step.get("headers", {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload.encode())
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has given up

    def log_message(self, *args):
        pass


@contextmanager
def running_server():
    with JudgeServer() as s:
        threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
        yield s
        s.shutdown()
