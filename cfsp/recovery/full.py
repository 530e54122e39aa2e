"""Full fine-tuning: every weight of the pruned model is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cfsp.config.components import component
from cfsp.config.contracts import Recovery
from cfsp.recovery.base import Recovered
from cfsp.recovery.settings import Name, Training

if TYPE_CHECKING:
    import torch

    from cfsp.architecture.views import DecoderView
    from cfsp.data.limits import Limits
    from cfsp.recovery.base import Recovered, RecoveryContext


@component
class Full(Training, Recovery):
    """Train all parameters in float32, and convert them back to their dtype afterwards."""

    name: Name = "full"
    trains: ClassVar[bool] = True

    def check(self, view: DecoderView, tokenizer: Any, limits: Limits, device: torch.device) -> dict[str, Any]:
        """See :class:`cfsp.config.contracts.Recovery`."""
        # Start-up time: loads numpy.
        from cfsp.recovery.train import check_training

        return check_training(self, tokenizer, limits, device)

    def recover(self, context: RecoveryContext) -> Recovered:
        """See :class:`cfsp.config.contracts.Recovery`."""
        # Start-up time: loads numpy.
        from cfsp.recovery.train import train

        context.model.requires_grad_(True)
        return Recovered(context.model, {"name": self.name, **train(context.model, self, context)})
