"""A hybrid decoder, seven layers of lightning attention to one of softmax attention, as in MiniMax-Text-01.

It trains on whole sequences, or on slices of them on the ranks of a process group, and writes token by token from seven
states and a KV cache (``Hybrid.generate``). It has ``embed``, ``head``, and ``blocks`` with ``step`` and ``prefill``,
so ``lightning_attention.serving`` can serve it to many requests at once.

Run it: python examples/hybrid.py [STEPS]. It trains on bytes of Python's own source code and then writes some.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_attention import RecentTokens
from lightning_attention.distributed.sequence_parallel import gather_tokens
from lightning_attention.nn import SGLU, LightningAttention, rope, token_positions
from lightning_attention.serving import ContinuousBatch, Request

Carried = Tensor | tuple[Tensor, Tensor] | None  # what a layer keeps: a state [B, H, D, E], or all keys and values


class SoftmaxAttention(nn.Module):
    def __init__(self, width: int, heads: int, context_length: int) -> None:
        super().__init__()
        self.heads, self.context_length = heads, context_length
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def qkv(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned, and values of x [..., width]: [..., heads, d] each."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return rope(q, positions), rope(k, positions), v

    def forward(
        self, x: Tensor, cache: Carried, positions: Tensor, group: ProcessGroup | None = None
    ) -> tuple[Tensor, Carried]:
        q, k, v = self.qkv(x, positions)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        before = k.shape[1] - q.shape[1]
        if group is not None:  # LASP-2H: unlike states, keys and values of all ranks travel
            before = group.rank() * q.shape[1]
            k, v = gather_tokens(k, group), gather_tokens(v, group)
        # Query i stands so many tokens into the keys, of which it sees those up to its own.
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=x.device).tril(before)
        out = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), attn_mask=seen)
        return self.out_proj(out.transpose(1, 2).flatten(2)), (k, v) if group is None else None

    # To be served: a cache of a fixed size for each row. Keys know their positions, so padding goes to one row more.
    def allocate_state(self, rows: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 (of recurrent states)
        """Keys and values, [2, rows + 1, context_length, heads, d], in the dtype of the weights."""
        width = self.out_proj.in_features
        return self.out_proj.weight.new_zeros(2, rows + 1, self.context_length, self.heads, width // self.heads)

    def step(self, x: Tensor, state: Tensor, *, positions: Tensor, slots: Tensor) -> Tensor:
        """Read tokens x [N, width], each at its position in the row of its slot."""
        q, k, v = self.qkv(x, positions)
        state[:, slots, positions] = torch.stack([k, v])
        keys, values = state[:, slots].transpose(2, 3)
        seen = torch.arange(self.context_length, device=x.device) <= positions[:, None]
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=seen[:, None, None])
        return self.out_proj(out.flatten(1))

    def prefill(
        self, x: Tensor, state: Tensor, *, cu_seqlens: Tensor, positions: Tensor, slots: Tensor, **_: Tensor
    ) -> Tensor:
        """Read packed tokens x [T, width]. All are written before any looks, at none past its own position."""
        sequence = torch.searchsorted(cu_seqlens[1:], torch.arange(len(x), device=x.device), right=True)
        return self.step(x, state, positions=positions, slots=F.pad(slots, (0, 1), value=-1)[sequence])


class Block(nn.Module):
    def __init__(self, width: int, heads: int, layer: int, num_layers: int, context_length: int) -> None:
        super().__init__()
        self.softmax = layer % 8 == 7
        self.mixer = (
            SoftmaxAttention(width, heads, context_length)
            if self.softmax
            else LightningAttention.minimax(width, heads, layer=layer, num_layers=num_layers)
        )
        self.mlp = SGLU(width, 3 * width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))

    def forward(
        self, x: Tensor, carried: Carried, positions: Tensor, group: ProcessGroup | None = None
    ) -> tuple[Tensor, Carried]:
        if self.softmax:
            mixed, carried = self.mixer(self.norms[0](x), carried, positions, group)
        else:
            mixed, carried = self.mixer(
                self.norms[0](x), carried, positions=positions, output_state=group is None, group=group
            )
        return self.rest(x + mixed), carried

    def rest(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norms[1](x))

    def allocate_state(self, rows: int, dtype: torch.dtype) -> Tensor:
        return self.mixer.allocate_state(rows, dtype)

    def allocate_recent(self, rows: int, length: int) -> RecentTokens | None:
        return None if self.softmax else self.mixer.allocate_recent(rows, length)

    def step(self, x: Tensor, state: Tensor, **batch: Tensor) -> Tensor:
        return self.rest(x + self.mixer.step(self.norms[0](x), state, **batch))

    def prefill(self, x: Tensor, state: Tensor, **batch: Tensor) -> Tensor:
        return self.rest(x + self.mixer.prefill(self.norms[0](x), state, **batch))


class Hybrid(nn.Module):
    def __init__(
        self, vocab: int = 256, width: int = 64, heads: int = 4, num_layers: int = 8, context_length: int = 512
    ) -> None:
        super().__init__()
        self.vocab_size, self.context_length = vocab, context_length
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, layer, num_layers, context_length) for layer in range(num_layers)
        )
        self.head = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, vocab, bias=False))

    def forward(
        self, ids: Tensor, cache: list[Carried] | None = None, start: int = 0, group: ProcessGroup | None = None
    ) -> tuple[Tensor, list[Carried]]:
        """Logits [B, T, vocab] of the tokens start to start + T, and what each layer carries on to the next ones.

        With ``group`` each of its ranks, in order, has a slice of T tokens of every sequence, T the same on all of
        them; ``ids`` and the logits are this rank's, and nothing is carried on.
        """
        if group is not None and cache is not None:
            raise ValueError("cache is given together with group; slices on several ranks leave and take no cache")
        positions = start + token_positions(ids, group=group)
        x, cache = self.embed(ids), [None] * len(self.blocks) if cache is None else list(cache)
        for i, block in enumerate(self.blocks):
            x, cache[i] = block(x, cache[i], positions, group)
        return self.head(x), cache

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
    # Three prompts at once, of which the engine reads 256 tokens a step.
    batch = ContinuousBatch(model, max_batch=4, prefill_tokens=256)
    texts = {batch.submit(Request(text[at : at + 200], max_tokens=200)): [] for at in (1000, 5000, 9000)}
    while batch.busy:
        for number, token, _ in batch.step():
            texts[number].append(token)
    for written in texts.values():
        print("---", bytes(written).decode(errors="replace"), sep="\n")
