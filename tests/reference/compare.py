"""How far two tensors are apart, measured the same way in every test: max |ours - reference| / max |reference|."""

import torch

TOLERANCE = 1e-5


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """max |ours - reference| / max |reference|, over all elements."""
    difference = (ours.detach().double() - reference.detach().double()).abs().max()
    return (difference / reference.detach().double().abs().max()).item()


def assert_close(
    ours: torch.Tensor, reference: torch.Tensor, what: str = "tensor", tolerance: float = TOLERANCE
) -> None:
    """Fail, with maximum and mean difference, if the relative error is above `tolerance`.

    A reference that is zero everywhere, or not finite, fails too: it would prove nothing.
    """
    assert ours.shape == reference.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
    largest = reference.detach().abs().max()
    assert largest > 0 and largest.isfinite(), f"{what}: the reference has maximum {largest}, which proves nothing"
    error = relative_error(ours, reference)
    difference = (ours.detach().double() - reference.detach().double()).abs()
    assert error <= tolerance, (
        f"{what}: relative error {error:.2e} > {tolerance:.0e}; difference max {difference.max():.3e}, "
        f"mean {difference.mean():.3e}; reference max {largest:.3e}; worst of shape {tuple(ours.shape)} at "
        f"{tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))}"
    )


def assert_same_gradients(
    ours: torch.Tensor,
    reference: torch.Tensor,
    leaves: dict[str, tuple[torch.Tensor, torch.Tensor]],
    tolerance: float = TOLERANCE,
) -> None:
    """Compare two outputs and their gradients.

    Args:
        ours, reference: outputs of one shape.
        leaves: name -> (tensor that ours depends on, its twin that the reference depends on).
    """
    assert_close(ours, reference, "output", tolerance)
    direction = torch.randn(reference.shape, generator=torch.Generator().manual_seed(7))
    our_leaves, reference_leaves = zip(*leaves.values(), strict=True)
    our_gradients = torch.autograd.grad((ours * direction).sum(), our_leaves)
    reference_gradients = torch.autograd.grad((reference * direction).sum(), reference_leaves)
    for name, a, b in zip(leaves, our_gradients, reference_gradients, strict=True):
        assert_close(a, b, f"gradient of {name}", tolerance)


def twin(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf with the same values in float64, for the reference's side of a comparison."""
    return tensor.detach().double().requires_grad_()
