"""No recovery: the pruned weights stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cfsp.config.components import component
from cfsp.config.contracts import Recovery
from cfsp.recovery.base import Recovered

if TYPE_CHECKING:
    import torch

    from cfsp.architecture.views import DecoderView
    from cfsp.data.limits import Limits
    from cfsp.recovery.base import Recovered, RecoveryContext


@component
class NoRecovery(Recovery):
    """Recovery that does not train; the model is returned unchanged."""

    # A ClassVar, because a field would become a key of the configuration.
    name: ClassVar[str] = "none"  # type: ignore[misc]
    trains: ClassVar[bool] = False

    def check(self, view: DecoderView, tokenizer: Any, limits: Limits, device: torch.device) -> dict[str, Any]:
        """See :class:`cfsp.config.contracts.Recovery`. There is nothing to check."""
        return {}

    def recover(self, context: RecoveryContext) -> Recovered:
        """See :class:`cfsp.config.contracts.Recovery`."""
        return Recovered(context.model)
