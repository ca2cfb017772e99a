"""bench resize: every strategy's row is there, and what it says of its own input."""
import json
import subprocess
import unittest

from server import BINARY, DEMO

STRATEGIES = ["elastic", "drain", "cold-restart", "extravagant", "colocated", "horizontal"]


def bench(*flags):
    return subprocess.run([BINARY, "bench", "resize", *flags], capture_output=True, text=True, timeout=300)


class BenchResize(unittest.TestCase):
    def test_has_a_row_a_strategy(self):
        done = bench("--model", DEMO, "--from", "1", "--to", "2", "--before", "1", "--after", "1", "--rate", "20",
                     "--serve-flag=--kv-memory=32MiB", "--json")
        self.assertEqual(0, done.returncode, done.stderr)
        rows = {row["strategy"]: row for row in json.loads(done.stdout)["rows"]}
        self.assertEqual(STRATEGIES, list(rows))
        for name, row in rows.items():
            self.assertIsNone(row["error"])
            self.assertTrue(row["tokens_identical"], row)
            self.assertGreater(row["scaling_latency_ms"], 0)
            if name != "cold-restart":
                self.assertEqual(0, row["refused"] + row["failed"], row)
        self.assertGreater(rows["cold-restart"]["refused"] + rows["cold-restart"]["failed"], 0)
        self.assertGreater(rows["extravagant"]["peak_memory_ratio"], rows["elastic"]["peak_memory_ratio"])

    def test_cycles_say_what_grew(self):
        done = bench("--model", DEMO, "--cycles", "4", "--concurrency", "4", "--serve-flag=--kv-memory=32MiB", "--json")
        self.assertEqual(0, done.returncode, done.stderr)
        report = json.loads(done.stdout)
        self.assertEqual((4, 0), (report["cycles"], report["failed"]))
        self.assertEqual(0, report["process_growth"])

    def test_refuses_what_makes_no_sense(self):
        for flags, word in [(["--model", "/nowhere"], "make-model"), (["--model", DEMO, "--from", "2", "--to", "2"], "nothing to resize"),
                            (["--model", DEMO, "--strategies", "magic"], "magic"), ([], "--model")]:
            done = bench(*flags)
            self.assertEqual(2, done.returncode, done)
            self.assertIn(word, done.stdout + done.stderr)


if __name__ == "__main__":
    unittest.main()
