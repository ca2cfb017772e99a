"""Zero copy, proved by the kernel's own account; budgets; the cost of doing nothing."""
import os
import pathlib
import re
import subprocess
import tempfile
import time
import unittest

from server import BINARY, DEMO, Server


def pss_bytes(pids):
    total = 0
    for pid in pids:
        text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += int(re.search(r"^Pss:\s+(\d+) kB", text, re.M).group(1)) << 10
    return total


def cpu_seconds(pids):
    total = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


class Memory(unittest.TestCase):
    def test_workers_share_the_weights_without_a_copy(self):
        with tempfile.TemporaryDirectory() as directory:
            model = f"{directory}/made"
            subprocess.run([BINARY, "make-model", "--params", "400M", model], check=True, stdout=subprocess.DEVNULL)
            weights = sum(p.stat().st_size for p in pathlib.Path(model).glob("*.safetensors"))
            measured = {}
            for devices in (1, 4):
                with Server(model, devices, flags=["--standby", "0", "--max-devices", "4"]) as server:
                    server.complete([1, 2, 3], max_tokens=4)
                    measured[devices] = pss_bytes(server.children("hmm") + server.children("worker"))
        growth = measured[4] - measured[1] - 3 * (32 << 20)  # each device brings its own KV memory
        print(f"weights {weights >> 20} MiB; memory grows by {growth >> 20} MiB for 3 more workers ({100 * growth / weights:.1f} %)")
        self.assertGreater(measured[1], weights)
        self.assertLess(growth, 0.05 * weights)

    def test_what_cannot_fit_is_refused_before_loading_with_the_numbers(self):
        done = subprocess.run([BINARY, "serve", DEMO, "--devices", "2", "--device-memory", "20MiB", "--kv-memory", "16MiB", "--port", "0"],
                              capture_output=True, text=True, timeout=60)
        self.assertNotEqual(0, done.returncode)
        self.assertRegex(done.stderr, r"device-memory=20.0 MiB; use more --devices, raise --device-memory or lower --kv-memory")
        self.assertNotIn("loaded", done.stderr)

    def test_an_idle_server_costs_less_than_two_percent_of_a_core(self):
        with Server(devices=3) as server:
            server.complete("Emma was", max_tokens=8)
            time.sleep(1)
            pids = [server.process.pid, *server.children("hmm"), *server.children("worker")]
            before, start = cpu_seconds(pids), time.monotonic()
            time.sleep(10)
            share = (cpu_seconds(pids) - before) / (time.monotonic() - start)
        print(f"idle: {100 * share:.2f} % of a core")
        self.assertLess(share, 0.02)


if __name__ == "__main__":
    unittest.main()
