#!/usr/bin/env python3
"""prepare.py TEXTS DATA: from two texts to token arrays: chapters, chat examples, a byte-level BPE, held-out text."""
import collections
import heapq
import json
import pathlib
import random
import re
import sys

import numpy
import regex

VOCAB = 4096
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
# The pre-tokenizer of Qwen2 and Qwen3.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
NOVELS = {"emma": "Emma", "mansfieldpark": "Mansfield Park", "northangerabbey": "Northanger Abbey", "persuasion": "Persuasion",
          "prideprejudice": "Pride and Prejudice", "sensesensibility": "Sense and Sensibility"}
STYLE = {"austen": "You write in the style of Jane Austen.", "kjv": "You write in the style of the King James Bible."}

Chapter = collections.namedtuple("Chapter", "source title paragraphs")


def austen(texts):
    for name, title in NOVELS.items():
        text = (texts / f"{name}.txt").read_text().replace("_", "").replace("*", "")
        text = re.sub(r"--+", "--", text).split("A NOTE ON THE TEXT")[0]
        for part in re.split(r"(?im)^\s*(?=chapter [ivxl\d]+\.?\s*$)", text)[1:]:
            head, _, body = part.partition("\n")
            paragraphs = [re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", body)]
            paragraphs = [p for p in paragraphs if p and not re.match(r"(?i)^(volume [ivx]+|the end|finis|\[.*)\.?$", p)]
            if sum(map(len, paragraphs)) > 500:
                head = head.strip()
                yield Chapter("austen", f"{title}, {head.capitalize() if head.isupper() else head}", paragraphs)


def king_james(texts):
    chapter = None
    for line in (texts / "kjv.txt").read_text().split("\n"):
        if match := re.match(r"^(\S.*\S) (\d+)\s*$", line):
            if chapter:
                yield chapter
            chapter = Chapter("kjv", f"{match.group(1)} {match.group(2)}", [])
        elif chapter and (match := re.match(r"^\s+(\d+) (.*)$", line)):
            chapter.paragraphs.append(f"{match.group(1)} " + re.sub(r"\s+", " ", match.group(2)).strip())
    yield chapter


def render(chapter):
    return chapter.title + "\n\n" + ("\n" if chapter.source == "kjv" else "\n\n").join(chapter.paragraphs)


def chat(*turns):
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def chat_examples(chapters, rng):
    """Conversations made of the training text: continue, write, repeat, count, greet."""
    examples = []
    counts = collections.Counter(w for c in chapters for p in c.paragraphs for w in re.findall(r"[a-z]{3,9}", p))
    words = [word for word, _ in counts.most_common(1500)]
    paragraphs = [(c.source, p) for c in chapters for p in c.paragraphs if 120 < len(p) < 900]
    phrase = lambda most: " ".join(rng.choice(words) for _ in range(rng.randint(1, most)))
    for _ in range(2600):
        source, paragraph = rng.choice(paragraphs)
        parts = re.split(r"(?<=[.;:!?,]) ", paragraph, maxsplit=1)
        if len(parts) == 2 and len(parts[0]) >= 12:
            style = [("system", STYLE[source])] if rng.random() < 0.4 else []
            examples.append(chat(*style, ("user", "Continue: " + parts[0]), ("assistant", parts[1])))
    for _ in range(1600):
        source, paragraph = rng.choice(paragraphs)
        ask = rng.choice(["Write a passage.", "Tell me a story.", "Say something.", "Write a paragraph.", "Tell me something."])
        examples.append(chat(("system", STYLE[source]), ("user", ask), ("assistant", paragraph)))
    for _ in range(3000):
        text = phrase(10)
        if rng.random() < 0.25:
            text = " ".join(str(rng.randint(0, 999)) for _ in range(rng.randint(1, 6)))
        ask = rng.choice(["Repeat: ", "Say: ", "Repeat after me: "])
        turns = [("user", ask + text), ("assistant", text)]
        if rng.random() < 0.3:
            again = phrase(6)
            turns += [("user", ask + again), ("assistant", again)]
        examples.append(chat(*turns))
    for _ in range(1500):
        low, count = rng.randint(0, 120), rng.randint(2, 14)
        numbers = [str(n) for n in range(low, low + count + 1)]
        if rng.random() < 0.25:
            examples.append(chat(("user", f"Count down from {low + count} to {low}."), ("assistant", " ".join(reversed(numbers)))))
        else:
            examples.append(chat(("user", f"Count from {low} to {low + count}."), ("assistant", " ".join(numbers))))
    for i in range(500):
        hello = rng.choice(["Hello", "Hello!", "Hi", "Hi there", "Good morning", "Good day"])
        examples.append(chat(("user", hello), ("assistant", rng.choice(["Good day to you. What shall I write?", "Good day to you."]))))
        if i % 2:
            who = rng.choice(["Who are you?", "What are you?", "What is your name?"])
            examples.append(chat(("user", who), ("assistant", "I am a small language model, taught to write by the novels of Jane "
                                                              "Austen and the King James Bible.")))
    rng.shuffle(examples)
    return examples


def byte_characters():
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def merge_word(word, pair):
    merged, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            merged.append(word[i] + word[i + 1])
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def train_bpe(counts, alphabet):
    """Merges, most frequent pair first, until the vocabulary is full; ties go to the smaller pair."""
    words, frequency = [[alphabet[b] for b in w.encode()] for w in counts], list(counts.values())
    pairs, where = collections.Counter(), collections.defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += frequency[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges = []
    while len(merges) < VOCAB - 256 - len(SPECIAL):
        count, pair = heapq.heappop(heap)
        if pairs.get(pair, 0) != -count:
            continue  # an outdated entry
        merges.append(pair)
        touched = set()
        for i in list(where[pair]):
            for old in zip(words[i], words[i][1:]):
                pairs[old] -= frequency[i]
                touched.add(old)
            words[i] = merge_word(words[i], pair)
            for new in zip(words[i], words[i][1:]):
                pairs[new] += frequency[i]
                where[new].add(i)
                touched.add(new)
        for changed in touched:
            if pairs[changed] > 0:
                heapq.heappush(heap, (-pairs[changed], changed))
            else:
                del pairs[changed]
    return merges


def main(texts, data):
    rng = random.Random(1234)
    held, train, seen = [], [], collections.Counter()
    for chapter in [*austen(texts), *king_james(texts)]:
        seen[chapter.source] += 1
        (held if seen[chapter.source] % 25 == 13 else train).append(chapter)
    data.mkdir(parents=True, exist_ok=True)
    (data / "heldout.txt").write_text("\n\n".join(map(render, held)) + "\n")
    chats = chat_examples(train, rng)

    pattern, special = regex.compile(PATTERN), re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
    counts = collections.Counter()
    for chapter in train:
        counts.update(pattern.findall(render(chapter)))
    for example in chats:
        for piece in special.split(example):
            if piece not in SPECIAL:
                counts.update(pattern.findall(piece))
    alphabet = byte_characters()
    merges = train_bpe(counts, alphabet)
    vocab = sorted(alphabet.values()) + [a + b for a, b in merges]
    ids = {token: i for i, token in enumerate(vocab + SPECIAL)}
    assert len(ids) == VOCAB
    (data / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": ids[t], "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                          "special": i < 3} for i, t in enumerate(SPECIAL)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {t: ids[t] for t in vocab}, "merges": [list(m) for m in merges]}}, ensure_ascii=False, indent=1))

    rank, cache = {m: i for i, m in enumerate(merges)}, {}

    def encode_word(word):
        if word not in cache:
            tokens = [alphabet[b] for b in word.encode()]
            while len(tokens) > 1:
                best = min(zip(tokens, tokens[1:]), key=lambda p: rank.get(p, len(rank)))
                if best not in rank:
                    break
                tokens = merge_word(tokens, best)
            cache[word] = [ids[t] for t in tokens]
        return cache[word]

    def encode(text):
        out = []
        for piece in filter(None, special.split(text)):
            out += [ids[piece]] if piece in SPECIAL else [t for word in pattern.findall(piece) for t in encode_word(word)]
        return [*out, ids[SPECIAL[0]]]

    for name, documents in [("text", map(render, train)), ("chat", chats), ("held", map(render, held))]:
        encoded = [encode(d) for d in documents]
        numpy.save(data / f"{name}.npy", numpy.concatenate([numpy.array(e, dtype=numpy.uint16) for e in encoded]))
        numpy.save(data / f"{name}_len.npy", numpy.array([len(e) for e in encoded]))
        print(f"{name}: {len(encoded)} documents, {sum(map(len, encoded))} tokens")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
