"""Foreign networks become checkpoints: ONNX files, torchvision's networks, published files of randomized smoothing.

    config = import_model("net.onnx", "runs/mine", Facts(sigma=0.25, classes=("cat", "dog"), value_range=(0, 1)))

Nothing in a file is executed. What becomes of it is compared with the original on a probe before it is written.
"""

from macer_serve.importing.facts import Facts
from macer_serve.importing.wrapping import import_model

__all__ = ["Facts", "import_model"]
