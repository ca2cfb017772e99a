#!/usr/bin/env python3
"""train.py DATA RUN: trains the demo model on one CPU thread; writes RUN/checkpoint.pt.

bf16 products, float32 master weights; Muon for the matrices, AdamW for the rest. MINUTES (default 24) of CPU time, WALL minutes
at most; the learning rate is warmed up over 30 steps and falls linearly over the last 55 % of the time; 256-token windows for
three quarters, then 512.

For speed on a CPU: start it with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 (page faults) and
LRU_CACHE_CAPACITY=4096 (oneDNN keeps its compiled kernels)."""
import math
import os
import pathlib
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy
import torch
import torch.nn.functional as F
from torch import nn

CONFIG = dict(vocab=4096, hidden=256, layers=5, heads=4, kv_heads=2, head_dim=64, experts=16, top_k=4, width=128, theta=10000.0,
              eps=1e-6)
BATCH_TOKENS = 4096
CHAT_SHARE = 0.22    # of the rows of a batch
AUX_WEIGHT = 0.01    # of the load-balancing loss
ROW_PAD = 128        # rows an expert are padded to: few shapes, few kernels to compile
BF16 = torch.bfloat16


def matrix(*shape, std):
    return nn.Parameter(torch.randn(*shape) * std)


class RmsNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        x = x.float()
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG["eps"]) * self.weight).to(BF16)


