"""A request's tokens and logprobs are bit-identical whatever rides beside it, however it is cut, wherever it runs."""
import json
import threading
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


class EveryFamily(unittest.TestCase):
    """The tiny models of all families: on one device, on two, and through resizes to three and to one."""

    def test_tokens_do_not_depend_on_devices_or_resizes(self):
        for folder in sorted(GOLDENS.iterdir()):
            if not (folder / "model.safetensors").exists():
                continue
            with self.subTest(folder.name):
                golden = json.loads((folder / "golden.json").read_text())
                prompts = [golden["prompt"], golden["ids"], golden["ids"][5:23], golden["ids"][:1]]
                with Server(model=str(folder), devices=1, flags=["--no-prefix-cache"]) as server:
                    alone = [server.complete(p, max_tokens=40) for p in prompts]
                with Server(model=str(folder), devices=2, flags=["--max-devices", "3", "--max-chunk-tokens", "9"]) as server:
                    self.assertEqual(alone, together(server, prompts, max_tokens=40))
                    for devices in [3, 1]:
                        started = threading.Thread(target=server.post, args=("/v1/scale", {"devices": devices}))
                        started.start()
                        self.assertEqual(alone * 3, together(server, prompts * 3, max_tokens=40))
                        started.join()


if __name__ == "__main__":
    unittest.main()
