"""Certification logs on disk: tab-separated values, one line per image, and their settings in a file beside them.

    log.tsv       idx  label  predict  radius    correct  time            p_lower      n       count_a  top  ...
                  0    3      3        0.502113  1        0:00:00.412903  0.977683112  100000  97912    3    sha256
    log.tsv.json  {"log": 1, "settings": {"dataset": "cifar10", "sigma": 0.25}}

The first six columns are those of Cohen et al. 2019, which the field's other logs and scripts share. `predict` is -1
for an abstention. The last column is `input_digest`. `time` is `[D days, ]H:MM:SS[.ffffff]`; plain seconds are read,
too. Published logs print radii with three significant digits, rounded to nearest, so that some exceed what was
certified: see `Log.radius_decimals`.
"""

from macer_serve.evaluation.logs.reading import Log, read_log
from macer_serve.evaluation.logs.rows import ABSTAINED, UNDECODABLE, Row
from macer_serve.evaluation.logs.settings import Settings, settings_path
from macer_serve.evaluation.logs.writing import LogWriter

__all__ = ["ABSTAINED", "UNDECODABLE", "Log", "LogWriter", "Row", "Settings", "read_log", "settings_path"]
