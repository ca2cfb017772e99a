"""A model written as GGUF is served as it is, and others read what we write."""
import json
import pathlib
import shutil
import subprocess
import tempfile
import unittest

from server import BINARY, DEMO, ROOT, Server

CLIENTS = ROOT / "tests/clients"
PROMPTS = ["It is a truth universally acknowledged, that", "And it came to pass in those days, that"]


class Gguf(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = tempfile.TemporaryDirectory()
        cls.files = {}
        for kind in ["bf16", "q8_0"]:
            cls.files[kind] = str(pathlib.Path(cls.scratch.name) / f"demo-{kind}.gguf")
            subprocess.run([BINARY, "export-gguf", DEMO, cls.files[kind], "--type", kind], check=True, capture_output=True)

    @classmethod
    def tearDownClass(cls):
        cls.scratch.cleanup()

    def test_tokens_and_chats_are_those_of_the_directory(self):
        chat = {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 24, "seed": 3}
        answers = []
        for model in [DEMO, self.files["bf16"]]:
            with Server(model=model, devices=2) as server:
                completions = [server.complete(prompt) for prompt in PROMPTS]
                self.assertEqual(202, server.post("/v1/scale", {"devices": 3})[0])
                completions += [server.complete(prompt) for prompt in PROMPTS]
                status, answer = server.post("/v1/chat/completions", chat)
                self.assertEqual(200, status, answer)
                answers.append((completions, answer["choices"], answer["usage"]["prompt_tokens"]))
        self.assertEqual(answers[0], answers[1])

    def test_quantised_weights_are_served(self):
        with Server(model=self.files["q8_0"], devices=2) as server:
            self.assertEqual(24, len(server.complete(PROMPTS[0])[0]))

    def test_a_cut_off_file_is_refused_by_name(self):
        cut = pathlib.Path(self.scratch.name) / "cut.gguf"
        data = pathlib.Path(self.files["q8_0"]).read_bytes()
        cut.write_bytes(data[:len(data) // 2])
        done = subprocess.run([BINARY, "inspect", str(cut)], capture_output=True, text=True)
        self.assertEqual(1, done.returncode)
        self.assertIn("cut.gguf", done.stderr)
        self.assertIn("cut off", done.stderr)

    def test_the_hub_s_own_reader_reads_our_file(self):
        if not (CLIENTS / "node_modules/@huggingface/gguf").is_dir():
            self.skipTest("npm ci was not run in tests/clients; 'make test' does it")
        done = subprocess.run([shutil.which("node"), "gguf_info.mjs", self.files["q8_0"]], cwd=CLIENTS, capture_output=True, text=True,
                              timeout=60)
        self.assertEqual(0, done.returncode, done.stderr)
        info = json.loads(done.stdout)
        self.assertEqual("qwen3moe", info["metadata"]["general.architecture"])
        self.assertEqual(16, info["metadata"]["qwen3moe.expert_count"])
        self.assertEqual(4096, len(info["metadata"]["tokenizer.ggml.tokens"]))
        tensors = {tensor["name"]: tensor for tensor in info["tensors"]}
        self.assertEqual([256, 128, 16], tensors["blk.0.ffn_up_exps.weight"]["shape"])
        self.assertEqual(8, tensors["blk.0.ffn_up_exps.weight"]["dtype"])
        self.assertEqual(0, tensors["blk.0.ffn_gate_inp.weight"]["dtype"])


if __name__ == "__main__":
    unittest.main()
