"""``python -m benchmarks.plan``: memory and traffic of a training run, computed for a model and meshes, not measured.

docs/distributed.md states the formulas and shows what this prints.
"""

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_attention.training.flops import PEAKS, Shape

BF16, FLOAT32 = 2, 4  # bytes
LOGITS = 1 << 30  # bytes of logits that the loss has at a time
GPUS_A_HOST = 8
# Bytes a second that a GPU sends and receives: NVLink of H100 and H200, and one 400 Gb/s adapter for each GPU.
WITHIN_HOST, BETWEEN_HOSTS = 450e9, 50e9
PEAK, MFU = PEAKS["H200"] * 1e12, 0.6


@dataclass(frozen=True)
class Job:
    """A mesh, and what its GPUs read in a step.

    Args:
        dp_replicate, dp_shard, sp: the mesh. Weights are sharded over dp_shard x sp GPUs.
        seq_len: T, of a whole sequence.
        tokens: of a GPU, in the one forward and backward pass of a step.
    """

    dp_replicate: int
    dp_shard: int
    sp: int
    seq_len: int
    tokens: int

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.dp_replicate * self.dp_shard * self.sp

    @property
    def shards(self) -> int:
        """GPUs that share one copy of the weights."""
        return self.dp_shard * self.sp

    @property
    def sequences(self) -> int:
        """Sequences that a GPU has a slice of."""
        return self.tokens * self.sp // self.seq_len

    def __str__(self) -> str:
        return f"{self.dp_replicate} × {self.dp_shard} × {self.sp}"


def state_bytes(shape: Shape, job: Job) -> dict[str, float]:
    """On each GPU, what lasts from step to step: float32 weights and gradients, and AdamW's two moments."""
    own = shape.parameters / job.shards
    return {"weights": FLOAT32 * own, "gradients": FLOAT32 * own, "optimizer": 2 * FLOAT32 * own}


def _outside(shape: Shape) -> int:
    """Weights outside of blocks, which are gathered as one: the embedding, and the head where it has its own."""
    return shape.table * (1 if shape.tied else 2)


def gathered_bytes(shape: Shape, job: Job) -> float:
    """What is whole for a while: bf16 weights, of two blocks and outside; gradients, of one block and outside."""
    if job.gpus == 1:
        return 0.0
    weights = BF16 * (_outside(shape) + 2 * shape.block_matrices)
    return weights + (BF16 + FLOAT32) * (_outside(shape) + shape.block_matrices)


def kept_a_block(shape: Shape) -> int:
    """Numbers that the backward pass of one block of TransNormerLLM finds again for each token.

    The inputs of both norms and their outputs: 4 widths. q, k, v and u as projected; q and k after silu; attention's
    output, that after its norm, and after the gate: 9 times H·E. The unit's two products and theirs: 3 glu_dim.
    """
    return 4 * shape.width + 9 * shape.heads * shape.head_dim + 3 * shape.glu_dim


def activation_bytes(shape: Shape, job: Job, every: int) -> float:
    """Activations of the blocks, at most, with every ``every``-th block checkpointed; 0 for none of them."""
    anew = shape.layers // every if every else 0
    # A checkpointed block keeps its input; the one whose backward pass runs has all it needs besides.
    whole = shape.layers - anew + (anew > 0)
    return BF16 * job.tokens * (whole * kept_a_block(shape) + anew * shape.width)


def loss_bytes(shape: Shape, job: Job) -> float:
    """A chunk of logits, the float32 gradient of the head, and the last hidden states with their gradient."""
    return LOGITS + FLOAT32 * shape.table + 2 * BF16 * job.tokens * shape.width


def fsdp_traffic(shape: Shape, job: Job) -> dict[str, float]:
    """Bytes that each GPU receives in a step, and as many sent, for weights and gradients."""
    others, blocks = 1 - 1 / job.shards, shape.layers * shape.block_matrices
    return {
        # Blocks are gathered forward and again backward; what is outside of them once.
        "weights": others * BF16 * (2 * (blocks + shape.others) + _outside(shape)),
        "gradients": others * FLOAT32 * shape.parameters,
        "replicas": 2 * (1 - 1 / job.dp_replicate) * FLOAT32 * shape.parameters / job.shards,
    }


def sequence_traffic(shape: Shape, job: Job, every: int) -> dict[str, float]:
    """Bytes that each GPU receives in a step for attention, all layers: our states, and two ways of softmax models.

    The softmax model has the same layers and heads. With checkpointing what forward exchanges is exchanged again.
    """
    forwards = 1 + (1 / every if every else 0)
    others, layers = job.sp - 1, shape.layers
    state = sum(shape.heads * D * shape.head_dim for D in shape.query_dims) * FLOAT32 * job.sequences
    q = BF16 * job.tokens * shape.heads * shape.head_dim * layers
    kv = 2 * BF16 * job.tokens * shape.kv_heads * shape.head_dim * layers
    lengths = layers * job.sequences * FLOAT32
    return {
        "states": others * ((forwards + 1) * state + forwards * lengths),
        "ring": others * (forwards + 2) * kv,  # k and v around the ring; backward their gradients too
        "Ulysses": others / job.sp * (forwards + 1) * (2 * q + kv),  # q, k, v and the output to other heads and back
    }


