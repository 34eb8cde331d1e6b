import pytest
import torch

from charlm.nn.layers import dropped, locked, once, one_sequence


@pytest.mark.parametrize("p", [0.0, 0.1, 0.75])
def test_dropped_drops_the_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    y = torch.ones(301, 333).requires_grad_()
    found = dropped(y, p)
    assert found.unique().tolist() == pytest.approx([1] if p == 0 else [0, 1 / (1 - p)])
    assert (found == 0).float().mean().item() == pytest.approx(p, abs=0.005)
    assert found.mean().item() == pytest.approx(1, abs=0.01)
    # Neighbours, which may share a draw of the generator, are dropped independently of each other.
    both = ((found[:, 1:] == 0) & (found[:, :-1] == 0)).float().mean().item()
    assert both == pytest.approx(p * p, abs=0.01)
    found.sum().backward()
    assert torch.equal(y.grad, found), "the gradient passes through the same mask"


@pytest.mark.parametrize("time", [0, 1])
def test_a_locked_mask_is_one_for_all_steps_and_differs_between_streams_and_units(time):
    torch.manual_seed(0)
    y = torch.ones(9, 8, 7).movedim(0, time).requires_grad_()
    dropped = locked(y, 0.25, time, "key")
    steps = dropped.movedim(time, 0)
    assert torch.equal(steps, steps[:1].expand_as(steps))
    assert dropped.unique().tolist() == [0, pytest.approx(1 / 0.75)]
    assert len(steps[0].unique(dim=0)) > 1 < len(steps[0].unique(dim=1)[0])
    dropped.sum().backward()
    assert torch.equal(y.grad, dropped), "the gradient passes through the same mask"


def test_a_mask_is_drawn_once_a_sequence():
    draw = lambda: torch.rand(3)
    assert not torch.equal(once("a", draw), once("a", draw))
    with one_sequence():
        first = once("a", draw)
        assert torch.equal(once("a", draw), first) and not torch.equal(once("b", draw), first)
    with one_sequence():
        assert not torch.equal(once("a", draw), first)
