"""Which request has which row of the pools, and what the next step reads of whom."""

from collections import deque
from typing import Literal

import torch

from lightning_attention.serving.request import Request

#: Random numbers drawn at a time for a request: one call of torch.rand costs as much as 64 numbers of another.
_DRAWS = 64

Finished = Literal["stop", "length"] | None


class RunningSequence:
    """A request in the batch: its row of the pools, and how far it is."""

    def __init__(self, number: int, request: Request, slot: int) -> None:
        self.number, self.request, self.slot = number, request, slot
        self.read = 0  # tokens of the prompt
        self.asked = 0  # tokens asked of the device
        self.given = 0  # tokens handed out
        self.over = False
        self._random = torch.Generator("cpu").manual_seed(request.seed)
        self._draws: list[float] = []

    @property
    def unread(self) -> int:
        """Tokens of the prompt that no step has read."""
        return len(self.request.prompt) - self.read

    @property
    def position(self) -> int:
        """The position of the next token to be read."""
        return self.read + self.asked - 1 if self.asked else self.read

    def ask(self) -> tuple[float, float, float]:
        """Count one more token asked of the device. Returns its temperature, top_p and random number."""
        self.asked += 1
        if self.request.temperature == 0:
            return 0.0, 1.0, 0.0
        if not self._draws:
            self._draws = torch.rand(_DRAWS, generator=self._random, device="cpu").tolist()[::-1]
        return self.request.temperature, self.request.top_p, self._draws.pop()

    def receive(self, token: int) -> Finished:
        """Count a token handed out. Returns why it is the last one, if it is."""
        self.given += 1
        if token in self.request.stop:
            return "stop"
        return "length" if self.given == self.request.max_tokens else None


class Scheduler:
    """Requests wait in order of arrival for one of ``rows`` rows, which they own until they end.

    A step reads at most ``prefill_tokens`` tokens of prompts: half of them in order of arrival, so that nobody waits
    for ever, and half for those with the least left, so that a short prompt does not wait for a long one.
    """

    def __init__(self, rows: int, prefill_tokens: int) -> None:
        self.waiting: deque[tuple[int, Request]] = deque()
        self.running: list[RunningSequence] = []
        self._free = list(range(rows))[::-1]
        self._prefill_tokens = prefill_tokens
        self._submitted = 0

    @property
    def room(self) -> int:
        """Rows that no request has or waits for."""
        return max(0, len(self._free) - len(self.waiting))

    def submit(self, request: Request) -> int:
        """Put a request last in the queue. Returns its number."""
        self.waiting.append((self._submitted, request))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, number: int) -> None:
        """Take out a request, waiting or running; one that is over or unknown is left as it is."""
        self.waiting = deque(entry for entry in self.waiting if entry[0] != number)
        for sequence in [s for s in self.running if s.number == number]:
            self.release(sequence)

    def release(self, sequence: RunningSequence) -> None:
        """End a running sequence: its row is free at once."""
        sequence.over = True
        self.running.remove(sequence)
        self._free.append(sequence.slot)

    def schedule(self) -> tuple[list[RunningSequence], dict[RunningSequence, int]]:
        """Admit whom there is a row for, and plan a step: who gets a token, and how much of which prompts is read."""
        while self.waiting and self._free:
            self.running.append(RunningSequence(*self.waiting.popleft(), self._free.pop()))
        decoding = [s for s in self.running if not s.unread and s.asked < s.request.max_tokens]
        return decoding, self._chunks([s for s in self.running if s.unread])

    def _chunks(self, reading: list[RunningSequence]) -> dict[RunningSequence, int]:
        chunks: dict[RunningSequence, int] = {}
        left = self._prefill_tokens
        # The larger half first: a budget of one token belongs to who came first.
        for order, share in ((reading, (left + 1) // 2), (sorted(reading, key=lambda s: s.unread), left)):
            part = min(share, left)
            for sequence in order:
                take = min(part, sequence.unread - chunks.get(sequence, 0))
                if take:
                    chunks[sequence] = chunks.get(sequence, 0) + take
                    part, left = part - take, left - take
        return chunks
