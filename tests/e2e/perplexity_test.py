"""Held-out perplexity of the bundled model, through the API: 30.5 at 512 tokens, within 1 %; what int8 and int4 weights lose."""
import concurrent.futures
import math
import unittest

from server import ROOT, Server

WINDOW = 512


def perplexity(weights):
    text = (ROOT / "tests/data/heldout.txt").read_text()
    with Server(devices=2, flags=("--weights", weights)) as server:
        status, answer = server.post("/tokenize", {"model": "demo", "prompt": text})
        assert status == 200, answer
        ids = answer["tokens"]
        windows = [ids[i:i + WINDOW + 1] for i in range(0, len(ids) - 1, WINDOW)]

        def score(window):
            status, answer = server.post("/v1/completions", {"model": "demo", "prompt": window, "max_tokens": 0, "echo": True,
                                                             "logprobs": 0})
            assert status == 200, answer
            return answer["choices"][0]["logprobs"]["token_logprobs"][1:]

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            logprobs = [p for window in pool.map(score, windows) for p in window]
    assert len(logprobs) == len(ids) - 1, (len(logprobs), len(ids))
    value = math.exp(-sum(logprobs) / len(logprobs))
    print(f"{weights}: perplexity {value:.3f} over {len(logprobs)} tokens")
    return value


class Perplexity(unittest.TestCase):
    def test_of_the_bundled_model_on_held_out_text(self):
        self.assertLess(abs(perplexity("bf16") / 30.5 - 1), 0.01)

    def test_of_int8_weights(self):
        self.assertLess(perplexity("int8") / 30.5 - 1, 0.005 + 0.01)

    def test_of_int4_weights(self):
        self.assertLess(perplexity("int4") / 30.5 - 1, 0.04 + 0.01)


if __name__ == "__main__":
    unittest.main()
