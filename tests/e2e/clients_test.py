"""The real clients (npm, pinned in tests/clients/package.json) against the real server."""
import os
import pathlib
import shutil
import subprocess
import unittest

from server import ROOT, Server

CLIENTS = ROOT / "tests/clients"


class Clients(unittest.TestCase):
    def run_node(self, server, **environment):
        self.assertTrue((CLIENTS / "node_modules").is_dir(), "npm ci was not run in tests/clients; 'make test' does it")
        done = subprocess.run([shutil.which("node"), "--test", *sorted(str(p) for p in CLIENTS.glob("*.test.mjs"))], cwd=CLIENTS,
                              env={**os.environ, "ELASTICMOE_URL": f"http://127.0.0.1:{server.port}", **environment},
                              capture_output=True, text=True, timeout=300)
        self.assertEqual(0, done.returncode, done.stdout[-6000:] + done.stderr[-2000:])

    def test_openai_and_ai_sdk(self):
        with Server(devices=2) as server:
            self.run_node(server)

    def test_with_an_api_key(self):
        with Server(devices=2, flags=["--api-key", "secret"]) as server:
            self.assertEqual(401, server.request("GET", "/v1/models")[0])
            self.run_node(server, ELASTICMOE_API_KEY="secret")


if __name__ == "__main__":
    unittest.main()
