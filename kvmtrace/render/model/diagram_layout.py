"""Where things stand in the lifecycle diagram: laid out by hand, because the picture is always the same.

Units are SVG user units (pixels at 100 %). Edges are polylines whose corners are rounded; an edge without a
row here is drawn as a straight line, which is legible but not pretty: a test keeps the table complete.
"""

from __future__ import annotations

from kvmtrace.isa.registry import run_functions
from kvmtrace.lazy_dataclass import dataclass

WIDTH, HEIGHT = 1260, 860
NODE_WIDTH, NODE_HEIGHT = 132, 44
HUB_RADIUS = 26

Point = tuple[float, float]

# centre of each state's box
# fmt: off
POSITIONS: dict[str, Point] = {
    "unknown": (180, 62),
    "user": (590, 62),
    "ioctl": (890, 62),
    "run_called": (300, 204),
    "returned": (1110, 148),
    "left": (1110, 262),
    "loaded": (300, 386),
    "woken": (590, 386),
    "handling": (870, 386),
    "injecting": (300, 534),
    "loop": (590, 476),
    "exited": (870, 534),
    "unloaded": (1110, 476),
    "switching_in": (300, 676),
    "switched_out": (1010, 676),
    "guest": (590, 792),
}

# (y of the upper edge, height, words at the left: what and where, CSS class)
LANES: tuple[tuple[float, float, tuple[str, ...], str], ...] = (
    (0, 110, ("user space",), "a"),
    (110, 192, ("KVM_RUN", "kvm_vcpu_ioctl"), "b"),
    (302, 308, ("run loop", "vcpu_run", "vcpu_enter_guest"), "c"),
    (610, 124, ("world switch", *run_functions()), "b"),
    (734, 126, ("guest mode",), "a"),
)
# fmt: on

# the box around the states of the run loop: x, y, width, height
LOOP_BOX = (210, 326, 750, 262)


@dataclass(frozen=True)
class Path:
    """A hand-laid edge: its corners, the baseline of its label's last line, and how that is anchored."""

    points: tuple[Point, ...]
    label: Point
    anchor: str = "middle"


# fmt: off
EDGE_PATHS: dict[tuple[str, str], Path] = {
    ("user", "run_called"): Path(((524, 70), (320, 70), (320, 182)), (420, 100)),
    ("run_called", "user"): Path(((280, 182), (280, 46), (524, 46)), (272, 134), "end"),
    ("run_called", "run_called"): Path(((234, 196), (196, 196), (196, 214), (234, 214)), (190, 210), "end"),
    ("run_called", "loaded"): Path(((300, 226), (300, 364)), (308, 314), "start"),
    ("run_called", "left"): Path(((366, 214), (710, 214), (710, 270), (1044, 270)), (870, 262)),
    ("run_called", "returned"): Path(((366, 194), (770, 194), (770, 156), (1044, 156)), (870, 148)),
    ("loop", "woken"): Path(((580, 451), (580, 408)), (566, 446), "end"),
    ("loop", "injecting"): Path(((568, 490), (510, 524), (366, 524)), (446, 510), "middle"),
    ("loop", "switching_in"): Path(((574, 498), (490, 640), (490, 668), (366, 668)), (420, 660)),
    ("loop", "guest"): Path(((590, 502), (590, 770)), (598, 640), "start"),
    ("loop", "unloaded"): Path(((616, 476), (1044, 476)), (724, 468)),
    ("switching_in", "guest"): Path(((300, 698), (300, 784), (524, 784)), (410, 776)),
    ("switching_in", "handling"): Path(((234, 676), (188, 676), (188, 340), (890, 340), (890, 364)),
                                       (196, 640), "start"),
    ("guest", "guest"): Path(((560, 814), (560, 838), (620, 838), (620, 814)), (630, 838), "start"),
    ("guest", "injecting"): Path(((540, 770), (540, 560), (366, 546)), (532, 700), "end"),
    ("guest", "exited"): Path(((656, 780), (870, 780), (870, 556)), (862, 664), "end"),
    ("guest", "switched_out"): Path(((656, 800), (1010, 800), (1010, 698)), (800, 794)),
    ("switched_out", "exited"): Path(((1010, 654), (1010, 632), (900, 632), (900, 556)), (960, 624)),
    ("exited", "exited"): Path(((850, 556), (850, 576), (820, 576), (820, 556)), (812, 586), "end"),
    ("exited", "handling"): Path(((870, 512), (870, 408)), (878, 446), "start"),
    ("guest", "handling"): Path(((640, 770), (640, 716), (770, 716), (770, 400), (804, 400)), (762, 690), "end"),
    ("guest", "left"): Path(((656, 813), (1200, 813), (1200, 268), (1176, 268)), (960, 828)),
    ("guest", "unloaded"): Path(((656, 808), (1130, 808), (1130, 498)), (1138, 700), "start"),
    ("unloaded", "left"): Path(((1110, 454), (1110, 284)), (1118, 352), "start"),
    ("unloaded", "loaded"): Path(((1090, 454), (1090, 318), (330, 318), (330, 364)), (710, 312)),
    ("unloaded", "returned"): Path(((1176, 486), (1216, 486), (1216, 158), (1176, 158)), (1210, 420), "end"),
    ("unloaded", "user"): Path(((1176, 470), (1234, 470), (1234, 24), (610, 24), (610, 40)), (1070, 20)),
    ("left", "returned"): Path(((1110, 240), (1110, 170)), (1118, 210), "start"),
    ("left", "user"): Path(((1044, 254), (630, 254), (630, 84)), (638, 246), "start"),
    ("returned", "user"): Path(((1044, 138), (670, 138), (670, 70), (656, 70)), (760, 130)),
    ("user", "ioctl"): Path(((656, 50), (824, 50)), (740, 43)),
    ("ioctl", "user"): Path(((824, 64), (656, 64)), (744, 94)),
    ("ioctl", "ioctl"): Path(((880, 40), (880, 28), (910, 28), (910, 40)), (918, 34), "start"),
    ("ioctl", "returned"): Path(((956, 62), (1110, 62), (1110, 126)), (1116, 84), "start"),
    ("ioctl", "loaded"): Path(((910, 84), (910, 300), (350, 300), (350, 364)), (710, 296)),
}
# fmt: on
