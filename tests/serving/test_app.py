"""Settings and the app builder: an operator's mistake is named at the start, not met by a user."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from brightness import issuer
from pydantic import ValidationError

from macer_serve.checkpoint import load_config, resolve
from macer_serve.checkpoint.config import digest_of
from macer_serve.cli.exit_codes import exit_code
from macer_serve.errors import CheckpointError, IssuerKeyError, MacerError, MissingFactsError, ParameterError
from macer_serve.serving.app import build
from macer_serve.serving.problems import document_for, status_of
from macer_serve.serving.settings import AppSettings

MODEL = {"checkpoint": "bundled:cifar10"}


def settings(**changes: Any) -> AppSettings:
    return AppSettings.model_validate({"models": {"cifar10": MODEL}, **changes})


def test_the_shipped_yaml_is_valid() -> None:
    file = Path(__file__).parents[2] / "deployments" / "smoothed.yaml"
    document = yaml.safe_load(file.read_text())
    (application,) = document["applications"]
    assert application["import_path"] == "macer_serve.serving.app:build"
    assert document["http_options"]["host"] == "127.0.0.1"  # nobody outside, unless the operator says so
    assert AppSettings.model_validate(application["args"]).models["cifar10"].checkpoint == "bundled:cifar10"


def test_ray_finds_the_type_of_the_arguments_in_the_signature() -> None:
    assert inspect.signature(build).parameters["args"].annotation is AppSettings


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"models": {"a": {**MODEL, "sigma": 0.5}}}, "models.a.sigma"),
        ({"models": {"a": MODEL}, "limit": {}}, "limit"),
        ({"models": {"a": MODEL}, "limits": {"n": 5}}, "limits.n"),
        ({"models": {}}, "at least one checkpoint"),
        ({}, "models"),
        ({"models": {"a": {}}}, "models.a.checkpoint"),
        ({"models": {"a": {**MODEL, "n": 0}}}, "models.a.n"),
        ({"models": {"a": {**MODEL, "n": 10**8}}}, "models.a.n"),
        ({"models": {"a": {**MODEL, "alpha": 0.5}}}, "models.a.alpha"),
        ({"models": {"a": {**MODEL, "alpha": float("nan")}}}, "models.a.alpha"),
        ({"models": {"a": {**MODEL, "n": 1000, "cap": 1001}}}, "cap must not exceed n = 1000"),
        ({"models": {"a": {**MODEL, "radius": 0.5, "tolerance": 0.1}}}, "two plans: give one of them"),
        ({"models": {"a": {**MODEL, "tolerance": 0}}}, "models.a.tolerance"),
        ({"models": {"a": {**MODEL, "bound": "three-sided"}}}, "models.a.bound"),
        ({"models": {"a": {**MODEL, "replicas": 0}}}, "models.a.replicas"),
        ({"models": {"a": {**MODEL, "noise": "none"}}}, "models.a.noise"),
        ({"models": {"a/b": MODEL}}, "a/b"),
        ({"models": {"a#b": MODEL}}, "a#b"),
        ({"models": {"": MODEL}}, "models"),
        ({"models": {"a": MODEL}, "limits": {"pixels": 10**9}}, "limits.pixels"),
        ({"models": {"a": MODEL}, "limits": {"timeout_s": float("inf")}}, "limits.timeout_s"),
        ({"models": {"a": MODEL}, "limits": {"concurrent": 0}}, "limits.concurrent"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as refused:
        AppSettings.model_validate(arguments)
    assert named in str(refused.value)


def test_a_missing_checkpoint_stops_the_builder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        build(settings(models={"a": {"checkpoint": str(tmp_path / "nowhere")}}))


def test_the_soft_bound_on_a_network_of_probabilities_stops_the_builder(tmp_path: Path) -> None:
    checkpoint = copy_of("bundled:cifar10", tmp_path / "copy", outputs="probabilities")
    build(settings(models={"a": {"checkpoint": checkpoint}}))
    with pytest.raises(ParameterError, match="soft bound needs logits"):
        build(settings(models={"a": {"checkpoint": checkpoint, "bound": "soft"}}))


def test_a_missing_key_file_stops_the_builder(tmp_path: Path) -> None:
    with pytest.raises(IssuerKeyError, match=r"nowhere cannot be read: No such file"):
        build(settings(key_file=str(tmp_path / "nowhere")))


def test_a_damaged_key_stops_the_builder_and_is_not_printed(tmp_path: Path) -> None:
    key = json.loads(issuer().to_key_file())
    private = key["keys"][0]["d"]
    key["keys"][0]["n"] = key["keys"][0]["n"][:-2] + "AA"
    (tmp_path / "issuer.key").write_text(json.dumps(key))
    with pytest.raises(IssuerKeyError) as refused:
        build(settings(key_file=str(tmp_path / "issuer.key")))
    assert private[:20] not in str(refused.value)


def test_a_key_of_one_start_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="ray.serve"):
        import logging

        logging.getLogger("ray.serve").addHandler(caplog.handler)
        build(settings())
    assert "a key is made for this start alone" in caplog.text


def copy_of(checkpoint: str, folder: Path, **changes: Any) -> str:
    """Returns a copy of a checkpoint with another config.json."""
    shutil.copytree(resolve(checkpoint), folder)
    config = dataclasses.replace(load_config(checkpoint), **changes)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    return str(folder)


TWINS: dict[str, dict[str, Any]] = {
    "other plan": {"n": 1000},
    "other alpha": {"alpha": 0.01},
    "other bound": {"bound": "two-sided"},
    "other noise": {"noise": "gaussian"},
    "other engine": {"voter": {"engine": "torch"}},
}


@pytest.mark.parametrize("case", TWINS)
def test_two_names_of_one_checkpoint_are_refused(case: str) -> None:
    with pytest.raises(ParameterError, match="models a and b are one model"):
        build(settings(models={"a": MODEL, "b": MODEL | TWINS[case]}))


@pytest.mark.parametrize(
    "changes", [{"name": "x"}, {"metrics": {}}, {"recipe": {}, "versions": {}}, {"sigma": 0.5}, {"resize": 40}]
)
def test_the_same_weights_under_another_configuration_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    copied = copy_of("bundled:cifar10", tmp_path / "copy", **changes)
    with pytest.raises(ParameterError, match="models first and second are one model"):
        build(settings(models={"first": MODEL, "second": {"checkpoint": copied}}))


def test_an_int8_form_beside_its_network_is_refused(tmp_path: Path) -> None:
    """Of three models, the two that share a file are named."""
    files = load_config("bundled:cifar10").files
    plain = {name: digest for name, digest in files.items() if "int8" not in name}
    copied = copy_of("bundled:cifar10", tmp_path / "copy", files=plain, quantization={})
    other = copy_of("bundled:cifar10", tmp_path / "other", files={"model.onnx": digest_of(b"x")}, quantization={})
    Path(other, "model.onnx").write_bytes(b"x")
    models = {"int8": MODEL, "other": {"checkpoint": other}, "fp32": {"checkpoint": copied}}
    with pytest.raises(ParameterError, match="models int8 and fp32 are one model"):
        build(settings(models=models))
    build(settings(models={"int8": MODEL, "other": {"checkpoint": other}}))


def test_every_error_has_its_status_and_exit_code() -> None:
    def kinds(kind: type[MacerError]) -> list[type[MacerError]]:
        return [kind, *(below for child in kind.__subclasses__() for below in kinds(child))]

    for kind in kinds(MacerError):
        error = kind("x", ()) if kind is MissingFactsError else kind("x")
        assert document_for(error)["status"] == status_of(error) in range(400, 600)
        assert exit_code(error) in range(1, 20)
    assert not [name for name in vars(MacerError) if name in ("status", "exit_code")]
