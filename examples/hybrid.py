"""A hybrid decoder, seven layers of lightning attention to one of softmax attention, as in MiniMax-Text-01.

Run it: python examples/hybrid.py [STEPS]. It trains on bytes of Python's own source code and then writes some.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attention.nn import SGLU, LightningAttention, rope

Carried = Tensor | tuple[Tensor, Tensor] | None  # what a layer keeps: a state [B, H, D, E], or all keys and values


class SoftmaxAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cache: Carried, positions: Tensor) -> tuple[Tensor, Carried]:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rope(q, positions), rope(k, positions)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        # Query i of T stands S − T tokens into the keys, of which it sees those up to its own.
        T, S = q.shape[1], k.shape[1]
        seen = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        out = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), attn_mask=seen)
        return self.out_proj(out.transpose(1, 2).flatten(2)), (k, v)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, layer: int, num_layers: int) -> None:
        super().__init__()
        self.softmax = layer % 8 == 7
        self.mixer = (
            SoftmaxAttention(width, heads)
            if self.softmax
            else LightningAttention.minimax(width, heads, layer=layer, num_layers=num_layers)
        )
        self.mlp = SGLU(width, 3 * width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))

    def forward(self, x: Tensor, carried: Carried, positions: Tensor) -> tuple[Tensor, Carried]:
        if self.softmax:
            mixed, carried = self.mixer(self.norms[0](x), carried, positions)
        else:
            mixed, carried = self.mixer(self.norms[0](x), carried, positions=positions, output_state=True)
        x = x + mixed
        return x + self.mlp(self.norms[1](x)), carried


class Hybrid(nn.Module):
    def __init__(self, vocab: int = 256, width: int = 64, heads: int = 4, num_layers: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads, layer, num_layers) for layer in range(num_layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor, cache: list[Carried] | None = None, start: int = 0) -> tuple[Tensor, list[Carried]]:
        """Logits [B, T, vocab] of the tokens start to start + T, and what each layer carries on to the next ones."""
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x, cache = self.embed(ids), [None] * len(self.blocks) if cache is None else list(cache)
        for i, block in enumerate(self.blocks):
            x, cache[i] = block(x, cache[i], positions)
        return self.head(self.norm(x)), cache

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int, chunk: int = 256) -> Tensor:
        """Append ``count`` likeliest tokens to ids [B, T]; the prompt is read ``chunk`` tokens at a time."""
        cache, at = None, 0
        for part in ids.split(chunk, 1):
            logits, cache = self(part, cache, at)
            at += part.shape[1]
        for _ in range(count):
            new = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], 1)
            logits, cache = self(new, cache, at)
            at += 1
        return ids


def train(model: Hybrid, text: Tensor, steps: int, batch: int = 8, length: int = 128) -> list[float]:
    """Losses in bits per byte; text is bytes, [n]."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - length, (batch,))
        ids = text[starts[:, None] + torch.arange(length + 1)]
        loss = F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / torch.log(torch.tensor(2.0)).item())
    return losses


if __name__ == "__main__":
    source = b"".join(path.read_bytes() for path in sorted(Path(torch.__file__).parent.glob("nn/modules/*.py")))
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8).long()
    model = Hybrid()
    losses = train(model, text, int(sys.argv[1]) if sys.argv[1:] else 200)
    print(f"bits per byte: {losses[0]:.2f} at first, {sum(losses[-10:]) / 10:.2f} over the last 10 steps")
    print(bytes(model.generate(text[None, :300], 200)[0].tolist()).decode(errors="replace"))
