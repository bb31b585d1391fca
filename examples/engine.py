"""A small inference engine: requests that come and go, long prompts in chunks, a prefix cache, trees of drafts.

Every layer has one pool of states of a fixed size. A row of it is a request's from its first token to its last, or a
prefix that the engine has seen; which rows are whose is the engine's own affair, the same in every layer.

Run it: python examples/engine.py [STEPS]. It trains on bytes of Python's own source code and then goes on writing some.
"""

import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attention.nn import SGLU, LightningAttention

BLOCK = 16  # prefixes of so many tokens, and of multiples, are kept


class Block(nn.Module):
    def __init__(self, width: int, heads: int, layer: int, num_layers: int) -> None:
        super().__init__()
        self.mixer = LightningAttention.bailing(width, heads, layer=layer, num_layers=num_layers)
        self.mlp = SGLU(width, 3 * width)
        self.norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)


class Model(nn.Module):
    def __init__(self, vocab: int = 256, width: int = 64, heads: int = 4, num_layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads, layer, num_layers) for layer in range(num_layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor, mix: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """Logits of ids [B, T]; or of packed tokens [T], mixed by ``mix(layer, x)`` in place of the layers' forward."""
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            y = block.norm(x)
            x = x + (block.mixer(y)[0] if mix is None else mix(i, y))
            x = x + block.mlp(block.mlp_norm(x))
        return self.head(self.norm(x))


@dataclass
class Running:
    """A request with a row of the pools."""

    row: int
    prompt: int  # tokens of the prompt
    limit: int  # tokens in all
    tokens: list[int]
    read: int  # tokens that the state holds: a part of the prompt, later all tokens but the newest


class Engine:
    """Greedy text for many requests; each gets what it would get alone.

    ``rows`` are those of each pool, shared by running requests and kept prefixes. A step reads at most ``chunk`` tokens
    of each prompt, and brings every other request one token or, where drafts were right, several.
    """

    def __init__(self, model: Model, *, rows: int = 16, chunk: int = 64) -> None:
        self.model, self.chunk = model.eval(), chunk
        self.device = model.head.weight.device
        self.mixers = [block.mixer for block in model.blocks]
        self.pools = [mixer.allocate_state(rows) for mixer in self.mixers]
        self.free = list(range(rows))
        self.prefixes: OrderedDict[tuple[int, ...], int] = OrderedDict()  # and their rows, the latest used last
        self.waiting: deque[tuple[int, list[int], int]] = deque()
        self.running: dict[int, Running] = {}
        self.submitted = self.hits = self.accepted = 0

    def submit(self, prompt: Sequence[int], count: int) -> int:
        """Ask for ``count`` tokens after a prompt. Returns the request's number."""
        self.submitted += 1
        self.waiting.append((self.submitted, list(prompt), len(prompt) + count))
        return self.submitted

    def cancel(self, number: int) -> None:
        """Forget a running request: its row is free. Nothing is cleared, nobody is told."""
        self.free.append(self.running.pop(number).row)

    @torch.no_grad()
    def step(self) -> dict[int, list[int]]:
        """Compute one step. Returns the texts, prompts included, of the requests that ended."""
        while self.waiting and (row := self._row()) is not None:
            number, prompt, limit = self.waiting.popleft()
            self.running[number] = Running(row, len(prompt), limit, prompt, self._copy_prefix(prompt, row))
        reading = [r for r in self.running.values() if r.read < r.prompt]
        writing = [r for r in self.running.values() if r.read >= r.prompt]
        if reading:
            self._read(reading)
        if writing:
            self._write(writing)
        ended = {number: r.tokens for number, r in self.running.items() if len(r.tokens) == r.limit}
        for number in ended:
            self.cancel(number)
        return ended

    def _row(self) -> int | None:
        """A row for a new owner: a free one, or that of the prefix that nobody has used for longest."""
        if not self.free and self.prefixes:
            self.free.append(self.prefixes.popitem(last=False)[1])
        return self.free.pop() if self.free else None

    def _copy_prefix(self, prompt: list[int], row: int) -> int:
        """Start a row from the longest kept prefix, one token short of the prompt at least; how long it is."""
        for length in range((len(prompt) - 1) // BLOCK * BLOCK, 0, -BLOCK):
            key = tuple(prompt[:length])
            if key in self.prefixes:
                self.prefixes.move_to_end(key)
                for pool in self.pools:
                    pool[row] = pool[self.prefixes[key]]
                self.hits += 1
                return length
        return 0

    def _read(self, reading: list[Running]) -> None:
        parts = [r.tokens[r.read : min(r.prompt, r.read + self.chunk)] for r in reading]
        kept: dict[tuple[int, ...], int] = {}
        at, into = [], []
        for r, part in zip(reading, parts, strict=True):
            places = [n for n in range(r.read + 1, r.read + len(part) + 1) if n % BLOCK == 0]
            rows = [self._keep(tuple(r.tokens[:n]), kept) for n in places]
            spare = [-1] * (self.chunk // BLOCK + 1 - len(places))
            at.append([n - r.read for n in places] + spare)
            into.append(rows + spare)
        batch = {
            "cu_seqlens": self._boundaries(parts),
            "slots": self._tensor([r.row for r in reading]),
            # A row that no prefix was copied to still holds what its last owner left.
            "fresh": self._tensor([r.read == 0 for r in reading]),
            "positions": self._tensor(
                [r.read + i for r, part in zip(reading, parts, strict=True) for i in range(len(part))]
            ),
            "snapshot_at": self._tensor(at),
            "snapshot_slots": self._tensor(into),
        }
        ids = self._tensor([token for part in parts for token in part])
        logits = self.model(ids, lambda i, x: self.mixers[i].prefill(x, self.pools[i], **batch))
        self.prefixes |= kept  # only now, so that none of these rows was taken for another prefix of this step
        following = logits[batch["cu_seqlens"][1:] - 1].argmax(-1).tolist()
        for r, part, token in zip(reading, parts, following, strict=True):
            r.read += len(part)
            if r.read == r.prompt:
                r.tokens.append(token)

    def _keep(self, prefix: tuple[int, ...], kept: dict[tuple[int, ...], int]) -> int:
        """A row for a prefix that is not kept yet, or −1."""
        if prefix in self.prefixes or prefix in kept or (row := self._row()) is None:
            return -1
        kept[prefix] = row
        return row

    def _write(self, writing: list[Running]) -> None:
        trees = [guesses(r.tokens) for r in writing]
        batch = {
            "cu_seqlens": self._boundaries([drafts for drafts, _, _ in trees]),
            "slots": self._tensor([r.row for r in writing]),
            "parents": self._tensor([parent for _, parents, _ in trees for parent in parents]),
        }
        ids = self._tensor([token for drafts, _, _ in trees for token in drafts])
        # A draft stands as far past what the state holds as it is deep in the tree.
        positions = self._tensor([r.read + d for r, (_, _, depths) in zip(writing, trees, strict=True) for d in depths])
        keys_and_values: list[tuple[Tensor, Tensor]] = []

        def mix(i: int, x: Tensor) -> Tensor:
            out, k, v = self.mixers[i].verify(x, self.pools[i], positions=positions, **batch)
            keys_and_values.append((k, v))
            return out

        following = self.model(ids, mix).argmax(-1).tolist()
        accepted = [False] * len(following)
        first = 0
        for r, (drafts, parents, _) in zip(writing, trees, strict=True):
            # From the newest token, which is no guess, down the tree while the model agrees.
            at: int | None = 0
            while at is not None and len(r.tokens) < r.limit:
                accepted[first + at] = True
                token = following[first + at]
                r.tokens.append(token)
                r.read += 1
                at = next((j for j, p in enumerate(parents) if p == at and drafts[j] == token), None)
            first += len(drafts)
        self.accepted += sum(accepted) - len(writing)
        for mixer, pool, (k, v) in zip(self.mixers, self.pools, keys_and_values, strict=True):
            mixer.commit(k, v, pool, accepted=self._tensor(accepted), **batch)

    def _boundaries(self, parts: Sequence[Sequence[int]]) -> Tensor:
        return F.pad(self._tensor([len(part) for part in parts]).cumsum(0), (1, 0))

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.device)


def guesses(tokens: list[int], ways: int = 2, length: int = 4) -> tuple[list[int], list[int], list[int]]:
    """The newest token and, as a tree after it, what came after the newest three the last times they were there.

    Returns the drafts, the place of each one's parent among them (−1: the state), and their depths.
    """
    drafts, parents, depths = [tokens[-1]], [-1], [0]
    places = (i for i in range(len(tokens) - 2, 1, -1) if tokens[i - 2 : i + 1] == tokens[-3:])
    for i in [i for i, _ in zip(places, range(ways), strict=False)]:
        at = 0
        for token in tokens[i + 1 : i + 1 + length]:
            known = next((j for j, p in enumerate(parents) if p == at and drafts[j] == token), None)
            if known is None:
                known = len(drafts)
                drafts.append(token)
                parents.append(at)
                depths.append(depths[at] + 1)
            at = known
    return drafts, parents, depths


def train(model: Model, text: Tensor, steps: int, batch: int = 8, length: int = 128) -> None:
    """On bytes, [n]."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        ids = text[torch.randint(len(text) - length, (batch, 1)) + torch.arange(length + 1)]
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    source = b"".join(path.read_bytes() for path in sorted(Path(torch.__file__).parent.glob("nn/modules/*.py")))
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8).long()
    model = Model()
    train(model, text, int(sys.argv[1]) if sys.argv[1:] else 200)
    engine = Engine(model)
    steps, texts = 0, {}
    for start, stop in ((1000, 1200), (5000, 5300), (1000, 1250)):
        engine.submit(text[start:stop].tolist(), 100)
        while start == 1000 and len(texts) < engine.submitted:  # the third finds what the first left
            texts |= engine.step()
            steps += 1
    print(
        f"300 tokens in {steps} steps: {engine.accepted} were right guesses, {engine.hits} prompts had a known prefix"
    )
    print(bytes(texts[1][-160:]).decode(errors="replace"))
