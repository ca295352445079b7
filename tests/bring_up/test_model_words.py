"""The construction's model is closed both ways: every condition it names is known, every known one is named."""

from kvmtrace.bring_up.contract_check import CONDITIONS
from kvmtrace.model.bring_up import CONTRACTS, OTHER_PROCESS


def test_conditions_are_those_of_the_contracts() -> None:
    named = {refusal.condition for contract in CONTRACTS.values() for refusal in contract.refusals}
    assert named | {OTHER_PROCESS.condition} == set(CONDITIONS)
