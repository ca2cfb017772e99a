#!/usr/bin/env python3
"""export.py RUN DATA OUT: a trained checkpoint as a Hugging Face directory (bf16). The chat template is models/demo's."""
import json
import pathlib
import shutil
import struct
import sys

import torch

DEMO = pathlib.Path(__file__).resolve().parents[2] / "models/demo"
LAYER_NAMES = {"attention_norm.weight": "input_layernorm.weight", "mlp_norm.weight": "post_attention_layernorm.weight",
               "q_norm.weight": "self_attn.q_norm.weight", "k_norm.weight": "self_attn.k_norm.weight",
               "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight", "v": "self_attn.v_proj.weight",
               "o": "self_attn.o_proj.weight", "router": "mlp.gate.weight"}


def tensors(config, weights):
    yield "model.embed_tokens.weight", weights["embedding"]
    yield "model.norm.weight", weights["final_norm.weight"]
    for layer in range(config["layers"]):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        for name, hugging_face in LAYER_NAMES.items():
            yield theirs + hugging_face, weights[ours + name]
        for expert in range(config["experts"]):
            gate, up = weights[ours + "gate_up"][expert].split(config["width"])
            for name, value in (("gate", gate), ("up", up), ("down", weights[ours + "down"][expert])):
                yield f"{theirs}mlp.experts.{expert}.{name}_proj.weight", value


def main(run, data, out):
    checkpoint = torch.load(run / "checkpoint.pt")
    header, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in sorted(tensors(checkpoint["config"], checkpoint["weights"])):
        blob = tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + len(blob)]}
        at += len(blob)
        blobs.append(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for blob in blobs:
            file.write(blob)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):  # the shape is fixed in train.py
        shutil.copy(DEMO / name, out)
    shutil.copy(data / "tokenizer.json", out)
    print(f"{len(blobs)} tensors, {at / 2e6:.2f} M parameters in {out}")


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:4]))
