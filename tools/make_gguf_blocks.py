#!/usr/bin/env python3
"""make_gguf_blocks.py LIBGGML_BASE_SO > tests/data/gguf/blocks.json

Random blocks of each GGUF quantisation with the values that ggml itself decodes from them, as hexadecimal bytes and
float32s. The library is in npm's @node-llama-cpp/linux-x64 (bins/linux-x64/libggml-base.so)."""
import ctypes
import json
import random
import struct
import sys

# name in ggml, values and bytes of a block, where its half-precision factors lie
TYPES = [("q4_0", 32, 18, [0]), ("q4_1", 32, 20, [0, 2]), ("q5_0", 32, 22, [0]), ("q5_1", 32, 24, [0, 2]), ("q8_0", 32, 34, [0]),
         ("iq4_nl", 32, 18, [0]), ("mxfp4", 32, 17, []), ("q2_K", 256, 84, [80, 82]), ("q3_K", 256, 110, [108]), ("q4_K", 256, 144, [0, 2]),
         ("q5_K", 256, 176, [0, 2]), ("q6_K", 256, 210, [208]), ("iq4_xs", 256, 136, [0])]


def main():
    library = ctypes.CDLL(sys.argv[1])
    rng = random.Random(7)
    cases = []
    for name, values, size, halves in TYPES:
        decode = getattr(library, f"dequantize_row_{name}")
        decode.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_float), ctypes.c_int64]
        decode.restype = None
        for _ in range(2 if values == 256 else 4):
            block = bytearray(rng.randbytes(size))
            for at in halves:  # random bits could be infinities
                block[at:at + 2] = struct.pack("<e", rng.uniform(-1, 1) * 2 ** rng.randint(-6, 0))
            if name == "mxfp4":
                block[0] = rng.randint(110, 135)
            out = (ctypes.c_float * values)()
            decode(bytes(block), out, values)
            cases.append({"type": name.lower(), "bytes": block.hex(), "values": struct.pack(f"<{values}f", *out).hex()})
    json.dump(cases, sys.stdout, indent=0)
    print()


main()
