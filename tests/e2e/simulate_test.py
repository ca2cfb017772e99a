"""simulate as a command: its exit codes, what it prints for programs, and the profile of this machine."""
import json
import pathlib
import subprocess
import tempfile
import unittest

from server import BINARY, DEMO

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {
    "cluster": {"profile": "h100", "devices": 8},
    "model": str(ROOT / "scenarios/models/qwen3-30b-a3b.json"),
    "workload": {"kind": "poisson", "schedule": "2:20", "prompt_tokens": "100-200", "output_tokens": "10-20"},
    "slo": {"ttft_s": 2, "tpot_s": 0.1},
    "runs": [{"name": "two", "policy": "static", "devices": 2}],
}


class Simulate(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)

    def run_it(self, changes=None, *flags):
        scenario = {**SMALL, **(changes or {})}
        (self.directory / "scenario.json").write_text(json.dumps(scenario))
        return subprocess.run([BINARY, "simulate", str(self.directory / "scenario.json"), *flags],
                              capture_output=True, text=True)

    def test_a_goal_that_is_held_is_exit_code_0(self):
        done = self.run_it(None, "--json", "--html", str(self.directory / "page.html"))
        self.assertEqual(done.returncode, 0, done.stderr)
        run = json.loads(done.stdout)["runs"][0]
        self.assertEqual(run["ended"], run["requests"])
        self.assertIn("Worst TTFT", (self.directory / "page.html").read_text())

    def test_a_goal_that_no_size_holds_is_exit_code_2_with_the_best_possible(self):
        done = self.run_it({"slo": {"ttft_s": 2, "tpot_s": 0.001}})
        self.assertEqual(done.returncode, 2)
        self.assertIn("no size holds the goal", done.stderr)
        self.assertIn("at best", done.stderr)
        self.assertIn("two", done.stdout)  # the results are there

    def test_bad_input_is_exit_code_2(self):
        (self.directory / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,3\nx,2,3\n")
        for changes, text in (
                ({"clustr": 1}, "unknown key scenario.clustr"),
                ({"workload": {**SMALL["workload"], "schedule": "-1:5"}}, "workload.schedule"),
                ({"workload": {"kind": "trace", "path": "trace.csv"}}, "line 3"),
                ({"cluster": {"profile": "cpu-core", "devices": 2}}, "fitting the model into the cluster"),
                ({"model": "nowhere.json"}, "nowhere.json")):
            done = self.run_it(changes)
            self.assertEqual(done.returncode, 2, text)
            self.assertIn(text, done.stderr)

    def test_a_table_of_the_paper_for_programs(self):
        done = subprocess.run([BINARY, "simulate", str(ROOT / "scenarios/paper/table1.json"), "--json"],
                              capture_output=True, text=True, check=True)
        rows = json.loads(done.stdout)["rows"]
        self.assertEqual(len(rows), 15)
        for row in rows:
            self.assertLess(abs(row["simulated"] - row["paper"]), 0.02 * row["paper"] + 0.01, row["name"])
            self.assertLessEqual(row["ours"], row["simulated"], row["name"])

    def test_a_calibrated_profile_is_read_by_a_scenario(self):
        profile = self.directory / "cpu.json"
        subprocess.run([BINARY, "calibrate", "--model", DEMO, "--devices", "2", "--output", str(profile)], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        measured = json.loads(profile.read_text())
        self.assertGreater(sum(measured["measured"].values()), 0)
        self.assertGreater(measured["attach_s"], 0)
        self.assertGreater(measured["boot_s"], 0)
        done = self.run_it({"cluster": {"profile": "cpu.json"}, "model": str(pathlib.Path(DEMO) / "config.json"),
                            "slo": {"ttft_s": 60, "tpot_s": 10}}, "--json")
        self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == "__main__":
    unittest.main()
