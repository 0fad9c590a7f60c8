"""One technique a file; the registry names them all."""

from __future__ import annotations

from tsotsallm.stages.adapt import Adapt
from tsotsallm.stages.compensate import Compensate
from tsotsallm.stages.contract import Stage
from tsotsallm.stages.depth import Depth
from tsotsallm.stages.distill import Distill
from tsotsallm.stages.layers import Layers
from tsotsallm.stages.neurons import Neurons
from tsotsallm.stages.quantize import Quantize
from tsotsallm.stages.replace import Replace
from tsotsallm.stages.sparsity import Sparsity
from tsotsallm.stages.tune import Tune
from tsotsallm.stages.vocabulary import Vocabulary

STAGES: dict[str, type[Stage]] = {
    "vocabulary": Vocabulary, "layers": Layers, "depth": Depth, "replace": Replace, "neurons": Neurons, "sparsity": Sparsity,
    "adapt": Adapt, "distill": Distill, "quantize": Quantize, "compensate": Compensate, "tune": Tune}
