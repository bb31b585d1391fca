"""Continuous batching: requests join and leave a running batch, their states in a pool that never grows."""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_attention.cuda_graphs import capture
from lightning_attention.models.transnormer.modeling_transnormer import TransnormerForCausalLM
from lightning_attention.models.transnormer.request import Request, check_vocabulary, integer, token_ids
from lightning_attention.models.transnormer.sampling import sample
from lightning_attention.nn import GatedLinearAttention

#: Random numbers drawn at a time for a request: one call of torch.rand costs as much as 64 numbers of another.
_DRAWS = 64


class Token(NamedTuple):
    """A token of a request, and why it is the request's last one, if it is."""

    request: int
    token: int
    finished: Literal["stop", "length"] | None


class _Sequence:
    """A request in the batch: its row of the pool, and how far it is."""

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
        return len(self.request.prompt) - self.read

    @property
    def position(self) -> int:
        """Of the next token to be read."""
        return self.read + self.asked - 1 if self.asked else self.read

    def control(self) -> tuple[float, float, float]:
        """Temperature, top_p and a random number for the next token."""
        if self.request.temperature == 0:
            return 0.0, 1.0, 0.0
        if not self._draws:
            self._draws = torch.rand(_DRAWS, generator=self._random, device="cpu").tolist()[::-1]
        return self.request.temperature, self.request.top_p, self._draws.pop()


class _Flight(NamedTuple):
    """A step the device may still be at: whose token each row brings (None: nobody's), and the tokens, [N]."""

    rows: list[_Sequence | None]
    tokens: Tensor
    landed: torch.cuda.Event | None


