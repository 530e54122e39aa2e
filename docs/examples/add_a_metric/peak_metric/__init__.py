"""An importance metric in a package of its own."""

from cfsp.components import component


@component
class Peak:
    """Largest output weight of a neuron to a power, times its RMS activation.

    Args:
        power: exponent of the weight; 0 ranks by activation alone.

    Example:
        ``cfsp --config-dir conf plugins.allow=[peak_metric] importance=peak importance.power=1.5``
    """

    power: float = 2.0

    def score(self, channels, activation):
        """Return scores [N] of the FFN neurons, or of the channels of attention heads; higher scores are kept.

        Args:
            channels: the unit's fp32 matrices: gate and up [N, d], then down [d, N]; of heads q, k, v and o.
            activation: statistics of the calibration pass, [N] each: rms, mean, variance, mean_norm.
        """
        *_inputs, output = channels.weights()
        return output.abs().amax(0) ** self.power * activation.rms
