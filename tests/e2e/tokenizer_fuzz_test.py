"""Random texts get the ids that the Rust library `tokenizers` gives (npm @anush008/tokenizers). FUZZ_SEED repeats a run."""
import json
import os
import pathlib
import random
import shutil
import subprocess
import unittest

from server import DEMO, ROOT, Server

CLIENTS = ROOT / "tests/clients"
# Code points of Unicode 14 at most: PCRE2 and ICU of Debian 12 know no newer ones, the library does.
RANGES = [(0x20, 0x7e), (0x20, 0x7e), (0x00, 0x1f), (0xa0, 0x17f), (0x300, 0x36f), (0x391, 0x3c9), (0x410, 0x44f), (0x5d0, 0x5ea),
          (0x2000, 0x206f), (0x3041, 0x3096), (0x4e00, 0x4eff), (0xac00, 0xacff), (0x1f600, 0x1f64f)]
PIECES = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "  ", "\r\n", "\n\n\n", "'re", "'S", "don't", "12345", "the ",
          " a", "\u00e9", "e\u0301", "\u200d", "\u3000", "<|im_", "|>"]


def text_of(rng):
    parts = []
    for _ in range(rng.randint(0, 12)):
        if rng.random() < 0.4:
            parts.append(rng.choice(PIECES))
        else:
            low, high = rng.choice(RANGES)
            parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6))))
    return "".join(parts)


class TokenizerFuzz(unittest.TestCase):
    def test_ids_of_random_texts_are_those_of_the_rust_library(self):
        if not (CLIENTS / "node_modules/@anush008/tokenizers").is_dir():
            self.skipTest("npm ci was not run in tests/clients; 'make test' does it where npm can be reached")
        seed = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(1 << 30)))
        rng = random.Random(seed)
        texts = [text_of(rng) for _ in range(1500)]
        done = subprocess.run([shutil.which("node"), "tokenize.mjs", str(pathlib.Path(DEMO) / "tokenizer.json")], cwd=CLIENTS,
                              input=json.dumps(texts), capture_output=True, text=True, timeout=120)
        self.assertEqual(0, done.returncode, done.stderr)
        wanted = json.loads(done.stdout)
        with Server(devices=1) as server:
            for text, want in zip(texts, wanted):
                status, answer = server.post("/tokenize", {"prompt": text})
                self.assertEqual(200, status, answer)
                self.assertEqual(want, answer["tokens"], f"FUZZ_SEED={seed} text={text!r}")


if __name__ == "__main__":
    unittest.main()
