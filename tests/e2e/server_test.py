"""The server's manners: stopping, hanging up, limits, models that are not whole."""
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import unittest

from server import BINARY, DEMO, Server


def metric(server, name):
    lines = server.request("GET", "/metrics")[1].decode().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[-1])


class Manners(unittest.TestCase):
    def test_sigterm_finishes_running_requests(self):
        with Server(devices=2) as server:
            result = []
            thread = threading.Thread(target=lambda: result.append(server.complete("Emma was", max_tokens=600)))
            thread.start()
            time.sleep(0.1)
            server.process.send_signal(signal.SIGTERM)
            thread.join()
            self.assertEqual(600, len(result[0][0]))
            self.assertEqual(0, server.process.wait(20))

    def test_a_second_sigterm_stops_at_once(self):
        with Server(devices=2) as server:
            streams = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
            body = json.dumps({"model": "demo", "prompt": "Emma was", "max_tokens": 1000, "ignore_eos": True, "stream": True}).encode()
            for stream in streams:
                stream.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                               % (len(body), body))
            time.sleep(0.05)
            server.process.send_signal(signal.SIGTERM)
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(0, server.process.wait(10))
            for stream in streams:
                stream.close()

    def test_a_client_that_hangs_up_frees_its_place(self):
        with Server(devices=2) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as stream:
                body = json.dumps({"model": "demo", "prompt": "Emma was", "max_tokens": 1000, "ignore_eos": True, "stream": True}).encode()
                stream.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                               % (len(body), body))
                self.assertIn(b"200", stream.recv(4096))
            deadline = time.monotonic() + 5
            aborted = 'vllm:request_success_total{engine="0",finished_reason="abort"'
            while metric(server, aborted) < 1 and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.1)  # the gauges follow
            self.assertEqual(0, metric(server, "vllm:num_requests_running"))
            self.assertEqual(0, metric(server, "vllm:kv_cache_usage_perc"))

    def test_bad_requests_are_answered_by_name(self):
        with Server(devices=2) as server:
            for body, word in [({"prompt": []}, "prompt"), ({"prompt": [99999]}, "99999"), ({"prompt": "x", "temperature": "hot"}, "temperature"),
                               ({"prompt": [1] * 2000}, "1024"), ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
                               ({"prompt": "x", "top_p": 7}, "top_p"), (b"{not json", "JSON"), (b"\xff\xfe", "JSON")]:
                if isinstance(body, dict):
                    body = {"model": "demo", **body}
                status, answer = server.post("/v1/completions", body)
                self.assertEqual(400, status, answer)
                self.assertIn(word, answer["error"]["message"])
            self.assertEqual(404, server.post("/v1/completions", {"model": "other", "prompt": "x"})[0])
            self.assertEqual(24, len(server.complete("Emma was")[0]))

    def test_a_model_without_tokenizer_serves_token_ids(self):
        with tempfile.TemporaryDirectory() as directory:
            for name in ("config.json", "model.safetensors"):
                shutil.copy(f"{DEMO}/{name}", directory)
            with Server(directory) as server:
                self.assertEqual(24, len(server.complete([2434, 329])[0]))
                status, answer = server.post("/v1/completions", {"model": "demo", "prompt": "text"})
                self.assertEqual(400, status)
                self.assertIn("tokenizer", answer["error"]["message"])

    def test_two_servers_never_share_memory(self):
        def start(port):
            return [BINARY, "serve", DEMO, "--port", str(port), "--devices", "1", "--kv-memory", "32MiB", "--standby", "0"]

        with Server(devices=1) as server:
            hmm = server.children("hmm")
            second = subprocess.run(start(server.port), capture_output=True, text=True, timeout=60)
            self.assertEqual(1, second.returncode)
            self.assertIn(f"127.0.0.1:{server.port} is another running server's memory", second.stderr)
            self.assertEqual(hmm, server.children("hmm"))
            self.assertEqual(24, len(server.complete("Once upon a time")[0]))
        # Free ports have no name of their own.
        both = [subprocess.Popen(start(0), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
        try:
            for one in both:
                about = next(line for line in one.stdout if "KV blocks" in line)
                self.assertNotIn("adopted", about)
        finally:
            for one in both:
                one.terminate()
                one.wait(30)
                one.stdout.close()

    def test_a_broken_model_directory_is_refused_with_its_file(self):
        def harm_weights(path):
            data = (path / "model.safetensors").read_bytes()
            (path / "model.safetensors").write_bytes(data[:-1000])

        def harm_config(path):
            (path / "config.json").write_text('{"model_type": "gpt5"}')

        def harm_tokenizer(path):
            (path / "tokenizer.json").write_text('{"version": "1.0"}')

        def harm_template(path):
            config = json.loads((path / "tokenizer_config.json").read_text())
            config["chat_template"] = "{% for x in %}"
            (path / "tokenizer_config.json").write_text(json.dumps(config))

        for harm, words in [(harm_weights, ["model.safetensors"]), (harm_config, ["config.json", "gpt5"]), (harm_tokenizer, ["tokenizer.json"]),
                            (harm_template, ["chat template"]), (lambda path: (path / "config.json").unlink(), ["config.json"])]:
            with tempfile.TemporaryDirectory() as directory:
                copy = pathlib.Path(directory) / "model"
                shutil.copytree(DEMO, copy)
                harm(copy)
                done = subprocess.run([BINARY, "serve", str(copy), "--port", "0"], capture_output=True, text=True, timeout=60)
                self.assertNotEqual(0, done.returncode)
                for word in words:
                    self.assertIn(word, done.stderr)


if __name__ == "__main__":
    unittest.main()
