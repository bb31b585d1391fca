"""How the processes of a training run share the work: replicas, shards of the weights, slices of sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """``dp_replicate`` × ``dp_shard`` × ``sp`` processes, the last of them next to each other.

    Every ``sp`` consecutive ranks share sequences, a slice each; they are one data-parallel rank. The weights are
    sharded over the ``dp_shard`` × ``sp`` ranks of a replica (FSDP), and the ``dp_replicate`` replicas hold copies
    (HSDP).

    Args:
        dp_replicate: copies of the sharded weights.
        dp_shard: data-parallel ranks that share one copy.
        sp: ranks that share a sequence.
        shard_mesh: what FSDP takes: one dimension, or two with replicas. None in a process without a group.
        data_mesh: ``dp`` × ``sp``. None in a process without a group.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    sp: int = 1
    shard_mesh: DeviceMesh | None = None
    data_mesh: DeviceMesh | None = None

    @classmethod
    def fit(cls, processes: int, *, dp_replicate: int = 1, dp_shard: int = -1, sp: int = 1) -> Mesh:
        """The sizes for so many processes, without groups; ``dp_shard`` -1 takes what the others leave.

        Raises ValueError when a size is not positive, or the product is not the number of processes.
        """
        for name, size in (("dp_replicate", dp_replicate), ("dp_shard", dp_shard), ("sp", sp)):
            if size < 1 and not (name == "dp_shard" and size == -1):
                wanted = "at least 1, or -1 for what is left" if name == "dp_shard" else "at least 1"
                raise ValueError(f"{name} is {size}; it must be {wanted}")
        if dp_shard == -1:
            if processes % (dp_replicate * sp):
                raise ValueError(
                    f"dp_replicate {dp_replicate} x sp {sp} do not divide the {processes} processes that were started"
                )
            dp_shard = processes // (dp_replicate * sp)
        if dp_replicate * dp_shard * sp != processes:
            raise ValueError(
                f"dp_replicate {dp_replicate} x dp_shard {dp_shard} x sp {sp} are {dp_replicate * dp_shard * sp} "
                f"processes; {processes} were started"
            )
        return cls(dp_replicate, dp_shard, sp)

    def connect(self, device_type: str) -> Mesh:
        """The same mesh with its process groups, over all processes of the default group. A collective call.

        Args:
            device_type: ``cuda`` or ``cpu``, where tensors are.

        Raises:
            ValueError: the default group has another number of processes, or there is none.
        """
        if not dist.is_initialized() or dist.get_world_size() != self.size:
            there = dist.get_world_size() if dist.is_initialized() else "no"
            raise ValueError(f"the mesh has {self.size} processes; the default process group has {there}")
        names = ("dp_replicate", "shard")
        shard = init_device_mesh(device_type, (self.dp_replicate, self.dp_shard * self.sp), mesh_dim_names=names)
        data = init_device_mesh(device_type, (self.dp_size, self.sp), mesh_dim_names=("dp", "sp"))
        return Mesh(self.dp_replicate, self.dp_shard, self.sp, shard if self.dp_replicate > 1 else shard["shard"], data)

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.dp_size * self.sp

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks."""
        return self.dp_replicate * self.dp_shard

    @property
    def dp_rank(self) -> int:
        """Which data-parallel rank this process belongs to."""
        return 0 if self.data_mesh is None else self.data_mesh.get_local_rank("dp")

    @property
    def sp_rank(self) -> int:
        """Which slice of its sequences this process has."""
        return 0 if self.data_mesh is None else self.data_mesh.get_local_rank("sp")

    @property
    def sp_group(self) -> dist.ProcessGroup | None:
        """The processes that share a sequence, in the order of its slices; None where sequences are whole."""
        return None if self.data_mesh is None or self.sp == 1 else self.data_mesh.get_group("sp")

    def __str__(self) -> str:
        return f"dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} x sp {self.sp}"