class _Graph(NamedTuple):
    """A captured decode step with the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    rows: Tensor
    controls: Tensor
    tokens: Tensor


class ContinuousBatch:
    """Generates for many requests at once; each gets the text that it would get alone, but for rounding.

    A request owns one row of every layer's state pool from its first token to its last; then the row is another's. A
    step is one pass over the layers. While prompts are waiting to be read, a step packs the next token of every
    running request with up to ``prefill_tokens`` tokens of prompts: half of them in order of arrival, so that nobody
    waits for ever, and half for those with the least left, so that a short prompt does not wait for a long one.
    Otherwise a step is one token for each running request, padded to a power of two with rows that own no state;
    on a GPU each of these sizes is captured once in a CUDA graph.

    On a GPU the host is one step ahead: :meth:`step` starts a step and gives the tokens of the one before. That is the
    only wait for the device. A request that ends at a stop token is computed one token further, which nobody gets.

    Args:
        model: where it is and in the dtype it has; its weights must stay where they are.
        max_batch: requests that run at the same time, S rows in the pool. The others wait.
        prefill_tokens: tokens of prompts in a step, at most. More reads prompts faster, less holds up a step less.
        state_dtype: of the pool, float32 or bfloat16 or, of a float64 model (on a CPU), float64. None: the widest.
        suppress: token ids that are never generated, in a collection, tensor or array.

    Attributes:
        states: one pool per layer, [S, H, D, E].

    Raises:
        TypeError: ``max_batch`` or ``prefill_tokens`` is no integer, ``state_dtype`` is none of those, or ``suppress``
            holds what is no integer.
        ValueError: ``max_batch`` or ``prefill_tokens`` is below 1, or ``suppress`` has a token that the model does not
            know, or all that it does.
    """

    def __init__(
        self,
        model: TransnormerForCausalLM,
        *,
        max_batch: int = 256,
        prefill_tokens: int = 2048,
        state_dtype: torch.dtype | None = None,
        suppress: Collection[int] = (),
    ) -> None:
        self._max_batch = integer("max_batch", max_batch, least=1)
        self._prefill_tokens = integer("prefill_tokens", prefill_tokens, least=1)
        self._vocab = model.config.vocab_size
        suppressed = set(token_ids("suppress", suppress))
        check_vocabulary("suppress", suppressed, self._vocab)
        if len(suppressed) == self._vocab:
            raise ValueError(f"suppress has all {self._vocab} tokens; there must be one to generate")
        state_dtype = _state_dtype(state_dtype, model.dtype)
        self._model = model.eval()
        self._blocks: list[Any] = list(model.model.layers)
        self._device = model.device
        self.states = [
            torch.zeros(self._max_batch, *layer.token_mixer.state_shape, dtype=state_dtype, device=self._device)
            for layer in self._blocks
        ]
        # Each row's newest token stays on the device. One more: padding, slot −1, reads and writes the last.
        self._newest = torch.zeros(self._max_batch + 1, dtype=torch.long, device=self._device)
        self._suppress = torch.tensor(sorted(suppressed), dtype=torch.long, device=self._device)
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: list[_Sequence] = []
        self._free = list(range(self._max_batch))[::-1]
        self._flights: deque[_Flight] = deque()
        self._ahead = int(self._newest.is_cuda)
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self._waiting or self._running)

    @property
    def room(self) -> int:
        """Rows of the pool that no request has or waits for."""
        return max(0, len(self._free) - len(self._waiting))

    def submit(self, request: Request) -> int:
        """Let a request wait for a row of the pool. Returns the number that its tokens will carry.

        Raises:
            TypeError: it is no :class:`Request`.
            ValueError: ``prompt`` or ``stop`` has a token that the model does not know.
        """
        if not isinstance(request, Request):
            raise TypeError(f"request is a {type(request).__name__}; it must be a Request")
        check_vocabulary("prompt", request.prompt, self._vocab)
        check_vocabulary("stop", request.stop, self._vocab)
        self._waiting.append((self._submitted, request))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, number: int) -> None:
        """Take a request out, waiting or running; one that is over or unknown is left as it is.

        Its row of the pool is free at once. No token of it is given any more, one that a GPU is at included.
        """
        self._waiting = deque(entry for entry in self._waiting if entry[0] != number)
        for sequence in [s for s in self._running if s.number == number]:
            self._release(sequence)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Compute one step, and give the tokens that are there; often none while prompts are being read."""
        while self._waiting and self._free:
            self._running.append(_Sequence(*self._waiting.popleft(), self._free.pop()))
        with torch.cuda.device_of(self._newest):
            flight = self._launch()
            if flight is not None:
                self._flights.append(flight)
            ahead = self._ahead if flight is not None else 0
            return self._land(self._flights.popleft()) if len(self._flights) > ahead else []

    def _launch(self) -> _Flight | None:
        decoding = [s for s in self._running if not s.unread and s.asked < s.request.max_tokens]
        chunks = self._chunks()
        if chunks:
            rows, tokens = self._prefill(decoding, chunks)
        elif decoding:
            rows, tokens = [*decoding], self._decode(decoding)
        else:
            return None
        landed = None
        if tokens.is_cuda:
            tokens, landed = tokens.to("cpu", non_blocking=True), torch.cuda.Event()
            landed.record()
        return _Flight(rows, tokens, landed)

    def _land(self, flight: _Flight) -> list[Token]:
        if flight.landed is not None:
            flight.landed.synchronize()
        given = []
        for sequence, token in zip(flight.rows, flight.tokens.tolist(), strict=False):  # padding comes last
            if sequence is None or sequence.over:
                continue
            sequence.given += 1
            finished: Literal["stop", "length"] | None = None
            if token in sequence.request.stop:
                finished = "stop"
            elif sequence.given == sequence.request.max_tokens:
                finished = "length"
            if finished:
                self._release(sequence)
            given.append(Token(sequence.number, token, finished))
        return given

    def _release(self, sequence: _Sequence) -> None:
        sequence.over = True
        self._running.remove(sequence)
        self._free.append(sequence.slot)

    def _chunks(self) -> dict[_Sequence, int]:
        """How many tokens of which prompts the next step reads."""
        reading = [s for s in self._running if s.unread]
        chunks: dict[_Sequence, int] = {}
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

    def _prefill(
        self, decoding: list[_Sequence], chunks: dict[_Sequence, int]
    ) -> tuple[list[_Sequence | None], Tensor]:
        ids, positions, cuts = [0] * len(decoding), [s.position for s in decoding], list(range(len(decoding) + 1))
        fresh = [0] * len(decoding)
        for s, length in chunks.items():
            ids += s.request.prompt[s.read : s.read + length]
            positions += range(s.read, s.read + length)
            fresh.append(s.read == 0)
            cuts.append(len(ids))
            s.read += length
        sequences = [*decoding, *chunks]
        rows = [None if s.unread else s for s in sequences]
        tokens = self._to_device([ids, positions], torch.long)
        bounds = self._to_device([cuts, [*(s.slot for s in sequences), 0], [*fresh, 0]], torch.long)
        controls = self._controls(rows)
        cu_seqlens, slots, new = bounds[0], bounds[1, :-1], bounds[2, :-1].bool()
        tokens[0, : len(decoding)] = self._newest[slots[: len(decoding)]]

        def mix(mixer: GatedLinearAttention, x: Tensor, state: Tensor) -> Tensor:
            return mixer.prefill(x, state, cu_seqlens=cu_seqlens, positions=tokens[1], slots=slots, fresh=new)

        hidden = self._layers(tokens[0], mix)[cu_seqlens[1:] - 1]
        return rows, self._next(hidden, slots, self._to_device(controls, torch.float32), _sampled(controls))

    def _decode(self, decoding: list[_Sequence]) -> Tensor:
        padding = self._padded(len(decoding)) - len(decoding)
        slots, positions = [s.slot for s in decoding] + [-1] * padding, [s.position for s in decoding] + [0] * padding
        controls = self._controls([*decoding, *[None] * padding])
        rows, sampled = [slots, positions], _sampled(controls)
        if not self._newest.is_cuda:
            tensors = self._to_device(rows, torch.long), self._to_device(controls, torch.float32)
            return self._decode_rows(*tensors, sampled)
        graph = self._captured(len(slots), sampled)
        graph.rows.copy_(self._on_host(rows, torch.long), non_blocking=True)
        if sampled:
            graph.controls.copy_(self._on_host(controls, torch.float32), non_blocking=True)
        graph.graph.replay()
        return graph.tokens

    def _padded(self, rows: int) -> int:
        return min(1 << (rows - 1).bit_length(), self._max_batch)

    def _controls(self, rows: Sequence[_Sequence | None]) -> list[list[float]]:
        """Temperatures, top_p and random numbers, [3, N], and one token more asked of each sequence."""
        controls = []
        for s in rows:
            controls.append((0.0, 1.0, 0.0) if s is None else s.control())
            if s is not None:
                s.asked += 1
        return [list(column) for column in zip(*controls, strict=True)]

    def _captured(self, size: int, sampled: bool) -> _Graph:
        """The decode step over so many rows as a CUDA graph, captured when it is first needed."""
        if (size, sampled) not in self._graphs:
            rows = torch.full((2, size), -1, device=self._device)  # captured, and warmed up, on padding alone
            rows[1] = 0
            controls = torch.zeros(3, size, device=self._device)
            # One memory for all of them: only one runs at a time, and its tokens are fetched before the next.
            memory = next((g.graph.pool() for g in self._graphs.values()), None)
            graph, tokens = capture(lambda: self._decode_rows(rows, controls, sampled), self._device, memory)
            self._graphs[size, sampled] = _Graph(graph, rows, controls, tokens)
        return self._graphs[size, sampled]

    def _decode_rows(self, rows: Tensor, controls: Tensor, sampled: bool) -> Tensor:
        """The next token, [N], of the slots and at the positions [2, N]."""
        slots, positions = rows

        def mix(mixer: GatedLinearAttention, x: Tensor, state: Tensor) -> Tensor:
            return mixer.step(x, state, positions=positions, slots=slots)

        return self._next(self._layers(self._newest[slots], mix), slots, controls, sampled)

    def _layers(self, ids: Tensor, mix: Callable[[GatedLinearAttention, Tensor, Tensor], Tensor]) -> Tensor:
        """Token ids [T] to the hidden states [T, width] after the last block."""
        x = self._model.model.embed_tokens(ids)
        for layer, state in zip(self._blocks, self.states, strict=True):
            x = x + mix(layer.token_mixer, layer.token_norm(x), state)
            x = x + layer.channel_mixer(layer.channel_norm(x))
        return x

    def _next(self, hidden: Tensor, slots: Tensor, controls: Tensor, sampled: bool) -> Tensor:
        """The tokens [N] after hidden states [N, width], kept for the next step too."""
        logits = self._model.lm_head(self._model.model.norm(hidden)).float()
        logits.index_fill_(1, self._suppress, -torch.inf)
        # Sorting the vocabulary takes longer than a small model's layers: not where every row is greedy.
        tokens = sample(logits, *controls) if sampled else logits.argmax(-1)
        self._newest[slots] = tokens
        return tokens

    def _on_host(self, values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=self._newest.is_cuda)

    def _to_device(self, values: list, dtype: torch.dtype) -> Tensor:
        return self._on_host(values, dtype).to(self._device, non_blocking=True)


def _state_dtype(asked: torch.dtype | None, model: torch.dtype) -> torch.dtype:
    """The pool's."""
    wide = torch.float64 if model == torch.float64 else torch.float32
    if asked not in (None, wide, torch.float32, torch.bfloat16):
        known = " or ".join(dict.fromkeys(map(str, (wide, torch.float32, torch.bfloat16))))
        raise TypeError(f"state_dtype is {asked}; for a model in {model} it must be {known}")
    return wide if asked is None else asked


def _sampled(controls: list[list[float]]) -> bool:
    return any(controls[0])
