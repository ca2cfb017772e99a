"""A real elasticmoe server as a child process, and a client of plain sockets for tests. Standard library only."""
import contextlib
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = os.environ.get("ELASTICMOE_BINARY", str(ROOT / "build/release/elasticmoe"))
DEMO = str(ROOT / "models/demo")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """serve with the given flags; ready when the constructor returns."""

    def __init__(self, model=DEMO, devices=2, port=None, flags=(), timeout=120):
        self.port = port or free_port()
        self.args = [BINARY, "serve", model, "--host", "127.0.0.1", "--port", str(self.port), "--devices", str(devices),
                     "--served-model-name", "demo"]
        for name, value in {"--kv-memory": "32MiB", "--linger": "5"}.items():
            if name not in flags:
                self.args += [name, value]
        self.args += flags
        self.process = subprocess.Popen(self.args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()
        deadline = time.monotonic() + timeout
        while not self.healthy():
            if self.process.poll() is not None:
                self.reader.join(5)
                raise RuntimeError("server ended: " + "".join(self.lines))
            if time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError("server not ready: " + "".join(self.lines))
            time.sleep(0.02)

    def healthy(self):
        try:
            return self.request("GET", "/health", timeout=2)[0] == 200
        except OSError:
            return False

    def request(self, method, path, body=None, headers=None, timeout=120):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
            connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read()

    def post(self, path, body, **kwargs):
        status, data = self.request("POST", path, body, **kwargs)
        return status, json.loads(data)

    def complete(self, prompt, max_tokens=24, **fields):
        """(token ids, token logprobs) of a completion."""
        status, answer = self.post("/v1/completions", {"model": "demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
                                                       "logprobs": 5, "return_token_ids": True, "ignore_eos": True, **fields})
        assert status == 200, answer
        choice = answer["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def children(self, kind, device=None):
        """pids of `elasticmoe KIND` processes below this server; workers by name of their device."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                name = (entry / "comm").read_text().strip()
            except (OSError, IndexError):
                continue
            if parent != self.process.pid or len(arguments) < 2 or arguments[1] != kind.encode():
                continue
            if device is None or name == f"elasticmoe-w{device}":
                found.append(int(entry.name))
        return found

    def stop(self, expect_zero=True):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        if expect_zero:
            assert code == 0, "".join(self.lines)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop(expect_zero=False)
        self.process.stderr.close()
