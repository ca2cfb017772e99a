"""Growing and shrinking under load: nothing refused, nothing changed, nothing left behind."""
import os
import pathlib
import random
import re
import signal
import threading
import time
import unittest

from server import Server

PROMPTS = [f"And it came to pass in the year {i}, that" for i in range(12)]
TOKENS = 400


def await_scale(server, devices, **fields):
    status, answer = server.post("/v1/scale", {"devices": devices, **fields})
    assert status == 202, answer
    return await_operation(server, answer, 60)


def await_operation(server, answer, seconds):
    deadline = time.monotonic() + seconds
    while answer["state"] not in ("done", "aborted"):
        assert time.monotonic() < deadline, (answer, server.lines[-60:])
        time.sleep(0.005)
        answer = server_json(server, "/v1/scale/" + answer["id"])
    return answer


def server_json(server, path):
    import json
    return json.loads(server.request("GET", path)[1])


def await_kv_blocks(server, condition):
    """KV memory follows a resize in the background."""
    deadline = time.monotonic() + 20
    while not condition(blocks := server_json(server, "/v1/cluster")["kv_blocks"]):
        assert time.monotonic() < deadline, blocks
        time.sleep(0.02)
    return blocks


def preemptions(server):
    return re.search(rb"^vllm:num_preemptions_total\S* (\S+)", server.request("GET", "/metrics")[1], re.M).group(1)


def descriptors_and_mappings(pid):
    return len(os.listdir(f"/proc/{pid}/fd")), len(pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines())


