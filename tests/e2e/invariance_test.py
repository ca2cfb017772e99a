"""A request's tokens and logprobs are bit-identical whatever rides beside it, however it is cut, wherever it runs."""
import json
import math
import pathlib
import random
import struct
import tempfile
import threading
import time
import unittest

from server import ROOT, Server

GOLDENS = ROOT / "tests/data/goldens"
PROMPTS = ["It is a truth universally acknowledged, that", "And it came to pass in those days, that", "Emma was",
           "The king answered and said unto them, " * 6]


def together(server, prompts, **fields):
    """The same as one complete() after another, but at once."""
    results = [None] * len(prompts)

    def run(i):
        results[i] = server.complete(prompts[i], **fields)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


class Invariance(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with Server(devices=1, flags=["--no-prefix-cache"]) as server:
            cls.alone = [server.complete(p) for p in PROMPTS]
            cls.sampled = [server.complete(p, temperature=0.9, seed=7, top_p=0.9) for p in PROMPTS]

    def check(self, flags, devices):
        with Server(devices=devices, flags=flags) as server:
            self.assertEqual(self.alone, together(server, PROMPTS))
            batch = together(server, PROMPTS * 8)
            self.assertEqual(self.alone * 8, batch)
            self.assertEqual(self.sampled, together(server, PROMPTS, temperature=0.9, seed=7, top_p=0.9))

    def test_on_one_device_in_a_batch_of_32(self):
        self.check([], 1)

    def test_on_two_devices_with_a_prompt_in_chunks_of_seven(self):
        self.check(["--max-chunk-tokens", "7", "--no-prefix-cache"], 2)

    def test_on_three_devices_of_two_threads(self):
        self.check(["--threads-per-device", "2"], 3)

    def test_on_five_devices(self):
        self.check([], 5)

    def test_when_kv_is_short_and_requests_are_preempted(self):
        with Server(devices=2, flags=["--kv-memory", "400KiB", "--no-prefix-cache"]) as server:
            self.assertEqual(self.alone * 8, together(server, PROMPTS * 8))
            metrics = server.request("GET", "/metrics")[1].decode()
            preempted = next(line for line in metrics.splitlines() if line.startswith("vllm:num_preemptions_total"))
            self.assertGreater(float(preempted.split()[-1]), 0)


def make_top_any_model(folder):
    """Random weights; experts of every other layer, chosen by thresholds, so that tokens visit from one to four."""
    rng = random.Random(3)
    hidden, width, experts, vocab, head = 32, 16, 6, 64, 16
    config = {"model_type": "qwen3_moe", "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": 4, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": head, "intermediate_size": 40, "moe_intermediate_size": width, "num_experts": experts,
              "num_experts_per_tok": 4, "max_position_embeddings": 256, "decoder_sparse_step": 2, "moe_routing": "top_any"}
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "lm_head.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    for layer in range(4):
        at = f"model.layers.{layer}."
        for norm, size in [("input_layernorm", hidden), ("post_attention_layernorm", hidden), ("self_attn.q_norm", head),
                           ("self_attn.k_norm", head)]:
            shapes[f"{at}{norm}.weight"] = [size]
        for name, rows, columns in [("q", 2 * head, hidden), ("k", head, hidden), ("v", head, hidden), ("o", hidden, 2 * head)]:
            shapes[f"{at}self_attn.{name}_proj.weight"] = [rows, columns]
        mlps = {"mlp.": 40} if layer % 2 == 0 else {f"mlp.experts.{e}.": width for e in range(experts)}
        for mlp, inner in mlps.items():
            for name, rows, columns in [("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)]:
                shapes[f"{at}{mlp}{name}_proj.weight"] = [rows, columns]
        if layer % 2 == 1:
            shapes[at + "mlp.gate.weight"], shapes[at + "mlp.gate.thresholds"] = [experts, hidden], [experts]
    header, data = {}, bytearray()
    for name, shape in shapes.items():
        begin = len(data)
        for _ in range(math.prod(shape)):
            value = 1.0 if name.endswith("norm.weight") else rng.uniform(-0.3, 0.3)
            data += struct.pack("<f", value)[2:]  # bf16
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps(config))


class EveryFamily(unittest.TestCase):
    """Tiny models: on one device, on two, and through resizes to three and to one."""

    def check(self, folder, prompts):
        with Server(model=str(folder), devices=1, flags=["--no-prefix-cache"]) as server:
            alone = [server.complete(p, max_tokens=40) for p in prompts]
        with Server(model=str(folder), devices=2, flags=["--max-devices", "3", "--max-chunk-tokens", "9"]) as server:
            self.assertEqual(alone, together(server, prompts, max_tokens=40))
            for devices in [3, 1]:
                answers = []
                started = threading.Thread(target=lambda: answers.append(server.post("/v1/scale", {"devices": devices})))
                started.start()
                self.assertEqual(alone * 3, together(server, prompts * 3, max_tokens=40))
                started.join()
                self.assertEqual(202, answers[0][0], answers)
                deadline = time.monotonic() + 60
                while server.post("/is_scaling_elastic_ep", {})[1]["is_scaling_elastic_ep"] and time.monotonic() < deadline:
                    time.sleep(0.01)
                self.assertEqual(alone, together(server, prompts, max_tokens=40))

    def test_tokens_of_every_golden_model(self):
        for folder in sorted(GOLDENS.iterdir()):
            if not (folder / "model.safetensors").exists():
                continue
            with self.subTest(folder.name):
                golden = json.loads((folder / "golden.json").read_text())
                self.check(folder, [golden["prompt"], golden["ids"], golden["ids"][5:23], golden["ids"][:1]])

    def test_tokens_of_top_any_routing(self):
        with tempfile.TemporaryDirectory() as folder:
            make_top_any_model(pathlib.Path(folder))
            self.check(folder, [[1, 2, 3], list(range(40)), [63] * 9])


if __name__ == "__main__":
    unittest.main()
