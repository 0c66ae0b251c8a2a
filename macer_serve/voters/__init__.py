"""Voters turn (input, seed, draw) into votes. Everything slow lives here, and no statistics.

    with open_voter(classifier, sigma=0.25, options=VoterOptions(engine="onnx")) as voter:
        (votes,) = voter.submit([Task(x, seed, Draw("estimation", 0, 1000))]).result()

A voter's votes depend on its base classifier and on the task, never on what else is computed beside it.
"""

from macer_serve.voters.driving import drive
from macer_serve.voters.engines import EngineName
from macer_serve.voters.opening import open_voter
from macer_serve.voters.options import VoterOptions
from macer_serve.voters.tasks import Task, Voter

__all__ = ["EngineName", "Task", "Voter", "VoterOptions", "drive", "open_voter"]
