"""Parents of drafts, from masks and from links."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_attention import trees


def mask_of(parents: list[int]) -> list[list[bool]]:
    rows: list[list[bool]] = []
    for i, parent in enumerate(parents):
        row = [False] * len(parents) if parent < 0 else list(rows[parent])
        row[i] = True
        rows.append(row)
    return rows


def links_of(parents: list[int], backwards: bool) -> tuple[list[int], list[int]]:
    """First children and next siblings, youngest first where ``backwards``."""
    first, following, last = [-1] * len(parents), [-1] * len(parents), {}
    order = range(len(parents))
    for i in reversed(order) if backwards else order:
        parent = parents[i]
        if parent in last:
            following[last[parent]] = i
        elif parent >= 0:
            first[parent] = i
        last[parent] = i
    return first, following


@st.composite
def forests(draw: st.DrawFn) -> list[list[int]]:
    P = draw(st.integers(1, 12))
    return [[draw(st.integers(-1, i - 1)) for i in range(P)] for _ in range(draw(st.integers(1, 3)))]


@given(forests(), st.sampled_from([torch.bool, torch.float32, torch.int8]))
def test_masks(forest: list[list[int]], dtype: torch.dtype):
    mask = torch.tensor([mask_of(parents) for parents in forest])
    mask |= torch.ones_like(mask).triu(1)  # later drafts are not looked at
    found = trees.parents_of_mask(mask.to(dtype))
    assert found.tolist() == [parent for parents in forest for parent in parents]
    assert found.dtype == torch.int32


@given(forests(), st.booleans(), st.sampled_from([torch.int32, torch.int64]))
def test_links(forest: list[list[int]], backwards: bool, dtype: torch.dtype):
    first, following = (
        torch.tensor(x, dtype=dtype) for x in zip(*(links_of(p, backwards) for p in forest), strict=True)
    )
    found = trees.parents_of_links(first, following)
    assert found.tolist() == [parent for parents in forest for parent in parents]
    assert found.dtype == torch.int32


def test_the_links_of_a_tree_as_an_engine_has_them():
    """The last token at 0; 1 and 2 are guesses for the next, 3 and 5 follow 1, and 4 follows 3."""
    first, following = [[1, 3, -1, 4, -1, -1]], [[-1, 2, -1, 5, -1, -1]]
    found = trees.parents_of_links(torch.tensor(first), torch.tensor(following))
    assert found.tolist() == [-1, 0, 0, 1, 3, 1]
    assert trees.parents_of_mask(torch.tensor([mask_of(found.tolist())])).tolist() == found.tolist()


def test_nothing_is_read_on_the_host():
    links = torch.empty(3, 5, dtype=torch.int32, device="meta")
    assert trees.parents_of_links(links, links).shape == (15,)
    assert trees.parents_of_mask(torch.empty(3, 5, 5, dtype=torch.bool, device="meta")).shape == (15,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: trees.parents_of_mask([[0]]), TypeError, "mask is a list"),
        (lambda: trees.parents_of_mask(torch.zeros(2, 3)), ValueError, r"mask has shape \[2, 3\]"),
        (lambda: trees.parents_of_mask(torch.zeros(2, 3, 4)), ValueError, r"must be \[N, P, P\] with P at least 1"),
        (lambda: trees.parents_of_links(torch.zeros(3), torch.zeros(3)), ValueError, r"first_child has shape \[3\]"),
        (
            lambda: trees.parents_of_links(torch.zeros(1, 3), torch.zeros(1, 3)), TypeError,
            "first_child has dtype float32; it must be int32 or int64",
        ),
        (
            lambda: trees.parents_of_links(torch.zeros(1, 3).long(), torch.zeros(1, 4).long()), ValueError,
            r"next_sibling has shape \[1, 4\]; it must be \[N, P\] = \[1, 3\]",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
