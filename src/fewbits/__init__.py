"""Language models in few bits: quantize, load, run, fine-tune and save them.

`import fewbits` makes transformers find it: `from_pretrained` takes `FewbitsConfig`, and, where the
bitsandbytes package is not installed or after `enable(takeover=True)`, every `BitsAndBytesConfig`.
"""

from fewbits import distributed as distributed
from fewbits.config import BitsAndBytesConfig, FewbitsConfig
from fewbits.format import Format, Scheme
from fewbits.integrations import enable
from fewbits.machine import versions
from fewbits.model import quantize_model
from fewbits.ops import linear, quantize
from fewbits.recipe import Recipe
from fewbits.report import report
from fewbits.tensor import QuantizedTensor
from fewbits.training import prepare_for_training

__all__ = [
    "BitsAndBytesConfig",
    "FewbitsConfig",
    "Format",
    "QuantizedTensor",
    "Recipe",
    "Scheme",
    "enable",
    "linear",
    "prepare_for_training",
    "quantize",
    "quantize_model",
    "report",
]

__version__ = versions()["fewbits"]

enable()
