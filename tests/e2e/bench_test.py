"""The benchmarks of this machine run, and say what they are read for; no test here looks at how fast."""
import json
import pathlib
import shutil
import subprocess
import tempfile
import unittest

from server import BINARY, DEMO, ROOT


def bench(*arguments):
    return subprocess.run([BINARY, "bench", *arguments], capture_output=True, text=True, timeout=300)


class Bench(unittest.TestCase):
    def rows(self, *arguments):
        done = bench(*arguments, "--json")
        self.assertEqual(0, done.returncode, done.stderr)
        result = json.loads(done.stdout)
        for row in result["rows"]:
            self.assertGreater(row["value"], 0, row)
        return {row["name"]: row for row in result["rows"]}

    def test_the_engine_and_the_forward_pass_alone_make_the_same_tokens(self):
        decode = ["decode", DEMO, "--sequences", "1,3", "--steps", "6", "--context", "20", "--rounds", "1"]
        for weights in ["bf16", "int8"]:
            rows = self.rows(*decode, "--weights", weights, "--kv-memory", "32MiB", "--devices", "2")
            self.assertEqual({f"decode_1_{weights}", f"decode_3_{weights}"}, set(rows))
            for row in rows.values():
                self.assertTrue(row["same_tokens"], row)
                self.assertGreater(row["limit_fraction"], 0)
        row = self.rows("prefill", DEMO, "--tokens", "40", "--rounds", "1", "--kv-memory", "32MiB")["prefill_40_bf16"]
        self.assertTrue(row["same_tokens"], row)

    def test_measurements_are_taken_as_stdin_asks(self):
        command = [BINARY, "bench", "decode", DEMO, "--paced", "--sequences", "2", "--steps", "3", "--context", "8",
                   "--kv-memory", "32MiB"]
        done = subprocess.run(command, input="prefill 16\ndecode 2\nlimits\n", capture_output=True, text=True,
                              timeout=120)
        self.assertEqual(0, done.returncode, done.stderr)
        machine, prefill, decode, limits = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertGreater(machine["machine"]["read_gb_per_s"], 0)
        self.assertGreaterEqual(limits["machine"]["read_gb_per_s"], machine["machine"]["read_gb_per_s"])
        self.assertEqual([16], [len(prompt) for prompt in prefill["prompts"]])
        self.assertEqual([4, 4], [len(tokens) for tokens in decode["generated"]])
        done = subprocess.run(command, input="decode 3\n", capture_output=True, text=True, timeout=120)
        self.assertEqual(2, done.returncode)
        self.assertIn("decode 3", done.stderr)

    def test_kernels_loading_and_serving(self):
        rows = self.rows("kernels", "--filter", "matmul/768x2048/m4/t1", "--rounds", "1", "--seconds", "0.001")
        self.assertEqual(1, len(rows))
        self.assertEqual(1, bench("kernels", "--filter", "no such kernel").returncode)
        rows = self.rows("load", DEMO, "--rounds", "1", "--no-cold", "--kv-memory", "32MiB")
        self.assertGreater(rows["load_warm_bf16"]["first_token_s"], rows["load_warm_bf16"]["seconds"])
        rows = self.rows("serve", "--start", DEMO, "--serve-flag=--kv-memory=32MiB", "--concurrency", "2",
                         "--requests", "2", "--input-tokens", "8", "--output-tokens", "4")
        self.assertEqual({"serve_2"}, set(rows))
        self.assertEqual(1, bench("load", "/nonexistent").returncode)


@unittest.skipUnless(shutil.which("node"), "needs node")
class Compare(unittest.TestCase):
    def compare(self, before, after, *arguments):
        with tempfile.TemporaryDirectory() as scratch:
            paths = []
            for name, rows in [("before", before), ("after", after)]:
                paths.append(pathlib.Path(scratch) / name)
                paths[-1].write_text(json.dumps({"rows": [{"name": n, "value": v, "unit": "x"} for n, v in rows.items()]}))
            return subprocess.run(["node", ROOT / "bench/compare", *paths, *arguments], capture_output=True, text=True)

    def test_a_slower_row_is_named(self):
        self.assertEqual(0, self.compare({"a": 100}, {"a": 97}).returncode)
        done = self.compare({"a": 100, "b": 1}, {"a": 90, "b": 2})
        self.assertEqual(1, done.returncode)
        self.assertIn("slower?", done.stdout.splitlines()[0])
        self.assertIn("faster", done.stdout.splitlines()[1])

    def test_it_is_measured_again_before_it_is_called_slower(self):
        again = "echo '" + json.dumps({"rows": [{"name": "a", "value": 99, "unit": "x"}]}) + "'"
        self.assertEqual(0, self.compare({"a": 100}, {"a": 50}, "--rerun", again).returncode)
        done = self.compare({"a": 200}, {"a": 50}, "--rerun", again, "--reruns", "1")
        self.assertEqual(1, done.returncode)
        self.assertIn("slower", done.stdout)

    def test_what_cannot_be_compared_is_refused(self):
        self.assertEqual(2, self.compare({"a": 1}, {"b": 1}).returncode)
        self.assertEqual(2, self.compare({"a": 1}, {"a": 1}, "--threshold", "-5").returncode)


if __name__ == "__main__":
    unittest.main()
