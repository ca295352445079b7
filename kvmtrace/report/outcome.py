"""What became of one recording of many: its verdict, or why there is none, and what the test said of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtrace.check.verdict import Comparison, Violation
    from kvmtrace.report.document import Report

Status = Literal["pass", "fail", "crash", "hang", "skip"]
BAD_ENDS = ("fail", "crash", "hang")


@dataclass(frozen=True)
class OwnResult:
    """What a test of a suite said of itself.

    Parameters
    ----------
    status : "pass", "fail" (exit code), "crash" (killed by a signal), "hang" (ended by us), "skip"
    words : what tells so: "exit code 254", "killed by signal 11 (SIGSEGV)"
    seconds : how long it ran
    log : file with what it printed; None if that was not kept
    last_words : the last lines that it printed, "" if it printed none
    """

    status: Status
    words: str
    seconds: float
    log: str | None = None
    last_words: str = ""


@dataclass(frozen=True)
class Outcome:
    """One recording, checked or not.

    Parameters
    ----------
    name : the recording's path, or the test's name
    report : Report with `capture`, `loss`, `model`; None if there is none
    error : one line that says why nothing was checked, "" if it was
    error_code : the exit code that goes with it
    own : OwnResult of a test; None for a mere recording
    recording : path of the recording; None if it was not kept
    """

    name: str
    report: Report | None = None
    error: str = ""
    error_code: int = 0
    own: OwnResult | None = None
    recording: str | None = None

    @property
    def model(self) -> Comparison | None:
        """The comparison with the model."""
        return None if self.report is None else self.report.model

    @property
    def n_violations(self) -> int:
        """All violations, described or not; suspicions are none."""
        return 0 if self.model is None else self.model.n_violations

    @property
    def n_suspicions(self) -> int:
        """All suspicions."""
        return 0 if self.model is None else self.model.n_suspicions

    @property
    def findings(self) -> tuple[Violation, ...]:
        """The violations and suspicions that are described, the first divergence first."""
        if self.model is None:
            return ()
        first = self.model.first_divergence
        rest = tuple(one for one in self.model.violations if one != first)
        return rest if first is None else (first, *rest)

    @property
    def own_failed(self) -> bool:
        """Whether the test itself says that it failed, or was ended."""
        return self.own is not None and self.own.status in BAD_ENDS

    @property
    def failed(self) -> bool:
        """Whether anything is wrong: a violation, a test's own failure, or no verdict at all."""
        return bool(self.n_violations or self.error) or self.own_failed

    @property
    def skipped(self) -> bool:
        """Whether the test was skipped, or there was nothing to check in a recording."""
        if self.failed:
            return False
        if self.own is not None:
            return self.own.status == "skip"
        return self.model is None or not self.model.n_checks

    @property
    def verdict(self) -> str:
        """The model's verdict in a few words, or why there is none."""
        return self.error or ("not checked" if self.model is None else self.model.verdict)


@dataclass(frozen=True)
class Totals:
    """How many recordings came to what; `passed` + `skipped` + `failed` == `all`."""

    all: int
    failed: int
    skipped: int
    violating: int  # recordings with a violation
    violations: int
    suspicions: int
    errors: int  # recordings without a verdict
    own_failed: int  # tests that themselves say so

    @property
    def passed(self) -> int:
        """Recordings in which nothing is wrong."""
        return self.all - self.failed - self.skipped


def totals(outcomes: Iterable[Outcome]) -> Totals:
    """Count what came of many recordings."""
    every = list(outcomes)
    return Totals(
        all=len(every),
        failed=sum(one.failed for one in every),
        skipped=sum(one.skipped for one in every),
        violating=sum(one.n_violations > 0 for one in every),
        violations=sum(one.n_violations for one in every),
        suspicions=sum(one.n_suspicions for one in every),
        errors=sum(bool(one.error) for one in every),
        own_failed=sum(one.own_failed for one in every),
    )
