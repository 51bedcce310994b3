"""`lookalike launch OPTIONS lookalike VERB ...`: torchrun, with the setting that its restarts need."""

import importlib
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

# Without it, workers restarted by torchrun read the addresses of the previous attempt and hang (torch 2.13 with gloo
# or NCCL; pytorch issues 135712 and 167288). torchrun reads it, so a worker would set it too late; its rendezvous
# "static" (--node-rank, --master-addr) does not. Remove once torch has its own cure.
_RESTART_SETTING = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"

_USAGE = """Usage: {program} [TORCHRUN OPTIONS] lookalike VERB ...

Runs a command in several processes, on one node or many, and starts them again when one dies: torchrun with the
environment that its restarts need. Options are torchrun's (`torchrun --help`), for example:

  {program} --standalone --nproc-per-node 8 --max-restarts 3 lookalike train CONFIG
"""


def torchrun_command(arguments: Sequence[str]) -> list[str]:
    """The program and arguments that start torchrun; the first of `arguments` that is no option names a module."""
    return [sys.executable, "-m", "torch.distributed.run", "--module", *arguments]


def torchrun_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The same with what restarts need; a setting that is there already is respected. Workers inherit all of it."""
    return {_RESTART_SETTING: "1", **environment}


def may_hang_after_restart(environment: Mapping[str, str]) -> bool:
    """Whether this process is a worker of a torchrun that restarts its workers and shares its own store with them."""
    return (
        int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
        and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    )


def refuse_mistakes(arguments: Sequence[str]) -> None:
    """Ends this process, with message and exit code, where every worker would refuse its settings, and where it is
    asked for the help of a verb.

    torchrun would start the workers again and again, and would not say why they end.
    """
    pairs = list(pairwise(arguments))
    verb = next((place for place, (name, verb) in enumerate(pairs) if name == "lookalike" and verb in _verbs()), None)
    if verb is not None and "--help" in arguments[verb + 2 :]:
        importlib.import_module("lookalike.__main__").main(list(arguments[verb + 1 :]))
        sys.exit(0)
    if ("lookalike", "train") in pairs:
        own = arguments[pairs.index(("lookalike", "train")) + 2 :]
        importlib.import_module("training.__main__").check(own, program="lookalike train")


def _verbs() -> Collection[str]:
    verbs: Collection[str] = importlib.import_module("lookalike.__main__").VERBS
    return verbs


def main(arguments: Sequence[str] | None = None, *, program: str = "lookalike launch") -> None:
    """Becomes torchrun: signals that are meant for this process reach it, and its exit code is this one's.

    Settings of training that are refused end it before, with exit code 2.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_USAGE.format(program=program), end="")
        sys.exit(0 if given else 2)
    command, environment = torchrun_command(given), torchrun_environment(os.environ)
    refuse_mistakes(given)
    os.execve(command[0], command, environment)
