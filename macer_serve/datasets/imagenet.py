"""ImageNet (Deng et al. 2009): photographs of a thousand classes, as a tree of files."""

from __future__ import annotations

from macer_serve.datasets.base import DatasetInfo

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYOUT = (
    "{root}/train/<class>/*.JPEG and {root}/val/<class>/*.JPEG (or PNG, WebP), one folder per class "
    "(torchvision's ImageFolder; also accepted with a folder of the data set's name in between)"
)

DATASET = DatasetInfo(
    "imagenet", "ImageNet", (3, 224, 224), MEAN, STD, resize=256, layout=LAYOUT, architecture="resnet50", flip=True
)
