#!/usr/bin/env python3
"""rdata.py BASE OUT: writes each character vector of an R lazy-load database (BASE.rdx, BASE.rdb) to OUT/NAME.txt.

R's serialisation, XDR form, as in "R Internals", section 1.8; only what such databases hold."""
import bz2
import lzma
import pathlib
import struct
import sys
import zlib

NIL, GLOBAL, REFERENCE = 254, 253, 255
SYMBOL, PAIRLIST, LANGUAGE, CHAR, ENVIRONMENT = 1, 2, 6, 9, 4
LOGICAL, INTEGER, REAL, STRING, LIST, EXPRESSION, ALTREP = 10, 13, 14, 16, 19, 20, 238
HAS_ATTRIBUTES, HAS_TAG = 0x200, 0x400


class Reader:
    def __init__(self, data):
        assert data[:2] == b"X\n", "not an XDR serialisation"
        self.data, self.at, self.references = data, 2, []
        version = self.integer()
        self.at += 8  # versions of R that wrote it and that can read it
        if version == 3:
            length = self.integer()
            self.at += length  # name of the native encoding

    def integer(self):
        value = struct.unpack_from(">i", self.data, self.at)[0]
        self.at += 4
        return value

    def array(self, code, size):
        count = self.integer()
        values = list(struct.unpack_from(f">{count}{code}", self.data, self.at))
        self.at += count * size
        return values

    def pairs(self, flags):
        """A pairlist: [(tag, value), ...]."""
        result = []
        while True:
            if flags & HAS_ATTRIBUTES:
                self.item()
            tag = self.item() if flags & HAS_TAG else None
            result.append((tag, self.item()))
            flags = self.integer()
            if flags & 255 == NIL:
                return result
            if flags & 255 not in (PAIRLIST, LANGUAGE):
                self.at -= 4
                result.append((None, self.item()))
                return result

    def item(self):
        flags = self.integer()
        kind = flags & 255
        if kind in (NIL, GLOBAL, 242, 241, 252, 251):
            return None
        if kind == REFERENCE:
            return self.references[(flags >> 8 or self.integer()) - 1]
        if kind == SYMBOL:
            self.references.append(self.item())
            return self.references[-1]
        if kind == CHAR:
            count = self.integer()
            if count == -1:
                return None
            self.at += count
            return self.data[self.at - count:self.at].decode("utf8", "replace")
        if kind in (PAIRLIST, LANGUAGE):
            return self.pairs(flags)
        if kind == ALTREP:
            _, state, _ = self.item(), self.item(), self.item()
            return state
        if kind == ENVIRONMENT:
            self.integer()
            self.references.append("environment")
            for _ in range(4):
                self.item()
            return "environment"
        if kind in (INTEGER, LOGICAL):
            value = self.array("i", 4)
        elif kind == REAL:
            value = self.array("d", 8)
        elif kind in (STRING, LIST, EXPRESSION):
            value = [self.item() for _ in range(self.integer())]
        else:
            raise ValueError(f"R object type {kind} at byte {self.at}")
        if flags & HAS_ATTRIBUTES:
            names = [v for tag, v in self.item() or [] if tag == "names"]
            if names:
                return list(zip(names[0], value))
        return value


def inflate(chunk):
    kind = chunk[4:5]  # after four bytes of length
    if kind == b"2":
        return bz2.decompress(chunk[5:])
    if kind == b"Z":
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}]).decompress(chunk[5:])
    return zlib.decompress(chunk[4:])


def main(base, out):
    index = dict(Reader(zlib.decompress(pathlib.Path(base + ".rdx").read_bytes(), 47)).item())
    database = pathlib.Path(base + ".rdb").read_bytes()
    for name, (offset, length) in index["variables"]:
        lines = Reader(inflate(database[offset:offset + length])).item()
        pathlib.Path(out, name + ".txt").write_text("\n".join(line or "" for line in lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
