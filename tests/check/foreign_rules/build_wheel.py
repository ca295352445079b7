"""A build backend of one function: the package needs nothing that its tests would have to fetch."""

import zipfile

NAME = "kvmtrace_quiet_guest-1"
FILES = {
    f"{NAME}.dist-info/METADATA": "Metadata-Version: 2.1\nName: kvmtrace-quiet-guest\nVersion: 1\n",
    f"{NAME}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    f"{NAME}.dist-info/entry_points.txt": """[kvmtrace.rules]
quiet = kvmtrace_quiet_guest:RULE
fails = kvmtrace_quiet_guest:BROKEN
taken = kvmtrace_quiet_guest:SAME_NAME
gone = kvmtrace_no_such_module:RULE
""",
}


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Write the wheel and return its name."""
    name = f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as wheel:
        wheel.write("kvmtrace_quiet_guest.py")
        for path, text in FILES.items():
            wheel.writestr(path, text)
        record = "".join(f"{path},,\n" for path in (*wheel.namelist(), f"{NAME}.dist-info/RECORD"))
        wheel.writestr(f"{NAME}.dist-info/RECORD", record)
    return name
