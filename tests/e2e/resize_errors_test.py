"""Resizes that fail, are refused, cancelled or cut: said clearly, and the server answers as it did before."""
import json
import os
import pathlib
import resource
import shutil
import tempfile
import time
import unittest

from server import DEMO, Server

PROMPT = "And it came to pass in those days, that"
TOKENS = 48
# Copies of a grow from one device to two take about two seconds: time to do harm in.
SLOW = ["--max-devices", "4", "--domain-per-device", "--copy-rate", "6MiB"]


def get(server, path):
    status, data = server.request("GET", path)
    return status, json.loads(data)


def start(server, devices, **fields):
    status, answer = server.post("/v1/scale", {"devices": devices, **fields})
    assert status == 202, answer
    return answer


def await_end(server, operation):
    deadline = time.monotonic() + 60
    while True:
        status, answer = get(server, "/v1/scale/" + operation)
        assert status == 200, answer
        if answer["state"] in ("done", "aborted"):
            return answer
        assert time.monotonic() < deadline, answer
        time.sleep(0.01)


def blocks_of_memory(server):
    """What the kernel says that the daemon's memory objects take."""
    fds = pathlib.Path(f"/proc/{server.children('hmm')[0]}/fd")
    return sum(os.stat(fd).st_blocks for fd in fds.iterdir() if os.readlink(fd).startswith("/memfd:"))


def members(server):
    return [d["device"] for d in get(server, "/v1/cluster")[1]["devices"] if d["member"]]


class ResizeErrors(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with Server(devices=1) as server:
            cls.wanted = server.complete(PROMPT, max_tokens=TOKENS)

    def assert_serves(self, server, devices):
        self.assertEqual(devices, members(server))
        self.assertEqual(self.wanted, server.complete(PROMPT, max_tokens=TOKENS))

    def refused(self, answer, status, *words):
        got, body = answer
        self.assertEqual(status, got, body)
        for word in words:
            self.assertIn(word, body["error"]["message"])

    def cancel(self, server, operation):
        status, data = server.request("DELETE", "/v1/scale/" + operation)
        return status, json.loads(data)

    def test_only_what_runs_can_be_cancelled(self):
        with Server(devices=1, flags=["--max-devices", "4"]) as server:
            self.refused(self.cancel(server, "nobody"), 404, "nobody")
            start(server, 2, operation_id="ended")
            self.assertEqual("done", await_end(server, "ended")["state"])
            self.refused(self.cancel(server, "ended"), 409, "ended", "done")
            self.assert_serves(server, [0, 1])

    def test_an_operation_id_has_one_target(self):
        with Server(devices=1, flags=["--max-devices", "4"]) as server:
            start(server, 2, operation_id="once")
            self.assertEqual("done", await_end(server, "once")["state"])
            self.refused(server.post("/v1/scale", {"devices": 3, "operation_id": "once"}), 409, "once")
            self.assert_serves(server, [0, 1])

    def test_a_second_resize_is_told_of_the_first_and_the_first_can_be_cancelled(self):
        with Server(devices=1, flags=SLOW) as server:
            start(server, 2, operation_id="first")
            self.refused(server.post("/v1/scale", {"devices": 3}), 409, "first")
            self.assertEqual(self.wanted, server.complete(PROMPT, max_tokens=TOKENS))
            status, answer = self.cancel(server, "first")
            self.assertEqual(200, status, answer)
            self.assertEqual("aborted", await_end(server, "first")["state"])
            self.assert_serves(server, [0])
            start(server, 2, operation_id="again")
            self.assertEqual("done", await_end(server, "again")["state"])
            self.assert_serves(server, [0, 1])

    def test_a_shrink_that_is_cancelled_leaves_no_copies(self):
        # Else the daemon keeps the memory, for the next time.
        with Server(devices=2, flags=[*SLOW, "--standby", "0"]) as server:
            before = blocks_of_memory(server)
            start(server, 1, operation_id="first")
            time.sleep(0.3)  # experts are on their way
            self.assertEqual(200, self.cancel(server, "first")[0])
            self.assertEqual("aborted", await_end(server, "first")["state"])
            time.sleep(0.2)
            self.assertEqual(before, blocks_of_memory(server))
            self.assert_serves(server, [0, 1])

    def test_a_deadline_that_passes_aborts(self):
        with Server(devices=1, flags=SLOW) as server:
            before = get(server, "/v1/cluster")[1]
            answer = await_end(server, start(server, 2, deadline_s=0.2)["id"])
            self.assertEqual("aborted", answer["state"], answer)
            self.assertIn("deadline", answer["error"])
            self.assert_serves(server, [0])
            self.assertEqual(before["experts"], get(server, "/v1/cluster")[1]["experts"])

    def test_a_shrink_that_does_not_fit_is_refused_with_the_numbers(self):
        flags = ["--max-devices", "4", "--domain-per-device", "--kv-memory", "4MiB", "--device-memory", "18MiB"]
        with Server(devices=4, flags=flags) as server:
            wanted = server.complete(PROMPT, max_tokens=TOKENS)
            self.assertEqual(self.wanted, wanted)
            got, body = server.post("/v1/scale", {"devices": 1})
            self.assertEqual(409, got, body)
            self.assertRegex(body["error"]["message"], r"80 experts of 196608 bytes need 80 slots, .* room for \d+; raise --device-memory")
            self.assert_serves(server, [0, 1, 2, 3])

    def test_the_server_grows_after_its_checkpoint_was_deleted(self):
        with tempfile.TemporaryDirectory() as directory:
            model = os.path.join(directory, "model")
            shutil.copytree(DEMO, model)
            with Server(model=model, devices=1, flags=["--max-devices", "4"]) as server:
                shutil.rmtree(model)
                for devices in (2, 4, 1):
                    answer = await_end(server, start(server, devices)["id"])
                    self.assertEqual("done", answer["state"], answer)
                    self.assert_serves(server, list(range(devices)))

    def test_without_descriptors_a_grow_is_rolled_back_and_works_later(self):
        with Server(devices=1, flags=["--max-devices", "4", "--standby", "0"]) as server:
            pid = server.process.pid
            limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            used = max(int(fd) for fd in os.listdir(f"/proc/{pid}/fd"))
            # One for the connection that asks, which takes the first free number.
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 2, limits[1]))
            answer = await_end(server, start(server, 4)["id"])
            self.assertEqual("aborted", answer["state"], answer)
            self.assertIn("open files", answer["error"])
            self.assert_serves(server, [0])
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            self.assertEqual("done", await_end(server, start(server, 2)["id"])["state"])
            self.assert_serves(server, [0, 1])

    def test_a_coordinator_killed_during_a_resize_comes_back_at_a_size_it_had(self):
        with Server(devices=1, flags=SLOW) as server:
            hmm = server.children("hmm")[0]
            start(server, 2, operation_id="cut")
            time.sleep(0.3)
            self.assertNotIn(get(server, "/v1/scale/cut")[1]["state"], ("done", "aborted"))
            server.process.kill()
            server.process.wait()
            with Server(devices=1, port=server.port, flags=SLOW) as again:
                self.assert_serves(again, [0])
                self.assertTrue(pathlib.Path(f"/proc/{hmm}").exists())  # adopted, not loaded again
                self.assertEqual("done", await_end(again, start(again, 2)["id"])["state"])
                self.assert_serves(again, [0, 1])


if __name__ == "__main__":
    unittest.main()
