"""The counter of live tensor bytes against allocations whose size is known."""

import torch

from experiments.training.peak_memory import KeptBytes, peak_memory, process_peak


def allocate() -> None:
    first = torch.empty(1 << 20, dtype=torch.uint8)
    second = torch.empty(1 << 21, dtype=torch.uint8)
    del first
    third = torch.empty(1 << 19, dtype=torch.uint8)
    del second, third


def test_a_known_allocation() -> None:
    assert peak_memory(allocate) == (1 << 20) + (1 << 21)


def test_views_and_tensors_that_were_there_do_not_count() -> None:
    before = torch.zeros(1 << 20)
    assert peak_memory(lambda: before.view(2, -1)[0].mul_(2)) == 0


def test_what_autograd_saves_counts_until_it_is_freed() -> None:
    x = torch.ones(1000, requires_grad=True)

    def both() -> None:
        for _ in range(3):
            (x.exp().exp().sum()).backward()

    once = peak_memory(lambda: x.exp().exp().sum().backward())
    assert once >= 3 * 4000
    assert peak_memory(both) <= once + 4000 + 16


def test_what_a_graph_keeps_is_counted_once() -> None:
    x, kept = torch.ones(1000, requires_grad=True), KeptBytes()
    with kept:
        y = x.exp()  # keeps y
        total = (y * y).sum() + y.sin().sum()  # y again, twice
    assert kept.total == 4000
    total.backward()
    expected = (2 * y * y + y.cos() * y).detach()
    torch.testing.assert_close(x.grad, expected)


def test_the_process_is_larger_than_its_tensors() -> None:
    assert process_peak() > 50 * 2**20
