"""Following imports alone one gets from an operation to its kernels; ``make lint`` holds that nothing leads back."""

from typing import Any

import pytest

from lightning_attention.ops.backends import BACKENDS

grimp = pytest.importorskip("grimp")

OPS, KERNELS = "lightning_attention.ops", "lightning_attention.kernels"


@pytest.fixture(scope="module")
def graph() -> Any:
    return grimp.build_graph("lightning_attention", cache_dir=None)


@pytest.mark.parametrize("operation", ["attention", "decode", "prefill", "speculative", "fold", "sequence_parallel"])
def test_from_an_operation_to_every_kernel(graph: Any, operation: str):
    packages = {name for name in graph.find_descendants(KERNELS) if graph.find_children(name)}
    modules = {name for package in packages for name in graph.find_descendants(package)} - packages
    assert {name.split(".")[2] for name in modules} == set(BACKENDS)
    assert any(name.endswith(".hopper") for name in modules)
    for module in modules:
        assert graph.find_shortest_chain(f"{OPS}.{operation}", module), module


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_way_is_by_the_backends(backend: str):
    graph = grimp.build_graph("lightning_attention", cache_dir=None)
    kernel = f"{KERNELS}.{backend}.attention"
    assert graph.find_shortest_chain(f"{OPS}.attention", kernel) == (
        f"{OPS}.attention", f"{OPS}.backends", f"{KERNELS}.{backend}.backend", kernel,
    )  # fmt: skip
    graph.remove_import(importer=f"{OPS}.backends", imported=f"{KERNELS}.{backend}.backend")
    assert graph.find_shortest_chain(f"{OPS}.attention", kernel) is None
