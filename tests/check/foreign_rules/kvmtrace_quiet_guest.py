"""A rule that another package brings: this site's guests do not access no model-specific registers."""

from kvmtrace.check.rule import SUSPICION, Rule

RULE = Rule(
    id="X1",
    title="quiet guest",
    severity=SUSPICION,
    needs=("kvm_msr",),
    sentence="A guest of this site accesses no model-specific register.",
    source="our guests' configuration",
    places="kvm_msr",
)


@RULE.part()
def _no_cpuid(excerpt, found):
    positions = excerpt.segments.positions("kvm_msr")
    found.check(len(positions))
    found.violate(positions, lambda _: ("no kvm_msr", "one"))


BROKEN = Rule("X2", "fails", SUSPICION, ("kvm_msr",), "It fails.", "nowhere", places="kvm_msr")


@BROKEN.part()
def _fails(excerpt, found):
    raise ZeroDivisionError("no rule divides by zero")


SAME_NAME = Rule("V1", "taken", SUSPICION, ("kvm_msr",), "There is a V1.", "nowhere")
