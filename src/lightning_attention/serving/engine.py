"""Continuous batching: requests join and leave a running batch, their states in pools that never grow."""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_attention.ops.recent import LONGEST
from lightning_attention.ops.validation import integer
from lightning_attention.serving.cuda_graphs import capture
from lightning_attention.serving.model import DecoderModel
from lightning_attention.serving.request import Request, check_vocabulary, token_ids
from lightning_attention.serving.sampling import sample
from lightning_attention.serving.scheduler import Finished, RunningSequence, Scheduler


class Token(NamedTuple):
    """A token of a request, and why it is the request's last one, if it is."""

    request: int
    token: int
    finished: Finished


class _Flight(NamedTuple):
    """A step that the device may still be computing: whose token each row brings (None: nobody's), and tokens [N]."""

    rows: list[RunningSequence | None]
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

    A request owns one row of every block's state from its first token to its last; then the row is another's. A
    step is one pass over the blocks. While prompts are waiting to be read, a step packs the next token of every
    running request with up to ``prefill_tokens`` tokens of prompts, chosen by the
    :class:`~lightning_attention.serving.scheduler.Scheduler`. Otherwise a step is one token for each running request,
    padded to a power of two with rows that own no state; on a GPU each of these sizes is captured once in a CUDA graph.

    On a GPU the host is one step ahead: :meth:`step` starts a step and gives the tokens of the one before. That is the
    only wait for the device. A request that ends at a stop token is computed one token further; that token is dropped.

    Args:
        model: a :class:`~lightning_attention.serving.DecoderModel`, such as ``TransnormerForCausalLM``, where it is and
            in the dtype it has; its weights must stay where they are.
        max_batch: requests that run at the same time, S rows in the pools. The others wait.
        prefill_tokens: tokens of prompts in a step, at most. A larger number reads prompts faster, a smaller one keeps
            steps short.
        state_dtype: of the recurrent states, float32, bfloat16 or float16, or of a float64 model (on a CPU) float64.
            None: the widest.
        suppress: token ids that are never generated, in a collection, tensor or array.
        recent_tokens: how many tokens the blocks that can keep beside their states, so that a decode step need not
            write these: from 1 to 64, or 0 for none. None: 16 on a GPU where a block has 512 float32 states, rows ×
            heads, or more, or 2,048 of 16 bits; else none, for it would take longer.

    Attributes:
        states: what each block allocated; for a layer of lightning attention a pool, [S, H, D, E].
        recent: each block's rings of recent tokens, a :class:`~lightning_attention.RecentTokens`, or None.

    Raises:
        TypeError: ``max_batch``, ``prefill_tokens`` or ``recent_tokens`` is no integer, ``state_dtype`` is none of
            those, or ``suppress`` holds what is no integer.
        ValueError: ``max_batch`` or ``prefill_tokens`` is below 1, ``recent_tokens`` is not from 0 to 64, or
            ``suppress`` has a token that the model does not know, or all that it does.
    """

    def __init__(
        self,
        model: DecoderModel,
        *,
        max_batch: int = 256,
        prefill_tokens: int = 2048,
        state_dtype: torch.dtype | None = None,
        suppress: Collection[int] = (),
        recent_tokens: int | None = None,
    ) -> None:
        self._max_batch = integer("max_batch", max_batch, least=1)
        self._scheduler = Scheduler(self._max_batch, integer("prefill_tokens", prefill_tokens, least=1))
        suppressed = set(token_ids("suppress", suppress))
        check_vocabulary("suppress", suppressed, model.vocab_size)
        if len(suppressed) == model.vocab_size:
            raise ValueError(f"suppress has all {model.vocab_size} tokens; there must be one to generate")
        weight = next(p for p in model.parameters() if p.is_floating_point())
        state_dtype, self._device = _state_dtype(state_dtype, weight.dtype), weight.device
        self._model = model.eval()
        self._blocks = list(model.blocks)
        self.states: list[Any] = [block.allocate_state(self._max_batch, state_dtype) for block in self._blocks]
        length = 16 * any(map(_is_worth_rings, self.states)) if recent_tokens is None else recent_tokens
        self.recent: list[Any] = self._allocate_recent(integer("recent_tokens", length, least=0, most=LONGEST))
        # Each row's newest token stays on the device. One more: padding, slot −1, reads and writes the last.
        self._newest = torch.zeros(self._max_batch + 1, dtype=torch.long, device=self._device)
        self._suppress = torch.tensor(sorted(suppressed), dtype=torch.long, device=self._device)
        self._flights: deque[_Flight] = deque()
        self._ahead = int(self._newest.is_cuda)
        self._graphs: dict[tuple[int, bool], _Graph] = {}

    def _allocate_recent(self, length: int) -> list[Any]:
        able = [getattr(block, "allocate_recent", None) if length else None for block in self._blocks]
        return [None if allocate is None else allocate(self._max_batch, length) for allocate in able]

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def room(self) -> int:
        """Rows of the pools that no request has or waits for."""
        return self._scheduler.room

    def submit(self, request: Request) -> int:
        """Let a request wait for a row of the pools. Returns the number that its tokens will carry.

        Raises:
            TypeError: it is no :class:`Request`.
            ValueError: ``prompt`` or ``stop`` has a token that the model does not know, or prompt and answer could be
                longer than the model's ``context_length``.
        """
        if not isinstance(request, Request):
            raise TypeError(f"request is a {type(request).__name__}; it must be a Request")
        check_vocabulary("prompt", request.prompt, self._model.vocab_size)
        check_vocabulary("stop", request.stop, self._model.vocab_size)
        most, asked = self._model.context_length, len(request.prompt) + request.max_tokens
        if most is not None and asked > most:
            raise ValueError(f"prompt and max_tokens are {asked} tokens; the model's context_length is {most}")
        return self._scheduler.submit(request)

    def cancel(self, number: int) -> None:
        """Take a request out, waiting or running; one that is over or unknown is left as it is.

        Its row of the pools is free at once, and none of its tokens is given any more, not even one being computed.
        """
        self._scheduler.cancel(number)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Compute one step, and give the tokens that are there; often none while prompts are being read."""
        with torch.cuda.device_of(self._newest):
            flight = self._launch()
            if flight is not None:
                self._flights.append(flight)
            ahead = self._ahead if flight is not None else 0
            return self._land(self._flights.popleft()) if len(self._flights) > ahead else []

    def _launch(self) -> _Flight | None:
        decoding, chunks = self._scheduler.schedule()
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
            finished = sequence.receive(token)
            if finished:
                self._scheduler.release(sequence)
            given.append(Token(sequence.number, token, finished))
        return given

    def _prefill(
        self, decoding: list[RunningSequence], chunks: dict[RunningSequence, int]
    ) -> tuple[list[RunningSequence | None], Tensor]:
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
        controls = _controls(rows)
        cu_seqlens, slots, new = bounds[0], bounds[1, :-1], bounds[2, :-1].bool()
        tokens[0, : len(decoding)] = self._newest[slots[: len(decoding)]]
        batch = {"cu_seqlens": cu_seqlens, "positions": tokens[1], "slots": slots, "fresh": new}
        hidden = self._through(tokens[0], lambda block, *own, **rings: block.prefill(*own, **rings, **batch))
        hidden = hidden[cu_seqlens[1:] - 1]
        return rows, self._next(hidden, slots, self._to_device(controls, torch.float32), _sampled(controls))

    def _decode(self, decoding: list[RunningSequence]) -> Tensor:
        padding = self._padded(len(decoding)) - len(decoding)
        slots, positions = [s.slot for s in decoding] + [-1] * padding, [s.position for s in decoding] + [0] * padding
        controls = _controls([*decoding, *[None] * padding])
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
        batch = {"positions": positions, "slots": slots}
        hidden = self._through(self._newest[slots], lambda block, *own, **rings: block.step(*own, **rings, **batch))
        return self._next(hidden, slots, controls, sampled)

    def _through(self, ids: Tensor, read: Callable[..., Tensor]) -> Tensor:
        """Token ids [T] to the hidden states [T, width] after the last block; ``read`` has one block read them."""
        x = self._model.embed(ids)
        for block, state, recent in zip(self._blocks, self.states, self.recent, strict=True):
            x = read(block, x, state) if recent is None else read(block, x, state, recent=recent)
        return x

    def _next(self, hidden: Tensor, slots: Tensor, controls: Tensor, sampled: bool) -> Tensor:
        """The tokens [N] after hidden states [N, width], kept for the next step too."""
        logits = self._model.head(hidden)
        logits.index_fill_(1, self._suppress, -torch.inf)
        # Sorting the vocabulary takes longer than a small model's layers, and to write it in float32 as long as two of
        # them: not where every row is greedy.
        tokens = sample(logits.float(), *controls) if sampled else logits.argmax(-1)
        self._newest[slots] = tokens
        return tokens

    def _on_host(self, values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=self._newest.is_cuda)

    def _to_device(self, values: list, dtype: torch.dtype) -> Tensor:
        return self._on_host(values, dtype).to(self._device, non_blocking=True)


