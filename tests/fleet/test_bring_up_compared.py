"""`fleet compare`: a kernel that takes longer to make a vCPU is found on its CPU model, and fails a build."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

from fleet.generator import KERNELS, MODELS, make_host
from kvmtrace.cli.main import cli
from kvmtrace.fleet.store import Store

SLOWER_NS = 20_000_000
BASE, NEW = (f"kernel = '{kernel}'" for kernel in KERNELS)


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixteen hosts of each of two CPU models and kernels; the second kernel needs 20 ms more on the first model."""
    rng = np.random.default_rng(22)
    store = Store(str(tmp_path_factory.mktemp("dest")))
    for number in range(64):
        model, kernel = MODELS[number % 2], KERNELS[number // 2 % 2]
        row = make_host(number, model, kernel, rng)
        row["calls"] = [{**call, "dur_ns": round(call["dur_ns"] * rng.lognormal(0, 0.2))} for call in row["calls"]]
        for call in row["calls"]:
            if call["name"] == "KVM_CREATE_VCPU" and (model, kernel) == (MODELS[0], KERNELS[1]):
                call["dur_ns"] += SLOWER_NS
        if kernel == KERNELS[1]:
            row["events"] = row["events"][1:]
        store.write_summary(row)
    return store.root


def compare(dest: str, base: str, new: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["fleet", "compare", dest, "--base", base, "--new", new, "--fail-on-regression"])
    return done.exit_code, done.output


def test_the_slower_kernel_fails(dest: str) -> None:
    code, text = compare(dest, BASE, NEW)
    assert code == 1
    slower = [line for line in text.splitlines() if line.startswith("  slower: ")]
    (line,) = slower
    assert line.startswith(f"  slower: KVM_CREATE_VCPU on {MODELS[0]}: first call ")
    assert line.endswith("over 16 and 16 hosts")
    assert "events recorded on one side only: " in text


def test_what_became_faster_does_not(dest: str) -> None:
    code, text = compare(dest, NEW, BASE)
    assert code == 0
    assert f"  changed: KVM_CREATE_VCPU on {MODELS[0]}: first call " in text
    assert "slower: " not in text


def test_a_model_of_one_side_alone_is_said(dest: str) -> None:
    _, text = compare(dest, f"{BASE} AND cpu_model = '{MODELS[1]}'", NEW)
    assert f"CPU model {MODELS[0]}: no host of it in base" in text


def test_bring_up_is_in_sql(dest: str) -> None:
    query = "SELECT kernel, count(*) AS n FROM calls WHERE name = 'KVM_CREATE_VCPU' GROUP BY kernel ORDER BY kernel"
    done = CliRunner().invoke(cli, ["fleet", "sql", dest, query])
    assert done.output.splitlines() == ['"kernel","n"', *(f'"{kernel}",32' for kernel in KERNELS)]
