"""What may be done to a model, in the order in which it is done, and what is told of it."""

from dataclasses import dataclass
from typing import Any

from .calibration import Calibration
from .experts import prune_experts
from .layers import prune_layers
from .sparsity import PATTERN, make_sparse

NUMBERS = {"int8": 8, "int8-dynamic": 8, "int4": 4}


@dataclass(frozen=True)
class Ways:
    """What was asked for.

    Attributes:
        prune_experts: share of each layer's routed experts to leave out.
        prune_layers: how many decoder layers to leave out.
        sparsity: "2:4".
        numbers: the word of a type, of `NUMBERS`.
        recover_steps: so many steps of training after pruning, before numbers become smaller.
        calibration_rows: training rows, at most, by which it is decided what to leave out.
    """

    prune_experts: float | None = None
    prune_layers: int | None = None
    sparsity: str | None = None
    numbers: str | None = None
    recover_steps: int = 0
    calibration_rows: int = 256

    def __post_init__(self) -> None:
        """Refuse what can't be, before anything is opened.

        Raises:
            ValueError: with the flag.
        """
        share, layers = self.prune_experts, self.prune_layers
        if share is not None and not 0 < share < 1:
            raise ValueError(f"--prune-experts {share:g}: a share of the experts lies between 0 and 1.")
        if layers is not None and layers < 1:
            raise ValueError(f"--prune-layers {layers}: at least one layer goes.")
        if not (self.prunes or self.numbers):
            raise ValueError(
                "nothing to do: say --prune-experts SHARE, --prune-layers N, --sparsity 2:4, --int8 or --int4."
            )
        if self.recover_steps < 0 or self.calibration_rows < 1:
            raise ValueError("--recover-steps is at least 0, --calibration-rows at least 1.")
        if self.recover_steps and not self.prunes:
            raise ValueError("--recover-steps trains what pruning has left; a model of fewer bits isn't trained.")

    @property
    def prunes(self) -> bool:
        """Whether weights are left out or set to 0."""
        return bool(self.prune_experts or self.prune_layers or self.sparsity)

    def words(self) -> list[str]:
        """The flags as they would be typed."""
        flags = {"prune-experts": self.prune_experts, "prune-layers": self.prune_layers, "sparsity": self.sparsity}
        told = [f"--{flag} {value}" for flag, value in flags.items() if value]
        told += [f"--recover-steps {self.recover_steps}"] * bool(self.recover_steps)
        return told + [f"--{self.numbers.replace('-', ' ')}"] * bool(self.numbers) if self.numbers else told

    def pruned(self, model: Any, calibration: Calibration) -> tuple[Any, dict[str, Any]]:
        """The model with what is to go left out, and what has gone.

        Raises:
            ValueError: for what doesn't fit the model.
        """
        told: dict[str, Any] = {}
        if self.prune_layers:
            model, told["layers_left_out"] = prune_layers(model, self.prune_layers, calibration)
        if self.prune_experts:
            model, told["experts_kept"] = prune_experts(model, self.prune_experts, calibration)
        if self.sparsity == PATTERN:
            model, told["zeros_by_pattern"] = make_sparse(model, calibration)
        return model, told