def _controls(rows: Sequence[RunningSequence | None]) -> list[list[float]]:
    """Temperatures, top_p and random numbers, [3, N], of the next token asked of each sequence."""
    controls = [(0.0, 1.0, 0.0) if s is None else s.ask() for s in rows]
    return [list(column) for column in zip(*controls, strict=True)]


def _sampled(controls: list[list[float]]) -> bool:
    return any(controls[0])


def _is_worth_rings(state: Any) -> bool:
    """Whether steps are faster with rings: by docs/performance.md from 512 float32 states on, or 2,048 of 16 bits."""
    if not isinstance(state, Tensor) or state.device.type == "cpu" or state.ndim != 4:
        return False
    least = {torch.float32: 512, torch.bfloat16: 2048, torch.float16: 2048}
    return state.shape[0] * state.shape[1] >= least.get(state.dtype, float("inf"))


def _state_dtype(asked: torch.dtype | None, model: torch.dtype) -> torch.dtype:
    wide = torch.float64 if model == torch.float64 else torch.float32
    known = tuple(dict.fromkeys((wide, torch.float32, torch.bfloat16, torch.float16)))
    if asked not in (None, *known):
        raise TypeError(f"state_dtype is {asked}; for a model in {model} it must be {' or '.join(map(str, known))}")
    return wide if asked is None else asked
