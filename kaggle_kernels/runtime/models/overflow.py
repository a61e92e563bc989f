"""A float16 model computed in float32, for the rows that overflow float16.

Some inputs drive activations of Qwen2.5 and Gemma-2 beyond 65,504; such a row ends as NaN. scoring.score_batch
then computes it again in the context `ComputeInFloat32()`. The weights stay in float16; those of one layer at a
time are converted.
"""

import torch
from torch.nn.functional import layer_norm, linear, rms_norm
from torch.overrides import TorchFunctionMode

FLOAT16_MAX = torch.finfo(torch.float16).max

# These functions want input and weights in one dtype.
WITH_WEIGHTS = (layer_norm, linear, rms_norm)

# bitsandbytes' first step of an int8 product, which takes float16 only.
QUANTISE_TO_INT8 = "bitsandbytes.int8_vectorwise_quant.default"


class ComputeInFloat32(TorchFunctionMode):
    """In this thread, hidden states stay float32 from layer to layer, whatever the dtype of the weights."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call a function of PyTorch's so that hidden states stay float32.

        PyTorch hands every call of its functions to this method while the mode is on.
        """
        kwargs = kwargs or {}

        # Hidden states are float32 and the weights float16: the weights are converted.
        if function in WITH_WEIGHTS:
            args = [to_float32(value) for value in args]
            kwargs = {name: to_float32(value) for name, value in kwargs.items()}
            return function(*args, **kwargs)

        # The int8 kernel of bitsandbytes takes float16 only: what does not fit becomes the largest.
        if str(function) == QUANTISE_TO_INT8:
            hidden, *others = args
            hidden = hidden.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
            return function(hidden, *others, **kwargs)

        # bitsandbytes and PEFT convert a layer's input to the dtype of its weights. In float16 it
        # would overflow again, so that it stays as it is.
        result = function(*args, **kwargs)
        if function is torch.Tensor.to:
            original = args[0]
            if original.dtype is torch.float32 and result.dtype is torch.float16:
                return original
        return result


def to_float32(value):
    """Convert a float16 tensor; anything else stays as it is."""
    if isinstance(value, torch.Tensor) and value.dtype is torch.float16:
        return value.float()
    return value