class Layer(nn.Module):
    """Attention with q/k norms and RoPE, then a mixture of experts; pre-norm, residual in float32."""

    def __init__(self):
        super().__init__()
        c = CONFIG
        hidden, dim, inner = c["hidden"], c["head_dim"], c["width"]
        std = 0.5 / math.sqrt(hidden)
        out_std = std / math.sqrt(2 * c["layers"])
        self.attention_norm, self.mlp_norm = RmsNorm(hidden), RmsNorm(hidden)
        self.q_norm, self.k_norm = RmsNorm(dim), RmsNorm(dim)
        self.q = matrix(c["heads"] * dim, hidden, std=std)
        self.k = matrix(c["kv_heads"] * dim, hidden, std=std)
        self.v = matrix(c["kv_heads"] * dim, hidden, std=std)
        self.o = matrix(hidden, c["heads"] * dim, std=out_std)
        self.router = matrix(c["experts"], hidden, std=0.02)
        self.gate_up = matrix(c["experts"], 2 * inner, hidden, std=std)
        self.down = matrix(c["experts"], hidden, inner, std=out_std)

    def attention(self, x, cosine, sine, mask):
        c = CONFIG
        batch, length, _ = x.shape
        dim, groups = c["head_dim"], c["heads"] // c["kv_heads"]
        y = self.attention_norm(x)

        def heads(weight):
            return F.linear(y, weight.to(BF16)).view(batch, length, -1, dim)

        def rope(t):
            a, b = t[..., :dim // 2], t[..., dim // 2:]
            return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)

        def flat(t):  # [batch * heads, length, dim]
            return t.transpose(1, 2).reshape(batch * c["heads"], length, dim)

        q = flat(rope(self.q_norm(heads(self.q))))
        k = flat(rope(self.k_norm(heads(self.k))).repeat_interleave(groups, 2))
        v = flat(heads(self.v).repeat_interleave(groups, 2))
        scores = torch.baddbmm(mask.expand(batch * c["heads"], length, length), q * dim ** -0.5, k.transpose(1, 2))
        mixed = torch.bmm(torch.softmax(scores, -1), v).view(batch, c["heads"], length, dim).transpose(1, 2)
        return F.linear(mixed.reshape(batch, length, -1), self.o.to(BF16)).float()

    def experts(self, x):
        c = CONFIG
        batch, length, hidden = x.shape
        y = self.mlp_norm(x).view(batch * length, hidden)
        probability = torch.softmax(F.linear(y.float(), self.router), -1)
        weight, chosen = probability.topk(c["top_k"], -1)
        weight = weight / weight.sum(-1, keepdim=True)
        share = torch.bincount(chosen.view(-1), minlength=c["experts"]) / chosen.numel()
        balance = c["experts"] * (share * probability.mean(0)).sum()

        # Rows sorted by expert; each expert's rows are padded with rows of weight zero.
        order = chosen.view(-1).argsort()
        counts = torch.bincount(chosen.view(-1), minlength=c["experts"]).tolist()
        padded = [-(-n // ROW_PAD) * ROW_PAD for n in counts]
        token = torch.zeros(sum(padded), dtype=torch.long)
        pick = torch.full((sum(padded),), chosen.numel(), dtype=torch.long)
        start = sorted_start = 0
        for count, room in zip(counts, padded):
            token[start:start + count] = order[sorted_start:sorted_start + count] // c["top_k"]
            pick[start:start + count] = order[sorted_start:sorted_start + count]
            start, sorted_start = start + room, sorted_start + count
        row_weight = torch.cat([weight.reshape(-1), torch.zeros(1)]).index_select(0, pick).to(BF16)[:, None]
        gate_up, down, outputs = self.gate_up.to(BF16), self.down.to(BF16), []
        for expert, (rows, scale) in enumerate(zip(y.index_select(0, token).split(padded), row_weight.split(padded))):
            if rows.shape[0]:
                gate, up = F.linear(rows, gate_up[expert]).split(c["width"], -1)
                outputs.append(F.linear(F.silu(gate) * up * scale, down[expert]))
        total = torch.zeros(batch * length, hidden).index_add(0, token, torch.cat(outputs).float())
        return total.view(batch, length, hidden), balance

    def forward(self, x, *rope):
        x = x + self.attention(x, *rope)
        mixed, balance = self.experts(x)
        return x + mixed, balance


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of hidden @ W^T in chunks of rows; gradients are made at once, so no logits are kept."""

    @staticmethod
    def forward(ctx, hidden, weight, target):
        rows, weight_bf16 = hidden.shape[0], weight.to(BF16)
        d_hidden, d_weight, loss = torch.empty_like(hidden), torch.zeros_like(weight), 0.0
        for begin in range(0, rows, 512):
            h, t = hidden[begin:begin + 512], target[begin:begin + 512]
            log_p = F.log_softmax(F.linear(h, weight_bf16).float(), -1)
            loss -= log_p.gather(1, t[:, None]).sum().item()
            gradient = log_p.exp_().scatter_add_(1, t[:, None], -torch.ones(len(t), 1)).mul_(1 / rows).to(BF16)
            d_hidden[begin:begin + 512] = gradient @ weight_bf16
            d_weight += (gradient.t() @ h).float()
        ctx.save_for_backward(d_hidden, d_weight)
        return torch.tensor(loss / rows)

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad.to(BF16), d_weight * grad, None


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = matrix(CONFIG["vocab"], CONFIG["hidden"], std=0.02)
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["layers"]))
        self.final_norm = RmsNorm(CONFIG["hidden"])
        self.rope_cache = {}

    def rope(self, length):
        if length not in self.rope_cache:
            dim = CONFIG["head_dim"]
            angle = torch.arange(length).float()[:, None] * CONFIG["theta"] ** (-torch.arange(0, dim, 2).float() / dim)
            mask = torch.full((length, length), -1e9).triu(1)
            self.rope_cache[length] = (angle.cos()[None, :, None].to(BF16), angle.sin()[None, :, None].to(BF16), mask.to(BF16)[None])
        return self.rope_cache[length]

    def forward(self, ids, target):
        """(cross entropy, load-balancing loss) of ids [batch, length]."""
        x, balance = F.embedding(ids, self.embedding), 0
        for layer in self.layers:
            x, one = layer(x, *self.rope(ids.shape[1]))
            balance = balance + one
        hidden = self.final_norm(x).reshape(ids.numel(), -1)
        return ChunkedCrossEntropy.apply(hidden, self.embedding, target.reshape(-1)), balance / CONFIG["layers"]


def orthogonalise(gradient):
    """Newton-Schulz iteration of Muon (Jordan et al. 2024): the nearest half-orthogonal matrix, batched."""
    x = gradient.to(BF16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-1, -2).contiguous()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(BF16) + 1e-7)
    for _ in range(5):
        square = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return (x.transpose(-1, -2) if tall else x).float()


class Optimizer:
    """Muon for q, k, v, o and each expert's matrices; AdamW for embedding, norms and routers."""

    def __init__(self, model):
        self.matrices = [p for layer in model.layers for p in (layer.q, layer.k, layer.v, layer.o, layer.gate_up, layer.down)]
        chosen = {id(p) for p in self.matrices}
        self.others = [p for p in model.parameters() if id(p) not in chosen]
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        self.mean = [torch.zeros_like(p) for p in self.others]
        self.square = [torch.zeros_like(p) for p in self.others]
        self.steps = 0

    @torch.no_grad()
    def step(self, rate, momentum, muon_rate=0.02, adam_rate=3e-3, decay=0.05):
        self.steps += 1
        for p, buffer in zip(self.matrices, self.momentum):
            buffer.mul_(momentum).add_(p.grad)
            update = p.grad.add(buffer, alpha=momentum)
            if p.dim() == 3 and p.shape[1] == 2 * CONFIG["width"]:  # gate and up are two matrices
                update = orthogonalise(update.view(-1, CONFIG["width"], CONFIG["hidden"])).view_as(p)
                rows, columns = CONFIG["width"], CONFIG["hidden"]
            else:
                update = orthogonalise(update)
                rows, columns = p.shape[-2:]
            p.mul_(1 - rate * muon_rate * decay).add_(update, alpha=-rate * muon_rate * max(1, rows / columns) ** 0.5)
            p.grad = None
        beta1, beta2 = 0.9, 0.97
        for p, mean, square in zip(self.others, self.mean, self.square):
            mean.lerp_(p.grad, 1 - beta1)
            square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            step = (mean / (1 - beta1 ** self.steps)) / ((square / (1 - beta2 ** self.steps)).sqrt() + 1e-10)
            p.add_(step, alpha=-rate * adam_rate)
            p.grad = None


class Stream:
    """Windows over documents that are shuffled anew each epoch."""

    def __init__(self, tokens, lengths, rng):
        self.tokens, self.lengths, self.rng = tokens, lengths, rng
        self.starts = numpy.concatenate([[0], numpy.cumsum(lengths)[:-1]])
        self.shuffle()

    def shuffle(self):
        order = self.rng.permutation(len(self.lengths))
        self.epoch = numpy.concatenate([self.tokens[self.starts[i]:self.starts[i] + self.lengths[i]] for i in order])
        self.at = self.rng.randint(0, 200)

    def window(self, length):
        if self.at + length + 1 > len(self.epoch):
            self.shuffle()
        self.at += length
        return self.epoch[self.at - length:self.at + 1]


@torch.no_grad()
def held_out_loss(model, held, length, windows):
    picked = numpy.stack([held[i * length:(i + 1) * length + 1] for i in range(min(len(held) // length - 1, windows))])
    losses = [model(batch[:, :-1], batch[:, 1:])[0].item() * len(batch) for batch in torch.from_numpy(picked).split(8)]
    return sum(losses) / len(picked)


def main(data, run):
    torch.manual_seed(1337)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    minutes, wall = float(os.environ.get("MINUTES", "24")), float(os.environ.get("WALL", "60"))
    load = lambda name: numpy.load(data / f"{name}.npy").astype(numpy.int64)
    rng = numpy.random.RandomState(7)
    text, chats = Stream(load("text"), load("text_len"), rng), Stream(load("chat"), load("chat_len"), rng)
    held = load("held")
    model = Model()
    optimizer = Optimizer(model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    cpu_start, wall_start, logged, smooth = time.process_time(), time.time(), 0.0, None
    while True:
        spent = max((time.process_time() - cpu_start) / 60 / minutes, (time.time() - wall_start) / 60 / wall)
        if spent >= 1:
            break
        rate = min(1, (optimizer.steps + 1) / 30) * min(1, max(0.0, (1 - spent) / 0.55) + 0.02)
        length = 256 if spent < 0.75 else 512
        rows = BATCH_TOKENS // length
        chat_rows = max(1, round(rows * CHAT_SHARE))
        batch = torch.from_numpy(numpy.stack([(chats if i < chat_rows else text).window(length) for i in range(rows)]))
        loss, balance = model(batch[:, :-1], batch[:, 1:])
        (loss + AUX_WEIGHT * balance).backward()
        optimizer.step(rate, momentum=0.85 + 0.10 * min(1, optimizer.steps / 200))
        smooth = loss.item() if smooth is None else 0.97 * smooth + 0.03 * loss.item()
        if time.time() - logged > 30:
            logged = time.time()
            print(f"{100 * spent:5.1f} % step {optimizer.steps} loss {smooth:.3f} balance {balance.item():.3f}", flush=True)
    run.mkdir(parents=True, exist_ok=True)
    torch.save({"config": CONFIG, "weights": model.state_dict()}, run / "checkpoint.pt")
    print(f"{optimizer.steps} steps, {optimizer.steps * BATCH_TOKENS / 1e6:.2f} M tokens; held-out perplexity at 512 tokens "
          f"{math.exp(held_out_loss(model, held, 512, 40)):.2f}", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
