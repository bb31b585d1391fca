import pytest

from lightning_attention.distributed.mesh import Mesh


def sizes(mesh: Mesh) -> tuple[int, int, int]:
    return mesh.dp_replicate, mesh.dp_shard, mesh.sp


@pytest.mark.parametrize(
    ("processes", "asked", "expected"),
    [
        (1, {}, (1, 1, 1)),
        (8, {}, (1, 8, 1)),
        (8, {"sp": 2}, (1, 4, 2)),
        (8, {"dp_replicate": 2, "sp": 2}, (2, 2, 2)),
        (8, {"dp_replicate": 2, "dp_shard": 4, "sp": 1}, (2, 4, 1)),
        (6, {"dp_shard": 1, "sp": 6}, (1, 1, 6)),
    ],
)
def test_what_is_left_is_sharded(processes, asked, expected):
    mesh = Mesh.fit(processes, **asked)
    assert sizes(mesh) == expected
    assert mesh.size == processes
    assert mesh.dp_size * mesh.sp == processes
    assert (mesh.dp_rank, mesh.sp_rank, mesh.sp_group) == (0, 0, None)


@pytest.mark.parametrize(
    ("processes", "asked", "message"),
    [
        (8, {"sp": 3}, "dp_replicate 1 x sp 3 do not divide the 8 processes that were started"),
        (1, {"dp_shard": 4}, "dp_replicate 1 x dp_shard 4 x sp 1 are 4 processes; 1 were started"),
        (8, {"dp_shard": 2, "sp": 2}, "dp_replicate 1 x dp_shard 2 x sp 2 are 4 processes; 8 were started"),
        (2, {"sp": 0}, "sp is 0; it must be at least 1"),
        (2, {"dp_shard": 0}, "dp_shard is 0; it must be at least 1, or -1 for what is left"),
        (2, {"dp_replicate": -1}, "dp_replicate is -1; it must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(processes, asked, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Mesh.fit(processes, **asked)


def test_groups_need_a_process_group():
    with pytest.raises(ValueError, match="the mesh has 2 processes; the default process group has no"):
        Mesh.fit(2).connect("cpu")