class Resize(unittest.TestCase):
    FLAGS = []

    @classmethod
    def setUpClass(cls):
        with Server(devices=2) as server:
            cls.wanted = [server.complete(p, max_tokens=TOKENS) for p in PROMPTS]

    def under_load(self, server, harm):
        results = [None] * len(PROMPTS)

        def run(i):
            results[i] = server.complete(PROMPTS[i], max_tokens=TOKENS)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(PROMPTS))]
        for t in threads:
            t.start()
        time.sleep(0.05)
        outcome = harm()
        for t in threads:
            t.join()
        self.assertEqual(self.wanted, results)
        return outcome

    def test_grows_and_shrinks_under_load_with_the_same_tokens(self):
        with Server(devices=1, flags=["--max-devices", "6", *self.FLAGS]) as server:
            def scale():
                return [await_scale(server, n) for n in (2, 4, 3, 1)]

            for answer in self.under_load(server, scale):
                self.assertEqual("done", answer["state"], answer)
                self.assertEqual(0, answer["report"]["refused"] + answer["report"]["failed"])
            self.assertTrue(any("of step" in line for line in server.lines), "no step took a placement on its way")
            cluster = server_json(server, "/v1/cluster")
            self.assertEqual([0], [d["device"] for d in cluster["devices"] if d["member"]])
            self.assertEqual(b"0", preemptions(server))  # handed over, nothing computed twice

    def test_many_resizes_in_a_row_change_no_token(self):
        # Random sizes while everybody is always served: commits meet steps in every state.
        with Server(devices=1, flags=["--max-devices", "4", *self.FLAGS]) as server:
            wrong, over = [], threading.Event()

            def run(i):
                while not over.is_set():
                    if server.complete(PROMPTS[i], max_tokens=TOKENS) != self.wanted[i]:
                        wrong.append(i)

            threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
            for t in threads:
                t.start()
            rng = random.Random(11)
            for _ in range(30):
                await_scale(server, rng.randrange(1, 5))
            over.set()
            for t in threads:
                t.join()
            self.assertEqual([], wrong)

    def test_kv_memory_comes_and_goes_with_the_devices(self):
        with Server(devices=1, flags=["--max-devices", "4", *self.FLAGS]) as server:
            one = await_kv_blocks(server, lambda blocks: blocks > 0)

            def there_and_back():
                await_scale(server, 3)
                await_kv_blocks(server, lambda blocks: blocks == 3 * one)
                await_scale(server, 1)
                await_kv_blocks(server, lambda blocks: blocks == one)

            self.under_load(server, there_and_back)
            self.assertEqual(b"0", preemptions(server))

    def test_within_a_budget_kv_takes_what_the_experts_leave(self):
        flags = ["--max-devices", "4", "--device-memory", "96MiB", "--kv-memory", "16MiB", *self.FLAGS]
        with Server(devices=1, flags=flags) as server:
            one = await_kv_blocks(server, lambda blocks: blocks > 0)

            def there_and_back():
                await_scale(server, 2)
                await_kv_blocks(server, lambda blocks: blocks > 2 * one)
                await_scale(server, 1)
                await_kv_blocks(server, lambda blocks: blocks == one)

            self.under_load(server, there_and_back)

    def test_a_worker_killed_in_the_middle_of_a_resize_changes_nothing(self):
        with Server(devices=2, flags=["--max-devices", "6", *self.FLAGS]) as server:
            def scale_and_kill():
                def kill():
                    for device in (0, 2, 1, 3):
                        for pid in server.children("worker", device):
                            os.kill(pid, signal.SIGKILL)
                        time.sleep(0.03)

                killer = threading.Thread(target=kill)
                killer.start()
                answers = [await_scale(server, 4), await_scale(server, 1)]
                killer.join()
                return answers

            for answer in self.under_load(server, scale_and_kill):
                self.assertIn(answer["state"], ("done", "aborted"))

    def test_a_new_worker_killed_between_its_answer_and_the_commit_is_replaced(self):
        with Server(devices=1, flags=["--max-devices", "2", *self.FLAGS]) as server:
            def scale_and_kill():
                # The stage is prepared when all have answered: the first is held up, the second has answered and dies.
                first = server.children("worker", 0)[0]
                os.kill(first, signal.SIGSTOP)
                _, answer = server.post("/v1/scale", {"devices": 2})
                try:
                    deadline = time.monotonic() + 20
                    while not (joined := server.children("worker", 1)):
                        self.assertLess(time.monotonic(), deadline)
                        time.sleep(0.01)
                    time.sleep(0.5)
                    os.kill(joined[0], signal.SIGKILL)
                    time.sleep(0.3)
                finally:
                    os.kill(first, signal.SIGCONT)
                return await_operation(server, answer, 30)

            self.assertEqual("done", self.under_load(server, scale_and_kill)["state"])
            self.assertFalse([line for line in server.lines if "did not finish step" in line])

    def test_the_hmm_killed_in_the_middle_of_a_resize_changes_nothing(self):
        with Server(devices=2, flags=["--max-devices", "6", *self.FLAGS]) as server:
            def scale_and_kill(after):
                def kill():
                    time.sleep(after)
                    os.kill(server.children("hmm")[0], signal.SIGKILL)

                killer = threading.Thread(target=kill)
                killer.start()
                answers = [await_scale(server, 4), await_scale(server, 1)]
                killer.join()
                return answers

            # Before the first commit, about it, while sequences move, after all.
            for after in (0.005, 0.015, 0.03, 0.1):
                for answer in self.under_load(server, lambda: scale_and_kill(after)):
                    self.assertIn(answer["state"], ("done", "aborted"))
                self.assertEqual("done", await_scale(server, 2)["state"])
            self.assertEqual(self.wanted[0], server.complete(PROMPTS[0], max_tokens=TOKENS))

    def test_the_hmm_killed_at_the_very_moment_of_a_command(self):
        # Its socket refuses before the coordinator has seen its end: no reason to give the resize up.
        with Server(devices=2, flags=["--max-devices", "4", *self.FLAGS]) as server:
            for devices in (1, 3, 2, 4, 1, 2):
                deadline = time.monotonic() + 20
                while not (hmm := server.children("hmm")):  # the one killed before is being replaced
                    self.assertLess(time.monotonic(), deadline)
                    time.sleep(0.005)
                os.kill(hmm[0], signal.SIGKILL)
                answer = await_scale(server, devices)
                self.assertEqual("done", answer["state"], (answer, server.lines[-40:]))
            self.assertEqual(self.wanted[0], server.complete(PROMPTS[0], max_tokens=TOKENS))

    def test_a_restarted_coordinator_goes_on_at_the_size_it_had(self):
        flags = ["--max-devices", "4", *self.FLAGS]
        with Server(devices=1, flags=flags) as server:
            self.assertEqual("done", await_scale(server, 3)["state"])
            hmm = server.children("hmm")[0]
            server.process.kill()
            server.process.wait()
            with Server(devices=1, port=server.port, flags=flags) as again:
                cluster = server_json(again, "/v1/cluster")
                self.assertEqual([0, 1, 2], [d["device"] for d in cluster["devices"] if d["member"]])
                self.assertEqual(self.wanted[1], again.complete(PROMPTS[1], max_tokens=TOKENS))
                self.assertEqual("done", await_scale(again, 1)["state"])
                self.assertEqual(self.wanted[2], again.complete(PROMPTS[2], max_tokens=TOKENS))
                os.kill(hmm, 0)  # the same daemon all the while

    def test_the_baselines_that_lose_nothing(self):
        with Server(devices=1, flags=["--max-devices", "4", *self.FLAGS]) as server:
            def scale():
                return [await_scale(server, n, strategy=s)
                        for s, n in (("extravagant", 2), ("colocated", 1), ("horizontal", 2), ("horizontal", 1), ("elastic", 2))]

            for answer in self.under_load(server, scale):
                self.assertEqual("done", answer["state"], answer)
                self.assertEqual(0, answer["report"]["refused"] + answer["report"]["failed"])
            self.assertEqual(1, len(server.children("hmm")))
            self.assertEqual(self.wanted[3], server.complete(PROMPTS[3], max_tokens=TOKENS))

    def test_a_cold_restart_ends_what_runs_and_serves_again(self):
        with Server(devices=1, flags=["--max-devices", "4", *self.FLAGS]) as server:
            answers = []
            body = {"model": "demo", "prompt": PROMPTS[0], "max_tokens": 900, "ignore_eos": True}
            thread = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
            thread.start()
            time.sleep(0.1)
            _, answer = server.post("/v1/scale", {"devices": 2, "strategy": "cold-restart"})
            health = set()
            while server_json(server, "/v1/scale/" + answer["id"])["state"] not in ("done", "aborted"):
                health.add(server.request("GET", "/health")[0])
            answer = await_operation(server, answer, 60)
            thread.join()
            self.assertIn(503, health)
            self.assertTrue(server.healthy())
            self.assertEqual("done", answer["state"], answer)
            self.assertGreaterEqual(answers[0][0], 500)
            self.assertEqual(1, answer["report"]["failed"])
            # Nobody asked for anything until the end: the first token after it is the first capacity.
            self.assertIsNone(answer["report"]["first_capacity_ms"])
            self.assertEqual(self.wanted[3], server.complete(PROMPTS[3], max_tokens=TOKENS))

            answer = server_json(server, "/v1/scale/" + answer["id"])
            self.assertGreater(answer["report"]["first_capacity_ms"], answer["report"]["scaling_latency_ms"])

    def test_the_papers_drain_finishes_who_runs_before_it_switches(self):
        with Server(devices=1, flags=["--max-devices", "4", *self.FLAGS]) as server:
            for answer in self.under_load(server, lambda: [await_scale(server, n, strategy="drain") for n in (3, 1)]):
                self.assertEqual("done", answer["state"], answer)

    def test_what_cannot_be_done_is_refused_and_changes_nothing(self):
        with Server(devices=2, flags=["--max-devices", "4"]) as server:
            before = server_json(server, "/v1/cluster")
            for body, status, word in [({"devices": -1}, 400, "devices"), ({"devices": 0, "strategy": "drain"}, 400, "target=0"),
                                       ({"devices": 9}, 400, "max-devices=4"), ({"devices": "x"}, 400, "devices"),
                                       ({}, 400, "devices"), ({"devices": 1, "remove": [7]}, 400, "7"),
                                       ({"devices": 3, "strategy": "magic"}, 400, "magic"),
                                       ({"devices": 3, "strategy": "horizontal"}, 400, "multiple")]:
                got, answer = server.post("/v1/scale", body)
                self.assertEqual(status, got, answer)
                self.assertIn(word, answer["error"]["message"])
            self.assertEqual(404, server.request("GET", "/v1/scale/unknown")[0])
            self.assertEqual(before["epoch"], server_json(server, "/v1/cluster")["epoch"])

    def test_one_operation_id_is_one_operation(self):
        with Server(devices=1) as server:
            first = await_scale(server, 2, operation_id="once")
            again = await_scale(server, 2, operation_id="once")
            self.assertEqual(first["report"]["scaling_latency_ms"], again["report"]["scaling_latency_ms"])
            for other in ({"devices": 2, "strategy": "cold-restart"}, {"devices": 1}):
                status, answer = server.post("/v1/scale", {"operation_id": "once", **other})
                self.assertEqual(409, status, answer)
                self.assertIn("another target", answer["error"]["message"])

    def test_of_two_commands_at_once_one_is_carried_out(self):
        # Whichever is first takes longer than the other needs to be heard; vLLM's route answers on another thread.
        with Server(devices=1, flags=["--max-devices", "4", "--domain-per-device", "--copy-rate", "10MiB"]) as server:
            for _ in range(10):
                statuses, ready = [], threading.Barrier(2)

                def command(i):
                    ready.wait()
                    statuses.append(server.post("/scale_elastic_ep", {"new_data_parallel_size": 2})[0] if i % 2 else
                                    server.post("/v1/scale", {"devices": 2, "strategy": "extravagant"})[0])

                threads = [threading.Thread(target=command, args=(i,)) for i in range(2)]
                for t in threads:
                    t.start()
                for t in threads:
                    t.join()
                self.assertEqual(1, sum(status in (200, 202) for status in statuses), statuses)
                while server_json(server, "/v1/cluster")["operation"]:
                    time.sleep(0.01)
                await_scale(server, 1)

    def test_vllms_routes(self):
        with Server(devices=1) as server:
            self.assertEqual((200, {"message": "Scaled to 2 data parallel engines"}), server.post("/scale_elastic_ep", {"new_data_parallel_size": 2}))
            self.assertEqual((200, {"is_scaling_elastic_ep": False}), server.post("/is_scaling_elastic_ep", None))
            self.assertEqual(400, server.post("/scale_elastic_ep", {"new_data_parallel_size": 0})[0])
            self.assertEqual(400, server.post("/scale_elastic_ep", b"{")[0])

    def test_many_cycles_leave_nothing_behind(self):
        with Server(devices=1, flags=["--max-devices", "3", *self.FLAGS]) as server:
            hmm = server.children("hmm")[0]

            def cycle(times):
                for _ in range(times):
                    await_scale(server, 3, remove=[])
                    await_scale(server, 1)
                time.sleep(0.3)
                return descriptors_and_mappings(server.process.pid), descriptors_and_mappings(hmm)

            cycle(3)
            before = cycle(3)
            after = cycle(20)
            for (fds, maps), (fds_after, maps_after) in zip(before, after):
                self.assertLessEqual(fds_after, fds + 2)
                self.assertLessEqual(maps_after, maps + 8)


class ResizeBetweenDomains(Resize):
    FLAGS = ["--domain-per-device"]


class ResizeByRemapping(unittest.TestCase):
    """The paper's vpage-remap instead of pointers: the same tests of what can differ."""
    FLAGS = ["--expert-table", "remap"]
    setUpClass = Resize.__dict__["setUpClass"]
    under_load = Resize.under_load
    test_grows_and_shrinks_under_load_with_the_same_tokens = Resize.test_grows_and_shrinks_under_load_with_the_same_tokens
    test_many_cycles_leave_nothing_behind = Resize.test_many_cycles_leave_nothing_behind


if __name__ == "__main__":
    unittest.main()
