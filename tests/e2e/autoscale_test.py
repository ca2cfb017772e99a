"""The server chooses its size by itself: grows in a burst, shrinks after it, sleeps and wakes; the tokens stay the same."""
import json
import pathlib
import subprocess
import tempfile
import threading
import time
import unittest

from server import BINARY, DEMO, ROOT, Server

PROMPTS = [f"In the year {i} it came to pass that" for i in range(40)]
TOKENS = 100
SLO = ["--max-devices", "2", "--autoscale", "slo", "--slo-ttft", "2000", "--slo-attainment", "0.9", "--autoscale-window", "2"]


def get(server, path):
    return json.loads(server.request("GET", path)[1])


def await_that(what, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)
    return found


def in_parallel(server):
    results = [None] * len(PROMPTS)

    def run(i):
        results[i] = server.complete(PROMPTS[i], max_tokens=TOKENS)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(PROMPTS))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


def metrics(server, name):
    lines = server.request("GET", "/metrics")[1].decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)}


class Autoscale(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with Server(devices=1) as server:
            cls.wanted = in_parallel(server)
            # Alone, a request holds three times its own time a token on this machine; among forty it does not.
            seconds = []
            for _ in range(5):
                start = time.monotonic()
                server.complete(PROMPTS[0], max_tokens=TOKENS)
                seconds.append(time.monotonic() - start)
        cls.slo = [*SLO, "--slo-tpot", str(3e3 * sorted(seconds)[2] / TOKENS)]

    def changes(self, server):
        return [d for d in get(server, "/v1/autoscale")["decisions"] if d["applied"] and d["from"] != d["to"]]

    def test_a_burst_grows_it_and_quiet_shrinks_it_with_the_same_tokens(self):
        with Server(devices=1, flags=self.slo) as server:
            deadline = time.monotonic() + 60
            while get(server, "/v1/autoscale")["devices"] != 2:
                self.assertEqual(self.wanted, in_parallel(server))
                self.assertLess(time.monotonic(), deadline)
            # Twice the window, whatever the machine takes for a step or a resize; the rest is for a machine that is busy.
            await_that(lambda: get(server, "/v1/autoscale")["devices"] == 1, 40)
            self.assertLessEqual(len(self.changes(server)), 4)
            self.assertEqual(self.wanted[0], server.complete(PROMPTS[0], max_tokens=TOKENS))
            grown, shrunk = self.changes(server)[0], self.changes(server)[-1]
            self.assertEqual((1, 2), (grown["from"], grown["to"]))
            self.assertIn(grown["code"], ("grow", "no_size_holds"))
            self.assertIn("forecast at 1 devices", grown["reason"])
            self.assertEqual((2, 1, "shrink"), (shrunk["from"], shrunk["to"], shrunk["code"]))
            self.assertIn("idle device-seconds exceed", shrunk["reason"])
            counted = metrics(server, "elasticmoe_autoscale_decisions_total")
            self.assertGreaterEqual(counted['elasticmoe_autoscale_decisions_total{code="shrink"}'], 1)
            self.assertTrue(metrics(server, "elasticmoe_autoscale_forecast_attainment"))
            cost = metrics(server, "elasticmoe_")
            device_s = next(v for k, v in cost.items() if k.startswith("elasticmoe_device_seconds_total"))
            busy_s = next(v for k, v in cost.items() if k.startswith("elasticmoe_busy_device_seconds_total"))
            self.assertGreater(busy_s, 0)
            self.assertGreater(device_s, busy_s)
            self.assertTrue(any(k.startswith("elasticmoe_joules_per_token") for k in cost))
            shown = subprocess.run([BINARY, "status", "--url", f"http://127.0.0.1:{server.port}"], capture_output=True, text=True)
            self.assertEqual(0, shown.returncode)
            self.assertIn("autoscale slo, 1 to 2 devices", shown.stdout)

    def test_steps_are_counted_by_their_rows(self):
        with Server(devices=1) as server:
            server.complete("Once upon a time", max_tokens=20)
            steps = metrics(server, "vllm:iteration_tokens_total")
            count = next(v for k, v in steps.items() if "_count" in k)
            rows = next(v for k, v in steps.items() if "_sum" in k)
            whole = next(v for k, v in steps.items() if 'le="+Inf"' in k)
            self.assertEqual(count, whole)
            self.assertGreaterEqual(count, 20)
            self.assertGreaterEqual(rows, count)

    def test_a_command_holds_the_size_until_it_is_released(self):
        with Server(devices=2, flags=[*self.slo, "--autoscale-hold", "0"]) as server:
            status, _ = server.post("/v1/scale", {"devices": 2})
            self.assertEqual(202, status)
            await_that(lambda: get(server, "/v1/autoscale")["held_by"] == "a command")
            await_that(lambda: get(server, "/v1/autoscale")["last"]["code"] == "manual")
            self.assertEqual(2, get(server, "/v1/autoscale")["devices"])
            status, state = server.post("/v1/autoscale", {"hold": False})
            self.assertEqual((200, None), (status, state["held_by"]))
            await_that(lambda: get(server, "/v1/autoscale")["devices"] == 1)

    def test_observing_changes_nothing(self):
        with Server(devices=2, flags=[*self.slo, "--autoscale-observe"]) as server:
            wanted = await_that(lambda: [d for d in get(server, "/v1/autoscale")["decisions"] if d["to"] == 1])
            self.assertFalse(wanted[0]["applied"])
            self.assertEqual(2, get(server, "/v1/autoscale")["devices"])

    def test_it_sleeps_at_zero_and_the_first_request_wakes_it(self):
        with Server(devices=1, flags=[*self.slo, "--min-devices", "0"]) as server:
            await_that(lambda: get(server, "/v1/autoscale")["devices"] == 0)
            self.assertTrue(get(server, "/v1/cluster")["asleep"])
            self.assertFalse(server.children("worker", device=0))
            self.assertEqual(self.wanted[0], server.complete(PROMPTS[0], max_tokens=TOKENS))
            woken = await_that(lambda: [d for d in get(server, "/v1/autoscale")["decisions"] if d["code"] == "wake"])
            self.assertIn("the first token came after", woken[0]["reason"])

    def test_sleep_by_hand_again_and_again_while_requests_come(self):
        for more in ([], ["--domain-per-device"]):
            with self.subTest(flags=more):
                self.sleeps_while_requests_come(more)

    def sleeps_while_requests_come(self, more):
        with Server(devices=2, flags=["--max-devices", "2", *more]) as server:
            stop = threading.Event()
            slept = []

            def put_to_sleep():
                while not stop.is_set():
                    status, answer = server.post("/v1/scale", {"devices": 0})
                    slept.append(status)
                    assert status in (202, 409), answer
                    time.sleep(0.002)

            sleeper = threading.Thread(target=put_to_sleep)
            sleeper.start()
            try:
                for prompt in range(15):
                    self.assertEqual(self.wanted[prompt], server.complete(PROMPTS[prompt], max_tokens=TOKENS))
            finally:
                stop.set()
                sleeper.join()
            self.assertIn(202, slept)

    def test_a_server_that_sleeps_survives_its_memory_daemon_and_its_standby(self):
        with Server(devices=1) as server:
            server.post("/v1/scale", {"devices": 0})
            await_that(lambda: get(server, "/v1/cluster")["asleep"])
            for kind in ("hmm", "worker"):
                for pid in server.children(kind):
                    subprocess.run(["kill", "-9", str(pid)], check=True)
            self.assertEqual(self.wanted[0], server.complete(PROMPTS[0], max_tokens=TOKENS))

    def test_hot_experts_change_places_without_a_change_of_tokens(self):
        with Server(devices=2, flags=["--max-devices", "2"]) as server:
            self.assertEqual(self.wanted, in_parallel(server))
            before = get(server, "/v1/cluster")
            status, operation = server.post("/v1/rebalance", {})
            self.assertEqual(202, status)
            outlook = operation["imbalance"]
            self.assertGreater(outlook["moves"], 0)
            self.assertLess(outlook["planned"], outlook["before"])
            await_that(lambda: get(server, "/v1/scale/" + operation["id"])["state"] == "done")
            after = get(server, "/v1/cluster")
            self.assertNotEqual(before["experts"], after["experts"])
            self.assertEqual(sorted(d["experts"] for d in before["devices"]), sorted(d["experts"] for d in after["devices"]))
            self.assertEqual(self.wanted, in_parallel(server))
            # The same load again: its rows fall as they were planned to.
            self.assertLess(get(server, "/v1/cluster")["expert_imbalance"], outlook["before"])

    def test_bad_input_is_named(self):
        for flags, words in ((["--autoscale", "sometimes"], "--autoscale"), (["--slo-attainment", "7"], "--slo-attainment"),
                             (["--autoscale", "slo", "--min-devices", "3", "--max-devices", "2"], "--min-devices: 3 is above")):
            run = subprocess.run([BINARY, "serve", DEMO, "--devices", "1", "--port", "0", *flags], capture_output=True, text=True)
            self.assertNotEqual(0, run.returncode)
            self.assertIn(words, run.stderr)
        with Server(devices=1, flags=self.slo) as server:
            for body, word in ((b"[]", "object"), ({"hold": 1}, "hold must be"), ({"size": 3}, "size is unknown")):
                status, answer = server.post("/v1/autoscale", body)
                self.assertEqual(400, status)
                self.assertIn(word, answer["error"]["message"])
            self.assertEqual(400, server.post("/v1/rebalance", b"[]")[0])

    def test_without_a_policy_it_says_off(self):
        with Server(devices=1) as server:
            self.assertEqual({"policy": "off"}, get(server, "/v1/autoscale"))


class Bench(unittest.TestCase):
    def test_a_trace_is_replayed_by_two_ways(self):
        with tempfile.TemporaryDirectory() as directory:
            page = pathlib.Path(directory) / "report.html"
            run = subprocess.run([BINARY, "bench", "autoscale", "--model", DEMO, "--trace", str(ROOT / "scenarios/traces/bursts.csv"),
                                  "--speed", "20", "--duration", "3", "--requests", "0.5", "--slo-ttft", "1000", "--slo-tpot", "100",
                                  "--runs", "static-min,slo+elastic", "--json", "--html", str(page)], capture_output=True, text=True)
            self.assertEqual(0, run.returncode, run.stderr)
            rows = json.loads(run.stdout)["rows"]
            self.assertEqual(["static-min", "slo+elastic"], [row["name"] for row in rows])
            for row in rows:
                self.assertEqual(row["requests"], row["completed"])
                self.assertGreater(row["device_seconds"], 0)
                self.assertGreater(row["joules"], 0)
            text = page.read_text()
            self.assertEqual(12, text.count("<svg"))
            self.assertNotIn("http", text.replace("http-equiv", ""))

    def test_bad_input_is_named(self):
        with tempfile.TemporaryDirectory() as directory:
            trace = pathlib.Path(directory) / "trace.csv"
            trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,1,1\n1,x,1\n")
            run = subprocess.run([BINARY, "bench", "autoscale", "--model", DEMO, "--trace", str(trace)], capture_output=True, text=True)
            self.assertNotEqual(0, run.returncode)
            self.assertIn("line 3: ContextTokens='x'", run.stderr)


if __name__ == "__main__":
    unittest.main()
