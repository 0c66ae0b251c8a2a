"""A deployment's YAML, read and checked before anything is started."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from macer_serve.errors import ParameterError, first_line
from macer_serve.serving.settings import AppSettings

BUNDLED = Path(__file__).with_name("smoothed.yaml")
IMPORT_PATH = "macer_serve.serving.app:build"


@dataclass(frozen=True, slots=True)
class Deployment:
    """A YAML file as Serve understands it, with the settings of its one application."""

    schema: ServeDeploySchema
    settings: AppSettings

    @property
    def host(self) -> str:
        return str(self.schema.http_options.host)

    @property
    def port(self) -> int:
        return int(self.schema.http_options.port)

    @property
    def name(self) -> str:
        """The name of the application."""
        return str(self.schema.applications[0].name)

    @property
    def url(self) -> str:
        """The address at which a client on this machine finds the application."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        prefix = self.schema.applications[0].route_prefix or "/"
        return f"http://{host}:{self.port}{prefix.rstrip('/')}/"


def read_deployment(path: Path | None = None) -> Deployment:
    """Returns the deployment of a YAML file, or of the bundled one. Raises `ParameterError` naming what is wrong."""
    path = path or BUNDLED
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path}: {getattr(error, 'strerror', None) or first_line(error)}") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ParameterError(
            f"{path}{line}: not YAML: {getattr(error, 'problem', None) or first_line(error)}"
        ) from error
    if not isinstance(document, dict):
        raise ParameterError(f"{path}: a deployment is a mapping with http_options and applications")
    schema = _validated(ServeDeploySchema, document, path, ())
    if len(schema.applications) != 1 or schema.applications[0].import_path != IMPORT_PATH:
        raise ParameterError(
            f"{path}: applications must hold one application whose import_path is {IMPORT_PATH}. "
            "Other deployments are started by 'serve run'"
        )
    settings = _validated(AppSettings, schema.applications[0].args, path, ("applications", 0, "args"))
    return Deployment(schema, settings)


def _validated(model: Any, document: Any, path: Path, where: tuple[str | int, ...]) -> Any:
    """Returns the document as the pydantic model. Raises `ParameterError` with every fault on one line."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        faults = [f"{_place((*where, *fault['loc']))}: {_words(fault['msg'])}" for fault in error.errors()]
        raise ParameterError(f"{path}: {'; '.join(faults)}") from error


def _place(location: Iterable[str | int]) -> str:
    return ".".join(map(str, location)) or "the document"


def _words(message: str) -> str:
    return " ".join(message.removeprefix("Value error, ").split())
