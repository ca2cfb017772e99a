"""kill -9 of anything: the requests go on with the same tokens, and nothing is left behind."""
import os
import pathlib
import shutil
import signal
import tempfile
import threading
import time
import unittest

from server import DEMO, Server, free_port

PROMPTS = [f"In the beginning of year {i}, the" for i in range(12)]


def shared_memory_left():
    return sorted(p.name for p in pathlib.Path("/dev/shm").iterdir() if "elasticmoe" in p.name)


def gone(pid, seconds=20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


class Failures(unittest.TestCase):
    tokens = 300

    def under_load(self, server, harm):
        """Runs PROMPTS at once, does harm meanwhile, and gives the results."""
        results = [None] * len(PROMPTS)

        def run(i):
            results[i] = server.complete(PROMPTS[i], max_tokens=self.tokens)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(PROMPTS))]
        for t in threads:
            t.start()
        time.sleep(0.05)
        harm()
        for t in threads:
            t.join()
        return results

    def await_line(self, server, text):
        deadline = time.monotonic() + 20
        while not any(text in line for line in server.lines):
            self.assertLess(time.monotonic(), deadline, "".join(server.lines))
            time.sleep(0.02)

    @classmethod
    def setUpClass(cls):
        with Server(devices=2) as server:
            cls.wanted = [server.complete(p, max_tokens=cls.tokens) for p in PROMPTS]

    def test_killed_workers_change_nothing(self):
        with Server(devices=2) as server:
            def kill_both():
                for device in (0, 1, 0):
                    for pid in server.children("worker", device):
                        os.kill(pid, signal.SIGKILL)
                    time.sleep(0.05)

            self.assertEqual(self.wanted, self.under_load(server, kill_both))
            metrics = server.request("GET", "/metrics")[1].decode()
            line = next(l for l in metrics.splitlines() if l.startswith("elasticmoe_recoveries_total"))
            self.assertGreaterEqual(float(line.split()[-1]), 1)
            server.stop()
        self.assertEqual([], shared_memory_left())

    def test_a_killed_hmm_is_replaced_and_sequences_resume_from_their_tokens(self):
        with Server(devices=2) as server:
            def kill():
                os.kill(server.children("hmm")[0], signal.SIGKILL)

            self.assertEqual(self.wanted, self.under_load(server, kill))
            self.await_line(server, "has taken over")
            self.assertEqual(1, len(server.children("hmm")))
            self.assertEqual(self.wanted[0], server.complete(PROMPTS[0], max_tokens=self.tokens))

    def test_an_hmm_whose_next_is_killed_at_its_start_too(self):
        with Server(devices=2) as server:
            def kill():
                killed = server.children("hmm")[0]
                os.kill(killed, signal.SIGKILL)
                deadline = time.monotonic() + 10
                while not (new := [pid for pid in server.children("hmm") if pid != killed]) and time.monotonic() < deadline:
                    time.sleep(0.0005)
                os.kill(new[0], signal.SIGKILL)

            self.assertEqual(self.wanted, self.under_load(server, kill))
            self.assertEqual(self.wanted[0], server.complete(PROMPTS[0], max_tokens=self.tokens))

    def test_an_hmm_and_a_worker_killed_together(self):
        with Server(devices=2) as server:
            def kill():
                os.kill(server.children("hmm")[0], signal.SIGKILL)
                deadline = time.monotonic() + 10
                while not server.children("hmm") and time.monotonic() < deadline:
                    time.sleep(0.0005)
                for _ in range(4):  # before, while and after the next one takes over
                    for pid in server.children("worker", 1):
                        os.kill(pid, signal.SIGKILL)
                    time.sleep(0.02)

            self.assertEqual(self.wanted, self.under_load(server, kill))
            self.await_line(server, "has taken over")
            self.assertEqual(self.wanted[0], server.complete(PROMPTS[0], max_tokens=self.tokens))

    def test_an_hmm_that_cannot_load_the_weights_again_is_tried_again_while_requests_go_on(self):
        with tempfile.TemporaryDirectory() as folder:
            model = pathlib.Path(folder, "model")
            shutil.copytree(DEMO, model)
            with Server(model=str(model), devices=2) as server:
                def kill():
                    model.rename(model.with_name("away"))
                    os.kill(server.children("hmm")[0], signal.SIGKILL)
                    self.await_line(server, "it is tried again in")

                self.assertEqual(self.wanted, self.under_load(server, kill))
                self.assertEqual(self.wanted[0], server.complete(PROMPTS[0], max_tokens=self.tokens))
                for pid in server.children("worker", 0):  # the memory that its next one attaches to is there still
                    os.kill(pid, signal.SIGKILL)
                self.assertEqual(self.wanted[1], server.complete(PROMPTS[1], max_tokens=self.tokens))
                model.with_name("away").rename(model)
                self.await_line(server, "has taken over")
                self.assertEqual(self.wanted[2], server.complete(PROMPTS[2], max_tokens=self.tokens))

    def test_a_killed_coordinator_finds_its_memory_again(self):
        port = free_port()
        server = Server(devices=2, port=port)
        hmm = server.children("hmm")[0]
        workers = server.children("worker")
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        self.assertTrue(all(gone(pid) for pid in workers))
        with Server(devices=2, port=port) as again:
            self.assertEqual([], again.children("hmm"))  # adopted, not started
            self.assertFalse(gone(hmm, 0))
            self.assertEqual(self.wanted[0], again.complete(PROMPTS[0], max_tokens=self.tokens))
            again.stop()
        self.assertTrue(gone(hmm))

    def test_an_abandoned_hmm_gives_its_memory_back(self):
        for linger in ("1", "0"):
            server = Server(devices=1, flags=["--linger", linger])
            self.assertEqual(4, len(server.complete("In the beginning", max_tokens=4)[0]))
            hmm = server.children("hmm")[0]
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
            self.assertTrue(gone(hmm))


if __name__ == "__main__":
    unittest.main()
