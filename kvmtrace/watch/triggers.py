"""What makes the flight recorder save: how users write it, and what is noted when it happens.

slower-than TIME[:REASON]       an exit took so long, waiting and being preempted left out
rate REASON>N/s                 a VM's exits of a reason are so many
run-delay TIME                  a vCPU waited so long for a CPU
slo pNN REASON > TIME over TIME a quantile of a VM's exits over a while
signal USR1                     somebody sends it
command CMD                     a command ends
model                           what was recorded contradicts the reference model
monitor                         a vCPU thread takes a step that the model does not allow
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any

from kvmtrace.errors import UsageError
from kvmtrace.isa.registry import BY_NAME, ISAS
from kvmtrace.kvm.userspace_exits import describe_userspace_exit_reason
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

TIME_UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9}
_TIME = r"(\d+(?:\.\d+)?) ?(ns|us|ms|s|m)"
_REASON = r"([A-Za-z][\w-]*|\*)"
_FORMS = {
    "slower-than": re.compile(rf"slower-than {_TIME}(?:: ?{_REASON})?"),
    "rate": re.compile(rf"rate {_REASON} ?> ?(\d+(?:\.\d+)?)([kM]?)/s"),
    "run-delay": re.compile(rf"run-delay {_TIME}"),
    "slo": re.compile(rf"slo p(\d\d?(?:\.\d+)?) {_REASON} ?> ?{_TIME} over {_TIME}", re.IGNORECASE),
    "signal": re.compile(r"signal (?:SIG)?(USR1)"),
    "command": re.compile(r"command (\S.*)"),
    "model": re.compile(r"model"),
    "monitor": re.compile(r"monitor"),
}
EXAMPLES = (
    "'slower-than 10ms', 'rate HLT>10000/s', 'run-delay 5ms', 'slo p99 KVM_EXIT_IO > 1ms over 10s', 'signal USR1'"
)
MOST_USERSPACE_REASONS = 62
ANY = "*"
USERSPACE = "KVM_EXIT_"


@dataclass(frozen=True)
class Trigger:
    """One trigger.

    Parameters
    ----------
    kind : key of _FORMS
    text : as the user gave it
    reason : an exit reason's or userspace exit's name as KVM prints it, in capitals; None for any
    limit_ns : of slower-than, run-delay, slo
    per_second : of rate
    quantile, window_ns : of slo
    command : of command
    """

    kind: str
    text: str
    reason: str | None = None
    limit_ns: int = 0
    per_second: float = 0.0
    quantile: float = 0.0
    window_ns: int = 0
    command: tuple[str, ...] = ()

    def means(self, name: str) -> bool:
        """Say whether a reason by this name is meant; IO is KVM_EXIT_IO too, for a KVM without VM-exits."""
        return self.reason is None or name.upper() in (self.reason, f"{USERSPACE}{self.reason}")

    @property
    def of_userspace(self) -> bool:
        """Say whether it names a userspace exit."""
        return self.reason is not None and self.reason.startswith((USERSPACE, "EINTR"))


@dataclass(frozen=True)
class Fired:
    """A trigger that has happened.

    Parameters
    ----------
    trigger : Trigger
    ts_ns : CLOCK_MONOTONIC
    pid, tid, vcpu_id, vm : whose; None if it is about nobody
    reason : name of the exit reason or userspace exit
    began_ns, dur_ns : of what took so long
    value : what was measured: exits per second, or the quantile in ns
    detail : what a command or the monitor said
    """

    trigger: Trigger
    ts_ns: int
    pid: int | None = None
    tid: int | None = None
    vcpu_id: int | None = None
    vm: str | None = None
    reason: str | None = None
    began_ns: int | None = None
    dur_ns: int | None = None
    value: float | None = None
    detail: str | None = None

    def as_meta(self) -> dict[str, Any]:
        """Return the metadata's row of `triggers`."""
        own = {name: value for name, value in vars(self).items() if name != "trigger"}
        return {"kind": self.trigger.kind, "trigger": self.trigger.text, **own}


def parse_trigger(text: str) -> Trigger:
    """Return the trigger that a text means.

    Raises
    ------
    UsageError
        It means none.
    """
    words = " ".join(text.split())
    for kind, form in _FORMS.items():
        match = form.fullmatch(words)
        if match is not None:
            return _PARSERS[kind](match, words)
    raise UsageError(f"--on {text!r}: no trigger is written so; examples: {EXAMPLES}")


def _time_ns(number: str, unit: str) -> int:
    ns = round(float(number) * TIME_UNITS[unit])
    if not 0 < ns < 1 << 62:
        raise UsageError(f"{number}{unit}: a trigger's time is more than 0 and less than a century")
    return ns


def _slower_than(match: re.Match[str], text: str) -> Trigger:
    return Trigger("slower-than", text, _reason(match[3]), _time_ns(match[1], match[2]))


def _rate(match: re.Match[str], text: str) -> Trigger:
    per_second = float(match[2]) * {"": 1, "k": 1e3, "M": 1e6}[match[3]]
    return Trigger("rate", text, _reason(match[1]), per_second=per_second)


def _run_delay(match: re.Match[str], text: str) -> Trigger:
    return Trigger("run-delay", text, limit_ns=_time_ns(match[1], match[2]))


def _slo(match: re.Match[str], text: str) -> Trigger:
    window_ns = _time_ns(match[5], match[6])
    if window_ns < TIME_UNITS["s"]:
        raise UsageError(f"--on {text!r}: it is looked at once a second: over 1s or more")
    return Trigger("slo", text, _reason(match[2]), _time_ns(match[3], match[4]), quantile=float(match[1]) / 100,
                   window_ns=window_ns)  # fmt: skip


def _command(match: re.Match[str], text: str) -> Trigger:
    try:
        words = shlex.split(match[1])
        if len(words) == 1:  # quoted as a whole
            words = shlex.split(words[0])
    except ValueError as error:
        raise UsageError(f"--on {text!r}: {error}") from error
    return Trigger("command", text, command=tuple(words))


_PARSERS: dict[str, Callable[[re.Match[str], str], Trigger]] = {
    "slower-than": _slower_than,
    "rate": _rate,
    "run-delay": _run_delay,
    "slo": _slo,
    "signal": lambda _, text: Trigger("signal", text),
    "command": _command,
    "model": lambda _, text: Trigger("model", text),
    "monitor": lambda _, text: Trigger("monitor", text),
}


def _reason(text: str | None) -> str | None:
    """Return the name of an exit reason or userspace exit in capitals; IO is KVM_EXIT_IO where no VM-exit is so called.

    Raises
    ------
    UsageError
        Nothing is called so.
    """
    if text is None or text == ANY:
        return None
    name = text.upper()
    exits = {known.upper() for isa in ISAS for known in isa.names.values()}
    left = {describe_userspace_exit_reason(number) for number in range(MOST_USERSPACE_REASONS)} | {"EINTR"}
    if name in exits or name in left:
        return name
    if f"{USERSPACE}{name}" in left:
        return f"{USERSPACE}{name}"
    raise UsageError(f"{text!r} is no exit reason; examples: HLT, MSR_WRITE, KVM_EXIT_IO")


def exit_name(isa: str | None, code: int) -> str:
    """Return an exit reason's name as KVM prints it."""
    known = BY_NAME.get(isa or "")
    return known.describe(code) if known else f"{code:#x}"
