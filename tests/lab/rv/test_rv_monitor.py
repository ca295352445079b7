"""The kernel's own generator takes the automaton, and what it generates compiles: the table in it is the model's.

dot2k comes from Debian's linux-source-6.12 (tools/verification). Debian's kernels are built without CONFIG_RV, so that
the monitor is compiled for them, and not run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from faults.build import module_headers, unpack_parts

from kvmtrace.check.state_machine import STATE_NAMES
from kvmtrace.lab.cache import cached
from kvmtrace.lab.kernels import get_kernel
from kvmtrace.render.model.rv_dot import MODEL, identifier, render_rv_dot, rv_edges, tracepoint_steps

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.lab, pytest.mark.slow]
SERIES = "6.12"
TOOLS = "tools/verification"
# our own instrumentation: the arguments of each tracepoint, as arch/x86/kvm/trace.h has them, and a guard
# fmt: off
HANDLERS: dict[str, tuple[str, str]] = {
    "kvm_fpu": ("int load", "load == {value}"),
    "kvm_inj_virq": ("unsigned int vector, bool soft, bool reinjected", ""),
    "kvm_inj_exception": ("unsigned int exception, bool has_error, unsigned int error_code, bool reinjected", ""),
    "kvm_halt_poll_ns": ("bool grow, unsigned int vcpu_id, unsigned int new, unsigned int old", ""),
    "kvm_vcpu_wakeup": ("__u64 ns, bool waited, bool valid", ""),
    "kvm_entry": ("struct kvm_vcpu *vcpu, bool force_immediate_exit", ""),
    "kvm_exit": ("struct kvm_vcpu *vcpu, u32 isa", ""),
    "kvm_userspace_exit": ("__u32 reason, int errno", ""),
}
# fmt: on


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that dot2k made."""
    tools = cached(f"rv-tools-{SERIES}", lambda work: unpack_parts(work, SERIES, [TOOLS])) / TOOLS
    work = tmp_path_factory.mktemp("rv")
    (work / f"{MODEL}.dot").write_text(render_rv_dot())
    shutil.copytree(tools / "dot2" / "dot2k_templates", work / "dot2k" / "rv_templates")
    argv = [sys.executable, str(tools / "dot2" / "dot2k"), "-d", f"{MODEL}.dot", "-t", "per_task"]
    environment = {**os.environ, "PYTHONPATH": str(tools), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(argv, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return work / MODEL


def test_the_generated_table_is_the_models(generated: Path) -> None:
    """Compile the generated header as it is, and print its table."""
    (generated / "print.c").write_text(
        f"""#include <stdbool.h>
#include <stdio.h>
#include "{MODEL}.h"
int main(void)
{{
        const struct automaton_{MODEL} *a = &automaton_{MODEL};

        for (int s = 0; s < state_max_{MODEL}; s++)
                for (int e = 0; e < event_max_{MODEL}; e++)
                        if (a->function[s][e] != INVALID_STATE)
                                printf("%s %s %s\\n", a->state_names[s], a->event_names[e],
                                       a->state_names[a->function[s][e]]);
        return a->initial_state != unknown_{MODEL};
}}
"""
    )
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", "print", "print.c"], cwd=generated, check=True)
    printed = subprocess.run([generated / "print"], capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = {
        f"{identifier(source)} {identifier(event)} {identifier(target)}"
        for (source, target), events in rv_edges().items()
        for event in events
    }
    assert set(printed) == wanted
    assert len(printed) == len(wanted)
    assert any(line.startswith(identifier(STATE_NAMES[0])) for line in printed)


def instrumented(text: str) -> str:
    """Fill in what dot2k leaves to a monitor's author, by hand: arguments, the task, tracepoints."""
    for step in tracepoint_steps():
        name = identifier(step.name)
        arguments, guard = HANDLERS[step.kind]
        text = text.replace(
            f"handle_{name}(void *data, /* XXX: fill header */)", f"handle_{name}(void *data, {arguments})"
        )
        text = text.replace(
            f'"{MODEL}", /* XXX: tracepoint */, handle_{name}', f'"{MODEL}", {step.kind}, handle_{name}'
        )
        call = f"da_handle_event_{MODEL}(p, {name}_{MODEL});"
        if guard:
            text = text.replace(call, f"if ({guard.format(value=step.condition[1])})\n\t\t{call}")
    text = text.replace("/* XXX: how do I get p? */", "current")
    assert "/* XXX: " not in re.sub(r"/\*\n \* XXX: include.*?\*/", "", text, flags=re.DOTALL)
    return text.replace('#include "kvm_vcpu.h"\n', f'{TRACEPOINTS}#include "kvm_vcpu.h"\n{REPORTS}', 1)


def names_of(arguments: str) -> str:
    """Return the names of declared arguments."""
    return ", ".join(re.findall(r"(\w+)(?:,|$)", arguments))


# a module of its own has no include/trace/events/rv.h to edit; KVM's tracepoints stand in a header of KVM's own
TRACEPOINTS = "#include <linux/kvm_host.h>\n" + "".join(
    f"DECLARE_TRACE({kind}, TP_PROTO({arguments}), TP_ARGS({names_of(arguments)}));\n"
    for kind, (arguments, _) in HANDLERS.items()
)
REPORTS = f"""
static void trace_event_{MODEL}(int id, char *state, char *event, char *next_state, bool final_state) {{ }}
static void trace_error_{MODEL}(int id, char *state, char *event) {{ }}
"""


def test_the_generated_monitor_compiles_for_the_kernel(generated: Path, tmp_path: Path) -> None:
    """Compile the module's object against the kernel's headers, with CONFIG_RV as its build would have it."""
    for name in (f"{MODEL}.h", f"{MODEL}.c"):
        shutil.copy(generated / name, tmp_path / name)
    source = tmp_path / f"{MODEL}.c"
    source.write_text(instrumented(source.read_text()))
    (tmp_path / "Makefile").write_text(f"obj-m := {MODEL}.o\nccflags-y := -DCONFIG_RV=1 -Wall\n")
    argv = ["make", "-s", "-C", str(module_headers(get_kernel(SERIES))), f"M={tmp_path}", f"{MODEL}.o"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (tmp_path / f"{MODEL}.o").stat().st_size > 1000
