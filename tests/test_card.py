"""What the other tests marked `gpu` take for granted, of a card and of what stands in for one: each is held to the same."""

import card
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.gpu


def ones(*size):
    return torch.ones(size, device="cuda")


def capture(work):
    """A graph of `work`, which has run before; what it gives at a replay; and the graph's replay."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = work()
    return given, graph.replay


def test_tensors_are_where_they_were_put():
    found = ones(2, 3)
    assert found.is_cuda and not found.is_cpu and found.device == torch.device("cuda", 0)
    assert (found + 1).is_cuda and found[0].is_cuda and torch.zeros_like(found).is_cuda
    assert found.new_zeros(2).is_cuda and found.new_tensor([1]).is_cuda and torch.tensor([1.0], device="cuda").is_cuda
    assert torch.zeros(2).to(found).is_cuda and torch.zeros(2).cuda().is_cuda
    moved = found.to("cpu", torch.float64)
    assert moved.is_cpu and moved.dtype == torch.float64 and moved.numpy().sum() == 6
    with pytest.raises(TypeError, match="convert cuda:0"):
        found.numpy()


@pytest.mark.parametrize(
    "work",
    [
        lambda there, here: there + here,
        lambda there, here: here @ there,
        lambda there, here: torch.stack([there, here]),
        lambda there, here: nn.functional.linear(there, here),
        lambda there, here: torch.equal(here, there),
    ],
    ids=["sum", "product", "stack", "layer", "comparison"],
)
def test_the_two_sides_do_not_mix(work):
    with pytest.raises(RuntimeError, match="same device"):
        work(ones(3, 3), torch.ones(3, 3))
    assert (ones(3) * torch.tensor(2.0)).tolist() == [2, 2, 2], "but a number may come from the host"


def test_a_module_moves_there_and_back():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = module.state_dict()
    assert all(tensor.is_cuda for tensor in module.cuda().state_dict().values())
    kept = list(module.parameters())
    assert all(one is other for one, other in zip(module.cuda().parameters(), kept, strict=True)), "it is there"
    module(ones(4, 3)).sum().backward()
    assert all(parameter.grad.is_cuda for parameter in module.parameters())
    for name, tensor in module.cpu().state_dict().items():
        assert tensor.is_cpu and (name.endswith(("mean", "var", "tracked")) or torch.equal(tensor, before[name]))


def test_gradients_cross():
    weight = torch.full((3,), 2.0, requires_grad=True)
    (weight.cuda() * ones(3)).sum().cpu().backward()
    assert weight.grad.is_cpu and weight.grad.tolist() == [1, 1, 1]


def test_a_graph_works_in_the_memory_of_its_capture():
    source, total = ones(3), torch.zeros(3, device="cuda")

    def work():
        total.add_(source)
        return total * 2

    given, replay = capture(work)
    assert total.tolist() == [1, 1, 1], "a capture computes nothing: that was the warm-up"
    replay()
    assert total.tolist() == [2, 2, 2] and given.tolist() == [4, 4, 4]
    place = source
    source = ones(3) * 100  # in a Python variable alone
    replay()
    assert total.tolist() == [3, 3, 3]
    place.fill_(10)
    replay()
    assert total.tolist() == [13, 13, 13] and given.tolist() == [26, 26, 26]
    assert source.tolist() == [100] * 3


def test_a_graph_draws_new_numbers_at_each_replay_as_without_one():
    torch.cuda.manual_seed(7)
    expected = [torch.rand(4, device="cuda").tolist() for _ in range(3)][1:]
    torch.cuda.manual_seed(7)
    given, replay = capture(lambda: torch.rand(4, device="cuda"))
    found = []
    for _ in range(2):
        replay()
        found.append(given.tolist())
    assert found == expected


def test_a_capture_does_not_wait():
    if torch.cuda.get_device_name() != card.NAME:
        pytest.skip("of the stand-in alone: a process whose capture has failed is not to be relied upon")
    source = ones(3)
    with pytest.raises(RuntimeError):
        capture(lambda: source * source.sum().item())
    with pytest.raises(RuntimeError, match="Offset increment outside graph capture"):
        torch.rand(2, device="cuda")
    capture(lambda: source * 2)
    torch.rand(2, device="cuda")


def test_waits_for_the_card_are_seen():
    source, pinned = ones(3), torch.ones(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        source.mul_(2).add_(1)
        pinned.to("cuda", non_blocking=True)
        for wait in (source.tolist, source.cpu, lambda: source[0].item(), source.nonzero, lambda: source.copy_(pinned)):
            with pytest.raises(RuntimeError, match="synchronizing"):
                wait()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert source.tolist() == [3, 3, 3]


def test_random_numbers_are_of_another_stream():
    torch.manual_seed(3)
    here = torch.rand(2)
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    drawn = [torch.rand(2, device="cuda").tolist(), nn.functional.dropout(ones(8)).tolist()]
    assert torch.equal(torch.rand(2), here), "the host's are as they were"
    torch.cuda.set_rng_state(state)
    assert [torch.rand(2, device="cuda").tolist(), nn.functional.dropout(ones(8)).tolist()] == drawn
    generator = torch.Generator("cuda").manual_seed(5)
    assert torch.rand(2, device="cuda", generator=generator).is_cuda
