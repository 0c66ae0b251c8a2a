"""SmoothedClassifier: image -> fit -> seed -> votes -> certificate. Library, CLI and server all go through it.

g = SmoothedClassifier.load("bundled:cifar10")
certificate = g.certify("frog.png", Plan(n=10_000))
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

from macer_serve.checkpoint import (
    GRAPH,
    CheckpointConfig,
    describe_module,
    load_checkpoint,
    write_checkpoint,
)
from macer_serve.errors import EngineError, ParameterError
from macer_serve.fit import Fit, fit_for, upload_radius
from macer_serve.images import UploadLimits
from macer_serve.inputs import Image, pixels_of
from macer_serve.issuing import EvaluationSeed, SeedProof, SeedSource
from macer_serve.smoothing.certificate import Certificate, radii, reason, shown_group, statement
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.noise import FixedPoint, NoiseKind, noise_for
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.policy import policy_digest
from macer_serve.voters import Voter, VoterOptions, drive, open_voter

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class ModelInput:
    """An image as model input: fixed point `x` `int32 [H, W, C]`, its digest, and how it came from the upload."""

    x: FixedPoint
    digest: str
    upload_shape: tuple[int, ...]
    fit: Fit


class SmoothedClassifier:
    """g(x) = argmax_c P(f(x + noise) = c), for the base classifier f of a checkpoint.

    Without `voter` it prepares inputs and writes certificates, but runs no network: the server's ingress.
    Without `issuer` seeds are random. Certificates are then unsigned, and cannot be repeated after this object is gone.
    Raises `EngineError` for a voter whose noise or classes are not those that certificates would state.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        voter: Voter | None = None,
        noise: NoiseKind = "exact",
        issuer: SeedSource | None = None,
        limits: UploadLimits | None = None,
    ) -> None:
        self.config, self.voter = config, voter
        self.noise = noise_for(noise, config.sigma)
        self.limits = limits or UploadLimits()
        self.issuer = issuer or EvaluationSeed.random()
        self._digest = config.digest
        self._graph: bytes | None = None  # of a captured module, in ONNX
        if voter is not None:
            asked = (self.noise.name, self.noise.sigma, len(config.classes))
            if asked != (voter.noise.name, voter.noise.sigma, voter.classes):
                raise EngineError(
                    f"the voter draws {voter.noise.name} noise of sigma {voter.noise.sigma} and knows {voter.classes} "
                    f"classes; certificates would say {', '.join(map(str, asked))}"
                )

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        noise: NoiseKind = "exact",
        issuer: SeedSource | None = None,
        options: VoterOptions | None = None,
        hierarchy: bool = True,
    ) -> SmoothedClassifier:
        """Returns the checkpoint (a folder, or `bundled:NAME`) with a voter of its own, warmed up.

        `options` say by which engine votes are computed. `hierarchy=False` certifies as if the checkpoint had no
        hierarchy, which is another policy. Raises `CheckpointError`, `EngineError`.
        """
        config, classifier = load_checkpoint(checkpoint)
        config = config if hierarchy else replace(config, hierarchy=None)
        voter = open_voter(classifier, sigma=config.sigma, noise=noise, options=options)
        return cls(config, voter=voter, noise=noise, issuer=issuer)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        sigma: float,
        classes: Sequence[str] | int,
        input_shape: tuple[int, int, int],
        resize: int | None = None,
        name: str | None = None,
        noise: NoiseKind = "exact",
        issuer: SeedSource | None = None,
        options: VoterOptions | None = None,
    ) -> SmoothedClassifier:
        """Returns the smoothed classifier of what a torch module computes now, in eval mode, with a voter of its own.

        The module maps pixel values in [0, 1] `[k, C, H, W]` to logits `[k, classes]`; its normalisation is part of it.
        It is captured once, as a graph with weights of its own, and left as it was: training it further changes
        nothing. Certificates name that graph, and `save_checkpoint` writes it. `classes` are names, or their number;
        `input_shape` is (C, H, W). Raises `ParameterError` for a module that cannot be captured or is no function of
        its input, `CheckpointError` for facts outside their range, `EngineError` if no engine can run the graph.
        """
        config, classifier = describe_module(
            module, sigma=sigma, classes=classes, input_shape=input_shape, resize=resize, name=name
        )
        voter = open_voter(classifier, sigma=config.sigma, noise=noise, options=options)
        smoothed = cls(config, voter=voter, noise=noise, issuer=issuer)
        smoothed._graph = classifier.graph()
        return smoothed

    def save_checkpoint(self, folder: str | Path) -> None:
        """Writes what `from_module` captured, the model that certificates name, as a checkpoint that can be served.

        Raises `ParameterError` for a classifier that was not made by `from_module`, `CheckpointError` for a folder
        that holds other files, `OutputError` for one that cannot be written.
        """
        if self._graph is None:
            raise ParameterError("this classifier was loaded from a checkpoint: copy the checkpoint's folder")
        write_checkpoint(self.config, {GRAPH: self._graph}, folder)

    def model_input(self, image: Image) -> ModelInput:
        """Returns the image as model input. `macer_serve.inputs` says what is taken for an image.

        Raises `UploadError` for what is not an acceptable image, `ParameterError` for an object of another kind.
        """
        pixels = pixels_of(image, self.limits)
        channels, height, width = self.config.input_shape
        fit = fit_for((pixels.shape[0], pixels.shape[1]), self.config.resize, (height, width), channels)
        x = fit.apply(pixels)
        header = f"lattice-18 {x.shape[0]}x{x.shape[1]}x{x.shape[2]}\0".encode()
        digest = "sha256:" + hashlib.sha256(header + x.astype("<i4").tobytes()).hexdigest()
        return ModelInput(x, digest, pixels.shape, fit)

    def policy_plan(self, plan: Plan) -> Plan:
        """Returns the plan with the checkpoint's hierarchy, if the plan is for hard votes with a radius.

        Raises `ParameterError` for a plan with another hierarchy.
        """
        if plan.mode == "predict" or plan.soft:
            return plan
        if plan.hierarchy not in (None, self.config.hierarchy):
            raise ParameterError("the plan has another hierarchy than the checkpoint: leave it out")
        return replace(plan, hierarchy=self.config.hierarchy)

    def seed_proof(self, model_input: ModelInput, plan: Plan) -> SeedProof:
        """Returns the noise seed of the input under the plan's policy, with its proof."""
        plan = self.policy_plan(plan)
        return self.issuer.seed_proof(
            input_digest=model_input.digest,
            model_digest=self._digest,
            policy_digest=policy_digest(plan, self.noise.name),
        )

    def certification(self, model_input: ModelInput, plan: Plan, *, cap: int | None = None) -> Certification:
        """Returns a fresh run for the input. Whoever drives it feeds it votes. `cap` limits the estimation votes.

        Raises `ParameterError` for a plan that this checkpoint's outputs do not allow.
        """
        require_outputs(self.config, plan)
        return Certification(
            self.policy_plan(plan),
            classes=len(self.config.classes),
            sigma=self.config.sigma,
            tau=self.noise.tau(model_input.x),
            cap=cap,
        )

    def certificate(self, model_input: ModelInput, run: Certification, proof: SeedProof, engine: str) -> Certificate:
        """Returns what the run has proved about the input so far, by votes under the seed of `proof`."""
        claim, plan, config = run.claim(), run.plan, self.config
        radius, group_radius = radii(claim, plan)
        return Certificate(
            statement=statement(claim, plan, self.noise.name),
            label=None if claim.class_id is None else config.classes[claim.class_id],
            class_id=claim.class_id,
            abstained=claim.abstained,
            radius=radius,
            upload_radius=upload_radius(radius, model_input.fit, model_input.x.size),
            level=claim.level,
            group=shown_group(claim, plan),
            group_radius=group_radius,
            group_upload_radius=upload_radius(group_radius, model_input.fit, model_input.x.size),
            reason=reason(claim, plan, config.classes),
            stopped=claim.stopped,
            sigma=config.sigma,
            alpha=plan.alpha,
            n0=plan.selection,
            n=claim.n,
            votes=claim.votes,
            proof_n=claim.proof_n,
            proof_votes=None if claim.proof_n == claim.n else claim.proof_votes,
            selection_votes=claim.selection_votes,
            p_lower=claim.p_lower,
            p_upper=claim.p_upper,
            bound="+".join(plan.alpha_split),
            tau=run.tau,
            noise=self.noise.name,
            plan=plan.to_json(),
            model={"name": config.name, "digest": self._digest},
            input={
                "digest": model_input.digest,
                "shape": list(config.input_shape),
                "upload_shape": list(model_input.upload_shape),
            },
            fit=model_input.fit.to_json(),
            engine=engine,
            policy=policy_digest(plan, self.noise.name),
            key_id=self.issuer.key_id,
            seed_proof=proof.text,
        )

    @overload
    def certify(
        self, image: Image, plan: Plan | None = None, *, progress: Callable[[Certification], None] | None = None
    ) -> Certificate: ...

    @overload
    def certify(
        self,
        image: list[Image] | tuple[Image, ...],
        plan: Plan | None = None,
        *,
        progress: Callable[[Certification], None] | None = None,
    ) -> list[Certificate]: ...

    def certify(
        self,
        image: Image | list[Image] | tuple[Image, ...],
        plan: Plan | None = None,
        *,
        progress: Callable[[Certification], None] | None = None,
    ) -> Certificate | list[Certificate]:
        """Returns the certificate of an image, or those of a list of images, under the plan.

        The default plan is Cohen's, n = 100,000. `progress` is called after every pass of votes. Raises `UploadError`
        for what is not an acceptable image, `ParameterError` for an object of another kind, and `EngineError` if the
        classifier has no voter.
        """
        if self.voter is None:
            raise EngineError("this classifier has no voter: load it with SmoothedClassifier.load")
        if isinstance(image, list | tuple):
            return [self.certify(one, plan, progress=progress) for one in image]
        model_input, plan = self.model_input(image), plan or Plan()
        run, proof = self.certification(model_input, plan), self.seed_proof(model_input, plan)
        drive(run, model_input.x, proof.seed, self.voter, progress)
        return self.certificate(model_input, run, proof, self.voter.engine)

    def signed(self, certificate: Certificate) -> str | None:
        """Returns the certificate as a JWS under the issuer's key; None if the issuer has no key."""
        return self.issuer.sign(certificate.canonical())


def require_outputs(config: CheckpointConfig, plan: Plan) -> None:
    """Raise `ParameterError` for the soft bound on a network that returns probabilities: softmax of them is no vote."""
    if plan.bound == "soft" and config.outputs != "logits":
        raise ParameterError(
            f"the soft bound needs logits, and {config.name} returns {config.outputs}: its network ends in a softmax. "
            "Take the one-sided or two-sided bound: hard votes are the same. Or export the network without its softmax."
        )
