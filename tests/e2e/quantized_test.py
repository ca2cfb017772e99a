"""Checkpoints of 4-bit integers (GPTQ, AWQ, compressed-tensors), made here of the bundled model's experts, answer as the bf16
checkpoint of the values that they stand for."""
import array
import json
import math
import pathlib
import shutil
import struct
import subprocess
import tempfile
import unittest

from server import BINARY, DEMO, Server

PROMPTS = ["It is a truth universally acknowledged, that", "And it came to pass in those days, that"]
GROUP = 64


def read_tensors(path):
    data = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"], data[8 + size + entry["data_offsets"][0]:8 + size + entry["data_offsets"][1]])
            for name, entry in header.items()}


def write_tensors(path, tensors):
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def floats(bf16):
    halves = array.array("H", bf16)
    return array.array("f", array.array("I", [half << 16 for half in halves]).tobytes())


def bf16(values):  # of values that are bf16 numbers
    return array.array("H", [bits >> 16 for bits in array.array("I", array.array("f", values).tobytes())]).tobytes()


def f16(values):
    return struct.pack(f"<{len(values)}e", *values)


class Matrix:
    """[n, k] as numbers of 4 bits with a zero and a factor for each row and group. Factors have few bits, so that every value is a
    bf16 number."""

    def __init__(self, shape, values):
        self.n, self.k = shape
        self.groups = self.k // GROUP
        self.q, self.zero, self.factor = [], [], []
        for row in range(self.n):
            for group in range(self.groups):
                at = row * self.k + group * GROUP
                part = values[at:at + GROUP]
                low, high = min(min(part), 0.0), max(max(part), 0.0)
                mantissa, exponent = math.frexp((high - low) / 15 or 1.0)
                factor = math.ldexp(math.ceil(mantissa * 16) / 16, exponent)
                zero = round(-low / factor)
                self.zero.append(zero)
                self.factor.append(factor)
                self.q.extend([min(15, max(0, round(value / factor) + zero)) for value in part])

    def values(self):
        return [(q - self.zero[i // GROUP]) * self.factor[i // GROUP] for i, q in enumerate(self.q)]


def turned(values, rows, columns):
    return [values[row * columns + column] for column in range(columns) for row in range(rows)]


def words(numbers, place=range(8)):
    """Eight numbers a word, that of number i in place[i]."""
    shifts = [4 * at for at in place]
    return array.array("I", [sum(n << s for n, s in zip(numbers[i:i + 8], shifts)) for i in range(0, len(numbers), 8)]).tobytes()


def gptq(m):
    down = [m.q[row * m.k + at + i] for at in range(0, m.k, 8) for row in range(m.n) for i in range(8)]
    return {"qweight": ("I32", [m.k // 8, m.n], words(down)),
            "qzeros": ("I32", [m.groups, m.n // 8], words([(zero - 1) % 16 for zero in turned(m.zero, m.n, m.groups)])),
            "scales": ("F16", [m.groups, m.n], f16(turned(m.factor, m.n, m.groups))),
            "g_idx": ("I32", [m.k], array.array("i", [i // GROUP for i in range(m.k)]).tobytes())}


def awq(m):
    place = [0, 4, 1, 5, 2, 6, 3, 7]
    return {"qweight": ("I32", [m.k, m.n // 8], words(turned(m.q, m.n, m.k), place)),
            "qzeros": ("I32", [m.groups, m.n // 8], words(turned(m.zero, m.n, m.groups), place)),
            "scales": ("F16", [m.groups, m.n], f16(turned(m.factor, m.n, m.groups)))}


def compressed(m):
    down = [m.zero[(at + i) * m.groups + group] for at in range(0, m.n, 8) for group in range(m.groups) for i in range(8)]
    return {"weight_packed": ("I32", [m.n, m.k // 8], words(m.q)),
            "weight_scale": ("BF16", [m.n, m.groups], bf16(m.factor)),
            "weight_zero_point": ("I32", [m.n // 8, m.groups], words(down)),
            "weight_shape": ("I64", [2], struct.pack("<qq", m.n, m.k))}


FORMS = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "compressed-tensors": (compressed, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP,
                                                        "symmetric": False}}}}),
}


class Quantized(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = tempfile.TemporaryDirectory()
        tensors = read_tensors(pathlib.Path(DEMO) / "model.safetensors")
        matrices = {name: Matrix(shape, floats(data)) for name, (_, shape, data) in tensors.items() if ".experts." in name}
        # GPTQ's zeros are stored less one: one that is 0 cannot be.
        for matrix in matrices.values():
            for at, zero in enumerate(matrix.zero):
                if zero == 0:
                    matrix.zero[at] = 1
                    row, group = divmod(at, matrix.groups)
                    for i in range(row * matrix.k + group * GROUP, row * matrix.k + (group + 1) * GROUP):
                        matrix.q[i] = min(15, matrix.q[i] + 1)
        plain = dict(tensors)
        for name, matrix in matrices.items():
            plain[name] = ("BF16", [matrix.n, matrix.k], bf16(matrix.values()))
        cls.plain = cls.write("plain", plain, None)
        cls.models = {}
        for form, (pack, config) in FORMS.items():
            packed = {name: tensor for name, tensor in tensors.items() if name not in matrices}
            for name, matrix in matrices.items():
                packed.update({name.removesuffix("weight") + part: tensor for part, tensor in pack(matrix).items()})
            cls.models[form] = cls.write(form, packed, config)

    @classmethod
    def tearDownClass(cls):
        cls.scratch.cleanup()

    @classmethod
    def write(cls, name, tensors, quantization):
        path = pathlib.Path(cls.scratch.name) / name
        shutil.copytree(DEMO, path, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((path / "config.json").read_text())
        if quantization:
            config["quantization_config"] = quantization
        (path / "config.json").write_text(json.dumps(config))
        write_tensors(path / "model.safetensors", tensors)
        return str(path)

    def answers(self, model):
        with Server(model=model, devices=2) as server:
            texts = [server.complete(prompt) for prompt in PROMPTS]
            self.assertEqual(202, server.post("/v1/scale", {"devices": 3})[0])
            return texts + [server.complete(prompt) for prompt in PROMPTS]

    def test_tokens_are_those_of_the_values(self):
        want = self.answers(self.plain)
        self.assertNotEqual(want, self.answers(DEMO))
        for form, model in self.models.items():
            with self.subTest(form):
                self.assertEqual(want, self.answers(model))

    def test_inspect_knows_the_form(self):
        for form, model in self.models.items():
            done = subprocess.run([BINARY, "inspect", model, "--json"], capture_output=True, text=True)
            self.assertEqual(0, done.returncode, done.stderr)
            report = json.loads(done.stdout)
            self.assertIn("u4", report["dtypes"], form)
            self.assertEqual([], report["unused_tensors"], form)

    def test_a_checkpoint_without_zeros_is_refused_by_name(self):
        path = pathlib.Path(self.models["gptq"])
        tensors = read_tensors(path / "model.safetensors")
        name = next(name for name in tensors if name.endswith(".qzeros"))
        del tensors[name]
        spoilt = self.write("spoilt", tensors, FORMS["gptq"][1])
        done = subprocess.run([BINARY, "inspect", spoilt], capture_output=True, text=True)
        self.assertEqual(1, done.returncode)
        self.assertIn(name, done.stderr)


if __name__ == "__main__":
    unittest.main()