def seconds(traffic: float, ranks: int, *, same: bool) -> float:
    """What it takes at least among so many neighbouring GPUs.

    Where the GPUs of a host receive the ``same`` (gathered, or the other way reduced), it comes in once over all of the
    host's adapters; otherwise each GPU has its own.
    """
    if ranks <= GPUS_A_HOST:
        return traffic / WITHIN_HOST
    return traffic / (GPUS_A_HOST * BETWEEN_HOSTS if same else BETWEEN_HOSTS)


def compute_seconds(shape: Shape, job: Job, every: int) -> float:
    """At the assumed MFU; what checkpointing computes again adds up to a third."""
    flops = 6 * shape.multiplied + 3 * shape.attention_flops(job.seq_len)
    return job.tokens * flops * (1 + (1 / every if every else 0) / 3) / (PEAK * MFU)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown, with numbers to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def memory_table(shape: Shape, jobs: list[Job]) -> str:
    """GiB on each GPU."""

    def row(job: Job) -> list[str]:
        lasting, gathered, loss = (
            sum(state_bytes(shape, job).values()),
            gathered_bytes(shape, job),
            loss_bytes(shape, job),
        )
        activations = [activation_bytes(shape, job, every) for every in (0, 1)]
        parts = [lasting, gathered, loss, *activations]
        totals = [lasting + gathered + loss + a for a in activations]
        sizes = [f"{job.seq_len:,}", *(f"{size / 2**30:.1f}" for size in parts)]
        return [str(job), *sizes, " / ".join(f"{total / 2**30:.0f}" for total in totals)]

    head = ["mesh", "T", "weights, gradients, AdamW", "gathered", "loss", "activations", "checkpointed", "in all"]
    return table(head, map(row, jobs))


def traffic_table(shape: Shape, jobs: list[Job], every: int) -> str:
    """GB that each GPU receives in a step, and the milliseconds that takes at least."""

    def row(job: Job) -> list[str]:
        fsdp, own = fsdp_traffic(shape, job), sequence_traffic(shape, job, every)
        sharding = fsdp["weights"] + fsdp["gradients"]

        def cell(traffic: float, ranks: int, same: bool) -> str:
            return f"{traffic / 1e9:.2f} ({1e3 * seconds(traffic, ranks, same=same):.0f})" if traffic else "0"

        cells = [cell(sharding, job.shards, True), cell(fsdp["replicas"], job.gpus, False)]
        cells += [cell(own[name], job.sp, name == "states") for name in ("states", "ring", "Ulysses")]
        if job.sp > shape.kv_heads:
            cells[-1] = f"at most {shape.kv_heads} GPUs"
        return [str(job), f"{job.seq_len:,}", *cells, f"{1e3 * compute_seconds(shape, job, every):,.0f}"]

    head = ["mesh", "T", "FSDP", "replicas", "states", "ring attention", "Ulysses", "compute"]
    return table(head, map(row, jobs))


def read_mesh(text: str) -> list[int]:
    """``1x8x8:131072`` is dp_replicate x dp_shard x sp, and T."""
    try:
        mesh, _, length = text.partition(":")
        replicate, shard, sp = map(int, mesh.split("x"))
        sizes = [replicate, shard, sp, int(length)]
    except ValueError as error:
        raise ArgumentTypeError(f"MESH is {text!r}; it must be DP_REPLICATExDP_SHARDxSP:T, as 1x8x8:131072") from error
    if min(sizes) < 1:
        raise ArgumentTypeError(f"MESH is {text!r}; no size of it can be below 1")
    return sizes


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = ArgumentParser("python -m benchmarks.plan", description="Memory and traffic of training TransNormerLLM.")
    parser.add_argument("size", metavar="SIZE", help="a named size of TransNormerLLM, as 7B")
    parser.add_argument("mesh", nargs="+", type=read_mesh, metavar="MESH", help="DP_REPLICATExDP_SHARDxSP:T")
    parser.add_argument("--tokens", type=int, default=16384, help="of a GPU in a step (%(default)s)")
    parser.add_argument("--checkpoint-every", type=int, default=0, metavar="N", help="blocks, for the traffic; 0: none")
    options = parser.parse_args(arguments)
    from lightning_attention.models.transnormer import TransnormerConfig

    try:
        shape = Shape.of(TransnormerConfig.from_name(options.size))
    except ValueError as error:
        parser.error(f"SIZE: {error}")
    every = options.checkpoint_every
    if options.tokens < 1 or every < 0:
        parser.error("--tokens must be at least 1, --checkpoint-every at least 0")
    jobs = [Job(copies, shard, sp, length, options.tokens) for copies, shard, sp, length in options.mesh]
    for job in jobs:
        if job.tokens * job.sp % job.seq_len:
            parser.error(
                f"--tokens: {job.sp} GPUs with {job.tokens} tokens each have no whole number of sequences "
                f"of {job.seq_len}"
            )
    weights = f"{shape.parameters / 1e9:.2f} G weights, {options.tokens:,} tokens a GPU and step"
    print(f"{options.size}: {weights}. GiB on each GPU:\n")
    print(memory_table(shape, jobs))
    again = {0: "", 1: ", every block checkpointed"}.get(every, f", one block in {every} checkpointed")
    print(f"\nGB that each GPU receives in a step (ms){again}:\n")
    print(traffic_table(shape, jobs, every))
    return 0


if __name__ == "__main__":
    sys.exit(main())
