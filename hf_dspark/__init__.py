"""DSpark speculative decoding for Hugging Face transformers: `target.generate(..., assistant_model=draft)`.

Importing this package wraps `GenerationMixin.generate` once (`door.py`); calls without a DSpark draft pass through.
"""

from .comparison import compare
from .configuration_dspark import DSparkConfig
from .draft import draft_block
from .modeling_dspark import DSparkDraftModel
from .predictor import DSparkPredictor
from .schedule import ConfidenceThreshold, CostTable, FixedLength, ThroughputSchedule
from .serving import GenerationRequest, GenerationResult, generate_many
from .state import DraftBlock, GenerationStats, RoundRecord

__version__ = "0.1.0"

__all__ = [
    "ConfidenceThreshold",
    "CostTable",
    "DSparkConfig",
    "DSparkDraftModel",
    "DSparkPredictor",
    "DraftBlock",
    "FixedLength",
    "GenerationRequest",
    "GenerationResult",
    "GenerationStats",
    "RoundRecord",
    "ThroughputSchedule",
    "__version__",
    "compare",
    "draft_block",
    "generate_many",
]
