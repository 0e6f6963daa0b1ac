"""Post-training quantization: one method, one paper, one file.

A method is a function `(weight, quantizer, axis) -> (QTensor, Info)`; methods that look at data are given it by their
own arguments. No method imports another.
"""

from precision_lab.ptq.info import Info
from precision_lab.ptq.round_to_nearest import round_to_nearest

__all__ = ["Info", "round_to_nearest"]
