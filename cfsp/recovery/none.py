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
    """Return the model untouched."""

    # No field, which would be a key of the configuration.
    name: ClassVar[str] = "none"  # type: ignore[misc]
    trains: ClassVar[bool] = False

    def check(self, view: DecoderView, tokenizer: Any, limits: Limits, device: torch.device) -> dict[str, Any]:
        return {}

    def recover(self, context: RecoveryContext) -> Recovered:

        return Recovered(context.model)
